"""Cache rows byte by byte: every format against a write-up in plain Python and ml_dtypes, in pages as laid out."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from fp4suite.formats import IndexCache, PagedCache, index_layout, kv_layout
from fp4suite.reference import (
    kv_norm_rope_insert,
    qkv_norm_rope_insert,
    read_rows,
    rope_frequencies,
    rope_table,
    write_rows,
)

KV = ["fp32", "bf16", "fp8_ds_mla", "nvfp4"]
INDEX = ["fp32", "bf16", "fp8", "mxfp4"]


def kv_cache(format: Any, pages: int = 3, page: int = 4, d: int = 512, rope: int = 64) -> PagedCache:
    data = torch.full((pages, kv_layout(format, page, d, rope).page_bytes), 0xEE, dtype=torch.uint8)
    return PagedCache(data, format, page, d, rope)


def index_cache(format: Any, pages: int = 3, page: int = 4, d: int = 128) -> IndexCache:
    return IndexCache(
        torch.full((pages, index_layout(format, page, d).page_bytes), 0xEE, dtype=torch.uint8), format, page, d
    )


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    """Blocks of very different size, zeros, exact powers and rounding edges among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) * 2.0 ** torch.randint(-6, 7, (n, d // 16), generator=g).repeat_interleave(16, 1)
    x[0, :64] = 0.0
    x[1, :64] = 0.0
    x[1, 3] = 448.0
    x[2, :64] = 0.0
    x[2, 5] = -450.0  # the next BF16 number: the exponent has to rise
    x[3, :64] = 1e-6  # below the floor of 1e-4
    return x


def bf16(x: torch.Tensor) -> np.ndarray:
    return x.numpy().astype(ml_dtypes.bfloat16)


def least_exponent(amax: float, top: float) -> int:
    """Smallest e with top * 2^e >= amax, by trying."""
    e = -140
    while top * 2.0**e < amax:
        e += 1
    return e


def fp8_ds_mla_row(x: np.ndarray) -> tuple[bytes, bytes]:
    nope, rope = x[:448].astype(np.float64), x[448:]
    data, scales = b"", b""
    for block in nope.reshape(7, 64):
        e = least_exponent(max(np.abs(block).max(), np.float32(1e-4)), 448.0)
        data += (block / 2.0**e).astype(ml_dtypes.float8_e4m3fn).tobytes()
        scales += bytes([e + 127])
    return data + rope.tobytes(), scales + b"\0"


def nvfp4_row(x: np.ndarray) -> tuple[bytes, bytes]:
    nope, rope = x[:448].astype(np.float32), x[448:]
    f = np.float32
    alpha = f(np.abs(nope).max() / f(2688))
    codes, scales = [], b""
    for block in nope.reshape(28, 16):
        inv = f(1) / alpha
        s = np.minimum(f(448), np.abs(block).max() * f(1 / 6) * inv).astype(ml_dtypes.float8_e4m3fn)
        scales += s.tobytes()
        r = f(0) if f(s) * alpha == 0 else f(1) / (f(s) * alpha)
        q = np.clip(block * r, f(-6), f(6)).astype(ml_dtypes.float4_e2m1fn)
        codes += q.view(np.uint8).tolist()
    packed = bytes(lo | hi << 4 for lo, hi in zip(codes[::2], codes[1::2], strict=True))
    return packed + scales + alpha.tobytes() + rope.tobytes(), b""


def fp8_index_row(x: np.ndarray) -> tuple[bytes, bytes]:
    e = least_exponent(max(np.abs(x.astype(np.float64)).max(), np.float32(1e-4)), 448.0)
    return (x.astype(np.float64) / 2.0**e).astype(ml_dtypes.float8_e4m3fn).tobytes(), np.float32(2.0**e).tobytes()


def mxfp4_index_row(x: np.ndarray) -> tuple[bytes, bytes]:
    codes, scales = [], b""
    for block in x.astype(np.float64).reshape(-1, 32):
        e = least_exponent(max(np.abs(block).max(), 6 * 2.0**-126), 6.0)
        scales += bytes([e + 127])
        codes += (block / 2.0**e).astype(ml_dtypes.float4_e2m1fn).view(np.uint8).tolist()
    return bytes(lo | hi << 4 for lo, hi in zip(codes[::2], codes[1::2], strict=True)), scales


@pytest.mark.parametrize(("format", "make"), [("fp8_ds_mla", fp8_ds_mla_row), ("nvfp4", nvfp4_row)])
def test_kv_pages_byte_by_byte(format: str, make: Any) -> None:
    """Six rows over three pages of four; all other bytes keep what they had."""
    cache, x = kv_cache(format), rows(6, 512)
    slots = torch.tensor([9, 0, 5, 3, 11, 6], dtype=torch.int32)
    write_rows(cache, slots, x)
    want = np.full(cache.data.shape, 0xEE, dtype=np.uint8)
    row = {"fp8_ds_mla": 576, "nvfp4": 384}[format]
    for slot, value in zip(slots.tolist(), bf16(x), strict=True):
        page, at = divmod(slot, 4)
        data, scales = make(value)
        want[page, at * row : (at + 1) * row] = np.frombuffer(data, np.uint8)
        want[page, 4 * row + at * 8 : 4 * row + at * 8 + len(scales)] = np.frombuffer(scales, np.uint8)
    np.testing.assert_array_equal(cache.data.numpy(), want)


@pytest.mark.parametrize(
    ("format", "make", "row", "scale"), [("fp8", fp8_index_row, 128, 4), ("mxfp4", mxfp4_index_row, 64, 4)]
)
def test_index_pages_byte_by_byte(format: str, make: Any, row: int, scale: int) -> None:
    cache, x = index_cache(format), rows(6, 128)
    slots = torch.tensor([9, 0, 5, 3, 11, 6], dtype=torch.int32)
    write_rows(cache, slots, x)
    want = np.full(cache.data.shape, 0xEE, dtype=np.uint8)
    for slot, value in zip(slots.tolist(), bf16(x), strict=True):
        page, at = divmod(slot, 4)
        data, scales = make(value)
        want[page, at * row : (at + 1) * row] = np.frombuffer(data, np.uint8)
        want[page, 4 * row + at * scale : 4 * row + (at + 1) * scale] = np.frombuffer(scales, np.uint8)
    np.testing.assert_array_equal(cache.data.numpy(), want)


def test_page_of_64_is_37440_bytes() -> None:
    assert kv_cache("fp8_ds_mla", page=64).data.shape[1] == 37440
    assert kv_cache("nvfp4", page=64).data.shape[1] == 64 * 384


@pytest.mark.parametrize(
    ("format", "error"), [("fp32", 0.0), ("bf16", 0.0017), ("fp8_ds_mla", 0.027), ("nvfp4", 0.095)]
)
def test_read_back(format: str, error: float) -> None:
    """Relative RMS error of Gaussian rows: about 2^-9 / sqrt(3) in BF16; the others as measured; 5 % of room."""
    cache = kv_cache(format, pages=16)
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(2)).int()
    write_rows(cache, slots, x)
    got = read_rows(cache, slots)
    assert got.dtype == torch.float32
    off = float((got - x).norm() / x.norm())
    assert 0.9 * error <= off <= 1.05 * error
    assert torch.equal(got[:, 448:], x[:, 448:].bfloat16().float() if format != "fp32" else x[:, 448:])


@pytest.mark.parametrize(("format", "error"), [("fp32", 0.0), ("bf16", 0.0017), ("fp8", 0.0265), ("mxfp4", 0.115)])
def test_read_back_index_keys(format: str, error: float) -> None:
    cache = index_cache(format, pages=16)
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(63, -1, -1).int()
    write_rows(cache, slots, x)
    off = float((read_rows(cache, slots) - x).norm() / x.norm())
    assert 0.9 * error <= off <= 1.05 * error


@pytest.mark.parametrize("format", KV)
def test_slot_minus_one(format: str) -> None:
    """Nothing is written, zeros are read, even where the cache holds NaN."""
    cache = kv_cache(format)
    cache.data.fill_(0xFF)
    write_rows(cache, torch.tensor([-1, -1]).int(), torch.ones(2, 512))
    assert (cache.data == 0xFF).all()
    assert torch.equal(read_rows(cache, torch.tensor([[-1, -1]]).int()), torch.zeros(1, 2, 512))
    write_rows(cache, torch.zeros(0).int(), torch.ones(0, 512))
    assert read_rows(cache, torch.zeros(0, 3).int()).shape == (0, 3, 512)


@pytest.mark.parametrize("format", KV)
def test_values_at_the_ends_of_the_range(format: str) -> None:
    """Zero rows, the smallest number, and one as large as E4M3 cannot round up to infinity: all stay finite."""
    cache = kv_cache(format)
    big = 3.0e38
    x = torch.stack([torch.zeros(512), torch.full((512,), big), torch.full((512,), -(2.0**-133)), torch.zeros(512)])
    x[3, 7] = -big
    write_rows(cache, torch.arange(4).int(), x)
    got = read_rows(cache, torch.arange(4).int())
    assert got.isfinite().all()
    assert (got[0] == 0).all()
    torch.testing.assert_close(got[1], x[1].bfloat16().float(), rtol=2**-4, atol=0)
    assert got[3, 7] < -0.9 * big


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("format", ["bf16", "fp8_ds_mla", "nvfp4", "fp8", "mxfp4"])
def test_nothing_that_is_not_finite_is_hidden(format: str, value: float) -> None:
    """It comes back as what it is, but for a NaN in mxfp4 and all of an nvfp4 row; the other rows are as without it."""
    cache = index_cache(format) if format in INDEX and format != "bf16" else kv_cache(format)
    x = rows(6, cache.head_dim)
    write_rows(cache, torch.arange(6).int(), x)
    plain = read_rows(cache, torch.arange(6).int())
    x[4, 9] = value
    write_rows(cache, torch.arange(6).int(), x)
    got = read_rows(cache, torch.arange(6).int())
    if format == "nvfp4":
        assert not got[4, : cache.head_dim - 64].isfinite().any()
    else:
        want = math.inf if format == "mxfp4" and math.isnan(value) else value
        torch.testing.assert_close(got[4, 9], torch.tensor(want), equal_nan=True)
        assert got[4].isfinite().sum() == cache.head_dim - 1
    others = [0, 1, 2, 3, 5]
    assert torch.equal(got[others], plain[others])


def test_qkv_norm_rope_insert() -> None:
    """The norm of q beside all that happens to kv."""
    g = torch.Generator().manual_seed(5)
    q, kv = torch.randn(4, 40 + 96, generator=g).bfloat16().split((40, 96), dim=1)
    q_weight, kv_weight = torch.randn(40, generator=g), torch.randn(96, generator=g)
    at, slots = torch.arange(4).int(), torch.tensor([5, 0, -1, 2]).int()
    table = rope_table(rope_frequencies(32, 10000.0), 4)
    one, two = (kv_cache("bf16", d=96, rope=32) for _ in range(2))
    got = qkv_norm_rope_insert(q, q_weight, kv, kv_weight, at, table, 0.01, one, slots)
    want = q.double() / (q.double().square().mean(-1, keepdim=True) + 0.01).sqrt() * q_weight.double()
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=0)
    kv_norm_rope_insert(kv, kv_weight, at, table, 0.01, two, slots)
    assert torch.equal(one.data, two.data)
    assert one.data.any()


