"""Rounding FP32 to what is stored, the same bits on a GPU and in Triton's interpreter: BF16, E4M3, powers of two.

In the interpreter, whose casts to BF16 truncate, integer arithmetic stands in for the hardware's conversions.
"""

import triton
import triton.language as tl

from .nvfp4 import E4M3_MAX, MAGNITUDE, e4m3_encode, magnitude_bits, narrow, widen

CVT = tl.constexpr(not triton.knobs.runtime.interpret)  # the hardware's conversions
FP32_MAX_BITS = tl.constexpr(0x7F7FFFFF)


@triton.jit
def bf16_bits(x):
    """FP32 -> BF16 as int16, to nearest even; of a NaN only that it is one is sure."""
    return narrow(x, tl.bfloat16, CVT).to(tl.int16, bitcast=True)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """FP32 -> the nearest number of dtype, as FP32."""
    return widen(narrow(x, dtype, CVT))


@triton.jit
def e4m3_bits(t):
    """FP32 -> E4M3 byte (uint8), to nearest even, saturating; NaN, of either sign, gives 0x7F."""
    if CVT:
        return t.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # cvt.rn.satfinite
    else:
        bits = t.to(tl.int32, bitcast=True)
        magnitude = tl.minimum((bits & MAGNITUDE).to(tl.float32, bitcast=True), E4M3_MAX)
        return tl.where(t != t, 0x7F, e4m3_encode(magnitude) | ((bits >> 24) & 0x80)).to(tl.uint8)


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
