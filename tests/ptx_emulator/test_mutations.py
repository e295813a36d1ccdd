"""Deliberate faults in the PTX of our NVFP4 GEMMs: each must end in a refusal, a hang or a wrong result.

The problems have a ring that wraps, ragged edges and random scales (the 2-CTA one also several tiles a CTA), so that
every line matters. A fault counts as caught if one of the schedules shows it; a hazard must be refused under each.
"""

import re
from collections.abc import Callable

import pytest

from fp4suite import testing
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90 as sm90, gemm_nvfp4_sm100 as sm100
from ptx_emulator import Fault, emulate
from ptx_emulator.hazards import Checks
from ptx_emulator.machine import SCHEDULES

PROBLEM = GemmProblem(m=250, n=264, k=64 * 13, act="nvfp4")
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

# name: (pattern, replacement, which, what the refusal says)
LOADED = r"tensor memory .* is written, with no order after it was read by tcgen05\.ld"
UNFENCED = r"tensor memory .* is read, with no order after it was written by tcgen05\.mma.*no tcgen05\.fence"
HAZARDS = {
    "staging not fenced for its store": (r"fence\.proxy\.async\.shared::cta;", "", 0, "no proxy fence"),
    "mbarriers not fenced for the cluster": (r"fence\.mbarrier_init\.release\.cluster;", "", -1, "an mbarrier is used"),
    "end before the last store has read": (r"cp\.async\.bulk\.wait_group\.read \t0;", "", 0, "its shared memory gone"),
    "accumulator given back while it is loaded": (r"tcgen05\.wait::ld\.sync\.aligned;", "", 0, LOADED),
}

# every tcgen05.fence of the kernel. Its arrivals release and its waits acquire, which the ISA lets pass for order among
# tcgen05 operations too, so that these are faults by the letter of "strict" alone.
FENCES = {
    "mma not fenced from the loads before": (r"tcgen05\.fence::after_thread_sync;", "", 0, LOADED),
    "load not fenced from the mmas before": (r"tcgen05\.fence::after_thread_sync;", "", 1, UNFENCED),
    "loads not fenced from the mmas behind": (r"tcgen05\.fence::before_thread_sync;", "", 0, LOADED),
}

SM90_PROBLEM = GemmProblem(m=70, n=72, k=64 * 7, act="bf16")
SM90_CONFIG = sm90.Config()

SM90_FAULTS = {
    "half of the scales": (r"0x3232", "0x1010", 0),
    "scale of the other half": (rf"(prmt\.b32 {REG}, {REG}, {REG}), 0x3232", r"\1, 0x7777", 1),
    "columns of a pair exchanged": ("0x5410", "0x7632", 0),
    "sign of a code lost": ("-2118090304", "29360576", 0),
    "exponent of a code": ("4160", "4128", 3),
    "swizzle of the activations": (rf"(and\.b32 \t{REG}, {REG}), 112;", r"\1, 48;", 1),
    "weights always in the first buffer": (rf"(and\.b32 \t{REG}, {REG}), 1024;", r"\1, 0;", 0),
    "half of a step along k": (rf"(add\.s32 \t{REG}, {REG}), 4;(\n\tmov\.b64)", r"\1, 2;\2", 0),
    "ring of one stage less": (rf"(setp\.eq\.b32 \t%p\d+, {REG}), 4;", r"\1, 3;", 0),
    "ring of one stage more": (rf"(setp\.eq\.b32 \t%p\d+, {REG}), 4;", r"\1, 5;", 1),
    "load too few": (rf"(setp\.le\.s32 \t%p\d+, {REG}), {REG};", r"\1, 6;", 0),
    "tail mask of the rows dropped": (rf"(setp\.ge\.s32 \t%p\d+, {REG}), %r62;", r"\1, 2147483647;", 9),
    "tail mask of the columns dropped": (rf"(setp\.ge\.s32 \t%p\d+, {REG}), %r63;", r"\1, 2147483647;", 0),
    "one row more": (rf"(setp\.ge\.s32 \t%p\d+, {REG}), %r62;", r"\1, 71;", 0),
    "all but the last step dropped": (r"setp\.ne\.b32 p, (%r\d+), 0;", r"setp.ne.b32 p, \1, \1;", 0),
    "alpha left out": (rf"mul\.f32 \t({REG}), ({REG}), %r24;", r"mov.b32 \t\1, \2;", 5),
    "results not waited for": (r"wgmma\.wait_group\.sync\.aligned \t0;", "", 1),
}  # fmt: skip

