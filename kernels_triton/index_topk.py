"""The highest of a query's index scores: cache slots of the `topk` best entries, in rising entry order.

Memory bound: reads 4 bytes an entry, once, and writes 4 a slot. The k-th highest is found exactly, by halving an
interval of FP32 numbers and counting how many scores are at or above its middle; among equal ones the lower entry wins.
The result is the same for every config.

One program a query holds up to `held` scores in registers. Of a longer row it looks at the maxima of groups of `group`
entries, which a launch before has made: the k highest entries lie in the k groups of highest maxima, the lower group
among equals. For if an entry is in none of these, k groups go before its own, by a larger maximum or by an equal one
in a lower place, and each has an entry that goes before it. Rows of more than `held` groups have maxima of maxima.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite import arch as archs
from fp4suite.built import Built
from fp4suite.problem import IndexTopkProblem

from . import host
from .overlap import begin

LOWEST = tl.constexpr(-(2**31) + 0x7FFFFF)  # -inf by _order
HIGHEST = tl.constexpr(0x7F800000)  # +inf
TILE = 2048  # scores of a program that makes maxima
TILE_WARPS = 4
LEVELS = 2  # of maxima, at most
MOST = 64  # scores that one thread may hold
FEW = 132  # queries, whose programs wait for memory rather than for each other
SMOOTH = tl.constexpr(12)  # counts that go by how scores are distributed, before intervals are halved
# of a thread with up to 32 scores, and with more, where there are no maxima: left alone, sm_90a's would take 115 or 160
# and an SM hold one or two programs less; with fewer than these it spills
REGISTERS = {"sm_90a": (80, 128), "sm_100a": (128, 255)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A program holds `held` scores; longer rows have maxima of `group` entries."""

    held: int = 16384
    group: int = 16
    num_warps: int = 8


SPACE = {"held": (8192, 16384), "group": (4, 8, 16), "num_warps": (4, 8, 16, 32)}


