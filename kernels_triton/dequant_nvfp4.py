"""NVFP4 -> BF16, FP16 or FP32, for layers with no 4-bit kernel on this architecture.

Memory bound: reads 9/16 byte and writes 2 (BF16) an element. One program a [block_m, block_k] tile of one expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import DequantProblem

from . import host
from .nvfp4 import e4m3_to_f32, sf_offsets
from .overlap import wait

SIGNS = tl.constexpr(0x80008000 - 2**32)  # of two halves


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """block_m rows by block_k elements of K a program."""

    block_m: int = 4
    block_k: int = 1024
    num_warps: int = 4


SPACE = {"block_m": (1, 4, 8), "block_k": (256, 512, 1024), "num_warps": (2, 4)}


def default(problem: DequantProblem) -> Config:
    """Tiles that k fills, of 32 elements a thread; of 16 where there are few."""
    if problem.m * problem.k < 1 << 20:
        return Config(block_m=1, num_warps=2)
    return Config(block_m=8, block_k=512) if 0 < problem.k % 1024 <= 512 else Config()


def supports(problem: DequantProblem, config: Config) -> str | None:
    """Why this problem cannot run with this config, or None if it can."""
    return host.refuse_tile(config.block_m, config.block_k, config.num_warps)


@triton.jit
def _halves(words, LEFT: tl.constexpr):
    """Of int32 words the codes whose low bit is at 9 - LEFT and 16 bits above -> their magnitudes times 2^-14, FP16:
    the three low bits lie where FP16 has two bits of exponent and one of mantissa. [..., 2]
    """
    magnitudes = words << LEFT if LEFT >= 0 else words >> -LEFT
    both = (magnitudes & 0x0E000E00) | ((words << LEFT + 3) & SIGNS)
    return tl.join(both.to(tl.int16), (both >> 16).to(tl.int16)).to(tl.float16, bitcast=True)


@triton.jit
def _e2m1_to_f32(words, ROWS: tl.constexpr, BLOCKS: tl.constexpr):
    """int32 [ROWS, BLOCKS, 2], eight codes each -> FP32 [ROWS, BLOCKS, 16], times 2^-14."""
    even = tl.join(_halves(words, 9), _halves(words, 1))  # codes 0 and 4, 2 and 6: bits 2 and 1 of an index
    odd = tl.join(_halves(words, 5), _halves(words, -3))
    return tl.join(even, odd).to(tl.float32).reshape(ROWS, BLOCKS, 16)


@triton.jit(do_not_specialize=["M", "FIRST", "ROWS", "SEGMENT", "alpha_stride_e", "alpha_stride_s", "sf_stride_e"])
def _dequant_nvfp4(
    data_ptr,
    sf_ptr,
    alpha_ptr,
    out_ptr,
    sf_stride_e,
    alpha_stride_e,
    alpha_stride_s,
    out_stride_e,
    out_stride_m,
    M,
    K,
    FIRST,
    ROWS,
    SEGMENT,
    SF_BLOCKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    wait()
    BLOCKS: tl.constexpr = BLOCK_K // 16
    expert = tl.program_id(2).to(tl.int64)  # int64 before the multiply: stacked experts pass 2**31 elements
    nth = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = FIRST.to(tl.int64) + nth
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (nth < ROWS)[:, None] & (blocks < K // 16)[None, :]

    words = blocks[:, None] * 2 + tl.arange(0, 2)[None, :]
    at = (expert * M + rows)[:, None, None] * (K // 8) + words[None, :, :]
    packed = tl.load(data_ptr + at, mask=inside[:, :, None], other=0)
    sf = tl.load(sf_ptr + expert * sf_stride_e + sf_offsets(rows, blocks, K, SF_BLOCKED), mask=inside, other=0)
    alpha = tl.load(alpha_ptr + expert * alpha_stride_e + SEGMENT * alpha_stride_s)
    # element times scale is exact, so alpha brings the only rounding before the cast, as in the reference
    x = _e2m1_to_f32(packed, BLOCK_M, BLOCKS) * (e4m3_to_f32(sf) * 16384.0)[:, :, None] * alpha

    cols = blocks[:, None] * 16 + tl.arange(0, 16)[None, :]
    at = expert * out_stride_e + rows[:, None, None] * out_stride_m + cols[None, :, :]
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside[:, :, None])


def launch(t: NVFP4Tensor, out: Tensor, config: Config, segments: Sequence[int] | None = None) -> None:
    """t [m, k] or [experts, m, k] -> out of the same shape, with rows of any stride.

    alpha: [], or [segments] for the runs of rows that `segments` gives; with experts [], [experts] or
    [experts, segments]. Raises ValueError where they do not fit, or codes, scales or alpha are not contiguous.
    """
    *lead, m, k = t.shape
    if len(lead) > 1:
        raise ValueError(f"t must be [m, k] or [experts, m, k], got {list(t.shape)}")
    if not (t.data.is_contiguous() and t.sf.is_contiguous() and t.alpha.is_contiguous()):
        raise ValueError("codes, scales and alpha must be contiguous")
    runs = tuple(segments) if segments is not None else (m,)
    per_expert, per_segment = _alpha_strides(t, runs, segments is not None)
    experts = lead[0] if lead else 1
    data, sf = t.data.view(torch.int32), t.sf.view(torch.uint8)
    constants = _constants(t.sf_layout, config)
    first = 0
    for i, rows in enumerate(runs):
        grid = (triton.cdiv(rows, config.block_m), triton.cdiv(k, config.block_k), experts)
        if rows and experts:
            _dequant_nvfp4[grid](
                data,
                sf,
                t.alpha,
                out,
                sf.numel() // experts,
                per_expert,
                per_segment,
                out.stride(0) if lead else 0,
                host.row_stride(out[0] if lead else out),
                m,
                k,
                first,
                rows,
                i,
                **constants,
                num_warps=config.num_warps,
                **host.OPTIONS,
            )
        first += rows


def warm(problem: DequantProblem, config: Config) -> None:
    """Compile for the current device what a launch of `problem` needs."""
    t = NVFP4Tensor.empty((1, problem.k), torch.ones((), device="cuda"), problem.sf_layout)
    launch(t, torch.empty(1, problem.k, dtype=host.DTYPES[problem.out], device="cuda"), config)


def build_key(problem: DequantProblem, config: Config) -> tuple[Any, ...]:
    """What of a problem `build` depends on: its sizes are read at launch."""
    return problem.out, problem.sf_layout


def build(problem: DequantProblem, config: Config, arch: str) -> Built:
    """Compiled for `arch` without a GPU."""
    types = {"data_ptr": "*i32", "sf_ptr": "*u8", "alpha_ptr": "*fp32", "out_ptr": f"*{problem.out}"}
    plain = ("sf_stride_e", "alpha_stride_e", "alpha_stride_s", "M", "FIRST", "ROWS", "SEGMENT")
    types |= dict.fromkeys(("out_stride_e", "out_stride_m", "K", *plain), "i32")
    return host.build(
        _dequant_nvfp4, types, _constants(problem.sf_layout, config), arch, config.num_warps, unaligned=plain
    )


def _alpha_strides(t: NVFP4Tensor, runs: tuple[int, ...], segmented: bool) -> tuple[int, int]:
    """Elements from expert to expert and from segment to segment of t.alpha."""
    *lead, m, _ = t.shape
    shape = tuple(t.alpha.shape)
    if sum(runs) != m or min(runs, default=0) < 0:
        raise ValueError(f"segments {list(runs)} must be runs of rows that sum to m={m}")
    if shape == ():
        return 0, 0
    if segmented and shape == (*lead, len(runs)):
        return (len(runs), 1) if lead else (0, 1)
    if not segmented and lead and shape == tuple(lead):
        return 1, 0
    raise ValueError(
        f"alpha {list(shape)} does not fit {list(t.shape)} with segments {list(runs) if segmented else None}"
    )


def _constants(sf_layout: str, config: Config) -> dict[str, Any]:
    return {"SF_BLOCKED": sf_layout == "blocked_128x4", "BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
