"""Expert choice of each token: scores, top-k with ties to the lowest expert, weights renormalised; one launch.

Bound by issue where experts are chosen by score: a score takes 60 instructions and every round of the choice five an
expert, against 4 bytes read. So with `presort` the GPU's approximate functions find candidates first, as numbers that
hold their expert in the low bits, and only those are scored exactly. That is the exact choice if the last chosen lies
above the first that is no candidate by more than both can be off; candidates are added until that is so, up to 32, and
else (many ties, infinities, NaN) all are scored exactly. Each lane of a warp holds its first five keys in order and
then one candidate, so that all are scored at once and exchanged by shuffles. `turns` saves programs, which take time to
be started; a program asks for its next token's logits before it works on the present one's.
Where a table of token ids chooses, only the chosen logits are read, once the table is there, which is read once the
token is there: with `ahead` all logits come meanwhile, and the chosen ones are picked from shared memory, so that a
token waits for memory twice, not three times. Few tokens wait for their code too, which is cold: it is short.
One program block_m tokens, with their scores in registers as order-preserving integers, CHUNK experts a tile.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import RouteProblem
from fp4suite.reference import router

from . import host
from .nvfp4 import CVT, LOG2E, exp_neg, pair_sum, widen
from .overlap import begin

MOST_EXPERTS = 1024
MOST_TOPK = 32
CHUNK = 128
HELD = 128  # keys of a thread at most
MOST_IN_LANES = 16  # experts that leave a warp's lanes room for as many in doubt
SPARE = 2  # candidates beyond the topk: how often there are more falls by a factor of some 20 with each

UNDERFLOW = tl.constexpr(router.UNDERFLOW)
LOG1P_0, LOG1P_1, LOG1P_2, LOG1P_3, LOG1P_4, LOG1P_5, LOG1P_6, LOG1P_7 = (
    tl.constexpr(c) for c in router.LOG1P_COEFFICIENTS
)
LANES = tl.constexpr(32)
LARGEST = tl.constexpr(0x7FFFFFFF)
TAKEN = tl.constexpr(-0x80000000)
# How far an exact score may lie above one whose low bits are the expert's (13 or more are left), with both off. Rough
# scores of logits within 2^16 are off by 2^-14 + 2^-20 of themselves: log1p by 2^-14 of itself, ex2.approx and
# sqrt.approx by less, every rounding by 2^-24. Cutting bits lowers a number by 2^-13 of itself at most.
SLACK = tl.constexpr(2.0**-10)
RELATIVE_SLACK = tl.constexpr(2.0**-12)
ROUGH_LOGITS = tl.constexpr(0x47800000)  # 2^16 as an integer
# log1p(e) / e on 0 < e <= 1, within 6e-5 relative
ROUGH_0, ROUGH_1, ROUGH_2, ROUGH_3, ROUGH_4 = (
    tl.constexpr(c)
    for c in (0.9999432563781738, -0.496977835893631, 0.30630096793174744, -0.15742723643779755, 0.041347306221723557)
)
LARGE, LARGE_KEY = tl.constexpr(1e30), tl.constexpr(0x7149F2CA)  # as an integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m tokens a program; presort: candidates by approximate scores first; ahead: logits before a table's.

    turns: so many times block_m tokens a program, the next ones' logits asked for before the present ones' keys are
    ranked.
    """

    block_m: int = 1
    num_warps: int = 1
    presort: bool = False
    ahead: bool = False
    turns: int = 1


SPACE = {
    "block_m": (1, 2, 4, 16),
    "num_warps": (1, 2, 4, 8, 16),
    "presort": (False, True),
    "ahead": (False, True),
    "turns": (1, 2, 4),
}
AHEAD_TOKENS = 1024
TURNS_TOKENS = 2048


