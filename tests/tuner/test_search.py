"""The search: finds, rejects, never repeats, resumes after a kill, and shares a study among workers."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future

import optuna
import pytest

from fp4suite.problem import GemmProblem
from tuner import space
from tuner.rejection import Rejected
from tuner.search import Search, Task, open_storage

from . import fake_kernel


class Judge:
    """Knows the landscape; counts what it is asked. Stores steps for the pruner as a measuring judge does."""

    def __init__(self, rounds=8, pause=0.0):
        self.asked = []
        self.rounds = rounds
        self.pause = pause
        self.steps = 0

    def evaluate(self, candidate, stop):
        self.asked.append(candidate)
        time.sleep(self.pause)
        config = candidate.config
        reason = {"raise": "compile", "wrong": "wrong", "spill": "fit"}.get(config.fault)
        if reason is not None:
            return Rejected(reason, f"it is {config.fault}")
        ratio = fake_kernel.true_us(config) / fake_kernel.true_us(fake_kernel.Config())
        for step in range(self.rounds):
            self.steps += 1
            if stop(step, ratio * (1 + 0.001 * ((step * 7) % 5))):
                break
        return ratio


def task_of(problem, seeds=()):
    return Task(space=space.of(problem, "sm_90a"), device="some-gpu", seeds=seeds)


def search_of(problem, trials, storage=None, **kwargs):
    return Search(task_of(problem), storage or optuna.storages.InMemoryStorage(), trials, **kwargs)


def test_finds_a_good_config_in_a_fraction_of_the_space(fake, problem):
    search, judge = search_of(problem, trials=70), Judge()
    search.run(judge)
    assert len(judge.asked) == 70 < len(search.space.candidates) / 5
    best, ratio = search.feasible()[0]
    assert fake_kernel.true_us(best.config) <= 10.0 * 1.132  # the best of 384, or one step from it
    assert ratio < 0.7


def test_default_is_tried_first_then_the_seeds(fake, problem):
    whole = space.of(problem, "sm_90a")
    seeds = tuple(whole.neighbours(whole.default))[:3]
    search, judge = Search(task_of(problem, seeds), optuna.storages.InMemoryStorage(), 6), Judge()
    search.run(judge)
    assert tuple(judge.asked[:4]) == (whole.default, *seeds)


def test_no_candidate_is_evaluated_twice_and_a_large_budget_covers_the_space(fake):
    search, judge = search_of(GemmProblem(m=16, n=32, k=512), trials=10_000), Judge(rounds=1)
    search.run(judge)
    assert sorted(map(str, judge.asked)) == sorted(map(str, search.space.candidates))
    assert search.evaluated() == len(search.space.candidates) == 96


def test_rejections_are_counted_by_reason_and_never_win(fake):
    search = search_of(GemmProblem(m=16, n=32, k=512), trials=96)
    search.run(Judge(rounds=1))
    assert search.rejected() == {"compile": 24, "fit": 24, "wrong": 24}
    assert all(c.config.fault == "none" for c, _ in search.feasible())
    bad = next(c for c in search.space.candidates if c.config.fault == "wrong")
    assert search.why_rejected(bad) == Rejected("wrong", "it is wrong")
    assert search.why_rejected(search.space.default) is None


def test_sampler_learns_to_avoid_violated_constraints(fake, problem):
    search, judge = search_of(problem, trials=120, seed=3), Judge(rounds=1)
    search.run(judge)
    sampled = [c.config.fault for c in judge.asked]
    early, late = sampled[:30], sampled[60:]
    assert late.count("none") / len(late) > early.count("none") / len(early)
    assert late.count("none") / len(late) > 0.5  # chance gives a quarter


def test_a_clearly_slower_candidate_is_not_timed_to_the_end(fake, problem):
    search, judge = search_of(problem, trials=30), Judge(rounds=16)
    search.run(judge)
    timed = sum(c.config.fault == "none" for c in judge.asked)
    assert judge.steps < 0.9 * 16 * timed
    best = search.study.best_trial
    assert len(best.intermediate_values) == 16


def test_unsupported_proposals_cost_no_budget(fake):
    problem = GemmProblem(m=16, n=64, k=512)
    search, judge = search_of(problem, trials=60), Judge(rounds=1)
    search.run(judge)
    assert len(judge.asked) == 60
    assert all(c.config.tile_n <= 64 for c in judge.asked)


def test_deadline_ends_the_search(fake, problem):
    search, judge = search_of(problem, trials=100), Judge(rounds=1, pause=0.05)
    began = time.monotonic()
    search.run(judge, deadline=began + 0.5)
    assert time.monotonic() - began < 3
    assert 0 < len(judge.asked) < 100


class Compiler:
    """Prepares candidates when told to; keeps what was begun, in order."""

    def __init__(self):
        self.begun = {}

    def begin(self, candidate):
        return self.begun.setdefault(candidate, Future())


def test_others_are_timed_while_one_is_compiled(fake, problem):
    compiler = Compiler()

    class Watching(Judge):
        def evaluate(self, candidate, stop):
            assert len(compiler.begun) >= 4  # more are being compiled meanwhile
            if len(self.asked) == 5:
                compiler.begun[search.space.default].set_result(None)
            return super().evaluate(candidate, stop)

    def begin(candidate):
        future = compiler.begin(candidate)
        if candidate != search.space.default:
            future.set_result(None)
        return future

    search, judge = search_of(problem, trials=12), Watching(rounds=1)
    search.run(judge, deadline=time.monotonic() + 60, begin=begin, depth=4)
    assert len(judge.asked) == len(set(judge.asked)) == 12
    assert judge.asked.index(search.space.default) == 6  # as soon as it was there, before those claimed after it


def test_what_does_not_compile_is_rejected_without_a_look(fake, problem):
    search, judge = search_of(problem, trials=8), Judge(rounds=1)
    crash = Rejected("crash", "compiling: the process ended with signal SIGSEGV")
    bad = []

    def begin(candidate):
        future = Future()
        future.set_result(crash if len(bad) < 2 and candidate != search.space.default else None)
        bad.extend([candidate] if future.result() else [])
        return future

    search.run(judge, begin=begin, depth=3)
    assert search.rejected()["crash"] == 2
    assert search.why_rejected(bad[0]) == crash
    assert search.evaluated() == 8
    assert len(judge.asked) == 6
    assert not set(bad) & set(judge.asked)


def test_deadline_ends_the_wait_for_a_compiler_and_nothing_is_lost(fake, problem):
    whole = space.of(problem, "sm_90a")
    seeds = tuple(whole.neighbours(whole.default))[:3]
    storage = optuna.storages.InMemoryStorage()
    search, judge = Search(task_of(problem, seeds), storage, 10), Judge(rounds=1)
    began = time.monotonic()
    search.run(judge, deadline=began + 0.5, begin=Compiler().begin, depth=3)
    assert 0.4 < time.monotonic() - began < 5
    assert not judge.asked
    assert not search.running_elsewhere()
    Search(task_of(problem, seeds), storage, 10).run(judge, depth=3)
    assert len(judge.asked) == len(set(judge.asked)) == 10
    assert {whole.default, *seeds} <= set(judge.asked)


def test_a_first_result_is_waited_for_beyond_the_deadline_and_no_second(fake, problem):
    search, judge, compiler = search_of(problem, trials=10), Judge(rounds=1), Compiler()
    began = time.monotonic()
    later = threading.Timer(0.5, lambda: [f.set_result(None) for f in compiler.begun.values()])
    later.start()
    search.run(judge, deadline=began + 0.1, latest=began + 60, begin=compiler.begin, depth=3)
    later.join()
    assert 0.4 < time.monotonic() - began < 5
    assert len(judge.asked) == search.evaluated() == 1
    search.run(judge, deadline=began + 0.1, latest=began + 60, begin=compiler.begin, depth=3)
    assert search.evaluated() == 1


def test_an_error_loses_nothing_that_was_in_hand(fake, problem):
    storage = optuna.storages.InMemoryStorage()

    class Breaking(Judge):
        def evaluate(self, candidate, stop):
            if len(self.asked) == 3:
                raise RuntimeError("the default is wrong")
            return super().evaluate(candidate, stop)

    first, second = Breaking(rounds=1), Judge(rounds=1)
    with pytest.raises(RuntimeError, match="the default is wrong"):
        search_of(problem, 12, storage).run(first, depth=4)
    search = search_of(problem, 12, storage)
    assert not search.running_elsewhere()
    search.run(second, depth=4)
    assert (len(first.asked), len(second.asked)) == (3, 9)
    assert not set(first.asked) & set(second.asked)


def test_a_later_run_adds_only_what_is_missing(fake, problem, tmp_path):
    path = tmp_path / "journal.log"
    first, second = Judge(), Judge()
    search_of(problem, 20, open_storage(path)).run(first)
    search_of(problem, 20, open_storage(path)).run(second)
    assert (len(first.asked), len(second.asked)) == (20, 0)
    search_of(problem, 30, open_storage(path)).run(second)
    assert len(second.asked) == 10
    assert not set(first.asked) & set(second.asked)


def test_a_database_keeps_trials_as_a_journal_does(fake, problem, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    first, second = Judge(rounds=2), Judge(rounds=2)
    search_of(problem, 8, open_storage(url)).run(first)
    search_of(problem, 12, open_storage(url)).run(second)
    assert (len(first.asked), len(second.asked)) == (8, 4)
    assert not set(first.asked) & set(second.asked)


@pytest.mark.parametrize("url", ["sqlite:////no/such/folder/x.db", "nothing://here", "grpc://127.0.0.1:1"])
def test_a_storage_that_leads_nowhere_is_one_sentence(url, monkeypatch):
    if url.startswith("grpc"):
        monkeypatch.setattr(optuna.storages, "GrpcStorageProxy", no_server)
    with pytest.raises(ValueError, match=f"--storage {url}: ") as e:
        open_storage(url)
    assert "\n" not in str(e.value)


def no_server(host, port):
    assert (host, port) == ("127.0.0.1", 1)
    raise ImportError("Tried to import 'grpc' but failed.\nInstall it.")


def test_another_source_or_compiler_is_another_study(fake, problem, monkeypatch):
    from fp4suite import registry
    from tuner import provenance

    names = {task_of(problem).study_name}
    monkeypatch.setattr(registry, "source_hash", lambda name: "0123456789ab")
    names.add(task_of(problem).study_name)
    monkeypatch.setattr(provenance, "compilers", lambda: {"torch": "9.9"})
    names.add(task_of(problem).study_name)
    assert len(names) == 3


def test_a_budget_of_nothing_is_refused(fake, problem):
    with pytest.raises(ValueError, match="trials must be at least 1, got 0"):
        search_of(problem, 0)


# --- processes ---

KILLED = """
import sys, time
from tests.tuner.conftest import FAKE
from fp4suite import registry
registry.KERNELS[:] = [FAKE]
from tests.tuner.test_search import Judge, search_of
from tuner.search import open_storage
from fp4suite.problem import GemmProblem

