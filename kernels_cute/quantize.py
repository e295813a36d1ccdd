"""FP32 numbers of a thread -> NVFP4 by sm_100a's conversions: rule "absmax" of `fp4suite.reference.e2m1`, same bytes.

Each operation is rounded to nearest on its own, as there; the conversions saturate and turn NaN into +6 themselves.
"""

import cutlass
from cutlass import Float32, Int32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from fp4suite.formats import BLOCK, E4M3_MAX
from fp4suite.reference.e2m1 import ALPHA_MIN

from .instructions import bits_float


@dsl_user_op
def reciprocal(x: Float32, *, loc=None, ip=None) -> Float32:
    """1 / x, rounded to nearest, subnormal results included."""
    asm = "rcp.rn.f32 $0, $1;"
    return Float32(llvm.inline_asm(T.f32(), [x.ir_value(loc=loc, ip=ip)], asm, "=f,f", loc=loc, ip=ip))


@dsl_user_op
def magnitude(x: Float32, *, loc=None, ip=None) -> Int32:
    """The bits of |x|: as integers they are in order, NaN on top."""
    asm = "{ .reg .b32 w; mov.b32 w, $1; and.b32 $0, w, 0x7fffffff; }"
    return Int32(llvm.inline_asm(T.i32(), [x.ir_value(loc=loc, ip=ip)], asm, "=r,f", loc=loc, ip=ip))


@dsl_user_op
def to_e4m3(x: Float32, *, loc=None, ip=None) -> tuple[Uint32, Float32]:
    """E4M3 of x in the low byte, and its value."""
    asm = (
        "{ .reg .b16 p, lo, hi; .reg .b32 h; .reg .f32 z; mov.b32 z, 0f00000000; "
        "cvt.rn.satfinite.e4m3x2.f32 p, z, $2; cvt.rn.f16x2.e4m3x2 h, p; mov.b32 {lo, hi}, h; "
        "cvt.f32.f16 $1, lo; cvt.u32.u16 $0, p; }"
    )
    kind = llvm.StructType.get_literal([T.i32(), T.f32()])
    got = llvm.inline_asm(kind, [x.ir_value(loc=loc, ip=ip)], asm, "=r,=f,f", loc=loc, ip=ip)
    byte, value = (llvm.extractvalue(t, got, [i], loc=loc, ip=ip) for i, t in enumerate((T.i32(), T.f32())))
    return Uint32(byte), Float32(value)


@dsl_user_op
def to_e2m1x8(y: list[Float32], *, loc=None, ip=None) -> Uint32:
    """Eight codes, the first in the lowest bits."""
    pairs = " ".join(f"cvt.rn.satfinite.e2m1x2.f32 b{i}, ${2 * i + 2}, ${2 * i + 1};" for i in range(4))
    asm = f"{{ .reg .b8 b0, b1, b2, b3; {pairs} mov.b32 $0, {{b0, b1, b2, b3}}; }}"
    args = [v.ir_value(loc=loc, ip=ip) for v in y]
    return Uint32(llvm.inline_asm(T.i32(), args, asm, "=r" + ",f" * 8, loc=loc, ip=ip))


def inverse_scale(alpha):
    """`inv` of a global scale, for `quantize_block`: once a thread."""
    return _select(alpha >= Float32(ALPHA_MIN), reciprocal(alpha), Float32(0.0))


def quantize_block(x, alpha, inv):
    """16 FP32 numbers under the global scale alpha -> two words of codes, and the block scale as a low byte."""
    assert len(x) == BLOCK
    bits = [magnitude(v) for v in x]
    while len(bits) > 1:
        bits = [cutlass.max(a, b) for a, b in zip(bits[0::2], bits[1::2], strict=True)]
    t = bits_float(bits[0]) * Float32(1 / 6) * inv
    byte, value = to_e4m3(_select(t <= Float32(E4M3_MAX), t, Float32(E4M3_MAX)))
    scale = value * alpha
    r = _select(scale == Float32(0.0), Float32(0.0), reciprocal(scale))
    y = [v * r for v in x]
    return to_e2m1x8(y[:8]), to_e2m1x8(y[8:]), byte


def _select(condition, yes, no):
    return Float32(cutlass.select_(condition, yes, no))
