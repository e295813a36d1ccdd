"""GEMM examples of sm_100a: block-scaled, grouped, mixture of experts, dense, mixed input, tutorials."""

from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from cutlass import cute

from .harness import Case, Prepared
from .operands import FORMATS, cute_tensor, empty, expected, matrix, product, scales

STREAM = driver.CUstream(0)
FEW = 2  # clusters that run at once: a persistent kernel then walks over several tiles


def dense_blockscaled(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    ab: str = "e2m1",
    sf: str = "e4m3",
    vec: int = 16,
    c: str = "fp16",
    majors: str = "kkn",
    clusters: int = FEW,
) -> Prepared:
    m, n, k, batch = mnkl
    a_name, b_name = ab.split("-") if "-" in ab else (ab, ab)
    a = matrix(a_name, batch, m, k, gen, _mode(majors[0]))
    b = matrix(b_name, batch, n, k, gen, _mode(majors[1]))
    sfa, sfb = scales(sf, batch, m, k, vec, gen), scales(sf, batch, n, k, vec, gen)
    d = empty(c, batch, m, n, majors[2])
    gemm = module.Sm100BlockScaledPersistentDenseGemmKernel(vec, tile, cluster)
    types = [FORMATS[x].type for x in (a_name, b_name, c, sf)]
    compiled = module.scaled_mm(gemm, *types, *majors, clusters, STREAM)
    pointers = a.pointer(), b.pointer(), sfa.pointer(), sfb.pointer(), d.pointer()

    def run() -> None:
        compiled(*pointers, mnkl, STREAM)

    want, bound = product(a.values * sfa.expanded(k), b.values * sfb.expanded(k))
    return Prepared(run, [expected(d, want, bound, steps=k // 32 + 4)], (a, b, sfa, sfb))


def dense_blockscaled_tensors(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    ab: str = "e2m1",
    sf: str = "e4m3",
    vec: int = 16,
    c: str = "fp16",
    majors: str = "kkn",
    clusters: int = FEW,
    amax: bool = False,
    prefetch: int | None = None,
) -> Prepared:
    """The variants that take CuTe tensors. amax: one more output, the largest magnitude of all."""
    m, n, k, batch = mnkl
    a, b = matrix(ab, batch, m, k, gen, _mode(majors[0])), matrix(ab, batch, n, k, gen, _mode(majors[1]))
    sfa, sfb = scales(sf, batch, m, k, vec, gen), scales(sf, batch, n, k, vec, gen)
    d = empty(c, batch, m, n, majors[2])
    step = 32 if ab == "e2m1" else 16
    kernel = module.Sm100BlockScaledPersistentDenseGemmKernel
    gemm = kernel(vec, tile, cluster) if amax or prefetch is None else kernel(vec, tile, cluster, prefetch)
    arguments = [
        a.tensor(divisible=step),
        b.tensor(divisible=step),
        sfa.tensor(),
        sfb.tensor(),
        d.tensor(divisible=step),
    ]
    want, bound = product(a.values * sfa.expanded(k), b.values * sfb.expanded(k))
    outputs = [expected(d, want, bound, steps=k // 32 + 4)]
    if amax:
        most = empty("fp32", 1, 1, 1)
        most.data.view(torch.float32).fill_(-torch.inf)
        arguments.append(most.tensor())
        outputs.append(expected(most, want.abs().max().view(1, 1, 1), bound.max().view(1, 1, 1), "amax", k // 32 + 4))
    compiled = cute.compile(gemm, *arguments, clusters, STREAM)
    return Prepared(lambda: compiled(*arguments, STREAM), outputs, (a, b, sfa, sfb))


def tutorial_nvfp4(module: ModuleType, gen: torch.Generator, mnkl: tuple[int, int, int, int]) -> Prepared:
    m, n, k, batch = mnkl
    a, b = matrix("e2m1", batch, m, k, gen), matrix("e2m1", batch, n, k, gen)
    sfa, sfb = scales("e4m3", batch, m, k, 16, gen), scales("e4m3", batch, n, k, 16, gen)
    d = empty("fp16", batch, m, n)
    pointers = a.pointer(), b.pointer(), sfa.pointer(), sfb.pointer(), d.pointer(32)
    compiled = cute.compile(module.Sm100BlockScaledDenseGemmKernel(), *pointers, mnkl, STREAM)
    want, bound = product(a.values * sfa.expanded(k), b.values * sfb.expanded(k))
    outputs = [expected(d, want, bound, steps=k // 32 + 4)]
    return Prepared(lambda: compiled(*pointers, mnkl, STREAM), outputs, (a, b, sfa, sfb))


def tutorial_fp16(
    module: ModuleType, gen: torch.Generator, mnk: tuple[int, int, int], constants: tuple[int, ...] = ()
) -> Prepared:
    """constants: clusters that may be active, where the host function takes them."""
    m, n, k = mnk
    a, b, d = matrix("fp16", 1, m, k, gen), matrix("fp16", 1, n, k, gen), empty("fp16", 1, m, n)
    tensors = [cute_tensor(x.stored[:, :, 0], x.format, 32, divisible=64) for x in (a, b, d)]
    compiled = cute.compile(module.host_function, *tensors, *constants)
    want, bound = product(a.values, b.values)
    return Prepared(lambda: compiled(*tensors), [expected(d, want, bound, steps=k // 16 + 4)], (a, b))


def tutorial_dequant(module: ModuleType, gen: torch.Generator, mnk: tuple[int, int, int]) -> Prepared:
    """B is INT8 with one scale, dequantised by a first kernel on which the second depends."""
    m, n, k = mnk
    a, quantized, b = matrix("fp16", 1, m, k, gen), matrix("int8", 1, n, k, gen), empty("fp16", 1, n, k)
    d, scale = empty("fp16", 1, m, n), 0.03125
    tensors = [cute_tensor(x.stored[:, :, 0], x.format, 32, divisible=128) for x in (a, quantized, b, d)]
    compiled = cute.compile(module.host_function, *tensors, scale, FEW, STREAM)
    want, bound = product(a.values, quantized.values * scale)
    outputs = [expected(d, want, bound, steps=k // 16 + 4), expected(b, quantized.values * scale, b.values, "b")]
    return Prepared(lambda: compiled(*tensors, scale, STREAM), outputs, (a, quantized))


def dense(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    ab: str = "fp16",
    c: str = "fp16",
    acc: str = "fp32",
    majors: str = "kkn",
    tma_store: bool = True,
    clusters: int | None = FEW,
    **more: Any,
) -> Prepared:
    """clusters None: the kernel asks for its tiles with cluster launch control."""
    m, n, k, batch = mnkl
    a, b = matrix(ab, batch, m, k, gen, _mode(majors[0])), matrix(ab, batch, n, k, gen, _mode(majors[1]))
    d = empty(c, batch, m, n, majors[2])
    # batch first: a [batch, m, k], b [batch, k, n], d [batch, m, n]
    views = a.stored.permute(2, 0, 1), b.stored.permute(2, 1, 0), d.stored.permute(2, 0, 1)
    tensors = [cute_tensor(v, x.format) for v, x in zip(views, (a, b, d), strict=True)]
    gemm = module.PersistentDenseGemmKernel(FORMATS[acc].type, two, tile, cluster, tma_store, **more)
    constants = () if clusters is None else (clusters,)
    compiled = cute.compile(module.bmm, gemm, *tensors, *constants, STREAM)
    want, bound = product(a.values, b.values)
    steps = k // 8 + 4 if acc == "fp32" else (k // 8 + 4) * 2.0**13
    return Prepared(lambda: compiled(*tensors, STREAM), [expected(d, want, bound, steps=steps)], (a, b))


def dense_once(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    ab: str = "fp16",
    c: str = "fp16",
    majors: str = "kkn",
    tma_store: bool = True,
) -> Prepared:
    """One tile a CTA."""
    m, n, k, batch = mnkl
    a, b = matrix(ab, batch, m, k, gen, _mode(majors[0])), matrix(ab, batch, n, k, gen, _mode(majors[1]))
    d = empty(c, batch, m, n, majors[2])
    tensors = [x.tensor() for x in (a, b, d)]
    gemm = module.DenseGemmKernel(FORMATS["fp32"].type, two, tile, cluster, tma_store)
    compiled = cute.compile(gemm, *tensors, STREAM)
    want, bound = product(a.values, b.values)
    return Prepared(lambda: compiled(*tensors, STREAM), [expected(d, want, bound, steps=k // 8 + 4)], (a, b))


def dense_alpha_beta(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    ab: str = "fp16",
    c: str = "fp16",
    d: str = "fp16",
) -> Prepared:
    """D = alpha A B + beta C"""
    m, n, k, batch = mnkl
    alpha, beta = 1.5, -0.75
    a, b, source = matrix(ab, batch, m, k, gen), matrix(ab, batch, n, k, gen), matrix(c, batch, m, n, gen)
    out, fp32 = empty(d, batch, m, n), FORMATS["fp32"].type
    tensors = [x.tensor() for x in (a, b, source, out)]
    gemm = module.SM100PersistentDenseGemmAlphaBetaKernel(fp32, fp32, two, tile, cluster)
    compiled = cute.compile(gemm, *tensors, alpha, beta, FEW, STREAM)
    want, bound = product(a.values, b.values)
    want = alpha * want + beta * source.values
    outputs = [expected(out, want, alpha * bound + source.values.abs(), steps=k // 8 + 4)]
    return Prepared(lambda: compiled(*tensors, alpha, beta, STREAM), outputs, (a, b, source))


def extended_blockscaled(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    ab: str,
    sf: str,
    vec: int,
    d: str = "fp16",
) -> Prepared:
    """Written in the experimental dialect, which has a compiler of its own."""
    m, n, k, batch = mnkl
    a, b = matrix(ab, batch, m, k, gen), matrix(ab, batch, n, k, gen)
    sfa, sfb = scales(sf, batch, m, k, vec, gen), scales(sf, batch, n, k, vec, gen)
    out = empty(d, batch, m, n)
    tensors = [a.tensor(), sfa.tensor(), b.tensor(), sfb.tensor(), out.tensor()]
    gemm = module.BlockScaledDenseGemmKernel(
        (128, 128), (FORMATS[ab].type, FORMATS["fp32"].type), FORMATS[sf].type, vec
    )
    compiled = cute.experimental.compile(gemm, *tensors)
    want, bound = product(a.values * sfa.expanded(k), b.values * sfb.expanded(k))
    return Prepared(lambda: compiled(*tensors), [expected(out, want, bound, steps=k // 32 + 4)], (a, b, sfa, sfb))


def _mode(letter: str) -> str:
    return "k" if letter == "k" else "mn"


NVFP4: dict[str, Any] = {"ab": "e2m1", "sf": "e4m3", "vec": 16}
MXFP4: dict[str, Any] = {"ab": "e2m1", "sf": "e8m0", "vec": 32}
MXFP8: dict[str, Any] = {"ab": "e4m3", "sf": "e8m0", "vec": 32}


def _cases(example: str, prepare: Any, *configs: dict[str, Any]) -> list[Case]:
    return [Case(f"cute.blackwell.{example}", prepare, config) for config in configs]


_BLOCKSCALED, _DENSE, _TUTORIAL = "kernel.blockscaled_gemm", "kernel.dense_gemm", "tutorial.tutorial_gemm"

CASES = [
    *_cases(
        f"{_BLOCKSCALED}.dense_blockscaled_gemm_persistent",
        dense_blockscaled,
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (1, 1), **NVFP4},
        # longer than the ring, ragged, two of them
        {"mnkl": (160, 224, 2560, 2), "tile": (128, 128), "cluster": (1, 1), **NVFP4, "c": "fp32"},
        {"mnkl": (256, 256, 512, 1), "tile": (256, 256), "cluster": (2, 1), **NVFP4, "c": "bf16"},
        {"mnkl": (512, 384, 768, 1), "tile": (256, 128), "cluster": (2, 2), **NVFP4, "majors": "kkm"},
        {"mnkl": (512, 256, 512, 1), "tile": (256, 64), "cluster": (4, 1), **NVFP4, "c": "fp32"},
        {"mnkl": (512, 512, 512, 1), "tile": (128, 192), "cluster": (2, 2), **NVFP4, "c": "e4m3"},
        {"mnkl": (256, 1024, 512, 1), "tile": (128, 256), "cluster": (1, 4), **NVFP4, "c": "bf16"},
        {"mnkl": (1024, 1024, 256, 1), "tile": (256, 256), "cluster": (4, 4), **NVFP4, "c": "bf16"},
        {"mnkl": (256, 256, 512, 1), "tile": (128, 128), "cluster": (1, 1), **MXFP4, "c": "fp32"},
        {"mnkl": (512, 256, 1024, 1), "tile": (256, 256), "cluster": (2, 1), **MXFP4, "c": "bf16"},
        {"mnkl": (288, 160, 512, 1), "tile": (128, 128), "cluster": (2, 1), **MXFP8, "c": "fp32"},
        {"mnkl": (512, 256, 1536, 1), "tile": (256, 128), "cluster": (2, 1), **MXFP8, "c": "e5m2"},
        {"mnkl": (256, 512, 384, 1), "tile": (256, 192), "cluster": (2, 2), **MXFP8, "majors": "mnm"},
        {"mnkl": (256, 256, 256, 1), "tile": (128, 64), "cluster": (1, 2), **MXFP8, "ab": "e5m2-e4m3"},
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (1, 1), **MXFP8, "ab": "e4m3-e2m1"},
        {"mnkl": (256, 256, 384, 1), "tile": (256, 128), "cluster": (2, 1), **MXFP8, "ab": "e2m3-e3m2", "c": "fp32"},
    ),
    *_cases(
        f"{_BLOCKSCALED}.dense_blockscaled_gemm_persistent_prefetch",
        dense_blockscaled_tensors,
        {"mnkl": (256, 256, 1536, 1), "tile": (128, 128), "cluster": (1, 1), **NVFP4},
        {"mnkl": (512, 256, 512, 1), "tile": (256, 128), "cluster": (2, 1), **MXFP8, "prefetch": 2},
    ),
    *_cases(
        f"{_BLOCKSCALED}.dense_blockscaled_gemm_persistent_amax",
        dense_blockscaled_tensors,
        {"mnkl": (256, 256, 512, 1), "tile": (128, 128), "cluster": (1, 1), **NVFP4, "amax": True},
        {"mnkl": (512, 256, 512, 1), "tile": (256, 128), "cluster": (2, 1), **MXFP8, "c": "fp32", "amax": True},
    ),
    *_cases(f"{_TUTORIAL}.nvfp4_gemm_0", tutorial_nvfp4, {"mnkl": (256, 512, 768, 1)}),
    *_cases(f"{_TUTORIAL}.nvfp4_gemm_1", tutorial_nvfp4, {"mnkl": (512, 256, 1536, 2)}),
    *_cases(
        f"{_DENSE}.dense_gemm_persistent",
        dense,
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (1, 1), "two": False},
        {"mnkl": (512, 512, 512, 2), "tile": (256, 256), "cluster": (2, 1), "two": True, "ab": "bf16", "c": "fp32"},
        {"mnkl": (200, 136, 136, 1), "tile": (64, 64), "cluster": (1, 1), "two": False, "majors": "mnm"},
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (2, 2), "two": True, "tma_store": False},
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (1, 1), "two": False, "ab": "tf32", "c": "fp32"},
        {"mnkl": (256, 256, 256, 1), "tile": (256, 128), "cluster": (2, 1), "two": True, "ab": "e4m3", "c": "bf16"},
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (1, 1), "two": False, "acc": "fp16"},
        {"mnkl": (192, 160, 128, 1), "tile": (64, 96), "cluster": (1, 2), "two": False, "c": "e4m3", "majors": "kkm"},
        {
            "mnkl": (256, 256, 256, 1),
            "tile": (128, 128),
            "cluster": (1, 1),
            "two": False,
            "ab": "int8",
            "c": "int32",
            "acc": "int32",
        },
    ),
    # without TMA stores the accumulator is given back before its loads are known to be over
    Case(
        f"cute.blackwell.{_DENSE}.dense_gemm_persistent",
        dense,
        {"mnkl": (512, 256, 64, 1), "tile": (128, 128), "cluster": (1, 1), "two": False, "tma_store": False},
        refused=r"is written, with no order after it was read by tcgen05\.ld .*\(tcgen05\.wait::ld would wait for it\)",
    ),
    *_cases(
        f"{_DENSE}.dense_gemm",
        dense_once,
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (1, 1), "two": False},
        {"mnkl": (512, 256, 320, 1), "tile": (256, 128), "cluster": (2, 2), "two": True, "majors": "mnm"},
    ),
    *_cases(
        f"{_DENSE}.dense_gemm_software_pipeline",
        dense_once,
        {"mnkl": (256, 256, 512, 1), "tile": (256, 128), "cluster": (2, 1), "two": True, "ab": "bf16", "c": "fp32"},
        # the second CTA of a pair looks at a barrier that only the first one is told of
        {"mnkl": (200, 128, 192, 1), "tile": (128, 96), "cluster": (2, 1), "two": True},
    ),
    *_cases(
        f"{_DENSE}.dense_gemm_alpha_beta_persistent",
        dense_alpha_beta,
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128), "cluster": (1, 1), "two": False},
        {"mnkl": (512, 256, 256, 1), "tile": (256, 128), "cluster": (2, 1), "two": True, "c": "fp32", "d": "fp32"},
    ),
    *_cases(
        f"{_DENSE}.dense_gemm_persistent_prefetch",
        dense,
        {"mnkl": (512, 256, 512, 1), "tile": (256, 128), "cluster": (2, 1), "two": True},
    ),
    *_cases(
        f"{_DENSE}.dense_gemm_persistent_dynamic",
        dense,
        {"mnkl": (512, 512, 256, 1), "tile": (128, 128), "cluster": (1, 1), "two": False, "clusters": None},
        {"mnkl": (512, 512, 256, 1), "tile": (256, 128), "cluster": (2, 1), "two": True, "clusters": None},
        {
            "mnkl": (512, 256, 512, 1),
            "tile": (256, 128),
            "cluster": (2, 1),
            "two": True,
            "clusters": None,
            "split_k": 2,
            "tma_store": False,
            "c": "fp32",
        },
    ),
    *_cases(f"{_TUTORIAL}.fp16_gemm_0", tutorial_fp16, {"mnk": (256, 256, 256)}),
    *_cases(f"{_TUTORIAL}.fp16_gemm_1", tutorial_fp16, {"mnk": (256, 512, 512)}),
    *_cases(f"{_TUTORIAL}.fp16_gemm_2", tutorial_fp16, {"mnk": (512, 256, 512)}),
    *_cases(f"{_TUTORIAL}.fp16_gemm_3", tutorial_fp16, {"mnk": (512, 512, 512), "constants": (FEW,)}),
    *_cases(f"{_TUTORIAL}.fp16_gemm_3_1", tutorial_fp16, {"mnk": (512, 512, 256), "constants": (FEW,)}),
    *_cases(f"{_TUTORIAL}.fp16_gemm_4", tutorial_fp16, {"mnk": (512, 1024, 256), "constants": (FEW, FEW)}),
    *_cases(f"{_TUTORIAL}.fp16_gemm_5", tutorial_fp16, {"mnk": (512, 256, 768), "constants": (FEW,)}),
    *_cases(f"{_TUTORIAL}.fp16_gemm_6", tutorial_dequant, {"mnk": (256, 512, 256)}),
    Case("cute_ext.blackwell.dense_block_scaled_gemm", extended_blockscaled, {"mnkl": (256, 256, 512, 1), **MXFP8}),
]
