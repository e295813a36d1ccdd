"""Every op: the reference's numbers, opcheck, a whole-graph torch.compile, and refusals by their message."""

import inspect

import pytest
import torch
from torch import Tensor

from fp4suite import IndexCache, NVFP4Tensor, PagedCache, UnsupportedError, ops, override, reference
from fp4suite.dispatch import on_target
from fp4suite.formats import index_layout, kv_layout

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
HEAD, ROPE, PAGE = 64, 16, 8
PUBLIC = [
    name for name, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ == "fp4suite.ops" and name[0] != "_"
]


def _g(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _weight(*shape: int, seed: int = 1, alpha: int | None = None) -> NVFP4Tensor:
    t = reference.quantize_nvfp4(_g(*shape, seed=seed).flatten(0, -2))
    lead = shape[:-2]
    a = t.alpha.expand(lead) if alpha is None else t.alpha * torch.linspace(1, 2, alpha).expand(*lead, alpha)
    return NVFP4Tensor(t.data.view(*shape[:-1], -1), t.sf.view(*shape[:-1], -1), a.contiguous())


def _kv_cache(pages: int = 6) -> PagedCache:
    data = torch.zeros(pages, kv_layout("bf16", PAGE, HEAD, ROPE).page_bytes, dtype=torch.uint8)
    return PagedCache(data, "bf16", PAGE, HEAD, ROPE)


def _index_cache(pages: int = 4) -> IndexCache:
    data = torch.zeros(pages, index_layout("bf16", PAGE, HEAD).page_bytes, dtype=torch.uint8)
    cache = IndexCache(data, "bf16", PAGE, HEAD)
    reference.write_rows(cache, torch.arange(cache.slots), _g(cache.slots, HEAD, seed=3))
    return cache


def _arguments(name: str) -> tuple[tuple, dict]:
    """Small, random, valid arguments of each public op. Fresh at every call: some are changed in place."""
    tokens, experts, hidden, wide, topk = 5, 4, 64, 32, 2
    positions = torch.tensor([0, 1, 2, 6, 7], dtype=torch.int32)
    table = reference.rope_table(reference.rope_frequencies(ROPE, 10000.0), 64)
    ids = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 3]], dtype=torch.int32)  # expert 2 stays empty
    weights = _g(tokens, topk, seed=5).abs()
    h, n = _g(tokens, 4, hidden), 4
    one = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    rows = {"positions": positions, "sequence_ids": one}
    block_table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    match name:
        case "quantize_nvfp4":
            return (_g(5, 64, dtype=torch.bfloat16),), {"rule": "mse"}
        case "dequant_nvfp4":
            return (_weight(5, 64),), {"dtype": torch.float32}
        case "rmsnorm_quantize":
            return (_g(5, 64, dtype=torch.bfloat16), _g(64, seed=2), 1e-6), {}
        case "swiglu_quantize":
            return (3 * _g(5, 64),), {"limit": 4.0, "sf_layout": "blocked_128x4"}
        case "gemm_nvfp4":
            return (_g(2, 5, 64, dtype=torch.bfloat16), _weight(48, 64, alpha=2)), {"segments": (16, 32)}
        case "grouped_gemm_nvfp4":
            return (_g(7, 64), _weight(3, 16, 64), torch.tensor([0, 4, 4, 6], dtype=torch.int32)), {}
        case "moe_nvfp4":
            w13, w2 = _weight(experts, 2 * wide, hidden, alpha=2), _weight(experts, hidden, wide, seed=9)
            return (_g(tokens, hidden), w13, w2, ids, weights), {"limit": 5.0}
        case "route":
            return (_g(tokens, 8),), {"topk": 2, "scale": 1.5, "bias": _g(8, seed=4)}
        case "permute":
            return (ids, experts), {}
        case "combine":
            order, _ = reference.permute(ids, experts)
            return (_g(tokens * topk, hidden), order, ids, weights), {"shared": _g(tokens, hidden, seed=6)}
        case "hyper_connection_pre":
            fn, base, scale = _g(24, n * hidden, seed=1), _g(24, seed=2), _g(3, seed=3)
            return (h, fn, base, scale, _g(hidden, seed=4)), {"norm_eps": 1e-6, "eps": 1e-6}
        case "hyper_connection_post":
            return (_g(tokens, hidden), h, _g(tokens, n), _g(tokens, n, n)), {}
        case "hyper_connection_head":
            return (h, _g(n, n * hidden, seed=1), _g(n), _g(1), None), {"norm_eps": 1e-6, "eps": 1e-6}
        case "qnorm_rope":
            return (_g(tokens, 3, HEAD), positions, table, 1e-6), {}
        case "rope_inverse":
            return (_g(tokens, 3, HEAD), positions, table), {}
        case "rope_inverse_quantize":
            return (_g(tokens, 4, HEAD), positions, table), {"groups": 2}
        case "kv_norm_rope_insert":
            slots = torch.tensor([3, 9, -1, 20, 4], dtype=torch.int32)
            return (_g(tokens, HEAD), _g(HEAD, seed=1), positions, table, 1e-6, _kv_cache(), slots), {}
        case "compress_kv":
            state = torch.zeros(2, 8, 2, 2 * HEAD)
            step = {
                "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
                "state_slots": torch.tensor([1, 0], dtype=torch.int32),
                "slots": torch.tensor([-1, -1, -1, -1, 5], dtype=torch.int32),
                "ratio": 4,
            }
            kv, gate, ape = _g(tokens, 2 * HEAD), _g(tokens, 2 * HEAD, seed=1), _g(4, 2 * HEAD, seed=2)
            return (kv, gate, ape, _g(HEAD), table, 1e-6, state, _kv_cache()), {**rows, **step}
        case "index_query":
            return (_g(tokens, 3, HEAD), positions, table), {"hadamard": True, "format": "mxfp4"}
        case "index_logits":
            step = {**rows, "ratio": 4, "scale": 0.1}
            return (_g(tokens, 32, HEAD), _g(tokens, 32, seed=2), _index_cache(), block_table), step
        case "index_topk":
            return (_g(tokens, 2 * PAGE), block_table), {**rows, "ratio": 1, "topk": 3, "page_size": PAGE}
        case "sparse_attention":
            caches = [_kv_cache(), _kv_cache()]
            for seed, cache in enumerate(caches):
                reference.write_rows(cache, torch.arange(cache.slots), _g(cache.slots, HEAD, seed=seed))
            indices = [
                torch.randint(-1, 48, (tokens, r), generator=torch.Generator().manual_seed(r)).int() for r in (9, 4)
            ]
            return (_g(tokens, 3, HEAD), caches, indices, _g(3), 0.125), {}
        case "sample":
            u = torch.full((tokens,), 0.5)
            return (_g(tokens, 40), torch.tensor([0.0, 1, 1, 2, 0.5]), torch.full((tokens,), 0.9), u), {}
    raise AssertionError(f"{name} has no arguments here")


