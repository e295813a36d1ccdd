"""NVFP4 GEMMs in plain PyTorch: operands decoded exactly, FP32 products and sums, alpha in FP32 after the sum."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from ..formats import FP8RowTensor, NVFP4Tensor, SfLayout
from .fp8 import dequant_fp8, dequant_fp8_weight, quantize_fp8
from .quant import quantize_nvfp4, scaled_codes


@overload
def gemm_nvfp4(
    a: Tensor | NVFP4Tensor | FP8RowTensor,
    b: NVFP4Tensor,
    *,
    act: Literal["fp8"] | None = ...,
    segments: Sequence[int] | None = ...,
    out_dtype: torch.dtype = ...,
    out_alpha: None = ...,
    out_sf_layout: SfLayout = ...,
) -> Tensor: ...


@overload
def gemm_nvfp4(
    a: Tensor | NVFP4Tensor | FP8RowTensor,
    b: NVFP4Tensor,
    *,
    act: Literal["fp8"] | None = ...,
    segments: Sequence[int] | None = ...,
    out_dtype: torch.dtype = ...,
    out_alpha: Tensor,
    out_sf_layout: SfLayout = ...,
) -> NVFP4Tensor: ...


def gemm_nvfp4(
    a: Tensor | NVFP4Tensor | FP8RowTensor,
    b: NVFP4Tensor,
    *,
    act: Literal["fp8"] | None = None,
    segments: Sequence[int] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out_alpha: Tensor | None = None,
    out_sf_layout: SfLayout = "linear",
) -> Tensor | NVFP4Tensor:
    """a [..., k] @ b [n, k].T -> [..., n].

    a: a float tensor (W4A16), an NVFP4Tensor with one alpha (W4A4), or an FP8RowTensor: what act="fp8" makes of a float
    tensor (W4A8), beside which b is rounded to E4M3 under its row exponents as `fp8` says. b.alpha is one number, or
    one for each of `segments`, which are runs of output columns that sum to n. d = (sum of a * code * sf) * alpha,
    rounded once.
    out_alpha: float32 [], makes d NVFP4 under this global scale, rule "absmax", from FP32: `out_dtype` counts nothing.
    """
    n = b.shape[-2]
    if act == "fp8" and isinstance(a, Tensor):
        a = quantize_fp8(a)
    if isinstance(a, FP8RowTensor):
        out = dequant_fp8(a) @ dequant_fp8_weight(b).T
    else:
        out = (scaled_codes(a) if isinstance(a, NVFP4Tensor) else a.float()) @ scaled_codes(b).T
    alpha = column_alpha(b.alpha, n, segments)
    if isinstance(a, NVFP4Tensor):
        alpha = alpha * a.alpha
    if out_alpha is not None:
        return quantize_nvfp4(out * alpha, alpha=out_alpha, sf_layout=out_sf_layout)
    return (out * alpha).to(out_dtype)


def grouped_gemm_nvfp4(
    a: Tensor | NVFP4Tensor,
    b: NVFP4Tensor,
    offsets: Tensor,
    *,
    segments: Sequence[int] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] of a [slots, k] times expert e of b [experts, n, k] -> [slots, n].

    offsets: int32 [experts + 1], ascending from 0; rows from offsets[experts] on give zeros. Experts may be empty.
    b.alpha: [], [experts] or [experts, segments]. Reads offsets on the host.
    """
    experts, n, _ = b.shape
    x = scaled_codes(a) * a.alpha if isinstance(a, NVFP4Tensor) else a.float()
    out = x.new_zeros(x.shape[0], n)
    bounds = offsets.tolist()
    for e in range(experts):
        lo, hi = bounds[e], bounds[e + 1]
        if hi > lo:
            alpha = b.alpha if b.alpha.ndim == 0 else b.alpha[e]
            one = replace(b, data=b.data[e], sf=b.sf[e], alpha=alpha)
            out[lo:hi] = gemm_nvfp4(x[lo:hi], one, segments=segments, out_dtype=torch.float32)
    return out.to(out_dtype)


def column_alpha(alpha: Tensor, n: int, segments: Sequence[int] | None) -> Tensor:
    """alpha [] or [segments] -> [] or [n], one number an output column. Raises ValueError if they do not fit."""
    check_segments(alpha, n, segments)
    if alpha.ndim == 0 or alpha.numel() == 1:
        return alpha.reshape(())
    assert segments is not None
    return torch.cat([a.expand(width) for a, width in zip(alpha, segments, strict=True)])


def check_segments(alpha: Tensor, n: int, segments: Sequence[int] | None) -> None:
    """Raises ValueError unless `segments` are positive runs of columns that sum to n, one for each alpha."""
    count = alpha.numel()
    if alpha.ndim > 1:
        raise ValueError(f"alpha of one weight is [] or [segments], got {list(alpha.shape)}")
    if segments is None:
        if count != 1:
            raise ValueError(f"alpha holds {count} numbers: segments must say how many columns each covers")
        return
    if len(segments) != count or sum(segments) != n or min(segments) <= 0:
        raise ValueError(f"segments {list(segments)} must be {count} positive runs of columns that sum to n={n}")
