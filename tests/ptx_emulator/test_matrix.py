"""ldmatrix, stmatrix, mma.sync and wgmma against fragments written down by hand."""

import ml_dtypes
import numpy as np
import pytest

from ptx_emulator import Fault, UnknownInstructionError

from .ptx import run

rng = np.random.default_rng(5)


def exact(*shape: int) -> np.ndarray:
    """Numbers whose products add up without rounding, whatever the order."""
    return rng.integers(-7, 8, shape).astype(np.float32)


BF16 = ml_dtypes.bfloat16


def test_ldmatrix_and_stmatrix():
    """Lane t holds row t / 4, columns 2 (t % 4) and the next; transposed, the matrix's columns are rows."""
    body = """
    mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.b32 %r2, buf; add.s32 %r2, %r2, %r1;
    ld.param.b64 %rd1, [src]; mul.wide.u32 %rd2, %r0, 16; add.s64 %rd1, %rd1, %rd2;
    ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1]; st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%r3, %r4, %r5, %r6}, [%r2];
    stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {%r3, %r4, %r5, %r6};
    bar.sync 0;
    ld.shared.v4.b32 {%r3, %r4, %r5, %r6}, [%r2]; add.s64 %rd3, %rd63, %rd2;
    st.global.v4.b32 [%rd3], {%r3, %r4, %r5, %r6};
    """
    data = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    got = np.zeros_like(data)
    run(body, got, data, params=".param .u64 src", shared=".shared .align 16 .b8 buf[512];")
    np.testing.assert_array_equal(got, data.transpose(0, 2, 1))