def test_kv_norm_rope_insert() -> None:
    """FP64: norm with weight, turn the last dims, one rounding; rows of padding go nowhere."""
    cache = kv_cache("bf16", d=96, rope=32)
    g = torch.Generator().manual_seed(3)
    kv, weight = torch.randn(5, 96, generator=g).bfloat16(), (1 + 0.3 * torch.randn(96, generator=g)).bfloat16()
    freq = rope_frequencies(32, 10000.0)
    at = torch.tensor([3, 4, 60, 0, 11]).int()
    slots = torch.tensor([7, 2, -1, 0, 10]).int()
    kv_norm_rope_insert(kv, weight, at, rope_table(freq, 64), 1e-6, cache, slots)
    got = read_rows(cache, slots)
    for t, slot in enumerate(slots.tolist()):
        x = kv[t].double()
        x = x / math.sqrt(float((x * x).mean()) + 1e-6) * weight.double()
        for j in range(16):
            angle = int(at[t]) * float(freq[j])
            a, b = float(x[64 + 2 * j]), float(x[65 + 2 * j])
            x[64 + 2 * j] = a * math.cos(angle) - b * math.sin(angle)
            x[65 + 2 * j] = b * math.cos(angle) + a * math.sin(angle)
        want = x if slot >= 0 else 0 * x
        torch.testing.assert_close(got[t].double(), want, rtol=2**-8, atol=1e-5)
