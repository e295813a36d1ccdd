"""NVFP4 GEMM for Hopper's FP8 tensor cores: d[m, n] = a[m, k] @ b[n, k].T, a in E4M3 with a scale a row (W4A8).

Opt-in (`act="fp8"`). Bound: the FP8 tensor cores, which are twice as fast as those for BF16, for some 256 rows of a and
more; below, reading the packed weights. b lies in the order "fragments_sm90_fp8" of `fp4suite.layouts`, in which a
thread has whole blocks of 16. The kernel is that of `gemm_nvfp4_sm90_wgmma` (its module says how data flow) but for the
operands and the sums:

    decode     of each block a table: its scale times the eight magnitudes in FP16, which is exact, then rounded once to
               E4M3. Codes are the selectors of byte permutations that look up four at a time.
               `NVFP4Tensor.prepare_fp8` says which power of two a row is scaled by, so that E4M3 holds its numbers
    sums       the FP8 MMA keeps some 14 bits of a sum. Each 128 of K, or `promote` times as many, are summed by
               themselves and then added to FP32 sums by ordinary additions, for `tile_m` tokens in up to two runs:
               while one is multiplied for one warpgroup, another adds up
    epilogue   FP32: sum times the token's scale times a power of two, times alpha, rounded once
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import cuda.bindings.driver as cuda
import cutlass
from cutlass import Boolean, Float8E4M3FN, Float32, Int8, Int32, Int64, Uint16, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from cutlass.utils import HardwareInfo, hopper_helpers
from torch import Tensor

from fp4suite.built import MAX_SHARED_BYTES
from fp4suite.formats import FP8RowTensor, NVFP4Tensor, SfLayout
from fp4suite.layouts import Order
from fp4suite.problem import GemmProblem

from .gemm_nvfp4_sm90_wgmma import (
    ARCH,
    BARRIER_BYTES,
    CODE_BYTES,
    CTA_BYTES,
    CUTE_OUT,
    MAX_SEGMENTS,
    MAX_STAGES,
    MOST_STAGES,
    REGISTERS,
    SCALE_BYTES,
    SM_COUNT,
    TILE,
    UNBIAS,
    WARPGROUP,
    WIDE,
    GemmNvfp4Sm90Wgmma,
    Variant,
    Walk,
    alike as alike,
    registers_at_launch,
    store_bytes,
    store_rows,
)
from .instructions import bits_float, e4m3x2_to_f16x2, mul_by_half
from .nvfp4 import Host, asked, check_packed, check_stored_rows

SF_LAYOUT: SfLayout = "linear"
WEIGHT_ORDER: Order = "fragments_sm90_fp8"
STEP = 128  # elements of K that are summed by the MMA alone
MMA_TOKENS = 192  # at most, of one MMA: its sums and those that they are added to take half the registers each


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """tile_m: tokens. groups_n: warpgroups side by side, each with 64 weight rows; groups_k: warpgroups that take steps
    of 128 of K in turn. stages: steps in flight (0: as many as fit). share, split: CTAs of a cluster side by side along
    n, and along K. tail: those side by side that take a tile of the last wave in parts of K. promote: steps that are
    summed by the MMA alone. blocks: CTAs that share an SM.
    """

    tile_m: int = 128
    groups_n: int = 2
    groups_k: int = 1
    stages: int = 0
    share: int = 1
    split: int = 1
    tail: int = 1
    promote: int = 1
    blocks: int = 1

    tile_k: ClassVar[int] = STEP
    strips: ClassVar[int] = 1
    paired: ClassVar[int] = 1

    @property
    def tile_n(self) -> int:
        return TILE * self.groups_n

    @property
    def groups(self) -> int:
        return self.groups_n * self.groups_k

    @property
    def runs(self) -> int:
        """Runs of tokens, multiplied one after the other by what was decoded once."""
        return 2 if self.tile_m > MMA_TOKENS else 1

    @property
    def registers(self) -> int:
        """Of a thread that multiplies: sums, those of an MMA, and what ptxas wants beside them to spill nothing."""
        sums = self.tile_m // 2 + self.tile_m // self.runs // 2
        if not self.reduces:
            return sums + 40
        if self.tile_m <= 16 or (self.promote > 1 and (self.groups_n > 1 or self.split > 1)):
            return sums + 48
        return sums + (40 if self.promote > 1 or self.blocks > 1 or self.split > 1 else 32)

    @property
    def wide(self) -> bool:
        """Whether the sums take so many registers that the loading warps give theirs away."""
        return self.tile_m > 128

    @property
    def threads(self) -> int:
        return WARPGROUP * self.groups + (WARPGROUP if self.wide else 32)

    @property
    def reduces(self) -> bool:
        """Whether the sums of a tile are spread."""
        return self.groups_k > 1 or self.split > 1


SPACE = {
    "tile_m": (8, 16, 32, 64, 128, 192, 256),
    "groups_n": (1, 2, 3, 4),
    "groups_k": (1, 2),
    "share": (1, 2),
    "split": (1, 2, 3, 4),
    "tail": (1, 2),
    "promote": (1, 2, 4),
    "blocks": (1, 2),
}


def stage_bytes(config: Config) -> int:
    """What one step of K takes of shared memory."""
    weights = config.groups_n * (STEP // TILE) * (CODE_BYTES + SCALE_BYTES)
    return weights + config.tile_m * STEP


def fixed_bytes(config: Config) -> int:
    """Of shared memory, for barriers, alphas and the tokens' scales, a copy for each warpgroup."""
    return BARRIER_BYTES + 4 * config.groups * config.tile_m


