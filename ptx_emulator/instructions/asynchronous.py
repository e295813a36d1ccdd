"""cp.async, cp.async.bulk and their groups (PTX ISA, "Asynchronous copy"). Tensor copies are in `tma`.

A group belongs to the thread that committed it. cp.async copies happen when they are waited for (at issue under the
"eager" schedule), bulk copies when the cluster works off its queues.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import Fault
from ..hazards import Actor, Clock
from ..machine import LANES, Warp
from ..memory import RANK_SHIFT, split_shared
from ..numbers import Array
from ..parser import Instruction
from ..program import Mask, Program, Run, constant, decoder, unknown
from .data import bytes_at, shared_of
from .sync import mbarrier_at

_ALL = np.ones(LANES, bool)


# --- cp.async ---


@dataclass(slots=True)
class _Copies:
    """One cp.async of a warp: per lane the group, addresses and source bytes (the rest is zero)."""

    lanes: Array
    group: Array
    target: Array
    source: Array
    size: int
    source_size: Array
    operation: Actor
    carried_out: bool = False


class _Groups:
    def __init__(self) -> None:
        self.committed = np.zeros(LANES, np.int64)
        self.copies: list[_Copies] = []


def _groups(w: Warp) -> _Groups:
    if "cp.async" not in w.state:
        w.state["cp.async"] = _Groups()
    found: _Groups = w.state["cp.async"]
    return found


@decoder("cp")
def _cp(i: Instruction, p: Program) -> Run:
    from . import tma

    if i.op[1] == "reduce":
        if "tensor" in i.op:
            return tma.decode(i, p)
        raise unknown(i)
    if i.op[2] == "bulk":
        if i.op[3] == "commit_group":
            return _bulk_commit
        if i.op[3] == "wait_group":
            return _bulk_wait(i)
        if "tensor" in i.op:
            return tma.decode(i, p)
        return _bulk(i, p)
    if i.op[2] == "commit_group":
        return _commit
    if i.op[2] == "wait_group":
        return _wait(constant(i.operands[0]))
    if i.op[2] == "wait_all":
        return _wait(-1)
    if i.op[2] == "mbarrier":
        return _arrive(i, p)
    return _copy(i, p)


def _copy(i: Instruction, p: Program) -> Run:
    operands = i.operands
    size = constant(operands[2])
    if size not in (4, 8, 16) or ("cg" in i.op and size != 16):
        raise unknown(i, f"{size} bytes")
    target, source = p.address(operands[0]), p.address(operands[1])
    hints = sum(":cache_hint" in part for part in i.op)
    fourth = operands[3] if len(operands) - hints > 3 else None
    # the fourth operand is the bytes to read, or a predicate that skips the reading
    skip = p.source(fourth, "pred") if fourth is not None and getattr(fourth, "size", 1) == 0 else None
    length = p.source(fourth, "u32") if fourth is not None and skip is None else None

    def run(w: Warp, m: Mask) -> str | None:
        lanes = np.flatnonzero(_ALL if m is None else m)
        take = length(w)[lanes].astype(np.int64) if length else np.full(len(lanes), size)
        if skip:
            take = np.where(skip(w)[lanes], 0, take)
        if (take > size).any():
            raise Fault(f"cp.async of {size} bytes from {int(take.max())}")
        groups = _groups(w)
        operation = w.cta.cluster.hazards.operation("cp.async", asynchronous=False)
        copies = _Copies(
            lanes, groups.committed[lanes].copy(), target(w)[lanes], source(w)[lanes], size, take, operation
        )
        if ((copies.source % np.uint64(size)) != 0).any() or ((copies.target % np.uint64(size)) != 0).any():
            raise Fault(f"cp.async of {size} bytes with an address that is not a multiple of them")
        if w.cta.cluster.launch.schedule == "eager":
            _carry_out(w, copies, np.ones(len(lanes), bool))
            copies.carried_out = True
        groups.copies.append(copies)
        return None

    return run


def _carry_out(w: Warp, c: _Copies, which: Array) -> None:
    w.cta.cluster.hazards.perform(c.operation, lambda: _copy_bytes(w, c, which))


def _copy_bytes(w: Warp, c: _Copies, which: Array) -> None:
    memory, shared = w.cta.cluster.launch.memory, w.cta.shared
    rank, offset = split_shared(c.target[which])
    if (rank != w.cta.rank).any():
        raise Fault("cp.async to the shared memory of another CTA")
    source, take = c.source[which], c.source_size[which]
    if (take == c.size).all():
        words = memory.load(source, min(c.size, 8), max(1, c.size // 8))
        shared.store(offset, min(c.size, 8), words)
        return
    for o, s, n in zip(offset, source, take, strict=True):
        row = np.zeros(c.size, np.uint8)
        if n:
            row[:n] = memory.bytes(int(s), int(n))
        shared.write(int(o), row)


def _commit(w: Warp, m: Mask) -> str | None:
    _groups(w).committed[_ALL if m is None else m] += 1
    return None


def _wait(count: int) -> Run:
    """Until at most `count` groups are pending; -1: everything, committed or not."""

    def run(w: Warp, m: Mask) -> str | None:
        finish(w, _ALL if m is None else m, count)
        return None

    return run


def finish(w: Warp, here: Array, count: int) -> None:
    """Copies that the current actor waits for: up to `count` groups stay."""
    groups, hazards = _groups(w), w.cta.cluster.hazards
    left, waiting = [], hazards.current
    assert waiting is not None
    for c in groups.copies:
        done = here[c.lanes] & (c.group < groups.committed[c.lanes] - count)
        if done.any():
            if not c.carried_out:
                _carry_out(w, c, done)
            waiting.acquire(c.operation.clock)
            keep = ~done
            c = replace(
                c,
                lanes=c.lanes[keep],
                group=c.group[keep],
                target=c.target[keep],
                source=c.source[keep],
                source_size=c.source_size[keep],
            )
        if len(c.lanes):
            left.append(c)
        else:
            hazards.retire(c.operation)
    groups.copies = left


def _arrive(i: Instruction, p: Program) -> Run:
    """cp.async.mbarrier.arrive: arrives once all of the thread's earlier copies are done."""
    address, noinc = p.address(i.operands[0]), "noinc" in i.op

    def run(w: Warp, m: Mask) -> str | None:
        lanes = np.flatnonzero(_ALL if m is None else m)
        here, targets = _ALL if m is None else m.copy(), address(w)[lanes]
        for a in targets:
            if not noinc:
                mbarrier_at(w, int(a)).pending += 1

        def work() -> None:
            finish(w, here, -1)
            for a in targets:
                mbarrier_at(w, int(a)).arrive(1)

        w.cta.cluster.submit(("cp.async", w.cta.rank, w.index), work)
        return None

    return run


