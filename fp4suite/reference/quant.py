"""Quantise and dequantise NVFP4, and the two fusions that end in a quantiser; `e2m1` defines the block arithmetic.

alpha = amax / 2688 (= 6 * 448) where it is not given: one number for each matrix of x [..., m, k], or for each of its
`segments`, which are runs of rows m that sum to m (gate | up of a fused weight, say).

The norm and the activation are FP32, each operation rounded on its own, and their result is quantised without being
rounded to x's type in between. Sums have a fixed shape, so that a kernel can give the same bytes:

    rmsnorm   y = (x * (1 / sqrt(sum(x^2) / k + eps))) * weight
              sum: pad to a power of two with zeros; while longer than 1024, add the second half to the first; then a
              tree of adjacent pairs
    swiglu    g = min(gate, limit), u = max(-limit, min(up, limit)); y = (g / (1 + exp(-g))) * u
              exp is `exp_neg`; NaN stays NaN
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import layouts
from ..formats import BLOCK, E2M1_MAX, E4M3_MAX, NVFP4Tensor, SfLayout
from ..problem import Rule
from .e2m1 import constant, decode_packed, pack, pair_sum, quantize_blocks

SUM_CHUNK = 1024  # columns under one tree of adjacent pairs in the sum of rmsnorm

LOG2E = 1.4426950216293335
# 2^f = 1 + f (c0 + c1 f + ...) on |f| <= 1/2, within 1.2e-7 relative: our own least-maximum fit
EXP2_COEFFICIENTS = (
    0.6931470036506653,
    0.24022240936756134,
    0.055507343262434006,
    0.00967156607657671,
    0.0013264658628031611,
)
EXP2_MIN, EXP2_MAX = -126.0, 128.0  # 2^-126 adds nothing to 1; 2^128 comes out as infinity
ROUND = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to an integer


def quantize_nvfp4(
    x: Tensor,
    *,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
    segments: Sequence[int] | None = None,
) -> NVFP4Tensor:
    """x [..., m, k] in bf16, fp16 or fp32 -> NVFP4.

    alpha: float32 [], or one for each matrix [...], or for each segment of each [..., segments]. None computes
    amax / 2688, of shape [...] or [..., segments]. m may be 0. Raises TypeError for another dtype of x or alpha,
    ValueError for a k that is not a multiple of 16 or an alpha or segments that do not fit.
    """
    x = _fp32(x, "x")
    if alpha is None:
        alpha = global_scale(x, segments)
    codes, sf = quantize_blocks(x, row_alpha(alpha, x.shape, segments), rule)
    if sf_layout == "blocked_128x4":
        sf = layouts.to_blocked_128x4(sf)
    return NVFP4Tensor(pack(codes), sf, alpha, sf_layout)


def dequant_nvfp4(
    t: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16, *, segments: Sequence[int] | None = None
) -> Tensor:
    """NVFP4 [..., m, k] -> dtype [..., m, k].

    float64 is exact; else FP32 first (code * scale is exact, alpha brings one rounding), then a cast. Raises ValueError
    where alpha has an axis of segments and `segments` do not say how many rows each has.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (scaled_codes(t).to(wide) * row_alpha(t.alpha, t.shape, segments).to(wide)).to(dtype)


def scaled_codes(t: NVFP4Tensor) -> Tensor:
    """Codes times block scales without alpha: float32 [..., m, k], exact."""
    t = t.with_order("rows")
    sf = t.sf if t.sf_layout == "linear" else layouts.from_blocked_128x4(t.sf, t.shape[-2], t.shape[-1] // BLOCK)
    return (decode_packed(t.data).unflatten(-1, (sf.shape[-1], BLOCK)) * sf.float()[..., None]).flatten(-2)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
) -> NVFP4Tensor:
    """`rmsnorm_fp32` of x [..., m, k] with weight [k], then `quantize_nvfp4`."""
    return quantize_nvfp4(rmsnorm_fp32(x, weight, eps), alpha=alpha, sf_layout=sf_layout, rule=rule)


def swiglu_quantize(
    x: Tensor,
    *,
    limit: float = 10.0,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
) -> NVFP4Tensor:
    """`swiglu_fp32` of x [..., m, 2 k] (gate columns first), then `quantize_nvfp4`: [..., m, k]."""
    return quantize_nvfp4(swiglu_fp32(x, limit), alpha=alpha, sf_layout=sf_layout, rule=rule)


