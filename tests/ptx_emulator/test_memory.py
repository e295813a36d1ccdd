"""State spaces: vectors, atomics, local and generic addresses, cp.async; and every access that is refused."""

import gc

import numpy as np
import pytest

from ptx_emulator import Fault
from ptx_emulator.hazards import Shadow
from ptx_emulator.memory import SharedMemory

from .ptx import run

SHARED = ".shared .align 16 .b8 buf[512];"


def test_vector_loads_and_narrow_types():
    data = np.arange(256, dtype=np.uint8)
    got = np.zeros(128, np.uint32)
    body = """
    ld.param.b64 %rd1, [src]; mov.u32 %r0, %tid.x; mul.wide.u32 %rd2, %r0, 8; add.s64 %rd1, %rd1, %rd2;
    ld.global.v2.b32 {%r1, %r2}, [%rd1]; ld.global.s8 %r3, [%rd1+1]; ld.global.u16 %r4, [%rd1+2];
    mul.wide.u32 %rd2, %r0, 16; add.s64 %rd3, %rd63, %rd2; st.global.v4.b32 [%rd3], {%r2, %r1, %r3, %r4};
    """
    run(body, got, data, params=".param .u64 src")
    rows = data.reshape(32, 8)
    want = np.stack(
        [
            rows.view(np.uint32)[:, 1],
            rows.view(np.uint32)[:, 0],
            rows[:, 1].view(np.int8).astype(np.int32).view(np.uint32),
            rows.view(np.uint16)[:, 1].astype(np.uint32),
        ],
        1,
    )
    np.testing.assert_array_equal(got.reshape(32, 4), want)


def test_generic_addresses_reach_every_space():
    body = """
    mov.b64 %rd1, buf; cvta.shared.u64 %rd2, %rd1; mov.b32 %r1, 77; st.b32 [%rd2], %r1; ld.shared.b32 %r2, [buf];
    mov.b64 %rd3, src; cvta.param.u64 %rd4, %rd3; ld.b64 %rd5, [%rd4]; cvta.global.u64 %rd6, %rd5; ld.b32 %r3, [%rd6];
    add.s32 %r2, %r2, %r3; st.b32 [%rd63], %r2;
    """
    got = np.zeros(1, np.uint32)
    run(body, got, np.array([5], np.uint32), params=".param .u64 src", shared=SHARED)
    assert got.tolist() == [82]


def test_atomics_return_what_was_there():
    body = """
    mov.u32 %r0, %tid.x; atom.global.add.u32 %r1, [%rd63], 2; mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd63;
    st.global.b32 [%rd1+4], %r1; red.global.max.u32 [%rd63+132], %r0; atom.global.cas.b32 %r2, [%rd63+136], 9, %r0;
    """
    got = np.zeros(35, np.uint32)
    got[34] = 9
    run(body, got)
    assert got[0] == 64
    assert sorted(got[1:33]) == list(range(0, 64, 2))
    assert got[33] == 31
    assert got[34] == 0


def test_local_memory_is_private():
    body = """
    mov.u32 %r0, %tid.x; st.local.b32 [depot+8], %r0; ld.local.b32 %r1, [depot+8];
    mul.wide.u32 %rd1, %r0, 4; add.s64 %rd1, %rd1, %rd63; st.global.b32 [%rd1], %r1;
    """
    got = np.zeros(32, np.uint32)
    run(body, got, shared=".local .align 8 .b8 depot[16];")
    np.testing.assert_array_equal(got, np.arange(32))


ASYNC = """
mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 4; mov.b32 %r2, buf; add.s32 %r1, %r1, %r2;
ld.param.b64 %rd1, [src]; mul.wide.u32 %rd2, %r0, 16; add.s64 %rd1, %rd1, %rd2;
cp.async.cg.shared.global [%r1], [%rd1], 16{size}; cp.async.commit_group; {wait}
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1]; add.s64 %rd2, %rd2, %rd63;
st.global.v4.b32 [%rd2], {{%r4, %r5, %r6, %r7}};
"""


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_cp_async_with_zero_fill(schedule):
    data, got = np.arange(1, 129, dtype=np.uint32), np.zeros(128, np.uint32)
    body = ASYNC.format(size=", 8", wait="cp.async.wait_group 0;")
    run(body, got, data, params=".param .u64 src", shared=SHARED, schedule=schedule)
    want = data.reshape(32, 4).copy()
    want[:, 2:] = 0
    np.testing.assert_array_equal(got.reshape(32, 4), want)