SM90_HAZARDS = {
    "weights not fenced for wgmma": (r"fence\.proxy\.async\.shared::cta;", "", 0, "no proxy fence"),
    "weights not written by all": (r"bar\.sync \t0;(\n\twgmma\.fence)", r"\1", 0, "data race|never written"),
    "weights overwritten under a wgmma": (r"(wgmma\.wait_group\.sync\.aligned) \t0;", r"\1 1;", 0, "data race"),
    "stage not waited for": (r"cp\.async\.wait_group \t2;", "cp.async.wait_group 3;", 0, "data race|never written"),
}  # fmt: skip

KERNELS = {
    "sm_100a": (sm100, PROBLEM, CONFIG),
    "sm_90a": (sm90, SM90_PROBLEM, SM90_CONFIG),
}
ALL_FAULTS = [("sm_100a", name, *x) for name, x in FAULTS.items()]
ALL_FAULTS += [("sm_90a", name, *x) for name, x in SM90_FAULTS.items()]
ALL_HAZARDS = [("sm_100a", name, *x) for name, x in HAZARDS.items()]
ALL_HAZARDS += [("sm_90a", name, *x) for name, x in SM90_HAZARDS.items()]


def mutated(ptx: str, pattern: str, replacement: str, which: int) -> str:
    found = list(re.finditer(pattern, ptx))
    assert len(found) > max(which, 0), f"{len(found)} matches: the kernel no longer has this line"
    for m in reversed(found if which < 0 else [found[which]]):
        ptx = ptx[: m.start()] + m.expand(replacement) + ptx[m.end() :]
    return ptx


def assert_caught(run_under: Callable[[str], None]) -> None:
    """Some schedule ends in a refusal, or in numbers that the case's check calls wrong."""
    for schedule in ("late", "round", "eager"):
        try:
            run_under(schedule)
        except Fault:
            return
        except AssertionError as e:
            if "out of bound" in str(e):
                return
            raise
    pytest.fail("right results under every schedule")


def run(arch: str, schedule: str, rewrite=None, races: Checks = True) -> None:
    kernel, problem, config = KERNELS[arch]
    case = testing.case(problem, "cpu", 4)
    with emulate(arch, schedule=schedule, rewrite=rewrite, races=races):
        case.run(kernel, config)
    case.check()


@pytest.fixture(autouse=True)
def _one_cluster(monkeypatch):
    monkeypatch.setattr(sm100, "_sm_count", lambda device: 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("arch", KERNELS)
def test_the_kernel_itself_is_right(arch, schedule):
    run(arch, schedule)


def test_there_are_enough():
    assert len(FAULTS) >= 40
    assert len(ALL_FAULTS) + len(ALL_HAZARDS) >= 65


@pytest.mark.parametrize(
    ("arch", "name", "pattern", "replacement", "which"), ALL_FAULTS, ids=[x[1] for x in ALL_FAULTS]
)
def test_fault_is_caught(arch, name, pattern, replacement, which):
    assert_caught(lambda schedule: run(arch, schedule, lambda ptx: mutated(ptx, pattern, replacement, which)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("arch", "name", "pattern", "replacement", "which", "says"), ALL_HAZARDS, ids=[x[1] for x in ALL_HAZARDS]
)
def test_hazard_is_refused_under_every_schedule(arch, name, pattern, replacement, which, says, schedule):
    with pytest.raises(Fault, match=f"(?s){says}"):
        run(arch, schedule, lambda ptx: mutated(ptx, pattern, replacement, which))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("pattern", "replacement", "which", "says"), FENCES.values(), ids=list(FENCES))
def test_every_tcgen05_fence_is_wanted_by_the_letter(pattern, replacement, which, says, schedule):
    with pytest.raises(Fault, match=f"(?s){says}"):
        run("sm_100a", schedule, lambda ptx: mutated(ptx, pattern, replacement, which), "strict")


def test_the_fences_are_all_there_are():
    seen: list[str] = []
    run("sm_100a", "round", lambda ptx: seen.append(ptx) or ptx, "strict")
    assert sum(ptx.count("tcgen05.fence::") for ptx in seen) == len(FENCES)
    assert sum(ptx.count("tcgen05.wait::") for ptx in seen) == 1
