"""index_topk: its refusals and machine code anywhere, the reference's slots in the emulator and on a GPU."""

import functools

import pytest
import torch
from torch import Tensor

from fp4suite import dispatch, ops, reference, testing
from fp4suite.built import resources, sass
from fp4suite.problem import IndexTopkProblem
from kernels_cute import index_topk as kernel
from kernels_cute.index_topk import Config
from ptx_emulator import emulate

from ..index_scores import INF, NAN, check_in_a_graph, rows

DEFAULTS = [(1, 8192), (4096, 8192), (4096, 16384), (4, 32768), (4, 262144)]
CONFIGS = list(dict.fromkeys(kernel.default(IndexTopkProblem(m=m, entries=n, topk=1024)) for m, n in DEFAULTS))


def check(x: dict[str, Tensor], topk: int, config: Config, page: int = 8, ratio: int = 4) -> Tensor:
    host = {name: part.cpu() for name, part in x.items()}  # where a sort puts NaN of either sign first
    want = reference.index_topk(**host, ratio=ratio, topk=topk, page_size=page).to(x["logits"].device)
    out = torch.full_like(want, -7)
    kernel.launch(x["logits"], x["block_table"], x["positions"], x["sequence_ids"], ratio, page, out, config)
    assert torch.equal(out, want)
    return out


for_emulator = functools.cache(kernel.compiled.__wrapped__)  # with PTX, apart from what tests on a GPU compile


@pytest.fixture
def emulated(request, monkeypatch):
    """Emulating sm_90a, or what the test names."""
    monkeypatch.setattr(kernel, "compiled", for_emulator)
    with emulate(getattr(request, "param", "sm_90a"), schedule="late") as device:
        yield device


# --- anywhere ---------------------------------------------------------------------------------------------------------


build = functools.cache(kernel.build)


@pytest.mark.parametrize(
    ("m", "entries", "arch"),
    [*((m, n, "sm_90a") for m, n in DEFAULTS), (4096, 8192, "sm_100a"), (4, 262144, "sm_100a")],
)
def test_compiles_without_spills(m, entries, arch):
    problem = IndexTopkProblem(m=m, entries=entries, topk=1024)
    assert resources(build(problem, kernel.default(problem), arch)).spill_bytes == 0


def test_no_score_is_read_twice():
    """In straight code, a load, a bin and a ballot for each score of a thread; the sample's and -inf's loads beside."""
    code = sass(build(IndexTopkProblem(m=4096, entries=8192, topk=1024), Config(), "sm_90a"))
    each, sampled = Config().each, kernel.SAMPLES // 32
    assert code.count("LDG.E.CONSTANT") == 2 * each + sampled  # whole runs, and ragged ones
    assert code.count("ATOMS.POPC.INC") == each


@pytest.mark.parametrize(
    ("emulated", "entries", "topk", "page", "config"),
    [
        ("sm_100a", 168, 16, 8, Config(threads=128, each=4)),
        ("sm_90a", 1000, 300, 64, Config(threads=128, each=8)),
        ("sm_100a", 704, 100, 32, Config(threads=128, each=4, cluster=2)),
    ],
    indirect=["emulated"],
    ids=str,
)
def test_rows_of_every_kind(entries, topk, page, config, emulated):
    check(rows(entries, torch.device("cpu"), page), topk, config, page)


@pytest.mark.parametrize(("entries", "cluster"), [(8, 1), (40, 1), (40, 4)])
def test_short_rows(entries, cluster, emulated):
    """Also where there are fewer than topk, or nothing for a CTA."""
    check(rows(entries, torch.device("cpu")), 16, Config(threads=128, each=4, cluster=cluster))


def test_far_positions_other_ratios_and_strides(emulated):
    x = rows(64, torch.device("cpu"))
    x["positions"] = torch.tensor([1_048_575, 190, 191, 192, 2, 3, 1, 0, 100, 95, 50, 127], dtype=torch.int32)
    x["logits"] = torch.nn.functional.pad(x["logits"], (3, 2), value=1e30)[:, 3:-2]
    for ratio in (1, 3, 128):
        check(x, 16, Config(threads=128, each=4), ratio=ratio)


