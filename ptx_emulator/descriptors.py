"""Matrix descriptors of wgmma and tcgen05, and the bytes in shared memory that they describe.

PTX ISA, "Asynchronous warpgroup-level matrix instructions: Matrix Descriptor Format" and "tcgen05: Shared memory
descriptor": start address, leading and stride byte offsets in units of 16 bytes, and a swizzle.

K-major: rows of MN, each a run along K. Eight rows make a group, SBO apart from the next. Without swizzle a row of the
group holds 16 bytes and the next 16 along K are LBO further on; with a swizzle of s bytes it holds s.
MN-major: the same with the roles exchanged: a run along MN per k. A swizzled run holds s bytes of MN, the next s are
LBO further on, and the next eight k are SBO further on; without swizzle a run holds 16 bytes of MN, the next 16 are
SBO further on and the next eight k LBO.
"""

from dataclasses import dataclass

import numpy as np

from .errors import Fault
from .memory import SharedMemory
from .numbers import Array
from .tensormap import swizzled


@dataclass(frozen=True, slots=True)
class MatrixDescriptor:
    """Bytes."""

    start: int
    leading: int
    stride: int
    swizzle: int


def _fields(word: int) -> tuple[int, int, int]:
    return (word & 0x3FFF) << 4, (word >> 16 & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4


def hopper(word: int) -> MatrixDescriptor:
    """wgmma: swizzle in bits 62-63."""
    if word >> 49 & 7:
        raise Fault(f"matrix descriptor {word:#x} with base offset {word >> 49 & 7} is not executed")
    return MatrixDescriptor(*_fields(word), {0: 0, 1: 128, 2: 64, 3: 32}[word >> 62])


def blackwell(word: int) -> MatrixDescriptor:
    """tcgen05: bits 46-48 are 1, swizzle in bits 61-63."""
    if word >> 46 & 7 != 1:
        raise Fault(f"shared memory descriptor {word:#x}: bits 46-48 must be 1")
    if word >> 49 & 7 or word >> 52 & 1 or word >> 53 & 0xFF:
        raise Fault(f"shared memory descriptor {word:#x} with base offset or absolute leading offset is not executed")
    swizzles = {0: 0, 2: 128, 4: 64, 6: 32}
    if word >> 61 not in swizzles:
        raise Fault(f"shared memory descriptor {word:#x} with swizzle {word >> 61} is not known")
    return MatrixDescriptor(*_fields(word), swizzles[word >> 61])


def k_major(d: MatrixDescriptor, rows: int, row_bytes: int) -> Array:
    """Offsets of an operand's bytes, [rows of MN, row_bytes of K]."""
    r, b = np.arange(rows)[:, None], np.arange(row_bytes)[None, :]
    if d.swizzle == 0:
        return d.start + r // 8 * d.stride + r % 8 * 16 + b // 16 * d.leading + b % 16
    if d.start % d.swizzle + row_bytes > d.swizzle:
        raise Fault(f"{row_bytes} bytes along K from {d.start:#x} run over the swizzled row of {d.swizzle}")
    return swizzled(d.start + r // 8 * d.stride + r % 8 * d.swizzle + b, d.swizzle)


def mn_major(d: MatrixDescriptor, rows: int, columns: int, element: int) -> Array:
    """Offsets of an operand's bytes, [rows of MN, columns of K, bytes of an element]."""
    r, k = np.arange(rows)[:, None, None], np.arange(columns)[None, :, None]
    byte = r * element + np.arange(element)[None, None, :]
    if d.swizzle == 0:
        return d.start + byte // 16 * d.stride + byte % 16 + k % 8 * 16 + k // 8 * d.leading
    span = d.swizzle
    offset = d.start + byte // span * d.leading + byte % span + k % 8 * span + k // 8 * d.stride
    return swizzled(offset, span)


def read_k_major(shared: SharedMemory, d: MatrixDescriptor, rows: int, row_bytes: int) -> Array:
    """[rows, row_bytes]"""
    return shared.gather(k_major(d, rows, row_bytes))


def read_mn_major(shared: SharedMemory, d: MatrixDescriptor, rows: int, columns: int, element: int) -> Array:
    """[rows, columns * element]"""
    return shared.gather(mn_major(d, rows, columns, element)).reshape(rows, columns * element)
