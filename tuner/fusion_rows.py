"""Rows of `bench --peers` for fusions, a cell each: stored an op a file, printed, and judged by the goals.

ratio = median of the fastest peer that is right / median of ours
share_of_copy = time of the problem's bytes at the speed of a long copy / median of ours
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from fp4suite.problem import IndexLogitsProblem, IndexTopkProblem

from . import bench, peers_fusions, peers_rows
from .bench import Row
from .fusion_cells import COPY
from .side_by_side import EMPTY, OWN

ROOFS = (COPY, EMPTY)
MANY, COPY_GOAL = 4096, 0.85  # tokens from which a share of the copy's speed is the goal
SCORES_GOAL, BOTH_GOAL = 0.9, 1.3  # of index scores over their peer, of scores and top-k together
FEW, PEER_GOAL, EMPTY_GOAL = 64, 1.0, 1.3  # tokens up to which peers and the empty kernel are the goals
SMALL = EMPTY_GOAL - 1  # of an empty kernel: bytes that take longer at a copy's speed cannot reach its goal


REFUSED = "not for this: "  # begins a note about what a peer was not made for
EXPECTED = (REFUSED, "not installed", "not asked for")  # how notes begin that are about no failure


def stem(op: str) -> str:
    """Of the file that rows of an op go to."""
    return f"{op}{peers_rows.SUFFIX}"


def columns(op: str) -> tuple[str, ...]:
    """Of a row: a cell with all of its contenders, so that ratios can be checked from it alone."""
    peers = [p.name for p in peers_fusions.of(op)]
    timed = (OWN, *peers, *ROOFS)
    return (
        "op",
        "problem",
        "layers",
        "m",
        "bytes",
        "flops",
        "kernel",
        "config",
        "reason",
        "best_peer",
        "ratio",
        "gb_per_s",
        "tflop_per_s",
        "share_of_copy",
        "share_of_same_copy",  # the time of a copy of as many bytes, cold in the same rounds, over ours
        "times_empty",
        "copy_gb_per_s",
        *(f"{name}_us" for name in timed),
        *(f"{name}_{p}_us" for name in timed for p in ("p20", "p80")),
        *(f"{name}_error" for name in peers),  # 1 is the tolerance
        "notes",  # why a contender has no time
        "rounds",
        "cold",
        "arch",
        "device",
        "peer_versions",
        "versions",
        "commit",
        "run",  # its beginning, UTC
    )


def store(path: Path, row: Row) -> None:
    """Put a row into its op's file: replaced at once, one row a problem."""
    op = row["op"]
    kept: dict[str, Row] = {}
    if path.exists():
        kept = {r["problem"]: dict(r) for r in peers_rows.read(path, columns(op))}
    kept[str(row["problem"])] = row
    ordered = sorted(kept.values(), key=lambda r: (r["layers"], r["problem"].partition(" ")[2], int(r["m"])))
    bench.write_csv(path, columns(op), ordered)


def load(path: Path, op: str) -> list[Row]:
    """Rows with their numbers. Raises ValueError if the columns are not those of today."""
    return [peers_rows.typed(row) for row in peers_rows.read(path, columns(op))]


def op_of(path: Path) -> str | None:
    """The fusion whose rows a file has, or None."""
    op = path.stem.removesuffix(peers_rows.SUFFIX)
    return op if path.stem == stem(op) and op in peers_fusions.OPS else None


def best_peer(op: str, us: Mapping[str, float | None]) -> str | None:
    """The fastest of those that were timed and do all of it; if none does, of those that do a part."""
    timed = [(op in p.part_of, t, p.name) for p in peers_fusions.of(op) if (t := us.get(p.name)) is not None]
    return min(timed)[2] if timed else None


def render(rows: Sequence[Row], absent: Mapping[str, str]) -> str:
    """Cells op by op, what peers do, which have no time and why, and the goals."""
    from tabulate import tabulate

    text = []
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op]
        peers = peers_fusions.of(op)
        shown = [p.name for p in peers if any(r[f"{p.name}_us"] is not None or p.name in _failed(r) for r in mine)]
        heads = [op, "m", OWN, *shown, *ROOFS, "ratio", "of copy", "of same copy", "x empty"]
        lines = [
            [
                _rest(r),
                r["m"],
                *(
                    peers_rows.microseconds(r[f"{name}_us"], name in _failed(r))
                    for name in (OWN, *shown, *ROOFS)
                ),
                "-" if r["ratio"] is None else f"{r['ratio']:.2f}x",
                *("-" if r[n] is None else f"{100 * r[n]:.0f} %" for n in ("share_of_copy", "share_of_same_copy")),
                "-" if r["times_empty"] is None else f"{r['times_empty']:.2f}",
            ]
            for r in mine
        ]  # fmt: skip
        align = ("left", *("right",) * (len(heads) - 1))
        text.append(tabulate(lines, headers=heads, disable_numparse=True, colalign=align))
        told = [f"{p.name}: {p.note}; right within {p.tolerance}" for p in peers if p.name in shown]
        told += [f"no time of {name}: {why}" for name, why in absent.items() if name in {p.name for p in peers}]
        notes = (note for r in mine for note in peers_rows.notes(r))
        told += dict.fromkeys(f"no time of {note}" for note in notes if note.partition(": ")[0] not in absent)
        if op in peers_fusions.WITHOUT:
            told.append(f"no library: {peers_fusions.WITHOUT[op]}")
        text.append("\n".join(told))
    text += ["microseconds, medians", summary(rows)]
    return "\n\n".join(part for part in text if part)


