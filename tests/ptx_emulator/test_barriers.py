"""Barriers of a CTA (PTX ISA, "bar, barrier"): whose arrival completes them."""

import numpy as np
import pytest

from ptx_emulator import DeadlockError

from .ptx import run

COUNT = "mov.u32 %r0, %tid.x; {before} {barrier} red.global.add.u32 [%rd63], 1;"
HALVES = """
setp.lt.u32 %p1, %r0, 16; @%p1 bra LOW;
{barrier} bra END;
LOW: {barrier}
END:
"""
LEAVE = "setp.lt.u32 %p1, %r0, 16; @%p1 ret;"


@pytest.mark.parametrize("block", [1, 32, 40, 96])
@pytest.mark.parametrize(
    "barrier", ["barrier.sync 0;", "barrier.sync.aligned 0;", "bar.sync 0;", "barrier.sync 1, {all};"]
)
def test_a_warp_that_is_not_full_counts_as_a_whole(block, barrier):
    out = np.zeros(1, np.uint32)
    text = barrier.format(all=-(-block // 32) * 32)
    run(COUNT.format(before="", barrier=text), out, block=block)
    assert out[0] == block


@pytest.mark.parametrize("block", [32, 40, 64])
def test_threads_that_are_over_are_not_waited_for(block):
    out = np.zeros(1, np.uint32)
    run(COUNT.format(before=LEAVE, barrier="barrier.sync 0;"), out, block=block)
    assert out[0] == block - 16


@pytest.mark.parametrize("block", [32, 40])
def test_the_two_sides_of_a_branch_come_to_different_instructions(block):
    out = np.zeros(1, np.uint32)
    halves = HALVES.format(barrier="barrier.sync 0;")
    run(COUNT.format(before=halves, barrier=""), out, block=block)
    assert out[0] == block
    with pytest.raises(DeadlockError, match="16 of 64 threads"):
        run(COUNT.format(before="setp.lt.u32 %p1, %r0, 16;", barrier="@%p1 barrier.sync 0, 64;"), out)


# lanes 16 to 31 wait at the barrier when the others, which wait for another warp, come to it and are one with them
MEETING = """
setp.eq.u32 %p1, %r0, 0; @%p1 mbarrier.init.shared.b64 [flag], 1; bar.sync 1;
setp.eq.u32 %p2, %r0, 32; @%p2 mbarrier.arrive.shared.b64 _, [flag];
setp.lt.u32 %p3, %r0, 16; @!%p3 bra BARRIER;
WAIT: mbarrier.try_wait.parity.shared.b64 %p4, [flag], 0; @!%p4 bra WAIT;
BARRIER: barrier.sync 0;
"""


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_fragments_that_become_one_at_a_barrier_come_once(seed):
    out = np.zeros(1, np.uint32)
    text = COUNT.format(before=MEETING, barrier="")
    run(text, out, block=64, seed=seed, shared=".shared .align 8 .b8 flag[8];")
    assert out[0] == 64
