"""python -m fp4suite info | kernels | table: what is here, what can run, what was tuned."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from . import __version__, arch, registry, support, table
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
    facts: dict[str, Any] = {
        "fp4suite": __version__,
        **support.versions(),
        "device": torch.cuda.get_device_name() if support.gpu() else "cpu",
        "tables": sorted(p.stem for p in table.shipped_dir().glob("*.json")),
        "problems": problems,
    }
    if args.json:
        print(json.dumps(facts))
    else:
        for name, value in facts.items():
            if name != "problems":
                print(f"{name:10} {', '.join(value) or '-' if isinstance(value, list) else value}")
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
    path = args.path
    if path is None:
        own = table.shipped_dir() / f"{arch.device_name('cuda') if support.gpu() else 'sm_90a'}.json"
        path = own if own.exists() else table.shipped_dir() / f"{arch.current()}.json"
    elif str(path) in arch.GPU_ARCHS:
        path = table.shipped_dir() / f"{path}.json"
    t = table.read(path)
    rows: list[dict[str, Any]] = []
    for e in t.entries:
        stale = not _known(e.kernel) or e.source_hash != registry.source_hash(e.kernel)
        rows.append({f: getattr(e, f) for f in e.__struct_fields__} | {"stale": stale})
    if args.json:
        print(json.dumps({"path": str(path), "device": t.device, "arch": t.arch, "entries": rows}))
        return 0
    print(f"{path}: {t.device} ({t.arch}), {len(rows)} entries")
    for row in rows:
        time = f"{row['median_us']:9.2f} us" if row["measured"] else f"{row['predicted_us'] or 0:9.2f} us predicted"
        dims = " ".join(f"{k}={v}" for k, v in row["problem"].items())
        mark = " batch-invariant" * row["invariant"] + " STALE" * row["stale"]
        print(f"{row['op']:18} {dims:60} {time}  {row['kernel']} {_knobs(row['config'])}{mark}")
    return 0


def _knobs(config: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in config.items())


def _known(kernel: str) -> bool:
    return any(k.name == kernel for k in registry.KERNELS)


if __name__ == "__main__":
    sys.exit(main())
