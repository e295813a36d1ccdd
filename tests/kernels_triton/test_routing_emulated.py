"""What Triton compiles, run on a CPU by `ptx_emulator`: choices made by warps' instructions and approximate functions,
and barriers and scans over warps, which the interpreter does not have.
"""

import re

import numpy as np
import pytest
import torch
import triton

import ptx_emulator
from fp4suite import built, reference, testing
from fp4suite.problem import CombineProblem, PermuteProblem, RouteProblem, SampleProblem
from kernels_triton import combine, permute, permute_small, route, sample

from .checks import assert_same_numbers
from .test_routing_build import check_parts_of_sample, parts_of_sample


def launch(b: built.Built, programs: int, num_warps: int, *args: object, chunks: int = 1) -> None:
    """The kernel's own arguments; behind them Triton's two scratch pointers, which nothing here uses.

    Without the search for races: threads that hold the same number may all store it to one place.
    """
    parameters = re.findall(r"\.entry\s+\S+\(([^)]*)\)", b.ptx)[0].count(".param")
    unused = [np.zeros(16, np.uint8)] * (parameters - len(args))
    grid, block = (programs, chunks, 1), (32 * num_warps, 1, 1)
    ptx_emulator.load(b.ptx).launch(grid=grid, block=block, args=[*args, *unused], shared=b.shared_bytes, races=False)


CONFIGS = (
    route.Config(block_m=4, num_warps=2),
    route.Config(presort=True, turns=2),
    route.Config(presort=True, block_m=4, num_warps=4),
)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_route(config, pool):
    """Rough scores decide most tokens; the eighth has ties and takes exact ones, as do those with NaN or infinities.

    As many experts as in `test_routing_build`, which looks at the same code: it is compiled once."""
    m, p = 8, RouteProblem(m=8, experts=384, topk=6)
    c = testing.case(p)
    logits, bias, _, _, scale = c.operands
    logits[2, 17], logits[3, 200], logits[5, :3] = -float("nan"), float("inf"), float("nan")
    ids, weights = np.full((m, 6), -7, np.int32), np.full((m, 6), np.nan, np.float32)
    b = pool.submit(route.build, p, config, "sm_90a").result()
    sizes = (np.int32(m), *[np.int32(0)][config.presort :], np.int32(384), np.float32(scale))
    programs = triton.cdiv(m, config.block_m * config.turns)
    launch(b, programs, config.num_warps, logits.numpy(), np.int32(384), bias.numpy(), ids, weights, *sizes)
    want = c.eager()
    assert torch.equal(torch.from_numpy(ids), want[0])
    assert_same_numbers(torch.from_numpy(weights), want[1])


