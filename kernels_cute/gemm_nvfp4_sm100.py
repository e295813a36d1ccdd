"""NVFP4 x NVFP4 GEMM on the block-scaled tensor cores of sm_100a.

    d[m, n] = alpha(n) * sum over blocks of 16 along k of  sfa[m, block] * sfb[n, block] * sum a[m, k] * b[n, k]

summed in FP32 by `tcgen05.mma.kind::mxf4nvf4.block_scale` (PTX ISA, "tcgen05.mma instructions") and rounded once on the
way out. alpha(n) = a.alpha * b.alpha[segment of n] is multiplied in FP32 in the epilogue, never folded into the block
scales, which have no bits to spare. Bound: memory (the packed b) up to some hundred rows of a, the tensor cores above.

A CTA owns tiles of 128 rows, a cluster walks over cluster tiles (persistent), and six warps share the work:

    load      1 warp    TMA fills a ring: codes in swizzled rows of 128 bytes, scales as whole atoms of 512 bytes
    mma       1 warp    scales from shared to tensor memory (`tcgen05.cp`), then four MMAs of k = 64 a stage
    epilogue  4 warps   tensor memory -> registers -> shared memory -> d, see `gemm_nvfp4_sm100_epilogue`

TMA fills what lies past m, n or k with zeros and stores nothing past m and n: no tile needs a mask. With `mma_ctas` = 2
a pair of CTAs computes 256 rows together: each holds its 128 rows of a and half of the tile's rows of b, and the even
one issues the MMAs of both.

Few rows of a: with `swap_ab` the rows of b, the weights, are the rows of the MMA and those of a its columns, of which
there may be eight; d comes out transposed and the epilogue turns it round. With `split_k` the CTAs of a cluster take a
part of K each and add their sums through each other's shared memory. In the device code a and b are the MMA's operands,
its rows and its columns: with `swap_ab` those are the problem's b and a.

Launches may overlap (programmatic dependent launch): no global memory is touched before the grid before is done.

Status: its compiled code runs in `ptx_emulator`, against the reference; not yet executed on a GPU.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Int64, cute, pipeline
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cute.runtime import make_ptr
from cutlass.memory import SmemAllocator, TmemAllocator
from cutlass.utils import blackwell_helpers, blockscaled_layout
from torch import Tensor

from fp4suite.arch import SM_COUNT
from fp4suite.built import MAX_SHARED_BYTES, TMEM_COLUMNS, Built
from fp4suite.formats import BLOCK, NVFP4Tensor, SfLayout
from fp4suite.problem import GemmProblem
from fp4suite.reference.gemm import check_segments

from . import build as cross
from .block_scaled import (
    MMA_K,
    MMAS,
    SF_ROWS,
    SF_WORDS,
    TILE_K,
    partition,
    scale_atoms,
    scale_words,
    send,
    swizzled_rows,
    tcgen05_fence,
)
from .gemm_nvfp4_sm100_epilogue import Direct, Summed, staging_bytes

ARCH = "sm_100a"
TILE_M = 128  # rows of a CTA: the lanes of tensor memory
SWIZZLE_ALIGN = 1024  # bytes: the swizzle pattern repeats every eight rows of 128 bytes
BARRIER_BYTES = SWIZZLE_ALIGN  # barriers and the tensor memory address, padded to what follows
MAX_SEGMENTS = 8
MAX_CLUSTER = 8  # CTAs: what every GPU takes (CUDA programming guide, thread block clusters)
MAX_SUMS = 128  # columns of a tile whose FP32 sums lie in shared memory as a whole

EPILOGUE_WARPS = (0, 1, 2, 3)
MMA_WARP, LOAD_WARP = 4, 5
THREADS = 32 * 6

E2M1, E4M3, F32 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float32
OUT = {"bf16": cutlass.BFloat16, "fp32": cutlass.Float32, "nvfp4": E2M1}
OUT_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SF_LAYOUT: SfLayout = "blocked_128x4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """tile_n: columns of an MMA. mma_ctas: CTAs that share one MMA. cluster_m/n: CTAs that share loads by multicast.

    swap_ab: rows of b are the MMA's rows. split_k: CTAs of a cluster that take a part of K each. band: cluster tiles of
    rows that the walk over tiles goes through before it comes to the next column; 0 for all rows.
    """

    tile_n: int = 128
    mma_ctas: int = 1
    cluster_m: int = 1
    cluster_n: int = 1
    swap_ab: bool = False
    split_k: int = 1
    band: int = 0


SPACE = {
    "tile_n": (8, 16, 32, 64, 128, 256),
    "mma_ctas": (1, 2),
    "cluster_m": (1, 2, 4),
    "cluster_n": (1, 2),
    "swap_ab": (False, True),
    "split_k": (1, 2, 4, 8),
    "band": (0, 1, 8),
}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a config takes of one SM.

    stage_bytes: codes and scales of TILE_K. num_stages: as many as fit. shared_bytes: the whole CTA.
    acc_stages: accumulators of tile_n columns, two where they fit, so that the epilogue overlaps the next tile; where
    not, one that is used in two places by turns, which share `overlap` columns. acc_stride: columns between two.
    sfa_columns, sfb_columns: scales of one stage. tmem_columns: as allocated, a power of two.
    """

    stage_bytes: int
    num_stages: int
    shared_bytes: int
    acc_stages: int
    acc_stride: int
    overlap: int
    sfa_columns: int
    sfb_columns: int
    tmem_columns: int


