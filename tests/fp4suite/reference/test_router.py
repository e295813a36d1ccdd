"""Expert choice against plain Python: bias only selects, ties, tails that underflow, the table of token ids."""

import math

import pytest
import torch

from fp4suite.reference import route
from fp4suite.reference.router import affinity


def score(x: float) -> float:
    return math.sqrt(max(x, 0.0) + math.log1p(math.exp(-abs(x))))


@pytest.mark.parametrize("biased", [True, False])
def test_choice_and_weights(biased: bool) -> None:
    g = torch.Generator().manual_seed(0)
    logits, bias = 4 * torch.randn(50, 16, generator=g), 0.5 * torch.randn(16, generator=g)
    ids, weights = route(logits, topk=4, scale=2.5, bias=bias if biased else None)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    for t in range(50):
        s = [score(float(x)) for x in logits[t]]
        best = sorted(range(16), key=lambda e: -(s[e] + (float(bias[e]) if biased else 0)))[:4]
        assert ids[t].tolist() == best
        total = sum(s[e] for e in best)
        torch.testing.assert_close(weights[t], torch.tensor([2.5 * s[e] / total for e in best]), rtol=1e-5, atol=0)


def test_the_lower_expert_wins_a_tie() -> None:
    ids, _ = route(torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 0.0]] * 2), topk=4, scale=1.0)
    assert ids.tolist() == [[1, 2, 4, 0]] * 2
    # the bias makes 0 and 5 equal: sqrt(softplus(x)) is the same for the same logit
    ids, _ = route(torch.zeros(1, 6), topk=3, scale=1.0, bias=torch.tensor([0.5, 0.0, 0.0, 0.0, 0.0, 0.5]))
    assert ids.tolist() == [[0, 5, 1]]


def test_tails() -> None:
    """softplus(-60) is e^-60, not log(1) = 0; where even FP32 gives 0 / 0, the epsilon makes it 0."""
    logits = torch.tensor([[-60.0, -62.0, -80.0], [-300.0, -301.0, -302.0], [200.0, 100.0, -300.0]])
    _, weights = route(logits, topk=2, scale=1.0)
    ratio = math.exp(-1)  # sqrt(e^-62 / e^-60)
    torch.testing.assert_close(weights[0], torch.tensor([1 / (1 + ratio), ratio / (1 + ratio)]), rtol=1e-5, atol=0)
    assert weights[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights[2], torch.tensor([2**0.5, 1.0]) / (2**0.5 + 1))


def test_the_score_is_within_single_precision_of_fp64() -> None:
    """Where routers' logits lie; towards -87, where e^x is nearly gone, exp loses a few units more."""
    for low, high, bound in ((-20.0, 60.0, 5e-7), (-86.9, -20.0, 3e-6)):
        x = torch.linspace(low, high, 200_001)
        exact = torch.log1p(torch.exp(x.double())).sqrt()
        assert ((affinity(x) / exact - 1).abs() < bound).all()
    ends = affinity(torch.tensor([-87.0, -1e30, -math.inf, math.inf, math.nan, 1e30]))
    assert ends[:4].tolist() == [0.0, 0.0, 0.0, math.inf]
    assert ends[4].isnan()
    assert ends[5] == torch.tensor(1e30).double().sqrt().float()


def test_weights_sum_in_a_tree_of_pairs() -> None:
    """(a + b) + (c + 0), not (a + b + c): what kernels do, to the bit."""
    logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(6)) * 5
    ids, weights = route(logits, topk=3, scale=1.5)
    s = affinity(logits).gather(1, ids.long())
    total = (s[:, 0] + s[:, 1]) + s[:, 2]
    assert torch.equal(weights, s / (total + 1e-20)[:, None] * 1.5)


def test_table_chooses_scores_weigh() -> None:
    g = torch.Generator().manual_seed(1)
    logits, table = torch.randn(6, 8, generator=g), torch.randint(8, (20, 3), generator=g).int()
    tokens = torch.tensor([0, 19, 7, 7, 3, 11])
    ids, weights = route(logits, topk=3, scale=1.5, token_ids=tokens, table=table)
    assert torch.equal(ids, table[tokens])
    for t in range(6):
        s = [score(float(logits[t, e])) for e in ids[t].tolist()]
        torch.testing.assert_close(weights[t], torch.tensor([1.5 * x / sum(s) for x in s]), rtol=1e-5, atol=0)


def test_fp64() -> None:
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).double()
    _, weights = route(logits, topk=7, scale=1.0)
    want = sorted((score(float(x)) for x in logits[0]), reverse=True)
    torch.testing.assert_close(
        weights[0], torch.tensor([x / sum(want) for x in want], dtype=torch.float64), rtol=1e-13, atol=0
    )


def test_wrong_arguments() -> None:
    logits, table = torch.zeros(2, 4), torch.zeros(9, 2).int()
    with pytest.raises(ValueError, match="go together"):
        route(logits, topk=2, scale=1.0, table=table)
    with pytest.raises(ValueError, match="not by both"):
        route(logits, topk=2, scale=1.0, table=table, token_ids=torch.zeros(2).int(), bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"table must be \[vocab, 3\], got \[9, 2\]"):
        route(logits, topk=3, scale=1.0, table=table, token_ids=torch.zeros(2).int())
