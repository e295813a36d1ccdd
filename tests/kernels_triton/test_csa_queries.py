"""csa_queries gives the bits of qnorm_rope's and index_query's references: every config, format and type, ragged."""

from typing import Any

import pytest
import torch

from fp4suite import ops, reference, testing
from fp4suite.dispatch import on_target, override
from fp4suite.problem import CsaQueriesProblem
from kernels_triton import csa_queries as kernel

from .checks import configs
from .rope_inputs import angles, gaussian_rows

EPS = 1e-6
SMALL = {"heads": 3, "head_dim": 80, "index_heads": 5, "index_dim": 64, "rope_dim": 16}
WIDE = kernel.Config(block_h=2, lanes=4, num_warps=2)  # few programs, for the interpreter's sake


@pytest.mark.parametrize("config", configs(kernel, CsaQueriesProblem(m=2, heads=3, format="fp8"), most=12), ids=str)
def test_every_config(config, device):
    """The model's head dims; ragged numbers of heads of both."""
    c = testing.case(CsaQueriesProblem(m=2, heads=5, format="mxfp4", hadamard=1, index_heads=9), device)
    c.run(kernel, config)
    c.check()


@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    ("format", "hadamard", "codes"), [("fp32", 0, 0), ("bf16", 0, 0), ("fp8", 0, 0), ("mxfp4", 1, 0), ("fp8", 0, 1)]
)
def test_every_format_and_type(format, hadamard, codes, x, device):
    c = testing.case(CsaQueriesProblem(m=3, format=format, hadamard=hadamard, codes=codes, x=x, **SMALL), device)
    c.run(kernel, WIDE)
    c.check()


def test_faults_are_seen_in_each_result(device):
    c = testing.case(CsaQueriesProblem(m=3, format="fp8", codes=1, **SMALL), device)
    c.run(kernel, WIDE)
    c.check()
    for name, x in (("queries", c.out[0]), ("index queries", c.out[1]), ("weights", c.tail[0][1])):
        before = x.clone()
        x[2, 1] += 1
        with pytest.raises(AssertionError, match=f"^{name}, tokens from 0 on: "):
            c.check()
        x.copy_(before)
    c.check()


def test_what_is_not_finite_stays_in_its_head(device):
    """As either op has it alone."""
    q = gaussian_rows(2, 3, 80, dtype=torch.bfloat16, device=device)
    index_q = gaussian_rows(2, 5, 64, dtype=torch.bfloat16, device=device)
    q[0, 1, 3], index_q[1, 2, 60], index_q[0, 4, 1] = torch.nan, torch.inf, torch.nan
    positions, table = angles(2, 16, device)
    out = torch.zeros_like(q), torch.zeros_like(index_q)
    kernel.launch(q, index_q, positions, table, EPS, "bf16", False, out, None, WIDE)
    want = reference.csa_queries(q, index_q, positions, table, EPS)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert out[0].isnan().any(2).nonzero().tolist() == [[0, 1]]
    assert out[1].isfinite().all(2).logical_not().nonzero().tolist() == [[0, 4], [1, 2]]


def test_no_tokens(device):
    c = testing.case(CsaQueriesProblem(m=1, format="fp8", codes=1, **SMALL), device)
    q, index_q, positions, table, *rest = c.operands
    c.poison()
    out, (weights, scaled) = tuple(x[:0] for x in c.out), c.tail[0]
    kernel.launch(q[:0], index_q[:0], positions[:0], table, *rest, out, (weights[:0], scaled[:0]), WIDE)
    assert c.out[0].isnan().all()


