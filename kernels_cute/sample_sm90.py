"""Next tokens, greedy or by nucleus sampling, on Hopper: each logit is read once, in one launch, and ties cost nothing.

Where rows are many it is bound by issue (some 55 instructions a logit of rows of every kind, against 4 bytes), where
they are few by what CTAs wait for each other. A cluster takes a row, each of its CTAs a run of tokens, whose logits
stay in shared memory.

    load      and the largest logit; rows that are greedy, or whose top is not finite, need but its equals
    weigh     each token's mass, an integer of 41 bits in two words, is added to one of BINS: a quarter of a power of
              two of mass each, in the order of logits, and in COLUMNS, so that equal logits do not wait for each other
    locate    the token with which the mass reaches what is asked, once for the end of the nucleus and once for
              `uniform`. Its bin is known from the sums; tokens of that bin are marked, a bit each, and their masses
              added to FINE bins of equal width (in keys, integers in the order of logits); so on, within one of these,
              until few tokens are left, which are ranked among each other, or one key is
    count     tokens of one key need but be counted: the nth of them is drawn

CTAs send each other what they have of the sums, the largest keys, the tokens left; mbarriers of the receiver count it
(st.async), and each CTA goes on by itself. What decides is integer, so that no order of sums and no config matters.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64, Uint32, Uint64, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from torch import Tensor

from fp4suite.arch import SM_COUNT
from fp4suite.built import MAX_SHARED_BYTES, Built
from fp4suite.problem import SampleProblem
from fp4suite.reference.quant import EXP2_COEFFICIENTS, LOG2E, ROUND
from fp4suite.reference.sample import MASS_BITS

from . import build as cross
from .instructions import (
    add,
    add_lanes,
    bits_float,
    float_bits,
    fma,
    highest_bit,
    load_words,
    mul,
    plus_zero,
    prefetch,
    push,
    store_words,
)
from .overlap import OVERLAP, begin

ARCH = "sm_90a"
TYPES = {"fp32": (Float32, torch.float32), "bf16": (BFloat16, torch.bfloat16), "fp16": (Float16, torch.float16)}
LOW_BITS = 20  # of a mass in its lower word; the other has 21
WEIGHTLESS = 28.0  # temperatures below the top: 2^40 exp(-28) < 1
PARTS = 4  # bins of a power of two of mass
BINS = 168  # exp(-28) is 2^-40.4: 163 of them, in whole warps where each has four threads
FINE = 64  # bins in one of them
COLUMNS = 16  # in which lanes add, so that two at most meet
BIN_BYTES = COLUMNS * 4
LOW = BINS * BIN_BYTES  # from upper words to lower ones
COUNTS = FINE * BIN_BYTES  # and, of FINE bins, to numbers of tokens
FEW = 128  # tokens that are ranked among each other
RANKERS = 4  # threads a token
THREAD_REGISTERS = 96
MOST_EACH = 64  # logits of a thread, whose marks are bits of a word or two
MOST_VOCAB = 1 << (62 - MASS_BITS)  # masses of all tokens fit into int64
ROUND_PART = ROUND / PARTS
LN2 = math.log(2.0)
SLACK = 2.0**-18  # of a distance from the top, in which its rounding is
LARGEST = 0x7FFFFFFF  # key of NaN
INF = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """`cluster` CTAs of `threads` threads a row, `each` logits a thread at most."""

    threads: int = 256
    each: int = 64
    cluster: int = 8

    @property
    def capacity(self) -> int:
        """Logits of a row, at most."""
        return self.threads * self.each * self.cluster

    @property
    def rooms(self) -> dict[str, int]:
        """Shared memory by what it is for, in bytes."""
        warps = self.cluster * self.threads // 32
        return {
            "x": 4 * self.threads * self.each,
            "bins": 2 * LOW,
            "parts": self.cluster * BINS * 8,  # of sums, from each CTA
            "fine_parts": self.cluster * FINE * 12,
            "sums": BINS * 8,
            "fine_sums": FINE * 8,
            "numbers": FINE * 8,  # of tokens in FINE bins, and in those of CTAs before this one
            "extremes": 8 * warps,
            "counts": 4 * warps,
            "listed": FEW * 16,
            "signs": 4 * self.cluster,
            "note": 32,  # tokens of this CTA that have been listed in either search; top_p, uniform; mass, token
            "found": 16,
            "barriers": 16,
        }

    @property
    def shared_bytes(self) -> int:
        return sum(-(-size // 16) * 16 for size in self.rooms.values())


SPACE = {"threads": (256, 512), "each": (16, 32, 64), "cluster": (1, 2, 4, 8, 16)}


def supports(problem: SampleProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.x not in TYPES:
        return f"logits in {problem.x}, not one of {', '.join(TYPES)}"
    if problem.vocab > min(MOST_VOCAB, config.capacity):
        return f"vocab={problem.vocab} is more than {config} holds, {min(MOST_VOCAB, config.capacity)}"
    return refused(config)


def refused(config: Config) -> str | None:
    """Why no problem can run with this config, or None."""
    if config.each > MOST_EACH:
        return f"each={config.each} logits are more than {MOST_EACH} a thread"
    if config.shared_bytes > MAX_SHARED_BYTES[ARCH]:
        return f"{config} needs {config.shared_bytes} bytes of shared memory, of {MAX_SHARED_BYTES[ARCH]}"
    return None


def default(problem: SampleProblem) -> Config:
    """Of few rows each gets many threads; as many clusters as there is room for run at a time."""
    if problem.m <= 8:
        shapes = [(256, 16, 1), (256, 16, 4), (256, 32, 8), (256, 32, 16), (512, 32, 16)]
    elif problem.m <= 32:
        shapes = [(256, 16, 1), (256, 32, 4), (512, 32, 8), (512, 32, 16)]
    else:
        shapes = [(256, 16, 1), (256, 32, 2), (256, 64, 4), (512, 64, 4), (512, 64, 8)]
    configs = [Config(threads=t, each=e, cluster=c) for t, e, c in (*shapes, (512, 64, 16))]
    return next((c for c in configs if problem.vocab <= c.capacity), configs[-1])


# --- instructions -----------------------------------------------------------------------------------------------------


def _operands(values, loc, ip):
    return [v.ir_value(loc=loc, ip=ip) for v in values]


def _words(got, n: int, kind, loc, ip):
    return [llvm.extractvalue(kind, got, [i], loc=loc, ip=ip) for i in range(n)]


@dsl_user_op
def fetch_words(address: Int64, there: Boolean, other: int, *, loc=None, ip=None):
    """Four words of global memory, or `other` four times."""
    asm = (
        "{ .reg .pred p; setp.ne.b32 p, $5, 0; "
        + " ".join(f"mov.b32 ${i}, {other:#010x};" for i in range(4))
        + " @p ld.global.nc.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4]; }"
    )
    kind = llvm.StructType.get_literal([T.i32()] * 4)
    args = _operands((address, Int32(there)), loc, ip)
    got = llvm.inline_asm(kind, args, asm, "=&r,=&r,=&r,=&r,l,r", has_side_effects=True, loc=loc, ip=ip)
    return [Uint32(w) for w in _words(got, 4, T.i32(), loc, ip)]


@dsl_user_op
def fetch_bits(address: Int64, size: int, *, loc=None, ip=None) -> Uint32:
    """`size` bits of global memory, the others 0."""
    asm = "ld.global.nc.b32 $0, [$1];"
    if size == 16:
        asm = "{ .reg .b16 h; ld.global.nc.b16 h, [$1]; cvt.u32.u16 $0, h; }"
    args = _operands((address,), loc, ip)
    return Uint32(llvm.inline_asm(T.i32(), args, asm, "=r,l", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def load(address: Int32, *, loc=None, ip=None) -> Uint32:
    """A word of shared memory."""
    args, asm = _operands((address,), loc, ip), "ld.shared.b32 $0, [$1];"
    return Uint32(llvm.inline_asm(T.i32(), args, asm, "=r,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def store(address: Int32, word: Uint32, *, loc=None, ip=None):
    args, asm = _operands((address, word), loc, ip), "st.shared.b32 [$0], $1;"
    llvm.inline_asm(None, args, asm, "r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def load_mass(address: Int32, *, loc=None, ip=None) -> Int64:
    """Two words of shared memory as one number."""
    args, asm = _operands((address,), loc, ip), "ld.shared.b64 $0, [$1];"
    return Int64(llvm.inline_asm(T.i64(), args, asm, "=l,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def store_mass(address: Int32, mass: Int64, *, loc=None, ip=None):
    args, asm = _operands((address, mass), loc, ip), "st.shared.b64 [$0], $1;"
    llvm.inline_asm(None, args, asm, "r,l", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def take_place(address: Int32, *, loc=None, ip=None) -> Int32:
    """Adds 1 to a word of shared memory; what it was."""
    args, asm = _operands((address,), loc, ip), "atom.shared.add.u32 $0, [$1], 1;"
    return Int32(llvm.inline_asm(T.i32(), args, asm, "=r,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def add_word(address: Int32, offset: int, word: Uint32, *, loc=None, ip=None):
    """Adds to a word of shared memory."""
    asm = f"red.shared.add.u32 [$0 + {offset}], $1;"
    llvm.inline_asm(None, _operands((address, word), loc, ip), asm, "r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def bin_address(first: Int32, place: Uint32, *, loc=None, ip=None) -> Int32:
    """`place` bins before the first."""
    asm = f"mad.lo.s32 $0, $2, -{BIN_BYTES}, $1;"
    return Int32(llvm.inline_asm(T.i32(), _operands((first, place), loc, ip), asm, "=r,r,r", loc=loc, ip=ip))


@dsl_user_op
def rounded(operation: str, x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """add, sub, mul or div with a direction: "mul.rp"."""
    asm, args = f"{operation}.f32 $0, $1, $2;", _operands((x, y), loc, ip)
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,f,f", loc=loc, ip=ip))


@dsl_user_op
def multiple(part: Float32, mass: Int64, direction: str, *, loc=None, ip=None) -> Int64:
    """part times mass in FP64, rounded to an integer: rpi upwards, rmi downwards."""
    asm = (
        "{ .reg .f64 a, b; cvt.f64.f32 a, $1; cvt.rn.f64.s64 b, $2; mul.rn.f64 a, a, b; "
        f"cvt.{direction}.s64.f64 $0, a; }}"
    )
    return Int64(llvm.inline_asm(T.i64(), _operands((part, mass), loc, ip), asm, "=l,f,l", loc=loc, ip=ip))


@dsl_user_op
def other_lane(mass: Int64, kind: str, step: int, *, loc=None, ip=None) -> Int64:
    """The number of a lane `step` away: kind bfly or up; of lanes without one, their own."""
    clamp = 31 if kind == "bfly" else 0
    asm = (
        "{ .reg .b32 a, b; mov.b64 {a, b}, $1; "
        f"shfl.sync.{kind}.b32 a, a, {step}, {clamp}, -1; shfl.sync.{kind}.b32 b, b, {step}, {clamp}, -1; "
        "mov.b64 $0, {a, b}; }"
    )
    args = _operands((mass,), loc, ip)
    return Int64(llvm.inline_asm(T.i64(), args, asm, "=l,l", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def over_lanes(operation: str, x: Int32, *, loc=None, ip=None) -> Int32:
    """min or max over a warp."""
    asm = f"redux.sync.{operation}.s32 $0, $1, 0xffffffff;"
    args = _operands((x,), loc, ip)
    return Int32(llvm.inline_asm(T.i32(), args, asm, "=r,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def highest_mark(marks, *, loc=None, ip=None) -> Int32:
    """The place of the highest bit of one or two words."""
    kind, letter = ("u64", "l") if isinstance(marks, Uint64) else ("u32", "r")
    args = _operands((marks,), loc, ip)
    return Int32(llvm.inline_asm(T.i32(), args, f"bfind.{kind} $0, $1;", f"=r,{letter}", loc=loc, ip=ip))


@dsl_user_op
def half_to_float(word: Uint32, *, loc=None, ip=None) -> Float32:
    """The FP16 number of a word's lower half."""
    asm = "{ .reg .b16 a, b; mov.b32 {a, b}, $1; cvt.f32.f16 $0, a; }"
    return Float32(llvm.inline_asm(T.f32(), _operands((word,), loc, ip), asm, "=f,r", loc=loc, ip=ip))


