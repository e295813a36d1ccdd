"""Device functions, brx.idx, 128-bit registers and 256-bit accesses (PTX ISA, "call", "brx.idx", "ld", "mov")."""

import numpy as np
import pytest

from ptx_emulator import Fault, UnknownInstructionError

from .ptx import lanewise, run

# by .param, as compilers call; nested, with an early return by some lanes, a loop and a variable of its own
FUNCTIONS = """
.func (.param .b32 triple_result) triple(.param .b32 triple_0)
{
.reg .b32 %r<4>;
ld.param.b32 %r1, [triple_0];
mul.lo.u32 %r2, %r1, 3;
st.param.b32 [triple_result], %r2;
ret;
}
.func (.param .align 8 .b8 f_result[8]) f(.param .b32 f_0, .param .b64 f_1)
{
.reg .pred %p<3>;
.reg .b32 %r<8>;
.reg .b64 %rd<4>;
ld.param.b32 %r1, [f_0];
ld.param.b64 %rd1, [f_1];
cvt.u32.u64 %r2, %rd1;
st.param.b32 [f_result], %r1;
st.param.b32 [f_result+4], 7;
setp.gt.u32 %p1, %r2, 5;
@%p1 ret;
LOOP:
{
.param .b32 param0;
st.param.b32 [param0], %r1;
.param .b32 retval0;
call.uni (retval0), triple, (param0);
ld.param.b32 %r1, [retval0];
}
add.u32 %r2, %r2, 1;
setp.le.u32 %p2, %r2, 5;
@%p2 bra LOOP;
st.param.b32 [f_result], %r1;
ret;
}
.func (.reg .b32 d) subtract(.reg .b32 a, .reg .b32 b)
{
sub.u32 d, a, b;
ret;
}
.func nothing() { ret; }
.func forever(.reg .b32 a) { call forever, (a); ret; }
.extern .func (.param .b32 x) elsewhere(.param .b32 y);
"""
CALL = """
mov.u32 %r0, %tid.x; cvt.u64.u32 %rd0, %r0;
{
.param .b32 param0; .param .b64 param1; .param .align 8 .b8 retval0[8];
st.param.b32 [param0], %r0; st.param.b64 [param1], %rd0;
call (retval0), f, (param0, param1);
ld.param.v2.b32 {%r1, %r2}, [retval0];
}
"""


def out(body: str, **kw) -> np.ndarray:
    """%r1 and %r2 of every lane."""
    found = np.zeros((32, 2), np.uint32)
    store = "mov.u32 %r200, %tid.x; mul.wide.u32 %rd50, %r200, 8; add.s64 %rd50, %rd50, %rd63;"
    run(f"{body}\n{store} st.global.v2.b32 [%rd50], {{%r1, %r2}};", found, extra=FUNCTIONS, **kw)
    return found


def test_a_function_with_params_a_loop_and_early_returns():
    lanes = np.arange(32)
    want = np.stack([np.where(lanes > 5, lanes, lanes * 3.0 ** np.maximum(6 - lanes, 0)), np.full(32, 7)], 1)
    np.testing.assert_array_equal(out(CALL), want)


def test_registers_and_literals_as_parameters_under_a_guard():
    got = out("""
    mov.u32 %r0, %tid.x; mov.b32 %r1, 5; setp.lt.u32 %p1, %r0, 9;
    @%p1 call (%r1), subtract, (%r0, 100); mov.b32 %r2, 1; call nothing;
    """)
    lanes = np.arange(32)
    np.testing.assert_array_equal(got[:, 0], np.where(lanes < 9, lanes - 100, 5).astype(np.uint32))


def test_a_register_for_a_param():
    got = out("mov.u32 %r0, %tid.x; call (%r1), triple, (%r0); mov.b32 %r2, 0;")
    np.testing.assert_array_equal(got[:, 0], 3 * np.arange(32))


@pytest.mark.parametrize(
    ("body", "message"),
    [("call (%r1), elsewhere, (%r0);", "call of elsewhere"), ("call forever, (%r0);", "call of forever")],
)
def test_what_cannot_be_called(body, message):
    with pytest.raises(UnknownInstructionError, match=message):
        out(body)