def test_the_ops(device):
    """Through dispatch; dims of heads that are not adjacent."""
    q = gaussian_rows(4, 3, 80, dtype=torch.bfloat16, device=device).transpose(1, 2).contiguous().transpose(1, 2)
    index_q, weights = gaussian_rows(4, 5, 64, dtype=torch.bfloat16, device=device), torch.randn(5, 4, device=device).T
    rope = angles(4, 16, device)
    want = (*reference.csa_queries(q, index_q, *rope, EPS, format="mxfp4", hadamard=True),)
    codes = reference.csa_queries_fp8(q, index_q, weights, *rope, EPS)
    with on_target("sm_90a"), override(kernel="triton_csa_queries", config=WIDE):
        got = ops.csa_queries(q, index_q, *rope, EPS, format="mxfp4", hadamard=True)
        packed = ops.csa_queries_fp8(q, index_q, weights, *rope, EPS)
    for a, b in zip((*got, *packed), (*want, *codes), strict=True):
        assert a.is_contiguous()
        testing.assert_same_bytes(a, b, "result")


def test_a_problem_counts_both():
    problem = CsaQueriesProblem(m=7, heads=128, format="fp8", codes=1)
    queries, indexer = problem.parts
    assert (queries.head_dim, indexer.heads, indexer.head_dim, indexer.codes) == (512, 64, 128, 1)
    assert problem.flops == queries.flops + indexer.flops
    assert queries.bytes + indexer.bytes - problem.bytes == 7 * (4 + 256)  # positions and angles are those of both


def test_refusals(device):
    def why(config: kernel.Config, **dims: Any) -> str | None:
        given: dict[str, Any] = {"m": 1, "heads": 4, "format": "fp8"}
        return kernel.supports(CsaQueriesProblem(**given | dims), config)

    assert why(kernel.Config()) is None
    assert "spill" in (why(kernel.Config(block_h=8)) or "")
    assert why(kernel.Config(lanes=4), index_dim=512) == "head_dim=512 lanes=4: 128 elements a thread, more than 64"
    assert (
        why(kernel.Config(), format="mxfp4", codes=1) == "only fp8 has codes that can be multiplied, got format=mxfp4"
    )
    for m in (1, 64, 4096):
        assert why(kernel.default(CsaQueriesProblem(m=m, heads=128, format="mxfp4", hadamard=1)), m=m) is None
    q, index_q = torch.zeros(2, 3, 80, device=device), torch.zeros(2, 5, 64, device=device)
    rope = angles(2, 16, device)
    with pytest.raises(ValueError, match=r"index_q must be \[tokens, heads, head_dim\], got \[10, 64\]"):
        ops.csa_queries(q, index_q.flatten(0, 1), *rope, EPS)
    with pytest.raises(ValueError, match=r"positions must be int32 \[1\], got torch.int32 \[2\]"):
        ops.csa_queries(q, index_q[:1], *rope, EPS)
    with pytest.raises(TypeError, match=r"one dtype, got torch.float32 and torch.bfloat16"):
        ops.csa_queries(q, index_q.bfloat16(), *rope, EPS)
    with pytest.raises(ValueError, match=r"weights must be \[2, 5\], got \[2, 3\]"):
        ops.csa_queries_fp8(q, index_q, torch.zeros(2, 3, device=device), *rope, EPS)


@pytest.mark.gpu
@pytest.mark.parametrize("config", testing.configs(kernel), ids=str)
@pytest.mark.parametrize(("format", "hadamard", "codes"), [("fp8", 0, 1), ("mxfp4", 1, 0), ("bf16", 0, 0)])
def test_real_sizes(format, hadamard, codes, config, device):
    for m in (1, 67):
        problem = CsaQueriesProblem(m=m, heads=128, format=format, hadamard=hadamard, codes=codes)
        if kernel.supports(problem, config) is None:
            c = testing.case(problem, device)
            c.run(kernel, config)
            c.check()


@pytest.mark.gpu
def test_cuda_graph(device):
    problem = CsaQueriesProblem(m=4, heads=128, format="fp8", codes=1)
    c, config = testing.case(problem, device), kernel.default(problem)
    kernel.warm(problem, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        c.launch(kernel, config)
    for _ in range(3):
        for x in c.operands[:2]:
            x.copy_(torch.roll(x, 1, 0))
        c.poison()
        graph.replay()
        c.check()
