"""What launching and building the Triton kernels share on the host: tiles, strides, cross compilation."""

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fp4suite import arch as archs
from fp4suite.built import Built

from .overlap import COMPILED, OVERLAP

CAPABILITY = {"sm_90a": 90, "sm_100a": 100}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SF_ROWS, SF_COLUMNS = 128, 64  # m and k are padded to these where scales are blocked_128x4
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}  # a multiply-add of the compiler's own would change bytes
# of a kernel that is launched beside the one before, and waits for it: `overlap`
FOLLOWING = OPTIONS | ({"launch_pdl": True} if COMPILED.value else {})
if OVERLAP.value:
    OPTIONS = FOLLOWING
LEAST, MOST = 8, 64  # elements of a tile one thread may hold


def refuse_tile(block_m: int, block_k: int, num_warps: int, rule: str = "absmax", *, least: int = LEAST) -> str | None:
    """Why a [block_m, block_k] tile cannot be, or None; least: elements that a thread has to hold."""
    held = block_m * block_k / (32 * num_warps)
    if held < least:
        return (
            f"block_m={block_m} block_k={block_k} num_warps={num_warps}: {held:g} elements a thread, less than {least}"
        )
    return _refuse_held(held, num_warps, rule)


def refuse_rows(block_m: int, k: int, num_warps: int, rule: str) -> str | None:
    """Why block_m whole rows of k elements cannot be a tile, or None."""
    return _refuse_held(block_m * triton.next_power_of_2(k) / (32 * num_warps), num_warps, rule)


def _refuse_held(held: float, num_warps: int, rule: str) -> str | None:
    registers = min(255, 65536 // (32 * num_warps))
    most = min(MOST, registers // (7 if rule == "mse" else 3))  # registers an element: Triton 3.6 takes most
    if held <= most:
        return None
    return f"{held:g} elements a thread spill: {num_warps} warps hold {most} by rule {rule}"


def grid(m: int, k: int, block_m: int, block_k: int, sf_layout: str) -> tuple[int, int]:
    """Programs over [m, k], and over its padding where the scales are blocked."""
    if sf_layout == "blocked_128x4":
        m, k = triton.cdiv(m, SF_ROWS) * SF_ROWS, triton.cdiv(k, SF_COLUMNS) * SF_COLUMNS
    return triton.cdiv(m, block_m), triton.cdiv(k, block_k)


def row_stride(x: Tensor) -> int:
    """Elements from row to row of [m, k]. Raises ValueError unless each row is contiguous."""
    m, k = x.shape
    if k > 1 and x.stride(1) != 1:
        raise ValueError(f"the elements of a row must be contiguous, got strides {x.stride()}")
    return x.stride(0) if m > 1 else k


def has_e2m1_cvt(device: torch.device) -> bool:
    """Whether the device converts FP32 to E2M1 in hardware. Not asked of the interpreter's CPU."""
    return archs.of(device) == "sm_100a"


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: str,
    num_warps: int,
    *,
    unaligned: tuple[str, ...] = (),
    **options: Any,
) -> Built:
    """Compile for `arch` without a GPU, as a launch with aligned operands would.

    types: argument -> "*bf16", "i32", "fp32" ...; pointers and integers count as multiples of 16 but for those in
    `unaligned`. constants: the constexpr arguments; options: what a launch gives beside num_warps. Raises RuntimeError
    in a process where Triton interprets.
    """
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError("Triton interprets in this process (TRITON_INTERPRET): build in one where it does not")
    names = kernel.arg_names
    signature = {n: types.get(n, "constexpr") for n in names}
    even = [n for n, t in types.items() if t.startswith(("*", "i")) and n not in unaligned]
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in even}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=attrs)
    target = GPUTarget("cuda", CAPABILITY[arch], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, **OPTIONS, **options})
    return Built(arch, compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared)
