"""Measuring candidates in a child: right times, and every accident turned into a rejection."""

import dataclasses

import numpy as np
import pytest

from tuner import evaluate, space, worker
from tuner.evaluate import DefaultFailed, Measured
from tuner.rejection import Rejected
from tuner.search import Task

from . import fake_bench, fake_kernel


@pytest.fixture
def task(fake, problem, monkeypatch):
    monkeypatch.setitem(fake_kernel.SPACE, "fault", ("none", "raise", "wrong", "crash", "hang", "poison"))
    return Task(space=space.of(problem, "sm_90a"), device="some-gpu")


@pytest.fixture
def child():
    w = worker.Worker()
    yield w
    w.close()


@pytest.fixture
def judge(task, child, monkeypatch):
    monkeypatch.setattr(evaluate, "COMPILE_S", 3.0)
    return Measured(task, "cuda:0", 9, child, backend=fake_bench)


def with_knobs(task, **knobs):
    return next(c for c in task.space.candidates if dict(c.knobs) == dict(task.space.default.knobs) | knobs)


def never(step, ratio):
    return False


def test_ratio_is_to_the_default_whatever_the_clocks_do(task, judge):
    fast = with_knobs(task, tile_m=32)
    assert judge.evaluate(fast, never) == pytest.approx(1 / 1.132, rel=0.01)
    assert judge.evaluate(task.space.default, never) == pytest.approx(1.0, rel=0.01)


def test_stops_when_told(task, judge):
    seen = []
    judge.evaluate(with_knobs(task, tile_m=32), lambda step, ratio: seen.append(step) or step == 3)
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("fault", "reason", "detail"),
    [
        ("wrong", "wrong", "3 of 9 elements are out of bound"),
        ("raise", "compile", "ValueError: does not compile"),
        ("crash", "crash", "SIGSEGV"),
        ("poison", "compile", "illegal memory access"),
    ],
)
def test_accidents_are_rejections_and_the_next_candidate_is_judged_soundly(task, judge, fault, reason, detail):
    result = judge.evaluate(with_knobs(task, fault=fault), never)
    assert isinstance(result, Rejected)
    assert result.reason == reason
    assert detail in result.detail
    assert "\n" not in result.detail
    assert judge.evaluate(with_knobs(task, tile_m=32), never) == pytest.approx(1 / 1.132, rel=0.01)


def test_a_hanging_kernel_is_ended(task, judge):
    judge.evaluate(task.space.default, never)  # the child is up
    result = judge.evaluate(with_knobs(task, fault="hang"), never)
    assert isinstance(result, Rejected)
    assert result.reason == "timeout"
    assert judge.evaluate(task.space.default, never) == pytest.approx(1.0, rel=0.01)


def test_final_rounds_are_side_by_side_with_the_baseline(task, judge):
    default, fast = task.space.default, with_knobs(task, tile_m=32)
    samples = judge.time([default, fast], 30, baseline=True)
    assert set(samples) == {default, fast, "cublas_bf16"}
    assert np.median(samples[fast] / samples[default]) == pytest.approx(1 / 1.132, rel=0.005)
    assert np.ptp(np.log(samples[default])) > 0.04  # the drift is there, and the same for all


def test_a_finalist_that_fails_now_is_left_out(task, judge, caplog):
    default, bad = task.space.default, with_knobs(task, fault="crash")
    samples = judge.time([default, bad, with_knobs(task, tile_m=32)], 12)
    assert set(samples) == {default, with_knobs(task, tile_m=32)}
    assert "passed before and fails now" in caplog.text


def test_a_broken_default_is_no_candidate_but_a_failure(fake, problem, child, monkeypatch):
    monkeypatch.setitem(fake_kernel.SPACE, "fault", ("none", "wrong"))
    whole = space.of(problem, "sm_90a")
    broken = next(c for c in whole.candidates if dict(c.knobs) == dict(whole.default.knobs) | {"fault": "wrong"})
    task = Task(space=dataclasses.replace(whole, default=broken), device="some-gpu")
    judge = Measured(task, "cuda:0", 3, child, backend=fake_bench)
    with pytest.raises(DefaultFailed, match="out of bound"):
        judge.evaluate(whole.default, never)


def test_no_device_is_a_failure(task, child):
    judge = Measured(task, "cuda:absent", 3, child, backend=fake_bench)
    with pytest.raises(DefaultFailed, match="no such"):
        judge.evaluate(task.space.default, never)


def test_a_child_serves_one_task_after_another(fake, problem, child):
    tasks = [Task(space=space.of(dataclasses.replace(problem, m=m), "sm_90a"), device="some-gpu") for m in (16, 64)]
    judges = [Measured(t, "cuda:0", 5, child, backend=fake_bench) for t in tasks]
    first, second = (j.evaluate(with_knobs(t, tile_m=32), never) for t, j in zip(tasks, judges, strict=True))
    assert first == pytest.approx(second, rel=0.02)
