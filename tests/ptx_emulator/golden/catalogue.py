"""Cases of the golden vectors: small kernels for sm_90a, their inputs, and how closely the emulator must agree.

A case is one kernel and one launch. Its arguments are buffers (contents before the launch; those marked `out` are
recorded after it), 32-bit numbers, and tensor maps over a buffer, which the driver encodes on the GPU's host.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
COUNT = 512  # elements of an elementwise case
SEED = 20251121


@dataclass(frozen=True)
class Buffer:
    """data: contents before the launch. out: recorded after it."""

    data: Array
    out: bool = False


@dataclass(frozen=True)
class Map:
    """Tiled tensor map over argument `buffer`; sizes, box and steps in elements, dimension 0 first, strides in bytes.

    kind: CUtensorMapDataType; swizzle: bytes of a swizzled row; interleave: bytes; fill: NaN outside of the tensor.
    """

    buffer: int
    kind: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...] = ()
    swizzle: int = 0
    interleave: int = 0
    fill: bool = False


Argument = Buffer | Map | int


@dataclass(frozen=True)
class Case:
    """bound: None for equal bits, else the largest (relative, absolute) error, of outputs of the floating point kind
    `values`.

    free: elements of the first output, as an index into it, that the PTX ISA leaves open.
    """

    name: str
    ptx: str
    args: tuple[Argument, ...]
    block: int = 32
    grid: int = 1
    cluster: int = 1
    shared: int = 0
    bound: tuple[float, float] | None = None
    values: str = ""
    free: tuple[slice | int, ...] = ()


CASES: dict[str, Case] = {}


def add(case: Case) -> None:
    assert case.name not in CASES, case.name
    CASES[case.name] = case


def out(*shape: int, dtype: Any = np.uint32) -> Buffer:
    """An output filled with a pattern, so that what the kernel leaves alone shows."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return Buffer(np.full(size, 0xA5, np.uint8).view(dtype).reshape(shape), True)


def kernel(
    body: str,
    params: list[str],
    *,
    declare: str = "",
    module: str = "",
    cluster: int = 1,
    shared: str = "",
    block: int = 0,
) -> str:
    """A kernel `k`; parameters p0, p1, ... of the given types; 64-bit ones are also in %q0, %q1, ..."""
    listed = ", ".join(f"{t} p{n}[128]" if "b8" in t else f"{t} p{n}" for n, t in enumerate(params))
    loads = "".join(f"ld.param.b64 %q{n}, [p{n}];\n" if t == ".param .u64" else "" for n, t in enumerate(params))
    clustered = f".explicitcluster .reqnctapercluster {cluster}, 1, 1\n" if cluster > 1 else ""
    threads = f".reqntid {block}, 1, 1\n" if block else ""
    return f""".version 8.7
.target sm_90a
.address_size 64
{module}
.visible .entry k({listed})
{clustered}{threads}{{
.reg .pred %p<32>;
.reg .b16 %h<64>;
.reg .b32 %r<512>;
.reg .b64 %q<64>;
{declare}
{shared}
{loads}mov.u32 %r0, %tid.x;
{body}
ret;
}}
"""


def simple(
    name: str,
    body: str,
    *args: Argument,
    block: int = 32,
    grid: int = 1,
    cluster: int = 1,
    shared: int = 0,
    declare: str = "",
    module: str = "",
    static: str = "",
    bound: tuple[float, float] | None = None,
    values: str = "",
    free: tuple[slice | int, ...] = (),
    fixed: bool = False,
) -> None:
    """A case of one kernel body; arguments in order are p0, p1, ..."""
    kinds = {Buffer: ".param .u64", Map: ".param .align 64 .b8", int: ".param .u32"}
    text = kernel(
        body,
        [kinds[type(a)] for a in args],
        declare=declare,
        module=module,
        cluster=cluster,
        shared=static,
        block=block if fixed else 0,
    )
    add(Case(name, text, args, block, grid, cluster, shared, bound, values, free))


# --- inputs ---


def _floats(exponent: int, mantissa: int) -> list[int]:
    """Bit patterns of a format's special values, positive."""
    one = ((1 << exponent - 1) - 1) << mantissa
    top = ((1 << exponent) - 1) << mantissa
    return [0, 1, (1 << mantissa) - 1, 1 << mantissa, one, one + 1, one - 1, top - 1, top, top | 1 << mantissa - 1 | 5]


_FORMATS = {"f32": (8, 23), "f64": (11, 52), "f16": (5, 10), "bf16": (8, 7)}
_BITS = {
    **{f"{k}{n}": n for k in "sub" for n in (8, 16, 32, 64)},
    "f32": 32,
    "f64": 64,
    "f16": 16,
    "bf16": 16,
    "f16x2": 32,
    "bf16x2": 32,
    "e4m3x2": 16,
    "e5m2x2": 16,
    "shift": 32,
    "s16x2": 32,
    "u16x2": 32,
    "pred": 32,
    "trig": 32,
    "exp": 32,
}


