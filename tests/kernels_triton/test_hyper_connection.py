"""hyper_connection_pre, _post, _head and _post_pre against the reference: configs, types, strides, hard tokens, bits.

What is checked of one case: streams to the byte; coefficients and y within the error of an FP32 sum, which weights in
BF16 or TF32 would not keep to.
"""

import dataclasses
import fcntl
import itertools
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4suite import UnsupportedError, dispatch, ops, reference, registry, testing
from fp4suite.problem import (
    PROBLEMS,
    HyperConnectionHeadProblem,
    HyperConnectionPostPreProblem,
    HyperConnectionPostProblem,
    HyperConnectionPreProblem,
    Problem,
)
from kernels_triton import (
    hyper_connection,
    hyper_connection_head,
    hyper_connection_post,
    hyper_connection_post_pre,
    hyper_connection_pre,
)

FOLDS: list[tuple[ModuleType, Any]] = [
    (hyper_connection_pre, HyperConnectionPreProblem),
    (hyper_connection_head, HyperConnectionHeadProblem),
    (hyper_connection_post_pre, HyperConnectionPostPreProblem),
]
ALL = [*FOLDS, (hyper_connection_post, HyperConnectionPostProblem)]
NAMES = ["pre", "head", "post_pre", "post"]
SMALL = hyper_connection.Config(block_m=16, block_d=32, num_warps=4, fold_warps=4)


def small(module: ModuleType) -> Any:
    """A config of small tiles, so that small cases have several programs and steps."""
    if module is hyper_connection_post:
        return module.Config(block_d=256, num_warps=2)
    if module is hyper_connection_post_pre:
        return dataclasses.replace(SMALL, block_m=32)
    return SMALL


def check(module: ModuleType, problem: Problem, device: torch.device, config: Any = None, seed: int = 0) -> None:
    case = testing.case(problem, device, seed)
    config = config or small(module)
    assert module.supports(problem, config) is None
    case.run(module, config)
    case.check()


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(SMALL, **change)
        for change in (
            {},
            {"num_warps": 8, "block_d": 64},
            {"block_m": 64},
            {"block_m": 128, "num_warps": 8},
            {"programs": 1},
            {"block_d": 128, "num_stages": 2},
            {"fold_warps": 8},
            {"fold_warps": 16},
        )
    ],
    ids=str,
)
def test_every_knob(config, device):
    """Ragged in tokens and in columns of a part; blocks of tokens in turn and next to each other."""
    check(hyper_connection_pre, HyperConnectionPreProblem(m=17, k=144), device, config)


@pytest.mark.parametrize(("module", "kind"), FOLDS, ids=NAMES[:3])
def test_many_tokens(module, kind, device, monkeypatch):
    """Pairs of launches, some tokens each, the last what is left; then one for all of Sinkhorn."""
    monkeypatch.setattr(hyper_connection, "FEW", 3)
    monkeypatch.setattr(hyper_connection, "TOKENS_A_PAIR", 8)
    check(module, kind(m=19, k=48), device)


@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize(("module", "kind"), FOLDS, ids=NAMES[:3])
def test_streams_before_weights(module, kind, m, device):
    """One block of tokens, and programs next to each other."""
    check(module, kind(m=m, k=80), device, dataclasses.replace(SMALL, block_d=64, num_stages=2, ahead=True))


@pytest.mark.parametrize("config", testing.configs(hyper_connection_post), ids=str)
def test_every_config_of_post(config, device):
    problem = HyperConnectionPostProblem(m=3, k=1104)
    why = hyper_connection_post.supports(problem, config)
    if why is None:
        check(hyper_connection_post, problem, device, config)
    else:
        assert "columns a thread, not 4 to 16" in why


@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
def test_every_type(module, kind, x, device):
    check(module, kind(m=5, k=80, x=x), device)


@pytest.mark.parametrize("m", [1, 2, 16, 35])
@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
def test_tokens(module, kind, m, device):
    check(module, kind(m=m, k=48), device, seed=m)


@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
@pytest.mark.parametrize("k", [16, 1024, 1032])
def test_columns(module, kind, k, device):
    check(module, kind(m=2, k=k), device)


@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
def test_no_tokens(module, kind, device):
    testing.case(kind(m=0, k=64), device).run(module, small(module))


