"""What the kernels' tests share: configs, rules with layouts and types, poisoned room, comparing bytes."""

import dataclasses
import math
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor

from fp4suite import testing
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RULES, Problem
from fp4suite.testing import assert_same_bytes

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("linear", "blocked_128x4")
# all pairs of the three
RULES_LAYOUTS_TYPES = [(r, LAYOUTS[(i + j) % 2], d) for i, r in enumerate(RULES) for j, d in enumerate(DTYPES)]


def configs(kernel: ModuleType, problem: Problem, most: int = 24) -> list[Any]:
    """Those of SPACE that run `problem`. The interpreter knows no warps: under it, one of those that differ by them."""
    found = [c for c in testing.configs(kernel, most) if kernel.supports(problem, c) is None]
    if not triton.knobs.runtime.interpret:
        return found
    warps = {f.name: 0 for f in dataclasses.fields(kernel.Config) if f.name.endswith("warps")}
    return list({dataclasses.replace(c, **warps): c for c in found}.values())


def covering(kernel: ModuleType, problem: Problem) -> list[Any]:
    """The default, the largest tile of a warp, where registers are scarcest, and the fewest small ones, by a greedy
    search, with which every value of every knob that can run `problem` is there.
    """
    found = sorted(testing.every(kernel, problem), key=_tile_of_a_warp)
    left = {c: {(name, getattr(c, name)) for name in kernel.SPACE} for c in found}
    chosen = list(dict.fromkeys((kernel.Config(), found[-1])))
    shown = {(name, getattr(c, name)) for name in kernel.SPACE for c in chosen}
    while left := {c: new for c, values in left.items() if (new := values - shown)}:
        best = max(left, key=lambda c: len(left[c]))
        shown |= left[best]
        chosen.append(best)
    return chosen


def _tile_of_a_warp(config: Any) -> float:
    knobs = dataclasses.asdict(config)
    return math.prod(v for k, v in knobs.items() if k.startswith("block_")) / knobs.get("num_warps", 1)


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


def assert_same_numbers(got: Tensor, want: Tensor) -> None:
    """The same bytes, but that any NaN is as good as another."""
    nan = want.cpu().isnan()
    assert torch.equal(got.cpu().isnan(), nan)
    assert_same_bytes(got.cpu().masked_fill(nan, 0), want.cpu().masked_fill(nan, 0), "out")


def every_bf16(device: torch.device) -> Tensor:
    """All 65536 BF16 numbers, infinities and NaN included: [16, 4096]."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(16, 4096).to(device)
