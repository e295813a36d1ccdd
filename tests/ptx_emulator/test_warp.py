"""Divergence, shuffles, votes, barriers of all kinds, and what is said when a kernel hangs."""

import numpy as np
import pytest

from ptx_emulator import DeadlockError, Fault, UnknownInstructionError

from .ptx import lanewise, run

LANE = np.arange(32, dtype=np.uint32)
STORE = "mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd63, %rd1; st.global.b32 [%rd1], %r1;"


def out(words: int = 32) -> np.ndarray:
    return np.full(words, 0xDEAD, np.uint32)


def test_divergent_loops_reconverge():
    # lane n counts n times; the vote afterwards needs all lanes
    body = f"""
    mov.u32 %r0, %tid.x; mov.b32 %r1, 0;
    LOOP: setp.ge.u32 %p1, %r1, %r0; @%p1 bra DONE; add.s32 %r1, %r1, 1; bra LOOP;
    DONE: vote.sync.ballot.b32 %r2, %p1, -1; popc.b32 %r2, %r2; shl.b32 %r2, %r2, 8; add.s32 %r1, %r1, %r2; {STORE}
    """
    got = out()
    run(body, got)
    np.testing.assert_array_equal(got, LANE + (32 << 8))


def test_guards_and_partial_exits():
    body = f"mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 5; @!%p1 exit; mov.b32 %r1, 7; {STORE}"
    got = out()
    run(body, got)
    assert got.tolist() == [7] * 5 + [0xDEAD] * 27


def test_a_partial_warp_has_no_other_lanes():
    got = out(40)
    run(f"mov.u32 %r0, %tid.x; activemask.b32 %r1; {STORE}", got, block=40)
    assert got.tolist() == [0xFFFFFFFF] * 32 + [0xFF] * 8


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("idx", 5, 31, np.full(32, 5)),
        ("up", 3, 0, np.maximum(LANE.astype(int) - 3, 0) + np.where(LANE < 3, LANE, 0)),
        ("down", 2, 31, np.where(LANE < 30, LANE + 2, LANE)),
        ("bfly", 8, 31, LANE ^ 8),
        ("idx", 1, 0x181F, LANE & 0x18 | 1),
        ("down", 4, 0x181F, np.where(LANE % 8 < 4, LANE + 4, LANE)),
    ],
)
def test_shuffles(mode, b, c, source):
    a = (LANE * 1000 + 1).astype(np.uint32)
    got = lanewise(f"shfl.sync.{mode}.b32 $d, $a, {b}, {c}, -1;", np.uint32, a)
    np.testing.assert_array_equal(got, a[source])


def test_shuffle_from_a_lane_that_is_not_there():
    body = (
        "mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 4; @%p1 bra A; bra B; A: shfl.sync.idx.b32 %r1, %r0, 9, 31, 15; B:"
    )
    with pytest.raises(Fault, match="shfl reads lane 9"):
        run(body, out())


def test_votes_match_redux_elect():
    a = np.array([3, 3, 7, 9] * 8, np.uint32)
    assert set(lanewise("redux.sync.add.u32 $d, $a, -1;", np.uint32, a)) == {int(a.sum())}
    assert set(lanewise("redux.sync.max.u32 $d, $a, -1;", np.uint32, a)) == {9}
    match = lanewise("match.any.sync.b32 $d, $a, -1;", np.uint32, a)
    assert match.tolist() == [0x33333333, 0x33333333, 0x44444444, 0x88888888] * 8
    text = "setp.eq.u32 %p1, $a, 7; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;"
    text += "selp.b32 %r20, 1, 0, %p2; selp.b32 %r21, 2, 0, %p3; or.b32 $d, %r20, %r21;"
    assert set(lanewise(text, np.uint32, a)) == {1}
    elected = lanewise("elect.sync %r20|%p1, -1; selp.b32 $d, 1, %r20, %p1;", np.uint32, a)
    assert elected.tolist() == [1] + [0] * 31


def test_named_barrier_orders_two_warps():
    # warp 1 reads what warp 0 wrote before the barrier
    body = f"""
    mov.u32 %r0, %tid.x; shl.b32 %r2, %r0, 2; mov.b32 %r3, buf; add.s32 %r2, %r2, %r3;
    setp.lt.u32 %p1, %r0, 32; add.s32 %r4, %r0, 100;
    @%p1 st.shared.b32 [%r2], %r4;
    bar.sync 3, 64;
    mov.b32 %r1, 0;
    @!%p1 ld.shared.b32 %r1, [%r2+-128]; {STORE}
    """
    for seed in range(4):
        got = out(64)
        run(body, got, block=64, shared=".shared .align 16 .b8 buf[256];", seed=seed)
        np.testing.assert_array_equal(got, np.concatenate([LANE * 0, LANE + 100]))


def test_cluster_barrier_and_distributed_shared_memory():
    # each CTA writes its rank + 10 into its neighbour's shared memory
    body = f"""
    mov.u32 %r9, %cluster_ctarank; xor.b32 %r3, %r9, 1; mov.b32 %r2, buf; mapa.shared::cluster.u32 %r4, %r2, %r3;
    add.s32 %r5, %r9, 10; st.shared::cluster.b32 [%r4], %r5;
    barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;
    ld.shared.b32 %r1, [%r2];
    mov.u32 %r0, %ctaid.x; {STORE}
    """
    got = out(4)
    run(body, got, grid=4, cluster=2, shared=".shared .align 16 .b8 buf[16];")
    assert got.tolist() == [11, 10, 11, 10]


