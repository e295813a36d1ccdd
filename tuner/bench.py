"""`bench`: rows of results, one a problem, each readable on its own.

What is timed is what dispatch chooses: the tuned entry, or the default. Measured rows go to bench/<device>/<op>.csv,
predicted ones to bench/predicted/<arch>/<op>.csv, so that no tool takes one for the other; `measured` says so again.
A row replaces the earlier row of the same problem.
"""

import csv
import io
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fp4suite import dispatch
from fp4suite.errors import UnsupportedError
from fp4suite.layouts import Order
from fp4suite.problem import Act, GemmProblem, IndexLogitsProblem, Problem

from . import baselines, cost_model, measure, provenance, stats
from .targets import Target, problems

DEFAULT_M = (1, 16, 64, 256, 2048, 8192)
KEY = ("op", "problem")
COLUMNS = (
    "op",
    "problem",
    "layers",
    "calls",  # in one forward pass
    "kernel",
    "config",
    "reason",
    "arch",
    "device",
    "measured",
    "median_us",
    "p20_us",
    "p80_us",
    "tflop_per_s",
    "gb_per_s",
    "roof",  # what limits: "read", "copy" or "mma", with its rate
    "share_of_roof",
    "cold",  # how operands stay out of L2: "flushed", in older rows also "rotated"
    "baseline",
    "baseline_us",
    "versions",
    "commit",
    "date",
)

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Roofs:
    """What the device gave in this run: GB/s of reading and copying, TFLOP/s of cuBLAS in BF16."""

    read: float
    copy: float
    mma: float

    def of(self, problem: Problem) -> tuple[str, float]:
        """The roof's name with its rate, and the microseconds it allows."""
        kind, rate = ("read", self.read) if isinstance(problem, GemmProblem) else ("copy", self.copy)
        memory_us = problem.bytes / rate / 1e3
        if isinstance(problem, GemmProblem | IndexLogitsProblem):
            fp8 = (problem.act if isinstance(problem, GemmProblem) else problem.x) == "fp8"
            mma = self.mma * (2 if fp8 else 1)  # FP8 tensor cores are twice as fast as those for BF16
            if (mma_us := problem.flops / mma / 1e6) > memory_us:
                return f"mma {mma:.0f} TFLOP/s", mma_us
        return f"{kind} {rate:.0f} GB/s", memory_us


def run(
    targets: Sequence[Target],
    configs: Mapping[str, Mapping[str, Any]],
    ops: Sequence[str],
    m: Sequence[int] | None,
    tp: int,
    out: Path,
    *,
    rounds: int,
    seed: int,
    quiet: bool,
    order: Order | None = None,
    act: Act | None = None,
) -> tuple[list[Path], list[Row]]:
    """Time (or predict) every problem on every target; returns the files written and the new rows."""
    paths: list[Path] = []
    rows: list[Row] = []
    for target in targets:
        roofs = _roofs(target)
        for op in ops:
            found = problems(configs, op, target, m or DEFAULT_M, tp, order, act)
            mine = []
            bar = tqdm(found.items(), desc=f"{target.device} {op}", unit="row", disable=quiet or None)
            for problem, (layers, calls) in bar:
                try:
                    choice = dispatch.choose_for(op, problem, dispatch.Target(target.arch, target.device))
                except UnsupportedError:
                    continue  # `tune` lists these; a benchmark of nothing is no row
                row = (
                    _measured(target, problem, choice, roofs, rounds, seed)
                    if target.cuda
                    else _predicted(target, problem, choice)
                )
                mine.append({**row, "layers": " ".join(layers), "calls": calls})
            folder = out / target.device if target.cuda else out / "predicted" / target.arch
            if mine:
                paths.append(folder / f"{op}.csv")
                store(paths[-1], mine)
            rows += mine
    if not rows:
        raise ValueError("nothing to benchmark: no problem of these ops has a kernel here")
    return paths, rows


