"""RoPE undone on attention's output, then NVFP4 by group of heads, for a grouped output projection in NVFP4.

Memory bound: reads 2 bytes (BF16) and writes 9/16 a dim. One program a [block_m tokens, block_k columns] tile of one
group; rotation and rounding to the input's type are those of `rope_inverse`, before the quantiser sees a number.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import BLOCK, NVFP4Tensor
from fp4suite.problem import RopeInverseQuantizeProblem, Rule

from . import amax, host
from .nvfp4 import magnitude_bits, store_quantized, widen
from .overlap import begin
from .rope import head_strides, refuse_heads, turn_pairs
from .rounding import rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m tokens by block_k columns of a group a program. One warp: nothing goes through shared memory."""

    block_m: int = 1
    block_k: int = 1024
    num_warps: int = 1


SPACE = {"block_m": (1, 4, 16), "block_k": (512, 1024, 2048), "num_warps": (1, 2, 4, 8)}


def supports(problem: RopeInverseQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.heads % problem.groups or problem.k % 16:
        return f"heads={problem.heads} of {problem.head_dim} dims do not make {problem.groups} groups in blocks of 16"
    return refuse_heads(problem.head_dim, problem.rope_dim, problem.x) or host.refuse_tile(
        config.block_m, config.block_k, config.num_warps, problem.rule, least=BLOCK
    )


def default(problem: RopeInverseQuantizeProblem) -> Config:
    """Two blocks a thread; one where there are few tokens."""
    return Config() if problem.m * problem.heads >= 1 << 13 else Config(block_k=512)


@triton.jit(do_not_specialize=["M", "sf_group"], do_not_specialize_on_alignment=["positions_ptr"])
def _rope_inverse_quantize(
    o_ptr, stride_m, stride_h, positions_ptr, table_ptr, alpha_ptr, data_ptr, sf_ptr, sf_group, amax_ptr, M, K,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr, RULE: tl.constexpr, SF_BLOCKED: tl.constexpr,
    E2M1_CVT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    begin()
    # int64 before the multiply: a long batch passes 2**31 elements
    group = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.program_id(1) * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    heads_ptr = o_ptr + group * (K // HEAD_DIM) * stride_h
    lo = _turned_half(
        heads_ptr, stride_m, stride_h, positions_ptr, table_ptr, rows, blocks, M, K, 0, HEAD_DIM, ROPE_DIM
    )
    hi = _turned_half(
        heads_ptr, stride_m, stride_h, positions_ptr, table_ptr, rows, blocks, M, K, 1, HEAD_DIM, ROPE_DIM
    )
    if RULE == "amax":
        tile = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
        tl.store(amax_ptr + tile, tl.max(tl.maximum(magnitude_bits(lo), magnitude_bits(hi))))
    else:
        store_quantized(
            lo, hi, rows, blocks, tl.load(alpha_ptr), data_ptr + group * M * (K // 2), sf_ptr + group * sf_group,
            M, K, RULE, SF_BLOCKED, E2M1_CVT, BLOCK_M, BLOCK_K // 16,
        )  # fmt: skip


@triton.jit
def _turned_half(
    heads_ptr, stride_m, stride_h, positions_ptr, table_ptr, rows, blocks, M, K, HALF: tl.constexpr,
    HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
):  # fmt: skip
    """The first or second eight columns of each of `blocks`, turned back: FP32 [rows, blocks, 8]."""
    ROWS: tl.constexpr = rows.shape[0]
    BLOCKS: tl.constexpr = blocks.shape[0]
    cols = blocks[:, None] * 16 + HALF * 8 + tl.arange(0, 8)[None, :]
    at = (cols // HEAD_DIM).to(tl.int64) * stride_h + cols % HEAD_DIM
    inside = (rows < M)[:, None, None] & (blocks < K // 16)[None, :, None]
    x = widen(tl.load(heads_ptr + (rows * stride_m)[:, None, None] + at[None, :, :], mask=inside, other=0.0))
    a, b = tl.split(x.reshape(ROWS, BLOCKS, 4, 2))
    pairs = blocks[:, None] * 8 + HALF * 4 + tl.arange(0, 4)[None, :]
    angles = pairs % (HEAD_DIM // 2) - (HEAD_DIM - ROPE_DIM) // 2
    turned = ((angles >= 0) & (angles < ROPE_DIM // 2))[None, :, :]
    positions = tl.load(positions_ptr + rows, mask=rows < M, other=-1)[:, None, None]
    at = table_ptr + positions.to(tl.int64) * ROPE_DIM + angles[None, :, :]
    known = turned & (positions >= 0)
    cos = tl.load(at, mask=known, other=0.0)
    sin = tl.load(at + ROPE_DIM // 2, mask=known, other=0.0)
    y = tl.join(*turn_pairs(a, b, cos, sin, turned, True)).reshape(ROWS, BLOCKS, 8)
    return rounded(y, heads_ptr.dtype.element_ty)


def launch(
    o: Tensor, positions: Tensor, table: Tensor, groups: int, alpha: Tensor, out: NVFP4Tensor, rule: Rule,
    config: Config,
) -> None:  # fmt: skip
    """o [m, heads, head_dim], tokens and heads of any stride, under alpha float32 [] -> out's codes and scales
    [groups, m, heads / groups * head_dim].

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    """
    m, k = out.shape[-2:]
    if m == 0:
        return
    sf = out.sf.view(torch.uint8)
    constants = _constants(o, table, rule, out.sf_layout, host.has_e2m1_cvt(o.device), config)
    operands = (o, *head_strides(o), positions, table, alpha, out.data, sf, sf[0].numel(), None, m, k)
    grid = (*host.grid(m, k, config.block_m, config.block_k, out.sf_layout), groups)
    _rope_inverse_quantize[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def global_scale(o: Tensor, positions: Tensor, table: Tensor, alpha: Tensor, config: Config) -> None:
    """alpha float32 [] <- amax / 2688 of what `launch` quantises, in two launches, nothing read on the host."""
    m, k = o.shape[0], o.shape[1] * o.shape[2]
    if m == 0:
        alpha.zero_()
        return
    grid = (*host.grid(m, k, config.block_m, config.block_k, "linear"), 1)
    bits = amax.tile_maxima(grid[0] * grid[1], o.device)
    constants = _constants(o, table, "amax", "linear", False, config)
    operands = (o, *head_strides(o), positions, table, None, None, None, 0, bits, m, k)
    _rope_inverse_quantize[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)
    amax.finish(bits, alpha)


def warm(problem: RopeInverseQuantizeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    o = torch.zeros(1, problem.heads, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table, first = torch.zeros(1, problem.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    alpha = torch.ones((), device="cuda")
    global_scale(o, first, table, alpha, config)
    out = NVFP4Tensor.empty((problem.groups, 1, problem.k), alpha, problem.sf_layout)
    launch(o, first, table, problem.groups, alpha, out, problem.rule, config)


def build_key(problem: RopeInverseQuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m, heads and groups are read at launch."""
    return problem.x, problem.rule, problem.sf_layout, problem.head_dim, problem.rope_dim


def build(problem: RopeInverseQuantizeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"o_ptr": f"*{problem.x}", "stride_m": "i32", "stride_h": "i32", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "alpha_ptr": "*fp32", "data_ptr": "*u8", "sf_ptr": "*u8", "sf_group": "i32"}
    types |= {"M": "i32", "K": "i32"}
    o, table = torch.empty(0, 0, problem.head_dim), torch.empty(0, problem.rope_dim)
    constants = _constants(o, table, problem.rule, problem.sf_layout, arch == "sm_100a", config) | {"amax_ptr": None}
    unaligned = ("positions_ptr", "M", "sf_group")
    return host.build(_rope_inverse_quantize, types, constants, arch, config.num_warps, unaligned=unaligned)


def _constants(o: Tensor, table: Tensor, rule: str, sf_layout: str, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    return {
        "HEAD_DIM": o.shape[2],
        "ROPE_DIM": table.shape[1],
        "RULE": rule,
        "SF_BLOCKED": sf_layout == "blocked_128x4",
        "E2M1_CVT": e2m1_cvt,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }
