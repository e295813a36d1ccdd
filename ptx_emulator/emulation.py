"""`emulate(arch)`: functions of `cute.compile`, called with CPU tensors, run their host code as compiled and their
kernels here.

A compiled function's host code is linked a second time, against the stand-in runtime; the function itself stays as it
was, so that one compiled inside can be launched on a GPU outside. Its PTX must have been kept, which `emulate` sees to
for whatever is compiled inside.
"""

import contextlib
import ctypes
import gc
import itertools
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .api import Loaded, load
from .cubin import registers
from .errors import Fault
from .hazards import Checks
from .machine import SCHEDULES, Dim3, Launch, run_together
from .memory import GlobalMemory
from .numbers import Array
from .runtime import (
    COOPERATIVE_LAUNCH_TOO_LARGE,
    PREFIX,
    SM_COUNTS,
    SYMBOLS,
    Runtime,
    binding,
    resident_ctas,
)
from .statistics import Statistics

ARCHS = ("sm_90a", "sm_100a")
_TWIN = "_ptx_emulator_twin"
_NO_KERNELS = ".version 8.8\n.target {}\n.address_size 64\n"  # of a function that is host code alone
_MULTICAST_ALIGNMENT = 4096
_active: list["Device"] = []
# DLPack: where a capsule of this name holds its DLDeviceType, in DLManagedTensor and DLManagedTensorVersioned
_DLPACK_DEVICE = {b"dltensor": 8, b"dltensor_versioned": 40}
_DL_CPU, _DL_CUDA = 1, 2


