"""What becomes of the finished accumulators of `gemm_nvfp4_sm100`: times alpha, then rounded or quantised, to d.

Four warps; thread t reads lane t of tensor memory, all columns of a row of the MMA. Two ways:

    Direct   that row is a row of d: registers -> shared memory -> TMA store, while the next tile is computed
    Summed   FP32 sums to shared memory in the order of d, which turns them round (`swap_ab`) and shows them to the CTAs
             that hold the other parts of K (`split_k`). Then the threads of all these CTAs take runs of 16 columns each
             and add the parts, always the first to the second and so on: no atomics, equal runs give equal bits

NVFP4 is made of FP32 sums times alpha, without a rounding in between: the bytes are those that `quantize_nvfp4` makes
of the FP32 output of the same config.
"""

import cutlass
from cutlass import Float32, Int32, Uint8, Uint32, cute, pipeline
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cute.nvgpu import cpasync, tcgen05
from cutlass.cutlass_dsl import T, dsl_user_op

from fp4suite.formats import BLOCK

from .block_scaled import MMA_K, SF_ROWS, partition, scale_bytes, scale_words, swizzled_rows, tcgen05_fence
from .quantize import inverse_scale, quantize_block

THREADS = 128
LANES = 128  # rows of a CTA's accumulator
STORE_STAGES, STORE_ROW_BYTES = 2, 128  # staging of Direct: [128 rows, 128 bytes], one swizzled row (NVFP4: 32 bytes)
QUANTIZED_COLUMNS = 64  # of d that a thread of Direct quantises at a time: the four scales of a word
RUN = BLOCK  # columns of d that a thread of Summed finishes at a time
CHUNK = 32  # columns of an accumulator in a thread's registers on their way to its sums
PITCH = 4  # FP32 numbers between two rows of sums: eight rows at a column lie in all banks


class Epilogue:
    """What both ways share. `gemm` knows config, tiles and tensor memory."""

    def __init__(self, gemm):
        self.gemm, self.out, self.segments = gemm, gemm.out, gemm.segments
        self.quantized = gemm.out is cutlass.Float4E2M1FN

    def scales(self, mAlphaA, mAlphaB, mAlphaD):
        """The factor of each segment and, for NVFP4 output, the global scale of d and its inverse."""
        alphas = [mAlphaA[0] * mAlphaB[s] for s in range(self.segments)]
        if not self.quantized:
            return alphas, None, None
        alpha = mAlphaD[0]
        return alphas, alpha, inverse_scale(alpha)

    @cute.jit
    def scale(self, sums, alphas, starts, first_column):
        """sums, neighbours along n from first_column on, times alpha of each column's segment."""
        if cutlass.const_expr(self.segments == 1):
            sums.store(sums.load() * alphas[0])
        else:
            for e in cutlass.range_constexpr(cute.size(sums)):
                alpha = alphas[0]
                for s in cutlass.range_constexpr(1, self.segments):
                    alpha = alphas[s] if first_column + e >= starts[s] else alpha
                sums[e] = sums[e] * alpha

    def store_atom(self, mD):
        """TMA store of d, if this way has one."""

    def accumulator_copy(self, tCtAcc, width):
        """Copy to registers, a lane to a thread, and what it copies: [128, width, 1, parts, slot]."""
        tAcc = cute.flat_divide(tCtAcc[(None, None), 0, 0, None], (LANES, width))
        op = tcgen05.Ld32x32bOp(tcgen05.Repetition(width), tcgen05.Pack.NONE)
        return tcgen05.make_tmem_copy(cute.make_copy_atom(op, Float32), tAcc[None, None, 0, 0, 0]), tAcc

    def accumulator(self, tmem, width):
        """This thread's row of the accumulators, [load, 1, 1, 1, parts, slot], the copy, and registers for a part."""
        thread, _, _ = cute.arch.thread_idx()
        copy, tAcc = self.accumulator_copy(
            self.gemm.accumulator(tmem.retrieve_ptr(Float32), self.gemm.tiled_mma()), width
        )
        thr = copy.get_slice(thread)
        shape = thr.partition_D(cute.make_identity_tensor((LANES, width))).shape
        return thr.partition_S(tAcc), copy, cute.make_rmem_tensor(shape, Float32)


