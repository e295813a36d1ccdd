"""Warps, barriers, mbarriers, clusters, control flow, special registers."""

import numpy as np

from .catalogue import SEED, Buffer, out, simple

PLACE = "mul.wide.u32 %q40, %r0, 4; add.u64 %q41, %q40, %q0;"


def _values(count: int, seed: int, top: int = 1 << 32) -> np.ndarray:
    return np.random.default_rng([SEED, seed]).integers(0, top, count, dtype=np.uint64).astype(np.uint32)


class Lines:
    """Results of a thread, one after the other: row n of the output is [threads]."""

    def __init__(self, threads: int):
        self.threads, self.rows, self.text = threads, 0, PLACE

    def add(self, text: str, *registers: str) -> None:
        self.text += text + "\n"
        for r in registers:
            if r.startswith("%p"):
                self.text += f"selp.u32 %r99, 1, 0, {r}; "
                r = "%r99"
            self.text += f"st.global.b32 [%q41+{4 * self.threads * self.rows}], {r};\n"
            self.rows += 1


def shuffles() -> None:
    value = _values(32, 21)
    by = _values(32, 22, 64)
    head = "add.u64 %q42, %q40, %q1; ld.global.b32 %r1, [%q42]; add.u64 %q43, %q40, %q2; ld.global.b32 %r2, [%q43];"
    for mode in ("up", "down", "bfly", "idx"):
        lines = Lines(32)
        lines.add(head)
        for control in (0x1F, 0, 0x181F, 0x1C1F, 0x1800, 0x0F, 0x1E1F, 0x1C03, 0x101F):
            for amount in (0, 1, 3, 16, 31, 33):
                lines.add(f"shfl.sync.{mode}.b32 %r3|%p1, %r1, {amount}, {control}, -1;", "%r3", "%p1")
        if mode == "idx":
            lines.add("shfl.sync.idx.b32 %r3|%p1, %r1, %r2, 31, -1;", "%r3", "%p1")
            lines.add("shfl.sync.idx.b32 %r3|%p1, %r1, %r2, 0x181f, -1;", "%r3", "%p1")
            # a part of the warp
            lines.add(
                "and.b32 %r4, %r0, 1; setp.eq.u32 %p2, %r4, 0; mov.b32 %r5, 77; mov.b32 %r6, 5; and.b32 %r7, %r2, 30;"
                "@%p2 shfl.sync.idx.b32 %r5, %r1, %r7, 31, 0x55555555; or.b32 %r7, %r7, 1; "
                "@!%p2 shfl.sync.idx.b32 %r6, %r1, %r7, 31, 0xaaaaaaaa;",
                "%r5",
                "%r6",
            )
        simple(f"shfl.{mode}", lines.text, out(lines.rows, 32), Buffer(value), Buffer(by))


