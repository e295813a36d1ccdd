"""The command line: `python -m ptx_emulator run | list`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ptx_emulator.__main__ import main

from .ptx import module

AXPY = """
.version 8.8
.target sm_90a
.address_size 64
.visible .entry axpy(.param .f32 a, .param .u64 x, .param .u64 y, .param .u32 n)
{
.reg .pred %p<2>;
.reg .f32 %f<5>;
.reg .b32 %r<6>;
.reg .b64 %rd<6>;
.shared .align 4 .b8 unused[12];
ld.param.f32 %f1, [a];
ld.param.u64 %rd1, [x];
ld.param.u64 %rd2, [y];
ld.param.u32 %r1, [n];
mov.u32 %r2, %ctaid.x;
mov.u32 %r3, %ntid.x;
mov.u32 %r4, %tid.x;
mad.lo.s32 %r5, %r2, %r3, %r4;
setp.ge.u32 %p1, %r5, %r1;
@%p1 bra END;
mul.wide.u32 %rd3, %r5, 4;
add.s64 %rd1, %rd1, %rd3;
add.s64 %rd2, %rd2, %rd3;
ld.global.f32 %f2, [%rd1];
ld.global.f32 %f3, [%rd2];
fma.rn.f32 %f4, %f1, %f2, %f3;
st.global.f32 [%rd2], %f4;
END:
ret;
}
"""
SIZES = ["--grid", "3", "--block", "64", "--args"]


@pytest.fixture
def axpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("axpy.ptx").write_text(AXPY)
    return "axpy.ptx"


def test_arrays_go_in_and_come_out(axpy, capsys):
    y = np.arange(160, dtype=np.float32)
    np.save("y.npy", y)
    arguments = [*SIZES, "f32:2.5", "random:f32:160:7", "y.npy", "u32:160", "--out", "y=out.npy", "--out", "1=x.npy"]
    assert main(["run", axpy, "--kernel", "axpy", *arguments, "--schedule", "late", "--seed", "1"]) == 0
    x = np.random.default_rng(7).standard_normal(160).astype(np.float32)
    assert np.array_equal(np.load("x.npy"), x)
    assert np.array_equal(np.load("out.npy"), (x.astype(np.float64) * 2.5 + y).astype(np.float32))
    assert np.array_equal(np.load("y.npy"), y)  # as it was
    # five warps take no branch: 17; the sixth takes it: 10 and ret
    assert capsys.readouterr().out == "axpy: 3 CTAs of 64 threads, 96 warp instructions\n"


@pytest.mark.parametrize("options", [[], ["--processes", "2"], ["--no-races"]])
def test_statistics_as_text_and_json(axpy, capsys, options):
    arguments = ["run", axpy, *SIZES, "f32:1", "zeros:f32:32x6", "zeros:f32:192", "u32:192", *options]
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["warp_instructions"] == 6 * 17
    assert document["bytes"]["global load"] == 2 * 4 * 192
    assert main([*arguments, "--stats"]) == 0
    text = capsys.readouterr().out
    assert "grid 3 x 1 x 1 of 64 x 1 x 1 threads" in text
    assert "19 virtual registers a thread, shared 12 + 0 bytes" in text


def test_every_kind_of_scalar_and_array(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kinds = {"s8": "-1", "u16": "0xffff", "b32": "-2", "s64": "-3", "f16": "1.5", "bf16": "-2", "f64": "0.1"}
    size = {"8": 1, "6": 2, "2": 4, "4": 8}
    params = ", ".join([".param .u64 out", *(f".param .b{k.lstrip('subf')} p_{k}" for k in kinds)])
    lines, at = [], 0
    for k in kinds:
        n = size[k[-1]]
        reg = {1: "%rs1", 2: "%rs1", 4: "%r1", 8: "%rd1"}[n]
        lines += [f"ld.param.b{8 * n} {reg}, [p_{k}];", f"st.global.b{8 * n} [%rd63+{at}], {reg};"]
        at += 8
    Path("k.ptx").write_text(module("\n".join(lines), params))
    scalars = [f"{k}:{v}" for k, v in kinds.items()]
    assert main(["run", "k.ptx", "--args", "zeros:u64:7", *scalars, "--out", "0=o.npy"]) == 0
    words = [w.tobytes() for w in np.load("o.npy")]
    expected = [
        np.int8(-1), np.uint16(0xFFFF), np.int32(-2), np.int64(-3), np.float16(1.5), np.uint16(0xC000), np.float64(0.1),
    ]  # fmt: skip
    assert words == [e.tobytes().ljust(8, b"\0") for e in expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["f32:1"], "1 arguments for 4 parameters: a (4 bytes), x (8 bytes)"),
        (["f32:one", "u64:0", "u64:0", "u32:0"], "'f32:one': 'one' is not a number"),
        (["f32:1", "u64:0", "u64:0", "u32:-1"], "-1 does not fit into u32"),
        (["f32:1", "u64:0", "u64:0", "i32:1"], "type 'i32' is none of u8, u16"),
        (["f32:1", "u64:0", "u64:0", "1"], "'1' is not TYPE:VALUE, zeros:..., random:... or a file ending in .npy"),
        (["f32:1", "zeros:f32:0", "u64:0", "u32:1"], "shape '0' is not sizes joined by x"),
        (["f32:1", "zeros:f32", "u64:0", "u32:1"], "'zeros:f32' is not zeros:TYPE:SHAPE"),
        (["f32:1", "none.npy", "u64:0", "u32:1"], "No such file or directory: 'none.npy'"),
        (["f64:1", "u64:0", "u64:0", "u32:1"], "parameter a takes 4 bytes, got 8"),
        (["f32:1", "u64:0", "u64:0", "u32:0", "--out", "0=o.npy"], "argument 0 is no array"),
        (["f32:1", "u64:0", "u64:0", "u32:0", "--out", "z=o.npy"], "'z' is neither a place below 4 nor one of a, x"),
        (["f32:1", "u64:0", "u64:0", "u32:0", "--kernel", "gemm"], "no kernel 'gemm'; there are axpy"),
        (["f32:1", "u64:0", "u64:0", "u32:0", "--cluster", "2"], "grid (3, 1, 1) is not a whole number of clusters"),
        (["f32:1", "u64:0", "u64:0", "u32:0", "--processes", "0"], "processes must be 1 or more, got 0"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(axpy, capsys, arguments, message):
    assert main(["run", axpy, *SIZES, *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not out


def test_what_is_no_ptx(axpy, capsys):
    Path("bad.ptx").write_text(".version 8.8\nhello\n")
    assert main(["run", "bad.ptx"]) == 2
    assert capsys.readouterr().err == "error: PTX line 2: cannot read 'hello\\n'\n"
    with pytest.raises(SystemExit, match="2"):
        main(["run", axpy, "--grid", "0"])


@pytest.mark.parametrize("processes", ["1", "3"])
def test_a_fault_is_status_1_with_its_ptx_line(axpy, capsys, processes):
    line = 1 + AXPY[: AXPY.index("ld.global.f32 %f2")].count("\n")
    arguments = ["f32:1", "zeros:f32:64", "zeros:f32:192", "u32:192", "--processes", processes]
    assert main(["run", axpy, *SIZES, *arguments]) == 1
    err = capsys.readouterr().err
    assert "x of 256 bytes starts 256 bytes before" in err
    assert f"CTA (1, 0, 0) warp 0, PTX line {line}: ld.global.f32 %f2, [%rd1]" in err


def test_list_by_running_it(axpy):
    Path("two.ptx").write_text(AXPY.replace("fma.rn.f32 %f4", "fma.rn.f33 %f4").replace(".entry axpy", ".entry other"))
    run = [sys.executable, "-m", "ptx_emulator"]
    root = str(Path(__file__).parents[2])
    found = subprocess.run(
        [*run, "list", "two.ptx", "--json"], capture_output=True, text=True, check=True, env={"PYTHONPATH": root}
    )
    document = json.loads(found.stdout)
    (kernel,) = document["kernels"]
    assert (document["target"], kernel["name"], kernel["static_shared_bytes"]) == ("sm_90a", "other", 12)
    assert kernel["parameters"][1] == {"name": "x", "bytes": 8, "align": 8}
    assert kernel["virtual_registers"] == {"predicates": 2, "32 bits": 11, "64 bits": 6}
    assert kernel["opcodes"]["ld.global.f32"] == 2
    ((unknown,),) = ([u["text"] for u in kernel["unknown"]],)
    assert unknown == "fma.rn.f33 %f4, %f1, %f2, %f3"
    text = subprocess.run([*run, "list", axpy], capture_output=True, text=True, check=True, env={"PYTHONPATH": root})
    assert "every opcode is known" in text.stdout
    help_text = subprocess.run([*run, "run", "--help"], capture_output=True, text=True, env={"PYTHONPATH": root}).stdout
    assert "python -m ptx_emulator run axpy.ptx --grid 4 --block 128 --args" in help_text
