"""Rows of `bench --peers`, a cell each: stored, printed, and judged by groups of m against their goals."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fp4suite.problem import GemmProblem

from . import bench
from .bench import Row
from .bench_cells import FP8, READ
from .peers import PEERS
from .side_by_side import EMPTY, OWN

ROOFS = (READ, EMPTY, FP8)
READ_BYTES, READ_M, READ_GOAL = 24_000_000, 16, 0.88  # where the bare read is the goal, and what share of its speed
SUFFIX = "-peers"  # of the file's stem


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that are judged together: m from `first` to `last`; goals of the ratio's geometric mean and minimum."""

    first: int
    last: int
    mean: float
    least: float

    def __str__(self) -> str:
        return f"m = {self.first}..{self.last}"


GROUPS: tuple[Group, ...] = (Group(1, 64, 1.2, 1.0), Group(65, 512, 1.1, 0.97), Group(513, 16384, 1.0, 0.95))


FP8_GROUPS = (Group(129, 512, 1.2, 1.0), Group(513, 16384, 1.4, 1.0))  # of act="fp8"


def stem(act: str | None) -> str:
    """Of the file that rows of a run go to, and of its plots."""
    return f"{GemmProblem.op}{'-fp8' if act == 'fp8' else ''}{SUFFIX}"


def is_fp8(rows: Sequence[Row]) -> bool:
    return any("act=fp8" in r.get("problem", "") for r in rows)


def columns() -> tuple[str, ...]:
    """Of a row: a cell with all of its contenders, so that ratios can be checked from it alone."""
    timed = (OWN, *PEERS, *ROOFS)
    return (
        "op",
        "problem",
        "layers",
        "m",
        "n",
        "k",
        "packed_bytes",
        "kernel",
        "config",
        "reason",
        "best_peer",
        "ratio",
        "share_of_read",
        *(f"{name}_us" for name in timed),
        *(f"{name}_{p}_us" for name in timed for p in ("p20", "p80")),
        *(f"{name}_error" for name in (OWN, *PEERS)),
        "notes",  # why a contender has no time
        "rounds",
        "cold",
        "roof",
        "share_of_roof",
        "arch",
        "device",
        "peer_versions",
        "versions",
        "commit",
        "run",  # its beginning, UTC
    )