def votes() -> None:
    value = _values(32, 23)
    few = _values(32, 24, 5)
    lines = Lines(32)
    lines.add("add.u64 %q42, %q40, %q1; ld.global.b32 %r1, [%q42]; add.u64 %q43, %q40, %q2; ld.global.b32 %r2, [%q43];")
    lines.add("setp.lt.s32 %p1, %r1, 0; setp.ge.u32 %p2, %r2, 0; setp.gt.u32 %p3, %r2, 99;")
    for p in ("%p1", "%p2", "%p3", "!%p1"):
        for mode in ("all", "any", "uni"):
            lines.add(f"vote.sync.{mode}.pred %p4, {p}, -1;", "%p4")
        lines.add(f"vote.sync.ballot.b32 %r3, {p}, -1;", "%r3")
    lines.add("match.any.sync.b32 %r3, %r2, -1;", "%r3")
    lines.add("match.all.sync.b32 %r3|%p4, %r2, -1;", "%r3", "%p4")
    lines.add("mov.b32 %r4, 12; match.all.sync.b32 %r3|%p4, %r4, -1;", "%r3", "%p4")
    lines.add("cvt.s64.s32 %q50, %r2; match.any.sync.b64 %r3, %q50, -1;", "%r3")
    lines.add("activemask.b32 %r3;", "%r3")
    lines.add("elect.sync %r3|%p4, -1;", "%r3", "%p4")
    for op in ("add", "min", "max"):
        for t in ("u32", "s32"):
            lines.add(f"redux.sync.{op}.{t} %r3, %r1, -1;", "%r3")
    for op in ("and", "or", "xor"):
        lines.add(f"redux.sync.{op}.b32 %r3, %r1, -1;", "%r3")
    # halves of the warp under their own masks
    lines.add(
        "setp.lt.u32 %p5, %r0, 11; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0; mov.b32 %r8, 0;"
        "@!%p5 bra other; vote.sync.ballot.b32 %r5, %p1, 0x7ff; redux.sync.add.u32 %r6, %r1, 0x7ff; "
        "match.any.sync.b32 %r7, %r2, 0x7ff;"
        "elect.sync %r8|%p6, 0x7ff; bra meet;"
        "other: vote.sync.ballot.b32 %r5, %p1, 0xfffff800; redux.sync.max.s32 %r6, %r1, 0xfffff800; "
        "match.any.sync.b32 %r7, %r2, 0xfffff800;"
        "elect.sync %r8|%p6, 0xfffff800; meet: bar.warp.sync -1;",
        "%r5",
        "%r6",
        "%r7",
        "%r8",
    )
    simple("votes", lines.text, out(lines.rows, 32), Buffer(value), Buffer(few))


def control() -> None:
    """Lane-dependent loops, nested branches, early exits: what each thread counts."""
    value = _values(64, 25, 40)
    body = (
        PLACE + "add.u64 %q42, %q40, %q1; ld.global.b32 %r1, [%q42]; mov.b32 %r2, 0; mov.b32 %r3, 0;"
        "outer: setp.ge.u32 %p1, %r2, %r1; @%p1 bra done; and.b32 %r4, %r2, %r0; and.b32 %r5, %r4, 1; "
        "setp.eq.u32 %p2, %r5, 0;"
        "@%p2 bra even; mov.b32 %r6, %r4; inner: add.u32 %r3, %r3, %r6; shr.u32 %r6, %r6, 1; "
        "setp.ne.u32 %p3, %r6, 0; @%p3 bra inner; bra next;"
        "even: setp.gt.u32 %p4, %r4, 8; @%p4 mad.lo.u32 %r3, %r3, 3, %r4; @%p4 bra next; xor.b32 %r3, %r3, %r2;"
        "next: add.u32 %r2, %r2, 1; bra outer; done: bar.warp.sync -1; "
        "shfl.sync.bfly.b32 %r7, %r3, 1, 31, -1; st.global.b32 [%q41], %r3; st.global.b32 [%q41+256], %r7;"
        "setp.lt.u32 %p5, %r1, 20; @%p5 exit; activemask.b32 %r8; st.global.b32 [%q41+512], %r1; "
        "st.global.b32 [%q41+768], %r8;"
    )
    simple("loops", body, out(4, 64), Buffer(value), block=64)
    body = (
        PLACE + "add.u64 %q42, %q40, %q1; ld.global.b32 %r1, [%q42]; and.b32 %r2, %r1, 3; mov.b32 %r5, 1;"
        "targets: .branchtargets t0, t1, t2, t3; brx.idx %r2, targets; t0: add.u32 %r5, %r5, 10; bra over; "
        "t1: mul.lo.u32 %r5, %r1, 7; t2: xor.b32 %r5, %r5, 0x55; bra over;"
        "t3: sub.u32 %r5, %r5, %r1; over: st.global.b32 [%q41], %r5;"
    )
    simple("brx", body, out(64), Buffer(value), block=64)

    function = """
.func (.param .b32 result) power(.param .b32 base, .param .b32 exponent)
{
.reg .b32 %x<4>;
.reg .pred %t;
ld.param.b32 %x0, [base];
ld.param.b32 %x1, [exponent];
mov.b32 %x2, 1;
again: setp.eq.u32 %t, %x1, 0;
@%t bra finished;
mul.lo.u32 %x2, %x2, %x0;
sub.u32 %x1, %x1, 1;
bra again;
finished: st.param.b32 [result], %x2;
ret;
}
"""
    body = (
        PLACE
        + """add.u64 %q42, %q40, %q1; ld.global.b32 %r1, [%q42]; mov.b32 %r2, 0;
and.b32 %r3, %r0, 1; setp.eq.u32 %p1, %r3, 0;
@%p1 bra even;
{ .param .b32 given; .param .b32 times; .param .b32 back;
st.param.b32 [given], 3; st.param.b32 [times], %r1; call (back), power, (given, times); ld.param.b32 %r2, [back]; }
even: bar.warp.sync -1;
st.global.b32 [%q41], %r2;"""
    )
    simple("call", body, out(64), Buffer(value), block=64, module=function)


