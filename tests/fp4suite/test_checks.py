"""Every op refuses what does not fit, by the argument's name, before it changes anything."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fp4suite import operators, ops, reference
from fp4suite.reference import CompressorStep

from .op_arguments import PUBLIC, arguments, assert_same, flat


def named(name: str) -> dict[str, Any]:
    """The op's arguments by their names."""
    args, kwargs = arguments(name)
    bound = inspect.signature(getattr(ops, name)).bind(*args, **kwargs)
    return dict(bound.arguments)


def tensors(given: dict[str, Any]) -> Iterator[tuple[str, str, Tensor]]:
    """(argument, field or "", tensor) of everything that is plain, or a part of a compressor's step."""
    for key, x in given.items():
        if isinstance(x, Tensor):
            yield key, "", x
        elif isinstance(x, CompressorStep):
            for field in dataclasses.fields(x):
                part = getattr(x, field.name)
                if isinstance(part, Tensor):
                    yield key, field.name, part


def at(given: dict[str, Any], key: str, field: str) -> Tensor:
    return getattr(given[key], field) if field else given[key]


def changed(given: dict[str, Any], key: str, field: str, x: Tensor) -> dict[str, Any]:
    return {**given, key: dataclasses.replace(given[key], **{field: x}) if field else x}


CASES = [(op, key, field) for op in PUBLIC for key, field, _ in tensors(named(op))]
SEVERAL = [case for case in CASES if sum(case[0] == op for op, *_ in CASES) > 1]


def refuses(op: str, given: dict[str, Any], name: str) -> None:
    before = [t.clone() for t in flat(given) if t.device.type == "cpu"]
    with pytest.raises((ValueError, TypeError), match=rf"(?s)\b{name}\b"):
        getattr(ops, op)(**given)
    assert_same([t for t in flat(given) if t.device.type == "cpu"], before)


@pytest.mark.parametrize(("op", "key", "field"), CASES)
def test_another_dtype(op: str, key: str, field: str):
    given = named(op)
    refuses(op, changed(given, key, field, at(given, key, field).to(torch.int8)), field or key)


@pytest.mark.parametrize(("op", "key", "field"), CASES)
def test_another_number_of_axes(op: str, key: str, field: str):
    given = named(op)
    x = at(given, key, field)
    some = x.ndim if op == "gemm_nvfp4" else x.ndim - 1  # which takes any but none
    other = x[None, None, None] if x.ndim < 2 else x[(0,) * some]
    refuses(op, changed(given, key, field, other), field or key)


@pytest.mark.parametrize(("op", "key", "field"), SEVERAL)
def test_another_device(op: str, key: str, field: str):
    given = named(op)
    refuses(op, changed(given, key, field, at(given, key, field).to("meta")), "meta")


