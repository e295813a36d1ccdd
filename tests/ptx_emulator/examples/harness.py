"""Cases, the import of an example from a checkout, and one case run under every schedule asked for."""

import importlib
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
    device: further arguments of `emulate`."""

    example: str
    prepare: Callable[..., Prepared]
    config: dict[str, Any] = field(default_factory=dict)
    arch: str = "sm_100a"
    device: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.example.rpartition(".")[2]

    def __str__(self) -> str:
        return f"{self.name} {' '.join(f'{k}={_short(v)}' for k, v in self.config.items())}"


def _short(value: Any) -> str:
    return "x".join(map(_short, value)) if isinstance(value, (tuple, list)) else str(value)


def import_example(cutlass: Path, name: str) -> ModuleType:
    """Raises FileNotFoundError where the checkout has no such example."""
    root = cutlass / FOLDER
    file = root / (name.replace(".", "/") + ".py")
    if not file.is_file():
        raise FileNotFoundError(f"{cutlass} has no {file.relative_to(cutlass)}")
    for path in (root, root / "cute", file.parent):
        if str(path) not in sys.path:
            sys.path.append(str(path))
    return importlib.import_module(name)


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
    module = import_example(cutlass, case.example)
    with emulate(case.arch, **case.device):
        prepared = case.prepare(module, torch.Generator().manual_seed(1), **case.config)
    good = True
    for name in schedules:
        for output in prepared.outputs:
            output.reset()
        start = time.perf_counter()
        with emulate(case.arch, **SCHEDULES[name], **case.device) as device:
            try:
                prepared.run()
                problem = next(filter(None, (o.mismatch() for o in prepared.outputs)), None)
            except Exception as e:  # the other cases still run; a note says at which PTX line the emulator failed
                problem = "\n".join([f"{type(e).__name__}: {e}", *getattr(e, "__notes__", ())])
        seconds = time.perf_counter() - start
        report(Outcome(case, name, problem, seconds, sum(s.total for s in device.launches)))
        good &= problem is None
    return good


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
