"""cp.async and its groups (PTX ISA, "Non-bulk copy"). Bulk copies are in `bulk`, tensor copies in `tma`.

A group belongs to the thread that committed it. Copies happen when they are waited for (at issue under the "eager"
schedule).
"""

from dataclasses import dataclass, replace

import numpy as np

from ..errors import Fault
from ..hazards import Actor
from ..machine import LANES, Warp
from ..memory import split_shared
from ..numbers import Array
from ..parser import Instruction
from ..program import Mask, Program, Run, constant, decoder, unknown
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
    from . import bulk, tma

    if "bulk" in i.op:
        return tma.decode(i, p) if "tensor" in i.op else bulk.decode(i, p)
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
