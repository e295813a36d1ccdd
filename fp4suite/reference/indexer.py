"""Lightning indexer: which compressed entries a query attends to.

    score(t, i) = Σ_h w(t, h) · relu(q(t, h) · k(i)) · scale        for i < (position + 1) // ratio, else −inf

The weight may be negative and stands outside the ReLU. Exact ties are real (zeros): the lower entry wins.
"""

import torch
from torch import Tensor

from ..formats import IndexCache, IndexFormat, index_layout
from .cache import decode_rows, encode_rows, read_rows
from .compressor import hadamard_transform
from .norm import wide
from .rope import qnorm_rope, rotate
from .sample import falling

_TOKENS = 64  # queries scored at a time, to bound the [tokens, heads, entries] intermediate


def index_query(
    q: Tensor, positions: Tensor, table: Tensor, *, format: IndexFormat = "bf16", hadamard: bool = False
) -> Tensor:
    """RoPE, optionally Hadamard, then the rounding of an index format: q [tokens, heads, head_dim] -> the same shape.

    The values returned are those that keys of the same `format` would be stored as; every one but fp32's fits BF16.
    """
    turned = _turned(q, positions, table, hadamard)
    if format == "fp32":
        return turned.to(q.dtype)
    like = _like(format, q.shape[2])
    return decode_rows(like, encode_rows(like, turned.float().flatten(0, 1))).view(q.shape).to(q.dtype)


def index_query_fp8(
    q: Tensor, weights: Tensor, positions: Tensor, table: Tensor, *, hadamard: bool = False
) -> tuple[Tensor, Tensor]:
    """`index_query` in fp8, as codes float8_e4m3fn [tokens, heads, head_dim], and weights FP32 [tokens, heads] times
    the power of two that each head's codes stand under.
    """
    turned = _turned(q, positions, table, hadamard)
    codes, scales = encode_rows(_like("fp8", q.shape[2]), turned.float().flatten(0, 1))
    scaled = weights.float() * scales.view(torch.float32).view(weights.shape)
    return codes.view(q.shape).view(torch.float8_e4m3fn), scaled


def csa_queries(
    q: Tensor,
    index_q: Tensor,
    positions: Tensor,
    table: Tensor,
    eps: float,
    *,
    format: IndexFormat = "bf16",
    hadamard: bool = False,
) -> tuple[Tensor, Tensor]:
    """`qnorm_rope` of q [tokens, heads, head_dim], and `index_query` of index_q [tokens, index heads, index dim]."""
    return qnorm_rope(q, positions, table, eps), index_query(
        index_q, positions, table, format=format, hadamard=hadamard
    )


def csa_queries_fp8(
    q: Tensor,
    index_q: Tensor,
    weights: Tensor,
    positions: Tensor,
    table: Tensor,
    eps: float,
    *,
    hadamard: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`qnorm_rope` of q, and `index_query_fp8` of index_q and weights [tokens, index heads]."""
    codes, scaled = index_query_fp8(index_q, weights, positions, table, hadamard=hadamard)
    return qnorm_rope(q, positions, table, eps), codes, scaled


def _turned(q: Tensor, positions: Tensor, table: Tensor, hadamard: bool) -> Tensor:
    turned = rotate(wide(q), positions, table)
    return hadamard_transform(turned) if hadamard else turned


def _like(format: IndexFormat, head_dim: int) -> IndexCache:
    """A cache without rows, whose format rounds queries."""
    data = torch.empty(0, index_layout(format, 1, head_dim).page_bytes, dtype=torch.uint8)
    return IndexCache(data, format, 1, head_dim)


def index_logits(
    q: Tensor,
    weights: Tensor,
    cache: IndexCache,
    block_table: Tensor,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    scale: float,
) -> Tensor:
    """FP32 [tokens, pages · page_size] scores of every entry that the block table can hold, −inf where not visible.

    q: [tokens, heads, head_dim]; weights: [tokens, heads]; block_table: int32 [sequences, pages] of the sequences in
    this step, page j of a row holding entries from j · page_size on (-1: not there yet); positions, sequence_ids: int32
    [tokens], -1 for a padding token, whose row is −inf throughout.
    """
    entries = block_table.shape[1] * cache.page_size
    at = torch.arange(entries, device=q.device)
    page = block_table.long()[:, at // cache.page_size]  # [sequences, entries]
    slots = torch.where(page >= 0, page * cache.page_size + at % cache.page_size, -1)
    out = torch.full((len(q), entries), float("-inf"), dtype=torch.float32, device=q.device)
    for sequence in range(len(block_table)):
        keys = read_rows(cache, slots[sequence])  # [entries, head_dim]
        for tokens in torch.nonzero(sequence_ids == sequence).squeeze(1).split(_TOKENS):
            dots = torch.einsum("thd,ed->the", q[tokens].float(), keys).relu()
            out[tokens] = torch.einsum("the,th->te", dots, weights[tokens].float()) * scale
    visible = at < ((positions.long() + 1) // ratio)[:, None]
    return out.masked_fill(~visible | (sequence_ids < 0)[:, None], float("-inf"))


def index_topk(
    logits: Tensor,
    block_table: Tensor,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    topk: int,
    page_size: int,
) -> Tensor:
    """Cache slots int32 [tokens, min(topk, entries)] of the highest visible scores, in rising entry order, -1 behind.

    NaN of either sign is above infinity; among equals the lower entry comes first. logits: FP32 [tokens, entries] of
    `index_logits` (not read where an entry is not visible); the rest as there.
    """
    entries = torch.arange(logits.shape[1], device=logits.device)
    visible = (entries < ((positions.long() + 1) // ratio)[:, None]) & (sequence_ids >= 0)[:, None]
    _, ranked = falling(logits.masked_fill(~visible, float("-inf")))
    chosen = ranked[:, :topk]
    # an entry that is not visible sorts behind all that are: by a number no entry has
    chosen = torch.where(visible.gather(1, chosen), chosen, len(entries)).sort(-1).values
    return entry_slots(torch.where(chosen < len(entries), chosen, -1), block_table, sequence_ids, page_size)


def entry_slots(entries: Tensor, block_table: Tensor, sequence_ids: Tensor, page_size: int) -> Tensor:
    """Cache slots int32 [tokens, rows] of row numbers [tokens, rows] of each token's own sequence; -1 stays -1."""
    rows = entries.long().clamp(min=0)
    page = block_table.long()[sequence_ids.long().clamp(min=0)[:, None], rows // page_size]
    there = (entries >= 0) & (page >= 0) & (sequence_ids >= 0)[:, None]
    return torch.where(there, page * page_size + rows % page_size, -1).int()
