"""qkv_norm_rope_insert gives the bits of rms_norm and the bytes of kv_norm_rope_insert, in one launch: every config."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import batch_invariant, on_target, recording
from fp4suite.formats import KVFormat, PagedCache, kv_layout
from fp4suite.problem import QkvNormRopeInsertProblem
from fp4suite.testing import assert_same_bytes
from kernels_triton import qkv_norm_rope_insert as kernel

from .rope_inputs import FORMATS, angles, gaussian_rows

HEAD, ROPE, RANK, EPS = 512, 64, 208, 1e-6


def new_cache(format: KVFormat, device: torch.device, pages: int = 10, page: int = 4, head: int = HEAD) -> PagedCache:
    size = kv_layout(format, page, head, ROPE).page_bytes
    return PagedCache(torch.full((pages, size), 0xEE, dtype=torch.uint8, device=device), format, page, head, ROPE)


def inputs(m: int, device: torch.device, dtype: torch.dtype = torch.bfloat16, rank: int = RANK) -> tuple:
    """q and kv as columns of one tensor, their weights, positions, table, and slots of which one stores nothing."""
    gen = torch.Generator().manual_seed(m)
    both = gaussian_rows(m, rank + HEAD, dtype=dtype, device=device)
    q, kv = both.split((rank, HEAD), dim=1)
    q_weight, kv_weight = ((1 + 0.3 * torch.randn(n, generator=gen)).to(dtype).to(device) for n in (rank, HEAD))
    slots = torch.randperm(40, generator=gen)[:m].int().to(device)
    slots[m // 2 : m // 2 + int(m > 2)] = -1
    positions, table = angles(max(m, 1), ROPE, device)
    return q, q_weight, kv, kv_weight, positions[:m], table, slots


def check(format: str, operands: tuple, config: kernel.Config | None = None) -> None:
    """Both results against the reference, there and on the CPU."""
    q, *_, slots = operands
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    cache = new_cache(format, q.device)
    kernel.launch(*operands[:-1], EPS, slots, (out, cache), config or kernel.Config())
    for device in {q.device, torch.device("cpu")}:
        want = new_cache(format, device)
        *given, at = (t.to(device) for t in operands)
        normed = reference.qkv_norm_rope_insert(*given, EPS, want, at)
        torch.testing.assert_close(out.to(device), normed, rtol=0, atol=0, equal_nan=True)
        assert_same_bytes(cache.data.to(device), want.data, f"{format} cache")


@pytest.mark.parametrize("i", range(3))
def test_every_config(i, device):
    """Ragged in rows; a row of q is more than a tile."""
    problem = QkvNormRopeInsertProblem(m=3, k=1104, format=FORMATS[i])
    configs = [c for c in testing.configs(kernel, most=36) if kernel.supports(problem, c) is None]
    assert len(configs) > 12
    for config in configs[i::3]:
        check(problem.format, inputs(problem.m, device, rank=problem.k), config)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_format_and_type(format, dtype, device):
    """By the default configs of few and of many tokens."""
    for m in (1, 4096):
        check(format, inputs(3, device, dtype), kernel.default(QkvNormRopeInsertProblem(m=m, k=RANK)))


@pytest.mark.parametrize("m", [0, 1, 2])
def test_few_rows(m, device):
    check("fp8_ds_mla", inputs(m, device), kernel.Config(block_kv=4))


def test_rows_of_any_stride(device):
    """Of q and of kv each their own: columns in the other order, every other row, no multiple of 16 bytes."""
    q, q_weight, kv, kv_weight, *rest = inputs(8, device)
    turned = torch.cat((kv, q), dim=1)
    rest = [t[:4] if t.ndim == 1 else t for t in rest]
    for a, b in ((turned[:4, HEAD:], turned[:4, :HEAD]), (q[::2], kv.contiguous()[4:]), (q[:4].contiguous(), kv[1::2])):
        check("nvfp4", (a, q_weight, b, kv_weight, *rest))
    odd = turned[:4, 3:]
    check("fp8_ds_mla", (odd[:, HEAD - 3 :], q_weight, odd[:, :HEAD], kv_weight, *rest))


def test_what_is_not_finite_stays_in_its_row(device):
    """A NaN in a row of q is none of kv, and the other way round."""
    q, q_weight, kv, kv_weight, *rest, _ = inputs(4, device, torch.float32)
    slots = torch.arange(4, dtype=torch.int32, device=device)
    q[1, 5], kv[2, 7] = torch.nan, torch.inf
    cache, out = new_cache("bf16", device), torch.zeros(4, RANK, device=device)
    kernel.launch(q, q_weight, kv, kv_weight, *rest, EPS, slots, (out, cache), kernel.Config(parts=1))
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()
    stored = reference.read_rows(cache, slots)
    assert stored[2, 7].isnan()
    assert stored[[0, 1, 3]].isfinite().all()


def test_operator_takes_any_view(device):
    """One launch of one kernel; q transposed, every other position, slot and weight."""
    q, q_weight, kv, kv_weight, positions, table, slots = inputs(6, device)
    cache, want = (new_cache("nvfp4", device) for _ in range(2))
    apart = lambda x: torch.stack((x, torch.full_like(x, 3)), dim=-1)[..., 0]  # noqa: E731
    with on_target("sm_90a"), recording() as choices:
        got = ops.qkv_norm_rope_insert(
            q.T.contiguous().T, apart(q_weight), kv, apart(kv_weight), apart(positions), table, EPS, cache, apart(slots)
        )
    assert [c.kernel for c in choices] == ["triton_qkv_norm_rope_insert"]
    assert got.is_contiguous()
    normed = reference.qkv_norm_rope_insert(q, q_weight, kv, kv_weight, positions, table, EPS, want, slots)
    assert torch.equal(got, normed)
    assert_same_bytes(cache.data, want.data, "cache")


def test_a_row_is_the_same_alone_in_batch_invariant_mode(device):
    q, q_weight, kv, kv_weight, positions, table, slots = inputs(6, device)
    whole, alone = (new_cache("nvfp4", device) for _ in range(2))

    def run(rows: slice, cache: PagedCache) -> Tensor:
        where = positions[rows], table, EPS, cache, slots[rows]
        return ops.qkv_norm_rope_insert(q[rows], q_weight, kv[rows], kv_weight, *where)

    with on_target("sm_90a"), batch_invariant(), recording() as choices:
        normed = run(slice(None), whole)
        assert torch.equal(torch.cat([run(slice(i, i + 1), alone) for i in range(6)]), normed)
    assert all(c.invariant and c.kernel == "triton_qkv_norm_rope_insert" for c in choices)
    assert_same_bytes(alone.data, whole.data, "cache")


def test_operators_of_its_parts_give_the_same(device):
    """Kernel beside kernels: what a model may swap for each other."""
    q, q_weight, kv, kv_weight, positions, table, slots = inputs(6, device)
    one, two = (new_cache("fp8_ds_mla", device) for _ in range(2))
    with on_target("sm_90a"):
        got = ops.qkv_norm_rope_insert(q, q_weight, kv, kv_weight, positions, table, EPS, one, slots)
        ops.kv_norm_rope_insert(kv, kv_weight, positions, table, EPS, two, slots)
        assert torch.equal(got, ops.rms_norm(q, q_weight, EPS))
    assert_same_bytes(one.data, two.data, "cache")


@pytest.mark.parametrize("format", FORMATS)
def test_cases_of_the_tuner(format, device):
    """Either result, changed, fails the check."""
    problem = QkvNormRopeInsertProblem(m=9, k=64, format=format)
    c = testing.case(problem, device)
    c.run(kernel, kernel.default(problem))
    c.check()
    normed, cache = c.out
    normed[8, 63] += 1
    with pytest.raises(AssertionError, match=r"q: .* bytes differ; first at \[8, "):
        c.check()
    c.run(kernel, kernel.default(problem))
    cache.data[1, 0] ^= 1
    with pytest.raises(AssertionError, match=r"cache: 1 of .* bytes differ; first at \[1, 0\]"):
        c.check()


def test_refusals():
    def why(config: kernel.Config, **dims: object) -> str | None:
        return kernel.supports(QkvNormRopeInsertProblem(**({"m": 1, "k": 1536} | dims)), config)

    assert why(kernel.Config()) is None
    assert why(kernel.Config(), k=24) == "k=24 is not a multiple of 16"
    assert why(kernel.Config(), x="fp64") == "kernels read bf16, fp16, fp32, got fp64"
    assert why(kernel.Config(parts=4)) == "k=1536 has 3 tiles of 512 columns, too few for 4 parts"
    assert "spill" in (why(kernel.Config(block_kv=8)) or "")
    dims = {"head_dim": 64, "rope_dim": 16, "format": "nvfp4"}
    assert "a multiple of 32 dims beside RoPE, got 48" in (why(kernel.Config(), **dims) or "")


def test_operator_refuses(device):
    q, q_weight, kv, kv_weight, positions, table, slots = inputs(3, device)
    cache = new_cache("bf16", device)

    def refused(error: type[Exception], message: str, **change: Tensor) -> None:
        given = {"q": q, "q_weight": q_weight, "kv": kv, "kv_weight": kv_weight, "slots": slots} | change
        with pytest.raises(error, match=message):
            ops.qkv_norm_rope_insert(positions=positions, table=table, eps=EPS, cache=cache, **given)

    refused(ValueError, r"q must be \[3, k\], a row for each of kv, got \[2, 208\]", q=q[:2])
    refused(ValueError, r"q_weight \[k\], got \[3, 208\] and \[512\]", q_weight=kv_weight)
    refused(ValueError, "share dtype and device, got torch.float32 .* and torch.bfloat16", q=q.float())
    refused(TypeError, "q_weight must be one of bfloat16, .*float64", q_weight=q_weight.double())
    refused(ValueError, r"kv must be \[tokens, 512\] and kv_weight \[512\]", kv=kv[:, :256])
    refused(ValueError, r"slots must be int32 \[3\], got torch.int64", slots=slots.long())


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 4133])
@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_of_real_size(format, m, device):
    problem = QkvNormRopeInsertProblem(m=m, k=1536, format=format)
    c = testing.case(problem, device)
    for config in {kernel.Config(), kernel.default(problem), kernel.Config(block_kv=4, num_warps=2, parts=2)}:
        c.run(kernel, config)
        c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    """Captured once, replayed on new inputs."""
    problem = QkvNormRopeInsertProblem(m=64, k=1536)
    c, config = testing.case(problem, device), kernel.default(problem)
    kernel.warm(problem, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.launch(kernel, config)
    for seed in range(3):
        torch.manual_seed(seed)
        for rows in (c.operands[0], c.operands[2]):
            rows.copy_(torch.randn(rows.shape, device=device))
        c.poison()
        graph.replay()
        c.check()
