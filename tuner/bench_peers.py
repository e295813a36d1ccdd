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

from fp4suite import dispatch
from fp4suite.errors import UnsupportedError
from fp4suite.layouts import Order
from fp4suite.problem import Act, GemmProblem, nvfp4_bytes

from . import bench_cells, measure, peers_rows, provenance, side_by_side, stats, worker
from .bench import Roofs, Row
from .bench_cells import READ
from .peers import PEERS
from .peers_rows import ROOFS
from .side_by_side import OWN, RECORD_S, Timed, line, quotient, spelled
from .targets import Target, problems

DEFAULT_M = (1, 4, 16, 32, 64, 128, 256, 512, 2048, 8192)
SECONDS = 420.0


@dataclass(frozen=True, slots=True)
class Cell:
    """A weight shape at one m: the layers that have it, and what of ours runs it."""

    layers: tuple[str, ...]
    problem: GemmProblem
    choice: dispatch.Choice

    @property
    def shape(self) -> GemmProblem:
        """Everything but m."""
        return dataclasses.replace(self.problem, m=1)

    @property
    def packed(self) -> int:
        return nvfp4_bytes(self.problem.n, self.problem.k)


@dataclass(frozen=True, slots=True)
class Options:
    """peers: names that are asked for. layers: "q_b" or "pro.q_b", none for all. order, act: see `targets.problems`."""

    m: Sequence[int]
    peers: Sequence[str]
    layers: Sequence[str] = ()
    order: Order | None = None
    act: Act | None = None
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
    """Time all cells; rows go to out/<device>/gemm_nvfp4-peers.csv, or gemm_nvfp4-fp8-peers.csv with act="fp8".

    Raises ValueError where there is no GPU.
    """
    if target.cuda is None:
        raise ValueError(f"--peers measures on a GPU; for {target.arch} there is none here")
    began = time.monotonic()
    outcome = Outcome(out / target.device / f"{peers_rows.stem(options.act)}.csv", absent=_absent(options.peers, say))
    todo = cells(target, configs, options, say)
    if options.resume and outcome.path.exists():
        kept = {row["problem"]: row for row in peers_rows.load(outcome.path) if row["commit"] == provenance.commit()}
        outcome.rows = [kept[str(c.problem)] for c in todo if str(c.problem) in kept]
        todo = [c for c in todo if str(c.problem) not in kept]
    outcome.left = len(todo)
    say(f"{len(todo)} cells to time, {len(outcome.rows)} kept, in about {options.seconds:.0f} s")
    child = start()
    try:
        facts = Roofs(**child.call(backend.roofs, target.cuda, timeout=RECORD_S), copy=0.0)
        present = [name for name in options.peers if name not in outcome.absent]
        _compile_ahead(child, backend, target.cuda, todo, present, options, say)
        say(f"compiled after {time.monotonic() - began:.0f} s")
        measuring = _Measuring(child, backend, target.cuda, [*present, *ROOFS], options.seed)
        beginning = provenance.now()
        for cell, timed in measuring.within(todo, began, options.seconds, options.quiet):
            row = _row(target, cell, timed, facts, outcome.absent) | {"run": beginning}
            outcome.rows.append(row)
            outcome.left -= 1
            peers_rows.store(outcome.path, [row])
    finally:
        child.close()
    return outcome


def cells(
    target: Target, configs: Mapping[str, Mapping[str, Any]], options: Options, say: Callable[[str], None]
) -> list[Cell]:
    """The largest weights first, each at all m, with BF16 results, as peers give them. What has no kernel is said.

    Raises ValueError for a layer that no model has, and for an architecture whose GEMM does not take BF16 activations.
    """
    found: list[Cell] = []
    known: set[str] = set()
    found_problems = problems(configs, GemmProblem.op, target, options.m, options.tp, options.order, options.act)
    for problem, (layers, _) in found_problems.items():
        assert isinstance(problem, GemmProblem)
        if problem.act not in ("bf16", "fp8"):
            raise ValueError(f"--peers compares BF16 activations; on {target.arch} the GEMM takes {problem.act}")
        if problem.out != "bf16":
            continue
        names = {part for name in layers for part in (name, name.partition(".")[2])}
        known |= names
        if options.layers and not names & set(options.layers):
            continue
        try:
            choice = dispatch.choose_for(GemmProblem.op, problem, dispatch.Target(target.arch, target.device))
        except UnsupportedError as e:
            say(f"no kernel: {e}")
        else:
            found.append(Cell(tuple(layers), problem, choice))
    for layer in options.layers:
        if layer not in known:
            raise ValueError(f"--layers must be of {', '.join(sorted(known))}, got {layer!r}")
    return sorted(found, key=lambda c: (-c.packed, c.layers, c.problem.m))


def _absent(asked: Sequence[str], say: Callable[[str], None]) -> dict[str, str]:
    """Peers that will not be timed, and why; says of each peer what it is."""
    absent = {}
    for name, peer in PEERS.items():
        why = peer.missing() if name in asked else "not asked for"
        if why is not None:
            absent[name] = why
        say(f"peer {name}: {why or f'version {peer.version()}'}{f' ({peer.note})' if peer.note and not why else ''}")
    return absent


