"""The one place where a kernel and its config are chosen.

Explicit override -> tuned table of this device -> of this architecture -> first registry row that supports the problem,
with its default config -> the reference for CPU tensors, `UnsupportedError` on a GPU. A pure function of host integers
and files, so every rank chooses alike. CPU tensors inside of `ptx_emulator.emulate` count as tensors of the emulated
architecture wherever it has a kernel that can be emulated; of what only other kernels take the reference runs.

NVFP4 activations that no kernel takes beside the weights of a GEMM are decoded first where a kernel takes them as BF16,
which holds code times block scale exactly: the choice's problem then says so.

Batch-invariant mode: all m of a problem share one kernel and one arithmetic, the order in which it sums. They are those
of the entries that were tuned for the mode, else of the first registry row that has one for every m. Then the nearest
entry of this arithmetic serves, however it was tuned, or the kernel's default in it.
"""

import contextlib
import functools
import itertools
import logging
import math
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import arch as archs, env, reference, registry, table
from .errors import TableError, UnsupportedError
from .formats import WeightLayout
from .problem import PROBLEMS, Act, GemmProblem, Problem

log = logging.getLogger(__name__)

_TOKENS = (1, 8, 64, 512, 4096)  # what `weight_layout` asks kernels for: decode to prefill


@dataclass(frozen=True, slots=True)
class Choice:
    """What runs `problem` and why. kernel is "reference" (config None) or a name of `registry`.

    invariant: a row's result must not depend on the other rows.
    """

    op: str
    problem: Problem | None
    kernel: str
    config: Any
    reason: str
    invariant: bool = False

    @property
    def module(self) -> ModuleType:
        """The kernel's module. Not for the reference."""
        return registry.load(self.kernel)

    @property
    def is_reference(self) -> bool:
        return self.kernel == registry.REFERENCE


@dataclass(frozen=True, slots=True)
class Target:
    """What to choose for: an architecture, and a device's name as `arch.device_name` spells it.

    emulated: on CPU tensors by `ptx_emulator`, which not every kernel can be (`registry.Kernel.emulated`).
    """

    arch: str
    device: str
    emulated: bool = False


@dataclass(frozen=True, slots=True)
class _Override:
    op: str
    kernel: str | None
    config: Any


_overrides: ContextVar[tuple[_Override, ...]] = ContextVar("fp4suite_overrides", default=())
_target: ContextVar[Target | None] = ContextVar("fp4suite_target", default=None)
_records: ContextVar[tuple[list[Choice], ...]] = ContextVar("fp4suite_records", default=())
_user_table: Path | None = None
_invariant: ContextVar[bool | None] = ContextVar("fp4suite_batch_invariant", default=None)
_invariant_process: bool | None = None


def choose(op: str, problem: Problem | None, device: torch.device | str) -> Choice:
    """The kernel and config for `problem` on `device`.

    Raises UnsupportedError where nothing on this architecture can run it, ValueError for an override that cannot.
    """
    overrides = _overrides.get()
    choice = _overridden(op, problem, device, overrides) if overrides else None
    if choice is None:
        choice = choose_for(op, problem, _target.get() or target_of(device))
    for record in _records.get():
        record.append(choice)
    return choice


def choose_for(op: str, problem: Problem | None, target: Target) -> Choice:
    """`choose` for a device that need not be here; overrides do not count."""
    return _choose(op, problem, target, _user_table, env.table_path(), is_batch_invariant())


def weight_layout(n: int, k: int, device: torch.device | str, *, act: Act = "bf16", segments: int = 1) -> WeightLayout:
    """How a weight [n, k] had best lie for `gemm_nvfp4` on `device`, under activations in `act`.

    The layout that kernels of the device's architecture read, a prepared order before rows, and only one in which every
    number of tokens has a kernel. Rows and linear scales where there is none, and on the CPU.
    """
    target = _target.get() or target_of(device)
    rows = registry.kernels(GemmProblem.op, target.arch)
    if target.emulated:
        rows = [row for row in rows if row.emulated]
    layouts = list(dict.fromkeys(registry.weight_layout(registry.load(row.name)) for row in rows))
    for layout in sorted(layouts, key=lambda layout: layout.order == "rows"):
        problems = [
            GemmProblem(m=m, n=n, k=k, act=act, out=out, segments=segments, order=layout.order)
            for m in _TOKENS
            for out in ("bf16", "fp32")
        ]
        if layout.refuses(n, k) is None and all(_is_supported(p, target) for p in problems):
            return layout
    return WeightLayout()