def store(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into the file: replaced at once, one row a problem."""
    kept = {row["problem"]: row for row in read(path)} if path.exists() else {}
    kept |= {str(row["problem"]): row for row in rows}
    ordered = sorted(kept.values(), key=lambda r: (-int(r["n"]) * int(r["k"]), r["layers"], int(r["m"])))
    bench.write_csv(path, columns(), ordered)


def load(path: Path) -> list[Row]:
    """Rows with their numbers. Raises ValueError if the columns are not those of today."""
    return [typed(row) for row in read(path)]


def read(path: Path, wanted: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Rows as text. Raises ValueError if the columns are not those of today: `wanted`, or the GEMM's."""
    with path.open(newline="") as f:
        reader = csv.DictReader(f)
        if tuple(reader.fieldnames or ()) != tuple(wanted or columns()):
            raise ValueError(f"{path}: columns are not those of this version; remove the file and benchmark again")
        return list(reader)


WHOLE = ("m", "n", "k", "packed_bytes", "bytes", "flops", "rounds")  # columns of integers
PARTS = ("ratio", "times_empty")  # of numbers, beside shares, rates, times and errors


def typed(row: Mapping[str, str]) -> Row:
    """A row that was read, with its numbers."""
    out: Row = dict(row)
    for name, text in row.items():
        if name in WHOLE:
            out[name] = int(text)
        elif name in PARTS or name.startswith("share_of_") or name.endswith(("_us", "_error", "_per_s")):
            out[name] = float(text) if text else None
    return out


def best_peer(us: Mapping[str, float | None]) -> str | None:
    """The fastest of those that were timed."""
    timed = {name: t for name in PEERS if (t := us.get(name)) is not None}
    return min(timed, key=lambda name: timed[name]) if timed else None


def render(rows: Sequence[Row], absent: Mapping[str, str]) -> str:
    """All cells, what has no time and why, and the groups with their goals."""
    from tabulate import tabulate

    lines, reasons = [], dict.fromkeys(f"{name}: {why}" for name, why in absent.items())
    for r in rows:
        failed = {name for note in notes(r) if (name := note.partition(": ")[0]) not in absent}
        reasons |= dict.fromkeys(note for note in notes(r) if note.partition(": ")[0] in failed)
        lines.append(
            [
                short(r["layers"]),
                f"{r['n']} x {r['k']}",
                f"{r['packed_bytes'] / 1e6:.1f}",
                r["m"],
                *(microseconds(r[f"{name}_us"], name in failed) for name in (OWN, *PEERS)),
                r["best_peer"] or "-",
                "-" if r["ratio"] is None else f"{r['ratio']:.2f}x",
                *(microseconds(r[f"{name}_us"], name in failed) for name in (READ, FP8)),
                "-" if r["share_of_read"] is None else f"{100 * r['share_of_read']:.0f} %",
                "-" if r["share_of_roof"] is None else f"{100 * r['share_of_roof']:.0f} %",
            ]
        )
    heads = ["layer", "n x k", "MB", "m", OWN, *PEERS, "best peer", "ratio", READ, FP8, "of read", "of roof"]
    text = [tabulate(lines, headers=heads, disable_numparse=True, colalign=("left", *("right",) * (len(heads) - 1)))]
    empty = [r[f"{EMPTY}_us"] for r in rows if r[f"{EMPTY}_us"] is not None]
    if empty:
        text.append(f"microseconds, medians; an empty kernel takes {sorted(empty)[len(empty) // 2]:.2f}")
    text += [f"no time of {reason}" for reason in reasons]
    text.append(summary(rows))
    return "\n\n".join(text)


def summary(rows: Sequence[Row]) -> str:
    """Ratio by groups of m: geometric mean, minimum, where it is, cells under the goal; then the share of the read."""
    from tabulate import tabulate

    lines: list[list[object]] = []
    for g in FP8_GROUPS if is_fp8(rows) else GROUPS:
        mine = [r for r in rows if g.first <= r["m"] <= g.last]
        known = [r for r in mine if r["ratio"] is not None]
        if not mine:
            continue
        lines.append(
            [
                f"ratio, {g}",
                len(known),
                *_judged(known, "ratio", g.mean, g.least, "x"),
                len(mine) - len(known) or "",
            ]
        )
    reads = [r for r in rows if r["m"] <= READ_M and r["packed_bytes"] >= READ_BYTES]
    known = [r for r in reads if r["share_of_read"] is not None]
    if reads:
        what = f"share of the bare read, {READ_BYTES / 1e6:.0f} MB and more, m <= {READ_M}"
        judged = _judged(known, "share_of_read", None, READ_GOAL, "")
        lines.append([what, len(known), *judged, len(reads) - len(known) or ""])
    heads = ["", "cells", "geometric mean", "goal", "minimum", "goal", "at", "under the goal", "no ratio"]
    return tabulate(lines, headers=heads, disable_numparse=True)


def _judged(rows: Sequence[Row], name: str, mean: float | None, least: float, unit: str) -> list[str]:
    """Mean, its goal, minimum, its goal, where the minimum is, how many are under it."""
    if not rows:
        return ["-", "", "-", "", "", ""]
    worst = min(rows, key=lambda r: r[name])
    under = sum(r[name] < least for r in rows)
    return [
        f"{geometric_mean(r[name] for r in rows):.3f}{unit}",
        f"{mean:.2f}{unit}" if mean is not None else "",
        f"{worst[name]:.3f}{unit}",
        f"{least:.2f}{unit}",
        f"{short(worst['layers'])} m={worst['m']}",
        str(under),
    ]


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def notes(row: Row) -> list[str]:
    return [note for note in row["notes"].split("; ") if note]


def short(layers: str) -> str:
    first, *rest = layers.split()
    return f"{first} +{len(rest)}" if rest else first


def microseconds(value: float | None, failed: bool) -> str:
    if value is None:
        return "failed" if failed else "-"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