def barriers() -> None:
    lines = Lines(128)
    lines.add(
        "mov.u32 %r1, pool; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2; mul.lo.u32 %r4, %r0, 2654435761; "
        "st.shared.b32 [%r3], %r4;"
    )
    lines.add("bar.sync 0; xor.b32 %r5, %r2, 508; add.u32 %r5, %r5, %r1; ld.shared.b32 %r6, [%r5];", "%r6")
    lines.add("setp.lt.s32 %p1, %r4, 0; bar.red.popc.u32 %r7, 1, %p1;", "%r7")
    lines.add("bar.red.and.pred %p2, 2, %p1; bar.red.or.pred %p3, 3, !%p1;", "%p2", "%p3")
    lines.add("barrier.sync 4; barrier.cta.sync.aligned 5, 128; bar.red.popc.u32 %r7, 6, 128, !%p1;", "%r7")
    # producers arrive, consumers wait
    lines.add(
        "setp.lt.u32 %p4, %r0, 64; @%p4 bra produce; bar.sync 7, 128; sub.u32 %r8, %r3, 256; "
        "ld.shared.b32 %r9, [%r8]; bra joined;"
        "produce: not.b32 %r9, %r4; st.shared.b32 [%r3], %r9; membar.cta; bar.arrive 7, 128; "
        "joined: fence.acq_rel.cta;",
        "%r9",
    )
    simple("barriers", lines.text, out(lines.rows, 128), block=128, static=".shared .align 16 .b8 pool[512];")
    wait = "{tag}: mbarrier.try_wait.parity.shared::cta.b64 %p1, [{bar}], {parity}; @!%p1 bra {tag};"
    lines = Lines(64)
    lines.add(
        "mov.u32 %r1, bars; setp.eq.u32 %p2, %r0, 0; @%p2 mbarrier.init.shared::cta.b64 [%r1], 64; "
        "@%p2 mbarrier.init.shared.b64 [%r1+8], 2;"
        "@%p2 mbarrier.init.shared::cta.b64 [%r1+16], 1; @%p2 mbarrier.init.shared::cta.b64 [%r1+24], 65; bar.sync 0;"
        "mov.u32 %r2, pool; shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, %r2; st.shared.b32 [%r3], %r0; "
        "mbarrier.arrive.shared::cta.b64 %q50, [%r1];"
        + wait.format(tag="a", bar="%r1", parity=0)
        + "xor.b32 %r4, %r3, 252; ld.shared.b32 %r5, [%r4];",
        "%r5",
    )
    lines.add(
        (
            "mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r1], 1; "
            "mbarrier.test_wait.parity.shared::cta.b64 %p4, [%r1], 0; bar.sync 1;"
        ),
        "%p3",
        "%p4",
    )
    lines.add("mbarrier.test_wait.shared::cta.b64 %p3, [%r1], %q50;", "%p3")
    lines.add(
        (
            "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1+16], 100; "
            "@%p2 mbarrier.complete_tx.relaxed.cluster.shared::cta.b64 [%r1+16], 60; bar.sync 2;"
            "mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r1+16], 0; bar.sync 3;"
        ),
        "%p3",
    )
    lines.add(
        (
            "@%p2 mbarrier.complete_tx.relaxed.cluster.shared::cta.b64 [%r1+16], 40; bar.sync 4; "
            "mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r1+16], 0; bar.sync 5;"
        ),
        "%p3",
    )
    lines.add(
        (
            "@%p2 mbarrier.expect_tx.relaxed.cluster.shared::cta.b64 [%r1+8], 16; "
            "@%p2 mbarrier.complete_tx.relaxed.cluster.shared::cta.b64 [%r1+8], 16; bar.sync 1;"
            "@%p2 mbarrier.arrive.shared::cta.b64 %q51, [%r1+8], 2; bar.sync 6; "
            "mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r1+8], 0; "
            "mbarrier.test_wait.parity.shared::cta.b64 %p4, [%r1+8], 1;"
        ),
        "%p3",
        "%p4",
    )
    # half of the threads drop out; then the other half with the one more make a phase
    lines.add(
        "setp.lt.u32 %p5, %r0, 32; @%p5 mbarrier.arrive_drop.shared::cta.b64 %q52, [%r1+24]; "
        "@!%p5 mbarrier.arrive.shared::cta.b64 %q52, [%r1+24];"
        "@%p2 mbarrier.arrive.shared::cta.b64 %q52, [%r1+24]; bar.sync 7; "
        "mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r1+24], 0; bar.sync 8;"
        "@!%p5 mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %q53, [%r1+24], 1; bar.sync 9; "
        "mbarrier.test_wait.parity.shared::cta.b64 %p4, [%r1+24], 1; bar.sync 10;"
        "@%p2 mbarrier.arrive.shared::cta.b64 %q52, [%r1+24]; bar.sync 11; "
        "mbarrier.test_wait.parity.shared::cta.b64 %p6, [%r1+24], 1; bar.sync 12; "
        "@%p2 mbarrier.inval.shared::cta.b64 [%r1+24];",
        "%p3",
        "%p4",
        "%p6",
    )
    lines.add(
        "@%p2 mbarrier.init.shared::cta.b64 [%r1+24], 9; bar.sync 13; mov.b32 %r9, 0; @!%p2 bra counted; "
        "mbarrier.arrive.noComplete.release.cta.shared::cta.b64 %q53, [%r1+24], 4;"
        "mbarrier.pending_count.b64 %r9, %q53; mbarrier.arrive.shared::cta.b64 %q53, [%r1+24]; "
        "mbarrier.pending_count.b64 %r10, %q53; mad.lo.u32 %r9, %r9, 100, %r10; counted:",
        "%r9",
    )
    simple(
        "mbarriers",
        lines.text,
        out(lines.rows, 64),
        block=64,
        static=".shared .align 8 .b64 bars[4];\n.shared .align 256 .b8 pool[256];",
    )


