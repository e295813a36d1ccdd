"""The embedding: a row of a table for each token, in as many residual streams as there are."""

import torch
from torch import Tensor


def embed(token_ids: Tensor, weight: Tensor, *, streams: int = 1, out_dtype: torch.dtype | None = None) -> Tensor:
    """Rows of weight [vocab, hidden] by token_ids [tokens], each `streams` times -> [tokens, streams, hidden].

    In out_dtype, or weight's for None: bit for bit where they are the same, else rounded once. A token whose id is not
    in 0 .. vocab - 1 gets NaN.
    """
    known = (token_ids >= 0) & (token_ids < len(weight))
    rows = weight[torch.where(known, token_ids, 0)]
    rows = torch.where(known[:, None], rows, torch.nan).to(out_dtype or weight.dtype)
    return rows[:, None].expand(-1, streams, -1).contiguous()
