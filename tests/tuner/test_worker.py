"""Children that crash, hang, raise and are replaced."""

import os
import signal
import time

import pytest

from tuner import worker


def add(a, b):
    return a + b


def pid():
    return os.getpid()


def fail():
    raise ValueError("first line\nsecond line")


def die(how):
    if how == "exit":
        os._exit(7)
    os.kill(os.getpid(), getattr(signal, how))


def sleep(seconds):
    time.sleep(seconds)
    return seconds


@pytest.fixture
def child():
    w = worker.Worker()
    yield w
    w.close()


def test_one_child_serves_many_calls(child):
    assert child.call(add, 1, 2, timeout=30) == 3
    assert child.call(pid, timeout=30) == child.call(pid, timeout=30) != os.getpid()


def test_a_child_that_was_woken_answers(child):
    child.wake()
    assert child.call(add, 1, 2, timeout=30) == 3


def test_what_the_function_raises_comes_back(child):
    before = child.call(pid, timeout=30)
    with pytest.raises(worker.RemoteError, match="first line\nsecond line") as e:
        child.call(fail, timeout=30)
    assert e.value.kind == "ValueError"
    assert child.call(pid, timeout=30) == before  # an exception is no reason for a new child


@pytest.mark.parametrize(("how", "message"), [("exit", "exit code 7"), ("SIGSEGV", "SIGSEGV")])
def test_a_crash_is_told_and_the_next_call_gets_a_new_child(child, how, message):
    with pytest.raises(worker.WorkerDied, match=message) as e:
        child.call(die, how, timeout=30)
    assert e.value.reason == "crash"
    assert child.call(add, 1, 1, timeout=30) == 2


def test_a_hang_is_ended(child):
    first = child.call(pid, timeout=30)
    began = time.monotonic()
    with pytest.raises(worker.WorkerDied, match="no answer within 1 s") as e:
        child.call(sleep, 600, timeout=1)
    assert e.value.reason == "timeout"
    assert time.monotonic() - began < 5
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


@pytest.mark.parametrize("seconds", [120, 0.01])
def test_a_child_that_never_comes_up_is_no_fault_of_the_call(child, monkeypatch, seconds):
    monkeypatch.setattr(worker, "START_S", seconds)
    monkeypatch.setattr(worker, "_serve", die)  # dies on being given a pipe in place of the name of a signal
    with pytest.raises(worker.StartFailed, match=r"exit code 1 before it was ready|not ready within 0 s"):
        child.call(add, 1, 1, timeout=30)


def test_a_pool_tells_which_call_crashed_or_hung():
    calls = [(add, (i, i)) for i in range(6)] + [(die, ("SIGSEGV",)), (fail, ()), (sleep, (600,))]
    results = dict(worker.run_all(calls, jobs=2, timeout=2))
    assert [results[i] for i in range(6)] == [0, 2, 4, 6, 8, 10]
    assert (results[6].reason, results[7].kind, results[8].reason) == ("crash", "ValueError", "timeout")


def test_closing_a_pool_early_ends_its_children():
    done = worker.run_all([(pid, ())] + [(sleep, (600,))] * 3, jobs=2, timeout=600)
    _, first = next(done)
    done.close()
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_pool_ends_when_patience_does_whatever_its_children_are_at():
    calls, found, ended = [(pid, ()), (sleep, (600,)), (sleep, (600,))], {}, []

    def patience():
        return 1 + ended[0] - time.monotonic() if ended else 60

    for index, result in worker.run_all(calls, jobs=1, timeout=600, patience=patience):
        found[index] = result
        ended.append(time.monotonic())
    assert list(found) == [0]
    assert 1 <= time.monotonic() - ended[0] < 30
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


@pytest.fixture
def pool():
    p = worker.Pool(1, timeout=30)
    yield p
    p.close()


def test_a_background_pool_takes_the_lowest_turn_first(pool, tmp_path):
    told = tmp_path / "told"
    first = pool.submit(0, sleep, 0.5)  # keeps the one child busy while the others are handed in
    late, early, second = (pool.submit(turn, tell, str(told), f"{turn} ") for turn in (2, 1, 2))
    assert [c.future.result(60) for c in (first, late, early, second)] == [0.5, None, None, None]
    assert told.read_text() == "1 2 2 "


def test_a_call_can_be_hastened_or_left_behind_and_runs_once(pool, tmp_path):
    told = tmp_path / "told"
    pool.submit(0, sleep, 0.5)
    calls = [pool.submit(turn, tell, str(told), f"{turn} ") for turn in (0, 1, 2, 3)]
    pool.hasten(calls[2], -1)
    pool.leave_behind(2)
    assert calls[3].future.result(60) is None
    assert told.read_text() == "2 3 "  # 2 before its turn and once, 0 and 1 not at all
    pool.hasten(calls[0], -1)
    assert calls[0].future.result(60) is None
    assert told.read_text() == "2 3 0 "


def tell(path, text):
    with open(path, "a") as f:
        f.write(text)


def test_a_background_pool_hands_over_what_happened(pool):
    results = [pool.submit(0, *call).future for call in ((add, 1, 2), (fail,), (die, "SIGSEGV"), (add, 3, 4))]
    assert (results[0].result(60), results[3].result(60)) == (3, 7)
    assert results[1].exception(60).kind == "ValueError"
    assert results[2].exception(60).reason == "crash"


def test_a_background_pool_works_while_its_owner_does_not(pool):
    assert pool.submit(0, add, 0, 0).future.result(60) == 0
    done = pool.submit(0, add, 1, 1).future
    time.sleep(1)
    assert done.done()


def test_closing_a_background_pool_ends_what_runs_and_what_waits():
    pool = worker.Pool(2, timeout=600)
    child = pool.submit(0, pid).future.result(60)
    running = [pool.submit(0, sleep, 600).future for _ in range(2)]
    waiting = pool.submit(1, add, 1, 1).future
    time.sleep(0.2)
    began = time.monotonic()
    pool.close()
    assert time.monotonic() - began < 10
    assert not waiting.done()
    assert not any(f.done() and f.exception() is None for f in running)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
