"""multimem.* (PTX ISA, "multimem.ld_reduce, multimem.st, multimem.red"), and launches of several devices together."""

import numpy as np
import pytest

import ptx_emulator
from ptx_emulator import DeadlockError, Fault, UnknownInstructionError
from ptx_emulator.memory import GlobalMemory

from .ptx import module

RANKS = 4
PARAMS = ".param .u64 out, .param .u64 mc"
AT = "mov.u32 %r0, %tid.x; ld.param.u64 %rd1, [mc]; mul.wide.u32 %rd2, %r0, {0}; add.u64 %rd1, %rd1, %rd2;"
OUT = "add.u64 %rd3, %rd63, %rd2; st.global.{1}.b32 [%rd3], {{%r4, %r5}};"


def shared(parts: list[np.ndarray]) -> tuple[GlobalMemory, int]:
    memory = GlobalMemory()
    addresses = [memory.add(part) for part in parts]
    window = 1 << 40
    memory.multicast(window, parts[0].nbytes, addresses)
    return memory, window


def run(body: str, out: np.ndarray, parts: list[np.ndarray], block: int = 32, **kw) -> None:
    memory, window = shared(parts)
    ptx_emulator.load(module(body, PARAMS)).launch(
        "k", grid=(1,), block=(block,), args=[out, window], memory=memory, **kw
    )


def values(kind: str, n: int, seed: int) -> np.ndarray:
    r = np.random.default_rng(seed)
    if kind == "u32":
        return r.integers(0, 1 << 32, n, dtype=np.uint32)
    return r.standard_normal(n).astype({"f32": np.float32, "f16x2": np.float16}[kind])


@pytest.mark.parametrize(
    ("op", "kind"), [("add", "f32"), ("add.acc::f32", "f16x2"), ("max", "f16x2"), ("min", "u32"), ("xor", "u32")]
)
def test_a_load_gives_the_reduced_values_of_all(op, kind):
    n = 128 if kind == "f16x2" else 64
    parts = [values(kind, n, seed) for seed in range(RANKS)]
    out = np.zeros_like(parts[0])
    load = f"multimem.ld_reduce.weak.global.{op}.v2.{kind} {{%r4, %r5}}, [%rd1];"
    run(AT.format(8) + load + OUT.format(8, "v2"), out, parts)
    name = op.split(".")[0]
    if name == "add":
        want = sum(p.astype(np.float64) for p in parts).astype(np.float32).astype(out.dtype)
    else:
        want = {"max": np.maximum, "min": np.minimum, "xor": np.bitwise_xor}[name].reduce(parts)
    np.testing.assert_array_equal(out, want)


def test_sums_of_eight_bits():
    codes = [np.random.default_rng(s).integers(0, 0x60, 256).astype(np.uint8) for s in range(RANKS)]
    out = np.zeros(256, np.uint8)
    load = "multimem.ld_reduce.weak.global.add.acc::f16.v2.e4m3x4 {%r4, %r5}, [%rd1];"
    run(AT.format(8) + load + OUT.format(8, "v2"), out, codes)
    import ml_dtypes

    exact = sum(c.view(ml_dtypes.float8_e4m3fn).astype(np.float64) for c in codes)
    want = exact.astype(np.float16).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(out.view(ml_dtypes.float8_e4m3fn).astype(float), want.astype(float))


def test_a_store_goes_to_all_and_a_reduction_is_done_in_all():
    parts = [np.full(32, n, np.uint32) for n in range(RANKS)]
    store = "setp.lt.u32 %p1, %r0, 16; add.u32 %r4, %r0, 100; @%p1 multimem.st.weak.global.b32 [%rd1], %r4;"
    add = "multimem.red.release.sys.global.add.u32 [%rd1], 7;"
    run(AT.format(4) + store + add, np.zeros(1, np.uint32), parts)
    for n, part in enumerate(parts):
        np.testing.assert_array_equal(part[:16], np.arange(107, 123))
        np.testing.assert_array_equal(part[16:], n + 7)


