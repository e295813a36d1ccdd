"""The highest of a query's index scores: cache slots of the `topk` best entries, in rising entry order.

Memory bound: reads 4 bytes an entry, once, and writes 4 a slot. A score becomes an integer whose order is that of the
numbers (-0 as 0, NaN above infinity), so that the k-th highest is found exactly, by halving the interval of integers
and counting; among equal ones the lower entry wins. The result is the same for every config.

One program a query. It looks at its first 2 · tile scores in registers; of each further tile it keeps what exceeds the
k-th highest so far, which for scores in no particular order soon is next to nothing, in a buffer of 2 · tile that is
cut back to k where it could overflow. Few queries over many entries are split: each part gives a list of its k
highest, and a second launch chooses among these.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import IndexTopkProblem

from . import host

MISSING = tl.constexpr(-(2**31))  # below the integer of every number
HIGHEST = tl.constexpr(2**31 - 1)  # that of NaN
RUN = tl.constexpr(16)  # scores under one running sum


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A program holds 2 · tile scores; queries are split until there are about `programs` of them."""

    tile: int = 2048
    programs: int = 264


SPACE = {"tile": (1024, 2048), "programs": (132, 264, 528)}
WARPS = 16  # eight scores a thread: sixteen spill


def supports(problem: IndexTopkProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if min(problem.topk, problem.entries) > config.tile:
        return f"topk={problem.topk} is more than tile={config.tile}"
    return None


def default(problem: IndexTopkProblem) -> Config:
    """A tile of at least twice the result, if there is one."""
    return Config(tile=1024 if 2 * min(problem.topk, problem.entries) <= 1024 else 2048)


@triton.jit
def _order(x):
    """FP32 -> int32 in the same order; 0 for -0, HIGHEST for NaN, never MISSING."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(x == 0.0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(x != x, HIGHEST, key)


@triton.jit
def _running(x, N: tl.constexpr):
    """Running sums of x [N], by runs of RUN, which takes fewer registers than a scan of all at once."""
    runs = x.reshape(N // RUN, RUN)
    total = tl.sum(runs, axis=1)
    return (tl.cumsum(runs, axis=1) + (tl.cumsum(total) - total)[:, None]).reshape(N)


@triton.jit
def _threshold(keys, K):
    """MISSING, or an integer that no more than K of keys are at or above, the K highest if the rest of them equal it.

    What comes after these keys belongs to the K highest of all only if it exceeds the threshold.
    """
    more = tl.sum((keys != MISSING).to(tl.int32)) > K
    low = tl.where(more, tl.min(tl.where(keys == MISSING, HIGHEST, keys)), MISSING)
    high = tl.where(more, tl.max(keys), MISSING)
    while low < high:  # at least K keys from low on, fewer than K above high
        middle = (low | high) - ((low ^ high) >> 1)  # half their sum, rounded up, which may pass 2**31 itself
        count = tl.sum((keys >= middle).to(tl.int32))
        high = tl.where(count == K, middle, tl.where(count > K, high, middle - 1))
        low = tl.where(count >= K, middle, low)
    return low


@triton.jit
def _places(keys, threshold, K, N: tl.constexpr):
    """Which of keys [N] are the K highest, the earlier among equals, and their places among these; their number."""
    above = keys > threshold
    equal = (keys == threshold) & (keys != MISSING)
    wanted = K - tl.sum(above.to(tl.int32))
    seen = _running((above.to(tl.int32) << 16) | equal.to(tl.int32), N)  # two counts, each below 2**15
    equals = seen & 0xFFFF
    chosen = above | (equal & (equals <= wanted))
    return chosen, (seen >> 16) + tl.minimum(equals, wanted) - 1, tl.sum(chosen.to(tl.int32))


@triton.jit
def _keys(ptr, at, end, ENCODED: tl.constexpr, ALIGNED: tl.constexpr):
    """Keys at positions `at` of a row, of scores or of keys (ENCODED); MISSING from `end` on.

    ALIGNED: the row goes on to a multiple of 16, so that a mask may too, which vector loads want.
    """
    inside = at < (tl.cdiv(end, 16) * 16 if ALIGNED else end)
    if ENCODED:
        keys = tl.load(ptr + at, mask=inside, other=MISSING)
    else:
        keys = _order(tl.load(ptr + at, mask=inside, other=0.0))
    return tl.where(at < end, keys, MISSING)


@triton.jit
def _spots(buffer_at, at, held_at, kept):
    """Where in their row the keys lie that a program holds: at `at`, or as the buffer says where they came from it."""
    return tl.where(kept > 0, tl.load(buffer_at + held_at, mask=held_at < kept, other=0), at)


@triton.jit(do_not_specialize=["JOBS", "SPLITS", "SPAN", "ENTRIES", "K", "ratio"])
def _index_topk(
    source_ptr,
    stride_row,
    list_entries_ptr,
    table_ptr,
    stride_table,
    positions_ptr,
    sequence_ids_ptr,
    buffer_keys_ptr,
    buffer_at_ptr,
    out_ptr,
    out_entries_ptr,
    JOBS,
    SPLITS,
    SPAN,
    ENTRIES,
    K,
    ratio,
    FROM_LISTS: tl.constexpr,
    TO_LISTS: tl.constexpr,
    BUFFERED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
):
    HELD: tl.constexpr = 2 * TILE
    held_at = tl.arange(0, HELD)
    tile_at = tl.arange(0, TILE)
    for turn in range(tl.cdiv(JOBS - tl.program_id(0), tl.num_programs(0))):
        job = tl.program_id(0) + turn * tl.num_programs(0)
        row = job // SPLITS
        split = job % SPLITS
        sequence = tl.load(sequence_ids_ptr + row)
        begin = split * SPAN * TILE
        if FROM_LISTS:
            end = ENTRIES
        else:
            visible = tl.minimum((tl.load(positions_ptr + row) + 1) // ratio, ENTRIES)
            end = tl.minimum(tl.where(sequence >= 0, visible, 0), begin + SPAN * TILE)
        # int64 before the multiply: long prompts pass 2**31 scores
        source = source_ptr + row.to(tl.int64) * stride_row
        keys = _keys(source, begin + held_at, end, FROM_LISTS, ALIGNED)
        threshold = _threshold(keys, K)
        kept = 0  # keys that were read back from the buffer; their places in the row lie beside them
        buffer_keys = buffer_keys_ptr
        buffer_at = buffer_at_ptr
        if BUFFERED:
            buffer_keys += tl.program_id(0).to(tl.int64) * HELD
            buffer_at += tl.program_id(0).to(tl.int64) * HELD
            start = begin + HELD
            while start < end:
                chosen, place, count = _places(keys, threshold, K, HELD)
                at = _spots(buffer_at, begin + held_at, held_at, kept)
                tl.debug_barrier()  # all that was in the buffer has been read
                tl.store(buffer_keys + place, keys, mask=chosen)
                tl.store(buffer_at + place, at, mask=chosen)
                while (start < end) & (count <= TILE):  # as long as there is room for a whole tile
                    fresh = _keys(source, start + tile_at, end, FROM_LISTS, ALIGNED)
                    new = (fresh > threshold).to(tl.int32)
                    more = tl.sum(new)
                    if more > 0:
                        behind = count + _running(new, TILE) - 1
                        tl.store(buffer_keys + behind, fresh, mask=new != 0)
                        tl.store(buffer_at + behind, start + tile_at, mask=new != 0)
                        count += more
                    start += TILE
                tl.debug_barrier()
                kept = count
                keys = _keys(buffer_keys, held_at, kept, True, True)
                threshold = _threshold(keys, K)

        chosen, place, count = _places(keys, threshold, K, HELD)
        at = begin + held_at
        if BUFFERED:
            at = _spots(buffer_at, at, held_at, kept)
        if FROM_LISTS:
            at = tl.load(list_entries_ptr + row.to(tl.int64) * stride_row + at, mask=chosen, other=0)
        out = out_ptr + job.to(tl.int64) * K
        if TO_LISTS:
            tl.store(out + place, keys, mask=chosen)
            tl.store(out_entries_ptr + job.to(tl.int64) * K + place, at, mask=chosen)
            tl.store(out + tile_at, MISSING, mask=(tile_at >= count) & (tile_at < K))
        else:
            tl.store(out + place, at, mask=chosen)
            tl.debug_barrier()  # entries, now that there are few, become slots
            entries = tl.load(out + tile_at, mask=tile_at < count, other=0)
            pages = table_ptr + tl.maximum(sequence, 0).to(tl.int64) * stride_table
            page = tl.load(pages + entries // PAGE, mask=tile_at < count, other=-1)
            tl.debug_barrier()
            tl.store(out + tile_at, tl.where(page >= 0, page * PAGE + entries % PAGE, -1), mask=tile_at < K)


def launch(
    logits: Tensor,
    block_table: Tensor,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    page_size: int,
    out: Tensor,
    config: Config,
) -> None:
    """Scores FP32 [tokens, entries], rows of any stride -> out int32 [tokens, k], contiguous; one or two launches."""
    (tokens, entries), k = logits.shape, out.shape[1]
    if tokens == 0 or k == 0:
        return
    parts, span = split(tokens, entries, k, config)
    table, rows = (block_table, host.row_stride(block_table)), (positions, sequence_ids)
    scores = logits, host.row_stride(logits), None
    if parts == 1:
        _run(scores, table, rows, (out, None), tokens, 1, span, entries, k, ratio, page_size, config)
        return
    keys, found = (torch.empty(tokens, parts * k, dtype=torch.int32, device=out.device) for _ in range(2))
    _run(scores, table, rows, (keys, found), tokens, parts, span, entries, k, ratio, page_size, config)
    width = parts * k
    span = triton.cdiv(width, config.tile)
    _run((keys, width, found), table, rows, (out, None), tokens, 1, span, width, k, ratio, page_size, config)


def split(tokens: int, entries: int, k: int, config: Config) -> tuple[int, int]:
    """Parts of a query, and tiles in a part: none shorter than what a program holds, or than all lists together."""
    tiles = triton.cdiv(entries, config.tile)
    parts = max(1, min(tiles // 2, config.programs // tokens, math.isqrt(entries // k)))
    span = triton.cdiv(tiles, parts)
    return triton.cdiv(tiles, span), span


def _run(
    source: tuple[Tensor, int, Tensor | None],
    table: tuple[Tensor, int],
    rows: tuple[Tensor, Tensor],
    out: tuple[Tensor, Tensor | None],
    tokens: int,
    parts: int,
    span: int,
    entries: int,
    k: int,
    ratio: int,
    page_size: int,
    config: Config,
) -> None:
    jobs, held = tokens * parts, 2 * config.tile
    buffered = span > 2
    programs = min(jobs, 2 * config.programs) if buffered else jobs  # a buffer each: not as many as there are tokens
    buffers: tuple[Tensor | None, Tensor | None] = (None, None)
    if buffered:
        room = torch.empty(2, programs, held, dtype=torch.int32, device=out[0].device)
        buffers = room[0], room[1]
    sizes = jobs, parts, span, entries, k, ratio
    aligned = entries % 16 == 0 and source[1] % 16 == 0
    constants = _constants(source[2] is not None, out[1] is not None, buffered, aligned, page_size, config)
    _index_topk[(programs,)](
        *source, *table, *rows, *buffers, *out, *sizes, **constants, num_warps=WARPS, **host.OPTIONS
    )


def warm(problem: IndexTopkProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    p, k = problem, min(problem.topk, problem.entries)
    pages = triton.cdiv(p.entries, p.page_size)
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.int32, device="cuda")  # noqa: E731
    logits = torch.zeros(1, p.entries, device="cuda").expand(p.m, -1)
    launch(logits, zeros(1, pages), zeros(p.m), zeros(p.m), 1, p.page_size, zeros(p.m, k), config)


def build_key(problem: IndexTopkProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: the sizes are read at launch, but for whether rows outgrow a program."""
    return problem.page_size, triton.cdiv(problem.entries, config.tile) > 2


def build(problem: IndexTopkProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU: the program that reads scores and writes slots."""
    buffered = triton.cdiv(problem.entries, config.tile) > 2
    types = {"source_ptr": "*fp32", "stride_row": "i32", "table_ptr": "*i32", "stride_table": "i32"}
    types |= {"positions_ptr": "*i32", "sequence_ids_ptr": "*i32", "out_ptr": "*i32"}
    types |= dict.fromkeys(("JOBS", "SPLITS", "SPAN", "ENTRIES", "K", "ratio"), "i32")
    constants = _constants(False, False, buffered, True, problem.page_size, config)
    constants |= {"list_entries_ptr": None, "out_entries_ptr": None}
    if buffered:
        types |= {"buffer_keys_ptr": "*i32", "buffer_at_ptr": "*i32"}
    else:
        constants |= {"buffer_keys_ptr": None, "buffer_at_ptr": None}
    unaligned = ("stride_table", "JOBS", "SPLITS", "SPAN", "ENTRIES", "K", "ratio")
    return host.build(_index_topk, types, constants, arch, WARPS, unaligned=unaligned)


def _constants(
    from_lists: bool, to_lists: bool, buffered: bool, aligned: bool, page_size: int, config: Config
) -> dict[str, Any]:
    return {
        "FROM_LISTS": from_lists,
        "TO_LISTS": to_lists,
        "BUFFERED": buffered,
        "ALIGNED": aligned,
        "PAGE": page_size,
        "TILE": config.tile,
    }
