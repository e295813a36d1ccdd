"""Instructions that work lane by lane: integers, floating point, comparisons, conversions."""

import numpy as np

from .catalogue import Buffer, lanewise, operand, out, simple

SIGNED, UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
INTEGERS = (*SIGNED, *UNSIGNED)
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
MODES = ("rn", "rz", "rm", "rp")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def integers() -> None:
    for t in INTEGERS:
        for op in ("add", "sub", "mul.lo", "mul.hi", "div", "rem", "min", "max"):
            lanewise(f"{op}.{t}", f"{op}.{t} $d, $a, $b;", t, t, t)
        for op in ("mad.lo", "mad.hi"):
            lanewise(f"{op}.{t}", f"{op}.{t} $d, $a, $b, $c;", t, t, t, t)
        if t in WIDER:
            lanewise(f"mul.wide.{t}", f"mul.wide.{t} $d, $a, $b;", WIDER[t], t, t)
            lanewise(f"mad.wide.{t}", f"mad.wide.{t} $d, $a, $b, $c;", WIDER[t], t, t, WIDER[t])
        lanewise(f"sad.{t}", f"sad.{t} $d, $a, $b, $c;", t, t, t, t)
        lanewise(f"shr.{t}", f"shr.{t} $d, $a, $b;", t, t, "shift")
    for t in SIGNED:
        for op in ("abs", "neg"):
            lanewise(f"{op}.{t}", f"{op}.{t} $d, $a;", t, t)
    for op in ("add.sat.s32", "sub.sat.s32"):
        lanewise(op, f"{op} $d, $a, $b;", "s32", "s32", "s32")
    lanewise("mad.hi.sat.s32", "mad.hi.sat.s32 $d, $a, $b, $c;", "s32", "s32", "s32", "s32")
    for t in ("s32", "u32"):
        for half in ("lo", "hi"):
            lanewise(f"mul24.{half}.{t}", f"mul24.{half}.{t} $d, $a, $b;", t, t, t)
            lanewise(f"mad24.{half}.{t}", f"mad24.{half}.{t} $d, $a, $b, $c;", t, t, t, t)
    for t in ("s16x2", "u16x2"):
        for op in ("add", "min", "max"):
            lanewise(f"{op}.{t}", f"{op}.{t} $d, $a, $b;", t, t, t)
    for op in ("min", "max"):
        lanewise(f"{op}.relu.s32", f"{op}.relu.s32 $d, $a, $b;", "s32", "s32", "s32")
        lanewise(f"{op}.relu.s16x2", f"{op}.s16x2.relu $d, $a, $b;", "s16x2", "s16x2", "s16x2")
    for a in ("s32", "u32"):
        for b in ("s32", "u32"):
            lanewise(f"dp4a.{a}.{b}", f"dp4a.{a}.{b} $d, $a, $b, $c;", "b32", a, b, "s32")
            for half in ("lo", "hi"):
                lanewise(f"dp2a.{half}.{a}.{b}", f"dp2a.{half}.{a}.{b} $d, $a, $b, $c;", "b32", a, b, "s32")
    for t in ("u32", "u64"):
        lanewise(
            f"carry.add.{t}",
            f"add.cc.{t} $d, $a, $b; addc.cc.{t} $e, $b, $c; addc.{t} $f, $a, $c;",
            (t, t, t),
            t,
            t,
            t,
        )
        lanewise(
            f"carry.sub.{t}",
            f"sub.cc.{t} $d, $a, $b; subc.cc.{t} $e, $b, $c; subc.{t} $f, $a, $c;",
            (t, t, t),
            t,
            t,
            t,
        )
        lanewise(
            f"carry.mad.{t}",
            f"mad.lo.cc.{t} $d, $a, $b, $c; madc.hi.cc.{t} $e, $a, $b, $c; madc.lo.{t} $f, $b, $c, $a;",
            (t, t, t),
            t,
            t,
            t,
        )


