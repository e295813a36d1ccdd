"""quantize_nvfp4 gives the reference's bytes: every config, rule, layout and type, hard inputs, odd strides."""

import pytest
import torch

from fp4suite import reference, testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RULES, QuantizeProblem
from kernels_triton import quantize_nvfp4 as kernel

from .checks import DTYPES, RULES_LAYOUTS_TYPES, assert_same, configs, every_bf16, run

WIDE = kernel.Config(block_m=16, block_k=256)  # few programs over padded rows, for the interpreter's sake


def problem(rule: str = "absmax") -> QuantizeProblem:
    return QuantizeProblem(m=5, k=1104, rule=rule)  # type: ignore[arg-type]


def check(x: torch.Tensor, alpha: torch.Tensor, rule: str, sf_layout: str = "linear", config: object = None) -> None:
    got = run(kernel, (x, alpha), *x.shape, rule, sf_layout, config)
    for device in {x.device, torch.device("cpu")}:
        want = reference.quantize_nvfp4(x.to(device), alpha=alpha.to(device), rule=rule, sf_layout=sf_layout)  # type: ignore[arg-type]
        assert_same(got, want)


@pytest.mark.parametrize("config", configs(kernel, problem()), ids=str)
def test_every_config(config, device, hard_rows):
    """Ragged in m and k."""
    check(hard_rows(5, 1104, torch.bfloat16, device), torch.tensor(0.01, device=device), "absmax", "linear", config)


@pytest.mark.parametrize(("rule", "sf_layout", "dtype"), RULES_LAYOUTS_TYPES, ids=str)
def test_every_rule_layout_and_type(rule, sf_layout, dtype, device, hard_rows):
    check(hard_rows(19, 208, dtype, device), torch.tensor(0.37, device=device), rule, sf_layout, WIDE)


@pytest.mark.parametrize("m", [1, 127, 128, 129])
def test_blocked_padding_is_written(m, device, hard_rows):
    """Rows up to a multiple of 128 and scales up to a multiple of 4 are zero, whatever lay there."""
    for rule in ("absmax", "modelopt_weight"):  # the latter gives zeros a scale of 1
        check(hard_rows(m, 80, torch.bfloat16, device), torch.tensor(0.01, device=device), rule, "blocked_128x4", WIDE)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [1.0, 0.01, 2.0**-117, 2.0**-118, 0.0, 1e36, -1.0, float("inf"), float("nan")])
def test_every_bf16_under_any_alpha(rule, alpha, device):
    """Infinities and NaN among the elements, and an alpha that no one should pass: still the reference's bytes."""
    x = every_bf16(device)
    shuffled = x.view(-1)[torch.randperm(65536, generator=torch.Generator().manual_seed(0)).to(device)].view(16, 4096)
    config = kernel.Config(block_m=16, block_k=1024, num_warps=16)
    for rows in (x, shuffled) if alpha == 1 else (shuffled,):
        check(rows, torch.tensor(alpha, device=device), rule, "linear", config)


@pytest.mark.parametrize("alpha", [1.0, 0.37, 0.0123, 3e-5])
def test_scales_at_ties(alpha, device, blocks_at_ties):
    """Here the order of the two products that make a scale can be seen in its byte."""
    x, a = blocks_at_ties(alpha, device), torch.tensor(alpha, device=device)
    for rule in RULES:
        check(x, a, rule, "linear", WIDE)
    if alpha != 1:
        amax, sixth = x.unflatten(-1, (-1, 16)).abs().amax(-1), torch.tensor(1 / 6, device=device)
        inv = torch.ones_like(a) / a
        one, other = ((amax * sixth * inv).to(torch.float8_e4m3fn), (amax * inv * sixth).to(torch.float8_e4m3fn))
        assert not torch.equal(one.float(), other.float())


@pytest.mark.parametrize("exponent", range(-110, 100, 30))
def test_amplitudes(exponent, device, hard_rows):
    x = hard_rows(7, 256, torch.float32, device) * 2.0**exponent
    alpha = torch.tensor(1e-3 * 2.0**exponent, device=device)
    for rule in RULES:
        check(x, alpha, rule)


