"""Interleaved rotary embedding on the last dims of a head: pair j is (x[2 j], x[2 j + 1]) of the rotated part.

    a' = a cos φ − b sin φ        b' = b cos φ + a sin φ        φ = position · frequency_j

Inverse: sin φ negated. Frequencies are θ^(−2j/rope); under YaRN (Peng et al., 2309.00071) the slow ones are divided
by `factor`. Cosine and sine keep amplitude 1: the model has no YaRN mscale. Angles are FP32 products of an FP32
position and an FP32 frequency, as every public implementation has them, so that long contexts see the same ones.
"""

import math

import torch
from torch import Tensor

from .norm import rms_norm_wide, wide


def rope_frequencies(
    rope_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    original_max_position: int = 0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Tensor:
    """FP32 [rope_dim / 2] radians a position, on the CPU. factor 1 is plain RoPE; above it, YaRN."""
    freq = 1.0 / theta ** (torch.arange(0, rope_dim, 2, dtype=torch.float32) / rope_dim)
    if factor == 1.0:
        return freq

    def turns_at(dims: float) -> float:
        """The (fractional) pair that makes `dims` full turns over the original context."""
        return rope_dim * math.log(original_max_position / (dims * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_at(beta_fast)), 0)
    high = min(math.ceil(turns_at(beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float32) - low) / (max(high - low, 0.001))
    ramp = ramp.clamp(0, 1)
    return freq * (1 - ramp) + freq / factor * ramp


def rope_table(frequencies: Tensor, positions: int) -> Tensor:
    """FP32 [positions, rope_dim]: cosines of the rope_dim / 2 pairs, then their sines."""
    at = torch.arange(positions, dtype=torch.float32, device=frequencies.device)
    angle = at[:, None] * frequencies.float()[None, :]
    return torch.cat((angle.cos(), angle.sin()), dim=-1)


def rotate(x: Tensor, positions: Tensor, table: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate the last table.shape[1] dims of x [tokens, ..., d] by positions int [tokens]; x's dtype, FP32 inside."""
    rope = table.shape[-1]
    angles = table[positions.long()].to(wide(x).dtype)  # [tokens, rope]
    cos, sin = angles.view(len(x), *(1,) * (x.ndim - 2), rope).chunk(2, dim=-1)
    if inverse:
        sin = -sin
    keep, turn = x.split((x.shape[-1] - rope, rope), dim=-1)
    a, b = wide(turn).unflatten(-1, (rope // 2, 2)).unbind(-1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    return torch.cat((keep, turned.to(x.dtype)), dim=-1)


def qnorm_rope(q: Tensor, positions: Tensor, table: Tensor, eps: float) -> Tensor:
    """Per-head RMSNorm without weight, then RoPE: q [tokens, heads, head_dim] -> the same shape and dtype.

    positions: int32 [tokens], table: FP32 [positions, rope_dim] of `rope_table`. Rounded once, after the rotation.
    """
    return rotate(rms_norm_wide(q, None, eps), positions, table).to(q.dtype)


def rope_inverse(o: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Undo the rotation that values carry (K = V) at the query's position: o [tokens, heads, head_dim] -> the same."""
    return rotate(o, positions, table, inverse=True)


def rope_inverse_(o: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """`rope_inverse` in place; returns o."""
    last = o[..., o.shape[-1] - table.shape[1] :]
    last.copy_(rope_inverse(last, positions, table))
    return o
