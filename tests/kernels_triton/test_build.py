"""Configs with every value of every knob, of those that `supports` lets through, compile without a GPU and without
spilling, for the two architectures in turn.
"""

import concurrent.futures
import dataclasses
import re
from types import ModuleType
from typing import Any

import pytest

from fp4suite import built, testing
from fp4suite.problem import (
    DequantProblem,
    KvNormRopeInsertProblem,
    Problem,
    QkvNormRopeInsertProblem,
    QnormRopeProblem,
    QnormRopeQuantizeProblem,
    QuantizeFp8Problem,
    QuantizeProblem,
    RmsNormProblem,
    RmsnormQuantizeProblem,
    RopeInverseInPlaceProblem,
    RopeInverseProblem,
    RopeInverseQuantizeProblem,
    SwigluQuantizeProblem,
)
from kernels_triton import (
    dequant_nvfp4,
    kv_norm_rope_insert,
    qkv_norm_rope_insert,
    qnorm_rope,
    qnorm_rope_quantize,
    quantize_fp8,
    quantize_nvfp4,
    rms_norm,
    rmsnorm_quantize,
    rope_inverse,
    rope_inverse_in_place,
    rope_inverse_quantize,
    swiglu_quantize,
)

from .checks import covering

ARCHS = ("sm_90a", "sm_100a")
QUANTISERS: list[tuple[ModuleType, type[Problem]]] = [
    (quantize_nvfp4, QuantizeProblem),
    (rmsnorm_quantize, RmsnormQuantizeProblem),
    (swiglu_quantize, SwigluQuantizeProblem),
]
ROPE: list[tuple[ModuleType, Problem]] = [
    (qnorm_rope, QnormRopeProblem(m=64, heads=128)),
    (qnorm_rope_quantize, QnormRopeQuantizeProblem(m=64, heads=128)),
    (kv_norm_rope_insert, KvNormRopeInsertProblem(m=64, format="nvfp4")),
    (kv_norm_rope_insert, KvNormRopeInsertProblem(m=64, format="fp8_ds_mla")),
    (kv_norm_rope_insert, KvNormRopeInsertProblem(m=64, format="bf16")),
    (rope_inverse, RopeInverseProblem(m=64, heads=128)),
    (rope_inverse_in_place, RopeInverseInPlaceProblem(m=64, heads=128)),
    (rope_inverse_quantize, RopeInverseQuantizeProblem(m=64, heads=128, groups=16)),
]
NORMS: list[tuple[ModuleType, Problem]] = [
    (rms_norm, RmsNormProblem(m=64, k=7168)),
    (rms_norm, RmsNormProblem(m=64, k=1536)),
    (qkv_norm_rope_insert, QkvNormRopeInsertProblem(m=64, k=1536, format="nvfp4")),
    (qkv_norm_rope_insert, QkvNormRopeInsertProblem(m=64, k=1536, format="fp8_ds_mla")),
]
EXACT = re.compile(r"0f40000000, 0f4B000000|0f3F000000, 0f4B000004")  # 2 a + 2^23, a / 2 + 2^23 + 4: exact products
NEAR = re.compile(r"0f40000000, 0f41080000|0f3F000000, 0f41480000")  # 2 a + 8.5, a / 2 + 12.5: half a code is cut off
Job = tuple[ModuleType, Problem, Any, str]


def build(pool: concurrent.futures.Executor, jobs: list[Job]) -> list[built.Built]:
    return [f.result() for f in [pool.submit(m.build, problem, config, arch) for m, problem, config, arch in jobs]]


def by_turns(module: ModuleType, problem: Problem) -> list[Job]:
    """The default for either architecture, other configs for one of them."""
    default, *others = covering(module, problem)
    jobs = [(module, problem, default, arch) for arch in ARCHS]
    return jobs + [(module, problem, c, ARCHS[i % 2]) for i, c in enumerate(others)]


def shown_before(module: ModuleType, problem: Problem, among: list[tuple[ModuleType, Problem]]) -> bool:
    """Whether `among` begins with another problem of the same kernel."""
    return next(first for kernel, first in among if kernel is module) is not problem


@pytest.mark.parametrize(
    ("module", "kind"), [*QUANTISERS, (dequant_nvfp4, DequantProblem), (quantize_fp8, QuantizeFp8Problem)]
)
def test_configs_compile_without_spills(module, kind, pool):
    """And what the models' few and many rows have by default."""
    problem = kind(m=64, k=7168)
    few, many = (module.default(dataclasses.replace(problem, m=m)) for m in (1, 4096))
    jobs = [(module, _shorter(problem, c), c, arch) for _, problem, c, arch in by_turns(module, problem)]
    jobs += [(module, problem, few, arch) for arch in ARCHS] + [(module, problem, many, ARCHS[0])]
    jobs = list(dict.fromkeys(jobs))
    assert len(jobs) >= 4
    for (_, problem, config, arch), b in zip(jobs, build(pool, jobs), strict=True):
        assert module.supports(problem, config) is None
        assert b.arch == arch
        assert built.resources(b).refusal(arch) is None, (config, arch)
        assert f".target {arch}" in b.ptx
        if (module, kind) in QUANTISERS and config == module.Config():
            check_instructions(module, "absmax", b)


