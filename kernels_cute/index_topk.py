"""The highest of a query's index scores: cache slots of the `topk` best entries, in rising entry order.

Memory bound: reads 4 bytes an entry, once, and writes 4 a slot. A cluster takes a query, each of its CTAs a run of
entries, whose scores stay in registers as 32-bit keys in the order of scores (NaN highest, zeros of both signs equal).

    window  of keys that holds the k-th highest: from a little below where a sample of scores has it, upwards
    bins    512 of equal width (in keys) over the window, counted in shared memory; the k-th highest is in one of them
    again   with that bin as the window, until few keys are in it or it is a single key; five times at the most
    rank    those few among each other; among equals the lower entry wins
    mark    a bit an entry; a thread writes the slots of a word of bits

A window that turns out too high gives way to all keys, so that the sample decides about speed alone. The result is the
same for every config.
"""

import functools
from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from torch import Tensor

from fp4suite import dispatch
from fp4suite.arch import SM_COUNT
from fp4suite.built import Built
from fp4suite.problem import IndexTopkProblem

from . import build as cross
from .instructions import (
    add_lanes,
    approximately,
    fetch,
    float_bits,
    highest_bit,
    plus_zero,
    prefetch,
)
from .overlap import OVERLAP, begin

BINS = 512
FEW = 128  # keys that are ranked among each other
MOST = 32  # scores of a thread, which has 64 registers
MOST_SLOTS = 2048  # of a query, which wait in shared memory for their order
FEW_QUERIES = 132  # whose CTAs wait for memory rather than for each other
RESIDENT = 1024  # threads that an SM holds, of 64 registers
SAMPLES = 256  # of a row, by which the first warp guesses
# words from one set of bins to the next: keys below count in 32 more, each lane in its own, those above in one
PITCH = BINS + 64
SENT_FOR = 512  # threads of a CTA from which on too few of them share an SM to keep memory busy
NEIGHBOURS = 4  # of a sample, which share a sector of memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`cluster` CTAs of `threads` threads a query, `each` scores a thread."""

    threads: int = 256
    each: int = 32
    cluster: int = 1

    @property
    def capacity(self) -> int:
        """Entries of a query, at most."""
        return self.threads * self.each * self.cluster


