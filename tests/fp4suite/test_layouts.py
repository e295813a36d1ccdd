"""blocked_128x4 against its formula in a double loop, and both ways round."""

import pytest
import torch

from fp4suite import layouts

SHAPES = [(1, 1), (1, 4), (3, 5), (31, 4), (32, 3), (33, 8), (127, 7), (128, 4), (129, 4), (300, 28), (256, 64)]


def offset(m: int, s: int, ks: int) -> int:
    """The byte of scale [m, s] in the blocked order, from the formula alone."""
    tiles = -(-ks // 4)
    return ((m // 128) * tiles + s // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + s % 4


@pytest.mark.parametrize(("m", "ks"), SHAPES)
def test_formula(m, ks):
    sf = torch.randint(1, 256, (m, ks), dtype=torch.uint8)
    flat = layouts.to_blocked_128x4(sf)
    size = -(-m // 128) * 128 * (-(-ks // 4) * 4)
    assert flat.shape == (size,)
    assert layouts.blocked_128x4_bytes(m, ks) == size
    want = [0] * size  # padding is zero
    for row in range(m):
        for s in range(ks):
            want[offset(row, s, ks)] = int(sf[row, s])
    assert flat.tolist() == want


@pytest.mark.parametrize(("m", "ks"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn])
def test_inverse(m, ks, dtype):
    sf = torch.randint(0, 256, (2, 3, m, ks), dtype=torch.uint8).view(dtype)
    flat = layouts.to_blocked_128x4(sf)
    assert flat.dtype == dtype
    assert flat.shape == (2, 3, layouts.blocked_128x4_bytes(m, ks))
    back = layouts.from_blocked_128x4(flat, m, ks)
    assert back.dtype == dtype
    assert back.is_contiguous()
    assert torch.equal(back.view(torch.uint8), sf.view(torch.uint8))
    one = layouts.to_blocked_128x4(sf[1, 2])
    assert torch.equal(one.view(torch.uint8), flat[1, 2].view(torch.uint8))


def test_a_full_atom_is_a_permutation():
    """Blocked, then back, starting from the blocked side: no byte of a whole atom is padding."""
    flat = torch.randperm(512).to(torch.uint8)
    assert torch.equal(layouts.to_blocked_128x4(layouts.from_blocked_128x4(flat, 128, 4)), flat)


def test_strided_input():
    sf = torch.randint(0, 256, (40, 12), dtype=torch.uint8)[::2, ::3]
    assert torch.equal(layouts.to_blocked_128x4(sf), layouts.to_blocked_128x4(sf.contiguous()))


def test_no_rows():
    assert layouts.to_blocked_128x4(torch.empty(0, 4, dtype=torch.uint8)).shape == (0,)
    assert layouts.from_blocked_128x4(torch.empty(0, dtype=torch.uint8), 0, 4).shape == (0, 4)


def test_wrong_size():
    with pytest.raises(ValueError, match=r"\[5, 4\] take 512 bytes, got 511"):
        layouts.from_blocked_128x4(torch.zeros(511, dtype=torch.uint8), 5, 4)
