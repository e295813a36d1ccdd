"""Quantising what is known but for a small error: absmax codes and scales, and which blocks of them are in doubt.

Where the reference's arithmetic is dear, an approximation tells nearly every code and scale of it. One that errs by at
most ERROR of itself moves a number by less than DOUBT of the way from one code to the next; so a code is certain unless
the number lies that near to where codes change, and a scale unless E4M3 rounds it differently ERROR below and above.
Compiled code only.
"""

import triton
import triton.language as tl

from .nvfp4 import ALPHA_MIN, SIXTH, block_amax, e4m3_nearest, eighths, reciprocal

ERROR = 1.3e-6
LESS, MORE = tl.constexpr(1 - 2.0**-19), tl.constexpr(1 + 2.0**-19)  # ERROR, and what two products round off
DOUBT = 8  # in 2^-20 of a code: 4 * ERROR is 5.5 of these, and more is less where codes are 2 apart
FINITE = tl.constexpr(3e38)
FACTOR_MOST = tl.constexpr(2.0**80)  # so that what was flushed to zero is far below 2^-20 of a code
SURE = tl.constexpr(2 * DOUBT << 12)


def _codes_of_eight() -> str:
    """PTX: FP32 $2 .. $9 -> their codes in a word $0, and in $1 how near the nearest is to a change of codes: below
    SURE, in doubt.

    As in `nvfp4.e2m1_magnitude` the lowest of three lines counts, here half a code higher and next to 8, where floats
    lie 2^-20 apart: the three bits above the lowest twenty are the code, the twenty the way from the last change.
    """
    lines = [".reg .f32 a, f, g, h;", ".reg .b32 d, p, q, r, s, e, o;"]
    lines += [f".reg .b32 m{i}, y{i};" for i in range(8)]
    for i in range(8):
        lines += [
            f"abs.f32 a, ${i + 2}; min.f32 a, a, 0f40D00000;",  # 6.5 saturates, and is in no doubt
            "fma.rn.f32 f, a, 0f40000000, 0f41080000;",  # 2 a + 8.5
            "add.rn.f32 g, a, 0f41280000;",  # a + 10.5
            "fma.rn.f32 h, a, 0f3F000000, 0f41480000;",  # a / 2 + 12.5
            f"mov.b32 m{i}, f; mov.b32 p, g; min.s32 m{i}, m{i}, p; mov.b32 p, h; min.s32 m{i}, m{i}, p;",
            f"mad.lo.u32 d, m{i}, 4096, {DOUBT << 12};",
            "mov.b32 $1, d;" if i == 0 else "min.u32 $1, $1, d;",
            f"mov.b32 y{i}, ${i + 2};",
        ]
    lines += _gathered("m", 2, "r") + _gathered("y", 3, "s")
    lines += ["lop3.b32 $0, r, s, 0x77777777, 0xE4;"]  # codes from r, signs from s
    return "\n".join(["{", *lines, "}"])


def _gathered(name: str, byte: int, out: str) -> list[str]:
    """PTX: the upper half of that byte of eight words name0 .. name7, in order from the lowest."""
    lines = []
    for parity, first in (("e", 0), ("o", 1)):
        for half, i in (("p", first), ("q", first + 4)):
            lines.append(f"prmt.b32 {half}, {name}{i}, {name}{i + 2}, 0x00{4 + byte}{byte};")
        lines.append(f"prmt.b32 {parity}, p, q, 0x5410;")
    return [*lines, "shr.u32 e, e, 4;", f"lop3.b32 {out}, e, o, 0x0F0F0F0F, 0xE4;"]


CODES_OF_EIGHT = tl.constexpr(_codes_of_eight())


@triton.jit
def near_blocks(lo, hi, alpha, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """As `nvfp4.quantize_blocks` by rule absmax, of numbers within ERROR of what is meant or far below 2^-100; also
    whether a block is in doubt, int32 [ROWS, BLOCKS]. One with NaN or an infinity is."""
    amax = block_amax(lo, hi, ROWS, BLOCKS)
    usable = alpha >= ALPHA_MIN
    inv = tl.where(usable, tl.div_rn(1.0, tl.where(usable, alpha, 1.0)), 0.0)
    t = amax * SIXTH * inv
    byte, scale = e4m3_nearest(t * LESS)
    above, _ = e4m3_nearest(t * MORE)
    factor = reciprocal(scale * alpha)
    sure = (byte == above) & (t < FINITE) & (factor < FACTOR_MOST)
    first, near_first = _codes(lo * factor[:, :, None], ROWS, BLOCKS)
    second, near_second = _codes(hi * factor[:, :, None], ROWS, BLOCKS)
    doubt = tl.where(sure & (tl.minimum(near_first, near_second) >= SURE), 0, 1)
    return tl.join(first, second), byte, doubt


@triton.jit
def _codes(y, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """y [ROWS, BLOCKS, 8] -> (codes in words, the least way to a change of codes as in the assembly)."""
    y0, y1, y2, y3, y4, y5, y6, y7 = eighths(y, ROWS, BLOCKS)
    return tl.inline_asm_elementwise(
        CODES_OF_EIGHT,
        "=r,=r,f,f,f,f,f,f,f,f",
        [y0, y1, y2, y3, y4, y5, y6, y7],
        dtype=(tl.int32, tl.uint32),
        is_pure=True,
        pack=1,
    )
