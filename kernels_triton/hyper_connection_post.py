"""The streams after a site: its output times post, and the streams mixed by comb.

Memory bound: reads 10 bytes a column (four streams and the output, BF16) and writes 8. One program block_d columns of
all streams of a token.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import HyperConnectionPostProblem

from . import host
from .hyper_connection import STREAMS, N, closed, strides
from .nvfp4 import narrow, widen
from .overlap import begin
from .rounding import CVT


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_d columns of each stream a program."""

    block_d: int = 1024
    num_warps: int = 4


SPACE = {"block_d": (256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)}


def supports(problem: HyperConnectionPostProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    if problem.n != STREAMS:
        return f"n={problem.n}: the kernel is written for {STREAMS} streams"
    held = config.block_d / (32 * config.num_warps)
    if not 4 <= held <= 16:
        return f"block_d={config.block_d} num_warps={config.num_warps}: {held:g} columns a thread, not 4 to 16"
    return None


@triton.jit(do_not_specialize=["M"])
def _hyper_connection_post(
    y_ptr,
    stride_y,
    h_ptr,
    stride_m,
    stride_n,
    post_ptr,
    comb_ptr,
    out_ptr,
    M,
    D,
    BLOCK_D: tl.constexpr,
):
    begin()
    blocks = (D + BLOCK_D - 1) // BLOCK_D
    # int64 before the multiply: a long batch passes 2**31 elements
    token = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    h_at = h_ptr + token * stride_m + cols
    y = widen(tl.load(y_ptr + token * stride_y + cols, mask=inside, other=0.0))
    x0 = widen(tl.load(h_at, mask=inside, other=0.0))
    x1 = widen(tl.load(h_at + stride_n, mask=inside, other=0.0))
    x2 = widen(tl.load(h_at + 2 * stride_n, mask=inside, other=0.0))
    x3 = widen(tl.load(h_at + 3 * stride_n, mask=inside, other=0.0))
    for k in tl.static_range(N):
        c = comb_ptr + token * (N * N) + k
        post = tl.load(post_ptr + token * N + k)
        x = closed(y, x0, x1, x2, x3, post, tl.load(c), tl.load(c + N), tl.load(c + 2 * N), tl.load(c + 3 * N))
        tl.store(out_ptr + (token * N + k) * D + cols, narrow(x, out_ptr.dtype.element_ty, CVT), mask=inside)


def launch(y: Tensor, h: Tensor, post: Tensor, comb: Tensor, out: Tensor, config: Config) -> None:
    """y [tokens, d] and h [tokens, 4, d], rows of any stride, with post and comb -> out as h; these are contiguous."""
    tokens, _, d = h.shape
    if tokens == 0:
        return
    operands = (y, host.row_stride(y), h, *strides(h), post, comb, out, tokens, d)
    constants = _constants(config)
    grid = (tokens * triton.cdiv(d, config.block_d),)
    _hyper_connection_post[grid](*operands, **constants, num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: HyperConnectionPostProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need."""
    h = torch.zeros(1, problem.n, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    post = torch.zeros(1, problem.n, device="cuda")
    launch(h[:, 0], h, post, post.new_zeros(1, problem.n, problem.n), torch.empty_like(h), config)


def build_key(problem: HyperConnectionPostProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return (problem.x,)


def build(problem: HyperConnectionPostProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"y_ptr": f"*{problem.x}", "h_ptr": f"*{problem.x}", "out_ptr": f"*{problem.x}", "post_ptr": "*fp32"}
    types |= {"comb_ptr": "*fp32", "stride_y": "i32", "stride_m": "i32", "stride_n": "i32", "M": "i32", "D": "i32"}
    constants = _constants(config)
    return host.build(_hyper_connection_post, types, constants, arch, config.num_warps, unaligned=("M",))


def _constants(config: Config) -> dict[str, Any]:
    return {"BLOCK_D": config.block_d}