def stages_of(config: Config, out: str) -> int:
    """Steps in flight: as configured, or as many as fit, a multiple of groups_k: each is always the same one's."""
    if config.stages:
        return config.stages
    room = (MAX_SHARED_BYTES[ARCH] + CTA_BYTES) // config.blocks - CTA_BYTES - fixed_bytes(config)
    fit = max(0, room - store_bytes(config, out)) // stage_bytes(config)
    return min(fit, MAX_STAGES) // config.groups_k * config.groups_k


def shared_bytes(config: Config, out: str) -> int:
    """Shared memory of one CTA, as the kernel allocates it."""
    return fixed_bytes(config) + stages_of(config, out) * stage_bytes(config) + store_bytes(config, out)


def supports(problem: GemmProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.act != "fp8":
        return f'activations in {problem.act}: this kernel takes fp8 (act="fp8")'
    if problem.out not in CUTE_OUT:
        return f"output in {problem.out}: this kernel writes bf16 or fp32"
    if problem.order != WEIGHT_ORDER:
        return f"weights in the order {problem.order}: this kernel reads {WEIGHT_ORDER}"
    for knob, values in SPACE.items():
        if getattr(config, knob) not in values:
            return f"{knob}={getattr(config, knob)} is none of {', '.join(map(str, values))}"
    if problem.segments > MAX_SEGMENTS:
        return f"segments={problem.segments} is not in 1..{MAX_SEGMENTS}"
    if problem.n % TILE or problem.k % STEP:
        return f"n={problem.n}, k={problem.k}: n must be a multiple of {TILE}, k of {STEP}"
    stages = stages_of(config, problem.out)
    if stages <= config.groups_k:
        return f"{stages} stages: {config.groups_k} warpgroups hold 1 each while they wait for the next"
    if stages % config.groups_k:
        return f"stages={stages} is not a multiple of {config.groups_k}: each belongs to the same warpgroups always"
    if config.share > 1 and config.tile_m % (8 * config.share):
        return f"tile_m={config.tile_m} is not shared by {config.share} CTAs in parts of 8 tokens"
    steps = problem.k // STEP
    if steps - (config.split - 1) * -(-steps // config.split) < config.groups_k:
        return f"k={problem.k} leaves too little for the last of {config.split} parts of {config.groups_k} warpgroups"
    if config.promote > 1 and config.runs > 1:
        return f"promote={config.promote} is for tiles of at most {MMA_TOKENS} tokens"
    if config.tail > 1:
        if config.reduces or config.tile_m not in (128, 256) or config.share != config.tail:
            return f"tail={config.tail} is for 128 or 256 tokens, share={config.tail} and split=1"
        if steps < config.tail:
            return f"k={problem.k} is too little for {config.tail} CTAs"
        if config.wide and config.groups * config.blocks == 1:
            return f"tail={config.tail} of {config.tile_m} tokens is for two warpgroups an SM: one alone spills"
    at_launch = registers_at_launch(config.blocks * config.threads)
    if config.wide:
        fits = config.groups <= 2
        fits = fits and config.groups * WIDE[config.groups] + WIDE[0] <= REGISTERS // WARPGROUP // config.blocks
        fits = fits and at_launch >= config.tile_m // config.runs // 2 + 30
        fits = fits and (config.split == 1 or config.runs > 1 or config.promote == 1)
    else:
        fits = config.groups <= 4 and at_launch >= config.registers
    if not fits:
        return f"{config.blocks} x {config.groups} warpgroups: the registers do not hold sums of {config.tile_m} tokens"
    need = shared_bytes(config, problem.out)
    if stages > MOST_STAGES or config.blocks * (need + CTA_BYTES) > MAX_SHARED_BYTES[ARCH] + CTA_BYTES:
        return f"{config.blocks} CTAs need {need} bytes of shared memory each, {ARCH} has {MAX_SHARED_BYTES[ARCH]}"
    return None


def default(problem: GemmProblem) -> Config:
    """A config for a problem that nobody has tuned, after what was best for V4's shapes on an H100."""
    m, rows = problem.m, problem.n // TILE
    large = [c for c in (Config(tile_m=256), Config(tile_m=192)) if 3 * m > 2 * c.tile_m]
    waves = {c: -(-m // c.tile_m) * -(-rows // c.groups_n) / SM_COUNT for c in large}
    full = [c for c in large if waves[c] > 1 and supports(problem, c) is None]
    if full:
        return min(full, key=lambda c: math.ceil(waves[c]) * c.tile_m)
    small = next((t for t in SPACE["tile_m"] if t >= m), 128)
    tiles = ((256, 2, 1), (128, 1, 2), (64, 1, 2)) if m > 128 else ((small, 1, 2), (small, 1, 1))
    wanted = [
        Config(tile_m=tile_m, groups_n=groups_n, groups_k=groups_k, split=split)
        for split in SPACE["split"]
        for tile_m, groups_n, groups_k in tiles
    ]
    fitting = [c for c in wanted if supports(problem, c) is None]
    ctas = {c: -(-m // c.tile_m) * -(-rows // c.groups_n) * c.split for c in fitting}
    one_wave = [c for c in fitting if ctas[c] <= SM_COUNT - 12 * (c.split > 2)]  # larger clusters do not reach all SMs
    return max(one_wave, key=lambda c: ctas[c]) if one_wave else next(iter(fitting), Config())


INVARIANT = "one sum in the order of k, in runs of 128"


def arithmetic(problem: GemmProblem, config: Config) -> str:
    """In which order an element's products are summed. Stages, share and the tile's size have no part in it."""
    if config.tail > 1:
        return f"as tiles of {config.tile_m} x {config.tile_n} fall into the last wave of m={problem.m}"
    runs = f"in runs of {STEP * config.promote}"
    if not config.reduces:
        return f"one sum in the order of k, {runs}"
    parts = f"{config.split} parts of {-(-problem.k // (STEP * config.split)) * STEP}, {runs}"
    return parts if config.groups_k == 1 else f"{parts} to {config.groups_k} sums by turns"


def in_arithmetic(problem: GemmProblem, wanted: str) -> Config | None:
    """The default among configs of this arithmetic."""
    first = default(problem)
    tiles = (tile_m for tile_m in sorted(SPACE["tile_m"], reverse=True) if tile_m <= first.tile_m)
    parts = itertools.product(
        tiles, (first.groups_n, 1), SPACE["groups_k"], SPACE["split"], sorted(SPACE["promote"], reverse=True)
    )
    configs = (
        Config(tile_m=t, groups_n=n, groups_k=groups, split=split, promote=promote)
        for t, n, groups, split, promote in parts
    )
    return next((c for c in configs if arithmetic(problem, c) == wanted and supports(problem, c) is None), None)


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def f16x2_to_e4m3x4(x: Uint32, y: Uint32, *, loc=None, ip=None) -> Uint32:
    """Two words of two FP16 numbers -> the four rounded to E4M3, nearest even."""
    asm = (
        "{ .reg .b16 low, high; cvt.rn.satfinite.e4m3x2.f16x2 low, $1; cvt.rn.satfinite.e4m3x2.f16x2 high, $2; "
        "mov.b32 $0, {low, high}; }"
    )
    args = [x.ir_value(loc=loc, ip=ip), y.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, asm, "=r,r,r", loc=loc, ip=ip))


@dsl_user_op
def mul_f16x2(x: Uint32, y: Uint32, *, loc=None, ip=None) -> Uint32:
    """Two FP16 products; subnormal operands count in full (PTX ISA, mul.f16x2)."""
    args = [x.ir_value(loc=loc, ip=ip), y.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", loc=loc, ip=ip))


@dsl_user_op
def permute(x: Uint32, y: Uint32, selectors: Uint32, *, loc=None, ip=None) -> Uint32:
    """Four bytes of (x, y), picked by the four low digits of the selectors from 0 (lowest of x) to 7."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y, selectors)]
    return Uint32(llvm.inline_asm(T.i32(), args, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", loc=loc, ip=ip))


@dsl_user_op
def add_here(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """x + y, not later than the next MMA: the compiler would keep y until all sums are done, and spill."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y)]
    asm = "add.rn.f32 $0, $1, $2;"
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,f,f", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def here(x: Int32, *, loc=None, ip=None) -> Int32:
    """x, not earlier: the compiler would keep what follows from it in registers through the main loop."""
    args = [x.ir_value(loc=loc, ip=ip)]
    asm = "mov.b32 $0, $1;"
    return Int32(llvm.inline_asm(T.i32(), args, asm, "=r,r", has_side_effects=True, loc=loc, ip=ip))


MAGNITUDES = (0x38000000, 0x3E003C00, 0x42004000, 0x46004400)  # 0 and 0.5, 1 and 1.5, 2 and 3, 4 and 6 in FP16


def table(scales, row: int):
    """What the eight magnitudes give under one half of a word of two FP16 scales: E4M3, a byte each of two words."""
    products = [mul_by_half("f16x2", Uint32(pair), scales, row) for pair in MAGNITUDES]
    return f16x2_to_e4m3x4(*products[:2]), f16x2_to_e4m3x4(*products[2:])


def decode_word(word, low, high):
    """Eight codes of a word of "fragments_sm90_fp8" -> two words of four E4M3 numbers, looked up in a table."""
    signs, selectors = Uint32(0x80808080), word & Uint32(0x77777777)
    first = permute(low, high, selectors) | word & signs
    return first, permute(low, high, selectors >> Uint32(16)) | word << Uint32(4) & signs


# --- the kernel -------------------------------------------------------------------------------------------------------


class GemmNvfp4Sm90Fp8(GemmNvfp4Sm90Wgmma):
    """`GemmNvfp4Sm90Wgmma` with E4M3 operands: tokens and sums are its own, the rest is inherited."""

    config: Config  # type: ignore[assignment]

    def __init__(self, config: Config, variant: Variant):
        self.config, self.variant = config, variant
        self.out = CUTE_OUT[variant.out]
        self.stages = stages_of(config, variant.out)
        self.atoms = STEP // TILE
        self.step_bytes = stage_bytes(config)
        self.warps = WARPGROUP // 32  # of a group
        self.blocks_n = config.groups_n  # tiles of 64 weight rows
        self.chunk = store_rows(config)  # tokens of one store
        self.columns = 128 * 8 // self.out.width  # and weight rows
        self.halves = TILE // self.columns
        self.run = config.tile_m // config.runs  # tokens of an MMA
        self.overlap, self.rows = False, config.tile_n

    @cute.jit
    def __call__(
        self,
        a: cute.Pointer,
        a_scale: cute.Pointer,
        b: cute.Pointer,
        sfb: cute.Pointer,
        exponent_b: cute.Pointer,
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
        k = cute.assume(k, divby=STEP)
        mA = cute.make_tensor(a, cute.make_layout((m, k), stride=(cute.assume(a_stride, divby=16), 1)))
        mScale = cute.make_tensor(a_scale, cute.make_layout(m))
        mExponent = cute.make_tensor(exponent_b, cute.make_layout(n))
        mAlpha = cute.make_tensor(alpha_b, cute.make_layout(self.variant.segments))
        mD = cute.make_tensor(d, cute.make_layout((m, n), stride=(cute.assume(d_stride, divby=8), 1)))
        if cutlass.const_expr(c.share > 1):
            op = cpasync.CopyBulkTensorTileG2SMulticastOp()
        else:
            op = cpasync.CopyBulkTensorTileG2SOp()
        tma = cpasync.make_tiled_tma_atom(op, mA, self.tokens_layout(), (c.tile_m, STEP), num_multicast=c.share)
        store = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), mD, self.store_layout(), (self.chunk, self.columns)
        )
        clusters, walk = self.walk(m, n, k, max_clusters)
        self.kernel(tma, store, b, sfb, mExponent, mScale, mAlpha, mD, walk, segment_ends).launch(
            grid=(c.share, c.split, clusters),
            block=(c.threads, 1, 1),
            cluster=(c.share, c.split, 1),
            stream=stream,
            min_blocks_per_mp=c.blocks,
            preferred_smem_carveout=100,  # percent
            use_pdl=True,
        )

    def tokens_layout(self):
        """Shared [tile_m, 128, stages], rows of 128 bytes in the 128-byte swizzle."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, Float8E4M3FN)
        return cute.tile_to_shape(atom, (self.config.tile_m, STEP, self.stages), order=(0, 1, 2))

    @cute.kernel
    def kernel(
        self,
        tma: Any,
        store: Any,
        b: cute.Pointer,
        sfb: cute.Pointer,
        mExponent: cute.Tensor,
        mScale: cute.Tensor,
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
        sA = smem.allocate_tensor(Float8E4M3FN, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        staging = None
        if cutlass.const_expr(not c.reduces):
            layout = self.store_layout()
            staging = smem.allocate_tensor(self.out, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        weights = self.stages * self.blocks_n * self.atoms
        sCodes = smem.allocate_tensor(Uint32, cute.make_layout(weights * CODE_BYTES // 4), byte_alignment=128)
        sScales = smem.allocate_tensor(Uint16, cute.make_layout(weights * SCALE_BYTES // 2), byte_alignment=128)
        sScale = smem.allocate_tensor(Float32, cute.make_layout(c.groups * c.tile_m), byte_alignment=16)
        sums = self.sums(smem)

        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, 4 * c.groups_n * c.share)
                self.expect_parts(empty + self.stages)
        cute.arch.mbarrier_init_fence()
        self.meet(c.share > 1)  # nobody may signal a barrier that is not there yet
        if cutlass.const_expr(c.split > 1):
            cute.arch.cluster_arrive()
        cute.arch.griddepcontrol_launch_dependents()

        if warp >= 4 * c.groups:
            if cutlass.const_expr(c.wide):
                cute.arch.setmaxregister_decrease(WIDE[0])
            if warp == 4 * c.groups:
                self.load(tma, b, sfb, sA, sCodes, sScales, full, empty, work, True, True)
            if cutlass.const_expr(c.split > 1):
                cute.arch.cluster_wait()
            if work[1] > work[0]:
                self.meet(True)
        else:
            if cutlass.const_expr(c.wide):
                cute.arch.setmaxregister_increase(WIDE[c.groups])
            ring = (sA, sCodes, sScales, full, empty)
            factors = (mExponent, mScale, self.fetch_alphas(mAlpha, sAlpha, tidx), sScale)
            self.multiply(ring, store, staging, sums, factors, mD, segment_ends, work, tidx)
        if cutlass.const_expr(c.share > 1):
            self.meet(True)  # a CTA stays until its peers have read its sums, and signalled its barriers

    def mma(self, accumulate: bool):
        """64 weight rows of a warpgroup by the tokens of one MMA, added to what was there or not."""
        mma = hopper_helpers.make_trivial_tiled_mma(
            Float8E4M3FN,
            Float8E4M3FN,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (self.config.groups_n, 1, 1),
            (TILE, self.run),
            a_source=warpgroup.OperandSource.RMEM,
        )
        mma.set(warpgroup.Field.ACCUMULATE, accumulate)
        return mma

    @cute.jit
    def multiply(self, ring, store, staging, sums, factors, mD, segment_ends, work, tidx):
        """Sums of this CTA's tiles (or of its parts of K of them), and their way out."""
        c, (mExponent, mScale, slots, sScale) = self.config, factors
        group = cute.arch.make_warp_uniform(tidx // WARPGROUP)
        group_n, group_k = group % c.groups_n, group // c.groups_n
        thread = tidx % WARPGROUP
        acc = cute.make_rmem_tensor(c.tile_m // 2, Float32)
        scales = cute.make_rmem_tensor((c.tile_m + WARPGROUP - 1) // WARPGROUP, Float32)  # of tokens, a thread's own
        base = Int32(0)
        for number in cutlass.range(work[1], unroll=1):
            m_tile, n_tile, _, count = self.item(number, work)
            block = cutlass.min(n_tile * self.blocks_n + group_n, segment_ends[-1] // TILE - 1)
            row = block * TILE + thread // 32 * 16 + thread % 32 // 4
            exponents = [Int32(mExponent[row + 8 * r]) for r in range(2)]
            # 2 ** -exponent of both rows in FP16
            factor = Uint32((15 - exponents[1]) << 26 | (15 - exponents[0]) << 10)
            powers = [bits_float(Uint32(e + 127) << Uint32(23)) for e in exponents]
            tokens = (mScale, m_tile * c.tile_m, scales)
            acc.fill(0.0)
            self.add_steps(acc, ring, base, count, factor, tokens, group_n, group_k, thread, number >= work[0])
            base += count
            self.scale_tokens(acc, scales, sScale, powers, group, thread)
            if cutlass.const_expr(c.split > 1):
                self.exchange(
                    [acc],
                    sums,
                    ring[4] + self.stages,
                    slots,
                    mD,
                    segment_ends,
                    m_tile,
                    n_tile,
                    group_n,
                    group_k,
                    thread,
                )
            elif cutlass.const_expr(c.reduces):
                self.put([acc], sums, group_n, group_k, thread)
                self.reduce(sums, slots, mD, segment_ends, m_tile * c.tile_m, n_tile * c.tile_n, tidx)
            elif number < work[0]:
                self.store([acc], store, staging, slots, segment_ends, m_tile, n_tile, group_n, thread, powers)
            elif cutlass.const_expr(c.tail > 1):
                self.swap(acc, Int32(ring[0].iterator.toint()), group_n, thread)
                part, _, _ = cute.arch.block_idx()
                self.store([acc], store, staging, slots, segment_ends, m_tile, n_tile, group_n, thread, powers, part)
        if cutlass.const_expr(not c.reduces):
            cute.arch.cp_async_bulk_wait_group(0, read=True)  # a CTA stays until its stores have left

    @cute.jit
    def add_steps(self, acc, ring, base, count, factor, tokens, group_n, group_k, thread, shared):
        """Add the products of this warpgroup's steps of a tile to acc.

        Half of a step is decoded while the other is multiplied, in two parts: what needs no registers of an MMA that
        runs (`fetch_half`), and the rest once those are free. Sums of a run of tokens are added when it is done.
        """
        c, (sA, _, _, full, empty), (mScale, m0, scales) = self.config, ring, tokens
        lane = thread % 32
        new, more = self.mma(False), self.mma(True)
        split = cute.flat_divide(sA, (self.run, STEP))
        operand = more.make_fragment_B(more.get_slice(group_n * WARPGROUP).partition_B(split))
        rows = TILE * c.groups_n
        fresh = cute.make_rmem_tensor(more.partition_shape_C((rows, self.run)), Float32)
        frag = [cute.make_rmem_tensor(more.partition_shape_A((rows, TILE)), Float8E4M3FN) for _ in range(2)]
        packed = cute.make_rmem_tensor(8, Uint32)
        index = base + group_k
        slot, phase, before = index % self.stages, index // self.stages % 2, Int32(0)
        cute.arch.mbarrier_wait(full + slot, phase)
        for i in cutlass.range_constexpr(cute.size(scales)):  # only now what comes before this kernel has surely ended
            scales[i] = mScale[cutlass.min(m0 + i * WARPGROUP + thread, mScale.shape - 1)]
        self.fetch_half(ring, slot, group_n, 0, thread, factor, packed)
        self.decode_half(packed, frag[0])
        self.fetch_half(ring, slot, group_n, 1, thread, factor, packed)
        for i in cutlass.range(group_k, count, c.groups_k, unroll=1):
            now, first, last = slot, Boolean(True), Boolean(True)
            if cutlass.const_expr(c.promote > 1):
                first = i % (c.promote * c.groups_k) == group_k
                last = (i + c.groups_k) % (c.promote * c.groups_k) == group_k
                last = last or i + c.groups_k >= count
            for run in cutlass.range_constexpr(c.runs):
                for half in cutlass.range_constexpr(2):
                    warpgroup.fence()
                    for s in cutlass.range_constexpr(TILE // 32):
                        mma = more
                        if cutlass.const_expr(half + s == 0):
                            mma = new if c.promote == 1 else self.mma(not first)
                        part = operand[None, None, half * (TILE // 32) + s, run, 0, now]
                        cute.gemm(mma, fresh, frag[half][None, None, s], part, fresh)
                    warpgroup.commit_group()
                    if cutlass.const_expr(run + half == 0):
                        if cutlass.const_expr(c.promote > 1):
                            warpgroup.wait_group(1)
                            if not first:
                                self.release(empty + before, lane, shared)
                        self.decode_half(packed, frag[1])
                if cutlass.const_expr(run + 1 == c.runs):  # noqa: SIM102  (one is decided when compiling)
                    if i + c.groups_k < count:
                        slot, phase = self.advance(slot, phase, c.groups_k)
                        cute.arch.mbarrier_wait(full + slot, phase)
                        self.fetch_half(ring, slot, group_n, 0, thread, factor, packed)
                        warpgroup.wait_group(1)
                        self.decode_half(packed, frag[0])
                        self.fetch_half(ring, slot, group_n, 1, thread, factor, packed)
                if last:
                    warpgroup.wait_group(0)
                    if cutlass.const_expr(run + 1 == c.runs):
                        self.release(empty + now, lane, shared)
                    for e in cutlass.range_constexpr(self.run // 2):
                        at = run * (self.run // 2) + e
                        acc[at] = add_here(acc[at], fresh[e])
            before = now

    def fetch_half(self, ring, stage, group_n, half: int, thread, factor, packed):
        """This thread's part of 64 weight rows x 64 of K: the codes of a block of 16 of row g and of one of row g + 8,
        and both blocks' tables."""
        _, sCodes, sScales, _, _ = ring
        tile = (stage * self.blocks_n + group_n) * self.atoms + half
        codes = cute.make_rmem_tensor(4, Uint32)
        at = tile * (CODE_BYTES // 4) + thread * 4
        cute.autovec_copy(cute.make_tensor(sCodes.iterator + cute.assume(at, divby=4), cute.make_layout(4)), codes)
        pair = Uint32(sScales[tile * (SCALE_BYTES // 2) + thread])
        scales = mul_f16x2(e4m3x2_to_f16x2(pair), factor)  # times 2 ** -exponent, at most 60
        for i in range(4):
            packed[i] = codes[i]
        for row in range(2):
            packed[4 + 2 * row], packed[5 + 2 * row] = table(scales, row)

    def decode_half(self, packed, frag):
        """What `fetch_half` found in E4M3, as WGMMA takes it."""
        words = cute.recast_tensor(frag, Uint32)
        for row in range(2):
            for j in range(2):
                low, high = packed[4 + 2 * row], packed[5 + 2 * row]
                words[4 * j + row], words[4 * j + 2 + row] = decode_word(packed[2 * j + row], low, high)

    @cute.jit
    def scale_tokens(self, acc, scales, sScale, powers, group, thread):
        """Times each token's scale; where sums are spread, times the row's power of two over `reduce`'s factor."""
        c, thread = self.config, here(thread)
        for i in cutlass.range_constexpr(cute.size(scales)):
            token = i * WARPGROUP + thread
            if token < c.tile_m:
                sScale[group * c.tile_m + token] = scales[i]
        cute.arch.barrier(barrier_id=8 + group, number_of_threads=WARPGROUP)
        pair = cute.make_rmem_tensor(2, Float32)
        start = sScale.iterator + cute.assume(group * c.tile_m + thread % 4 * 2, divby=2)
        for eight in cutlass.range_constexpr(c.tile_m // 8):
            cute.autovec_copy(cute.make_tensor(start + 8 * eight, cute.make_layout(2)), pair)
            for i in cutlass.range_constexpr(2):
                for r in cutlass.range_constexpr(2):
                    by = pair[i] * (powers[r] * Float32(1 / UNBIAS)) if c.reduces else pair[i]
                    acc[4 * eight + 2 * r + i] *= by


# --- host -------------------------------------------------------------------------------------------------------------


def _variant(problem: GemmProblem, config: Config) -> Variant:
    return Variant(out=problem.out, segments=problem.segments)


def _kinds(variant: Variant) -> tuple[tuple[Any, int], ...]:
    """Types and alignments of pointers: a and its scale, b, sfb and row exponents, alpha_b, d."""
    b = ((Uint32, 16), (Uint32, 16), (Int8, 1))
    return (Float8E4M3FN, 16), (Float32, 4), *b, (Float32, 4), (CUTE_OUT[variant.out], 16)


_HOST = Host(
    GemmNvfp4Sm90Fp8, supports, _variant, _kinds, (1, TILE, STEP, STEP, TILE), more=1, arch=ARCH, module=__name__
)
compiled, precompile, build = _HOST.compiled, _HOST.precompile, _HOST.build


@functools.cache
def _max_clusters(device: int | None, config: Config) -> int:
    """Clusters that run at a time; device None: on an H100 that is not here."""
    size = config.share * config.split
    if device is None:
        return SM_COUNT * config.blocks // size
    return HardwareInfo(device).get_max_active_clusters(size) * config.blocks


def launch(a: FP8RowTensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor, config: Config) -> None:
    """out[m, n] = a[m, k] @ b[n, k].T * alpha on the current stream.

    a: rows 16 bytes aligned; b: in the order "fragments_sm90_fp8" with its row exponents (`NVFP4Tensor.prepare_fp8`),
    b.alpha one number, or one a segment of columns; out: BF16 or FP32 with rows 16 bytes aligned. Raises ValueError or
    TypeError.

    Codes, scales and exponents of b are read before earlier work on the stream has ended (programmatic dependent
    launch): what writes them must have ended before. a, alpha and out may be in use.
    """
    problem, ends = asked(a, b, segments, out)
    variant = _HOST.variant(problem, config)
    check_packed(b, "b", SF_LAYOUT, WEIGHT_ORDER)
    if b.row_exponent is None:
        raise ValueError("b has no row exponents: FP8 GEMMs read what NVFP4Tensor.prepare_fp8() gives")
    if not b.row_exponent.is_contiguous() or b.sf.data_ptr() % 16:
        raise ValueError("b.row_exponent must be contiguous and b.sf start at a multiple of 16 bytes")
    check_stored_rows(out)
    m = problem.m
    stride = a.data.stride(0) if m > 1 else problem.k  # that of a single row may be anything
    if a.data.stride(1) != 1 or stride % 16 or a.data.data_ptr() % 16 or not a.scale.is_contiguous():
        raise ValueError(
            "rows of a.data must be adjacent elements that start at multiples of 16 bytes and a.scale contiguous, "
            f"got strides {list(a.data.stride())} from {a.data.data_ptr() % 16} bytes past one on, and "
            f"{list(a.scale.stride())}"
        )
    if m == 0:
        return
    tensors = (a.data, a.scale, b.data, b.sf, b.row_exponent, b.alpha, out)
    clusters = _max_clusters(out.device.index if out.is_cuda else None, config)
    sizes = (m, problem.n, problem.k, stride, out.stride(0))
    pointers = tuple(t.data_ptr() for t in tensors)
    _HOST.launch(config, variant, pointers, sizes, ends, out.device, clusters)


def warm(problem: GemmProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    _HOST.warm(launch, problem, config, n=TILE, k=problem.k)


def build_key(problem: GemmProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.out, problem.segments
