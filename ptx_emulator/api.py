"""Launching kernels of a PTX text on numpy arrays."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .hazards import Checks
from .machine import Dim3, Launch
from .memory import GlobalMemory
from .numbers import Array
from .parser import Module, Variable, parse
from .program import Program
from .statistics import Statistics

Argument = Array | np.generic | int | float | bytes


class Loaded:
    """A PTX module for one architecture, which is its target's unless named."""

    def __init__(self, ptx: str, arch: str | None = None):
        self.module: Module = parse(ptx)
        self.arch = arch or self.module.target
        self._programs: dict[str, Program] = {}

    @cached_property
    def kernels(self) -> list[str]:
        return list(self.module.kernels)

    def program(self, name: str | None = None) -> Program:
        """The decoded kernel. Raises ValueError for a name that is not there."""
        if name is None:
            name = self.module.only_kernel().name
        if name not in self.module.kernels:
            raise ValueError(f"no kernel {name!r}; there are {', '.join(self.kernels)}")
        if name not in self._programs:
            self._programs[name] = Program(self.module.kernels[name], self.arch)
        return self._programs[name]

    def launch(
        self,
        name: str | None = None,
        *,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        cluster: Sequence[int] = (1, 1, 1),
        shared: int = 0,
        schedule: str = "round",
        seed: int | None = None,
        races: Checks = True,
        processes: int = 1,
        cooperative: bool = False,
        memory: GlobalMemory | None = None,
    ) -> Statistics:
        """Run a kernel; arrays among `args` are passed by address and written in place.

        args: contiguous arrays, numpy scalars, ints and floats (as wide as the parameter), or raw bytes.
        shared: bytes of dynamic shared memory. schedule and seed: see `machine`. races: look for data races, True or
        "strict", see `hazards`. processes: over how many the clusters are spread, see `processes`. cooperative: all
        clusters run at once. memory: arrays that the kernel reaches through pointers in memory must be known to it
        already.

        Raises Fault for what the kernel does wrong, ValueError or TypeError for arguments that do not fit.
        """
        launch = self.prepare(
            name,
            grid=grid,
            block=block,
            args=args,
            cluster=cluster,
            shared=shared,
            schedule=schedule,
            seed=seed,
            races=races,
            cooperative=cooperative,
            memory=memory,
        )
        return launch.run(processes)

    def prepare(
        self,
        name: str | None = None,
        *,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Argument],
        cluster: Sequence[int] = (1, 1, 1),
        shared: int = 0,
        schedule: str = "round",
        seed: int | None = None,
        races: Checks = True,
        cooperative: bool = False,
        memory: GlobalMemory | None = None,
    ) -> Launch:
        """A launch that is yet to run, alone or with others (`run_together`), which then share its memory."""
        program = self.program(name)
        memory = memory or GlobalMemory()
        for data in program.globals:
            memory.add(data, "module variable")
        params = program.kernel.params
        if len(args) != len(params):
            raise ValueError(f"{program.kernel.name} takes {len(params)} arguments, got {len(args)}")
        packed = [_pack(a, v, memory) for a, v in zip(args, params, strict=True)]
        return Launch(
            program,
            memory,
            _dim3(grid),
            _dim3(block),
            packed,
            cluster=_dim3(cluster),
            dynamic_shared=shared,
            schedule=schedule,
            seed=seed,
            races=races,
            cooperative=cooperative,
        )


def load(ptx: str, arch: str | None = None) -> Loaded:
    """Parse a PTX module. Raises PtxSyntaxError."""
    return Loaded(ptx, arch)


def _dim3(x: Sequence[int]) -> Dim3:
    a, b, c = (*map(int, x), 1, 1, 1)[:3]
    return a, b, c


def _pack(value: Argument, param: Variable, memory: GlobalMemory) -> bytes:
    if isinstance(value, np.ndarray):
        if not value.flags.c_contiguous:
            raise ValueError(f"the array for {param.name} is not contiguous")
        return memory.add(value, param.name, bool(value.flags.writeable)).to_bytes(8, "little")
    if isinstance(value, bytes):
        return value
    if isinstance(value, np.generic):
        return value.tobytes()
    if isinstance(value, float):
        return np.array(value, np.float32 if param.size == 4 else np.float64).tobytes()
    return (int(value) % (1 << 8 * param.size)).to_bytes(param.size, "little")