SPACE = {"threads": (128, 256, 512, 1024), "each": (4, 8, 16, 32), "cluster": (1, 2, 4, 8, 16)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What, beside the config, a compiled kernel is made for. eager: scores are read before it is known which count."""

    page: int
    eager: bool


def supports(problem: IndexTopkProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.entries > config.capacity:
        return f"entries={problem.entries} are more than {config} holds, {config.capacity}"
    if min(problem.topk, problem.entries) > MOST_SLOTS:
        return f"topk={problem.topk}: this kernel writes {MOST_SLOTS} slots a query at most"
    if config.each > MOST:
        return f"each={config.each} scores are more than {MOST} a thread"
    return None


def default(problem: IndexTopkProblem) -> Config:
    """Of few queries, each gets many threads, and CTAs; many share an SM. Between, long rows get all SMs together."""
    if problem.m > FEW_QUERIES:
        shapes = [(128, 32, 1), (256, 32, 1), (512, 32, 1), (1024, 32, 1), (1024, 32, 2), (1024, 32, 4), (1024, 32, 8)]
    elif problem.m <= FEW_QUERIES // 16:
        shapes = [(512, 8, 1), (512, 16, 1), (512, 32, 1), (256, 16, 8), (512, 16, 8), (512, 32, 8), (512, 32, 16)]
    else:
        cluster = 4 if problem.m <= FEW_QUERIES // 3 else 2 if problem.m <= FEW_QUERIES * 2 // 3 else 1
        shapes = [(512, 8, 1), (256, 32, 1), (512, 32, 1), (1024 // cluster, 32, cluster)]
        shapes += [(512, 16, 8), (512, 32, 8), (1024, 32, 8)]
    configs = [Config(threads=t, each=e, cluster=c) for t, e, c in shapes]
    return next((c for c in configs if problem.entries <= c.capacity), configs[-1])


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def count_key(key: Uint32, shift: Int32, base: Int32, most: Int32, least: Int32, bins: Int32, *, loc=None, ip=None):
    """Adds 1 to a bin: (key >> shift) - base, at most `most`; `least` if that is less. bins: where the first one lies.

    No branch: the hardware has no predicate for this atomic operation.
    """
    asm = (
        "{ .reg .s32 b; shr.u32 b, $0, $1; sub.s32 b, b, $2; min.s32 b, b, $3; max.s32 b, b, $4; "
        "mad.lo.s32 b, b, 4, $5; red.shared.add.u32 [b], 1; }"
    )
    args = [x.ir_value(loc=loc, ip=ip) for x in (key, shift, base, most, least, bins)]
    llvm.inline_asm(None, args, asm, "r,r,r,r,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def list_key(key: Uint32, entry: Int32, least: Uint32, span: Uint32, note: Int32, lists: Int32, *, loc=None, ip=None):
    """Puts a key at most `span` above `least`, and its entry, into the lists, at the place that the note says is free.

    The list of entries begins FEW words after that of keys.
    """
    asm = (
        "{ .reg .pred p; .reg .u32 d, a; sub.u32 d, $0, $2; setp.le.u32 p, d, $3; @p atom.shared.add.u32 a, [$4], 1; "
        f"mad.lo.u32 a, a, 4, $5; @p st.shared.u32 [a], $0; @p st.shared.u32 [a + {4 * FEW}], $1; }}"
    )
    args = [x.ir_value(loc=loc, ip=ip) for x in (key, entry, least, span, note, lists)]
    llvm.inline_asm(None, args, asm, "r,r,r,r,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def take_place(address: Int32, rank: Int32, *, loc=None, ip=None) -> Int32:
    """Adds 1 to a word in the shared memory of a CTA of the cluster; what it was."""
    asm = (
        "{ .reg .b32 r; mapa.shared::cluster.u32 r, $1, $2; atom.relaxed.cluster.shared::cluster.add.u32 $0, [r], 1; }"
    )
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, rank)]
    return Int32(llvm.inline_asm(T.i32(), args, asm, "=r,r,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def store_peer(address: Int32, rank: Int32, value: Uint32, *, loc=None, ip=None):
    """To the shared memory of a CTA of the cluster, at this CTA's address of it."""
    asm = "{ .reg .b32 r; mapa.shared::cluster.u32 r, $0, $1; st.shared::cluster.u32 [r], $2; }"
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, rank, value)]
    llvm.inline_asm(None, args, asm, "r,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def load_peer(address: Int32, rank: Int32, *, loc=None, ip=None) -> Uint32:
    asm = "{ .reg .b32 r; mapa.shared::cluster.u32 r, $1, $2; ld.shared::cluster.u32 $0, [r]; }"
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, rank)]
    return Uint32(llvm.inline_asm(T.i32(), args, asm, "=r,r,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def clear_bits(address: Int32, kept: Uint32, *, loc=None, ip=None):
    """Of a word of shared memory, all but those kept."""
    asm = "red.shared.and.b32 [$0], $1;"
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, kept)]
    llvm.inline_asm(None, args, asm, "r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def store_slot(address: Int32, slot: Int32, *, loc=None, ip=None):
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, slot)]
    llvm.inline_asm(None, args, "st.shared.u32 [$0], $1;", "r,r", has_side_effects=True, loc=loc, ip=ip)


def key_of(x):
    """A number in the order of scores, over 0: the same for both zeros, and for all NaN."""
    bits = Int32(float_bits(plus_zero(x)))
    return Uint32(bits ^ ((bits >> 31) | Int32(-(2**31))))


def log2_range(x):
    """The least shift after which x is below BINS."""
    return cutlass.max(highest_bit(x) - (BINS.bit_length() - 2), 0)


# --- the kernel -------------------------------------------------------------------------------------------------------


