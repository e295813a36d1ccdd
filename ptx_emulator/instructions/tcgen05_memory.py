"""Tensor memory (PTX ISA, "Tensor Memory"): 128 lanes of 512 columns of 32 bits in every CTA.

An address holds the lane in its upper and the column in its lower half. Lanes 0-31, 32-63, 64-95 and 96-127 are the
four sub-partitions, one to each warp of a warpgroup.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import Fault
from ..hazards import CAUSAL, Actor, Clock, Pipe, Shadow, in_pipeline
from ..machine import Cta, Warp
from ..numbers import Array
from ..parser import Instruction
from ..program import FINISHERS, Mask

ROWS, COLUMNS = 128, 512
PARTITION = 32  # lanes of a sub-partition
_GROUP, _UNDER_WAY = "tcgen05 cta_group", "tcgen05 work"
_ISSUED, _PENDING = "tcgen05 issued", "tcgen05 pending"

Lanes = slice | Array


class TensorMemory:
    """words[lane, column], which of them were written, and the allocations (first column -> columns).

    freed: what those knew that gave columns back; who gets them later comes after.
    """

    def __init__(self, cta: Cta) -> None:
        self.shadow: Shadow | None = None
        if cta.cluster.launch.races:
            self.shadow = Shadow(
                cta.cluster.hazards,
                (ROWS, COLUMNS),
                CAUSAL,
                lambda at: f"lane {at[0]}, column {at[1]} of tensor memory (rank {cta.rank})",
                tensor=True,
            )
        self.words = np.full((ROWS, COLUMNS), 0xDEADBEEF, np.uint32)
        self.written = np.zeros((ROWS, COLUMNS), bool)
        self.allocated: dict[int, int] = {}
        self.freed = Clock()
        self.relinquished = False
        self.least = COLUMNS  # of columns that were allocated at once so far
        self.most = 0
        self.loaded = self.stored = 0  # bytes

    def allocate(self, first: int, columns: int) -> None:
        self.allocated[first] = columns
        self.least = min(self.least, columns)
        self.most = max(self.most, sum(self.allocated.values()))
        self.written[:, first : first + columns] = False
        if self.shadow is not None:
            self.shadow.forget((slice(0, ROWS), slice(first, first + columns)))

    def free(self, first: int) -> None:
        columns = self.allocated[first]
        self.overwrite(slice(0, ROWS), first, columns)
        del self.allocated[first]

    def check(self, column: int, count: int, what: str) -> None:
        for first, columns in self.allocated.items():
            if first <= column and column + count <= first + columns:
                return
        raise Fault(f"{what}: columns {column}..{column + count - 1} of tensor memory are not allocated")

    def read(self, lanes: Lanes, column: int, count: int, what: str) -> Array:
        """[lanes, count] words, all of them written before."""
        self.check(column, count, what)
        known = self.written[lanes, column : column + count]
        if not known.all():
            lane, at = (int(x[0]) for x in np.nonzero(~known))
            where = int(np.arange(ROWS)[lanes][lane])
            raise Fault(f"{what}: column {column + at} of tensor memory, lane {where}, was never written")
        if self.shadow is not None:
            self.shadow.read((lanes, slice(column, column + count)))
        self.loaded += 4 * known.size
        return self.words[lanes, column : column + count]

    def write(self, lanes: Lanes, column: int, values: Array, what: str) -> None:
        self.check(column, values.shape[-1], what)
        self.overwrite(lanes, column, values.shape[-1])
        self.stored += 4 * values.size
        self.words[lanes, column : column + values.shape[-1]] = values
        self.written[lanes, column : column + values.shape[-1]] = True

    def overwrite(self, lanes: Lanes, column: int, count: int) -> None:
        if self.shadow is not None:
            self.shadow.write((lanes, slice(column, column + count)))

    def shift(self, lane: int, column: int, what: str) -> None:
        """Lanes lane + 1 .. lane + 31 of eight columns move one lane down; lane + 31 keeps what it holds."""
        count = 8
        self.check(column, count, what)
        source, target = slice(lane + 1, lane + PARTITION), slice(lane, lane + PARTITION - 1)
        place = slice(column, column + count)
        if self.shadow is not None:
            self.shadow.read((source, place))
        self.overwrite(target, column, count)
        self.words[target, place] = self.words[source, place].copy()
        self.written[target, place] = self.written[source, place].copy()


def tensor_memory(cta: Cta) -> TensorMemory:
    if cta.tensor_memory is None:
        cta.tensor_memory = TensorMemory(cta)
    found: TensorMemory = cta.tensor_memory
    return found


def contiguous(lanes: Array) -> Lanes:
    """A slice where these lanes are a run: it makes views and not copies."""
    first, count = int(lanes[0]), len(lanes)
    return slice(first, first + count) if np.array_equal(lanes, np.arange(first, first + count)) else lanes


def _finish(cta: Cta) -> None:
    if cta.tensor_memory is not None:
        if cta.tensor_memory.allocated:
            raise Fault(f"CTA {cta.index} ended without giving back tensor memory: {cta.tensor_memory.allocated}")
        stats = cta.cluster.launch.statistics
        stats.tensor_columns = max(stats.tensor_columns, cta.tensor_memory.most)
        stats.bytes["tensor load"] += cta.tensor_memory.loaded
        stats.bytes["tensor store"] += cta.tensor_memory.stored


FINISHERS.append(_finish)


# --- CTA pairs (PTX ISA, "CTA Pair": the two ranks that differ in the last bit) ---


def pair_of(i: Instruction) -> int:
    """CTAs of the group."""
    return 2 if "cta_group:2" in i.op else 1


def members_of(w: Warp, ctas: int, what: str) -> list[Cta]:
    """The CTAs of the warp's group, the even one first. All tcgen05 instructions of a kernel name the same group."""
    before = w.cta.state.setdefault(_GROUP, ctas)
    if before != ctas:
        raise Fault(f"{what} with cta_group::{ctas} in a kernel whose tcgen05 instructions have cta_group::{before}")
    if ctas == 1:
        return [w.cta]
    first = w.cta.rank & ~1
    if first + 1 >= len(w.cta.cluster.ctas):
        raise Fault(f"{what} with cta_group::2: CTA rank {w.cta.rank} has no peer in its cluster")
    return w.cta.cluster.ctas[first : first + 2]


