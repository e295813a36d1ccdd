"""Examples of sm_80 compiled for sm_90a: mma.sync, ldmatrix, cp.async and plain FP32 arithmetic."""

import math
from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from cutlass import cute

from .attention import Near, Window, attention, blank, rounded
from .harness import Case, Prepared
from .operands import FORMATS, cute_tensor, empty, expected, matrix, product

STREAM = driver.CUstream(0)


def tensor_cores(
    module: ModuleType,
    gen: torch.Generator,
    mnkl: tuple[int, int, int, int],
    ab: str = "fp16",
    c: str = "fp16",
    acc: str = "fp32",
    majors: str = "kkn",
    atoms: tuple[int, int, int] = (2, 2, 1),
) -> Prepared:
    m, n, k, batch = mnkl
    a, b = (
        matrix(ab, batch, x, k, gen, "k" if major == "k" else "mn") for x, major in zip((m, n), majors, strict=False)
    )
    d = empty(c, batch, m, n, majors[2])
    views = a.stored.permute(2, 0, 1), b.stored.permute(2, 1, 0), d.stored.permute(2, 0, 1)
    tensors = [cute_tensor(v, x.format, divisible=128 // x.format.bits) for v, x in zip(views, (a, b, d), strict=True)]
    gemm = module.TensorOpGemm(a.format.type, d.format.type, FORMATS[acc].type, atoms)
    compiled = cute.compile(module.bmm, gemm, *tensors, STREAM)
    want, bound = product(a.values, b.values)
    # mma.sync keeps 13 bits behind the point of the largest product or sum when it adds products of FP8
    steps = (k // 8 + 4) * {"fp16": 2.0**13, "fp32": 2.0**10 if a.format.bits == 8 else 1}[acc]
    return Prepared(lambda: compiled(*tensors, STREAM), [expected(d, want, bound, steps=steps)], (a, b))


def simt(module: ModuleType, gen: torch.Generator, mnk: tuple[int, int, int], majors: str = "mnn") -> Prepared:
    m, n, k = mnk
    a = matrix("fp32", 1, m, k, gen, "k" if majors[0] == "k" else "mn")
    b = matrix("fp32", 1, n, k, gen, "k" if majors[1] == "k" else "mn")
    d = empty("fp32", 1, m, n, majors[2])
    tensors = [cute_tensor(x.stored[..., 0], x.format, divisible=1) for x in (a, b, d)]
    compiled = cute.compile(module.SGemm(), *tensors, stream=STREAM)
    want, bound = product(a.values, b.values)
    return Prepared(lambda: compiled(*tensors, stream=STREAM), [expected(d, want, bound, steps=k)], (a, b))


def flash_attention(
    module: ModuleType,
    gen: torch.Generator,
    q: tuple[int, int, int, int],
    keys: int,
    block: tuple[int, int] = (64, 64),
    io: str = "fp16",
    causal: bool = False,
) -> Prepared:
    """q: (batch, length, heads, head size)"""
    (batch, queries, heads, size), f = q, FORMATS[io]
    q_t, k_t, v_t = (f.random((batch, s, heads, size), gen) for s in (queries, keys, keys))
    o_t = blank(q_t.shape, f)
    kernel = module.FlashAttentionForwardAmpere
    if not kernel.can_implement(f.type, size, *block, 128, causal):
        raise ValueError("the example refuses this configuration")
    tensors = [cute_tensor(t, f, divisible=128 // f.bits) for t in (q_t, k_t, v_t, o_t)]
    scale = 1 / math.sqrt(size)
    compiled = cute.compile(kernel(size, *block, 128, causal), *tensors, scale, STREAM)
    outputs = []
    for n in range(batch):
        want, _, error, _ = attention(q_t[n], k_t[n], v_t[n], scale, Window(right=0 if causal else None), f)
        outputs.append(Near(f"o{n}", o_t[n], want, rounded(error, want, f)))
    return Prepared(lambda: compiled(*tensors, scale, STREAM), outputs, (q_t, k_t, v_t))


def hstu_attention(
    module: ModuleType,
    gen: torch.Generator,
    q: tuple[int, int, int, int],
    keys: int,
    block: tuple[int, int] = (64, 64),
    io: str = "bf16",
    causal: bool = False,
    fast: bool = False,
    swizzle: bool = False,
) -> Prepared:
    """o = mask(silu(q k^T + bias)) v, where silu(s) = s / (1 + exp(-s)); q: (batch, length, heads, head size).
    fast: the sigmoid by way of tanh.approx, of a relative error of 2^-11 (PTX ISA, "tanh"). swizzle: blocks of the grid
    in an order for the cache.
    """
    (batch, queries, heads, size), f = q, FORMATS[io]
    q_t, k_t, v_t = (f.random((batch, s, heads, size), gen) for s in (queries, keys, keys))
    bias, o_t = f.random((batch, heads, queries, keys), gen), blank(q_t.shape, f)
    kernel = module.HSTUAttentionForwardAmpere(
        f.type, batch, queries, keys, heads, size, *block, 128, fast, swizzle, causal
    )
    tensors = [cute_tensor(t, f, divisible=128 // f.bits) for t in (q_t, k_t, v_t, o_t, bias)]
    compiled = cute.compile(kernel, *tensors, STREAM)
    wide_q, wide_k, wide_v = (x.double() for x in (q_t, k_t, v_t))
    scores = torch.einsum("bqhd,bkhd->bhqk", wide_q, wide_k) + bias.double()
    weights = torch.nn.functional.silu(scores)
    # a weight is rounded to the type of v; tanh.approx is as wrong for large scores as for small ones
    wrong = weights.abs() * 2.0**-f.digits + scores.abs() * (2.0**-12 if fast else 2.0**-20) + f.step / 2
    if causal:
        weights, wrong = weights.tril(), wrong.tril()
    want = torch.einsum("bhqk,bkhd->bqhd", weights, wide_v)
    error = torch.einsum("bhqk,bkhd->bqhd", wrong + weights.abs() * 2.0**-18, wide_v.abs())
    return Prepared(
        lambda: compiled(*tensors, STREAM), [Near("o", o_t, want, rounded(error, want, f))], (q_t, k_t, v_t, bias)
    )


def _cases(example: str, prepare: Any, *configs: dict[str, Any]) -> list[Case]:
    return [Case(f"cute.ampere.kernel.{example}", prepare, config, "sm_90a") for config in configs]


CASES = [
    *_cases(
        "dense_gemm.tensorop_gemm",
        tensor_cores,
        {"mnkl": (136, 144, 96, 2)},
        {"mnkl": (128, 136, 200, 1), "ab": "bf16", "c": "bf16", "majors": "mnm"},
        {"mnkl": (128, 128, 128, 1), "ab": "e4m3", "c": "fp32"},
        {"mnkl": (128, 128, 64, 1), "acc": "fp16"},
    ),
    *_cases("dense_gemm.sgemm", simt, {"mnk": (140, 136, 20)}, {"mnk": (128, 132, 16), "majors": "kkm"}),
    *_cases(
        "attention.flash_attention_v2",
        flash_attention,
        {"q": (1, 100, 2, 64), "keys": 150},
        {"q": (1, 128, 1, 128), "keys": 128, "io": "bf16", "causal": True},
        {"q": (2, 64, 1, 64), "keys": 200, "block": (128, 64)},
    ),
    *_cases(
        "attention.hstu_attention",
        hstu_attention,
        {"q": (1, 100, 2, 64), "keys": 136},
        {"q": (1, 128, 1, 128), "keys": 128, "io": "fp16", "causal": True, "fast": True},
        {"q": (2, 64, 1, 40), "keys": 200, "block": (128, 64), "fast": True, "swizzle": True},
    ),
]
