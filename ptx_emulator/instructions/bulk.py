"""Bulk copies and their groups, stores that signal an mbarrier (PTX ISA, "cp.async.bulk", "cp.reduce.async.bulk",
"cp.async.bulk.prefetch", "st.async", "red.async", "st.bulk").

A group belongs to the thread that committed it. Copies happen when the cluster works off its queues. A multicast writes
the same offset in every CTA of the mask and signals the mbarrier at the same offset there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import Fault
from ..hazards import Actor, Clock
from ..machine import LANES, Cta, Warp
from ..memory import RANK_SHIFT, SHARED_WINDOW, UINT, WINDOW_SHIFT
from ..numbers import Array
from ..parser import Address, Instruction
from ..program import DTYPES, Mask, Program, Run, constant, kind_of, only, unknown
from .data import ATOMIC, combine, shared_of
from .sync import MBarrier, mbarrier_of

_ALL = np.ones(LANES, bool)
_OFFSET = (1 << RANK_SHIFT) - 1
MAX_BULK_STORE = 1 << 24
_FILLER = 0xCD  # of bytes whose value nobody knows


# --- groups ---


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


def submit_grouped(
    w: Warp, lanes: Array, what: str, read: Callable[[], Any], write: Callable[[Any], None], atomic: bool = False
) -> None:
    """A bulk copy of these lanes' current groups: `write` gets what `read` returned. atomic: by each element."""
    groups, hazards = bulk_groups(w), w.cta.cluster.hazards
    marks = [(int(lane), int(groups.committed[lane])) for lane in lanes]
    groups.outstanding += marks
    reading, writing = hazards.operation(what), hazards.operation(what)
    writing.clock.join(reading.clock)
    writing.strong = atomic

    def run() -> None:
        data = read()
        hazards.perform(writing, lambda: write(data))
        for mark in marks:
            groups.outstanding.remove(mark)
            groups.over.append((*mark, reading, writing))
        hazards.retire(reading)
        hazards.retire(writing)

    w.cta.cluster.submit(("store", w.cta.rank, w.index), run, reading)


def each_lane(issue: Callable[[Warp, int], None]) -> Run:
    """An instruction that starts something for each active lane."""

    def run(w: Warp, m: Mask) -> str | None:
        for lane in map(int, np.flatnonzero(_ALL if m is None else m)):
            issue(w, lane)
        return None

    return run


def fresh_queue(w: Warp) -> Any:
    """A queue of its own, for work without an order."""
    state = w.cta.cluster.state
    state["queues"] = state.get("queues", 0) + 1
    return ("bulk load", state["queues"])


# --- copies ---


def decode(i: Instruction, p: Program) -> Run:
    if i.op[1] == "reduce":
        return _reduce(i, p)
    if i.op[3] == "commit_group":
        return _bulk_commit
    if i.op[3] == "wait_group":
        return _bulk_wait(i)
    if i.op[3] == "prefetch":
        return _prefetch(i, p)
    return _save(i, p) if "bulk_group" in i.op else _load(i, p)


def _check(d: int, s: int, n: int) -> None:
    if d % 16 or s % 16 or n % 16:
        raise Fault(f"a bulk copy of {n} bytes from {s:#x} to {d:#x}: all three must be multiples of 16")


def shared_place(w: Warp, address: int, own: bool = False) -> tuple[Cta, int]:
    """CTA and offset of an address in the shared window or generic. own: it must be the executing CTA's."""
    if address >> WINDOW_SHIFT:
        if address >> WINDOW_SHIFT != SHARED_WINDOW >> WINDOW_SHIFT:
            raise Fault(f"generic address {address:#x} is not in shared memory")
        address -= SHARED_WINDOW
    cta = shared_of(w, address >> RANK_SHIFT)
    if own and cta is not w.cta:
        raise Fault(f"shared address {address:#x} is of CTA rank {cta.rank}, where the own CTA's is required")
    return cta, address & _OFFSET


