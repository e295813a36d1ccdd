"""The hyper-connection kernels compile for both architectures without spills, with the instructions that they count on;
their PTX, tensor cores included, runs in the emulator to what the reference says.
"""

import concurrent.futures
import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ptx_emulator
from fp4suite import built, dispatch, testing
from fp4suite.built import Built
from fp4suite.problem import HyperConnectionPostPreProblem, HyperConnectionPostProblem, HyperConnectionPreProblem
from kernels_triton import hyper_connection, hyper_connection_post
from ptx_emulator.memory import GlobalMemory

from .checks import covering

ARCHS = ("sm_90a", "sm_100a")
KINDS = {False: HyperConnectionPreProblem, True: HyperConnectionPostPreProblem}


def default(m: int, post: bool, x: str = "bf16") -> hyper_connection.Config:
    return hyper_connection.default(KINDS[post](m=m, k=7168, x=x))


def defaults(post: bool) -> list[hyper_connection.Config]:
    return list(dict.fromkeys(default(m, post) for m in (1, 64, 4096)))


def compiled(pool: concurrent.futures.Executor, jobs: list[tuple[Callable[..., Built], tuple, dict]]) -> list[Built]:
    return [f.result() for f in [pool.submit(function, *args, **more) for function, args, more in jobs]]


def configs(post: bool) -> list[hyper_connection.Config]:
    """The defaults, and the largest steps that are let through: with post, which holds more, where that may be."""
    changes: list[dict[str, Any]] = [
        {"block_m": 16, "num_warps": 4},
        {"block_m": 16, "num_warps": 4, "num_stages": 2, "ahead": True},
        {"block_m": 16, "block_d": 32, "num_warps": 8, "num_stages": 2, "ahead": True},
        {"block_m": 64, "num_warps": 8},
        {"block_m": 64, "block_d": 128, "num_warps": 8, "num_stages": 2},
    ]
    largest = [dataclasses.replace(default(4096, False), **change) for change in changes]
    with_post = [c for c in largest if hyper_connection.supports(KINDS[True](m=c.block_m, k=7168), c) is None]
    found = with_post if post else [c for c in largest if c not in with_post]
    wanted = [*defaults(post), *found]
    return [c for c in wanted if hyper_connection.supports(KINDS[post](m=c.block_m, k=7168), c) is None]


@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_products_do_not_spill(arch, post, pool):
    with dispatch.on_target(arch):
        wanted = configs(post) if arch == "sm_90a" else [default(64, True)]
    assert len(wanted) >= (3 if arch == "sm_90a" else 1)
    jobs = [(hyper_connection.build_sums, ("bf16", 7168, c, arch), {"outputs": 24, "post": post}) for c in wanted]
    jobs += [(hyper_connection.build_sums, ("bf16", 7168, wanted[-1], arch), {"outputs": 4})]
    for (_, args, _), b in zip(jobs, compiled(pool, jobs), strict=True):
        config, found = args[2], built.resources(b)
        assert found.spill_bytes <= (64 if arch == "sm_100a" else 0), args
        assert dataclasses.replace(found, spill_bytes=0).refusal(arch) is None, args
        tensor_core = {"sm_90a": "wgmma", "sm_100a": "tcgen05.mma"}[arch] if config.block_m >= 64 else "mma.sync"
        assert tensor_core in b.ptx, args
        assert ("cp.async" in b.ptx) != config.ahead, args  # the next step is on its way


@pytest.mark.parametrize("arch", ARCHS)
def test_folds_do_not_spill(arch, pool):
    jobs: list[tuple[Callable[..., Built], tuple, dict]] = []
    for warps, made in ((4, True), (8, False), (16, True)):
        config = dataclasses.replace(hyper_connection.Config(), fold_warps=warps)
        assert hyper_connection.supports(HyperConnectionPreProblem(m=64, k=7168), config) is None
        jobs.append((hyper_connection.build_fold, ("bf16", 7168, config, arch), {"sinkhorn": True, "made": made}))
    head = hyper_connection.Config(fold_warps=8)
    jobs.append((hyper_connection.build_fold, ("bf16", 7168, head, arch), {"sinkhorn": False, "many": True}))
    (alone,) = compiled(pool, [(hyper_connection.build_sinkhorn, (arch,), {})])
    assert built.resources(alone).refusal(arch) is None
    for (_, args, _), b in zip(jobs, compiled(pool, jobs), strict=True):
        found = built.resources(b)
        assert found.refusal(arch) is None, args
        assert found.shared_bytes <= 16384, args
        assert re.search(r"ld\.global\S*\.v4\.b32", b.ptx), args
        assert "griddepcontrol.wait" in b.ptx, args


