"""Hyper-connections on Hopper that read the streams once: `hyper_connection_pre`, `_post_pre` and `_head`.

Memory bound: reads 8 bytes a column of four BF16 streams and writes 2; with a site to close 10 and 10. fn, FP32
[24, 4 d] or the head's [4, 4 d], is split into two BF16 terms by a launch before, to within 2^-17 of an element; they
are read from L2 once a step, or once for all where there is room.

A cluster takes block_m tokens a step, and each of its CTAs a share of the columns of all four streams, which stay in
shared memory until they are folded. Columns come in groups of 64 of each stream.

    load      two warps: one sends for streams by TMA as soon as there is room, also for the next step's; one for the
              terms of fn, of 64 columns of a stream at a time, which lie in memory as WGMMA reads them
    make      eight threads a token, 8 columns of each stream each: the streams that a site leaves, in place, and sums
              of squares. A site's output is on its way to shared memory AHEAD groups before, by cp.async, and a thread
              reads what it has copied itself
    multiply  a warpgroup: rows of the MMA are fn's terms, from registers; columns are tokens, whose streams the tensor
              core reads where they lie. Sums of a group's columns leave it, as it truncates, for FP32 sums. One warp
              sends the new streams to memory, by TMA
    own       two warps, in turn: the sums of a token meet in one CTA of the cluster, which adds them in the order of
              the CTAs; pre goes back to all, then comes, but for the head, Sinkhorn, for which there is time until the
              step after the next
    fold      as many threads as make: y, as soon as pre is there, while those who make are at the next step
    norm      sums of squares of y go from each CTA to all others, who add them in one order

What CTAs send each other is counted by mbarriers of the receiver (st.async). No bit depends on m, on other tokens or on
when anything arrives.
"""

import functools
from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from cutlass.utils import HardwareInfo, hopper_helpers
from torch import Tensor

from fp4suite.arch import SM_COUNT
from fp4suite.built import MAX_SHARED_BYTES, Built
from fp4suite.problem import (
    HyperConnectionHeadProblem,
    HyperConnectionPostPreProblem,
    HyperConnectionPreProblem,
    Problem,
)

from . import build as cross
from .instructions import (
    add,
    approximately,
    bits_float,
    bulk_load,
    create_policy,
    fetch,
    fetch_words,
    fma,
    load4,
    load_matrices,
    load_number,
    load_words,
    loads_have_come,
    mul,
    pack_bf16,
    push,
    store_words,
    widen,
)
from .overlap import OVERLAP, wait

ARCH = "sm_90a"
STREAMS = 4
OUTPUTS = STREAMS * (STREAMS + 2)  # the head has STREAMS
TERMS = 2  # BF16 numbers whose sum stands for one of FP32
FN_ERROR = 2.0**-17  # by which it is off at most, of its size
GROUP = 64  # columns of a group: rows of 128 bytes of shared memory
ROWS = 64  # of WGMMA, of which those of fn's terms count
K_STEPS = GROUP // 16  # of WGMMA
WARPGROUP = 128
TOKENS = 16  # that a warpgroup makes or folds
COEFFICIENTS = STREAMS + STREAMS**2  # of a site: post, then rows of comb
AHEAD = 3  # groups of columns of a site's output on their way
EARLY = 2  # groups of columns that are taken to registers before they can be folded
NORMS = 2  # steps whose sums of squares of y are on their way
STORED = 2  # groups of columns that are on their way to memory while the next one is stored
BARRIER_BYTES = 1024
REGISTERS = 65536  # of an SM
OWNERS = 2  # warps, each of every other step: who makes streams may be two steps ahead of who folds
# below them Triton's kernels: pre of 256 tokens 20.7 us, here 23.0, of 512 32.8 and 31.2; post_pre of 256 36.3 and
# 29.0, of 64 13.4 and 17.7; the head of 768 40.2 and 32.0 (H100, d=7168)
LEAST_TOKENS: dict[type[Problem], int] = {
    HyperConnectionPreProblem: 512,
    HyperConnectionPostPreProblem: 256,
    HyperConnectionHeadProblem: 768,
}
# of threads that make, fold, multiply, and load or own, of 32 tokens: without and with a site to close
THREAD_REGISTERS = {False: (64, 104, 104, 40), True: (80, 96, 96, 32)}
LOG2_E = 1.4426950408889634

FoldProblem = HyperConnectionPreProblem | HyperConnectionPostPreProblem | HyperConnectionHeadProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m: tokens of a step; cluster: CTAs that share their columns; stages: room for fn's terms in a group of
    columns of a stream.
    """

    block_m: int = 32
    cluster: int = 16
    stages: int = 8

    @property
    def mixing(self) -> int:
        """Warpgroups that make streams, and as many that fold them."""
        return self.block_m // TOKENS

    @property
    def threads(self) -> int:
        """Those that make streams, that fold, that multiply, and that load or own."""
        return WARPGROUP * (2 * self.mixing + 2)

    @property
    def slot_bytes(self) -> int:
        """Of a group of columns of all streams."""
        return self.block_m * STREAMS * GROUP * 2

    @property
    def owned(self) -> int:
        """Tokens whose sums meet in a CTA."""
        return self.block_m // self.cluster


SPACE = {"block_m": (16, 32), "cluster": (8, 16), "stages": (4, 6, 8, 10, 12, 16)}


def default(problem: FoldProblem) -> Config:
    """As many CTAs as may share the columns. The terms stay where there is room for all of them."""
    cluster = 16 if problem.k % (16 * GROUP) == 0 else 8
    if isinstance(problem, HyperConnectionHeadProblem):
        return Config(cluster=cluster, stages=32)
    return Config(cluster=cluster, stages=16 if problem.k <= 64 * GROUP else 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What, beside the config, a compiled kernel is made for: columns of a stream, outputs, a site to close, a norm's
    weight.
    """

    d: int
    outputs: int
    post: bool
    norm: bool

    @classmethod
    def of(cls, problem: FoldProblem, *, norm: bool) -> "Variant":
        outputs = STREAMS if isinstance(problem, HyperConnectionHeadProblem) else OUTPUTS
        return cls(d=problem.k, outputs=outputs, post=isinstance(problem, HyperConnectionPostPreProblem), norm=norm)


def term_bytes(outputs: int) -> int:
    """fn's terms in a group of a stream."""
    return TERMS * outputs * GROUP * 2