def default(problem: RouteProblem) -> Config:
    """A warp a token: where one token's scores have to be exact, no other warp waits for them; of many tokens it takes
    two. By a table, several warps a token that ask for its logits ahead; many tokens share programs.
    """
    if problem.choice != "table":
        if problem.topk > MOST_IN_LANES or problem.experts <= _candidates(problem.topk):
            return Config()
        return Config(presort=True, turns=2 if problem.m >= TURNS_TOKENS else 1)
    if problem.m <= AHEAD_TOKENS:
        return Config(num_warps=4, ahead=True)
    return Config(block_m=4)


def supports(problem: RouteProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.x not in host.DTYPES:
        return f"logits in {problem.x}, not one of {', '.join(host.DTYPES)}"
    if not 1 <= problem.topk <= min(problem.experts, MOST_TOPK):
        return f"topk={problem.topk} is not in 1 .. min(experts={problem.experts}, {MOST_TOPK})"
    if problem.experts > MOST_EXPERTS:
        return f"experts={problem.experts} is over {MOST_EXPERTS}"
    if config.presort and problem.choice == "table":
        return "presort=True is for a choice by scores"
    if config.presort and problem.experts <= _candidates(problem.topk):
        return f"presort=True takes {_candidates(problem.topk)} candidates and needs more experts"
    if config.presort and problem.topk > MOST_IN_LANES:
        return f"presort=True chooses up to {MOST_IN_LANES} experts, got topk={problem.topk}"
    if config.presort and config.num_warps != config.block_m:
        return f"presort=True gives each token a warp, got block_m={config.block_m} num_warps={config.num_warps}"
    if config.turns > 1 and (not config.presort or config.num_warps > 1):
        return f"turns={config.turns} are for presort=True and a warp a program"
    if config.ahead and problem.choice != "table":
        return "ahead=True is for a table's choice"
    if config.num_warps > 4 * config.block_m or (config.num_warps > 4 and not config.ahead):
        return f"num_warps={config.num_warps}: at most four hold a token's logits ahead, and without them four do"
    if problem.choice != "table" and config.num_warps > config.block_m:
        return f"num_warps={config.num_warps}: block_m={config.block_m} tokens are chosen for by a warp each at most"
    wide = CHUNK * _chunks(problem.experts) if problem.choice != "table" or config.ahead else 1
    held = config.block_m * wide / (32 * config.num_warps)
    return None if held <= HELD else f"{held:g} keys a thread spill: {HELD} are held"


@triton.jit
def _affinity(x):
    """sqrt(softplus(x)) by the operations of `reference.router`."""
    magnitude = tl.abs(x)
    e = tl.where(magnitude < UNDERFLOW, exp_neg(magnitude), 0.0)
    p = (((((LOG1P_7 * e + LOG1P_6) * e + LOG1P_5) * e + LOG1P_4) * e + LOG1P_3) * e + LOG1P_2) * e
    p = (p + LOG1P_1) * e + LOG1P_0
    return tl.sqrt_rn(tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + p * e)


@triton.jit
def _ordered(x):
    """FP32 -> int32 in the same order, NaN above all."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & LARGEST), LARGEST)


@triton.jit
def _keys(logits_ptr, stride_m, bias_ptr, rows, cols, inside, E, BIASED: tl.constexpr):
    """What rows and columns rank by, as integers in the same order; what lies outside below all."""
    s = _affinity(widen(tl.load(logits_ptr + rows[:, None] * stride_m + cols[None, :], mask=inside, other=0.0)))
    if BIASED:
        s += tl.load(bias_ptr + cols, mask=cols < E, other=0.0)[None, :]
    return tl.where(inside, _ordered(s), TAKEN)


@triton.jit
def _choose(
    logits_ptr, stride_m, bias_ptr, rows, in_rows, E,
    BIASED: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The experts of each row by falling key, the lowest first among equals: int32 [ROWS, CHOICES]."""
    cols = tl.arange(0, CHUNK)
    keys: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + cols
        inside = in_rows[:, None] & (at < E)[None, :]
        keys += (_keys(logits_ptr, stride_m, bias_ptr, rows, at, inside, E, BIASED),)
    choice = tl.arange(0, CHOICES)
    ids = tl.full((ROWS, CHOICES), 0, tl.int32)
    for j in tl.static_range(TOPK):
        most = keys[0]
        for c in tl.static_range(1, CHUNKS):
            most = tl.maximum(most, keys[c])
        best = tl.max(most, axis=1)[:, None]
        where = tl.where(keys[0] == best, cols[None, :], LARGEST)
        for c in tl.static_range(1, CHUNKS):
            where = tl.minimum(where, tl.where(keys[c] == best, c * CHUNK + cols[None, :], LARGEST))
        expert = tl.min(where, axis=1)[:, None]
        ids = tl.where(choice[None, :] == j, expert, ids)
        left: tl.tuple = ()
        for c in tl.static_range(CHUNKS):
            left += (tl.where(c * CHUNK + cols[None, :] == expert, TAKEN, keys[c]),)
        keys = left
    return ids


@triton.jit
def _rough_affinity(x):
    e = tl.exp2(tl.abs(x) * -LOG2E)
    p = tl.fma(tl.fma(tl.fma(tl.fma(e, ROUGH_4, ROUGH_3), e, ROUGH_2), e, ROUGH_1), e, ROUGH_0)
    return tl.sqrt(tl.fma(p, e, tl.maximum(x, 0.0)))


# Loads before it are asked for before what is after it: ptxas would ask for the logits when the token's registers are
# free again, after the wait for it, and for the bias likewise. The move is there as assembly has to give something.
_IN_ORDER = tl.constexpr("bar.warp.sync -1; mov.b32 $0, $1;")


@triton.jit
def _scores(logits_ptr, stride_m, rows, ids, chosen):
    return _affinity(widen(tl.load(logits_ptr + rows[:, None] * stride_m + ids, mask=chosen, other=0.0)))


@triton.jit(do_not_specialize=["M", "V"])
def _route(
    logits_ptr,
    stride_m,
    bias_ptr,
    token_ptr,
    table_ptr,
    ids_ptr,
    weights_ptr,
    M,
    V,
    E,
    scale,
    CHOICE: tl.constexpr,
    AHEAD: tl.constexpr,
    TOPK: tl.constexpr,
    CHOICES: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    begin()
    # int64 before the multiply: a long batch of logits and a large table pass 2**31 elements
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = first + tl.arange(0, ROWS)
    count = tl.minimum(M - tl.program_id(0) * BLOCK_M, BLOCK_M)
    in_rows = tl.arange(0, ROWS) < count
    choice = tl.arange(0, CHOICES)
    inside = in_rows[:, None] & (choice < TOPK)[None, :]
    if CHOICE == "table":
        if AHEAD:
            # flat, as tokens by experts would cross shared memory nine times in place of one
            at = tl.arange(0, BLOCK_M * WIDE)
            row, col = at // WIDE, at % WIDE
            x = tl.load(logits_ptr + (first + row) * stride_m + col, mask=(row < count) & (col < E), other=0.0)
            if CVT:
                tl.inline_asm_elementwise(_IN_ORDER, "=r,r", [M], dtype=tl.int32, is_pure=False, pack=1)
        token = tl.load(token_ptr + rows, mask=in_rows, other=-1).to(tl.int64)[:, None]
        known = inside & (token.to(tl.uint64) < V)  # what is negative is too large
        ids = tl.load(table_ptr + token * TOPK + choice[None, :], mask=known, other=-1).to(tl.int32)
    else:
        ids = _choose(
            logits_ptr, stride_m, bias_ptr, rows, in_rows, E,
            CHOICE == "bias", TOPK, CHOICES, BLOCK_M, CHUNKS, CHUNK,
        )  # fmt: skip
    chosen = inside & (ids.to(tl.uint32) < E)
    if AHEAD:
        at = tl.where(chosen, tl.arange(0, ROWS)[:, None] * WIDE + ids, 0)
        s = _affinity(widen(tl.gather(x, at.reshape(ROWS * CHOICES), axis=0).reshape(ROWS, CHOICES)))
    else:
        s = _scores(logits_ptr, stride_m, rows, ids, chosen)
    s = tl.where(chosen, s, 0.0)
    total = pair_sum(s.reshape(ROWS, 1, CHOICES), ROWS, 1, CHOICES)
    at = rows[:, None] * TOPK + choice[None, :]
    tl.store(ids_ptr + at, ids, mask=inside)
    # 1 where nothing is stored: a dividend of 0 may take the division's slow path, a call to code far away
    weights = tl.div_rn(tl.where(inside, s, 1.0), total + 1e-20) * scale
    tl.store(weights_ptr + at, weights, mask=inside)


@triton.jit
def _four(x, ROWS: tl.constexpr):
    """x [ROWS, CHUNK] -> four [ROWS, LANES], the columns of each lane."""
    even, odd = tl.split(x.reshape(ROWS, LANES, 2, 2))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _ordered_pair(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)


@triton.jit
def _first_five(first, keys):
    """The five greatest, in falling order, of those of before (a five, or nothing) and of four others."""
    a, b, c, d = keys
    a, b = _ordered_pair(a, b)
    c, d = _ordered_pair(c, d)
    a, c = _ordered_pair(a, c)
    b, d = _ordered_pair(b, d)
    b, c = _ordered_pair(b, c)
    if len(first) == 0:
        return a, b, c, d, tl.full(a.shape, TAKEN, tl.int32)
    else:
        # of two fours in falling order, the greater of the first and the last, of the second and the last but one ...
        a, h = _ordered_pair(a, first[3])
        b, g = _ordered_pair(b, first[2])
        c, f = _ordered_pair(c, first[1])
        d, e = _ordered_pair(d, first[0])
        rest = tl.maximum(tl.maximum(tl.maximum(e, f), tl.maximum(g, h)), first[4])
        a, c = _ordered_pair(a, c)
        b, d = _ordered_pair(b, d)
        a, b = _ordered_pair(a, b)
        c, d = _ordered_pair(c, d)
        return a, b, c, d, rest


@triton.jit
def _rows_of_logits(logits_ptr, stride_m, first, M, E, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Logits of rows from `first` on: CHUNKS tensors [ROWS, CHUNK]."""
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, CHUNK)
    x: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        at = c * CHUNK + cols
        inside = (rows < M)[:, None] & (at < E)[None, :]
        x += (tl.load(logits_ptr + rows[:, None] * stride_m + at[None, :], mask=inside, other=0.0),)
    return x


@triton.jit
def _added(bias_ptr, E, BIASED: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """What rough scores get added: CHUNKS tensors [ROWS, CHUNK], by which an expert that does not exist comes last."""
    added: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        # a copy for each row: one row would be shared out among the warps and cross shared memory
        at = c * CHUNK + tl.arange(0, CHUNK)[None, :] + tl.zeros([ROWS, 1], tl.int32)
        if BIASED:
            added += (tl.load(bias_ptr + at, mask=at < E, other=float("-inf")),)
        else:
            added += (tl.where(at < E, 0.0, float("-inf")),)
    return added


@triton.jit
def _first_of_lanes(x, added, EXPERT_BITS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Rough keys of logits, of each lane the first five in falling order: five of [ROWS, LANES]. Above all of them is
    LARGEST where a lane has a logit that rough scores are not made for.
    """
    first: tl.tuple = ()
    for c in tl.static_range(CHUNKS):
        wide = widen(x[c])
        bits = wide.to(tl.int32, bitcast=True)
        if c == 0:
            largest = bits
        else:
            largest = tl.maximum(largest, bits)
        s = _rough_affinity(wide) + added[c]
        key = s.to(tl.int32, bitcast=True)
        if not CVT:
            key = tl.where(s == s, key, LARGEST)  # the GPU's own NaN comes out of any sum, and is this
        key = (key & (-1 << EXPERT_BITS)) | (c * CHUNK + tl.arange(0, CHUNK))[None, :]
        first = _first_five(first, _four(key ^ ((key >> 31) & LARGEST), ROWS))
    a, b, c, d = _four(largest, ROWS)
    beyond = tl.maximum(tl.maximum(a, b), tl.maximum(c, d)) >= ROUGH_LOGITS
    return tl.where(beyond, LARGEST, first[0]), first[1], first[2], first[3], first[4]


@triton.jit
def _pop(first):
    """The greatest key [ROWS, 1], and what is left in lanes: LARGEST after the fifth of one, as no more is known."""
    best = tl.max(first[0], axis=1)[:, None]
    taken = first[0] == best
    return best, (
        tl.where(taken, first[1], first[0]),
        tl.where(taken, first[2], first[1]),
        tl.where(taken, first[3], first[2]),
        tl.where(taken, first[4], first[3]),
        tl.where(taken, LARGEST, first[4]),
    )


@triton.jit
def _number(key, EXPERT_BITS: tl.constexpr):
    """The rough score of a key of lanes."""
    return ((key ^ ((key >> 31) & LARGEST)) & (-1 << EXPERT_BITS)).to(tl.float32, bitcast=True)


@triton.jit
def _doubt(in_rows, hopeful, chosen, best, EXPERT_BITS: tl.constexpr):
    """0 where the key `best` is of an expert that is below the one that was chosen last, 1 where its rough score leaves
    that in doubt, 2 where rough scores cannot say; the greatest of all rows.
    """
    missed = _number(best, EXPERT_BITS)
    below = missed + (SLACK + RELATIVE_SLACK * tl.maximum(tl.abs(chosen), tl.abs(missed))) < chosen
    doubt = tl.where(hopeful, tl.where(below, 0, tl.where(best == LARGEST, 2, 1)), 2)
    return tl.max(tl.where(in_rows[:, None], doubt, 0))


@triton.jit
def _of_lane(x, lane):
    return tl.gather(x, tl.broadcast_to(lane, x.shape), axis=1)


@triton.jit
def _ranked(
    logits_ptr, stride_m, bias_ptr, rows, in_rows, found, count, EXPERT_BITS: tl.constexpr, BIASED: tl.constexpr,
    SET: tl.constexpr,
):  # fmt: skip
    """The `count` <= SET candidates, those of the lanes of found [ROWS, LANES], in the exact order, with their scores.

    Lane l has candidate l % SET and compares it with SET * SET / LANES others: SET is 8 or more.
    """
    EACH: tl.constexpr = SET * SET // LANES
    lane = tl.arange(0, LANES)[None, :]
    if SET < LANES:
        found = _of_lane(found, lane % SET)
    candidates = (found ^ (found >> 31)) & ((1 << EXPERT_BITS) - 1)
    x = tl.load(logits_ptr + rows[:, None] * stride_m + candidates, mask=in_rows[:, None], other=0.0)
    if BIASED:
        added = tl.load(bias_ptr + candidates, mask=in_rows[:, None], other=0.0)
        s = _affinity(widen(x))
        key = _ordered(s + added)
    else:
        s = _affinity(widen(x))
        key = _ordered(s)
    key = tl.where(lane % SET < count, key, TAKEN)
    others = lane // SET * EACH
    rank = tl.zeros(key.shape, tl.int32)
    for j in tl.static_range(EACH):
        other, expert = _of_lane(key, others + j), _of_lane(candidates, others + j)
        rank += ((other > key) | ((other == key) & (expert < candidates))).to(tl.int32)
    rank = _over_sets(rank, SET)
    source = tl.zeros(key.shape, tl.int32)
    for j in tl.static_range(EACH):
        source += tl.where(_of_lane(rank, others + j) == lane % SET, others + j, 0)
    source = _over_sets(source, SET) % LANES  # whatever it is where there is no candidate of that rank
    return tl.gather(candidates, source, axis=1), tl.gather(s, source, axis=1)


@triton.jit
def _over_sets(x, SET: tl.constexpr):
    """Sums over the lanes that are the same modulo SET."""
    for level in tl.static_range(5):
        if SET << level < LANES:
            x += _of_lane(x, tl.arange(0, LANES)[None, :] ^ (SET << level))
    return x


@triton.jit(do_not_specialize=["M"])
def _route_in_lanes(
    logits_ptr, stride_m, bias_ptr, ids_ptr, weights_ptr, M, E, scale,
    BIASED: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, CANDIDATES: tl.constexpr,
    EXPERT_BITS: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """As `_route` by scores, candidates by rough keys first. A lane has what is known of one, then of one chosen."""
    begin()
    lane = tl.arange(0, LANES)[None, :]
    added = _added(bias_ptr, E, BIASED, BLOCK_M, CHUNKS, CHUNK)
    # int64 before the multiply: a long batch of logits passes 2**31 elements
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    x = _rows_of_logits(logits_ptr, stride_m, first_row, M, E, BLOCK_M, CHUNKS, CHUNK)
    if CVT:
        tl.inline_asm_elementwise(_IN_ORDER, "=r,r", [M], dtype=tl.int32, is_pure=False, pack=1)
    for _turn in range(TURNS):
        rows = first_row + tl.arange(0, BLOCK_M)
        in_rows = rows < M
        first_row += tl.num_programs(0) * BLOCK_M
        if TURNS > 1:
            ahead = _rows_of_logits(logits_ptr, stride_m, first_row, M, E, BLOCK_M, CHUNKS, CHUNK)
        first = _first_of_lanes(x, added, EXPERT_BITS, BLOCK_M, CHUNKS, CHUNK)
        found = tl.zeros((BLOCK_M, LANES), tl.int32)
        for j in tl.static_range(TOPK):
            best, first = _pop(first)
            if j == 0:
                hopeful = best < LARGE_KEY
            found = tl.where(lane == j, best, found)
        chosen, count = _number(best, EXPERT_BITS), TOPK
        best, first = _pop(first)
        doubt = _doubt(in_rows, hopeful, chosen, best, EXPERT_BITS)
        # what is near is a candidate, too, until there are as many as lanes
        while (doubt == 1) & (count < LANES):
            found = tl.where(lane == count, best, found)
            count += 1
            best, first = _pop(first)
            doubt = _doubt(in_rows, hopeful, chosen, best, EXPERT_BITS)
        if doubt > 0:
            ids = _choose(
                logits_ptr, stride_m, bias_ptr, rows, in_rows, E, BIASED, TOPK, LANES, BLOCK_M, CHUNKS, CHUNK
            )  # fmt: skip
            s = _scores(logits_ptr, stride_m, rows, ids, in_rows[:, None] & (lane < TOPK))
        elif count <= CANDIDATES:
            ids, s = _ranked(
                logits_ptr, stride_m, bias_ptr, rows, in_rows, found, count, EXPERT_BITS, BIASED, CANDIDATES
            )  # fmt: skip
        else:
            ids, s = _ranked(
                logits_ptr, stride_m, bias_ptr, rows, in_rows, found, count, EXPERT_BITS, BIASED, LANES
            )  # fmt: skip
        inside = in_rows[:, None] & (lane < TOPK)
        total = tl.where(lane < TOPK, s, 0.0)
        for level in tl.static_range(5):
            if 1 << level < CHOICES:
                total += _of_lane(total, lane ^ (1 << level))
        at = rows[:, None] * TOPK + lane
        tl.store(ids_ptr + at, ids, mask=inside)
        # 1 where nothing is stored: as in `_route`
        weights = tl.div_rn(tl.where(inside, s, 1.0), tl.where(inside, total + 1e-20, 1.0)) * scale
        tl.store(weights_ptr + at, weights, mask=inside)
        if TURNS > 1:
            x = ahead


def launch(
    logits: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    table: Tensor | None,
    scale: float,
    out: tuple[Tensor, Tensor],
    config: Config,
) -> None:
    """logits [m, experts], rows of any stride, bias float32 [experts] -> ids int32 and weights float32 [m, topk].

    With token_ids int [m] and table int [vocab, topk], both contiguous, the table chooses; a token id outside of it
    gets the expert -1, and an expert that does not exist the weight 0.
    """
    ids, weights = out
    (m, experts), topk = logits.shape, ids.shape[1]
    if m == 0:
        return
    choice = "table" if table is not None else "bias" if bias is not None else "score"
    if config.presort:
        grid = (triton.cdiv(m, config.block_m * config.turns),)
        _route_in_lanes[grid](
            logits, host.row_stride(logits), bias, ids, weights, m, experts, scale,
            **_constants_in_lanes(choice, experts, topk, config), num_warps=config.num_warps, **host.OPTIONS,
        )  # fmt: skip
        return
    vocab = len(table) if table is not None else 0
    operands = (logits, host.row_stride(logits), bias, token_ids, table, ids, weights, m, vocab, experts, scale)
    constants = _constants(choice, experts, topk, config)
    _route[(triton.cdiv(m, config.block_m),)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: RouteProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    logits = torch.zeros(1, problem.experts, dtype=host.DTYPES[problem.x], device="cuda")
    bias = logits[0].float() if problem.choice == "bias" else None
    table = logits.new_zeros(1, problem.topk, dtype=torch.int32) if problem.choice == "table" else None
    tokens = logits.new_zeros(1, dtype=torch.int64) if problem.choice == "table" else None
    out = logits.new_empty(1, problem.topk, dtype=torch.int32), logits.new_empty(1, problem.topk, dtype=torch.float32)
    launch(logits, bias, tokens, table, 1.0, out, config)


def build_key(problem: RouteProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch, experts within their chunks."""
    return problem.x, problem.choice, problem.topk, _chunks(problem.experts)


def build(problem: RouteProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"logits_ptr": f"*{problem.x}", "stride_m": "i32", "ids_ptr": "*i32", "weights_ptr": "*fp32"}
    types |= {"M": "i32", "E": "i32", "scale": "fp32"}
    if config.presort:
        constants = _constants_in_lanes(problem.choice, problem.experts, problem.topk, config)
        if problem.choice == "bias":
            types["bias_ptr"] = "*fp32"
        else:
            constants["bias_ptr"] = None
        return host.build(_route_in_lanes, types, constants, arch, config.num_warps, unaligned=("M",))
    types["V"] = "i32"
    constants = _constants(problem.choice, problem.experts, problem.topk, config)
    absent = {"bias_ptr": "*fp32", "token_ptr": "*i64", "table_ptr": "*i32"}
    present = {"score": (), "bias": ("bias_ptr",), "table": ("token_ptr", "table_ptr")}[problem.choice]
    types |= {name: absent.pop(name) for name in present}
    return host.build(_route, types, constants | dict.fromkeys(absent), arch, config.num_warps, unaligned=("M", "V"))


def _constants(choice: str, experts: int, topk: int, config: Config) -> dict[str, Any]:
    choices = triton.next_power_of_2(topk)
    # Rows that are not there, but fill the warps: a choice a thread, so that no sum has to move between layouts.
    # Without `ahead` Triton 3.6 would move them through shared memory (13 barriers by four warps).
    filled = 32 * config.num_warps // choices if config.ahead else 1
    return {
        "CHOICE": choice,
        "AHEAD": config.ahead,
        "TOPK": topk,
        "CHOICES": choices,
        "CHUNKS": _chunks(experts),
        "CHUNK": CHUNK,
        "WIDE": triton.next_power_of_2(experts),
        "BLOCK_M": config.block_m,
        "ROWS": max(config.block_m, filled),
    }


def _constants_in_lanes(choice: str, experts: int, topk: int, config: Config) -> dict[str, Any]:
    constants = _constants(choice, experts, topk, config)
    return {name: constants[name] for name in ("TOPK", "CHOICES", "CHUNKS", "CHUNK", "BLOCK_M")} | {
        "BIASED": choice == "bias",
        "CANDIDATES": max(8, _candidates(topk)),
        "EXPERT_BITS": (CHUNK * _chunks(experts) - 1).bit_length(),
        "TURNS": config.turns,
    }


def _candidates(topk: int) -> int:
    return triton.next_power_of_2(topk + SPARE)


def _chunks(experts: int) -> int:
    return triton.cdiv(experts, CHUNK)
