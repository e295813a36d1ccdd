"""The 128-byte tensor map of TMA, as compiled CuTe DSL host code packs it, and the copies it describes.

PTX ISA, "Tensor": tiled mode; a box of elements at given coordinates, what lies outside of the tensor read as zero
and never written. The encoding is not documented. It was read off the host code that packs it, over all element types
and swizzles; little-endian 64-bit words:

    0      address (multiple of 16)
    1      bits 0-3 = 2, 4-6 rank - 1, 7-10 element type, 11-12 interleave, 13-15 swizzle, 16 TF32, 17-18 L2 promotion,
           21 tensor of 128 KiB or more, 32-63 stride of dimension 1 / 16
    2, 3   strides of dimensions 2, 3 and 4 / 16, 32 bits each; the top of word 3 has four more bits of each stride
    4 - 6  sizes - 1, 32 bits each
    6, 7   bits 32-55 of word 6: element strides - 1, three bits each; its top byte and the low four of word 7: box - 1
"""

from dataclasses import dataclass

import numpy as np

from .errors import Fault
from .memory import GlobalMemory
from .numbers import Array

BYTES = 128
# element type -> bits
_TYPE_BITS = {0: 8, 1: 16, 2: 32, 3: 32, 4: 64, 5: 64, 6: 16, 7: 32, 8: 32, 9: 64, 10: 16, 11: 4}
SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}  # field -> bytes of a swizzled row
_VERSION = 2


@dataclass(frozen=True, slots=True)
class TensorMap:
    """strides[0] is that of dimension 1, in bytes; box and sizes in elements, dimension 0 first."""

    address: int
    bits: int
    element_type: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def rank(self) -> int:
        return len(self.sizes)

    @property
    def row_bytes(self) -> int:
        return self.box[0] * self.bits // 8

    @property
    def box_bytes(self) -> int:
        return int(np.prod(self.box)) * self.bits // 8


def decode(raw: Array) -> TensorMap:
    """128 bytes -> TensorMap. Raises Fault for what is not such a map, or not executed."""
    w = [int(x) for x in np.frombuffer(raw.tobytes(), np.uint64)]
    if len(w) != 16 or w[1] & 15 != _VERSION:
        raise Fault(f"not a tensor map: word 1 is {w[1]:#x}")
    rank = (w[1] >> 4 & 7) + 1
    element_type, swizzle = w[1] >> 7 & 15, w[1] >> 13 & 7
    if element_type not in _TYPE_BITS or rank > 5:
        raise Fault(f"tensor map with element type {element_type} and rank {rank} is not known")
    if w[1] >> 11 & 3:
        raise Fault("interleaved tensor maps are not executed")
    if swizzle not in SWIZZLES:
        raise Fault(f"tensor map with swizzle {swizzle} is not known")
    high = [w[3] >> 32 + 4 * d & 15 for d in range(4)]
    low = [w[1] >> 32, w[2] & 0xFFFFFFFF, w[2] >> 32, w[3] & 0xFFFFFFFF]
    strides = [((h << 32) | x) * 16 for h, x in zip(high, low, strict=True)]
    sizes = [w[4] & 0xFFFFFFFF, w[4] >> 32, w[5] & 0xFFFFFFFF, w[5] >> 32, w[6] & 0xFFFFFFFF]
    steps = [w[6] >> 32 + 3 * d & 7 for d in range(5)]
    if any(steps[:rank]):
        raise Fault(f"tensor map with element strides {[s + 1 for s in steps[:rank]]} is not executed")
    box = [w[6] >> 56, *(w[7] >> 8 * d & 255 for d in range(4))]
    found = TensorMap(
        address=w[0],
        bits=_TYPE_BITS[element_type],
        element_type=element_type,
        sizes=tuple(s + 1 for s in sizes[:rank]),
        strides=tuple(strides[: rank - 1]),
        box=tuple(b + 1 for b in box[:rank]),
        swizzle=SWIZZLES[swizzle],
    )
    if found.address % 16 or found.row_bytes % 16:
        raise Fault(f"tensor map at {found.address:#x} with rows of {found.row_bytes} bytes: multiples of 16 required")
    if found.swizzle and found.row_bytes != found.swizzle:
        raise Fault(f"a box row of {found.row_bytes} bytes with a swizzle of {found.swizzle} is not executed")
    return found


