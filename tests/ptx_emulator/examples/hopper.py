"""GEMM examples of sm_90a."""

from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from cutlass import cute

from .harness import Case, Prepared
from .operands import FORMATS, cute_tensor, empty, expected, matrix, product

STREAM = driver.CUstream(0)


def dense(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int] = (1, 1),
    ab: str = "fp16",
    c: str = "fp16",
    acc: str = "fp32",
    majors: str = "kkn",
    clusters: int | None = None,
    swizzle: int = 1,
    along_m: bool = True,
) -> Prepared:
    """clusters: how many run at once, None for the example whose grid has one CTA a tile."""
    m, n, k, batch = mnkl
    a_name, b_name = ab.split("-") if "-" in ab else (ab, ab)
    a = matrix(a_name, batch, m, k, gen, "k" if majors[0] == "k" else "mn")
    b = matrix(b_name, batch, n, k, gen, "k" if majors[1] == "k" else "mn")
    d = empty(c, batch, m, n, majors[2])
    if clusters is None:
        gemm = module.HopperWgmmaGemmKernel(FORMATS[acc].type, tile, cluster)
    else:
        gemm = module.HopperWgmmaGemmPersistentKernel(FORMATS[acc].type, tile, cluster, swizzle, along_m)
    tensors = a.tensor(), b.tensor(), d.tensor()
    compiled = cute.compile(gemm, *tensors, *(() if clusters is None else (clusters,)), STREAM)
    want, bound = product(a.values, b.values)
    # an FP16 accumulator is rounded after every instruction
    steps = _steps(k, a_name) if acc != "fp16" else (k // 8 + 4) * 2.0**13
    return Prepared(lambda: compiled(*tensors, STREAM), [expected(d, want, bound, steps=steps)], (a, b))


def fp8_two_accumulators(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int] = (1, 1),
    c: str = "fp16",
    interval: int = 4,
    clusters: int = 2,
    swizzle: int = 1,
    along_m: bool = True,
) -> Prepared:
    """d = scale_a scale_b a b^T; the accumulator is added to another one every `interval` instructions."""
    m, n, k, batch = mnkl
    a, b, d = matrix("e4m3", batch, m, k, gen), matrix("e4m3", batch, n, k, gen), empty(c, batch, m, n)
    scales = torch.tensor([0.375]), torch.tensor([1.25])
    gemm = module.HopperFP8WarpSpecialized2xAccGemmKernel(tile, cluster, swizzle, along_m, interval)
    tensors = a.tensor(), b.tensor(), d.tensor(), *(cute_tensor(s, FORMATS["fp32"]) for s in scales)
    compiled = cute.compile(gemm, *tensors, clusters, STREAM)
    want, bound = (x * float(scales[0]) * float(scales[1]) for x in product(a.values, b.values))
    return Prepared(
        lambda: compiled(*tensors, STREAM), [expected(d, want, bound, steps=_steps(k, "e4m3"))], (a, b, scales)
    )


def fp8_gelu(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int] = (1, 1),
    c: str = "fp16",
    kind: str = "erf",
    clusters: int = 2,
) -> Prepared:
    """d = gelu(scale a b^T); kind "poly11": the normal distribution as a polynomial, which is off by 2^-12."""
    m, n, k, batch = mnkl
    a, b, d = matrix("e4m3", batch, m, k, gen), matrix("e4m3", batch, n, k, gen), empty(c, batch, m, n)
    gemm = module.HopperFP8GeluPersistentGemmKernel(FORMATS["fp32"].type, tile, cluster, 1, True)
    tensors, scale = (a.tensor(), b.tensor(), d.tensor()), 0.0625
    compiled = cute.compile(gemm, *tensors, scale, True, clusters, STREAM, getattr(module, f"{kind}_gelu"))
    inner, bound = (scale * x for x in product(a.values, b.values))
    want, steps = torch.nn.functional.gelu(inner), _steps(k, "e4m3")
    # the slope of gelu is 1.13 at most
    bound = 1.13 * bound + (inner.abs() * 2.0**-12 * 2.0**24 / steps if kind == "poly11" else 0)
    return Prepared(lambda: compiled(*tensors, scale, STREAM), [expected(d, want, bound, steps=steps)], (a, b))


