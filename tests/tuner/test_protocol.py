"""The timing protocol's arithmetic, on a simulated device with a clock of its own: no GPU.

What only hardware can tell (that operands are cold, that times are plausible) is in test_measure.py.
"""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fp4suite.problem import DequantProblem, GemmProblem, QuantizeProblem
from tuner import measure

L2 = 1 << 20
FLUSH_US, START_US = 50.0, 3.0


class Device:
    """A clock, and the part of torch.cuda that the protocol uses. Work is captured or takes its time at once."""

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.factor = 1.0  # clocks that drift
        self.flushed = 0
        self.spinning_us = 0.0
        self.host_us = 20.0  # to queue a graph and its events

    def sleep(self, cycles):
        self.spinning_us = 100.0 * cycles / measure.SPIN_CYCLES
        self.spend(self.spinning_us)

    def flush(self):
        assert self.capturing is None
        self.flushed += 1
        self.spend(FLUSH_US)

    def spend(self, us, effect=lambda: None):
        if self.capturing is not None:
            self.capturing.append((us, effect))
        else:
            self.now += us * self.factor
            effect()

    def cuda(self):
        device = self

        class Graph:
            def __init__(self):
                self.work = []

            def replay(self):
                device.now += START_US + max(0.0, device.host_us - device.spinning_us)
                for us, effect in self.work:
                    device.spend(us, effect)

        class Event:
            def __init__(self, enable_timing):
                self.at = None

            def record(self):
                self.at = device.now

            def query(self):
                return device.host_us > device.spinning_us

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                device.factor *= 1.001
                return (end.at - self.at) / 1e3

        @contextlib.contextmanager
        def graph(g, stream=None):
            device.capturing = g.work
            yield
            device.capturing = None

        return SimpleNamespace(
            CUDAGraph=Graph,
            Event=Event,
            graph=graph,
            Stream=lambda d: None,
            stream=lambda s: contextlib.nullcontext(),
            set_device=lambda d: None,
            synchronize=lambda d=None: None,
            get_device_properties=lambda d: SimpleNamespace(L2_cache_size=L2),
            _sleep=device.sleep,
        )


class Case:
    """Holds "right" or not; launching sets it, when the device gets to it."""

    made = 0

    def __init__(self, problem, device, seed):
        self.value = None
        self.runs = 0
        Case.made += 1

    def poison(self):
        self.value = None

    def launch(self, module, config):
        module.launch(self, config)

    def run(self, module, config):
        self.poison()
        self.launch(module, config)

    def check(self):
        if self.value != "right":
            raise AssertionError("wrong")


@pytest.fixture
def device(monkeypatch):
    device = Device()

    fake = SimpleNamespace(
        cuda=device.cuda(),
        device=lambda name: SimpleNamespace(type="cuda", index=0),
        zeros=lambda *shape, device: torch.zeros(*shape),
        sum=lambda x, dim, out: device.flush(),
    )

    def launch(case, config):
        def effect():
            case.value = "right"
            case.runs += 1

        device.spend(config.us, effect)

    monkeypatch.setattr(measure, "torch", fake)
    monkeypatch.setattr(measure.testing, "case", Case)
    monkeypatch.setattr(measure.registry, "load", lambda name: SimpleNamespace(launch=launch))
    monkeypatch.setattr(measure.baselines, "function", lambda problem: lambda case: device.spend(7.0))
    return device


def config(us):
    return SimpleNamespace(us=us)


SMALL, LARGE = QuantizeProblem(m=16, k=1024), DequantProblem(m=1024, k=4096)


@pytest.mark.parametrize("problem", [SMALL, LARGE])
def test_reports_the_time_of_one_launch_without_graph_or_flush(device, problem):
    bench = measure.Bench(problem, "cuda")
    timed = [bench.record("k", config(us)) for us in (5.0, 2.5)]
    times = bench.rounds(timed, 20)
    assert times.shape == (20, 2)
    drift = device.factor
    assert drift > 1.02
    ratios = times[:, 0] / times[:, 1]
    assert np.median(ratios) == pytest.approx(2.0, rel=0.01)
    assert 5.0 <= np.median(times[:, 0]) <= 5.0 * drift


@pytest.mark.parametrize("problem", [SMALL, LARGE])
def test_a_graph_takes_each_set_of_operands_once_after_a_flush(device, problem):
    bench = measure.Bench(problem, "cuda")
    assert bench._flush.nbytes == measure.COLD_L2_TIMES * L2
    assert len(bench.cases) == measure.MAX_SETS or len(bench.cases) * problem.bytes >= measure.SETS_L2_TIMES * L2
    timed = bench.record("k", config(10.0))
    assert timed.launches == len(bench.cases)
    before, began, flushed = [c.runs for c in bench.cases], device.now, device.flushed
    us = bench._replay_us(timed)
    assert device.flushed == flushed + 1
    assert device.now - began >= us + FLUSH_US
    assert [c.runs for c in bench.cases] == [b + 1 for b in before]


