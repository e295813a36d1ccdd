"""Tensor maps as CuTe DSL's compiled host code packs them, and tensor copies against plain indexing."""

import numpy as np
import pytest

from ptx_emulator import DeadlockError, Fault, tensormap

from .ptx import run

SHARED, DYNAMIC = ".shared .align 8 .b8 bar[8];", ".extern .shared .align 1024 .b8 dynamic[];"


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
        (make(swizzle=tensormap.Swizzle(64, 32), box=(32, 8)), "atoms of 32 bytes in a swizzle of 64"),
        (make(element="b4x16_p64", sizes=(256, 8), box=(64, 8), strides=(128,)), "and 128, are required"),
        (make(element="b6x16_p32", sizes=(256, 8), box=(128, 8), strides=(208,)), "not a multiple of 32"),
        (
            make(1 << 20, "b6x16_p32", (256, 8), (192,), (128, 8), tensormap.Swizzle(128, 32, True)),
            "b6x16_p32 with a swizzle of 128B",
        ),
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
    total = box[0] * box[1] * size * kw.pop("rows", 1)
    out = np.zeros(total, np.uint8)
    args = (raw, data, np.int32(x), np.int32(y), expect or total)
    run(kw.pop("body", LOAD), out, *args, params=PARAMS, shared=SHARED, extra=DYNAMIC, dynamic=total, **kw)
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
        shared=SHARED, extra=DYNAMIC, dynamic=512)  # fmt: skip
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


ATOMS = [tensormap.Swizzle(128, 32), tensormap.Swizzle(128, 32, True), tensormap.Swizzle(128, 64)]
# PTX ISA, "Swizzling modes": which 16 bytes of a row of eight stand where, row by row
FIGURES = {
    32: ["01234567", "23016745", "45670123", "67452301"],
    64: ["01234567", "45670123"],
}


@pytest.mark.parametrize("swizzle", ATOMS, ids=str)
def test_swizzles_with_larger_atoms(swizzle):
    data = np.random.default_rng(2).integers(0, 2**16, (50, 104)).astype(np.uint16)
    got = load(data, (64, 16), 32, 5, swizzle).reshape(16, 8, 16)
    rows = box_of(data, (64, 16), 32, 5).view(np.uint8).reshape(16, 8, 16)
    figure = FIGURES[swizzle.atom]
    for r in range(16):
        for place, chunk in enumerate(figure[r % len(figure)]):
            want = rows[r, int(chunk)]
            if swizzle.flip and r % 2:
                want = np.roll(want, 8)
            np.testing.assert_array_equal(got[r, place], want)


GATHER = LOAD.replace("tensor.2d.shared::cta.global.tile.", "tensor.2d.shared::cta.global.tile::gather4.").replace(
    "{%r3, %r4}", "{%r3, %r4, %r20, %r21, %r22}"
)
ROWS = "mov.b32 %r20, 49; mov.b32 %r21, -1; mov.b32 %r22, 3;"


def test_gather4_takes_four_rows():
    data = np.random.default_rng(2).integers(0, 2**16, (50, 104)).astype(np.uint16)
    got = load(data, (32, 1), 16, 7, 64, expect=256, body=ROWS + GATHER, rows=4)
    want = np.concatenate([box_of(data, (32, 1), 16, y) for y in (7, 49, -1, 3)])
    np.testing.assert_array_equal(got, swizzle_by_hand(want.view(np.uint8), 64))
    with pytest.raises(Fault, match="one row and no interleave"):
        load(data, (32, 2), 16, 7, 64, expect=256, body=ROWS + GATHER, rows=4)


