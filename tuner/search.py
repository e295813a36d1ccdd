"""The search for one problem: an Optuna study that any number of processes may work on, stop and resume.

A trial is one candidate. Its value is its time relative to the default's, taken in the same rounds, so that trials of
different hosts compare; a rejection is a violated constraint. The default and other seeds come first; then, if the
budget does not cover the whole space, the sampler (TPE) proposes. No candidate is evaluated twice: a proposal that
repeats one, or that no kernel supports, is answered with a candidate near it that is still untried. Several may be in
hand at a time, being compiled while one is timed.
"""

import functools
import hashlib
import json
import logging
import math
import os
import socket
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from fp4suite import registry
from fp4suite.problem import Problem

from . import provenance
from .builds import prepared
from .rejection import Rejected
from .space import Candidate, Knob, Space

log = logging.getLogger(__name__)

PROTOCOL = 1  # raised whenever a change of search or measuring makes old trials useless
STALE_S = 900.0  # a trial of another host that has run for so long is taken to be lost
PRUNE_P = 0.01  # a candidate that is slower with this confidence is not timed further
PRUNE_AFTER = 5  # rounds
GRPC_PORT = 13000  # what optuna.storages.run_grpc_proxy_server listens on by default
AVOID = 6.0  # steps it is worth going to avoid a knob value that has always been rejected
optuna.logging.set_verbosity(optuna.logging.WARNING)
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


class Evaluator(Protocol):
    """Judges candidates: time over the default's, or why not.

    `stop(step, ratio)` takes a round's ratio and returns True when further rounds are not worth it.
    """

    def evaluate(self, candidate: Candidate, stop: Callable[[int, float], bool]) -> float | Rejected: ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """A problem on a target. `seeds` are tried first, in this order; `incumbent` is what the table says of it, unless
    that is the default."""

    space: Space
    device: str
    layers: tuple[str, ...] = ()
    count: int = 1
    seeds: tuple[Candidate, ...] = ()
    incumbent: Candidate | None = None

    @property
    def problem(self) -> Problem:
        return self.space.problem

    @property
    def arch(self) -> str:
        return self.space.arch

    @property
    def study_name(self) -> str:
        """Another name for another kernel source, space, compiler or protocol: trials of those are no evidence."""
        parts = {
            "sources": {k: registry.source_hash(k) for k in self.space.choices},
            "space": {k: {n: list(v) for n, v in knobs.items()} for k, knobs in self.space.choices.items()},
            "versions": provenance.compilers(),
            "protocol": PROTOCOL,
        }
        if self.space.agreed is not None:
            parts["agreed"] = self.space.agreed
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
        return f"{self.device} {self.problem.op} {self.problem} {digest}"


@dataclass(frozen=True, slots=True, eq=False)
class _InHand:
    """A claimed candidate, which can be evaluated as soon as it is prepared."""

    trial: Trial
    candidate: Candidate
    prepared: "Future[Rejected | None]"


