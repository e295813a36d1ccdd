"""Compressed KV entries: pooling over rings and a step's tokens, then norm, RoPE, Hadamard, encoding and insertion.

Memory bound where tokens are many: reads 8 bytes a channel of every token (FP32 kv and gate) and writes as much for the
tokens that stay in the ring; of an entry that began before this step it reads the rows that the ring has of it. Where
tokens are few, bound by the chain of loads, which is two long: where an entry's rows lie, then all of them at once.

One program an entry and block of channels: a pool of 128 rows of 512 channels is 512 KB, too much for one program to
read while the others of the GPU have nothing to do. Where channels are split, the entry's sum of squares is not known
before all of them are pooled, so that a second launch norms and stores it; else one launch does all.

Entries of which the ring has rows, at most two a sequence, have a program each, and no row of a ring is read by both.
Each writes the ring afterwards, behind a barrier, where it has read, and the second one wherever nobody has: so that of
a single token, which overwrites nothing that its entry needs, is written while that is pooled. All other entries lie in
the step as a whole, at least `ratio` tokens from the next, so that each run of `ratio` tokens has no more than one.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import IndexCache, PagedCache, index_layout, kv_layout
from fp4suite.problem import CompressKvProblem
from fp4suite.reference import compressor

from . import cache_rows, host
from .hadamard import hadamard
from .nvfp4 import LOG2E, SUM_CHUNK, exp2_times, row_sum, widen
from .overlap import begin
from .rope import load_angles, pair_angles, turn

LANES = tl.constexpr(compressor.LANES)
MOST_BELOW = tl.constexpr(compressor.MOST_BELOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_c channels of an entry a program; as many as the entry has, or more, need no second launch."""

    block_c: int = 512
    num_warps: int = 4


SPACE = {"block_c": (16, 32, 64, 128, 512), "num_warps": (1, 2, 4)}
FINISH_WARPS = 2  # of the second launch: a row a program; by one it takes 0.3 us more, by four as long (H100)
COUNTS = ("TOKENS", "SEQUENCES", "EACH", "POSITIONS")
MANY_PROGRAMS = 1152  # some eight on each SM of an H100
MOST_HELD = 64  # channels of rows in a thread, each a value and a score


