"""Sparse tensor cores: mma.sp on fragments, wgmma.sp on images of shared memory.

Elements, spreads and layouts are those of `matrices`; what is new is the metadata. Its indices are random, each one
that the PTX ISA allows stands everywhere in a tile of its own, and the words of threads that hold none are random.
"""

from itertools import product

import numpy as np

from .catalogue import SEED, Array
from .matrices import (
    SIZE,
    SPREADS,
    addends,
    descriptor,
    fragment_a,
    fragment_b,
    fragment_c,
    integers,
    mma_case,
    small,
    spread,
    wgmma_case,
)

# indices of two elements out of four: the first's in the lower half; of one out of two (TF32)
ORDERED = (0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110)
UNORDERED = (0b0001, 0b0010, 0b0110, 0b0011, 0b0111, 0b1011)
PAIRS = (0b0100, 0b1110)


def allowed(kind: str, ordered: bool) -> tuple[int, ...]:
    if kind == "tf32":
        return PAIRS
    return ORDERED if ordered else ORDERED + UNORDERED


def indices(shape: tuple[int, ...], kind: str, ordered: bool, seed: int) -> Array:
    rng = np.random.default_rng([SEED, seed])
    return rng.choice(np.array(allowed(kind, ordered), np.uint32), shape)


def chunks(kind: str, k: int) -> int:
    """Indices of a row."""
    return k // (2 if kind == "tf32" else 4)


