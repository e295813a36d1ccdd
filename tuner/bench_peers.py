"""`bench --peers`: gemm_nvfp4 against other libraries, cell by cell: a layer shape at one m, on one GPU.

    ratio = median of the fastest peer that is right / median of ours

A peer is timed once its result agrees with the FP64 product. One that is not installed, fails or is wrong says so in
every cell. Beside the peers stand roofs: a bare read of the same packed bytes, an empty kernel, the FP8 product. All of
them are cold, in CUDA graphs, and interleaved (see `measure`). Rows are stored after each cell, so that a run that is
cut keeps what it has.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from fp4suite import dispatch, layouts, registry, shapes
from fp4suite.errors import UnsupportedError
from fp4suite.layouts import Order
from fp4suite.problem import GemmProblem, nvfp4_bytes

from . import bench_cells, peers_rows, provenance, stats, worker
from .bench import Roofs, Row
from .bench_cells import OWN, READ
from .peers import PEERS
from .peers_rows import ROOFS, SUFFIX
from .targets import Target

DEFAULT_M = (1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192)
SECONDS = 420.0
LEAST_ROUNDS, MOST_ROUNDS = 9, 41
MOST_CELL_S = 3.0  # of timing; a cell of long launches may take longer for its least rounds
RECORD_S, TIMES_S = 300.0, 120.0  # after which a contender counts as hanging


@dataclass(frozen=True, slots=True)
class LayerShape:
    """A weight [n, k] and the layers that have one like it; `dims` are those of its problems but m."""

    layers: tuple[str, ...]
    problem: GemmProblem  # at m = 1

    def at(self, m: int) -> GemmProblem:
        return dataclasses.replace(self.problem, m=m)

    @property
    def packed(self) -> int:
        return nvfp4_bytes(self.problem.n, self.problem.k)


@dataclass(frozen=True, slots=True)
class Options:
    m: Sequence[int]
    peers: Sequence[str]
    layers: Sequence[str] = ()  # "q_b" or "pro.q_b"; none: all
    order: Order | None = None  # of our weights; None: what a kernel of this architecture prefers
    tp: int = 1
    seconds: float = SECONDS
    jobs: int = 1
    seed: int = 0
    resume: bool = False
    quiet: bool = False


@dataclass(slots=True)
class Outcome:
    """What a run did. rows: of its cells, and with `resume` those that were there."""

    path: Path
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why it cannot run
    left: int = 0  # cells that were not reached


def run(
    target: Target,
    configs: Mapping[str, Mapping[str, Any]],
    out: Path,
    options: Options,
    backend: ModuleType = bench_cells,
    start: Callable[[], Any] = worker.Worker,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Time all cells; rows go to out/<device>/gemm_nvfp4-peers.csv. Raises ValueError where there is no GPU."""
    if target.cuda is None:
        raise ValueError(f"--peers measures on a GPU; for {target.arch} there is none here")
    began = time.monotonic()
    order = options.order or preferred_order(target.arch)
    cells = [
        (shape, m) for shape in shapes_of(configs, target.arch, options.tp, options.layers, order) for m in options.m
    ]
    path = out / target.device / f"{GemmProblem.op}{SUFFIX}.csv"
    outcome = Outcome(path, absent={name: why for name in options.peers if (why := PEERS[name].missing())})
    present = [name for name in options.peers if name not in outcome.absent]
    for name in PEERS:
        if name not in options.peers:
            outcome.absent[name] = "not asked for"
    for name in options.peers:
        peer = PEERS[name]
        state = outcome.absent.get(name) or f"version {peer.version()}{', ' + peer.note if peer.note else ''}"
        say(f"peer {name}: {state}")
    say(f"our weights lie in the order {order!r}; {len(cells)} cells, about {options.seconds:.0f} s")
    done = {row["problem"]: row for row in peers_rows.read(path)} if options.resume and path.exists() else {}
    beginning = provenance.now()
    child = start()
    try:
        facts = Roofs(**child.call(backend.roofs, target.cuda, timeout=RECORD_S), copy=0.0)
        choices = {}
        for shape, m in cells:
            try:
                choices[shape, m] = dispatch.choose_for(
                    GemmProblem.op, shape.at(m), dispatch.Target(target.arch, target.device)
                )
            except UnsupportedError as e:
                say(f"no kernel: {e}")
        todo = []
        for cell in cells:
            row = done.get(str(cell[0].at(cell[1])))
            if row is not None and row["commit"] == provenance.commit():
                outcome.rows.append(peers_rows.typed(row))
            elif cell in choices:
                todo.append(cell)
        _compile_ahead(child, backend, target.cuda, todo, choices, present, options, say)
        say(f"compiled after {time.monotonic() - began:.0f} s")
        bar = tqdm(todo, unit="cell", disable=options.quiet or None)
        measuring = _Measuring(child, backend, target.cuda, options.seed)
        spent = 0.0  # outside of timing, so far
        for number, (shape, m) in enumerate(bar):
            bar.set_description(f"{shape.layers[0]} m={m}")
            remaining = began + options.seconds - time.monotonic()
            if remaining <= 0 and number:
                outcome.left = len(todo) - number
                break
            share = remaining / (len(todo) - number) - (spent / number if number else 0.5)
            before = time.monotonic()
            timed, times, cold = measuring.cell(
                shape, m, choices[shape, m], [*present, *ROOFS], min(share, MOST_CELL_S)
            )
            spent += time.monotonic() - before - max(0.0, min(share, MOST_CELL_S))
            row = _row(target, shape, m, choices[shape, m], timed, times, cold, facts, outcome.absent) | {
                "run": beginning
            }
            outcome.rows.append(row)
            peers_rows.store(path, [row])
    finally:
        child.close()
    return outcome


