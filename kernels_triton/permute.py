"""Slots in expert order by a counting sort: two launches, deterministic, with nothing read on the host.

    count   each block of slots counts its slots of each expert
    place   each block adds up what all blocks counted, to the first place of each expert and to where its own slots of
            it begin, then places its slots chunk by chunk; the order in a chunk comes from comparing all pairs

Bound by latency and by reading counts: blocks^2 * experts of them through L2. Two launches, because no block can place
a slot before all have counted. Few slots are sorted in one launch by `permute_small`.
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

MOST_EXPERTS = 2047
SUMMED = 8  # blocks whose counts are added at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_s slots a program, placed `chunk` at a time."""

    block_s: int = 1024
    chunk: int = 128
    num_warps: int = 8


SPACE = {"block_s": (512, 1024, 2048, 4096), "chunk": (64, 128, 256), "num_warps": (4, 8, 16)}


def supports(problem: PermuteProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    slots = problem.m * problem.topk
    if slots >= 2**31:
        return f"{slots} slots do not fit into int32"
    if problem.experts > MOST_EXPERTS:
        return f"experts={problem.experts} is over {MOST_EXPERTS}"
    threads = 32 * config.num_warps
    held = max(config.chunk**2, SUMMED * _bins(problem.experts), config.block_s) // threads
    return None if held <= 64 else f"{held} numbers a thread at a time, more than 64"


@triton.jit
def _keys(ids_ptr, at, slots, E):
    """Bin of each slot: its expert, or E for ids outside of 0 .. E - 1 and for what lies behind the last slot."""
    ids = tl.load(ids_ptr + at, mask=at < slots, other=-1)
    return tl.where((ids < 0) | (ids >= E), E, ids)


@triton.jit(do_not_specialize=["slots"])
def _count(ids_ptr, counts_ptr, slots, E, BINS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.histogram(_keys(ids_ptr, at, slots, E), BINS)
    tl.store(counts_ptr + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _sums(counts_ptr, blocks, own, BINS: tl.constexpr, SUMMED: tl.constexpr):
    """Slots of each bin in all blocks, and in those before block `own`: int32 [BINS] each."""
    bins = tl.arange(0, BINS)
    total = tl.full((BINS,), 0, tl.int32)
    before = tl.full((BINS,), 0, tl.int32)
    for start in range(0, blocks, SUMMED):
        block = start + tl.arange(0, SUMMED)
        at = block.to(tl.int64)[:, None] * BINS + bins[None, :]
        counts = tl.load(counts_ptr + at, mask=(block < blocks)[:, None], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((block < own)[:, None], counts, 0), axis=0)
    return total, before


@triton.jit(do_not_specialize=["slots", "blocks"])
def _place(
    ids_ptr, counts_ptr, order_ptr, offsets_ptr, slots, blocks, E,
    BINS: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total, before = _sums(counts_ptr, blocks, own, BINS, SUMMED)
    first = tl.cumsum(total, axis=0) - total
    tl.store(offsets_ptr + bins, first, mask=(bins <= E) & (own == 0))
    free = first + before  # the next free place of each bin
    nth = tl.arange(0, CHUNK)
    for start in range(0, BLOCK, CHUNK):
        at = own * BLOCK + start + nth
        keys = _keys(ids_ptr, at, slots, E)
        same = (keys[:, None] == keys[None, :]) & (nth[:, None] > nth[None, :])
        place = tl.gather(free, keys, axis=0) + tl.sum(same.to(tl.int32), axis=1)
        tl.store(order_ptr + place, at, mask=at < slots)
        free += tl.histogram(keys, BINS)


def launch(topk_ids: Tensor, experts: int, out: tuple[Tensor, Tensor], config: Config) -> None:
    """topk_ids int32 [m, topk], contiguous -> order int32 [m * topk] and offsets int32 [experts + 1].

    Ids outside of 0 .. experts - 1 count as none: their slots come last.
    """
    order, offsets = out
    slots = topk_ids.numel()
    if slots == 0:
        offsets.zero_()
        return
    blocks, bins = triton.cdiv(slots, config.block_s), _bins(experts)
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=topk_ids.device)
    options = {"num_warps": config.num_warps, **host.OPTIONS}
    _count[(blocks,)](topk_ids, counts, slots, experts, BINS=bins, BLOCK=config.block_s, **options)
    constants = _constants(experts, config)
    _place[(blocks,)](topk_ids, counts, order, offsets, slots, blocks, experts, **constants, **options)


def warm(problem: PermuteProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    ids = torch.zeros(1, problem.topk, dtype=torch.int32, device="cuda")
    launch(ids, problem.experts, (torch.empty_like(ids[0]), ids.new_empty(problem.experts + 1)), config)


def build_key(problem: PermuteProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: the experts within their power of two."""
    return (_bins(problem.experts),)


def build(problem: PermuteProblem, config: Config, arch: str) -> Built:
    """The placing kernel compiled for `arch` without a GPU."""
    types = dict.fromkeys(("ids_ptr", "counts_ptr", "order_ptr", "offsets_ptr"), "*i32")
    types |= dict.fromkeys(("slots", "blocks", "E"), "i32")
    constants = _constants(problem.experts, config)
    return host.build(_place, types, constants, arch, config.num_warps, unaligned=("slots", "blocks", "E"))


def _bins(experts: int) -> int:
    """Experts and one bin for none, as a power of two."""
    return triton.next_power_of_2(experts + 1)


def _constants(experts: int, config: Config) -> dict[str, Any]:
    return {"BINS": _bins(experts), "SUMMED": SUMMED, "BLOCK": config.block_s, "CHUNK": config.chunk}
