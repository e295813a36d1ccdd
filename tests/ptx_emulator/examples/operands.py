"""Random operands of GEMMs as the examples take them, their exact values, and the reference.

    d[batch, m, n] = sum over k of a[batch, m, k] sfa[batch, m, k // vec] b[batch, n, k] sfb[batch, n, k // vec]

Codes are drawn from all of a format's finite ones up to a magnitude, so that subnormals and both zeros occur; scales
differ from block to block. The reference is FP64, next to the sum of absolute products, which bounds the error.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fp4suite.layouts import to_blocked_128x4


@dataclass(frozen=True)
class Format:
    """dtype: what torch decodes; None for formats of less than a byte, without infinities and NaN. digits: of the
    significand, with the leading one. step: distance of the smallest values. most: largest value drawn. exponent: bits
    of it, where there is no dtype; none: an integer with a sign."""

    name: str
    cutlass: str
    dtype: torch.dtype | None
    digits: int
    step: float
    most: float = 2.0
    exponent: int = 0

    @property
    def bits(self) -> int:
        return self.exponent + self.digits if self.dtype is None else 8 * self.dtype.itemsize

    @property
    def type(self) -> type:
        import cutlass

        found: type = getattr(cutlass, self.cutlass)
        return found

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (one a byte) or numbers of `dtype` -> FP64."""
        if self.dtype is None and not self.exponent:
            return (codes.double() + (1 << self.bits - 1)) % (1 << self.bits) - (1 << self.bits - 1)
        if self.dtype is None:
            mantissa, bias = self.digits - 1, (1 << self.exponent - 1) - 1
            power, fraction = codes >> mantissa & (1 << self.exponent) - 1, codes & (1 << mantissa) - 1
            significand = fraction.double() / (1 << mantissa) + (power > 0)
            magnitude = torch.ldexp(significand, power.int().clamp(min=1) - bias)
            return torch.where(codes >> self.bits - 1 > 0, -magnitude, magnitude)
        if self.dtype in (torch.float8_e8m0fnu,):
            return torch.exp2(codes.view(torch.uint8).double() - 127)
        return codes.to(torch.float64)

    def random(self, shape: tuple[int, ...], gen: torch.Generator, positive: bool = False) -> Tensor:
        """Codes of less than a byte, one a byte, or numbers."""
        if self.dtype in (torch.float32, torch.float16, torch.bfloat16):
            drawn = torch.randn(shape, generator=gen).to(self.dtype)
            # the tensor core reads no more of TF32 than its digits
            return (drawn.view(torch.int32) & -(1 << 13)).view(torch.float32) if self.name == "tf32" else drawn
        if self.dtype is not None and not self.dtype.is_floating_point:
            every = torch.iinfo(self.dtype)
            return torch.randint(every.min, every.max + 1, shape, generator=gen).to(self.dtype)
        if self.dtype is None:
            return torch.randint(0, 1 << self.bits, shape, generator=gen, dtype=torch.uint8)
        every = torch.arange(256, dtype=torch.uint8).view(self.dtype)
        value = self.decode(every)
        fits = value.isfinite() & (value.abs() <= self.most) & (value.abs() >= (2.0**-6 if positive else 0))
        if positive:
            fits &= value > 0
        choice = every.view(torch.uint8)[fits]
        return choice[torch.randint(0, len(choice), shape, generator=gen)].view(self.dtype)


FORMATS = {
    f.name: f
    for f in (
        Format("e2m1", "Float4E2M1FN", None, 2, 0.5, exponent=2),
        Format("e2m3", "Float6E2M3FN", None, 4, 0.125, exponent=2),
        Format("e3m2", "Float6E3M2FN", None, 3, 0.0625, exponent=3),
        Format("e4m3", "Float8E4M3FN", torch.float8_e4m3fn, 4, 2.0**-9),
        Format("e5m2", "Float8E5M2", torch.float8_e5m2, 3, 2.0**-16),
        Format("e8m0", "Float8E8M0FNU", torch.float8_e8m0fnu, 1, 2.0**-127),
        Format("fp16", "Float16", torch.float16, 11, 2.0**-24),
        Format("bf16", "BFloat16", torch.bfloat16, 8, 2.0**-133),
        Format("fp32", "Float32", torch.float32, 24, 2.0**-149),
        Format("tf32", "TFloat32", torch.float32, 11, 2.0**-139),
        Format("int4", "Int4", None, 4, 1),
        Format("int8", "Int8", torch.int8, 8, 1),
        Format("uint8", "Uint8", torch.uint8, 8, 1),
        Format("int32", "Int32", torch.int32, 32, 1),
    )
}


