"""Small floating point formats and IEEE rounding in every direction, on numpy arrays.

Narrow formats are tables: the value of every code, and rounding by search among the values, ties to the even code.
Sums and products that must round once are carried to FP64 with rounding to odd, from where one more rounding to a
format of at most 50 bits is exact (Boldo and Melquiond, "When double rounding is odd").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
U16, U32, U64 = np.uint16, np.uint32, np.uint64
TINY = {"f16": 2.0**-14, "bf16": 2.0**-126, "f32": 2.0**-126, "f64": 2.0**-1022}  # the smallest normal numbers


def some(mask: Array) -> bool:
    """Whether any of these is true; `every`: whether all are. Numpy takes three times as long for 32 lanes."""
    return b"\1" in mask.tobytes()


def every(mask: Array) -> bool:
    return b"\0" not in mask.tobytes()


@dataclass(frozen=True)
class SmallFloat:
    """A format of `exponent` and `mantissa` bits. specials: "ieee" (inf, NaN), "fn" (one NaN per sign), "none"."""

    name: str
    exponent: int
    mantissa: int
    bias: int
    specials: str
    signed: bool = True

    @property
    def bits(self) -> int:
        return self.exponent + self.mantissa + self.signed

    @cached_property
    def magnitudes(self) -> Array:
        """Values of the codes without sign, NaN and infinities left out; ascending."""
        codes = np.arange(1 << (self.exponent + self.mantissa))
        exp, man = codes >> self.mantissa, codes & ((1 << self.mantissa) - 1)
        fraction = man / (1 << self.mantissa)
        if self.name == "ue8m0":
            return np.exp2((codes[:255] - 127).astype(np.float64))
        values = np.where(exp == 0, np.ldexp(fraction, 1 - self.bias), np.ldexp(1 + fraction, exp - self.bias))
        if self.specials == "ieee":
            values = values[: ((1 << self.exponent) - 1) << self.mantissa]
        elif self.specials == "fn":
            values = values[:-1]
        return values

    @cached_property
    def values(self) -> Array:
        """FP32 value of every code."""
        half = np.full(1 << (self.exponent + self.mantissa), np.nan)
        half[: len(self.magnitudes)] = self.magnitudes
        if self.specials == "ieee":
            half[len(self.magnitudes)] = np.inf
        both = np.concatenate([half, -half]) if self.signed else half
        return both.astype(np.float32)

    @cached_property
    def _next_codes(self) -> Array:
        """Above these, of which the first belongs to code 0, a number is rounded to the next code: ties to even."""
        ties = (self.magnitudes[1:] + self.magnitudes[:-1]) / 2
        return np.where(np.arange(len(ties)) % 2 == 1, np.nextafter(ties, 0.0), ties)

    def decode(self, codes: Array) -> Array:
        """codes -> FP32 of the same shape."""
        return self.values[codes]

    def encode(self, x: Array, mode: str = "rn", saturate: bool = True) -> Array:
        """FP32 or FP64 -> codes (uint8). NaN becomes the format's NaN, or its largest value if it has none."""
        x = np.asarray(x, np.float64)
        mags, a = self.magnitudes, np.abs(x)
        if mode == "rn":
            code = np.searchsorted(self._next_codes, a, side="left")
        elif mode == "rz":
            code = np.maximum(np.searchsorted(mags, a, side="right") - 1, 0)
        elif mode == "rp":
            code = np.searchsorted(mags, a, side="left")
        else:
            raise ValueError(f"rounding {mode!r} to {self.name}")
        code = np.minimum(code, len(mags) - 1)
        if not self.signed:
            code = np.where(x < 0, 0, code)
        if not saturate:
            step = mags[-1] - mags[-2]
            over = a >= mags[-1] + step / 2 if mode == "rn" else np.isinf(a)
            code = np.where(over, len(mags), code)  # infinity, or NaN where there is none
        if self.signed:
            code = code | np.signbit(x) * (1 << self.exponent + self.mantissa)
        nan = np.isnan(x)
        if some(nan):
            code = np.where(nan, (1 << self.exponent + self.mantissa) - 1, code)
        return code.astype(np.uint8)


E2M1 = SmallFloat("e2m1", 2, 1, 1, "none")
E2M3 = SmallFloat("e2m3", 2, 3, 1, "none")
E3M2 = SmallFloat("e3m2", 3, 2, 3, "none")
E4M3 = SmallFloat("e4m3", 4, 3, 7, "fn")
E5M2 = SmallFloat("e5m2", 5, 2, 15, "ieee")
UE8M0 = SmallFloat("ue8m0", 8, 0, 127, "fn", signed=False)
UE4M3 = SmallFloat("ue4m3", 4, 3, 7, "fn", signed=False)
SMALL = {f.name: f for f in (E2M1, E2M3, E3M2, E4M3, E5M2, UE8M0, UE4M3)}


