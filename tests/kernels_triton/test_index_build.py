"""compress_kv and the indexer's kernels compile for both architectures without a GPU and without spilling.

What `test_index_emulated` runs it looks at itself: `compress_kv_pair`, half a minute a build, and whole entries.
"""

import re
from types import ModuleType

import pytest

from fp4suite import built
from fp4suite.problem import (
    CompressKvProblem,
    CsaQueriesProblem,
    IndexLogitsProblem,
    IndexQueryProblem,
    IndexTopkProblem,
    Problem,
)
from kernels_triton import compress_kv, csa_queries, index_logits, index_query, index_topk

from .test_build import ARCHS, build

HCA = {"m": 4096, "ratio": 128, "overlaps": 1, "head_dim": 512, "rope_dim": 64}
EXACT: list[tuple[ModuleType, Problem, tuple[str, ...]]] = [
    (compress_kv, CompressKvProblem(**HCA, format="fp8_ds_mla"), ARCHS[1:]),
    (index_query, IndexQueryProblem(m=4096, format="fp32"), ARCHS),
    (index_query, IndexQueryProblem(m=4096, format="bf16"), ARCHS[:1]),
    (index_query, IndexQueryProblem(m=4096, format="fp8"), ARCHS[1:]),
    (index_query, IndexQueryProblem(m=4096, format="fp8", codes=1), ARCHS[:1]),
    (index_query, IndexQueryProblem(m=4096, format="mxfp4", hadamard=1), ARCHS[1:]),
    (csa_queries, CsaQueriesProblem(m=4, heads=128, format="fp8", codes=1), ARCHS),
    (csa_queries, CsaQueriesProblem(m=4096, heads=128, format="mxfp4", hadamard=1), ARCHS[1:]),
]


@pytest.mark.parametrize(
    ("module", "problem", "archs"), EXACT, ids=lambda x: f"{x.op}-{x.format}" if isinstance(x, Problem) else None
)
def test_defaults_compile_without_spills(module, problem, archs, pool):
    """And compute as the reference does: nothing approximate, flushed or contracted; wide loads."""
    default = module.default(problem)
    assert module.supports(problem, default) is None
    for b in build(pool, [(module, problem, default, arch) for arch in archs]):
        # those by 1 or -1 of three levels of 16 columns a thread, which lie between threads
        check_exact(b, turned=48 if problem.dims().get("hadamard") else 0)


def check_exact(b: built.Built, turned: int = 0) -> None:
    """turned: multiply-adds that there are for a Hadamard transform of eight threads a head, who load 8 bytes each."""
    assert built.resources(b).refusal(b.arch) is None, b.arch
    inexact = re.findall(r"\b(?:fma|ex2|lg2|rcp|rsqrt|div|sqrt)\.(?!rn)\S+|\S+\.ftz\S*", b.ptx)
    assert not inexact, (b.arch, inexact)
    fused = re.findall(r"fma\.rn\.f32(?:x2)? .*", b.ptx)
    # a small number times 2^22 + 3, or a power of two times one beside 2^23: exact products
    fused = [f for f in fused if "0f4A800006" not in f and "0f4B0000" not in f]
    assert sum(2 if ".f32x2" in f else 1 for f in fused) == turned, (b.arch, fused)
    assert f"ld.global.v{2 if turned else 4}.b32" in b.ptx, b.arch


@pytest.mark.parametrize(
    ("entries", "archs"),
    [(8192, ARCHS[:1]), (16384, ARCHS[1:]), (32768, ARCHS), (262144, ARCHS[:1]), (1 << 20, ARCHS[1:])],
)
def test_index_topk(entries, archs, pool):
    """Rows that a program holds, and rows that have maxima; 16-byte loads, little shared memory."""
    problem = IndexTopkProblem(m=64, entries=entries, topk=1024)
    config = index_topk.default(problem)
    for arch, b in zip(archs, build(pool, [(index_topk, problem, config, arch) for arch in archs]), strict=True):
        assert built.resources(b).refusal(arch) is None, arch
        assert "ld.global.v4.b32" in b.ptx, arch
        assert b.shared_bytes <= 4096, arch


@pytest.mark.parametrize(("format", "x"), [("fp8", "fp8"), ("fp8", "bf16"), ("mxfp4", "bf16"), ("bf16", "bf16")])
def test_index_logits_uses_tensor_cores(format, x, pool):
    """The default for both architectures, two other tiles for one of them."""
    problem = IndexLogitsProblem(m=4096, entries=8192, format=format, x=x)
    configs = [
        index_logits.Config(block_m=m, block_n=n, num_warps=n // 32, num_stages=2 if m == 16 else 3)
        for m, n in ((1, 128), (8, 128), (32, 256) if x == "fp8" or format == "mxfp4" else (16, 128))
    ]
    default = index_logits.default(problem)
    assert default in configs
    jobs = [(index_logits, problem, c, ARCHS[i % 2]) for i, c in enumerate(configs)]
    jobs += [(index_logits, problem, default, ARCHS[1 - configs.index(default) % 2])]
    for (_, _, config, arch), b in zip(jobs, build(pool, jobs), strict=True):
        assert index_logits.supports(problem, config) is None
        assert built.resources(b).refusal(arch) is None, (config, arch)
        if (x, arch) == ("fp8", "sm_90a"):
            assert "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3" in b.ptx, config
            assert built.resources(b).registers <= 160, config
            assert built.resources(b).registers <= 128 or config.num_warps < 8, config
        assert ("wgmma.mma_async" if arch == "sm_90a" else "tcgen05.mma") in b.ptx, (config, arch)
        # queries on their way while one is multiplied: not where a barrier stands between, or one is all there is
        assert ("cp.async" in b.ptx) == (arch == "sm_90a" and config.block_m > 1), (config, arch)
        if format == "mxfp4" and arch == "sm_90a":  # keys stay in shared memory, written and read 16 bytes at a time
            assert "st.shared.b16" not in b.ptx, config
            assert "ldmatrix" not in b.ptx, config
