"""Integer, floating point, half precision, comparison, logic and shift instructions (PTX ISA, sections of these names).

FP32 and FP64 are numpy's IEEE arithmetic; what must round once after more than one operation, or not to nearest, goes
through FP64 rounded to odd. Approximations (`ex2.approx`, `rsqrt.approx`, ...) are given correctly rounded: the ISA
states a bound for them, not the bits.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

from .. import numbers
from ..machine import LANES, Warp
from ..numbers import U32, U64, Array, every, some
from ..parser import Imm, Instruction, Pair
from ..program import DTYPES, Mask, Program, Read, Run, constant, decoder, kind_of, side_by_side, simple, unknown

Exact = Callable[..., Fraction]
FLOATS = ("f32", "f64", "f32x2", "f16", "f16x2", "bf16", "bf16x2")
PAIRS = {"s16x2": np.int16, "u16x2": np.uint16}


# --- floating point: every type as FP64 lanes, [32] or [32, 2] ---


def _rounding(i: Instruction) -> str:
    for mode in ("rn", "rz", "rm", "rp"):
        if mode in i.op:
            return mode
    return "rn"


def float_reader(i: Instruction, p: Program, operand: Any, kind: str) -> Read:
    """Values as FP64, [32] or [32, 2] for packed types."""
    read = p.source(operand, kind)
    if kind == "f64":
        return (lambda w: flush(read(w), numbers.TINY["f64"])) if "ftz" in i.op else read
    if kind == "f32":
        if "ftz" in i.op:
            return lambda w: flush(read(w)).astype(np.float64)
        return lambda w: read(w).astype(np.float64)
    if kind == "f32x2":
        return lambda w: read(w).view(np.float32).reshape(LANES, 2).astype(np.float64)
    if kind in ("f16", "f16x2"):
        if "ftz" in i.op:
            return lambda w: flush(_halves(read(w)).view(np.float16).astype(np.float64), numbers.TINY["f16"])
        return lambda w: _halves(read(w)).view(np.float16).astype(np.float64)
    if kind in ("bf16", "bf16x2"):
        return lambda w: numbers.from_bf16(_halves(read(w))).astype(np.float64)
    raise unknown(i)


def float_writer(i: Instruction, p: Program, operand: Any, kind: str) -> Callable[[Warp, Array, Mask], None]:
    """Rounds FP64 (exact, or rounded to odd) to `kind`, once."""
    write, mode = p.target(operand, kind), _rounding(i)
    ftz, sat, relu = "ftz" in i.op, "sat" in i.op, "relu" in i.op

    tiny = numbers.TINY[kind.removesuffix("x2")] if ftz else 0.0

    def put(w: Warp, v: Array, m: Mask) -> None:
        if sat:
            v = np.where(v > 0, np.minimum(v, 1.0), 0.0)
        if relu:
            v = np.where(v > 0, v, np.where(np.isnan(v), v, 0.0))
        if ftz:  # what would round up to a normal number is flushed, too
            v = flush(v, tiny)
        if kind == "f64":
            write(w, v, m)
        elif kind in ("f32", "f32x2"):
            out = _nan32(numbers.to_f32(v, mode))
            write(w, out if kind == "f32" else np.ascontiguousarray(out).view(np.uint64).reshape(LANES), m)
        else:
            if kind.startswith("f16"):
                bits = np.where(np.isnan(v), np.uint16(0x7FFF), numbers.to_f16(v, mode))
            else:
                bits = numbers.to_bf16(v, mode)
            if kind.endswith("x2"):
                write(w, np.ascontiguousarray(bits).view(np.uint32).reshape(LANES), m)
            else:
                write(w, bits if kind == "bf16" else bits.view(np.float16), m)

    return put


def flush(x: Array, tiny: float = numbers.TINY["f32"]) -> Array:
    """Numbers smaller than `tiny` replaced by zeros of their sign."""
    return np.where(np.abs(x) < x.dtype.type(tiny), np.copysign(x.dtype.type(0), x), x)


def _halves(x: Array) -> Array:
    return x.view(np.uint16) if x.dtype.itemsize == 2 else x.view(np.uint16).reshape(LANES, 2)


def _float(i: Instruction, p: Program, kind: str, count: int, compute: Callable[..., Array]) -> Run:
    read = [float_reader(i, p, x, kind) for x in i.operands[1 : 1 + count]]
    return simple(read, float_writer(i, p, i.operands[0], kind), compute)


def _is_mixed(i: Instruction) -> bool:
    return i.op[-2] == "f32" and i.op[-1] in ("f16", "bf16")


def _mixed(i: Instruction, p: Program, count: int, compute: Callable[..., Array]) -> Run:
    """PTX ISA, "Mixed Precision Floating-Point Instructions": the last source is FP32, and so is the result."""
    read = [float_reader(i, p, x, i.op[-1]) for x in i.operands[1:count]]
    read.append(float_reader(i, p, i.operands[count], "f32"))
    return simple(read, float_writer(i, p, i.operands[0], "f32"), compute)


def _f64(i: Instruction, p: Program, count: int, compute: Callable[..., Array], exact: Exact) -> Run:
    """FP64 needs exact arithmetic for directed rounding. A NaN operand is handed on, of several the one that is asked
    for first: the second, the third (for a quotient the first)."""
    mode = _rounding(i)

    def rounded(*xs: Array) -> Array:
        out = compute(*xs) if mode == "rn" else numbers.exact_f64(compute, exact, mode, *xs)
        for x in xs[::-1] if i.op[0] == "div" else xs[:1] + xs[:0:-1]:
            out = np.where(np.isnan(x), (x.view(U64) | U64(1 << 51)).view(np.float64), out)
        return out

    return _float(i, p, "f64", count, rounded)


def _plain_f32(i: Instruction, kind: str) -> bool:
    return kind == "f32" and not {"ftz", "sat", "rz", "rm", "rp"} & set(i.op)


def fma_odd(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of values of at most 26 bits, in FP64 rounded to odd."""
    return numbers.round_odd_sum(a * b, c)


