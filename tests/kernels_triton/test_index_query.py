"""index_query gives the reference's bits: every format, type and config, with and without Hadamard, any stride."""

import pytest
import torch

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target, override
from fp4suite.problem import IndexQueryProblem
from kernels_triton import index_query as kernel

from .checks import every_bf16

FORMATS = ["fp32", "bf16", "fp8", "mxfp4"]
TABLE = reference.rope_table(reference.rope_frequencies(16, 160000.0), 1_048_576)
WIDE = kernel.Config(num_warps=8)  # few programs, for the interpreter's sake


def check(
    q: torch.Tensor,
    positions: list[int],
    format: str,
    hadamard: bool,
    config: kernel.Config = WIDE,
    table: torch.Tensor = TABLE,
) -> torch.Tensor:
    at, table = torch.tensor(positions, dtype=torch.int32, device=q.device), table.to(q.device)
    want = reference.index_query(q, at, table, format=format, hadamard=hadamard)  # type: ignore[arg-type]
    out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
    kernel.launch(q, at, table, format, hadamard, out, None, config)
    found, wanted = out.float(), want.float()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & ~found.isnan(), wanted.signbit() & ~wanted.isnan())  # of zeros too
    return out


def queries(tokens: int, heads: int, d: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return testing.random_activations((tokens, heads, d), torch.Generator().manual_seed(d), dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_and_type(format, hadamard, dtype, device):
    """A ragged number of heads; the last of a million positions."""
    check(queries(3, 21, 64, device, dtype), [0, 1_048_575, 77], format, hadamard)


@pytest.mark.parametrize(("dtype", "d"), [(torch.bfloat16, 64), (torch.float32, 128), (torch.bfloat16, 96)], ids=str)
def test_codes(dtype, d, device):
    """E4M3 bytes and weights that hold their scales are the reference's, and stand for the same numbers."""
    q, weights = queries(3, 21, d, device, dtype), torch.randn(3, 42, device=device)[:, ::2]
    q[0, 4], q[1, 5, 7], q[2, 6, 3] = 0.0, torch.nan, torch.inf
    at, table = torch.tensor([0, 1_048_575, 77], dtype=torch.int32, device=device), TABLE.to(device)
    want, scaled = reference.index_query_fp8(q, weights, at, table)
    codes, found = torch.zeros(q.shape, dtype=torch.uint8, device=device), torch.zeros(3, 21, device=device)
    kernel.launch(q, at, table, "fp8", False, codes, (weights.contiguous(), found), WIDE)
    testing.assert_same_bytes(codes, want.view(torch.uint8), "codes")
    testing.assert_same_bytes(found, scaled, "weights")
    numbers = reference.index_query(q.float(), at, table, format="fp8")
    unit = reference.index_query_fp8(q, torch.ones_like(weights), at, table)[1]
    testing.assert_same_bytes(codes.view(torch.float8_e4m3fn).float() * unit[..., None], numbers, "numbers")


@pytest.mark.parametrize("format", FORMATS)
def test_head_dims(format, device):
    """Padded ones, RoPE of the whole head and of two dims."""
    check(queries(2, 5, 96, device), [5, 9], format, False)
    check(queries(2, 5, 32, device), [5, 9], format, True, table=TABLE[:10, :2].contiguous())
    check(queries(2, 5, 128, device), [5, 9], format, True, table=torch.rand(10, 128))


@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
def test_every_config(config, device):
    heads = max(9, config.block_h * config.turns - 1)
    problem = IndexQueryProblem(m=2, format="mxfp4", hadamard=1, heads=heads)
    assert kernel.supports(problem, config) is None
    check(queries(2, heads, 128, device), [3, 4], "mxfp4", True, config, torch.rand(5, 64))


@pytest.mark.parametrize("format", FORMATS)
def test_every_number(format, device):
    """All 65536 BF16 numbers, infinities and NaN among them, alone in their row and beside larger ones."""
    x = every_bf16(device).view(16, 64, 64)
    check(x, list(range(16)), format, False)
    alone = torch.zeros(16, 64, 64, dtype=torch.bfloat16, device=device)
    alone[:, :, 3] = every_bf16(device)[:, ::64]
    check(alone, [0] * 16, format, True)


@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
def test_magnitudes_around_scales(format, device):
    """Rows whose largest magnitude lies at, just below and above every place where the scale changes, and none."""
    top = {"fp8": 448.0, "mxfp4": 6.0}[format]
    edges = top * torch.exp2(torch.arange(-24, 8).float())
    near = torch.stack([(edges.view(torch.int32) + (u << 16)).view(torch.float32) for u in (-1, 0, 1)]).flatten()
    q = torch.randn(len(near), 1, 64, generator=torch.Generator().manual_seed(0)).clamp(-1, 1) * near[:, None, None] / 2
    q[:, 0, 0] = near
    check(q.view(2, 48, 64).bfloat16().to(device), [0, 0], format, False)
    check(torch.zeros(1, 3, 64, device=device), [9], format, True)


def test_strides_and_nothing(device):
    q = queries(6, 24, 128, device)
    check(q[::2, 3:20, 16:80], [1, 2, 3], "fp8", False)
    check(q[:, :, :64].transpose(0, 1)[:5], [4] * 5, "mxfp4", True)
    out = q.new_zeros(0, 24, 128)
    kernel.launch(q[:0], torch.zeros(0, dtype=torch.int32, device=device), TABLE, "fp8", False, out, None, WIDE)


def test_cases_of_the_tuner(device):
    for format in FORMATS:
        c = testing.case(IndexQueryProblem(m=3, format=format, heads=5, head_dim=64, rope_dim=16), device)
        c.run(kernel, WIDE)
        c.check()
        c.out[1, 2, 3] += 1
        with pytest.raises(AssertionError, match="out: "):
            c.check()


def test_codes_of_the_tuner(device):
    c = testing.case(IndexQueryProblem(m=3, format="fp8", heads=5, head_dim=64, rope_dim=16, codes=1), device)
    c.run(kernel, WIDE)
    c.check()
    c.tail[0][1][2, 4] *= 2
    with pytest.raises(AssertionError, match="weights: "):
        c.check()
    c.run(kernel, WIDE)
    c.out[1, 2, 3] += 1
    with pytest.raises(AssertionError, match="codes: "):
        c.check()


def test_the_op_in_fp8(device):
    q = queries(4, 8, 64, device).transpose(1, 2).contiguous().transpose(1, 2)
    at, weights = torch.arange(4, dtype=torch.int32, device=device), torch.randn(8, 4, device=device).T
    want = reference.index_query_fp8(q, weights, at, TABLE.to(device))
    with on_target("sm_90a"), override(kernel="triton_index_query", config=WIDE):
        codes, scaled = ops.index_query_fp8(q, weights, at, TABLE.to(device))
    assert torch.equal(codes.view(torch.uint8), want[0].view(torch.uint8))
    assert torch.equal(scaled, want[1])
    with pytest.raises(ValueError, match=r"weights must be \[4, 8\]"):
        ops.index_query_fp8(q, weights[:, :7], at, TABLE.to(device))


def test_the_op(device):
    """Through dispatch, dims that are not contiguous."""
    q = queries(4, 8, 64, device).transpose(1, 2).contiguous().transpose(1, 2)
    at = torch.arange(8, dtype=torch.int32, device=device)[::2]
    want = reference.index_query(q, at, TABLE.to(device), format="fp8")
    with on_target("sm_90a"), override(kernel="triton_index_query", config=WIDE):
        assert torch.equal(ops.index_query(q, at, TABLE.to(device), format="fp8"), want)


def test_defaults_fit_heads_of_any_length(device):
    for head_dim in (8, 32, 64, 128, 256, 512):
        for m, heads in ((1, 3), (57, 32), (4096, 64)):
            problem = IndexQueryProblem(m=m, format="fp32", heads=heads, head_dim=head_dim, rope_dim=8, x="fp32")
            assert kernel.supports(problem, kernel.default(problem)) is None, problem
    problem = IndexQueryProblem(m=4, format="fp32", heads=5, head_dim=32, rope_dim=16, x="fp32")
    c = testing.case(problem, device)
    c.run(kernel, kernel.default(problem))
    c.check()


def test_refusals():
    def why(**dims) -> str | None:
        return kernel.supports(IndexQueryProblem(m=1, **dims), kernel.Config())

    assert why(format="mxfp4", hadamard=1) is None
    assert why(format="fp8", head_dim=96, hadamard=1) == "a Hadamard transform needs a power of two, got head_dim=96"
    assert why(format="fp8", head_dim=16, rope_dim=8, hadamard=1) == (
        "a Hadamard transform is of 32 dims or more here, got head_dim=16"
    )
    assert why(format="fp8", head_dim=512) == "head_dim=512 lanes=4: 128 elements a thread, more than 64"
    assert why(format="mxfp4", head_dim=80) == "mxfp4 has blocks of 32 dims, got head_dim=80"
    few = IndexQueryProblem(m=1, format="fp8", heads=32)
    assert kernel.supports(few, kernel.Config(turns=2)) == "32 heads are too few for 2 turns of 32"


def test_programs_take_turns_where_there_would_be_many():
    turns = {}
    for m in (1, 64, 600, 1024, 4096, 16384):
        for hadamard in (0, 1):
            problem = IndexQueryProblem(m=m, format="fp8", hadamard=hadamard)
            config = kernel.default(problem)
            assert kernel.supports(problem, config) is None
            turns[m, hadamard] = config.turns
    assert [turns[m, 0] for m in (1, 64, 600, 1024, 4096, 16384)] == [1, 1, 1, 1, 4, 8]
    assert [turns[m, 1] for m in (1, 64, 600, 1024, 4096, 16384)] == [1, 1, 1, 2, 8, 8]


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_real_sizes(format, config, device):
    for m, hadamard in ((1, 0), (999, 1)):
        problem = IndexQueryProblem(m=m, format=format, hadamard=hadamard)
        if kernel.supports(problem, config) is None:
            c = testing.case(problem, device)
            c.run(kernel, config)
            c.check()
