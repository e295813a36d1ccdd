"""Hyper-connections on Hopper that read the streams once: `hyper_connection_pre` and `hyper_connection_post_pre`.

Memory bound: reads 8 bytes a column of four BF16 streams and writes 2; with a site to close 10 and 10. fn, FP32
[24, 4 d], is read from L2 once a step.

A cluster takes block_m tokens a step, and each of its CTAs a share of the columns of all four streams, which stay in
shared memory until they are folded. Columns come in groups of 64 of each stream.

    mix       eight threads a token, 8 columns of each stream each: make the streams that a site leaves, in place, and
              store them; sum squares; later fold the streams. One warp sends for groups by TMA as soon as there is
              room: some of the next step's are on their way while this step's coefficients are
    multiply  four warps, one a stream: rows of the MMA are outputs, of which fn comes from L2 to registers in FP32 and
              is split there into three BF16 terms, exactly; columns are tokens, from shared memory. Sums of 16 columns
              leave the tensor core, which truncates, for FP32 sums
    own       the sums of a token meet in one CTA of the cluster, which adds them in the order of the CTAs; pre goes
              back to all. A warp of `multiply` has a token, whose Sinkhorn nobody waits for
    norm      sums of squares of y go from each CTA to all others, who add them in one order

What CTAs send each other is counted by mbarriers of the receiver (st.async). No bit depends on m, on other tokens or on
when anything arrives.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import cpasync, warpgroup
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from cutlass.utils import HardwareInfo
from torch import Tensor

from fp4suite.built import MAX_SHARED_BYTES, Built
from fp4suite.problem import HyperConnectionPostPreProblem, HyperConnectionPreProblem

from . import build as cross
from .gemm_nvfp4_sm90_wgmma import SM_COUNT, create_policy, load4, load_matrices, pack_bf16, push4
from .nvfp4 import mma_16816

ARCH = "sm_90a"
STREAMS = 4
OUTPUTS = STREAMS * (STREAMS + 2)
GROUP = 64  # columns of a group: rows of 128 bytes of shared memory
WARPGROUP = 128
TOKENS = 16  # that a warpgroup mixes
BARRIER_BYTES = 1024
REGISTERS = 65536  # of an SM
MIXER_REGISTERS, MULTIPLIER_REGISTERS = 112, 176
LOG2_E = 1.4426950408889634

FoldProblem = HyperConnectionPreProblem | HyperConnectionPostPreProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m: tokens of a step; cluster: CTAs that share their columns."""

    block_m: int = 48
    cluster: int = 16

    @property
    def threads(self) -> int:
        return WARPGROUP * (self.block_m // TOKENS + 1)

    @property
    def slot_bytes(self) -> int:
        """Of a group of columns of all streams."""
        return self.block_m * STREAMS * GROUP * 2

    @property
    def owned(self) -> int:
        """Tokens whose sums meet in a CTA, at most."""
        return -(-self.block_m // self.cluster)


SPACE = {"block_m": (16, 32, 48), "cluster": (8, 16)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What, beside the config, a compiled kernel is made for: columns of a stream, a site to close, a norm's weight."""

    d: int
    post: bool
    norm: bool


def other_bytes(d: int, config: Config) -> int:
    """Shared memory beside the streams."""
    c = config
    parts = STREAMS * c.block_m * OUTPUTS * 4
    inbox = 2 * c.cluster * c.owned * (OUTPUTS + 1) * 4
    return BARRIER_BYTES + parts + inbox + c.block_m * 16 + c.cluster * c.block_m * 4 + d // c.cluster * 2 + 128


def slots(d: int, config: Config) -> int:
    """Groups of columns that shared memory holds: those of two steps at most."""
    room = MAX_SHARED_BYTES[ARCH] - other_bytes(d, config)
    return min(room // config.slot_bytes, 2 * (d // config.cluster // GROUP))


def supports(problem: FoldProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    p, c = problem, config
    if p.x != "bf16" or p.n != STREAMS:
        return f"{p.n} streams in {p.x}: this kernel takes {STREAMS} in bf16"
    if p.k % (GROUP * c.cluster):
        return f"k={p.k} is not a multiple of {GROUP} columns for each of {c.cluster} CTAs"
    if c.owned > STREAMS:
        return f"{c.block_m} tokens are more than {STREAMS} for each of {c.cluster} CTAs"
    groups = p.k // c.cluster // GROUP
    if slots(p.k, c) < groups:
        return f"shared memory holds {slots(p.k, c)} of {groups} groups of columns of {c.block_m} tokens"
    return None


def default(problem: FoldProblem) -> Config:
    """The most tokens that shared memory holds, with clusters of 16."""
    return Config()


def arithmetic(problem: FoldProblem, config: Config) -> str:
    """In which order a config sums: columns are shared by CTAs."""
    return f"columns of {config.cluster} CTAs"


INVARIANT = f"columns of {Config().cluster} CTAs"


def in_arithmetic(problem: FoldProblem, wanted: str) -> Config | None:
    """The config that sums so; None if there is none."""
    configs = (replace(default(problem), cluster=c) for c in SPACE["cluster"])
    return next((c for c in configs if arithmetic(problem, c) == wanted and supports(problem, c) is None), None)


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def load_words(address: Int32, *, loc=None, ip=None):
    """Four words of shared memory."""
    kind = llvm.StructType.get_literal([T.i32()] * 4)
    asm = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
    args = [address.ir_value(loc=loc, ip=ip)]
    got = llvm.inline_asm(kind, args, asm, "=r,=r,=r,=r,r", has_side_effects=True, loc=loc, ip=ip)
    return [Uint32(llvm.extractvalue(T.i32(), got, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def store_words(address: Int32, words, *, loc=None, ip=None):
    """Four words to shared memory."""
    args = [x.ir_value(loc=loc, ip=ip) for x in (address, *words)]
    asm = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
    llvm.inline_asm(None, args, asm, "r,r,r,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def load_number(address: Int32, *, loc=None, ip=None) -> Float32:
    """One number of shared memory."""
    args = [address.ir_value(loc=loc, ip=ip)]
    asm = "ld.shared.f32 $0, [$1];"
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def store_number(address: Int32, x: Float32, *, loc=None, ip=None):
    """One number to shared memory."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (address, x)]
    llvm.inline_asm(None, args, "st.shared.f32 [$0], $1;", "r,f", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def fetch_words(address: Int64, *, loc=None, ip=None):
    """Four words of global memory that nobody writes meanwhile."""
    kind = llvm.StructType.get_literal([T.i32()] * 4)
    asm = "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];"
    args = [address.ir_value(loc=loc, ip=ip)]
    got = llvm.inline_asm(kind, args, asm, "=r,=r,=r,=r,l", has_side_effects=True, loc=loc, ip=ip)
    return [Uint32(llvm.extractvalue(T.i32(), got, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def fetch4(address: Int64, *, loc=None, ip=None):
    """Four numbers of global memory that nobody writes meanwhile."""
    kind = llvm.StructType.get_literal([T.f32()] * 4)
    asm = "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];"
    args = [address.ir_value(loc=loc, ip=ip)]
    got = llvm.inline_asm(kind, args, asm, "=f,=f,=f,=f,l", has_side_effects=True, loc=loc, ip=ip)
    return [Float32(llvm.extractvalue(T.f32(), got, [i], loc=loc, ip=ip)) for i in range(4)]


@dsl_user_op
def fetch2(address: Int64, *, loc=None, ip=None):
    """Two numbers of global memory, as words; L1 does not keep them."""
    kind = llvm.StructType.get_literal([T.i32()] * 2)
    asm = "ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];"
    args = [address.ir_value(loc=loc, ip=ip)]
    got = llvm.inline_asm(kind, args, asm, "=r,=r,l", has_side_effects=True, loc=loc, ip=ip)
    return [Uint32(llvm.extractvalue(T.i32(), got, [i], loc=loc, ip=ip)) for i in range(2)]


@dsl_user_op
def fetch(address: Int64, *, loc=None, ip=None) -> Float32:
    """One number of global memory that nobody writes meanwhile."""
    asm = "ld.global.nc.f32 $0, [$1];"
    args = [address.ir_value(loc=loc, ip=ip)]
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,l", has_side_effects=True, loc=loc, ip=ip))


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
def push(address: Int32, barrier: Int32, rank: Int32, x: Float32, *, loc=None, ip=None):
    """One number to a CTA of the cluster, to shared memory that a barrier counts; addresses are as in this CTA."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (address, barrier, rank, x)]
    asm = (
        "{ .reg .b32 to, bar; mapa.shared::cluster.u32 to, $0, $2; mapa.shared::cluster.u32 bar, $1, $2; "
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [to], $3, [bar]; }"
    )
    llvm.inline_asm(None, args, asm, "r,r,r,f", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def mul(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """Rounded by itself, whatever is done with it."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y)]
    return Float32(llvm.inline_asm(T.f32(), args, "mul.rn.f32 $0, $1, $2;", "=f,f,f", loc=loc, ip=ip))


@dsl_user_op
def add(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """Rounded by itself, whatever is done with it."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y)]
    return Float32(llvm.inline_asm(T.f32(), args, "add.rn.f32 $0, $1, $2;", "=f,f,f", loc=loc, ip=ip))


@dsl_user_op
def fma(x: Float32, y: Float32, z: Float32, *, loc=None, ip=None) -> Float32:
    """x y + z."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y, z)]
    return Float32(llvm.inline_asm(T.f32(), args, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", loc=loc, ip=ip))


@dsl_user_op
def approximately(function: str, x: Float32, *, loc=None, ip=None) -> Float32:
    """rcp, rsqrt or ex2 as the hardware has it."""
    args = [x.ir_value(loc=loc, ip=ip)]
    return Float32(llvm.inline_asm(T.f32(), args, f"{function}.approx.ftz.f32 $0, $1;", "=f,f", loc=loc, ip=ip))


@dsl_user_op
def number(x: Uint32, *, loc=None, ip=None) -> Float32:
    """A word's bits as FP32."""
    return Float32(llvm.bitcast(T.f32(), x.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def bits(x: Float32, *, loc=None, ip=None) -> Uint32:
    return Uint32(llvm.bitcast(T.i32(), x.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def upper_halves(low: Uint32, high: Uint32, *, loc=None, ip=None) -> Uint32:
    """Of two words, in one: two FP32 numbers cut off to BF16."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (low, high)]
    return Uint32(llvm.inline_asm(T.i32(), args, "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", loc=loc, ip=ip))


def widen(word):
    """Two BF16 numbers of a word."""
    return number(word << Uint32(16)), number(word & Uint32(0xFFFF0000))


def sigmoid(x):
    return approximately("rcp", Float32(1.0) + approximately("ex2", x * Float32(-LOG2_E)))


def split(x, y):
    """Two FP32 numbers, given as words, as sums of three BF16 numbers: words of both, the smallest first."""
    high = upper_halves(x, y)
    x, y = (bits(number(v) - number(v & Uint32(0xFFFF0000))) for v in (x, y))
    middle = upper_halves(x, y)
    x, y = (bits(number(v) - number(v & Uint32(0xFFFF0000))) for v in (x, y))
    return upper_halves(x, y), middle, high


# --- the kernel -------------------------------------------------------------------------------------------------------


class HyperConnectionSm90:
    """Clusters walk over blocks of tokens."""

    def __init__(self, config: Config, variant: Variant):
        self.config, self.variant = config, variant
        self.columns = variant.d // config.cluster  # of a stream, a CTA's
        self.groups = self.columns // GROUP
        self.slots = slots(variant.d, config)
        self.tiles = config.block_m // 8  # of the MMA
        self.mixers = config.block_m // 4  # warps
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
        """Strides count elements. site: y, post, comb and where the streams go; weights: fn, base, scale and the
        norm's; out: y, post, comb.
        """
        c = self.config
        strides = (cute.assume(stride_m, divby=8), 1, cute.assume(stride_n, divby=8))
        mH = cute.make_tensor(h, cute.make_layout((m, self.variant.d, STREAMS), stride=strides))
        box = (c.block_m, GROUP, STREAMS)
        tma = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), mH, self.layout(1), box)
        steps = cute.ceil_div(m, c.block_m)
        addresses = tuple(tuple(p.toint() for p in pointers) for pointers in (site, weights, out))
        self.kernel(tma, addresses, (m, steps, iterations, stride_y), (norm_eps, eps)).launch(
            grid=(cutlass.min(steps, max_clusters) * c.cluster, 1, 1),
            block=(c.threads, 1, 1),
            cluster=(c.cluster, 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            preferred_smem_carveout=100,  # percent
        )

    def layout(self, slots: int):
        """Shared [tokens, columns, streams, slots]: rows of 128 bytes, in the 128-byte swizzle."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        shape = (self.config.block_m, GROUP, STREAMS, slots)[: 3 if slots == 1 else 4]
        return cute.tile_to_shape(atom, shape, order=tuple(range(len(shape))))

    @cute.kernel
    def kernel(self, tma: Any, addresses: Any, sizes: Any, numbers: Any):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(tidx // 32)
        rank = block % c.cluster
        smem = SmemAllocator()
        barriers = smem.allocate_tensor(Int64, cute.make_layout(BARRIER_BYTES // 8), byte_alignment=1024).iterator
        layout = self.layout(self.slots)
        streams = smem.allocate_tensor(BFloat16, layout.outer, byte_alignment=1024, swizzle=layout.inner)
        sizes_of = {
            "parts": STREAMS * c.block_m * OUTPUTS,
            "sums": 2 * c.cluster * c.owned * OUTPUTS,
            "squares": 2 * c.cluster * c.owned,
            "pre": c.block_m * STREAMS,
            "norms": c.cluster * c.block_m,
            "weight": self.columns // 2,
        }
        room = {
            name: Int32(smem.allocate_tensor(Uint32, cute.make_layout(n), byte_alignment=16).iterator.toint())
            for name, n in sizes_of.items()
        }
        full, empty, made = barriers, barriers + self.slots, barriers + 2 * self.slots
        received = barriers + 3 * self.slots  # sums, in turn in two places; pre; sums of squares of y
        bars = (full, empty, made, received)
        if warp == 0:
            with cute.arch.elect_one():
                for i in cutlass.range_constexpr(self.slots):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, self.mixers)
                    cute.arch.mbarrier_init(made + i, self.mixers)
                for i in cutlass.range_constexpr(4):
                    cute.arch.mbarrier_init(received + i, 1)
                for i in cutlass.range_constexpr(4):
                    cute.arch.mbarrier_arrive_and_expect_tx(received + i, self.expected(min(i, 2) + i // 3, rank))
        if cutlass.const_expr(self.variant.norm):  # noqa: SIM102
            if tidx < self.columns // 8:
                at = addresses[1][3] + Int64(rank * self.columns + 8 * tidx) * 2
                store_words(room["weight"] + 16 * tidx, fetch_words(at))
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive()  # nobody may signal a barrier that is not there yet
        cute.arch.cluster_wait()
        spread = REGISTERS // c.threads < MULTIPLIER_REGISTERS
        if warp < STREAMS:
            if cutlass.const_expr(spread):
                cute.arch.setmaxregister_increase(MULTIPLIER_REGISTERS)
            self.multiply(streams, room, bars, addresses, sizes, numbers, rank, warp)
        else:
            if cutlass.const_expr(spread):
                cute.arch.setmaxregister_decrease(MIXER_REGISTERS)
            self.mix(tma, streams, room, bars, addresses, sizes, numbers, rank, tidx - WARPGROUP)
        cute.arch.cluster_arrive()  # a CTA stays until its peers have what they wait for
        cute.arch.cluster_wait()

    def expected(self, kind: int, rank):
        """Bytes of a step that a barrier waits for. kind: 0 and 1 sums, 2 pre, 3 sums of squares of y."""
        c = self.config
        if kind == 2:
            return c.block_m * 16
        if kind == 3:
            return c.cluster * c.block_m * 4
        return (c.block_m - rank + c.cluster - 1) // c.cluster * (c.cluster * (OUTPUTS + 1) * 4)

    def clusters(self):
        """The number of this cluster, and how many there are."""
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        return block // self.config.cluster, blocks // self.config.cluster

    # --- the mixing warps ---------------------------------------------------------------------------------------------

    @cute.jit
    def load(self, copy, full, steps, rank, step, group, slot):
        """Send for a group of a step, if there is that step. Which comes then: step, group and slot."""
        c, (atom, source, to) = self.config, copy
        _, clusters = self.clusters()
        if step < steps:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, c.slot_bytes)
            policy = create_policy(Boolean(True))  # nobody reads them again
            at = source[None, step, rank * self.groups + group, 0]
            cute.copy(atom, at, to[None, slot], tma_bar_ptr=full + slot, cache_policy=policy)
        last = group == self.groups - 1
        step = cutlass.select_(last, step + clusters, step)
        group = cutlass.select_(last, Int32(0), group + 1)
        return step, group, cutlass.select_(slot == self.slots - 1, Int32(0), slot + 1)

    def next(self, slot, phase):
        """The slot after this one, and its barriers' phase."""
        last = slot == self.slots - 1
        return cutlass.select_(last, Int32(0), slot + 1), cutlass.select_(last, phase ^ 1, phase)

    @cute.jit
    def mix(self, tma, streams, room, bars, addresses, sizes, numbers, rank, thread):
        """A thread has 16 bytes of a row of each stream in each group. The first warp sends for streams."""
        c, (m, steps, _, _) = self.config, sizes
        full, empty, made, received = bars
        first, clusters = self.clusters()
        warp = cute.arch.make_warp_uniform(thread // 32)
        gH = cute.flat_divide(tma.tma_tensor, (c.block_m, GROUP, STREAMS))
        into, source = cpasync.tma_partition(
            tma.atom, 0, cute.make_layout(1), cute.group_modes(streams, 0, 3), cute.group_modes(gH, 0, 3)
        )
        copy, load_step, load_group, load_slot = (tma.atom, source, into), first, Int32(0), Int32(0)
        if warp == 0:
            for _ in cutlass.range(self.slots, unroll=1):
                load_step, load_group, load_slot = self.load(copy, full, steps, rank, load_step, load_group, load_slot)
        row, unit = thread // 8, thread % 8
        start = Int32(streams.iterator.toint()) + row * (GROUP * 2) + ((unit ^ (row % 8)) * 16)
        column = rank * self.columns + 8 * unit
        received_at = Int32(received.toint())
        coefficients = cute.make_rmem_tensor(20, Float32)
        ahead = cute.make_rmem_tensor((4, 2), Uint32)  # of the site's output: this group's and the next one's
        held = cute.make_rmem_tensor((4, self.groups), Uint32)
        slot, phase, turn = Int32(0), Int32(0), Int32(0)
        if cutlass.const_expr(self.variant.post):
            self.fetch_site(coefficients, ahead, addresses, sizes, first, row, column)
        for step in cutlass.range(first, steps, clusters, unroll=1):
            token = step * c.block_m + row
            there = token < m
            squares = Float32(0.0)
            at_slot, at_phase = slot, phase
            for group in cutlass.range(self.groups, unroll=1):
                cute.arch.mbarrier_wait(full + at_slot, at_phase)
                at = start + at_slot * c.slot_bytes
                if cutlass.const_expr(self.variant.post):
                    x = [load_words(at + k * self.stream_bytes) for k in range(STREAMS)]
                    y = [ahead[i, 0] for i in range(4)]
                    beyond = cutlass.min(group + 2, self.groups - 1)
                    later = self.fetch_output(addresses, sizes, step, row, column, beyond)
                    for i in cutlass.range_constexpr(4):
                        ahead[i, 0] = ahead[i, 1]
                        ahead[i, 1] = later[i]
                    x = self.close(x, y, coefficients)
                    to = addresses[0][3] + (Int64(token) * (STREAMS * self.variant.d) + column + group * GROUP) * 2
                    for k in cutlass.range_constexpr(STREAMS):
                        store_words(at + k * self.stream_bytes, x[k])
                        put_words(to + k * (self.variant.d * 2), x[k], there)
                    self.arrive(made + at_slot)
                else:
                    x = [load_words(at + k * self.stream_bytes) for k in range(STREAMS)]
                for k in cutlass.range_constexpr(STREAMS):
                    squares = self.add_squares(squares, x[k])
                at_slot, at_phase = self.next(at_slot, at_phase)
            squares = self.over_row(squares)
            if unit == 0:
                place = (turn % 2 * c.cluster + rank) * c.owned + row // c.cluster
                push(room["squares"] + 4 * place, received_at + 8 * (turn % 2), row % c.cluster, squares)

            cute.arch.mbarrier_wait(received + 2, turn % 2)
            if thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(received + 2, self.expected(2, rank))
            pre = load4(room["pre"] + 16 * row)
            squares = Float32(0.0)
            for group in cutlass.range_constexpr(self.groups):
                at = start + slot * c.slot_bytes
                x = [load_words(at + k * self.stream_bytes) for k in range(STREAMS)]
                if cutlass.const_expr(self.variant.post):
                    cute.arch.fence_proxy("async.shared", space="cta")  # before TMA writes where threads have written
                self.arrive(empty + slot)
                y = self.fold(x, pre)
                for i in cutlass.range_constexpr(4):
                    held[i, group] = y[i]
                if cutlass.const_expr(self.variant.norm):
                    squares = self.add_squares(squares, y)
                if warp == 0:
                    cute.arch.mbarrier_wait(empty + slot, phase)
                    load_step, load_group, load_slot = self.load(
                        copy, full, steps, rank, load_step, load_group, load_slot
                    )
                slot, phase = self.next(slot, phase)
            if cutlass.const_expr(self.variant.norm):
                squares = self.over_row(squares)
                for i in cutlass.range_constexpr(c.cluster // 8):
                    to = room["norms"] + 4 * (rank * c.block_m + row)
                    push(to, received_at + 24, 8 * i + unit, squares)
            if cutlass.const_expr(self.variant.post):
                self.fetch_site(coefficients, ahead, addresses, sizes, step + clusters, row, column)
            factor = Float32(1.0)
            if cutlass.const_expr(self.variant.norm):
                cute.arch.mbarrier_wait(received + 3, turn % 2)
                if thread == 0:
                    cute.arch.mbarrier_arrive_and_expect_tx(received + 3, self.expected(3, rank))
                total = Float32(0.0)
                for i in cutlass.range_constexpr(c.cluster):
                    total = total + load_number(room["norms"] + 4 * (i * c.block_m + row))
                factor = approximately("rsqrt", fma(total, Float32(1.0 / self.variant.d), numbers[0]))
            for group in cutlass.range_constexpr(self.groups):
                y = [held[i, group] for i in range(4)]
                if cutlass.const_expr(self.variant.norm):
                    y = self.scale(y, factor, load_words(room["weight"] + 16 * (8 * group + unit)))
                put_words(addresses[2][0] + (Int64(token) * self.variant.d + column + group * GROUP) * 2, y, there)
            turn += 1

    @cute.jit
    def arrive(self, bar):
        """This warp has done its part."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bar)

    def fetch_output(self, addresses, sizes, step, row, column, group):
        """The site's output in 8 columns of a token; of the last one for those behind."""
        token = cutlass.min(step * self.config.block_m + row, sizes[0] - 1)
        return fetch_words(addresses[0][0] + (Int64(token) * sizes[3] + column + group * GROUP) * 2)

    def fetch_site(self, coefficients, ahead, addresses, sizes, step, row, column):
        """The coefficients of a token: four of post, then rows of comb; the site's output in its first two groups."""
        token = Int64(cutlass.min(step * self.config.block_m + row, sizes[0] - 1))
        got = [fetch4(addresses[0][1] + token * 16), *(fetch4(addresses[0][2] + token * 64 + 16 * j) for j in range(4))]
        for i in range(20):
            coefficients[i] = got[i // 4][i % 4]
        for group in range(2):
            y = self.fetch_output(addresses, sizes, step, row, column, min(group, self.groups - 1))
            for i in range(4):
                ahead[i, group] = y[i]

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

    def fold(self, x, pre):
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

    # --- the multiplying warps ----------------------------------------------------------------------------------------

    @cute.jit
    def multiply(self, streams, room, bars, addresses, sizes, numbers, rank, warp):
        """The warp of a stream: its product with fn; then what the CTA's tokens become of the cluster's sums."""
        c, d = self.config, self.variant.d
        _, steps, _, _ = sizes
        full, _, made, received = bars
        ready = made if cutlass.const_expr(self.variant.post) else full
        first, clusters = self.clusters()
        lane = cute.arch.lane_idx()
        column = warp * d + rank * self.columns + lane % 4 * 2  # of fn
        source = addresses[1][0] + (Int64(lane // 4) * (STREAMS * d) + column) * 4
        # of ldmatrix: lanes 0 to 7 have a tile's rows of 8 columns, 8 to 15 of the 8 beside, 16 to 31 those of the next
        start = Int32(streams.iterator.toint()) + warp * self.stream_bytes + (lane // 16 * 8 + lane % 8) * (GROUP * 2)
        fn = [cute.make_rmem_tensor(12, Uint32) for _ in range(GROUP // 16)]
        totals = cute.make_rmem_tensor((6, self.tiles), Float32)
        for part in cutlass.range_constexpr(GROUP // 16):
            self.fetch_fn(fn[part], source + 64 * part)
        slot, phase, turn = Int32(0), Int32(0), Int32(0)
        for step in cutlass.range(first, steps, clusters, unroll=1):
            for tile in cutlass.range_constexpr(self.tiles):
                for i in cutlass.range_constexpr(6):
                    totals[i, tile] = Float32(0.0)
            for group in cutlass.range(self.groups, unroll=1):
                later = group + 1
                if later == self.groups:
                    later = Int32(0)
                cute.arch.mbarrier_wait(ready + slot, phase)
                at = start + slot * c.slot_bytes
                for part in cutlass.range_constexpr(GROUP // 16):
                    factors = self.factors(fn[part])
                    self.fetch_fn(fn[part], source + Int64(later * (GROUP * 4)) + 64 * part)
                    self.products(totals, factors, at + ((2 * part + lane // 8 % 2) ^ (lane % 8)) * 16)
                slot, phase = self.next(slot, phase)
            self.send(totals, room, Int32(received.toint()), rank, warp, lane, turn)
            cute.arch.mbarrier_wait(received + turn % 2, turn // 2 % 2)
            if warp == 0:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(received + turn % 2, self.expected(0, rank))
            if warp * c.cluster + rank < c.block_m:
                self.own(room, Int32(received.toint()), addresses, sizes, numbers, rank, warp, lane, step, turn)
            turn += 1

    def fetch_fn(self, fn, source):
        """Of 16 columns, what this lane has in the MMA's operand: pairs of columns of rows lane // 4 + 0, 8 and 16."""
        for row in range(3):
            for i in range(2):
                pair = fetch2(source + (8 * row * STREAMS * self.variant.d + 8 * i) * 4)
                for e in range(2):
                    fn[4 * row + 2 * i + e] = pair[e]

    def factors(self, fn):
        """Operands of the MMA for outputs 0 to 15 and 16 to 23. The former take three, the smallest terms first; the
        latter two: their smallest terms, then the others, one in rows 0 to 7, one in rows 8 to 15.
        """
        words = [[split(fn[4 * row + 2 * i], fn[4 * row + 2 * i + 1]) for i in range(2)] for row in range(3)]
        first = [[words[row][i][t] for i in range(2) for row in range(2)] for t in range(3)]
        (low0, middle0, high0), (low1, middle1, high1) = words[2]
        return first, [[low0, Uint32(0), low1, Uint32(0)], [high0, middle0, high1, middle1]]

    def products(self, totals, factors, at):
        """Of 16 columns of this warp's stream, added to the sums of each token."""
        zeros = [Float32(0.0)] * 4
        for tile in range(0, self.tiles, 2):
            got = load_matrices(at + tile * (8 * GROUP * 2))
            sums = [[zeros, zeros] for _ in range(2)]
            for kind in range(2):
                for factor in factors[kind]:
                    for i in range(2):
                        sums[i][kind] = mma_16816(factor, got[2 * i : 2 * i + 2], sums[i][kind])
            for i in range(2):
                first, last = sums[i]
                for e in range(4):
                    totals[e, tile + i] = totals[e, tile + i] + first[e]
                for e in range(2):
                    totals[4 + e, tile + i] = totals[4 + e, tile + i] + (last[e] + last[2 + e])

    @cute.jit
    def send(self, totals, room, received, rank, warp, lane, turn):
        """Add up the streams' sums, and send each token's to the CTA that owns it."""
        c = self.config
        thread = warp * 32 + lane
        cute.arch.barrier(barrier_id=1, number_of_threads=WARPGROUP)  # the step before has been sent
        at = room["parts"] + ((warp * c.block_m + lane % 4 * 2) * OUTPUTS + lane // 4) * 4
        for tile in cutlass.range_constexpr(self.tiles):
            for i in cutlass.range_constexpr(6):
                store_number(at + ((8 * tile + i % 2) * OUTPUTS + i // 2 * 8) * 4, totals[i, tile])
        cute.arch.barrier(barrier_id=1, number_of_threads=WARPGROUP)
        pieces = OUTPUTS // 4  # of four outputs, a token's
        for item in cutlass.range(thread, c.block_m * pieces, WARPGROUP, unroll=1):
            token, piece = item // pieces, item % pieces
            parts = [load4(room["parts"] + (w * c.block_m * pieces + item) * 16) for w in range(STREAMS)]
            sums = [(parts[0][e] + parts[1][e]) + (parts[2][e] + parts[3][e]) for e in range(4)]
            place = (turn % 2 * c.cluster + rank) * c.owned + token // c.cluster
            push4(room["sums"] + (place * pieces + piece) * 16, received + 8 * (turn % 2), token % c.cluster, sums)

    @cute.jit
    def own(self, room, received, addresses, sizes, numbers, rank, warp, lane, step, turn):
        """Coefficients of a token that this CTA owns: those of pre to all CTAs, the others to memory."""
        c, (m, _, iterations, _), (norm_eps, eps) = self.config, sizes, numbers
        _, (_, base, scale, _), (_, post, comb) = addresses
        output = cutlass.min(lane, OUTPUTS - 1)
        total, squares = Float32(0.0), Float32(0.0)
        for cta in cutlass.range_constexpr(c.cluster):
            place = (turn % 2 * c.cluster + cta) * c.owned + warp
            total = total + load_number(room["sums"] + (place * OUTPUTS + output) * 4)
            squares = squares + load_number(room["squares"] + place * 4)
        norm = approximately("rsqrt", fma(squares, Float32(1.0 / (STREAMS * self.variant.d)), norm_eps))
        kind = cutlass.min(output // STREAMS, 2)
        logit = total * norm * fetch(scale + Int64(kind) * 4) + fetch(base + Int64(output) * 4)
        near = sigmoid(logit)
        pre = [cute.arch.shuffle_sync(near, i) + eps for i in range(STREAMS)]
        after = [Float32(2.0) * cute.arch.shuffle_sync(near, STREAMS + i) for i in range(STREAMS)]
        at = warp * c.cluster + rank
        if lane < c.cluster:
            push4(room["pre"] + 16 * at, received + 16, lane, pre)
        token = step * c.block_m + at
        row = [cute.arch.shuffle_sync(logit, 2 * STREAMS + lane % 4 * 4 + j) for j in range(STREAMS)]
        top = cutlass.max(cutlass.max(row[0], row[1]), cutlass.max(row[2], row[3]))
        row = [approximately("ex2", (x - top) * Float32(LOG2_E)) for x in row]
        row = self.row_normed(row, Float32(0.0))
        row = self.columns_normed([x + eps for x in row], eps)
        a, b, c2, e = row
        for _ in cutlass.range(iterations - 1, unroll=1):
            a, b, c2, e = self.columns_normed(self.row_normed([a, b, c2, e], eps), eps)
        there = token < m
        put4(post + Int64(token) * 16, after, there and lane == 0)
        put4(comb + Int64(token) * 64 + Int64(lane % 4) * 16, [a, b, c2, e], there and lane < STREAMS)

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
        _pointers((Float32, Float32, Float32, BFloat16), weights),
        _pointers((BFloat16, Float32, Float32), out),
        *(Int32(x) for x in counts),
        *(Int64(x) for x in strides),
        *(Float32(x) for x in numbers),
    )


def _fake_arguments() -> tuple[Any, ...]:
    return (*_arguments(16, (16,) * 4, (16,) * 4, (16,) * 3, (1, 1, 1), (8, 8, 8), (1.0, 1.0)), make_fake_stream())


@functools.cache
def compiled(config: Config, variant: Variant) -> Any:
    """The compiled host function, for every number of tokens."""
    function, made_for = HyperConnectionSm90(config, variant), (config, variant)
    return cross.compiled(function, *_fake_arguments(), arch=ARCH, module=__name__, made_for=made_for)


def build(problem: FoldProblem, config: Config, arch: str | None = None) -> Built:
    """Compile for `problem` without a GPU. Raises ValueError for another arch or what `supports` refuses."""
    if arch not in (None, ARCH):
        raise ValueError(f"this kernel is for {ARCH}, got {arch!r}")
    if reason := supports(problem, config):
        raise ValueError(reason)
    post = isinstance(problem, HyperConnectionPostPreProblem)
    kernel = HyperConnectionSm90(config, Variant(d=problem.k, post=post, norm=True))
    return cross.build(kernel, *_fake_arguments(), arch=ARCH)


def build_key(problem: FoldProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on."""
    return (problem.k,)


def precompile(problem: FoldProblem, config: Config) -> None:
    """Compile for `problem` into the cache, without a GPU. Raises ValueError for what `supports` refuses."""
    if reason := supports(problem, config):
        raise ValueError(reason)
    for norm in (True, False):
        compiled(config, Variant(d=problem.k, post=isinstance(problem, HyperConnectionPostPreProblem), norm=norm))


@functools.cache
def _max_clusters(device: int | None, cluster: int) -> int:
    """Clusters that run at a time; device None: on an H100 that is not here."""
    if device is None:
        return SM_COUNT // cluster
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
    out: tuple[Tensor, Tensor, Tensor],
    config: Config,
    site: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> None:
    """y [tokens, d], post [tokens, 4] and comb [tokens, 4, 4] of h [tokens, 4, d], on the current stream.

    site: a site's output y, post and comb, and room for the streams that it leaves of h: these are then folded.

    Raises ValueError for what `supports` refuses.
    """
    tokens, n, d = h.shape
    kind = HyperConnectionPreProblem if site is None else HyperConnectionPostPreProblem
    x = "bf16" if h.dtype == torch.bfloat16 else str(h.dtype)
    if reason := supports(kind(m=tokens, k=d, n=n, x=x), config):
        raise ValueError(reason)
    if tokens == 0:
        return
    h = _aligned(h)
    if site is not None:
        site = (_aligned(site[0]), *site[1:])
    weights = (fn, base, scale, base if weight is None else _aligned(weight))
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
        tuple(t.data_ptr() for t in out),
        (tokens, iterations, clusters),
        strides,
        (norm_eps, eps),
    )
    function = compiled(config, Variant(d=d, post=site is not None, norm=weight is not None))
    if h.is_cuda:
        with torch.cuda.device(h.device):
            function(*arguments, cuda.CUstream(torch.cuda.current_stream().cuda_stream))
    else:  # CPU tensors, where an emulator stands in for the CUDA runtime
        function(*arguments, cuda.CUstream(0))
