"""Matrix descriptors of wgmma and tcgen05, the bytes in shared memory that they describe, and tcgen05's instruction
descriptor.

PTX ISA, "Asynchronous warpgroup-level matrix instructions: Matrix Descriptor Format" and "tcgen05: Shared memory
descriptor": start address, leading and stride byte offsets in units of 16 bytes, and a swizzle.

K-major: rows of MN, each a run along K. Eight rows make a group, SBO apart from the next. Without swizzle a row of the
group holds 16 bytes and the next 16 along K are LBO further on; with a swizzle of s bytes it holds s.
MN-major: the same with the roles exchanged: a run along MN per k. A swizzled run holds s bytes of MN, the next s are
LBO further on, and the next eight k (four where 32 bytes stay together) are SBO further on; without swizzle a run holds
16 bytes of MN, the next 16 are SBO further on and the next eight k LBO.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import Fault, UnknownInstructionError
from .memory import SharedMemory
from .numbers import Array

CHUNK = 16  # bytes that every layout leaves together
Refuse = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MatrixDescriptor:
    """Bytes; swizzle: of a row, atom: that stay together in it; base: number of the 128-byte row, of eight, at which
    the swizzle's pattern starts.
    """

    start: int
    leading: int
    stride: int
    swizzle: int
    atom: int = CHUNK
    base: int = 0

    def swizzled(self, address: Array) -> Array:
        """PTX ISA, "Swizzling modes": the atoms of a row change places by the row's number in the pattern."""
        if not self.swizzle:
            return address
        places = self.swizzle // self.atom
        return address ^ ((address >> 7) - self.base & places - 1) * self.atom


def _fields(word: int) -> tuple[int, int, int]:
    return (word & 0x3FFF) << 4, (word >> 16 & 0x3FFF) << 4, (word >> 32 & 0x3FFF) << 4


def hopper(word: int) -> MatrixDescriptor:
    """wgmma: swizzle in bits 62-63."""
    return MatrixDescriptor(*_fields(word), {0: 0, 1: 128, 2: 64, 3: 32}[word >> 62], base=word >> 49 & 7)


def blackwell(word: int) -> MatrixDescriptor:
    """tcgen05: bits 46-48 are 1, swizzle in bits 61-63."""
    problem = ""
    if word >> 46 & 7 != 1:
        problem = "bits 46-48 must be 1"
    elif word >> 53 & 0xFF:
        problem = "bits 53-60 must be 0"
    elif word >> 52 & 1:
        problem = "an absolute leading dimension address needs sm_103a"
    elif word >> 61 not in _SWIZZLES:
        problem = f"swizzle {word >> 61} is none"
    elif word >> 49 & 7 and not word >> 61:
        problem = f"base offset {word >> 49 & 7} without a swizzle"
    if problem:
        raise Fault(f"shared memory descriptor {word:#x}: {problem}")
    return MatrixDescriptor(*_fields(word), *_SWIZZLES[word >> 61], base=word >> 49 & 7)


_SWIZZLES = {0: (0, CHUNK), 1: (128, 32), 2: (128, CHUNK), 4: (64, CHUNK), 6: (32, CHUNK)}  # row, atom


