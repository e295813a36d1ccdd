"""BF16, FP16 or FP32 -> NVFP4, every rule and both scale layouts.

Memory bound: reads 2 bytes (BF16) and writes 9/16 an element. One program a [block_m, block_k] tile, read once. Rule
"mse" rounds each element ten times and is bound by arithmetic.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import BLOCK, NVFP4Tensor
from fp4suite.problem import QuantizeProblem, Rule

from . import amax, host
from .nvfp4 import load_half, magnitude_bits, store_quantized
from .overlap import let_come, wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows by block_k elements of K a program, whole blocks of 16 a thread."""

    block_m: int = 4
    block_k: int = 1024
    num_warps: int = 4


SPACE = {"block_m": (1, 4, 16), "block_k": (512, 1024, 2048), "num_warps": (1, 2, 4, 8)}


def supports(problem: QuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return host.refuse_tile(config.block_m, config.block_k, config.num_warps, problem.rule, least=BLOCK)


def default(problem: QuantizeProblem) -> Config:
    """Two blocks a thread; one where there is too little for every SM: of long rows by four warps a program (k=16384,
    m=4: 2.11 us on an H100, 2.4 by one), else by one.
    """
    if problem.m * problem.k >= 1 << 20:
        return Config()
    return Config(block_m=4, block_k=512) if problem.k >= 16384 else Config(block_m=1, block_k=512, num_warps=1)


@triton.jit(do_not_specialize=["M"])
def _quantize_nvfp4(
    x_ptr,
    stride_m,
    alpha_ptr,
    data_ptr,
    sf_ptr,
    amax_ptr,
    M,
    K,
    RULE: tl.constexpr,
    SF_BLOCKED: tl.constexpr,
    E2M1_CVT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait()
    if E2M1_CVT:  # on sm_100a, whose GEMM waits before it reads anything
        let_come()
    # int64 before the multiply: stacked experts pass 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.program_id(1) * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    inside = (rows < M)[:, None, None] & (blocks < K // 16)[None, :, None]
    at = x_ptr + rows[:, None, None] * stride_m
    lo = load_half(at, blocks, inside, 0, BLOCK_M, BLOCK_K // 16)
    hi = load_half(at, blocks, inside, 1, BLOCK_M, BLOCK_K // 16)
    if RULE == "amax":
        tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        tl.store(amax_ptr + tile, tl.max(tl.maximum(magnitude_bits(lo), magnitude_bits(hi))))
    else:
        alpha = tl.load(alpha_ptr)
        store_quantized(
            lo, hi, rows, blocks, alpha, data_ptr, sf_ptr, M, K, RULE, SF_BLOCKED, E2M1_CVT, BLOCK_M, BLOCK_K // 16
        )


def launch(x: Tensor, alpha: Tensor, out: NVFP4Tensor, rule: Rule, config: Config) -> None:
    """x [m, k], rows of any stride, under alpha float32 [] -> out's codes and scales; out.alpha is left alone."""
    m, k = x.shape
    if m == 0:
        return
    grid = host.grid(m, k, config.block_m, config.block_k, out.sf_layout)
    constants = _constants(rule, out.sf_layout, host.has_e2m1_cvt(x.device), config)
    operands = (x, host.row_stride(x), alpha, out.data, out.sf.view(torch.uint8), None, m, k)
    _quantize_nvfp4[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def global_scale(x: Tensor, alpha: Tensor, config: Config) -> None:
    """alpha float32 [] <- amax(|x|) / 2688 of x [m, k], in two launches, nothing read on the host."""
    m, k = x.shape
    if m == 0:
        alpha.zero_()
        return
    grid = host.grid(m, k, config.block_m, config.block_k, "linear")
    bits = amax.tile_maxima(grid[0] * grid[1], x.device)
    constants = _constants("amax", "linear", False, config)
    operands = (x, host.row_stride(x), None, None, None, bits, m, k)
    _quantize_nvfp4[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)
    amax.finish(bits, alpha)


def warm(problem: QuantizeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    alpha = torch.ones((), device="cuda")
    global_scale(x, alpha, config)
    launch(x, alpha, NVFP4Tensor.empty((1, problem.k), alpha, problem.sf_layout), problem.rule, config)


def build_key(problem: QuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.x, problem.rule, problem.sf_layout


def build(problem: QuantizeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "alpha_ptr": "*fp32", "data_ptr": "*u8", "sf_ptr": "*u8"}
    types |= {"M": "i32", "K": "i32"}
    constants = _constants(problem.rule, problem.sf_layout, arch == "sm_100a", config) | {"amax_ptr": None}
    return host.build(_quantize_nvfp4, types, constants, arch, config.num_warps, unaligned=("M",))


def _constants(rule: str, sf_layout: str, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    return {
        "RULE": rule,
        "SF_BLOCKED": sf_layout == "blocked_128x4",
        "E2M1_CVT": e2m1_cvt,
        "BLOCK_M": config.block_m,
        "BLOCK_K": config.block_k,
    }
