"""Manifold-constrained hyper-connections (mHC): n residual streams, mixed by a doubly stochastic matrix per token.

    m    = (fn · vec(h)) · rsqrt(mean(vec(h)²) + norm_eps)         over all n d elements, streams first
    pre  = sigmoid(m[:n] · scale₀ + base) + eps                    y = Σ_i pre_i h_i
    post = 2 sigmoid(m[n:2n] · scale₁ + base)
    C    = softmax over columns of m[2n:] · scale₂ + base, + eps; then Sinkhorn: columns first, columns last
    h'_k = post_k · y_out + Σ_j C_jk h_j                           the first index of C is summed: Cᵀ applied

Everything is FP32; results are rounded to the dtype of h once.
"""

import torch
from torch import Tensor

from .norm import rms_norm, wide


def hyper_connection_pre(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    norm_eps: float,
    eps: float,
    iterations: int = 20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Input of a site and the coefficients that close it.

    h: [tokens, n, d]; fn: FP32 [n (n + 2), n d]; base: FP32 [n (n + 2)]; scale: FP32 [3] (pre, post, comb)
    weight: [d] of the RMSNorm that every site begins with, or None to leave y as it is

    Returns y [tokens, d] in h's dtype (rounded before the norm, and after it), post FP32 [tokens, n] and
    comb FP32 [tokens, n, n]. `iterations` counts column normalisations.
    """
    n = h.shape[1]
    m = _mix(h, fn, norm_eps)  # [tokens, n (n + 2)]
    scale, base = scale.to(m.dtype), base.to(m.dtype)
    pre = torch.sigmoid(m[:, :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = (m[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
    comb = torch.softmax(comb, dim=-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    y = torch.einsum("tn,tnd->td", pre, wide(h)).to(h.dtype)
    if weight is not None:
        y = rms_norm(y, weight, norm_eps)
    return y, post, comb


def hyper_connection_post(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Streams after a site, [tokens, n, d]: its output y [tokens, d] and the streams h [tokens, n, d] that entered."""
    x, y = wide(h), wide(y)
    post, comb = post.to(x.dtype), comb.to(x.dtype)
    mixed = comb[:, 0, :, None] * x[:, 0, None]  # [tokens, n, d]
    for j in range(1, h.shape[1]):  # one order of the sum, and each operation rounded alone: the same bytes anywhere
        mixed = mixed + comb[:, j, :, None] * x[:, j, None]
    return (post[:, :, None] * y[:, None, :] + mixed).to(h.dtype)


def hyper_connection_post_pre(
    y: Tensor,
    h: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    norm_eps: float,
    eps: float,
    iterations: int = 20,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hyper_connection_post` of one site, and `hyper_connection_pre` of the next on the streams that it leaves.

    Returns these streams [tokens, n, d], and the next site's y, post and comb.
    """
    h = hyper_connection_post(y, h, post, comb)
    return h, *hyper_connection_pre(h, fn, base, scale, weight, norm_eps=norm_eps, eps=eps, iterations=iterations)


def hyper_connection_head(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor | None, *, norm_eps: float, eps: float
) -> Tensor:
    """Fold the streams for the language-model head: h [tokens, n, d] -> [tokens, d], then RMSNorm with weight [d].

    fn: FP32 [n, n d], base: FP32 [n], scale: FP32 [1]. No Sinkhorn here; rounded before the norm, and after it.
    """
    m = _mix(h, fn, norm_eps)
    pre = torch.sigmoid(m * scale.to(m.dtype) + base.to(m.dtype)) + eps
    y = torch.einsum("tn,tnd->td", pre, wide(h)).to(h.dtype)
    return y if weight is None else rms_norm(y, weight, norm_eps)


def _mix(h: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    u = wide(h).flatten(1)  # [tokens, n d]
    return (u @ fn.to(u.dtype).T) * torch.rsqrt(u.square().mean(-1, keepdim=True) + norm_eps)