def k_major(d: MatrixDescriptor, rows: int, row_bytes: int) -> Array:
    """Offsets of an operand's bytes, [rows of MN, row_bytes of K]."""
    r, b = np.arange(rows)[:, None], np.arange(row_bytes)[None, :]
    if d.swizzle == 0:
        return d.start + r // 8 * d.stride + r % 8 * CHUNK + b // CHUNK * d.leading + b % CHUNK
    if d.atom != CHUNK:
        raise UnknownInstructionError("the emulator does not know K-major operands swizzled with 32-byte atomicity")
    _check_row(d, row_bytes, "K")
    return d.swizzled(d.start + r // 8 * d.stride + r % 8 * d.swizzle + b)


def mn_major(d: MatrixDescriptor, rows: int, columns: int, element: int) -> Array:
    """Offsets of an operand's bytes, [rows of MN, columns of K, bytes of an element]."""
    r, k = np.arange(rows)[:, None, None], np.arange(columns)[None, :, None]
    byte = r * element + np.arange(element)[None, None, :]
    if d.swizzle == 0:
        return d.start + byte // CHUNK * d.stride + byte % CHUNK + k % 8 * CHUNK + k // 8 * d.leading
    span, depth = d.swizzle, 8 if d.atom == CHUNK else 4
    _check_row(d, min(rows * element, span), "M or N")
    return d.swizzled(d.start + byte // span * d.leading + byte % span + k % depth * span + k // depth * d.stride)


def _check_row(d: MatrixDescriptor, count: int, along: str) -> None:
    if d.start % d.swizzle + count > d.swizzle:
        raise Fault(f"{count} bytes along {along} from {d.start:#x} run over the swizzled row of {d.swizzle}")


def read_k_major(shared: SharedMemory, d: MatrixDescriptor, rows: int, row_bytes: int) -> Array:
    """[rows, row_bytes]"""
    return shared.gather(k_major(d, rows, row_bytes))


def read_mn_major(shared: SharedMemory, d: MatrixDescriptor, rows: int, columns: int, element: int) -> Array:
    """[rows, columns * element]"""
    return shared.gather(mn_major(d, rows, columns, element)).reshape(rows, columns * element)


# --- zero-column mask descriptor of tcgen05.mma.ws ---


def zero_columns(word: int, n: int, shares: int) -> tuple[Array, int]:
    """PTX ISA, "Zero-Column Mask Descriptor": which columns of B count as zero, [n], and how far the first lies from
    where B's descriptor points. Spans of columns that are used and that are zero take turns, in each share of N from a
    place of its own on. (Of the two lengths the table says the contrary of its examples; CUTLASS agrees with these.)
    """
    first, start = [word >> 32 + i & 1 for i in range(shares)], [word >> 8 * i & 255 for i in range(shares)]
    zeros, used, shift = (word >> 40 & 255) + 1, (word >> 48 & 255) + 1, word >> 56 & 63
    if word >> 36 & 7 or word >> 62:
        raise Fault(f"zero-column mask descriptor {word:#x}: reserved bits are set")
    if shift > (16 if shares == 4 else 32):
        raise Fault(f"zero-column mask descriptor {word:#x}: a shift of {shift} with M = {128 // shares}")
    if not word >> 39 & 1:
        return np.zeros(n, bool), shift
    at = np.arange(n // shares)
    parts = []
    for begins_zero, skipped in zip(first, start, strict=True):
        place = (at + skipped) % (zeros + used)
        parts.append(place < zeros if begins_zero else place >= used)
    return np.concatenate(parts), shift


# --- elements of 4 and 6 bits among those of 8 (PTX ISA, "Packing formats of elements in Tensor and Shared memory") ---
#
# Shared memory: sixteen packed elements, then padding up to 16 bytes, which nobody reads. Tensor memory: an element a
# byte, in its middle: 00xxxx00 and 0xxxxxx0.


def unpacked(shared: SharedMemory, chunks: Array, bits: int) -> Array:
    """Offsets of the bytes of chunks, [..., 16] -> the sixteen codes of each."""
    raw = shared.gather(np.ascontiguousarray(chunks[..., : 2 * bits]))
    single = np.unpackbits(raw, axis=-1, bitorder="little").reshape(*raw.shape[:-1], 16, bits)
    return (single << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


def contained(codes: Array, bits: int) -> Array:
    """Codes -> bytes of tensor memory."""
    return codes << np.uint8((8 - bits) // 2)


def uncontained(raw: Array, bits: int) -> Array:
    """Bytes of tensor memory -> codes. Raises Fault for padding that is not zero."""
    codes = raw >> np.uint8((8 - bits) // 2)
    if (contained(codes, bits) != raw).any() or (codes >> np.uint8(bits)).any():
        raise Fault(f"an element of {bits} bits in tensor memory whose byte has other bits set")
    return codes


# --- instruction descriptor of tcgen05.mma ---


@dataclass(frozen=True, slots=True)
class Kind:
    """K of one instruction, bits of an element, element types by their code, types of D."""

    name: str
    k: int
    bits: int
    elements: dict[int, str]
    results: dict[int, str]
    transposes: bool = True
    scaled: bool = False


_NARROW = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
_FLOATS = {0: "f16", 1: "f32"}
KINDS = {
    kind.name: kind
    for kind in (
        Kind("f16", 16, 16, {0: "f16", 1: "bf16"}, _FLOATS),
        Kind("tf32", 8, 32, {2: "tf32"}, {1: "f32"}),
        Kind("f8f6f4", 32, 8, _NARROW, _FLOATS),
        Kind("i8", 32, 8, {0: "u8", 1: "s8"}, {2: "s32"}),
        Kind("mxf8f6f4", 32, 8, _NARROW, {}, scaled=True),
        Kind("mxf4", 64, 4, {1: "e2m1"}, {}, transposes=False, scaled=True),
        Kind("mxf4nvf4", 64, 4, {1: "e2m1"}, {}, transposes=False, scaled=True),
    )
}


@dataclass(frozen=True, slots=True)
class InstructionDescriptor:
    """PTX ISA, "Instruction descriptor"."""

    m: int
    n: int
    a: str
    b: str
    d: str
    a_major: bool
    b_major: bool
    a_negated: bool
    b_negated: bool
    saturates: bool = False
    a_scale: int = 0
    b_scale: int = 0
    ue8m0: bool = False
    selector: int = 0


def instruction_descriptor(
    kind: Kind, word: int, ctas: int, stationary: bool, vector: int, sparse: bool = False
) -> InstructionDescriptor:
    """stationary: of .ws; vector: elements of a scale; sparse: of .sp. Raises Fault for what "Matrix Shape", "Transpose
    and Negate operations" and "Valid combinations of scale_vectorsize" do not allow.
    """

    def refuse(why: str) -> None:
        raise Fault(f"instruction descriptor {word:#x} of kind::{kind.name}: {why}")

    if bool(word >> 2 & 1) != sparse:
        refuse("says sparse, the instruction is dense" if word >> 2 & 1 else "says dense, the instruction is sparse")
    reserved = (0 if sparse else 0b0011) | 1 << 6
    if kind.scaled:
        # bit 12 is reserved for the FP4 kinds, but CuTe DSL's own builder sets it (E2M1 as 5, of three bits)
        reserved |= 0b1000 | 7 << 24 | (0 if kind.bits == 4 else 1 << 31)
        if kind.bits == 4 and word >> 31:
            refuse("K = 96 needs sm_103a")
    else:
        reserved |= 1 << 23 | 1 << 29 | (0 if stationary else 3 << 30) | (0 if kind.name == "i8" else 0b1000)
    if word & reserved:
        refuse(f"reserved bits {word & reserved:#x} are set")

    codes = (word >> 7 & 7, word >> 10 & (3 if kind.bits == 4 else 7))
    for code in codes:
        if code not in kind.elements:
            refuse(f"element type {code} is none")
    if not kind.scaled and word >> 4 & 3 not in kind.results:
        refuse(f"type {word >> 4 & 3} of D is none")
    d = "f32" if kind.scaled else kind.results[word >> 4 & 3]
    found = InstructionDescriptor(
        m=(word >> 27 & 3) << 7 if kind.scaled else (word >> 24 & 31) << 4,
        n=(word >> 17 & 63) << 3,
        a=kind.elements[codes[0]],
        b=kind.elements[codes[1]],
        d=d,
        a_major=bool(word >> 15 & 1),
        b_major=bool(word >> 16 & 1),
        a_negated=bool(word >> 13 & 1),
        b_negated=bool(word >> 14 & 1),
        saturates=bool(word >> 3 & 1),
        a_scale=word >> 29 & 3 if kind.scaled else 0,
        b_scale=word >> 4 & 3 if kind.scaled else 0,
        ue8m0=bool(word >> 23 & 1),
        selector=word & 3,
    )
    if kind.name == "f16" and d == "f16" and (found.a, found.b) != ("f16", "f16"):
        refuse("D in FP16 needs A and B in FP16")
    if kind.name == "i8" and (found.a_negated or found.b_negated):
        refuse("integers are not negated")
    if not kind.transposes and (found.a_major or found.b_major):
        refuse("FP4 operands must be K-major")
    _check_shape(kind, found, ctas, stationary, refuse)
    if kind.scaled:
        _check_scales(kind, found, vector, refuse)
    return found


def _check_shape(kind: Kind, d: InstructionDescriptor, ctas: int, stationary: bool, refuse: Refuse) -> None:
    heights: tuple[int, ...]
    if stationary:
        heights, widths = (32, 64, 128), {64, 128, 256}
    else:
        heights = (128, 256) if ctas == 2 else (128,) if kind.scaled else (64, 128)
        step = 8 * ctas
        widths = set(range(step, 257, step))
        if kind.name == "i8":
            widths = set(range(32, 257, 32)) if ctas == 2 else {8, 24, *range(16, 257, 16)}
        if kind.bits == 8 and d.b_major:
            widths &= set(range(16 * ctas, 257, 16 * ctas))
    if d.m not in heights:
        refuse(f"M = {d.m} with {ctas} CTAs")
    if d.n not in widths:
        refuse(f"N = {d.n} with M = {d.m}")


def _check_scales(kind: Kind, d: InstructionDescriptor, vector: int, refuse: Refuse) -> None:
    if not d.ue8m0 and vector != 16:
        refuse("scales of 32 elements are UE8M0")
    count = kind.k // vector
    for scale_id in (d.a_scale, d.b_scale):
        if scale_id % count:
            refuse(f"scale factor id {scale_id} with {count} scales a row")
