"""Norms: rows reduced over a CTA, or over the CTAs of a cluster."""

from types import ModuleType

import torch
from cuda.bindings import driver
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import from_dlpack

from .harness import Case, Prepared
from .operands import FORMATS, Matrix, empty, expected, matrix

STREAM = driver.CUstream(0)
EPS = 1e-5


def _normalised(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def rmsnorm(module: ModuleType, gen: torch.Generator, m: int, n: int, kind: str = "bf16") -> Prepared:
    x, w, y = matrix(kind, 1, m, n, gen), matrix(kind, 1, 1, n, gen), empty(kind, 1, m, n)
    pointers = x.pointer(), w.pointer(), y.pointer()
    compiled = cute.compile(module.RMSNormKernel(FORMATS[kind].type, n), *pointers, Int32(m), Float32(EPS), STREAM)
    want = _normalised(x.values, w.values)
    return Prepared(
        lambda: compiled(*pointers, Int32(m), Float32(EPS), STREAM),
        [expected(y, want, want.abs(), steps=64)],
        (x, w),
    )


def cta_norm(
    module: ModuleType, gen: torch.Generator, m: int, n: int, norm: str, kind: str = "fp16", threads: int | None = None
) -> Prepared:
    x, w, y = matrix(kind, 1, m, n, gen), matrix(kind, 1, 1, n, gen), empty(kind, 1, m, n)
    bias = matrix(kind, 1, 1, n, gen) if norm == "layer" else None
    dtype = FORMATS[kind].dtype
    assert dtype is not None

    def tensor(x: Matrix, *shape: int):  # type: ignore[no-untyped-def]
        return from_dlpack(x.data.view(dtype).view(shape), assumed_align=16)

    tensors = tensor(y, m, n), tensor(x, m, n), tensor(w, n), None if bias is None else tensor(bias, n)
    compiled = cute.compile(module.CtaNorm(n, norm, threads), *tensors, Float32(EPS))
    if bias is None:
        want = _normalised(x.values, w.values)
        size = want.abs()
    else:
        centred = x.values - x.values.mean(-1, keepdim=True)
        want = _normalised(centred, w.values)
        size = want.abs() + bias.values.abs() + w.values.abs()
        want = want + bias.values
    return Prepared(lambda: compiled(*tensors, Float32(EPS)), [expected(y, want, size, steps=256)], (x, w, y, bias))


CASES = (
    # a CTA takes four rows of 1024; with a number that is no multiple it reads shared memory that it has not filled
    Case("cute.blackwell.kernel.rmsnorm.rmsnorm", rmsnorm, {"m": 8, "n": 1024}),
    Case("cute.blackwell.kernel.rmsnorm.rmsnorm", rmsnorm, {"m": 3, "n": 7168, "kind": "fp16"}),
    Case("cute.blackwell.kernel.rmsnorm.rmsnorm", rmsnorm, {"m": 2, "n": 32768}),
    Case("cute.hopper.kernel.cta_norm.cta_norm", cta_norm, {"m": 3, "n": 2048, "norm": "rms"}, "sm_90a"),
    Case("cute.hopper.kernel.cta_norm.cta_norm", cta_norm, {"m": 2, "n": 4096, "norm": "layer"}, "sm_90a"),
)