def strided(t: Tensor, how: str) -> Tensor:
    """The numbers of streams t [tokens, 4, k], or of rows [tokens, k], lying otherwise in memory."""
    if how == "every other token":
        wide = torch.full((2 * t.shape[0], *t.shape[1:]), torch.nan, dtype=t.dtype, device=t.device)
        wide[::2] = t
        return wide[::2]
    if how == "columns of more":
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 24), torch.nan, dtype=t.dtype, device=t.device)
        wide[..., 8:-16] = t
        return wide[..., 8:-16]
    return t.transpose(0, 1).contiguous().transpose(0, 1)  # streams first


@pytest.mark.parametrize("how", ["every other token", "columns of more", "streams first"])
@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
def test_inputs_of_any_stride(module, kind, how, device):
    case = testing.case(kind(m=5, k=80), device)
    places = [i for i, t in enumerate(case.operands) if isinstance(t, Tensor) and t.dtype == torch.bfloat16]
    operands = list(case.operands)
    for i in places:
        if operands[i].ndim == 3 or (operands[i].ndim == 2 and how != "streams first"):
            operands[i] = strided(operands[i], how)
    assert any(not t.is_contiguous() for t in operands if isinstance(t, Tensor))
    case.poison()
    module.launch(*operands, case.out, *case.tail, small(module))
    case.check()


def test_streams_that_are_one(device):
    """Before the first layer all four are the embedding: a stride of 0."""
    case = testing.case(HyperConnectionPreProblem(m=4, k=80), device)
    h, *weights = case.operands
    one = h[:, :1].expand(4, 4, 80)
    hyper_connection_pre.launch(one, *weights, case.out, SMALL)
    testing.assert_folded(case.out, one.contiguous(), *weights[:4])


@pytest.mark.parametrize(("norm_eps", "eps", "iterations"), [(1e-6, 1e-6, 1), (0.5, 0.03, 2), (0.5, 0.03, 5)])
def test_epsilons_and_iterations(norm_eps, eps, iterations, device):
    """Large ones, so that each shows where it belongs; one to several normalisations."""
    numbers = {"norm_eps": norm_eps, "eps": eps}
    case = testing.case(HyperConnectionPreProblem(m=5, k=80, x="fp32"), device)
    fold = case.operands[:5]
    hyper_connection_pre.launch(*fold, norm_eps, eps, iterations, case.out, SMALL)
    testing.assert_folded(case.out, *fold, **numbers, iterations=iterations)
    case = testing.case(HyperConnectionHeadProblem(m=5, k=80, x="fp32"), device)
    fold = case.operands[:5]
    hyper_connection_head.launch(*fold, norm_eps, eps, case.out, SMALL)
    testing.assert_folded((case.out,), *fold, **numbers)


@pytest.mark.parametrize(("module", "kind"), FOLDS, ids=NAMES[:3])
def test_without_a_norm(module, kind, device):
    case = testing.case(kind(m=5, k=80), device)
    *head, weight = case.operands[: 5 if module is not hyper_connection_post_pre else 8]
    assert weight.dtype == torch.bfloat16
    numbers = case.operands[len(head) + 1 :]
    case.poison()
    module.launch(*head, None, *numbers, case.out, small(module))
    got = case.out if isinstance(case.out, tuple) else (case.out,)
    streams = got[0] if module is hyper_connection_post_pre else head[0]
    testing.assert_folded(got[-3:], streams, *head[-3:], None)


def test_weights_of_any_magnitude_are_multiplied_whole(device):
    """All 24 bits of fn count: streams of one number each, so that a product is fn's own number, or a sum cancels."""
    k = 32
    h = torch.zeros(3, 4, k, device=device).bfloat16()
    h[0, 0, 3], h[1, 2, 5] = 1.0, -3.0
    h[2, 1, 0], h[2, 1, 1] = 1.0, -1.0
    fn = torch.randn(24, 4 * k, generator=torch.Generator().manual_seed(0)).to(device)
    fn[:, k + 1] = fn[:, k] * (1 + 2.0**-20)  # what is left of token 2 is in the last bits
    parts = hyper_connection.launch_sums(h, fn, SMALL)
    want = torch.stack([fn[:, 3], fn[:, 2 * k + 5] * -3, fn[:, k] - fn[:, k + 1]])
    outputs = [*range(1, 5), *range(8, 12), *range(16, 32)]  # where they lie: of pre, of post, of comb
    torch.testing.assert_close(parts.sum(1)[:, outputs], want, rtol=2.0**-22, atol=0)
    torch.testing.assert_close(parts.sum(1)[:, 0], torch.tensor([1.0, 9.0, 2.0], device=device), rtol=0, atol=0)


