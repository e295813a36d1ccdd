"""kv_norm_rope_insert gives the reference's bytes: every config, format, page and type, far positions, odd strides."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target
from fp4suite.formats import PagedCache, kv_layout
from fp4suite.problem import KvNormRopeInsertProblem
from fp4suite.testing import assert_same_bytes
from kernels_triton import kv_norm_rope_insert as kernel

from .checks import configs
from .rope_inputs import FORMATS, LAST, angles, far_table, gaussian_rows, sparse_table

HEAD, ROPE, EPS = 512, 64, 1e-6


def new_cache(
    format: str, page: int, pages: int, device: torch.device, head: int = HEAD, rope: int = ROPE
) -> PagedCache:
    size = kv_layout(format, page, head, rope).page_bytes  # type: ignore[arg-type]
    data = torch.full((pages, size), 0xEE, dtype=torch.uint8, device=device)
    return PagedCache(data, format, page, head, rope)  # type: ignore[arg-type]


def check(
    kv: Tensor,
    weight: Tensor,
    positions: Tensor,
    table: Tensor,
    cache: PagedCache,
    slots: Tensor,
    config: object = None,
) -> None:
    """The whole cache, against the reference there and on the CPU."""
    wants = []
    for device in {kv.device, torch.device("cpu")}:
        data = cache.data.to(device, copy=True)
        like = PagedCache(data, cache.format, cache.page_size, cache.head_dim, cache.rope_dim)
        moved = (x.to(device) for x in (kv, weight, positions, table))
        reference.kv_norm_rope_insert(*moved, EPS, like, slots.to(device))
        wants.append(data.cpu())
    kernel.launch(kv, weight, positions, table, EPS, slots, cache, config or kernel.Config())
    for want in wants:
        assert_same_bytes(cache.data.cpu(), want, f"{cache.format} cache")


def inputs(m: int, hard_rows, device: torch.device, dtype: torch.dtype = torch.bfloat16, head: int = HEAD) -> tuple:
    gen = torch.Generator().manual_seed(m)
    weight = (1 + 0.3 * torch.randn(head, generator=gen)).to(dtype).to(device)
    slots = torch.randperm(40, generator=gen)[:m].int().to(device)
    if m > 2:
        slots[m // 2] = -1
    kv = torch.cat(
        (gaussian_rows(m - m // 3, head, dtype=dtype, device=device), hard_rows(m // 3, head, dtype, device))
    )
    return kv, weight, slots


@pytest.mark.parametrize("config", configs(kernel, KvNormRopeInsertProblem(m=1), 18), ids=str)
def test_every_config(config, device, hard_rows):
    """Ragged in rows."""
    kv, weight, slots = inputs(11, hard_rows, device)
    positions, table = angles(11, ROPE, device)
    check(kv, weight, positions, table, new_cache("fp8_ds_mla", 4, 10, device), slots, config)


@pytest.mark.parametrize("page", [64, 256])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_format_page_and_type(format, page, dtype, device, hard_rows):
    kv, weight, slots = inputs(9, hard_rows, device, dtype)
    positions, table = angles(9, ROPE, device)
    check(kv, weight, positions, table, new_cache(format, page, 2, device), slots + 40 * (slots >= 0))


@pytest.mark.parametrize(("m", "page"), [(1, 4), (1, 64), (9, 4), (9, 64)])
def test_by_blocks(m, page, device, hard_rows):
    """A slot of -1 among them."""
    config = kernel.Config(by_blocks=True)
    assert kernel.supports(KvNormRopeInsertProblem(m=m, format="nvfp4"), config) is None
    kv, weight, slots = inputs(m, hard_rows, device)
    positions, table = angles(m, ROPE, device)
    check(kv, weight, positions, table, new_cache("nvfp4", page, 10, device), slots, config)


@pytest.mark.parametrize(("head", "rope"), [(80, 16), (192, 64), (576, 64), (112, 48)])
def test_heads_of_other_sizes_by_blocks(head, rope, device, hard_rows):
    """Also under a weight of FP32, of rows at odd addresses."""
    wide = hard_rows(5, head + 16, torch.bfloat16, device)
    _, weight, slots = inputs(5, hard_rows, device, head=head)
    positions, table = angles(5, rope, device)
    for kv, w in ((wide[:, :head], weight), (wide[:, 3 : head + 3], weight.float())):
        cache = new_cache("nvfp4", 4, 10, device, head, rope)
        check(kv, w, positions, table, cache, slots, kernel.Config(by_blocks=True))


@pytest.mark.parametrize("format", FORMATS)
def test_far_positions(format, device, hard_rows):
    """The last of a million positions, and its neighbours, under angles that differ in each."""
    kv, weight, slots = inputs(6, hard_rows, device)
    positions, table = far_table(ROPE, device)
    check(kv, weight, positions, table, new_cache(format, 4, 10, device), slots)


def test_heads_of_other_sizes(device, hard_rows):
    """The tiny model's: 80 dims, 16 of them turned."""
    for format in FORMATS:
        kv, weight, slots = inputs(5, hard_rows, device, head=80)
        positions, table = angles(5, 16, device)
        check(kv, weight, positions, table, new_cache(format, 4, 10, device, 80, 16), slots)


