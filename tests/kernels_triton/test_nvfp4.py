"""The device functions one by one: every code, every 16-bit number, every scale, exp and sums, to the bit."""

import pytest
import torch
import triton
import triton.language as tl

from fp4suite import arch
from fp4suite.reference import e2m1, quant
from kernels_triton import host, nvfp4


@triton.jit
def _encode(x_ptr, one, data_ptr, E2M1_CVT: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    y = tl.load(x_ptr + at) * one  # what is packed is a product
    words = nvfp4.pack_e2m1(y.reshape(1, 128, 8), 1, 128, E2M1_CVT)
    tl.store(data_ptr + tl.program_id(0) * 128 + tl.arange(0, 128), words.reshape(128))


@triton.jit
def _round(x_ptr, out_ptr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out_ptr + at, nvfp4.e2m1_round(nvfp4._below_6(tl.load(x_ptr + at))))


@triton.jit
def _narrow(x_ptr, out_ptr, CVT: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out_ptr + at, nvfp4.narrow(tl.load(x_ptr + at), out_ptr.dtype.element_ty, CVT))


@triton.jit
def _e4m3(t_ptr, byte_ptr, back_ptr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    byte = nvfp4.e4m3_encode(tl.load(t_ptr + at))
    tl.store(byte_ptr + at, byte.to(tl.uint8))
    tl.store(back_ptr + at, nvfp4.e4m3_decode(byte))


@triton.jit
def _any_e4m3(byte_ptr, out_ptr):
    at = tl.arange(0, 256)
    tl.store(out_ptr + at, nvfp4.e4m3_to_f32(tl.load(byte_ptr + at)))


@triton.jit
def _exp_neg(g_ptr, out_ptr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out_ptr + at, nvfp4.exp_neg(tl.load(g_ptr + at)))


@triton.jit
def _row_sum(x_ptr, out_ptr, ROWS: tl.constexpr, N: tl.constexpr):
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(out_ptr + rows, nvfp4.row_sum(x, ROWS, N))


@triton.jit
def _block_errors(x_ptr, sf_ptr, out_ptr, alpha, inv):
    blocks = tl.arange(0, 64)
    at = (x_ptr + blocks[:, None] * 16 + tl.arange(0, 8)[None, :]).reshape(1, 64, 8)
    lo, hi = tl.load(at), tl.load(at + 8)
    sf = tl.load(sf_ptr + blocks).reshape(1, 64)
    tl.store(out_ptr + blocks, nvfp4._squared_error(lo, hi, lo * inv, hi * inv, sf, alpha, 1, 64).reshape(64))


def numbers(device: torch.device) -> torch.Tensor:
    """FP32 [n, 1024]: every BF16 and FP16, and the neighbours of every boundary between E2M1 and E4M3 numbers."""
    halves = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = torch.cat(((values[1:] + values[:-1]) / 2, e2m1.decode(torch.arange(8, dtype=torch.uint8)) + 0.25))
    middles = torch.cat((middles, torch.tensor([1.25, 1.75, 2.5, 3.5, 5.0])))
    down, up = torch.nextafter(middles, torch.zeros(())), torch.nextafter(middles, torch.full((), 1e9))
    x = torch.cat((halves.view(torch.bfloat16).float(), halves.view(torch.float16).float(), middles, down, up))
    x = torch.cat((x, -x))
    return torch.nn.functional.pad(x, (0, -len(x) % 1024)).view(-1, 1024).to(device)


def cvt_choices() -> list[bool]:
    """The bit arithmetic everywhere; the hardware's instruction too where it is."""
    return [False, True] if arch.current() == "sm_100a" else [False]


@pytest.mark.parametrize("e2m1_cvt", cvt_choices())
def test_e2m1_encode(device, e2m1_cvt):
    x = numbers(device)
    data = torch.full((x.numel() // 2,), 0xAA, dtype=torch.uint8, device=device)
    _encode[(len(x),)](x, 1.0, data.view(torch.int32), E2M1_CVT=e2m1_cvt, **host.OPTIONS)
    assert torch.equal(e2m1.unpack(data), e2m1.encode(x.view(-1)))


def test_e2m1_round(device):
    x = numbers(device)
    out = torch.full_like(x, torch.nan)
    _round[(len(x),)](x, out, **host.OPTIONS)
    assert torch.equal(out, e2m1.decode(e2m1.encode(x)))


def test_e4m3_both_ways(device):
    x = numbers(device)
    t = torch.where((x > 0) & (x <= 448), x, 0.0)
    byte = torch.full(t.shape, 0xAA, dtype=torch.uint8, device=device)
    back = torch.full_like(t, torch.nan)
    _e4m3[(len(t),)](t, byte, back, **host.OPTIONS)
    want = t.to(torch.float8_e4m3fn)
    assert torch.equal(byte, want.view(torch.uint8))
    assert torch.equal(back, want.float())


def test_every_e4m3_byte(device):
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    out = torch.zeros(256, device=device)
    _any_e4m3[(1,)](byte, out, **host.OPTIONS)
    torch.testing.assert_close(out, byte.view(torch.float8_e4m3fn).float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out.signbit()[:255], (byte >= 0x80)[:255])


def test_exp_neg(device):
    g = torch.cat((numbers(torch.device("cpu")).view(-1), torch.linspace(-90, 90, 40_000)))
    g = g[~g.isnan()]
    g = torch.nn.functional.pad(g, (0, -len(g) % 1024)).to(device)
    out = torch.full_like(g, torch.nan)
    _exp_neg[(len(g) // 1024,)](g, out, **host.OPTIONS)
    want = quant.exp_neg(g)
    assert torch.equal(out.view(torch.int32), want.view(torch.int32))
    assert torch.equal(want.cpu().view(torch.int32), quant.exp_neg(g.cpu()).view(torch.int32))


@pytest.mark.parametrize("n", [16, 64, 512, 1024, 2048, 8192])
@pytest.mark.parametrize(("rows", "num_warps"), [(1, 4), (2, 8), (4, 2)])
def test_row_sum(device, n, rows, num_warps):
    """Any layout of threads adds in the same order."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(n)).to(device)
    out = torch.full((rows,), torch.nan, device=device)
    _row_sum[(1,)](x, out, ROWS=rows, N=n, num_warps=num_warps, **host.OPTIONS)
    want = x
    while want.shape[-1] > quant.SUM_CHUNK:
        half = want.shape[-1] // 2
        want = want[:, :half] + want[:, half:]
    assert torch.equal(out, e2m1.pair_sum(want))


@pytest.mark.parametrize("num_warps", [1, 4])
def test_squared_errors_of_rule_mse(device, num_warps):
    """To the last bit, which the order of the sum decides."""
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(64, 16, generator=gen).to(device)
    sf = torch.rand(64, generator=gen).to(device).to(torch.float8_e4m3fn).float()
    alpha = torch.tensor(0.73, device=device)
    inv = 1 / alpha
    out = torch.full((64,), torch.nan, device=device)
    _block_errors[(1,)](x, sf, out, alpha.item(), inv.item(), num_warps=num_warps, **host.OPTIONS)
    scale = (sf * alpha)[:, None]
    q = e2m1.decode(e2m1.encode(x * (torch.ones_like(scale) / scale)))
    d = x * inv - q * sf[:, None]
    assert torch.equal(out, e2m1.pair_sum(d * d))
    assert not torch.equal(out.cpu(), (d * d).cpu().cumsum(-1)[:, -1])  # another order gives other bits


def test_narrow_rounds_to_nearest_even(device):
    """Each BF16 number, the tie above it and both neighbours of the tie; infinities, NaN, numbers that overflow."""
    low = torch.arange(65536, dtype=torch.int64)[:, None] << 16
    bits = low + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = torch.where(bits >= 2**31, bits - 2**32, bits).int().flatten().view(torch.float32).to(device)
    for dtype in (torch.bfloat16, torch.float32):
        for cvt in {False, device.type == "cuda"}:
            out = torch.zeros(len(x), dtype=dtype, device=device)
            _narrow[(len(x) // 1024,)](x, out, cvt)
            torch.testing.assert_close(out, x.to(dtype), rtol=0, atol=0, equal_nan=True)
