"""Tensor memory and tcgen05 instructions, from layouts written down by hand after the figures of the PTX ISA.

One small kernel copies an image into shared memory, copies scales to tensor memory, multiplies once and reads D back.
Operands are random codes under random scales; D must be the exact product, rounded once.
"""

import ml_dtypes
import numpy as np
import pytest

from ptx_emulator import DeadlockError, Fault

from .ptx import run

rng = np.random.default_rng(11)
M = 128
SFA, SFB = 256, 320  # columns of the scales

SETUP = """
mov.u32 %r0, %tid.x; mov.b32 %r100, dynamic; ld.param.b64 %rd10, [image]; ld.param.b32 %r101, [chunks];
mov.b32 %r1, %r0;
COPY: setp.ge.u32 %p1, %r1, %r101; @%p1 bra COPIED;
mul.wide.u32 %rd1, %r1, 16; add.s64 %rd1, %rd1, %rd10; ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1];
shl.b32 %r2, %r1, 4; add.s32 %r2, %r2, %r100; st.shared.v4.b32 [%r2], {%r4, %r5, %r6, %r7};
add.s32 %r1, %r1, 128; bra COPY;
COPIED: fence.proxy.async.shared::cta;
setp.lt.u32 %p2, %r0, 32; setp.eq.u32 %p3, %r0, 0;
mov.b32 %r8, 512; @%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], %r8;
mov.b32 %r9, 1; @%p3 mbarrier.init.shared.b64 [bar], %r9;
bar.sync 0; ld.shared.b32 %r10, [slot];
shr.u32 %r102, %r100, 4; cvt.u64.u32 %rd40, %r102;
"""
READ = """
WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [bar], 0; @!%p4 bra WAIT;
tcgen05.fence::after_thread_sync;
and.b32 %r11, %r0, 96; shl.b32 %r11, %r11, 16; add.s32 %r12, %r10, %r11; mov.b32 %r13, 0;
ld.param.b32 %r14, [columns]; mul.lo.s32 %r15, %r0, %r14;
LOOP: tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r16}, [%r12]; tcgen05.wait::ld.sync.aligned;
add.s32 %r17, %r15, %r13; mul.wide.u32 %rd2, %r17, 4; add.s64 %rd2, %rd2, %rd63; st.global.b32 [%rd2], %r16;
add.s32 %r12, %r12, 1; add.s32 %r13, %r13, 1; setp.lt.u32 %p5, %r13, %r14; @%p5 bra LOOP;
bar.sync 0; @%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, %r8;
"""
SHARED = """.extern .shared .align 1024 .b8 dynamic[];
.shared .align 8 .b8 bar[8]; .shared .align 4 .b8 slot[4];"""


def descriptor(offset: int, swizzle: int, stride: int, leading: int = 16) -> int:
    """Relative to the start of the image, whose address / 16 the kernel adds."""
    layout = {0: 0, 128: 2, 64: 4, 32: 6}[swizzle]
    return offset >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | layout << 61


