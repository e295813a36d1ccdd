"""Deliberate faults in the PTX of the 2-CTA NVFP4 GEMM: each must end in a refusal, a hang or a wrong result.

The problem has several tiles a CTA, a ring that wraps, ragged edges and random scales, so that every line matters. A
fault counts as caught if one of the schedules shows it.
"""

import re

import pytest

from fp4suite import testing
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm100 as sm100
from ptx_emulator import Fault, emulate

PROBLEM = GemmProblem(m=300, n=264, k=64 * 25, act="nvfp4")
CONFIG = sm100.Config(tile_n=256, mma_ctas=2, cluster_m=2)
STAGE_BYTES = 2 * sm100.budget(CONFIG).stage_bytes
STAGES = sm100.budget(CONFIG).num_stages
IDESC = 1 << 7 | 1 << 10 | 256 // 8 << 17 | 256 // 128 << 27
SWIZZLED = 2 << 61 | 1 << 46 | (1024 >> 4) << 32 | 1 << 16

REG, ADDRESS = r"%r\d+", r"\[[^]]+\]"
WAIT = rf"mbarrier\.try_wait\.parity\.shared\.b64 P1, {ADDRESS}, \S+, 10000000;"
NO_WAIT = "setp.eq.u32 P1, 0, 0;"

# name: (pattern, replacement, which of the matches, -1 for all)
FAULTS = {
    "scales of a and b exchanged": (rf"(tcgen05\.mma.*), ({ADDRESS}), ({ADDRESS}), (%p\d+);", r"\1, \3, \2, \4;", 1),
    "operands a and b exchanged": (rf"(tcgen05\.mma\S+ {ADDRESS}), (%rd\d+), (%rd\d+)", r"\1, \3, \2", 2),
    "scales not copied": (r"tcgen05\.cp[^;]*;", "", 0),
    "scales copied to the wrong columns": (rf"(tcgen05\.cp\S+ \t)\[{REG}\]", r"\1[%r0]", 1),
    "k order of the scales": (rf"(add\.s32 \t{REG}, {REG}), 32;(\n\tmov\.b64 \t{{_,)", r"\1, 64;\2", 0),
    "rows 128.. of sfb from the first atom": (rf"(add\.s32 \t{REG}, {REG}), 128;(\n\tmov\.b64 \t{{_,)", r"\1, 0;\2", 0),
    "swizzle of 64 bytes for a": (str(SWIZZLED), str(SWIZZLED ^ 6 << 61), 0),
    "stride of groups of b": (str(SWIZZLED), str(SWIZZLED - (32 << 32)), 1),
    "N in the instruction descriptor": (str(IDESC), str(IDESC - (16 << 17)), 0),
    "M in the instruction descriptor": (str(IDESC), str(IDESC ^ 3 << 27), 1),
    "scales read as UE8M0": (str(IDESC), str(IDESC | 1 << 23), 2),
    "a negated": (str(IDESC), str(IDESC | 1 << 13), 3),
    "too few bytes expected": (rf", {STAGE_BYTES};", f", {STAGE_BYTES - 128};", 0),
    "too many bytes expected": (rf", {STAGE_BYTES};", f", {STAGE_BYTES + 16};", 0),
    "stage never released": (r"tcgen05\.commit[^;]*;", "", 0),
    "accumulator never handed over": (r"tcgen05\.commit[^;]*;", "", 1),
    "stage released in one CTA only": (rf"(tcgen05\.commit\S+ \t{ADDRESS}), %rs\d+", r"\1, 1", 0),
    "load without a free stage": (WAIT, NO_WAIT, 0),
    "mma without a free accumulator": (WAIT, NO_WAIT, STAGES + 1),
    "mma without a full stage": (WAIT, NO_WAIT, STAGES + 2),
    "epilogue without an accumulator": (WAIT, NO_WAIT, STAGES + 4),
    "phase of the accumulator never flips": (rf"xor\.b32 \t({REG}), \1, 1;", "", 0),
    "phase of the epilogue never flips": (rf"xor\.b32 \t({REG}), \1, 1;", "", 1),
    "phase of the ring never flips": (rf"xor\.b32 \t({REG}), \1, {REG};", "", 0),
    "ring of one stage less": (rf"(setp\.eq\.b32 \t%p\d+, {REG}), {STAGES};", rf"\1, {STAGES - 1};", 0),
    "half of the epilogue's threads expected": (r", 256;(\n\tmbarrier\.init)", r", 128;\1", 0),
    "one thread too many expected": (r", 32;(\n\tmbarrier\.init)", r", 33;\1", 0),
    "coordinates of a exchanged": (r"(cp\.async\.bulk\.tensor\.2d\.shared.*)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}", 0),
    "a row too far": (rf"(cp\.async\.bulk\.tensor\.2d\.shared.*\{{{REG}, ){REG}", r"\g<1>1", 1),
    "half of a step along k": (rf"(shl\.b32 \t{REG}, {REG}), 8;(\n\tshl\.b32 \t{REG}, {REG}, 14;)", r"\1, 7;\2", 0),
    "stages overlap": (rf"(shl\.b32 \t{REG}, {REG}, 8;\n\tshl\.b32 \t{REG}, {REG}), 14;", r"\1, 13;", 0),
    "barrier of the own CTA signalled": ("-16777224", "-8", 0),
    "lanes of the epilogue warps": (rf"(shl\.b32 \t{REG}, {REG}), 21;", r"\1, 20;", 0),
    "swizzle of the staging": (rf"(and\.b32 \t{REG}, {REG}), 112;", r"\1, 48;", -1),
    "coordinates of the store exchanged": (r"(2d\.global\.shared.*)\{(%r\d+), (%r\d+)\}", r"\1{\3, \2}", 0),
    "stored before all have written": (r"bar\.sync \t1, 128;", "", 1),
    "staging overwritten while it is stored": (r"cp\.async\.bulk\.wait_group\.read \t1;", "", 0),
    "address of tensor memory read too early": (r"bar\.sync \t2, 160;", "", 0),
    "tensor memory not given back": (r"tcgen05\.dealloc[^;]*;", "", 0),
    "tensor memory too small": (r", 512;(\n\ttcgen05\.alloc)", r", 256;\1", 0),
    "alpha added": (r"mul\.f32x2", "add.f32x2", 3),
    "neighbouring columns exchanged": (rf"(bf16x2\.f32 \t{REG}), ({REG}), ({REG});", r"\1, \3, \2;", 7),
    "accumulator released in the wrong CTA": (rf"(mapa\.shared::cluster\.u32 \t{REG}, {REG}), {REG};", r"\1, 1;", 0),
    "first mma of a tile accumulates": (rf"setp\.ne(\.b32 \t%p\d+, {REG}, 0;\n\ttcgen05\.mma)", r"setp.eq\1", 0),
    "later mma of a tile does not": (r"mov\.pred \t(%p\d+), -1;", r"mov.pred \1, 0;", 1),
    "operand not advanced along k": (rf"(add\.s32 \t{REG}, {REG}), 2;", r"\1, 0;", 0),
    "tiles skipped": (rf"mov\.u32 \t({REG}), %nctaid\.z;", r"mov.u32 \1, 2;", 0),
}  # fmt: skip


