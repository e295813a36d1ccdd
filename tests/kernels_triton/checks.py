"""Launching a quantising kernel into poisoned room, and comparing bytes."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fp4suite.formats import NVFP4Tensor
from fp4suite.testing import assert_same_bytes


def run(
    kernel: ModuleType, operands: tuple[Any, ...], m: int, k: int, rule: str, sf_layout: str, config: Any = None
) -> NVFP4Tensor:
    """launch(*operands, out, rule, config) into [m, k] bytes of 0xFF; the last operand is alpha."""
    out = NVFP4Tensor.empty((m, k), operands[-1], sf_layout)
    out.data.fill_(0xFF)
    out.sf.view(torch.uint8).fill_(0xFF)
    kernel.launch(*operands, out, rule, config or kernel.Config())
    return out


def assert_same(got: NVFP4Tensor, *wants: NVFP4Tensor) -> None:
    """The same codes, scales and layout as each of `wants`, wherever those were computed."""
    for want in wants:
        assert got.sf_layout == want.sf_layout
        assert_same_bytes(got.sf.cpu().view(torch.uint8), want.sf.cpu().view(torch.uint8), "sf")
        assert_same_bytes(got.data.cpu(), want.data.cpu(), "data")


def every_bf16(device: torch.device) -> Tensor:
    """All 65536 BF16 numbers, infinities and NaN included: [16, 4096]."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(16, 4096).to(device)
