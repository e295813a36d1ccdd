"""Device functions that the quantising kernels share. They give the bytes of `fp4suite.reference.e2m1`, which defines
the arithmetic: FP32, one rounding an operation. So every kernel is compiled with enable_fp_fusion=False, divides with
div_rn, and adds in trees of explicit pairs (a tl.sum over two elements), never in an order of the compiler's choice.

Tiles are [rows, blocks, 16]: a block of 16 elements under one scale is the last axis. `E2M1_CVT` says that the target
has cvt.rn.satfinite.e2m1x2.f32 (sm_100a); elsewhere, and in Triton's interpreter, bit arithmetic gives the same bytes.
"""

import triton
import triton.language as tl

from fp4suite.formats import BLOCK as _BLOCK
from fp4suite.reference import e2m1, quant

CVT = tl.constexpr(not triton.knobs.runtime.interpret)  # compiled: the hardware's conversions, and assembly
BLOCK = tl.constexpr(_BLOCK)
ALPHA_MIN = tl.constexpr(e2m1.ALPHA_MIN)
MSE_FIRST = tl.constexpr(min(e2m1.MSE_STEPS))  # tried in ascending order, without 0
MSE_LAST = tl.constexpr(max(e2m1.MSE_STEPS))
E4M3_MAX = tl.constexpr(448.0)
E4M3_MIN = tl.constexpr(2.0**-9)
AMAX_TO_ALPHA = tl.constexpr(2688.0)
SIXTH = tl.constexpr(1 / 6)
SUM_CHUNK = tl.constexpr(quant.SUM_CHUNK)
LOG2E = tl.constexpr(quant.LOG2E)
EXP2_0, EXP2_1, EXP2_2, EXP2_3, EXP2_4 = (tl.constexpr(c) for c in quant.EXP2_COEFFICIENTS)
EXP2_MIN = tl.constexpr(quant.EXP2_MIN)
EXP2_MAX = tl.constexpr(quant.EXP2_MAX)
ROUND = tl.constexpr(quant.ROUND)
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
E4M3_BIAS = tl.constexpr((127 - 7) << 3)  # FP32's exponent bias less E4M3's, at the place of E4M3's exponent


