"""NVFP4 GEMM for Hopper with prepared weights: d[m, n] = a[m, k] @ b[n, k].T, a in BF16 (W4A16), out in BF16 or FP32.

Bound: reading the packed weights up to some 64 rows of a, the BF16 tensor cores above. sm_90 has no FP4 MMA, so codes
are decoded to BF16 in registers, which is exact: E2M1 x E4M3 has at most six significant bits.

The product is computed as d.T = b @ a.T: 64 weight rows of a warpgroup, from registers, by tile_m tokens, from shared
memory, with WGMMA or, for 8 tokens, with each warp's own MMAs, whose sums are the same. b lies in memory in the
order "fragments_sm90" of `fp4suite.layouts`: what a thread needs of 64 rows x 64 of K is one run of 16 bytes of codes
and one of 8 bytes of scales, and tiles that follow each other along K are neighbours.

    load       one warp: bulk copies of codes and scales, TMA for the tokens, `stages` steps of K ahead, into the next
               tile and, for the weights, before the kernel before this one has ended (see `launch`); or two, of which
               the second sends for the tokens (`Config.loaders`)
    multiply   warpgroups: decode one step of 64 rows x 64 of K while WGMMA works on the one before
    share      CTAs of a cluster, side by side along n, receive the same tokens by multicast
    sums       of a tile are kept by one warpgroup, which stores them by TMA, or are spread over `groups_k` warpgroups,
               which add them through shared memory, or over those of `split` CTAs of a cluster too, each of which gets
               a part of the tokens: what the others have of them is sent to its shared memory; always in one order
    overlap    two tiles beside each other have an odd number of 64 rows: the last warpgroup of both has the same ones,
               and half of the tokens. 7168 rows by 512 tokens are 128 tiles of 224 x 128, for 132 SMs
    tail       tiles of a last wave that would fill at most half of the GPU are each taken by both CTAs of a cluster, in
               halves of K; they swap half of their sums
"""

import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any, Protocol

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from cutlass.utils import HardwareInfo, hopper_helpers
from torch import Tensor

from fp4suite import arch
from fp4suite.built import MAX_SHARED_BYTES
from fp4suite.formats import NVFP4Tensor, SfLayout
from fp4suite.layouts import Order
from fp4suite.problem import GemmProblem

from .instructions import (
    bulk_load,
    create_policy,
    load4,
    load_matrices,
    loads_have_come,
    mma_16816,
    mul_bf16x2,
    mul_by_half,
    pack_bf16,
    push,
)
from .nvfp4 import SCALE_BIAS, Host, asked, check_packed, check_stored_rows, row_stride

