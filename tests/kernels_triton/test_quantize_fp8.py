"""quantize_fp8 gives the reference's bytes: every config, type, hard inputs, odd strides."""

import pytest
import torch

from fp4suite import layouts, testing
from fp4suite.formats import FP8RowTensor
from fp4suite.problem import QuantizeFp8Problem
from fp4suite.reference import fp8
from kernels_triton import quantize_fp8 as kernel

from .checks import configs, every_bf16

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PROBLEM = QuantizeFp8Problem(m=5, k=1088)


def check(x: torch.Tensor, config: kernel.Config | None = None) -> FP8RowTensor:
    """launch into poisoned room; the same bytes as the reference here and on the CPU. NaN scales count as equal."""
    m, k = x.shape
    data = torch.full((m, k), 0xFF, dtype=torch.uint8, device=x.device).view(torch.float8_e4m3fn)
    out = FP8RowTensor(data, torch.full((m,), -1.0, device=x.device))
    kernel.launch(x, out, config or kernel.Config())
    for want in (fp8.quantize_fp8(x), fp8.quantize_fp8(x.cpu())):
        torch.testing.assert_close(out.scale.cpu(), want.scale.cpu(), rtol=0, atol=0, equal_nan=True)
        testing.assert_same_bytes(out.data.cpu(), want.data.cpu(), "data")
    return out


@pytest.mark.parametrize("config", configs(kernel, PROBLEM), ids=str)
def test_every_config(config, device, hard_rows):
    """Ragged in m and k."""
    check(hard_rows(5, 1088, torch.bfloat16, device), config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_type(dtype, device, hard_rows):
    check(hard_rows(19, 192, dtype, device))


def test_every_bf16(device):
    """Infinities and NaN among the elements, and amplitudes from subnormal to the largest."""
    x = every_bf16(device)
    order = torch.randperm(65536, generator=torch.Generator().manual_seed(0)).to(device)
    for rows in (x, x.view(-1)[order].view(16, 4096)):
        check(rows)
    magnitude = x.view(torch.int16).to(torch.int32) & 0x7FFF
    finite = x.view(-1)[(magnitude < 0x7F80).view(-1)]
    finite = finite[torch.argsort(finite.abs().float(), stable=True)]  # rows of like amplitudes
    check(finite[: len(finite) // 1024 * 1024].view(-1, 1024))


def test_what_a_row_becomes(device):
    """448 for its largest element, zeros for zeros, NaN for what is not finite; other rows are not touched by it."""
    x = torch.zeros(4, 64, dtype=torch.bfloat16, device=device)
    x[0, :3] = torch.tensor([-7.0, 3.5, 0.0])
    x[2, 5], x[3, 6] = torch.inf, torch.nan
    out = check(x)
    decoded = fp8.dequant_fp8(out)
    assert out.data.float().abs().amax(1)[0] == 448
    torch.testing.assert_close(decoded[0], x[0].float(), rtol=1e-6, atol=0)
    assert not decoded[1].any()
    assert decoded[2].isnan().any()
    assert decoded[3].isnan().all()


def test_columns_lie_in_the_order_of_the_mma(device):
    """Numbers that count columns: byte p of every 64 is that of column fp8_columns[p]."""
    x = torch.zeros(2, 192, device=device)
    x[0, :64], x[1, 64:128] = torch.arange(64) + 1, torch.arange(64) + 1
    order = layouts.fp8_columns(torch.arange(192))
    assert order.tolist() != sorted(order.tolist())
    decoded = check(x).data.float().cpu()
    for row in range(2):
        want = (x[row].cpu() * 7)[order].to(torch.float8_e4m3fn).float()  # 64 becomes 448
        assert torch.equal(decoded[row], want)


@pytest.mark.parametrize("k", [64, 128, 1024, 3072])
def test_sizes(k, device, hard_rows):
    check(hard_rows(3, k, torch.bfloat16, device), kernel.default(QuantizeFp8Problem(m=3, k=k)))


def test_rows_of_any_stride(device, hard_rows):
    wide = hard_rows(12, 512, torch.bfloat16, device)
    for x in (wide[::3], wide[:, 16:208], wide[1::2, 5:389], wide[3:4, 32:96]):
        check(x)
    with pytest.raises(ValueError, match="elements of a row must be contiguous"):
        check(hard_rows(64, 512, torch.bfloat16, device).t())


def test_no_rows(device):
    check(torch.empty(0, 64, device=device))


def test_cases_of_the_tuner(device):
    c = testing.case(QuantizeFp8Problem(m=3, k=448), device)
    c.run(kernel, kernel.Config())
    c.check()


def test_refusals():
    assert kernel.supports(PROBLEM, kernel.Config()) is None
    assert "k=1104: FP8 rows are permuted by 64 columns" in (
        kernel.supports(QuantizeFp8Problem(m=5, k=1104), kernel.Config()) or ""
    )
    wide = QuantizeFp8Problem(m=5, k=65536)
    assert "spill" in (kernel.supports(wide, kernel.Config()) or "")
    for k in (128, 1536, 7168, 16384):
        assert kernel.supports(QuantizeFp8Problem(m=5, k=k), kernel.default(QuantizeFp8Problem(m=5, k=k))) is None


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on new inputs."""
    x = torch.randn(64, 7168, device=device).bfloat16()
    out = FP8RowTensor(torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.empty(64, device=device))
    kernel.warm(QuantizeFp8Problem(m=64, k=7168), kernel.Config())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(x, out, kernel.Config())
    for seed in range(3):
        torch.manual_seed(seed)
        x.copy_(torch.randn(64, 7168, device=device) * 10.0**seed)
        graph.replay()
        want = fp8.quantize_fp8(x)
        testing.assert_same_bytes(out.data, want.data, "data")
        testing.assert_same_bytes(out.scale, want.scale, "scale")
