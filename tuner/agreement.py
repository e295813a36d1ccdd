"""Batch-invariant mode: which kernel and which order of sums all m of a weight get.

In force is what the table says, else the kernel's INVARIANT. Another order may be asked for by knobs, or the best be
found: of those that the ordinary winners and defaults have, the one that loses least over all m, each by its default
config, as geometric mean.
"""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fp4suite import dispatch, registry
from fp4suite.errors import UnsupportedError
from fp4suite.problem import Problem, from_dims
from fp4suite.table import Entry

from . import cost_model, space, stats, worker
from .evaluate import DefaultFailed, Measured
from .search import Task
from .space import Knob
from .targets import Target

log = logging.getLogger(__name__)

Agreed = tuple[str, str]  # kernel, arithmetic
Wanted = Mapping[str, Knob] | Literal["in force", "best"]


def weight(op: str, dims: Mapping[str, Any]) -> tuple[Any, ...]:
    """What problems that differ in m alone share."""
    return (op, *sorted((k, str(v)) for k, v in dims.items() if k != "m"))


def agree(
    problems: Iterable[Problem],
    target: Target,
    wanted: Wanted,
    path: Path,
    entries: Sequence[Entry],
    *,
    rounds: int,
    seed: int,
    deadline: float,
) -> tuple[dict[Problem, Agreed], list[str]]:
    """Kernel and arithmetic of each problem that has them, and why others have none.

    Problems whose kernel gives the reference's bytes anyway are in neither: the entries of any mode serve them. path:
    the table that is tuned, with its entries.
    """
    where, asked = dispatch.Target(target.arch, target.device), path if path.exists() else None
    families: dict[tuple[Any, ...], dict[Problem, Agreed]] = {}
    refused = []
    dispatch.reread_tables()
    for problem in problems:
        try:
            kernel, arithmetic = dispatch.agreed(problem, where, asked)
        except UnsupportedError as e:
            refused.append(f"{target.arch}: {e}")
            continue
        if registry.find(kernel).exact:
            continue
        if isinstance(wanted, Mapping):
            config = registry.make_config(registry.load(kernel), dict(wanted))
            arithmetic = registry.arithmetic(kernel, problem, config) or arithmetic
        families.setdefault(weight(problem.op, problem.dims()), {})[problem] = kernel, arithmetic
    if wanted == "best":
        with contextlib.ExitStack() as stack:
            child = stack.enter_context(contextlib.closing(worker.Worker())) if target.cuda is not None else None
            for family in families.values():
                if time.monotonic() < deadline:
                    family.update(dict.fromkeys(family, _best(family, target, entries, child, rounds, seed)))
    return {problem: agreed for family in families.values() for problem, agreed in family.items()}, refused


def disagree(a: Entry, b: Entry) -> bool:
    """Whether both are for the mode and for one weight, but sum in different ways."""
    if not (a.invariant and b.invariant and weight(a.op, a.problem) == weight(b.op, b.problem)):
        return False
    return _sums(a) != _sums(b)


def _sums(entry: Entry) -> tuple[str, str | None]:
    config = registry.make_config(registry.load(entry.kernel), dict(entry.config))
    return entry.kernel, registry.arithmetic(entry.kernel, from_dims(entry.op, entry.problem), config)


def _best(
    family: Mapping[Problem, Agreed],
    target: Target,
    entries: Sequence[Entry],
    child: worker.Worker | None,
    rounds: int,
    seed: int,
) -> Agreed:
    """The arithmetic with the least geometric mean of times over the family's m; what is in force among equals."""
    kernel, in_force = next(iter(family.values()))
    configs = _candidates(family, kernel, in_force, entries)
    lost = dict.fromkeys(configs, 0.0)
    for i, problem in enumerate(family):
        mine = {arithmetic: per_m[i] for arithmetic, per_m in configs.items()}
        try:
            us = _times(problem, kernel, mine, target, child, rounds, seed)
        except (DefaultFailed, worker.WorkerDied, worker.RemoteError) as e:
            log.warning("%s: %s sums %s as before: %s", problem, kernel, in_force, e)
            return kernel, in_force
        for arithmetic in lost:
            lost[arithmetic] += math.log(us.get(arithmetic, math.inf))
    best = min(lost, key=lambda arithmetic: lost[arithmetic], default=in_force)
    for arithmetic, total in lost.items():
        log.info("%s %s: %.3f of the best", kernel, arithmetic, math.exp((total - lost[best]) / len(family)))
    return kernel, best


def _candidates(
    family: Mapping[Problem, Agreed], kernel: str, in_force: str, entries: Sequence[Entry]
) -> dict[str, list[Any]]:
    """Every arithmetic that defaults and winners of this kernel have somewhere, with its default config for each m."""
    found: dict[str | None, None] = {in_force: None}
    problem = next(iter(family))
    for entry in entries:
        if entry.kernel == kernel and weight(entry.op, entry.problem) == weight(problem.op, problem.dims()):
            found[_sums(entry)[1]] = None
    for problem in family:
        config = registry.default_config(registry.load(kernel), problem)
        found[registry.arithmetic(kernel, problem, config)] = None
    wanted = [arithmetic for arithmetic in found if arithmetic is not None]
    configs = {a: [registry.config_of(kernel, problem, a) for problem in family] for a in wanted}
    return {a: per_m for a, per_m in configs.items() if None not in per_m}


def _times(
    problem: Problem,
    kernel: str,
    configs: Mapping[str, Any],
    target: Target,
    child: worker.Worker | None,
    rounds: int,
    seed: int,
) -> dict[str, float]:
    """Microseconds by arithmetic: measured side by side in `child`, or by the cost model where there is none."""
    if child is None or target.cuda is None:
        return {a: cost_model.predict_us(problem, config, target.arch) for a, config in configs.items()}
    task = Task(space=space.of(problem, target.arch), device=target.device)
    candidates = {a: space.candidate(kernel, config) for a, config in configs.items()}
    judge = Measured(task, target.cuda, rounds, child, seed=seed)
    samples = judge.time(list(dict.fromkeys(candidates.values())), rounds)
    return {a: stats.summary(samples[c]).median_us for a, c in candidates.items() if c in samples}
