"""Integer and floating point instructions against Python integers, fractions, numpy and ml_dtypes."""

import itertools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from ptx_emulator.numbers import E2M1, E4M3, SMALL

from .ptx import lanewise

rng = np.random.default_rng(3)
I32 = np.concatenate([rng.integers(-(2**31), 2**31, 50), [0, 1, -1, 2**31 - 1, -(2**31), 7]]).astype(np.int32)
J32 = np.concatenate([rng.integers(-(2**31), 2**31, 50), [3, -1, 1, -1, -1, 0x7FFFFFFF]]).astype(np.int32)
I64 = rng.integers(-(2**63), 2**63, 64, dtype=np.int64)
J64 = rng.integers(-(2**63), 2**63, 64, dtype=np.int64)
F32 = np.concatenate(
    [
        rng.standard_normal(400).astype(np.float32)
        * np.float32(2.0) ** rng.integers(-130, 120, 400).astype(np.float32),
        np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3.4e38, 1, -1, 0.5], np.float32),
    ]
).astype(np.float32)
G32 = np.roll(F32, 13)[::-1].copy()


def wrap(values, bits, signed):
    out = [int(v) % (1 << bits) for v in values]
    return np.array(out, f"u{bits // 8}").view(f"{'i' if signed else 'u'}{bits // 8}")


@pytest.mark.parametrize(
    ("text", "compute"),
    [
        ("add.s32 $d, $a, $b;", lambda a, b: a + b),
        ("sub.s32 $d, $a, $b;", lambda a, b: a - b),
        ("mul.lo.s32 $d, $a, $b;", lambda a, b: a * b),
        ("mul.hi.s32 $d, $a, $b;", lambda a, b: a * b >> 32),
        ("mad.lo.s32 $d, $a, $b, $b;", lambda a, b: a * b + b),
        ("div.s32 $d, $a, $b;", lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
        ("rem.s32 $d, $a, $b;", lambda a, b: abs(a) % abs(b) * (-1 if a < 0 else 1)),
        ("min.s32 $d, $a, $b;", min),
        ("max.s32 $d, $a, $b;", max),
        ("and.b32 $d, $a, $b;", lambda a, b: a & b),
        ("xor.b32 $d, $a, $b;", lambda a, b: a ^ b),
        ("lop3.b32 $d, $a, $b, $a, 0x3C;", lambda a, b: a ^ b),
        ("shl.b32 $d, $a, 5;", lambda a, b: a << 5),
        ("shl.b32 $d, $a, 32;", lambda a, b: 0),
        ("shr.s32 $d, $a, 40;", lambda a, b: -1 if a < 0 else 0),
        ("shr.u32 $d, $a, 3;", lambda a, b: (a & 0xFFFFFFFF) >> 3),
        ("shf.l.wrap.b32 $d, $a, $b, 9;", lambda a, b: ((b << 32 | a & 0xFFFFFFFF) << 9) >> 32),
        ("shf.r.clamp.b32 $d, $a, $b, 35;", lambda a, b: b),
        ("popc.b32 $d, $a;", lambda a, b: (a & 0xFFFFFFFF).bit_count()),
        ("clz.b32 $d, $a;", lambda a, b: 32 - (a & 0xFFFFFFFF).bit_length()),
        ("brev.b32 $d, $a;", lambda a, b: int(f"{a & 0xFFFFFFFF:032b}"[::-1], 2)),
        ("bfe.u32 $d, $a, 7, 9;", lambda a, b: (a & 0xFFFFFFFF) >> 7 & 0x1FF),
        ("bfe.s32 $d, $a, 28, 9;", lambda a, b: a >> 28),
        ("bfi.b32 $d, $a, $b, 4, 8;", lambda a, b: b & ~0xFF0 | (a & 0xFF) << 4),
        ("abs.s32 $d, $a;", lambda a, b: abs(a)),
        ("neg.s32 $d, $a;", lambda a, b: -a),
        ("not.b32 $d, $a;", lambda a, b: ~a),
        ("cvt.s32.s8 $d, $a;", lambda a, b: (a & 255) - ((a & 128) << 1)),
        ("add.sat.s32 $d, $a, $b;", lambda a, b: min(max(a + b, -(2**31)), 2**31 - 1)),
    ],
)
def test_32_bit_integers(text, compute):
    got = lanewise(text, np.int32, I32, J32)
    want = wrap([compute(int(a), int(b)) for a, b in zip(I32, J32, strict=True)], 32, True)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("text", "compute"),
    [
        ("mul.lo.s64 $d, $a, $b;", lambda a, b: a * b),
        ("mul.hi.s64 $d, $a, $b;", lambda a, b: a * b >> 64),
        ("mad.lo.s64 $d, $a, $b, $a;", lambda a, b: a * b + a),
        ("div.s64 $d, $a, $b;", lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)),
        ("shr.s64 $d, $a, 13;", lambda a, b: a >> 13),
        ("sub.s64 $d, $a, $b;", lambda a, b: a - b),
    ],
)
def test_64_bit_integers(text, compute):
    got = lanewise(text, np.int64, I64, J64)
    np.testing.assert_array_equal(got, wrap([compute(int(a), int(b)) for a, b in zip(I64, J64, strict=True)], 64, True))