def summary(rows: Sequence[Row]) -> str:
    """The goals op by op: how many cells, the worst of them, where it is, how many miss."""
    from tabulate import tabulate

    lines: list[list[object]] = []
    for op in dict.fromkeys(r["op"] for r in rows):
        mine = [r for r in rows if r["op"] == op]
        many, few = [r for r in mine if r["m"] >= MANY], [r for r in mine if r["m"] <= FEW]
        if op == IndexLogitsProblem.op:
            lines.append(_judged(f"{op}: ratio, m >= {MANY}", many, "ratio", SCORES_GOAL))
        else:
            lines.append(_judged(f"{op}: share of the copy, m >= {MANY}", many, "share_of_copy", COPY_GOAL))
        lines.append(_judged(f"{op}: ratio, m <= {FEW}", few, "ratio", PEER_GOAL))
        small = [r for r in few if _is_small(r)]
        lines.append(_judged(f"{op}: times empty, m <= {FEW}, small", small, "times_empty", EMPTY_GOAL, least=False))
    both = together(rows)
    lines.append(_judged("index scores and top-k: ratio", both, "ratio", BOTH_GOAL))
    heads = ["", "cells", "worst", "goal", "at", "missed", "not known"]
    return tabulate([line for line in lines if line], headers=heads, disable_numparse=True)


def together(rows: Sequence[Row]) -> list[Row]:
    """Scores and top-k of the same queries and entries, one after the other: the best peers' sum over ours."""
    scores = {
        (r["m"], _dim(r, "entries")): r for r in rows if r["op"] == IndexLogitsProblem.op and _dim(r, "format") == "fp8"
    }
    found = []
    for r in rows:
        first = scores.get((r["m"], _dim(r, "entries"))) if r["op"] == IndexTopkProblem.op else None
        if first is not None:
            own = (first[f"{OWN}_us"], r[f"{OWN}_us"])
            peers = tuple(x[f"{x['best_peer']}_us"] if x["best_peer"] else None for x in (first, r))
            known = None not in own + peers
            ratio = math.fsum(p or 0 for p in peers) / math.fsum(t or 0 for t in own) if known else None
            found.append({"m": r["m"], "problem": r["problem"], "ratio": ratio})
    return found


def _is_small(row: Row) -> bool:
    """Whether a copy of its bytes would leave room under the goal for an empty kernel's time."""
    empty = row[f"{EMPTY}_us"]
    return empty is not None and row["bytes"] / row["copy_gb_per_s"] / 1e3 <= SMALL * empty


def _judged(what: str, rows: Sequence[Row], name: str, goal: float, *, least: bool = True) -> list[object]:
    """Nothing where there are no cells; `least`: whether less than the goal misses it."""
    if not rows:
        return []
    known = [r for r in rows if r[name] is not None]
    if not known:
        return [what, 0, "-", f"{goal:.2f}", "", "", len(rows)]
    worst = (min if least else max)(known, key=lambda r: r[name])
    missed = sum(r[name] < goal if least else r[name] > goal for r in known)
    return [
        what,
        len(known),
        f"{worst[name]:.3f}",
        f"{goal:.2f}",
        _rest(worst, m=True),
        missed,
        len(rows) - len(known) or "",
    ]


def _dim(row: Row, name: str) -> str:
    return dict(part.split("=", 1) for part in str(row["problem"]).split())[name]


def _rest(row: Row, m: bool = False) -> str:
    """A problem without what all of an op's have, and without m unless asked."""
    dims = dict(part.split("=", 1) for part in str(row["problem"]).split())
    kept = {
        k: v for k, v in dims.items() if k not in ("m", "x", "rule", "sf_layout", "page_size", "rope_dim", "weight")
    }
    return " ".join(f"{k}={v}" for k, v in (({"m": dims["m"]} if m else {}) | kept).items())


def _failed(row: Row) -> set[str]:
    """Contenders that should have had a time."""
    parts = (note.partition(": ") for note in peers_rows.notes(row))
    return {name for name, _, why in parts if not why.startswith(EXPECTED)}
