"""Next token from logits: greedy, or nucleus (top-p) sampling with the caller's uniform numbers.

A token's mass is an integer, so that sums are exact in any order and every backend draws the same token:

    mass = floor(2^40 exp(-(top - logit) / temperature))

exp in FP32 is `exp_neg`. Less than 2^-40 of the most probable token's mass counts as none.
"""

import torch
from torch import Tensor

from .norm import wide
from .quant import exp_neg

MASS_BITS = 40  # of the most probable token; 2^22 tokens of it fit into int64
UNDERFLOW = 87.0


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """int64 [rows] from logits [rows, vocab]; temperature, top_p and uniform (in [0, 1)) are FP32 [rows].

    temperature 0 is greedy (the lowest id among equals). Otherwise tokens are ranked by logit, the smallest set whose
    mass reaches top_p of all is kept, and `uniform` picks from it by inverse transform: the same numbers give the same
    tokens. Among equal logits the lower id ranks first, above all others NaN; if the first is NaN or infinite, only
    its equals can be drawn.
    """
    ranked, ids = falling(wide(logits))
    mass = _mass(ranked, temperature)
    reached = mass.cumsum(-1)
    limit = _share(top_p, reached[:, -1:]).ceil().long().clamp(min=1)  # top_p = 0 keeps the first
    kept = torch.where(reached - mass < limit, reached, 0).amax(-1, keepdim=True)
    target = torch.minimum(_share(uniform, kept).floor().long(), kept - 1)
    pick = (reached <= target).sum(-1, keepdim=True)
    return torch.where(temperature == 0, ids[:, 0], ids.gather(-1, pick).squeeze(-1))


def falling(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row sorted, and where its numbers were: NaN first, among equals the one that came first."""
    # torch.sort on a GPU has a NaN whose sign is set elsewhere
    return torch.sort(torch.where(x.isnan(), torch.nan, x), dim=-1, descending=True, stable=True)


def _mass(ranked: Tensor, temperature: Tensor) -> Tensor:
    """int64 [rows, vocab] of logits that fall along a row."""
    top = ranked[:, :1]
    heat = temperature.clamp(min=torch.finfo(torch.float32).tiny).to(ranked.dtype)[:, None]
    first = (ranked == top) | ranked.isnan()
    z = torch.where(first, 0.0, (top - ranked) / heat)
    e = torch.exp(-z) if z.dtype == torch.float64 else torch.where(z < UNDERFLOW, exp_neg(z), 0.0)
    return (e.nan_to_num(0.0) * 2.0**MASS_BITS).long()


def _share(part: Tensor, mass: Tensor) -> Tensor:
    """part [rows] of mass int64 [rows, 1], in FP64."""
    return part.double()[:, None].clamp(0.0, 1.0) * mass.double()