class Search:
    """One worker's hold on the study of a task. `trials` is the study's budget, all workers together."""

    def __init__(self, task: Task, storage: BaseStorage, trials: int, seed: int = 0) -> None:
        if trials < 1:
            raise ValueError(f"trials must be at least 1, got {trials}")
        self.task = task
        self.space = task.space
        self._known = {_key(c.params): c for c in self.space.candidates}
        self.trials = min(trials, len(self._known))
        with warnings.catch_warnings():  # group and WilcoxonPruner are experimental in Optuna 5
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self.study: Study = optuna.create_study(
                study_name=task.study_name,
                storage=storage,
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, group=len(self.space.choices) > 1),
                pruner=optuna.pruners.WilcoxonPruner(p_threshold=PRUNE_P, n_startup_steps=PRUNE_AFTER),
            )
        self._seed_study()
        self._revive_lost()

    def run(
        self,
        judge: Evaluator,
        *,
        deadline: float = math.inf,
        latest: float | None = None,
        after: Callable[[], None] = lambda: None,
        begin: Callable[[Candidate], "Future[Rejected | None]"] = lambda candidate: prepared(),
        depth: int = 1,
    ) -> None:
        """Evaluate until the budget is spent or `deadline` (time.monotonic) has passed. `after` follows each trial.

        latest: how long to wait for a first candidate, should that be later than `deadline`.
        begin: starts to prepare a candidate; when that has ended, the candidate is evaluated, or rejected for what the
        future says. depth: candidates in hand at a time, of which the first that is prepared is evaluated.
        """
        hand: list[_InHand] = []
        try:
            until = deadline if latest is None or self.evaluated() else max(deadline, latest)
            while time.monotonic() < until:
                while len(hand) < depth and time.monotonic() < until and (claimed := self._claim()) is not None:
                    hand.append(_InHand(*claimed, begin(claimed[1])))
                ready = _first_ready(hand, until)
                if ready is None:
                    return
                self._evaluate(ready, judge)
                hand.remove(ready)
                after()
                until = deadline
        finally:
            for left in hand:
                self._put_back(left.trial.number, left.candidate.params)

    def _evaluate(self, ready: "_InHand", judge: Evaluator) -> None:
        trial, candidate = ready.trial, ready.candidate
        result = ready.prepared.result() or judge.evaluate(candidate, functools.partial(_reported, trial))
        if isinstance(result, Rejected):
            trial.set_constraint(result.reason, result.by)
            trial.set_user_attr("detail", result.detail)
            self.study.tell(trial, state=TrialState.PRUNED)
            log.info("%s: %s: %s", candidate, result.reason, result.detail)
        else:
            self.study.tell(trial, result)

    def feasible(self) -> list[tuple[Candidate, float]]:
        """Candidates with a time, fastest first; equals in the order of the space."""
        best: dict[Candidate, float] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            candidate = self._known.get(_key(_params(trial)))
            if candidate is not None and not _violated(trial) and trial.value is not None:
                best[candidate] = min(trial.value, best.get(candidate, float("inf")))
        order = {c: i for i, c in enumerate(self.space.candidates)}
        return sorted(best.items(), key=lambda item: (item[1], order[item[0]]))

    def rejected(self) -> dict[str, int]:
        """How many candidates are out, by reason."""
        reasons = {c: why for c, why, _ in self._rejections()}
        return dict(sorted(Counter(reasons.values()).items()))

    def why_rejected(self, candidate: Candidate) -> Rejected | None:
        """The rejection of one candidate, if there was one."""
        for c, reason, detail in self._rejections():
            if c == candidate:
                return Rejected(reason, detail)
        return None

    def evaluated(self) -> int:
        """Candidates with a result."""
        return len(self._by_state(DONE))

    def may_end(self) -> bool:
        """Whether enough was tried for a final: without what the table says so far, a loser might replace that."""
        tried = self._by_state(DONE)
        return bool(tried) and (self.task.incumbent is None or self.task.incumbent in tried)

    def running_elsewhere(self) -> bool:
        """Whether another live worker has a trial of this study in hand."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return any(not _lost(t) for t in running)

    def _rejections(self) -> list[tuple[Candidate, str, str]]:
        found = []
        for trial in self.study.get_trials(deepcopy=False, states=DONE):
            candidate = self._known.get(_key(_params(trial)))
            for reason in _violated(trial):
                if candidate is not None:
                    found.append((candidate, reason, str(trial.user_attrs.get("detail", ""))))
        return found

    def _claim(self) -> tuple[Trial, Candidate] | None:
        """A trial of a candidate that nobody has evaluated or has in hand, or None when the budget is spent."""
        while True:
            taken = self._by_state((*DONE, TrialState.RUNNING))
            if len(taken) >= self.trials:
                return None
            trial = self.study.ask()
            trial.set_user_attr("worker", _me())
            candidate = self._known.get(_key(self._suggest(trial)))
            if candidate is not None and candidate not in taken:
                return trial, candidate
            if candidate is None:
                trial.set_constraint("unsupported", 1.0)
                self.study.tell(trial, state=TrialState.PRUNED)
            else:
                self.study.tell(trial, state=TrialState.FAIL)  # a repetition, of which the sampler learns nothing
            near = candidate or self.space.default
            waiting = self._by_state((TrialState.WAITING,))
            untried = [c for c in self.space.candidates if c not in taken and c not in waiting]
            if untried:
                self.study.enqueue_trial(self._most_promising(near, untried).params)

    def _most_promising(self, near: Candidate, untried: list[Candidate]) -> Candidate:
        """The untried candidate nearest to `near`, away from knob values that have led to rejections."""
        bad: Counter[tuple[str, Knob]] = Counter()
        seen: Counter[tuple[str, Knob]] = Counter()
        for trial in self.study.get_trials(deepcopy=False, states=DONE):
            candidate = self._known.get(_key(_params(trial)))
            if candidate is not None:
                seen.update(candidate.knobs)
                bad.update(candidate.knobs if _violated(trial) else ())

        def cost(c: Candidate) -> float:
            return self.space.steps(c, near) + AVOID * max(
                (bad[k] / seen[k] for k in c.knobs if k in seen), default=0.0
            )

        return min(untried, key=cost)

    def _suggest(self, trial: Trial) -> dict[str, Knob]:
        kernels = sorted(self.space.choices)
        kernel = str(trial.suggest_categorical("kernel", kernels))
        params: dict[str, Knob] = {"kernel": kernel}
        for name, values in self.space.choices[kernel].items():
            params[f"{kernel}.{name}"] = trial.suggest_categorical(f"{kernel}.{name}", values)
        return params

    def _seed_study(self) -> None:
        """Queue the seeds, once a study. Two workers that start at once may both do so: repetitions cost nothing."""
        if self.study.user_attrs.get("seeded"):
            return
        for candidate in dict.fromkeys((self.space.default, *self.task.seeds)):
            if len(self._by_state((TrialState.WAITING,))) >= self.trials:
                break
            self.study.enqueue_trial(candidate.params)
        self.study.set_user_attr("seeded", True)

    def _revive_lost(self) -> None:
        """Queue again what a worker that is no more had in hand."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _lost(trial):
                self._put_back(trial.number, _params(trial))

    def _put_back(self, number: int, params: dict[str, Any]) -> None:
        """Queue what a trial was about again, in another trial."""
        self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        if _key(params) in self._known:
            self.study.enqueue_trial(params)

    def _by_state(self, states: tuple[TrialState, ...]) -> set[Candidate]:
        trials = self.study.get_trials(deepcopy=False, states=states)
        return {c for t in trials if (c := self._known.get(_key(_params(t)))) is not None}


