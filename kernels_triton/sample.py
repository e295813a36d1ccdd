"""Next tokens, greedy or by nucleus sampling, without sorting: exactly the reference's, as masses are integers.

    survey   of each chunk of a row: the largest logit and its first index, and roughly (ex2.approx, FP32 sums) the mass
             above each of RUNGS edges
    bound    the rough masses of all chunks say between which edges the nucleus ends and where `uniform` points, and
             where many tokens are, how far between them; greedy rows are done
    weigh    the mass of all tokens and of those above either bracket is added up, and the tokens in them are listed
    finish   bisection of the listed tokens' logits, once for the end of the nucleus and once for the token

Bound by issue: 70 instructions a logit to survey and 110 to weigh, against 4 bytes read twice. Four launches, as each
needs what all programs of a row gave the one before. What is rough decides nothing: finish finds out whether
the brackets were right. Where one was not, or more than LISTED tokens are in them, one program bisects the row itself:
right, but slower; except where tokens between two edges have at most two different logits, which weigh counts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import SampleProblem
from fp4suite.reference.sample import MASS_BITS, UNDERFLOW as _UNDERFLOW

from . import host
from .nvfp4 import LOG2E, exp2_times, widen

RUNGS = 16
SUMMED = tl.constexpr(4)  # edges whose masses are summed together: one barrier for all, but registers for each
LISTED, FEW = 4096, 1024  # tokens of a row that finish need not look for, all or a few of them in registers
FINISH_WARPS, BISECTED = 8, 2048  # and how many of a row finish looks at together
ROWS = 2048  # at a time, to bound the room that lists take
MOST_CHUNKS = 1024
MOST_VOCAB = 1 << (62 - MASS_BITS)  # masses of all tokens fit into int64

WIDEST = tl.constexpr(1.5)  # from edge to edge; less where the temperature is
UNCERTAIN = tl.constexpr(2.0**-15)  # of a rough mass: ex2.approx and FP32 sums keep to 2^-16
CROWD = tl.constexpr(1200.0)  # tokens between two edges: more are not all listed
# How far, in parts of the way from edge to edge, the end of a mass may lie from where its neighbours say it does: what
# the shape of the distribution makes of it, and how far n independent tokens stray, as 0.5 / sqrt(n) is their deviation
STRAY_SHAPE, STRAY_TOKENS = tl.constexpr(0.02), tl.constexpr(1.5)
BOUNDS = tl.constexpr(11)  # largest logit; of the end and the token: bracket, edges around it, whether a crowd
COUNTS = tl.constexpr(5)  # largest key, tokens with it, smallest key, tokens with it, all tokens
MASS_POWER = tl.constexpr(MASS_BITS)
UNDERFLOW = tl.constexpr(_UNDERFLOW)
COLDEST = tl.constexpr(torch.finfo(torch.float32).tiny)
LEAST_HEAT, MOST_HEAT = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
COLDEST_ROUGH = tl.constexpr(1e-30)
LARGEST = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(-0x80000000)
INFINITY = tl.constexpr(float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """chunk tokens a program."""

    chunk: int = 4096
    num_warps: int = 8


SPACE = {"chunk": (1024, 2048, 4096, 8192), "num_warps": (4, 8, 16)}


def default(problem: SampleProblem) -> Config:
    """Chunks that few rows fill a GPU with, larger ones for many, none of them twice as long as a row."""
    most = max(1024, triton.next_power_of_2(problem.vocab))
    return Config(chunk=min(most, 1024 if problem.m <= 4 else 2048 if problem.m <= 16 else 4096))


def supports(problem: SampleProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.x not in host.DTYPES:
        return f"logits in {problem.x}, not one of {', '.join(host.DTYPES)}"
    if problem.vocab > min(MOST_VOCAB, MOST_CHUNKS * config.chunk):
        return f"vocab={problem.vocab} is over {min(MOST_VOCAB, MOST_CHUNKS * config.chunk)}"
    held = config.chunk // (32 * config.num_warps)
    return None if 4 <= held <= 32 else f"{held} logits a thread, not 4 to 32"


# --- logits as integers, masses ---------------------------------------------------------------------------------------


@triton.jit
def _key(x):
    """FP32 -> int32 in the same order, -0 as 0, NaN above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & LARGEST), LARGEST)


