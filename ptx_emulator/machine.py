"""Warps, CTAs and clusters, and the order in which they run.

A warp holds one or more fragments: lanes that share a program counter. A divergent branch splits a fragment; the one
with the lowest counter runs first, and fragments that meet become one again, which reconverges structured code at
the end of the branch. An instruction that has to wait says so, and its fragment tries again in the next round.

Asynchronous work (TMA, wgmma, tcgen05) stands in queues of the cluster, each in its own order. When it is carried out
is the schedule's choice: at once ("eager"), one piece a queue and round ("round"), or only when no warp of the cluster
can do more than look at flags in memory ("late"). A seed shuffles warps and queues, and holds some queues back until
nothing else can be done, so that copies end in other orders than they began. Right results under all of them are no
proof of right synchronisation, but a wrong result under one is a proof of the contrary.

When no warp can go on, waits that have a limit of time (mbarrier.try_wait) expire. Warps that then come to stand where
they stood before wait for each other.
"""

import math
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import processes
from .blas import one_thread
from .errors import DeadlockError, Fault
from .hazards import Actor, Checks, Hazards
from .memory import MAX_SHARED_BYTES, PARAM_WINDOW, RANK_SHIFT, Block, GlobalMemory, SharedMemory
from .numbers import U32, Array
from .statistics import BankCounter, Statistics, Tally

if TYPE_CHECKING:
    from .program import Program

Dim3 = tuple[int, int, int]
LANES = 32
_MAX_CLUSTER = 16  # CTAs; more than 8 if the kernel allows for it
LANE = np.arange(LANES, dtype=np.uint32)
SLICE = 256  # instructions a warp runs before the next has its turn
HELD = 0.1  # share of new queues that a seed holds back
POLLS = 8  # strong loads in a turn that say that a warp does nothing but wait for others
PATIENCE = 8  # times that all warps may stand at the same places, their time limits expired, before it is a deadlock
SCHEDULES = ("eager", "round", "late")

PLAIN, BRANCH, EXIT = range(3)
_NO_LANE, _ALL_LANES = bytes(LANES), b"\1" * LANES  # of predicates, which are compared sooner as bytes than as arrays


@dataclass(slots=True)
class Fragment:
    """Lanes at one program counter. mask None: all 32. waiting: why it cannot go on, in words."""

    pc: int
    mask: Array | None
    waiting: str | None = None


