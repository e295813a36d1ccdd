"""The end of one site and the input of the next, without a pass over the streams for the next one's product.

Memory bound: reads 10 bytes a column (streams and output, BF16), writes the new streams (8) and the next input (2). A
product (see `hyper_connection`) makes and writes the new streams and multiplies them while it has them; a fold, close
behind it, reads them again from L2. The streams are `hyper_connection_post`'s to the bit.
"""

import torch
from torch import Tensor

from fp4suite.problem import HyperConnectionPostPreProblem

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
    streams, *folded = out
    numbers, site = (norm_eps, eps, iterations), (y, post, comb, streams)
    hyper_connection.launch(h, fn, base, scale, weight, *numbers, tuple(folded), config, site)


def warm(problem: HyperConnectionPostPreProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    dtype, k, n = host.DTYPES[problem.x], problem.k, problem.n
    h, fn = torch.zeros(1, n, k, dtype=dtype, device="cuda"), torch.zeros(OUTPUTS, n * k, device="cuda")
    post, comb = fn.new_zeros(1, n), fn.new_zeros(1, n, n)
    base, scale, weight = fn.new_zeros(OUTPUTS), fn.new_zeros(3), h.new_zeros(k)
    out = torch.empty_like(h), h.new_empty(1, k), torch.empty_like(post), torch.empty_like(comb)
    for norm in (weight, None):
        launch(h[:, 0], h, post, comb, fn, base, scale, norm, 1.0, 1.0, 1, out, config)