def _exact_fma(a: Fraction, b: Fraction, c: Fraction) -> Fraction:
    return a * b + c


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """Rounded once; lane by lane in exact arithmetic."""
    return numbers.exact_f64(lambda x, y, z: x * y + z, _exact_fma, "rn", a, b, c)


def _zero_sum(out: Array, a: Array, b: Array) -> Array:
    """Rounding towards minus infinity makes -0 of a sum of opposite numbers."""
    return np.where((out == 0) & (np.signbit(a) != np.signbit(b)), -0.0, out)


# --- arithmetic on either ---


def _binary(name: str) -> None:
    integer, sign = {"add": (np.add, 1), "sub": (np.subtract, -1)}[name]

    def odd(i: Instruction) -> Callable[[Array, Array], Array]:
        down = _rounding(i) == "rm"

        def compute(a: Array, b: Array) -> Array:
            out = numbers.round_odd_sum(a, b * sign)
            return _zero_sum(out, a, b * sign) if down else out

        return compute

    def decode(i: Instruction, p: Program) -> Run:
        kind = kind_of(i)
        if kind in FLOATS:
            if _plain_f32(i, kind):
                read = [p.source(x, kind) for x in i.operands[1:3]]
                return simple(read, p.target(i.operands[0], kind), lambda a, b: _nan32(integer(a, b)))
            if kind == "f64":
                down = _rounding(i) == "rm"

                def whole(a: Array, b: Array) -> Array:
                    out = integer(a, b)
                    return _zero_sum(out, a, b * sign) if down else out

                return _f64(i, p, 2, whole, lambda a, b: a + b * sign)
            return _float(i, p, kind, 2, odd(i))
        if "cc" in i.op:
            return _carry(i, p, name, False)
        read = [p.source(x, kind) for x in i.operands[1:3]]
        if "sat" in i.op:
            low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max

            def saturate(a: Array, b: Array) -> Array:
                return np.clip(integer(a.astype(np.int64), b.astype(np.int64)), low, high).astype(np.int32)

            return simple(read, p.target(i.operands[0], kind), saturate)
        return simple(read, p.target(i.operands[0], kind), integer)

    def decode_any(i: Instruction, p: Program) -> Run:
        if i.op[-1] in PAIRS:
            return _pairs(i, p, integer)
        return _mixed(i, p, 2, odd(i)) if _is_mixed(i) else decode(i, p)

    decoder(name)(decode_any)


_binary("add")
_binary("sub")


def _pairs(i: Instruction, p: Program, compute: Callable[[Array, Array], Array]) -> Run:
    """Two integers of 16 bits a register."""
    half = PAIRS[next(x for x in i.op if x in PAIRS)]
    read = [p.source(x, "b32") for x in i.operands[1:3]]

    def both(a: Array, b: Array) -> Array:
        return compute(a.view(half), b.view(half)).astype(half).view(U32)

    return simple(read, p.target(i.operands[0], "b32"), both)


_NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)


def _nan32(x: Array) -> Array:
    nan = np.isnan(x)
    return np.where(nan, _NAN32, x) if some(nan) else x


def _carry(i: Instruction, p: Program, name: str, use: bool) -> Run:
    """Extended-precision add, subtract and multiply-add; the carry flag is the warp's."""
    kind = kind_of(i)
    wide = DTYPES[kind].itemsize == 8
    unsigned = "u64" if wide else "u32"
    a, b = _addends(i, p, kind, unsigned)
    write, keep = p.target(i.operands[0], unsigned), "cc" in i.op

    def run(w: Warp, m: Mask) -> str | None:
        x, y = a(w).astype(object), b(w).astype(object)
        carry = w.state.get("carry", np.zeros(LANES, np.int64)) if use else np.zeros(LANES, np.int64)
        total = x + y + carry if name == "add" else x - y - carry
        bits = 64 if wide else 32
        result = np.array([int(t) % (1 << bits) for t in total], U64 if wide else U32)
        flag = np.array([not 0 <= int(t) < (1 << bits) for t in total], np.int64)
        write(w, result, m)
        if keep:
            w.state["carry"] = flag if m is None else np.where(m, flag, w.state.get("carry", flag * 0))
        return None

    return run


