"""Compressed KV entries: a softmax-weighted pool of token rows, one weight a channel, then norm, RoPE and insert.

    e_i[c] = Σ_τ softmax_τ(gate_τ[c] + ape[τ mod r, c]) · kv_τ[c]

Entry i of ratio r is emitted by token t = r (i + 1) − 1 and pools tokens r i .. t. Where windows overlap (width of kv
twice the head: ratio 4), the r tokens before them join, with the first half of their channels, while tokens r i .. t
give the second half; before the first window there is nothing to join. RoPE turns the entry at position r i.

All FP32, each operation rounded on its own, in an order that a kernel can keep. With d = (largest score) - score of a
channel, its rows have the weights w = exp(-d) by `quant.exp_neg`, 0 where d > 87, and the entry is Σ w·kv / Σ w. Row j
of a pool is added to the sum j mod 8, rows rising; then the eight in a tree of adjacent pairs. A channel with a score
that is NaN or +infinity, or with none above -infinity, is NaN.

Every token's (kv, gate + ape) also goes into an FP32 ring per sequence, at position mod ring. A boundary gathers its
rows from this step's tokens or from the ring, so that prefill, chunked prefill and decode are one algorithm; positions
below 0 are never read, so that a ring needs no clearing when its slot is reused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import IndexCache, PagedCache
from .cache import write_rows
from .e2m1 import pair_sum
from .norm import rms_norm_wide
from .quant import exp_neg
from .rope import rotate

LANES = 8  # sums that the rows of a pool are added to in turn
MOST_BELOW = 87.0  # a score this much below the largest still has a weight that is a normal number


@dataclass(frozen=True, slots=True)
class CompressorStep:
    """What one compressor has of a step for itself: arguments of `compress_kv` by their names there."""

    kv: Tensor
    gate: Tensor
    ape: Tensor
    weight: Tensor
    state: Tensor
    cache: PagedCache | IndexCache
    hadamard: bool = False


def compress_kv(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    weight: Tensor,
    table: Tensor,
    eps: float,
    state: Tensor,
    cache: PagedCache | IndexCache,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    state_slots: Tensor,
    slots: Tensor,
    ratio: int,
    hadamard: bool = False,
) -> None:
    """Take in a step's rows and store the entries that they complete; changes state and cache.data.

    kv, gate:     FP32 [tokens, width], width = head_dim, or 2 head_dim where windows overlap
    ape:          FP32 [ratio, width], added to the gate by position mod ratio
    weight:       [head_dim] of the RMSNorm; table: FP32 [positions, rope_dim]
    state:        FP32 [state slots, ring, 2, width] (kv, then gate + ape), ring >= pooled tokens
    positions:    int32 [tokens], consecutive within a sequence
    sequence_ids: int32 [tokens], row of cu_seqlens and state_slots, -1 for a padding token
    cu_seqlens:   int32 [sequences + 1], first token of each sequence in this step
    state_slots:  int32 [sequences]
    slots:        int32 [tokens], cache slot of the entry that token t completes; read where (position + 1) % ratio == 0
    hadamard:     turn the entry by the orthonormal Hadamard matrix before it is stored (indexer keys)
    """
    check_compressor(kv, state, cache, ratio)
    width = kv.shape[1]
    ring, overlaps = state.shape[1], width // cache.head_dim
    pooled = overlaps * ratio  # tokens in a full pool
    positions, sequences = positions.long(), sequence_ids.long()
    rows = torch.stack((kv.float(), gate.float() + ape[positions % ratio]), dim=1)  # [tokens, 2, width]

    real = sequences >= 0
    emits = torch.nonzero(real & ((positions + 1) % ratio == 0) & (slots >= 0)).squeeze(1)
    back = torch.arange(pooled - 1, -1, -1, device=kv.device)
    token, at = emits[:, None] - back, positions[emits, None] - back  # [emits, pooled]
    in_step = token >= cu_seqlens[sequences[emits], None]
    old = state[state_slots.long()[sequences[emits], None], at % ring]
    pool = torch.where(in_step[:, :, None, None], rows[token.clamp(min=0)], old)  # [emits, pooled, 2, width]
    if overlaps == 2:
        first, second = pool.chunk(2, dim=-1)
        pool = torch.cat((first[:, :ratio], second[:, ratio:]), dim=1)  # [emits, pooled, 2, head_dim]
    exists = (at >= 0)[:, :, None]
    score = torch.where(exists, pool[:, :, 1], float("-inf"))
    below = score.amax(1, keepdim=True) - score
    share = torch.where(exists, torch.where(below > MOST_BELOW, 0.0, exp_neg(below)), 0.0)
    total = _sum_of_rows(share * torch.where(exists, pool[:, :, 0], 0.0))  # [emits, head_dim]
    entry = total / _sum_of_rows(share)

    entry = rotate(rms_norm_wide(entry, weight, eps), positions[emits] + 1 - ratio, table)
    write_rows(cache, slots[emits], hadamard_transform(entry) if hadamard else entry)

    # the ring is written last: a step longer than it would overwrite rows that the gather above still needs
    token = torch.nonzero(real).squeeze(1)
    left = cu_seqlens.long()[sequences[token] + 1] - token
    kept = token[left <= ring]
    state[state_slots.long()[sequences[kept]], positions[kept] % ring] = rows[kept]


def compress_kv_pair(
    entries: CompressorStep,
    keys: CompressorStep,
    table: Tensor,
    eps: float,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    state_slots: Tensor,
    slots: Tensor,
    ratio: int,
) -> None:
    """`compress_kv` of a layer's entries and of its indexer's keys, whose rows lie at the same slots of two caches.

    Both have the same tokens, ratio and overlap; head_dim and format of each are those of its cache.
    """
    for step in (entries, keys):
        compress_kv(
            step.kv,
            step.gate,
            step.ape,
            step.weight,
            table,
            eps,
            step.state,
            step.cache,
            positions=positions,
            sequence_ids=sequence_ids,
            cu_seqlens=cu_seqlens,
            state_slots=state_slots,
            slots=slots,
            ratio=ratio,
            hadamard=step.hadamard,
        )


def check_compressor(kv: Tensor, state: Tensor, cache: PagedCache | IndexCache, ratio: int) -> None:
    """Raises ValueError for a width that is not one or two heads, or for a ring that does not hold a pool of it."""
    width, overlaps = kv.shape[1], kv.shape[1] // cache.head_dim
    if width != overlaps * cache.head_dim or overlaps not in (1, 2):
        raise ValueError(f"kv must be [tokens, {cache.head_dim}] or twice as wide, got {list(kv.shape)}")
    if state.shape[2:] != (2, width) or state.shape[1] < overlaps * ratio:
        raise ValueError(f"state must be [slots, at least {overlaps * ratio}, 2, {width}], got {list(state.shape)}")


def _sum_of_rows(x: Tensor) -> Tensor:
    """[n, rows, channels] -> [n, channels] in the order of the module's docstring."""
    lanes = x.new_zeros(len(x), LANES, x.shape[2])
    for part in torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % LANES)).split(LANES, dim=1):
        lanes = lanes + part
    return pair_sum(lanes.transpose(1, 2))


def check_hadamard(n: int) -> None:
    if n & (n - 1):
        raise ValueError(f"a Hadamard transform needs a power of two, got {n}")


def hadamard_transform(x: Tensor) -> Tensor:
    """x [..., n] times the Sylvester matrix of order n (a power of two) over sqrt(n), which is its own inverse."""
    n = x.shape[-1]
    check_hadamard(n)
    y, step = x, 1
    while step < n:
        a, b = y.unflatten(-1, (-1, 2, step)).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        step *= 2
    return y * n**-0.5
