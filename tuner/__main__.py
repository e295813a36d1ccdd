"""`python -m tuner tune | bench | report | check`. Each has --help and --json, and exits with 1 on failure."""

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from fp4suite import arch as archs, command_line
from fp4suite.errors import UnsupportedError
from fp4suite.layouts import ORDERS
from fp4suite.problem import ACTS, PROBLEMS, GemmProblem

from . import provenance, worker

EXTRA = ("optuna", "scipy", "pandas", "matplotlib", "tabulate")  # what [tune] brings
MOST_SEED = (1 << 32) - 1  # what NumPy takes, and so Optuna
SHOWN = 24  # rows of a summary; the tables and --json have them all


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(name)s: %(message)s")
    try:
        code, document = args.command(args, argv)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, UnsupportedError, worker.StartFailed, worker.WorkerDied, worker.RemoteError) as e:
        if isinstance(e, BrokenPipeError) and command_line.output_is_closed():
            raise
        document, code = {"error": str(e)}, 1
        print(f"{_parser().prog} {args.name}: {e}", file=sys.stderr)
    except ModuleNotFoundError as e:
        if e.name not in EXTRA:
            raise
        document, code = {"error": f"{e.name} is not installed"}, 1
        print(f"{e.name} is not installed; it comes with: pip install 'fp4suite[tune]'", file=sys.stderr)
    if args.json:
        print(json.dumps(document), flush=True)
    return int(code)


def _tune(args: argparse.Namespace, argv: list[str]) -> tuple[int, dict[str, Any]]:
    from . import targets, tune

    began = time.monotonic()
    for name, default in {"layers_of": None, "tp": 1, "order": None, "act": None, "batch_invariant": None}.items():
        if args.stale and getattr(args, name) != default:
            raise ValueError(f"--stale goes by what the table has, and takes no --{name.replace('_', '-')}")
    if args.devices:
        code = _tune_on_devices(args, argv)
        if code:
            return code, {"error": "a worker failed, see above"}
    chosen = targets.targets(args.arch, args.device)
    measured = any(t.cuda for t in chosen)
    report = tune.run(chosen, _tune_options(args, measured))
    asked = [f" --op {op}" for op in args.op or ()] + [f" --m {','.join(map(str, args.m or ()))}"] * bool(args.m)
    for line in tune.render_stale(report, " with" * bool(asked) + "".join(asked)):
        print(line)
    if report.rows or not args.stale:
        print(tune.render(report, SHOWN))
    if report.rows and not measured:
        print("No GPU here: times are predicted by a cost model, and the tables say so (measured: false).")
    for line in report.unsupported:
        print(f"no kernel: {line}")
    if report.left:
        print(f"{report.left} problems were not reached in the time given; the same command goes on with them")
    for line in report.failed:
        print(f"failed: {line}", file=sys.stderr)
    document = {
        "tables": [str(p) for p in report.tables],
        "measured": measured,
        "problems": len(report.rows),
        "left": report.left,
        "unsupported": report.unsupported,
        "failed": report.failed,
        "seconds": round(time.monotonic() - began, 1),
        "rows": report.rows,
    }
    if args.stale:
        document["stale"] = [tune.stale_document(s) for s in (*report.stale, *report.stale_beside)]
    nothing_to_do = args.stale and not (report.left or report.unsupported)
    if not (report.rows or report.failed or nothing_to_do):
        raise ValueError("nothing was tuned: no problem has a kernel, or the time was too short for any")
    return (1 if report.failed else 0), document


