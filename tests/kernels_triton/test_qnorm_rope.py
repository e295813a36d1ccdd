"""qnorm_rope gives the reference's bits: every config and type, heads and tokens of any stride, far positions."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target
from fp4suite.problem import QnormRopeProblem
from kernels_triton import qnorm_rope as kernel

from .checks import configs
from .rope_inputs import LAST, angles, far_table, gaussian_rows, sparse_table

HEAD, ROPE, EPS = 512, 64, 1e-6


def check(q: Tensor, positions: Tensor, table: Tensor, config: object = None) -> None:
    """Bit for bit, against the reference there and on the CPU."""
    out = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
    kernel.launch(q, positions, table, EPS, out, config or kernel.Config())
    here = reference.qnorm_rope(q, positions, table, EPS)
    there = reference.qnorm_rope(q.cpu(), positions.cpu(), table.cpu(), EPS)
    for want in (here, there):
        torch.testing.assert_close(out.cpu(), want.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("config", configs(kernel, QnormRopeProblem(m=1, heads=3)), ids=str)
def test_every_config(config, device):
    """Ragged in heads."""
    q = gaussian_rows(3, 5, HEAD, dtype=torch.bfloat16, device=device)
    check(q, *angles(3, ROPE, device), config)


@pytest.mark.parametrize(("heads", "head", "rope"), [(128, 512, 64), (4, 80, 16), (3, 96, 32), (2, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_types_and_sizes(dtype, heads, head, rope, device):
    """FP32 shows every bit of the sum; all of a head may turn."""
    q = gaussian_rows(2, heads, head, dtype=dtype, device=device)
    check(q, *angles(2, rope, device), kernel.Config(block_h=16, num_warps=8))


def test_far_positions(device):
    positions, table = far_table(ROPE, device)
    check(gaussian_rows(6, 2, HEAD, dtype=torch.bfloat16, device=device), positions, table)


def test_hard_rows(device, hard_rows):
    """Zeros, -0, single numbers, subnormal ones."""
    check(hard_rows(12, HEAD, torch.bfloat16, device).view(4, 3, HEAD), *angles(4, ROPE, device))
    check(torch.zeros(2, 3, HEAD, device=device), *angles(2, ROPE, device))


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
        got = ops.qnorm_rope(q.permute(2, 0, 1).contiguous().permute(1, 2, 0), apart, table, EPS)
    assert got.is_contiguous()
    assert torch.equal(got, reference.qnorm_rope(q, positions, table, EPS))


def test_no_tokens(device):
    positions, table = angles(1, ROPE, device)
    check(torch.empty(0, 3, HEAD, device=device), positions[:0], table)


def test_what_is_not_finite_stays_in_its_head(device):
    """A head with an infinity is 0 and NaN after the norm, one with a NaN is NaN."""
    q = gaussian_rows(2, 4, HEAD, dtype=torch.bfloat16, device=device)
    q[0, 1, 3], q[1, 2, HEAD - 1] = torch.inf, torch.nan
    positions, table = angles(2, ROPE, device)
    out = torch.zeros_like(q)
    kernel.launch(q, positions, table, EPS, out, kernel.Config(block_h=2))
    want = reference.qnorm_rope(q, positions, table, EPS)
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert out[0, 1, 3].isnan()
    assert out[1, 2].isnan().all()
    assert int(out.isnan().sum()) == HEAD + 1


def test_cases_of_the_tuner(device):
    for m in (1, 5):
        c = testing.case(QnormRopeProblem(m=m, heads=4), device)
        c.run(kernel, kernel.default(c.problem))
        c.check()


def test_inputs_tell_faults_apart(device):
    q = gaussian_rows(4, 3, HEAD, dtype=torch.bfloat16, device=device)
    positions, table = angles(4, ROPE, device)
    right = reference.qnorm_rope(q, positions, table, EPS)
    for wrong in (
        reference.qnorm_rope(q, positions.roll(1), table, EPS),
        reference.qnorm_rope(q, positions, torch.cat((table[:, :32], -table[:, 32:]), dim=1), EPS),
        reference.qnorm_rope(q, positions, table, 0.0),
        reference.qnorm_rope(q.roll(1, dims=1), positions, table, EPS),
    ):
        assert (wrong != right).float().mean() > 0.02


def test_refusals(device):
    assert "fp64" in (kernel.supports(QnormRopeProblem(m=1, heads=2, x="fp64"), kernel.Config()) or "")
    assert "pairs" in (kernel.supports(QnormRopeProblem(m=1, heads=2, head_dim=32), kernel.Config()) or "")
    assert "spill" in (kernel.supports(QnormRopeProblem(m=1, heads=2), kernel.Config(block_h=16)) or "")
    q, (positions, table) = torch.zeros(2, 3, HEAD, device=device), angles(2, ROPE, device)
    with pytest.raises(ValueError, match=r"q must be \[tokens, heads, head_dim\], got \[6, 512\]"):
        ops.qnorm_rope(q.flatten(0, 1), positions, table, EPS)
    with pytest.raises(ValueError, match=r"positions must be int32 \[2\], got torch.int32 \[1\]"):
        ops.qnorm_rope(q, positions[:1], table, EPS)
    with pytest.raises(ValueError, match="an even number of up to 512 dims"):
        ops.qnorm_rope(q, positions, table[:, :63], EPS)
    with pytest.raises(ValueError, match="the dims of a head must be contiguous"):
        kernel.launch(q.transpose(1, 2).contiguous().transpose(1, 2), positions, table, EPS, q, kernel.Config())


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_a_batch_of_real_size(heads, device):
    c = testing.case(QnormRopeProblem(m=1031, heads=heads), device)
    for config in (kernel.Config(), kernel.default(c.problem), kernel.Config(block_h=8, num_warps=4)):
        c.run(kernel, config)
        c.check()


@pytest.mark.gpu
def test_a_million_positions(device):
    positions = torch.tensor([LAST, 0, LAST - 1, LAST // 2], dtype=torch.int32, device=device)
    check(gaussian_rows(4, 2, HEAD, dtype=torch.bfloat16, device=device), positions, sparse_table(ROPE, device))
