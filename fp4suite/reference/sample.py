"""Next token from logits: greedy, or nucleus (top-p) sampling with the caller's uniform numbers."""

import torch
from torch import Tensor

from .norm import wide


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """int64 [rows] from logits [rows, vocab]; temperature, top_p and uniform (in [0, 1)) are FP32 [rows].

    temperature 0 is greedy (the lowest id among equals). Otherwise tokens are ranked by probability, the smallest set
    that reaches top_p is kept, and `uniform` picks from it by inverse transform: the same numbers give the same tokens.
    """
    logits = wide(logits)
    ranked, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    heat = temperature.clamp(min=torch.finfo(torch.float32).tiny).to(ranked.dtype)
    probability = torch.softmax((ranked - ranked[:, :1]) / heat[:, None], dim=-1)
    before = probability.cumsum(-1) - probability  # mass ranked above each token
    kept = torch.where(before < top_p[:, None], probability, 0.0)
    kept[:, 0] = probability[:, 0]  # top_p = 0 keeps the first
    mass = kept.cumsum(-1)
    pick = torch.searchsorted(mass, uniform.to(mass.dtype)[:, None] * mass[:, -1:], right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding must not step past the kept set
    drawn = ids.gather(-1, torch.minimum(pick, last)).squeeze(-1)
    return torch.where(temperature == 0, ids[:, 0], drawn)
