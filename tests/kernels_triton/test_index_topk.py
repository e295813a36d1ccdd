"""index_topk gives the reference's slots: ties, rows that outgrow a program, ragged visibility, padding."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target, override
from fp4suite.problem import IndexTopkProblem
from kernels_triton import index_topk as kernel

from ..index_scores import INF, KINDS, NAN, check_in_a_graph, rows

HELD = kernel.Config(num_warps=1)
MAXIMA = kernel.Config(held=64, group=4, num_warps=1)
TOPS = kernel.Config(held=16, group=4, num_warps=1)  # maxima of maxima


def check(x: dict[str, Tensor], topk: int, config: kernel.Config, page: int = 8, ratio: int = 4) -> Tensor:
    step = {"positions": x["positions"], "sequence_ids": x["sequence_ids"], "ratio": ratio}
    want = reference.index_topk(x["logits"], x["block_table"], **step, topk=topk, page_size=page)
    out = torch.full_like(want, -7)
    kernel.launch(x["logits"], x["block_table"], x["positions"], x["sequence_ids"], ratio, page, out, config)
    assert torch.equal(out.cpu(), want.cpu())
    return out


@pytest.mark.parametrize("topk", [1, 7, 16])
@pytest.mark.parametrize("config", [HELD, MAXIMA, TOPS], ids=["held", "maxima", "maxima of maxima"])
def test_rows_of_every_kind(config, topk, device):
    assert kernel.levels(168, config) == [HELD, MAXIMA, TOPS].index(config)
    check(rows(168, device), topk, config)


@pytest.mark.parametrize("entries", [8, 32, 40])
def test_short_rows(entries, device):
    """Also where there are fewer than topk, or fewer groups."""
    for config in (HELD, MAXIMA, TOPS):
        check(rows(entries, device), 16, config)


@pytest.mark.parametrize(("page", "pages"), [(3, 12), (12, 12), (64, 3)])
def test_rows_that_are_not_aligned(page, pages, device):
    x = rows(pages * page, device, page)
    wide = torch.nn.functional.pad(x["logits"], (3, 2), value=1e30)
    for config in (HELD, MAXIMA):
        check(x, 9, config, page)
        check(x | {"logits": wide[:, 3:-2]}, 9, config, page)


def test_far_positions_and_other_ratios(device):
    """Entry numbers of a million tokens, ratios that do not divide the position."""
    x = rows(64, device)
    positions = [1_048_575, 190, 191, 192, 2, 3, 1, 0, 100, 95, 50, 127]
    x["positions"] = torch.tensor(positions, dtype=torch.int32, device=device)
    for ratio in (1, 3, 128):
        check(x, 16, TOPS, ratio=ratio)


def test_entries_that_cannot_be_seen_are_not_read_as_scores(device):
    x = rows(48, device)
    x["positions"][:] = 4 * 20
    for config in (HELD, TOPS):
        x["logits"][:, 20:] = NAN
        got = check(x, 16, config)
        x["logits"][:, 20:] = INF
        assert torch.equal(check(x, 16, config), got)


def test_more_scores_than_a_program_of_maxima_reads(device):
    """Groups, rows of equal and of rising scores over several programs, the last of them ragged."""
    entries, g = 3 * kernel.TILE - 40, torch.Generator().manual_seed(0)
    logits = torch.stack([make(g, entries) for make in KINDS.values()]).to(device)
    n = len(logits)
    table = torch.arange(-(-entries // 8), device=device).int().flip(0)[None]
    step = {"positions": torch.arange(entries - n, entries, device=device).int(), "ratio": 1}
    step["sequence_ids"] = torch.zeros(n, dtype=torch.int32, device=device)
    want = reference.index_topk(logits, table, **step, topk=100, page_size=8)
    out = torch.full_like(want, -7)
    config = kernel.Config(held=1024, group=8, num_warps=4)
    kernel.launch(logits, table, step["positions"], step["sequence_ids"], 1, 8, out, config)
    assert torch.equal(out, want)


@pytest.mark.parametrize(
    ("entries", "topk", "levels"),
    [(8192, 1024, 0), (16384, 2048, 0), (32768, 1024, 1), (262144, 1024, 1), (262144, 2048, 2), (1 << 20, 1024, 2)],
)
def test_default_configs(entries, topk, levels):
    problem = IndexTopkProblem(m=1, entries=entries, topk=topk)
    config = kernel.default(problem)
    assert kernel.supports(problem, config) is None
    assert kernel.levels(entries, config) == levels


def test_no_queries_and_no_entries(device):
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    table = torch.zeros(1, 2, dtype=torch.int32, device=device)
    out = torch.zeros(0, 4, dtype=torch.int32, device=device)
    kernel.launch(torch.zeros(0, 16, device=device), table, empty, empty, 4, 8, out, TOPS)
    one = torch.zeros(1, dtype=torch.int32, device=device)
    kernel.launch(torch.zeros(1, 0, device=device), table, one, one, 4, 8, out.new_zeros(1, 0), TOPS)


def test_cases_of_the_tuner(device):
    c = testing.case(IndexTopkProblem(m=33, entries=96, topk=16, page_size=8), device)
    c.run(kernel, MAXIMA)
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
    with on_target("sm_90a"), override(kernel="triton_index_topk", config=MAXIMA):
        assert torch.equal(ops.index_topk(x["logits"], x["block_table"], **call), want)


def test_refusals():
    def why(entries: int, topk: int, **config: int) -> str | None:
        return kernel.supports(IndexTopkProblem(m=1, entries=entries, topk=topk), kernel.Config(**config))

    assert why(262144, 1024) is None
    assert why(64, 4096) is None
    assert why(32768, 2048) == "topk=2048 groups of group=16 are more than held=16384 entries"
    assert why(1 << 20, 64, group=4) == "entries=1048576 are more than held=16384 groups of group=4 squared"
    few = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="1025 entries need maxima 4 times over"):
        kernel.launch(torch.zeros(1, 1025), few[None], few, few, 4, 8, few[None], kernel.Config(held=16, group=4))
    assert why(16384, 64, num_warps=4) == "16384 scores are more than 64 a thread: num_warps=4"


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
@pytest.mark.parametrize(("m", "entries"), [(1, 262144), (7, 30016), (300, 4096), (600, 16384), (3, 999936)])
def test_real_sizes(m, entries, config, device):
    problem = IndexTopkProblem(m=m, entries=entries, topk=1024)
    if kernel.supports(problem, config) is None:
        c = testing.case(problem, device)
        c.run(kernel, config)
        c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    for m, entries in ((2, 65536), (40, 8192)):
        check_in_a_graph(kernel, m, entries, device)
