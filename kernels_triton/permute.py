"""Slots in expert order by a counting sort: two launches, deterministic, nothing read on the host.

    count   each block of slots compares all pairs of its own: how many there are of each expert, and how many of a
            slot's expert come before it
    place   each block adds up what all blocks counted, to the first place of each expert and to where its own slots of
            it begin; a slot's place is that plus its rank in the block

Bound by latency: of two launches, and of reading all counts, blocks * experts int16 a block, through L2. Two launches,
because no block can place a slot before all have counted. Few slots are sorted in one launch by `permute_small`.
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
COMPARED = 8  # slots that those of a block are compared with at a time
EACH = 1 << 16  # a slot's count of equals goes beside its rank in one sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_s slots a program; counts of `summed` blocks added at a time; num_warps count, place_warps place."""

    block_s: int = 256
    summed: int = 64
    num_warps: int = 8
    place_warps: int = 16


SPACE = {"block_s": (128, 256, 512, 1024), "summed": (16, 32, 64), "num_warps": (4, 8, 16), "place_warps": (8, 16)}


def default(problem: PermuteProblem) -> Config:
    """Blocks large enough that adding their counts takes no longer than comparing their slots."""
    slots = problem.m * problem.topk
    block_s = 256 if slots <= 1 << 16 else 512 if slots <= 1 << 18 else 1024
    return Config(block_s=block_s, summed=min(64, 32768 // _bins(problem.experts)), num_warps=block_s // 32)


def supports(problem: PermuteProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    slots = problem.m * problem.topk
    if slots >= 2**31:
        return f"{slots} slots do not fit into int32"
    if problem.experts > MOST_EXPERTS:
        return f"experts={problem.experts} is over {MOST_EXPERTS}"
    held = config.block_s * COMPARED // (32 * config.num_warps)
    if held > 32:
        return f"block_s={config.block_s} num_warps={config.num_warps}: {held} pairs a thread at a time, more than 32"
    held = config.summed * _bins(problem.experts) // (32 * config.place_warps)
    return None if held <= 64 else f"{held} counts a thread at a time, more than 64"


@triton.jit
def _keys(ids_ptr, at, slots, E):
    """Bin of each slot: its expert, or E for ids outside of 0 .. E - 1 and for what lies behind the last slot."""
    ids = tl.load(ids_ptr + at, mask=at < slots, other=-1)
    return tl.where((ids < 0) | (ids >= E), E, ids)


@triton.jit(do_not_specialize=["slots"])
def _count(
    ids_ptr, counts_ptr, keys_ptr, ranks_ptr, slots, E,
    BINS: tl.constexpr, BLOCK: tl.constexpr, COMPARED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    begin, nth = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    counts_ptr += tl.program_id(0).to(tl.int64) * BINS
    bins = tl.arange(0, BINS)
    tl.store(counts_ptr + bins, tl.zeros((BINS,), tl.int16))
    keys = _keys(ids_ptr, begin + nth, slots, E)
    tl.store(keys_ptr + begin + nth, keys)
    tl.debug_barrier()  # zeros are stored before counts, and keys before they are read
    found = tl.zeros((COMPARED, BLOCK), tl.int32)
    for start in range(0, BLOCK, COMPARED):
        other = start + tl.arange(0, COMPARED)
        step = tl.where(other[:, None] < nth[None, :], EACH + 1, EACH)
        equal = keys[None, :] == tl.load(keys_ptr + begin + other)[:, None]
        found += tl.where(equal, step, 0)
    found = tl.sum(found, axis=0)
    count, rank = found // EACH, found % EACH
    tl.store(ranks_ptr + begin + nth, rank.to(tl.int16))
    tl.store(counts_ptr + keys, count.to(tl.int16), mask=rank == count - 1)


@triton.jit
def _sums(counts_ptr, blocks, own, BINS: tl.constexpr, SUMMED: tl.constexpr):
    """Slots of each bin in all blocks, and in those before block `own`: int32 [BINS] each."""
    bins = tl.arange(0, BINS)
    total = tl.full((BINS,), 0, tl.int32)
    before = tl.full((BINS,), 0, tl.int32)
    for start in range(0, blocks, SUMMED):
        block = start + tl.arange(0, SUMMED)
        at = block.to(tl.int64)[:, None] * BINS + bins[None, :]
        counts = tl.load(counts_ptr + at, mask=(block < blocks)[:, None], other=0).to(tl.int32)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((block < own)[:, None], counts, 0), axis=0)
    return total, before


@triton.jit(do_not_specialize=["slots", "blocks"])
def _place(
    counts_ptr, keys_ptr, ranks_ptr, order_ptr, offsets_ptr, slots, blocks, E,
    BINS: tl.constexpr, SUMMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    bins = tl.arange(0, BINS)
    at = own * BLOCK + tl.arange(0, BLOCK)
    keys, rank = tl.load(keys_ptr + at), tl.load(ranks_ptr + at)
    total, before = _sums(counts_ptr, blocks, own, BINS, SUMMED)
    first = tl.cumsum(total, axis=0) - total
    tl.store(offsets_ptr + bins, first, mask=(bins <= E) & (own == 0))
    tl.store(order_ptr + tl.gather(first + before, keys, axis=0) + rank, at, mask=at < slots)


def launch(topk_ids: Tensor, experts: int, out: tuple[Tensor, Tensor], config: Config) -> None:
    """topk_ids int32 [m, topk], contiguous -> order int32 [m * topk] and offsets int32 [experts + 1].

    Ids outside of 0 .. experts - 1 count as none: their slots come last.
    """
    order, offsets = out
    slots = topk_ids.numel()
    if slots == 0:
        offsets.zero_()
        return
    blocks, bins, device = triton.cdiv(slots, config.block_s), _bins(experts), topk_ids.device
    counts = torch.empty(blocks, bins, dtype=torch.int16, device=device)
    keys = torch.empty(blocks, config.block_s, dtype=torch.int32, device=device)
    ranks = torch.empty_like(keys, dtype=torch.int16)
    _count[(blocks,)](
        topk_ids, counts, keys, ranks, slots, experts, **_constants(_count, experts, config),
        num_warps=config.num_warps, **host.OPTIONS,
    )  # fmt: skip
    _place[(blocks,)](
        counts, keys, ranks, order, offsets, slots, blocks, experts, **_constants(_place, experts, config),
        num_warps=config.place_warps, **host.OPTIONS,
    )  # fmt: skip


def warm(problem: PermuteProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    ids = torch.zeros(1, problem.topk, dtype=torch.int32, device="cuda")
    launch(ids, problem.experts, (torch.empty_like(ids[0]), ids.new_empty(problem.experts + 1)), config)


def build_key(problem: PermuteProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: the experts within their power of two."""
    return (_bins(problem.experts),)


def build(problem: PermuteProblem, config: Config, arch: str) -> Built:
    """The placing kernel compiled for `arch` without a GPU."""
    return build_part(_place, problem, config, arch)


def build_part(kernel: Any, problem: PermuteProblem, config: Config, arch: str) -> Built:
    """One of the kernels of a launch compiled for `arch` without a GPU."""
    types = dict.fromkeys(("ids_ptr", "keys_ptr", "order_ptr", "offsets_ptr"), "*i32")
    types |= dict.fromkeys(("counts_ptr", "ranks_ptr"), "*i16") | dict.fromkeys(("slots", "blocks", "E"), "i32")
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    constants = _constants(kernel, problem.experts, config)
    warps = config.place_warps if kernel is _place else config.num_warps
    sizes = tuple(n for n in ("slots", "blocks", "E") if n in types)
    return host.build(kernel, types, constants, arch, warps, unaligned=sizes)


def _bins(experts: int) -> int:
    """Experts and one bin for none, as a power of two."""
    return triton.next_power_of_2(experts + 1)


def _constants(kernel: Any, experts: int, config: Config) -> dict[str, int]:
    all = {"BINS": _bins(experts), "SUMMED": config.summed, "BLOCK": config.block_s, "COMPARED": COMPARED, "EACH": EACH}
    return {name: c for name, c in all.items() if name in kernel.arg_names}