class Direct(Epilogue):
    """Rows of the MMA are rows of d."""

    def __init__(self, gemm):
        super().__init__(gemm)
        self.width = (
            QUANTIZED_COLUMNS if self.quantized else STORE_ROW_BYTES * 8 // gemm.out.width
        )  # columns of a store
        self.stores = gemm.tile_n // self.width
        # stores after which the next tile may be written over what they have read
        self.early = -(-gemm.budget.overlap // self.width) if gemm.budget.overlap else self.stores
        self.box = (LANES, self.width // 2) if self.quantized else (LANES, self.width)

    def store_atom(self, mD):
        return cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mD, self.staged_layout(), self.box)

    def staged_layout(self):
        """Shared [rows, columns, stage] (NVFP4: bytes in place of columns), and its swizzle."""
        if self.quantized:
            return cute.make_ordered_layout((*self.box, STORE_STAGES), order=(1, 0, 2))
        return swizzled_rows(self.out, LANES, STORE_STAGES)

    def staging(self, storage):
        layout = self.staged_layout()
        if self.quantized:
            return storage.d.get_tensor(layout)
        return storage.d.get_tensor(layout.outer, swizzle=layout.inner, dtype=self.out)

    @cute.jit
    def run(self, d_tma, mD, sfd, scales, starts, tiles, storage, accumulators, tmem):
        """Accumulator -> FP32 registers, a row a thread -> times alpha, rounded -> shared memory -> global memory."""
        thread, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        tTRt, copy_t2r, rAcc = self.accumulator(tmem, self.width)
        sums = cute.make_tensor(rAcc.iterator, cute.make_layout(self.width))
        sD = self.staging(storage)
        tDs, tDg = partition(d_tma, sD, self.box, 0, 1)
        warps = pipeline.NamedBarrier(barrier_id=1, num_threads=THREADS)
        stores = pipeline.PipelineTmaStore.create(
            num_stages=STORE_STAGES, producer_group=pipeline.CooperativeGroup(pipeline.Agent.Thread, THREADS)
        )
        staged = pipeline.make_pipeline_state(pipeline.PipelineUserType.Producer, STORE_STAGES)
        acc_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.gemm.budget.acc_stages)
        tile, step = self.gemm.first_tile()
        while tile < tiles[0] * tiles[1]:
            i, j = self.gemm.place(tile, tiles)
            accumulators.consumer_wait(acc_state)
            tcgen05_fence("after")
            slot = self.gemm.slot(acc_state, filled=True)
            for s in cutlass.range(self.stores, unroll=1):
                part = s
                if cutlass.const_expr(self.gemm.budget.overlap > 0):
                    part = self.stores - 1 - s if slot == 0 else s  # what both accumulators hold goes first
                cute.copy(copy_t2r, tTRt[None, None, None, 0, part, slot], rAcc)
                cute.arch.fence_view_async_tmem_load()
                if s == self.early - 1:
                    tcgen05_fence("before")
                    accumulators.consumer_release(acc_state)
                column = j * self.gemm.tile_n + part * self.width
                self.scale(sums, scales[0], starts, column)

                if warp == 0:
                    stores.producer_acquire()  # the store before the last has left its buffer
                warps.arrive_and_wait()
                if cutlass.const_expr(self.quantized):
                    self.quantize(sums, scales, sD[thread, None, staged.index], mD, sfd, i, column // self.width)
                else:
                    self.stage(rAcc, copy_t2r, sD[None, None, staged.index])
                cute.arch.fence_proxy("async.shared", space="cta")
                warps.arrive_and_wait()
                if warp == 0:
                    # unlike a load, a store is not issued by one lane of its own accord; groups are that lane's
                    with cute.arch.elect_one():
                        cute.copy(d_tma.atom, tDs[None, staged.index], tDg[None, i, j * self.stores + part])
                        stores.producer_commit()
                staged.advance()
            acc_state.advance()
            tile += step
        if warp == 0:
            stores.producer_tail()

    @cute.jit
    def stage(self, rAcc, copy_t2r, sD):
        """Rounded to the output's type, in pieces of 16 bytes."""
        thread, _, _ = cute.arch.thread_idx()
        rD = cute.make_rmem_tensor(rAcc.shape, self.out)
        rD.store(rAcc.load().to(self.out))
        atom = cute.make_copy_atom(cute.nvgpu.CopyUniversalOp(), self.out, num_bits_per_copy=128)
        copy = cute.make_tiled_copy_D(atom, copy_t2r)
        cute.copy(copy, copy.retile(rD), copy.get_slice(thread).partition_D(sD))

    @cute.jit
    def quantize(self, sums, scales, sRow, mD, sfd, i, group):
        """64 columns of a row: codes to shared memory, the word of their four scales to its place in d's."""
        thread, _, _ = cute.arch.thread_idx()
        _, alpha, inv = scales
        codes = cute.make_rmem_tensor(QUANTIZED_COLUMNS // 8, Uint32)
        word = Uint32(0)
        for b in cutlass.range_constexpr(QUANTIZED_COLUMNS // BLOCK):
            low, high, byte = quantize_block([sums[b * BLOCK + e] for e in range(BLOCK)], alpha, inv)
            codes[2 * b], codes[2 * b + 1] = low, high
            word = word | byte << (8 * b)
        cute.autovec_copy(cute.recast_tensor(codes, Uint8), sRow)
        m, n = mD.shape[0], 2 * mD.shape[1]
        if i * LANES < m and group < n // MMA_K:
            words = cute.make_tensor(cute.recast_ptr(sfd, dtype=Uint32), scale_words(m, n))
            # rows past m are padding, which is zero
            words[thread % 32 * 4 + thread // 32, group, i] = word if i * LANES + thread < m else Uint32(0)


class Summed(Epilogue):
    """Rows of the MMA are rows of d or, with `swap_ab`, columns; CTAs of a cluster may hold parts of the sum."""

    def __init__(self, gemm):
        super().__init__(gemm)
        self.swap, self.parts = gemm.swap_ab, gemm.split_k
        self.shape = sums_shape(gemm.tile_n, gemm.swap_ab)  # of a tile, as d has it
        self.pitch = self.shape[1] + PITCH
        self.width = min(gemm.tile_n, CHUNK)
        self.runs = self.shape[0] * self.shape[1] // RUN

    @cute.jit
    def run(self, d_tma, mD, sfd, scales, starts, tiles, storage, accumulators, tmem):
        """Accumulator -> FP32 registers, a row a thread -> shared memory -> runs of columns, done -> global memory."""
        tTRt, copy_t2r, rAcc = self.accumulator(tmem, self.width)
        chunk = cute.make_tensor(rAcc.iterator, cute.make_layout(self.width))
        sums = cute.recast_ptr(storage.d.data_ptr(), dtype=Float32)
        warps = pipeline.NamedBarrier(barrier_id=1, num_threads=THREADS)
        ready, free = storage.exchange.data_ptr(), storage.exchange.data_ptr() + 1
        phase = Int32(0)
        acc_state = pipeline.make_pipeline_state(pipeline.PipelineUserType.Consumer, self.gemm.budget.acc_stages)
        tile, step = self.gemm.first_tile()
        while tile < tiles[0] * tiles[1]:
            i, j = self.gemm.place(tile, tiles)
            accumulators.consumer_wait(acc_state)
            tcgen05_fence("after")
            if cutlass.const_expr(self.parts > 1):
                self.hear(free, phase ^ 1)  # the other parts have read the sums of the tile before
            for c in cutlass.range_constexpr(self.gemm.tile_n // self.width):
                cute.copy(copy_t2r, tTRt[None, None, None, 0, c, acc_state.index], rAcc)
                cute.arch.fence_view_async_tmem_load()
                self.put(chunk, sums, c * self.width)
            tcgen05_fence("before")
            accumulators.consumer_release(acc_state)
            warps.arrive_and_wait()
            if cutlass.const_expr(self.parts > 1):
                self.tell(ready)
                self.hear(ready, phase)

            row, column = (j, i) if self.swap else (i, j)
            self.finish(sums, mD, sfd, scales, starts, row * self.shape[0], column * self.shape[1])
            warps.arrive_and_wait()
            if cutlass.const_expr(self.parts > 1):
                self.tell(free)
                phase ^= 1
            acc_state.advance()
            tile += step
        if cutlass.const_expr(self.parts > 1):
            self.hear(free, phase ^ 1)  # others may read this CTA's memory until then

    @cute.jit
    def tell(self, barrier):
        """An arrival of this CTA at the barrier of every CTA that has a part of the same tile."""
        thread, _, _ = cute.arch.thread_idx()
        if thread < self.parts:
            cute.arch.mbarrier_arrive(barrier, self.gemm.rank(thread), scope=nvvm.MemScopeKind.CLUSTER)

    @cute.jit
    def hear(self, barrier, phase):
        """Waits until all of them have arrived, and acquires what they released: the wait itself does so in a CTA."""
        cute.arch.mbarrier_wait(barrier, phase)
        cute.arch.fence_acq_rel_cluster()

    @cute.jit
    def put(self, chunk, sums, column):
        """This thread's row of the accumulator, `width` columns of it, to where d has them."""
        thread, _, _ = cute.arch.thread_idx()
        if cutlass.const_expr(self.swap):
            rows = cute.make_layout(self.width, stride=self.pitch)
            cute.autovec_copy(chunk, cute.make_tensor(sums + column * self.pitch + place(thread), rows))
        else:
            for c in cutlass.range_constexpr(0, self.width, 4):
                offset = cute.assume(thread * self.pitch + place(column + c), divby=4)
                four = cute.make_layout(4)
                cute.autovec_copy(cute.make_tensor(chunk.iterator + c, four), cute.make_tensor(sums + offset, four))

    @cute.jit
    def finish(self, sums, mD, sfd, scales, starts, first_row, first_column):
        """This CTA's share of a tile's runs of columns: added, scaled, rounded or quantised, stored."""
        thread, _, _ = cute.arch.thread_idx()
        part, (rows, columns) = self.gemm.part(), self.shape
        m, n = mD.shape
        if cutlass.const_expr(self.quantized):
            n = 2 * n
        peers = (
            [sums.toint()]
            if self.parts == 1
            else [cute.arch.map_dsmem_ptr(sums, self.gemm.rank(s)).toint() for s in range(self.parts)]
        )
        run = part * THREADS + thread
        while run < self.runs:
            in_row, in_column = run // (columns // RUN), run % (columns // RUN) * RUN
            row, column = first_row + in_row, first_column + in_column
            if row < m and column < n:
                rSums = cute.make_rmem_tensor(RUN, Float32)
                self.add(peers, in_row * self.pitch, in_column, rSums)
                self.scale(rSums, scales[0], starts, column)
                if cutlass.const_expr(self.quantized):
                    self.quantize(rSums, scales, mD, sfd, row, column)
                else:
                    self.round(rSums, mD, row, column)
            # padding of the scales, as far as a tile reaches that has rows of d
            if cutlass.const_expr(self.quantized) and m <= row < cute.round_up(m, rows) and column < n:
                cute.make_tensor(sfd, scale_bytes(m, n))[row, column // BLOCK] = Uint8(0)
            run += self.parts * THREADS
        if cutlass.const_expr(self.quantized and rows < SF_ROWS):
            self.pad(m, n, sfd, first_row, first_column, part)

    @cute.jit
    def add(self, peers, row, column, rSums):
        """The sums of every part, in order."""
        for q in cutlass.range_constexpr(RUN // 4):
            offset = 4 * (row + place(column + 4 * q))
            total = load_sums(peers[0], offset, self.parts > 1)
            for p in cutlass.range_constexpr(1, self.parts):
                more = load_sums(peers[p], offset, True)
                total = [x + y for x, y in zip(total, more, strict=True)]
            for e in cutlass.range_constexpr(4):
                rSums[4 * q + e] = total[e]

    @cute.jit
    def round(self, rSums, mD, row, column):
        """BF16 or FP32, in runs of eight, as n is a multiple of eight."""
        rD = cute.make_rmem_tensor(RUN, self.out)
        rD.store(rSums.load().to(self.out))
        for half in cutlass.range_constexpr(2):
            if column + 8 * half < mD.shape[1]:
                to = cute.local_tile(mD, (1, 8), (row, column // 8 + half))
                cute.autovec_copy(cute.make_tensor(rD.iterator + 8 * half, cute.make_layout(8)), to[0, None])

    @cute.jit
    def quantize(self, rSums, scales, mD, sfd, row, column):
        """A block: its codes and its scale."""
        _, alpha, inv = scales
        codes = cute.make_rmem_tensor(2, Uint32)
        codes[0], codes[1], byte = quantize_block([rSums[e] for e in range(BLOCK)], alpha, inv)
        to = cute.local_tile(mD, (1, BLOCK // 2), (row, column // BLOCK))
        cute.autovec_copy(cute.recast_tensor(codes, Uint8), to[0, None])
        m, n = mD.shape[0], 2 * mD.shape[1]
        cute.make_tensor(sfd, scale_bytes(m, n))[row, column // BLOCK] = Uint8(byte)

    @cute.jit
    def pad(self, m, n, sfd, first_row, first_column, part):
        """Zero scales for the rows behind the last tile, up to a whole atom."""
        thread, _, _ = cute.arch.thread_idx()
        rows, columns = self.shape
        row = first_row // SF_ROWS * SF_ROWS + thread
        last = first_row < m and first_row + rows >= m
        if last and part == 0 and row >= first_row + rows:
            words = cute.make_tensor(cute.recast_ptr(sfd, dtype=Uint32), scale_words(m, n))
            for g in cutlass.range_constexpr(columns // MMA_K):
                group = first_column // MMA_K + g
                if group < n // MMA_K:
                    words[thread % 32 * 4 + thread // 32, group, first_row // SF_ROWS] = Uint32(0)


def sums_shape(tile_n, swap_ab):
    """Rows and columns of d in a tile of Summed."""
    return (tile_n, LANES) if swap_ab else (LANES, tile_n)


def staging_bytes(tile_n, swap_ab, split_k):
    """Shared memory that the epilogue keeps, whatever the output."""
    if not swap_ab and split_k == 1:
        return STORE_STAGES * LANES * STORE_ROW_BYTES
    rows, columns = sums_shape(tile_n, swap_ab)
    return rows * (columns + PITCH) * 4


def place(column):
    """Where a row of sums has a column: the fours of two runs change places, so that eight runs lie in all banks."""
    return column ^ (column >> 5 & 3) << 2


@dsl_user_op
def load_sums(address, offset, peer, *, loc=None, ip=None):
    """Four FP32 numbers of shared memory, of this CTA or of another one of the cluster."""
    space = "shared::cluster" if peer else "shared::cta"
    asm = f"ld.{space}.v4.f32 {{$0, $1, $2, $3}}, [$4];"
    where = Int32(address) + Int32(offset)
    kind = llvm.StructType.get_literal([T.f32()] * 4)
    args = [where.ir_value(loc=loc, ip=ip)]
    got = llvm.inline_asm(kind, args, asm, "=f,=f,=f,=f,r,~{memory}", has_side_effects=True, loc=loc, ip=ip)
    return [Float32(llvm.extractvalue(T.f32(), got, [i], loc=loc, ip=ip)) for i in range(4)]
