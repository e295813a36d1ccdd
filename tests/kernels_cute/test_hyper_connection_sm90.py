"""hyper_connection_sm90: its refusals, machine code and numbers anywhere, and its numbers on an sm_90 GPU."""

import re
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4suite import dispatch, ops, override, recording, reference, registry, table, testing
from fp4suite.built import resources, sass
from fp4suite.problem import HyperConnectionHeadProblem, HyperConnectionPostPreProblem, HyperConnectionPreProblem
from kernels_cute import (
    hyper_connection_head_sm90,
    hyper_connection_post_pre_sm90,
    hyper_connection_pre_sm90,
    hyper_connection_sm90 as kernel,
)
from kernels_cute.hyper_connection_sm90 import FN_ERROR, GROUP, STREAMS, TERMS, Config
from ptx_emulator import emulate

from .scoreboards import loads_on_their_way

PRE = HyperConnectionPreProblem(m=4096, k=7168)
POST_PRE = HyperConnectionPostPreProblem(m=4096, k=7168)
HEAD = HyperConnectionHeadProblem(m=4096, k=7168)
CONFLICTS = 8 * 8  # of a step: owners read sums of comb of two tokens, from each CTA
OPS: list[tuple[ModuleType, Any]] = [
    (hyper_connection_pre_sm90, HyperConnectionPreProblem),
    (hyper_connection_post_pre_sm90, HyperConnectionPostPreProblem),
    (hyper_connection_head_sm90, HyperConnectionHeadProblem),
]
CONFIGS = [
    pytest.param(module, kind, config, id=f"{kind.op}-{config}")
    for module, kind in OPS
    for config in testing.every(module, kind(m=800, k=7168))
]


@pytest.fixture
def one_cluster(monkeypatch):
    """Which takes all steps, and whatever is compiled keeps its PTX."""
    for function in (kernel.compiled, kernel.compiled_split):
        function.cache_clear()
    monkeypatch.setattr(kernel, "_max_clusters", lambda device, cluster: 1)
    yield
    for function in (kernel.compiled, kernel.compiled_split):
        function.cache_clear()


# --- anywhere ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (replace(PRE, x="fp32"), Config(), "4 streams in fp32: this kernel takes 4 in bf16"),
        (replace(PRE, n=2), Config(), "2 streams in bf16"),
        (replace(POST_PRE, k=7232), Config(), "k=7232 is not a multiple of 64 columns"),
        (PRE, Config(cluster=4), "32 tokens are more than 4 for each of 4 CTAs"),
        (POST_PRE, Config(cluster=8), "of 14 groups of columns of 32 tokens"),
        (POST_PRE, Config(stages=16), "6 of 7 groups of columns of 32 tokens"),
        (PRE, Config(block_m=48), "block_m=48: a step has 16 or 32 tokens"),
        (replace(HEAD, x="fp16"), Config(), "4 streams in fp16"),
        (HEAD, Config(cluster=8, stages=32), "11 of 14 groups of columns of 32 tokens"),
    ],
)
def test_refusals(problem, config, message):
    assert message in kernel.supports(problem, config)
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel.build(problem, config)


@pytest.fixture
def no_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "shipped_dir", lambda: tmp_path)
    dispatch.reread_tables()
    yield
    dispatch.reread_tables()


def test_dispatch(no_tables):
    """Few tokens, and in batch-invariant mode all, have the Triton kernel; so has what this one cannot run."""

    def chosen(problem: Any, arch: str = "sm_90a") -> str:
        return dispatch.choose_for(problem.op, problem, dispatch.Target(arch, arch)).kernel

    for _, kind in OPS:
        cute, triton = f"cute_{kind.op}_sm90", f"triton_{kind.op}"
        least = {"pre": 512, "post_pre": 256, "head": 768}[kind.op.removeprefix("hyper_connection_")]
        for k in (4096, 7168):
            few, many = kind(m=least - 1, k=k), kind(m=least, k=k)
            why = f"m={few.m}: below {least} tokens the Triton kernel is faster"
            assert kernel.supports(few, kernel.default(few)) == why
            assert [chosen(p) for p in (few, many, replace(many, m=131072))] == [triton, cute, cute]
            assert [chosen(many, "sm_100a"), chosen(replace(many, x="fp16"))] == [triton, triton]
            with dispatch.batch_invariant():
                assert {chosen(replace(many, m=m)) for m in (0, 1, few.m, least, 4096)} == {triton}
        assert chosen(kind(m=least, k=576)) == triton


