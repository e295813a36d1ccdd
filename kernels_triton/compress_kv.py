"""Compressed KV entries: pooling over rings and a step's tokens, then norm, RoPE, Hadamard, encoding and insertion.

Memory bound: reads 8 bytes a channel of every token (FP32 kv and gate) and writes as much for the tokens that stay in
the ring; of an entry that began before this step it reads the rows that the ring has of it.

One program an entry and block of channels: a pool of 128 rows of 512 channels is 512 KB, too much for one program to
read while the others of the GPU have nothing to do. Where channels are split, the entry's sum of squares is not known
before all of them are pooled, so that a second launch norms and stores it; else one launch does all.

Entries of which the ring has rows, at most two a sequence, are the work of that sequence's first programs, which
afterwards, behind a barrier, write the ring: nobody else reads it. All other entries lie in the step as a whole, at
least `ratio` tokens from the next, so that each run of `ratio` tokens has no more than one.
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
from .nvfp4 import exp_neg, widen
from .rope import load_angles, pair_angles, rms_normed, turn

LANES = tl.constexpr(compressor.LANES)
UNROLL = tl.constexpr(4)  # runs of LANES rows of a long pool that are on their way at once
MOST_BELOW = tl.constexpr(compressor.MOST_BELOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_c channels of an entry a program; as many as the entry has, or more, need no second launch."""

    block_c: int = 512
    num_warps: int = 8


SPACE = {"block_c": (64, 128, 512), "num_warps": (1, 2, 4, 8)}
FINISH_WARPS = 1  # of the second launch: a row a program


