"""mma and wgmma with a sparse A: metadata put into the threads' registers by hand, against products with all zeros.

tcgen05.mma.sp is in test_tcgen05_mma.
"""

import ml_dtypes
import numpy as np
import pytest

from ptx_emulator import Fault

from .ptx import run
from .test_matrix import WGMMA, descriptor, swizzled

rng = np.random.default_rng(5)
# PTX type -> numpy type, elements of a row of A that are stored
KINDS = {
    "f16": (np.float16, 16),
    "bf16": (ml_dtypes.bfloat16, 16),
    "tf32": (np.float32, 8),
    "e4m3": (ml_dtypes.float8_e4m3fn, 32),
    "s8": (np.int8, 32),
}


def small(rows: int, columns: int, dtype) -> np.ndarray:
    """Numbers whose products and sums are exact everywhere."""
    return rng.integers(-7, 8, (rows, columns)).astype(dtype)


def sparse(kind: str, ordered: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A's elements that are stored, [64, k / 2], all of them [64, k] and the indices."""
    dtype, stored = KINDS[kind]
    kept = small(64, stored, dtype)
    if kind == "tf32":
        choices, width = {0b0100: (0,), 0b1110: (1,)}, 2
    else:
        choices = {first | second << 2: (first, second) for first in range(4) for second in range(4) if first != second}
        choices = {index: places for index, places in choices.items() if not ordered or places[0] < places[1]}
        width = 4
    indices = rng.choice(list(choices), (64, 2 * stored // width))
    full = np.zeros((64, 2 * stored), dtype)
    for row in range(64):
        for chunk, index in enumerate(map(int, indices[row])):
            for j, place in enumerate(choices[index]):
                full[row, width * chunk + place] = kept[row, width // 2 * chunk + j]
    return kept, full, indices


def metadata(kind: str, indices: np.ndarray, selector: int) -> np.ndarray:
    """Figures of "Matrix Fragments for sparse wgmma.mma_async" and those of half of K for mma.sp, a word a thread; what
    nobody reads is random.

    k32, k16  threads T(2 s) and T(2 s + 1) of four: halves of K; rows g (lower 16 bits) and g + 8
    k64       T0, T2: row g, T1, T3: row g + 8; T0, T1: columns 0-31, T2, T3: columns 32-63
    half      of 8-bit elements thread T(2 s): row g, T(2 s + 1): row g + 8; else thread T(s): rows g (lower 16 bits)
              and g + 8
    """
    out = rng.integers(0, 1 << 32, 128).astype(np.uint32)
    for thread in range(128):
        first, (g, q) = 16 * (thread // 32), divmod(thread % 32, 4)
        if indices.shape[1] == 16:
            mine = indices[first + g + 8 * (q % 2), 8 * (q // 2) : 8 * (q // 2) + 8]
        elif indices.shape[1] == 4 and q == selector:
            mine = np.concatenate([indices[first + g], indices[first + g + 8]])
        elif indices.shape[1] == 8 and q // 2 == selector and kind == "s8":
            mine = indices[first + g + 8 * (q % 2)]
        elif indices.shape[1] == 8 and q // 2 == selector:
            part = slice(4 * (q % 2), 4 * (q % 2) + 4)
            mine = np.concatenate([indices[first + g, part], indices[first + g + 8, part]])
        else:
            continue
        out[thread] = sum(int(x) << 4 * n for n, x in enumerate(mine))
    return out


def wgmma(kind: str, kept: np.ndarray, b: np.ndarray, words: np.ndarray, selector: int, in_registers: bool):
    """m64n32 of one step along K: D [64, 32]."""
    stored = KINDS[kind][1]
    a_image, b_image = swizzled(kept.view(np.uint8), 32), swizzled(b.view(np.uint8), 64)
    image = np.concatenate([a_image, b_image])
    d, result = ", ".join(f"%r{110 + n}" for n in range(16)), "s32" if kind == "s8" else "f32"
    flags = {"s8": "", "tf32": ", 1, 1", "e4m3": ", 1, 1"}.get(kind, ", 1, 1, 0" if in_registers else ", 1, 1, 0, 0")
    left = "%rd41"
    text = (
        "ld.param.b64 %rd2, [meta]; mul.wide.u32 %rd3, %r0, 4; add.s64 %rd2, %rd2, %rd3; ld.global.b32 %r200, [%rd2];"
    )
    if in_registers:
        text += "ld.param.b64 %rd2, [rows]; mul.wide.u32 %rd3, %r0, 16; add.s64 %rd2, %rd2, %rd3;"
        text += "ld.global.v4.b32 {%r201, %r202, %r203, %r204}, [%rd2];"
        left = "{%r201, %r202, %r203, %r204}"
    text += (
        f"wgmma.mma_async.sp.sync.aligned.m64n32k{2 * stored}.{result}.{kind}.{kind} {{{d}}}, {left}, %rd42, %r200, "
        f"{selector}, %p2{flags};"
    )
    body = WGMMA.replace("INSTRUCTION", text).replace("SCALE", "0")
    body = body.replace("WAIT", "wgmma.wait_group.sync.aligned 0;")
    body += "".join(f"st.global.b32 [%rd1+{4 * n}], %r{110 + n};" for n in range(16))
    # registers of A: four bytes of a row at 4 q, rows g and g + 8, then the same 16 bytes on
    rows = np.zeros((128, 4), np.uint32)
    raw = np.ascontiguousarray(kept).view(np.uint32)
    for thread in range(128):
        first, (g, q) = 16 * (thread // 32), divmod(thread % 32, 4)
        for j in range(4):
            rows[thread, j] = raw[first + g + 8 * (j % 2), q + 4 * (j // 2)]
    out = np.zeros((128, 16), np.int32 if kind == "s8" else np.float32)
    params = ".param .u64 image, .param .u32 chunks, .param .u64 a, .param .u64 b, .param .u64 meta, .param .u64 rows"
    places = descriptor(0, 32, 8 * 32), descriptor(len(a_image), 64, 8 * 64)
    run(body, out, image, len(image) // 16, *places, words, rows, params=params, block=128, arch="sm_90a",
        shared=".extern .shared .align 1024 .b8 dynamic[];", dynamic=len(image))  # fmt: skip
    full = np.zeros((64, 32), out.dtype)
    for thread in range(128):
        for r in range(16):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (r // 2 % 2)
            full[row, 8 * (r // 4) + 2 * (thread % 4) + r % 2] = out[thread, r]
    return full


@pytest.mark.parametrize("in_registers", [False, True])
@pytest.mark.parametrize(
    ("kind", "selector"), [("f16", 0), ("f16", 1), ("bf16", 1), ("tf32", 0), ("tf32", 1), ("e4m3", 0), ("s8", 0)]
)
def test_wgmma_sp(kind, selector, in_registers):
    kept, full, indices = sparse(kind)
    b = small(32, full.shape[1], KINDS[kind][0])
    got = wgmma(kind, kept, b, metadata(kind, indices, selector), selector, in_registers)
    np.testing.assert_array_equal(got, full.astype(np.float64) @ b.astype(np.float64).T)


@pytest.mark.parametrize(
    ("kind", "index", "selector", "message"),
    [
        ("f16", 0b0101, 0, "0b0101 in the metadata of a sparse operand means nothing"),
        ("tf32", 0b1100, 0, "0b1100 in the metadata of a sparse operand means nothing"),
        ("e4m3", 0b0100, 1, "sparsity selector 1"),
    ],
)
def test_refused(kind, index, selector, message):
    kept, full, indices = sparse(kind)
    indices[37, 2] = index
    words = metadata(kind, indices, selector)
    b = small(32, full.shape[1], KINDS[kind][0])
    with pytest.raises(Fault, match=message):
        wgmma(kind, kept, b, words, selector, in_registers=False)


def mma(kind: str, kept: np.ndarray, b: np.ndarray, words: np.ndarray, selector: int, op: str = "sp") -> np.ndarray:
    """One of 64 or 32 bytes along K: D [16, 8]. Lane (g, q) holds four bytes of row g (or g + 8) at 4 q, 4 q + 16."""
    g, q = np.divmod(np.arange(32), 4)
    rows = [np.ascontiguousarray(x).view(np.uint32) for x in (kept, b)]
    count = b[0].nbytes // 16  # registers of A, and of B
    fragments = [rows[0][g + 8 * (j % 2), q + 4 * (j // 2)] for j in range(count)]
    fragments += [rows[1][g, q + 4 * j] for j in range(count)]
    source = np.ascontiguousarray(np.stack([*fragments, words[:32]]))
    result = "s32" if kind == "s8" else "f32"
    text = "mov.u32 %r0, %tid.x; ld.param.b64 %rd1, [src]; mul.wide.u32 %rd2, %r0, 4; add.s64 %rd1, %rd1, %rd2;"
    text += "".join(f"ld.global.b32 %r{10 + n}, [%rd1+{128 * n}];" for n in range(2 * count + 1))
    left, right = (", ".join(f"%r{first + n}" for n in range(count)) for first in (10, 10 + count))
    text += "".join(f"mov.b32 %r{20 + n}, 0;" for n in range(4))
    text += (
        f"mma.{op}.sync.aligned.m16n8k{2 * kept.shape[1]}.row.col.{result}.{kind}.{kind}.{result} "
        f"{{%r30, %r31, %r32, %r33}}, {{{left}}}, {{{right}}}, {{%r20, %r21, %r22, %r23}}, "
        f"%r{10 + 2 * count}, {selector}; add.s64 %rd3, %rd63, %rd2;"
    )
    text += "".join(f"st.global.b32 [%rd3+{128 * n}], %r{30 + n};" for n in range(4))
    out = np.zeros((4, 32), np.int32 if kind == "s8" else np.float32)
    run(text, out, source, params=".param .u64 src", arch="sm_90a")
    full = np.zeros((16, 8), out.dtype)
    for n in range(4):
        full[g + 8 * (n // 2), 2 * q + n % 2] = out[n]
    return full


@pytest.mark.parametrize("op", ["sp", "sp::ordered_metadata"])
@pytest.mark.parametrize(("kind", "selector"), [("f16", 0), ("bf16", 1), ("tf32", 0), ("tf32", 1), ("s8", 0)])
def test_mma_sp(kind, selector, op):
    kept, full, indices = sparse(kind, op != "sp")
    b = small(8, full.shape[1], KINDS[kind][0])
    got = mma(kind, kept[:16], b, metadata(kind, indices, selector), selector, op)
    np.testing.assert_array_equal(got, full[:16].astype(np.float64) @ b.astype(np.float64).T)


@pytest.mark.parametrize(
    ("kind", "selector"), [("f16", 0), ("f16", 3), ("bf16", 1), ("tf32", 0), ("tf32", 2), ("s8", 0), ("s8", 1)]
)
def test_mma_sp_of_32_bytes(kind, selector):
    kept, full, indices = sparse(kind)
    kept, full, indices = (np.ascontiguousarray(x[:, : x.shape[1] // 2]) for x in (kept, full, indices))
    b = small(8, full.shape[1], KINDS[kind][0])
    got = mma(kind, kept[:16], b, metadata(kind, indices, selector), selector)
    np.testing.assert_array_equal(got, full[:16].astype(np.float64) @ b.astype(np.float64).T)


def test_elements_of_b_that_no_row_meets_have_no_effect():
    kept, _, indices = sparse("f16")
    indices[:] = 0b0100  # the first two of four
    b = small(32, 32, np.float16)
    b[:, 2::4], b[:, 3::4] = np.inf, np.nan
    met = b.reshape(32, 8, 4)[:, :, :2].reshape(32, 16).astype(np.float64)
    words, want = metadata("f16", indices, 0), kept.astype(np.float64) @ met.T
    np.testing.assert_array_equal(wgmma("f16", kept, b, words, 0, in_registers=False), want)
    np.testing.assert_array_equal(mma("f16", kept[:16], b[:8], words, 0), want[:16, :8])


@pytest.mark.parametrize(
    ("kind", "index", "selector", "message"),
    [
        ("f16", 0b0001, 0, "0b0001 in the metadata of a sparse operand means nothing"),
        ("f16", 0b0100, 2, "sparsity selector 2"),
        ("e4m3", 0b0100, 0, "sums, of that type"),
    ],
)
def test_mma_sp_refused(kind, index, selector, message):
    kept, full, indices = sparse(kind, ordered=True)
    indices[11, 2] = index
    b = small(8, full.shape[1], KINDS[kind][0])
    with pytest.raises(Fault, match=message):
        mma(kind, kept[:16], b, metadata(kind, indices, selector), selector, "sp::ordered_metadata")
