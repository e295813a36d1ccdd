"""RMSNorm with a weight, then NVFP4, without the normed row in memory.

Memory bound: reads 2 bytes (BF16) and writes 9/16 an element. One program block_m rows, or a part of each of few rows;
rows stay in registers between the sum of squares and the quantiser, or are read again from L1 or L2.
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

from . import amax, host, normed_rows
from .normed_rows import factors, load_rows, normed_tile, pointers
from .nvfp4 import magnitude_bits, store_quantized
from .overlap import begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows by one of `parts` of their columns a program; every part sums its rows as a whole.

    Quantised are 16 columns a thread at a time: a tile is 512 num_warps / block_m columns wide. `held` rows stay in
    registers from the sum to the quantiser; others are read again, from L1 or L2.
    """

    block_m: int = 1
    num_warps: int = 2
    parts: int = 1
    held: bool = False

    @property
    def tile_k(self) -> int:
        """Columns that are quantised at a time."""
        return 512 * self.num_warps // self.block_m


FEW_ROWS = 256
SPACE = {"block_m": (1, 2, 4), "num_warps": (1, 2, 4, 8), "parts": (1, 2, 4, 8), "held": (False, True)}


def supports(problem: RmsnormQuantizeProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    tiles = triton.cdiv(problem.k, config.tile_k)
    if config.num_warps < config.block_m:
        return f"block_m={config.block_m} num_warps={config.num_warps}: a row takes a warp or more"
    if why := normed_rows.refuse(problem.k, config.tile_k, config.parts, config.held):
        return why
    if problem.rule == "mse" and triton.cdiv(tiles, config.parts) > 2:
        return f"rule mse takes ten times the code: up to two tiles a program, got {triton.cdiv(tiles, config.parts)}"
    return None


def default(problem: RmsnormQuantizeProblem) -> Config:
    """Few rows: each by several programs, 16 columns a thread. Many: one or two warps hold a short row, four read a
    long one twice (H100, 4096 x 4096: 20.2 us, held by one 26.6). Four rows a program start and wait together: 11.8 us
    where single ones took 10.2 (4096 x 1536).
    """
    k = problem.k
    if problem.m <= FEW_ROWS or problem.rule == "mse":
        num_warps = 4 if k > 2048 else 2
        return Config(num_warps=num_warps, parts=triton.cdiv(k, 512 * num_warps))
    if k > 2048:
        return Config(num_warps=4)
    return Config(num_warps=2 if 512 < k <= 1024 else 1, held=True)


@triton.jit(do_not_specialize=["M"])
def _rmsnorm_quantize(
    x_ptr, stride_m, weight_ptr, alpha_ptr, data_ptr, sf_ptr, amax_ptr, M, eps, K: tl.constexpr, RULE: tl.constexpr,
    SF_BLOCKED: tl.constexpr, E2M1_CVT: tl.constexpr, BLOCK_M: tl.constexpr, SUM_K: tl.constexpr, TILE_K: tl.constexpr,
    TILES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    begin()
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    at, weight_at = pointers(x_ptr, stride_m, weight_ptr, rows, M, BLOCK_M)
    start = tl.program_id(1) * TILES
    x, w, own = load_rows(at, weight_at, start, M, K, BLOCK_M, SUM_K, TILE_K, TILES, HELD)
    if RULE != "amax":
        alpha = tl.load(alpha_ptr)
    else:
        most = tl.zeros([BLOCK_M, TILE_K // 16, 8], tl.int32)
    factor = factors(x, at, eps, M, K, BLOCK_M, SUM_K, TILES)
    for i in tl.static_range(TILES):
        lo, hi = normed_tile(i, x, w, own, factor, at, weight_at, start, M, K, BLOCK_M, TILE_K, TILES, HELD)
        blocks = (start + i) * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
        if RULE == "amax":
            # eps = 0 makes rows of zeros NaN, the padding too
            larger = tl.maximum(magnitude_bits(lo), magnitude_bits(hi))
            most = tl.maximum(most, tl.where((blocks < K // 16)[None, :, None], larger, 0))
        else:
            store_quantized(
                lo, hi, rows, blocks, alpha, data_ptr, sf_ptr, M, K, RULE, SF_BLOCKED, E2M1_CVT, BLOCK_M, TILE_K // 16
            )
    if RULE == "amax":
        tl.store(amax_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.max(most))


def launch(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, out: NVFP4Tensor, rule: Rule, config: Config) -> None:
    """x [m, k], rows of any stride, with weight [k], under alpha float32 [] -> out's codes and scales."""
    m, k = x.shape
    if m == 0:
        return
    (programs, _) = host.grid(m, k, config.block_m, k, out.sf_layout)
    constants = _constants(k, rule, out.sf_layout, host.has_e2m1_cvt(x.device), config)
    operands = (x, host.row_stride(x), weight, alpha, out.data, out.sf.view(torch.uint8), None, m, eps)
    _rmsnorm_quantize[(programs, config.parts)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def global_scale(x: Tensor, weight: Tensor, eps: float, alpha: Tensor, config: Config) -> None:
    """alpha float32 [] <- amax / 2688 of the normed rows of x [m, k], in two launches, nothing read on the host."""
    m, k = x.shape
    if m == 0:
        alpha.zero_()
        return
    (programs, _) = host.grid(m, k, config.block_m, k, "linear")
    bits = amax.tile_maxima(programs * config.parts, x.device)
    constants = _constants(k, "amax", "linear", False, config)
    operands = (x, host.row_stride(x), weight, None, None, None, bits, m, eps)
    _rmsnorm_quantize[(programs, config.parts)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)
    amax.finish(bits, alpha)


def warm(problem: RmsnormQuantizeProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    alpha = torch.ones((), device="cuda")
    global_scale(x, x[0], 1.0, alpha, config)
    launch(x, x[0], 1.0, alpha, NVFP4Tensor.empty((1, problem.k), alpha, problem.sf_layout), problem.rule, config)


def build_key(problem: RmsnormQuantizeProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch."""
    return problem.x, problem.rule, problem.sf_layout, problem.k


def build(problem: RmsnormQuantizeProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "weight_ptr": f"*{problem.x}", "alpha_ptr": "*fp32"}
    types |= {"data_ptr": "*u8", "sf_ptr": "*u8", "M": "i32", "eps": "fp32"}
    constants = _constants(problem.k, problem.rule, problem.sf_layout, arch == "sm_100a", config)
    constants["amax_ptr"] = None
    return host.build(_rmsnorm_quantize, types, constants, arch, config.num_warps, unaligned=("M",))


def _constants(k: int, rule: str, sf_layout: str, e2m1_cvt: bool, config: Config) -> dict[str, Any]:
    own = {"RULE": rule, "SF_BLOCKED": sf_layout == "blocked_128x4", "E2M1_CVT": e2m1_cvt, "BLOCK_M": config.block_m}
    return own | normed_rows.constants(k, config.tile_k, config.parts, config.held)