def test_rows_of_any_stride(device, hard_rows):
    wide = hard_rows(12, 1024, torch.bfloat16, device)
    _, weight, slots = inputs(4, hard_rows, device)
    positions, table = angles(4, ROPE, device)
    for kv in (wide[::3, :HEAD], wide[:4, 512:], wide[1:5, 5 : HEAD + 5]):
        check(kv, weight, positions, table, new_cache("fp8_ds_mla", 4, 10, device), slots)


def test_operator_takes_any_view(device, hard_rows):
    """Through the op's operands: transposed rows, every other position, slot and weight."""
    kv, weight, slots = inputs(6, hard_rows, device)
    positions, table = angles(6, ROPE, device)
    cache, want = (new_cache("nvfp4", 4, 10, device) for _ in range(2))
    apart = lambda x: torch.stack((x, torch.full_like(x, 3)), dim=-1)[..., 0]  # noqa: E731
    with on_target("sm_90a"):
        ops.kv_norm_rope_insert(kv.T.contiguous().T, apart(weight), apart(positions), table, EPS, cache, apart(slots))
    reference.kv_norm_rope_insert(kv, weight, positions, table, EPS, want, slots)
    assert_same_bytes(cache.data, want.data, "cache")


@pytest.mark.parametrize("m", [0, 1])
def test_few_rows(m, device, hard_rows):
    cache = new_cache("fp8_ds_mla", 4, 10, device)
    kv, weight = hard_rows(1, HEAD, torch.bfloat16, device)[:m], torch.ones(HEAD, device=device)
    positions, table = angles(1, ROPE, device)
    slots = torch.tensor([13], dtype=torch.int32, device=device)[:m]
    check(kv, weight, positions[:m], table, cache, slots)
    assert int((cache.data != 0xEE).any(1).sum()) == m


@pytest.mark.parametrize(
    ("format", "config"),
    [("bf16", kernel.Config(block_m=4, num_warps=4)), ("nvfp4", kernel.Config(by_blocks=True))],
)
def test_padding_may_hold_anything(format, config, device, hard_rows):
    """Also a position that no table has."""
    kv, weight, slots = inputs(5, hard_rows, device)
    positions, table = angles(5, ROPE, device)
    cache, want = (new_cache(format, 4, 10, device) for _ in range(2))
    reference.kv_norm_rope_insert(kv, weight, positions, table, EPS, want, slots)
    positions[2], kv[2] = 2**31 - 1, torch.nan
    assert slots[2] == -1
    kernel.launch(kv, weight, positions, table, EPS, slots, cache, config)
    assert_same_bytes(cache.data, want.data, "cache")


