"""tcgen05.mma: where operands and results lie, for every data path layout, kind, major-ness and swizzle.

Operands are random; D must be the exact product, rounded once, in the lanes and columns that the ISA's figures give,
and no other word of tensor memory may change.
"""

import ml_dtypes
import numpy as np
import pytest

from ptx_emulator import Fault

from .tensor import LANES, blank, descriptor, execute, images, place

rng = np.random.default_rng(23)
D, A = 8, 136  # columns of the accumulator and of an A in tensor memory

# element type -> code in the instruction descriptor, numpy type, K of one instruction
KINDS = {
    "f16": ("kind::f16", 0, np.float16, 16),
    "bf16": ("kind::f16", 1, ml_dtypes.bfloat16, 16),
    "tf32": ("kind::tf32", 2, np.float32, 8),
    "e4m3": ("kind::f8f6f4", 0, ml_dtypes.float8_e4m3fn, 32),
    "e5m2": ("kind::f8f6f4", 1, ml_dtypes.float8_e5m2, 32),
    "u8": ("kind::i8", 0, np.uint8, 32),
    "s8": ("kind::i8", 1, np.int8, 32),
}


def matrix(element: str, rows: int) -> np.ndarray:
    """Random finite elements; FP32 ones that TF32 can hold."""
    _, _, dtype, k = KINDS[element]
    if dtype in (np.uint8, np.int8):
        return rng.integers(0, 256, (rows, k)).astype(np.uint8).view(dtype)
    values = rng.standard_normal((rows, k)).astype(dtype)
    return (values.view(np.uint32) & 0xFFFFE000).view(np.float32) if element == "tf32" else values