def budget(config: Config) -> Budget:
    """Shared and tensor memory of a config; every output takes the same."""
    sfb_rows = _round_up(config.tile_n, SF_ROWS)
    codes = (TILE_M + config.tile_n // config.mma_ctas) * TILE_K // 2  # a pair halves b
    scales = (TILE_M + sfb_rows) * TILE_K // BLOCK  # but each CTA of it needs all of sfb
    staging = staging_bytes(config.tile_n, config.swap_ab, config.split_k)
    fixed = BARRIER_BYTES + _round_up(staging, SWIZZLE_ALIGN)
    num_stages = (MAX_SHARED_BYTES[ARCH] - fixed) // (codes + scales)

    # a column of scales holds four scales of 32 rows, repeated for each of the four warps' lanes
    sfa_columns = TILE_M // 32 * (TILE_K // MMA_K)
    sfb_columns = sfb_rows // 32 * (TILE_K // MMA_K)
    room = TMEM_COLUMNS - sfa_columns - sfb_columns
    acc_stride = min(config.tile_n, room - config.tile_n)
    used = acc_stride + config.tile_n + sfa_columns + sfb_columns
    return Budget(
        stage_bytes=codes + scales,
        num_stages=num_stages,
        shared_bytes=fixed + num_stages * (codes + scales),
        acc_stages=2 if acc_stride == config.tile_n else 1,
        acc_stride=acc_stride,
        overlap=config.tile_n - acc_stride,
        sfa_columns=sfa_columns,
        sfb_columns=sfb_columns,
        tmem_columns=max(32, 1 << (used - 1).bit_length()),
    )


def supports(problem: GemmProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can.

    Scales are blocked_128x4. Their padding rows may hold anything (they reach only rows and columns that are cut off);
    there is no padding along k, as k is a multiple of 64.
    """
    if problem.order != "rows":
        return f"weights in the order {problem.order}: this kernel reads rows"
    if problem.act != "nvfp4":
        return f'act="{problem.act}": the block-scaled MMA takes NVFP4 on both sides, quantise the activations first'
    if problem.out not in OUT:
        return f'out="{problem.out}" is none of {", ".join(OUT)}'
    if problem.k % MMA_K:
        return f"k={problem.k} is not a multiple of {MMA_K}, the k of one MMA"
    if problem.n % 8:
        return f"n={problem.n} is not a multiple of 8: TMA stores rows of a multiple of 16 bytes"
    if problem.out == "nvfp4" and problem.n % MMA_K:
        return f"n={problem.n} is not a multiple of {MMA_K}, of which an NVFP4 output is the next k"
    if not 1 <= problem.segments <= MAX_SEGMENTS:
        return f"segments={problem.segments} is not in 1..{MAX_SEGMENTS}"
    for knob, values in SPACE.items():
        if getattr(config, knob) not in values:
            return f"{knob}={getattr(config, knob)} is none of {', '.join(map(str, values))}"
    return _clash(config) or _misfit(problem, config)


def _clash(config: Config) -> str | None:
    """Why the knobs do not go together."""
    c = config
    if c.cluster_m % c.mma_ctas:
        return f"cluster_m={c.cluster_m} is not a multiple of mma_ctas={c.mma_ctas}"
    if c.cluster_m * c.cluster_n * c.split_k > MAX_CLUSTER:
        return f"{c.cluster_m} x {c.cluster_n} x {c.split_k} CTAs: a cluster has {MAX_CLUSTER} at most"
    if not c.swap_ab and c.tile_n < 64:
        return f"tile_n={c.tile_n} without swap_ab: rows of a store have 64 columns"
    if c.tile_n < 8 * c.mma_ctas:
        return f"tile_n={c.tile_n} for a pair of CTAs, whose MMAs have 16 columns at least"
    if (c.swap_ab or c.split_k > 1) and c.tile_n > MAX_SUMS:
        return f"tile_n={c.tile_n} with swap_ab or split_k: shared memory holds the sums of {MAX_SUMS} columns"
    if (c.swap_ab or c.split_k > 1) and c.band:
        return f"band={c.band} with swap_ab or split_k, which are for few tiles"
    return None


def _misfit(problem: GemmProblem, config: Config) -> str | None:
    """Why the knobs do not go with the problem's sizes."""
    if config.swap_ab and config.tile_n < 32 and problem.m > config.tile_n:
        return f"m={problem.m} in tiles of {config.tile_n}: a tile's scales start at a multiple of 32 rows"
    if problem.k <= (config.split_k - 1) * TILE_K:
        return f"k={problem.k} leaves nothing for the last of {config.split_k} parts of {TILE_K}"
    return None


INVARIANT = "one sum in the order of k"


def arithmetic(problem: GemmProblem, config: Config) -> str:
    """In which order an element's products are summed, and which operand's rows are the MMA's.

    The latter counts although products commute, until a GPU has shown that both ways give the same bits.
    """
    order = INVARIANT
    if config.split_k > 1:
        order = f"{config.split_k} parts of {_round_up(problem.k, TILE_K) // TILE_K} tiles of k"
    return f"{order}, b first" if config.swap_ab else order


class GemmNvfp4Sm100:
    """One compiled kernel: config, output type and number of segments are fixed, every size is read at launch."""

    def __init__(self, config: Config, out: str, segments: int):
        self.tile_n = config.tile_n
        self.mma_ctas = config.mma_ctas
        self.cluster_m, self.cluster_n = config.cluster_m, config.cluster_n
        self.swap_ab, self.split_k, self.band = config.swap_ab, config.split_k, config.band
        self.segments = segments
        self.budget = budget(config)
        self.out = OUT[out]
        self.b_rows = config.tile_n // config.mma_ctas  # rows of b in this CTA's shared memory
        self.sfb_atoms = _round_up(config.tile_n, SF_ROWS) // SF_ROWS
        self.cta_group = tcgen05.CtaGroup.TWO if config.mma_ctas == 2 else tcgen05.CtaGroup.ONE
        self.mma_tile = (TILE_M * config.mma_ctas, config.tile_n, TILE_K)
        self.finish = Summed(self) if config.swap_ab or config.split_k > 1 else Direct(self)

    @cute.jit
    def __call__(self, a, sfa, b, sfb, d, sfd, alpha_a, alpha_b, alpha_d, starts, m, n, k, max_clusters, stream):
        """Layouts, TMA atoms and the grid; runs on the host.

        a, b: pointers to packed codes [rows, k] and [columns, k] of the MMA; sfa, sfb: to their blocked_128x4 scales;
        d: to [m, n]; sfd, alpha_d: to block scales and the global scale of an NVFP4 d; alpha_a: to one FP32;
        alpha_b: to one per segment; starts: first column of each segment. m, n, k are the problem's.
        """
        n, k = cute.assume(n, 8), cute.assume(k, MMA_K)
        rows, columns = (n, m) if self.swap_ab else (m, n)
        mA = cute.make_tensor(a, cute.make_layout((rows, k), stride=(k, 1)))
        mB = cute.make_tensor(b, cute.make_layout((columns, k), stride=(k, 1)))
        mSFA = cute.make_tensor(cute.recast_ptr(sfa, dtype=cutlass.Int32), scale_words(rows, k))
        mSFB = cute.make_tensor(cute.recast_ptr(sfb, dtype=cutlass.Int32), scale_words(columns, k))
        mAlphaA = cute.make_tensor(alpha_a, cute.make_layout(1))
        mAlphaB = cute.make_tensor(alpha_b, cute.make_layout(self.segments))
        mAlphaD = cute.make_tensor(alpha_d, cute.make_layout(1))
        if cutlass.const_expr(self.out is E2M1):
            d, width = cute.recast_ptr(d, dtype=cutlass.Uint8), cute.assume(n // 2, 32)
        else:
            width = n
        mD = cute.make_tensor(d, cute.make_layout((m, width), stride=(cute.assume(Int64(width), 8), 1)))

        # a row of the cluster reads the same a, a column the same b, of which the CTAs of a pair take a half each;
        # both halves of a pair need the scales of all of b
        stages = self.budget.num_stages
        sA, sB = swizzled_rows(E2M1, TILE_M, stages), swizzled_rows(E2M1, self.b_rows, stages)
        sSFA, sSFB = scale_atoms(1, stages), scale_atoms(self.sfb_atoms, stages)
        a_tma = self.load_atom(mA, sA, (TILE_M, TILE_K), self.cluster_n)
        b_tma = self.load_atom(mB, sB, (self.b_rows, TILE_K), self.cluster_m // self.mma_ctas)
        sfa_tma = self.load_atom(mSFA, sSFA, (SF_WORDS, MMAS, 1), self.cluster_n)
        sfb_tma = self.load_atom(mSFB, sSFB, (SF_WORDS, MMAS, self.sfb_atoms), self.cluster_m)
        d_tma = self.finish.store_atom(mD)

        tiles = (cute.ceil_div(rows, TILE_M * self.cluster_m), cute.ceil_div(columns, self.tile_n * self.cluster_n))
        num_clusters = cutlass.min(tiles[0] * tiles[1], max_clusters)
        alphas = (mAlphaA, mAlphaB, mAlphaD)
        self.kernel(
            a_tma, sfa_tma, b_tma, sfb_tma, d_tma, mD, sfd, alphas, starts, tiles, cute.ceil_div(k, TILE_K)
        ).launch(
            grid=(self.cluster_m, self.cluster_n, num_clusters * self.split_k),
            block=(THREADS, 1, 1),
            cluster=(self.cluster_m, self.cluster_n, self.split_k),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=True,
        )

    def load_atom(self, gmem, smem, box, sharers):
        """TMA load of `box`, sent to `sharers` CTAs of the cluster, each of which asks for one part."""
        if sharers == 1:
            return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(self.cta_group), gmem, smem, box)
        op = cpasync.CopyBulkTensorTileG2SMulticastOp(self.cta_group)
        return cpasync.make_tiled_tma_atom(op, gmem, smem, box, num_multicast=sharers)

    @cute.kernel
    def kernel(self, a_tma, sfa_tma, b_tma, sfb_tma, d_tma, mD, sfd, alphas, starts, tiles, k_tiles):
        """Shared memory and barriers; then every warp goes to its role."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            for tma in (a_tma, sfa_tma, b_tma, sfb_tma):
                cpasync.prefetch_descriptor(tma.atom)
            if cutlass.const_expr(d_tma is not None):
                cpasync.prefetch_descriptor(d_tma.atom)

        storage = SmemAllocator().allocate(self.shared_storage())
        ring, accumulators = self.pipelines(storage)
        if cutlass.const_expr(self.split_k > 1):
            thread, _, _ = cute.arch.thread_idx()
            if thread == 0:
                for i in cutlass.range_constexpr(2):
                    cute.arch.mbarrier_init(storage.exchange.data_ptr() + i, self.split_k)
        tmem = TmemAllocator(
            storage.tmem_address.ptr,
            barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=2, num_threads=32 * (1 + len(EPILOGUE_WARPS))),
            allocator_warp_id=EPILOGUE_WARPS[0],
            is_two_cta=self.mma_ctas == 2,
            two_cta_tmem_dealloc_mbar_ptr=storage.tmem_free.ptr,
        )
        # no CTA may signal another's barrier before that is initialised
        cluster = (self.cluster_m, self.cluster_n * self.split_k)
        pipeline.pipeline_init_arrive(cluster_shape_mn=cluster, is_relaxed=True)
        pipeline.pipeline_init_wait(cluster_shape_mn=cluster)
        cute.arch.griddepcontrol_wait()

        if warp == LOAD_WARP:
            self.load(a_tma, sfa_tma, b_tma, sfb_tma, storage, ring, tiles, k_tiles)
        if warp == MMA_WARP:
            self.mma(storage, ring, accumulators, tmem, tiles, k_tiles)
        if warp < MMA_WARP:
            self.epilogue(d_tma, mD, sfd, alphas, starts, storage, accumulators, tmem, tiles)

    @cute.jit
    def load(self, a_tma, sfa_tma, b_tma, sfb_tma, storage, ring, tiles, k_tiles):
        """Fills the ring: per stage this CTA's 128 rows of a, its rows of b, and the scales of both."""
        x, y, _ = cute.arch.block_idx()  # x, y: place in the cluster, whose ranks run along x first
        half, pairs = x % self.mma_ctas, self.cluster_m // self.mma_ctas
        first = self.part() * (self.cluster_m * self.cluster_n)  # rank of the first CTA with this part of K
        row = sum(1 << (self.cluster_m * j) for j in range(self.cluster_n))
        column = sum(1 << i for i in range(self.cluster_m))
        halves = sum(1 << i for i in range(0, self.cluster_m, self.mma_ctas))
        # who receives: a and sfa the row of the cluster, sfb the column, b those of the column that hold the same half
        to_row = cutlass.Int16(row << (first + x))
        to_column = cutlass.Int16(column << (first + y * self.cluster_m))
        to_halves = cutlass.Int16(halves << (first + y * self.cluster_m + half))

        sA, sSFA, sB, sSFB = self.operands(storage)
        tAs, tAg = partition(a_tma, sA, (TILE_M, TILE_K), y, self.cluster_n)
        tSFAs, tSFAg = partition(sfa_tma, sSFA, (SF_WORDS, MMAS, 1), y, self.cluster_n)
        tBs, tBg = partition(b_tma, sB, (self.b_rows, TILE_K), x // self.mma_ctas, pairs)
        tSFBs, tSFBg = partition(sfb_tma, sSFB, (SF_WORDS, MMAS, self.sfb_atoms), x, self.cluster_m)

        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.budget.num_stages)
        begin, end = self.k_range(k_tiles)
        tile, step = self.first_tile()
        while tile < tiles[0] * tiles[1]:
            i, j = self.place(tile, tiles)
            sfb_tile = j * self.tile_n // (SF_ROWS * self.sfb_atoms)  # narrow tiles share an atom of 128 columns
            for k_tile in cutlass.range(begin, end, unroll=1):
                ring.producer_acquire(state)
                full, stage = ring.producer_get_barrier(state), state.index
                send(a_tma, tAg[None, i, k_tile], tAs[None, stage], full, to_row, self.cluster_n)
                send(sfa_tma, tSFAg[None, 0, k_tile, i], tSFAs[None, stage], full, to_row, self.cluster_n)
                send(b_tma, tBg[None, j * self.mma_ctas + half, k_tile], tBs[None, stage], full, to_halves, pairs)
                send(sfb_tma, tSFBg[None, 0, k_tile, sfb_tile], tSFBs[None, stage], full, to_column, self.cluster_m)
                state.advance()
            tile += step
        cute.arch.griddepcontrol_launch_dependents()
        # wait until the cluster has read everything this CTA sent: its barriers must outlive the signals
        ring.producer_tail(state)

    @cute.jit
    def mma(self, storage, ring, accumulators, tmem, tiles, k_tiles):
        """Per stage: scales to tensor memory, then the MMAs, in the order of issue. Even CTA of a pair only."""
        tmem.wait_for_alloc()
        x, _, _ = cute.arch.block_idx()
        if x % self.mma_ctas == 0:
            tiled_mma = self.tiled_mma()
            sA, sSFA, sB, sSFB = self.mma_operands(storage, tiled_mma)
            tCrA, tCrB = tiled_mma.make_fragment_A(sA), tiled_mma.make_fragment_B(sB)  # [MMA, 1, MMAS, stage]
            tCtAcc, tCtSFA, tCtSFB = self.tensor_memory(tmem.retrieve_ptr(F32), tiled_mma, sSFA, sSFB)
            copy_sfa, tSFAs, tSFAt = self.scale_copy(sSFA, tCtSFA)
            copy_sfb, tSFBs, tSFBt = self.scale_copy(sSFB, tCtSFB)

            state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.budget.num_stages)
            acc_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.budget.acc_stages)
            begin, end = self.k_range(k_tiles)
            tile, step = self.first_tile()
            while tile < tiles[0] * tiles[1]:
                _, j = self.place(tile, tiles)
                accumulators.producer_acquire(acc_state)
                tcgen05_fence("after")
                tCtD = tCtAcc[None, None, None, self.slot(acc_state, filled=False)]
                tCtSFBTile = tCtSFB
                if cutlass.const_expr(32 <= self.tile_n < SF_ROWS):
                    # a tile within an atom: the scales of 32 rows fill one column of tensor memory
                    skip = j % (SF_ROWS // self.tile_n) * (self.tile_n // 32)
                    words = cute.recast_ptr(tCtSFB.iterator, dtype=cutlass.Int32) + skip
                    tCtSFBTile = cute.make_tensor(cute.recast_ptr(words, dtype=E4M3), tCtSFB.layout)
                for k_tile in cutlass.range(begin, end, unroll=1):
                    ring.consumer_wait(state)
                    stage = state.index
                    cute.copy(copy_sfa, tSFAs[None, None, None, None, stage], tSFAt)
                    cute.copy(copy_sfb, tSFBs[None, None, None, None, stage], tSFBt)
                    for step_k in cutlass.range_constexpr(MMAS):
                        tiled_mma.set(tcgen05.Field.ACCUMULATE, k_tile != begin if step_k == 0 else True)
                        cute.gemm(
                            tiled_mma,
                            tCtD,
                            [tCrA[None, None, step_k, stage], tCtSFA[None, None, step_k]],
                            [tCrB[None, None, step_k, stage], tCtSFBTile[None, None, step_k]],
                            tCtD,
                        )
                    ring.consumer_release(state)
                    state.advance()
                accumulators.producer_commit(acc_state)
                acc_state.advance()
                tile += step
            accumulators.producer_tail(acc_state)

    @cute.jit
    def epilogue(self, d_tma, mD, sfd, alphas, starts, storage, accumulators, tmem, tiles):
        """Accumulators to d; these warps also own tensor memory."""
        tmem.allocate(self.budget.tmem_columns)
        tmem.wait_for_alloc()
        address = tmem.retrieve_ptr(F32)
        scales = self.finish.scales(*alphas)
        self.finish.run(d_tma, mD, sfd, scales, starts, tiles, storage, accumulators, tmem)
        tmem.relinquish_alloc_permit()
        pipeline.NamedBarrier(barrier_id=1, num_threads=32 * len(EPILOGUE_WARPS)).arrive_and_wait()
        tmem.free(address)

    def first_tile(self):
        """This cluster's first tile and the way to its next."""
        _, _, z = cute.arch.block_idx()
        _, _, depth = cute.arch.grid_dim()
        return z // self.split_k, depth // self.split_k

    def part(self):
        """Which part of K is this CTA's."""
        _, _, z = cute.arch.block_idx()
        return z % self.split_k

    def rank(self, part):
        """Rank in the cluster of the CTA that has this CTA's tiles and another part of K."""
        x, y, _ = cute.arch.block_idx()
        return x + self.cluster_m * (y + self.cluster_n * part)

    def k_range(self, k_tiles):
        """First tile of this CTA's part of K, and the one behind it."""
        part = self.part()
        return k_tiles * part // self.split_k, k_tiles * (part + 1) // self.split_k

    def place(self, tile, tiles):
        """This CTA's row tile and column tile in a cluster tile. A band's rows come first: L2 still holds their b."""
        x, y, _ = cute.arch.block_idx()
        if self.band == 0:
            i, j = tile % tiles[0], tile // tiles[0]
        else:
            band, rest = tile // (self.band * tiles[1]), tile % (self.band * tiles[1])
            height = cutlass.min(self.band, tiles[0] - band * self.band)
            i, j = band * self.band + rest % height, rest // height
        return i * self.cluster_m + x, j * self.cluster_n + y

    def slot(self, state, filled):
        """Which of the accumulators in tensor memory a stage is: with one stage, the two places by turns."""
        if self.budget.acc_stages > 1:
            return state.index
        return state.phase if filled else state.phase ^ 1

    def tiled_mma(self):
        op = tcgen05.MmaMXF4NVF4Op(E4M3, (*self.mma_tile[:2], MMA_K), self.cta_group, tcgen05.OperandSource.SMEM)
        return cute.make_tiled_mma(cute.make_mma_atom(op))

    def pipelines(self, storage):
        """ring: TMA fills, MMA empties. accumulators: MMA fills, the epilogue warps (of both CTAs of a pair) empty."""
        ctas = cute.tiled_divide(cute.make_layout((self.cluster_m, self.cluster_n, self.split_k)), (self.mma_ctas,))
        thread = pipeline.Agent.Thread
        readers = self.cluster_m // self.mma_ctas + self.cluster_n - 1  # MMAs that read what this CTA sends
        ring = pipeline.PipelineTmaUmma.create(
            barrier_storage=storage.ring.data_ptr(),
            num_stages=self.budget.num_stages,
            producer_group=pipeline.CooperativeGroup(thread),
            consumer_group=pipeline.CooperativeGroup(thread, readers),
            tx_count=self.budget.stage_bytes * self.mma_ctas,
            cta_layout_vmnk=ctas,
            defer_sync=True,
        )
        accumulators = pipeline.PipelineUmmaAsync.create(
            barrier_storage=storage.accumulators.data_ptr(),
            num_stages=self.budget.acc_stages,
            producer_group=pipeline.CooperativeGroup(thread),
            consumer_group=pipeline.CooperativeGroup(thread, 32 * len(EPILOGUE_WARPS) * self.mma_ctas),
            cta_layout_vmnk=ctas,
            defer_sync=True,
        )
        return ring, accumulators

    def shared_storage(self):
        stages = self.budget.num_stages
        num_d = staging_bytes(self.tile_n, self.swap_ab, self.split_k)
        num_a = cute.cosize(swizzled_rows(E2M1, TILE_M, stages).outer)
        num_b = cute.cosize(swizzled_rows(E2M1, self.b_rows, stages).outer)
        num_sfa, num_sfb = cute.cosize(scale_atoms(1, stages)), cute.cosize(scale_atoms(self.sfb_atoms, stages))

        @cute.struct
        class Storage:
            ring: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            accumulators: cute.struct.MemRange[cutlass.Int64, 2 * self.budget.acc_stages]
            exchange: cute.struct.MemRange[cutlass.Int64, 2]  # sums are there, sums have been read
            tmem_free: cutlass.Int64
            tmem_address: cutlass.Int32
            d: cute.struct.Align[cute.struct.MemRange[cutlass.Uint8, num_d], SWIZZLE_ALIGN]
            a: cute.struct.Align[cute.struct.MemRange[E2M1, num_a], SWIZZLE_ALIGN]
            b: cute.struct.Align[cute.struct.MemRange[E2M1, num_b], SWIZZLE_ALIGN]
            sfa: cute.struct.Align[cute.struct.MemRange[cutlass.Int32, num_sfa], SWIZZLE_ALIGN]
            sfb: cute.struct.Align[cute.struct.MemRange[cutlass.Int32, num_sfb], SWIZZLE_ALIGN]

        return Storage

    def operands(self, storage):
        """The ring as TMA fills it: codes [rows, TILE_K, stage] and scales [SF_WORDS, MMAS, atoms of rows, stage]."""
        stages = self.budget.num_stages
        a, b = swizzled_rows(E2M1, TILE_M, stages), swizzled_rows(E2M1, self.b_rows, stages)
        return (
            storage.a.get_tensor(a.outer, swizzle=a.inner),
            storage.sfa.get_tensor(scale_atoms(1, stages)),
            storage.b.get_tensor(b.outer, swizzle=b.inner),
            storage.sfb.get_tensor(scale_atoms(self.sfb_atoms, stages)),
        )

    def mma_operands(self, storage, tiled_mma):
        """The same bytes as the MMA and the scale copies read them: [MMA, 1, MMAS, stage]."""
        stages = self.budget.num_stages
        a = blackwell_helpers.make_smem_layout_a(tiled_mma, self.mma_tile, E2M1, stages)
        b = blackwell_helpers.make_smem_layout_b(tiled_mma, self.mma_tile, E2M1, stages)
        sfa = blockscaled_layout.make_smem_layout_sfa(tiled_mma, self.mma_tile, BLOCK, stages)
        sfb = blockscaled_layout.make_smem_layout_sfb(tiled_mma, self.mma_tile, BLOCK, stages)
        return (
            storage.a.get_tensor(a.outer, swizzle=a.inner),
            storage.sfa.get_tensor(sfa, dtype=E4M3),
            storage.b.get_tensor(b.outer, swizzle=b.inner),
            storage.sfb.get_tensor(sfb, dtype=E4M3),
        )

    def accumulator(self, address, tiled_mma):
        """[MMA, 1, 1, slot] at the start of tensor memory."""
        one = tiled_mma.make_fragment_C(tiled_mma.partition_shape_C(self.mma_tile[:2])).layout
        slots = cute.make_layout(2, stride=self.budget.acc_stride)
        return cute.make_tensor(address, cute.append(one, slots, up_to_rank=4))

    def tensor_memory(self, address, tiled_mma, sSFA, sSFB):
        """Accumulators, then scales of a, then scales of b (the last two [MMA, 1, MMAS])."""
        sfa = address + self.budget.acc_stride + self.tile_n
        sfb = sfa + self.budget.sfa_columns
        one_stage = (None, None, None, 0)
        sfa_layout = blockscaled_layout.make_tmem_layout_sfa(
            tiled_mma, self.mma_tile, BLOCK, cute.slice_(sSFA.layout, one_stage)
        )
        sfb_layout = blockscaled_layout.make_tmem_layout_sfb(
            tiled_mma, self.mma_tile, BLOCK, cute.slice_(sSFB.layout, one_stage)
        )
        return (
            self.accumulator(address, tiled_mma),
            cute.make_tensor(cute.recast_ptr(sfa, dtype=E4M3), sfa_layout),
            cute.make_tensor(cute.recast_ptr(sfb, dtype=E4M3), sfb_layout),
        )

    def scale_copy(self, sSF, tCtSF):
        """Copy of scale atoms to tensor memory, where the lanes of all four warps get them, and its two sides."""
        sSF, tCtSF = cute.filter_zeros(sSF), cute.filter_zeros(tCtSF)
        copy = tcgen05.make_s2t_copy(cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.cta_group), E4M3), tCtSF)
        part = copy.get_slice(0)
        return copy, tcgen05.get_s2t_smem_desc_tensor(copy, part.partition_S(sSF)), part.partition_D(tCtSF)