def aligned(nbytes: int) -> Tensor:
    """uint8 [nbytes] at a multiple of 128, every byte 0xFF: NaN in each floating point format that has one."""
    raw = torch.full((nbytes + 128,), 0xFF, dtype=torch.uint8)
    start = -raw.data_ptr() % 128
    return raw[start : start + nbytes]


@dataclass(frozen=True)
class Matrix:
    """values: FP64 [batch, mn, k]. data: bytes as stored, "k" or "mn" contiguous."""

    format: Format
    values: Tensor
    data: Tensor
    major: str

    def pointer(self, align: int = 16) -> Any:
        from cutlass import cute
        from cutlass.cute.runtime import make_ptr

        return make_ptr(self.format.type, self.data.data_ptr(), cute.AddressSpace.gmem, assumed_align=align)

    @property
    def stored(self) -> Tensor:
        """[mn, k, batch] with the strides of the storage; E2M1 as pairs, half as many along the contiguous mode."""
        batch, mn, k = self.values.shape
        pairs = self.format.dtype is None
        flat = self.data.view(self.format.dtype or torch.float4_e2m1fn_x2)
        if self.major == "k":
            return flat.view(batch, mn, k // 2 if pairs else k).permute(1, 2, 0)
        return flat.view(batch, k, mn // 2 if pairs else mn).permute(2, 1, 0)

    def tensor(self, align: int = 16, divisible: int = 0) -> Any:
        """As a CuTe tensor (mn, k, batch)."""
        return cute_tensor(self.stored, self.format, align, divisible)

    def read(self) -> Tensor:
        """FP64 [batch, mn, k] of what is stored now."""
        batch, mn, k = self.values.shape
        codes = unpack(self.data, self.format.bits) if self.format.dtype is None else self.data.view(self.format.dtype)
        shape = (batch, mn, k) if self.major == "k" else (batch, k, mn)
        found = self.format.decode(codes.reshape(shape))
        return found if self.major == "k" else found.transpose(1, 2)


def cute_tensor(t: Tensor, format: Format, align: int = 16, divisible: int = 0) -> Any:
    """A CuTe tensor over a torch tensor of any strides; `divisible`: what the contiguous size is a multiple of."""
    from cutlass.cute.runtime import from_dlpack

    lead = max((d for d in range(t.ndim) if t.stride(d) == 1), key=lambda d: t.shape[d])
    if format.dtype is None:
        made = from_dlpack(t, assumed_align=align)
        made.element_type = format.type
    else:
        made = from_dlpack(t.view(torch.uint8) if t.element_size() == 1 else t, assumed_align=align)
        made.element_type = format.type
    made = made.mark_layout_dynamic(leading_dim=lead)
    if divisible:
        order = tuple(sorted(range(t.ndim), key=lambda d: (-t.stride(d), d == lead)))
        made = made.mark_compact_shape_dynamic(mode=lead, stride_order=order, divisibility=divisible)
    return made


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, one a byte -> one behind the other, the first in the lowest bits."""
    spread = np.unpackbits(codes.numpy().reshape(-1, 1), axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(spread, bitorder="little"))


def unpack(data: Tensor, bits: int) -> Tensor:
    spread = np.unpackbits(data.numpy(), bitorder="little").reshape(-1, bits)
    return torch.from_numpy(np.packbits(spread, axis=1, bitorder="little").reshape(-1))


def matrix(name: str, batch: int, mn: int, k: int, gen: torch.Generator, major: str = "k") -> Matrix:
    f = FORMATS[name]
    codes = f.random((batch, mn, k), gen)
    values = f.decode(codes)
    laid = (codes if major == "k" else codes.transpose(1, 2)).contiguous()
    raw = pack(laid, f.bits) if f.dtype is None else laid.reshape(-1).view(torch.uint8)
    data = aligned(raw.numel())
    data[:] = raw
    return Matrix(f, values, data, major)


def empty(name: str, batch: int, m: int, n: int, major: str = "n") -> Matrix:
    """An output: every byte 0xFF. values are of its shape, and nothing else."""
    f = FORMATS[name]
    values = torch.zeros(batch, m, n, dtype=torch.float64)
    return Matrix(f, values, aligned(values.numel() * f.bits // 8), "k" if major == "n" else "mn")


@dataclass(frozen=True)
class Scales:
    """values: FP64 [batch, mn, k / vec]. data: bytes, blocked_128x4 for each of batch."""

    format: Format
    values: Tensor
    data: Tensor
    vec: int

    def pointer(self, align: int = 32) -> Any:
        from cutlass import cute
        from cutlass.cute.runtime import make_ptr

        return make_ptr(self.format.type, self.data.data_ptr(), cute.AddressSpace.gmem, assumed_align=align)

    def tensor(self, align: int = 16) -> Any:
        """CuTe tensor (32, 4, rest of mn, 4, rest of k, batch)."""
        batch, mn, ks = self.values.shape
        shape = (batch, -(-mn // 128), -(-ks // 4), 32, 4, 4)
        return cute_tensor(self.data.view(shape).permute(3, 4, 1, 5, 2, 0), self.format, align)

    def expanded(self, k: int) -> Tensor:
        return self.values.repeat_interleave(self.vec, 2)[:, :, :k]


def scales(name: str, batch: int, mn: int, k: int, vec: int, gen: torch.Generator) -> Scales:
    """The rows and columns that only fill up the layout hold other valid scales: they must not reach the result."""
    f = FORMATS[name]
    ks = -(-k // vec)
    padded = f.random((batch, -(-mn // 128) * 128, -(-ks // 4) * 4), gen, positive=True)
    data = aligned(padded.numel())
    data[:] = to_blocked_128x4(padded.view(torch.uint8)).reshape(-1)
    return Scales(f, f.decode(padded)[:, :mn, :ks], data, vec)


@dataclass(frozen=True)
class Expected:
    """An output and what it must be. want (NaN: anything) and tolerance: FP64 [batch, m, n]; `start`: its bytes before
    a run."""

    name: str
    out: Matrix
    want: Tensor
    tolerance: Tensor
    start: Tensor

    def reset(self) -> None:
        self.out.data.copy_(self.start)

    def mismatch(self) -> str | None:
        """The first element that is wrong, or None."""
        got = self.out.read()
        wrong = ~((got - self.want).abs() <= self.tolerance) & ~self.want.isnan()  # a NaN that is not wanted is wrong
        if not wrong.any():
            return None
        at = tuple(int(x) for x in np.argwhere(wrong.numpy())[0])
        return (
            f"{self.name}{list(at)} is {float(got[at]):.8g}, want {float(self.want[at]):.8g} "
            f"within {float(self.tolerance[at]):.3g}; {int(wrong.sum())} of {wrong.numel()} elements are wrong"
        )


def expected(out: Matrix, want: Tensor, bound: Tensor, name: str = "d", steps: float = 16) -> Expected:
    """bound: sum of the absolute products; steps: roundings of an FP32 accumulator of that size."""
    f = out.format
    high = {"e4m3": 448.0, "e5m2": 57344.0, "fp16": 65504.0}.get(f.name)
    if high is not None:
        want = want.clamp(-high, high)
    tolerance = want.abs() * 2.0**-f.digits + f.step / 2 + bound * steps * 2.0**-24
    return Expected(name, out, want, tolerance, out.data.clone())


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """[batch, m, k] and [batch, n, k] -> the product [batch, m, n] and that of the absolute values."""
    return a @ b.transpose(1, 2), a.abs() @ b.abs().transpose(1, 2)
