"""The machine code of the quantisers in `ptx_emulator`: hardware conversions, shuffles, sums that cross warps, and the
quotient of SwiGLU, none of which Triton's interpreter has.
"""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fp4suite import reference, testing
from fp4suite.built import Built
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import Problem, QuantizeProblem, RmsnormQuantizeProblem, SwigluQuantizeProblem
from kernels_triton import host, quantize_nvfp4, rmsnorm_quantize, swiglu_quantize

from .checks import assert_same
from .test_build import holds_most
from .test_rope_emulated import emulate


def quantised(case: Any) -> tuple[torch.Tensor, torch.Tensor]:
    case.poison()
    return case.out.data, case.out.sf.view(torch.uint8)


@pytest.mark.parametrize(
    ("k", "config", "arch", "sf_layout"),
    [
        (7168, {"num_warps": 2, "held": True}, "sm_90a", "linear"),
        (7168, {"num_warps": 4, "parts": 4}, "sm_90a", "linear"),
        (1536, {"num_warps": 1, "held": True}, "sm_90a", "linear"),
        (1536, {"num_warps": 1, "parts": 2}, "sm_90a", "linear"),  # two tiles, and one
        (1536, {"num_warps": 2, "parts": 2}, "sm_100a", "linear"),
        (1536, {"block_m": 2, "num_warps": 4}, "sm_90a", "linear"),
        (208, {"block_m": 4, "num_warps": 4, "held": True}, "sm_100a", "blocked_128x4"),
    ],
    ids=str,
)
def test_rmsnorm_quantize(k, config, arch, sf_layout, pool):
    own = rmsnorm_quantize.Config(**config)
    problem = RmsnormQuantizeProblem(m=3, k=k, sf_layout=sf_layout)
    case = testing.case(problem, "cpu", 1)
    x, weight, eps, alpha = case.operands
    data, sf = quantised(case)
    args = (x, x.stride(0), weight, alpha, data, sf, problem.m, eps)
    (rows, _) = host.grid(problem.m, k, own.block_m, k, sf_layout)
    emulate(pool, rmsnorm_quantize, problem, own, arch, (rows, own.parts), args)
    case.check()


@pytest.mark.parametrize(
    ("rule", "arch", "sf_layout"),
    [
        ("absmax", "sm_90a", "linear"),
        ("absmax", "sm_100a", "blocked_128x4"),
        ("mse", "sm_100a", "linear"),
        ("modelopt_weight", "sm_90a", "blocked_128x4"),
    ],
)
def test_quantize_nvfp4(rule, arch, sf_layout, pool):
    """The hardware's FP4 conversion on sm_100a included."""
    tall = sf_layout == "blocked_128x4"  # few programs over padded rows, for the emulator's sake
    problem = QuantizeProblem(m=5, k=208 if tall else 1104, rule=rule, sf_layout=sf_layout)
    own = quantize_nvfp4.Config(block_m=16, num_warps=8) if tall else quantize_nvfp4.Config()
    own = holds_most(quantize_nvfp4, problem) if rule == "mse" else own
    case = testing.case(problem, "cpu", 1)
    x, alpha = case.operands
    data, sf = quantised(case)
    args = (x, x.stride(0), alpha, data, sf, problem.m, problem.k)
    grid = host.grid(problem.m, problem.k, own.block_m, own.block_k, problem.sf_layout)
    b = emulate(pool, quantize_nvfp4, problem, own, arch, grid, args)
    case.check()
    assert ("cvt.rn.satfinite.e2m1x2.f32" in b.ptx) == (arch == "sm_100a")


@pytest.mark.parametrize("config", [{}, {"block_m": 1, "num_warps": 1}], ids=str)
@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_swiglu_quantize(config, arch, pool):
    problem = SwigluQuantizeProblem(m=5, k=1104)
    own = swiglu_quantize.Config(**config)
    case = testing.case(problem, "cpu", 1)
    x, limit, alpha = case.operands
    data, sf = quantised(case)
    args = (x, x.stride(0), alpha, data, sf, problem.m, problem.k, limit)
    grid = host.grid(problem.m, problem.k, own.block_m, own.block_k, problem.sf_layout)
    emulate(pool, swiglu_quantize, problem, own, arch, grid, args)
    case.check()


