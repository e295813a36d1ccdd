"""Compiling candidates: in parallel, once, and with crashes told apart from refusals. Real kernels, no GPU."""

import contextlib
import dataclasses
import hashlib
import os
from types import SimpleNamespace

import pytest
import torch
import triton
from cutlass.cutlass_dsl import CuTeDSL

from fp4suite import arch as archs, problem as problems, registry, shapes as layers
from fp4suite.built import Resources
from fp4suite.problem import PROBLEMS, Act, GemmProblem, QuantizeProblem
from tuner import builds, provenance, worker
from tuner.builds import Build
from tuner.rejection import Rejected
from tuner.targets import load_configs

from . import fake_kernel
from .conftest import FAKE


@pytest.fixture
def both(fake):
    """The fake, and a real Triton kernel beside it."""
    registry.KERNELS[:] = [
        FAKE,
        registry.Kernel(
            "quantize_nvfp4", "triton_quantize_nvfp4", "kernels_triton.quantize_nvfp4", ("sm_90a", "sm_100a")
        ),
    ]


def fake_build(problem, **knobs):
    return Build("fake_gemm", problem, fake_kernel.Config(**knobs), "sm_90a")


def real_build(arch="sm_90a", m=64, **knobs):
    config = registry.load("triton_quantize_nvfp4").Config(**knobs)
    return Build("triton_quantize_nvfp4", QuantizeProblem(m=m, k=4096), config, arch)


def test_a_pool_compiles_what_compiles_and_tells_why_the_rest_does_not(both, problem):
    real = [real_build(), real_build("sm_100a")]
    raises, crashes, hangs = (
        fake_build(problem, **k) for k in ({"fault": "raise"}, {"num_stages": 3}, {"num_stages": 4})
    )
    found = dict(builds.compile_all([*real, raises, crashes], jobs=2, timeout=60))
    found |= dict(builds.compile_all([hangs], jobs=1, timeout=2))
    for b in real:
        assert isinstance(found[b], Resources)
        assert 0 < found[b].registers <= 255
        assert found[b].spill_bytes == 0
    assert found[raises] == Rejected("compile", "ValueError: tile too strange")
    assert (found[crashes].reason, found[hangs].reason) == ("crash", "timeout")


def test_a_second_time_nothing_is_compiled_except_what_crashed(both, problem, monkeypatch):
    compiled = []
    resources = Resources(registers=40, spill_bytes=0, shared_bytes=1024, tmem_columns=0)

    def compile_one(kernel, op, dims, knobs, arch):
        compiled.append(knobs["fault"])
        if knobs["fault"] == "raise":
            raise ValueError("no")
        return dataclasses.asdict(resources)

    monkeypatch.setattr(builds, "compile_one", compile_one)
    wanted = [fake_build(problem), fake_build(problem, fault="raise")]
    first = dict(builds.compile_all(wanted, jobs=0))
    assert first == {wanted[0]: resources, wanted[1]: Rejected("compile", "ValueError: no")}
    assert dict(builds.compile_all(wanted, jobs=0)) == first
    assert compiled == ["none", "raise"]


def test_one_build_serves_every_m_and_what_build_key_leaves_out(both, problem, monkeypatch):
    calls = []
    resources = {"registers": 32, "spill_bytes": 0, "shared_bytes": 0, "tmem_columns": 0}
    monkeypatch.setattr(builds, "compile_one", lambda *a: calls.append(a) or resources)
    same = [fake_build(dataclasses.replace(problem, m=m, n=n)) for m in (1, 64) for n in (512, 1024)]
    found = dict(builds.compile_all([*same, real_build(m=1), real_build(m=2)], jobs=0))
    assert len(found) == 6
    assert len(calls) == 2


def test_the_key_changes_with_whatever_the_result_depends_on(both, problem, monkeypatch):
    keys = {
        fake_build(problem).key,
        fake_build(problem, tile_m=32).key,
        fake_build(GemmProblem(m=16, n=512, k=512, out="fp32")).key,
        dataclasses.replace(fake_build(problem), arch="sm_100a").key,
    }
    monkeypatch.setattr(provenance, "compilers", lambda: {"triton": "9"})
    keys.add(fake_build(problem).key)
    monkeypatch.setattr(registry, "source_hash", lambda name: "changed")
    keys.add(fake_build(problem).key)
    assert len(keys) == 6


