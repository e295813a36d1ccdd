"""How the tensor cores of sm_90 add, found by probing an H100 and reproduced bit by bit on all that was recorded.

One instruction adds the products of its K and the old accumulator at once. All of them are aligned to the largest of
their exponents (that of a product is the sum of its factors' exponents, whether or not the mantissas' product is two or
more) and cut there, towards zero, to `bits` of fraction: 25, or 13 for FP8 in wgmma. The sum of what is left is exact,
and cut again to the fraction of the result, towards zero, for FP32; FP16 results are rounded to nearest.

mma.sync with FP8 operands is another instruction's work: the operands become FP16, and two steps over half of K each,
of every four elements the first two and then the others, start from zero; the accumulator is added afterwards, rounded
to nearest. FP64 is a chain of fused multiply-adds, k ascending.
"""

import numpy as np

from . import numbers
from .numbers import Array

FRACTION = {"f16": 25, "bf16": 25, "tf32": 25, "e4m3": 13, "e5m2": 13}  # bits in wgmma
_LEAST = {"f16": -14, "bf16": -126, "tf32": -126, "e4m3": -6, "e5m2": -14, "f32": -126}  # exponents of normal numbers
_NOTHING = -1000  # exponent of a zero


def _exponents(x: Array, kind: str) -> Array:
    """Subnormal numbers have the least exponent."""
    return np.where(x == 0, _NOTHING, np.maximum(np.frexp(x)[1] - 1, _LEAST[kind])).astype(np.int16)


def _product(a: Array, b: Array) -> Array:
    return a @ b.T if b.ndim == 2 else (b @ a[:, :, None])[:, :, 0]


def step(a: Array, b: Array, c: Array, operands: tuple[str, str], result: str, bits: int = 25) -> Array:
    """a [m, k] @ b [n, k].T + c [m, n], all FP64, as one instruction gives it: float32 or float16 [m, n].

    With a sparse A, a is what is stored of it and b [m, n, k] what its rows meet.
    """
    with np.errstate(all="ignore"):
        plain = _product(a, b) + c
        # k first: sums and maxima over it run along long rows
        left, right = np.ascontiguousarray(a.T)[:, :, None], np.ascontiguousarray(np.moveaxis(b, -1, 0))
        if b.ndim == 2:
            right = right[:, None, :]
        terms = left * right
        top = (_exponents(left, operands[0]) + _exponents(right, operands[1])).max(0)
        top = np.maximum(np.maximum(top, _exponents(c, result)), -600).astype(np.int32)
        scale = np.ldexp(1.0, bits - top)
        terms *= scale
        np.trunc(terms, out=terms)
        total = np.ldexp(terms.sum(0) + np.trunc(c * scale), top - bits)
        total = np.where(np.isfinite(plain), total, plain)
        if result == "f16":
            half = np.where(np.isnan(total), np.uint16(0x7FFF), numbers.to_f16(total)).view(np.float16)
            return half + np.float16(0)  # no result is -0
        if bits < 23:
            mantissa, exponent = np.frexp(total)
            total = np.ldexp(np.trunc(np.ldexp(mantissa, bits + 1)), exponent - bits - 1)
        out = np.where(np.abs(total) < 2.0**128, numbers.to_f32(total, "rz"), total.astype(np.float32))
        return np.where(np.isnan(total), np.uint32(0x7FFFFFFF).view(np.float32), out + np.float32(0))


def mma_fp8(a: Array, b: Array, c: Array, result: str) -> Array:
    """mma.sync with FP8 operands; as `step`."""
    place = np.arange(a.shape[1]) % 4 // 2
    total = np.zeros(c.shape)
    for half in range(2):
        total = step(a[:, place == half], b[:, place == half], total, ("f16", "f16"), result).astype(np.float64)
    with np.errstate(all="ignore"):
        total = total + c
        if result == "f16":
            return np.where(np.isnan(total), np.uint16(0x7FFF), numbers.to_f16(total)).view(np.float16)
        return np.where(np.isnan(total), np.uint32(0x7FFFFFFF).view(np.float32), total.astype(np.float32))


def integers(a: Array, b: Array, c: Array, saturate: bool) -> Array:
    """int32 [m, n], from FP64 values of int8 and int32; wraps around or saturates. Sparse A: as in `step`."""
    total = _product(a, b).astype(np.int64) + c.astype(np.int64)
    if saturate:
        total = np.clip(total, -(1 << 31), (1 << 31) - 1)
    return (total & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