class Device:
    """What stands in for a GPU. launches: statistics of every kernel launch, in order."""

    def __init__(
        self, arch: str, schedule: str, seed: int | None, races: Checks, rewrite: Callable[[str], str] | None = None
    ):
        self.arch, self.schedule, self.seed, self.races, self.rewrite = arch, schedule, seed, races, rewrite
        self.processes = 1
        self.launches: list[Statistics] = []
        self.runtime = Runtime(arch, self._launch)
        self._kernels: Loaded | None = None
        self._registers: dict[str, int] = {}
        self._allowed: list[tuple[int, int, str]] = []
        self._multicasts: list[tuple[Array, Sequence[Array]]] = []
        self._together: list[Launch] | None = None
        self._launched = False  # by the call that is being carried out

    def multicast(self, parts: Sequence[Array]) -> Array:
        """Bytes whose addresses stand for those of each of `parts`, arrays of one size in several devices' memory:
        multimem instructions and TMA stores there act on all of them. The bytes themselves hold nothing."""
        size = parts[0].nbytes
        if any(part.nbytes != size or not part.flags.c_contiguous for part in parts):
            raise ValueError("a multicast object needs contiguous arrays of one size")
        raw = np.zeros(size + _MULTICAST_ALIGNMENT, np.uint8)
        start = -_address(raw) % _MULTICAST_ALIGNMENT
        window = raw[start : start + size]
        self._multicasts.append((window, parts))
        return window

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Launches inside, one a call, run when it ends, with all of their clusters at once: as on several devices,
        whose kernels may wait for each other. Raises what a launch raises."""
        if self._together is not None:
            raise ValueError("together() inside of together()")
        self._together = []
        try:
            yield
            if self._together:
                run_together(self._together)
                self.launches.extend(launch.statistics for launch in self._together)
        finally:
            self._together = None

    def allow(self, data: Array) -> None:
        """Let kernels reach an array that no live torch tensor holds."""
        self._allowed.append((data.__array_interface__["data"][0], data.nbytes, "array"))

    def call(self, function: Any, exe_args: list[Any]) -> Any:
        """Run a compiled function. Raises what the emulator raised."""
        ptx = getattr(function, "__ptx__", None) if function.has_gpu_module else _NO_KERNELS.format(self.arch)
        if not ptx:
            raise Fault(
                f"{function.function_name} was compiled without keeping its PTX: compile it inside of emulate(), "
                "or clear the cache that holds it"
            )
        twin = _twin(function, str(ptx), self.arch)
        bound, before = binding(), binding().runtime
        bound.runtime, self.runtime.error = self.runtime, None
        self._kernels = load(self.rewrite(str(ptx))) if self.rewrite else twin.kernels
        self._registers = {} if self.rewrite else twin.registers
        self.runtime.names = twin.names
        self._launched = False
        try:
            return twin.run(exe_args)
        except Exception:
            if self.runtime.error is not None:
                raise self.runtime.error from None
            raise
        finally:
            bound.runtime = before

    def _launch(
        self, name: str, grid: Dim3, block: Dim3, cluster: Dim3, shared: int, params: int, cooperative: bool
    ) -> int:
        assert self._kernels is not None
        program = self._kernels.program(name)
        memory = self._together[0].memory if self._together else self._memory()
        for data in program.globals:
            memory.add(data, "module variable")
        pointers = (ctypes.c_void_p * len(program.kernel.params)).from_address(params)
        packed = [ctypes.string_at(p, v.size) for p, v in zip(pointers, program.kernel.params, strict=True)]
        launch = Launch(
            program,
            memory,
            grid,
            block,
            packed,
            cluster=cluster,
            dynamic_shared=shared,
            schedule=self.schedule,
            seed=self.seed,
            races=self.races,
            cooperative=cooperative,
        )
        launch.statistics.registers = self._registers.get(name)
        room = resident_ctas(launch.threads, launch.shared_bytes, self._registers.get(name, 0))
        if cooperative and math.prod(grid) > room * self.runtime.multiprocessors:
            return COOPERATIVE_LAUNCH_TOO_LARGE
        if self._together is None:
            self.launches.append(launch.run(self.processes))
        elif self._launched:
            raise Fault(f"{name}: the second launch of a call, of those that run together")
        else:
            self._together.append(launch)
        self._launched = True
        return 0

    def _memory(self) -> GlobalMemory:
        memory = GlobalMemory(self._arrays)
        for window, parts in self._multicasts:
            memory.multicast(_address(window), window.nbytes, [_address(part) for part in parts])
        return memory

    def _arrays(self) -> list[tuple[int, int, str]]:
        """Memory that a kernel may touch: what live CPU tensors hold, and what was allowed."""
        found = dict.fromkeys(self._allowed)
        multicasts = {_address(window) for window, _ in self._multicasts}
        torch = sys.modules.get("torch")
        if torch is not None:
            kinds = frozenset((torch.Tensor, torch.nn.Parameter))
            objects = gc.get_objects()  # millions: told apart without a step of Python for each
            # the exact types only: asking others for their class may run code of theirs
            for x in itertools.compress(objects, map(kinds.__contains__, map(type, objects))):
                if x.device.type == "cpu" and x.layout is torch.strided:
                    storage = x.untyped_storage()
                    if storage.nbytes() and storage.data_ptr() not in multicasts:
                        found[(storage.data_ptr(), storage.nbytes(), "tensor")] = None
        return list(found)


class _Twin:
    """A compiled function's host code, linked against the stand-in runtime."""

    def __init__(self, function: Any, ptx: str, arch: str):
        from cutlass.base_dsl.jit_executor import JitExecutor
        from cutlass.cutlass_dsl import CuTeDSL
        from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitModule

        self.kernels = load(ptx)
        cubin = getattr(function, "__cubin__", None) if function.has_gpu_module else None
        self.registers = registers(cubin) if cubin else {}
        if self.kernels.arch != arch:
            raise Fault(f"{function.function_name} was compiled for {self.kernels.arch}, but {arch} is emulated")
        self.names: list[str] = []
        bound = binding()
        runtime, bound.runtime = bound.runtime, Runtime(arch, _no_launch)
        bound.runtime.names = self.names
        try:
            engine = CuTeDSL._get_dsl().compiler_provider.jit(  # run a few times: not worth optimising
                _renamed(function.ir_module), opt_level=0, shared_libs=[str(bound.path)]
            )
            self.function = object.__new__(type(function))
            self.function.__dict__.update(function.__dict__)
            entry = engine.lookup(function.function_name)
            entry.restype = ctypes.c_int32
            self.function.__dict__.update(
                engine=engine, capi_func=entry, jit_module=None, _default_executor=None, num_devices=1
            )
            if function.has_gpu_module:
                self.function._load_cuda_library()
            if bound.runtime.error:
                raise bound.runtime.error
        finally:
            bound.runtime = runtime
        module = CudaDialectJitModule(engine, entry, function.execution_args, [])
        self.executor = JitExecutor(module, None, False)

    def run(self, exe_args: list[Any]) -> Any:
        return self.executor.run_compiled_program(exe_args)


def _renamed(module: Any) -> Any:
    """The host code with every runtime symbol under a name that the real runtime library does not have."""
    from cutlass._mlir import ir

    known = set(SYMBOLS)
    text = re.sub(r"@(_cu\w+|cuda_dialect_\w+)", lambda m: f"@{PREFIX}{m[1]}" if m[1] in known else m[0], str(module))
    with module.context:
        return ir.Module.parse(text)