def test_wide_products_and_carries():
    got = lanewise("mul.wide.s32 $d, $a, $b;", np.int64, I32, J32)
    np.testing.assert_array_equal(got, I32.astype(np.int64) * J32)
    text = """
    mov.b64 {%r10, %r11}, $a; mov.b64 {%r12, %r13}, $b;
    add.cc.u32 %r14, %r10, %r12; addc.u32 %r15, %r11, %r13; mov.b64 $d, {%r14, %r15};"""
    np.testing.assert_array_equal(lanewise(text, np.int64, I64, J64), I64 + J64)


def test_prmt_selects_bytes_and_replicates_signs():
    a, b = np.array([0x83020100], np.uint32), np.array([0x07060504], np.uint32)
    pool = [0x00, 0x01, 0x02, 0x83, 4, 5, 6, 7]
    for selector in (0x7531, 0x0123, 0xB8B8, 0x3210):
        got = lanewise(f"prmt.b32 $d, $a, $b, {selector};", np.uint32, a, b)
        nibbles = [selector >> 4 * n & 15 for n in range(4)]
        want = [(0xFF if pool[n & 7] & 0x80 else 0) if n & 8 else pool[n & 7] for n in nibbles]
        assert list(got.view(np.uint8)) == want


def exact_f32(value: Fraction, mode: str) -> np.float32:
    """Independent of the emulator: the nearest FP32 numbers around an exact value."""
    near = np.float32(float(value)) if value else np.float32(0)
    candidates = sorted({near, np.nextafter(near, np.float32(np.inf)), np.nextafter(near, np.float32(-np.inf))})
    exact = [(Fraction(float(c)), c) for c in candidates if np.isfinite(c)]
    if mode == "rz":
        mode = "rm" if value > 0 else "rp"
    if mode == "rm":
        return max(c for f, c in exact if f <= value)
    if mode == "rp":
        return min(c for f, c in exact if f >= value)
    return min(exact, key=lambda fc: (abs(fc[0] - value), int(fc[1].view(np.uint32)) & 1))[1]


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_fma_rounds_once(mode):
    a, b, c = ((rng.standard_normal(300) * 2.0 ** rng.integers(-9, 9, 300)).astype(np.float32) for _ in range(3))
    # close calls: c nearly cancels a * b, or lies far below it
    near = -(a.astype(np.float64) * b).astype(np.float32)
    c = np.choose(np.arange(300) % 3, [near, near * np.float32(1e-9), c])
    got = lanewise(f"fma.{mode}.f32 $d, $a, $b, $c;", np.float32, a, b, c)
    for x, y, z, g in zip(a, b, c, got, strict=True):
        value = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        assert g == exact_f32(value, mode), (x, y, z)


@pytest.mark.parametrize(("text", "compute"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply)])
def test_f32_is_ieee_and_nan_is_canonical(text, compute):
    got = lanewise(f"{text}.f32 $d, $a, $b;", np.float32, F32, G32)
    with np.errstate(all="ignore"):
        want = compute(F32, G32)
    np.testing.assert_array_equal(got[~np.isnan(want)], want[~np.isnan(want)])
    assert (got[np.isnan(want)].view(np.uint32) == 0x7FFFFFFF).all()