def _addends(i: Instruction, p: Program, kind: str, unsigned: str) -> tuple[Read, Read]:
    if len(i.operands) == 3:
        return p.source(i.operands[1], unsigned), p.source(i.operands[2], unsigned)
    a, b, c = p.source(i.operands[1], kind), p.source(i.operands[2], kind), p.source(i.operands[3], unsigned)
    half = _high if "hi" in i.op else np.multiply
    dtype = DTYPES[unsigned]
    return lambda w: half(a(w), b(w)).view(dtype), c


@decoder("madc")
def _madc(i: Instruction, p: Program) -> Run:
    return _carry(i, p, "add", True)


@decoder("addc")
def _addc(i: Instruction, p: Program) -> Run:
    return _carry(i, p, "add", True)


@decoder("subc")
def _subc(i: Instruction, p: Program) -> Run:
    return _carry(i, p, "sub", True)


_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _high(a: Array, b: Array) -> Array:
    """High half of the product."""
    dtype = a.dtype
    if dtype.itemsize < 8:
        wide = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        return (a.astype(wide) * b.astype(wide) >> wide.type(8 * dtype.itemsize)).astype(dtype)
    high = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([h % (1 << 64) for h in high], np.uint64).view(dtype)


_UPPER, _HALF_A_UNIT = U32(0xFFFF0000), U32(0x7FFF)


def _mul_bf16x2(i: Instruction, p: Program, whole: Run) -> Run:
    """In FP32, which holds a product of two BF16 numbers unless it is small; `whole` is for those, and for NaN."""
    a, b = (p.source(x, "b32") for x in i.operands[1:3])
    write = p.target(i.operands[0], "b32")

    def halves(x: Array) -> Array:
        """The low one, then the high one: [2, 32] FP32."""
        out = np.empty((2, LANES), U32)
        np.left_shift(x, U32(16), out=out[0])
        np.bitwise_and(x, _UPPER, out=out[1])
        return out.view(np.float32)

    def run(w: Warp, m: Mask) -> str | None:
        x, y = halves(a(w)), halves(b(w))
        product = x * y
        exact = np.abs(product) >= numbers.TINY["f32"]
        if not every(exact) and not (exact | ((product == 0) & ((x == 0) | (y == 0)))).all():
            return whole(w, m)
        bits = product.view(U32)
        bits = bits + _HALF_A_UNIT + (bits >> U32(16) & U32(1))
        write(w, bits[0] >> U32(16) | bits[1] & _UPPER, m)
        return None

    return run