def pads(op: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The op's arguments, and what of them a step of padding tokens has."""
    nothing = torch.zeros(0, dtype=torch.int32)
    given = named(op)
    padding = {"sequence_ids": torch.full_like(given["sequence_ids"], -1)}
    if "block_table" in given:
        return given, padding | {"block_table": given["block_table"][:0]}
    return given, padding | {"cu_seqlens": torch.zeros(1, dtype=torch.int32), "state_slots": nothing}


@pytest.mark.parametrize("op", ["compress_kv", "compress_kv_pair", "index_logits", "index_topk"])
def test_steps_of_padding_alone(op: str):
    """No sequence, and tokens that are of none: nothing is stored, and nothing seen."""
    given, padding = pads(op)
    before = [t.clone() for t in flat(given)]
    out = getattr(ops, op)(**{**given, **padding})
    assert_same(flat(given), before)
    if out is not None:
        assert out.shape[0] == 5
        assert (out == (-1 if op == "index_topk" else float("-inf"))).all()


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("compress_kv", lambda x: {"state": torch.cat((x["state"], x["state"]))[::2]}, "state .* must be contiguous"),
        ("compress_kv", lambda x: {"gate": x["gate"].half()}, "kv and gate must have one dtype"),
        ("compress_kv", lambda x: {"ratio": 0}, "ratio must be positive, got 0"),
        ("compress_kv", lambda x: {"table": x["table"][:, :8].contiguous()}, "the cache has 16 RoPE dims, table 8"),
        ("index_query", lambda x: {"format": "fp4"}, "index format must be .* got 'fp4'"),
        ("index_query", lambda x: {"q": x["q"][..., :48]}, "mxfp4 index rows need head_dim in blocks of 32, got 48"),
        ("index_query_fp8", lambda x: {"q": x["q"][..., :48]}, "a Hadamard transform needs a power of two, got 48"),
        ("csa_queries", lambda x: {"format": "fp4"}, "index format must be .* got 'fp4'"),
        ("index_logits", lambda x: {"ratio": 0}, "ratio must be positive, got 0"),
        ("index_logits", lambda x: {"q": x["q"][..., :32]}, r"q must be \[tokens, heads, 64\]"),
        ("index_logits", lambda x: {"q": x["q"].to(torch.float8_e4m3fn)}, "for keys in fp8, got keys in bf16"),
        ("index_topk", lambda x: {"topk": 0}, "topk must be positive, got 0"),
        ("index_topk", lambda x: {"block_table": x["block_table"][:, :1]}, r"for 8 entries, logits 16"),
        ("quantize_nvfp4", lambda x: {"rule": "amax"}, "rule must be one of absmax, mse, modelopt_weight, got 'amax'"),
        ("quantize_nvfp4", lambda x: {"sf_layout": "rows"}, "sf_layout must be .* got 'rows'"),
        ("quantize_nvfp4", lambda x: {"segments": [3, 1]}, r"segments \[3, 1\] must be .* sum to m=5"),
        ("quantize_nvfp4", lambda x: {"alpha": 1.0}, "alpha must be a tensor, got float"),
        ("dequant_nvfp4", lambda x: {"segments": [5, 0]}, r"segments \[5, 0\] must be positive runs"),
        ("rmsnorm_quantize", lambda x: {"rule": "amax"}, "rule must be one of"),
        ("swiglu_quantize", lambda x: {"rule": "amax"}, "rule must be one of"),
        ("rope_inverse_quantize", lambda x: {"rule": "amax"}, "rule must be one of"),
        ("rope_inverse_", lambda x: {"o": x["o"].as_strided((5, 3, 64), (96, 32, 1))}, "its heads apart"),
        ("rope_inverse", lambda x: {"table": x["table"][:, :0]}, "an even number of up to 64 dims"),
        ("qnorm_rope_quantize", lambda x: {"q": x["q"][..., :16]}, "must have dims beside the 16 of RoPE"),
        ("gemm_nvfp4", lambda x: {"b": torch.zeros(48, 64)}, "b must be an NVFP4Tensor, .* got Tensor"),
        ("hyper_connection_post", lambda x: {"h": x["h"][..., :0]}, "n and d positive"),
        ("sample", lambda x: {"temperature": 1.0}, "temperature must be a tensor, got float"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_what_else_is_refused(op: str, change: Any, message: str):
    given = named(op)
    before = [t.clone() for t in flat(given)]
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(ops, op)(**{**given, **change(given)})
    assert_same(flat(given), before)


def test_ids_that_no_table_has():
    with pytest.raises(IndexError, match=r"token_ids must be in 0 \.\. 8"):
        ops.route(torch.zeros(1, 4), topk=2, scale=1.0, token_ids=torch.tensor([-1]), table=torch.zeros(9, 2).int())
    with pytest.raises(IndexError, match="topk_ids must be less than experts=4, got 4"):
        ops.permute(torch.tensor([[4, 0]]).int(), 4)


@pytest.mark.parametrize("shape", [(0, 4, 16), (2, 0, 16), (0, 16), (4, 0)])
@pytest.mark.parametrize("sf_layout", ["linear", "blocked_128x4"])
def test_stacks_of_nothing(shape: tuple[int, ...], sf_layout: Any):
    for alpha in (None, torch.tensor(1.0)):
        t = ops.quantize_nvfp4(torch.zeros(shape), alpha=alpha, sf_layout=sf_layout)
        assert_same(t, reference.quantize_nvfp4(torch.zeros(shape), alpha=alpha, sf_layout=sf_layout))
        assert ops.dequant_nvfp4(t).shape == shape


def test_a_products_operands():
    """fn that has to be converted is made with something behind it: kernels read fn before they wait."""
    fn, base, scale = torch.zeros(24, 64), torch.zeros(24), torch.zeros(3)
    read = operators._product_operands(fn, base, scale)
    assert read[0] is fn
    assert read[1] is base
    assert read[2] is scale
    for other in (fn.bfloat16(), fn.T.contiguous().T, torch.zeros(24 * 64 + 1)[1:].view(24, 64)):
        read = operators._product_operands(other, base, scale)
        assert read[0].dtype == torch.float32
        assert read[0].is_contiguous()
        assert read[0].data_ptr() % 16 == 0
        assert read[1].data_ptr() != base.data_ptr()
        assert torch.equal(read[1], base)
