"""Cluster launch control, dependent grids, registers of a warp (PTX ISA, "clusterlaunchcontrol.try_cancel",
"griddepcontrol", "setmaxnreg"), cooperative launches (CUDA C++ Programming Guide, "Grid Synchronization")."""

import ctypes

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator import DeadlockError, Fault, UnknownInstructionError
from ptx_emulator.runtime import Runtime, _Attribute, _Config, resident_ctas

from .ptx import module, run

SHARED = ".shared .align 16 .b8 answer[16]; .shared .align 8 .b8 bar[8];"

# every cluster marks its tile and asks for others until there are none; CTA 0 asks, all of the cluster get the answer
STEAL = """
mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %cluster_ctarank; mov.u32 %r4, 0;
mov.u32 %r20, %clusterid.x; mov.u32 %r21, %clusterid.y; mad.lo.u32 %r20, %r21, 3, %r20;
setp.eq.u32 %p1, %r0, 0; setp.eq.u32 %p2, %r3, 0; and.pred %p2, %p1, %p2;
@%p1 mbarrier.init.shared::cta.b64 [bar], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
LOOP:
@%p1 mbarrier.arrive.expect_tx.relaxed.cluster.shared::cta.b64 _, [bar], 16;
@%p2 clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.multicast::cluster::all.b128
    [answer], [bar];
mad.lo.u32 %r5, %r2, 6, %r1; mul.wide.u32 %rd0, %r5, 4; add.s64 %rd0, %rd0, %rd63;
add.u32 %r6, %r20, 1; @%p1 st.global.u32 [%rd0], %r6;
WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bar], %r4; @!%p3 bra WAIT;
xor.b32 %r4, %r4, 1;
.reg .b128 %answer;
ld.shared.b128 %answer, [answer];
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p4, %answer;
@!%p4 bra END;
clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {%r1, %r2, _, _}, %answer;
clusterlaunchcontrol.query_cancel.get_first_ctaid::y.b32.b128 %r2, %answer;
add.u32 %r1, %r1, %r3;
fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster;
barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;
fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster;
bra LOOP;
END:
"""


def steal(**kw):
    tiles = np.zeros((4, 6), np.uint32)
    text = module(STEAL, shared=SHARED)
    done = ptx_emulator.load(text).launch("k", grid=(6, 4, 1), block=(64,), cluster=(2, 1, 1), args=[tiles], **kw)
    return tiles, done


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_one_cluster_takes_the_whole_grid(schedule):
    tiles, done = steal(schedule=schedule)
    np.testing.assert_array_equal(tiles, 1)
    assert done.events["clusters asked for"] == 12


def test_requests_that_fail_leave_clusters_to_run():
    owners = set()
    for seed in range(4):
        tiles, _ = steal(seed=seed)
        first = tiles[:, ::2]
        np.testing.assert_array_equal(first, tiles[:, 1::2])
        assert (tiles > 0).all()
        owners.add(len(np.unique(tiles)))
    assert max(owners) > 1


