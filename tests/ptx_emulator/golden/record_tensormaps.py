"""Records what the CUDA driver makes of tensor maps, and what a GPU does with them: tensormaps.json.gz.

    python tests/ptx_emulator/golden/record_tensormaps.py      # on a host with an sm_90 GPU; needs libcuda.so.1 only

maps: arguments of cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col (CUDA Driver API, "Tensor Map Object Management"),
the driver's result code and, where it is 0, the 128 bytes. Some arguments are refused on purpose.
copies: tensor copies and reductions through such maps: the coordinates, the transactions that were waited for, whether
the wait was over in time, and all of the memory that the copy may have changed. What lay there before is `noise`.
replacements: a map before and after one tensormap.replace.
"""

import base64
import ctypes
import gzip
import itertools
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tensormaps.json.gz")
ADDRESS = 1 << 32  # of maps that are only encoded

# CUtensorMapDataType
U8, U16, U32, S32, U64, S64, F16, F32, F64, BF16, F32_FTZ, TF32, TF32_FTZ, U4_ALIGN8, U4_ALIGN16, U6_ALIGN16 = range(16)
BITS = (8, 16, 32, 32, 64, 64, 16, 32, 64, 16, 32, 32, 32, 4, 4, 6)
FLOATS = (F16, F32, F64, BF16, F32_FTZ, TF32, TF32_FTZ)
# CUtensorMapSwizzle -> bytes of a row
SPANS = (0, 32, 64, 128, 128, 128, 128)

Case = dict[str, Any]


