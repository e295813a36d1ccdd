"""What a kernel is compared with in the same run: cuBLAS in BF16 for a GEMM, plain PyTorch for everything else."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from fp4suite import reference
from fp4suite.formats import FP8RowTensor, NVFP4Tensor
from fp4suite.problem import (
    DequantProblem,
    GemmProblem,
    KvNormRopeInsertProblem,
    Problem,
    QkvNormRopeInsertProblem,
    QnormRopeProblem,
    QnormRopeQuantizeProblem,
    QuantizeFp8Problem,
    QuantizeProblem,
    RmsnormQuantizeProblem,
    RopeInverseInPlaceProblem,
    RopeInverseProblem,
    RopeInverseQuantizeProblem,
    SwigluQuantizeProblem,
)
from fp4suite.testing import Case

CUBLAS = "cublas_bf16"  # weights and activations already in BF16, from a CUDA graph
EAGER = "torch_eager"  # fp4suite.reference on the GPU, uncompiled, launched from the host


def name(problem: Problem) -> str:
    """Which baseline a problem has."""
    return CUBLAS if isinstance(problem, GemmProblem) else EAGER


def function(problem: Problem) -> Callable[[Case], object]:
    """The baseline as a function of a case. It prepares what it needs when it first sees a case, before any capture."""
    prepared: dict[int, Callable[[], object]] = {}

    def run(case: Case) -> object:
        if id(case) not in prepared:
            prepared[id(case)] = _gemm(case) if isinstance(problem, GemmProblem) else _eager(case)
        return prepared[id(case)]()

    return run


def _gemm(case: Case) -> Callable[[], object]:
    a, b, _ = case.operands
    if isinstance(a, FP8RowTensor):
        a16 = reference.dequant_fp8(a, torch.bfloat16)
    else:
        a16 = _bf16(a) if isinstance(a, NVFP4Tensor) else a
    b16 = _bf16(b)
    out = torch.empty(a16.shape[0], b16.shape[0], dtype=torch.bfloat16, device=b16.device)
    return lambda: torch.matmul(a16, b16.T, out=out)


def _bf16(t: NVFP4Tensor) -> torch.Tensor:
    """Codes times scales; alpha takes no part in the speed."""
    return reference.dequant_nvfp4(replace(t, alpha=torch.ones((), device=t.device)), torch.bfloat16)


def _eager(case: Case) -> Callable[[], object]:
    p, x = case.problem, case.operands
    if case.eager is not None:
        return case.eager
    if isinstance(p, DequantProblem):
        dtype = case.out.dtype
        return lambda: reference.dequant_nvfp4(x[0], dtype)
    if isinstance(p, QuantizeFp8Problem):
        return lambda: reference.quantize_fp8(x[0])
    if isinstance(p, QuantizeProblem):
        return lambda: reference.quantize_nvfp4(x[0], alpha=x[1], sf_layout=p.sf_layout, rule=p.rule)
    if isinstance(p, RmsnormQuantizeProblem):
        return lambda: reference.rmsnorm_quantize(x[0], x[1], x[2], alpha=x[3], sf_layout=p.sf_layout, rule=p.rule)
    if isinstance(p, SwigluQuantizeProblem):
        return lambda: reference.swiglu_quantize(x[0], limit=x[1], alpha=x[2], sf_layout=p.sf_layout, rule=p.rule)
    if isinstance(p, QnormRopeProblem):
        return lambda: reference.qnorm_rope(*x)
    if isinstance(p, QnormRopeQuantizeProblem):
        return lambda: reference.qnorm_rope_quantize(*x)
    if isinstance(p, RopeInverseInPlaceProblem):
        return lambda: reference.rope_inverse_(case.out, *x)
    if isinstance(p, RopeInverseProblem):
        return lambda: reference.rope_inverse(*x)
    if isinstance(p, KvNormRopeInsertProblem):
        kv, weight, at, table, eps, slots = x
        return lambda: reference.kv_norm_rope_insert(kv, weight, at, table, eps, case.out, slots)
    if isinstance(p, QkvNormRopeInsertProblem):
        q, q_weight, kv, kv_weight, at, table, eps, slots = x
        cache = case.out[1]
        return lambda: reference.qkv_norm_rope_insert(q, q_weight, kv, kv_weight, at, table, eps, cache, slots)
    if isinstance(p, RopeInverseQuantizeProblem):
        o, at, table, groups, alpha = x
        given: dict[str, Any] = {"groups": groups, "alpha": alpha, "sf_layout": p.sf_layout, "rule": p.rule}
        return lambda: reference.rope_inverse_quantize(o, at, table, **given)
    raise TypeError(f"no baseline for {type(p).__name__}")
