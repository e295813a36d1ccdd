"""index_topk gives the reference's slots: ties, rows that outgrow a program, split rows, ragged visibility, padding."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target, override
from fp4suite.problem import IndexTopkProblem
from kernels_triton import index_topk as kernel

INF, NAN = float("inf"), float("nan")
ONE = kernel.Config(tile=16, programs=1)  # a program a query, which keeps a buffer beyond 32 entries
SPLIT = kernel.Config(tile=16, programs=64)
KINDS = {
    "random": lambda g, n: torch.randn(n, generator=g),
    "ties": lambda g, n: torch.randint(-2, 3, (n,), generator=g).float(),
    "rising": lambda g, n: torch.arange(float(n)) - n / 2,
    "falling": lambda g, n: n / 2 - torch.arange(float(n)),
    "equal": lambda g, n: torch.zeros(n),
    "zeros of both signs": lambda g, n: torch.where(torch.rand(n, generator=g) < 0.5, 0.0, -0.0),
    "not finite": lambda g, n: torch.tensor([NAN, -NAN, INF, -INF, 1.0])[torch.randint(0, 5, (n,), generator=g)],
    "huge and tiny": lambda g, n: torch.randn(n, generator=g) * 10.0 ** torch.randint(-45, 38, (n,), generator=g),
}


def rows(entries: int, device: torch.device, page: int = 8) -> dict[str, Tensor]:
    """One query of each kind with every entry, one with fewer, one that sees nothing and one of padding."""
    g = torch.Generator().manual_seed(entries)
    made = [make(g, entries) for make in KINDS.values()]
    made += [torch.randn(entries, generator=g) for _ in range(3)]
    table = torch.randperm(3 * (entries // page), generator=g).int().view(3, -1)
    table[2, 1::3] = -1
    seen = torch.tensor([entries] * len(KINDS) + [entries * 2 // 3, 0, entries])
    sequences = torch.arange(len(made)) % 3
    sequences[-1] = -1
    return {
        "logits": torch.stack(made).to(device),
        "block_table": table.to(device),
        "positions": (4 * seen + 2).int().to(device),  # the entry after the last seen is one token short
        "sequence_ids": sequences.int().to(device),
    }


def check(x: dict[str, Tensor], topk: int, config: kernel.Config, page: int = 8, ratio: int = 4) -> Tensor:
    step = {"positions": x["positions"], "sequence_ids": x["sequence_ids"], "ratio": ratio}
    want = reference.index_topk(x["logits"], x["block_table"], **step, topk=topk, page_size=page)
    out = torch.full_like(want, -7)
    kernel.launch(x["logits"], x["block_table"], x["positions"], x["sequence_ids"], ratio, page, out, config)
    assert torch.equal(out.cpu(), want.cpu())
    return out


@pytest.mark.parametrize("topk", [1, 7, 16])
@pytest.mark.parametrize("config", [ONE, SPLIT], ids=["one program", "split"])
def test_rows_longer_than_a_program_holds(config, topk, device):
    check(rows(168, device), topk, config)


@pytest.mark.parametrize("entries", [8, 32, 40])
def test_short_rows(entries, device):
    """All in registers, also where there are fewer than topk, and one tile more."""
    check(rows(entries, device), 16, ONE)


@pytest.mark.parametrize("page", [3, 12, 64])
def test_rows_that_are_not_aligned(page, device):
    x = rows(12 * page, device, page)
    check(x, 9, SPLIT if page < 64 else ONE, page)
    wide = torch.nn.functional.pad(x["logits"], (3, 2), value=1e30)
    check(x | {"logits": wide[:, 3:-2]}, 9, ONE, page)


def test_far_positions_and_other_ratios(device):
    """Entry numbers of a million tokens, ratios that do not divide the position."""
    x = rows(64, device)
    x["positions"] = torch.tensor([1_048_575, 190, 191, 192, 2, 3, 1, 0, 100, 95, 50], dtype=torch.int32, device=device)
    for ratio in (1, 3, 128):
        check(x, 16, ONE, ratio=ratio)


def test_entries_that_cannot_be_seen_are_not_read_as_scores(device):
    x = rows(48, device)
    x["positions"][:] = 4 * 20
    x["logits"][:, 20:] = NAN
    got = check(x, 16, ONE)
    x["logits"][:, 20:] = INF
    assert torch.equal(check(x, 16, ONE), got)


@pytest.mark.parametrize(
    ("tokens", "entries", "parts"), [(1, 262144, 16), (1, 1024, 1), (64, 262144, 4), (4096, 262144, 1), (3, 30000, 5)]
)
def test_how_rows_are_split(tokens, entries, parts):
    config = kernel.Config()
    found, span = kernel.split(tokens, entries, 1024, config)
    assert found == parts
    assert (found - 1) * span * config.tile < entries <= found * span * config.tile
    assert found == 1 or span >= 2


def test_no_queries_and_no_entries(device):
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    table = torch.zeros(1, 2, dtype=torch.int32, device=device)
    out = torch.zeros(0, 4, dtype=torch.int32, device=device)
    kernel.launch(torch.zeros(0, 16, device=device), table, empty, empty, 4, 8, out, ONE)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    kernel.launch(torch.zeros(1, 0, device=device), table, one, one, 4, 8, out.new_zeros(1, 0), ONE)


def test_cases_of_the_tuner(device):
    c = testing.case(IndexTopkProblem(m=33, entries=96, topk=16, page_size=8), device)
    c.run(kernel, ONE)
    c.check()
    c.out[5, 3] += 1
    with pytest.raises(AssertionError, match=r"slots: 1 of .* bytes differ; first at \[5, 1"):
        c.check()


def test_the_op(device):
    """Through dispatch, with operands that are not contiguous."""
    x = rows(64, device)
    x["logits"] = x["logits"].T.contiguous().T
    x["positions"] = torch.stack((x["positions"], x["positions"]), dim=1)[:, 0]
    x["block_table"] = x["block_table"].T.contiguous().T
    call = {"positions": x["positions"], "sequence_ids": x["sequence_ids"], "ratio": 4, "topk": 16, "page_size": 8}
    want = reference.index_topk(x["logits"], x["block_table"], **call)
    with on_target("sm_90a"), override(kernel="triton_index_topk", config=ONE):
        assert torch.equal(ops.index_topk(x["logits"], x["block_table"], **call), want)


def test_refusals():
    assert kernel.supports(IndexTopkProblem(m=1, entries=4096, topk=1024), kernel.Config()) is None
    assert kernel.supports(IndexTopkProblem(m=1, entries=64, topk=4096), kernel.Config()) is None
    why = kernel.supports(IndexTopkProblem(m=1, entries=8192, topk=4096), kernel.Config())
    assert why == "topk=4096 is more than tile=2048"
    assert kernel.default(IndexTopkProblem(m=1, entries=8192, topk=512)).tile == 1024


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
@pytest.mark.parametrize(("m", "entries"), [(1, 262144), (7, 30016), (300, 4096), (600, 16384)])
def test_real_sizes(m, entries, config, device):
    problem = IndexTopkProblem(m=m, entries=entries, topk=1024)
    c = testing.case(problem, device)
    c.run(kernel, config)
    c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on other scores, split rows too."""
    for m, entries in ((2, 65536), (40, 8192)):
        c = testing.case(IndexTopkProblem(m=m, entries=entries, topk=512), device)
        kernel.warm(c.problem, kernel.Config())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            c.launch(kernel, kernel.Config())
        for _ in range(3):
            c.operands[0].copy_(torch.roll(c.operands[0], 12345, 1))
            c.poison()
            graph.replay()
            c.check()
