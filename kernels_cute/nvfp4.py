"""What the NVFP4 GEMMs for Hopper share: decoding to BF16 in registers, checks of their operands, launches."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cuda.bindings.driver as cuda
import torch
from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass.cute.runtime import make_fake_stream, make_ptr
from torch import Tensor

from fp4suite.built import Built
from fp4suite.formats import FP8RowTensor, NVFP4Tensor, SfLayout
from fp4suite.layouts import Order
from fp4suite.problem import Act, GemmProblem

from . import build as cross
from .instructions import e4m3x2_to_f16x2, f16_to_f32, float_bits, mul_bf16x2, prmt

SCALE_BIAS = 118  # decoded numbers are their value times 2 ** (SCALE_BIAS - 126)

# --- device -----------------------------------------------------------------------------------------------------------


def scale_pairs(word):
    """The two E4M3 scales in the low half of a word -> each times 2 ** SCALE_BIAS as a pair of equal BF16 numbers."""
    halves = e4m3x2_to_f16x2(word)
    pairs = []
    for half in (halves, halves >> Uint32(16)):
        # four significant bits: the upper half of the FP32 number is the BF16 number
        bits = float_bits(f16_to_f32(half) * Float32(2.0**SCALE_BIAS))
        pairs.append(prmt(bits, bits, 0x3232))
    return pairs


def decode_pairs(codes, scale):
    """Eight E2M1 codes times a scale pair -> words of BF16 with the elements (0, 4), (1, 5), (2, 6), (3, 7), exactly.

    A code's sign and magnitude, moved to the sign and to the lowest exponent and highest mantissa bits of BF16, are its
    value times 2 ** -126, subnormal for 0.5: one multiplication by scale * 2 ** SCALE_BIAS does the rest. Nibbles i and
    i + 4 lie 16 bits apart, so one step serves both; a multiplication copies them to both of their places at once.
    """
    words = []
    for half in (codes, codes >> Uint32(8)):
        for left in (6, 2):
            nibbles = half & Uint32(0x000F000F << (6 - left))
            words.append(mul_bf16x2(nibbles * Uint32((1 << left) + (1 << left + 6)) & Uint32(0x81C081C0), scale))
    return words


# --- host -------------------------------------------------------------------------------------------------------------

_GMEM = cute.AddressSpace.gmem
OUT_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
OUT_DTYPES = {name: dtype for dtype, name in OUT_NAMES.items()}
_ACTS: dict[type, Act] = {NVFP4Tensor: "nvfp4", FP8RowTensor: "fp8"}


def asked(
    a: Tensor | NVFP4Tensor | FP8RowTensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, out: Tensor
) -> tuple[GemmProblem, tuple[int, ...]]:
    """The problem of a launch, and the column after each segment. Raises for operands that do not belong together."""
    (m, k), n = a.shape, b.shape[0]
    if out.dtype not in OUT_NAMES:
        raise TypeError(f"out must be bfloat16 or float32, got {out.dtype}")
    if b.shape[1] != k or tuple(out.shape) != (m, n):
        raise ValueError(f"a [{m}, {k}], b {list(b.shape)} and out {list(out.shape)} do not make [m, k] @ [n, k].T")
    if out.stride(1) != 1:
        raise ValueError(f"columns of out must be adjacent, got strides {list(out.stride())}")
    ends, act = segment_ends_of(b.alpha, segments, n), _ACTS.get(type(a), "bf16")
    return GemmProblem(m=m, n=n, k=k, act=act, out=OUT_NAMES[out.dtype], segments=len(ends), order=b.order), ends


def segment_ends_of(alpha: Tensor, segments: tuple[int, ...] | None, n: int) -> tuple[int, ...]:
    """The column after each segment."""
    count = alpha.numel()
    if count == 1:
        return (n,)
    if segments is None or len(segments) != count or sum(segments) != n:
        raise ValueError(f"b.alpha holds {count} numbers: segments must be as many and sum to n={n}, got {segments}")
    return tuple(itertools.accumulate(segments))


def row_stride(a: Tensor) -> int:
    """Of BF16 activations, in elements. Raises for rows that cannot be read in pieces of 16 bytes."""
    stride = a.stride(0) if a.shape[0] > 1 else a.shape[1]  # that of a single row may be anything
    if a.dtype != torch.bfloat16:
        raise TypeError(f"a must be bfloat16 or an NVFP4Tensor, got {a.dtype}")
    if a.stride(1) != 1 or stride % 8 or a.data_ptr() % 16:
        raise ValueError(
            "rows of a must be adjacent elements that start at multiples of 16 bytes, "
            f"got strides {list(a.stride())} from {a.data_ptr() % 16} bytes past one on"
        )
    return stride


def check_packed(t: NVFP4Tensor, name: str, sf_layout: SfLayout, order: Order = "rows") -> None:
    if t.order != order:
        raise ValueError(f"{name} must be in the order {order}, got {t.order}")
    if t.sf_layout != sf_layout:
        raise ValueError(f"{name} must have {sf_layout} scales, got {t.sf_layout}")
    if not (t.data.is_contiguous() and t.sf.is_contiguous()):
        raise ValueError(f"{name}.data and {name}.sf must be contiguous")
    if t.data.data_ptr() % 16 or t.sf.data_ptr() % 4:
        raise ValueError(f"{name}.data must start at a multiple of 16 bytes and {name}.sf at one of 4")


def check_stored_rows(out: Tensor) -> None:
    """Raises for an out that TMA cannot write."""
    if out.stride(0) * out.element_size() % 16 or out.data_ptr() % 16:
        raise ValueError(
            f"rows of out must start at multiples of 16 bytes, got strides {list(out.stride())} from "
            f"{out.data_ptr() % 16} bytes past one on"
        )


class Host:
    """What a kernel's module does for each of its configs and variants: compile, keep, launch and warm up.

    kernel: makes the `cute.jit` function of a config and variant. Its arguments are pointers, whose types and
    alignments (bytes) `kinds` gives; m, n, k and the strides of a and out, for which `sizes` stand in when compiling;
    the column after each segment; as many further numbers as `more` says; and the stream.
    """

    def __init__(
        self,
        kernel: Callable[[Any, Any], Any],
        supports: Callable[[GemmProblem, Any], str | None],
        variant: Callable[[GemmProblem, Any], Any],
        kinds: Callable[[Any], tuple[tuple[Any, int], ...]],
        sizes: tuple[int, int, int, int, int],
        more: int = 0,
        *,
        arch: str,
        module: str,
    ) -> None:
        self._kernel, self._supports, self._variant, self._kinds = kernel, supports, variant, kinds
        self._sizes, self._more, self._arch, self._module = sizes, more, arch, module
        self.compiled = functools.cache(self._compiled)

    def variant(self, problem: GemmProblem, config: Any) -> Any:
        """What the kernel of a config is compiled for. Raises ValueError for what it does not support."""
        if reason := self._supports(problem, config):
            raise ValueError(reason)
        return self._variant(problem, config)

    def launch(
        self,
        config: Any,
        variant: Any,
        pointers: tuple[int, ...],
        sizes: tuple[int, int, int, int, int],
        ends: tuple[int, ...],
        device: torch.device,
        *more: int,
    ) -> None:
        """Launch on the current stream of `device`."""
        arguments, function = self._arguments(variant, pointers, sizes, ends, more), self.compiled(config, variant)
        if device.type == "cuda":
            with torch.cuda.device(device):
                function(*arguments, cuda.CUstream(torch.cuda.current_stream().cuda_stream))
        else:  # CPU tensors, where an emulator stands in for the CUDA runtime
            function(*arguments, cuda.CUstream(0))

    def precompile(self, problem: GemmProblem, config: Any) -> None:
        """Compile for `problem` into the cache, without a GPU. Raises ValueError for what `supports` refuses."""
        self.compiled(config, self.variant(problem, config))

    def warm(self, launch: Callable[..., None], problem: GemmProblem, config: Any, n: int, k: int) -> None:
        """Compile for `problem` and, where there is a GPU, launch once with n columns a segment and this k."""
        self.precompile(problem, config)
        if torch.cuda.is_available():
            a, b, out = small_operands(problem, n, k)
            launch(a, b, (n,) * problem.segments, out, config)

    def build(self, problem: GemmProblem, config: Any, arch: str | None = None) -> Built:
        """Compile for `problem` without a GPU. Raises ValueError for another arch or what `supports` refuses."""
        if arch not in (None, self._arch):
            raise ValueError(f"this kernel is for {self._arch}, got {arch!r}")
        variant = self.variant(problem, config)
        return cross.build(self._kernel(config, variant), *self._fake_arguments(variant), arch=self._arch)

    def _compiled(self, config: Any, variant: Any) -> Any:
        """The compiled host function, for every m, n and k."""
        function, made_for = self._kernel(config, variant), (config, variant)
        fake = self._fake_arguments(variant)
        return cross.compiled(function, *fake, arch=self._arch, module=self._module, made_for=made_for)

    def _arguments(
        self, variant: Any, pointers: tuple[int, ...], sizes: tuple[int, ...], ends: tuple[int, ...], more: Any
    ) -> tuple[Any, ...]:
        """All but the stream."""
        kinds = zip(pointers, self._kinds(variant), strict=True)
        made = (make_ptr(kind, p, _GMEM, assumed_align=align) for p, (kind, align) in kinds)
        m, n, k, a_stride, d_stride = sizes
        numbers = (Int32(m), Int32(n), Int32(k), Int64(a_stride), Int64(d_stride))
        return (*made, *numbers, tuple(Int32(e) for e in ends), *(Int32(x) for x in more))

    def _fake_arguments(self, variant: Any) -> tuple[Any, ...]:
        """Arguments to compile with: types and alignments are fixed by them, addresses and sizes are not."""
        pointers, ends = (16,) * len(self._kinds(variant)), (8,) * variant.segments
        return (*self._arguments(variant, pointers, self._sizes, ends, (1,) * self._more), make_fake_stream())


def small_operands(problem: GemmProblem, n: int, k: int) -> tuple[Any, NVFP4Tensor, Tensor]:
    """a, b and out of one row, n columns a segment and this k, on the GPU and of any content, to warm up with."""
    segments = problem.segments
    alpha = torch.ones(segments, device="cuda") if segments > 1 else torch.ones((), device="cuda")
    b = replace(NVFP4Tensor.empty((n * segments, k), alpha), order=problem.order)
    one = torch.ones((), device="cuda")
    a: Tensor | NVFP4Tensor | FP8RowTensor
    if problem.act == "nvfp4":
        a = NVFP4Tensor.empty((1, k), one)
    elif problem.act == "fp8":
        a = FP8RowTensor(alpha.new_empty((1, k), dtype=torch.float8_e4m3fn), alpha.new_empty(1))
        b = replace(b, row_exponent=alpha.new_zeros(n * segments, dtype=torch.int8))
    else:
        a = alpha.new_empty((1, k), dtype=torch.bfloat16)
    return a, b, alpha.new_empty((1, n * segments), dtype=OUT_DTYPES[problem.out])
