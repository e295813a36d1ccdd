"""swiglu_quantize gives the reference's bytes: every config, rule, layout and type, every gate, odd strides."""

import pytest
import torch
import triton
import triton.language as tl

from fp4suite import reference, testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RULES, SwigluQuantizeProblem
from kernels_triton import near, silu, swiglu_quantize as kernel
from kernels_triton.nvfp4 import LOG2E

from .checks import RULES_LAYOUTS_TYPES, assert_same, configs, every_bf16, run

WIDE = kernel.Config(block_m=16, block_k=256)


def check(
    x: torch.Tensor,
    alpha: float,
    rule: str = "absmax",
    sf_layout: str = "linear",
    config: object = None,
    limit: float = 10.0,
) -> None:
    a = torch.tensor(alpha, device=x.device)
    got = run(kernel, (x, limit, a), x.shape[0], x.shape[1] // 2, rule, sf_layout, config)
    keys = {"rule": rule, "sf_layout": sf_layout}
    for device in {x.device, torch.device("cpu")}:
        want = reference.swiglu_quantize(x.to(device), limit=limit, alpha=a.to(device), **keys)  # type: ignore[arg-type]
        assert_same(got, want)


@pytest.mark.parametrize("config", configs(kernel, SwigluQuantizeProblem(m=1, k=16)), ids=str)
def test_every_config(config, device, hard_rows):
    """Ragged in m and k."""
    check(hard_rows(5, 1184, torch.bfloat16, device), 0.01, config=config)


@pytest.mark.parametrize(("rule", "sf_layout", "dtype"), RULES_LAYOUTS_TYPES, ids=str)
def test_every_rule_layout_and_type(rule, sf_layout, dtype, device, hard_rows):
    check(hard_rows(19, 416, dtype, device), 0.01, rule, sf_layout, WIDE)


@pytest.mark.parametrize("limit", [10.0, 0.3, 7.1, 3e38])
def test_every_gate_and_up(limit, device):
    """Each BF16 number as a gate beside another as an up; infinities and NaN too."""
    gates = every_bf16(device).view(32, 2048)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(0)).to(device)
    ups = gates.view(-1)[order].view(32, 2048)
    config = kernel.Config(block_m=16, block_k=512, num_warps=8)
    check(torch.cat((gates, torch.ones_like(ups)), dim=1), 0.01, "absmax", "linear", config, limit)
    for rule in ("absmax", "mse") if limit == 10 else ("absmax",):
        check(torch.cat((gates, ups), dim=1), 0.01, rule, "linear", config, limit)


def test_rows_of_any_stride(device, hard_rows):
    wide = hard_rows(12, 512, torch.bfloat16, device)
    for x in (wide[::3], wide[:, 16:208], wide[1::2, 5:389]):
        check(x, 0.01)


def test_no_rows(device):
    x, alpha = torch.empty(0, 128, device=device), torch.ones((), device=device)
    run(kernel, (x, 10.0, alpha), 0, 64, "absmax", "blocked_128x4")


def test_cases_of_the_tuner(device):
    for rule in RULES:
        c = testing.case(SwigluQuantizeProblem(m=3, k=448, rule=rule), device)
        c.run(kernel, kernel.Config())
        c.check()


@pytest.mark.parametrize("m", [0, 1, 37])
def test_global_scale(m, device, hard_rows):
    x = hard_rows(m, 416, torch.bfloat16, device) if m else torch.empty(0, 416, device=device)
    for value in (None, -5000.0, float("nan")):
        if value is not None and m:
            x[m // 2, 415] = value
        alpha = torch.full((), 123.0, device=device)
        kernel.global_scale(x, 10.0, alpha, kernel.Config())
        want = reference.swiglu_quantize(x.cpu()).alpha
        torch.testing.assert_close(alpha.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_every_bit_of_the_activation(device):
    """A code hides most bits of what was quantised; the global scale of single rows shows them."""
    x = (3 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).to(device)
    for row in x.split(1):
        alpha = torch.zeros((), device=device)
        kernel.global_scale(row, 10.0, alpha, kernel.Config())
        assert torch.equal(alpha.cpu(), reference.swiglu_quantize(row.cpu()).alpha)


@triton.jit
def _silu(g_ptr, out_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    g = tl.load(g_ptr + at)
    tl.store(out_ptr + at, g * silu.near_sigmoid(g * LOG2E * -1.0))


@pytest.mark.gpu
def test_the_approximation_errs_as_little_as_is_said(device):
    """Of every BF16 gate up to the largest limit; `near` allows for two roundings more."""
    every = every_bf16(device).flatten().float()
    gates = torch.where(every.abs() <= silu.MOST_BOUNDED, every, 1.0)
    found = torch.empty_like(gates)
    _silu[(64,)](gates, found, N=1024)
    ones = torch.ones_like(gates)
    want = reference.quant.swiglu_fp32(torch.stack((gates, ones), dim=1), silu.MOST_BOUNDED)[:, 0].double()
    assert ((found.double() - want).abs() <= (near.ERROR - 2.0**-23) * want.abs() + 2.0**-100).all()


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on new inputs: the global scale too."""
    x = torch.randn(64, 6144, device=device).bfloat16()
    alpha = torch.zeros((), device=device)
    out = NVFP4Tensor.empty((64, 3072), alpha, "linear")
    kernel.warm(SwigluQuantizeProblem(m=64, k=3072), kernel.Config())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.global_scale(x, 10.0, alpha, kernel.Config())
        kernel.launch(x, 10.0, alpha, out, "absmax", kernel.Config())
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(64, 6144, device=device) * 10.0**seed)
        graph.replay()
        want = reference.swiglu_quantize(x)
        assert_same(out, want)
        assert torch.equal(alpha, want.alpha)
