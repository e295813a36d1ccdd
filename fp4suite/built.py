"""What a compiler made of a kernel for an architecture that need not be here: PTX, cubin and their resource use.

Kernel modules return a `Built` from `build(problem, config, arch)`. `resources` reads the cubin with the cuobjdump that
Triton's package carries; nothing here needs a GPU.
"""

import functools
import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

MAX_REGISTERS = 255
MAX_SHARED_BYTES = {
    "sm_90a": 232_448,
    "sm_100a": 232_448,
}  # 227 KiB a CTA (CUDA programming guide, compute capabilities)
RESERVED_SHARED_BYTES = 1024  # of every CTA, kept by the system; cuobjdump counts them, MAX_SHARED_BYTES does not
TMEM_COLUMNS = 512  # tensor memory of one SM: 128 lanes x 512 columns of 32 bits (PTX ISA, tensor memory)


@dataclass(frozen=True, slots=True)
class Built:
    """shared_bytes is the dynamic shared memory of a launch; tmem_columns are 32-bit columns of 128 lanes."""

    arch: str
    ptx: str
    cubin: bytes
    shared_bytes: int
    tmem_columns: int = 0


@dataclass(frozen=True, slots=True)
class Resources:
    """Per thread: registers, spill_bytes (local memory and stack). Per CTA: shared_bytes, tmem_columns."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    tmem_columns: int

    def refusal(self, arch: str) -> str | None:
        """Why this does not fit or spills, or None."""
        if self.spill_bytes:
            return f"spills {self.spill_bytes} bytes a thread"
        if self.shared_bytes > MAX_SHARED_BYTES[arch]:
            return f"needs {self.shared_bytes} bytes of shared memory, {arch} has {MAX_SHARED_BYTES[arch]}"
        if self.tmem_columns > TMEM_COLUMNS:
            return f"needs {self.tmem_columns} columns of tensor memory, {arch} has {TMEM_COLUMNS}"
        return None


def resources(built: Built) -> Resources:
    """Resource use of the one kernel in `built.cubin` (the largest figures, if it holds several)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.cubin)
        f.flush()
        out = subprocess.run([cuobjdump(), "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", out)
    if not rows:
        raise RuntimeError(f"cuobjdump told no resource use for this {built.arch} cubin:\n{out}")
    reg, stack, shared, local = (max(int(row[i]) for row in rows) for i in range(4))
    return Resources(
        registers=reg,
        spill_bytes=stack + local,
        shared_bytes=max(0, shared - RESERVED_SHARED_BYTES) + built.shared_bytes,
        tmem_columns=built.tmem_columns,
    )


def sass(built: Built) -> str:
    """Disassembly of `built.cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.cubin)
        f.flush()
        return subprocess.run([cuobjdump(), "-sass", f.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def cuobjdump() -> str:
    """Path of the cuobjdump in Triton's package."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("triton is not installed: its package carries the cuobjdump that reads cubins")
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise FileNotFoundError(f"this triton carries no cuobjdump at {path}")
    return str(path)