def tiled(
    element_type: int = U16,
    sizes: tuple[int, ...] = (128, 64),
    box: tuple[int, ...] = (32, 8),
    strides: tuple[int, ...] | None = None,
    steps: tuple[int, ...] | None = None,
    interleave: int = 0,
    swizzle: int = 0,
    promotion: int = 0,
    fill: int = 0,
    address: int = ADDRESS,
) -> Case:
    """strides of a dense tensor unless given, rounded up to what the interleave and the type require."""
    if strides is None:
        unit = 32 if interleave == 2 or element_type >= U4_ALIGN16 else 16
        made, n = [], sizes[0] * BITS[element_type] // 8
        if interleave:
            n = 16 * interleave
        for size in sizes[1:]:
            n = -(-n // unit) * unit
            made.append(n)
            n *= size
        strides = tuple(made)
    return {
        "kind": "tiled", "element_type": element_type, "address": address, "sizes": sizes, "strides": strides,
        "box": box, "steps": steps or (1,) * len(sizes), "interleave": interleave, "swizzle": swizzle,
        "promotion": promotion, "fill": fill,
    }  # fmt: skip


def im2col(lower: tuple[int, ...], upper: tuple[int, ...], channels: int, pixels: int, **kw: Any) -> Case:
    case = tiled(box=(), **kw)
    del case["box"]
    return case | {"kind": "im2col", "lower": lower, "upper": upper, "channels": channels, "pixels": pixels}


def maps() -> Iterator[Case]:
    """Every field on its own, then many at once, then what must be refused."""
    for element_type in range(U4_ALIGN8):
        for swizzle in range(7):
            inner = (SPANS[swizzle] or 64) * 8 // BITS[element_type]
            yield tiled(element_type, (4 * inner, 32), (inner, 8), swizzle=swizzle, promotion=swizzle % 4)
    for element_type, swizzle in itertools.product((U4_ALIGN8, U4_ALIGN16, U6_ALIGN16), range(7)):
        inner = 128 if element_type != U4_ALIGN8 else (SPANS[swizzle] or 32) * 2
        yield tiled(element_type, (512, 32), (inner, 8), swizzle=swizzle)
    for fill, element_type in itertools.product((0, 1), FLOATS):
        yield tiled(element_type, (128, 64), (8, 8), fill=fill)
    for n in range(40):
        yield tiled(U8, (1 << min(n, 32), 1 << 32 if n > 32 else 7), (16, 1), strides=(1 << n if n > 3 else 16,))
    for total in (127, 128, 129, 255, 256, 257):  # KiB: a bit depends on the size
        yield tiled(U8, (1024, total), (16, 4))
        yield tiled(U16, (512, total), (16, 4))
    for size in (1, 2, 255, 256, 257, 65536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32):
        yield tiled(U8, (size, 3), (16, 1), strides=(1 << 33,))
    for d, step in itertools.product(range(5), range(2, 9)):
        steps = tuple(step if d == j else 1 for j in range(5))
        yield tiled(U8, (64, 16, 16, 16, 16), (16, 8, 2, 2, 2), steps=steps)
    for d, n in itertools.product(range(5), (1, 2, 3, 16, 48, 255, 256)):
        box = tuple(n if d == j else 16 if j == 0 else 1 for j in range(5))
        yield tiled(U8, (512, 300, 300, 300, 300), box)
    for interleave, swizzle, rank in itertools.product((1, 2), (0, 1, 2, 3), (3, 4, 5)):
        yield tiled(
            F16, (8, 40, 30, 20, 10)[:rank], (8 * interleave, 4, 3, 2, 1)[:rank], interleave=interleave, swizzle=swizzle
        )
    for rank, interleave in itertools.product((3, 4, 5), (0, 1, 2)):
        for swizzle in (0, 1, 3):
            r = random.Random(rank * 100 + interleave * 10 + swizzle)
            limit = 1 << {3: 15, 4: 7, 5: 4}[rank]
            lower, upper = (tuple(r.randrange(-limit, limit) for _ in range(rank - 2)) for _ in range(2))
            yield im2col(
                lower, upper, r.randrange(8, 65, 8) if not interleave else 8 * interleave, r.randrange(1, 1025),
                element_type=F16, sizes=(64, 30, 20, 10, 5)[:rank], interleave=interleave, swizzle=swizzle,
                steps=(1, *(r.randrange(1, 9) for _ in range(rank - 1))),
            )  # fmt: skip
    for lower, upper, channels, pixels in (
        ((-1, -1), (1, 1), 64, 128), ((0, 0), (0, 0), 8, 1), ((-128, 127), (127, -128), 256, 1024),
        ((1, 0), (0, 0), 8, 2), ((0, 1), (0, 0), 8, 2), ((0, 0), (1, 0), 8, 2), ((0, 0), (0, 1), 8, 2),
        ((0, 0), (0, 0), 16, 2), ((0, 0), (0, 0), 8, 256), ((0, 0), (0, 0), 8, 257), ((0, 0), (0, 0), 8, 512),
    ):  # fmt: skip
        yield im2col(lower, upper, channels, pixels, element_type=U16, sizes=(256, 30, 20, 10))
    for n in range(120):
        yield some(random.Random(n))
    yield from refused()


def some(r: random.Random) -> Case:
    element_type, rank = r.randrange(U4_ALIGN8), r.randrange(1, 6)
    interleave = r.choice((0, 0, 1, 2)) if rank > 2 else 0
    swizzle = 1 if interleave == 2 else r.randrange(7)
    granule = 128 // BITS[element_type]
    inner = granule * r.randrange(1, max(2, min(256 // granule, (SPANS[swizzle] or 128) // 16 + 1)))
    unit = 32 if interleave == 2 else 16
    strides = tuple(unit * r.randrange(1, 1 << r.randrange(1, 35)) for _ in range(rank - 1))
    sizes = tuple(r.randrange(1, 1 << r.randrange(1, 33)) for _ in range(rank))
    box = (granule * interleave or inner, *(r.randrange(1, 1 << r.randrange(1, 9)) for _ in range(rank - 1)))
    fill = r.randrange(2) if element_type in FLOATS else 0
    return tiled(
        element_type, sizes, box, strides, tuple(r.randrange(1, 9) for _ in range(rank)), interleave, swizzle,
        r.randrange(4), fill, 32 * r.randrange(1, 1 << 42),
    )  # fmt: skip


def refused() -> Iterator[Case]:
    yield tiled(address=ADDRESS + 8)
    yield tiled(address=ADDRESS + 16)  # is well
    yield tiled(strides=(264,))
    yield tiled(strides=(1 << 40,))
    yield tiled(strides=(0,))
    yield tiled(strides=(16,))  # less than a row
    yield tiled(sizes=(0, 64))
    yield tiled(sizes=((1 << 32) + 1, 64), strides=(1 << 34,))
    yield tiled(box=(0, 8))
    yield tiled(box=(264, 8))
    yield tiled(box=(32, 257))
    yield tiled(box=(4, 8))
    yield tiled(box=(256, 256))  # more than all of shared memory
    yield tiled(steps=(1, 0))
    yield tiled(steps=(1, 9))
    yield tiled(steps=(9, 1))
    for swizzle in (1, 2, 3, 4, 5, 6, 7):
        yield tiled(box=((SPANS[swizzle] if swizzle < 7 else 0) // 2 + 8, 8), swizzle=swizzle)
        yield tiled(box=(8, 8), swizzle=swizzle)
    yield tiled() | {"element_type": 16}
    yield tiled(fill=1)
    yield tiled(fill=2)
    yield tiled(interleave=1)
    yield tiled(interleave=3)
    yield tiled(F16, (8, 8, 8), (8, 4, 4), interleave=2, swizzle=0)
    yield tiled(F16, (8, 8, 8), (8, 4, 4), interleave=1, swizzle=3)
    yield tiled(F16, (8, 8, 8), (16, 4, 4), interleave=1)
    yield tiled(F16, (8, 8, 8), (4, 4, 4), interleave=1)
    yield tiled(F16, (8, 8, 8), (16, 4, 4), strides=(16, 128), interleave=2, swizzle=1)
    yield tiled(F16, (8, 8, 8), (16, 4, 4), interleave=2, swizzle=1, address=ADDRESS + 16)
    yield tiled(U4_ALIGN16, (192, 8), (128, 8))
    yield tiled(U4_ALIGN16, (256, 8), (64, 8))
    yield tiled(U4_ALIGN16, (256, 8), (128, 8), address=ADDRESS + 16)
    yield tiled(U4_ALIGN8, (65, 8), (32, 8), strides=(48,))


# --- copies: whole tensors of noise, one box of them ---


EDGES = 9000  # seeds from here on give floating point numbers at the edges of their formats
_PALETTE = {
    F32: (0, 1 << 31, 1, 0x80000001, 0x007FFFFF, 0x00800000, 0x00800001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001,
          0x7FC00000, 0xFFFFFFFF, 0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0xBF801000, 0xBF803000, 0x00001000,
          0x00002FFF, 0x7F7FF000, 0x3F7FF000, 0x00803000, 0x80403000),
    F16: (0, 1 << 15, 1, 0x8001, 0x3FF, 0x400, 0x401, 0x8401, 0x7BFF, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0xFFFF, 0x3C00),
    BF16: (0, 1 << 15, 1, 0x8001, 0x7F, 0x80, 0x81, 0x8081, 0x7F7F, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0xFFFF, 0x3F80),
}  # fmt: skip
_AS = {F32: F32, F32_FTZ: F32, TF32: F32, TF32_FTZ: F32, F16: F16, BF16: BF16}


def noise(seed: int, size: int) -> bytes:
    r = random.Random(seed)
    if seed < EDGES:
        return r.randbytes(size)
    palette = _PALETTE[_AS[(seed - EDGES) // 1000]]
    width = 4 if max(palette) >> 16 else 2
    return b"".join(r.choice(palette).to_bytes(width, "little") for _ in range(size // width))


def copies() -> Iterator[Case]:
    """map, at, offset (of im2col), seed, op: "load", "store" or a reduction. Maps have no address yet."""
    seeds = itertools.count(1000)
    for swizzle in range(7):
        for inner in {(SPANS[swizzle] or 64), 32, 16}:
            if inner <= (SPANS[swizzle] or 64):
                yield copy(tiled(U8, (192, 24), (inner, 16), swizzle=swizzle), (16, 3), next(seeds))
        yield copy(tiled(U8, (192, 24), ((SPANS[swizzle] or 64), 12), swizzle=swizzle), (-16, -3), next(seeds))
        yield copy(tiled(U8, (200, 24), ((SPANS[swizzle] or 64), 9), (208,), swizzle=swizzle), (160, 20), next(seeds))
        yield copy(
            tiled(U8, (200, 24), ((SPANS[swizzle] or 64), 9), (208,), swizzle=swizzle), (160, 20), next(seeds), "store"
        )
    for element_type in range(U4_ALIGN8):
        inner = 256 // BITS[element_type]
        t = tiled(element_type, (2 * inner - 3, 6), (inner, 4), (2 * inner * BITS[element_type] // 8 + 16,))
        yield copy(t, (inner, 4), next(seeds))
        yield copy(t, (inner, 4), next(seeds), "store")
        if element_type in FLOATS:
            yield copy(t | {"fill": 1}, (inner, 4), next(seeds))
        for op in ("add", "min", "max", "inc", "dec", "and", "or", "xor"):
            if op in REDUCTIONS.get(element_type, ()):
                yield copy(t, (inner, 4), next(seeds), op)
    for element_type in _AS:
        inner, edges = 256 // BITS[element_type], EDGES + 1000 * element_type
        t = tiled(element_type, (4 * inner, 16), (inner, 16))
        yield copy(t, (inner, 0), edges)
        for op in REDUCTIONS.get(element_type, ()):
            yield copy(t, (0, 0), edges + 10, op)
    for steps in ((1, 2), (1, 3), (2, 1), (1, 8), (3, 5)):
        for at in ((0, 0), (16, 1), (-16, -3)):
            yield copy(tiled(U8, (96, 20), (32, 8), steps=steps), at, next(seeds))
        yield copy(tiled(U8, (96, 20), (32, 8), steps=steps), (16, 1), next(seeds), "store")
    yield copy(tiled(U16, (24, 10, 9, 8, 7), (16, 3, 5, 2, 4), steps=(1, 2, 3, 2, 1)), (8, 1, -2, 7, 2), next(seeds))
    yield copy(tiled(U16, (24, 10, 9, 8, 7), (16, 3, 2, 2, 2)), (16, 8, 8, -1, 6), next(seeds))
    yield copy(tiled(U16, (64,), (32,)), (40,), next(seeds))
    yield copy(tiled(U8, (64, 7, 6), (32, 2, 3)), (48, -1, 4), next(seeds))
    yield copy(tiled(U8, (64, 7, 6, 5), (32, 2, 3, 2)), (48, -1, 4, 3), next(seeds))
    yield copy(tiled(U8, (192, 24), (32, 16)), (8, 3), next(seeds))  # refused: not a multiple of 16 bytes
    for interleave, swizzle in ((1, 0), (1, 3), (2, 1)):
        c = 8 * interleave
        for box in ((c, 4, 3), (2 * c, 4, 3), (c, 3, 1)):
            t = tiled(F16, (5 * c, 9, 5), box, (1056, 8192), interleave=interleave, swizzle=swizzle)
            for at in ((0, 0, 0), (1, 2, 1), (c, 7, 3), (2 * c, -1, 0)):
                yield copy(t, at, next(seeds))
        for rank in (4, 5):
            box, strides = (c, 4, 3, 2, 2), (1056, 8192, 40000 // 32 * 32, 160000)
            t = tiled(
                F16, (5 * c, 9, 5, 4, 3)[:rank], box[:rank], strides[: rank - 1], interleave=interleave, swizzle=swizzle
            )
            for at in ((0, 0, 0, 0, 0), (0, 2, 1, 1, 0), (1, 0, 0, 0, 0), (c, 7, 3, 3, 2)):
                yield copy(t, at[:rank], next(seeds))
        yield copy(t, (0, 2, 1, 1, 0), next(seeds), "store")
        steps = tiled(F16, (5 * c, 9, 5), (c, 4, 3), (1056, 8192), (3, 2, 2), interleave=interleave, swizzle=swizzle)
        yield copy(steps, (1, 2, 1), next(seeds))
    for lower, upper, pixels, steps in (
        ((-1, -1), (-1, -1), 24, (1, 1, 1, 1)), ((0, 0), (0, 0), 16, (1, 1, 1, 1)),
        ((-1, -1), (1, 1), 32, (1, 1, 1, 1)), ((-1, -1), (-1, -1), 9, (1, 2, 2, 1)),
        ((0, -1), (-2, -1), 20, (1, 1, 2, 1)),
    ):  # fmt: skip
        t = im2col(lower, upper, 16, pixels, element_type=U8, sizes=(32, 7, 6, 3), steps=steps)
        for at, offset in (((0, 0, 0, 0), (0, 0)), ((16, lower[0], lower[1], 0), (1, 2)), ((0, 3, 2, 1), (2, 0))):
            yield copy(t, at, next(seeds), offset=offset)
    t = im2col((-1,), (-1,), 16, 12, element_type=U8, sizes=(32, 9, 5))
    yield copy(t, (0, -1, 0), next(seeds), offset=(2,))
    t = im2col((-1, 0, -1), (-1, 0, -1), 16, 40, element_type=U8, sizes=(32, 5, 4, 3, 2))
    yield copy(t, (0, -1, 0, -1, 0), next(seeds), offset=(2, 0, 1))
    t = im2col((-1, -1), (-1, -1), 64, 16, element_type=U8, sizes=(64, 7, 6, 3), swizzle=2)
    yield copy(t, (0, -1, -1, 0), next(seeds), offset=(1, 1))


def copy(t: Case, at: tuple[int, ...], seed: int, op: str = "load", offset: tuple[int, ...] = ()) -> Case:
    return {"map": t, "at": at, "offset": offset, "seed": seed, "op": op}


# PTX ISA, "cp.reduce.async.bulk.tensor": operations by element type
_INTEGER, _BITWISE = ("add", "min", "max"), ("and", "or", "xor")
REDUCTIONS = {
    U32: (*_INTEGER, *_BITWISE, "inc", "dec"), S32: (*_INTEGER, *_BITWISE), U64: (*_INTEGER, *_BITWISE),
    S64: (*_INTEGER, *_BITWISE), F16: _INTEGER, BF16: _INTEGER, F32: ("add",), F32_FTZ: ("add",), F64: ("add",),
}  # fmt: skip


def tensor_bytes(t: Case) -> int:
    """Memory from the address to the end of the last row, or far more for what an interleave may reach."""
    if t["interleave"]:
        return 1 << 20
    if not t["strides"]:
        return t["sizes"][0] * BITS[t["element_type"]] // 8
    return t["strides"][-1] * t["sizes"][-1]


def transactions(t: Case) -> int:
    """Bytes that a load of one box reports."""
    if t["kind"] == "im2col":
        return t["channels"] * t["pixels"] * BITS[t["element_type"]] // 8
    if t["interleave"]:
        # dimension 0 counts units, the last but one slices, of which a box has one
        counts = [-(-b // s) for b, s in zip(t["box"], t["steps"], strict=True)]
        return 16 * t["interleave"] * math.prod(counts) // counts[-2]
    steps = (1, *t["steps"][1:])
    return math.prod(-(-b // s) for b, s in zip(t["box"], steps, strict=True)) * BITS[t["element_type"]] // 8


def shared_bytes(t: Case) -> int:
    """Enough for a box whose rows are as wide as the swizzle."""
    if t["kind"] == "im2col" or t["interleave"]:
        return 32768
    rows = math.prod(t["box"][1:])
    return -(-rows * max(t["box"][0] * BITS[t["element_type"]] // 8, SPANS[t["swizzle"]]) // 1024) * 1024


def kernel(case: Case) -> str:
    """PTX that fills `total` bytes of shared memory from `before`, copies, and leaves them in `after`.

    `after` then has two words more: whether the wait was over in time, and the transactions that it was for.
    """
    rank = len(case["map"]["sizes"])
    coordinates = "{" + ", ".join(f"%c{n}" for n in range(rank)) + "}"
    mode = "im2col" if case["map"]["kind"] == "im2col" else "tile"
    if case["op"] == "load":
        offsets = ", {" + ", ".join(f"{n}" for n in case["offset"]) + "}" if mode == "im2col" else ""
        copy = f"""
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 %rd9, [bar], %r4;
@%p0 cp.async.bulk.tensor.{rank}d.shared::cluster.global.{mode}.mbarrier::complete_tx::bytes
    [%r1], [%rd1, {coordinates}], [bar]{offsets};
mov.u32 %r7, 0;
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [bar], 0;
@%p2 bra DONE;
add.u32 %r7, %r7, 1;
setp.lt.u32 %p3, %r7, 20000;
@%p3 bra WAIT;
DONE:
selp.u32 %r8, 1, 0, %p2;
"""
    else:
        name = "cp.async.bulk.tensor" if case["op"] == "store" else "cp.reduce.async.bulk.tensor"
        op = "" if case["op"] == "store" else f".{case['op']}"
        copy = f"""
fence.proxy.async.shared::cta;
bar.sync 0;
@%p0 {name}.{rank}d.global.shared::cta{op}.{mode}.bulk_group [%rd1, {coordinates}], [%r1];
cp.async.bulk.commit_group;
cp.async.bulk.wait_group 0;
mov.u32 %r8, 1;
"""
    loads = "\n".join(f"ld.param.b32 %c{n}, [c{n}];" for n in range(rank))
    parameters = "".join(f", .param .u32 c{n}" for n in range(rank))
    return f"""
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry k(.param .align 64 .b8 map[128], .param .u64 before, .param .u64 after, .param .u32 total,
    .param .u32 bytes{parameters})
{{
.reg .pred %p<8>;
.reg .b32 %r<16>;
.reg .b32 %c<5>;
.reg .b64 %rd<16>;
.shared .align 8 .b8 bar[8];
mov.b64 %rd0, map;
cvta.param.u64 %rd1, %rd0;
ld.param.b64 %rd2, [before];
ld.param.b64 %rd3, [after];
ld.param.b32 %r3, [total];
ld.param.b32 %r4, [bytes];
{loads}
mov.u32 %r0, %tid.x;
mov.u32 %r1, dynamic;
mov.u32 %r2, 1;
setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared::cta.b64 [bar], %r2;
shl.b32 %r5, %r0, 2;
FILL:
setp.ge.u32 %p1, %r5, %r3;
@%p1 bra FILLED;
cvt.u64.u32 %rd4, %r5;
add.u64 %rd5, %rd2, %rd4;
ld.global.b32 %r6, [%rd5];
add.u32 %r9, %r1, %r5;
st.shared.b32 [%r9], %r6;
add.u32 %r5, %r5, 128;
bra FILL;
FILLED:
fence.proxy.async.shared::cta;
bar.sync 0;
{copy}
bar.sync 0;
shl.b32 %r5, %r0, 2;
DUMP:
setp.ge.u32 %p1, %r5, %r3;
@%p1 bra DUMPED;
cvt.u64.u32 %rd4, %r5;
add.u64 %rd5, %rd3, %rd4;
add.u32 %r9, %r1, %r5;
ld.shared.b32 %r6, [%r9];
st.global.b32 [%rd5], %r6;
add.u32 %r5, %r5, 128;
bra DUMP;
DUMPED:
cvt.u64.u32 %rd4, %r3;
add.u64 %rd5, %rd3, %rd4;
@%p0 st.global.b32 [%rd5], %r8;
@%p0 st.global.b32 [%rd5+4], %r4;
ret;
}}
"""


# --- tensormap.replace ---


def replacements() -> Iterator[Case]:
    """map, field, ord (-1 for fields without), value."""
    small = tiled(U16, (128, 64), (32, 8), steps=(1, 2))
    large = tiled(F32, (64, 16, 9, 5, 3), (16, 2, 3, 4, 5), (1 << 37, 48, 1 << 33, 1 << 20), swizzle=2, promotion=2)
    for m in (small, large):
        for value in range(5):
            yield replace(m, "rank", value)
        for value in (0x7F00_0000_0040, 16, 0x123_4567_89AB_CDE0):
            yield replace(m, "global_address", value)
        for n in range(5):
            for value in (1, 2, 16, 255, 256):
                yield replace(m, "box_dim", value, n)
            for value in (1, 2, 7, 1 << 20, (1 << 32) - 1):
                yield replace(m, "global_dim", value, n)
            for value in (16, 48, 1 << 20, 1 << 36, (1 << 40) - 16):
                yield replace(m, "global_stride", value, n)
            for value in range(1, 9):
                yield replace(m, "element_stride", value, n)
        for field, count in (("elemtype", 13), ("interleave_layout", 3), ("swizzle_mode", 4), ("fill_mode", 2)):
            for value in range(count):
                yield replace(m, field, value)


def replace(m: Case, field: str, value: int, which: int = -1) -> Case:
    return {"map": m, "field": field, "ord": which, "value": value}


def replacing_kernel(case: Case) -> str:
    """PTX that replaces one field of the map at `map`."""
    wide = "64" if case["field"] in ("global_address", "global_stride") else "32"
    fixed = case["field"] in ("elemtype", "interleave_layout", "swizzle_mode", "fill_mode")
    which = f"{case['ord']}, " if case["ord"] >= 0 else ""
    register = "%rd1" if wide == "64" else "%r1"
    return f"""
.version 8.3
.target sm_90a
.address_size 64
.visible .entry k(.param .u64 map)
{{
.reg .pred %p<2>;
.reg .b32 %r<4>;
.reg .b64 %rd<4>;
mov.u32 %r0, %tid.x;
setp.ne.u32 %p0, %r0, 0;
@%p0 ret;
ld.param.b64 %rd0, [map];
mov.b{wide} {register}, {case["value"]};
tensormap.replace.tile.{case["field"]}.global.b1024.b{wide} [%rd0], {which}{case["value"] if fixed else register};
ret;
}}
"""


class Driver:
    """The few calls that are needed, through ctypes."""

    def __init__(self) -> None:
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.check(self.cuda.cuInit(0))
        device, context, version, name = (
            ctypes.c_int(),
            ctypes.c_void_p(),
            ctypes.c_int(),
            ctypes.create_string_buffer(99),
        )
        self.check(self.cuda.cuDeviceGet(ctypes.byref(device), 0))
        self.check(self.cuda.cuDeviceGetName(name, 99, device))
        self.check(self.cuda.cuDriverGetVersion(ctypes.byref(version)))
        self.check(self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        self.check(self.cuda.cuCtxSetCurrent(context))
        self.name, self.version = name.value.decode(), version.value

    @staticmethod
    def check(code: int) -> None:
        if code:
            raise RuntimeError(f"the CUDA driver answers {code}")

    def encode(self, m: Case) -> tuple[int, bytes]:
        """Result code and the map."""
        buffer = ctypes.create_string_buffer(192)
        base = ctypes.addressof(buffer)
        at = base + -base % 64
        rank = len(m["sizes"])
        first = (
            ctypes.c_void_p(at), ctypes.c_int(m["element_type"]), ctypes.c_uint32(rank), ctypes.c_void_p(m["address"]),
            (ctypes.c_uint64 * rank)(*m["sizes"]), (ctypes.c_uint64 * rank)(*m["strides"]),
        )  # fmt: skip
        last = (
            (ctypes.c_uint32 * rank)(*m["steps"]),
            *(ctypes.c_int(m[x]) for x in ("interleave", "swizzle", "promotion", "fill")),
        )
        if m["kind"] == "tiled":
            code = self.cuda.cuTensorMapEncodeTiled(*first, (ctypes.c_uint32 * rank)(*m["box"]), *last)
        else:
            corners = ((ctypes.c_int * (rank - 2))(*m[x]) for x in ("lower", "upper"))
            code = self.cuda.cuTensorMapEncodeIm2col(
                *first, *corners, ctypes.c_uint32(m["channels"]), ctypes.c_uint32(m["pixels"]), *last
            )
        return code, ctypes.string_at(at, 128)

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_uint64()
        self.check(self.cuda.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)))
        return pointer.value

    def put(self, address: int, data: bytes) -> None:
        self.check(self.cuda.cuMemcpyHtoD_v2(ctypes.c_uint64(address), data, ctypes.c_size_t(len(data))))

    def get(self, address: int, size: int) -> bytes:
        out = ctypes.create_string_buffer(size)
        self.check(self.cuda.cuMemcpyDtoH_v2(out, ctypes.c_uint64(address), ctypes.c_size_t(size)))
        return out.raw

    def launch(self, ptx: str, shared: int, arguments: list[Any]) -> None:
        """One warp."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(module), ptx.encode()))
        self.check(self.cuda.cuModuleGetFunction(ctypes.byref(function), module, b"k"))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        sizes = (ctypes.c_uint(n) for n in (1, 1, 1, 32, 1, 1, shared))
        self.check(self.cuda.cuLaunchKernel(function, *sizes, None, pointers, None))
        self.check(self.cuda.cuCtxSynchronize())
        self.check(self.cuda.cuModuleUnload(module))


def recorded(driver: Driver, case: Case) -> Case:
    """Carry out one copy. The tensor lies 1 KiB into an allocation that is noise all over."""
    t = case["map"]
    size, total = tensor_bytes(t) + 4096, shared_bytes(t)
    memory = driver.allocate(size)
    t = t | {"address": memory + 1024}
    code, raw = driver.encode(t)
    if code:
        return case | {"map": t, "code": code}
    driver.put(memory, noise(case["seed"], size))
    before, after = driver.allocate(total), driver.allocate(total + 8)
    driver.put(before, noise(case["seed"] + 1, total))
    arguments = [
        ctypes.create_string_buffer(raw, 128), ctypes.c_uint64(before), ctypes.c_uint64(after),
        ctypes.c_uint32(total), ctypes.c_uint32(transactions(t)), *(ctypes.c_int32(c) for c in case["at"]),
    ]  # fmt: skip
    driver.launch(kernel(case), total, arguments)
    found = {"over": int.from_bytes(driver.get(after + total, 4), "little"), "transactions": transactions(t)}
    changed = (after, total, case["seed"] + 1) if case["op"] == "load" else (memory, size, case["seed"])
    found["changes"] = differences(noise(changed[2], changed[1]), driver.get(changed[0], changed[1]))
    for pointer in (memory, before, after):
        driver.check(driver.cuda.cuMemFree_v2(ctypes.c_uint64(pointer)))
    return case | {"map": t, "code": 0, "raw": raw.hex(), **found}


def replaced(driver: Driver, case: Case) -> Case:
    code, raw = driver.encode(case["map"])
    driver.check(code)
    memory = driver.allocate(128)
    driver.put(memory, raw)
    driver.launch(replacing_kernel(case), 0, [ctypes.c_uint64(memory)])
    after = driver.get(memory, 128)
    driver.check(driver.cuda.cuMemFree_v2(ctypes.c_uint64(memory)))
    return case | {"raw": raw.hex(), "after": after.hex()}


def differences(old: bytes, new: bytes) -> list[tuple[int, str]]:
    """Runs of bytes that differ (base64), each with its place; runs less than nine bytes apart are one."""
    runs: list[list[int]] = []
    for n, (a, b) in enumerate(zip(old, new, strict=True)):
        if a != b:
            if runs and n - runs[-1][1] < 9:
                runs[-1][1] = n + 1
            else:
                runs.append([n, n + 1])
    return [(a, base64.b64encode(new[a:b]).decode()) for a, b in runs]


def carried_out() -> list[Case]:
    """All copies, by processes of their own: a copy that the GPU refuses leaves its process without a context."""
    cases, done = list(copies()), list[Case]()
    while len(done) < len(cases):
        worker = subprocess.run([sys.executable, __file__, str(len(done))], capture_output=True, text=True)
        done += [json.loads(line) for line in worker.stdout.splitlines()]
        if len(done) < len(cases):
            reason = (worker.stderr.strip().splitlines() or ["?"])[-1]
            if "Driver" in worker.stderr and "__init__" in worker.stderr:
                raise RuntimeError(reason)
            done.append(cases[len(done)] | {"code": -1, "reason": reason})
    return done


def work(start: int) -> None:
    driver = Driver()
    for case in itertools.islice(copies(), start, None):
        print(json.dumps(recorded(driver, case)), flush=True)


def main() -> None:
    if len(sys.argv) > 1:
        work(int(sys.argv[1]))
        return
    driver = Driver()
    encoded = []
    for m in maps():
        code, raw = driver.encode(m)
        encoded.append(m | {"code": code, **({} if code else {"raw": raw.hex()})})
    changed = [replaced(driver, case) for case in replacements()]
    done = carried_out()
    out = {"driver": driver.version, "device": driver.name, "maps": encoded, "replacements": changed, "copies": done}
    FILE.write_bytes(gzip.compress(json.dumps(out, separators=(",", ":")).encode(), mtime=0))
    good, over = sum(not m["code"] for m in encoded), sum(c.get("over", 0) for c in done)
    print(f"{driver.name}, driver {driver.version}: {good} maps encoded, {len(encoded) - good} refused")
    print(f"{len(changed)} replacements")
    print(f"{len(done)} copies, {sum(c['code'] == 0 for c in done)} with a map, {over} over in time")
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
