"""RMSNorm of rows with a weight, in the rows' type: what norms that no quantiser follows are.

Memory bound: reads and writes 2 bytes an element (BF16). One program a row, or a part of one of few rows; rows stay in
registers between the sum of squares and the store, or are read again from L1 or L2. Few rows take as long as one load,
the sum and one store.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import RmsNormProblem

from . import host, normed_rows
from .normed_rows import factors, load_rows, normed_tile, pointers
from .nvfp4 import CVT, narrow
from .overlap import begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One of `parts` of a row's columns a program; every part sums its row as a whole.

    `held` rows stay in registers from the sum to the store; others are read again, from L1 or L2.
    """

    num_warps: int = 1
    parts: int = 1
    held: bool = False

    @property
    def tile_k(self) -> int:
        """Columns that are normed at a time, 16 a thread."""
        return 512 * self.num_warps


FEW_ROWS = 256
SPACE = {"num_warps": (1, 2, 4, 8), "parts": (1, 2, 3, 4, 7), "held": (False, True)}


def supports(problem: RmsNormProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.x not in host.DTYPES:
        return f"kernels read {', '.join(host.DTYPES)}, got {problem.x}"
    if problem.k % 16:
        return f"k={problem.k} is not a multiple of 16"
    return normed_rows.refuse(problem.k, config.tile_k, config.parts, config.held)


def default(problem: RmsNormProblem) -> Config:
    """Few rows: each by several programs, 16 columns a thread. Many: two warps hold a row, or eight read it twice,
    which is 2 to 25 % faster from 4096 columns on (H100).
    """
    k = problem.k
    if problem.m <= FEW_ROWS:
        num_warps = 4 if k > 4096 else 2 if k > 2048 else 1
        return Config(num_warps=num_warps, parts=triton.cdiv(k, 512 * num_warps))
    return Config(num_warps=1 if k <= 512 else 2, held=True) if k <= 2048 else Config(num_warps=8)


@triton.jit
def norm_row(
    row, part, x_ptr, stride_m, weight_ptr, eps, out_ptr, M, K: tl.constexpr, SUM_K: tl.constexpr,
    TILE_K: tl.constexpr, TILES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """One of the parts of TILES tiles of a row of x -> out [M, K], contiguous."""
    # int64 before the multiply: a long batch passes 2**31 elements
    rows = row.to(tl.int64) + tl.arange(0, 1)
    at, weight_at = pointers(x_ptr, stride_m, weight_ptr, rows, M, 1)
    start = part * TILES
    x, w, own = load_rows(at, weight_at, start, M, K, 1, SUM_K, TILE_K, TILES, HELD)
    factor = factors(x, at, eps, M, K, 1, SUM_K, TILES)
    for i in tl.static_range(TILES):
        lo, hi = normed_tile(i, x, w, own, factor, at, weight_at, start, M, K, 1, TILE_K, TILES, HELD)
        blocks = (start + i) * (TILE_K // 16) + tl.arange(0, TILE_K // 16)
        cols = blocks[None, :, None] * 16 + tl.arange(0, 8)[None, None, :]
        to = out_ptr + (rows * K)[:, None, None] + cols
        tl.store(to, narrow(lo, out_ptr.dtype.element_ty, CVT), mask=cols < K)
        tl.store(to + 8, narrow(hi, out_ptr.dtype.element_ty, CVT), mask=cols < K)


@triton.jit(do_not_specialize=["M"])
def _rms_norm(
    x_ptr, stride_m, weight_ptr, eps, out_ptr, M, K: tl.constexpr, SUM_K: tl.constexpr, TILE_K: tl.constexpr,
    TILES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    begin()
    norm_row(
        tl.program_id(0), tl.program_id(1), x_ptr, stride_m, weight_ptr, eps, out_ptr, M, K, SUM_K, TILE_K, TILES, HELD
    )


def launch(x: Tensor, weight: Tensor, eps: float, out: Tensor, config: Config) -> None:
    """x [m, k], rows of any stride, with weight [k] -> out, its like, contiguous."""
    m, k = x.shape
    if m == 0:
        return
    constants = normed_rows.constants(k, config.tile_k, config.parts, config.held)
    operands = (x, host.row_stride(x), weight, eps, out, m)
    _rms_norm[(m, config.parts)](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: RmsNormProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    x = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    launch(x, x[0], 1.0, torch.empty_like(x), config)


def build_key(problem: RmsNormProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: m is read at launch."""
    return problem.x, problem.k


def build(problem: RmsNormProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"x_ptr": f"*{problem.x}", "stride_m": "i32", "weight_ptr": f"*{problem.x}", "eps": "fp32"}
    types |= {"out_ptr": f"*{problem.x}", "M": "i32"}
    constants = normed_rows.constants(problem.k, config.tile_k, config.parts, config.held)
    return host.build(_rms_norm, types, constants, arch, config.num_warps, unaligned=("M",))
