"""Loads, stores, atomics and reductions in every space; asynchronous and bulk copies."""

import numpy as np

from .catalogue import _BITS, SEED, Buffer, Map, _random, _specials, out, simple

_REGISTER = {2: "%h", 4: "%r", 8: "%q"}


def _noise(count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([SEED, seed]).integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)


def _values(kind: str, count: int, seed: int) -> np.ndarray:
    """Special values and random ones, mixed."""
    rng = np.random.default_rng([SEED, seed, *map(ord, kind)])
    if kind in ("f16x2", "bf16x2"):
        return _values(kind[:-2], 2 * count, seed).view(np.uint32)
    special = _specials(kind)
    x = np.where(rng.random(count) < 0.3, rng.choice(special, count), _random(kind, count, rng))
    return x.astype(f"u{_BITS[kind] // 8}")


def loads() -> None:
    """Widths and vectors: every lane copies 32 bytes from the source to the output, in pieces."""
    source = _noise(32 * 8)
    for t, size in (("b8", 1), ("u16", 2), ("b32", 4), ("f32", 4), ("b64", 8), ("f64", 8)):
        for vector in (1, 2, 4):
            if size * vector > 16:
                continue
            register = {1: "%h", 2: "%h", 4: "%r", 8: "%q"}[size]
            base = 20
            if t[0] == "f":
                declare, register, base = f".reg .{t} %x<16>;", "%x", 0
            else:
                declare = ""
            names = ", ".join(f"{register}{base + n}" for n in range(vector))
            names = "{" + names + "}" if vector > 1 else names
            v = f".v{vector}" if vector > 1 else ""
            lines = ["mul.wide.u32 %q40, %r0, 32; add.u64 %q41, %q40, %q1; add.u64 %q42, %q40, %q0;"]
            for at in range(0, 32, size * vector):
                lines.append(f"ld.global{v}.{t} {names}, [%q41+{at}]; st.global{v}.{t} [%q42+{at}], {names};")
            simple(f"ld.global{v}.{t}", "\n".join(lines), out(256), Buffer(source), declare=declare)
    # sign and zero extension on the way to a wider register
    body = "mul.wide.u32 %q40, %r0, 32; add.u64 %q41, %q40, %q1; add.u64 %q42, %q40, %q0;"
    for n, t in enumerate(("s8", "u8", "b8", "s16", "u16", "s32", "u32")):
        wide = "%q43" if n % 2 or t[1:] == "32" else "%r20"
        body += f"ld.global.{t} {wide}, [%q41+{4 * n}];"
        body += f"mad.lo.u32 %r30, %r0, 8, {256 * n}; cvt.u64.u32 %q44, %r30; add.u64 %q44, %q44, %q0;"
        body += (
            f"st.global.b64 [%q44], {wide};"
            if wide == "%q43"
            else f"cvt.u64.u32 %q43, {wide}; st.global.b64 [%q44], %q43;"
        )
    simple("ld.extend", body, out(7, 32, dtype=np.uint64), Buffer(source))
    modifiers = (
        "ld.global.nc.b32",
        "ld.global.ca.b32",
        "ld.global.cg.b32",
        "ld.global.cs.b32",
        "ld.global.lu.b32",
        "ld.global.cv.b32",
        "ld.volatile.global.b32",
        "ld.relaxed.gpu.global.b32",
        "ld.acquire.sys.global.b32",
        "ld.global.nc.L1::no_allocate.L2::128B.b32",
        "ld.global.L1::evict_last.b32",
        "ld.weak.global.b32",
        "ldu.global.b32",
        "ld.b32",
        "ld.acquire.cta.b32",
    )
    body = "mul.wide.u32 %q40, %r0, 4; add.u64 %q41, %q40, %q1; add.u64 %q42, %q40, %q0;"
    body += "".join(f"{op} %r20, [%q41]; st.global.b32 [%q42+{128 * n}], %r20;" for n, op in enumerate(modifiers))
    simple("ld.modifiers", body, out(len(modifiers), 32), Buffer(source))
    modifiers = (
        "st.global.wb.b32",
        "st.global.cg.b32",
        "st.global.cs.b32",
        "st.global.wt.b32",
        "st.volatile.global.b32",
        "st.relaxed.gpu.global.b32",
        "st.release.sys.global.b32",
        "st.global.L1::no_allocate.b32",
        "st.b32",
    )
    body = "mul.wide.u32 %q40, %r0, 4; add.u64 %q41, %q40, %q1; add.u64 %q42, %q40, %q0; ld.global.b32 %r20, [%q41];"
    body += "".join(f"{op} [%q42+{128 * n}], %r20;" for n, op in enumerate(modifiers))
    body += "prefetch.global.L2 [%q41]; prefetch.global.L1 [%q41]; prefetchu.L1 [%q41];"
    body += "createpolicy.fractional.L2::evict_last.b64 %q50, 1.0; ld.global.L2::cache_hint.b32 %r21, [%q41], %q50;"
    body += f"st.global.b32 [%q42+{128 * len(modifiers)}], %r21;"
    body += "applypriority.global.L2::evict_normal [%q1], 128;"
    simple("st.modifiers", body, out(len(modifiers) + 1, 32), Buffer(source))
    # local, constant, shared and generic
    body = (
        "mov.u64 %q40, spot; cvta.local.u64 %q41, %q40; mul.wide.u32 %q42, %r0, 4; add.u64 %q43, %q42, %q1;"
        "ld.global.b32 %r20, [%q43]; st.local.b32 [%q40+4], %r20; ld.b32 %r21, [%q41+4]; add.u32 %r21, %r21, 1;"
        "st.b32 [%q41+8], %r21; ld.local.b32 %r22, [%q40+8]; add.u64 %q44, %q42, %q0; st.global.b32 [%q44], %r22;"
        "and.b32 %r23, %r0, 7; mul.wide.u32 %q45, %r23, 4; mov.u64 %q46, table; add.u64 %q46, %q46, %q45;"
        "ld.const.b32 %r24, [%q46]; st.global.b32 [%q44+128], %r24; cvta.const.u64 %q47, %q46; ld.b32 %r24, [%q47];"
        "st.global.b32 [%q44+256], %r24; mov.u32 %r25, pool; shl.b32 %r26, %r0, 2; add.u32 %r25, %r25, %r26;"
        "st.shared.b32 [%r25], %r20; bar.warp.sync -1; cvt.u64.u32 %q48, %r25; cvta.shared.u64 %q49, %q48; "
        "ld.b32 %r27, [%q49];"
        "st.global.b32 [%q44+384], %r27; isspacep.shared %p1, %q49; isspacep.global %p2, %q44; "
        "isspacep.local %p3, %q41;"
        "isspacep.shared %p4, %q44; isspacep.const %p5, %q47; isspacep.shared::cluster %p6, %q49; mov.b32 %r28, 0;"
        "cvta.to.shared.u64 %q50, %q49; sub.u64 %q50, %q50, %q48; cvt.u32.u64 %r29, %q50; "
        "st.global.b32 [%q44+640], %r29;"
        + "".join(f"selp.b32 %r29, {1 << n}, 0, %p{n}; or.b32 %r28, %r28, %r29;" for n in range(1, 7))
        + "st.global.b32 [%q44+512], %r28; mov.u64 %q51, vary; cvta.global.u64 %q52, %q51; add.u64 %q52, %q52, %q45;"
        "ld.b32 %r30, [%q52]; st.global.b32 [%q44+768], %r30;"
    )
    simple(
        "spaces",
        body,
        out(7, 32),
        Buffer(source),
        static=".local .align 16 .b8 spot[64];\n.shared .align 16 .b32 pool[32];",
        module=(
            ".const .align 4 .b32 table[8] = {1, -2, 3, 0x80000000, 5, 6, 7, 8};"
            "\n.global .align 4 .u32 vary[8] = {9, 8, 7, 6, 5, 4, 3, 2};"
        ),
    )
    body = (
        "ld.param.b32 %r20, [p1]; ld.param.b32 %r21, [p2]; mov.b64 %q40, p1; cvta.param.u64 %q41, %q40; "
        "ld.b32 %r22, [%q41];"
        "mul.wide.u32 %q42, %r0, 12; add.u64 %q42, %q42, %q0; st.global.b32 [%q42], %r20; st.global.b32 [%q42+4], %r21;"
        "st.global.b32 [%q42+8], %r22;"
    )
    simple("ld.param", body, out(32, 3), 0x12345678, 0x7FFFFFFF)