def round_odd_sum(a: Array, b: Array) -> Array:
    """a + b in FP64, rounded to odd."""
    s = a + b
    part = s - a
    error = (a - (s - part)) + (b - part)
    bits = s.view(np.int64)
    fix = (error != 0) & np.isfinite(s) & (bits & 1 == 0)
    return np.where(fix, bits + np.where((error > 0) == (s > 0), 1, -1), bits).view(np.float64)


def exact_f64(compute: Callable[..., Array], exact: Callable[..., Fraction], mode: str, *xs: Array) -> Array:
    """`compute` where it gives zero, infinity or NaN on principle, elsewhere `exact` rounded once; lane by lane."""
    out = np.array(compute(*xs))
    known = np.isfinite(xs).all(0)
    for lane in np.flatnonzero(known):
        try:
            value = exact(*(Fraction(float(x[lane])) for x in xs))
        except (ZeroDivisionError, ValueError):  # a quotient by zero, the root of a negative number
            continue
        if value:
            out[lane] = round_fraction(value, mode)
    return out


def round_fraction(x: Fraction, mode: str) -> float:
    """An exact number -> FP64."""
    try:
        nearest = float(x)
    except OverflowError:
        nearest = math.inf if x > 0 else -math.inf
    if mode == "rn":
        return nearest
    towards = {"rz": 0.0, "rm": -math.inf, "rp": math.inf}[mode]
    over = math.isinf(nearest)
    wrong = {
        "rz": over or abs(Fraction(nearest)) > abs(x),
        "rm": nearest > 0 if over else Fraction(nearest) > x,
        "rp": nearest < 0 if over else Fraction(nearest) < x,
    }[mode]
    return math.nextafter(nearest, towards) if wrong else nearest


def root(x: Fraction) -> Fraction:
    """Square root of a number, exact or with a last bit that says that it is not. Raises ValueError."""
    scale = 256 + 2 * x.denominator.bit_length()
    value = (x.numerator << 2 * scale) // x.denominator
    found = math.isqrt(value)
    inexact = found * found * x.denominator != x.numerator << 2 * scale
    return Fraction(2 * found + inexact, 1 << scale + 1)


def to_f32(x: Array, mode: str = "rn") -> Array:
    """FP64 (exact or rounded to odd) -> FP32."""
    y = x.astype(np.float32)
    if mode == "rn":
        return y
    if mode == "rz":
        beyond = np.abs(y.astype(np.float64)) > np.abs(x)
        return np.where(beyond & np.isfinite(x), np.nextafter(y, np.float32(0)), y)
    if mode == "rp":
        return np.where(y < x, np.nextafter(y, np.float32(np.inf)), y)
    if mode == "rm":
        return np.where(y > x, np.nextafter(y, np.float32(-np.inf)), y)
    raise ValueError(f"rounding {mode!r}")


def to_f16(x: Array, mode: str = "rn") -> Array:
    """FP64 -> FP16 (uint16 bits)."""
    y = x.astype(np.float16)
    if mode != "rn":
        wide = y.astype(np.float64)
        if mode == "rz":
            y = np.where((np.abs(wide) > np.abs(x)) & np.isfinite(x), np.nextafter(y, np.float16(0)), y)
        elif mode == "rp":
            y = np.where(wide < x, np.nextafter(y, np.float16(np.inf)), y)
        elif mode == "rm":
            y = np.where(wide > x, np.nextafter(y, np.float16(-np.inf)), y)
        else:
            raise ValueError(f"rounding {mode!r}")
    return y.view(U16)


def to_bf16(x: Array, mode: str = "rn") -> Array:
    """FP32 or FP64 -> BF16 (uint16 bits). NaN becomes 0x7FFF, as cvt gives it."""
    if x.dtype == np.float64:
        nearest = x.astype(np.float32)
        if every(nearest == x):
            bits = nearest.view(U32)
        else:
            away = np.abs(nearest.astype(np.float64)) > np.abs(x)
            low = np.where(away & np.isfinite(x), np.nextafter(nearest, np.float32(0)), nearest)  # towards zero
            inexact = (low.astype(np.float64) != x) & np.isfinite(low)
            bits = low.view(U32) | inexact  # rounded to odd
    else:
        bits = x.view(U32)
    upper = bits >> U32(16)
    if mode == "rn":
        out = (bits + U32(0x7FFF) + (upper & U32(1))) >> U32(16)
    elif mode == "rz":
        out = upper
    elif mode in ("rp", "rm"):
        more = ((bits & U32(0xFFFF)) != 0) & ~np.isinf(x)
        out = upper + (more & ((bits >> U32(31)) == (mode == "rm")))
    else:
        raise ValueError(f"rounding {mode!r}")
    nan = np.isnan(x)
    return (np.where(nan, U32(0x7FFF), out) if some(nan) else out).astype(U16)


def from_bf16(bits: Array) -> Array:
    """BF16 bits -> FP32."""
    return (bits.astype(U32) << U32(16)).view(np.float32)


def to_tf32(x: Array) -> Array:
    """FP32 with the 13 low bits cut off, as the tensor core reads it."""
    return (x.view(U32) & U32(0xFFFFE000)).view(np.float32)
