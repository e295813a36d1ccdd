"""Scores of the indexer on Hopper's FP8 tensor cores: q and keys in E4M3, heads added up in FP32.

    score(t, i) = scale · Σ_h w(t, h) · relu(q(t, h) · k(i))        for i < (position + 1) // ratio, else −inf

Many queries of one sequence: bound by adding up heads, beside which the tensor cores work. Few: memory bound, keys are
read once.

A CTA takes items, each a tile of entries and some consecutive queries, and in an item runs of queries of one sequence.
Entries are the rows of the MMA: 64 of a warpgroup and strip, in registers (operand A) for a whole run. The heads of
`queries` queries are its columns, from shared memory.

    load       one warp: finds the runs, fetches their keys by TMA, page by page, and the queries' q and weights
    multiply   warpgroups: while the products of one or of one strip are made, those of another become scores
    hide       three warps: −inf for what a query does not see

Items are those that some query of theirs sees: of how many tiles that is, all warps find out from the positions first.
All CTAs have as many of them, and of those that are left as many queries.

Heads pass through TMA in an order in which a thread's 16 of 64 columns are two runs of neighbouring heads: their
weights are four loads of 16 bytes, and those of the lanes of a quad lie in different banks.
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Boolean, Float8E4M3FN, Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from cutlass.utils import HardwareInfo, hopper_helpers
from torch import Tensor

from fp4suite.arch import SM_COUNT
from fp4suite.built import MAX_SHARED_BYTES, Built
from fp4suite.formats import IndexCache, index_layout
from fp4suite.problem import IndexLogitsProblem

from . import build as cross
from .instructions import load4, load_matrices, load_number, load_words, loads_have_come, store_words

ARCH = "sm_90a"
HEADS, HEAD_DIM = 64, 128
TILE = 64  # entries of one MMA, and of one TMA copy of keys
WARPGROUP = 128
KEY_BYTES = HEAD_DIM + 4
QUERY_BYTES = HEADS * (HEAD_DIM + 4)
# beside a tile of keys: the run's first query and its end, the entry, and how many entries the run sees; or, where
# queries are single, whether it is another one than before
NOTE_WORDS = 4
BARRIER_BYTES = 1024
MOST_BLOCKS = 512  # of queries, whose tiles are counted in shared memory
LOADER_REGISTERS = {2: 40, 3: 32, 4: 32}  # by warpgroups that multiply
THREAD_REGISTERS = {2: 232, 3: 160, 4: 112}
IN_RUNS = 96  # items of a CTA
K_STEPS = HEAD_DIM // 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """groups: warpgroups that multiply, each with `strips` times 64 entries; queries: of one MMA; block_m: queries of
    an item at most, 1 for queries that are alone in their sequence; stages: MMAs whose queries are in flight;
    key_stages: items whose keys are.
    """

    groups: int = 4
    strips: int = 1
    queries: int = 2
    block_m: int = 128
    stages: int = 4
    key_stages: int = 2

    @property
    def tile_n(self) -> int:
        """Entries of an item."""
        return TILE * self.groups * self.strips

    @property
    def threads(self) -> int:
        return WARPGROUP * (self.groups + 1)


SPACE = {
    "groups": (2, 3, 4),
    "strips": (1, 2, 3),
    "queries": (1, 2),
    "block_m": (1, 64, 128, 256),
    "stages": (2, 4),
    "key_stages": (2, 3, 6, 12),
}
INVARIANT = "heads by eights"


def shared_bytes(config: Config) -> int:
    """Shared memory of one CTA, as the kernel allocates it."""
    keys = config.key_stages * (config.tile_n * KEY_BYTES + NOTE_WORDS * 4)
    keys += 0 if config.block_m == 1 else 4 * MOST_BLOCKS
    return -(-(BARRIER_BYTES + keys + config.stages * config.queries * QUERY_BYTES) // 16) * 16


def supports(problem: IndexLogitsProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    p, c = problem, config
    if (p.x, p.format) != ("fp8", "fp8"):
        return f"q in {p.x}, keys in {p.format}: this kernel multiplies fp8"
    if (p.heads, p.head_dim) != (HEADS, HEAD_DIM):
        return f"{p.heads} heads of {p.head_dim}: this kernel takes {HEADS} of {HEAD_DIM}"
    if p.page_size % TILE:
        return f"page_size={p.page_size} is not a multiple of {TILE}"
    if c.block_m == 1 and c.queries > 1:
        return f"{c.queries} queries of an MMA, in items of one"
    held = min(c.strips, 2) * 32 * c.queries + 16 * c.strips
    if held + 8 * c.queries * c.strips + 16 > THREAD_REGISTERS[c.groups]:
        return f"{c.groups} warpgroups with {c.strips} strips of {c.queries} queries: registers do not hold {held}"
    if shared_bytes(c) > MAX_SHARED_BYTES[ARCH]:
        return f"{shared_bytes(c)} bytes of shared memory, {ARCH} has {MAX_SHARED_BYTES[ARCH]}"
    return None


def default(problem: IndexLogitsProblem) -> Config:
    """A deep ring of keys where queries are alone in their sequence."""
    if problem.m <= problem.sequence_count:
        return Config(queries=1, block_m=1, stages=2, key_stages=6)
    return Config()


def arithmetic(problem: IndexLogitsProblem, config: Config) -> str:
    """How heads are added up: the same way whatever the tile."""
    return INVARIANT


def in_arithmetic(problem: IndexLogitsProblem, wanted: str) -> Config:
    """The default: there is one arithmetic."""
    return default(problem)


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def add_relu(total: Float32, x: Float32, weight: Float32, *, loc=None, ip=None) -> Float32:
    """total + relu(x) * weight."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (total, x, weight)]
    asm = "{ .reg .f32 t; max.f32 t, $2, 0f00000000; fma.rn.f32 $0, t, $3, $1; }"
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,f,f,f", loc=loc, ip=ip))