class _Measuring:
    """The measuring process, which a contender may take down: it is then started again without that contender."""

    def __init__(self, child: Any, backend: ModuleType, device: str, seed: int) -> None:
        self._child, self._backend, self._device, self._seed = child, backend, device, seed
        self._shape: LayerShape | None = None
        self._broken: dict[tuple[LayerShape, str], str] = {}  # what ended the process on this shape

    def cell(
        self, shape: LayerShape, m: int, choice: dispatch.Choice, names: Sequence[str], seconds: float
    ) -> tuple[dict[str, float | str], dict[str, stats.Samples], str]:
        """Per contender its error, or why it was not timed; samples of those that were; how operands are kept cold."""
        import numpy as np

        while True:
            timed: dict[str, float | str] = {}
            try:
                cold = self._open(shape, m)
            except (worker.WorkerDied, worker.RemoteError) as e:
                self._restart()
                return dict.fromkeys((OWN, *names), f"operands could not be made: {_line(e)}"), {}, ""
            for name in (OWN, *names):
                timed[name] = self._broken.get((shape, name)) or self._record(shape, name, choice)
                if self._shape is None:
                    break  # the process is gone, and what it had recorded
            else:
                right = [name for name, found in timed.items() if isinstance(found, float)]
                try:
                    samples = self._child.call(
                        self._backend.times, right, seconds, LEAST_ROUNDS, MOST_ROUNDS, timeout=TIMES_S
                    )
                except (worker.WorkerDied, worker.RemoteError) as e:
                    self._restart()
                    why = f"failed while all were timed: {_line(e)}"
                    return {name: why if name in right else found for name, found in timed.items()}, {}, cold
                return timed, dict(zip(right, np.array(samples).T, strict=True)), cold

    def _open(self, shape: LayerShape, m: int) -> str:
        p = shape.problem
        if self._shape != shape:
            self._child.call(self._backend.open_shape, p.n, p.k, p.segments, self._device, self._seed, timeout=RECORD_S)
            self._shape = shape
        return str(self._child.call(self._backend.open_cell, shape.at(m).dims(), self._seed, timeout=RECORD_S))

    def _record(self, shape: LayerShape, name: str, choice: dispatch.Choice) -> float | str:
        try:
            if name == OWN:
                knobs = dataclasses.asdict(choice.config)
                return float(self._child.call(self._backend.record_own, choice.kernel, knobs, timeout=RECORD_S))
            return float(self._child.call(self._backend.record, name, timeout=RECORD_S))
        except worker.WorkerDied as e:
            self._broken[shape, name] = f"{e.reason}: {_line(e)}"
            self._restart()
            return self._broken[shape, name]
        except worker.RemoteError as e:
            why = f"wrong: {_line(e)}" if e.kind == "AssertionError" else f"{e.kind}: {_line(e)}"
        try:
            self._child.call(self._backend.sound, timeout=TIMES_S)
        except (worker.WorkerDied, worker.RemoteError):
            self._broken[shape, name] = why
            self._restart()
        return why

    def _restart(self) -> None:
        self._child.close()
        self._shape = None


def _compile_ahead(
    child: Any,
    backend: ModuleType,
    device: str,
    todo: Sequence[tuple[LayerShape, int]],
    choices: Mapping[tuple[LayerShape, int], dispatch.Choice],
    present: Sequence[str],
    options: Options,
    say: Callable[[str], None],
) -> None:
    """Peers into their caches on disk, many processes at once; ours in the measuring process meanwhile."""
    ms: dict[LayerShape, list[int]] = {}
    for shape, m in todo:
        ms.setdefault(shape, []).append(m)
    compiling = [PEERS[name] for name in present if PEERS[name].compiles]
    jobs = [(p, shape) for shape in ms for p in compiling]
    environment = {k: v for p in compiling for k, v in p.environment.items()}

    def warm_peers() -> list[str]:
        calls = [
            (backend.warm_peer, (p.name, shape.problem.n, shape.problem.k, ms[shape], device)) for p, shape in jobs
        ]
        failed = []
        for index, found in worker.run_all(calls, min(options.jobs, len(calls)), RECORD_S, environment):
            if isinstance(found, Exception):
                p, shape = jobs[index]
                failed.append(f"compiling {p.name} for {shape.problem}: {_line(found)}")
        return failed

    with ThreadPoolExecutor(1) as pool:
        warming = pool.submit(warm_peers) if jobs else None
        seen = set()
        for shape, m in tqdm(todo, desc="compiling", unit="cell", disable=options.quiet or None):
            choice = choices[shape, m]
            what = (choice.kernel, choice.config, shape)
            if what in seen:
                continue
            seen.add(what)
            try:
                child.call(
                    backend.warm_own,
                    shape.at(m).dims(),
                    choice.kernel,
                    dataclasses.asdict(choice.config),
                    timeout=RECORD_S,
                )
            except (worker.WorkerDied, worker.RemoteError) as e:
                say(f"compiling {choice.kernel} for {shape.at(m)}: {_line(e)}")  # its cell says so again
        for line in warming.result() if warming is not None else ():
            say(line)