def is_supported(problem: Problem, device: torch.device | str) -> bool:
    """Whether there is something that runs `problem` on `device`; overrides do not count."""
    return _is_supported(problem, _target.get() or target_of(device))


def _is_supported(problem: Problem, target: Target) -> bool:
    try:
        choose_for(problem.op, problem, target)
    except UnsupportedError:
        return False
    return True


def target_of(device: torch.device | str) -> Target:
    """Of CPU tensors inside of `ptx_emulator.emulate`: what is emulated."""
    arch = archs.of(device)
    emulator = sys.modules.get("ptx_emulator")  # nobody emulates without having imported it
    if arch == "cpu" and emulator is not None and (emulated := emulator.active()) is not None:
        return Target(emulated.arch, f"emulated-{emulated.arch}", emulated=True)
    return Target(arch, archs.device_name(device))


def use_table(path: str | Path | None) -> None:
    """Ask the table at `path` before the shipped ones, in the whole process; None goes back to the shipped ones.

    Raises TableError if it cannot be read. A table of another device is refused when something is chosen, not here.
    """
    global _user_table
    if path is None:
        _user_table = None
    else:
        path = Path(path).resolve()
        table.read(path)
        _user_table = path
    reread_tables()


def reread_tables() -> None:
    """Forget what tables said: their files may have changed."""
    for cached in (_index, _choose, _agreed):
        cached.cache_clear()


@contextlib.contextmanager
def batch_invariant(on: bool = True) -> Iterator[None]:
    """Within the block, a row's result does not depend on which other rows, or how many, are in the call.

    Holds for what runs in the block, so around a compiled function too; a CUDA graph keeps what it was captured with.
    Kernels keep to one order of sums for all m. Ops without a kernel run their reference token by token. ValueError for
    a global scale that would come from all rows at once, UnsupportedError for a kernel that makes no such promise.
    """
    token = _invariant.set(on)
    try:
        yield
    finally:
        _invariant.reset(token)


def set_batch_invariant(on: bool | None) -> None:
    """`batch_invariant` for the whole process, all threads; None leaves it to FP4SUITE_BATCH_INVARIANT."""
    global _invariant_process
    _invariant_process = on


def is_batch_invariant() -> bool:
    """Whether the mode is on here: by the innermost block, else by the process, else by FP4SUITE_BATCH_INVARIANT."""
    on = _invariant.get()
    if on is None:
        on = _invariant_process
    return env.batch_invariant() if on is None else on


@contextlib.contextmanager
def override(*, op: str | None = None, kernel: str | None = None, config: Any = None) -> Iterator[None]:
    """Within the block, run `kernel` with `config` (its default if None) for `op` (the kernel's own op if None).

    kernel="reference" needs `op` and runs fp4suite.reference on any device: the way to ask for it on a GPU. With
    `config` alone the kernel is chosen as usual. Overrides nest, the innermost that fits wins.

    Raises ValueError for an op or a kernel that there is not, TypeError for a config that is not of these kernels.
    """
    token = _overrides.set((*_overrides.get(), _checked(op, kernel, config)))
    try:
        yield
    finally:
        _overrides.reset(token)


def _checked(op: str | None, kernel: str | None, config: Any) -> _Override:
    if kernel is None and config is None:
        raise ValueError("override needs a kernel, a config or both")
    if op is not None and not callable(vars(reference).get(op)):
        raise ValueError(f"override: op must be one of {', '.join(PROBLEMS)}, or another of fp4suite.ops, got {op!r}")
    if kernel is not None and kernel != registry.REFERENCE:
        try:
            row = registry.find(kernel)
        except ValueError as e:
            raise ValueError(f"override(kernel={kernel!r}): {e}") from None
        if op not in (None, row.op):
            raise ValueError(f"override(op={op!r}): {kernel} is a kernel of {row.op}, not of {op}")
        rows = [row]
    elif op is None:
        raise ValueError("override of the reference, or of a config alone, needs op=")
    else:
        rows = registry.kernels(op) if kernel is None else []
    if config is not None and not any(_is_config(config, row) for row in rows):
        wanted = " or ".join(f"{row.module}.Config" for row in rows) or f"None, as {kernel or op} has none"
        raise TypeError(f"override: config must be {wanted}, got {type(config).__name__}: {config!r}")
    return _Override(op or rows[0].op, kernel, config)


