"""BF16, FP16 or FP32 -> E4M3 with one FP32 scale a row, columns in the order of `layouts.fp8_columns`.

Memory bound: reads 2 bytes (BF16) and writes 1 an element. One program holds block_m whole rows, read once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite import layouts
from fp4suite.built import Built
from fp4suite.formats import FP8RowTensor
from fp4suite.problem import QuantizeFp8Problem
from fp4suite.reference import fp8

from . import host
from .nvfp4 import E4M3_MAX, MAGNITUDE, e4m3_encode, magnitude_bits, widen
from .overlap import begin

LEAST_AMAX = tl.constexpr(fp8.LEAST_AMAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m whole rows a program."""

    block_m: int = 1
    num_warps: int = 8


SPACE = {"block_m": (1, 2, 4), "num_warps": (4, 8, 16)}


def supports(problem: QuantizeFp8Problem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.k % layouts.TILE:
        return f"k={problem.k}: FP8 rows are permuted by {layouts.TILE} columns"
    return host.refuse_rows(config.block_m, problem.k, config.num_warps, "absmax")


def default(problem: QuantizeFp8Problem) -> Config:
    """Whole rows, by as few warps as hold them."""
    wanted = (Config(num_warps=warps) for warps in (4, 8, 16))
    return next((c for c in wanted if supports(problem, c) is None), Config())


@triton.jit
def _encode(t, FP8_CVT: tl.constexpr):
    """FP32 in -448 .. 448 or NaN -> E4M3 byte, to nearest even."""
    if FP8_CVT:
        return t.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        sign = (t.to(tl.int32, bitcast=True) >> 24) & 0x80
        byte = e4m3_encode((t.to(tl.int32, bitcast=True) & MAGNITUDE).to(tl.float32, bitcast=True)) | sign
        return tl.where(t != t, 0x7F, byte).to(tl.uint8)


@triton.jit(do_not_specialize=["M"])
def _quantize_fp8(
    x_ptr,
    stride_m,
    data_ptr,
    scale_ptr,
    M,
    K,
    FP8_CVT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin()
    # int64 before the multiply: many tokens pass 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    x = widen(tl.load(x_ptr + rows[:, None] * stride_m + cols[None, :], mask=inside, other=0.0))
    least = tl.full([BLOCK_M], LEAST_AMAX, tl.float32).to(tl.int32, bitcast=True)
    amax = tl.maximum(tl.max(magnitude_bits(x), axis=1), least).to(tl.float32, bitcast=True)
    tl.store(scale_ptr + rows, tl.div_rn(amax, E4M3_MAX), mask=rows < M)
    data = _encode(x * tl.div_rn(E4M3_MAX, amax)[:, None], FP8_CVT)
    # words of every 64 columns, transposed as 4 x 4
    data = data.reshape(BLOCK_M, BLOCK_K // 64, 4, 4, 4).permute(0, 1, 3, 2, 4).reshape(BLOCK_M, BLOCK_K)
    tl.store(data_ptr + rows[:, None] * K + cols[None, :], data, mask=inside)


def launch(x: Tensor, out: FP8RowTensor, config: Config) -> None:
    """x [m, k], rows of any stride, k a multiple of 64 -> out, which is contiguous."""
    m, k = x.shape
    if m == 0:
        return
    operands = (x, host.row_stride(x), out.data.view(torch.uint8), out.scale, m, k)
    constants = _constants(k, x.device.type == "cuda", config)
    _quantize_fp8[(triton.cdiv(m, config.block_m),)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: QuantizeFp8Problem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    launch(x, FP8RowTensor(torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty(1, dtype=torch.float32)), config)


def build_key(problem: QuantizeFp8Problem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch."""
    return problem.x, triton.next_power_of_2(problem.k)


def build(problem: QuantizeFp8Problem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "data_ptr": "*u8", "scale_ptr": "*fp32"}
    types |= {"M": "i32", "K": "i32"}
    constants = _constants(problem.k, True, config)
    return host.build(_quantize_fp8, types, constants, arch, config.num_warps, unaligned=("M",))


def _constants(k: int, fp8_cvt: bool, config: Config) -> dict[str, Any]:
    return {"FP8_CVT": fp8_cvt, "BLOCK_M": config.block_m, "BLOCK_K": triton.next_power_of_2(k)}
