"""`tune`: search every problem of a model's layers, and put the winners into tables.

On a GPU: search, then final rounds among the fastest (fresh samples, signed-rank test against the default), then the
regret of running a bucket's config in the next bucket. An entry goes into the table as soon as its problem is finished.
Candidates are compiled in a pool of processes, ahead of the one that times them.
Without one, for each architecture: compile, drop what does not fit, rank by the cost model; entries go into the table
when all is compiled, the time is over or the run is interrupted. Trials lie in the study and builds in the cache, so
that an interrupted run loses nothing.
"""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from typing import Any

import msgspec
from tabulate import tabulate
from tqdm import tqdm

from fp4suite import registry, table
from fp4suite.built import Resources
from fp4suite.layouts import Order
from fp4suite.problem import Act, GemmProblem, Problem
from fp4suite.table import Entry

from . import agreement, builds, cost_model, provenance, space, stats, worker
from .builds import Build
from .evaluate import DefaultFailed, Measured, Predicted, build_of
from .rejection import Rejected
from .search import Search, Task, open_storage
from .space import Candidate, Space
from .targets import Stale, Target, problems, stale, stale_beside

log = logging.getLogger(__name__)

IN_HAND = 8  # candidates of a problem that are compiled or timed at once: the sampler proposes more without results
STARTUP_S = 20.0  # what the first problem may take longer
PATIENCE_S = 30.0  # with what nothing is compiled of yet, a problem or an architecture, should that be beyond its time
OWN_WINNERS, NEAR_WINNERS = 3, 2  # of a problem at several m, and of the nearest others, that are tried again
PREDICTED_MARGIN = 0.05  # a model's opinion has to promise this much before it moves a default


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What to spend on a problem.

    trials: candidates to time on a GPU. builds: candidates to compile without one. rounds: timings of a candidate while
    searching; final_rounds: of each of the `finalists`. m: numbers of tokens.
    """

    trials: int
    builds: int
    rounds: int
    final_rounds: int
    finalists: int
    m: tuple[int, ...]


BUDGETS = {
    "small": Budget(trials=12, builds=4, rounds=7, final_rounds=20, finalists=3, m=(1, 64, 2048)),
    "normal": Budget(trials=48, builds=12, rounds=11, final_rounds=40, finalists=6, m=(1, 16, 64, 256, 2048, 8192)),
    "large": Budget(
        trials=1000,
        builds=space.MAX_CANDIDATES,
        rounds=15,
        final_rounds=60,
        finalists=8,
        m=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to tune and how long. deadline is of time.monotonic."""

    configs: dict[str, Mapping[str, Any]]
    ops: tuple[str, ...]
    m: tuple[int, ...]
    tp: int
    budget: Budget
    jobs: int
    seed: int
    deadline: float
    storage: str | Path | None
    out: Path
    quiet: bool = False
    order: Order | None = None  # of a GEMM's weights; None: as a loader lays them out
    act: Act | None = None  # of a GEMM's activations; None: what the architecture runs
    invariant: agreement.Wanted | None = None  # for batch-invariant mode: how all m of a weight are to sum
    stale: bool = False  # what the table has of kernels that have changed since, in place of the configs' problems


@dataclass(slots=True)
class Report:
    """What came of a run."""

    tables: list[Path] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    left: int = 0  # problems that the deadline left without an entry
    stale: list[Stale] = field(default_factory=list)  # with Options.stale: in the tables that are tuned
    stale_beside: list[Stale] = field(default_factory=list)  # and in others of the same folder


def table_path(out: Path, target: Target, count: int) -> Path:
    """`out` is a folder, or the table itself if it ends in .json: then a ValueError if there would be several."""
    if out.suffix != ".json":
        return out / f"{target.device}.json"
    if count > 1:
        raise ValueError(f"--out {out} is one table, but there are {count} targets: name a directory, or one --arch")
    return out


