"""Tensor maps as CuTe DSL's compiled host code packs them, and tensor copies against plain indexing."""

import numpy as np
import pytest

from ptx_emulator import DeadlockError, Fault, tensormap

from .ptx import run

SHARED = ".extern .shared .align 1024 .b8 dynamic[]; .shared .align 8 .b8 bar[8];"


def make(address=1 << 20, element="u16", sizes=(100, 50), strides=(208,), box=(64, 8), swizzle=128, **kw) -> bytes:
    return tensormap.encode(address, element, sizes, strides, box, swizzle, **kw)


def decoded(raw: bytes) -> tensormap.TensorMap:
    return tensormap.decode(np.frombuffer(raw, np.uint8))


def test_a_map_packed_by_compiled_host_code():
    """Words of a [300, 832] FP4 tensor with boxes of [128, 256], swizzled, from the host code of a compiled kernel."""
    words = [0x7F00_0000_0040, 288146 | (832 // 2 // 16) << 32, 0, 0, 831 | 299 << 32, 0, 0xFF << 56, 127]
    t = decoded(np.array(words + [0] * 8, np.uint64).tobytes())
    assert (t.address, t.element.name, t.sizes, t.strides, t.box) == (
        0x7F00_0000_0040, "b4x16", (832, 300), (416,), (256, 128),
    )  # fmt: skip
    assert (t.swizzle, t.row_bytes, t.counts) == (tensormap.Swizzle(128), 128, (256, 128))


def test_encode_and_decode_five_dimensions():
    sizes, strides, box, steps = (64, 3, 5, 7, 11), (1 << 37, 48, 1 << 33, 16), (64, 2, 1, 3, 4), (1, 2, 8, 1, 3)
    t = decoded(tensormap.encode(16, "f16", sizes, strides, (32, *box[1:]), 64, steps=steps, nan=True))
    assert (t.sizes, t.strides, t.box, t.steps) == (sizes, strides, (32, *box[1:]), steps)
    assert (t.swizzle, t.nan, t.counts) == (tensormap.Swizzle(64), True, (32, 1, 1, 3, 2))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (bytes(128), "not a tensor map"),
        (bytes([255] * 128), "not a tensor map"),
        (make(box=(4, 8), swizzle=0), "rows of 8 bytes"),
        (make(box=(72, 8)), "rows of 144 bytes, more than the swizzle's 128"),
        (make(box=(24, 8), swizzle=32), "rows of 48 bytes, more than the swizzle's 32"),
        (make(address=8), "address must be a multiple of 16"),
        (make(address=16, interleave=32, strides=(64, 64), sizes=(8, 8, 8), box=(8, 1, 1)), "be a multiple of 32"),
        (make(interleave=16), "interleaved tensor of rank 2"),
        (make(nan=True), "NaN outside of a tensor of u16"),
        (make(element="b4x16", sizes=(33, 8), box=(64, 8)), "odd number of 33 elements"),
    ],
)  # fmt: skip
def test_malformed_maps(raw, message):
    with pytest.raises(Fault, match=message):
        decoded(raw)


LOAD = """
mov.u32 %r0, %tid.x; mov.b32 %r1, dynamic; setp.eq.u32 %p1, %r0, 0; mov.b32 %r2, 1;
ld.param.b32 %r3, [x]; ld.param.b32 %r4, [y]; ld.param.b32 %r5, [bytes];
@%p1 mbarrier.init.shared.b64 [bar], %r2; bar.sync 0;
mov.b64 %rd1, map; cvta.param.u64 %rd2, %rd1;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], %r5;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd2, {%r3, %r4}], [bar];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0; @!%p2 bra WAIT;
mov.b32 %r6, %r0;
OUT: setp.ge.u32 %p3, %r6, %r5; @%p3 bra END;
add.s32 %r7, %r1, %r6; ld.shared.u8 %rs1, [%r7]; cvt.u64.u32 %rd3, %r6; add.s64 %rd3, %rd3, %rd63;
st.global.u8 [%rd3], %rs1; add.s32 %r6, %r6, 32; bra OUT;
END:
"""
PARAMS = ".param .align 64 .b8 map[128], .param .u64 data, .param .u32 x, .param .u32 y, .param .u32 bytes"