def clusters() -> None:
    for n in (2, 4):
        body = (
            "mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, pool; shl.b32 %r3, %r0, 2; add.u32 %r4, %r2, %r3; "
            "mad.lo.u32 %r5, %r1, 1000, %r0;"
            f"mad.lo.u32 %r6, %r1, {8 * 128}, %r3; cvt.u64.u32 %q40, %r6; add.u64 %q41, %q40, %q0; "
            f"st.shared.b32 [%r4], %r5; mov.b32 %r20, 0; st.shared.b32 [%r4+128], %r20;"
            "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
            f"add.u32 %r7, %r1, 1; rem.u32 %r7, %r7, {n}; mapa.shared::cluster.u32 %r8, %r4, %r7; "
            f"ld.shared::cluster.b32 %r9, [%r8]; st.global.b32 [%q41], %r9;"
            "cvt.u64.u32 %q42, %r4; cvta.shared.u64 %q43, %q42; mapa.u64 %q44, %q43, %r7; "
            "ld.b32 %r10, [%q44]; st.global.b32 [%q41+128], %r10;"
            "getctarank.shared::cluster.u32 %r11, %r8; st.global.b32 [%q41+256], %r11; "
            "getctarank.u64 %r12, %q44; st.global.b32 [%q41+384], %r12;"
            "mov.b32 %r13, 0; mapa.shared::cluster.u32 %r14, %r4, %r13; add.u32 %r15, %r5, 1; "
            "atom.shared::cluster.add.u32 %r16, [%r14+128], 1;"
            "st.shared::cluster.b32 [%r8+256], %r15; barrier.cluster.arrive; barrier.cluster.wait;"
            "ld.shared.b32 %r17, [%r4+128]; st.global.b32 [%q41+512], %r17; ld.shared.b32 %r18, [%r4+256]; "
            "st.global.b32 [%q41+640], %r18;"
            "mov.u32 %r19, %cluster_nctarank; st.global.b32 [%q41+768], %r19; "
            "mov.u32 %r21, %cluster_ctaid.x; mad.lo.u32 %r21, %r21, 16, 0; mov.u32 %r22, %clusterid.x; "
            "add.u32 %r21, %r21, %r22; mov.u32 %r23, %nclusterid.x; mad.lo.u32 %r21, %r23, 256, %r21;"
            "st.global.b32 [%q41+896], %r21; barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"
        )
        simple(f"cluster{n}", body, out(n, 8, 32), static=".shared .align 16 .b8 pool[1024];", cluster=n, grid=n)
    # a remote mbarrier and a bulk copy from one CTA to the other
    body = (
        "mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, pool; mov.u32 %r3, bars; shl.b32 %r4, %r0, 4; "
        "add.u32 %r5, %r2, %r4; setp.eq.u32 %p2, %r0, 0;"
        "mad.lo.u32 %r6, %r1, 4096, %r4; cvt.u64.u32 %q40, %r6; add.u64 %q41, %q40, %q0; "
        "add.u32 %r7, %r0, 7; mul.lo.u32 %r7, %r7, %r7; st.shared.v4.b32 [%r5], {%r7, %r1, %r0, %r7};"
        "@%p2 mbarrier.init.shared::cta.b64 [%r3], 1; @%p2 mbarrier.init.shared::cta.b64 [%r3+8], 32; "
        "@%p2 fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;"
        "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512; barrier.cluster.arrive.aligned; "
        "barrier.cluster.wait.aligned;"
        "xor.b32 %r8, %r1, 1; add.u32 %r9, %r2, 512; mapa.shared::cluster.u32 %r10, %r9, %r8; "
        "mapa.shared::cluster.u32 %r11, %r3, %r8;"
        "@%p2 cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r10], [%r2], 512, [%r11];"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r11+8];"
        "a: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r3], 0; @!%p1 bra a; "
        "b: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r3+8], 0; @!%p1 bra b;"
        "ld.shared.v4.b32 {%r12, %r13, %r14, %r15}, [%r5+512]; "
        "st.global.v4.b32 [%q41], {%r12, %r13, %r14, %r15}; barrier.cluster.arrive.aligned; "
        "barrier.cluster.wait.aligned;"
    )
    simple(
        "cluster.copy",
        body,
        out(2, 1024),
        static=".shared .align 128 .b8 pool[1024];\n.shared .align 8 .b64 bars[2];",
        cluster=2,
        grid=2,
    )
    # st.async and red.async to the other CTA
    body = (
        "mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, pool; mov.u32 %r3, bars; shl.b32 %r4, %r0, 2; "
        "add.u32 %r5, %r2, %r4; setp.eq.u32 %p2, %r0, 0; mov.b32 %r6, 100; st.shared.b32 [%r5+128], %r6;"
        "@%p2 mbarrier.init.shared::cta.b64 [%r3], 1; @%p2 fence.mbarrier_init.release.cluster; "
        "@%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 256; barrier.cluster.arrive.aligned; "
        "barrier.cluster.wait.aligned;"
        "xor.b32 %r8, %r1, 1; mapa.shared::cluster.u32 %r10, %r5, %r8; "
        "mapa.shared::cluster.u32 %r11, %r3, %r8; mad.lo.u32 %r12, %r1, 77, %r0;"
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r10], %r12, [%r11]; "
        "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%r10+128], %r12, [%r11];"
        "a: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r3], 0; @!%p1 bra a; "
        "mad.lo.u32 %r13, %r1, 256, %r4; cvt.u64.u32 %q40, %r13; add.u64 %q41, %q40, %q0;"
        "ld.shared.b32 %r14, [%r5]; ld.shared.b32 %r15, [%r5+128]; st.global.b32 [%q41], %r14; "
        "st.global.b32 [%q41+128], %r15; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
    )
    simple(
        "cluster.async",
        body,
        out(2, 64),
        static=".shared .align 16 .b8 pool[256];\n.shared .align 8 .b64 bars[1];",
        cluster=2,
        grid=2,
    )


