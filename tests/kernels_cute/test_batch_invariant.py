"""A row's bits under one arithmetic: the same for any m, tile, stages and cluster, in the emulator and on a GPU."""

import itertools
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fp4suite import dispatch, ops, registry, testing
from fp4suite.formats import FP8RowTensor, NVFP4Tensor
from fp4suite.problem import GemmProblem
from fp4suite.reference import fp8
from kernels_cute import (
    gemm_nvfp4_sm90,
    gemm_nvfp4_sm90_fp8,
    gemm_nvfp4_sm90_skinny,
    gemm_nvfp4_sm90_wgmma,
    gemm_nvfp4_sm100,
)
from ptx_emulator import emulate

N, K = 128, 512
M = (1, 7, 64, 130)
Wgmma, Rows, Sm100 = gemm_nvfp4_sm90_wgmma.Config, gemm_nvfp4_sm90.Config, gemm_nvfp4_sm100.Config
Fp8 = gemm_nvfp4_sm90_fp8.Config
Operand = Tensor | NVFP4Tensor | FP8RowTensor

# kernel, activations and configs of one arithmetic, the one for the largest m last
SAME: dict[str, tuple[ModuleType, str, list[object]]] = {
    "wgmma in order": (
        gemm_nvfp4_sm90_wgmma,
        "bf16",
        [
            Wgmma(tile_m=8, groups_n=1, tile_k=256, stages=2),
            Wgmma(tile_m=16, groups_n=2, tile_k=64, stages=3),
            Wgmma(tile_m=64, groups_n=3, tile_k=64, stages=3, share=2),
            Wgmma(tile_m=128, groups_n=1, strips=2, tile_k=64, stages=2, blocks=2),
            Wgmma(tile_m=256, groups_n=2, tile_k=64, stages=3),
        ],
    ),
    "wgmma in two parts": (
        gemm_nvfp4_sm90_wgmma,
        "bf16",
        [
            Wgmma(tile_m=8, groups_n=1, tile_k=256, split=2),
            Wgmma(tile_m=64, groups_n=2, tile_k=64, stages=3, split=2),
            Wgmma(tile_m=128, groups_n=1, tile_k=128, split=2),
        ],
    ),
    "wgmma in two parts by two groups": (
        gemm_nvfp4_sm90_wgmma,
        "bf16",
        [
            Wgmma(tile_m=8, groups_n=1, groups_k=2, tile_k=64, stages=4, split=2),
            Wgmma(tile_m=32, groups_n=1, strips=2, groups_k=2, tile_k=64, stages=4, split=2),
        ],
    ),
    "FP8 in order": (
        gemm_nvfp4_sm90_fp8,
        "fp8",
        [
            Fp8(tile_m=8, groups_n=1, stages=2),
            Fp8(tile_m=16, groups_n=4, stages=3),
            Fp8(tile_m=64, groups_n=2, stages=3, share=2),
            Fp8(tile_m=128, groups_n=1, stages=2),
            Fp8(tile_m=256, stages=3),
        ],
    ),
    "FP8 in runs of 256": (
        gemm_nvfp4_sm90_fp8,
        "fp8",
        [
            Fp8(tile_m=8, groups_n=2, stages=3, promote=2),
            Fp8(tile_m=64, groups_n=1, stages=2, promote=2),
            Fp8(tile_m=192, stages=3, promote=2),
        ],
    ),
    "FP8 by two groups, in runs of 256": (
        gemm_nvfp4_sm90_fp8,
        "fp8",
        [
            Fp8(tile_m=8, groups_n=1, groups_k=2, stages=4, promote=2),
            Fp8(tile_m=128, groups_n=1, groups_k=2, stages=4, promote=2),
        ],
    ),
    "FP8 in two parts": (
        gemm_nvfp4_sm90_fp8,
        "fp8",
        [
            Fp8(tile_m=8, groups_n=1, stages=3, split=2),
            Fp8(tile_m=64, groups_n=2, stages=3, share=2, split=2),
            Fp8(tile_m=256, stages=2, split=2),
        ],
    ),
    "sm_90a, rows": (
        gemm_nvfp4_sm90,
        "bf16",
        [Rows(tile_m=8, tile_n=64, tile_k=128, num_stages=2), Rows(tile_m=64), Rows(tile_m=256, tile_n=64)],
    ),
    "sm_90a, rows, W4A4": (
        gemm_nvfp4_sm90,
        "nvfp4",
        [Rows(tile_m=8, tile_n=64, tile_k=128, num_stages=2), Rows(tile_m=64), Rows(tile_m=128, num_stages=3)],
    ),
    "sm_100a in order": (
        gemm_nvfp4_sm100,
        "nvfp4",
        [Sm100(tile_n=64), Sm100(tile_n=256, mma_ctas=2, cluster_m=2), Sm100(tile_n=128, cluster_n=2, band=1)],
    ),
    "sm_100a, b first, two parts": (
        gemm_nvfp4_sm100,
        "nvfp4",
        [Sm100(tile_n=32, swap_ab=True, split_k=2), Sm100(tile_n=64, swap_ab=True, split_k=2, cluster_m=2)],
    ),
}


