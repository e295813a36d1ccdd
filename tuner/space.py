"""What there is to choose from for one problem: every kernel of the op, every config of its SPACE that supports it."""

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fp4suite import arch as archs, registry
from fp4suite.problem import Problem

MAX_CANDIDATES = 1 << 17  # a larger SPACE is sampled down to this, with a fixed seed

Knob = int | str | bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel with the knobs of its SPACE, in SPACE's order; knobs that SPACE leaves out keep their defaults."""

    kernel: str
    knobs: tuple[tuple[str, Knob], ...]

    @property
    def config(self) -> Any:
        return _config(registry.load(self.kernel), self.knobs)

    @property
    def params(self) -> dict[str, Knob]:
        """As the study spells it: the kernel, and its knobs under its own name, as kernels may share knob names."""
        return {"kernel": self.kernel} | {f"{self.kernel}.{name}": value for name, value in self.knobs}

    def __str__(self) -> str:
        return f"{self.kernel}({', '.join(f'{k}={v}' for k, v in self.knobs)})"


@functools.lru_cache(2 * MAX_CANDIDATES)
def _config(module: ModuleType, knobs: tuple[tuple[str, Knob], ...]) -> Any:
    return registry.make_config(module, dict(knobs))


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """All supported candidates of a problem. `default` is what dispatch runs without a table, or the nearest to it.

    agreed: the one kernel and arithmetic that they have, for batch-invariant mode; None where any will do.
    """

    problem: Problem
    arch: str
    candidates: tuple[Candidate, ...]
    default: Candidate
    choices: dict[str, dict[str, tuple[Knob, ...]]]  # kernel -> knob -> values
    agreed: tuple[str, str] | None = None

    def neighbours(self, candidate: Candidate) -> list[Candidate]:
        """Candidates one step of one knob away, in SPACE's order of values."""
        return [c for c in self.candidates if self.steps(c, candidate) == 1]

    def nearest(self, candidate: Candidate, among: list[Candidate]) -> Candidate:
        """The one of `among` that takes the fewest steps to reach; the first of equals."""
        return min(among, key=lambda c: self.steps(c, candidate))

    def steps(self, a: Candidate, b: Candidate) -> int:
        if a.kernel != b.kernel:
            return 1000
        values = self.choices[a.kernel]
        return sum(
            abs(values[k].index(x) - values[k].index(y)) for (k, x), (_, y) in zip(a.knobs, b.knobs, strict=True)
        )


class NoKernel(ValueError):
    """No kernel of this architecture supports the problem with any config."""


def of(problem: Problem, arch: str, agreed: tuple[str, str] | None = None) -> Space:
    """The candidates of `problem` on `arch`, all or those of the agreed kernel and arithmetic.

    Raises NoKernel if there is none, and ValueError if a SPACE is not one: a knob that Config does not have, no values,
    a default that SPACE leaves out.
    """
    with archs.assume(arch):
        return _of(problem, arch, agreed)


def _of(problem: Problem, arch: str, agreed: tuple[str, str] | None) -> Space:
    found: list[Candidate] = []
    choices: dict[str, dict[str, tuple[Knob, ...]]] = {}
    defaults: list[Candidate] = []
    refusals = []
    for row in registry.kernels(problem.op, arch):
        if agreed is not None and row.name != agreed[0]:
            continue
        module = registry.load(row.name)
        choices[row.name] = checked_space(module)
        default = default_of(row.name, problem)
        if row.any_m:
            mine = _supported_at_any_m(row.name, dataclasses.replace(problem, m=1))
        else:
            mine = _supported(row.name, problem)
        why = module.supports(problem, default.config)
        if why is None:
            defaults.append(default)
            if default not in mine:  # a large SPACE may have been sampled about the default of another m
                mine = (default, *mine)
        elif not mine:
            refusals.append(f"{row.name}: {why}")
        found += mine
    if not found:
        why = "; ".join(refusals) or f"no kernel of {problem.op} for {arch}"
        raise NoKernel(f"{problem.op} ({problem}): {why}")
    if agreed is not None:
        return _agreeing(Space(problem, arch, tuple(found), found[0], choices), agreed)
    whole = Space(problem, arch, tuple(found), found[0], choices)
    if defaults:
        return dataclasses.replace(whole, default=defaults[0])
    return dataclasses.replace(whole, default=whole.nearest(default_of(found[0].kernel, problem), found))


