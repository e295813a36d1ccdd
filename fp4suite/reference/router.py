"""Expert choice: affinity s = sqrt(softplus(logit)), a bias that only selects, weights renormalised over the chosen.

    w_j = s_j / (Σ s + 1e-20) · scale

The first layers choose by a table of the token id instead; their weights still come from s.
"""

import torch
from torch import Tensor

from .norm import wide


def route(
    logits: Tensor,
    *,
    topk: int,
    scale: float,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts and weights of each token.

    logits:    FP32 [tokens, experts], x · W_gᵀ accumulated in FP32
    bias:      FP32 [experts], added for the choice only; with it, or with neither it nor a table, the top-k are taken
    token_ids: int [tokens] and table: int [vocab, topk] choose by token instead

    Returns ids int32 [tokens, topk] (by falling score, the lower expert first among equals; in the table's order where
    a table chooses) and weights FP32 [tokens, topk].
    """
    if (token_ids is None) != (table is None):
        raise ValueError("token_ids and table go together: one was given without the other")
    if table is not None and bias is not None:
        raise ValueError("experts are chosen by bias or by table, not by both")
    logits = wide(logits)
    # log1p form: softplus of a very negative logit keeps its tail instead of rounding to log(1)
    score = (logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))).sqrt()
    if table is not None and token_ids is not None:
        if table.shape[1] != topk:
            raise ValueError(f"table must be [vocab, {topk}], got {list(table.shape)}")
        ids = table[token_ids.long()].long()
    else:
        ranked = score if bias is None else score + bias.to(score.dtype)
        ids = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = score.gather(-1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * scale
    return ids.int(), weights
