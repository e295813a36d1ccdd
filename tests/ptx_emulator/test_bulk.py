"""cp.async, bulk copies and reductions, asynchronous stores (PTX ISA, "Asynchronous copy", "st.async", "red.async",
"st.bulk") against plain indexing."""

import numpy as np
import pytest

from ptx_emulator import DeadlockError, Fault, UnknownInstructionError as Unknown

from .ptx import run

SHARED = ".shared .align 128 .b8 x[4096]; .shared .align 8 .b8 bar[8];"
SETUP = """
mov.u32 %r0, %tid.x; mov.u32 %r1, x; mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p1, %r0, 0;
ld.param.b64 %rd1, [data];
@%p1 mbarrier.init.shared::cta.b64 [bar], 1; fence.mbarrier_init.release.cluster;
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
"""
# %r3 bytes of the own x to out + %rd2
OUT = """
mov.u32 %r10, %r0;
NEXT: setp.ge.u32 %p4, %r10, %r3; @%p4 bra END;
add.u32 %r11, %r1, %r10; ld.shared.u8 %rs1, [%r11]; cvt.u64.u32 %rd3, %r10; add.s64 %rd3, %rd3, %rd2;
add.s64 %rd3, %rd3, %rd63; st.global.u8 [%rd3], %rs1; add.u32 %r10, %r10, 32; bra NEXT;
END:
"""
WAIT = "WAIT: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [bar], 0; @!%p3 bra WAIT;"
PARAMS = ".param .u64 data"
LOAD = "mbarrier::complete_tx::bytes"
CLUSTER = f"cp.async.bulk.shared::cluster.global.{LOAD}"


def aligned(count: int, dtype=np.uint8) -> np.ndarray:
    """Zeros at a multiple of 128 bytes."""
    raw = np.zeros(count * np.dtype(dtype).itemsize + 128, np.uint8)
    return raw[-raw.__array_interface__["data"][0] % 128 :][: count * np.dtype(dtype).itemsize].view(dtype)


def random(count: int, dtype=np.uint8, seed: int = 1) -> np.ndarray:
    out = aligned(count, dtype)
    out[:] = np.random.default_rng(seed).integers(0, 256, out.nbytes, np.uint8).view(dtype)
    return out


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
@pytest.mark.parametrize("space", ["shared::cta", "shared::cluster"])
def test_a_load_with_a_cache_hint(space, schedule):
    data, out = random(512), np.zeros(512, np.uint8)
    body = f"""{SETUP} mov.b32 %r3, 512; mov.b64 %rd2, 0;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], %r3;
    @%p1 cp.async.bulk.{space}.global.{LOAD}.L2::cache_hint [x], [%rd1], %r3, [bar], %rd2; {WAIT} {OUT}"""
    done = run(body, out, data, params=PARAMS, shared=SHARED, schedule=schedule)
    np.testing.assert_array_equal(out, data)
    assert done.bytes["global load"] >= 512


def test_a_multicast_load():
    """CTA 1 of four sends to CTAs 1 and 3, which wait for it; the others wait for nothing."""
    data, out = random(256), np.zeros((4, 256), np.uint8)
    body = f"""{SETUP} and.b32 %r4, %r2, 1; setp.eq.u32 %p5, %r4, 1; setp.eq.u32 %p6, %r2, 1; mov.b16 %rs2, 10;
    mul.lo.u32 %r5, %r2, 256; cvt.u64.u32 %rd2, %r5; mov.b32 %r3, 256; and.pred %p7, %p1, %p5; and.pred %p6, %p6, %p1;
    @%p7 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], %r3;
    barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    @%p6 cp.async.bulk.shared::cluster.global.{LOAD}.multicast::cluster [x], [%rd1], %r3, [bar], %rs2;
    @!%p5 bra END; {WAIT} {OUT} barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"""
    run(body, out, data, params=PARAMS, shared=SHARED, cluster=4, grid=4)
    np.testing.assert_array_equal(out[1::2], [data, data])
    assert not out[::2].any()


