"""Tensor memory's allocation, and tcgen05.commit (PTX ISA, "tcgen05.alloc, tcgen05.dealloc,
tcgen05.relinquish_alloc_permit", "tcgen05.commit", "Issue Granularity").
"""

import numpy as np
import pytest

from ptx_emulator import DeadlockError, Fault

from .ptx import run

SHARED = ".shared .align 4 .b8 slot[64]; .shared .align 8 .b8 bar[16];"
ROLES = """mov.u32 %r0, %tid.x; shr.u32 %r1, %r0, 5; mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p1, %r1, 0;
setp.eq.u32 %p2, %r0, 0; setp.eq.u32 %p3, %r2, 0; setp.eq.u32 %p4, %r1, 1;"""


def alloc(columns: int, slot: int = 0, ctas: int = 1, guard: str = "@%p1 ") -> str:
    return f"{guard}tcgen05.alloc.cta_group::{ctas}.sync.aligned.shared::cta.b32 [slot+{slot}], {columns};\n"


def dealloc(register: str, columns: int, ctas: int = 1, guard: str = "@%p1 ") -> str:
    return f"{guard}tcgen05.dealloc.cta_group::{ctas}.sync.aligned.b32 {register}, {columns};\n"


def read(register: str, slot: int = 0) -> str:
    return f"ld.shared.b32 {register}, [slot+{slot}];\n"


