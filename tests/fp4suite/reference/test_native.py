"""MXFP4, FP8 blocks and the exact cast, against ml_dtypes and exact arithmetic."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from fp4suite import reference
from fp4suite.formats import FP8BlockTensor, MXFP4Tensor
from fp4suite.reference import e2m1, e8m0


def bytes_(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def least_exponent(amax: float, top: int) -> int:
    """The least e >= -126 with top * 2^e >= amax, in exact arithmetic."""
    e = -126
    while top * Fraction(2) ** e < Fraction(amax):
        e += 1
    return e


@pytest.mark.parametrize("top", [6, 448])
def test_scale_is_the_least_that_fits(top):
    """Around every boundary top * 2^e in steps of one FP32 unit, where a rounded quotient would go wrong."""
    edges = np.float32([top * 2.0**e for e in range(-60, 60, 7)])
    amax = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf))])
    amax = np.concatenate([amax, np.float32([0, 1e-45, 1e-38, top * 2.0**-126, 1.0, 3.4e38])])
    got = e8m0.ceil_log2(torch.from_numpy(amax), float(top)).tolist()
    assert got == [least_exponent(float(a), top) for a in amax]


def test_powers_of_two():
    exponent = torch.arange(-127, 128)
    assert torch.equal(e8m0.pow2(exponent).double(), torch.tensor([2.0**e for e in range(-127, 128)]).double())


def test_every_mxfp4_code_under_every_scale():
    data = torch.arange(256, dtype=torch.uint8).repeat(255, 1)
    sf = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()
    codes = np.stack((np.arange(256) & 0xF, np.arange(256) >> 4), -1).astype(np.uint8).reshape(-1)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    scales = np.arange(255, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    want = values[None, :] * scales[:, None]
    got = reference.dequant_mxfp4(MXFP4Tensor(data, sf), torch.float64).numpy()
    assert np.array_equal(got, want)
    with np.errstate(over="ignore"):
        as_float = want.astype(np.float32)
    assert np.array_equal(reference.dequant_mxfp4(MXFP4Tensor(data, sf), torch.float32).numpy(), as_float)


def test_mxfp4_quantise():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 96, generator=gen) * torch.exp2(torch.randint(-30, 30, (2, 5, 1), generator=gen).float())
    x[0, 0, :32], x[0, 1, 32:64], x[1, 1, 5] = 0.0, 1e-41, -0.0
    t = reference.quantize_mxfp4(x)
    blocks = x.double().unflatten(-1, (3, 32))
    exponent = [least_exponent(a, 6) for a in blocks.abs().amax(-1).flatten().tolist()]
    assert t.sf.flatten().tolist() == [e + 127 for e in exponent]
    y = blocks.flatten(0, 2) / torch.tensor([2.0**e for e in exponent]).double()[:, None]
    assert y.abs().max() <= 6
    want = y.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert np.array_equal(e2m1.unpack(t.data).reshape(-1, 32).numpy(), want)
    again = reference.quantize_mxfp4(reference.dequant_mxfp4(t, torch.float32))
    assert torch.equal(reference.dequant_mxfp4(again), reference.dequant_mxfp4(t))


def test_every_fp8_byte_under_every_scale():
    """One 128 x 128 block holds each byte 64 times."""
    finite = np.arange(256, dtype=np.uint8)
    finite[(finite & 0x7F) == 0x7F] = 0
    data = torch.from_numpy(np.tile(finite, 64).reshape(128, 128)).view(torch.float8_e4m3fn)
    values = np.tile(finite, 64).view(ml_dtypes.float8_e4m3fn).astype(np.float64).reshape(128, 128)
    for byte in (0, 1, 2, 100, 127, 140, 253, 254):
        t = FP8BlockTensor(data, bytes_(byte).view(1, 1))
        assert np.array_equal(reference.dequant_fp8_block(t, torch.float64).numpy(), values * 2.0 ** (byte - 127))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (64, 300), (257, 384), (0, 128)])
def test_fp8_quantise(shape):
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=gen) * torch.exp2(torch.randint(-8, 8, (shape[0], 1), generator=gen).float())
    t = reference.quantize_fp8_block(x)
    m, k = shape
    assert t.sf.shape == (-(-m // 128), -(-k // 128))
    for i in range(t.sf.shape[0]):
        for j in range(t.sf.shape[1]):
            rows, cols = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            block = x[rows, cols]
            e = least_exponent(float(block.abs().max()), 448)
            assert int(t.sf[i, j]) == e + 127
            want = (block.double() / 2.0**e).numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            assert np.array_equal(t.data[rows, cols].view(torch.uint8).numpy(), want)
    back = reference.dequant_fp8_block(t, torch.float32)
    assert back.shape == shape
    assert back.is_contiguous()
    again = reference.quantize_fp8_block(back)
    assert torch.equal(reference.dequant_fp8_block(again, torch.float32), back)


def test_nan_scales_decode_to_nan():
    one = MXFP4Tensor(torch.zeros(1, 16, dtype=torch.uint8), bytes_(255).view(1, 1))
    assert reference.dequant_mxfp4(one).isnan().all()
    two = FP8BlockTensor(torch.zeros(4, 4).to(torch.float8_e4m3fn), bytes_(255).view(1, 1))
    assert reference.dequant_fp8_block(two).isnan().all()


def test_refusals():
    with pytest.raises(ValueError, match="k must be a multiple of 32, got 48"):
        reference.quantize_mxfp4(torch.randn(2, 48))
    for bad in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="infinite or NaN"):
            reference.quantize_mxfp4(torch.full((1, 32), bad))
        with pytest.raises(ValueError, match="infinite or NaN"):
            reference.quantize_fp8_block(torch.full((1, 32), bad))


# --- MXFP4 -> NVFP4 --------------------------------------------------------------------------------------------------


def mxfp4(spans: list[list[int]], seed: int = 0, top: int = 120) -> MXFP4Tensor:
    """Random codes; the scale of block [i, j] lies spans[i][j] below `top`."""
    gen = torch.Generator().manual_seed(seed)
    sf = top - torch.tensor(spans)
    data = torch.randint(0, 256, (sf.shape[0], sf.shape[1] * 16), generator=gen, dtype=torch.uint8)
    return MXFP4Tensor(data, sf.to(torch.uint8))


def test_cast_is_exact_over_17_steps():
    """Codes unchanged, 18 steps of scales, the same values; at either end of alpha's range too."""
    for top in (9, 120, 254):
        t = mxfp4([[max(0, min(i, top)) for i in range(18)]] * 3, top=top)
        cast, lost = reference.mxfp4_to_nvfp4(t)
        assert int(lost) == 0
        assert torch.equal(cast.data, t.data)
        assert float(cast.alpha) == 2.0 ** (top - 127 - 8)
        want = torch.tensor([[2.0 ** (8 - min(i // 2, top)) for i in range(36)]] * 3)
        assert torch.equal(cast.sf.float(), want)
        assert torch.equal(reference.dequant_nvfp4(cast, torch.float64), reference.dequant_mxfp4(t, torch.float64))


def test_cast_below_17_steps_rounds_and_counts():
    t = mxfp4([[0, 17, 18, 19, 21, 40]] * 4)
    data = t.data.clone().view(4, 6, 16)
    data[0, 2] = 0x64  # 2 and 4: still exact one step down
    data[1, 5] = 0x80  # zeros, one of them negative: nothing to lose
    data[2, 2] = 0x13  # 1.5 and 0.5: halves are not
    t = MXFP4Tensor(data.view(4, 96), t.sf)
    cast, lost = reference.mxfp4_to_nvfp4(t)
    got, want = reference.dequant_nvfp4(cast, torch.float64), reference.dequant_mxfp4(t, torch.float64)
    wrong = (got != want).unflatten(-1, (6, 32)).any(-1)
    assert int(lost) == int(wrong.sum()) > 0
    assert not wrong[:, :2].any()
    assert not wrong[0, 2]
    assert not wrong[1, 5]
    assert wrong[2, 2]
    step = float(cast.alpha) * 2.0**-9 * 0.5  # between neighbours next to 0 under the least scale
    assert ((got - want).abs() <= step).unflatten(-1, (6, 32))[:, 2:4].all()
    assert torch.equal(cast.data.view(4, 6, 16)[:, :2], data[:, :2])
    assert torch.equal(torch.signbit(got), torch.signbit(want))


def test_cast_per_expert_and_segment():
    t = [mxfp4([[0, 1]] * 2 + [[5, 6]] * 4, seed=s, top=100 + 3 * s) for s in range(3)]
    stacked = MXFP4Tensor(torch.stack([x.data for x in t]), torch.stack([x.sf for x in t]))
    runs = (2, 4)
    cast, lost = reference.mxfp4_to_nvfp4(stacked, runs)
    assert int(lost) == 0
    assert cast.alpha.tolist() == [[2.0 ** (100 + 3 * s - 135 - d) for d in (0, 5)] for s in range(3)]
    want = reference.dequant_mxfp4(stacked, torch.float32)
    assert torch.equal(reference.dequant_nvfp4(cast, torch.float32, segments=runs), want)
    whole, _ = reference.mxfp4_to_nvfp4(stacked)
    assert whole.alpha.shape == (3,)
    assert torch.equal(reference.dequant_nvfp4(whole, torch.float32), want)


def test_cast_refusals():
    with pytest.raises(ValueError, match="255 is NaN"):
        reference.mxfp4_to_nvfp4(MXFP4Tensor(torch.zeros(1, 16, dtype=torch.uint8), bytes_(255).view(1, 1)))
    with pytest.raises(ValueError, match=r"block scales up to 2\^-119 only"):
        reference.mxfp4_to_nvfp4(MXFP4Tensor(torch.zeros(1, 16, dtype=torch.uint8), bytes_(8).view(1, 1)))