class IndexTopk:
    def __init__(self, config: Config, variant: Variant, arch: str):
        self.config, self.variant = config, variant
        self.warps = config.threads // 32
        self.held = config.threads * config.each  # entries of a CTA
        self.words = self.held // 32  # of bits, one a thread at most
        # CTAs of an SM: 64 registers a thread, with which nothing spills
        self.programs = 1 if variant.eager else RESIDENT // config.threads
        self.ahead = SM_COUNT[arch] * self.programs // config.cluster  # queries at a time
        self.carveout = -(-100 * self.programs * 24 // 228)  # per cent of what L1 and shared memory are

    @cute.jit
    def __call__(
        self,
        scores: cute.Pointer,
        table: cute.Pointer,
        positions: cute.Pointer,
        sequence_ids: cute.Pointer,
        out: cute.Pointer,
        tokens: Int32,
        entries: Int32,
        k: Int32,
        ratio: Int32,
        stride: Int64,
        table_stride: Int64,
        stream: cuda.CUstream,
    ):
        c = self.config
        mPositions = cute.make_tensor(positions, cute.make_layout(tokens))
        mIds = cute.make_tensor(sequence_ids, cute.make_layout(tokens))
        self.kernel(scores, stride, table, table_stride, mPositions, mIds, out, entries, k, ratio).launch(
            grid=(tokens * c.cluster, 1, 1),
            block=(c.threads, 1, 1),
            cluster=(c.cluster, 1, 1) if c.cluster > 1 else None,
            stream=stream,
            min_blocks_per_mp=self.programs,
            preferred_smem_carveout=self.carveout,
            use_pdl=OVERLAP,
        )

    @cute.kernel
    def kernel(
        self,
        scores: cute.Pointer,
        stride: Int64,
        table: cute.Pointer,
        table_stride: Int64,
        mPositions: cute.Tensor,
        mIds: cute.Tensor,
        out: cute.Pointer,
        entries: Int32,
        k: Int32,
        ratio: Int32,
    ):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row, rank = block // c.cluster, block % c.cluster
        first = rank * self.held  # entry of this CTA

        smem = SmemAllocator()
        words = lambda n: smem.allocate_tensor(Uint32, cute.make_layout(n), byte_alignment=16)  # noqa: E731
        sHist, sTotal, sBits = words(2 * PITCH), words(BINS), words(self.words)
        sList, sMore, sSlots = words(2 * FEW), words(2 * FEW), words(MOST_SLOTS)
        sSums, sNote = words(32 + 2 * 16), words(16)

        begin()
        source = scores.toint() + Int64(row) * stride * 4
        position, sequence = mPositions[row], mIds[row]
        limit = entries  # of few queries all is read before it is known how much counts
        if cutlass.const_expr(not self.variant.eager):
            limit = self.seen(position, sequence, entries, ratio)
        sample = cute.make_rmem_tensor(SAMPLES // 32, Float32)
        if tidx < 32:
            self.load_sample(source, limit, sample, tidx)
        keys = cute.make_rmem_tensor(c.each, Uint32)
        self.load(source, first, limit, keys, tidx)
        if cutlass.const_expr(not self.variant.eager and c.threads >= SENT_FOR):
            later = row + self.ahead
            if tidx == 0 and later < cute.size(mPositions):
                self.send_for(source + Int64(self.ahead) * stride * 4, first, limit)
        pages = table.toint() + Int64(cutlass.max(sequence, 0)) * table_stride * 4
        number = Int32(-1)  # of the page of this thread's word
        start = first + tidx * 32
        if cutlass.const_expr(self.variant.page % 32 == 0):
            number = self.page_at(pages, cutlass.max(cutlass.min(start, limit - 1), 0) // self.variant.page)
        for i in cutlass.range_constexpr(-(-2 * PITCH // c.threads)):
            if i * c.threads + tidx < 2 * PITCH:
                sHist[i * c.threads + tidx] = Uint32(0)
        if tidx == 0:
            sNote[0] = Uint32(0)  # how many keys have been listed

        visible = self.seen(position, sequence, entries, ratio) if cutlass.const_expr(self.variant.eager) else limit
        self.order(keys, first, visible, tidx)
        k_seen = cutlass.min(k, visible)
        least, most, need, inside = Uint32(1), Uint32(0xFFFFFFFF), k_seen, k_seen
        if k_seen < visible:
            least, most, need, inside = self.search(keys, sample, k_seen, visible, limit, sHist, sTotal, sNote, tidx)
        self.mark(keys, least, sBits, tidx)
        if inside > need:
            self.trim(keys, least, most, need, inside, first, sBits, sList, sMore, sSums, sNote, rank, tidx)
        else:
            cute.arch.sync_threads()
        target = out.toint() + Int64(row) * Int64(k) * 4
        self.write(sBits, sSlots, sSums, sNote, pages, number, target, first, k, k_seen, rank, tidx)

    @cute.jit
    def send_for(self, source, first, limit):
        """This CTA's part of a later query on its way to L2: of as many scores as the present one has."""
        start = source + Int64(first) * 4
        size = (cutlass.min(limit - first, self.held) * 4 - Int32(start % 16 + 15)) // 16 * 16
        if size > 0:
            prefetch((start + 15) // 16 * 16, size)

    @cute.jit
    def load_sample(self, source, limit, sample, lane):
        """Scores from all over the row, into the first warp."""
        for i in cutlass.range_constexpr(SAMPLES // 32):
            at = cutlass.max(cutlass.min(self.sampled(i, limit, lane), limit - 1), 0)
            sample[i] = fetch(source + Int64(at) * 4)

    def sampled(self, i, limit, lane):
        """The entry of sample i of a lane."""
        runs = SAMPLES // NEIGHBOURS
        return limit // runs * (32 // NEIGHBOURS * i + lane // NEIGHBOURS) + lane % NEIGHBOURS

    @cute.jit
    def seen(self, position, sequence, entries, ratio):
        """How many entries a query sees: the first ones."""
        count = cutlass.min(Int32(Uint32(position + 1) // Uint32(ratio)), entries)
        if sequence < 0:
            count = Int32(0)
        return count

    @cute.jit
    def load(self, source, first, limit, keys, tidx):
        """The bits of this thread's scores."""
        c = self.config
        mine = source + Int64(first + tidx) * 4
        last = first + self.held
        x = cute.recast_tensor(keys, Float32)
        if last <= limit:
            for j in cutlass.range_constexpr(c.each):
                x[j] = fetch(mine + Int64(4 * c.threads * j))
        else:
            for j in cutlass.range_constexpr(c.each):
                at = first + j * c.threads + tidx
                x[j] = Float32(-Float32.inf)
                if at < limit:
                    x[j] = fetch(mine + Int64(4 * c.threads * j))

    @cute.jit
    def order(self, keys, first, visible, tidx):
        """Bits of scores to keys, 0 of entries that are not visible."""
        c, x = self.config, cute.recast_tensor(keys, Float32)
        for j in cutlass.range_constexpr(c.each):
            keys[j] = key_of(x[j])
        if first + self.held > visible:
            for j in cutlass.range_constexpr(c.each):
                if first + j * c.threads + tidx >= visible:
                    keys[j] = Uint32(0)

    @cute.jit
    def guess(self, sample, k_seen, visible, limit, sNote, lane):
        """sNote[1:3]: the least key of the window, and one that few keys are beyond. By the first warp.

        They are 1 and the highest one where the sample says nothing.
        """
        n, total, squares = Float32(0.0), Float32(0.0), Float32(0.0)
        for i in cutlass.range_constexpr(SAMPLES // 32):
            x = sample[i]
            if self.sampled(i, limit, lane) < visible and x > -Float32.inf and x < Float32.inf:
                n += Float32(1.0)
                total += x
                squares += x * x
            else:
                sample[i] = x if x >= Float32.inf else Float32(-Float32.inf)
        n, total, squares = (self.sum_warp(v) for v in (n, total, squares))
        mean = total * approximately("rcp", n)
        deviation = approximately("sqrt", squares * approximately("rcp", n) - mean * mean)
        share = Float32(k_seen) * approximately("rcp", Float32(visible))
        # Abramowitz and Stegun, 26.2.22: the quantile of the smaller tail, within 0.003
        t = approximately("sqrt", Float32(-1.3862944) * approximately("lg2", cutlass.min(share, Float32(1.0) - share)))
        over = Float32(1.0) + Float32(0.99229) * t + Float32(0.04481) * t * t
        z = t - (Float32(2.30753) + Float32(0.27061) * t) * approximately("rcp", over)
        if share > 0.5:
            z = -z
        low = mean + (z - Float32(0.4)) * deviation
        high = low + Float32(3.0) * deviation
        expected = share * n
        want = Int32(Float32(1.1) * expected + Float32(2.5) * approximately("sqrt", expected)) + 1
        step = Float32(0.25) * deviation
        found, tries = self.count_sample(sample, low), Int32(0)
        while found < want and tries < 8:
            low -= step
            step += step
            found = self.count_sample(sample, low)
            tries += 1
        least, beyond = Uint32(1), Uint32(0xFFFFFFFF)
        if high - low < Float32.inf and high > low:
            least, beyond = key_of(low), key_of(high)
        if lane == 0:
            sNote[1], sNote[2] = least, beyond

    @cute.jit
    def count_sample(self, sample, low):
        """How many scores of the sample are at least `low`."""
        count = Int32(0)
        for i in cutlass.range_constexpr(SAMPLES // 32):
            if sample[i] >= low:
                count += 1
        return add_lanes(count)

    def sum_warp(self, x):
        for step in (1, 2, 4, 8, 16):
            x = x + cute.arch.shuffle_sync_bfly(x, offset=step)
        return x

    @cute.jit
    def search(self, keys, sample, k_seen, visible, limit, sHist, sTotal, sNote, tidx):
        """least, most, need, inside: keys above `most` are chosen, and `need` of the `inside` ones from least to most.

        There are no more inside than needed, or few of them, or they are all equal.
        """
        c = self.config
        if tidx < 32:
            self.guess(sample, k_seen, visible, limit, sNote, tidx)
        cute.arch.sync_threads()
        least, beyond = sNote[1], sNote[2]
        most, need, inside = Uint32(0xFFFFFFFF), k_seen, Int32(0)
        shift, half, searching = cutlass.max(log2_range(beyond - least), 1), Int32(0), Int32(1)
        bins = Int32(sHist.iterator.toint()) + 4 * 32
        last = Int32(BINS - 1)  # the highest bin is that of all keys beyond, at first
        least = least >> Uint32(shift) << Uint32(shift)
        while searching > 0:
            at, base = bins + half * (4 * PITCH), Int32(least >> Uint32(shift))
            for j in cutlass.range_constexpr(c.each):
                count_key(keys[j], shift, base, last, -1 - tidx % 32, at)
            self.meet()
            half = 1 - half
            for i in cutlass.range_constexpr(-(-BINS // c.threads)):
                place = i * c.threads + tidx
                if place < BINS:
                    if cutlass.const_expr(c.cluster > 1):
                        total = Uint32(0)
                        for peer in cutlass.range_constexpr(c.cluster):
                            total += load_peer(at + 4 * place, Int32(peer))
                        sTotal[place] = total
                    sHist[half * PITCH + 32 + place] = Uint32(0)
            if cutlass.const_expr(c.cluster > 1):
                cute.arch.sync_threads()
                self.find(sTotal, Int32(0), last, need, sNote, tidx)
            else:
                self.find(sHist, (1 - half) * PITCH + 32, last, need, sNote, tidx)
            cute.arch.sync_threads()
            bin, over, inside = sNote[4], Int32(sNote[5]), Int32(sNote[6])
            if over + inside < need:  # the window was too high
                least = Uint32(0)
            else:
                need -= over
                least += bin << Uint32(shift)
                if bin < BINS - 1:
                    most = cutlass.min(most, least + (Uint32(1) << Uint32(shift)) - 1)
                if inside == need or inside <= FEW or least == most:
                    searching = Int32(0)
            shift = log2_range(most - least)
            if searching > 0:  # a window that is wider than the one before begins at a multiple of its bins too
                shift = log2_range(most - (least >> Uint32(shift) << Uint32(shift)))
                least = least >> Uint32(shift) << Uint32(shift)
            last = Int32((most - least) >> Uint32(shift)) + 1  # the bin of keys beyond the window, which do not count
            if shift == 0:  # differences of 32-bit keys take 33 bits: none that is chosen changes
                for j in cutlass.range_constexpr(c.each):
                    keys[j] = cutlass.max(keys[j], least - cutlass.min(least, Uint32(BINS)))
        return least, most, need, inside

    @cute.jit
    def find(self, bins, offset, last, need, sNote, tidx):
        """sNote[4:7]: the bin of the need-th highest, how many are in those above it, and in it. By the first warp."""
        EACH = BINS // 32
        if tidx < 32:
            got = cute.make_rmem_tensor(EACH, Uint32)
            at = offset + tidx * EACH
            cute.autovec_copy(
                cute.make_tensor(bins.iterator + cute.assume(at, divby=EACH), cute.make_layout(EACH)), got
            )
            own = Int32(0)
            if last < BINS - 1:
                for i in cutlass.range_constexpr(EACH):
                    if tidx * EACH + i == last:
                        got[i] = Uint32(0)
            for i in cutlass.range_constexpr(EACH):
                own += Int32(got[i])
            upto = own  # of this lane and those above
            for step in (1, 2, 4, 8, 16):
                other = cute.arch.shuffle_sync_down(upto, offset=step)
                if tidx + step < 32:
                    upto += other
            over, bin, inside = upto - own, Int32(0), own
            if (over < need and upto >= need) or (tidx == 0 and upto < need):
                found = Int32(0)
                here = over
                for i in cutlass.range_constexpr(EACH):
                    n = Int32(got[EACH - 1 - i])
                    if found == 0 and here + n >= need:
                        found = Int32(1)
                        over, bin, inside = here, tidx * EACH + (EACH - 1 - i), n
                    here += n
                sNote[4], sNote[5], sNote[6] = Uint32(bin), Uint32(over), Uint32(inside)

    @cute.jit
    def mark(self, keys, least, sBits, tidx, above: cutlass.Constexpr = False):
        """A bit for every key from least on, or for those above it."""
        warp, lane = tidx // 32, tidx % 32
        for j in cutlass.range_constexpr(self.config.each):
            bits = cute.arch.vote_ballot_sync(keys[j] > least if cutlass.const_expr(above) else keys[j] >= least)
            if lane == 0:
                sBits[j * self.warps + warp] = Uint32(bits)

    @cute.jit
    def trim(self, keys, least, most, need, inside, first, sBits, sList, sMore, sSums, sNote, rank, tidx):
        """Of the bits of keys from least to most, all but `need` cleared: those of lower keys, and of later entries."""
        c = self.config
        if inside <= FEW:
            span = most - least
            for j0 in cutlass.range_constexpr(0, c.each, 4):
                lowest = keys[j0] - least
                for i in cutlass.range_constexpr(1, 4):
                    lowest = cutlass.min(lowest, keys[j0 + i] - least)
                if lowest <= span:
                    for i in cutlass.range_constexpr(4):
                        self.list_key(keys[j0 + i], first + (j0 + i) * c.threads + tidx, least, span, sList, sNote)
            self.meet()
            if cutlass.const_expr(c.cluster > 1):
                if tidx < inside:
                    for i in cutlass.range_constexpr(2):
                        at = i * FEW + tidx
                        sMore[at] = load_peer(Int32(sList.iterator.toint()) + 4 * at, Int32(0))
                cute.arch.sync_threads()
                self.rank_keys(sMore, need, inside, first, sBits, tidx)
            else:
                self.rank_keys(sList, need, inside, first, sBits, tidx)
            cute.arch.sync_threads()
        else:
            self.trim_equal(keys, least, need, sBits, sSums, rank, tidx)

    @cute.jit
    def list_key(self, key, entry, least, span, sList, sNote):
        """In the first CTA's shared memory."""
        note, lists = Int32(sNote.iterator.toint()), Int32(sList.iterator.toint())
        if cutlass.const_expr(self.config.cluster > 1):
            if key - least <= span:
                place = take_place(note, Int32(0))
                store_peer(lists + 4 * place, Int32(0), key)
                store_peer(lists + 4 * (FEW + place), Int32(0), Uint32(entry))
        else:
            list_key(key, entry, least, span, note, lists)

    @cute.jit
    def rank_keys(self, sList, need, inside, first, sBits, tidx):
        if tidx < inside:
            key, entry, place = sList[tidx], sList[FEW + tidx], Int32(0)
            for i in cutlass.range(inside, unroll=4):
                other = sList[i]
                if other > key or (other == key and sList[FEW + i] < entry):
                    place += 1
            own = Int32(entry) - first
            if place >= need and own >= 0 and own < self.held:
                clear_bits(Int32(sBits.iterator.toint()) + own // 32 * 4, ~(Uint32(1) << Uint32(own % 32)))

    @cute.jit
    def trim_equal(self, keys, least, need, sBits, sSums, rank, tidx):
        """Of the bits of keys equal to least, the first `need` of the row stay."""
        cute.arch.sync_threads()
        # words hold bits of greater keys and of equal ones: first those of greater ones
        both = self.word(sBits, tidx)
        cute.arch.sync_threads()
        self.mark(keys, least, sBits, tidx, above=True)
        cute.arch.sync_threads()
        greater = self.word(sBits, tidx)
        equal = both & ~greater
        own = Int32(cute.arch.popc(equal))
        before, _ = self.scan(own, sSums, 0, rank, tidx)
        drop = cutlass.min(cutlass.max(before + own - need, 0), own)
        while drop > 0:
            equal = equal ^ (Uint32(1) << Uint32(highest_bit(equal)))
            drop -= 1
        if tidx < self.words:
            sBits[tidx] = greater | equal
        cute.arch.sync_threads()

    @cute.jit
    def word(self, sBits, tidx):
        """This thread's word of bits, 0 where there is none."""
        word = Uint32(0)
        if tidx < self.words:
            word = sBits[tidx]
        return word

    @cute.jit
    def scan(self, count, sSums, turn: cutlass.Constexpr, rank, tidx):
        """How many there are in threads before this one, of the cluster's; and in CTAs before this one."""
        warp, lane = tidx // 32, tidx % 32
        upto = Int32(count)
        for step in (1, 2, 4, 8, 16):
            other = cute.arch.shuffle_sync_up(upto, offset=step, mask_and_clamp=0)
            if lane >= step:
                upto += other
        if lane == 31:
            sSums[warp] = Uint32(upto)
        cute.arch.sync_threads()
        total = Int32(0)
        if lane < self.warps:
            total = Int32(sSums[lane])
        before = Int32(0)
        if lane < warp:
            before = total
        before = add_lanes(before)
        peers = Int32(0)
        if cutlass.const_expr(self.config.cluster > 1):
            mine, total = 32 + 16 * turn, add_lanes(total)
            if tidx < self.config.cluster:
                store_peer(Int32(sSums.iterator.toint()) + 4 * (mine + rank), Int32(tidx), Uint32(total))
            self.meet()
            if lane < rank:
                peers = Int32(sSums[mine + lane])
            peers = add_lanes(peers)
        return before + upto - count + peers, peers

    @cute.jit
    def write(self, sBits, sSlots, sSums, sNote, pages, number, target, first, k, k_seen, rank, tidx):
        """Slots of entries with a bit, in their order; -1 behind those that are seen."""
        c, page = self.config, self.variant.page
        word = self.word(sBits, tidx)
        count, start = Int32(cute.arch.popc(word)), first + tidx * 32
        before, peers = self.scan(count, sSums, 1, rank, tidx)
        place = before - peers + count
        at = Int32(sSlots.iterator.toint()) + 4 * place
        if cutlass.const_expr(page % 32 == 0):
            slot = number * page + start % page
            if number < 0:
                slot = Int32(-32)
            while word != 0:
                bit = highest_bit(word)
                word, at = word ^ (Uint32(1) << Uint32(bit)), at - 4
                store_slot(at, cutlass.max(slot + bit, -1))
        else:
            while word != 0:
                bit = highest_bit(word)
                word, at = word ^ (Uint32(1) << Uint32(bit)), at - 4
                entry, slot = start + bit, Int32(-1)
                number = self.page_at(pages, entry // page)
                if number >= 0:
                    slot = number * page + entry % page
                store_slot(at, slot)
        # how many are this CTA's: those before its last thread, and that one's
        if tidx == c.threads - 1:
            sNote[8] = Uint32(place)
        cute.arch.sync_threads()
        count = Int32(sNote[8])
        mOut = cute.make_tensor(cute.make_ptr(Int32, target, cute.AddressSpace.gmem), cute.make_layout(k))
        for i in cutlass.range(tidx, count, c.threads):
            mOut[peers + i] = Int32(sSlots[i])
        for i in cutlass.range(k_seen + rank * c.threads + tidx, k, c.threads * c.cluster):
            mOut[i] = Int32(-1)

    @cute.jit
    def page_at(self, pages, index):
        table = cute.make_tensor(cute.make_ptr(Int32, pages, cute.AddressSpace.gmem), cute.make_layout(1 << 30))
        return table[index]

    @cute.jit
    def meet(self):
        """All of the query's threads."""
        if cutlass.const_expr(self.config.cluster > 1):
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()


# --- host -------------------------------------------------------------------------------------------------------------

_GMEM = cute.AddressSpace.gmem
_TYPES = (Float32, Int32, Int32, Int32, Int32)  # scores, table, positions, sequence_ids, out


def _arguments(pointers: tuple[int, ...], sizes: tuple[int, int, int, int], strides: tuple[int, int]) -> list[Any]:
    """All but the stream. sizes: tokens, entries, k, ratio; strides: of scores and of the table."""
    made = [make_ptr(t, p, _GMEM, assumed_align=4) for t, p in zip(_TYPES, pointers, strict=True)]
    return [*made, *(Int32(x) for x in sizes), *(Int64(x) for x in strides)]


def _fake_arguments() -> list[Any]:
    return [*_arguments((16,) * 5, (1, 1, 1, 1), (1, 1)), make_fake_stream()]


def _variant(m: int, page_size: int, config: Config, arch: str) -> Variant:
    """Eager where all queries run at once: where they take turns, the next ones are on their way to L2."""
    at_once = SM_COUNT[arch] * RESIDENT // (config.threads * config.cluster)
    return Variant(page=page_size, eager=m <= min(FEW_QUERIES, at_once))


def build(problem: IndexTopkProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU. Raises ValueError for what `supports` refuses."""
    if reason := supports(problem, config):
        raise ValueError(reason)
    kernel = IndexTopk(config, _variant(problem.m, problem.page_size, config, arch), arch)
    return cross.build(kernel, *_fake_arguments(), arch=arch)


def build_key(problem: IndexTopkProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on."""
    return tuple(_variant(problem.m, problem.page_size, config, arch) for arch in SM_COUNT)


@functools.cache
def compiled(config: Config, variant: Variant, arch: str) -> Any:
    """The compiled host function, for all sizes that the config holds."""
    kernel, made_for = IndexTopk(config, variant, arch), (config, variant, OVERLAP)
    return cross.compiled(kernel, *_fake_arguments(), arch=arch, module=__name__, made_for=made_for)


def launch(
    logits: Tensor,
    block_table: Tensor,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    page_size: int,
    out: Tensor,
    config: Config,
) -> None:
    """Scores FP32 [tokens, entries], rows of any stride -> out int32 [tokens, k], contiguous, on the current stream.

    Raises ValueError for more entries than the config holds, or more slots than MOST_SLOTS.
    """
    (tokens, entries), k = logits.shape, out.shape[1]
    if tokens == 0 or k == 0:
        return
    if reason := supports(IndexTopkProblem(m=tokens, entries=entries, topk=k, page_size=page_size), config):
        raise ValueError(reason)
    operands = (logits, block_table, positions, sequence_ids, out)
    arguments = _arguments(
        tuple(x.data_ptr() for x in operands),
        (tokens, entries, k, ratio),
        (_row_stride(logits), _row_stride(block_table)),
    )
    arch = dispatch.target_of(out.device).arch
    function = compiled(config, _variant(tokens, page_size, config, arch), arch)
    if out.device.type == "cuda":
        with torch.cuda.device(out.device):
            function(*arguments, cuda.CUstream(torch.cuda.current_stream().cuda_stream))
    else:  # CPU tensors, where an emulator stands in for the CUDA runtime
        function(*arguments, cuda.CUstream(0))


def _row_stride(x: Tensor) -> int:
    """Elements from row to row. Raises ValueError unless each row is contiguous."""
    if x.shape[1] > 1 and x.stride(1) != 1:
        raise ValueError(f"the elements of a row must be contiguous, got strides {x.stride()}")
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]


def warm(problem: IndexTopkProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need, and launch once."""
    p = problem
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.int32, device="cuda")  # noqa: E731
    logits = torch.zeros(1, p.entries, device="cuda").expand(p.m, -1)
    table = zeros(1, -(-p.entries // p.page_size))
    launch(logits, table, zeros(p.m), zeros(p.m), 1, p.page_size, zeros(p.m, min(p.topk, p.entries)), config)