class _Measuring(side_by_side.Measuring[Cell]):
    """Opens a layer shape when it changes, then the cell. A peer that ends the process is left out of that shape."""

    def __init__(self, child: Any, backend: ModuleType, device: str, names: Sequence[str], seed: int) -> None:
        super().__init__(child, backend, names)
        self._device, self._seed = device, seed
        self._shape: GemmProblem | None = None

    def group(self, cell: Cell) -> GemmProblem:
        return cell.shape

    def open(self, cell: Cell) -> None:
        p = cell.problem
        if self._shape != cell.shape:
            self.child.call(self.backend.open_shape, p.n, p.k, p.segments, self._device, self._seed, timeout=RECORD_S)
            self._shape = cell.shape
        self.child.call(self.backend.open_cell, p.dims(), self._seed, timeout=RECORD_S)

    def forget(self) -> None:
        self._shape = None


def _compile_ahead(
    child: Any,
    backend: ModuleType,
    device: str,
    todo: Sequence[Cell],
    present: Sequence[str],
    options: Options,
    say: Callable[[str], None],
) -> None:
    """Peers into their caches on disk, many processes at once, m by m, as calls for one weight wait for each other's
    locks; ours in the measuring process meanwhile.

    What fails here fails in its cell too, which is where it counts.
    """
    sizes = sorted({(c.problem.n, c.problem.k, c.problem.m) for c in todo}, key=lambda nkm: nkm[2])
    compiling = [PEERS[name] for name in present if PEERS[name].compiles]
    calls = [(backend.warm_peer, (p.name, n, k, m, device)) for n, k, m in sizes for p in compiling]
    environment = {k: v for p in compiling for k, v in p.environment.items()}

    def warm_peers() -> None:
        said = set()  # what a peer refuses of a weight it mostly refuses for all m
        for index, found in worker.run_all(calls, min(options.jobs, len(calls)), RECORD_S, environment):
            name, n, k, *_ = calls[index][1]
            why = f"compiling {name} for {n} x {k}: {line(found)}" if isinstance(found, Exception) else None
            if why is not None and why not in said:
                said.add(why)
                say(why)

    with ThreadPoolExecutor(1) as pool:
        warming = pool.submit(warm_peers) if calls else None
        done = set()
        for c in tqdm(todo, desc="compiling", unit="cell", disable=options.quiet or None):
            what = (c.choice.kernel, c.choice.config, c.shape)
            if what in done:
                continue
            done.add(what)
            knobs = dataclasses.asdict(c.choice.config)
            try:
                child.call(backend.warm_own, c.problem.dims(), c.choice.kernel, knobs, timeout=RECORD_S)
            except (worker.WorkerDied, worker.RemoteError) as e:
                say(f"compiling {c.choice.kernel} for {c.problem}: {line(e)}")
        if warming is not None:
            warming.result()


def _row(target: Target, cell: Cell, timed: Timed, roofs: Roofs, absent: Mapping[str, str]) -> Row:
    problem, choice = cell.problem, cell.choice
    us: dict[str, float | None] = dict.fromkeys((OWN, *PEERS, *ROOFS))
    row: Row = dict.fromkeys(peers_rows.columns())
    for name, samples in timed.samples.items():
        s = stats.summary(samples)
        us[name] = s.median_us
        row |= {f"{name}_p20_us": round(s.p20_us, 3), f"{name}_p80_us": round(s.p80_us, 3)}
    own, best = us[OWN], peers_rows.best_peer(us)
    roof, roof_us = roofs.of(problem)
    notes = dict(absent) | timed.failed
    versions = {name: PEERS[name].version() for name in PEERS if us[name] is not None and name != "cublas_bf16"}
    read = us[READ]
    return row | {
        "op": problem.op,
        "problem": str(problem),
        "layers": " ".join(cell.layers),
        "m": problem.m,
        "n": problem.n,
        "k": problem.k,
        "packed_bytes": cell.packed,
        "kernel": choice.kernel,
        "config": " ".join(f"{k}={v}" for k, v in dataclasses.asdict(choice.config).items()),
        "reason": choice.reason,
        "best_peer": best or "",
        "ratio": quotient(us[best] if best else None, own),
        "share_of_read": quotient(read, own),
        **{f"{name}_us": None if t is None else round(t, 3) for name, t in us.items()},
        **{f"{name}_error": timed.errors[name] for name in (OWN, *PEERS) if name in timed.errors},
        "notes": "; ".join(f"{name}: {why}" for name, why in notes.items()),
        "rounds": len(next(iter(timed.samples.values()), ())),
        "cold": measure.COLD,
        "roof": roof,
        "share_of_roof": quotient(roof_us, own),
        "arch": target.arch,
        "device": target.device,
        "peer_versions": spelled(versions),
        "versions": spelled(provenance.versions()),
        "commit": provenance.commit(),
    }
