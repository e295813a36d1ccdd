"""Kernels kept in the cache: loaded by other processes, damaged, outdated, switched off; and that a loaded one computes
what the compiled one does, with its host code run from the object file.
"""

import copy
import ctypes
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from cutlass.base_dsl.common import DSLRuntimeError
from cutlass.base_dsl.jit_executor import JitExecutor
from cutlass.cutlass_dsl.cuda_jit_executor import CudaDialectJitModule

from fp4suite import registry, testing
from fp4suite.problem import GemmProblem
from kernels_cute import build, gemm_nvfp4_sm90 as sm90, gemm_nvfp4_sm90_wgmma as wgmma, gemm_nvfp4_sm100 as sm100
from ptx_emulator import emulate, emulation, runtime
from ptx_emulator.runtime import Runtime, binding

PROBLEM = GemmProblem(m=9, n=64, k=128, act="bf16", segments=2)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """A cache of the test's own, and kernels that this process has not compiled; returns the files in the cache."""
    monkeypatch.setenv("FP4SUITE_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FP4SUITE_KEEP", raising=False)
    functions = [module.compiled for module in (sm90, wgmma, sm100)]
    for function in functions:
        function.cache_clear()
    yield lambda: sorted(tmp_path.rglob("*.o"))
    for function in functions:
        function.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """How often something was compiled."""
    made = []
    real = build.cute.compile

    def count(*args, **kwargs):
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(build.cute, "compile", count)
    return made


def get(**knobs):
    config = sm90.Config(**knobs)
    sm90.compiled.cache_clear()
    return sm90.compiled(config, sm90._HOST.variant(PROBLEM, config))


ANOTHER = """
import time
from kernels_cute import build, gemm_nvfp4_sm90 as kernel
def refuse(*args, **kwargs): raise AssertionError("compiled anew")
build.cute.compile = refuse
config = kernel.Config()
kernel.compiled(config, kernel.Variant(act="bf16", out="bf16", segments=2))
"""


def test_another_process_loads_what_this_one_compiled(kept, compilations):
    get()
    get()
    assert len(compilations) == 1
    assert len(kept()) == 1
    subprocess.run([sys.executable, "-c", ANOTHER], env=dict(os.environ), check=True)


def test_loading_takes_milliseconds(kept):
    get()
    began = time.monotonic()
    get()
    assert time.monotonic() - began < 0.1


def test_what_differs_is_filed_apart(kept, compilations, monkeypatch):
    get()
    get(tile_m=16)
    assert len(kept()) == 2
    monkeypatch.setenv("CUTE_DSL_LINEINFO", "1")
    get()
    assert len(kept()) == 3
    monkeypatch.setattr(registry, "files_hash", lambda paths: "0123456789ab")
    build._sources_hash.cache_clear()
    get()
    build._sources_hash.cache_clear()
    assert len(kept()) == len(compilations) == 4


def test_sources_are_the_kernels_own_and_what_they_import(monkeypatch):
    named = []
    monkeypatch.setattr(registry, "files_hash", lambda paths: named.extend(p.name for p in paths))
    build._sources_hash.__wrapped__("kernels_cute.gemm_nvfp4_sm90_wgmma")
    assert {"gemm_nvfp4_sm90_wgmma.py", "nvfp4.py", "build.py", "layouts.py", "formats.py"} <= set(named)
    assert "gemm_nvfp4_sm90.py" not in named


