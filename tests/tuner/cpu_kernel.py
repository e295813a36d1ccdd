"""A GEMM of ours that runs anywhere, from weights in prepared order: stands in for a kernel where there is no GPU."""

import os
import signal
from dataclasses import dataclass

from torch import Tensor

from fp4suite import reference
from fp4suite.formats import NVFP4Tensor
from fp4suite.problem import GemmProblem

SF_LAYOUT = "linear"
WEIGHT_ORDER = "fragments_sm90"
FAULT_M = {}  # m -> "wrong" or "crash"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    tile_m: int = 64


SPACE = {"tile_m": (64, 128)}


def supports(problem: GemmProblem, config: Config) -> str | None:
    if problem.order != WEIGHT_ORDER:
        return f"weights in {problem.order}"
    return None


def launch(a: Tensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor, config: Config) -> None:
    if b.order != WEIGHT_ORDER:
        raise ValueError(f"weights in {b.order}")
    fault = FAULT_M.get(a.shape[0])
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    out.copy_(reference.gemm_nvfp4(a, b, segments=segments, out_dtype=out.dtype))
    if fault == "wrong":
        out[0, 0] += 1