def mutated(ptx: str, pattern: str, replacement: str, which: int) -> str:
    found = list(re.finditer(pattern, ptx))
    assert len(found) > max(which, 0), f"{len(found)} matches: the kernel no longer has this line"
    for m in reversed(found if which < 0 else [found[which]]):
        ptx = ptx[: m.start()] + m.expand(replacement) + ptx[m.end() :]
    return ptx


def run(schedule: str, rewrite=None) -> None:
    case = testing.case(PROBLEM, "cpu", 4)
    with emulate("sm_100a", schedule=schedule, rewrite=rewrite):
        case.run(sm100, CONFIG)
    case.check()


@pytest.fixture(autouse=True)
def _one_cluster(monkeypatch):
    monkeypatch.setattr(sm100, "_sm_count", lambda device: 2)


@pytest.mark.parametrize("schedule", ["late", "round", "eager"])
def test_the_kernel_itself_is_right(schedule):
    run(schedule)


def test_there_are_enough():
    assert len(FAULTS) >= 40


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_caught(name):
    pattern, replacement, which = FAULTS[name]
    for schedule in ("late", "round", "eager"):
        try:
            run(schedule, lambda ptx: mutated(ptx, pattern, replacement, which))
        except Fault:
            return
        except AssertionError as e:
            if "out of bound" in str(e):
                return
            raise
    pytest.fail("right results under every schedule")