def _is_config(config: Any, row: registry.Kernel) -> bool:
    """Whether it is of this kernel. Who has made one has imported the module, so that nothing is imported here."""
    module = sys.modules.get(row.module)
    return module is not None and isinstance(config, module.Config)


@contextlib.contextmanager
def on_target(arch: str, device: str | None = None) -> Iterator[None]:
    """Within the block, choose as on `arch` whatever device the tensors are on.

    For interpreters and emulators that run a GPU's kernels on CPU tensors. device defaults to the architecture's name.
    """
    if arch not in archs.ARCHS:
        raise ValueError(f"arch must be one of {', '.join(archs.ARCHS)}, got {arch!r}")
    token = _target.set(Target(arch, device or arch))
    try:
        with archs.assume(arch):
            yield
    finally:
        _target.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """Within the block, every choice is appended to the list that this gives."""
    record: list[Choice] = []
    token = _records.set((*_records.get(), record))
    try:
        yield record
    finally:
        _records.reset(token)


def _overridden(
    op: str, problem: Problem | None, device: torch.device | str, stack: tuple[_Override, ...]
) -> Choice | None:
    invariant = is_batch_invariant()
    for o in reversed(stack):
        if o.op != op:
            continue
        if o.kernel == registry.REFERENCE:
            return Choice(op, problem, registry.REFERENCE, None, "override", invariant)
        kernel = o.kernel or choose_for(op, problem, _target.get() or target_of(device)).kernel
        if kernel == registry.REFERENCE:
            raise ValueError(f"override of {op} gives a config, but the reference is chosen here, which has none")
        module = registry.load(kernel)
        if o.config is not None and not isinstance(o.config, module.Config):
            raise ValueError(
                f"override of {op} gives a {type(o.config).__module__}.Config, but {kernel} is chosen here"
            )
        refusals = []
        for asked in _ways(problem):
            config = o.config
            if config is None:
                config = _first_config(kernel, asked, invariant)
            why = module.supports(asked, config) if config is not None else _NOT_INVARIANT
            if why is None:
                return Choice(op, asked, kernel, config, "override", invariant)
            refusals.append(f"{kernel} with {config} cannot run {op} {asked}: {why}")
        raise ValueError(f"override: {refusals[0]}")
    return None


_NOT_INVARIANT = "it has no arithmetic that is the same for every m, as the batch-invariant mode wants"


def _first_config(kernel: str, problem: Problem | None, invariant: bool) -> Any | None:
    """The default; in batch-invariant mode that of the arithmetic for every m, None where there is none."""
    if not invariant:
        return registry.default_config(registry.load(kernel), problem)
    arithmetic = registry.invariant(kernel)
    return None if arithmetic is None else registry.config_of(kernel, problem, arithmetic)


def _ways(problem: Problem | None) -> tuple[Problem | None, ...]:
    """The problem, and the same from activations that are decoded first, if they are packed."""
    if isinstance(problem, GemmProblem) and problem.act == "nvfp4":
        return problem, replace(problem, act="bf16")
    return (problem,)


@functools.lru_cache(maxsize=65536)
def _choose(
    op: str, problem: Problem | None, target: Target, user: Path | None, from_env: Path | None, invariant: bool
) -> Choice:
    if target.arch == "cpu":
        return Choice(op, problem, registry.REFERENCE, None, "cpu: the reference", invariant)
    where, rows = "", registry.kernels(op, target.arch)
    if target.emulated:
        where, rows = f"emulated {target.arch}: ", [row for row in rows if row.emulated]
        if not rows:
            why = f"{where}no kernel that can be emulated, the reference"
            return Choice(op, problem, registry.REFERENCE, None, why, invariant)
    refusals: list[str] = []
    for asked in _ways(problem):
        agreed = _agreed(op, replace(asked, m=1), target, user, from_env) if invariant and rows and asked else None
        found = agreed if isinstance(agreed, list) else _find(op, asked, target, rows, user, from_env, agreed)
        if isinstance(found, Choice):
            decoded = "" if asked is problem else "activations decoded to bf16, "
            return replace(found, reason=where + decoded + found.reason, invariant=invariant)
        refusals = refusals or found
    if target.emulated and rows != registry.kernels(op, target.arch):
        why = f"{where}no kernel that can be emulated takes it, the reference"
        return Choice(op, problem, registry.REFERENCE, None, why, invariant)
    raise UnsupportedError(_unsupported(op, problem, target, refusals))


