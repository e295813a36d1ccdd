"""The input of a site and its coefficients, from four residual streams.

Memory bound: reads the streams (8 bytes a column in BF16) and writes 2 bytes a column. A product with fn and a fold
(see `hyper_connection`): each reads the streams, the second, close behind the first, from L2.
"""

import torch
from torch import Tensor

from fp4suite.problem import HyperConnectionPreProblem

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

OUTPUTS = hyper_connection.STREAMS * (hyper_connection.STREAMS + 2)


def launch(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm_eps: float,
    eps: float,
    iterations: int,
    out: tuple[Tensor, Tensor, Tensor],
    config: Config,
) -> None:
    """h [tokens, 4, d] of any strides whose last is 1 -> out: y [tokens, d], post [tokens, 4], comb [tokens, 4, 4]."""
    hyper_connection.launch(h, fn, base, scale, weight, norm_eps, eps, iterations, out, config)


def warm(problem: HyperConnectionPreProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    dtype, k, n = host.DTYPES[problem.x], problem.k, problem.n
    h, fn = torch.zeros(1, n, k, dtype=dtype, device="cuda"), torch.zeros(OUTPUTS, n * k, device="cuda")
    base, scale, weight = fn.new_zeros(OUTPUTS), fn.new_zeros(3), h.new_zeros(k)
    out = h.new_empty(1, k), fn.new_empty(1, n), fn.new_empty(1, n, n)
    for norm in (weight, None):
        launch(h, fn, base, scale, norm, 1.0, 1.0, 1, out, config)
