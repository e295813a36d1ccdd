"""index_logits_sm90: its refusals, machine code and numbers anywhere, and its numbers on an sm_90 GPU."""

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.built import resources, sass
from fp4suite.dispatch import override, recording
from fp4suite.formats import IndexCache, index_layout
from fp4suite.problem import IndexLogitsProblem
from kernels_cute import index_logits_sm90 as kernel
from kernels_cute.index_logits_sm90 import Config
from ptx_emulator import emulate

from .scoreboards import loads_on_their_way

MANY = IndexLogitsProblem(m=4096, entries=8192, format="fp8", x="fp8")
FEW = replace(MANY, m=4, sequences=0)
SINGLES = Config(groups=2, strips=1, queries=1, block_m=1, stages=2, key_stages=2)
CONFIGS = [
    Config(groups=2, stages=2, key_stages=1),
    Config(groups=2, strips=2, block_m=8, stages=3),
    replace(SINGLES, strips=2),
]
INF = float("inf")


class Step:
    """Queries of three sequences in runs of 1, 6 and 3 with padding behind, over pages in any order, one missing; rows
    that no query sees hold NaN, as pages behind them do. Queries and weights lie apart."""

    def __init__(self, device: torch.device | str, page: int = 64, pages: int = 4) -> None:
        g = torch.Generator().manual_seed(page)
        data = torch.empty(3 * pages, index_layout("fp8", page, 128).page_bytes, dtype=torch.uint8)
        cache = IndexCache(data, "fp8", page)
        reference.write_rows(
            cache, torch.arange(cache.slots), testing.random_activations((cache.slots, 128), g).float()
        )
        self.table = torch.randperm(3 * pages, generator=g).view(3, pages).int()
        self.sequences = torch.tensor([0] + [1] * 6 + [2] * 3 + [-1] * 2).int()
        most = pages * page
        self.seen = torch.tensor([most - 31, *range(70, 76), 0, 1, most, most, most])
        for sequence, row in enumerate(self.table):
            unseen = int(self.seen[self.sequences == sequence].max())
            for i in range(pages):
                rows, scales = data[row[i]].split([page * 128, page * 4])
                first = min(max(unseen - i * page, 0), page)
                rows.view(page, 128)[first:] = 0x7F
                scales.view(torch.float32)[first:] = torch.nan
        self.table[0, 1] = -1
        self.positions = (3 * self.seen + 1).int()
        q = testing.random_activations((12, 64, 128), g)
        q = (q * (448 / q.abs().amax(-1, keepdim=True))).to(torch.float8_e4m3fn)
        self.q = torch.stack((q.view(torch.uint8), torch.full_like(q.view(torch.uint8), 0x7F)), 1).to(device)[:, 0]
        self.q, self.weights = self.q.view(torch.float8_e4m3fn), torch.randn(12, 66, generator=g).to(device)[:, 1:65]
        self.cache = IndexCache(data.to(device), "fp8", page)
        self.table, self.sequences, self.positions = (
            x.to(device) for x in (self.table, self.sequences, self.positions)
        )

    @property
    def operands(self) -> tuple[Tensor | IndexCache, ...]:
        return self.q, self.weights, self.cache, self.table, self.positions, self.sequences

    def run(self, config: Config, ratio: int = 3) -> Tensor:
        entries = self.table.shape[1] * self.cache.page_size
        out = torch.full((12, entries), float("nan"), device=self.q.device)
        kernel.launch(*self.operands, ratio, 0.3, out, config)
        return out

    def check(self, got: Tensor, ratio: int = 3) -> None:
        at, page = torch.arange(got.shape[1], device=got.device), self.cache.page_size
        for sequence in range(3):
            own = self.sequences == sequence
            limits = (self.positions[own] + 1) // ratio
            pages = self.table[sequence].long()[at // page]
            there = (pages >= 0) & (at < limits.max())
            keys = reference.read_rows(self.cache, torch.where(there, pages * page + at % page, -1))
            testing.assert_index_logits_close(got[own], self.q[own], self.weights[own], keys, limits, 0.3)
        assert torch.all(got[self.sequences < 0] == -INF)


# --- anywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (replace(MANY, x="bf16"), Config(), "q in bf16, keys in fp8: this kernel multiplies fp8"),
        (replace(MANY, format="mxfp4", x="bf16"), Config(), "keys in mxfp4"),
        (replace(MANY, heads=32), Config(), "32 heads of 128: this kernel takes 64 of 128"),
        (replace(MANY, page_size=96), Config(), "page_size=96 is not a multiple of 64"),
        (MANY, Config(strips=2), "4 warpgroups with 2 strips of 2 queries"),
        (MANY, Config(block_m=1), "2 queries of an MMA, in items of one"),
        (MANY, Config(stages=12), "bytes of shared memory"),
    ],
)
def test_refusals(problem, config, message):
    assert message in kernel.supports(problem, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.build(problem, config)


def test_builds_for_its_own_architecture_only():
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(MANY, Config(), "sm_100a")


@pytest.mark.parametrize(("problem", "config"), [(MANY, None), (MANY, CONFIGS[1]), (FEW, None)], ids=str)
def test_defaults_keep_products_on_their_way(problem, config):
    """No product is waited for right after its issue, as ptxas does where it cannot keep sums apart; nothing spills."""
    config = config or kernel.default(problem)
    built = kernel.build(problem, config)
    assert built.shared_bytes == kernel.shared_bytes(config)
    assert resources(built).spill_bytes == 0
    assert not loads_on_their_way(built)
    code = sass(built)
    assert len(re.findall(r"\bQGMMA\.", code)) == 4 * config.strips
    waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)
    assert waits == ["1"] * (config.strips - 1) + ["0"]


