"""NVFP4 GEMM for Hopper: d[m, n] = a[m, k] @ b[n, k].T, a in BF16 (W4A16) or NVFP4 (W4A4), out in BF16 or FP32.

Bound: memory (the packed weights) up to some 64 rows of a, the BF16 tensor cores above. sm_90 has no FP4 MMA, so NVFP4
is decoded to BF16 in registers, which is exact: E2M1 x E4M3 has at most six significant bits. alpha is applied in FP32
to the accumulators, one factor a column segment, and never folded into block scales.

The product is computed as d.T = b @ a.T ("swap AB"): WGMMA's M of 64 then falls on the weights and its N, any multiple
of 8, on the tokens. A CTA owns tile_n weight rows, one warpgroup for each 64 of them, and tile_m tokens. Per tile of K:

    fetch    cp.async keeps num_stages - 1 tiles of codes, scales and BF16 activations on their way to shared memory
    decode   every thread turns the codes that it fetched itself into BF16, in one of two swizzled buffers, while WGMMA
             still reads the other
    mma      WGMMA from shared memory; FP32 sums in the order of k, so repeated runs agree to the bit

Rows past m or n are fetched from the last valid row instead: they only reach outputs that are never stored.
"""

from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
from cutlass import BFloat16, Float32, Int32, Int64, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.utils import hopper_helpers
from torch import Tensor

from fp4suite.built import MAX_SHARED_BYTES
from fp4suite.formats import NVFP4Tensor, SfLayout
from fp4suite.problem import GemmProblem

from .instructions import prmt
from .nvfp4 import SCALE_BIAS, Host, asked, check_packed, decode_pairs, row_stride, scale_pairs

ARCH = "sm_90a"
SF_LAYOUT: SfLayout = "linear"  # the order of block scales that it reads
ATOM_K = 64  # elements of K in one 128-byte row of the swizzled BF16 buffers: four scale blocks, 32 bytes of codes
PIECE_K = 32  # elements of K that one thread fetches and decodes at a time: 16 bytes of codes, two scales
WARPGROUP = 128  # threads; WGMMA's M is 64
DECODED = 2  # buffers of decoded operands: one is written while the other is read


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """tile_m counts tokens, tile_n weight rows (columns of d), tile_k elements; num_stages are tiles of K in flight."""

    tile_m: int = 64
    tile_n: int = 128
    tile_k: int = 64
    num_stages: int = 4

    @property
    def threads(self) -> int:
        return self.tile_n // 64 * WARPGROUP


