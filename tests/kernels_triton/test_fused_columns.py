"""Ops on columns of what one GEMM wrote for all of them: read where they lie, never copied, to the same bytes.

q and the indexer's q are columns of one BF16 tensor; kv, gate, the indexer's kv and gate and its heads' weights of one
in FP32; a layer's kv of one beside others.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from fp4suite import operators, ops, reference
from fp4suite.dispatch import on_target, override
from fp4suite.formats import IndexCache, IndexFormat, PagedCache, index_layout, kv_layout
from fp4suite.reference import CompressorStep
from kernels_triton import csa_queries, index_query

TOKENS, HEADS, INDEX_HEADS, PAGE, EPS = 5, 3, 64, 64, 1e-6
# the model's on a GPU; less where it takes time
HEAD, KEY, ROPE = (80, 32, 16) if triton.knobs.runtime.interpret else (512, 128, 64)
WIDTHS = (2 * HEAD, 2 * HEAD, 2 * KEY, 2 * KEY, INDEX_HEADS)  # of a CSA layer's compressors and weights
COPYING = {"clone", "copy_", "_to_copy", "contiguous"}


class Copies(TorchDispatchMode):
    """Operators of PyTorch that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        self.found += [name] if name in COPYING else []
        return func(*args, **(kwargs or {}))


class Undispatched:
    """In place of `ops._ops`: what operators do is seen by a mode only where none is dispatched around it."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(operators, f"_{name}")
        return found


@contextlib.contextmanager
def launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of Triton's launches within the block, none of which happens."""
    seen: list[tuple[Any, ...]] = []
    where, name = (triton.JITFunction, "run") if device.type == "cuda" else (GridExecutor, "__call__")
    with monkeypatch.context() as patch:
        patch.setattr(where, name, lambda self, *args, **kwargs: seen.append(args))
        yield seen


def columns(device: torch.device, seed: int, dtype: torch.dtype, *widths: int) -> list[Tensor]:
    both = torch.randn(TOKENS, sum(widths), generator=torch.Generator().manual_seed(seed))
    return list(both.to(dtype).to(device).split(widths, dim=1))


def index_cache(device: torch.device, format: IndexFormat) -> IndexCache:
    data = torch.zeros(4, index_layout(format, PAGE, KEY).page_bytes, dtype=torch.uint8, device=device)
    cache = IndexCache(data, format, PAGE, KEY)
    rows = torch.randn(cache.slots, KEY, generator=torch.Generator().manual_seed(9)).to(device)
    reference.write_rows(cache, torch.arange(cache.slots, device=device), rows)
    return cache


