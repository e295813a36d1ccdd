"""The timing protocol, for tuning and benchmarks alike. Needs a GPU.

    bench = Bench(problem, device)
    timed = [bench.record(kernel, config) for ...]      # checked against the reference, then captured in a CUDA graph
    times = bench.rounds(timed, 30)                     # [rounds, contenders] microseconds a launch

- Cold: every launch finds operands that L2 does not hold. Before a graph is timed, more memory is read than L2 holds,
  and a graph takes each of several sets of operands once. Turns over more memory than that are not enough: contenders
  share operands, and what one leaves stays where another's lines are evicted first (13 % too fast on an H100).
- Launches come from a CUDA graph, and the time of a graph with the same beginning and no launches is subtracted.
- Interleaved: a round times every contender once, in a new random order, behind a spin kernel, so that the whole graph
  is queued before its first event.
"""

import gc
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fp4suite import problem as problems, registry, testing
from fp4suite.operators import decoded
from fp4suite.problem import Problem
from fp4suite.testing import Case

from . import baselines

COLD_L2_TIMES = 4  # so many times the size of L2 is read before a graph
# and are its operands, if MAX_SETS will do: what the last launches leave in L2 to be written is then little of all that
# is (with 4, copies of 75 to 200 MB seemed 1.5 to 3.5 % faster on an H100)
SETS_L2_TIMES = 24
COLD = "flushed"  # the word for it in rows; older ones also have "rotated"
MAX_SETS = 16
MAX_SET_BYTES = 8 << 30
SPIN_CYCLES = 200_000  # about 110 us: the host queues events and graph meanwhile, or is given twice as long
LONGEST_SPIN = SPIN_CYCLES << 6
MAX_SPINS = 10  # that a host may need to queue a graph
CHECKED_SETS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """`launches` launches, all of one contender, behind one call: a captured graph's replay, or plain host code.

    queued: whether all of it has to be queued before it begins. The time of host code is part of what that takes.
    holds: what a graph has the addresses of; whoever captures next gives unused memory back to the driver.
    """

    label: str
    replay: Callable[[], object]
    launches: int
    queued: bool = True
    holds: object = None