@pytest.mark.parametrize(("element", "packed"), [("b4x16_p64", 8), ("b6x16_p32", 12)])
def test_padded_elements(element, packed):
    """Sixteen elements to sixteen bytes; transactions count what global memory holds."""
    rows, width = 6, 256 // 16 * packed
    raw = np.zeros(rows * width + 32, np.uint8)
    data = raw[-raw.__array_interface__["data"][0] % 32 :][: rows * width].reshape(rows, width)
    data[:] = np.random.default_rng(9).integers(1, 256, data.shape)
    t = tensormap.encode(data.__array_interface__["data"][0], element, (256, rows), (width,), (128, 4), 128)
    out = np.zeros(512, np.uint8)
    body = LOAD.replace("mov.b32 %r6, %r0;", "mov.b32 %r6, %r0; mov.b32 %r5, 512;").replace(
        "ld.shared.u8 %rs1, [%r7];", "and.b32 %r8, %r6, 15; setp.ge.u32 %p4, %r8, PACKED; mov.b16 %rs1, 0;"
        "shr.u32 %r9, %r6, 3; and.b32 %r9, %r9, 112; xor.b32 %r7, %r7, %r9; @!%p4 ld.shared.u8 %rs1, [%r7];"
    )  # fmt: skip
    args = (t, data, np.int32(128), np.int32(3), 4 * 8 * packed)
    run(body.replace("PACKED", str(packed)), out, *args, params=PARAMS, shared=SHARED, extra=DYNAMIC, dynamic=512)
    want = np.zeros((4, 8, 16), np.uint8)
    want[:3, :, :packed] = data[3:, width // 2 :].reshape(3, 8, packed)
    np.testing.assert_array_equal(out, want.reshape(-1))


def test_stores_of_six_bit_elements_drop_their_padding():
    data = np.zeros(96 * 3 + 32, np.uint8)
    data = data[-data.__array_interface__["data"][0] % 32 :][: 96 * 3].reshape(3, 96)
    t = tensormap.encode(data.__array_interface__["data"][0], "b6x16_p32", (128, 3), (96,), (128, 1))
    body = """
    mov.u32 %r0, %tid.x; mov.b32 %r2, dynamic; mad.lo.u32 %r1, %r0, 4, %r2; mul.lo.u32 %r3, %r0, 0x9E3779B1;
    st.shared.b32 [%r1], %r3; mul.wide.u32 %rd4, %r0, 4; add.s64 %rd4, %rd4, %rd63; st.global.b32 [%rd4], %r3;
    fence.proxy.async.shared::cta; bar.sync 0; mov.b64 %rd1, map; cvta.param.u64 %rd2, %rd1; elect.sync _|%p1, -1;
    @%p1 cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%rd2, {0, 1}], [%r2];
    cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
    """
    seen = np.zeros(128, np.uint8)
    run(body, seen, t, data, params=PARAMS.split(", .param .u32")[0], shared=SHARED, extra=DYNAMIC, dynamic=128)
    number = sum(int(x & 63) << 6 * n for n, x in enumerate(seen))
    np.testing.assert_array_equal(data[1], np.frombuffer(number.to_bytes(96, "little"), np.uint8))
    assert not data[[0, 2]].any()


SCATTER = STORE.replace("{%r4, %r5}", "{%r4, %r5, %r6, %r7, %r8}").replace(
    "elect.sync", "mov.b32 %r6, 0; mov.b32 %r7, 16; mov.b32 %r8, 9; elect.sync"
)


def test_scatter4_writes_four_rows():
    data = np.full((16, 12), 100, np.float32)
    raw = tensormap.encode(data.__array_interface__["data"][0], "f32", (12, 16), (48,), (16, 1))
    body = SCATTER.replace("OP", "cp.async.bulk.tensor.2d.global.shared::cta.tile::scatter4.bulk_group")
    run(body, np.zeros(4, np.uint8), raw, data, params=PARAMS.split(", .param .u32")[0],
        shared=SHARED, extra=DYNAMIC, dynamic=512)  # fmt: skip
    want = np.full((16, 12), 100, np.float32)
    words = (np.arange(64, dtype=np.uint32) // 4 + 1).view(np.float32).reshape(4, 16)
    for row, values in zip((14, 0, 16, 9), words, strict=True):
        if row < 16:
            want[row, 8:] = values[:4]
    np.testing.assert_array_equal(data, want)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("mov.b32 %r4, 8", "mov.b32 %r4, -4", "none may be negative"),
        ("mov.b32 %r4, 8", "mov.b32 %r4, 2", "multiples of 16 are required"),
        ("tensor.2d", "tensor.3d", "3 coordinates for a tensor map of rank 2"),
        (".add.", ".min.", "a reduction min of a tensor of f32"),
    ],
)
def test_stores_that_are_refused(old, new, message):
    op = "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group"
    data = np.zeros((16, 12), np.float32)
    raw = tensormap.encode(data.__array_interface__["data"][0], "f32", (12, 16), (48,), (16, 8))
    text = STORE.replace("OP", op).replace(old, new)
    if "3d" in new:
        text = text.replace("{%r4, %r5}", "{%r4, %r5, %r5}")
    with pytest.raises(Fault, match=message):
        run(text, np.zeros(4, np.uint8), raw, data, params=PARAMS.split(", .param .u32")[0],
            shared=SHARED, extra=DYNAMIC, dynamic=512)  # fmt: skip