def load(
    data: np.ndarray, box: tuple[int, int], x: int, y: int, swizzle: int, expect: int = 0, width: int = 0, **kw
) -> np.ndarray:
    address, size = data.__array_interface__["data"][0], data.itemsize
    sizes, strides = (width or data.shape[1], data.shape[0]), (data.strides[0],)
    raw = tensormap.encode(address, f"u{8 * size}", sizes, strides, box, swizzle)
    total = box[0] * box[1] * size
    out = np.zeros(total, np.uint8)
    args = (raw, data, np.int32(x), np.int32(y), expect or total)
    run(kw.pop("body", LOAD), out, *args, params=PARAMS, shared=SHARED, dynamic=total, **kw)
    return out


def box_of(data: np.ndarray, box: tuple[int, int], x: int, y: int) -> np.ndarray:
    """Rows of the box, zero outside of the tensor."""
    out = np.zeros((box[1], box[0]), data.dtype)
    for r in range(box[1]):
        for c in range(box[0]):
            if 0 <= y + r < data.shape[0] and 0 <= x + c < data.shape[1]:
                out[r, c] = data[y + r, x + c]
    return out


def swizzle_by_hand(rows: np.ndarray, span: int) -> np.ndarray:
    """Figures of the swizzling modes; the box starts at a multiple of 1024."""
    if not span:
        return rows.reshape(-1)
    out = np.zeros_like(rows)
    for r in range(len(rows)):
        key = {128: r % 8, 64: r // 2 % 4, 32: r // 4 % 2}[span]
        for c in range(span // 16):
            out[r, (c ^ key) * 16 : (c ^ key) * 16 + 16] = rows[r, 16 * c : 16 * c + 16]
    return out.reshape(-1)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize(("x", "y"), [(0, 0), (16, 5), (80, 44), (-8, -3), (200, 0)])
def test_loads_swizzle_and_fill_with_zeros(swizzle, x, y):
    data = np.random.default_rng(1).integers(1, 2**16, (50, 104)).astype(np.uint16)
    box = ((swizzle or 48) // 2, 16)
    got = load(data, box, x, y, swizzle, width=100)
    want = swizzle_by_hand(box_of(data[:, :100], box, x, y).view(np.uint8), swizzle)
    np.testing.assert_array_equal(got, want)


def test_a_wrong_byte_count_hangs():
    data = np.zeros((50, 104), np.uint16)
    with pytest.raises(DeadlockError, match="0 of 1 arrivals and 16 bytes pending"):
        load(data, (64, 8), 0, 0, 128, expect=64 * 8 * 2 + 16)


def test_a_box_at_a_misaligned_place():
    with pytest.raises(Fault, match="not a multiple of 128"):
        load(np.zeros((8, 64), np.uint16), (64, 4), 0, 0, 128, body=LOAD.replace("dynamic; setp", "dynamic+64; setp"))


STORE = """
mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.b32 %r2, dynamic; add.s32 %r1, %r1, %r2;
add.s32 %r3, %r0, 1; st.shared.v4.b32 [%r1], {%r3, %r3, %r3, %r3};
fence.proxy.async.shared::cta; bar.sync 0;
mov.b64 %rd1, map; cvta.param.u64 %rd2, %rd1; mov.b32 %r4, 8; mov.b32 %r5, 14; elect.sync _|%p1, -1;
@%p1 OP [%rd2, {%r4, %r5}], [%r2];
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
"""


def store(op: str) -> np.ndarray:
    data = np.full((16, 12), 100, np.float32)
    raw = tensormap.encode(data.__array_interface__["data"][0], "f32", (12, 16), (48,), (16, 8), 0)
    run(STORE.replace("OP", op), np.zeros(4, np.uint8), raw, data, params=PARAMS.split(", .param .u32")[0],
        shared=SHARED, dynamic=512)  # fmt: skip
    return data


@pytest.mark.parametrize("reduce", [False, True])
def test_stores_and_reductions_leave_the_rest_alone(reduce):
    op = (
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add"
        if reduce
        else "cp.async.bulk.tensor.2d.global.shared::cta"
    )
    got = store(f"{op}.tile.bulk_group")
    want = np.full((16, 12), 100, np.float32)
    words = (np.arange(128, dtype=np.uint32) // 4 + 1).view(np.float32).reshape(8, 16)
    want[14:, 8:] = words[:2, :4] + (100 if reduce else 0)
    np.testing.assert_array_equal(got, want)
