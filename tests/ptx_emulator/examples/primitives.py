"""Examples of the primitives: single instructions, pipelines, reductions, TMA, tcgen05, and their tutorial."""

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.cute.runtime import from_dlpack
from torch import Tensor

from .attention import Near
from .gpu_host import as_it_stands, gpu_host
from .harness import SCHEDULES, Case, Prepared
from .operands import empty, expected, matrix, product
from .tutorials import Printed


def _cases(
    example: str, *configs: dict[str, Any], refused: str = "", shown: Sequence[str] = (), **device: Any
) -> list[Case]:
    name = f"experimental.primitives.{example}"
    return [
        Case(name, as_it_stands, config, device=device, refused=refused, shown=shown) for config in configs or ({},)
    ]


def _own_lanes(ptx: str) -> str:
    """Every warp stores to the address of lane 0, and leaves it to the hardware to take the quarter of the lanes that
    is the warp's; the PTX ISA wants the address of that quarter."""
    quarter = "mov.u32 %quarter, %tid.x; shr.u32 %quarter, %quarter, 5; shl.b32 %quarter, %quarter, 21;"
    store = r"(tcgen05\.st\.\S+)\s+\[(%r\d+)\]"
    return re.sub(store, rf".reg .b32 %quarter; {quarter} add.u32 %quarter, %quarter, \2; \1 [%quarter]", ptx)


_INSTRUCTIONS = [
    *_cases("async_pipeline", {"num_tiles": 5}),
    *_cases("bar_warp_sync"),
    *_cases("barrier_cta_red", {"THREADS": 32}, {"THREADS": 128}),
    *_cases("barrier_cta_sync", {"WARPS": 8}),
    *_cases("basic_types"),
    *_cases("cp_async_bulk", {"n": 110592}),
    *_cases("cp_async_bulk_prefetch"),
    *_cases("cp_async_mbarrier_arrive_cluster"),
    *_cases("cp_async_mbarrier_arrive_cta"),
    *_cases("cp_async_shared_global"),
    *_cases("cp_async_shared_global_swizzled"),
    *_cases("elect_sync"),
    *_cases("ldmatrix_stmatrix", {}, {"NUM_TILES": 1}, {"NUM_TILES": 4}),
    # a CTA reads what the next one of the ring holds, which may have ended (and of more than two, may not have begun)
    *_cases("mapa", refused="CTA .* may have ended, and its shared memory gone"),
    *_cases("mbarrier", {"N_LANES": 32}),
    *_cases("mbarrier_lifecycle"),
    *_cases("pipeline_software_fill", {"num_tiles": 5}),
    *_cases("red", {"n": 300}, {"n": 1000, "THREADS": 256, "DTYPE": "fp32"}),
    *_cases("redux_sync"),
    *_cases("shfl_sync"),
    *_cases("vote_sync"),
    *_cases("warp_named_barrier"),
]

_REDUCTIONS = [
    *_cases("reduction.thread_vector_reduce", {}, {"WIDTH": 16, "REDUCE_OP": "max", "DTYPE": "f16"}),
    *_cases("reduction.warp_vector_reduce", {}, {"ITEMS_PER_LANE": 8, "REDUCE_OP": "min", "DTYPE": "f16"}),
    *_cases("reduction.block_smem_reduce", {}, {"ITEMS_PER_LANE": 8, "REDUCE_OP": "max", "DTYPE": "i32"}),
    *_cases("reduction.cluster_smem_reduce", {}, {"CLUSTER_SHAPE": (2, 4), "TILE_COLS": 8, "REDUCE_OP": "min"}),
    # tcgen05.wait::st does not wait for the tcgen05.cp before it
    *_cases(
        "reduction.cluster_tmem_reduce",
        {},
        {"CLUSTER_SHAPE": (2, 2), "REDUCE_OP": "max"},
        refused="data race|was never written",
        shown=("round", "late", "seed"),
    ),
]

_TMA = [
    *_cases("tma.tma_1cta_mbarrier"),
    # each of four warps stores the whole tile
    *_cases("tma.tma_load_store", refused="data race: .* was written by TMA store"),
    *_cases("tma.tma_store", refused="data race: .* was written by TMA store"),
    *_cases("tma.tma_load_to_ldmatrix"),
    # one warp waits for the tile, and hands it on with a relaxed arrival at the cluster's barrier
    *_cases("tma.tma_multicast", refused="data race: .* is read, with no order after it was written by bulk load"),
    *_cases("tma.tma_pipeline_count2", {"m": 128, "k_tiles": 5}),
    *_cases("tma.tma_pipeline_pingpong", {"m": 128, "k_tiles": 5}),
    # a stage is loaded again while other warps may read it
    *_cases(
        "tma.tma_pipeline_single_warp",
        {"m": 128, "k_tiles": 5},
        refused="data race: shared address",
        shown=("seed",),
    ),
    *_cases("tma.tma_pipeline_warpspec", {"m": 128, "k_tiles": 5}),
    *_cases("tma.tma_swizzle_modes"),
    *_cases("tma.tma_tensormap_replace"),
]

