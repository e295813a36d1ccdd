"""rope_inverse gives the reference's bits: every config and type, heads and tokens of any stride, far positions."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target
from fp4suite.problem import RopeInverseProblem
from kernels_triton import rope_inverse as kernel

from .checks import configs, every_bf16
from .rope_inputs import angles, far_table, gaussian_rows

HEAD, ROPE = 512, 64


def check(o: Tensor, positions: Tensor, table: Tensor, config: object = None) -> None:
    """Bit for bit, against the reference there and on the CPU."""
    out = torch.full(o.shape, torch.nan, dtype=o.dtype, device=o.device)
    kernel.launch(o, positions, table, out, config or kernel.Config())
    here = reference.rope_inverse(o, positions, table)
    there = reference.rope_inverse(o.cpu(), positions.cpu(), table.cpu())
    for want in (here, there):
        torch.testing.assert_close(out.cpu(), want.cpu(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", configs(kernel, RopeInverseProblem(m=1, heads=3)), ids=str)
def test_every_config(config, device):
    """Ragged in heads."""
    o = gaussian_rows(3, 5, HEAD, dtype=torch.bfloat16, device=device)
    check(o, *angles(3, ROPE, device), config)


@pytest.mark.parametrize(("heads", "head", "rope"), [(128, 512, 64), (4, 80, 16), (3, 96, 32), (2, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_types_and_sizes(dtype, heads, head, rope, device):
    o = gaussian_rows(2, heads, head, dtype=dtype, device=device)
    check(o, *angles(2, rope, device), kernel.Config(block_h=16, num_warps=8))


def test_every_bf16(device):
    """As dims that are kept and as dims that turn; infinities and NaN too."""
    o = every_bf16(device).view(64, 2, HEAD)
    check(o, *angles(64, ROPE, device))
    check(o.roll(ROPE, dims=-1).roll(1, dims=0).contiguous(), *angles(64, ROPE, device))


def test_it_undoes_the_rotation_of_queries(device):
    """rotate, then this: what there was, up to rounding in FP32."""
    x = gaussian_rows(4, 3, HEAD, dtype=torch.float32, device=device)
    positions, table = angles(4, ROPE, device)
    out = torch.empty_like(x)
    kernel.launch(reference.rope.rotate(x, positions, table), positions, table, out, kernel.Config())
    torch.testing.assert_close(out, x, rtol=0, atol=float(x.abs().max()) * 2**-21)


def test_far_positions(device):
    positions, table = far_table(ROPE, device)
    check(gaussian_rows(6, 2, HEAD, dtype=torch.bfloat16, device=device), positions, table)


def test_strides(device):
    wide = gaussian_rows(8, 6, 2 * HEAD, dtype=torch.bfloat16, device=device)
    at = angles(4, ROPE, device)
    for o in (wide[::2, 1::2, :HEAD], wide[:6, :4].transpose(0, 1)[..., HEAD:], wide[2:6, :, 5 : HEAD + 5]):
        check(o, *at)


def test_operator_takes_any_view(device):
    o = gaussian_rows(4, 3, HEAD, dtype=torch.bfloat16, device=device)
    positions, table = angles(4, ROPE, device)
    apart = torch.stack((positions, positions + 1), dim=1)[:, 0]
    with on_target("sm_90a"):
        got = ops.rope_inverse(o.permute(2, 0, 1).contiguous().permute(1, 2, 0), apart, table)
    assert got.is_contiguous()
    assert torch.equal(got, reference.rope_inverse(o, positions, table))


def test_no_tokens(device):
    positions, table = angles(1, ROPE, device)
    check(torch.empty(0, 3, HEAD, device=device), positions[:0], table)


def test_cases_of_the_tuner(device):
    for m in (1, 5):
        c = testing.case(RopeInverseProblem(m=m, heads=4), device)
        c.run(kernel, kernel.Config())
        c.check()


def test_refusals(device):
    assert "fp64" in (kernel.supports(RopeInverseProblem(m=1, heads=2, x="fp64"), kernel.Config()) or "")
    assert "spill" in (kernel.supports(RopeInverseProblem(m=1, heads=2), kernel.Config(block_h=16, num_warps=1)) or "")
    o, (positions, table) = torch.zeros(2, 3, HEAD, device=device), angles(2, ROPE, device)
    with pytest.raises(ValueError, match=r"o must be \[tokens, heads, head_dim\], got \[6, 512\]"):
        ops.rope_inverse(o.flatten(0, 1), positions, table)
    with pytest.raises(ValueError, match=r"positions must be int32 \[2\], got torch.int64"):
        ops.rope_inverse(o, positions.long(), table)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
def test_a_batch_of_real_size(heads, device):
    c = testing.case(RopeInverseProblem(m=1031, heads=heads), device)
    for config in (kernel.Config(), kernel.Config(block_h=8, num_warps=4)):
        c.run(kernel, config)
        c.check()