def _shorter(problem: Problem, config: Any) -> Problem:
    """Rows that are read again take the same registers at any length, and Triton, with every tile written out, the
    longer the more: here as few columns as make several tiles, whole or of parts.
    """
    read_again = getattr(config, "held", None) is False
    return dataclasses.replace(problem, k=2048 if config.parts == 1 else 4096) if read_again else problem


@pytest.mark.parametrize(("module", "problem"), ROPE, ids=lambda x: getattr(x, "op", ""))
def test_rope_kernels_compile_without_spills(module, problem, pool):
    """And what bytes and speed depend on: nothing approximate, 16-byte accesses, hardware conversions."""
    jobs = by_turns(module, problem)
    assert len(jobs) >= 4
    if shown_before(module, problem, ROPE):
        jobs = jobs[:3]  # the default for both, and the largest tile
    for (_, _, config, arch), b in zip(jobs, build(pool, jobs), strict=True):
        assert built.resources(b).refusal(arch) is None, (config, arch)
        inexact = re.findall(r"\b(?:fma|ex2|lg2|rcp|rsqrt|div|sqrt)\.(?!rn)\S+|\S+\.ftz\S*", b.ptx)
        assert not inexact, (config, arch, inexact)
        fused = re.findall(r"fma\.rn\.f32 .*", b.ptx)
        assert all(EXACT.search(f) for f in fused), (config, arch, fused)
        assert "cvt.rn.bf16" in b.ptx, (config, arch)
        quantises = problem.op.endswith("_quantize") or problem.dims().get("format") == "nvfp4"
        e4m3 = quantises or problem.dims().get("format") == "fp8_ds_mla"  # scales, or elements
        assert ("cvt.rn.satfinite.e4m3x2.f32" in b.ptx) == e4m3, (config, arch)
        assert ("cvt.rn.satfinite.e2m1x2.f32" in b.ptx) == (quantises and arch == "sm_100a"), (config, arch)
    for arch, b in zip(ARCHS, build(pool, [(module, problem, module.Config(), arch) for arch in ARCHS]), strict=True):
        assert len(re.findall(r"ld\.global\.v4\.b32", b.ptx)) >= 2, arch
        assert re.search(r"st\.global\.v[24]\.b32", b.ptx), arch


@pytest.mark.parametrize(("module", "problem"), NORMS, ids=lambda x: getattr(x, "op", ""))
def test_norms_compile_without_spills(module, problem, pool):
    """The defaults of few and of many rows, and one other config; nothing approximate, 16-byte accesses."""
    defaults = [module.default(dataclasses.replace(problem, m=m)) for m in (1, 4096)]
    jobs = [(module, problem, config, arch) for config in defaults for arch in ARCHS]
    if shown_before(module, problem, NORMS):
        jobs = jobs[::3]  # by turns
    jobs += [(module, problem, next(c for c in covering(module, problem)[1:] if c not in defaults), "sm_90a")]
    for (_, _, config, arch), b in zip(jobs, build(pool, jobs), strict=True):
        assert built.resources(b).refusal(arch) is None, (config, arch)
        inexact = re.findall(r"\b(?:fma|ex2|lg2|rcp|rsqrt|div|sqrt)\.(?!rn)\S+|\S+\.ftz\S*", b.ptx)
        assert not inexact, (config, arch, inexact)
        assert all(EXACT.search(f) for f in re.findall(r"fma\.rn\.f32 .*", b.ptx)), (config, arch)
        assert "cvt.rn.bf16" in b.ptx, (config, arch)
        assert set(re.findall(r"st\.global\.(\S+)", b.ptx)) >= {"v4.b32"}, (config, arch)
        if config in defaults and config.num_warps == 1:
            assert "bar.sync" not in b.ptx, (config, arch)


