"""Records the golden vectors on a GPU of the cases' architecture.

    python -m tests.ptx_emulator.golden.record --out FILE [--only PART] [--missing]

--missing records the cases that the stored record lacks or has of another kernel, and keeps the stored ones.

The driver compiles each kernel; libcuda and numpy are all it takes. The cases run in a process of their own: one that
faults or hangs costs its process and no more. What the driver refused, or what failed, is listed with the driver's
words in FILE.log, and in the record.
"""

import argparse
import ast
import ctypes
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import catalogue
from .catalogue import Buffer, Case, Map
from .store import FILE, Record, Writer

CASE_SECONDS = 20
LOG_BYTES = 8192
JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES = 5, 6
MAX_DYNAMIC_SHARED = 8
SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
INTERLEAVE = {0: 0, 16: 1, 32: 2}


class CudaError(RuntimeError):
    pass


class Driver:
    """The calls of libcuda that a launch needs. Raises CudaError."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)
        name = ctypes.create_string_buffer(128)
        self.call("cuDeviceGetName", name, 128, device)
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        self.about = {"device": name.value.decode(), "driver": version.value}

    def call(self, name: str, *args: Any) -> None:
        code = getattr(self.lib, name)(*args)
        if code:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorName(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'?').decode()}")

    def function(self, ptx: str, shared: int) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
        module, found, log = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.create_string_buffer(LOG_BYTES)
        options = (ctypes.c_int * 2)(JIT_ERROR_LOG, JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), LOG_BYTES)
        try:
            self.call("cuModuleLoadDataEx", ctypes.byref(module), ptx.encode() + b"\0", 2, options, values)
        except CudaError as e:
            raise CudaError(f"{e}: {log.value.decode(errors='replace')}") from None
        self.call("cuModuleGetFunction", ctypes.byref(found), module, b"k")
        if shared:
            self.call("cuFuncSetAttribute", found, MAX_DYNAMIC_SHARED, shared)
        return module, found

    def upload(self, data: np.ndarray) -> int:
        pointer = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(data.nbytes, 1)))
        source = np.ascontiguousarray(data)
        self.call("cuMemcpyHtoD_v2", pointer, ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(data.nbytes))
        return pointer.value

    def download(self, pointer: int, like: np.ndarray) -> np.ndarray:
        found = np.empty_like(like)
        self.call(
            "cuMemcpyDtoH_v2",
            ctypes.c_void_p(found.ctypes.data),
            ctypes.c_uint64(pointer),
            ctypes.c_size_t(like.nbytes),
        )
        return found

    def tensor_map(self, m: Map, address: int) -> bytes:
        raw = (ctypes.c_uint8 * 256)()
        at = ctypes.addressof(raw)
        at += -at % 64
        rank = len(m.sizes)
        self.call(
            "cuTensorMapEncodeTiled",
            ctypes.c_void_p(at),
            m.kind,
            ctypes.c_uint32(rank),
            ctypes.c_void_p(address),
            (ctypes.c_uint64 * rank)(*m.sizes),
            (ctypes.c_uint64 * max(rank - 1, 1))(*m.strides),
            (ctypes.c_uint32 * rank)(*m.box),
            (ctypes.c_uint32 * rank)(*(m.steps or (1,) * rank)),
            INTERLEAVE[m.interleave],
            SWIZZLE[m.swizzle],
            0,
            int(m.fill),
        )
        return ctypes.string_at(at, 128)

    def run(self, case: Case) -> tuple[dict[int, np.ndarray], dict[int, tuple[int, bytes]]]:
        """Outputs and tensor maps by argument."""
        module, function = self.function(case.ptx, case.shared)
        pointers = {n: self.upload(a.data) for n, a in enumerate(case.args) if isinstance(a, Buffer)}
        maps = {
            n: (pointers[a.buffer], self.tensor_map(a, pointers[a.buffer]))
            for n, a in enumerate(case.args)
            if isinstance(a, Map)
        }
        held: list[Any] = []
        for n, a in enumerate(case.args):
            if isinstance(a, Buffer):
                held.append(ctypes.c_uint64(pointers[n]))
            elif isinstance(a, Map):
                # the driver copies 128 bytes from where the argument points to
                held.append((ctypes.c_uint8 * 128).from_buffer_copy(maps[n][1]))
            else:
                held.append(ctypes.c_uint32(a & 0xFFFFFFFF))
        args = (ctypes.c_void_p * len(held))(*(ctypes.addressof(x) for x in held))
        self.call("cuLaunchKernel", function, case.grid, 1, 1, case.block, 1, 1, case.shared, None, args, None)
        self.call("cuCtxSynchronize")
        after = {
            n: self.download(pointers[n], a.data) for n, a in enumerate(case.args) if isinstance(a, Buffer) and a.out
        }
        for pointer in pointers.values():
            self.call("cuMemFree_v2", ctypes.c_uint64(pointer))
        self.call("cuModuleUnload", module)
        return after, maps


def work(folder: Path) -> None:
    """Cases named on standard input; one line per case is printed when it is done."""
    driver = Driver()
    print("about", repr(driver.about), flush=True)
    for line in sys.stdin:
        name = line.strip()
        try:
            found: Any = driver.run(catalogue.CASES[name])
        except CudaError as e:
            found = str(e)
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(found))
        print("done", name, flush=True)
        if isinstance(found, str) and "ModuleLoad" not in found and "TensorMap" not in found:
            return  # the context is lost


class Worker:
    def __init__(self, folder: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, "--worker", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.about = self.line(60)[len("about ") :]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put("")

    def line(self, seconds: float) -> str:
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return ""

    def ask(self, name: str) -> bool:
        """Whether the case came to an end."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        return self.line(CASE_SECONDS) == f"done {name}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def about_both(stored: str, here: str) -> str:
    """Devices and drivers of a record that is added to. Raises CudaError if the device is another one."""
    if ast.literal_eval(here)["device"] not in stored:
        raise CudaError(f"the stored record is of {stored}, not of {here}")
    return stored if here in stored else f"{stored}, {here}"


