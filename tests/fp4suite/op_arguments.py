"""Small, random, valid arguments of each public op, shared by the tests on CPU and on a GPU."""

import dataclasses
import inspect

import torch
from torch import Tensor

from fp4suite import IndexCache, NVFP4Tensor, PagedCache, ops, reference
from fp4suite.formats import index_layout, kv_layout
from fp4suite.reference import CompressorStep

OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
HEAD, ROPE, PAGE = 64, 16, 8
PUBLIC = [
    name for name, f in vars(ops).items() if inspect.isfunction(f) and f.__module__ == "fp4suite.ops" and name[0] != "_"
]


def g(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weight(*shape: int, seed: int = 1, alpha: int | None = None) -> NVFP4Tensor:
    t = reference.quantize_nvfp4(g(*shape, seed=seed).flatten(0, -2))
    lead = shape[:-2]
    a = t.alpha.expand(lead) if alpha is None else t.alpha * torch.linspace(1, 2, alpha).expand(*lead, alpha)
    return NVFP4Tensor(t.data.view(*shape[:-1], -1), t.sf.view(*shape[:-1], -1), a.contiguous())


def _kv_cache(pages: int = 6) -> PagedCache:
    data = torch.zeros(pages, kv_layout("bf16", PAGE, HEAD, ROPE).page_bytes, dtype=torch.uint8)
    return PagedCache(data, "bf16", PAGE, HEAD, ROPE)


def _index_cache(pages: int = 4) -> IndexCache:
    data = torch.zeros(pages, index_layout("bf16", PAGE, HEAD).page_bytes, dtype=torch.uint8)
    cache = IndexCache(data, "bf16", PAGE, HEAD)
    reference.write_rows(cache, torch.arange(cache.slots), g(cache.slots, HEAD, seed=3))
    return cache


def arguments(name: str) -> tuple[tuple, dict]:
    """Small, random, valid arguments of each public op. Fresh at every call: some are changed in place."""
    tokens, experts, hidden, wide, topk = 5, 4, 64, 32, 2
    positions = torch.tensor([0, 1, 2, 6, 7], dtype=torch.int32)
    table = reference.rope_table(reference.rope_frequencies(ROPE, 10000.0), 64)
    ids = torch.tensor([[0, 1], [1, 3], [3, 0], [1, 0], [0, 3]], dtype=torch.int32)  # expert 2 stays empty
    weights = g(tokens, topk, seed=5).abs()
    h, n = g(tokens, 4, hidden), 4
    one = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    rows = {"positions": positions, "sequence_ids": one}
    block_table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    match name:
        case "quantize_nvfp4":
            return (g(5, 64, dtype=torch.bfloat16),), {"rule": "mse"}
        case "quantize_fp8":
            return (g(2, 5, 64, dtype=torch.bfloat16),), {}
        case "dequant_nvfp4":
            return (weight(5, 64),), {"dtype": torch.float32}
        case "rmsnorm_quantize":
            return (g(5, 64, dtype=torch.bfloat16), g(64, seed=2), 1e-6), {}
        case "rms_norm":
            return (g(2, 5, 64, dtype=torch.bfloat16), g(64, seed=2), 1e-6), {}
        case "swiglu_quantize":
            return (3 * g(5, 64),), {"limit": 4.0, "sf_layout": "blocked_128x4"}
        case "embed":
            return (torch.tensor([3, 0, 8, 3, 5]), g(9, hidden)), {"streams": 4, "out_dtype": torch.bfloat16}
        case "swiglu":
            return (3 * g(2, 5, 66), 4.0), {}
        case "gemm_nvfp4":
            return (g(2, 5, 64, dtype=torch.bfloat16), weight(48, 64, alpha=2)), {"segments": (16, 32)}
        case "grouped_gemm_nvfp4":
            return (g(7, 64), weight(3, 16, 64), torch.tensor([0, 4, 4, 6], dtype=torch.int32)), {}
        case "moe_nvfp4":
            w13, w2 = weight(experts, 2 * wide, hidden, alpha=2), weight(experts, hidden, wide, seed=9)
            return (g(tokens, hidden), w13, w2, ids, weights), {"limit": 5.0}
        case "route":
            return (g(tokens, 8),), {"topk": 2, "scale": 1.5, "bias": g(8, seed=4)}
        case "permute":
            return (ids, experts), {}
        case "combine":
            order, _ = reference.permute(ids, experts)
            return (g(tokens * topk, hidden), order, ids, weights), {"shared": g(tokens, hidden, seed=6)}
        case "hyper_connection_pre":
            fn, base, scale = g(24, n * hidden, seed=1), g(24, seed=2), g(3, seed=3)
            return (h, fn, base, scale, g(hidden, seed=4)), {"norm_eps": 1e-6, "eps": 1e-6}
        case "hyper_connection_post":
            return (g(tokens, hidden), h, g(tokens, n), g(tokens, n, n)), {}
        case "hyper_connection_post_pre":
            fn, base, scale = g(24, n * hidden, seed=1), g(24, seed=2), g(3, seed=3)
            site = g(tokens, hidden), h, g(tokens, n), g(tokens, n, n)
            return (*site, fn, base, scale, g(hidden, seed=4)), {"norm_eps": 1e-6, "eps": 1e-6}
        case "hyper_connection_head":
            return (h, g(n, n * hidden, seed=1), g(n), g(1), None), {"norm_eps": 1e-6, "eps": 1e-6}
        case "qnorm_rope":
            return (g(tokens, 3, HEAD), positions, table, 1e-6), {}
        case "qnorm_rope_quantize":
            return (g(tokens, 3, HEAD + ROPE), positions, table, 1e-6), {}
        case "rope_inverse" | "rope_inverse_":
            return (g(tokens, 3, HEAD), positions, table), {}
        case "rope_inverse_quantize":
            return (g(tokens, 4, HEAD), positions, table), {"groups": 2}
        case "kv_norm_rope_insert":
            slots = torch.tensor([3, 9, -1, 20, 4], dtype=torch.int32)
            return (g(tokens, HEAD), g(HEAD, seed=1), positions, table, 1e-6, _kv_cache(), slots), {}
        case "qkv_norm_rope_insert":
            slots = torch.tensor([3, 9, -1, 20, 4], dtype=torch.int32)
            q, kv = g(tokens, 48 + HEAD, dtype=torch.bfloat16).split((48, HEAD), dim=1)
            given = (q, g(48, seed=2), kv, g(HEAD, seed=1), positions, table, 1e-6, _kv_cache(), slots)
            return given, {}
        case "compress_kv":
            state = torch.zeros(2, 8, 2, 2 * HEAD)
            step = {
                "cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32),
                "state_slots": torch.tensor([1, 0], dtype=torch.int32),
                "slots": torch.tensor([-1, -1, -1, -1, 5], dtype=torch.int32),
                "ratio": 4,
            }
            kv, gate, ape = g(tokens, 2 * HEAD), g(tokens, 2 * HEAD, seed=1), g(4, 2 * HEAD, seed=2)
            return (kv, gate, ape, g(HEAD), table, 1e-6, state, _kv_cache()), {**rows, **step}
        case "compress_kv_pair":
            (kv, gate, ape, norm, _, eps, state, cache), step = arguments("compress_kv")
            entries = CompressorStep(kv, gate, ape, norm, state, cache)
            kv, gate, ape = (g(*x.shape, seed=seed) for seed, x in ((5, kv), (6, gate), (7, ape)))
            keys = CompressorStep(kv, gate, ape, g(HEAD, seed=8), state.clone(), _index_cache(), True)
            return (entries, keys, table, eps), step
        case "index_query":
            return (g(tokens, 3, HEAD), positions, table), {"hadamard": True, "format": "mxfp4"}
        case "index_query_fp8":
            return (g(tokens, 3, HEAD), g(tokens, 3, seed=2), positions, table), {"hadamard": True}
        case "csa_queries":
            both = g(tokens, 3, HEAD), g(tokens, 2, HEAD // 2, seed=2)
            return (*both, positions, table, 1e-6), {"hadamard": True, "format": "mxfp4"}
        case "csa_queries_fp8":
            both = g(tokens, 3, HEAD), g(tokens, 2, HEAD // 2, seed=2)
            return (*both, g(tokens, 2, seed=4), positions, table, 1e-6), {"hadamard": True}
        case "index_logits":
            step = {**rows, "ratio": 4, "scale": 0.1}
            return (g(tokens, 32, HEAD), g(tokens, 32, seed=2), _index_cache(), block_table), step
        case "index_topk":
            return (g(tokens, 2 * PAGE), block_table), {**rows, "ratio": 1, "topk": 3, "page_size": PAGE}
        case "sparse_attention":
            caches = [_kv_cache(), _kv_cache()]
            for seed, cache in enumerate(caches):
                reference.write_rows(cache, torch.arange(cache.slots), g(cache.slots, HEAD, seed=seed))
            indices = [
                torch.randint(-1, 48, (tokens, r), generator=torch.Generator().manual_seed(r)).int() for r in (9, 4)
            ]
            return (g(tokens, 3, HEAD), caches, indices, g(3), 0.125), {}
        case "sample":
            u = torch.full((tokens,), 0.5)
            return (g(tokens, 40), torch.tensor([0.0, 1, 1, 2, 0.5]), torch.full((tokens,), 0.9), u), {}
    raise AssertionError(f"{name} has no arguments here")


def flat(x: object) -> list[Tensor]:
    """Tensors of a result or of arguments, so that changed caches are compared too."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, NVFP4Tensor):
        return [x.data, x.sf.view(torch.uint8), x.alpha]
    if isinstance(x, PagedCache | IndexCache):
        return [x.data]
    if isinstance(x, CompressorStep):
        return flat([getattr(x, f.name) for f in dataclasses.fields(x)])
    if isinstance(x, tuple | list):
        return [t for part in x for t in flat(part)]
    if isinstance(x, dict):
        return flat(list(x.values()))
    return []


def assert_same(got: object, want: object) -> None:
    for g, w in zip(flat(got), flat(want), strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


def moved(x: object, device: torch.device) -> object:
    """The same arguments on another device."""
    if isinstance(x, Tensor | NVFP4Tensor):
        return x.to(device)
    if isinstance(x, PagedCache | IndexCache):
        return dataclasses.replace(x, data=x.data.to(device))
    if isinstance(x, CompressorStep):
        return CompressorStep(*(moved(getattr(x, f.name), device) for f in dataclasses.fields(x)))
    if isinstance(x, tuple | list):
        return type(x)(moved(part, device) for part in x)
    if isinstance(x, dict):
        return {k: moved(v, device) for k, v in x.items()}
    return x
