"""The end of one site and the input of the next on Hopper, of streams that are read once.

Memory bound: reads 10 bytes a column (streams and output, BF16), writes the new streams (8) and the next input (2); see
`hyper_connection_sm90`. The streams are `hyper_connection_post`'s to the bit.
"""

import torch
from torch import Tensor

from fp4suite.problem import HyperConnectionPostPreProblem

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
    y: Tensor,
    h: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm_eps: float,
    eps: float,
    iterations: int,
    out: tuple[Tensor, Tensor, Tensor, Tensor],
    config: Config,
) -> None:
    """The operands of `hyper_connection_post`, then those of `hyper_connection_pre` -> out: the results of both."""
    numbers, site = (norm_eps, eps, iterations), (y, post, comb, out[0])
    hyper_connection_sm90.launch(h, fn, base, scale, weight, *numbers, out[1:], config, site)


def warm(problem: HyperConnectionPostPreProblem, config: Config) -> None:
    """Compile for `problem` and, where there is a GPU, launch once: later launches may be captured in a graph."""
    precompile(problem, config)
    if torch.cuda.is_available():
        k, n = problem.k, problem.n
        h, fn = torch.zeros(1, n, k, dtype=torch.bfloat16, device="cuda"), torch.zeros(OUTPUTS, n * k, device="cuda")
        post, comb = fn.new_zeros(1, n), fn.new_zeros(1, n, n)
        base, scale, weight = fn.new_zeros(OUTPUTS), fn.new_zeros(3), h.new_zeros(k)
        out = torch.empty_like(h), h.new_empty(1, k), torch.empty_like(post), torch.empty_like(comb)
        for norm in (weight, None):
            launch(h[:, 0], h, post, comb, fn, base, scale, norm, 1.0, 1.0, 1, out, config)