def bits() -> None:
    for t in ("b16", "b32", "b64"):
        for op in ("and", "or", "xor"):
            lanewise(f"{op}.{t}", f"{op}.{t} $d, $a, $b;", t, t, t)
        for op in ("not", "cnot"):
            lanewise(f"{op}.{t}", f"{op}.{t} $d, $a;", t, t)
        lanewise(f"shl.{t}", f"shl.{t} $d, $a, $b;", t, t, "shift")
        lanewise(f"shr.{t}", f"shr.{t} $d, $a, $b;", t, t, "shift")
    for t in ("b32", "b64"):
        for op in ("popc", "clz"):
            lanewise(f"{op}.{t}", f"{op}.{t} $d, $a;", "b32", t)
        lanewise(f"brev.{t}", f"brev.{t} $d, $a;", t, t)
        lanewise(f"bfi.{t}", f"bfi.{t} $d, $a, $b, $c, $c;", t, t, t, "shift")
        pos = "and.b32 %r30, $c, 255; shr.u32 %r31, $c, 3; and.b32 %r31, %r31, 63;"
        lanewise(f"bfi.wide.{t}", f"{pos} bfi.{t} $d, $a, $b, %r30, %r31;", t, t, t, "b32")
    for t in ("u32", "s32", "u64", "s64"):
        lanewise(f"bfind.{t}", f"bfind.{t} $d, $a;", "u32", t)
        lanewise(f"bfind.shiftamt.{t}", f"bfind.shiftamt.{t} $d, $a;", "u32", t)
        lanewise(f"bfe.{t}", f"bfe.{t} $d, $a, $b, $c;", t, t, "shift", "shift")
        small = "and.b32 %r30, $b, 31; and.b32 %r31, $c, 31;"
        lanewise(f"bfe.small.{t}", f"{small} bfe.{t} $d, $a, %r30, %r31;", t, t, "b32", "b32")
    lanewise(
        "fns",
        "and.b32 %r30, $b, 31; and.b32 %r31, $c, 15; sub.s32 %r31, %r31, 7; fns.b32 $d, $a, %r30, %r31;",
        "b32",
        "b32",
        "b32",
        "b32",
    )
    for side in "lr":
        for mode in ("clamp", "wrap"):
            lanewise(f"shf.{side}.{mode}", f"shf.{side}.{mode}.b32 $d, $a, $b, $c;", "b32", "b32", "b32", "shift")
    for mode in ("", ".f4e", ".b4e", ".rc8", ".ecl", ".ecr", ".rc16"):
        lanewise(f"prmt{mode}", f"prmt.b32{mode} $d, $a, $b, $c;", "b32", "b32", "b32", "b32")
    for mode in ("clamp", "wrap"):
        for t in ("s32", "u32"):
            lanewise(f"szext.{mode}.{t}", f"szext.{mode}.{t} $d, $a, $b;", t, t, "shift")
        lanewise(f"bmsk.{mode}", f"bmsk.{mode}.b32 $d, $a, $b;", "b32", "shift", "shift")
    luts = [*range(0, 256, 5), 0xE8, 0x96, 0xCA, 0xEA, 0x80]
    store = (
        "mad.lo.u32 %r40, {n}, 128, 0; shl.b32 %r41, %r0, 2; add.u32 %r40, %r40, %r41; cvt.u64.u32 %q40, %r40; "
        "add.u64 %q40, %q40, %q0; st.global.b32 [%q40], %r50;"
    )
    load = "".join(
        f"mul.wide.u32 %q40, %r0, 4; add.u64 %q40, %q40, %q{n}; ld.global.b32 %r{50 + n}, [%q40];\n" for n in (1, 2, 3)
    )
    body = load + "".join(
        f"lop3.b32 %r50, %r51, %r52, %r53, {lut};\n{store.format(n=n)}\n" for n, lut in enumerate(luts)
    )
    data = [operand("b32", n)[256:288].copy() for n in range(3)]
    simple("lop3", body, out(len(luts), 32), *(Buffer(x) for x in data))
    body = (
        "setp.lt.s32 %p1, $a, 0; setp.ne.b32 %p2, $b, 0; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2;"
        "xor.pred %p5, %p1, %p2; not.pred %p6, %p1; mov.b32 $d, 0;"
        + "".join(f"selp.b32 %r31, {1 << n}, 0, %p{n}; or.b32 $d, $d, %r31;" for n in range(3, 7))
    )
    lanewise("logic.pred", body, "b32", "s32", "s32")
    lanewise(
        "mov.pack",
        "mov.b64 $d, {$a, $b}; mov.b32 {%h1, %h2}, $a; mov.b32 $e, {%h2, %h1};",
        ("b64", "b32"),
        "b32",
        "b32",
    )


