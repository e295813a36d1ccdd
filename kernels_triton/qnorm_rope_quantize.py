"""RMSNorm of each query head and RoPE, stored as NVFP4 rows: queries for an attention that multiplies FP4 by FP4.

Memory bound: reads 2 bytes a dim (BF16) and writes 384 bytes a head of 512. A head becomes what a row of an `nvfp4`
cache is, by the code that stores those; one program block_h heads of one token, as in `heads`.
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

from . import cache_rows, host
from .nvfp4 import widen
from .rope import head_strides, load_angles, pair_angles, refuse_heads, rms_normed, turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_h heads of a token a program. A warp a head: then nothing goes through shared memory."""

    block_h: int = 1
    num_warps: int = 1


SPACE = {"block_h": (1, 2, 4, 8), "num_warps": (1, 2, 4)}


def supports(problem: QnormRopeQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return (
        refuse_heads(problem.head_dim, problem.rope_dim, problem.x)
        or cache_rows.refuse("nvfp4", problem.head_dim, problem.rope_dim)
        or host.refuse_rows(config.block_h, problem.head_dim, config.num_warps, "absmax")
    )


def default(problem: QnormRopeQuantizeProblem) -> Config:
    """Where there are many heads, two a warp, as in `heads`."""
    return Config(block_h=2) if problem.m * problem.heads >= 1 << 15 else Config()


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _qnorm_rope_quantize(
    q_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS, FORMAT: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROW_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, PAGE_BYTES: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCK_H: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
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
    grid = (m, triton.cdiv(heads, config.block_h))
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
    return host.build(_qnorm_rope_quantize, types, constants, arch, config.num_warps, unaligned=("positions_ptr",))


def _constants(rows: PagedCache, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    own = {"E2M1_CVT": e2m1_cvt, "BLOCK_H": config.block_h, "PADDED": triton.next_power_of_2(rows.head_dim)}
    return cache_rows.constants(rows) | own
