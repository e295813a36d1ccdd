"""cvt among integers, FP64, FP32, FP16, BF16, TF32, FP8, FP6, FP4 and UE8M0 (PTX ISA, "Data Movement and Conversion
Instructions: cvt")."""

from collections.abc import Callable

import numpy as np

from .. import numbers
from ..machine import LANES, Warp
from ..numbers import SMALL, U32, Array
from ..parser import Instruction, Operand
from ..program import DTYPES, Mask, Program, Read, Run, decoder, simple, unknown
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
    if kind == "f32" and "ftz" in i.op:
        return lambda w: flush(read(w)).astype(np.float64)
    return lambda w: read(w).astype(np.float64)


def _float_to_integer(i: Instruction, p: Program, to: str, frm: str) -> Run:
    rounding = _ROUND[next(m for m in _ROUND if m in i.op)]
    dtype = DTYPES[to]
    low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)

    def compute(x: Array) -> Array:
        whole = rounding(x)
        # NaN becomes zero for narrow types and the pattern 100..0 for wide ones
        nan = 0 if dtype.itemsize < 4 or (dtype.kind == "u" and dtype.itemsize == 4) else -1 - high if low else 1 << 63
        if dtype.itemsize == 4:
            nan = 0 if frm in ("f16", "bf16", "f32") or low == 0 else low
        return np.array([nan if v != v else min(max(v if np.isinf(v) else int(v), low), high) for v in whole], dtype)

    return simple([_value(i, p, i.operands[1], frm)], p.target(i.operands[0], to), compute)


def _to_float(i: Instruction, p: Program, to: str, frm: str, mode: str) -> Run:
    integral = next((m for m in _ROUND if m in i.op), None)
    write = p.target(i.operands[0], to)
    relu, sat, ftz = "relu" in i.op, "sat" in i.op, "ftz" in i.op
    if frm in _INTEGERS:
        read = p.source(i.operands[1], frm)
        if DTYPES[frm].itemsize == 8 and to != "f64":
            if to != "f32" or mode not in ("", "rn"):
                raise unknown(i)
            return simple([read], write, lambda x: x.astype(np.float32))
    else:
        read = _value(i, p, i.operands[1], frm)

    def compute(x: Array) -> Array:
        v = x.astype(np.float64)
        if integral:
            v = _ROUND[integral](v)
        if sat:
            v = np.where(np.isnan(v), 0.0, np.clip(v, 0.0, 1.0))
        if relu:
            v = np.where(v > 0, v, np.where(np.isnan(v), v, 0.0))
        if to == "f64":
            return v
        if to == "f32":
            out = numbers.to_f32(v, mode or "rn")
            out = flush(out) if ftz else out
            return np.where(np.isnan(out), np.uint32(0x7FFFFFFF).view(np.float32), out)
        if to == "f16":
            return np.where(np.isnan(v), np.uint16(0x7FFF), numbers.to_f16(v, mode or "rn")).view(np.float16)
        if to == "bf16":
            return numbers.to_bf16(v, mode or "rn")
        raise unknown(i)

    if to not in ("f64", "f32", "f16", "bf16"):
        raise unknown(i)
    return simple([read], write, compute)


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
    def compute(x: Array) -> Array:
        bits = x.view(U32)
        if mode == "rna":
            bits = bits + U32(0x1000)
        elif mode == "rn":
            bits = bits + U32(0xFFF) + (bits >> U32(13) & U32(1))
        out = bits & U32(0xFFFFE000)
        return np.where(np.isnan(x), U32(0x7FFFFFFF), out)

    return simple([p.source(i.operands[1], "f32")], p.target(i.operands[0], "b32"), compute)


def _small(i: Instruction, p: Program, to: str, frm: str, mode: str) -> Run:
    """Pairs of FP8, FP6, FP4 or UE8M0, the second source in the low half; FP4 pairs fill one byte."""
    if to in _PACKED:
        small = SMALL[_PACKED[to]]
        saturate, relu = "satfinite" in i.op or small.specials == "none", "relu" in i.op
        rounding = {"": "rn", "rn": "rn", "rz": "rz", "rp": "rp"}[mode]

        def encode(x: Array) -> Array:
            if relu:
                x = np.where(x > 0, x, np.where(np.isnan(x), x, 0.0))
            return small.encode(x, rounding, saturate).astype(np.uint16)

        shift = np.uint16(4 if small.bits == 4 else 8)
        kind = "u8" if small.bits == 4 else "u16"
        out = DTYPES[kind]
        write = p.target(i.operands[0], kind)
        if frm == "f32":
            a, b = (p.source(x, "f32") for x in i.operands[1:3])
            return simple([a, b], write, lambda x, y: (encode(x) << shift | encode(y)).astype(out))
        if frm in ("f16x2", "bf16x2"):
            pair = _pair_values(p, i.operands[1], frm)
            return simple([pair], write, lambda v: (encode(v[:, 1]) << shift | encode(v[:, 0])).astype(out))
        raise unknown(i)
    small = SMALL[_PACKED[frm]]
    if to not in ("f16x2", "bf16x2"):
        raise unknown(i)
    four, relu = small.bits == 4, "relu" in i.op
    read, half = p.source(i.operands[1], "u8" if four else "u16"), to == "f16x2"
    mask = (1 << max(small.bits, 4)) - 1 if small.bits != 8 else 255

    def compute(x: Array) -> Array:
        low, high = x & x.dtype.type(mask), x >> x.dtype.type(4 if four else 8) & x.dtype.type(mask)
        v = small.decode(np.stack([low, high], 1)).astype(np.float64)
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
    dtype = DTYPES[to]
    bits = 8 * dtype.itemsize
    a, b = (p.source(x, frm) for x in i.operands[1:3])
    c = p.source(i.operands[3], "b32") if len(i.operands) > 3 else None
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    write = p.target(i.operands[0], "b32")

    def run(w: Warp, m: Mask) -> str | None:
        x, y = (np.clip(v(w).astype(np.int64), low, high) & ((1 << bits) - 1) for v in (a, b))
        out = x << bits | y
        if c is not None:
            out |= c(w).astype(np.int64) << 2 * bits
        write(w, (out & 0xFFFFFFFF).astype(U32), m)
        return None

    return run