def run(chosen: Sequence[Target], options: Options) -> Report:
    """Tune everything on every target: they are all predicted, or it is one GPU."""
    report = Report()
    paths = {target: table_path(options.out, target, len(chosen)) for target in chosen}
    tasks = {}
    for turn, target in enumerate(chosen):
        share = (options.deadline - time.monotonic()) / (len(chosen) - turn)
        tasks[target] = _tasks(target, options, paths[target], report, time.monotonic() + share)
    if options.stale and options.out.suffix != ".json":
        report.stale_beside = stale_beside(list(paths.values()), options.ops, options.m)
    if any(target.cuda is not None for target in chosen):
        for target in chosen:
            _measure(target, tasks[target], options, paths[target], report)
    else:
        by_turns = itertools.zip_longest(*tasks.values())  # a deadline leaves each target something
        compiled: dict[Build, Resources | Rejected] = {}
        try:
            _compile([t for turn in by_turns for t in turn if t is not None], options, compiled)
        finally:  # interrupted too: what was compiled by then says something
            for target in chosen:
                _predict(target, tasks[target], compiled, paths[target], report)
    report.tables = [path for path in paths.values() if path.exists()]
    return report


def _tasks(target: Target, options: Options, path: Path, report: Report, until: float) -> list[Task]:
    """One task a problem, whichever and however many of the models have it; one at least, others until then."""
    entries = table.read(path).entries if path.exists() else []
    found: dict[Problem, tuple[list[str], int]] = {}
    if options.stale:
        if not path.exists():
            raise ValueError(f"--stale: there is no table {path}")
        report.stale.append(stale(path, entries, options.ops, options.m))
        found = {problem: ([], 0) for problem in report.stale[-1].problems}
    else:
        for op in options.ops:
            found |= problems(options.configs, op, target, options.m, options.tp, options.order, options.act)
    agreed: dict[Problem, agreement.Agreed] = {}
    if options.invariant is not None:
        agreed, refused = agreement.agree(
            found,
            target,
            options.invariant,
            path,
            entries,
            rounds=options.budget.final_rounds,
            seed=options.seed,
            deadline=options.deadline,
        )
        report.unsupported += refused
        found = {problem: found[problem] for problem in agreed}
    tasks: list[Task] = []
    for problem, (names, count) in found.items():
        if tasks and time.monotonic() > until:
            report.left += 1
            continue
        try:
            whole = space.of(problem, target.arch, agreed.get(problem))
        except space.NoKernel as e:
            report.unsupported.append(f"{target.arch}: {e}")
            continue
        seeds = _seeds(whole, options.budget, _winners(problem, entries), measured=target.cuda is not None)
        tasks.append(
            Task(
                space=whole,
                device=target.device,
                layers=tuple(names),
                count=count,
                seeds=seeds,
                incumbent=_incumbent(whole, entries),
            )
        )
    return tasks


def _winners(problem: Problem, entries: Sequence[Entry]) -> list[Candidate]:
    """What the table already says of this problem and of the nearest other m, then of the nearest other shapes."""
    known = {row.name for row in registry.kernels(problem.op)}
    dims = problem.dims()
    rest = {k: v for k, v in dims.items() if k != "m"}
    names = {k: v for k, v in dims.items() if isinstance(v, str)}
    own, near = [], []
    for e in entries:
        if e.op != problem.op or e.kernel not in known:
            continue
        if {k: v for k, v in e.problem.items() if k != "m"} == rest:
            own.append(e)
        elif {k: v for k, v in e.problem.items() if isinstance(v, str)} == names:
            near.append(e)

    def distance(e: Entry) -> float:
        """In factors of two of all sizes."""
        return sum(abs(math.log2((int(e.problem[k]) + 1) / (int(v) + 1))) for k, v in dims.items() if k not in names)

    found = sorted(own, key=distance)[:OWN_WINNERS] + sorted(near, key=distance)[:NEAR_WINNERS]
    return list(dict.fromkeys(_as_candidate(e) for e in found))


def _incumbent(whole: Space, entries: Sequence[Entry]) -> Candidate | None:
    """What the table says of this very problem, where that is another candidate than the default."""
    key = (whole.problem.op, whole.problem.dims(), whole.agreed is not None)
    for e in entries:
        if (e.op, e.problem, e.invariant) == key and e.kernel in whole.choices:
            found = _as_candidate(e)
            return found if found in whole.candidates and found != whole.default else None
    return None