BRANCH = """
mov.u32 %r0, %tid.x; and.b32 %r3, %r0, 3; mov.b32 %r1, 9; mov.b32 %r2, 0; setp.lt.u32 %p1, %r0, LIMIT;
targets: .branchtargets A, B, A, C;
@%p1 brx.idx %r3, targets;
bra END;
A: mov.b32 %r1, 1; bra END;
B: mov.b32 %r1, 2; bra END;
C: mov.b32 %r1, 3;
END:
"""


def test_a_branch_by_index():
    lanes = np.arange(32)
    want = np.where(lanes < 20, np.array([1, 2, 1, 3])[lanes & 3], 9)
    np.testing.assert_array_equal(out(BRANCH.replace("LIMIT", "20"))[:, 0], want)


def test_an_index_past_the_list():
    with pytest.raises(Fault, match=r"trap was executed\n.*brx.idx"):
        out(BRANCH.replace("LIMIT", "20").replace("%r0, 3", "%r0, 7"))


def test_128_bit_registers():
    rng = np.random.default_rng(3)
    low, high = rng.integers(0, 2**64, (2, 32), np.uint64)
    body = """
    .reg .b128 %x; .reg .b128 %y;
    mov.b128 %x, {$a, $b}; setp.ne.u64 %p1, $a, 1; @%p1 mov.b128 %y, %x; mov.b128 {$d, _}, %y;
    """
    np.testing.assert_array_equal(lanewise(body, np.uint64, low, high), low)
    np.testing.assert_array_equal(lanewise(body.replace("{$d, _}", "{_, $d}"), np.uint64, low, high), high)


@pytest.mark.parametrize("space", ["shared", "global"])
def test_128_bit_accesses(space):
    data, got = np.random.default_rng(4).integers(0, 2**64, (2, 64), np.uint64)
    run(
        """
        .reg .b128 %x; mov.u32 %r0, %tid.x; mul.wide.u32 %rd0, %r0, 16; ld.param.b64 %rd1, [data];
        add.s64 %rd1, %rd1, %rd0; ld.global.b128 %x, [%rd1];
        mov.b32 %r1, x; shl.b32 %r2, %r0, 4; add.s32 %r1, %r1, %r2; st.shared.b128 [%r1], %x;
        bar.warp.sync -1; xor.b32 %r1, %r1, 16; ld.shared.b128 %x, [%r1];
        add.s64 %rd1, %rd63, %rd0; st.global.b128 [%rd1], %x;
        """,
        got, data, params=".param .u64 data", shared=".shared .align 16 .b8 x[512];",
    )  # fmt: skip
    np.testing.assert_array_equal(got.reshape(32, 2), data.reshape(16, 2, 2)[:, ::-1].reshape(32, 2))


@pytest.mark.parametrize(
    ("load", "store"),
    [
        ("ld.global.nc.L1::no_allocate.L2::evict_first.L2::256B.v8.b32 {R0}", "st.global.L1::no_allocate.v8.b32 {R1}"),
        ("ld.relaxed.gpu.global.v4.b64 {D0}", "st.global.v4.b64 {D1}"),
    ],
)
def test_256_bits_at_once(load, store):
    data = np.random.default_rng(5).integers(0, 2**32, 256, np.uint32)
    got = np.zeros(288, np.uint32)
    got = got[(-got.__array_interface__["data"][0] % 32) // 4 :][:256]
    source = np.zeros(288, np.uint32)
    source = source[(-source.__array_interface__["data"][0] % 32) // 4 :][:256]
    source[:] = data
    words = {"R": ", ".join(f"%r{n}" for n in range(10, 18)), "D": ", ".join(f"%rd{n}" for n in range(10, 14))}
    for k, v in words.items():
        load, store = load.replace(f"{k}0", v), store.replace(f"{k}1", v)
    op, registers = load.split(" ", 1)
    to, _ = store.split(" ", 1)
    body = f"""
    mov.u32 %r0, %tid.x; mul.wide.u32 %rd0, %r0, 32; ld.param.b64 %rd1, [data]; add.s64 %rd1, %rd1, %rd0;
    {op} {registers}, [%rd1]; add.s64 %rd2, %rd63, %rd0; {to} [%rd2], {registers};
    """
    run(body, got, source, params=".param .u64 data")
    np.testing.assert_array_equal(got, data)
    with pytest.raises(UnknownInstructionError, match="32 bytes at once from global memory on sm_90a"):
        run(body, got, source, params=".param .u64 data", arch="sm_90a")