def launch(text: str, ctas: int = 1, block: int = 64, **kw) -> np.ndarray:
    """[ctas, warps, 4]: %r20-23 of lane 0 of every warp."""
    out = np.zeros((ctas, block // 32, 4), np.uint32)
    store = """and.b32 %r5, %r0, 31; setp.eq.u32 %p9, %r5, 0; mad.lo.s32 %r6, %r2, WARPS, %r1;
    mul.wide.u32 %rd1, %r6, 16; add.s64 %rd1, %rd1, %rd63; @%p9 st.global.v4.b32 [%rd1], {%r20, %r21, %r22, %r23};"""
    body = ROLES + text + store.replace("WARPS", str(block // 32))
    run(body, out, block=block, grid=ctas, cluster=ctas, shared=SHARED, **kw)
    return out


def test_first_fit():
    """512 columns hold 256 + 128 + 128; what was given back is found again."""
    text = alloc(256) + alloc(128, 4) + alloc(128, 8) + "@%p1 " + read("%r20") + "@%p1 " + read("%r21", 4)
    text += "@%p1 " + read("%r22", 8) + dealloc("%r21", 128) + alloc(64, 12) + "@%p1 " + read("%r23", 12)
    text += dealloc("%r20", 256) + dealloc("%r22", 128) + dealloc("%r23", 64)
    assert launch(text)[0, 0].tolist() == [0, 256, 384, 256]


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_allocation_waits_for_free_columns(schedule):
    """Warp 1 asks for columns that warp 0 holds, and has them as soon as they are given back."""
    text = alloc(512) + "bar.sync 0;" + alloc(256, 4, guard="@%p4 ") + "@%p1 nanosleep.u32 20;" + read("%r20")
    text += dealloc("%r20", 512) + "@%p4 " + read("%r21", 4) + dealloc("%r21", 256, guard="@%p4 ")
    assert launch(text, schedule=schedule)[0, 1, 1] == 0


@pytest.mark.parametrize("late", [0, 1])
def test_a_pair_allocates_together(late):
    """The first CTA to come waits for its peer; both get the same columns, free in both of them."""
    slow = f"setp.eq.u32 %p5, %r2, {late};" + "@%p5 nanosleep.u32 20;" * 3
    text = slow + alloc(128, 0, 2) + alloc(64, 4, 2) + "@%p1 " + read("%r20") + "@%p1 " + read("%r21", 4)
    text += slow + dealloc("%r20", 128, 2) + alloc(64, 8, 2) + "@%p1 " + read("%r22", 8)
    text += dealloc("%r21", 64, 2) + dealloc("%r22", 64, 2)
    text += "@%p1 tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;"
    for seed in (None, 1):
        assert launch(text, 2, seed=seed)[:, 0, :3].tolist() == [[0, 128, 0]] * 2


RELINQUISH = "@%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"
FREE = read("%r20") + dealloc("%r20", 64)


@pytest.mark.parametrize(
    ("text", "ctas", "message"),
    [
        (alloc(0), 1, "0 columns: a power of two from 32 to 512"),
        (alloc(16), 1, "16 columns: a power of two"),
        (alloc(96), 1, "96 columns: a power of two"),
        (alloc(1024), 1, "1024 columns: a power of two"),
        (alloc(64) + alloc(128), 1, "128 columns after one of 64: it may not grow"),
        (alloc(64), 1, "without giving back tensor memory: {0: 64}"),
        (alloc(64) + read("%r20") + dealloc("%r20", 32), 1, "32 columns from 0x0; allocated are {0: 64}"),
        (alloc(64) + dealloc("32", 32), 1, "32 columns from 0x20; allocated are {0: 64}"),
        (alloc(64) + FREE + dealloc("%r20", 64), 1, "64 columns from 0x0; allocated are {}"),
        (RELINQUISH + alloc(32), 1, "after relinquish_alloc_permit"),
        (alloc(64) + read("%r20") + dealloc("%r20", 64, 2), 2, r"cta_group::2 in a kernel .* cta_group::1"),
        (alloc(64, 0, 2), 1, "cta_group::2: CTA rank 0 has no peer"),
        ("selp.b32 %r7, 64, 32, %p3;" + alloc(64, 0, 2).replace(", 64", ", %r7"), 2, "but tcgen05.alloc of"),
    ],
)  # fmt: skip
def test_refusals(text, ctas, message):
    with pytest.raises(Fault, match=message):
        launch(text, ctas)


@pytest.mark.parametrize(
    ("text", "ctas", "message"),
    [
        (alloc(512) + alloc(32, 4), 1, "waits for 32 free columns"),
        ("@%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [slot], 32;", 1, "by a divergent warp"),
        ("and.pred %p5, %p1, %p3;" + alloc(64, 0, 2, "@%p5 "), 2, "waits for tcgen05.alloc of CTA rank 1"),
        (alloc(64, 0, 2) + "and.pred %p5, %p1, %p3; @%p1 " + read("%r20") + dealloc("%r20", 64, 2, "@%p5 "), 2,
         "waits for tcgen05.dealloc of CTA rank 1"),
        # table "Example of non-deterministic hang due to incorrect synchronization"
        (alloc(64, 0, 2) + "@%p1 " + read("%r20") + "@!%p3 bra ODD; barrier.cluster.arrive; barrier.cluster.wait;"
         + dealloc("%r20", 64, 2) + "bra END; ODD:" + dealloc("%r20", 64, 2)
         + "barrier.cluster.arrive; barrier.cluster.wait; END:", 2, "waits for tcgen05.dealloc of CTA rank 0"),
    ],
)  # fmt: skip
def test_hangs(text, ctas, message):
    with pytest.raises(DeadlockError, match=message):
        launch(text, ctas)


# --- commit ---

INIT = "mov.b32 %r9, 1; @%p2 mbarrier.init.shared.b64 [bar], %r9; @%p2 fence.mbarrier_init.release.cluster;"
INIT += "barrier.cluster.arrive; barrier.cluster.wait; mov.b32 %r20, 0;"
WAIT = "W: mbarrier.try_wait.parity.shared.b64 %p6, [bar], 0; @!%p6 bra W; mov.b32 %r20, 7;"
END = "barrier.cluster.arrive; barrier.cluster.wait;"
ONE = "mbarrier::arrive::one"


@pytest.mark.parametrize(
    ("commit", "ctas", "receivers"),
    [
        (f"tcgen05.commit.cta_group::1.{ONE}.shared::cluster.b64 [%r8];", 2, [1]),
        (f"tcgen05.commit.cta_group::1.{ONE}.b64 [%rd8];", 1, [0]),
        (f"tcgen05.commit.cta_group::2.{ONE}.shared::cluster.b64 [%r8];", 2, [1]),
        (f"tcgen05.commit.cta_group::1.{ONE}.shared::cluster.multicast::cluster.b64 [bar], 10;", 4, [1, 3]),
        (f"tcgen05.commit.cta_group::2.{ONE}.shared::cluster.multicast::cluster.b64 [bar], 3;", 2, [0, 1]),
    ],
)
def test_commit_arrives(commit, ctas, receivers):
    """One arrival at the mbarrier: of the address's CTA, by a generic address, or of every CTA in the mask."""
    text = INIT + "mov.b32 %r7, bar; mapa.shared::cluster.u32 %r8, %r7, LAST; cvta.shared.u64 %rd8, bar;"
    text += f"and.pred %p5, %p2, %p3; @%p5 {commit} mov.b32 %r7, MASK; shr.u32 %r7, %r7, %r2; and.b32 %r7, %r7, 1;"
    text += "setp.eq.u32 %p7, %r7, 0; @%p7 bra OVER;" + WAIT + "OVER: " + END
    text = text.replace("LAST", str(ctas - 1)).replace("MASK", str(sum(1 << r for r in receivers)))
    got = launch(text.replace("cvta.shared.u64 %rd8, bar;", "mov.b64 %rd8, bar; cvta.shared.u64 %rd8, %rd8;"), ctas)
    assert got[:, 0, 0].tolist() == [7 * (r in receivers) for r in range(ctas)]


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        (f"tcgen05.commit.cta_group::1.{ONE}.shared::cluster.b64 [bar];", "holds no initialised mbarrier"),
        (f"tcgen05.commit.cta_group::2.{ONE}.shared::cluster.b64 [bar];", "CTA rank 0 has no peer"),
        (f"tcgen05.commit.cta_group::1.{ONE}.shared::cluster.multicast::cluster.b64 [bar], 2;", "cluster of 1"),
    ],
)
def test_refused_commits(commit, message):
    with pytest.raises(Fault, match=message):
        launch(f"@%p2 {commit}")
