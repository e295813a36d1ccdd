"""Routed experts: slots sorted by expert, gate|up GEMM, clamped SwiGLU, down GEMM, weighted sum per token.

    out[t] = Σ_j weight[t, j] · W2_e (silu(min(g, limit)) · clamp(u, ±limit))      (g | u) = W13_e x[t], e = ids[t, j]

SwiGLU acts on each slot after every scale; the routing weight is applied once, in FP32, after the down projection.
A slot is one (token, choice) pair; id -1 (an expert held elsewhere) contributes nothing.
"""

import torch
from torch import Tensor

from ..formats import NVFP4Tensor
from .gemm import grouped_gemm_nvfp4
from .norm import wide
from .quant import quantize_nvfp4, swiglu_fp32


def permute(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Slots in expert order.

    topk_ids: int32 [tokens, topk]. Returns order int32 [tokens · topk], the flat slot (token · topk + choice) at each
    sorted place, stable, slots of id -1 last; and offsets int32 [experts + 1], the first place of each expert and the
    end of the last. Raises IndexError for an id of `experts` or more.
    """
    ids = topk_ids.flatten().long()
    if ids.numel() and ids.max() >= experts:
        raise IndexError(f"topk_ids must be less than experts={experts}, got {int(ids.max())}")
    key = torch.where(ids < 0, experts, ids)
    order = torch.sort(key, stable=True).indices
    counts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device).scatter_add_(0, key, torch.ones_like(key))
    offsets = torch.cat((counts.new_zeros(1), counts[:experts].cumsum(0)))
    return order.int(), offsets.int()


def combine(
    y: Tensor, order: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, shared: Tensor | None = None
) -> Tensor:
    """Weighted sum over a token's slots, in the order of its choices, plus the shared expert's output if given.

    y: [tokens · topk, hidden] in the order of `permute`; topk_weights: FP32 [tokens, topk]; shared: [tokens, hidden].
    Returns [tokens, hidden] in y's dtype, summed in FP32 from 0 and rounded once: each product on its own, added choice
    by choice, then shared. Rows of y and weights for id -1 are not used.
    """
    slots = torch.empty_like(y)
    slots[order.long()] = y
    slots = slots.view(*topk_ids.shape, y.shape[1])
    out = wide(y).new_zeros(len(topk_ids), y.shape[1])
    for j in range(topk_ids.shape[1]):
        product = wide(slots[:, j]) * topk_weights[:, j, None].to(out.dtype)
        out += torch.where(topk_ids[:, j, None] >= 0, product, 0.0)
    return (out if shared is None else out + wide(shared)).to(y.dtype)


def swiglu(x: Tensor, limit: float, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """silu(min(g, limit)) · clamp(u, −limit, limit) of [..., 2 k], gate columns first -> [..., k] in out_dtype.

    FP64 of FP64, else FP32 by the operations of `quant.swiglu_fp32`, rounded once. NaN in g or u stays NaN, and g = −∞
    becomes it; +∞ counts as limit, and −∞ in u as −limit.
    """
    if x.dtype != torch.float64:
        return swiglu_fp32(x, limit).to(out_dtype)
    g, u = x.chunk(2, dim=-1)
    g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (g * torch.sigmoid(g) * u).to(out_dtype)


def moe_nvfp4(
    x: Tensor | NVFP4Tensor,
    w13: NVFP4Tensor,
    w2: NVFP4Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    limit: float = 10.0,
) -> Tensor:
    """x [tokens, hidden] -> [tokens, hidden], without the shared expert.

    w13: [experts, 2 I, hidden], gate rows first, alpha [], [experts] or [experts, 2] (gate, up)
    w2: [experts, hidden, I], alpha [] or [experts]
    topk_ids: int32 [tokens, topk], -1 for none; topk_weights: FP32 [tokens, topk]

    A float x is W4A16: SwiGLU's output is rounded to x's dtype, and so is the result. An NVFP4Tensor x is W4A4:
    SwiGLU's output is quantised again ("absmax", one alpha from its own maximum) and the result is BF16.
    """
    order, offsets = permute(topk_ids, w13.shape[0])
    token = order.long() // topk_ids.shape[1]
    halves = (w13.shape[1] // 2,) * 2 if w13.alpha.ndim == 2 else None
    live = (torch.arange(len(order), device=order.device) < offsets[-1])[:, None]
    if isinstance(x, NVFP4Tensor):
        x = x.with_order("rows").with_sf_layout("linear")
        rows: Tensor | NVFP4Tensor = NVFP4Tensor(x.data[token], x.sf[token], x.alpha)
        dtype = torch.bfloat16
    else:
        rows, dtype = x[token], x.dtype
    gate_up = grouped_gemm_nvfp4(rows, w13, offsets, segments=halves, out_dtype=torch.float32)  # [slots, 2 I]
    act = torch.where(live, swiglu(gate_up, limit, dtype), 0.0)
    down = quantize_nvfp4(act) if isinstance(x, NVFP4Tensor) else act
    y = grouped_gemm_nvfp4(down, w2, offsets, out_dtype=torch.float32)
    return combine(y, order, topk_ids, topk_weights).to(dtype)


def moe(x: Tensor, w13: Tensor, w2: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, limit: float = 10.0) -> Tensor:
    """`moe_nvfp4` for experts in plain tensors, w13 [experts, 2 I, hidden] and w2 [experts, hidden, I]."""
    order, offsets = permute(topk_ids, len(w13))
    token = order.long() // topk_ids.shape[1]
    bounds = offsets.tolist()
    y = wide(x).new_zeros(len(order), x.shape[1])
    for e in range(len(w13)):
        lo, hi = bounds[e], bounds[e + 1]
        if hi > lo:
            act = swiglu(wide(x[token[lo:hi]]) @ wide(w13[e]).T, limit, x.dtype)
            y[lo:hi] = wide(act) @ wide(w2[e]).T
    return combine(y, order, topk_ids, topk_weights).to(x.dtype)
