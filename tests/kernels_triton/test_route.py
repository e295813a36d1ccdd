"""route gives the reference's experts and the bits of its weights: ties, tails, infinities, tables, every size."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fp4suite import reference, testing
from fp4suite.problem import ROUTE_CHOICES, RouteProblem
from fp4suite.reference.router import affinity
from kernels_triton import route as kernel

from .checks import configs

INF, NAN = float("inf"), float("nan")


def check(
    logits: Tensor,
    topk: int,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
    config: kernel.Config | None = None,
) -> tuple[Tensor, Tensor]:
    """With exact scores, and with rough ones first where that can be: two tokens a warp, and four warps a program."""
    m = len(logits)
    config = config or kernel.Config()
    p = RouteProblem(m=m, experts=logits.shape[1], topk=topk, choice="table" if table is not None else "bias")
    for rough in (kernel.Config(presort=True, turns=2), kernel.Config(presort=True, block_m=4, num_warps=4)):
        if not config.presort and kernel.supports(p, rough) is None:
            check(logits, topk, bias, token_ids, table, rough)
    ids = torch.full((m, topk), -7, dtype=torch.int32, device=logits.device)
    weights = torch.full((m, topk), NAN, device=logits.device)
    kernel.launch(logits, bias, token_ids, table, 2.5, (ids, weights), config)
    choice = {"bias": bias, "token_ids": token_ids, "table": table}
    on_cpu = {name: x.cpu() if x is not None else None for name, x in choice.items()}
    for want in (
        reference.route(logits, topk=topk, scale=2.5, **choice),
        reference.route(logits.cpu(), topk=topk, scale=2.5, **on_cpu),
    ):
        assert torch.equal(ids.cpu(), want[0].cpu())
        torch.testing.assert_close(weights.cpu(), want[1].cpu(), rtol=0, atol=0, equal_nan=True)
    return ids, weights


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("config", configs(kernel, RouteProblem(m=1, experts=384, topk=6)), ids=str)
def test_every_config(config, device):
    """More tokens than a program has, by the tuner's cases: ties and tails in some."""
    c = testing.case(RouteProblem(m=25, experts=130, topk=6), device)
    c.run(kernel, config)
    c.check()


@pytest.mark.parametrize("choice", ROUTE_CHOICES)
def test_every_choice(choice, device):
    for config in (kernel.Config(block_m=4), kernel.Config(block_m=8, num_warps=4)):
        c = testing.case(RouteProblem(m=25, experts=384, topk=6, choice=choice), device)
        c.run(kernel, config)
        c.check()


@pytest.mark.parametrize(
    ("experts", "topk"), [(1, 1), (8, 2), (16, 16), (127, 3), (129, 8), (256, 6), (1024, 7), (300, 32)]
)
def test_every_size(experts, topk, device):
    logits = 3 * draw(5, experts).to(device)
    check(logits, topk, config=kernel.Config(block_m=2))
    check(logits, topk, draw(experts, seed=1).to(device), config=kernel.Config(block_m=4, num_warps=4))


def test_the_lowest_of_equals(device):
    """Also where the bias makes scores equal that are not, and of experts in different chunks."""
    logits = torch.zeros(3, 384)
    logits[1, 200:] = 1.0
    logits[2, [3, 130, 260, 383]] = 5.0
    ids, _ = check(logits.to(device), 6)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5], [200, 201, 202, 203, 204, 205], [3, 130, 260, 383, 0, 1]]
    bias = torch.zeros(384)
    bias[[383, 7]] = 1.0
    ids, weights = check(torch.zeros(1, 384, device=device), 3, bias.to(device))
    assert ids.tolist() == [[7, 383, 0]]
    assert weights.unique().numel() == 1  # the bias selects and does not weigh


def test_neighbours_in_rank(device):
    """Scores a unit in the last place apart: a choice by fewer bits would take others."""
    base = torch.tensor([0.7], dtype=torch.float32).view(torch.int32)
    bias = (base + torch.randperm(384, generator=torch.Generator().manual_seed(2)).int()).view(torch.float32)
    logits = torch.full((2, 384), -200.0)  # whose score is zero
    assert affinity(logits).max() == 0
    check(logits.to(device), 8, bias.to(device))


def test_ranks_that_rough_scores_confuse(device):
    """All within 1e-4, by a bias against scores of every size: rough scores order them, but not rightly."""
    base = 3 * draw(200, seed=13)
    logits = base + 3e-5 * draw(16, 200, seed=14)
    check(logits.to(device), 6, -affinity(base).to(device), config=kernel.Config(block_m=4))


