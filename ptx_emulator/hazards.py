"""Data races and missing fences within a cluster (PTX ISA, "Memory Consistency Model", "Async proxy", "Memory
Consistency Model for 5th generation of TensorCore operations").

Every access is an event of an actor: a warp, or one asynchronous operation (a TMA copy, a cp.async, a wgmma, a
tcgen05.mma, .cp, .shift, .ld or .st). Two accesses of one place, one of them a write, must be ordered by causality,
whatever order they happened to run in: mbarriers, barriers, strong operations with fences, and waits for groups carry
the order. What the generic proxy wrote must also pass a proxy fence on its way to the async proxy, or to the one that
reads tensor maps; with `strict`, what it read, too, before the async proxy writes there (a load may still be on its way
when its warp says that it is done, but not once something has used what it loaded, which is not looked for). Writes of
what is there already do not race with the write that put it there. A warp that comes to a named barrier again must know
that the others have come since (see `sync`).

An actor knows of each other one how far it has seen it: a vector clock, once for plain causality and once for each kind
of fence, that is for what lies before such a fence. Each place remembers its last writer and its readers since.

Tensor memory. Operations are in order where the ISA makes them a pipeline ("Pipelined tcgen05 Instructions");
tcgen05.wait and, through a commit, an mbarrier say that those of a thread are over. Between threads order comes from
release and acquire once they are over, or from tcgen05.fence::before_thread_sync and ::after_thread_sync, which do with
relaxed synchronisation and, in a pipeline, with operations that are still under way. NVIDIA's own kernels rest on more
than the ISA says: on any mma, cp or shift coming after those that its thread has issued, and on a tcgen05.ld being over
once somebody works with one of its registers. `strict` grants only the first, and of MMAs with different accumulators
not that; and it wants tcgen05.fence on both sides of every synchronisation between tcgen05 operations of different
threads, acquire and release or not.

The lanes of a warp count as ordered among themselves, so exchanges within a warp that lack bar.warp.sync are not found.
Clusters run one after another, and races between them are not looked for, but in a cooperative launch.
"""

import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .errors import Fault
from .numbers import Array

if TYPE_CHECKING:
    from .machine import Cta, Warp

Checks = bool | Literal["strict"]

# rows of a clock: what came before; what came before a fence to the async proxy (by space) or to tensor maps; what was
# executed before a relaxed arrival, which lets memory go but orders no access; what tcgen05.fence::before_thread_sync
# announced, over or at least issued; what tcgen05 operations here come after. The last two are not handed on.
CAUSAL, SHARED, GLOBAL, TENSORMAP, EXECUTED, ANNOUNCED, ANNOUNCED_ISSUE, TENSOR, ISSUE = range(9)
ROWS, _HANDED_ON = 9, 7
_ANNOUNCEMENTS, _ORDERED = slice(ANNOUNCED, ANNOUNCED_ISSUE + 1), slice(TENSOR, ISSUE + 1)
_ROOM = 64


class Clock:
    """seen[row, actor]: the last time of the actor that is known of."""

    __slots__ = ("seen",)

    def __init__(self, seen: Array | None = None):
        self.seen = np.zeros((ROWS, _ROOM), np.int32) if seen is None else seen

    def copy(self) -> "Clock":
        return Clock(self.seen.copy())

    def join(self, other: "Clock", rows: slice = slice(0, ROWS)) -> None:
        count = other.seen.shape[1]
        self.reach(count)
        mine = self.seen[rows, :count]
        np.maximum(mine, other.seen[rows], out=mine)

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
        seen = self.seen
        return actor < seen.shape[1] and seen.item(row, actor) >= time