# each CTA of a pair fills its x with its rank's bytes and hands them to the other
FILL = """mul.lo.u32 %r4, %r0, 16; add.u32 %r4, %r1, %r4; cvt.u64.u32 %rd4, %r0; mul.lo.u64 %rd4, %rd4, 16;
mul.wide.u32 %rd5, %r2, 512; add.s64 %rd4, %rd4, %rd5; add.s64 %rd4, %rd4, %rd1;
ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd4]; st.shared.v4.b32 [%r4], {%r5, %r6, %r7, %r8};
fence.proxy.async.shared::cta; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
xor.b32 %r9, %r2, 1; mov.b32 %r3, 512; mov.b32 %r12, bar;
mapa.shared::cluster.u32 %r13, %r1, %r9; mapa.shared::cluster.u32 %r14, %r12, %r9;"""
LEAVE = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_from_shared_memory_to_another_cta(schedule):
    data, out = random(1024), np.zeros((2, 512), np.uint8)
    body = f"""{SETUP} {FILL} add.u32 %r15, %r13, 1024;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], %r3;
    @%p1 cp.async.bulk.shared::cluster.shared::cta.{LOAD} [%r15], [%r1], %r3, [%r14]; {WAIT}
    mul.wide.u32 %rd2, %r2, 512; add.u32 %r1, %r1, 1024; {OUT} {LEAVE}"""
    run(body, out, data, params=PARAMS, shared=SHARED, cluster=2, grid=2, schedule=schedule)
    np.testing.assert_array_equal(out, data.reshape(2, 512)[::-1])


REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
          "xor": np.bitwise_xor, "inc": lambda a, b: np.where(a >= b, 0, a + np.uint32(1)),
          "dec": lambda a, b: np.where((a == 0) | (a > b), b, a - np.uint32(1))}  # fmt: skip
TYPES = {"u32": np.uint32, "s32": np.int32, "b32": np.uint32, "u64": np.uint64, "s64": np.int64, "b64": np.uint64}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("add", "u32"), ("add", "u64"), ("min", "s32"), ("max", "u32"), ("inc", "u32"), ("dec", "u32"), ("xor", "b32")],
)
def test_reductions_in_another_cta(name, kind):
    """What the other CTA has is the first operand."""
    data, out = random(1024, seed=3), np.zeros((2, 512), np.uint8)
    if name in ("inc", "dec"):
        data.view(np.uint32)[::3] = np.roll(data.view(np.uint32), 128)[::3]
    body = f"""{SETUP} {FILL} setp.eq.u32 %p5, %r2, 0; and.pred %p5, %p5, %p1; setp.ne.u32 %p6, %r2, 0;
    @%p6 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], 512;
    """.replace("@%p6", "@%p7").replace("setp.ne.u32 %p6, %r2, 0;", "setp.ne.u32 %p6, %r2, 0; and.pred %p7, %p6, %p1;")
    body += f"""
    @%p5 cp.reduce.async.bulk.shared::cluster.shared::cta.{LOAD}.{name}.{kind} [%r13], [%r1], %r3, [%r14];
    @!%p6 bra END; {WAIT} mul.wide.u32 %rd2, %r2, 512; {OUT} {LEAVE}"""
    run(body, out, data, params=PARAMS, shared=SHARED, cluster=2, grid=2)
    mine, other = data.view(TYPES[kind]).reshape(2, -1)
    np.testing.assert_array_equal(out.view(TYPES[kind])[1], REDUCE[name](other, mine))


STORE = """mul.lo.u32 %r4, %r0, 16; add.u32 %r4, %r1, %r4; cvt.u64.u32 %rd4, %r0; mul.lo.u64 %rd4, %rd4, 16;
add.s64 %rd4, %rd4, %rd1; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd4]; st.shared.v4.b32 [%r4], {%r5, %r6, %r7, %r8};
fence.proxy.async.shared::cta; bar.sync 0; mov.b32 %r3, 512; mov.b64 %rd5, 0;"""
END = "@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group 0;"


