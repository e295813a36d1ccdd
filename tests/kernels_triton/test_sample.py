"""sample gives the reference's tokens: every temperature and nucleus, ties, rows without a list, what is not finite."""

import pytest
import torch
import triton.language as tl
from torch import Tensor

from fp4suite import reference, testing
from fp4suite.problem import SampleProblem
from kernels_triton import sample as kernel

from .checks import configs

INF, NAN = float("inf"), float("nan")
SMALL = kernel.Config(chunk=1024, num_warps=4)


def check(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor, config=SMALL) -> Tensor:
    out = torch.full((len(logits),), -7, dtype=torch.int64, device=logits.device)
    operands = logits, temperature.to(logits.device), top_p.to(logits.device), uniform.to(logits.device)
    kernel.launch(*operands, out, config)
    for device in {logits.device, torch.device("cpu")}:
        assert out.tolist() == reference.sample(*(x.to(device) for x in operands)).tolist()
    return out


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniforms(rows: int, seed: int = 1) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", configs(kernel, SampleProblem(m=1, vocab=9000)), ids=str)
def test_every_config(config, device):
    """Greedy, whole distributions and nuclei; the last chunk ragged."""
    c = testing.case(SampleProblem(m=4, vocab=2500), device)
    c.run(kernel, config)
    c.check()


@pytest.mark.parametrize("vocab", [1, 40, 1024, 1025])
def test_sizes(vocab, device):
    n = 6
    temperature = torch.tensor([0.0, 1.0, 0.3, 5.0, 1e-30, 1e30])
    check(3 * draw(n, vocab).to(device), temperature, torch.full((n,), 0.8), uniforms(n))


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3, 0.9, 0.999, 1 - 2.0**-24, 1.0, 2.0])
def test_every_nucleus(top_p, device):
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-24, 1.0])  # the last is no number of [0, 1)
    n = len(uniform)
    check(3 * draw(1, 300).expand(n, -1).to(device), torch.ones(n), torch.full((n,), top_p), uniform)


def test_uniform_numbers_reach_every_token(device):
    """Evenly spread numbers draw each token in proportion to its probability: the bins and the bisection miss none."""
    logits, n = torch.tensor([0.5, 2.0, -1.0, 1.2, 2.0, -2.0]), 16
    every = (torch.arange(n) + 0.5) / n
    got = check(logits.expand(n, -1).to(device), torch.ones(n), torch.ones(n), every)
    share = torch.bincount(got.cpu(), minlength=6) / n
    torch.testing.assert_close(share, torch.softmax(logits, 0), rtol=0, atol=1 / n)


def test_equal_logits_are_drawn_by_index(device):
    """Ties at the end of the nucleus and in the middle of what is kept; -0 equals 0."""
    logits = torch.tensor([0.0, 1.0, -0.0, 1.0, 0.0, 1.0, -0.0, -5.0])
    n = 8
    uniform = (torch.arange(n) + 0.5) / n
    for top_p in (0.5, 0.75, 0.9):
        check(logits.expand(n, -1).to(device), torch.ones(n), torch.full((n,), top_p), uniform)
    assert check(logits[None].to(device), torch.zeros(1), torch.ones(1), torch.zeros(1)).item() == 1


def test_a_nucleus_that_ends_at_a_whole_number_of_tokens(device):
    """Four equal tokens, half of the mass: two, not three."""
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.99])
    for top_p, want in ((0.25, [0, 0, 0, 0]), (0.5, [0, 0, 1, 1]), (0.75, [0, 1, 1, 2])):
        logits = torch.zeros(4, 4, device=device)
        assert check(logits, torch.ones(4), torch.full((4,), top_p), uniform).tolist() == want


def test_a_row_of_more_candidates_than_are_listed(device):
    """Then all of it is bisected; and one fewer, where the list is full."""
    for vocab in (kernel.LISTED, kernel.LISTED + 1):
        logits = torch.zeros(2, vocab)
        logits[1] = 1e-4 * draw(vocab)  # in one bin, all different
        check(logits.to(device), torch.ones(2), torch.tensor([0.7, 0.9]), torch.tensor([0.6, 0.3]), kernel.Config())


def test_crowds(device, monkeypatch):
    """Intervals of more tokens than are all listed, of many logits and of two: found without bisecting the row. Neither
    chunks beside the row nor one without a finite logit change that.
    """
    monkeypatch.setattr(kernel, "LISTED", 512)
    monkeypatch.setattr(kernel, "FEW", 128)
    if device.type == "cpu":
        monkeypatch.setattr(kernel, "CROWD", tl.constexpr(300.0))
        monkeypatch.setattr(kernel, "_bisect_row", None)  # it cannot be called
    logits = 3 * draw(6, 6000, seed=4)
    logits[3:] = logits[3:].round()
    logits[:, 2048:3072] = -INF
    temperature, top_p = torch.tensor([1.0, 3.0, 1.5]).repeat(2), torch.tensor([1.0, 0.95, 0.6]).repeat(2)
    check(logits.to(device), temperature, top_p, torch.tensor([0.99, 0.5, 0.9, 0.99, 0.5, 0.9]))