def supports(problem: CompressKvProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    p, padded = problem, triton.next_power_of_2(problem.head_dim)
    if why := cache_rows.refuse(p.format, p.head_dim, 0 if p.format.startswith("index_") else p.rope_dim):
        return why
    if p.hadamard and padded != p.head_dim:
        return f"a Hadamard transform needs a power of two, got head_dim={p.head_dim}"
    pooled = p.ratio * p.overlaps
    if config.block_c < padded and pooled <= 2 * compressor.LANES:
        return f"block_c={config.block_c}: pools of {pooled} rows are short enough for whole entries"
    each = compressor.LANES * min(config.block_c, padded) / (32 * config.num_warps)
    held = each * -(-pooled // compressor.LANES)
    if each < 1 or held > MOST_HELD:
        knobs = f"block_c={config.block_c} num_warps={config.num_warps}"
        return f"{knobs}: {held:g} channels of {pooled} rows a thread, held are 1 of eight rows to {MOST_HELD} of all"
    return None


def default(problem: CompressKvProblem) -> Config:
    """Whole entries of short pools, two to four channels a thread; long ones by blocks of channels, as few of them as
    make a thousand programs.
    """
    padded = triton.next_power_of_2(problem.head_dim)
    if problem.ratio * problem.overlaps <= 2 * compressor.LANES:
        return Config(block_c=padded, num_warps=max(1, min(4, padded // 64)))
    rows = problem.sequence_count + problem.entries
    narrow = next((c for c in (16, 32) if rows * -(-padded // c) <= MANY_PROGRAMS), 64)
    return Config(block_c=min(narrow, padded), num_warps=4)


@triton.jit
def _of_sequence(positions_ptr, cu_seqlens_ptr, sequence, EACH, RATIO: tl.constexpr):
    """First token of a sequence, its end, the position of the first, and the first that completes an entry."""
    guess = sequence * EACH  # right where all sequences have as many tokens: then no load waits for another
    position = tl.load(positions_ptr + guess)
    first = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    if first != guess:
        position = tl.load(positions_ptr + first, mask=first < end, other=0)
    return first, end, position, first + RATIO - 1 - position % RATIO


@triton.jit
def _larger_of_both(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _of_run(sequence_ids_ptr, positions_ptr, run, TOKENS, RATIO: tl.constexpr, POOLED: tl.constexpr):
    """The token that completes an entry of tokens of this step alone, among RATIO tokens, and its position; of both
    -1 where none does. The position comes with it, so that no load in between others waits for this one."""
    i = tl.arange(0, triton.next_power_of_2(RATIO))
    at = run * RATIO + i
    inside = (i < RATIO) & (at < TOKENS)
    sequences = tl.load(sequence_ids_ptr + at, mask=inside, other=-1)
    oldest = tl.load(sequence_ids_ptr + at - (POOLED - 1), mask=inside & (at >= POOLED - 1), other=-1)
    positions = tl.load(positions_ptr + at, mask=inside, other=0)
    whole = (sequences >= 0) & (sequences == oldest) & ((positions + 1) % RATIO == 0)
    return tl.reduce((tl.where(whole, at, -1), tl.where(whole, positions, -1)), 0, _larger_of_both)


@triton.jit
def _weights(below):
    """exp(-below) as the reference has it; a NaN stays one."""
    return tl.where(below > MOST_BELOW, 0.0, exp2_times(below * -LOG2E, 0))


@triton.jit
def _both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sums_of_lanes(x, y, C: tl.constexpr):
    """Two [LANES, C] -> two [C], each a tree of adjacent pairs; one way across warps for both."""
    x, y = tl.reduce((x.reshape(LANES // 2, 2, C), y.reshape(LANES // 2, 2, C)), 1, _both)
    x, y = tl.reduce((x.reshape(LANES // 4, 2, C), y.reshape(LANES // 4, 2, C)), 1, _both)
    return tl.reduce((x, y), 0, _both)


@triton.jit
def _rows(
    j, token, position, begin, ring_ptr, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols,
    WHOLE: tl.constexpr, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Values, gates, and what is added to these, of rows j of the pool that ends with `token`: 0 and -infinity where
    there is none; j int32 [rows, 1], cols [1, BLOCK_C]. WHOLE: all rows are in the step."""
    WIDTH: tl.constexpr = OVERLAPS * HEAD_DIM
    POOLED: tl.constexpr = OVERLAPS * RATIO
    FIRST: tl.constexpr = (POOLED - 1) * -1
    channels = tl.where(j >= POOLED - RATIO, (OVERLAPS - 1) * HEAD_DIM, 0) + cols
    # int64 before the multiply, of the first row alone: none is 2**31 elements from it
    first = (token + FIRST).to(tl.int64)
    kv_at = kv_ptr + first * stride_kv
    gate_at = gate_ptr + first * stride_gate
    kv_rows = j * stride_kv
    gate_rows = j * stride_gate
    ape_at = ape_ptr + (j % RATIO) * WIDTH + channels
    if WHOLE and (POOLED + LANES - 1) // LANES * LANES == POOLED and HEAD_DIM % BLOCK_C == 0:
        kv = widen(tl.load(kv_at + kv_rows + channels))
        gate = widen(tl.load(gate_at + gate_rows + channels))
        ape = tl.load(ape_at)
    else:
        inside = (j < POOLED) & (cols < HEAD_DIM)
        if WHOLE:
            new = inside
        else:
            new = token + FIRST + j >= begin
            inside &= position + FIRST + j >= 0
        kept = ((position + FIRST + j).to(tl.uint32) % RING).to(tl.int32) * (2 * WIDTH)
        if not WHOLE and kv_ptr.dtype.element_ty == tl.float32:  # one load from wherever it lies
            kv_at = tl.where(new, kv_at, ring_ptr) + tl.where(new, kv_rows, kept) + channels
            gate_at = tl.where(new, gate_at, ring_ptr + WIDTH) + tl.where(new, gate_rows, kept) + channels
            kv = tl.load(kv_at, mask=inside, other=0.0)
            gate = tl.load(gate_at, mask=inside, other=float("-inf"))
        else:
            kv = widen(tl.load(kv_at + kv_rows + channels, mask=inside & new, other=0.0))
            gate = widen(tl.load(gate_at + gate_rows + channels, mask=inside & new, other=float("-inf")))
            if not WHOLE:
                old = inside & (new == 0)
                kv = tl.where(old, tl.load(ring_ptr + kept + channels, mask=old, other=0.0), kv)
                gate = tl.where(old, tl.load(ring_ptr + WIDTH + kept + channels, mask=old, other=0.0), gate)
        ape = tl.load(ape_at, mask=inside & new, other=-0.0)  # -0 is what changes no gate
    return kv, gate, ape


@triton.jit
def _nothing():
    return ()


@triton.jit
def _all_rows(
    token, position, begin, ring_ptr, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols,
    WHOLE: tl.constexpr, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`_rows` of the whole pool: values, gates, what is added to these.

    Of a short pool each row is a tensor of its own: so however many warps there are, a thread has all rows of its
    channels, and adds them without a word to another. Long pools are read in chunks of eight rows."""
    ROWS: tl.constexpr = 1 if OVERLAPS * RATIO <= 2 * LANES else LANES
    CHUNKS: tl.constexpr = (OVERLAPS * RATIO + LANES - 1) // LANES * (LANES // ROWS)
    values = _nothing()
    gates = _nothing()
    added = _nothing()
    for chunk in tl.static_range(CHUNKS):
        j = (tl.arange(0, ROWS) + chunk * ROWS)[:, None]
        kv, gate, ape = _rows(
            j, token, position, begin, ring_ptr, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols[None, :],
            WHOLE, RATIO, OVERLAPS, RING, HEAD_DIM, BLOCK_C,
        )  # fmt: skip
        values += (kv,)
        gates += (gate,)
        added += (ape,)
    return values, gates, added


@triton.jit
def _pool(values, gates, added, BLOCK_C: tl.constexpr):
    """The entry [1, BLOCK_C] of these rows, or chunks of eight."""
    scores = _nothing()
    for i in tl.static_range(len(gates)):
        scores += (gates[i] + added[i],)
    top = scores[0]
    for i in tl.static_range(1, len(scores)):
        top = tl.maximum(top, scores[i])
    if top.shape[0] == LANES:
        top = tl.max(top, axis=0)[None, :]
        total, share = _sum_of_every(0, 1, top, scores, values)
        total, share = _sums_of_lanes(total, share, BLOCK_C)
        total = total[None, :]
        share = share[None, :]
    else:
        totals = _nothing()
        shares = _nothing()
        for lane in tl.static_range(LANES):
            total, share = _sum_of_every(lane, LANES, top, scores, values)
            totals += (total,)
            shares += (share,)
        total = _tree_of_eight(totals)
        share = _tree_of_eight(shares)
    return tl.div_rn(total, share)


@triton.jit
def _sum_of_every(first: tl.constexpr, step: tl.constexpr, top, scores, values):
    """What every step-th of these rows or chunks, from the first on, gives to the sums of its lanes."""
    share = _weights(top - scores[first])
    total = share * values[first] + 0.0  # -0 + 0 = 0, as in a sum that begins with 0
    for i in tl.static_range(first + step, len(scores), step):
        more = _weights(top - scores[i])
        total += more * values[i]
        share += more
    return total, share


@triton.jit
def _tree_of_eight(x):
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@triton.jit
def _keep(
    sequence, second, begin, end, position, completing, ring_ptr, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr,
    sequence_ids_ptr, cols, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Write the last RING tokens of a sequence, the first of which is at `position`, to its ring.

    The first program writes what replaces rows of the entry that the token `completing` completes, which nobody else
    reads; the second one everything else. None of the former is older than that token."""
    WIDTH: tl.constexpr = OVERLAPS * HEAD_DIM
    window = (position + completing - begin) // RATIO + RING
    oldest = tl.maximum(begin, end - RING)
    if second == 0:
        oldest = tl.maximum(oldest, completing + 1)
    for start in range(oldest, end, ROWS):
        row = start + tl.arange(0, ROWS)
        real = tl.load(sequence_ids_ptr + row, mask=row < end, other=-1) == sequence
        at = position + row - begin
        replaced = position - RING + (row - begin) % RING + RING * RATIO  # above 0
        inside = (row < end)[:, None] & (cols < HEAD_DIM)[None, :]
        row = row.to(tl.int64)[:, None]
        kept = ring_ptr + (at % RING)[:, None] * (2 * WIDTH)
        owned = _nothing()
        values = _nothing()
        gates = _nothing()
        for lane in tl.static_range(OVERLAPS):  # no compiler would move the second one's loads above a store
            channels = lane * HEAD_DIM + cols[None, :]
            own = (replaced // RATIO + (OVERLAPS - 1 - lane) == window) == (second == 0)
            own = own[:, None] & inside
            kv = widen(tl.load(kv_ptr + row * stride_kv + channels, mask=own, other=0.0))
            gate = widen(tl.load(gate_ptr + row * stride_gate + channels, mask=own, other=0.0))
            gate += tl.load(ape_ptr + (at % RATIO)[:, None] * WIDTH + channels, mask=own, other=0.0)
            owned += (own & real[:, None],)
            values += (kv,)
            gates += (gate,)
        for lane in tl.static_range(OVERLAPS):
            channels = lane * HEAD_DIM + cols[None, :]
            tl.store(kept + channels, values[lane], mask=owned[lane])
            tl.store(kept + WIDTH + channels, gates[lane], mask=owned[lane])


@triton.jit
def _of_entry(
    token, position, slots_ptr, sequence_ids_ptr, table_ptr, POSITIONS, RATIO: tl.constexpr, TURNED: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Where the entry goes that the token at `position` completes, or -1; cosines and sines of its turn.

    The position of a padding token may be anything: what lies beyond the table is not looked up."""
    one = tl.arange(0, 1)
    at = one + position + 1 - RATIO
    angles = pair_angles(PADDED // 2, HEAD_DIM, TURNED)
    cos, sin = load_angles(table_ptr, at, (at >= 0) & (at < POSITIONS), angles, TURNED)
    slot = tl.load(slots_ptr + token)
    return tl.where(tl.load(sequence_ids_ptr + token) >= 0, slot, -1), cos, sin


@triton.jit
def _load_weight(weight_ptr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    cols = tl.arange(0, PADDED)
    return widen(tl.load(weight_ptr + cols, mask=cols < HEAD_DIM, other=0.0))


@triton.jit
def _sum_of_row(x, N: tl.constexpr):
    """`row_sum` of [1, N]. The last four sums, of a warp each where there are four, meet in each thread at once, where
    two reductions would cross warps one after the other, six barriers in all."""
    if N <= SUM_CHUNK and N >= 128:
        for level in tl.static_range(1, 9):
            if N >> level >= 4:
                x = tl.sum(x.reshape(1, N >> level, 2), axis=2)
        a, b = tl.split(x.reshape(1, 2, 2))
        return tl.sum(a + b, axis=1)
    else:
        return row_sum(x, 1, N)


@triton.jit
def _finish(
    entry, weight, cos, sin, slot, eps, cache_ptr, TURNED: tl.constexpr, HADAMARD: tl.constexpr, FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store one entry [1, PADDED]; not where slot < 0."""
    x = tl.where((tl.arange(0, PADDED) < HEAD_DIM)[None, :], entry, 0.0)
    mean = tl.div_rn(_sum_of_row(x * x, PADDED), tl.full([1], HEAD_DIM, tl.float32))
    y = x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None] * weight[None, :]
    y = turn(y, cos, sin, pair_angles(PADDED // 2, HEAD_DIM, TURNED), False, TURNED, 1, PADDED // 2)
    if HADAMARD:
        y = hadamard(y, 1, PADDED)
    cache_rows.store(
        y, tl.arange(0, 1) + slot, cache_ptr, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES,
        PAGE_BYTES, E2M1_CVT, 1, PADDED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES", "EACH", "POSITIONS"])
def _compress_kv(
    kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, weight_ptr, table_ptr, eps, state_ptr, cache_ptr, pooled_ptr,
    positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, state_slots_ptr, slots_ptr, TOKENS, SEQUENCES, EACH,
    POSITIONS, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, TURNED: tl.constexpr,
    HADAMARD: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    E2M1_CVT: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr, KEPT_ROWS: tl.constexpr,
):  # fmt: skip
    begin(FOLLOWED=BLOCK_C < PADDED)
    BLOCKS: tl.constexpr = PADDED // BLOCK_C
    cols = tl.program_id(0) % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    take_in(
        tl.program_id(0) // BLOCKS, cols, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, weight_ptr, table_ptr,
        eps, state_ptr, cache_ptr, pooled_ptr, positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, state_slots_ptr,
        slots_ptr, TOKENS, SEQUENCES, EACH, POSITIONS, RATIO, OVERLAPS, RING, TURNED, HADAMARD, FORMAT, HEAD_DIM,
        ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED, BLOCK_C, KEPT_ROWS,
    )  # fmt: skip


@triton.jit
def take_in(
    program, cols, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, weight_ptr, table_ptr, eps, state_ptr, cache_ptr,
    pooled_ptr, positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, state_slots_ptr, slots_ptr, TOKENS, SEQUENCES, EACH,
    POSITIONS, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, TURNED: tl.constexpr,
    HADAMARD: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    E2M1_CVT: tl.constexpr, PADDED: tl.constexpr, BLOCK_C: tl.constexpr, KEPT_ROWS: tl.constexpr,
):  # fmt: skip
    """What a program of `programs_of` does, in the channels `cols` [BLOCK_C] of an entry."""
    POOLED: tl.constexpr = OVERLAPS * RATIO
    if program < 2 * SEQUENCES:  # an entry of which the ring has rows
        sequence, second = program // 2, program % 2
        state_slot = tl.load(state_slots_ptr + sequence)
        first, end, start, completing = _of_sequence(positions_ptr, cu_seqlens_ptr, sequence, EACH, RATIO)
        # int64 before the multiply: many rings pass 2**31 elements
        ring = state_ptr + state_slot.to(tl.int64) * (RING * 2 * OVERLAPS * HEAD_DIM)
        token = completing + second * RATIO
        limit = tl.minimum(tl.minimum(end, first + POOLED - 1), token + tl.num_programs(2))
        _emit(
            token, limit, start + token - first, first, ring, program, kv_ptr, stride_kv, gate_ptr, stride_gate,
            ape_ptr, weight_ptr, table_ptr, eps, cache_ptr, pooled_ptr, sequence_ids_ptr, slots_ptr, cols,
            POSITIONS, False, RATIO, OVERLAPS, RING, TURNED, HADAMARD, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE,
            ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()  # entries have read what is now overwritten
        _keep(
            sequence, second, first, end, start, completing, ring, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr,
            sequence_ids_ptr, cols, RATIO, OVERLAPS, RING, HEAD_DIM, KEPT_ROWS,
        )  # fmt: skip
    else:
        token, position = _of_run(sequence_ids_ptr, positions_ptr, program - 2 * SEQUENCES, TOKENS, RATIO, POOLED)
        if token >= 0:
            _emit(
                token, token + tl.num_programs(2), position, 0, state_ptr, program, kv_ptr, stride_kv, gate_ptr,
                stride_gate, ape_ptr, weight_ptr, table_ptr, eps, cache_ptr, pooled_ptr, sequence_ids_ptr,
                slots_ptr, cols, POSITIONS, True, RATIO, OVERLAPS, RING, TURNED, HADAMARD, FORMAT, HEAD_DIM, ROPE_DIM,
                PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED, BLOCK_C,
            )  # fmt: skip


@triton.jit
def _emit(
    token, limit, position, begin, ring, program, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, weight_ptr,
    table_ptr, eps, cache_ptr, pooled_ptr, sequence_ids_ptr, slots_ptr, cols, POSITIONS, WHOLE: tl.constexpr,
    RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, TURNED: tl.constexpr, HADAMARD: tl.constexpr,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Pool the entry of `token`, if it is before `limit`, and store it where this program has all of its channels.

    All that an entry needs is asked for before the loop, into which ptxas moves no load: it would rather save
    registers and wait for values after gates, and for angles after both. So no compiler may know of a loop that it
    ends after one pass: `limit` counts the grid's third dimension, which is 1. Long pools have more rows than fit,
    and programs enough to wait in turn.
    """
    AGAIN: tl.constexpr = OVERLAPS > 1 or RATIO <= LANES
    if token < limit:
        values, gates, added = _all_rows(
            token, position, begin, ring, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols, WHOLE, RATIO,
            OVERLAPS, RING, HEAD_DIM, BLOCK_C,
        )  # fmt: skip
        if BLOCK_C == PADDED:
            weight = _load_weight(weight_ptr, HEAD_DIM, PADDED)
            slot, cos, sin = _of_entry(
                token, position, slots_ptr, sequence_ids_ptr, table_ptr, POSITIONS, RATIO, TURNED, HEAD_DIM, PADDED
            )
        while token < limit:
            entry = _pool(values, gates, added, BLOCK_C)
            if BLOCK_C == PADDED:
                _finish(
                    entry, weight, cos, sin, slot, eps, cache_ptr, TURNED, HADAMARD, FORMAT, HEAD_DIM,
                    ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED,
                )  # fmt: skip
            else:
                tl.store(pooled_ptr + program.to(tl.int64) * PADDED + cols[None, :], entry)
            token += RATIO
            position += RATIO
            if AGAIN:  # noqa: SIM102  # known when compiling
                if token < limit:
                    values, gates, added = _all_rows(
                        token, position, begin, ring, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols, WHOLE,
                        RATIO, OVERLAPS, RING, HEAD_DIM, BLOCK_C,
                    )  # fmt: skip
                    if BLOCK_C == PADDED:
                        slot, cos, sin = _of_entry(
                            token, position, slots_ptr, sequence_ids_ptr, table_ptr, POSITIONS, RATIO, TURNED,
                            HEAD_DIM, PADDED,
                        )  # fmt: skip


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES", "EACH", "POSITIONS"])
def _finish_kv(
    pooled_ptr, weight_ptr, table_ptr, eps, cache_ptr, positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, slots_ptr,
    TOKENS, SEQUENCES, EACH, POSITIONS, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, TURNED: tl.constexpr,
    HADAMARD: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    E2M1_CVT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Entries that lie pooled. It starts while they are being pooled, and waits where it needs them; programs without
    any wait too, for what follows this launch has to follow that one."""
    POOLED: tl.constexpr = OVERLAPS * RATIO
    program = tl.program_id(0)
    if program < 2 * SEQUENCES:
        first, end, position, token = _of_sequence(positions_ptr, cu_seqlens_ptr, program // 2, EACH, RATIO)
        token += program % 2 * RATIO
        position += token - first
        limit = tl.minimum(end, first + POOLED - 1)
    else:
        token, position = _of_run(sequence_ids_ptr, positions_ptr, program - 2 * SEQUENCES, TOKENS, RATIO, POOLED)
        limit = token + 1
        token = tl.where(token >= 0, token, 0)
    if token < limit:
        weight = _load_weight(weight_ptr, HEAD_DIM, PADDED)
        slot, cos, sin = _of_entry(
            token, position, slots_ptr, sequence_ids_ptr, table_ptr, POSITIONS, RATIO, TURNED, HEAD_DIM, PADDED
        )
        begin(FOLLOWS=True)
        entry = tl.load(pooled_ptr + program.to(tl.int64) * PADDED + tl.arange(0, PADDED)[None, :])
        _finish(
            entry, weight, cos, sin, slot, eps, cache_ptr, TURNED, HADAMARD, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE,
            ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED,
        )  # fmt: skip
    else:
        begin(FOLLOWS=True)


def launch(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    weight: Tensor,
    table: Tensor,
    eps: float,
    state: Tensor,
    positions: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    state_slots: Tensor,
    slots: Tensor,
    ratio: int,
    hadamard: bool,
    cache: PagedCache | IndexCache,
    config: Config,
) -> None:
    """The op, with state and cache.data changed; kv and gate with rows of any stride, everything else contiguous."""
    tokens, sequences = len(kv), len(cu_seqlens) - 1
    if tokens == 0:
        return
    overlaps, padded = kv.shape[1] // cache.head_dim, triton.next_power_of_2(cache.head_dim)
    block_c = min(config.block_c, padded)
    blocks, programs = padded // block_c, programs_of(tokens, sequences, ratio, overlaps)
    constants = entry_constants(cache, ratio, overlaps, table.shape[1], hadamard, host.has_e2m1_cvt(kv.device))
    pooled = None
    if blocks > 1:
        pooled = torch.empty(programs, padded, dtype=torch.float32, device=kv.device)
    rows, counts = (positions, sequence_ids, cu_seqlens), (tokens, sequences, tokens // max(1, sequences), len(table))
    inputs = (kv, host.row_stride(kv), gate, host.row_stride(gate), ape, weight, table, eps, state, cache.data, pooled)
    own = pool_constants(state.shape[1], block_c, config.num_warps)
    _compress_kv[(programs * blocks,)](
        *inputs, *rows, state_slots, slots, *counts, **constants, **own,
        num_warps=config.num_warps, **host.OPTIONS,
    )  # fmt: skip
    if pooled is not None:
        operands = (pooled, weight, table, eps, cache.data, *rows, slots, *counts)
        _finish_kv[(programs,)](*operands, **constants, num_warps=FINISH_WARPS, **host.FOLLOWING)


def programs_of(tokens: int, sequences: int, ratio: int, overlaps: int) -> int:
    """Two a sequence, and one a run of `ratio` tokens where the step is as long as a pool."""
    return 2 * sequences + (triton.cdiv(tokens, ratio) if tokens >= ratio * overlaps else 0)


def warm(problem: CompressKvProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    p = problem
    width, nothing = p.overlaps * p.head_dim, torch.zeros(1, dtype=torch.int32, device="cuda")
    kv = torch.zeros(1, width, dtype=host.DTYPES[p.x], device="cuda")
    ape = torch.zeros(p.ratio, width, device="cuda")
    state = torch.zeros(1, p.overlaps * p.ratio, 2, width, device="cuda")
    weight = torch.zeros(p.head_dim, dtype=host.DTYPES[p.weight], device="cuda")
    table = torch.zeros(1, p.rope_dim, device="cuda")
    rows = nothing, nothing - 1, torch.zeros(2, dtype=torch.int32, device="cuda"), nothing, nothing - 1
    launch(kv, kv, ape, weight, table, 1.0, state, *rows, p.ratio, bool(p.hadamard), page_of(p, "cuda"), config)


def build_key(problem: CompressKvProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: how many tokens and sequences there are is read at launch."""
    p = problem
    return p.x, p.weight, p.ratio, p.overlaps, p.head_dim, p.rope_dim, p.format, p.page_size, p.hadamard


def build(problem: CompressKvProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU: the launch that pools."""
    p = problem
    types = {"kv_ptr": f"*{p.x}", "stride_kv": "i32", "gate_ptr": f"*{p.x}", "stride_gate": "i32", "ape_ptr": "*fp32"}
    types |= {"weight_ptr": f"*{p.weight}", "table_ptr": "*fp32", "eps": "fp32", "state_ptr": "*fp32"}
    types |= {"cache_ptr": "*u8"}
    names = ("positions", "sequence_ids", "cu_seqlens", "state_slots", "slots")
    types |= {f"{name}_ptr": "*i32" for name in names} | dict.fromkeys(COUNTS, "i32")
    padded = triton.next_power_of_2(p.head_dim)
    block_c = min(config.block_c, padded)
    page, cvt = page_of(p, "cpu"), arch == "sm_100a"
    constants = entry_constants(page, p.ratio, p.overlaps, p.rope_dim, bool(p.hadamard), cvt)
    constants |= pool_constants(p.overlaps * p.ratio, block_c, config.num_warps)
    if block_c < padded:
        types["pooled_ptr"] = "*fp32"
    else:
        constants["pooled_ptr"] = None
    return host.build(_compress_kv, types, constants, arch, config.num_warps, unaligned=COUNTS)


def build_finish(problem: CompressKvProblem, config: Config, arch: str) -> Built:
    """The second launch, compiled for `arch` without a GPU."""
    p = problem
    types = {"pooled_ptr": "*fp32", "weight_ptr": f"*{p.weight}", "table_ptr": "*fp32", "eps": "fp32"}
    types |= {f"{name}_ptr": "*i32" for name in ("positions", "sequence_ids", "cu_seqlens", "slots")}
    types |= {"cache_ptr": "*u8"} | dict.fromkeys(COUNTS, "i32")
    page, cvt = page_of(p, "cpu"), arch == "sm_100a"
    constants = entry_constants(page, p.ratio, p.overlaps, p.rope_dim, bool(p.hadamard), cvt)
    return host.build(_finish_kv, types, constants, arch, FINISH_WARPS, unaligned=COUNTS, launch_pdl=True)


def page_of(p: CompressKvProblem, device: str) -> PagedCache | IndexCache:
    """A page of the problem's cache."""
    name: Any = p.format.removeprefix("index_")
    if name == p.format:
        data = torch.empty(1, kv_layout(name, p.page_size, p.head_dim, p.rope_dim).page_bytes, dtype=torch.uint8)
        return PagedCache(data.to(device), name, p.page_size, p.head_dim, p.rope_dim)
    data = torch.empty(1, index_layout(name, p.page_size, p.head_dim).page_bytes, dtype=torch.uint8)
    return IndexCache(data.to(device), name, p.page_size, p.head_dim)


def entry_constants(
    cache: PagedCache | IndexCache, ratio: int, overlaps: int, turned: int, hadamard: bool, e2m1_cvt: bool
) -> dict[str, Any]:
    return {
        **cache_rows.constants(cache),
        "RATIO": ratio,
        "OVERLAPS": overlaps,
        "TURNED": turned,
        "HADAMARD": hadamard,
        "E2M1_CVT": e2m1_cvt,
        "PADDED": triton.next_power_of_2(cache.head_dim),
    }


def pool_constants(ring: int, block_c: int, num_warps: int) -> dict[str, Any]:
    """KEPT_ROWS: as many as make 16 channels a thread, no more than a ring has."""
    rows = max(1, 16 * 32 * num_warps // block_c)
    return {"RING": ring, "BLOCK_C": block_c, "KEPT_ROWS": min(rows, triton.next_power_of_2(ring))}
