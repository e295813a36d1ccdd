"""Kernels of routing and sampling: configs with every value of every knob, of those that `supports` lets through,
compile without spilling, for the two architectures in turn, and what bits and speed depend on is read from the PTX.
"""

import re

import pytest

from fp4suite import built
from fp4suite.problem import CombineProblem, PermuteProblem, RouteProblem, SampleProblem
from kernels_triton import combine, permute, permute_small, route, sample

from .checks import covering

ARCHS = ("sm_90a", "sm_100a")
KERNELS = [
    (route, RouteProblem(m=64, experts=384, topk=6)),
    (route, RouteProblem(m=64, experts=256, topk=6, choice="table")),
    (permute_small, PermuteProblem(m=64, topk=6, experts=384)),
    (permute, PermuteProblem(m=64, topk=6, experts=384)),
    (combine, CombineProblem(m=64, topk=6, k=7168)),
    (sample, SampleProblem(m=64, vocab=129280)),
]
EXACT = r"fma\.rn|cvt\.rmi\.ftz"  # of an exact division and exact sums; a floor of numbers that are not subnormal
APPROXIMATE = r"\b(?:ex2|lg2|rcp|rsqrt|div|sqrt)\.(?!rn|s|u)\S+|\S+\.ftz\S*|fma\.rn\.f32"


@pytest.mark.parametrize(("module", "problem"), KERNELS, ids=lambda x: getattr(x, "op", ""))
def test_configs_compile_without_spills(module, problem, pool):
    configs = covering(module, problem)
    assert len(configs) >= 3
    jobs = [(problem, c, ARCHS[i % 2]) for i, c in enumerate(configs)]
    for (_, config, arch), future in zip(jobs, [pool.submit(module.build, *job) for job in jobs], strict=True):
        b = future.result()
        assert b.arch == arch
        assert built.resources(b).refusal(arch) is None, (config, arch)
        rough = r"ex2\.approx|sqrt\.approx|fma\.rn" if getattr(config, "presort", False) else "nothing"
        rough = EXACT if module is sample else rough
        inexact = [found for found in re.findall(APPROXIMATE, b.ptx) if not re.match(rough, found)]
        assert not inexact, (config, arch, inexact[:3])


def parts_of_sample(problem: SampleProblem, config: sample.Config, arch: str) -> dict[str, built.Built]:
    parts = (sample._survey, sample._bound, sample._weigh, sample._finish)
    return {k.__name__: sample.build_part(k, problem, config, arch) for k in parts}


def test_every_launch_of_sample(pool):
    """For sm_100a; `test_routing_emulated` looks at what it runs of sm_90a."""
    found = pool.submit(parts_of_sample, SampleProblem(m=64, vocab=129280), sample.Config(), "sm_100a").result()
    check_parts_of_sample(found, sample.Config())


def check_parts_of_sample(found: dict[str, built.Built], config: sample.Config) -> None:
    assert set(found) == {"_survey", "_bound", "_weigh", "_finish"}
    for name, b in found.items():
        assert built.resources(b).spill_bytes <= 32, name  # what a call of the 64-bit division saves in _finish
    for name in ("_weigh", "_finish"):  # which decide
        inexact = [op for op in re.findall(APPROXIMATE, found[name].ptx) if not re.match(EXACT, op)]
        assert not inexact, (name, inexact[:3])
    held = config.chunk // (32 * config.num_warps)
    pairs = re.findall(r"fma\.rn\.f32(x2)?", found["_weigh"].ptx)  # sm_100a: two at a time
    # a logit: three of the division, and into each half of two sums; one more for the rest of the reciprocal
    assert sum(2 if pair else 1 for pair in pairs) == 7 * held + 1


@pytest.mark.parametrize(("x", "arch"), [("bf16", "sm_100a"), ("fp16", "sm_90a"), ("fp32", "sm_100a")])
def test_other_types_compile(x, arch, pool):
    jobs = [
        (route, RouteProblem(m=1, experts=8, topk=2, choice="score", x=x)),
        (combine, CombineProblem(m=1, topk=2, k=100, shared=0, x=x)),
        (sample, SampleProblem(m=1, vocab=288, x=x)),
    ]
    for future in [pool.submit(module.build, p, module.Config(), arch) for module, p in jobs]:
        assert built.resources(future.result()).refusal(arch) is None


def test_a_warp_chooses_by_its_own_instructions(pool):
    """A token a warp: a maximum and a minimum of a round are an instruction each, not five exchanges."""
    b = pool.submit(route.build, KERNELS[0][1], route.Config(), "sm_90a").result()
    assert len(re.findall(r"redux\.sync\.(?:max|min)\.s32", b.ptx)) == 2 * 6


@pytest.mark.parametrize("turns", [1, 2])
def test_candidates_in_lanes(turns, pool):
    """A candidate's way from lane to lane is a shuffle, its choice one maximum, and all loads come before the first."""
    config = route.Config(presort=True, turns=turns)
    b = pool.submit(route.build, KERNELS[0][1], config, "sm_90a").result()
    # one more than are chosen, those in doubt, and the exact choice
    assert len(re.findall(r"redux\.sync\.(?:max|min)\.s32", b.ptx)) == 6 + 1 + 1 + 2 * 6
    code = re.findall(r"/\*[0-9a-f]{4}\*/\s+(.*?);", built.sass(b))
    found = [re.search(r"LDG\.E\.128|REDUX|BAR|STS|LDS|EXIT", line) for line in code]
    marks = [mark[0] for mark in found if mark]
    marks = marks[marks.index("LDG.E.128") :]  # a program without a token may leave before
    loads = marks.index("REDUX") if turns == 1 else 6
    assert marks[:loads] == ["LDG.E.128"] * 6
    rounds = [i for i, mark in enumerate(marks) if mark == "REDUX"]
    assert rounds[7] - rounds[0] <= 7 + 3 * (turns - 1)  # nothing in between but the next token's logits


@pytest.mark.parametrize(("block_m", "num_warps", "most"), [(1, 1, 350), (1, 2, 300), (1, 4, 300), (2, 4, 310)])
def test_logits_ahead_of_a_table(block_m, num_warps, most, pool):
    """Asked for before any wait, none but the chosen ones scored, and no code of a choice by score."""
    p, config = RouteProblem(m=4, experts=384, topk=6, choice="table"), route.Config
    b = pool.submit(route.build, p, config(block_m=block_m, num_warps=num_warps, ahead=True), "sm_90a").result()
    code = re.findall(r"/\*[0-9a-f]{4}\*/\s+(.*?);", built.sass(b))
    loads = [re.search(r"LDG\.E(?:\.\d+)?", line) for line in code]
    quads = block_m * 512 // (128 * num_warps)  # loads of 16 bytes a thread
    assert [found[0] for found in loads if found] == [*["LDG.E.128"] * quads, "LDG.E.64", "LDG.E"]
    assert sum("CALL" in line for line in code) == 2  # a square root and a division: one score a thread
    assert not [line for line in code if "REDUX" in line or "VOTE" in line]
    assert len([line for line in code if not line.startswith("NOP")]) < most


def test_combine_reads_and_writes_16_bytes_at_a_time(pool):
    b = pool.submit(combine.build, KERNELS[4][1], combine.Config(), "sm_90a").result()
    assert len(re.findall(r"ld\.global\.v4\.b32", b.ptx)) == 7
    assert len(re.findall(r"st\.global\.v4\.b32", b.ptx)) == 1