def test_logits_beyond_the_range_of_exp(device):
    """Sigmoids of 0 and 1, and a softmax of numbers whose exp is none: only differences within a row count."""
    case = testing.case(HyperConnectionPreProblem(m=5, k=80, x="fp32"), device)
    h, fn, base, _, weight, *numbers = case.operands
    base = base + 500 * torch.arange(-12, 12, device=device)
    scale = torch.tensor([30.0, 300.0, 100.0], device=device)
    hyper_connection_pre.launch(h, fn, base, scale, weight, *numbers, case.out, SMALL)
    assert all(t.isfinite().all() for t in case.out)
    testing.assert_folded(case.out, h, fn, base, scale, weight)


def test_what_is_not_finite_stays_in_its_token(device):
    """NaN in everything of the token that has it, and nothing of another token's."""
    case = testing.case(HyperConnectionPreProblem(m=6, k=80), device)
    h, *rest = case.operands
    want = [t.clone() for t in case.out]
    hyper_connection_pre.launch(h, *rest, want, SMALL)
    bad = h.clone()
    bad[0, 3, 79], bad[4, 0, 0], bad[5, 1, 33] = torch.inf, torch.nan, -torch.inf
    case.poison()
    hyper_connection_pre.launch(bad, *rest, case.out, SMALL)
    for got, clean in zip(case.out, want, strict=True):
        assert got[[0, 4, 5]].isnan().all()
        assert torch.equal(got[1:4], clean[1:4])
    case = testing.case(HyperConnectionPostProblem(m=6, k=80), device)
    y, _, *coefficients = case.operands
    hyper_connection_post.launch(y, bad, *coefficients, case.out, small(hyper_connection_post))
    plain = reference.hyper_connection_post(y, bad, *coefficients)
    torch.testing.assert_close(case.out, plain, rtol=0, atol=0, equal_nan=True)


def outputs(module: ModuleType, kind: Any, device: torch.device, config: Any) -> tuple[Any, Any]:
    case = testing.case(kind(m=37, k=48), device, seed=5)
    case.run(module, config)
    return case, case.out if isinstance(case.out, tuple) else (case.out,)


def check_rows(module: ModuleType, kind: Any, device: torch.device, config: Any) -> None:
    """Some of the tokens alone have the bits that they have among all."""
    case, whole = outputs(module, kind, device, config)
    for rows in (slice(7, 8), slice(30, 37), slice(3, 36)):
        operands = [t[rows] if isinstance(t, Tensor) and t.shape[:1] == (37,) else t for t in case.operands]
        out = tuple(torch.full_like(t[rows].contiguous(), torch.nan) for t in whole)
        module.launch(*operands, out if isinstance(case.out, tuple) else out[0], *case.tail, config)
        for part, all_of_it in zip(out, whole, strict=True):
            assert torch.equal(part, all_of_it[rows])


def test_a_token_of_post_has_the_same_bits_in_any_batch(device):
    check_rows(hyper_connection_post, HyperConnectionPostProblem, device, small(hyper_connection_post))


def test_post_pre_leaves_the_streams_of_post(device):
    case, (streams, *_) = outputs(
        hyper_connection_post_pre, HyperConnectionPostPreProblem, device, small(hyper_connection_post_pre)
    )
    alone = torch.full_like(streams, torch.nan)
    hyper_connection_post.launch(*case.operands[:4], alone, small(hyper_connection_post))
    assert torch.equal(alone, streams)


@pytest.mark.parametrize("columns", ["next to each other", "apart"])
@pytest.mark.parametrize("name", ["hyper_connection_" + name for name in NAMES])
def test_ops_run_the_kernels(name, columns, device):
    """What an op chooses on a GPU and gives it: whatever its operands' strides, and coefficients in other types."""
    kind = PROBLEMS[name]
    case = testing.case(kind(m=3, k=48), device)
    tensors = [t for t in case.operands if isinstance(t, Tensor)]
    if columns == "apart":
        tensors = [torch.stack((t, torch.full_like(t, torch.nan)), dim=-1)[..., 0] for t in tensors]
    numbers = {} if name.endswith("_post") else {"norm_eps": testing.EPS, "eps": testing.EPS}
    with dispatch.recording() as choices, dispatch.on_target("sm_90a"):
        got = getattr(ops, name)(*tensors, **numbers)
    assert [c.kernel for c in choices] == [f"triton_{name}"]
    for out, found in zip(
        case.out if isinstance(case.out, tuple) else (case.out,), got if isinstance(got, tuple) else (got,), strict=True
    ):
        assert found.is_contiguous()
        out.copy_(found)
    case.check()