def test_a_spoilt_cache_file_is_compiled_again(both, problem, monkeypatch):
    result = Resources(registers=1, spill_bytes=0, shared_bytes=0, tmem_columns=0)
    builds.store("abcd", result)
    assert builds.load("abcd") == result
    builds._path("abcd").write_text('{"resou')
    assert builds.load("abcd") is None


class Noted(BaseException):
    """Instead of a compilation."""


def compiled_from(kernel, op, dims, knobs, arch):
    """Runs in a child, where Triton does not interpret: all that its compiler is given, or CuTe DSL's."""
    given = []

    def note(source, target, options):
        given.append((source.hash(), target, sorted(options.items())))
        return SimpleNamespace(asm={"ptx": "", "cubin": b""}, metadata=SimpleNamespace(shared=0))

    def note_module(dsl, module, module_hash, function_name, pipeline, *args, **kwargs):
        given.append((hashlib.sha256(str(module).encode()).hexdigest(), pipeline))
        raise Noted

    module = registry.load(kernel)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Noted):
        patch.setattr(triton, "compile", note)
        patch.setattr(CuTeDSL, "compile_and_cache", note_module)
        module.build(problems.from_dims(op, dims), registry.make_config(module, knobs), arch)
    assert given
    return given


@pytest.fixture(scope="module")
def child():
    """Compiles kernel after kernel, not interpreted."""
    w = worker.Worker({"TRITON_INTERPRET": "0"})
    yield w
    w.close()