def test_builds_for_its_own_architecture_only():
    with pytest.raises(ValueError, match="for sm_90a, got 'sm_100a'"):
        kernel.build(PRE, Config(), "sm_100a")


@pytest.mark.parametrize(
    ("problem", "config"),
    [
        (PRE, Config()),
        (PRE, Config(block_m=16, stages=12)),
        (POST_PRE, Config(stages=4)),
        (POST_PRE, Config(block_m=16)),
        (HEAD, Config(stages=32)),
        (HEAD, Config()),
    ],
    ids=str,
)
def test_products_stay_on_their_way(problem, config):
    """One is waited for while the next one is made, which ptxas gives up where registers are few; nothing spills;
    there are as many registers as warps ask for, and shared memory and barriers as many as are counted."""
    built = kernel.build(problem, config)
    variant = kernel.Variant.of(problem, norm=True)
    room = kernel.other_bytes(variant, config) + kernel.slots(variant, config) * config.slot_bytes
    assert built.shared_bytes <= room
    found = resources(built)
    assert found.spill_bytes == 0
    make, fold, multiply, other = kernel.HyperConnectionSm90(config, variant).registers()
    asked = config.mixing * (make + fold) + multiply + other
    assert asked <= config.threads // kernel.WARPGROUP * found.registers
    assert asked or config.block_m == 16
    code = sass(built)
    assert not loads_on_their_way(built, "LDS")
    term_empty = f"+{8 * (3 * kernel.slots(variant, config) + kernel.stages(variant, config)):#x}]"
    terms_given_back = [arrival for arrival, _ in loads_on_their_way(built, "LDSM") if term_empty in arrival]
    assert not terms_given_back
    resident = kernel.HyperConnectionSm90(config, variant).resident
    assert resident or term_empty in code
    assert len(re.findall(r"\bHGMMA\.", code)) == STREAMS * GROUP // 16
    assert re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code) == ["1"] * (STREAMS - 1) + ["0"]


