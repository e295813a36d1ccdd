"""A grid's clusters spread over forked processes.

Each process runs a run of clusters on its own copy of the memory and sends back the bytes it wrote, which are copied in
the order of the clusters, its statistics and its fault: what one process would have left behind, provided that no
cluster depends on another. A kernel that asks for such an order is refused before it starts; one whose clusters turn
out to have read what others wrote is refused afterwards, and leaves no trace in memory.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ProcessError
from .memory import Block
from .numbers import Array
from .statistics import Statistics

if TYPE_CHECKING:
    from .machine import Dim3, Launch
    from .parser import Instruction, Kernel

_PR_SET_PDEATHSIG = 1
_ORDERED = {"acquire", "release", "acq_rel", "relaxed", "volatile", "mmio"}
_ONE = "run it in one process (processes=1)"


class Marks:
    """Which bytes of global memory were written, and which were read before that."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[Block, Array, Array]] = {}

    def note(self, block: Block, index: Any, write: bool) -> None:
        if block.base not in self._blocks or len(self._blocks[block.base][1]) < block.size:
            # of blocks with one start the longest has the marks
            grown = (block, np.zeros(block.size, bool), np.zeros(block.size, bool))
            _, *known = self._blocks.get(block.base, grown)
            for new, old in zip(grown[1:], known, strict=True):
                new[: len(old)] = old
            self._blocks[block.base] = grown
        _, written, read = self._blocks[block.base]
        if write:
            written[index] = True
        else:
            read[index] |= ~written[index]

    def written(self) -> list[tuple[Array, Array]]:
        """By block: runs of bytes ([runs, 2] addresses, the last exclusive) and what is in them now."""
        found = []
        for block, written, _ in self._blocks.values():
            runs = _runs(written)
            if len(runs):
                found.append((runs + block.base, block.data[_inside(runs)]))
        return found

    def read(self) -> Array:
        """Runs of bytes, [runs, 2]."""
        return np.concatenate([_NONE, *(_runs(read) + block.base for block, _, read in self._blocks.values())])


_NONE = np.zeros((0, 2), np.int64)


