"""Elementwise kernels of sm_80, compiled for sm_90a, and the reductions that a kernel of our own calls."""

import operator
from functools import partial
from types import ModuleType
from typing import Any

import cutlass
import torch
from cuda.bindings import driver
from cutlass import Float32, cute
from cutlass.cute.runtime import from_dlpack

from .attention import Near
from .harness import Case, Prepared
from .operands import FORMATS

STREAM = driver.CUstream(0)


def _inputs(count: int, shape: tuple[int, ...], kind: str, gen: torch.Generator) -> list[torch.Tensor]:
    return [FORMATS[kind].random(shape, gen) for _ in range(count)]


def _exactly(out: torch.Tensor, want: torch.Tensor, ulp: float = 0.0) -> Near:
    """ulp: of FP32, that a result may be off."""
    return Near("c", out, want.double(), want.double().abs() * ulp * 2.0**-23)


def add(module: ModuleType, gen: torch.Generator, m: int, n: int, kind: str = "fp32") -> Prepared:
    a, b = _inputs(2, (m, n), kind, gen)
    c = torch.empty_like(a)
    tensors = [from_dlpack(x).mark_layout_dynamic() for x in (a, b, c)]
    compiled = cute.compile(module.elementwise_add, *tensors)
    return Prepared(lambda: compiled(*tensors), [_exactly(c, a + b)], (a, b))


def add_tuned(module: ModuleType, gen: torch.Generator, m: int, n: int, copy_bits: int, kind: str = "fp32") -> Prepared:
    """Compiled as the tuner compiles one of its candidates; the tuner itself measures with CUDA events."""
    a, b = _inputs(2, (m, n), kind, gen)
    c = torch.empty_like(a)
    tensors = [from_dlpack(x) for x in (a, b, c)]
    compiled = cute.compile(module.ElementwiseAddWrapper(copy_bits), *tensors, m, n)
    return Prepared(lambda: compiled(*tensors, m, n), [_exactly(c, a + b)], (a, b))


def apply(module: ModuleType, gen: torch.Generator, m: int, n: int, op: str, kind: str = "fp32") -> Prepared:
    leaky = op == "leaky_relu"
    inputs = _inputs(1 if leaky else 2, (m, n), kind, gen)
    c = torch.empty_like(inputs[0])
    views, result = [from_dlpack(x, assumed_align=16) for x in inputs], from_dlpack(c, assumed_align=16)
    result = result.mark_layout_dynamic()
    device_op = partial(module.leaky_relu, alpha=0.01) if leaky else getattr(operator, op)
    want = module.leaky_relu_ref(*inputs, 0.01) if leaky else device_op(*inputs)
    compiled = cute.compile(module.elementwise_apply, device_op, views, result, STREAM)
    # division is that of div.full, within 2 ulp (PTX ISA, "Floating Point Instructions: div")
    return Prepared(lambda: compiled(views, result, STREAM), [_exactly(c, want, 2 if op == "truediv" else 0)], inputs)


# --- reductions over a warp, a CTA and a cluster ---


class _RowReduction:
    """Calls the example's `row_reduce` for every row of x [m, n]: y[m] = op over n.

    A row belongs to `threads` threads of each of `cluster` CTAs; a CTA has 128 threads.
    """

    def __init__(self, module: ModuleType, threads: int, cluster: int, op: Any):
        self.row_reduce, self.threads, self.cluster, self.op = module.row_reduce, threads, cluster, op
        self.init = 0.0 if op is cute.ReductionOp.ADD else -float("inf")

    @cute.jit
    def __call__(self, x: cute.Tensor, y: cute.Tensor):
        rows = 128 // self.threads
        self.kernel(x, y).launch(
            grid=[cute.ceil_div(x.shape[0], rows), self.cluster, 1],
            block=[128, 1, 1],
            cluster=[1, self.cluster, 1],
        )

    @cute.kernel
    def kernel(self, x: cute.Tensor, y: cute.Tensor):
        tid, _, _ = cute.arch.thread_idx()
        block, part, _ = cute.arch.block_idx()
        rows, warps = 128 // self.threads, max(self.threads // 32, 1)
        memory = cutlass.utils.SmemAllocator()
        shape = (rows, (warps, self.cluster)) if self.cluster > 1 else (rows, warps)
        buffer = memory.allocate_tensor(Float32, cute.make_ordered_layout(shape, order=(1, 0)), byte_alignment=16)
        barrier = memory.allocate_array(cutlass.Int64, 1)
        if cutlass.const_expr(self.cluster > 1):
            if tid == 0:
                cute.arch.mbarrier_init(barrier, 1)
            cute.arch.mbarrier_init_fence()
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        row, column = tid // self.threads, tid % self.threads
        each = x.shape[1] // (self.threads * self.cluster)
        mine = cute.local_tile(x, (1, each), (block * rows + row, part * self.threads + column))
        values = mine.load().to(Float32)
        total = self.row_reduce(values, self.op, self.threads, buffer, barrier, self.cluster, Float32(self.init))
        if column == 0 and part == 0:
            y[block * rows + row] = total
        if cutlass.const_expr(self.cluster > 1):
            # no CTA may leave before all have written to its shared memory
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()


def reduction(
    module: ModuleType, gen: torch.Generator, m: int, n: int, threads: int, cluster: int = 1, op: str = "ADD"
) -> Prepared:
    x, y = torch.randn(m, n, generator=gen), torch.empty(m)
    tensors = from_dlpack(x, assumed_align=16), from_dlpack(y)
    compiled = cute.compile(_RowReduction(module, threads, cluster, cute.ReductionOp[op]), *tensors)
    wide = x.double()
    want = wide.sum(1) if op == "ADD" else wide.amax(1)
    tolerance = wide.abs().sum(1) * 2.0**-20 if op == "ADD" else torch.zeros(m, dtype=torch.float64)
    return Prepared(lambda: compiled(*tensors), [Near("y", y, want, tolerance)], (x,))


def _ampere(example: str, prepare: Any, *configs: dict[str, Any]) -> list[Case]:
    return [Case(f"cute.ampere.{example}", prepare, config, "sm_90a") for config in configs]


CASES = [
    *_ampere(
        "kernel.elementwise.elementwise_add",
        add,
        {"m": 3, "n": 12},
        {"m": 37, "n": 260},
        {"m": 16, "n": 264, "kind": "fp16"},
        {"m": 20, "n": 128, "kind": "int32"},
    ),
    *_ampere(
        "tutorial.elementwise_add_autotune",
        add_tuned,
        {"m": 20, "n": 140, "copy_bits": 64},
        {"m": 33, "n": 256, "copy_bits": 128},
    ),
    *_ampere(
        "kernel.elementwise.elementwise_apply",
        apply,
        {"m": 64, "n": 512, "op": "add"},
        {"m": 128, "n": 256, "op": "mul"},
        {"m": 64, "n": 256, "op": "truediv"},
        {"m": 64, "n": 256, "op": "leaky_relu"},
    ),
    *(
        Case("cute.blackwell.kernel.reduce.reduce", reduction, config)
        for config in (
            {"m": 16, "n": 256, "threads": 16},
            {"m": 4, "n": 512, "threads": 64},
            {"m": 3, "n": 2048, "threads": 128, "cluster": 4},
            {"m": 4, "n": 1024, "threads": 32, "cluster": 2, "op": "MAX"},
        )
    ),
]
