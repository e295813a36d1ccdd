"""Data races and missing proxy fences within a cluster (PTX ISA, "Memory Consistency Model", "Async proxy").

Every access is an event of an actor: a warp, or one asynchronous operation (a TMA copy, a cp.async, a wgmma, the
tcgen05 work of one warp). Two accesses of one place, one of them a write, must be ordered by causality, whatever order
they happened to run in: mbarriers, barriers, strong operations with fences, and waits for groups carry the order.
What the generic proxy wrote must also pass a proxy fence on its way to the async proxy, or to the one that reads
tensor maps.

An actor knows of each other one how far it has seen it: a vector clock, once for plain causality and once for each kind
of proxy fence, that is for what lies before such a fence. Each place remembers its last writer and its readers since.

The lanes of a warp count as ordered among themselves, so exchanges within a warp that lack bar.warp.sync are not found.
Clusters run one after another: races between clusters are not looked for. That tcgen05.fence is missing is not found.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import Fault
from .numbers import Array

if TYPE_CHECKING:
    from .machine import Cta, Warp

# rows of a clock: what came before; what came before a fence to the async proxy (by space) or to tensor maps; and what
# was executed before a relaxed arrival, which lets memory go but orders no access
CAUSAL, SHARED, GLOBAL, TENSORMAP, EXECUTED = range(5)
ROWS = 5
_ROOM = 64


class Clock:
    """seen[row, actor]: the last time of the actor that is known of."""

    __slots__ = ("seen",)

    def __init__(self, seen: Array | None = None):
        self.seen = np.zeros((ROWS, _ROOM), np.int32) if seen is None else seen

    def copy(self) -> "Clock":
        return Clock(self.seen.copy())

    def join(self, other: "Clock") -> None:
        count = other.seen.shape[1]
        self.reach(count)
        mine = self.seen[:, :count]
        np.maximum(mine, other.seen, out=mine)

    def reach(self, count: int) -> None:
        have = self.seen.shape[1]
        if have < count:
            self.seen = np.concatenate([self.seen, np.zeros((ROWS, count - have), np.int32)], 1)

    def executed(self, other: "Clock") -> None:
        """What a relaxed arrival still says: all of it has been executed."""
        count = other.seen.shape[1]
        self.reach(count)
        mine = self.seen[EXECUTED, :count]
        np.maximum(mine, other.seen[CAUSAL], out=mine)
        np.maximum(mine, other.seen[EXECUTED], out=mine)

    def covers(self, row: int, actor: int, time: int) -> bool:
        return actor < self.seen.shape[1] and bool(self.seen[row, actor] >= time)


class Actor:
    """A warp or an operation at work. released: its clock at the last fence; pending: what it read before one."""

    __slots__ = ("asynchronous", "clock", "index", "mask", "pc", "pending", "released", "strong", "warp", "what")

    def __init__(self, index: int, clock: Clock, warp: "Warp", asynchronous: bool, what: str = "", pc: int = 0):
        self.index, self.clock, self.warp, self.asynchronous, self.what, self.pc = (
            index,
            clock,
            warp,
            asynchronous,
            what,
            pc,
        )
        self.mask: Array | None = None
        self.released: Clock | None = None
        self.pending: Clock | None = None
        self.strong = False

    @property
    def time(self) -> int:
        return int(self.clock.seen[CAUSAL, self.index])

    def tick(self) -> None:
        self.clock.seen[CAUSAL, self.index] += 1

    # --- order ---

    def release(self, into: Clock, relaxed: bool = False) -> None:
        """Hand on what this actor has seen and done; relaxed: up to its last fence."""
        if relaxed:
            if self.released is not None:
                into.join(self.released)
            into.executed(self.clock)
            self.tick()
            return
        into.join(self.clock)
        self.tick()

    def acquire(self, source: Clock, relaxed: bool = False) -> None:
        """Learn what was released; relaxed: at the next fence."""
        if not relaxed:
            self.clock.join(source)
        elif self.pending is None:
            self.pending = source.copy()
        else:
            self.pending.join(source)

    def fence(self) -> None:
        """fence.acq_rel, fence.sc, membar, fence.mbarrier_init."""
        if self.pending is not None:
            self.clock.join(self.pending)
            self.pending = None
        self.released = self.clock.copy()
        self.tick()

    def proxy_fence(self, *rows: int) -> None:
        for row in rows:
            self.clock.seen[row] = self.clock.seen[CAUSAL]
        self.tick()


class _Site:
    """An event: actor and time, and where it came from."""

    __slots__ = ("actor", "asynchronous", "pc", "strong", "time", "warp", "what")

    def __init__(self, actor: Actor):
        self.actor, self.time, self.asynchronous = actor.index, actor.time, actor.asynchronous
        self.warp, self.pc, self.what, self.strong = actor.warp, actor.pc, actor.what, actor.strong

    def __str__(self) -> str:
        place = self.warp.describe(self.pc, None, "").strip()
        return f"{self.what + ' of ' if self.what else ''}{place}"


class Hazards:
    """The actors and events of one cluster. current: whose access it is."""

    def __init__(self) -> None:
        self.current: Actor | None = None
        self.actors = 0
        self.sites: list[_Site | None] = [None]
        self._site_ids: dict[tuple[int, int, int, bool], int] = {}
        self.sets: list[tuple[int, ...]] = [()]
        self._set_ids: dict[tuple[int, ...], int] = {(): 0}
        self._merged: dict[tuple[int, int], int] = {}
        self._chains: dict[Any, Actor] = {}
        self._idle: list[tuple[int, int]] = []  # actor and last time of operations that are over
        self._locations: dict[tuple[str, int], Clock] = {}
        self._foreign: dict[tuple[int, int], tuple[int, Cta]] = {}  # what others do to a CTA's shared memory

    # --- actors ---

    def _actor(self) -> int:
        self.actors += 1
        return self.actors - 1

    def warp(self, warp: "Warp") -> Actor:
        index = self._actor()
        clock = Clock()
        clock.reach(index + 1)
        clock.seen[CAUSAL, index] = 1
        return Actor(index, clock, warp, asynchronous=False)

    def operation(self, what: str, chain: Any = None, asynchronous: bool = True) -> Actor:
        """Something that the current actor starts. Operations of one chain are carried out in order."""
        by = self.current
        assert by is not None
        if chain is not None:
            before = self._chains.get(chain)
            index = before.index if before is not None else self._actor()
            clock = by.clock.copy()
            if before is not None:
                clock.join(before.clock)
        else:
            index, clock = self._slot(by), by.clock.copy()
        clock.reach(index + 1)
        clock.seen[CAUSAL, index] += 1
        done = Actor(index, clock, by.warp, asynchronous, what, by.pc)
        done.mask = by.mask
        if chain is not None:
            self._chains[chain] = done
        by.tick()
        return done

    def _slot(self, by: Actor) -> int:
        """An actor for an operation: one whose last operation is known to be over, or a new one."""
        for n, (index, time) in enumerate(self._idle):
            if by.clock.covers(CAUSAL, index, time):
                del self._idle[n]
                return index
        return self._actor()

    def last(self, chain: Any) -> Actor | None:
        """The newest operation of a chain."""
        return self._chains.get(chain)

    def retire(self, operation: Actor) -> None:
        self._idle.append((operation.index, operation.time))

    def perform(self, operation: Actor, work: Callable[[], Any]) -> Any:
        """Carry out an operation; a fault names the instruction that started it."""
        before, self.current = self.current, operation
        try:
            return work()
        except Fault as e:
            if e.described:
                raise
            fault = type(e)(operation.warp.describe(operation.pc, operation.mask, f"{operation.what}: {e}"))
            fault.described = True
            raise fault from e
        finally:
            self.current = before

    # --- accesses ---

    def site(self, actor: Actor) -> int:
        key = (actor.index, actor.time, actor.pc, actor.strong)
        found = self._site_ids.get(key)
        if found is None:
            found = self._site_ids[key] = len(self.sites)
            self.sites.append(_Site(actor))
        return found

    def ordered(self, event: int, actor: Actor, row: int) -> bool:
        site = self.sites[event]
        return site is None or actor.clock.covers(row, site.actor, site.time)

    def merged(self, readers: int, event: int, actor: Actor) -> int:
        """The set of readers with one more; those that it comes after need not be kept."""
        key = (readers, event)
        found = self._merged.get(key)
        if found is None:
            kept = tuple(s for s in self.sets[readers] if not self.ordered(s, actor, CAUSAL) or s == event)
            new = kept if event in kept else (*kept, event)
            found = self._set_ids.get(new)
            if found is None:
                found = self._set_ids[new] = len(self.sets)
                self.sets.append(new)
            self._merged[key] = found
        return found

    def location(self, space: str, address: int) -> Clock:
        """What strong writes of an address have released."""
        key = (space, address)
        found = self._locations.get(key)
        if found is None:
            found = self._locations[key] = Clock()
        return found

    # --- the end of a CTA ---

    def foreign(self, cta: "Cta", event: int) -> None:
        site = self.sites[event]
        assert site is not None
        self._foreign[cta.rank, site.actor] = (event, cta)

    def check_exits(self) -> None:
        """Raises Fault for accesses of a CTA's shared memory that its exit does not come after."""
        for event, cta in self._foreign.values():
            site = self.sites[event]
            assert site is not None
            clocks = [w.actor.clock for w in cta.warps]
            if not any(c.covers(row, site.actor, site.time) for c in clocks for row in (CAUSAL, EXECUTED)):
                raise Fault(
                    f"CTA {cta.index} may have ended, and its shared memory gone, before this access of it: {site}"
                )


