"""The machine code of compress_kv and of the indexer's kernels in `ptx_emulator`: what Triton's interpreter does not
have, barriers between writing and reading back, shuffles, hardware conversions and tensor cores, gives the same.
"""

import pytest
import torch
import triton

from fp4suite import testing
from fp4suite.problem import CompressKvProblem, IndexLogitsProblem, IndexQueryProblem, IndexTopkProblem
from kernels_triton import compress_kv, index_logits, index_query, index_topk

from .test_rope_emulated import ARCHS, emulate, pool  # noqa: F401


@pytest.mark.parametrize(
    ("ratio", "head_dim", "format", "warps", "m", "sequences"),
    [(4, 512, "fp8_ds_mla", 4, 13, 1), (4, 128, "index_mxfp4", 2, 3, 3), (12, 128, "nvfp4", 2, 5, 1)],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_compress_kv(arch, ratio, head_dim, format, warps, m, sequences, pool):  # noqa: F811
    """A step longer than the ring, which begins in the middle of a window, and single tokens."""
    lanes = 2 if ratio == 4 else 1
    problem = CompressKvProblem(
        m=m, ratio=ratio, overlaps=lanes, head_dim=head_dim, rope_dim=64, format=format, sequences=sequences,
        hadamard=int(format == "index_mxfp4"),
    )  # fmt: skip
    config = compress_kv.Config(block_c=head_dim, num_warps=warps)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    kv, gate, ape, weight, table, eps, state, positions, ids, cu, state_slots, slots, _, _ = case.operands
    args = (kv.contiguous(), kv.shape[1], gate.contiguous(), kv.shape[1], ape, weight, table, eps, state, case.out.data)
    args += (positions, ids, cu, state_slots, slots, m, sequences)
    emulate(pool, compress_kv, problem, config, arch, (sequences + triton.cdiv(m, ratio), 1), args)
    case.check()


@pytest.mark.parametrize("hadamard", [0, 1])
@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
@pytest.mark.parametrize("arch", ARCHS)
def test_index_query(arch, format, hadamard, pool):  # noqa: F811
    problem, config = IndexQueryProblem(m=2, format=format, hadamard=hadamard, heads=16), index_query.Config()
    case = testing.case(problem, "cpu", 1)
    case.poison()
    q, positions, table, _, _ = case.operands
    args = (q, q.stride(0), q.stride(1), positions, table, case.out, problem.heads)
    emulate(pool, index_query, problem, config, arch, (2, 1), args)
    case.check()


@pytest.mark.parametrize("arch", ARCHS)
def test_index_topk(arch, pool):  # noqa: F811
    """Rows of eight tiles, so that the buffer is filled, cut back and read again; a program takes both."""
    tile = 32
    problem, config = IndexTopkProblem(m=2, entries=8 * tile, topk=16), index_topk.Config(tile=tile)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    logits, table, positions, ids, ratio, _ = case.operands
    logits[1] = logits[1].sort().values  # each tile better than those before
    room = torch.full((2, 1, 2 * tile), -1, dtype=torch.int32)
    args = (logits, logits.stride(0), table, table.stride(0), positions, ids, room[0], room[1], case.out)
    args += (2, 1, 8, 8 * tile, 16, ratio)
    emulate(pool, index_topk, problem, config, arch, (1,), args)
    case.check()


@pytest.mark.parametrize("format", ["fp8", "mxfp4"])
@pytest.mark.parametrize("arch", ARCHS)
def test_index_logits(arch, format, pool):  # noqa: F811
    problem = IndexLogitsProblem(m=5, entries=192, format=format, sequences=2, heads=64)
    config = index_logits.Config(block_m=4)
    case = testing.case(problem, "cpu", 1)
    case.poison()
    q, weights, cache, table, positions, ids, ratio, scale = case.operands
    args = (q, q.stride(0), q.stride(1), weights, weights.stride(0), cache.data, table, table.stride(0), positions, ids)
    args += (ratio, scale, case.out, 5, 192, 64)
    emulate(pool, index_logits, problem, config, arch, (2, 2), args)
    case.check()
