"""`bench --peers` for the fusions: each op's problems beside libraries, a cell each, on one GPU.

A peer is timed once its result agrees with the reference, within its own tolerance. One that is not installed, was not
made for a problem, fails or is wrong says so in the cell. Beside the peers stand roofs: a copy of as many bytes and an
empty kernel. All of them are cold, in CUDA graphs, and interleaved (see `measure`). Rows are stored after each cell.
Ours are compiled ahead, in a pool of processes.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from fp4suite import dispatch
from fp4suite.errors import UnsupportedError
from fp4suite.problem import Problem

from . import builds, fusion_cells, fusion_rows, measure, peers_fusions, provenance, side_by_side, stats, worker
from .bench import Row
from .fusion_cells import COPY
from .fusion_rows import REFUSED, ROOFS
from .side_by_side import EMPTY, OWN, RECORD_S, Timed, quotient, spelled
from .targets import Target, problems

DEFAULT_M = (1, 4, 16, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True, slots=True)
class Cell:
    """A problem, the layers that have it, and what of ours runs it."""

    layers: tuple[str, ...]
    problem: Problem
    choice: dispatch.Choice


@dataclass(frozen=True, slots=True)
class Options:
    """ops: fusions. peers: names that are asked for. layers: "q_norm" or "pro.q_norm", none for all."""

    ops: Sequence[str]
    m: Sequence[int]
    peers: frozenset[str]
    layers: Sequence[str] = ()
    tp: int = 1
    seconds: float = 420.0
    jobs: int = 1
    seed: int = 0
    resume: bool = False
    quiet: bool = False


@dataclass(slots=True)
class Outcome:
    """What a run did. rows: of its cells, and with `resume` those that were there."""

    paths: list[Path] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # peer of one of the ops -> why it cannot run
    left: int = 0  # cells that were not reached


def run(
    target: Target,
    configs: Mapping[str, Mapping[str, Any]],
    out: Path,
    options: Options,
    backend: ModuleType = fusion_cells,
    start: Callable[[], Any] = worker.Worker,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Time all cells; rows go to out/<device>/<op>-peers.csv. Raises ValueError where there is no GPU."""
    if target.cuda is None:
        raise ValueError(f"--peers measures on a GPU; for {target.arch} there is none here")
    began = time.monotonic()
    outcome = Outcome(absent=_absent(options, say))
    todo = cells(target, configs, options, say)
    files = {op: out / target.device / f"{fusion_rows.stem(op)}.csv" for op in options.ops}
    if options.resume:
        kept = {
            (op, row["problem"]): row
            for op, path in files.items()
            if path.exists()
            for row in fusion_rows.load(path, op)
            if row["commit"] == provenance.commit()
        }
        outcome.rows = [kept[_key(c)] for c in todo if _key(c) in kept]
        todo = [c for c in todo if _key(c) not in kept]
    outcome.left = len(todo)
    say(f"{len(todo)} cells to time, {len(outcome.rows)} kept, in about {options.seconds:.0f} s")
    _compile_ahead(target, todo, options)
    say(f"compiled after {time.monotonic() - began:.0f} s")
    with contextlib.closing(start()) as child:
        copy = child.call(backend.long_copy, target.cuda, timeout=RECORD_S)
        say(f"a long copy: {copy:.0f} GB/s")
        measuring = _Measuring(child, backend, target.cuda, options.seed, outcome.absent)
        beginning = provenance.now()
        for cell, timed in measuring.within(todo, began, options.seconds, options.quiet):
            row = _row(target, cell, timed, copy, _notes(cell, outcome.absent)) | {"run": beginning}
            outcome.rows.append(row)
            outcome.left -= 1
            fusion_rows.store(files[cell.problem.op], row)
    outcome.paths = [path for path in files.values() if path.exists()]
    return outcome


def cells(
    target: Target, configs: Mapping[str, Mapping[str, Any]], options: Options, say: Callable[[str], None]
) -> list[Cell]:
    """Op by op, each problem at all m, the fewest tokens first. What has no kernel is said.

    Raises ValueError for a layer that none of the ops has.
    """
    found: list[Cell] = []
    known: set[str] = set()
    for op in options.ops:
        mine = []
        for problem, (layers, _) in problems(configs, op, target, options.m, options.tp).items():
            names = {part for name in layers for part in (name, name.partition(".")[2])}
            known |= names
            if options.layers and not names & set(options.layers):
                continue
            try:
                choice = dispatch.choose_for(op, problem, dispatch.Target(target.arch, target.device))
            except UnsupportedError as e:
                say(f"no kernel: {e}")
            else:
                mine.append(Cell(tuple(layers), problem, choice))
        found += sorted(mine, key=lambda c: (c.layers, problem_at_one(c.problem), int(c.problem.dims()["m"])))
    for layer in options.layers:
        if layer not in known:
            raise ValueError(f"--layers must be of {', '.join(sorted(known))}, got {layer!r}")
    return found


def problem_at_one(problem: Problem) -> str:
    """A problem but for its number of tokens."""
    return " ".join(f"{k}={v}" for k, v in problem.dims().items() if k != "m")


