"""The sums of the tensor cores by hand; that an H100 makes them so is tested by the golden vectors."""

import numpy as np
import pytest

from ptx_emulator import tensorcore


def dot(terms, c=0.0, kind="f16", result="f32", bits=25):
    a = np.array([terms], np.float64)
    return tensorcore.step(a, np.ones_like(a), np.array([[c]]), (kind, kind), result, bits)[0, 0]


def test_bits_below_the_largest_term_are_cut():
    assert dot([1.0, 1.0] + [2.0**-25] * 14, c=-2.0) == 0  # the accumulator has the largest exponent
    assert dot([1.0] + [2.0**-25] * 15, c=-1.0) == 15 * 2.0**-25
    assert dot([1.0] + [2.0**-26] * 15, c=-1.0) == 0


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sum_is_cut_towards_zero(sign):
    assert dot([sign * 1.0], c=sign * 1.5 * 2.0**-23) == np.float32(sign * (1 + 2.0**-23))


def test_products_align_by_the_sum_of_exponents():
    """1.5 * 1.5 counts as less than two: 25 bits below one are kept."""
    a, b = np.array([[1.5, 2.0**-12]]), np.array([[1.5, 2.0**-13]])
    got = tensorcore.step(a, b, np.array([[-2.25]]), ("f16", "f16"), "f32")
    assert got[0, 0] == 0  # the accumulator's exponent is one
    got = tensorcore.step(a, b, np.array([[0.0]]), ("f16", "f16"), "f16")
    assert got[0, 0] == np.float16(2.25)
    got = tensorcore.step(np.array([[1.5, 2.0**-12, -1.5]]), np.array([[1.5, 2.0**-13, 1.5]]), np.zeros((1, 1)),
                          ("f16", "f16"), "f32")  # fmt: skip
    assert got[0, 0] == np.float32(2.0**-25)


def test_subnormal_factors_have_the_least_exponent():
    tiny, one = 2.0**-24, 1.0
    # 2^-24 aligns as 2^-14: 25 bits below are 2^-39
    assert dot([tiny], c=2.0**-39) == np.float32(tiny + 2.0**-39)
    assert dot([tiny], c=2.0**-40) == np.float32(tiny)
    assert dot([one]) == 1


def test_fp8_keeps_13_bits():
    assert dot([1.0, 2.0**-13], kind="e4m3", bits=13) == np.float32(1 + 2.0**-13)
    assert dot([1.0, 2.0**-9 * 2.0**-5], kind="e4m3", bits=13) == 1
    assert dot([1.0, 1.0, 2.0**-13], kind="e4m3", bits=13) == 2  # the result's fraction, too


def test_nan_infinity_overflow_and_zero():
    assert np.isposinf(dot([np.inf, 1.0]))
    for got in (dot([np.inf, -np.inf]), dot([np.nan])):
        assert got.view(np.uint32) == 0x7FFFFFFF
    assert np.isposinf(dot([2.0**127, 2.0**127], kind="bf16"))
    assert dot([-0.0, -0.0], c=-0.0).view(np.uint32) == 0


def test_mma_with_fp8_adds_the_accumulator_last_rounded_to_nearest():
    a = np.zeros((1, 32))
    a[0, 0] = 1.0
    got = tensorcore.mma_fp8(a, np.ones((1, 32)), np.array([[1.5 * 2.0**-23]]), "f32")
    assert got[0, 0] == np.float32(1 + 2.0**-22)


def test_integers_wrap_or_saturate():
    a, c = np.full((1, 32), 127.0), np.array([[2.0**31 - 1]])
    assert tensorcore.integers(a, a, c, True)[0, 0] == 2**31 - 1
    assert tensorcore.integers(a, a, c, False)[0, 0] == -(2**31) + 32 * 127 * 127 - 1
