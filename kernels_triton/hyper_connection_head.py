"""Four residual streams folded into one for the language-model head: as `hyper_connection_pre`, without a Sinkhorn.

Memory bound: reads the streams (8 bytes a column in BF16) and writes 2 bytes a column.
"""

import torch
from torch import Tensor

from fp4suite.problem import HyperConnectionHeadProblem

from . import host, hyper_connection
from .hyper_connection import (
    INVARIANT as INVARIANT,
    SPACE as SPACE,
    Config as Config,
    alike as alike,
    arithmetic as arithmetic,
    build as build,
    build_key as build_key,
    default as default,
    in_arithmetic as in_arithmetic,
    supports as supports,
)

OUTPUTS = hyper_connection.STREAMS


def launch(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm_eps: float,
    eps: float,
    out: Tensor,
    config: Config,
) -> None:
    """h [tokens, 4, d] of any strides whose last is 1 -> out [tokens, d]."""
    hyper_connection.launch(h, fn, base, scale, weight, norm_eps, eps, 0, (out,), config)


def warm(problem: HyperConnectionHeadProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    dtype, k, n = host.DTYPES[problem.x], problem.k, problem.n
    h, fn = torch.zeros(1, n, k, dtype=dtype, device="cuda"), torch.zeros(OUTPUTS, n * k, device="cuda")
    base, scale, weight, out = fn.new_zeros(OUTPUTS), fn.new_zeros(1), h.new_zeros(k), h.new_empty(1, k)
    for norm in (weight, None):
        launch(h, fn, base, scale, norm, 1.0, 1.0, out, config)