INIT = "mov.b32 %r2, bar; elect.sync _|%p1, -1; @%p1 mbarrier.init.shared.b64 [%r2], 1;"
MBARRIER = ".shared .align 8 .b8 bar[16];"


def test_mbarrier_phases_and_transactions():
    # warp 0 waits for two phases, of which warp 1 ends the first by 32 arrivals and the second by bytes
    body = f"""
    mov.u32 %r0, %tid.x; mov.b32 %r2, bar; setp.ne.u32 %p1, %r0, 0;
    @!%p1 mbarrier.init.shared.b64 [%r2], 32;
    bar.sync 0;
    setp.ge.u32 %p2, %r0, 32; @%p2 bra PRODUCER;
    W0: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra W0;
    bar.sync 1;
    mbarrier.test_wait.parity.shared.b64 %p4, [%r2], 1;
    W1: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 1; @!%p3 bra W1;
    selp.b32 %r1, 1, 2, %p4; bra END;
    PRODUCER: mbarrier.arrive.shared.b64 %rd2, [%r2]; bar.sync 1;
    setp.eq.u32 %p5, %r0, 40;
    @%p5 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 64;
    mbarrier.arrive.shared.b64 _, [%r2];
    @%p5 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r2], 64;
    mov.b32 %r1, 3;
    END: {STORE}
    """
    for seed in (None, 0, 1, 2):
        got = out(64)
        run(body, got, block=64, shared=MBARRIER, seed=seed)
        assert set(got[:32]) <= {1, 2}
        assert set(got[32:]) == {3}


def test_lanes_that_wait_for_different_barriers_do_not_wait_for_each_other():
    """Lanes 0 and 1 wait for a barrier that is over, the others for one that those two complete."""
    body = """
    mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p2, %r0, 2;
    @%p1 mbarrier.init.shared.b64 [over], 1; @%p1 mbarrier.init.shared.b64 [open], 2;
    @%p1 mbarrier.arrive.shared.b64 _, [over]; bar.sync 0;
    mov.b32 %r1, over; mov.b32 %r2, open; selp.b32 %r3, %r1, %r2, %p2;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p3, [%r3], 0; @!%p3 bra WAIT;
    @%p2 mbarrier.arrive.shared.b64 _, [open];
    mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd63; st.global.b32 [%rd1], %r0;
    """
    out = np.zeros(32, np.uint32)
    run(body, out, shared=".shared .align 8 .b8 over[8]; .shared .align 8 .b8 open[8];")
    assert np.array_equal(out, np.arange(32))


def test_deadlock_says_who_waits_where():
    body = """
    mov.u32 %r0, %tid.x; mov.b32 %r2, bar; setp.ne.u32 %p1, %r0, 0;
    @!%p1 mbarrier.init.shared.b64 [%r2], 2;
    bar.sync 0;
    setp.ge.u32 %p2, %r0, 32; @%p2 bra OTHER;
    W0: mbarrier.try_wait.parity.shared.b64 %p3, [%r2], 0; @!%p3 bra W0;
    OTHER: bar.sync 5, 96;
    """
    with pytest.raises(DeadlockError) as e:
        run(body, out(), block=64, shared=MBARRIER)
    text = str(e.value)
    assert "waits for parity 0 of mbarrier 0x400 (now phase 0, 2 of 2 arrivals and 0 bytes pending)" in text
    assert "waits at barrier 5, 32 of 96 threads are there" in text
    assert "CTA (0, 0, 0) warp 0, PTX line" in text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 %r2, bar; mbarrier.arrive.shared.b64 _, [%r2];", "holds no initialised mbarrier"),
        ("mov.b32 %r2, bar; mbarrier.init.shared.b64 [%r2], 1; ", "where a valid mbarrier is"),
        (f"{INIT} mbarrier.arrive.shared.b64 _, [%r2], 2;", "2 arrivals, but only 1 of 1 are pending"),
        ("bar.sync 0, 40;", "not a multiple of 32"),
        ("bar.sync 16;", "barrier 16 is not one of 0..15"),
        ("trap;", "trap was executed"),
        ("barrier.cluster.wait;", "without an arrive"),
    ],
)
def test_barrier_misuse(body, message):
    with pytest.raises(Fault, match=message):
        run(body, out(), shared=MBARRIER)


def test_arrivals_that_nobody_waits_for():
    """ "bar.arrive" announces, and "exit" leaves no barrier behind: producers of a ring arrive once too often."""
    run("bar.arrive 1, 64;", out(), shared=MBARRIER)


def test_an_aligned_barrier_in_a_divergent_warp():
    body = "mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 4; @%p1 bra A; bar.sync 1, 32; bra B; A: bar.sync 2, 32; B:"
    with pytest.raises(DeadlockError, match="aligned barrier is executed by a divergent warp"):
        run(body, out())


def test_an_unknown_instruction_stops_at_its_line():
    with pytest.raises(UnknownInstructionError, match=r"does not know frobnicate\.b32\n.*PTX line 14: frobnicate"):
        run("frobnicate.b32 %r1, %r2;", out())
    run("bra END; frobnicate.b32 %r1, %r2; END:", out())  # never reached