def _seeds(whole: Space, budget: Budget, winners: Sequence[Candidate], *, measured: bool) -> tuple[Candidate, ...]:
    """What to try first. Predicted: the model's order, which leaves nothing for a sampler to learn; of a kernel whose
    default goes by measured times that alone.

    Measured, for three quarters of the budget: the default, earlier winners, then the model's favourites, kernel by
    kernel, with a neighbour of the default after every third.
    """
    if not measured and not registry.find(whole.default.kernel).predicted:
        return (whole.default,)
    order = {c: i for i, c in enumerate(whole.candidates)}
    ranked = sorted(
        whole.candidates, key=lambda c: (cost_model.predict_us(whole.problem, c.config, whole.arch), order[c])
    )
    if not measured:
        return tuple(dict.fromkeys((whole.default, *ranked)))[: budget.builds]
    by_kernel = [[c for c in ranked if c.kernel == name] for name in dict.fromkeys(c.kernel for c in ranked)]
    favourites = [c for turn in itertools.zip_longest(*by_kernel) for c in turn if c is not None]
    threes = itertools.zip_longest(*[iter(favourites)] * 3)
    neighbours = itertools.chain(whole.neighbours(whole.default), itertools.repeat(None))
    turns = [c for three, near in zip(threes, neighbours, strict=False) for c in (*three, near) if c is not None]
    known = [c for c in winners if c in order]
    return tuple(dict.fromkeys((whole.default, *known, *turns, *ranked)))[: max(2, 3 * budget.trials // 4)]


# --- without a GPU ---


def _predict(
    target: Target, tasks: list[Task], compiled: Mapping[Build, Resources | Rejected], path: Path, report: Report
) -> None:
    """Store entries of the tasks whose default is compiled, and what the table has of them, where that is a seed."""
    entries = []
    for task in tasks:
        tried = [c for c in task.seeds if build_of(task, c) in compiled]
        if not {task.space.default, task.incumbent}.intersection(task.seeds) <= set(tried):
            report.left += 1
            continue
        try:
            judge = Predicted(task, compiled)
        except DefaultFailed as e:
            report.failed.append(f"{target.arch}: {e}")
            continue
        ratios = {c: judge.evaluate(c) for c in tried}
        best = _least(task, {c: ratio for c, ratio in ratios.items() if not isinstance(ratio, Rejected)})
        reasons = Counter(why.reason for why in ratios.values() if isinstance(why, Rejected))
        rejected = dict(sorted(reasons.items()))
        entry = _entry(task, best, len(tried), rejected, measured=False, predicted_us=round(judge.us(best), 3))
        entries.append(msgspec.structs.replace(entry, default_us=round(judge.default_us, 3)))
        report.rows.append(_row(task, entries[-1], rejected, target))
    if entries:
        _keep(path, target, entries)


def _least(task: Task, ratios: Mapping[Candidate, float]) -> Candidate:
    """The fastest, the first in the space's order among equals; the default, unless it is slower by the margin."""
    least = min(ratios.values())
    if least > 1 - PREDICTED_MARGIN:
        return task.space.default
    return min((c for c, ratio in ratios.items() if ratio == least), key=task.space.candidates.index)


def _compile(tasks: list[Task], options: Options, compiled: dict[Build, Resources | Rejected]) -> None:
    """Compile the tasks' seeds: all defaults first, then every task's next best in turn, until the deadline; the first
    of each architecture may take longer. What is compiled goes into `compiled`.
    """
    turns = itertools.zip_longest(*([build_of(t, c) for c in t.seeds] for t in tasks))
    wanted = list(dict.fromkeys(b for turn in turns for b in turn if b is not None))
    kinds = {b: b.key for b in wanted}  # one binary may serve many
    seen: set[str] = set()
    without = {b.arch for b in wanted}

    def patience() -> float:
        return options.deadline + (PATIENCE_S if without else 0.0) - time.monotonic()

    bar = tqdm(
        total=len(set(kinds.values())), desc="compile", unit="kernel", disable=options.quiet or None, smoothing=0.1
    )
    with bar, contextlib.closing(builds.compile_all(wanted, options.jobs, patience=patience)) as done:
        for b, result in done:
            compiled[b] = result
            without.discard(b.arch)
            bar.update(kinds[b] not in seen)
            seen.add(kinds[b])


# --- on a GPU ---


def _measure(target: Target, tasks: list[Task], options: Options, path: Path, report: Report) -> None:
    assert options.storage is not None
    assert target.cuda is not None
    storage = open_storage(options.storage)
    entries: dict[Task, Entry] = {}
    bar = tqdm(
        total=len(tasks) * options.budget.trials, desc=target.device, unit="trial", disable=options.quiet or None
    )
    ahead = builds.Ahead(options.jobs, target.cuda)
    with bar, contextlib.closing(worker.Worker()) as child, contextlib.closing(ahead):
        child.wake()
        for index, task in enumerate(tasks):
            for candidate in task.seeds:
                _begin(ahead, index, task, candidate)
        left = tasks
        for attempt in range(2):  # compiling may lag behind the first problems: they get what time the others left
            todo, left = left, []
            for index, task in enumerate(todo):
                if attempt == 0:
                    ahead.leave_behind(index)
                bar.set_postfix_str(f"{task.problem.op} {task.problem}", refresh=True)
                remaining = options.deadline - time.monotonic()
                share = remaining / (len(todo) - index)
                if attempt + index == 0:
                    share += STARTUP_S  # of the child: imports, the device, the first compilation
                judge = Measured(task, target.cuda, options.budget.rounds, child, seed=options.seed)
                try:
                    least = 1 if task.incumbent is None else 2
                    search = Search(task, storage, max(least, options.budget.trials), options.seed)
                    search.run(
                        judge,
                        deadline=time.monotonic() + share,
                        latest=time.monotonic() + min(PATIENCE_S, remaining / 2),
                        after=lambda: _tick(bar),
                        begin=functools.partial(_begin, ahead, builds.NOW, task),
                        depth=min(options.jobs + 1, IN_HAND),
                    )
                    if attempt == 0:
                        bar.update((index + 1) * options.budget.trials - bar.n)
                    if not search.may_end():
                        left.append(task)
                        continue
                    if search.running_elsewhere():
                        continue  # the worker that ends last has the whole picture, and will see to the final
                    entries[task] = kept_or_final(search, judge, options.budget)
                except (DefaultFailed, worker.WorkerDied, worker.RemoteError) as e:
                    report.failed.append(f"{target.device}: {e}")
                    continue
                _keep(path, target, [entries[task]])
                report.rows.append(_row(task, entries[task], search.rejected(), target))
        report.left += len(left)
        try:
            _add_regret(target, entries, options, path, child)
        except (DefaultFailed, worker.WorkerDied, worker.RemoteError) as e:
            report.failed.append(f"{target.device}: regret between buckets: {e}")


def kept_or_final(search: Search, judge: Measured, budget: Budget) -> Entry:
    """The entry that an earlier run left in the study, if nothing was added since; else a final."""
    kept = search.study.user_attrs.get("entry")
    if kept is not None and kept["evaluated"] == search.evaluated():
        return msgspec.convert(kept["entry"], Entry)
    entry = final(search, judge, budget)
    search.study.set_user_attr("entry", {"evaluated": search.evaluated(), "entry": msgspec.to_builtins(entry)})
    return entry


def final(search: Search, judge: Measured, budget: Budget) -> Entry:
    """Time the default and the fastest few again, side by side, and let the test decide."""
    task = search.task
    default = task.space.default
    # nearest to the default first: among equals the first wins
    fastest = [c for c, ratio in search.feasible() if c != default and ratio < 1][: budget.finalists]
    fastest.sort(key=lambda c: _steps_from_default(task, c))
    samples = judge.time([default, *fastest], budget.final_rounds, baseline=isinstance(task.problem, GemmProblem))
    contenders = {c: samples[c] for c in (default, *fastest) if c in samples}
    winner, verdicts = stats.pick(contenders, default)
    for candidate, verdict in verdicts.items():
        log.info("%s: %.3f of the default, p = %.2g", candidate, verdict.ratio, verdict.p)
    won = stats.summary(samples[winner])
    baseline = next((name for name in samples if isinstance(name, str)), None)
    entry = _entry(task, winner, search.evaluated(), search.rejected(), measured=True)
    return msgspec.structs.replace(
        entry,
        median_us=round(won.median_us, 3),
        p20_us=round(won.p20_us, 3),
        p80_us=round(won.p80_us, 3),
        default_us=round(stats.summary(samples[default]).median_us, 3),
        baseline=baseline,
        baseline_us=round(stats.summary(samples[baseline]).median_us, 3) if baseline else None,
    )


def _begin(ahead: builds.Ahead, turn: int, task: Task, candidate: Candidate) -> "Future[Rejected | None]":
    return ahead.begin(build_of(task, candidate), turn)


def _tick(bar: "tqdm[Any]") -> None:
    bar.update()


def _add_regret(target: Target, entries: dict[Task, Entry], options: Options, path: Path, child: worker.Worker) -> None:
    """Time each bucket's config in the buckets next to it: what an m that was not tuned may lose."""
    assert target.cuda is not None
    for family in _families(entries):
        if len(family) < 2 or all(entries[t].regret is not None for t in family):
            continue
        lost: dict[Task, float] = {}
        for here in family:
            if time.monotonic() > options.deadline:
                return
            guests = {t: c for t in _next_to(here, family) if (c := _as_candidate(entries[t])) in here.space.candidates}
            own = _as_candidate(entries[here])
            judge = Measured(here, target.cuda, options.budget.rounds, child, seed=options.seed)
            samples = judge.time([own, *guests.values()], options.budget.final_rounds)
            for task, guest in guests.items():
                if guest in samples:
                    ratio = float((samples[guest] / samples[own]).mean())
                    lost[task] = max(lost.get(task, 1.0), ratio)
        for task, ratio in lost.items():
            entries[task] = msgspec.structs.replace(entries[task], regret=round(ratio, 4))
        _keep(path, target, [entries[t] for t in lost])


def _families(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that differ in m alone, by m."""

    def rest(task: Task) -> tuple[Any, ...]:
        return (task.problem.op, *sorted((k, str(v)) for k, v in task.problem.dims().items() if k != "m"))

    ordered = sorted(tasks, key=lambda t: (rest(t), int(t.problem.dims()["m"])))
    return [list(group) for _, group in itertools.groupby(ordered, key=rest)]


def _next_to(task: Task, family: list[Task]) -> Iterator[Task]:
    at = family.index(task)
    yield from family[max(0, at - 1) : at] + family[at + 1 : at + 2]


def _steps_from_default(task: Task, candidate: Candidate) -> int:
    return task.space.steps(candidate, task.space.default)


# --- entries ---


def _entry(
    task: Task,
    best: Candidate,
    trials: int,
    rejected: Mapping[str, int],
    *,
    measured: bool,
    predicted_us: float | None = None,
) -> Entry:
    return Entry(
        op=task.problem.op,
        problem=task.problem.dims(),
        kernel=best.kernel,
        source_hash=registry.source_hash(best.kernel),
        config=dict(best.knobs),
        measured=measured,
        invariant=task.space.agreed is not None,
        predicted_us=predicted_us,
        trials=trials,
        rejected=sum(rejected.values()),
        versions=provenance.versions() if measured else provenance.compilers(),
        commit=provenance.commit(),
        date=provenance.today(),
    )


def _as_candidate(entry: Entry) -> Candidate:
    """Knobs that it does not have, being older than they are, are at their defaults."""
    default = space.candidate(entry.kernel, registry.load(entry.kernel).Config())
    return Candidate(entry.kernel, tuple((dict(default.knobs) | entry.config).items()))


def _keep(path: Path, target: Target, new: list[Entry]) -> None:
    """Merge into the table. An entry that says the same as before but for commit and date stays as it was."""
    old = {e.key(): e for e in table.read(path).entries} if path.exists() else {}

    def same(entry: Entry) -> bool:
        before = old.get(entry.key())
        return before is not None and msgspec.structs.replace(entry, commit=before.commit, date=before.date) == before

    changed = [e for e in new if not same(e)]
    if changed:
        table.merge(
            path, target.device, target.arch, changed, drop=lambda old: any(agreement.disagree(old, e) for e in changed)
        )


def _row(task: Task, entry: Entry, rejected: dict[str, int], target: Target) -> dict[str, Any]:
    best = entry.median_us if entry.measured else entry.predicted_us
    default = entry.default_us
    assert best is not None
    assert default is not None
    return {
        "device": target.device,
        "op": entry.op,
        "problem": str(task.problem),
        "layers": list(task.layers),
        "kernel": entry.kernel,
        "config": entry.config,
        "changed": _as_candidate(entry) != task.space.default,
        "default_us": default,
        "best_us": best,
        "gain": round(default / best - 1, 4),
        "measured": entry.measured,
        "trials": entry.trials,
        "rejected": rejected,
        "baseline": entry.baseline,
        "baseline_us": entry.baseline_us,
    }


def render(report: Report, most: int) -> str:
    """One line an op and device; then the problems that gained most, at most so many."""
    if not report.rows:
        return "no entries"
    ops = []
    for device, op in dict.fromkeys((r["device"], r["op"]) for r in report.rows):
        rows = [r for r in report.rows if (r["device"], r["op"]) == (device, op)]
        gains = sorted(r["gain"] for r in rows)
        why = Counter[str]()
        for r in rows:
            why.update(r["rejected"])
        ops.append(
            [
                device,
                op,
                len(rows),
                sum(r["changed"] for r in rows),
                f"{gains[len(gains) // 2]:+.1%}",
                f"{gains[-1]:+.1%}",
                sum(r["trials"] for r in rows),
                ", ".join(f"{count} {reason}" for reason, count in sorted(why.items())) or "-",
            ]
        )
    heads = ["device", "op", "problems", "not default", "median gain", "best gain", "trials", "rejected"]
    text = tabulate(ops, headers=heads, disable_numparse=True)
    changed = sorted((r for r in report.rows if r["changed"]), key=lambda r: -r["gain"])
    best = [
        [
            r["device"],
            r["op"],
            r["problem"],
            f"{r['default_us']:.1f}",
            f"{r['best_us']:.1f}",
            f"{r['gain']:+.1%}",
            r["trials"],
            ", ".join(f"{count} {reason}" for reason, count in r["rejected"].items()) or "-",
            " ".join(f"{k}={v}" for k, v in r["config"].items()),
        ]
        for r in changed[:most]
    ]
    if best:
        heads = ["device", "op", "problem", "default us", "best us", "gain", "trials", "rejected", "config"]
        text += "\n\n" + tabulate(best, headers=heads, disable_numparse=True)
        if len(changed) > most:
            text += f"\n... and {len(changed) - most} more that left the default"
    return text


def render_stale(report: Report, asked: str) -> list[str]:
    """With --stale a line a table: what is stale in it, of the entries that were asked for, and who sees to it."""
    lines = []
    for found in (*report.stale, *report.stale_beside):
        line = f"{found.path}: {len(found.problems)} stale of {found.entries} entries{asked}"
        if found.invariant:
            line += (
                f", and {found.invariant} for batch-invariant mode, which --stale leaves out: "
                "tune --batch-invariant --layers-of MODEL times all m of a weight again"
            )
        lines.append(line + "; left alone: it is of another device" * (found in report.stale_beside))
    return lines


def stale_document(found: Stale) -> dict[str, Any]:
    """As --json has it."""
    return {
        "table": str(found.path),
        "entries": found.entries,
        "stale": len(found.problems),
        "batch_invariant": found.invariant,
    }


# --- several GPUs of one host ---


def run_on_devices(devices: Sequence[str], arguments: Sequence[str]) -> int:
    """The same command once a device, each a worker on the same studies. Returns the worst exit code.

    Who ends first leaves problems that another still has in hand: run once more to see to their finals.
    """
    children = [
        Popen([sys.executable, "-m", __package__, "tune", *arguments, "--device", device]) for device in devices
    ]
    try:
        codes = [child.wait() for child in children]
    except KeyboardInterrupt:
        for child in children:
            child.wait()  # each has been interrupted too, and writes what it has
        raise
    return max(codes)


def replace_trials(budget: Budget, trials: int) -> Budget:
    """`budget` with another number of candidates."""
    return dataclasses.replace(budget, trials=trials, builds=trials)
