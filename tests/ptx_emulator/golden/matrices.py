"""Tensor cores: mma.sync on fragments, wgmma on images of shared memory, ldmatrix and its kin.

Small integers show layouts: their sums are exact in any order. The other operands show how the hardware adds: wide
spreads of exponents, sums that cancel, sparse powers of two.
"""

from collections.abc import Iterator

import numpy as np

from .catalogue import SEED, Array, Buffer, out, simple

LANE = np.arange(32)
GROUP, QUAD = LANE // 4, LANE % 4
SIZE = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "s8": 1, "u8": 1, "f64": 8, "f32": 4, "s32": 4}
SPREADS = ("near", "wide", "sparse", "cancel", "special", "tiny")
_LEAST = {"f16": -24, "bf16": -133, "tf32": -136, "e4m3": -9, "e5m2": -16}  # exponents of the smallest numbers
_RANGE = {"f16": 12, "bf16": 20, "tf32": 20, "e4m3": 6, "e5m2": 12}


def bits_of(x: Array, kind: str) -> Array:
    """FP64 values, exactly representable or to be truncated -> bits of `kind`."""
    if kind in ("s8", "u8", "s32"):
        return x.astype(np.int64).astype({"s8": np.int8, "u8": np.uint8, "s32": np.int32}[kind]).view(f"u{SIZE[kind]}")
    if kind == "f64":
        return x.view(np.uint64)
    if kind == "f32":
        return x.astype(np.float32).view(np.uint32)
    if kind == "f16":
        return x.astype(np.float16).view(np.uint16)
    single = x.astype(np.float32).view(np.uint32)
    if kind == "bf16":
        return (single >> 16).astype(np.uint16)
    if kind == "tf32":
        return single & np.uint32(0xFFFFE000)
    half = x.astype(np.float16).view(np.uint16)
    if kind == "e5m2":
        return (half >> 8).astype(np.uint8)
    # E4M3: three mantissa bits, bias 7; truncated, below 2^-9 zero, at most 448
    magnitude = np.minimum(np.abs(x), 448.0)
    exponent = np.clip(np.floor(np.log2(np.maximum(magnitude, 2.0**-20))), -6, 8)
    steps = np.floor(magnitude / np.exp2(exponent - 3)).astype(np.int64)
    code = np.where(steps < 8, steps, (exponent.astype(np.int64) + 7) * 8 + steps - 8)
    return (code | np.signbit(x) * 128).astype(np.uint8)


def integers(shape: tuple[int, ...], kind: str, seed: int) -> Array:
    rng = np.random.default_rng([SEED, seed])
    low = 0 if kind == "u8" else -3
    return bits_of(rng.integers(low, 4, shape).astype(np.float64), kind)


