"""PTX text to instructions: scopes, labels, literals, operands, errors."""

import pytest

from ptx_emulator import PtxSyntaxError, load
from ptx_emulator.parser import Address, Imm, Pair, Reg, Sink, Special, Vec, parse

from . import ptx


def kernel(body: str, **kw):
    return parse(ptx.module(body, **kw)).only_kernel()


def test_scopes_hide_registers_and_labels():
    body = """
    { .reg .pred q; L: setp.ne.b32 q, %r0, 0; @q bra L; bra D; D: }
    { .reg .b32 q; L: mov.b32 q, 1; bra L; }
    """
    code = kernel(body).code
    first, second = code[1].operands[0], code[4].operands[0]
    assert isinstance(first, Reg)
    assert isinstance(second, Reg)
    assert (first.size, second.size) == (0, 4)
    assert code[2].target == 1
    assert code[2].guard is not None
    assert code[3].target == 4
    assert code[5].target == 4


def test_operands():
    body = """
    mov.b64 {%r1, _}, %rd1;
    elect.sync %r2|%p1, -1;
    st.shared.v2.b32 [%r1+-8], {%r2, %r3};
    cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd1, {%r1, %r2}];
    mov.u32 %r1, %ctaid.y;
    mov.f32 %r1, 0fBF800000;
    @!%p1 mov.b32 %r1, -0x10;
    """
    mov, elect, store, tensor, special, real, guarded = kernel(body).code[1:-1]
    assert isinstance(mov.operands[0], Vec)
    assert isinstance(mov.operands[0].items[1], Sink)
    assert isinstance(elect.operands[0], Pair)
    assert isinstance(store.operands[0], Address)
    assert store.operands[0].offset == -8
    assert isinstance(tensor.operands[0], Address)
    assert len(tensor.operands[0].rest) == 1
    assert special.operands[1] == Special("%ctaid.y")
    assert real.operands[1] == Imm(0xBF800000, 4)
    assert guarded.guard is not None
    assert guarded.guard.negated
    assert guarded.operands[1] == Imm(-16)


def test_source_lines_and_variables():
    extra = '.global .align 4 .b32 table[3] = {1, -1, 0x10};\n.file 1 "kernel.py"'
    k = kernel(".loc 1 7 3\nmov.b32 %r1, 2;", extra=extra, shared=".shared .align 16 .b8 s[100];")
    assert k.code[1].source == ("kernel.py", 7)
    assert k.variables["table"].data == bytes([1, 0, 0, 0, 255, 255, 255, 255, 16, 0, 0, 0])
    assert k.variables["s"].size == 100


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mov.b32 %r1, %r999;", "no register '%r999'"),
        ("bra nowhere;", "no label 'nowhere'"),
        (".reg .weird x;", "register type"),
        ("mov.b32 %r1, 12ab;", "operand '12ab'"),
    ],
)
def test_errors_name_the_line(body, message):
    with pytest.raises(PtxSyntaxError, match=message) as e:
        kernel(body)
    assert "PTX line 14" in str(e.value)


def test_kernels_are_named():
    loaded = load(ptx.module(""))
    assert loaded.kernels == ["k"]
    with pytest.raises(ValueError, match="no kernel 'x'"):
        loaded.program("x")
