"""Orders of NVFP4 block scales in memory, each with its exact inverse.

"linear" is row-major [m, ks] with ks = k / 16. "blocked_128x4" is what tcgen05, cuBLAS and CUTLASS read (PTX ISA,
"Scale factor layout"): rows padded to 128 and ks to 4 with zeros, then

    offset(m, s) = ((m // 128) * (ks_padded // 4) + s // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + s % 4   bytes.
"""

import torch
from torch import Tensor

ROWS, COLS = 128, 4  # one atom of the blocked layout: 512 bytes


def blocked_128x4_bytes(m: int, ks: int) -> int:
    """Bytes of the blocked form of [m, ks] scales."""
    return _round_up(m, ROWS) * _round_up(ks, COLS)


def to_blocked_128x4(sf: Tensor) -> Tensor:
    """[..., m, ks] one-byte scales -> [..., blocked_128x4_bytes(m, ks)], padding zero."""
    *lead, m, ks = sf.shape
    mp, kp = _round_up(m, ROWS), _round_up(ks, COLS)
    raw = sf.view(torch.uint8)
    padded = raw.new_zeros(*lead, mp, kp)
    padded[..., :m, :ks] = raw
    atoms = padded.view(*lead, mp // ROWS, 4, 32, kp // COLS, COLS)  # m = 128 mt + 32 j + i; s = 4 kt + c
    n = len(lead)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # mt kt i j c
    return atoms.permute(order).reshape(*lead, mp * kp).view(sf.dtype)


def from_blocked_128x4(flat: Tensor, m: int, ks: int) -> Tensor:
    """[..., bytes] -> [..., m, ks]: undoes `to_blocked_128x4` and drops the padding.

    Raises ValueError if the last axis is not blocked_128x4_bytes(m, ks) long.
    """
    *lead, size = flat.shape
    want = blocked_128x4_bytes(m, ks)
    if size != want:
        raise ValueError(f"blocked_128x4 scales of [{m}, {ks}] take {want} bytes, got {size}")
    mp, kp = _round_up(m, ROWS), _round_up(ks, COLS)
    n = len(lead)
    atoms = flat.view(torch.uint8).reshape(*lead, mp // ROWS, kp // COLS, 32, 4, COLS)  # mt kt i j c
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # mt j i kt c
    linear = atoms.permute(order).reshape(*lead, mp, kp)[..., :m, :ks]
    return linear.contiguous().view(flat.dtype)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