_TCGEN05 = [
    *_cases("tcgen05.1cta_mma_a_from_tmem", {}, {"ashift": True}, rewrite=_own_lanes),
    *_cases("tcgen05.1cta_mma_basic", {}, {"AB_DTYPE": "bf16", "D_DTYPE": "fp32"}, {"COLLECTOR": 1}),
    *_cases("tcgen05.1cta_mma_mn_major"),
    *_cases("tcgen05.1cta_mma_pipeline", {"num_k_tiles": 6}),
    *_cases("tcgen05.2cta_mma_basic"),
    # what cp.async writes, which is of the generic proxy, is read by tcgen05.cp
    *_cases("tcgen05.2cta_mma_blockscale_m128", refused="no proxy fence: .* its writing by cp.async"),
    *_cases("tcgen05.2cta_mma_tma_store"),
    *_cases("tcgen05.clusterMxN_2cta_mma", {}, {"USE_2CTA_GROUP": False}),
    *_cases("tcgen05.cp_narrow_a_to_tmem_mma", {"a_dtype": "fp4"}, {"a_dtype": "fp6"}),
    # the last arrivals at other CTAs' mbarriers are waited for by nobody
    *_cases("tcgen05.mcast_clusterMxN_1cta_mma", refused="may have ended.* tcgen05.commit"),
    *_cases("tcgen05.mcast_clusterMxN_2cta_mma", refused="may have ended.* tcgen05.commit"),
    # what cp.async writes, which is of the generic proxy, is read by tcgen05.mma
    *_cases(
        "tcgen05.slicek_m32n8k128",
        {"variant": "async_s32_smem"},
        {"variant": "n_group_smem_a_reuse_wdm"},
        refused="no proxy fence: .* its writing by cp.async",
    ),
    # not n_group_a_tmem_shift_wdm, which loads the lanes that its masks have left unwritten
    *_cases(
        "tcgen05.slicek_m32n8k128",
        {"variant": "a_tmem_core_matrix"},
        {"variant": "tma_s128_mma_s32"},
        {"variant": "tma_s32_mma_s32"},
    ),
    *_cases("tcgen05.tmem_ld_st"),
    *_cases("tcgen05.tmem_ld_to_stmatrix_transpose"),
]


# --- the tutorial ---


def _said(call: Callable[[], Any], lines: Sequence[str]) -> Prepared:
    printed = Printed(lines)

    def run() -> None:
        with gpu_host():
            printed.capture(call)

    return Prepared(run, [printed], ())  # type: ignore[list-item]


def _dump(rows: Tensor) -> list[str]:
    """As arrays are printed: 16 rows and columns. Rows of 128 bytes whose 16-byte units are swizzled."""
    unit = torch.arange(8)
    lines = [row.view(8, 8)[unit ^ (n & 7)].reshape(-1)[:16].tolist() for n, row in enumerate(rows[:16])]
    return ["Array[64x64]:", *(f" [{n}]: [{', '.join(map(str, line))}, ...]" for n, line in enumerate(lines)), " ..."]


def hello_world(module: ModuleType, gen: torch.Generator) -> Prepared:
    """Two of four threads print."""
    return _said(lambda: module.hello_world_host(10, 20), [f"PASS tidx={n} meta_arg=10 dynamic_arg=20" for n in (1, 3)])


def loaded_tile(module: ModuleType, gen: torch.Generator, dynamic: bool) -> Prepared:
    x = torch.randint(2048, (128, 128), generator=gen).to(torch.float16)
    tensor = from_dlpack(x)
    return _said(
        lambda: module.gemm(tensor.mark_layout_dynamic(leading_dim=1) if dynamic else tensor), _dump(x[:64, :64])
    )


def loaded_slice(module: ModuleType, gen: torch.Generator) -> Prepared:
    """Block 1 asks for coordinate 1 in the last dimension of the tensor map, which has the size 1 and not, as the
    example has it, 2: it gets zeros."""
    x = torch.randint(2048, (1, 64, 2, 64), generator=gen).to(torch.float16)
    copies = [f"Block {n}: copying 8192 bytes" for n in (0, 1)]
    first, *rest = _dump(torch.zeros(64, 64))
    return _said(lambda: module.host(from_dlpack(x)), [*copies, f"Printing smem_matrix_a from block 1{first}", *rest])


def vectors(module: ModuleType, gen: torch.Generator) -> Prepared:
    """Sums, copies and a copy with a mask."""
    a, b = (torch.randn(16, generator=gen).to(torch.float16) for _ in range(2))
    x = torch.randn(32, generator=gen)
    total, masked, copied, some = (torch.empty_like(t) for t in (a, a, x, x))
    tensors = {name: from_dlpack(t) for name, t in locals().items() if isinstance(t, Tensor)}

    def run() -> None:
        t = tensors
        for out, _ in wants.values():
            out.fill_(-1)
        module.vector_add_host(t["a"], t["b"], t["total"], 8)
        module.aligned_copy_host(t["x"], t["copied"], 4)
        module.advanced_load_store_host(t["x"], t["some"])
        module.masked_copy_host(t["a"], t["masked"], 13, 8)

    wants = {
        "total": (total, a + b),
        "copied": (copied, x),
        "some": (some, torch.where((torch.arange(32) < 8) & (torch.arange(32) != 3), x, -1)),
        "masked": (masked, torch.where(torch.arange(16) < 13, a, -1)),
    }
    outputs = [Near(name, out, want.double(), torch.zeros(want.shape)) for name, (out, want) in wants.items()]
    return Prepared(run, outputs, (tensors,))