def destinations(w: Warp, d: int, b: int, mask: int | None, pair: bool = False) -> list[tuple[Cta, MBarrier]]:
    """CTAs that a copy to shared address `d` writes, each with the mbarrier that it signals.

    pair (.cta_group::2): the mbarrier may be the other CTA's of a pair, for all by the parity of that of `b`.
    """
    (cta, _), (owner, offset) = shared_place(w, d), shared_place(w, b)
    if mask is None:
        if owner is not cta and not (pair and owner.rank >> 1 == cta.rank >> 1):
            raise Fault(f"a copy to CTA rank {cta.rank} that signals an mbarrier of rank {owner.rank}")
        return [(cta, mbarrier_of(owner, offset))]
    if mask >> len(w.cta.cluster.ctas) or not mask:
        raise Fault(f"multicast to the CTAs {mask:#x} of a cluster of {len(w.cta.cluster.ctas)}")
    found = []
    for rank in range(len(w.cta.cluster.ctas)):
        if mask >> rank & 1:
            signalled = rank & ~1 | owner.rank & 1 if pair else rank
            found.append((shared_of(w, rank), mbarrier_of(shared_of(w, signalled), offset)))
    return found


def _load(i: Instruction, p: Program) -> Run:
    """To shared memory, from global memory or from the own CTA's shared memory."""
    only(i, "cp async bulk weak shared:cta shared:cluster global mbarrier:complete_tx:bytes multicast:cluster "
            "L2:cache_hint ignore_oob")  # fmt: skip
    parts = [x for x in i.op if x.startswith("shared") or x == "global"]
    near, from_shared = parts[0] == "shared:cta", parts[1] == "shared:cta"
    if len(parts) != 2 or parts[1] == "shared:cluster" or (near and (from_shared or "multicast:cluster" in i.op)):
        raise unknown(i)
    places = [n for n, x in enumerate(i.operands) if isinstance(x, Address)]
    target, source, barrier = (p.address(i.operands[n]) for n in places)
    size, *ignored = (p.source(x, "u32") for x in i.operands[2 : places[2]])
    if len(ignored) != (2 if "ignore_oob" in i.op else 0) or (ignored and not near):
        raise unknown(i)
    mask = p.source(i.operands[places[2] + 1], "u16") if "multicast:cluster" in i.op else None

    def issue(w: Warp, lane: int) -> None:
        cluster = w.cta.cluster
        d, s, n, b = (int(x(w)[lane]) for x in (target, source, size, barrier))
        _check(d, s, n)
        left, right = (int(x(w)[lane]) for x in ignored) if ignored else (0, 0)
        if max(left, right) > 15:
            raise Fault(f"{left} and {right} bytes to ignore at the ends: 0 to 15 are allowed")
        to = destinations(w, d, b, int(mask(w)[lane]) if mask else None)
        offset = shared_place(w, d, own=near)[1]
        for cta, _ in to:
            cta.shared.check(offset, n)
        if from_shared and shared_place(w, s, own=True)[0] is to[0][0]:
            raise Fault("a bulk copy within the shared memory of one CTA: the destination must be another's")

        def work() -> None:
            data = np.full(n, _FILLER, np.uint8)
            if from_shared:
                data[:] = w.cta.shared.read(s & _OFFSET, n)
            else:
                data[left : n - right] = cluster.launch.memory.bytes(s + left, n - left - right)
            for cta, signal in to:
                cta.shared.write(offset, data)
                # the value of what was ignored is indeterminate
                cta.shared.written[[*range(offset, offset + left), *range(offset + n - right, offset + n)]] = False
                signal.complete(n)

        statistics = cluster.launch.statistics
        statistics.count_copy("bulk load", n * len(to))
        statistics.bytes["distributed shared store" if from_shared else "global load"] += n
        cluster.submit(fresh_queue(w), work)

    return each_lane(issue)


