"""dequant_nvfp4 against the reference: every code, every scale, ragged rows, every config, experts and segments."""

import pytest
import torch

from fp4suite import reference, testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import DequantProblem
from kernels_triton import dequant_nvfp4 as kernel

from .checks import configs

# Triton's interpreter truncates a BF16 store: under it alpha is a power of two there, so that nothing is rounded
ALPHAS = {torch.float32: [1.0, 0.37, 2.0**-40, 3e30], torch.float16: [1.0, 0.37], torch.bfloat16: [1.0, 2.0**-20]}


def check(t: NVFP4Tensor, dtype: torch.dtype, config: object = None, segments: tuple[int, ...] | None = None) -> None:
    out = torch.full(t.shape, torch.nan, dtype=dtype, device=t.device)
    kernel.launch(t, out, config or kernel.Config(), segments)
    for want in (
        reference.dequant_nvfp4(t, dtype, segments=segments),
        reference.dequant_nvfp4(t.to("cpu"), dtype, segments=segments),
    ):
        torch.testing.assert_close(out, want.to(t.device), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out.signbit() & ~out.isnan(), want.to(t.device).signbit() & ~out.isnan())


def random(shape: tuple[int, ...], device: torch.device, alpha: float = 1.0, seed: int = 0) -> NVFP4Tensor:
    """Any code under any finite scale, negative ones too."""
    gen = torch.Generator().manual_seed(seed)
    *lead, k = shape
    data = torch.randint(0, 256, (*lead, k // 2), generator=gen, dtype=torch.uint8)
    sf = torch.randint(0, 127, (*lead, k // 16), generator=gen) + 128 * torch.randint(
        0, 2, (*lead, k // 16), generator=gen
    )
    return NVFP4Tensor(data, sf.to(torch.uint8).view(torch.float8_e4m3fn), torch.tensor(alpha)).to(device)


@pytest.mark.parametrize("dtype", ALPHAS, ids=str)
def test_every_code_under_every_scale(dtype, device):
    """256 pairs of codes under all 256 scale bytes, NaN among them."""
    data = torch.arange(256, dtype=torch.uint8).expand(256, 256).contiguous()
    sf = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 32).contiguous().view(torch.float8_e4m3fn)
    alphas = ALPHAS[dtype] if device.type == "cpu" else [*ALPHAS[dtype], 0.37, 2.0**-140]
    for alpha in alphas:
        t = NVFP4Tensor(data, sf, torch.tensor(alpha)).to(device)
        check(t, dtype, kernel.Config(block_m=16, block_k=256))


@pytest.mark.parametrize("config", configs(kernel, DequantProblem(m=1, k=16)), ids=str)
@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
def test_every_config(config, sf_layout, device):
    check(random((7, 1104), device, 0.37).with_sf_layout(sf_layout), torch.float32, config)


@pytest.mark.parametrize("m", [1, 127, 129])
def test_ragged_rows(m, device):
    for sf_layout in ("linear", "blocked_128x4"):
        check(
            random((m, 80), device, 0.01).with_sf_layout(sf_layout),
            torch.float32,
            kernel.Config(block_m=16, block_k=256),
        )


@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
def test_experts_and_segments(sf_layout, device):
    """One alpha for all, one an expert, one a segment, one a segment of each expert; an empty segment too."""
    t = random((3, 21, 112), device).with_sf_layout(sf_layout)
    one = random((21, 112), device).with_sf_layout(sf_layout)
    alpha = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).to(device) + 0.5
    for tensor, a, segments in (
        (t, alpha[0, 0], None),
        (t, alpha[:, 0].contiguous(), None),
        (t, alpha, (5, 16)),
        (t, alpha[:, :1].contiguous(), (21,)),
        (one, alpha[0], (13, 8)),
        (one, alpha[0, 0], (13, 8)),
    ):
        check(NVFP4Tensor(tensor.data, tensor.sf, a, sf_layout), torch.float32, None, segments)


def test_rows_of_any_stride(device):
    t = random((6, 96), device, 0.37)
    room = torch.full((12, 131), torch.nan, device=device)
    for out in (room[::2, :96], room[:6, 7:103]):
        room.fill_(torch.nan)
        kernel.launch(t, out, kernel.Config())
        assert torch.equal(out, reference.dequant_nvfp4(t, torch.float32))
        assert int(room.isnan().sum()) == room.numel() - out.numel()  # nothing else was written


@pytest.mark.parametrize("shape", [(0, 64), (0, 5, 64), (2, 0, 64)])
def test_nothing_to_do(shape, device):
    t = random(shape, device)
    kernel.launch(t, torch.empty(shape, device=device), kernel.Config())


def test_cases_of_the_tuner(device):
    for out in ("bf16", "fp16", "fp32"):
        c = testing.case(DequantProblem(m=5, k=448, out=out, sf_layout="blocked_128x4"), device)
        c.run(kernel, kernel.Config())
        c.check()


def test_refusals(device):
    t = random((4, 64), device)
    out = torch.empty(4, 64, device=device)
    with pytest.raises(ValueError, match="codes, scales and alpha must be contiguous"):
        kernel.launch(NVFP4Tensor(t.data.t().contiguous().t(), t.sf, t.alpha), out, kernel.Config())
    with pytest.raises(ValueError, match=r"alpha \[2\] does not fit \[4, 64\] with segments None"):
        kernel.launch(NVFP4Tensor(t.data, t.sf, torch.ones(2, device=device)), out, kernel.Config())
    with pytest.raises(ValueError, match=r"segments \[1, 2\] must be runs of rows that sum to m=4"):
        kernel.launch(NVFP4Tensor(t.data, t.sf, torch.ones(2, device=device)), out, kernel.Config(), (1, 2))
    with pytest.raises(ValueError, match="elements of a row must be contiguous"):
        kernel.launch(t, torch.empty(64, 4, device=device).t(), kernel.Config())
    with pytest.raises(ValueError, match=r"t must be \[m, k\] or \[experts, m, k\]"):
        kernel.launch(random((2, 2, 4, 64), device), torch.empty(2, 2, 4, 64, device=device), kernel.Config())


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements(device):
    """Offsets of codes, scales and results beyond int32, by rows and by experts."""
    last = random((3, 4096), device, 0.37)
    for shape in ((1 << 20, 4096), (1 << 15, 32, 4096)):
        data = torch.zeros(*shape[:-1], 2048, dtype=torch.uint8, device=device)
        sf = torch.zeros(*shape[:-1], 256, dtype=torch.uint8, device=device)
        data.view(-1, 2048)[-3:], sf.view(-1, 256)[-3:] = last.data, last.sf.view(torch.uint8)
        out = torch.full(shape, torch.nan, dtype=torch.bfloat16, device=device)
        kernel.launch(NVFP4Tensor(data, sf.view(torch.float8_e4m3fn), last.alpha), out, kernel.Config())
        assert torch.equal(out.view(-1, 4096)[-3:], reference.dequant_nvfp4(last))
        assert not out.view(-1, 4096)[:-3].any()
