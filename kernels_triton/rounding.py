"""Rounding FP32 to what is stored, the same bits on a GPU and in Triton's interpreter: BF16, E4M3, powers of two.

The interpreter truncates where a cast to BF16 should round, and has no cast to E4M3 that could be relied on: there,
integer arithmetic stands in for the hardware's conversions.
"""

import triton
import triton.language as tl

from .nvfp4 import E4M3_MAX, MAGNITUDE, e4m3_encode, magnitude_bits, widen

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FP32_MAX_BITS = tl.constexpr(0x7F7FFFFF)


@triton.jit
def bf16_bits(x):
    """FP32 -> BF16 as int16, to nearest even; of a NaN only that it is one is sure."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x != x, 0x7FC0, rounded).to(tl.int16)
    else:
        return x.to(tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def bf16_round(x):
    """FP32 -> the nearest BF16 number as FP32."""
    return widen(bf16_bits(x).to(tl.bfloat16, bitcast=True))


@triton.jit
def stored(x, dtype: tl.constexpr):
    """FP32 as it is stored under a pointer of `stored_pointer`: BF16 as its bits."""
    if dtype == tl.bfloat16:
        return bf16_bits(x)
    else:
        return x.to(dtype)


@triton.jit
def stored_pointer(ptr):
    """The pointer to store what `stored` gives."""
    if ptr.dtype.element_ty == tl.bfloat16:
        return ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    else:
        return ptr


@triton.jit
def e4m3_bits(t):
    """FP32 -> E4M3 byte (uint8), to nearest even, saturating; NaN, of either sign, gives 0x7F."""
    if INTERPRETED:
        bits = t.to(tl.int32, bitcast=True)
        magnitude = tl.minimum((bits & MAGNITUDE).to(tl.float32, bitcast=True), E4M3_MAX)
        return tl.where(t != t, 0x7F, e4m3_encode(magnitude) | ((bits >> 24) & 0x80)).to(tl.uint8)
    else:
        return t.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # cvt.rn.satfinite


@triton.jit
def e8m0_of_448(bits):
    """Bits of FP32 amax >= 2^-117 -> int32 e + 127, e = ceil(log2(amax / 448)); infinity and NaN count as FP32's
    largest number."""
    # adding what the mantissa of 1.75 lacks to 2 carries into the exponent where amax has a larger mantissa
    return ((tl.minimum(bits, FP32_MAX_BITS) + 0x1FFFFF) >> 23) - 8


@triton.jit
def e8m0_of_6(bits):
    """As `e8m0_of_448`, of 6 and amax >= 6 * 2^-126."""
    return ((tl.minimum(bits, FP32_MAX_BITS) + 0x3FFFFF) >> 23) - 2


@triton.jit
def e8m0_reciprocal(byte):
    """int32 e + 127, e in -126 .. 126 -> FP32 2^-e."""
    return ((254 - byte) << 23).to(tl.float32, bitcast=True)


@triton.jit
def largest(x, axis: tl.constexpr):
    """Bits of the largest magnitude along an axis, NaN above infinity."""
    return tl.max(magnitude_bits(x), axis=axis)
