"""Which libraries each fusion is compared with, and why some have none.

`torch_compile` is our reference through torch.compile: nobody's library, so it is timed only where it is asked for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fp4suite import reference
from fp4suite.problem import (
    PROBLEMS,
    CompressKvPairProblem,
    CompressKvProblem,
    CsaQueriesProblem,
    DequantProblem,
    GemmProblem,
    HyperConnectionHeadProblem,
    QnormRopeProblem,
    QnormRopeQuantizeProblem,
    QuantizeFp8Problem,
    QuantizeProblem,
    RmsNormProblem,
    RmsnormQuantizeProblem,
    RopeInverseProblem,
    SampleProblem,
    SwigluProblem,
    SwigluQuantizeProblem,
)
from fp4suite.testing import Case

from . import peers_deep_gemm, peers_gemlite, peers_vllm
from .fusion_peer import Call, FusionPeer

MOST_OTHER_BYTES = 1e-3  # of results: a contracted multiply-add may round another way

COMPOSED: dict[str, Callable[..., Any]] = {
    QuantizeProblem.op: lambda x, alpha: reference.quantize_nvfp4(x, alpha=alpha),
    RmsnormQuantizeProblem.op: lambda x, w, eps, alpha: reference.rmsnorm_quantize(x, w, eps, alpha=alpha),
    RmsNormProblem.op: reference.rms_norm,
    SwigluQuantizeProblem.op: lambda x, limit, alpha: reference.swiglu_quantize(x, limit=limit, alpha=alpha),
    SwigluProblem.op: lambda x, limit: reference.swiglu(x, limit),
    QuantizeFp8Problem.op: reference.quantize_fp8,
    QnormRopeProblem.op: reference.qnorm_rope,
    RopeInverseProblem.op: reference.rope_inverse,
}

WITHOUT = {  # op -> why no library is compared with it
    CompressKvProblem.op: "servers compress inside their own Python packages, with kernels for their own caches",
    CompressKvPairProblem.op: "as for compress_kv",
    CsaQueriesProblem.op: "no library has both queries in one kernel; see qnorm_rope and index_query",
    DequantProblem.op: "no library decodes NVFP4 alone",
    HyperConnectionHeadProblem.op: "mHC kernels of libraries fold four streams under 24 coefficients, not the head's 4",
    QnormRopeQuantizeProblem.op: "libraries leave queries in BF16 or FP8",
    SampleProblem.op: "servers sample with kernels inside their own Python packages",
}


def composed(case: Case) -> Call:
    op = case.problem.op
    launch = functools.partial(_compiled(op), *case.operands)
    wanted: list[tuple[Tensor, ...]] = []

    def check(got: tuple[Tensor, ...]) -> float:
        if not wanted:
            wanted.append(_tensors(COMPOSED[op](*case.operands)))
        worst = 0.0
        for a, b in zip(got, wanted[0], strict=True):
            other = a.contiguous().view(torch.uint8) != b.contiguous().view(torch.uint8)
            worst = max(worst, float(other.float().mean()) / MOST_OTHER_BYTES)
        if worst > 1:
            raise AssertionError(f"differs from the reference in {worst * MOST_OTHER_BYTES:.2g} of its bytes")
        return worst

    return Call(launch, check)


@functools.cache
def _compiled(op: str) -> Callable[..., tuple[Tensor, ...]]:
    compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(
        lambda *operands: _tensors(COMPOSED[op](*operands)), dynamic=False
    )
    return compiled


def _tensors(result: Any) -> tuple[Tensor, ...]:
    if isinstance(result, Tensor):
        return (result,)
    return result.data, (result.sf if hasattr(result, "sf") else result.scale)


PEERS: dict[str, FusionPeer] = {
    p.name: p
    for p in (
        *peers_vllm.PEERS,
        *peers_deep_gemm.PEERS,
        *peers_gemlite.PEERS,
        FusionPeer(
            name="torch_compile",
            module="torch",
            package="torch",
            prepare=composed,
            ops=tuple(COMPOSED),
            tolerance=f"{MOST_OTHER_BYTES:g} of the bytes",
            note="our reference, compiled for each shape",
            compiles=True,
            on_request=True,
        ),
    )
}
OPS = tuple(op for op in PROBLEMS if op != GemmProblem.op)


def of(op: str) -> tuple[FusionPeer, ...]:
    """All peers of an op."""
    return tuple(p for p in PEERS.values() if op in p.ops)


def check_names(names: Sequence[str]) -> frozenset[str]:
    """Peers by their names or their modules ("vllm"), all but those on request for none.

    Raises ValueError for a name that is neither.
    """
    if not names:
        return frozenset(name for name, p in PEERS.items() if not p.on_request)
    modules = {p.module for p in PEERS.values()}
    for name in names:
        if name not in PEERS and name not in modules:
            raise ValueError(f"--peers must be of {', '.join(sorted(modules))}, {', '.join(PEERS)}, got {name!r}")
    return frozenset(name for name, p in PEERS.items() if name in names or (p.module in names and not p.on_request))