def test_prefetch_checks_the_map_and_moves_nothing():
    data = np.zeros((50, 104), np.uint16)
    body = """
    mov.b64 %rd1, map; cvta.param.u64 %rd2, %rd1; prefetch.tensormap [%rd2]; mov.b32 %r1, X;
    cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd2, {%r1, %r1}];
    """
    args = (make(address=data.__array_interface__["data"][0]), data)
    params = PARAMS.split(", .param .u32")[0]
    done = run(body.replace("X", "8"), np.zeros(1, np.uint8), *args, params=params)
    assert done.bytes["global load"] == 0
    with pytest.raises(Fault, match="multiples of 16"):
        run(body.replace("X", "4"), np.zeros(1, np.uint8), *args, params=params)
    with pytest.raises(Fault, match="not a tensor map"):
        run(body.replace("X", "8"), np.zeros(1, np.uint8), bytes(128), data, params=params)


# a grouped GEMM's way: the map changes in shared memory, goes to global memory and is read there
CHANGE = """
mov.u32 %r0, %tid.x; mov.b32 %r1, dynamic; mov.b32 %r2, m; setp.eq.u32 %p1, %r0, 0; ld.param.b64 %rd4, [table];
mov.b64 %rd1, map; cvta.param.u64 %rd2, %rd1; mul.lo.u32 %r3, %r0, 4; cvt.u64.u32 %rd5, %r3; add.s64 %rd6, %rd1, %rd5;
ld.param.b32 %r4, [%rd6]; add.u32 %r5, %r2, %r3; st.shared.b32 [%r5], %r4; bar.warp.sync -1;
ld.param.b64 %rd7, [data]; mov.b32 %r6, 40; mov.b64 %rd8, 128; mov.b32 %r9, 1;
@%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r2], %rd7;
@%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r2], 1, %r6;
@%p1 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r2], 0, %rd8;
@%p1 tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%r2], 3;
@%p1 tensormap.replace.tile.swizzle_atomicity.shared::cta.b1024.b32 [%r2], 3;
bar.warp.sync -1;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%rd4], [m], 128;
FENCE
@%p1 mbarrier.init.shared.b64 [bar], %r9; bar.sync 0; mov.b32 %r8, 1024;
@%p1 mbarrier.arrive.expect_tx.shared.b64 _, [bar], %r8;
@%p1 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd4, {0, 36}], [bar];
WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0; @!%p2 bra WAIT;
mul.lo.u32 %r10, %r0, 32; add.u32 %r11, %r1, %r10; cvt.u64.u32 %rd9, %r10; add.s64 %rd9, %rd9, %rd63;
ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r11]; st.global.v4.b32 [%rd9], {%r12, %r13, %r14, %r15};
ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r11+16]; st.global.v4.b32 [%rd9+16], {%r12, %r13, %r14, %r15};
"""
FENCE = "fence.proxy.tensormap::generic.acquire.gpu [%rd4], 128;"