def _operands(kernel: ModuleType, act: str, device: torch.device | str) -> tuple[Operand, NVFP4Tensor]:
    gen = torch.Generator(device=device).manual_seed(11)
    b = testing.random_nvfp4(N, K, gen, adversarial=True).lay_out_(registry.weight_layout(kernel))
    if act == "bf16":
        return testing.random_activations((max(M), K), gen), b
    if act == "fp8":
        return fp8.quantize_fp8(testing.random_activations((max(M), K), gen)), b.prepare_fp8()
    return testing.random_nvfp4(max(M), K, gen, adversarial=True), b


def _first(a: Operand, m: int, kernel: ModuleType) -> Operand:
    """The first rows of a."""
    if isinstance(a, Tensor):
        return a[:m]
    if isinstance(a, FP8RowTensor):
        return FP8RowTensor(a.data[:m], a.scale[:m])
    return NVFP4Tensor(a.data[:m], a.sf[:m], a.alpha).with_sf_layout(kernel.SF_LAYOUT)


def _run(kernel: ModuleType, a: Operand, b: NVFP4Tensor, config: object) -> Tensor:
    out = torch.full((a.shape[0], N), torch.nan, device=b.device)
    kernel.launch(a, b, None, out, config)
    return out.cpu()


def _problem(kernel: ModuleType, act: str, m: int) -> GemmProblem:
    order = registry.weight_layout(kernel).order
    return GemmProblem(m=m, n=N, k=K, act=act, out="fp32", order=order)


@pytest.mark.parametrize("name", SAME)
def test_row_bits_in_the_emulator(name: str) -> None:
    kernel, act, configs = SAME[name]
    assert len({kernel.arithmetic(_problem(kernel, act, 1), c) for c in configs}) == 1
    kernel.compiled.cache_clear()
    a, b = _operands(kernel, act, "cpu")
    few = M[:-1]
    with emulate(kernel.ARCH):
        whole = _run(kernel, _first(a, max(M), kernel), b, configs[-1])
        assert whole.isfinite().all()
        for i, config in enumerate(configs[::2]):  # all of them on a GPU
            m = few[i % len(few)]
            assert torch.equal(_run(kernel, _first(a, m, kernel), b, config), whole[:m]), (config, m)
    kernel.compiled.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n, (kernel, _, _) in SAME.items() if kernel.ARCH == "sm_90a"])
def test_row_bits_on_a_gpu(name: str, device: torch.device) -> None:
    """The emulator's sums are exact within an MMA; a GPU's are not, and their bits may not depend on its shape."""
    kernel, act, configs = SAME[name]
    a, b = _operands(kernel, act, device)
    whole = _run(kernel, _first(a, max(M), kernel), b, configs[-1])
    for config in configs:
        for m in M:
            assert torch.equal(_run(kernel, _first(a, m, kernel), b, config), whole[:m]), (config, m)


