"""Launches that overlap: no kernel may touch global memory before it has waited for the one before."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kernels_triton
from fp4suite import env

FOLDER = Path(kernels_triton.__file__).parent
# launched behind another kernel of the same op, which has waited: they wait where they need what that one makes
SECOND = {"_finish_kv", "_fold", "_scan", "_place", "_index_topk"}
LEADS = {"_compress_kv", "_maxima", "_sort", "_sums"}  # the first ones
WAITS_ALONE = {"_quantize_nvfp4", "_dequant_nvfp4", "_alpha_of_tiles"}  # make weights, which some read before they wait
READS_WEIGHTS = {"_sums": "_fn_of_part"}  # by this, before it waits

OVERLAPPED = """
import re, sys
from fp4suite import problem, registry
from kernels_cute import index_topk
from kernels_triton import quantize_nvfp4, rms_norm, route, swiglu

PROBLEMS = [
    (rms_norm, problem.RmsNormProblem(m=4, k=512)),
    (swiglu, problem.SwigluProblem(m=4, k=256)),
    (route, problem.RouteProblem(m=4, experts=16, topk=4, choice="table")),
    (quantize_nvfp4, problem.QuantizeProblem(m=4, k=512)),
    (index_topk, problem.IndexTopkProblem(m=4, entries=512, topk=32, page_size=64)),
]
for module, p in PROBLEMS:
    for arch in ("sm_90a", "sm_100a"):
        ptx = module.build(p, registry.default_config(module, p), arch).ptx
        first = re.search(r"\\b(ld|st|red|atom|cp|prefetch)[.\\w]*\\.global", ptx).start()
        lets = ptx.find("griddepcontrol.launch_dependents")
        assert 0 <= ptx.find("griddepcontrol.wait") < first, (p, arch)
        assert (lets == -1) == (module is quantize_nvfp4 and arch == "sm_90a"), (p, arch)
        assert lets == -1 or ptx.find("griddepcontrol.wait") < lets, (p, arch)
print("in order")
"""

OPERANDS = """
import torch
from fp4suite import ops, weight_layout
from kernels_triton.overlap import OVERLAP

assert OVERLAP.value
gen = torch.Generator(device="cuda").manual_seed(0)
random = lambda *shape: torch.randn(shape, generator=gen, device="cuda")
table, weight = random(512, 1024).bfloat16(), random(1024).bfloat16()
fn, base, scale = random(24, 4096), random(24), random(3)
alpha = torch.tensor(0.01, device="cuda")
numbers = {"norm_eps": 1e-6, "eps": 1e-6, "iterations": 20}
"""

CHAINS = """
positions, angles = torch.arange(700, device="cuda").int(), random(700, 64)

def chain(ids, between=lambda: None):
    # each op reads what the one before, or the one before that, has written; between is called after each
    made = []
    def step(x):
        made.extend(x if isinstance(x, tuple) else (x,))
        between()
        return x
    h = step(ops.embed(ids, table, streams=4))
    y, post, comb = step(ops.hyper_connection_pre(h, fn, base, scale, weight, **numbers))
    n = step(ops.rms_norm(y, weight, 1e-6))
    q = ops.rmsnorm_quantize(n, weight, 1e-6, alpha=alpha)
    step((q.data, q.sf.view(torch.uint8)))
    a = ops.quantize_nvfp4(n, alpha=alpha)
    step((a.data, a.sf.view(torch.uint8)))
    h = step(ops.hyper_connection_post(n, h, post, comb))
    f = ops.quantize_fp8(h[:, 1])
    step((f.data.view(torch.uint8),))
    step(ops.rope_inverse_(h.view(len(ids), 8, 512), positions[: len(ids)], angles))
    step(ops.rms_norm(h[:, 2], weight, 1e-6))
    return made

def bits(tensors):
    return [t.clone().view(torch.uint8) for t in tensors]

for m in (1, 5, 64, 700):
    ids = torch.randint(512, (m,), generator=gen, device="cuda")
    chain(ids)  # compiles
    torch.cuda.synchronize()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = chain(ids)
    for turn in range(50):
        ids.copy_(torch.randint(512, (m,), generator=gen, device="cuda"))
        graph.replay()
        got = bits(out)
        torch.cuda.synchronize()
        wanted = bits(chain(ids, torch.cuda.synchronize))
        torch.cuda.synchronize()
        for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
            assert torch.equal(a, b), (m, turn, i)
print("equal")
"""

FORKED = """
post, comb = random(64, 4), random(64, 4, 4)
side = torch.cuda.Stream()

def forked(ids, side):
    # two branches of kernels that follow each other closely, one on another stream, and what reads both
    here = torch.cuda.current_stream()
    h = ops.embed(ids, table, streams=4)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        a = ops.rms_norm(ops.rms_norm(h[:, 0], weight, 1e-6), weight, 1e-6)
        q = ops.rmsnorm_quantize(a, weight, 1e-6, alpha=alpha)
    b = ops.rms_norm(h[:, 1], weight, 1e-6)
    here.wait_stream(side)
    c = ops.hyper_connection_post(a, h, post[: len(ids)], comb[: len(ids)])
    d = ops.rms_norm(ops.hyper_connection_post(b, c, post[: len(ids)], comb[: len(ids)])[:, 2], weight, 1e-6)
    return a, q.data, q.sf.view(torch.uint8), b, c, d

for m in (1, 64):
    ids = torch.randint(512, (m,), generator=gen, device="cuda")
    forked(ids, side)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        held = forked(ids, side)
    for turn in range(50):
        ids.copy_(torch.randint(512, (m,), generator=gen, device="cuda"))
        wanted = [t.clone() for t in forked(ids, torch.cuda.current_stream())]
        torch.cuda.synchronize()
        eager = forked(ids, side)
        graph.replay()
        torch.cuda.synchronize()
        for i, three in enumerate(zip(held, eager, wanted, strict=True)):
            x, y, z = (t.view(torch.uint8) for t in three)
            assert torch.equal(x, z) and torch.equal(y, z), (m, turn, i)
