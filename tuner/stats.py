"""When a candidate counts as faster: paired samples, a signed-rank test and a minimum margin.

A round times every contender once, so that clocks and temperature drift for all of them alike; what is compared is the
ratio within a round. A candidate replaces the default only if the Wilcoxon signed-rank test rejects "it is not faster
by `margin`" at `alpha` divided by the number of contenders (Bonferroni), on rounds that had no part in choosing them.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

MARGIN = 0.01  # a gain of less than 1 % is not worth a config of its own
ALPHA = 0.01  # chance that a default loses its place to something that is no faster, per problem

Key = TypeVar("Key", bound=Hashable)
Samples = NDArray[np.float64]  # [rounds], microseconds


@dataclass(frozen=True, slots=True)
class Summary:
    """Microseconds."""

    median_us: float
    p20_us: float
    p80_us: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """ratio: median over the rounds of candidate / incumbent; p: of the one-sided test against the margin."""

    ratio: float
    p: float
    faster: bool


def summary(samples: Samples) -> Summary:
    """Median with the 20th and 80th percentile."""
    p20, median, p80 = np.percentile(np.asarray(samples, float), [20, 50, 80])
    return Summary(float(median), float(p20), float(p80))


def compare(candidate: Samples, incumbent: Samples, *, margin: float = MARGIN, alpha: float = ALPHA) -> Verdict:
    """Test whether candidate < (1 - margin) * incumbent, from samples paired by round.

    Raises ValueError for samples that do not pair, are too few to ever reach alpha, or are not positive and finite.
    """
    a, b = np.asarray(candidate, float), np.asarray(incumbent, float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"samples must be paired by round, got {a.shape} and {b.shape}")
    needed = rounds_for(alpha)
    if len(a) < needed:
        raise ValueError(f"alpha={alpha} needs at least {needed} rounds, got {len(a)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and (a > 0).all() and (b > 0).all()):
        raise ValueError("samples must be positive and finite")
    p = _signed_rank_p(np.log(a / b) - np.log1p(-margin))
    return Verdict(ratio=float(np.median(a / b)), p=p, faster=p < alpha)


def rounds_for(alpha: float) -> int:
    """The fewest rounds whose unanimous verdict reaches alpha: 2**-rounds < alpha."""
    return int(np.floor(-np.log2(alpha))) + 1


def pick(
    samples: Mapping[Key, Samples], incumbent: Key, *, margin: float = MARGIN, alpha: float = ALPHA
) -> tuple[Key, dict[Key, Verdict]]:
    """The winner among contenders timed in the same rounds, and each contender's verdict against the incumbent.

    The incumbent stays unless someone beats it by the margin. Of those who do, the first in `samples` wins that the one
    with the smallest ratio does not itself beat by the margin: noise does not choose among equals.
    """
    others = [k for k in samples if k != incumbent]
    verdicts = {
        k: compare(samples[k], samples[incumbent], margin=margin, alpha=alpha / max(1, len(others))) for k in others
    }
    faster = [k for k in others if verdicts[k].faster]
    if not faster:
        return incumbent, verdicts
    best = min(faster, key=lambda k: verdicts[k].ratio)

    def as_good(k: Key) -> bool:
        return not compare(samples[best], samples[k], margin=margin, alpha=alpha).faster

    return next(k for k in faster if k == best or as_good(k)), verdicts


def _signed_rank_p(d: Samples) -> float:
    """P of differences at least as negative as these if their distribution is symmetric about zero."""
    from scipy.stats import wilcoxon  # a second to import, and only tuning needs it

    return float(wilcoxon(d, alternative="less", zero_method="zsplit").pvalue)