@pytest.mark.parametrize("mask", [None, 0x5A01])
def test_stores_with_and_without_a_byte_mask(mask):
    data, out = random(512), random(512, seed=2)
    want = data if mask is None else np.where(mask >> np.arange(512) % 16 & 1, data, out)
    op = "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint"
    op += " [%rd63], [x], %r3, %rd5;" if mask is None else f".cp_mask [%rd63], [x], %r3, %rd5, {mask};"
    run(f"{SETUP} {STORE} @%p1 {op} {END}", out, data, params=PARAMS, shared=SHARED)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("add", "s32"), ("add", "u64"), ("min", "s64"), ("max", "u64"), ("max", "s32"), ("and", "b64"), ("or", "b32")],
)
def test_integer_reductions_in_global_memory(name, kind):
    data, out = random(512), random(512, seed=2)
    want = REDUCE[name](out.view(TYPES[kind]), data.view(TYPES[kind]))
    op = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{name}.{kind} [%rd63], [x], %r3;"
    run(f"{SETUP} {STORE} @%p1 {op} {END}", out, data, params=PARAMS, shared=SHARED)
    np.testing.assert_array_equal(out.view(TYPES[kind]), want)


@pytest.mark.parametrize(
    ("op", "dtype"),
    [("add.f32", np.float32), ("add.f64", np.float64), ("add.noftz.f16", np.float16), ("max.f16", np.float16)],
)
def test_float_reductions_in_global_memory(op, dtype):
    rng = np.random.default_rng(5)
    count = 512 // np.dtype(dtype).itemsize
    data, out = aligned(count, dtype), aligned(count, dtype)
    data[:], out[:] = (rng.standard_normal((2, count)) * 10.0 ** rng.integers(-6, 4, (2, count))).astype(dtype)
    want = (np.add if "add" in op else np.maximum)(out, data)
    op = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{op} [%rd63], [x], %r3;"
    run(f"{SETUP} {STORE} @%p1 {op} {END}", out, data, params=PARAMS, shared=SHARED)
    np.testing.assert_array_equal(out, want)


def test_two_reductions_of_one_place_do_not_race():
    data, out = random(512), random(512, seed=2)
    want = out.view(np.uint32) + 2 * data.view(np.uint32)
    op = "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd63], [x], %r3;"
    run(f"{SETUP} {STORE} @%p1 {op} @%p1 {op} {END}", out, data, params=PARAMS, shared=SHARED)
    np.testing.assert_array_equal(out.view(np.uint32), want)


IGNORE = f"""{SETUP} mov.b32 %r3, 64; mov.b32 %r4, 3; mov.b32 %r5, 5; mov.b64 %rd2, 0; sub.s64 %rd1, %rd1, 16;
add.s64 %rd1, %rd1, 16; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], %r3;
@%p1 cp.async.bulk.shared::cta.global.{LOAD}.ignore_oob [x], [%rd1], %r3, %r4, %r5, [bar]; {WAIT}"""