class Layer:
    """A step of three sequences, and what a CSA layer's ops read of it."""

    def __init__(self, device: torch.device) -> None:
        def ints(*values: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.device = device
        self.positions, self.table = ints(3, 6, 7, 500, 8), torch.rand(600, ROPE, device=device) * 2 - 1
        self.integers = {
            "positions": self.positions,
            "sequence_ids": ints(0, 1, 1, 2, -1),
            "cu_seqlens": ints(0, 1, 3, 4),
            "state_slots": ints(2, 0, 1),
            "slots": ints(7, -1, 70, -1, -1),
        }
        self.fp32 = columns(device, 1, torch.float32, *WIDTHS)
        self.bf16 = columns(device, 2, torch.bfloat16, HEADS * HEAD, INDEX_HEADS * KEY)
        self.kv = columns(device, 3, torch.bfloat16, 1536, HEAD)[1]

    def inputs(self, name: str) -> list[Tensor]:
        """Columns that an op reads."""
        kv, gate, key_kv, key_gate, weights = self.fp32
        q, index_q = self.bf16[0].unflatten(1, (HEADS, HEAD)), self.bf16[1].unflatten(1, (INDEX_HEADS, KEY))
        return {
            "qnorm_rope": [q],
            "kv_norm_rope_insert": [self.kv],
            "index_query": [index_q],
            "index_query_fp8": [index_q, weights],
            "csa_queries": [q, index_q],
            "csa_queries_fp8": [q, index_q, weights],
            "compress_kv": [kv, gate],
            "compress_kv of keys": [key_kv, key_gate],
            "compress_kv_pair": [kv, gate, key_kv, key_gate],
            "index_logits": [weights],
        }[name]

    def call(self, name: str, read: list[Tensor]) -> Callable[[], list[Tensor]]:
        """An op on these inputs, to be run once: what it gives, or changes."""
        rope = self.positions, self.table
        match name, read:
            case "qnorm_rope", [q]:
                return lambda: [ops.qnorm_rope(q, *rope, EPS)]
            case "kv_norm_rope_insert", [kv]:
                window, weight = self.paged(), torch.ones_like(kv[0])
                insert = functools.partial(ops.kv_norm_rope_insert, kv, weight, *rope, EPS, window)
                return lambda: [insert(self.integers["slots"]), window.data][1:]
            case "index_query", [q]:
                return lambda: [ops.index_query(q, *rope, format="mxfp4", hadamard=True)]
            case "index_query_fp8", [q, weights]:
                return lambda: [x.view(torch.uint8) for x in ops.index_query_fp8(q, weights, *rope)]
            case "csa_queries", [q, index_q]:
                return lambda: [*ops.csa_queries(q, index_q, *rope, EPS, format="mxfp4", hadamard=True)]
            case "csa_queries_fp8", [q, index_q, weights]:
                return lambda: [x.view(torch.uint8) for x in ops.csa_queries_fp8(q, index_q, weights, *rope, EPS)]
            case "compress_kv" | "compress_kv of keys", [kv, gate]:
                own = self.step(kv, gate)
                rows = kv, gate, own.ape, own.weight, self.table, EPS, own.state, own.cache
                compress = functools.partial(ops.compress_kv, *rows, **self.integers, ratio=4)
                return lambda: [compress(), own.state, own.cache.data][1:]
            case "compress_kv_pair", [kv, gate, key_kv, key_gate]:
                steps = self.step(kv, gate), self.step(key_kv, key_gate)
                pair = functools.partial(ops.compress_kv_pair, *steps, self.table, EPS, **self.integers, ratio=4)
                return lambda: [pair(), *(x for own in steps for x in (own.state, own.cache.data))][1:]
            case "index_logits", [weights]:
                q = torch.randn(TOKENS, INDEX_HEADS, KEY, generator=torch.Generator().manual_seed(5))
                pages = torch.tensor([[0], [3], [1]], dtype=torch.int32, device=self.device)
                args = q.bfloat16().to(self.device), weights, index_cache(self.device, "bf16"), pages
                step = {"positions": self.positions, "sequence_ids": self.integers["sequence_ids"]}
                return lambda: [ops.index_logits(*args, **step, ratio=4, scale=0.1)]
        raise AssertionError(name)

    def step(self, kv: Tensor, gate: Tensor) -> CompressorStep:
        head_dim = kv.shape[1] // 2
        cache = self.paged() if head_dim == HEAD else index_cache(self.device, "fp8")
        ape = torch.ones(4, 2 * head_dim, device=self.device)
        state = torch.ones(3, 8, 2, 2 * head_dim, device=self.device)
        return CompressorStep(kv, gate, ape, torch.ones(head_dim, device=self.device), state, cache)

    def paged(self) -> PagedCache:
        size = kv_layout("nvfp4", PAGE, HEAD, ROPE).page_bytes
        return PagedCache(torch.zeros(2, size, dtype=torch.uint8, device=self.device), "nvfp4", PAGE, HEAD, ROPE)


NAMES = ["qnorm_rope", "kv_norm_rope_insert", "index_query", "index_query_fp8", "compress_kv", "compress_kv of keys"]
NAMES += ["compress_kv_pair", "csa_queries", "csa_queries_fp8", "index_logits"]


def kernels(name: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where an op runs its Triton kernel."""
    stack = contextlib.ExitStack()
    if device.type != "cuda":
        stack.enter_context(on_target("sm_90a"))
    if name == "index_logits":
        stack.enter_context(override(op=name, kernel="triton_index_logits"))
    if name.startswith("index_query"):  # few programs, for the interpreter's sake
        wide = index_query.Config(num_warps=8)
        stack.enter_context(override(op="index_query", kernel="triton_index_query", config=wide))
    if name.startswith("csa_queries"):
        both = csa_queries.Config(block_h=4, lanes=4, num_warps=4)
        stack.enter_context(override(op="csa_queries", kernel="triton_csa_queries", config=both))
    return stack


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_read_where_they_lie(name, device, monkeypatch):
    """The launch has their own addresses and strides, and nothing is copied on the way to it."""
    layer = Layer(device)
    read, copies = layer.inputs(name), Copies()
    assert not any(x.is_contiguous() for x in read)
    monkeypatch.setattr(ops, "_ops", Undispatched())
    call = layer.call(name, read)
    with kernels(name, device), launches(device, monkeypatch) as seen, copies:
        call()
    assert copies.found == []
    (args,) = seen
    tensors = {(x.data_ptr(), x.stride()): i for i, x in enumerate(args) if isinstance(x, Tensor)}
    for x in read:
        place = tensors[x.data_ptr(), x.stride()]
        assert args[place + 1] == x.stride(0)


@pytest.mark.parametrize("name", NAMES)
def test_columns_give_the_bytes_of_whole_tensors(name, device):
    layer = Layer(device)
    read = layer.inputs(name)
    with kernels(name, device):
        got, want = (layer.call(name, own)() for own in (read, [x.contiguous() for x in read]))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert all((x != x.flatten()[0]).any() for x in got)
