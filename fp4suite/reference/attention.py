"""Attention over gathered cache rows with one KV head, K = V, and a sink per head.

    l(h, s) = q(h) · k(s) · scale        o(h) = Σ_s e^l(h, s) k(s) / (Σ_s e^l(h, s) + e^sink(h))

The sink is one more logit without a value. Rows come from any number of paged caches (the window, the compressed
entries); a token that is present in both counts twice, as the model wants.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import NVFP4Tensor, PagedCache, SfLayout
from ..problem import Rule
from .cache import read_rows
from .norm import wide
from .quant import global_scale, quantize_nvfp4
from .rope import rope_inverse

_ROWS = 1 << 15  # cache rows decoded at a time, to bound the gathered copy


def sparse_attention(
    q: Tensor, caches: Sequence[PagedCache], indices: Sequence[Tensor], sink: Tensor, scale: float
) -> Tensor:
    """q [tokens, heads, head_dim] -> [tokens, heads, head_dim] in q's dtype.

    caches and indices go in pairs: indices[i] is int32 [tokens, rows_i], slots of caches[i], -1 for no row; a slot
    named twice counts twice. sink: FP32 [heads]. A token without any row gives zeros.
    """
    if len(caches) != len(indices) or not caches:
        raise ValueError(f"caches and indices go in pairs, got {len(caches)} and {len(indices)}")
    out = torch.empty_like(q)
    rows = sum(index.shape[1] for index in indices)
    for tokens in torch.arange(len(q), device=q.device).split(max(1, _ROWS // max(1, rows))):
        picked = [index[tokens] for index in indices]
        kv = torch.cat([read_rows(c, i) for c, i in zip(caches, picked, strict=True)], dim=1).to(wide(q).dtype)
        present = torch.cat([i >= 0 for i in picked], dim=1)  # [tokens, rows]
        out[tokens] = _attend(wide(q[tokens]), kv, present, sink, scale).to(q.dtype)
    return out


def rope_inverse_quantize(
    o: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    groups: int,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
) -> NVFP4Tensor:
    """`rope_inverse`, then NVFP4 for the grouped output projection.

    o: [tokens, heads, head_dim] -> [groups, tokens, heads / groups · head_dim], one alpha for all of it. The rotation's
    result is rounded to o's dtype before it is quantised.
    """
    turned = rope_inverse(o, positions, table).flatten(1).unflatten(1, (groups, -1))  # [tokens, groups, k]
    turned = turned.transpose(0, 1).contiguous()
    alpha = global_scale(turned.flatten(0, 1)) if alpha is None else alpha
    return quantize_nvfp4(turned, alpha=alpha, sf_layout=sf_layout, rule=rule)


def _attend(q: Tensor, kv: Tensor, present: Tensor, sink: Tensor, scale: float) -> Tensor:
    logits = torch.einsum("thd,trd->thr", q, kv) * scale
    logits = logits.masked_fill(~present[:, None, :], float("-inf"))
    sinks = sink.to(q.dtype)[None, :, None].expand(len(q), -1, 1)
    # softmax takes its maximum over the sink too, so that no exponential overflows
    share = torch.softmax(torch.cat((logits, sinks), dim=-1), dim=-1)[..., :-1]
    return torch.einsum("thr,trd->thd", share, kv)