def comparisons() -> None:
    ordered = ("eq", "ne", "lt", "le", "gt", "ge")
    unordered = ("equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan")

    def compare(t: str, ops: tuple[str, ...], suffix: str = "") -> str:
        return "mov.b32 $d, 0;" + "".join(
            f"setp.{op}{suffix}.{t} %p1, $a, $b; selp.b32 %r31, {1 << n}, 0, %p1; or.b32 $d, $d, %r31;"
            for n, op in enumerate(ops)
        )

    for t in (*INTEGERS, "b16", "b32", "b64"):
        ops = ("eq", "ne") if t[0] == "b" else ordered if t[0] == "s" else (*ordered, "lo", "ls", "hi", "hs")
        lanewise(f"setp.{t}", compare(t, ops), "b32", t, t)
    for t in ("f32", "f64", "f16", "bf16"):
        lanewise(f"setp.{t}", compare(t, ordered + unordered), "b32", t, t)
    for t in ("f32", "f16"):
        lanewise(f"setp.ftz.{t}", compare(t, ordered + unordered, ".ftz"), "b32", t, t)
    for t in ("f16x2", "bf16x2"):
        body = "mov.b32 $d, 0;" + "".join(
            f"setp.{op}.{t} %p1|%p2, $a, $b; selp.b32 %r31, {1 << 2 * n}, 0, %p1; or.b32 $d, $d, %r31;"
            f"selp.b32 %r31, {2 << 2 * n}, 0, %p2; or.b32 $d, $d, %r31;"
            for n, op in enumerate(ordered + unordered)
        )
        lanewise(f"setp.{t}", body, "b32", t, t)
    for t in ("s32", "f32"):
        body = "setp.lt.s32 %p9, $c, 0; mov.b32 $d, 0;" + "".join(
            f"setp.le.{j}.{t} %p1|%p2, $a, $b, {'!' if n & 1 else ''}%p9; selp.b32 %r31, {1 << 2 * n}, 0, %p1;"
            f"or.b32 $d, $d, %r31; selp.b32 %r31, {2 << 2 * n}, 0, %p2; or.b32 $d, $d, %r31;"
            for n, j in enumerate(("and", "or", "xor", "and"))
        )
        lanewise(f"setp.joined.{t}", body, "b32", t, t, "s32")
    for t in ("s32", "u32", "s16", "u64", "f32", "f64"):
        for d in ("u32", "s32", "f32"):
            lanewise(f"set.{d}.{t}", f"set.lt.{d}.{t} $d, $a, $b; set.ne.{d}.{t} $e, $a, $b;", (d, d), t, t)
    for op in unordered:
        lanewise(f"set.{op}.f32.f32", f"set.{op}.ftz.f32.f32 $d, $a, $b;", "f32", "f32", "f32")
    lanewise(
        "set.and.u32.f32",
        "setp.lt.s32 %p9, $c, 0; set.ge.and.u32.f32 $d, $a, $b, %p9; set.ge.xor.f32.s32 $e, $a, $b, !%p9;",
        ("u32", "f32"),
        "f32",
        "f32",
        "s32",
    )
    for t in HALVES:
        lanewise(f"set.{t}.{t}", f"set.ge.{t}.{t} $d, $a, $b; set.neu.{t}.{t} $e, $a, $b;", (t, t), t, t)
    for t in ("f16", "bf16"):
        lanewise(f"set.u32.{t}", f"set.ge.u32.{t} $d, $a, $b; set.neu.s32.{t} $e, $a, $b;", ("u32", "u32"), t, t)
    for t in ("f16x2", "bf16x2"):
        lanewise(f"set.u32.{t}", f"set.ge.u32.{t} $d, $a, $b;", "u32", t, t)
    for t in ("b16", "b32", "b64", "f32", "f64", "s16", "u64"):
        lanewise(f"selp.{t}", f"setp.lt.s32 %p1, $c, 0; selp.{t} $d, $a, $b, %p1;", t, t, t, "s32")
        lanewise(f"slct.{t}.s32", f"slct.{t}.s32 $d, $a, $b, $c;", t, t, t, "s32")
        lanewise(f"slct.{t}.f32", f"slct.{t}.f32 $d, $a, $b, $c; slct.ftz.{t}.f32 $e, $a, $b, $c;", (t, t), t, t, "f32")