def atomics() -> None:
    operations = [
        *((op, t) for op in ("add", "min", "max") for t in ("u32", "s32", "u64", "s64") if (op, t) != ("add", "s64")),
        *((op, t) for op in ("and", "or", "xor", "exch", "cas") for t in ("b32", "b64")),
        ("cas", "b16"),
        ("inc", "u32"),
        ("dec", "u32"),
        ("add", "f32"),
        ("add", "f64"),
        ("add.noftz", "f16"),
        ("add.noftz", "bf16"),
        ("add.noftz", "f16x2"),
        ("add.noftz", "bf16x2"),
    ]
    for op, t in operations:
        memory, value = _values(t, 64, 1), _values(t, 64, 2)
        size = memory.itemsize
        if op in ("cas", "inc", "dec"):
            value[::2] = memory[::2]
        r = _REGISTER[size]
        last = f", {r}22" if op == "cas" else ""
        for space in ("global", "shared"):
            head = (
                f"mul.wide.u32 %q40, %r0, {size}; add.u64 %q41, %q40, %q1; add.u64 %q42, %q40, %q2; "
                f"add.u64 %q43, %q40, %q0;"
                f"ld.global.b{8 * size} {r}21, [%q42]; not.b{8 * size} {r}22, {r}21;"
            )
            if space == "shared":
                head += (
                    f"mov.u32 %r30, pool; mul.lo.u32 %r31, %r0, {size}; add.u32 %r30, %r30, %r31; "
                    f"ld.global.b{8 * size} {r}23, [%q41];"
                    f"st.shared.b{8 * size} [%r30], {r}23;"
                )
            place = "%q41" if space == "global" else "%r30"
            tail = (
                ""
                if space == "global"
                else f"ld.shared.b{8 * size} {r}23, [%r30]; st.global.b{8 * size} [%q41], {r}23;"
            )
            static = ".shared .align 16 .b8 pool[1024];" if space == "shared" else ""
            simple(
                f"atom.{space}.{op}.{t}",
                (
                    f"{head} atom.{space}.{op}.{t} {r}20, [{place}], {r}21{last}; "
                    f"st.global.b{8 * size} [%q43], {r}20; {tail}"
                ),
                out(64, dtype=f"u{size}"),
                Buffer(memory, True),
                Buffer(value),
                block=64,
                static=static,
            )
            if op not in ("exch", "cas"):
                simple(
                    f"red.{space}.{op}.{t}",
                    f"{head} red.{space}.{op}.{t} [{place}], {r}21; {tail}",
                    out(64, dtype=f"u{size}"),
                    Buffer(memory, True),
                    Buffer(value),
                    block=64,
                    static=static,
                )
    # all threads on one address: the sum does not depend on the order
    for t in ("u32", "s32", "u64"):
        size = int(t[1:]) // 8
        r = _REGISTER[size]
        body = (
            f"mul.wide.u32 %q40, %r0, {size}; add.u64 %q41, %q40, %q1; ld.global.b{8 * size} {r}21, [%q41];"
            f"atom.relaxed.gpu.global.add.{t if t != 's32' else 's32'} {r}20, [%q0], {r}21; "
            f"red.global.max.{t} [%q0+8], {r}21; red.global.min.{t} [%q0+16], {r}21;"
        )
        simple(f"atom.contended.{t}", body, Buffer(np.full(3, 5, np.uint64), True), Buffer(_values(t, 96, 3)), block=96)
    # 128 bits
    memory = _noise(128, 5)
    value = memory.copy()
    value[::8] ^= 1
    for op in ("exch", "cas"):
        body = (
            "mul.wide.u32 %q40, %r0, 16; add.u64 %q41, %q40, %q1; add.u64 %q42, %q40, %q2; add.u64 %q43, %q40, %q0;"
            "ld.global.v2.b64 {%q50, %q51}, [%q42]; mov.b128 %x1, {%q50, %q51}; not.b64 %q52, %q50; "
            "mov.b128 %x2, {%q52, %q51};"
            f"atom.global.{op}.b128 %x0, [%q41], %x1{', %x2' if op == 'cas' else ''}; mov.b128 {{%q53, %q54}}, %x0;"
            "st.global.v2.b64 [%q43], {%q53, %q54};"
        )
        simple(
            f"atom.global.{op}.b128", body, out(128), Buffer(memory, True), Buffer(value), declare=".reg .b128 %x<4>;"
        )
    # vectors
    forms = [
        ("f32", 2),
        ("f32", 4),
        ("f16", 2),
        ("f16", 4),
        ("f16", 8),
        ("bf16", 2),
        ("bf16", 4),
        ("bf16", 8),
        ("f16x2", 2),
        ("f16x2", 4),
        ("bf16x2", 2),
        ("bf16x2", 4),
    ]
    for t, count in forms:
        for op in ("add", "min", "max"):
            if op != "add" and t == "f32":
                continue
            memory, value = _values(t, 32 * count, 1), _values(t, 32 * count, 2)
            size = memory.itemsize
            r, declare = _REGISTER[size], ""
            if t == "f32":
                r, declare = "%x", ".reg .f32 %x<64>;"
            some, old = ["{" + ", ".join(f"{r}{b + n}" for n in range(count)) + "}" for b in (20, 40)]
            move = "".join(f"ld.global.b{8 * size} {r}{20 + n}, [%q52+{n * size}];" for n in range(count))
            save = "".join(f"st.global.b{8 * size} [%q53+{n * size}], {r}{40 + n};" for n in range(count))
            noftz = "" if t == "f32" else ".noftz"
            head = (
                f"mul.wide.u32 %q50, %r0, {count * size}; add.u64 %q51, %q50, %q1; add.u64 %q52, %q50, %q2; "
                f"add.u64 %q53, %q50, %q0;"
            )
            for which in ("atom", "red"):
                text = f"atom.global.{op}{noftz}.v{count}.{t} {old}, [%q51], {some}; {save}"
                if which == "red":
                    text = f"red.global.{op}{noftz}.v{count}.{t} [%q51], {some};"
                simple(
                    f"{which}.global.{op}.v{count}.{t}",
                    f"{head} {move} {text}",
                    out(32 * count, dtype=f"u{size}"),
                    Buffer(memory, True),
                    Buffer(value),
                    declare=declare,
                )


