"""Heads of tokens turned by RoPE or back, with or without a norm before it: what `qnorm_rope` and `rope_inverse` are.

Memory bound: reads and writes 2 bytes a dim (BF16). One program block_h heads of one token, so that a single token of
128 heads reaches every SM; the token's angles are loaded once for all of them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import QnormRopeProblem, RopeInverseProblem

from . import host
from .nvfp4 import narrow, widen
from .overlap import begin
from .rope import head_strides, load_angles, pair_angles, refuse_heads, rms_normed, turn
from .rounding import CVT

Problem = QnormRopeProblem | RopeInverseProblem


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_h heads of a token a program."""

    block_h: int = 1
    num_warps: int = 1


SPACE = {"block_h": (1, 2, 4, 8), "num_warps": (1, 2, 4)}


def supports(problem: Problem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return refuse_heads(problem.head_dim, problem.rope_dim, problem.x) or host.refuse_rows(
        config.block_h, problem.head_dim, config.num_warps, "absmax"
    )


def default(problem: Problem) -> Config:
    """Where there are many heads, two a warp: twice the loads that a warp waits for."""
    return Config(block_h=2) if problem.m * problem.heads >= 1 << 15 else Config()


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _heads(
    x_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS, INVERSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    begin()
    turn_heads(
        tl.program_id(0), tl.program_id(1), x_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS,
        INVERSE, HEAD_DIM, ROPE_DIM, BLOCK_H, PADDED,
    )  # fmt: skip


@triton.jit
def turn_heads(
    token, block, x_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS, INVERSE: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Block of BLOCK_H heads of a token; normed unless eps is None."""
    # int64 before the multiply: a long batch passes 2**31 elements
    token = token.to(tl.int64)
    heads = block.to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    cols = tl.arange(0, PADDED)
    inside = (heads < HEADS)[:, None] & (cols < HEAD_DIM)[None, :]
    at = x_ptr + token * stride_m + heads[:, None] * stride_h + cols[None, :]
    x = widen(tl.load(at, mask=inside, other=0.0))
    position = tl.load(positions_ptr + token + tl.arange(0, 1))
    angles = pair_angles(PADDED // 2, HEAD_DIM, ROPE_DIM)
    cos, sin = load_angles(table_ptr, position, position >= 0, angles, ROPE_DIM)
    if eps is not None:
        x = rms_normed(x, eps, HEAD_DIM, BLOCK_H, PADDED)
    y = turn(x, cos, sin, angles, INVERSE, ROPE_DIM, BLOCK_H, PADDED // 2)
    at = out_ptr + (token * HEADS + heads)[:, None] * HEAD_DIM + cols[None, :]
    tl.store(at, narrow(y, out_ptr.dtype.element_ty, CVT), mask=inside)


def launch(
    x: Tensor, positions: Tensor, table: Tensor, eps: float | None, out: Tensor, config: Config, *, inverse: bool
) -> None:
    """x [m, heads, head_dim], tokens and heads of any stride -> out, its like, contiguous; no norm where eps is None.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    """
    m, heads, head_dim = x.shape
    if m == 0:
        return
    operands = (x, *head_strides(x), positions, table, eps, out, heads)
    constants = _constants(head_dim, table.shape[1], config, inverse)
    grid = (m, triton.cdiv(heads, config.block_h))
    _heads[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: Problem, eps: float | None, config: Config, *, inverse: bool) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, problem.heads, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table, first = torch.zeros(1, problem.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    launch(x, first, table, eps, torch.empty_like(x), config, inverse=inverse)


def build_key(problem: Problem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and heads are read at launch."""
    return problem.x, problem.head_dim, problem.rope_dim


def build(problem: Problem, config: Config, arch: str, *, norm: bool, inverse: bool) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "stride_h": "i32", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "out_ptr": f"*{problem.x}", "HEADS": "i32"}
    constants = _constants(problem.head_dim, problem.rope_dim, config, inverse)
    if norm:
        types["eps"] = "fp32"
    else:
        constants["eps"] = None
    return host.build(_heads, types, constants, arch, config.num_warps, unaligned=("positions_ptr",))


def _constants(head_dim: int, rope_dim: int, config: Config, inverse: bool) -> dict[str, Any]:
    padded = triton.next_power_of_2(head_dim)
    return {
        "INVERSE": inverse,
        "HEAD_DIM": head_dim,
        "ROPE_DIM": rope_dim,
        "BLOCK_H": config.block_h,
        "PADDED": padded,
    }
