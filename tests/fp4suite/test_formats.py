"""Formats against ml_dtypes: every pair of codes under every finite scale, every rounding; and what is refused."""

import itertools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from fp4suite import reference
from fp4suite.formats import (
    FP8BlockTensor,
    IndexCache,
    MXFP4Tensor,
    NVFP4Tensor,
    PagedCache,
    WeightLayout,
    index_layout,
    kv_layout,
)
from fp4suite.reference import e2m1

E2M1 = ml_dtypes.float4_e2m1fn
E4M3 = ml_dtypes.float8_e4m3fn
FINITE_SCALES = [b for b in range(256) if b & 0x7F != 0x7F]


def every_half(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 values of a 16-bit type as FP32."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype).float()


def test_every_byte_under_every_scale():
    """256 pairs of codes x 254 finite scales: what a byte means, its order of nibbles, and the product, exactly."""
    scales = torch.tensor(FINITE_SCALES, dtype=torch.uint8)
    data = torch.arange(256, dtype=torch.uint8).expand(254, 256).contiguous()
    sf = scales[:, None].expand(254, 32).contiguous().view(torch.float8_e4m3fn)
    t = NVFP4Tensor(data, sf, torch.tensor(1.0))

    codes = np.arange(256, dtype=np.uint8)
    pairs = np.stack((codes & 0xF, codes >> 4), axis=-1).reshape(-1).view(E2M1).astype(np.float64)  # even k low
    want = pairs[None, :] * np.array(FINITE_SCALES, np.uint8).view(E4M3).astype(np.float64)[:, None]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        got = reference.dequant_nvfp4(t, dtype).double().numpy()
        assert np.array_equal(got, want)
        assert np.array_equal(np.signbit(got), np.signbit(want))


@pytest.mark.parametrize("alpha", [2.0**-40, 2.0**40, 0.3, 1e-30])
def test_alpha_brings_the_only_rounding(alpha):
    scales = torch.arange(127, dtype=torch.uint8)
    data = torch.arange(256, dtype=torch.uint8).expand(127, 256).contiguous()
    sf = scales[:, None].expand(127, 32).contiguous().view(torch.float8_e4m3fn)
    a = torch.tensor(alpha)
    t = NVFP4Tensor(data, sf, a)
    exact = reference.dequant_nvfp4(NVFP4Tensor(data, sf, torch.tensor(1.0)), torch.float64) * a.double()
    assert torch.equal(reference.dequant_nvfp4(t, torch.float64), exact)
    assert torch.equal(reference.dequant_nvfp4(t, torch.float32), exact.float())
    assert torch.equal(reference.dequant_nvfp4(t, torch.bfloat16), exact.float().bfloat16())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_e2m1_rounding_of_every_half(dtype):
    """ml_dtypes saturates as we do; it has no rule for NaN, ours is +6."""
    x = every_half(dtype)
    got = e2m1.encode(x)
    number = ~x.isnan()
    want = x[number].numpy().astype(E2M1).view(np.uint8)
    assert np.array_equal(got[number].numpy(), want)
    assert (got[x.isnan()] == 7).all()


def test_e2m1_rounding_next_to_each_boundary():
    """FP32 on both sides of every boundary, and the boundary itself, which goes to the even code."""
    values = np.arange(8, dtype=np.uint8).view(E2M1).astype(np.float32)
    middle = (values[1:] + values[:-1]) / 2
    for i, m in enumerate(middle):
        x = torch.tensor([np.nextafter(m, np.float32(0)), m, np.nextafter(m, np.float32(9))])
        assert e2m1.encode(x).tolist() == [i, i if i % 2 == 0 else i + 1, i + 1]
        assert e2m1.encode(-x).tolist() == [8 + i, 8 + (i if i % 2 == 0 else i + 1), 9 + i]


def test_e2m1_round_trip():
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(e2m1.encode(e2m1.decode(codes)), codes)
    data = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e2m1.pack(e2m1.unpack(data)), data)
    assert e2m1.unpack(torch.tensor([0xA3], dtype=torch.uint8)).tolist() == [0x3, 0xA]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_e4m3_rounding_of_every_half(dtype):
    """The cast that scales go through, on the range that they have: 0 .. 448, subnormal numbers and ties included."""
    x = every_half(dtype)
    x = x[(x >= 0) & (x <= 448)]
    got = x.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    assert np.array_equal(got, x.numpy().astype(E4M3).view(np.uint8))


