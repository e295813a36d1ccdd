"""The machine code of compress_kv and of the indexer's kernels in `ptx_emulator`: what Triton's interpreter does not
have, barriers between writing and reading back, shuffles, hardware conversions and tensor cores, gives the same.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton

from fp4suite import reference, testing
from fp4suite.problem import (
    CompressKvPairProblem,
    CompressKvProblem,
    CsaQueriesProblem,
    IndexLogitsProblem,
    IndexQueryProblem,
    IndexTopkProblem,
)
from kernels_triton import compress_kv, compress_kv_pair, csa_queries, index_logits, index_query, index_topk

from .test_index_build import check_exact
from .test_rope_emulated import ARCHS, emulate, run


def to_the_end(x: torch.Tensor) -> torch.Tensor:
    """All of the memory from where x begins, in a row: `emulate` would copy columns."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size() - x.storage_offset(),), (1,))


@pytest.mark.parametrize(
    ("arch", "ratio", "head_dim", "format", "page", "warps", "steps"),
    [
        ("sm_90a", 4, 512, "fp8_ds_mla", 64, 4, [(13, 1), (3, 3)]),
        ("sm_100a", 24, 32, "index_mxfp4", 5, 1, [(53, 1)]),
        ("sm_90a", 12, 128, "bf16", 64, 2, [(5, 1)]),
    ],
)
def test_compress_kv(arch, ratio, head_dim, format, page, warps, steps, pool):
    """A step longer than the ring, which begins in the middle of a window, and single tokens; keys of one block, whose
    maximum is that of half of it where Triton loses lanes, in pages that are no multiple of four bytes.

    Triton takes 8 s to compile a pool of chunks and twice as long for one of single rows, whose loads are many; for
    sm_100a `test_compress_kv_pair` has these.
    """
    lanes = 2 if ratio == 4 else 1
    problem = CompressKvProblem(
        m=1, ratio=ratio, overlaps=lanes, head_dim=head_dim, rope_dim=min(64, head_dim), format=format,
        hadamard=int(format == "index_mxfp4"), page_size=page,
    )  # fmt: skip
    config = compress_kv.Config(block_c=head_dim, num_warps=warps)
    built = pool.submit(compress_kv.build, problem, config, arch).result()
    for m, sequences in steps:
        case = testing.case(replace(problem, m=m, sequences=sequences), "cpu", 1)
        case.poison()
        kv, gate, ape, weight, table, eps, state, *integers, _, _ = case.operands
        wide = kv.shape[1]
        args = (kv.contiguous(), wide, gate.contiguous(), wide, ape, weight, table, eps, state, case.out.data)
        args += (*integers, m, sequences, m // sequences, len(table))
        run(built, (2 * sequences + triton.cdiv(m, ratio),), args)
        case.check()
    if head_dim == 512:  # the default for the models' entries
        assert config == compress_kv.default(problem)
        check_exact(built)


@pytest.mark.parametrize(("arch", "m", "sequences"), [("sm_90a", 53, 1), ("sm_100a", 3, 3)])
def test_compress_kv_in_parts(arch, m, sequences, pool):
    """Two launches: entries with rows of the ring and without, and single tokens of which one completes an entry."""
    problem = CompressKvProblem(
        m=m, ratio=24, overlaps=1, head_dim=128, rope_dim=64, format="nvfp4", sequences=sequences
    )
    config = compress_kv.Config(block_c=64, num_warps=2)
    assert compress_kv.supports(problem, config) is None
    case = testing.case(problem, "cpu", 1)
    case.poison()
    kv, gate, ape, weight, table, eps, state, positions, ids, cu, state_slots, slots, _, _ = case.operands
    programs = 2 * sequences + triton.cdiv(m, 24)
    pooled = torch.full((programs, 128), torch.nan)
    counts = (m, sequences, m // sequences, len(table))
    args = (kv.contiguous(), kv.shape[1], gate.contiguous(), kv.shape[1], ape, weight, table, eps, state, case.out.data)
    args += (pooled, positions, ids, cu, state_slots, slots, *counts)
    emulate(pool, compress_kv, problem, config, arch, (2 * programs,), args)
    finish = SimpleNamespace(build=compress_kv.build_finish)
    args = (pooled, weight, table, eps, case.out.data, positions, ids, cu, slots, *counts)
    emulate(pool, finish, problem, config, arch, (programs,), args)
    case.check()


def test_compress_kv_pair(pool):
    """Single tokens, and a step longer than the ring; columns of one wide tensor. The code spills nothing, with entries
    of the format that takes most registers, and computes as the reference does. For sm_100a: it takes Triton a minute,
    and on sm_90a the tests on a GPU run it.
    """
    problem = CompressKvPairProblem(
        m=2, sequences=2, ratio=4, overlaps=2, head_dim=512, rope_dim=64, format="fp8_ds_mla", key_dim=128,
        key_format="index_mxfp4", key_hadamard=1,
    )  # fmt: skip
    built = pool.submit(compress_kv_pair.build, problem, compress_kv_pair.default(problem), "sm_100a").result()
    check_exact(built)
    for m, sequences in ((2, 2), (9, 1)):
        case = testing.case(replace(problem, m=m, sequences=sequences), "cpu", 1)
        case.poison()
        table, eps, *integers, _ = case.operands
        args: list[object] = []
        for step in case.out:
            args += [x for rows in (step.kv, step.gate) for x in (to_the_end(rows), rows.stride(0))]
            args += [step.ape, step.weight, step.state, step.cache.data]
        args += [table, eps, *integers, m, sequences, m // sequences, len(table)]
        programs = 2 * sequences + (triton.cdiv(m, 4) if m >= 8 else 0)
        run(built, (programs, 2), tuple(args))
        case.check()


QUERIES = [("fp8", 0, 4), ("fp8", 1, 16), ("mxfp4", 0, 8), ("mxfp4", 0, 16)]


@pytest.mark.parametrize(
    ("arch", "format", "codes", "lanes", "hadamard"),
    [(ARCHS[(i + turned) % 2], *query, turned) for i, query in enumerate(QUERIES) for turned in (0, 1)],
)
def test_index_query(arch, format, codes, lanes, hadamard, pool):
    config = index_query.Config(lanes=lanes)
    if hadamard:  # one token's heads in turns
        config = index_query.Config(lanes=lanes, num_warps=1, turns=lanes // 2)
    problem = IndexQueryProblem(
        m=2, format=format, hadamard=hadamard, heads=7 if config.turns == 1 else 13, codes=codes
    )
    case = testing.case(problem, "cpu", 1)
    case.poison()
    q, positions, table, _, _ = case.operands
    weights, scaled = case.tail[0] or (None, None)
    added = () if weights is None else (weights, weights.stride(0), scaled)
    args = (q, q.stride(0), q.stride(1), positions, table, case.out, *added, problem.heads)
    emulate(pool, index_query, problem, config, arch, (2, 1), args)
    case.check()


@pytest.mark.parametrize(
    ("arch", "format", "codes", "lanes"),
    [("sm_90a", "fp8", 1, 16), ("sm_100a", "mxfp4", 0, 4), ("sm_100a", "fp8", 1, 8)],
)
def test_csa_queries(arch, format, codes, lanes, pool):
    """Columns of one tensor; 16 heads, for the build takes them as a multiple of 16."""
    problem = CsaQueriesProblem(
        m=2, heads=16, index_heads=16, format=format, hadamard=int(format == "mxfp4"), codes=codes
    )
    config = csa_queries.Config(block_h=2, lanes=lanes)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    q, index_q, positions, table, eps, _, _ = case.operands
    weights, scaled = case.tail[0] or (None, None)
    added = () if weights is None else (weights, weights.stride(0), scaled)
    args = (to_the_end(q), q.stride(0), q.stride(1), case.out[0], 16)
    args += (to_the_end(index_q), index_q.stride(0), index_q.stride(1), case.out[1], 16)
    grid = (2, 8 + triton.cdiv(16, config.of_indexer.block_h))
    emulate(pool, csa_queries, problem, config, arch, grid, (*args, *added, positions, table, eps))
    case.check()


@pytest.mark.parametrize(("arch", "held"), [("sm_90a", 256), ("sm_100a", 64), ("sm_90a", 16), ("sm_100a", 16)])
def test_index_topk(arch, held, pool):
    """Rows that a program holds, with maxima, and with maxima of maxima; equal scores, and NaN, among them."""
    problem, config = IndexTopkProblem(m=3, entries=256, topk=16), index_topk.Config(held=held, group=4, num_warps=2)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    logits, table, positions, ids, ratio, _ = case.operands
    logits[1] = (2 * logits[1]).round()
    logits[2, 40:200:20], logits[2, 1::3] = torch.nan, torch.inf
    positions[0] = 4 * 201
    levels = {256: 0, 64: 1, 16: 2}[held]
    maxima = [torch.full((3, size), torch.nan) for size in (64, 16)][:levels]
    if levels:
        args = (logits, logits.stride(0), positions, ids, *maxima, 256, ratio)
        emulate(pool, SimpleNamespace(build=index_topk.build_maxima), problem, config, arch, (1, 3), args)
    rows = table, table.stride(0), positions, ids
    args = (logits, logits.stride(0), *maxima, *rows, case.out, 256, 16, ratio)
    emulate(pool, index_topk, problem, config, arch, (3,), args)
    case.check()


def emulated_logits(
    problem: IndexLogitsProblem, case: testing.Case, arch: str, pool, block_m: int = 4, **knobs
) -> None:
    config = index_logits.Config(block_m=block_m, **knobs)
    case.poison()
    q, weights, cache, table, positions, ids, ratio, scale = case.operands
    args = (q, q.stride(0), q.stride(1), weights, weights.stride(0), cache.data, table, table.stride(0), positions, ids)
    args += (ratio, scale, case.out, problem.m, problem.entries)
    grid = (triton.cdiv(problem.m, config.block_m), triton.cdiv(problem.entries, config.block_n))
    emulate(pool, index_logits, problem, config, arch, grid, args)


@pytest.mark.parametrize(("format", "x"), [("fp8", "fp8"), ("fp8", "bf16"), ("mxfp4", "bf16")])
@pytest.mark.parametrize("arch", ARCHS)
def test_index_logits(arch, format, x, pool):
    problem = IndexLogitsProblem(m=5, entries=192, format=format, sequences=2, heads=64, x=x)
    case = testing.case(problem, "cpu", 1)
    emulated_logits(problem, case, arch, pool)
    case.check()


@pytest.mark.parametrize("arch", ARCHS)
def test_index_logits_of_a_block_a_key(arch, pool):
    """Rows of 32 codes, loaded by byte: a thread has codes of several keys, each with a power of two of its own."""
    problem = IndexLogitsProblem(m=2, entries=20, format="mxfp4", heads=4, head_dim=32, page_size=5)
    case = testing.case(problem, "cpu", 1)
    emulated_logits(problem, case, arch, pool, block_n=16, num_warps=1)
    case.check()


@pytest.mark.parametrize(
    ("arch", "format", "x"),
    [("sm_90a", "fp8", "fp8"), ("sm_100a", "fp8", "fp8"), ("sm_90a", "fp8", "bf16"), ("sm_100a", "mxfp4", "bf16")],
)
def test_index_logits_of_single_queries(arch, format, x, pool):
    """One of them padding, one that sees no entry of the last block; pages that are missing; scales of any byte."""
    problem = IndexLogitsProblem(m=4, entries=192, format=format, sequences=4, heads=64, x=x)
    case = testing.case(problem, "cpu", 1)
    cache, table, positions, ids = case.operands[2:6]
    positions[2], ids[3] = 4 * 100, -1
    table[1, 1] = -1
    if format == "mxfp4":
        scales = cache.data[:, cache.page_size * 64 :]
        scales[int(table[0, 0]), :256] = torch.arange(256) % 180 + 8  # beyond, scores are infinite
    emulated_logits(problem, case, arch, pool, block_m=1)
    assert torch.all(case.out[3] == -torch.inf)
    for row in range(3):
        slots = torch.where(table[row] >= 0, table[row] * 64, -(10**6))[:, None] + torch.arange(64)
        keys = reference.read_rows(cache, slots.flatten().clamp(min=-1))
        limit = (positions[row : row + 1] + 1) // 4
        own = (x[row : row + 1] for x in (case.out, *case.operands[:2]))
        testing.assert_index_logits_close(*own, keys, limit, case.operands[7])


@pytest.mark.parametrize("arch", ARCHS)
def test_index_logits_where_fp8_tensor_cores_cut_most(arch, pool):
    """Beside the largest product there is, all others of 128 lie just below what sm_90 keeps, and are of its sign.

    Random terms of either sign hardly show this: of errors beyond 4 * 2^-13 of their sizes an H100 had one in 100,000.
    """
    problem = IndexLogitsProblem(m=4, entries=128, format="fp8", sequences=1, heads=64, x="fp8")
    case = testing.case(problem, "cpu", 1)
    q, weights, cache, *_, scale = case.operands
    row = torch.full((128,), 3.75)
    row[1:32] = 2.75
    row[0] = 448.0
    q.copy_(row)
    weights.copy_(weights.abs())
    reference.write_rows(cache, torch.arange(cache.slots), row.expand(cache.slots, -1))
    emulated_logits(problem, case, arch, pool)
    case.check()
    exact, stored = row.double() @ row.double(), reference.read_rows(cache, torch.zeros(1, dtype=torch.long))
    assert torch.equal(stored[0], row)  # in E4M3 as they are
    lost = (1 - case.out[:, 0] / (weights.double().sum(1) * scale * exact)) * 2**13
    assert torch.all((lost > 60) & (lost < 136) if arch == "sm_90a" else lost.abs() < 1)