def test_what_is_ignored_has_no_value():
    data, out = random(128), np.zeros(56, np.uint8)
    run(f"{IGNORE} add.u32 %r1, %r1, 3; mov.b32 %r3, 56; {OUT}", out, data[:59], params=PARAMS, shared=SHARED)
    np.testing.assert_array_equal(out, data[3:59])
    with pytest.raises(Fault, match="never written"):
        run(f"{IGNORE} mov.b32 %r3, 56; {OUT}", out, data, params=PARAMS, shared=SHARED)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        (f"cp.async.bulk.shared::cta.global.{LOAD} [x+8], [%rd1], 64, [bar];", Fault, "multiples of 16"),
        (f"cp.async.bulk.shared::cta.global.{LOAD} [x], [%rd1], 24, [bar];", Fault, "multiples of 16"),
        (f"cp.async.bulk.shared::cta.global.{LOAD} [x], [%rd1+448], 128, [bar];", Fault, "in no array"),
        (f"cp.async.bulk.shared::cta.global.{LOAD} [x], [%rd1], 64, [x];", Fault, "no initialised mbarrier"),
        (f"cp.async.bulk.shared::cta.global.{LOAD} [x+4064], [%rd1], 64, [bar];", Fault, "outside of the CTA's"),
        (f"{CLUSTER}.multicast::cluster [x], [%rd1], 16, [bar], 6;", Fault, "cluster of 1"),
        (f"cp.async.bulk.shared::cluster.shared::cta.{LOAD} [x+64], [x], 64, [bar];", Fault, "must be another's"),
        (f"cp.async.bulk.shared::cta.global.{LOAD}.ignore_oob [x], [%rd1], 64, 16, 0, [bar];", Fault, "0 to 15"),
        ("cp.async.bulk.prefetch.L2.global [%rd1], 1024;", Fault, "in no array"),
        ("cp.async.bulk.prefetch.L2.global [%rd1+4], 16;", Fault, "multiples of 16"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.min.f32 [%rd63], [x], 64;", Unknown, "min of f32"),
        ("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f16 [%rd63], [x], 64;", Unknown, "noftz"),
        (f"cp.async.bulk.relaxed.gpu.shared::cta.global.{LOAD}.b128 [x], [%rd1], 64, [bar];", Unknown, "relaxed"),
        (f"st.async.shared::cluster.{LOAD}.b32 [x], %r0, [bar];", Fault, "cluster of one CTA"),
        ("st.bulk.shared::cta [x], 12, 0;", Fault, "multiple of 8"),
    ],
)  # fmt: skip
def test_refusals(text, error, message):
    with pytest.raises(error, match=message):
        run(
            f"{SETUP} @%p1 {text} @%p1 cp.async.bulk.commit_group;",
            aligned(64),
            random(512),
            params=PARAMS,
            shared=SHARED,
        )


def test_prefetch_moves_nothing():
    done = run(f"{SETUP} @%p1 cp.async.bulk.prefetch.L2.global [%rd1], 512;", aligned(64), random(512), params=PARAMS,
               shared=SHARED)  # fmt: skip
    assert done.bytes["global load"] == 0


# --- stores of registers ---


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
def test_st_async(schedule):
    """16 bytes a lane to the other CTA, whose mbarrier counts them."""
    data, out = random(1024), np.zeros((2, 512), np.uint8)
    body = f"""{SETUP} {FILL} add.u32 %r15, %r13, 1024; mul.lo.u32 %r16, %r0, 16; add.u32 %r15, %r15, %r16;
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], %r3;
    st.async.weak.shared::cluster.{LOAD}.v4.b32 [%r15], {{%r5, %r6, %r7, %r8}}, [%r14]; {WAIT}
    mul.wide.u32 %rd2, %r2, 512; add.u32 %r1, %r1, 1024; {OUT} {LEAVE}"""
    run(body, out, data, params=PARAMS, shared=SHARED, cluster=2, grid=2, schedule=schedule)
    np.testing.assert_array_equal(out, data.reshape(2, 512)[::-1])


@pytest.mark.parametrize(("name", "kind"), [("add", "u64"), ("min", "s32"), ("or", "b32"), ("inc", "u32")])
def test_red_async(name, kind):
    """All lanes reduce one place of the other CTA."""
    dtype = TYPES[kind]
    size = np.dtype(dtype).itemsize
    data, out = random(1024, seed=6), np.zeros((2, size), np.uint8)
    register = "%rd6" if size == 8 else "%r5"
    body = f"""{SETUP} {FILL} mov.b64 %rd6, {{%r5, %r6}}; add.u32 %r15, %r13, 1024; mov.b64 %rd7, 0;
    @%p1 st.shared.b64 [x+1024], %rd7; {LEAVE}
    @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [bar], {32 * size};
    red.async.relaxed.cluster.shared::cluster.{LOAD}.{name}.{kind} [%r15], {register}, [%r14]; {WAIT}
    mul.wide.u32 %rd2, %r2, {size}; add.u32 %r1, %r1, 1024; mov.b32 %r3, {size}; {OUT} {LEAVE}"""
    run(body, out, data, params=PARAMS, shared=SHARED, cluster=2, grid=2)
    values = np.ascontiguousarray(data.reshape(2, 32, 16)[:, :, :size]).view(dtype)[..., 0]
    for rank in range(2):
        want = np.zeros(1, dtype)
        for value in values[1 - rank]:
            want = REDUCE[name](want, np.array([value], dtype)).astype(dtype)
        if name != "inc":  # which depends on the order
            np.testing.assert_array_equal(out[rank].view(dtype), want)
    assert name != "inc" or (out.view(np.uint32) <= 32).all()


