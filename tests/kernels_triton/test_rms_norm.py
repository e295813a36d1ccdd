"""rms_norm gives the reference's bits: every config and type, hard rows, odd strides, weights of another type."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target
from fp4suite.problem import RmsNormProblem
from kernels_triton import rms_norm as kernel

from .checks import DTYPES, every_bf16

EPS = 1e-6


def check(x: Tensor, weight: Tensor, config: kernel.Config | None = None, eps: float = EPS) -> None:
    """Bit for bit, NaN aside, against the reference there and on the CPU."""
    out = torch.full(x.shape, torch.nan, dtype=x.dtype, device=x.device)
    kernel.launch(x, weight, eps, out, config or kernel.Config())
    for device in {x.device, torch.device("cpu")}:
        want = reference.rms_norm(x.to(device), weight.to(device), eps)
        torch.testing.assert_close(out.to(device), want, rtol=0, atol=0, equal_nan=True)


def weights(k: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (1 + 0.3 * torch.randn(k, generator=torch.Generator().manual_seed(k))).to(dtype).to(device)


@pytest.mark.parametrize("held", [False, True])
def test_every_config(held, device, hard_rows):
    """Each with a length that it can cut, ragged against tiles or against parts; FP32 shows every bit of the sum."""
    tried = 0
    for config in testing.configs(kernel, most=40):
        lengths = [k for k in (2560, 4112) if kernel.supports(RmsNormProblem(m=1, k=k), config) is None]
        if config.held == held and lengths:
            k = lengths[tried % len(lengths)]
            check(hard_rows(1, k, torch.float32, device), weights(k, device, torch.float32), config)
            tried += 1
    assert tried >= (2 if held else 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(dtype, device, hard_rows):
    """Weights of x's type, and of FP32 beside 16-bit rows."""
    x = hard_rows(7, 208, dtype, device)
    for weight_dtype in {dtype, torch.float32}:
        check(x, weights(208, device, weight_dtype))


@pytest.mark.parametrize("k", [16, 48, 512, 1024, 2064, 4096, 16384])
@pytest.mark.parametrize("m", [3, 4096])
def test_lengths(m, k, device, hard_rows):
    """By the default configs of few and of many rows."""
    config = kernel.default(RmsNormProblem(m=m, k=k))
    assert kernel.supports(RmsNormProblem(m=m, k=k), config) is None
    check(hard_rows(1, k, torch.bfloat16, device), weights(k, device), config)


@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_rows_of_zeros_and_of_anything(eps, device):
    """Without eps a row of zeros is NaN; rows of all BF16 numbers hold infinities and NaN."""
    x = torch.zeros(3, 96, device=device)
    x[1] = torch.linspace(-1, 1, 96)
    check(x, weights(96, device), eps=eps)
    check(every_bf16(device), weights(4096, device), kernel.Config(num_warps=8), eps=eps)


def test_what_is_not_finite_stays_in_its_row(device):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    x[1, 3], x[2, 63] = torch.inf, torch.nan
    out = torch.zeros_like(x)
    kernel.launch(x, weights(64, device), EPS, out, kernel.Config())
    assert out[1, 3].isnan()
    assert (out[1] == 0).sum() == 63
    assert out[2].isnan().all()
    assert out[[0, 3]].isfinite().all()


def test_rows_of_any_stride(device, hard_rows):
    """Columns of a wider tensor, as of a fused GEMM's output; every other row; a start at no multiple of 16 bytes."""
    wide = hard_rows(12, 512, torch.bfloat16, device)
    for x in (wide[::3], wide[:, 16:208], wide[:, 320:], wide[1::2, 5:389]):
        check(x, weights(x.shape[1], device))


def test_operator_takes_any_view(device, hard_rows):
    """Batched, transposed and sliced; what comes is contiguous."""
    x, weight = hard_rows(12, 256, torch.bfloat16, device), weights(256, device)
    apart = torch.stack((weight, weight + 1), dim=1)[:, 0]
    want = reference.rms_norm(x, weight, EPS)
    with on_target("sm_90a"):
        for view in (x, x.T.contiguous().T, torch.cat((x, x), dim=1)[:, 256:], x.view(3, 4, 256)):
            got = ops.rms_norm(view, apart, EPS)
            assert got.is_contiguous()
            assert got.shape == view.shape
            assert torch.equal(got.view(12, 256), want)


