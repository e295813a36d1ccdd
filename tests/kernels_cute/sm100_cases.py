"""Configs of gemm_nvfp4_sm100, sets of them that cover SPACE, and problems that are awkward for a config."""

import itertools
from collections.abc import Iterable, Iterator

import torch

from fp4suite import layouts, testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm100 as kernel
from kernels_cute.gemm_nvfp4_sm100 import Config

POISON = 0x7F  # NaN in E4M3
OUTS = ("bf16", "fp32", "nvfp4")
LARGE_K = 64 * 256  # enough of K for every split


def every() -> list[Config]:
    """All points of SPACE that run some problem."""
    points = (
        Config(**dict(zip(kernel.SPACE, values, strict=True))) for values in itertools.product(*kernel.SPACE.values())
    )
    few = GemmProblem(m=1, n=64, k=LARGE_K, act="nvfp4")
    return [c for c in points if kernel.supports(few, c) is None]


def covering() -> list[Config]:
    """All pairs of a tile (tile_n, mma_ctas) and a cluster (cluster_m, cluster_n), and, over them, all values of every
    knob and all pairs of a tile with swap_ab and with split_k.
    """
    return list(_cover(every(), _pairs))


def by_value() -> list[Config]:
    """All values of every knob, each tile_n with each epilogue, pairs of CTAs with and without them."""
    return list(_cover(every(), _values))


def _pairs(c: Config) -> set[object]:
    tile = (c.tile_n, c.mma_ctas)
    return {
        (*tile, "cluster", c.cluster_m, c.cluster_n),
        (*tile, "swap", c.swap_ab),
        (*tile, "split", c.split_k),
        ("swap", c.swap_ab, "split", c.split_k),
        ("band", c.band, c.cluster_m),
    }


def _values(c: Config) -> set[object]:
    values = {(name, getattr(c, name)) for name in kernel.SPACE}
    return values | {
        (c.tile_n, c.swap_ab),
        (c.mma_ctas, c.swap_ab, c.split_k > 1),
        ("pair", c.tile_n == 256, c.mma_ctas),
    }


def _cover(configs: Iterable[Config], features) -> Iterator[Config]:
    """Greedily: the config that shows most of what none has shown yet, the first of equals."""
    left = {c: features(c) for c in configs}
    while left:
        best = max(left, key=lambda c: len(left[c]))
        shown = left.pop(best)
        if not shown:
            return
        yield best
        left = {c: f - shown for c, f in left.items()}


def awkward(config: Config, number: int) -> GemmProblem:
    """Ragged along m, n and k, with more tiles than `clusters` of them; outputs and segments by turns."""
    c, out, segments = config, OUTS[number % 3], 1 + number % 2 * 2
    rows, columns = 128 * c.cluster_m, c.tile_n * c.cluster_n
    unit = 64 if out == "nvfp4" else 8
    if c.swap_ab:
        m = c.tile_n - 3 if c.tile_n < 32 else columns + 7
        n = rows + 9 * unit
    else:
        m, n = rows + 37, columns + 3 * unit
    return GemmProblem(m=m, n=n, k=64 * (4 * max(2, c.split_k) + 1), act="nvfp4", out=out, segments=segments)


def case(problem: GemmProblem, seed: int) -> testing.Case:
    """`testing.case` with all padding of block scales poisoned."""
    made = testing.case(problem, "cpu", seed)
    for operand in made.laid_out(kernel)[:2]:
        poison_padding(operand)
    return made


def poison_padding(t: NVFP4Tensor) -> None:
    m, k = t.shape
    inside = layouts.to_blocked_128x4(torch.ones(m, k // 16, dtype=torch.uint8))
    t.sf.view(torch.uint8)[inside == 0] = POISON
