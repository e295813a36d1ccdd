"""Rows in registers become the bytes of the reference: every format, page, ragged heads, numbers of every kind."""

import pytest
import torch
import triton
import triton.language as tl

from fp4suite import reference
from fp4suite.formats import IndexCache, PagedCache, index_layout, kv_layout
from fp4suite.testing import assert_same_bytes
from kernels_triton import cache_rows, host, rounding

from .checks import every_bf16

KV = ["fp32", "bf16", "fp8_ds_mla", "nvfp4"]
INDEX = ["fp32", "bf16", "fp8", "mxfp4"]
ROWS = 4


@triton.jit
def _store(
    x_ptr, slots_ptr, cache_ptr, missing, M, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    E2M1_CVT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, PADDED)
    # what lies behind a row's end must not matter
    inside = (rows < M)[:, None] & (cols < HEAD_DIM)[None, :]
    y = tl.load(x_ptr + rows[:, None] * HEAD_DIM + cols[None, :], mask=inside, other=1e30)
    slots = tl.load(slots_ptr + rows, mask=rows < M, other=-1)
    cache_rows.store(
        y, slots, cache_ptr - missing, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES,
        E2M1_CVT, ROWS, PADDED,
    )  # fmt: skip


def kv_cache(format: str, page: int, head_dim: int, rope_dim: int, pages: int, device: torch.device) -> PagedCache:
    size = kv_layout(format, page, head_dim, rope_dim).page_bytes  # type: ignore[arg-type]
    data = torch.full((pages, size), 0xEE, dtype=torch.uint8, device=device)
    return PagedCache(data, format, page, head_dim, rope_dim)  # type: ignore[arg-type]


def index_cache(format: str, page: int, head_dim: int, pages: int, device: torch.device) -> IndexCache:
    size = index_layout(format, page, head_dim).page_bytes  # type: ignore[arg-type]
    data = torch.full((pages, size), 0xEE, dtype=torch.uint8, device=device)
    return IndexCache(data, format, page, head_dim)  # type: ignore[arg-type]


def store(cache: PagedCache | IndexCache, x: torch.Tensor, slots: torch.Tensor, missing_pages: int = 0) -> None:
    """By a kernel; `missing_pages` of the cache are not there, before the first."""
    made = cache_rows.constants(cache) | {"E2M1_CVT": host.has_e2m1_cvt(x.device), "ROWS": ROWS}
    missing, padded = missing_pages * cache.layout.page_bytes, triton.next_power_of_2(cache.head_dim)
    _store[(triton.cdiv(len(x), ROWS),)](x, slots, cache.data, missing, len(x), **made, PADDED=padded)


def check(cache: PagedCache | IndexCache, x: torch.Tensor, slots: torch.Tensor) -> None:
    """Store x at slots by a kernel, and by the reference into a copy: all bytes of the cache are the same."""
    want = cache.data.cpu().clone()
    like = PagedCache if isinstance(cache, PagedCache) else IndexCache
    shape = (cache.format, cache.page_size, cache.head_dim)
    geometry = (*shape, cache.rope_dim) if isinstance(cache, PagedCache) else shape
    reference.write_rows(like(want, *geometry), slots.cpu(), x.cpu())  # type: ignore[arg-type]
    store(cache, x, slots)
    assert_same_bytes(cache.data.cpu(), want, f"{cache.format} cache")


