"""cvt among integers, FP64, FP32, FP16, BF16, TF32, FP8, FP6, FP4 and UE8M0 (PTX ISA, "Data Movement and Conversion
Instructions: cvt")."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .. import numbers
from ..machine import LANES, Warp
from ..numbers import SMALL, U32, U64, Array
from ..parser import Instruction, Operand
from ..program import DTYPES, Mask, Program, Read, Run, decoder, side_by_side, simple, unknown
from .arithmetic import flush

_INTEGERS = {f"{k}{n}" for k in "su" for n in (8, 16, 32, 64)}
_ROUND: dict[str, Callable[[Array], Array]] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_PACKED = {"e4m3x2": "e4m3", "e5m2x2": "e5m2", "e2m1x2": "e2m1", "e2m3x2": "e2m3", "e3m2x2": "e3m2", "ue8m0x2": "ue8m0"}


@decoder("cvt")
def _cvt(i: Instruction, p: Program) -> Run:
    to, frm = i.op[-2], i.op[-1]
    if i.op[1] == "pack":
        return _pack(i, p)
    mode = next((m for m in ("rn", "rna", "rz", "rm", "rp", "rs") if m in i.op), "")
    if mode == "rs":
        raise unknown(i, "stochastic rounding")
    if to in _PACKED or frm in _PACKED:
        return _small(i, p, to, frm, mode)
    if to in ("f16x2", "bf16x2"):
        return _to_pair(i, p, to, frm, mode)
    if to == "tf32":
        return _to_tf32(i, p, mode)
    if to in _INTEGERS and frm in _INTEGERS:
        return _integer(i, p, to, frm)
    if to in _INTEGERS:
        return _float_to_integer(i, p, to, frm)
    return _to_float(i, p, to, frm, mode)


def _integer(i: Instruction, p: Program, to: str, frm: str) -> Run:
    dtype = DTYPES[to]
    if "sat" in i.op:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

        def saturate(x: Array) -> Array:
            return np.array([min(max(int(v), low), high) for v in x], dtype)

        return simple([p.source(i.operands[1], frm)], p.target(i.operands[0], to), saturate)
    return simple([p.source(i.operands[1], frm)], p.target(i.operands[0], to), lambda x: x.astype(dtype))


def _value(i: Instruction, p: Program, operand: Operand, kind: str) -> Read:
    """FP64 value of an f16, bf16, f32 or f64 operand."""
    read = p.source(operand, kind)
    if kind == "bf16":
        return lambda w: numbers.from_bf16(read(w)).astype(np.float64)
    # measured: .ftz leaves subnormal sources alone where the result is narrower
    if kind == "f32" and "ftz" in i.op and i.op[-2] not in ("f16", "bf16"):
        return lambda w: flush(read(w)).astype(np.float64)
    return lambda w: read(w).astype(np.float64)


def _float_to_integer(i: Instruction, p: Program, to: str, frm: str) -> Run:
    rounding = _ROUND[next(m for m in _ROUND if m in i.op)]
    dtype = DTYPES[to]
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)

    # NaN: zero from the narrower types, the top bit alone from FP64 and to 64 bits
    nan = 0
    if frm == "f64" or dtype.itemsize == 8:
        nan = low or 1 << 8 * dtype.itemsize - 1

    def compute(x: Array) -> Array:
        whole = rounding(x)
        return np.array([nan if v != v else min(max(v if np.isinf(v) else int(v), low), high) for v in whole], dtype)

    return simple([_value(i, p, i.operands[1], frm)], p.target(i.operands[0], to), compute)


def _to_float(i: Instruction, p: Program, to: str, frm: str, mode: str) -> Run:
    if to not in ("f64", "f32", "f16", "bf16"):
        raise unknown(i)
    integral = next((m for m in _ROUND if m in i.op), None)
    relu, sat, ftz = "relu" in i.op, "sat" in i.op, "ftz" in i.op
    whole = frm in _INTEGERS
    read = p.source(i.operands[1], frm) if whole else _value(i, p, i.operands[1], frm)
    mode = mode or "rn"

    def compute(x: Array) -> Array:
        v = _whole_numbers(x, mode if to == "f64" else "odd") if whole else x
        if integral:
            v = _ROUND[integral](v)
        if sat:
            v = np.where(v > 0, np.minimum(v, 1.0), 0.0)
        if relu:
            v = np.where(v > 0, v, np.where(np.isnan(v), v, 0.0))
        if to == "f64":
            return np.where(np.isnan(v), (v.view(U64) | U64(1 << 51)).view(np.float64), v)
        nan = np.isnan(v)
        if to == "f32":
            out = numbers.to_f32(v, mode)
            out = flush(out) if ftz else out
        else:
            out = (numbers.to_f16 if to == "f16" else numbers.to_bf16)(v, mode)
        if nan.any():
            bits = out.view(f"u{out.itemsize}")
            out = np.where(nan, _nan(v, to, keep=frm == "f64" or (frm, to) == ("bf16", "f32")), bits)
        return out.view(DTYPES[to])

    return simple([read], p.target(i.operands[0], to), compute)


def _nan(v: Array, to: str, keep: bool) -> Array:
    """Bits of a NaN of `to`: the upper ones of the FP64 NaN, or the canonical one."""
    exponent, mantissa = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7)}[to]
    unsigned = DTYPES[f"u{8 * DTYPES[to].itemsize}"]
    if not keep:
        return np.full(len(v), (1 << exponent + mantissa) - 1, unsigned)
    bits = v.view(U64)
    upper = (bits & U64((1 << 52) - 1)) >> U64(52 - mantissa) | U64(1 << mantissa - 1)
    infinite = U64(((1 << exponent) - 1) << mantissa)
    return (bits >> U64(63) << U64(exponent + mantissa) | infinite | upper).astype(unsigned)


def _whole_numbers(x: Array, mode: str) -> Array:
    """Integers as FP64, rounded to odd or in a direction where they have more than 53 bits."""
    if x.dtype.itemsize < 8:
        return x.astype(np.float64)
    if mode != "odd":
        return np.array([numbers.round_fraction(Fraction(int(n)), mode) for n in x])
    low = x & x.dtype.type(0xFFF)
    large = (x >> x.dtype.type(12) | (low != 0).astype(x.dtype)).astype(np.float64) * 4096.0
    small = x < 1 << 53 if x.dtype.kind == "u" else np.abs(x.astype(np.float64)) < 2.0**53
    return np.where(small, x.astype(np.float64), large)


def _to_pair(i: Instruction, p: Program, to: str, frm: str, mode: str) -> Run:
    """d = {b in the low half, a in the high half}."""
    if frm != "f32":
        raise unknown(i)
    a, b = (p.source(x, "f32") for x in i.operands[1:3])
    relu, half, finite = "relu" in i.op, to == "f16x2", "satfinite" in i.op

    def one(x: Array) -> Array:
        if relu:
            x = np.where(x > 0, x, np.where(np.isnan(x), x, np.float32(0)))
        if half:
            v = np.clip(x, -65504, 65504) if finite else x
            bits = numbers.to_f16(v.astype(np.float64), mode)
            return np.where(np.isnan(x), np.uint16(0x7FFF), bits)
        bits = numbers.to_bf16(x, mode)
        if finite:
            inf = bits & 0x7FFF == 0x7F80
            bits = np.where(inf, bits - np.uint16(1), bits)
        return bits

    def compute(x: Array, y: Array) -> Array:
        return one(x).astype(U32) << U32(16) | one(y)

    return simple([a, b], p.target(i.operands[0], "b32"), compute)


def _to_tf32(i: Instruction, p: Program, mode: str) -> Run:
    relu, finite = "relu" in i.op, "satfinite" in i.op

    def compute(x: Array) -> Array:
        x = np.where(x > 0, x, np.where(np.isnan(x), x, np.float32(0))) if relu else x
        bits, nan = x.view(U32), np.isnan(x)
        if mode == "rna":
            bits = np.where(nan, bits, bits + U32(0x1000))
        elif mode == "rn":
            bits = bits + U32(0xFFF) + (bits >> U32(13) & U32(1))
        out = bits & U32(0xFFFFE000)
        if finite:  # the next smaller number, for a NaN as well
            out = np.where(out & U32(0x7F800000) == 0x7F800000, out - U32(0x2000), out)
        return out if mode == "rna" else np.where(nan, U32(0x7FFFE000), out)

    return simple([p.source(i.operands[1], "f32")], p.target(i.operands[0], "b32"), compute)


def _small(i: Instruction, p: Program, to: str, frm: str, mode: str) -> Run:
    """Pairs of FP8, FP6, FP4 or UE8M0, the second source in the low half; FP4 pairs fill one byte."""
    if to in _PACKED:
        small = SMALL[_PACKED[to]]
        saturate, relu = "satfinite" in i.op or small.specials == "none", "relu" in i.op
        rounding = {"": "rn", "rn": "rn", "rz": "rz", "rp": "rp"}[mode]

        def encode(x: Array) -> Array:
            """[32, 2], the low one first, in one number."""
            if relu:
                x = np.where(x > 0, x, np.where(np.isnan(x), x, 0.0))
            codes = small.encode(x, rounding, saturate)
            return codes[:, 1] << np.uint8(4) | codes[:, 0] if small.bits == 4 else codes.view(np.uint16).reshape(LANES)

        write = p.target(i.operands[0], "u8" if small.bits == 4 else "u16")
        if frm == "f32":
            a, b = (p.source(x, "f32") for x in i.operands[1:3])
            return simple([a, b], write, lambda x, y: encode(side_by_side(np.dtype(np.float64), y, x)))
        if frm in ("f16x2", "bf16x2"):
            return simple([_pair_values(p, i.operands[1], frm)], write, encode)
        raise unknown(i)
    small = SMALL[_PACKED[frm]]
    if to not in ("f16x2", "bf16x2"):
        raise unknown(i)
    four, relu = small.bits == 4, "relu" in i.op
    read, half = p.source(i.operands[1], "u8" if four else "u16"), to == "f16x2"
    mask = (1 << max(small.bits, 4)) - 1 if small.bits != 8 else 255

    def compute(x: Array) -> Array:
        low, high = x & x.dtype.type(mask), x >> x.dtype.type(4 if four else 8) & x.dtype.type(mask)
        v = small.decode(side_by_side(x.dtype, low, high)).astype(np.float64)
        if relu:
            v = np.where(v > 0, v, np.where(np.isnan(v), v, 0.0))
        bits = numbers.to_f16(v) if half else numbers.to_bf16(v)
        bits = np.where(np.isnan(v), np.uint16(0x7FFF), bits)
        return np.ascontiguousarray(bits).view(U32).reshape(LANES)

    return simple([read], p.target(i.operands[0], "b32"), compute)


def _pair_values(p: Program, operand: Operand, kind: str) -> Read:
    read = p.source(operand, "b32")
    if kind == "f16x2":
        return lambda w: read(w).view(np.float16).reshape(LANES, 2).astype(np.float64)
    return lambda w: numbers.from_bf16(read(w).view(np.uint16).reshape(LANES, 2)).astype(np.float64)


def _pack(i: Instruction, p: Program) -> Run:
    """cvt.pack.sat: two integers narrowed with saturation, before the bits of c for the narrow forms."""
    to, frm = i.op[-3] if i.op[-1] == "b32" else i.op[-2], i.op[-2] if i.op[-1] == "b32" else i.op[-1]
    bits, signed = int(to[1:]), to[0] == "s"
    low, high = (-1 << bits - 1, (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    a, b = (p.source(x, frm) for x in i.operands[1:3])
    c = p.source(i.operands[3], "b32") if len(i.operands) > 3 else None
    write = p.target(i.operands[0], "b32")

    def run(w: Warp, m: Mask) -> str | None:
        x, y = (np.clip(v(w).astype(np.int64), low, high) & ((1 << bits) - 1) for v in (a, b))
        out = x << bits | y
        if c is not None:
            out |= c(w).astype(np.int64) << 2 * bits
        write(w, (out & 0xFFFFFFFF).astype(U32), m)
        return None

    return run