def _address(data: Array) -> int:
    address: int = data.__array_interface__["data"][0]
    return address


def _no_launch(*args: Any) -> int:
    raise Fault("a kernel was launched while its library was being loaded")


def _twin(function: Any, ptx: str, arch: str) -> _Twin:
    made: _Twin | None = function.__dict__.get(_TWIN)
    if made is None or made.kernels.arch != arch:
        made = function.__dict__[_TWIN] = _Twin(function, ptx, arch)
    return made


def _as_device_memory(capsule: Any) -> None:
    """Mark a DLPack tensor that is on the CPU as CUDA's, as it would be on a GPU: kernels are then compiled for global
    memory, and not for generic addresses."""
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
    api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
    for name, offset in _DLPACK_DEVICE.items():
        if api.PyCapsule_IsValid(capsule, name):
            kind = ctypes.c_int32.from_address(api.PyCapsule_GetPointer(capsule, name) + offset)
            kind.value = _DL_CUDA if kind.value == _DL_CPU else kind.value


def active() -> Device | None:
    """The innermost emulated device, if any."""
    return _active[-1] if _active else None


def _hardware(multiprocessors: int) -> dict[str, Any]:
    """What `HardwareInfo` would ask a driver."""
    return {
        "__init__": lambda self, device_id=0: None,
        "get_device_multiprocessor_count": lambda self: multiprocessors,
        "get_max_active_clusters": lambda self, cluster_size, stream=None: multiprocessors // cluster_size,
    }


@contextlib.contextmanager
def _attributes(owner: type, **values: Any) -> Iterator[None]:
    """A class with other attributes, for a while."""
    before = {name: owner.__dict__.get(name) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextlib.contextmanager
def emulate(
    arch: str,
    *,
    schedule: str = "round",
    seed: int | None = None,
    races: Checks = True,
    rewrite: Callable[[str], str] | None = None,
    multiprocessors: int | None = None,
    processes: int = 1,
) -> Iterator[Device]:
    """Run compiled CuTe DSL functions on a CPU as if on a GPU of `arch` ("sm_90a" or "sm_100a").

    races: whether accesses without an order, and missing fences, are faults; "strict": see `hazards`.
    schedule ("eager", "round" or "late") and seed choose among the orders in which warps and asynchronous work may run.
    rewrite: changes a kernel's PTX before it runs, to see what a fault would do.
    multiprocessors: how many the device says it has, by default those of a real one; a persistent kernel launched on
    few of them walks over many tiles.
    processes: over how many the clusters of a launch are spread, see `processes`.

    Raises ValueError for another architecture or schedule; inside, launches raise Fault for what a kernel does wrong.
    """
    from cutlass.cute.runtime import _Tensor
    from cutlass.cutlass_dsl import CuTeDSL, CuteExperimentalDSL
    from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitCompiledFunction
    from cutlass.utils import HardwareInfo

    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    count = SM_COUNTS[arch] if multiprocessors is None else multiprocessors
    device = Device(arch, schedule, seed, races, rewrite)
    dialects = [dsl._get_dsl().envar for dsl in (CuTeDSL, CuteExperimentalDSL)]
    device.runtime.multiprocessors, device.processes = count, processes
    kept = [{name: getattr(x, name) for name in ("keep_ptx", "keep_cubin", "dump_dir", "arch")} for x in dialects]
    load_dltensor = _Tensor.load_dltensor

    def run(self: Any, exe_args: list[Any]) -> Any:
        return device.call(self, exe_args)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # what the arguments were adapted to must live until the call is over
        exe_args, adapted = self.execution_args.generate_execution_args(args, kwargs)
        result = device.call(self, exe_args)
        del adapted
        return result

    def adapt(self: Any) -> None:
        if self._dltensor_wrapper is None:
            _as_device_memory(self._dlpack_data)
        load_dltensor(self)

    with tempfile.TemporaryDirectory(prefix="ptx-emulator-") as folder:
        for settings in dialects:
            settings.keep_ptx = settings.keep_cubin = True
            settings.dump_dir, settings.arch = folder, arch
        _active.append(device)
        try:
            with (
                _attributes(CudaDialectJitCompiledFunction, __call__=call, run_compiled_program=run),
                _attributes(HardwareInfo, **_hardware(count)),
                _attributes(_Tensor, load_dltensor=adapt),
            ):
                yield device
        finally:
            _active.pop()
            for settings, values in zip(dialects, kept, strict=True):
                for name, value in values.items():
                    setattr(settings, name, value)