class Actor:
    """A warp or an operation at work. released: its clock at the last fence; pending: what it read before one.
    pipe: of tcgen05 operations, see `in_pipeline`."""

    __slots__ = (
        "asynchronous",
        "clock",
        "index",
        "mask",
        "pc",
        "pending",
        "pipe",
        "released",
        "strong",
        "warp",
        "what",
    )

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
        self.pipe: Pipe | None = None

    @property
    def time(self) -> int:
        return self.clock.seen.item(CAUSAL, self.index)

    def tick(self) -> None:
        self.clock.seen[CAUSAL, self.index] += 1

    # --- order ---

    def release(self, into: Clock, relaxed: bool = False) -> None:
        """Hand on what this actor has seen and done; relaxed: up to its last fence."""
        if relaxed:
            if self.released is not None:
                into.join(self.released, slice(0, _HANDED_ON))
            into.join(self.clock, _ANNOUNCEMENTS)
            into.executed(self.clock)
        else:
            into.join(self.clock, slice(0, _HANDED_ON))
        self.tick()

    def acquire(self, source: Clock, relaxed: bool = False) -> None:
        """Learn what was released; relaxed: at the next fence."""
        if not relaxed:
            self.clock.join(source)
            return
        self.clock.join(source, _ANNOUNCEMENTS)
        if self.pending is None:
            self.pending = source.copy()
        else:
            self.pending.join(source)

    def fence(self) -> None:
        """fence.acq_rel, fence.sc, membar, fence.mbarrier_init."""
        self._learn()
        self._let_go()

    def _learn(self) -> None:
        if self.pending is not None:
            self.clock.join(self.pending)
            self.pending = None

    def _let_go(self) -> None:
        self.released = self.clock.copy()
        self.tick()

    def proxy_fence(self, *rows: int) -> None:
        for row in rows:
            self.clock.seen[row] = self.clock.seen[CAUSAL]
        self.tick()

    def announce(self, issued: Iterable["Actor"], strict: bool) -> None:
        """The tcgen05 operations so far come before what the others do that hear of it. issued: those of the thread
        that may be under way.
        """
        seen = self.clock.seen
        over = seen[TENSOR] if strict else np.maximum(seen[TENSOR], seen[CAUSAL])
        np.maximum(seen[ANNOUNCED], over, out=seen[ANNOUNCED])
        np.maximum(seen[ANNOUNCED_ISSUE], seen[ISSUE], out=seen[ANNOUNCED_ISSUE])
        for operation in issued:
            self.clock.reach(operation.index + 1)
            self.clock.seen[ANNOUNCED_ISSUE, operation.index] = operation.time

    def before_thread_sync(self, issued: Iterable["Actor"], strict: bool) -> None:
        """tcgen05.fence::before_thread_sync"""
        self.announce(issued, strict)
        self._let_go()

    def after_thread_sync(self) -> None:
        """tcgen05.fence::after_thread_sync: what others announced comes before the tcgen05 operations from here on. The
        ISA says so of tcgen05 alone; operands in shared memory count as waited for as well.
        """
        self._learn()
        ordered = self.clock.seen[_ORDERED]
        np.maximum(ordered, self.clock.seen[_ANNOUNCEMENTS], out=ordered)
        self.tick()


Pipe = tuple[str, ...]  # ("cp",), ("shift",), or of an MMA with what must be the same: accumulator, shape and kind


def in_pipeline(first: Pipe, then: Pipe) -> bool:
    """Whether these tcgen05 operations are carried out in the order of issue, by the ISA."""
    if then[0] == "mma":
        return first[0] in ("cp", "shift") or first == then
    return (first[0], then[0]) in (("mma", "shift"), ("shift", "cp"))


class _Site:
    """An event: actor and time, and where it came from."""

    __slots__ = ("actor", "asynchronous", "pc", "pipe", "strong", "time", "warp", "what")

    def __init__(self, actor: Actor):
        self.actor, self.time, self.asynchronous = actor.index, actor.time, actor.asynchronous
        self.warp, self.pc, self.what, self.strong = actor.warp, actor.pc, actor.what, actor.strong
        self.pipe = actor.pipe

    def __str__(self) -> str:
        place = self.warp.describe(self.pc, None, "").strip()
        return f"{self.what + ' of ' if self.what else ''}{place}"