def test_rows_that_are_sent_for_ahead(emulated, monkeypatch):
    """By large CTAs of many queries, wherever a row begins: no byte outside of the tensor is asked for."""
    sent, prefetch = [], kernel.prefetch
    monkeypatch.setattr(kernel, "prefetch", lambda *asked: sent.append(asked) or prefetch(*asked))
    monkeypatch.setattr(kernel, "compiled", kernel.compiled.__wrapped__)
    monkeypatch.setattr(kernel, "FEW_QUERIES", 0)
    monkeypatch.setattr(kernel, "SM_COUNT", {"sm_90a": 1})
    x = {name: x if name == "block_table" else x[-3:] for name, x in rows(701, torch.device("cpu")).items()}
    check(x, 16, Config(threads=512, each=1, cluster=2))
    assert len(sent) == 1


def test_entries_that_cannot_be_seen_do_not_count(emulated):
    x = rows(48, torch.device("cpu"))
    x["positions"][:] = 4 * 20
    x["logits"][:, 20:] = NAN
    got = check(x, 16, Config(threads=128, each=4))
    x["logits"][:, 20:] = INF
    assert torch.equal(check(x, 16, Config(threads=128, each=4)), got)


def test_the_op_in_the_emulator(emulated):
    """Through dispatch, with operands that are not contiguous."""
    x = {name: x if name == "block_table" else x[-4:] for name, x in rows(64, torch.device("cpu")).items()}
    x["logits"], x["block_table"] = x["logits"].T.contiguous().T, x["block_table"].T.contiguous().T
    x["positions"] = torch.stack((x["positions"], x["positions"]), dim=1)[:, 0]
    call = {"positions": x["positions"], "sequence_ids": x["sequence_ids"], "ratio": 4, "topk": 16, "page_size": 8}
    want = reference.index_topk(x["logits"], x["block_table"], **call)
    with dispatch.recording() as choices:
        assert torch.equal(ops.index_topk(x["logits"], x["block_table"], **call), want)
    assert [c.kernel for c in choices] == ["cute_index_topk"]


@pytest.mark.parametrize(("m", "entries"), DEFAULTS)
def test_default_configs(m, entries):
    problem = IndexTopkProblem(m=m, entries=entries, topk=1024)
    config = kernel.default(problem)
    assert kernel.supports(problem, config) is None
    assert config.capacity < 2 * entries


def test_refusals():
    def why(entries: int, topk: int, **config: int) -> str | None:
        return kernel.supports(IndexTopkProblem(m=1, entries=entries, topk=topk), Config(**config))

    assert why(8192, 1024) is None
    assert "entries=8193 are more than" in str(why(8193, 1024))
    assert why(8192, 4096) == "topk=4096: this kernel writes 2048 slots a query at most"
    assert why(8192, 64, each=64) == "each=64 scores are more than 32 a thread"
    few = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="entries=513 are more than"):
        kernel.launch(torch.zeros(1, 513), few[None], few, few, 4, 8, few[None], Config(threads=128, each=4))
    with pytest.raises(ValueError, match="must be contiguous"):
        kernel.launch(torch.zeros(4, 2).T, few[None], few, few, 4, 8, few[None], Config())


def test_no_queries(emulated):
    empty = torch.zeros(0, dtype=torch.int32)
    out = torch.zeros(0, 4, dtype=torch.int32)
    kernel.launch(torch.zeros(0, 16), torch.zeros(1, 2, dtype=torch.int32), empty, empty, 4, 8, out, Config())
    assert not emulated.launches


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    ("m", "entries"), [(1, 262144), (64, 262144), (7, 30016), (300, 4096), (600, 16384), (4096, 8192)]
)
def test_real_sizes(m, entries, config, device):
    problem = IndexTopkProblem(m=m, entries=entries, topk=1024)
    if kernel.supports(problem, config) is None:
        c = testing.case(problem, device)
        c.run(kernel, config)
        c.check()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_rows_of_every_kind_on_a_gpu(config, device):
    for entries in (8, 168, 3000, 8192):
        if entries <= config.capacity:
            check(rows(entries, device, 32), 512, config, 32)


@pytest.mark.gpu
def test_cuda_graph(device):
    for m, entries in ((2, 65536), (400, 8192)):
        check_in_a_graph(kernel, m, entries, device)