def test_ops_refuse_what_does_not_fit(device):
    h, fn = torch.zeros(2, 4, 16, device=device), torch.zeros(24, 64, device=device)
    base, scale, numbers = torch.zeros(24, device=device), torch.zeros(3, device=device), {"norm_eps": 1.0, "eps": 1.0}
    for wrong, message in (
        ((h[0], fn, base, scale, None), r"h must be \[tokens, n, d\], n and d positive, got \[4, 16\]"),
        ((h, fn[:4], base, scale, None), r"h \[2, 4, 16\] needs fn \[24, 64\], got \[4, 64\]"),
        ((h, fn, base[:4], scale, None), r"needs base \[24\], got \[4\]"),
        ((h, fn, base, scale[:1], None), r"needs scale \[3\], got \[1\]"),
        ((h, fn, base, scale, base), r"needs weight \[16\], got \[24\]"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.hyper_connection_pre(*wrong, **numbers)
    with pytest.raises(ValueError, match=r"needs comb \[2, 4, 4\], got \[2, 4\]"):
        ops.hyper_connection_post(h[:, 0], h, h[:, :, 0], h[:, :, 0])
    with pytest.raises(ValueError, match=r"needs fn \[4, 64\], got \[24, 64\]"):
        ops.hyper_connection_head(h, fn, base, scale, None, **numbers)
    with (
        dispatch.on_target("sm_90a"),
        pytest.raises(UnsupportedError, match="n=2: the kernels are written for 4 streams"),
    ):
        ops.hyper_connection_pre(h[:, :2], fn[:8, :32], base[:8], scale, None, **numbers)


# --- configs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "kind"), FOLDS, ids=NAMES[:3])
def test_defaults_are_supported_and_one_arithmetic_serves_any_m(module, kind):
    for k in (4096, 7168):
        for m in (0, 1, 16, 17, 64, 256, 1024, 4096, 16384, 131072):
            for x in ("bf16", "fp16", "fp32"):
                problem = kind(m=m, k=k, x=x)
                assert module.supports(problem, module.default(problem)) is None
                same = module.in_arithmetic(problem, module.INVARIANT)
                assert module.supports(problem, same) is None
                assert module.arithmetic(problem, same) == module.INVARIANT
    assert module.in_arithmetic(problem, "in some other way") is None


def test_what_was_tuned_for_few_tokens_says_nothing_about_many():
    for name in ("triton_hyper_connection_pre", "triton_hyper_connection_post_pre"):
        for m, other, alike in ((4, 64, True), (255, 256, False), (4096, 64, False), (4096, 256, True)):
            assert registry.alike(name, SMALL, m, other) is registry.alike(name, SMALL, other, m) is alike


def test_refusals():
    pre = lambda config, **dims: hyper_connection_pre.supports(  # noqa: E731
        HyperConnectionPreProblem(**({"m": 1, "k": 7168} | dims)), config
    )
    assert pre(SMALL, n=2) == "n=2: the kernels are written for 4 streams"
    assert "rows of 65536 columns spill" in pre(SMALL, k=65536)
    assert "rows of 7168 columns spill" in pre(SMALL, x="fp32")
    assert "leaves threads of 8 warps idle" in hyper_connection.supports(
        HyperConnectionPostPreProblem(m=1, k=7168), dataclasses.replace(SMALL, num_warps=8)
    )
    assert "step spills" in pre(hyper_connection.Config(block_m=128, block_d=64))
    assert "3 stages take 270336 bytes of shared memory" in pre(hyper_connection.Config(block_d=128, num_warps=8))
    ahead = dataclasses.replace(SMALL, ahead=True)
    assert "one step has no num_stages=3" in pre(ahead)
    assert "one step a program, not 4" in pre(dataclasses.replace(ahead, num_stages=2), m=64)
    post = HyperConnectionPostProblem(m=1, k=7168, n=3)
    assert hyper_connection_post.supports(post, small(hyper_connection_post)) is not None


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
@pytest.mark.parametrize("k", [4096, 7168])
@pytest.mark.parametrize("m", [1, 16, 64, 1000, 4096])
def test_shapes_of_the_models(module, kind, k, m, device):
    problem = kind(m=m, k=k)
    config = module.default(problem) if hasattr(module, "default") else module.Config()
    check(module, problem, device, config)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), FOLDS, ids=NAMES[:3])