@dataclass(frozen=True, slots=True)
class Box:
    """A box at coordinates: global addresses of its rows, which of them lie inside, and which bytes of a row do."""

    rows: Array
    inside: Array
    first: int
    last: int


def place(t: TensorMap, coordinates: tuple[int, ...], rows: tuple[int, ...] | None = None) -> Box:
    """rows: indices along dimension 1 in place of a run of them (gather4 and scatter4)."""
    axes = [np.arange(c, c + b) for c, b in zip(coordinates[1:], t.box[1:], strict=True)]
    if rows is not None:
        axes = [np.array(rows)]
    address, inside = np.zeros(1, np.int64), np.ones(1, bool)
    for axis, stride, size in zip(reversed(axes), reversed(t.strides), reversed(t.sizes[1:]), strict=True):
        address = (address[:, None] + (axis * stride)[None, :]).reshape(-1)
        inside = (inside[:, None] & ((axis >= 0) & (axis < size))[None, :]).reshape(-1)
    start = coordinates[0] * t.bits
    if start % 8:
        raise Fault(f"coordinate {coordinates[0]} of {t.bits}-bit elements is inside of a byte")
    first = min(max(0, -(start // 8)), t.row_bytes)
    last = max(min(t.row_bytes, t.sizes[0] * t.bits // 8 - start // 8), first)
    return Box(address + t.address + start // 8, inside, first, last)


def read(t: TensorMap, box: Box, memory: GlobalMemory) -> Array:
    """[rows, row_bytes], zero outside of the tensor."""
    out = np.zeros((len(box.rows), t.row_bytes), np.uint8)
    rows, width = box.rows[box.inside] + box.first, box.last - box.first
    if len(rows) and width:
        low, high = int(rows.min()), int(rows.max())
        block = memory.find(low, high + width - low)
        index = (rows - block.base)[:, None] + np.arange(width)
        memory.note(block, index)
        out[box.inside, box.first : box.last] = block.data[index]
        memory.loaded += len(rows) * width
    return out


def write(t: TensorMap, box: Box, memory: GlobalMemory, values: Array) -> None:
    rows, width = box.rows[box.inside] + box.first, box.last - box.first
    if len(rows) and width:
        low, high = int(rows.min()), int(rows.max())
        block = memory.find(low, high + width - low, write=True)
        index = (rows - block.base)[:, None] + np.arange(width)
        memory.note(block, index, write=True)
        block.data[index] = values[box.inside, box.first : box.last]
        memory.stored += len(rows) * width


def shared_index(t: TensorMap, offset: int, rows: int) -> Array:
    """Offsets in shared memory of the bytes of a box, [rows, row_bytes]."""
    if offset % 128:
        raise Fault(f"TMA box at shared address {offset:#x}, which is not a multiple of 128")
    index = offset + np.arange(rows * t.row_bytes).reshape(rows, t.row_bytes)
    return swizzled(index, t.swizzle)


def swizzled(address: Array, span: int) -> Array:
    """PTX ISA, "Swizzling modes": 16-byte chunks of a row of `span` bytes, permuted by the row's place in eight."""
    chunks = span // 16
    return address ^ ((address >> 7 & chunks - 1) << 4) if span else address


def encode(
    address: int,
    element_type: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int = 0,
) -> bytes:
    """The map as `decode` reads it. strides in bytes, from dimension 1 on."""
    rank = len(sizes)
    field = {v: k for k, v in SWIZZLES.items()}[swizzle]
    s = [*strides, 0, 0, 0, 0][:4]
    n = [x - 1 for x in sizes] + [0] * (5 - rank)
    b = [x - 1 for x in box] + [0] * (5 - rank)
    w = [0] * 16
    w[0] = address
    w[1] = _VERSION | (rank - 1) << 4 | element_type << 7 | field << 13 | 2 << 17 | (s[0] >> 4 & 0xFFFFFFFF) << 32
    w[2] = (s[1] >> 4 & 0xFFFFFFFF) | (s[2] >> 4 & 0xFFFFFFFF) << 32
    w[3] = (s[3] >> 4 & 0xFFFFFFFF) | sum((x >> 36 & 15) << 32 + 4 * d for d, x in enumerate(s))
    w[4], w[5] = n[0] | n[1] << 32, n[2] | n[3] << 32
    w[6] = n[4] | b[0] << 56
    w[7] = sum(x << 8 * d for d, x in enumerate(b[1:]))
    return np.array(w, np.uint64).tobytes()