def floating() -> None:
    for op, count in (("add", 2), ("sub", 2), ("mul", 2), ("fma", 3)):
        letters = ", ".join(("$a", "$b", "$c")[:count])
        for mode in MODES:
            for ftz in ("", ".ftz"):
                for sat in ("", ".sat"):
                    name = f"{op}.{mode}{ftz}{sat}.f32"
                    lanewise(name, f"{name} $d, {letters};", "f32", *["f32"] * count)
            lanewise(f"{op}.{mode}.f64", f"{op}.{mode}.f64 $d, {letters};", "f64", *["f64"] * count)
        if op != "fma":
            lanewise(f"{op}.f32", f"{op}.f32 $d, {letters};", "f32", *["f32"] * count)
        for t in HALVES:
            for ftz in ("", ".ftz") if t[0] == "f" else ("",):
                for sat in ("", ".sat", ".relu") if op == "fma" else ("", ".sat"):
                    if t[0] == "b" and sat == ".sat":
                        continue
                    name = f"{op}.rn{ftz}{sat}.{t}"
                    lanewise(name, f"{name} $d, {letters};", t, *[t] * count)
    for op in ("min", "max"):
        for t in ("f32", *HALVES):
            for ftz in ("", ".ftz") if t in ("f32", "f16", "f16x2") else ("",):
                for nan in ("", ".NaN"):
                    for xorsign in ("", ".xorsign.abs"):
                        name = f"{op}{ftz}{nan}{xorsign}.{t}"
                        lanewise(name, f"{name} $d, $a, $b;", t, t, t)
        lanewise(f"{op}.f64", f"{op}.f64 $d, $a, $b;", "f64", "f64", "f64")
    for op in ("neg", "abs"):
        for t in ("f32", "f64", *HALVES):
            for ftz in ("", ".ftz") if t in ("f32", "f16", "f16x2") else ("",):
                lanewise(f"{op}{ftz}.{t}", f"{op}{ftz}.{t} $d, $a;", t, t)
    for t in ("f32", "f64"):
        lanewise(f"copysign.{t}", f"copysign.{t} $d, $a, $b;", t, t, t)
        tests = ("finite", "infinite", "number", "notanumber", "normal", "subnormal")
        body = "mov.b32 $d, 0;" + "".join(
            f"testp.{x}.{t} %p1, $a; selp.b32 %r31, {1 << n}, 0, %p1; or.b32 $d, $d, %r31;" for n, x in enumerate(tests)
        )
        lanewise(f"testp.{t}", body, "b32", t)
    for mode in MODES:
        for ftz in ("", ".ftz"):
            lanewise(f"div.{mode}{ftz}.f32", f"div.{mode}{ftz}.f32 $d, $a, $b;", "f32", "f32", "f32")
            for op in ("rcp", "sqrt"):
                lanewise(f"{op}.{mode}{ftz}.f32", f"{op}.{mode}{ftz}.f32 $d, $a;", "f32", "f32")
        lanewise(f"div.{mode}.f64", f"div.{mode}.f64 $d, $a, $b;", "f64", "f64", "f64")
        for op in ("rcp", "sqrt"):
            lanewise(f"{op}.{mode}.f64", f"{op}.{mode}.f64 $d, $a;", "f64", "f64")


