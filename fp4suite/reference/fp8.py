"""FP8 on Hopper (act="fp8"): activations in E4M3 with a scale a token, weights in E4M3 with a power of two a row.

a   amax = max |x| of a row in FP32, at least 2^-100; scale = amax / 448; data = E4M3(x * (448 / amax)), each
    operation rounded to nearest even. A row of zeros gives zeros, a row with an infinity or a NaN gives NaN.
b   data = E4M3(code * sf * 2^-e). The exponent e (`NVFP4Tensor.row_exponent`) is floor(log2 s) - 5 for the largest
    scale s of a row, and -12 where s is subnormal: no number is above 360. Codes 1.5, 3 and 6 take up to two bits more
    than E4M3 has; the others are exact, unless in a block whose scale is less than 2^-10 of the row's largest: the
    smallest number but zero is 2^-9.
d   sum of products * scale * 2^e, times alpha.
"""

import torch
from torch import Tensor

from .. import layouts
from ..formats import E4M3_MAX, FP8RowTensor, NVFP4Tensor
from .quant import scaled_codes

LEAST_AMAX = 2.0**-100  # so that no scale and no reciprocal of one leaves FP32


def quantize_fp8(x: Tensor) -> FP8RowTensor:
    """x [..., m, k] in bf16, fp16 or fp32, k a multiple of 64 -> E4M3 with a scale a row.

    Raises ValueError for another k, TypeError for another dtype.
    """
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if x.ndim < 2 or x.shape[-1] % layouts.TILE:
        raise ValueError(f"x must be [..., m, k] with k a multiple of {layouts.TILE}, got {list(x.shape)}")
    wide = x.float()
    amax = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    amax = amax.clamp_min(LEAST_AMAX)  # a NaN stays one
    most = torch.full_like(amax, E4M3_MAX)  # a GPU divides by a scalar, and a scalar, in two roundings
    scaled = wide * (most / amax)[..., None]
    data = scaled.to(torch.float8_e4m3fn).view(torch.uint8).masked_fill(scaled.isnan(), 0x7F)
    columns = layouts.fp8_columns(data).view(torch.float8_e4m3fn)
    return FP8RowTensor(columns, amax / most)


def dequant_fp8(t: FP8RowTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[..., m, k] in `dtype`, columns in their own order."""
    data = layouts.fp8_columns(t.data.view(torch.uint8)).view(torch.float8_e4m3fn)
    return (data.to(torch.float64) * t.scale.double()[..., None]).to(dtype)


def dequant_fp8_weight(b: NVFP4Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight [n, k] without alpha, as FP8 tensor cores see it: rounded to E4M3 under its row exponents.

    Raises ValueError for a weight without them.
    """
    if b.row_exponent is None:
        raise ValueError("b has no row exponents: FP8 GEMMs read what NVFP4Tensor.prepare_fp8() gives")
    power = torch.exp2(b.row_exponent.double())[..., None]
    rounded = (scaled_codes(b).double() / power).to(torch.float32).to(torch.float8_e4m3fn)
    return (rounded.double() * power).to(dtype)