class Warp:
    """32 lanes with their registers."""

    def __init__(self, cta: "Cta", index: int):
        self.cta, self.index = cta, index
        self.program = cta.cluster.launch.program
        self.r: list[Array] = list(self.program.cleared)
        threads = cta.cluster.launch.threads
        flat = np.arange(LANES, dtype=np.uint32) + U32(LANES * index)
        self.alive = flat < threads
        bx, by, _ = cta.cluster.launch.block
        self.tid = (flat % U32(bx), flat // U32(bx) % U32(by), flat // U32(bx * by))
        self.fragments = [Fragment(0, None if self.alive.all() else self.alive.copy())]
        self.counts = [0] * len(self.program.steps)
        self.rounds: Counter[int] = Counter()  # in which the instruction at a pc had to wait
        self.state: dict[Any, Any] = {}  # of the asynchronous operations, each module its own key
        self.polls = 0  # strong loads and atomic operations since its turn began
        self.expired: set[int] = set()  # where a wait that has a limit of time ends without success
        self.actor = cta.cluster.hazards.warp(self)

    @property
    def where(self) -> str:
        return f"CTA {self.cta.index} warp {self.index}"

    def everyone(self, mask: Array | None) -> bool:
        """Whether the lanes that are still alive are all in `mask`."""
        return mask is None or mask.tobytes() == self.alive.tobytes()

    def run(self, budget: int) -> bool:
        """Up to about `budget` instructions; whether any was carried out."""
        fragments, total, self.polls = self.fragments, 0, 0
        self.cta.cluster.hazards.current = self.actor
        for f in fragments:
            f.waiting = None
        while fragments and total < budget:
            ready = [f for f in fragments if f.waiting is None]
            if not ready:
                break
            f = min(ready, key=lambda x: x.pc)
            stops = {x.pc for x in fragments if x is not f}
            total += self._advance(f, budget - total, stops)
            if stops or len(fragments) > 1:
                self._merge()
        return total > 0

    def _merge(self) -> None:
        seen: dict[int, Fragment] = {}
        for f in self.fragments:
            other = seen.setdefault(f.pc, f)
            if other is not f:
                assert other.mask is not None
                assert f.mask is not None
                mask = other.mask | f.mask
                other.mask, other.waiting = None if mask.all() else mask, None
        self.fragments[:] = seen.values()

    def _advance(self, f: Fragment, budget: int, stops: set[int]) -> int:
        steps, counts, r, mask, pc, done = self.program.steps, self.counts, self.r, f.mask, f.pc, 0
        actor = self.actor
        try:
            while done < budget:
                kind, run, guard, negated, target = steps[pc]
                m = mask
                if guard >= 0:
                    p = ~r[guard] if negated else r[guard]
                    if mask is not None:
                        p = p & mask
                    lanes = p.tobytes()
                    if lanes == _NO_LANE:
                        pc += 1
                        done += 1
                        if pc in stops:
                            break
                        continue
                    if mask is not None or lanes != _ALL_LANES:
                        m = p
                if kind == PLAIN:
                    actor.pc = pc
                    f.waiting = run(self, m)
                    if f.waiting is not None:
                        self.rounds[pc] += 1
                        break
                    counts[pc] += 1
                    pc += 1
                elif kind == BRANCH:
                    counts[pc] += 1
                    if m is mask or (m is not None and mask is not None and m.tobytes() == mask.tobytes()):
                        pc = target
                    else:
                        assert m is not None
                        self.fragments.append(Fragment(target, m))
                        f.mask = mask = ~m if mask is None else mask & ~m
                        pc += 1
                        done += 1
                        break
                else:
                    counts[pc] += 1
                    left = np.zeros(LANES, bool) if m is None else self.alive & ~m
                    self.alive = left
                    rest = left if mask is None else mask & left
                    done += 1
                    if not rest.any():
                        self.fragments.remove(f)
                        return done
                    f.mask = mask = rest
                    pc += 1
                    break
                done += 1
                if pc in stops:
                    break
        except Fault as e:
            if e.described:
                raise
            fault = type(e)(self.describe(pc, m, str(e)))
            fault.described = True
            raise fault from e
        except Exception as e:
            e.add_note(self.describe(pc, m, "the emulator failed"))
            raise
        f.pc = pc
        return done

    def describe(self, pc: int, mask: Array | None, message: str) -> str:
        kernel = self.program.kernel
        lanes = "" if mask is None else f" lanes {_ranges(np.flatnonzero(mask))}"
        if pc >= len(kernel.code):
            return f"{message}\n  {self.where}{lanes}, end of {kernel.name}"
        i = kernel.code[pc]
        source = f" ({i.source[0]}:{i.source[1]})" if i.source else ""
        return f"{message}\n  {self.where}{lanes}, PTX line {i.line}{source}: {_shorten(i.text)}"


class Cta:
    """A thread block: warps, shared memory, barriers, tensor memory."""

    def __init__(self, cluster: "Cluster", rank: int, index: Dim3, rank3: Dim3):
        self.cluster, self.rank, self.index, self.rank3 = cluster, rank, index, rank3
        launch = cluster.launch
        self.shared = SharedMemory(launch.shared_bytes, rank)
        for offset, data in launch.program.shared_data:
            self.shared.write(offset, np.frombuffer(data, np.uint8))
        if launch.races:
            self.shared.watch(self)
        self.shared_window = rank << RANK_SHIFT
        self.barriers: dict[int, Any] = {}  # named barriers
        self.mbarriers: dict[int, Any] = {}  # by offset in shared memory
        self.tensor_memory: Any = None
        self.state: dict[str, Any] = {}
        self.warps = [Warp(self, w) for w in range(-(-launch.threads // LANES))]


class Cluster:
    """CTAs that may see each other's shared memory, and the asynchronous work they have under way."""

    def __init__(self, launch: "Launch", index: Dim3, hazards: Hazards):
        self.launch, self.index, self.hazards = launch, index, hazards
        cx, cy, cz = launch.cluster
        self.ctas: list[Cta] = []
        for z in range(cz):
            for y in range(cy):
                for x in range(cx):
                    place = (index[0] * cx + x, index[1] * cy + y, index[2] * cz + z)
                    self.ctas.append(Cta(self, len(self.ctas), place, (x, y, z)))
        self.queues: dict[Any, deque[Callable[[], None]]] = {}
        self.held: dict[Any, None] = {}  # queues that wait until nothing else can be done
        self.arrived: dict[Any, int] = {}
        self.state: dict[str, Any] = {}
        self.running = [w for cta in self.ctas for w in cta.warps]

    def submit(self, queue: Any, work: Callable[[], None], operation: Actor | None = None) -> Actor:
        """Asynchronous work, done after what was submitted to the same queue before. `operation` is who does it."""
        hazards = self.hazards
        alone = operation is None
        actor = hazards.operation(str(queue[0])) if operation is None else operation

        def perform() -> None:
            hazards.perform(actor, work)
            if alone:
                hazards.retire(actor)

        if self.launch.schedule == "eager":
            perform()
        else:
            chance = self.launch.random
            if chance is not None and queue not in self.queues and chance.random() < HELD:
                self.held[queue] = None
            self.queues.setdefault(queue, deque()).append(perform)
        return actor

    def work(self) -> bool:
        """One piece of every queue that is not held back; whether there was any."""
        keys = [key for key in self.queues if key not in self.held]
        if self.launch.random is not None:
            keys = self.launch.random.sample(keys, self.launch.random.randint(min(1, len(keys)), len(keys)))
        for key in keys:
            queue = self.queues[key]
            queue.popleft()()
            if not queue:
                del self.queues[key]
        return bool(keys)

    def step(self) -> bool:
        """Every warp has its turn, and the asynchronous work; whether anything was done."""
        launch, warps, progressed, busy = self.launch, self.running, False, False
        if launch.random is not None:
            launch.random.shuffle(warps)
        for warp in warps:
            budget = SLICE if launch.random is None else launch.random.choice((1, 5, 50, 500))
            ran = warp.run(budget)
            progressed |= ran
            busy |= ran and warp.polls < POLLS
        worked = not (busy and launch.schedule == "late") and self.work()
        if self.held and not busy and not worked:
            self.held.popitem()
            worked = True
        progressed |= worked
        self.running = [w for w in warps if w.fragments]
        return progressed

    def finish(self) -> None:
        self.held.clear()
        while self.work():  # what nobody waited for still happens
            pass
        for cta in self.ctas:
            self.launch.program.finish(cta)

    def release(self) -> None:
        """Undo the cycles of references: memory goes back now, not when the garbage collector comes by."""
        for cta in self.ctas:
            for warp in cta.warps:
                vars(warp).clear()
            vars(cta.shared).clear()
            vars(cta).clear()
        vars(self).clear()

    def deadlock(self) -> str:
        lines = [f"deadlock in cluster {self.index} of {self.launch.program.kernel.name}: every warp waits"]
        for w in sorted(self.running, key=lambda w: (w.cta.rank, w.index)):
            for f in w.fragments:
                lines.append(w.describe(f.pc, f.mask, f"- {f.waiting}"))
        return "\n".join(lines)


class Launch:
    """One kernel launch. `run` carries it out, writes to stdout what it printed, and returns its statistics."""

    def __init__(
        self,
        program: "Program",
        memory: GlobalMemory,
        grid: Dim3,
        block: Dim3,
        params: Sequence[bytes],
        *,
        cluster: Dim3 = (1, 1, 1),
        dynamic_shared: int = 0,
        schedule: str = "round",
        seed: int | None = None,
        races: Checks = True,
        cooperative: bool = False,
    ):
        kernel = program.kernel
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        if len(params) != len(kernel.params):
            raise ValueError(f"{kernel.name} takes {len(kernel.params)} parameters, got {len(params)}")
        if kernel.required_threads and tuple(block) != kernel.required_threads:
            raise ValueError(f"{kernel.name} requires blocks of {kernel.required_threads} threads, got {block}")
        if kernel.required_cluster and tuple(cluster) != kernel.required_cluster:
            raise ValueError(f"{kernel.name} requires clusters of {kernel.required_cluster} CTAs, got {cluster}")
        if any(g % c for g, c in zip(grid, cluster, strict=True)):
            raise ValueError(f"grid {grid} is not a whole number of clusters {cluster}")
        self.program, self.memory, self.races, self.cooperative = program, memory, races, cooperative
        self.grid, self.block, self.cluster = grid, block, cluster
        self.threads = block[0] * block[1] * block[2]
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"a block has 1 to 1024 threads, got {self.threads}")
        if not 1 <= math.prod(cluster) <= _MAX_CLUSTER:
            raise ValueError(f"a cluster has 1 to {_MAX_CLUSTER} CTAs, got {cluster}")
        self.dynamic_shared = dynamic_shared
        self.shared_bytes = program.static_shared + dynamic_shared
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise ValueError(f"a CTA has up to {MAX_SHARED_BYTES} bytes of shared memory, got {self.shared_bytes}")
        self.schedule = schedule
        self.seed = seed
        self.random: random.Random | None = None
        self.waiting: deque[Dim3] = deque()  # clusters that have not started
        self.printed: list[str] = []
        self.params = Block(PARAM_WINDOW, program.pack(params), "parameters", writable=False)
        self.statistics = Statistics(
            kernel.name,
            grid,
            block,
            cluster,
            static_shared=program.static_shared,
            dynamic_shared=dynamic_shared,
            virtual_registers=len(kernel.registers),
        )
        self.banks = BankCounter(program, self.statistics)

    def places(self) -> list[Dim3]:
        """Indices of all clusters, in the order in which they run."""
        nx, ny, nz = (g // c for g, c in zip(self.grid, self.cluster, strict=True))
        return [(x, y, z) for z in range(nz) for y in range(ny) for x in range(nx)]

    def run(self, count: int = 1) -> Statistics:
        """In `count` processes, see `processes`. Raises Fault."""
        if count < 1:
            raise ValueError(f"processes must be 1 or more, got {count}")
        try:
            with one_thread():
                if count == 1:
                    self.run_clusters(self.places())
                else:
                    processes.run(self, count)
        finally:
            sys.stdout.write("".join(self.printed))
        return self.statistics

    def cancel(self) -> Dim3 | None:
        """Take away the next cluster that would have run (cluster launch control). None: there is none to be had."""
        refused = self.random is not None and self.random.random() < 0.25
        return self.waiting.popleft() if self.waiting and not refused else None

    def run_clusters(self, places: Sequence[Dim3]) -> None:
        tally = Tally(self.program)
        self.waiting = deque(places)
        with np.errstate(all="ignore"):
            while self.waiting:
                # one after another, unless all must be there at once
                together = [self.waiting.popleft() for _ in range(len(self.waiting) if self.cooperative else 1)]
                if self.seed is not None:
                    self.random = random.Random(f"{self.seed} {together[0]}")
                for cluster in _carry_out([(self, place) for place in together]):
                    self.add(cluster, tally)
        self.finish(tally)

    def add(self, cluster: Cluster, tally: Tally) -> None:
        """What a cluster that is over did."""
        for cta in cluster.ctas:
            self.statistics.bytes["shared load"] += cta.shared.loaded
            self.statistics.bytes["shared store"] += cta.shared.stored
            tally.add(cta)
        cluster.release()

    def finish(self, tally: Tally) -> None:
        self.memory.unwatch()
        tally.into(self.statistics)
        self.banks.finish()


def run_together(launches: Sequence[Launch]) -> None:
    """Launches of which all clusters are there at once: of several devices, which wait for each other.

    Raises Fault, and ValueError unless they share their memory, with all arrays that one of them may reach.
    """
    if len({id(launch.memory) for launch in launches}) > 1:
        raise ValueError("launches that run together need one memory")
    tallies = {id(launch): Tally(launch.program) for launch in launches}
    for n, launch in enumerate(launches):
        launch.random = None if launch.seed is None else random.Random(f"{launch.seed} {n}")
    try:
        with one_thread(), np.errstate(all="ignore"):
            for cluster in _carry_out([(launch, place) for launch in launches for place in launch.places()]):
                cluster.launch.add(cluster, tallies[id(cluster.launch)])
            for launch in launches:
                launch.finish(tallies[id(launch)])
    finally:
        sys.stdout.write("".join(line for launch in launches for line in launch.printed))


def _carry_out(places: Sequence[tuple[Launch, Dim3]]) -> list[Cluster]:
    """Clusters whose warps run in turn, and what they do to global memory is checked against each other."""
    first, _ = places[0]
    hazards = Hazards(first.races == "strict")
    if first.races:
        first.memory.watch(hazards)
    clusters = [Cluster(launch, place, hazards) for launch, place in places]
    running, seen = clusters, Counter[str]()
    while running:
        progressed = [_counted(cluster, cluster.step) for cluster in running]
        if not any(progressed):
            standstill = "\n".join(cluster.deadlock() for cluster in running)
            seen[standstill] += 1
            if seen[standstill] > PATIENCE:
                raise DeadlockError(standstill)
            for warp in (w for cluster in running for w in cluster.running):
                warp.expired = {f.pc for f in warp.fragments}
        for cluster in running:
            if not cluster.running:
                _counted(cluster, cluster.finish)
        running = [cluster for cluster in running if cluster.running]
    hazards.check_exits()
    return clusters


def _counted(cluster: Cluster, action: Callable[[], Any]) -> Any:
    """With the bytes of global memory that it moves."""
    memory, moved = cluster.launch.memory, cluster.launch.statistics.bytes
    before = memory.loaded, memory.stored
    done = action()
    moved["global load"] += memory.loaded - before[0]
    moved["global store"] += memory.stored - before[1]
    return done


def _ranges(numbers: Array) -> str:
    parts: list[list[int]] = []
    for n in map(int, numbers):
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else text[:197] + "..."
