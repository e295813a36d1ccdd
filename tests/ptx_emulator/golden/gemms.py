"""Outputs of our sm_90a kernels on a GPU, for the emulator to reproduce from the same PTX.

python -m tests.ptx_emulator.golden.gemms FILE.npz        # on a host with an H100: records
"""

import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fp4suite import testing
from fp4suite.problem import GemmProblem
from kernels_cute import (
    gemm_nvfp4_sm90 as sm90,
    gemm_nvfp4_sm90_fp8 as fp8,
    gemm_nvfp4_sm90_skinny as skinny,
    gemm_nvfp4_sm90_wgmma as wgmma,
)

FILE = Path(__file__).parent / "gemms_sm90.npz"
PREPARED = wgmma.WEIGHT_ORDER
CASES = [
    (GemmProblem(m=1, n=64, k=512, act="bf16"), sm90.Config(tile_m=8, tile_n=64, tile_k=128, num_stages=6)),
    (GemmProblem(m=7, n=136, k=576, act="bf16", out="fp32"), sm90.Config(tile_m=8, tile_n=64, num_stages=2)),
    (GemmProblem(m=33, n=200, k=1024, act="bf16", out="fp32", segments=2), sm90.Config(tile_m=16, tile_n=128)),
    (GemmProblem(m=70, n=136, k=320, act="bf16", out="fp32"), sm90.Config()),
    (GemmProblem(m=130, n=264, k=448, act="bf16"), sm90.Config(tile_m=128, tile_n=128)),
    (GemmProblem(m=9, n=200, k=512, act="nvfp4", out="fp32"), sm90.Config(tile_m=8, tile_n=128, tile_k=128)),
    (GemmProblem(m=65, n=72, k=704, act="nvfp4", out="fp32"), sm90.Config(tile_m=64, tile_n=64, num_stages=3)),
    (GemmProblem(m=100, n=256, k=256, act="nvfp4"), sm90.Config(tile_m=32, tile_n=128)),
    (GemmProblem(m=1, n=72, k=1536, act="bf16", out="fp32"), skinny.Config(tile_m=1, warps_n=8, warps_k=1, loops=2)),
    (GemmProblem(m=7, n=136, k=1984, act="bf16", out="fp32"), skinny.Config(tile_m=8, warps_n=1, warps_k=4, split=4)),
    (GemmProblem(m=21, n=200, k=4096, act="bf16", out="fp32", segments=2), skinny.Config(split=4, loops=2, depth=3)),
    (GemmProblem(m=30, n=64, k=1024, act="bf16"), skinny.Config(tile_m=32, depth=2)),
    (GemmProblem(m=1, n=128, k=1024, out="fp32", order=PREPARED), wgmma.Config(tile_m=8, groups_n=1, groups_k=4)),
    (GemmProblem(m=13, n=192, k=1024, segments=2, order=PREPARED), wgmma.Config(tile_m=16, groups_n=1, split=2)),
    (GemmProblem(m=70, n=192, k=512, out="fp32", order=PREPARED), wgmma.Config(share=2)),
    (GemmProblem(m=260, n=192, k=256, order=PREPARED), wgmma.Config(tile_m=256, tile_k=64)),
    (GemmProblem(m=13, n=192, k=1024, act="fp8", order=fp8.WEIGHT_ORDER), fp8.Config(tile_m=16, groups_n=1, split=2)),
    (GemmProblem(m=70, n=128, k=512, act="fp8", out="fp32", order=fp8.WEIGHT_ORDER), fp8.Config(tile_m=64, groups_k=2)),
    (GemmProblem(m=150, n=192, k=640, act="fp8", segments=3, order=fp8.WEIGHT_ORDER), fp8.Config(share=2)),
    (GemmProblem(m=260, n=192, k=384, act="fp8", out="fp32", order=fp8.WEIGHT_ORDER), fp8.Config(tile_m=256)),
    (GemmProblem(m=9, n=128, k=1024, order=PREPARED), wgmma.Config(tile_m=16, groups_n=1, warps=3, split=2)),
    (GemmProblem(m=150, n=192, k=512, order=PREPARED), wgmma.Config(tile_m=128)),
]


def kernel_of(config: Any) -> ModuleType:
    return next(module for module in (sm90, skinny, wgmma, fp8) if isinstance(config, module.Config))


def digest(ptx: str) -> str:
    """Of a kernel's PTX, comments left out, and its names, which hold those of types."""
    return hashlib.sha256(re.sub(r"//.*|kernel_cutlass_\w+", "", ptx).encode()).hexdigest()


def raw(out: torch.Tensor) -> np.ndarray:
    return out.cpu().view(torch.int16 if out.dtype == torch.bfloat16 else torch.int32).numpy()


def record(path: str | Path, numbers: Iterable[int] = range(len(CASES)), device: str = "cuda") -> None:
    found = {}
    for number in numbers:
        problem, config = CASES[number]
        case = testing.case(problem, "cpu", number)
        case.poison()
        out = case.out.to(device)
        kernel = kernel_of(config)
        operands = [x.to(device) if hasattr(x, "to") else x for x in case.laid_out(kernel)]
        kernel.launch(*operands, out, *case.tail, config)
        case.launched[:] = [kernel, config]
        case.out.copy_(out)
        case.check()
        ptx = kernel.build(problem, config, "sm_90a").ptx
        found[f"out{number}"], found[f"ptx{number}"] = raw(out), np.array(digest(ptx))
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    record(sys.argv[1])
