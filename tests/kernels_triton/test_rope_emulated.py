"""The machine code of the norm and RoPE kernels in `ptx_emulator`, for both architectures: hardware conversions,
shuffles and vector accesses, which Triton's interpreter does not have, give the reference's bytes too.
"""

import concurrent.futures
import re
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton

import ptx_emulator
from fp4suite import testing
from fp4suite.built import Built
from fp4suite.problem import (
    KvNormRopeInsertProblem,
    Problem,
    QkvNormRopeInsertProblem,
    QnormRopeProblem,
    QnormRopeQuantizeProblem,
    RmsNormProblem,
    RopeInverseInPlaceProblem,
    RopeInverseProblem,
    RopeInverseQuantizeProblem,
)
from kernels_triton import (
    host,
    kv_norm_rope_insert,
    qkv_norm_rope_insert,
    qnorm_rope,
    qnorm_rope_quantize,
    rms_norm,
    rope_inverse,
    rope_inverse_in_place,
    rope_inverse_quantize,
)

ARCHS = ("sm_90a", "sm_100a")
UNUSED = (0, 0)  # scratch memory, which Triton's kernels have as their last parameters


def emulate(
    pool: concurrent.futures.Executor, module: ModuleType | SimpleNamespace, problem: Problem, config: Any, arch: str,
    grid: tuple[int, ...], args: tuple[Any, ...],
) -> Built:  # fmt: skip
    """A launch as `module.launch` makes it; tensors among args become arrays that share their memory. What it ran."""
    built: Built = pool.submit(module.build, problem, config, arch).result()
    run(built, grid, args)
    return built


def run(built: Built, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
    loaded = ptx_emulator.load(built.ptx)
    loaded.launch(
        grid=grid,
        block=loaded.program().kernel.required_threads,
        args=[*(_array(a) if isinstance(a, torch.Tensor) else a for a in args), *UNUSED],
        shared=built.shared_bytes,
    )


def _array(t: torch.Tensor) -> np.ndarray:
    return t.reshape(-1).view(torch.uint8).numpy()


@pytest.mark.parametrize(
    ("format", "arch", "config"),
    [
        ("fp8_ds_mla", "sm_90a", (1, 1)),
        ("fp8_ds_mla", "sm_100a", (4, 4)),
        ("nvfp4", "sm_90a", (2, 2)),
        ("nvfp4", "sm_100a", (1, 1)),
        ("bf16", "sm_90a", (4, 4)),
        ("bf16", "sm_100a", (2, 2)),
        ("fp32", "sm_90a", (2, 2)),
        ("fp32", "sm_100a", (4, 4)),
        ("nvfp4", "sm_90a", (1, 1, True)),
        ("nvfp4", "sm_100a", (1, 1, True)),
    ],
    ids=str,
)
def test_kv_norm_rope_insert(format, arch, config, pool):
    """Every format on either architecture; ragged in rows, one of them of no slot."""
    problem = KvNormRopeInsertProblem(m=9, format=format)
    own = kv_norm_rope_insert.Config(**dict(zip(kv_norm_rope_insert.SPACE, config, strict=False)))
    case = testing.case(problem, "cpu", 1)
    case.poison()
    kv, weight, positions, table, eps, slots = case.operands
    args = (kv, kv.stride(0), weight, positions, table, eps, slots, case.out.data, problem.m)
    emulate(pool, kv_norm_rope_insert, problem, own, arch, (triton.cdiv(problem.m, own.block_m),), args)
    case.check()


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("sm_90a", {"by_blocks": True, "turns": 4}),
        ("sm_100a", {"by_blocks": True}),
        ("sm_100a", {"block_h": 2, "num_warps": 2}),
    ],
    ids=str,
)
def test_qnorm_rope_quantize(arch, config, pool):
    """16 heads, for the build takes them as a multiple of 16."""
    problem = QnormRopeQuantizeProblem(m=2, heads=16)
    own = qnorm_rope_quantize.Config(**config)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    q, positions, table, eps = case.operands
    args = (q, q.stride(0), q.stride(1), positions, table, eps, case.out, problem.heads)
    grid = (problem.m, triton.cdiv(problem.heads, own.block_h * own.turns))
    emulate(pool, qnorm_rope_quantize, problem, own, arch, grid, args)
    case.check()


