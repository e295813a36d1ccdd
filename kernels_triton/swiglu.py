"""Clamped SwiGLU, rounded once: the shared expert's activation where its next linear reads no NVFP4.

Memory bound: reads 8 bytes (FP32 gate and up, as their GEMM leaves them) and writes 2 (BF16) an output element. One
program a [block_m, block_k] tile of the output. To the bit without an approximation first, as `swiglu_quantize` has it:
its instructions take a third of the time that the bytes do.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import SwigluProblem

from . import host
from .nvfp4 import narrow, widen
from .overlap import begin
from .rounding import CVT
from .silu import MOST_BOUNDED, gated

FEW = 1 << 18  # output elements


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows by block_k output columns a program."""

    block_m: int = 1
    block_k: int = 1024
    num_warps: int = 4


SPACE = {"block_m": (1, 2, 4), "block_k": (256, 512, 1024), "num_warps": (1, 2, 4, 8)}


def default(problem: SwigluProblem) -> Config:
    """Eight columns a thread; four and narrow tiles where there are few, so that they reach every SM."""
    return Config(block_k=256, num_warps=2) if problem.m * problem.k <= FEW else Config()


def supports(problem: SwigluProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    held = config.block_m * config.block_k / (32 * config.num_warps)
    if not 4 <= held <= 32:
        return f"{held:g} columns a thread, not 4 to 32"
    return None


@triton.jit(do_not_specialize=["M"])
def _swiglu(x_ptr, stride_m, out_ptr, M, K, limit, BOUNDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    begin()
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    at = x_ptr + rows[:, None] * stride_m + cols[None, :]
    g = tl.load(at, mask=inside, other=0.0)
    u = tl.load(at + K, mask=inside, other=0.0)
    y = gated(widen(g), widen(u), limit, False, BOUNDED)
    at = out_ptr + rows[:, None] * K + cols[None, :]
    tl.store(at, narrow(y, out_ptr.dtype.element_ty, CVT), mask=inside)


def launch(x: Tensor, limit: float, out: Tensor, config: Config) -> None:
    """x [m, 2 k] (gate columns first), rows of any stride -> out [m, k], contiguous."""
    m, k = out.shape
    if not out.numel():
        return
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(k, config.block_k))
    constants = _constants(limit, config)
    _swiglu[grid](x, host.row_stride(x), out, m, k, limit, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: SwigluProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, 2 * problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    launch(x, 1.0, torch.empty(1, problem.k, dtype=host.DTYPES[problem.out], device="cuda"), config)


def build_key(problem: SwigluProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.x, problem.out


def build(problem: SwigluProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "out_ptr": f"*{problem.out}"}
    types |= {"M": "i32", "K": "i32", "limit": "fp32"}
    return host.build(_swiglu, types, _constants(10.0, config), arch, config.num_warps, unaligned=("M",))


def _constants(limit: float, config: Config) -> dict[str, Any]:
    return {"BOUNDED": limit <= MOST_BOUNDED, "BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