ASK = """
mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0; mov.u32 %r1, answer; mov.u32 %r4, 0; .reg .b128 %answer;
@!%p1 bra END;
mbarrier.init.shared::cta.b64 [bar], 1;
AGAIN:
mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 16;
clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 [%r1], [bar];
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], %r4; @!%p3 bra WAIT; xor.b32 %r4, %r4, 1;
ld.shared.b128 %answer, [%r1];
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p4, %answer;
NEXT;
END:
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ASK.replace("NEXT", "bra AGAIN"), "asks for another cluster after it has seen a request fail"),
        (ASK.replace("NEXT", "").replace("answer;", "answer+8;", 1), "not a multiple of 16"),
    ],
)
def test_misuse_of_launch_control(text, message):
    with pytest.raises(Fault, match=message):
        run(text, np.zeros(1, np.uint32), shared=SHARED.replace("[16]", "[32]"))


def test_a_request_that_failed_has_no_first_cta():
    place = np.zeros(1, np.uint32)
    query = "clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r2, %answer; st.global.u32 [%rd63], %r2"
    run(ASK.replace("NEXT", query), place, shared=SHARED)
    assert place[0] == 0xFFFFFFFF


def test_dependent_grids_are_counted():
    done = run("griddepcontrol.wait; griddepcontrol.launch_dependents;", np.zeros(1, np.uint32))
    assert done.events["griddepcontrol.wait"] == done.events["griddepcontrol.launch_dependents"] == 1
    with pytest.raises(UnknownInstructionError, match=r"griddepcontrol\.signal"):
        run("griddepcontrol.signal;", np.zeros(1, np.uint32))


# 12 warps start with 168 registers each: the consumers wait for what the producer gives back
REGISTERS = """
mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 256; @!%p1 bra PRODUCER;
setmaxnreg.inc.sync.aligned.u32 240; bra END;
PRODUCER: setmaxnreg.dec.sync.aligned.u32 24;
END: bar.sync 0;
"""


def test_registers_move_through_the_pool():
    run(REGISTERS, np.zeros(1, np.uint32), block=384)


@pytest.mark.parametrize(
    ("consumers", "more", "less", "error", "message"),
    [
        (256, 240, 40, DeadlockError, "waits for 2304 registers, 256 are in the CTA's pool"),
        (256, 240, 28, Fault, "to 28, which is not a multiple of 8"),
        (256, 240, 16, Fault, "to 16, which is not a multiple of 8 from 24"),
        (256, 240, 176, Fault, "176 of a warp with 168"),
        (320, 176, 24, Fault, "did another"),
        (255, 240, 24, DeadlockError, "divergent"),
    ],
)
def test_registers_that_are_not_there(consumers, more, less, error, message):
    text = REGISTERS.replace("256", str(consumers)).replace("240", str(more)).replace("u32 24;", f"u32 {less};")
    with pytest.raises(error, match=message):
        run(text, np.zeros(1, np.uint32), block=384)


def test_an_increase_that_takes_registers_away():
    with pytest.raises(Fault, match="inc to 40 of a warp with 96"):
        run(
            "setmaxnreg.dec.sync.aligned.u32 96; setmaxnreg.inc.sync.aligned.u32 40;", np.zeros(1, np.uint32), block=384
        )


def test_warps_of_a_group_may_keep_different_numbers():
    text = """
    mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 32; @%p1 bra FEW;
    setmaxnreg.dec.sync.aligned.u32 96; bra END;
    FEW: setmaxnreg.dec.sync.aligned.u32 24;
    END:
    """
    run(text, np.zeros(1, np.uint32), block=128)


# every CTA writes its number, waits for all of the grid, and reads that of the next one
GRID = """
.reg .u64 %count, %next;
mov.u32 %r0, %ctaid.x; mov.u32 %r1, %nctaid.x; mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 0; @!%p1 bra END;
mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd63, %rd1; add.s64 %rd2, %rd2, 4;
add.u32 %r3, %r0, 1; st.global.u32 [%rd2], %r3;
ARRIVE
WAIT: ACQUIRE setp.lt.u32 %p2, %r5, %r1; @%p2 bra WAIT;
rem.u32 %r6, %r3, %r1; mul.wide.u32 %rd3, %r6, 4; add.s64 %rd3, %rd63, %rd3; ld.global.u32 %r7, [%rd3+4];
mul.wide.u32 %rd4, %r1, 4; add.s64 %rd4, %rd2, %rd4; st.global.u32 [%rd4], %r7;
END:
"""
ARRIVE = "atom.global.add.release.gpu.u32 %r4, [%rd63], 1;"
ACQUIRE = "ld.global.acquire.gpu.u32 %r5, [%rd63];"


def cooperate(body: str, schedule: str = "round", ctas: int = 6, **kw) -> np.ndarray:
    out = np.zeros(1 + 2 * ctas, np.uint32)
    text = module(body)
    ptx_emulator.load(text).launch(
        "k", grid=(ctas,), block=(64,), args=[out], schedule=schedule, cooperative=True, **kw
    )
    return out[1 + ctas :]


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
@pytest.mark.parametrize("cluster", [1, 2])
def test_all_of_a_cooperative_grid_runs_at_once(schedule, cluster):
    body = GRID.replace("ARRIVE", ARRIVE).replace("ACQUIRE", ACQUIRE)
    for seed in (None, 1):
        assert cooperate(body, schedule, seed=seed, cluster=(cluster,)).tolist() == [2, 3, 4, 5, 6, 1]


@pytest.mark.parametrize(
    ("arrive", "acquire"),
    [
        (ARRIVE, "ld.global.relaxed.gpu.u32 %r5, [%rd63];"),
        ("atom.global.add.relaxed.gpu.u32 %r4, [%rd63], 1;", ACQUIRE),
    ],
)
def test_races_between_the_ctas_of_a_cooperative_grid_are_found(arrive, acquire):
    body = GRID.replace("ARRIVE", arrive).replace("ACQUIRE", acquire)
    with pytest.raises(
        Fault, match=r"data race: byte \d+ of out .* is read, with no order after it was written by CTA"
    ):
        cooperate(body)
    assert cooperate(body, races=False).tolist() == [2, 3, 4, 5, 6, 1]


def test_clusters_of_a_cooperative_grid_have_their_own_shared_memory():
    # arrivals at a barrier of shared memory release to the own CTA only, and operations that are chained stay apart
    body = """
    .shared .align 8 .b8 bar[8]; .shared .align 16 .b8 data[16];
    mov.u32 %r0, %ctaid.x; mov.u32 %r2, %tid.x; setp.eq.u32 %p1, %r2, 0;
    @%p1 mbarrier.init.shared::cta.b64 [bar], 64; bar.sync 0;
    @%p1 st.shared.u32 [data], %r0; mbarrier.arrive.shared::cta.b64 _, [bar];
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p3, [bar], 0; @!%p3 bra WAIT;
    ld.shared.u32 %r3, [data]; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd63, %rd1; setp.eq.u32 %p2, %r2, 40;
    @%p2 st.global.u32 [%rd1+28], %r3;
    """
    assert cooperate(body).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_deadlock_names_the_warps_of_all_clusters():
    body = "mov.u32 %r2, %tid.x; setp.lt.u32 %p1, %r2, 32; @%p1 bar.sync 1, 64;"
    with pytest.raises(DeadlockError, match=r"(?s)cluster \(0, 0, 0\).*cluster \(1, 0, 0\)"):
        cooperate(body, ctas=2)


def test_a_cooperative_grid_runs_in_one_process():
    with pytest.raises(ValueError, match="clusters of a cooperative launch run at once"):
        cooperate("", processes=2)


@pytest.mark.parametrize(
    ("threads", "shared", "registers", "want"),
    [(1024, 0, 32, 2), (1024, 0, 40, 1), (128, 0, 0, 16), (32, 0, 0, 32), (128, 100_000, 0, 2), (384, 227_000, 168, 1)],
)
def test_how_many_ctas_an_sm_takes(threads, shared, registers, want):
    assert resident_ctas(threads, shared, registers) == want


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": (1025,)}, "1 to 1024 threads, got 1025"),
        ({"cluster": (4, 5), "grid": (4, 5)}, r"1 to 16 CTAs, got \(4, 5, 1\)"),
        ({"cluster": (2,), "grid": (3,)}, "not a whole number of clusters"),
        ({"shared": 232_449}, "up to 232448 bytes of shared memory, got 232449"),
    ],
)
def test_launches_that_the_hardware_has_no_room_for(change, message):
    with pytest.raises(ValueError, match=message):
        ptx_emulator.load(module("")).launch(
            "k", **({"grid": (1,), "block": (32,), "args": [np.zeros(1, np.int32)]} | change)
        )


def started(*attributes: tuple[int, tuple[int, int, int]]) -> tuple:
    """What a launch with these attributes (id and value) asks for."""
    seen: list[tuple] = []
    given = (_Attribute * len(attributes))(*(_Attribute(n, 0, (ctypes.c_uint32 * 16)(*v)) for n, v in attributes))
    config = _Config((4, 2, 1), (64, 1, 1), 512, None, ctypes.addressof(given), len(attributes))
    runtime = Runtime("sm_100a", lambda *a: seen.append(a) or 0)
    runtime.names = ["k"]
    assert runtime.answer("_cudaLaunchKernelEx", [ctypes.addressof(config), 1, 99]) == 0
    return seen[0]


def test_launch_attributes():
    """CUDA runtime API, "cudaLaunchAttributeID": 2 is cooperative, 4 a cluster's size, 6 a dependent launch."""
    assert started() == ("k", (4, 2, 1), (64, 1, 1), (1, 1, 1), 512, 99, False)
    assert started((6, (1, 0, 0)), (4, (2, 1, 1)))[3:] == ((2, 1, 1), 512, 99, False)
    assert started((2, (1, 0, 0)))[6]
    assert not started((2, (0, 0, 0)))[6]
    with pytest.raises(Fault, match="attribute 13, which the emulator does not know"):
        started((13, (1, 0, 0)))