def supports(problem: IndexTopkProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    k = min(problem.topk, problem.entries)
    count = levels(problem.entries, config)
    if count > LEVELS:
        return f"entries={problem.entries} are more than held={config.held} groups of group={config.group} squared"
    held = _held(problem.entries, k, config)
    if held > config.held:
        return f"topk={k} groups of group={config.group} are more than held={config.held} entries"
    if held > MOST * 32 * config.num_warps:
        return f"{held} scores are more than {MOST} a thread: num_warps={config.num_warps}"
    return None


def default(problem: IndexTopkProblem) -> Config:
    """Groups so large that there are as many of them as members of those that are chosen."""
    k = min(problem.topk, problem.entries)
    fit = [c for c in (Config(group=g) for g in (4, 8, 16)) if supports(problem, c) is None]
    enough = (c for c in fit if triton.cdiv(problem.entries, c.group) <= max(c.group * k, 4096))
    return next(enough, fit[-1] if fit else Config())


def levels(entries: int, config: Config) -> int:
    """How often maxima are taken of `entries` until a program holds them."""
    count = 0
    while entries > config.held:
        entries, count = triton.cdiv(entries, config.group), count + 1
    return count


def _held(entries: int, k: int, config: Config) -> int:
    """Scores that a program has to hold at a time, a power of two."""
    count = levels(entries, config)
    top = triton.cdiv(entries, config.group**count)
    return triton.next_power_of_2(max(top, k * config.group if count else 0, 16))


@triton.jit
def _order(x):
    """FP32 -> int32 in the same order, -0 below 0, NaN beyond the infinity of its sign."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _of_order(key):
    """The number whose `_order` is key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _largest(x, axis: tl.constexpr):
    """The largest along an axis, NaN above infinity."""
    return _of_order(tl.max(tl.where(x != x, 0x7FFFFFFF, _order(x)), axis=axis))


@triton.jit
def _count(flags, COLUMNS: tl.constexpr):
    """How many of flags [rows, COLUMNS] are 1: added up as FP32, which leaves the integer units to comparisons."""
    each = tl.sum(tl.sum(flags, axis=0).reshape(COLUMNS // 4, 4), axis=1)  # of one thread
    return tl.sum(each.to(tl.int32))


@triton.jit
def _add_each(n, total, squares, n2, total2, squares2):
    return n + n2, total + total2, squares + squares2


@triton.jit
def _guess(x, K, count, N: tl.constexpr):
    """Where the K-th highest of `count` numbers in x is if they are normally distributed as every fourth of them is.

    And by how much it is lower where K is larger, of K to one. Neither need be finite.
    """
    # an integer sum, for to add zeros to it takes no instruction
    bits = tl.where(tl.arange(0, 4)[None, :] == 0, x.to(tl.int32, bitcast=True).reshape(N // 4, 4), 0)
    x = tl.sum(bits, axis=1).to(tl.float32, bitcast=True)
    finite = tl.abs(x) < float("inf")
    x = tl.where(finite, x, 0.0)
    n, total, squares = tl.reduce((tl.where(finite, 1.0, 0.0), x, x * x), 0, _add_each)
    mean = total / n
    deviation = tl.sqrt(tl.maximum(squares / n - mean * mean, 0.0))
    share = K.to(tl.float32) / count.to(tl.float32)
    # Abramowitz and Stegun, 26.2.22: the quantile of the smaller tail, within 0.003
    t = tl.sqrt(-2.0 * tl.log(tl.maximum(tl.minimum(share, 1.0 - share), 1e-6)))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + 0.99229 * t + 0.04481 * t * t)
    slope = deviation * share / (0.39894 * tl.exp(-0.5 * z * z))
    return mean + tl.where(share < 0.5, z, -z) * deviation, slope


@triton.jit
def _highest(x, K, pivot, slope, N: tl.constexpr, COLUMNS: tl.constexpr):
    """x', least: x' is at least `least`, or NaN where x [N / COLUMNS, COLUMNS] is one of its K highest.

    pivot, slope: as of `_guess`. Scores of almost any distribution are counted five to seven times.
    """
    # by their order, at least K numbers (`from_low`) from low on, fewer than K (`above`) beyond high; NaN are highest
    low, high = LOWEST, HIGHEST
    from_low, above = N, 0
    middle = tl.where(tl.abs(pivot) < float("inf"), _order(pivot), 0)
    slope = tl.where(slope < float("inf"), slope, 1.0) * 1.5  # beyond the K-th rather than short of it
    counts = 0
    while low < high:
        pivot = _of_order(middle)
        count = _count(tl.where(x < pivot, 0.0, 1.0), COLUMNS)
        counts += 1
        high = tl.where(count == K, middle, tl.where(count > K, high, middle - 1))
        above = tl.where(count < K, count, above)
        low = tl.where(count >= K, middle, low)
        from_low = tl.where(count >= K, count, from_low)
        half = (low | high) - ((low ^ high) >> 1)  # of their sum, rounded up, which may pass 2**31 itself
        # of the numbers from low to high, which lie evenly, the last that is not to be one of the K
        share = ((from_low - K).to(tl.float32) + 0.5) / ((from_low - above).to(tl.float32) + 1.0)
        inside = low + tl.minimum((high.to(tl.float32) - low.to(tl.float32)) * share, 2.0e9).to(tl.int32)
        beyond = pivot + slope * ((count - K).to(tl.float32) / K.to(tl.float32))
        slope *= 4.0
        beyond = tl.where(tl.abs(beyond) < float("inf"), _order(beyond), half)
        middle = tl.where((low > LOWEST) & (high < HIGHEST), inside, beyond)
        middle = tl.where(counts < SMOOTH, middle, half)
        middle = tl.minimum(tl.maximum(middle, low + 1), high)
    least = _of_order(low)
    if from_low > K:  # of those that equal the least, the ones up to place `last`
        at = tl.arange(0, N).reshape(N // COLUMNS, COLUMNS)
        if least == float("inf"):
            above = _count(tl.where(x != x, 1.0, 0.0), COLUMNS)
            if above >= K:  # NaN alone is enough
                x = tl.where(x != x, float("inf"), float("-inf"))
                above = 0
        first, last = 0, N - 1
        while first < last:
            half = (first + last) // 2
            enough = _count(tl.where((x == least) & (at <= half), 1.0, 0.0), COLUMNS) >= K - above
            last = tl.where(enough, half, last)
            first = tl.where(enough, first, half + 1)
        x = tl.where((x <= least) & ((x != least) | (at > last)), 0.0, 1.0)
        least = 1.0
    return x, least


@triton.jit
def _places(chosen, N: tl.constexpr, COLUMNS: tl.constexpr):
    """How many are chosen before each. Both halves of them are counted in one integer, fours of them at a time."""
    FOURS: tl.constexpr = N // 4
    flags = chosen.to(tl.int32).reshape(FOURS, 4)
    shift = 16 * tl.arange(0, 2)[:, None]
    both = tl.sum(tl.sum(flags, axis=1).reshape(2, FOURS // 2) << shift, axis=0)
    before = tl.cumsum(both) - both
    before = ((before[None, :] >> shift) & 0xFFFF) + tl.where(shift > 0, tl.sum(both) & 0xFFFF, 0)
    return (before.reshape(FOURS, 1) + tl.cumsum(flags, axis=1) - flags).reshape(N // COLUMNS, COLUMNS)


@triton.jit
def _put(out, places, numbers, chosen):
    # The hints are not so, but with them the store keeps the layout that numbers have: nothing moves between threads.
    # No two lanes are stored as one vector, for the mask differs from element to element.
    at = out + places
    tl.store(tl.max_contiguous(tl.multiple_of(at, [1, 16]), [1, 4]), numbers, mask=chosen)


@triton.jit
def _visible(positions_ptr, sequence_ids_ptr, row, ENTRIES, ratio):
    seen = tl.minimum((tl.load(positions_ptr + row) + 1) // ratio, ENTRIES)
    return tl.where(tl.load(sequence_ids_ptr + row) >= 0, seen, 0)


@triton.jit
def _padded(count):
    """count as a multiple of 16, which vector loads want of rows, and of masks too."""
    return tl.cdiv(count, 16) * 16


@triton.jit(do_not_specialize=["ENTRIES", "ratio"])
def _maxima(
    scores_ptr, stride_row, positions_ptr, sequence_ids_ptr, maxima_ptr, tops_ptr, ENTRIES, ratio,
    GROUP: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    """Maxima of GROUP scores, and tops of GROUP maxima unless tops_ptr is None, as far as they are visible."""
    begin(FOLLOWED=True)
    row = tl.program_id(1).to(tl.int64)  # before the multiply: long prompts pass 2**31 scores
    visible = _visible(positions_ptr, sequence_ids_ptr, row, ENTRIES, ratio)
    COUNT: tl.constexpr = TILE // GROUP
    groups = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    at = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    limit = ENTRIES if EAGER else visible
    x = tl.load(scores_ptr + row * stride_row + at, mask=at < (_padded(limit) if ALIGNED else limit), other=0.0)
    if tl.program_id(0) * TILE < visible:
        largest = _largest(tl.where(at < visible, x, float("-inf")), 1)
        count = tl.cdiv(ENTRIES, GROUP)
        tl.store(maxima_ptr + row * _padded(count) + groups, largest, mask=groups < count)
        if tops_ptr is not None:
            count = tl.cdiv(count, GROUP)
            above = tl.program_id(0) * (COUNT // GROUP) + tl.arange(0, COUNT // GROUP)
            top = _largest(largest.reshape(COUNT // GROUP, GROUP), 1)
            tl.store(tops_ptr + row * _padded(count) + above, top, mask=above < count)


@triton.jit
def _members(groups_ptr, K, GROUP: tl.constexpr, N: tl.constexpr):
    """Numbers [N / GROUP, GROUP] of the members of K groups, and whether they are any."""
    own = tl.arange(0, N // GROUP)
    groups = tl.load(groups_ptr + own, mask=own < K, other=0)
    return groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :], (own < K)[:, None]


@triton.jit
def _slots(pages_ptr, numbers, inside, PAGE: tl.constexpr):
    """Cache slots of entries by number, -1 where there is no page."""
    page = tl.load(pages_ptr + numbers // PAGE, mask=inside, other=-1)
    return tl.where(page >= 0, page * PAGE + numbers % PAGE, -1)


@triton.jit
def _runs(slots, N: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """Slots [N / COLUMNS, COLUMNS] of runs of entries of one page that begin at slots [N / RUN]; -1 if those are."""
    slots = tl.where((slots >= 0)[:, None], slots[:, None] + tl.arange(0, RUN)[None, :], -1)
    return slots.reshape(N // COLUMNS, COLUMNS)


@triton.jit
def _descend(
    groups_ptr, source, out, pages_ptr, count, end, K, pivot, slope, GROUP: tl.constexpr, PAGE: tl.constexpr,
    ALIGNED: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write to out the K highest below `end` in source, which are members of `count` groups; returns the least.

    By number, or the slots of these if pages_ptr is not None.
    """
    tl.debug_barrier()  # groups have been written
    numbers, inside = _members(groups_ptr, count, GROUP, N)
    x = tl.load(source + numbers, mask=inside & (ALIGNED | (numbers < end)), other=float("-inf"))
    x = tl.where(numbers < end, x, float("-inf")).reshape(N // COLUMNS, COLUMNS)
    RUN: tl.constexpr = GROUP if PAGE % GROUP == 0 else 1  # entries that are in one page
    if pages_ptr is not None:
        own = tl.arange(0, N // RUN)
        groups = tl.load(groups_ptr + own * RUN // GROUP, mask=own * RUN < count * GROUP, other=0)
        first = groups * GROUP + own * RUN % GROUP
        first_slots = _slots(pages_ptr, first, (own * RUN < count * GROUP) & (first < end), PAGE)
    K = tl.minimum(K, end)
    x, least = _highest(x, K, pivot, slope, N, COLUMNS)
    numbers, inside = _members(groups_ptr, count, GROUP, N)  # again: they need not be kept meanwhile
    numbers = numbers.reshape(N // COLUMNS, COLUMNS)
    if pages_ptr is not None:
        numbers = _runs(first_slots, N, COLUMNS, RUN)
    chosen = ~(x < least)
    places = _places(chosen, N, COLUMNS)
    tl.debug_barrier()  # source has been read, which may be where out is
    _put(out, places, numbers, chosen)
    return least


@triton.jit(do_not_specialize=["ENTRIES", "K", "ratio"])
def _index_topk(
    scores_ptr, stride_row, maxima_ptr, tops_ptr, table_ptr, stride_table, positions_ptr, sequence_ids_ptr, out_ptr,
    ENTRIES, K, ratio, GROUP: tl.constexpr, PAGE: tl.constexpr, TOP: tl.constexpr, MEMBERS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr, EAGER: tl.constexpr,
):  # fmt: skip
    """A query. TOP: its scores, or the maxima of the last level that is not None; MEMBERS: of K groups; WIDTH >= K."""
    if maxima_ptr is None:
        begin()
    # int64 before the multiply: long prompts pass 2**31 scores
    row = tl.program_id(0).to(tl.int64)
    visible = _visible(positions_ptr, sequence_ids_ptr, row, ENTRIES, ratio)
    pages = table_ptr + tl.maximum(tl.load(sequence_ids_ptr + row), 0).to(tl.int64) * stride_table
    scores, source, out = scores_ptr + row * stride_row, scores_ptr + row * stride_row, out_ptr + row * K
    count, groups, maxima, chosen_ptr, end = visible, tl.cdiv(visible, GROUP), out, out, ENTRIES
    # the numbers of what is chosen of maxima take the place of these
    if maxima_ptr is not None:
        end = tl.cdiv(ENTRIES, GROUP)
        source = maxima_ptr + row * _padded(end)
        count, maxima = groups, source.to(tl.pointer_type(tl.int32), bitcast=True)
        chosen_ptr = maxima
    if tops_ptr is not None:
        end = tl.cdiv(end, GROUP)
        source = tops_ptr + row * _padded(end)
        count, chosen_ptr = tl.cdiv(groups, GROUP), source.to(tl.pointer_type(tl.int32), bitcast=True)

    columns: tl.constexpr = min(TOP, COLUMNS)
    at = tl.arange(0, TOP // columns)[:, None] * columns + tl.arange(0, columns)[None, :]
    if maxima_ptr is not None:
        begin(FOLLOWS=True)
    # of few queries everything is read before it is known how much can be seen
    limit = end if EAGER else count
    x = tl.load(source + at, mask=at < (_padded(limit) if ALIGNED or maxima_ptr is not None else limit), other=0.0)
    RUN: tl.constexpr = 4 if PAGE % 4 == 0 else 1  # entries that are in one page
    first = tl.arange(0, TOP // RUN) * RUN
    if EAGER and maxima_ptr is None:
        first_slots = _slots(pages, first, first < end, PAGE)
    x = tl.where(at < count, x, float("-inf"))
    # what is not there is -inf and behind all that is: with at most as many chosen as there are, none of it is chosen
    chosen_k = tl.minimum(K, count)
    pivot, slope = _guess(x, chosen_k, tl.maximum(count, 1), TOP)
    x, least = _highest(x, chosen_k, pivot, slope, TOP, columns)
    chosen = ~(x < least)
    places = _places(chosen, TOP, columns)
    if maxima_ptr is None:
        if not EAGER:
            first_slots = _slots(pages, first, first < count, PAGE)
        _put(out, places, _runs(first_slots, TOP, columns, RUN), chosen)
    else:
        tl.debug_barrier()
        _put(chosen_ptr, places, at, chosen)
        then: tl.constexpr = min(MEMBERS, COLUMNS)
        if tops_ptr is not None:
            source = maxima.to(tl.pointer_type(tl.float32), bitcast=True)
            least = _descend(
                chosen_ptr, source, maxima, None, chosen_k, groups, K, least, slope, GROUP, PAGE, True, MEMBERS, then
            )
        chosen_k = tl.minimum(K, groups)
        _descend(maxima, scores, out, pages, chosen_k, visible, K, least, slope, GROUP, PAGE, ALIGNED, MEMBERS, then)
    at = tl.arange(0, WIDTH)
    tl.store(out + at, tl.full([WIDTH], -1, tl.int32), mask=(at >= tl.minimum(K, visible)) & (at < K))


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
    count, stride = levels(entries, config), host.row_stride(logits)
    if count > LEVELS:
        raise ValueError(f"{entries} entries need maxima {count} times over with {config}, {LEVELS} is the most")
    groups = triton.cdiv(entries, config.group)
    sizes = (groups, triton.cdiv(groups, config.group))[:count]
    aligned = entries % 16 == 0 and stride % 16 == 0
    made = [torch.empty(tokens, triton.cdiv(size, 16) * 16, dtype=torch.float32, device=out.device) for size in sizes]
    maxima = (*made, None, None)[:LEVELS]
    if count:
        grid = (triton.cdiv(entries, TILE), tokens)
        _maxima[grid](
            logits, stride, positions, sequence_ids, *maxima, entries, ratio, GROUP=config.group, ALIGNED=aligned,
            TILE=TILE, EAGER=tokens <= FEW, num_warps=TILE_WARPS, **host.OPTIONS,
        )  # fmt: skip
    rows = block_table, host.row_stride(block_table), positions, sequence_ids
    constants = _constants(tokens, entries, k, page_size, aligned, config)
    options = _options(constants, archs.of(out.device), config)
    _index_topk[(tokens,)](logits, stride, *maxima, *rows, out, entries, k, ratio, **constants, **options)


def warm(problem: IndexTopkProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    p, k = problem, min(problem.topk, problem.entries)
    pages = triton.cdiv(p.entries, p.page_size)
    zeros = lambda *shape: torch.zeros(shape, dtype=torch.int32, device="cuda")  # noqa: E731
    logits = torch.zeros(1, p.entries, device="cuda").expand(p.m, -1)
    launch(logits, zeros(1, pages), zeros(p.m), zeros(p.m), 1, p.page_size, zeros(p.m, k), config)


def build_key(problem: IndexTopkProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: the power of two that holds the entries, and whether queries are few."""
    k = min(problem.topk, problem.entries)
    return tuple(_constants(problem.m, problem.entries, k, problem.page_size, True, config).values())


def build(problem: IndexTopkProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU: the program that reads scores, or maxima and scores, and writes slots."""
    types = {"scores_ptr": "*fp32", "stride_row": "i32", "table_ptr": "*i32", "stride_table": "i32"}
    types |= {"positions_ptr": "*i32", "sequence_ids_ptr": "*i32", "out_ptr": "*i32"}
    types |= dict.fromkeys(("ENTRIES", "K", "ratio"), "i32")
    k = min(problem.topk, problem.entries)
    constants = _constants(problem.m, problem.entries, k, problem.page_size, True, config)
    constants |= _maxima_types(problem, config, types)
    options = _options(constants, arch, config)
    return host.build(
        _index_topk, types, constants, arch, unaligned=("stride_table", "ENTRIES", "K", "ratio"), **options
    )


def build_maxima(problem: IndexTopkProblem, config: Config, arch: str) -> Built:
    """The program that makes maxima, for a problem that needs them."""
    types = {"scores_ptr": "*fp32", "stride_row": "i32", "positions_ptr": "*i32", "sequence_ids_ptr": "*i32"}
    types |= {"ENTRIES": "i32", "ratio": "i32"}
    constants: dict[str, Any] = {"GROUP": config.group, "ALIGNED": True, "TILE": TILE, "EAGER": problem.m <= FEW}
    constants |= _maxima_types(problem, config, types)
    return host.build(_maxima, types, constants, arch, TILE_WARPS, unaligned=("ENTRIES", "ratio"))


def _maxima_types(problem: IndexTopkProblem, config: Config, types: dict[str, str]) -> dict[str, None]:
    """Adds the levels that there are to `types`; those that are not, as constants."""
    count = levels(problem.entries, config)
    names = ("maxima_ptr", "tops_ptr")
    types.update(dict.fromkeys(names[:count], "*fp32"))
    return dict.fromkeys(names[count:])


def _constants(m: int, entries: int, k: int, page_size: int, aligned: bool, config: Config) -> dict[str, Any]:
    count = levels(entries, config)
    return {
        "GROUP": config.group,
        "PAGE": page_size,
        "TOP": triton.next_power_of_2(max(triton.cdiv(entries, config.group**count), 16)),
        "MEMBERS": triton.next_power_of_2(max(k * config.group, 16)) if count else 0,
        "COLUMNS": 128 * config.num_warps,
        "WIDTH": triton.next_power_of_2(k),
        "ALIGNED": aligned,
        "EAGER": m <= FEW,
    }


def _options(constants: dict[str, Any], arch: str, config: Config) -> dict[str, Any]:
    most = min(65536 // (32 * config.num_warps), 255)
    if arch in REGISTERS and not constants["MEMBERS"] and not constants["EAGER"]:  # few rows need not share an SM
        most = min(REGISTERS[arch][constants["TOP"] > 32 * 32 * config.num_warps], most)
    options = {"num_warps": config.num_warps, "maxnreg": most}
    return options | (host.FOLLOWING if constants["MEMBERS"] else host.OPTIONS)
