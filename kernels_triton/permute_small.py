"""Slots in expert order, for few of them: a slot's place is how many slots come before it, counted by comparing all.

    place(slot) = |{other: (expert, index) of other < (expert, index) of slot}|, first(expert) = |{other: expert < it}|

Bound by latency: slots * (slots + experts) comparisons of integers in one launch without memory of its own. Each
program finds the places of block_p slots, or the first places of block_p experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import PermuteProblem

from . import host
from .overlap import begin

MOST_SLOTS = 4096  # then three launches that sort are faster; and an expert with an index fits into int32
MOST_EXPERTS = 4096
LEAST_COMPARED, COMPARED = 32, 512  # slots at a time: few of them by one warp, without a barrier


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_p slots or experts a program."""

    block_p: int = 16
    num_warps: int = 4


SPACE = {"block_p": (4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)}


def default(problem: PermuteProblem) -> Config:
    """Small programs while those of all slots and experts fit on a GPU at once."""
    return Config(block_p=4 if problem.m * problem.topk <= 2048 else 16)


def supports(problem: PermuteProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    slots = problem.m * problem.topk
    if slots > MOST_SLOTS:
        return f"{slots} slots, more than {MOST_SLOTS}"
    if problem.experts > MOST_EXPERTS:
        return f"experts={problem.experts} is over {MOST_EXPERTS}"
    held = config.block_p * _compared(slots) // (32 * config.num_warps)
    return None if held <= 128 else f"{held} comparisons a thread at a time, more than 128"


@triton.jit
def _rank(ids, index, slots, E):
    """Numbers in the order of expert, then index; ids outside of 0 .. E - 1 come last."""
    return tl.where((ids < 0) | (ids >= E), E, ids) * slots + index


@triton.jit(do_not_specialize=["slots"])
def _permute_small(ids_ptr, order_ptr, offsets_ptr, slots, E, BLOCK: tl.constexpr, COMPARED: tl.constexpr):
    begin()
    own = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_slot = own < slots
    ids = tl.load(ids_ptr + own, mask=is_slot, other=0)
    expert = own - slots
    mine = tl.where(is_slot, _rank(ids, own, slots, E), expert * slots)  # an expert's slots rank from its first on
    place = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, slots, COMPARED):
        index = start + tl.arange(0, COMPARED)
        other = _rank(tl.load(ids_ptr + index, mask=index < slots, other=0), index, slots, E)
        before = (other[None, :] < mine[:, None]) & (index < slots)[None, :]
        place += tl.sum(before.to(tl.int32), axis=1)
    tl.store(order_ptr + place, own, mask=is_slot)
    tl.store(offsets_ptr + expert, place, mask=(expert >= 0) & (expert <= E))


def launch(topk_ids: Tensor, experts: int, out: tuple[Tensor, Tensor], config: Config) -> None:
    """topk_ids int32 [m, topk], contiguous -> order int32 [m * topk] and offsets int32 [experts + 1].

    Ids outside of 0 .. experts - 1 count as none: their slots come last.
    """
    order, offsets = out
    slots = topk_ids.numel()
    grid = (triton.cdiv(slots + experts + 1, config.block_p),)
    operands = topk_ids, order, offsets, slots, experts
    _permute_small[grid](*operands, **_constants(slots, config), num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: PermuteProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    ids = torch.zeros(problem.m, problem.topk, dtype=torch.int32, device="cuda")
    launch(ids, problem.experts, (ids.new_empty(ids.numel()), ids.new_empty(problem.experts + 1)), config)


def build_key(problem: PermuteProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: how many slots are compared at a time; its sizes are read at launch."""
    return (_compared(problem.m * problem.topk),)


def build(problem: PermuteProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"ids_ptr": "*i32", "order_ptr": "*i32", "offsets_ptr": "*i32", "slots": "i32", "E": "i32"}
    constants = _constants(problem.m * problem.topk, config)
    return host.build(_permute_small, types, constants, arch, config.num_warps, unaligned=("slots", "E"))


def _compared(slots: int) -> int:
    return min(COMPARED, max(LEAST_COMPARED, triton.next_power_of_2(slots)))


def _constants(slots: int, config: Config) -> dict[str, Any]:
    return {"BLOCK": config.block_p, "COMPARED": _compared(slots)}