def test_ftz_flushes_inputs_and_outputs():
    a, b = np.array([1e-40, 1e-20, -1e-40, 3.0], np.float32), np.array([1.0, 1e-20, 1.0, 1e-40], np.float32)
    np.testing.assert_array_equal(lanewise("mul.ftz.f32 $d, $a, $b;", np.float32, a, b), np.zeros(4, np.float32))
    assert (lanewise("mul.f32 $d, $a, $b;", np.float32, a, b) != 0).tolist() == [True, True, True, True]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_half_fma_against_exact_arithmetic(kind):
    dtype = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
    x = [rng.integers(0, 2**16, 512).astype(np.uint16) for _ in range(3)]
    with np.errstate(invalid="ignore"):
        a, b, c = (v.view(dtype).astype(np.float64) for v in x)
    got = lanewise(f"fma.rn.{kind} $d, $a, $b, $c;", np.uint16, *x).view(dtype)
    checked = 0
    for p, q, r, g in zip(a, b, c, got, strict=True):
        if not all(map(math.isfinite, (p, q, r))):
            continue
        value = Fraction(p) * Fraction(q) + Fraction(r)
        if not math.isfinite(float(g)):
            assert abs(value) > Fraction(float(ml_dtypes.finfo(dtype).max))
            continue
        error = abs(Fraction(float(g)) - value)
        for other in (np.nextafter(g, dtype(np.inf)), np.nextafter(g, dtype(-np.inf))):
            if math.isfinite(float(other)):
                assert error <= abs(Fraction(float(other)) - value)
        checked += 1
    assert checked > 300


def test_comparisons_with_nan():
    values = np.array([1.0, 2.0, np.nan], np.float32)
    a, b = (np.array(x, np.float32) for x in zip(*itertools.product(values, values), strict=True))
    nan = np.isnan(a) | np.isnan(b)
    for name, want in {
        "lt": a < b,
        "ltu": (a < b) | nan,
        "ne": (a != b) & ~nan,
        "neu": (a != b) | nan,
        "equ": (a == b) | nan,
        "num": ~nan,
        "nan": nan,
    }.items():
        got = lanewise(f"setp.{name}.f32 %p1, $a, $b; selp.b32 $d, 1, 0, %p1;", np.int32, a, b)
        np.testing.assert_array_equal(got != 0, want, name)


def test_min_and_max_of_signed_zeros_and_nan():
    a, b = np.array([0.0, -0.0, np.nan, 1.0], np.float32), np.array([-0.0, 0.0, 5.0, np.nan], np.float32)
    assert lanewise("min.f32 $d, $a, $b;", np.float32, a, b).tobytes() == np.array([-0.0, -0.0, 5, 1], "f4").tobytes()
    assert lanewise("max.f32 $d, $a, $b;", np.float32, a, b).tobytes() == np.array([0.0, 0.0, 5, 1], "f4").tobytes()
    assert np.isnan(lanewise("max.NaN.f32 $d, $a, $b;", np.float32, a, b)).tolist() == [False, False, True, True]


# --- conversions ---

SMALL_DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "ue8m0": ml_dtypes.float8_e8m0fnu,
}


@pytest.mark.parametrize("name", SMALL_DTYPES)
def test_small_formats_decode_as_ml_dtypes(name):
    codes = np.arange(len(SMALL[name].values), dtype=np.uint8)
    want = codes.view(SMALL_DTYPES[name]).astype(np.float32)
    np.testing.assert_array_equal(SMALL[name].decode(codes), want)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1", "e2m3", "e3m2"])
def test_every_tie_and_neighbour_rounds_as_ml_dtypes(name):
    small = SMALL[name]
    mags = small.magnitudes
    ties = (mags[1:] + mags[:-1]) / 2
    x = np.concatenate([mags, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])
    x = np.concatenate([x, -x]).astype(np.float32)
    want = x.astype(SMALL_DTYPES[name]).view(np.uint8) & (len(small.values) - 1)
    np.testing.assert_array_equal(small.encode(x), want)


def test_saturation():
    x = np.array([1e9, -1e9, np.inf, np.nan, 464.0, 465.0], np.float32)
    assert E4M3.encode(x).tolist() == [0x7E, 0xFE, 0x7E, 0x7F, 0x7E, 0x7E]
    assert E2M1.encode(x).tolist() == [7, 15, 7, 7, 7, 7]


def test_fp8_and_fp4_pairs_put_the_second_source_low():
    a, b = np.array([1.5, -6.0, 0.3], np.float32), np.array([448.0, 0.25, -2.0], np.float32)
    got = lanewise("cvt.rn.satfinite.e4m3x2.f32 $d, $a, $b;", np.uint16, a, b)
    want = E4M3.encode(a).astype(np.uint16) << 8 | E4M3.encode(b)
    np.testing.assert_array_equal(got, want)
    text = "{ .reg .b8 x; cvt.rn.satfinite.e2m1x2.f32 x, $a, $b; cvt.u32.u8 $d, x; }"
    got = lanewise(text, np.uint32, a, b)
    np.testing.assert_array_equal(got, E2M1.encode(a).astype(np.uint32) << 4 | E2M1.encode(b))


