"""Decoding to BF16: the kernels' own bit arithmetic with NumPy in place of the registers; instructions by ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest

from fp4suite.formats import E2M1_VALUES
from kernels_cute import gemm_nvfp4_sm90, nvfp4


def _prmt(x, y, selector):
    source = np.stack([(v >> np.uint32(s)) & np.uint32(0xFF) for v in (x, y) for s in (0, 8, 16, 24)])
    picked = [source[(selector >> 4 * i) & 7] << np.uint32(8 * i) for i in range(4)]
    return np.bitwise_or.reduce(picked)


def _mul_bf16x2(x, y):
    """Exact products: that they fit BF16 is asserted, not assumed."""
    words = np.zeros(np.broadcast(x, y).shape, np.uint32)
    for shift in (np.uint32(0), np.uint32(16)):
        left, right = (((v >> shift) & np.uint32(0xFFFF)).astype(np.uint16).view(ml_dtypes.bfloat16) for v in (x, y))
        exact = left.astype(np.float64) * right.astype(np.float64)
        rounded = exact.astype(ml_dtypes.bfloat16)
        assert (rounded.astype(np.float64) == exact).all()
        words |= rounded.view(np.uint16).astype(np.uint32) << shift
    return words


def _e4m3x2_to_f16x2(x):
    lo, hi = ((x >> np.uint32(s)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn) for s in (0, 8))
    halves = [h.astype(np.float16).view(np.uint16).astype(np.uint32) for h in (lo, hi)]
    return halves[0] | halves[1] << np.uint32(16)


@pytest.fixture
def _numpy(monkeypatch):
    monkeypatch.setattr(nvfp4, "Uint32", np.uint32)
    monkeypatch.setattr(nvfp4, "Float32", np.float32)
    monkeypatch.setattr(nvfp4, "prmt", _prmt)
    monkeypatch.setattr(gemm_nvfp4_sm90, "prmt", _prmt)
    monkeypatch.setattr(nvfp4, "mul_bf16x2", _mul_bf16x2)
    monkeypatch.setattr(nvfp4, "e4m3x2_to_f16x2", _e4m3x2_to_f16x2)
    monkeypatch.setattr(
        nvfp4, "f16_to_f32", lambda x: (x & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16).astype(np.float32)
    )
    monkeypatch.setattr(nvfp4, "float_bits", lambda x: x.view(np.uint32))


@pytest.mark.usefixtures("_numpy")
@pytest.mark.parametrize(
    ("decode", "order"),
    [(nvfp4.decode_pairs, (0, 4, 1, 5, 2, 6, 3, 7)), (gemm_nvfp4_sm90.decode8, range(8))],
    ids=["decode_pairs", "decode8"],
)
def test_decoding_is_exact_for_every_code_under_every_scale(decode, order):
    low = np.arange(127, dtype=np.uint32)  # every finite scale without sign, beside another one
    pairs = nvfp4.scale_pairs(low | (126 - low) << np.uint32(8))
    rng = np.random.default_rng(0)
    words = np.concatenate([np.arange(16, dtype=np.uint32) * 0x11111111, rng.integers(0, 2**32, 64, dtype=np.uint32)])
    for half, sf in ((0, low), (1, 126 - low)):
        decoded = decode(words[:, None], pairs[half][None, :])
        elements = [(w >> np.uint32(s)).astype(np.uint16).view(ml_dtypes.bfloat16) for w in decoded for s in (0, 16)]
        scales = sf.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        for i, got in zip(order, elements, strict=True):
            code = (words >> np.uint32(4 * i)) & np.uint32(15)
            value = np.array(E2M1_VALUES)[code & 7] * np.where(code & 8, -1.0, 1.0)
            want = value[:, None] * scales[None, :] * 2.0 ** (nvfp4.SCALE_BIAS - 126)
            np.testing.assert_array_equal(got.astype(np.float64), want)
            np.testing.assert_array_equal(np.signbit(got.astype(np.float64)), np.signbit(want))
