"""Block-scaled tcgen05.mma against exact FP64 products of random codes under random scales.

Scales are put into tensor memory by hand, after the figures of "Scale Factor A ID" and "Scale Factor B ID"; the bytes
that an instruction does not read hold others. FP4 and FP6 elements of kind::mxf8f6f4 are packed as in
"Packing formats of elements in Tensor and Shared memory", with garbage for padding.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

from ptx_emulator import Fault

from .tensor import blank, descriptor, execute, images, place

rng = np.random.default_rng(31)

# code in the instruction descriptor of kind::mxf8f6f4, bits, values
NARROW = {
    "e4m3": (0, 8, ml_dtypes.float8_e4m3fn),
    "e5m2": (1, 8, ml_dtypes.float8_e5m2),
    "e2m3": (3, 6, ml_dtypes.float6_e2m3fn),
    "e3m2": (4, 6, ml_dtypes.float6_e3m2fn),
    "e2m1": (5, 4, ml_dtypes.float4_e2m1fn),
}
# qualifier of the kind -> elements of a scale
VECTORS = {
    "mxf8f6f4.block_scale": 32,
    "mxf8f6f4.block_scale.scale_vec::1X": 32,
    "mxf8f6f4.block_scale.block32": 32,
    "mxf4.block_scale": 32,
    "mxf4.block_scale.scale_vec::2X": 32,
    "mxf4.block_scale.block32": 32,
    "mxf4nvf4.block_scale.scale_vec::2X": 32,
    "mxf4nvf4.block_scale.block32": 32,
    "mxf4nvf4.block_scale.scale_vec::4X": 16,
    "mxf4nvf4.block_scale.block16": 16,
}


def codes(element: str, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Random finite codes [rows, k] and their values."""
    _, bits, dtype = NARROW[element]
    while True:
        found = rng.integers(0, 1 << bits, (rows, 4 * k)).astype(np.uint8)
        values = found.view(dtype).astype(np.float64)
        fine = np.isfinite(values) & (np.abs(values) < 256)
        if (fine.sum(1) >= k).all():
            picked = np.argsort(~fine, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(found, picked, 1), np.take_along_axis(values, picked, 1)


def packed(element: str, found: np.ndarray, mn_major: bool) -> np.ndarray:
    """Codes [rows, k] -> bytes [rows, k] of an operand of kind::mxf8f6f4: sixteen elements along the major dimension
    in 8, 12 or 16 bytes, then padding.
    """
    bits = NARROW[element][1]
    if bits == 8:
        return found
    runs = np.ascontiguousarray(found.T if mn_major else found)
    out = np.full(runs.shape, 0xA5, np.uint8)
    for i, j in itertools.product(range(runs.shape[0]), range(0, runs.shape[1], 16)):
        number = sum(int(x) << bits * n for n, x in enumerate(runs[i, j : j + 16]))
        out[i, j : j + 2 * bits] = list(number.to_bytes(2 * bits, "little"))
    return np.ascontiguousarray(out.T) if mn_major else out


def scale_codes(rows: int, ue8m0: bool) -> tuple[np.ndarray, np.ndarray]:
    """Random [rows, 4] and their values."""
    if ue8m0:
        found = rng.integers(121, 134, (rows, 4)).astype(np.uint8)
        return found, 2.0 ** (found.astype(np.float64) - 127)
    found = rng.integers(0, 0x7F, (rows, 4)).astype(np.uint8)
    return found, found.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def put_scales(tensor: np.ndarray, column: int, found: np.ndarray, quarters: range) -> None:
    """Row r of the scales is in lane r % 32 of each quarter of the lanes, column r / 32, byte n is scale n."""
    for r, four in enumerate(found):
        for quarter in quarters:
            tensor[32 * quarter + r % 32, column + r // 32] = np.ascontiguousarray(four).view(np.uint32)[0]


def idesc(m: int, n: int, a: int, b: int, ue8m0: bool, sfa: int = 0, sfb: int = 0, **bits: int) -> int:
    """PTX ISA, "Instruction descriptor", for .kind::mxf8f6f4 and for .kind::mxf4 and .kind::mxf4nvf4."""
    word = a << 7 | b << 10 | n // 8 << 17 | int(ue8m0) << 23 | m // 128 << 27 | sfa << 29 | sfb << 4
    places = {"negate_a": 13, "negate_b": 14, "transpose_a": 15, "transpose_b": 16}
    for name, value in bits.items():
        word |= value << places[name]
    return word - (1 << 32) if word >> 31 else word


def multiply(
    kind, word, a, b, sfa, sfb, ctas=1, transposed=(False, False), a_words=None, accumulate=False, old=None, **kw
):
    """Operand bytes [m, ...] and [n, ...], scale codes [m, 4] and [n, 4] -> D [m, n]."""
    m, n, pictures, words = len(sfa), len(b), [], []
    folded = ctas == 2 and m == 128  # layout B
    width = n // 2 if folded else n  # of D, in columns
    a_column, sfa_column, sfb_column = (width + 8 * x for x in range(3))
    tensor = blank(width + 32, ctas)
    for cta in range(ctas):
        mine, half = slice(cta * m // ctas, (cta + 1) * m // ctas), slice(cta * n // ctas, (cta + 1) * n // ctas)
        parts = [place(x, "128b", t) for x, t in zip((a[mine], b[half]), transposed, strict=True)]
        picture, starts = images(*(p[0] for p in parts))
        pictures.append(picture)
        words = [descriptor(s, "128b", lead, stride) for s, (_, lead, stride) in zip(starts, parts, strict=True)]
        put_scales(tensor[cta], sfa_column, sfa[mine], range(4))
        if folded:
            put_scales(tensor[cta], sfb_column, sfb[: n // 2], range(2))
            put_scales(tensor[cta], sfb_column, sfb[n // 2 :], range(2, 4))
        else:
            put_scales(tensor[cta], sfb_column, sfb, range(4))
        if a_words is not None:
            tensor[cta, :, a_column : a_column + 8] = a_words[mine]
        if old is not None:
            tensor[cta, :, :n] = old[mine].view(np.uint32)
    left = "%rd20" if a_words is None else "[%r22]"
    issue = f"""add.s64 %rd20, %rd40, {words[0]}; add.s64 %rd21, %rd40, {words[1]}; mov.b32 %r20, {word};
    add.s32 %r22, %r10, {a_column}; add.s32 %r23, %r10, {sfa_column}; add.s32 %r24, %r10, {sfb_column};
    mov.pred %p6, {int(accumulate)};
    @%p5 tcgen05.mma.cta_group::{ctas}.kind::{kind} [%r10], {left}, %rd21, %r20, [%r23], [%r24], %p6;"""
    got = execute(issue, tensor, np.stack(pictures), **kw)[:, :, :width].view(np.float32)
    if folded:
        return np.concatenate([np.hstack([x[:64], x[64:]]) for x in got])
    return got.reshape(m, n)


def exact(av, bv, sav, sbv, vector):
    return (av * sav.repeat(vector, 1)) @ (bv * sbv.repeat(vector, 1)).T


@pytest.mark.parametrize(("a", "b"), list(itertools.product(NARROW, NARROW)))
def test_every_pair_of_element_types(a, b):
    """kind::mxf8f6f4, "Packing format used for matrix A and B by .kind::mxf8f6f4 in Shared Memory", one scale a row."""
    n, (ca, av), (cb, bv) = 40, codes(a, 128, 32), codes(b, 40, 32)
    (sfa, sav), (sfb, sbv) = scale_codes(128, True), scale_codes(n, True)
    word = idesc(128, n, NARROW[a][0], NARROW[b][0], True, 3, 1)
    got = multiply("mxf8f6f4.block_scale.block32", word, packed(a, ca, False), packed(b, cb, False), sfa, sfb)
    want = exact(av, bv, sav[:, 3:], sbv[:, 1:2], 32)
    np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize(("a", "b"), [("e4m3", "e2m1"), ("e3m2", "e5m2"), ("e2m1", "e2m3")])
def test_transposed(a, b):
    """M- and N-major operands of kind::mxf8f6f4: the sixteen elements of a chunk lie along M or N."""
    n, (ca, av), (cb, bv) = 48, codes(a, 128, 32), codes(b, 48, 32)
    (sfa, sav), (sfb, sbv) = scale_codes(128, True), scale_codes(n, True)
    word = idesc(128, n, NARROW[a][0], NARROW[b][0], True, transpose_a=1, transpose_b=1)
    operands = packed(a, ca, True), packed(b, cb, True)
    got = multiply("mxf8f6f4.block_scale", word, *operands, sfa, sfb, transposed=(True, True))
    np.testing.assert_array_equal(got, exact(av, bv, sav[:, :1], sbv[:, :1], 32).astype(np.float32))


def fp4(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Two codes a byte, [rows, 32]; values [rows, 64]."""
    found, values = codes("e2m1", rows, 64)
    return found[:, 0::2] | found[:, 1::2] << 4, values


@pytest.mark.parametrize(
    ("kind", "ctas", "m", "n"),
    [
        *((kind, 1, 128, 8) for kind in VECTORS if kind.startswith("mxf4")),
        ("mxf4.block_scale.block32", 1, 128, 200),
        ("mxf4.block_scale.block32", 2, 256, 48),
        ("mxf4nvf4.block_scale.block32", 2, 128, 80),
        ("mxf4nvf4.block_scale.block16", 1, 128, 136),
        ("mxf4nvf4.block_scale.block16", 2, 256, 176),
        ("mxf4nvf4.block_scale.block16", 2, 128, 256),
    ],
)
def test_fp4(kind, ctas, m, n):
    """ "Scale Factor A ID", "Scale Factor B ID": 2X takes bytes 0-1 or 2-3 of a word, 4X all of it; N at will."""
    vector = VECTORS[kind]
    (a, av), (b, bv) = fp4(m), fp4(n)
    for ue8m0, sfa_id, sfb_id in [(True, 0, 2), (True, 2, 0)] if vector == 32 else [(False, 0, 0), (True, 0, 0)]:
        (sfa, sav), (sfb, sbv) = scale_codes(m, ue8m0), scale_codes(n, ue8m0)
        got = multiply(kind, idesc(m, n, 1, 1, ue8m0, sfa_id, sfb_id), a, b, sfa, sfb, ctas)
        width = 64 // vector
        want = exact(av, bv, sav[:, sfa_id : sfa_id + width], sbv[:, sfb_id : sfb_id + width], vector)
        np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize(
    ("kind", "ctas", "m", "n"),
    [
        *((kind, 1, 128, 8) for kind in VECTORS if kind.startswith("mxf8")),
        ("mxf8f6f4.block_scale", 2, 256, 144),
        ("mxf8f6f4.block_scale", 2, 128, 48),
    ],
)
def test_fp8(kind, ctas, m, n):
    """1X takes the byte that the id names, in one or two CTAs; negated B, added to D."""
    (a, av), (b, bv) = codes("e4m3", m, 32), codes("e5m2", n, 32)
    (sfa, sav), (sfb, sbv) = scale_codes(m, True), scale_codes(n, True)
    old = rng.standard_normal((m, n)).astype(np.float32) if m // ctas == 128 else None
    word = idesc(m, n, 0, 1, True, 2, 3, negate_b=1)
    got = multiply(kind, word, a, b, sfa, sfb, ctas, accumulate=old is not None, old=old)
    want = -exact(av, bv, sav[:, 2:3], sbv[:, 3:], 32) + (0 if old is None else old)
    np.testing.assert_array_equal(got, want.astype(np.float32))


def ones(rows: int) -> np.ndarray:
    return np.full((rows, 32), 0x22, np.uint8)  # 1.0 twice


@pytest.mark.parametrize("which", ["A", "B"])
@pytest.mark.parametrize(("row", "block"), [(0, 0), (31, 3), (32, 1), (77, 2), (95, 0), (127, 3)])
def test_a_single_scale(which, row, block):
    """One scale of 128 rows is 8, all others 1: it changes one row (column) of D by 16 (8 - 1), and the word that holds
    it is in lane row % 32 of column row / 32, byte `block`.
    """
    sf = {name: np.full((128, 4), 0x38, np.uint8) for name in "AB"}
    sf[which][row, block] = 0x50
    got = multiply("mxf4nvf4.block_scale.block16", idesc(128, 128, 1, 1, False), ones(128), ones(128), sf["A"], sf["B"])
    want = np.full((128, 128), 64.0)
    want[(row, slice(None)) if which == "A" else (slice(None), row)] += 16 * 7
    np.testing.assert_array_equal(got, want)


# --- A of tensor memory ---


@pytest.mark.parametrize("element", NARROW)
def test_narrow_a_of_tensor_memory(element):
    """ "Packing format used for matrix A by .kind::mxf8f6f4 in Tensor Memory": an element a byte, in its middle."""
    (ca, av), (b, bv) = codes(element, 128, 32), codes("e4m3", 16, 32)
    (sfa, sav), (sfb, sbv) = scale_codes(128, True), scale_codes(16, True)
    shift = {8: 0, 6: 1, 4: 2}[NARROW[element][1]]
    words = np.ascontiguousarray(ca << shift).view(np.uint32)
    word = idesc(128, 16, NARROW[element][0], 0, True)
    got = multiply("mxf8f6f4.block_scale", word, ca, b, sfa, sfb, a_words=words)
    np.testing.assert_array_equal(got, exact(av, bv, sav[:, :1], sbv[:, :1], 32).astype(np.float32))


@pytest.mark.parametrize("ctas", [1, 2])
def test_fp4_a_of_tensor_memory(ctas):
    """ "Packing format used for matrix A by .kind::mxf4 and .kind::mxf4nvf4 in Tensor Memory": two elements a byte."""
    m = 128 * ctas
    (a, av), (b, bv) = fp4(m), fp4(32)
    (sfa, sav), (sfb, sbv) = scale_codes(m, False), scale_codes(32, False)
    words = np.ascontiguousarray(a).view(np.uint32)
    word = idesc(m, 32, 1, 1, False)
    got = multiply("mxf4nvf4.block_scale.block16", word, np.zeros_like(a), b, sfa, sfb, ctas, a_words=words)
    np.testing.assert_array_equal(got, exact(av, bv, sav, sbv, 16).astype(np.float32))


def test_padding_in_tensor_memory_is_zero():
    (ca, _), (sfa, _), (sfb, _) = codes("e2m1", 128, 32), scale_codes(128, True), scale_codes(16, True)
    words = np.ascontiguousarray(ca).view(np.uint32)  # in the low half of the byte
    with pytest.raises(Fault, match="element of 4 bits in tensor memory whose byte has other bits set"):
        multiply("mxf8f6f4.block_scale", idesc(128, 16, 5, 5, True), ca, ca[:16], sfa, sfb, a_words=words)


# --- refusals ---

NVFP4, MXFP4, MXFP8 = "mxf4nvf4.block_scale.block16", "mxf4.block_scale.block32", "mxf8f6f4.block_scale"
GOOD = idesc(128, 16, 1, 1, False)


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        (NVFP4, GOOD | 1 << 2, "kind::mxf4nvf4: says sparse"),
        (NVFP4, GOOD | 1, "reserved bits 0x1 are set"),
        (NVFP4, GOOD | 1 << 3, "reserved bits 0x8 are set"),
        (NVFP4, GOOD | 1 << 6, "reserved bits 0x40 are set"),
        (NVFP4, GOOD | 4 << 24, "reserved bits 0x4000000 are set"),
        (MXFP8, idesc(128, 16, 0, 0, True) - (1 << 31), "reserved bits 0x80000000 are set"),
        (NVFP4, GOOD - (1 << 31), "K = 96 needs sm_103a"),
        (NVFP4, idesc(128, 16, 5, 1, False), "element type 5 is none"),
        (MXFP8, idesc(128, 16, 0, 2, True), "element type 2 is none"),
        (NVFP4, idesc(128, 16, 1, 1, False, transpose_a=1), "FP4 operands must be K-major"),
        (NVFP4, idesc(128, 16, 1, 1, False, sfa=2), "scale factor id 2 with 4 scales"),
        (MXFP4, idesc(128, 16, 1, 1, True, sfb=3), "scale factor id 3 with 2 scales"),
        (MXFP4, idesc(128, 16, 1, 1, False), "scales of 32 elements are UE8M0"),
        (MXFP8, idesc(128, 16, 0, 0, False), "scales of 32 elements are UE8M0"),
        (NVFP4, idesc(256, 16, 1, 1, False), "M = 256 with 1 CTAs"),
        (NVFP4, idesc(128, 264, 1, 1, False), "N = 264"),
        ("mxf4nvf4.block_scale", GOOD, "scale vector size missing"),
        ("mxf4.block_scale.block16", GOOD, "scale vector size block16"),
        ("mxf8f6f4.block_scale.scale_vec::2X", GOOD, "scale vector size scale_vec:2X"),
        ("mxf4nvf4", GOOD, "does not know"),
    ],
)
def test_refused_instruction_descriptors(kind, word, message):
    """ "Instruction descriptor format for ..." and "Valid combinations of scale_vectorsize with types and MMA-Kind"."""
    (a, _), (sfa, _), (sfb, _) = fp4(128), scale_codes(128, False), scale_codes(16, False)
    with pytest.raises(Fault, match=message):
        multiply(kind, word, a, a[:16], sfa, sfb)


def test_quarters_that_differ_are_refused():
    """ "Scale factors for A and B matrices need to be duplicated to all 32 lane partitions of tensor memory"."""
    (a, _), (sfa, _) = fp4(128), scale_codes(128, False)
    tensor = blank(32)
    put_scales(tensor[0], 16, sfa, range(4))
    put_scales(tensor[0], 24, sfa[:16], range(4))
    tensor[0, 32 * 3 + 5, 18] ^= 1
    data, lead, stride = place(a, "128b", False)
    issue = f"""add.s64 %rd20, %rd40, {descriptor(0, "128b", lead, stride)}; mov.b32 %r20, {GOOD};
    add.s32 %r23, %r10, 16; add.s32 %r24, %r10, 24; mov.pred %p6, 0;
    @%p5 tcgen05.mma.cta_group::1.kind::{NVFP4} [%r10], %rd20, %rd20, %r20, [%r23], [%r24], %p6;"""
    with pytest.raises(Fault, match="scale factors of A: the sub-partitions of the lanes do not hold the same"):
        execute(issue, tensor, data[None])
