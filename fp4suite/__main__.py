"""python -m fp4suite info | kernels | table: what is here, what can run, what was tuned."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, arch, command_line, dispatch, registry, support, table
from .errors import TableError, UnsupportedError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fp4suite", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="versions, device, tables; exit code 1 if something is too old")
    kernels = commands.add_parser("kernels", help="kernels by op and architecture, with the size of their search space")
    show = commands.add_parser("table", help="entries of a tuned table (default: the one this device would use)")
    show.add_argument("path", nargs="?", type=Path, help="a table's JSON file, or an architecture such as sm_90a")
    for command in (info, kernels, show):
        command.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    args = parser.parse_args(argv)
    try:
        return {"info": _info, "kernels": _kernels, "table": _table}[args.command](args)
    except (TableError, UnsupportedError, ValueError) as e:
        print(f"fp4suite: {e}", file=sys.stderr)
        return 1


def _info(args: argparse.Namespace) -> int:
    problems = support.problems()
    in_force: list[tuple[str, Path]] = []
    try:
        in_force = dispatch.tables(_target())
    except TableError as e:
        problems.append(str(e))
    facts: dict[str, Any] = {
        "fp4suite": __version__,
        **support.versions(),
        "device": torch.cuda.get_device_name() if support.gpu() else "cpu",
        "tables": sorted(p.stem for p in table.shipped_dir().glob("*.json")),
        "in_force": [f"{path} ({why})" for why, path in in_force],
        "problems": problems,
    }
    if args.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            if name != "problems":
                print(f"{name:10} {', '.join(value) or '-' if isinstance(value, list) else value}")
        if facts["device"] == "cpu":
            print("no GPU: on the CPU the reference runs, whatever tables say")
        for sentence in problems:
            print(sentence, file=sys.stderr)
    return 1 if problems else 0


def _kernels(args: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for k in registry.kernels():
        module = registry.load(k.name)
        points = 1
        for values in module.SPACE.values():
            points *= len(values)
        rows.append(
            {
                "op": k.op,
                "kernel": k.name,
                "archs": list(k.archs),
                "default": dataclasses.asdict(module.Config()),
                "space": {name: list(values) for name, values in module.SPACE.items()},
                "points": points,
            }
        )
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['op']:18} {row['kernel']:26} {', '.join(row['archs']):16} {row['points']} configs")
        print(f"{'':18} default {_knobs(row['default'])}")
    return 0


def _table(args: argparse.Namespace) -> int:
    path, why = args.path, None
    if path is None:
        why, path = _table_in_force()
    elif str(path) in arch.GPU_ARCHS:
        path = table.shipped_dir() / f"{path}.json"
    t = table.read(path)
    rows: list[dict[str, Any]] = []
    for e in t.entries:
        rows.append({f: getattr(e, f) for f in e.__struct_fields__} | {"stale": table.is_stale(e)})
    if args.json:
        print(json.dumps({"path": str(path), "why": why, "device": t.device, "arch": t.arch, "entries": rows}))
        return 0
    print(f"{path}{f' ({why})' if why else ''}: {t.device} ({t.arch}), {len(rows)} entries")
    for row in rows:
        time = f"{row['median_us']:9.2f} us" if row["measured"] else f"{row['predicted_us'] or 0:9.2f} us predicted"
        dims = " ".join(f"{k}={v}" for k, v in row["problem"].items())
        mark = " batch-invariant" * row["invariant"] + " STALE" * row["stale"]
        print(f"{row['op']:18} {dims:60} {time}  {row['kernel']} {_knobs(row['config'])}{mark}")
    return 0


def _target() -> dispatch.Target:
    """What a program here runs on that takes a GPU where there is one."""
    return dispatch.target_of(support.gpu() or "cpu")


def _table_in_force() -> tuple[str, Path]:
    """The table that is asked first here, and why; without a GPU that of an H100's architecture.

    Raises TableError where there is none.
    """
    here, shipped = _target(), table.shipped_dir()
    found = dispatch.tables(here)
    if found:
        return found[0]
    if here.arch == "cpu":
        return "no GPU here", shipped / "sm_90a.json"
    raise TableError(f"no table of {here.device} or {here.arch} in {shipped}")


def _knobs(config: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


if __name__ == "__main__":
    sys.exit(command_line.run(main))