@decoder("mul")
def _mul(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    if kind in FLOATS:
        if _plain_f32(i, kind):
            read = [p.source(x, kind) for x in i.operands[1:3]]
            return simple(read, p.target(i.operands[0], kind), lambda a, b: _nan32(a * b))
        if kind == "f64":
            return _f64(i, p, 2, np.multiply, lambda a, b: a * b)
        whole = _float(i, p, kind, 2, np.multiply)
        return _mul_bf16x2(i, p, whole) if kind == "bf16x2" and set(i.op) <= {"mul", "rn", "bf16x2"} else whole
    a, b = (p.source(x, kind) for x in i.operands[1:3])
    if "wide" in i.op:
        wide = _WIDER[kind]
        dtype = DTYPES[wide]
        return simple([a, b], p.target(i.operands[0], wide), lambda x, y: x.astype(dtype) * y.astype(dtype))
    if "hi" in i.op:
        return simple([a, b], p.target(i.operands[0], kind), _high)
    return simple([a, b], p.target(i.operands[0], kind), np.multiply)


@decoder("mul24", "mad24")
def _mul24(i: Instruction, p: Program) -> Run:
    """The product of 24-bit integers has 48 bits; lo takes its low 32, hi its high 32."""
    kind = kind_of(i)
    if "sat" in i.op:
        raise unknown(i)
    dtype = DTYPES[kind]
    shift = dtype.type(8)
    wide = np.int64 if dtype.kind == "i" else np.uint64
    down = wide(16 if "hi" in i.op else 0)

    def low24(x: Array) -> Array:
        return ((x << shift) >> shift).astype(wide)

    def compute(a: Array, b: Array, *c: Array) -> Array:
        product = (low24(a) * low24(b) >> down).astype(dtype)
        return product + c[0] if c else product

    read = [p.source(x, kind) for x in i.operands[1:]]
    return simple(read, p.target(i.operands[0], kind), compute)


@decoder("sad")
def _sad(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    read = [p.source(x, kind) for x in i.operands[1:4]]
    return simple(read, p.target(i.operands[0], kind), lambda a, b, c: c + np.where(a < b, b - a, a - b))


@decoder("mad", "fma")
def _mad(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    if kind in FLOATS:

        def zero(out: Array, a: Array, b: Array, c: Array) -> Array:
            return _zero_sum(out, a * b, c) if _rounding(i) == "rm" else out

        if kind == "f64":
            return _f64(i, p, 3, lambda a, b, c: zero(fma_f64(a, b, c), a, b, c), _exact_fma)
        if _is_mixed(i):
            return _mixed(i, p, 3, lambda a, b, c: zero(fma_odd(a, b, c), a, b, c))
        return _float(i, p, kind, 3, lambda a, b, c: zero(fma_odd(a, b, c), a, b, c))
    if "cc" in i.op:
        return _carry(i, p, "add", False)
    a, b = (p.source(x, kind) for x in i.operands[1:3])
    if "wide" in i.op:
        wide = _WIDER[kind]
        dtype, c = DTYPES[wide], p.source(i.operands[3], _WIDER[kind])
        write = p.target(i.operands[0], wide)
        return simple([a, b, c], write, lambda x, y, z: x.astype(dtype) * y.astype(dtype) + z)
    c, write = p.source(i.operands[3], kind), p.target(i.operands[0], kind)
    if "sat" in i.op:
        low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max

        def saturate(x: Array, y: Array, z: Array) -> Array:
            return np.clip(_high(x, y).astype(np.int64) + z, low, high).astype(np.int32)

        return simple([a, b, c], write, saturate)
    if "hi" in i.op:
        return simple([a, b, c], write, lambda x, y, z: _high(x, y) + z)
    return simple([a, b, c], write, lambda x, y, z: x * y + z)


def _divide(x: Array, y: Array) -> Array:
    """Integer division towards zero. For a zero divisor the hardware gives all ones, and so for the remainder."""
    safe = np.where(y == 0, y.dtype.type(1), y)
    if x.dtype.kind == "u":
        q = x // safe
    else:
        q = x // safe
        q = q + ((x % safe != 0) & ((x < 0) != (safe < 0))).astype(x.dtype)
    return np.where(y == 0, np.zeros(1, x.dtype) - x.dtype.type(1), q).astype(x.dtype)


def _div_approx(x: Array, y: Array) -> Array:
    """PTX ISA, "div": a finite number by one above 2^126 is zero."""
    huge = np.isfinite(y) & (np.abs(y) > 2.0**126)
    return np.where(huge, x * np.copysign(0.0, y), x / y)


@decoder("div")
def _div(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    if kind == "f32":
        if _plain_f32(i, kind) and "approx" not in i.op:
            read = [p.source(x, kind) for x in i.operands[1:3]]
            return simple(read, p.target(i.operands[0], kind), lambda a, b: _nan32(a / b))
        # FP64 quotients of FP32 numbers are never so close to a tie or an FP32 number that the second rounding matters
        if "approx" in i.op:
            return _float(i, p, kind, 2, _div_approx)
        return _float(i, p, kind, 2, np.divide)
    if kind == "f64":
        return _f64(i, p, 2, np.divide, lambda a, b: a / b)
    read = [p.source(x, kind) for x in i.operands[1:3]]
    return simple(read, p.target(i.operands[0], kind), _divide)


@decoder("rem")
def _rem(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    read = [p.source(x, kind) for x in i.operands[1:3]]

    def remainder(x: Array, y: Array) -> Array:
        return np.where(y == 0, ~x.dtype.type(0), x - _divide(x, y) * y)

    return simple(read, p.target(i.operands[0], kind), remainder)


def _extremum(name: str) -> None:
    pick = {"min": np.minimum, "max": np.maximum}[name]
    finite = {"min": np.fmin, "max": np.fmax}[name]

    def decode(i: Instruction, p: Program) -> Run:
        if any(x in PAIRS for x in i.op):
            relu = "relu" in i.op
            return _pairs(i, p, lambda a, b: np.maximum(pick(a, b), 0) if relu else pick(a, b))
        kind = kind_of(i)
        count = len(i.operands) - 1
        if kind in FLOATS:
            by_nan = pick if "NaN" in i.op else finite
            xorsign = "xorsign" in i.op

            def compute(*xs: Array) -> Array:
                if xorsign:
                    negative = np.logical_xor.reduce([np.signbit(x) for x in xs])
                    out = magnitude(*(np.abs(x) for x in xs))
                    return np.where(negative, -out, out)
                return magnitude(*xs)

            def magnitude(*xs: Array) -> Array:
                out = xs[0]
                for x in xs[1:]:
                    zero = (out == 0) & (x == 0)
                    negative = np.signbit(out) | np.signbit(x) if name == "min" else np.signbit(out) & np.signbit(x)
                    signed = np.where(negative, -0.0, 0.0)
                    out = np.where(zero, signed, by_nan(out, x))
                return np.abs(out) if "abs" in i.op else out

            if kind == "f64":
                # of two NaNs the second
                return _float(i, p, kind, 2, lambda a, b: np.where(np.isnan(a) & np.isnan(b), b, compute(a, b)))
            return _float(i, p, kind, count, compute)
        read = [p.source(x, kind) for x in i.operands[1:3]]
        if "relu" in i.op:
            return simple(read, p.target(i.operands[0], kind), lambda a, b: np.maximum(pick(a, b), 0))
        return simple(read, p.target(i.operands[0], kind), pick)

    decoder(name)(decode)


_extremum("min")
_extremum("max")


@decoder("abs")
def _abs(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    if kind in FLOATS:
        return _sign_bits(i, p, kind, lambda bits, sign: bits & ~sign)
    return simple([p.source(i.operands[1], kind)], p.target(i.operands[0], kind), np.abs)


@decoder("neg")
def _neg(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    if kind in FLOATS:
        return _sign_bits(i, p, kind, lambda bits, sign: bits ^ sign)
    return simple([p.source(i.operands[1], kind)], p.target(i.operands[0], kind), np.negative)


def _sign_bits(i: Instruction, p: Program, kind: str, change: Callable[[Array, Any], Array]) -> Run:
    """NaNs become the canonical one, or stay what they are in FP64."""
    part = kind.removesuffix("x2")
    sign: Any = {"f32": U32(1 << 31), "f64": U64(1 << 63)}.get(part, np.uint16(1 << 15))
    infinite = {"f32": U32(0x7F800000), "f64": U64(0x7FF << 52), "f16": np.uint16(0x7C00)}.get(part, np.uint16(0x7F80))
    least = U64(1 << 52) if part == "f64" else {"f32": U32(1 << 23)}.get(part, np.uint16(1 << 10))
    ftz = "ftz" in i.op

    def compute(x: Array) -> Array:
        v = x.view(sign.dtype)
        magnitude = v & ~sign
        out = change(np.where(magnitude < least, v & sign, v) if ftz else v, sign)
        return np.where(magnitude > infinite, v if part == "f64" else sign - sign.dtype.type(1), out).view(x.dtype)

    unsigned = f"u{8 * DTYPES[kind].itemsize}"
    return simple([p.source(i.operands[1], unsigned)], p.target(i.operands[0], unsigned), compute)


def _function(name: str, compute: Callable[[Array], Array], exact: Exact | None = None) -> None:
    def decode(i: Instruction, p: Program) -> Run:
        kind = kind_of(i)
        if kind == "f64" and exact:
            return _f64(i, p, 1, compute, exact)
        return _float(i, p, kind, 1, compute)

    decoder(name)(decode)


def _turns(x: Array) -> Array:
    """The angle as the special function unit gets it: in turns, cut to FP32, whole ones dropped."""
    t = numbers.to_f32(x * np.float64(np.float32(1 / (2 * np.pi))), "rz").astype(np.float64)
    return (t - np.trunc(t)) * (2 * np.pi)


_function("rcp", lambda x: 1.0 / x, lambda x: 1 / x)
_function("sqrt", np.sqrt, numbers.root)
_function("rsqrt", lambda x: 1.0 / np.sqrt(x))
_function("sin", lambda x: np.sin(_turns(x)))
_function("cos", lambda x: np.cos(_turns(x)))
_function("lg2", np.log2)
_function("ex2", np.exp2)
_function("tanh", np.tanh)


@decoder("copysign")
def _copysign(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    read = [p.source(x, kind) for x in i.operands[1:3]]
    return simple(read, p.target(i.operands[0], kind), lambda a, b: np.copysign(b, a))


@decoder("testp")
def _testp(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda x: ~np.isnan(x),
        "notanumber": np.isnan,
        "normal": lambda x: np.isfinite(x) & ((np.abs(x) >= np.finfo(x.dtype).tiny) | (x == 0)),
        "subnormal": lambda x: (x != 0) & (np.abs(x) < np.finfo(x.dtype).tiny),
    }
    return simple([p.source(i.operands[1], kind)], p.target(i.operands[0], "pred"), tests[i.op[1]])


# --- bits ---


def _logic(name: str, compute: Callable[..., Array]) -> None:
    def decode(i: Instruction, p: Program) -> Run:
        kind = kind_of(i)
        read = [p.source(x, kind) for x in i.operands[1:]]
        return simple(read, p.target(i.operands[0], kind), compute)

    decoder(name)(decode)


_logic("and", np.bitwise_and)
_logic("or", np.bitwise_or)
_logic("xor", np.bitwise_xor)
_logic("not", np.invert)
_logic("cnot", lambda x: (x == 0).astype(x.dtype))


@decoder("lop3")
def _lop3(i: Instruction, p: Program) -> Run:
    if i.op[1] != "b32":
        raise unknown(i)
    table = constant(i.operands[4])
    read = [p.source(x, "b32") for x in i.operands[1:4]]

    def compute(a: Array, b: Array, c: Array) -> Array:
        out = np.zeros(LANES, U32)
        for row in range(8):
            if table >> row & 1:
                out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        return out

    return simple(read, p.target(i.operands[0], "b32"), compute)


def _known_shift(i: Instruction, dtype: Any) -> Any:
    """The number of bits to shift by, if it is a constant that leaves some."""
    n = i.operands[2]
    if not isinstance(n, Imm) or n.float_bytes or not 0 <= n.value < 8 * dtype.itemsize:
        return None
    return dtype.type(n.value)


@decoder("shl")
def _shl(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    dtype = DTYPES[kind]
    bits = 8 * dtype.itemsize
    if (shift := _known_shift(i, dtype)) is not None:
        return simple([p.source(i.operands[1], kind)], p.target(i.operands[0], kind), lambda x: x << shift)

    def compute(x: Array, n: Array) -> Array:
        return np.where(n < bits, x << np.minimum(n, bits - 1).astype(dtype), dtype.type(0))

    return simple(
        [p.source(i.operands[1], kind), p.source(i.operands[2], "u32")], p.target(i.operands[0], kind), compute
    )


@decoder("shr")
def _shr(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    dtype = DTYPES[kind]
    bits = 8 * dtype.itemsize
    if (shift := _known_shift(i, dtype)) is not None:
        return simple([p.source(i.operands[1], kind)], p.target(i.operands[0], kind), lambda x: x >> shift)

    def compute(x: Array, n: Array) -> Array:
        shifted = x >> np.minimum(n, bits - 1).astype(dtype)
        return shifted if dtype.kind == "i" else np.where(n < bits, shifted, dtype.type(0))

    return simple(
        [p.source(i.operands[1], kind), p.source(i.operands[2], "u32")], p.target(i.operands[0], kind), compute
    )


@decoder("shf")
def _shf(i: Instruction, p: Program) -> Run:
    left, clamp = i.op[1] == "l", i.op[2] == "clamp"
    read = [p.source(x, "b32") for x in i.operands[1:4]]

    def compute(a: Array, b: Array, c: Array) -> Array:
        n = (np.minimum(c, U32(32)) if clamp else c & U32(31)).astype(U64)
        both = (b.astype(U64) << U64(32)) | a
        out = both << n >> U64(32) if left else both >> n
        return (out & U64(0xFFFFFFFF)).astype(U32)

    return simple(read, p.target(i.operands[0], "b32"), compute)


# selectors of the four bytes, low first, by the low two bits of the control (PTX ISA, "prmt": the table of modes)
_PRMT_MODES = {
    "f4e": (0x3210, 0x4321, 0x5432, 0x6543),
    "b4e": (0x5670, 0x6701, 0x7012, 0x0123),
    "rc8": (0x0000, 0x1111, 0x2222, 0x3333),
    "ecl": (0x3210, 0x3211, 0x3222, 0x3333),
    "ecr": (0x0000, 0x1110, 0x2210, 0x3210),
    "rc16": (0x1010, 0x3232, 0x1010, 0x3232),
}


_PRMT_SHIFTS, _PRMT_ROWS = U32(4) * np.arange(4, dtype=U32), 8 * np.arange(LANES, dtype=U32)[:, None]


@decoder("prmt")
def _prmt(i: Instruction, p: Program) -> Run:
    if i.op[-1] != "b32" and i.op[-1] not in _PRMT_MODES:
        raise unknown(i)
    table = np.array(_PRMT_MODES[i.op[-1]], U32) if i.op[-1] in _PRMT_MODES else None
    read = [p.source(x, "b32") for x in i.operands[1:4]]

    def compute(a: Array, b: Array, c: Array) -> Array:
        if table is not None:
            c = table[(c & U32(3)).astype(np.int64)]
        both = side_by_side(a.dtype, a, b).view(np.uint8).reshape(-1)  # [32 * 8]
        pick = c[:, None] >> _PRMT_SHIFTS
        out = both[(pick & U32(7)) + _PRMT_ROWS]  # [32, 4]
        sign = pick & U32(8)
        if b"\x08" in sign.tobytes():
            out = np.where(sign, (out >> 7) * np.uint8(255), out)
        return out.view(U32).reshape(LANES)

    return simple(read, p.target(i.operands[0], "b32"), compute)


@decoder("popc")
def _popc(i: Instruction, p: Program) -> Run:
    return simple(
        [p.source(i.operands[1], kind_of(i))], p.target(i.operands[0], "u32"), lambda x: np.bitwise_count(x).astype(U32)
    )


def _leading(x: Array) -> Array:
    """Index of the highest set bit, -1 if there is none."""
    return np.array([int(v).bit_length() - 1 for v in x], np.int64)


@decoder("clz")
def _clz(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    top = 8 * DTYPES[kind].itemsize - 1
    return simple(
        [p.source(i.operands[1], kind)], p.target(i.operands[0], "u32"), lambda x: (top - _leading(x)).astype(U32)
    )


@decoder("bfind")
def _bfind(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    top = 8 * DTYPES[kind].itemsize - 1

    def compute(x: Array) -> Array:
        magnitude = np.where(x < 0, ~x, x) if x.dtype.kind == "i" else x
        at = _leading(magnitude)
        found = np.where(at < 0, at, top - at) if "shiftamt" in i.op else at
        return (found & 0xFFFFFFFF).astype(U32)

    return simple([p.source(i.operands[1], kind)], p.target(i.operands[0], "u32"), compute)


@decoder("brev")
def _brev(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    bits = 8 * DTYPES[kind].itemsize

    def compute(x: Array) -> Array:
        return np.array([int(f"{int(v):0{bits}b}"[::-1], 2) for v in x], x.dtype)

    return simple([p.source(i.operands[1], kind)], p.target(i.operands[0], kind), compute)


@decoder("bfe")
def _bfe(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    dtype = DTYPES[kind]
    bits = 8 * dtype.itemsize
    read = [p.source(i.operands[1], kind), p.source(i.operands[2], "u32"), p.source(i.operands[3], "u32")]

    def compute(x: Array, pos: Array, length: Array) -> Array:
        out = []
        for v, at, n in zip(x, pos, length, strict=True):
            start, count = (int(at), int(n)) if bits == 64 else (int(at) & 255, int(n) & 255)
            value = int(v) % (1 << bits)
            taken = min(count, max(bits - start, 0))
            field = value >> start & ((1 << taken) - 1)
            if dtype.kind == "i" and count and value >> min(start + count - 1, bits - 1) & 1:
                field |= -1 << taken
            out.append(field % (1 << bits))
        return np.array(out, f"u{dtype.itemsize}").view(dtype)

    return simple(read, p.target(i.operands[0], kind), compute)


@decoder("bfi")
def _bfi(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    bits = 8 * DTYPES[kind].itemsize
    read = [p.source(x, kind) for x in i.operands[1:3]] + [p.source(x, "u32") for x in i.operands[3:5]]

    def compute(a: Array, b: Array, pos: Array, length: Array) -> Array:
        out = []
        for x, y, at, n in zip(a, b, pos & U32(255), length & U32(255), strict=True):
            mask = (((1 << int(n)) - 1) << int(at)) % (1 << bits)
            out.append((int(y) & ~mask) | ((int(x) << int(at)) & mask))
        return np.array(out, a.dtype)

    return simple(read, p.target(i.operands[0], kind), compute)


@decoder("bmsk")
def _bmsk(i: Instruction, p: Program) -> Run:
    clamp = i.op[1] == "clamp"

    def compute(a: Array, b: Array) -> Array:
        out = []
        for x, y in zip(a, b, strict=True):
            start, count = (min(int(x), 32), min(int(y), 32)) if clamp else (int(x) & 31, int(y) & 31)
            out.append((((1 << count) - 1) << start) & 0xFFFFFFFF)
        return np.array(out, U32)

    return simple([p.source(x, "u32") for x in i.operands[1:3]], p.target(i.operands[0], "u32"), compute)


@decoder("szext")
def _szext(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    clamp = i.op[1] == "clamp"

    def compute(x: Array, n: Array) -> Array:
        width = np.minimum(n, U32(32)) if clamp else n & U32(31)
        shift = (U32(32) - width).astype(np.int64)
        out = (x.astype(np.int64) << shift & 0xFFFFFFFF).astype(U32).view(x.dtype).astype(np.int64) >> shift
        return np.where(width == 0, 0, out).astype(x.dtype)

    return simple(
        [p.source(i.operands[1], kind), p.source(i.operands[2], "u32")], p.target(i.operands[0], kind), compute
    )


@decoder("dp4a")
def _dp4a(i: Instruction, p: Program) -> Run:
    kinds = {"s32": np.int8, "u32": np.uint8}
    at, bt = kinds[i.op[1]], kinds[i.op[2]]
    read = [p.source(x, "b32") for x in i.operands[1:4]]

    def compute(a: Array, b: Array, c: Array) -> Array:
        product = a.view(at).reshape(LANES, 4).astype(np.int64) * b.view(bt).reshape(LANES, 4)
        return (product.sum(1) + c & 0xFFFFFFFF).astype(U32)

    return simple(read, p.target(i.operands[0], "b32"), compute)


@decoder("dp2a")
def _dp2a(i: Instruction, p: Program) -> Run:
    """Two 16-bit integers of a by the low or high two bytes of b."""
    half, byte = {"s32": np.int16, "u32": np.uint16}[i.op[2]], {"s32": np.int8, "u32": np.uint8}[i.op[3]]
    first = 2 if i.op[1] == "hi" else 0
    read = [p.source(x, "b32") for x in i.operands[1:4]]

    def compute(a: Array, b: Array, c: Array) -> Array:
        product = a.view(half).reshape(LANES, 2).astype(np.int64) * b.view(byte).reshape(LANES, 4)[:, first : first + 2]
        return (product.sum(1) + c & 0xFFFFFFFF).astype(U32)

    return simple(read, p.target(i.operands[0], "b32"), compute)


@decoder("fns")
def _fns(i: Instruction, p: Program) -> Run:
    """The offset-th set bit from base: upwards for a positive offset, downwards for a negative one, base for zero."""
    read = [p.source(i.operands[1], "b32"), p.source(i.operands[2], "b32"), p.source(i.operands[3], "s32")]

    def one(mask: int, base: int, offset: int) -> int:
        if offset == 0:
            return base if mask >> base & 1 else 0xFFFFFFFF
        step = 1 if offset > 0 else -1
        position, left = base, abs(offset)
        while 0 <= position < 32:
            left -= mask >> position & 1
            if left == 0:
                return position
            position += step
        return 0xFFFFFFFF

    def compute(mask: Array, base: Array, offset: Array) -> Array:
        return np.array([one(int(x), int(y), int(z)) for x, y, z in zip(mask, base, offset, strict=True)], U32)

    return simple(read, p.target(i.operands[0], "b32"), compute)


# --- comparison and selection ---

_INTEGER: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def comparison(name: str, floating: bool) -> Callable[[Array, Array], Array]:
    """PTX ISA, "Comparisons": unordered forms are true for NaN, ne is false for it."""
    if not floating:
        return _INTEGER[name]

    def unordered(a: Array, b: Array) -> Array:
        return np.isnan(a) | np.isnan(b)

    if name == "num":
        return lambda a, b: ~unordered(a, b)
    if name == "nan":
        return unordered
    if name == "ne":
        return lambda a, b: (a != b) & ~unordered(a, b)
    if name in _INTEGER:
        return _INTEGER[name]
    ordered = _INTEGER[name[:-1]]
    return lambda a, b: ordered(a, b) | unordered(a, b)


@decoder("setp")
def _setp(i: Instruction, p: Program) -> Run:
    kind, combine = kind_of(i), next((x for x in i.op[2:] if x in ("and", "or", "xor")), None)
    floating = kind in FLOATS
    compare = comparison(i.op[1], floating)
    if floating:
        a, b = (float_reader(i, p, x, kind) for x in i.operands[1:3])
    else:
        a, b = (p.source(x, kind) for x in i.operands[1:3])
    first = i.operands[0]
    if isinstance(first, Pair):
        writes = [p.target(first.first, "pred"), p.target(first.second, "pred")]
    else:
        writes = [p.target(first, "pred")]
    c = p.source(i.operands[3], "pred") if combine else None
    if combine is None and len(writes) == 1 and kind[-2:] != "x2":
        return simple([a, b], writes[0], compare)

    def run(w: Warp, m: Mask) -> str | None:
        out = compare(a(w), b(w))
        if out.ndim == 2:
            pieces = [out[:, 0], out[:, 1]]
        else:
            pieces = [out, ~out]
        for write, piece in zip(writes, pieces, strict=False):
            write(w, _JOINED[combine](piece, c(w)) if combine and c else piece, m)
        return None

    return run


_TRUE = {"f32": 0x3F800000, "f16": 0x3C00, "bf16": 0x3F80, "f16x2": 0x3C00, "bf16x2": 0x3F80}
_JOINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@decoder("set")
def _set(i: Instruction, p: Program) -> Run:
    """All ones for true as an integer, 1.0 as a floating point number; halves of a pair each for itself."""
    kind, target = i.op[-1], i.op[-2]
    join = next((_JOINED[x] for x in i.op[2:-2] if x in _JOINED), None)
    compare = comparison(i.op[1], kind in FLOATS)
    if kind in FLOATS:
        a, b = (float_reader(i, p, x, kind) for x in i.operands[1:3])
    else:
        a, b = (p.source(x, kind) for x in i.operands[1:3])
    paired = kind.endswith("x2")
    bits = np.dtype(np.uint16) if paired else np.dtype(f"u{DTYPES[target].itemsize}")
    true = bits.type(_TRUE.get(target, (1 << 8 * bits.itemsize) - 1))

    def compute(x: Array, y: Array, *c: Array) -> Array:
        result = compare(x, y)
        result = join(result, c[0]) if join else result
        out = np.where(result, true, bits.type(0))
        return np.ascontiguousarray(out).view(U32).reshape(LANES) if paired else out

    read = [a, b, *([p.source(i.operands[3], "pred")] if join else [])]
    return simple(read, p.target(i.operands[0], "b32" if paired else f"b{8 * bits.itemsize}"), compute)


def _choose(c: Array, a: Array, b: Array) -> Array:
    chosen: Array = np.where(c, a, b)
    return chosen


@decoder("selp")
def _selp(i: Instruction, p: Program) -> Run:
    kind = kind_of(i)
    read = [p.source(i.operands[3], "pred"), p.source(i.operands[1], kind), p.source(i.operands[2], kind)]
    return simple(read, p.target(i.operands[0], kind), _choose)


@decoder("slct")
def _slct(i: Instruction, p: Program) -> Run:
    kind, by = i.op[-2], i.op[-1]
    c = float_reader(i, p, i.operands[3], by) if by == "f32" else p.source(i.operands[3], by)
    read = [c, p.source(i.operands[1], kind), p.source(i.operands[2], kind)]
    return simple(read, p.target(i.operands[0], kind), lambda c, a, b: _choose(c >= 0, a, b))
