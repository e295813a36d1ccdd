"""Examples in the experimental dialect, which has a compiler of its own; the block-scaled one is with `gemm`."""

from types import ModuleType

import torch
from cutlass import cute

from .gpu_host import as_it_stands
from .harness import Case, Prepared
from .operands import FORMATS, cute_tensor, empty, expected, matrix, product


def dense(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int] = (128, 128),
    ab: str = "fp16",
    c: str = "fp16",
    majors: str = "kkn",
) -> Prepared:
    m, n, k, batch = mnkl
    a = matrix(ab, batch, m, k, gen, "k" if majors[0] == "k" else "mn")
    b = matrix(ab, batch, n, k, gen, "k" if majors[1] == "k" else "mn")
    d = empty(c, batch, m, n, majors[2])
    tensors = [x.tensor() for x in (a, b, d)]
    types = FORMATS[ab].type, FORMATS["fp32"].type
    compiled = cute.experimental.compile(module.DenseGemmKernel(tile, types, FORMATS[c].type), *tensors)
    want, bound = product(a.values, b.values)
    return Prepared(lambda: compiled(*tensors), [expected(d, want, bound, steps=k // 8 + 4)], (a, b))


def pair(module: ModuleType, gen: torch.Generator, mnk: tuple[int, int, int], two: bool, multicast: bool) -> Prepared:
    m, n, k = mnk
    a, b, d = matrix("fp16", 1, m, k, gen), matrix("fp16", 1, n, k, gen), empty("fp16", 1, m, n)
    tensors = [cute_tensor(x.stored[:, :, 0], x.format) for x in (a, b, d)]
    launch = module.sm100_4x4x1_kernel_builder(multicast, two, FORMATS["fp32"].type, m, n)
    compiled = cute.experimental.compile(launch, *tensors)
    want, bound = product(a.values, b.values)
    return Prepared(lambda: compiled(*tensors), [expected(d, want, bound, steps=k // 8 + 4)], (a, b))


_TYPES = {"ab_dtype": "fp16", "c_dtype": "fp16", "acc_dtype": "fp32", "a_major": "k", "b_major": "k", "c_major": "n"}

CASES = [
    Case(
        "cute_ext.ampere.memcpy_simt_universal_copy",
        as_it_stands,
        {"call": "run_simt_universal_memcpy", "M": 136, "N": 7, "L": 2},
    ),
    Case("cute_ext.blackwell.dense_gemm", dense, {"mnkl": (256, 256, 192, 1)}),
    Case(
        "cute_ext.blackwell.dense_gemm", dense, {"mnkl": (256, 128, 128, 2), "ab": "bf16", "c": "fp32", "majors": "mnm"}
    ),
    Case("cute_ext.blackwell.dense_gemm_2sm", pair, {"mnk": (256, 256, 320), "two": True, "multicast": True}),
    Case(
        "cute_ext.blackwell.dense_gemm_cute_pipeline",
        as_it_stands,
        {"call": "run", "mnkl": (256, 256, 192, 1), "mma_tiler_mn": (256, 128), "cluster_shape_mn": (2, 1), **_TYPES},
    ),
    Case(
        "cute_ext.blackwell.dense_gemm_cute_pipeline",
        as_it_stands,
        {
            "call": "run",
            "mnkl": (256, 256, 128, 2),
            "mma_tiler_mn": (128, 128),
            "cluster_shape_mn": (1, 1),
            "use_2cta_instrs": False,
            "use_tma_store": False,
            **_TYPES,
        },
    ),
    # every epilogue warp writes the CTA's map of D
    Case(
        "cute_ext.blackwell.dense_gemm_ptr_array",
        as_it_stands,
        {"call": "run", "mnkl": (256, 128, 128, 3), "mma_tiler_mn": (128, 128), "cluster_shape_mn": (1, 1), **_TYPES},
        refused="data race: .* tensormap.replace",
    ),
]