def _find(
    op: str,
    problem: Problem | None,
    target: Target,
    rows: list[registry.Kernel],
    user: Path | None,
    from_env: Path | None,
    agreed: tuple[str, str] | None,
) -> Choice | list[str]:
    """What the tables say, else the first row that supports the problem; else why none does."""
    if problem is not None and rows:
        for label, path in _tables(target, user, from_env):
            found = _from_table(label, path, op, problem, target, agreed)
            if found is not None:
                return found
    refusals = []
    for row in rows:
        module = registry.load(row.name)
        if agreed is None:
            config = registry.default_config(module, problem)
            why = module.supports(problem, config)
        elif row.name == agreed[0]:
            config = registry.config_of(row.name, problem, agreed[1])
            why = None if config is not None else f"no config sums {agreed[1]}"
        else:
            continue
        if why is None:
            return Choice(op, problem, row.name, config, "default: no table entry fits")
        refusals.append(f"{row.name}: {why}")
    return refusals


def agreed(problem: Problem, target: Target, path: Path | None = None) -> tuple[str, str]:
    """Kernel and arithmetic of every m of `problem` in batch-invariant mode; the table at `path` is asked first.

    Raises UnsupportedError where no kernel has one for every m.
    """
    found = _agreed(problem.op, replace(problem, m=1), target, path, env.table_path())
    if isinstance(found, list):
        raise UnsupportedError(_unsupported(problem.op, problem, target, found))
    return found


@functools.lru_cache(maxsize=65536)
def _agreed(
    op: str, problem: Problem, target: Target, user: Path | None, from_env: Path | None
) -> tuple[str, str] | list[str]:
    """Kernel and arithmetic that all m of `problem` share in batch-invariant mode, or why there are none."""
    for _, path in _tables(target, user, from_env):
        tuned = {
            (e.kernel, registry.arithmetic(e.kernel, replace(problem, m=int(e.problem["m"])), config))
            for e, _, config in _entries(path, op, problem, target)
            if e.invariant
        }
        if len(tuned) > 1 or any(arithmetic is None for _, arithmetic in tuned):
            said = "; ".join(sorted(f"{kernel} {arithmetic}" for kernel, arithmetic in tuned))
            raise TableError(f"{path}: batch-invariant entries for {op} ({problem}) do not sum in one way: {said}")
        for kernel, arithmetic in tuned:
            assert arithmetic is not None
            return kernel, arithmetic
    refusals = []
    rows = [row for row in registry.kernels(op, target.arch) if row.emulated or not target.emulated]
    for row in rows:
        module, arithmetic = registry.load(row.name), registry.invariant(row.name)
        if arithmetic is None:
            refusals.append(f"{row.name}: {_NOT_INVARIANT}")
            continue
        left = [m for m in _TOKENS if registry.config_of(row.name, replace(problem, m=m), arithmetic) is None]
        if not left:
            return row.name, arithmetic
        at = replace(problem, m=left[0])
        why = module.supports(at, registry.default_config(module, at)) or f"no config sums {arithmetic}"
        refusals.append(f"{row.name}: {why}")
    return refusals


def _unsupported(op: str, problem: Problem | None, target: Target, refusals: list[str]) -> str:
    what = f"{op} ({problem})" if problem is not None else op
    if refusals:
        return f"{what} on {target.arch}: no kernel supports it: {'; '.join(refusals)}"
    elsewhere = sorted({a for k in registry.kernels(op) for a in k.archs})
    have = f"kernels exist for {', '.join(elsewhere)}" if elsewhere else "no GPU kernel exists yet"
    return (
        f"{what} on {target.arch}: {have}; run it on CPU tensors, or ask for the reference with "
        f'fp4suite.override(op="{op}", kernel="reference")'
    )


def tables(target: Target) -> list[tuple[str, Path]]:
    """The tables that are asked on `target`, in order, each with the words that say which it is.

    Raises TableError if FP4SUITE_TABLE names none, or one of another architecture.
    """
    return list(_tables(target, _user_table, env.table_path()))