def stages(variant: Variant, config: Config) -> int:
    """Room for fn's terms in groups of columns of a stream, of which a CTA has so many at most."""
    return min(config.stages, variant.d // config.cluster // GROUP * STREAMS)


def site_groups(variant: Variant, config: Config) -> int:
    """Groups of columns of a site's output that shared memory has room for."""
    return min(AHEAD, variant.d // config.cluster // GROUP) + 1


def other_bytes(variant: Variant, config: Config) -> int:
    """Shared memory beside the streams."""
    v, c = variant, config
    inbox = OWNERS * c.block_m * (v.outputs + 1) * 4
    site = c.block_m * (COEFFICIENTS * 4 + site_groups(v, c) * GROUP * 2) if v.post else 0
    small = OWNERS * c.block_m * 16 + NORMS * c.cluster * c.block_m * 4 + v.d // c.cluster * 2 + 64
    return BARRIER_BYTES + stages(v, c) * term_bytes(v.outputs) + inbox + site + small


def slots(variant: Variant, config: Config) -> int:
    """Groups of columns that shared memory holds, and barriers are there for: with those taken early fewer than those
    of three steps, so that nobody is three steps ahead.
    """
    room = MAX_SHARED_BYTES[ARCH] - other_bytes(variant, config)
    barriers = BARRIER_BYTES // 8 - 2 * stages(variant, config) - (2 * OWNERS + NORMS)
    groups = variant.d // config.cluster // GROUP
    return min(room // config.slot_bytes, barriers // 3, 3 * groups - 1 - early(groups))


def early(groups: int) -> int:
    """How many of its groups of columns a step's folding warps take to registers before they know pre."""
    return min(EARLY, groups - 1)


def supports(problem: FoldProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or has a faster kernel, or None if it can."""
    least = LEAST_TOKENS[type(problem)]
    if problem.m < least:
        return f"m={problem.m}: below {least} tokens the Triton kernel is faster"
    return refusal(problem, config)


def refusal(problem: FoldProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, whatever m is, or None if it can."""
    p, c = problem, config
    if p.x != "bf16" or p.n != STREAMS:
        return f"{p.n} streams in {p.x}: this kernel takes {STREAMS} in bf16"
    if p.k % (GROUP * c.cluster):
        return f"k={p.k} is not a multiple of {GROUP} columns for each of {c.cluster} CTAs"
    if c.owned > 4:
        return f"{c.block_m} tokens are more than 4 for each of {c.cluster} CTAs"
    if c.block_m not in (TOKENS, 2 * TOKENS):
        return f"block_m={c.block_m}: a step has {TOKENS} or {2 * TOKENS} tokens"
    groups, held = p.k // c.cluster // GROUP, slots(Variant.of(p, norm=True), c)
    if held < groups:
        return f"shared memory holds {held} of {groups} groups of columns of {c.block_m} tokens"
    return None


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def copy_ahead(to: Int32, source: Int64, policy: Int64, *, loc=None, ip=None):
    """16 bytes of global memory on their way to shared memory, by cp.async."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (to, source, policy)]
    asm = "cp.async.cg.shared.global.L2::cache_hint [$0], [$1], 16, $2;"
    llvm.inline_asm(None, args, asm, "r,l,l", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def put_words(address: Int64, words, there: Boolean, *, loc=None, ip=None):
    """Four words to global memory, or nothing."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (address, *words, Int32(there))]
    asm = "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.global.v4.b32 [$0], {$1, $2, $3, $4}; }"
    llvm.inline_asm(None, args, asm, "l,r,r,r,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def put4(address: Int64, numbers, there: Boolean, *, loc=None, ip=None):
    """Four numbers to global memory, or nothing."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (address, *numbers, Int32(there))]
    asm = "{ .reg .pred p; setp.ne.b32 p, $5, 0; @p st.global.v4.f32 [$0], {$1, $2, $3, $4}; }"
    llvm.inline_asm(None, args, asm, "l,f,f,f,f,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def create_keeping_policy(*, loc=None, ip=None) -> Int64:
    """A cache policy of L2: evict last."""
    asm = "createpolicy.fractional.L2::evict_last.b64 $0, 1.0;"
    return Int64(llvm.inline_asm(T.i64(), [], asm, "=l", loc=loc, ip=ip))


def sigmoid(x):
    return approximately("rcp", Float32(1.0) + approximately("ex2", x * Float32(-LOG2_E)))


def split(x, y):
    """Two FP32 numbers, given as words, as sums of two BF16 numbers: words of both, the smaller first."""
    numbers = [bits_float(v) for v in (x, y)]
    high = pack_bf16(*numbers)
    return pack_bf16(*(v - h for v, h in zip(numbers, widen(high), strict=True))), high


# --- fn's terms -------------------------------------------------------------------------------------------------------


class SplitFn:
    """A CTA has the terms of 64 columns of a stream: rows of 128 bytes in the 128-byte swizzle, the smaller first."""

    def __init__(self, d: int, outputs: int):
        self.d, self.outputs = d, outputs

    @cute.jit
    def __call__(self, fn: cute.Pointer, terms: cute.Pointer, stream: cuda.CUstream):
        self.kernel(fn.toint(), terms.toint()).launch(
            grid=(STREAMS * self.d // GROUP, 1, 1),
            block=(self.outputs * GROUP // 8, 1, 1),
            stream=stream,
            use_pdl=OVERLAP,
        )

    @cute.kernel
    def kernel(self, fn: Int64, terms: Int64):
        tidx, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        output, unit = tidx // 8, tidx % 8
        at = fn + (Int64(output) * (STREAMS * self.d) + block * GROUP + 8 * unit) * 4
        x = [*fetch_words(at), *fetch_words(at + 16)]  # fn, a weight, comes while the kernel before runs
        wait()
        cute.arch.griddepcontrol_launch_dependents()
        pairs = [split(x[i], x[i + 1]) for i in range(0, 8, 2)]
        to = terms + Int64(block) * term_bytes(self.outputs)
        for t in cutlass.range_constexpr(TERMS):
            row = output + t * self.outputs
            put_words(to + row * (GROUP * 2) + (unit ^ (row % 8)) * 16, [pair[t] for pair in pairs], Boolean(True))


# --- the kernel -------------------------------------------------------------------------------------------------------


class HyperConnectionSm90:
    """Clusters walk over blocks of tokens."""

    def __init__(self, config: Config, variant: Variant):
        self.config, self.variant = config, variant
        self.columns = variant.d // config.cluster  # of a stream, a CTA's
        self.groups = self.columns // GROUP
        self.outputs = variant.outputs
        self.term_bytes = term_bytes(variant.outputs)
        self.slots = slots(variant, config)
        self.site_groups = site_groups(variant, config)
        self.stages = stages(variant, config)
        self.resident = self.stages == self.groups * STREAMS  # fn's terms are loaded once
        self.makers = 4 * config.mixing  # warps; those that fold are as many
        self.stream_bytes = config.block_m * GROUP * 2  # of a slot

    @cute.jit
    def __call__(
        self,
        h: cute.Pointer,
        site: tuple[cute.Pointer, ...],
        weights: tuple[cute.Pointer, ...],
        out: tuple[cute.Pointer, ...],
        m: Int32,
        iterations: Int32,
        max_clusters: Int32,
        stride_m: Int64,
        stride_n: Int64,
        stride_y: Int64,
        norm_eps: Float32,
        eps: Float32,
        stream: cuda.CUstream,
    ):
        """Strides count elements. site: y, post, comb and where the streams go; weights: fn's terms, base, scale and
        the norm's; out: y, post, comb.
        """
        c = self.config
        strides = (cute.assume(stride_m, divby=8), 1, cute.assume(stride_n, divby=8))
        mH = cute.make_tensor(h, cute.make_layout((m, self.variant.d, STREAMS), stride=strides))
        box = (c.block_m, GROUP, STREAMS)
        tmas = [cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mH, self.layout(), box)]
        if cutlass.const_expr(self.variant.post):
            strides = (STREAMS * self.variant.d, 1, self.variant.d)
            mO = cute.make_tensor(site[3], cute.make_layout((m, self.variant.d, STREAMS), stride=strides))
            tmas.append(cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileS2GOp(), mO, self.layout(), box))
        steps = cute.ceil_div(m, c.block_m)
        addresses = tuple(tuple(p.toint() for p in pointers) for pointers in (site, weights, out))
        self.kernel(tuple(tmas), addresses, (m, steps, iterations, stride_y), (norm_eps, eps)).launch(
            grid=(cutlass.min(steps, max_clusters) * c.cluster, 1, 1),
            block=(c.threads, 1, 1),
            cluster=(c.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,  # percent
            use_pdl=True,
        )

    def layout(self, slots: int = 0):
        """Shared [tokens, columns, streams, slots], or that of a slot: rows of 128 bytes, in the 128-byte swizzle."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        shape = (self.config.block_m, GROUP, STREAMS, *((slots,) if slots else ()))
        return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

    @cute.kernel
    def kernel(self, tmas: Any, addresses: Any, sizes: Any, numbers: Any):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tidx // 32)
        rank = block % c.cluster
        smem = SmemAllocator()
        barriers = smem.allocate_tensor(Int64, cute.make_layout(BARRIER_BYTES // 8), byte_alignment=1024).iterator
        layout = self.layout(self.slots)
        streams = smem.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        layout = cute.tile_to_shape(atom, (TERMS * self.outputs, GROUP, self.stages), order=(0, 1, 2))
        terms = smem.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        sizes_of = {
            "sums": OWNERS * c.block_m * self.outputs,
            "squares": OWNERS * c.block_m,
            "pre": OWNERS * c.block_m * STREAMS,
            "norms": NORMS * c.cluster * c.block_m,
            "weight": self.columns // 2,
        }
        if cutlass.const_expr(self.variant.post):
            sizes_of["coefficients"] = c.block_m * COEFFICIENTS
            sizes_of["site"] = self.site_groups * c.block_m * GROUP // 2
        room = {
            name: Int32(smem.allocate_tensor(Uint32, cute.make_layout(n), byte_alignment=16).iterator.toint())
            for name, n in sizes_of.items()
        }
        full, empty, made = barriers, barriers + self.slots, barriers + 2 * self.slots
        term_full = barriers + 3 * self.slots
        term_empty = term_full + self.stages
        received = term_empty + self.stages  # sums, of each owning warp; pre, of each; sums of squares of y
        bars = (full, empty, made, term_full, term_empty, received)
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.slots):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, self.readers())
                    cute.arch.mbarrier_init(made + i, self.makers)
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(term_full + i, 1)
                    cute.arch.mbarrier_init(term_empty + i, 4)
                for i in cutlass.range_constexpr(2 * OWNERS + NORMS):
                    cute.arch.mbarrier_init(received + i, 1)
                    cute.arch.mbarrier_arrive_and_expect_tx(received + i, self.expected(i))
        if cutlass.const_expr(self.variant.norm):  # noqa: SIM102
            if tidx < self.columns // 8:
                at = addresses[1][3] + Int64(rank * self.columns + 8 * tidx) * 2
                store_words(room["weight"] + 16 * tidx, fetch_words(at))
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive()  # nobody may signal a barrier that is not there yet
        cute.arch.cluster_wait()
        registers = self.registers()
        mixers = 2 * self.makers
        if warp < self.makers:
            self.have(registers[0])
            self.make(streams, room, bars, addresses, sizes, rank, tidx)
        elif warp < mixers:
            self.have(registers[1])
            self.fold(streams, room, bars, addresses, sizes, numbers, rank, tidx - 32 * self.makers)
        elif warp < mixers + 4:
            self.have(registers[2])
            self.multiply(tmas, streams, terms, room, bars, sizes, rank, tidx - 32 * mixers)
        else:
            self.have(registers[3])
            if warp == mixers + 4:
                self.load_streams(tmas[0], streams, bars, sizes, rank)
            elif warp == mixers + 5:
                cute.arch.griddepcontrol_wait()
                self.load_terms(terms, bars, addresses, sizes, rank)
            else:
                self.own(room, bars, addresses, sizes, numbers, rank, warp - (mixers + 6))
        cute.arch.cluster_arrive()  # a CTA stays until its peers have what they wait for
        cute.arch.cluster_wait()

    def readers(self) -> int:
        """Warps that say of a slot that they are done with it: all that read it, but those who make new streams in it,
        for whom all wait; of these one more, which stores them.
        """
        return self.makers + 4 + (1 if self.variant.post else self.makers)

    def registers(self) -> tuple[int, ...]:
        """Of threads that make, fold, multiply, and load or own; 0: as many as the kernel is launched with."""
        return THREAD_REGISTERS[self.variant.post] if self.config.mixing == 2 else (0, 0, 0, 0)

    @cute.jit
    def have(self, registers: cutlass.Constexpr[int]):
        """From here on a thread of this warpgroup has so many; 0: as it was."""
        at_launch = REGISTERS // self.config.threads // 8 * 8
        if cutlass.const_expr(registers >= at_launch):
            cute.arch.setmaxregister_increase(registers)
        elif cutlass.const_expr(registers):
            cute.arch.setmaxregister_decrease(registers)

    def expected(self, kind: int) -> int:
        """Bytes of a step that a barrier waits for: see `received`."""
        c = self.config
        of_norms = [c.cluster * c.block_m * 4] * NORMS
        return (*[c.block_m * (self.outputs + 1) * 4] * OWNERS, *[c.block_m * 16] * OWNERS, *of_norms)[kind]

    def clusters(self):
        """The number of this cluster, and how many there are."""
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        return block // self.config.cluster, blocks // self.config.cluster

    def next(self, slot, phase, slots: int):
        """The slot after this one, and its barriers' phase."""
        last = slot == slots - 1
        return cutlass.select_(last, Int32(0), slot + 1), cutlass.select_(last, phase ^ 1, phase)

    def partition(self, tma, streams):
        """Slots, and the tiles of global memory [step, group of columns, 0]."""
        gH = cute.flat_divide(tma.tma_tensor, (self.config.block_m, GROUP, STREAMS))
        streams, gH = cute.group_modes(streams, 0, 3), cute.group_modes(gH, 0, 3)
        return cpasync.tma_partition(tma.atom, 0, cute.make_layout(1), streams, gH)

    # --- the loading warps --------------------------------------------------------------------------------------------

    @cute.jit
    def load_streams(self, tma, streams, bars, sizes, rank):
        """Send for each group as soon as its slot has been folded, and stored."""
        c, (_, steps, _, _) = self.config, sizes
        full, empty = bars[:2]
        first, clusters = self.clusters()
        into, source = self.partition(tma, streams)
        policy = create_policy(Boolean(False))  # as usual, but said: unsaid 2 % slower, evicted first 3 to 7 % (H100)
        slot, phase = Int32(0), Int32(0)
        for step in cutlass.range(first, steps, clusters, unroll=1):
            for group in cutlass.range(self.groups, unroll=1):
                cute.arch.mbarrier_wait(empty + slot, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + slot, c.slot_bytes)
                at = source[None, step, rank * self.groups + group, 0]
                cute.copy(tma.atom, at, into[None, slot], tma_bar_ptr=full + slot, cache_policy=policy)
                slot, phase = self.next(slot, phase, self.slots)

    @cute.jit
    def load_terms(self, terms, bars, addresses, sizes, rank):
        """Send for fn's terms, group after group, stream after stream: once, where there is room for all of them."""
        _, steps, _, _ = sizes
        term_full, term_empty = bars[3:5]
        first, clusters = self.clusters()
        into = Int32(terms.iterator.toint())
        policy = create_keeping_policy()  # each step reads all of them, with more than L2 holds in between
        stage, phase = Int32(0), Int32(0)
        last = cutlass.min(first + 1, steps) if cutlass.const_expr(self.resident) else steps
        for _ in cutlass.range(first, last, clusters, unroll=1):
            for item in cutlass.range(self.groups * STREAMS, unroll=1):
                block = item % STREAMS * (self.variant.d // GROUP) + rank * self.groups + item // STREAMS
                cute.arch.mbarrier_wait(term_empty + stage, phase ^ 1)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(term_full + stage, self.term_bytes)
                    source = addresses[1][0] + Int64(block) * self.term_bytes
                    bar = Int32((term_full + stage).toint())
                    bulk_load(into + stage * self.term_bytes, source, Int32(self.term_bytes), bar, policy)
                stage, phase = self.next(stage, phase, self.stages)

    # --- the warps that make streams ----------------------------------------------------------------------------------

    @cute.jit
    def make(self, streams, room, bars, addresses, sizes, rank, thread):
        """A thread has 16 bytes of a row of each stream in each group."""
        c, (_, steps, _, _) = self.config, sizes
        full, empty, made, _, _, received = bars
        first, clusters = self.clusters()
        row, unit, start, column = self.place(streams, rank, thread)
        closes = self.variant.post
        slot, phase, turn = Int32(0), Int32(0), Int32(0)
        taken, next_place, next_step, next_group = Int32(0), Int32(0), first, Int32(0)  # of the site's output
        policy = create_policy(Boolean(False))
        if cutlass.const_expr(closes):
            self.copy_coefficients(room, addresses, sizes, policy, first, row, unit)
            for _ in cutlass.range_constexpr(self.site_groups - 1):
                self.copy_output(room, addresses, sizes, policy, next_step, row, column, next_group, next_place, thread)
                next_place, _ = self.next(next_place, Int32(0), self.site_groups)
                next_step, next_group = self.after(next_step, next_group, clusters)
        for step in cutlass.range(first, steps, clusters, unroll=1):
            of_stream = cute.make_rmem_tensor(STREAMS, Float32)  # sums of squares: one would wait for itself
            of_stream.fill(0.0)
            coefficients: list[Float32] = []
            if cutlass.const_expr(closes):
                cute.arch.cp_async_wait_group(self.site_groups - 2)
                cute.arch.sync_warp()
                own = room["coefficients"] + row * (COEFFICIENTS * 4)
                coefficients = [x for i in range(COEFFICIENTS // 4) for x in load4(own + 16 * i)]
                cute.arch.sync_warp()
                self.copy_coefficients(room, addresses, sizes, policy, step + clusters, row, unit)
            for _ in cutlass.range(self.groups, unroll=1):
                if cutlass.const_expr(closes):
                    self.copy_output(
                        room, addresses, sizes, policy, next_step, row, column, next_group, next_place, thread
                    )
                    next_place, _ = self.next(next_place, Int32(0), self.site_groups)
                    next_step, next_group = self.after(next_step, next_group, clusters)
                cute.arch.mbarrier_wait(full + slot, phase)
                at = start + slot * c.slot_bytes
                x = [load_words(at + k * self.stream_bytes) for k in range(STREAMS)]
                if cutlass.const_expr(closes):
                    cute.arch.cp_async_wait_group(self.site_groups - 1)
                    y = load_words(room["site"] + (taken * (c.block_m * GROUP // 8) + thread) * 16)
                    taken, _ = self.next(taken, Int32(0), self.site_groups)
                    x = self.close(x, y, coefficients)
                    for k in cutlass.range_constexpr(STREAMS):
                        store_words(at + k * self.stream_bytes, x[k])
                    # before TMA and the tensor core read what threads have written
                    cute.arch.fence_proxy("async.shared", space="cta")
                    self.arrive(made + slot)
                else:
                    self.release(empty + slot)
                for k in cutlass.range_constexpr(STREAMS):
                    of_stream[k] = self.add_squares(of_stream[k], x[k])
                slot, phase = self.next(slot, phase, self.slots)
            squares = self.over_row((of_stream[0] + of_stream[1]) + (of_stream[2] + of_stream[3]))
            if unit == 0:
                owner = turn % OWNERS
                place = owner * c.block_m + rank * c.owned + row // c.cluster
                push(room["squares"] + 4 * place, Int32(received.toint()) + 8 * owner, row % c.cluster, [squares])
            turn += 1
        if cutlass.const_expr(closes):
            cute.arch.cp_async_wait_group(0)  # a CTA's end does not wait for copies

    def place(self, streams, rank, thread):
        """Of a thread that makes or folds: token, 16 bytes of its row, where they lie in a slot, and their column."""
        row, unit = thread // 8, thread % 8
        start = Int32(streams.iterator.toint()) + row * (GROUP * 2) + ((unit ^ (row % 8)) * 16)
        return row, unit, start, rank * self.columns + 8 * unit

    @cute.jit
    def arrive(self, bar):
        """This warp has done its part."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bar)

    @cute.jit
    def release(self, bar):
        """This warp has read its part, which TMA may write over."""
        loads_have_come()
        self.arrive(bar)

    def after(self, step, group, clusters):
        """The step and the group of columns that follow."""
        last = group == self.groups - 1
        return cutlass.select_(last, step + clusters, step), cutlass.select_(last, Int32(0), group + 1)

    @cute.jit
    def copy_output(self, room, addresses, sizes, policy, step, row, column, group, place, thread):
        """A site's output in this thread's 8 columns of a token, on its way; of the last token for those behind."""
        token = cutlass.min(step * self.config.block_m + row, sizes[0] - 1)
        to = room["site"] + (place * (self.config.block_m * GROUP // 8) + thread) * 16
        copy_ahead(to, addresses[0][0] + (Int64(token) * sizes[3] + column + group * GROUP) * 2, policy)
        cute.arch.cp_async_commit_group()

    @cute.jit
    def copy_coefficients(self, room, addresses, sizes, policy, step, row, unit):
        """Those of a token, on their way: with the group of copies that is committed next."""
        token = Int64(cutlass.min(step * self.config.block_m + row, sizes[0] - 1))
        if unit < COEFFICIENTS // 4:
            source = addresses[0][1] + token * 16
            if unit > 0:
                source = addresses[0][2] + token * 64 + Int64(unit - 1) * 16
            copy_ahead(room["coefficients"] + row * (COEFFICIENTS * 4) + unit * 16, source, policy)

    def close(self, x, y, coefficients):
        """Streams after a site: post_k y + sum of comb_jk x_j, each operation rounded by itself."""
        made: list[list[Uint32]] = [[] for _ in range(STREAMS)]
        for i in range(4):
            wide = [widen(word[i]) for word in x]
            output = widen(y[i])
            for k in range(STREAMS):
                pair = []
                for e in range(2):
                    mixed = mul(coefficients[4 + k], wide[0][e])
                    for j in range(1, STREAMS):
                        mixed = add(mixed, mul(coefficients[4 + 4 * j + k], wide[j][e]))
                    pair.append(add(mul(coefficients[k], output[e]), mixed))
                made[k].append(pack_bf16(*pair))
        return made

    def add_squares(self, squares, words):
        for word in words:
            for x in widen(word):
                squares = fma(x, x, squares)
        return squares

    def over_row(self, x):
        """The sum over the threads of a row."""
        for by in (1, 2, 4):
            x = add(x, cute.arch.shuffle_sync_bfly(x, by))
        return x

    # --- the folding warps --------------------------------------------------------------------------------------------

    @cute.jit
    def fold(self, streams, room, bars, addresses, sizes, numbers, rank, thread):
        """A thread has 16 bytes of a row of each stream in each group; it takes those of the first groups before pre
        is there.

        Slots are fewer than the groups of three steps: who has all of a step's streams knows that those of the step
        before the last are being folded, by all threads, and so that pre has been read there.
        """
        c, (m, steps, _, _) = self.config, sizes
        full, empty, made, _, _, received = bars
        ready = made if cutlass.const_expr(self.variant.post) else full
        first, clusters = self.clusters()
        row, unit, start, column = self.place(streams, rank, thread)
        received_at = Int32(received.toint())
        held = cute.make_rmem_tensor((4, self.groups), Uint32)
        slot, phase, turn = Int32(0), Int32(0), Int32(0)
        for step in cutlass.range(first, steps, clusters, unroll=1):
            token = step * c.block_m + row
            taken = []
            for _ in cutlass.range_constexpr(early(self.groups)):
                taken.append(self.take(start, ready, empty, slot, phase))
                slot, phase = self.next(slot, phase, self.slots)
            owner = turn % OWNERS
            cute.arch.mbarrier_wait(received + OWNERS + owner, turn // OWNERS % 2)
            if thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(received + OWNERS + owner, self.expected(OWNERS))
            pre = load4(room["pre"] + 16 * (owner * c.block_m + row))
            squares = Float32(0.0)
            for group in cutlass.range_constexpr(self.groups):
                if cutlass.const_expr(group < len(taken)):
                    x = taken[group]
                else:
                    x = self.take(start, ready, empty, slot, phase)
                    slot, phase = self.next(slot, phase, self.slots)
                y = self.folded(x, pre)
                for i in cutlass.range_constexpr(4):
                    held[i, group] = y[i]
                if cutlass.const_expr(self.variant.norm):
                    squares = self.add_squares(squares, y)
            factor = Float32(1.0)
            if cutlass.const_expr(self.variant.norm):
                squares, of_step = self.over_row(squares), turn % NORMS
                norms = room["norms"] + of_step * (c.cluster * c.block_m * 4)
                arrived = 2 * OWNERS + of_step
                for i in cutlass.range_constexpr(c.cluster // 8):
                    to = norms + 4 * (rank * c.block_m + row)
                    push(to, received_at + 8 * arrived, 8 * i + unit, [squares])
                cute.arch.mbarrier_wait(received + arrived, turn // NORMS % 2)
                if thread == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(received + arrived, self.expected(2 * OWNERS))
                total = Float32(0.0)
                for i in cutlass.range_constexpr(c.cluster):
                    total = total + load_number(norms + 4 * (i * c.block_m + row))
                factor = approximately("rsqrt", fma(total, Float32(1.0 / self.variant.d), numbers[0]))
            for group in cutlass.range_constexpr(self.groups):
                y = [held[i, group] for i in range(4)]
                if cutlass.const_expr(self.variant.norm):
                    y = self.scale(y, factor, load_words(room["weight"] + 16 * (8 * group + unit)))
                at = addresses[2][0] + (Int64(token) * self.variant.d + column + group * GROUP) * 2
                put_words(at, y, token < m)
            turn += 1

    @cute.jit
    def take(self, start, ready, empty, slot, phase):
        """This thread's words of a slot, for which it is not needed any more."""
        cute.arch.mbarrier_wait(ready + slot, phase)
        at = start + slot * self.config.slot_bytes
        x = [load_words(at + k * self.stream_bytes) for k in range(STREAMS)]
        self.release(empty + slot)
        return x

    def folded(self, x, pre):
        words = []
        for i in range(4):
            wide = [widen(word[i]) for word in x]
            pair = []
            for e in range(2):
                y = mul(pre[0], wide[0][e])
                for k in range(1, STREAMS):
                    y = fma(pre[k], wide[k][e], y)
                pair.append(y)
            words.append(pack_bf16(*pair))
        return words

    def scale(self, y, factor, weight):
        """y times the norm's factor and weight."""
        pairs = [
            [mul(mul(a, factor), b) for a, b in zip(widen(v), widen(w), strict=True)]
            for v, w in zip(y, weight, strict=True)
        ]
        return [pack_bf16(*pair) for pair in pairs]

    # --- the multiplying warps ----------------------------------------------------------------------------------------

    def mma(self, accumulate: bool):
        """Rows of fn's terms by tokens, added to what was there or not."""
        mma = hopper_helpers.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (ROWS, self.config.block_m),
            a_source=warpgroup.OperandSource.RMEM,
        )
        mma.set(warpgroup.Field.ACCUMULATE, accumulate)
        return mma

    @cute.jit
    def multiply(self, tmas, streams, terms, room, bars, sizes, rank, thread):
        """The product of fn with the streams, and its way to who owns the tokens. One warp stores new streams.

        A warp has 8 outputs, in 16 rows: of each both terms, so that a thread has both. Warps without one have outputs
        of others again.
        """
        c, (_, steps, _, _) = self.config, sizes
        full, empty, made, term_full, term_empty, received = bars
        ready = made if cutlass.const_expr(self.variant.post) else full
        first, clusters = self.clusters()
        warp, lane = cute.arch.make_warp_uniform(thread // 32), thread % 32
        mma = self.mma(True)
        operand = mma.make_fragment_B(mma.get_slice(0).partition_B(streams))
        frag = [cute.make_rmem_tensor(mma.partition_shape_A((ROWS, GROUP)), BFloat16) for _ in range(2)]
        acc = cute.make_rmem_tensor(mma.partition_shape_C((ROWS, c.block_m)), Float32)
        totals = cute.make_rmem_tensor(c.block_m // 4, Float32)
        row = (8 * warp + lane % 8) % self.outputs + lane // 8 % 2 * self.outputs  # whose 16 bytes ldmatrix takes
        start = Int32(terms.iterator.toint()) + row * (GROUP * 2)
        slot, phase, stage, stage_phase, turn = Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)
        self.take_terms(frag[0], start, term_full, stage, stage_phase, row, lane)
        for step in cutlass.range(first, steps, clusters, unroll=1):
            totals.fill(0.0)
            for group in cutlass.range(self.groups, unroll=1):
                cute.arch.mbarrier_wait(ready + slot, phase)
                if cutlass.const_expr(self.variant.post):  # noqa: SIM102
                    if warp == 0:
                        into, target = self.partition(tmas[1], streams)
                        at = target[None, step, rank * self.groups + group, 0]
                        cute.copy(tmas[1].atom, into[None, slot], at)
                        cute.arch.cp_async_bulk_commit_group()
                        if group >= STORED:
                            cute.arch.cp_async_bulk_wait_group(STORED, read=True)
                            self.arrive(empty + self.behind(slot, STORED))
                for k in cutlass.range_constexpr(STREAMS):
                    self.issue(acc, frag[k % 2], operand, k, slot)
                    if cutlass.const_expr(not self.resident):
                        self.arrive(term_empty + stage)  # not before: what ldmatrix loads may still be on its way
                    stage, stage_phase = self.next(stage, stage_phase, self.stages)
                    if cutlass.const_expr(k > 0):
                        warpgroup.wait_group(1)
                    if cutlass.const_expr(k + 1 < STREAMS):
                        self.take_terms(frag[(k + 1) % 2], start, term_full, stage, stage_phase, row, lane)
                    elif step + clusters < steps or group + 1 < self.groups:
                        self.take_terms(frag[0], start, term_full, stage, stage_phase, row, lane)
                warpgroup.wait_group(0)
                self.arrive(empty + slot)
                self.add_terms(totals, acc)
                slot, phase = self.next(slot, phase, self.slots)
            owner = turn % OWNERS
            at = room["sums"] + owner * (c.block_m * self.outputs * 4)
            self.send(totals, at, Int32(received.toint()) + 8 * owner, rank, warp, lane)
            if cutlass.const_expr(self.variant.post):  # noqa: SIM102
                if warp == 0:
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                    for i in cutlass.range_constexpr(min(STORED, self.groups)):
                        self.arrive(empty + self.behind(slot, i + 1))
            turn += 1

    def behind(self, slot, count: int):
        """The slot that came so many before this one."""
        return cutlass.select_(slot < count, slot + self.slots - count, slot - count)

    @cute.jit
    def take_terms(self, frag, start, term_full, stage, phase, row, lane):
        """A warp's 16 rows of fn's terms for 64 columns of a stream, on their way to registers."""
        cute.arch.mbarrier_wait(term_full + stage, Int32(0) if self.resident else phase)
        words = cute.recast_tensor(frag, Uint32)
        for s in cutlass.range_constexpr(K_STEPS):
            got = load_matrices(start + stage * self.term_bytes + ((2 * s + lane // 16) ^ (row % 8)) * 16)
            for i in cutlass.range_constexpr(4):
                words[4 * s + i] = got[i]

    @cute.jit
    def issue(self, acc, frag, operand, k: cutlass.Constexpr[int], slot):
        """Products of 64 columns of a stream, on their way into acc: added to what is there, but the first stream's."""
        new, more = self.mma(False), self.mma(True)
        warpgroup.fence()
        for s in cutlass.range_constexpr(K_STEPS):
            tokens = operand[None, None, s, k, slot]
            cute.gemm(new if k == 0 and s == 0 else more, acc, frag[None, None, s], tokens, acc)
        warpgroup.commit_group()

    def add_terms(self, totals, acc):
        """A thread has two tokens of each eight, in rows of both terms of an output."""
        for i in range(self.config.block_m // 4):
            at = i // 2 * 4 + i % 2
            totals[i] = totals[i] + (acc[at] + acc[at + 2])

    @cute.jit
    def send(self, totals, sums, received, rank, warp, lane):
        """To the CTAs that own the tokens: two neighbouring outputs of a token at a time, for which a thread gives one
        of its tokens for the other one's output.
        """
        c = self.config
        odd = lane // 4 % 2 == 1
        pairs = []
        for i in cutlass.range_constexpr(c.block_m // 8):
            a, b = totals[2 * i], totals[2 * i + 1]
            got = cute.arch.shuffle_sync_bfly(cutlass.select_(odd, a, b), 4)
            pairs.append([cutlass.select_(odd, got, a), cutlass.select_(odd, b, got)])
        output = 8 * warp + lane // 8 * 2
        if output < self.outputs:
            for i in cutlass.range_constexpr(c.block_m // 8):
                token = 8 * i + lane % 4 * 2 + lane // 4 % 2
                place = (rank * c.owned + token // c.cluster) * self.outputs + output
                push(sums + place * 4, received, token % c.cluster, pairs[i])

    # --- the owning warps ---------------------------------------------------------------------------------------------

    @cute.jit
    def own(self, room, bars, addresses, sizes, numbers, rank, warp):
        """Coefficients of the tokens that this CTA owns: those of pre to all CTAs, the others to memory. A warp has
        every other step.
        """
        c, (m, steps, iterations, _), (norm_eps, eps) = self.config, sizes, numbers
        _, (_, base, scale, _), (_, post, comb) = addresses
        received = bars[5]
        first, clusters = self.clusters()
        lane = cute.arch.lane_idx()
        sums = room["sums"] + warp * (c.block_m * self.outputs * 4)
        squares = room["squares"] + warp * (c.block_m * 4)
        # of a token eight lanes have what pre and post are made of, or pre twice; 16 comb, then four a row of it each
        near_token, row_token = (cutlass.min(lane // n, c.owned - 1) for n in (8, STREAMS))
        closes, output = self.outputs == OUTPUTS, lane % min(8, self.outputs)
        factors = [fetch(scale + Int64(i) * 4) for i in ((output // STREAMS, 2) if closes else (0,))]
        offsets = [fetch(base + Int64(i) * 4) for i in ((output, 8 + lane % 16) if closes else (output,))]
        phase = Int32(0)
        for step in cutlass.range(first + warp * clusters, steps, OWNERS * clusters, unroll=1):
            cute.arch.mbarrier_wait(received + warp, phase)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(received + warp, self.expected(0))
            total = self.over_cluster(sums + (near_token * self.outputs + output) * 4, self.outputs)
            norm = self.over_cluster(squares + near_token * 4, 1)
            norm = approximately("rsqrt", fma(norm, Float32(1.0 / (STREAMS * self.variant.d)), norm_eps))
            near = sigmoid(total * norm * factors[0] + offsets[0])
            # read before pre leaves: with it peers go on, in the end to sums that come to the same place
            mixed = []
            for i in cutlass.range_constexpr(0, c.owned if closes else 0, 2):
                token = cutlass.min(i + lane // 16, c.owned - 1)
                total = self.over_cluster(sums + (token * self.outputs + 8 + lane % 16) * 4, self.outputs)
                mixed.append(total * cute.arch.shuffle_sync(norm, 8 * token) * factors[1] + offsets[1])
            for i in cutlass.range_constexpr(0, c.owned, 32 // c.cluster):
                token = i + lane // c.cluster
                source = 8 * cutlass.min(token, c.owned - 1)
                pre = [cute.arch.shuffle_sync(near, source + k) + eps for k in range(STREAMS)]
                if token < c.owned:
                    to = room["pre"] + 16 * (warp * c.block_m + token * c.cluster + rank)
                    push(to, Int32(received.toint()) + 8 * (OWNERS + warp), lane % c.cluster, pre)
            if cutlass.const_expr(closes):
                after = [
                    Float32(2.0) * cute.arch.shuffle_sync(near, 8 * row_token + STREAMS + k) for k in range(STREAMS)
                ]
                source = row_token % 2 * 16 + lane % STREAMS * STREAMS
                row = [cute.arch.shuffle_sync(mixed[0], source + j) for j in range(STREAMS)]
                if cutlass.const_expr(len(mixed) > 1):
                    other = [cute.arch.shuffle_sync(mixed[1], source + j) for j in range(STREAMS)]
                    row = [cutlass.select_(row_token > 1, other[j], row[j]) for j in range(STREAMS)]
                a, b, c2, e = self.sinkhorn(row, iterations, eps)
                token = step * c.block_m + row_token * c.cluster + rank
                there = lane < STREAMS * c.owned and token < m
                put4(post + Int64(token) * 16, after, there and lane % STREAMS == 0)
                put4(comb + Int64(token) * 64 + Int64(lane % STREAMS) * 16, [a, b, c2, e], there)
            phase ^= 1

    def over_cluster(self, at, outputs: int):
        """The sum of what the CTAs have sent for a token."""
        total = Float32(0.0)
        for cta in range(self.config.cluster):
            total = total + load_number(at + cta * (self.config.owned * outputs * 4))
        return total

    @cute.jit
    def sinkhorn(self, row, iterations, eps):
        top = cutlass.max(cutlass.max(row[0], row[1]), cutlass.max(row[2], row[3]))
        row = [approximately("ex2", (x - top) * Float32(LOG2_E)) for x in row]
        row = self.row_normed(row, Float32(0.0))
        row = self.columns_normed([x + eps for x in row], eps)
        a, b, c, e = row
        for _ in cutlass.range(iterations - 1, unroll=1):
            a, b, c, e = self.columns_normed(self.row_normed([a, b, c, e], eps), eps)
        return a, b, c, e

    def row_normed(self, row, eps):
        share = approximately("rcp", ((row[0] + row[1]) + (row[2] + row[3])) + eps)
        return [x * share for x in row]

    def columns_normed(self, row, eps):
        """Rows are in four neighbouring lanes."""
        normed = []
        for x in row:
            total = x + cute.arch.shuffle_sync_bfly(x, 1)
            total = total + cute.arch.shuffle_sync_bfly(total, 2)
            normed.append(x * approximately("rcp", total + eps))
        return normed


# --- host -------------------------------------------------------------------------------------------------------------

_GMEM = cute.AddressSpace.gmem


def _pointers(kinds: tuple[Any, ...], addresses: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(make_ptr(kind, p, _GMEM, assumed_align=16) for kind, p in zip(kinds, addresses, strict=True))


def _arguments(
    h: int,
    site: tuple[int, ...],
    weights: tuple[int, ...],
    out: tuple[int, ...],
    counts: tuple[int, int, int],
    strides: tuple[int, int, int],
    numbers: tuple[float, float],
) -> tuple[Any, ...]:
    """All but the stream. counts: tokens, iterations, clusters at a time; strides: of tokens and streams of h, and of
    tokens of the site's output.
    """
    return (
        *_pointers((BFloat16,), (h,)),
        _pointers((BFloat16, Float32, Float32, BFloat16), site),
        _pointers((BFloat16, Float32, Float32, BFloat16), weights),
        _pointers((BFloat16, Float32, Float32), out),
        *(Int32(x) for x in counts),
        *(Int64(x) for x in strides),
        *(Float32(x) for x in numbers),
    )


def _fake_arguments() -> tuple[Any, ...]:
    return (*_arguments(16, (16,) * 4, (16,) * 4, (16,) * 3, (1, 1, 1), (8, 8, 8), (1.0, 1.0)), make_fake_stream())


@functools.cache
def compiled_split(d: int, outputs: int) -> Any:
    """The compiled host function that makes fn's terms."""
    function, operands = SplitFn(d, outputs), (*_pointers((Float32, BFloat16), (16, 16)), make_fake_stream())
    return cross.compiled(function, *operands, arch=ARCH, module=__name__, made_for=("fn", d, outputs, OVERLAP))


@functools.cache
def compiled(config: Config, variant: Variant) -> Any:
    """The compiled host function, for every number of tokens."""
    function, made_for = HyperConnectionSm90(config, variant), (config, variant)
    return cross.compiled(function, *_fake_arguments(), arch=ARCH, module=__name__, made_for=made_for)


def build(problem: FoldProblem, config: Config, arch: str | None = None) -> Built:
    """Compile for `problem` without a GPU. Raises ValueError for another arch or what cannot run, by `refusal`."""
    if arch not in (None, ARCH):
        raise ValueError(f"this kernel is for {ARCH}, got {arch!r}")
    if reason := refusal(problem, config):
        raise ValueError(reason)
    return cross.build(HyperConnectionSm90(config, Variant.of(problem, norm=True)), *_fake_arguments(), arch=ARCH)


def build_key(problem: FoldProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on."""
    return (problem.k,)


def precompile(problem: FoldProblem, config: Config) -> None:
    """Compile for `problem` into the cache, without a GPU. Raises ValueError for what cannot run, by `refusal`."""
    if reason := refusal(problem, config):
        raise ValueError(reason)
    for norm in (True, False):
        variant = Variant.of(problem, norm=norm)
        compiled_split(problem.k, variant.outputs)
        compiled(config, variant)


@functools.cache
def _max_clusters(device: int | None, cluster: int) -> int:
    """Clusters that run at a time; device None: on an H100 that is not here."""
    if device is None:
        return SM_COUNT[ARCH] // cluster
    return max(1, HardwareInfo(device).get_max_active_clusters(cluster))


def _aligned(x: Tensor) -> Tensor:
    """x itself where its rows begin at multiples of 16 bytes, as TMA reads them; else a copy."""
    steps = [stride for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.stride(-1) != 1 or x.data_ptr() % 16 or any(step % 8 for step in steps):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def launch(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm_eps: float,
    eps: float,
    iterations: int,
    out: tuple[Tensor, ...],
    config: Config,
    site: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """y [tokens, d], post [tokens, 4] and comb [tokens, 4, 4] of h [tokens, 4, d], on the current stream; the head's y
    alone where out has but one.

    site: a site's output y, post and comb, and room for the streams that it leaves of h: these are then folded.

    Raises ValueError for what cannot run, by `refusal`: any number of tokens can.
    """
    tokens, n, d = h.shape
    alone: type[FoldProblem] = HyperConnectionPreProblem if len(out) == 3 else HyperConnectionHeadProblem
    kind = alone if site is None else HyperConnectionPostPreProblem
    x = "bf16" if h.dtype == torch.bfloat16 else str(h.dtype)
    problem = kind(m=tokens, k=d, n=n, x=x)
    if reason := refusal(problem, config):
        raise ValueError(reason)
    if tokens == 0:
        return
    h = _aligned(h)
    if site is not None:
        site = (_aligned(site[0]), *site[1:])
    fn = _aligned(fn.contiguous())
    variant = Variant.of(problem, norm=weight is not None)
    terms = torch.empty(TERMS * variant.outputs * n * d, dtype=torch.bfloat16, device=h.device)
    weights = (terms, base, scale, base if weight is None else _aligned(weight))
    strides = (
        h.stride(0) if tokens > 1 else STREAMS * d,
        h.stride(1),
        site[0].stride(0) if site is not None and tokens > 1 else d,
    )
    clusters = _max_clusters(h.device.index if h.is_cuda else None, config.cluster)
    arguments = _arguments(
        h.data_ptr(),
        tuple(t.data_ptr() for t in (site or (h,) * 4)),
        tuple(t.data_ptr() for t in weights),
        tuple(t.data_ptr() for t in (out if len(out) == 3 else out * 3)),
        (tokens, iterations, clusters),
        strides,
        (norm_eps, eps),
    )
    function = compiled(config, variant)
    split_fn, operands = (
        compiled_split(d, variant.outputs),
        _pointers((Float32, BFloat16), (fn.data_ptr(), terms.data_ptr())),
    )
    if h.is_cuda:
        with torch.cuda.device(h.device):
            stream = cuda.CUstream(torch.cuda.current_stream().cuda_stream)
            split_fn(*operands, stream)
            function(*arguments, stream)
    else:  # CPU tensors, where an emulator stands in for the CUDA runtime
        split_fn(*operands, cuda.CUstream(0))
        function(*arguments, cuda.CUstream(0))


def warm(problem: FoldProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    precompile(problem, config)
    if torch.cuda.is_available():
        k, n, variant = problem.k, problem.n, Variant.of(problem, norm=True)
        h, post, comb = (torch.zeros(1, *shape, device="cuda") for shape in ((n, k), (n,), (n, n)))
        h, fn = h.bfloat16(), h.new_zeros(variant.outputs, n * k)
        base, scale, weight = fn.new_zeros(variant.outputs), fn.new_zeros(3), h.new_zeros(k)
        out = (h.new_empty(1, k), torch.empty_like(post), torch.empty_like(comb))[: 1 if variant.outputs == n else 3]
        site = (h[:, 0], post, comb, torch.empty_like(h)) if variant.post else None
        for norm in (weight, None):
            launch(h, fn, base, scale, norm, 1.0, 1.0, 1, out, config, site)
