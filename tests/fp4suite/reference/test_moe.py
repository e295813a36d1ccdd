"""Routed experts slot by slot in FP64, and the permutation they run in."""

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from fp4suite.formats import NVFP4Tensor
from fp4suite.reference import combine, moe, moe_nvfp4, permute, swiglu
from fp4suite.reference.quant import dequant_nvfp4, quantize_nvfp4

EXPERTS, D, WIDTH, TOPK = 6, 64, 32, 3


def weights(seed: int = 0, same_alpha: bool = False) -> tuple[NVFP4Tensor, NVFP4Tensor, Tensor, Tensor]:
    """NVFP4 experts, up 3 times gate in size so that their alphas differ, and what they decode to in FP64."""
    g = torch.Generator().manual_seed(seed)
    w13 = torch.randn(EXPERTS, 2 * WIDTH, D, generator=g) * torch.tensor([1.0] * WIDTH + [3.0] * WIDTH)[:, None] * 0.2
    w2 = torch.randn(EXPERTS, D, WIDTH, generator=g)
    segments = None if same_alpha else (WIDTH, WIDTH)
    a, b = quantize_nvfp4(w13, segments=segments), quantize_nvfp4(w2)
    return a, b, dequant_nvfp4(a, torch.float64, segments=segments), dequant_nvfp4(b, torch.float64)


def expected(x: Tensor, w13: Tensor, w2: Tensor, ids: Tensor, share: Tensor, limit: float) -> Tensor:
    out = torch.zeros(len(x), w2.shape[1], dtype=torch.float64)
    for t in range(len(x)):
        for e, w in zip(ids[t].tolist(), share[t].tolist(), strict=True):
            if e >= 0:
                g, u = (w13[e] @ x[t].double()).chunk(2)
                g, u = g.clamp(max=limit), u.clamp(-limit, limit)
                out[t] += w * (w2[e] @ (g / (1 + torch.exp(-g)) * u))
    return out


def routing(tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids without repeats in a row, expert 4 never chosen, some -1."""
    g, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    ids = [dice.sample([0, 1, 2, 3, 5, -1], TOPK) for _ in range(tokens)]
    return torch.tensor(ids).int().view(tokens, TOPK), torch.rand(tokens, TOPK, generator=g)


@pytest.mark.parametrize("same_alpha", [True, False])
@pytest.mark.parametrize("limit", [10.0, 0.7])
def test_experts(limit: float, same_alpha: bool) -> None:
    a, b, w13, w2 = weights(same_alpha=same_alpha)
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(2))
    ids, share = routing(20)
    want = expected(x, w13, w2, ids, share, limit)
    got = moe_nvfp4(x, a, b, ids, share, limit=limit)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    plain = moe(x, w13.float(), w2.float(), ids, share, limit=limit)
    torch.testing.assert_close(plain.double(), want, rtol=2e-5, atol=2e-5)
    # the limit binds: without it the outputs are far apart
    if limit < 1:
        assert float((expected(x, w13, w2, ids, share, 1e9) - want).norm() / want.norm()) > 0.5


def test_bf16_rounds_where_said() -> None:
    a, b, w13, w2 = weights()
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(3)).bfloat16()
    ids, share = routing(9)
    got = moe_nvfp4(x, a, b, ids, share)
    assert got.dtype == torch.bfloat16
    want = expected(x, w13, w2, ids, share, 10.0)
    assert float((got.double() - want).norm() / want.norm()) < 2**-8


def test_w4a4() -> None:
    """Quantised input and activation: 0.1 or so off the exact product; any layout of the input's scales."""
    a, b, w13, w2 = weights()
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(4))
    ids, share = routing(30)
    q = quantize_nvfp4(x)
    got = moe_nvfp4(q, a, b, ids, share)
    assert got.dtype == torch.bfloat16
    want = expected(dequant_nvfp4(q, torch.float64), w13, w2, ids, share, 10.0)
    assert 0.05 < float((got.double() - want).norm() / want.norm()) < 0.2
    assert torch.equal(moe_nvfp4(q.with_sf_layout("blocked_128x4"), a, b, ids, share), got)