def asynchronous() -> None:
    source = _noise(32 * 16, 6)
    static = ".shared .align 128 .b8 pool[4096];\n.shared .align 8 .b64 bars[4];"
    head = (
        "mov.u32 %r1, pool; shl.b32 %r2, %r0, 4; add.u32 %r3, %r1, %r2; cvt.u64.u32 %q40, %r2; "
        "add.u64 %q41, %q40, %q1; add.u64 %q42, %q40, %q0;"
    )
    zero = (
        "mov.b32 %r4, -1; st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r4}; "
        "st.shared.v4.b32 [%r3+512], {%r4, %r4, %r4, %r4};"
    )
    back = "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3]; st.global.v4.b32 [%q42], {%r5, %r6, %r7, %r8};"
    for n, (op, size, extra) in enumerate(
        (
            ("ca", 4, ""),
            ("ca", 8, ""),
            ("ca", 16, ""),
            ("cg", 16, ""),
            ("ca", 16, ", %r9"),
            ("cg", 16, ", %r9"),
            ("ca", 8, ", %r10"),
            ("ca", 4, ", %r11"),
        )
    ):
        simple(
            f"cp.async.{n}",
            f"{head} {zero} and.b32 %r9, %r0, 15; and.b32 %r10, %r0, 7; and.b32 %r11, %r0, 3;"
            f"cp.async.{op}.shared.global [%r3], [%q41], {size}{extra}; cp.async.commit_group; cp.async.wait_group 0;"
            f"{back} cp.async.{op}.shared.global [%r3], [%q41+{512}], {size}; cp.async.wait_all; "
            f"ld.shared.v4.b32 {{%r5, %r6, %r7, %r8}}, [%r3]; "
            f"st.global.v4.b32 [%q42+512], {{%r5, %r6, %r7, %r8}};",
            out(256),
            Buffer(source),
            static=static,
        )
    wait = "{tag}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [{bar}], {parity}; @!%p1 bra {tag};"
    simple(
        "cp.async.mbarrier",
        f"{head} {zero} mov.u32 %r20, bars; setp.eq.u32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r20], 32;"
        "@%p2 mbarrier.init.shared::cta.b64 [%r20+8], 32; bar.sync 0;"
        "cp.async.cg.shared.global [%r3], [%q41], 16; cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r20];"
        + wait.format(tag="w0", bar="%r20", parity=0)
        + back
        + "cp.async.cg.shared.global [%r3+512], [%q41+512], 16; cp.async.mbarrier.arrive.shared::cta.b64 [%r20+8];"
        "mbarrier.arrive.shared::cta.b64 %q50, [%r20+8];"
        + wait.format(tag="w1", bar="%r20+8", parity=0)
        + "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3+512]; st.global.v4.b32 [%q42+512], {%r5, %r6, %r7, %r8};",
        out(256),
        Buffer(source),
        static=static,
    )
    # bulk: load, shared to shared within the cluster, store, reductions
    init = (
        "mov.u32 %r20, bars; setp.eq.u32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r20], 1;"
        "@%p2 fence.mbarrier_init.release.cluster; bar.sync 0;"
    )
    simple(
        "cp.async.bulk.load",
        f"{head} {zero} fence.proxy.async.shared::cta; {init}"
        "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 %q50, [%r20], 528;"
        "@%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%q1+32], 512, [%r20];"
        "@%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r1+1008], [%q1], 16, [%r20];"
        + wait.format(tag="w0", bar="%r20", parity=0)
        + back
        + "ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r3+512]; st.global.v4.b32 [%q42+512], {%r5, %r6, %r7, %r8};",
        out(256),
        Buffer(source),
        static=static,
    )
    simple(
        "cp.async.bulk.store",
        f"{head} ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%q41]; st.shared.v4.b32 [%r3], {{%r5, %r6, %r7, %r8}};"
        "fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %p2, %r0, 0; @!%p2 bra end;"
        "cp.async.bulk.global.shared::cta.bulk_group [%q0], [%r1], 256; "
        "cp.async.bulk.global.shared::cta.bulk_group [%q0+512], [%r1+128], 384;"
        "cp.async.bulk.prefetch.L2.global [%q1], 256;"
        "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; cp.async.bulk.wait_group 0; end:",
        out(256),
        Buffer(source),
        static=static,
    )
    for op, t in (
        ("add", "u32"),
        ("add", "s32"),
        ("add", "u64"),
        ("min", "u32"),
        ("max", "s32"),
        ("min", "s64"),
        ("max", "u64"),
        ("inc", "u32"),
        ("dec", "u32"),
        ("and", "b32"),
        ("or", "b32"),
        ("xor", "b64"),
        ("add", "f32"),
        ("add", "f64"),
        ("add.noftz", "f16"),
        ("add.noftz", "bf16"),
        ("min", "f16"),
        ("max", "bf16"),
    ):
        size = _BITS[t] // 8
        memory, value = _values(t, 512 // size, 7), _values(t, 512 // size, 8)
        simple(
            f"cp.reduce.async.bulk.{op}.{t}",
            f"{head} ld.global.v4.b32 {{%r5, %r6, %r7, %r8}}, [%q41]; st.shared.v4.b32 [%r3], {{%r5, %r6, %r7, %r8}};"
            "fence.proxy.async.shared::cta; bar.sync 0; setp.eq.u32 %p2, %r0, 0; @!%p2 bra end;"
            f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}.{t} [%q0], [%r1], 512;"
            "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; end:",
            Buffer(memory, True),
            Buffer(value),
            static=static,
        )


