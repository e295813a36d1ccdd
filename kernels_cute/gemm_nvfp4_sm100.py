"""NVFP4 x NVFP4 GEMM on the block-scaled tensor cores of sm_100a.

    d[m, n] = alpha(n) * sum over blocks of 16 along k of  sfa[m, block] * sfb[n, block] * sum a[m, k] * b[n, k]

summed in FP32 by `tcgen05.mma.kind::mxf4nvf4.block_scale` (PTX ISA, "tcgen05.mma instructions") and rounded once on the
way out. alpha(n) = a.alpha * b.alpha[segment of n] is multiplied in FP32 in the epilogue, never folded into the block
scales, which have no bits to spare. Bound: memory (the packed b) up to some hundred rows of a, the tensor cores above.

A CTA owns tiles of 128 rows, a cluster walks over cluster tiles (persistent), and six warps share the work:

    load      1 warp    TMA fills a ring: codes in swizzled rows of 128 bytes, scales as whole atoms of 512 bytes
    mma       1 warp    scales from shared to tensor memory (`tcgen05.cp`), then four MMAs of k = 64 a stage
    epilogue  4 warps   tensor memory -> registers, times alpha, rounded -> shared memory -> TMA store

TMA fills what lies past m, n or k with zeros and stores nothing past m and n: no tile needs a mask. With `mma_ctas` = 2
a pair of CTAs computes 256 rows together: each holds its 128 rows of a and half of the tile's rows of b, and the even
one issues the MMAs of both.

Status: compiled, and its layouts, descriptors and budgets checked on the host; not yet executed on a GPU.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import cute, pipeline
from cutlass._mlir.dialects import nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cute.runtime import make_ptr
from cutlass.cutlass_dsl import dsl_user_op
from cutlass.memory import SmemAllocator, TmemAllocator
from cutlass.utils import blackwell_helpers, blockscaled_layout
from torch import Tensor

from fp4suite.built import MAX_SHARED_BYTES, TMEM_COLUMNS, Built
from fp4suite.formats import BLOCK, NVFP4Tensor, SfLayout
from fp4suite.problem import GemmProblem
from fp4suite.reference.gemm import check_segments

from . import build as cross

ARCH = "sm_100a"
TILE_M = 128  # rows of a CTA: the lanes of tensor memory
TILE_K = 256  # k of a stage: 128 bytes of codes, one swizzled row
MMA_K = 64  # k of one MMA instruction: four scales a row
SF_ROWS, SF_ATOM_BYTES = 128, 512  # a scale atom covers 128 rows and MMA_K of k
STORE_STAGES, STORE_ROW_BYTES = 2, 128  # staging of the output: [128 rows, 128 bytes], one swizzled row
SWIZZLE_ALIGN = 1024  # bytes: the swizzle pattern repeats every eight rows of 128 bytes
BARRIER_BYTES = SWIZZLE_ALIGN  # barriers and the tensor memory address, padded to what follows
MAX_SEGMENTS = 8
SM_COUNT = 148  # of a B200; only a host without one needs it

SF_WORDS = SF_ATOM_BYTES // 4
MMAS = TILE_K // MMA_K  # MMA instructions of a stage, and scale atoms along k

EPILOGUE_WARPS = (0, 1, 2, 3)
MMA_WARP, LOAD_WARP = 4, 5
THREADS = 32 * 6

E2M1, E4M3, F32 = cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float32
OUT = {"bf16": cutlass.BFloat16, "fp32": cutlass.Float32}
OUT_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
SF_LAYOUT: SfLayout = "blocked_128x4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """tile_n: columns of an MMA. mma_ctas: CTAs that share one MMA. cluster_m/n: CTAs that share loads by multicast."""

    tile_n: int = 128
    mma_ctas: int = 1
    cluster_m: int = 1
    cluster_n: int = 1


SPACE = {"tile_n": (64, 128, 256), "mma_ctas": (1, 2), "cluster_m": (1, 2, 4), "cluster_n": (1, 2)}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a config takes of one SM.

    stage_bytes: codes and scales of TILE_K. num_stages: as many as fit. shared_bytes: the whole CTA.
    acc_stages: accumulators of tile_n columns, two where they fit, so that the epilogue overlaps the next tile.
    sfa_columns, sfb_columns: scales of one stage. tmem_columns: as allocated, a power of two.
    """

    stage_bytes: int
    num_stages: int
    shared_bytes: int
    acc_stages: int
    sfa_columns: int
    sfb_columns: int
    tmem_columns: int


