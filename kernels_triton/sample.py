"""Next tokens, greedy or by nucleus sampling, without sorting: exactly the reference's, as masses are integers.

    survey   of each chunk of a row: the largest logit and its first index, and roughly (ex2.approx, FP32 sums) the mass
             above each of RUNGS edges
    bound    the rough masses of all chunks say between which edges the nucleus ends and where `uniform` points, and
             where many tokens are, how far between them; greedy rows are done
    weigh    the mass of all tokens and of those above either bracket is added up, and the tokens in them are listed
    finish   bisection of the listed tokens, once for the end of the nucleus and once for the token

Bound by issue: 50 instructions a logit to survey and 60 to weigh, against 4 bytes read twice. Four launches, as each
needs what all programs of a row gave the one before. What is rough decides nothing: finish finds out whether
the brackets were right. Where one was not, or more than LISTED tokens are in them, one program looks at all of the row:
right, but slower, most of all where tokens between two edges have more than two different logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import SampleProblem
from fp4suite.reference.sample import MASS_BITS

from . import host, overlap
from .nvfp4 import LOG2E, exp2_times, widen

RUNGS = 16
LISTED, FEW = 4096, 1024  # tokens of a row that finish need not look for, all or a few of them in registers
BOUND_WARPS, FINISH_WARPS, BISECTED = 4, 8, 4096  # and how many of a row finish looks at together
ROWS = 4096  # at a time, to bound the room that lists take
MOST_CHUNKS = 1024
MOST_VOCAB = 1 << (62 - MASS_BITS)  # masses of all tokens fit into int64

WIDEST = tl.constexpr(1.5)  # from edge to edge; less where the temperature is
UNCERTAIN = tl.constexpr(2.0**-15)  # of a rough mass: ex2.approx and FP32 sums keep to 2^-16
CROWD = tl.constexpr(200.0)  # tokens between two edges: more are not all listed
# How far, in parts of the way from edge to edge, the end of a mass may lie from where its neighbours say it does: what
# the shape of the distribution makes of it, and how far n independent tokens stray, as 0.5 / sqrt(n) is their deviation
STRAY_SHAPE, STRAY_TOKENS = tl.constexpr(0.004), tl.constexpr(2.25)
WAY = tl.constexpr(16)  # parts of that way
BENT = tl.constexpr(0.1155)  # ln(2) / 6
BOUNDS = tl.constexpr(9)  # largest logit; of the end and the token: bracket, edges around it
MASS_POWER = tl.constexpr(MASS_BITS)
WEIGHTLESS = tl.constexpr(28.0)  # temperatures below the top: 2^40 exp(-28) < 1
COLDEST = tl.constexpr(torch.finfo(torch.float32).tiny)
LEAST_HEAT, MOST_HEAT = tl.constexpr(2.0**-64), tl.constexpr(2.0**64)
COLDEST_ROUGH = tl.constexpr(1e-30)
LARGEST = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(-0x80000000)
MOST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
ONE = tl.constexpr(1 << 50)  # a token, beside masses of less
INFINITY = tl.constexpr(float("inf"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """chunk tokens a program."""

    chunk: int = 4096
    num_warps: int = 4


SPACE = {"chunk": (1024, 2048, 4096), "num_warps": (4, 8)}


def default(problem: SampleProblem) -> Config:
    """Chunks that are not twice as long as a row; one row in shorter ones takes no less time (H100, 129,280 logits)."""
    return Config(chunk=min(4096, max(1024, triton.next_power_of_2(problem.vocab))))


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
def _weight(below, heat, POWER: tl.constexpr, COMPILED: tl.constexpr):
    """2^POWER times the mass, in parts of the top's, of tokens whose logits lie this far below the top, which is
    finite: to be rounded down. The least there is, of those at infinity too, has no unit of mass.
    """
    if COMPILED:
        # Correctly rounded, as tl.div_rn is, in half the time (Markstein): by a reciprocal in two parts the quotient is
        # the right one or its neighbour, the remainder is exact and tells. Powers of two keep all of it in range.
        scale = tl.where(heat < LEAST_HEAT, MOST_HEAT, tl.where(heat > MOST_HEAT, LEAST_HEAT, 1.0))
        heat *= scale
        below *= scale
        inverse = tl.div_rn(1.0, heat)
        z = tl.fma(below, inverse, below * (tl.fma(-heat, inverse, 1.0) * inverse))
        z = tl.fma(tl.fma(-heat, z, below), inverse, z)
    else:
        z = tl.div_rn(below, heat)
    return exp2_times(tl.minimum(z, WEIGHTLESS) * -LOG2E, POWER)  # the minimum of NaN, too, is WEIGHTLESS


@triton.jit
def _mass(below, heat, COMPILED: tl.constexpr):
    """Mass int64 of tokens whose logits lie this far below the top, which is finite."""
    return _weight(below, heat, MASS_POWER, COMPILED).to(tl.int64)


@triton.jit
def _mass_of(key, top, heat):
    """Mass int64 of one token."""
    return _mass(top - _number(key), heat, False)


@triton.jit
def _logits(logits_ptr, stride_m, row, at, inside):
    # int64 before the multiply: many rows of a vocabulary pass 2**31 elements
    return widen(tl.load(logits_ptr + row * stride_m + at, mask=inside, other=float("-inf")))


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
def _rough_mass(x, top, heat, COMPILED: tl.constexpr):
    """In parts of the top's; what is not finite may be anything."""
    power = (x - top) * (LOG2E / tl.maximum(heat, COLDEST_ROUGH))
    if COMPILED:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(power)