OTHER: dict[str, tuple[ModuleType, str, list[object]]] = {
    "one sum, two parts, two groups, other steps": (
        gemm_nvfp4_sm90_wgmma,
        "bf16",
        [
            Wgmma(tile_m=8, groups_n=1, tile_k=64, stages=4),
            Wgmma(tile_m=8, groups_n=1, tile_k=64, stages=4, split=2),
            Wgmma(tile_m=8, groups_n=1, tile_k=64, stages=4, groups_k=2),
            Wgmma(tile_m=8, groups_n=1, tile_k=128, stages=4, groups_k=2),
            Wgmma(tile_m=8, groups_n=1, tile_k=64, stages=2, split=3),
        ],
    ),
    "FP8: runs of one, two and four steps, two groups, two parts": (
        gemm_nvfp4_sm90_fp8,
        "fp8",
        [
            Fp8(tile_m=8, groups_n=1, stages=4),
            Fp8(tile_m=8, groups_n=1, stages=4, promote=2),
            Fp8(tile_m=8, groups_n=1, stages=4, promote=4),
            Fp8(tile_m=8, groups_n=1, stages=4, groups_k=2),
            Fp8(tile_m=8, groups_n=1, stages=4, groups_k=2, promote=2),
            Fp8(tile_m=8, groups_n=1, stages=2, split=2),
            Fp8(tile_m=8, groups_n=1, stages=2, split=2, promote=2),
        ],
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_arithmetic_is_seen(name: str) -> None:
    """The names tell apart what gives other bits."""
    kernel, act, configs = OTHER[name]
    problem = _problem(kernel, act, 7)
    assert len({kernel.arithmetic(problem, c) for c in configs}) == len(configs)
    kernel.compiled.cache_clear()
    a, b = _operands(kernel, act, "cpu")
    with emulate("sm_90a"):
        made = [_run(kernel, _first(a, 7, kernel), b, c) for c in configs]
    kernel.compiled.cache_clear()
    for i, one in enumerate(made):
        assert not any(torch.equal(one, other) for other in made[:i]), configs[i]


@pytest.mark.parametrize("k", [256, 1536, 7168])
@pytest.mark.parametrize("n", [64, 2048, 65536])
def test_there_is_a_config_of_the_arithmetic_for_every_m(n: int, k: int) -> None:
    kernel = gemm_nvfp4_sm90_wgmma
    parts = [Wgmma(groups_n=1), Wgmma(groups_n=1, groups_k=2), Wgmma(groups_n=1, groups_k=2, tile_m=16)]
    if k > 256:
        parts += [Wgmma(groups_n=1, split=2), Wgmma(groups_n=1, split=3, groups_k=2)]
    for m in (1, 8, 17, 64, 65, 300, 9000):
        problem = replace(_problem(kernel, "bf16", m), n=n, k=k)
        for wanted in {kernel.arithmetic(problem, c) for c in parts}:
            config = kernel.in_arithmetic(problem, wanted)
            assert kernel.supports(problem, config) is None
            assert kernel.arithmetic(problem, config) == wanted
        assert kernel.in_arithmetic(problem, "backwards") is None


@pytest.mark.parametrize("k", [256, 1536, 7168])
@pytest.mark.parametrize("n", [64, 2048, 65536])
def test_there_is_a_config_of_each_fp8_arithmetic_for_every_m(n: int, k: int) -> None:
    """Of every one that few tokens may be tuned to, with promote of any, and of INVARIANT first of all."""
    kernel = gemm_nvfp4_sm90_fp8
    knobs = itertools.product((1, 2), (1, 2, 3), kernel.SPACE["promote"])
    parts = [Fp8(tile_m=16, groups_n=1, groups_k=g, split=s, promote=p) for g, s, p in knobs]
    for m in (1, 8, 9, 17, 64, 65, 130, 193, 300, 9000):
        problem = replace(_problem(kernel, "fp8", m), n=n, k=k)
        named = {kernel.arithmetic(problem, c) for c in parts if kernel.supports(problem, c) is None}
        assert kernel.INVARIANT in named
        for wanted in named:
            config = kernel.in_arithmetic(problem, wanted)
            assert kernel.supports(problem, config) is None
            assert kernel.arithmetic(problem, config) == wanted
        for promote in kernel.SPACE["promote"]:
            assert any(f"in runs of {128 * promote}" in wanted for wanted in named)
        assert kernel.in_arithmetic(problem, "backwards") is None
        tail = kernel.arithmetic(problem, Fp8(share=2, tail=2))
        assert f"m={m}" in tail
        assert kernel.in_arithmetic(problem, tail) is None


def test_no_config_of_skinny_is_for_every_m() -> None:
    assert registry.invariant("cute_gemm_nvfp4_sm90_skinny") is None
    problem = GemmProblem(m=7, n=N, k=K)
    one, two = (gemm_nvfp4_sm90_skinny.Config(tile_m=t, split=s) for t, s in ((8, 2), (16, 2)))
    arithmetic = gemm_nvfp4_sm90_skinny.arithmetic
    assert arithmetic(problem, one) != arithmetic(problem, two)


@pytest.mark.parametrize(
    ("arch", "act"), [("sm_90a", "bf16"), ("sm_90a", "nvfp4"), ("sm_90a", "fp8"), ("sm_100a", "nvfp4")]
)
def test_ops_in_the_mode(arch: str, act: str) -> None:
    """Through dispatch: different configs by m, one kernel, equal rows."""
    with dispatch.on_target(arch):
        layout = dispatch.weight_layout(N, K, "cpu", act=act)
    kernel = {"sm_90a": gemm_nvfp4_sm90_wgmma, "sm_100a": gemm_nvfp4_sm100}[arch]
    kernel = gemm_nvfp4_sm90_fp8 if act == "fp8" else kernel
    assert layout == registry.weight_layout(kernel)
    kernel.compiled.cache_clear()
    a, b = _operands(kernel, act, "cpu")
    with emulate(arch), dispatch.batch_invariant(), dispatch.recording() as choices:
        made = {m: ops.gemm_nvfp4(_first(a, m, kernel), b, out_dtype=torch.float32) for m in M[1:]}
    kernel.compiled.cache_clear()
    gemms = [c for c in choices if c.op == "gemm_nvfp4"]
    assert len({c.kernel for c in gemms}) == 1
    assert len({c.module.arithmetic(c.problem, c.config) for c in gemms}) == 1
    if arch == "sm_90a":
        assert len({c.config for c in gemms}) > 1
    for m, rows in made.items():
        assert torch.equal(rows, made[max(M)][:m])