def budget(config: Config) -> Budget:
    """Shared and tensor memory of a config; both outputs take the same."""
    sfb_rows = _round_up(config.tile_n, SF_ROWS)
    codes = (TILE_M + config.tile_n // config.mma_ctas) * TILE_K // 2  # a pair halves b
    scales = (TILE_M + sfb_rows) * TILE_K // BLOCK  # but each CTA of it needs all of sfb
    fixed = BARRIER_BYTES + STORE_STAGES * TILE_M * STORE_ROW_BYTES
    num_stages = (MAX_SHARED_BYTES[ARCH] - fixed) // (codes + scales)

    # a column of scales holds four scales of 32 rows, repeated for each of the four warps' lanes
    sfa_columns = TILE_M // 32 * (TILE_K // MMA_K)
    sfb_columns = sfb_rows // 32 * (TILE_K // MMA_K)
    acc_stages = 2 if 2 * config.tile_n + sfa_columns + sfb_columns <= TMEM_COLUMNS else 1
    used = acc_stages * config.tile_n + sfa_columns + sfb_columns
    return Budget(
        stage_bytes=codes + scales,
        num_stages=num_stages,
        shared_bytes=fixed + num_stages * (codes + scales),
        acc_stages=acc_stages,
        sfa_columns=sfa_columns,
        sfb_columns=sfb_columns,
        tmem_columns=max(32, 1 << (used - 1).bit_length()),
    )


def supports(problem: GemmProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can.

    Scales are blocked_128x4. Their padding rows may hold anything (they reach only rows and columns that are cut off);
    there is no padding along k, as k is a multiple of 64.
    """
    if problem.act != "nvfp4":
        return f'act="{problem.act}": the block-scaled MMA takes NVFP4 on both sides, quantise the activations first'
    if problem.out not in OUT:
        return f'out="{problem.out}" is none of {", ".join(OUT)}'
    if problem.k % MMA_K:
        return f"k={problem.k} is not a multiple of {MMA_K}, the k of one MMA"
    if problem.n % 8:
        return f"n={problem.n} is not a multiple of 8: TMA stores rows of a multiple of 16 bytes"
    if not 1 <= problem.segments <= MAX_SEGMENTS:
        return f"segments={problem.segments} is not in 1..{MAX_SEGMENTS}"
    for knob, values in SPACE.items():
        if getattr(config, knob) not in values:
            return f"{knob}={getattr(config, knob)} is none of {', '.join(map(str, values))}"
    if config.cluster_m % config.mma_ctas:
        return f"cluster_m={config.cluster_m} is not a multiple of mma_ctas={config.mma_ctas}"
    return None


class GemmNvfp4Sm100:
    """One compiled kernel: config, output type and number of segments are fixed, every size is read at launch."""

    def __init__(self, config: Config, out: str, segments: int):
        self.tile_n = config.tile_n
        self.mma_ctas = config.mma_ctas
        self.cluster_m, self.cluster_n = config.cluster_m, config.cluster_n
        self.segments = segments
        self.budget = budget(config)
        self.out = OUT[out]
        self.store_n = STORE_ROW_BYTES * 8 // self.out.width  # columns of one store
        self.b_rows = config.tile_n // config.mma_ctas  # rows of b in this CTA's shared memory
        self.sfb_atoms = _round_up(config.tile_n, SF_ROWS) // SF_ROWS
        self.cta_group = tcgen05.CtaGroup.TWO if config.mma_ctas == 2 else tcgen05.CtaGroup.ONE
        self.mma_tile = (TILE_M * config.mma_ctas, config.tile_n, TILE_K)

    @cute.jit
    def __call__(self, a, sfa, b, sfb, d, alpha_a, alpha_b, starts, m, n, k, max_clusters, stream):
        """Layouts, TMA atoms and the grid; runs on the host.

        a, b: pointers to packed codes [m, k] and [n, k]; sfa, sfb: to blocked_128x4 scales; d: to [m, n];
        alpha_a: to one FP32; alpha_b: to one per segment; starts: first column of each segment.
        """
        n, k = cute.assume(n, 8), cute.assume(k, MMA_K)
        mA = cute.make_tensor(a, cute.make_layout((m, k), stride=(k, 1)))
        mB = cute.make_tensor(b, cute.make_layout((n, k), stride=(k, 1)))
        mD = cute.make_tensor(d, cute.make_layout((m, n), stride=(n, 1)))
        mSFA = cute.make_tensor(cute.recast_ptr(sfa, dtype=cutlass.Int32), scale_words(m, k))
        mSFB = cute.make_tensor(cute.recast_ptr(sfb, dtype=cutlass.Int32), scale_words(n, k))
        mAlphaA = cute.make_tensor(alpha_a, cute.make_layout(1))
        mAlphaB = cute.make_tensor(alpha_b, cute.make_layout(self.segments))

        # a row of the cluster reads the same a, a column the same b, of which the CTAs of a pair take a half each;
        # both halves of a pair need the scales of all of b
        stages = self.budget.num_stages
        sA, sB = swizzled_rows(E2M1, TILE_M, stages), swizzled_rows(E2M1, self.b_rows, stages)
        sSFA, sSFB = scale_atoms(1, stages), scale_atoms(self.sfb_atoms, stages)
        sD = swizzled_rows(self.out, TILE_M, STORE_STAGES)
        a_tma = self.load_atom(mA, sA, (TILE_M, TILE_K), self.cluster_n)
        b_tma = self.load_atom(mB, sB, (self.b_rows, TILE_K), self.cluster_m // self.mma_ctas)
        sfa_tma = self.load_atom(mSFA, sSFA, (SF_WORDS, MMAS, 1), self.cluster_n)
        sfb_tma = self.load_atom(mSFB, sSFB, (SF_WORDS, MMAS, self.sfb_atoms), self.cluster_m)
        d_tma = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mD, sD, (TILE_M, self.store_n))

        tiles = (cute.ceil_div(m, TILE_M * self.cluster_m), cute.ceil_div(n, self.tile_n * self.cluster_n))
        num_clusters = cutlass.min(tiles[0] * tiles[1], max_clusters)
        self.kernel(
            a_tma, sfa_tma, b_tma, sfb_tma, d_tma, mAlphaA, mAlphaB, starts, tiles, cute.ceil_div(k, TILE_K)
        ).launch(
            grid=(self.cluster_m, self.cluster_n, num_clusters),
            block=(THREADS, 1, 1),
            cluster=(self.cluster_m, self.cluster_n, 1),
            stream=stream,
            min_blocks_per_mp=1,
        )

    def load_atom(self, gmem, smem, box, sharers):
        """TMA load of `box`, sent to `sharers` CTAs of the cluster, each of which asks for one part."""
        if sharers == 1:
            return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(self.cta_group), gmem, smem, box)
        op = cpasync.CopyBulkTensorTileG2SMulticastOp(self.cta_group)
        return cpasync.make_tiled_tma_atom(op, gmem, smem, box, num_multicast=sharers)

    @cute.kernel
    def kernel(self, a_tma, sfa_tma, b_tma, sfb_tma, d_tma, mAlphaA, mAlphaB, starts, tiles, k_tiles):
        """Shared memory and barriers; then every warp goes to its role."""
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        if warp == LOAD_WARP:
            for tma in (a_tma, sfa_tma, b_tma, sfb_tma, d_tma):
                cpasync.prefetch_descriptor(tma.atom)

        storage = SmemAllocator().allocate(self.shared_storage())
        ring, accumulators = self.pipelines(storage)
        tmem = TmemAllocator(
            storage.tmem_address.ptr,
            barrier_for_retrieve=pipeline.NamedBarrier(barrier_id=2, num_threads=32 * (1 + len(EPILOGUE_WARPS))),
            allocator_warp_id=EPILOGUE_WARPS[0],
            is_two_cta=self.mma_ctas == 2,
            two_cta_tmem_dealloc_mbar_ptr=storage.tmem_free.ptr,
        )
        # no CTA may signal another's barrier before that is initialised
        pipeline.pipeline_init_arrive(cluster_shape_mn=(self.cluster_m, self.cluster_n), is_relaxed=True)
        pipeline.pipeline_init_wait(cluster_shape_mn=(self.cluster_m, self.cluster_n))

        if warp == LOAD_WARP:
            self.load(a_tma, sfa_tma, b_tma, sfb_tma, storage, ring, tiles, k_tiles)
        if warp == MMA_WARP:
            self.mma(storage, ring, accumulators, tmem, tiles, k_tiles)
        if warp < MMA_WARP:
            self.epilogue(d_tma, mAlphaA, mAlphaB, starts, storage, accumulators, tmem, tiles)

    @cute.jit
    def load(self, a_tma, sfa_tma, b_tma, sfb_tma, storage, ring, tiles, k_tiles):
        """Fills the ring: per stage this CTA's 128 rows of a, its rows of b, and the scales of both."""
        x, y, _ = cute.arch.block_idx()  # x, y: place in the cluster, whose ranks run along x first
        half, pairs = x % self.mma_ctas, self.cluster_m // self.mma_ctas
        row = sum(1 << (self.cluster_m * j) for j in range(self.cluster_n))
        column = sum(1 << i for i in range(self.cluster_m))
        halves = sum(1 << i for i in range(0, self.cluster_m, self.mma_ctas))
        # who receives: a and sfa the row of the cluster, sfb the column, b those of the column that hold the same half
        to_row = cutlass.Int16(row << x)
        to_column = cutlass.Int16(column << (y * self.cluster_m))
        to_halves = cutlass.Int16(halves << (y * self.cluster_m + half))

        sA, sSFA, sB, sSFB = self.operands(storage)
        tAs, tAg = partition(a_tma, sA, (TILE_M, TILE_K), y, self.cluster_n)
        tSFAs, tSFAg = partition(sfa_tma, sSFA, (SF_WORDS, MMAS, 1), y, self.cluster_n)
        tBs, tBg = partition(b_tma, sB, (self.b_rows, TILE_K), x // self.mma_ctas, pairs)
        tSFBs, tSFBg = partition(sfb_tma, sSFB, (SF_WORDS, MMAS, self.sfb_atoms), x, self.cluster_m)

        state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, self.budget.num_stages)
        tile, step = self.first_tile()
        while tile < tiles[0] * tiles[1]:
            i, j = self.place(tile, tiles)
            # tiles of 64 columns share an atom of 128 in twos
            sfb_tile = j * self.tile_n // (SF_ROWS * self.sfb_atoms)
            for k_tile in cutlass.range(k_tiles, unroll=1):
                ring.producer_acquire(state)
                full, stage = ring.producer_get_barrier(state), state.index
                send(a_tma, tAg[None, i, k_tile], tAs[None, stage], full, to_row, self.cluster_n)
                send(sfa_tma, tSFAg[None, 0, k_tile, i], tSFAs[None, stage], full, to_row, self.cluster_n)
                send(b_tma, tBg[None, j * self.mma_ctas + half, k_tile], tBs[None, stage], full, to_halves, pairs)
                send(sfb_tma, tSFBg[None, 0, k_tile, sfb_tile], tSFBs[None, stage], full, to_column, self.cluster_m)
                state.advance()
            tile += step
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
            tile, step = self.first_tile()
            while tile < tiles[0] * tiles[1]:
                _, j = self.place(tile, tiles)
                accumulators.producer_acquire(acc_state)
                tcgen05_fence("after")
                tCtD = tCtAcc[None, None, None, acc_state.index]
                tCtSFBTile = tCtSFB
                if cutlass.const_expr(self.tile_n < SF_ROWS):
                    # columns 64..127 of an atom: the scales of 32 rows fill one column of tensor memory
                    skip = (j % 2) * (self.tile_n // 32)
                    words = cute.recast_ptr(tCtSFB.iterator, dtype=cutlass.Int32) + skip
                    tCtSFBTile = cute.make_tensor(cute.recast_ptr(words, dtype=E4M3), tCtSFB.layout)
                for k_tile in cutlass.range(k_tiles, unroll=1):
                    ring.consumer_wait(state)
                    stage = state.index
                    cute.copy(copy_sfa, tSFAs[None, None, None, None, stage], tSFAt)
                    cute.copy(copy_sfb, tSFBs[None, None, None, None, stage], tSFBt)
                    for step_k in cutlass.range_constexpr(MMAS):
                        tiled_mma.set(tcgen05.Field.ACCUMULATE, k_tile != 0 if step_k == 0 else True)
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
    def epilogue(self, d_tma, mAlphaA, mAlphaB, starts, storage, accumulators, tmem, tiles):
        """Accumulator -> FP32 registers, a row a thread -> times alpha, rounded -> shared memory -> global memory."""
        tmem.allocate(self.budget.tmem_columns)
        tmem.wait_for_alloc()
        address = tmem.retrieve_ptr(F32)
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        alphas = [mAlphaA[0] * mAlphaB[s] for s in range(self.segments)]

        box, num_stores = (TILE_M, self.store_n), self.tile_n // self.store_n
        copy_t2r, tAcc = self.accumulator_copy(self.accumulator(address, self.tiled_mma()))
        thr_t2r = copy_t2r.get_slice(thread)
        tTRt = thr_t2r.partition_S(tAcc)  # [load, 1, 1, 1, stores, stage]
        tTRc = thr_t2r.partition_D(cute.make_identity_tensor(box))  # [load, 1, 1] -> (row, column)
        rAcc = cute.make_rmem_tensor(tTRc.shape, F32)
        rD = cute.make_rmem_tensor(tTRc.shape, self.out)

        sD = self.staging(storage)  # [128, store_n, stage]
        store_op = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.out, num_bits_per_copy=128)
        copy_r2s = cute.make_tiled_copy_D(store_op, copy_t2r)
        tRSr, tRSs = copy_r2s.retile(rD), copy_r2s.get_slice(thread).partition_D(sD)
        tDs, tDg = partition(d_tma, sD, box, 0, 1)

        warps = pipeline.NamedBarrier(barrier_id=1, num_threads=32 * len(EPILOGUE_WARPS))
        stores = pipeline.PipelineTmaStore.create(
            num_stages=STORE_STAGES,
            producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, 32 * len(EPILOGUE_WARPS)),
        )
        staged = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, STORE_STAGES)
        acc_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.budget.acc_stages)
        tile, step = self.first_tile()
        while tile < tiles[0] * tiles[1]:
            i, j = self.place(tile, tiles)
            accumulators.consumer_wait(acc_state)
            tcgen05_fence("after")
            for s in cutlass.range(num_stores, unroll=1):
                cute.copy(copy_t2r, tTRt[None, None, None, 0, s, acc_state.index], rAcc)
                cute.arch.fence_view_async_tmem_load()
                if s == num_stores - 1:
                    tcgen05_fence("before")
                    accumulators.consumer_release(acc_state)
                self.scale(rAcc, rD, tTRc, alphas, starts, j * self.tile_n + s * self.store_n)

                if warp == EPILOGUE_WARPS[0]:
                    stores.producer_acquire()  # the store before the last has left its buffer
                warps.arrive_and_wait()
                cute.copy(copy_r2s, tRSr, tRSs[None, None, None, staged.index])
                cute.arch.fence_proxy("async.shared", space="cta")
                warps.arrive_and_wait()
                if warp == EPILOGUE_WARPS[0]:
                    cute.copy(d_tma.atom, tDs[None, staged.index], tDg[None, i, j * num_stores + s])
                    stores.producer_commit()
                staged.advance()
            acc_state.advance()
            tile += step

        tmem.relinquish_alloc_permit()
        warps.arrive_and_wait()
        tmem.free(address)
        if warp == EPILOGUE_WARPS[0]:
            stores.producer_tail()

    @cute.jit
    def scale(self, rAcc, rD, tTRc, alphas, starts, first_column):
        """rD = rounded rAcc * alpha of its column's segment."""
        if cutlass.const_expr(self.segments == 1):
            rD.store((rAcc.load() * alphas[0]).to(self.out))
        else:
            rScaled = cute.make_rmem_tensor(rAcc.shape, F32)
            for e in cutlass.range_constexpr(cute.size(rAcc)):
                column, alpha = first_column + tTRc[e][1], alphas[0]
                for s in cutlass.range_constexpr(1, self.segments):
                    alpha = alphas[s] if column >= starts[s] else alpha
                rScaled[e] = rAcc[e] * alpha
            rD.store(rScaled.load().to(self.out))

    def first_tile(self):
        """This cluster's first tile and the way to its next."""
        _, _, z = cute.arch.block_idx()
        _, _, clusters = cute.arch.grid_dim()
        return z, clusters

    def place(self, tile, tiles):
        """This CTA's row tile and column tile in a cluster tile; rows come first, so that b is reused from L2."""
        x, y, _ = cute.arch.block_idx()
        return tile % tiles[0] * self.cluster_m + x, tile // tiles[0] * self.cluster_n + y

    def tiled_mma(self):
        op = tcgen05.MmaMXF4NVF4Op(E4M3, (*self.mma_tile[:2], MMA_K), self.cta_group, tcgen05.OperandSource.SMEM)
        return cute.make_tiled_mma(cute.make_mma_atom(op))

    def pipelines(self, storage):
        """ring: TMA fills, MMA empties. accumulators: MMA fills, the epilogue warps (of both CTAs of a pair) empty."""
        ctas = cute.tiled_divide(cute.make_layout((self.cluster_m, self.cluster_n, 1)), (self.mma_ctas,))
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
        num_d = cute.cosize(swizzled_rows(self.out, TILE_M, STORE_STAGES).outer)
        num_a = cute.cosize(swizzled_rows(E2M1, TILE_M, stages).outer)
        num_b = cute.cosize(swizzled_rows(E2M1, self.b_rows, stages).outer)
        num_sfa, num_sfb = cute.cosize(scale_atoms(1, stages)), cute.cosize(scale_atoms(self.sfb_atoms, stages))

        @cute.struct
        class Storage:
            ring: cute.struct.MemRange[cutlass.Int64, 2 * stages]
            accumulators: cute.struct.MemRange[cutlass.Int64, 2 * self.budget.acc_stages]
            tmem_free: cutlass.Int64
            tmem_address: cutlass.Int32
            d: cute.struct.Align[cute.struct.MemRange[self.out, num_d], SWIZZLE_ALIGN]
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

    def staging(self, storage):
        layout = swizzled_rows(self.out, TILE_M, STORE_STAGES)
        return storage.d.get_tensor(layout.outer, swizzle=layout.inner)

    def accumulator(self, address, tiled_mma):
        """[MMA, 1, 1, stage] at the start of tensor memory."""
        shape = cute.append(tiled_mma.partition_shape_C(self.mma_tile[:2]), self.budget.acc_stages)
        return cute.make_tensor(address, tiled_mma.make_fragment_C(shape).layout)

    def accumulator_copy(self, tCtAcc):
        """Copy to registers, a lane to a thread, and what it copies: [128, store_n, 1, stores, stage]."""
        tAcc = cute.flat_divide(tCtAcc[(None, None), 0, 0, None], (TILE_M, self.store_n))
        op = tcgen05.Ld32x32bOp(tcgen05.Repetition(self.store_n), tcgen05.Pack.NONE)
        return tcgen05.make_tmem_copy(cute.make_copy_atom(op, F32), tAcc[None, None, 0, 0, 0]), tAcc

    def tensor_memory(self, address, tiled_mma, sSFA, sSFB):
        """Accumulators, then scales of a, then scales of b (the last two [MMA, 1, MMAS])."""
        sfa = address + self.budget.acc_stages * self.tile_n
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