def rows(n: int, d: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    """Blocks of very different size, zeros, exact powers, ties and rounding edges among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) * 2.0 ** torch.randint(-30, 9, (n, d // 16), generator=g).repeat_interleave(
        16, 1
    )
    x[0] = 0.0
    x[1, :64], x[1, 3] = 0.0, 448.0
    x[2, :64], x[2, 5] = -0.0, -450.0  # the next BF16 number: the exponent has to rise
    x[3, :64] = 1e-6  # below the floor of 1e-4
    x[4] = torch.arange(d) * 0.25  # ties
    x[5] = -torch.exp2(torch.arange(d) % 48 - 60.0)
    x[6] = 1e-38 * torch.randn(d, generator=g)
    x[7, -16:] = x[7, -16:] + 2.0**-8
    return x.to(device)


def slots_for(n: int, total: int, device: torch.device) -> torch.Tensor:
    """A slot of its own for each of n rows, some of them nowhere."""
    slots = torch.randperm(total, generator=torch.Generator().manual_seed(n))[:n].int()
    slots[n // 2] = -1
    slots[-1] = -1
    return slots.to(device)


@pytest.mark.parametrize("page", [1, 2, 64, 256])
@pytest.mark.parametrize("format", KV)
def test_kv_rows(format, page, device):
    pages = -(-40 // page)
    check(kv_cache(format, page, 512, 64, pages, device), rows(19, 512, device), slots_for(19, pages * page, device))


@pytest.mark.parametrize("page", [2, 64])
@pytest.mark.parametrize("format", INDEX)
def test_index_rows(format, page, device):
    pages = -(-40 // page)
    check(index_cache(format, page, 128, pages, device), rows(19, 128, device), slots_for(19, pages * page, device))


@pytest.mark.parametrize(("head_dim", "rope_dim"), [(80, 16), (96, 32), (576, 64)])  # 576: no scale byte is left over
@pytest.mark.parametrize("format", KV)
def test_heads_of_other_sizes(format, head_dim, rope_dim, device):
    check(kv_cache(format, 4, head_dim, rope_dim, 6, device), rows(10, head_dim, device), slots_for(10, 24, device))


@pytest.mark.parametrize("format", INDEX)
def test_index_keys_of_other_sizes(format, device):
    check(index_cache(format, 4, 96, 6, device), rows(10, 96, device), slots_for(10, 24, device))


@pytest.mark.parametrize("format", ["fp8_ds_mla", "nvfp4", "index_fp8", "index_mxfp4"])
def test_what_is_not_finite(format, device):
    """One infinity or NaN a row, in the last block too: the reference's bytes, and nothing hidden."""
    index = format.startswith("index_")
    d, kept = (128, 128) if index else (512, 448)
    x = rows(10, d, device)
    for i, value in enumerate((torch.inf, -torch.inf, torch.nan)):
        x[i, 5] = value
        x[i + 3, kept - 1] = value
    slots = torch.arange(10, dtype=torch.int32, device=device)
    cache = (
        index_cache(format.removeprefix("index_"), 64, d, 1, device)
        if index
        else kv_cache(format, 64, d, 64, 1, device)
    )
    check(cache, x, slots)
    back = reference.read_rows(cache, slots)
    assert not back[torch.arange(3), 5].isfinite().any()
    assert not back[torch.arange(3, 6), kept - 1].isfinite().any()
    assert back[6:].isfinite().all()


@pytest.mark.parametrize("format", ["bf16", "fp8_ds_mla", "nvfp4", "index_fp8", "index_mxfp4"])
def test_every_bf16(format, device):
    """Each number in a block of its own scale, among neighbours."""
    index = format.startswith("index_")
    d = 128 if index else 512
    finite = every_bf16(device).float().view(-1)
    finite = finite[finite.isfinite()]
    x = finite[: len(finite) // d * d].view(-1, d)[::8]
    pages = -(-len(x) // 64)
    cache = (
        index_cache(format.removeprefix("index_"), 64, d, pages, device)
        if index
        else kv_cache(format, 64, d, 64, pages, device)
    )
    check(cache, x.contiguous(), torch.arange(len(x), dtype=torch.int32, device=device))


@pytest.mark.parametrize("format", KV)
def test_large_slots(format, device):
    """Slots whose bytes lie beyond 2^31."""
    cache = kv_cache(format, 64, 512, 64, 1, device)
    page = 2**31 // cache.layout.page_bytes + 5
    x, slots = rows(8, 512, device), torch.arange(8, dtype=torch.int32, device=device)
    want = kv_cache(format, 64, 512, 64, 1, torch.device("cpu"))
    reference.write_rows(want, slots.cpu(), x.cpu())
    store(cache, x, page * 64 + slots, page)
    assert_same_bytes(cache.data.cpu(), want.data, "the page")


def test_refusals():
    assert cache_rows.refuse("nvfp4", 512, 64) is None
    assert cache_rows.refuse("nvfp4", 64, 16) == "nvfp4 rows are stored with a multiple of 32 dims beside RoPE, got 48"


@triton.jit
def _round(x_ptr, bf16_ptr, e4m3_ptr, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(bf16_ptr + at, rounding.bf16_bits(x))
    tl.store(e4m3_ptr + at, rounding.e4m3_bits(x))


def test_roundings(device):
    """BF16 and E4M3 numbers, those halfway between them, and their neighbours in FP32; of both signs."""
    halves = torch.arange(0x7F80, dtype=torch.int32) << 16
    near = (halves[:, None] + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32)).view(-1)
    x = torch.cat((near, near | -(2**31))).view(torch.float32)
    x = x[: len(x) // 1024 * 1024].to(device)
    bf16 = torch.empty(x.shape, dtype=torch.int16, device=device)
    e4m3 = torch.empty(x.shape, dtype=torch.uint8, device=device)
    _round[(len(x) // 1024,)](x, bf16, e4m3, N=1024)
    assert torch.equal(bf16.cpu(), x.cpu().bfloat16().view(torch.int16))
    assert torch.equal(e4m3.cpu(), x.cpu().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
