"""Cases, the import of an example from a checkout, and one case run under every schedule asked for."""

import ast
import contextlib
import importlib
import io
import re
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ptx_emulator import emulate

from .operands import Expected

FOLDER = Path("examples/python/CuTeDSL")
# name -> arguments of emulate
SCHEDULES: dict[str, dict[str, Any]] = {
    "round": {"schedule": "round"},
    "late": {"schedule": "late"},
    "eager": {"schedule": "eager"},
    "seed": {"schedule": "round", "seed": 1},
}


@dataclass(frozen=True)
class Prepared:
    """run: calls the compiled example. outputs: what it must have written. inputs: kept alive as torch tensors, which
    is what the emulator lets kernels reach."""

    run: Callable[[], None]
    outputs: Sequence[Expected]
    inputs: Sequence[Any]


@dataclass(frozen=True)
class Case:
    """example: dotted path below `examples/python/CuTeDSL`. prepare(module, generator, **config) compiles it.
    device: further arguments of `emulate`. refused: of an example at fault, what the checks for races must say (a
    pattern); it then runs once more without them and must be right, but for the schedules that show its fault."""

    example: str
    prepare: Callable[..., Prepared]
    config: dict[str, Any] = field(default_factory=dict)
    arch: str = "sm_100a"
    device: dict[str, Any] = field(default_factory=dict)
    refused: str = ""
    shown: Sequence[str] = ()
    script: bool = False  # one that runs when it is imported: only what it defines is

    @property
    def name(self) -> str:
        return self.example.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.name} {' '.join(f'{k}={_short(v)}' for k, v in self.config.items())}"


def _short(value: Any) -> str:
    return "x".join(map(_short, value)) if isinstance(value, (tuple, list)) else str(value)


def import_example(cutlass: Path, name: str, script: bool = False) -> ModuleType:
    """script: without the statements between its definitions. Raises FileNotFoundError where the checkout has no such
    example."""
    root = cutlass / FOLDER
    file = root / (name.replace(".", "/") + ".py")
    if not file.is_file():
        raise FileNotFoundError(f"{cutlass} has no {file.relative_to(cutlass)}")
    for path in (root, root / "cute", file.parent):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    return _definitions(file, name) if script else importlib.import_module(name)


def _definitions(file: Path, name: str) -> ModuleType:
    tree = ast.parse(file.read_text(), str(file))
    kept = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    tree.body = [n for n in tree.body if isinstance(n, kept) or isinstance(getattr(n, "value", None), ast.Constant)]
    module = sys.modules[name] = ModuleType(name)
    module.__file__ = str(file)
    exec(compile(tree, str(file), "exec"), vars(module))
    return module


@dataclass(frozen=True)
class Outcome:
    """Of one case and schedule. problem: None where every output is right."""

    case: Case
    schedule: str
    problem: str | None
    seconds: float
    instructions: int

    def __str__(self) -> str:
        verdict = "ok" if self.problem is None else f"WRONG: {self.problem}"
        return f"{self.case} [{self.schedule}] {self.instructions} instructions {self.seconds:.1f} s {verdict}"


def run_case(cutlass: Path, case: Case, schedules: Sequence[str], report: Callable[[Outcome], None]) -> bool:
    """Compile once, run under every schedule; whether all were right. The seconds leave compilation out."""
    module = import_example(cutlass, case.example, case.script)
    with emulate(case.arch, **case.device), _silence():
        prepared = case.prepare(module, torch.Generator().manual_seed(1), **case.config)
    good = True
    for name in schedules:
        device = {**SCHEDULES[name], **case.device}
        start = time.perf_counter()
        problem, executed = _attempt(case.arch, prepared, device)
        if case.refused:
            if problem is None or not re.search(case.refused, problem):
                problem = f"it must be refused for {case.refused!r}, but: {problem}"
            else:
                problem, executed = _attempt(case.arch, prepared, {**device, "races": False})
                if name in case.shown:
                    problem = None if problem else "it must be wrong without the checks"
        report(Outcome(case, name, problem, time.perf_counter() - start, executed))
        good &= problem is None
    return good


def _attempt(arch: str, prepared: Prepared, device: dict[str, Any]) -> tuple[str | None, int]:
    """What goes wrong, or None, and the instructions carried out."""
    for output in prepared.outputs:
        output.reset()
    with emulate(arch, **device) as emulated, _silence():
        try:
            prepared.run()
            problem = next(filter(None, (o.mismatch() for o in prepared.outputs)), None)
        except Exception as e:  # the other cases still run; a note says at which PTX line the emulator failed
            problem = "\n".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", ())])
    return problem, sum(s.total for s in emulated.launches)


def _silence() -> contextlib.AbstractContextManager[Any]:
    """Nothing of what the examples print while they are compiled."""
    return contextlib.redirect_stdout(io.StringIO())


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
