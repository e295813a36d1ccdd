"""Barriers of a CTA and of a cluster, mbarriers, fences, and what steers a thread (PTX ISA, "Parallel Synchronization
and Communication Instructions": bar, barrier.cluster, mbarrier, membar/fence; "Miscellaneous": nanosleep, trap).

An mbarrier's phase ends when no arrival is pending and its transaction count is zero. A wait for a parity is over when
the phase of that parity has ended, that is when the current phase has the other one.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import Fault
from ..hazards import CAUSAL, GLOBAL, SHARED, TENSORMAP, Actor, Clock
from ..machine import LANES, Cluster, Cta, Warp
from ..memory import RANK_SHIFT, SHARED_WINDOW, WINDOW_SHIFT
from ..numbers import U64, Array
from ..parser import Address, Instruction, Sink, Sym
from ..program import Mask, Program, Run, decoder, only, simple, unknown
from .data import shared_of, space_of

_ALL = np.ones(LANES, bool)
MBARRIER_BYTES = 8
_COUNT_BITS = 20  # of a state, below the phase: the pending count
MAX_COUNT = (1 << _COUNT_BITS) - 1  # of arrivals and of transactions


# --- named barriers ---


@dataclass(slots=True)
class NamedBarrier:
    """arrived: threads; expected: 0 for all of the CTA; generation: times it completed; votes: of bar.red; visits:
    actors and times of the arrivals, by generation.
    """

    arrived: int = 0
    expected: int = 0
    generation: int = 0
    votes: int = 0
    voters: int = 0
    result: tuple[int, int] = (0, 0)
    gathered: Clock = field(default_factory=Clock)  # what those who came have seen
    released: Clock = field(default_factory=Clock)  # what those who came last time had
    visits: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def visit(self, number: int, by: Actor, before: int) -> None:
        """by arrives, and did so last in generation `before`, which it must know to be over. Raises Fault. (PTX ISA,
        "barrier": a warp that has arrived may not come again "prior to the reset of the barrier".)
        """
        if before == self.generation or any(
            not by.clock.covers(CAUSAL, *visit) for visit in self.visits.get(before, ())
        ):
            raise Fault(f"barrier {number} is come to again, with no order after its completion by the others")
        self.visits.setdefault(self.generation, []).append((by.index, by.time))


@decoder("bar", "barrier")
def _bar(i: Instruction, p: Program) -> Run:
    if i.op[1] == "cluster":
        return _cluster_barrier(i)
    parts = [x for x in i.op[1:] if x not in ("cta",)]
    # bar is barrier.aligned; sync of a warp is not a barrier of the CTA
    action = parts[0]
    if action == "warp":
        return _warp_barrier(i, p)
    aligned = i.op[0] == "bar" or "aligned" in parts
    operands = list(i.operands)
    target = operands.pop(0) if action == "red" else None
    vote = operands.pop() if action == "red" else None
    which = p.source(operands[0], "u32")
    count = p.source(operands[1], "u32") if len(operands) > 1 else None
    if action == "arrive" and count is None:
        raise unknown(i, "arrive without a thread count")
    read = p.source(vote, "pred") if vote is not None else None
    name = next((x for x in parts if x in ("popc", "and", "or")), "")
    write = p.target(target, "u32" if name == "popc" else "pred") if target is not None else None

    def run(w: Warp, m: Mask) -> str | None:
        if aligned and not w.everyone(m):
            return "an aligned barrier is executed by a divergent warp"
        number = int(which(w)[0 if m is None else int(np.argmax(m))])
        if not 0 <= number < 16:
            raise Fault(f"barrier {number} is not one of 0..15")
        barrier = w.cta.barriers.setdefault(number, NamedBarrier())
        here = w.alive if m is None else m
        # by lane: the generation that it waits for the end of, or -1; fragments that wait may become one
        if ("bar", number) not in w.state:
            w.state["bar", number] = np.full(LANES, -1)
        waited = w.state["bar", number]
        come = here & (waited < 0)
        if b"\1" in come.tobytes():
            expected = int(count(w)[int(np.argmax(here))]) if count else 0
            if expected % LANES:
                raise Fault(f"barrier {number} for {expected} threads, which is not a multiple of {LANES}")
            if barrier.arrived and barrier.expected != expected:
                raise Fault(f"barrier {number} for {expected} threads, but others came for {barrier.expected}")
            barrier.expected = expected
            if w.cta.cluster.launch.races:
                came = w.state.setdefault(("bar came", number), np.full(LANES, -1))
                barrier.visit(number, w.actor, int(came[come].max()))
                came[come] = barrier.generation
            barrier.arrived += int(come.sum())
            if come[np.argmax(w.alive)]:
                # a warp counts as a whole: the lanes that it lacks, or that are over, come with its first one
                barrier.arrived += LANES - int(w.alive.sum())
            if read:
                barrier.votes += int((read(w) & come).sum())
                barrier.voters += int(come.sum())
            if action != "arrive":
                waited[come] = barrier.generation
            w.actor.release(barrier.gathered)
        _complete(w.cta, number, barrier)
        if action == "arrive":
            return None
        if b"\1" in (here & (waited == barrier.generation)).tobytes():
            wanted = barrier.expected or "all"
            return f"waits at barrier {number}, {barrier.arrived} of {wanted} threads are there"
        waited[here] = -1
        w.actor.acquire(barrier.released)
        if write:
            votes, voters = barrier.result
            result: Any = {"popc": votes, "and": votes == voters, "or": votes > 0}[name]
            write(w, np.full(LANES, result, np.uint32 if name == "popc" else bool), m)
        return None

    return run


def _complete(cta: Cta, number: int, barrier: NamedBarrier) -> None:
    expected = barrier.expected or LANES * sum(bool(w.fragments) for w in cta.warps)
    if barrier.arrived > expected:
        raise Fault(f"barrier {number} for {expected} threads: {barrier.arrived} came")
    if barrier.arrived == expected:
        barrier.generation += 1
        barrier.result = (barrier.votes, barrier.voters)
        barrier.arrived = barrier.votes = barrier.voters = 0
        barrier.released, barrier.gathered = barrier.gathered, Clock()


def _warp_barrier(i: Instruction, p: Program) -> Run:
    from .warp import members

    wait = members(p, i.operands[0])
    return lambda w, m: wait(w, m)


def _cluster_barrier(i: Instruction) -> Run:
    if i.op[2] == "arrive":

        def arrive(w: Warp, m: Mask) -> str | None:
            if "aligned" in i.op and not w.everyone(m):
                return "an aligned cluster barrier is executed by a divergent warp"
            here = w.alive if m is None else m
            waited = w.state.setdefault("cluster", np.full(LANES, -1))
            if (waited[here] >= 0).any():
                raise Fault("barrier.cluster.arrive twice without a wait")
            state = w.cta.cluster.state
            waited[here] = state.setdefault("generation", 0)
            state["arrived"] = state.get("arrived", 0) + int(here.sum())
            w.actor.release(state.setdefault("gathered", Clock()), relaxed="relaxed" in i.op)
            _cluster_complete(w.cta.cluster)
            return None

        return arrive

    def wait(w: Warp, m: Mask) -> str | None:
        if "aligned" in i.op and not w.everyone(m):
            return "an aligned cluster barrier is executed by a divergent warp"
        here = w.alive if m is None else m
        waited = w.state.get("cluster", np.full(LANES, -1))
        if (waited[here] < 0).any():
            raise Fault("barrier.cluster.wait without an arrive")
        cluster = w.cta.cluster
        _cluster_complete(cluster)
        if (waited[here] == cluster.state["generation"]).any():
            return f"waits at the cluster barrier, {cluster.state['arrived']} threads are there"
        waited[here] = -1
        w.actor.acquire(cluster.state["released"])
        return None

    return wait


def _cluster_complete(cluster: Cluster) -> None:
    living = sum(int(w.alive.sum()) for cta in cluster.ctas for w in cta.warps)
    if cluster.state.get("arrived", 0) >= living:
        cluster.state["arrived"] = 0
        cluster.state["generation"] += 1
        cluster.state["released"] = cluster.state.pop("gathered")


# --- mbarrier ---


@dataclass(slots=True)
class MBarrier:
    """phase counts the phases that ended. made: the event of its mbarrier.init."""

    cta: Cta
    expected: int
    pending: int
    made: int
    transactions: int = 0
    phase: int = 0
    gathered: Clock = field(default_factory=Clock)  # what those who arrived have seen
    released: Clock = field(default_factory=Clock)  # what they had seen when the last phase ended

    def arrive(self, count: int, relaxed: bool = False) -> None:
        self.used().release(self.gathered, relaxed)
        if count > self.pending:
            raise Fault(f"mbarrier: {count} arrivals, but only {self.pending} of {self.expected} are pending")
        self.pending -= count
        self._end()

    def expect(self, count: int) -> None:
        self.used()
        self._count(count)

    def complete(self, count: int) -> None:
        self.used().release(self.gathered)
        self._count(-count)
        self._end()

    def used(self) -> Actor:
        """The current actor, which must have seen the barrier made. Raises Fault."""
        hazards = self.cta.cluster.hazards
        actor = hazards.current
        assert actor is not None
        if self.cta.cluster.launch.races:
            if not hazards.ordered(self.made, actor, CAUSAL):
                made = hazards.sites[self.made]
                raise Fault(f"data race: an mbarrier is used, with no order after it was made by {made}")
            if actor.warp.cta is not self.cta:
                hazards.foreign(self.cta, hazards.site(actor))
        return actor

    def _count(self, change: int) -> None:
        self.transactions += change
        if abs(self.transactions) > MAX_COUNT:
            raise Fault(f"mbarrier: transaction count {self.transactions} is out of range")

    def _end(self) -> None:
        if self.pending == 0 and self.transactions == 0:
            self.phase += 1
            self.pending = self.expected
            self.released = self.gathered.copy()


def mbarrier_at(w: Warp, address: int) -> MBarrier:
    """The mbarrier at a shared window address (own or another CTA's). Raises Fault."""
    if address >> WINDOW_SHIFT:
        address -= SHARED_WINDOW
    cta = shared_of(w, address >> RANK_SHIFT)
    return mbarrier_of(cta, address & ((1 << RANK_SHIFT) - 1))


def mbarrier_of(cta: Cta, offset: int) -> MBarrier:
    if offset not in cta.mbarriers:
        raise Fault(f"shared address {offset:#x} of CTA rank {cta.rank} holds no initialised mbarrier")
    found: MBarrier = cta.mbarriers[offset]
    return found


def _own(w: Warp, address: int) -> int:
    if address >> WINDOW_SHIFT:
        address -= SHARED_WINDOW
    if address >> RANK_SHIFT != w.cta.rank:
        raise Fault(f"mbarrier of CTA rank {address >> RANK_SHIFT} where the own CTA's is required")
    return address & ((1 << RANK_SHIFT) - 1)


@decoder("mbarrier")
def _mbarrier(i: Instruction, p: Program) -> Run:
    action = i.op[1]
    handlers: dict[str, Callable[[Instruction, Program], Run]] = {
        "init": _init,
        "inval": _inval,
        "arrive": _arrive,
        "arrive_drop": _arrive,
        "expect_tx": _transaction,
        "complete_tx": _transaction,
        "try_wait": _wait,
        "test_wait": _wait,
    }
    own = {"arrive": "expect_tx noComplete", "try_wait": "parity", "test_wait": "parity"}
    only(i, f"mbarrier {action} {own.get(action.removesuffix('_drop'), '')} {_QUALIFIERS}")
    if action == "pending_count":
        return _pending_count(i, p)
    if action not in handlers or space_of(i) not in ("shared", "generic"):
        raise unknown(i)
    return handlers[action](i, p)


# of the two layouts and kinds of phases only version 0 and primary, where conditional ones are the same
_QUALIFIERS = (
    "b64 release acquire relaxed cta cluster shared shared:cta shared:cluster layout:v0 phase_type:primary "
    "phase_type:conditional"
)


def _one_number(lanes: Array) -> bool:
    data = lanes.tobytes()
    return data == data[: lanes.itemsize] * LANES


def _lanes(m: Mask) -> Array:
    return np.flatnonzero(_ALL if m is None else m)


def _init(i: Instruction, p: Program) -> Run:
    address, count = p.address(i.operands[0]), p.source(i.operands[1], "u32")

    def run(w: Warp, m: Mask) -> str | None:
        for lane in _lanes(m):
            offset, n = _own(w, int(address(w)[lane])), int(count(w)[lane])
            if offset % MBARRIER_BYTES:
                raise Fault(f"mbarrier at {offset:#x}, which is not a multiple of {MBARRIER_BYTES}")
            if not 1 <= n <= MAX_COUNT:
                raise Fault(f"mbarrier.init with a count of {n}")
            if offset in w.cta.mbarriers:
                raise Fault(f"mbarrier.init at {offset:#x}, where a valid mbarrier is")
            w.cta.shared.check(offset, MBARRIER_BYTES)
            w.cta.mbarriers[offset] = MBarrier(w.cta, n, n, w.cta.cluster.hazards.site(w.actor))
        return None

    return run


def _inval(i: Instruction, p: Program) -> Run:
    address = p.address(i.operands[0])

    def run(w: Warp, m: Mask) -> str | None:
        for lane in _lanes(m):
            offset = _own(w, int(address(w)[lane]))
            mbarrier_of(w.cta, offset)
            del w.cta.mbarriers[offset]
        return None

    return run


def _arrive(i: Instruction, p: Program) -> Run:
    operands = list(i.operands)
    state = None if isinstance(operands[0], Address) else operands.pop(0)
    write = p.target(state, "b64") if state is not None and not isinstance(state, Sink) else None
    address = p.address(operands[0])
    expect, drop, incomplete = "expect_tx" in i.op, i.op[1] == "arrive_drop", "noComplete" in i.op
    extra = p.source(operands[1], "u32") if len(operands) > 1 else None
    if (expect or incomplete) and extra is None:
        raise unknown(i, "without a count")

    def run(w: Warp, m: Mask) -> str | None:
        a, n, token = address(w), extra(w) if extra else None, np.zeros(LANES, U64)
        for lane in _lanes(m):
            barrier = mbarrier_at(w, int(a[lane]))
            if write and barrier.cta is not w.cta:
                raise Fault("an arrival at another CTA's mbarrier gives no state")
            token[lane] = barrier.phase << _COUNT_BITS | barrier.pending
            amount = 1
            if expect:
                assert n is not None
                barrier.expect(int(n[lane]))
            elif n is not None:
                amount = int(n[lane])
            if drop:
                barrier.expected -= amount
                if barrier.expected < 1:
                    raise Fault("mbarrier.arrive_drop leaves no expected arrivals")
            if incomplete and amount >= barrier.pending and barrier.transactions == 0:
                raise Fault("an mbarrier arrival with .noComplete would complete the phase")
            barrier.arrive(amount, relaxed="relaxed" in i.op)
        if write:
            write(w, token, m)
        return None

    return run


def _pending_count(i: Instruction, p: Program) -> Run:
    """Of the state that an arrive gave: what was pending before it."""
    mask = U64(MAX_COUNT)
    state, write = p.source(i.operands[1], "b64"), p.target(i.operands[0], "u32")
    return simple([state], write, lambda token: (token & mask).astype(np.uint32))


def _transaction(i: Instruction, p: Program) -> Run:
    address, count, expect = p.address(i.operands[0]), p.source(i.operands[1], "u32"), i.op[1] == "expect_tx"

    def run(w: Warp, m: Mask) -> str | None:
        for lane in _lanes(m):
            barrier = mbarrier_at(w, int(address(w)[lane]))
            (barrier.expect if expect else barrier.complete)(int(count(w)[lane]))
        return None

    return run


def _wait(i: Instruction, p: Program) -> Run:
    """try_wait waits until the phase of one of the lanes has ended, and tells the others that theirs has not: fragments
    of a loop may meet in different rounds, where one must go on for the other's barrier. It gives up when no warp can
    go on, for it has a limit of time. test_wait looks and goes on.
    """
    write, address = p.target(i.operands[0], "pred"), p.address(i.operands[1])
    parity, blocking = "parity" in i.op, i.op[1] == "try_wait"
    which = p.source(i.operands[2], "u32" if parity else "b64")

    def run(w: Warp, m: Mask) -> str | None:
        a, phase, done, waiting = address(w), which(w), np.zeros(LANES, bool), ""
        lanes = (0 if m is None else int(m.argmax()),) if _one_number(a) and _one_number(phase) else _lanes(m)
        for lane in lanes:
            offset, wanted = _own(w, int(a[lane])), int(phase[lane]) >> (0 if parity else _COUNT_BITS)
            barrier = mbarrier_of(w.cta, offset)
            if parity and wanted not in (0, 1):
                raise Fault(f"mbarrier wait for parity {wanted}")
            over = barrier.phase & 1 != wanted if parity else barrier.phase > wanted
            done[lane] = over
            if not over:
                waiting = (
                    f"waits for {'parity' if parity else 'phase'} {wanted} of mbarrier {offset:#x} (now phase "
                    f"{barrier.phase}, {barrier.pending} of {barrier.expected} arrivals and "
                    f"{barrier.transactions} bytes pending)"
                )
            else:
                barrier.used().acquire(barrier.released, relaxed="relaxed" in i.op)
        if blocking and waiting and not done.any():
            if w.actor.pc not in w.expired:
                return waiting
            w.expired.remove(w.actor.pc)
        if len(lanes) == 1:
            done[:] = done[lanes[0]]
        w.cta.cluster.launch.statistics.events["mbarrier waits"] += 1
        write(w, done, m)
        return None

    return run


# --- fences and the rest ---


@decoder("fence", "membar")
def _fence(i: Instruction, p: Program) -> Run:
    """Threads see one memory in the order of execution: a fence only orders what the hazard checks look at."""
    if "proxy" not in i.op:
        return _for_actor(lambda actor: actor.fence())
    if any(x.startswith("tensormap") for x in i.op):
        rows: tuple[int, ...] = () if "release" in i.op else (TENSORMAP,)
        return _for_actor(lambda actor: actor.proxy_fence(*rows))
    if "alias" in i.op:
        return lambda w, m: None
    if {"acquire", "release"} & set(i.op):
        return _for_actor(_directed_fence)
    spaces: dict[str, tuple[int, ...]] = {"global": (GLOBAL,), "shared:cta": (SHARED,), "shared:cluster": (SHARED,)}
    rows = next((spaces[x] for x in i.op if x in spaces), (SHARED, GLOBAL))
    return _for_actor(lambda actor: actor.proxy_fence(*rows))


def _directed_fence(actor: Actor) -> None:
    """fence.proxy.async::generic.release and .acquire, for shared memory only: also what a fence is."""
    actor.fence()
    actor.proxy_fence(SHARED)


def _for_actor(action: Callable[[Actor], Any]) -> Run:
    def run(w: Warp, m: Mask) -> str | None:
        action(w.actor)
        return None

    return run


@decoder("nanosleep", "pmevent")
def _nothing(i: Instruction, p: Program) -> Run:
    return lambda w, m: None


@decoder("call")
def _call(i: Instruction, p: Program) -> Run:
    """Calls of functions that the module defines are gone by now, see `parser`."""
    (name,) = i.operands
    assert isinstance(name, Sym)
    raise unknown(i, f"call of {name.name}, which is not defined here, or recursive")


@decoder("trap", "brkpt")
def _trap(i: Instruction, p: Program) -> Run:
    def run(w: Warp, m: Mask) -> str | None:
        raise Fault(f"{i.op[0]} was executed")

    return run