class Stuck(Judge):
    def evaluate(self, candidate, stop):
        if len(self.asked) == 5:
            print("stuck", flush=True)
            time.sleep(600)
        return super().evaluate(candidate, stop)

search_of(GemmProblem(m=16, n=512, k=512), 20, open_storage(sys.argv[1])).run(Stuck(rounds=1), depth=int(sys.argv[2]))
"""


@pytest.mark.parametrize("depth", [1, 4])
def test_resumes_after_a_kill_with_nothing_lost(fake, problem, tmp_path, depth):
    path = tmp_path / "journal.log"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(path), str(depth)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "stuck\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    with path.open("ab") as f:
        f.write(b'{"op_code":7,"worker')  # as if it had been killed while writing

    search, judge = search_of(problem, 20, open_storage(path)), Judge(rounds=1)
    assert search.evaluated() == 5
    search.run(judge)
    assert len(judge.asked) == 15
    assert search.evaluated() == 20
    assert not search.running_elsewhere()


def work(path, trials, queue, start):
    from fp4suite import registry

    from .conftest import FAKE

    registry.KERNELS[:] = [FAKE]
    judge = Judge(rounds=3, pause=0.02)
    search = search_of(GemmProblem(m=16, n=512, k=512), trials, open_storage(path))
    start.wait(120)  # importing takes seconds, and longer for one than for the other
    search.run(judge)
    queue.put((os.getpid(), [str(c) for c in judge.asked]))


def test_two_workers_share_a_study(fake, problem, tmp_path):
    path = tmp_path / "journal.log"
    open_storage(path)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    start = context.Barrier(2)
    workers = [context.Process(target=work, args=(path, 40, queue, start)) for _ in range(2)]
    for w in workers:
        w.start()
    done = dict(queue.get(timeout=120) for _ in workers)
    for w in workers:
        w.join(30)
        assert w.exitcode == 0
    asked = [c for each in done.values() for c in each]
    assert all(len(each) >= 5 for each in done.values())  # both took part
    assert len(set(asked)) >= 40
    # two may claim the same candidate in the same instant, which costs time but harms nothing; it has to be rare
    assert len(asked) - len(set(asked)) <= 4
    search = search_of(problem, 40, open_storage(path))
    assert search.evaluated() == len(set(asked))
    assert not search.running_elsewhere()
