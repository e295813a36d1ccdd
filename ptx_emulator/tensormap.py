"""The 128-byte tensor map of TMA and the boxes it describes.

PTX ISA, "Tensors": tiled mode, a box of elements at given coordinates; what lies outside of the tensor is read as zero
or NaN and never written. What a map must fulfil stands in the CUDA driver API, "cuTensorMapEncodeTiled". The encoding
is not documented: it was learnt from maps that the driver encoded, by `FIELDS`, which place every field in one of
sixteen little-endian 64-bit words.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .errors import Fault, UnknownInstructionError
from .memory import GlobalMemory
from .numbers import Array

BYTES = 128
USED = 64  # of them: words 8 to 15 mean nothing (kernels of CuTe DSL copy the first half only)
OOB_NAN = 0x7FF7  # in every 16 bits of what a map with NaN fill reads outside of the tensor, on an H100


# --- element types and swizzles ---


@dataclass(frozen=True, slots=True)
class Element:
    """kind: the PTX type that reductions compute in. packed and padded: bytes of 16 elements in global and in shared
    memory, where those differ (PTX ISA, "Padding and alignment of the sub-byte types")."""

    name: str
    bits: int
    kind: str = ""
    packed: int = 0
    padded: int = 0


# PTX ISA, "tensormap.replace": in the order of the table of new values
ELEMENTS = (
    Element("u8", 8),
    Element("u16", 16),
    Element("u32", 32, "u32"),
    Element("s32", 32, "s32"),
    Element("u64", 64, "u64"),
    Element("s64", 64, "s64"),
    Element("f16", 16, "f16"),
    Element("f32", 32, "f32"),
    Element("f32.ftz", 32, "f32"),
    Element("f64", 64, "f64"),
    Element("bf16", 16, "bf16"),
    Element("tf32", 32, "f32"),
    Element("tf32.ftz", 32, "f32"),
    Element("b4x16", 4),
    Element("b4x16_p64", 4, packed=8, padded=16),
    Element("b6x16_p32", 6, packed=12, padded=16),
)
ELEMENT = {e.name: e for e in ELEMENTS}


@dataclass(frozen=True, slots=True)
class Swizzle:
    """Atoms of `atom` bytes permuted within rows of `span`; flip: 8-byte halves change places in every other row."""

    span: int = 0
    atom: int = 16
    flip: bool = False

    def __call__(self, address: Array) -> Array:
        """PTX ISA, "Swizzling modes": the atom's number in its row XOR the row's number, rows of 128 bytes."""
        if not self.span:
            return address
        row = address >> 7
        found: Array = address ^ (row & self.span // self.atom - 1) * self.atom
        return found ^ (row & 1) << 3 if self.flip else found

    def __str__(self) -> str:
        return f"{self.span}B, atoms of {self.atom}B{' flipped' if self.flip else ''}" if self.span else "none"


NO_SWIZZLE = Swizzle()


@dataclass(frozen=True, slots=True)
class Im2col:
    """PTX ISA, "im2col mode": corners of the bounding box in W, H, D; pixels of one column."""

    lower: tuple[int, ...]
    upper: tuple[int, ...]
    pixels: int


@dataclass(frozen=True, slots=True)
class TensorMap:
    """sizes, box and steps in elements, dimension 0 first; strides in bytes, from dimension 1 on; interleave: bytes of
    a slice of channels, or 0. With im2col the box is (channels, pixels)."""

    address: int
    element: Element
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...] = ()
    swizzle: Swizzle = NO_SWIZZLE
    interleave: int = 0
    nan: bool = False
    im2col: Im2col | None = None

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def counts(self) -> tuple[int, ...]:
        """Elements of a box along each dimension (PTX ISA, "Traversal-Stride").

        Interleaved: units along dimension 0, and one slice along the last but one, whatever the box.
        """
        if self.im2col:
            return self.box
        counts = [-(-b // s) for b, s in zip(self.box, self.steps or (1,) * self.rank, strict=True)]
        if self.interleave:
            counts[-2] = 1
        else:
            counts[0] = self.box[0]
        return tuple(counts)

    @property
    def rows(self) -> int:
        """Rows of a box: runs along dimension 0; interleaved, single units."""
        return int(np.prod(self.counts[0 if self.interleave else 1 :]))

    @property
    def row_bytes(self) -> int:
        """Of a row in global memory."""
        return self.interleave or self.box[0] * self.element.bits // 8

    @property
    def pitch(self) -> int:
        """From row to row in shared memory: rows of a swizzle are as long as its span."""
        e = self.element
        row = self.row_bytes * e.padded // e.packed if e.packed else self.row_bytes
        return row if self.interleave else max(row, self.swizzle.span)


# --- encoding ---


class Field(NamedTuple):
    word: int
    shift: int
    width: int

    def get(self, words: list[int]) -> int:
        return words[self.word] >> self.shift & (1 << self.width) - 1

    def put(self, words: list[int], value: int) -> None:
        mask = (1 << self.width) - 1
        words[self.word] = words[self.word] & ~(mask << self.shift) | (value & mask) << self.shift


# bit 0 of `form`: im2col; bit 1 is set by compiled CuTe DSL host code and not by the driver, and seen to mean nothing.
# Words 8 and 9 hold the bytes and rows of a box in maps of the driver, nothing in those of CuTe DSL.
FORM = Field(1, 0, 4)
ADDRESS = Field(0, 0, 64)
RANK = Field(1, 4, 3)  # less one, like sizes, box and steps
TYPE = Field(1, 7, 4)
INTERLEAVE = Field(1, 11, 2)
SWIZZLE = Field(1, 13, 2)
FILL = Field(1, 15, 1)
TF32 = Field(1, 16, 1)
PROMOTION = Field(1, 17, 2)
ATOMICITY = Field(1, 19, 2)  # CuTe DSL writes 1 for atoms of 32 bytes; the rest as tensormap.replace counts
STRIDES = (Field(1, 32, 32), Field(2, 0, 32), Field(2, 32, 32), Field(3, 0, 32))  # / 16
STRIDES_HIGH = tuple(Field(3, 32 + 4 * d, 4) for d in range(4))
SIZES = (Field(4, 0, 32), Field(4, 32, 32), Field(5, 0, 32), Field(5, 32, 32), Field(6, 0, 32))
STEPS = tuple(Field(6, 32 + 3 * d, 3) for d in range(5))
BOX = (Field(6, 56, 8), *(Field(7, 8 * d, 8) for d in range(4)))
# of im2col, beside the channels in BOX[0]: pixels less one, and corners of 16, 8 or 5 bits by the rank
PIXELS = Field(7, 32, 10)
CORNER_BITS = {3: 16, 4: 8, 5: 5}

# element types whose number is not that of tensormap.replace, with the TF32 bit
# (of the padded ones, as compiled CuTe DSL host code writes it)
_CODES = {"tf32": (7, 1), "tf32.ftz": (8, 1), "b4x16": (11, 0), "b4x16_p64": (12, 0), "b6x16_p32": (13, 0)}
CODES = {e.name: _CODES.get(e.name, (n, 0)) for n, e in enumerate(ELEMENTS)}
_NAMES = {code: name for name, code in CODES.items()}
INTERLEAVES = (0, 16, 32)
SPANS = (0, 32, 64, 128)
ATOMS = ((16, False), (32, False), (32, True), (64, False))  # bytes, halves flipped

# CUDA driver API, "CUtensorMapDataType" and "CUtensorMapSwizzle", by number
DRIVER_ELEMENTS = (
    *("u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16"),
    *("f32.ftz", "tf32", "tf32.ftz", "b4x16", "b4x16_p64", "b6x16_p32"),
)
DRIVER_SWIZZLES = (
    *(Swizzle(span) for span in SPANS),
    *(Swizzle(128, atom, flip) for atom, flip in ATOMS[1:]),
)


def words_of(raw: Array) -> list[int]:
    return [int(x) for x in np.frombuffer(raw.tobytes(), "<u8")]


def stride(words: list[int], d: int) -> int:
    return (STRIDES_HIGH[d].get(words) << 32 | STRIDES[d].get(words)) * 16


def put_stride(words: list[int], d: int, value: int) -> None:
    STRIDES[d].put(words, value >> 4)
    STRIDES_HIGH[d].put(words, value >> 36)


def decode(raw: Array) -> TensorMap:
    """128 bytes -> TensorMap. Raises Fault for what is not such a map."""
    w = words_of(raw)
    if len(w) != BYTES // 8 or FORM.get(w) > 3 or not any(w):
        raise Fault(f"not a tensor map: its second word is {w[1]:#x}")
    rank, code = RANK.get(w) + 1, (TYPE.get(w), TF32.get(w))
    if code not in _NAMES or rank > 5:
        raise Fault(f"tensor map with element type {code[0]} (TF32 {code[1]}) and rank {rank} is not known")
    if INTERLEAVE.get(w) == 3:
        raise Fault("tensor map with interleave 3 is not known")
    sizes = tuple(f.get(w) + 1 for f in SIZES[:rank])
    box, im2col = tuple(f.get(w) + 1 for f in BOX[:rank]), None
    if FORM.get(w) & 1:
        if rank < 3:
            raise Fault(f"im2col tensor map of rank {rank}: 3 to 5 are allowed")
        pixels = PIXELS.get(w) + 1
        im2col, box = Im2col(*_corners(w, rank), pixels), (box[0], pixels)
    t = TensorMap(
        address=ADDRESS.get(w),
        element=ELEMENT[_NAMES[code]],
        sizes=sizes,
        strides=tuple(stride(w, d) for d in range(rank - 1)),
        box=box,
        steps=tuple(f.get(w) + 1 for f in STEPS[:rank]),
        swizzle=Swizzle(SPANS[SWIZZLE.get(w)], *ATOMS[ATOMICITY.get(w)]),
        interleave=INTERLEAVES[INTERLEAVE.get(w)],
        nan=bool(FILL.get(w)),
        im2col=im2col,
    )
    for problem in problems(t):
        raise Fault(f"tensor map at address {t.address:#x}: {problem}")
    return t


def _corners(w: list[int], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bits = CORNER_BITS[rank]

    def corner(shift: int) -> tuple[int, ...]:
        values = (Field(7, shift + bits * d, bits).get(w) for d in range(rank - 2))
        return tuple(v - (v >> bits - 1 << bits) for v in values)

    return corner(0), corner(16)


def problems(t: TensorMap) -> Iterable[str]:
    """What the map breaks of the rules of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col."""
    e = t.element
    unit = 32 if t.interleave == 32 or e.packed else 16
    if not t.address or t.address % unit:
        yield f"the address must be a multiple of {unit}"
    for d, s in enumerate(t.strides):
        if s % unit:
            yield f"stride {s} of dimension {d + 1} is not a multiple of {unit}"
    if t.interleave and t.rank < 3:
        yield f"an interleaved tensor of rank {t.rank}: 3 to 5 are allowed"
    if not t.interleave and t.row_bytes % 16:
        yield f"a box has rows of {t.row_bytes} bytes, which is not a multiple of 16"
    if t.swizzle.span and not t.interleave and t.pitch > t.swizzle.span:
        yield f"a box has rows of {t.row_bytes} bytes, more than the swizzle's {t.swizzle.span}"
    if t.swizzle.atom > 16 and t.swizzle.span != 128:
        yield f"atoms of {t.swizzle.atom} bytes in a swizzle of {t.swizzle.span}"
    if e.packed and (t.swizzle.span not in (0, 128) or t.swizzle.flip):
        yield f"{e.name} with a swizzle of {t.swizzle}"
    if t.nan and not e.name.startswith(("f", "bf", "tf")):
        yield f"NaN outside of a tensor of {e.name}"
    if e.packed and (t.sizes[0] % 128 or t.box[0] != 128):
        yield f"size {t.sizes[0]} and box {t.box[0]} of {e.name}: a multiple of 128, and 128, are required"
    if e.bits == 4 and t.sizes[0] % 2:
        yield f"an odd number of {t.sizes[0]} elements of 4 bits"


# --- boxes ---


@dataclass(frozen=True, slots=True)
class Box:
    """A box at coordinates: global addresses of its rows, which of them lie inside, and which bytes of a row do."""

    rows: Array
    inside: Array
    first: int
    last: int

    def addresses(self, block_base: int) -> Array:
        """Places of the bytes inside, in a block, [rows inside, bytes]."""
        return (self.rows[self.inside] - block_base)[:, None] + np.arange(self.first, self.last)


def place(
    t: TensorMap,
    coordinates: tuple[int, ...],
    rows: tuple[int, ...] | None = None,
    offsets: tuple[int, ...] = (),
) -> Box:
    """rows: indices along dimension 1 in place of a run of them (gather4 and scatter4). offsets: of im2col."""
    if t.interleave:
        return _units(t, coordinates)
    if t.im2col is not None:
        index = _pixels(t, t.im2col, coordinates, offsets)
    elif rows is not None:
        index = [np.array(rows)]
    else:
        index = _grid(coordinates[1:], t.counts[1:], t.steps[1:])
    start = coordinates[0] * t.element.bits
    if start % 128:
        raise Fault(f"a box that starts {start / 8:g} bytes into a row: multiples of 16 are required")
    if t.element.packed and coordinates[0] % 128:
        raise Fault(f"coordinate {coordinates[0]} of {t.element.name} is not a multiple of 128")
    first = min(max(0, -(start // 8)), t.row_bytes)
    last = max(min(t.row_bytes, t.sizes[0] * t.element.bits // 8 - start // 8), first)
    return Box(t.address + start // 8 + _distance(index, t.strides), _inside(index, t.sizes[1:]), first, last)


def _grid(start: tuple[int, ...], counts: tuple[int, ...], steps: tuple[int, ...]) -> list[Array]:
    """Indices along each dimension of all rows of a box, dimension 1 running fastest."""
    if not counts:
        return []
    axes = [c + np.arange(n) * s for c, n, s in zip(start, counts, steps, strict=True)]
    return [x.reshape(-1) for x in np.meshgrid(*reversed(axes), indexing="ij")][::-1]


def _distance(index: list[Array], strides: tuple[int, ...]) -> Array:
    return sum((at * s for at, s in zip(index, strides, strict=True)), np.zeros(1, np.int64))


def _inside(index: list[Array], sizes: tuple[int, ...]) -> Array:
    inside = np.ones(1, bool)
    for at, size in zip(index, sizes, strict=True):
        inside = inside & (at >= 0) & (at < size)
    return inside


def _units(t: TensorMap, coordinates: tuple[int, ...]) -> Box:
    """PTX ISA, "Interleave layout", as an H100 reads it: dimension 0 counts units of 16 or 32 bytes, one after the
    other; the last but one counts slices of channels, of which a box has one."""
    if t.im2col is not None:
        raise UnknownInstructionError("the emulator does not know interleaved im2col tensor maps")
    index = _grid(coordinates, t.counts, t.steps)
    return Box(t.address + _distance(index, (t.interleave, *t.strides)), _inside(index, t.sizes), 0, t.interleave)


def _pixels(t: TensorMap, form: Im2col, coordinates: tuple[int, ...], offsets: tuple[int, ...]) -> list[Array]:
    """PTX ISA, "im2col mode": the filter's base runs through the bounding box and on to the next images; offsets are
    added to where it is."""
    limits = [size + upper for size, upper in zip(t.sizes[1:-1], form.upper, strict=True)]
    base, found = list(coordinates[1:]), []
    for low, b, high in zip(form.lower, base, limits, strict=False):
        if not low <= b < high:
            raise Fault(f"im2col coordinate {b} is outside of the bounding box {low}..{high - 1}")
    for _ in range(form.pixels):
        found.append([b + o for b, o in zip(base, (*offsets, 0), strict=True)])
        for d, high in enumerate(limits):
            base[d] += t.steps[1 + d]
            if base[d] < high:
                break
            base[d] = form.lower[d]
        else:
            base[-1] += 1
    return list(np.array(found).T)


# --- bytes ---


def read(t: TensorMap, box: Box, memory: GlobalMemory) -> Array:
    """[rows, row_bytes], filled outside of the tensor."""
    out = np.zeros((len(box.rows), t.row_bytes), np.uint8)
    if t.nan:
        out.view("<u2")[:] = OOB_NAN
    rows = box.rows[box.inside] + box.first
    if len(rows) and box.last > box.first:
        low, high = int(rows.min()), int(rows.max())
        block = memory.find(low, high + box.last - box.first - low)
        index = box.addresses(block.base)
        memory.note(block, index)
        out[box.inside, box.first : box.last] = converted(t, block.data[index])
        memory.loaded += index.size
    return out


def converted(t: TensorMap, data: Array) -> Array:
    """Bytes of elements as a load leaves them, learnt from an H100: TF32 is rounded to nearest even, a NaN becomes the
    one that is all ones; .ftz changes nothing."""
    if not t.element.name.startswith("tf32"):
        return data
    x = np.ascontiguousarray(data).view("<u4").astype(np.uint64)
    rounded = x + 0xFFF + (x >> 13 & 1) & 0xFFFFE000
    exponent, fraction = x & 0x7F800000, x & 0x7FFFFF
    special = np.where(fraction == 0, x, 0x7FFFE000)
    return np.where(exponent == 0x7F800000, special, rounded).astype("<u4").view(np.uint8)


def write(t: TensorMap, box: Box, memory: GlobalMemory, values: Array) -> None:
    """To a multicast address: to every device, as NVIDIA's CuTe DSL example of an all-reduce by TMA relies on."""
    rows = box.rows[box.inside] + box.first
    if len(rows) and box.last > box.first:
        low, size = int(rows.min()), int(rows.max()) + box.last - box.first - int(rows.min())
        for shift in memory.shifts(low, size) or (0,):
            block = memory.find(low + shift, size, write=True)
            index = box.addresses(block.base - shift)
            memory.note(block, index, write=True)
            block.data[index] = values[box.inside, box.first : box.last]
            memory.stored += index.size