def render(rows: Sequence[Row]) -> str:
    """Rows as a table for the screen."""
    from tabulate import tabulate

    shown = []
    for r in rows:
        gain = f"{r['baseline_us'] / r['median_us']:.2f}x {r['baseline']}" if r["baseline_us"] else "-"
        mark = "" if r["measured"] else " (predicted)"
        shown.append(
            [
                r["op"],
                r["problem"],
                r["arch"],
                f"{r['median_us']:.1f}{mark}",
                f"{100 * r['share_of_roof']:.0f} %",
                r["roof"],
                gain,
            ]
        )
    return tabulate(
        shown, headers=["op", "problem", "arch", "us", "of roof", "roof", "baseline"], disable_numparse=True
    )


def store(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a CSV file: replaced at once, one row a problem, sorted."""
    kept = {tuple(r[k] for k in KEY): r for r in load(path)} if path.exists() else {}
    for row in rows:
        kept[tuple(str(row[k]) for k in KEY)] = row
    write_csv(path, COLUMNS, [row for _, row in sorted(kept.items())])


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a CSV file at once."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({c: row[c] for c in columns})
    replace_file(path, text.getvalue().encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write aside, then rename, so that nobody finds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, aside = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(fd, "wb") as f:
        f.write(content)
    os.chmod(aside, 0o644)
    os.replace(aside, path)


def load(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file as text. Raises ValueError if its columns are not those of today."""
    with path.open(newline="") as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(
                f"{path}: columns {reader.fieldnames}, wanted {list(COLUMNS)}; remove the file and benchmark again"
            )
        return list(reader)


def _roofs(target: Target) -> Roofs:
    if target.cuda is not None:
        return Roofs(
            read=measure.read_bandwidth(target.cuda),
            copy=measure.copy_bandwidth(target.cuda),
            mma=measure.matmul_tflops(target.cuda),
        )
    machine = cost_model.MACHINES[target.arch]
    return Roofs(read=machine.dram, copy=machine.dram, mma=machine.mma_tflops["nvfp4"])


def _measured(target: Target, problem: Problem, choice: dispatch.Choice, roofs: Roofs, rounds: int, seed: int) -> Row:
    assert target.cuda is not None
    bench = measure.Bench(problem, target.cuda, seed)
    record = bench.record if choice.problem == problem else bench.record_decoded
    timed = [
        record(choice.kernel, choice.config),
        bench.record_baseline(),
    ]
    times = bench.rounds(timed, rounds)
    own, other = stats.summary(times[:, 0]), stats.summary(times[:, 1])
    return {
        **_row(target, problem, choice, own, roofs),
        "cold": measure.COLD,
        "baseline": baselines.name(problem),
        "baseline_us": round(other.median_us, 3),
    }


def _predicted(target: Target, problem: Problem, choice: dispatch.Choice) -> Row:
    if choice.problem is not None and choice.problem != problem:
        raise ValueError(
            f"{problem.op} ({problem}) is {choice.reason}: there is no model of both; on a GPU it is measured"
        )
    us = cost_model.predict_us(problem, choice.config, target.arch)
    return {
        **_row(target, problem, choice, stats.Summary(us, us, us), _roofs(target)),
        "p20_us": "",
        "p80_us": "",
        "cold": "",
        "baseline": "",
        "baseline_us": "",
    }


def _row(target: Target, problem: Problem, choice: dispatch.Choice, time: stats.Summary, roofs: Roofs) -> Row:
    roof, roof_us = roofs.of(problem)
    knobs = {name: getattr(choice.config, name) for name in choice.config.__dataclass_fields__}
    return {
        "op": problem.op,
        "problem": str(problem),
        "kernel": choice.kernel,
        "config": " ".join(f"{k}={v}" for k, v in knobs.items()),
        "reason": choice.reason,
        "arch": target.arch,
        "device": target.device,
        "measured": target.cuda is not None,
        "median_us": round(time.median_us, 3),
        "p20_us": round(time.p20_us, 3),
        "p80_us": round(time.p80_us, 3),
        "tflop_per_s": round(problem.flops / time.median_us / 1e6, 3),
        "gb_per_s": round(problem.bytes / time.median_us / 1e3, 1),
        "roof": roof,
        "share_of_roof": round(roof_us / time.median_us, 6),
        "versions": " ".join(f"{k}={v}" for k, v in provenance.versions().items()),
        "commit": provenance.commit(),
        "date": provenance.today(),
    }
