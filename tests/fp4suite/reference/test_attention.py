"""Sparse attention against loops in FP64: sinks, absent and repeated rows, several caches, extreme logits."""

import math

import pytest
import torch
from torch import Tensor

from fp4suite.formats import PagedCache, kv_layout
from fp4suite.reference import (
    read_rows,
    rope_frequencies,
    rope_inverse,
    rope_inverse_quantize,
    rope_table,
    sparse_attention,
    write_rows,
)
from fp4suite.reference.quant import dequant_nvfp4, quantize_nvfp4

D, ROPE = 80, 16


def cache(format: str, rows: Tensor, page: int = 4) -> PagedCache:
    pages = -(-len(rows) // page)
    data = torch.zeros(pages, kv_layout(format, page, D, ROPE).page_bytes, dtype=torch.uint8)
    out = PagedCache(data, format, page, D, ROPE)
    write_rows(out, torch.arange(len(rows)).int(), rows)
    return out


def expected(q: Tensor, rows: list[Tensor], sink: Tensor, scale: float) -> Tensor:
    """rows[t]: FP64 [rows, D] of token t."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            logits = [float(q[t, h].double() @ k) * scale for k in rows[t]]
            top = max([*logits, float(sink[h])])
            if top == -math.inf:
                continue
            e = [math.exp(x - top) for x in logits]
            total = sum(e) + math.exp(float(sink[h]) - top)
            for p, k in zip(e, rows[t], strict=True):
                out[t, h] += p / total * k
    return out


@pytest.mark.parametrize("format", ["fp32", "bf16", "fp8_ds_mla", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_caches(format: str, dtype: torch.dtype) -> None:
    """Ragged rows from a window and a compressed cache, decoded exactly, on the same values in FP64."""
    g = torch.Generator().manual_seed(0)
    window, entries = torch.randn(23, D, generator=g), 2 * torch.randn(9, D, generator=g)
    caches = [cache(format, window), cache(format, entries, page=2)]
    q = torch.randn(7, 3, D, generator=g).to(dtype)
    sink = torch.tensor([0.7, -3.0, 2.5])
    indices = [torch.randint(-1, 23, (7, 6), generator=g).int(), torch.randint(-1, 9, (7, 4), generator=g).int()]
    indices[0][2] = indices[1][2] = -1  # a token without rows
    both = list(zip(caches, indices, strict=True))
    rows = [torch.cat([read_rows(c, i[t][i[t] >= 0]).double() for c, i in both]) for t in range(7)]
    got = sparse_attention(q, caches, indices, sink, D**-0.5)
    assert got.dtype == dtype
    assert (got[2] == 0).all()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(got.double(), expected(q, rows, sink, D**-0.5), rtol=tolerance, atol=tolerance)


def test_a_row_named_twice_counts_twice() -> None:
    k = torch.randn(2, D, generator=torch.Generator().manual_seed(1))
    c, q, sink = cache("fp32", k), torch.zeros(1, 1, D), torch.tensor([0.0])
    got = sparse_attention(q, [c, c], [torch.tensor([[0, 1]]).int(), torch.tensor([[1]]).int()], sink, 1.0)
    torch.testing.assert_close(got[0, 0], (k[0] + 2 * k[1]) / 4)


@pytest.mark.parametrize("sink", [-math.inf, -1e30, 0.0, 1e4])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_extreme_logits_and_sinks(sink: float, size: float) -> None:
    """A sink of -inf is no sink (padded heads); logits of thousands neither overflow nor divide by zero."""
    g = torch.Generator().manual_seed(2)
    k = size * torch.randn(6, D, generator=g)
    q = torch.randn(2, 2, D, generator=g)
    c, sinks = cache("fp32", k), torch.full((2,), sink)
    index = torch.tensor([[0, 1, 2, -1], [3, 4, 5, 0]]).int()
    got = sparse_attention(q, [c], [index], sinks, 1.0)
    rows = [k[i[i >= 0].long()].double() for i in index]
    torch.testing.assert_close(got.double(), expected(q, rows, sinks, 1.0), rtol=2e-5, atol=1e-5 * size)


def test_many_rows_in_pieces() -> None:
    """More rows than are decoded at once: 300 tokens of 700."""
    g = torch.Generator().manual_seed(3)
    k, q = torch.randn(700, D, generator=g), torch.randn(300, 2, D, generator=g)
    c, sink = cache("fp32", k), torch.tensor([0.0, 1.0])
    got = sparse_attention(q, [c], [torch.arange(700).int().expand(300, -1)], sink, 0.1)
    e = torch.exp(torch.einsum("thd,rd->thr", q.double(), k.double()) * 0.1)
    want = torch.einsum("thr,rd->thd", e, k.double()) / (e.sum(-1) + sink.double().exp())[:, :, None]
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


def test_pairs_are_checked() -> None:
    c, q, sink = cache("fp32", torch.zeros(2, D)), torch.zeros(1, 1, D), torch.zeros(1)
    with pytest.raises(ValueError, match="go in pairs, got 1 and 2"):
        sparse_attention(q, [c], [torch.zeros(1, 1).int()] * 2, sink, 1.0)
    with pytest.raises(ValueError, match="go in pairs, got 0 and 0"):
        sparse_attention(q, [], [], sink, 1.0)


def test_rope_inverse_quantize() -> None:
    """Heads of a group side by side, groups in front, one alpha; the same bytes as the two steps apart."""
    o = torch.randn(5, 6, D, generator=torch.Generator().manual_seed(4)).bfloat16()
    table, at = rope_table(rope_frequencies(ROPE, 10000.0), 64), torch.tensor([0, 3, 9, 33, 63]).int()
    got = rope_inverse_quantize(o, at, table, groups=2)
    assert got.shape == (2, 5, 3 * D)
    assert got.alpha.shape == ()
    turned = rope_inverse(o, at, table)
    want = quantize_nvfp4(turned.reshape(5, 2, 3 * D).permute(1, 0, 2).reshape(10, 3 * D))
    assert torch.equal(got.data.view(10, -1), want.data)
    assert torch.equal(got.sf.view(10, -1).view(torch.uint8), want.sf.view(torch.uint8))
    assert torch.equal(got.alpha, want.alpha)
    off = dequant_nvfp4(got, torch.float32)[1, 2].view(3, D) - turned[2, 3:].float()
    assert float(off.norm() / turned[2, 3:].float().norm()) < 0.12
