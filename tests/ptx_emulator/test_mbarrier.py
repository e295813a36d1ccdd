"""mbarriers: states, drops, transactions, other CTAs' (PTX ISA, "mbarrier"), and redux of FP32 ("redux.sync")."""

import numpy as np
import pytest

from ptx_emulator import DeadlockError, Fault, UnknownInstructionError

from .ptx import lanewise, run

SHARED = ".shared .align 8 .b8 bar[16];"
START = """mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0; mov.u32 %r1, bar;
@%p1 mbarrier.init.shared::cta.b64 [bar], N; bar.sync 0;
"""
RESULT = "mul.wide.u32 %rd9, %r0, 4; add.s64 %rd9, %rd9, %rd63; st.global.u32 [%rd9], %r9;"


def lanes(body: str, count: int, **kw) -> np.ndarray:
    """%r9 of every lane; the mbarrier expects `count` arrivals."""
    out = np.zeros(32, np.uint32)
    run(START.replace("N", str(count)) + body + RESULT, out, shared=SHARED, **kw)
    return out


def test_states_and_hints():
    """The state of an arrival waits for its own phase, and is over in the next."""
    got = lanes(
        """mbarrier.arrive.shared::cta.b64 %rd1, [bar];
        W: mbarrier.try_wait.acquire.cta.shared::cta.b64 %p2, [bar], %rd1, 1000; @!%p2 bra W;
        mbarrier.arrive.release.cta.shared::cta.b64 %rd2, [%r1];
        V: mbarrier.test_wait.shared::cta.b64 %p3, [bar], %rd2; @!%p3 bra V;
        mbarrier.test_wait.parity.relaxed.cta.shared::cta.b64 %p4, [bar], 1; selp.u32 %r9, 1, 0, %p4;""",
        32,
    )
    np.testing.assert_array_equal(got, 1)


def test_a_phase_that_is_not_over():
    got = lanes(
        """mov.b64 %rd1, 0; @%p1 mbarrier.arrive.noComplete.shared::cta.b64 %rd1, [bar], 3;
        mbarrier.test_wait.shared::cta.b64 %p2, [bar], %rd1; selp.u32 %r9, 1, 0, %p2;
        @%p1 mbarrier.pending_count.b64 %r8, %rd1; @%p1 add.u32 %r9, %r9, %r8;""",
        7,
    )
    np.testing.assert_array_equal(got, [7] + [0] * 31)


def test_expected_arrivals_that_drop_out():
    """32 expect the first phase, 8 the second."""
    got = lanes(
        """setp.lt.u32 %p2, %r0, 8; @%p2 mbarrier.arrive.shared::cta.b64 %rd1, [bar];
        @!%p2 mbarrier.arrive_drop.shared::cta.b64 %rd1, [bar];
        W: mbarrier.try_wait.shared::cta.b64 %p3, [bar], %rd1; @!%p3 bra W;
        @%p1 mbarrier.arrive.shared::cta.b64 %rd2, [bar], 8;
        V: mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], 1; @!%p3 bra V; mov.b32 %r9, 5;""",
        32,
    )
    np.testing.assert_array_equal(got, 5)


def test_transactions_without_a_copy():
    body = """@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [bar], 100;
        @%p1 mbarrier.arrive_drop.expect_tx.shared::cta.b64 _, [bar], 28;
        @%p1 mbarrier.complete_tx.shared::cta.b64 [bar], TX; mov.b32 %r9, 3;
        W: mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], 0; @!%p3 bra W;"""
    body = body.replace("bar], 28;", "bar], 28; @%p1 mbarrier.arrive.shared::cta.b64 _, [bar];")
    np.testing.assert_array_equal(lanes(body.replace("TX", "128"), 2), 3)
    with pytest.raises(DeadlockError, match="1 bytes pending"):
        lanes(body.replace("TX", "127"), 2)


