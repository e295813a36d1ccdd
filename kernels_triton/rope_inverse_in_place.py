"""RoPE undone on attention's output in place: what is not turned is neither read nor written.

Memory bound: reads and writes 2 bytes a turned dim (BF16), 64 of a head's 512, and 256 bytes of angles a token. One
program block_h heads of a token. The bits are those of `rope_inverse`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import RopeInverseInPlaceProblem

from . import host
from .nvfp4 import narrow, widen
from .overlap import begin
from .rope import head_strides, load_angles, pair_angles, refuse_heads, turn
from .rounding import CVT


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_h heads of a token a program."""

    block_h: int = 8
    num_warps: int = 1


SPACE = {"block_h": (4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8)}


def supports(problem: RopeInverseInPlaceProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return refuse_heads(problem.head_dim, problem.rope_dim, problem.x) or host.refuse_rows(
        config.block_h, problem.rope_dim, config.num_warps, "absmax"
    )


def default(problem: RopeInverseInPlaceProblem) -> Config:
    """Four warps a program: four numbers a thread, 16 where so many programs are there."""
    return Config(block_h=32 if problem.m * problem.heads >= 1 << 15 else 8, num_warps=4)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _turn_back(
    o_ptr, stride_m, stride_h, positions_ptr, table_ptr, HEADS,
    ROPE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """o_ptr: the first dim that is turned, of the first head."""
    begin()
    # int64 before the multiply: a long batch passes 2**31 elements
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    cols = tl.arange(0, PADDED)
    inside = (heads < HEADS)[:, None] & (cols < ROPE_DIM)[None, :]
    at = o_ptr + token * stride_m + heads[:, None] * stride_h + cols[None, :]
    x = widen(tl.load(at, mask=inside, other=0.0))
    position = tl.load(positions_ptr + token + tl.arange(0, 1))
    angles = pair_angles(PADDED // 2, ROPE_DIM, ROPE_DIM)
    cos, sin = load_angles(table_ptr, position, position >= 0, angles, ROPE_DIM)
    y = turn(x, cos, sin, angles, True, ROPE_DIM, BLOCK_H, PADDED // 2)
    tl.store(at, narrow(y, o_ptr.dtype.element_ty, CVT), mask=inside)


def launch(positions: Tensor, table: Tensor, o: Tensor, config: Config) -> None:
    """o [m, heads, head_dim], tokens and heads of any stride, changed in place.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    """
    m, heads, head_dim = o.shape
    if m == 0:
        return
    rope_dim = table.shape[1]
    operands = (o[..., head_dim - rope_dim :], *head_strides(o), positions, table, heads)
    grid = (m, triton.cdiv(heads, config.block_h))
    _turn_back[grid](*operands, **_constants(rope_dim, config), num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: RopeInverseInPlaceProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    o = torch.zeros(1, problem.heads, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table, first = torch.zeros(1, problem.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    launch(first, table, o, config)


def build_key(problem: RopeInverseInPlaceProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m, heads and head_dim are read at launch."""
    return problem.x, problem.rope_dim


def build(problem: RopeInverseInPlaceProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"o_ptr": f"*{problem.x}", "stride_m": "i32", "stride_h": "i32", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "HEADS": "i32"}
    constants = _constants(problem.rope_dim, config)
    return host.build(_turn_back, types, constants, arch, config.num_warps, unaligned=("positions_ptr",))


def _constants(rope_dim: int, config: Config) -> dict[str, Any]:
    return {"ROPE_DIM": rope_dim, "BLOCK_H": config.block_h, "PADDED": triton.next_power_of_2(rope_dim)}
