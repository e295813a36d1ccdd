"""rmsnorm_quantize gives the reference's bytes: every config, rule, layout and type, hard rows, odd strides."""

import pytest
import torch

from fp4suite import reference, testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RULES, RmsnormQuantizeProblem
from kernels_triton import rmsnorm_quantize as kernel

from .checks import RULES_LAYOUTS_TYPES, assert_same, covering, every_bf16, run

WIDE = kernel.Config(block_m=16, num_warps=16)  # few programs over padded rows, for the interpreter's sake


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    alpha: float,
    rule: str = "absmax",
    sf_layout: str = "linear",
    config: object = None,
    eps: float = 1e-6,
) -> None:
    a = torch.tensor(alpha, device=x.device)
    got = run(kernel, (x, weight, eps, a), *x.shape, rule, sf_layout, config)
    keys = {"rule": rule, "sf_layout": sf_layout}
    for device in {x.device, torch.device("cpu")}:
        operands = x.to(device), weight.to(device), eps
        assert_same(got, reference.rmsnorm_quantize(*operands, alpha=a.to(device), **keys))  # type: ignore[arg-type]


def weights(k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (1 + 0.3 * torch.randn(k, generator=torch.Generator().manual_seed(k))).to(dtype).to(device)


@pytest.mark.parametrize("k", [64, 1104, 7168])
def test_every_config(k, device, hard_rows):
    """Every value of every knob, ragged in m, and in k against tiles and the chunks of the sum."""
    for config in covering(kernel, RmsnormQuantizeProblem(m=3, k=k)):
        check(hard_rows(3, k, torch.bfloat16, device), weights(k, device), 0.002, config=config)


@pytest.mark.parametrize(("rule", "sf_layout", "dtype"), RULES_LAYOUTS_TYPES, ids=str)
def test_every_rule_layout_and_type(rule, sf_layout, dtype, device, hard_rows):
    """Weights of x's type, and of FP32 beside 16-bit rows."""
    x = hard_rows(7, 208, dtype, device)
    for weight_dtype in {dtype, torch.float32} if rule == "absmax" else {dtype}:
        check(x, weights(208, device, weight_dtype), 0.002, rule, sf_layout, WIDE)


@pytest.mark.parametrize("k", [16, 48, 512, 1024, 1536, 2064, 4096, 7168, 16384])
@pytest.mark.parametrize("m", [3, 4096])
def test_lengths(m, k, device, hard_rows):
    """By the default configs of few and of many rows."""
    config = kernel.default(RmsnormQuantizeProblem(m=m, k=k))
    check(hard_rows(3, k, torch.bfloat16, device), weights(k, device), 0.002, config=config)


@pytest.mark.parametrize("eps", [1e-6, 0.0, 1.0])
def test_rows_of_zeros_and_of_anything(eps, device):
    """Without eps a row of zeros is NaN; rows of all BF16 numbers hold infinities and NaN."""
    x = torch.zeros(3, 96, device=device)
    x[1] = torch.linspace(-1, 1, 96)
    for rule in RULES:
        check(x, weights(96, device), 0.002, rule, "blocked_128x4", WIDE, eps)
    if eps < 1:
        check(every_bf16(device), weights(4096, device), 0.002, "absmax", eps=eps)


def test_rows_of_any_stride(device, hard_rows):
    wide = hard_rows(12, 512, torch.bfloat16, device)
    for x in (wide[::3], wide[:, 16:208], wide[1::2, 5:389]):
        check(x, weights(x.shape[1], device), 0.002)


def test_no_rows(device):
    x, weight, alpha = torch.empty(0, 64, device=device), torch.ones(64, device=device), torch.ones((), device=device)
    run(kernel, (x, weight, 1e-6, alpha), 0, 64, "absmax", "blocked_128x4")


def test_cases_of_the_tuner(device):
    for rule in RULES:
        c = testing.case(RmsnormQuantizeProblem(m=3, k=448, rule=rule), device)
        c.run(kernel, kernel.Config())
        c.check()


@pytest.mark.parametrize("m", [0, 1, 37])
@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_global_scale(m, eps, device, hard_rows):
    x = hard_rows(m, 208, torch.bfloat16, device) if m else torch.empty(0, 208, device=device)
    weight = weights(208, device)
    for zero_row in (False, True):
        if zero_row and m:
            x[-1] = 0
        alpha = torch.full((), 123.0, device=device)
        kernel.global_scale(x, weight, eps, alpha, kernel.Config(block_m=4, num_warps=4))
        want = reference.rmsnorm_quantize(x.cpu(), weight.cpu(), eps).alpha
        torch.testing.assert_close(alpha.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_every_bit_of_the_norm(device):
    """A code hides most bits of what was quantised; the global scale of single rows shows them."""
    x = torch.randn(32, 208, generator=torch.Generator().manual_seed(0)).to(device)
    weight = weights(208, device, torch.float32)
    for row in x.split(1):
        alpha = torch.zeros((), device=device)
        kernel.global_scale(row, weight, 1e-6, alpha, kernel.Config())
        assert torch.equal(alpha.cpu(), reference.rmsnorm_quantize(row.cpu(), weight.cpu(), 1e-6).alpha)


def test_refusals():
    def why(k: int, **config: int) -> str | None:
        return kernel.supports(RmsnormQuantizeProblem(m=1, k=k), kernel.Config(**config))

    assert why(16384) is None
    assert why(7168, block_m=2, num_warps=1) == "block_m=2 num_warps=1: a row takes a warp or more"
    assert why(1536, parts=4) == "k=1536 has 2 tiles of 1024 columns, too few for 4 parts"
    assert why(7168, num_warps=4, held=True) == "held rows have one part and tiles of up to 1024 columns, got 1 of 2048"
    assert why(7168, num_warps=1, held=True) == "k=7168 tile_k=512: 224 elements a thread, held up to 128"


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on new inputs: the global scale too."""
    x, weight = torch.randn(64, 7168, device=device).bfloat16(), weights(7168, device)
    alpha = torch.zeros((), device=device)
    out = NVFP4Tensor.empty((64, 7168), alpha, "linear")
    kernel.warm(RmsnormQuantizeProblem(m=64, k=7168), kernel.Config())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.global_scale(x, weight, 1e-6, alpha, kernel.Config())
        kernel.launch(x, weight, 1e-6, alpha, out, "absmax", kernel.Config())
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(64, 7168, device=device) * 10.0**seed)
        graph.replay()
        want = reference.rmsnorm_quantize(x, weight, 1e-6)
        assert_same(out, want)
        assert torch.equal(alpha, want.alpha)