def test_cp_async_that_nobody_waits_for():
    data, got = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    with pytest.raises(Fault, match="is read but was never written"):
        run(ASYNC.format(size="", wait="cp.async.wait_group 1;"), got, data, params=".param .u64 src", shared=SHARED)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%rd63+128];", "no array that is known; out of 128 bytes starts 128 bytes before"),
        ("ld.global.b32 %r1, [%rd63+-4];", "in no array that is known"),
        ("ld.global.b32 %r1, [%rd63+2];", "not a multiple of the access's 4 bytes"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd63+8];", "not a multiple of the access's 16 bytes"),
        ("ld.shared.b32 %r1, [buf+512];", "outside of the CTA's 0x400..0x600"),
        ("ld.shared.b32 %r1, [buf];", "0x400 is read but was never written"),
        ("mov.b32 %r1, 0; st.shared.b32 [%r1], %r1;", "outside of the CTA's"),
        ("st.shared.b32 [buf+2], %r1;", "shared address 0x402 is not a multiple"),
        (
            "mov.b32 %r1, buf; mov.b32 %r2, 3; mapa.shared::cluster.u32 %r1, %r1, %r2; "
            "ld.shared::cluster.b32 %r1, [%r1];",
            "shared address of CTA rank 3 in a cluster of 1",
        ),
        ("mov.b64 %rd1, 0x7777777777777777; ld.b32 %r1, [%rd1];", "which is no memory"),
        ("ld.local.b32 %r1, [depot+16];", "outside of 16 bytes"),
    ],
)
def test_refusals(body, message):
    with pytest.raises(Fault, match=message):
        run(body, np.zeros(32, np.uint32), shared=SHARED + ".local .align 8 .b8 depot[16];")


def test_a_read_only_array_is_not_written():
    data = np.zeros(32, np.uint32)
    data.flags.writeable = False
    with pytest.raises(Fault, match="out is read-only"):
        run("st.global.b32 [%rd63], %r1;", data)


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="takes 1 arguments, got 2"):
        run("", np.zeros(4), np.zeros(4))
    with pytest.raises(ValueError, match="not contiguous"):
        run("", np.zeros((4, 4))[:, 1])
    with pytest.raises(ValueError, match="not a whole number of clusters"):
        run("", np.zeros(4), grid=3, cluster=2)


def test_statistics():
    stats = run("bar.sync 0; bar.sync 0; red.global.add.u32 [%rd63], 1;", np.zeros(4, np.uint32), block=64, grid=3)
    assert stats.instructions["bar.sync"] == 2 * 2 * 3
    assert stats.bytes["global store"] == 4 * 64 * 3
    assert stats.total == 5 * 2 * 3


@pytest.mark.parametrize("races", [True, False])
def test_a_cluster_gives_its_memory_back_when_it_ends(races):
    """Without the garbage collector, so that the memory of a launch does not grow with its clusters."""
    body = "mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, buf;\nst.shared.u32 [%r1], 1;\nld.shared.u32 %r2, [%r1];\n"
    body += "mul.wide.u32 %rd1, %r0, 4;\nadd.u64 %rd1, %rd1, %rd63;\nst.global.u32 [%rd1], %r2;"

    def alive() -> int:
        return sum(type(x) in (SharedMemory, Shadow) for x in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        run(body, np.zeros(8, np.uint32), shared=".shared .align 4 .b8 buf[4];", grid=8, cluster=2, races=races)
        assert alive() == before
    finally:
        gc.enable()


def test_vectors_of_lanes_in_several_arrays_are_numbers_like_any():
    """A load whose lanes are looked up one by one, and arithmetic on halves of what it loaded."""
    first, second = (np.arange(n, n + 64, dtype=np.float16) for n in (0, 100))
    out = np.zeros(64, np.float16)
    body = """
    mov.u32 %r0, %tid.x; and.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 0; shr.u32 %r1, %r0, 1; mul.wide.u32 %rd0, %r1, 8;
    ld.param.u64 %rd1, [first]; ld.param.u64 %rd2, [second]; selp.b64 %rd1, %rd1, %rd2, %p0; add.u64 %rd1, %rd1, %rd0;
    ld.global.v2.b32 {%r2, %r3}, [%rd1]; add.f16x2 %r2, %r2, %r3;
    mul.wide.u32 %rd0, %r0, 4; add.u64 %rd0, %rd0, %rd63; st.global.b32 [%rd0], %r2;
    """
    run(body, out, first, second, params=".param .u64 first, .param .u64 second")
    pairs = np.stack([first.reshape(16, 2, 2), second.reshape(16, 2, 2)], 1).sum(2)
    np.testing.assert_array_equal(out, pairs.reshape(-1))