def test_every_step_on_a_gpu(module, kind, device):
    """Each step that is let through, the rest in turn."""
    problem = kind(m=130, k=7168)
    case = testing.case(problem, device)
    space = module.SPACE
    others = zip(*(itertools.cycle(space[n]) for n in ("programs", "fold_warps")), strict=False)
    ran = 0
    for step, more in zip(
        itertools.product(space["block_m"], space["block_d"], space["num_warps"]), others, strict=False
    ):
        names = ("block_m", "block_d", "num_warps", "programs", "fold_warps")
        config = module.Config(**dict(zip(names, (*step, *more), strict=True)))
        if module.supports(problem, config) is not None:
            config = dataclasses.replace(config, num_stages=2)
        if module.supports(problem, config) is None:
            case.run(module, config)
            case.check()
            ran += 1
    assert ran >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("k", [4096, 7168])
@pytest.mark.parametrize(("module", "kind"), FOLDS, ids=NAMES[:3])
def test_streams_before_weights_on_a_gpu(module, kind, k, device):
    """Blocks of tokens that programs next to each other have, the last ragged."""
    ran = 0
    for d, warps, m in itertools.product(module.SPACE["block_d"], module.SPACE["num_warps"], (3, 30)):
        problem = kind(m=m, k=k)
        config = module.Config(block_m=16, block_d=d, num_warps=warps, programs=448, num_stages=2, ahead=True)
        if module.supports(problem, config) is None:
            check(module, problem, device, config)
            ran += 1
    assert ran >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("config", [small(hyper_connection_post_pre), hyper_connection.Config()], ids=str)
@pytest.mark.parametrize(("module", "kind"), FOLDS, ids=NAMES[:3])
def test_a_token_has_the_same_bits_in_any_batch(module, kind, config, device):
    """Not under the interpreter, whose products sum as NumPy does: by the shape of what is left of a tile."""
    check_rows(module, kind, device, config)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), FOLDS[:2], ids=NAMES[:2])
def test_sinkhorn_has_the_same_bits_beside_the_fold_and_behind_it(module, kind, device, monkeypatch):
    _, beside = outputs(module, kind, device, SMALL)
    monkeypatch.setattr(hyper_connection, "FEW", 3)
    _, behind = outputs(module, kind, device, SMALL)
    for a, b in zip(beside, behind, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def much_memory():
    """One process at a time takes gigabytes, and gives them back."""
    torch.cuda.empty_cache()
    with (Path(tempfile.gettempdir()) / "fp4suite-much-memory").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.gpu
@pytest.mark.usefixtures("much_memory")
@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
def test_more_than_2_31_elements(module, kind, device):
    """The last tokens of a batch of zeros have the bits that they have alone, with one config."""
    m, k, last = 2**31 // (4 * 7168) + 3, 7168, 5
    few = testing.case(kind(m=last, k=k), device)
    few.run(module, module.Config())
    few.check()
    operands = []
    for t in few.operands:
        if isinstance(t, Tensor) and t.shape[:1] == (last,):
            many = t.new_zeros(m, *t.shape[1:])
            many[-last:] = t
            operands.append(many)
        else:
            operands.append(t)
    outs = few.out if isinstance(few.out, tuple) else (few.out,)
    got = tuple(t.new_full((m, *t.shape[1:]), torch.nan) for t in outs)
    module.launch(*operands, got if isinstance(few.out, tuple) else got[0], *few.tail, module.Config())
    for found, want in zip(got, outs, strict=True):
        assert torch.equal(found[-last:], want)


@pytest.mark.gpu
@pytest.mark.parametrize(("module", "kind"), ALL, ids=NAMES)
def test_cuda_graph(module, kind, device):
    """Captured once, replayed on new inputs."""
    problem = kind(m=64, k=7168)
    config = module.default(problem) if hasattr(module, "default") else module.Config()
    case = testing.case(problem, device)
    module.warm(problem, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.launch(module, config)
    for turn in range(3):
        for t in case.operands:
            if isinstance(t, Tensor) and t.ndim and t.shape[0] == 64:
                t.copy_(t.roll(turn + 1, 0))
        case.poison()
        graph.replay()
        torch.cuda.synchronize()
        case.check()