@triton.jit
def widen(x):
    """BF16, FP16 or FP32 -> FP32, exactly: Triton's interpreter mistakes subnormal BF16 numbers in a cast."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr, CVT: tl.constexpr):
    """FP32 -> dtype, to nearest even. Without CVT, BF16 by integer arithmetic: Triton's interpreter truncates."""
    if CVT or dtype != tl.bfloat16:
        return x.to(dtype)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FFF).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def magnitude_bits(x):
    """|x| as int32: in the order of the numbers, with NaN above infinity, so that a maximum loses no NaN."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def e4m3_encode(t):
    """FP32 in 0 .. 448 -> E4M3 byte as int32, to nearest even."""
    bits = t.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - E4M3_BIAS
    # below 2^-6 steps are 2^-9: adding 2^23 leaves the count of them, rounded, in the low bits
    subnormal = (t * 512.0 + 8388608.0).to(tl.int32, bitcast=True) & 0xF
    return tl.where(t < 0.015625, subnormal, normal)


@triton.jit
def e4m3_decode(byte):
    """E4M3 byte without sign (int32 in 0 .. 126) -> FP32."""
    normal = ((byte + E4M3_BIAS) << 20).to(tl.float32, bitcast=True)
    return tl.where(byte < 8, byte.to(tl.float32) * E4M3_MIN, normal)


@triton.jit
def _power_below(y):
    """y <= 6 -> (|y| saturated, the power of two at or below it, at least 1)."""
    a = tl.minimum(tl.abs(y), 6.0)
    power = (a.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return a, tl.maximum(power, 1.0)


@triton.jit
def e2m1_magnitude(y):
    """|y| -> its E2M1 code without sign, saturating, in the low byte of int32 bits whose upper three are 0x4B0000;
    NaN counts as 6.

    Drawn over a = |y|, the codes lie on three lines, the lowest of which counts: 2 a up to 2, a + 2 up to 4, a / 2 + 4
    up to 6. From 2^23 on floats lie 1 apart, so that the one addition of each line rounds to the nearest code, ties to
    the even one; and the lowest line, rounded, is the lowest of the rounded lines.
    """
    a = tl.abs(y)
    a = tl.where(a < 6.0, a, 6.0)
    first = tl.fma(a, 2.0, 8388608.0)  # exact products: as good as one addition
    second = a + 8388610.0
    third = tl.fma(a, 0.5, 8388612.0)
    bits = tl.minimum(first.to(tl.int32, bitcast=True), second.to(tl.int32, bitcast=True))
    return tl.minimum(bits, third.to(tl.int32, bitcast=True))


@triton.jit
def e2m1_round(y):
    """y <= 6 -> the nearest E2M1 value as FP32, without -0."""
    a, power = _power_below(y)
    shift = power * 4194304.0
    rounded = (a + shift) - shift
    return tl.where(y < 0, -rounded, rounded)


@triton.jit
def e4m3_to_f32(byte):
    """Any E4M3 byte (uint8) -> FP32: sign, subnormal numbers and NaN too."""
    byte = byte.to(tl.int32)
    magnitude = byte & 0x7F
    x = tl.where(magnitude == 0x7F, float("nan"), e4m3_decode(magnitude))
    return tl.where(byte >= 0x80, x * -1.0, x)  # -x is 0 - x, which loses the sign of 0


@triton.jit
def times_e2m1(scale, packed, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """FP32 scale [ROWS, BLOCKS] times the codes in packed [ROWS, BLOCKS, 8] (uint8) -> FP32 [ROWS, BLOCKS, 16].

    A code's three low bits, put where FP16 has two bits of exponent and one of mantissa, are its magnitude times 2^-14,
    subnormal numbers included. Exact for an E4M3 scale.
    """
    p = packed.to(tl.int32)
    even = ((p & 0x7) << 9) | ((p & 0x8) << 12)
    odd = ((p & 0x70) << 5) | ((p & 0x80) << 8)
    half = tl.join(even.to(tl.int16), odd.to(tl.int16)).to(tl.float16, bitcast=True)
    x = half.to(tl.float32).reshape(ROWS, BLOCKS, BLOCK)
    return x * (scale * 16384.0)[:, :, None]


@triton.jit
def sf_offsets(rows, blocks, K, SF_BLOCKED: tl.constexpr):
    """Where the scales of rows (int64 [ROWS]) and blocks (int32 [BLOCKS]) of a [., K] matrix lie: [ROWS, BLOCKS]."""
    count = K // BLOCK
    if SF_BLOCKED:
        by_row = (rows // 128) * ((count + 3) // 4 * 512) + (rows % 32) * 16 + (rows % 128 // 32) * 4
        by_block = (blocks // 4) * 512 + blocks % 4
    else:
        by_row = rows * count
        by_block = blocks
    return by_row[:, None] + by_block[None, :]


@triton.jit
def eighths(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """x [ROWS, GROUPS, 8] -> its eight columns, each [ROWS, GROUPS]."""
    even, odd = tl.split(x.reshape(ROWS, GROUPS, 4, 2))
    x04, x26 = tl.split(even.reshape(ROWS, GROUPS, 2, 2))
    x15, x37 = tl.split(odd.reshape(ROWS, GROUPS, 2, 2))
    x0, x4 = tl.split(x04)
    x1, x5 = tl.split(x15)
    x2, x6 = tl.split(x26)
    x3, x7 = tl.split(x37)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def pack_e2m1(y, ROWS: tl.constexpr, GROUPS: tl.constexpr, E2M1_CVT: tl.constexpr):
    """y [ROWS, GROUPS, 8] -> int32 [ROWS, GROUPS], element i in bits 4 i to 4 i + 3; saturates, NaN gives +6.

    y comes out of a multiplication: the GPU's NaN then have no sign.
    """
    if E2M1_CVT:
        y0, y1, y2, y3, y4, y5, y6, y7 = eighths(tl.minimum(y, 6.0), ROWS, GROUPS)  # of NaN and 6 a GPU takes 6
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b8 b0, b1, b2, b3;
            cvt.rn.satfinite.e2m1x2.f32 b0, $2, $1;
            cvt.rn.satfinite.e2m1x2.f32 b1, $4, $3;
            cvt.rn.satfinite.e2m1x2.f32 b2, $6, $5;
            cvt.rn.satfinite.e2m1x2.f32 b3, $8, $7;
            mov.b32 $0, {b0, b1, b2, b3};
            }
            """,
            "=r,f,f,f,f,f,f,f,f",
            [y0, y1, y2, y3, y4, y5, y6, y7],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        if not CVT:
            y = tl.where(y == y, y, 6.0)
        codes = eighths(e2m1_magnitude(y), ROWS, GROUPS)
        bits = eighths(y.to(tl.uint32, bitcast=True), ROWS, GROUPS)
        word = codes[7]
        top = bits[7] >> 28  # a sign above three bits of exponent
        for i in tl.static_range(6, -1, -1):
            word = word * 16 + codes[i]
            top = (top << 4) | (bits[i] >> 28)
        # 0x4B000000 * 17, what the codes bring with them, and this make 2^32
        return (word + 0x05000000) | (top & 0x88888888).to(tl.int32, bitcast=True)