SPACE = {
    "tile_m": (8, 16, 32, 64, 128, 256),
    "tile_n": (64, 128, 256),
    "tile_k": (64, 128),
    "num_stages": (2, 3, 4, 6),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What, beside the config, a compiled kernel is made for, as in GemmProblem. m, n and k stay open."""

    act: str
    out: str
    segments: int


CUTE_ACT = {"bf16": BFloat16, "nvfp4": Uint32}  # what a's pointer points to: elements, or words of codes
CUTE_OUT = {"bf16": BFloat16, "fp32": Float32}


def shared_bytes(config: Config, act: str) -> int:
    """Shared memory of one CTA, as the kernel allocates it."""
    threads, atoms = config.threads, config.tile_k // ATOM_K
    raw_piece = 16 + 4  # codes, and the word that holds the scales of their atom
    b_raw = config.num_stages * threads * atoms * raw_piece
    b = DECODED * config.tile_n * config.tile_k * 2
    if act == "bf16":
        return b_raw + b + config.num_stages * config.tile_m * config.tile_k * 2
    a_raw = config.num_stages * _ceil_div(2 * config.tile_m, threads) * threads * atoms * raw_piece
    return b_raw + b + a_raw + DECODED * config.tile_m * config.tile_k * 2


def supports(problem: GemmProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.order != "rows":
        return f"weights in the order {problem.order}: this kernel reads rows"
    if problem.act not in ("bf16", "nvfp4"):
        return f"activations in {problem.act}: this kernel takes bf16 or nvfp4"
    if problem.out not in ("bf16", "fp32"):
        return f"output in {problem.out}: this kernel writes bf16 or fp32"
    if problem.n % 8:
        return f"n={problem.n} is not a multiple of 8"
    if problem.k % ATOM_K:
        return f"k={problem.k} is not a multiple of {ATOM_K}: rows of codes and scales are fetched in 16 and 4 bytes"
    if problem.k % config.tile_k:
        return f"k={problem.k} is not a multiple of tile_k={config.tile_k}"
    if config.tile_m % 8 or not 8 <= config.tile_m <= 256:
        return f"tile_m={config.tile_m} is no N of WGMMA: a multiple of 8 up to 256"
    if config.tile_n not in (64, 128, 256) or config.tile_k not in (64, 128):
        return f"tile_n={config.tile_n}, tile_k={config.tile_k}: tile_n is 64, 128 or 256, tile_k 64 or 128"
    if config.num_stages < 2:
        return f"num_stages={config.num_stages}: one tile must be on its way while another is read"
    if config.tile_m * config.tile_n > 256 * 128:
        return f"{config.tile_m} x {config.tile_n} accumulators do not fit the registers of {config.threads} threads"
    need = shared_bytes(config, problem.act)
    if need > MAX_SHARED_BYTES[ARCH]:
        return f"needs {need} bytes of shared memory, {ARCH} has {MAX_SHARED_BYTES[ARCH]}"
    return None


INVARIANT = "one sum in the order of k"


def arithmetic(problem: GemmProblem, config: Config) -> str:
    """In which order an element's products are summed: no config has another."""
    return INVARIANT


# --- NVFP4 -> BF16 in registers ---------------------------------------------------------------------------------------


def decode8(codes, scale):
    """Eight E2M1 codes (the first in the low nibble) times a scale pair -> four words of BF16, in order."""
    p0, p1, p2, p3 = decode_pairs(codes, scale)
    return prmt(p0, p1, 0x5410), prmt(p2, p3, 0x5410), prmt(p0, p1, 0x7632), prmt(p2, p3, 0x7632)


# --- the kernel -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packed:
    """An NVFP4 operand inside the kernel.

    mX, mSF: [rows, pieces, 4] and [rows, atoms, 1] words in global memory
    sX, sSF: [4, slots, stages] and [1, slots, stages] words, one slot a piece and thread
    sD:      [tile_rows, tile_k, DECODED] BF16
    row0:    first row of this CTA; tile_rows of them
    """

    mX: Any
    mSF: Any
    sX: Any
    sSF: Any
    sD: Any
    row0: Any
    tile_rows: int


class GemmNvfp4Sm90:
    """One CTA a tile of d. a and b are the problem's: b, the weights, is WGMMA's operand A."""

    def __init__(self, config: Config, variant: Variant):
        self.config, self.variant = config, variant
        self.threads = config.threads
        self.atoms = config.tile_k // ATOM_K
        self.packed_a = variant.act == "nvfp4"
        self.out = CUTE_OUT[variant.out]
        self.unbias = 2.0 ** ((126 - SCALE_BIAS) * (2 if self.packed_a else 1))

    @cute.jit
    def __call__(
        self,
        a: cute.Pointer,
        sfa: cute.Pointer,
        alpha_a: cute.Pointer,
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
        """a_stride (of a BF16 a) and d_stride count elements. segment_ends: the column after each segment."""
        if cutlass.const_expr(self.packed_a):
            mA, mSFA = self.words(a, sfa, m, k)
        else:
            row = cute.assume(a_stride, divby=8)
            mA, mSFA = cute.make_tensor(a, cute.make_layout((m, k), stride=(row, 1))), None
        mB, mSFB = self.words(b, sfb, n, k)
        mD = cute.make_tensor(d, cute.make_layout((m, n), stride=(d_stride, 1)))
        mAlphaA = cute.make_tensor(alpha_a, cute.make_layout(1))
        mAlphaB = cute.make_tensor(alpha_b, cute.make_layout(self.variant.segments))
        tiles = cute.ceil_div(m, self.config.tile_m) * cute.ceil_div(n, self.config.tile_n)
        self.kernel(mA, mSFA, mAlphaA, mB, mSFB, mAlphaB, mD, segment_ends).launch(
            grid=(tiles, 1, 1), block=(self.threads, 1, 1), stream=stream
        )

    def words(self, codes, scales, rows, k):
        """Codes [rows, k / 32, 4] and scales [rows, k / 64, 1] as words: the fetches' 16 and 4 bytes."""
        row = cute.assume(Int64(k // 8), divby=8)
        mX = cute.make_tensor(codes, cute.make_layout((rows, k // PIECE_K, 4), stride=(row, 4, 1)))
        mSF = cute.make_tensor(scales, cute.make_layout((rows, k // ATOM_K, 1), stride=(Int64(k // ATOM_K), 1, 1)))
        return mX, mSF

    @cute.kernel
    def kernel(
        self,
        mA: cute.Tensor,
        mSFA: cute.Tensor | None,
        mAlphaA: cute.Tensor,
        mB: cute.Tensor,
        mSFB: cute.Tensor,
        mAlphaB: cute.Tensor,
        mD: cute.Tensor,
        segment_ends: tuple[Int32, ...],
    ):
        tile_m, tile_n, stages = self.config.tile_m, self.config.tile_n, self.config.num_stages
        tidx, _, _ = cute.arch.thread_idx()
        tile, _, _ = cute.arch.block_idx()
        # tokens run fastest, so that CTAs at work together share weights in L2
        m_tiles = cute.ceil_div(mD.shape[0], tile_m)
        m0, n0 = tile % m_tiles * tile_m, tile // m_tiles * tile_n
        k_tiles = mB.shape[1] // (2 * self.atoms)

        smem = SmemAllocator()
        b = self.packed(smem, mB, mSFB, n0, tile_n)
        if cutlass.const_expr(self.packed_a):
            a = self.packed(smem, mA, mSFA, m0, tile_m)
            sA = a.sD
        else:
            a = None
            sA = self.swizzled(smem, tile_m, stages)

        tiled_mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (self.config.tile_n // 64, 1, 1),
            (64, tile_m),
        )
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        # descriptors are the same for all of a warpgroup, so its number must be uniform
        leader = cute.arch.make_warp_uniform(tidx // WARPGROUP) * WARPGROUP
        warpgroup_mma = tiled_mma.get_slice(leader)
        tCrB = tiled_mma.make_fragment_A(warpgroup_mma.partition_A(b.sD))
        tCrA = tiled_mma.make_fragment_B(warpgroup_mma.partition_B(sA))
        acc = cute.make_rmem_tensor(tiled_mma.partition_shape_C((tile_n, tile_m)), Float32)
        acc.fill(0.0)

        for i in cutlass.range_constexpr(stages - 1):
            if i < k_tiles:
                self.fetch(mA, sA, a, b, m0, Int32(i), Int32(i), tidx)
            cute.arch.cp_async_commit_group()

        for i in cutlass.range(k_tiles, unroll=1):
            stage, buffer = i % stages, i % DECODED
            cute.arch.cp_async_wait_group(stages - 2)  # this thread's part of tile i is here
            self.decode(b, stage, buffer, tidx)
            if cutlass.const_expr(self.packed_a):
                self.decode(a, stage, buffer, tidx)
            cute.arch.fence_view_async_shared()  # before the barrier: what was written is for WGMMA to read
            warpgroup.wait_group(0)  # tile i - 1 is multiplied: past the barrier its buffers are free
            cute.arch.sync_threads()
            self.mma(tiled_mma, acc, tCrB, tCrA, buffer, stage)
            ahead = i + stages - 1
            if ahead < k_tiles:
                self.fetch(mA, sA, a, b, m0, ahead, ahead % stages, tidx)
            cute.arch.cp_async_commit_group()
        warpgroup.wait_group(0)
        self.store(tiled_mma, acc, mD, mAlphaA, mAlphaB, segment_ends, m0, n0, tidx)

    def swizzled(self, smem, rows: int, buffers: int):
        """[rows, tile_k, buffers] BF16 in WGMMA's K-major layout with a 128-byte swizzle."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        layout = cute.tile_to_shape(atom, (rows, self.config.tile_k, buffers), order=(0, 1, 2))
        return smem.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)

    def packed(self, smem, mX, mSF, row0, tile_rows: int) -> Packed:
        """Shared memory for an NVFP4 operand."""
        slots, stages = self.passes(tile_rows) * self.atoms * self.threads, self.config.num_stages
        sD = self.swizzled(smem, tile_rows, DECODED)
        sX = smem.allocate_tensor(Uint32, cute.make_layout((4, slots, stages)), byte_alignment=16)
        sSF = smem.allocate_tensor(Uint32, cute.make_layout((1, slots, stages)), byte_alignment=16)
        return Packed(mX, mSF, sX, sSF, sD, row0, tile_rows)

    def passes(self, tile_rows: int) -> int:
        """How often the threads, two a row, go over an operand's rows."""
        return _ceil_div(2 * tile_rows, self.threads)

    @cute.jit
    def fetch(self, mA, sA, a, b, m0, k_tile, stage, tidx):
        """Start the copies of one tile of K: packed operands to slots, a BF16 a to where WGMMA reads it."""
        self.fetch_packed(b, k_tile, stage, tidx)
        if cutlass.const_expr(self.packed_a):
            self.fetch_packed(a, k_tile, stage, tidx)
        else:
            self.fetch_bf16(mA, sA, m0, k_tile, stage, tidx)

    @cute.jit
    def fetch_packed(self, x, k_tile, stage, tidx):
        copy16 = cute.make_copy_atom(cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL), Uint32, num_bits_per_copy=128)
        copy4 = cute.make_copy_atom(cpasync.CopyG2SOp(), Uint32, num_bits_per_copy=32)
        half, per_pass = tidx % 2, self.threads // 2
        for p in cutlass.range_constexpr(self.passes(x.tile_rows)):
            row = tidx // 2 + p * per_pass
            if row < x.tile_rows:
                source = cutlass.min(x.row0 + row, x.mX.shape[0] - 1)
                for atom in cutlass.range_constexpr(self.atoms):
                    slot = (p * self.atoms + atom) * self.threads + tidx
                    column = k_tile * self.atoms + atom
                    cute.copy(copy16, x.mX[source, 2 * column + half, None], x.sX[None, slot, stage])
                    cute.copy(copy4, x.mSF[source, column, None], x.sSF[None, slot, stage])

    @cute.jit
    def fetch_bf16(self, mA, sA, m0, k_tile, stage, tidx):
        copy16 = cute.make_copy_atom(cpasync.CopyG2SOp(cpasync.LoadCacheMode.GLOBAL), BFloat16, num_bits_per_copy=128)
        tile_m = self.config.tile_m
        for p in cutlass.range_constexpr(_ceil_div(tile_m * 8, self.threads)):
            row, column = tidx // 8 + p * (self.threads // 8), tidx % 8
            if row < tile_m:
                source = cutlass.min(m0 + row, mA.shape[0] - 1)
                for atom in cutlass.range_constexpr(self.atoms):
                    gA = cute.local_tile(mA, (1, 8), (source, (k_tile * self.atoms + atom) * 8 + column))
                    sA8 = cute.local_tile(sA[None, None, stage], (1, 8), (row, atom * 8 + column))
                    cute.copy(copy16, gA[0, None], sA8[0, None])

    @cute.jit
    def decode(self, x, stage, buffer, tidx):
        """Decode the pieces that this thread fetched: 32 elements, two blocks of 16, four 16-byte chunks of BF16."""
        half = tidx % 2
        codes = cute.make_rmem_tensor(4, Uint32)
        words = cute.make_rmem_tensor(4, Uint32)
        for p in cutlass.range_constexpr(self.passes(x.tile_rows)):
            row = tidx // 2 + p * (self.threads // 2)
            if row < x.tile_rows:
                for atom in cutlass.range_constexpr(self.atoms):
                    slot = (p * self.atoms + atom) * self.threads + tidx
                    cute.autovec_copy(x.sX[None, slot, stage], codes)
                    pairs = scale_pairs(x.sSF[0, slot, stage] >> Uint32(16 * half))
                    for i in cutlass.range_constexpr(4):
                        words[0], words[1], words[2], words[3] = decode8(codes[i], pairs[i // 2])
                        chunk = (row, atom * 8 + half * 4 + i)
                        sD8 = cute.local_tile(x.sD[None, None, buffer], (1, 8), chunk)
                        cute.autovec_copy(cute.recast_tensor(words, BFloat16), sD8[0, None])

    @cute.jit
    def mma(self, tiled_mma, acc, tCrB, tCrA, buffer, stage):
        """Start the products of one tile of K."""
        from_a = buffer if cutlass.const_expr(self.packed_a) else stage
        warpgroup.fence()
        for i in cutlass.range_constexpr(cute.size(tCrB, mode=[2])):
            cute.gemm(tiled_mma, acc, tCrB[None, None, i, buffer], tCrA[None, None, i, from_a], acc)
        warpgroup.commit_group()

    @cute.jit
    def store(self, tiled_mma, acc, mD, mAlphaA, mAlphaB, segment_ends, m0, n0, tidx):
        """d = acc * alpha, rounded once, straight from registers: eight lanes write neighbouring columns."""
        m, n = mD.shape
        coordinates = cute.make_identity_tensor((self.config.tile_n, self.config.tile_m))
        tCcD = tiled_mma.get_slice(tidx).partition_C(coordinates)  # ((2, 2, tile_m / 8), 1, 1) of (n, m), as acc
        for r in cutlass.range_constexpr(2):
            column = n0 + tCcD[2 * r][0]
            if column < n:
                segment = Int32(0)
                for end in segment_ends[:-1]:
                    segment += Int32(column >= end)
                alpha = mAlphaB[segment]
                if cutlass.const_expr(self.packed_a):
                    alpha = alpha * mAlphaA[0]
                for j in cutlass.range_constexpr(self.config.tile_m // 8):
                    for i in cutlass.range_constexpr(2):
                        row = m0 + tCcD[i + 4 * j][1]
                        if row < m:
                            # a power of two first: exact, and alpha brings the only rounding before the output's
                            value = acc[i + 2 * r + 4 * j] * Float32(self.unbias) * alpha
                            mD[row, column] = self.out(value)


# --- host -------------------------------------------------------------------------------------------------------------


def _variant(problem: GemmProblem, config: Config) -> Variant:
    return Variant(act=problem.act, out=problem.out, segments=problem.segments)


def _kinds(variant: Variant) -> tuple[tuple[Any, int], ...]:
    """Types and alignments of pointers: a, sfa, alpha_a, b, sfb, alpha_b, d."""
    out = CUTE_OUT[variant.out]
    a = ((CUTE_ACT[variant.act], 16), (Uint32, 4), (Float32, 4))
    return (*a, (Uint32, 16), (Uint32, 4), (Float32, 4), (out, out.width // 8))


_HOST = Host(GemmNvfp4Sm90, supports, _variant, _kinds, (1, 8, ATOM_K, ATOM_K, 8), arch=ARCH, module=__name__)
compiled, precompile, build = _HOST.compiled, _HOST.precompile, _HOST.build


def launch(
    a: Tensor | NVFP4Tensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor, config: Config
) -> None:
    """out[m, n] = a[m, k] @ b[n, k].T * alpha on the current stream.

    a: BF16 with rows 16 bytes aligned and adjacent elements, or NVFP4Tensor with one alpha; b.alpha: one number, or one
    a segment of columns; out: BF16 or FP32 with adjacent columns. Scales are linear. Raises ValueError or TypeError.
    """
    problem, ends = asked(a, b, segments, out)
    variant = _HOST.variant(problem, config)
    check_packed(b, "b", SF_LAYOUT)
    m, n, k = problem.m, problem.n, problem.k
    pointers_b = (b.data.data_ptr(), b.sf.data_ptr(), b.alpha.data_ptr())
    if isinstance(a, NVFP4Tensor):
        check_packed(a, "a", SF_LAYOUT)
        if a.alpha.numel() != 1:
            raise ValueError(f"a has one alpha, got {list(a.alpha.shape)}")
        pointers_a, a_stride = (a.data.data_ptr(), a.sf.data_ptr(), a.alpha.data_ptr()), k
    else:
        pointers_a, a_stride = (a.data_ptr(), *pointers_b[1:]), row_stride(a)  # of which the kernel reads the first
    if m == 0:
        return
    pointers, sizes = (*pointers_a, *pointers_b, out.data_ptr()), (m, n, k, a_stride, out.stride(0))
    _HOST.launch(config, variant, pointers, sizes, ends, out.device)


def warm(problem: GemmProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    _HOST.warm(launch, problem, config, n=8, k=config.tile_k)


def build_key(problem: GemmProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.act, problem.out, problem.segments


def _ceil_div(x: int, y: int) -> int:
    return -(-x // y)