def simt_gemm(module: ModuleType, gen: torch.Generator, mnk: tuple[int, int, int], **constants: int) -> Prepared:
    m, n, k = mnk
    a, b = (torch.randn(shape, generator=gen) for shape in ((m, k), (k, n)))
    c = torch.full((m, n), torch.nan)
    left, right = a.double(), b.double()
    tensors = [from_dlpack(x) for x in (a, b, c)]
    bound = left.abs() @ right.abs()
    return Prepared(
        lambda: module.gemm(*tensors, **constants), [Near("c", c, left @ right, bound * k * 2.0**-24)], (a, b)
    )


def tensor_gemm(module: ModuleType, gen: torch.Generator, k: int = 64, io: str = "fp16", stages: int = 0) -> Prepared:
    """One tile of 128 x 128. stages: where the example has some."""
    m, n, stream = 128, 128, driver.CUstream(0)
    a, b, d = matrix(io, 1, m, k, gen), matrix(io, 1, n, k, gen), empty("fp16", 1, m, n)
    want, bound = product(a.values, b.values)
    views = [x.stored[:, :, 0] for x in (a, b, d)]
    # the accumulator of the example for FP8 is FP16
    steps = (k // 16 + 4) * (2.0**13 if io == "e4m3" else 1)
    outputs = [expected(d, want, bound, steps=steps)]
    if io == "e4m3":
        with gpu_host():
            eight = module.get_compiled_gemm(m, k, n)
        return Prepared(lambda: eight(*views, stream), outputs, (a, b))
    tensors = [from_dlpack(view) for view in (views[0], views[1].T, views[2])]
    if not stages:
        return Prepared(lambda: module.gemm(*tensors, (m, k, n)), outputs, (a, b))
    function = cute.compile(module.gemm, *tensors, (m, n, k), stages, 128, 64, 128, stream)
    return Prepared(lambda: function(*tensors, stream), outputs, (a, b))


def _one_warp_makes_barriers(ptx: str) -> str:
    """The example elects a thread of each of its eight warps to initialise the same mbarriers."""
    first = r"(elect\.sync\s+%r\d+\|(%p\d+), -1;)"
    mine = r"\1 .reg .b32 %thread; .reg .pred %first; mov.u32 %thread, %tid.x; setp.lt.u32 %first, %thread, 32;"
    return re.sub(first, rf"{mine} and.pred \2, \2, %first;", ptx, count=1)


def _barriers(ptx: str) -> str:
    """And every warp reads the address of tensor memory, with no barrier behind its allocation."""
    ptx = _one_warp_makes_barriers(ptx)
    return re.sub(r"(tcgen05\.relinquish.*?)(ld\.shared\.b32)", r"\1barrier.sync 0; \2", ptx, count=1, flags=re.DOTALL)


def _tutorial(example: str, prepare: Any, *configs: dict[str, Any], rewrite: Any = None) -> list[Case]:
    name = f"experimental.primitives.tutorial.{example}"
    device = {"rewrite": rewrite} if rewrite else {}
    return [Case(name, prepare, config, device=device, script=True) for config in configs or ({},)]


_TUTORIAL = [
    *_tutorial("01_hello_world", hello_world),
    *_tutorial("02_naive_gemm", simt_gemm, {"mnk": (32, 64, 24)}),
    *_tutorial("03_gemm_tiled_smem", simt_gemm, {"mnk": (64, 32, 96), "TS": 32}),
    *_tutorial("04_tma_load", loaded_tile, {"dynamic": True}, {"dynamic": False}),
    *_tutorial("05_minimal_tensor_mma", tensor_gemm, rewrite=_one_warp_makes_barriers),
    # shared memory is written for the sums while other warps may still read the maximum
    *_cases(
        "tutorial.06_softmax",
        {"call": "run_softmax_tests"},
        refused="data race: shared address",
        shown=tuple(SCHEDULES),
    ),
    *_tutorial("07_vectorized_array", vectors),
    *_cases("tutorial.08_mlir_value_tree_debug", {"call": "run_examples"}),
    *_tutorial("09_tma_4d_to_2d", loaded_slice),
    *_tutorial("10_minimal_tensor_mma_fp8", tensor_gemm, {"io": "e4m3"}, rewrite=_one_warp_makes_barriers),
    *_tutorial(
        "gemm_M128_N128_Kany_TN_warpspec_multistage",
        tensor_gemm,
        {"k": 640, "stages": 3},
        rewrite=_barriers,
    ),
]

CASES = (*_INSTRUCTIONS, *_REDUCTIONS, *_TMA, *_TCGEN05, *_TUTORIAL)