@triton.jit
def _below_6(y):
    """y, or 6 where it is larger or NaN."""
    return tl.where(y < 6.0, y, 6.0)


@triton.jit
def reciprocal(scale):
    """1 / scale, rounded to nearest, or 0 of 0."""
    inverse = one_over(scale)
    return tl.where(scale == 0.0, 0.0, inverse)


@triton.jit
def one_over(x):
    """1 / x, rounded to nearest; shorter than a division."""
    if CVT:
        return tl.inline_asm_elementwise("rcp.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def _squared_error(lo, hi, scaled_lo, scaled_hi, sf, alpha, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Rule "mse": error of each block, in units of alpha, under scales sf [ROWS, BLOCKS]; halves [ROWS, BLOCKS, 8]."""
    factor = reciprocal(sf * alpha)[:, :, None]
    d_lo = scaled_lo - e2m1_round(_below_6(lo * factor)) * sf[:, :, None]
    d_hi = scaled_hi - e2m1_round(_below_6(hi * factor)) * sf[:, :, None]
    return pair_sum(d_lo * d_lo, ROWS, BLOCKS, 8) + pair_sum(d_hi * d_hi, ROWS, BLOCKS, 8)


@triton.jit
def pair_sum(x, ROWS: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr):
    """Sum over the last axis of [ROWS, BLOCKS, N] in a tree of adjacent pairs -> [ROWS, BLOCKS]; N a power of two."""
    for level in tl.static_range(1, 11):
        if N >> level:
            x = tl.sum(x.reshape(ROWS, BLOCKS, N >> level, 2), axis=3)
    return x.reshape(ROWS, BLOCKS)


@triton.jit
def row_sum(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Sum of each row of [ROWS, N], N a power of two, in `reference.quant`'s order: halves, then pairs."""
    for level in tl.static_range(1, 8):
        if N >> level >= SUM_CHUNK:
            x = tl.sum(x.reshape(ROWS, 2, N >> level), axis=1)
    CHUNK: tl.constexpr = N if N < SUM_CHUNK else SUM_CHUNK
    return pair_sum(x.reshape(ROWS, 1, CHUNK), ROWS, 1, CHUNK).reshape(ROWS)


@triton.jit
def exp_neg(g):
    """exp(-g) of FP32 by the operations of `reference.quant.exp_neg`; of NaN it may be anything."""
    return exp2_times(tl.minimum(tl.maximum(g * -LOG2E, EXP2_MIN), EXP2_MAX), 0)


@triton.jit
def exp2_times(t, POWER: tl.constexpr):
    """2^t times 2^POWER, for t in EXP2_MIN .. EXP2_MAX less POWER; outside it may be anything."""
    shifted = t + ROUND
    f = t - (shifted - ROUND)
    p = (((EXP2_4 * f + EXP2_3) * f + EXP2_2) * f + EXP2_1) * f + EXP2_0
    # the low bits of `shifted` are the integer part; moved to the exponent's place they make its power of two
    power = ((shifted.to(tl.int32, bitcast=True) << 23) + (127 + POWER) * 8388608).to(tl.float32, bitcast=True)
    return (p * f + 1.0) * power


@triton.jit
def absmax_scale(amax, alpha):
    """Rule "absmax": largest magnitudes of blocks -> (scales as int32 bytes, factors of the blocks' elements)."""
    usable = alpha >= ALPHA_MIN
    inv = tl.where(usable, tl.div_rn(1.0, tl.where(usable, alpha, 1.0)), 0.0)
    t = amax * SIXTH * inv
    t = tl.where(t <= E4M3_MAX, t, E4M3_MAX)
    byte, scale = e4m3_nearest(t)
    return byte, reciprocal(scale * alpha)


# Two numbers' bytes and values; no 8-bit type that LLVM makes vectors of: with two bytes a thread and arithmetic on
# them ptxas 12.8 took two of four for whatever a register held (Triton 3.6, sm_90a).
_NEAREST = tl.constexpr(
    "{ .reg .b16 both, a, b; .reg .b32 f16, bits;"
    "cvt.rn.satfinite.e4m3x2.f32 both, $5, $4; cvt.rn.f16x2.e4m3x2 f16, both; mov.b32 {a, b}, f16;"
    "cvt.f32.f16 $2, a; cvt.f32.f16 $3, b; cvt.u32.u16 bits, both; and.b32 $0, bits, 255; shr.u32 $1, bits, 8; }"
)


@triton.jit
def e4m3_nearest(t):
    """FP32 in 0 .. 448 -> (its E4M3 byte as int32, to nearest even; the number that this stands for)."""
    if CVT:
        return tl.inline_asm_elementwise(
            _NEAREST, "=r,=r,=f,=f,f,f", [t], dtype=(tl.int32, tl.float32), is_pure=True, pack=2
        )
    byte = e4m3_encode(t)
    return byte, e4m3_decode(byte)


@triton.jit
def _larger(a, b):
    return tl.maximum(tl.abs(a), tl.abs(b), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def block_amax(lo, hi, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Largest magnitude of each block, NaN above infinity: halves [ROWS, BLOCKS, 8] -> [ROWS, BLOCKS]."""
    return most_of_eight(_larger(lo, hi), ROWS, BLOCKS)


@triton.jit
def most_of_eight(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Largest magnitudes of [ROWS, GROUPS, 8], NaN above infinity: [ROWS, GROUPS]."""
    x = eighths(x, ROWS, GROUPS)
    return _larger(_larger(_larger(x[0], x[1]), _larger(x[2], x[3])), _larger(_larger(x[4], x[5]), _larger(x[6], x[7])))


@triton.jit
def quantize_blocks(
    lo, hi, alpha, RULE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, E2M1_CVT: tl.constexpr
):
    """FP32 halves of blocks [ROWS, BLOCKS, 8] under a scalar alpha -> (codes in words, int32 [ROWS, BLOCKS, 2], scales
    as bytes, int32 [ROWS, BLOCKS])."""
    amax = block_amax(lo, hi, ROWS, BLOCKS)
    if RULE == "modelopt_weight":
        usable = alpha >= ALPHA_MIN
        divisor = tl.where(usable, alpha, 1.0)
        t = tl.where(usable, tl.div_rn(amax, 6.0 * divisor), 0.0)
        t = tl.where(t == 0.0, 1.0, t)
        t = tl.where(t <= E4M3_MAX, t, E4M3_MAX)
        byte = e4m3_encode(tl.where(t < E4M3_MIN, E4M3_MIN, t))
        scale = (e4m3_decode(byte) * divisor)[:, :, None]
        lo = tl.where(usable, tl.div_rn(lo, scale), 0.0) + 0.0  # -0 + 0 = 0
        hi = tl.where(usable, tl.div_rn(hi, scale), 0.0) + 0.0
    else:
        byte, factor = absmax_scale(amax, alpha)
        if RULE == "mse":
            inv = tl.where(alpha >= ALPHA_MIN, tl.div_rn(1.0, alpha), 0.0)
            scaled_lo = lo * inv
            scaled_hi = hi * inv
            start = byte
            least = _squared_error(lo, hi, scaled_lo, scaled_hi, e4m3_decode(byte), alpha, ROWS, BLOCKS)
            for step in tl.static_range(MSE_FIRST, MSE_LAST + 1):
                if step != 0:
                    trial = tl.minimum(tl.maximum(start + step, 0), 126)
                    sf = e4m3_decode(trial)
                    error = _squared_error(lo, hi, scaled_lo, scaled_hi, sf, alpha, ROWS, BLOCKS)
                    better = error < least
                    byte = tl.where(better, trial, byte)
                    least = tl.where(better, error, least)
            factor = reciprocal(e4m3_decode(byte) * alpha)
        lo *= factor[:, :, None]
        hi *= factor[:, :, None]
    words = tl.join(pack_e2m1(lo, ROWS, BLOCKS, E2M1_CVT), pack_e2m1(hi, ROWS, BLOCKS, E2M1_CVT))
    return words, byte


@triton.jit
def load_half(
    at, blocks, inside, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, AGAIN: tl.constexpr = False
):
    """The first (HALF = 0) or second eight columns of each of `blocks` (int32 [BLOCKS]) of rows that begin at the
    pointers `at` [ROWS, 1, 1]: FP32 [ROWS, BLOCKS, 8], 0 where not `inside` [ROWS or 1, BLOCKS, 1] (None: all are).

    A thread loads 16 bytes at a time. So it holds eight columns of each half, and whole blocks, whose scales no other
    thread computes again. AGAIN: no compiler may keep what was loaded before instead.
    """
    at += (blocks[:, None] * BLOCK + HALF * 8)[None, :, :]
    if at.dtype.element_ty.primitive_bitwidth == 32:
        quarter = tl.arange(0, 4)[None, None, :]
        first = _load(at + quarter, inside, AGAIN)
        second = _load(at + 4 + quarter, inside, AGAIN)
        return tl.join(first, second).permute(0, 1, 3, 2).reshape(ROWS, BLOCKS, 8)
    else:
        return widen(_load(at + tl.arange(0, 8)[None, None, :], inside, AGAIN))


@triton.jit
def _load(at, inside, AGAIN: tl.constexpr):
    if inside is None:
        return tl.load(at, volatile=AGAIN)
    else:
        return tl.load(at, mask=inside, other=0.0, volatile=AGAIN)


@triton.jit
def store_quantized(
    lo,
    hi,
    rows,
    blocks,
    alpha,
    data_ptr,
    sf_ptr,
    M,
    K,
    RULE: tl.constexpr,
    SF_BLOCKED: tl.constexpr,
    E2M1_CVT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Quantise the halves [ROWS, BLOCKS, 8] of blocks and store, as `store_blocks` does."""
    words, byte = quantize_blocks(lo, hi, alpha, RULE, ROWS, BLOCKS, E2M1_CVT)
    store_blocks(words, byte, rows, blocks, data_ptr, sf_ptr, M, K, SF_BLOCKED)


@triton.jit
def store_blocks(words, byte, rows, blocks, data_ptr, sf_ptr, M, K, SF_BLOCKED: tl.constexpr):
    """Store what `quantize_blocks` gave of blocks whose rows (int64 [ROWS]) and places in k (int32 [BLOCKS]) are given.

    In the blocked layout the tiles together have to cover M to a multiple of 128 and K to one of 64: padding becomes 0.
    """
    count = K // BLOCK
    inside = (rows < M)[:, None] & (blocks < count)[None, :]
    pairs = blocks[:, None] * 2 + tl.arange(0, 2)[None, :]
    at = data_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + rows[:, None, None] * (K // 8) + pairs[None, :, :]
    tl.store(at, words, mask=inside[:, :, None])
    sf_at = sf_ptr + sf_offsets(rows, blocks, K, SF_BLOCKED)
    if SF_BLOCKED:
        padded = (rows < (M + 127) // 128 * 128)[:, None] & (blocks < (count + 3) // 4 * 4)[None, :]
        tl.store(sf_at, tl.where(inside, byte, 0).to(tl.uint8), mask=padded)
    else:
        tl.store(sf_at, byte.to(tl.uint8), mask=inside)