def _steps(k: int, name: str) -> float:
    """wgmma keeps 13 bits behind the point of the largest product or sum when it adds products of FP8."""
    return (k // 8 + 4) * (2.0**10 if name in ("e4m3", "e5m2") else 1)


def _cases(example: str, prepare: Any, *configs: dict[str, Any]) -> list[Case]:
    return [Case(f"cute.hopper.kernel.{example}", prepare, config, "sm_90a") for config in configs]


CASES = [
    *_cases(
        "dense_gemm.dense_gemm_persistent",
        dense,
        {"mnkl": (256, 128, 256, 1), "tile": (128, 128), "clusters": 2},
        {"mnkl": (256, 264, 192, 1), "tile": (128, 128), "cluster": (2, 1), "clusters": 2},
        # one cluster walks over all tiles of two matrices, and the ring wraps
        {
            "mnkl": (264, 128, 640, 2),
            "tile": (128, 128),
            "cluster": (1, 2),
            "ab": "bf16",
            "c": "bf16",
            "majors": "mnm",
            "clusters": 1,
        },
        {"mnkl": (256, 256, 512, 1), "tile": (128, 64), "cluster": (2, 2), "clusters": 1},
        {"mnkl": (200, 520, 832, 1), "tile": (128, 256), "ab": "bf16", "c": "fp32", "majors": "mkn", "clusters": 2},
        {
            "mnkl": (72, 136, 320, 3),
            "tile": (64, 64),
            "c": "fp32",
            "majors": "knn",
            "clusters": 3,
            "swizzle": 2,
            "along_m": False,
        },
        {"mnkl": (136, 200, 512, 1), "tile": (128, 128), "ab": "e4m3-e5m2", "clusters": 2},
        {
            "mnkl": (136, 208, 1024, 1),
            "tile": (64, 64),
            "cluster": (2, 1),
            "ab": "e5m2-e4m3",
            "c": "e4m3",
            "clusters": 2,
        },
        {
            "mnkl": (136, 208, 512, 1),
            "tile": (128, 64),
            "cluster": (1, 2),
            "ab": "int8-uint8",
            "c": "int32",
            "acc": "int32",
            "clusters": 2,
        },
        {"mnkl": (136, 208, 512, 1), "tile": (128, 64), "acc": "fp16", "clusters": 2},
    ),
    *_cases(
        "dense_gemm.dense_gemm",
        dense,
        {"mnkl": (256, 264, 192, 1), "tile": (128, 128), "cluster": (2, 1)},
        {
            "mnkl": (264, 128, 640, 2),
            "tile": (128, 128),
            "cluster": (1, 2),
            "ab": "bf16",
            "c": "bf16",
            "majors": "mnm",
        },
        {"mnkl": (256, 256, 512, 1), "tile": (128, 64), "cluster": (2, 2)},
        {"mnkl": (200, 520, 832, 1), "tile": (128, 256), "ab": "bf16", "c": "fp32", "majors": "mkn"},
        {"mnkl": (136, 200, 512, 1), "tile": (128, 128), "ab": "e4m3-e5m2"},
        {"mnkl": (72, 136, 320, 3), "tile": (64, 64), "c": "fp32", "majors": "knn"},
    ),
    *_cases(
        "dense_gemm.dense_gemm_fp8_2xacc",
        fp8_two_accumulators,
        {"mnkl": (136, 200, 640, 1), "tile": (128, 128)},
        {"mnkl": (256, 264, 512, 2), "tile": (64, 128), "cluster": (2, 1), "c": "bf16", "interval": 8, "clusters": 1},
    ),
    *_cases(
        "dense_gemm.dense_gemm_fp8_gelu_persistent",
        fp8_gelu,
        {"mnkl": (136, 200, 256, 1), "tile": (64, 128)},
        {"mnkl": (256, 272, 384, 1), "tile": (128, 256), "cluster": (2, 1), "kind": "poly11", "clusters": 1},
        {"mnkl": (128, 136, 128, 2), "tile": (64, 64), "c": "bf16"},
    ),
]