def swizzled_rows(dtype, rows, stages):
    """Shared [rows, columns, stage], a row 128 bytes, its 16-byte chunks permuted by row % 8 (TMA's SWIZZLE_128B)."""
    atom = tcgen05.make_smem_layout_atom(tcgen05.SmemLayoutAtomKind.K_SW128, dtype)
    return cute.tile_to_shape(atom, (rows, 128 * 8 // dtype.width, stages), order=(0, 1, 2))


def scale_words(rows, k):
    """A blocked_128x4 buffer as [SF_WORDS, k / MMA_K, ceil(rows / SF_ROWS)]: to TMA an atom is a run of words."""
    atoms_k = k // MMA_K
    shape = (SF_WORDS, atoms_k, cute.ceil_div(rows, SF_ROWS))
    return cute.make_layout(shape, stride=(1, SF_WORDS, SF_WORDS * atoms_k))


def scale_atoms(atoms, stages):
    """Shared [SF_WORDS, MMAS, atoms of rows, stage], in the same order as in global memory."""
    return cute.make_ordered_layout((SF_WORDS, MMAS, atoms, stages), order=(0, 1, 2, 3))


def partition(tma, smem, box, part, parts):
    """Shared [values, stage] and global [values, tile...] sides of copies of boxes, or of one of `parts` of each."""
    gmem = cute.flat_divide(tma.tma_tensor, box)
    rank = len(box)
    return cpasync.tma_partition(
        tma.atom, part, cute.make_layout(parts), cute.group_modes(smem, 0, rank), cute.group_modes(gmem, 0, rank)
    )


def send(tma, source, target, barrier, ctas, parts):
    """One TMA load, to the CTAs of the mask if it is shared."""
    mask = ctas if parts > 1 else None
    cute.copy(tma.atom, source, target, tma_bar_ptr=barrier, mcast_mask=mask)


@dsl_user_op
def tcgen05_fence(side, *, loc=None, ip=None):
    """Orders tcgen05 work "before" or "after" a synchronisation of threads (PTX ISA, tcgen05.fence)."""
    kinds = {"before": nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, "after": nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC}
    nvvm.tcgen05_fence(kinds[side], loc=loc, ip=ip)


@functools.cache
def compiled(config: Config, out: str, segments: int) -> Any:
    """The compiled host function, for every m, n and k."""
    return cute.compile(
        GemmNvfp4Sm100(config, out, segments), *_fake_arguments(out, segments), options=cross.options(ARCH)
    )


def launch(a: NVFP4Tensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor, config: Config) -> None:
    """out [m, n] = a [m, k] @ b [n, k].T, times a.alpha and b.alpha of the column's segment, on the current stream.

    a, b: scales in blocked_128x4; a has one alpha. out: BF16 or FP32, contiguous. segments: widths of the column runs
    that have an alpha each. Raises ValueError or TypeError for what the kernel cannot run.
    """
    if not isinstance(a, NVFP4Tensor):
        raise TypeError(
            f"a must be an NVFP4Tensor: the block-scaled MMA takes NVFP4 on both sides, got {type(a).__name__}"
        )
    if out.dtype not in OUT_NAMES:
        raise TypeError(f"out must be bfloat16 or float32, got {out.dtype}")
    (m, k), n = a.shape, b.shape[0]
    check_segments(b.alpha, n, segments)
    widths = segments or (n,)
    problem = GemmProblem(m=m, n=n, k=k, act="nvfp4", out=OUT_NAMES[out.dtype], segments=len(widths))
    if reason := supports(problem, config):
        raise ValueError(reason)
    if b.shape[1] != k or tuple(out.shape) != (m, n) or not out.is_contiguous():
        raise ValueError(
            f"a [{m}, {k}] and b {list(b.shape)} need a contiguous out [m, n], "
            f"got {list(out.shape)} with strides {list(out.stride())}"
        )
    if a.alpha.numel() != 1:
        raise ValueError(f"a must have one alpha, got {list(a.alpha.shape)}")
    _check_layout(a, "a")
    _check_layout(b, "b")
    if m == 0:
        return
    tensors = (a.data, a.sf, b.data, b.sf, out, a.alpha, b.alpha)
    starts = (0, *itertools.accumulate(widths[:-1]))
    clusters = max(1, _sm_count(out.device) // (config.cluster_m * config.cluster_n))
    sizes = (m, n, k, clusters)
    function = compiled(config, problem.out, problem.segments)
    if out.is_cuda:
        with torch.cuda.device(out.device):
            stream = torch.cuda.current_stream().cuda_stream
            function(*_arguments(problem.out, [t.data_ptr() for t in tensors], starts, sizes, stream))
    else:
        function(*_arguments(problem.out, [t.data_ptr() for t in tensors], starts, sizes, 0))


def warm(problem: GemmProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    if reason := supports(problem, config):
        raise ValueError(reason)
    if not torch.cuda.is_available():
        compiled(config, problem.out, problem.segments)
        return
    widths = (8,) * problem.segments
    a = NVFP4Tensor.empty((1, MMA_K), torch.ones((), device="cuda"), SF_LAYOUT)
    b = NVFP4Tensor.empty((sum(widths), MMA_K), torch.ones(problem.segments, device="cuda"), SF_LAYOUT)
    dtype = next(t for t, name in OUT_NAMES.items() if name == problem.out)
    launch(a, b, widths, torch.empty(1, sum(widths), dtype=dtype, device="cuda"), config)


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
    """What `__call__` takes. addresses: a, sfa, b, sfb, d, alpha_a, alpha_b; sizes: m, n, k, most clusters."""
    dtypes = (E2M1, E4M3, E2M1, E4M3, OUT[out], F32, F32)
    aligned = (16, 16, 16, 16, 16, 4, 4)
    pointers = (
        make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=align)
        for dtype, address, align in zip(dtypes, addresses, aligned, strict=True)
    )
    return (*pointers, tuple(map(cutlass.Int32, starts)), *map(cutlass.Int32, sizes), cuda.CUstream(stream))


def _fake_arguments(out: str, segments: int) -> tuple[Any, ...]:
    """Arguments to compile with: types, alignments and the number of segments count, the values do not."""
    return _arguments(out, (0,) * 7, (0,) * segments, (0,) * 4, 0)


def _check_layout(t: NVFP4Tensor, name: str) -> None:
    if t.sf_layout != SF_LAYOUT:
        raise ValueError(f"{name} must have its scales in {SF_LAYOUT}, got {t.sf_layout}")
    if not (t.data.is_contiguous() and t.sf.is_contiguous() and t.alpha.is_contiguous()):
        raise ValueError(f"data, sf and alpha of {name} must be contiguous")
    if t.data.data_ptr() % 16 or t.sf.data_ptr() % 16:
        raise ValueError(f"data and sf of {name} must start at multiples of 16 bytes, as TMA reads them")


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else SM_COUNT


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
