"""Compiling candidates for an architecture that need not be here, in parallel and only once.

What `compile_all` keeps of a build is its resource use, or why there is none, filed under everything it depends on: the
kernel's source, config, problem, architecture and compiler versions. Rejections are words of `rejection.py`. `Ahead`
has kernels compiled into the caches from which a process that times them loads them.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4suite import built, cache, env, problem as problems, registry
from fp4suite.built import Resources
from fp4suite.problem import Problem

from . import provenance, worker
from .rejection import Rejected

TIMEOUT_S = 180.0
NOW = -1  # the turn of a build that is waited for
# Of a child that only compiles. It sees the GPU, if there is one: where there is a driver and no device, CuTe DSL 4.8
# asks for its architecture, fails, and asks again for the words of the error until the stack ends: a minute a build.
COMPILES = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class Build:
    """A kernel with a config, compiled for `arch` as `problem` needs it."""

    kernel: str
    problem: Problem
    config: Any
    arch: str

    @property
    def key(self) -> str:
        """Hash of all that the result depends on.

        Of the problem that is everything but m, which every kernel reads at launch: serving would compile otherwise. A
        module that depends on less says so with `build_key(problem, config)`; its value, any repr, takes their place.
        """
        module = registry.load(self.kernel)
        dims = {name: value for name, value in self.problem.dims().items() if name != "m"}
        what = module.build_key(self.problem, self.config) if hasattr(module, "build_key") else dims
        parts = {
            "kernel": self.kernel,
            "source": registry.source_hash(self.kernel),
            "problem": repr(what),
            "config": dataclasses.asdict(self.config),
            "arch": self.arch,
            "versions": provenance.compilers(),
        }
        return cache.key(parts)


def compile_all(
    builds: Iterable[Build],
    jobs: int,
    timeout: float = TIMEOUT_S,
    patience: Callable[[], float] = lambda: math.inf,
) -> Generator[tuple[Build, Resources | Rejected], None, None]:
    """The resource use of each build, or why it has none; cached ones first, builds of one key together.

    jobs: child processes; 0 compiles here, for tests of modules that no child can import.
    patience: the seconds that there still are for compiling, builds that are under way included.
    """
    todo: dict[str, list[Build]] = {}
    for b in builds:
        todo.setdefault(b.key, []).append(b)
    for key in list(todo):
        found = load(key)
        if found is not None:
            yield from ((b, found) for b in todo.pop(key))
    keys = list(todo)
    firsts = [todo[key][0] for key in keys]
    for index, outcome in _outcomes(firsts, jobs, timeout, patience):
        result = _judge(outcome)
        store(keys[index], result)
        yield from ((b, result) for b in todo[keys[index]])


class Ahead:
    """Compiles candidates in the background, in children, while another child times those that are done.

    A kernel whose module has `precompile(problem, config)` is compiled without a GPU into the project's cache; one of
    Triton, by what its `warm` launches on `device` ("cuda:0"), into Triton's, and nothing is launched. Without a device
    those are compiled where they are timed.
    """

    def __init__(self, jobs: int, device: str | None = None, timeout: float = TIMEOUT_S) -> None:
        self._device = device
        self._pool = worker.Pool(jobs, timeout, COMPILES)
        self._begun: dict[str, tuple[Future[Rejected | None], worker.Call]] = {}

    def begin(self, build: Build, turn: int) -> "Future[Rejected | None]":
        """Ends with None once the build is in the cache, or with why it never will be.

        The lowest turn comes first: NOW for a build that is waited for, from 0 on for those that will be.
        """
        module = registry.load(build.kernel)
        what = build.kernel, build.problem.op, build.problem.dims(), dataclasses.asdict(build.config)
        job: tuple[Any, ...]
        if hasattr(module, "precompile") and env.keeps_kernels():
            job = precompile_one, *what
        elif hasattr(module, "warm") and not hasattr(module, "precompile") and self._device is not None:
            job = precompile_launches, *what, self._device
        else:
            return prepared()
        key = build.key
        if key in self._begun:
            mine, call = self._begun[key]
            if not mine.done():
                self._pool.hasten(call, turn)
            return mine
        mine = Future()
        call = self._pool.submit(turn, *job)
        self._begun[key] = mine, call
        call.future.add_done_callback(lambda f: _conclude(mine, f))
        return mine

    def leave_behind(self, turn: int) -> None:
        """Builds of turns before this one, from 0 on, are no longer wanted."""
        self._pool.leave_behind(turn)

    def close(self) -> None:
        """End everything that is still being compiled."""
        self._pool.close()


def prepared() -> "Future[Rejected | None]":
    """Of a build for which nothing is to be done ahead."""
    future: Future[Rejected | None] = Future()
    future.set_result(None)
    return future


def precompile_one(kernel: str, op: str, dims: dict[str, int | str], knobs: dict[str, Any]) -> None:
    """Runs in a child: compile into the cache."""
    module = registry.load(kernel)
    module.precompile(problems.from_dims(op, dims), registry.make_config(module, knobs))


def precompile_launches(kernel: str, op: str, dims: dict[str, int | str], knobs: dict[str, Any], device: str) -> None:
    """Runs in a child, which never launches again: what `warm` would launch is compiled into Triton's cache."""
    import torch
    import triton

    torch.cuda.set_device(device)
    triton.JITFunction.__getitem__ = lambda kernel, grid: functools.partial(kernel.warmup, grid=grid)
    module = registry.load(kernel)
    module.warm(problems.from_dims(op, dims), registry.make_config(module, knobs))