def approximations() -> None:
    """Bounds: PTX ISA, the section of each instruction."""
    ulp, tiny = 2.0**-23, 2.0**-149
    for ftz in ("", ".ftz"):
        for form in ("full", "approx"):
            lanewise(
                f"div.{form}{ftz}.f32",
                f"div.{form}{ftz}.f32 $d, $a, $b;",
                "f32",
                "f32",
                "f32",
                bound=(2 * ulp, tiny),
                values="f32",
            )
        lanewise(f"rcp.approx{ftz}.f32", f"rcp.approx{ftz}.f32 $d, $a;", "f32", "f32", bound=(ulp, 0), values="f32")
        lanewise(
            f"sqrt.approx{ftz}.f32", f"sqrt.approx{ftz}.f32 $d, $a;", "f32", "f32", bound=(2.0**-23, 0), values="f32"
        )
        lanewise(
            f"rsqrt.approx{ftz}.f32",
            f"rsqrt.approx{ftz}.f32 $d, $a;",
            "f32",
            "f32",
            bound=(2.0**-22.9, 0),
            values="f32",
        )
        for kind in ("f32", "exp"):
            lanewise(
                f"ex2.approx{ftz}.{kind}",
                f"ex2.approx{ftz}.f32 $d, $a;",
                "f32",
                kind,
                bound=(2.0**-22, tiny),
                values="f32",
            )
        lanewise(
            f"lg2.approx{ftz}.f32",
            f"lg2.approx{ftz}.f32 $d, $a;",
            "f32",
            "f32",
            bound=(2.0**-22, 2.0**-22),
            values="f32",
        )
        for op in ("sin", "cos"):
            lanewise(
                f"{op}.approx{ftz}.trig",
                f"{op}.approx{ftz}.f32 $d, $a;",
                "f32",
                "trig",
                bound=(0, 2.0**-20.5),
                values="f32",
            )
    for t in ("f32", "trig"):
        lanewise(f"tanh.approx.{t}", "tanh.approx.f32 $d, $a;", "f32", t, bound=(2.0**-11, 0), values="f32")
    lanewise("rcp.approx.ftz.f64", "rcp.approx.ftz.f64 $d, $a;", "f64", "f64", bound=(2.0**-20, 0), values="f64")
    lanewise("rsqrt.approx.f64", "rsqrt.approx.f64 $d, $a;", "f64", "f64", bound=(2.0**-22, 0), values="f64")
    lanewise("rsqrt.approx.ftz.f64", "rsqrt.approx.ftz.f64 $d, $a;", "f64", "f64", bound=(2.0**-20, 0), values="f64")
    for t in HALVES:
        ftz = ".ftz" if t[0] == "b" else ""
        lanewise(
            f"ex2.approx{ftz}.{t}",
            f"ex2.approx{ftz}.{t} $d, $a;",
            t,
            t,
            bound=(2.0**-9.9, 2.0**-24) if t[0] == "f" else (2.0**-7, 0),
            values=t[:4].rstrip("x"),
        )
        lanewise(
            f"tanh.approx.{t}",
            f"tanh.approx.{t} $d, $a;",
            t,
            t,
            bound=(0, 2.0**-10.987 if t[0] == "f" else 2.0**-8),
            values=t[:4].rstrip("x"),
        )


