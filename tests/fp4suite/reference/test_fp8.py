"""act="fp8": what activations and weights become, and what it costs in accuracy."""

import pytest
import torch

from fp4suite import layouts, reference, testing
from fp4suite.formats import FP8RowTensor, NVFP4Tensor
from fp4suite.reference import fp8


def gaussian(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16()


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def test_rows_are_rounded_once_to_their_own_scale():
    x = gaussian(16, 256)
    t = fp8.quantize_fp8(x)
    assert torch.equal(t.scale, x.float().abs().amax(1) / 448)
    back = fp8.dequant_fp8(t, torch.float64)
    near = x.double().abs().clamp_min(2.0**-6 * t.scale.double()[:, None])
    assert ((back - x.double()).abs() <= near * (2.0**-4 + 2.0**-20)).all()  # half a unit of three bits
    assert 0.02 < off(back, x.double()) < 0.03
    assert torch.equal(fp8.quantize_fp8(x * 2.0**7).data.view(torch.uint8), t.data.view(torch.uint8))


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = gaussian(5, 64)
    x[0], x[1], x[2, 3], x[3, 4] = 0, -0.0, -torch.inf, torch.nan
    decoded = fp8.dequant_fp8(fp8.quantize_fp8(x))
    assert not decoded[:2].any()
    assert decoded[2].isnan().any()
    assert decoded[3].isnan().all()
    assert decoded[4].isfinite().all()
    b = reference.quantize_nvfp4(gaussian(16, 64, 1)).prepare_fp8()
    d = reference.gemm_nvfp4(x, b, act="fp8")
    assert not d[:2].any()
    assert d[2:4].isnan().all()
    assert d[4].isfinite().all()


@pytest.mark.parametrize("amplitude", [2.0**-126, 2.0**-100, 1.0, 2.0**100, 3e38])
def test_amplitudes(amplitude):
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0] * 16]) * amplitude
    t = fp8.quantize_fp8(x)
    assert t.scale.isfinite().all()
    error = (fp8.dequant_fp8(t, torch.float64) - x.double()).abs().max()
    assert error <= max(1e-6 * amplitude, fp8.LEAST_AMAX * 2.0**-18)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(2, 96), ValueError, r"k a multiple of 64, got \[2, 96\]"),
        (torch.zeros(64), ValueError, r"must be \[\.\.\., m, k\]"),
        (torch.zeros(2, 64, dtype=torch.float64), TypeError, "bfloat16, float16 or float32"),
    ],
)
def test_refusals(x, error, message):
    with pytest.raises(error, match=message):
        fp8.quantize_fp8(x)


def test_columns_are_moved_and_moved_back():
    """Each byte is that of its column in the order of `layouts.fp8_columns`; decoded, columns are in their own."""
    x = gaussian(3, 192)
    t = fp8.quantize_fp8(x)
    scaled = x.float() * (torch.full((3, 1), 448.0) / x.float().abs().amax(1, keepdim=True))
    columns = layouts.fp8_columns(torch.arange(192))
    assert torch.equal(t.data.view(torch.uint8), scaled[:, columns].to(torch.float8_e4m3fn).view(torch.uint8))
    own = scaled.to(torch.float8_e4m3fn).double() * t.scale.double()[:, None]
    assert torch.equal(fp8.dequant_fp8(t, torch.float64), own)


@pytest.mark.parametrize("order", layouts.ORDERS)
def test_row_exponents_come_from_the_largest_scale_in_any_order(order):
    gen = torch.Generator().manual_seed(0)
    b = testing.random_nvfp4(192, 256, gen, adversarial=True)
    caps = torch.randint(0, 127, (192, 1), generator=gen, dtype=torch.uint8)
    b = NVFP4Tensor(b.data, b.sf.view(torch.uint8).minimum(caps).view(torch.float8_e4m3fn), b.alpha)
    largest = b.sf.float().amax(1)
    want = torch.floor(torch.log2(largest.clamp_min(2.0**-7)) - 5).to(torch.int8)  # subnormal scales as if 2^-7
    assert (want.min(), want.max()) == (-12, 3)
    laid_out = b.with_order(order).prepare_fp8()
    assert torch.equal(laid_out.row_exponent, want)
    assert torch.equal(fp8.dequant_fp8_weight(laid_out), fp8.dequant_fp8_weight(b.prepare_fp8()))
    assert torch.equal(laid_out.with_order("rows").row_exponent, want)
    assert laid_out.to("cpu").row_exponent is not None


