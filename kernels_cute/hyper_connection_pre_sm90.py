"""Coefficients of a site, and its input folded from four streams and normed, on Hopper.

Memory bound: reads 8 bytes a column of BF16 streams, once, writes 2 (see `hyper_connection_sm90`).
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