def preferred_order(arch: str) -> Order:
    """The order of weights for which this architecture has a kernel: a prepared one before "rows"."""
    found = {getattr(registry.load(row.name), "WEIGHT_ORDER", "rows") for row in registry.kernels(GemmProblem.op, arch)}
    return next((order for order in layouts.ORDERS if order != "rows" and order in found), "rows")


def shapes_of(
    configs: Mapping[str, Mapping[str, Any]], arch: str, tp: int, layers: Sequence[str], order: Order
) -> list[LayerShape]:
    """Each weight shape of the models once, the largest first.

    layers: only shapes of these layers ("q_b", "pro.q_b"). A shape that cannot have the order keeps "rows". Raises
    ValueError for a layer that no model has, and for an architecture whose GEMM does not take BF16 activations.
    """
    joined: dict[GemmProblem, list[str]] = {}
    for model, config in configs.items():
        for p in shapes.problems(config, GemmProblem.op, arch=arch, m=(1,), tp=tp):
            assert isinstance(p.problem, GemmProblem)
            joined.setdefault(p.problem, []).extend(f"{model}.{name}" for name in p.layers)
    known = {name for names in joined.values() for name in names}
    for layer in layers:
        if layer not in known and layer not in {name.partition(".")[2] for name in known}:
            raise ValueError(
                f"--layers must be of {', '.join(sorted(known))}, with or without the model, got {layer!r}"
            )
    found = []
    for problem, names in joined.items():
        if problem.act != "bf16":
            raise ValueError(f"--peers compares BF16 activations; on {arch} the GEMM takes {problem.act}")
        if layers and not any(name in layers or name.partition(".")[2] in layers for name in names):
            continue
        fits = order == "rows" or layouts.refuse_fragments_sm90(problem.n, problem.k) is None
        found.append(LayerShape(tuple(names), dataclasses.replace(problem, order=order if fits else "rows")))
    return sorted(found, key=lambda s: (-s.packed, s.layers))


def _row(
    target: Target,
    shape: LayerShape,
    m: int,
    choice: dispatch.Choice,
    found: Mapping[str, float | str],
    times: Mapping[str, stats.Samples],
    cold: str,
    roofs: Roofs,
    absent: Mapping[str, str],
) -> Row:
    problem = shape.at(m)
    us: dict[str, float | None] = dict.fromkeys((OWN, *PEERS, *ROOFS))
    row: Row = dict.fromkeys(peers_rows.columns())
    for name, samples in times.items():
        s = stats.summary(samples)
        us[name] = s.median_us
        row |= {f"{name}_p20_us": round(s.p20_us, 3), f"{name}_p80_us": round(s.p80_us, 3)}
    own, best = us[OWN], peers_rows.best_peer(us)
    roof, roof_us = roofs.of(problem)
    notes = dict(absent) | {name: why for name, why in found.items() if isinstance(why, str)}
    versions = {name: PEERS[name].version() for name in PEERS if us[name] is not None and name != "cublas_bf16"}
    read = us[READ]
    return row | {
        "op": problem.op,
        "problem": str(problem),
        "layers": " ".join(shape.layers),
        "m": m,
        "n": problem.n,
        "k": problem.k,
        "packed_bytes": shape.packed,
        "kernel": choice.kernel,
        "config": " ".join(f"{k}={v}" for k, v in dataclasses.asdict(choice.config).items()),
        "reason": choice.reason,
        "best_peer": best or "",
        "ratio": _quotient(us[best] if best else None, own),
        "share_of_read": _quotient(read, own),
        **{f"{name}_us": None if t is None else round(t, 3) for name, t in us.items()},
        **{f"{name}_error": e for name in (OWN, *PEERS) if isinstance(e := found.get(name), float)},
        "notes": "; ".join(f"{name}: {why}" for name, why in notes.items()),
        "rounds": len(next(iter(times.values()), ())),
        "cold": cold,
        "roof": roof,
        "share_of_roof": _quotient(roof_us, own),
        "arch": target.arch,
        "device": target.device,
        "peer_versions": _spelled(versions),
        "versions": _spelled(provenance.versions()),
        "commit": provenance.commit(),
    }


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else round(a / b, 4)


def _spelled(versions: Mapping[str, str]) -> str:
    return " ".join(f"{k}={v}" for k, v in versions.items())


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].replace("; ", ", ")