class Hazards:
    """The actors and events of the clusters that run together. current: whose access it is."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.current: Actor | None = None
        self.actors = 0
        self.sites: list[_Site | None] = [None]
        self._site_ids: dict[tuple[int, int, int, bool], int] = {}
        self.sets: list[tuple[int, ...]] = [()]  # of readers
        self._set_ids: dict[tuple[int, ...], int] = {(): 0}
        self._merged: dict[tuple[int, int, bool], int] = {}
        self._chains: dict[Any, Actor] = {}
        self._idle: list[tuple[int, int]] = []  # actor and last time of operations that are over
        self._locations: dict[Any, Clock] = {}
        self._foreign: dict[tuple[Cta, int], tuple[int, Cta]] = {}  # what others do to a CTA's shared memory

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

    def operation(
        self,
        what: str,
        chain: Any = None,
        asynchronous: bool = True,
        after: Iterable[Actor] = (),
        pipe: Pipe | None = None,
    ) -> Actor:
        """Something that the current actor starts. Operations of one chain are carried out in order. after: further
        operations that come before it.
        """
        by = self.current
        assert by is not None
        if chain is not None:
            chain = by.warp.cta.cluster, chain
            before = self._chains.get(chain)
            index = before.index if before is not None else self._actor()
            clock = by.clock.copy()
            if before is not None:
                clock.join(before.clock)
        else:
            index, clock = self._slot(by), by.clock.copy()
        for earlier in after:
            clock.join(earlier.clock)
        clock.reach(index + 1)
        clock.seen[CAUSAL, index] += 1
        clock.seen[TENSOR, index] = clock.seen[CAUSAL, index]
        done = Actor(index, clock, by.warp, asynchronous, what, by.pc)
        done.mask, done.pipe = by.mask, pipe
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

    def comes_after(self, event: int, actor: Actor, tensor: bool) -> bool:
        """Whether the actor's accesses come after an event; tensor: both are of tensor memory."""
        if not tensor:
            return self.ordered(event, actor, CAUSAL)
        if self.ordered(event, actor, TENSOR):
            return True
        # dealloc is no asynchronous operation, so that no tcgen05.fence is wanted before it
        if (not self.strict or not actor.what) and self.ordered(event, actor, CAUSAL):
            return True
        site = self.sites[event]
        assert site is not None
        piped = site.pipe and actor.pipe and in_pipeline(site.pipe, actor.pipe)
        return bool(piped) and self.ordered(event, actor, ISSUE)

    def missing(self, event: int, actor: Actor, tensor: bool) -> str:
        """What would order an access after an event, where that is plain to see."""
        site = self.sites[event]
        assert site is not None
        if tensor and self.ordered(event, actor, CAUSAL):
            return (
                "; no tcgen05.fence::before_thread_sync and tcgen05.fence::after_thread_sync are on both sides of the "
                "synchronisation between them"
            )
        waits = {"tcgen05.ld": "tcgen05.wait::ld", "tcgen05.st": "tcgen05.wait::st"}
        return f" ({waits[site.what]} would wait for it)" if site.what in waits else ""

    def merged(self, readers: int, event: int, actor: Actor, tensor: bool) -> int:
        """The set of readers with one more; those that it comes after need not be kept."""
        key = (readers, event, tensor)
        found = self._merged.get(key)
        if found is None:
            kept = tuple(s for s in self.sets[readers] if not self.comes_after(abs(s), actor, tensor) or s == event)
            found = self._merged[key] = self.set_of(kept if event in kept else (*kept, event))
        return found

    def set_of(self, events: tuple[int, ...]) -> int:
        found = self._set_ids.get(events)
        if found is None:
            found = self._set_ids[events] = len(self.sets)
            self.sets.append(events)
        return found

    def location(self, space: str, address: int) -> Clock:
        """What strong writes of an address have released."""
        assert self.current is not None
        key = (space, address, self.current.warp.cta.cluster if space == "shared" else None)
        found = self._locations.get(key)
        if found is None:
            found = self._locations[key] = Clock()
        return found

    # --- the end of a CTA ---

    def foreign(self, cta: "Cta", event: int) -> None:
        site = self.sites[event]
        assert site is not None
        self._foreign[cta, site.actor] = (event, cta)

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

    def __init__(
        self,
        hazards: Hazards,
        shape: int | tuple[int, ...],
        fence: int,
        name: Callable[[Any], str],
        tensor: bool = False,
    ):
        self.hazards, self.fence, self.name, self.tensor = hazards, fence, name, tensor
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
            new = hazards.merged(known[0], event, actor, self.tensor)
            if new != known[0]:
                self.readers[index] = new
        else:
            table = {old: hazards.merged(old, event, actor, self.tensor) for old in known}
            changed = readers.copy()
            for old, new in table.items():
                changed[readers == old] = new
            self.readers[index] = changed
        return event

    def write(self, index: Any, unchanged: Callable[[], Array] | None = None) -> int:
        """The current actor writes these places; returns the event. unchanged: which of them hold what is written
        already. Raises Fault.
        """
        hazards = self.hazards
        actor = hazards.current
        assert actor is not None
        event = hazards.site(actor)
        same: list[tuple[Array, int]] = []  # places and their unordered writers

        def harmless(where: Array, writer: int) -> bool:
            if unchanged is None or not unchanged()[where].all():
                return False
            same.append((where, writer))
            return True

        self._check_writers(index, actor, "written", None, harmless)
        readers = self.readers[index]
        for known in _distinct(readers):
            for other in hazards.sets[known]:
                site = hazards.sites[abs(other)]
                assert site is not None
                if hazards.comes_after(abs(other), actor, self.tensor) or (site.strong and actor.strong):
                    row = self.fence if actor.asynchronous and hazards.strict else CAUSAL
                    if other > 0 and self._lacks_fence(other, actor, row):
                        raise self._unfenced(self._place(index, readers == known), "written", "reading", other, row)
                    continue
                where = readers == known
                if other > 0 or not harmless(where, -other):
                    before = "read" if other > 0 else "written"
                    raise self._race(self._place(index, where), "written", before, abs(other), actor)
        self.writer[index] = event
        self.readers[index] = self._with_writers(readers.shape, same) if same else 0
        return event

    def _with_writers(self, shape: tuple[int, ...], same: list[tuple[Array, int]]) -> Array:
        """Writers of one value that know nothing of each other stand among the readers, negated: whoever writes
        something else must come after all of them."""
        hazards, out = self.hazards, np.zeros(shape, np.int32)
        for where, writer in same:
            for known in _distinct(out[where]):
                out[where & (out == known)] = hazards.set_of((*hazards.sets[known], -writer))
        return out

    def forget(self, index: Any) -> None:
        """These places are somebody's anew."""
        self.writer[index] = self.readers[index] = 0

    def _check_writers(
        self,
        index: Any,
        actor: Actor,
        verb: str,
        fence: int | None,
        harmless: Callable[[Array, int], bool] | None = None,
    ) -> None:
        hazards, writers = self.hazards, self.writer[index]
        for event in _distinct(writers):
            site = hazards.sites[event]
            if site is None or (site.strong and actor.strong):
                continue
            if not hazards.comes_after(event, actor, self.tensor):
                where = writers == event
                if harmless is not None and harmless(where, event):
                    continue
                raise self._race(self._place(index, where), verb, "written", event, actor)
            row = fence if fence is not None else self.fence if actor.asynchronous else CAUSAL
            if self._lacks_fence(event, actor, row):
                raise self._unfenced(self._place(index, writers == event), verb, "writing", event, row)

    def _lacks_fence(self, event: int, actor: Actor, row: int) -> bool:
        """Whether no such fence lies between an event of the generic proxy and the actor, which is of another."""
        site = self.hazards.sites[event]
        assert site is not None
        return row != CAUSAL and not site.asynchronous and not self.hazards.ordered(event, actor, row)

    def _unfenced(self, place: str, verb: str, before: str, event: int, row: int) -> Fault:
        kind = "fence.proxy.tensormap" if row == TENSORMAP else "fence.proxy.async"
        return Fault(
            f"no proxy fence: {place} is {verb} by the async proxy, and no {kind} lies between "
            f"that and its {before} by {self.hazards.sites[event]}"
        )

    def _race(self, place: str, verb: str, before: str, event: int, actor: Actor) -> Fault:
        missing = self.hazards.missing(event, actor, self.tensor)
        return Fault(
            f"data race: {place} is {verb}, with no order after it was {before} by {self.hazards.sites[event]}{missing}"
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
    """The different ones of some int32."""
    data = values.tobytes()
    first = data[:4]
    if data == first * values.size:
        return [int.from_bytes(first, sys.byteorder, signed=True)]
    flat = values.reshape(-1)  # long runs of equal ones
    return sorted({*flat[:1].tolist(), *flat[1:][flat[1:] != flat[:-1]].tolist()})