@pytest.mark.parametrize(
    ("format", "arch", "config"),
    [
        ("fp8_ds_mla", "sm_90a", {"parts": 3}),
        ("fp8_ds_mla", "sm_100a", {"held": True}),
        ("nvfp4", "sm_90a", {"block_kv": 2, "held": True}),
        ("nvfp4", "sm_100a", {"block_kv": 4, "num_warps": 2, "parts": 2}),
        ("bf16", "sm_100a", {"parts": 3}),
        ("fp32", "sm_90a", {"parts": 2}),
    ],
    ids=str,
)
def test_qkv_norm_rope_insert(format, arch, config, pool):
    """Columns of one tensor; ragged in rows of kv, one of them of no slot; a tile of q of which one part has none."""
    problem = QkvNormRopeInsertProblem(m=9, k=1536, format=format)
    own = qkv_norm_rope_insert.Config(**config)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    q, q_weight, kv, kv_weight, positions, table, eps, slots = case.operands
    assert (q.stride(), kv.stride()) == ((2048, 1), (2048, 1))
    both = q.as_strided((problem.m * 2048,), (1,))
    normed, cache = case.out
    args = (both, 2048, q_weight, both[1536:], 2048, kv_weight, positions, table, eps, slots)
    grid = (triton.cdiv(problem.m, own.block_kv) + problem.m * own.parts,)
    emulate(pool, qkv_norm_rope_insert, problem, own, arch, grid, (*args, normed, cache.data, problem.m))
    case.check()


@pytest.mark.parametrize(
    ("k", "x", "arch", "config"),
    [
        (1536, "bf16", "sm_100a", {"parts": 3}),
        (1536, "bf16", "sm_90a", {"held": True}),
        (1536, "fp32", "sm_90a", {"parts": 2}),
        (7168, "bf16", "sm_90a", {"num_warps": 4, "parts": 4}),
        (7168, "bf16", "sm_100a", {"num_warps": 2, "held": True}),
        (208, "bf16", "sm_90a", {}),
    ],
    ids=str,
)
def test_rms_norm(k, x, arch, config, pool):
    problem, own = RmsNormProblem(m=3, k=k, x=x), rms_norm.Config(**config)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    rows, weight, eps = case.operands
    emulate(pool, rms_norm, problem, own, arch, (3, own.parts), (rows, k, weight, eps, case.out, problem.m))
    case.check()


@pytest.mark.parametrize(("i", "config"), list(enumerate([(1, 1), (2, 1), (8, 4)])), ids=str)
@pytest.mark.parametrize(
    ("j", "module", "kind"), [(0, qnorm_rope, QnormRopeProblem), (1, rope_inverse, RopeInverseProblem)]
)
def test_heads(i, config, j, module, kind, pool):
    """16 heads, for the build takes them as a multiple of 16; the architectures by turns."""
    arch = ARCHS[(i + j) % 2]
    problem = kind(m=2, heads=16)
    own = module.Config(block_h=config[0], num_warps=config[1])
    case = testing.case(problem, "cpu", 1)
    case.poison()
    x, positions, table, *eps = case.operands
    args = (x, x.stride(0), x.stride(1), positions, table, *eps, case.out, problem.heads)
    emulate(pool, module, problem, own, arch, (problem.m, triton.cdiv(problem.heads, own.block_h)), args)
    case.check()


@pytest.mark.parametrize(("arch", "config"), [("sm_90a", (8, 1)), ("sm_100a", (32, 4)), ("sm_90a", (4, 8))], ids=str)
def test_rope_inverse_in_place(arch, config, pool):
    """Nobody reads what another has written: with fewer numbers than threads, too, several of which have the same."""
    problem = RopeInverseInPlaceProblem(m=2, heads=16)
    own = rope_inverse_in_place.Config(block_h=config[0], num_warps=config[1])
    case = testing.case(problem, "cpu", 1)
    case.poison()
    (positions, table), o = case.operands, case.out
    first = o.view(-1)[problem.head_dim - problem.rope_dim :]
    args = (first, o.stride(0), o.stride(1), positions, table, problem.heads)
    b = emulate(pool, rope_inverse_in_place, problem, own, arch, (2, triton.cdiv(problem.heads, own.block_h)), args)
    case.check()
    stores, loads = (re.findall(rf"{which}\.global", b.ptx) for which in ("st", "ld"))
    assert b.ptx.rindex("ld.global") < b.ptx.index("st.global")
    assert len(loads) == len(stores) + 3  # o once; position, cosines and sines


@pytest.mark.parametrize(("arch", "sf_layout"), [("sm_90a", "linear"), ("sm_100a", "blocked_128x4")])
def test_rope_inverse_quantize(arch, sf_layout, pool):
    problem = RopeInverseQuantizeProblem(m=3, heads=4, groups=2, sf_layout=sf_layout)
    tall = sf_layout == "blocked_128x4"  # few programs over padded rows, for the emulator's sake
    own = rope_inverse_quantize.Config(block_m=16 if tall else 4, block_k=1024, num_warps=16 if tall else 4)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    o, positions, table, groups, alpha = case.operands
    out = (case.out.data, case.out.sf, case.out.sf[0].numel())
    args = (o, o.stride(0), o.stride(1), positions, table, alpha, *out, problem.m, problem.k)
    grid = (*host.grid(problem.m, problem.k, own.block_m, own.block_k, sf_layout), groups)
    emulate(pool, rope_inverse_quantize, problem, own, arch, grid, args)
    case.check()