@functools.cache
def compiled(config: Config, out: str, segments: int) -> Any:
    """The compiled host function, for every m, n and k."""
    function, made_for = GemmNvfp4Sm100(config, out, segments), (config, out, segments)
    return cross.compiled(function, *_fake_arguments(out, segments), arch=ARCH, module=__name__, made_for=made_for)


def launch(
    a: NVFP4Tensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor | NVFP4Tensor, config: Config
) -> None:
    """out [m, n] = a [m, k] @ b [n, k].T, times a.alpha and b.alpha of the column's segment, on the current stream.

    a, b: scales in blocked_128x4; a has one alpha. out: BF16 or FP32, contiguous; or NVFP4 [m, n], whose alpha is given
    and whose scales are blocked_128x4, padding zero. segments: widths of the column runs that have an alpha each.
    Raises ValueError or TypeError for what the kernel cannot run.
    """
    if not isinstance(a, NVFP4Tensor):
        raise TypeError(
            f"a must be an NVFP4Tensor: the block-scaled MMA takes NVFP4 on both sides, got {type(a).__name__}"
        )
    (m, k), n = a.shape, b.shape[0]
    check_segments(b.alpha, n, segments)
    widths = segments or (n,)
    problem = GemmProblem(m=m, n=n, k=k, act="nvfp4", out=_out_name(out), segments=len(widths), order=b.order)
    if reason := supports(problem, config):
        raise ValueError(reason)
    if b.shape[1] != k or tuple(out.shape) != (m, n):
        raise ValueError(f"a [{m}, {k}] and b {list(b.shape)} need an out [m, n], got {list(out.shape)}")
    if a.alpha.numel() != 1:
        raise ValueError(f"a must have one alpha, got {list(a.alpha.shape)}")
    _check_layout(a, "a")
    _check_layout(b, "b")
    d, sfd, alpha_d = _output(out, a)
    if m == 0:
        return
    weights, tokens = (b.data, b.sf), (a.data, a.sf)
    operands = (*weights, *tokens) if config.swap_ab else (*tokens, *weights)
    tensors = (*operands, d, sfd, a.alpha, b.alpha, alpha_d)
    starts = (0, *itertools.accumulate(widths[:-1]))
    clusters = max(1, _sm_count(d.device) // (config.cluster_m * config.cluster_n * config.split_k))
    sizes = (m, n, k, clusters)
    function = compiled(config, problem.out, problem.segments)
    if d.is_cuda:
        with torch.cuda.device(d.device):
            stream = torch.cuda.current_stream().cuda_stream
            function(*_arguments(problem.out, [t.data_ptr() for t in tensors], starts, sizes, stream))
    else:
        function(*_arguments(problem.out, [t.data_ptr() for t in tensors], starts, sizes, 0))


def precompile(problem: GemmProblem, config: Config) -> None:
    """Compile for `problem` into the cache, without a GPU. Raises ValueError for what `supports` refuses."""
    if reason := supports(problem, config):
        raise ValueError(reason)
    compiled(config, problem.out, problem.segments)


def warm(problem: GemmProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    if reason := supports(problem, config):
        raise ValueError(reason)
    if not torch.cuda.is_available():
        compiled(config, problem.out, problem.segments)
        return
    widths, k = (MMA_K,) * problem.segments, config.split_k * TILE_K
    one = torch.ones((), device="cuda")
    a = NVFP4Tensor.empty((1, k), one, SF_LAYOUT)
    b = NVFP4Tensor.empty((sum(widths), k), torch.ones(problem.segments, device="cuda"), SF_LAYOUT)
    out: Tensor | NVFP4Tensor
    if problem.out == "nvfp4":
        out = NVFP4Tensor.empty((1, sum(widths)), one, SF_LAYOUT)
    else:
        dtype = next(t for t, name in OUT_NAMES.items() if name == problem.out)
        out = torch.empty(1, sum(widths), dtype=dtype, device="cuda")
    launch(a, b, widths, out, config)


def build_key(problem: GemmProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.out, problem.segments


def build(problem: GemmProblem, config: Config, arch: str = ARCH) -> Built:
    """Compile for `problem` without a GPU. Raises ValueError for another architecture or what `supports` refuses."""
    if arch != ARCH:
        raise ValueError(f"this kernel is for {ARCH}, got {arch!r}")
    if reason := supports(problem, config):
        raise ValueError(reason)
    kernel = GemmNvfp4Sm100(config, problem.out, problem.segments)
    return cross.build(kernel, *_fake_arguments(problem.out, problem.segments), arch=arch)


def _arguments(
    out: str, addresses: Sequence[int], starts: Sequence[int], sizes: Sequence[int], stream: int
) -> tuple[Any, ...]:
    """What `__call__` takes. addresses: operands, d, sfd, alpha_a, alpha_b, alpha_d; sizes: m, n, k, most clusters."""
    dtypes = (E2M1, E4M3, E2M1, E4M3, OUT[out], cutlass.Uint8, F32, F32, F32)
    aligned = (16, 16, 16, 16, 16, 16, 4, 4, 4)
    pointers = (
        make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)
        for dtype, address, align in zip(dtypes, addresses, aligned, strict=True)
    )
    return (*pointers, tuple(map(cutlass.Int32, starts)), *map(cutlass.Int32, sizes), cuda.CUstream(stream))


def _fake_arguments(out: str, segments: int) -> tuple[Any, ...]:
    """Arguments to compile with: types, alignments and the number of segments count, the values do not."""
    return _arguments(out, (0,) * 9, (0,) * segments, (0,) * 4, 0)


def _out_name(out: Tensor | NVFP4Tensor) -> str:
    if isinstance(out, NVFP4Tensor):
        return "nvfp4"
    if out.dtype not in OUT_NAMES:
        raise TypeError(f"out must be bfloat16, float32 or an NVFP4Tensor, got {out.dtype}")
    return OUT_NAMES[out.dtype]


def _output(out: Tensor | NVFP4Tensor, a: NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Elements, block scales and global scale; of the last two any tensor where there are none."""
    if isinstance(out, NVFP4Tensor):
        _check_layout(out, "out")
        if out.alpha.numel() != 1:
            raise ValueError(f"out must have one alpha, got {list(out.alpha.shape)}")
        return out.data, out.sf, out.alpha
    if not out.is_contiguous() or out.data_ptr() % 16:
        raise ValueError(
            f"out must be contiguous and start at a multiple of 16 bytes, got strides {list(out.stride())} "
            f"from {out.data_ptr() % 16} bytes past one on"
        )
    return out, a.sf, a.alpha


def _check_layout(t: NVFP4Tensor, name: str) -> None:
    if t.sf_layout != SF_LAYOUT:
        raise ValueError(f"{name} must have its scales in {SF_LAYOUT}, got {t.sf_layout}")
    if not (t.data.is_contiguous() and t.sf.is_contiguous() and t.alpha.is_contiguous()):
        raise ValueError(f"data, sf and alpha of {name} must be contiguous")
    if t.data.data_ptr() % 16 or t.sf.data_ptr() % 16:
        raise ValueError(f"data and sf of {name} must start at multiples of 16 bytes, as TMA reads them")


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SM_COUNT[ARCH]


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
