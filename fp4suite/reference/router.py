"""Expert choice: affinity s = sqrt(softplus(logit)), a bias that only selects, weights renormalised over the chosen.

    w_j = s_j / (Σ s + 1e-20) · scale

The first layers choose by a table of the token id instead; their weights still come from s.

Scores that nearly tie decide which experts run, so every backend has to find the same ones: in FP32 s is made of
operations that are rounded alone, in a fixed order, and the sum is a tree of adjacent pairs over the choices, padded
with zeros to a power of two.

    softplus(x) = max(x, 0) + log1p(e), e = exp(-|x|) by `exp_neg`, 0 from |x| = 87 on
    log1p(e) = e (c0 + c1 e + ...)
"""

import torch
from torch import Tensor

from .e2m1 import pair_sum
from .norm import wide
from .quant import exp_neg, sqrt_rn

UNDERFLOW = 87.0
# log1p(e) / e on 0 < e <= 1, within 2e-7 relative: our own least-maximum fit
LOG1P_COEFFICIENTS = (
    0.9999998211860657,
    -0.4999740421772003,
    0.33275479078292847,
    -0.2449546456336975,
    0.1774524301290512,
    -0.10768172889947891,
    0.04408963769674301,
    -0.008539209142327309,
)


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
    score = affinity(wide(logits))
    if table is not None and token_ids is not None:
        if table.shape[1] != topk:
            raise ValueError(f"table must be [vocab, {topk}], got {list(table.shape)}")
        if token_ids.numel() and not 0 <= token_ids.min() <= token_ids.max() < len(table):
            raise IndexError(f"token_ids must be in 0 .. {len(table) - 1}, as table has rows")
        ids = table[token_ids.long()].long()
    else:
        ranked = score if bias is None else score + bias.to(score.dtype)
        ids = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :topk]
    weights = score.gather(-1, ids)
    padded = torch.nn.functional.pad(weights, (0, (1 << (topk - 1).bit_length()) - topk))
    return ids.int(), weights / (pair_sum(padded)[:, None] + 1e-20) * scale


def affinity(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)) in FP32 by the operations above, or in FP64."""
    magnitude = logits.abs()
    # log1p form: softplus of a very negative logit keeps its tail instead of rounding to log(1)
    if logits.dtype == torch.float64:
        return (logits.clamp(min=0) + torch.log1p(torch.exp(-magnitude))).sqrt()
    e = torch.where(magnitude < UNDERFLOW, exp_neg(magnitude), 0.0)
    p = torch.full_like(e, LOG1P_COEFFICIENTS[-1])
    for c in LOG1P_COEFFICIENTS[-2::-1]:
        p = p * e + c
    return sqrt_rn(logits.clamp(min=0) + p * e)
