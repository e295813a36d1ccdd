"""rope_inverse_quantize gives the reference's bytes: every config, rule, layout, type and split into groups."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RULES, RopeInverseQuantizeProblem
from kernels_triton import rope_inverse_quantize as kernel

from .checks import RULES_LAYOUTS_TYPES, assert_same, configs
from .rope_inputs import angles, far_table, gaussian_rows

HEAD, ROPE = 512, 64
TALL = kernel.Config(block_m=16, block_k=512, num_warps=8)


def check(
    o: Tensor,
    positions: Tensor,
    table: Tensor,
    groups: int,
    rule: str = "absmax",
    sf_layout: str = "linear",
    config: object = None,
) -> None:
    """The same codes, scales and padding, as the reference has there and on the CPU."""
    m, heads, head = o.shape
    alpha = torch.tensor(0.003, device=o.device)
    out = NVFP4Tensor.empty((groups, m, heads // groups * head), alpha, sf_layout)  # type: ignore[arg-type]
    out.data.fill_(0xFF)
    out.sf.view(torch.uint8).fill_(0xFF)
    kernel.launch(o, positions, table, groups, alpha, out, rule, config or kernel.Config())  # type: ignore[arg-type]
    keys = {"groups": groups, "rule": rule, "sf_layout": sf_layout}
    for device in {o.device, torch.device("cpu")}:
        moved = (x.to(device) for x in (o, positions, table))
        assert_same(out, reference.rope_inverse_quantize(*moved, alpha=alpha.to(device), **keys))  # type: ignore[arg-type]


@pytest.mark.parametrize("config", configs(kernel, RopeInverseQuantizeProblem(m=1, heads=6, groups=2)), ids=str)
def test_every_config(config, device):
    """Ragged in tokens and in columns: three heads a group."""
    o = gaussian_rows(5, 6, HEAD, dtype=torch.bfloat16, device=device)
    check(o, *angles(5, ROPE, device), 2, config=config)


@pytest.mark.parametrize(("rule", "sf_layout", "dtype"), RULES_LAYOUTS_TYPES, ids=str)
def test_every_rule_layout_and_type(rule, sf_layout, dtype, device):
    o = gaussian_rows(6, 6, 32, dtype=dtype, device=device)
    check(o, *angles(6, 16, device), 2, rule, sf_layout, TALL)


def test_more_tokens_than_a_tile_of_scales(device):
    """Groups lie apart by whole padded tiles."""
    o = gaussian_rows(131, 3, 16, dtype=torch.bfloat16, device=device)
    check(o, *angles(131, 8, device), 3, "absmax", "blocked_128x4", TALL)


@pytest.mark.parametrize(("heads", "head", "rope", "groups"), [(4, 80, 16, 2), (6, 96, 32, 1), (16, 512, 64, 16)])
def test_other_sizes(heads, head, rope, groups, device):
    """Heads that tiles of columns cut in two."""
    o = gaussian_rows(3, heads, head, dtype=torch.bfloat16, device=device)
    check(o, *angles(3, rope, device), groups)


def test_far_positions(device):
    positions, table = far_table(ROPE, device)
    check(gaussian_rows(6, 2, HEAD, dtype=torch.bfloat16, device=device), positions, table, 2)


def test_hard_rows(device, hard_rows):
    """Blocks of zeros, ties, subnormal numbers, infinities and NaN."""
    o = hard_rows(12, HEAD, torch.bfloat16, device).view(3, 4, HEAD)
    o[0, 1, 3], o[1, 2, 500], o[2, 3, 40] = torch.inf, -torch.inf, torch.nan
    for rule in RULES:
        check(o, *angles(3, ROPE, device), 2, rule)


def test_strides(device):
    wide = gaussian_rows(8, 6, 2 * HEAD, dtype=torch.bfloat16, device=device)
    at = angles(4, ROPE, device)
    for o in (wide[::2, :4, :HEAD], wide[:6, :4].transpose(0, 1)[..., HEAD:], wide[2:6, :, 5 : HEAD + 5]):
        check(o, *at, 2)


@pytest.mark.parametrize("m", [0, 1, 7])
def test_global_scale(m, device):
    """Of what is quantised: turned, and rounded to the input's type."""
    o = gaussian_rows(m, 3, HEAD, dtype=torch.bfloat16, device=device) if m else torch.empty(0, 3, HEAD, device=device)
    positions, table = angles(max(m, 1), ROPE, device)
    for value in (None, -5000.0, float("nan")):
        if value is not None and m:
            o[m // 2, 2, HEAD - 1] = value
        alpha = torch.full((), 123.0, device=device)
        kernel.global_scale(o, positions[:m], table, alpha, kernel.Config())
        want = reference.rope_inverse_quantize(o, positions[:m], table, groups=1).alpha
        torch.testing.assert_close(alpha, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("given", [True, False])
def test_operator(given, device):
    """Of any view, with the alpha that is given or found."""
    o = gaussian_rows(4, 6, HEAD, dtype=torch.bfloat16, device=device)
    positions, table = angles(4, ROPE, device)
    alpha = {"alpha": torch.tensor(0.02, device=device)} if given else {}
    with on_target("sm_90a"):
        view = o.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        apart = torch.stack((positions, positions + 1), dim=1)[:, 0]
        got = ops.rope_inverse_quantize(view, apart, table, groups=3, **alpha)  # type: ignore[arg-type]
    want = reference.rope_inverse_quantize(o, positions, table, groups=3, **alpha)  # type: ignore[arg-type]
    assert torch.equal(got.alpha, want.alpha)
    assert_same(got, want)


def test_no_tokens(device):
    positions, table = angles(1, ROPE, device)
    check(torch.empty(0, 4, HEAD, device=device), positions[:0], table, 2)


def test_cases_of_the_tuner(device):
    for m, layout in ((1, "linear"), (5, "blocked_128x4")):
        dims = {"heads": 4, "head_dim": 96, "groups": 2, "sf_layout": layout}
        c = testing.case(RopeInverseQuantizeProblem(m=m, **dims), device)  # type: ignore[arg-type]
        c.run(kernel, TALL)
        c.check()


def test_refusals(device):
    def why(**dims: object) -> str:
        problem = RopeInverseQuantizeProblem(**({"m": 1, "heads": 4, "groups": 2} | dims))  # type: ignore[arg-type]
        return kernel.supports(problem, kernel.Config(block_m=4, block_k=2048, num_warps=1)) or ""

    assert "do not make 3 groups" in why(groups=3)
    assert "spill" in why()
    assert "fp64" in why(x="fp64")
    o, (positions, table) = torch.zeros(2, 4, HEAD, device=device), angles(2, ROPE, device)
    with pytest.raises(ValueError, match="heads=4 of 512 dims do not make 3 groups in blocks of 16"):
        ops.rope_inverse_quantize(o, positions, table, groups=3)
    with pytest.raises(ValueError, match=r"alpha must be one number \[\], got \[2\]"):
        ops.rope_inverse_quantize(o, positions, table, groups=2, alpha=torch.ones(2, device=device))
    with pytest.raises(TypeError, match="o must be one of"):
        ops.rope_inverse_quantize(o.double(), positions, table, groups=2)


@pytest.mark.gpu
@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
def test_a_batch_of_real_size(sf_layout, device):
    c = testing.case(RopeInverseQuantizeProblem(m=1031, heads=128, groups=16, sf_layout=sf_layout), device)
    for config in (kernel.Config(), TALL):
        c.run(kernel, config)
        c.check()
