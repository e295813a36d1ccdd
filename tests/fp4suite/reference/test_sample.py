"""Sampling: the set that is kept, how often each token of it comes, and the ends of every parameter."""

import pytest
import torch

from fp4suite.reference import sample


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
