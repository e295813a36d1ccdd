"""Hyper-connections against loops in FP64, and the properties that they are named for."""

import math

import pytest
import torch
from torch import Tensor

from fp4suite.reference import hyper_connection_head, hyper_connection_post, hyper_connection_pre, rms_norm

N, D, TOKENS = 4, 24, 5


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(TOKENS, N, D, generator=g) * torch.tensor([0.1, 1.0, 5.0, 1.0])[None, :, None]
    fn = torch.randn(N * (N + 2), N * D, generator=g) * (N * D) ** -0.5
    base, scale = torch.randn(N * (N + 2), generator=g), torch.tensor([0.7, 1.3, 2.0])
    return h, fn, base, scale, 1 + 0.2 * torch.randn(D, generator=g)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def expected(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_eps: float, eps: float, iterations: int):
    """One token: h [N, D] -> y, post, comb, number by number."""
    u = [float(x) for stream in h for x in stream]
    r = 1 / math.sqrt(sum(x * x for x in u) / len(u) + norm_eps)
    m = [r * sum(float(w) * x for w, x in zip(row, u, strict=True)) for row in fn]
    s, b = [float(x) for x in scale], [float(x) for x in base]
    pre = [sigmoid(m[i] * s[0] + b[i]) + eps for i in range(N)]
    post = [2 * sigmoid(m[N + i] * s[1] + b[N + i]) for i in range(N)]
    c = [[math.exp(m[2 * N + N * j + k] * s[2] + b[2 * N + N * j + k]) for k in range(N)] for j in range(N)]
    c = [[x / sum(row) + eps for x in row] for row in c]

    def columns(c: list[list[float]]) -> list[list[float]]:
        total = [sum(c[j][k] for j in range(N)) + eps for k in range(N)]
        return [[c[j][k] / total[k] for k in range(N)] for j in range(N)]

    c = columns(c)
    for _ in range(iterations - 1):
        c = columns([[x / (sum(row) + eps) for x in row] for row in c])
    y = [sum(pre[i] * float(h[i, d]) for i in range(N)) for d in range(D)]
    y, post, c = (torch.tensor(x, dtype=torch.float64) for x in (y, post, c))
    return y, post, c


@pytest.mark.parametrize(("norm_eps", "eps", "iterations"), [(1e-6, 1e-6, 20), (0.5, 0.03, 1), (0.5, 0.03, 3)])
def test_pre(norm_eps: float, eps: float, iterations: int) -> None:
    h, fn, base, scale, _ = inputs()
    y, post, comb = hyper_connection_pre(h, fn, base, scale, None, norm_eps=norm_eps, eps=eps, iterations=iterations)
    for t in range(TOKENS):
        want = expected(h[t], fn, base, scale, norm_eps, eps, iterations)
        for got, right in zip((y[t], post[t], comb[t]), want, strict=True):
            torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2e-6)


def test_pre_norms_what_enters_the_site() -> None:
    """In BF16: y is rounded, normed, rounded again; the coefficients stay FP32 and see the streams as they are."""
    h, fn, base, scale, weight = inputs(1)
    h = h.bfloat16()
    how = {"norm_eps": 1e-6, "eps": 1e-6}
    y, post, comb = hyper_connection_pre(h, fn, base, scale, None, **how)
    normed, post2, comb2 = hyper_connection_pre(h, fn, base, scale, weight, **how)
    assert y.dtype == normed.dtype == torch.bfloat16
    assert post.dtype == comb.dtype == torch.float32
    assert torch.equal(normed, rms_norm(y, weight, 1e-6))
    assert torch.equal(post, post2)
    assert torch.equal(comb, comb2)
    exact = hyper_connection_pre(h.float(), fn, base, scale, None, **how)
    torch.testing.assert_close(comb, exact[2])
    torch.testing.assert_close(y.float(), exact[0], rtol=2**-8, atol=1e-6)


def test_comb_is_doubly_stochastic() -> None:
    h, fn, base, scale, _ = inputs(2)
    _, post, comb = hyper_connection_pre(h, fn, base, scale, None, norm_eps=1e-6, eps=1e-6)
    torch.testing.assert_close(comb.sum(1), torch.ones(TOKENS, N), rtol=0, atol=1e-5)
    torch.testing.assert_close(comb.sum(2), torch.ones(TOKENS, N), rtol=0, atol=1e-3)
    assert (comb > 0).all()
    assert ((post > 0) & (post < 2)).all()


def test_post() -> None:
    """h'_k = post_k y + sum_j comb[j, k] h_j: the first index is summed."""
    h, fn, base, scale, _ = inputs(3)
    y, post, comb = hyper_connection_pre(h, fn, base, scale, None, norm_eps=1e-6, eps=1e-6, iterations=2)
    got = hyper_connection_post(y, h, post, comb)
    for t in range(TOKENS):
        for k in range(N):
            want = post[t, k] * y[t] + sum(comb[t, j, k] * h[t, j] for j in range(N))
            torch.testing.assert_close(got[t, k], want, rtol=1e-5, atol=1e-5)
    shift = torch.zeros(TOKENS, N, N)
    for j in range(N):
        shift[:, j, (j + 1) % N] = 1  # stream j goes to stream j + 1
    moved = hyper_connection_post(0 * y, h, post, shift)
    assert torch.equal(moved, h.roll(1, dims=1))
    assert hyper_connection_post(y.bfloat16(), h.bfloat16(), post, comb).dtype == torch.bfloat16


def test_head() -> None:
    h, fn, base, _, weight = inputs(4)
    fn, base, scale = fn[:N], base[:N], torch.tensor([1.7])
    got = hyper_connection_head(h, fn, base, scale, weight, norm_eps=0.3, eps=0.05)
    for t in range(TOKENS):
        u = [float(x) for stream in h[t] for x in stream]
        r = 1 / math.sqrt(sum(x * x for x in u) / len(u) + 0.3)
        m = [r * sum(float(w) * x for w, x in zip(row, u, strict=True)) for row in fn]
        pre = [sigmoid(m[i] * 1.7 + float(base[i])) + 0.05 for i in range(N)]
        y = [sum(pre[i] * float(h[t, i, d]) for i in range(N)) for d in range(D)]
        r = 1 / math.sqrt(sum(x * x for x in y) / D + 0.3)
        want = torch.tensor([x * r * float(w) for x, w in zip(y, weight, strict=True)])
        torch.testing.assert_close(got[t], want, rtol=1e-5, atol=1e-5)


def test_fp64_in_fp64_out() -> None:
    h, fn, base, scale, weight = inputs(5)
    exact = hyper_connection_pre(h.double(), fn, base, scale, weight, norm_eps=1e-6, eps=1e-6)
    want = expected(h[0], fn, base, scale, 1e-6, 1e-6, 20)
    torch.testing.assert_close(exact[2][0], want[2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(exact[1][0], want[1], rtol=1e-12, atol=0)
    assert all(x.dtype == torch.float64 for x in exact)
