"""Tutorials: TMA on sm_100a, and those of the DSL that launch a kernel.

What needs TVM's foreign function interface is compiled without it: the kernels are the same.
"""

import contextlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import cutlass
import torch
from cuda.bindings import driver, runtime
from cutlass import cute
from cutlass.cute.runtime import from_dlpack, make_fake_compact_tensor, make_fake_stream, make_ptr

from .attention import Near
from .gemm import tutorial_fp16
from .harness import Case, Prepared
from .operands import FORMATS, empty, expected, matrix, product

STREAM = driver.CUstream(0)
FEW = 2  # clusters that run at once


def _exactly(out: torch.Tensor, want: torch.Tensor, name: str = "out") -> Near:
    return Near(name, out, want.double(), torch.zeros(want.shape, dtype=torch.float64))


def tma(module: ModuleType, gen: torch.Generator, m: int, n: int, kernel: str, kind: str = "fp16") -> Prepared:
    """A copy, or a transpose."""
    x = FORMATS[kind].random((m, n), gen)
    copies = kernel == "Sm100SimpleCopyKernel"
    y = torch.empty_like(x if copies else x.T.contiguous())
    tensors = [
        from_dlpack(t, assumed_align=16)
        .mark_layout_dynamic(leading_dim=1)
        .mark_compact_shape_dynamic(mode=1, divisibility=16)
        for t in (x, y)
    ]
    constants = (FEW,) if kernel.endswith("V2") else ()
    compiled = cute.compile(getattr(module, kernel)(), *tensors, *constants)
    return Prepared(lambda: compiled(*tensors), [_exactly(y, x if copies else x.T)], (x,))


# --- calls of one jit function from another ---