def metadata(rows: Array, selector: int, seed: int) -> Array:
    """Indices [tiles, 16, 4 or 8 or 16] -> words [tiles, 32] (PTX ISA, "Matrix fragments for sparse mma").

    Of four threads (g, q) with 4 indices a row q = selector holds rows g (lower half) and g + 8, with 8 the pair 2 *
    selector, 2 * selector + 1 holds a half of these rows each, with 16 every thread half of row g + 8 (q % 2).
    Of bytes the pair holds a row each: the same words then mean other indices, allowed ones too.
    """
    tiles, _, count = rows.shape
    words = np.random.default_rng([SEED, seed]).integers(0, 1 << 32, (tiles, 32)).astype(np.uint32)
    for lane in range(32):
        g, q = divmod(lane, 4)
        if count == 16:
            mine = rows[:, g + 8 * (q % 2), 8 * (q // 2) : 8 * (q // 2) + 8]
        elif q // (count // 4) == selector:
            part = slice(4 * (q % 2), 4 * (q % 2) + 4) if count == 8 else slice(0, 4)
            mine = np.concatenate([rows[:, g, part], rows[:, g + 8, part]], 1)
        else:
            continue
        words[:, lane] = (mine << np.arange(0, 32, 4, dtype=np.uint32)).sum(1)
    return words


def operands(
    kind: str, b_kind: str, k: int, how: str, shape: tuple[int, int, int], ordered: bool, seed: int
) -> tuple[Array, Array, Array]:
    """Stored elements of A [tiles, m, k / 2] and B [tiles, n, k] as bits, indices [tiles, m, chunks]."""
    tiles, m, n = shape
    where = indices((tiles, m, chunks(kind, k)), kind, ordered, seed)
    if how == "integers":
        return integers((tiles, m, k // 2), kind, seed + 1), integers((tiles, n, k), b_kind, seed + 2), where
    a = spread((tiles, m, k // 2), kind, how, seed + 1)
    b = spread((tiles, n, k), b_kind, "near" if how == "tiny" else how, seed + 2)
    if how == "cancel":
        # the second half of k repeats the first with the other sign, but for some bits of B
        rng = np.random.default_rng([SEED, seed + 3])
        sign = a.dtype.type({1: 0x80, 2: 0x8000, 4: 0x80000000}[a.itemsize])
        noise = (rng.random((tiles, n, k // 2)) < 0.3).astype(b.dtype)
        a[..., k // 4 :] = a[..., : k // 4] ^ sign
        b[..., k // 2 :] = b[..., : k // 2] ^ (noise << (13 if b_kind == "tf32" else 0)).astype(b.dtype)
        where[..., where.shape[2] // 2 :] = where[..., : where.shape[2] // 2]
    return a, b, where


# --- mma.sp ---

FLOATS = (
    ("f16", "f16", (16, 32), ("f32", "f16")),
    ("bf16", "bf16", (16, 32), ("f32",)),
    ("tf32", "tf32", (8, 16), ("f32",)),
)
VARIANTS = {"sp": False, "sp::ordered_metadata": True}  # whether indices are in order


def _every(kind: str, k: int, ordered: bool, seed: int) -> Array:
    """Indices of a tile with random ones and of one for each that is allowed."""
    each = np.array(allowed(kind, ordered), np.uint32)
    where = indices((len(each) + 1, 16, chunks(kind, k)), kind, ordered, seed)
    where[1:] = each[:, None, None]
    return where


def _warp(
    name: str, opcode: str, kinds: tuple[str, str], a: Array, b: Array, c: Array, where: Array, selector: int
) -> None:
    words = metadata(where, selector, 31 + selector)
    mma_case(name, opcode, fragment_a(a, kinds[0]), fragment_b(b, kinds[1]), fragment_c(c), words, selector)


def mma_sp() -> None:
    """Both variants of an instruction have the same elements."""
    for number, (a_kind, b_kind, depths, results) in enumerate(FLOATS):
        for k, (variant, ordered), d_kind in product(depths, VARIANTS.items(), results):
            seed = 5000 + 1000 * number + 10 * k
            shape, kinds = f"m16n8k{k}", (a_kind, b_kind)
            name = f"mma.{variant.replace('::', '_')}.{shape}.{d_kind}.{a_kind}"
            opcode = f"mma.{variant}.sync.aligned.{shape}.row.col.{d_kind}.{a_kind}.{b_kind}.{d_kind}"
            selectors = 16 // chunks(a_kind, k)
            for n, how in enumerate(SPREADS):
                a, b, where = operands(a_kind, b_kind, k, how, (2, 16, 8), ordered, seed)
                c = addends((2, 16, 8), a_kind, d_kind, how, seed + 5)
                _warp(f"{name}.{how}", opcode, kinds, a, b, c, where, n % selectors)
            for selector in range(selectors):
                where = _every(a_kind, k, ordered, seed)
                a, b, _ = operands(a_kind, b_kind, k, "integers", (len(where), 16, 8), ordered, seed)
                c = integers((len(where), 16, 8), d_kind, seed + 5)
                _warp(f"{name}.selector{selector}", opcode, kinds, a, b, c, where, selector)
    for a_kind, b_kind, k, (variant, ordered) in product(("s8", "u8"), ("s8", "u8"), (32, 64), VARIANTS.items()):
        where = _every(a_kind, k, ordered, 9900)
        rng = np.random.default_rng([SEED, 9901])
        a, b = (rng.integers(0, 256, (len(where), *s)).astype(np.uint8) for s in ((16, k // 2), (8, k)))
        c = rng.choice([0, -(2**31), 2**31 - 1, 77, -(2**31) + 9000], (len(where), 16, 8)).astype(np.int32)
        for sat, selector in product(("", ".satfinite"), range(16 // chunks(a_kind, k))):
            _warp(
                f"mma.{variant.replace('::', '_')}.m16n8k{k}.s32.{a_kind}.{b_kind}{sat}.selector{selector}",
                f"mma.{variant}.sync.aligned.m16n8k{k}.row.col{sat}.s32.{a_kind}.{b_kind}.s32",
                (a_kind, b_kind),
                a,
                b,
                c.view(np.uint32),
                where,
                selector,
            )


# --- wgmma.sp ---

# a core matrix has 8 rows of 16 bytes; a row of A has two of them, a row of B four
A_PLAIN, B_PLAIN = (descriptor(128, 256, 0), 0), (descriptor(128, 512, 0), 0)
TYPES = (
    ("f32", "bf16", "bf16"),
    ("f32", "f16", "f16"),
    ("f16", "f16", "f16"),
    ("f32", "tf32", "tf32"),
    *((d, a, b) for d in ("f32", "f16") for a in ("e4m3", "e5m2") for b in ("e4m3", "e5m2")),
    *(("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8")),
)


def _words(kind: str, selector: int, ordered: bool, seed: int) -> Array:
    """Random metadata of a warpgroup, [128]."""
    count = chunks(kind, 64 // SIZE[kind])
    return metadata(indices((4, 16, count), kind, ordered, seed), selector, seed + 1).reshape(128)


def cores(rows: Array) -> Array:
    """Rows of 32 or 64 bytes as core matrices."""
    raw = np.ascontiguousarray(rows).view(np.uint8)
    return np.ascontiguousarray(raw.reshape(-1, 8, raw.shape[1] // 16, 16).transpose(0, 2, 1, 3)).reshape(-1)


def _layouts(images: dict[str, Array]) -> None:
    """K-major with swizzles, A starting inside of the swizzled row, and MN-major, which 16-bit types have."""
    for kind in ("bf16", "tf32", "e4m3", "s8"):
        types, d = ("s32" if kind == "s8" else "f32", kind, kind), small("s32" if kind == "s8" else "f32", 16, 1)
        for swizzle in (64, 128):
            word = descriptor(16, 8 * swizzle, swizzle)
            for start in range(0, swizzle, 32):
                wgmma_case(
                    f"wgmma.sp.{kind}.k{swizzle}.start{start}",
                    types,
                    16,
                    (word, start),
                    (word, start // 64 * 64),
                    images[kind],
                    d,
                    metadata=_words(kind, 0, True, 700 + start),
                )
        word = descriptor(2048, 128, 0)
        places = (word, 0), (word, 256)
        wgmma_case(f"wgmma.sp.{kind}.k0.far", types, 16, *places, images[kind], d, metadata=_words(kind, 0, True, 710))
    for swizzle in (0, 32, 64, 128):
        if swizzle:
            words = descriptor(16 * swizzle, 8 * swizzle, swizzle), descriptor(8 * swizzle, 4096, swizzle)
        else:
            words = descriptor(128, 256, 0), descriptor(1024, 128, 0)
        for (which, word), majors in product(enumerate(words), ((0, 1), (1, 0))):
            wgmma_case(
                f"wgmma.sp.f16.mn{swizzle}.{which}.majors{majors[0]}{majors[1]}",
                ("f32", "f16", "f16"),
                64,
                (word, 0) if majors[0] else A_PLAIN,
                (word, 0) if majors[1] else B_PLAIN,
                images["f16"],
                small("f32", 64, 1),
                majors=majors,
                metadata=_words("f16", which, True, 720),
                selector=which,
            )


def wgmma_sp() -> None:
    images = {
        kind: integers((56 * 1024 // SIZE[kind],), kind, 7).view(np.uint8)
        for kind in ("bf16", "f16", "tf32", "e4m3", "e5m2", "s8", "u8")
    }
    offset = 4096
    for types in TYPES:
        d_kind, a_kind, b_kind = types
        name = "wgmma.sp." + ".".join(types)
        image = np.concatenate([images[a_kind][:offset], images[b_kind][:8192]])
        places = A_PLAIN, B_PLAIN, image
        first = _words(a_kind, 0, True, 600)
        for n in (8, 48):
            wgmma_case(f"{name}.n{n}", types, n, *places, small(d_kind, n, n), offset=offset, metadata=first)
        d = small(d_kind, 8, 4)
        wgmma_case(f"{name}.fresh", types, 8, *places, d, offset=offset, keep=0, metadata=first)
        wgmma_case(f"{name}.any", types, 8, *places, d, offset=offset, metadata=_words(a_kind, 0, False, 610))
        if SIZE[a_kind] > 1:
            words = _words(a_kind, 1, True, 620)
            wgmma_case(f"{name}.selector1", types, 8, *places, d, offset=offset, metadata=words, selector=1)
        rows = np.ascontiguousarray(integers((128, 16 // SIZE[a_kind]), a_kind, 77)).view(np.uint32)
        for selector in range(2 if SIZE[a_kind] > 1 else 1):
            wgmma_case(
                f"{name}.registers{selector}",
                types,
                24,
                None,
                B_PLAIN,
                image,
                small(d_kind, 24, 9),
                offset=offset,
                registers=rows,
                metadata=_words(a_kind, selector, True, 630),
                selector=selector,
            )
        if d_kind != "s32":
            for signs in ((-1, 1), (1, -1), (-1, -1)):
                signed = f"{name}.signs{signs[0]}{signs[1]}"
                wgmma_case(signed, types, 8, *places, d, offset=offset, signs=signs, metadata=first)
    wgmma_case(
        "wgmma.sp.f32.bf16.n256",
        ("f32", "bf16", "bf16"),
        256,
        A_PLAIN,
        B_PLAIN,
        images["bf16"],
        small("f32", 256, 256),
        metadata=_words("bf16", 0, True, 640),
    )
    _layouts(images)
    # how it adds
    for types in TYPES:
        seed = 9000 + sum(map(ord, types[1] + types[2]))
        d_kind, a_kind, b_kind = types
        k, name = 64 // SIZE[a_kind], "wgmma.sp." + ".".join(types)
        if d_kind == "s32":
            for sat in ("", ".satfinite"):
                rng = np.random.default_rng([SEED, seed])
                rows = rng.integers(0, 256, 64 * 32 + 8 * 64).astype(np.uint8)
                image = np.concatenate([cores(rows[: 64 * 32].reshape(64, 32)), cores(rows[64 * 32 :].reshape(8, 64))])
                extremes = rng.choice([0, -(2**31), 2**31 - 1, 77, -(2**31) + 9000], (128, 4)).astype(np.int32)
                wgmma_case(
                    f"{name}.full{sat}",
                    types,
                    8,
                    A_PLAIN,
                    B_PLAIN,
                    image,
                    extremes.view(np.uint32),
                    offset=2048,
                    sat=sat,
                    metadata=_words(a_kind, 0, True, seed + 1),
                )
            continue
        for how in SPREADS:
            a, b, where = operands(a_kind, b_kind, k, how, (1, 64, 8), True, seed)
            c = addends((128, 4), a_kind, d_kind, how, seed + 5)
            wgmma_case(
                f"{name}.{how}",
                types,
                8,
                A_PLAIN,
                B_PLAIN,
                np.concatenate([cores(a[0]), cores(b[0])]),
                np.ascontiguousarray(c).view(np.uint32),
                offset=2048,
                metadata=metadata(where.reshape(4, 16, -1), 0, seed + 6).reshape(128),
            )


for family in (mma_sp, wgmma_sp):
    family()