@pytest.mark.parametrize("kind", [HyperConnectionPreProblem, HyperConnectionHeadProblem])
def test_terms_of_fn(kind, one_cluster):
    """Their sum is fn within 2^-17 of an element, also of what BF16 has no room for; where CTAs look for them."""
    fn = testing.case(kind(m=1, k=2 * GROUP)).operands[1]
    fn[0, :4] = torch.tensor([0.0, -(2.0**-100), 1 + 2.0**-23, 3e38])
    outputs = len(fn)
    terms = torch.full((2 * STREAMS, TERMS * outputs, GROUP // 8, 8), torch.nan, dtype=torch.bfloat16)
    with emulate("sm_90a"):
        kernel.compiled_split(2 * GROUP, outputs)(
            *kernel._pointers((kernel.Float32, kernel.BFloat16), (fn.data_ptr(), terms.data_ptr())), 0
        )
    rows, units = torch.arange(TERMS * outputs)[:, None], torch.arange(GROUP // 8)
    plain = terms[:, rows, units ^ rows % 8].reshape(2 * STREAMS, TERMS, outputs, GROUP)
    off = plain.double().sum(1).transpose(0, 1).flatten(1) - fn.double()
    assert (off.abs() <= 2.0**-17 * fn.double().abs()).all()
    assert FN_ERROR == 2.0**-17
    assert off.any()  # three terms would hold all of it


@pytest.mark.parametrize(("module", "kind"), OPS)
def test_the_bound_of_a_check_follows_the_terms(module, kind):
    """What a number within 2^-17 of each of fn's gives is right for this kernel, not for one that has all of fn."""
    case = testing.case(kind(m=2000, k=512), "cpu", 1)
    tensors = [x for x in case.operands if isinstance(x, Tensor)]
    fn = 4 if kind is HyperConnectionPostPreProblem else 1
    off = 2 * torch.rand(tensors[fn].shape, generator=torch.Generator().manual_seed(1)) - 1
    tensors[fn] = tensors[fn] * (1 + 2.0**-17 * off)
    got = getattr(reference, kind.op)(*tensors, norm_eps=testing.EPS, eps=testing.EPS)
    for x, y in zip(results(case.out), results(got), strict=True):
        x.copy_(y)
    case.launched[:] = [module, None]
    case.check()
    case.launched.clear()
    with pytest.raises(AssertionError, match="out of bound"):
        case.check()


def test_pre_in_the_emulator(one_cluster):
    """A group of columns a CTA; rows that no token has; what is not finite stays in its token; y is not normed."""
    case = testing.case(HyperConnectionPreProblem(m=13, k=512), "cpu", 1)
    h, fn, base, scale, _, *numbers = case.operands
    h[4, 3, 511], h[9, 0, 0], h[12, 1, 77] = torch.inf, torch.nan, -torch.inf
    case.poison()
    with emulate("sm_90a", schedule="late") as gpu:
        hyper_connection_pre_sm90.launch(h, fn, base, scale, None, *numbers, case.out, Config(block_m=16, cluster=8))
    bad = torch.zeros(13, dtype=torch.bool)
    bad[[4, 9, 12]] = True
    assert all(x[bad].isnan().all() for x in case.out)
    testing.assert_folded(tuple(x[~bad] for x in case.out), h[~bad], fn, base, scale, None, fn_error=FN_ERROR)
    assert [launch.bank_conflicts for launch in gpu.launches] == [0, CONFLICTS]


def test_post_pre_in_the_emulator(one_cluster):
    """Two steps, the last one ragged, in two slots for two groups of columns each; streams and a site's output are
    read where they lie, beside NaN."""
    case = testing.case(HyperConnectionPostPreProblem(m=19, k=1024), "cpu", 3)
    _, h, post, comb, fn, base, scale, weight, *numbers = case.operands
    apart = torch.full((38, STREAMS, 1024 + 24), float("nan"), dtype=h.dtype)[::2, :, 8:-16]
    apart.copy_(h)
    operands = (apart[:, 0], apart, post, comb, fn, base, scale, weight, *numbers)
    case.poison()
    with emulate("sm_90a", schedule="eager") as gpu:
        hyper_connection_post_pre_sm90.launch(*operands, case.out, Config(block_m=16, cluster=8))
    assert same_bits(case.out[0], reference.hyper_connection_post(h[:, 0], h, post, comb))
    testing.assert_folded(case.out[1:], case.out[0], fn, base, scale, weight, fn_error=FN_ERROR)
    assert [launch.bank_conflicts for launch in gpu.launches] == [0, 2 * CONFLICTS]


def test_head_in_the_emulator(one_cluster):
    """Two steps, the last one ragged; streams lie beside NaN; what is not finite stays in its token."""
    case = testing.case(HyperConnectionHeadProblem(m=19, k=1024), "cpu", 2)
    h, fn, base, scale, weight, *numbers = case.operands
    h[4, 3, 1023], h[9, 0, 0], h[17, 1, 77] = torch.inf, torch.nan, -torch.inf
    apart = torch.full((38, STREAMS, 1024 + 24), float("nan"), dtype=h.dtype)[::2, :, 8:-16]
    apart.copy_(h)
    case.poison()
    config = Config(block_m=16, cluster=8, stages=8)
    with emulate("sm_90a", schedule="late") as gpu:
        hyper_connection_head_sm90.launch(apart, fn, base, scale, weight, *numbers, case.out, config)
    bad = torch.zeros(19, dtype=torch.bool)
    bad[[4, 9, 17]] = True
    assert case.out[bad].isnan().all()
    testing.assert_folded((case.out[~bad],), h[~bad], fn, base, scale, weight, fn_error=FN_ERROR)
    assert [launch.bank_conflicts for launch in gpu.launches] == [0, 0]


@pytest.mark.parametrize("schedule", ["eager", "late"])
@pytest.mark.parametrize(("module", "kind"), OPS)
def test_steps_overlap_in_the_emulator(module, kind, schedule, one_cluster):
    """Four steps, the last one ragged, of three groups of columns in six slots: those who make a step's streams run
    as far ahead of those who fold as they can. 32 tokens a step give the same bits."""
    case = testing.case(kind(m=59, k=1536), "cpu", 4)
    got = []
    # terms that do not stay are released without a fence, behind the product that has them
    for config, races in (
        (Config(block_m=16, cluster=8, stages=4), True),
        (Config(block_m=32, cluster=8, stages=32), "strict"),
    ):
        case.poison()
        with emulate("sm_90a", schedule=schedule, races=races):
            case.launch(module, config)
        case.check()
        got.append(tuple(x.clone() for x in results(case.out)))
    assert same_bits(*got)


@pytest.mark.parametrize("problem", [PRE, POST_PRE, HEAD], ids=str)
def test_room_for_barriers(problem):
    """Of any config and width."""
    module = next(module for module, kind in OPS if isinstance(problem, kind))
    tried = 0
    for k in range(512, 16385, 512):
        for config in testing.every(module, replace(problem, k=k)):
            variant = kernel.Variant.of(replace(problem, k=k), norm=True)
            barriers = 3 * kernel.slots(variant, config) + 2 * kernel.stages(variant, config)
            assert 8 * (barriers + 2 * kernel.OWNERS + kernel.NORMS) <= kernel.BARRIER_BYTES
            tried += 1
    assert tried > 50


def results(out: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The head has one."""
    return out if isinstance(out, tuple) else (out,)


def same_bits(a: Any, b: Any) -> bool:
    pairs = zip(results(a), results(b), strict=True)
    return all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def test_nothing_to_do():
    for module, kind in OPS:
        case = testing.case(kind(m=0, k=1024), "cpu")
        case.run(module, Config())


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind", "config"), CONFIGS)
def test_configs(module, kind, config, device):
    """Sums by as many CTAs are the same to the bit."""
    case = testing.case(kind(m=800, k=7168), device, 1)
    case.run(module, config)
    case.check()
    got = tuple(x.clone() for x in results(case.out))
    case.run(module, Config(block_m=16, cluster=config.cluster))
    assert same_bits(got, case.out)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), OPS)
@pytest.mark.parametrize("k", [4096, 7168])
@pytest.mark.parametrize("m", [1, 48, 49, 4096])
def test_real_sizes(module, kind, k, m, device):
    case = testing.case(kind(m=m, k=k), device, 2)
    case.run(module, registry.default_config(module, case.problem))
    case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), OPS)
def test_a_token_is_the_same_in_any_batch(module, kind, device):
    case = testing.case(kind(m=2000, k=7168), device, 3)
    tokens = 4 if kind is HyperConnectionPostPreProblem else 1
    config = registry.default_config(module, case.problem)
    case.run(module, config)
    few = [x[900:977] if i < tokens else x for i, x in enumerate(case.operands)]
    wanted = tuple(x[900:977] for x in results(case.out))
    out = tuple(torch.full_like(x, float("nan")) for x in wanted)
    module.launch(*few, out if isinstance(case.out, tuple) else out[0], config)
    assert same_bits(wanted, out)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), OPS)
def test_the_op_runs_it_compiled_and_in_a_graph(module, kind, device):
    case, name = testing.case(kind(m=800, k=4096), device, 4), f"cute_{kind.op}_sm90"
    tensors = [x for x in case.operands if isinstance(x, Tensor)]

    def call() -> tuple[Tensor, ...]:
        return results(getattr(ops, kind.op)(*tensors, norm_eps=testing.EPS, eps=testing.EPS))

    module.warm(case.problem, registry.default_config(module, case.problem))
    case.run(module, registry.default_config(module, case.problem))  # so that `check` knows whose results these are
    graph = torch.cuda.CUDAGraph()
    with override(kernel=name), recording() as choices:
        with torch.cuda.graph(graph):
            out = call()
        compiled = torch.compile(call, fullgraph=True)()
    torch._dynamo.reset()
    assert {c.kernel for c in choices} == {name}
    for want, got in zip(results(case.out), compiled, strict=True):
        want.copy_(got)
    case.check()
    for _ in range(20):
        for x in out:
            x.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, compiled)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), OPS)
def test_two_streams_at_once(module, kind, device):
    cases = [testing.case(kind(m=600, k=7168), device, seed) for seed in (5, 6)]
    config = registry.default_config(module, cases[0].problem)
    wanted = []
    for case in cases:
        case.run(module, config)
        wanted.append(tuple(x.clone() for x in results(case.out)))
        case.poison()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in cases]
    for _ in range(20):
        for case, stream in zip(cases, streams, strict=True):
            with torch.cuda.stream(stream):
                case.launch(module, config)
    torch.cuda.synchronize()
    for case, want in zip(cases, wanted, strict=True):
        assert same_bits(want, case.out)
