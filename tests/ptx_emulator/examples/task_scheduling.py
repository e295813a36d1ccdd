"""Examples of the task scheduling framework: copies, persistent loops, GEMMs, merged and forked pipelines."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from cutlass import cute
from cutlass.base_dsl.dsl import BaseDSL
from cutlass.cute.runtime import from_dlpack

from .attention import Near
from .gpu_host import as_it_stands, gpu_host
from .harness import Case, Prepared
from .operands import FORMATS, empty, expected, matrix, product, scales


def staged(module: ModuleType, gen: torch.Generator, **arguments: Any) -> Prepared:
    """The example needs the newer of the DSL's two frontends to be compiled."""
    prepared = as_it_stands(module, gen, **arguments)

    def run() -> None:
        with BaseDSL.enable_pyir():
            prepared.run()

    return Prepared(run, (), ())


def grid_stride(module: ModuleType, gen: torch.Generator, n: int, blocks: int, warps: int) -> Prepared:
    x = torch.randint(-(1 << 15), 1 << 15, (n,), generator=gen).to(torch.int16)
    outputs = [torch.zeros_like(x) for _ in range(2)]
    tensors = [(from_dlpack(x), from_dlpack(y)) for y in outputs]
    hosts = module.gmem_copy_naive_kernel_host, module.gmem_copy_kernel_host
    compiled = [cute.compile(f, n, *t, blocks, warps) for f, t in zip(hosts, tensors, strict=True)]

    def run() -> None:
        for function, pair in zip(compiled, tensors, strict=True):
            function(n, *pair, blocks)

    same = torch.zeros(n, dtype=torch.float64)
    return Prepared(
        run, [Near(name, y, x.double(), same) for name, y in zip(("naive", "tasks"), outputs, strict=True)], (x,)
    )


def chained_gemms(module: ModuleType, gen: torch.Generator, mnk: tuple[int, int, int], bias: bool) -> Prepared:
    """Written for a CUDA graph, which here is one GEMM."""
    kind, seed = module.io_dtype, int(torch.randint(1 << 30, (), generator=gen))
    with gpu_host(), BaseDSL.enable_pyir(), redirect_stdout(io.StringIO()):
        torch.manual_seed(seed)
        (call,), ((a, d), b, c) = module.prepare_cuda_graph_chain_run(
            module.host_function, *mnk, 1, kind, kind, kind, bias
        )
    want, bound = (left.double() @ right.double().T for left, right in ((a, b), (a.abs(), b.abs())))
    if c is not None:
        want, bound = want + c.double(), bound + c.double().abs()
    tolerance = want.abs() * 2.0 ** -FORMATS["fp16"].digits + bound * (mnk[2] // 16 + 4) * 2.0**-24

    def run() -> None:
        with gpu_host():
            call()

    return Prepared(run, [Near("d", d, want, tolerance)], (a, b, c))


def nvfp4_gemm(module: ModuleType, gen: torch.Generator, mnkl: tuple[int, int, int, int]) -> Prepared:
    m, n, k, batch = mnkl
    a, b, d = matrix("e2m1", batch, m, k, gen), matrix("e2m1", batch, n, k, gen), empty("fp16", batch, m, n)
    sfa, sfb = scales("e4m3", batch, m, k, 16, gen), scales("e4m3", batch, n, k, 16, gen)
    pointers, stream = (*(x.pointer() for x in (a, b, sfa, sfb)), d.pointer(32)), driver.CUstream(0)
    with BaseDSL.enable_pyir(), redirect_stdout(io.StringIO()):
        module.refresh_derived_config()
        compiled = cute.compile(module.gemm, *pointers, mnkl, stream)
    want, bound = product(a.values * sfa.expanded(k), b.values * sfb.expanded(k))
    outputs = [expected(d, want, bound, steps=k // 32 + 4)]
    return Prepared(lambda: compiled(*pointers, mnkl, stream), outputs, (a, b, sfa, sfb))


def _barrier_behind_mbarriers(ptx: str) -> str:
    """The warp that loads waits at mbarriers with no order after another has made them."""
    return ptx.replace("fence.mbarrier_init.release.cluster;", "fence.mbarrier_init.release.cluster; barrier.sync 0;")


def _cases(
    example: str, prepare: Any, *configs: dict[str, Any], refused: str = "", shown: Sequence[str] = (), **device: Any
) -> list[Case]:
    name = f"experimental.task_scheduling.blackwell.tutorial.{example}"
    return [Case(name, prepare, config, device=device, refused=refused, shown=shown) for config in configs]


_GEMM: dict[str, Any] = {"call": "run_dense_gemm_ws", "tolerance": 0.1}
_SMALL = (256, 256, 256)

CASES = [
    *_cases("01_copy_basics_ts.01_copy_grid_stride", grid_stride, {"n": 8192, "blocks": 4, "warps": 2}),
    *_cases(
        "01_copy_basics_ts.02_copy_tma",
        as_it_stands,
        {"call": "run_tma_copy_kernel_prim", "rows_cols": (256, 256), "run_raw_kernel": False},
        {"call": "run_tma_copy_kernel_prim", "rows_cols": (256, 256), "run_raw_kernel": True},
    ),
    *_cases(
        "02_gemm_simple_ts.01_fp16_bf16_gemm_3",
        as_it_stands,
        {**_GEMM, "mnk": _SMALL},
        rewrite=_barrier_behind_mbarriers,
    ),
    *_cases(
        "03_persistent_scheduling_dynamic_domain_ts.01_copy_persistent_skip_tile",
        as_it_stands,
        {"call": "run_copy_persistent_skip", "rows_cols": (256, 256)},
    ),
    *_cases(
        "03_persistent_scheduling_dynamic_domain_ts.02_copy_varlen_dynamic_domain",
        as_it_stands,
        {"call": "run_varlen_copy", "N": 8},
    ),
    *_cases(
        "04_gemm_bf16_advanced_ts.01_fp16_bf16_gemm_3_cluster",
        chained_gemms,
        {"mnk": (512, 512, 256), "bias": False},
        {"mnk": (256, 256, 512), "bias": True},
    ),
    *_cases("04_gemm_bf16_advanced_ts.02_fp16_bf16_gemm_3_cute_cluster", staged, {**_GEMM, "mnk": (512, 512, 256)}),
    *_cases(
        "05_gemm_nvfp4_ts.01_gemm_nvfp4",
        nvfp4_gemm,
        {"mnkl": (256, 256, 512, 1)},
        {"mnkl": (512, 256, 1024, 2)},
    ),
    # each of four warps sends the whole of what is staged
    *_cases(
        "06_gemm_split_k_fp16_ts.01_gemm_split_k_fp16",
        as_it_stands,
        {"call": "run_splitk_gemm", "mnk": (256, 256, 512), "tolerance": 0.1},
        refused="data race: .* is written, with no order after it was written by bulk load",
    ),
    *_cases("07_group_pipeline_ts.01_merge_copy", staged, {"call": "run"}, {"call": "run", "tma_for_b": False}),
    *_cases("07_group_pipeline_ts.02_merge_gemm", staged, {"call": "run", "mnk": _SMALL}),
    *_cases(
        "07_group_pipeline_ts.03_merge_gemm_resadd",
        staged,
        {"call": "run", "mnk": _SMALL},
        {"call": "run", "mnk": _SMALL, "residual_load_mode": "tma"},
    ),
    *_cases(
        "07_group_pipeline_ts.04_fork_load_gemm_act",
        staged,
        {"call": "run", "mnk": _SMALL},
        {"call": "run", "mnk": _SMALL, "load_mode": "gmem"},
    ),
]
