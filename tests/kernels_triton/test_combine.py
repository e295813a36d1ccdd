"""combine gives the reference's bytes: in one launch and in two, slots of no expert, odd sizes and strides."""

import pytest
import torch
from torch import Tensor

from fp4suite import reference, testing
from fp4suite.problem import CombineProblem
from kernels_triton import combine as kernel

from .checks import configs

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SEARCH = kernel.Config(block_k=256, num_warps=2, search=True)
TURN = kernel.Config(block_k=256, num_warps=2)


def inputs(m: int, topk: int, k: int, dtype: torch.dtype, device: torch.device, experts: int = 8) -> dict[str, Tensor]:
    """Rows of slots of no expert, and their weights, are NaN: nothing of them may reach the sum."""
    g = torch.Generator().manual_seed(m)
    ids = torch.randint(-1, experts, (m, topk), generator=g).int()
    order, _ = reference.permute(ids, experts)
    y = testing.random_activations((m * topk, k), g, dtype)
    y[ids.view(-1)[order.long()] < 0] = torch.nan
    weights = torch.where(ids < 0, torch.nan, torch.rand(m, topk, generator=g))
    shared = testing.random_activations((m, k), g, dtype)
    made = {"y": y, "order": order, "topk_ids": ids, "topk_weights": weights, "shared": shared}
    return {name: x.to(device) for name, x in made.items()}


def check(x: dict[str, Tensor], config: kernel.Config, with_shared: bool = True) -> None:
    y, shared = x["y"], x["shared"] if with_shared else None
    operands = y, x["order"], x["topk_ids"], x["topk_weights"]
    out = torch.full((len(x["topk_ids"]), y.shape[1]), torch.nan, dtype=y.dtype, device=y.device)
    kernel.launch(*operands, shared, out, config)
    there = [t.cpu() for t in operands]
    for want in (
        reference.combine(*operands, shared=shared),
        reference.combine(*there, shared=shared.cpu() if shared is not None else None),
    ):
        testing.assert_same_bytes(out.cpu(), want.cpu(), "out")


@pytest.mark.parametrize("config", configs(kernel, CombineProblem(m=1, topk=6, k=64), most=200), ids=str)
def test_every_config(config, device):
    """Ragged in tokens and columns."""
    check(inputs(5, 6, 300, torch.bfloat16, device), config)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_shared", [True, False])
def test_every_type(with_shared, dtype, device):
    for config in (TURN, SEARCH):
        check(inputs(19, 6, 200, dtype, device), config, with_shared)


@pytest.mark.parametrize("topk", [1, 2, 3, 8])
def test_choices(topk, device):
    for config in (TURN, SEARCH):
        check(inputs(7, topk, 64, torch.float32, device), config)


def test_as_many_slots_as_are_searched_and_more_than_are_turned_at_a_time(device):
    check(inputs(170, 6, 8, torch.float32, device), kernel.Config(block_m=4, block_k=256, num_warps=4, search=True))
    check(inputs(211, 6, 8, torch.float32, device), kernel.Config(block_m=4, block_k=256, num_warps=4))


def test_the_order_of_the_sum(device):
    """1 and -1 beside what their sum loses: any other order of additions gives another number."""
    y = torch.tensor([[2.0**24], [1.0], [-(2.0**24)], [1.0]], device=device)
    order = torch.tensor([2, 0, 3, 1], dtype=torch.int32, device=device)  # places of slots: 1, 3, 0, 2
    ids = torch.zeros(1, 4, dtype=torch.int32, device=device)
    weights = torch.tensor([[1.0, 1.0, 1.0, 1.0]], device=device)
    shared = torch.tensor([[2.0**24]], device=device)
    # (1 + 1) and then the large ones: whatever else is added to 2^24 first loses a 1
    for config in (TURN, SEARCH):
        out = torch.full((1, 1), torch.nan, device=device)
        kernel.launch(y, order, ids, weights, shared, out, config)
        assert out.item() == 2.0**24 + 2.0
        kernel.launch(y, order.flip(0), ids, weights, None, out, config)  # 2^24's partner comes late: 1s are lost
        assert out.item() == reference.combine(y.cpu(), order.flip(0).cpu(), ids.cpu(), weights.cpu()).item()


def test_products_are_rounded_before_they_are_added(device):
    """A fused multiply-add would keep the low bits of 1 - (1 - 2^-13)(1 + 2^-13)."""
    y = torch.tensor([[1.0], [1 + 2.0**-13]], device=device)
    order, ids = torch.tensor([0, 1], dtype=torch.int32, device=device), torch.zeros(1, 2, dtype=torch.int32).to(device)
    weights = torch.tensor([[1.0, -(1 - 2.0**-13)]], device=device)
    out = torch.full((1, 1), torch.nan, device=device)
    kernel.launch(y, order, ids, weights, None, out, TURN)
    assert out.item() == 0.0


def test_what_is_not_finite(device):
    x = inputs(6, 4, 64, torch.bfloat16, device)
    x["y"][3, 5], x["y"][7, 9], x["shared"][2, 1] = float("inf"), float("nan"), float("-inf")
    y, shared = x["y"], x["shared"]
    for config in (TURN, SEARCH):
        out = torch.zeros_like(shared)
        kernel.launch(y, x["order"], x["topk_ids"], x["topk_weights"], shared, out, config)
        want = reference.combine(y, x["order"], x["topk_ids"], x["topk_weights"], shared=shared)
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


def test_rows_of_any_stride(device):
    x = inputs(9, 3, 64, torch.bfloat16, device)
    wide = torch.cat((x["y"], x["y"]), dim=1)[:, 16:80]
    spaced = torch.stack((x["shared"], x["shared"]), dim=1)[:, 1]
    for config in (TURN, SEARCH):
        check(x | {"y": wide, "shared": spaced}, config)


def test_no_tokens(device):
    for config in (TURN, SEARCH):
        check(inputs(0, 6, 64, torch.bfloat16, device), config)


def test_cases_of_the_tuner(device):
    for p in (CombineProblem(m=11, topk=6, k=256), CombineProblem(m=26, topk=2, k=64, shared=0, x="fp32")):
        for config in (TURN, SEARCH):
            c = testing.case(p, device)
            c.run(kernel, config)
            c.check()


def test_few_slots_are_searched():
    assert [kernel.default(CombineProblem(m=m, topk=6, k=7168)).search for m in (1, 64, 129, 4096)] == [
        True,
        True,
        False,
        False,
    ]
    why = kernel.supports(CombineProblem(m=4096, topk=6, k=7168), SEARCH)
    assert why == "search=True is for 1024 slots at most, got 24576"
    wide = kernel.Config(block_m=4, block_k=256, num_warps=2, search=True)
    assert "64 slots a thread" in (kernel.supports(CombineProblem(m=128, topk=6, k=7168), wide) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 64, 1024, 4096, 16384])
def test_real_sizes(m, device):
    for k in (4096, 7168):
        p = CombineProblem(m=m, topk=6, k=k)
        c = testing.case(p, device)
        c.run(kernel, kernel.default(p))
        c.check()
