"""Rows of the embedding by token, once into each residual stream.

Memory bound: reads 2 bytes a column of the table and writes 2 (BF16) for every stream. One program block_k columns of a
token. An id outside of the table reads nothing of it: its row is NaN.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.problem import EmbedProblem

from . import host
from .nvfp4 import narrow, widen
from .overlap import begin
from .rounding import CVT


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_k columns of a token a program."""

    block_k: int = 1024
    num_warps: int = 4


SPACE = {"block_k": (256, 512, 1024, 2048), "num_warps": (1, 2, 4, 8)}


def supports(problem: EmbedProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    held = config.block_k / (32 * config.num_warps)
    if not 4 <= held <= 32:
        return f"block_k={config.block_k} num_warps={config.num_warps}: {held:g} columns a thread, not 4 to 32"
    return None


@triton.jit(do_not_specialize=["VOCAB"])
def _embed(
    ids_ptr, stride_ids, weight_ptr, stride_row, out_ptr, VOCAB, K, STREAMS: tl.constexpr, BLOCK_K: tl.constexpr
):
    begin()
    # int64 before the multiply: streams of a long batch pass 2**31 elements, as may the table
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = cols < K
    row = tl.load(ids_ptr + token * stride_ids).to(tl.int64)
    known = (row >= 0) & (row < VOCAB)
    x = tl.load(weight_ptr + row * stride_row + cols, mask=inside & known, other=float("nan"))
    if out_ptr.dtype.element_ty != weight_ptr.dtype.element_ty:
        x = narrow(widen(x), out_ptr.dtype.element_ty, CVT)
    at = out_ptr + token * STREAMS * K + cols
    for _ in tl.static_range(STREAMS):
        tl.store(at, x, mask=inside)
        at += K


def launch(token_ids: Tensor, weight: Tensor, out: Tensor, config: Config) -> None:
    """token_ids int [m] and weight [vocab, k], ids and rows of any stride -> out [m, streams, k], contiguous."""
    m, streams, k = out.shape
    if not out.numel():
        return
    stride_ids = token_ids.stride(0) if m > 1 else 1
    operands = (token_ids, stride_ids, weight, host.row_stride(weight), out, len(weight), k)
    grid = (m, triton.cdiv(k, config.block_k))
    _embed[grid](*operands, **_constants(streams, config), num_warps=config.num_warps, **host.OPTIONS)


def warm(problem: EmbedProblem, config: Config) -> None:
    """Compile for the current device what launches of `problem` need, by ids of int64."""
    weight = torch.zeros(1, problem.k, dtype=host.DTYPES[problem.x], device="cuda")
    out = torch.empty(1, problem.n, problem.k, dtype=host.DTYPES[problem.out], device="cuda")
    launch(torch.zeros(1, dtype=torch.int64, device="cuda"), weight, out, config)


def build_key(problem: EmbedProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its other sizes are read at launch."""
    return problem.n, problem.x, problem.out


def build(problem: EmbedProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU, for ids of int64 next to each other."""
    types = {"ids_ptr": "*i64", "weight_ptr": f"*{problem.x}", "stride_row": "i32", "out_ptr": f"*{problem.out}"}
    types |= {"VOCAB": "i32", "K": "i32"}
    constants = _constants(problem.n, config) | {"stride_ids": 1}
    return host.build(_embed, types, constants, arch, config.num_warps, unaligned=("VOCAB",))


def _constants(streams: int, config: Config) -> dict[str, Any]:
    return {"STREAMS": streams, "BLOCK_K": config.block_k}
