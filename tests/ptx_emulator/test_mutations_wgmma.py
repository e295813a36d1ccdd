"""Deliberate faults in the PTX of `gemm_nvfp4_sm90_wgmma`: each must end in a refusal, a hang or a wrong result.

Two configs: many tokens, shared by two CTAs, with tiles of the tail in parts of K; and few tokens, multiplied by three
warps a group, with parts of K in groups and CTAs. m and n are ragged, scales random, rings wrap.
"""

import pytest

from fp4suite import testing
from fp4suite.problem import GemmProblem
from kernels_cute import gemm_nvfp4_sm90_wgmma as kernel
from kernels_cute.gemm_nvfp4_sm90_wgmma import Config
from ptx_emulator import Fault, emulate
from ptx_emulator.machine import SCHEDULES

from .test_mutations import ADDRESS, NO_WAIT, REG, WAIT, assert_caught, mutated

CASES = {
    "many": (GemmProblem(m=100, n=320, k=128 * 4, segments=2, order=kernel.WEIGHT_ORDER),
             Config(tile_m=128, groups_n=1, tile_k=64, stages=3, share=2, tail=2)),
    "few": (GemmProblem(m=13, n=128, k=128 * 12, segments=2, order=kernel.WEIGHT_ORDER),
            Config(tile_m=16, groups_n=1, groups_k=2, warps=3, tile_k=128, stages=4, split=2)),
}  # fmt: skip

MEET = r"barrier\.cluster\.arrive;\n\tbarrier\.cluster\.wait;"
MAPA = rf"(mapa\.shared::cluster\.u32 (?:\t{REG}|r), {REG}), {REG};"

# case, name, pattern, replacement, which of the matches
FAULTS = [
    ("many", "load without a free stage", WAIT, NO_WAIT, 0),
    ("many", "decoded before the stage is full", WAIT, NO_WAIT, 1),
    ("many", "stage released in one CTA only", MAPA, r"\1, 0;", 0),
    ("many", "stage never released in the other step of a pair", r"mbarrier\.arrive\.shared::cluster[^;]*;", "", 1),
    ("many", "decoded over an operand that is multiplied", r"wgmma\.wait_group\.sync\.aligned \t1;", "", 0),
    ("many", "results not waited for", r"wgmma\.wait_group\.sync\.aligned \t0;", "", 0),
    ("many", "phase of the ring never flips", rf"xor\.b32 \t({REG}), \1, {REG};", "", 0),
    ("many", "too few bytes expected", ", 18688;", ", 18560;", -1),
    ("many", "multicast to one CTA", r"mov\.b16 \t(%rs\d+), 3;", r"mov.b16 \1, 1;", 1),
    ("many", "tokens of the tail to both CTAs", r"shl\.b16 \t(%rs\d+), %rs\d+, %r\d+;", r"mov.b16 \1, 3;", 1),
    ("many", "half of the tokens of the tail", r"\+9216\]", "+1024]", 1),
    ("many", "scales of the neighbouring tile", r"(shl\.b64 \t%rd\d+, %rd\d+), 8;", r"\1, 7;", 1),
    ("many", "a code from the wrong bits", rf"(shf\.r\.wrap\.b32 {REG}, {REG}, {REG}), 6;", r"\1, 5;", 2),
    ("many", "scale of the other half", "mov.b32 s, {low, low}", "mov.b32 s, {high, high}", 3),
    ("many", "stores of halves exchanged", r"(stmatrix\S+ \[%r\d+\], \{%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2", 0),
    ("many", "staging overwritten while it is stored", r"cp\.async\.bulk\.wait_group\.read \t1;", "", 2),
    ("many", "sums swapped with itself", MAPA, r"\1, 0;", 4),
    ("many", "swapped before the other CTA is there", MEET, "", 2),
    ("few", "load without a free stage", WAIT, NO_WAIT, 0),
    ("few", "multiplied before the stage is full", WAIT, NO_WAIT, 1),
    ("few", "parts added before they are there", WAIT, NO_WAIT, 2),
    ("few", "stage released by no warp", r"mbarrier\.arrive\.shared\.b64[^;]*;", "", 0),
    ("few", "the neighbour's quarter of a tile", r"(\.4d[^{]*\{%r\d+, %r\d+), %r18,", r"\1, %r20,", 0),
    ("few", "swizzle of the tokens", rf"(ldmatrix\S+ [^}}]*}}), {ADDRESS};", r"\1, [%r163];", 1),
    ("few", "tokens exchanged", rf"(mma\.sync[^}}]*}}, {{[^}}]*}}), {{({REG}), ({REG})}}", r"\1, {\3, \2}", 1),
    ("few", "a quarter of a step twice", rf"(mma\.sync[^}}]*}}), \{{{REG}, {REG}, {REG}, {REG}}}, \{{{REG}, {REG}}}",
     r"\1, {%r217, %r218, %r219, %r220}, {%r221, %r222}", 4),
    ("few", "parts sent to one CTA only", r"(mapa\.shared::cluster\.u32 \w+, %r\d+), %r420;", r"\1, 0;", -1),
    ("few", "a part sent beside its place", r"\[to\]", "[to+16]", 0),
    ("few", "too few bytes of parts expected", r"(mov\.b32 \t%r\d+), 4608;", r"\1, 3072;", 0),
    ("few", "sent before the other CTA has its barriers", r"barrier\.cluster\.wait;", "", 1),
    ("few", "alpha not waited for", r"cp\.async\.wait_group \t0;", "", 0),
]  # fmt: skip

# case, name, pattern, replacement, which, what the refusal says
HAZARDS = [
    ("many", "staging not fenced for its store", r"fence\.proxy\.async\.shared::cta;", "", 0, "no proxy fence"),
    ("many", "stored before all have written", r"bar\.sync \t1, 128;", "", 1, "data race|never written"),
    ("many", "a CTA ends before its peer has read", MEET, "", -1, "memory gone|deadlock|data race|ended"),
    ("few", "rows over parts that are not yet read", r"bar\.sync \t%r\d+, 96;", "", 0, "data race"),
    ("few", "rows read before all are there", r"bar\.sync \t%r\d+, 96;", "", 1, "data race|never written"),
]


def run(name: str, schedule: str, rewrite=None) -> None:
    problem, config = CASES[name]
    case = testing.case(problem, "cpu", 4)
    with emulate("sm_90a", schedule=schedule, rewrite=rewrite):
        case.run(kernel, config)
    case.check()


@pytest.fixture(autouse=True)
def _few_clusters(monkeypatch):
    """A round of whole tiles, and a tail."""
    monkeypatch.setattr(kernel, "_max_clusters", lambda device, config: 2)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_itself_is_right(case, schedule):
    run(case, schedule)


@pytest.mark.parametrize(
    ("case", "name", "pattern", "replacement", "which"), FAULTS, ids=[f"{x[0]}: {x[1]}" for x in FAULTS]
)
def test_fault_is_caught(case, name, pattern, replacement, which):
    assert_caught(lambda schedule: run(case, schedule, lambda ptx: mutated(ptx, pattern, replacement, which)))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("case", "name", "pattern", "replacement", "which", "says"), HAZARDS, ids=[f"{x[0]}: {x[1]}" for x in HAZARDS]
)
def test_hazard_is_refused_under_every_schedule(case, name, pattern, replacement, which, says, schedule):
    with pytest.raises(Fault, match=f"(?s){says}"):
        run(case, schedule, lambda ptx: mutated(ptx, pattern, replacement, which))
