"""What linears read: quantised once, norm and SwiGLU in the same launch."""

import pytest
import torch

from fp4suite import dispatch, ops, reference
from model.inputs import FIXED_ALPHA, Gated, Input, Normed
from model.linear import Linear


def made(kind: str) -> Input:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight = torch.linspace(0.5, 1.5, 128).bfloat16()
    return {"plain": Input(x), "normed": Normed(x, weight, 0.1), "gated": Gated(x.float(), 1.0, torch.bfloat16)}[kind]


@pytest.fixture
def called(monkeypatch):
    """Names of ops of `made` inputs, in order."""
    names = []
    for name in ("quantize_nvfp4", "rmsnorm_quantize", "swiglu_quantize", "quantize_fp8"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op, **how: names.append(name) or op(*a, **how))
    return names


@pytest.mark.parametrize(
    ("kind", "op"), [("plain", "quantize_nvfp4"), ("normed", "rmsnorm_quantize"), ("gated", "swiglu_quantize")]
)
def test_is_quantised_once_in_each_layout_under_one_scale(kind, op, called) -> None:
    x = made(kind)
    linear, blocked = x.nvfp4(), x.nvfp4("blocked_128x4")
    assert x.nvfp4() is linear
    assert x.nvfp4("blocked_128x4") is blocked
    assert called == [op, op]
    assert linear.alpha is blocked.alpha
    assert torch.equal(blocked.with_sf_layout("linear").sf.float(), linear.sf.float())
    got = reference.dequant_nvfp4(linear, torch.float32)
    assert float((got - x.plain.float()).norm() / x.plain.float().norm()) < 0.15


def test_norm_and_swiglu_are_those_of_the_reference() -> None:
    x = made("plain").plain
    weight = torch.linspace(0.5, 1.5, 128).bfloat16()
    assert torch.equal(made("normed").plain, reference.rms_norm(x, weight, 0.1))
    assert torch.equal(made("gated").plain, reference.swiglu(x.float(), 1.0))


def test_linears_share_what_they_read(called) -> None:
    x = made("normed")
    weights = [Linear(32, 128, "nvfp4", act=act) for act in ("nvfp4", "nvfp4", "float")]
    for y in weights:
        weight = reference.quantize_nvfp4(torch.randn(32, 128, generator=torch.Generator().manual_seed(2)))
        y.weight = weight
    outs = [y(x) for y in weights]
    assert called == ["rmsnorm_quantize"]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(outs[2], ops.gemm_nvfp4(x.plain, weights[2].weight, out_dtype=torch.bfloat16))


def test_a_batch_invariant_scale_is_no_maximum() -> None:
    with dispatch.batch_invariant():
        assert float(made("normed").nvfp4().alpha) == FIXED_ALPHA
