"""Cases: their reference is computed once for all the kernels and configs that are compared with it."""

import pytest

from fp4suite import reference, testing
from fp4suite.problem import GemmProblem, IndexLogitsProblem


def index_logits(case):
    q, weights, cache, table, positions, sequence_ids, ratio, scale = case.operands
    return reference.index_logits(
        q, weights, cache, table, positions=positions, sequence_ids=sequence_ids, ratio=ratio, scale=scale
    )


@pytest.mark.parametrize(
    ("problem", "compute", "function"),
    [
        (GemmProblem(m=3, n=64, k=128), lambda case: reference.gemm_nvfp4(*case.operands[:2]), "_product"),
        (IndexLogitsProblem(m=5, entries=64, format="fp8", sequences=1), index_logits, "index_logits_within"),
    ],
    ids=lambda x: getattr(x, "op", ""),
)
def test_what_is_expected_is_computed_once_and_compared_each_time(problem, compute, function, monkeypatch):
    calls, real = [], getattr(testing, function)
    monkeypatch.setattr(testing, function, lambda *operands: calls.append(0) or real(*operands))
    case = testing.case(problem)
    case.out.copy_(compute(case))
    case.check()
    first = len(calls)
    case.check()
    assert len(calls) == first > 0
    case.out[2, 7] += 1e-2 * case.out.abs().max()
    with pytest.raises(AssertionError, match=r"out of bound; first at \[2, 7\]"):
        case.check()
    case.poison()
    with pytest.raises(AssertionError):
        case.check()
