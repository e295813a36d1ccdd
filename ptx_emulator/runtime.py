"""The CUDA runtime as compiled CuTe DSL host code sees it: a small shared object whose every symbol ends in `Runtime`.

It is built with the system's C compiler on first use and kept in the user's cache.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import tensormap
from .errors import Fault
from .machine import Dim3
from .memory import MAX_SHARED_BYTES

_CUDA = (
    "DeviceGetAttribute DeviceSynchronize EventCreate EventDestroy EventElapsedTime EventRecord Free FreeAsync "
    "FreeHost FuncSetAttribute GetDevice GetDeviceCount GetDeviceProperties GraphDestroy GraphExecDestroy "
    "GraphInstantiate GraphLaunch KernelSetAttributeForDevice LaunchKernel LaunchKernelEx LibraryGetGlobal "
    "LibraryGetKernel LibraryGetKernelCount LibraryGetManaged LibraryGetUnifiedFunction LibraryLoadData "
    "LibraryLoadFromFile LibraryUnload Malloc MallocAsync MallocHost MallocManaged Memcpy MemcpyAsync Memset "
    "MemsetAsync OccupancyMaxActiveBlocksPerMultiprocessor ProfilerStart ProfilerStop SetDevice StreamAddCallback "
    "StreamBeginCapture StreamCreate StreamDestroy StreamEndCapture StreamSynchronize StreamWaitEvent"
)
_DRIVER = (
    "DeviceGet KernelGetAttribute LibraryGetGlobal LibraryGetKernel LibraryGetKernelCount LibraryGetManaged "
    "LibraryGetModule LibraryGetUnifiedFunction LibraryLoadData LibraryLoadFromFile LibraryUnload TensorMapEncodeTiled"
)
_DIALECT = "assert_success get_error_name init_library_once print_on_error unload_library_once"
SYMBOLS = (
    *(f"_cuda{name}" for name in _CUDA.split()),
    *(f"_cu{name}" for name in _DRIVER.split()),
    *(f"cuda_dialect_{name}" for name in _DIALECT.split()),
)

PREFIX = "ptx_emulator_"  # of the names that the shared object exports: the real library's are in the same process
COOPERATIVE_LAUNCH_TOO_LARGE, ERROR_UNKNOWN = 720, 999  # cudaError_t
_ARGUMENTS = 12  # that the shared object hands on
_COOPERATIVE, _CLUSTER_DIMENSION = 2, 4  # cudaLaunchAttributeID
# of which these say how a launch may be placed, and what other work of the stream may see of it
_OF_NO_ACCOUNT = {0, 1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 17}
_DEVICE_ATTRIBUTES = {97: MAX_SHARED_BYTES, 10: 32, 1: 1024, 39: 2048, 8: 49_152, 81: 233_472}
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76
SM_COUNTS = {"sm_90a": 132, "sm_100a": 148}


class _Config(ctypes.Structure):
    """cudaLaunchConfig_t"""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
    )


class _Attribute(ctypes.Structure):
    """cudaLaunchAttribute: an id, and a value of 64 bytes of which a cluster's dimensions fill the first twelve."""

    _fields_ = (("id", ctypes.c_int32), ("pad", ctypes.c_uint32), ("value", ctypes.c_uint32 * 16))


# name, grid, block, cluster, shared bytes, address of the array of pointers to parameters, whether it is cooperative;
# returns a cudaError_t
LaunchHandler = Callable[[str, Dim3, Dim3, Dim3, int, int, bool], int]


