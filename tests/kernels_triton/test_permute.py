"""permute gives the reference's order and offsets: by sorting and by comparing, ragged, empty, slots of no expert."""

import pytest
import torch
from torch import Tensor

from fp4suite import ops, override, reference, registry, testing
from fp4suite.dispatch import Target, choose_for
from fp4suite.problem import PermuteProblem
from kernels_triton import permute, permute_small

from .checks import configs

BOTH = [permute, permute_small]
SMALL = permute.Config(block_s=64, num_warps=2)
LARGE = permute_small.Config(block_p=64, num_warps=8)


def check(kernel, ids: Tensor, experts: int, config=None) -> tuple[Tensor, Tensor]:
    out = ids.new_full((ids.numel(),), -7), ids.new_full((experts + 1,), -7)
    kernel.launch(ids, experts, out, config or kernel.Config())
    for got, want in zip(out, reference.permute(ids.cpu(), experts), strict=True):
        assert torch.equal(got.cpu(), want)
    return out


def draw(m: int, topk: int, experts: int, device: torch.device, seed: int = 0) -> Tensor:
    """Some experts often, some never, some slots of none."""
    g = torch.Generator().manual_seed(seed)
    ids = (experts * torch.rand(m, topk, generator=g) ** 3).int()
    ids[torch.rand(m, topk, generator=g) < 0.1] = -1
    return ids.to(device)


@pytest.mark.parametrize(
    ("kernel", "config"),
    [(k, c) for k in BOTH for c in configs(k, PermuteProblem(m=300, topk=6, experts=384))],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_every_config(kernel, config, device):
    """Several blocks and chunks, the last of each ragged."""
    tokens, experts = (211, 384) if kernel is permute else (87, 20)
    check(kernel, draw(tokens, 6, experts, device), experts, config)


@pytest.mark.parametrize("kernel", BOTH, ids=lambda k: k.__name__)
@pytest.mark.parametrize(
    ("m", "topk", "experts"),
    [
        (0, 6, 16),
        (1, 1, 1),
        (1, 6, 384),
        (2, 1, 2),
        (64, 6, 255),
        (64, 6, 256),
        (171, 3, 8),
        (512, 1, 1),
        (513, 2, 300),
    ],
)
def test_sizes(kernel, m, topk, experts, device):
    check(kernel, draw(m, topk, experts, device), experts, SMALL if kernel is permute else LARGE)


@pytest.mark.parametrize("kernel", BOTH, ids=lambda k: k.__name__)
def test_one_expert_takes_all_and_the_order_is_stable(kernel, device):
    for expert in (0, 5, 7, -1):
        ids = torch.full((200, 3), expert, dtype=torch.int32, device=device)
        order, offsets = check(kernel, ids, 8, SMALL if kernel is permute else LARGE)
        assert torch.equal(order.cpu(), torch.arange(600, dtype=torch.int32))
        assert offsets.tolist() == [600 * (e > expert) * (expert >= 0) for e in range(9)]


def test_more_blocks_than_are_scanned_at_a_time(device):
    """Counts of the first SCANNED blocks carry over to those of later ones; the last experts begin in the last."""
    slots = 64 * (permute.SCANNED + 3) - 5
    ids = (torch.arange(slots) * 9 // slots).int().view(-1, 1).to(device)
    ids[::7] = 3
    check(permute, ids, 9, SMALL)


@pytest.mark.parametrize("kernel", BOTH, ids=lambda k: k.__name__)
def test_experts_fall_from_slot_to_slot(kernel, device):
    ids = (1023 - torch.arange(1024)).int().view(512, 2).to(device) // 4
    check(kernel, ids, 256, SMALL if kernel is permute else LARGE)


@pytest.mark.parametrize("kernel", BOTH, ids=lambda k: k.__name__)
def test_experts_that_do_not_exist_count_as_none(kernel, device):
    """The CPU's reference refuses them; a kernel must not write outside."""
    ids = torch.tensor([[3, 8], [2**31 - 1, 0], [-(2**31), 7]], dtype=torch.int32, device=device)
    out = ids.new_full((6,), -7), ids.new_full((9,), -7)
    kernel.launch(ids, 8, out, kernel.Config())
    assert out[0].tolist() == [3, 0, 5, 1, 2, 4]
    assert out[1].tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 3]


@pytest.mark.parametrize("kernel", BOTH, ids=lambda k: k.__name__)
def test_cases_of_the_tuner(kernel, device):
    c = testing.case(PermuteProblem(m=130, topk=6, experts=64), device)
    c.run(kernel, kernel.Config())
    c.check()


def test_few_slots_take_one_launch():
    target = Target("sm_90a", "no such device")
    chosen = {m: choose_for("permute", PermuteProblem(m=m, topk=6, experts=384), target).kernel for m in (1, 64, 4096)}
    assert chosen == {1: "triton_permute_small", 64: "triton_permute_small", 4096: "triton_permute"}


@pytest.mark.parametrize(
    ("kernel", "problem", "config", "message"),
    [
        (permute_small, PermuteProblem(m=4097, topk=1, experts=4), None, "4097 slots, more than 4096"),
        (permute_small, PermuteProblem(m=1, topk=1, experts=4097), None, "experts=4097 is over 4096"),
        (permute, PermuteProblem(m=1, topk=1, experts=2048), None, "experts=2048 is over 2047"),
        (permute, PermuteProblem(m=2**30, topk=2, experts=4), None, "do not fit into int32"),
        (permute, PermuteProblem(m=1, topk=1, experts=4), permute.Config(block_s=512), "4 slots a thread, not 1 or 2"),
    ],
)
def test_refusals(kernel, problem, config, message):
    why = kernel.supports(problem, config or kernel.Config())
    assert why is not None
    assert message in why


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [256, 384])
@pytest.mark.parametrize("m", [1, 64, 256, 1024, 4096, 16384])
def test_real_sizes(m, experts, device):
    p = PermuteProblem(m=m, topk=6, experts=experts)
    for row in registry.kernels("permute"):
        module = registry.load(row.name)
        if module.supports(p, module.Config()) is None:
            c = testing.case(p, device)
            c.run(module, module.Config())
            c.check()


@pytest.mark.gpu
@pytest.mark.parametrize("m", [64, 4096])
def test_strided_choices_through_the_op(m, device):
    ids = draw(m, 12, 384, device)[:, ::2]
    for name in ("triton_permute",) if m > 1000 else ("triton_permute", "triton_permute_small"):
        with override(op="permute", kernel=name):
            for got, want in zip(ops.permute(ids, 384), reference.permute(ids.cpu(), 384), strict=True):
                assert torch.equal(got.cpu(), want)