def test_what_is_not_finite(device):
    logits = 2 * draw(6, 40)
    logits[0, 5], logits[0, 9] = NAN, INF
    logits[1, 39] = INF
    logits[2, :] = -INF
    logits[3, :] = NAN
    logits[4, ::2] = -INF
    logits[5, 7] = -NAN
    check(logits.to(device), 6)
    bias = draw(40, seed=3)
    bias[3], bias[4], bias[5] = -INF, INF, NAN
    check(logits.to(device), 6, bias.to(device))


def test_every_magnitude(device):
    """Where exp and log1p change course: the scores' bits, seen through weights of pairs; and against FP64."""
    edges = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 86.99, 87.0, 87.01, -86.99, -87.0, -87.01, 88.8, 3e38, -3e38, 1.0])
    many = kernel.Config(block_m=16, num_warps=8)
    check(edges.view(-1, 2).to(device), 2, config=many)
    logits = torch.cat((10 * draw(600, seed=4), torch.linspace(-86, 90, 600)))
    ids, weights = check(logits.view(-1, 2).to(device), 2, config=many)
    want = affinity(logits.double()).view(-1, 2).gather(1, ids.long().cpu())
    want = 2.5 * want / (want.sum(1, keepdim=True) + 1e-20)
    torch.testing.assert_close(weights.cpu().double(), want, rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize(("turns", "warps"), [(1, 1), (1, 4), (2, 1), (4, 1)])
def test_every_token_has_a_turn(turns, warps, device):
    """Fewer tokens than programs have turns, as many, and some more."""
    config = kernel.Config(presort=True, block_m=warps, num_warps=warps, turns=turns)
    for m in (0, 1, turns * warps - 1, turns * warps, 2 * turns * warps + 1):
        check(3 * draw(m, 40, seed=m).to(device), 3, draw(40, seed=17).to(device), config=config)


@pytest.mark.parametrize("bias", [0.0, -3.0])
def test_ties_in_lanes(bias, device):
    """As many equals as candidates are ranked at once, as lanes are, and more; all in the columns of few lanes, too."""
    experts, config = 300, kernel.Config(presort=True, block_m=4, num_warps=4)
    many = (6, 7, 8, 9, 31, 32, 33, 100)
    columns = [torch.randperm(experts, generator=torch.Generator().manual_seed(i))[:n] for i, n in enumerate(many)]
    columns += [torch.tensor([0, 1, 2, 3, 128, 129, 130, 131][:n]) for n in (4, 5, 6, 8)]
    logits = 0.5 * draw(len(columns), experts, seed=18)
    for row, where in zip(logits, columns, strict=True):
        row[where] = 4.0
    added = torch.full((experts,), bias)
    check(logits.to(device), 6, added.to(device), config=config)
    for rows in logits.to(device).split(1):
        check(rows, 6, added.to(device), config=dataclasses.replace(config, block_m=1, num_warps=1, turns=2))


@triton.jit
def _rough_rows(logits_ptr, bias_ptr, rough_ptr, doubt_ptr, M, E, ROWS: tl.constexpr, BITS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * ROWS
    rows = start + tl.arange(0, ROWS)
    x = kernel._rows_of_logits(logits_ptr, E, start, M, E, ROWS, 1, 128)
    first = kernel._first_of_lanes(x, kernel._added(bias_ptr, E, True, ROWS, 1, 128), BITS, ROWS, 1, 128)
    for i in tl.static_range(4):  # all that a lane has of one chunk
        expert = (first[i] ^ (first[i] >> 31)) & ((1 << BITS) - 1)
        known = (rows < M)[:, None] & (expert < E)
        tl.store(rough_ptr + rows[:, None] * E + expert, kernel._number(first[i], BITS), mask=known)
    for j in tl.static_range(6):
        best, first = kernel._pop(first)
        if j == 0:
            hopeful = best < kernel.LARGE_KEY
    chosen = kernel._number(best, BITS)
    best, first = kernel._pop(first)
    tl.store(doubt_ptr + tl.program_id(0), kernel._doubt(rows < M, hopeful, chosen, best, BITS))


def rough(logits: Tensor, bias: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """What rough keys of ten bits for the expert stand for, and what so many rows a program leave in doubt of six."""
    m, experts = logits.shape
    out = torch.full_like(logits, NAN)
    doubt = torch.full((triton.cdiv(m, rows),), -7, dtype=torch.int32, device=logits.device)
    _rough_rows[(len(doubt),)](logits, bias, out, doubt, m, experts, ROWS=rows, BITS=10, num_warps=rows)
    return out, doubt


@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0, 1e4])
def test_rough_scores_are_as_near_as_the_choice_assumes(spread, device):
    """Half of the slack, as two scores are compared; against FP64, for logits below 2^16 and any bias."""
    logits = (spread * draw(64, 128, seed=7)).clamp(max=65535.0).to(device)
    logits[:, :16] = torch.linspace(-90, 0, 1024, device=device).view(64, 16)
    logits[:, 16], logits[:, 17], logits[:, 18] = -INF, -3e38, 65535.0
    for bias in (torch.zeros(128), draw(128, seed=8), -spread * draw(128, seed=9).abs()):
        found, _ = rough(logits, bias.to(device), 4)
        exact = affinity(logits.double()) + bias.to(device)
        slack = kernel.SLACK.value / 2 + kernel.RELATIVE_SLACK.value / 2 * exact.abs()
        assert ((found - exact).abs() < slack).all(), ((found - exact).abs() / slack).max()


def test_what_rough_scores_leave_in_doubt(device):
    """Hardly any random row; ties and neighbours until there are more candidates; infinities, NaN and huge logits
    for good, and the greatest doubt of all rows of a program.
    """
    bias = torch.zeros(128, device=device)
    _, doubt = rough(2 * draw(64, 128, seed=10).to(device), bias, 1)
    assert (doubt == 0).float().mean() > 0.9
    assert (doubt < 2).all()
    hard = 2 * draw(10, 128, seed=11)
    hard[0] = 0.0
    hard[1, :12], hard[2, :6] = 20.0, 20.0
    hard[3, 3], hard[4, 3], hard[5, 3], hard[6, 3] = NAN, -NAN, INF, 65536.0
    hard[7, 3], hard[8, 3], hard[9, :120] = -INF, -65536.0, -INF
    want = [1, 1, 0, 2, 2, 2, 2, 0, 0, 0]
    assert rough(hard.to(device), bias, 1)[1].tolist() == want
    assert rough(hard.to(device), bias, 2)[1].tolist() == [1, 2, 2, 2, 0]
    for odd in (NAN, -NAN, INF):
        bias[5] = odd
        assert (rough(2 * draw(8, 128, seed=12).to(device), bias, 1)[1] == 2).all()


@pytest.mark.parametrize("types", [(torch.int64, torch.int32), (torch.int32, torch.int64)], ids=str)
def test_tables(types, device):
    tokens = torch.tensor([0, 19, 7, 7, 3, 18]).to(device, types[0])
    table = torch.randint(40, (20, 6), generator=torch.Generator().manual_seed(5)).to(device, types[1])
    ahead = kernel.Config(num_warps=4, ahead=True), kernel.Config(block_m=4, num_warps=8, ahead=True)
    for config in (kernel.Config(block_m=4), *ahead):
        check(2 * draw(6, 40).to(device), 6, None, tokens, table, config)


@pytest.mark.parametrize("topk", [1, 2, 5, 8, 9, 32])
def test_tables_of_every_width(topk, device):
    """A tile has fewer or more rows than tokens, by how many choices fill a warp."""
    gen = torch.Generator().manual_seed(15)
    table, tokens = torch.randint(70, (30, topk), generator=gen), torch.randint(30, (7,), generator=gen)
    for config in (kernel.Config(block_m=2), kernel.Config(ahead=True), kernel.Config(block_m=16, ahead=True)):
        check(2 * draw(7, 70, seed=16).to(device), topk, None, tokens.to(device), table.to(device), config)


def test_logits_ahead_of_a_table(device):
    """Ragged experts, rows of any stride, and logits whose scores are zero, infinite or NaN."""
    experts = 130
    table = torch.randint(experts, (64, 3), generator=torch.Generator().manual_seed(6), dtype=torch.int32).to(device)
    table[:, 0] = torch.arange(64) + 66  # to the last expert
    logits = 3 * draw(64, 2 * experts, seed=7)
    logits[1], logits[2, :140], logits[3, ::2] = -200.0, INF, NAN
    tokens = torch.arange(64, device=device)
    few, many = kernel.Config(num_warps=2, ahead=True), kernel.Config(block_m=4, num_warps=16, ahead=True)
    for config in (kernel.Config(ahead=True), few, many):
        for rows in (logits[:, :experts], logits[:, 5 : 5 + experts], logits.view(128, experts)[:64]):
            check(rows.to(device), 3, None, tokens, table, config)


def test_tokens_and_experts_that_do_not_exist(device):
    """No memory is read for them; the CPU's reference refuses them."""
    table = torch.tensor([[0, 5], [8, -1]], dtype=torch.int32, device=device)
    tokens = torch.tensor([2, -1, 0, 1, 2**40], device=device)
    ids = torch.full((5, 2), -7, dtype=torch.int32, device=device)
    weights = torch.full((5, 2), NAN, device=device)
    for config in (kernel.Config(block_m=2), kernel.Config(block_m=2, num_warps=2, ahead=True)):
        kernel.launch(torch.zeros(5, 8, device=device), None, tokens, table, 1.0, (ids, weights), config)
        assert ids.tolist() == [[-1, -1], [-1, -1], [0, 5], [8, -1], [-1, -1]]
        assert weights.tolist() == [[0, 0], [0, 0], [0.5, 0.5], [0, 0], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_of_any_type_and_stride(dtype, device):
    wide = (3 * draw(12, 200)).to(device, dtype)
    for logits in (wide[::3], wide[:, 16:116], wide[1::2, 5:101]):
        check(logits, 6, config=kernel.Config(block_m=2))


def test_no_tokens(device):
    check(torch.empty(0, 16, device=device), 2)


@pytest.mark.parametrize(
    ("problem", "config", "message"),
    [
        (RouteProblem(m=1, experts=1025, topk=6), {}, "experts=1025 is over 1024"),
        (RouteProblem(m=1, experts=4, topk=5), {}, "topk=5 is not in 1 .. min(experts=4, 32)"),
        (RouteProblem(m=1, experts=64, topk=33), {}, "topk=33 is not in"),
        (RouteProblem(m=1, experts=8, topk=2, x="fp64"), {}, "logits in fp64"),
        (RouteProblem(m=1, experts=64, topk=17), {"presort": True}, "up to 16 experts, got topk=17"),
        (RouteProblem(m=1, experts=8, topk=6), {"presort": True}, "takes 8 candidates and needs more experts"),
        (RouteProblem(m=1, experts=64, topk=6), {"presort": True, "block_m": 2}, "gives each token a warp"),
        (RouteProblem(m=1, experts=64, topk=6), {"turns": 2}, "turns=2 are for presort=True and a warp a program"),
        (
            RouteProblem(m=1, experts=64, topk=6),
            {"presort": True, "block_m": 2, "num_warps": 2, "turns": 2},
            "and a warp a program",
        ),
        (RouteProblem(m=1, experts=64, topk=6), {"num_warps": 2}, "block_m=1 tokens are chosen for by a warp each"),
        (RouteProblem(m=1, experts=64, topk=6), {"block_m": 16, "num_warps": 8}, "and without them four do"),
        (RouteProblem(m=1, experts=64, topk=6, choice="table"), {"ahead": True, "num_warps": 8}, "at most four hold"),
        (RouteProblem(m=1, experts=64, topk=6), {"ahead": True}, "ahead=True is for a table's choice"),
        (RouteProblem(m=1, experts=64, topk=6, choice="table"), {"presort": True}, "for a choice by scores"),
        (
            RouteProblem(m=1, experts=384, topk=6, choice="table"),
            {"ahead": True, "block_m": 16},
            "keys a thread spill",
        ),
    ],
)
def test_refusals(problem, config, message):
    assert message in (kernel.supports(problem, kernel.Config(**config)) or "")


@pytest.mark.parametrize(
    ("m", "experts", "topk", "config"),
    [
        (0, 384, 6, {"presort": True}),
        (2047, 384, 6, {"presort": True}),
        (2048, 384, 6, {"presort": True, "turns": 2}),
        (64, 64, 16, {"presort": True}),
        (4096, 64, 17, {}),
        (4096, 8, 6, {}),
    ],
)
def test_defaults(m, experts, topk, config):
    """Rough scores first, but for many chosen or few to choose from; two tokens a warp where there are many."""
    for choice in ("score", "bias"):
        p = RouteProblem(m=m, experts=experts, topk=topk, choice=choice)
        assert kernel.default(p) == kernel.Config(**config)
        assert kernel.supports(p, kernel.default(p)) is None


@pytest.mark.gpu
@pytest.mark.parametrize("choice", ROUTE_CHOICES)
@pytest.mark.parametrize("m", [1, 64, 4096, 16384])
def test_real_sizes(m, choice, device):
    for experts in (256, 384):
        p = RouteProblem(m=m, experts=experts, topk=6, choice=choice)
        c = testing.case(p, device)
        rough = kernel.Config(presort=True)
        others = (rough, dataclasses.replace(rough, turns=4), dataclasses.replace(rough, block_m=4, num_warps=4))
        for config in (kernel.default(p), *(others if choice != "table" else ())):
            c.run(kernel, config)
            c.check()