def registers() -> None:
    names = (
        "%tid.x",
        "%tid.y",
        "%ntid.x",
        "%ntid.y",
        "%ntid.z",
        "%ctaid.x",
        "%ctaid.y",
        "%nctaid.x",
        "%nctaid.z",
        "%laneid",
        "%lanemask_eq",
        "%lanemask_lt",
        "%lanemask_le",
        "%lanemask_gt",
        "%lanemask_ge",
        "%cluster_ctarank",
        "%cluster_nctarank",
        "%clusterid.x",
        "%nclusterid.x",
        "%cluster_ctaid.x",
        "%cluster_nctaid.x",
        "%dynamic_smem_size",
    )
    lines = Lines(64)
    lines.add(
        f"mov.u32 %r2, %ctaid.x; mul.lo.u32 %r2, %r2, {64 * 4 * 26}; cvt.u64.u32 %q42, %r2; add.u64 %q41, %q41, %q42;"
    )
    for name in names:
        lines.add(f"mov.u32 %r1, {name};", "%r1")
    lines.add("mov.pred %p1, %is_explicit_cluster;", "%p1")
    lines.add("mov.u64 %q50, %clock64; mov.u64 %q51, %clock64; setp.gt.u64 %p1, %q51, %q50;", "%p1")
    lines.add("mov.u64 %q50, %globaltimer; setp.gt.u64 %p1, %q50, 0;", "%p1")
    lines.add("mov.u32 %r1, %warpid; shr.u32 %r3, %r0, 5; setp.eq.u32 %p1, %r1, %r3;", "%p1")
    assert lines.rows == 26
    simple(
        "special.registers",
        lines.text,
        out(3, lines.rows, 64),
        block=64,
        grid=3,
        shared=256,
        module=".extern .shared .b8 data[];",
        free=(slice(None), 25),  # %warpid is where the warp happens to be
    )
    body = (
        PLACE + "griddepcontrol.launch_dependents; griddepcontrol.wait; nanosleep.u32 20; setp.lt.u32 %p1, %r0, 128; "
        "@!%p1 bra more; setmaxnreg.dec.sync.aligned.u32 40; bra both;"
        "more: setmaxnreg.inc.sync.aligned.u32 120; both: bar.sync 0; st.global.b32 [%q41], %r0; pmevent 1;"
    )
    simple("setmaxnreg", body, out(256), block=256, fixed=True)
    body = (
        PLACE + "st.global.b32 [%q41], %r0; fence.sc.gpu; fence.acq_rel.sys; membar.gl; membar.sys; membar.cta; "
        "fence.proxy.async; fence.proxy.alias; fence.proxy.async.global;"
        "setp.gt.u32 %p1, %r0, 99; @%p1 trap; @%p1 brkpt; discard.global.L2 [%q1], 128;"
    )
    simple("fences", body, out(32), Buffer(np.zeros(32, np.uint32)))


for family in (shuffles, votes, control, barriers, clusters, registers):
    family()
