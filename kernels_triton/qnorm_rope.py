"""RMSNorm of each query head, then RoPE on its last dims: what lies between q_b's GEMM and attention.

Memory bound: reads and writes 2 bytes a dim (BF16). One program block_h heads of one token, so that a single token of
128 heads reaches every SM; the token's angles are loaded once for all of them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import QnormRopeProblem

from . import host
from .nvfp4 import narrow, widen
from .rope import (
    HEAD_SPACE,
    HeadConfig,
    default_heads,
    head_strides,
    load_angles,
    pair_angles,
    rms_normed,
    supports_heads,
    turn,
)
from .rounding import CVT

Config = HeadConfig
SPACE, supports, default = HEAD_SPACE, supports_heads, default_heads


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _qnorm_rope(
    q_ptr, stride_m, stride_h, positions_ptr, table_ptr, eps, out_ptr, HEADS, HEAD_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr, BLOCK_H: tl.constexpr, PADDED: tl.constexpr,
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
    y = rms_normed(x, eps, HEAD_DIM, BLOCK_H, PADDED)
    y = turn(y, cos, sin, angles, False, ROPE_DIM, BLOCK_H, PADDED // 2)
    at = out_ptr + (token * HEADS + heads)[:, None] * HEAD_DIM + cols[None, :]
    tl.store(at, narrow(y, out_ptr.dtype.element_ty, CVT), mask=inside)


def launch(q: Tensor, positions: Tensor, table: Tensor, eps: float, out: Tensor, config: HeadConfig) -> None:
    """q [m, heads, head_dim], tokens and heads of any stride -> out, its like, contiguous.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    """
    m, heads, head_dim = q.shape
    if m == 0:
        return
    operands = (q, *head_strides(q), positions, table, eps, out, heads)
    constants = _constants(head_dim, table.shape[1], config)
    grid = (m, triton.cdiv(heads, config.block_h))
    _qnorm_rope[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: QnormRopeProblem, config: HeadConfig) -> None:
    """Compile for the current device what launches of `problem` need."""
    q = torch.zeros(1, problem.heads, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table, first = torch.zeros(1, problem.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    launch(q, first, table, 1.0, torch.empty_like(q), config)


def build_key(problem: QnormRopeProblem, config: HeadConfig) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and heads are read at launch."""
    return problem.x, problem.head_dim, problem.rope_dim


def build(problem: QnormRopeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"q_ptr": f"*{problem.x}", "stride_m": "i32", "stride_h": "i32", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "eps": "fp32", "out_ptr": f"*{problem.x}", "HEADS": "i32"}
    constants = _constants(problem.head_dim, problem.rope_dim, config)
    return host.build(_qnorm_rope, types, constants, arch, config.num_warps, unaligned=("positions_ptr",))


def _constants(head_dim: int, rope_dim: int, config: HeadConfig) -> dict[str, Any]:
    padded = triton.next_power_of_2(head_dim)
    return {"HEAD_DIM": head_dim, "ROPE_DIM": rope_dim, "BLOCK_H": config.block_h, "PADDED": padded}