def test_lanes_that_reduce_into_one_place():
    parts = [np.zeros(1, np.uint32) for _ in range(RANKS)]
    run("ld.param.u64 %rd1, [mc]; multimem.red.relaxed.gpu.global.add.u32 [%rd1], 1;", np.zeros(1, np.uint32), parts)
    assert [int(p[0]) for p in parts] == [32] * RANKS


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("ld.global.b32 %r4, [%rd1];", Fault, "multicast address, for multimem instructions only"),
        ("st.global.b32 [%rd1], 1;", Fault, "multicast address, for multimem instructions only"),
        ("multimem.st.weak.global.b32 [%rd63], 1;", Fault, "is no multicast address"),
        ("multimem.st.weak.global.b32 [%rd1+64], 1;", Fault, "ends behind its 128 bytes"),
        ("@%p1 multimem.st.weak.global.b32 [%rd1+2], 1;", Fault, "not a multiple"),
        ("multimem.red.global.add.e4m3x4 [%rd1], 1;", UnknownInstructionError, "multimem.red"),
        (
            "multimem.cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%rd1], 16;",
            UnknownInstructionError,
            "multimem",
        ),
    ],
)
def test_refusals(text, error, message):
    parts = [np.zeros(32, np.uint32) for _ in range(2)]
    with pytest.raises(error, match=message):
        run(AT.format(4) + "setp.eq.u32 %p1, %r0, 0;" + text, np.zeros(1, np.uint32), parts)


# every rank adds one to the flag of all, waits until all have, and then reads what each of them wrote before
EXCHANGE = """
ld.param.u64 %rd1, [mc]; ld.param.u64 %rd2, [flag]; ld.param.u64 %rd4, [mcflag]; ld.param.u32 %r1, [rank];
ld.param.u64 %rd5, [data]; mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0; mul.wide.u32 %rd3, %r0, 4;
add.u64 %rd1, %rd1, %rd3; add.u64 %rd5, %rd5, %rd3; add.u64 %rd6, %rd63, %rd3;
mad.lo.u32 %r2, %r1, 1000, %r0; st.global.u32 [%rd5], %r2; bar.sync 0;
@%p1 multimem.red.RELEASE.sys.global.add.u32 [%rd4], 1;
WAIT: @%p1 ld.acquire.sys.global.u32 %r3, [%rd2]; @%p1 setp.lt.u32 %p2, %r3, 3; @%p1 @%p2 bra WAIT;
bar.sync 0;
multimem.ld_reduce.weak.global.add.u32 %r4, [%rd1]; st.global.u32 [%rd6], %r4;
"""


def exchange(ranks: int, text: str = EXCHANGE, release: str = "release", **kw):
    body = text.replace("@%p1 @%p2", "@%p3").replace(
        "@%p1 setp.lt.u32 %p2, %r3, 3;", "setp.lt.u32 %p2, %r3, 3; and.pred %p3, %p1, %p2;"
    )
    body = body.replace("RELEASE", release)
    params = ".param .u64 out, .param .u64 mc, .param .u64 data, .param .u64 flag, .param .u64 mcflag, .param .u32 rank"
    loaded = ptx_emulator.load(module(body, params))
    data, flags, outs = (
        [np.zeros(64, np.uint32) for _ in range(3)],
        [np.zeros(1, np.uint32) for _ in range(3)],
        [np.zeros(64, np.uint32) for _ in range(3)],
    )
    memory = GlobalMemory()
    window = 1 << 40
    memory.multicast(window, data[0].nbytes, [memory.add(d) for d in data])
    memory.multicast(window + 4096, 4, [memory.add(f) for f in flags])
    launches = [
        loaded.prepare(
            "k",
            grid=(1,),
            block=(64,),
            args=[outs[n], window, data[n], flags[n], window + 4096, n],
            memory=memory,
            **kw,
        )
        for n in range(ranks)
    ]
    ptx_emulator.run_together(launches)
    return outs, launches