def _supported(kernel: str, problem: Problem) -> tuple[Candidate, ...]:
    module = registry.load(kernel)
    every = _walk(default_of(kernel, problem), checked_space(module))
    return tuple(c for c in every if module.supports(problem, c.config) is None)


_supported_at_any_m = functools.lru_cache(256)(_supported)  # tens of thousands of configs are asked for each


def _agreeing(whole: Space, agreed: tuple[str, str]) -> Space:
    kernel, arithmetic = agreed
    problem = whole.problem
    found = tuple(c for c in whole.candidates if registry.arithmetic(kernel, problem, c.config) == arithmetic)
    if not found:
        raise NoKernel(f"{problem.op} ({problem}): no config of {kernel} sums as agreed: {arithmetic}")
    config = registry.config_of(kernel, problem, arithmetic)
    default = found[0] if config is None else whole.nearest(candidate(kernel, config), list(found))
    return dataclasses.replace(whole, candidates=found, default=default, agreed=agreed)


def default_of(kernel: str, problem: Problem) -> Candidate:
    """What dispatch runs without a table, as a candidate."""
    return candidate(kernel, registry.default_config(registry.load(kernel), problem))


def candidate(kernel: str, config: Any) -> Candidate:
    """A config as the search spells it."""
    module = registry.load(kernel)
    return Candidate(kernel, tuple((name, getattr(config, name)) for name in module.SPACE))


def checked_space(module: ModuleType) -> dict[str, tuple[Knob, ...]]:
    """SPACE, if it is one. Raises ValueError naming the module and the knob."""
    where = f"{module.__name__}.SPACE"
    default = module.Config()
    known = {f.name for f in dataclasses.fields(default)}
    for name, values in module.SPACE.items():
        if name not in known:
            raise ValueError(f"{where} has {name}, which Config does not have")
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{where}[{name!r}] must have values, each once, got {values}")
        if not all(isinstance(v, int | str | bool) for v in values):
            raise ValueError(f"{where}[{name!r}] must hold integers, strings or truth values, got {values}")
        if getattr(default, name) not in values:
            raise ValueError(f"{where}[{name!r}] = {values} leaves out the default, {getattr(default, name)!r}")
    return {name: tuple(values) for name, values in module.SPACE.items()}


def _walk(default: Candidate, space: dict[str, tuple[Knob, ...]]) -> Sequence[Candidate]:
    kernel = default.kernel
    if math.prod(len(values) for values in space.values()) <= MAX_CANDIDATES:
        return _all(kernel, tuple(space.items()))
    drawn = _drawn(kernel, tuple(space.items()), MAX_CANDIDATES)
    return list(itertools.islice(dict.fromkeys((default, *drawn)), MAX_CANDIDATES))


@functools.lru_cache(4)
def _drawn(kernel: str, space: tuple[tuple[str, tuple[Knob, ...]], ...], count: int) -> tuple[Candidate, ...]:
    """As many different ones, the same at every call: to draw them takes seconds, and every problem has them."""
    rng = random.Random(0)
    knobs = [[(name, value) for value in values] for name, values in space]
    drawn: dict[Candidate, None] = {}
    while len(drawn) < count:
        drawn[Candidate(kernel, tuple(rng.choice(of_name) for of_name in knobs))] = None
    return tuple(drawn)


@functools.lru_cache(64)
def _all(kernel: str, space: tuple[tuple[str, tuple[Knob, ...]], ...]) -> tuple[Candidate, ...]:
    """But for those that the kernel says no problem can have, by `refused(config)`: asked once, not once a problem."""
    module, names = registry.load(kernel), [name for name, _ in space]
    every: Iterable[tuple[Knob, ...]] = itertools.product(*(values for _, values in space))
    if hasattr(module, "refused"):
        every = (v for v in every if module.refused(module.Config(**dict(zip(names, v, strict=True)))) is None)
    return tuple(Candidate(kernel, tuple(zip(names, v, strict=True))) for v in every)