def _conclude(mine: "Future[Rejected | None]", compiled: "Future[None]") -> None:
    """What became of a build, as a rejection if it is one; an installation that does not work stays an error."""
    error = compiled.exception()
    if error is None:
        mine.set_result(None)
    elif isinstance(error, worker.WorkerDied | worker.RemoteError):
        mine.set_result(_rejection(error))
    else:
        mine.set_exception(error)


def _outcomes(
    builds: list[Build], jobs: int, timeout: float, patience: Callable[[], float]
) -> Iterator[tuple[int, Any]]:
    calls = [
        (compile_one, (b.kernel, b.problem.op, b.problem.dims(), dataclasses.asdict(b.config), b.arch)) for b in builds
    ]
    if jobs:
        # the interpreter of Triton, should someone have it on, has nothing to compile
        environment = COMPILES | {"TRITON_INTERPRET": "0"}
        yield from worker.run_all(calls, min(jobs, len(calls)), timeout, environment, patience)
        return
    for index, (function, args) in enumerate(calls):
        if patience() <= 0:
            return
        try:
            yield index, function(*args)
        except Exception as e:  # as a child would hand it over; `_judge` makes a rejection of it
            yield index, worker.RemoteError(type(e).__name__, str(e))


def compile_one(kernel: str, op: str, dims: dict[str, int | str], knobs: dict[str, Any], arch: str) -> dict[str, int]:
    """Runs in a child: build, and read the resource use."""
    module = registry.load(kernel)
    done = module.build(problems.from_dims(op, dims), registry.make_config(module, knobs), arch)
    return dataclasses.asdict(built.resources(done))


def _judge(outcome: Any) -> Resources | Rejected:
    if isinstance(outcome, worker.WorkerDied | worker.RemoteError):
        return _rejection(outcome)
    return Resources(**outcome)


def _rejection(error: worker.WorkerDied | worker.RemoteError) -> Rejected:
    if isinstance(error, worker.WorkerDied):
        return Rejected(error.reason, f"compiling: {error}")
    return Rejected("compile", f"{error.kind}: {_first_line(str(error))}")


def _first_line(text: str) -> str:
    """The first line that says something, at most 300 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:300]


def load(key: str) -> Resources | Rejected | None:
    """A kept result, or None. A file that does not parse counts as none (it is replaced)."""
    try:
        kept = json.loads(_path(key).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return Rejected(**kept["rejected"]) if "rejected" in kept else Resources(**kept["resources"])


def store(key: str, result: Resources | Rejected) -> None:
    """Keep a result. What may end differently the next time (a crash, a time-out) is not kept."""
    if isinstance(result, Rejected) and result.reason != "compile":
        return
    kind = "rejected" if isinstance(result, Rejected) else "resources"
    cache.write(_path(key), json.dumps({kind: dataclasses.asdict(result)}).encode())


def _path(key: str) -> Path:
    return cache.path("builds", key, ".json")
