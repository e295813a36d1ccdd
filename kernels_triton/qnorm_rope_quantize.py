"""RMSNorm of each query head and RoPE, stored as NVFP4 rows: queries for an attention that multiplies FP4 by FP4.

Memory bound: reads 2 bytes a dim (BF16) and writes 384 bytes a head of 512. A head becomes what a row of an `nvfp4`
cache is, by the code that stores those. Bound by issue on sm_90a, which has no instruction for E2M1, so that a thread
takes whole blocks and a program several heads of a token, whose angles it keeps.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import PagedCache
from fp4suite.problem import QnormRopeQuantizeProblem

from . import cache_rows, host, normed_rows
from .normed_rows import load_words, widened_late, word_factors
from .nvfp4 import widen
from .overlap import begin
from .rope import (
    block_angles,
    head_strides,
    load_angles,
    pair_angles,
    refuse_heads,
    rms_normed,
    turn,
    turn_blocks,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_h heads of a token a program. A warp a head: then nothing goes through shared memory.

    by_blocks: a thread has whole blocks of 16 columns; then a program takes `turns` heads one after the other, the next
    one on its way meanwhile.
    """

    block_h: int = 1
    num_warps: int = 1
    by_blocks: bool = False
    turns: int = 1


SPACE = {"block_h": (1, 2, 4), "num_warps": (1, 2, 4), "by_blocks": (False, True), "turns": (1, 2, 4, 8, 16)}