def test_ldmatrix_of_bytes():
    """Two matrices of 16 x 16 bytes, transposed: lane t holds of columns t / 4 and t / 4 + 8 rows 4 (t % 4) to the
    third after it, which is how B of an 8-bit MMA is held.
    """
    body = """
    mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.b32 %r2, buf; add.s32 %r2, %r2, %r1;
    ld.param.b64 %rd1, [src]; mul.wide.u32 %rd2, %r0, 16; add.s64 %rd1, %rd1, %rd2;
    ld.global.v4.b32 {%r3, %r4, %r5, %r6}, [%rd1]; st.shared.v4.b32 [%r2], {%r3, %r4, %r5, %r6};
    bar.sync 0;
    ldmatrix.sync.aligned.m16n16.x2.trans.shared.b8 {%r3, %r4, %r5, %r6}, [%r2];
    add.s64 %rd3, %rd63, %rd2; st.global.v4.b32 [%rd3], {%r3, %r4, %r5, %r6};
    """
    source = rng.integers(0, 256, (2, 16, 16), dtype=np.uint8)
    got = np.zeros((32, 2, 2, 4), np.uint8)
    run(body, got, source, params=".param .u64 src", shared=".shared .align 16 .b8 buf[512];")
    for t in range(32):
        for matrix in range(2):
            for half in range(2):
                rows = slice(4 * (t % 4), 4 * (t % 4) + 4)
                assert np.array_equal(got[t, matrix, half], source[matrix, rows, t // 4 + 8 * half])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix_of_bytes(count):
    """PTX ISA, "stmatrix", .m16n8: fragments like those of the result of mma.m16n8k16, stored column by column."""
    registers = ", ".join(f"%r{10 + n}" for n in range(count))
    loads = "".join(f"ld.global.b32 %r{10 + n}, [%rd1+{4 * n}];" for n in range(count))
    body = f"""
    mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.b32 %r2, buf; add.s32 %r2, %r2, %r1;
    ld.param.b64 %rd1, [src]; mul.wide.u32 %rd2, %r0, {4 * count}; add.s64 %rd1, %rd1, %rd2; {loads}
    stmatrix.sync.aligned.m16n8.x{count}.trans.shared.b8 [%r2], {{{registers}}};
    bar.sync 0; setp.lt.u32 %p1, %r0, {8 * count}; mul.wide.u32 %rd4, %r0, 16; add.s64 %rd3, %rd63, %rd4;
    @%p1 ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2]; @%p1 st.global.v4.b32 [%rd3], {{%r3, %r4, %r5, %r6}};
    """
    source = rng.integers(0, 256, (32, count, 4), dtype=np.uint8)
    got = np.zeros((count, 8, 16), np.uint8)
    keyed = {"params": ".param .u64 src", "shared": ".shared .align 16 .b8 buf[512];"}
    run(body, got, source, **keyed)
    for t in range(32):
        g, q = t // 4, t % 4
        for matrix in range(count):
            places = [(2 * q, g), (2 * q + 1, g), (2 * q, g + 8), (2 * q + 1, g + 8)]
            assert [got[matrix][place] for place in places] == source[t, matrix].tolist()
    with pytest.raises(UnknownInstructionError, match="m16n8"):
        run(body, got, source, arch="sm_90a", **keyed)


def test_mma_m16n8k16():
    a, b = exact(16, 16).astype(BF16), exact(8, 16).astype(BF16)
    c = exact(16, 8)
    t = np.arange(32)
    g, q = t // 4, 2 * (t % 4)
    pairs = lambda x, r, col: np.ascontiguousarray(x[r[:, None], col[:, None] + np.arange(2)]).view(np.uint32)[:, 0]  # noqa: E731
    fragments = [pairs(a, g, q), pairs(a, g + 8, q), pairs(a, g, q + 8), pairs(a, g + 8, q + 8)]
    fragments += [pairs(b, g, q), pairs(b, g, q + 8)]
    fragments += [c[g, q].view(np.uint32), c[g, q + 1].view(np.uint32), c[g + 8, q].view(np.uint32)]
    fragments += [c[g + 8, q + 1].view(np.uint32)]
    source = np.ascontiguousarray(np.stack(fragments))  # [10, 32]
    lines = ["mov.u32 %r0, %tid.x; ld.param.b64 %rd1, [src]; mul.wide.u32 %rd2, %r0, 4; add.s64 %rd1, %rd1, %rd2;"]
    lines += [f"ld.global.b32 %r{10 + n}, [%rd1+{128 * n}];" for n in range(10)]
    lines.append(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13}, "
        "{%r14, %r15}, {%r16, %r17, %r18, %r19}; add.s64 %rd3, %rd63, %rd2;"
    )
    lines += [f"st.global.b32 [%rd3+{128 * n}], %r{30 + n};" for n in range(4)]
    got = np.zeros((4, 32), np.float32)
    run("\n".join(lines), got, source, params=".param .u64 src")
    want = (c + a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)
    for n, (rows, columns) in enumerate([(g, q), (g, q + 1), (g + 8, q), (g + 8, q + 1)]):
        np.testing.assert_array_equal(got[n], want[rows, columns])


WGMMA = """
mov.u32 %r0, %tid.x; mov.b32 %r100, dynamic; ld.param.b64 %rd10, [image]; ld.param.b32 %r101, [chunks];
mov.b32 %r1, %r0;
COPY: setp.ge.u32 %p1, %r1, %r101; @%p1 bra COPIED;
mul.wide.u32 %rd1, %r1, 16; add.s64 %rd1, %rd1, %rd10; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1];
shl.b32 %r2, %r1, 4; add.s32 %r2, %r2, %r100; st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};
add.s32 %r1, %r1, 128; bra COPY;
COPIED: fence.proxy.async.shared::cta; bar.sync 0;
shr.u32 %r102, %r100, 4; cvt.u64.u32 %rd40, %r102; ld.param.b64 %rd41, [a]; add.s64 %rd41, %rd41, %rd40;
ld.param.b64 %rd42, [b]; add.s64 %rd42, %rd42, %rd40;
wgmma.fence.sync.aligned; mov.pred %p2, SCALE;
INSTRUCTION
wgmma.commit_group.sync.aligned; WAIT
mul.wide.u32 %rd1, %r0, 64; add.s64 %rd1, %rd1, %rd63;
"""


def wgmma(
    kind, k_bytes, a_image, b_image, a_desc, b_desc, transposed=(0, 0), scale=0, wait=True, after="", schedule="round"
):
    """m64n32 of one K step: D [64, 32]; the accumulator starts as 1.0. after: what follows the wait."""
    image = np.concatenate([a_image, b_image])
    d = ", ".join(f"%r{110 + n}" for n in range(16))
    size = {"bf16": 2, "f16": 2, "e4m3": 1}[kind]
    flags = f", {transposed[0]}, {transposed[1]}" if size == 2 else ""
    text = "".join(f"mov.b32 %r{110 + n}, 0f3F800000; " for n in range(16))
    text += f"wgmma.mma_async.sync.aligned.m64n32k{k_bytes // size}.f32.{kind}.{kind} {{{d}}}, %rd41, %rd42, %p2, 1, 1"
    body = WGMMA.replace("INSTRUCTION", text + flags + ";").replace("SCALE", str(scale))
    body = body.replace("WAIT", "wgmma.wait_group.sync.aligned 0;" if wait else "") + after
    body += "".join(f"st.global.b32 [%rd1+{4 * n}], %r{110 + n};" for n in range(16))
    out = np.zeros((128, 16), np.float32)
    params = ".param .u64 image, .param .u32 chunks, .param .u64 a, .param .u64 b"
    run(body, out, image, len(image) // 16, a_desc, b_desc, params=params, block=128, arch="sm_90a", schedule=schedule,
        shared=".extern .shared .align 1024 .b8 dynamic[];", dynamic=len(image))  # fmt: skip
    full = np.zeros((64, 32), np.float32)
    for thread in range(128):
        for r in range(16):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (r // 2 % 2)
            full[row, 8 * (r // 4) + 2 * (thread % 4) + r % 2] = out[thread, r]
    return full


def swizzled(rows: np.ndarray, span: int) -> np.ndarray:
    """[rows, bytes] -> rows of `span` bytes, chunks permuted as in the figures of the swizzling modes."""
    out = np.zeros((len(rows), span), np.uint8)
    for r in range(len(rows)):
        key = {128: r % 8, 64: r // 2 % 4, 32: r // 4 % 2}[span]
        for c in range(rows.shape[1] // 16):
            out[r, (c ^ key) * 16 : (c ^ key) * 16 + 16] = rows[r, 16 * c : 16 * c + 16]
    return out.reshape(-1)


def descriptor(offset: int, span: int, stride: int, leading: int = 16) -> int:
    return offset >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {0: 0, 128: 1, 64: 2, 32: 3}[span] << 62


@pytest.mark.parametrize("span", [32, 64, 128])
@pytest.mark.parametrize("kind", ["bf16", "f16", "e4m3"])
def test_wgmma_k_major(kind, span):
    dtype = {"bf16": BF16, "f16": np.float16, "e4m3": ml_dtypes.float8_e4m3fn}[kind]
    per = 32 // np.dtype(dtype).itemsize
    a, b = (exact(rows, per).astype(dtype) for rows in (64, 32))
    images = [swizzled(x.view(np.uint8), span) for x in (a, b)]
    start = len(images[0])
    got = wgmma(kind, 32, *images, descriptor(0, span, 8 * span), descriptor(start, span, 8 * span))
    np.testing.assert_array_equal(got, (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32))


def test_wgmma_mn_major_b():
    """B transposed: rows of shared memory run along N, 64 BF16 wide, one for each k; here n = 32 fills half a row."""
    a, b = exact(64, 16).astype(BF16), exact(32, 16).astype(BF16)
    rows = np.zeros((16, 128), np.uint8)
    rows[:, :64] = np.ascontiguousarray(b.T).view(np.uint8)
    b_image = swizzled(rows, 128)
    a_image = swizzled(a.view(np.uint8), 128)
    start = len(a_image)
    got = wgmma(
        "bf16", 32, a_image, b_image, descriptor(0, 128, 1024), descriptor(start, 128, 1024, 2048), transposed=(0, 1)
    )
    np.testing.assert_array_equal(got, (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32))


def test_wgmma_accumulates_and_is_done_when_waited_for():
    a, b = exact(64, 16).astype(BF16), exact(32, 16).astype(BF16)
    images = [swizzled(x.view(np.uint8), 128) for x in (a, b)]
    arguments = ("bf16", 32, *images, descriptor(0, 128, 1024), descriptor(len(images[0]), 128, 1024))
    want = (1 + a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)
    np.testing.assert_array_equal(wgmma(*arguments, scale=1), want)
    for schedule in ("round", "eager"):
        with pytest.raises(Fault, match=r"wgmma.*was not waited for"):
            wgmma(*arguments, scale=1, wait=False, schedule=schedule)


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_a_group_of_wgmma_is_the_warpgroups(schedule):
    """Whoever has waited may overwrite the operands without a barrier, as attention kernels put O where Q was."""
    a, b = exact(64, 16).astype(BF16), exact(32, 16).astype(BF16)
    images = [swizzled(x.view(np.uint8), 128) for x in (a, b)]
    arguments = ("bf16", 32, *images, descriptor(0, 128, 1024), descriptor(len(images[0]), 128, 1024))
    want = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32)
    # the last thread zeroes the first bytes of A and of B
    store = "mov.b32 %r201, dynamic; mov.b32 %r202, 0; setp.eq.u32 %p1, %r0, 127;"
    store += "@%p1 st.shared.b32 [%r201], %r202; @%p1 st.shared.b32 [%r201+8192], %r202;"
    np.testing.assert_array_equal(wgmma(*arguments, after=store, schedule=schedule), want)
    with pytest.raises(Fault, match="data race: shared address"):
        wgmma(*arguments, after=store + "wgmma.wait_group.sync.aligned 0;", wait=False, schedule=schedule)