def idesc(m: int, n: int, a: str, b: str, d: str = "f32", **bits: int) -> int:
    """PTX ISA, "Instruction descriptor", for the kinds without block scaling."""
    word = {"f16": 0, "f32": 1, "s32": 2}[d] << 4 | KINDS[a][1] << 7 | KINDS[b][1] << 10 | n // 8 << 17 | m // 16 << 24
    places = {"saturate": 3, "negate_a": 13, "negate_b": 14, "transpose_a": 15, "transpose_b": 16}
    for name, value in bits.items():
        word |= value << places[name]
    return word


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def lanes_of(m: int, ctas: int, ws: bool, first: int = 0) -> list[tuple[int, int, int]]:
    """(row of the CTA's A, lane, first column of its share of N in units of N / shares), Data Path Layout Organization:

    A, D  row i is lane i               B, E  row i is lane i, and lane 64 + i for the upper half of N
    F     rows 16 q .. 16 q + 15 are lanes 32 q .. 32 q + 15 (or 16 more)
    G     row i is lanes i, 32 + i, 64 + i, 96 + i, one for each quarter of N
    """
    rows = m // ctas
    if rows == 128:
        return [(i, i, 0) for i in range(128)]
    if rows == 64 and (ctas == 2 or ws):
        return [(i, i + 64 * part, part) for part in range(2) for i in range(64)]
    if rows == 32:
        return [(i, i + 32 * part, part) for part in range(4) for i in range(32)]
    return [(i, first + i % 16 + 32 * (i // 16), 0) for i in range(64)]


def spread(product: np.ndarray, tensor: np.ndarray, m: int, ws: bool = False, first: int = 0) -> np.ndarray:
    """Words of D [m, n] put into tensor memory [ctas, 128, columns] at column D."""
    ctas, out = len(tensor), tensor.copy()
    entries = lanes_of(m, ctas, ws, first)
    shares = max(part for _, _, part in entries) + 1
    width = product.shape[1] // shares
    for cta in range(ctas):
        for row, lane, part in entries:
            words = product[cta * (m // ctas) + row, part * width : (part + 1) * width]
            out[cta, lane, D : D + width] = words
    return out


def launch(
    a,
    b,
    word: int,
    kind: str,
    *,
    ctas: int = 1,
    tensor=None,
    layouts=("128b", "128b"),
    transposed=(False, False),
    at: int = 0,
    accumulate: bool = False,
    qualifiers: str = "",
    op: str = "mma",
    before: str = "",
    disabled: str = "",
    after: str = "",
    again: str = "",
    a_tensor: bool = False,
    gap: int = 0,
    meta: str = "",
    **kw,
):
    """a [m, k], b [n, k] into shared memory, one MMA of them (or of an A of tensor memory); tensor memory after."""
    images_, words = [], []
    for cta in range(ctas):
        halves = [x[cta * len(x) // ctas : (cta + 1) * len(x) // ctas] for x in (a, b)]
        placed = [place(x, lay, t, gap) for x, lay, t in zip(halves, layouts, transposed, strict=True)]
        image, starts = images(*(p[0] for p in placed))
        images_.append(image)
        words = [
            descriptor(s, lay, leading, stride)
            for s, lay, (_, leading, stride) in zip(starts, layouts, placed, strict=True)
        ]
    lines = [f"add.s64 %rd20, %rd40, {words[0]}; add.s64 %rd21, %rd40, {words[1]};"]
    lines.append(
        f"mov.b32 %r20, {signed(word)}; add.s32 %r21, %r10, {at << 16 | D}; add.s32 %r22, %r10, {at << 16 | A};"
    )
    lines.append(f"mov.pred %p6, {int(accumulate)}; {before}")
    left = "[%r22]" if a_tensor else "%rd20"
    operands = f"[%r21], {left}, %rd21, {meta}%r20, {disabled}%p6{after}"
    text = f"@%p5 tcgen05.{op}.cta_group::{ctas}.{kind}{qualifiers} {operands};"
    tensor = blank(A + 8, ctas) if tensor is None else tensor
    return execute("\n".join([*lines, text, again]), tensor, np.stack(images_), **kw)


def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float64) @ b.astype(np.float64).T


def f32(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).view(np.uint32)


# --- data path layouts ---


@pytest.mark.parametrize(
    ("m", "n", "ctas", "ws", "at"),
    [
        (128, 8, 1, False, 0),
        (128, 136, 1, False, 0),
        (64, 24, 1, False, 0),
        (64, 256, 1, False, 16),
        (256, 16, 2, False, 0),
        (256, 208, 2, False, 0),
        (128, 48, 2, False, 0),
        (128, 256, 2, False, 0),
        (32, 64, 1, True, 0),
        (32, 256, 1, True, 0),
        (64, 128, 1, True, 0),
        (128, 64, 1, True, 0),
    ],
)
def test_data_path_layouts(m, n, ctas, ws, at):
    """ "Data Path Layout Organization", layouts A, B, D, E, F and G: D overwritten, then added to."""
    a, b = matrix("f16", m), matrix("f16", n)
    op, after = ("mma.ws", ", 0") if ws else ("mma", "")
    mma = f"@%p5 tcgen05.{op}.cta_group::{ctas}.kind::f16 [%r21], %rd20, %rd21, %r20, %p7{after};"
    again = f"mov.pred %p7, 1; {mma}"
    tensor = blank(D + n + 8, ctas)
    word = idesc(m, n, "f16", "f16")
    product = exact(a, b)
    got = launch(a, b, word, "kind::f16", ctas=ctas, op=op, after=after, at=at, tensor=tensor)
    np.testing.assert_array_equal(got, spread(f32(product), tensor, m, ws, at))
    got = launch(a, b, word, "kind::f16", ctas=ctas, op=op, after=after, at=at, again=again, tensor=tensor)
    twice = product + f32(product).view(np.float32)
    np.testing.assert_array_equal(got, spread(f32(twice), tensor, m, ws, at))


@pytest.mark.parametrize(("m", "ctas", "ws", "row", "column", "cta", "lane", "place_"), [
    (256, 2, False, 130, 7, 1, 2, 7),
    (128, 2, False, 70, 3, 1, 6, 3),
    (128, 2, False, 5, 40, 0, 69, 8),
    (64, 1, False, 37, 9, 0, 69, 9),
    (64, 1, True, 37, 40, 0, 101, 8),
    (32, 1, True, 9, 50, 0, 105, 2),
    (128, 1, False, 77, 63, 0, 77, 63),
])  # fmt: skip
def test_a_single_element(m, ctas, ws, row, column, cta, lane, place_):
    """One product alone is not zero (N = 64); its cell is read off the figures of the layouts."""
    a, b = np.zeros((m, 16), np.float16), np.zeros((64, 16), np.float16)
    a[row, 11], b[column, 11] = 3, 5
    tensor = np.zeros((ctas, LANES, A + 8), np.uint32)
    got = launch(a, b, idesc(m, 64, "f16", "f16"), "kind::f16", ctas=ctas, op="mma.ws" if ws else "mma", tensor=tensor)
    assert [list(map(int, x)) for x in np.argwhere(got)] == [[cta, lane, D + place_]]
    assert got[cta, lane, D + place_].view(np.float32) == 15


# --- shared memory ---

SWIZZLES = ("none", "32b", "64b", "128b")


@pytest.mark.parametrize("transposed", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("layout", SWIZZLES)
@pytest.mark.parametrize("element", ["bf16", "e4m3"])
def test_mn_major(element, layout, transposed):
    """ "Canonical Layouts" and the figures "MN major ..."; the groups lie apart."""
    a, b = matrix(element, 128), matrix(element, 96)
    word = idesc(128, 96, element, element, transpose_a=transposed[0], transpose_b=transposed[1])
    got = launch(a, b, word, KINDS[element][0], layouts=(layout, layout), transposed=transposed, gap=1024)
    np.testing.assert_array_equal(got, spread(f32(exact(a, b)), blank(A + 8), 128))


@pytest.mark.parametrize("ctas", [1, 2])
def test_transposed_tf32(ctas):
    """ "Transpose and Negate operations": 128-byte swizzle with 32-byte atomicity, Swizzle<2, 5, 2>, four k a group."""
    a, b = matrix("tf32", 128 * ctas), matrix("tf32", 64)
    word = idesc(128 * ctas, 64, "tf32", "tf32", transpose_a=1, transpose_b=1)
    both = ("128b_atom32", "128b_atom32")
    got = launch(a, b, word, "kind::tf32", ctas=ctas, layouts=both, transposed=(True, True), gap=512)
    np.testing.assert_array_equal(got, spread(f32(exact(a, b)), blank(A + 8, ctas), 128 * ctas))


@pytest.mark.parametrize(("layouts", "element"), [(("32b", "128b"), "f16"), (("none", "64b"), "e5m2")])
def test_k_major_pairs(layouts, element):
    """Figures "K major ...": operands of different swizzles, eight rows a group, groups apart."""
    a, b = matrix(element, 128), matrix(element, 40)
    got = launch(a, b, idesc(128, 40, element, element), KINDS[element][0], layouts=layouts, gap=2048)
    np.testing.assert_array_equal(got, spread(f32(exact(a, b)), blank(A + 8), 128))


@pytest.mark.parametrize("base", [1, 4, 7])
def test_base_offset(base):
    """ "Shared memory descriptor": the swizzle's pattern starts `base` rows of 128 bytes after a multiple of 1024."""
    a, b = matrix("f16", 128), matrix("f16", 16)
    wide = np.zeros((128, 64), np.float16)
    wide[:, 16:32] = a
    data, _, stride = place(wide, "128b", False)
    b_data, _, b_stride = place(b, "32b", False)
    image, (start, b_start) = images(np.concatenate([np.zeros(128 * base, np.uint8), data]), b_data)
    left = descriptor(start + 128 * base + 32, "128b", 16, stride, base)
    right = descriptor(b_start, "32b", 16, b_stride)
    issue = f"add.s64 %rd20, %rd40, {left}; add.s64 %rd21, %rd40, {right}; add.s32 %r21, %r10, {D}; mov.pred %p6, 0;"
    issue += f"mov.b32 %r20, {idesc(128, 16, 'f16', 'f16')};"
    issue += "@%p5 tcgen05.mma.cta_group::1.kind::f16 [%r21], %rd20, %rd21, %r20, %p6;"
    got = execute(issue, blank(A + 8), image[None])
    np.testing.assert_array_equal(got, spread(f32(exact(a, b)), blank(A + 8), 128))


# --- kinds ---


@pytest.mark.parametrize(("element", "n"), [("f16", 24), ("e4m3", 16)])
@pytest.mark.parametrize("accumulate", [False, True])
def test_results_in_half_precision(element, n, accumulate):
    """ "Packing format for matrix D": one element of 16 bits in the lower half of a word."""
    a, b = matrix(element, 128), matrix(element, n)
    old = rng.standard_normal((128, n)).astype(np.float16)
    tensor = blank(A + 8)
    tensor[0, :, D : D + n] = old.view(np.uint16)
    got = launch(a, b, idesc(128, n, element, element, "f16"), KINDS[element][0], tensor=tensor, accumulate=accumulate)
    want = (exact(a, b) + (old.astype(np.float64) if accumulate else 0)).astype(np.float16)
    np.testing.assert_array_equal(got, spread(want.view(np.uint16).astype(np.uint32), tensor, 128))


@pytest.mark.parametrize("saturate", [0, 1])
@pytest.mark.parametrize(("a_type", "b_type", "ctas"), [("u8", "s8", 1), ("s8", "u8", 2), ("u8", "u8", 1)])
def test_integers(a_type, b_type, ctas, saturate):
    """kind::i8, S32 accumulators that wrap or stay at the ends of their range."""
    m, n = 128 * ctas, 32
    a, b = matrix(a_type, m), matrix(b_type, n)
    old = rng.choice([0, 2**31 - 1, -(2**31), 77], (m, n))
    tensor = blank(A + 8, ctas)
    tensor[:, :, D : D + n] = old.reshape(ctas, 128, n).astype(np.int32).view(np.uint32)
    word = idesc(m, n, a_type, b_type, "s32", saturate=saturate)
    got = launch(a, b, word, "kind::i8", ctas=ctas, tensor=tensor, accumulate=True)
    total = a.astype(np.int64) @ b.astype(np.int64).T + old
    total = np.clip(total, -(2**31), 2**31 - 1) if saturate else (total + 2**31) % 2**32 - 2**31
    np.testing.assert_array_equal(got, spread(total.astype(np.int32).view(np.uint32), tensor, m))


@pytest.mark.parametrize("scale", [0, 1, 15])
def test_scaled_input(scale):
    """`scale-input-d`: D = A B + D 2^-s."""
    a, b = matrix("bf16", 128), matrix("bf16", 16)
    old = rng.standard_normal((128, 16)).astype(np.float32)
    tensor = blank(A + 8)
    tensor[0, :, D : D + 16] = old.view(np.uint32)
    word = idesc(128, 16, "bf16", "bf16", negate_b=1)
    got = launch(a, b, word, "kind::f16", tensor=tensor, accumulate=True, after=f", {scale}")
    np.testing.assert_array_equal(got, spread(f32(old * 2.0**-scale - exact(a, b)), tensor, 128))


@pytest.mark.parametrize(("m", "ctas"), [(128, 1), (64, 1), (256, 2), (128, 2)])
def test_disabled_lanes(m, ctas):
    """`disable-output-lane`: bit 0 of the first word is lane 0 (of the even CTA), and bits are lanes, not rows of D."""
    a, b = matrix("f16", m), matrix("f16", 32)
    words = rng.integers(0, 1 << 32, 4 * ctas, dtype=np.uint64)
    moves = "".join(f"mov.b32 %r{50 + n}, {signed(int(x))};" for n, x in enumerate(words))
    vector = ", ".join(f"%r{50 + n}" for n in range(4 * ctas))
    tensor = blank(A + 8, ctas)
    word = idesc(m, 32, "f16", "f16")
    got = launch(a, b, word, "kind::f16", ctas=ctas, before=moves, disabled=f"{{{vector}}}, ")
    want = spread(f32(exact(a, b)), tensor, m)
    for cta in range(ctas):
        for lane in range(128):
            if int(words[4 * cta + lane // 32]) >> lane % 32 & 1:
                want[cta, lane] = tensor[cta, lane]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("hint", ["fill", "use", "lastuse", "discard"])
def test_collector_hints(hint):
    """Collector buffers may be filled, used or dropped: the result is the same."""
    a, b = matrix("f16", 128), matrix("f16", 16)
    got = launch(a, b, idesc(128, 16, "f16", "f16"), "kind::f16", qualifiers=f".collector::a::{hint}")
    np.testing.assert_array_equal(got, spread(f32(exact(a, b)), blank(A + 8), 128))


# --- A of tensor memory ---


@pytest.mark.parametrize(
    ("element", "m", "ctas", "at"),
    [
        ("bf16", 128, 1, 0),
        ("f16", 64, 1, 16),
        ("tf32", 256, 2, 0),
        ("e4m3", 128, 1, 0),
        ("s8", 128, 1, 0),
        ("f16", 128, 2, 0),
    ],
)
def test_a_of_tensor_memory(element, m, ctas, at):
    """A's rows are in the lanes of D's (layout B: twice), 32 bytes of K in eight columns, packed into the words."""
    a, b = matrix(element, m), matrix(element, 32)
    tensor = blank(A + 8, ctas)
    rows = np.ascontiguousarray(a).view(np.uint32)
    for cta in range(ctas):
        for row, lane, _ in lanes_of(m, ctas, False, at):
            tensor[cta, lane, A : A + 8] = rows[cta * (m // ctas) + row]
    result = "s32" if element == "s8" else "f32"
    word = idesc(m, 32, element, element, result)
    got = launch(a, b, word, KINDS[element][0], ctas=ctas, tensor=tensor, at=at, a_tensor=True)
    product = exact(a, b)
    words = product.astype(np.int32).view(np.uint32) if element == "s8" else f32(product)
    np.testing.assert_array_equal(got, spread(words, tensor, m, first=at))


def test_shifted_a():
    """`.ashift`: after the MMA the rows of A have gone one lane towards 0 in each sub-partition, the last one stays."""
    a, b = matrix("bf16", 128), matrix("bf16", 16)
    tensor = blank(A + 8)
    tensor[0, :, A:] = np.ascontiguousarray(a).view(np.uint32)
    word = idesc(128, 16, "bf16", "bf16")
    got = launch(a, b, word, "kind::f16", tensor=tensor, a_tensor=True, qualifiers=".ashift")
    want = spread(f32(exact(a, b)), tensor, 128)
    for lane in range(128):
        want[0, lane, A:] = tensor[0, lane + (lane % 32 != 31), A:]
    np.testing.assert_array_equal(got, want)


# --- refusals ---

GOOD = idesc(128, 16, "f16", "f16")
SMALL = idesc(128, 32, "e4m3", "e4m3")
WHOLE = idesc(128, 32, "s8", "s8", "s32")


@pytest.mark.parametrize(
    ("element", "word", "kw", "message"),
    [
        ("f16", GOOD | 1 << 2, {}, "kind::f16: says sparse"),
        ("f16", GOOD | 1, {}, "reserved bits 0x1 are set"),
        ("f16", GOOD | 1 << 3, {}, "reserved bits 0x8 are set"),
        ("f16", GOOD | 1 << 6, {}, "reserved bits 0x40 are set"),
        ("f16", GOOD | 1 << 23, {}, "reserved bits 0x800000 are set"),
        ("f16", GOOD | 1 << 29, {}, "reserved bits 0x20000000 are set"),
        ("f16", GOOD | 1 << 30, {}, "reserved bits 0x40000000 are set"),
        ("f16", GOOD | 2 << 7, {}, "element type 2 is none"),
        ("e4m3", SMALL | 2 << 10, {}, "element type 2 is none"),
        ("f16", GOOD ^ 3 << 4, {}, "type 2 of D is none"),
        ("s8", WHOLE ^ 3 << 4, {}, "type 1 of D is none"),
        ("bf16", idesc(128, 16, "bf16", "bf16", "f16"), {}, "D in FP16 needs A and B in FP16"),
        ("s8", WHOLE | 1 << 13, {}, "integers are not negated"),
        ("s8", idesc(128, 40, "s8", "s8", "s32"), {}, "N = 40 with M = 128"),
        ("e4m3", idesc(128, 24, "e4m3", "e4m3", transpose_b=1), {}, "N = 24 with M = 128"),
        ("f16", idesc(128, 0, "f16", "f16"), {}, "N = 0 with M = 128"),
        ("f16", idesc(32, 16, "f16", "f16"), {}, "M = 32 with 1 CTAs"),
        ("f16", idesc(64, 16, "f16", "f16"), {"ctas": 2}, "M = 64 with 2 CTAs"),
        ("f16", idesc(256, 24, "f16", "f16"), {"ctas": 2}, "N = 24 with M = 256"),
        ("f16", idesc(64, 32, "f16", "f16"), {"op": "mma.ws"}, "N = 32 with M = 64"),
        ("f16", GOOD, {"at": 16}, "lane 16 of tensor memory, with M = 128 it must be 0"),
        ("f16", idesc(64, 16, "f16", "f16"), {"at": 8}, "lane 8 of tensor memory, with M = 64 it must be 0 or 16"),
        ("f16", idesc(128, 16, "f16", "f16", transpose_a=1), {"a_tensor": True}, "A of tensor memory must be K-major"),
        ("f16", idesc(64, 64, "f16", "f16"), {"op": "mma.ws", "a_tensor": True}, "does not know A of tensor memory"),
        ("f16", idesc(64, 16, "f16", "f16"), {"a_tensor": True, "qualifiers": ".ashift"}, ".ashift with M = 64"),
        ("f16", GOOD, {"qualifiers": ".ashift"}, r"does not know .*ashift"),
        ("f16", GOOD, {"after": ", 16"}, "operands after enable-input-d"),
        ("e4m3", SMALL, {"after": ", 1"}, "operands after enable-input-d"),
        ("f16", idesc(64, 64, "f16", "f16"), {"op": "mma.ws", "after": f", {1 << 36}"}, "reserved bits are set"),
        ("f16", idesc(64, 64, "f16", "f16"), {"op": "mma.ws", "after": f", {33 << 56}"}, "a shift of 33 with M = 64"),
        ("f16", idesc(128, 16, "f16", "f16", transpose_a=1), {"layouts": ("128b_atom32", "32b")}, "atomicity is"),
        ("tf32", idesc(128, 16, "tf32", "tf32", transpose_a=1), {"layouts": ("128b", "128b")}, "32-byte atomicity is"),
        ("f16", GOOD, {"layouts": ("128b_atom32", "128b")}, "K-major operands swizzled with 32-byte atomicity"),
    ],
)  # fmt: skip
def test_refused(element, word, kw, message):
    a, b = matrix(element, 128), matrix(element, 64)
    with pytest.raises(Fault, match=message):
        launch(a, b, word, KINDS[element][0], **kw)


def zero_mask(start=(), first=(), zeros=0, used=0, shift=0, on=1) -> int:
    """ "Zero-Column Mask descriptor layout"; zeros and used are the fields."""
    word = on << 39 | zeros << 40 | used << 48 | shift << 56
    for i, (s, f) in enumerate(zip(start, first, strict=True)):
        word |= s << 8 * i | f << 32 + i
    return word


# the ISA's examples: M, fields, and each sub-mask as it prints it, the last column first
MASKS = [
    (128, {"zeros": 4, "used": 3, "on": 0}, ["0"]),
    (128, {"start": [0], "first": [0], "zeros": 2, "used": 3}, ["1110000" * 2]),
    (64, {"start": [0, 0], "first": [1, 0], "zeros": 2, "used": 3}, ["1110000" * 2 + "111", "0000111" * 2 + "0000"]),
    (
        32,
        {"start": [0, 1, 2, 1], "first": [1, 1, 0, 0], "zeros": 2, "used": 3, "shift": 2},
        ["00001110000111", "0000111000011", "111000011100", "1110000111000"],
    ),
]


@pytest.mark.parametrize(("m", "fields", "printed"), MASKS)
def test_zero_column_masks(m, fields, printed):
    n, shift = 128, fields.get("shift", 0)
    share = n // len(printed)
    mask = np.zeros(n, bool)
    for part, text in enumerate(printed):
        bits = [int(x) for x in reversed(text)]
        while len(bits) < share:  # the period is that of the example
            bits.append(bits[-7] if len(bits) >= 7 else 0)
        mask[part * share : (part + 1) * share] = bits[:share]
    a, b = matrix("f16", m), matrix("f16", n + 16)
    used = np.where(mask[:, None], 0, b[shift : n + shift])
    got = launch(a, b, idesc(m, n, "f16", "f16"), "kind::f16", layouts=("128b", "32b"), op="mma.ws",
                 after=f", {zero_mask(**fields)}")  # fmt: skip
    np.testing.assert_array_equal(got, spread(f32(exact(a, used)), blank(A + 8), m, ws=True))


def test_the_odd_cta_does_not_issue():
    text = "setp.eq.u32 %p6, %r1, 1; and.pred %p6, %p6, %p3; mov.pred %p7, 0;"
    text += f"mov.b32 %r20, {GOOD}; @%p6 tcgen05.mma.cta_group::2.kind::f16 [%r10], %rd40, %rd40, %r20, %p7;"
    with pytest.raises(Fault, match="issued by the odd CTA"):
        execute(text, blank(8, 2))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (1 << 46, "bits 46-48 must be 1"),
        (1 << 52, "absolute leading dimension address needs sm_103a"),
        (1 << 53, "bits 53-60 must be 0"),
        (3 << 61, "swizzle 3 is none"),
        (1 << 49, "base offset 1 without a swizzle"),
        ((2 << 61) + 7, "32 bytes along K from .* run over the swizzled row of 128"),
    ],
)
def test_refused_shared_memory_descriptors(bits, message):
    """ "Shared memory descriptor layout"."""
    word = descriptor(0, "none", 128, 128) ^ bits
    word = word - (1 << 64) if word >> 63 else word
    text = f"add.s64 %rd20, %rd40, {word}; mov.b32 %r20, {GOOD}; mov.pred %p6, 0;"
    with pytest.raises(Fault, match=message):
        execute(text + "@%p5 tcgen05.mma.cta_group::1.kind::f16 [%r10], %rd20, %rd20, %r20, %p6;", blank(16),
                np.zeros((1, 16384), np.uint8))  # fmt: skip


# --- sparse A ---

META = 128  # column of the metadata


def metadata(indices: np.ndarray, narrow: bool) -> np.ndarray:
    """Indices of 4 bits, [128, 8 or 16] -> words [128, columns], as CUTLASS lays them out (its `tmem_e_frg`):

    FP16, TF32   row m0 + 8 m1 + 16 m2 (m0 of 8, m1 of 2), half h of K: lane m0 + 8 h + 16 m2, bits 16 m1 on
    8 bits       row m: lane m, 8 indices a column
    """
    out = np.zeros((128, indices.shape[1] // 8), np.uint32)
    for row in range(128):
        for j, index in enumerate(map(int, indices[row])):
            if narrow:
                out[row, j // 8] |= np.uint32(index << 4 * (j % 8))
            else:
                lane = row % 8 + 8 * (j // 4) + 16 * (row // 16)
                out[lane, 0] |= np.uint32(index << 4 * (j % 4) + 16 * (row // 8 % 2))
    return out


def sparse(element: str, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Elements that are there, [rows, k], all of them with the zeros, [rows, 2 k], and the indices."""
    kept = matrix(element, rows)
    k = kept.shape[1]
    if element == "tf32":
        choices, width = {0b0100: (0,), 0b1110: (1,)}, 2
    else:
        pairs = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 1), (2, 3))
        choices, width = {first | second << 2: (first, second) for first, second in pairs}, 4
    indices = rng.choice(list(choices), (rows, 2 * k // width))
    full = np.zeros((rows, 2 * k), kept.dtype)
    for row in range(rows):
        for chunk, index in enumerate(map(int, indices[row])):
            for j, place_ in enumerate(choices[index]):
                full[row, width * chunk + place_] = kept[row, width // 2 * chunk + j]
    return kept, full, indices


def launch_sparse(element, kept, b, indices, word, *, ctas=1, selector=0, column=META, a_tensor=False, flag=1 << 2):
    narrow = KINDS[element][2] in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.uint8, np.int8)
    tensor = blank(A + 8, ctas)
    for cta in range(ctas):
        words = metadata(indices[128 * cta : 128 * cta + 128], narrow)
        tensor[cta, :, META + selector : META + selector + words.shape[1]] = words
        if a_tensor:
            rows = np.ascontiguousarray(kept[128 * cta : 128 * cta + 128]).view(np.uint32)
            tensor[cta, :, A : A + rows.shape[1]] = rows
    before = f"add.s32 %r23, %r10, {column};"
    return tensor, launch(kept, b, word | flag | selector, KINDS[element][0], ctas=ctas, tensor=tensor, op="mma.sp",
                          layouts=("128b", "64b"), before=before, a_tensor=a_tensor, meta="[%r23], ")  # fmt: skip


@pytest.mark.parametrize(("element", "ctas", "selector", "a_tensor"), [
    ("f16", 1, 0, False),
    ("bf16", 2, 1, False),
    ("f16", 1, 1, True),
    ("tf32", 1, 0, False),
    ("tf32", 2, 1, False),
    ("e4m3", 1, 0, False),
    ("e5m2", 2, 0, True),
    ("s8", 1, 0, False),
])  # fmt: skip
def test_sparse_a(element, ctas, selector, a_tensor):
    """ "Sparse Matrices": the zeros of A are not in memory, and the metadata says where they belong."""
    m, n = 128 * ctas, 32
    kept, full, indices = sparse(element, m)
    b = np.concatenate([matrix(element, n), matrix(element, n)], 1)
    word = idesc(m, n, element, element, "s32" if element == "s8" else "f32")
    tensor, got = launch_sparse(element, kept, b, indices, word, ctas=ctas, selector=selector, a_tensor=a_tensor)
    product = exact(full, b)
    want = product.astype(np.int64).astype(np.int32).view(np.uint32) if element == "s8" else f32(product)
    np.testing.assert_array_equal(got, spread(want, tensor, m))


@pytest.mark.parametrize(
    ("element", "m", "change", "message"),
    [
        ("f16", 128, {"index": 5}, "0b0101 in the metadata .* means nothing"),
        ("tf32", 128, {"index": 8}, "0b1000 in the metadata .* means nothing"),
        ("e4m3", 128, {"selector": 1}, "sparsity selector 1 with kind::f8f6f4"),
        ("f16", 128, {"selector": 2}, "does not know sparse A with selector 2"),
        ("f16", 128, {"column": META + 1}, "of metadata in column 129"),
        ("f16", 64, {}, "does not know sparse A of 64 rows"),
        ("f16", 128, {"flag": 0}, "says dense, the instruction is sparse"),
    ],
)
def test_refused_sparse(element, m, change, message):
    kept, _, indices = sparse(element, 128)
    index = change.pop("index", None)
    if index is not None:
        indices[77, 3] = index
    b = np.concatenate([matrix(element, 32), matrix(element, 32)], 1)
    with pytest.raises(Fault, match=message):
        launch_sparse(element, kept, b, indices, idesc(m, 32, element, element), **change)


@pytest.mark.parametrize("form", ["mma.ws.sp.cta_group::1.kind::f16", "mma.sp.cta_group::1.kind::mxf4.block_scale"])
def test_sparse_forms_that_are_not_known(form):
    text = f"mov.b32 %r20, {GOOD}; mov.pred %p6, 0;"
    scales = " [%r10], [%r10]," if "scale" in form else ""
    with pytest.raises(Fault, match=r"does not know tcgen05\.mma.*sparse A"):
        execute(text + f"@%p5 tcgen05.{form} [%r10], %rd40, %rd40, [%r10], %r20,{scales} %p6;", blank(8))