def tensors() -> None:
    """Tensor copies; every rank, every swizzle, boxes that hang over the edges."""
    kinds = {"u8": 0, "u16": 1, "u32": 2, "f16": 6, "f32": 7, "bf16": 9, "s32": 3, "u64": 4}
    static = ".shared .align 1024 .b8 pool[8192];\n.shared .align 8 .b64 bars[1];"

    def load(name: str, m: Map, data: np.ndarray, at: tuple[int, ...]) -> None:
        size = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 6: 2, 7: 4, 9: 2}[m.kind]
        total = int(np.prod([-(-b // s) for b, s in zip(m.box, m.steps or (1,) * len(m.box), strict=True)])) * size
        words = total // 4
        body = (
            "mov.u32 %r1, pool; mov.u32 %r20, bars; setp.eq.u32 %p2, %r0, 0; "
            "@%p2 mbarrier.init.shared::cta.b64 [%r20], 1;"
            "@%p2 fence.mbarrier_init.release.cluster; bar.sync 0; mov.u64 %q45, p2; cvta.param.u64 %q45, %q45;"
            f"@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 %q50, [%r20], {total};"
            f"@%p2 cp.async.bulk.tensor.{len(at)}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
            f"[%r1], [%q45, {{{', '.join(map(str, at))}}}], [%r20];"
            "wait: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r20], 0; @!%p1 bra wait; mov.u32 %r2, %r0;"
            f"next: setp.ge.u32 %p3, %r2, {words}; @%p3 bra end; shl.b32 %r3, %r2, 2; add.u32 %r4, %r3, %r1; "
            f"ld.shared.b32 %r5, [%r4];"
            "cvt.u64.u32 %q40, %r3; add.u64 %q40, %q40, %q0; st.global.b32 [%q40], %r5; "
            "add.u32 %r2, %r2, 32; bra next; end:"
        )
        simple(name, body, out(words), Buffer(data), m, static=static)

    data = _noise(16 * 1024, 11)
    for swizzle in (0, 32, 64, 128):
        box0 = (swizzle or 64) // 2
        for n, at in enumerate(((0, 0), (8, 3), (-8, -2), (104, 60))):
            load(f"tma.load.swizzle{swizzle}.{n}", Map(1, 6, (120, 64), (256,), (box0, 16), swizzle=swizzle), data, at)
    load("tma.load.1d", Map(1, 2, (1000,), (), (64,)), data, (960,))
    load("tma.load.3d", Map(1, 2, (20, 6, 5), (96, 768), (8, 4, 3), swizzle=32), data, (16, 4, 3))
    load("tma.load.4d", Map(1, 1, (24, 6, 5, 4), (64, 512, 4096), (16, 4, 2, 3), swizzle=32), data, (-8, 3, -1, 2))
    load(
        "tma.load.5d",
        Map(1, 0, (48, 4, 3, 3, 2), (64, 512, 2048, 8192), (32, 2, 2, 2, 2), swizzle=0),
        data,
        (16, 3, 2, -1, 1),
    )
    load("tma.load.steps", Map(1, 6, (120, 64), (256,), (32, 16), steps=(1, 2)), data, (8, 3))
    load("tma.load.fill", Map(1, 7, (60, 30), (256,), (16, 8), fill=True), data, (52, 26))

    for reduce, t in (
        ("", "u32"),
        ("add", "u32"),
        ("add", "f32"),
        ("add", "f16"),
        ("add", "bf16"),
        ("min", "s32"),
        ("max", "u64"),
        ("and", "u32"),
        ("min", "f16"),
    ):
        size = _BITS[t] // 8
        memory = _values(t, 4096 // size, 12)
        value = _values(t, 2048 // size, 13)
        m = Map(0, kinds[t], (128 // size - 8 // size, 20), (128,), (64 // size, 16), swizzle=64)
        op = (
            f"cp.reduce.async.bulk.tensor.2d.global.shared::cta.{reduce}.tile.bulk_group"
            if reduce
            else "cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group"
        )
        body = (
            "mov.u32 %r1, pool; shl.b32 %r2, %r0, 4; mov.u32 %r3, 0;"
            "fill: add.u32 %r4, %r2, %r3; cvt.u64.u32 %q40, %r4; add.u64 %q40, %q40, %q1; "
            "ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%q40];"
            "add.u32 %r4, %r4, %r1; st.shared.v4.b32 [%r4], {%r5, %r6, %r7, %r8}; add.u32 %r3, %r3, 512; "
            "setp.lt.u32 %p1, %r3, 2048; @%p1 bra fill;"
            f"fence.proxy.async.shared::cta; bar.sync 0; mov.u64 %q45, p2; cvta.param.u64 %q45, %q45; "
            f"setp.eq.u32 %p2, %r0, 0; @!%p2 bra end; prefetch.tensormap [%q45];"
            f"{op} [%q45, {{{48 // size}, 9}}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; end:"
        )
        simple(f"tma.store.{reduce or 'plain'}.{t}", body, Buffer(memory, True), Buffer(value), m, static=static)
    for n in (2, 4):
        body = (
            "mov.u32 %r1, pool; mov.u32 %r20, bars; mov.u32 %r21, %cluster_ctarank; setp.eq.u32 %p2, %r0, 0;"
            "@%p2 mbarrier.init.shared::cta.b64 [%r20], 1; @%p2 fence.mbarrier_init.release.cluster;"
            f"@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 %q50, [%r20], {1024 * n};"
            "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; mov.u64 %q45, p2; "
            "cvta.param.u64 %q45, %q45; shl.b32 %r22, %r21, 10; add.u32 %r23, %r1, %r22;"
            f"shl.b32 %r24, %r21, 3; mov.b16 %h1, {(1 << n) - 1};"
            "@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%r23], [%q45, {0, %r24}], [%r20], %h1;"
            "wait: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r20], 0; @!%p1 bra wait; mov.u32 %r2, %r0;"
            f"next: shl.b32 %r3, %r2, 2; add.u32 %r4, %r3, %r1; ld.shared.b32 %r5, [%r4]; "
            f"mul.lo.u32 %r6, %r21, {1024 * n}; add.u32 %r6, %r6, %r3;"
            f"cvt.u64.u32 %q40, %r6; add.u64 %q40, %q40, %q0; st.global.b32 [%q40], %r5; "
            f"add.u32 %r2, %r2, 32; setp.lt.u32 %p3, %r2, {256 * n}; @%p3 bra next;"
            "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
        )
        simple(
            f"tma.multicast{n}",
            body,
            out(n, 256 * n),
            Buffer(data),
            Map(1, 6, (64, 64), (256,), (64, 8), swizzle=128),
            static=static,
            cluster=n,
            grid=n,
        )


for family in (loads, atomics, asynchronous, tensors):
    family()
