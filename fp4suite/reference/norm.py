"""RMSNorm: x * rsqrt(mean(x²) + eps) * weight, in FP32, rounded once at the end."""

import torch
from torch import Tensor

from .quant import rmsnorm_fp32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """[..., k] -> [..., k] in x's dtype; weight [k], or None for none (the per-head norm of queries).

    A NaN makes its row NaN; an infinity makes itself NaN and the rest of its row 0.
    """
    return rms_norm_wide(x, weight, eps).to(x.dtype)


def rms_norm_wide(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`rms_norm`, not rounded at the end: FP64 of FP64, else FP32 by the operations of `quant.rmsnorm_fp32`.

    What kernels can give bit for bit, and a row the same whatever others there are.
    """
    if x.dtype != torch.float64:
        return rmsnorm_fp32(x, weight, eps)
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.double()


def wide(x: Tensor) -> Tensor:
    """x in the type that references compute in: FP64 if x is FP64, else FP32."""
    return x if x.dtype == torch.float64 else x.float()