def test_red_async_stays_away_from_the_own_cta():
    body = f"{SETUP} red.async.relaxed.cluster.shared::cluster.{LOAD}.add.u32 [%r1], %r0, [bar]; {LEAVE}"
    with pytest.raises(Fault, match="must be another's"):
        run(body, aligned(8), random(8), params=PARAMS, shared=SHARED, cluster=2, grid=2)


def test_st_bulk_writes_zeros():
    data, out = random(512), np.full(512, 7, np.uint8)
    body = f"{SETUP} {STORE} @%p1 st.bulk.weak.shared::cta [x+64], 128, 0; bar.sync 0; mov.b64 %rd2, 0; {OUT}"
    run(body, out, data, params=PARAMS, shared=SHARED)
    want = data.copy()
    want[64:192] = 0
    np.testing.assert_array_equal(out, want)


# --- cp.async ---


@pytest.mark.parametrize("schedule", ["eager", "round", "late"])
@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_fills_with_zeros(size, schedule):
    """Lane n reads n % (size + 1) bytes; or all or nothing by a predicate."""
    data, out = random(32 * size), np.zeros((2, 32, size), np.uint8)
    body = f"""{SETUP} mul.lo.u32 %r4, %r0, {size}; cvt.u64.u32 %rd4, %r4; add.s64 %rd4, %rd4, %rd1;
    add.u32 %r5, %r1, %r4; rem.u32 %r6, %r0, {size + 1}; and.b32 %r7, %r0, 1; setp.eq.u32 %p5, %r7, 1;
    cp.async.ca.shared.global.L2::128B [%r5], [%rd4], {size}, %r6;
    cp.async.ca.shared::cta.global.L2::cache_hint [%r5+{32 * size}], [%rd4], {size}, %p5, %rd1;
    cp.async.commit_group; cp.async.wait_group 0; bar.sync 0; mov.b32 %r3, {64 * size}; mov.b64 %rd2, 0; {OUT}"""
    run(body, out, data, params=PARAMS, shared=SHARED, schedule=schedule)
    lanes, column = np.arange(32)[:, None], np.arange(size)
    rows = data.reshape(32, size)
    np.testing.assert_array_equal(out[0], np.where(column < lanes % (size + 1), rows, 0))
    np.testing.assert_array_equal(out[1], np.where(lanes % 2, 0, rows))


@pytest.mark.parametrize(("noinc", "count"), [("", 1), (".noinc", 33)])
def test_cp_async_arrives_at_an_mbarrier(noinc, count):
    data, out = random(512), np.zeros(512, np.uint8)
    body = f"""{SETUP} mul.lo.u32 %r4, %r0, 16; cvt.u64.u32 %rd4, %r4; add.s64 %rd4, %rd4, %rd1; add.u32 %r5, %r1, %r4;
    cp.async.cg.shared.global [%r5], [%rd4], 16; cp.async.mbarrier.arrive{noinc}.shared::cta.b64 [bar];
    bar.warp.sync -1; @%p1 mbarrier.arrive.shared::cta.b64 _, [bar]; {WAIT} mov.b32 %r3, 512; mov.b64 %rd2, 0; {OUT}"""
    body = body.replace("[bar], 1;", f"[bar], {count};", 1)
    run(body, out, data, params=PARAMS, shared=SHARED, schedule="late")
    np.testing.assert_array_equal(out, data)
    if noinc:
        with pytest.raises(DeadlockError, match="1 of 34 arrivals"):
            run(body.replace("[bar], 33;", "[bar], 34;"), out, data, params=PARAMS, shared=SHARED)