def test_rows_of_any_stride(device, hard_rows):
    wide = hard_rows(12, 512, torch.bfloat16, device)
    alpha = torch.tensor(0.01, device=device)
    for x in (wide[::3], wide[:, 16:208], wide[1::2, 5:389], wide[3:4, 32:48]):
        check(x, alpha, "absmax")
    with pytest.raises(ValueError, match="elements of a row must be contiguous"):
        run(kernel, (hard_rows(16, 512, torch.bfloat16, device).t(), alpha), 512, 16, "absmax", "linear")


def test_no_rows(device):
    run(kernel, (torch.empty(0, 64, device=device), torch.ones((), device=device)), 0, 64, "absmax", "blocked_128x4")


def test_cases_of_the_tuner(device):
    for rule in RULES:
        c = testing.case(QuantizeProblem(m=3, k=448, rule=rule), device)
        c.run(kernel, kernel.Config())
        c.check()


@pytest.mark.parametrize("m", [0, 1, 37])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_global_scale(m, dtype, device, hard_rows):
    x = hard_rows(m, 1104, dtype, device) if m else torch.empty(0, 1104, dtype=dtype, device=device)
    for value in (None, -5000.0, float("inf"), float("nan")):
        if value is not None and m:
            x[m // 2, 1103] = value
        alpha = torch.full((), 123.0, device=device)
        kernel.global_scale(x, alpha, kernel.Config())
        want = reference.quantize_nvfp4(x.cpu()).alpha
        torch.testing.assert_close(alpha.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_global_scale_of_more_tiles_than_one_step(device):
    x = torch.zeros(5000, 16, device=device)
    x[4321, 7] = -26.88
    alpha = torch.zeros((), device=device)
    config = kernel.Config(block_m=16, block_k=256) if device.type == "cpu" else kernel.Config(block_m=1, block_k=1024)
    kernel.global_scale(x, alpha, config)
    assert alpha.item() == torch.tensor(26.88).div(torch.tensor(2688.0)).item()


def test_refusals():
    assert kernel.supports(problem(), kernel.Config()) is None
    assert "less than 16" in (kernel.supports(problem(), kernel.Config(block_m=1, block_k=256)) or "")
    big = kernel.Config(block_m=16, block_k=1024, num_warps=8)
    assert kernel.supports(problem(), big) is None
    assert "spill" in (kernel.supports(problem("mse"), big) or "")


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    """Offsets of x, of codes and of scales beyond int32."""
    m, k = (1 << 22) + 5, 1024
    x = torch.zeros(m, k, dtype=torch.bfloat16, device=device)
    x[-5:] = torch.randn(5, k, device=device).bfloat16()
    alpha = torch.tensor(0.001, device=device)
    for sf_layout in ("linear", "blocked_128x4"):
        got = run(kernel, (x, alpha), m, k, "absmax", sf_layout)
        first = m // 128 * 128 if sf_layout == "blocked_128x4" else m - 5
        want = reference.quantize_nvfp4(x[first:], alpha=alpha, sf_layout=sf_layout)
        tail = NVFP4Tensor(got.data[first:], got.sf[-want.sf.shape[0] :], alpha, sf_layout)
        assert_same(tail, want)
        assert not got.data[:first].any()
        assert not got.sf[: -want.sf.shape[0]].view(torch.uint8).any()


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on new inputs: the global scale too."""
    x = torch.randn(64, 7168, device=device).bfloat16()
    alpha = torch.zeros((), device=device)
    out = NVFP4Tensor.empty((64, 7168), alpha, "linear")
    kernel.warm(QuantizeProblem(m=64, k=7168), kernel.Config())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.global_scale(x, alpha, kernel.Config())
        kernel.launch(x, alpha, out, "absmax", kernel.Config())
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(64, 7168, device=device) * 10.0**seed)
        graph.replay()
        assert_same(out, reference.quantize_nvfp4(x))
        assert torch.equal(alpha, reference.quantize_nvfp4(x).alpha)