def _save(i: Instruction, p: Program) -> Run:
    """From shared to global memory; a byte mask chooses among each sixteen."""
    only(i, "cp async bulk weak global shared:cta bulk_group L2:cache_hint cp_mask")
    if "cp_mask" in i.op and p.arch.startswith("sm_9"):
        raise unknown(i, f".cp_mask on {p.arch}")
    target, source, size = p.address(i.operands[0]), p.address(i.operands[1]), p.source(i.operands[2], "u32")
    mask = p.source(i.operands[-1], "u16") if "cp_mask" in i.op else None

    def issue(w: Warp, lane: int) -> None:
        launch = w.cta.cluster.launch
        d, s, n = (int(x(w)[lane]) for x in (target, source, size))
        _check(d, s, n)
        chosen = np.flatnonzero(int(mask(w)[lane]) >> np.arange(n) % 16 & 1) if mask else np.arange(n)
        offset = shared_place(w, s, own=True)[1]

        def read() -> Array:
            return w.cta.shared.read(offset, n)

        def write(data: Array) -> None:
            block = launch.memory.find(d, n, write=True)
            launch.memory.note(block, chosen + (d - block.base), write=True)
            block.data[chosen + (d - block.base)] = data[chosen]

        launch.statistics.count_copy("bulk store", n)
        launch.statistics.bytes["global store"] += n
        submit_grouped(w, np.array([lane]), "bulk store", read, write)

    return each_lane(issue)


# PTX ISA, "cp.reduce.async.bulk": operations and element types by destination
_INTEGERS = {"add": "u32 s32 u64", "min": "u32 s32", "max": "u32 s32", "inc": "u32", "dec": "u32",
             "and": "b32", "or": "b32", "xor": "b32"}  # fmt: skip
_REDUCTIONS = {
    "shared:cluster": _INTEGERS,
    "global": {
        **_INTEGERS, "add": "u32 s32 u64 f32 f64 f16 bf16", "min": "u32 s32 u64 s64 f16 bf16",
        "max": "u32 s32 u64 s64 f16 bf16", "and": "b32 b64", "or": "b32 b64", "xor": "b32 b64",
    },
}  # fmt: skip


def _reduce(i: Instruction, p: Program) -> Run:
    """Every element is reduced by itself, atomically."""
    where, name, kind = i.op[4], next((x for x in i.op if x in ATOMIC), ""), kind_of(i)
    only(i, f"cp reduce async bulk {where} shared:cta mbarrier:complete_tx:bytes bulk_group L2:cache_hint noftz "
            f"{name} {kind}")  # fmt: skip
    if kind not in _REDUCTIONS.get(where, {}).get(name, "").split():
        raise unknown(i, f"{name} of {kind} in {where} memory")
    if (kind in ("f16", "bf16") and name == "add") != ("noftz" in i.op):
        raise unknown(i, ".noftz belongs to .add of .f16 and .bf16")
    target, source, size = p.address(i.operands[0]), p.address(i.operands[1]), p.source(i.operands[2], "u32")
    barrier = p.address(i.operands[3]) if where == "shared:cluster" else None
    dtype = UINT[DTYPES[kind].itemsize]

    def reduced(old: Array, new: Array) -> Array:
        return combine(name, kind, old.copy().view(dtype), new.copy().view(dtype)).view(np.uint8)

    def issue(w: Warp, lane: int) -> None:
        cluster = w.cta.cluster
        d, s, n = (int(x(w)[lane]) for x in (target, source, size))
        _check(d, s, n)
        offset = shared_place(w, s, own=True)[1]
        cluster.launch.statistics.count_copy("bulk reduction", n)
        if barrier is None:

            def read() -> Array:
                return w.cta.shared.read(offset, n).copy()

            def write(new: Array) -> None:
                old = cluster.launch.memory.bytes(d, n)
                cluster.launch.memory.bytes(d, n, True)[:] = reduced(old, new)

            submit_grouped(w, np.array([lane]), "bulk reduction", read, write, atomic=True)
            return
        ((cta, signal),) = destinations(w, d, int(barrier(w)[lane]), None)
        place = shared_place(w, d)[1]
        cta.shared.check(place, n)
        operation = cluster.hazards.operation("bulk reduction")

        def work() -> None:
            new = w.cta.shared.read(offset, n)
            operation.strong = True
            cta.shared.write(place, reduced(cta.shared.read(place, n), new))
            operation.strong = False
            signal.complete(n)
            cluster.hazards.retire(operation)

        cluster.submit(fresh_queue(w), work, operation)

    return each_lane(issue)


