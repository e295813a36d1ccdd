"""tcgen05.ld, .st, .cp and .shift against images of tensor memory that are written down from the PTX ISA's figures."""

import numpy as np
import pytest

from ptx_emulator import Fault

from .ptx import run
from .tensor import LANES, blank, descriptor, execute, images, place, swizzle

rng = np.random.default_rng(5)

# Figures "Matrix fragment for shape ...": cell (row, column) that register r of lane t holds
FRAGMENTS = {
    "32x32b": lambda t, r, n: (t, r),
    "16x64b": lambda t, r, n: (t // 4 + 8 * (t % 2), 2 * r + t // 2 % 2),
    "16x128b": lambda t, r, n: (t // 4 + 8 * (r % 2), 4 * (r // 2) + t % 4),
    "16x256b": lambda t, r, n: (t // 4 + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * (t % 4) + r % 2),
    "16x32bx2": lambda t, r, n: (t % 16, r + 24 * (t // 16)),  # the second half starts 24 columns on
}
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4, "16x32bx2": 1}
SHAPES = [(shape, num) for shape in FRAGMENTS for num in (1, 2, 8)]


def cells(shape: str, num: int, packed: bool, first: int) -> np.ndarray:
    """[lane of the warp, register, half] -> flat index into [128, 64] of a warp that starts at lane `first`."""
    out = np.zeros((32, num * REGISTERS[shape], 2), int)
    for t in range(32):
        for r in range(out.shape[1]):
            row, column = FRAGMENTS[shape](t, r, num)
            if packed:  # "Packing and Unpacking": two neighbouring columns, their low halves in one register
                half = 24 * (t // 16) if shape == "16x32bx2" else 0
                column = half + 2 * (column - half)
            out[t, r] = (first + row) * 64 + column + np.arange(2)
    return out


def warps_issue(form: str, shape: str, num: int, packed: bool, upper: int) -> tuple[str, int]:
    """A load or store by all four warps from column 0 of their sub-partition, lane `upper` of it on, with its global
    side at %rd20 = %rd63 + 32 * 1024 * 4 bytes.
    """
    count = num * REGISTERS[shape]
    registers = ", ".join(f"%r{50 + n}" for n in range(count))
    half = ", 24" if shape == "16x32bx2" else ""
    address = f"add.s32 %r20, %r13, {upper << 16}; mov.b32 %r21, {count * 4}; mul.wide.u32 %rd21, %r0, %r21;"
    address += " add.s64 %rd21, %rd21, %rd20;"
    if form == "ld":
        pack = ".pack::16b" if packed else ""
        text = f"tcgen05.ld.sync.aligned.{shape}.x{num}{pack}.b32 {{{registers}}}, [%r20]{half};"
        text += "tcgen05.wait::ld.sync.aligned;"
        moves = "".join(f"st.global.b32 [%rd21+{4 * n}], %r{50 + n};" for n in range(count))
        return f"{address} {text} {moves}", count
    pack = ".unpack::16b" if packed else ""
    moves = "".join(f"ld.global.b32 %r{50 + n}, [%rd21+{4 * n}];" for n in range(count))
    text = f"tcgen05.st.sync.aligned.{shape}.x{num}{pack}.b32 [%r20]{half}, {{{registers}}};"
    text += "tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync; bar.sync 0;"
    return f"{address} {moves} {text}", count


def with_registers(text: str, tensor: np.ndarray, registers: np.ndarray) -> np.ndarray:
    """`execute`, with `registers` in %rd20."""
    from .tensor import DUMP, FILL, PARAMS, SHARED

    out, image = np.zeros_like(tensor), np.zeros(16, np.uint8)
    body = FILL + "ld.param.b64 %rd20, [more];" + text + DUMP
    body = body.replace("CTAS", "1").replace("MASK", "1")
    run(
        body,
        out,
        image,
        1,
        tensor,
        tensor.shape[2],
        registers,
        params=PARAMS + ", .param .u64 more",
        block=LANES,
        shared=SHARED,
        dynamic=16,
    )
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("shape", "num"), SHAPES)
def test_load(shape, num, packed):
    """ "Matrix fragments for shape ...", "Packing and Unpacking"."""
    num = min(num, 4) if packed else num
    tensor = rng.integers(0, 1 << 32, (1, LANES, 64), dtype=np.uint32)
    upper = 0 if shape == "32x32b" else 16
    text, count = warps_issue("ld", shape, num, packed, upper)
    got = np.zeros((LANES, count), np.uint32)
    with_registers(text, tensor, got)
    flat = tensor.reshape(-1)
    for warp in range(4):
        at = cells(shape, num, packed, 32 * warp + upper)
        want = flat[at[..., 0]]
        if packed:
            want = (want & 0xFFFF) | flat[at[..., 1]] << np.uint32(16)
        np.testing.assert_array_equal(got[32 * warp : 32 * warp + 32], want)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("shape", "num"), SHAPES)
def test_store(shape, num, packed):
    """The same figures; cells that no register names keep what they hold."""
    num = min(num, 4) if packed else num
    upper = 0 if shape == "32x32b" else 16
    text, count = warps_issue("st", shape, num, packed, upper)
    registers = rng.integers(0, 1 << 32, (LANES, count), dtype=np.uint32)
    tensor = blank(64)
    got = with_registers(text, tensor, registers)
    want = tensor.copy().reshape(-1)
    for warp in range(4):
        at, values = cells(shape, num, packed, 32 * warp + upper), registers[32 * warp : 32 * warp + 32]
        want[at[..., 0]] = values & 0xFFFF if packed else values
        if packed:
            want[at[..., 1]] = values >> 16
    np.testing.assert_array_equal(got.reshape(-1), want)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tcgen05.ld.sync.aligned.16x64b.x1.b32 {%r50}, [%r20];", "multiples of 16"),
        ("tcgen05.ld.sync.aligned.16x256b.x64.b32 {%r50}, [%r20];", "x64"),
        ("tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {%r50}, [%r13];", "1 registers, 2 operands"),
        ("tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r50}, [%r13];", "1 registers"),
        ("tcgen05.ld.red.sync.aligned.32x32b.x2.max.u32 {%r50, %r51}, %r52, [%r13];", "sm_103f or sm_110f, sm_100a"),
        ("tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r13+600];", "columns 600..600 .* not allocated"),
        (
            "tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r50,%r51,%r52,%r53,%r54,%r55,%r56,%r57}, [%r13+4];",
            "column 8 .*never",
        ),
    ],
)
def test_refused_loads(text, message):
    with pytest.raises(Fault, match=message):
        execute(f"add.s32 %r20, %r13, {8 << 16}; {text}", blank(8))


# --- tcgen05.cp ---

# lanes that row r of the source goes to ("tcgen05.cp": warp pairs receive half of the data each)
COPIES = {
    "128x256b": (128, 32, lambda r: [r]),
    "128x128b": (128, 16, lambda r: [r]),
    "4x256b": (4, 32, lambda r: [32 * r]),
    "64x128b.warpx2::02_13": (64, 16, lambda r: [r, r + 64]),
    "64x128b.warpx2::01_23": (64, 16, lambda r: [r % 32 + 64 * (r // 32), r % 32 + 64 * (r // 32) + 32]),
    "32x128b.warpx4": (32, 16, lambda r: [r, r + 32, r + 64, r + 96]),
}


@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("shape", COPIES)
def test_copy(shape, ctas):
    """ "tcgen05.cp": each CTA of the group copies from its own shared memory to its own tensor memory."""
    rows, width, lanes = COPIES[shape]
    source = rng.integers(0, 256, (ctas, rows, width)).astype(np.uint8)
    parts = [place(s, "none", False) for s in np.pad(source, ((0, 0), (0, -rows % 8), (0, 0)))]
    _, leading, stride = parts[0]
    image = np.stack([images(p[0])[0] for p in parts])
    tensor = blank(16, ctas)
    text = f"add.s64 %rd20, %rd40, {descriptor(0, 'none', leading, stride)}; add.s32 %r20, %r10, 4;"
    got = execute(f"{text} @%p5 tcgen05.cp.cta_group::{ctas}.{shape} [%r20], %rd20;", tensor, image)
    want = tensor.copy()
    for cta in range(ctas):
        for r in range(rows):
            for lane in lanes(r):
                want[cta, lane, 4 : 4 + width // 4] = source[cta, r].view(np.uint32)
    np.testing.assert_array_equal(got, want)


def test_copy_of_four_rows_to_the_last_lane_of_each_quarter():
    source = rng.integers(0, 256, (8, 32)).astype(np.uint8)
    data, leading, stride = place(source, "none", False)
    tensor = blank(8)
    text = f"add.s64 %rd20, %rd40, {descriptor(0, 'none', leading, stride)}; add.s32 %r20, %r10, {31 << 16};"
    got = execute(f"{text} @%p5 tcgen05.cp.cta_group::1.4x256b [%r20], %rd20;", tensor, images(data)[0][None])
    tensor[0, 31::32] = source[:4].view(np.uint32)
    np.testing.assert_array_equal(got, tensor)


def test_copy_of_a_swizzled_matrix():
    source = rng.integers(0, 256, (128, 128)).astype(np.uint8)
    data, leading, stride = place(source, "128b", False)
    text = f"add.s64 %rd20, %rd40, {descriptor(64, '128b', leading, stride)};"
    got = execute(f"{text} @%p5 tcgen05.cp.cta_group::1.128x256b [%r10], %rd20;", blank(8), images(data)[0][None])
    np.testing.assert_array_equal(got[0].view(np.uint8), source[:, 64:96])


@pytest.mark.parametrize(("bits", "form", "shift"), [(4, "b4x16_p64", 2), (6, "b6x16_p32", 1)])
def test_decompression(bits, form, shift):
    """ "Optional Decompression": sixteen elements of 4 (6) bits and 8 (4) bytes of padding become sixteen bytes, each
    element in the middle of its byte.
    """
    codes = rng.integers(0, 1 << bits, (128, 32))
    source = np.zeros((128, 32), np.uint8)
    for r in range(128):
        for chunk in range(2):
            number = sum(int(c) << bits * n for n, c in enumerate(codes[r, 16 * chunk : 16 * chunk + 16]))
            source[r, 16 * chunk : 16 * chunk + 2 * bits] = list(number.to_bytes(2 * bits, "little"))
    source[:, 15::16] = 0xEE  # padding is not looked at
    data, leading, stride = place(source, "none", False)
    text = f"add.s64 %rd20, %rd40, {descriptor(0, 'none', leading, stride)};"
    issue = f"{text} @%p5 tcgen05.cp.cta_group::1.128x256b.b8x16.{form} [%r10], %rd20;"
    got = execute(issue, blank(8), images(data)[0][None])
    np.testing.assert_array_equal(got[0].view(np.uint8), codes << shift)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tcgen05.cp.cta_group::1.128x256b [%r20], %rd20;", "to lane 1 of"),
        ("tcgen05.cp.cta_group::1.4x256b [%r21], %rd20;", "to lane 32 of"),
        ("tcgen05.cp.cta_group::1.64x128b [%r10], %rd20;", "does not know tcgen05.cp"),
        ("tcgen05.cp.cta_group::1.32x128b.warpx2::01_23 [%r10], %rd20;", "does not know tcgen05.cp"),
        ("tcgen05.cp.cta_group::1.128x256b.b8x16 [%r10], %rd20;", "does not know tcgen05.cp"),
        ("tcgen05.cp.cta_group::2.128x256b [%r10], %rd20;", "cta_group::2 in a kernel .* cta_group::1"),
        ("tcgen05.shift.cta_group::1.down [%r20];", "lane 1 of .* not a multiple of 32"),
        ("tcgen05.shift.cta_group::1.down [%r22];", "columns 508..515 .* not allocated"),
    ],
)
def test_refused_copies(text, message):
    setup = f"add.s32 %r20, %r10, {1 << 16}; add.s32 %r21, %r10, {32 << 16}; add.s32 %r22, %r10, 508;"
    setup += f"add.s64 %rd20, %rd40, {descriptor(0, 'none', 128, 128)};"
    with pytest.raises(Fault, match=message):
        execute(f"{setup} @%p5 {text}", blank(8), np.zeros((1, 8192), np.uint8))


# --- tcgen05.shift ---


@pytest.mark.parametrize("ctas", [1, 2])
@pytest.mark.parametrize("order", ["cta_group::{}.down", "down.cta_group::{}"])
def test_shift(order, ctas):
    """ "tcgen05.shift": 32 bytes of all rows of a sub-partition but the last; that rows go towards lane 0 is what
    NVIDIA's examples report of a B200.
    """
    tensor = blank(24, ctas)
    issue = f"add.s32 %r20, %r10, {64 << 16 | 8}; @%p5 tcgen05.shift.{order.format(ctas)} [%r20];"
    got = execute(issue, tensor)
    want = tensor.copy()
    want[:, 64:95, 8:16] = tensor[:, 65:96, 8:16]
    np.testing.assert_array_equal(got, want)


def test_swizzle_of_32_byte_atoms():
    """Figure "MN major 128B swizzling with 32B atomicity": the 32-byte atom a of row r is at place a ^ r % 4."""
    for r in range(8):
        for a in range(4):
            assert swizzle(np.array(128 * r + 32 * a + 5), "128b_atom32") == 128 * r + 32 * (a ^ r % 4) + 5
