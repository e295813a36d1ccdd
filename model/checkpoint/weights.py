"""Random weights that behave: activations keep their size through any number of layers, and nothing is left constant.

Each parameter is drawn by itself from (seed, its name), with NumPy's counter-based generator: the same everywhere,
whatever the family, the shards or the order.
"""

import hashlib
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from ..config import ModelConfig
from .inventory import Param

HEAD_GAIN = 4.0  # the logits' standard deviation: flat logits would make every comparison of tokens a coin toss
_TABLE_ROWS = 8192  # rows of the token-id table drawn at once


def random_weight(param: Param, config: ModelConfig, seed: int) -> Tensor:
    """The parameter's values: float32 of its shape, or int64 (the hash layers' expert table)."""
    digest = hashlib.sha256(f"{seed}:{param.name}".encode()).digest()
    rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
    if param.init == "table":
        return _expert_table(rng, param.shape, config.n_routed_experts)
    width = param.shape[-1]
    if param.init == "norm":
        return torch.from_numpy(rng.uniform(0.8, 1.2, param.shape).astype(np.float32))
    if param.init == "hc_scale":
        return torch.from_numpy(rng.uniform(0.3, 0.7, param.shape).astype(np.float32))
    x = torch.from_numpy(rng.standard_normal(param.shape, dtype=np.float32))
    if param.init in ("linear", "router", "head"):
        # rows of different size, so that block scales differ and a misplaced one shows
        rows = torch.from_numpy(rng.uniform(0.5, 1.5, (param.shape[0], 1)).astype(np.float32))
        x *= rows * ((HEAD_GAIN if param.init == "head" else 1.0) / sqrt(width))
    elif param.init == "hc_fn":
        x *= 1.0 / sqrt(width)
    elif param.init in ("bias", "ape", "hc_base"):
        x *= {"bias": 0.05, "ape": 0.5, "hc_base": 0.5}[param.init]
    return x


def _expert_table(rng: np.random.Generator, shape: tuple[int, ...], experts: int) -> Tensor:
    """[vocab, topk], each row of different experts."""
    vocab, topk = shape
    table = torch.empty(vocab, topk, dtype=torch.int64)
    for start in range(0, vocab, _TABLE_ROWS):
        keys = rng.random((min(_TABLE_ROWS, vocab - start), experts), dtype=np.float32)
        table[start : start + len(keys)] = torch.from_numpy(keys.argsort(axis=1, kind="stable")[:, :topk].copy())
    return table