@pytest.mark.parametrize("config", [(2, 8), (1, 4), (1, 1)], ids=str)
def test_route_by_a_table(config, pool):
    """Logits that come ahead, of one or two tokens a program, found in shared memory, or by a warp in its registers."""
    block_m, num_warps = config
    p = RouteProblem(m=9, experts=200, topk=6, choice="table")
    config = route.Config(block_m=block_m, num_warps=num_warps, ahead=True)
    c = testing.case(p)
    logits, _, tokens, table, scale = c.operands
    ids, weights = np.full((p.m, 6), -7, np.int32), np.full((p.m, 6), np.nan, np.float32)
    b = pool.submit(route.build, p, config, "sm_90a").result()
    sizes = np.int32(p.m), np.int32(len(table)), np.int32(p.experts), np.float32(scale)
    operands = logits.numpy(), np.int32(p.experts), tokens.numpy(), table.numpy(), ids, weights
    launch(b, -(-p.m // config.block_m), config.num_warps, *operands, *sizes)
    want = c.eager()
    assert torch.equal(torch.from_numpy(ids), want[0])
    testing.assert_same_bytes(torch.from_numpy(weights), want[1], "weights")


@pytest.mark.parametrize("config", [(1, 256, 1), (2, 512, 4)], ids=str)
def test_combine(config, pool):
    """Places found by a warp's own instructions, and across warps; sums rounded to BF16."""
    p = CombineProblem(m=11, topk=6, k=264)
    c = testing.case(p)
    y, order, ids, weights, shared = c.operands
    out = torch.full((p.m, p.k), torch.nan, dtype=torch.bfloat16)
    block_m, block_k, num_warps = config
    own = combine.Config(block_m=block_m, block_k=block_k, num_warps=num_warps, search=True)
    b = pool.submit(combine.build, p, own, "sm_90a").result()
    rows, places, chosen, scales, others, result = (
        t.reshape(-1).view(torch.uint8).numpy() for t in (y, order, ids, weights, shared, out)
    )
    stride = np.int32(p.k)
    operands = rows, stride, places, chosen, scales, others, stride, result, np.int32(p.m), stride
    launch(b, triton.cdiv(p.m, block_m), num_warps, *operands, chunks=triton.cdiv(p.k, block_k))
    testing.assert_same_bytes(out, c.eager(), "out")


def parts_of_permute(p: PermuteProblem, config: permute.Config) -> list[built.Built]:
    return [
        permute.build_part(kernel, p, config, "sm_90a") for kernel in (permute._sort, permute._scan, permute._place)
    ]


@pytest.mark.parametrize(
    ("kernel", "tokens"),
    [(permute, 100), (permute_small, 100), (permute_small, 5)],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_permute(kernel, tokens, pool):
    """Blocks of slots, the last ragged, whose counts fill a part of a scan; slots in two runs, and in one of a warp."""
    experts, bins = 40, 64
    ids = testing.random_choices(tokens, 6, experts, torch.Generator().manual_seed(0))
    n, flat = ids.numel(), ids.view(-1).numpy()
    p, sizes = PermuteProblem(m=tokens, topk=6, experts=experts), (np.int32(n), np.int32(experts))
    order, offsets = np.full(n, -7, np.int32), np.full(experts + 1, -7, np.int32)
    if kernel is permute:
        config = permute.Config(block_s=64, num_warps=2)
        blocks = triton.cdiv(n, config.block_s)
        numbers, ordered = (np.full((blocks, config.block_s), -7, np.int32) for _ in range(2))
        begins, ends = (np.full((blocks, bins), -7, np.int16) for _ in range(2))
        bases, totals = np.full((blocks, bins), -7, np.int32), np.full(bins, -7, np.int32)
        sort, scan, place = pool.submit(parts_of_permute, p, config).result()
        launch(sort, blocks, config.num_warps, flat, numbers, ordered, begins, ends, *sizes)
        programs = bins // permute.SCANNED_BINS
        launch(scan, programs, permute.SCAN_WARPS, begins, ends, bases, totals, np.int32(blocks))
        launch(place, blocks, config.num_warps, ordered, bases, totals, order, offsets, *sizes)
    else:
        small = permute_small.Config(block_p=64, num_warps=8) if tokens > 5 else permute_small.default(p)
        b = pool.submit(permute_small.build, p, small, "sm_90a").result()
        launch(b, triton.cdiv(n + experts + 1, small.block_p), small.num_warps, flat, order, offsets, *sizes)
    want = reference.permute(ids, experts)
    assert torch.equal(torch.from_numpy(order), want[0])
    assert torch.equal(torch.from_numpy(offsets), want[1])


def test_sample(pool):
    """Divisions by multiply-adds, at temperatures near FP32's ends too; a crowd of two different logits."""
    m, p, config = 6, SampleProblem(m=6, vocab=1500), sample.Config(chunk=1024)
    gen = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(m, p.vocab, generator=gen)
    logits[3] *= 1e-36
    logits[5] = torch.randint(2, (p.vocab,), generator=gen).float()
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.5e-36, 3e37, 1.0])
    top_p, uniform = torch.tensor([1.0, 1.0, 0.95, 0.6, 0.5, 0.9]), torch.rand(m, generator=gen)
    want = reference.sample(logits, temperature, top_p, uniform)

    chunks = triton.cdiv(p.vocab, config.chunk)
    most, where = (np.full((m, chunks), -7, np.int32) for _ in range(2))
    rough, bounds = (
        np.full((m, chunks, sample.RUNGS), np.nan, np.float32),
        np.full((m, sample.BOUNDS.value), np.nan, np.float32),
    )
    mass, out = np.full((m, chunks, 3), -7, np.int64), np.full(m, -7, np.int64)
    listed, places = np.full(m, -7, np.int32), np.full((m, sample.LISTED), -7, np.int64)
    heat, *asked = (t.numpy() for t in (temperature, top_p, uniform))
    rows, vocab = (logits.numpy(), np.int32(p.vocab)), np.int32(p.vocab)
    parts = pool.submit(parts_of_sample, p, config, "sm_90a").result()
    check_parts_of_sample(parts, config)
    survey, bound, weigh, finish = (parts[name] for name in ("_survey", "_bound", "_weigh", "_finish"))
    launch(survey, m, config.num_warps, *rows, heat, most, where, rough, vocab, chunks=chunks)
    launch(bound, m, sample.BOUND_WARPS, heat, *asked, most, where, rough, bounds, listed, out, np.int32(chunks))
    launch(weigh, m, config.num_warps, *rows, heat, bounds, mass, listed, places, vocab, chunks=chunks)
    operands = (*rows, heat, *asked, bounds, mass, listed, places, out, np.int32(chunks), vocab)
    launch(finish, m, sample.FINISH_WARPS, *operands)
    assert out.tolist() == want.tolist()
