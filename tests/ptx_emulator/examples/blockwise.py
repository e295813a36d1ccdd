"""GEMM examples of sm_100a that scale in software (one FP32 factor for 128 of K) or convert one operand first."""

from types import ModuleType
from typing import Any

import cutlass
import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

from .harness import Case, Prepared
from .operands import FORMATS, Expected, Matrix, cute_tensor, empty, expected, matrix, product

STREAM = driver.CUstream(0)
FEW = 2  # clusters that run at once
BLOCK = 128


def _scaled(a: Matrix, sfa: Matrix, b: Matrix, sfb: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
    """A factor for every row of A and 128 of K, and one for every 128 x 128 of B -> both with their factors."""
    k, n = a.values.shape[2], b.values.shape[1]
    left = a.values * sfa.values.repeat_interleave(BLOCK, 2)[:, :, :k]
    right = b.values * sfb.values.repeat_interleave(BLOCK, 1)[:, :n].repeat_interleave(BLOCK, 2)[:, :, :k]
    return left, right


def _operands(m: int, n: int, k: int, rows: int, groups: int, c: str, gen: torch.Generator) -> list[Matrix]:
    """A and its factors in `rows` batches, B and its factors in `groups`, D."""
    blocks = -(-k // BLOCK)
    return [
        matrix("e4m3", rows, m, k, gen),
        matrix("e4m3", groups, n, k, gen),
        empty(c, rows, m, n),
        matrix("fp32", rows, m, blocks, gen, "mn"),
        matrix("fp32", groups, -(-n // BLOCK), blocks, gen),
    ]


def dense(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    c: str = "bf16",
) -> Prepared:
    m, n, k, batch = mnkl
    operands = a, b, d, sfa, sfb = _operands(m, n, k, batch, batch, c, gen)
    tensors = [x.tensor() for x in operands]
    gemm = module.BlockwiseGemmKernel(cutlass.Float32, two, tile, cluster)
    compiled = cute.compile(gemm, *tensors, FEW, STREAM)
    left, right = _scaled(a, sfa, b, sfb)
    output = expected(d, *product(left, right), steps=k // 32 + 8)
    return Prepared(lambda: compiled(*tensors, STREAM), [output], operands)


def contiguous(
    module: ModuleType,
    gen: torch.Generator,
    rows: tuple[int, ...],
    n: int,
    k: int,
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    c: str = "bf16",
) -> Prepared:
    """rows: of A, for every group; the groups lie below each other, and a table says whose a row is."""
    operands = a, b, d, sfa, sfb = _operands(sum(rows), n, k, 1, len(rows), c, gen)
    owner = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)).to(torch.int32)
    tensors = [*(x.tensor() for x in operands), cute_tensor(owner, FORMATS["int32"])]
    gemm = module.BlockwiseContiguousGroupedGemmKernel(cutlass.Float32, two, tile, cluster)
    compiled = cute.compile(gemm, *tensors, FEW, STREAM)
    left, right = _scaled(a, sfa, b, sfb)
    parts = [product(x, right[g : g + 1]) for g, x in enumerate(left.split(rows, 1))]
    want, bound = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    return Prepared(
        lambda: compiled(*tensors, STREAM), [expected(d, want, bound, steps=k // 32 + 8)], (*operands, owner)
    )


def masked(
    module: ModuleType,
    gen: torch.Generator,
    rows: tuple[int, ...],
    m: int,
    n: int,
    k: int,
    tile: tuple[int, int],
    cluster: tuple[int, int],
    two: bool,
    c: str = "bf16",
) -> Prepared:
    """rows: how many of a group's m count; what the others become is left open. The kernel reads one count more than
    there are groups, so the table has room for it."""
    operands = a, b, d, sfa, sfb = _operands(m, n, k, len(rows), len(rows), c, gen)
    counts = torch.tensor((*rows, 0), dtype=torch.int32)[:-1]
    tensors = [*(x.tensor() for x in operands), cute_tensor(counts, FORMATS["int32"])]
    gemm = module.BlockwiseMaskedGroupedGemmKernel(cutlass.Float32, two, tile, cluster)
    compiled = cute.compile(gemm, *tensors, FEW, STREAM)
    want, bound = product(*_scaled(a, sfa, b, sfb))
    want[torch.arange(m) >= counts[:, None]] = torch.nan
    output = expected(d, want, bound, steps=k // 32 + 8)
    return Prepared(lambda: compiled(*tensors, STREAM), [output], (*operands, counts))


def _narrow(
    name: str, batch: int, m: int, k: int, block: int, mma: str, gen: torch.Generator, major: str = "k"
) -> tuple[Matrix, Matrix | None, torch.Tensor]:
    """A in a narrow type, a factor for every row and `block` of K (0: none), and what both stand for."""
    a = matrix(name, batch, m, k, gen, major)
    if not block:
        return a, None, a.values
    factors = matrix(mma, batch, m, k // block, gen, "mn")
    return a, factors, a.values * factors.values.repeat_interleave(block, 2)


def converted(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    tile: tuple[int, int, int],
    cluster: tuple[int, int],
    two: bool,
    a_type: str = "int8",
    b_type: str = "bf16",
    c: str = "bf16",
    majors: str = "kkn",
    tma_store: bool = True,
    block: int = 0,
) -> Prepared:
    """A narrow A, and with `block` its factors, become B's type on their way to the tensor core."""
    m, n, k, batch = mnkl
    a, factors, wide = _narrow(a_type, batch, m, k, block, b_type, gen, "k" if majors[0] == "k" else "mn")
    b = matrix(b_type, batch, n, k, gen, "k" if majors[1] == "k" else "mn")
    d = empty(c, batch, m, n, majors[2])
    tensors = [a.tensor(), factors and factors.tensor(), b.tensor(), d.tensor(divisible=16)]
    gemm = module.MixedInputGemmKernel(min(block, 1), block, cutlass.Float32, two, tile, cluster, tma_store, False)
    compiled = cute.compile(gemm, *tensors, FEW, STREAM)
    return Prepared(lambda: compiled(*tensors, STREAM), [_converted(d, wide, b, bool(block))], (a, factors, b))


def _converted(d: Matrix, wide: torch.Tensor, b: Matrix, rounds: bool) -> Expected:
    """rounds: A with its factors is rounded to B's type before it is multiplied."""
    steps = b.values.shape[2] // 16 + 4 + (2.0 ** (24 - b.format.digits) if rounds else 0)
    return expected(d, *product(wide, b.values), steps=steps)


def converted_groups(
    module: ModuleType,
    gen: torch.Generator,
    columns: tuple[int, ...],
    m: int,
    k: int,
    tile: tuple[int, int, int],
    cluster: tuple[int, int],
    two: bool,
    a_type: str = "int8",
    b_type: str = "bf16",
    c: str = "bf16",
    c_major: str = "m",
    block: int = 0,
) -> Prepared:
    """columns: of B, for every group; the groups lie beside each other. One A a group."""
    a, factors, wide = _narrow(a_type, len(columns), m, k, block, b_type, gen)
    b, d = matrix(b_type, 1, sum(columns), k, gen), empty(c, 1, m, sum(columns), c_major)
    ends = torch.tensor((0, *columns)).cumsum(0).to(torch.int32)
    tensors = [a.tensor(), factors and factors.tensor(), b.tensor(), from_dlpack(ends), d.tensor(divisible=16)]
    afterwards = hasattr(module, "GroupedMixedInputGemmAccScaleKernel")
    kernel = getattr(module, f"GroupedMixedInputGemm{'AccScale' if afterwards else ''}Kernel")
    gemm = kernel(min(block, 1), block, cutlass.Float32, two, tile, cluster, len(columns), False)
    compiled = cute.compile(gemm, *tensors, FEW, STREAM)
    parts = [product(wide[g : g + 1], x) for g, x in enumerate(b.values.split(columns, 1))]
    want, bound = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    rounding = 2.0 ** (24 - b.format.digits) if block and not afterwards else 0
    output = expected(d, want, bound, steps=k // 16 + 4 + rounding)
    return Prepared(lambda: compiled(*tensors, STREAM), [output], (a, factors, b, ends))


def _cases(example: str, prepare: Any, *configs: dict[str, Any]) -> list[Case]:
    return [Case(f"cute.blackwell.kernel.{example}", prepare, config) for config in configs]


_ONE: dict[str, Any] = {"tile": (128, 128), "cluster": (1, 1), "two": False}
_TWO: dict[str, Any] = {"tile": (256, 128), "cluster": (2, 1), "two": True}
_ROOT: dict[str, Any] = {"cluster": (1, 1), "two": False}
_PAIR: dict[str, Any] = {"cluster": (2, 1), "two": True}
_INT4: dict[str, Any] = {"a_type": "int4"}

CASES = [
    *_cases(
        "blockwise_gemm.blockwise_gemm",
        dense,
        {"mnkl": (256, 256, 512, 1), **_ONE},
        {"mnkl": (512, 128, 768, 1), **_TWO, "c": "fp32"},
    ),
    *_cases(
        "blockwise_gemm.contiguous_grouped_gemm", contiguous, {"rows": (128, 256, 128), "n": 128, "k": 384, **_ONE}
    ),
    *_cases("blockwise_gemm.masked_grouped_gemm", masked, {"rows": (16, 256, 1), "m": 256, "n": 128, "k": 384, **_ONE}),
    # no unsigned A: the DSL converts bytes of 128 and more as negative numbers
    *_cases(
        "mixed_input_gemm.mixed_input_gemm",
        converted,
        {"mnkl": (256, 256, 256, 1), "tile": (128, 128, 64), "cluster": (1, 1), "two": False},
        {"mnkl": (256, 256, 512, 1), "tile": (256, 128, 64), "cluster": (2, 1), "two": True, "majors": "mnm"},
        {"mnkl": (256, 128, 256, 2), "tile": (128, 128, 128), "cluster": (1, 1), "two": False, **_INT4, "block": 128},
        {"mnkl": (256, 256, 512, 1), "tile": (256, 128, 128), "cluster": (2, 1), "two": True, **_INT4, "block": 256},
        {
            "mnkl": (256, 128, 512, 1),
            "tile": (128, 64, 64),
            "cluster": (1, 2),
            "two": False,
            **_INT4,
            "block": 128,
            "majors": "mkn",
            "b_type": "fp16",
            "tma_store": False,
        },
    ),
    *_cases(
        "mixed_input_gemm.grouped_mixed_input_gemm",
        converted_groups,
        {"columns": (64, 128, 64), "m": 256, "k": 256, "tile": (128, 64, 64), "cluster": (1, 1), "two": False},
        {"columns": (64, 0, 64), "m": 256, "k": 512, "tile": (128, 64, 128), **_ROOT, **_INT4, "block": 256},
        {"columns": (72, 136), "m": 512, "k": 256, "tile": (256, 64, 128), **_PAIR, **_INT4, "block": 128},
    ),
    *_cases(
        "mixed_input_gemm.grouped_mixed_input_gemm_acc_scale",
        converted_groups,
        {"columns": (64, 0, 72), "m": 256, "k": 512, "tile": (128, 64, 128), **_ROOT, **_INT4, "block": 256},
        {"columns": (32, 24), "m": 512, "k": 512, "tile": (256, 16, 128), **_PAIR, **_INT4, "block": 128},
        {"columns": (8, 8), "m": 128, "k": 512, "tile": (128, 8, 256), **_ROOT, **_INT4, "block": 256},
    ),
]
