"""The measuring process of `bench --peers`: ours, peers and roofs, checked, captured and timed together, cell by cell.

A contender that is wrong or raises loses that cell; one that ends the process, or leaves the device unusable, loses the
cell's group, and after the second such group all of them. The others are measured again in a new process.
"""

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from fp4suite import dispatch

from . import measure, stats, worker

OWN, EMPTY = "fp4suite", "empty"
LEAST_ROUNDS, MOST_ROUNDS = 9, 41
MOST_CELL_S = 3.0  # of timing; a cell of long launches may take longer for its least rounds
RECORD_S, TIMES_S = 180.0, 120.0  # after which a contender counts as hanging


class Comparable(Protocol):
    """A cell: a problem, and what of ours runs it."""

    @property
    def choice(self) -> dispatch.Choice: ...


C = TypeVar("C", bound=Comparable)


@dataclass(slots=True)
class Timed:
    """Of a cell: errors of what was timed, why others were not, samples, and how operands were kept out of L2."""

    errors: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    samples: dict[str, stats.Samples] = field(default_factory=dict)


class Measuring(Generic[C]):
    """The process, and what is known of its contenders. `backend` is the module that runs in it (`bench_cells`)."""

    def __init__(self, child: Any, backend: ModuleType, names: Sequence[str]) -> None:
        """names: contenders beside ours."""
        self.child, self.backend = child, backend
        self._names = (OWN, *names)
        self._broken: dict[str, dict[Hashable, str]] = {}  # contender -> group -> what happened

    def group(self, cell: C) -> Hashable:
        """Cells that a contender loses together."""
        raise NotImplementedError

    def open(self, cell: C) -> None:
        """Make the cell's operands in the process."""
        raise NotImplementedError

    def forget(self) -> None:
        """The process is a new one."""

    def contenders(self, cell: C) -> Sequence[str]:
        return self._names

    def cell(self, cell: C, seconds: float) -> Timed:
        """Check and capture each contender, then time those that are right."""
        names = self.contenders(cell)
        while True:
            timed = Timed()
            try:
                self.open(cell)
            except (worker.WorkerDied, worker.RemoteError) as e:
                self._restart()
                timed.failed = dict.fromkeys(names, f"operands could not be made: {line(e)}")
                return timed
            if not all(self._record(name, cell, timed) for name in names):
                continue  # the process is gone, and what it had recorded
            try:
                samples = self.child.call(
                    self.backend.times, list(timed.errors), seconds, LEAST_ROUNDS, MOST_ROUNDS, timeout=TIMES_S
                )
            except (worker.WorkerDied, worker.RemoteError) as e:
                self._restart()
                timed.failed |= dict.fromkeys(timed.errors, f"failed while all were timed: {line(e)}")
                timed.errors = {}
            else:
                timed.samples = dict(zip(timed.errors, np.array(samples).T, strict=True))
            return timed

    def within(self, todo: Sequence[C], began: float, seconds: float, quiet: bool) -> Iterator[tuple[C, Timed]]:
        """Cells and what came of them, one at least, until `seconds` after `began`: each gets its share of the rest."""
        overhead = 0.0  # seconds outside of timing, so far
        for number, cell in enumerate(tqdm(todo, unit="cell", disable=quiet or None)):
            now, left = time.monotonic(), len(todo) - number
            if number and now > began + seconds:
                return
            share = (began + seconds - now) / left - overhead / max(number, 1)
            given = min(max(share, 0.0), MOST_CELL_S)
            timed = self.cell(cell, given)
            overhead += time.monotonic() - now - given
            yield cell, timed

    def _record(self, name: str, cell: C, timed: Timed) -> bool:
        """Whether the process is still there; what came of it goes into `timed`."""
        broken, group = self._broken.setdefault(name, {}), self.group(cell)
        if group in broken or (name != OWN and len(broken) > 1):
            timed.failed[name] = broken.get(group) or f"left out, as before: {next(iter(broken.values()))}"
            return True
        try:
            if name == OWN:
                kernel, knobs = cell.choice.kernel, asdict(cell.choice.config)
                error = self.child.call(self.backend.record_own, kernel, knobs, timeout=RECORD_S)
            else:
                error = self.child.call(self.backend.record, name, timeout=RECORD_S)
            timed.errors[name] = error
            return True
        except worker.WorkerDied as e:
            why = f"{e.reason}: {line(e)}"
        except worker.RemoteError as e:
            why = f"wrong: {line(e)}" if e.kind == "AssertionError" else f"{e.kind}: {line(e)}"
            if self._is_sound():
                timed.failed[name] = why
                return True
        broken[group] = why
        self._restart()
        return False

    def _is_sound(self) -> bool:
        """Whether the device can still be used, as it cannot after an illegal access."""
        try:
            self.child.call(self.backend.sound, timeout=TIMES_S)
        except (worker.WorkerDied, worker.RemoteError):
            return False
        return True

    def _restart(self) -> None:
        self.child.close()
        self.forget()


def rounds_within(
    timer: measure.Timer, timed: list[measure.Timed], seconds: float, least: int, most: int
) -> list[list[float]]:
    """Microseconds a launch, [rounds][timed]: as many interleaved rounds as `seconds` allow, within the limits."""
    began = time.monotonic()
    timer.rounds(timed, 1)
    each = (time.monotonic() - began) / 2
    found: list[list[float]] = timer.rounds(timed, max(least, min(most, int(seconds / each)))).tolist()
    return found


def line(error: Exception) -> str:
    """The first line of an error, fit for a list that semicolons separate."""
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].replace("; ", ", ")


def quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a / b, 4)


def spelled(pairs: Mapping[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in pairs.items())
