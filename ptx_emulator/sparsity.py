"""Sparse operands A: half of the elements of a row are stored, indices of 4 bits say where they belong (PTX ISA,
"Sparse matrix storage" of mma.sp and wgmma.sp, "Sparse Matrices" of tcgen05).

An index is of four elements, two of which are there: the place of the first in its lower, that of the second in its
upper half. Of 32-bit elements it is of two, one of which is there, and as if each were two halves.
"""

import numpy as np

from .errors import Fault
from .machine import LANES
from .numbers import U32, Array

_PAIRS = {0b0100: (0,), 0b1110: (1,)}
_FOURS = {first | second << 2: (first, second) for first in range(4) for second in range(4) if first != second}
ORDERED = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
ANY = tuple(_FOURS)


def places(indices: Array, pairs: bool, allowed: tuple[int, ...] = ANY) -> Array:
    """Where in K the stored elements belong, [rows, k / 2]. pairs: one of two, else two of four. Raises Fault for an
    index that is not allowed.
    """
    meaning: dict[int, tuple[int, ...]] = dict(_PAIRS) if pairs else {index: _FOURS[index] for index in allowed}
    strange = ~np.isin(indices, list(meaning))
    if strange.any():
        raise Fault(f"{int(indices[strange][0]):#06b} in the metadata of a sparse operand means nothing")
    each = 1 if pairs else 2
    table = np.array([meaning.get(index, (0,) * each) for index in range(16)])
    at = table[indices] + 2 * each * np.arange(indices.shape[1])[:, None]  # [rows, chunks, each]
    return at.reshape(len(indices), -1)


def expanded(values: Array, indices: Array, pairs: bool, allowed: tuple[int, ...] = ANY) -> Array:
    """values [rows, k / 2] among their zeros, [rows, k]; otherwise as `places`."""
    out = np.zeros((len(values), 2 * values.shape[1]))
    out[np.arange(len(values))[:, None], places(indices, pairs, allowed)] = values
    return out


def chosen(b: Array, at: Array) -> Array:
    """Of B [n, k] what each row of A meets, [rows, n, k / 2]: what it does not meet is not multiplied by zero, and
    infinities there are of no effect.
    """
    return np.ascontiguousarray(b.T[at].transpose(0, 2, 1))


def nibbles(words: Array) -> Array:
    """[..., 8], the lowest first"""
    return np.stack([words >> U32(shift) & U32(15) for shift in range(0, 32, 4)], -1)


def per_row(k: int, size: int) -> int:
    """Indices of a row of k elements of `size` bytes."""
    return k // (2 if size == 4 else 4)


def selectors(count: int) -> int:
    """Sparsity selectors there are for `count` indices a row."""
    return 16 // count


def of_warp(words: Array, count: int, selector: int, size: int) -> Array:
    """Indices of a warp's 16 rows from the metadata in a register of its lanes, [16, count] with 4, 8 or 16 of them,
    of elements of `size` bytes (the figures of "Matrix fragments for sparse mma" and "sparse wgmma.mma_async", as
    CUTLASS has them in its `ELayout`s; an H100 does the same).

    Of four lanes (g, q) each has half a row of 16, row g + 8 (q % 2) and half q / 2 of K. Of 8, lane q = 2 selector + h
    has half h of K, of row g in its lower 16 bits and of row g + 8 in the upper, or, of bytes, all of row g + 8 h; of
    4, lane q = selector has all of both rows.
    """
    codes = nibbles(words).reshape(LANES // 4, 4, 8)  # [g, q, index]
    if count == 16:
        return codes.reshape(8, 2, 2, 8).transpose(2, 0, 1, 3).reshape(16, 16)
    if count == 4:
        return codes[:, selector].reshape(8, 2, 4).transpose(1, 0, 2).reshape(16, 4)
    pair = codes[:, 2 * selector : 2 * selector + 2]
    if size == 1:
        return pair.transpose(1, 0, 2).reshape(16, 8)
    pair = pair.reshape(8, 2, 2, 4)  # [g, half of K, half of the rows, index]
    return pair.transpose(2, 0, 1, 3).reshape(16, 8)