def supports(problem: QnormRopeQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return (
        refuse_heads(problem.head_dim, problem.rope_dim, problem.x)
        or cache_rows.refuse("nvfp4", problem.head_dim, problem.rope_dim)
        or host.refuse_rows(config.block_h, problem.head_dim, config.num_warps, "absmax")
        or _refuse_blocks(problem, config)
    )


def _refuse_blocks(problem: QnormRopeQuantizeProblem, config: Config) -> str | None:
    """Why a program of this config cannot take heads by blocks, or in turns, or None if it can."""
    p = problem
    if not config.by_blocks:
        return None if config.turns == 1 else f"turns are for heads by blocks, got turns={config.turns}"
    if config.block_h > 1 or config.num_warps > 1 or p.x != "bf16":
        return f"by blocks a warp takes a head of bf16, got {config.num_warps} for {config.block_h} of {p.x}"
    padded = triton.next_power_of_2(p.head_dim)
    return cache_rows.refuse_blocks("nvfp4", p.head_dim, p.rope_dim) or normed_rows.refuse(padded, padded, 1, True)


def default(problem: QnormRopeQuantizeProblem) -> Config:
    """By blocks wherever they can be; where there are many heads, several in turn."""
    turns = 8 if problem.m * problem.heads >= 1 << 15 else 1
    own = Config(by_blocks=True, turns=turns)
    return own if _refuse_blocks(problem, own) is None else Config()


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _by_blocks(
    q_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS, FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Heads of BF16 of one token, a grid's width apart. AHEAD: of more than one the next is on its way meanwhile."""
    begin()
    tl.static_assert(FORMAT == "nvfp4" and BLOCK_H == 1)
    BLOCKS: tl.constexpr = PADDED // 16
    token = tl.program_id(0).to(tl.int64)  # before the multiply: a long batch passes 2**31 elements
    first, step = tl.program_id(1), tl.num_programs(1)
    heads_ptr = q_ptr + token * stride_m
    own = tl.arange(0, 1).to(tl.int64)
    position = tl.load(positions_ptr + token)
    x = load_words(heads_ptr, stride_h, own + first, HEADS, HEAD_DIM, 1, PADDED)
    angles = block_angles(table_ptr, position, position >= 0, HEAD_DIM, ROPE_DIM, BLOCKS)
    for head in range(first, HEADS, step):
        if AHEAD:
            next_x = load_words(heads_ptr, stride_h, own + (head + step), HEADS, HEAD_DIM, 1, PADDED)
        factor = word_factors(x, eps, HEAD_DIM, 1, PADDED)
        lo = turn_blocks(widened_late(x[0], HEADS) * factor, angles[0], angles[1], HEAD_DIM, ROPE_DIM, BLOCKS)
        hi = turn_blocks(widened_late(x[1], HEADS) * factor, angles[2], angles[3], HEAD_DIM, ROPE_DIM, BLOCKS)
        cache_rows.store_nvfp4_blocks(
            lo, hi, token * HEADS + head, out_ptr, HEAD_DIM, ROPE_DIM, PAGE_SIZE, ROW_BYTES, PAGE_BYTES, E2M1_CVT,
            BLOCKS,
        )  # fmt: skip
        if AHEAD:
            x = next_x


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _qnorm_rope_quantize(
    q_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS, FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    begin()
    # int64 before the multiply: a long batch passes 2**31 elements
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    cols = tl.arange(0, PADDED)
    inside = (heads < HEADS)[:, None] & (cols < HEAD_DIM)[None, :]
    at = q_ptr + token * stride_m + heads[:, None] * stride_h + cols[None, :]
    x = widen(tl.load(at, mask=inside, other=0.0))
    position = tl.load(positions_ptr + token + tl.arange(0, 1))
    angles = pair_angles(PADDED // 2, HEAD_DIM, ROPE_DIM)
    cos, sin = load_angles(table_ptr, position, position >= 0, angles, ROPE_DIM)
    y = turn(rms_normed(x, eps, HEAD_DIM, BLOCK_H, PADDED), cos, sin, angles, False, ROPE_DIM, BLOCK_H, PADDED // 2)
    cache_rows.store(
        y, tl.where(heads < HEADS, token * HEADS + heads, -1), out_ptr, FORMAT, HEAD_DIM, ROPE_DIM, PAGE_SIZE,
        ROW_BYTES, SCALE_BYTES, PAGE_BYTES, E2M1_CVT, BLOCK_H, PADDED,
    )  # fmt: skip


def launch(q: Tensor, positions: Tensor, table: Tensor, eps: float, out: Tensor, config: Config) -> None:
    """q [m, heads, head_dim], tokens and heads of any stride -> out uint8 [m, heads, row bytes], contiguous.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    """
    m, heads, head_dim = q.shape
    if m == 0:
        return
    constants = _constants(as_rows(out, head_dim, table.shape[1]), host.has_e2m1_cvt(q.device), config)
    operands = (q, *head_strides(q), positions, table, eps, out, heads)
    grid = (m, triton.cdiv(heads, config.block_h * config.turns))
    if config.by_blocks:
        _by_blocks[grid](*operands, **constants, AHEAD=config.turns > 1, num_warps=config.num_warps, **host.OPTIONS)
    else:
        _qnorm_rope_quantize[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def as_rows(out: Tensor, head_dim: int, rope_dim: int) -> PagedCache:
    """What `launch` writes: a cache of pages of one row, a head each."""
    return PagedCache(out.view(-1, out.shape[-1]), "nvfp4", 1, head_dim, rope_dim)


def warm(problem: QnormRopeQuantizeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    q = torch.zeros(1, problem.heads, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table, first = torch.zeros(1, problem.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    out = torch.empty(1, problem.heads, problem.row_bytes, dtype=torch.uint8, device="cuda")
    launch(q, first, table, 1.0, out, config)


def build_key(problem: QnormRopeQuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and heads are read at launch."""
    return problem.x, problem.head_dim, problem.rope_dim


def build(problem: QnormRopeQuantizeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"q_ptr": f"*{problem.x}", "stride_m": "i32", "stride_h": "i32", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "eps": "fp32", "out_ptr": "*u8", "HEADS": "i32"}
    row = as_rows(torch.empty(1, problem.row_bytes, dtype=torch.uint8), problem.head_dim, problem.rope_dim)
    constants = _constants(row, arch == "sm_100a", config)
    kernel = _qnorm_rope_quantize
    if config.by_blocks:
        kernel, constants["AHEAD"] = _by_blocks, config.turns > 1
    return host.build(kernel, types, constants, arch, config.num_warps, unaligned=("positions_ptr",))


def _constants(rows: PagedCache, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    own = {"E2M1_CVT": e2m1_cvt, "BLOCK_H": config.block_h, "PADDED": triton.next_power_of_2(rows.head_dim)}
    return cache_rows.constants(rows) | own