def group(w: Warp, ctas: int, what: str) -> list[Cta]:
    """The CTAs of work that one thread starts, which for a pair is one of the even CTA."""
    members = members_of(w, ctas, what)
    if w.cta is not members[0]:
        raise Fault(f"{what} with cta_group::2 is issued by the odd CTA of the pair")
    return members


# --- carrying out ---


def submit(w: Warp, lane: int, members: list[Cta], work: Callable[[], None], pipe: Pipe, touches: bool = True) -> None:
    """Work of these CTAs' tensor cores that a thread issues; `touches` unless it leaves tensor memory alone."""
    hazards, queue = w.cta.cluster.hazards, ("tcgen05", len(members), w.cta.rank)
    issued = _issued(w).setdefault(lane, {})
    before = [x for p, x in issued.items() if pipe[0] != "mma" or not hazards.strict or in_pipeline(p, pipe)]
    chain = (*queue, w.index, lane, pipe)
    operation = issued[pipe] = hazards.operation(f"tcgen05.{pipe[0]}", chain, after=before, pipe=pipe)
    if not touches:
        w.cta.cluster.submit(queue, work, operation)
        return
    for cta in members:
        cta.state[_UNDER_WAY] = cta.state.get(_UNDER_WAY, 0) + 1

    def run() -> None:
        work()
        for cta in members:
            cta.state[_UNDER_WAY] -= 1

    w.cta.cluster.submit(queue, run, operation)


def _issued(w: Warp) -> dict[int, dict[Pipe, Actor]]:
    """The newest operation of each pipe that the lanes of a warp have issued."""
    found: dict[int, dict[Pipe, Actor]] = w.state.setdefault(_ISSUED, {})
    return found


def issued(w: Warp, m: Mask) -> list[Actor]:
    """Operations of these lanes that may be under way."""
    return [x for lane, pipes in _issued(w).items() if m is None or m[lane] for x in pipes.values()]


def under_way(cta: Cta) -> bool:
    """Whether submitted work on this CTA's tensor memory is not yet carried out."""
    return bool(cta.state.get(_UNDER_WAY))


def at_once(w: Warp, kind: str, work: Callable[[], Any]) -> tuple[Any, Actor]:
    """A tcgen05.ld or .st of this warp: its result, and the operation, which is over once it is waited for."""
    hazards = w.cta.cluster.hazards
    operation = hazards.operation(f"tcgen05.{kind}", asynchronous=False)
    result = hazards.perform(operation, work)
    w.state.setdefault((_PENDING, kind), {})[operation] = None
    return result, operation


def pending(w: Warp, kind: str) -> list[Actor]:
    """tcgen05.ld or .st of this warp that nobody has waited for."""
    return list(w.state.get((_PENDING, kind), ()))


def waited(w: Warp, kind: str, operation: Actor) -> None:
    """This warp knows that a tcgen05.ld or .st is over."""
    if w.state[_PENDING, kind].pop(operation, operation) is None:
        w.actor.acquire(operation.clock)
        w.cta.cluster.hazards.retire(operation)
