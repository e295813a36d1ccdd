"""tcgen05: tensor memory and the tensor cores of sm_100 (PTX ISA, "TensorCore 5th Generation Family Instructions").

Here: the dispatch, allocation, waits and commit. Loads, stores, copies and shifts are in tcgen05_copy, MMA in
tcgen05_mma. mma, cp, shift and commit of a CTA pair are carried out in the order of issue, some time after it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..errors import Fault
from ..hazards import Clock
from ..machine import LANES, Cta, Warp
from ..memory import RANK_SHIFT, SHARED_WINDOW, WINDOW_SHIFT
from ..numbers import U32
from ..parser import Instruction
from ..program import Mask, Program, Run, decoder, uniform, unknown
from .data import shared_of
from .sync import mbarrier_of
from .tcgen05_copy import cp, ld, shift, st
from .tcgen05_memory import (
    COLUMNS,
    TensorMemory,
    group,
    issued,
    members_of,
    pair_of,
    pending,
    submit,
    tensor_memory,
    under_way,
    waited,
)
from .tcgen05_mma import mma

_ALL = np.ones(LANES, bool)
_OFFSET = (1 << RANK_SHIFT) - 1


@decoder("tcgen05")
def _tcgen05(i: Instruction, p: Program) -> Run:
    if not p.arch.startswith("sm_10"):
        raise unknown(i, f"{p.arch} has no tensor memory")
    handlers: dict[str, Callable[[Instruction, Program], Run]] = {
        "alloc": _alloc,
        "dealloc": _dealloc,
        "relinquish_alloc_permit": _relinquish,
        "ld": ld,
        "st": st,
        "cp": cp,
        "shift": shift,
        "mma": mma,
        "commit": _commit,
        "fence:before_thread_sync": _fence,
        "fence:after_thread_sync": _fence,
        "wait:ld": _wait,
        "wait:st": _wait,
    }
    if i.op[1] not in handlers:
        raise unknown(i)
    return handlers[i.op[1]](i, p)


def _fence(i: Instruction, p: Program) -> Run:
    """Orders tcgen05 operations across threads, with the synchronisation beside it ("Canonical synchronization
    patterns")."""
    if i.op[1] == "fence:after_thread_sync":
        return lambda w, m: w.actor.after_thread_sync()

    def before(w: Warp, m: Mask) -> str | None:
        w.actor.before_thread_sync(issued(w, m), w.cta.cluster.hazards.strict)
        return None

    return before


def _wait(i: Instruction, p: Program) -> Run:
    """Loads and stores are carried out when issued, but only from here on is it sure."""
    kind = i.op[1].partition(":")[2]

    def run(w: Warp, m: Mask) -> str | None:
        for operation in pending(w, kind):
            waited(w, kind, operation)
        return None

    return run


# --- allocation (PTX ISA, "tcgen05.alloc, tcgen05.dealloc, tcgen05.relinquish_alloc_permit") ---
#
# With cta_group::2 a warp of each CTA takes part. The first to come waits for the other; both get the same columns.

_ASKED, _ANSWER = "tcgen05 collective", "tcgen05 answer"


@dataclass(frozen=True, slots=True)
class _Request:
    """What a warp has come for, and what it knew then."""

    warp: int
    what: str
    amount: tuple[int, ...]
    clock: Clock


def _together(w: Warp, members: list[Cta], what: str, amount: tuple[int, ...]) -> str | None:
    """Whether all CTAs of the group have come with the same request: None, or why this warp waits."""
    if len(members) == 1:
        return None
    (peer,) = (c for c in members if c is not w.cta)
    if _ASKED not in w.cta.state:
        w.cta.state[_ASKED] = _Request(w.index, what, amount, Clock())
        w.actor.release(w.cta.state[_ASKED].clock)
    mine, theirs = w.cta.state[_ASKED], peer.state.get(_ASKED)
    if mine.warp != w.index:
        return f"waits for warp {mine.warp} and its {mine.what}"
    if theirs is None:
        return f"waits for {what} of CTA rank {peer.rank}"
    if (theirs.what, theirs.amount) != (what, amount):
        raise Fault(
            f"{what} of {amount} in CTA rank {w.cta.rank}, but {theirs.what} of {theirs.amount} in rank {peer.rank}"
        )
    w.actor.acquire(theirs.clock)
    return None


def _conclude(w: Warp, members: list[Cta], answer: int) -> None:
    """The collective is over; the peer's warp finds its answer when it looks again."""
    for cta in members:
        request = cta.state.pop(_ASKED, None)
        if cta is not w.cta:
            cta.state[_ANSWER] = (request.warp, answer)


def _answered(w: Warp) -> int | None:
    answer = w.cta.state.get(_ANSWER)
    if answer is None or answer[0] != w.index:
        return None
    del w.cta.state[_ANSWER]
    return int(answer[1])


def _first_free(memory: TensorMemory, columns: int) -> int | None:
    """First column of a free run. Both CTAs of a pair have the same."""
    first = 0
    for start in sorted(memory.allocated):
        if start - first >= columns:
            break
        first = start + memory.allocated[start]
    return first if first + columns <= COLUMNS else None


def _alloc(i: Instruction, p: Program) -> Run:
    target, count, ctas = p.address(i.operands[0]), p.source(i.operands[1], "u32"), pair_of(i)

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.alloc is executed by a divergent warp"
        columns = uniform(count(w), m, "the number of columns")
        if columns < 32 or columns > COLUMNS or columns & (columns - 1):
            raise Fault(f"tcgen05.alloc of {columns} columns: a power of two from 32 to {COLUMNS} is required")
        members = members_of(w, ctas, "tcgen05.alloc")
        first = _answered(w)
        if first is None:
            memory = tensor_memory(w.cta)
            if memory.relinquished:
                raise Fault("tcgen05.alloc after relinquish_alloc_permit")
            if columns > memory.least:
                raise Fault(f"tcgen05.alloc of {columns} columns after one of {memory.least}: it may not grow")
            if (waits := _together(w, members, "tcgen05.alloc", (columns,))) is not None:
                return waits
            first = _first_free(memory, columns)
            if first is None:
                return f"waits for {columns} free columns of tensor memory"
            for cta in members:
                tensor_memory(cta).allocate(first, columns)
            _conclude(w, members, first)
        for cta in members:
            w.actor.acquire(tensor_memory(cta).freed)
        address = uniform(target(w), m, "the address of the result")
        if address >> WINDOW_SHIFT:
            address -= SHARED_WINDOW
        shared_of(w, address >> RANK_SHIFT).shared.write(address & _OFFSET, np.array([first], U32).view(np.uint8))
        return None

    return run


def _dealloc(i: Instruction, p: Program) -> Run:
    address, count, ctas = p.source(i.operands[0], "u32"), p.source(i.operands[1], "u32"), pair_of(i)

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.dealloc is executed by a divergent warp"
        members = members_of(w, ctas, "tcgen05.dealloc")
        if _answered(w) is not None:
            return None
        first, columns = uniform(address(w), m, "the address"), uniform(count(w), m, "the number of columns")
        memory = tensor_memory(w.cta)
        if memory.allocated.get(first) != columns:
            raise Fault(f"tcgen05.dealloc of {columns} columns from {first:#x}; allocated are {memory.allocated}")
        if under_way(w.cta):
            raise Fault("tcgen05.dealloc while tensor core work is under way")
        for kind in ("ld", "st"):  # of this thread: "Synchronous instructions" are in order with them
            for operation in pending(w, kind):
                waited(w, kind, operation)
        if (waits := _together(w, members, "tcgen05.dealloc", (first, columns))) is not None:
            return waits
        for cta in members:
            tensor_memory(cta).free(first)
            w.actor.release(tensor_memory(cta).freed)
        _conclude(w, members, first)
        return None

    return run


def _relinquish(i: Instruction, p: Program) -> Run:
    ctas = pair_of(i)

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "tcgen05.relinquish_alloc_permit is executed by a divergent warp"
        members_of(w, ctas, "tcgen05.relinquish_alloc_permit")
        tensor_memory(w.cta).relinquished = True
        return None

    return run


# --- commit ---


def _commit(i: Instruction, p: Program) -> Run:
    ctas, multicast = pair_of(i), "multicast:cluster" in i.op
    if "mbarrier:arrive:one" not in i.op:
        raise unknown(i)
    address = p.address(i.operands[0])
    mask = p.source(i.operands[1], "u16") if multicast else None

    def run(w: Warp, m: Mask) -> str | None:
        members = group(w, ctas, "tcgen05.commit")
        for lane in np.flatnonzero(_ALL if m is None else m):
            at = int(address(w)[lane])
            if at >> WINDOW_SHIFT:
                at -= SHARED_WINDOW
            ranks = [r for r in range(16) if int(mask(w)[lane]) >> r & 1] if mask else [at >> RANK_SHIFT]

            def work(at: int = at, ranks: list[int] = ranks) -> None:
                hazards = w.cta.cluster.hazards
                assert hazards.current is not None
                hazards.current.announce((), hazards.strict)
                for rank in ranks:
                    mbarrier_of(shared_of(w, rank), at & _OFFSET).arrive(1)

            submit(w, int(lane), members, work, ("commit",), touches=False)
        return None

    return run