def _runs(mask: Array) -> Array:
    """[runs, 2]: first and last (exclusive) of each run of True."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return edges.reshape(-1, 2)


def _inside(runs: Array) -> Array:
    """Every number in the runs."""
    lengths = runs[:, 1] - runs[:, 0]
    before = np.cumsum(lengths) - lengths
    return np.repeat(runs[:, 0] - before, lengths) + np.arange(int(lengths.sum()))


@dataclass(slots=True)
class _Share:
    """What one process did."""

    statistics: Statistics
    written: list[tuple[Array, Array]]
    read: Array
    printed: list[str]
    fault: BaseException | None


def run(launch: "Launch", count: int) -> None:
    """Run all clusters of `launch` in up to `count` processes.

    Raises what the first cluster that faults raised, ValueError for clusters that communicate, ProcessError for a
    process that died.
    """
    if sys.platform == "win32":
        raise ValueError(f"several processes need fork, which this system lacks: {_ONE}")
    if launch.cooperative:
        raise ValueError(f"{launch.program.kernel.name}: clusters of a cooperative launch run at once: {_ONE}")
    if (i := ordered(launch.program.kernel)) is not None:
        raise ValueError(
            f"{launch.program.kernel.name}, PTX line {i.line}: {i.text}: clusters may communicate through global "
            f"memory: {_ONE}"
        )
    places = launch.places()
    count = min(count, len(places))
    parts = [places[n * len(places) // count : (n + 1) * len(places) // count] for n in range(count)]
    launch.memory.survey()  # once, not in every process
    shares = _collect(launch, parts)
    done = shares[: next((n + 1 for n, s in enumerate(shares) if s.fault is not None), count)]
    _check_apart(launch, parts, done)
    for share in done:
        _apply(launch, share)
        if share.fault is not None:
            raise share.fault


def ordered(kernel: "Kernel") -> "Instruction | None":
    """An instruction through which clusters communicate in global memory: an atomic one whose result is used, or an
    access that takes part in synchronisation (PTX ISA, "Memory Consistency Model": strong operations)."""
    for i in kernel.code:
        parts = set(i.op)
        if parts & {"shared", "shared:cta", "shared:cluster", "local", "param"} or i.op[0] not in _ACCESSES:
            continue
        if i.op[0] == "atom" or (parts & _ORDERED and not parts & {"cta", "cluster"}):
            return i
    return None


_ACCESSES = {"ld", "st", "atom", "red", "multimem"}


def _collect(launch: "Launch", parts: Sequence[Sequence["Dim3"]]) -> list[_Share]:
    """The shares in order, up to the first with a fault."""
    context = multiprocessing.get_context("fork")
    workers, waiting = [], {}
    shares: dict[int, _Share] = {}
    try:
        with _held_interrupts():
            for n, part in enumerate(parts):
                receiver, sender = context.Pipe(duplex=False)
                worker = context.Process(target=_work, args=(launch, part, sender, os.getpid()), daemon=True)
                with warnings.catch_warnings():
                    # threads of torch or BLAS are no danger: a child runs numpy only, whose BLAS knows of forks
                    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
                    worker.start()
                sender.close()
                workers.append(worker)
                waiting[receiver] = n
        while waiting:
            for ready in connection.wait(list(waiting)):
                assert isinstance(ready, connection.Connection)
                if ready not in waiting:
                    continue
                n = waiting.pop(ready)
                try:
                    shares[n] = ready.recv()
                except EOFError:
                    workers[n].join()
                    raise ProcessError(
                        f"process {n + 1} of {len(parts)}, which ran clusters {parts[n][0]} to {parts[n][-1]} of "
                        f"{launch.program.kernel.name}, {_end(workers[n].exitcode)}"
                    ) from None
                if shares[n].fault is not None:  # what comes after it does not count
                    waiting = {r: k for r, k in waiting.items() if k < n}
    finally:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
    return [shares[n] for n in range(len(shares)) if n in shares]


@contextlib.contextmanager
def _held_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the block's end: Python drops one that comes while it runs the hooks of a fork."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with status {code}"


def _work(launch: "Launch", places: Sequence["Dim3"], sender: Any, parent: int) -> None:
    """The child: never outlives its parent, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()  # to look through the parent's objects would copy their pages
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before the line above
            os._exit(1)
    marks = launch.memory.marks = Marks()
    fault: BaseException | None = None
    try:
        launch.run_clusters(places)
    except BaseException as e:  # goes to the parent, whatever it is
        fault = e
    sender.send(_Share(launch.statistics, marks.written(), marks.read(), launch.printed, fault))


def _check_apart(launch: "Launch", parts: Sequence[Sequence["Dim3"]], shares: Sequence[_Share]) -> None:
    """Raises ValueError if a process read what another wrote."""
    for a, reader in enumerate(shares):
        for b, writer in enumerate(shares):
            if a == b:
                continue
            for runs, _ in writer.written:
                # of the runs of written bytes, those that start before the end of a read, less those that end before it
                starts, ends = np.sort(runs[:, 0]), np.sort(runs[:, 1])
                met = np.searchsorted(starts, reader.read[:, 1]) - np.searchsorted(ends, reader.read[:, 0], "right")
                if met.any():
                    first, last = (int(x) for x in reader.read[np.argmax(met > 0)])
                    near = launch.memory.find(first, last - first)
                    raise ValueError(
                        f"{launch.program.kernel.name}: clusters {parts[a][0]} to {parts[a][-1]} read bytes of "
                        f"{near.name} from {first:#x} on that clusters {parts[b][0]} to {parts[b][-1]} wrote: {_ONE}"
                    )


def _apply(launch: "Launch", share: _Share) -> None:
    for runs, data in share.written:
        low, high = int(runs[:, 0].min()), int(runs[:, 1].max())
        block = launch.memory.find(low, high - low, write=True)
        block.data[_inside(runs - block.base)] = data
    launch.statistics.add(share.statistics)
    launch.printed += share.printed