@pytest.mark.parametrize("kw", [{}, {"schedule": "late"}, {"seed": 3}, {"seed": 4}])
def test_ranks_wait_for_each_other(kw):
    outs, launches = exchange(3, **kw)
    for out in outs:
        np.testing.assert_array_equal(out, 3 * np.arange(64) + 3000)
    loads = [launch.statistics.bytes["global load"] for launch in launches]
    assert all(n >= 3 * 256 for n in loads)


def test_ranks_that_do_not_hand_on_what_they_wrote():
    with pytest.raises(Fault, match="data race"):
        exchange(3, release="relaxed")


def test_launches_of_different_memories_are_refused():
    loaded = ptx_emulator.load(module("", ".param .u64 out"))
    launches = [loaded.prepare("k", grid=(1,), block=(32,), args=[np.zeros(1, np.uint32)]) for _ in range(2)]
    with pytest.raises(ValueError, match="one memory"):
        ptx_emulator.run_together(launches)


def test_a_deadlock_names_every_rank():
    text = """.shared .align 8 .b8 bar[8]; mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0;
    @%p1 mbarrier.init.shared.b64 [bar], 1; bar.sync 0;
    WAIT: mbarrier.try_wait.parity.shared.b64 %p2, [bar], 0; @!%p2 bra WAIT;"""
    loaded = ptx_emulator.load(module(text))
    memory = GlobalMemory()
    launches = [
        loaded.prepare("k", grid=(1,), block=(32,), args=[np.zeros(1, np.uint32)], memory=memory) for _ in range(2)
    ]
    with pytest.raises(DeadlockError) as caught:
        ptx_emulator.run_together(launches)
    assert str(caught.value).count("deadlock in cluster") == 2


# thread 0 of one warp copies by TMA to global memory and sets a flag for all; another warp looks at the flag
FLAG = """
ld.param.u64 %rd1, [mcflag]; ld.param.u64 %rd2, [flag]; mov.u32 %r0, %tid.x; setp.eq.u32 %p1, %r0, 0;
setp.lt.u32 %p2, %r0, 32; mul.wide.u32 %rd3, %r0, 4; add.u64 %rd4, %rd63, %rd3; mov.u32 %r1, x;
shl.b32 %r2, %r0, 2; add.u32 %r2, %r2, %r1; @%p2 st.shared.u32 [%r2], %r0; fence.proxy.async.shared::cta; bar.sync 0;
@!%p2 bra LOOK;
@%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd63], [x], 128;
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_groupREAD 0;
@%p1 multimem.red.release.sys.global.add.u32 [%rd1], 1;
bra END;
LOOK: ld.acquire.sys.global.u32 %r3, [%rd2]; setp.lt.u32 %p3, %r3, 2; @%p3 bra LOOK;
sub.u64 %rd4, %rd4, 128; ld.global.u32 %r4, [%rd4]; st.global.u32 [%rd4+128], %r4;
END:
"""


def flagged(read: str = "", **kw) -> list[np.ndarray]:
    loaded = ptx_emulator.load(
        module(
            FLAG.replace("READ", read), ".param .u64 out, .param .u64 flag, .param .u64 mcflag",
            shared=".shared .align 128 .b8 x[128];",
        )
    )  # fmt: skip
    flags, outs = [np.zeros(1, np.uint32) for _ in range(2)], [aligned(64) for _ in range(2)]
    memory, window = shared(flags)
    ptx_emulator.run_together(
        [
            loaded.prepare("k", grid=(1,), block=(64,), args=[outs[n], flags[n], window], memory=memory, **kw)
            for n in range(2)
        ]
    )
    return outs


def aligned(n: int) -> np.ndarray:
    raw = np.zeros(n + 32, np.uint32)
    start = -(raw.__array_interface__["data"][0] // 4) % 32
    return raw[start : start + n]


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_warps_that_look_at_flags_do_not_hold_back_asynchronous_work(schedule):
    for out in flagged(schedule=schedule):
        np.testing.assert_array_equal(out, np.tile(np.arange(32), 2))


def test_stores_that_were_only_read_from_shared_memory():
    with pytest.raises(Fault, match="data race"):
        flagged(".read")