@pytest.mark.parametrize("arch", ARCHS)
def test_post_does_not_spill(arch, pool):
    """The default, and the others for the architectures in turn."""
    problem = HyperConnectionPostProblem(m=64, k=7168)
    default, *others = covering(hyper_connection_post, problem)
    wanted = [default, *others[ARCHS.index(arch) :: 2]]
    assert len(wanted) >= 2
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
            (x, 7168, default(1, True, x), "sm_90a"),
            {"outputs": 24, "post": True},
        ),
        (hyper_connection.build_fold, (x, 7168, default(1, False, x), "sm_90a"), {"sinkhorn": True}),
        (
            hyper_connection_post.build,
            (HyperConnectionPostProblem(m=1, k=7168, x=x), hyper_connection_post.Config(), "sm_90a"),
            {},
        ),
    ]
    if x == "fp32":  # products of the streams as they are read
        jobs.append((hyper_connection.build_sums, (x, 7168, default(1, False, x), "sm_90a"), {"outputs": 24}))
    for b in compiled(pool, jobs):
        assert built.resources(b).spill_bytes <= 64  # products outside of tensor cores: right, not fast


def launches(built_launches: list[tuple[Built, int, list[Any]]], **how: Any) -> list[Any]:
    """Launches on CPU tensors that share them; None stands for a pointer that a kernel was compiled without."""
    memory = GlobalMemory()
    prepared = []
    for b, programs, args in built_launches:
        loaded = ptx_emulator.load(b.ptx)
        arrays = [
            a.view(torch.int16) if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 else a
            for a in args
            if a is not None
        ]
        prepared.append(
            loaded.prepare(
                grid=(programs, 1, 1),
                block=loaded.program().kernel.required_threads,
                args=[*(a.numpy() if isinstance(a, torch.Tensor) else a for a in arrays), 0, 0],
                shared=b.shared_bytes,
                memory=memory,
                **how,
            )
        )
    return prepared


IN_TURN = {"programs": 1, "ahead": False}
CASES = {
    "few": (False, 5, default(1, False)),
    "few, post": (True, 5, default(1, True)),
    "many": (False, 5, default(4096, False)),
    "many, post": (True, 5, default(4096, True)),
    "blocks in turn": (False, 21, dataclasses.replace(default(1, False), **IN_TURN)),
    "blocks in turn, post": (True, 35, dataclasses.replace(default(1, True), block_m=32, **IN_TURN)),
}


def case_of(post: bool, m: int, k: int) -> Any:
    case = testing.case(KINDS[post](m=m, k=k), "cpu", 3)
    case.poison()
    return case


@pytest.mark.parametrize("name", CASES)
def test_hoppers_machine_code_in_the_emulator(name, pool):
    """All launches, on tensor cores: within the bounds of the case, and the streams to the byte."""
    post, m, config = CASES[name]
    k, many = 80 if "in turn" in name else 144, name.startswith("many")  # two blocks, three and more
    case = case_of(post, m, k)
    y, h, site = (case.operands[0], case.operands[1], case.operands[2:4]) if post else (None, case.operands[0], ())
    fn, base, scale, weight = case.operands[-7:-3]
    streams, *folded = case.out if post else (None, *case.out)
    jobs: list[tuple[Callable[..., Built], tuple, dict]] = [
        (hyper_connection.build_sums, ("bf16", k, config, "sm_90a"), {"outputs": 24, "post": post}),
        (hyper_connection.build_fold, ("bf16", k, config, "sm_90a"), {"sinkhorn": True, "made": post, "many": many}),
        (hyper_connection.build_sinkhorn, ("sm_90a",), {}),
    ]
    product, fold, sinkhorn = compiled(pool, jobs)
    count = -(-k // config.block_d)
    groups = max(1, min(-(-m // config.block_m), config.programs // count))
    parts = torch.full((m, count, 32), torch.nan)
    operands = [h, h.stride(0), h.stride(1), y, k, *(site or (None, None)), streams, fn, parts, m, k, groups]
    first = (product, count * groups, operands)
    entering = h if streams is None else streams
    numbers = [m, k, testing.EPS, testing.EPS, 20]
    y, *mixed = folded
    sums = torch.full((m, 32), torch.nan)
    left = [y, sums] if many else [y, *mixed]
    operands = [entering, entering.stride(0), entering.stride(1), parts, base, scale, weight, *left, *numbers]
    second = (fold, hyper_connection.fold_programs(m, sinkhorn=not many), operands)
    third = (sinkhorn, 1, [sums, base, scale, *mixed, *numbers])
    for one in launches([first, second, third] if many else [first, second], races="strict"):
        one.run(1)
    case.check()