def test_swiglu_next_to_changes_of_codes(pool):
    """Gates and ups whose codes an approximation cannot tell: as the reference says."""
    gen = torch.Generator().manual_seed(0)
    gates, ups = ((torch.randn(1 << 20, generator=gen) * 3).bfloat16().float() for _ in range(2))
    first = torch.tensor([8.0, 7.0])  # of each block the largest
    alpha = torch.tensor(0.0123)
    scale = reference.quantize_nvfp4(
        torch.full((1, 16), reference.quant.swiglu_fp32(first, 10.0).item()), alpha=alpha
    ).sf.float()[0, 0]
    y = reference.quant.swiglu_fp32(torch.stack((gates, ups), dim=1), 10.0)[:, 0].abs() / (scale * alpha)
    line = torch.minimum(torch.minimum(2 * y, y + 2), y / 2 + 4)
    far = (line - line.floor() - 0.5).abs()
    chosen = torch.where(y < 5.9, far, 1.0).argsort()[: 15 * 32]
    assert far[chosen].max() < 1e-3
    assert far[chosen[:2]].max() < 2.0**-20  # certainly in doubt
    x = torch.stack((gates[chosen], ups[chosen])).view(2, 2, 16, 15)
    x = torch.cat((first[:, None, None, None].expand(2, 2, 16, 1), x), dim=3)  # [gate or up, rows, blocks, 16]
    x = x.permute(1, 0, 2, 3).reshape(2, 512).bfloat16().contiguous()
    want = reference.swiglu_quantize(x, limit=10.0, alpha=alpha)
    out = NVFP4Tensor.empty((2, 256), alpha, "linear")
    args = (x, 512, alpha, out.data, out.sf.view(torch.uint8), 2, 256, 10.0)
    problem, own = SwigluQuantizeProblem(m=2, k=256), swiglu_quantize.Config(block_k=512)
    emulate(pool, swiglu_quantize, problem, own, "sm_90a", (2, 1), args)
    assert_same(out, want)


def build_amax(problem: Problem, config: swiglu_quantize.Config, arch: str) -> Built:
    """As the global scale's first launch: the largest magnitude of a program's tile, from FP32."""
    types = {"x_ptr": "*fp32", "stride_m": "i32", "alpha_ptr": "*fp32", "data_ptr": "*u8", "sf_ptr": "*u8"}
    types |= {"amax_ptr": "*i32", "M": "i32", "K": "i32", "limit": "fp32"}
    constants = swiglu_quantize._constants(10.0, "amax", "linear", False, config)
    return host.build(swiglu_quantize._swiglu_quantize, types, constants, arch, config.num_warps, unaligned=("M",))


def test_every_bit_of_swiglu(pool):
    """One element a row, whose maximum shows all its bits: quotients near the ends of FP32 and around tiny gates."""
    near_zero = [s * n * 2.0**e for s in (1, -1) for n in (0, 1, 3) for e in (-149, -126, -103, -24, -23, -22)]
    far = [-86.9, -87.5, -88.0, -88.37, -88.38, -88.4, -88.7, -89.0, -1e30, -3e38, -math.inf, math.nan]
    gen = torch.Generator().manual_seed(0)
    scales = (4.0, 40.0, 2.0**-23)
    gates = torch.cat(
        (torch.tensor([*near_zero, *far, 10.0, 11.0]), *(torch.randn(60, generator=gen) * s for s in scales))
    )
    x = torch.zeros(len(gates), 32)
    x[:, 0], x[:, 16] = gates, -7.3
    bits = torch.zeros(len(gates), dtype=torch.int32)
    own = swiglu_quantize.Config(block_m=1, num_warps=1)
    args = (x, 32, 0, 0, 0, bits, len(x), 16, 10.0)
    problem = SwigluQuantizeProblem(m=len(x), k=16)
    emulate(pool, SimpleNamespace(build=build_amax), problem, own, "sm_90a", (len(x), 1), args)
    want = reference.quant.swiglu_fp32(x, 10.0)[:, 0].abs()
    torch.testing.assert_close(bits.view(torch.float32), want, rtol=0, atol=0, equal_nan=True)


def test_one_newton_step_gives_the_nearest_reciprocal():
    """Of every divisor's significand but all ones, wherever the approximation lies within a unit. What rcp.rn, which
    takes the same step, would get wrong of that one, were the hardware's approximation of it the lower neighbour."""
    d = np.concatenate((np.arange(1 << 23, 1 << 24, 61), np.arange((1 << 24) - 4096, 1 << 24)))  # in units of 2^-23
    one = 1 << 47
    nearest = (2 * one // d + 1) // 2  # in units of 2^-24
    wrong = set()
    for off in (-1, 0, 1):
        near = nearest + off
        legal = np.abs(near * d - one) <= d
        error = ((one - near * d) / 2.0**47).astype(np.float32).astype(np.float64)  # exact, then rounded by the FMA
        step = near * error  # exact: 48 bits
        below = np.floor(step)
        tie = step - below == 0.5
        rounded = near + np.where(tie, below + (near + below) % 2, np.floor(step + 0.5)).astype(np.int64)
        wrong |= set(d[legal & (rounded != nearest)].tolist())
    assert wrong == {(1 << 24) - 1}