def test_a_bracket_that_misses_is_noticed(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(kernel, "STRAY_SHAPE", tl.constexpr(-0.1))
        monkeypatch.setattr(kernel, "STRAY_TOKENS", tl.constexpr(0.0))
    check(draw(1, 4000, seed=5).to(device), torch.tensor([2.0]), torch.tensor([0.7]), torch.tensor([0.6]))


def test_logits_that_differ_in_their_last_bit(device):
    """Neighbouring floats in one bin, in no order: only bisection of all bits tells them apart."""
    base = torch.tensor([8.0]).view(torch.int32)
    steps = torch.randperm(600, generator=torch.Generator().manual_seed(3)).int()
    logits = (base + steps).view(torch.float32).expand(8, -1)
    for top_p in (1.0, 0.37):
        check(logits.to(device), torch.full((8,), 1e-4), torch.full((8,), top_p), uniforms(8))


def test_what_is_not_finite(device):
    logits = draw(8, 60)
    logits[0, 7], logits[1, [5, 50]], logits[2, [3, 9]] = NAN, INF, NAN
    logits[3, 30:] = -INF
    logits[4] = -INF
    logits[5, 2], logits[5, 4] = -NAN, INF
    logits[6], logits[7, ::2] = NAN, -3e38
    for temperature, uniform in ((0.0, 0.9), (1.0, 0.0), (1.0, 0.7), (0.5, 1 - 2.0**-24)):
        args = torch.full((8,), temperature), torch.full((8,), 0.99), torch.full((8,), uniform)
        got = check(logits.to(device), *args)
        assert got[0] == 7
        assert got[1] in (5, 50)
        assert got[3] < 30


def test_masses_that_vanish(device):
    """Past 2^-40 of the top's mass there is none to draw, at 2^-40 there is one unit."""
    logits = -torch.linspace(0, 40, 500).expand(6, -1)
    check(logits.to(device), torch.ones(6), torch.ones(6), torch.tensor([0.0, 0.9, 1 - 2.0**-24, 0.5, 0.99, 0.999999]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_of_any_type_and_stride(dtype, device):
    wide = (4 * draw(6, 500)).to(device, dtype)
    for logits in (wide[::2], wide[:3, 7:300], wide[1::2, 5:]):
        check(logits, torch.ones(3), torch.tensor([0.5, 0.9, 1.0]), uniforms(3))


def test_rows_do_not_know_of_each_other(device):
    logits, n = 2 * draw(7, 700).to(device), 7
    args = torch.ones(n), torch.linspace(0.1, 1.0, n), uniforms(n)
    whole = check(logits, *args)
    for i in (0, 3, 6):
        assert check(logits[i : i + 1], *(x[i : i + 1] for x in args)).item() == whole[i].item()


def test_no_rows(device):
    check(torch.empty(0, 40, device=device), torch.ones(0), torch.ones(0), torch.ones(0))


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (SampleProblem(m=1, vocab=2**22 + 1), kernel.Config(), "vocab=4194305 is over 4194304"),
        (SampleProblem(m=1, vocab=2**21), SMALL, "vocab=2097152 is over 1048576"),
        (SampleProblem(m=1, vocab=9, x="fp64"), kernel.Config(), "logits in fp64"),
        (SampleProblem(m=1, vocab=9), kernel.Config(chunk=8192, num_warps=4), "64 logits a thread, not 4 to 32"),
    ],
)
def test_refusals(problem, config, message):
    assert message in (kernel.supports(problem, config) or "")


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "x"), [(1, "fp32"), (4, "bf16"), (64, "fp32"), (256, "bf16")])
def test_real_sizes(m, x, device):
    c = testing.case(SampleProblem(m=m, vocab=129280, x=x), device)
    c.run(kernel, kernel.default(c.problem))
    c.check()


@pytest.mark.gpu
def test_real_vocabulary_of_equal_logits(device):
    """The slow way, at its longest."""
    n = 16
    logits = torch.zeros(n, 129280, device=device)
    logits[1::2] = 1e-5 * torch.randn(n // 2, 129280, device=device)
    check(logits, torch.ones(n), torch.linspace(0.1, 1.0, n), uniforms(n), kernel.Config())