def supports(problem: CompressKvProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    p, padded = problem, triton.next_power_of_2(problem.head_dim)
    if why := cache_rows.refuse(p.format, p.head_dim, 0 if p.format.startswith("index_") else p.rope_dim):
        return why
    if p.hadamard and padded != p.head_dim:
        return f"a Hadamard transform needs a power of two, got head_dim={p.head_dim}"
    short = p.ratio * p.overlaps <= 2 * compressor.LANES
    if config.block_c < padded and short:
        return f"block_c={config.block_c}: pools of {p.ratio * p.overlaps} rows are short enough for whole entries"
    held, most = compressor.LANES * min(config.block_c, padded) / (32 * config.num_warps), 32 if short else 16
    if not 1 <= held <= most:
        knobs = f"block_c={config.block_c} num_warps={config.num_warps}"
        return f"{knobs}: {held:g} channels of rows a thread, not 1 to {most}"
    return None


def default(problem: CompressKvProblem) -> Config:
    """Whole entries of short pools; long ones by blocks of channels."""
    padded = triton.next_power_of_2(problem.head_dim)
    if problem.ratio * problem.overlaps <= 2 * compressor.LANES:
        return Config(block_c=padded, num_warps=max(1, min(4, padded // 64)))
    return Config(block_c=min(64, padded), num_warps=max(1, min(2, padded // 32)))


@triton.jit
def _span(
    positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, TOKENS, SEQUENCES, RATIO: tl.constexpr, POOLED: tl.constexpr
):  # fmt: skip
    """The tokens that this program may emit for: from the first, in steps of RATIO, below the second number."""
    program = tl.program_id(0)
    if program < SEQUENCES:  # entries of which the ring has rows
        first = tl.load(cu_seqlens_ptr + program)
        end = tl.load(cu_seqlens_ptr + program + 1)
        position = tl.load(positions_ptr + first, mask=first < end, other=0)
        token = first + RATIO - 1 - position % RATIO
        limit = tl.minimum(end, first + POOLED - 1)
    else:
        PADDED: tl.constexpr = triton.next_power_of_2(RATIO)
        i = tl.arange(0, PADDED)
        at = (program - SEQUENCES) * RATIO + i
        inside = (i < RATIO) & (at < TOKENS)
        sequences = tl.load(sequence_ids_ptr + at, mask=inside, other=-1)
        positions = tl.load(positions_ptr + at, mask=inside, other=0)
        begins = tl.load(cu_seqlens_ptr + sequences, mask=sequences >= 0, other=0)
        whole = (sequences >= 0) & ((positions + 1) % RATIO == 0) & (at - POOLED + 1 >= begins)
        token = tl.max(tl.where(whole, at, -1))
        limit = token + 1
        token = tl.where(token >= 0, token, 0)
    return token, limit


@triton.jit
def _weights(below, exists):
    """exp(-below) where a row exists, as the reference has it; NaN stays NaN."""
    share = tl.where(below > MOST_BELOW, 0.0, exp_neg(below))
    return tl.where(exists, tl.where(below != below, below, share), 0.0)


@triton.jit
def _sum_of_lanes(x, C: tl.constexpr):
    """[LANES, C] -> [C], a tree of adjacent pairs."""
    x = tl.sum(x.reshape(LANES // 2, 2, C), axis=1)
    x = tl.sum(x.reshape(LANES // 4, 2, C), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def _rows(
    chunk, token, position, begin, ring_ptr, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols,
    RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Values and scores of rows 8 chunk .. 8 chunk + 7 of the pool that ends with `token`, and which of them exist."""
    WIDTH: tl.constexpr = OVERLAPS * HEAD_DIM
    POOLED: tl.constexpr = OVERLAPS * RATIO
    j = chunk * LANES + tl.arange(0, LANES)
    at = position - (POOLED - 1) + j
    row = token - (POOLED - 1) + j
    exists = ((j < POOLED) & (at >= 0))[:, None] & (cols < HEAD_DIM)[None, :]
    new = exists & (row >= begin)[:, None]
    old = exists & (row < begin)[:, None]
    channels = tl.where(j >= POOLED - RATIO, (OVERLAPS - 1) * HEAD_DIM, 0)[:, None] + cols[None, :]
    row = row.to(tl.int64)[:, None]
    kv = widen(tl.load(kv_ptr + row * stride_kv + channels, mask=new, other=0.0))
    gate = widen(tl.load(gate_ptr + row * stride_gate + channels, mask=new, other=0.0))
    gate += tl.load(ape_ptr + (at % RATIO)[:, None] * WIDTH + channels, mask=new, other=0.0)
    kept = ring_ptr + (at % RING)[:, None] * (2 * WIDTH) + channels
    kv = tl.where(old, tl.load(kept, mask=old, other=0.0), kv)
    gate = tl.where(old, tl.load(kept + WIDTH, mask=old, other=0.0), gate)
    return kv, tl.where(exists, gate, float("-inf")), exists


@triton.jit
def _keep(
    sequence, begin, end, ring_ptr, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, positions_ptr, sequence_ids_ptr,
    cols, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the last RING tokens of a sequence to its ring."""
    WIDTH: tl.constexpr = OVERLAPS * HEAD_DIM
    for start in range(tl.maximum(begin, end - RING), end, ROWS):
        row = start + tl.arange(0, ROWS)
        real = tl.load(sequence_ids_ptr + row, mask=row < end, other=-1) == sequence
        position = tl.load(positions_ptr + row, mask=real, other=0)
        inside = real[:, None] & (cols < HEAD_DIM)[None, :]
        row = row.to(tl.int64)[:, None]
        kept = ring_ptr + (position % RING)[:, None] * (2 * WIDTH)
        for lane in tl.static_range(OVERLAPS):
            channels = lane * HEAD_DIM + cols[None, :]
            kv = widen(tl.load(kv_ptr + row * stride_kv + channels, mask=inside, other=0.0))
            gate = widen(tl.load(gate_ptr + row * stride_gate + channels, mask=inside, other=0.0))
            gate += tl.load(ape_ptr + (position % RATIO)[:, None] * WIDTH + channels, mask=inside, other=0.0)
            tl.store(kept + channels, kv, mask=inside)
            tl.store(kept + WIDTH + channels, gate, mask=inside)


@triton.jit
def _finish(
    entry, position, slot, weight_ptr, table_ptr, eps, cache_ptr, RATIO: tl.constexpr, TURNED: tl.constexpr,
    HADAMARD: tl.constexpr, FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr,
    E2M1_CVT: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Norm, turn and store one entry [PADDED] that the token at `position` completes."""
    cols = tl.arange(0, PADDED)
    weight = widen(tl.load(weight_ptr + cols, mask=cols < HEAD_DIM, other=0.0))
    one = tl.arange(0, 1)
    angles = pair_angles(PADDED // 2, HEAD_DIM, TURNED)
    cos, sin = load_angles(table_ptr, one + position + 1 - RATIO, one == 0, angles, TURNED)
    x = tl.where(cols < HEAD_DIM, entry, 0.0)[None, :]
    y = rms_normed(x, eps, HEAD_DIM, 1, PADDED) * weight[None, :]
    y = turn(y, cos, sin, angles, False, TURNED, 1, PADDED // 2)
    if HADAMARD:
        y = hadamard(y, 1, PADDED)
    cache_rows.store(
        y, one + slot, cache_ptr, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES,
        E2M1_CVT, 1, PADDED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES"])
def _compress_kv(
    kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, weight_ptr, table_ptr, eps, state_ptr, cache_ptr, pooled_ptr,
    positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, state_slots_ptr, slots_ptr, TOKENS, SEQUENCES,
    RATIO: tl.constexpr, OVERLAPS: tl.constexpr, RING: tl.constexpr, TURNED: tl.constexpr, HADAMARD: tl.constexpr,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr,
    PADDED: tl.constexpr, BLOCK_C: tl.constexpr, KEPT_ROWS: tl.constexpr,
):  # fmt: skip
    POOLED: tl.constexpr = OVERLAPS * RATIO
    CHUNKS: tl.constexpr = (POOLED + LANES - 1) // LANES
    token, limit = _span(positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, TOKENS, SEQUENCES, RATIO, POOLED)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    emitted = tl.program_id(0) * OVERLAPS
    while token < limit:
        slot = tl.load(slots_ptr + token)
        sequence = tl.load(sequence_ids_ptr + token)
        if (slot >= 0) & (sequence >= 0):
            position = tl.load(positions_ptr + token)
            begin = tl.load(cu_seqlens_ptr + sequence)
            # int64 before the multiply: many rings pass 2**31 elements
            state_slot = tl.load(state_slots_ptr + sequence).to(tl.int64)
            ring = state_ptr + state_slot * (RING * 2 * OVERLAPS * HEAD_DIM)
            if CHUNKS == 1:
                kv, score, exists = _rows(
                    0, token, position, begin, ring, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols,
                    RATIO, OVERLAPS, RING, HEAD_DIM,
                )  # fmt: skip
                share = _weights(tl.max(score, axis=0)[None, :] - score, exists)
                total = share * kv + 0.0  # -0 + 0 = 0, as in a sum that begins with 0
            else:
                highest = tl.full([LANES, BLOCK_C], float("-inf"), tl.float32)
                for chunk in tl.range(CHUNKS, loop_unroll_factor=UNROLL):
                    _, score, _ = _rows(
                        chunk, token, position, begin, ring, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols,
                        RATIO, OVERLAPS, RING, HEAD_DIM,
                    )  # fmt: skip
                    highest = tl.maximum(highest, score)
                top = tl.max(highest, axis=0)[None, :]
                share = tl.zeros([LANES, BLOCK_C], tl.float32)
                total = tl.zeros([LANES, BLOCK_C], tl.float32)
                for chunk in tl.range(CHUNKS, loop_unroll_factor=UNROLL):
                    kv, score, exists = _rows(
                        chunk, token, position, begin, ring, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, cols,
                        RATIO, OVERLAPS, RING, HEAD_DIM,
                    )  # fmt: skip
                    more = _weights(top - score, exists)
                    total += more * kv
                    share += more
            entry = tl.div_rn(_sum_of_lanes(total, BLOCK_C), _sum_of_lanes(share, BLOCK_C))
            if BLOCK_C == PADDED:
                _finish(
                    entry, position, slot, weight_ptr, table_ptr, eps, cache_ptr, RATIO, TURNED, HADAMARD, FORMAT,
                    HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED,
                )  # fmt: skip
            else:
                tl.store(pooled_ptr + emitted.to(tl.int64) * PADDED + cols, entry)
        token += RATIO
        emitted += 1

    program = tl.program_id(0)
    if program < SEQUENCES:
        tl.debug_barrier()  # entries above have read what is now overwritten
        begin = tl.load(cu_seqlens_ptr + program)
        end = tl.load(cu_seqlens_ptr + program + 1)
        state_slot = tl.load(state_slots_ptr + program).to(tl.int64)
        ring = state_ptr + state_slot * (RING * 2 * OVERLAPS * HEAD_DIM)
        _keep(
            program, begin, end, ring, kv_ptr, stride_kv, gate_ptr, stride_gate, ape_ptr, positions_ptr,
            sequence_ids_ptr, cols, RATIO, OVERLAPS, RING, HEAD_DIM, KEPT_ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["TOKENS", "SEQUENCES"])
def _finish_kv(
    pooled_ptr, weight_ptr, table_ptr, eps, cache_ptr, positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, slots_ptr,
    TOKENS, SEQUENCES, RATIO: tl.constexpr, OVERLAPS: tl.constexpr, TURNED: tl.constexpr, HADAMARD: tl.constexpr,
    FORMAT: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    ROW_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    POOLED: tl.constexpr = OVERLAPS * RATIO
    token, limit = _span(positions_ptr, sequence_ids_ptr, cu_seqlens_ptr, TOKENS, SEQUENCES, RATIO, POOLED)
    emitted = tl.program_id(0) * OVERLAPS
    while token < limit:
        slot = tl.load(slots_ptr + token)
        if (slot >= 0) & (tl.load(sequence_ids_ptr + token) >= 0):
            entry = tl.load(pooled_ptr + emitted.to(tl.int64) * PADDED + tl.arange(0, PADDED))
            _finish(
                entry, tl.load(positions_ptr + token), slot, weight_ptr, table_ptr, eps, cache_ptr, RATIO, TURNED,
                HADAMARD, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, PADDED,
            )  # fmt: skip
        token += RATIO
        emitted += 1


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
    blocks, programs = padded // block_c, sequences + triton.cdiv(tokens, ratio)
    constants = _constants(cache, ratio, overlaps, table.shape[1], hadamard, host.has_e2m1_cvt(kv.device))
    pooled = None
    if blocks > 1:
        pooled = torch.empty(programs * overlaps, padded, dtype=torch.float32, device=kv.device)
    rows = positions, sequence_ids, cu_seqlens
    inputs = (kv, host.row_stride(kv), gate, host.row_stride(gate), ape, weight, table, eps, state, cache.data, pooled)
    own = _pool_constants(state.shape[1], block_c, config)
    _compress_kv[(programs, blocks)](
        *inputs, *rows, state_slots, slots, tokens, sequences, **constants, **own,
        num_warps=config.num_warps, **host.OPTIONS,
    )  # fmt: skip
    if pooled is not None:
        operands = (pooled, weight, table, eps, cache.data, *rows, slots, tokens, sequences)
        _finish_kv[(programs,)](*operands, **constants, num_warps=FINISH_WARPS, **host.OPTIONS)


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
    launch(kv, kv, ape, weight, table, 1.0, state, *rows, p.ratio, bool(p.hadamard), _cache(p, "cuda"), config)


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
    types |= {f"{name}_ptr": "*i32" for name in names} | {"TOKENS": "i32", "SEQUENCES": "i32"}
    padded = triton.next_power_of_2(p.head_dim)
    block_c = min(config.block_c, padded)
    constants = _constants(_cache(p, "cpu"), p.ratio, p.overlaps, p.rope_dim, bool(p.hadamard), arch == "sm_100a")
    constants |= _pool_constants(p.overlaps * p.ratio, block_c, config)
    if block_c < padded:
        types["pooled_ptr"] = "*fp32"
    else:
        constants["pooled_ptr"] = None
    return host.build(_compress_kv, types, constants, arch, config.num_warps, unaligned=("TOKENS", "SEQUENCES"))


def _cache(p: CompressKvProblem, device: str) -> PagedCache | IndexCache:
    """A page of the problem's cache."""
    name: Any = p.format.removeprefix("index_")
    if name == p.format:
        data = torch.empty(1, kv_layout(name, p.page_size, p.head_dim, p.rope_dim).page_bytes, dtype=torch.uint8)
        return PagedCache(data.to(device), name, p.page_size, p.head_dim, p.rope_dim)
    data = torch.empty(1, index_layout(name, p.page_size, p.head_dim).page_bytes, dtype=torch.uint8)
    return IndexCache(data.to(device), name, p.page_size, p.head_dim)


def _constants(
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


def _pool_constants(ring: int, block_c: int, config: Config) -> dict[str, Any]:
    """KEPT_ROWS: as many as make 32 channels a thread, no more than a ring has."""
    rows = max(1, 32 * 32 * config.num_warps // block_c)
    return {"RING": ring, "BLOCK_C": block_c, "KEPT_ROWS": min(rows, triton.next_power_of_2(ring))}
