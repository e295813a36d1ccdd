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
def e2m1_code(y):
    """y <= 6 -> E2M1 code as int32; saturates at -6; the sign of -0 is kept.

    Near 2^22 times 1, 2 or 4 floats lie 0.5, 1 or 2 apart, as E2M1 numbers do near |y|: one addition rounds to nearest,
    ties to even. It leaves the exponent e of |y| in bit 23 up and the count n of steps in the low bits; the code is
    n + 2 e. The 3 beside 2^22 makes up for what the exponent's bias leaves modulo 8.
    """
    a, power = _power_below(y)
    bits = tl.fma(power, 4194307.0, a).to(tl.int32, bitcast=True)  # the product is exact: as good as one addition
    return ((bits + (bits >> 22)) & 7) | ((y.to(tl.int32, bitcast=True) >> 28) & 8)


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
def pack_e2m1(y, ROWS: tl.constexpr, BLOCKS: tl.constexpr, E2M1_CVT: tl.constexpr):
    """y [ROWS, BLOCKS, 16] -> bytes uint8 [ROWS, BLOCKS, 8], even k in the low nibble; saturates, NaN gives +6."""
    even, odd = tl.split(y.reshape(ROWS, BLOCKS, BLOCK // 2, 2))
    if E2M1_CVT:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b8 b0, b1, b2, b3;
            cvt.rn.satfinite.e2m1x2.f32 b0, $5, $1;
            cvt.rn.satfinite.e2m1x2.f32 b1, $6, $2;
            cvt.rn.satfinite.e2m1x2.f32 b2, $7, $3;
            cvt.rn.satfinite.e2m1x2.f32 b3, $8, $4;
            mov.b32 $0, {b0, b1, b2, b3};
            }
            """,
            "=r,f,f,f,f,f,f,f,f",
            [tl.minimum(even, 6.0), tl.minimum(odd, 6.0)],  # of NaN and 6 a GPU takes 6
            dtype=tl.uint8,
            is_pure=True,
            pack=4,
        )
    else:
        return (e2m1_code(_below_6(even)) | (e2m1_code(_below_6(odd)) << 4)).to(tl.uint8)


@triton.jit
def _below_6(y):
    """y, or 6 where it is larger or NaN."""
    return tl.where(y < 6.0, y, 6.0)


@triton.jit
def _reciprocal(scale):
    return tl.where(scale == 0.0, 0.0, tl.div_rn(1.0, tl.where(scale == 0.0, 1.0, scale)))


@triton.jit
def _squared_error(x, scaled, sf, alpha, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """Rule "mse": error of each block of x [ROWS, BLOCKS, 16] under scales sf [ROWS, BLOCKS], in units of alpha."""
    y = _below_6(x * _reciprocal(sf * alpha)[:, :, None])
    d = scaled - e2m1_round(y) * sf[:, :, None]
    return pair_sum(d * d, ROWS, BLOCKS, BLOCK)


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
def quantize_blocks(x, alpha, RULE: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, E2M1_CVT: tl.constexpr):
    """FP32 x [ROWS, BLOCKS, 16] under a scalar alpha -> (bytes uint8 [ROWS, BLOCKS, 8], scale int32 [ROWS, BLOCKS])."""
    amax = tl.max(magnitude_bits(x), axis=2).to(tl.float32, bitcast=True)
    usable = alpha >= ALPHA_MIN
    divisor = tl.where(usable, alpha, 1.0)
    if RULE == "modelopt_weight":
        t = tl.where(usable, tl.div_rn(amax, 6.0 * divisor), 0.0)
        t = tl.where(t == 0.0, 1.0, t)
        t = tl.where(t <= E4M3_MAX, t, E4M3_MAX)
        byte = e4m3_encode(tl.where(t < E4M3_MIN, E4M3_MIN, t))
        scale = e4m3_decode(byte) * divisor
        y = tl.where(usable, tl.div_rn(x, scale[:, :, None]), 0.0) + 0.0  # -0 + 0 = 0
    else:
        inv = tl.where(usable, tl.div_rn(1.0, divisor), 0.0)
        t = amax * SIXTH * inv
        byte = e4m3_encode(tl.where(t <= E4M3_MAX, t, E4M3_MAX))
        if RULE == "mse":
            scaled = x * inv
            start = byte
            least = _squared_error(x, scaled, e4m3_decode(byte), alpha, ROWS, BLOCKS)
            for step in tl.static_range(MSE_FIRST, MSE_LAST + 1):
                if step != 0:
                    trial = tl.minimum(tl.maximum(start + step, 0), 126)
                    error = _squared_error(x, scaled, e4m3_decode(trial), alpha, ROWS, BLOCKS)
                    better = error < least
                    byte = tl.where(better, trial, byte)
                    least = tl.where(better, error, least)
        y = x * _reciprocal(e4m3_decode(byte) * alpha)[:, :, None]
    return pack_e2m1(y, ROWS, BLOCKS, E2M1_CVT), byte


@triton.jit
def store_quantized(
    x,
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
    """Quantise x [ROWS, BLOCKS, 16], whose rows (int64 [ROWS]) and blocks of k (int32 [BLOCKS]) are given, and store.

    In the blocked layout the tiles together have to cover M to a multiple of 128 and K to one of 64: padding becomes 0.
    """
    packed, byte = quantize_blocks(x, alpha, RULE, ROWS, BLOCKS, E2M1_CVT)
    count = K // BLOCK
    inside = (rows < M)[:, None] & (blocks < count)[None, :]
    pairs = blocks[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    at = rows[:, None, None] * (K // 2) + pairs[None, :, :]
    tl.store(data_ptr + at, packed, mask=inside[:, :, None])
    sf_at = sf_ptr + sf_offsets(rows, blocks, K, SF_BLOCKED)
    if SF_BLOCKED:
        padded = (rows < (M + 127) // 128 * 128)[:, None] & (blocks < (count + 3) // 4 * 4)[None, :]
        tl.store(sf_at, tl.where(inside, byte, 0).to(tl.uint8), mask=padded)
    else:
        tl.store(sf_at, byte.to(tl.uint8), mask=inside)