def _prefetch(i: Instruction, p: Program) -> Run:
    """Moves nothing, but what it names must be there."""
    only(i, "cp async bulk prefetch L2 global L2:cache_hint")
    source, size = p.address(i.operands[0]), p.source(i.operands[1], "u32")

    def run(w: Warp, m: Mask) -> str | None:
        for lane in np.flatnonzero(_ALL if m is None else m):
            s, n = int(source(w)[lane]), int(size(w)[lane])
            _check(0, s, n)
            if n:
                w.cta.cluster.launch.memory.find(s, n)
        return None

    return run


# --- stores of registers ---


def store_async(i: Instruction, p: Program) -> Run:
    """st.async and red.async into the shared memory of a cluster, which signal an mbarrier beside what they write."""
    reduction = i.op[0] == "red"
    name = next((x for x in i.op if x in ATOMIC), "") if reduction else ""
    kind = kind_of(i)
    only(i, f"{i.op[0]} async weak relaxed cluster shared:cluster mbarrier:complete_tx:bytes v2 v4 {name} {kind}")
    if reduction and kind not in _INTEGERS.get(name, "").split():
        raise unknown(i, f"{name} of {kind}")
    size = DTYPES[kind].itemsize
    target, barrier = p.address(i.operands[0]), p.address(i.operands[2])
    sources = [p.source(x, f"b{8 * size}") for x in p.vector(i.operands[1])]
    total = size * len(sources)

    def run(w: Warp, m: Mask) -> str | None:
        cluster = w.cta.cluster
        if len(cluster.ctas) == 1:
            raise Fault(f"{i.op[0]}.async in a cluster of one CTA")
        addresses, barriers, values = target(w), barrier(w), np.stack([s(w) for s in sources], 1)
        # lanes that signal the same mbarrier count as one operation: who waits for it has waited for all of them
        together: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for lane in map(int, np.flatnonzero(_ALL if m is None else m)):
            cta, offset = shared_place(w, int(addresses[lane]))
            if offset % total:
                raise Fault(f"shared address {offset:#x} is not a multiple of the access's {total} bytes")
            cta.shared.check(offset, total)
            together.setdefault((cta.rank, int(barriers[lane])), []).append((lane, offset))

        def issue(rank: int, at: int, places: list[tuple[int, int]]) -> None:
            lanes = [lane for lane, _ in places]
            data = values[lanes]
            ((cta, signal),) = destinations(w, int(addresses[lanes[0]]), at, None)
            if reduction and cta is w.cta:
                raise Fault("red.async to the shared memory of the executing CTA: it must be another's")
            index = np.array([offset for _, offset in places])[:, None] + np.arange(total)
            queue = (f"{i.op[0]}.async", w.cta.rank, w.index, rank, at)
            operation = cluster.hazards.operation(queue[0], chain=queue, asynchronous=False)
            operation.strong = reduction

            def work() -> None:
                if name:
                    for (offset, *_), value in zip(index.tolist(), data, strict=True):
                        old = cta.shared.read(offset, size).copy().view(UINT[size])
                        cta.shared.write(offset, combine(name, kind, old, value).view(np.uint8))
                else:
                    cta.shared.scatter(index, data.view(np.uint8).reshape(index.shape))
                signal.complete(index.size)

            cluster.launch.statistics.bytes["distributed shared store"] += total * len(lanes)
            cluster.submit(queue, work, operation)

        for (rank, at), places in together.items():
            issue(rank, at, places)
        return None

    return run


def store_bulk(i: Instruction, p: Program) -> Run:
    """st.bulk: zeros."""
    only(i, "st bulk weak shared:cta")
    if constant(i.operands[2]) != 0 or p.arch.startswith("sm_9"):
        raise unknown(i)
    target, size = p.address(i.operands[0]), p.source(i.operands[1], "u64")

    def run(w: Warp, m: Mask) -> str | None:
        for lane in np.flatnonzero(_ALL if m is None else m):
            (cta, offset), n = shared_place(w, int(target(w)[lane]), own=True), int(size(w)[lane])
            if n % 8 or n > MAX_BULK_STORE:
                raise Fault(f"st.bulk of {n} bytes, which is not a multiple of 8 up to {MAX_BULK_STORE}")
            cta.shared.write(offset, np.zeros(n, np.uint8))
        return None

    return run