def _tune_on_devices(args: argparse.Namespace, argv: list[str]) -> int:
    """A worker on each of --devices; what they leave is then for the first of them. Returns the worst exit code."""
    from . import tune

    devices = args.devices.split(",")
    rest = [a for i, a in enumerate(argv[1:], 1) if not (a.startswith("--devices") or argv[i - 1] == "--devices")]
    jobs = args.jobs or max(1, _cores() // len(devices) - 1)
    code = tune.run_on_devices(
        [d if ":" in d else f"cuda:{d}" for d in devices],
        [*(a for a in rest if a != "--json"), "--jobs", str(jobs)],
    )
    args.device = devices[0] if ":" in devices[0] else f"cuda:{devices[0]}"
    return code


def _tune_options(args: argparse.Namespace, measured: bool) -> Any:
    """The command line's `tune.Options`."""
    from . import targets, tune

    budget = tune.BUDGETS[args.budget or "normal"]
    if args.trials is not None:
        budget = tune.replace_trials(budget, args.trials)
    results = provenance.results_dir()
    models = args.layers_of or (["pro", "flash"] if not measured else ["pro"])
    return tune.Options(
        configs={} if args.stale else targets.load_configs(models),
        ops=targets.check_ops(args.op),
        m=tuple(args.m or (() if args.stale else budget.m)),
        tp=args.tp,
        budget=budget,
        jobs=args.jobs or max(1, _cores() - measured),
        seed=args.seed,
        deadline=time.monotonic() + (args.seconds if args.seconds is not None else math.inf),
        storage=(args.storage or results / "studies" / "journal.log") if measured else None,
        out=args.out or results / "tables",
        quiet=args.quiet,
        order=args.order,
        act=args.act,
        invariant=_wanted(args.batch_invariant),
        stale=args.stale,
    )


def _bench(args: argparse.Namespace, argv: list[str]) -> tuple[int, dict[str, Any]]:
    from . import bench, targets

    if args.peers is not None:
        return _bench_peers(args)
    chosen = targets.targets(args.arch, args.device)
    ops = targets.check_ops(args.op)
    configs = targets.load_configs(args.layers_of or ["pro"])
    out = args.out or provenance.results_dir() / "bench"
    paths, rows = bench.run(
        chosen,
        configs,
        ops,
        args.m,
        args.tp,
        out,
        rounds=args.rounds,
        seed=args.seed,
        quiet=args.quiet,
        order=args.order,
        act=args.act,
    )
    print(bench.render(rows))
    return 0, {"files": [str(p) for p in paths], "rows": rows}


def _bench_peers(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from . import peers_fusions, targets

    ops = tuple(dict.fromkeys(args.op or ()))
    if ops == (GemmProblem.op,):
        return _bench_gemm_peers(args)
    ops = peers_fusions.OPS if ops == ("fusions",) else ops
    for op in ops or ("nothing",):
        if op not in peers_fusions.OPS:
            known = ", ".join(peers_fusions.OPS)
            raise ValueError(f"--peers takes --op {GemmProblem.op} alone, fusions, or any of {known}; got {op}")
    return _bench_fusion_peers(args, targets.check_ops(ops))


def _bench_gemm_peers(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    from . import bench_peers, peers, peers_plot, peers_rows
    from .side_by_side import OWN

    options = bench_peers.Options(
        m=args.m or bench_peers.DEFAULT_M,
        peers=peers.check_names([] if args.peers == "all" else args.peers.split(",")),
        layers=args.layers.split(",") if args.layers else (),
        order=args.order,
        act=args.act,
        tp=args.tp,
        seconds=args.seconds,
        jobs=args.jobs or _cores(),
        seed=args.seed,
        resume=args.resume,
        quiet=args.quiet,
    )
    out, outcome = _beside(bench_peers, args, options)
    print(peers_rows.render(outcome.rows, outcome.absent))
    plots = peers_plot.draw(peers_rows.load(outcome.path), out.parent / "plots")
    print(f"rows in {outcome.path}, plots: {', '.join(map(str, plots))}")
    return _peers_end(outcome.rows, outcome.absent, outcome.left, [outcome.path, *plots], OWN)


def _bench_fusion_peers(args: argparse.Namespace, ops: Sequence[str]) -> tuple[int, dict[str, Any]]:
    from . import bench_fusions, fusion_rows, peers_fusions
    from .side_by_side import OWN

    for name, given in (("--order", args.order), ("--act", args.act)):
        if given is not None:
            raise ValueError(f"{name} is about {GemmProblem.op}")
    options = bench_fusions.Options(
        ops=ops,
        m=args.m or bench_fusions.DEFAULT_M,
        peers=peers_fusions.check_names([] if args.peers == "all" else args.peers.split(",")),
        layers=args.layers.split(",") if args.layers else (),
        tp=args.tp,
        seconds=args.seconds,
        jobs=args.jobs or _cores(),
        seed=args.seed,
        resume=args.resume,
        quiet=args.quiet,
    )
    _, outcome = _beside(bench_fusions, args, options)
    print(fusion_rows.render(outcome.rows, outcome.absent))
    print(f"rows in {', '.join(map(str, outcome.paths))}")
    return _peers_end(outcome.rows, outcome.absent, outcome.left, outcome.paths, OWN)


def _beside(bench: ModuleType, args: argparse.Namespace, options: Any) -> tuple[Path, Any]:
    """What a run of a side-by-side benchmark did, and the folder of its rows."""
    from . import targets

    (target,) = targets.targets(args.arch or "sm_90a", args.device)
    out = args.out or provenance.results_dir() / "bench"
    outcome = bench.run(target, targets.load_configs(args.layers_of or ["pro", "flash"]), out, options)
    if not outcome.rows:
        raise ValueError("nothing was timed: no cell of these layers has a kernel here, or the time was too short")
    return out, outcome


def _peers_end(
    rows: Sequence[dict[str, Any]], absent: dict[str, str], left: int, files: Sequence[Path], own: str
) -> tuple[int, dict[str, Any]]:
    """Says what is missing; exit code 1 where ours has no time."""
    if left:
        print(f"{left} cells were not reached in the time given; with --resume the same command goes on")
    failed = [r for r in rows if r[f"{own}_us"] is None]
    for r in failed:
        print(f"ours failed: {r['op']}, {r['problem']}", file=sys.stderr)
    document = {"files": [str(p) for p in files], "absent": absent, "left": left, "rows": rows}
    return (1 if failed else 0), document


def _report(args: argparse.Namespace, argv: list[str]) -> tuple[int, dict[str, Any]]:
    from . import report

    results = args.results or provenance.results_dir()
    text, plots = report.write(results / "bench", results / "plots")
    print(text)
    return 0, {"plots": [str(p) for p in plots]}


def _check(args: argparse.Namespace, argv: list[str]) -> tuple[int, dict[str, Any]]:
    from . import check

    where = args.tables or provenance.results_dir() / "tables"
    found = check.run(where, device=args.device, stale_is_wrong=not args.allow_stale)
    for line in found.problems:
        print(f"wrong: {line}", file=sys.stderr)
    for line in (*found.notes, *(found.stale if args.verbose else ())):
        print(line)
    print(f"{found.tables} tables, {found.entries} entries, {found.ran} run on the GPU, {len(found.problems)} wrong")
    return (1 if found.problems else 0), found.document()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tuner", description="Tune and benchmark fp4suite's kernels.")
    commands = parser.add_subparsers(dest="name", required=True)

    def command(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function)
        sub.add_argument("--json", action="store_true", help="print one JSON document as the last line")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")
        sub.add_argument("--verbose", action="store_true", help="why each candidate was rejected, each stale entry")
        return sub

    def where(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--layers-of",
            nargs="+",
            metavar="MODEL",
            help="pro, flash, demo, tiny, a config.json, or a checkpoint's folder",
        )
        sub.add_argument("--m", type=_ints, metavar="1,16,...", help="numbers of tokens")
        sub.add_argument("--tp", type=_positive, default=1, help="tensor parallel ranks (default 1)")
        sub.add_argument("--order", choices=ORDERS, help="of a GEMM's weights (default: as a loader lays them out)")
        sub.add_argument("--act", choices=ACTS, help="of a GEMM's activations (default: what the architecture runs)")
        sub.add_argument("--arch", choices=archs.GPU_ARCHS, help="one architecture; predicted unless its GPU is here")
        sub.add_argument("--device", metavar="cuda:N", help="the GPU to measure on (default cuda:0 if there is one)")
        sub.add_argument("--seed", type=_seed, default=0)

    tune = command("tune", _tune, "Search the kernels' configs for a model's layer shapes and write tuned tables.")
    where(tune)
    tune.add_argument(
        "--op", action="append", metavar="NAME", help=f"all (default), or one of {', '.join(PROBLEMS)}; may be repeated"
    )
    tune.add_argument(
        "--stale",
        action="store_true",
        help="in place of a model's layers, what the table has entries of whose kernel has changed since",
    )
    tune.add_argument("--budget", choices=("small", "normal", "large"), help="default: normal")
    tune.add_argument("--trials", type=_positive, help="candidates a problem, instead of the budget's")
    tune.add_argument("--seconds", type=command_line.seconds, help="stop after this long (a later run goes on)")
    tune.add_argument("--jobs", type=_positive, help="compiling processes (default: the cores, less one on a GPU)")
    tune.add_argument("--devices", metavar="0,1,...", help="several GPUs of this host, one worker each")
    tune.add_argument(
        "--batch-invariant",
        nargs="*",
        metavar="best|KNOB=VALUE",
        help="entries for batch-invariant mode: all m of a weight sum in the order that is in force, "
        "in the one that loses least over all m (best), or as a config with these knobs does, say split=2",
    )
    tune.add_argument("--storage", help="where trials are kept: a journal file, an RDB URL or grpc://host:port")
    tune.add_argument("--out", type=Path, help="folder for tables, or one .json (default results/tables)")

    bench = command("bench", _bench, "Time the kernels on a model's layer shapes and write rows of results.")
    where(bench)
    bench.add_argument(
        "--op", action="append", metavar="NAME", help="an op, or all (default); with --peers, fusions too"
    )
    bench.add_argument("--rounds", type=_positive, default=30, help="timings a row (default 30)")
    bench.add_argument("--out", type=Path, help="folder for rows (default results/bench)")
    beside = bench.add_argument_group("peers", f"{GemmProblem.op}, or fusions, against other libraries, on a GPU")
    beside.add_argument(
        "--peers",
        nargs="?",
        const="all",
        metavar="NAME,...",
        help="all that are installed, or these (names, or modules such as vllm)",
    )
    beside.add_argument("--layers", metavar="NAME,...", help="only shapes of these layers: q_b, pro.o_b (default all)")
    beside.add_argument("--seconds", type=command_line.seconds, default=420.0, help="time for the run (default 420)")
    beside.add_argument("--jobs", type=_positive, help="processes that compile ahead (default: the cores)")
    beside.add_argument("--resume", action="store_true", help="keep the cells that this commit has already timed")

    report = command("report", _report, "Tables and plots from the rows of earlier benchmarks.")
    report.add_argument("--results", type=Path, help="folder with bench/ (default results)")

    check = command("check", _check, "Validate tuned tables; on their GPU, run every entry against the reference.")
    check.add_argument("--tables", type=Path, help="a table, or a folder of them (default results/tables)")
    check.add_argument("--device", metavar="cuda:N", help="default cuda:0 if there is one")
    check.add_argument("--allow-stale", action="store_true", help="do not mind entries of older kernel sources")
    return parser


def _ints(text: str) -> list[int]:
    try:
        found = [int(x) for x in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"wanted integers separated by commas, got {text!r}") from None
    if any(x < 1 for x in found):
        raise argparse.ArgumentTypeError(f"must be positive, got {text!r}")
    return sorted(set(found))


def _wanted(words: list[str] | None) -> Any:
    """How all m are to sum, as `agreement.Wanted`. Raises ValueError for what is no knob and its value."""
    if words in (None, []):
        return None if words is None else "in force"
    if words == ["best"]:
        return "best"
    knobs = [word.partition("=") for word in words or ()]
    for (name, _, value), word in zip(knobs, words or (), strict=True):
        if not name.isidentifier() or not value.isdecimal():
            raise ValueError(f'--batch-invariant takes "best", or knobs and numbers such as split=2, got {word!r}')
    return {name: int(value) for name, _, value in knobs}


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MOST_SEED:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to {MOST_SEED}, got {text!r}")
    return int(text)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(command_line.run(main))