def shared_index(t: TensorMap, offset: int, rows: int, storing: bool = False) -> Array:
    """Offsets in shared memory of the bytes of a box, [rows, row_bytes]; storing: of a byte for each 6-bit element."""
    if offset % 128:
        raise Fault(f"TMA box at shared address {offset:#x}, which is not a multiple of 128")
    e = t.element
    column = np.arange(t.box[0] if storing and e.packed else t.row_bytes)
    if e.packed and not storing:
        column = column // e.packed * e.padded + column % e.packed
    return t.swizzle(offset + np.arange(rows)[:, None] * t.pitch + column)


def whole(t: TensorMap, box: Box) -> Box:
    """What stores and reductions write: the last 16 bytes that lie in the tensor in part whole, as an H100 does."""
    return replace(box, last=min(-(-box.last // 16) * 16, t.row_bytes))


def packed(t: TensorMap, values: Array) -> Array:
    """Rows as they come from shared memory -> as global memory holds them: 6-bit elements lose their padding
    (PTX ISA, ".b6p2x16")."""
    if not t.element.packed:
        return values
    bits = np.unpackbits(values[..., None], axis=-1, bitorder="little")[..., : t.element.bits]
    return np.packbits(bits.reshape(len(values), -1), axis=-1, bitorder="little")


def encode(
    address: int,
    element: str,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int | Swizzle = 0,
    *,
    steps: tuple[int, ...] | None = None,
    interleave: int = 0,
    nan: bool = False,
    im2col: Im2col | None = None,
) -> bytes:
    """The map as `decode` reads it. strides in bytes, from dimension 1 on; with im2col the box is the channels."""
    w = [0] * (BYTES // 8)
    code, tf32 = CODES[element]
    form = swizzle if isinstance(swizzle, Swizzle) else Swizzle(swizzle)
    ADDRESS.put(w, address)
    for f, value in (
        (FORM, int(im2col is not None)),
        (RANK, len(sizes) - 1),
        (TYPE, code),
        (TF32, tf32),
        (INTERLEAVE, INTERLEAVES.index(interleave)),
        (SWIZZLE, SPANS.index(form.span)),
        (ATOMICITY, ATOMS.index((form.atom, form.flip))),
        (FILL, int(nan)),
    ):
        f.put(w, value)
    for fields, values in ((SIZES, sizes), (BOX, box), (STEPS, steps or ())):
        for f, value in zip(fields, values, strict=False):
            f.put(w, value - 1)
    for d, value in enumerate(strides):
        put_stride(w, d, value)
    if im2col is not None:
        bits = CORNER_BITS[len(sizes)]
        PIXELS.put(w, im2col.pixels - 1)
        for shift, corner in ((0, im2col.lower), (16, im2col.upper)):
            for d, value in enumerate(corner):
                Field(7, shift + bits * d, bits).put(w, value)
    return np.array(w, "<u8").tobytes()
