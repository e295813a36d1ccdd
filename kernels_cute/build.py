"""Compiling CuTe DSL functions for sm_90a and sm_100a on any machine, with or without a GPU.

`compiled` is what every kernel here launches: compiled once (half a second to a few seconds, on the calling thread) and
kept in the user's cache as the object file that CuTe DSL exports (host code with the cubin inside), from where any
process of this machine loads it in milliseconds. `build` compiles with PTX and cubin kept and hands both back with what
the launch asks for.
"""

import ast
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from cutlass import cute
from cutlass.base_dsl.common import DSLRuntimeError
from cutlass.cute.runtime import find_runtime_libraries, load_module
from cutlass.cutlass_dsl import CuTeDSL

import fp4suite
from fp4suite import cache, env, registry
from fp4suite.arch import GPU_ARCHS
from fp4suite.built import Built

log = logging.getLogger(__name__)

# cudaLaunchConfig_t as the compiled host code spells it: grid, block, dynamic shared memory, stream, attributes
_LAUNCH_CONFIG = r"!llvm\.struct<\(array<3 x i32>, array<3 x i32>, i64, ptr, ptr, i32\)>"
_SHARED_FIELD = re.compile(
    rf"(%\w+) = llvm\.getelementptr %\w+\[0, 2\] : \(!llvm\.ptr\) -> !llvm\.ptr, {_LAUNCH_CONFIG}"
)
_DIGEST_BYTES = hashlib.sha256().digest_size  # which end a kept file: linkers do not look past the last section
_TMEM_ALLOC = re.compile(r"tcgen05\.alloc\.[\w:.]+\s+\[[^\]]+\],\s*(%?\w+);")


def options(arch: str) -> str:
    """The `options` argument of `cute.compile` for code that runs on `arch` ("sm_90a" or "sm_100a").

    Naming the architecture keeps the result independent of the GPU that happens to be here.
    """
    if arch not in GPU_ARCHS:
        raise ValueError(f"arch must be one of {', '.join(GPU_ARCHS)}, got {arch!r}")
    return f"--gpu-arch={arch}"


def compiled(function: Callable[..., Any], *operands: Any, arch: str, module: str, made_for: Any) -> Any:
    """A `cute.jit` function compiled for `arch`, from the cache if any process has compiled it before.

    operands: as for `cute.compile`. module: of the kernel (its `__name__`). made_for: whatever else decides which code
    comes out, told apart by its repr.
    """
    settings = CuTeDSL._get_dsl().envar
    # a kept file holds no PTX: who has asked for it, as an emulator does, gets a function that was compiled here
    if not env.keeps_kernels() or settings.keep_ptx or settings.keep_cubin:
        return cute.compile(function, *operands, options=options(arch))
    path = _kept_path(arch, module, made_for)
    found = _load(path)
    if found is None:
        found = cute.compile(function, *operands, options=options(arch))
        _keep(found, path)
    return found


def _kept_path(arch: str, module: str, made_for: Any) -> Path:
    key = {
        "sources": _sources_hash(module),
        "made_for": repr(made_for),
        "options": options(arch),
        "settings": {k: v for k, v in os.environ.items() if k.startswith("CUTE_DSL_")},
        "versions": [importlib.metadata.version("nvidia-cutlass-dsl"), *sys.version_info[:2]],
        "runtime": _runtime_libraries(),
        "host": _host(),
    }
    return cache.path("kernels", cache.key(key), ".o")


@functools.cache
def _sources_hash(module: str) -> str:
    """Of a module's file, those of this package that it imports, and those of fp4suite that they import."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    own = registry.sources(Path(spec.origin))
    core = Path(fp4suite.__file__).parent
    imported = {
        core.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
        for path in own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("fp4suite.")
    }
    return registry.files_hash([*own, *sorted(imported)])


@functools.cache
def _runtime_libraries() -> list[str]:
    """What host code is linked with."""
    return find_runtime_libraries(enable_tvm_ffi=False)


@functools.cache
def _host() -> str:
    """What host code is compiled for: the object file may use whatever instructions this CPU has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:12]}"


def _load(path: Path) -> Any:
    """The kept function, or None where there is none that can be read, is whole and of this version."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if hashlib.sha256(content[:-_DIGEST_BYTES]).digest() != content[-_DIGEST_BYTES:]:
        log.warning("%s is damaged: compiling anew", path)
        return None
    try:
        return getattr(load_module(str(path)), _symbol(path))
    except DSLRuntimeError as e:
        log.warning("%s does not load, compiling anew: %s", path, e)
        return None


def _symbol(path: Path) -> str:
    """What the symbols in a kept file begin with: other files' are different, so that they may share a process."""
    return f"fp4suite_{path.stem}"


def _keep(function: Any, path: Path) -> None:
    """Keep a compiled function for other processes. Where that fails it is logged: this one has what it needs."""
    for library in _runtime_libraries():
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)  # the export resolves its symbols, also where no GPU has loaded it
    try:
        exported = function.dump_to_object(_symbol(path))
        cache.write(path, exported + hashlib.sha256(exported).digest())
    except (DSLRuntimeError, OSError) as e:
        log.warning("a compiled kernel could not be kept in %s: %s", path, e)


def build(function: Callable[..., Any], *operands: Any, arch: str) -> Built:
    """Compile a `cute.jit` function for `arch`: PTX, cubin, shared memory (bytes) and tensor memory (columns).

    operands: as for `cute.compile`, fake tensors included; nothing is launched and no GPU is asked for.

    Raises ValueError if the function launches more than one kernel, or with a size that is not known when compiling.
    """
    with tempfile.TemporaryDirectory(prefix="fp4suite-build-") as folder:
        compiled = cute.compile(
            function, *operands, options=f"{options(arch)} --keep-ptx --keep-cubin --dump-dir={folder}"
        )
    return built(compiled, arch)


def built(compiled: Any, arch: str) -> Built:
    """The same of a function that was compiled for `arch` with its PTX and cubin kept, as for an emulator."""
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