def key_of(x):
    """A number that is no -0 as Int32 in the same order, NaN above all."""
    word = Int32(float_bits(x))
    return word ^ ((word >> 31) & Int32(LARGEST))


def number_of(key):
    return bits_float(Uint32(key ^ ((key >> 31) & Int32(LARGEST))))


def larger(x, y):
    """NaN if either is."""
    return rounded("max.NaN", x, y)


# --- the kernel -------------------------------------------------------------------------------------------------------


class SampleSm90:
    def __init__(self, config: Config, x: str):
        self.config, self.x = config, x
        self.element_bits = TYPES[x][0].width
        self.warps = config.threads // 32
        self.Marks = Uint64 if config.each > 32 else Uint32
        # CTAs of an SM, with registers enough that nothing spills
        fitting = 228 * 1024 // (config.shared_bytes + 1024)
        self.programs = max(1, min(fitting, 65536 // (THREAD_REGISTERS * config.threads)))
        self.ahead = SM_COUNT[ARCH] * self.programs // config.cluster  # rows at a time

    @cute.jit
    def __call__(
        self,
        logits: cute.Pointer,
        temperature: cute.Pointer,
        top_p: cute.Pointer,
        uniform: cute.Pointer,
        out: cute.Pointer,
        m: Int32,
        vocab: Int32,
        stride: Int64,
        stream: cuda.CUstream,
    ):
        c = self.config
        rows = cute.make_layout(m)
        asked = tuple(cute.make_tensor(p, rows) for p in (temperature, top_p, uniform))
        self.kernel(logits.toint(), stride, m, vocab, asked, cute.make_tensor(out, rows)).launch(
            grid=(m * c.cluster, 1, 1),
            block=(c.threads, 1, 1),
            cluster=(c.cluster, 1, 1) if c.cluster > 1 else None,
            stream=stream,
            min_blocks_per_mp=self.programs,
            preferred_smem_carveout=100,  # percent
            use_pdl=OVERLAP,
        )

    @cute.kernel
    def kernel(self, logits: Int64, stride: Int64, m: Int32, vocab: Int32, asked, mOut: cute.Tensor):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        row, rank = block // c.cluster, block % c.cluster
        smem = SmemAllocator()
        barriers = smem.allocate_array(Int64, 2)
        room = {
            name: Int32(
                smem.allocate_tensor(Uint32, cute.make_layout(-(-n // 16) * 4), byte_alignment=16).iterator.toint()
            )
            for name, n in c.rooms.items()
            if name != "barriers"
        }
        if tidx == 0:
            for i in cutlass.range_constexpr(2):
                cute.arch.mbarrier_init(barriers + i, 1)
        cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(c.cluster > 1):
            cute.arch.cluster_arrive_relaxed()
        share = (vocab + (8 * c.cluster - 1)) // (8 * c.cluster) * 8  # a CTA's
        first = rank * share
        n = cutlass.max(cutlass.min(vocab - first, share), 0)
        source = logits + (Int64(row) * stride + Int64(first)) * (self.element_bits // 8)
        zeros = [Uint32(0)] * 4
        for i in cutlass.range_constexpr(-(-2 * LOW // (16 * c.threads))):
            at = (i * c.threads + tidx) * 16
            if at < 2 * LOW:
                store_words(room["bins"] + at, zeros)
        begin()
        if tidx == 0:  # what is asked for waits there, not in registers
            store_words(room["note"], [Uint32(0), Uint32(0), float_bits(asked[1][row]), float_bits(asked[2][row])])
        most = self.load_row(room["x"], source, n, tidx)
        if tidx == 0 and row + self.ahead < m:
            self.send_for(source + stride * (self.ahead * self.element_bits // 8), n)
        heat = asked[0][row]
        if cutlass.const_expr(c.cluster > 1):
            cute.arch.cluster_wait()  # nobody may signal a barrier that is not there yet
        cute.arch.sync_threads()
        key = key_of(plus_zero(most))
        top_key, _ = self.extremes(room, barriers, Int32(0), key, key, rank, tidx)
        top = number_of(top_key)

        finite = cutlass.max(top, -top) < INF
        weighs = finite and heat == heat and heat != 0.0
        token, key, nth, turn = Int32(-1), top_key, Int32(0), Int32(1)
        if weighs:
            scales = self.scales(top, heat)
            self.weigh(room, scales, tidx)
            token, key, nth, turn = self.draw(room, barriers, scales, rank, first, tidx)
        if token < 0:
            before, own, total = self.count(room, barriers, turn, key, n, rank, tidx)
            if not weighs and heat != 0.0:
                nth = self.among_tops(room, total)
            if before <= nth and nth < before + own:
                self.write_nth(room["x"], key, n, nth - before, first, mOut, row, tidx)
        elif rank == 0 and tidx == 0:
            mOut[row] = Int64(token)
        if cutlass.const_expr(c.cluster > 1):  # a CTA stays until its peers have what they wait for
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()

    # --- what CTAs send each other ------------------------------------------------------------------------------------

    def barrier(self, barriers, turn):
        """Address of a turn's. Two take turns: who has what all have sent is a turn ahead of others at most."""
        return Int32(barriers.toint()) + 8 * (turn % 2)

    def push(self, to, barrier, rank, words):
        """Words to a CTA of the cluster."""
        if self.config.cluster > 1:
            push(to, barrier, rank, words)
        else:
            for i in range(len(words)):
                store(to + 4 * i, Uint32(words[i]))

    @cute.jit
    def receive(self, barriers, turn, size, tidx):
        """Waits for a turn's bytes, which are from all CTAs."""
        if cutlass.const_expr(self.config.cluster > 1):
            if tidx == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(barriers + turn % 2, size)
            cute.arch.mbarrier_wait(barriers + turn % 2, turn // 2 % 2)
        else:
            cute.arch.sync_threads()

    # --- load ---------------------------------------------------------------------------------------------------------

    @cute.jit
    def load_row(self, room, source, n, tidx):
        """This CTA's logits to shared memory, -inf behind them; the largest of this thread's."""
        c, size = self.config, self.element_bits
        a_vector = 128 // size
        most = Float32(-INF)
        if source % 16 == 0 and n % a_vector == 0:
            words = []
            for i in cutlass.range_constexpr(c.each // a_vector):
                at = (i * c.threads + tidx) * a_vector
                nothing = {"fp32": 0xFF800000, "bf16": 0xFF80FF80, "fp16": 0xFC00FC00}[self.x]
                words.append(fetch_words(source + Int64(at) * (size // 8), at < n, nothing))
            for i in cutlass.range_constexpr(c.each // a_vector):
                x = [v for word in words[i] for v in self.widen(word)]
                for v in x:
                    most = larger(most, v)
                at = room + (i * c.threads + tidx) * (4 * a_vector)
                for j in cutlass.range_constexpr(0, a_vector, 4):
                    store_words(at + 4 * j, [float_bits(v) for v in x[j : j + 4]])
        else:
            for j in cutlass.range(c.each, unroll=4):
                at = j * c.threads + tidx
                x = Float32(-INF)
                if at < n:
                    x = self.widen(fetch_bits(source + Int64(at) * (size // 8), size))[0]
                most = larger(most, x)
                store(room + 4 * at, float_bits(x))
        return most

    @cute.jit
    def send_for(self, source, n):
        """Logits of a later row on their way to L2."""
        size = n * (self.element_bits // 8)
        if source % 16 == 0 and size % 16 == 0 and size > 0:
            prefetch(source, size)

    def widen(self, word):
        """The numbers of a word."""
        if self.x == "fp32":
            return [bits_float(word)]
        if self.x == "fp16":
            return [half_to_float(word), half_to_float(word >> Uint32(16))]
        return [bits_float(word << Uint32(16)), bits_float(word & Uint32(0xFFFF0000))]

    @cute.jit
    def extremes(self, room, barriers, turn, high, low, rank, tidx):
        """The largest of `high` and the smallest of `low` over the cluster."""
        c, warps = self.config, self.warps
        lane = tidx % 32
        high, low = over_lanes("max", high), over_lanes("min", low)
        if lane < c.cluster:
            to = room["extremes"] + 8 * (rank * warps + tidx // 32)
            self.push(to, self.barrier(barriers, turn), lane, [high, low])
        self.receive(barriers, turn, 8 * c.cluster * warps, tidx)
        for i in cutlass.range_constexpr(-(-c.cluster * warps // 32)):
            at = room["extremes"] + 8 * cutlass.min(32 * i + lane, c.cluster * warps - 1)
            high = cutlass.max(high, Int32(load(at)))
            low = cutlass.min(low, Int32(load(at + 4)))
        return over_lanes("max", high), over_lanes("min", low)

    # --- masses -------------------------------------------------------------------------------------------------------

    @cute.jit
    def scales(self, top, heat):
        """Of a row: the top, the temperature, and by what to divide: a power of two to scale by, the temperature in
        that scale, its reciprocal in two parts.
        """
        heat = cutlass.max(heat, Float32(torch.finfo(torch.float32).tiny))
        scale = Float32(1.0)
        if heat < 2.0**-64:
            scale = Float32(2.0**64)
        if heat > 2.0**64:
            scale = Float32(2.0**-64)
        by = mul(heat, scale)
        inverse = rounded("div.rn", Float32(1.0), by)
        rest = mul(fma(-by, inverse, Float32(1.0)), inverse)
        if heat == INF:  # all that is finite lies no temperature below the top
            by, inverse, rest = Float32(0.0), Float32(0.0), Float32(0.0)
        return top, heat, scale, by, inverse, rest

    def weight(self, x, scales, scaled: bool = True):
        """2^(MASS_BITS - LOW_BITS) times the mass of a token in parts of the top's, to be rounded down; log2 of it in
        PARTS, in the bits of a number.
        """
        top, _, scale, by, inverse, rest = scales
        below = rounded("sub.rn", top, x)
        if scaled:
            below = mul(below, scale)
        # Correctly rounded (Markstein): by a reciprocal in two parts the quotient is the right one or its neighbour,
        # the remainder is exact and tells. Powers of two keep all of it in range.
        z = fma(below, inverse, mul(below, rest))
        z = fma(fma(-by, z, below), inverse, z)
        t = mul(rounded("min", z, Float32(WEIGHTLESS)), Float32(-LOG2E))  # the minimum of NaN, too, is WEIGHTLESS
        shifted = add(t, Float32(ROUND))
        f = rounded("sub.rn", t, rounded("sub.rn", shifted, Float32(ROUND)))
        p = Float32(EXP2_COEFFICIENTS[-1])
        for coefficient in EXP2_COEFFICIENTS[-2::-1]:
            p = add(mul(p, f), Float32(coefficient))
        # the low bits of `shifted` are the integer part; moved to the exponent's place they make its power of two
        power = (float_bits(shifted) << Uint32(23)) + Uint32((127 + MASS_BITS - LOW_BITS) << 23)
        weight = mul(add(mul(p, f), Float32(1.0)), bits_float(power))
        return weight, float_bits(add(t, Float32(ROUND_PART)))

    def in_words(self, weight):
        """Upper and lower word of a mass: integers are bits of numbers that have 2^23 added, or are subnormal."""
        above = rounded("add.rm", weight, Float32(2.0**23))
        rest = rounded("sub.rn", weight, rounded("sub.rn", above, Float32(2.0**23)))
        high = float_bits(above) & Uint32(0x7FFFFF)
        return high, float_bits(rounded("mul.rm", rest, bits_float(Uint32(1 << LOW_BITS))))

    def mass(self, x, scales):
        high, low = self.in_words(self.weight(x, scales)[0])
        return (Int64(high) << LOW_BITS) + Int64(low)

    def bin_of(self, place):
        """The bin of log2 of a mass as `weight` gives it."""
        return Int32(float_bits(Float32(ROUND_PART)) - place)

    @cute.jit
    def weigh(self, room, scales, tidx):
        if scales[2] == 1.0:
            self.weigh_as(room, scales, tidx, False)
        else:
            self.weigh_as(room, scales, tidx, True)
        cute.arch.sync_threads()

    @cute.jit
    def weigh_as(self, room, scales, tidx, scaled: cutlass.Constexpr):
        c = self.config
        first = room["bins"] + tidx % COLUMNS * 4
        first = bin_address(first, Uint32(0) - float_bits(Float32(ROUND_PART)))
        at = room["x"] + 16 * tidx
        for _ in cutlass.range(c.each // 4, unroll=1):
            for word in load_words(at):
                weight, place = self.weight(bits_float(word), scales, scaled)
                high, low = self.in_words(weight)
                to = bin_address(first, place)
                add_word(to, 0, high)
                add_word(to, LOW, low)
            at += 16 * c.threads

    @cute.jit
    def send(self, room, barrier, rank, bins: cutlass.Constexpr, tidx):
        """The CTA's sums to all CTAs, and with FINE bins the numbers of tokens; they are 0 then."""
        c = self.config
        for i in cutlass.range_constexpr(-(-4 * bins // c.threads)):
            task = i * c.threads + tidx
            if task < 4 * bins:  # or not, for all of a warp
                self.send_bin(room, barrier, rank, bins, task // 4, task % 4)

    @cute.jit
    def send_bin(self, room, barrier, rank, bins: cutlass.Constexpr, bin, part):
        """Four threads do, a quarter of the columns each."""
        c, zeros = self.config, [Uint32(0)] * 4
        at = room["bins"] + bin * BIN_BYTES + 16 * part
        high, low = load_words(at), load_words(at + LOW)
        mass, tokens = Int64(0), Uint32(0)
        for h, w in zip(high, low, strict=True):
            mass = mass + ((Int64(h) << LOW_BITS) + Int64(w))
        store_words(at, zeros)
        store_words(at + LOW, zeros)
        if cutlass.const_expr(bins == FINE):
            for word in load_words(at + COUNTS):
                tokens = tokens + word
            store_words(at + COUNTS, zeros)
        for step in (1, 2):
            mass = mass + other_lane(mass, "bfly", step)
            if cutlass.const_expr(bins == FINE):
                tokens = tokens + cute.arch.shuffle_sync_bfly(tokens, step)
        place, parts = rank * bins + bin, room["fine_parts" if bins == FINE else "parts"]
        for p in cutlass.range_constexpr(0, c.cluster, 4):
            if p + part < c.cluster:
                self.push(parts + 8 * place, barrier, p + part, [Uint32(mass), Uint32(mass >> 32)])
                if cutlass.const_expr(bins == FINE):
                    self.push(parts + (c.cluster * FINE * 8) + 4 * place, barrier, p + part, [tokens])

    @cute.jit
    def add_up(self, room, rank, sums, bins: cutlass.Constexpr, tidx):
        """Over the CTAs: the mass of each bin; of FINE bins how many tokens are in each, and in it in CTAs before."""
        c, parts = self.config, room["fine_parts" if bins == FINE else "parts"]
        for i in cutlass.range_constexpr(-(-bins // c.threads)):
            bin = i * c.threads + tidx
            if bin < bins:
                mass, tokens, before = Int64(0), Uint32(0), Uint32(0)
                for cta in cutlass.range_constexpr(c.cluster):
                    mass = mass + load_mass(parts + 8 * (cta * bins + bin))
                    if cutlass.const_expr(bins == FINE):
                        if cta == rank:
                            before = tokens
                        tokens = tokens + load(parts + (c.cluster * FINE * 8) + 4 * (cta * bins + bin))
                store_mass(sums + 8 * bin, mass)
                if cutlass.const_expr(bins == FINE):
                    store(room["numbers"] + 8 * bin, tokens)
                    store(room["numbers"] + 8 * bin + 4, before)
        cute.arch.sync_threads()

    @cute.jit
    def upto(self, sums, bins: cutlass.Constexpr, tidx):
        """Of a warp's lanes each some neighbouring bins: the mass of all bins before the first, of all up to each."""
        each = -(-bins // 32)
        upto, inside = [], Int64(0)
        for i in cutlass.range_constexpr(each):
            mass = Int64(0)
            if each * tidx + i < bins:
                mass = load_mass(sums + 8 * (each * tidx + i))
            inside = inside + mass
            upto.append(inside)
        before = inside
        for step in (1, 2, 4, 8, 16):
            other = other_lane(before, "up", step)
            if tidx >= step:
                before = before + other
        before = before - inside
        return before, [mass + before for mass in upto]

    @cute.jit
    def keep_upto(self, sums, tidx):
        """The mass of all BINS up to each, in the place of each one's."""
        each = -(-BINS // 32)
        if tidx < 32:
            _, upto = self.upto(sums, BINS, tidx)
            for i in cutlass.range_constexpr(each):
                if each * tidx + i < BINS:
                    store_mass(sums + 8 * (each * tidx + i), upto[i])
        cute.arch.sync_threads()

    @cute.jit
    def find(self, room, need, tidx):
        """The first of FINE bins up to which the mass is at least `need`, and the mass up to the one before."""
        if tidx < 32:
            before, upto = self.upto(room["fine_sums"], FINE, tidx)
            for i in cutlass.range_constexpr(FINE // 32):
                if before < need and need <= upto[i]:
                    store(room["found"], Uint32(FINE // 32 * tidx + i))
                    store_mass(room["found"] + 8, before)
                before = upto[i]
        cute.arch.sync_threads()
        return Int32(load(room["found"])), load_mass(room["found"] + 8)

    @cute.jit
    def search(self, sums, need, tidx):
        """The first of BINS up to which the mass is at least `need`, and the mass up to the one before."""
        lane, bin = tidx % 32, Int32(0)
        for i in cutlass.range_constexpr(-(-BINS // 32)):
            less = False
            if 32 * i + lane < BINS:
                less = load_mass(sums + 8 * (32 * i + lane)) < need
            bin += Int32(cute.arch.popc(cute.arch.vote_ballot_sync(less)))
        above = Int64(0)
        if bin > 0:
            above = load_mass(sums + 8 * (bin - 1))
        return bin, above

    # --- drawing ------------------------------------------------------------------------------------------------------

    @cute.jit
    def draw(self, room, barriers, scales, rank, first, tidx):
        """The token; or -1, and the key of which it is the nth one. The next turn."""
        self.send(room, self.barrier(barriers, Int32(1)), rank, BINS, tidx)
        self.receive(barriers, Int32(1), self.config.cluster * BINS * 8, tidx)
        self.add_up(room, rank, room["sums"], BINS, tidx)
        self.keep_upto(room["sums"], tidx)
        total = load_mass(room["sums"] + 8 * (BINS - 1))
        need, search = self.limit(room, total), Int32(0)
        if need == total:  # the end of a nucleus of all tokens need not be looked for
            need, search = self.target(room, total) + 1, Int32(1)
        token, key, nth, turn = Int32(-1), Int32(0), Int32(0), Int32(2)
        while search < 2:
            token, key, nth, reached, turn = self.locate(room, barriers, turn, scales, need, search, rank, first, tidx)
            need = self.target(room, reached) + 1
            search += 1
        return token, key, nth, turn

    def limit(self, room, total):
        """The mass that the nucleus has to reach."""
        part = self.part(room["note"] + 8)
        return cutlass.min(cutlass.max(multiple(part, total, "rpi"), Int64(1)), total)

    def target(self, room, kept):
        """The mass above which the token ends."""
        part = self.part(room["note"] + 12)
        return cutlass.min(multiple(part, kept, "rmi"), kept - 1)

    def part(self, address):
        """A number of shared memory, of 0 to 1; 0 for NaN."""
        return rounded("min", rounded("max", bits_float(load(address)), Float32(0.0)), Float32(1.0))

    @cute.jit
    def locate(self, room, barriers, turn, scales, need, search, rank, first, tidx):
        """The first token with which the mass reaches `need`; or -1, and the key of which it is the nth one. The mass
        with it; the next turn. In the last search only the first CTA knows which token.
        """
        cluster = self.config.cluster
        bin, above = self.search(room["sums"], need, tidx)
        low, high = self.edges(bin, scales)
        marks = self.mark(room["x"], low, high, tidx)
        least, most = key_of(low), key_of(high)
        within, searching = bin, Int32(1)  # of which bin tokens have to be; of any after the first round
        token, nth, reached = Int32(-1), Int32(0), Int64(0)
        while searching > 0:
            shift = cutlass.max(highest_bit(Uint32(most - least)) - (FINE.bit_length() - 2), 0)
            marks = self.weigh_marked(room, scales, marks, within, most, shift, tidx)
            cute.arch.sync_threads()
            self.send(room, self.barrier(barriers, turn), rank, FINE, tidx)
            self.receive(barriers, turn, cluster * FINE * 12, tidx)
            turn += 1
            self.add_up(room, rank, room["fine_sums"], FINE, tidx)
            fine, before = self.find(room, need - above, tidx)
            above += before
            number = Int32(load(room["numbers"] + 8 * fine))
            if number <= FEW:
                left = (marks, fine, most, shift)
                self.gather(room, self.barrier(barriers, turn), scales, left, search, rank, first, tidx)
                token = Int32(0)
                if search == 0 or rank == 0:
                    self.receive(barriers, turn, 16 * number + 4 * cluster, tidx)
                    token, reached = self.rank(room, number, need - above, tidx)
                    reached += above
                searching = Int32(0)
            else:
                marks, own_high, own_low = self.narrow(room["x"], marks, fine, most, shift, tidx)
                most, least = self.extremes(room, barriers, turn, own_high, own_low, rank, tidx)
                within = Int32(-1)
                if most == least:
                    mass = self.mass(number_of(most), scales)
                    nth = Int32((need - 1 - above) // mass)
                    reached = above + Int64(nth + 1) * mass
                    searching = Int32(0)
            turn += 1
        return token, most, nth, reached, turn

    @cute.jit
    def edges(self, bin, scales):
        """Numbers between which all logits of a bin are, the top among them."""
        top, heat, *_ = scales
        width = LN2 / PARTS
        near = mul(Float32(bin) - Float32(0.5), Float32(width * (1.0 - SLACK)))
        far = mul(Float32(bin) + Float32(0.5), Float32(width * (1.0 + SLACK)))
        high = top
        if bin > 0:
            high = plus_zero(rounded("sub.rp", top, rounded("mul.rm", heat, near)))
        return plus_zero(rounded("sub.rm", top, rounded("mul.rp", heat, far))), high

    @cute.jit
    def mark(self, room, low, high, tidx):
        """A bit for each of this thread's logits: whether it is between the two."""
        c = self.config
        marks = self.Marks(0)
        for i in cutlass.range_constexpr(c.each // 4):
            words = load_words(room + (i * c.threads + tidx) * 16)
            for j in cutlass.range_constexpr(4):
                x = bits_float(words[j])
                if x >= low and x <= high:
                    marks = marks | self.Marks(1 << (4 * i + j))
        return marks

    def key_at(self, room, bit, tidx):
        """Of the logit that a bit marks."""
        return key_of(plus_zero(bits_float(load(room + 4 * self.place(bit, tidx)))))

    def place(self, bit, tidx):
        """Of the logit that a bit marks, in the CTA's."""
        return (bit // 4 * self.config.threads + tidx) * 4 + bit % 4

    @cute.jit
    def weigh_marked(self, room, scales, marks, within, most, shift, tidx):
        """Adds masses of marked logits to FINE bins; marks of those of a bin other than `within` are cleared."""
        left, column = marks, room["bins"] + tidx % COLUMNS * 4
        while left != 0:
            bit = highest_mark(left)
            left = left ^ (self.Marks(1) << self.Marks(bit))
            x = bits_float(load(room["x"] + 4 * self.place(bit, tidx)))
            weight, place = self.weight(x, scales)
            if within >= 0 and self.bin_of(place) != within:
                marks = marks ^ (self.Marks(1) << self.Marks(bit))
            else:
                high, low = self.in_words(weight)
                to = column + Int32(Uint32(most - key_of(plus_zero(x))) >> Uint32(shift)) * BIN_BYTES
                add_word(to, 0, high)
                add_word(to, LOW, low)
                add_word(to, COUNTS, Uint32(1))
        return marks

    @cute.jit
    def narrow(self, room, marks, fine, most, shift, tidx):
        """Marks of logits in this bin, the largest of their keys and the smallest."""
        left, high, low = marks, Int32(-LARGEST - 1), Int32(LARGEST)
        while left != 0:
            bit = highest_mark(left)
            left = left ^ (self.Marks(1) << self.Marks(bit))
            key = self.key_at(room, bit, tidx)
            if Int32(Uint32(most - key) >> Uint32(shift)) == fine:
                high, low = cutlass.max(high, key), cutlass.min(low, key)
            else:
                marks = marks ^ (self.Marks(1) << self.Marks(bit))
        return marks, high, low

    @cute.jit
    def gather(self, room, barrier, scales, left, search, rank, first, tidx):
        """Key, token and mass of all that is marked and in this bin, in no certain order: to each CTA, or to that which
        writes the token.
        """
        c, x = self.config, room["x"]
        marks, fine, most, shift = left
        listed = room["listed"] + 16 * Int32(load(room["numbers"] + 8 * fine + 4))
        while marks != 0:
            bit = highest_mark(marks)
            marks = marks ^ (self.Marks(1) << self.Marks(bit))
            key = self.key_at(x, bit, tidx)
            if Int32(Uint32(most - key) >> Uint32(shift)) == fine:
                mass = self.mass(number_of(key), scales)
                words = [key, first + self.place(bit, tidx), Uint32(mass), Uint32(mass >> 32)]
                to = listed + 16 * take_place(room["note"] + 4 * search)
                self.push(to, barrier, Int32(0), words)
                if search == 0:
                    for cta in cutlass.range_constexpr(1, c.cluster):
                        self.push(to, barrier, Int32(cta), words)
        peers = cutlass.select_(search == 0, Int32(c.cluster), Int32(1))
        if tidx < peers:  # so that nobody goes on before all are here
            self.push(room["signs"] + 4 * rank, barrier, tidx, [Uint32(0)])

    @cute.jit
    def rank(self, room, number, need, tidx):
        """Of the gathered tokens the first with which their mass reaches `need`, and the mass with it."""
        c = self.config
        for i in cutlass.range_constexpr(-(-FEW * RANKERS // c.threads)):
            task = i * c.threads + tidx
            if i * c.threads < RANKERS * number:
                key, token, low, high = load_words(room["listed"] + 16 * cutlass.min(task // RANKERS, number - 1))
                before = Int64(0)
                for j in cutlass.range(task % RANKERS, number, RANKERS, unroll=1):
                    other_key, other, other_low, other_high = load_words(room["listed"] + 16 * j)
                    if Int32(other_key) > Int32(key) or (other_key == key and other < token):
                        before += (Int64(other_high) << 32) + Int64(other_low)
                for step in (1, 2):
                    before = before + other_lane(before, "bfly", step)
                upto = before + ((Int64(high) << 32) + Int64(low))
                if task // RANKERS < number and before < need and need <= upto:
                    store_mass(room["note"] + 16, upto)
                    store(room["note"] + 24, token)
        cute.arch.sync_threads()
        return Int32(load(room["note"] + 24)), load_mass(room["note"] + 16)

    # --- counting -----------------------------------------------------------------------------------------------------

    @cute.jit
    def count(self, room, barriers, turn, key, n, rank, tidx):
        """How many tokens with this key there are before this warp's, among them, and in the row."""
        c, warps = self.config, self.warps
        lane, warp = tidx % 32, tidx // 32
        own, wanted = Int32(0), number_of(key)
        if key == LARGEST:
            own = self.count_own(room["x"], wanted, tidx, True)
        else:
            own = self.count_own(room["x"], wanted, tidx, False)
        if wanted == -INF:  # as is what lies behind the row
            for j in cutlass.range(c.each // 4, unroll=1):
                own -= cutlass.max(cutlass.min(self.counted(j, tidx) + 4 - n, 4), 0)
        own = add_lanes(own)
        mine = rank * warps + warp
        if lane < c.cluster:
            self.push(room["counts"] + 4 * mine, self.barrier(barriers, turn), lane, [own])
        self.receive(barriers, turn, 4 * c.cluster * warps, tidx)
        before, total = Int32(0), Int32(0)
        for i in cutlass.range_constexpr(-(-c.cluster * warps // 32)):
            nth = 32 * i + lane
            if nth < c.cluster * warps:
                here = Int32(load(room["counts"] + 4 * nth))
                total += here
                if nth < mine:
                    before += here
        return add_lanes(before), own, add_lanes(total)

    @cute.jit
    def among_tops(self, room, number):
        """Which of the largest logits, as many as this, which have all of the mass."""
        total = Int64(number) << MASS_BITS
        kept = (self.limit(room, total) + ((1 << MASS_BITS) - 1)) >> MASS_BITS << MASS_BITS
        return Int32(self.target(room, kept) >> MASS_BITS)

    def counted(self, j, tidx):
        """The first of four logits: a warp's lie beside each other."""
        return (tidx // 32 * (self.config.each // 4) + j) * 128 + tidx % 32 * 4

    @cute.jit
    def count_own(self, room, wanted, tidx, nan: cutlass.Constexpr):
        own = Int32(0)
        for j in cutlass.range(self.config.each // 4, unroll=4):
            for word in load_words(room + 4 * self.counted(j, tidx)):
                x = bits_float(word)
                equal = x != x if cutlass.const_expr(nan) else x == wanted
                if equal:
                    own += 1
        return own

    @cute.jit
    def write_nth(self, room, key, n, nth, first, mOut, row, tidx):
        """The token of the nth of this warp's logits with this key."""
        lane, wanted = tidx % 32, float_bits(number_of(key))
        for j in cutlass.range(self.config.each // 4, unroll=4):
            at = self.counted(j, tidx)
            words, own = load_words(room + 4 * at), Int32(0)
            for i in cutlass.range_constexpr(4):
                if float_bits(plus_zero(bits_float(words[i]))) == wanted and at + i < n:
                    own += 1
            total = add_lanes(own)
            if nth >= 0 and nth < total:
                upto = own
                for step in (1, 2, 4, 8, 16):
                    other = cute.arch.shuffle_sync_up(upto, offset=step, mask_and_clamp=0)
                    if lane >= step:
                        upto += other
                left = nth - (upto - own)  # of this lane's
                for i in cutlass.range_constexpr(4):
                    if float_bits(plus_zero(bits_float(words[i]))) == wanted and at + i < n:
                        if left == 0:
                            mOut[row] = Int64(first + at + i)
                        left -= 1
            nth -= total


# --- host -------------------------------------------------------------------------------------------------------------

_GMEM = cute.AddressSpace.gmem


def _arguments(x: str, pointers: tuple[int, ...], sizes: tuple[int, int], stride: int) -> list[Any]:
    """All but the stream. pointers: logits, temperature, top_p, uniform, out; sizes: m, vocab; stride of logits."""
    kinds = (TYPES[x][0], Float32, Float32, Float32, Int64)
    made = [make_ptr(t, p, _GMEM, assumed_align=t.width // 8) for t, p in zip(kinds, pointers, strict=True)]
    return [*made, *(Int32(n) for n in sizes), Int64(stride)]


def _fake_arguments(x: str) -> list[Any]:
    return [*_arguments(x, (16,) * 5, (1, 1), 1), make_fake_stream()]


@functools.cache
def compiled(config: Config, x: str) -> Any:
    """The compiled host function, for all rows that the config holds."""
    kernel = SampleSm90(config, x)
    return cross.compiled(kernel, *_fake_arguments(x), arch=ARCH, module=__name__, made_for=(config, x, OVERLAP))


def build(problem: SampleProblem, config: Config, arch: str | None = None) -> Built:
    """Compile for `problem` without a GPU. Raises ValueError for another arch or what `supports` refuses."""
    if arch not in (None, ARCH):
        raise ValueError(f"this kernel is for {ARCH}, got {arch!r}")
    if reason := supports(problem, config):
        raise ValueError(reason)
    return cross.build(SampleSm90(config, problem.x), *_fake_arguments(problem.x), arch=ARCH)


def build_key(problem: SampleProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on."""
    return (problem.x,)


def precompile(problem: SampleProblem, config: Config) -> None:
    """Compile for `problem` into the cache, without a GPU. Raises ValueError for what `supports` refuses."""
    if reason := supports(problem, config):
        raise ValueError(reason)
    compiled(config, problem.x)


def launch(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, out: Tensor, config: Config) -> None:
    """logits [m, vocab], rows of any stride; temperature, top_p, uniform float32 [m], contiguous -> out int64 [m].

    On the current stream. Raises ValueError for what `supports` refuses, or elements of a row that are not contiguous.
    """
    m, vocab = logits.shape
    if m == 0:
        return
    x = next((name for name, (_, dtype) in TYPES.items() if dtype == logits.dtype), str(logits.dtype))
    if reason := supports(SampleProblem(m=m, vocab=vocab, x=x), config):
        raise ValueError(reason)
    if vocab > 1 and logits.stride(1) != 1:
        raise ValueError(f"the elements of a row must be contiguous, got strides {logits.stride()}")
    pointers = tuple(t.data_ptr() for t in (logits, temperature, top_p, uniform, out))
    arguments = _arguments(x, pointers, (m, vocab), logits.stride(0) if m > 1 else vocab)
    function = compiled(config, x)
    if logits.is_cuda:
        with torch.cuda.device(logits.device):
            function(*arguments, cuda.CUstream(torch.cuda.current_stream().cuda_stream))
    else:  # CPU tensors, where an emulator stands in for the CUDA runtime
        function(*arguments, cuda.CUstream(0))


def warm(problem: SampleProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need, and launch once."""
    logits = torch.zeros(1, problem.vocab, dtype=TYPES[problem.x][1], device="cuda")
    ones = torch.ones(1, device="cuda")
    launch(logits, ones, ones, ones, torch.empty(1, dtype=torch.int64, device="cuda"), config)