def test_what_weights_lose():
    """Every code under every scale, beside every scale as a row's largest.

    Lost are the last bits of codes 1.5, 3 and 6, and in blocks with less than 2^-10 of the row's largest scale those of
    numbers below 2^-6 of the row's power of two, and all of those up to 2^-10 of it; nothing else.
    """
    codes = torch.arange(16, dtype=torch.uint8)
    scales = torch.arange(127, dtype=torch.uint8)
    top, own = torch.meshgrid(scales, scales, indexing="ij")
    rows = torch.stack([own.flatten(), torch.maximum(top, own).flatten()], 1)
    data = (codes[::2] | codes[1::2] << 4).repeat(len(rows), 2)
    b = NVFP4Tensor(data, rows.view(torch.float8_e4m3fn), torch.ones(())).prepare_fp8()
    power = torch.exp2(b.row_exponent.double())[:, None]
    exact, got = (
        t[:, :16] / power for t in (reference.dequant_nvfp4(b, torch.float64), fp8.dequant_fp8_weight(b, torch.float64))
    )
    block, largest = rows.view(torch.float8_e4m3fn).double().unbind(1)
    assert got.abs().max() == 360 - 8  # 6 x 60, whose last bits are lost
    assert exact.abs().max() == 360
    assert ((got - exact).abs() <= (exact.abs() * 2.0**-4).clamp_min(2.0**-10)).all()
    plain = torch.tensor([code & 7 not in (3, 5, 7) for code in range(16)])
    far = block < largest * 2.0**-10
    assert torch.equal(got[~far][:, plain], exact[~far][:, plain])
    assert (got[:, plain] != exact[:, plain])[far].any()
    assert (exact.abs()[:, plain][got[:, plain] != exact[:, plain]] < 2.0**-6).all()
    vanished = (got == 0) & (exact != 0)
    assert torch.equal(vanished, (exact != 0) & (exact.abs() <= 2.0**-10))
    assert vanished[far].any()
    assert not vanished[~far].any()


def test_weights_without_exponents_and_blocked_scales_are_refused():
    b = reference.quantize_nvfp4(gaussian(64, 64))
    with pytest.raises(ValueError, match=r"no row exponents: FP8 GEMMs read what NVFP4Tensor.prepare_fp8\(\) gives"):
        reference.gemm_nvfp4(gaussian(2, 64), b, act="fp8")
    with pytest.raises(ValueError, match="linear scales, got blocked_128x4"):
        b.with_sf_layout("blocked_128x4").prepare_fp8()
    with pytest.raises(ValueError, match=r"needs row_exponent \[64\]"):
        NVFP4Tensor(b.data, b.sf, b.alpha, row_exponent=torch.zeros(63, dtype=torch.int8))
    with pytest.raises(TypeError, match="row_exponent must be int8"):
        NVFP4Tensor(b.data, b.sf, b.alpha, row_exponent=torch.zeros(64))
    with pytest.raises(ValueError, match=r"needs scale \[2\]"):
        FP8RowTensor(torch.zeros(2, 64, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(3))
    with pytest.raises(ValueError, match=r"k a multiple of 64, got \[2, 96\]"):
        FP8RowTensor(torch.zeros(2, 96, dtype=torch.uint8).view(torch.float8_e4m3fn), torch.zeros(2))


@pytest.mark.parametrize("k", [512, 1536])
def test_error_on_gaussian_data(k):
    """3.4 % against the product of the same weights, where NVFP4 activations have 9.5 %."""
    x, b = gaussian(128, k), reference.quantize_nvfp4(gaussian(128, k, 1)).prepare_fp8()
    want = x.double() @ reference.dequant_nvfp4(b, torch.float32).double().T
    assert 0.0335 < off(reference.gemm_nvfp4(x, b, act="fp8", out_dtype=torch.float32), want) < 0.0345
    four = reference.quantize_nvfp4(x)
    assert off(reference.gemm_nvfp4(four, b, out_dtype=torch.float32), want) > 0.09


def test_error_under_adversarial_scales():
    """All 127 scales beside each other in a row: what underflows weighs nothing (3.6 %)."""
    gen = torch.Generator().manual_seed(0)
    x, b = gaussian(128, 1024), testing.random_nvfp4(128, 1024, gen, adversarial=True).prepare_fp8()
    want = x.double() @ reference.dequant_nvfp4(b, torch.float32).double().T
    assert 0.0357 < off(reference.gemm_nvfp4(x, b, act="fp8", out_dtype=torch.float32), want) < 0.0367


def test_alpha_and_segments():
    x, b = gaussian(5, 64), reference.quantize_nvfp4(gaussian(48, 64, 1)).prepare_fp8()
    one = reference.gemm_nvfp4(x, NVFP4Tensor(b.data, b.sf, torch.ones(()), row_exponent=b.row_exponent), act="fp8")
    alphas = torch.tensor([2.0**40, -(2.0**-40)])
    two = NVFP4Tensor(b.data, b.sf, alphas, row_exponent=b.row_exponent)
    got = reference.gemm_nvfp4(x, two, act="fp8", segments=(16, 32))
    assert torch.equal(got, one * alphas.repeat_interleave(torch.tensor([16, 32])).bfloat16())