# --- bulk copies ---


@dataclass(slots=True)
class BulkGroups:
    """Bulk groups of a warp's threads: copies under way, and those that are over but were not waited for."""

    committed: Array = field(default_factory=lambda: np.zeros(LANES, np.int64))
    outstanding: list[tuple[int, int]] = field(default_factory=list)  # lane and group
    over: list[tuple[int, int, Actor, Actor]] = field(default_factory=list)  # lane, group, reading, writing
    read: dict[int, tuple[int, Clock]] = field(default_factory=dict)  # lane: last group waited for by .read, writes

    def wait(self, here: Array, count: int, reads_only: bool, by: Actor) -> int:
        """Pending groups of these lanes beyond `count`; if none, `by` has seen the others end."""
        limit = self.committed - count
        pending = sum(here[lane] and group < limit[lane] for lane, group in self.outstanding)
        if pending:
            return int(pending)
        left = []
        for lane, group, reading, writing in self.over:
            if not here[lane] or group >= limit[lane]:
                left.append((lane, group, reading, writing))
            elif reads_only:
                by.acquire(reading.clock)
                last, writes = self.read.setdefault(lane, (group, Clock()))
                writes.join(writing.clock)
                self.read[lane] = (max(last, group), writes)
            else:
                by.acquire(writing.clock)
        self.over = left
        if not reads_only:
            for lane, (group, writes) in list(self.read.items()):
                if here[lane] and group < limit[lane]:
                    by.acquire(writes)
                    del self.read[lane]
        return 0


def bulk_groups(w: Warp) -> BulkGroups:
    if "bulk" not in w.state:
        w.state["bulk"] = BulkGroups()
    found: BulkGroups = w.state["bulk"]
    return found


