"""The timing protocol on a real GPU: times that are plausible, repeatable, cold, and only of what is right.

Bounds are wide because other tests may be using the same GPU meanwhile.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fp4suite import arch, registry, table
from fp4suite.problem import DequantProblem, QuantizeProblem, RmsNormProblem
from tuner import bench as rows, check, measure, targets, tune
from tuner.fusion_cells import COPY, Cell
from tuner.measure import Bench

pytestmark = pytest.mark.gpu


@pytest.fixture
def small():
    return Bench(QuantizeProblem(m=64, k=4096), "cuda")


@pytest.fixture
def large():
    return Bench(DequantProblem(m=65536, k=1536), "cuda")


def config_of(kernel, **knobs):
    return registry.load(kernel).Config(**knobs)


def test_operands_do_not_stay_in_l2(small, large):
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    assert all(bench._flush.nbytes >= 2 * l2 for bench in (small, large))


@triton.jit
def _read_once(x_ptr, most_ptr, BLOCK: tl.constexpr):
    words = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + words, eviction_policy="evict_first")
    tl.store(most_ptr + tl.program_id(0), tl.max(x, axis=0))


def test_what_another_contender_read_is_not_found():
    """A kernel whose lines L2 evicts first takes as long after one that has read the same as after a copy."""
    words, block = 1 << 24, 4096
    items = [torch.zeros(words, dtype=torch.int32, device="cuda") for _ in range(3)]
    most, other = torch.empty(words // block, dtype=torch.int32, device="cuda"), torch.empty_like(items[0])
    timer = measure.Timer(items, "cuda")
    own = timer.capture("own", lambda x: _read_once[(words // block,)](x, most, block))
    before = [
        timer.capture("reads", lambda x: torch.amax(x, dim=0, out=most[0])),
        timer.capture("copies", lambda x: torch.neg(other, out=other)),
    ]
    times: list[list[float]] = [[], []]
    for _ in range(15):
        for found, contender in zip(times, before, strict=True):
            timer._replay_us(contender)
            found.append(timer._replay_us(own))
    assert np.median(times[0]) == pytest.approx(np.median(times[1]), rel=0.05)


def test_times_lie_between_the_roof_and_reason(large):
    timed = large.record("triton_dequant_nvfp4", config_of("triton_dequant_nvfp4"))
    us = float(np.median(large.rounds([timed], 20)))
    floor = large.problem.bytes / 9000 / 1e3  # no GPU of today moves more than 9 TB/s
    assert floor < us < 100 * floor


def test_the_same_contender_twice_gives_the_same_time(small, large):
    for bench, kernel in ((small, "triton_quantize_nvfp4"), (large, "triton_dequant_nvfp4")):
        twice = [bench.record(kernel, config_of(kernel)) for _ in range(2)]
        times = bench.rounds(twice, 30)
        ratio = float(np.median(times[:, 0] / times[:, 1]))
        assert ratio == pytest.approx(1.0, abs=0.1)


def test_twice_the_work_takes_about_twice_as_long():
    kernel, times = "triton_dequant_nvfp4", []
    for m in (32768, 65536):
        bench = Bench(DequantProblem(m=m, k=4096), "cuda")
        times.append(float(np.median(bench.rounds([bench.record(kernel, config_of(kernel))], 20))))
    assert times[1] / times[0] == pytest.approx(2.0, rel=0.4)


def test_nothing_takes_next_to_nothing(small):
    timed = small.capture("empty again", lambda case: None)
    assert abs(float(np.median(small.rounds([timed], 30)))) < 1.0


def test_the_copy_beside_fusions_is_the_faster_one():
    """The driver's takes a fifth longer for a size like this (H100)."""
    cell = Cell(RmsNormProblem(m=4096, k=7168), "cuda", 0)
    cell.record_copy()
    half = cell.problem.bytes // 2
    pairs = {id(case): torch.zeros(2, half, dtype=torch.uint8, device="cuda") for case in cell.cases}
    driver = cell.capture("driver", lambda case: pairs[id(case)][1].copy_(pairs[id(case)][0]))
    times = np.median(cell.rounds([cell.timed[COPY], driver], 20), axis=0)
    assert 0 < times[0] < 1.1 * times[1]


def test_a_wrong_result_is_never_timed(small, monkeypatch):
    kernel = registry.load("triton_quantize_nvfp4")

    def launch(x, alpha, out, rule, config):
        kernel.launch(x, alpha, out, rule, config)
        out.data[0, 0] ^= 1

    wrong = SimpleNamespace(launch=launch)
    monkeypatch.setattr(registry, "load", lambda name: wrong)
    with pytest.raises(AssertionError, match="data"):
        small.record("triton_quantize_nvfp4", kernel.Config())


def test_what_the_graph_writes_is_checked_too(small, monkeypatch):
    kernel = registry.load("triton_quantize_nvfp4")

    def launch(x, alpha, out, rule, config):
        if not torch.cuda.is_current_stream_capturing():
            kernel.launch(x, alpha, out, rule, config)

    monkeypatch.setattr(registry, "load", lambda name: SimpleNamespace(launch=launch))
    with pytest.raises(AssertionError):
        small.record("triton_quantize_nvfp4", kernel.Config())


def test_roofs_are_those_of_a_data_centre_gpu():
    assert 300 < measure.read_bandwidth("cuda") < 9000
    assert 300 < measure.copy_bandwidth("cuda") < 9000
    assert 100 < measure.matmul_tflops("cuda") < 3000


def test_tune_bench_and_check_from_end_to_end(tmp_path):
    target = targets.targets(None, None)[0]
    assert target.cuda == "cuda:0"
    options = tune.Options(
        configs=targets.load_configs(["demo"]),
        ops=("rmsnorm_quantize",),
        m=(16, 64),
        tp=1,
        budget=dataclasses.replace(tune.BUDGETS["small"], trials=4),
        jobs=2,
        seed=0,
        deadline=float("inf"),
        storage=tmp_path / "journal.log",
        out=tmp_path,
        quiet=True,
    )
    report = tune.run([target], options)
    assert not report.failed
    (path,) = report.tables
    assert path.name == f"{arch.device_name('cuda')}.json"
    entries = table.read(path).entries
    assert len(entries) == 4
    for entry in entries:
        assert entry.measured
        assert entry.median_us <= entry.default_us * 1.005
        assert entry.regret is not None
        assert {"driver", "toolkit", "torch", "triton"} <= set(entry.versions)
    found = check.run(path)
    assert (found.ran, found.problems) == (4, [])
    paths, measured = rows.run(
        [target], options.configs, options.ops, (16,), 1, tmp_path / "bench", rounds=10, seed=0, quiet=True
    )
    assert all(r["measured"] and r["baseline_us"] > 0 for r in measured)
    assert paths[0].parent.name == target.device