def test_a_wait_has_a_limit_of_time():
    """PTX ISA, "mbarrier.try_wait": it may return before the phase is over."""
    look = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], 0; selp.u32 %r9, 1, 7, %p3;"
    np.testing.assert_array_equal(lanes(look, 33), 7)
    # lane 0 looks a few times before it arrives, while the others wait
    body = f"""mov.b32 %r8, 0; mov.b32 %r9, 0; @!%p1 bra W;
        AGAIN: {look} add.u32 %r8, %r8, 1; setp.lt.u32 %p2, %r8, 5; @%p2 bra AGAIN;
        mbarrier.arrive.shared::cta.b64 _, [bar], 33; add.u32 %r9, %r9, %r8;
        W: mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], 0; @!%p3 bra W;"""
    np.testing.assert_array_equal(lanes(body, 33), [12] + [0] * 31)


REMOTE = """mov.u32 %r2, %cluster_ctarank; mov.u32 %r3, 0; mapa.shared::cluster.u32 %r4, %r1, %r3; mov.b32 %r9, 1;
fence.mbarrier_init.release.cluster; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
@%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 STATE, [%r4], 2;
setp.eq.u32 %p5, %r2, 0; @!%p5 bra END;
W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bar], 0; @!%p3 bra W;
END: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; @!%p5 ret;"""


def test_arrivals_at_another_cta():
    np.testing.assert_array_equal(lanes(REMOTE.replace("STATE", "_"), 4, cluster=2, grid=2), 1)
    with pytest.raises(Fault, match="gives no state"):
        lanes(REMOTE.replace("STATE", "%rd1"), 4, cluster=2, grid=2)


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        ("@%p1 mbarrier.arrive.noComplete.shared::cta.b64 %rd1, [bar], 2;", Fault, "noComplete would complete"),
        ("@%p1 mbarrier.arrive_drop.shared::cta.b64 _, [bar], 2;", Fault, "leaves no expected arrivals"),
        ("@%p1 mbarrier.arrive.shared::cta.b64 _, [bar], 3;", Fault, "3 arrivals, but only 2"),
        ("@%p1 mbarrier.expect_tx.shared::cta.b64 [bar], 1048576;", Fault, "out of range"),
        ("@%p1 mbarrier.init.shared::cta.b64 [bar], 1;", Fault, "where a valid mbarrier is"),
        ("@%p1 mbarrier.arrive.shared::cta.b64 _, [bar+8];", Fault, "no initialised mbarrier"),
        (
            "@%p1 mbarrier.arrive.release.cta.shared::cluster.multicast::cluster::32b.b64 _, [bar], 1;",
            UnknownInstructionError,
            "multicast",
        ),
        ("@%p1 mbarrier.init.layout::v1.shared::cta.b64 [bar+8], 1;", UnknownInstructionError, "layout::v1"),
        ("mbarrier.try_wait.parity.shared::cta.b64 %p2|%p3, [bar], 1;", UnknownInstructionError, "form"),
    ],
)  # fmt: skip
def test_refusals(body, error, message):
    with pytest.raises(error, match=message):
        lanes(body, 2)


NAN = np.uint32(0x7FFFFFFF).view(np.float32)


@pytest.mark.parametrize("op", ["min", "max", "min.abs", "max.abs.NaN", "min.NaN"])
def test_redux_of_floats(op):
    rng = np.random.default_rng(8)
    for special in ([], [np.nan], [0.0, -0.0], [np.inf, -np.inf, np.nan]):
        x = rng.standard_normal(32).astype(np.float32)
        x[: len(special)] = special
        if special == [0.0, -0.0]:
            x[2:] = x[0]
        values = np.abs(x) if "abs" in op else x
        want = NAN if "NaN" in op and np.isnan(x).any() else (np.nanmin if "min" in op else np.nanmax)(values)
        if special == [0.0, -0.0] and op.startswith("min") and "abs" not in op:
            want = np.float32(-0.0)
        got = lanewise(f"redux.sync.{op}.f32 $d, $a, -1;", np.float32, x)
        np.testing.assert_array_equal(got.view(np.uint32), np.float32(want).view(np.uint32))
    got = lanewise(f"redux.sync.{op}.f32 $d, $a, -1;", np.float32, np.full(32, np.nan, np.float32))
    np.testing.assert_array_equal(got.view(np.uint32), 0x7FFFFFFF)
