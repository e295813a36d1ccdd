"""Clamped SwiGLU, then NVFP4, without the activations in memory.

Memory bound: reads 4 bytes (BF16 gate and up) and writes 9/16 an output element. One program a [block_m, block_k] tile
of the output. By rule absmax codes come from an approximation, half the instructions; a program with a block in doubt,
about one in a hundred, computes its tile again as the reference does.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import BLOCK, NVFP4Tensor
from fp4suite.problem import Rule, SwigluQuantizeProblem

from . import amax, host
from .near import near_blocks
from .nvfp4 import CVT, load_half, magnitude_bits, quantize_blocks, store_blocks
from .overlap import begin
from .silu import MOST_BOUNDED, gated


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows by block_k output columns a program, whole blocks of 16 a thread."""

    block_m: int = 1
    block_k: int = 512
    num_warps: int = 1


SPACE = {"block_m": (1, 4, 16), "block_k": (256, 512, 1024), "num_warps": (1, 2, 4, 8)}


def supports(problem: SwigluQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return host.refuse_tile(config.block_m, config.block_k, config.num_warps, problem.rule, least=BLOCK)


def default(problem: SwigluQuantizeProblem) -> Config:
    """A block a thread and one warp a program: several would meet in shared memory to know whether one is in doubt."""
    return Config()


@triton.jit(do_not_specialize=["M"])
def _swiglu_quantize(
    x_ptr,
    stride_m,
    alpha_ptr,
    data_ptr,
    sf_ptr,
    amax_ptr,
    M,
    K,
    limit,
    RULE: tl.constexpr,
    SF_BLOCKED: tl.constexpr,
    E2M1_CVT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    begin()
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.program_id(1) * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    inside = (rows < M)[:, None, None] & (blocks < K // 16)[None, :, None]
    at = x_ptr + rows[:, None, None] * stride_m
    if RULE != "amax":
        alpha = tl.load(alpha_ptr)  # first: what needs it is far away, and ptxas would wait twice
    NEAR: tl.constexpr = RULE == "absmax" and BOUNDED and CVT
    lo = _swiglu(at, K, blocks, inside, limit, 0, NEAR, False, BOUNDED, BLOCK_M, BLOCK_K // 16)
    hi = _swiglu(at, K, blocks, inside, limit, 1, NEAR, False, BOUNDED, BLOCK_M, BLOCK_K // 16)
    if RULE == "amax":
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(amax_ptr + tile, tl.max(tl.maximum(magnitude_bits(lo), magnitude_bits(hi))))
    elif NEAR:
        words, byte, doubt = near_blocks(lo, hi, alpha, BLOCK_M, BLOCK_K // 16)
        if tl.max(doubt) != 0:
            lo = _swiglu(at, K, blocks, inside, limit, 0, False, True, BOUNDED, BLOCK_M, BLOCK_K // 16)
            hi = _swiglu(at, K, blocks, inside, limit, 1, False, True, BOUNDED, BLOCK_M, BLOCK_K // 16)
            words, byte = quantize_blocks(lo, hi, alpha, RULE, BLOCK_M, BLOCK_K // 16, E2M1_CVT)
        store_blocks(words, byte, rows, blocks, data_ptr, sf_ptr, M, K, SF_BLOCKED)
    else:
        words, byte = quantize_blocks(lo, hi, alpha, RULE, BLOCK_M, BLOCK_K // 16, E2M1_CVT)
        store_blocks(words, byte, rows, blocks, data_ptr, sf_ptr, M, K, SF_BLOCKED)


@triton.jit
def _swiglu(
    at, K, blocks, inside, limit, HALF: tl.constexpr, NEAR: tl.constexpr, AGAIN: tl.constexpr, BOUNDED: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """A half of the blocks of rows that begin at `at`: FP32 [ROWS, BLOCKS, 8], to the bit or `near`."""
    g = load_half(at, blocks, inside, HALF, ROWS, BLOCKS, AGAIN)
    u = load_half(at + K, blocks, inside, HALF, ROWS, BLOCKS, AGAIN)
    return gated(g, u, limit, NEAR, BOUNDED)


def launch(x: Tensor, limit: float, alpha: Tensor, out: NVFP4Tensor, rule: Rule, config: Config) -> None:
    """x [m, 2 k] (gate columns first), rows of any stride, under alpha float32 [] -> out's codes and scales [m, k]."""
    m, k = x.shape[0], x.shape[1] // 2
    if m == 0:
        return
    grid = host.grid(m, k, config.block_m, config.block_k, out.sf_layout)
    constants = _constants(limit, rule, out.sf_layout, host.has_e2m1_cvt(x.device), config)
    operands = (x, host.row_stride(x), alpha, out.data, out.sf.view(torch.uint8), None, m, k, limit)
    _swiglu_quantize[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def global_scale(x: Tensor, limit: float, alpha: Tensor, config: Config) -> None:
    """alpha float32 [] <- amax / 2688 of the activations of x [m, 2 k], in two launches, nothing read on the host."""
    m, k = x.shape[0], x.shape[1] // 2
    if m == 0:
        alpha.zero_()
        return
    grid = host.grid(m, k, config.block_m, config.block_k, "linear")
    bits = amax.tile_maxima(grid[0] * grid[1], x.device)
    constants = _constants(limit, "amax", "linear", False, config)
    operands = (x, host.row_stride(x), None, None, None, bits, m, k, limit)
    _swiglu_quantize[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)
    amax.finish(bits, alpha)


def warm(problem: SwigluQuantizeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, 2 * problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    alpha = torch.ones((), device="cuda")
    global_scale(x, 1.0, alpha, config)
    launch(x, 1.0, alpha, NVFP4Tensor.empty((1, problem.k), alpha, problem.sf_layout), problem.rule, config)


def build_key(problem: SwigluQuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.x, problem.rule, problem.sf_layout


def build(problem: SwigluQuantizeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "alpha_ptr": "*fp32", "data_ptr": "*u8", "sf_ptr": "*u8"}
    types |= {"M": "i32", "K": "i32", "limit": "fp32"}
    constants = _constants(10.0, problem.rule, problem.sf_layout, arch == "sm_100a", config) | {"amax_ptr": None}
    return host.build(_swiglu_quantize, types, constants, arch, config.num_warps, unaligned=("M",))


def _constants(limit: float, rule: str, sf_layout: str, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    return {
        "RULE": rule,
        "SF_BLOCKED": sf_layout == "blocked_128x4",
        "E2M1_CVT": e2m1_cvt,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
        "BOUNDED": limit <= MOST_BOUNDED,
    }