def test_every_e4m3_pair_to_f16():
    codes = np.arange(256, dtype=np.uint16)
    pairs = codes << 8 | codes[::-1]
    got = lanewise("cvt.rn.f16x2.e4m3x2 $d, $a;", np.uint32, pairs).view(np.float16).reshape(-1, 2)
    for column, source in ((0, codes[::-1]), (1, codes)):
        want = source.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
        np.testing.assert_array_equal(got[:, column], want)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_f32_to_half_and_back(kind, dtype):
    with np.errstate(all="ignore"):
        want = F32.astype(dtype)
    got = lanewise(f"cvt.rn.{kind}.f32 $d, $a;", np.uint16, F32).view(dtype)
    number = ~np.isnan(F32)
    np.testing.assert_array_equal(got[number].astype(np.float32), want[number].astype(np.float32))
    back = lanewise(f"cvt.f32.{kind} $d, $a;", np.float32, want[number].view(np.uint16))
    np.testing.assert_array_equal(back, want[number].astype(np.float32))
    pair = lanewise(f"cvt.rn.{kind}x2.f32 $d, $a, $b;", np.uint32, F32[:100], G32[:100])
    with np.errstate(all="ignore"):
        high, low = (x[:100].astype(dtype).view(np.uint16) for x in (F32, G32))
    ok = ~np.isnan(F32[:100]) & ~np.isnan(G32[:100])
    np.testing.assert_array_equal((pair >> 16)[ok], high[ok])
    np.testing.assert_array_equal((pair & 0xFFFF)[ok], low[ok])


@pytest.mark.parametrize(
    ("mode", "rounding"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_float_to_integer_rounds_and_saturates(mode, rounding):
    x = np.array([0.5, 1.5, -0.5, -1.5, 2.4, -2.6, 3e9, -3e9, np.nan, np.inf], np.float32)
    got = lanewise(f"cvt.{mode}.s32.f32 $d, $a;", np.int32, x)
    want = [int(min(max(rounding(float(v)), -(2**31)), 2**31 - 1)) if v == v else 0 for v in x]
    assert got.tolist() == want
    unsigned = lanewise(f"cvt.{mode}.u32.f32 $d, $a;", np.uint32, x)
    assert unsigned.tolist() == [int(min(max(rounding(float(v)), 0), 2**32 - 1)) if v == v else 0 for v in x]


def test_packed_f32_and_bf16():
    a = rng.standard_normal(64).astype(np.float32)
    pairs = a.view(np.uint64)
    got = lanewise("mul.f32x2 $d, $a, $b;", np.uint64, pairs, pairs[::-1].copy()).view(np.float32)
    np.testing.assert_array_equal(got, a * pairs[::-1].copy().view(np.float32))
    halves = a.astype(ml_dtypes.bfloat16)
    got = lanewise("mul.rn.bf16x2 $d, $a, $a;", np.uint32, halves.view(np.uint32))
    np.testing.assert_array_equal(got.view(ml_dtypes.bfloat16), halves * halves)


@pytest.mark.parametrize(("kind", "dtype"), [("f16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_mixed_precision(kind, dtype):
    """ "Mixed Precision Floating-Point Instructions": FP16 or BF16 with FP32, rounded once to FP32."""
    a, b = (rng.standard_normal(64).astype(dtype) for _ in range(2))
    c = rng.standard_normal(64).astype(np.float32)
    bits = [x.view(np.uint16) for x in (a, b)]
    wide = [x.astype(np.float64) for x in (a, b, c)]
    for text, inputs, want in (
        (f"add.rn.f32.{kind} $d, $a, $b;", (bits[0], c), wide[0] + wide[2]),
        (f"sub.rn.f32.{kind} $d, $a, $b;", (bits[0], c), wide[0] - wide[2]),
        (f"fma.rn.f32.{kind} $d, $a, $b, $c;", (*bits, c), wide[0] * wide[1] + wide[2]),
    ):
        np.testing.assert_array_equal(lanewise(text, np.float32, *inputs), want.astype(np.float32))