@pytest.mark.parametrize("row", registry.KERNELS, ids=lambda row: row.name)
def test_binaries_of_one_key_are_equal(row, child):
    """What the cache relies on: a build reads nothing of a problem that its key leaves out, m first of all.

    Of the problems with one key the first with the least m and the last with the largest are compared, of all keys, or,
    where that takes CuTe DSL a second, of at most three.
    """
    arch = row.archs[-1]
    module = registry.load(row.name)
    config = module.Config()
    if row.op == "gemm_nvfp4":
        acts: tuple[Act, ...] = ("nvfp4",) if arch == "sm_100a" else ("bf16", "fp8")
        shapes = ((1, 128, 2048), (13, 128, 2048), (4096, 128, 256), (40, 7168, 2048))
        order = registry.weight_layout(module).order
        several = [GemmProblem(m=m, n=n, k=k, act=act, order=order) for act in acts for m, n, k in shapes]
    elif {f.name for f in dataclasses.fields(PROBLEMS[row.op]) if f.default is dataclasses.MISSING} == {"m", "k"}:
        kind = PROBLEMS[row.op]
        several = [kind(m=m, k=k) for m, k in ((1, 1024), (77, 1024), (64, 5120), (1999, 7168), (4096, 7168))]
    else:
        models = load_configs(["flash", "pro"]).values()
        several = [x.problem for model in models for x in layers.problems(model, row.op, arch=arch, m=(1, 77))]
    several = [p for p in several if module.supports(p, config) is None]
    alike = {}
    for p in several:
        alike.setdefault(Build(row.name, p, config, arch).key, []).append(p)
    assert len(alike) < len(several)
    knobs = dataclasses.asdict(config)
    groups = [group for group in alike.values() if len(group) > 1]
    for same in groups[:: -(-len(groups) // 3) if row.emulated else 1]:
        few, *_, many = sorted(same, key=lambda p: p.m)
        one, other = (
            child.call(compiled_from, row.name, p.op, p.dims(), knobs, arch, timeout=120) for p in (few, many)
        )
        assert one == other, (few, many)


# --- ahead of a process that times them ---


@pytest.fixture
def ahead():
    a = builds.Ahead(2, timeout=20)
    yield a
    a.close()


def test_ahead_tells_what_does_not_compile_and_compiles_the_rest(fake, problem, ahead):
    good, raises, crashes = (fake_build(problem, fault=fault) for fault in ("none", "raise", "crash"))
    found = [ahead.begin(b, 0) for b in (crashes, raises, good)]
    assert found[2].result(60) is None
    assert found[1].result(60) == Rejected("compile", "ValueError: tile too strange")
    assert found[0].result(60) == Rejected("crash", "compiling: the process ended with signal SIGSEGV")


def test_ahead_compiles_one_binary_once(fake, problem, ahead):
    first = ahead.begin(fake_build(problem), 0)
    assert ahead.begin(fake_build(dataclasses.replace(problem, m=7)), 1) is first
    assert ahead.begin(fake_build(problem, tile_m=16), 0) is not first


def test_ahead_leaves_alone_what_is_not_kept_or_needs_a_device(both, problem, ahead, monkeypatch):
    assert ahead.begin(real_build(), 0).result(0) is None
    monkeypatch.setenv("FP4SUITE_KEEP", "0")
    assert ahead.begin(fake_build(problem, fault="hang"), 0).result(0) is None


def test_who_compiles_sees_the_gpus_of_who_asks(ahead, monkeypatch):
    """CuTe DSL 4.8 takes a minute a build where there is a driver and CUDA_VISIBLE_DEVICES hides all devices."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert ahead._pool.submit(0, os.getenv, "CUDA_VISIBLE_DEVICES").future.result(60) == "3"


def test_what_was_compiled_ahead_is_loaded_by_another_process(tmp_path, monkeypatch):
    """A real kernel: the child fills the cache, and compiling is made to fail here."""
    from kernels_cute import build, gemm_nvfp4_sm90 as kernel

    monkeypatch.setenv("FP4SUITE_CACHE_DIR", str(tmp_path))
    problem, config = GemmProblem(m=1, n=512, k=512, act="bf16"), kernel.Config(tile_m=16)
    ahead = builds.Ahead(1)
    try:
        assert ahead.begin(Build("cute_gemm_nvfp4_sm90", problem, config, "sm_90a"), 0).result(120) is None
    finally:
        ahead.close()
    monkeypatch.setattr(build.cute, "compile", lambda *args, **kwargs: pytest.fail("compiled anew"))
    kernel.compiled.cache_clear()
    assert kernel.compiled(config, kernel._variant(problem, config)).has_gpu_module
    kernel.compiled.cache_clear()


def device_code(x):
    pass


def test_what_triton_would_launch_is_compiled_and_not_launched(both, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(triton.JITFunction, "__getitem__", triton.JITFunction.__getitem__)  # to be put back
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *args, grid, warmup: calls.append((args, grid, warmup)))
    kernel = triton.JITFunction(device_code)
    monkeypatch.setattr(registry.load("triton_quantize_nvfp4"), "warm", lambda problem, config: kernel[(3,)](problem.k))
    build = real_build()
    builds.precompile_launches(build.kernel, build.problem.op, build.problem.dims(), {}, "cuda:1")
    assert calls == ["cuda:1", ((4096,), (3,), True)]


def compiled_anew(kernel, op, dims, knobs):
    """Runs in a child: names of the Triton kernels that launching compiled, for they were not in the cache."""
    found = []
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or found.append(src.name)
    module = registry.load(kernel)
    module.warm(problems.from_dims(op, dims), registry.make_config(module, knobs))
    torch.cuda.synchronize()
    return found


@pytest.mark.gpu
def test_what_triton_compiled_ahead_is_loaded_by_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    build = real_build(archs.of("cuda"))
    what = build.kernel, build.problem.op, build.problem.dims(), dataclasses.asdict(build.config)
    ahead, later = builds.Ahead(1, "cuda:0"), worker.Worker()
    try:
        assert ahead.begin(build, 0).result(120) is None
        assert later.call(compiled_anew, *what, timeout=120) == []
        other = dataclasses.asdict(dataclasses.replace(build.config, num_warps=8))
        assert later.call(compiled_anew, *what[:3], other, timeout=120)
    finally:
        ahead.close()
        later.close()
