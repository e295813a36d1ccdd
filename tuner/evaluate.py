"""The two judges of candidates: measured on a GPU, predicted without one."""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from fp4suite.built import Resources

from . import cost_model, measure, worker
from .builds import Build
from .rejection import Rejected
from .search import Task
from .space import Candidate
from .stats import Samples

log = logging.getLogger(__name__)

COMPILE_S = 300.0  # compiling, launching and checking one candidate
ROUND_S = 60.0  # a round takes milliseconds; a kernel that hangs only now and then is found by this
DEFAULT = 0  # the number under which the child knows the default


class DefaultFailed(RuntimeError):
    """The default cannot be what everything else is compared with: a broken kernel, not a bad candidate."""


class Predicted:
    """Compiles nothing itself: looks up what `builds.compile_all` found, and asks the cost model."""

    def __init__(self, task: Task, compiled: Mapping[Build, Resources | Rejected]) -> None:
        self._task = task
        self._compiled = compiled
        why = self._refusal(task.space.default)
        if why is not None:
            raise DefaultFailed(f"{task.space.default} for {task.problem.op} ({task.problem}): {why.detail}")
        self.default_us = self.us(task.space.default)

    def evaluate(self, candidate: Candidate) -> float | Rejected:
        """Predicted time over the default's."""
        return self._refusal(candidate) or self.us(candidate) / self.default_us

    def us(self, candidate: Candidate) -> float:
        """Predicted microseconds of a candidate that fits."""
        resources = self._compiled[build_of(self._task, candidate)]
        assert isinstance(resources, Resources)
        return cost_model.predict_us(self._task.problem, candidate.config, self._task.arch, resources)

    def _refusal(self, candidate: Candidate) -> Rejected | None:
        found = self._compiled[build_of(self._task, candidate)]
        if isinstance(found, Rejected):
            return found
        why = found.refusal(self._task.arch)
        return Rejected("fit", why, by=1.0 + found.spill_bytes) if why is not None else None


class Measured:
    """Times candidates of one task on `device` ("cuda:0"), against the default, in `child`.

    The child outlives the task: it has imported everything and keeps what it compiled. backend holds the functions that
    run in it, `measure` unless a test gives another.
    """

    def __init__(
        self,
        task: Task,
        device: str,
        rounds: int,
        child: worker.Worker,
        *,
        seed: int = 0,
        backend: ModuleType | None = None,
    ) -> None:
        self._task = task
        self._device = device
        self._rounds = rounds
        self._seed = seed
        self._backend = backend or measure
        self._child = child
        self._numbers = 0
        self._open = False

    def evaluate(self, candidate: Candidate, stop: Callable[[int, float], bool]) -> float | Rejected:
        """Median over the rounds of time over the default's; fewer rounds if `stop` says so."""
        number = self._record(candidate)
        if isinstance(number, Rejected):
            return number
        ratios = []
        try:
            for step in range(self._rounds):
                default_us, us = self._call(self._backend.rounds, [DEFAULT, number], 1, timeout=ROUND_S)[0]
                ratios.append(us / default_us)
                if stop(step, ratios[-1]):
                    break
            self._call(self._backend.forget, number, timeout=ROUND_S)
        except worker.WorkerDied as e:
            return Rejected(e.reason, f"while timed: {e}")
        except worker.RemoteError as e:
            self._restart_unless_sound()
            return Rejected("crash", f"while timed: {e.kind}: {_first_line(e)}")
        return float(np.median(ratios))

    def time(
        self, candidates: Sequence[Candidate], rounds: int, baseline: bool = False
    ) -> dict[Candidate | str, Samples]:
        """Fresh samples of all candidates (and of the problem's baseline, under its name) in the same rounds.

        A candidate that fails now, having passed before, is left out and logged. Raises DefaultFailed for the default.
        """
        names: dict[Candidate | str, int] = {}
        self._ready()
        for candidate in dict.fromkeys(candidates):
            number = DEFAULT if candidate == self._task.space.default else self._record(candidate)
            if isinstance(number, Rejected):
                log.warning("%s passed before and fails now: %s", candidate, number.detail)
                return self.time([c for c in candidates if c != candidate], rounds, baseline)
            names[candidate] = number
        if baseline:
            self._numbers += 1
            names[self._call(self._backend.record_baseline, self._numbers, timeout=COMPILE_S)] = self._numbers
        times = np.array(self._call(self._backend.rounds, list(names.values()), rounds, timeout=ROUND_S + rounds))
        for number in names.values():
            if number != DEFAULT:
                self._call(self._backend.forget, number, timeout=ROUND_S)
        return {name: times[:, i] for i, name in enumerate(names)}

    def _ready(self) -> None:
        """A child with the problem's operands and the default captured. Raises DefaultFailed."""
        if self._open:
            return
        task = self._task
        what = f"{task.space.default} for {task.problem.op} ({task.problem})"
        try:
            self._child.call(
                self._backend.open_bench,
                task.problem.op,
                task.problem.dims(),
                self._device,
                self._seed,
                timeout=COMPILE_S,
            )
            self._child.call(self._backend.record, DEFAULT, *_spelled(task.space.default), timeout=COMPILE_S)
        except (worker.WorkerDied, worker.RemoteError) as e:
            self._child.close()
            kind = f"{e.kind}: " if isinstance(e, worker.RemoteError) else ""
            raise DefaultFailed(f"{what} fails: {kind}{_first_line(e)}") from e
        self._open = True

    def _record(self, candidate: Candidate) -> int | Rejected:
        """The candidate's number in the child, once it is checked and captured."""
        self._ready()
        self._numbers += 1
        try:
            self._call(self._backend.record, self._numbers, *_spelled(candidate), timeout=COMPILE_S)
        except worker.WorkerDied as e:
            return Rejected(e.reason, str(e))
        except worker.RemoteError as e:
            if e.kind == "AssertionError":
                return Rejected("wrong", _first_line(e))
            self._restart_unless_sound()
            return Rejected("compile", f"{e.kind}: {_first_line(e)}")
        return self._numbers

    def _call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        try:
            return self._child.call(function, *args, timeout=timeout)
        except worker.WorkerDied:
            self._open = False
            raise

    def _restart_unless_sound(self) -> None:
        """An error may have left the child's CUDA context unusable: see whether the default still runs."""
        try:
            self._call(self._backend.rounds, [DEFAULT], 1, timeout=ROUND_S)
        except (worker.WorkerDied, worker.RemoteError):
            self._child.close()
            self._open = False


def build_of(task: Task, candidate: Candidate) -> Build:
    return Build(candidate.kernel, task.problem, candidate.config, task.arch)


def _spelled(candidate: Candidate) -> tuple[str, dict[str, Any]]:
    return candidate.kernel, dict(candidate.knobs)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:300]
