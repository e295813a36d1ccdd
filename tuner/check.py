"""`check`: are the tuned tables what they claim to be?

For each entry: its kernel exists for the table's architecture; its config parses, lies in SPACE and supports the
problem; it was tuned from the kernel's present source; `measured` goes with the kind of table. On a table's own device
(or architecture) every entry is run and compared with the reference.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp4suite import arch as archs, problem as problems, registry, table
from fp4suite.errors import TableError
from fp4suite.table import Entry, Table

from . import measure, space, worker

RUN_S = 300.0


@dataclass(slots=True)
class Found:
    """problems are wrong; notes are worth knowing. stale: the entries that notes count, where that is not wrong."""

    tables: int = 0
    entries: int = 0
    ran: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "tables": self.tables,
            "entries": self.entries,
            "ran": self.ran,
            "problems": self.problems,
            "notes": self.notes,
            "stale": self.stale,
        }


def run(where: Path, device: str | None = None, stale_is_wrong: bool = True) -> Found:
    """Check a table, or all tables of a folder. Raises ValueError if there is nothing to check."""
    paths = [where] if where.is_file() else sorted(where.glob("*.json"))
    if not paths:
        raise ValueError(f"no tables in {where}")
    found = Found()
    here = _device_here(device)
    for path in paths:
        found.tables += 1
        try:
            read = table.read(path)
        except TableError as e:
            found.problems.append(str(e))
            continue
        sound = []
        for entry in read.entries:
            found.entries += 1
            label = f"{path.name}: {entry.op} {_spelled(entry)}"
            wrong = _why_wrong(read, entry)
            if wrong is not None:
                found.problems.append(f"{label}: {wrong}")
                continue
            sound.append((label, entry))
        stale = [(label, entry) for label, entry in sound if table.is_stale(entry)]
        (found.problems if stale_is_wrong else found.stale).extend(
            f"{label}: {entry.kernel} has changed since it was tuned ({entry.source_hash}): {_again(entry)}"
            for label, entry in stale
        )
        if stale and not stale_is_wrong:
            found.notes += _summary(path.name, [entry for _, entry in stale])
        if here is not None and read.device in (here["device"], here["arch"]):
            _run_all(sound, here["cuda"], found)
    return found


def _again(entry: Entry) -> str:
    return "tune --batch-invariant" if entry.invariant else "tune --stale"


def _summary(name: str, stale: Sequence[Entry]) -> list[str]:
    """How many entries of a table are stale and what becomes of them, then how many of each kernel."""
    ways = " and ".join(f"`tuner {way}`" for way in dict.fromkeys(map(_again, stale)))
    head = (
        f"{len(stale)} entries of {name} are stale: their kernels changed since they were tuned; tune again with {ways}"
    )
    return [head, *(f"{count:6} {kernel}" for kernel, count in Counter(e.kernel for e in stale).most_common())]


def _why_wrong(read: Table, entry: Entry) -> str | None:
    try:
        problem = problems.from_dims(entry.op, entry.problem)
        row = registry.find(entry.kernel)
        module = registry.load(entry.kernel)
        config = registry.make_config(module, entry.config)
        choices = space.checked_space(module)
    except ValueError as e:
        return str(e)
    if row.op != entry.op:
        return f"{entry.kernel} is a kernel of {row.op}"
    if read.arch not in row.archs:
        return f"{entry.kernel} does not run on {read.arch}"
    outside = {k: v for k, v in entry.config.items() if v not in choices.get(k, ())}
    if outside:
        return f"{outside} is not in the SPACE of {entry.kernel}"
    refusal = module.supports(problem, config)
    if refusal is not None:
        return f"its config does not support it: {refusal}"
    if entry.measured != (read.device not in archs.GPU_ARCHS):
        return f"measured is {str(entry.measured).lower()}, but this is the table of {read.device}"
    if not entry.measured and (entry.predicted_us is None or entry.median_us is not None):
        return "a predicted entry has predicted_us and no median_us"
    best = entry.median_us if entry.measured else entry.predicted_us
    if entry.default_us is not None and best is not None and best > entry.default_us * 1.005:
        return f"it is slower ({best} us) than the default ({entry.default_us} us)"
    return None


def _run_all(entries: list[tuple[str, Entry]], device: str, found: Found) -> None:
    child = worker.Worker()
    try:
        for label, entry in entries:
            found.ran += 1
            try:
                child.call(measure.verify, entry.op, entry.problem, device, entry.kernel, entry.config, timeout=RUN_S)
            except worker.RemoteError as e:
                found.problems.append(f"{label}: {e.kind}: {e}")
                child.close()
            except worker.WorkerDied as e:
                found.problems.append(f"{label}: {e}")
    finally:
        child.close()


def _device_here(device: str | None) -> dict[str, str] | None:
    """The GPU to run on ("cuda"), its name as tables spell it ("device"), its "arch"; None without one."""
    if not torch.cuda.is_available():
        if device is not None:
            raise ValueError(f"--device {device}: torch {torch.__version__} sees no GPU")
        return None
    cuda = device or "cuda:0"
    child = worker.Worker()
    try:
        return {"cuda": cuda, **child.call(measure.describe, cuda, timeout=120.0)}
    finally:
        child.close()


def _spelled(entry: Entry) -> str:
    return " ".join(f"{k}={v}" for k, v in entry.problem.items()) + " (batch-invariant)" * entry.invariant