class Shadow:
    """Last writer and readers since, for each place of a memory. name: of a place, by its index."""

    def __init__(self, hazards: Hazards, shape: int | tuple[int, ...], fence: int, name: Callable[[Any], str]):
        self.hazards, self.fence, self.name = hazards, fence, name
        self.writer = np.zeros(shape, np.int32)
        self.readers = np.zeros(shape, np.int32)

    def read(self, index: Any, fence: int | None = None) -> int:
        """The current actor reads these places; returns the event. Raises Fault."""
        hazards = self.hazards
        actor = hazards.current
        assert actor is not None
        event = hazards.site(actor)
        self._check_writers(index, actor, "read", fence)
        readers = self.readers[index]
        known = _distinct(readers)
        if len(known) == 1:
            new = hazards.merged(known[0], event, actor)
            if new != known[0]:
                self.readers[index] = new
        else:
            table = {old: hazards.merged(old, event, actor) for old in known}
            changed = readers.copy()
            for old, new in table.items():
                changed[readers == old] = new
            self.readers[index] = changed
        return event

    def write(self, index: Any) -> int:
        """The current actor writes these places; returns the event. Raises Fault."""
        hazards = self.hazards
        actor = hazards.current
        assert actor is not None
        event = hazards.site(actor)
        self._check_writers(index, actor, "written", None)
        readers = self.readers[index]
        for known in _distinct(readers):
            for reader in hazards.sets[known]:
                site = hazards.sites[reader]
                assert site is not None
                if not hazards.ordered(reader, actor, CAUSAL) and not (site.strong and actor.strong):
                    place = self._place(index, readers == known)
                    raise Fault(f"data race: {place} is written, with no order after it was read by {site}")
        self.writer[index] = event
        self.readers[index] = 0
        return event

    def _check_writers(self, index: Any, actor: Actor, verb: str, fence: int | None) -> None:
        hazards, writers = self.hazards, self.writer[index]
        for event in _distinct(writers):
            site = hazards.sites[event]
            if site is None or (site.strong and actor.strong):
                continue
            if not hazards.ordered(event, actor, CAUSAL):
                place = self._place(index, writers == event)
                raise Fault(f"data race: {place} is {verb}, with no order after it was written by {site}")
            row = fence if fence is not None else self.fence if actor.asynchronous else CAUSAL
            if row != CAUSAL and not site.asynchronous and not hazards.ordered(event, actor, row):
                place = self._place(index, writers == event)
                kind = "fence.proxy.tensormap" if row == TENSORMAP else "fence.proxy.async"
                raise Fault(
                    f"no proxy fence: {place} is {verb} by the async proxy, and no {kind} lies between "
                    f"that and its writing by {site}"
                )

    def _place(self, index: Any, which: Array) -> str:
        if isinstance(index, slice):
            return self.name(index.start + int(np.argmax(which)))
        if isinstance(index, tuple):
            at = np.argwhere(which)[0]
            first = [x.start or 0 if isinstance(x, slice) else int(np.min(x)) for x in index]
            return self.name(tuple(int(a) + f for a, f in zip(at, first, strict=True)))
        return self.name(int(np.asarray(index)[which][0]))


def _distinct(values: Array) -> list[int]:
    first = values.flat[0]
    if (values == first).all():
        return [int(first)]
    return [int(x) for x in np.unique(values)]
