"""rope_inverse_ gives the reference's bits and touches nothing else: every config and type, strides, far positions."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target
from fp4suite.problem import RopeInverseInPlaceProblem, RopeInverseProblem
from kernels_triton import rope_inverse, rope_inverse_in_place as kernel

from .checks import configs, every_bf16
from .rope_inputs import angles, far_table, gaussian_rows

HEAD, ROPE = 512, 64


def check(o: Tensor, positions: Tensor, table: Tensor, config: object = None) -> None:
    """Bit for bit, against the reference, which makes a copy."""
    want = reference.rope_inverse(o.cpu(), positions.cpu(), table.cpu())
    kernel.launch(positions, table, o, config or kernel.Config())
    torch.testing.assert_close(o.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("config", configs(kernel, RopeInverseInPlaceProblem(m=1, heads=5)), ids=str)
def test_every_config(config, device):
    """Ragged in heads."""
    o = gaussian_rows(3, 5, HEAD, dtype=torch.bfloat16, device=device)
    check(o, *angles(3, ROPE, device), config)


@pytest.mark.parametrize(("heads", "head", "rope"), [(128, 512, 64), (4, 80, 16), (3, 96, 24), (2, 64, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_types_and_sizes(dtype, heads, head, rope, device):
    o = gaussian_rows(2, heads, head, dtype=dtype, device=device)
    check(o, *angles(2, rope, device))


def test_every_bf16(device):
    """As dims that are kept and as dims that turn; infinities and NaN too."""
    o = every_bf16(device).view(64, 2, HEAD)
    check(o.clone(), *angles(64, ROPE, device))
    check(o.roll(ROPE, dims=-1).roll(1, dims=0).contiguous(), *angles(64, ROPE, device))


def test_far_positions(device):
    positions, table = far_table(ROPE, device)
    check(gaussian_rows(6, 2, HEAD, dtype=torch.bfloat16, device=device), positions, table)


@pytest.mark.parametrize("view", [lambda x: x[::2, 1::2, :HEAD], lambda x: x[:6, :4].transpose(0, 1)[..., HEAD:]])
def test_strides(view, device):
    """What lies between the heads of a view stays as it was."""
    wide = gaussian_rows(8, 6, 2 * HEAD, dtype=torch.bfloat16, device=device)
    before = wide.clone()
    o = view(wide)
    want = view(before.clone())
    turned = reference.rope_inverse(want, *angles(4, ROPE, device))
    after = before.clone()
    view(after).copy_(turned)
    kernel.launch(*angles(4, ROPE, device), o, kernel.Config())
    assert torch.equal(wide, after)


def test_operator(device):
    """Positions of any stride; the tensor that was given comes back."""
    o = gaussian_rows(4, 3, HEAD, dtype=torch.bfloat16, device=device)
    positions, table = angles(4, ROPE, device)
    want = reference.rope_inverse(o, positions, table)
    with on_target("sm_90a"):
        got = ops.rope_inverse_(o, torch.stack((positions, positions + 1), dim=1)[:, 0], table)
    assert got is o
    assert torch.equal(o, want)


def test_no_tokens(device):
    positions, table = angles(1, ROPE, device)
    check(torch.empty(0, 3, HEAD, device=device), positions[:0], table)


def test_a_case_is_whole_again_before_each_run(device):
    c = testing.case(RopeInverseInPlaceProblem(m=5, heads=4), device)
    for _ in range(2):
        c.run(kernel, kernel.Config())
        c.check()
    c.launch(kernel, kernel.Config())
    with pytest.raises(AssertionError):
        c.check()


def test_refusals(device):
    problem = RopeInverseInPlaceProblem(m=1, heads=2)
    assert "fp64" in (kernel.supports(RopeInverseInPlaceProblem(m=1, heads=2, x="fp64"), kernel.Config()) or "")
    assert "spill" in (kernel.supports(problem, kernel.Config(block_h=64, num_warps=1)) or "")
    positions, table = angles(2, ROPE, device)
    rows = torch.zeros(2, HEAD, 3, device=device)
    for o in (rows.transpose(1, 2), rows[:, :, :1].transpose(1, 2).expand(2, 3, HEAD)):
        with pytest.raises(ValueError, match="o is changed in place: its dims must be adjacent, its heads apart"):
            ops.rope_inverse_(o, positions, table)


@pytest.mark.gpu
def test_a_batch_of_real_size(device):
    """The bits of the kernel that copies."""
    c = testing.case(RopeInverseInPlaceProblem(m=1031, heads=128), device)
    o = c.out.clone()
    for config in (kernel.Config(), kernel.default(RopeInverseInPlaceProblem(m=1031, heads=128))):
        c.run(kernel, config)
        c.check()
    out = torch.empty_like(o)
    rope_inverse.launch(o, *c.operands, out, rope_inverse.default(RopeInverseProblem(m=1031, heads=128)))
    assert torch.equal(c.out, out)
