"""RMSNorm: x * rsqrt(mean(x²) + eps) * weight, in FP32, rounded once at the end."""

import torch
from torch import Tensor

from .quant import rmsnorm_fp32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """[..., d] -> [..., d] in x's dtype; weight [d], or None for none (the per-head norm of queries)."""
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    return y.to(x.dtype)


def rms_norm_wide(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm`, not rounded at the end: FP64 of FP64, else FP32 by the operations of `quant.rmsnorm_fp32`.

    What kernels can give bit for bit, and a row the same whatever others there are.
    """
    return rms_norm(x, weight, eps) if x.dtype == torch.float64 else rmsnorm_fp32(x, weight, eps)


def wide(x: Tensor) -> Tensor:
    """x in the type that references compute in: FP64 if x is FP64, else FP32."""
    return x if x.dtype == torch.float64 else x.float()