@dsl_user_op
def load_int(address: Int64, *, loc=None, ip=None) -> Int32:
    """One word of global memory that nobody writes meanwhile."""
    args = [address.ir_value(loc=loc, ip=ip)]
    asm = "ld.global.nc.b32 $0, [$1];"
    return Int32(llvm.inline_asm(T.i32(), args, asm, "=r,l", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def put(address: Int64, x: Float32, there: Boolean, *, loc=None, ip=None):
    """One number to global memory, or nothing."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (address, x, Int32(there))]
    asm = "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p st.global.f32 [$0], $1; }"
    llvm.inline_asm(None, args, asm, "l,f,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def store_hidden(address: Int64, *, loc=None, ip=None):
    """Four scores of entries that cannot be seen."""
    args = [address.ir_value(loc=loc, ip=ip)]
    asm = "{ .reg .f32 x; mov.f32 x, 0fFF800000; st.global.v4.f32 [$0], {x, x, x, x}; }"
    llvm.inline_asm(None, args, asm, "l", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def lowest_bit(x: Uint32, *, loc=None, ip=None) -> Int32:
    """Which bit of x is the lowest set."""
    asm = "{ .reg .b32 r; brev.b32 r, $1; bfind.shiftamt.u32 $0, r; }"
    return Int32(llvm.inline_asm(T.i32(), [x.ir_value(loc=loc, ip=ip)], asm, "=r,r", loc=loc, ip=ip))


# --- the kernel -------------------------------------------------------------------------------------------------------


class IndexLogitsSm90:
    """CTAs take items in turn: tiles of entries of a block of queries first."""

    def __init__(self, config: Config, in_runs: bool):
        """in_runs: where items have one query, a CTA has consecutive ones, not every so many."""
        self.config, self.in_runs = config, in_runs
        self.columns = HEADS * config.queries  # of an MMA
        self.key_tiles = config.groups * config.strips

    @cute.jit
    def __call__(
        self,
        q: cute.Pointer,
        weights: cute.Pointer,
        cache: cute.Pointer,
        scales: cute.Pointer,
        table: cute.Pointer,
        positions: cute.Pointer,
        sequence_ids: cute.Pointer,
        out: cute.Pointer,
        m: Int32,
        entries: Int32,
        block_m: Int32,
        pages: Int32,
        page_size: Int32,
        ratio: Int32,
        sequences: Int32,
        q_stride: Int64,
        head_stride: Int64,
        weight_stride: Int64,
        table_stride: Int64,
        scale: Float32,
        max_ctas: Int32,
        stream: cuda.CUstream,
    ):
        """Strides count elements. scales: the cache's bytes as FP32. block_m: queries of an item."""
        c = self.config
        op = cpasync.CopyBulkTensorTileG2SOp()
        page_size = cute.assume(page_size, divby=TILE)
        page_words = cute.assume(Int64(page_size) * (KEY_BYTES // 4), divby=TILE * KEY_BYTES // 4)
        page_bytes = cute.assume(Int64(page_size) * KEY_BYTES, divby=TILE * KEY_BYTES)
        mK = cute.make_tensor(cache, cute.make_layout((HEAD_DIM, page_size, pages), stride=(1, HEAD_DIM, page_bytes)))
        mS = cute.make_tensor(scales, cute.make_layout((page_size * (KEY_BYTES // 4), pages), stride=(1, page_words)))
        # column 8 j + 2 q + i is head 32 i + 8 q + j
        head = cute.assume(head_stride, divby=16)
        token = cute.assume(q_stride, divby=16)
        mQ = cute.make_tensor(
            q,
            cute.make_layout(
                (HEAD_DIM, 2, 4, HEADS // 8, m),
                stride=(1, cute.assume(32 * head, divby=16), cute.assume(8 * head, divby=16), head, token),
            ),
        )
        mW = cute.make_tensor(weights, cute.make_layout((HEADS, m), stride=(1, cute.assume(weight_stride, divby=4))))
        atoms = (
            cpasync.make_tiled_tma_atom(op, mK, self.swizzled((HEAD_DIM, TILE)), (HEAD_DIM, TILE)),
            cpasync.make_tiled_tma_atom(op, mS, cute.make_layout((TILE, 1)), (TILE, 1)),
            cpasync.make_tiled_tma_atom(op, mQ, self.swizzled(self.query_box()), self.query_box()),
            cpasync.make_tiled_tma_atom(op, mW, cute.make_layout((HEADS, c.queries)), (HEADS, c.queries)),
        )
        tiles = cute.ceil_div(entries, c.tile_n)
        items = tiles * cute.ceil_div(m, c.queries)  # at most: items of one MMA
        addresses = (table.toint(), positions.toint(), sequence_ids.toint(), out.toint())
        sizes = (m, entries, block_m, page_size, ratio, table_stride, tiles, sequences)
        self.kernel(atoms, addresses, sizes, scale).launch(
            grid=(cutlass.min(items, max_ctas), 1, 1),
            block=(c.threads, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,  # percent
            use_pdl=True,
        )

    def query_box(self):
        return HEAD_DIM, 2, 4, HEADS // 8, self.config.queries

    def swizzled(self, shape):
        """Rows of 128 bytes, in the 128-byte swizzle."""
        return cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, cute.make_layout(shape))

    @cute.kernel
    def kernel(self, atoms: Any, addresses: Any, sizes: Any, scale: Float32):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tidx // 32)
        smem = SmemAllocator()
        barriers = smem.allocate_tensor(Int64, cute.make_layout(BARRIER_BYTES // 8), byte_alignment=1024)
        full, empty = barriers.iterator, barriers.iterator + c.stages
        key_full, key_empty = empty + c.stages, empty + c.stages + c.key_stages
        keys = smem.allocate_tensor(
            Float8E4M3FN,
            cute.make_layout((HEAD_DIM, TILE, c.key_stages * self.key_tiles)),
            byte_alignment=1024,
            swizzle=cute.make_swizzle(3, 4, 3),
        )
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, Float8E4M3FN)
        layout = cute.tile_to_shape(atom, (self.columns, HEAD_DIM, c.stages), order=(0, 1, 2))
        queries = smem.allocate_tensor(Float8E4M3FN, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        key_scales = smem.allocate_tensor(
            Float32, cute.make_layout((TILE, 1, c.key_stages * self.key_tiles)), byte_alignment=128
        )
        weights = smem.allocate_tensor(Float32, cute.make_layout((HEADS, c.queries, c.stages)), byte_alignment=128)
        notes = smem.allocate_tensor(Int32, cute.make_layout(c.key_stages * NOTE_WORDS), byte_alignment=16)
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(c.stages):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, 4 * c.groups)
                for i in cutlass.range_constexpr(c.key_stages):
                    cute.arch.mbarrier_init(key_full + i, 1)
                    cute.arch.mbarrier_init(key_empty + i, 4 * c.groups)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        cute.arch.griddepcontrol_launch_dependents()
        before = notes
        if cutlass.const_expr(c.block_m > 1):
            before = smem.allocate_tensor(Int32, cute.make_layout(MOST_BLOCKS), byte_alignment=16)
            if sizes[0] > sizes[2]:  # more than one block of queries
                cute.arch.griddepcontrol_wait()
                self.count_tiles(before, addresses, sizes, warp)
                cute.arch.sync_threads()
        shared = (keys, key_scales, queries, weights, notes)
        bars = (full, empty, key_full, key_empty)
        if warp >= 4 * c.groups:
            cute.arch.setmaxregister_decrease(LOADER_REGISTERS[c.groups])
            cute.arch.griddepcontrol_wait()
            if warp > 4 * c.groups:
                self.hide(addresses, sizes, warp - (4 * c.groups + 1))
            elif cutlass.const_expr(c.block_m == 1):
                self.load_singles(atoms, shared, bars, addresses, sizes)
            else:
                self.load(atoms, shared, bars, addresses, sizes, before)
        else:
            cute.arch.setmaxregister_increase(THREAD_REGISTERS[c.groups])
            self.multiply(shared, bars, addresses, sizes, scale, tidx)

    @cute.jit
    def count_tiles(self, tiles, addresses, sizes, warp):
        """How many tiles of entries some query of each block sees."""
        m, _, block_m, *_ = sizes
        lane = cute.arch.lane_idx()
        for block in cutlass.range(warp, cute.ceil_div(m, block_m), self.config.threads // 32, unroll=1):
            count = self.tiles_seen(block, addresses, sizes, lane)
            if lane == 0:
                tiles[block] = count

    @cute.jit
    def tiles_seen(self, block, addresses, sizes, lane):
        (_, positions, ids, _), (m, entries, block_m, _, ratio, _, _, _) = addresses, sizes
        end, highest = cutlass.min((block + 1) * block_m, m), Int32(-1)
        for token in cutlass.range(block * block_m + lane, end, 32, unroll=4):
            sequence, position = load_int(ids + Int64(token) * 4), load_int(positions + Int64(token) * 4)
            if sequence >= 0:
                highest = cutlass.max(highest, position)
        seen = cutlass.min((self.over_lanes(highest) + 1) // ratio, entries)
        return cute.ceil_div(seen, self.config.tile_n)

    def over_lanes(self, x):
        """The largest of a warp."""
        for by in range(5):
            x = cutlass.max(x, cute.arch.shuffle_sync_bfly(x, 1 << by))
        return x

    @cute.jit
    def hide(self, addresses, sizes, warp):
        """-inf for the entries of tiles that a query does not see, by one of three warps."""
        (_, positions, ids, out), (m, entries, _, _, ratio, _, _, _) = addresses, sizes
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        lane = cute.arch.lane_idx()
        for token in cutlass.range(cta + ctas * warp, m, 3 * ctas, unroll=1):
            sequence, position = load_int(ids + Int64(token) * 4), load_int(positions + Int64(token) * 4)
            seen = Int32(0)
            if sequence >= 0:
                seen = cute.ceil_div(cutlass.max(position + 1, 0) // ratio, TILE) * TILE
            for at in cutlass.range(seen + 4 * lane, entries, 128, unroll=1):
                store_hidden(out + (Int64(token) * Int64(entries) + Int64(at)) * 4)

    # --- the loading warp ---------------------------------------------------------------------------------------------

    @cute.jit
    def load(self, atoms, shared, bars, addresses, sizes, before):
        """Find this CTA's runs; send for the keys of each, then for its queries."""
        c, (_, _, ids, _) = self.config, addresses
        full, empty, key_full, key_empty = bars
        m, entries, block_m, page_size, ratio, _, _, _ = sizes
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        lane = cute.arch.lane_idx()
        blocks, mmas = cute.ceil_div(m, block_m), block_m // c.queries
        items = Int32(0)
        if blocks > 1:
            items = self.add_up(before, blocks, lane)
        else:
            items = self.tiles_seen(Int32(0), addresses, sizes, lane)
            before[0] = 0
        rounds = items // ctas
        left = (items - rounds * ctas) * mmas  # MMAs of items that are shared out
        mma, last_mma = cta * left // ctas, (cta + 1) * left // ctas
        step, run, turn = Int32(0), Int32(0), Int32(0)
        while turn < rounds or mma < last_mma:
            item, skipped, count = cta + turn * ctas, Int32(0), mmas
            if turn >= rounds:
                item, skipped = rounds * ctas + mma // mmas, mma % mmas
                count = cutlass.min(last_mma - mma, mmas - skipped)
                mma += count
            turn += 1
            block = self.block_of(item, before, blocks)
            entry = (item - before[block]) * c.tile_n
            first = block * block_m + skipped * c.queries
            end = cutlass.min(cutlass.min(first + count * c.queries, (block + 1) * block_m), m)
            while first < end:
                sequence = load_int(ids + Int64(first) * 4)
                stop, position = self.find_end(addresses, first, end, sequence)
                last = (position + 1) // ratio
                if sequence >= 0 and last > entry:
                    tile = entry + lane * TILE
                    page, place = Int32(-1), tile % page_size // TILE
                    if lane < self.key_tiles and tile < cutlass.min(last, entries):
                        page = self.page_of(sequence, tile, addresses, sizes)
                    slot = self.free(key_empty, run, c.key_stages)
                    self.load_keys(
                        atoms, shared, key_full + slot, slot, [first, stop, entry, last], page, place, 0, sizes
                    )
                    run += 1
                    for token in cutlass.range(first, stop, c.queries, unroll=1):
                        at = self.free(empty, step, c.stages)
                        self.load_queries(atoms, shared, full + at, at, token)
                        step += 1
                first = stop
        self.say_done(shared, bars, run)

    @cute.jit
    def add_up(self, tiles, blocks, lane):
        """In place of the tiles of each block those of all blocks before; the tiles of all."""
        total = Int32(0)
        for start in cutlass.range(0, blocks, 32, unroll=1):
            block = start + lane
            own = tiles[block] if block < blocks else Int32(0)
            upto = own
            for step in (1, 2, 4, 8, 16):
                other = cute.arch.shuffle_sync_up(upto, offset=step, mask_and_clamp=0)
                if lane >= step:
                    upto += other
            if block < blocks:
                tiles[block] = total + upto - own
            total += cute.arch.shuffle_sync(upto, 31)
        cute.arch.sync_warp()
        return total

    @cute.jit
    def block_of(self, item, before, blocks):
        """The block of queries that an item is of."""
        block, end = Int32(0), blocks
        while end - block > 1:
            middle = (block + end) // 2
            if before[middle] <= item:
                block = middle
            else:
                end = middle
        return block

    @cute.jit
    def load_singles(self, atoms, shared, bars, addresses, sizes):
        """The same where an item has one query: pages of several items are looked up at once, each by a lane, and a
        query is sent for once for the items that follow each other."""
        c = self.config
        full, empty, key_full, key_empty = bars
        m, entries, _, page_size, ratio, _, tiles, _ = sizes
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        lane = cute.arch.lane_idx()
        batch = 32 // self.key_tiles
        items, by = m * tiles, ctas  # from one item of this CTA to the next
        if cutlass.const_expr(self.in_runs):
            each, by = cute.ceil_div(items, ctas), Int32(1)
            cta, items = cta * each, cutlass.min((cta + 1) * each, items)
        step, run, held = Int32(0), Int32(0), Int32(-1)
        ahead = self.look_up(cta, by, items, addresses, sizes) if self.in_runs else (Int32(0),) * 6
        for start in cutlass.range(cta, items, by * batch, unroll=1):
            found = ahead if self.in_runs else self.look_up(start, by, items, addresses, sizes)
            first, entry, likely, page, sequence, position = found
            own = entry + lane % self.key_tiles * TILE
            last = (position + 1) // ratio
            seen = Int32(sequence >= 0) * Int32(last > entry)
            there = seen * Int32(own < cutlass.min(last, entries))
            if there == 1 and sequence != likely:
                page = self.page_of(sequence, own, addresses, sizes)
            if there == 0:
                page = Int32(-1)
            place = own % page_size // TILE
            if cutlass.const_expr(self.in_runs):  # the next ones are on their way while these are sent for
                ahead = self.look_up(start + by * batch, by, items, addresses, sizes)
            for i in cutlass.range(cutlass.min(batch, (items - start + by - 1) // by), unroll=1):
                of = i * self.key_tiles
                query, at, show = (cute.arch.shuffle_sync(x, of) for x in (first, entry, seen))
                if show == 1:
                    slot = self.free(key_empty, run, c.key_stages)
                    note = [query, query + 1, at, Int32(held != query)]
                    self.load_keys(atoms, shared, key_full + slot, slot, note, page, place, of, sizes)
                    run += 1
                    if held != query:
                        held = query
                        stage = self.free(empty, step, c.stages)
                        self.load_queries(atoms, shared, full + stage, stage, query)
                        step += 1
        self.say_done(shared, bars, run)

    @cute.jit
    def look_up(self, start, by, items, addresses, sizes):
        """Of a lane's item and tile of keys: query, entry, the sequence that it is likely to be of and its page there,
        its sequence and its position."""
        (_, positions, ids, _), (_, entries, _, _, _, _, tiles, sequences) = addresses, sizes
        lane = cute.arch.lane_idx()
        item = cutlass.min(start + lane // self.key_tiles * by, items - 1)
        query, entry = item // tiles, item % tiles * self.config.tile_n
        likely = cutlass.min(query, sequences - 1)  # mostly each query has the sequence of its number
        own = cutlass.min(entry + lane % self.key_tiles * TILE, entries - 1)
        page = self.page_of(likely, own, addresses, sizes)
        return query, entry, likely, page, load_int(ids + Int64(query) * 4), load_int(positions + Int64(query) * 4)

    @cute.jit
    def free(self, empty, index, stages: cutlass.Constexpr):
        """The stage of what comes as number `index`, once nobody reads it any more."""
        stage = index % stages
        if index >= stages:
            cute.arch.mbarrier_wait(empty + stage, (index // stages - 1) % 2)
        return stage

    @cute.jit
    def say_done(self, shared, bars, run):
        """A note that nothing follows."""
        _, _, key_full, key_empty = bars
        slot = self.free(key_empty, run, self.config.key_stages)
        with cute.arch.elect_one():
            at = Int32(shared[4].iterator.toint()) + slot * (NOTE_WORDS * 4)
            store_words(at, [Int32(-1), Int32(0), Int32(0), Int32(0)])
            cute.arch.mbarrier_arrive(key_full + slot)

    def page_of(self, sequence, entry, addresses, sizes):
        """Which page holds an entry of a sequence."""
        _, _, _, page_size, _, table_stride, _, _ = sizes
        return load_int(addresses[0] + (Int64(sequence) * table_stride + entry // page_size) * 4)

    @cute.jit
    def find_end(self, addresses, first, end, sequence):
        """Where the run of `sequence` that begins at `first` ends, and the highest position in it."""
        _, positions, ids, _ = addresses
        lane = cute.arch.lane_idx()
        stop, at, highest = end, first, Int32(-1)
        while at < stop:
            token = cutlass.min(at + lane, end - 1)
            other = load_int(ids + Int64(token) * 4) != sequence
            position = load_int(positions + Int64(token) * 4)
            others = Uint32(cute.arch.vote_ballot_sync(other))
            if others != Uint32(0):
                stop = at + lowest_bit(others)
            if token < stop:
                highest = cutlass.max(highest, position)
            at += 32
        return stop, self.over_lanes(highest)

    @cute.jit
    def load_keys(self, atoms, shared, bar, slot, note, page, place, of, sizes):
        """The keys of an item and their scales, zeros where there is no page. Lanes from `of` on know where."""
        c, (key_atom, scale_atom, _, _) = self.config, atoms
        keys, key_scales, _, _, notes = shared
        page_size = sizes[3]
        gK = cute.flat_divide(key_atom.tma_tensor, (HEAD_DIM, TILE))
        gS = cute.flat_divide(scale_atom.tma_tensor, (TILE, 1))
        one = cute.make_layout(1)
        tKs, tKg = cpasync.tma_partition(
            key_atom.atom, 0, one, cute.group_modes(keys, 0, 2), cute.group_modes(gK, 0, 2)
        )
        tSs, tSg = cpasync.tma_partition(
            scale_atom.atom, 0, one, cute.group_modes(key_scales, 0, 2), cute.group_modes(gS, 0, 2)
        )
        with cute.arch.elect_one():
            store_words(Int32(notes.iterator.toint()) + slot * (NOTE_WORDS * 4), note)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, c.tile_n * KEY_BYTES)
        for i in cutlass.range_constexpr(self.key_tiles):
            from_page, from_place = (cute.arch.shuffle_sync(x, of + i) for x in (page, place))
            to = slot * self.key_tiles + i
            cute.copy(key_atom.atom, tKg[None, 0, from_place, from_page], tKs[None, to], tma_bar_ptr=bar)
            scales_at = page_size // 2 + from_place  # behind 32 words a row
            cute.copy(scale_atom.atom, tSg[None, scales_at, from_page], tSs[None, to], tma_bar_ptr=bar)

    @cute.jit
    def load_queries(self, atoms, shared, bar, stage, token):
        """q and weights of the queries of one MMA."""
        c, (_, _, query_atom, weight_atom) = self.config, atoms
        _, _, queries, weights, _ = shared
        box, one = self.query_box(), cute.make_layout(1)
        order = (1, 128, 256, 1024, HEADS * HEAD_DIM, self.columns * HEAD_DIM)
        into = cute.make_tensor(queries.iterator, cute.make_layout((*box, c.stages), stride=order))
        gQ = cute.local_tile(cute.domain_offset((0, 0, 0, 0, token), query_atom.tma_tensor), box, (0, 0, 0, 0, 0))
        gW = cute.local_tile(cute.domain_offset((0, token), weight_atom.tma_tensor), (HEADS, c.queries), (0, 0))
        tQs, tQg = cpasync.tma_partition(
            query_atom.atom, 0, one, cute.group_modes(into, 0, 5), cute.group_modes(gQ, 0, 5)
        )
        tWs, tWg = cpasync.tma_partition(
            weight_atom.atom, 0, one, cute.group_modes(weights, 0, 2), cute.group_modes(gW, 0, 2)
        )
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(bar, c.queries * QUERY_BYTES)
        cute.copy(query_atom.atom, tQg, tQs[None, stage], tma_bar_ptr=bar)
        cute.copy(weight_atom.atom, tWg, tWs[None, stage], tma_bar_ptr=bar)

    # --- the multiplying warpgroups -----------------------------------------------------------------------------------

    @cute.jit
    def multiply(self, shared, bars, addresses, sizes, scale, tidx):
        """Scores of the runs that the loading warp notes."""
        c = self.config
        keys, key_scales, _, _, notes = shared
        _, _, key_full, key_empty = bars
        ratio = sizes[4]
        group = cute.arch.make_warp_uniform(tidx // WARPGROUP)
        thread = tidx % WARPGROUP
        lane, warp = thread % 32, cute.arch.make_warp_uniform(thread // 32)
        row = 16 * warp + lane // 4 + 8 * (lane % 2)  # of a strip: whose score this lane stores
        mma = self.mma(True)
        frag = [cute.make_rmem_tensor(mma.partition_shape_A((TILE, HEAD_DIM)), Float8E4M3FN) for _ in range(c.strips)]
        factors, since = cute.make_rmem_tensor(c.strips, Float32), cute.make_rmem_tensor(c.strips, Int32)
        run, step, more = Int32(0), Int32(0), Int32(1)
        while more == 1:
            slot = run % c.key_stages
            cute.arch.mbarrier_wait(key_full + slot, run // c.key_stages % 2)
            note = load_words(Int32(notes.iterator.toint()) + slot * (NOTE_WORDS * 4))
            first, stop, entry, told = (Int32(word) for word in note)
            entry += group * (TILE * c.strips)
            if first < 0:
                more = Int32(0)
            else:
                if cutlass.const_expr(c.block_m == 1):  # noqa: SIM102
                    if told == 1:  # another query
                        if step > 0:
                            self.release(bars[1] + (step - 1) % c.stages, lane)
                        cute.arch.mbarrier_wait(bars[0] + step % c.stages, step // c.stages % 2)
                        step += 1
                tile = slot * self.key_tiles + group * c.strips
                for s in cutlass.range_constexpr(c.strips):
                    self.take_keys(frag[s], Int32(keys.iterator.toint()) + (tile + s) * (TILE * HEAD_DIM), warp, lane)
                    at = Int32(key_scales.iterator.toint()) + ((tile + s) * TILE + row) * 4
                    factors[s] = load_number(at) * scale
                    since[s] = (entry + s * TILE + row + 1) * ratio - 1
                if cutlass.const_expr(c.block_m > 1):
                    loads_have_come()
                    self.release(key_empty + slot, lane)
                where = (first, stop, entry, row, lane)
                if cutlass.const_expr(c.block_m == 1) or entry < told:
                    self.score(frag, factors, since, shared, bars, addresses, sizes, where, step)
                else:  # no query sees any of this warpgroup's entries
                    self.pass_over(bars, first, stop, step, lane)
                if cutlass.const_expr(c.block_m == 1):
                    self.release(key_empty + slot, lane)  # not before: their loads are awaited by what reads them
                else:
                    step += (stop - first + c.queries - 1) // c.queries
            run += 1

    def mma(self, accumulate: bool):
        """64 entries of a warpgroup by the heads of `queries` queries, added to what was there or not."""
        mma = hopper_helpers.make_trivial_tiled_mma(
            Float8E4M3FN,
            Float8E4M3FN,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (TILE, self.columns),
            a_source=warpgroup.OperandSource.RMEM,
        )
        mma.set(warpgroup.Field.ACCUMULATE, accumulate)
        return mma

    def release(self, bar, lane):
        """Tell the loading warp that this warp has read a stage."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bar)

    def take_keys(self, frag, start, warp, lane):
        """A warp's 16 rows of a strip to registers."""
        words = cute.recast_tensor(frag, Uint32)
        at = start + (16 * warp + lane % 16) * HEAD_DIM
        for s in range(K_STEPS):
            got = load_matrices(at + ((2 * s + lane // 16) ^ (lane % 8)) * 16)
            for i in range(4):
                words[4 * s + i] = got[i]

    @cute.jit
    def pass_over(self, bars, first, stop, step, lane):
        """Let a run's queries go by."""
        c, (full, empty, _, _) = self.config, bars
        for _ in cutlass.range(first, stop, c.queries, unroll=1):
            cute.arch.mbarrier_wait(full + step % c.stages, step // c.stages % 2)
            self.release(empty + step % c.stages, lane)
            step += 1

    @cute.jit
    def score(self, frag, factors, since, shared, bars, addresses, sizes, where, step):
        """The scores of a run of queries and this warpgroup's strips."""
        c = self.config
        queries, (full, empty, _, _) = shared[2], bars
        first, stop, _, _, lane = where
        mma = self.mma(True)
        operand = mma.make_fragment_B(mma.get_slice(0).partition_B(queries))
        held = min(c.strips, 2)
        acc = [cute.make_rmem_tensor(mma.partition_shape_C((TILE, self.columns)), Float32) for _ in range(held)]
        state = (acc, frag, operand, factors, since, shared, addresses, sizes, where)
        if cutlass.const_expr(c.block_m == 1):
            self.score_queries(state, first, (step - 1) % c.stages)
        else:
            slot, phase = step % c.stages, step // c.stages % 2
            for token in cutlass.range(first, stop, c.queries, unroll=1):
                cute.arch.mbarrier_wait(full + slot, phase)
                self.score_queries(state, token, slot)
                self.release(empty + slot, lane)
                slot += 1
                if slot == c.stages:
                    slot, phase = Int32(0), phase ^ 1

    @cute.jit
    def score_queries(self, state, token, slot):
        """Two strips' products are on their way at a time; none is left when this ends, as ptxas wants it."""
        c, (acc, frag, operand, factors, since, shared, addresses, sizes, where) = self.config, state
        m, lane = sizes[0], where[4]
        for s in cutlass.range_constexpr(len(acc)):
            self.issue(acc[s], frag[s], operand, slot)
        positions = []
        for u in cutlass.range_constexpr(0, c.queries, 2):
            query = cutlass.min(token + u + (lane % 4 // 2 if c.queries > 1 else 0), m - 1)
            positions.append(load_int(addresses[1] + Int64(query) * 4))
        for s in cutlass.range_constexpr(c.strips):
            warpgroup.wait_group(1 if s + 1 < c.strips else 0)
            self.finish(acc[s % 2], s, factors[s], since[s], positions, shared, addresses, sizes, where, token, slot)
            if cutlass.const_expr(s + 2 < c.strips):
                self.issue(acc[s % 2], frag[s + 2], operand, slot)

    @cute.jit
    def issue(self, acc, frag, operand, slot):
        """Products of a strip with the queries of a stage, on their way."""
        new, more = self.mma(False), self.mma(True)
        warpgroup.fence()
        for k in cutlass.range_constexpr(K_STEPS):
            mma = new if k == 0 else more
            cute.gemm(mma, acc, frag[None, None, k], operand[None, None, k, slot], acc)
        warpgroup.commit_group()

    @cute.jit
    def finish(self, acc, strip, factor, since, positions, shared, addresses, sizes, where, token, slot):
        """Add up the heads of a strip's products, and store."""
        c = self.config
        _, _, _, weights, _ = shared
        out, entries = addresses[3], sizes[1]
        _, stop, entry, row, lane = where
        at = Int32(weights.iterator.toint()) + slot * (c.queries * HEADS * 4) + lane % 4 * 32
        odd = lane % 2 == 1
        sums = []
        for u in cutlass.range_constexpr(c.queries):
            pair = [Float32(0.0), Float32(0.0)]
            for i, j in itertools.product(range(2), range(0, 8, 4)):
                w = load4(at + (u * HEADS + 32 * i + j) * 4)
                for e in cutlass.range_constexpr(4):
                    for r in cutlass.range_constexpr(2):
                        x = acc[4 * (8 * u + j + e) + 2 * r + i]
                        pair[r] = add_relu(pair[r], x, w[e])
            # lanes of a quad have a quarter of the heads each: even ones go on with row g, odd ones with row g + 8
            kept = pair[1] if odd else pair[0]
            sent = pair[0] if odd else pair[1]
            sums.append(kept + cute.arch.shuffle_sync_bfly(sent, 1))
        high = lane % 4 >= 2
        for u in cutlass.range_constexpr(0, c.queries, 2):
            if cutlass.const_expr(c.queries == 1):
                score = sums[0] + cute.arch.shuffle_sync_bfly(sums[0], 2)
                query = token
                mine = lane % 4 < 2
            else:
                kept = sums[u + 1] if high else sums[u]
                sent = sums[u] if high else sums[u + 1]
                score = kept + cute.arch.shuffle_sync_bfly(sent, 2)
                query = token + u + lane % 4 // 2
                mine = query < stop
            score = score * factor
            if since > positions[u // 2]:
                score = -Float32.inf
            to = out + (Int64(query) * Int64(entries) + Int64(entry + strip * TILE + row)) * 4
            put(to, score, mine and entry + strip * TILE < entries)


# --- host -------------------------------------------------------------------------------------------------------------

_GMEM = cute.AddressSpace.gmem
_KINDS = (
    (Float8E4M3FN, 16),
    (Float32, 16),
    (Float8E4M3FN, 16),
    (Float32, 16),
    (Int32, 4),
    (Int32, 4),
    (Int32, 4),
    (Float32, 16),
)


def _arguments(
    pointers: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...], scale: float, ctas: int
) -> Any:
    """All but the stream."""
    made = (make_ptr(kind, p, _GMEM, assumed_align=align) for p, (kind, align) in zip(pointers, _KINDS, strict=True))
    return (*made, *(Int32(x) for x in sizes), *(Int64(x) for x in strides), Float32(scale), Int32(ctas))


def _fake_arguments() -> Any:
    return (*_arguments((16,) * len(_KINDS), (TILE,) * 7, (TILE,) * 4, 1.0, 1), make_fake_stream())


@functools.cache
def compiled(config: Config, in_runs: bool) -> Any:
    """The compiled host function, for every number of queries and entries."""
    function = IndexLogitsSm90(config, in_runs)
    return cross.compiled(function, *_fake_arguments(), arch=ARCH, module=__name__, made_for=(config, in_runs))


def build(problem: IndexLogitsProblem, config: Config, arch: str | None = None) -> Built:
    """Compile for `problem` without a GPU. Raises ValueError for another arch or what `supports` refuses."""
    if arch not in (None, ARCH):
        raise ValueError(f"this kernel is for {ARCH}, got {arch!r}")
    if reason := supports(problem, config):
        raise ValueError(reason)
    in_runs = _in_runs(problem.m, problem.entries, _max_ctas(None), config)
    return cross.build(IndexLogitsSm90(config, in_runs), *_fake_arguments(), arch=ARCH)


def build_key(problem: IndexLogitsProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: sizes are read at launch."""
    return (_in_runs(problem.m, problem.entries, _max_ctas(None), config),)


def _in_runs(m: int, entries: int, ctas: int, config: Config) -> bool:
    """Whether CTAs have runs of single queries' items, for very many (H100: 124 and 496 of a CTA are 2 and 4 % faster
    so, 62 and fewer up to 9 % slower)."""
    return config.block_m == 1 and m * -(-entries // config.tile_n) >= IN_RUNS * ctas


@functools.cache
def _max_ctas(device: int | None) -> int:
    """CTAs that run at a time; device None: on an H100 that is not here."""
    return SM_COUNT[ARCH] if device is None else HardwareInfo(device).get_max_active_clusters(1)


def _block_m(m: int, config: Config) -> int:
    """Queries of an item: as many in each, whole MMAs, in MOST_BLOCKS blocks at most."""
    blocks = min(-(-m // config.block_m), MOST_BLOCKS)
    mmas = -(-m // (blocks * config.queries))
    return mmas * config.queries


def launch(
    q: Tensor,
    weights: Tensor,
    cache: IndexCache,
    block_table: Tensor,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    scale: float,
    out: Tensor,
    config: Config,
    in_runs: bool | None = None,
) -> None:
    """q E4M3 [m, heads, head_dim] and weights [m, heads] -> out FP32 [m, entries], contiguous, on the current stream.

    The scale of a head of q belongs into its weight. in_runs: as if `_in_runs` said so. Raises ValueError for what
    `supports` refuses.
    """
    (m, heads, head_dim), entries = q.shape, out.shape[1]
    x = "fp8" if q.dtype == torch.float8_e4m3fn else str(q.dtype)
    problem = IndexLogitsProblem(
        m=m, entries=entries, format=cache.format, heads=heads, head_dim=head_dim, page_size=cache.page_size, x=x
    )
    if reason := supports(problem, config):
        raise ValueError(reason)
    if m == 0 or entries == 0:
        return
    # TMA reads rows that begin at multiples of 16 bytes
    if q.stride(0) % 16 or q.stride(1) % 16 or q.data_ptr() % 16:
        q = q.clone(memory_format=torch.contiguous_format)
    if weights.dtype != torch.float32 or weights.stride(0) % 4 or weights.data_ptr() % 16:
        weights = weights.float().clone(memory_format=torch.contiguous_format)
    ctas = _max_ctas(out.device.index if out.is_cuda else None)
    tensors = (q, weights, cache.data, cache.data, block_table, positions, sequence_ids, out)
    sizes = (m, entries, _block_m(m, config), cache.data.shape[0], cache.page_size, ratio, block_table.shape[0])
    strides = (q.stride(0), q.stride(1), weights.stride(0), block_table.stride(0))
    if cache.data.data_ptr() % 16 or out.data_ptr() % 16:
        raise ValueError("the cache and out must start at multiples of 16 bytes")
    arguments = _arguments(tuple(t.data_ptr() for t in tensors), sizes, strides, scale, ctas)
    function = compiled(config, _in_runs(m, entries, ctas, config) if in_runs is None else in_runs)
    if out.is_cuda:
        with torch.cuda.device(out.device):
            function(*arguments, cuda.CUstream(torch.cuda.current_stream().cuda_stream))
    else:  # CPU tensors, where an emulator stands in for the CUDA runtime
        function(*arguments, cuda.CUstream(0))


def warm(problem: IndexLogitsProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    if reason := supports(problem, config):
        raise ValueError(reason)
    ways = (False, True) if config.block_m == 1 else (False,)
    for in_runs in ways:
        compiled(config, in_runs)
    if torch.cuda.is_available():
        p = problem
        data = torch.zeros(1, index_layout("fp8", p.page_size, p.head_dim).page_bytes, dtype=torch.uint8, device="cuda")
        nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
        q = torch.zeros(1, p.heads, p.head_dim, device="cuda").to(torch.float8_e4m3fn)
        weights, out = torch.zeros(1, p.heads, device="cuda"), torch.zeros(1, p.page_size, device="cuda")
        cache = IndexCache(data, "fp8", p.page_size, p.head_dim)
        for in_runs in ways:
            launch(q, weights, cache, nothing[None], nothing, nothing, 4, 1.0, out, config, in_runs)
