"""Tuned tables: one JSON file a device (or an architecture), one entry a line.

Shipped tables lie in results/tables in a checkout and in fp4suite/tables in the wheel. `measured` is false for an entry
that a cost model ranked and nobody timed; whoever shows its figures has to say so.
"""

import functools
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import filelock
import msgspec

from . import registry
from .errors import TableError
from .problem import complete

SCHEMA = 1
Microseconds = Annotated[float, msgspec.Meta(gt=0)]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The winner for one problem.

    problem, config     named dimensions and named knobs
    source_hash         of the kernel's files when it was tuned (`registry.source_hash`)
    invariant           tuned for `fp4suite.batch_invariant`, and used there alone
    *_us                microseconds; None where nothing was measured. `predicted_us` comes from the cost model
    baseline            what it was compared with, and its median
    regret              the largest slowdown seen when this config ran the neighbouring bucket of m, as a ratio >= 1;
                        None where it was not measured
    trials, rejected    candidates tried, and those that did not fit, did not compile or were wrong
    versions            torch, triton, cutlass, driver, toolkit
    """

    op: str
    problem: dict[str, int | str]
    kernel: str
    source_hash: str
    config: dict[str, int | str | bool]
    measured: bool
    invariant: bool = False
    median_us: Microseconds | None = None
    p20_us: Microseconds | None = None
    p80_us: Microseconds | None = None
    predicted_us: Microseconds | None = None
    default_us: Microseconds | None = None
    baseline: str | None = None
    baseline_us: Microseconds | None = None
    regret: float | None = None
    trials: int = 0
    rejected: int = 0
    versions: dict[str, str] = {}
    commit: str = ""
    date: str = ""

    def key(self) -> tuple[Any, ...]:
        return (self.op, self.invariant, tuple(sorted(self.problem.items())))


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """device: the slug of `arch.device_name`, or the architecture itself for a table that is not of one device."""

    schema: int
    device: str
    arch: str
    entries: list[Entry]


def read(path: str | Path) -> Table:
    """Read and check a table. Raises TableError naming the file and what is wrong.

    An entry written before its problem gained a dimension is of that dimension's default.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise TableError(f"{path}: cannot be read ({e.strerror})") from e
    try:
        table = msgspec.json.decode(raw, type=Table)
    except msgspec.DecodeError as e:
        raise TableError(f"{path}: not a tuned table ({e})") from e
    if table.schema != SCHEMA:
        raise TableError(f"{path}: schema {table.schema}, this version reads {SCHEMA}; tune again")
    table = msgspec.structs.replace(table, entries=[_completed(entry) for entry in table.entries])
    seen = set()
    for entry in table.entries:
        if entry.measured and entry.median_us is None:
            raise TableError(f"{path}: {entry.op} {entry.problem} is marked measured but has no median_us")
        if entry.key() in seen:
            raise TableError(f"{path}: two entries for {entry.op} {entry.problem}")
        seen.add(entry.key())
    return table


def is_stale(entry: Entry) -> bool:
    """Whether its kernel has changed since it was tuned, or is no more."""
    current = {row.name for row in registry.kernels(entry.op)}
    return entry.kernel not in current or entry.source_hash != registry.source_hash(entry.kernel)


def _completed(entry: Entry) -> Entry:
    return msgspec.structs.replace(entry, problem=complete(entry.op, entry.problem))


def write(path: str | Path, table: Table) -> None:
    """Replace the file at once (write aside, then rename), one entry a line, sorted."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    head = msgspec.json.encode({"schema": table.schema, "device": table.device, "arch": table.arch})[:-1]
    entries = sorted(
        table.entries, key=lambda e: (e.op, e.invariant, [(k, str(v).zfill(12)) for k, v in e.problem.items()])
    )
    lines = b",\n".join(b"  " + msgspec.json.encode(e) for e in entries)
    body = head + b',"entries":[\n' + lines + b"\n]}\n"
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(body)
        os.chmod(tmp, 0o644)
        os.replace(tmp, path)
    except BaseException:
        Path(tmp).unlink(missing_ok=True)
        raise


def merge(
    path: str | Path,
    device: str,
    arch: str,
    new: Iterable[Entry],
    *,
    drop: Callable[[Entry], bool] = lambda entry: False,
) -> Table:
    """Put `new` into the table at `path`, replacing entries for the same problem; safe among processes on one host.

    drop: which of the old entries go.
    Raises TableError if the file is there and is not of this device and architecture.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(path) + ".lock"):
        old = read(path) if path.exists() else Table(schema=SCHEMA, device=device, arch=arch, entries=[])
        if (old.device, old.arch) != (device, arch):
            raise TableError(f"{path}: is of {old.device} ({old.arch}), will not take entries of {device} ({arch})")
        entries = {e.key(): e for e in old.entries if not drop(e)} | {e.key(): e for e in map(_completed, new)}
        table = Table(schema=SCHEMA, device=device, arch=arch, entries=list(entries.values()))
        write(path, table)
    return table


@functools.cache
def shipped_dir() -> Path:
    """Where the tables of this installation lie."""
    here = Path(__file__).parent
    inside = here / "tables"  # in a wheel
    return inside if inside.is_dir() else here.parent / "results" / "tables"
