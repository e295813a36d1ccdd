"""How the tensor cores of sm_90 add, found by probing an H100 and reproduced bit by bit on all that was recorded.

One instruction adds the products of its K and the old accumulator at once. All of them are aligned to the largest of
their exponents (that of a product is the sum of its factors' exponents, whether or not the mantissas' product is two or
more) and cut there, towards zero, to `bits` of fraction: 25, or 13 for FP8 in wgmma. The sum of what is left is exact,
and cut again to the fraction of the result, towards zero, for FP32; FP16 results are rounded to nearest.

mma.sync with FP8 operands is another instruction's work: the operands become FP16, and two steps over half of K each,
of every four elements the first two and then the others, start from zero; the accumulator is added afterwards, rounded
to nearest. FP64 is a chain of fused multiply-adds, k ascending.
"""

import functools

import numpy as np

from . import numbers
from .numbers import Array

FRACTION = {"f16": 25, "bf16": 25, "tf32": 25, "e4m3": 13, "e5m2": 13}  # bits in wgmma
_LEAST = {"f16": -14, "bf16": -126, "tf32": -126, "e4m3": -6, "e5m2": -14, "f32": -126}  # exponents of normal numbers
_NOTHING = -1000  # exponent of a zero
_NO_TERMS = -600  # less than any exponent of a product or of an accumulator
_BIAS, _FRACTION_BITS = 1023, 52  # of FP64


@functools.cache
def _by_field(kind: str) -> Array:
    """Exponents by the exponent field that the number has in FP64, where all of `kind` are normal."""
    found = np.maximum(np.arange(2048) - _BIAS, _LEAST[kind]).astype(np.int16)
    found[0] = _NOTHING
    return found


def _exponents(x: Array, kind: str) -> Array:
    """Subnormal numbers have the least exponent."""
    return _by_field(kind)[x.view(np.int64) >> _FRACTION_BITS & 0x7FF]


def _power(exponents: Array) -> Array:
    """2 to these, int64, in FP64."""
    return (exponents + _BIAS << _FRACTION_BITS).view(np.float64)


def _cut(x: Array, bits: int) -> Array:
    """FP64 numbers with so many bits of fraction left, towards zero."""
    return (x.view(np.int64) & (-1 << _FRACTION_BITS - bits)).view(np.float64)


_FP8_FRACTION, _FP8_LEAST_PRODUCT = FRACTION["e4m3"], 2 * -16


def _product(a: Array, b: Array) -> Array:
    return a @ b.T if b.ndim == 2 else (b @ a[:, :, None])[:, :, 0]


def step(a: Array, b: Array, c: Array, operands: tuple[str, str], result: str, bits: int = 25) -> Array:
    """a [m, k] @ b [n, k].T + c [m, n], all FP64, as one instruction gives it: float32 or float16 [m, n].

    With a sparse A, a is what is stored of it and b [m, n, k] what its rows meet.
    """
    with np.errstate(all="ignore"):
        # k first: sums and maxima over it run along long rows
        left, right = np.ascontiguousarray(a.T)[:, :, None], np.ascontiguousarray(np.moveaxis(b, -1, 0))
        if b.ndim == 2:
            right = right[:, None, :]
        top = (_exponents(left, operands[0]) + _exponents(right, operands[1])).max(0)
        top = np.maximum(np.maximum(top, _exponents(c, result)), _NO_TERMS).astype(np.int64)
        scale = _power(bits - top)
        if bits == _FP8_FRACTION:  # terms, and sums of terms that were cut, are exact in FP32
            small = _power(bits - np.maximum(top, _FP8_LEAST_PRODUCT)).astype(np.float32)
            terms = left.astype(np.float32) * right.astype(np.float32)
            terms *= small
        else:
            terms = left * right
            terms *= scale
        np.trunc(terms, out=terms)
        total = (terms.sum(0) + np.trunc(c * scale)) * _power(top - bits)
        finite = bool(np.isfinite(total).all())
        if not finite:
            plain = _product(a, b) + c
            total = np.where(np.isfinite(plain), total, plain)
        if result == "f16":
            half = np.where(np.isnan(total), np.uint16(0x7FFF), numbers.to_f16(total)).view(np.float16)
            return half + np.float16(0)  # no result is -0
        total = _cut(total, min(bits, 23))
        size = np.abs(total)
        if ((size < numbers.TINY["f32"]) & (size > 0)).any():
            out = np.where(size < 2.0**128, numbers.to_f32(total, "rz"), total.astype(np.float32))
        else:
            out = total.astype(np.float32)
        out += np.float32(0)
        return out if finite else np.where(np.isnan(total), np.uint32(0x7FFFFFFF).view(np.float32), out)


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
