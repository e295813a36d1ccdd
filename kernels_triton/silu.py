"""Clamped SwiGLU of FP32 numbers in registers, to the bit of `fp4suite.reference.quant.swiglu_fp32`, or near it."""

import triton
import triton.language as tl

from .nvfp4 import CVT, EXP2_MAX, LOG2E, exp2_times, exp_neg

FP32_MAX = tl.constexpr(3.4028234663852886e38)
MOST_BOUNDED = 80.0  # limit up to which exp(-g) is far from the smallest numbers and no quotient overflows


@triton.jit
def gated(g, u, limit, NEAR: tl.constexpr, BOUNDED: tl.constexpr):
    """silu(min(g, limit)) * clamp(u, -limit, limit), to the bit; NEAR: within the error that `near` allows for.

    BOUNDED: limit is at most MOST_BOUNDED.
    """
    # a NaN stays one
    g = tl.minimum(g, limit, propagate_nan=tl.PropagateNan.ALL)
    u = tl.minimum(tl.maximum(u, -limit, propagate_nan=tl.PropagateNan.ALL), limit, propagate_nan=tl.PropagateNan.ALL)
    if NEAR:
        return g * near_sigmoid(g * -LOG2E) * u
    elif BOUNDED and CVT:
        return _over_one_plus(g, exp2_times(tl.minimum(g * -LOG2E, EXP2_MAX), 0)) * u
    else:
        return tl.div_rn(g, 1.0 + exp_neg(g)) * u


@triton.jit
def near_sigmoid(t):
    """1 / (1 + 2^t). Within 1.1e-6 of what `exp_neg` and a division make of the same t: 2.5e-7 of it are exp_neg's,
    2.4e-7 ex2's, 1.2e-7 rcp's (PTX ISA), the rest are roundings."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.rn.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
        "=f,f",
        [t],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _over_one_plus(g, e):
    """g / (1 + e), both operations rounded to nearest, for e = exp(-g): half the instructions of a division that knows
    nothing of its operands.

    Both sides are scaled by 2^-4, so that the divisor's reciprocal is normal. One Newton step makes it the nearest (the
    same that rcp.rn takes between its checks), so that one step corrects the quotient (Markstein). The remainder is
    exact, or 0 where g is so small that the divisor is a power of two. -x would be 0 - x, which loses the sign of 0.
    """
    d = tl.fma(e, 0.0625, 0.0625)  # a sixteenth of 1 + e, with its rounding
    d = tl.minimum(d, FP32_MAX)  # infinity's reciprocal is 0, and so is this one's: the quotient is -0
    near = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1)
    r = tl.fma(near, tl.fma(d * -1.0, near, 1.0), near)
    q = g * r
    remainder = tl.fma(d, q, g * -1.0)
    return tl.fma(remainder, r * -1.0, q) * 0.0625