def _bulk_commit(w: Warp, m: Mask) -> str | None:
    bulk_groups(w).committed[_ALL if m is None else m] += 1
    return None


def _bulk_wait(i: Instruction) -> Run:
    count, reads_only = constant(i.operands[0]), "read" in i.op

    def run(w: Warp, m: Mask) -> str | None:
        pending = bulk_groups(w).wait(_ALL if m is None else m, count, reads_only, w.actor)
        return f"waits for {pending} bulk copies" if pending else None

    return run


def submit_grouped(w: Warp, lanes: Array, what: str, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
    """A bulk copy of these lanes' current groups: `write` gets what `read` returned."""
    groups, hazards = bulk_groups(w), w.cta.cluster.hazards
    marks = [(int(lane), int(groups.committed[lane])) for lane in lanes]
    groups.outstanding += marks
    reading, writing = hazards.operation(what), hazards.operation(what)
    writing.clock.join(reading.clock)

    def run() -> None:
        data = read()
        hazards.perform(writing, lambda: write(data))
        for mark in marks:
            groups.outstanding.remove(mark)
            groups.over.append((*mark, reading, writing))
        hazards.retire(reading)
        hazards.retire(writing)

    w.cta.cluster.submit(("store", w.cta.rank, w.index), run, reading)


def fresh_queue(w: Warp) -> Any:
    """A queue of its own, for work without an order."""
    state = w.cta.cluster.state
    state["queues"] = state.get("queues", 0) + 1
    return ("bulk load", state["queues"])


def _bulk(i: Instruction, p: Program) -> Run:
    parts = i.op[3:]
    if parts[0] == "prefetch":
        return lambda w, m: None
    target, source = p.address(i.operands[0]), p.address(i.operands[1])
    size = p.source(i.operands[2], "u32")
    if parts[0].startswith("shared") and "multicast:cluster" not in i.op:
        barrier, from_shared = p.address(i.operands[3]), parts[1].startswith("shared")

        def load(w: Warp, m: Mask) -> str | None:
            for lane in np.flatnonzero(_ALL if m is None else m):
                d, s, n, b = (int(x(w)[lane]) for x in (target, source, size, barrier))
                _check_bulk(d, s, n)

                def work(d: int = d, s: int = s, n: int = n, b: int = b) -> None:
                    if from_shared:
                        data = shared_of(w, s >> RANK_SHIFT).shared.read(s & ((1 << RANK_SHIFT) - 1), n)
                    else:
                        data = bytes_at(w, s, n)
                    shared_of(w, d >> RANK_SHIFT).shared.write(d & ((1 << RANK_SHIFT) - 1), data)
                    mbarrier_at(w, b).complete(n)

                statistics = w.cta.cluster.launch.statistics
                statistics.count_copy("bulk load", n)
                if not from_shared:
                    statistics.bytes["global load"] += n
                elif d >> RANK_SHIFT != s >> RANK_SHIFT:
                    statistics.bytes["distributed shared store"] += n
                w.cta.cluster.submit(fresh_queue(w), work)
            return None

        return load
    if parts[0] == "global" and "bulk_group" in i.op:

        def save(w: Warp, m: Mask) -> str | None:
            for lane in np.flatnonzero(_ALL if m is None else m):
                d, s, n = (int(x(w)[lane]) for x in (target, source, size))
                _check_bulk(d, s, n)

                def read(s: int = s, n: int = n) -> Array:
                    return shared_of(w, s >> RANK_SHIFT).shared.read(s & ((1 << RANK_SHIFT) - 1), n)

                def write(data: Array, d: int = d, n: int = n) -> None:
                    w.cta.cluster.launch.memory.bytes(d, n, True)[:] = data

                w.cta.cluster.launch.statistics.count_copy("bulk store", n)
                w.cta.cluster.launch.statistics.bytes["global store"] += n
                submit_grouped(w, np.array([lane]), "bulk store", read, write)
            return None

        return save
    raise unknown(i)


def _check_bulk(d: int, s: int, n: int) -> None:
    if d % 16 or s % 16 or n % 16:
        raise Fault(f"a bulk copy of {n} bytes from {s:#x} to {d:#x}: all three must be multiples of 16")