class Timer:
    """Times contenders on one CUDA device. A graph launches once on each of `items`, sets of operands."""

    def __init__(self, items: Sequence[Any], device: torch.device | str, seed: int = 0) -> None:
        self.device = cuda_device(device)
        self.items = items
        self._flush = torch.zeros(COLD_L2_TIMES * l2_bytes(self.device) // 4, device=self.device)
        self._sink = torch.zeros((), device=self.device)
        self._stream = torch.cuda.Stream(self.device)
        self._rng = random.Random(seed)
        self._idle: deque[float] = deque(maxlen=31)
        self._spin = SPIN_CYCLES
        self._empty = self.capture("empty", None)

    def capture(self, label: str, launch: Callable[[Any], object] | None) -> Timed:
        """A graph of `launch(item)` over all items."""
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._pass(launch)
        graph.replay()
        torch.cuda.synchronize(self.device)
        return Timed(label, graph.replay, len(self.items), holds=launch)

    def rounds(self, timed: list[Timed], rounds: int) -> NDArray[np.float64]:
        """Microseconds a launch, [rounds, len(timed)]."""
        everyone = [*timed, self._empty]
        for t in everyone:
            t.replay()  # clocks up, code loaded
        out = np.empty((rounds, len(everyone)))
        for r in range(rounds):
            for i in self._rng.sample(range(len(everyone)), len(everyone)):
                out[r, i] = self._replay_us(everyone[i])
        self._idle.extend(out[:, -1])  # what a graph costs without launches hardly changes: many rounds tell it best
        launches = np.array([t.launches for t in timed], float)
        return np.asarray((out[:, :-1] - np.median(self._idle)) / launches)

    def _pass(self, launch: Callable[[Any], object] | None) -> None:
        """Something to begin with; then the launches."""
        self._sink.zero_()
        if launch is not None:
            for item in self.items:
                launch(item)

    def _replay_us(self, timed: Timed) -> float:
        """Raises RuntimeError if the host never gets a graph queued while the spin kernel runs."""
        for _ in range(MAX_SPINS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self._spin)
            torch.sum(self._flush, dim=0, out=self._sink)
            start.record()
            timed.replay()
            end.record()
            late = timed.queued and start.query()  # the time would be that of a busy host
            end.synchronize()
            if not late:
                self._spin -= (self._spin - SPIN_CYCLES) // 8  # a host is seldom busy for long
                return start.elapsed_time(end) * 1e3
            self._spin = min(2 * self._spin, LONGEST_SPIN)
        raise RuntimeError(f"{timed.label}: the host took longer than a spin of {self._spin} cycles to queue it")


class Bench(Timer):
    """One problem on one CUDA device, with its operands."""

    def __init__(self, problem: Problem, device: torch.device | str, seed: int = 0) -> None:
        self.problem = problem
        device = cuda_device(device)
        self.cases: list[Case] = [
            testing.case(problem, device, seed + i) for i in range(sets_for(problem.bytes, l2_bytes(device)))
        ]
        super().__init__(self.cases, device, seed)

    def record(self, kernel: str, config: Any, *, check: bool = True) -> Timed:
        """Run `kernel` on the operands, compare with the reference, and capture it.

        Raises AssertionError where the result is wrong, and whatever compiling or launching raises.
        """
        module = registry.load(kernel)
        if hasattr(module, "warm"):
            module.warm(self.problem, config)
        for case in self.cases[:CHECKED_SETS]:
            case.run(module, config)
            torch.cuda.synchronize(self.device)
            if check:
                case.check()
        timed = self.capture(f"{kernel} {config}", lambda case: case.launch(module, config))
        if check:
            self._check_replay(timed)
        return timed

    def record_decoded(self, kernel: str, config: Any) -> Timed:
        """As `record`, of a W4A16 kernel on NVFP4 activations, which are decoded first: that counts."""
        module = registry.load(kernel)

        def launch(case: Case) -> None:
            a, b, segments = case.laid_out(module)
            module.launch(*decoded(a, b), segments, case.out, config)

        for case in self.cases[:CHECKED_SETS]:
            case.poison()
            launch(case)
            torch.cuda.synchronize(self.device)
            case.check()
        timed = self.capture(f"decoded, {kernel} {config}", launch)
        self._check_replay(timed)
        return timed

    def record_baseline(self) -> Timed:
        """The problem's baseline. Eager PyTorch is not captured: what its host code costs is part of what it is."""
        function = baselines.function(self.problem)
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            for case in self.cases:
                function(case)  # prepares what it needs
        torch.cuda.synchronize(self.device)
        name = baselines.name(self.problem)
        if name == baselines.EAGER:
            return Timed(name, lambda: self._pass(function), len(self.cases), queued=False)
        return self.capture(name, function)

    def _check_replay(self, timed: Timed) -> None:
        """What the graph writes is right too: outputs poisoned, replayed, compared."""
        for case in self.cases[:CHECKED_SETS]:
            case.poison()
        torch.cuda.synchronize(self.device)
        timed.replay()
        torch.cuda.synchronize(self.device)
        for case in self.cases[:CHECKED_SETS]:
            case.check()


def cuda_device(device: torch.device | str) -> torch.device:
    """The device with its index, made the current one. Raises ValueError unless it is a CUDA device."""
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"measuring needs a CUDA device, got {device}")
    if str(device) == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def sets_for(nbytes: int, l2: int) -> int:
    """How many sets of operands of `nbytes` each a graph goes through."""
    return max(2, min(-(-SETS_L2_TIMES * l2 // nbytes), MAX_SETS, max(2, MAX_SET_BYTES // nbytes)))


def read_bandwidth(device: torch.device | str, nbytes: int = 1 << 30) -> float:
    """GB/s of a plain read (a sum over `nbytes`), the honest floor of a kernel that only streams weights."""
    x = torch.zeros(nbytes // 4, device=device)
    out = torch.zeros((), device=device)
    return nbytes / _loop_us(lambda: torch.sum(x, dim=0, out=out)) / 1e3


def copy_bandwidth(device: torch.device | str, nbytes: int = 1 << 30) -> float:
    """GB/s of a copy, bytes read plus bytes written: the driver's, or a kernel's if that is faster."""
    x = torch.zeros(nbytes // 4, device=device)
    y = torch.empty_like(x)
    fastest = min(_loop_us(lambda: y.copy_(x)), _loop_us(lambda: torch.neg(x, out=y)))
    return 2 * nbytes / fastest / 1e3


def matmul_tflops(device: torch.device | str, size: int = 8192) -> float:
    """TFLOP/s of cuBLAS on a square BF16 product with random data."""
    gen = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=gen, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _loop_us(lambda: torch.matmul(a, b.T, out=out)) / 1e6


def _loop_us(function: Callable[[], object], repeats: int = 20) -> float:
    """Median microseconds of a call, from a CUDA graph of one."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return float(np.median(times))


# --- what runs in the measuring child: one Bench at a time, contenders by number ---

_bench: Bench | None = None
_recorded: dict[int, Timed] = {}


def open_bench(op: str, dims: dict[str, int | str], device: str, seed: int) -> None:
    """Start on a problem; forgets the one before."""
    global _bench
    _recorded.clear()
    _bench = None
    gc.collect()  # cases hold themselves
    torch.cuda.empty_cache()
    _bench = Bench(problems.from_dims(op, dims), device, seed)


def record(number: int, kernel: str, knobs: dict[str, Any]) -> None:
    """Bench.record under a number."""
    assert _bench is not None, "open_bench comes first"
    config = registry.make_config(registry.load(kernel), knobs)
    _recorded[number] = _bench.record(kernel, config)


def rounds(numbers: list[int], count: int) -> list[list[float]]:
    """Bench.rounds of recorded contenders: [count][len(numbers)] microseconds."""
    assert _bench is not None, "open_bench comes first"
    times: list[list[float]] = _bench.rounds([_recorded[n] for n in numbers], count).tolist()
    return times


def forget(number: int) -> None:
    """Drop a contender's graph."""
    _recorded.pop(number, None)


def describe(device: str) -> dict[str, str]:
    """The device's marketing name and arch, asked in a child so that the parent keeps no CUDA context."""
    from fp4suite import arch

    return {"device": arch.device_name(device), "arch": arch.of(device), "name": torch.cuda.get_device_name(device)}


def record_baseline(number: int) -> str:
    """Capture the problem's baseline under a number; returns its name."""
    assert _bench is not None, "open_bench comes first"
    _recorded[number] = _bench.record_baseline()
    return _recorded[number].label


def verify(op: str, dims: dict[str, int | str], device: str, kernel: str, knobs: dict[str, Any]) -> None:
    """Run one config on random operands and compare with the reference. Raises AssertionError."""
    module = registry.load(kernel)
    config = registry.make_config(module, knobs)
    problem = problems.from_dims(op, dims)
    if hasattr(module, "warm"):
        module.warm(problem, config)
    for seed in range(CHECKED_SETS):
        case = testing.case(problem, device, seed)
        case.run(module, config)
        torch.cuda.synchronize(device)
        case.check()