def spread(shape: tuple[int, ...], kind: str, how: str, seed: int) -> Array:
    """Elements of a floating point kind as bits; cancel pairs neighbours along the last axis."""
    rng = np.random.default_rng([SEED, seed, *map(ord, how)])
    if how == "tiny":  # mostly subnormal
        low = _LEAST[kind]
        x = np.exp2(rng.integers(low, low + 9, shape).astype(float)) * rng.uniform(-1, 1, shape)
        return bits_of(x, kind)
    top = {"near": 1, "wide": _RANGE[kind], "sparse": _RANGE[kind], "cancel": _RANGE[kind] // 2, "special": 3}[how]
    x = np.exp2(rng.integers(-top, top + 1, shape)) * rng.choice([-1.0, 1.0], shape)
    if how != "sparse":
        x *= 1 + rng.integers(0, 1024, shape) / 1024
    if how == "sparse":
        x *= rng.random(shape) < 0.35
    if how == "cancel":
        x *= np.where(rng.random(shape) < 0.3, 2.0 ** -(top // 2), 1.0)
    bits = bits_of(x, kind)
    if how == "special":
        odd = {
            "f16": [0x7C00, 0xFC00, 0x7E01, 1, 0x83FF, 0x7BFF],
            "bf16": [0x7F80, 0xFF80, 0x7FC1, 1, 0x807F, 0x7F7F],
            "tf32": [0x7F800000, 0xFF800000, 0x7FC02000, 1 << 13, 0x807FE000, 0x3F800FFF],
            "e4m3": [0x7F, 0xFF, 1, 0x87, 0x7E, 0xFE],
            "e5m2": [0x7C, 0xFC, 0x7F, 1, 0x83, 0x7B],
        }[kind]
        put = rng.random(shape) < 0.02
        bits = np.where(put, rng.choice(np.array(odd, np.uint64), shape), bits).astype(bits.dtype)
    return bits


# --- mma.sync ---


def fragment_a(a: Array, kind: str) -> Array:
    """[tiles, m, k] bits -> [tiles, 32, registers]: PTX ISA, "Matrix Fragments for mma"."""
    tiles, m, k = a.shape
    size = SIZE[kind]
    per = max(4 // size, 1)
    halves = m // 8
    parts = []
    for r in range(halves * k // (4 * per)):
        columns = per * QUAD[:, None] + np.arange(per) + 4 * per * (r // halves)
        parts.append(a[:, (GROUP + 8 * (r % halves))[:, None], columns])
    joined = np.ascontiguousarray(np.stack(parts, 2))
    return joined.view(np.uint64 if size == 8 else np.uint32).reshape(tiles, 32, -1)


def fragment_b(b: Array, kind: str) -> Array:
    """[tiles, 8, k] bits (n, k) -> [tiles, 32, registers]"""
    return fragment_a(b, kind)


def fragment_c(c: Array) -> Array:
    """[tiles, m, 8] -> [tiles, 32, registers]; two elements of 16 bits a register."""
    tiles, m, _ = c.shape
    parts = [c[:, (GROUP + 8 * h)[:, None], 2 * QUAD[:, None] + np.arange(2)] for h in range(m // 8)]
    joined = np.ascontiguousarray(np.stack(parts, 2))
    return joined.view(np.uint64 if c.itemsize == 8 else np.uint32).reshape(tiles, 32, -1)


def mma_case(
    name: str, opcode: str, a: Array, b: Array, c: Array, metadata: Array | None = None, selector: int = 0
) -> None:
    """a, b, c: registers [tiles, 32, count]; one warp and CTA a tile. metadata: of a sparse A, [tiles, 32]."""
    wide = a.dtype == np.uint64
    register, width, size = ("%q", "b64", 8) if wide else ("%r", "b32", 4)
    sources = {}
    lines = ["mov.u32 %r1, %ctaid.x; shl.b32 %r1, %r1, 5; add.u32 %r1, %r1, %r0;"]
    for n, (x, first) in enumerate(((a, 20), (b, 30), (c, 40))):
        count = x.shape[-1]
        lines.append(f"mul.wide.u32 %q50, %r1, {count * size}; add.u64 %q50, %q50, %q{n + 1};")
        for r in range(count):
            lines.append(f"ld.global.{width} {register}{first + r}, [%q50+{r * size}];")
        sources[n] = "{" + ", ".join(f"{register}{first + r}" for r in range(count)) + "}"
    count = c.shape[-1]
    d = "{" + ", ".join(f"{register}{53 + r if wide else 60 + r}" for r in range(count)) + "}"
    last = ""
    if metadata is not None:
        lines.append("mul.wide.u32 %q50, %r1, 4; add.u64 %q50, %q50, %q4; ld.global.b32 %r50, [%q50];")
        last = f", %r50, {selector}"
    lines.append(f"{opcode} {d}, {sources[0]}, {sources[1]}, {sources[2]}{last};")
    lines.append(f"mul.wide.u32 %q50, %r1, {count * size}; add.u64 %q50, %q50, %q0;")
    for r in range(count):
        lines.append(f"st.global.{width} [%q50+{r * size}], {register}{53 + r if wide else 60 + r};")
    simple(
        name,
        "\n".join(lines),
        out(*c.shape, dtype=c.dtype),
        Buffer(a),
        Buffer(b),
        Buffer(c),
        *([] if metadata is None else [Buffer(metadata)]),
        grid=len(a),
    )


def operands(kind: str, b_kind: str, d_kind: str, k: int, how: str, tiles: int, seed: int) -> Iterator[Array]:
    """a [tiles, 16, k], b [tiles, 8, k], c [tiles, 16, 8] as bits."""
    if how == "integers":
        yield integers((tiles, 16, k), kind, seed)
        yield integers((tiles, 8, k), b_kind, seed + 1)
        rng = np.random.default_rng([SEED, seed + 2])
        yield bits_of(rng.integers(-9, 10, (tiles, 16, 8)).astype(np.float64), d_kind)
        return
    a = spread((tiles, 16, k), kind, how, seed)
    b = spread((tiles, 8, k), b_kind, "near" if how == "tiny" else how, seed + 1)
    if how == "cancel":
        # the second half of k repeats the first with the other sign, but for some bits
        rng = np.random.default_rng([SEED, seed + 3])
        order = rng.permutation(k)
        sign = {1: 0x80, 2: 0x8000, 4: 0x80000000}[a.itemsize]
        a, b = a[..., order], b[..., order]
        a[..., order[k // 2 :]] = a[..., order[: k // 2]] ^ a.dtype.type(sign)
        noise = (rng.random((tiles, 8, k // 2)) < 0.3).astype(b.dtype)
        b[..., order[k // 2 :]] = b[..., order[: k // 2]] ^ (noise << (13 if kind == "tf32" else 0)).astype(b.dtype)
    yield a
    yield b
    yield addends((tiles, 16, 8), kind, d_kind, how, seed + 2)


def addends(shape: tuple[int, ...], kind: str, d_kind: str, how: str, seed: int) -> Array:
    """C for products of `kind` that are spread so."""
    rng = np.random.default_rng([SEED, seed])
    top = {"near": 1, "wide": 20, "sparse": 20, "cancel": 4, "special": 3, "tiny": 4}[how]
    top = min(top, 9) if d_kind == "f16" else top
    c = np.exp2(rng.integers(-top, top + 1, shape)) * rng.normal(0, 1, shape)
    c *= rng.random(shape) < 0.7
    if how == "tiny":
        c *= np.exp2(float(_LEAST[kind]))
    if how == "sparse":
        c = np.where(c == 0, 0, np.copysign(np.exp2(np.round(np.log2(np.abs(c) + (c == 0)))), c))
    return bits_of(c, d_kind)


def mma() -> None:
    seed = 100
    floats = [
        ("f16", "f16", 8, ("f32", "f16")),
        ("f16", "f16", 16, ("f32", "f16")),
        ("bf16", "bf16", 8, ("f32",)),
        ("bf16", "bf16", 16, ("f32",)),
        ("tf32", "tf32", 4, ("f32",)),
        ("tf32", "tf32", 8, ("f32",)),
        ("e4m3", "e4m3", 32, ("f32", "f16")),
        ("e4m3", "e5m2", 32, ("f32",)),
        ("e5m2", "e4m3", 32, ("f32",)),
        ("e5m2", "e5m2", 32, ("f32", "f16")),
        ("e4m3", "e4m3", 16, ("f32",)),
    ]
    for a_kind, b_kind, k, results in floats:
        for d_kind in results:
            for how in ("integers", *SPREADS):
                seed += 10
                tiles = 2 if how in ("integers", "special", "tiny") else 6
                a, b, c = operands(a_kind, b_kind, d_kind, k, how, tiles, seed)
                mma_case(
                    f"mma.m16n8k{k}.{d_kind}.{a_kind}.{b_kind}.{how}",
                    f"mma.sync.aligned.m16n8k{k}.row.col.{d_kind}.{a_kind}.{b_kind}.{d_kind}",
                    fragment_a(a, a_kind),
                    fragment_b(b, b_kind),
                    fragment_c(c),
                )
    for a_kind in ("s8", "u8"):
        for b_kind in ("s8", "u8"):
            for k in (16, 32):
                for sat in ("", ".satfinite"):
                    seed += 10
                    rng = np.random.default_rng([SEED, seed])
                    a, b = (rng.integers(0, 256, (2, m, k)).astype(np.uint8) for m in (16, 8))
                    c = rng.choice([0, -(2**31), 2**31 - 1, 77, -(2**31) + 9000], (2, 16, 8)).astype(np.int32)
                    mma_case(
                        f"mma.m16n8k{k}.s32.{a_kind}.{b_kind}{sat}",
                        f"mma.sync.aligned.m16n8k{k}.row.col{sat}.s32.{a_kind}.{b_kind}.s32",
                        fragment_a(a, a_kind),
                        fragment_b(b, b_kind),
                        fragment_c(c.view(np.uint32)),
                    )
    for m, k in ((8, 4), (16, 4), (16, 8), (16, 16)):
        seed += 10
        rng = np.random.default_rng([SEED, seed])
        a, b, c = (rng.normal(0, 1, (2, *s)) * np.exp2(rng.integers(-9, 10, (2, *s))) for s in ((m, k), (8, k), (m, 8)))
        mma_case(
            f"mma.m{m}n8k{k}.f64",
            f"mma.sync.aligned.m{m}n8k{k}.row.col.f64.f64.f64.f64",
            fragment_a(a.view(np.uint64), "f64"),
            fragment_b(b.view(np.uint64), "f64"),
            fragment_c(c.view(np.uint64)),
        )


# --- wgmma ---

IMAGE_A, IMAGE_B = 16 * 1024, 40 * 1024  # bytes of shared memory that the operands lie in


def descriptor(leading: int, stride: int, swizzle: int) -> int:
    """PTX ISA, "Matrix Descriptor Format" of wgmma, without the start address."""
    return leading >> 4 << 16 | stride >> 4 << 32 | {0: 0, 128: 1, 64: 2, 32: 3}[swizzle] << 62


def wgmma_case(
    name: str,
    kind: tuple[str, str, str],
    n: int,
    a: tuple[int, int] | None,
    b: tuple[int, int],
    image: Array,
    d: Array,
    *,
    offset: int = IMAGE_A,
    keep: int = 1,
    signs: tuple[int, int] = (1, 1),
    majors: tuple[int, ...] = (0, 0),
    registers: Array | None = None,
    sat: str = "",
    metadata: Array | None = None,
    selector: int = 0,
) -> None:
    """a, b: (descriptor, start in bytes in the image; B's after `offset`). d: [128, registers]. registers: A's.
    metadata: of a sparse A, [128].
    """
    d_kind, a_kind, b_kind = kind
    k = (32 if metadata is None else 64) // SIZE[a_kind]
    count = d.shape[1]
    copies = image.nbytes // 16
    assert image.nbytes % 16 == 0
    lines = [
        "mov.u32 %r1, data; mov.u32 %r2, %r0;",
        "copy: shl.b32 %r3, %r2, 4; cvt.u64.u32 %q50, %r3; add.u64 %q50, %q50, %q2;",
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%q50]; add.u32 %r8, %r3, %r1;",
        "st.shared.v4.b32 [%r8], {%r4, %r5, %r6, %r7};",
        f"add.u32 %r2, %r2, 128; setp.lt.u32 %p1, %r2, {copies}; @%p1 bra copy;",
        f"mul.wide.u32 %q50, %r0, {4 * count}; add.u64 %q51, %q50, %q1;",
        *(f"ld.global.b32 %r{100 + r}, [%q51+{4 * r}];" for r in range(count)),
    ]
    if registers is not None:
        lines += [
            "mul.wide.u32 %q52, %r0, 16; add.u64 %q52, %q52, %q3;",
            "ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%q52];",
        ]
        left = "{%r10, %r11, %r12, %r13}"
    else:
        assert a is not None
        lines.append(
            f"add.u32 %r2, %r1, {a[1]}; shr.u32 %r2, %r2, 4; cvt.u64.u32 %q53, %r2; or.b64 %q53, %q53, {a[0]};"
        )
        left = "%q53"
    last = sparse = ""
    if metadata is not None:
        lines += [
            f"mul.wide.u32 %q52, %r0, 4; add.u64 %q52, %q52, %q{3 if registers is None else 4};",
            "ld.global.b32 %r14, [%q52];",
        ]
        sparse, last = ".sp", f", %r14, {selector}"
    lines += [
        f"add.u32 %r2, %r1, {offset + b[1]}; shr.u32 %r2, %r2, 4; cvt.u64.u32 %q54, %r2; or.b64 %q54, %q54, {b[0]};",
        f"fence.proxy.async.shared::cta; bar.sync 0; setp.ne.b32 %p2, {keep}, 0;",
        "wgmma.fence.sync.aligned;",
        f"wgmma.mma_async{sparse}.sync.aligned.m64n{n}k{k}.{d_kind}.{a_kind}.{b_kind}{sat} {{"
        + ", ".join(f"%r{100 + r}" for r in range(count))
        + f"}}, {left}, %q54{last}, %p2",
    ]
    if d_kind != "s32":
        lines[-1] += f", {signs[0]}, {signs[1]}"
        if SIZE[a_kind] == 2:
            lines[-1] += "".join(f", {m}" for m in (majors[1:] if registers is not None else majors))
    lines[-1] += ";"
    lines += [
        "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
        "add.u64 %q51, %q50, %q0;",
        *(f"st.global.b32 [%q51+{4 * r}], %r{100 + r};" for r in range(count)),
    ]
    args = [out(128, count), Buffer(d), Buffer(image)]
    if registers is not None:
        args.append(Buffer(registers))
    if metadata is not None:
        args.append(Buffer(metadata))
    simple(
        name,
        "\n".join(lines),
        *args,
        block=128,
        shared=image.nbytes,
        module=".extern .shared .align 1024 .b8 data[];",
    )


def _count(d_kind: str, n: int) -> int:
    return n // 4 if d_kind == "f16" else n // 2


def small(d_kind: str, n: int, seed: int) -> Array:
    rng = np.random.default_rng([SEED, seed])
    x = rng.integers(-9, 10, (128, 2 * _count(d_kind, n) if d_kind == "f16" else n // 2)).astype(np.float64)
    return np.ascontiguousarray(bits_of(x, d_kind)).view(np.uint32)


def wgmma() -> None:
    images = {
        kind: integers((56 * 1024 // SIZE[kind],), kind, 7).view(np.uint8)
        for kind in ("bf16", "f16", "tf32", "e4m3", "e5m2", "s8", "u8")
    }
    plain = (descriptor(128, 256, 0), 0)
    # every type and several widths, without swizzle
    for kind, d_kind in (
        ("bf16", "f32"),
        ("f16", "f32"),
        ("f16", "f16"),
        ("tf32", "f32"),
        ("e4m3", "f32"),
        ("e5m2", "f32"),
        ("e4m3", "f16"),
        ("s8", "s32"),
        ("u8", "s32"),
    ):
        image = images[kind][: 12 * 1024]
        for n in (8, 24, 64):
            wgmma_case(
                f"wgmma.{d_kind}.{kind}.n{n}",
                (d_kind, kind, kind),
                n,
                plain,
                plain,
                image,
                small(d_kind, n, n),
                offset=4096,
            )
        wgmma_case(
            f"wgmma.{d_kind}.{kind}.fresh",
            (d_kind, kind, kind),
            8,
            plain,
            plain,
            image,
            small(d_kind, 8, 3),
            offset=4096,
            keep=0,
        )
        rng = np.random.default_rng([SEED, 5])
        raw = integers((128, 16 // SIZE[kind]), kind, 77)
        wgmma_case(
            f"wgmma.{d_kind}.{kind}.registers",
            (d_kind, kind, kind),
            24,
            None,
            plain,
            image,
            small(d_kind, 24, 9),
            offset=4096,
            registers=np.ascontiguousarray(raw).view(np.uint32),
        )
        if d_kind != "s32":
            for signs in ((-1, 1), (1, -1), (-1, -1)):
                wgmma_case(
                    f"wgmma.{d_kind}.{kind}.signs{signs[0]}{signs[1]}",
                    (d_kind, kind, kind),
                    8,
                    plain,
                    plain,
                    image,
                    small(d_kind, 8, 4),
                    offset=4096,
                    signs=signs,
                )
    wgmma_case(
        "wgmma.s32.s8.u8", ("s32", "s8", "u8"), 8, plain, plain, images["s8"][:12288], small("s32", 8, 2), offset=4096
    )
    wgmma_case(
        "wgmma.f32.e4m3.e5m2",
        ("f32", "e4m3", "e5m2"),
        8,
        plain,
        plain,
        images["e4m3"][:12288],
        small("f32", 8, 2),
        offset=4096,
    )
    wgmma_case(
        "wgmma.f32.e5m2.e4m3",
        ("f32", "e5m2", "e4m3"),
        8,
        plain,
        plain,
        images["e4m3"][:12288],
        small("f32", 8, 2),
        offset=4096,
    )
    for n in (128, 256):
        wgmma_case(f"wgmma.f32.bf16.n{n}", ("f32", "bf16", "bf16"), n, plain, plain, images["bf16"], small("f32", n, n))
    # K-major with every swizzle and start inside of the swizzled row; other strides without
    for kind in ("bf16", "tf32", "e4m3", "s8"):
        d_kind = "s32" if kind == "s8" else "f32"
        for swizzle in (32, 64, 128):
            word = descriptor(16, 8 * swizzle, swizzle)
            for start in range(0, swizzle, 32):
                wgmma_case(
                    f"wgmma.{kind}.k{swizzle}.start{start}",
                    (d_kind, kind, kind),
                    64 if kind == "bf16" else 16,
                    (word, start),
                    (word, start),
                    images[kind],
                    small(d_kind, 64 if kind == "bf16" else 16, 1),
                )
        word = descriptor(2048, 128, 0)
        wgmma_case(
            f"wgmma.{kind}.k0.far",
            (d_kind, kind, kind),
            16,
            (word, 0),
            (word, 256),
            images[kind],
            small(d_kind, 16, 1),
        )
    # MN-major, 16-bit types only
    for kind in ("bf16", "f16"):
        for swizzle in (0, 32, 64, 128):
            if swizzle:
                words = (descriptor(16 * swizzle, 8 * swizzle, swizzle), descriptor(8 * swizzle, 4096, swizzle))
            else:
                words = (descriptor(128, 256, 0), descriptor(1024, 128, 0))
            for which, word in enumerate(words):
                for majors in ((1, 1), (0, 1), (1, 0)):
                    wgmma_case(
                        f"wgmma.{kind}.mn{swizzle}.{which}.majors{majors[0]}{majors[1]}",
                        ("f32", kind, kind),
                        64,
                        (word if majors[0] else plain[0], 0),
                        (word if majors[1] else plain[0], 0),
                        images[kind],
                        small("f32", 64, 1),
                        majors=majors,
                    )
    # how it adds
    for kind, d_kind in (
        ("bf16", "f32"),
        ("f16", "f32"),
        ("f16", "f16"),
        ("tf32", "f32"),
        ("e4m3", "f32"),
        ("e5m2", "f32"),
        ("e4m3", "f16"),
    ):
        for how in SPREADS:
            n = 16
            other = "near" if how == "tiny" else how
            image = np.concatenate(
                [spread((64, 32 // SIZE[kind]), kind, how, 61), spread((n, 32 // SIZE[kind]), kind, other, 62)]
            )
            if how == "cancel":
                half = image.shape[1] // 2
                sign = image.dtype.type({1: 0x80, 2: 0x8000, 4: 0x80000000}[image.itemsize])
                image[:64, half:] = image[:64, :half] ^ sign
                image[64:, half:] = image[64:, :half] ^ (np.arange(n) % 3 == 0).astype(image.dtype)[
                    :, None
                ] * image.dtype.type(1 << 13 if kind == "tf32" else 1)
            # core matrices of 8 rows and 16 bytes: LBO 128, SBO 256
            cores = image.view(np.uint8).reshape(-1, 8, 2, 16).transpose(0, 2, 1, 3)
            rng = np.random.default_rng([SEED, 63])
            top = {"near": 1, "wide": 9 if d_kind == "f16" else 20, "sparse": 9, "cancel": 4, "special": 3, "tiny": 4}[
                how
            ]
            x = np.exp2(rng.integers(-top, top + 1, (128, n // 2))) * rng.normal(0, 1, (128, n // 2))
            x *= rng.random((128, n // 2)) < 0.7
            if how == "tiny":
                x *= np.exp2(float(_LEAST[kind]))
            d = np.ascontiguousarray(bits_of(x, d_kind)).view(np.uint32)
            wgmma_case(
                f"wgmma.{d_kind}.{kind}.{how}",
                (d_kind, kind, kind),
                n,
                plain,
                plain,
                np.ascontiguousarray(cores).reshape(-1),
                d,
                offset=2048,
            )


def matrices() -> None:
    """ldmatrix, stmatrix, movmatrix on rows of random 16-bit elements, in an order of their own."""
    rng = np.random.default_rng([SEED, 9])
    rows = rng.integers(0, 1 << 32, (32, 4), dtype=np.uint64).astype(np.uint32)
    order = rng.permutation(32).astype(np.uint32) * np.uint32(16)
    fill = (
        "mov.u32 %r1, data; shl.b32 %r2, %r0, 4; cvt.u64.u32 %q50, %r2; add.u64 %q51, %q50, %q1;"
        "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%q51]; add.u32 %r3, %r1, %r2;"
        "st.shared.v4.b32 [%r3], {%r4, %r5, %r6, %r7}; bar.sync 0;"
        "mul.wide.u32 %q52, %r0, 4; add.u64 %q52, %q52, %q2; ld.global.b32 %r8, [%q52]; add.u32 %r8, %r8, %r1;"
        "mov.b32 %r10, 0; mov.b32 %r11, 0; mov.b32 %r12, 0; mov.b32 %r13, 0;"
    )
    save = "add.u64 %q51, %q50, %q0; st.global.v4.b32 [%q51], {%r10, %r11, %r12, %r13};"
    static = ".shared .align 128 .b8 data[512];"
    for x in (1, 2, 4):
        some = "{" + ", ".join(f"%r{10 + r}" for r in range(x)) + "}"
        for trans in ("", ".trans"):
            simple(
                f"ldmatrix.x{x}{trans}",
                f"{fill} ldmatrix.sync.aligned.m8n8.x{x}{trans}.shared.b16 {some}, [%r8]; {save}",
                out(32, 4),
                Buffer(rows),
                Buffer(order),
                static=static,
            )
            given = "{" + ", ".join(f"%r{4 + r}" for r in range(x)) + "}"
            simple(
                f"stmatrix.x{x}{trans}",
                f"{fill} stmatrix.sync.aligned.m8n8.x{x}{trans}.shared.b16 [%r8], {given}; bar.sync 0;"
                f"ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r3]; {save}",
                out(32, 4),
                Buffer(rows),
                Buffer(order),
                static=static,
            )
    simple(
        "movmatrix",
        f"{fill} movmatrix.sync.aligned.m8n8.trans.b16 %r10, %r4; {save}",
        out(32, 4),
        Buffer(rows),
        Buffer(order),
        static=static,
    )


for family in (mma, wgmma, matrices):
    family()