@pytest.mark.parametrize(
    ("config", "schedule"),
    list(zip((*CONFIGS, SINGLES), ("late", "eager", "late", "eager"), strict=True)),
    ids=str,
)
def test_in_the_emulator(config, schedule, monkeypatch):
    """Several items a CTA, more stages than fit; every score against FP64, every access against the others'.

    In the last case a CTA has 24 items in a run, not every other one."""
    kernel.compiled.cache_clear()
    monkeypatch.setattr(kernel, "_max_ctas", lambda device: 2)
    monkeypatch.setattr(kernel, "IN_RUNS", 24)
    step = Step("cpu", *{CONFIGS[0]: (64, 5), SINGLES: (64, 8)}.get(config, (128, 2)))
    if config is CONFIGS[0]:
        step.weights = behind_others(step.weights)
    with emulate("sm_90a", schedule=schedule) as gpu:
        got = step.run(config)
    kernel.compiled.cache_clear()
    step.check(got)
    assert gpu.launches[-1].bank_conflicts == 0


def behind_others(weights: Tensor) -> Tensor:
    """The same as the last columns of one tensor, whose others are NaN."""
    return torch.cat((torch.full((len(weights), 2560), torch.nan), weights), dim=1)[:, 2560:]


def test_weights_that_are_columns_are_not_copied(monkeypatch):
    """TMA reads what begins at multiples of 16 bytes where it lies; anything else is copied first."""
    seen = []
    monkeypatch.setattr(kernel, "_max_ctas", lambda device: 2)
    monkeypatch.setattr(kernel, "_arguments", lambda *given: seen.append(given) or ())
    monkeypatch.setattr(kernel, "compiled", lambda *given: lambda *args: None)
    step = Step("cpu")
    apart, step.weights = step.weights, behind_others(step.weights)
    step.run(SINGLES)
    fused, step.weights = step.weights, apart
    step.run(SINGLES)
    (there, _, strides, *_), (copied, _, dense, *_) = seen
    assert (there[1], strides[2]) == (fused.data_ptr(), 2624)
    assert (copied[1] != apart.data_ptr(), dense[2]) == (True, 64)


def test_nothing_to_do():
    step = Step("cpu")
    rows = (x[:0] for x in (step.q, step.weights))
    kernel.launch(
        *rows, step.cache, step.table, step.positions[:0], step.sequences[:0], 3, 1.0, torch.empty(0, 256), SINGLES
    )


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("config", [*CONFIGS, *testing.configs(kernel)], ids=str)
def test_configs(config, device):
    if kernel.supports(MANY, config) is None:
        wanted = Step(device).run(Config())
        for page, pages in ((64, 9), (256, 3)):
            step = Step(device, page, pages)
            step.check(step.run(config))
        step = Step(device)
        step.check(step.run(config, ratio=7), ratio=7)
        assert torch.equal(step.run(config), wanted)  # to the bit, whatever the tile


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "entries", "sequences"),
    [(1, 64, 1), (4, 30000, 4), (64, 3000, 64), (700, 3000, 3), (3001, 704, 1), (4096, 8192, 1)],
)
def test_real_sizes(m, entries, sequences, device):
    problem = IndexLogitsProblem(m=m, entries=entries, format="fp8", sequences=sequences, x="fp8")
    for config in (kernel.default(problem), Config()):
        case = testing.case(problem, device)
        case.run(kernel, config)
        case.check()


@pytest.mark.gpu
def test_a_row_is_the_same_in_any_batch(device):
    """To the bit, under any config, wherever its run of queries begins, in repeated runs and replays of a graph."""
    problem = IndexLogitsProblem(m=200, entries=2000, format="fp8", sequences=2, x="fp8")
    case = testing.case(problem, device)
    kernel.warm(problem, Config())
    case.run(kernel, Config())
    want = case.out.clone()
    q, weights, cache, table, positions, ids, ratio, scale = case.operands
    for rows in (slice(0, 1), slice(5, 6), slice(91, 130)):
        out = torch.empty_like(want[rows])
        for config in (Config(), SINGLES):
            some = table, positions[rows], ids[rows]
            kernel.launch(q[rows], weights[rows], cache, *some, ratio, scale, out, config)
            assert torch.equal(out, want[rows])
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        case.launch(kernel, Config())
    for _ in range(20):
        case.poison()
        graph.replay()
        assert torch.equal(case.out, want)


@pytest.mark.gpu
def test_the_op_runs_it(device):
    step = Step(device)
    with override(kernel="cute_index_logits_sm90", config=Config()), recording() as choices:
        got = ops.index_logits(
            step.q, step.weights, step.cache, step.table,
            positions=step.positions, sequence_ids=step.sequences, ratio=3, scale=0.3,
        )  # fmt: skip
    assert [c.kernel for c in choices] == ["cute_index_logits_sm90"]
    step.check(got)
