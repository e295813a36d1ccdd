"""Slots in expert order by a counting sort: three launches, deterministic, nothing read on the host.

    sort    each block of slots sorts its own by expert and index, as numbers that hold both: a slot's place in the
            block is how many of the block's numbers are below its own; where each expert begins and ends in it is kept
    scan    for each block and expert, how many slots of the expert earlier blocks have
    place   a slot's place is the first of its expert, plus what earlier blocks have of it, plus its place among the
            block's own of that expert

Bound by latency: of three launches, as no block can place a slot before all have counted; of two instructions for each
pair of slots in a block; and of counts, blocks * experts * 8 bytes, that pass through L2. Few slots are sorted in one
launch by `permute_small`.
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
from .overlap import begin, let_come, wait

MOST_EXPERTS = 2047
COMPARED = 32  # slots that those of a block are compared with at a time
SCANNED, SCANNED_BINS, SCAN_WARPS = 256, 8, 8  # blocks and experts whose counts a program adds up at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_s slots a program."""

    block_s: int = 128
    num_warps: int = 4


SPACE = {"block_s": (64, 128, 256, 512), "num_warps": (2, 4, 8, 16)}


def default(problem: PermuteProblem) -> Config:
    """A thread a slot, in small blocks while their counts are few."""
    return Config() if problem.m * problem.topk <= 1 << 16 else Config(block_s=256, num_warps=8)


def supports(problem: PermuteProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    slots = problem.m * problem.topk
    if slots >= 2**31:
        return f"{slots} slots do not fit into int32"
    if problem.experts > MOST_EXPERTS:
        return f"experts={problem.experts} is over {MOST_EXPERTS}"
    held = config.block_s / (32 * config.num_warps)
    if not 1 <= held <= 2:
        return f"block_s={config.block_s} num_warps={config.num_warps}: {held:g} slots a thread, not 1 or 2"
    return None


@triton.jit
def _numbers(ids_ptr, at, slots, E, BLOCK: tl.constexpr):
    """Expert and index of each slot of a block in one; ids outside of 0 .. E - 1, and behind the last slot, as E."""
    ids = tl.load(ids_ptr + at, mask=at < slots, other=-1)
    return tl.where((ids < 0) | (ids >= E), E, ids) * BLOCK + at % BLOCK


@triton.jit(do_not_specialize=["slots"])
def _sort(
    ids_ptr, numbers_ptr, sorted_ptr, begins_ptr, ends_ptr, slots, E,
    BINS: tl.constexpr, BLOCK: tl.constexpr, COMPARED: tl.constexpr,
):  # fmt: skip
    wait()
    block = tl.program_id(0)
    bins, nth = tl.arange(0, BINS), tl.arange(0, BLOCK)
    begins_ptr += block.to(tl.int64) * BINS
    ends_ptr += block.to(tl.int64) * BINS
    numbers_ptr += block * BLOCK
    sorted_ptr += block * BLOCK
    own = _numbers(ids_ptr, block * BLOCK + nth, slots, E, BLOCK)
    let_come(FOLLOWED=True)
    tl.store(numbers_ptr + nth, own)
    tl.store(begins_ptr + bins, tl.zeros((BINS,), tl.int16))
    tl.store(ends_ptr + bins, tl.zeros((BINS,), tl.int16))
    tl.debug_barrier()  # numbers are stored before they are read, and zeros before where experts begin
    place = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, BLOCK, COMPARED):
        others = tl.load(numbers_ptr + start + tl.arange(0, COMPARED))
        below = (others[:, None] - own[None, :]).to(tl.uint32) >> 31  # fewer instructions than a comparison
        place += tl.sum(below.to(tl.int32), axis=0)
    tl.store(sorted_ptr + place, own)
    tl.debug_barrier()
    expert = tl.load(sorted_ptr + nth) // BLOCK
    before = tl.load(sorted_ptr + nth - 1, mask=nth > 0, other=-BLOCK) // BLOCK
    after = tl.load(sorted_ptr + nth + 1, mask=nth < BLOCK - 1, other=-BLOCK) // BLOCK
    tl.store(begins_ptr + expert, nth.to(tl.int16), mask=expert != before)
    tl.store(ends_ptr + expert, (nth + 1).to(tl.int16), mask=expert != after)