def test_no_tokens_and_no_experts() -> None:
    a, b, _, _ = weights()
    assert moe_nvfp4(torch.zeros(0, D), a, b, torch.zeros(0, TOPK).int(), torch.zeros(0, TOPK)).shape == (0, D)
    nobody = torch.full((4, TOPK), -1).int()
    assert (moe_nvfp4(torch.ones(4, D), a, b, nobody, torch.ones(4, TOPK)) == 0).all()


def test_permutation() -> None:
    ids, _ = routing(40, seed=7)
    order, offsets = permute(ids, EXPERTS)
    flat = ids.flatten().tolist()
    assert sorted(order.tolist()) == list(range(120))
    count = Counter(flat)
    assert offsets.tolist() == [sum(count[e] for e in range(k)) for k in range(EXPERTS + 1)]
    for e in range(EXPERTS):
        slots = order[offsets[e] : offsets[e + 1]].tolist()
        assert slots == [i for i, x in enumerate(flat) if x == e]  # stable
    assert all(flat[i] == -1 for i in order[offsets[-1] :].tolist())
    assert order.dtype == offsets.dtype == torch.int32


def test_combine() -> None:
    """Each slot once, by its own weight; rows of absent experts may hold anything; the shared output has weight one."""
    ids, share = routing(11, seed=8)
    order, offsets = permute(ids, EXPERTS)
    g = torch.Generator().manual_seed(9)
    by_slot, shared = torch.randn(33, 16, generator=g), torch.randn(11, 16, generator=g)
    y = by_slot[order.long()]
    y[offsets[-1] :] = float("nan")
    present = (ids >= 0)[:, :, None]
    want = (by_slot.view(11, 3, 16).double() * share.double()[:, :, None] * present).sum(1)
    torch.testing.assert_close(combine(y, order, ids, share).double(), want, rtol=1e-5, atol=1e-6)
    got = combine(y, order, ids, share, shared=shared)
    torch.testing.assert_close(got.double(), want + shared.double(), rtol=1e-5, atol=1e-6)
    assert combine(y.bfloat16(), order, ids, share).dtype == torch.bfloat16


def test_swiglu_clamps_before_silu() -> None:
    """Gate from above only, up from both sides."""
    gate = torch.tensor([[20.0, -20.0, 5.0, -3.0, 1.0]])
    up = torch.tensor([[1.0, 3.0, -50.0, 50.0, 2.0]])
    got = swiglu(torch.cat((gate, up), dim=1).double(), 10.0, torch.float64)
    g, u = torch.tensor([[10.0, -20.0, 5.0, -3.0, 1.0]]).double(), torch.tensor([[1.0, 3.0, -10.0, 10.0, 2.0]]).double()
    torch.testing.assert_close(got, g / (1 + torch.exp(-g)) * u, rtol=1e-14, atol=0)
    assert swiglu(torch.tensor([[-1e30, 1.0]]), 10.0).item() == 0


def test_swiglu_is_rounded_once() -> None:
    """FP32 within its error of FP64, other types from it; the same places of NaN in both."""
    x = 4 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    x[0, 3], x[1, 40], x[2, 5], x[3, 6] = torch.nan, torch.nan, -torch.inf, torch.inf
    exact, single = swiglu(x.double(), 5.0, torch.float64), swiglu(x, 5.0, torch.float32)
    torch.testing.assert_close(single.double(), exact, rtol=2e-6, atol=0, equal_nan=True)
    assert single.isnan().nonzero().tolist() == [[0, 3], [1, 8], [2, 5]]
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(swiglu(x, 5.0, dtype).nan_to_num(), single.to(dtype).nan_to_num())
    assert swiglu(x, 5.0).dtype == torch.bfloat16
