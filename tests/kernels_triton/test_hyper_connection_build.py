"""The hyper-connection kernels compile for both architectures without spills, with the instructions that they count on;
their PTX, tensor cores included, runs in the emulator to what the reference says.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ptx_emulator
from fp4suite import built, testing
from fp4suite.built import Built
from fp4suite.problem import HyperConnectionPostPreProblem, HyperConnectionPostProblem, HyperConnectionPreProblem
from kernels_triton import hyper_connection, hyper_connection_post

ARCHS = ("sm_90a", "sm_100a")
FEW = {post: hyper_connection.default(1, "bf16", post=post) for post in (False, True)}
MANY = hyper_connection.default(4096, "bf16")


def compiled(pool: concurrent.futures.Executor, jobs: list[tuple[Callable[..., Built], tuple, dict]]) -> list[Built]:
    return [f.result() for f in [pool.submit(function, *args, **more) for function, args, more in jobs]]


def configs(post: bool) -> list[hyper_connection.Config]:
    """The defaults, the largest and the smallest steps that are let through, and the most stages."""
    changes: list[dict[str, Any]] = [
        {"block_m": 16, "block_d": 64, "num_warps": 4, "num_stages": 4},
        {"block_m": 64, "block_d": 32, "num_warps": 8, "num_stages": 4},
        {"block_m": 64, "block_d": 64, "num_warps": 4, "num_stages": 2},
        {"block_m": 128, "block_d": 32, "num_warps": 4, "num_stages": 2},
        {"block_m": 64, "block_d": 64},
        {"block_m": 128, "block_d": 64, "num_warps": 8, "num_stages": 2},
    ]
    wanted = [FEW[post], MANY, *(dataclasses.replace(MANY, **change) for change in changes)]
    return [c for c in wanted if hyper_connection.refuse(4, 7168, "bf16", c, post=post) is None]


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_products_do_not_spill(arch, post, pool):
    wanted = configs(post) if arch == "sm_90a" else [FEW[post], MANY]
    assert len(wanted) >= (3 if arch == "sm_90a" else 2)
    jobs = [(hyper_connection.build_sums, ("bf16", c, arch), {"outputs": 24, "post": post}) for c in wanted]
    jobs += [(hyper_connection.build_sums, ("bf16", MANY, arch), {"outputs": 4})]
    for (_, args, _), b in zip(jobs, compiled(pool, jobs), strict=True):
        assert built.resources(b).refusal(arch) is None, args
        tensor_core = {"sm_90a": "wgmma", "sm_100a": "tcgen05.mma"}[arch] if args[1].block_m > 16 else "mma.sync"
        assert tensor_core in b.ptx, args
        assert "cp.async" in b.ptx, args  # the next step is on its way


@pytest.mark.parametrize("arch", ARCHS)
def test_folds_do_not_spill(arch, pool):
    """Two programs an SM at least, so that one loads while the other computes."""
    jobs: list[tuple[Callable[..., Built], tuple, dict]] = [
        (
            hyper_connection.build_fold,
            ("bf16", k, dataclasses.replace(MANY, fold_warps=w), arch),
            {"sinkhorn": sinkhorn},
        )
        for k in (4096, 7168)
        for w in hyper_connection.SPACE["fold_warps"]
        for sinkhorn in (False, True)
    ]
    for (_, args, _), b in zip(jobs, compiled(pool, jobs), strict=True):
        found = built.resources(b)
        assert found.refusal(arch) is None, args
        assert found.registers * 32 * args[2].fold_warps <= 32768, (args, found)
        assert "ld.global.v4.b32" in b.ptx, args


@pytest.mark.parametrize("arch", ARCHS)
def test_post_does_not_spill(arch, pool):
    problem = HyperConnectionPostProblem(m=64, k=7168)
    wanted = [c for c in testing.configs(hyper_connection_post) if hyper_connection_post.supports(problem, c) is None]
    assert len(wanted) >= 6
    for config, b in zip(
        wanted, compiled(pool, [(hyper_connection_post.build, (problem, c, arch), {}) for c in wanted]), strict=True
    ):
        assert built.resources(b).refusal(arch) is None, config
        assert "fma.rn.f32" not in b.ptx  # each operation is rounded alone, as in the reference
        assert ("ld.global.v4.b32" in b.ptx) == (config.block_d >= 8 * 32 * config.num_warps), config


@pytest.mark.parametrize("x", ["fp16", "fp32"])
def test_other_types_compile(x, pool):
    jobs: list[tuple[Callable[..., Built], tuple, dict]] = [
        (
            hyper_connection.build_sums,
            (x, hyper_connection.default(1, x, post=True), "sm_90a"),
            {"outputs": 24, "post": True},
        ),
        (hyper_connection.build_fold, (x, 7168, MANY, "sm_90a"), {"sinkhorn": True}),
        (
            hyper_connection_post.build,
            (HyperConnectionPostProblem(m=1, k=7168, x=x), hyper_connection_post.Config(), "sm_90a"),
            {},
        ),
    ]
    for b in compiled(pool, jobs):
        assert built.resources(b).spill_bytes <= 64  # products outside of tensor cores: right, not fast


def emulated(b: Built, grid: tuple[int, ...], args: list[Any]) -> None:
    """Launch on CPU tensors; None stands for a pointer that the kernel was compiled without."""
    arrays = [
        a.view(torch.int16).numpy() if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a for a in args
    ]
    module = ptx_emulator.load(b.ptx)
    module.launch(
        grid=grid,
        block=module.program().kernel.required_threads,
        args=[a.numpy() if isinstance(a, torch.Tensor) else a for a in arrays if a is not None] + [0, 0],
        shared=b.shared_bytes,
    )


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_hoppers_machine_code_in_the_emulator(few, post, pool):
    """Both launches, on tensor cores: within the bounds of the case, and the streams to the byte."""
    config = dataclasses.replace(FEW[post] if few else MANY, splits=2)
    kind = HyperConnectionPostPreProblem if post else HyperConnectionPreProblem
    case = testing.case(kind(m=5, k=144), "cpu", 3)
    case.poison()
    y, h, site = (case.operands[0], case.operands[1], case.operands[2:4]) if post else (None, case.operands[0], ())
    fn, base, scale, weight = case.operands[-7:-3]
    streams, *folded = case.out if post else (None, *case.out)
    jobs: list[tuple[Callable[..., Built], tuple, dict]] = [
        (hyper_connection.build_sums, ("bf16", config, "sm_90a"), {"outputs": 24, "post": post}),
        (hyper_connection.build_fold, ("bf16", 144, config, "sm_90a"), {"sinkhorn": True}),
    ]
    product, fold = compiled(pool, jobs)
    parts = torch.full((2, 5, 32), torch.nan)
    operands = [h, h.stride(0), h.stride(1), y, 144, *(site or (None, None)), streams, fn, parts, 5, 144]
    emulated(product, (-(-5 // config.block_m), 2, 1), operands)
    entering = h if streams is None else streams
    operands = [entering, entering.stride(0), entering.stride(1), parts, base, scale, weight, *folded, 5, 144]
    emulated(fold, (6, 1, 1), [*operands, testing.EPS, testing.EPS, 20])
    case.check()
