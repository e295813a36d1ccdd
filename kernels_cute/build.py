"""Compiling CuTe DSL functions for sm_90a and sm_100a on any machine, with or without a GPU.

`options(arch)` is what every kernel here passes to `cute.compile`; `build` compiles once more with PTX and cubin kept
and hands both back with what the launch asks for. Half a second to a few seconds a kernel, on the calling thread.
"""

import re
import tempfile
from collections.abc import Callable
from typing import Any, cast

from cutlass import cute

from fp4suite.arch import GPU_ARCHS
from fp4suite.built import Built

# cudaLaunchConfig_t as the compiled host code spells it: grid, block, dynamic shared memory, stream, attributes
_LAUNCH_CONFIG = r"!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
_SHARED_FIELD = re.compile(
    rf"(%\w+) = llvm\.getelementptr %\w+\[0, 2\] : \(!llvm\.ptr\) -> !llvm\.ptr, {_LAUNCH_CONFIG}"
)
_TMEM_ALLOC = re.compile(r"tcgen05\.alloc\.[\w:.]+\s+\[[^\]]+\],\s*(%?\w+);")


def options(arch: str) -> str:
    """The `options` argument of `cute.compile` for code that runs on `arch` ("sm_90a" or "sm_100a").

    Naming the architecture keeps the result independent of the GPU that happens to be here.
    """
    if arch not in GPU_ARCHS:
        raise ValueError(f"arch must be one of {', '.join(GPU_ARCHS)}, got {arch!r}")
    return f"--gpu-arch={arch}"


def build(function: Callable[..., Any], *operands: Any, arch: str) -> Built:
    """Compile a `cute.jit` function for `arch`: PTX, cubin, shared memory (bytes) and tensor memory (columns).

    operands: as for `cute.compile`, fake tensors included; nothing is launched and no GPU is asked for.

    Raises ValueError if the function launches more than one kernel, or with a size that is not known when compiling.
    """
    with tempfile.TemporaryDirectory(prefix="fp4suite-build-") as folder:
        compiled = cute.compile(
            function, *operands, options=f"{options(arch)} --keep-ptx --keep-cubin --dump-dir={folder}"
        )
    ptx, cubin = cast(str, compiled.__ptx__), cast(bytes, compiled.__cubin__)
    return Built(
        arch=arch,
        ptx=ptx,
        cubin=cubin,
        shared_bytes=_shared_bytes(str(compiled.ir_module)),
        tmem_columns=_tmem_columns(ptx),
    )


def _shared_bytes(host_ir: str) -> int:
    """Dynamic shared memory that the compiled host code puts into its one launch."""
    fields = list(_SHARED_FIELD.finditer(host_ir))
    if len(fields) != 1:
        raise ValueError(f"expected one kernel launch in the compiled function, found {len(fields)}")
    # value names start anew in every function, so stay inside the one that launches
    start, end = host_ir.rfind("llvm.func @", 0, fields[0].start()), host_ir.find("llvm.func @", fields[0].end())
    body = host_ir[start : end if end >= 0 else None]
    stored = re.search(rf"llvm\.store (%\w+), {fields[0][1]} : i64", body)
    constant = stored and re.search(rf"{stored[1]} = llvm\.mlir\.constant\((\d+) : i64\)", body)
    if not constant:
        raise ValueError("the launch's shared memory is not a constant of the compiled function")
    return int(constant[1])


def _tmem_columns(ptx: str) -> int:
    """Tensor memory columns that the kernel allocates: the operand of its tcgen05.alloc, 0 where there is none."""
    columns = set()
    for operand in _TMEM_ALLOC.findall(ptx):
        if operand.startswith("%"):
            moved = re.findall(rf"mov\.[bus]32\s+{operand},\s*(\d+);", ptx)
            if len(moved) != 1:
                raise ValueError("the kernel's tensor memory is not a constant of its PTX")
            operand = moved[0]
        columns.add(int(operand))
    return sum(columns)