def test_what_a_launch_leaves_behind_is_not_launched_on_within_a_graph(device, monkeypatch):
    """Right the first time only."""

    def launch(case, config):
        device.spend(10.0, lambda: setattr(case, "value", "right" if case.value is None else "wrong"))

    monkeypatch.setattr(measure.registry, "load", lambda name: SimpleNamespace(launch=launch))
    bench = measure.Bench(LARGE, "cuda")
    assert bench.record("k", config(10.0)).launches == len(bench.cases)


def test_rounds_are_interleaved_in_changing_order(device, monkeypatch):
    bench = measure.Bench(SMALL, "cuda")
    timed = [bench.record("k", config(us)) for us in (1.0, 2.0, 3.0)]
    seen = []
    monkeypatch.setattr(bench, "_replay_us", lambda t: seen.append(t.label) or 10.0)
    bench.rounds(timed, 10)
    rounds = [tuple(seen[i : i + 4]) for i in range(0, 40, 4)]
    assert all(len(set(r)) == 4 for r in rounds)
    assert len(set(rounds)) > 3


@pytest.mark.parametrize("host_us", [150.0, 1500.0])
def test_a_busy_host_is_waited_for(device, host_us):
    """What it takes to queue a graph is in no time: neither of a contender, nor of the empty graph."""
    bench = measure.Bench(SMALL, "cuda")
    timed = [bench.record("k", config(us)) for us in (1.0, 2.0)]
    device.host_us = host_us
    first = bench.rounds(timed, 1)
    device.host_us = 20.0
    np.testing.assert_allclose(np.median(first, 0), np.median(bench.rounds(timed, 9), 0), rtol=0.2)
    assert device.spinning_us < 200  # which it does not go on paying for


def test_a_host_that_never_keeps_up_is_an_error(device):
    bench = measure.Bench(SMALL, "cuda")
    timed = bench.record("k", config(1.0))
    device.host_us = 1e6
    with pytest.raises(RuntimeError, match="the host took longer than a spin of"):
        bench.rounds([timed], 1)


def test_what_is_wrong_only_in_the_graph_is_found(device, monkeypatch):
    def launch(case, config):
        device.spend(1.0, (lambda: None) if device.capturing is not None else lambda: setattr(case, "value", "right"))

    monkeypatch.setattr(measure.registry, "load", lambda name: SimpleNamespace(launch=launch))
    with pytest.raises(AssertionError, match="wrong"):
        measure.Bench(SMALL, "cuda").record("k", config(1.0))


def test_warming_comes_before_anything_else(device, monkeypatch):
    calls = []
    module = SimpleNamespace(
        warm=lambda problem, config: calls.append("warm"),
        launch=lambda case, config: (
            calls.append("launch") or device.spend(1.0, lambda: setattr(case, "value", "right"))
        ),
    )
    monkeypatch.setattr(measure.registry, "load", lambda name: module)
    measure.Bench(SMALL, "cuda").record("k", config(1.0))
    assert calls[0] == "warm"
    assert calls.count("warm") == 1


@pytest.mark.parametrize("problem", [SMALL, GemmProblem(m=16, n=4096, k=4096)])
def test_baselines_are_timed_the_same_way(device, problem):
    bench = measure.Bench(problem, "cuda")
    times = bench.rounds([bench.record("k", config(14.0)), bench.record_baseline()], 12)
    # eager code starts no graph, so it saves the few microseconds of starting one, over all its launches
    assert np.median(times[:, 0] / times[:, 1]) == pytest.approx(2.0, rel=0.05)


def test_what_a_graph_launches_lives_as_long_as_it(device):
    """cuBLAS's decoded weights were gone, and their addresses nobody's, once another contender was captured."""

    class Launch:
        def __call__(self, case):
            device.spend(1.0, lambda: None)

    launch = Launch()
    there = weakref.ref(launch)
    timed = measure.Bench(SMALL, "cuda").capture("k", launch)
    del launch
    gc.collect()
    assert there() is not None
    del timed
    gc.collect()
    assert there() is None


def test_a_cpu_is_no_device_to_measure_on():
    with pytest.raises(ValueError, match="needs a CUDA device, got cpu"):
        measure.Bench(SMALL, "cpu")
