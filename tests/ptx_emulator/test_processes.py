"""Clusters over several processes: what one process leaves behind, or a refusal."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ptx_emulator
from fp4suite import testing
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm100 as sm100
from ptx_emulator import Fault, UnknownInstructionError, emulate
from ptx_emulator.errors import ProcessError

from .ptx import module

PLACE = "mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %tid.x;\n"


def launch(body: str, out, processes: int, *args, params: str = "", grid: int = 6, **kw):
    text = module(body, ".param .u64 out" + (", " + params if params else ""))
    loaded = ptx_emulator.load(text)
    return loaded.launch("k", grid=(grid,), block=(32,), args=[out, *args], processes=processes, **kw)


@pytest.fixture(autouse=True)
def _nobody_stays_behind():
    others = multiprocessing.active_children()  # compilers that tests of other folders share
    yield
    assert not [child for child in multiprocessing.active_children() if child not in others]


@pytest.mark.parametrize("processes", [2, 3, 100])
def test_neighbouring_bytes_of_two_processes_both_survive(processes):
    # CTA c writes bytes c, c + 6, c + 12, ... of 192
    body = (
        PLACE + "mad.lo.u32 %r2, %r1, 6, %r0;\ncvt.u64.u32 %rd1, %r2;\nadd.u64 %rd1, %rd1, %rd63;\n"
        "add.u32 %r3, %r2, 3;\nst.global.u8 [%rd1], %r3;"
    )
    out = np.zeros(200, np.uint8)
    stats = launch(body, out, processes)
    assert np.array_equal(out[:192], (np.arange(192) + 3).astype(np.uint8))
    assert not out[192:].any()
    alone = launch(body, np.zeros(200, np.uint8), 1)
    assert stats.to_json() == alone.to_json()


def test_later_clusters_win_as_in_one_process():
    body = PLACE + "add.u32 %r2, %r0, 1;\nsetp.lt.u32 %p1, %r0, 4;\n@%p1 st.global.u32 [%rd63], %r2;"
    body += "setp.eq.u32 %p2, %r0, 5;\n@%p2 st.global.u32 [%rd63+4], 0;"  # what was there already
    for processes in (1, 2, 3, 6):
        out = np.array([77, 0], np.uint32)
        launch(body, out, processes, races=False)
        assert out.tolist() == [4, 0]


FAULTS = {
    "out of bounds": (
        "setp.lt.u32 %p1, %r0, 3;\n@%p1 bra OK;\nld.global.u32 %r5, [%rd63+4096];\nOK:",
        Fault, r"in no array that is known.*\n  CTA \(3, 0, 0\) warp 0, PTX line \d+: ld\.global",
    ),
    "unknown": (
        "setp.lt.u32 %p1, %r0, 2;\n@%p1 bra OK;\nfoo.u32 %r5, %r6;\nOK:",
        UnknownInstructionError, r"does not know foo\.u32\n  CTA \(2, 0, 0\) warp 0, PTX line \d+: foo\.u32 %r5, %r6",
    ),
    "deadlock": (
        "setp.ne.u32 %p1, %r0, 1;\n@%p1 bra OK;\nbar.sync 1, 64;\nOK:",
        ptx_emulator.DeadlockError, r"deadlock in cluster \(1, 0, 0\).*\n.*waits at barrier 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_comes_through_as_it_was(name):
    body, kind, message = FAULTS[name]
    body = PLACE + "mul.wide.u32 %rd1, %r0, 4;\nadd.u64 %rd1, %rd1, %rd63;\nst.global.u32 [%rd1], 9;\n" + body
    seen = []
    for processes in (1, 2, 6):
        out = np.zeros(6, np.uint32)
        with pytest.raises(kind) as caught:
            launch(body, out, processes, races=False)
        assert type(caught.value) is kind
        assert re.search(message, str(caught.value))
        text = re.sub(r"0x[0-9a-f]+", "0x", str(caught.value))
        seen.append((text, out.tolist()))
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][1].count(0)  # what came after the fault did not happen


REFUSED = {
    "an atomic operation": "atom.global.add.u32 %r5, [%rd63], 1;",
    "a generic one": "atom.add.u32 %r5, [%rd63], 1;",
    "a flag that is waited for": "ld.acquire.gpu.global.u32 %r5, [%rd63];",
    "a flag that is set": "st.release.gpu.global.u32 [%rd63], 1;",
    "a volatile load": "ld.volatile.global.u32 %r5, [%rd63];",
}


@pytest.mark.parametrize("name", REFUSED)
def test_clusters_that_communicate_are_refused(name):
    out = np.zeros(8, np.uint32)
    launch(REFUSED[name], out, 1)
    out[:] = 0
    opcode = re.escape(REFUSED[name].split()[0])
    with pytest.raises(ValueError, match=rf"k, PTX line \d+: {opcode}.*in one process \(processes=1\)"):
        launch(REFUSED[name], out, 2)
    assert not out.any()


def test_what_a_cluster_read_of_another_is_found_afterwards():
    # CTA c adds one to what CTA c - 1 left in place c - 1
    body = PLACE + (
        "mul.wide.u32 %rd1, %r0, 4;\nadd.u64 %rd1, %rd1, %rd63;\nld.global.u32 %r5, [%rd1];\nadd.u32 %r5, %r5, 1;\n"
        "st.global.u32 [%rd1+4], %r5;"
    )
    out = np.zeros(7, np.uint32)
    launch(body, out, 1)
    assert out.tolist() == [0, 1, 2, 3, 4, 5, 6]
    out[:] = 0
    with pytest.raises(
        ValueError, match=r"clusters \(3, 0, 0\) to \(5, 0, 0\) read bytes of out from .* that clusters"
    ):
        launch(body, out, 2)
    assert not out.any()


def test_reductions_of_each_cluster_in_its_own_place_are_allowed():
    add = "red.global.add.u32 [%rd1], 5;"
    own = PLACE + f"mul.wide.u32 %rd1, %r0, 4;\nadd.u64 %rd1, %rd1, %rd63;\n{add}"
    for processes in (1, 3):
        out = np.arange(6, dtype=np.uint32)
        launch(own, out, processes)
        assert out.tolist() == [5 * 32 + n for n in range(6)]
    with pytest.raises(ValueError, match="wrote: run it in one process"):
        launch(add.replace("%rd1", "%rd63"), np.zeros(1, np.uint32), 3)


def test_a_process_that_dies_is_an_error(monkeypatch):
    from ptx_emulator.machine import Launch

    run, parent = Launch.run_clusters, os.getpid()

    def die(self, places):
        run(self, places)
        if os.getpid() != parent and (3, 0, 0) in places:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Launch, "run_clusters", die)
    out = np.zeros(6, np.uint32)
    with pytest.raises(
        ProcessError, match=r"process 2 of 3, which ran clusters \(2, 0, 0\) to \(3, 0, 0\) of k, was killed by SIGKILL"
    ):
        launch("st.global.u32 [%rd63], 1;", out, 3, races=False)
    assert not out.any()


def test_ctrl_c_leaves_no_process_behind(tmp_path, interruptible):
    (tmp_path / "k.ptx").write_text(module("AGAIN:\nbra AGAIN;"))
    command = [sys.executable, "-m", "ptx_emulator", "run", "k.ptx", "--grid", "3", "--processes", "3", "--args"]
    root = str(Path(__file__).parents[2])
    for how in (signal.SIGINT, signal.SIGKILL):
        parent = subprocess.Popen(
            [*command, "zeros:u32:1"], cwd=tmp_path, env={"PYTHONPATH": root}, stderr=subprocess.DEVNULL
        )
        try:
            children = _wait(lambda pid=parent.pid: c if len(c := _children(pid)) == 3 else None)
            parent.send_signal(how)
            assert parent.wait(20) != 0
        finally:
            parent.kill()
        assert _wait(lambda children=children: not any(Path(f"/proc/{c}").exists() for c in children))


def _children(pid: int) -> list[int]:
    return [int(x) for x in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _wait(found, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.02)
    raise AssertionError("timed out")


def test_a_gemm_in_several_processes_equals_one():
    problem, config = GemmProblem(m=300, n=200, k=320, act="nvfp4"), sm100.Config(tile_n=64, mma_ctas=2, cluster_m=2)
    results = []
    for processes in (1, 3):
        case = testing.case(problem, "cpu", 4)
        with emulate("sm_100a", processes=processes, seed=5) as device:
            case.run(sm100, config)
        case.check()
        assert device.launches[0].grid[2] > 3
        results.append((case.out.clone(), device.launches[0].to_json()))
    assert results[0][0].equal(results[1][0])
    assert results[0][1] == results[1][1]
