"""qnorm_rope_quantize gives the reference's bytes, and the reference those of a cache's rows of normed queries."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target
from fp4suite.operators import dtype_name
from fp4suite.problem import QnormRopeQuantizeProblem
from kernels_triton import qnorm_rope_quantize as kernel

from .checks import configs
from .rope_inputs import LAST, angles, far_table, gaussian_rows, sparse_table

HEAD, ROPE, EPS = 512, 64, 1e-6


def decoded(rows: Tensor, head: int = HEAD, rope: int = ROPE) -> Tensor:
    """FP32 [tokens, heads, head]."""
    cache = kernel.as_rows(rows, head, rope)
    return reference.read_rows(cache, torch.arange(len(cache.data), device=rows.device)).unflatten(0, rows.shape[:2])


def check(q: Tensor, positions: Tensor, table: Tensor, *configs: kernel.Config) -> Tensor:
    """Byte for byte, against the reference there and on the CPU; by blocks and not where nothing else is asked for."""
    here = reference.qnorm_rope_quantize(q, positions, table, EPS)
    there = reference.qnorm_rope_quantize(q.cpu(), positions.cpu(), table.cpu(), EPS)
    for config in configs or (kernel.Config(), kernel.Config(by_blocks=True, turns=2)):
        out = torch.full_like(here, 0xFF)
        kernel.launch(q, positions, table, EPS, out, config)
        for want in (here, there):
            assert torch.equal(out.cpu(), want.cpu())
    return out


BY_BLOCKS = [kernel.Config(by_blocks=True, turns=turns) for turns in kernel.SPACE["turns"]]


@pytest.mark.parametrize(
    "config", [*configs(kernel, QnormRopeQuantizeProblem(m=1, heads=3), most=6), *BY_BLOCKS], ids=str
)
def test_every_config(config, device):
    """Ragged in heads, by programs that have fewer turns than others."""
    q = gaussian_rows(2, 5, HEAD, dtype=torch.bfloat16, device=device)
    check(q, *angles(2, ROPE, device), config)


@pytest.mark.parametrize(("heads", "head", "rope"), [(20, 512, 64), (4, 80, 16), (3, 96, 32), (2, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_types_and_sizes(dtype, heads, head, rope, device):
    q = gaussian_rows(2, heads, head, dtype=dtype, device=device)
    problem = QnormRopeQuantizeProblem(m=2, heads=heads, head_dim=head, rope_dim=rope, x=dtype_name(q, "q"))
    check(q, *angles(2, rope, device), kernel.Config(block_h=4, num_warps=4), kernel.default(problem))


def test_far_positions(device):
    positions, table = far_table(ROPE, device)
    check(gaussian_rows(6, 2, HEAD, dtype=torch.bfloat16, device=device), positions, table)


def test_hard_rows(device, hard_rows):
    """Zeros, -0, single numbers, subnormal ones."""
    check(hard_rows(12, HEAD, torch.bfloat16, device).view(4, 3, HEAD), *angles(4, ROPE, device))
    zeros = check(torch.zeros(2, 3, HEAD, dtype=torch.bfloat16, device=device), *angles(2, ROPE, device))
    assert not decoded(zeros).any()


def test_strides(device):
    """Some of the heads, heads before tokens, dims of a wider row."""
    wide = gaussian_rows(8, 6, 2 * HEAD, dtype=torch.bfloat16, device=device)
    at = angles(4, ROPE, device)
    for q in (wide[::2, 1::2, :HEAD], wide[:6, :4].transpose(0, 1)[..., HEAD:], wide[2:6, :, 5 : HEAD + 5]):
        check(q, *at)


def test_operator_takes_any_view(device):
    q = gaussian_rows(4, 3, HEAD, dtype=torch.bfloat16, device=device)
    positions, table = angles(4, ROPE, device)
    apart = torch.stack((positions, positions + 1), dim=1)[:, 0]
    with on_target("sm_90a"):
        got = ops.qnorm_rope_quantize(q.permute(2, 0, 1).contiguous().permute(1, 2, 0), apart, table, EPS)
    assert got.is_contiguous()
    assert torch.equal(got, reference.qnorm_rope_quantize(q, positions, table, EPS))


def test_no_tokens(device):
    positions, table = angles(1, ROPE, device)
    assert check(torch.empty(0, 3, HEAD, device=device), positions[:0], table).shape == (0, 3, 384)
    assert ops.qnorm_rope_quantize(torch.empty(0, 3, HEAD), positions[:0].cpu(), table.cpu(), EPS).shape == (0, 3, 384)


def test_rows_are_those_of_a_cache(device):
    """The reference against `qnorm_rope` and a cache that is written: the same bytes. RoPE dims keep BF16."""
    q = gaussian_rows(3, 4, HEAD, dtype=torch.bfloat16, device=device)
    at = angles(3, ROPE, device)
    rows, normed = reference.qnorm_rope_quantize(q, *at, EPS), reference.qnorm_rope(q, *at, EPS)
    cache = kernel.as_rows(torch.zeros_like(rows), HEAD, ROPE)
    reference.write_rows(cache, torch.arange(12, device=device), normed.flatten(0, 1))
    assert torch.equal(rows.flatten(0, 1), cache.data)
    got = decoded(rows)
    torch.testing.assert_close(got[..., -ROPE:], normed[..., -ROPE:].float(), rtol=0, atol=0)
    error = (got - normed.float()).norm() / normed.float().norm()
    assert 0.05 < error < 0.11  # of rounding Gaussian numbers to NVFP4


@pytest.mark.parametrize("config", [kernel.Config(block_h=2), kernel.Config(by_blocks=True, turns=4)], ids=str)
def test_what_is_not_finite_stays_in_its_head(config, device):
    """A head with an infinity or a NaN has an alpha that says so; its neighbours do not change. A NaN has any sign."""
    q = gaussian_rows(2, 4, HEAD, dtype=torch.bfloat16, device=device)
    at = angles(2, ROPE, device)
    before = check(q, *at, config)
    q[0, 1, 3], q[1, 2, 7] = torch.inf, torch.nan
    after = torch.full_like(before, 0xFF)
    kernel.launch(q, *at, EPS, after, config)
    assert (before != after).any(-1).nonzero().tolist() == [[0, 1], [1, 2]]
    got, want = decoded(after), decoded(reference.qnorm_rope_quantize(q, *at, EPS))
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert got[0, 1, : HEAD - ROPE].isnan().all()
    assert got[1, 2].isnan().all()


def test_cases_of_the_tuner(device):
    for m in (1, 5):
        c = testing.case(QnormRopeQuantizeProblem(m=m, heads=4), device)
        c.run(kernel, kernel.default(c.problem))
        c.check()


def test_inputs_tell_faults_apart(device):
    q = gaussian_rows(4, 3, HEAD, dtype=torch.bfloat16, device=device)
    positions, table = angles(4, ROPE, device)
    right = reference.qnorm_rope_quantize(q, positions, table, EPS)
    for wrong in (
        reference.qnorm_rope_quantize(q, positions.roll(1), table, EPS),
        reference.qnorm_rope_quantize(q, positions, table, 0.5),
        reference.qnorm_rope_quantize(q.roll(1, dims=1), positions, table, EPS),
    ):
        assert (wrong != right).float().mean() > 0.02


def test_refusals(device):
    def why(config: kernel.Config | None = None, **sizes: int) -> str:
        problem = QnormRopeQuantizeProblem(m=1, heads=2, **sizes)
        return kernel.supports(problem, config or kernel.Config()) or ""

    assert "multiple of 32 dims beside RoPE, got 16" in why(head_dim=80)
    assert "pairs" in why(head_dim=32)
    assert "spill" in why(kernel.Config(block_h=8))
    assert "turns are for heads by blocks, got turns=2" in why(kernel.Config(turns=2))
    assert "a warp takes a head of bf16, got 2 for 1 of bf16" in why(kernel.Config(by_blocks=True, num_warps=2))
    assert "64 n dims without and 16 n with RoPE" in why(kernel.Config(by_blocks=True), head_dim=96)
    q, (positions, table) = torch.zeros(2, 3, HEAD, device=device), angles(2, ROPE, device)
    with pytest.raises(ValueError, match=r"q must be \[tokens, heads, head_dim\], got \[6, 512\]"):
        ops.qnorm_rope_quantize(q.flatten(0, 1), positions, table, EPS)
    with pytest.raises(ValueError, match=r"positions must be int32 \[2\], got torch.int32 \[1\]"):
        ops.qnorm_rope_quantize(q, positions[:1], table, EPS)
    with pytest.raises(ValueError, match="a multiple of 16 dims beside RoPE, got 8"):
        ops.qnorm_rope_quantize(q[..., :72], positions, table, EPS)
    apart, out = (
        q.transpose(1, 2).contiguous().transpose(1, 2),
        torch.empty(2, 3, 384, dtype=torch.uint8, device=device),
    )
    with pytest.raises(ValueError, match="the dims of a head must be contiguous"):
        kernel.launch(apart, positions, table, EPS, out, kernel.Config())


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_a_batch_of_real_size(heads, device):
    c = testing.case(QnormRopeQuantizeProblem(m=1031, heads=heads), device)
    for config in (kernel.Config(), kernel.default(c.problem), kernel.Config(block_h=4, num_warps=4), *BY_BLOCKS):
        c.run(kernel, config)
        c.check()


@pytest.mark.gpu
def test_a_million_positions(device):
    positions = torch.tensor([LAST, 0, LAST - 1, LAST // 2], dtype=torch.int32, device=device)
    check(gaussian_rows(4, 2, HEAD, dtype=torch.bfloat16, device=device), positions, sparse_table(ROPE, device))