def test_rows_by_blocks_stay_in_a_warp(pool):
    """No barrier and no shared memory, registers that leave an SM 32 programs; 16-byte loads."""
    insert, queries = KvNormRopeInsertProblem(m=64, format="nvfp4"), QnormRopeQuantizeProblem(m=64, heads=128)
    jobs: list[Job] = [(kv_norm_rope_insert, insert, kv_norm_rope_insert.default(insert), arch) for arch in ARCHS]
    for turns, arch in zip((1, 8), ARCHS, strict=True):
        config = qnorm_rope_quantize.Config(by_blocks=True, turns=turns)
        jobs.append((qnorm_rope_quantize, queries, config, arch))
    for (module, problem, config, arch), b in zip(jobs, build(pool, jobs), strict=True):
        used = built.resources(b)
        assert config.by_blocks
        assert module.supports(problem, config) is None
        assert used.refusal(arch) is None, (config, arch)
        assert used.registers <= 64, (config, arch)
        assert used.shared_bytes == 0, (config, arch)
        assert "bar.sync" not in b.ptx, (config, arch)
        assert len(re.findall(r"ld\.global\.v4\.b32", b.ptx)) >= 2, (config, arch)
        assert not re.findall(r"\b(?:fma|rcp|div|sqrt)\.(?!rn)\S+|\S+\.ftz\S*", b.ptx), (config, arch)
        assert all(EXACT.search(f) for f in re.findall(r"fma\.rn\.f32 .*", b.ptx)), (config, arch)


@pytest.mark.parametrize(("module", "kind"), QUANTISERS)
def test_other_rules(module, kind, pool):
    """mse with the config that holds most: `supports` draws the line by registers.

    Of rmsnorm_quantize one tile, for a second one has the same code again; quantize_nvfp4 as `test_quantize_emulated`
    runs it, for sm_100a, where it takes more registers.
    """
    problem = kind(m=64, k=512 if module is rmsnorm_quantize else 2048, rule="mse")
    most, arch = holds_most(module, problem), "sm_100a" if module is quantize_nvfp4 else "sm_90a"
    weights = kind(m=64, k=1536, rule="modelopt_weight")
    mse, of_weights = build(pool, [(module, problem, most, arch), (module, weights, module.Config(), "sm_100a")])
    assert built.resources(mse).refusal(arch) is None, most
    check_instructions(module, "mse", mse)
    check_instructions(module, "modelopt_weight", of_weights)


def holds_most(module: ModuleType, problem: Problem) -> Any:
    """Elements a thread."""
    return max(testing.every(module, problem), key=lambda c: c.block_m * getattr(c, "block_k", 8192) / c.num_warps)


def check_instructions(module: ModuleType, rule: str, b: built.Built) -> None:
    """What the bytes and the speed depend on, read from the PTX."""
    where = f"{module.__name__} {rule} {b.arch}"
    # the arithmetic is IEEE: nothing approximate, flushed or contracted but for SwiGLU's quotients, by five
    # multiply-adds from an approximate reciprocal each, and, by rule absmax, what `near` answers for
    inexact = re.findall(r"\b(?:fma|ex2|lg2|rcp|rsqrt|div|sqrt)\.(?!rn)\S+|\S+\.ftz\S*", b.ptx)
    near, swiglu = inexact.count("ex2.approx.ftz.f32"), module is swiglu_quantize
    assert set(inexact) - {"ex2.approx.ftz.f32"} == ({"rcp.approx.ftz.f32"} if swiglu else set()), (where, inexact)
    assert near == (16 if swiglu and rule == "absmax" else 0), (where, inexact)
    fused = [f for f in re.findall(r"fma\.rn\.f32\S* .*", b.ptx) if not EXACT.search(f)]  # f32x2 is two
    lines = [f for f in fused if NEAR.search(f)]
    assert len(lines) == 2 * near, (where, lines)
    exact = sum(1 + f.startswith("fma.rn.f32x2") for f in fused) - len(lines)
    assert exact == 5 * (len(inexact) - 2 * near), (where, fused)
    assert "div.rn.f32" in b.ptx, where
    # 16-byte loads, and FP4 in hardware where there is an instruction
    assert "ld.global.v4.b32" in b.ptx, where
    assert ("cvt.rn.satfinite.e2m1x2.f32" in b.ptx) == (b.arch == "sm_100a"), where
    code = built.sass(b)
    assert ("F2FP" in code and "E2M1" in code) == (b.arch == "sm_100a"), where


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_other_types_compile(dtype, pool):
    """By the defaults of few rows, ragged ones; of the widest type the other layout too, for the other architecture."""
    jobs: list[Job] = []
    for module, kind in QUANTISERS:
        problem = kind(m=1, k=1104, x=dtype, sf_layout="blocked_128x4")
        jobs.append((module, problem, module.default(problem), "sm_90a" if dtype == "fp16" else "sm_100a"))
        if dtype == "fp32":
            jobs.append((module, dataclasses.replace(problem, sf_layout="linear"), module.default(problem), "sm_90a"))
    if dtype != "bf16":
        jobs.append((dequant_nvfp4, DequantProblem(m=1, k=1104, out=dtype), dequant_nvfp4.Config(), "sm_90a"))
    for b in build(pool, jobs):
        assert built.resources(b).refusal(b.arch) is None


def test_build_says_when_it_cannot():
    with pytest.raises(RuntimeError, match="Triton interprets in this process"):
        quantize_nvfp4.host.build(object(), {}, {}, "sm_90a", 4)
