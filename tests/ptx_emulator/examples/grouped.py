"""Grouped GEMM examples of sm_100a: problems of different sizes, and mixture of experts with offsets of tokens.

Their tensor maps are written by the kernels themselves, for one group after the other.
"""

from types import ModuleType
from typing import Any

import cutlass
import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.cute.runtime import from_dlpack

from .harness import Case, Prepared
from .operands import FORMATS, Expected, Matrix, Scales, aligned, cute_tensor, empty, expected, matrix, product, scales

STREAM = driver.CUstream(0)
FEW = 2  # clusters that run at once: every one of them changes its tensor maps
_MAPS = 148  # one set for every SM that a cluster may run on

Sizes = tuple[tuple[int, int, int], ...]


def _plain(t: torch.Tensor, align: int = 16) -> Any:
    """Strides as they are: the examples' tables of sizes and addresses."""
    room = aligned(t.nbytes).view(t.dtype).view(t.shape)
    room.copy_(t)
    return from_dlpack(room, assumed_align=align)


def _strides(x: Matrix) -> tuple[int, int]:
    _, mn, k = x.values.shape
    return (k, 1) if x.major == "k" else (1, mn)


def _mode(letter: str) -> str:
    return "k" if letter in "k" else "mn"


def _clusters(sizes: Sizes, tile: tuple[int, int], cluster: tuple[int, int]) -> int:
    """tile: of one CTA."""
    rows, columns = tile[0] * cluster[0], tile[1] * cluster[1]
    return sum(-(-m // rows) * -(-n // columns) for m, n, _ in sizes)


class _Problems:
    """The operands of every group, and the tables that the kernels read."""

    def __init__(self, sizes: Sizes, ab: str, c: str, majors: str, gen: torch.Generator):
        self.a = [matrix(ab, 1, m, k, gen, _mode(majors[0])) for m, _, k in sizes]
        self.b = [matrix(ab, 1, n, k, gen, _mode(majors[1])) for _, n, k in sizes]
        self.d = [empty(c, 1, m, n, majors[2]) for m, n, _ in sizes]
        groups = list(zip(self.a, self.b, self.d, strict=True))
        self.shapes = _plain(torch.tensor([(*s, 1) for s in sizes], dtype=torch.int32))
        self.strides = _plain(torch.tensor([[_strides(x) for x in g] for g in groups], dtype=torch.int32))
        self.addresses = _plain(torch.tensor([[x.data.data_ptr() for x in g] for g in groups]))
        # of the same types and majors, and else of no account
        smallest = [32 if x.format.bits == 4 else 16 for x in groups[0]]
        self.initial_matrices = [
            matrix(ab, 1, smallest[0], smallest[0], gen, _mode(majors[0])),
            matrix(ab, 1, smallest[1], smallest[1], gen, _mode(majors[1])),
            empty(c, 1, smallest[2], smallest[2], majors[2]),
        ]
        self.initial = [x.tensor() for x in self.initial_matrices]


def grouped_blockscaled(
    module: ModuleType,
    gen: torch.Generator,
    sizes: Sizes,
    tile: tuple[int, int],
    cluster: tuple[int, int],
    ab: str,
    sf: str,
    vec: int,
    c: str = "fp16",
    majors: str = "kkn",
    host_shapes: bool = True,
) -> Prepared:
    """host_shapes: the grid is as large as the problem needs; else as many clusters as the device takes."""
    p = _Problems(sizes, ab, c, majors, gen)
    sfa = [scales(sf, 1, m, k, vec, gen) for m, _, k in sizes]
    sfb = [scales(sf, 1, n, k, vec, gen) for _, n, k in sizes]
    scale_addresses = _plain(torch.tensor([[x.data.data_ptr() for x in g] for g in zip(sfa, sfb, strict=True)]))
    initial_scales = [matrix(sf, 1, 16, 16, gen) for _ in range(2)]
    kernel = module.Sm100GroupedBlockScaledGemmKernel
    maps = torch.zeros(_MAPS, kernel.num_tensormaps, kernel.bytes_per_tensormap // 8, dtype=torch.int64)
    maps_tensor = _plain(maps)
    initial = [*p.initial, *(x.tensor() for x in initial_scales)]
    tables = [p.shapes, p.strides, p.addresses, scale_addresses]
    total = _clusters(sizes, (128, tile[1]), cluster) if host_shapes else FEW
    compiled = cute.compile(
        kernel(vec, tile, cluster),
        *initial,
        len(sizes),
        *tables,
        total,
        maps_tensor,
        FEW,
        STREAM,
        options="--opt-level 2",
    )
    outputs = []
    for n, (a, b, d, x, y) in enumerate(zip(p.a, p.b, p.d, sfa, sfb, strict=True)):
        k = a.values.shape[2]
        want, bound = product(a.values * x.expanded(k), b.values * y.expanded(k))
        outputs.append(expected(d, want, bound, f"group {n} d", steps=k // 32 + 4))
    return Prepared(lambda: compiled(*initial, *tables, maps_tensor, STREAM), outputs, (p, sfa, sfb, initial_scales))


def grouped_dense(
    module: ModuleType,
    gen: torch.Generator,
    sizes: Sizes,
    tile: tuple[int, int],
    cluster: tuple[int, int],
    update: str,
    two: bool | None = None,
    ab: str = "fp16",
    c: str = "fp16",
    majors: str = "kkn",
) -> Prepared:
    """update: where a tensor map is changed, "SMEM" or "GMEM". two: CTAs for one MMA, None on sm_90a."""
    p = _Problems(sizes, ab, c, majors, gen)
    kernel = module.HopperGroupedGemmPersistentKernel if two is None else module.GroupedGemmKernel
    maps = _plain(torch.zeros(_MAPS, kernel.num_tensormaps, kernel.bytes_per_tensormap // 8, dtype=torch.int64))
    tables = [p.shapes, p.strides, p.addresses]
    total = _clusters(sizes, (tile[0] // (2 if two else 1), tile[1]), cluster)
    mode = getattr(cutlass.utils.TensorMapUpdateMode, update)
    if two is None:
        gemm = kernel(cutlass.Float32, tile, cluster, 1, True, mode)
    else:
        gemm = kernel(cutlass.Float32, two, tile, cluster, mode)
    compiled = cute.compile(gemm, *p.initial, len(sizes), *tables, total, maps, FEW, STREAM)
    outputs = []
    for n, (a, b, d) in enumerate(zip(p.a, p.b, p.d, strict=True)):
        want, bound = product(a.values, b.values)
        # wgmma keeps 13 bits behind the point of the largest product or sum when it adds products of FP8
        coarse = 2.0**10 if two is None and a.format.bits == 8 else 1
        outputs.append(expected(d, want, bound, f"group {n} d", steps=(a.values.shape[2] // 16 + 4) * coarse))
    return Prepared(lambda: compiled(*p.initial, *tables, maps, STREAM), outputs, (p,))


# --- mixture of experts ---


def _experts(a: Matrix, b: Matrix, tokens: tuple[int, ...], scenario: str, left: Any, right: Any) -> tuple[Any, Any]:
    """left, right: what an expert's part of A and B are multiplied with. 2Dx3D: rows of A are an expert's tokens, B one
    matrix an expert, outputs below each other. 2Dx2D: columns along K are an expert's tokens, one output an expert."""
    wants, bounds, first = [], [], 0
    for e, count in enumerate(tokens):
        part = slice(first, first + count)
        if scenario == "2Dx3D":
            x, y = a.values[:, part], b.values[e : e + 1]
        else:
            x, y = a.values[:, :, part], b.values[:, :, part]
        want, bound = product(x * left[e], y * right[e])
        wants.append(want)
        bounds.append(bound)
        first += count
    axis = 1 if scenario == "2Dx3D" else 0
    return torch.cat(wants, axis), torch.cat(bounds, axis)


def _moe_operands(
    scenario: str,
    tokens: tuple[int, ...],
    hidden: int,
    columns: int,
    ab: str,
    c: str,
    majors: str,
    gen: torch.Generator,
) -> tuple[Matrix, Matrix, Matrix, list[Any], Any]:
    """A, B and D; their CuTe tensors with PyTorch's axes; the ends of every expert's tokens."""
    total, experts = sum(tokens), len(tokens)
    if scenario == "2Dx3D":
        a = matrix(ab, 1, total, hidden, gen, _mode(majors[0]))
        b = matrix(ab, experts, columns, hidden, gen, _mode(majors[1]))
        d = empty(c, 1, total, columns, majors[2])
        views = a.stored[:, :, 0], b.stored.permute(2, 1, 0), d.stored[:, :, 0]
    else:
        a = matrix(ab, 1, hidden, total, gen, _mode(majors[0]))
        b = matrix(ab, 1, columns, total, gen, _mode(majors[1]))
        d = empty(c, experts, hidden, columns, majors[2])
        views = a.stored[:, :, 0], b.stored[:, :, 0].T, d.stored.permute(2, 0, 1)
    tensors = [cute_tensor(v, x.format) for v, x in zip(views, (a, b, d), strict=True)]
    ends = cute_tensor(torch.tensor(tokens).cumsum(0).to(torch.int32), FORMATS["int32"])
    return a, b, d, tensors, ends


def _workspace(size: int) -> Any:
    return cute_tensor(aligned(size), FORMATS["uint8"], 128)


def moe(
    module: ModuleType,
    gen: torch.Generator,
    scenario: str,
    tokens: tuple[int, ...],
    hidden: int,
    columns: int,
    tile: tuple[int, int, int] = (128, 128, 64),
    cluster: tuple[int, int, int] = (1, 1, 1),
    two: bool = False,
    ab: str = "bf16",
    c: str = "bf16",
    majors: str = "knn",
    add: bool = False,
) -> Prepared:
    """add: the product is added to what the output holds."""
    a, b, d, tensors, ends = _moe_operands(scenario, tokens, hidden, columns, ab, c, majors, gen)
    kernel = module.GroupedGemmKernel(scenario, d.format.type, add, True, None, cutlass.Float32, tile, cluster, two)
    workspace = _workspace(kernel.get_workspace_size(len(tokens)))
    arguments = (*tensors, ends, None, workspace)
    compiled = cute.compile(kernel, *arguments, FEW, STREAM)
    ones = [1.0] * len(tokens)
    want, bound = _experts(a, b, tokens, scenario, ones, ones)
    output = _added(d, want, bound, gen) if add else expected(d, want, bound, steps=max(hidden, sum(tokens)) // 16 + 4)
    return Prepared(lambda: compiled(*arguments, STREAM), [output], (a, b))


def _added(d: Matrix, want: torch.Tensor, bound: torch.Tensor, gen: torch.Generator) -> Expected:
    before = torch.randn(want.shape, generator=gen).to(d.format.dtype)
    laid = before if d.major == "k" else before.transpose(1, 2)
    d.data.copy_(laid.contiguous().reshape(-1).view(torch.uint8))
    # the product is rounded to the output's type, and then the sum
    twice = (want.abs() + before.double().abs()) * 2.0**-d.format.digits / 2.0**-24
    return expected(d, want + before.double(), bound + twice, steps=64)


def moe_scaled(
    module: ModuleType,
    gen: torch.Generator,
    scenario: str,
    tokens: tuple[int, ...],
    hidden: int,
    columns: int,
    ab: str,
    sf: str,
    vec: int,
    tile: tuple[int, int, int] = (128, 128, 128),
    cluster: tuple[int, int, int] = (1, 1, 1),
    two: bool = False,
    c: str = "bf16",
    majors: str = "kkn",
) -> Prepared:
    """An expert's scales are padded to whole blocks of 128 x 4 of their own; NVFP4 has a factor per expert besides."""
    a, b, d, tensors, ends = _moe_operands(scenario, tokens, hidden, columns, ab, c, majors, gen)
    experts = len(tokens)
    if scenario == "2Dx3D":
        sfa = [scales(sf, 1, count, hidden, vec, gen) for count in tokens]
        sfb = [scales(sf, 1, columns, hidden, vec, gen) for _ in tokens]
        depth = [hidden] * experts
        across = -(-hidden // vec // 4) * 4 if hidden % vec == 0 else -(-(hidden // vec + 1) // 4) * 4
        shapes = (-1, across), (experts, -1)
    else:
        sfa = [scales(sf, 1, hidden, count, vec, gen) for count in tokens]
        sfb = [scales(sf, 1, columns, count, vec, gen) for count in tokens]
        depth = list(tokens)
        shapes = (-(-hidden // 128) * 128, -1), (-(-columns // 128) * 128, -1)
    scale_tensors = [_joined(x, shape) for x, shape in zip((sfa, sfb), shapes, strict=True)]
    factors = torch.rand(2, experts, generator=gen) + 0.5 if vec == 16 else torch.ones(2, experts)
    factor_tensors = {}
    if vec == 16:
        names = "global_scale_a", "global_scale_b"
        factor_tensors = {n: cute_tensor(f.clone(), FORMATS["fp32"], 4) for n, f in zip(names, factors, strict=True)}
    kernel = module.ScaledGroupedGemmKernel(
        scenario, vec, False, True, False, cutlass.Float32, tile, cluster, two, None
    )
    workspace = _workspace(kernel.get_workspace_size(experts))
    arguments = (tensors[0], tensors[1], *scale_tensors, tensors[2], ends, workspace)
    compiled = cute.compile(kernel, *arguments, FEW, STREAM, **factor_tensors)
    left = [x.expanded(k) * f for x, k, f in zip(sfa, depth, factors[0].double(), strict=True)]
    right = [x.expanded(k) * f for x, k, f in zip(sfb, depth, factors[1].double(), strict=True)]
    want, bound = _experts(a, b, tokens, scenario, left, right)
    steps = max(hidden, sum(tokens)) // 32 + 8
    return Prepared(
        lambda: compiled(*arguments, STREAM, **factor_tensors),
        [expected(d, want, bound, steps=steps)],
        (a, b, sfa, sfb),
    )


def _joined(parts: list[Scales], shape: tuple[int, int]) -> Any:
    data = torch.cat([x.data for x in parts])
    room = aligned(data.numel())
    room.copy_(data)
    return cute_tensor(room.view(shape), parts[0].format)


NVFP4: dict[str, Any] = {"ab": "e2m1", "sf": "e4m3", "vec": 16}
MXFP4: dict[str, Any] = {"ab": "e2m1", "sf": "e8m0", "vec": 32}
MXFP8: dict[str, Any] = {"ab": "e4m3", "sf": "e8m0", "vec": 32}
_THREE: Sizes = ((256, 128, 512), (96, 256, 256), (160, 160, 1280))


def _cases(example: str, prepare: Any, *configs: dict[str, Any]) -> list[Case]:
    return [Case(f"cute.blackwell.kernel.{example}", prepare, config) for config in configs]


CASES = [
    *_cases(
        "blockscaled_grouped_gemm.grouped_blockscaled_gemm",
        grouped_blockscaled,
        {"sizes": _THREE, "tile": (128, 128), "cluster": (1, 1), **NVFP4},
        {"sizes": _THREE, "tile": (256, 128), "cluster": (2, 1), **NVFP4, "c": "fp32", "host_shapes": False},
        {"sizes": _THREE, "tile": (128, 256), "cluster": (1, 2), **MXFP4, "c": "bf16"},
        {"sizes": _THREE, "tile": (256, 256), "cluster": (4, 1), **MXFP8},
    ),
    *_cases(
        "moe.torch_scaled_grouped_mm",
        moe_scaled,
        {"scenario": "2Dx3D", "tokens": (96, 0, 160, 32), "hidden": 512, "columns": 256, **NVFP4},
        {"scenario": "2Dx2D", "tokens": (96, 0, 160, 128), "hidden": 256, "columns": 128, **NVFP4},
        {
            "scenario": "2Dx3D",
            "tokens": (64, 320),
            "hidden": 256,
            "columns": 256,
            "tile": (256, 128, 64),
            "cluster": (2, 1, 1),
            "two": True,
            **NVFP4,
        },
        {"scenario": "2Dx3D", "tokens": (96, 128), "hidden": 512, "columns": 192, **MXFP8},
        {"scenario": "2Dx2D", "tokens": (32, 256), "hidden": 128, "columns": 256, **MXFP8, "majors": "mnm"},
        {"scenario": "2Dx3D", "tokens": (160, 96), "hidden": 256, "columns": 256, **MXFP4},
    ),
    *_cases(
        "moe.torch_grouped_mm",
        moe,
        {"scenario": "2Dx3D", "tokens": (90, 0, 166, 10), "hidden": 256, "columns": 256},
        {"scenario": "2Dx2D", "tokens": (64, 0, 200, 56), "hidden": 256, "columns": 128},
        {"scenario": "2Dx2D", "tokens": (72, 56), "hidden": 128, "columns": 128, "add": True, "c": "fp32"},
        {
            "scenario": "2Dx3D",
            "tokens": (64, 320),
            "hidden": 320,
            "columns": 256,
            "tile": (256, 256, 64),
            "cluster": (2, 1, 1),
            "two": True,
            "majors": "kkn",
        },
    ),
    *_cases(
        "grouped_gemm.grouped_gemm",
        grouped_dense,
        {"sizes": _THREE, "tile": (128, 128), "cluster": (1, 1), "two": False, "update": "SMEM"},
        {"sizes": _THREE, "tile": (256, 128), "cluster": (2, 2), "two": True, "update": "GMEM", "c": "fp32"},
    ),
    *(
        Case("cute.hopper.kernel.grouped_gemm.grouped_gemm", grouped_dense, config, "sm_90a")
        for config in (
            {"sizes": _THREE, "tile": (128, 128), "cluster": (1, 1), "update": "SMEM"},
            {"sizes": _THREE, "tile": (128, 64), "cluster": (2, 1), "update": "GMEM", "c": "fp32", "majors": "mnm"},
            {"sizes": _THREE, "tile": (64, 64), "cluster": (1, 2), "update": "SMEM", "ab": "e4m3"},
        )
    ),
]
