"""The indexer's queries: RoPE, optionally Hadamard, then the rounding that keys of an index format get when stored.

Memory bound: reads and writes 2 bytes a dim (BF16). One program block_h heads of one token, whose angles are loaded
once for all of them. What is rounded comes out as numbers again, every format but fp32 exactly in BF16; or, in fp8, as
E4M3 bytes, for `index_logits` to multiply, while the power of two of a head goes into its weight.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import MX_BLOCK as _MX_BLOCK
from fp4suite.problem import IndexQueryProblem

from . import host
from .cache_rows import FP8_FLOOR, MX_BLOCK, MX_FLOOR, at_least
from .hadamard import hadamard
from .nvfp4 import e2m1_round, e4m3_to_f32, narrow, widen
from .rope import head_strides, load_angles, pair_angles, refuse_heads, turn
from .rounding import CVT, e4m3_bits, e8m0_of_6, e8m0_of_448, e8m0_reciprocal, largest, rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_h heads of a token a program."""

    block_h: int = 16
    num_warps: int = 4


SPACE = {"block_h": (4, 8, 16, 32), "num_warps": (1, 2, 4, 8)}


def supports(problem: IndexQueryProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    p, padded = problem, triton.next_power_of_2(problem.head_dim)
    if p.codes and p.format != "fp8":
        return f"only fp8 has codes that can be multiplied, got format={p.format}"
    if p.hadamard and padded != p.head_dim:
        return f"a Hadamard transform needs a power of two, got head_dim={p.head_dim}"
    if p.format == "mxfp4" and p.head_dim % _MX_BLOCK:
        return f"mxfp4 has blocks of {_MX_BLOCK} dims, got head_dim={p.head_dim}"
    if why := refuse_heads(p.head_dim, p.rope_dim, p.x):
        return why
    return host.refuse_tile(config.block_h, padded, config.num_warps)


def default(problem: IndexQueryProblem) -> Config:
    """A token's heads in few programs where there are many tokens; of short heads at least what fills the threads."""
    config = Config() if problem.m * problem.heads >= 1 << 13 else Config(block_h=4, num_warps=1)
    least = host.LEAST * 32 * config.num_warps // triton.next_power_of_2(problem.head_dim)
    return replace(config, block_h=max(config.block_h, least))


@triton.jit
def _e4m3_round(t):
    """FP32 -> the nearest E4M3 number, saturating."""
    if CVT:
        return t.to(tl.float8e4nv).to(tl.float32)
    else:
        return e4m3_to_f32(e4m3_bits(t))


@triton.jit
def _e2m1_round(t):
    """FP32 -> the nearest E2M1 number, saturating, with the sign of -0; NaN gives 6."""
    t = tl.where(t < 6.0, t, 6.0)
    sign = t.to(tl.int32, bitcast=True) & -2147483648
    return (tl.abs(e2m1_round(t)).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _to_448(y):
    """Rows [ROWS, PADDED] in BF16 over powers of two [ROWS, 1] by which the largest magnitude is at most 448."""
    y = rounded(y, tl.bfloat16)
    byte = e8m0_of_448(at_least(largest(y, 1), FP8_FLOOR))[:, None]
    return y * e8m0_reciprocal(byte), (byte << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round_to(y, FORMAT: tl.constexpr, ROWS: tl.constexpr, PADDED: tl.constexpr):
    """Rows [ROWS, PADDED], zero in their padding, as they would come back from a cache."""
    if FORMAT == "bf16":
        y = rounded(y, tl.bfloat16)
    elif FORMAT == "fp8":
        y, scale = _to_448(y)
        y = _e4m3_round(y) * scale
    elif FORMAT == "mxfp4":
        blocks = rounded(y, tl.bfloat16).reshape(ROWS, PADDED // MX_BLOCK, MX_BLOCK)
        byte = e8m0_of_6(at_least(largest(blocks, 2), MX_FLOOR))[:, :, None]
        blocks = _e2m1_round(blocks * e8m0_reciprocal(byte)) * (byte << 23).to(tl.float32, bitcast=True)
        y = blocks.reshape(ROWS, PADDED)
    else:
        tl.static_assert(FORMAT == "fp32", "unknown index format")
    return y


@triton.jit
def _index_query(
    q_ptr, stride_m, stride_h, positions_ptr, table_ptr, out_ptr, weights_ptr, stride_w, scaled_ptr, HEADS,
    FORMAT: tl.constexpr, HADAMARD: tl.constexpr, HEAD_DIM: tl.constexpr, ROPE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr, PADDED: tl.constexpr,
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
    y = turn(x, cos, sin, angles, False, ROPE_DIM, BLOCK_H, PADDED // 2)
    if HADAMARD:
        y = hadamard(y, BLOCK_H, PADDED)
    at = out_ptr + (token * HEADS + heads)[:, None] * HEAD_DIM + cols[None, :]
    if weights_ptr is None:
        y = _round_to(y, FORMAT, BLOCK_H, PADDED)
        tl.store(at, narrow(y, out_ptr.dtype.element_ty, CVT), mask=inside)
    else:
        y, scale = _to_448(y)
        tl.store(at, e4m3_bits(y), mask=inside)
        heads = heads[:, None]
        weights = widen(tl.load(weights_ptr + token * stride_w + heads, mask=heads < HEADS, other=0.0))
        tl.store(scaled_ptr + token * HEADS + heads, weights * scale, mask=heads < HEADS)


def launch(
    q: Tensor,
    positions: Tensor,
    table: Tensor,
    format: str,
    hadamard: bool,
    out: Tensor,
    weights: tuple[Tensor, Tensor] | None,
    config: Config,
) -> None:
    """q [m, heads, head_dim], tokens and heads of any stride -> out, its like, contiguous.

    positions: int [m], contiguous, in range of table float32 [positions, rope_dim].
    weights: if given, out are E4M3 bytes (uint8; format fp8), and weights [m, heads] times their scales go to the
    second of them, FP32 and contiguous.
    """
    m, heads, head_dim = q.shape
    if m == 0:
        return
    scaled = (None, 0, None) if weights is None else (weights[0], host.row_stride(weights[0]), weights[1])
    operands = (q, *head_strides(q), positions, table, out, *scaled, heads)
    constants = _constants(format, hadamard, head_dim, table.shape[1], config)
    grid = (m, triton.cdiv(heads, config.block_h))
    _index_query[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: IndexQueryProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    q = torch.zeros(1, problem.heads, problem.head_dim, dtype=host.DTYPES[problem.x], device="cuda")
    table, first = torch.zeros(1, problem.rope_dim, device="cuda"), torch.zeros(1, dtype=torch.int32, device="cuda")
    out, weights = torch.empty_like(q), None
    if problem.codes:
        ones = torch.ones(1, problem.heads, device="cuda")
        out, weights = out.to(torch.uint8), (ones, ones.clone())
    launch(q, first, table, problem.format, bool(problem.hadamard), out, weights, config)


def build_key(problem: IndexQueryProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m and heads are read at launch."""
    return problem.x, problem.format, problem.codes, problem.hadamard, problem.head_dim, problem.rope_dim


def build(problem: IndexQueryProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"q_ptr": f"*{problem.x}", "stride_m": "i32", "stride_h": "i32", "positions_ptr": "*i32"}
    types |= {"table_ptr": "*fp32", "out_ptr": "*u8" if problem.codes else f"*{problem.x}", "HEADS": "i32"}
    constants = _constants(problem.format, bool(problem.hadamard), problem.head_dim, problem.rope_dim, config)
    if problem.codes:
        types |= {"weights_ptr": "*fp32", "stride_w": "i32", "scaled_ptr": "*fp32"}
    else:
        constants |= {"weights_ptr": None, "stride_w": 0, "scaled_ptr": None}
    return host.build(_index_query, types, constants, arch, config.num_warps)


def _constants(format: str, hadamard: bool, head_dim: int, rope_dim: int, config: Config) -> dict[str, Any]:
    return {
        "FORMAT": format,
        "HADAMARD": hadamard,
        "HEAD_DIM": head_dim,
        "ROPE_DIM": rope_dim,
        "BLOCK_H": config.block_h,
        "PADDED": triton.next_power_of_2(head_dim),
    }