def nvfp4(m: int = 4, k: int = 32, **changes: object) -> NVFP4Tensor:
    parts: dict[str, object] = {
        "data": torch.zeros(m, k // 2, dtype=torch.uint8),
        "sf": torch.zeros(m, k // 16, dtype=torch.uint8).view(torch.float8_e4m3fn),
        "alpha": torch.ones(()),
    }
    return NVFP4Tensor(**{**parts, **changes})  # type: ignore[arg-type]


def test_nvfp4_shape_and_layouts():
    t = nvfp4(5, 96)
    assert t.shape == (5, 96)
    blocked = t.with_sf_layout("blocked_128x4")
    assert blocked.sf.shape == (128 * 8,)
    assert blocked.with_sf_layout("linear").sf.shape == (5, 6)
    assert t.with_sf_layout("linear") is t


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": torch.zeros(4, 16)}, TypeError, "data must be uint8"),
        ({"sf": torch.zeros(4, 2)}, TypeError, "sf must be float8_e4m3fn"),
        ({"alpha": torch.ones((), dtype=torch.float64)}, TypeError, "alpha must be float32"),
        ({"data": torch.zeros(4, 12, dtype=torch.uint8)}, ValueError, "k must be a multiple of 16, got 24"),
        ({"data": torch.zeros(16, dtype=torch.uint8)}, ValueError, r"data must be \[\.\.\., m, k / 2\]"),
        ({"sf": torch.zeros(4, 3, dtype=torch.float8_e4m3fn)}, ValueError, r"linear sf \[4, 2\], got \[4, 3\]"),
        ({"sf_layout": "blocked_128x4"}, ValueError, r"blocked_128x4 sf \[512\], got \[4, 2\]"),
        ({"sf_layout": "swizzled"}, ValueError, "sf_layout must be"),
        ({"alpha": torch.ones(1, 1, 1)}, ValueError, "alpha must have at most two axes"),
        ({"alpha": torch.ones((), device="meta")}, ValueError, "must share a device"),
    ],
)
def test_nvfp4_refusals(changes, error, message):
    with pytest.raises(error, match=message):
        nvfp4(**changes)


def random_nvfp4(*shape: int) -> NVFP4Tensor:
    *lead, n, k = shape
    data = torch.randint(0, 256, (*lead, n, k // 2), dtype=torch.uint8)
    sf = torch.randint(0, 127, (*lead, n, k // 16), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return NVFP4Tensor(data, sf, torch.tensor(0.7))


def same_bytes(a: NVFP4Tensor, b: NVFP4Tensor) -> bool:
    return torch.equal(a.data, b.data) and torch.equal(a.sf.view(torch.uint8), b.sf.view(torch.uint8))


FRAGMENTS = ("fragments_sm90", "fragments_sm90_fp8")


@pytest.mark.parametrize("order", FRAGMENTS)
@pytest.mark.parametrize("shape", [(128, 192), (3, 64, 128)])
def test_order_is_another_way_to_lie_in_memory(shape, order):
    t = random_nvfp4(*shape)
    kept = random_nvfp4(*shape)
    kept.data.copy_(t.data)
    kept.sf.view(torch.uint8).copy_(t.sf.view(torch.uint8))
    f = t.with_order(order)
    assert same_bytes(t, kept)  # a copy
    assert (f.order, f.shape, f.sf_layout) == (order, shape, "linear")
    assert not same_bytes(f, t)
    assert f.with_order(order) is f
    assert f.to("cpu").order == f.with_sf_layout("linear").order == order
    assert same_bytes(f.with_order("rows"), t)
    assert torch.equal(reference.dequant_nvfp4(f, torch.float64), reference.dequant_nvfp4(t, torch.float64))

    inside = t.reorder_(order)
    assert inside.data.data_ptr() == t.data.data_ptr()
    assert inside.sf.data_ptr() == t.sf.data_ptr()
    assert same_bytes(inside, f)
    assert inside.reorder_(order) is inside
    back = inside.reorder_("rows")
    assert back.order == "rows"
    assert same_bytes(back, kept)


@pytest.mark.parametrize(("start", "end"), list(itertools.permutations(("rows", *FRAGMENTS), 2)))
def test_every_order_from_every_other(start, end):
    """From one order of fragments into the other as well, by a copy or in place, with the row exponents kept."""
    rows = random_nvfp4(128, 192).prepare_fp8()
    before, want = rows.with_order(start), rows.with_order(end)
    kept = before.data.clone()
    copy = before.with_order(end)
    assert torch.equal(before.data, kept)
    inside = before.reorder_(end)
    assert inside.data.data_ptr() == before.data.data_ptr()
    assert not torch.equal(inside.data, kept)
    for made in (copy, inside):
        assert made.order == end
        assert same_bytes(made, want)
        assert torch.equal(made.row_exponent, rows.row_exponent)
        assert torch.equal(made.prepare_fp8().row_exponent, rows.row_exponent)


LAYOUTS = (
    WeightLayout(),
    WeightLayout(sf_layout="blocked_128x4"),
    *(WeightLayout(order=order) for order in FRAGMENTS),
)


@pytest.mark.parametrize("shape", [(128, 192), (2, 64, 64)])
def test_every_layout_from_every_other(shape):
    """In place but for blocked scales of 64 rows, which are padded."""
    rows = random_nvfp4(*shape)
    want = {layout: rows.with_order(layout.order).with_sf_layout(layout.sf_layout) for layout in LAYOUTS}
    for start, end in itertools.product(LAYOUTS, LAYOUTS):
        t = rows.with_order(start.order).with_sf_layout(start.sf_layout)
        t = NVFP4Tensor(t.data.clone(), t.sf.clone(), t.alpha, t.sf_layout, t.order)
        assert t.layout == start
        made = t.lay_out_(end)
        assert made.layout == end
        assert same_bytes(made, want[end])
        assert made.data.data_ptr() == t.data.data_ptr()
        padded = shape[-2] % 128 and "blocked_128x4" in (start.sf_layout, end.sf_layout) and start != end
        assert (made.sf.data_ptr() == t.sf.data_ptr()) != padded
        assert start != end or made is t


@pytest.mark.parametrize("order", FRAGMENTS)
@pytest.mark.parametrize("blocked", [False, True])
def test_a_layout_that_cannot_be_changes_nothing(blocked, order):
    t = random_nvfp4(128, 96)
    t = t.with_sf_layout("blocked_128x4") if blocked else t
    before = NVFP4Tensor(t.data.clone(), t.sf.clone(), t.alpha, t.sf_layout)
    fragments = WeightLayout(order=order)
    assert fragments.refuses(128, 96) == f'the order "{order}" is of tiles of 64 x 64, got n=128, k=96'
    with pytest.raises(ValueError, match="tiles of 64 x 64"):
        t.lay_out_(fragments)
    with pytest.raises(ValueError, match="has linear scales, got blocked_128x4"):
        t.lay_out_(WeightLayout(order, "blocked_128x4"))
    assert same_bytes(t, before)
    fits = random_nvfp4(128, 64).with_sf_layout(t.sf_layout)
    strided = replace(fits, data=fits.data.T.contiguous().T)
    scales = fits.sf.clone()
    with pytest.raises(ValueError, match="must be contiguous to be reordered in place"):
        strided.lay_out_(fragments)
    assert torch.equal(strided.sf.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize("order", FRAGMENTS)
def test_order_of_strided_parts(order):
    """A copy may start from any strides; in place needs memory that is the tensor's alone."""
    wide = random_nvfp4(128, 256)
    part = NVFP4Tensor(wide.data[:, 32:96], wide.sf[:, 4:12], wide.alpha)
    whole = NVFP4Tensor(part.data.contiguous(), part.sf.contiguous(), part.alpha)
    assert same_bytes(part.with_order(order), whole.with_order(order))
    with pytest.raises(ValueError, match=f'data and sf must be contiguous in the order "{order}"'):
        part.reorder_(order)
    f = wide.with_order(order)
    with pytest.raises(ValueError, match="must be contiguous"):
        replace(f, data=f.data[:, 32:96], sf=f.sf[:, 4:12])


@pytest.mark.parametrize("order", FRAGMENTS)
@pytest.mark.parametrize(
    ("t", "message"),
    [
        (random_nvfp4(96, 64), "tiles of 64 x 64, got n=96, k=64"),
        (random_nvfp4(64, 96), "tiles of 64 x 64, got n=64, k=96"),
        (random_nvfp4(128, 64).with_sf_layout("blocked_128x4"), "has linear scales, got blocked_128x4"),
    ],
)
def test_order_refusals(t, message, order):
    before = t.data.clone()
    for make in (t.with_order, t.reorder_, lambda order: replace(t, order=order)):
        with pytest.raises(ValueError, match=f'the order "{order}".*{message}'):
            make(order)
    assert torch.equal(t.data, before)


def test_unknown_order_and_blocked_scales_of_an_order():
    with pytest.raises(
        ValueError, match="order must be one of rows, fragments_sm90, fragments_sm90_fp8, got 'columns'"
    ):
        random_nvfp4(64, 64).with_order("columns")  # type: ignore[arg-type]
    for order in FRAGMENTS:
        f = random_nvfp4(64, 64).with_order(order)
        with pytest.raises(
            ValueError, match=rf'order "{order}" have no blocked_128x4 layout: ask for with_order\("rows"\)'
        ):
            f.with_sf_layout("blocked_128x4")
        assert NVFP4Tensor.empty((64, 128), torch.ones(()), order=order).order == order


@pytest.mark.parametrize(
    ("order", "sf_layout", "tile"),
    [("rows", "linear", 1), ("rows", "blocked_128x4", 128), *((order, "linear", 64) for order in FRAGMENTS)],
)
def test_rows_are_a_weight_in_the_same_memory(order, sf_layout, tile):
    plain = random_nvfp4(320, 128)
    whole = plain.with_order(order).with_sf_layout(sf_layout)
    if order == "fragments_sm90_fp8":
        whole = whole.prepare_fp8()
    for start, stop in ((0, 128), (128, 320), (256, 320)):
        part = whole.rows(start, stop, whole.alpha * 2)
        assert part.layout == whole.layout
        assert part.data.data_ptr() == whole.data[start].data_ptr()
        by_rows = part.with_order("rows").with_sf_layout("linear")
        assert torch.equal(by_rows.data, plain.data[start:stop])
        assert torch.equal(by_rows.sf.view(torch.uint8), plain.sf[start:stop].view(torch.uint8))
        assert part.alpha == 2 * plain.alpha
        if order == "fragments_sm90_fp8":
            assert torch.equal(part.row_exponent, plain.prepare_fp8().row_exponent[start:stop])
    for start, stop in ((0, 0), (128, 321), (-128, 128)) + (((0, tile // 2), (tile // 2, 320)) if tile > 1 else ()):
        with pytest.raises(ValueError, match=f"rows {start} to {stop} of 320 are not whole tiles of {tile}"):
            whole.rows(start, stop, whole.alpha)


def test_native_refusals():
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"sf \[4, 2\]"):
        MXFP4Tensor(codes, torch.zeros(4, 4, dtype=torch.uint8))
    with pytest.raises(TypeError, match="sf must be uint8"):
        MXFP4Tensor(codes, torch.zeros(4, 2))
    weight = torch.zeros(200, 130).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"data \[200, 130\] needs sf \[2, 2\]"):
        FP8BlockTensor(weight, torch.zeros(1, 2, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("format", "page_size", "page_bytes"),
    [
        ("fp32", 64, 64 * 512 * 4),
        ("bf16", 64, 64 * 512 * 2),
        ("fp8_ds_mla", 64, 37440),  # 37376 bytes of content, rounded up to 576
        ("fp8_ds_mla", 2, 1728),
        ("nvfp4", 64, 64 * 384),
    ],
)
def test_kv_pages(format, page_size, page_bytes):
    """Page sizes as deployed (fp8_ds_mla) or as defined here."""
    assert kv_layout(format, page_size).page_bytes == page_bytes
    cache = PagedCache(torch.zeros(3, page_bytes, dtype=torch.uint8), format, page_size)
    assert cache.slots == 3 * page_size
    with pytest.raises(ValueError, match=rf"\[pages, {page_bytes}\]"):
        PagedCache(torch.zeros(3, page_bytes - 1, dtype=torch.uint8), format, page_size)


@pytest.mark.parametrize(
    ("format", "page_bytes"), [("fp32", 64 * 512), ("bf16", 64 * 256), ("fp8", 64 * 132), ("mxfp4", 64 * 68)]
)
def test_index_pages(format, page_bytes):
    assert index_layout(format, 64).page_bytes == page_bytes
    assert IndexCache(torch.zeros(2, page_bytes, dtype=torch.uint8), format, 64).slots == 128


def test_unknown_cache_format():
    with pytest.raises(ValueError, match="KV format must be"):
        kv_layout("fp4", 64)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="index format must be"):
        index_layout("fp4", 64)  # type: ignore[arg-type]