def _batched(m: int, n: int, k: int, batch: int, gen: torch.Generator, majors: str) -> list[Any]:
    a = matrix("fp16", batch, m, k, gen, "k" if majors[0] == "k" else "mn")
    b = matrix("fp16", batch, n, k, gen, "k" if majors[1] == "k" else "mn")
    d = empty("fp16", batch, m, n)
    return [a, b, d, expected(d, *product(a.values, b.values), steps=k // 8 + 4)]


def call_by_pointer(module: ModuleType, gen: torch.Generator, mnkl: tuple[int, int, int, int]) -> Prepared:
    *operands, output = _batched(*mnkl, gen, "mn")
    pointers = [x.pointer(32) for x in operands]
    compiled = cute.compile(module.tensor_op_gemm_wrapper, *pointers, *mnkl, STREAM)
    return Prepared(lambda: compiled(*pointers, *mnkl, STREAM), [output], operands)


def call_with_buffers(module: ModuleType, gen: torch.Generator, mnkl: tuple[int, int, int, int]) -> Prepared:
    """Shapes are constants; an argument is a class of the example's own."""
    *operands, output = _batched(*mnkl, gen, "kk")
    buffers = [module.BufferWithLayout(x.pointer(32), (2, 1, 0)) for x in operands]
    arguments = *buffers, mnkl, cutlass.Float32, (2, 2, 1), STREAM
    return Prepared(lambda: module.tensor_op_gemm_wrapper(*arguments), [output], operands)


def call_fake(module: ModuleType, gen: torch.Generator, mnkl: tuple[int, int, int, int], dynamic: bool) -> Prepared:
    """Compiled for tensors that do not exist."""
    (m, n, k, batch), operands = mnkl, _batched(*mnkl, gen, "kn")
    if dynamic:
        m, n, k, batch = cute.sym_int(), cute.sym_int(divisibility=16), cute.sym_int(divisibility=16), cute.sym_int()
    fakes = [
        make_fake_compact_tensor(cutlass.Float16, shape, stride_order=(2, 1, 0), assumed_align=16)
        for shape in ((batch, m, k), (batch, k, n), (batch, m, n))
    ]
    compiled = cute.compile(module.bmm, *fakes, make_fake_stream())
    a, b, d, output = operands
    views = a.stored.permute(2, 0, 1), b.stored.permute(2, 1, 0), d.stored.permute(2, 0, 1)
    tensors = [from_dlpack(v, assumed_align=16) for v in views]
    if dynamic:
        for axis, divisor in ((0, 1), (1, 1), (2, 16)):
            tensors = [t.mark_compact_shape_dynamic(axis, (0, 1, 2), divisor) for t in tensors]
    return Prepared(lambda: compiled(*tensors, STREAM), [output], (a, b))


# --- small kernels ---


def votes(module: ModuleType, gen: torch.Generator, inline: bool) -> Prepared:
    """Threads below 10 vote for, and all write down what came out."""
    ballot = torch.zeros(32, dtype=torch.int32)
    flags = [torch.zeros(32, dtype=torch.bool) for _ in range(3)]
    tensors = [from_dlpack(t).mark_layout_dynamic() for t in (ballot, *flags)]
    compiled = cute.compile(module.vote, *tensors, inline)
    wants = torch.full((32,), (1 << 10) - 1), *(torch.full((32,), x) for x in (1, 0, 0))
    names = "ballot", "any", "all", "uni"
    outputs = [_exactly(t, want, name) for t, want, name in zip((ballot, *flags), wants, names, strict=True)]
    return Prepared(lambda: compiled(*tensors), outputs, ())


@dataclass
class Printed:
    """What the kernels print, without empty lines."""

    want: Sequence[str]
    got: Sequence[str] = ()

    def reset(self) -> None:
        self.got = ()

    def mismatch(self) -> str | None:
        return None if list(self.got) == list(self.want) else f"printed {self.got}, want {self.want}"

    def capture(self, call: Callable[[], Any]) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            call()
        self.got = [line for line in text.getvalue().splitlines() if line]


def allocator(module: ModuleType, gen: torch.Generator) -> Prepared:
    shapes, values = ((8, 4), (8, 2), (16, 2)), (0.5, 1.0, 2.0)
    outputs = [torch.zeros(s) for s in shapes]
    tensors = [from_dlpack(t) for t in outputs]
    compiled = cute.compile(module.host, *(x for pair in zip(values, tensors, strict=True) for x in pair))

    def tensor(name: str, address: int, align: int, shape: tuple[int, int], value: float) -> list[str]:
        head = f"{name}: raw_ptr(0x{address:016x}: f32, smem, align<{align}>) o ({shape[0]},{shape[1]}):(1,{shape[0]})"
        # no more than 32 arguments are printed, and the DSL cuts after 31 elements
        numbers = [f"{value:f}"] * min(shape[0] * shape[1], 31) + ["[...]"] * (shape[0] * shape[1] > 31)
        return [f"{head} = ", f"  ( {', '.join(numbers)} )"]

    start = 1024  # of what the allocator gives away, behind the system's own kilobyte
    printed = Printed(
        [
            *(f"struct_in_smem.a[0] = {x:f}" for x in (0, 2)),
            f"struct_in_smem.b.ptr = raw_ptr(0x{start + 256:016x}: i64, smem, align<128>)",
            *(f"struct_in_smem.b: value = {x}" for x in (0, 16)),
            *tensor("cute.struct.MemRange", start + 128, 128, shapes[0], values[0]),
            *tensor("block of memory", start + 640, 128, shapes[1], values[1]),
            *tensor("tensor in smem", start + 832, 32, shapes[2], values[2]),
        ]
    )
    near = [_exactly(t, torch.full(s, v)) for t, s, v in zip(outputs, shapes, values, strict=True)]
    return Prepared(lambda: printed.capture(lambda: compiled(*tensors)), [*near, printed], ())


def _initialised(ptx: str) -> str:
    """The allocator's example prints two variables that nobody has written: zeros."""
    for bits in (32, 64):
        ptx = re.sub(rf"(ld\.shared\.b{bits} [^,]*, (\[[^\]]*\]);)", rf"st.shared.b{bits} \2, 0; \1", ptx, count=1)
    return ptx


def shared_sizes(module: ModuleType, gen: torch.Generator) -> Prepared:
    """The launch's shared memory, as the DSL adds it up and the kernel reads it."""

    @cute.jit
    def launch() -> None:
        module.kernel_no_smem().launch(grid=(1, 1, 1), block=(1, 1, 1))
        module.kernel_static().launch(grid=(1, 1, 1), block=(1, 1, 1))
        module.kernel_static().launch(grid=(1, 1, 1), block=(1, 1, 1), smem=16)

    compiled = cute.compile(launch)
    # 264 bytes of the structure, 512 at a multiple of 64, 512, 1024
    sizes = 264 + 56 + 512 + 512 + 1024, 16
    static = [line for size in sizes for line in ("Running kernel_static", f"Kernel launch smem size: {size}")]
    printed = Printed(["Running kernel_no_smem", *static])
    return Prepared(lambda: printed.capture(compiled), [printed], ())


def cooperative(module: ModuleType, gen: torch.Generator) -> Prepared:
    """Ten barriers of the whole grid, each of which turns the top bit of a word that else is zero at the end; a grid
    that the device has no room for is refused."""
    word = torch.zeros(1, dtype=torch.int32)
    pointer = make_ptr(cutlass.Uint32, word.data_ptr(), cute.AddressSpace.gmem, assumed_align=4)
    too_large = cute.compile(module.xfail_run_cooperative_kernel, pointer)
    fits = cute.compile(module.run_cooperative_kernel, pointer)
    lines = (f"All threads arrived at barrier for the {n}th iteration" for n in range(10))
    printed = Printed([*lines, "cudaErrorCooperativeLaunchTooLarge"])

    def run() -> None:
        word.zero_()
        printed.capture(lambda: fits(pointer))
        try:
            too_large(pointer)
        except module.DSLCudaRuntimeError as e:
            printed.got = [*printed.got, runtime.cudaError_t(e.error_code).name]

    return Prepared(run, [_exactly(word, torch.zeros(1)), printed], ())


def dependent(module: ModuleType, gen: torch.Generator, m: int, n: int, pdl: bool) -> Prepared:
    """w = u + v, then y = w + x by a kernel that may start before the first has ended."""
    u, v, x = (torch.randn(m, n, generator=gen) for _ in range(3))
    w, y = torch.empty(m, n), torch.empty(m, n)
    pairs = []
    for first, arguments in ((True, (u, v, w)), (False, (w, x, y))):
        tensors = [from_dlpack(t).mark_layout_dynamic() for t in arguments]
        pairs.append((cute.compile(module.elementwise_add, *tensors, STREAM, pdl, first), tensors))

    def run() -> None:
        for compiled, tensors in pairs:
            compiled(*tensors, STREAM)

    return Prepared(run, [_exactly(w, u + v, "w"), _exactly(y, u + v + x, "y")], (u, v, x))


def events(
    module: ModuleType, gen: torch.Generator, kind: str, at_start: int | None, shape: tuple[int, int] = (128, 6)
) -> Prepared:
    """kind: of the handle, which nobody records here. at_start: None for the event of the launch's completion."""
    out = torch.empty(shape, dtype=torch.int32)
    tensor, value, stream = from_dlpack(out), cutlass.Int32(7), runtime.cudaStream_t(0)
    event = {"runtime": runtime.cudaEvent_t, "driver": driver.CUevent}[kind](1)
    name = "launch_completion_event" if at_start is None else "programmatic_event"
    constants = () if at_start is None else (at_start,)
    compiled = cute.compile(getattr(module, f"launch_with_{name}"), tensor, value, stream, event, *constants)
    return Prepared(lambda: compiled(tensor, value, stream, event), [_exactly(out, torch.full(shape, 7))], ())


def memcpy(module: ModuleType, gen: torch.Generator, n: int) -> Prepared:
    x, y = torch.randn(n, generator=gen), torch.empty(n)
    fakes = [make_fake_compact_tensor(cutlass.Float32, (cute.sym_int64(),), stride_order=(0,)) for _ in range(2)]
    compiled = cute.compile(module.memcpy_jit, *fakes, num_threads=128)
    tensors = [from_dlpack(t).mark_layout_dynamic() for t in (x, y)]
    return Prepared(lambda: compiled(*tensors), [_exactly(y, x)], (x,))


def add_one(module: ModuleType, gen: torch.Generator, n: int) -> Prepared:
    x, y = torch.randn(n, generator=gen), torch.empty(n)
    tensors = [from_dlpack(t).mark_layout_dynamic() for t in (x, y)]
    compiled = cute.compile(module.add_one, *tensors)
    return Prepared(lambda: compiled(*tensors), [_exactly(y, x + 1)], (x,))


def exported(module: ModuleType, gen: torch.Generator) -> Prepared:
    """The kernels that are exported, without the export: the first of two 10 x 16 matrices is printed and changed."""
    before, a, b = torch.arange(160.0).view(16, 10), torch.empty(16, 10), torch.randn(16, 10, generator=gen)
    want = before.clone()
    want[0, 0] = b[0, 0] + 1
    tensors = [from_dlpack(t.T).mark_layout_dynamic() for t in (a, b)]
    show = cute.compile(module.print_tensor, tensors[0], stream=STREAM)
    add = cute.compile(module.add_one, *tensors, stream=STREAM)
    printed = Printed([f"a: raw_ptr(0x{a.data_ptr():016x}: f32, gmem, align<4>) o (10,16):(1,10)"])

    def run() -> None:
        a.copy_(before)
        printed.capture(lambda: show(tensors[0], stream=STREAM))
        add(*tensors, stream=STREAM)

    return Prepared(run, [_exactly(a, want), printed], (b,))


def _tutorials(example: str, prepare: Any, *configs: dict[str, Any], arch: str = "sm_100a") -> list[Case]:
    return [Case(f"dsl_tutorials.{example}", prepare, config, arch) for config in configs]


_TMA = "cute.blackwell.tutorial.tutorial_tma"

# the CTA ends without waiting for its TMA store to have read shared memory
_UNFINISHED = "may have ended, and its shared memory gone, before this access of it: TMA store"

CASES = [
    Case(f"{_TMA}.tma_v0", tma, {"m": 256, "n": 160, "kernel": "Sm100SimpleCopyKernel"}, refused=_UNFINISHED),
    Case(f"{_TMA}.tma_v1", tma, {"m": 128, "n": 256, "kernel": "Sm100MatrixTransposeKernelV1"}, refused=_UNFINISHED),
    Case(f"{_TMA}.tma_v2", tma, {"m": 256, "n": 400, "kernel": "Sm100MatrixTransposeKernelV2"}),
    *_tutorials("call_bypass_dlpack", call_by_pointer, {"mnkl": (136, 128, 64, 2)}, arch="sm_90a"),
    *_tutorials("call_from_jit", call_with_buffers, {"mnkl": (128, 136, 96, 2)}, arch="sm_90a"),
    *_tutorials(
        "tvm_ffi.ampere_gemm_with_fake_tensor",
        call_fake,
        {"mnkl": (136, 144, 64, 1), "dynamic": True},
        {"mnkl": (128, 128, 64, 2), "dynamic": False},
        arch="sm_90a",
    ),
    *_tutorials("inline_ptx", votes, {"inline": True}, {"inline": False}),
    Case("dsl_tutorials.smem_allocator", allocator, device={"rewrite": _initialised}),
    *_tutorials("dynamic_smem_size", shared_sizes, {}),
    *_tutorials("cooperative_launch", cooperative, {}),
    *_tutorials("programmatic_dependent_launch", dependent, {"m": 20, "n": 136, "pdl": True}),
    *_tutorials(
        "launch_completion_and_programmatic_events",
        events,
        {"kind": "runtime", "at_start": None},
        {"kind": "driver", "at_start": 0},
        {"kind": "driver", "at_start": 1},
    ),
    *_tutorials("export.export_to_c", exported, {}),
    *_tutorials("dataclass_immutable", memcpy, {"n": 300}),
    *_tutorials("tvm_ffi.jit_and_use_in_torch", add_one, {"n": 10}),
    *_tutorials("fp16_gemm_4_iket", tutorial_fp16, {"mnk": (512, 1024, 256), "constants": (FEW, FEW)}),
]
