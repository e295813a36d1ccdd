"""NVFP4 GEMM for Hopper with few rows of a: d[m, n] = a[m, k] @ b[n, k].T, a in BF16 (W4A16), out in BF16 or FP32.

Bound: reading the packed weights once from memory. So weights go straight from global memory to registers, `depth`
steps of K ahead of their use, and no barrier stands in the main loop.

The product is computed as d.T = b @ a.T with m16n8k16 MMAs: 16 weight rows by 8 tokens. The order of k inside of an MMA
is free as long as both operands agree. Lane (g, q) of a warp takes the 32 neighbouring codes that its 16-byte load gave
it, of row g and of row g + 8; so a lane needs two block scales a row and step, its own ones, and b keeps its linear
order in memory.

    grid   a cluster for each tile_n weight rows; its `split` CTAs, and in them `warps_k` warps, each take a part of K
    a      brought to shared memory once, in the order in which lanes read it, while the first weights are on their way
    step   128 of K for 16 rows: two 16-byte loads of codes, two 2-byte loads of scales, eight MMAs for eight tokens
    sum    FP32 in registers, then over warps and over the CTAs of the cluster in shared memory, in a fixed order
"""

from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from torch import Tensor

from fp4suite.built import MAX_SHARED_BYTES
from fp4suite.formats import NVFP4Tensor, SfLayout
from fp4suite.problem import GemmProblem

from .instructions import mma_16816, prmt
from .nvfp4 import SCALE_BIAS, Host, asked, check_packed, decode_pairs, row_stride, scale_pairs

