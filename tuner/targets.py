"""What a command is about: the devices, the models' configs and the ops, as named on the command line."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from fp4suite import arch as archs, dispatch, problem as known, shapes, table
from fp4suite.formats import WeightLayout
from fp4suite.layouts import Order
from fp4suite.problem import PROBLEMS, Act, GemmProblem, Problem
from fp4suite.table import Entry

from . import measure, worker


@dataclass(frozen=True, slots=True)
class Target:
    """cuda: the torch device that measures, or None where the architecture's table is predicted."""

    arch: str
    device: str
    cuda: str | None = None


@dataclass(frozen=True, slots=True)
class Stale:
    """What is stale (`table.is_stale`) in a table, of the ops and numbers of tokens that were asked for.

    entries: how many there are of those, stale or not. problems: of the stale ones. invariant: how many more are stale
    for batch-invariant mode, where all m of a weight go together.
    """

    path: Path
    entries: int
    problems: tuple[Problem, ...]
    invariant: int


def targets(arch: str | None, device: str | None) -> list[Target]:
    """The GPU that is here, or else the architectures to predict for. An `arch` that is not here is predicted.

    Raises ValueError for a device that does not exist.
    """
    if device is not None and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} sees no GPU")
    if torch.cuda.is_available():
        cuda = device or "cuda:0"
        child = worker.Worker()  # so that this process never holds a CUDA context
        try:
            found = child.call(measure.describe, cuda, timeout=120.0)
        finally:
            child.close()
        if arch in (None, found["arch"]):
            return [Target(found["arch"], found["device"], cuda)]
    return [Target(a, a) for a in archs.GPU_ARCHS if arch in (None, a)]


def load_configs(names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """Configs by the name of a shipped one, a config.json, or a folder that holds one.

    Raises ValueError naming what was not found or is not JSON.
    """
    shipped = Path(__file__).resolve().parent.parent / "model" / "configs"
    found: dict[str, Mapping[str, Any]] = {}
    for name in names:
        path = Path(name)
        if (shipped / f"{name}.json").exists():
            path = shipped / f"{name}.json"
        elif path.is_dir():
            path = path / "config.json"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in shipped.glob("*.json")))
            raise ValueError(
                f"--layers-of {name}: neither a shipped config ({known}) nor a config.json or a folder with one"
            )
        try:
            found[path.stem if path.parent == shipped else (path.parent.name or path.stem)] = msgspec.json.decode(
                path.read_bytes(), type=dict[str, Any]
            )
        except msgspec.DecodeError as e:
            raise ValueError(f"{path}: not a config.json ({e})") from e
    return found


def problems(
    configs: Mapping[str, Mapping[str, Any]],
    op: str,
    target: Target,
    m: Sequence[int],
    tp: int,
    order: Order | None = None,
    act: Act | None = None,
) -> dict[Problem, tuple[list[str], int]]:
    """Each problem of an op once, with the layers ("pro.q_b") of all models that have it and the calls of a pass each.

    Weights of a GEMM lie in `order` if they can; by default as a loader lays them out (`dispatch.weight_layout`). act:
    format of a GEMM's activations, by default what the architecture runs. A GEMM that a layer wants in FP32 is there in
    BF16 too, which is what the op gives unless asked.
    """
    joined: dict[Problem, tuple[list[str], int]] = {}
    for model, config in configs.items():
        for p in shapes.problems(config, op, arch=target.arch, m=m, tp=tp):
            asked = replace(p.problem, act=act) if act is not None and isinstance(p.problem, GemmProblem) else p.problem
            problem = _laid_out(asked, target, order)
            wanted = {problem: p.count}
            if isinstance(problem, GemmProblem) and problem.out == "fp32":
                wanted[replace(problem, out="bf16")] = 0
            for one, count in wanted.items():
                names, calls = joined.get(one, ([], 0))
                joined[one] = (names + [f"{model}.{name}" for name in p.layers], calls + count)
    return joined


def stale(path: Path, entries: Sequence[Entry], ops: Sequence[str], m: Sequence[int]) -> Stale:
    """What is stale among the entries of the table at `path`, of these ops, and of these numbers of tokens, if any."""
    asked = [e for e in entries if e.op in ops and (not m or e.problem["m"] in m)]
    changed = [e for e in asked if table.is_stale(e)]
    found = tuple(known.from_dims(e.op, e.problem) for e in changed if not e.invariant)
    return Stale(path, len(asked), found, len(changed) - len(found))


def stale_beside(paths: Sequence[Path], ops: Sequence[str], m: Sequence[int]) -> list[Stale]:
    """As `stale`, of the other tables in the folders of these; what cannot be read is for `check` to say."""
    found = []
    for other in sorted({other for path in paths for other in path.parent.glob("*.json")} - set(paths)):
        with contextlib.suppress(ValueError):
            found.append(stale(other, table.read(other).entries, ops, m))
    return [s for s in found if s.problems or s.invariant]


def _laid_out(problem: Problem, target: Target, order: Order | None) -> Problem:
    if not isinstance(problem, GemmProblem):
        return problem
    n, k = problem.n, problem.k
    if order is None:
        with dispatch.on_target(target.arch, target.device):
            order = dispatch.weight_layout(n, k, "cpu", act=problem.act, segments=problem.segments).order
    elif WeightLayout(order).refuses(n, k):
        order = "rows"
    return replace(problem, order=order)


def check_ops(names: Sequence[str] | None) -> tuple[str, ...]:
    """All tunable ops for none or "all", else the ones named. Raises ValueError for one that does not exist."""
    if not names or "all" in names:
        return tuple(PROBLEMS)
    for name in names:
        if name not in PROBLEMS:
            raise ValueError(f"--op must be one of {', '.join(PROBLEMS)}, got {name!r}")
    return tuple(dict.fromkeys(names))