def _flat(x: object) -> list[Tensor]:
    """Tensors of a result or of arguments, so that changed caches are compared too."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, NVFP4Tensor):
        return [x.data, x.sf.view(torch.uint8), x.alpha]
    if isinstance(x, PagedCache | IndexCache):
        return [x.data]
    if isinstance(x, tuple | list):
        return [t for part in x for t in _flat(part)]
    if isinstance(x, dict):
        return _flat(list(x.values()))
    return []


def _same(got: object, want: object) -> None:
    for g, w in zip(_flat(got), _flat(want), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", PUBLIC)
def test_signature_is_the_references(name: str) -> None:
    def parameters(f: object) -> list[tuple]:
        return [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]

    assert parameters(getattr(ops, name)) == parameters(getattr(reference, name))


@pytest.mark.parametrize("name", PUBLIC)
def test_cpu_tensors_get_the_reference(name: str) -> None:
    args, kwargs = _arguments(name)
    want_args, want_kwargs = _arguments(name)
    got = getattr(ops, name)(*args, **kwargs)
    want = getattr(reference, name)(*want_args, **want_kwargs)
    _same(got, want)
    _same((args, kwargs), (want_args, want_kwargs))  # what is changed in place is changed alike


@pytest.mark.parametrize("name", PUBLIC)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operator that the public function calls, with the arguments it really gets."""
    calls = []

    class Spy:
        def __getattr__(self, operator: str):
            def call(*args):
                calls.append((operator, args))
                return getattr(torch.ops.fp4suite, operator)(*args)

            return call

    monkeypatch.setattr(ops, "_ops", Spy())
    args, kwargs = _arguments(name)
    getattr(ops, name)(*args, **kwargs)
    assert calls
    for operator, args in calls:
        overload = getattr(torch.ops.fp4suite, operator).default
        torch.library.opcheck(overload, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("name", PUBLIC)
def test_compiles_as_one_graph(name: str) -> None:
    args, kwargs = _arguments(name)
    want_args, want_kwargs = _arguments(name)
    want = getattr(ops, name)(*want_args, **want_kwargs)
    compiled = torch.compile(lambda: getattr(ops, name)(*args, **kwargs), fullgraph=True, backend="aot_eager")
    _same(compiled(), want)
    _same((args, kwargs), (want_args, want_kwargs))
    torch._dynamo.reset()


def test_a_gpu_op_without_a_kernel_says_what_works() -> None:
    args, kwargs = _arguments("sparse_attention")
    with (
        on_target("sm_90a"),
        pytest.raises(UnsupportedError, match=r"sparse_attention on sm_90a: no GPU kernel .*override"),
    ):
        ops.sparse_attention(*args, **kwargs)
    with on_target("sm_90a"), override(op="sparse_attention", kernel="reference"):
        assert ops.sparse_attention(*args, **kwargs).shape == args[0].shape


def test_refusals() -> None:
    w = _weight(48, 64)
    with pytest.raises(ValueError, match=r"must agree in k, got \[5, 32\] and \[48, 64\]"):
        ops.gemm_nvfp4(_g(5, 32), w)
    with pytest.raises(ValueError, match=r"segments \[16, 16\] must be 2 positive runs .* sum to n=48"):
        ops.gemm_nvfp4(_g(5, 64), _weight(48, 64, alpha=2), segments=(16, 16))
    with pytest.raises(ValueError, match="segments must say how many columns"):
        ops.gemm_nvfp4(_g(5, 64), _weight(48, 64, alpha=2))
    with pytest.raises(TypeError, match=r"x must be one of bfloat16, float16, float32, got torch\.int32"):
        ops.quantize_nvfp4(torch.zeros(2, 16, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"k a multiple of 16, got \[2, 24\]"):
        ops.quantize_nvfp4(torch.zeros(2, 24))
    with pytest.raises(TypeError, match="alpha must be float32"):
        ops.quantize_nvfp4(torch.zeros(2, 16), alpha=torch.ones((), dtype=torch.float64))
    with pytest.raises(ValueError, match="offsets must be int32"):
        ops.grouped_gemm_nvfp4(_g(7, 64), _weight(3, 16, 64), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"needs w2 \[4, 64, 32\]"):
        ops.moe_nvfp4(_g(5, 64), _weight(4, 64, 64), _weight(4, 64, 64), torch.zeros(5, 2, dtype=torch.int32), _g(5, 2))


@pytest.mark.parametrize("shape", [(0, 64), (0, 3, 64)])
def test_empty_batches(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, dtype=torch.bfloat16)
    assert ops.gemm_nvfp4(x, _weight(48, 64)).shape == (*shape[:-1], 48)
    assert ops.quantize_nvfp4(x, alpha=torch.ones(())).shape == shape
