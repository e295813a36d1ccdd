"""RMSNorm with a weight, then NVFP4, of many rows on Hopper: the bytes of `kernels_triton.rmsnorm_quantize`.

Memory bound, and close to what instructions allow: reads 2 bytes (BF16) and writes 9/16 an element, which takes some 18
instructions. A CTA an SM walks over rows; rows are asked for as soon as there is room, before warps are free for them.

    load      one warp sends for rows as soon as there is room
    sum       two warps a row: sum of squares in the order of `reference.quant`, and 1 / sqrt(mean + eps)
    quantise  a row's tiles of 512 columns by as many warps as share it; a lane has a block of 16 columns of each, whose
              weights stay in registers. An element's factor is one of 127, which a table has for the scale's byte

Told to, a launch keeps the largest magnitude of the normed rows in place of codes, of which a global scale is made.
"""

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import cuda.bindings.driver as cuda
import cutlass
import torch
from cutlass import BFloat16, Boolean, Float32, Int32, Int64, Uint8, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cute.runtime import make_fake_stream, make_ptr
from cutlass.cutlass_dsl import T, dsl_user_op
from cutlass.memory import SmemAllocator
from torch import Tensor

from fp4suite.arch import SM_COUNT
from fp4suite.built import MAX_SHARED_BYTES, Built
from fp4suite.formats import BLOCK, E4M3_MAX, NVFP4Tensor
from fp4suite.problem import RmsnormQuantizeProblem, Rule
from fp4suite.reference.quant import SUM_CHUNK

from . import build as cross
from .instructions import (
    add,
    bits_float,
    bulk_load,
    create_policy,
    e4m3x2_to_f16x2,
    f16_to_f32,
    fetch_words,
    float_bits,
    load_number,
    load_words,
    mul,
    widen,
)
from .overlap import OVERLAP, begin
from .quantize import inverse_scale, reciprocal, to_e2m1x8_sm90, to_e4m3

ARCH = "sm_90a"
TILE = 32 * BLOCK  # columns of a warp's turn
CHUNK_BLOCKS = SUM_CHUNK // BLOCK  # under one tree of adjacent pairs
SCALES = 127  # bytes of E4M3 without sign, but NaN
BARRIER_BYTES = 1536
TABLE_BYTES = 512
MOST_SLOTS = 48
LEAST_TOKENS = 1024  # fewer have the Triton kernel: a guess, not timed


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """tiles: of 512 columns that a warp quantises of a row; groups: rows that are quantised at a time, by warps of
    their own; summing: rows that are summed at a time.
    """

    tiles: int = 2
    groups: int = 2
    summing: int = 2

    def sharing(self, k: int) -> int:
        """Warps that quantise a row of k columns."""
        return k // TILE // self.tiles

    def threads(self, k: int) -> int:
        """One warp that loads, those that sum, those that quantise."""
        return 32 * (1 + 2 * self.summing + self.groups * self.sharing(k))


SPACE = {"tiles": (1, 2, 3), "groups": (1, 2, 3, 4, 6, 8, 12, 16), "summing": (1, 2, 3)}