ARCH = "sm_90a"
SF_LAYOUT: SfLayout = "linear"  # the order of block scales that it reads
ATOM_K = 64  # k must be a multiple: pieces of 32 codes, and scales of two blocks, are fetched whole
STEP_K = 128  # elements of K that a warp fetches and multiplies at a time
ROWS = 16  # weight rows of an MMA, and of a warp
TOKENS = 8  # tokens of an MMA
MAX_M = 64  # beyond, weights would be read and decoded too often
UNBIAS = 2.0 ** (126 - SCALE_BIAS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """tile_m tokens; warps_n x warps_k warps a CTA, split CTAs a cluster along K; a warp walks over `loops` times 16
    rows; depth counts the steps of K on their way to registers.
    """

    tile_m: int = 16
    warps_n: int = 4
    warps_k: int = 2
    split: int = 2
    loops: int = 1
    depth: int = 4

    @property
    def tile_n(self) -> int:
        return ROWS * self.warps_n * self.loops

    @property
    def threads(self) -> int:
        return 32 * self.warps_n * self.warps_k

    @property
    def token_groups(self) -> int:
        return -(-self.tile_m // TOKENS)


SPACE = {
    "tile_m": (1, 2, 4, 8, 16, 32),
    "warps_n": (1, 2, 4, 8),
    "warps_k": (1, 2, 4, 8),
    "split": (1, 2, 3, 4, 6, 8),
    "loops": (1, 2, 4),
    "depth": (2, 3, 4, 6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What, beside the config, a compiled kernel is made for. steps: of K, for one warp; m and n stay open."""

    out: str
    segments: int
    steps: int


CUTE_OUT = {"bf16": BFloat16, "fp32": Float32}


def steps_of(k: int, config: Config) -> int:
    """Steps of K of one warp."""
    return -(-k // (STEP_K * config.warps_k * config.split))


def _row_bytes(config: Config, steps: int) -> int:
    """Of one token in shared memory: an odd multiple of 64, so that eight lanes of two tokens touch every bank once."""
    return steps * config.warps_k * STEP_K * 2 + 64


def _pitch(config: Config) -> int:
    """Numbers between two tokens' sums."""
    return config.tile_n + 4


def shared_bytes(config: Config, steps: int) -> int:
    """Shared memory of one CTA, as the kernel allocates it."""
    sums = config.warps_k * config.token_groups * TOKENS * _pitch(config) * 4
    return -(-config.tile_m * _row_bytes(config, steps) // 16) * 16 + sums


def supports(problem: GemmProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.order != "rows":
        return f"weights in the order {problem.order}: this kernel reads rows"
    if problem.act != "bf16":
        return f"activations in {problem.act}: this kernel takes bf16"
    if problem.out not in CUTE_OUT:
        return f"output in {problem.out}: this kernel writes bf16 or fp32"
    if problem.n % 8:
        return f"n={problem.n} is not a multiple of 8"
    if problem.k % ATOM_K:
        return f"k={problem.k} is not a multiple of {ATOM_K}: codes are fetched in pieces of 32, two at a time"
    if problem.m > MAX_M:
        return f"m={problem.m}: this kernel is for {MAX_M} rows at most"
    if config.tile_m not in SPACE["tile_m"]:
        return f"tile_m={config.tile_m} is not one of {SPACE['tile_m']}"
    if problem.m > config.tile_m and config.tile_m < 16:
        return f"m={problem.m} is more than tile_m={config.tile_m}: weights would be read again for each tile"
    if config.threads not in (128, 256):
        return f"{config.warps_n} x {config.warps_k} warps: a CTA has 4 or 8"
    if not 1 <= config.split <= 8:
        return f"split={config.split}: a cluster has 1 to 8 CTAs"
    if config.loops not in SPACE["loops"] or config.depth not in SPACE["depth"]:
        return f"loops={config.loops}, depth={config.depth}: not of {SPACE['loops']} and {SPACE['depth']}"
    if config.token_groups * config.depth > 12:
        return f"depth={config.depth} for {config.tile_m} tokens: sums and codes on their way do not fit the registers"
    steps = steps_of(problem.k, config)
    parts = config.split * config.warps_k
    if (parts - 1) * steps * STEP_K >= problem.k:
        return f"k={problem.k} leaves nothing for the last of {parts} parts"
    need = shared_bytes(config, steps)
    if need > MAX_SHARED_BYTES[ARCH]:
        return f"needs {need} bytes of shared memory, {ARCH} has {MAX_SHARED_BYTES[ARCH]}"
    return None


def arithmetic(problem: GemmProblem, config: Config) -> str:
    """In which order an element's products are summed. None of them is there for every m: this kernel ends at MAX_M."""
    parts = config.split * config.warps_k
    chains = 2 if config.token_groups == 1 else 1
    return f"{parts} parts of {steps_of(problem.k, config) * STEP_K}, {chains} sums by turns in each"


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def load_codes(address: Int64, *, loc=None, ip=None):
    """16 bytes that nobody reads again -> four words."""
    asm = "ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {$0, $1, $2, $3}, [$4];"
    kind = llvm.StructType.get_literal([T.i32()] * 4)
    got = llvm.inline_asm(kind, [address.ir_value(loc=loc, ip=ip)], asm, "=r,=r,=r,=r,l", loc=loc, ip=ip)
    return [Uint32(llvm.extractvalue(T.i32(), got, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def load_scales(address: Int64, *, loc=None, ip=None) -> Uint32:
    """Two bytes, in the low half of a word."""
    asm = "{ .reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.u32.u16 $0, h; }"
    return Uint32(llvm.inline_asm(T.i32(), [address.ir_value(loc=loc, ip=ip)], asm, "=r,l", loc=loc, ip=ip))


@dsl_user_op
def load_peer(address: Int32, rank: Int32, *, loc=None, ip=None) -> Float32:
    """A number in the shared memory of a CTA of the cluster, at this CTA's address of it."""
    asm = "{ .reg .b32 r; mapa.shared::cluster.u32 r, $1, $2; ld.shared::cluster.f32 $0, [r]; }"
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, rank)]
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,r,r", has_side_effects=True, loc=loc, ip=ip))


# --- the kernel -------------------------------------------------------------------------------------------------------


class GemmNvfp4Sm90Skinny:
    """A cluster a tile of d. a and b are the problem's: b, the weights, is the MMA's operand A."""

    def __init__(self, config: Config, variant: Variant):
        self.config, self.variant = config, variant
        self.out = CUTE_OUT[variant.out]
        self.row_words = _row_bytes(config, variant.steps) // 4
        # two sums that take turns: an MMA need not wait for the one before it
        self.chains = 2 if config.token_groups == 1 else 1
        self.sums = 4 * config.token_groups

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
        stream: cuda.CUstream,
    ):
        """Strides count elements. segment_ends: the column after each segment."""
        c = self.config
        mA = cute.make_tensor(a, cute.make_layout((m, k), stride=(cute.assume(a_stride, divby=8), 1)))
        mAlpha = cute.make_tensor(alpha_b, cute.make_layout(self.variant.segments))
        mD = cute.make_tensor(d, cute.make_layout((m, n), stride=(d_stride, 1)))
        self.kernel(mA, b, sfb, mAlpha, mD, k, segment_ends).launch(
            grid=(cute.ceil_div(n, c.tile_n), c.split, cute.ceil_div(m, c.tile_m)),
            block=(c.threads, 1, 1),
            cluster=(1, c.split, 1),
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        mA: cute.Tensor,
        b: cute.Pointer,
        sfb: cute.Pointer,
        mAlpha: cute.Tensor,
        mD: cute.Tensor,
        k: Int32,
        segment_ends: tuple[Int32, ...],
    ):
        c, steps = self.config, self.variant.steps
        tidx, _, _ = cute.arch.thread_idx()
        tile, part, group = cute.arch.block_idx()
        warp, lane = tidx // 32, tidx % 32
        warp_n, warp_k = warp % c.warps_n, warp // c.warps_n
        g, q = lane // 4, lane % 4
        m0, n0 = group * c.tile_m, tile * c.tile_n
        first = part * (steps * c.warps_k)  # step of this CTA
        mine = first + warp_k * steps  # and of this warp
        strip = warp_n * (c.loops * ROWS) + g  # row of this lane in the tile
        weights = (b.toint(), sfb.toint(), mD.shape[1], k)

        # a unit is a step of 16 rows; loads run `depth` units ahead of the products
        step, row = Int32(0), n0 + strip
        held = []
        for _ in cutlass.range_constexpr(c.depth):
            held.append(self.load(weights, row, mine + step, q))
            step, row = self.next(step, row)

        smem = SmemAllocator()
        sA = smem.allocate_tensor(Uint32, cute.make_layout(c.tile_m * self.row_words), byte_alignment=16)
        sums = smem.allocate_tensor(
            Float32, cute.make_layout(c.warps_k * c.token_groups * TOKENS * _pitch(c)), byte_alignment=16
        )
        self.bring(mA, sA, m0, first * STEP_K, tidx)
        cute.arch.sync_threads()

        acc = self.zeros()
        done = Int32(0)
        to = (warp_k * (c.token_groups * TOKENS) + 2 * q) * _pitch(c) + strip
        units = steps * c.loops
        for _ in cutlass.range(0, units // c.depth, unroll=1):
            for d in cutlass.range_constexpr(c.depth):
                acc = self.multiply(held[d], sA, warp_k * steps + done, g, q, acc)
                held[d] = self.load(weights, row, mine + step, q)
                step, row = self.next(step, row)
                done += 1
                if done == steps:
                    self.put(acc, sums, to)
                    acc = self.zeros()
                    done, to = Int32(0), to + ROWS
        for d in cutlass.range_constexpr(units % c.depth):
            acc = self.multiply(held[d], sA, warp_k * steps + done, g, q, acc)
            done += 1
            if done == steps:
                self.put(acc, sums, to)
                acc = self.zeros()
                done, to = Int32(0), to + ROWS
        self.store(sums, mAlpha, mD, segment_ends, m0, n0, part, tidx)

    def zeros(self):
        return [Float32(0.0)] * (self.sums * self.chains)

    def next(self, step, row):
        """The unit after this one."""
        over = Int32(step + 1 == self.variant.steps)
        return (step + 1) * (1 - over), row + over * ROWS

    def load(self, weights, row, step, q):
        """Four words of codes and one with two scales of row g, and of row g + 8."""
        codes, scales, n, k = weights
        # past the end of k, or of n, any will do: a is zero there, or nothing is stored
        piece = cutlass.min(step * (STEP_K // 32) + q, k // 32 - 1)
        got = []
        for i in range(2):
            at = Int64(cutlass.min(row + 8 * i, n - 1))
            got += load_codes(codes + at * Int64(k // 2) + Int64(piece * 16))
            got.append(load_scales(scales + at * Int64(k // 16) + Int64(piece * 2)))
        return got

    @cute.jit
    def bring(self, mA, sA, m0, k0, tidx):
        """a to shared memory, zero past m and k: pieces of eight numbers as the pairs (0, 4), (1, 5), (2, 6), (3, 7) of
        `decode_pairs`; of a step's 16 pieces the four that are lane q's lie four apart, so that lanes read neighbours.
        """
        c, pieces = self.config, self.variant.steps * self.config.warps_k * (STEP_K // 8)
        m, k = mA.shape
        words = cute.make_rmem_tensor(4, Uint32)
        for i in cutlass.range(0, c.tile_m * pieces, c.threads, unroll=4):
            index = i + tidx
            if index < c.tile_m * pieces:
                token, piece = index // pieces, index % pieces
                at = k0 + 8 * piece
                words.fill(0)
                if m0 + token < m and at < k:
                    source = cute.local_tile(mA, (1, 8), (m0 + token, at // 8))
                    cute.autovec_copy(source[0, None], cute.recast_tensor(words, BFloat16))
                w0, w1, w2, w3 = words[0], words[1], words[2], words[3]
                words[0], words[1] = prmt(w0, w2, 0x5410), prmt(w0, w2, 0x7632)
                words[2], words[3] = prmt(w1, w3, 0x5410), prmt(w1, w3, 0x7632)
                to = token * self.row_words + piece // 16 * 64 + piece % 4 * 16 + piece % 16 // 4 * 4
                cute.autovec_copy(words, cute.make_tensor(sA.iterator + cute.assume(to, divby=4), cute.make_layout(4)))

    def multiply(self, held, sA, step, g, q, acc):
        """acc plus the products of one unit."""
        c, acc = self.config, list(acc)
        tokens = [[self.piece(sA, t, step, j, g, q) for j in range(4)] for t in range(c.token_groups)]
        low, high = held[:5], held[5:]
        low_scales, high_scales = scale_pairs(low[4]), scale_pairs(high[4])
        for j in range(4):
            x, y = decode_pairs(low[j], low_scales[j // 2]), decode_pairs(high[j], high_scales[j // 2])
            for t in range(c.token_groups):
                for half in range(2):
                    at = 4 * t + self.sums * (half % self.chains)
                    left = (x[2 * half], y[2 * half], x[2 * half + 1], y[2 * half + 1])
                    right = tokens[t][j][2 * half : 2 * half + 2]
                    acc[at : at + 4] = mma_16816(left, right, acc[at : at + 4])
        return acc

    def piece(self, sA, t, step, j, g, q):
        """Lane q's piece j of the token in column g of group t; columns past tile_m repeat others, unstored."""
        token = (g % self.config.tile_m if self.config.tile_m < TOKENS else g) + TOKENS * t
        at = token * self.row_words + step * 64 + j * 16 + q * 4
        words = cute.make_rmem_tensor(4, Uint32)
        cute.autovec_copy(cute.make_tensor(sA.iterator + cute.assume(at, divby=4), cute.make_layout(4)), words)
        return [words[i] for i in range(4)]

    def put(self, acc, sums, to):
        """A warp's sums for its 16 rows, to [warps_k][tokens][tile_n]."""
        for i in range(self.sums):
            at = to + (TOKENS * (i // 4) + i % 2) * _pitch(self.config) + i // 2 % 2 * 8
            sums[at] = acc[i] if self.chains == 1 else acc[i] + acc[i + self.sums]

    @cute.jit
    def store(self, sums, mAlpha, mD, segment_ends, m0, n0, part, tidx):
        """Add the parts in their order, each CTA for its share of the tile; d = sum * alpha, rounded once."""
        c = self.config
        m, n = mD.shape
        self.meet()
        share = -(-c.tile_n * c.tile_m // c.split)
        for i in cutlass.range_constexpr(-(-share // c.threads)):
            index = part * share + i * c.threads + tidx
            token, row = index // c.tile_n, index % c.tile_n
            mine = i * c.threads + tidx < share and token < c.tile_m
            if mine and m0 + token < m and n0 + row < n:
                total = Float32(0.0)
                for rank in cutlass.range_constexpr(c.split):
                    for w in cutlass.range_constexpr(c.warps_k):
                        at = (w * c.token_groups * TOKENS + token) * _pitch(c) + row
                        if cutlass.const_expr(c.split > 1):
                            total += load_peer(Int32(sums.iterator.toint()) + 4 * at, Int32(rank))
                        else:
                            total += sums[at]
                segment = Int32(0)
                for end in segment_ends[:-1]:
                    segment += Int32(n0 + row >= end)
                # a power of two first: exact, and alpha brings the only rounding before the output's
                mD[m0 + token, n0 + row] = self.out(total * Float32(UNBIAS) * mAlpha[segment])
        if cutlass.const_expr(c.split > 1):
            self.meet()  # a CTA stays until its peers have read its sums

    @cute.jit
    def meet(self):
        if cutlass.const_expr(self.config.split > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()


# --- host -------------------------------------------------------------------------------------------------------------


def _variant(problem: GemmProblem, config: Config) -> Variant:
    return Variant(out=problem.out, segments=problem.segments, steps=steps_of(problem.k, config))


def _kinds(variant: Variant) -> tuple[tuple[Any, int], ...]:
    """Types and alignments of pointers: a, b, sfb, alpha_b, d."""
    out = CUTE_OUT[variant.out]
    return (BFloat16, 16), (Uint32, 16), (Uint32, 4), (Float32, 4), (out, out.width // 8)


_HOST = Host(GemmNvfp4Sm90Skinny, supports, _variant, _kinds, (1, 8, ATOM_K, ATOM_K, 8), arch=ARCH, module=__name__)
compiled, precompile, build = _HOST.compiled, _HOST.precompile, _HOST.build


def launch(
    a: Tensor | NVFP4Tensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor, config: Config
) -> None:
    """out[m, n] = a[m, k] @ b[n, k].T * alpha on the current stream.

    a: BF16 with rows 16 bytes aligned and adjacent elements; b.alpha: one number, or one a segment of columns; out:
    BF16 or FP32 with adjacent columns. Scales are linear. Raises ValueError or TypeError.
    """
    problem, ends = asked(a, b, segments, out)
    variant = _HOST.variant(problem, config)
    check_packed(b, "b", SF_LAYOUT)
    assert isinstance(a, Tensor)  # `supports` has refused another
    stride, m = row_stride(a), problem.m
    if m == 0:
        return
    pointers = (a.data_ptr(), b.data.data_ptr(), b.sf.data_ptr(), b.alpha.data_ptr(), out.data_ptr())
    sizes = (m, problem.n, problem.k, stride, out.stride(0))
    _HOST.launch(config, variant, pointers, sizes, ends, out.device)


def warm(problem: GemmProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    _HOST.warm(launch, problem, config, n=8, k=problem.k)


def build_key(problem: GemmProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and n are read at launch."""
    return problem.out, problem.segments, steps_of(problem.k, config)