def _tables(target: Target, user: Path | None, from_env: Path | None) -> Iterator[tuple[str, Path]]:
    """As `tables`, one by one."""
    shipped = table.shipped_dir()
    for label, path in (
        ("table", user),
        ("table of FP4SUITE_TABLE", from_env),
        ("device table", shipped / f"{target.device}.json"),
        ("architecture table", shipped / f"{target.arch}.json"),
    ):
        if path is not None and (path.exists() or not label.startswith(("device", "arch"))):
            if path is from_env:
                _check_from_env(path, target)
            yield label, path


def _check_from_env(path: Path, target: Target) -> None:
    try:
        t, _ = _index(path)
    except TableError as e:
        raise TableError(f"FP4SUITE_TABLE: {e}") from e
    if target.arch not in (t.arch, "cpu"):
        raise TableError(f"FP4SUITE_TABLE: {_of_another(path, t, target)}")


def _of_another(path: Path, t: table.Table, target: Target) -> str:
    return f"{path} is of {t.device} ({t.arch}); this is {target.device} ({target.arch})"


@functools.cache
def _index(path: Path) -> tuple[table.Table, dict[tuple[Any, ...], list[table.Entry]]]:
    """A table's entries by everything but m."""
    t = table.read(path)
    by_rest: dict[tuple[Any, ...], list[table.Entry]] = {}
    for e in t.entries:
        by_rest.setdefault(_rest(e.op, e.problem), []).append(e)
    return t, by_rest


def _rest(op: str, dims: dict[str, int | str]) -> tuple[Any, ...]:
    return (op, *sorted((k, v) for k, v in dims.items() if k != "m"))


def _entries(path: Path, op: str, problem: Problem, target: Target) -> Iterator[tuple[table.Entry, ModuleType, Any]]:
    """A table's entries that differ from `problem` in m alone, the nearest first, with kernel and config."""
    t, by_rest = _index(path)
    if t.arch != target.arch:
        raise TableError(_of_another(path, t, target))
    dims = problem.dims()
    m = problem.m
    entries = by_rest.get(_rest(op, dims), [])
    for e in sorted(
        entries,
        key=lambda e: (
            abs(math.log2(max(m, 1) / max(int(e.problem["m"]), 1))),
            int(e.problem["m"]),
            not e.invariant,
        ),
    ):
        try:
            module = registry.load(e.kernel)
            config = registry.make_config(module, e.config)
        except ValueError as why:  # the table is older than the kernel: say so, and go on
            log.warning("%s: entry for %s %s is out of date: %s", path, op, e.problem, why)
            continue
        row = registry.find(e.kernel)
        if target.arch in row.archs and (row.emulated or not target.emulated):
            yield e, module, config


def _from_table(
    label: str, path: Path, op: str, problem: Problem, target: Target, agreed: tuple[str, str] | None
) -> Choice | None:
    """The entry of this problem, else of the nearest m whose config supports it, else such a one that was measured with
    an output of another type.

    A prediction for a kernel that has changed since says nothing: the kernel's default knows better. So it does of an m
    that is not `alike` to that of the entry, where the kernel says what is.

    agreed: kernel and arithmetic in batch-invariant mode. Entries that were not tuned for it then serve half to twice
    their m alone: far from it the kernel's default in this arithmetic is better.
    """
    for e, module, config in itertools.chain(
        _entries(path, op, problem, target),
        *((x for x in _entries(path, op, p, target) if x[0].measured) for p in _other_outputs(problem)),
    ):
        changed = e.source_hash != registry.source_hash(e.kernel)
        if module.supports(problem, config) is not None or (changed and not e.measured):
            continue
        if agreed is None:
            if e.invariant or not registry.alike(e.kernel, config, problem.m, int(e.problem["m"])):
                continue
        elif agreed != (e.kernel, registry.arithmetic(e.kernel, problem, config)) or not (
            e.invariant or 0.5 <= int(e.problem["m"]) / max(1, problem.m) <= 2
        ):
            continue
        near = "" if e.problem["m"] == problem.m else f", nearest m={e.problem['m']}"
        near += "" if e.problem.get("out") == problem.dims().get("out") else f", of out={e.problem['out']}"
        how = "measured" if e.measured else "predicted"
        stale = ", kernel changed since" if changed else ""
        return Choice(op, problem, e.kernel, config, f"{label} {path.stem} ({how}{near}{stale})")
    return None


def _other_outputs(problem: Problem) -> Iterator[Problem]:
    """A GEMM with an output that takes another way out of the same loop over k."""
    if isinstance(problem, GemmProblem):
        yield from (replace(problem, out=out) for out in ("bf16", "fp32") if out != problem.out)
