"""Candidates: what is in a space, and what is no space."""

import dataclasses
import itertools
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from fp4suite import registry
from fp4suite.problem import GemmProblem, HyperConnectionHeadProblem
from tuner import space


def test_holds_exactly_what_supports_admits(fake, problem):
    s = space.of(GemmProblem(m=16, n=64, k=512), "sm_90a")
    assert {dict(c.knobs)["tile_n"] for c in s.candidates} == {32, 64}
    assert len(s.candidates) == 4 * 2 * 2 * 3 * 4
    assert len(space.of(problem, "sm_90a").candidates) == 4 * 4 * 2 * 3 * 4


def test_default_is_config_or_the_nearest_that_supports(fake, problem):
    assert space.of(problem, "sm_90a").default == space.default_of("fake_gemm", problem)
    near = space.of(GemmProblem(m=16, n=64, k=512), "sm_90a").default
    assert dict(near.knobs) == dict(space.default_of("fake_gemm", problem).knobs) | {"tile_n": 64}


def test_no_kernel_says_why(fake):
    with pytest.raises(space.NoKernel, match="n=40 is not a multiple of tile_n=128"):
        space.of(GemmProblem(m=16, n=40, k=512), "sm_90a")
    with pytest.raises(space.NoKernel, match="no kernel of gemm_nvfp4 for sm_100a"):
        space.of(GemmProblem(m=16, n=512, k=512), "sm_100a")


def test_neighbours_are_one_step_of_one_knob(fake, problem):
    s = space.of(problem, "sm_90a")
    around = s.neighbours(s.default)
    assert len(around) == 2 + 2 + 1 + 1 + 1  # tile_m and tile_n both ways, the others from an end
    assert all(s.steps(c, s.default) == 1 for c in around)
    assert s.nearest(s.default, list(s.candidates)) == s.default


def test_config_of_a_candidate_keeps_what_space_leaves_out(fake):
    candidate = space.Candidate("fake_gemm", (("tile_m", 16),))
    assert candidate.config == fake.Config(tile_m=16)
    assert candidate.params == {"kernel": "fake_gemm", "fake_gemm.tile_m": 16}


def test_a_large_space_is_sampled_alike_each_time_with_the_default_in_it(fake, problem, monkeypatch):
    monkeypatch.setattr(space, "MAX_CANDIDATES", 50)
    s = space.of(problem, "sm_90a")
    assert len(s.candidates) == 50
    assert s.default in s.candidates
    assert s.candidates == space.of(problem, "sm_90a").candidates


@dataclass(frozen=True, kw_only=True)
class _Config:
    tile: int = 2


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"tile": (1, 4)}, "leaves out the default, 2"),
        ({"tile": (2,), "other": (1,)}, "has other, which Config does not have"),
        ({"tile": ()}, "must have values"),
        ({"tile": (2, 2)}, "each once"),
        ({"tile": (2, (1, 2))}, "integers, strings or truth values"),
    ],
)
def test_what_is_no_space(choices, message):
    module = SimpleNamespace(__name__="m", Config=_Config, SPACE=choices)
    with pytest.raises(ValueError, match=message):
        space.checked_space(module)


def test_the_default_is_a_candidate_at_every_m_of_a_space_that_is_sampled(monkeypatch):
    monkeypatch.setattr(space, "MAX_CANDIDATES", 50)
    space._supported_at_any_m.cache_clear()
    for m in (1, 40, 256, 512, 8192):
        s = space.of(GemmProblem(m=m, n=7168, k=16384, act="bf16", order="fragments_sm90"), "sm_90a")
        assert s.default in s.candidates
    space._supported_at_any_m.cache_clear()


def test_default_is_that_of_the_architecture_that_is_tuned_for():
    """Defaults that depend on it are asked under it, on a machine that has neither."""
    problem = HyperConnectionHeadProblem(m=128, k=4096)
    stages = {arch: dict(space.of(problem, arch).default.knobs)["num_stages"] for arch in ("sm_90a", "sm_100a")}
    assert stages == {"sm_90a": 3, "sm_100a": 2}


@pytest.mark.parametrize("row", [row for row in registry.KERNELS if row.any_m], ids=lambda row: row.name)
def test_what_is_supported_at_any_m_is_at_every_m(row):
    """As the registry says of it: refusals, by their words, of every problem at one m and another."""
    module, rng = registry.load(row.name), random.Random(0)
    order = registry.weight_layout(module).order
    for act, out, n, k in itertools.product(("bf16", "fp8"), ("bf16", "fp32"), (64, 2624), (128, 7168)):
        problem = GemmProblem(m=1, n=n, k=k, act=act, out=out, order=order)
        for _ in range(300):
            config = module.Config(**{name: rng.choice(values) for name, values in module.SPACE.items()})
            said = {module.supports(dataclasses.replace(problem, m=m), config) for m in (1, 40, 512, 9001)}
            assert len(said) == 1, (problem, config, said)