def resident_ctas(threads: int, shared: int, registers: int) -> int:
    """How many CTAs fit on one SM (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability").
    registers: of a thread."""
    warps = -(-threads // 32)
    most = min(64 // warps, 32, _DEVICE_ATTRIBUTES[81] // (shared + 1024))
    return min(most, 65_536 // (warps * 32 * -(-registers // 8) * 8)) if registers else most


class Runtime:
    """Answers the calls of host code for one architecture; an exception is kept in `error` and returned as a code."""

    def __init__(self, arch: str, launch: LaunchHandler):
        self.arch, self.launch = arch, launch
        self.multiprocessors = SM_COUNTS[arch]
        self.error: BaseException | None = None
        self.names: list[str] = []

    def call(self, index: int, arguments: Sequence[int]) -> int:
        try:
            return self.answer(SYMBOLS[index], arguments)
        except BaseException as e:  # no exception passes through compiled code; `error` brings it back
            self.error = self.error or e
            return ERROR_UNKNOWN

    def answer(self, name: str, a: Sequence[int]) -> int:
        match name:
            case "_cudaLaunchKernelEx":
                config = _Config.from_address(a[0])
                cluster, cooperative = (1, 1, 1), False
                for n in range(config.count):
                    attribute = _Attribute.from_address(config.attributes + n * ctypes.sizeof(_Attribute))
                    if attribute.id == _CLUSTER_DIMENSION:
                        x, y, z = attribute.value[:3]
                        cluster = (x, y, z)
                    elif attribute.id == _COOPERATIVE:
                        cooperative = bool(attribute.value[0])
                    elif attribute.id not in _OF_NO_ACCOUNT:
                        raise Fault(
                            f"host code launches with attribute {attribute.id}, which the emulator does not know"
                        )
                (gx, gy, gz), (bx, by, bz) = config.grid, config.block
                name = self.names[a[1] - 1]
                return self.launch(name, (gx, gy, gz), (bx, by, bz), cluster, config.shared, a[2], cooperative)
            case "_cudaLaunchKernel":
                grid, block = _u32(a[1:4]), _u32(a[4:7])
                return self.launch(self.names[a[0] - 1], grid, block, (1, 1, 1), a[8], a[7], False)
            case "_cudaLibraryGetKernel":
                self.names.append(ctypes.string_at(a[2]).decode())
                ctypes.c_void_p.from_address(a[0]).value = len(self.names)
            case "_cudaLibraryLoadData":
                ctypes.c_void_p.from_address(a[0]).value = 1
            case "_cuTensorMapEncodeTiled":
                ctypes.memmove(a[0], _tensor_map(a), tensormap.BYTES)
            case "_cudaGetDevice":
                ctypes.c_int32.from_address(a[0]).value = 0
            case "_cudaGetDeviceCount":
                ctypes.c_int32.from_address(a[0]).value = 1
            case "_cudaDeviceGetAttribute":
                ctypes.c_int32.from_address(a[0]).value = self.attribute(a[1] & 0xFFFFFFFF)
            case "_cuKernelGetAttribute" | "_cudaOccupancyMaxActiveBlocksPerMultiprocessor":
                # static shared memory, or CTAs an SM takes
                ctypes.c_int32.from_address(a[0]).value = int(name != "_cuKernelGetAttribute")
            case (
                "_cudaSetDevice"
                | "_cudaFuncSetAttribute"
                | "_cudaKernelSetAttributeForDevice"
                | "_cudaDeviceSynchronize"
                | "_cudaStreamSynchronize"
                | "_cudaLibraryUnload"
                | "cuda_dialect_assert_success"
                | "cuda_dialect_print_on_error"
            ):
                pass
            case _:
                raise Fault(f"host code calls {name.lstrip('_')}, which the emulator does not stand in for")
        return 0

    def attribute(self, number: int) -> int:
        if number == _MULTIPROCESSORS:
            return self.multiprocessors
        if number in (_MAJOR, _MINOR):
            return {_MAJOR: {"sm_90a": 9, "sm_100a": 10}[self.arch], _MINOR: 0}[number]
        if number not in _DEVICE_ATTRIBUTES:
            raise Fault(f"host code asks for device attribute {number}, which the emulator does not know")
        return _DEVICE_ATTRIBUTES[number]


def _tensor_map(a: Sequence[int]) -> bytes:
    """The map that the driver would encode (CUDA driver API, "cuTensorMapEncodeTiled"). Raises Fault."""
    kind, rank, interleave, swizzle, fill = (a[n] & 0xFFFFFFFF for n in (1, 2, 8, 9, 11))
    if not (kind < len(tensormap.DRIVER_ELEMENTS) and swizzle < len(tensormap.DRIVER_SWIZZLES) and 1 <= rank <= 5):
        raise Fault(f"cuTensorMapEncodeTiled with element type {kind}, rank {rank} and swizzle {swizzle}")
    raw = tensormap.encode(
        a[3],
        tensormap.DRIVER_ELEMENTS[kind],
        _numbers(ctypes.c_uint64, a[4], rank),
        _numbers(ctypes.c_uint64, a[5], rank - 1),
        _numbers(ctypes.c_uint32, a[6], rank),
        tensormap.DRIVER_SWIZZLES[swizzle],
        steps=_numbers(ctypes.c_uint32, a[7], rank),
        interleave=tensormap.INTERLEAVES[interleave],
        nan=bool(fill),
    )
    tensormap.decode(np.frombuffer(raw, np.uint8))
    return raw


def _numbers(kind: Any, address: int, count: int) -> tuple[int, ...]:
    return tuple((kind * count).from_address(address)) if count else ()


def _u32(values: Sequence[int]) -> Dim3:
    x, y, z = (v & 0xFFFFFFFF for v in values)
    return x, y, z


_CALL = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.POINTER(ctypes.c_long))


class _Binding:
    """The shared object's one pointer, and whom it leads to."""

    def __init__(self) -> None:
        self.path = _built()
        self.library = ctypes.CDLL(str(self.path))
        self.runtime: Runtime | None = None
        self.callback = _CALL(self._call)  # must outlive the library
        pointer = ctypes.c_void_p.in_dll(self.library, "ptx_emulator_call")
        pointer.value = ctypes.cast(self.callback, ctypes.c_void_p).value

    def _call(self, index: int, arguments: Any) -> int:
        if self.runtime is None:
            return ERROR_UNKNOWN
        return self.runtime.call(index, [arguments[n] & 0xFFFFFFFFFFFFFFFF for n in range(_ARGUMENTS)])


@functools.cache
def binding() -> _Binding:
    """Built and loaded once a process. Raises RuntimeError where there is no C compiler."""
    return _Binding()


def _built() -> Path:
    source = (Path(__file__).parent / "runtime.c").read_text()
    symbols = " ".join(f"ENTRY({n}, {PREFIX}{name})" for n, name in enumerate(SYMBOLS))
    digest = hashlib.sha256((source + symbols).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ptx_emulator"
    path = cache / f"runtime-{digest}.so"
    if path.exists():
        return path
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        raise RuntimeError("emulate() needs a C compiler (cc, gcc or clang) once, to build a shared object of 20 lines")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        text, made = Path(folder, "runtime.c"), Path(folder, "runtime.so")
        text.write_text(source)
        command = [compiler, "-shared", "-fPIC", "-O1", f"-DSYMBOLS={symbols}", "-o", str(made), str(text)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[:4])} ... failed:\n{done.stderr}")
        made.replace(path)
    return path
