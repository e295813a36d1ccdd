"""Power-of-two scales (E8M0, byte = exponent + 127): the least exponent that fits, and 2^exponent, both exact."""

import torch
from torch import Tensor

FP32_MAX = torch.finfo(torch.float32).max


def ceil_log2(amax: Tensor, top: float) -> Tensor:
    """int32 ceil(log2(amax / top)) of FP32 amax >= 0, no less than -126; nothing is rounded on the way.

    Infinity and NaN count as FP32's largest number.
    """
    amax = torch.where(amax <= FP32_MAX, amax, FP32_MAX)
    fraction, exponent = torch.frexp(amax)  # amax = fraction * 2^exponent, fraction in [0.5, 1) or 0
    top_fraction, top_exponent = torch.frexp(torch.tensor(top, device=amax.device))
    least = exponent - top_exponent + (fraction > top_fraction)
    return torch.where(amax == 0, -126, least.clamp(min=-126)).int()


def pow2(exponent: Tensor) -> Tensor:
    """FP32 2^exponent of integers in -127 .. 127; built from bits, as PyTorch's pow and ldexp need not be exact."""
    normal = ((exponent.int() + 127) << 23).view(torch.float32)
    return torch.where(exponent == -127, 2.0**-127, normal)