def test_a_map_changed_in_shared_memory():
    data = np.random.default_rng(3).integers(0, 2**16, (50, 64)).astype(np.uint16)
    table, out = np.zeros(256, np.uint8), np.zeros(1024 + 16, np.uint8)
    table = table[-table.__array_interface__["data"][0] % 128 :][:128]
    out = out[-out.__array_interface__["data"][0] % 16 :][:1024]
    args = (make(sizes=(64, 7), box=(64, 8), swizzle=0), data, table)
    more = {
        "params": ".param .align 64 .b8 map[128], .param .u64 data, .param .u64 table",
        "shared": SHARED + ".shared .align 128 .b8 m[128];",
        "extra": DYNAMIC,
        "dynamic": 1024,
    }
    want = np.zeros((8, 2, 64), np.uint8)
    want[:4] = data[36:40].view(np.uint8).reshape(4, 2, 64)
    want[1::2] = want[1::2, ::-1]
    whole = CHANGE.replace("FENCE", FENCE)
    store = "st.shared.b32 [%r5], %r4;"
    # CuTe DSL copies 64 of the 128 bytes: the others mean nothing
    for text in (whole, whole.replace(store, f"setp.lt.u32 %p3, %r0, 16; @%p3 {store}")):
        out[:] = 0xAA
        run(text, out, *args, **more)
        np.testing.assert_array_equal(out, want.reshape(-1))
    with pytest.raises(Fault, match="fence"):
        run(CHANGE.replace("FENCE", ""), out, *args, **more)


PAIR = """
mov.u32 %r0, %tid.x; mov.b32 %r1, dynamic; setp.eq.u32 %p1, %r0, 0; mov.u32 %r2, %cluster_ctarank; mov.b32 %r3, 1;
@%p1 mbarrier.init.shared::cta.b64 [bar], %r3; fence.mbarrier_init.release.cluster;
mov.b64 %rd1, map; cvta.param.u64 %rd2, %rd1; mov.b32 %r4, bar; and.b32 %r5, %r4, 0xFEFFFFFF; and.b32 %r6, %r2, 1;
setp.eq.u32 %p2, %r6, 0; and.pred %p3, %p1, %p2; mov.b32 %r7, 2048; setp.eq.u32 %p4, %r2, 1; and.pred %p4, %p4, %p1;
@%p3 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], %r7;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mov.b16 %rs2, 15;
@%p4 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster.cta_group::2
    [%r1], [%rd2, {0, 3}], [%r5], %rs2;
@!%p2 bra AFTER;
WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p5, [bar], 0; @!%p5 bra WAIT;
AFTER: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
mul.lo.u32 %r10, %r0, 32; add.u32 %r11, %r1, %r10; mad.lo.u32 %r12, %r2, 1024, %r10; cvt.u64.u32 %rd9, %r12;
add.s64 %rd9, %rd9, %rd63;
ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r11]; st.global.v4.b32 [%rd9], {%r12, %r13, %r14, %r15};
ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r11+16]; st.global.v4.b32 [%rd9+16], {%r12, %r13, %r14, %r15};
"""


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_a_multicast_that_signals_the_even_cta_of_each_pair(schedule):
    data = np.random.default_rng(3).integers(0, 2**16, (50, 64)).astype(np.uint16)
    raw, out = make(address=data.__array_interface__["data"][0], sizes=(64, 50), strides=(128,), swizzle=0), None
    out = np.zeros(4096 + 16, np.uint8)
    out = out[-out.__array_interface__["data"][0] % 16 :][:4096]
    run(PAIR, out, raw, data, params=PARAMS.split(", .param .u32")[0], shared=SHARED, extra=DYNAMIC, dynamic=1024,
        cluster=4, grid=4, schedule=schedule)  # fmt: skip
    np.testing.assert_array_equal(out.reshape(4, -1), [data[3:11].view(np.uint8).reshape(-1)] * 4)
    alone = PAIR.replace(".multicast::cluster.cta_group::2", "").replace("[%r5], %rs2;", "[%r5];")
    with pytest.raises(Fault, match="signals an mbarrier of rank"):
        run(alone, out, raw, data, params=PARAMS.split(", .param .u32")[0], shared=SHARED, extra=DYNAMIC, dynamic=1024,
            cluster=4, grid=4)  # fmt: skip
