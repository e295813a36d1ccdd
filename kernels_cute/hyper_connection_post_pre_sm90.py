"""The end of one site and the input of the next on Hopper, of streams that are read once.

Memory bound: reads 10 bytes a column (streams and output, BF16), writes the new streams (8) and the next input (2); see
`hyper_connection_sm90`. The streams are `hyper_connection_post`'s to the bit.
"""

from torch import Tensor

from . import hyper_connection_sm90
from .hyper_connection_sm90 import (
    FN_ERROR as FN_ERROR,
    SPACE as SPACE,
    Config as Config,
    build as build,
    build_key as build_key,
    default as default,
    precompile as precompile,
    supports as supports,
    warm as warm,
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