def _specials(kind: str) -> Array:
    bits = _BITS[kind]
    if kind in _FORMATS:
        e, m = _FORMATS[kind]
        patterns = [*_floats(e, m)[:8], _floats(e, m)[8], _floats(e, m)[9]]
        values = [v | s << bits - 1 for v in patterns for s in (0, 1)][:20]
        values[19] = (1 << bits) - 1  # a negative NaN with all bits
        values = [v for n, v in enumerate(values) if n not in (5, 7, 11, 13)]
    elif kind == "shift":
        values = [0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 0xFFFFFFFF]
    else:
        top = 1 << bits - 1
        values = [0, 1, 2, 3, 7, 10, top // 2, top - 2, top - 1, top, top + 1, -1, -2, -3, -10, top + top // 2]
    return np.array([v % (1 << bits) for v in values], np.uint64)


def _random(kind: str, count: int, rng: np.random.Generator) -> Array:
    bits = _BITS[kind]
    raw = rng.integers(0, 1 << min(bits, 63), count, dtype=np.uint64)
    if bits == 64:
        raw = raw << np.uint64(1) | rng.integers(0, 2, count, dtype=np.uint64)
    near: Array
    if kind == "trig":
        near = rng.uniform(-30, 30, count).astype(np.float32).view(np.uint32).astype(np.uint64)
    elif kind == "exp":
        near = rng.uniform(-140, 130, count).astype(np.float32).view(np.uint32).astype(np.uint64)
    elif kind in _FORMATS:
        x = rng.normal(0, 1, count) * np.exp2(rng.integers(-3, 4, count))
        # a third of them halves and integers: ties, cancellation
        x = np.where(rng.random(count) < 0.33, np.round(x * 4) / 2, x)
        near = {
            "f32": lambda: x.astype(np.float32).view(np.uint32),
            "f64": lambda: x.view(np.uint64),
            "f16": lambda: x.astype(np.float16).view(np.uint16),
            "bf16": lambda: (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16),
        }[kind]().astype(np.uint64)
    elif kind == "shift":
        near = rng.integers(0, 70, count, dtype=np.uint64)
        raw = near
    else:
        near = rng.integers(0, 200, count).astype(np.int64) - 100
        near = (near.view(np.uint64) & np.uint64((1 << bits) - 1)).astype(np.uint64)
    return np.where(rng.random(count) < 0.5, raw, near)


def operand(kind: str, slot: int, count: int = COUNT) -> Array:
    """Elements of `kind` for source `slot`: pairs of special values first, then random ones."""
    if kind in ("f16x2", "bf16x2"):
        return operand(kind[:-2], slot, 2 * count).view(np.uint32)
    if kind in ("s16x2", "u16x2"):
        return operand("u16", slot, 2 * count).view(np.uint32)
    if kind in ("e4m3x2", "e5m2x2"):
        return np.arange(0, 65536, 65536 // count, dtype=np.uint64).astype(np.uint16) * np.uint16(257)
    rng = np.random.default_rng([SEED, slot, *map(ord, kind)])
    values = _random(kind, count, rng)
    if kind not in ("trig", "exp"):
        special = _specials(kind)
        n = np.arange(256)
        pick = (n // 16, n % 16, rng.integers(0, 16, 256))[slot]
        values[:256] = special[pick]
    return values.astype(f"u{_BITS[kind] // 8}")


_REGISTER = {8: "%h", 16: "%h", 32: "%r", 64: "%q"}


def lanewise(
    name: str,
    text: str,
    results: str | tuple[str, ...],
    *sources: str | Array,
    bound: tuple[float, float] | None = None,
    values: str = "",
    declare: str = "",
) -> None:
    """`text` on every element: $a, $b, $c are the sources' registers, $d, $e, $f, $g those of the results."""
    results = (results,) if isinstance(results, str) else results
    data = [operand(s, n) if isinstance(s, str) else s for n, s in enumerate(sources)]
    lines = []
    for n, (letter, x) in enumerate(zip("abc", data, strict=False)):
        kind = sources[n] if isinstance(sources[n], str) else ""
        register = f"{_REGISTER[8 * x.itemsize]}{10 + n}"
        load = "s8" if kind == "s8" else "u8" if x.itemsize == 1 else f"b{8 * x.itemsize}"
        lines += [
            f"mul.wide.u32 %q40, %r0, {x.itemsize};",
            f"add.s64 %q40, %q40, %q{n + len(results)};",
            f"ld.global.{load} {register}, [%q40];",
        ]
        text = text.replace(f"${letter}", register)
    stores = []
    for n, (letter, kind) in enumerate(zip("defg", results, strict=False)):
        size = _BITS[kind] // 8
        register = f"{_REGISTER[8 * size]}{20 + n}"
        text = text.replace(f"${letter}", register)
        stores += [
            f"mul.wide.u32 %q40, %r0, {size};",
            f"add.s64 %q40, %q40, %q{n};",
            f"st.global.b{8 * size} [%q40], {register};",
        ]
    outs = [out(len(data[0]), dtype=f"u{_BITS[k] // 8}") for k in results]
    simple(
        name,
        "\n".join([*lines, text, *stores]),
        *outs,
        *(Buffer(x) for x in data),
        block=len(data[0]),
        bound=bound,
        values=values,
        declare=declare,
    )