def default(problem: RmsnormQuantizeProblem) -> Config:
    """Some 14 warps that quantise, not timed."""
    tiles = next(n for n in (2, 3, 1) if problem.k % (TILE * n) == 0 or n == 1)
    return Config(tiles=tiles, groups=max(1, 14 // max(1, problem.k // TILE // tiles)))


def slots(k: int) -> int:
    """Rows that shared memory holds beside barriers, table and sums."""
    return min(MOST_SLOTS, (MAX_SHARED_BYTES[ARCH] - BARRIER_BYTES - TABLE_BYTES - 8 * MOST_SLOTS - 1024) // (2 * k))


def supports(problem: RmsnormQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or has a faster kernel, or None if it can."""
    if problem.m < LEAST_TOKENS:
        return f"m={problem.m}: below {LEAST_TOKENS} rows the Triton kernel is taken"
    return refusal(problem, config)


def refusal(problem: RmsnormQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, whatever m is, or None if it can."""
    p, c = problem, config
    if p.x != "bf16" or p.rule != "absmax":
        return f"x={p.x} rule={p.rule}: this kernel takes rows in bf16 by rule absmax"
    if min(c.tiles, c.groups, c.summing) < 1:
        return f"{c}: of each there has to be one"
    if p.k % (TILE * c.tiles) or not p.k:
        return f"k={p.k} is not a multiple of {TILE * c.tiles} columns for each warp"
    if c.threads(p.k) > 1024:
        return f"k={p.k}: {c} has {c.threads(p.k)} threads, more than 1024"
    if slots(p.k) < max(c.groups, c.summing) + 1:
        return f"k={p.k}: shared memory holds {slots(p.k)} rows, too few for {c}"
    return None


# --- instructions -----------------------------------------------------------------------------------------------------


@dsl_user_op
def put_codes(address: Int64, low: Uint32, high: Uint32, *, loc=None, ip=None):
    """The codes of a block to global memory."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (address, low, high)]
    llvm.inline_asm(None, args, "st.global.v2.b32 [$0], {$1, $2};", "l,r,r", has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def put(instruction: str, address: Int32 | Int64, x: Float32 | Uint32, *, loc=None, ip=None):
    """A number or a word to memory, by an instruction of PTX."""
    kinds = "l" if isinstance(address, Int64) else "r", "f" if isinstance(x, Float32) else "r"
    args = [v.ir_value(loc=loc, ip=ip) for v in (address, x)]
    llvm.inline_asm(None, args, f"{instruction} [$0], $1;", ",".join(kinds), has_side_effects=True, loc=loc, ip=ip)


@dsl_user_op
def largest_of_lanes(x: Uint32, *, loc=None, ip=None) -> Uint32:
    args = [x.ir_value(loc=loc, ip=ip)]
    asm = "redux.sync.max.u32 $0, $1, 0xffffffff;"
    return Uint32(llvm.inline_asm(T.i32(), args, asm, "=r,r", has_side_effects=True, loc=loc, ip=ip))


@dsl_user_op
def root(x: Float32, *, loc=None, ip=None) -> Float32:
    """Its square root, rounded to nearest."""
    args = [x.ir_value(loc=loc, ip=ip)]
    return Float32(llvm.inline_asm(T.f32(), args, "sqrt.rn.f32 $0, $1;", "=f,f", loc=loc, ip=ip))


@dsl_user_op
def quotient(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """x / y, rounded to nearest."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y)]
    return Float32(llvm.inline_asm(T.f32(), args, "div.rn.f32 $0, $1, $2;", "=f,f,f", loc=loc, ip=ip))


@dsl_user_op
def larger(x: Float32, y: Float32, *, loc=None, ip=None) -> Float32:
    """The larger magnitude of two; NaN if either is."""
    args = [v.ir_value(loc=loc, ip=ip) for v in (x, y)]
    asm = "{ .reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; max.NaN.f32 $0, a, b; }"
    return Float32(llvm.inline_asm(T.f32(), args, asm, "=f,f,f", loc=loc, ip=ip))


def widened(words):
    """BF16 numbers, two a word, as FP32."""
    return [x for word in words for x in widen(word)]


def pairs_summed(xs):
    """A tree of adjacent pairs."""
    while len(xs) > 1:
        xs = [add(a, b) for a, b in zip(xs[::2], xs[1::2], strict=True)]
    return xs[0]


def halves_added(parts: list[Any]) -> Any:
    """The second half of parts added to the first until one is left; what a power of two lacks is zero."""
    half = 1 << max(0, (len(parts) - 1).bit_length() - 1)
    while len(parts) > 1:
        parts = [
            [add(a, b) for a, b in zip(x, parts[i + half], strict=True)] if i + half < len(parts) else x
            for i, x in enumerate(parts[:half])
        ]
        half //= 2
    return parts[0]


# --- the kernel -------------------------------------------------------------------------------------------------------


class RmsnormQuantizeSm90:
    """Rows of k columns; blocked: the layout of the scales; amax: only the largest magnitude is kept."""

    def __init__(self, config: Config, k: int, weight: Any, blocked: bool, amax: bool):
        self.config, self.k, self.weight, self.blocked, self.amax = config, k, weight, blocked, amax
        self.sharing, self.slots, self.blocks = config.sharing(k), slots(k), k // BLOCK

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        weight: cute.Pointer,
        alpha: cute.Pointer,
        out: tuple[cute.Pointer, ...],
        m: Int32,
        stride: Int64,
        eps: Float32,
        ctas: Int32,
        stream: cuda.CUstream,
    ):
        """out: codes and scales, or where the bits of the largest magnitude are; stride: elements from row to row."""
        addresses = (x.toint(), weight.toint(), tuple(p.toint() for p in out))
        self.kernel(addresses, cute.make_tensor(alpha, cute.make_layout(1)), m, stride, eps).launch(
            grid=(cutlass.min(m, ctas), 1, 1),
            block=(self.config.threads(self.k), 1, 1),
            stream=stream,
            min_blocks_per_mp=1,
            use_pdl=OVERLAP,
        )

    @cute.kernel
    def kernel(self, addresses: Any, alpha: cute.Tensor, m: Int32, stride: Int64, eps: Float32):
        c = self.config
        tidx, _, _ = cute.arch.thread_idx()
        warp, lane = cute.arch.make_warp_uniform(tidx // 32), tidx % 32
        smem = SmemAllocator()
        barriers = smem.allocate_tensor(Int64, cute.make_layout(BARRIER_BYTES // 8), byte_alignment=1024).iterator
        sizes = {"rows": self.slots * self.k // 2, "table": TABLE_BYTES // 4, "sums": self.slots, "factors": self.slots}
        room = {
            name: Int32(smem.allocate_tensor(Uint32, cute.make_layout(n), byte_alignment=128).iterator.toint())
            for name, n in sizes.items()
        }
        full, half, summed, empty = (barriers + i * self.slots for i in range(4))
        if tidx < self.slots:
            for bar in (full, half, summed):
                cute.arch.mbarrier_init(bar + tidx, 1)
            cute.arch.mbarrier_init(empty + tidx, self.sharing)
        cute.arch.mbarrier_init_fence()
        begin()
        if cutlass.const_expr(not self.amax):
            self.fill_table(room, alpha, tidx)
        cute.arch.sync_threads()
        bars = (full, half, summed, empty)
        if warp == 0:
            self.load(room, bars, addresses, m, stride)
        elif warp < 1 + 2 * c.summing:
            self.sum(room, bars, m, eps, (warp - 1) // 2, (warp - 1) % 2, lane)
        else:
            own = warp - (1 + 2 * c.summing)
            self.quantise(room, bars, addresses, alpha, m, own // self.sharing, own % self.sharing, lane)

    @cute.jit
    def fill_table(self, room, alpha, tidx):
        """Of each scale what its elements are multiplied with: 1 / (scale alpha), or 0."""
        if tidx < SCALES:
            product = mul(f16_to_f32(e4m3x2_to_f16x2(Uint32(tidx))), alpha[0])
            factor = cutlass.select_(product == Float32(0.0), Float32(0.0), reciprocal(product))
            put("st.shared.f32", room["table"] + 4 * tidx, factor)

    def next(self, slot, phase, by: int):
        """The slot so many after this one, and its barriers' phase."""
        slot = slot + by
        over = slot >= self.slots
        return cutlass.select_(over, slot - self.slots, slot), cutlass.select_(over, phase ^ 1, phase)

    def walk(self):
        """The first row of this CTA, and how far it is from one to the next."""
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        return block, blocks

    @cute.jit
    def arrive(self, bar):
        """This warp has done its part."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(bar)

    @cute.jit
    def load(self, room, bars, addresses, m, stride):
        full, _, _, empty = bars
        first, step = self.walk()
        policy = create_policy(Boolean(True))
        slot, phase = Int32(0), Int32(0)
        for row in cutlass.range(first, m, step, unroll=1):
            cute.arch.mbarrier_wait(empty + slot, phase ^ 1)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full + slot, 2 * self.k)
                to, source = room["rows"] + slot * (2 * self.k), addresses[0] + Int64(row) * stride * 2
                bulk_load(to, source, Int32(2 * self.k), Int32((full + slot).toint()), policy)
            slot, phase = self.next(slot, phase, 1)

    def half_block(self, at, lane, which: int):
        """Half of a block: lanes begin with other halves, so that eight of them read from all banks."""
        first = (lane // 4) % 2
        return load_words(at + 16 * ((first + which) % 2))

    @cute.jit
    def sum(self, room, bars, m, eps, pair, part, lane):
        """A thread has a block of each chunk of 1024 columns, so that its tree begins within threads."""
        full, half, summed, _ = bars
        first, step = self.walk()
        slot, phase = Int32(pair), Int32(0)
        own = 32 * part + lane
        chunks = (self.blocks + CHUNK_BLOCKS - 1) // CHUNK_BLOCKS
        ragged = self.blocks % CHUNK_BLOCKS != 0  # then half of the last is there
        for _ in cutlass.range(first + pair * step, m, step * self.config.summing, unroll=1):
            cute.arch.mbarrier_wait(full + slot, phase)
            at = room["rows"] + slot * (2 * self.k) + own * (2 * BLOCK)
            parts = []
            for i in cutlass.range_constexpr(2):
                squares = []
                for chunk in cutlass.range_constexpr(chunks):
                    if cutlass.const_expr(chunk + 1 < chunks or not ragged):
                        words = self.half_block(at + chunk * (2 * SUM_CHUNK), lane, i)
                    else:
                        there = cutlass.min(own, self.blocks % CHUNK_BLOCKS - 1) - own
                        words = self.half_block(at + chunk * (2 * SUM_CHUNK) + there * (2 * BLOCK), lane, i)
                        words = [cutlass.select_(there == 0, w, Uint32(0)) for w in words]
                    squares.append([mul(v, v) for v in widened(words)])
                parts.append(pairs_summed(halves_added(squares)))
            total = add(parts[0], parts[1])
            for by in (1, 2, 4, 8, 16):
                total = add(total, cute.arch.shuffle_sync_bfly(total, by))
            if part == 1:
                with cute.arch.elect_one():
                    put("st.shared.f32", room["sums"] + 4 * slot, total)
                self.arrive(half + slot)
            else:
                cute.arch.mbarrier_wait(half + slot, phase)
                mean = quotient(add(total, load_number(room["sums"] + 4 * slot)), Float32(self.k))
                factor = reciprocal(root(add(mean, eps)))
                with cute.arch.elect_one():
                    put("st.shared.f32", room["factors"] + 4 * slot, factor)
                self.arrive(summed + slot)
            slot, phase = self.next(slot, phase, self.config.summing)

    @cute.jit
    def quantise(self, room, bars, addresses, alpha, m, group, share, lane):
        full, _, summed, empty = bars
        c, (first, step) = self.config, self.walk()
        slot, phase = Int32(group), Int32(0)
        turned = (lane // 4) % 2 == 1  # begins with the second half of its blocks
        own = share * (32 * c.tiles) + lane
        weights = [self.weights(addresses[1], own + 32 * j, lane) for j in range(c.tiles)]
        inverse = Float32(0.0)
        if cutlass.const_expr(not self.amax):
            inverse = inverse_scale(alpha[0])
        most = Uint32(0)
        for row in cutlass.range(first + group * step, m, step * c.groups, unroll=1):
            cute.arch.mbarrier_wait(full + slot, phase)
            cute.arch.mbarrier_wait(summed + slot, phase)
            norm = load_number(room["factors"] + 4 * slot)
            at = room["rows"] + slot * (2 * self.k) + own * (2 * BLOCK)
            words = [[self.half_block(at + j * (2 * TILE), lane, i) for i in range(2)] for j in range(c.tiles)]
            self.arrive(empty + slot)
            for j in cutlass.range_constexpr(c.tiles):
                ys = [
                    [mul(mul(v, norm), w) for v, w in zip(widened(words[j][i]), weights[j][i], strict=True)]
                    for i in range(2)
                ]
                if cutlass.const_expr(self.amax):
                    for y in (*ys[0], *ys[1]):
                        most = cutlass.max(most, float_bits(y) & Uint32(0x7FFFFFFF))
                else:
                    self.store(room, addresses[2], ys, inverse, row, own + 32 * j, turned)
            slot, phase = self.next(slot, phase, c.groups)
        if cutlass.const_expr(self.amax):
            most = largest_of_lanes(most)
            if lane == 0:
                put("red.global.max.u32", addresses[2][0], most)
        elif cutlass.const_expr(self.blocked):
            for row in cutlass.range(m + first + group * step, (m + 127) // 128 * 128, step * c.groups, unroll=1):
                for j in cutlass.range_constexpr(c.tiles):
                    put("st.global.b8", addresses[2][1] + self.scale_at(row, own + 32 * j), Uint32(0))

    def weights(self, address, block, lane):
        """Of a block's halves, in this lane's order."""
        first = (lane // 4) % 2
        found = []
        for i in range(2):
            at = block * BLOCK + 8 * ((first + i) % 2)
            if self.weight is Float32:
                words = [w for q in range(2) for w in fetch_words(address + Int64(at + 4 * q) * 4)]
                found.append([bits_float(w) for w in words])
            else:
                found.append(widened(fetch_words(address + Int64(at) * 2)))
        return found

    def store(self, room, out, ys, inverse, row, block, turned):
        """Codes and scale of a block, by rule absmax."""
        tops = [larger(a, b) for a, b in zip(*ys, strict=True)]
        while len(tops) > 1:
            tops = [larger(a, b) for a, b in zip(tops[::2], tops[1::2], strict=True)]
        t = mul(mul(tops[0], Float32(1 / 6)), inverse)
        byte, _ = to_e4m3(cutlass.select_(t <= Float32(E4M3_MAX), t, Float32(E4M3_MAX)))
        factor = load_number(room["table"] + Int32(byte) * 4)
        low, high = (to_e2m1x8_sm90([mul(y, factor) for y in half]) for half in ys)
        low, high = cutlass.select_(turned, high, low), cutlass.select_(turned, low, high)
        put_codes(out[0] + Int64(row) * (self.k // 2) + block * (BLOCK // 2), low, high)
        put("st.global.b8", out[1] + self.scale_at(row, block), byte)

    def scale_at(self, row, block):
        """Where a block's scale lies."""
        if not self.blocked:
            return Int64(row) * self.blocks + block
        by_row = Int64(row // 128) * (self.blocks * 128) + row % 32 * 16 + row % 128 // 32 * 4
        return by_row + block // 4 * 512 + block % 4


class Finish:
    """A global scale from the bits of the largest magnitude."""

    @cute.jit
    def __call__(self, bits: cute.Pointer, alpha: cute.Pointer, stream: cuda.CUstream):
        one = cute.make_layout(1)
        self.kernel(cute.make_tensor(bits, one), cute.make_tensor(alpha, one)).launch(
            grid=(1, 1, 1), block=(32, 1, 1), stream=stream, use_pdl=OVERLAP
        )

    @cute.kernel
    def kernel(self, bits: cute.Tensor, alpha: cute.Tensor):
        begin()
        alpha[0] = quotient(bits[0], Float32(6 * E4M3_MAX))


# --- host -------------------------------------------------------------------------------------------------------------

_GMEM = cute.AddressSpace.gmem
_WEIGHTS = {torch.bfloat16: BFloat16, torch.float32: Float32}


def _arguments(weight: Any, pointers: tuple[int, ...], m: int, stride: int, eps: float, ctas: int) -> tuple[Any, ...]:
    """All but the stream. pointers: x, weight, alpha, codes and scales (or, twice, the largest magnitude)."""
    kinds = (BFloat16, weight, Float32, Uint8, Uint8)
    x, w, alpha, *out = (
        make_ptr(t, p, _GMEM, assumed_align=t.width // 8) for t, p in zip(kinds, pointers, strict=True)
    )
    return x, w, alpha, tuple(out), Int32(m), Int64(stride), Float32(eps), Int32(ctas)


def _fake_arguments(weight: Any) -> tuple[Any, ...]:
    return *_arguments(weight, (16,) * 5, 1, 1, 1.0, 1), make_fake_stream()


@functools.cache
def compiled(config: Config, k: int, weight: Any, blocked: bool, amax: bool) -> Any:
    """The compiled host function, for every number of rows."""
    made_for = (config, k, weight.__name__, blocked, amax, OVERLAP)
    function = RmsnormQuantizeSm90(config, k, weight, blocked, amax)
    return cross.compiled(function, *_fake_arguments(weight), arch=ARCH, module=__name__, made_for=made_for)


@functools.cache
def compiled_finish() -> Any:
    """The compiled host function that divides the largest magnitude."""
    pointers = (make_ptr(Float32, 16, _GMEM, assumed_align=4) for _ in range(2))
    return cross.compiled(
        Finish(), *pointers, make_fake_stream(), arch=ARCH, module=__name__, made_for=("alpha", OVERLAP)
    )


def build(problem: RmsnormQuantizeProblem, config: Config, arch: str | None = None) -> Built:
    """Compile for `problem` without a GPU. Raises ValueError for another arch or what cannot run, by `refusal`."""
    if arch not in (None, ARCH):
        raise ValueError(f"this kernel is for {ARCH}, got {arch!r}")
    if reason := refusal(problem, config):
        raise ValueError(reason)
    function = RmsnormQuantizeSm90(config, problem.k, BFloat16, problem.sf_layout == "blocked_128x4", False)
    return cross.build(function, *_fake_arguments(BFloat16), arch=ARCH)


def build_key(problem: RmsnormQuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on."""
    return problem.k, problem.sf_layout


def precompile(problem: RmsnormQuantizeProblem, config: Config) -> None:
    """Compile for `problem` into the cache, without a GPU. Raises ValueError for what cannot run, by `refusal`."""
    if reason := refusal(problem, config):
        raise ValueError(reason)
    compiled(config, problem.k, BFloat16, problem.sf_layout == "blocked_128x4", False)
    compiled(config, problem.k, BFloat16, False, True)
    compiled_finish()


@functools.cache
def _sms(device: int | None) -> int:
    """CTAs at a time; device None: on an H100 that is not here."""
    return SM_COUNT[ARCH] if device is None else torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    x: Tensor, weight: Tensor, eps: float, alpha: Tensor, out: tuple[Tensor, Tensor], config: Config, *, blocked: bool,
    amax: bool,
) -> None:  # fmt: skip
    m, k = x.shape
    kind = "bf16" if x.dtype == torch.bfloat16 else str(x.dtype)
    if reason := refusal(RmsnormQuantizeProblem(m=m, k=k, x=kind), config):
        raise ValueError(reason)
    if x.stride(1) != 1:
        raise ValueError(f"the elements of a row must be contiguous, got strides {x.stride()}")
    if x.data_ptr() % 16 or (m > 1 and x.stride(0) % 8):
        x = x.clone(memory_format=torch.contiguous_format)  # bulk copies begin at multiples of 16 bytes
    if weight.dtype not in _WEIGHTS or weight.data_ptr() % 16:
        weight = weight.float().clone()
    pointers = tuple(t.data_ptr() for t in (x, weight, alpha, *out))
    ctas = _sms(x.device.index if x.is_cuda else None)
    arguments = _arguments(_WEIGHTS[weight.dtype], pointers, m, x.stride(0) if m > 1 else k, eps, ctas)
    launches = [(compiled(config, k, _WEIGHTS[weight.dtype], blocked, amax), arguments)]
    if amax:
        finish = tuple(make_ptr(Float32, t.data_ptr(), _GMEM, assumed_align=4) for t in (out[0], alpha))
        launches.append((compiled_finish(), finish))
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        # on CPU tensors an emulator stands in for the CUDA runtime
        stream = cuda.CUstream(torch.cuda.current_stream().cuda_stream if x.is_cuda else 0)
        for function, operands in launches:
            function(*operands, stream)


def launch(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, out: NVFP4Tensor, rule: Rule, config: Config) -> None:
    """x [m, k], rows of any stride, with weight [k], under alpha float32 [] -> out's codes and scales.

    On the current stream. Raises ValueError for what cannot run, by `refusal`: any number of rows can.
    """
    if rule != "absmax":
        raise ValueError(f"rule={rule}: this kernel takes rule absmax")
    if x.shape[0]:
        blocked = out.sf_layout == "blocked_128x4"
        _launch(x, weight, eps, alpha, (out.data, out.sf), config, blocked=blocked, amax=False)


def global_scale(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, config: Config) -> None:
    """alpha float32 [] <- amax / 2688 of the normed rows of x [m, k], nothing read on the host."""
    if not x.shape[0]:
        alpha.zero_()
        return
    bits = torch.zeros((), dtype=torch.int32, device=x.device)
    _launch(x, weight, eps, alpha, (bits, bits), config, blocked=False, amax=True)


def warm(problem: RmsnormQuantizeProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    precompile(problem, config)
    if torch.cuda.is_available():
        x, alpha = torch.zeros(1, problem.k, dtype=torch.bfloat16, device="cuda"), torch.ones((), device="cuda")
        global_scale(x, x[0], 1.0, alpha, config)
        out = NVFP4Tensor.empty((1, problem.k), alpha, problem.sf_layout)
        launch(x, x[0], 1.0, alpha, out, problem.rule, config)