@pytest.mark.parametrize(
    ("format", "config"),
    [("fp8_ds_mla", kernel.Config()), ("nvfp4", kernel.Config()), ("nvfp4", kernel.Config(by_blocks=True))],
)
def test_infinities_and_nan(format, config, device):
    """After the norm a row with an infinity is 0 and NaN, a row with a NaN is NaN; others know nothing of it."""
    kv = torch.randn(6, HEAD, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    kv[1, 70], kv[3, 9], kv[4, HEAD - 1] = torch.inf, torch.nan, -torch.inf
    weight = torch.ones(HEAD, dtype=torch.bfloat16, device=device)
    positions, table = angles(6, ROPE, device)
    slots = torch.arange(6, dtype=torch.int32, device=device)
    cache, want = (new_cache(format, 64, 1, device) for _ in range(2))
    kernel.launch(kv, weight, positions, table, EPS, slots, cache, config)
    reference.kv_norm_rope_insert(kv, weight, positions, table, EPS, want, slots)
    got, expected = (reference.read_rows(c, slots) for c in (cache, want))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert not got[1, 70].isfinite()
    assert not got[3].isfinite().any()
    assert not got[4, HEAD - 1].isfinite()
    assert got[[0, 2, 5]].isfinite().all()


def test_inputs_tell_faults_apart(device, hard_rows):
    """What a fault would mix up is different: positions, angles, weight, eps, and the row's place."""
    kv, weight, slots = inputs(9, hard_rows, device)
    positions, table = angles(9, ROPE, device)

    def stored(kv: Tensor, weight: Tensor, positions: Tensor, table: Tensor, slots: Tensor, eps: float = EPS) -> Tensor:
        cache = new_cache("fp8_ds_mla", 4, 10, device)
        kernel.launch(kv, weight, positions, table, eps, slots, cache, kernel.Config())
        return cache.data

    right = stored(kv, weight, positions, table, slots)
    swapped = torch.cat((table[:, ROPE // 2 :], table[:, : ROPE // 2]), dim=1)
    for wrong in (
        stored(kv, weight, (positions + 1) % len(table), table, slots),
        stored(kv, weight, positions, swapped, slots),
        stored(kv, weight.flip(0), positions, table, slots),
        stored(kv, weight, positions, table, slots.flip(0)),
        stored(kv, weight, positions, table, slots, 1.0),
    ):
        assert (wrong != right).float().mean() > 0.005


@pytest.mark.parametrize("format", FORMATS)
def test_cases_of_the_tuner(format, device):
    for m in (1, 19):
        c = testing.case(KvNormRopeInsertProblem(m=m, format=format), device)
        c.run(kernel, kernel.Config())
        c.check()


def test_refusals(device):
    problem = KvNormRopeInsertProblem(m=1, head_dim=64, rope_dim=16, format="nvfp4")
    assert "a multiple of 32 dims beside RoPE, got 48" in (kernel.supports(problem, kernel.Config()) or "")
    assert "fp64" in (kernel.supports(KvNormRopeInsertProblem(m=1, x="fp64"), kernel.Config()) or "")
    blocks = kernel.Config(by_blocks=True)
    for wrong, config, message in (
        (KvNormRopeInsertProblem(m=1), blocks, "by blocks rows are stored in nvfp4, got fp8_ds_mla"),
        (
            KvNormRopeInsertProblem(m=1, format="nvfp4", head_dim=96, rope_dim=64),
            blocks,
            "by blocks rows have 64 n dims without and 16 n with RoPE, got 32 and 64",
        ),
        (
            KvNormRopeInsertProblem(m=1, format="nvfp4", x="fp16"),
            blocks,
            "by blocks a warp takes a row of bf16, got 1 for 1 of fp16",
        ),
        (
            KvNormRopeInsertProblem(m=1, format="nvfp4", head_dim=1536),
            blocks,
            "held rows have one part and tiles of up to 1024 columns, got 1 of 2048",
        ),
    ):
        assert kernel.supports(wrong, config) == message
    assert "spill" in (kernel.supports(KvNormRopeInsertProblem(m=1), kernel.Config(block_m=8)) or "")
    cache = new_cache("bf16", 4, 2, device)
    kv, weight = torch.zeros(2, HEAD, device=device), torch.ones(HEAD, device=device)
    (positions, table), slots = angles(2, ROPE, device), torch.arange(2, dtype=torch.int32, device=device)
    for wrong, message in (
        ((kv[:, :256], weight, positions, table, EPS, cache, slots), r"kv must be \[tokens, 512\] and weight \[512\]"),
        ((kv, weight, positions.long(), table, EPS, cache, slots), r"positions must be int32 \[2\], got torch.int64"),
        ((kv, weight, positions, table.double(), EPS, cache, slots), "table must be float32"),
        (
            (kv, weight, positions, table[:, :32].contiguous(), EPS, cache, slots),
            "the cache has 64 RoPE dims, table 32",
        ),
        ((kv, weight, positions, table, EPS, cache, slots[:1]), r"slots must be int32 \[2\], got torch.int32 \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.kv_norm_rope_insert(*wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [64, 256])
@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_of_real_size(format, page, device):
    c = testing.case(KvNormRopeInsertProblem(m=4133, format=format, page_size=page), device)
    for config in (kernel.Config(), kernel.Config(block_m=4, num_warps=4), kernel.Config(by_blocks=True)):
        if kernel.supports(c.problem, config) is None:
            c.run(kernel, config)
            c.check()


@pytest.mark.gpu
def test_a_million_positions(device):
    table = sparse_table(ROPE, device)
    positions = torch.tensor([LAST, 0, LAST - 1, LAST // 2], dtype=torch.int32, device=device)
    kv, weight = torch.randn(4, HEAD, device=device).bfloat16(), torch.ones(HEAD, device=device).bfloat16()
    slots = torch.arange(4, dtype=torch.int32, device=device)
    check(kv, weight, positions, table, new_cache("fp8_ds_mla", 64, 1, device), slots)
