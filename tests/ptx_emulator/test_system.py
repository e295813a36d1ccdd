"""vprintf and __assertfail (PTX Writer's Guide to Interoperability, "System Calls")."""

import ctypes

import numpy as np
import pytest

from ptx_emulator import Fault, UnknownInstructionError, load

from .ptx import module, run

MODULE = """
.extern .func (.param .b32 func_retval0) vprintf (.param .b64 vprintf_param_0, .param .b64 vprintf_param_1);
.extern .func __assertfail (.param .b64 a, .param .b64 b, .param .b32 c, .param .b64 d, .param .b64 e) .noreturn;
.global .align 1 .b8 word[4] = {97, 98, 99, 0};
"""
PRINT = """
.local .align 8 .b8 depot[320];
mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, LANES;
mov.b64 %rd0, depot; cvta.local.u64 %rd1, %rd0;
mov.b64 %rd2, word; cvta.global.u64 %rd3, %rd2;
mov.b64 %rd4, format; cvta.global.u64 %rd5, %rd4;
STORES
{
.param .b64 param0; .param .b64 param1; .param .b32 retval0;
st.param.b64 [param0], %rd5; st.param.b64 [param1], %rd1;
@%p0 call.uni (retval0), vprintf, (param0, param1);
ld.param.b32 %r1, [retval0];
}
mul.wide.u32 %rd7, %r0, 4; add.s64 %rd63, %rd63, %rd7; @%p0 st.global.b32 [%rd63], %r1;
"""


def printing(format: str, stores: str, lanes: int = 1, after: str = "") -> np.ndarray:
    """Arguments are stored from [%rd0] on. The status that came out of every lane, 77 where it did not print."""
    data = [*format.encode(), 0]
    extra = f"{MODULE}\n.global .align 1 .b8 format[{len(data)}] = {{{', '.join(map(str, data))}}};"
    out = np.full(32, 77, np.int32)
    run(PRINT.replace("STORES", stores).replace("LANES", str(lanes)) + after, out, extra=extra)
    return out


def printed(format: str, stores: str, capsys: pytest.CaptureFixture[str], lanes: int = 1) -> tuple[str, np.ndarray]:
    status = printing(format, stores, lanes)
    return capsys.readouterr().out, status


def test_arguments_lie_behind_each_other_at_multiples_of_their_sizes(capsys):
    body = """
    st.local.b32 [%rd0], -5; st.local.b64 [%rd0+8], 0d3FF8000000000000; st.local.b32 [%rd0+16], 200;
    st.local.b64 [%rd0+24], -7; st.local.b64 [%rd0+32], %rd3; st.local.b32 [%rd0+40], 65;
    st.local.b64 [%rd0+48], 255;
    """
    got, status = printed("%d|%f|%hhd|%lld|%s|%c|%p%%\n", body, capsys)
    assert got == "-5|1.500000|-56|-7|abc|A|0xff%\n"
    assert status.tolist() == [7] + [77] * 31


@pytest.mark.parametrize(
    ("specifier", "value"),
    [("%+5d", -3), ("%-7.3d|", 12), ("%#010x", 48879), ("% i", 4), ("%u", -1), ("%hu", -1), ("%o", 8), ("%5c", 66)],
)
def test_integers_are_printed_as_c_does(specifier, value, capsys):
    want = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).snprintf(want, 64, specifier.encode(), ctypes.c_int(value))
    got, _ = printed(specifier, f"st.local.b32 [%rd0], {value};", capsys)
    assert got == want.value.decode()


@pytest.mark.parametrize("specifier", ["%f", "%.2e", "%G", "%+9.3f|", "%-12g|", "%010.1f"])
@pytest.mark.parametrize("value", [1.0, -1234.5678, float("inf"), 3e-9])
def test_doubles_are_printed_as_c_does(specifier, value, capsys):
    want = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).snprintf(want, 64, specifier.encode(), ctypes.c_double(value))
    bits = np.float64(value).view(np.uint64)
    got, _ = printed(specifier, f"st.local.b64 [%rd0], 0d{bits:016X};", capsys)
    assert got == want.value.decode()


def test_width_and_precision_from_the_arguments(capsys):
    body = "st.local.b32 [%rd0], 8; st.local.b32 [%rd0+4], 2; st.local.b64 [%rd0+8], 0d400921FB54442D18;"
    got, status = printed("%*.*f", body, capsys)
    assert got == "    3.14"
    assert status[0] == 3


def test_every_lane_prints_its_own_values_in_order(capsys):
    got, status = printed("%u,", "st.local.b32 [%rd0], %r0;", capsys, lanes=20)
    assert got == "".join(f"{n}," for n in range(20))
    assert status.tolist() == [1] * 20 + [77] * 12


def test_what_exceeds_32_arguments_stays_a_format(capsys):
    body = "".join(f"st.local.b32 [%rd0+{4 * n}], {n};" for n in range(33))
    got, status = printed("%d " * 33, body, capsys)
    assert got == " ".join(map(str, range(32))) + " %d "
    assert status[0] == 32


def test_no_format(capsys):
    got, status = printed("never", "mov.b64 %rd5, 0;", capsys)
    assert (got, status[0]) == ("", -1)


def test_an_unknown_conversion():
    with pytest.raises(UnknownInstructionError, match=r"conversion '%a' of vprintf\n.* lanes 0, PTX line \d+: vprintf"):
        printing("%a", "st.local.b64 [%rd0], 0;")


def test_what_was_printed_before_a_fault_comes_out(capsys):
    with pytest.raises(Fault, match="trap"):
        printing("hi", "", lanes=2, after="trap;")
    assert capsys.readouterr().out == "hihi"


@pytest.mark.parametrize("processes", [1, 3])
def test_clusters_print_one_after_another(processes, capsys):
    body = PRINT.replace("STORES", "mov.u32 %r2, %ctaid.x; st.local.b32 [%rd0], %r2;").replace("LANES", "1")
    text = module(body, extra=MODULE + ".global .align 1 .b8 format[4] = {37, 117, 32, 0};")
    load(text).launch("k", grid=(5,), block=(32,), args=[np.zeros(32, np.int32)], processes=processes)
    assert capsys.readouterr().out == "0 1 2 3 4 "


def test_arguments_outside_of_memory():
    with pytest.raises(Fault, match="local address 0x1003 is outside"):
        printing("%d", "add.s64 %rd1, %rd1, 4096;")


ASSERTION = """
mov.u32 %r0, %tid.x; setp.ne.u32 %p0, %r0, 3; @%p0 bra END;
mov.b64 %rd0, word; cvta.global.u64 %rd0, %rd0;
{
.param .b64 p0; .param .b64 p1; .param .b32 p2; .param .b64 p3; .param .b64 p4;
st.param.b64 [p0], %rd0; st.param.b64 [p1], %rd0; st.param.b32 [p2], 12; st.param.b64 [p3], 0; st.param.b64 [p4], 1;
call.uni __assertfail, (p0, p1, p2, p3, p4);
}
END:
"""


def test_a_failed_assertion():
    out = np.zeros(1, np.int32)
    line = 1 + (text := module(ASSERTION, extra=MODULE))[: text.index("call.uni")].count("\n")
    with pytest.raises(Fault, match=rf"assertion failed: abc, abc:12, \?\n.*lanes 3, PTX line {line}: "):
        run(ASSERTION, out, extra=MODULE)