@triton.jit
def _number(key):
    """The FP32 number of a key."""
    return (key ^ ((key >> 31) & LARGEST)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(below, heat, COMPILED: tl.constexpr):
    """Mass of tokens whose logits lie this far below the top, which is finite, in FP32: to be rounded down."""
    if COMPILED:
        # Correctly rounded, as tl.div_rn is, in half the time (Markstein): remainders are exact, and the second finds
        # the quotient next to the right one. Powers of two keep all of it in range where quotients matter.
        scale = tl.where(heat < LEAST_HEAT, MOST_HEAT, tl.where(heat > MOST_HEAT, LEAST_HEAT, 1.0))
        heat *= scale
        below *= scale
        inverse = tl.div_rn(1.0, heat)
        z = below * inverse
        z = tl.fma(tl.fma(-heat, z, below), inverse, z)
        z = tl.fma(tl.fma(-heat, z, below), inverse, z)
    else:
        z = tl.div_rn(below, heat)
    return tl.where(z < UNDERFLOW, exp2_times(z * -LOG2E, MASS_POWER), 0.0)


@triton.jit
def _mass(below, heat, COMPILED: tl.constexpr):
    """Mass int64 of tokens whose logits lie this far below the top, which is finite."""
    return _weight(below, heat, COMPILED).to(tl.int64)


@triton.jit
def _mass_of(key, top, heat):
    """Mass int64 of one token."""
    return _mass(top - _number(key), heat, False)


@triton.jit
def _logits(logits_ptr, stride_m, row, at, inside):
    # int64 before the multiply: many rows of a vocabulary pass 2**31 elements
    return widen(tl.load(logits_ptr + row * stride_m + at, mask=inside, other=float("-inf")))


@triton.jit
def _below_finite(logits_ptr, stride_m, row, at, inside, top):
    """Logits of a row, -inf outside; where its largest is not finite, 0 for its equals, -inf for all others."""
    x = _logits(logits_ptr, stride_m, row, at, inside)
    if not tl.abs(top) < INFINITY:
        x = tl.where((_key(x) == _key(top)) & inside, 0.0, float("-inf"))
    return x


@triton.jit
def _finite(top):
    return tl.where(tl.abs(top) < INFINITY, top, 0.0)


@triton.jit
def _part(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _share(part, mass):
    """part (FP32) of mass (int64), in FP64."""
    return _part(part).to(tl.float64) * mass.to(tl.float64)


@triton.jit
def _limit(top_p, total):
    """The mass that the nucleus has to reach."""
    share = _share(top_p, total)
    floor = share.to(tl.int64)
    limit = tl.maximum(floor + (floor.to(tl.float64) < share).to(tl.int64), 1)
    return tl.minimum(limit, total)  # where FP64 rounded the mass of all up


@triton.jit
def _target(uniform, kept):
    return tl.minimum(_share(uniform, kept).to(tl.int64), kept - 1)


# --- survey: edges, and roughly the mass above each -------------------------------------------------------------------


@triton.jit
def _step(heat):
    """From edge to edge."""
    return tl.minimum(heat, WIDEST)


@triton.jit
def _rough_mass(x, top, heat):
    """Of the top's; what is not finite may be anything."""
    return tl.exp2((x - top) * (LOG2E / tl.maximum(heat, COLDEST_ROUGH)))


@triton.jit
def _survey(
    logits_ptr, stride_m, heat_ptr, most_ptr, where_ptr, rough_ptr, V,
    CHUNK: tl.constexpr, RUNGS: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    x = _logits(logits_ptr, stride_m, row, at, at < V)
    heat = tl.load(heat_ptr + row)
    most = tl.where(tl.max((x != x).to(tl.int32), axis=0) > 0, float("nan"), tl.max(x, axis=0))
    here = row * tl.num_programs(1) + chunk
    tl.store(most_ptr + here, _key(most))
    if heat == 0.0:
        first = tl.min(tl.where((_key(x) == _key(most)) & (at < V), at, LARGEST), axis=0)
        tl.store(where_ptr + here, first)
    else:
        heat = tl.maximum(heat, COLDEST)
        mass = _rough_mass(x, most, heat)
        step = _step(heat)
        rung = tl.floor(tl.div_rn(most, step))
        for first_edge in tl.static_range(0, RUNGS, SUMMED):
            j = first_edge + tl.arange(0, SUMMED)
            edges = tl.where(j < RUNGS - 1, (rung - j) * step, -INFINITY)
            above = tl.sum(tl.where(x[None, :] >= edges[:, None], mass[None, :], 0.0), axis=1)
            tl.store(rough_ptr + here * RUNGS + j, above)


@triton.jit
def _masses_above(keys, top, rough_ptr, row, chunks, heat, CHUNKS: tl.constexpr, RUNGS: tl.constexpr):
    """Roughly the mass of a row above each edge, in that of the top: [RUNGS], of all tokens at last; and the first."""
    nth, j = tl.arange(0, CHUNKS), tl.arange(0, RUNGS)
    step = _step(heat)
    rung = tl.floor(tl.div_rn(top, step))
    lower = rung - tl.floor(tl.div_rn(_number(keys), step))
    lower = tl.where(lower < RUNGS, lower, RUNGS).to(tl.int32)  # by so many edges a chunk's own begin below the row's
    own = tl.where(j == RUNGS - 1, RUNGS - 1, j[None, :] - lower[:, None])
    at = (row * chunks + nth)[:, None] * RUNGS + own
    rough = tl.load(rough_ptr + at, mask=(nth < chunks)[:, None] & (own >= 0), other=0.0)
    rough *= _rough_mass(_number(keys), top, heat)[:, None]
    return tl.sum(tl.where(rough == rough, rough, 0.0), axis=0), rung  # NaN of chunks without a finite logit


@triton.jit
def _at(masses, j, RUNGS: tl.constexpr):
    """masses[j], 0 for j < 0."""
    return tl.sum(tl.where(tl.arange(0, RUNGS) == j, masses, 0.0), axis=0)


@triton.jit
def _bracket(least, most, masses, rung, top, heat, RUNGS: tl.constexpr):
    """Between which logits the mass above reaches `least` to `most`: from edge to edge, closer where that is a crowd,
    and whether it is.
    """
    step = _step(heat)
    first = tl.sum((masses <= least).to(tl.int32), axis=0)
    last = tl.minimum(tl.sum((masses <= most).to(tl.int32), axis=0), RUNGS - 1)
    begin = tl.where(first > 0, (rung - (first - 1)) * step, float("nan"))
    end = tl.where(last < RUNGS - 1, (rung - last) * step, -INFINITY)
    above = _at(masses, first - 1, RUNGS)
    mass = _at(masses, last, RUNGS) - above
    depth = tl.where(first > 0, top - begin, 0.0) + 0.5 * step
    number = mass * tl.exp2(depth * (LOG2E / tl.maximum(heat, COLDEST_ROUGH)))
    crowd = (number > CROWD) | (last == RUNGS - 1)

    # where in it: masses on either side say how fast the mass of tokens changes
    wide = tl.maximum(above - _at(masses, first - 2, RUNGS), 1e-30)
    next = tl.maximum(_at(masses, first + 1, RUNGS) - _at(masses, first, RUNGS), 1e-30)
    slope = tl.where((first > 1) & (first < RUNGS - 2), 0.5 * tl.log2(next / wide), 0.0)
    slope = tl.where(tl.abs(slope) < 4.0, slope, 0.0)
    part = (least - above) / tl.maximum(_at(masses, first, RUNGS) - above, 1e-30)
    even = tl.abs(slope) < 0.01
    steep = tl.log2(1.0 + part * (tl.exp2(slope) - 1.0)) / tl.where(even, 1.0, slope)
    part = tl.where(even, part, steep)
    stray = STRAY_SHAPE + STRAY_TOKENS * tl.rsqrt(tl.maximum(number, 1.0))
    closer = crowd & (last - first < 2) & (first > 0) & (last < RUNGS - 1)
    far = tl.where(last == first, part, 1.0) + stray  # where the next edge is in doubt, beyond that
    inner_begin = tl.where(closer & (part > stray), begin - step * (part - stray), begin)
    inner_end = tl.where(closer & ((last > first) | (far < 1.0)), begin - step * far, end)
    return begin, end, inner_begin, inner_end, crowd


@triton.jit
def _between(x, begin, end):
    """Below `begin`, unless it is NaN, and not below `end`."""
    return (x >= end) & ~(x >= begin)


@triton.jit
def _keep_bracket(bounds_ptr, least, most, empty, masses, rung, top, heat, RUNGS: tl.constexpr):
    """Five bounds, those of a bracket without tokens if it is to be `empty`; where the first edge is is returned."""
    begin, end, inner_begin, inner_end, crowd = _bracket(least, most, masses, rung, top, heat, RUNGS)
    tl.store(bounds_ptr, tl.where(empty, -INFINITY, inner_begin))
    tl.store(bounds_ptr + 1, tl.where(empty, -INFINITY, inner_end))
    tl.store(bounds_ptr + 2, begin)
    tl.store(bounds_ptr + 3, end)
    tl.store(bounds_ptr + 4, tl.where(empty, 0.0, crowd.to(tl.float32)))
    return begin


@triton.jit
def _bound(
    heat_ptr, top_p_ptr, uniform_ptr, most_ptr, where_ptr, rough_ptr, bounds_ptr, listed_ptr, out_ptr, chunks,
    CHUNKS: tl.constexpr, RUNGS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    nth = tl.arange(0, CHUNKS)
    keys = tl.load(most_ptr + row * chunks + nth, mask=nth < chunks, other=SMALLEST)
    highest = tl.max(keys, axis=0)
    heat = tl.load(heat_ptr + row)
    if heat == 0.0:
        first = tl.load(where_ptr + row * chunks + nth, mask=nth < chunks, other=LARGEST)
        token = tl.min(tl.where(keys == highest, first, LARGEST), axis=0)
        tl.store(out_ptr + row, token.to(tl.int64))
    else:
        heat, top = tl.maximum(heat, COLDEST), _number(highest)
        bounds_ptr += BOUNDS * row
        tl.store(bounds_ptr, top)
        tl.store(listed_ptr + row, 0)
        masses, rung = _masses_above(keys, top, rough_ptr, row, chunks, heat, CHUNKS, RUNGS)
        share = _part(tl.load(top_p_ptr + row))
        limit = share * _at(masses, RUNGS - 1, RUNGS)
        low, high = limit * (1.0 - UNCERTAIN), limit * (1.0 + UNCERTAIN)
        # the end of a nucleus of all tokens need not be looked for
        begin = _keep_bracket(bounds_ptr + 1, low, high, share == 1.0, masses, rung, top, heat, RUNGS)
        # the last of the nucleus may reach over the limit by a mass like that where its bracket begins
        kept = limit + tl.where(begin == begin, _rough_mass(begin, top, heat), 1.0)
        part = _part(tl.load(uniform_ptr + row))
        low, high = part * limit * (1.0 - UNCERTAIN), part * kept * (1.0 + UNCERTAIN)
        _keep_bracket(bounds_ptr + 6, low, high, False, masses, rung, top, heat, RUNGS)


# --- weigh: masses, and the tokens of the brackets --------------------------------------------------------------------


@triton.jit
def _count_equals(counts_ptr, x, inside):
    """What `_of_two` reads of a chunk."""
    largest = tl.max(tl.where(inside, x, -INFINITY), axis=0)
    smallest = tl.min(tl.where(inside, x, INFINITY), axis=0)
    tl.store(counts_ptr, _key(largest))
    tl.store(counts_ptr + 1, tl.sum((inside & (x == largest)).to(tl.int32), axis=0))
    tl.store(counts_ptr + 2, _key(smallest))
    tl.store(counts_ptr + 3, tl.sum((inside & (x == smallest)).to(tl.int32), axis=0))
    tl.store(counts_ptr + 4, tl.sum(inside.to(tl.int32), axis=0))


@triton.jit
def _weigh(
    logits_ptr, stride_m, heat_ptr, bounds_ptr, mass_ptr, counts_ptr, listed_ptr, list_ptr, V,
    CHUNK: tl.constexpr, LISTED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(heat_ptr + row)
    if heat != 0.0:
        heat = tl.maximum(heat, COLDEST)
        bounds_ptr += BOUNDS * row
        top = tl.load(bounds_ptr)
        end_begin, end_end = tl.load(bounds_ptr + 1), tl.load(bounds_ptr + 2)
        pick_begin, pick_end = tl.load(bounds_ptr + 6), tl.load(bounds_ptr + 7)
        at = chunk * CHUNK + tl.arange(0, CHUNK)
        x = _below_finite(logits_ptr, stride_m, row, at, at < V, top)
        weight = _weight(_finite(top) - x, heat, COMPILED)
        mass = weight.to(tl.int64)
        here = row * tl.num_programs(1) + chunk
        tl.store(mass_ptr + 3 * here, tl.sum(mass, axis=0))
        tl.store(mass_ptr + 3 * here + 1, tl.sum(tl.where(x >= end_begin, mass, 0), axis=0))
        tl.store(mass_ptr + 3 * here + 2, tl.sum(tl.where(x >= pick_begin, mass, 0), axis=0))
        weighs = weight >= 1.0
        wanted = weighs & (_between(x, end_begin, end_end) | _between(x, pick_begin, pick_end))
        number = tl.sum(wanted.to(tl.int32), axis=0)
        if number > 0:
            # in no certain order, which nothing that follows depends on
            begin = tl.atomic_add(listed_ptr + row, number, sem="relaxed")
            place = begin + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
            entry = (x.to(tl.int32, bitcast=True).to(tl.int64) << 32) | at
            tl.store(list_ptr + row * LISTED + place, entry, mask=wanted & (place < LISTED))
        counts_ptr += 2 * COUNTS * here
        for bracket in range(2):
            edges_ptr = bounds_ptr + 3 + 5 * bracket
            if tl.load(edges_ptr + 2) != 0.0:
                inside = weighs & _between(x, tl.load(edges_ptr), tl.load(edges_ptr + 1))
                _count_equals(counts_ptr + COUNTS * bracket, x, inside)


# --- finish, among listed tokens --------------------------------------------------------------------------------------


@triton.jit
def _bisect(need, key, mass):
    """The largest key such that tokens with it or above have the mass `need`; the mass of those above it."""
    low = tl.min(tl.where(mass > 0, key, LARGEST), axis=0).to(tl.int64)
    high = tl.max(tl.where(mass > 0, key, SMALLEST), axis=0).to(tl.int64)
    above = tl.full((), 0, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        reached = tl.sum(tl.where(key >= middle.to(tl.int32), mass, 0), axis=0)
        enough = reached >= need
        low = tl.where(enough, middle, low)
        above = tl.where(enough, above, reached)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32), above


@triton.jit
def _nth(nth, at, wanted):
    """The number among those of `at` that are wanted which nth others come before."""
    low = tl.min(tl.where(wanted, at, LARGEST), axis=0)
    high = tl.max(tl.where(wanted, at, -1), axis=0)
    while low < high:
        middle = low + ((high - low) >> 1)
        enough = tl.sum((wanted & (at <= middle)).to(tl.int32), axis=0) > nth
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)
    return low


@triton.jit
def _kept(limit, key, above, top, heat):
    """Mass of the nucleus whose last key this is."""
    each = _mass_of(key, top, heat)
    equals = (limit - above + each - 1) // tl.maximum(each, 1)  # of them that the nucleus takes
    return above + equals * each


@triton.jit
def _among(
    list_ptr, row, listed, need, above, bounds_ptr, top, heat,
    HELD: tl.constexpr, LISTED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """`_bisect` of a bracket's listed tokens; the token that reaches the mass `need`; and whether the bracket has it.
    above: the mass above where the bracket begins.
    """
    nth = tl.arange(0, HELD)
    entry = tl.load(list_ptr + row * LISTED + nth, mask=nth < listed, other=0)
    x, at = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True), entry.to(tl.int32)
    inside = (nth < listed) & _between(x, tl.load(bounds_ptr), tl.load(bounds_ptr + 1))
    key, mass = _key(x), tl.where(inside, _mass(top - x, heat, COMPILED), 0)
    good = (above < need) & (need <= above + tl.sum(mass, axis=0))
    chosen, more = _bisect(need - above, key, mass)
    above += more
    before = (need - 1 - above) // tl.maximum(_mass_of(chosen, top, heat), 1)
    return chosen, above, _nth(before, at, (key == chosen) & (mass > 0)), good


@triton.jit
def _in_list(
    list_ptr, row, listed, need, above, bounds_ptr, top, heat,
    FEW: tl.constexpr, LISTED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """`_among`, of as many tokens as are listed; not good if the list is too short."""
    key, token, good = tl.full((), 0, tl.int32), tl.full((), -1, tl.int32), above < 0
    if listed <= FEW:
        key, above, token, good = _among(
            list_ptr, row, listed, need, above, bounds_ptr, top, heat, FEW, LISTED, COMPILED
        )  # fmt: skip
    elif listed <= LISTED:
        key, above, token, good = _among(
            list_ptr, row, listed, need, above, bounds_ptr, top, heat, LISTED, LISTED, COMPILED
        )  # fmt: skip
    return key, above, token, good


# --- finish, from all of a row ----------------------------------------------------------------------------------------


@triton.jit
def _of_two(counts_ptr, row, chunks, need, above, bounds_ptr, top, heat, CHUNKS: tl.constexpr):
    """`_bisect` of the tokens between two edges by their counts, if they are a crowd of no more than two keys; how many
    of each chunk have the key; and whether all this is so. above: the mass above where the bracket begins.
    """
    nth = tl.arange(0, CHUNKS)
    begin, crowd = tl.load(bounds_ptr), tl.load(bounds_ptr + 4)
    inside = nth < tl.where(crowd != 0.0, chunks, 0)
    at = counts_ptr + (row * chunks + nth) * (2 * COUNTS)
    largest, smallest = tl.load(at, mask=inside, other=SMALLEST), tl.load(at + 2, mask=inside, other=LARGEST)
    of_largest, of_smallest = tl.load(at + 1, mask=inside, other=0), tl.load(at + 3, mask=inside, other=0)
    first, second = tl.max(largest, axis=0), tl.min(smallest, axis=0)
    of_first = tl.where(largest == first, of_largest, tl.where(smallest == first, of_smallest, 0))
    of_second = tl.where(smallest == second, of_smallest, tl.where(largest == second, of_largest, 0))
    of_second = tl.where(first == second, 0, of_second)
    number = tl.sum(tl.load(at + 4, mask=inside, other=0), axis=0)
    mass_first = tl.sum(of_first, axis=0) * _mass_of(first, top, heat)
    mass_second = tl.sum(of_second, axis=0) * _mass_of(second, top, heat)
    above -= tl.where(_number(first) >= begin, mass_first, 0) + tl.where(_number(second) >= begin, mass_second, 0)
    reached = above + mass_first
    enough = reached >= need
    known = (number > 0) & (number == tl.sum(of_first + of_second, axis=0))
    known &= (above < need) & (need <= reached + mass_second)
    key, above = tl.where(enough, first, second), tl.where(enough, above, reached)
    return key, above, tl.where(enough, of_first, of_second), known


@triton.jit
def _bisect_row(need, logits_ptr, stride_m, row, V, top, heat, BLOCK: tl.constexpr, COMPILED: tl.constexpr):
    """`_bisect` of all tokens of a row."""
    low = _key(tl.full((), -INFINITY, tl.float32)).to(tl.int64)
    high = _key(_finite(top)).to(tl.int64)
    above = tl.full((), 0, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        total = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = _below_finite(logits_ptr, stride_m, row, at, at < V, top)
            total += tl.where(_key(x) >= middle.to(tl.int32), _mass(_finite(top) - x, heat, COMPILED), 0)
        reached = tl.sum(total, axis=0)
        enough = reached >= need
        low = tl.where(enough, middle, low)
        above = tl.where(enough, above, reached)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32), above


@triton.jit
def _nth_of_row(nth, wanted, logits_ptr, stride_m, row, start, end, top, BLOCK: tl.constexpr):
    """The token from start on, before end, with the key `wanted` that nth others with it come before."""
    token = tl.full((), -1, tl.int32)
    while (token < 0) & (start < end):
        at = start + tl.arange(0, BLOCK)
        equal = (_key(_below_finite(logits_ptr, stride_m, row, at, at < end, top)) == wanted) & (at < end)
        count = tl.cumsum(equal.to(tl.int32), axis=0)
        token = tl.max(tl.where(equal & (count == nth + 1), at, -1), axis=0)
        nth -= tl.max(count, axis=0)
        start += BLOCK
    return token


@triton.jit
def _finish(
    logits_ptr, stride_m, heat_ptr, top_p_ptr, uniform_ptr, bounds_ptr, mass_ptr, counts_ptr, listed_ptr, list_ptr,
    out_ptr, chunks, V,
    CHUNK: tl.constexpr, CHUNKS: tl.constexpr, LISTED: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr,
    COMPILED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(heat_ptr + row)
    if heat != 0.0:
        heat = tl.maximum(heat, COLDEST)
        uniform = tl.load(uniform_ptr + row)
        listed = tl.load(listed_ptr + row)
        bounds_ptr += BOUNDS * row
        top = tl.load(bounds_ptr)
        finite = _finite(top)
        nth = tl.arange(0, CHUNKS)
        at = mass_ptr + (row * chunks + nth) * 3
        total = tl.sum(tl.load(at, mask=nth < chunks, other=0), axis=0)
        above_end = tl.sum(tl.load(at + 1, mask=nth < chunks, other=0), axis=0)
        above_pick = tl.sum(tl.load(at + 2, mask=nth < chunks, other=0), axis=0)

        limit = _limit(tl.load(top_p_ptr + row), total)
        kept = total
        if limit != total:
            key, above, _, known = _in_list(
                list_ptr, row, listed, limit, above_end, bounds_ptr + 1, finite, heat, FEW, LISTED, COMPILED
            )  # fmt: skip
            if not known:
                key, above, number, known = _of_two(
                    counts_ptr, row, chunks, limit, above_end, bounds_ptr + 1, finite, heat, CHUNKS
                )  # fmt: skip
            if not known:
                key, above = _bisect_row(limit, logits_ptr, stride_m, row, V, top, heat, BLOCK, COMPILED)
            kept = _kept(limit, key, above, finite, heat)

        target = _target(uniform, kept)
        key, above, token, known = _in_list(
            list_ptr, row, listed, target + 1, above_pick, bounds_ptr + 6, finite, heat, FEW, LISTED, COMPILED
        )  # fmt: skip
        if not known:
            key, above, number, known = _of_two(
                counts_ptr + COUNTS, row, chunks, target + 1, above_pick, bounds_ptr + 6, finite, heat, CHUNKS
            )  # fmt: skip
            if not known:
                key, above = _bisect_row(target + 1, logits_ptr, stride_m, row, V, top, heat, BLOCK, COMPILED)
            before = ((target - above) // tl.maximum(_mass_of(key, finite, heat), 1)).to(tl.int32)
            start = tl.full((), 0, tl.int32)
            if known:
                reached = tl.cumsum(number, axis=0)
                chunk = tl.sum((reached <= before).to(tl.int32), axis=0)
                before -= tl.sum(tl.where(tl.arange(0, CHUNKS) < chunk, number, 0), axis=0)
                start = chunk * CHUNK
            token = _nth_of_row(before, key, logits_ptr, stride_m, row, start, V, top, BLOCK)
        tl.store(out_ptr + row, token.to(tl.int64))


# --- host -------------------------------------------------------------------------------------------------------------


def launch(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, out: Tensor, config: Config) -> None:
    """logits [m, vocab], rows of any stride; temperature, top_p, uniform float32 [m], contiguous -> out int64 [m]."""
    m, vocab = logits.shape
    chunks, most_rows = triton.cdiv(vocab, config.chunk), min(m, ROWS)

    def room(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(most_rows, *shape, dtype=dtype, device=logits.device)

    most, where, rough = room(chunks), room(chunks), room(chunks, RUNGS, dtype=torch.float32)
    bounds, mass = room(BOUNDS.value, dtype=torch.float32), room(chunks, 3, dtype=torch.int64)
    counts, listed, places = room(chunks, 2 * COUNTS.value), room(), room(LISTED, dtype=torch.int64)
    weighed = (bounds, mass, counts, listed, places)
    for begin in range(0, m, ROWS):
        rows = slice(begin, begin + ROWS)
        own = (logits[rows], host.row_stride(logits))
        heat, *asked = temperature[rows], top_p[rows], uniform[rows]
        launches: tuple[tuple[Any, tuple[Any, ...]], ...] = (
            (_survey, (*own, heat, most, where, rough, vocab)),
            (_bound, (heat, *asked, most, where, rough, bounds, listed, out[rows], chunks)),
            (_weigh, (*own, heat, *weighed, vocab)),
            (_finish, (*own, heat, *asked, *weighed, out[rows], chunks, vocab)),
        )
        for kernel, operands in launches:
            grid = (len(heat), chunks) if kernel in (_survey, _weigh) else (len(heat),)
            constants = _constants(kernel, vocab, config, logits.is_cuda)
            kernel[grid](*operands, **constants, num_warps=_warps(kernel, config), **host.OPTIONS)


def warm(problem: SampleProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    logits = torch.zeros(1, problem.vocab, dtype=host.DTYPES[problem.x], device="cuda")
    ones = torch.ones(1, device="cuda")
    launch(logits, ones, ones, ones, torch.empty(1, dtype=torch.int64, device="cuda"), config)


def build_key(problem: SampleProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch, the vocabulary within its chunks."""
    return problem.x, triton.next_power_of_2(triton.cdiv(problem.vocab, config.chunk))


def build(problem: SampleProblem, config: Config, arch: str) -> Built:
    """The weighing kernel, which takes longest, compiled for `arch` without a GPU."""
    return build_part(_weigh, problem, config, arch)


def build_part(kernel: Any, problem: SampleProblem, config: Config, arch: str) -> Built:
    """One of the kernels of a launch compiled for `arch` without a GPU."""
    types = {"logits_ptr": f"*{problem.x}", "stride_m": "i32", "chunks": "i32", "V": "i32"}
    types |= dict.fromkeys(("heat_ptr", "top_p_ptr", "uniform_ptr", "rough_ptr", "bounds_ptr"), "*fp32")
    types |= dict.fromkeys(("most_ptr", "where_ptr", "counts_ptr", "listed_ptr"), "*i32")
    types |= dict.fromkeys(("mass_ptr", "list_ptr", "out_ptr"), "*i64")
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    return host.build(kernel, types, _constants(kernel, problem.vocab, config, True), arch, _warps(kernel, config))


def _warps(kernel: Any, config: Config) -> int:
    return {_bound: 1, _finish: FINISH_WARPS}.get(kernel, config.num_warps)


def _constants(kernel: Any, vocab: int, config: Config, compiled: bool) -> dict[str, int]:
    chunks = triton.next_power_of_2(triton.cdiv(vocab, config.chunk))
    all = {"CHUNK": config.chunk, "CHUNKS": chunks, "RUNGS": RUNGS, "LISTED": LISTED, "FEW": FEW, "BLOCK": BISECTED}
    all["COMPILED"] = compiled
    return {name: c for name, c in all.items() if name in kernel.arg_names}