def open_storage(where: str | Path) -> BaseStorage:
    """A URL (RDB, or grpc://host:port), or the path of a journal file, which is made if need be.

    A journal that a killed process left with half a last line is mended: the half line is cut off.

    Raises ValueError for a URL that leads nowhere, or to a kind of database that has no driver here.
    """
    text = str(where)
    if "://" in text:
        return _open_url(text)
    path = Path(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _mend(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _open_url(url: str) -> BaseStorage:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if not url.startswith("grpc://"):
            return optuna.storages.RDBStorage(url)
        host, _, port = url.removeprefix("grpc://").partition(":")
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port or GRPC_PORT))
        proxy.wait_server_ready(timeout=10)
        return proxy
    except (ImportError, SQLAlchemyError, ConnectionError) as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ValueError(f"--storage {url}: {reason}") from e


def _mend(path: Path) -> None:
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        with path.open("rb+") as f:
            text = f.read()
            whole = text.rfind(b"\n") + 1
            if whole != len(text):
                log.warning("%s: cut off %d bytes of a line that was never finished", path, len(text) - whole)
                f.truncate(whole)
    finally:
        lock.release()


def _first_ready(hand: list[_InHand], deadline: float) -> _InHand | None:
    """The first that is prepared, once one is; None if there are none, or none in time."""
    if not any(x.prepared.done() for x in hand):
        patience = None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())
        futures.wait([x.prepared for x in hand], patience, futures.FIRST_COMPLETED)
    return next((x for x in hand if x.prepared.done()), None)


def _reported(trial: Trial, step: int, ratio: float) -> bool:
    """Tell the pruner; True if the trial is slower beyond doubt.

    A millionth is added, different for each trial and step: on tied differences SciPy's test enumerates permutations,
    which takes a second a call.
    """
    trial.report(ratio + 1e-6 * ((trial.number * (step + 1) * 0.6180339887) % 1.0), step)
    return trial.should_prune()


def _params(trial: FrozenTrial) -> dict[str, Any]:
    """What a trial runs, or will run if it still waits."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _key(params: dict[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


def _violated(trial: FrozenTrial) -> list[str]:
    return [name for name, value in trial.constraints.items() if value > 0]


def _me() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "born": _born(os.getpid())}


def _born(pid: int) -> str | None:
    """When a process of this host began, in its kernel's own units; None if it is no more. Tells reused ids apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return stat.rpartition(")")[2].split()[19]


def _lost(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial is gone."""
    owner = trial.user_attrs.get("worker")
    if owner is not None and owner["host"] == socket.gethostname():
        return _born(owner["pid"]) != owner["born"]
    begun = trial.datetime_start
    return begun is not None and (datetime.now() - begun).total_seconds() > STALE_S