def test_no_rows(device):
    check(torch.empty(0, 64, device=device), torch.ones(64, device=device))


def test_inputs_tell_faults_apart(device, hard_rows):
    """What a fault would mix up is different: the weight, eps, and the rows."""
    x, weight = hard_rows(4, 208, torch.float32, device), weights(208, device)

    def normed(x: Tensor, weight: Tensor, eps: float = 1e-3) -> Tensor:
        out = torch.empty_like(x)
        kernel.launch(x, weight, eps, out, kernel.Config())
        return out

    right = normed(x, weight)
    for wrong in (normed(x, weight.flip(0)), normed(x, weight, 1e-2), normed(x.flip(0), weight)):
        assert (wrong != right).float().mean() > 0.2


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_cases_of_the_tuner(dtype, device):
    c = testing.case(RmsNormProblem(m=3, k=448, x=dtype), device)
    c.run(kernel, kernel.Config())
    c.check()
    c.out[2, 447] += 1
    with pytest.raises(AssertionError, match=r"out: .* bytes differ; first at \[2, "):
        c.check()


def test_refusals():
    def why(k: int, x: str = "bf16", **config: int) -> str | None:
        return kernel.supports(RmsNormProblem(m=1, k=k, x=x), kernel.Config(**config))

    assert why(16384) is None
    assert why(24) == "k=24 is not a multiple of 16"
    assert why(64, "fp64") == "kernels read bf16, fp16, fp32, got fp64"
    assert why(1536, parts=4) == "k=1536 has 3 tiles of 512 columns, too few for 4 parts"
    assert why(2048, parts=3) == "k=2048 has 4 tiles of 512 columns, too few for 3 parts"  # two each
    assert why(1536, parts=3, held=True) == "held rows have one part and tiles of up to 1024 columns, got 3 of 512"
    assert why(7168, held=True) == "k=7168 tile_k=512: 224 elements a thread, held up to 128"


@pytest.mark.parametrize(
    ("x", "weight", "error", "message"),
    [
        (torch.zeros(64), torch.ones(64), ValueError, r"x must be \[\.\.\., m, k\], got \[64\]"),
        (torch.zeros(2, 64), torch.ones(63), ValueError, r"weight \[k\], got \[2, 64\] and \[63\]"),
        (torch.zeros(2, 0), torch.ones(0), ValueError, "k positive"),
        (torch.zeros(2, 64).int(), torch.ones(64), TypeError, "x must be one of bfloat16, float16, float32, got torch"),
        (torch.zeros(2, 64), torch.ones(64).double(), TypeError, "weight must be one of bfloat16, .*float64"),
        (torch.zeros(2, 64), torch.ones(64, device="meta"), ValueError, "weight must be on cpu .*, got meta"),
    ],
)
def test_operator_refuses(x, weight, error, message):
    with pytest.raises(error, match=message):
        ops.rms_norm(x, weight, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 4133])
@pytest.mark.parametrize("k", [1536, 4096, 7168])
def test_a_batch_of_real_size(k, m, device):
    problem = RmsNormProblem(m=m, k=k)
    c = testing.case(problem, device)
    for config in {kernel.Config(), kernel.default(problem)}:
        c.run(kernel, config)
        c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on new inputs."""
    x, weight = torch.randn(64, 2048, device=device).bfloat16()[:, :1536], weights(1536, device)
    out = torch.empty(64, 1536, dtype=torch.bfloat16, device=device)
    problem = RmsNormProblem(m=64, k=1536)
    kernel.warm(problem, kernel.default(problem))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(x, weight, EPS, out, kernel.default(problem))
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(64, 1536, device=device) * 10.0**seed)
        graph.replay()
        assert torch.equal(out, reference.rms_norm(x, weight, EPS))