@triton.jit
def _survey(
    logits_ptr, stride_m, heat_ptr, most_ptr, where_ptr, rough_ptr, V,
    CHUNK: tl.constexpr, TILE: tl.constexpr, RUNGS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    overlap.begin()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heat = tl.load(heat_ptr + row)
    lane = tl.arange(0, TILE)
    xs: tl.tuple = ()
    most = tl.full((TILE,), -INFINITY, tl.float32)
    for t in tl.static_range(CHUNK // TILE):
        at = chunk * CHUNK + t * TILE + lane
        xs += (_logits(logits_ptr, stride_m, row, at, at < V),)
        most = tl.maximum(most, xs[t], propagate_nan=tl.PropagateNan.ALL)
    key = tl.max(_key(most), axis=0)
    here = row * tl.num_programs(1) + chunk
    tl.store(most_ptr + here, key)
    most = _number(key)
    if heat == 0.0:
        first = tl.full((TILE,), LARGEST, tl.int32)
        for t in tl.static_range(CHUNK // TILE):
            at = chunk * CHUNK + t * TILE + lane
            equal = ((xs[t] == most) | (xs[t] != xs[t])) & (at < V)  # any NaN is the largest, then nothing equals it
            first = tl.minimum(first, tl.where(equal, at, LARGEST))
        tl.store(where_ptr + here, tl.min(first, axis=0))
    else:
        heat = tl.maximum(heat, COLDEST)
        masses: tl.tuple = ()
        for t in tl.static_range(CHUNK // TILE):
            masses += (_rough_mass(xs[t], most, heat, COMPILED),)
        step = _step(heat)
        rung = tl.floor(tl.div_rn(most, step))
        for j in tl.static_range(0, RUNGS, 4):
            above_0 = _above(xs, masses, (rung - j) * step, CHUNK // TILE, TILE)
            above_1 = _above(xs, masses, (rung - j - 1) * step, CHUNK // TILE, TILE)
            above_2 = _above(xs, masses, (rung - j - 2) * step, CHUNK // TILE, TILE)
            above_3 = _above(xs, masses, (rung - j - 3) * step if j + 4 < RUNGS else None, CHUNK // TILE, TILE)
            above = tl.sum(tl.join(tl.join(above_0, above_1), tl.join(above_2, above_3)), axis=0)
            edge = j + tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]
            tl.store(rough_ptr + here * RUNGS + edge, above)


@triton.jit
def _above(xs, masses, edge, TILES: tl.constexpr, TILE: tl.constexpr):
    """The mass of tokens from `edge` on, of all without one, by the place in a tile: two instructions a logit, where a
    sum of chosen masses takes three.
    """
    sum = tl.full((TILE,), 0.0, tl.float32)
    for t in tl.static_range(TILES):
        if edge is None:
            sum += masses[t]
        else:
            sum = tl.fma(tl.where(xs[t] >= edge, 1.0, 0.0), masses[t], sum)
    return sum


@triton.jit
def _masses_above(
    keys, top, rough_ptr, row, chunks, heat, CHUNKS: tl.constexpr, RUNGS: tl.constexpr, COMPILED: tl.constexpr
):
    """Roughly the mass of a row above each edge, in that of the top: [RUNGS], of all tokens at last; and the first."""
    nth, j = tl.arange(0, CHUNKS), tl.arange(0, RUNGS)
    step = _step(heat)
    rung = tl.floor(tl.div_rn(top, step))
    lower = rung - tl.floor(tl.div_rn(_number(keys), step))
    lower = tl.where(lower < RUNGS, lower, RUNGS).to(tl.int32)  # by so many edges a chunk's own begin below the row's
    own = tl.where(j == RUNGS - 1, RUNGS - 1, j[None, :] - lower[:, None])
    at = (row * chunks + nth)[:, None] * RUNGS + own
    rough = tl.load(rough_ptr + at, mask=(nth < chunks)[:, None] & (own >= 0), other=0.0)
    rough *= _rough_mass(_number(keys), top, heat, COMPILED)[:, None]
    return tl.sum(tl.where(rough == rough, rough, 0.0), axis=0), rung  # NaN of chunks without a finite logit


@triton.jit
def _at(masses, j, RUNGS: tl.constexpr):
    """masses[j], 0 for j < 0."""
    return tl.sum(tl.where(tl.arange(0, RUNGS) == j, masses, 0.0), axis=0)


@triton.jit
def _log_of(masses, j, RUNGS: tl.constexpr):
    """log2 of the mass between the edges j - 1 and j."""
    return tl.log2(tl.maximum(_at(masses, j, RUNGS) - _at(masses, j - 1, RUNGS), 1e-30))


@triton.jit
def _way(part, masses, first, RUNGS: tl.constexpr):
    """Where between the edges first - 1 and first this part of the mass there is reached: in parts of the way.

    As if the logarithm of the mass at a logit were a parabola, through three intervals' own.
    """
    middle = tl.minimum(tl.maximum(first, 2), RUNGS - 3)
    own = _log_of(masses, middle, RUNGS)
    before, after = _log_of(masses, middle - 1, RUNGS), _log_of(masses, middle + 1, RUNGS)
    bend = tl.minimum(tl.maximum(0.5 * (after - 2.0 * own + before), -4.0), 4.0)
    bend -= bend * bend * BENT  # what an interval's mass takes off the bend at its middle, and off the slope
    slope = tl.minimum(tl.maximum(0.5 * (after - before), -8.0), 8.0) / tl.maximum(1.0 + bend * BENT, 0.25)
    nth = tl.arange(0, WAY)
    at = (nth + 0.5) * (1.0 / WAY) - 0.5 + (first - middle)
    density = tl.exp2(tl.minimum((bend * at + slope) * at, 60.0))
    reached = tl.cumsum(density, axis=0)
    wanted = part * tl.sum(density, axis=0)
    return tl.sum(tl.minimum(tl.maximum((wanted - reached) / density + 1.0, 0.0), 1.0), axis=0) * (1.0 / WAY)


@triton.jit
def _bracket(least, most, lowest, masses, rung, top, heat, RUNGS: tl.constexpr):
    """Between which logits the mass above reaches `least` to `most`: from edge to edge, the last no lower than edge
    `lowest`, and closer where that is a crowd and where tokens have no mass; and that last edge.
    """
    step = _step(heat)
    first = tl.sum((masses <= least).to(tl.int32), axis=0)
    last = tl.minimum(tl.sum((masses <= most).to(tl.int32), axis=0), lowest)
    begin = tl.where(first > 0, (rung - (first - 1)) * step, INFINITY)
    bottom = top - WEIGHTLESS * heat
    end = tl.maximum(tl.where(last < RUNGS - 1, (rung - last) * step, -INFINITY), bottom)
    above = _at(masses, first - 1, RUNGS)
    depth = tl.where(first > 0, top - begin, 0.0) + 0.5 * step
    number = (_at(masses, last, RUNGS) - above) * tl.exp2(depth * (LOG2E / tl.maximum(heat, COLDEST_ROUGH)))
    stray = STRAY_SHAPE + STRAY_TOKENS * tl.rsqrt(tl.maximum(number, 1.0))
    closer = (number > CROWD) & (last - first < 2) & (first > 0) & (last < RUNGS - 1)
    own = tl.maximum(_at(masses, first, RUNGS) - above, 1e-30)
    near = _way((least - above) / own, masses, first, RUNGS) - stray
    far = tl.where(last == first, _way((most - above) / own, masses, first, RUNGS), 1.0) + stray
    inner_begin = tl.where(closer & (near > 0.0), begin - step * near, begin)
    inner_end = tl.where(closer & ((last > first) | (far < 1.0)), begin - step * far, end)
    return begin, end, inner_begin, tl.maximum(inner_end, bottom), last


@triton.jit
def _between(x, begin, end):
    """Below `begin` and not below `end`."""
    return (x >= end) & ~(x >= begin)


@triton.jit
def _keep_bracket(bounds_ptr, least, most, lowest, empty, masses, rung, top, heat, RUNGS: tl.constexpr):
    """Four bounds, the first two those of a bracket without tokens if it is to be `empty`; its first and last edge."""
    begin, end, inner_begin, inner_end, last = _bracket(least, most, lowest, masses, rung, top, heat, RUNGS)
    tl.store(bounds_ptr, tl.where(empty, -INFINITY, inner_begin))
    tl.store(bounds_ptr + 1, tl.where(empty, -INFINITY, inner_end))
    tl.store(bounds_ptr + 2, begin)
    tl.store(bounds_ptr + 3, end)
    return begin, last


@triton.jit
def _bound(
    heat_ptr, top_p_ptr, uniform_ptr, most_ptr, where_ptr, rough_ptr, bounds_ptr, listed_ptr, out_ptr, chunks,
    CHUNKS: tl.constexpr, RUNGS: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    overlap.begin()
    row = tl.program_id(0).to(tl.int64)
    nth = tl.arange(0, CHUNKS)
    heat = tl.load(heat_ptr + row)
    share, part = _part(tl.load(top_p_ptr + row)), _part(tl.load(uniform_ptr + row))
    keys = tl.load(most_ptr + row * chunks + nth, mask=nth < chunks, other=SMALLEST)
    highest = tl.max(keys, axis=0)
    if heat == 0.0:
        first = tl.load(where_ptr + row * chunks + nth, mask=nth < chunks, other=LARGEST)
        token = tl.min(tl.where(keys == highest, first, LARGEST), axis=0)
        tl.store(out_ptr + row, token.to(tl.int64))
    else:
        heat, top = tl.maximum(heat, COLDEST), _number(highest)
        bounds_ptr += BOUNDS * row
        tl.store(bounds_ptr, top)
        tl.store(listed_ptr + row, 0)
        masses, rung = _masses_above(keys, top, rough_ptr, row, chunks, heat, CHUNKS, RUNGS, COMPILED)
        limit = share * _at(masses, RUNGS - 1, RUNGS)
        low, high = limit * (1.0 - UNCERTAIN), limit * (1.0 + UNCERTAIN)
        # the end of a nucleus of all tokens need not be looked for
        begin, last = _keep_bracket(
            bounds_ptr + 1, low, high, RUNGS - 1, share == 1.0, masses, rung, top, heat, RUNGS
        )  # fmt: skip
        # the last of the nucleus may reach over the limit by a mass like that where its bracket begins
        kept = limit + tl.minimum(_rough_mass(begin, top, heat, COMPILED), 1.0)
        low, high = part * limit * (1.0 - UNCERTAIN), part * kept * (1.0 + UNCERTAIN)
        _keep_bracket(bounds_ptr + 5, low, high, last, False, masses, rung, top, heat, RUNGS)


# --- weigh: masses, and the tokens of the brackets --------------------------------------------------------------------


@triton.jit
def _ones(bits):
    """How many of the lower 16 bits are set."""
    bits -= (bits >> 1) & 0x5555
    bits = (bits & 0x3333) + ((bits >> 2) & 0x3333)
    bits = (bits + (bits >> 4)) & 0x0F0F
    return (bits + (bits >> 8)) & 0x1F


@triton.jit
def _units(high, low):
    """int64 of as many times 2^20 and units."""
    return (high.to(tl.int64) << 20) + low.to(tl.int64)


@triton.jit
def _weigh(
    logits_ptr, stride_m, heat_ptr, bounds_ptr, mass_ptr, listed_ptr, list_ptr, V,
    CHUNK: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    overlap.begin()
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, TILE)
    heat = tl.load(heat_ptr + row)
    bounds_ptr += BOUNDS * row
    top = tl.load(bounds_ptr)
    if (heat != 0.0) & (tl.abs(top) < INFINITY):
        heat = tl.maximum(heat, COLDEST)
        end_begin, end_end = tl.load(bounds_ptr + 1), tl.load(bounds_ptr + 2)
        pick_begin, pick_end = tl.load(bounds_ptr + 5), tl.load(bounds_ptr + 6)
        nothing = tl.full((TILE,), 0.0, tl.float32)
        high, low, end_high, end_low, pick_high, pick_low = nothing, nothing, nothing, nothing, nothing, nothing
        marks = tl.full((TILE,), 0, tl.int32)
        for t in tl.static_range(CHUNK // TILE):
            at = chunk * CHUNK + t * TILE + lane
            x = _logits(logits_ptr, stride_m, row, at, at < V)
            # 20 bits and 20 bits: FP32 adds up 16 of each without rounding
            weight = _weight(top - x, heat, MASS_POWER - 20, COMPILED)
            whole = tl.floor(weight)
            rest = tl.floor((weight - whole) * 1048576.0)
            from_end, from_pick = x >= end_begin, x >= pick_begin
            is_end, is_pick = tl.where(from_end, 1.0, 0.0), tl.where(from_pick, 1.0, 0.0)
            high += whole
            low += rest
            end_high, end_low = tl.fma(is_end, whole, end_high), tl.fma(is_end, rest, end_low)
            pick_high, pick_low = tl.fma(is_pick, whole, pick_high), tl.fma(is_pick, rest, pick_low)
            wanted = ((x >= end_end) & ~from_end) | ((x >= pick_end) & ~from_pick)
            marks += tl.where(wanted, 1 << t, 0)
        ends, picks = _units(end_high, end_low), _units(pick_high, pick_low)
        three = tl.join(tl.join(_units(high, low), ends), tl.join(picks, picks))
        nth = tl.arange(0, 2)[:, None] + 2 * tl.arange(0, 2)[None, :]
        here = row * tl.num_programs(1) + chunk
        tl.store(mass_ptr + 3 * here + nth, tl.sum(three, axis=0), mask=nth < 3)
        number = _ones(marks)
        before = tl.cumsum(number, axis=0)
        total = tl.max(before, axis=0)
        if total > 0:
            # in no certain order, which nothing that follows depends on
            place = tl.atomic_add(listed_ptr + row, total, sem="relaxed") + before - number
            while tl.max(marks, axis=0) > 0:
                lowest = marks & -marks
                at = chunk * CHUNK + _ones(lowest - 1) * TILE + lane
                x = _logits(logits_ptr, stride_m, row, at, marks > 0)
                entry = (~_key(x)).to(tl.int64) << 32 | at  # which rise as tokens rank
                tl.store(list_ptr + row * LISTED + place, entry, mask=(marks > 0) & (place < LISTED))
                marks -= lowest
                place += 1


# --- finish, among listed tokens --------------------------------------------------------------------------------------


@triton.jit
def _reaching(entry, mass, inside, above, need):
    """The first of the entries inside with which the mass reaches `need`, the mass with it, and whether there is one.
    above: the mass above those inside.
    """
    whole = tl.sum(tl.where(inside, mass, 0), axis=0)
    found = (above < need) & (need <= above + whole) & (whole < ONE)
    counted = tl.where(inside & found, mass + ONE, 0)
    low, high = tl.min(tl.where(inside, entry, MOST), axis=0) - 1, tl.max(tl.where(inside, entry, -MOST), axis=0)
    until_high = tl.sum(counted, axis=0)
    until_low = until_high * 0
    while until_high // ONE - until_low // ONE > 1:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        until = tl.sum(tl.where(entry <= middle, counted, 0), axis=0)
        enough = above + until % ONE >= need
        low, until_low = tl.where(enough, low, middle), tl.where(enough, until_low, until)
        high, until_high = tl.where(enough, middle, high), tl.where(enough, until, until_high)
    first = tl.max(tl.where(inside & (entry > low) & (entry <= high), entry, -MOST), axis=0)
    return first, above + until_high % ONE, found


@triton.jit
def _among(
    list_ptr, row, listed, limit, total, above_end, above_pick, uniform, bounds_ptr, top, heat,
    HELD: tl.constexpr, LISTED: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    """The mass of the nucleus and the token, from all listed tokens; -1 where the bracket does not have it."""
    nth = tl.arange(0, HELD)
    entry = tl.load(list_ptr + row * LISTED + nth, mask=nth < listed, other=MOST)
    x = _number(~(entry >> 32).to(tl.int32))
    mass = _mass(top - x, heat, COMPILED)
    kept = total
    if limit != total:
        inside = _between(x, tl.load(bounds_ptr + 1), tl.load(bounds_ptr + 2)) & (nth < listed)
        _, reached, found = _reaching(entry, mass, inside, above_end, limit)
        kept = tl.where(found, reached, -1)
    inside = _between(x, tl.load(bounds_ptr + 5), tl.load(bounds_ptr + 6)) & (nth < listed)
    token, _, found = _reaching(entry, mass, inside, above_pick, _target(uniform, kept) + 1)
    return kept, tl.where((kept > 0) & found, token.to(tl.int32), -1)


# --- finish, from all of a row ----------------------------------------------------------------------------------------


@triton.jit
def _of_two(
    need, above, begin, inner_begin, end, logits_ptr, stride_m, row, V, top, heat, BLOCK: tl.constexpr
):  # fmt: skip
    """`_bisect_row` of the tokens between two edges by their counts, if they have no more than two logits; and whether
    all this is so. above: the mass from inner_begin on.
    """
    first, second = tl.full((BLOCK,), -INFINITY, tl.float32), tl.full((BLOCK,), INFINITY, tl.float32)
    of_first, of_second = tl.full((BLOCK,), 0, tl.int32), tl.full((BLOCK,), 0, tl.int32)
    number = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = _logits(logits_ptr, stride_m, row, at, at < V)
        inside = _between(x, begin, end)
        number += inside.to(tl.int32)
        of_first = tl.where(inside & (x > first), 0, of_first) + (inside & (x >= first)).to(tl.int32)
        of_second = tl.where(inside & (x < second), 0, of_second) + (inside & (x <= second)).to(tl.int32)
        first = tl.where(inside & (x > first), x, first)
        second = tl.where(inside & (x < second), x, second)
    most, least, number = tl.max(first, axis=0), tl.min(second, axis=0), tl.sum(number, axis=0)
    of_first = tl.sum(tl.where(first == most, of_first, 0), axis=0)
    of_second = tl.where(least == most, 0, tl.sum(tl.where(second == least, of_second, 0), axis=0))
    first, second = most, least
    mass_first = tl.where(number > 0, of_first * _mass(top - first, heat, False), 0)
    mass_second = tl.where(number > 0, of_second * _mass(top - second, heat, False), 0)
    above -= tl.where(first >= inner_begin, mass_first, 0) + tl.where(second >= inner_begin, mass_second, 0)
    reached = above + mass_first
    enough = reached >= need
    known = (number > 0) & (number == of_first + of_second) & (above < need) & (need <= reached + mass_second)
    return _key(tl.where(enough, first, second)), tl.where(enough, above, reached), known


@triton.jit
def _bisect_row(need, logits_ptr, stride_m, row, V, top, heat, BLOCK: tl.constexpr, COMPILED: tl.constexpr):
    """The largest key such that tokens with it or above have the mass `need`; the mass of those above it."""
    low = _key(tl.full((), -INFINITY, tl.float32)).to(tl.int64)
    high = _key(top).to(tl.int64)
    above = tl.full((), 0, tl.int64)
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        total = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, V, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = _logits(logits_ptr, stride_m, row, at, at < V)
            total += tl.where(_key(x) >= middle.to(tl.int32), _mass(top - x, heat, COMPILED), 0)
        reached = tl.sum(total, axis=0)
        enough = reached >= need
        low = tl.where(enough, middle, low)
        above = tl.where(enough, above, reached)
        high = tl.where(enough, high, middle - 1)
    return low.to(tl.int32), above


@triton.jit
def _from_row(
    need, above, bounds_ptr, logits_ptr, stride_m, row, V, top, heat, BLOCK: tl.constexpr, COMPILED: tl.constexpr
):  # fmt: skip
    """`_bisect_row`, in the shorter way if there is one; bounds_ptr: of a bracket, and above: the mass above it."""
    inner_begin, begin, end = tl.load(bounds_ptr), tl.load(bounds_ptr + 2), tl.load(bounds_ptr + 3)
    key, reached, known = _of_two(need, above, begin, inner_begin, end, logits_ptr, stride_m, row, V, top, heat, BLOCK)
    if not known:
        key, reached = _bisect_row(need, logits_ptr, stride_m, row, V, top, heat, BLOCK, COMPILED)
    return key, reached


@triton.jit
def _nth_of_row(nth, wanted, logits_ptr, stride_m, row, V, BLOCK: tl.constexpr):
    """The token with the key `wanted` that nth others with it come before."""
    token, start = tl.full((), -1, tl.int32), tl.full((), 0, tl.int32)
    while (token < 0) & (start < V):
        at = start + tl.arange(0, BLOCK)
        equal = (_key(_logits(logits_ptr, stride_m, row, at, at < V)) == wanted) & (at < V)
        count = tl.cumsum(equal.to(tl.int32), axis=0)
        token = tl.max(tl.where(equal & (count == nth + 1), at, -1), axis=0)
        nth -= tl.max(count, axis=0)
        start += BLOCK
    return token


@triton.jit
def _among_equals(key, top_p, uniform, logits_ptr, stride_m, row, V, BLOCK: tl.constexpr):
    """The token of a row whose largest logits are not finite: all of the mass is theirs."""
    number = tl.full((BLOCK,), 0, tl.int32)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        number += ((_key(_logits(logits_ptr, stride_m, row, at, at < V)) == key) & (at < V)).to(tl.int32)
    total = tl.sum(number, axis=0).to(tl.int64) << MASS_POWER
    kept = _whole(_limit(top_p, total), 0, (total * 0 + 1) << MASS_POWER)
    before = (_target(uniform, kept) >> MASS_POWER).to(tl.int32)
    return _nth_of_row(before, key, logits_ptr, stride_m, row, V, BLOCK)


@triton.jit
def _whole(limit, above, each):
    """Mass of the nucleus whose last tokens, equal ones, have the mass `each`."""
    return above + (limit - above + each - 1) // each * each


@triton.jit
def _finish(
    logits_ptr, stride_m, heat_ptr, top_p_ptr, uniform_ptr, bounds_ptr, mass_ptr, listed_ptr, list_ptr,
    out_ptr, chunks, V,
    CHUNKS: tl.constexpr, LISTED: tl.constexpr, FEW: tl.constexpr, BLOCK: tl.constexpr, COMPILED: tl.constexpr,
):  # fmt: skip
    overlap.begin()
    row = tl.program_id(0).to(tl.int64)
    heat, top_p, uniform = tl.load(heat_ptr + row), tl.load(top_p_ptr + row), tl.load(uniform_ptr + row)
    if heat != 0.0:
        heat = tl.maximum(heat, COLDEST)
        bounds_ptr += BOUNDS * row
        top = tl.load(bounds_ptr)
        if tl.abs(top) < INFINITY:
            listed = tl.load(listed_ptr + row)
            nth = tl.arange(0, CHUNKS)
            at = mass_ptr + (row * chunks + nth) * 3
            total = tl.sum(tl.load(at, mask=nth < chunks, other=0), axis=0)
            above_end = tl.sum(tl.load(at + 1, mask=nth < chunks, other=0), axis=0)
            above_pick = tl.sum(tl.load(at + 2, mask=nth < chunks, other=0), axis=0)
            limit = _limit(top_p, total)
            kept, token = tl.full((), -1, tl.int64), tl.full((), -1, tl.int32)
            if listed <= FEW:
                kept, token = _among(
                    list_ptr, row, listed, limit, total, above_end, above_pick, uniform, bounds_ptr, top, heat,
                    FEW, LISTED, COMPILED,
                )  # fmt: skip
            elif listed <= LISTED:
                kept, token = _among(
                    list_ptr, row, listed, limit, total, above_end, above_pick, uniform, bounds_ptr, top, heat,
                    LISTED, LISTED, COMPILED,
                )  # fmt: skip
            if token < 0:
                if kept < 0:
                    kept = total
                    if limit != total:
                        key, above = _from_row(
                            limit, above_end, bounds_ptr + 1, logits_ptr, stride_m, row, V, top, heat, BLOCK, COMPILED
                        )  # fmt: skip
                        kept = _whole(limit, above, tl.maximum(_mass_of(key, top, heat), 1))
                target = _target(uniform, kept)
                key, above = _from_row(
                    target + 1, above_pick, bounds_ptr + 5, logits_ptr, stride_m, row, V, top, heat, BLOCK, COMPILED
                )  # fmt: skip
                before = ((target - above) // tl.maximum(_mass_of(key, top, heat), 1)).to(tl.int32)
                token = _nth_of_row(before, key, logits_ptr, stride_m, row, V, BLOCK)
        else:
            token = _among_equals(_key(top), top_p, uniform, logits_ptr, stride_m, row, V, BLOCK)
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
    listed, places = room(), room(LISTED, dtype=torch.int64)
    weighed = (bounds, mass, listed, places)
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
    types |= dict.fromkeys(("most_ptr", "where_ptr", "listed_ptr"), "*i32")
    types |= dict.fromkeys(("mass_ptr", "list_ptr", "out_ptr"), "*i64")
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    return host.build(kernel, types, _constants(kernel, problem.vocab, config, True), arch, _warps(kernel, config))


def _warps(kernel: Any, config: Config) -> int:
    return {_bound: BOUND_WARPS, _finish: FINISH_WARPS}.get(kernel, config.num_warps)


def _constants(kernel: Any, vocab: int, config: Config, compiled: bool) -> dict[str, int]:
    chunks = triton.next_power_of_2(triton.cdiv(vocab, config.chunk))
    all = {"CHUNK": config.chunk, "CHUNKS": chunks, "RUNGS": RUNGS, "LISTED": LISTED, "FEW": FEW, "BLOCK": BISECTED}
    all |= {"TILE": min(config.chunk, 128 * config.num_warps), "COMPILED": compiled}
    return {name: c for name, c in all.items() if name in kernel.arg_names}
