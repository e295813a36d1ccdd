"""RMSNorm with a weight, then NVFP4, without the normed row in memory.

Memory bound: reads 2 bytes (BF16) and writes 9/16 an element. One program block_m whole rows, kept in registers
between the sum of squares and the quantiser.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import RmsnormQuantizeProblem, Rule

from . import amax, host
from .nvfp4 import magnitude_bits, row_sum, store_quantized, widen


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows a program."""

    block_m: int = 1
    num_warps: int = 8


SPACE = {"block_m": (1, 2, 4), "num_warps": (2, 4, 8, 16)}


def supports(problem: RmsnormQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return host.refuse_rows(config.block_m, problem.k, config.num_warps, problem.rule)


@triton.jit(do_not_specialize=["M"])
def _rmsnorm_quantize(
    x_ptr,
    stride_m,
    weight_ptr,
    alpha_ptr,
    data_ptr,
    sf_ptr,
    amax_ptr,
    M,
    K,
    eps,
    RULE: tl.constexpr,
    SF_BLOCKED: tl.constexpr,
    E2M1_CVT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    BLOCKS: tl.constexpr = PADDED_K // 16
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.arange(0, BLOCKS)
    cols = blocks[:, None] * 16 + tl.arange(0, 16)[None, :]
    inside = (rows < M)[:, None, None] & (cols < K)[None, :, :]
    x = widen(tl.load(x_ptr + rows[:, None, None] * stride_m + cols[None, :, :], mask=inside, other=0.0))
    weight = widen(tl.load(weight_ptr + cols, mask=cols < K, other=0.0))

    mean = tl.div_rn(row_sum((x * x).reshape(BLOCK_M, PADDED_K), BLOCK_M, PADDED_K), K.to(tl.float32))
    y = x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None, None] * weight[None, :, :]
    if RULE == "amax":
        y = tl.where(inside, y, 0.0)  # eps = 0 makes rows of zeros, the padding's too, NaN
        tl.store(amax_ptr + tl.program_id(0), tl.max(magnitude_bits(y)))
    else:
        alpha = tl.load(alpha_ptr)
        store_quantized(y, rows, blocks, alpha, data_ptr, sf_ptr, M, K, RULE, SF_BLOCKED, E2M1_CVT, BLOCK_M, BLOCKS)


def launch(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, out: NVFP4Tensor, rule: Rule, config: Config) -> None:
    """x [m, k], rows of any stride, with weight [k], under alpha float32 [] -> out's codes and scales."""
    m, k = x.shape
    if m == 0:
        return
    (programs, _) = host.grid(m, k, config.block_m, k, out.sf_layout)
    constants = _constants(k, rule, out.sf_layout, host.has_e2m1_cvt(x.device), config)
    operands = (x, host.row_stride(x), weight, alpha, out.data, out.sf.view(torch.uint8), None, m, k, eps)
    _rmsnorm_quantize[(programs,)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def global_scale(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, config: Config) -> None:
    """alpha float32 [] <- amax / 2688 of the normed rows of x [m, k], in two launches, nothing read on the host."""
    m, k = x.shape
    if m == 0:
        alpha.zero_()
        return
    (programs, _) = host.grid(m, k, config.block_m, k, "linear")
    bits = amax.tile_maxima(programs, x.device)
    constants = _constants(k, "amax", "linear", False, config)
    operands = (x, host.row_stride(x), weight, None, None, None, bits, m, k, eps)
    _rmsnorm_quantize[(programs,)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)
    amax.finish(bits, alpha)


def warm(problem: RmsnormQuantizeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    alpha = torch.ones((), device="cuda")
    global_scale(x, x[0], 1.0, alpha, config)
    launch(x, x[0], 1.0, alpha, NVFP4Tensor.empty((1, problem.k), alpha, problem.sf_layout), problem.rule, config)


def build_key(problem: RmsnormQuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch, k within its power of two."""
    return problem.x, problem.rule, problem.sf_layout, triton.next_power_of_2(problem.k)


def build(problem: RmsnormQuantizeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "weight_ptr": f"*{problem.x}", "alpha_ptr": "*fp32"}
    types |= {"data_ptr": "*u8", "sf_ptr": "*u8", "M": "i32", "K": "i32", "eps": "fp32"}
    constants = _constants(problem.k, problem.rule, problem.sf_layout, arch == "sm_100a", config)
    constants["amax_ptr"] = None
    return host.build(_rmsnorm_quantize, types, constants, arch, config.num_warps, unaligned=("M",))


def _constants(k: int, rule: str, sf_layout: str, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    return {
        "RULE": rule,
        "SF_BLOCKED": sf_layout == "blocked_128x4",
        "E2M1_CVT": e2m1_cvt,
        "BLOCK_M": config.block_m,
        "PADDED_K": triton.next_power_of_2(k),
    }