@triton.jit(do_not_specialize=["blocks"])
def _scan(
    begins_ptr, ends_ptr, bases_ptr, totals_ptr, blocks,
    BINS: tl.constexpr, SCANNED: tl.constexpr, SCANNED_BINS: tl.constexpr,
):  # fmt: skip
    bins = tl.program_id(0) * SCANNED_BINS + tl.arange(0, SCANNED_BINS)
    total = tl.full((SCANNED_BINS,), 0, tl.int32)
    let_come(FOLLOWED=True)  # which touches nothing before it has waited for this one
    wait(FOLLOWS=True)
    for start in range(0, blocks, SCANNED):
        block = start + tl.arange(0, SCANNED)
        inside = (block < blocks)[:, None]
        at = block.to(tl.int64)[:, None] * BINS + bins[None, :]
        ends = tl.load(ends_ptr + at, mask=inside, other=0).to(tl.int32)
        counts = ends - tl.load(begins_ptr + at, mask=inside, other=0).to(tl.int32)
        # what earlier blocks have, less where the expert begins in this one: counts and begins make its end
        tl.store(bases_ptr + at, total[None, :] + tl.cumsum(counts, axis=0) - ends, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + bins, total)


@triton.jit(do_not_specialize=["slots"])
def _place(
    sorted_ptr, bases_ptr, totals_ptr, order_ptr, offsets_ptr, slots, E, BINS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    block = tl.program_id(0)
    bins, nth = tl.arange(0, BINS), tl.arange(0, BLOCK)
    begin(FOLLOWS=True)
    numbers = tl.load(sorted_ptr + block * BLOCK + nth)
    bases, totals = tl.load(bases_ptr + block.to(tl.int64) * BINS + bins), tl.load(totals_ptr + bins)
    first = tl.cumsum(totals, axis=0) - totals
    tl.store(offsets_ptr + bins, first, mask=(bins <= E) & (block == 0))
    place = tl.gather(first + bases, numbers // BLOCK, axis=0) + nth
    slot = block * BLOCK + numbers % BLOCK
    tl.store(order_ptr + place, slot, mask=slot < slots)


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
    numbers, ordered = torch.empty(2, blocks, config.block_s, dtype=torch.int32, device=device)
    begins, ends = torch.empty(2, blocks, bins, dtype=torch.int16, device=device)
    bases = torch.empty(blocks, bins, dtype=torch.int32, device=device)
    totals = torch.empty(bins, dtype=torch.int32, device=device)
    launches: tuple[tuple[Any, int, tuple[Any, ...]], ...] = (
        (_sort, blocks, (topk_ids, numbers, ordered, begins, ends, slots, experts)),
        (_scan, bins // _scanned_bins(experts), (begins, ends, bases, totals, blocks)),
        (_place, blocks, (ordered, bases, totals, order, offsets, slots, experts)),
    )
    for kernel, programs, operands in launches:
        constants = _constants(kernel, experts, config)
        options = host.OPTIONS if kernel is _sort else host.FOLLOWING
        kernel[(programs,)](*operands, **constants, num_warps=_warps(kernel, config), **options)


def warm(problem: PermuteProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    ids = torch.zeros(1, problem.topk, dtype=torch.int32, device="cuda")
    launch(ids, problem.experts, (torch.empty_like(ids[0]), ids.new_empty(problem.experts + 1)), config)


def build_key(problem: PermuteProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: the experts within their power of two."""
    return (_bins(problem.experts),)


def build(problem: PermuteProblem, config: Config, arch: str) -> Built:
    """The sorting kernel compiled for `arch` without a GPU."""
    return build_part(_sort, problem, config, arch)


def build_part(kernel: Any, problem: PermuteProblem, config: Config, arch: str) -> Built:
    """One of the kernels of a launch compiled for `arch` without a GPU."""
    pointers = ("ids_ptr", "numbers_ptr", "sorted_ptr", "bases_ptr", "totals_ptr", "order_ptr", "offsets_ptr")
    types = dict.fromkeys(pointers, "*i32") | dict.fromkeys(("begins_ptr", "ends_ptr"), "*i16")
    types |= dict.fromkeys(("slots", "blocks", "E"), "i32")
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    constants = _constants(kernel, problem.experts, config)
    sizes = tuple(n for n in ("slots", "blocks", "E") if n in types)
    warps, follows = _warps(kernel, config), kernel is not _sort
    return host.build(kernel, types, constants, arch, warps, unaligned=sizes, launch_pdl=follows)


def _bins(experts: int) -> int:
    """Experts and one bin for none, as a power of two."""
    return triton.next_power_of_2(experts + 1)


def _scanned_bins(experts: int) -> int:
    return min(SCANNED_BINS, _bins(experts))


def _warps(kernel: Any, config: Config) -> int:
    return SCAN_WARPS if kernel is _scan else config.num_warps


def _constants(kernel: Any, experts: int, config: Config) -> dict[str, int]:
    all = {"BINS": _bins(experts), "BLOCK": config.block_s, "COMPARED": COMPARED, "SCANNED": SCANNED}
    all["SCANNED_BINS"] = _scanned_bins(experts)
    return {name: c for name, c in all.items() if name in kernel.arg_names}
