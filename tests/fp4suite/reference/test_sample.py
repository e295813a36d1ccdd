"""Sampling: the set that is kept, how often each token of it comes, and the ends of every parameter."""

from fractions import Fraction

import pytest
import torch

from fp4suite.reference import sample
from fp4suite.reference.quant import exp_neg


def draw(logits: torch.Tensor, temperature: float, top_p: float, uniform: torch.Tensor) -> torch.Tensor:
    rows = len(uniform)
    ones = torch.ones(rows)
    return sample(logits.expand(rows, -1), temperature * ones, top_p * ones, uniform)


LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.2, 2.0, -4.0])
EVERY = (torch.arange(4000) + 0.5) / 4000


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_frequencies(temperature: float) -> None:
    """Evenly spread uniform numbers give each token in proportion to its probability."""
    got = torch.bincount(draw(LOGITS, temperature, 1.0, EVERY), minlength=6) / 4000
    torch.testing.assert_close(got, torch.softmax(LOGITS / temperature, 0), rtol=0, atol=5e-4)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(1e-9, [1]), (0.3, [1]), (0.5, [1, 4]), (0.8, [1, 3, 4]), (0.95, [0, 1, 3, 4])]
)
def test_nucleus(top_p: float, kept: list[int]) -> None:
    """Probabilities 0.36 (1 and 4), 0.16, 0.08, 0.018, 0.0009: the smallest set that reaches top_p, renormalised."""
    got = torch.bincount(draw(LOGITS, 1.0, top_p, EVERY), minlength=6) / 4000
    assert got.nonzero().flatten().tolist() == kept
    p = torch.softmax(LOGITS, 0)[kept]
    torch.testing.assert_close(got[kept], p / p.sum(), rtol=0, atol=5e-4)


def test_greedy_takes_the_lowest_of_equals() -> None:
    assert (draw(LOGITS, 0.0, 1.0, EVERY) == 1).all()


def test_rows_have_their_own_parameters() -> None:
    logits = LOGITS.expand(4, -1)
    got = sample(
        logits,
        torch.tensor([0.0, 1.0, 1.0, 1e-30]),
        torch.tensor([1.0, 1e-9, 1.0, 1.0]),
        torch.tensor([0.99, 0.99, 0.9999, 0.1]),
    )
    assert got.tolist() == [1, 1, 5, 1]
    assert got.dtype == torch.int64


def test_the_largest_uniform_stays_in_the_set() -> None:
    """1 - 2^-24 over many tokens: rounding of the running sum must not pick one of probability zero."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5000, generator=g)
    logits[:, 2500:] = float("-inf")
    got = sample(logits, torch.ones(3), torch.ones(3), torch.full((3,), 1 - 2**-24))
    assert (got < 2500).all()
    top = sample(logits, torch.ones(3), torch.full((3,), 0.5), torch.full((3,), 1 - 2**-24))
    ranked = logits.sort(-1, descending=True).indices
    for row in range(3):
        p = torch.softmax(logits[row].double(), 0)[ranked[row]]
        size = int((p.cumsum(0) - p < 0.5).sum())
        assert int(top[row]) in ranked[row, :size].tolist()


def by_hand(logits: torch.Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """Python integers and fractions: rank, masses of 2^40, the nucleus, the draw."""
    ranked = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    z = (logits.max() - logits[ranked]) / torch.tensor(temperature)
    masses = [int(Fraction(float(e)) * 2**40) for e in exp_neg(z)]
    total, kept, reached = sum(masses), 0, 0
    for mass in masses:
        if reached < Fraction(float(torch.tensor(top_p))) * total or not kept:
            kept += mass
        reached += mass
    target, reached = Fraction(uniform) * kept, 0
    for token, mass in zip(ranked, masses, strict=True):
        reached += mass
        if reached > target:
            return token
    raise AssertionError("uniform is below 1")


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_exact_arithmetic_draws_the_same_tokens(temperature: float) -> None:
    g = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(40, 200, generator=g)
    logits[::2] = logits[::2].round()  # ties
    uniform = torch.rand(40, generator=g)
    for top_p in (0.2, 0.9, 1.0):
        got = sample(logits, temperature * torch.ones(40), top_p * torch.ones(40), uniform)
        assert got.tolist() == [by_hand(x, temperature, top_p, float(u)) for x, u in zip(logits, uniform, strict=True)]


def test_what_is_not_finite() -> None:
    """The first by rank and its equals alone: NaN before infinity; a row of -infinity is even."""
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor([[0, inf, 5, inf], [inf, nan, 0, nan], [-inf, 1, -inf, 1], [-inf] * 4])
    for uniform, want in ((0.0, [1, 1, 1, 0]), (0.6, [3, 3, 3, 2])):
        assert sample(rows, torch.ones(4), torch.ones(4), torch.full((4,), uniform)).tolist() == want
    assert sample(rows, torch.zeros(4), torch.ones(4), torch.zeros(4)).tolist() == [1, 1, 1, 0]


def test_a_token_of_less_than_the_least_mass_is_never_drawn() -> None:
    logits = torch.tensor([[0.0, -27.0, -28.0, -90.0]])
    last = 1 - 2.0**-24
    assert draw(logits[0], 1.0, 1.0, torch.tensor([last])).item() == 0
    assert draw(logits[0].double(), 1.0, 1.0, torch.tensor([last])).item() == 0
    assert draw(torch.tensor([0.0, -16.0, -90.0]), 1.0, 1.0, torch.tensor([last])).item() == 1
