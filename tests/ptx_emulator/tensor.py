"""A kernel around tcgen05 instructions: shared and tensor memory are filled, one thread issues, tensor memory is read.

Layouts of operands are written down here by hand, after the figures and tables of the PTX ISA.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ptx import run

Array = NDArray[Any]
LANES = 128

SHARED = """.extern .shared .align 1024 .b8 dynamic[];
.shared .align 8 .b8 bar[8]; .shared .align 4 .b8 slot[4];"""
PARAMS = ".param .u64 image, .param .u32 chunks, .param .u64 tensor, .param .u32 columns"
FILL = """
mov.u32 %r0, %tid.x; mov.u32 %r1, %cluster_ctarank; mov.b32 %r2, dynamic; and.b32 %r3, %r2, 16777215;
shr.u32 %r4, %r3, 4; cvt.u64.u32 %rd40, %r4;
ld.param.b64 %rd10, [image]; ld.param.b32 %r5, [chunks]; ld.param.b64 %rd11, [tensor]; ld.param.b32 %r6, [columns];
mul.lo.s32 %r7, %r1, %r5; mul.wide.u32 %rd12, %r7, 16; add.s64 %rd10, %rd10, %rd12; mov.b32 %r7, %r0;
IMAGE: setp.ge.u32 %p1, %r7, %r5; @%p1 bra IMAGED;
mul.wide.u32 %rd12, %r7, 16; add.s64 %rd12, %rd12, %rd10; ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%rd12];
shl.b32 %r8, %r7, 4; add.s32 %r8, %r8, %r2; st.shared.v4.b32 [%r8], {%r30, %r31, %r32, %r33};
add.s32 %r7, %r7, 128; bra IMAGE;
IMAGED: fence.proxy.async.shared::cta;
setp.lt.u32 %p2, %r0, 32; setp.eq.u32 %p3, %r0, 0; setp.eq.u32 %p4, %r1, 0; and.pred %p5, %p3, %p4;
mov.b32 %r9, 512; @%p2 tcgen05.alloc.cta_group::CTAS.sync.aligned.shared::cta.b32 [slot], %r9;
mov.b32 %r11, 1; @%p3 mbarrier.init.shared.b64 [bar], %r11;
bar.sync 0; ld.shared.b32 %r10, [slot];
shl.b32 %r12, %r1, 7; add.s32 %r12, %r12, %r0; mul.lo.s32 %r12, %r12, %r6; mul.wide.u32 %rd13, %r12, 4;
add.s64 %rd11, %rd11, %rd13; add.s64 %rd62, %rd63, %rd13;
and.b32 %r13, %r0, 96; shl.b32 %r13, %r13, 16; add.s32 %r13, %r13, %r10; mov.b32 %r14, %r13; mov.b32 %r15, 0;
TENSOR: setp.ge.u32 %p1, %r15, %r6; @%p1 bra TENSORED;
ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%rd11]; ld.global.v4.b32 {%r34, %r35, %r36, %r37}, [%rd11+16];
tcgen05.st.sync.aligned.32x32b.x8.b32 [%r14], {%r30, %r31, %r32, %r33, %r34, %r35, %r36, %r37};
add.s64 %rd11, %rd11, 32; add.s32 %r14, %r14, 8; add.s32 %r15, %r15, 8; bra TENSOR;
TENSORED: tcgen05.wait::st.sync.aligned; tcgen05.fence::before_thread_sync;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; tcgen05.fence::after_thread_sync;
"""
DUMP = """
mov.b32 %r16, MASK;
@%p5 tcgen05.commit.cta_group::CTAS.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [bar], %r16;
WAIT: mbarrier.try_wait.parity.shared.b64 %p1, [bar], 0; @!%p1 bra WAIT;
tcgen05.fence::after_thread_sync; mov.b32 %r15, 0;
READ: setp.ge.u32 %p1, %r15, %r6; @%p1 bra DONE;
tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r30, %r31, %r32, %r33, %r34, %r35, %r36, %r37}, [%r13];
tcgen05.wait::ld.sync.aligned;
st.global.v4.b32 [%rd62], {%r30, %r31, %r32, %r33}; st.global.v4.b32 [%rd62+16], {%r34, %r35, %r36, %r37};
add.s64 %rd62, %rd62, 32; add.s32 %r13, %r13, 8; add.s32 %r15, %r15, 8; bra READ;
DONE: tcgen05.fence::before_thread_sync; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
@%p2 tcgen05.dealloc.cta_group::CTAS.sync.aligned.b32 %r10, %r9;
"""


def execute(issue: str, tensor: Array, image: Array | None = None, **kw: Any) -> Array:
    """tensor: [ctas, 128, columns] words, before -> after. image: [ctas, bytes] of shared memory. `issue` is carried
    out by one thread of the first CTA, lines marked with @%p5, or by all with none; it finds tensor memory's address in
    %r10 and that of the image / 16 in %rd40, and may use %r20-29, %r40 on, %rd20-30 and %p6 on.
    """
    ctas, lanes, columns = tensor.shape
    assert lanes == LANES
    assert columns % 8 == 0
    if image is None:
        image = np.zeros((ctas, 16), np.uint8)
    out = np.zeros_like(tensor)
    body = (FILL + issue + DUMP).replace("CTAS", str(ctas)).replace("MASK", str((1 << ctas) - 1))
    args = np.ascontiguousarray(image), image.shape[1] // 16, np.ascontiguousarray(tensor), columns
    run(
        body,
        out,
        *args,
        params=PARAMS,
        block=LANES,
        grid=ctas,
        cluster=ctas,
        shared=SHARED,
        dynamic=image.shape[1],
        **kw,
    )
    return out


def blank(columns: int, ctas: int = 1) -> Array:
    """Tensor memory with another word in every cell, small enough to be no NaN or infinity."""
    lane, column = np.meshgrid(np.arange(LANES), np.arange(columns), indexing="ij")
    return np.stack([0x1000000 * (cta + 1) + 0x10000 * lane + column for cta in range(ctas)]).astype(np.uint32)


# --- shared memory ---

LAYOUTS = {"none": 0, "128b_atom32": 1, "128b": 2, "64b": 4, "32b": 6}


def descriptor(offset: int, layout: str, leading: int, stride: int, base: int = 0) -> int:
    """PTX ISA, "Shared memory descriptor", relative to the start of the image, whose address / 16 the kernel adds."""
    fields = offset >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | 1 << 46 | base << 49 | LAYOUTS[layout] << 61
    return fields - (1 << 64) if fields >> 63 else fields


def place(matrix: Array, layout: str, mn_major: bool, gap: int = 0) -> tuple[Array, int, int]:
    """[rows of MN, K] elements of 1, 2 or 4 bytes -> bytes, leading and stride byte offsets.

    PTX ISA, "Canonical Layouts", in units of T elements (16 bytes), before the swizzle:
      K-major   none     ((8, m), (T, 2k)) : ((1T, SBO), (1, LBO))
                swizzled ((8, m), (T, 2k)) : ((s, SBO), (1, T))
      MN-major  none     ((T, 1, m), (8, k)) : ((1, T, SBO), (1T, LBO))
                swizzled ((T, s, m), (8, k)) : ((1, T, LBO), (s T, SBO))
    where s is the swizzle / 16; with 32-byte atoms (4, k) stands for (8, k). gap: bytes left between repetitions.
    """
    size, (rows, k) = matrix.itemsize, matrix.shape
    t = 16 // size
    span = {"none": 16, "32b": 32, "64b": 64, "128b": 128, "128b_atom32": 128}[layout]
    depth = 4 if layout == "128b_atom32" else 8
    r, c = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if not mn_major and layout == "none":
        stride = 128 + gap
        leading = rows // 8 * stride
        at = r // 8 * stride + r % 8 * 16 + c // t * leading + c % t * size
    elif not mn_major:
        leading, stride = 16, 8 * span + gap
        at = r // 8 * stride + r % 8 * span + c * size
    elif layout == "none":
        stride = 128 + gap
        leading = rows // t * stride
        at = r // t * stride + r % t * size + c % 8 * 16 + c // 8 * leading
    else:
        leading = depth * span + gap
        stride = -(-rows * size // span) * leading
        at = r * size // span * leading + r * size % span + c % depth * span + c // depth * stride
    out = np.zeros(-(-int(at.max() + size) // 1024) * 1024, np.uint8)  # whole patterns of the swizzle
    raw = np.ascontiguousarray(matrix).view(np.uint8).reshape(rows, k, size)
    for byte in range(size):
        out[swizzle(at + byte, layout)] = raw[:, :, byte]
    return out, leading, stride


def swizzle(at: Array, layout: str) -> Array:
    """Figures of the swizzling modes, addresses in bytes: Swizzle<b, 4, 3> moves 16-byte chunks, the one of 32-byte
    atoms is Swizzle<2, 5, 2>.
    """
    if layout == "128b_atom32":
        return at ^ (at >> 7 & 3) << 5
    return at ^ (at >> 7 & {"none": 0, "32b": 1, "64b": 3, "128b": 7}[layout]) << 4


def images(*parts: Array) -> tuple[Array, list[int]]:
    """Parts one after another from multiples of 1024 on -> bytes, offsets."""
    starts = np.cumsum([0] + [-(-len(x) // 1024) * 1024 for x in parts])
    out = np.zeros(int(starts[-1]), np.uint8)
    for start, part in zip(starts, parts, strict=False):
        out[start : start + len(part)] = part
    return out, [int(s) for s in starts[:-1]]
