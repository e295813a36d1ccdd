"""Positions and tables of angles for the kernels that turn a head's last dims."""

import torch
from torch import Tensor

from fp4suite import reference

FORMATS = ["fp8_ds_mla", "nvfp4", "bf16", "fp32"]
LAST = (1 << 20) - 1  # the last position of a million


def angles(m: int, rope_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 [m] positions in no order, 0 and the last of the table among them, and the table."""
    table = reference.rope_table(reference.rope_frequencies(rope_dim, 10000.0), 1000)
    positions = torch.randint(0, 1000, (m,), generator=torch.Generator().manual_seed(m)).int()
    positions[:1], positions[-1:] = 0, 999
    return positions.to(device), table.to(device)


def gaussian_rows(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows with amplitudes from where eps decides the norm to where it does not matter."""
    gen = torch.Generator().manual_seed(shape[0])
    size = torch.randint(-12, 4, (*shape[:-1], 1), generator=gen).float()
    return (torch.randn(*shape, generator=gen) * torch.exp2(size)).to(dtype).to(device)


def far_table(rope_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Six positions at the end of a million and at their beginning, and a table that is known there alone."""
    positions = torch.tensor([LAST, LAST - 1, 0, LAST - 2, 1, LAST // 2], dtype=torch.int32)
    table = torch.empty(LAST + 1, rope_dim)  # not touched elsewhere, so that it takes no memory
    frequencies = reference.rope_frequencies(rope_dim, 160000.0, factor=16.0, original_max_position=65536)
    angle = positions.float()[:, None] * frequencies
    table[positions.long()] = torch.cat((angle.cos(), angle.sin()), dim=1)
    return positions.to(device), table.to(device)


def sparse_table(rope_dim: int, device: torch.device) -> Tensor:
    """All of a million positions."""
    frequencies = reference.rope_frequencies(rope_dim, 160000.0, factor=16.0, original_max_position=65536)
    return reference.rope_table(frequencies.to(device), LAST + 1)