def k_major_image(rows: np.ndarray, swizzle: int) -> np.ndarray:
    """[rows, bytes] -> the bytes in shared memory. Figures of the swizzling modes: with s = 128 the chunk of 16 bytes c
    of row r is at place c ^ r % 8, with 64 at c ^ (r / 2) % 4, with 32 at c ^ (r / 4) % 2; without swizzle eight rows
    of one chunk are a core matrix of 128 bytes, and core matrices along K follow each other here.
    """
    count, width = rows.shape
    if swizzle == 0:
        return rows.reshape(count // 8, 8, width // 16, 16).transpose(0, 2, 1, 3).reshape(-1)
    out = np.zeros((count, swizzle), np.uint8)
    for r in range(count):
        key = {128: r % 8, 64: r // 2 % 4, 32: r // 4 % 2}[swizzle]
        for c in range(width // 16):
            at = (c ^ key) * 16
            out[r, at : at + 16] = rows[r, 16 * c : 16 * c + 16]
    return out.reshape(-1)


def scale_image(scales: np.ndarray) -> np.ndarray:
    """[rows, 4] bytes -> atoms of 512 bytes: row r of 128 at (r % 32) * 16 + (r / 32) * 4."""
    padded = np.zeros((-(-len(scales) // 128) * 128, 4), np.uint8)
    padded[: len(scales)] = scales
    return padded.reshape(-1, 4, 32, 4).transpose(0, 2, 1, 3).reshape(-1)


def multiply(kind, idesc, a, b, swizzle=128, sfa=None, sfb=None, replace=()) -> np.ndarray:
    """a, b: operand rows as bytes. Runs one MMA on them; returns D [128, n]."""
    n, width = b.shape[0], a.shape[1]
    stride = 8 * (swizzle or width)
    parts = [k_major_image(a, swizzle), k_major_image(b, swizzle)]
    lines, scales = [], ""
    if sfa is not None:
        parts += [scale_image(sfa), scale_image(sfb)]
    starts = np.cumsum([0] + [-(-len(x) // 1024) * 1024 for x in parts])
    image = np.zeros(starts[-1], np.uint8)
    for start, part in zip(starts, parts, strict=False):
        image[start : start + len(part)] = part
    leading = 128 if swizzle == 0 else 16
    for register, start in zip((41, 42), starts, strict=False):
        lines.append(f"add.s64 %rd{register}, %rd40, {descriptor(int(start), swizzle, stride, leading)};")
    if sfa is not None:
        for column, start, rows in ((SFA, starts[2], M), (SFB, starts[3], n)):
            for atom in range(-(-rows // 128)):
                word = descriptor(int(start) + 512 * atom, 0, 128)
                lines.append(f"add.s64 %rd43, %rd40, {word}; add.s32 %r20, %r10, {column + 4 * atom};")
                lines.append("@%p3 tcgen05.cp.cta_group::1.32x128b.warpx4 [%r20], %rd43;")
        lines.append(f"add.s32 %r21, %r10, {SFA}; add.s32 %r22, %r10, {SFB};")
        scales = " [%r21], [%r22],"
    lines.append(f"mov.b32 %r23, {idesc}; mov.pred %p6, 0;")
    lines.append(f"@%p3 tcgen05.mma.cta_group::1.{kind} [%r10], %rd41, %rd42, %r23,{scales} %p6;")
    lines.append("@%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];")
    body = SETUP + "\n".join(lines) + READ
    for old, new in replace:
        assert old in body
        body = body.replace(old, new)
    out = np.full((M, n), np.nan, np.float32)
    params = ".param .u64 image, .param .u32 chunks, .param .u32 columns"
    run(body, out, image, len(image) // 16, n, params=params, block=128, shared=SHARED, dynamic=len(image))
    return out


def block_scaled_idesc(n: int, a_type: int, b_type: int, ue8m0: int) -> int:
    """PTX ISA, "Instruction descriptor", for .kind::mxf4, .kind::mxf4nvf4 and .kind::mxf8f6f4."""
    return a_type << 7 | b_type << 10 | n // 8 << 17 | ue8m0 << 23 | 128 // 128 << 27


def idesc_of(n: int, a_type: int, b_type: int) -> int:
    """For .kind::f16, .kind::tf32 and .kind::f8f6f4 with FP32 accumulators."""
    return 1 << 4 | a_type << 7 | b_type << 10 | n // 8 << 17 | 128 // 16 << 24


def packed_fp4(rows: int) -> tuple[np.ndarray, np.ndarray]:
    codes = rng.integers(0, 16, (rows, 64)).astype(np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    return codes[:, 0::2] | codes[:, 1::2] << 4, values


def e4m3_scales(rows: int) -> tuple[np.ndarray, np.ndarray]:
    codes = rng.integers(0, 0x7F, (rows, 4)).astype(np.uint8)
    return codes, codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def exact(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T).astype(np.float32)


@pytest.mark.parametrize(("n", "swizzle"), [(16, 128), (64, 64), (96, 32), (128, 0), (256, 128)])
def test_nvfp4_block16(n, swizzle):
    (a, av), (b, bv) = packed_fp4(M), packed_fp4(n)
    (sfa, sav), (sfb, sbv) = e4m3_scales(M), e4m3_scales(n)
    got = multiply("kind::mxf4nvf4.block_scale.block16", block_scaled_idesc(n, 1, 1, 0), a, b, swizzle, sfa, sfb)
    np.testing.assert_array_equal(got, exact(av * sav.repeat(16, 1), bv * sbv.repeat(16, 1)))


@pytest.mark.parametrize("scale_id", [0, 2])
def test_mxfp4_block32_takes_two_bytes_by_id(scale_id):
    (a, av), (b, bv) = packed_fp4(M), packed_fp4(48)
    sfa, sfb = (rng.integers(100, 150, (rows, 4)).astype(np.uint8) for rows in (M, 48))
    idesc = block_scaled_idesc(48, 1, 1, 1) | scale_id << 29 | scale_id << 4
    got = multiply("kind::mxf4.block_scale.block32", idesc, a, b, 128, sfa, sfb)
    sav, sbv = (2.0 ** (s[:, scale_id : scale_id + 2].astype(np.float64) - 127) for s in (sfa, sfb))
    np.testing.assert_array_equal(got, exact(av * sav.repeat(32, 1), bv * sbv.repeat(32, 1)))


@pytest.mark.parametrize("scale_id", [0, 1, 3])
def test_mxfp8_takes_one_byte_by_id(scale_id):
    a, b = (rng.integers(0, 0x7F, (rows, 32)).astype(np.uint8) for rows in (M, 32))
    sfa, sfb = (rng.integers(110, 140, (rows, 4)).astype(np.uint8) for rows in (M, 32))
    idesc = block_scaled_idesc(32, 0, 1, 1) | scale_id << 29 | scale_id << 4
    got = multiply("kind::mxf8f6f4.block_scale.block32", idesc, a, b & 0x7B, 128, sfa, sfb)
    av = a.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0 ** (sfa[:, scale_id, None].astype(float) - 127)
    bv = (b & 0x7B).view(ml_dtypes.float8_e5m2).astype(np.float64) * 2.0 ** (sfb[:, scale_id, None].astype(float) - 127)
    np.testing.assert_array_equal(got, exact(av, bv))


@pytest.mark.parametrize(("kind", "a_type", "dtype"), [("f16", 0, np.float16), ("f16", 1, ml_dtypes.bfloat16)])
def test_half_precision(kind, a_type, dtype):
    a, b = (rng.standard_normal((rows, 16)).astype(dtype) for rows in (M, 80))
    got = multiply(f"kind::{kind}", idesc_of(80, a_type, a_type), a.view(np.uint8), b.view(np.uint8), 32)
    np.testing.assert_array_equal(got, exact(a.astype(np.float64), b.astype(np.float64)))


def test_tf32_drops_thirteen_bits():
    a, b = (rng.standard_normal((rows, 8)).astype(np.float32) for rows in (M, 16))
    got = multiply("kind::tf32", idesc_of(16, 2, 2), a.view(np.uint8), b.view(np.uint8), 64)
    cut = [(x.view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64) for x in (a, b)]
    np.testing.assert_array_equal(got, exact(*cut))


def test_disabled_lanes_keep_what_they_hold():
    """ "disable-output-lane": bit n of the four words is lane n."""
    a, b = (rng.standard_normal((rows, 16)).astype(np.float16) for rows in (M, 16))
    words = rng.integers(0, 1 << 32, 4, dtype=np.uint64)
    load = "".join(f"mov.b32 %r{30 + n}, {word};" for n, word in enumerate(words))
    again = f"{load} mov.pred %p7, 1; @%p3 tcgen05.mma.cta_group::1.kind::f16"
    again += " [%r10], %rd41, %rd42, %r23, {%r30, %r31, %r32, %r33}, %p7;\n"
    commit = "@%p3 tcgen05.commit"
    got = multiply(
        "kind::f16", idesc_of(16, 0, 0), a.view(np.uint8), b.view(np.uint8), 32, replace=[(commit, again + commit)]
    )
    product = exact(a.astype(np.float64), b.astype(np.float64))
    once = product.astype(np.float32)
    lane = np.arange(M)
    disabled = words[lane // 32] >> (lane % 32).astype(np.uint64) & np.uint64(1)
    twice = (once + product).astype(np.float32)
    assert np.array_equal(got, np.where(disabled[:, None] == 1, once, twice))


def test_fp8_with_negated_a():
    a, b = (rng.integers(0, 0x7F, (rows, 32)).astype(np.uint8) for rows in (M, 16))
    got = multiply("kind::f8f6f4", idesc_of(16, 0, 0) | 1 << 13, a, b, 128)
    av, bv = (x.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for x in (a, b))
    np.testing.assert_array_equal(got, exact(-av, bv))


def nvfp4(**kw) -> np.ndarray:
    (a, _), (b, _) = packed_fp4(M), packed_fp4(16)
    (sfa, _), (sfb, _) = e4m3_scales(M), e4m3_scales(16)
    idesc = kw.pop("idesc", block_scaled_idesc(16, 1, 1, 0))
    sfa[3, 2] |= kw.pop("sign", 0)
    return multiply("kind::mxf4nvf4.block_scale.block16", idesc, a, b, 128, sfa, sfb, **kw)


ALLOC, DEALLOC = "mov.b32 %r8, 512;", "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, %r8;"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"idesc": block_scaled_idesc(16, 1, 1, 0) | 1 << 2}, "sparse"),
        ({"idesc": block_scaled_idesc(16, 1, 1, 0) | 1 << 24}, "reserved bits"),
        ({"idesc": block_scaled_idesc(16, 2, 1, 0)}, "element type 2"),
        ({"idesc": block_scaled_idesc(264, 1, 1, 0)}, "N = 264"),
        ({"idesc": block_scaled_idesc(16, 1, 1, 0) | 1 << 29}, "scale factor id 1 with 4 scales a row"),
        ({"idesc": block_scaled_idesc(16, 1, 1, 0) ^ 3 << 27}, "M = 256 with 1 CTAs"),
        ({"sign": 0x80}, "scale factors of A: a scale has its top bit set"),
        ({"replace": [(ALLOC, "mov.b32 %r8, 96;")]}, "96 columns: a power of two"),
        ({"replace": [(ALLOC, "mov.b32 %r8, 32;")]}, "columns 256..259 of tensor memory are not allocated"),
        ({"replace": [(DEALLOC, "exit;")]}, "without giving back tensor memory: {0: 512}"),
        (
            {"replace": [(DEALLOC, "tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, 256;")]},
            "allocated are {0: 512}",
        ),
        ({"replace": [("add.s32 %r21, %r10, 256;", "add.s32 %r21, %r10, 300;")]}, "A: column 300 .* was never written"),
        ({"replace": [("and.b32 %r11, %r0, 96;", "mov.b32 %r11, 0;")]}, r"warp 1 reaches lanes 32\.\.63 only"),
        ({"replace": [("mov.pred %p6, 0;", "mov.pred %p6, 1;")]}, "tcgen05.mma: column 0 .* was never written"),
        ({"replace": [("mov.b32 %r1, %r0;", "add.s32 %r1, %r0, 1;")]}, "is read but was never written"),
        ({"replace": [("32x128b.warpx4 [%r20], %rd43", "32x128b.warpx4 [%r20], %rd40")]}, "bits 46-48 must be 1"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(Fault, match=message):
        nvfp4(**arguments)


def test_a_commit_that_is_missing_hangs():
    commit = "@%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [bar];"
    with pytest.raises(DeadlockError, match="1 of 1 arrivals"):
        nvfp4(replace=[(commit, "")])


def test_loads_and_stores_keep_their_fragments():
    """.32x32b writes, .16x256b reads: lane t holds rows t / 4 and t / 4 + 8, columns 2 (t % 4) and the next."""
    body = """
    mov.b32 %r8, 32; tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], %r8; ld.shared.b32 %r10, [slot];
    mov.u32 %r0, %laneid; shl.b32 %r20, %r0, 8;
    add.s32 %r21, %r20, 1; add.s32 %r22, %r20, 2; add.s32 %r23, %r20, 3;
    add.s32 %r24, %r20, 4; add.s32 %r25, %r20, 5; add.s32 %r26, %r20, 6; add.s32 %r27, %r20, 7;
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r10], {%r20, %r21, %r22, %r23, %r24, %r25, %r26, %r27};
    tcgen05.wait::st.sync.aligned;
    add.s32 %r11, %r10, 1048576;
    tcgen05.ld.sync.aligned.16x256b.x1.b32 {%r30, %r31, %r32, %r33}, [%r11]; tcgen05.wait::ld.sync.aligned;
    mul.wide.u32 %rd1, %r0, 16; add.s64 %rd1, %rd1, %rd63; st.global.v4.b32 [%rd1], {%r30, %r31, %r32, %r33};
    tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r10, %r8;
    """
    got = np.zeros((32, 4), np.uint32)
    run(body, got, shared=".shared .align 4 .b8 slot[4];")
    for t in range(32):
        rows, columns = (t // 4, t // 4, t // 4 + 8, t // 4 + 8), (0, 1, 0, 1)
        assert got[t].tolist() == [(16 + r) << 8 | 2 * (t % 4) + c for r, c in zip(rows, columns, strict=True)]


def test_sm_90_has_no_tensor_memory():
    with pytest.raises(Fault, match="sm_90a has no tensor memory"):
        run("tcgen05.wait::ld.sync.aligned;", np.zeros(1, np.uint32), arch="sm_90a")