ARCH = "sm_90a"
SF_LAYOUT: SfLayout = "linear"
WEIGHT_ORDER: Order = "fragments_sm90"
TILE = 64  # rows and elements of K of one tile of b
CODE_BYTES, SCALE_BYTES = 2048, 256  # of a tile
WARPGROUP = 128
BAND = 8  # tiles of tokens that are walked over for one tile of weights
BARRIER_BYTES = 1024  # of barriers and, in the second half, alphas
ALPHA_BYTES = BARRIER_BYTES // 2
MAX_SEGMENTS = ALPHA_BYTES // (16 * 4)  # each of up to 16 warps that multiply has slots for all alphas
CTA_BYTES = 1024  # of shared memory that the hardware keeps for each CTA
MAX_STAGES = 16  # where as many are asked for as fit
MOST_STAGES = (BARRIER_BYTES - ALPHA_BYTES) // 16 - 2  # that there are barriers for, beside those of parts of sums
REGISTERS = 65536  # of an SM
WIDE = (24, 232, 240, 160)  # registers of a thread that loads, and of one that keeps many sums: of one to three groups
FOUR = (24, 120)  # and with three for 128 tokens beside one for 64, which keeps what it has at launch
STORE_ROWS = 64  # tokens of one store of d, where a tile is made of so many
ALL = 5  # the barrier of all groups: those before are of one each, which may be a tile behind
WARP_TOKENS = 8  # up to so many are multiplied by warps, without WGMMA
WARP_ROWS = 16  # weight rows of a warp
SM_COUNT = arch.SM_COUNT[ARCH]
UNBIAS = 2.0 ** (126 - SCALE_BIAS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """tile_m: tokens. groups_n: warpgroups side by side, each with `strips` times 64 weight rows; groups_k: warpgroups
    that take steps of K in turn. warps: of a group, each with 16 weight rows; of four, two or three, that only multiply
    by themselves. tile_k: elements of K a step, `stages` steps in flight (0: as many as fit). share, split: CTAs of a
    cluster side by side along n, and along K. tail: those side by side that take a tile of the last wave in parts of K.
    overlap: two tiles beside each other have 64 weight rows in common, which the last group of each multiplies by half
    of the tokens. blocks: CTAs that share an SM.
    """

    tile_m: int = 64
    groups_n: int = 2
    groups_k: int = 1
    warps: int = 4
    strips: int = 1
    tile_k: int = 128
    stages: int = 0
    share: int = 1
    split: int = 1
    tail: int = 1
    overlap: bool = False
    blocks: int = 1

    @property
    def tile_n(self) -> int:
        """Weight rows that a tile takes in."""
        return WARP_ROWS * self.warps * self.groups_n * self.strips

    @property
    def rows(self) -> int:
        """Of these, those that are its own: of the common ones half."""
        return self.tile_n - TILE // 2 * self.overlap

    @property
    def groups(self) -> int:
        return self.groups_n * self.groups_k

    @property
    def wide(self) -> bool:
        """Whether the sums take so many registers that the loading warps give theirs away."""
        return self.tile_m * self.strips > 128 or self.by_halves

    @property
    def threads(self) -> int:
        return 32 * self.warps * self.groups + (WARPGROUP if self.wide else 32 * self.loaders)

    @property
    def loaders(self) -> int:
        """Warps that load: with a second one the first tokens need not wait until all stages' weights are asked for.

        It pays where those bring fewer bytes than the tokens, and loses with less than four groups or all of the SM.
        """
        alone = self.groups_k == 4 and self.share * self.split * self.blocks == 1
        return 2 if alone and 2 * self.tile_m * TILE > self.tile_n * (CODE_BYTES + SCALE_BYTES) // TILE else 1

    @property
    def reduces(self) -> bool:
        """Whether the sums of a tile are spread."""
        return self.groups_k > 1 or self.split > 1

    @property
    def by_warp(self) -> bool:
        """Whether warps multiply by themselves: for few tokens, waiting for WGMMA takes longer than what it does."""
        return self.tile_m <= WARP_TOKENS or self.warps < 4

    @property
    def by_halves(self) -> bool:
        """Whether half of a unit is decoded while the other is multiplied: four warpgroups have no room for two."""
        return self.overlap and self.groups == 4

    @property
    def paired(self) -> int:
        """Steps that are multiplied in one pass: WGMMA's two decoded operands take turns."""
        return 2 if self.tile_k * self.strips == TILE and not (self.by_warp or self.by_halves) else 1

    @property
    def ahead(self) -> bool:
        """Whether scales are decoded before the MMA whose registers the result takes is done."""
        room = self.wide or registers_at_launch(self.blocks * self.threads) >= 80 + self.tile_m * self.strips // 2
        return room and self.tile_m >= 64 and self.tile_k * self.strips > TILE and not self.by_halves

    @property
    def reads_ahead(self) -> bool:
        """Whether what is decoded beside an MMA is read from shared memory before that begins."""
        return self.ahead and not self.wide and self.tile_m >= 128

    @property
    def turn(self) -> int:
        """What the number of stages is a multiple of.

        A stage always belongs to the same warpgroups. With others between, one could come back to it before those have
        seen it filled (copies end in any order), and would take the phase before the last for the last.
        """
        return self.groups_k * self.paired if self.groups_k > 1 else 1


SPACE = {
    "tile_m": (8, 16, 32, 64, 96, 128, 176, 192, 256),
    "groups_n": (1, 2, 3, 4),
    "groups_k": (1, 2, 4),
    "warps": (4, 3, 2),
    "strips": (1, 2),
    "tile_k": (64, 128, 256),
    "share": (1, 2),
    "split": (1, 2, 3, 4),
    "tail": (1, 2),
    "overlap": (False, True),
    "blocks": (1, 2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What, beside the config, a compiled kernel is made for. m, n and k stay open."""

    out: str
    segments: int


CUTE_OUT = {"bf16": BFloat16, "fp32": Float32}


def stage_bytes(config: Config) -> int:
    """What one step of K takes of shared memory."""
    weights = config.tile_n * (config.tile_k // TILE) * ((CODE_BYTES + SCALE_BYTES) // TILE)
    return weights + config.tile_m * config.tile_k * 2


class Tile(Protocol):
    """What of a config the way of the sums depends on."""

    @property
    def tile_m(self) -> int: ...
    @property
    def tile_n(self) -> int: ...
    @property
    def groups_n(self) -> int: ...
    @property
    def groups_k(self) -> int: ...
    @property
    def split(self) -> int: ...
    @property
    def reduces(self) -> bool: ...


def pitch(columns: int) -> int:
    """Numbers between two tokens' sums of so many columns: eight lanes of four tokens touch every bank once."""
    return columns + 4


@dataclass(frozen=True, slots=True)
class Parts:
    """Sums of parts of K, in registers of `owners` groups (`groups_k` in each of `split` CTAs), for one of them each.

    A unit is what a group has of eight tokens: four numbers a thread. Each owner adds up `most` units or one less.
    """

    owners: int
    units: int
    columns: int  # of d, of a group and unit

    @property
    def most(self) -> int:
        return -(-self.units // self.owners)

    def owner(self, unit: int) -> int:
        return unit * self.owners // self.units

    def first(self, owner: int) -> int:
        return -(-owner * self.units // self.owners)

    def count(self, owner: int) -> int:
        return self.first(owner + 1) - self.first(owner)

    @property
    def unit_bytes(self) -> int:
        return self.columns * 8 * 4

    @property
    def room(self) -> int:
        """Bytes a group needs for the others' numbers, then for its own as rows of d."""
        return self.most * max((self.owners - 1) * self.unit_bytes, 8 * pitch(self.columns) * 4)


def parts(config: Tile) -> Parts:
    columns = config.tile_n // config.groups_n
    strips = max(1, columns // TILE)
    return Parts(config.split * config.groups_k, strips * config.tile_m // 8, columns // strips)


def store_rows(config: Tile) -> int:
    """Tokens of one store of d, of which a tile has one or more: two where it is not whole ones of the usual size."""
    if config.tile_m <= STORE_ROWS:
        return config.tile_m
    return STORE_ROWS if config.tile_m % STORE_ROWS == 0 else config.tile_m // 2


def store_bytes(config: Tile, out: str) -> int:
    """Shared memory through which the sums of a tile leave."""
    if config.split > 1:
        return config.groups_k * config.groups_n * parts(config).room
    if config.groups_k > 1:
        return config.groups_k * config.tile_m * pitch(config.tile_n) * 4
    return config.groups_n * 2 * store_rows(config) * TILE * CUTE_OUT[out].width // 8


def stages_of(config: Config, out: str) -> int:
    """Steps in flight: as configured, or as many as fit."""
    if config.stages:
        return config.stages
    room = (MAX_SHARED_BYTES[ARCH] + CTA_BYTES) // config.blocks - CTA_BYTES - BARRIER_BYTES
    fit = max(0, room - store_bytes(config, out)) // stage_bytes(config)
    return min(fit, MAX_STAGES) // config.turn * config.turn


def shared_bytes(config: Config, out: str) -> int:
    """Shared memory of one CTA, as the kernel allocates it."""
    return BARRIER_BYTES + stages_of(config, out) * stage_bytes(config) + store_bytes(config, out)


def registers_at_launch(threads: int) -> int:
    """Of a thread, if so many are to share an SM: each quarter of it has a quarter of the registers."""
    warps = -(-threads // 128)
    return REGISTERS // 4 // (32 * warps) // 8 * 8


def refused(config: Config) -> str | None:
    """Why no problem can run with this config, or None if one may."""
    for knob, values in SPACE.items():
        if getattr(config, knob) not in values:
            return f"{knob}={getattr(config, knob)} is none of {', '.join(map(str, values))}"
    if config.warps < 4:
        if config.tile_m > 2 * WARP_TOKENS or config.groups_n * config.strips * config.tail > 1:
            return f"warps={config.warps} is for {2 * WARP_TOKENS} tokens, and groups_n, strips and tail of 1"
        if not config.reduces or config.tile_k == TILE:
            return f"warps={config.warps} is for sums that are reduced, and tile_k of {2 * TILE} or more"
    if config.tail > 1 and (
        config.reduces or config.strips > 1 or config.tile_m not in (128, 256) or config.share != config.tail
    ):
        return f"tail={config.tail} is for one strip of 128 or 256 tokens, share={config.tail} and split=1"
    if config.overlap and (
        config.reduces or config.strips * config.tail > 1 or config.groups_n < 2 or config.tile_m not in (128, 256)
    ):
        return "overlap is for two groups or more with one strip of 128 or 256 tokens, and split and tail of 1"
    sums = config.tile_m * config.strips
    if sums > 256:
        return f"{config.tile_m} tokens by {config.strips} strips: sums do not fit the registers"
    if config.groups > (4 if sums <= 128 else 3 if sums <= 192 else 2):
        return f"{config.groups} warpgroups with sums of {config.tile_m} x {config.strips}: too many threads"
    if config.groups == 3 and sums > 128 and (config.strips > 1 or config.split > 2):
        return f"{config.strips} strips, split={config.split}: three groups with {sums} sums a row would spill"
    if config.share > 1 and config.tile_m % (8 * config.share):
        return f"tile_m={config.tile_m} is not shared by {config.share} CTAs in parts of 8 tokens"
    at_launch = registers_at_launch(config.blocks * config.threads)
    if config.wide:
        at_work = WIDE[0] + config.groups * WIDE[config.groups] if not config.by_halves else 0
        fits = at_work * WARPGROUP * config.blocks <= REGISTERS
        fits = fits and at_launch >= config.tile_m // 2 + 30  # ptxas wants to see room for one MMA
    else:
        fits = at_launch >= (48 if config.by_warp else 64) + sums // 2
    if not fits:
        return f"blocks={config.blocks}: the registers do not hold the sums of so many CTAs"
    return None


def supports(problem: GemmProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.act != "bf16":
        return f"activations in {problem.act}: this kernel takes bf16"
    if problem.out not in CUTE_OUT:
        return f"output in {problem.out}: this kernel writes bf16 or fp32"
    if problem.order != WEIGHT_ORDER:
        return f"weights in the order {problem.order}: this kernel reads {WEIGHT_ORDER}"
    why = refused(config)
    if why is not None:
        return why
    if config.overlap and problem.n % least_rows(config):
        return f"n={problem.n} is not a multiple of {least_rows(config)}, the rows of two tiles that overlap"
    if problem.segments > MAX_SEGMENTS:
        return f"segments={problem.segments} is not in 1..{MAX_SEGMENTS}"
    if config.by_halves and problem.segments == MAX_SEGMENTS:
        return f"segments={problem.segments} and four groups that overlap: the loading warp would spill"
    step = config.tile_k * config.paired
    if problem.n % TILE or problem.k % step:
        return f"n={problem.n}, k={problem.k}: n must be a multiple of {TILE}, k of {step}"
    stages = stages_of(config, problem.out)
    if stages <= config.groups_k * config.paired:
        return f"{stages} stages: {config.groups_k} warpgroups hold {config.paired} each while they wait for the next"
    if stages % config.turn:
        return f"stages={stages} is not a multiple of {config.turn}: each belongs to the same warpgroups always"
    steps = problem.k // step
    if steps - (config.split - 1) * -(-steps // config.split) < config.groups_k:
        return f"k={problem.k} leaves too little for the last of {config.split} parts of {config.groups_k} warpgroups"
    if steps < config.tail:
        return f"k={problem.k} is too little for {config.tail} CTAs"
    need = shared_bytes(config, problem.out)
    if stages > MOST_STAGES or config.blocks * (need + CTA_BYTES) > MAX_SHARED_BYTES[ARCH] + CTA_BYTES:
        return f"{config.blocks} CTAs need {need} bytes of shared memory each, {ARCH} has {MAX_SHARED_BYTES[ARCH]}"
    return None


# microseconds of a tile for 1000 of k, for more than 64 tokens: fitted to 1,249 timings on an H100, or as they say
TILE_US = {
    Config(tile_m=128, groups_n=1): 3.45,
    Config(tile_m=128, groups_n=2): 5.35,
    Config(tile_m=128, groups_n=3): 7.7,
    Config(tile_m=176, groups_n=2, tile_k=64): 7.0,  # of four timings
    Config(tile_m=192, groups_n=2, tile_k=64): 7.5,  # of two
    Config(tile_m=256, groups_n=2, tile_k=64): 9.55,
    Config(tile_m=256, groups_n=1, tile_k=64): 5.6,
    Config(tile_m=64, groups_n=1, groups_k=2): 2.4,
    Config(tile_m=128, groups_n=4, tile_k=64, overlap=True): 9.5,  # of two timings beside 256 tokens
    Config(tile_m=96, groups_n=2): 4.5,  # of two
    Config(tile_m=96, groups_n=3): 6.5,  # of two
    Config(tile_m=192, groups_n=3, tile_k=64): 11.3,  # of three
    Config(tile_m=176, groups_n=3, tile_k=64): 10.4,  # predicted from the last
}
# that clusters of so many CTAs reach; of three 126 on some H100s, but on one 41 took 1.6 times as long as 40 should
CLUSTERED_SMS = {1: SM_COUNT, 2: SM_COUNT, 3: 120, 4: 120}
READ_BYTES_PER_US = 3e6


def _shared(problem: GemmProblem, config: Config) -> Config:
    """The same by pairs of CTAs, which take tiles in parts where that halves the last of several waves."""
    waves, rest = divmod(-(-problem.n // (2 * config.tile_n)) * -(-problem.m // config.tile_m), SM_COUNT // 2)
    return replace(config, share=2, tail=2 if waves and 0 < 4 * rest <= SM_COUNT and problem.k >= 2048 else 1)


def _rough_us(problem: GemmProblem, config: Config) -> float:
    """What ranks the configs of `TILE_US`, their parts of K and their pairs."""
    tiles = -(-problem.m // config.tile_m) * -(-problem.n // config.rows)
    waves = -(-tiles * config.split // (CLUSTERED_SMS[config.split] // config.split * config.split))
    sent = 1.4 + config.tile_m * config.tile_n / 1e4 if config.split > 1 else 0.0
    tile = TILE_US[replace(config, split=1, share=1, tail=1)] * problem.k / 1e3 / config.split
    start = 2.9 + 0.5 * (config.groups_k > 1) + 0.6 * (waves - 1)
    tiles_us = (waves - 0.5 * (config.tail > 1)) * (tile + sent)
    return max(start + tiles_us, 2 * problem.m * problem.k / READ_BYTES_PER_US)


PARTS = Config(groups_n=1, groups_k=2, split=4)
SLIM = Config(tile_m=16, groups_n=1, groups_k=4, warps=2, split=2)
# What won for weights of so few rows of tiles that four parts of K find room, by the tile that holds all tokens: up to
# so many rows, from such a k on. Of fewest rows tiles of fewer tokens won
FEW_ROWS: dict[int, list[tuple[int, int, Config]]] = {
    8: [
        (16, 7168, replace(PARTS, tile_m=8, tile_k=256, blocks=2)),
        (16, 0, replace(PARTS, tile_m=8, blocks=2)),
        (24, 7168, replace(SLIM, tile_m=8, warps=3, tile_k=256)),
        (SM_COUNT, 7168, replace(PARTS, tile_m=8, tile_k=256, blocks=2)),
        (SM_COUNT, 0, replace(PARTS, tile_m=8, blocks=2)),
    ],
    16: [
        (4, 0, replace(PARTS, tile_m=8, blocks=2)),
        (24, 7168, replace(SLIM, warps=3, tile_k=256)),
        (24, 1536, replace(PARTS, tile_m=16)),
        (SM_COUNT, 0, replace(PARTS, tile_m=16, blocks=2)),
    ],
    32: [
        (1, 0, replace(PARTS, tile_m=16, blocks=2)),
        (8, 7168, replace(SLIM, tile_k=256)),
        (8, 0, SLIM),
        (24, 7168, replace(PARTS, tile_m=32, tile_k=256)),
        (24, 0, replace(PARTS, tile_m=32)),
        (SM_COUNT, 0, replace(PARTS, tile_m=32, blocks=2)),
    ],
    64: [
        (1, 0, replace(PARTS, tile_m=32, blocks=2)),
        (4, 7168, replace(SLIM, tile_k=256)),
        (4, 0, SLIM),
        (8, 0, replace(PARTS, tile_m=32, blocks=2)),
        (24, 7168, replace(PARTS, tile_m=64)),
        (24, 0, replace(PARTS, tile_m=32, blocks=2)),
        (SM_COUNT, 1536, replace(PARTS, tile_m=64, groups_k=1, blocks=2)),
        (SM_COUNT, 0, replace(PARTS, tile_m=64, split=1)),
    ],
}


def _of_few_tokens(problem: GemmProblem) -> list[Config]:
    """What to take, the first that can be: after what won for 48 weights each at m of 4, 16, 32 and 64 on an H100."""
    rows, k = problem.n // TILE, problem.k
    tile_m = next(t for t in SPACE["tile_m"] if t >= problem.m)
    few, tile_k = Config(tile_m=tile_m, groups_n=1, groups_k=2), 256 if tile_m <= 16 else 128
    many = replace(few, groups_k=4 if tile_m <= 32 else 2)
    wanted = []
    if 4 * rows <= SM_COUNT:
        wanted += [next(c for most, least, c in FEW_ROWS[tile_m] if rows <= most and k >= least)]
        wanted += [replace(few, split=4, blocks=2)]
    narrow = tile_m <= 2 * WARP_TOKENS and 3 * rows > SM_COUNT and 4 * rows <= 3 * SM_COUNT
    if 2 * rows <= SM_COUNT and k >= (8192 if narrow else 4096):
        wanted += [replace(many, tile_k=tile_k if k < 8192 else 128, split=2)]
    if narrow and (2 * rows > SM_COUNT or k >= 4096):
        wanted += [replace(many, warps=3, tile_k=256)]
    if rows > 3 * SM_COUNT:
        wide = [replace(few, groups_n=2, groups_k=1, blocks=2), replace(few, groups_n=3, groups_k=1)]
        wanted += sorted(wide, key=lambda c: -_last_wave(rows, c)) if tile_m == 64 else []
        wanted += [replace(few, tile_k=tile_k, blocks=2)]
    return [*wanted, replace(many, tile_k=tile_k), many, few]


def _last_wave(rows: int, config: Config) -> float:
    """Share of all waves' slots that have a tile, of few tokens."""
    tiles, slots = -(-rows // config.groups_n), SM_COUNT * config.blocks
    return tiles / (-(-tiles // slots) * slots)


def default(problem: GemmProblem) -> Config:
    """A config for a problem that nobody has tuned, after what won for V4's shapes on an H100."""
    if problem.m <= STORE_ROWS:
        wanted = _of_few_tokens(problem)
    else:
        large = [c for c in TILE_US if problem.m >= 1024 and c.tile_m * c.rows == 256 * 128]
        whole = [_shared(problem, c) if c in large else c for c in TILE_US]
        most = {c: 3 if c.groups_n == 3 else 4 for c in TILE_US if not c.overlap}  # four of three groups would spill
        wanted = whole + [replace(c, split=parts) for c in most for parts in range(2, most[c] + 1)]
        wanted = sorted((c for c in wanted if supports(problem, c) is None), key=lambda c: _rough_us(problem, c))
    return next((c for c in wanted if supports(problem, c) is None), Config())


def alike(config: Config, m: int, other: int) -> bool:
    """Whether so many tokens are as many tiles as others are, and the last of several not much emptier."""
    tiles = -(-m // config.tile_m)
    return tiles == -(-other // config.tile_m) and (tiles == 1 or 5 * m >= 4 * other)


INVARIANT = "one sum in the order of k"


def arithmetic(problem: GemmProblem, config: Config) -> str:
    """In which order an element's products are summed. Stages, strips, share and the tile's size have no part in it."""
    if config.tail > 1:
        return f"as tiles of {config.tile_m} x {config.tile_n} fall into the last wave of m={problem.m}"
    if not config.reduces:
        return INVARIANT
    step = config.tile_k * config.paired
    parts = [f"{config.split} parts of {-(-problem.k // (step * config.split)) * step}"] if config.split > 1 else []
    turns = [f"steps of {step} to {config.groups_k} sums by turns"] if config.groups_k > 1 else []
    return ", ".join(parts + turns)


def in_arithmetic(problem: GemmProblem, wanted: str) -> Config | None:
    """The default among configs of this arithmetic."""
    rows = problem.n // TILE
    if problem.m <= STORE_ROWS:
        tile_m = next(t for t in SPACE["tile_m"] if t >= problem.m)
        alone = [Config(tile_m=tile_m, groups_n=1, tile_k=256, blocks=blocks) for blocks in (2, 1)]
        alone = alone if rows > SM_COUNT else alone[1:]
    else:
        tile_m = 128 if problem.m <= 128 or rows * -(-problem.m // 256) < SM_COUNT else 256
        tiles = rows * -(-problem.m // tile_m)
        alone = [Config(tile_m=tile_m, groups_n=1 if tiles <= 3 * SM_COUNT else 2, tile_k=128)]
    parts = itertools.product(
        alone,
        sorted(SPACE["tile_m"], key=lambda t: (t > tile_m, abs(t - tile_m))),
        (alone[0].tile_k, *SPACE["tile_k"]),
        SPACE["groups_k"],
        SPACE["split"],
    )
    configs = (replace(c, tile_m=t, tile_k=k, groups_k=groups, split=split) for c, t, k, groups, split in parts)
    return next((c for c in configs if arithmetic(problem, c) == wanted and supports(problem, c) is None), None)


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def load_peer4(address: Int32, rank: Int32, *, loc=None, ip=None):
    """Four numbers in the shared memory of a CTA of the cluster, at this CTA's address of them."""
    asm = "{ .reg .b32 r; mapa.shared::cluster.u32 r, $4, $5; ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [r]; }"
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, rank)]
    kind = llvm.StructType.get_literal([T.f32()] * 4)
    got = llvm.inline_asm(kind, args, asm, "=f,=f,=f,=f,r,r", has_side_effects=True, loc=loc, ip=ip)
    return [Float32(llvm.extractvalue(T.f32(), got, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def store4(address: Int32, numbers, *, loc=None, ip=None):
    """Four numbers to shared memory."""
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, *numbers)]
    asm = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"
    llvm.inline_asm(None, args, asm, "r,f,f,f,f", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def settle(words, never: Int32, address: Int32, *, loc=None, ip=None):
    """Have four words computed here: the compiler would put that after the next wait."""
    args = [x.ir_value(loc=loc, ip=ip) for x in (never, address, *words)]
    asm = "{ .reg .pred p; setp.ne.b32 p, $0, 0; @p st.shared.v4.b32 [$1], {$2, $3, $4, $5}; }"
    llvm.inline_asm(None, args, asm, "r,r,r,r,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def rotate_right(x: Uint32, by: int, *, loc=None, ip=None) -> Uint32:
    args = [x.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, f"shf.r.wrap.b32 $0, $1, $1, {by};", "=r,r", loc=loc, ip=ip))


MAGNITUDE = 0x81C081C0  # where a pair of codes lies in two BF16 numbers: value times 2 ** -126


def decode_word(word, scales, half):
    """Eight codes of a word of "fragments_sm90" -> four registers of operand A.

    scales: words that hold, in this half, the scale of row g, and of row g + 8.
    """
    mask = Uint32(MAGNITUDE)
    images = (
        word & mask,
        rotate_right(word, 3) & mask,
        rotate_right(word, 6) & mask,
        (word & Uint32(0x001B001B)) * Uint32((1 << 3) + (1 << 8) + (1 << 14)) & mask,
    )
    return [mul_by_half("bf16x2", image, scales[p % 2], half) for p, image in enumerate(images)]


def scale_pairs(word):
    """Four E4M3 scales -> words of two BF16 numbers, scales 0 and 2, and 1 and 3, each times 2 ** SCALE_BIAS, exactly.

    Four bits further left a scale's bits are those of the BF16 number times 2 ** -120, subnormal where it is.
    """
    up, rest = Uint32(0x7F007F00), Uint32(0x77007700)  # 2 ** 127 and 2 ** 111
    images = (word << Uint32(4)) & Uint32(0x07F007F0), (word >> Uint32(4)) & Uint32(0x07F007F0)
    return [mul_bf16x2(mul_bf16x2(x, up), rest) for x in images]


@dsl_user_op
def store_transposed(address: Int32, words, *, loc=None, ip=None):
    """Two or four 8 x 8 matrices of 16-bit numbers to shared memory, a lane's pair of a row as a pair of a column."""
    names = ", ".join(f"${i + 1}" for i in range(len(words)))
    asm = f"stmatrix.sync.aligned.m8n8.x{len(words)}.trans.shared.b16 [$0], {{{names}}};"
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, *words)]
    llvm.inline_asm(None, args, asm, "r" + ",r" * len(words), has_side_effects=True, loc=loc, ip=ip)


# --- the kernel -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """How clusters go over groups of tiles of d, tokens first, in bands. Made on the host: a device divides in some 35
    instructions, which would stand before its first load.
    """

    m_tiles: Int32
    full_bands: Int32
    rest: Int32  # groups in the tail
    first_of_tail: Int32
    passes: Int32  # over K, of a whole tile
    per_part: Int32  # of them, of a part of K
    row_tiles: Int32  # of 64 weight rows
    k_tiles: Int32
    by_clusters: cute.FastDivmodDivisorV2  # how many there are
    by_band: cute.FastDivmodDivisorV2  # groups of a full band
    by_width: cute.FastDivmodDivisorV2  # tiles of tokens of the last one, if that is not full


class GemmNvfp4Sm90Wgmma:
    """Clusters walk over tiles of d. a and b are the problem's: b, the weights, is the MMA's operand A."""

    def __init__(self, config: Config, variant: Variant):
        self.config, self.variant = config, variant
        self.out = CUTE_OUT[variant.out]
        self.stages = stages_of(config, variant.out)
        self.atoms = config.tile_k // TILE
        self.step_bytes = stage_bytes(config)
        self.warps = config.warps  # of a group
        self.blocks_n = config.groups_n * config.strips  # tiles of 64 weight rows
        self.chunk = store_rows(config)  # tokens of one store
        self.columns = 128 * 8 // self.out.width  # and weight rows
        self.halves = TILE // self.columns
        self.chunks = config.strips * config.tile_m // self.chunk  # of a group
        # a CTA's last tile through the stages, where they hold it and two buffers would not
        fits = 16 * config.tile_k * self.stages >= self.out.width * config.tile_n  # bits of a token
        self.leaves_at_once = not config.reduces and self.chunks > 2 and fits
        self.units = self.atoms * config.strips  # of a step: 64 rows x 64 of K of a warpgroup
        self.overlap, self.rows = config.overlap, config.rows

    @cute.jit
    def __call__(
        self,
        a: cute.Pointer,
        b: cute.Pointer,
        sfb: cute.Pointer,
        alpha_b: cute.Pointer,
        d: cute.Pointer,
        m: Int32,
        n: Int32,
        k: Int32,
        a_stride: Int64,
        d_stride: Int64,
        segment_ends: tuple[Int32, ...],
        max_clusters: Int32,
        stream: cuda.CUstream,
    ):
        """Strides count elements. segment_ends: the column after each segment. max_clusters: that run at a time."""
        c = self.config
        k = cute.assume(k, divby=TILE)
        mA = cute.make_tensor(a, cute.make_layout((m, k), stride=(cute.assume(a_stride, divby=8), 1)))
        mAlpha = cute.make_tensor(alpha_b, cute.make_layout(self.variant.segments))
        mD = cute.make_tensor(d, cute.make_layout((m, n), stride=(cute.assume(d_stride, divby=8), 1)))
        if cutlass.const_expr(c.share > 1):
            op = cpasync.CopyBulkTensorTileG2SMulticastOp()
        else:
            op = cpasync.CopyBulkTensorTileG2SOp()
        tma = cpasync.make_tiled_tma_atom(op, mA, self.tokens_layout(), (c.tile_m, c.tile_k), num_multicast=c.share)
        store = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), mD, self.store_layout(), (self.chunk, self.columns)
        )
        clusters, walk = self.walk(m, n, k, max_clusters)
        if cutlass.const_expr(c.warps < 4):
            b, sfb = (self.quarters(x, size, n, k) for x, size in ((b, CODE_BYTES), (sfb, SCALE_BYTES)))
        self.kernel(tma, store, b, sfb, mAlpha, mD, walk, segment_ends).launch(
            grid=(c.share, c.split, clusters),
            block=(c.threads, 1, 1),
            cluster=(c.share, c.split, 1),
            stream=stream,
            min_blocks_per_mp=c.blocks,
            preferred_smem_carveout=100,  # percent
            use_pdl=True,
        )

    def walk(self, m, n, k, max_clusters):
        """How many clusters there are, and how they go over d."""
        c = self.config
        m_tiles, n_groups = cute.ceil_div(m, c.tile_m), cute.ceil_div(n, self.rows * c.share)
        groups = clusters = m_tiles * n_groups  # of tiles side by side along n
        if c.split == 1:
            clusters = cutlass.min(groups * c.tail, max_clusters)
        rest = Int32(0)
        if c.tail > 1:
            rest = groups % clusters
            rest *= Int32(rest * c.tail <= clusters)
        passes = k // (c.tile_k * c.paired)
        return clusters, Walk(
            m_tiles=m_tiles,
            full_bands=m_tiles // BAND,
            rest=rest,
            first_of_tail=groups - rest,
            passes=passes,
            per_part=cute.ceil_div(passes, c.split * c.tail),
            row_tiles=n // TILE,
            k_tiles=k // TILE,
            by_clusters=cute.fast_divmod_create_divisor_v2(clusters),
            by_band=cute.fast_divmod_create_divisor_v2(n_groups * BAND),
            by_width=cute.fast_divmod_create_divisor_v2(cutlass.max(m_tiles % BAND, 1)),
        )

    def quarters(self, pointer, size: int, n, k):
        """TMA of what one warp has of tiles beside each other along K: [words, quarter, tile along K, tile of rows]."""
        words = size // 16
        tiles = n // TILE, k // TILE
        strides = (1, words, 4 * words, cute.assume(Int64(tiles[1]) * (4 * words), divby=4 * words))
        source = cute.make_tensor(pointer, cute.make_layout((words, 4, tiles[1], tiles[0]), stride=strides))
        box = (words, 1, self.atoms, 1)
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), source, cute.make_layout(box), box)

    def tokens_layout(self):
        """Shared [tile_m, tile_k, stages], rows of 128 bytes in the 128-byte swizzle."""
        c = self.config
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        return cute.tile_to_shape(atom, (c.tile_m, c.tile_k, self.stages), order=(0, 1, 2))

    def store_layout(self, chunks: int = 2):
        """Shared [tokens, weight rows, buffers] of d for so many chunks a group, rows as those of tokens."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, self.out)
        buffers = self.config.groups_n * chunks * self.halves
        return cute.tile_to_shape(atom, (self.chunk, self.columns, buffers), order=(0, 1, 2))

    @cute.kernel
    def kernel(
        self,
        tma: Any,
        store: Any,
        b: Any,
        sfb: Any,
        mAlpha: cute.Tensor,
        mD: cute.Tensor,
        walk: Walk,
        segment_ends: tuple[Int32, ...],
    ):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tidx // 32)
        work = self.work(walk)

        smem = SmemAllocator()
        full, empty, sAlpha = self.barriers(smem)
        layout = self.tokens_layout()
        sA = smem.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        staging = room = None
        if cutlass.const_expr(not c.reduces):
            layout = self.store_layout()
            staging = smem.allocate_tensor(self.out, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        if cutlass.const_expr(self.leaves_at_once):
            layout = self.store_layout(self.chunks)
            room = cute.make_tensor(cute.recast_ptr(sA.iterator, layout.inner, dtype=self.out), layout.outer)
        quarters = self.stages * c.tile_n // WARP_ROWS * self.atoms  # of tiles
        sCodes = smem.allocate_tensor(Uint32, cute.make_layout(quarters * CODE_BYTES // 16), byte_alignment=128)
        sScales = smem.allocate_tensor(Uint32, cute.make_layout(quarters * SCALE_BYTES // 16), byte_alignment=128)
        sums = self.sums(smem)
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, c.warps * c.groups_n * c.share)
                self.expect_parts(empty + self.stages)
        cute.arch.mbarrier_init_fence()
        self.meet(c.share > 1)  # nobody may signal a barrier that is not there yet
        if cutlass.const_expr(c.split > 1):
            cute.arch.cluster_arrive()
        cute.arch.griddepcontrol_launch_dependents()

        if warp >= c.warps * c.groups:
            if cutlass.const_expr(c.wide):
                cute.arch.setmaxregister_decrease(WIDE[0])
            if warp == c.warps * c.groups:
                self.load(tma, b, sfb, sA, sCodes, sScales, full, empty, work, True, c.loaders == 1)
            elif cutlass.const_expr(c.loaders == 2):
                self.load(tma, b, sfb, sA, sCodes, sScales, full, empty, work, False, True)
            if cutlass.const_expr(c.split > 1):
                cute.arch.cluster_wait()
            if work[1] > work[0]:
                self.meet(True)
        else:
            if cutlass.const_expr(c.wide and not c.by_halves):
                cute.arch.setmaxregister_increase(WIDE[c.groups])
            ring = (sA, sCodes, sScales, full, empty)
            slots = self.fetch_alphas(mAlpha, sAlpha, tidx)
            if cutlass.const_expr(not self.overlap):
                self.multiply(ring, store, staging, room, sums, slots, mD, segment_ends, work, tidx, False)
            elif warp < c.warps * (c.groups_n - 1):
                if cutlass.const_expr(c.by_halves):
                    cute.arch.setmaxregister_increase(FOUR[1])
                self.multiply(ring, store, staging, room, sums, slots, mD, segment_ends, work, tidx, False)
            else:
                self.multiply(ring, store, staging, room, sums, slots, mD, segment_ends, work, tidx, True)
        if cutlass.const_expr(c.share > 1):
            self.meet(True)  # a CTA stays until its peers have read its sums, and signalled its barriers

    def barriers(self, smem):
        """Those of stages that are full, and empty, with those that count parts of sums behind; slots for alphas."""
        count = (BARRIER_BYTES - ALPHA_BYTES) // 8
        full = smem.allocate_tensor(Int64, cute.make_layout(count), byte_alignment=1024).iterator
        slots = cute.make_layout((MAX_SEGMENTS, ALPHA_BYTES // (4 * MAX_SEGMENTS)))  # [segments, warps]
        return full, full + self.stages, smem.allocate_tensor(Float32, slots, byte_alignment=16)

    @cute.jit
    def fetch_alphas(self, mAlpha, sAlpha, tidx):
        """Send for alpha, which the epilogue finds in this warp's slots: loaded there it would cost a miss in L2.

        Not before the kernel before this one has ended, which may write it. The first tokens come no earlier.
        """
        slots, lane = sAlpha[None, tidx // 32], tidx % 32
        copy = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=32)
        cute.arch.griddepcontrol_wait()
        if lane < MAX_SEGMENTS:  # no slot stays empty: loads of several are made one, which may take in the next
            segment = cutlass.min(lane, self.variant.segments - 1)
            cute.copy(copy, cute.local_tile(mAlpha, (1,), (segment,)), cute.local_tile(slots, (1,), (lane,)))
        cute.arch.cp_async_commit_group()
        return slots

    def wait_for_alphas(self, slots):
        """alpha of each segment."""
        cute.arch.cp_async_wait_group(0)
        cute.arch.sync_warp()
        return [slots[i] for i in range(self.variant.segments)]

    def sums(self, smem):
        """Shared memory where parts of sums meet: those of a CTA's groups, or what other CTAs of the cluster send."""
        c = self.config
        if not c.reduces:
            return None
        numbers = store_bytes(c, self.variant.out) // 4
        return smem.allocate_tensor(Float32, cute.make_layout(numbers), byte_alignment=16)

    def expect_parts(self, landed):
        """Make the barriers, one a group, that count what others send it."""
        c = self.config
        if c.split > 1:
            sent = parts(c)
            for group_k in range(c.groups_k):
                for group_n in range(c.groups_n):
                    bar = landed + (group_k * c.groups_n + group_n)
                    cute.arch.mbarrier_init(bar, 1)
                    units = [sent.count(part * c.groups_k + group_k) for part in range(c.split)]
                    _, part, _ = cute.arch.block_idx()
                    count = Int32(units[0])
                    for i in range(1, c.split):
                        count += Int32(part == i) * (units[i] - units[0])
                    cute.arch.mbarrier_arrive_and_expect_tx(bar, count * ((sent.owners - 1) * sent.unit_bytes))

    def work(self, walk):
        """What this cluster does: how many groups of tiles of whole K, and how many items in all; and how."""
        _, _, cluster = cute.arch.block_idx()
        _, _, clusters = cute.arch.grid_dim()
        whole = items = (walk.first_of_tail - cluster + clusters - 1) // walk.by_clusters
        if self.config.tail > 1:
            items += Int32(cluster < walk.rest * self.config.tail)
        return whole, items, walk

    def item(self, i, work):
        """This CTA's item number i: which tokens, which weight rows, the first pass over K and how many.

        Tokens come first, in bands. In the tail a cluster has one tile, and each of its CTAs a part of K.
        """
        c, (whole, _, walk) = self.config, work
        x, part, cluster = cute.arch.block_idx()
        _, _, clusters = cute.arch.grid_dim()
        group, beside, first, count = cluster + i * clusters, x, Int32(0), walk.passes
        if c.split > 1:
            first = part * walk.per_part
            count = cutlass.min(walk.per_part, walk.passes - first)
        if c.tail > 1:
            shared = Int32(i >= whole)
            group += shared * (walk.first_of_tail + cluster // c.tail - group)
            beside += shared * (cluster % c.tail - x)
            first = shared * x * walk.per_part
            count -= shared * (walk.passes - cutlass.min(walk.per_part, walk.passes - first))
        band, within = divmod(group, walk.by_band)
        beyond, token_tile = divmod(within, walk.by_width)
        full = band < walk.full_bands
        beyond = cutlass.select_(full, within >> (BAND.bit_length() - 1), beyond)
        token_tile = cutlass.select_(full, within & (BAND - 1), token_tile)
        return band * BAND + token_tile, beyond * c.share + beside, first, count

    @cute.jit
    def meet(self, cluster: cutlass.Constexpr):
        if cutlass.const_expr(cluster):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    @cute.jit
    def load(
        self, tma, b, sfb, sA, sCodes, sScales, full, empty, work,
        with_weights: cutlass.Constexpr, with_tokens: cutlass.Constexpr,
    ):  # fmt: skip
        """Fill the stages: the tokens of this CTA (or its share of the cluster's), its codes and its scales."""
        c, walk = self.config, work[2]
        gA = cute.flat_divide(tma.tma_tensor, (c.tile_m, c.tile_k))
        tokens = (tma.atom, cute.group_modes(sA, 0, 2), cute.group_modes(gA, 0, 2))
        policy = create_policy(walk.m_tiles == 1)  # weights that nobody reads again
        if cutlass.const_expr(self.warps == 4):
            weights = (b.toint(), sfb.toint(), walk.row_tiles, walk.k_tiles, policy)
            into = (Int32(sCodes.iterator.toint()), Int32(sScales.iterator.toint()))
        else:
            weights, into = (b, sfb, walk.row_tiles, walk.k_tiles, policy), (sCodes, sScales)

        # Weights do not depend on the kernel before this one. Those of large tiles take so many copies that the first
        # tokens are better asked for before the second step's.
        m_tile, n_tile, first, count = self.item(Int32(0), work)
        first, count = first * c.paired, count * c.paired  # steps
        early = cutlass.min(count, c.paired if c.wide else self.stages) * Int32(work[1] > 0)
        if cutlass.const_expr(with_weights):
            for i in cutlass.range(early, unroll=1):
                self.load_weights(weights, into, n_tile, first + i, i, full + i)
        if cutlass.const_expr(with_tokens):
            cute.arch.griddepcontrol_wait()
            for i in cutlass.range(early, unroll=1):
                self.load_tokens(tokens, m_tile, first + i, i, full + i, work[0] == 0)
        index = early
        start = early
        for number in cutlass.range(work[1], unroll=1):
            m_tile, n_tile, first, count = self.item(number, work)
            first, count = first * c.paired, count * c.paired
            for i in cutlass.range(start, count, unroll=1):
                stage = index % self.stages
                if index >= self.stages:
                    cute.arch.mbarrier_wait(empty + stage, (index // self.stages - 1) % 2)
                if cutlass.const_expr(with_weights):
                    self.load_weights(weights, into, n_tile, first + i, stage, full + stage)
                if cutlass.const_expr(with_tokens):
                    self.load_tokens(tokens, m_tile, first + i, stage, full + stage, number >= work[0])
                index += 1
            start = Int32(0)

    @cute.jit
    def load_tokens(self, tokens, m_tile, step, stage, bar, shared):
        """Tokens of one step: this CTA's share of them to all CTAs that are side by side, or, of a tile in parts of K,
        all of them to this CTA."""
        c, (atom, sA, gA) = self.config, tokens
        x, part, _ = cute.arch.block_idx()
        layout = cute.make_layout(c.share)
        if cutlass.const_expr(c.share == 1):
            tAs, tAg = cpasync.tma_partition(atom, 0, layout, sA, gA)
            cute.copy(atom, tAg[None, m_tile, step], tAs[None, stage], tma_bar_ptr=bar)
        elif cutlass.const_expr(c.tail > 1):
            if shared:
                for share in cutlass.range_constexpr(c.share):
                    tAs, tAg = cpasync.tma_partition(atom, share, layout, sA, gA)
                    to = cutlass.Int16(1) << cutlass.Int16(x)
                    cute.copy(atom, tAg[None, m_tile, step], tAs[None, stage], tma_bar_ptr=bar, mcast_mask=to)
            else:
                tAs, tAg = cpasync.tma_partition(atom, x, layout, sA, gA)
                to = cutlass.Int16((1 << c.share) - 1)
                cute.copy(atom, tAg[None, m_tile, step], tAs[None, stage], tma_bar_ptr=bar, mcast_mask=to)
        else:
            tAs, tAg = cpasync.tma_partition(atom, x, layout, sA, gA)
            to = cutlass.Int16(((1 << c.share) - 1) << (part * c.share))
            cute.copy(atom, tAg[None, m_tile, step], tAs[None, stage], tma_bar_ptr=bar, mcast_mask=to)

    def block(self, n_tile, r, common: bool):
        """Which 64 weight rows number r of a tile's are, or those that it has in common with the tile beside it."""
        if not self.overlap:
            return n_tile * self.blocks_n + r
        first = (n_tile >> 1) * (2 * self.blocks_n - 1)
        return first + (self.blocks_n - 1 if common else (n_tile & 1) * self.blocks_n + r)

    @cute.jit
    def load_weights(self, weights, into, n_tile, step, stage, bar):
        """Codes and scales of one step; the barrier is told what the stage will hold."""
        c = self.config
        b, sfb, row_tiles, k_tiles, policy = weights
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, self.step_bytes)
            if cutlass.const_expr(self.warps == 4):
                for r in cutlass.range_constexpr(self.blocks_n):
                    row = cutlass.min(self.block(n_tile, r, self.overlap and r + 1 == c.groups_n), row_tiles - 1)
                    at = Int64(row) * Int64(k_tiles) + Int64(step * self.atoms)
                    to = (stage * self.blocks_n + r) * self.atoms
                    for start, target, size in ((b, into[0], CODE_BYTES), (sfb, into[1], SCALE_BYTES)):
                        bulk_load(
                            target + to * size, start + at * size, Int32(self.atoms * size), Int32(bar.toint()), policy
                        )
        if cutlass.const_expr(self.warps < 4):
            for w in cutlass.range_constexpr(self.warps):
                quarter = cutlass.min(n_tile * self.warps + w, 4 * row_tiles - 1)
                for tma, ring, tile_bytes in ((b, into[0], CODE_BYTES), (sfb, into[1], SCALE_BYTES)):
                    box = (tile_bytes // 16, 1, self.atoms, 1)
                    at = cute.assume((stage * self.warps + w) * (box[0] * self.atoms), divby=32)
                    target = cute.make_tensor(ring.iterator + at, cute.make_layout(box))
                    source = cute.local_tile(tma.tma_tensor, box, (0, quarter % 4, step, quarter // 4))
                    target, source = (cute.group_modes(x, 0, 4) for x in (target, source))
                    to, found = cpasync.tma_partition(tma.atom, 0, cute.make_layout(1), target, source)
                    cute.copy(tma.atom, found, to, tma_bar_ptr=bar, cache_policy=policy)

    @cute.jit
    def multiply(
        self, ring, store, staging, room, sums, slots, mD, segment_ends, work, tidx, common: cutlass.Constexpr
    ):
        """Sums of this CTA's tiles (or of its parts of K of them), and their way out.

        room: the stages of the tokens as buffers of all chunks, in which the last tile waits for none. common: this
        warpgroup's weight rows are the next tile's too, or the last one's, which takes the second half of the tokens.
        """
        c = self.config
        tokens = c.tile_m // 2 if common else c.tile_m
        tiled_mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (c.groups_n, 1, 1),
            (64, tokens),
            a_source=warpgroup.OperandSource.RMEM,
        )
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        group = cute.arch.make_warp_uniform(tidx // (32 * c.warps))
        group_n, group_k = group % c.groups_n, group // c.groups_n
        thread = tidx % (32 * c.warps)
        rows = TILE * c.groups_n
        acc = [cute.make_rmem_tensor(tiled_mma.partition_shape_C((rows, tokens)), Float32) for _ in range(c.strips)]

        base, unbias = Int32(0), (Float32(UNBIAS),) * 2
        for number in cutlass.range(work[1], unroll=1):
            m_tile, n_tile, _, count = self.item(number, work)
            half, mine = None, ring
            if cutlass.const_expr(common):
                half = n_tile & 1
                mine = (cute.local_tile(ring[0], (tokens, c.tile_k, self.stages), (half, 0, 0)), *ring[1:])
            for sum in acc:
                sum.fill(0.0)
            if cutlass.const_expr(c.by_warp):
                self.add_by_warp(acc, ring, base, count, group_n, group_k, thread)
            elif cutlass.const_expr(c.by_halves):
                self.add_by_halves(tiled_mma, acc[0], mine, base, count, group_n, thread)
            elif cutlass.const_expr(c.reads_ahead):
                shared = number >= work[0]
                self.add_reading_ahead(tiled_mma, acc, mine, base, count, group_n, group_k, thread, shared)
            else:
                shared = number >= work[0]
                self.add_by_warpgroup(tiled_mma, acc, mine, base, count, group_n, group_k, thread, shared)
            base += count * c.paired
            if cutlass.const_expr(c.split > 1):
                self.exchange(
                    acc, sums, ring[4] + self.stages, slots, mD, segment_ends, m_tile, n_tile, group_n, group_k, thread
                )
            elif cutlass.const_expr(c.reduces):
                self.put(acc, sums, group_n, group_k, thread)
                self.reduce(sums, slots, mD, segment_ends, m_tile * c.tile_m, n_tile * c.tile_n, tidx)
            elif number < work[0]:
                if cutlass.const_expr(self.leaves_at_once):
                    if number + 1 < work[1]:
                        self.store(
                            acc, store, staging, slots, segment_ends, m_tile, n_tile, group_n, thread, unbias, half
                        )
                    else:  # stages are free once all are done
                        cute.arch.barrier(barrier_id=ALL, number_of_threads=WARPGROUP * c.groups)
                        self.store(acc, store, room, slots, segment_ends, m_tile, n_tile, group_n, thread, unbias, half)
                else:
                    self.store(acc, store, staging, slots, segment_ends, m_tile, n_tile, group_n, thread, unbias, half)
            elif cutlass.const_expr(c.tail > 1):
                self.swap(acc[0], Int32(ring[0].iterator.toint()), group_n, thread)
                part, _, _ = cute.arch.block_idx()
                self.store(acc, store, staging, slots, segment_ends, m_tile, n_tile, group_n, thread, unbias, part)
        if cutlass.const_expr(not c.reduces):
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # a CTA stays until its stores have left

    @cute.jit
    def add_by_warpgroup(self, tiled_mma, acc, ring, base, count, group_n, group_k, thread, shared):
        """Add the products of this warpgroup's steps of a tile; one unit is decoded while another is multiplied.

        Where a step has several units, what can be done without the registers for the result is done before those are
        free. A step of one would have to wait for the next step's bytes before it hands back its own.
        """
        c, (sA, _, _, full, empty) = self.config, ring
        lane = thread % 32
        tokens = tiled_mma.make_fragment_B(tiled_mma.get_slice(group_n * WARPGROUP).partition_B(sA))
        shape = tiled_mma.partition_shape_A((TILE * c.groups_n, TILE))
        frag = [cute.make_rmem_tensor(shape, BFloat16) for _ in range(2)]
        index = base + group_k * c.paired
        slot, phase, before = index % self.stages, index // self.stages % 2, Int32(0)
        never = Int32(count < 0) if c.ahead else None
        cute.arch.mbarrier_wait(full + slot, phase)
        self.decode(self.fetch(ring, slot, group_n, 0, thread), frag[0])
        for i in cutlass.range(group_k, count, c.groups_k, unroll=1):
            for u in cutlass.range_constexpr(self.units * c.paired):
                kk, strip = u % self.units // c.strips, u % c.strips
                warpgroup.fence()
                for s in cutlass.range_constexpr(TILE // 16):
                    part = tokens[None, None, kk * (TILE // 16) + s, slot]
                    cute.gemm(tiled_mma, acc[strip], frag[u % 2][None, None, s], part, acc[strip])
                warpgroup.commit_group()
                if cutlass.const_expr(not c.ahead):
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(u % self.units == 0):  # noqa: SIM102  (one is decided when compiling)
                        if u > 0 or i > group_k:  # the step before this one is multiplied
                            self.release(empty + before, lane, shared)
                if cutlass.const_expr(u + 1 < self.units * c.paired):
                    if cutlass.const_expr((u + 1) % self.units == 0):
                        before = slot
                        slot, phase = self.advance(slot, phase, 1)
                        cute.arch.mbarrier_wait(full + slot, phase)
                    packed = self.fetch(ring, slot, group_n, (u + 1) % self.units, thread, never)
                    if cutlass.const_expr(c.ahead):
                        warpgroup.wait_group(1)
                        if cutlass.const_expr(u == 0):  # noqa: SIM102
                            if i > group_k:
                                self.release(empty + before, lane, shared)
                    self.decode(packed, frag[(u + 1) % 2])
                elif i + c.groups_k < count:
                    before = slot
                    slot, phase = self.advance(slot, phase, (c.groups_k - 1) * c.paired + 1)
                    cute.arch.mbarrier_wait(full + slot, phase)
                    packed = self.fetch(ring, slot, group_n, 0, thread, never)
                    if cutlass.const_expr(c.ahead):
                        warpgroup.wait_group(1)
                    self.decode(packed, frag[0])
        warpgroup.wait_group(0)
        self.release(empty + slot, lane, shared)

    @cute.jit
    def add_reading_ahead(self, tiled_mma, acc, ring, base, count, group_n, group_k, thread, shared):
        """The same, where a step has several units, and registers are left for the codes and scales of one more.

        They are read before the unit ahead of theirs is multiplied: decoding them need not wait for shared memory.
        """
        c, (sA, _, _, full, empty) = self.config, ring
        lane = thread % 32
        tokens = tiled_mma.make_fragment_B(tiled_mma.get_slice(group_n * WARPGROUP).partition_B(sA))
        shape = tiled_mma.partition_shape_A((TILE * c.groups_n, TILE))
        frag = [cute.make_rmem_tensor(shape, BFloat16) for _ in range(2)]
        words = cute.make_rmem_tensor(6, Uint32)  # codes, scales of a unit to come
        index = base + group_k
        slot, phase, before = index % self.stages, index // self.stages % 2, Int32(0)
        never = Int32(count < 0)
        cute.arch.mbarrier_wait(full + slot, phase)
        self.read(ring, slot, group_n, 0, thread, words)
        self.decode(self.settled(ring, words, never), frag[0])
        self.read(ring, slot, group_n, 1, thread, words)
        for i in cutlass.range(group_k, count, c.groups_k, unroll=1):
            coming = slot  # the step whose units are read
            for u in cutlass.range_constexpr(self.units):
                kk, strip = u // c.strips, u % c.strips
                warpgroup.fence()
                for s in cutlass.range_constexpr(TILE // 16):
                    part = tokens[None, None, kk * (TILE // 16) + s, slot]
                    cute.gemm(tiled_mma, acc[strip], frag[u % 2][None, None, s], part, acc[strip])
                warpgroup.commit_group()
                if cutlass.const_expr(u + 1 < self.units):
                    packed = self.settled(ring, words, never)
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(u == 0):  # noqa: SIM102
                        if i > group_k:
                            self.release(empty + before, lane, shared)
                    self.decode(packed, frag[(u + 1) % 2])
                    if cutlass.const_expr(u + 2 < self.units):
                        self.read(ring, slot, group_n, u + 2, thread, words)
                    elif i + c.groups_k < count:
                        coming, phase = self.advance(slot, phase, c.groups_k)
                        cute.arch.mbarrier_wait(full + coming, phase)
                        self.read(ring, coming, group_n, 0, thread, words)
                elif i + c.groups_k < count:
                    packed = self.settled(ring, words, never)
                    warpgroup.wait_group(1)
                    self.decode(packed, frag[0])
                    self.read(ring, coming, group_n, 1, thread, words)
            before = slot
            slot = coming
        warpgroup.wait_group(0)
        self.release(empty + before, lane, shared)

    @cute.jit
    def add_by_halves(self, tiled_mma, acc, ring, base, count, group_n, thread):
        """The same, where registers are left for half of a unit while the other half of it is multiplied."""
        c, (sA, _, _, full, empty) = self.config, ring
        lane = thread % 32
        tokens = tiled_mma.make_fragment_B(tiled_mma.get_slice(group_n * WARPGROUP).partition_B(sA))
        shape = tiled_mma.partition_shape_A((TILE * c.groups_n, TILE // 2))
        frag = [cute.make_rmem_tensor(shape, BFloat16) for _ in range(2)]
        packed = cute.make_rmem_tensor(8, Uint32)
        slot, phase, before = base % self.stages, base // self.stages % 2, Int32(0)
        cute.arch.mbarrier_wait(full + slot, phase)
        self.fetch_packed(ring, slot, group_n, 0, thread, packed)
        self.decode_packed(packed, 0, frag[0])
        for i in cutlass.range(count, unroll=1):
            for half in cutlass.range_constexpr(2 * self.units):
                warpgroup.fence()
                for s in cutlass.range_constexpr(TILE // 32):
                    part = tokens[None, None, half * (TILE // 32) + s, slot]
                    cute.gemm(tiled_mma, acc, frag[half % 2][None, None, s], part, acc)
                warpgroup.commit_group()
                if cutlass.const_expr(half % 2 == 0):
                    warpgroup.wait_group(1)
                    if cutlass.const_expr(half == 0):  # noqa: SIM102  (one is decided when compiling)
                        if i > 0:
                            self.release(empty + before, lane, False)
                    self.decode_packed(packed, 1, frag[1])
                elif cutlass.const_expr(half + 1 < 2 * self.units):
                    self.fetch_packed(ring, slot, group_n, (half + 1) // 2, thread, packed)
                    warpgroup.wait_group(1)
                    self.decode_packed(packed, 0, frag[0])
                elif i + 1 < count:
                    before = slot
                    slot, phase = self.advance(slot, phase, 1)
                    cute.arch.mbarrier_wait(full + slot, phase)
                    self.fetch_packed(ring, slot, group_n, 0, thread, packed)
                    warpgroup.wait_group(1)
                    self.decode_packed(packed, 0, frag[0])
        warpgroup.wait_group(0)
        self.release(empty + slot, lane, False)

    def fetch_packed(self, ring, stage, group_n, unit: int, thread, packed):
        """Four words of codes, and four of scales as `decode_word` takes them."""
        codes, pairs = self.fetch(ring, stage, group_n, unit, thread)
        for i, word in enumerate([*codes, *pairs[0], *pairs[1]]):
            packed[i] = word

    def decode_packed(self, packed, half: int, frag):
        """32 of K of `fetch_packed`, as WGMMA takes them."""
        words = cute.recast_tensor(frag, Uint32)
        for s in range(2):
            for i, word in enumerate(decode_word(packed[2 * half + s], (packed[4 + s], packed[6 + s]), half)):
                words[4 * s + i] = word

    @cute.jit
    def add_by_warp(self, acc, ring, base, count, group_n, group_k, thread):
        """Add the products of this warpgroup's steps of a tile, each warp those of its 16 rows of every 64."""
        c, (sA, _, _, full, empty) = self.config, ring
        lane = thread % 32
        row, piece = lane % 8, lane // 8  # of 16 bytes, in the 128-byte swizzle
        start = Int32(sA.iterator.toint()) + row * 128
        halves = [start + ((piece + 4 * h) ^ row) * 16 for h in range(2)]
        index = base + group_k
        slot, phase = index % self.stages, index // self.stages % 2
        for _ in cutlass.range(group_k, count, c.groups_k, unroll=1):
            cute.arch.mbarrier_wait(full + slot, phase)
            stage = slot * (c.tile_m * c.tile_k * 2)
            for kk in cutlass.range_constexpr(self.atoms):
                at = [half + (stage + kk * c.tile_m * 128) for half in halves]
                tokens = [[load_matrices(a + eight * 1024) for a in at] for eight in range(c.tile_m // 8)]
                for strip in cutlass.range_constexpr(c.strips):
                    words = self.decoded(self.fetch(ring, slot, group_n, kk * c.strips + strip, thread))
                    for s in cutlass.range_constexpr(TILE // 16):
                        for eight in cutlass.range_constexpr(c.tile_m // 8):
                            pair = tokens[eight][s // 2][s % 2 * 2 : s % 2 * 2 + 2]
                            old = [acc[strip][4 * eight + e] for e in range(4)]
                            new = mma_16816(words[4 * s : 4 * s + 4], pair, old)
                            for e in cutlass.range_constexpr(4):
                                acc[strip][4 * eight + e] = new[e]
            loads_have_come()
            cute.arch.sync_warp()
            self.release(empty + slot, lane, False)
            slot, phase = self.advance(slot, phase, c.groups_k)

    def advance(self, slot, phase, steps: int):
        """The slot so many steps on, fewer than there are stages, and its phase."""
        over = Int32(slot + steps >= self.stages)
        return slot + steps - self.stages * over, phase ^ over

    @cute.jit
    def release(self, barrier, lane, shared):
        """This warp is done with a stage: tell the CTAs that write to it, for a tile in parts of K this one alone."""
        if lane < self.config.share:
            if cutlass.const_expr(self.config.share > 1):
                x, part, _ = cute.arch.block_idx()
                to = lane
                if cutlass.const_expr(self.config.tail > 1):
                    to += Int32(shared) * (x - lane)
                cute.arch.mbarrier_arrive(barrier, to + part * self.config.share)
            else:
                cute.arch.mbarrier_arrive(barrier)

    def fetch(self, ring, stage, group_n, unit: int, thread, never=None):
        """This thread's part of 64 weight rows x 64 of K: four words of codes, and scales for rows g and g + 8.

        never: 0, which the compiler does not know.
        """
        words = cute.make_rmem_tensor(6, Uint32)
        self.read(ring, stage, group_n, unit, thread, words)
        return self.settled(ring, words, never)

    def read(self, ring, stage, group_n, unit: int, thread, words):
        """Four words of codes and two of scales, as they lie in shared memory."""
        c, (_, sCodes, sScales, _, _) = self.config, ring
        kk, strip = unit // c.strips, unit % c.strips
        parts, thread_of_part = 1, thread  # of a tile, one after the other along K: all of it, or a warp's quarter
        if c.warps < 4:
            parts, thread_of_part = 4, thread % 32
            tile = (stage * self.warps + thread // 32) * self.atoms + kk
        else:
            tile = stage * (self.blocks_n * self.atoms) + (strip * c.groups_n + group_n) * self.atoms + kk
        codes, scales = cute.make_rmem_tensor(4, Uint32), cute.make_rmem_tensor(2, Uint32)
        at = tile * (CODE_BYTES // 4 // parts) + thread_of_part * 4
        cute.autovec_copy(cute.make_tensor(sCodes.iterator + cute.assume(at, divby=4), cute.make_layout(4)), codes)
        at = tile * (SCALE_BYTES // 4 // parts) + thread_of_part // 4 * 2
        cute.autovec_copy(cute.make_tensor(sScales.iterator + cute.assume(at, divby=2), cute.make_layout(2)), scales)
        for i in range(6):
            words[i] = codes[i] if i < 4 else scales[i - 4]

    def settled(self, ring, words, never):
        """Codes, and scales as `decoded` takes them, computed here where `never` is given."""
        pairs = [scale_pairs(words[4 + h]) for h in range(2)]
        if self.config.ahead and never is not None:
            settle([*pairs[0], *pairs[1]], never, Int32(ring[1].iterator.toint()))
        return [words[s] for s in range(4)], pairs

    def decoded(self, packed):
        """What `fetch` found: four words of operand A for each 16 of K."""
        codes, pairs = packed
        return [w for s in range(4) for w in decode_word(codes[s], (pairs[0][s % 2], pairs[1][s % 2]), s // 2)]

    def decode(self, packed, frag):
        """The same as WGMMA takes it."""
        words = cute.recast_tensor(frag, Uint32)
        for i, word in enumerate(self.decoded(packed)):
            words[i] = word

    def scaled(self, acc, alphas, eights):
        """Of each of these groups of eight tokens, this thread's two of row g, then of row g + 8, times alpha."""
        return [[acc[4 * eight + 2 * r + i] * alphas[r] for i in range(2)] for eight in eights for r in range(2)]

    def factor(self, alphas, segment_ends, column):
        """alpha of a column of d."""
        alpha = alphas[0]
        for end, after in zip(segment_ends[:-1], alphas[1:], strict=True):
            alpha = cutlass.select_(column >= end, after, alpha)
        return alpha

    @cute.jit
    def swap(self, acc, start, group_n, thread):
        """Of a tile in two parts of K, the sums of half of its tokens: the first half for the first CTA."""
        c = self.config
        part, _, _ = cute.arch.block_idx()
        half = c.tile_m // 4  # numbers of half of the tokens in a thread
        stride = 16 * WARPGROUP
        start += group_n * half // 4 * stride + 16 * thread
        cute.arch.barrier(barrier_id=ALL, number_of_threads=WARPGROUP * c.groups)  # stages are free once all are done
        for j in cutlass.range_constexpr(half // 4):
            low, high = ([acc[4 * j + e + half * h] for e in range(4)] for h in range(2))
            store4(start + j * stride, [high[e] if part == 0 else low[e] for e in range(4)])
            for e in cutlass.range_constexpr(4):
                acc[4 * j + e] = low[e] if part == 0 else high[e]
        self.meet(True)
        for j in cutlass.range_constexpr(half // 4):
            got = load_peer4(start + j * stride, 1 - part)
            for e in cutlass.range_constexpr(4):
                acc[4 * j + e] += got[e]

    @cute.jit
    def store(
        self,
        acc,
        store,
        staging,
        slots,
        segment_ends,
        m_tile,
        n_tile,
        group_n,
        thread,
        powers,
        half=None,
    ):
        """d = sum * alpha, rounded once: 64 weight rows by 64 tokens of a warpgroup to shared memory, then by TMA.

        staging: two buffers a group, which chunks take in turn, or one for each. powers: of two, by which alpha is
        multiplied for rows g and g + 8. half: which half of the tokens these are the sums of, where they are not all.
        """
        c = self.config
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        g, q = lane // 4, lane % 4
        gD = cute.flat_divide(store.tma_tensor, (self.chunk, self.columns))
        tDs, tDg = cpasync.tma_partition(
            store.atom, 0, cute.make_layout(1), cute.group_modes(staging, 0, 2), cute.group_modes(gD, 0, 2)
        )
        buffer_bytes = self.chunk * 128
        start = Int32(staging.iterator.toint())
        chunks = c.tile_m // self.chunk
        buffers = cute.size(staging, mode=[2]) // (c.groups_n * self.halves)
        odd = c.strips * (chunks // 2 if self.overlap and half is not None else chunks) % 2
        first_chunk = m_tile * chunks
        if cutlass.const_expr(half is not None):
            chunks //= 2
            first_chunk += half * chunks
        of_segments = self.wait_for_alphas(slots)
        for strip in cutlass.range_constexpr(c.strips):
            block = self.block(n_tile, strip * c.groups_n + group_n, half is not None)
            row = cutlass.min(block * TILE, segment_ends[-1] - TILE) + 16 * warp + g
            alphas = [self.factor(of_segments, segment_ends, row + 8 * r) for r in range(2)]
            # exact while it is finite, so that alpha brings the only rounding before the output's
            alphas = [alpha * power for alpha, power in zip(alphas, powers, strict=True)]
            for chunk in cutlass.range_constexpr(chunks):
                turn = (strip * chunks + chunk) % buffers
                buffer = (group_n * buffers + turn) * self.halves
                if cutlass.const_expr(buffers == 2):
                    if warp == 0:  # the store before the last has left its buffer: of an odd number, the last one
                        cute.arch.cp_async_bulk_wait_group(1 - odd * int(strip + chunk == 0), read=True)
                    cute.arch.barrier(barrier_id=1 + group_n, number_of_threads=WARPGROUP)
                first = chunk * self.chunk // 8
                if cutlass.const_expr(self.variant.out == "bf16"):
                    wide = min(2, self.chunk // 8)  # groups of eight tokens in one instruction
                    row8, matrix = lane % 8, lane // 8 % (2 * wide)
                    at = start + buffer * buffer_bytes + (8 * (matrix // 2) + row8) * 128
                    at += ((2 * warp + matrix % 2) ^ row8) * 16
                    for j in cutlass.range_constexpr(0, self.chunk // 8, wide):
                        eights = range(first + j, first + min(j + wide, self.chunk // 8))
                        pairs = self.scaled(acc[strip], alphas, eights)
                        store_transposed(at + j * 1024, [pack_bf16(*pair) for pair in pairs])
                else:
                    half = buffer + warp // 2
                    for j in cutlass.range_constexpr(self.chunk // 8):
                        pairs = self.scaled(acc[strip], alphas, (first + j,))
                        for r in cutlass.range_constexpr(2):
                            for i in cutlass.range_constexpr(2):
                                staging[8 * j + 2 * q + i, 16 * (warp % 2) + 8 * r + g, half] = pairs[r][i]
                cute.arch.fence_proxy("async.shared", space="cta")
                cute.arch.barrier(barrier_id=1 + group_n, number_of_threads=WARPGROUP)
                if warp == 0:
                    for h in cutlass.range_constexpr(self.halves):
                        to = (first_chunk + chunk, block * self.halves + h)
                        cute.copy(store.atom, tDs[None, buffer + h], tDg[None, *to])
                    cute.arch.cp_async_bulk_commit_group()

    @cute.jit
    def exchange(self, acc, inbox, landed, slots, mD, segment_ends, m_tile, n_tile, group_n, group_k, thread):
        """Send each part of the sums to the group that owns it, add up what is this group's in the order of the parts;
        d = sum * alpha, rounded once."""
        c, sent = self.config, parts(self.config)
        m, n = mD.shape
        x, part, _ = cute.arch.block_idx()
        group, me = group_k * c.groups_n + group_n, part * c.groups_k + group_k
        start, bars = Int32(inbox.iterator.toint()), Int32(landed.toint())
        eights = c.tile_m // 8
        cute.arch.cluster_wait()  # the others' barriers are there
        for unit in cutlass.range_constexpr(sent.units):
            owner = sent.owner(unit)
            if me != owner:
                to, to_group = owner // c.groups_k, owner % c.groups_k * c.groups_n + group_n
                source = me - Int32(me > owner)
                at = start + to_group * sent.room
                at += (source * sent.most + (unit - sent.first(owner))) * sent.unit_bytes + thread * 16
                mine = acc[unit // eights]
                push(at, bars + 8 * to_group, Int32(to * c.share) + x, [mine[unit % eights * 4 + e] for e in range(4)])
        cute.arch.mbarrier_wait(landed + group, 0)
        start += group * sent.room
        for unit in cutlass.range_constexpr(sent.units):
            owner, mine = sent.owner(unit), acc[unit // eights]
            if me == owner:
                own = [mine[unit % eights * 4 + e] for e in range(4)]
                at = start + (unit - sent.first(owner)) * sent.unit_bytes + thread * 16
                step = sent.most * sent.unit_bytes
                quads = [load4(at + (p - int(p > owner)) * step) if p != owner else own for p in range(sent.owners)]
                for e in cutlass.range_constexpr(4):
                    total = quads[0][e]
                    for quad in quads[1:]:
                        total = total + quad[e]
                    mine[unit % eights * 4 + e] = total
        threads = sent.columns * 2
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=threads)  # what was sent has been read
        rows = cute.make_tensor(inbox.iterator + group * (sent.room // 4), cute.make_layout(sent.room // 4))
        lane, warp = thread % 32, thread // 32
        stride = pitch(sent.columns)
        at = lane % 4 * 2 * stride + WARP_ROWS * warp + lane // 4
        for unit in cutlass.range_constexpr(sent.units):
            owner, mine = sent.owner(unit), acc[unit // eights]
            if me == owner:
                for e in cutlass.range_constexpr(4):
                    row = 8 * (unit - sent.first(owner)) + e % 2
                    rows[at + row * stride + 8 * (e // 2)] = mine[unit % eights * 4 + e]
        cute.arch.barrier(barrier_id=1 + group, number_of_threads=threads)
        pieces = sent.columns // 4
        done = cute.make_rmem_tensor(4, self.out)
        of_segments = self.wait_for_alphas(slots)
        for strip in cutlass.range_constexpr(len(acc)):
            column = n_tile * c.tile_n + (strip * c.groups_n + group_n) * sent.columns + thread % pieces * 4
            alphas = [self.factor(of_segments, segment_ends, column + e) for e in range(4)]
            for eight in cutlass.range_constexpr(eights):
                unit = strip * eights + eight
                owner = sent.owner(unit)
                token = m_tile * c.tile_m + eight * 8 + thread // pieces
                if me == owner and token < m and column < n:
                    row = 8 * (unit - sent.first(owner)) + thread // pieces
                    quad = load4(start + 4 * (row * stride + thread % pieces * 4))
                    for e in cutlass.range_constexpr(4):
                        done[e] = self.out(quad[e] * Float32(UNBIAS) * alphas[e])
                    target = cute.local_tile(mD, (1, 4), (token, column // 4))
                    cute.autovec_copy(done, target[0, None])

    @cute.jit
    def put(self, acc, sums, group_n, group_k, thread):
        """A warpgroup's sums, to [groups_k][tile_m][tile_n]."""
        c = self.config
        lane, warp, stride = thread % 32, thread // 32, pitch(c.tile_n)
        # sums are free once all warps are done with those of the tile before
        cute.arch.barrier(barrier_id=1, number_of_threads=32 * self.warps * c.groups)
        for strip in cutlass.range_constexpr(c.strips):
            row = (strip * c.groups_n + group_n) * TILE + 16 * warp + lane // 4
            at = (group_k * c.tile_m + lane % 4 * 2) * stride + row
            for eight in cutlass.range_constexpr(c.tile_m // 8):
                for e in cutlass.range_constexpr(4):
                    sums[at + (8 * eight + e % 2) * stride + 8 * (e // 2)] = acc[strip][4 * eight + e]
        cute.arch.barrier(barrier_id=1, number_of_threads=32 * self.warps * c.groups)

    @cute.jit
    def reduce(self, sums, slots, mD, segment_ends, m0, n0, tidx):
        """Add the parts in their order; d = sum * alpha, rounded once."""
        c = self.config
        m, n = mD.shape
        pieces, stride = c.tile_n // 4, pitch(c.tile_n)
        valid = cutlass.min(m - m0, c.tile_m) * pieces
        threads = 32 * self.warps * c.groups
        batch = max(1, 8 // c.groups_k) if c.tile_m >= 64 else 1  # pieces whose loads are on their way
        start = Int32(sums.iterator.toint())
        done = cute.make_rmem_tensor(4, self.out)
        of_segments = self.wait_for_alphas(slots)
        for i in cutlass.range(0, valid, threads * batch, unroll=1):
            got = []
            for j in cutlass.range_constexpr(batch):
                index = cutlass.min(i + j * threads + tidx, valid - 1)
                at = start + 4 * (index // pieces * stride + index % pieces * 4)
                got.append([load4(at + 4 * g * c.tile_m * stride) for g in range(c.groups_k)])
            for j in cutlass.range_constexpr(batch):
                index = i + j * threads + tidx
                token, column = index // pieces, index % pieces * 4
                if index < valid and n0 + column < n:
                    for e in cutlass.range_constexpr(4):
                        total = got[j][0][e]
                        for quad in got[j][1:]:
                            total = total + quad[e]
                        alpha = self.factor(of_segments, segment_ends, n0 + column + e)
                        done[e] = self.out(total * Float32(UNBIAS) * alpha)
                    target = cute.local_tile(mD, (1, 4), (m0 + token, (n0 + column) // 4))
                    cute.autovec_copy(done, target[0, None])


# --- host -------------------------------------------------------------------------------------------------------------


def _variant(problem: GemmProblem, config: Config) -> Variant:
    return Variant(out=problem.out, segments=problem.segments)


def _kinds(variant: Variant) -> tuple[tuple[Any, int], ...]:
    """Types and alignments of pointers: a, b, sfb, alpha_b, d."""
    return (BFloat16, 16), (Uint32, 16), (Uint32, 16), (Float32, 4), (CUTE_OUT[variant.out], 16)


_HOST = Host(
    GemmNvfp4Sm90Wgmma, supports, _variant, _kinds, (1, TILE, TILE, TILE, TILE), more=1, arch=ARCH, module=__name__
)
compiled, precompile, build = _HOST.compiled, _HOST.precompile, _HOST.build


@functools.cache
def _max_clusters(device: int | None, config: Config) -> int:
    """Clusters that run at a time; device None: on an H100 that is not here."""
    size = config.share * config.split
    if device is None:
        return SM_COUNT * config.blocks // size
    return HardwareInfo(device).get_max_active_clusters(size) * config.blocks


def launch(
    a: Tensor | NVFP4Tensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor, config: Config
) -> None:
    """out[m, n] = a[m, k] @ b[n, k].T * alpha on the current stream.

    a: BF16 with rows 16 bytes aligned and adjacent elements; b: in the order "fragments_sm90", b.alpha one number, or
    one a segment of columns, below 2^120 in magnitude, as amax / 2688 of any tensor is (256 * alpha must be finite);
    out: BF16 or FP32 with rows 16 bytes aligned. Raises ValueError or TypeError.

    Codes and scales of b are read before earlier work on the stream has ended (programmatic dependent launch): what
    writes them must have ended before, as after `NVFP4Tensor.with_order`, which waits. a, alpha and out may be in use.
    """
    problem, ends = asked(a, b, segments, out)
    variant = _HOST.variant(problem, config)
    check_packed(b, "b", SF_LAYOUT, WEIGHT_ORDER)
    if b.sf.data_ptr() % 16:
        raise ValueError("b.sf must start at a multiple of 16 bytes")
    check_stored_rows(out)
    assert isinstance(a, Tensor)  # `supports` has refused another
    stride, m = row_stride(a), problem.m
    if m == 0:
        return
    pointers = (a.data_ptr(), b.data.data_ptr(), b.sf.data_ptr(), b.alpha.data_ptr(), out.data_ptr())
    clusters = _max_clusters(out.device.index if out.is_cuda else None, config)
    sizes = (m, problem.n, problem.k, stride, out.stride(0))
    _HOST.launch(config, variant, pointers, sizes, ends, out.device, clusters)


def warm(problem: GemmProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    _HOST.warm(launch, problem, config, n=least_rows(config), k=problem.k)


def least_rows(config: Config) -> int:
    """The fewest weight rows that a config takes."""
    return 2 * config.rows if config.overlap else TILE


def build_key(problem: GemmProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.out, problem.segments