def global_scale(x: Tensor, segments: Sequence[int] | None = None) -> Tensor:
    """amax / 2688 of x [..., m, k]: float32 [...], or [..., segments]. 0 for no elements; NaN if x holds one."""
    parts = (x,) if segments is None else _split(x, segments)
    lead = x.shape[:-2]
    amax = [p.abs().amax((-2, -1)) if p.numel() else x.new_zeros(lead) for p in parts]
    out = amax[0] if segments is None else torch.stack(amax, dim=-1)
    return out.float() / constant(E2M1_MAX * E4M3_MAX, x.device)


def row_alpha(alpha: Tensor, shape: Sequence[int], segments: Sequence[int] | None = None) -> Tensor:
    """alpha [], [...] or [..., segments] of a [..., m, k] array -> [..., m or 1, 1], to be broadcast over its rows."""
    lead, m = tuple(shape[:-2]), shape[-2]
    if alpha.dtype != torch.float32:
        raise TypeError(f"alpha must be float32, got {alpha.dtype}")
    if segments is not None and tuple(alpha.shape) == (*lead, len(segments)):
        counts = torch.tensor(list(segments), device=alpha.device)
        check_runs(m, segments)
        return alpha.repeat_interleave(counts, dim=-1, output_size=m)[..., None]
    if alpha.ndim == 0 or (segments is None and tuple(alpha.shape) == lead):
        return alpha[..., None, None]
    want = [*lead] if segments is None else [*lead, len(segments)]
    raise ValueError(f"alpha of {list(shape)}, segments {segments}, must be [] or {want}, got {list(alpha.shape)}")


def rmsnorm_fp32(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm of x [..., k] with weight [k], or without one, as the module's docstring defines it: float32 [..., k]."""
    x = _fp32(x, "x")
    k = x.shape[-1]
    if weight is not None and list(weight.shape) != [k]:
        raise ValueError(f"weight must be [{k}], got {list(weight.shape)}")
    square = x * x
    padded = max(1, 1 << (k - 1).bit_length())
    square = torch.nn.functional.pad(square, (0, padded - k))
    while square.shape[-1] > SUM_CHUNK:
        half = square.shape[-1] // 2
        square = square[..., :half] + square[..., half:]
    mean = pair_sum(square) / constant(float(k), x.device)
    r = constant(1.0, x.device) / sqrt_rn(mean + constant(eps, x.device))
    y = x * r[..., None]
    return y if weight is None else y * _fp32(weight, "weight")


def swiglu_fp32(x: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU of x [..., 2 k], gate columns first, as the module's docstring defines it: float32 [..., k].

    Raises ValueError for an odd number of columns or a limit that is not positive.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2 k], gate columns first, got {list(x.shape)}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    gate, up = _fp32(x, "x").chunk(2, dim=-1)
    bound = constant(float(limit), x.device)
    g = torch.where(gate > bound, bound, gate)
    u = torch.where(up > bound, bound, torch.where(up < -bound, -bound, up))
    return (g / (1.0 + exp_neg(g))) * u


def sqrt_rn(x: Tensor) -> Tensor:
    """FP32 square root, rounded to nearest: by FP64, as torch.sqrt of FP32 is a unit off in places on a CPU (MKL)."""
    return torch.sqrt(x.double()).float()


def exp_neg(g: Tensor) -> Tensor:
    """exp(-g) of float32, infinite below about -88.4; relative error within 2.5e-7 + 8e-8 |g|.

    2^t with t = -g log2(e), from +, -, * and bit shifts in a fixed order.
    """
    t = (g * -LOG2E).clamp(EXP2_MIN, EXP2_MAX)
    shifted = t + ROUND
    f = t - (shifted - ROUND)
    p = torch.full_like(f, EXP2_COEFFICIENTS[-1])
    for c in EXP2_COEFFICIENTS[-2::-1]:
        p = p * f + c
    # the low bits of `shifted` are the integer part; moved to the exponent's place they make its power of two
    power = ((shifted.view(torch.int32) << 23) + 0x3F800000).view(torch.float32)
    return (p * f + 1.0) * power


def _fp32(x: Tensor, name: str) -> Tensor:
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"{name} must be bfloat16, float16 or float32, got {x.dtype}")
    return x.float()


def _split(x: Tensor, segments: Sequence[int]) -> tuple[Tensor, ...]:
    check_runs(x.shape[-2], segments)
    return x.split(list(segments), dim=-2)


def check_runs(m: int, segments: Sequence[int]) -> None:
    """Raises ValueError unless `segments` are positive runs of rows that sum to m."""
    if sum(segments) != m or min(segments, default=0) <= 0:
        raise ValueError(f"segments {list(segments)} must be positive runs of rows that sum to m={m}")
