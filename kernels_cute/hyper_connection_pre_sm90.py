"""Coefficients of a site, and its input folded from four streams and normed, on Hopper.

Memory bound: reads 8 bytes a column of BF16 streams, once, writes 2 (see `hyper_connection_sm90`).
"""

import torch
from torch import Tensor

from fp4suite.problem import HyperConnectionPreProblem

from . import hyper_connection_sm90
from .hyper_connection_sm90 import (
    OUTPUTS,
    SPACE as SPACE,
    Config as Config,
    build as build,
    build_key as build_key,
    precompile as precompile,
    supports as supports,
)


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
    hyper_connection_sm90.launch(h, fn, base, scale, weight, norm_eps, eps, iterations, out, config)


def warm(problem: HyperConnectionPreProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    precompile(problem, config)
    if torch.cuda.is_available():
        h = torch.zeros(1, problem.n, problem.k, dtype=torch.bfloat16, device="cuda")
        fn = torch.zeros(OUTPUTS, problem.n * problem.k, device="cuda")
        base, scale, weight = fn.new_zeros(OUTPUTS), fn.new_zeros(3), h.new_zeros(problem.k)
        out = h.new_empty(1, problem.k), fn.new_empty(1, problem.n), fn.new_empty(1, problem.n, problem.n)
        for norm in (weight, None):
            launch(h, fn, base, scale, norm, 1.0, 1.0, 1, out, config)