class _Measuring(side_by_side.Measuring[Cell]):
    """Opens each cell's operands. A peer that ends the process is left out of its op's problem, at all m."""

    def __init__(self, child: Any, backend: ModuleType, device: str, seed: int, absent: Mapping[str, str]) -> None:
        super().__init__(child, backend, ROOFS)
        self._device, self._seed, self._absent = device, seed, absent

    def contenders(self, cell: Cell) -> Sequence[str]:
        left_out = _notes(cell, self._absent)
        peers = [p.name for p in peers_fusions.of(cell.problem.op) if p.name not in left_out]
        return (OWN, *peers, *ROOFS)

    def group(self, cell: Cell) -> tuple[str, str]:
        return cell.problem.op, problem_at_one(cell.problem)

    def open(self, cell: Cell) -> None:
        p = cell.problem
        self.child.call(self.backend.open_cell, p.op, p.dims(), self._device, self._seed, timeout=RECORD_S)


def _compile_ahead(target: Target, todo: Sequence[Cell], options: Options) -> None:
    """Ours into the cache, many processes at once. What fails here fails in its cell too, which is where it counts."""
    with contextlib.closing(builds.Ahead(options.jobs, target.cuda)) as ahead:
        wanted = [builds.Build(c.choice.kernel, c.problem, c.choice.config, target.arch) for c in todo]
        begun = [ahead.begin(build, builds.NOW) for build in wanted]
        for compiled in tqdm(begun, desc="compiling", unit="cell", disable=options.quiet or None):
            compiled.result()


def _absent(options: Options, say: Callable[[str], None]) -> dict[str, str]:
    """Peers of the ops that will not be timed, and why; says of each peer what it is."""
    absent = {}
    for peer in {p.name: p for op in options.ops for p in peers_fusions.of(op)}.values():
        why = peer.missing() if peer.name in options.peers else "not asked for"
        if why is not None:
            absent[peer.name] = why
        note = f" ({peer.note})" if peer.note and not why else ""
        say(f"peer {peer.name} of {', '.join(peer.ops)}: {why or f'version {peer.version()}'}{note}")
    for op in options.ops:
        if op in peers_fusions.WITHOUT:
            say(f"no library for {op}: {peers_fusions.WITHOUT[op]}")
    return absent


def _notes(cell: Cell, absent: Mapping[str, str]) -> dict[str, str]:
    """Peers of the cell's op that will not be tried, and why."""
    notes = {}
    for peer in peers_fusions.of(cell.problem.op):
        if peer.name in absent:
            notes[peer.name] = absent[peer.name]
        elif (why := peer.refuses(cell.problem)) is not None:
            notes[peer.name] = f"{REFUSED}{why}"
    return notes


def _row(target: Target, cell: Cell, timed: Timed, copy: float, notes: Mapping[str, str]) -> Row:
    p, choice = cell.problem, cell.choice
    peers = {peer.name: peer for peer in peers_fusions.of(p.op)}
    us: dict[str, float | None] = dict.fromkeys((OWN, *peers, *ROOFS))
    row: Row = dict.fromkeys(fusion_rows.columns(p.op))
    for name, samples in timed.samples.items():
        s = stats.summary(samples)
        us[name] = s.median_us
        row |= {f"{name}_p20_us": round(s.p20_us, 3), f"{name}_p80_us": round(s.p80_us, 3)}
    own, best = us[OWN], fusion_rows.best_peer(p.op, us)
    versions = {x.module: x.version() for x in peers.values() if us[x.name] is not None}
    return row | {
        "op": p.op,
        "problem": str(p),
        "layers": " ".join(cell.layers),
        "m": p.dims()["m"],
        "bytes": p.bytes,
        "flops": p.flops,
        "kernel": choice.kernel,
        "config": spelled(dataclasses.asdict(choice.config)),
        "reason": choice.reason,
        "best_peer": best or "",
        "ratio": quotient(us[best] if best else None, own),
        "gb_per_s": None if own is None else round(p.bytes / own / 1e3, 1),
        "tflop_per_s": None if own is None else round(p.flops / own / 1e6, 3),
        "share_of_copy": quotient(p.bytes / copy / 1e3, own),
        "share_of_same_copy": quotient(us[COPY], own),
        "times_empty": quotient(own, us[EMPTY]),
        "copy_gb_per_s": round(copy, 1),
        **{f"{name}_us": None if t is None else round(t, 3) for name, t in us.items()},
        **{f"{name}_error": float(f"{timed.errors[name]:.3g}") for name in peers if name in timed.errors},
        "notes": "; ".join(f"{name}: {why}" for name, why in (dict(notes) | timed.failed).items()),
        "rounds": len(next(iter(timed.samples.values()), ())),
        "cold": measure.COLD,
        "arch": target.arch,
        "device": target.device,
        "peer_versions": spelled(versions),
        "versions": spelled(provenance.versions()),
        "commit": provenance.commit(),
    }


def _key(cell: Cell) -> tuple[str, str]:
    return cell.problem.op, str(cell.problem)
