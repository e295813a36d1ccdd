"""Interleaved RoPE against complex numbers in FP64, and YaRN's frequencies against the model's published numbers."""

import math

import pytest
import torch

from fp4suite.reference import qnorm_rope, rms_norm, rope_frequencies, rope_inverse, rope_table
from fp4suite.reference.quant import rmsnorm_fp32
from fp4suite.reference.rope import rotate

YARN = {"factor": 16.0, "original_max_position": 65536, "beta_fast": 32.0, "beta_slow": 1.0}


def turned(x: torch.Tensor, positions: list[int], freq: torch.Tensor, sign: int = 1) -> torch.Tensor:
    """FP64, pair by pair: (x[2 j], x[2 j + 1]) as a complex number times e^(i sign position freq_j)."""
    x = x.double().clone()
    rope = 2 * len(freq)
    z = torch.view_as_complex(x[..., -rope:].unflatten(-1, (-1, 2)).contiguous())
    angle = torch.tensor(positions).double()[:, None] * freq.double() * sign
    z = z * torch.polar(torch.ones_like(angle), angle).view(len(positions), *(1,) * (x.ndim - 2), -1)
    x[..., -rope:] = torch.view_as_real(z).flatten(-2)
    return x


@pytest.mark.parametrize("positions", [[0, 1, 2, 3, 4], [7, 4095, 100000, 0, 31]])
def test_rotation(positions: list[int]) -> None:
    freq = rope_frequencies(64, 10000.0)
    table = rope_table(freq, max(positions) + 1)
    x = torch.randn(5, 3, 96, generator=torch.Generator().manual_seed(0))
    at = torch.tensor(positions, dtype=torch.int32)
    # the angle itself is an FP32 product: 2^-24 of it may be lost
    lost = max(positions) * 2**-23 + 1e-6
    got = rotate(x, at, table)
    assert torch.equal(got[..., :32], x[..., :32])
    torch.testing.assert_close(got.double(), turned(x, positions, freq), rtol=0, atol=5 * lost)
    torch.testing.assert_close(
        rope_inverse(x, at, table).double(), turned(x, positions, freq, -1), rtol=0, atol=5 * lost
    )
    torch.testing.assert_close(rope_inverse(got, at, table), x, rtol=0, atol=1e-5)


def test_angles_are_fp32_products() -> None:
    """What every public implementation computes, far out too: cos(fp32(t) * fp32(f)), not cos of the exact product."""
    freq = rope_frequencies(64, 160000.0, **YARN)
    table = rope_table(freq, 1 << 17)
    t = (1 << 17) - 1
    product = (torch.tensor(float(t)) * freq).double()
    torch.testing.assert_close(table[t].double(), torch.cat((product.cos(), product.sin())), rtol=0, atol=2e-7)


def test_yarn() -> None:
    """theta 160000 over 65536 positions: pairs below 15 keep their frequency, those from 25 on are 16 times slower."""
    plain, yarn = rope_frequencies(64, 160000.0).double(), rope_frequencies(64, 160000.0, **YARN).double()
    for j in range(32):
        base = 160000.0 ** (-2 * j / 64)
        ramp = min(max((j - 15) / 10, 0), 1)
        assert plain[j] == pytest.approx(base, rel=1e-6)
        assert yarn[j] == pytest.approx(base * (1 - ramp) + base / 16 * ramp, rel=1e-6)
    assert torch.equal(rope_table(yarn.float(), 1)[0], torch.cat((torch.ones(32), torch.zeros(32))))  # no amplitude


def test_qnorm_rope() -> None:
    """Each head is normed over all its dims, without weight, before it turns; one rounding at the end."""
    freq = rope_frequencies(16, 10000.0)
    table = rope_table(freq, 50)
    q = (3 * torch.randn(6, 4, 48, generator=torch.Generator().manual_seed(1))).bfloat16()
    at = torch.tensor([0, 1, 7, 20, 33, 49], dtype=torch.int32)
    want = torch.empty(q.shape, dtype=torch.float64)
    for t in range(6):
        for h in range(4):
            want[t, h] = q[t, h].double() / math.sqrt(float((q[t, h].double() ** 2).mean()) + 1e-6)
    want = turned(want, at.tolist(), freq)
    got = qnorm_rope(q, at, table, 1e-6)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(qnorm_rope(q.double(), at, table, 1e-6), want, rtol=0, atol=1e-5)


def test_rms_norm() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight = torch.randn(33, generator=torch.Generator().manual_seed(3)).bfloat16()
    want = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.01).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 0.01).double(), want, rtol=2**-8, atol=1e-9)
    torch.testing.assert_close(rms_norm(x.float(), weight, 0.01).double(), want, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rms_norm(x.double(), weight, 0.01), want, rtol=1e-14, atol=0)
    assert torch.equal(rms_norm(x, weight, 0.01), rmsnorm_fp32(x, weight, 0.01).to(x.dtype))  # the quantiser's order