@pytest.mark.parametrize(
    "damage",
    [lambda c: c[: len(c) // 2], lambda c: c[:5000] + bytes([c[5000] ^ 1]) + c[5001:], lambda c: b""],
    ids=["cut", "flipped", "empty"],
)
def test_a_damaged_file_is_replaced(kept, compilations, caplog, damage):
    get()
    (path,) = kept()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    get()
    assert len(compilations) == 2
    assert "is damaged" in caplog.text
    get()
    assert len(compilations) == 2
    assert kept() == [path]


def test_a_file_of_another_version_is_replaced(kept, compilations, caplog, monkeypatch):
    get()

    def refuse(path):
        raise DSLRuntimeError("Incompatible version: 9.0")

    with monkeypatch.context() as patch:
        patch.setattr(build, "load_module", refuse)
        get()
    assert "Incompatible version" in caplog.text
    assert len(compilations) == 2


def test_where_nothing_can_be_kept_the_kernel_is_there_all_the_same(tmp_path, caplog, monkeypatch):
    (tmp_path / "kernels").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert get() is not None
    assert "could not be kept" in caplog.text


def test_can_be_switched_off(kept, compilations, monkeypatch):
    monkeypatch.setenv("FP4SUITE_KEEP", "0")
    get()
    get()
    assert len(compilations) == 2
    assert kept() == []


def test_an_emulator_gets_a_function_with_its_ptx(kept):
    get()
    with emulate("sm_90a"):
        assert ".target sm_90a" in get().__ptx__


CASES = {
    "sm90": (sm90, PROBLEM, sm90.Config(tile_m=16, tile_n=64)),
    "sm90_wgmma": (
        wgmma,
        replace(PROBLEM, m=17, n=128, k=512, order=wgmma.WEIGHT_ORDER, segments=1),
        wgmma.Config(tile_m=16, groups_n=1, tile_k=64, share=2, split=2),
    ),
    "sm100": (sm100, replace(PROBLEM, act="nvfp4", k=256, n=64), sm100.Config()),
}


@pytest.mark.parametrize("name", CASES)
def test_host_code_from_the_file_launches_as_the_compiled_does(name, tmp_path, monkeypatch):
    """Same grid, clusters, attributes and shared memory, same arguments and therefore the same output."""
    module, problem, config = CASES[name]
    case, launches = testing.case(problem, "cpu", 0), []
    monkeypatch.setattr(Runtime, "answer", told(Runtime.answer, launches))
    with emulate(module.ARCH):
        case.run(module, config)
        case.check()
        want = case.out.clone()
        owner, real = getattr(module, "_HOST", module), module.compiled
        monkeypatch.setattr(owner, "compiled", lambda *key: through_a_file(real(*key), tmp_path / "x.o", module.ARCH))
        case.run(module, config)
    assert torch.equal(case.out, want)
    first, second = (call for call in launches if call[0] == "_cudaLaunchKernelEx")
    assert first == second
    half = len(launches) // 2
    assert launches[:half] == launches[half:]  # the loading of the library too


def test_files_loaded_into_one_process_stay_apart(tmp_path, monkeypatch):
    configs = sm90.Config(tile_m=16, tile_n=64), sm90.Config(tile_m=8, tile_n=128)
    case, launches = testing.case(PROBLEM, "cpu", 0), []
    with emulate("sm_90a"):
        variant = sm90._HOST.variant(PROBLEM, configs[0])
        loaded = {c: through_a_file(sm90.compiled(c, variant), tmp_path / f"{c.tile_m}.o", "sm_90a") for c in configs}
        monkeypatch.setattr(sm90._HOST, "compiled", lambda config, variant: loaded[config])
        monkeypatch.setattr(Runtime, "answer", told(Runtime.answer, launches))
        for config in (*configs, configs[0]):
            case.run(sm90, config)
            case.check()
    assert [call[2][0] for call in launches] == [configs[0].threads, configs[1].threads, configs[0].threads]


def through_a_file(function, path, arch):
    """The function as loaded from what `_keep` has written of it, but for the emulator's runtime."""
    bound = binding()
    ctypes.CDLL(str(bound.path), ctypes.RTLD_GLOBAL)
    renamed = copy.copy(function)
    renamed.ir_module = emulation._renamed(function.ir_module)
    build._keep(renamed, path)
    loaded = build._load(path)
    loaded.artifacts, loaded.num_devices = function.artifacts, 1
    twin = copy.copy(emulation._twin(function, function.__ptx__, arch))
    twin.names = []
    bound.runtime = Runtime(arch, emulation._no_launch)
    bound.runtime.names = twin.names
    loaded._load_cuda_library()
    assert bound.runtime.error is None
    bound.runtime = None
    twin.executor = JitExecutor(
        CudaDialectJitModule(loaded.engine, loaded.capi_func, loaded.execution_args, []), None, False
    )
    setattr(loaded, emulation._TWIN, twin)
    return loaded


def told(answer, seen):
    """What host code asks of the runtime, without addresses."""

    def tell(self, name, a):
        if name == "_cudaLaunchKernelEx":
            config = runtime._Config.from_address(a[0])
            attributes = (runtime._Attribute * config.count).from_address(config.attributes)
            values = tuple((x.id, *x.value[: 3 if x.id == runtime._CLUSTER_DIMENSION else 1]) for x in attributes)
            seen.append((name, tuple(config.grid), tuple(config.block), config.shared, values))
        else:
            seen.append((name, *(x for x in a[1:4] if x < 1 << 20)))
        return answer(self, name, a)

    return tell
