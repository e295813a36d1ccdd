"""ldmatrix, stmatrix, movmatrix and mma.sync (PTX ISA, "Warp-level matrix instructions").

Fragments: with g = lane / 4 and q = lane % 4, a lane holds of an 8 x 8 matrix of 16-bit elements row g, columns 2q and
2q + 1. mma.m16n8k16 and its kin hold their operands in such pieces. mma.sp has the fragments of wgmma.sp.
"""

from collections.abc import Callable

import numpy as np

from .. import numbers, tensorcore
from ..errors import Fault
from ..machine import LANE, LANES, Warp
from ..memory import split_shared
from ..numbers import SMALL, U32, Array
from ..parser import Instruction
from ..program import DTYPES, Mask, Program, Run, constant, decoder, unknown
from ..sparsity import ANY, ORDERED, chosen, of_warp, per_row, places, selectors
from .arithmetic import fma_f64
from .data import shared_of

_ROW_BYTES = 16  # of a row of eight 16-bit elements
GROUP, QUAD = (LANE // 4).astype(np.int64), (LANE % 4).astype(np.int64)


def _rows(w: Warp, address: Array, count: int) -> tuple[Array, int]:
    """Offsets of the 8 * count rows of 16 bytes, whose addresses the first lanes hold, and the rank."""
    rank, offset = split_shared(address[: 8 * count])
    if (offset % 16).any():
        raise Fault(f"matrix row at shared address {int(offset[offset % 16 != 0][0]):#x}, not a multiple of 16")
    if not (rank == rank[0]).all():
        raise Fault("matrix rows in several CTAs")
    return offset[:, None] + np.arange(16), int(rank[0])


def _store_rows(w: Warp, rank: int, index: Array, rows: Array) -> None:
    """Rows of 16 bytes to the offsets that `_rows` gave: a store as any other of a warp."""
    shared_of(w, rank).shared.store(index[:, 0], 4, list(rows.view(np.uint32).T))


def _shape(i: Instruction) -> int:
    if "m8n8" not in i.op or i.op[-1] != "b16":
        raise unknown(i)
    return int(next(x for x in i.op if x in ("x1", "x2", "x4"))[1:])


@decoder("ldmatrix")
def _ldmatrix(i: Instruction, p: Program) -> Run:
    if "m16n16" in i.op:
        return _ldmatrix_bytes(i, p)
    count, transposed = _shape(i), "trans" in i.op
    writes, address = [p.target(x, "b32") for x in p.vector(i.operands[0])], p.address(i.operands[1])

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "ldmatrix is executed by a divergent warp"
        a = address(w)
        index, rank = _rows(w, a, count)
        w.cta.cluster.launch.banks.access(w, a[: 8 * count], None, _ROW_BYTES)
        words = shared_of(w, rank).shared.gather(index).view(np.uint16).reshape(count, 8, 8)
        for j, write in enumerate(writes):
            matrix = words[j].T if transposed else words[j]
            pair = matrix[GROUP[:, None], 2 * QUAD[:, None] + np.arange(2)]
            write(w, np.ascontiguousarray(pair).view(U32).reshape(LANES), m)
        return None

    return run


def _ldmatrix_bytes(i: Instruction, p: Program) -> Run:
    """16 x 16 bytes, transposed: a lane's registers hold rows 4q to 4q + 3 of columns g and g + 8."""
    if i.op[3:] not in {
        ("m16n16", n, "trans", space, "b8") for n in ("x1", "x2") for space in ("shared", "shared:cta")
    }:
        raise unknown(i)
    count = int(i.op[4][1:])
    writes, address = [p.target(x, "b32") for x in p.vector(i.operands[0])], p.address(i.operands[1])
    if len(writes) != 2 * count:
        raise unknown(i, f"{len(writes)} registers")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "ldmatrix is executed by a divergent warp"
        a = address(w)
        index, rank = _rows(w, a, 2 * count)
        w.cta.cluster.launch.banks.access(w, a[: 16 * count], None, _ROW_BYTES)
        matrices = shared_of(w, rank).shared.gather(index).reshape(count, 16, 16)
        for j, write in enumerate(writes):
            column = GROUP + 8 * (j % 2)
            four = matrices[j // 2][4 * QUAD[:, None] + np.arange(4), column[:, None]]
            write(w, np.ascontiguousarray(four).view(U32).reshape(LANES), m)
        return None

    return run


@decoder("stmatrix")
def _stmatrix(i: Instruction, p: Program) -> Run:
    if "m16n8" in i.op:
        return _stmatrix_bytes(i, p)
    count, transposed = _shape(i), "trans" in i.op
    address, reads = p.address(i.operands[0]), [p.source(x, "b32") for x in p.vector(i.operands[1])]

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "stmatrix is executed by a divergent warp"
        a = address(w)
        index, rank = _rows(w, a, count)
        w.cta.cluster.launch.banks.access(w, a[: 8 * count], None, _ROW_BYTES)
        words = np.zeros((count, 8, 8), np.uint16)
        for j, read in enumerate(reads):
            lanes = np.ascontiguousarray(read(w))  # one number for all lanes where the operand is a constant
            pair = lanes.view(np.uint16).reshape(LANES, 2)
            matrix = np.zeros((8, 8), np.uint16)
            matrix[GROUP[:, None], 2 * QUAD[:, None] + np.arange(2)] = pair
            words[j] = matrix.T if transposed else matrix
        _store_rows(w, rank, index, words.view(np.uint8).reshape(count * 8, 16))
        return None

    return run


def _stmatrix_bytes(i: Instruction, p: Program) -> Run:
    """16 x 8 bytes, transposed: a lane's register holds columns 2q and 2q + 1 of rows g, and then of g + 8."""
    if not p.arch.startswith("sm_10") or i.op[3:] not in {
        ("m16n8", n, "trans", space, "b8") for n in ("x1", "x2", "x4") for space in ("shared", "shared:cta")
    }:
        raise unknown(i)
    count = int(i.op[4][1:])
    address, reads = p.address(i.operands[0]), [p.source(x, "b32") for x in p.vector(i.operands[1])]
    if len(reads) != count:
        raise unknown(i, f"{len(reads)} registers")
    byte = np.arange(4)
    column, row = 2 * QUAD[:, None] + byte % 2, GROUP[:, None] + 8 * (byte // 2)

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "stmatrix is executed by a divergent warp"
        a = address(w)
        index, rank = _rows(w, a, count)
        w.cta.cluster.launch.banks.access(w, a[: 8 * count], None, _ROW_BYTES)
        stored = np.zeros((count, 8, 16), np.uint8)
        for j, read in enumerate(reads):
            stored[j, column, row] = read(w).view(np.uint8).reshape(LANES, 4)
        _store_rows(w, rank, index, stored.reshape(count * 8, 16))
        return None

    return run


@decoder("movmatrix")
def _movmatrix(i: Instruction, p: Program) -> Run:
    read, write = p.source(i.operands[1], "b32"), p.target(i.operands[0], "b32")

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "movmatrix is executed by a divergent warp"
        matrix = np.zeros((8, 8), np.uint16)
        matrix[GROUP[:, None], 2 * QUAD[:, None] + np.arange(2)] = read(w).view(np.uint16).reshape(LANES, 2)
        pair = matrix.T[GROUP[:, None], 2 * QUAD[:, None] + np.arange(2)]
        write(w, np.ascontiguousarray(pair).view(U32).reshape(LANES), m)
        return None

    return run


def element_values(kind: str) -> tuple[int, Callable[[Array], Array]]:
    """Bytes of an element of an MMA operand and its value in FP64 from raw unsigned integers."""
    if kind == "f16":
        return 2, lambda x: x.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return 2, lambda x: numbers.from_bf16(x).astype(np.float64)
    if kind == "tf32":
        return 4, lambda x: numbers.to_tf32(x.view(np.float32)).astype(np.float64)
    if kind in ("e4m3", "e5m2"):
        return 1, lambda x: SMALL[kind].decode(x).astype(np.float64)
    if kind == "f64":
        return 8, lambda x: x.view(np.float64)
    if kind in ("s8", "u8"):
        return 1, lambda x: x.view(np.int8 if kind == "s8" else np.uint8).astype(np.float64)
    raise KeyError(kind)


def multiply(a: Array, b: Array, c: Array, operands: tuple[str, str], result: str, saturate: bool) -> Array:
    """mma.sync of FP64 values, [m, k], [n, k] and [m, n]; of the result's type, f32 for sums of FP16, BF16 and TF32.

    With a sparse A as `tensorcore.step`.
    """
    if result == "f64":
        for k in range(a.shape[1]):
            left, right = np.broadcast_arrays(a[:, k, None], b[None, :, k])
            c = fma_f64(left.ravel(), right.ravel(), c.ravel()).reshape(c.shape)
        return c
    if result == "s32":
        return tensorcore.integers(a, b, c, saturate)
    if operands[0] in ("e4m3", "e5m2"):
        return tensorcore.mma_fp8(a, b, c, result)
    return tensorcore.step(a, b, c, operands, result)


# of mma.sp: which indices mean something
_METADATA = {"sp": ANY, "sp:ordered_metadata": ORDERED}
_RESULTS = {"f16": np.float16, "f32": np.float32, "f64": np.float64, "s32": np.int32}


@decoder("mma")
def _mma(i: Instruction, p: Program) -> Run:
    """m{8,16}n8k{4,8,16,32} in pieces of 8 rows and 32 bits of K per lane (64 bits for FP64). With a sparse A those of
    A are half as many.
    """
    shape = next((x for x in i.op if x.startswith(("m16n8k", "m8n8k"))), "")
    sparse = i.op[1] in _METADATA
    if i.op[1 + sparse] != "sync" or not shape or "row" not in i.op or len(i.op) - i.op.index("col") not in (5, 6):
        raise unknown(i)
    rows, k = (int(x) for x in shape[1:].split("n8k"))
    d_kind, a_kind, b_kind, c_kind = i.op[-4:]
    saturate = "satfinite" in i.op
    size, a_value = element_values(a_kind)
    b_size, b_value = element_values(b_kind)
    per = max(4 // size, 1)  # elements in a register
    if d_kind != c_kind or d_kind not in _RESULTS or k % (4 * per) or size != b_size:
        raise unknown(i)
    if (d_kind == "s32") != (a_kind in ("s8", "u8")) or (d_kind == "f64") != (a_kind == "f64"):
        raise unknown(i)
    if sparse and (rows != 16 or k * size not in (32, 64) or size > 4 or a_kind in ("e4m3", "e5m2")):
        raise unknown(i, "shapes, and sums, of that type")
    register = "b64" if d_kind == "f64" else "b32"
    a, b, c = ([p.source(x, register) for x in p.vector(o)] for o in i.operands[1:4])
    writes = [p.target(x, register) for x in p.vector(i.operands[0])]
    unsigned, result = np.dtype(f"u{size}"), np.dtype(_RESULTS[d_kind])
    halves, pieces = rows // 8, k // (4 * per)  # registers for one row along K
    stored = pieces // 2 if sparse else pieces  # of A
    if (len(a), len(b)) != (halves * stored, pieces):
        raise unknown(i, f"{len(a)} registers of A and {len(b)} of B")
    metadata = p.source(i.operands[4], "b32") if sparse else None
    selector = constant(i.operands[5]) if sparse else 0
    if sparse and selector not in range(selectors(per_row(k, size))):
        raise unknown(i, f"sparsity selector {selector}")
    # where elements of registers stand, [registers, 32, elements]
    columns, of_b = per * QUAD[:, None] + np.arange(per), np.arange(pieces)[:, None, None]
    of_a = np.arange(halves * stored)[:, None, None]
    a_places = GROUP[:, None] + 8 * (of_a % halves), columns + 4 * per * (of_a // halves)
    b_places = GROUP[:, None], columns + 4 * per * of_b
    element = np.arange(2 * halves).reshape(len(c), 1, -1)
    d_places = GROUP[:, None] + 8 * (element // 2), 2 * QUAD[:, None] + element % 2
    what = f"mma.{'sp.' if sparse else ''}sync {shape} {a_kind}"

    def run(w: Warp, m: Mask) -> str | None:
        if not w.everyone(m):
            return "mma.sync is executed by a divergent warp"
        left, right, old = np.zeros((rows, 4 * per * stored)), np.zeros((8, k)), np.zeros((rows, 8))
        left[a_places] = a_value(np.array([read(w) for read in a]).view(unsigned)).reshape(-1, LANES, per)
        right[b_places] = b_value(np.array([read(w) for read in b]).view(unsigned)).reshape(-1, LANES, per)
        if metadata is not None:
            indices = of_warp(metadata(w), per_row(k, size), selector, size)
            right = chosen(right, places(indices, size == 4, _METADATA[i.op[1]]))
        old[d_places] = np.array([read(w) for read in c]).view(result).reshape(len(c), LANES, -1)
        total = multiply(left, right, old, (a_kind, b_kind), d_kind, saturate)
        w.cta.cluster.launch.statistics.count_mma(what, 2 * rows * 8 * k)
        packed = np.ascontiguousarray(total[d_places]).view(DTYPES[register]).reshape(-1, LANES)
        for write, lanes in zip(writes, packed, strict=True):
            write(w, lanes, m)
        return None

    return run