def conversions() -> None:
    whole = [f"{k}{n}" for k in "su" for n in (8, 16, 32, 64)]
    # destinations narrower than their register are extended by their sign
    register = {t: "b64" if t[1:] == "64" else "b32" for t in whole}
    for frm in ("f16", "bf16", "f32", "f64"):
        for to in whole:
            for extra in ("", ".ftz", ".sat") if frm == "f32" else ("",):
                body = " ".join(f"cvt.{m}i{extra}.{to}.{frm} ${d}, $a;" for m, d in zip(MODES, "defg", strict=True))
                if frm == "bf16" and to[1:] == "8":
                    continue
                wide = "b16" if frm == "bf16" and to[1:] == "16" else register[to]
                lanewise(f"cvt{extra}.{to}.{frm}", body, (wide,) * 4, frm)
    for frm in whole:
        for to in ("f16", "bf16", "f32", "f64"):
            if to == "bf16" and frm[1:] == "8":
                continue
            for extra in ("", ".sat") if frm in ("s32", "u64") and to in ("f16", "f32") else ("",):
                body = " ".join(f"cvt.{m}{extra}.{to}.{frm} ${d}, $a;" for m, d in zip(MODES, "defg", strict=True))
                lanewise(f"cvt{extra}.{to}.{frm}", body, (to,) * 4, frm)
        for to in whole:
            if to != frm:
                lanewise(f"cvt.{to}.{frm}", f"cvt.{to}.{frm} $d, $a;", register[to], frm)
            fits = int(to[1:]) >= int(frm[1:]) + (to[0] == "s" and frm[0] == "u") and not (
                to[0] == "u" and frm[0] == "s"
            )
            if not fits:
                lanewise(f"cvt.sat.{to}.{frm}", f"cvt.sat.{to}.{frm} $d, $a;", register[to], frm)
    for frm, to in (
        ("f32", "f16"),
        ("f32", "bf16"),
        ("f64", "f16"),
        ("f64", "bf16"),
        ("f64", "f32"),
        ("f16", "bf16"),
        ("bf16", "f16"),
    ):
        for extra in ("", ".ftz", ".sat") if to in ("f16", "f32") and frm in ("f32", "f64") else ("",):
            if extra == ".ftz" and (frm, to) == ("f64", "f16"):
                continue
            for m in MODES:
                lanewise(f"cvt.{m}{extra}.{to}.{frm}", f"cvt.{m}{extra}.{to}.{frm} $d, $a;", to, frm)
    for to in ("f16", "bf16"):
        for m in ("rn", "rz"):
            lanewise(f"cvt.{m}.relu.{to}.f32", f"cvt.{m}.relu.{to}.f32 $d, $a;", to, "f32")
            for relu in ("", ".relu"):
                lanewise(f"cvt.{m}{relu}.{to}x2.f32", f"cvt.{m}{relu}.{to}x2.f32 $d, $a, $b;", f"{to}x2", "f32", "f32")
                lanewise(
                    f"cvt.{m}{relu}.satfinite.{to}x2.f32",
                    f"cvt.{m}{relu}.satfinite.{to}x2.f32 $d, $a, $b;",
                    f"{to}x2",
                    "f32",
                    "f32",
                )
    for frm, to in (("f16", "f32"), ("f16", "f64"), ("bf16", "f32"), ("bf16", "f64"), ("f32", "f64")):
        for extra in ("", ".ftz", ".sat") if (frm, to) == ("f16", "f32") else ("",):
            lanewise(f"cvt{extra}.{to}.{frm}", f"cvt{extra}.{to}.{frm} $d, $a;", to, frm)
    for t in ("f32", "f64", "f16", "bf16"):
        for extra in ("", ".ftz", ".sat") if t == "f32" else ("",):
            for m in MODES:
                lanewise(f"cvt.{m}i{extra}.{t}.{t}", f"cvt.{m}i{extra}.{t}.{t} $d, $a;", t, t)
    for t in ("e4m3x2", "e5m2x2"):
        for relu in ("", ".relu"):
            lanewise(f"cvt{relu}.{t}.f32", f"cvt.rn.satfinite{relu}.{t}.f32 $d, $a, $b;", t, "f32", "f32")
            lanewise(
                f"cvt{relu}.{t}.f16", f"cvt.rn.satfinite{relu}.{t}.f32 $d, $a, $b;", t, _half_range(0), _half_range(1)
            )
            lanewise(f"cvt{relu}.{t}.f16x2", f"cvt.rn.satfinite{relu}.{t}.f16x2 $d, $a;", t, "f16x2")
            lanewise(f"cvt{relu}.f16x2.{t}", f"cvt.rn{relu}.f16x2.{t} $d, $a;", "f16x2", t)
    for form in ("rna", "rn", "rz", "rn.relu", "rz.relu", "rna.satfinite"):
        lanewise(f"cvt.{form}.tf32.f32", f"cvt.{form}.tf32.f32 $d, $a;", "f32", "f32")
    for t in ("u16", "s16"):
        lanewise(f"cvt.pack.sat.{t}", f"cvt.pack.sat.{t}.s32 $d, $a, $b;", "b32", "s32", "s32")
    for t in ("u8", "s8", "u4", "s4", "u2", "s2"):
        lanewise(f"cvt.pack.sat.{t}", f"cvt.pack.sat.{t}.s32.b32 $d, $a, $b, $c;", "b32", "s32", "s32", "b32")


def _half_range(slot: int) -> np.ndarray:
    """FP32 bits in the range of FP8, ties among them."""
    rng = np.random.default_rng([7, slot])
    x = rng.normal(0, 1, 512) * np.exp2(rng.integers(-18, 18, 512))
    x[::2] = [
        float(f"{v:.2g}") * 2.0 ** int(e)
        for v, e in zip(rng.integers(8, 32, 256) / 16, rng.integers(-12, 9, 256), strict=True)
    ]
    return x.astype(np.float32).view(np.uint32)


for family in (integers, bits, comparisons, floating, approximations, conversions):
    family()