def record(path: Path, only: str, missing: bool) -> None:
    started = time.monotonic()
    stored = Record() if missing else None
    kept = [c for c in catalogue.CASES.values() if stored and stored.is_of(c)]
    known = {c.name for c in kept}
    cases = [c for c in catalogue.CASES.values() if only in c.name and c.name not in known]
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        worker = Worker(folder)
        if not worker.about:
            raise CudaError("no worker could start")
        writer = Writer(gpu=worker.about)
        if stored:
            writer = Writer(gpu=about_both(stored.index["about"]["gpu"], worker.about))
            for case in kept:
                writer.keep(stored, case.name)
        for case in cases:
            if not worker.about:
                raise CudaError("no worker could start")
            ended = worker.ask(case.name)
            result = folder / f"{case.name}.pickle"
            found: Any = pickle.loads(result.read_bytes()) if result.exists() else "crashed or hung"
            if isinstance(found, str):
                failed[case.name] = found
                print(f"{case.name}: {found}", flush=True)
            else:
                after, maps = found
                writer.case(case, [a.data for a in case.args if isinstance(a, Buffer)], after, maps)
            if not ended or (isinstance(found, str) and "ModuleLoad" not in found and "TensorMap" not in found):
                worker.end()
                worker = Worker(folder)
        worker.end()
    writer.index["refused"] = failed
    writer.save(path)
    Path(f"{path}.log").write_text("".join(f"{name}: {why}\n" for name, why in failed.items()))
    seconds = time.monotonic() - started
    print(
        f"{len(cases) - len(failed)} of {len(cases)} cases recorded in {seconds:.0f} s, {path.stat().st_size} bytes, "
        f"{len(failed)} refused or failed"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--missing", action="store_true", help="keep what is stored of the same kernels")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker)
    else:
        record(args.out, args.only, args.missing)


if __name__ == "__main__":
    main()
