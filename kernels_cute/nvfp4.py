"""What the NVFP4 kernels for Hopper share: decoding to BF16 in registers, and checks of their operands."""

import itertools

from cutlass import Float32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op
from torch import Tensor, bfloat16

from fp4suite.formats import NVFP4Tensor, SfLayout
from fp4suite.layouts import Order

SCALE_BIAS = 118  # decoded numbers are their value times 2 ** (SCALE_BIAS - 126)

# --- device -----------------------------------------------------------------------------------------------------------


@dsl_user_op
def e4m3x2_to_f16x2(x: Uint32, *, loc=None, ip=None) -> Uint32:
    """The two low bytes as E4M3 -> two FP16 numbers in a word, exactly."""
    asm = "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.rn.f16x2.e4m3x2 $0, h; }"
    return Uint32(llvm.inline_asm(T.i32(), [x.ir_value(loc=loc, ip=ip)], asm, "=r,r", loc=loc, ip=ip))


@dsl_user_op
def f16_to_f32(x: Uint32, *, loc=None, ip=None) -> Float32:
    """The low half of a word as FP16."""
    asm = "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }"
    return Float32(llvm.inline_asm(T.f32(), [x.ir_value(loc=loc, ip=ip)], asm, "=f,r", loc=loc, ip=ip))


@dsl_user_op
def float_bits(x: Float32, *, loc=None, ip=None) -> Uint32:
    return Uint32(llvm.bitcast(T.i32(), x.ir_value(loc=loc, ip=ip), loc=loc, ip=ip))


@dsl_user_op
def prmt(x: Uint32, y: Uint32, selector: int, *, loc=None, ip=None) -> Uint32:
    """Four bytes of (x, y), picked by the selector's digits from 0 (lowest of x) to 7."""
    args = [x.ir_value(loc=loc, ip=ip), y.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r", loc=loc, ip=ip))


@dsl_user_op
def mul_bf16x2(x: Uint32, y: Uint32, *, loc=None, ip=None) -> Uint32:
    """Two BF16 products; subnormal operands count in full (PTX ISA, mul.bf16x2)."""
    args = [x.ir_value(loc=loc, ip=ip), y.ir_value(loc=loc, ip=ip)]
    return Uint32(llvm.inline_asm(T.i32(), args, "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", loc=loc, ip=ip))


def scale_pairs(word):
    """The two E4M3 scales in the low half of a word -> each times 2 ** SCALE_BIAS as a pair of equal BF16 numbers."""
    halves = e4m3x2_to_f16x2(word)
    pairs = []
    for half in (halves, halves >> Uint32(16)):
        # four significant bits: the upper half of the FP32 number is the BF16 number
        bits = float_bits(f16_to_f32(half) * Float32(2.0**SCALE_BIAS))
        pairs.append(prmt(bits, bits, 0x3232))
    return pairs


def decode_pairs(codes, scale):
    """Eight E2M1 codes times a scale pair -> words of BF16 with the elements (0, 4), (1, 5), (2, 6), (3, 7), exactly.

    A code's sign and magnitude, moved to the sign and to the lowest exponent and highest mantissa bits of BF16, are its
    value times 2 ** -126, subnormal for 0.5: one multiplication by scale * 2 ** SCALE_BIAS does the rest. Nibbles i and
    i + 4 lie 16 bits apart, so one step serves both; a multiplication copies them to both of their places at once.
    """
    words = []
    for half in (codes, codes >> Uint32(8)):
        for left in (6, 2):
            nibbles = half & Uint32(0x000F000F << (6 - left))
            words.append(mul_bf16x2(nibbles * Uint32((1 << left) + (1 << left + 6)) & Uint32(0x81C081C0), scale))
    return words


# --- host -------------------------------------------------------------------------------------------------------------


def segment_ends_of(alpha: Tensor, segments: tuple[int, ...] | None, n: int) -> tuple[int, ...]:
    """The column after each segment."""
    count = alpha.numel()
    if count == 1:
        return (n,)
    if segments is None or len(segments) != count or sum(segments) != n:
        raise ValueError(f"b.alpha holds {count} numbers: segments must be as many and sum to n={n}, got {segments}")
    return tuple(itertools.accumulate(segments))


def check_rows(a: Tensor, stride: int) -> None:
    if a.dtype != bfloat16:
        raise TypeError(f"a must be bfloat16 or an NVFP4Tensor, got {a.dtype}")
    if a.stride(1) != 1 or stride % 8 or a.data_ptr() % 16:
        raise ValueError(
            "rows of a must be adjacent elements that start at multiples of 16 bytes, "
            f"got strides {list(a.stride())} from {a.data_ptr() % 16} bytes past one on"
        )


def check_packed(t: NVFP4Tensor, name: str, sf_layout: SfLayout, order: Order = "rows") -> None:
    if t.order != order:
        raise ValueError(f"{name} must be in the order {order}, got {t.order}")
    if t.sf_layout != sf_layout:
        raise ValueError(f"{name} must have {sf_layout} scales, got {t.sf_layout}")
    if not (t.data.is_contiguous() and t.sf.is_contiguous()):
        raise ValueError(f"{name}.data and {name}.sf must be contiguous")
    if t.data.data_ptr() % 16 or t.sf.data_ptr() % 4:
        raise ValueError(f"{name}.data must start at a multiple of 16 bytes and {name}.sf at one of 4")