print("equal")
"""

WRITTEN = """
TURNS, other = 6, random(64)
h, fns = random(4, 4, 1024).bfloat16(), random(TURNS, 24, 4096)
layout = weight_layout(1024, 1024, h.device)
w, *given = (
    ops.quantize_nvfp4(random(1024, 1024).bfloat16(), alpha=alpha).lay_out_(layout) for _ in range(TURNS + 1)
)
x = h[:, 0].contiguous()
if torch.cuda.get_device_capability()[0] == 10:
    x = ops.quantize_nvfp4(x)

def turn(i, between=lambda: None):
    # what is read before the wait is written by the last kernel but one, PyTorch's
    torch.mul(fns[i], 1, out=fn)
    other.add_(1)
    between()
    folded = ops.hyper_connection_pre(h, fn, base, scale, weight, **numbers)
    between()
    converted = ops.hyper_connection_pre(h, fns[i].bfloat16(), base, scale, weight, **numbers)
    between()
    for of in ("data", "sf"):
        torch.bitwise_or(getattr(given[i], of).view(torch.uint8), 0, out=getattr(w, of).view(torch.uint8))
    other.add_(1)
    between()
    made = (*folded, *converted, ops.gemm_nvfp4(x, w))
    between()
    return made

wanted = [[t.clone() for t in turn(i, torch.cuda.synchronize)] for i in range(TURNS)]
graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
with torch.cuda.graph(graph, stream=stream):
    made = [turn(i) for i in range(TURNS)]
for _ in range(100):
    graph.replay()
    torch.cuda.synchronize()
    for x, y in zip(made, wanted, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
print("equal")
"""


def entry_points() -> dict[str, ast.FunctionDef]:
    """Functions of device code that no other names: those that the host launches."""
    defined: dict[str, ast.FunctionDef] = {}
    named: set[str] = set()
    for path in sorted(FOLDER.glob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        own = {n.name: n for n in body if isinstance(n, ast.FunctionDef) and jitted(n)}
        imported = {x.name: n.module for n in body if isinstance(n, ast.ImportFrom) and n.level for x in n.names}
        defined |= {f"{path.stem}.{name}": node for name, node in own.items()}
        for n in (n for node in own.values() for n in ast.walk(node)):
            if isinstance(n, ast.Name):  # called, or given to a reduction
                named.add(f"{path.stem if n.id in own else imported.get(n.id)}.{n.id}")
            elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
                named.add(f"{n.value.id}.{n.attr}")
    return {name: node for name, node in defined.items() if name not in named}


def jitted(node: ast.FunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


ENTRY_POINTS = entry_points()


def test_entry_points_are_the_kernels():
    assert {"rms_norm._rms_norm", "sample._survey", "permute._sort", "amax._alpha_of_tiles"} <= ENTRY_POINTS.keys()
    assert len(ENTRY_POINTS) >= 41
    assert {node.name for node in ENTRY_POINTS.values()} >= SECOND | WAITS_ALONE | LEADS | READS_WEIGHTS.keys()


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_kernel_waits_first(name: str):
    node = ENTRY_POINTS[name]
    text = ast.unparse(node)
    if node.name in SECOND:
        assert re.search(r"(wait|begin)\(FOLLOWS=True\)", text) or node.name == "_fold", name  # `_y` of a fold waits
        return
    first = ast.unparse(node.body[1 if ast.get_docstring(node) is not None else 0])
    if node.name in READS_WEIGHTS:
        before, after = text.split("begin(", 1)
        assert f"{READS_WEIGHTS[node.name]}(fn_ptr, " in before, name
        assert not re.search(r"tl\.(load|store|atomic)|_read\(|_part_of\(", before), name
        assert "fn_ptr" not in after, name
        first = "begin(" + after.splitlines()[0]
    wanted = r"(overlap\.)?begin\((FOLLOWED=.*)?\)|wait\(\)"
    assert re.fullmatch(wanted, first), first
    assert ("FOLLOWED" in text) == (node.name in LEADS), name
    assert ("begin" not in first) == (node.name in WAITS_ALONE or name == "permute._sort"), name


def overlapped(script: str) -> str:
    """Output of a process in which launches overlap, as they do by default, and nothing is interpreted."""
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FP4SUITE_OVERLAP")}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_in_machine_code_too_nothing_comes_before_the_wait():
    assert "in order" in overlapped(OVERLAPPED)


@pytest.mark.gpu
def test_chains_of_kernels_have_the_bits_of_kernels_one_by_one():
    assert "equal" in overlapped(OPERANDS + CHAINS)


@pytest.mark.gpu
def test_branches_on_two_streams():
    """Beside the launch before on the same stream there is an event of another one to wait for, in graphs, too."""
    assert "equal" in overlapped(OPERANDS + FORKED)


@pytest.mark.gpu
def test_weights_that_were_just_written():
    """By kernels that let nobody come before they end, PyTorch's, with another between; and fn that is converted."""
    assert "equal" in overlapped(OPERANDS + WRITTEN)


def test_the_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FP4SUITE_OVERLAP", raising=False)
    assert env.overlaps()
    monkeypatch.setenv("FP4SUITE_OVERLAP", "0")
    assert not env.overlaps()
    monkeypatch.setenv("FP4SUITE_OVERLAP", "yes")
    with pytest.raises(ValueError, match=re.escape("FP4SUITE_OVERLAP must be 0 or 1, got 'yes'")):
        env.overlaps()
