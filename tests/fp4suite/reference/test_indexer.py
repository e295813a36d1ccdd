"""Index scores and choices against loops in FP64: causality, ties, paging, padding."""

import pytest
import torch

from fp4suite.formats import IndexCache, index_layout
from fp4suite.reference import (
    index_logits,
    index_query,
    index_topk,
    read_rows,
    rope_frequencies,
    rope_table,
    write_rows,
)
from fp4suite.reference.indexer import entry_slots
from fp4suite.reference.rope import rotate

INF = float("inf")


def filled(d: int = 32, pages: int = 8, page: int = 4) -> tuple[IndexCache, torch.Tensor]:
    """A cache of random keys, and the keys [slots, d]."""
    keys = torch.randn(pages * page, d, generator=torch.Generator().manual_seed(0))
    data = torch.zeros(pages, index_layout("fp32", page, d).page_bytes, dtype=torch.uint8)
    cache = IndexCache(data, "fp32", page, d)
    write_rows(cache, torch.arange(pages * page).int(), keys)
    return cache, keys


def test_scores() -> None:
    """Two sequences over scattered pages; ReLU inside, weights of either sign outside; -inf beyond (t + 1) // 4."""
    cache, keys = filled()
    g = torch.Generator().manual_seed(1)
    q, w = torch.randn(6, 3, 32, generator=g), torch.randn(6, 3, generator=g)
    table = torch.tensor([[5, 2, 7], [0, 6, -1]]).int()
    positions = torch.tensor([2, 3, 47, 18, 31, 0]).int()
    sequences = torch.tensor([0, 0, 0, 1, 1, -1]).int()
    got = index_logits(q, w, cache, table, positions=positions, sequence_ids=sequences, ratio=4, scale=0.25)
    assert got.shape == (6, 12)
    for t in range(6):
        for entry in range(12):
            visible = sequences[t] >= 0 and entry < (int(positions[t]) + 1) // 4
            if not visible:
                assert got[t, entry] == -INF
                continue
            key = keys[int(table[sequences[t], entry // 4]) * 4 + entry % 4].double()
            want = sum(float(w[t, h]) * max(0.0, float(q[t, h].double() @ key)) for h in range(3)) * 0.25
            assert float(got[t, entry]) == pytest.approx(want, rel=1e-5, abs=1e-5)
    assert (got[:5] > 0).any()
    assert (got[:5][got[:5] > -INF] < 0).any()


def test_choice() -> None:
    """The highest first, the lower entry among equals, invisible entries never (be they NaN); slots in entry order."""
    logits = torch.tensor(
        [
            [1.0, 5.0, 5.0, 0.0, 9.0, INF, float("nan"), 3.0],
            [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
            [-1.0, -2.0, -3.0, -INF, -4.0, -5.0, -6.0, 7.0],
            [1.0, 2.0, float("nan"), 3.0, 4.0, 5.0, 6.0, 7.0],
            [1.0] * 8,
        ]
    )
    table = torch.tensor([[3, 1], [0, 2]]).int()
    positions = torch.tensor([19, 31, 31, 7, 31]).int()  # 5, 8, 8, 2 and 8 entries
    sequences = torch.tensor([0, 1, 0, 1, -1]).int()
    got = index_topk(logits, table, positions=positions, sequence_ids=sequences, ratio=4, topk=3, page_size=4)
    assert got.dtype == torch.int32
    assert got.tolist() == [
        [13, 14, 4],  # entries 1, 2, 4 of pages 3 and 1
        [0, 1, 2],
        [12, 13, 7],  # 0, 1, 7
        [0, 1, -1],
        [-1, -1, -1],
    ]
    wide = index_topk(logits, table, positions=positions, sequence_ids=sequences, ratio=4, topk=100, page_size=4)
    assert wide.shape == (5, 8)
    assert wide[3].tolist() == [0, 1] + [-1] * 6


def test_random_choices_against_sorting() -> None:
    g = torch.Generator().manual_seed(2)
    logits = torch.randint(-3, 4, (200, 40), generator=g).float()  # ties everywhere
    positions = torch.randint(0, 170, (200,), generator=g).int()
    table = torch.randperm(10, generator=g).int()[None]
    got = index_topk(
        logits, table, positions=positions, sequence_ids=torch.zeros(200).int(), ratio=4, topk=7, page_size=4
    )
    for t in range(200):
        visible = range(min(40, (int(positions[t]) + 1) // 4))
        best = sorted(sorted(visible, key=lambda e: (-float(logits[t, e]), e))[:7])
        want = [int(table[0, e // 4]) * 4 + e % 4 for e in best]
        assert got[t].tolist() == want + [-1] * (7 - len(want))


def test_entry_slots() -> None:
    table = torch.tensor([[4, -1], [2, 0]]).int()
    got = entry_slots(
        torch.tensor([[0, 3, 5, -1], [2, 7, 1, 0], [0, 0, 0, 0]]), table, torch.tensor([0, 1, -1]).int(), 4
    )
    assert got.tolist() == [[16, 19, -1, -1], [10, 3, 9, 8], [-1] * 4]


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8", "mxfp4"])
def test_queries_are_rounded_as_keys_are(format: str) -> None:
    """A query written to a cache of its format comes back as it went: turned, and already rounded."""
    freq = rope_frequencies(16, 160000.0)
    table = rope_table(freq, 100)
    q = torch.randn(5, 3, 64, generator=torch.Generator().manual_seed(3))
    at = torch.tensor([0, 1, 50, 99, 7]).int()
    got = index_query(q, at, table, format=format)
    assert float((got - rotate(q, at, table)).norm() / q.norm()) < {"fp32": 1e-7, "bf16": 2e-3}.get(format, 0.15)
    data = torch.zeros(1, index_layout(format, 15, 64).page_bytes, dtype=torch.uint8)
    cache = IndexCache(data, format, 15, 64)
    write_rows(cache, torch.arange(15).int(), got.view(15, 64))
    assert torch.equal(read_rows(cache, torch.arange(15).int()).view(5, 3, 64), got)
    if format != "fp32":
        assert torch.equal(got.bfloat16().float(), got)  # so that BF16 tensors lose nothing


def test_hadamard_cancels_and_helps_four_bits() -> None:
    """Turning both sides leaves dot products alone; with outliers, four bits then lose less."""
    table = rope_table(rope_frequencies(16, 160000.0), 4)
    g = torch.Generator().manual_seed(4)
    q, k = torch.randn(4, 8, 128, generator=g), torch.randn(4, 8, 128, generator=g)
    q[..., 5] *= 30
    at = torch.arange(4).int()

    def dots(format: str, hadamard: bool) -> torch.Tensor:
        a, b = (index_query(x, at, table, format=format, hadamard=hadamard) for x in (q, k))
        return (a * b).sum(-1)

    exact = dots("fp32", False)
    torch.testing.assert_close(dots("fp32", True), exact, rtol=1e-5, atol=1e-4)
    assert (dots("mxfp4", True) - exact).norm() < 0.8 * (dots("mxfp4", False) - exact).norm()
