"""What a decode step launches: no more than is known and written down, layer kind by layer kind."""

import json
from collections import Counter

import pytest
import torch

from model.__main__ import main
from model.config import ModelConfig
from model.launches import OURS, Call, Recorder, counted
from model.runtime import ops_without_kernel
from model.transformer import Transformer

DEMO = ModelConfig.named("demo")
COUNTS = {"swa": 17, "csa": 21, "hca": 19}
PYTORCH = Counter({"bmm": 1, "mm": 1, "add": 1})  # the grouped output projection, the router, and the experts' sum
QUANTISED = 5  # x, normed queries, attention's output, x, SwiGLU's output: a scale and the codes of each
ONE_KERNEL = {
    "qkv_norm_rope_insert",
    "compress_kv_pair",
    "qnorm_rope",
    "csa_queries",
    "rope_inverse_",
    "route",
    "swiglu",
}


def split(calls: list[Call]) -> tuple[Counter[str], Counter[str]]:
    """Operators of ours, and of PyTorch."""
    names = [call.op for call in calls]
    ours = Counter(n.removeprefix(f"{OURS}.") for n in names if n.startswith(OURS))
    return ours, Counter(n for n in names if not n.startswith(OURS))


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a"])
def test_ops_without_a_kernel(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions with the kernels of another op, index queries in FP8, are not among them."""
    assert ops_without_kernel(torch.device("cpu")) == []
    monkeypatch.setattr("model.runtime.arch.of", lambda device: arch)
    assert ops_without_kernel(torch.device("cuda")) == ["grouped_gemm_nvfp4", "moe_nvfp4", "sparse_attention"]


def test_operators_without_a_gpu() -> None:
    found = counted(DEMO, "modelopt", "float", 4, torch.device("cpu"))
    assert {kind: len(calls) for kind, calls in found.items()} == COUNTS
    for calls in found.values():
        assert split(calls)[1] == PYTORCH
    ours = {kind: split(calls)[0] for kind, calls in found.items()}
    of_each = {"gemm_w4a16": 5, "qkv_norm_rope_insert": 1, "sparse_attention": 1, "rope_inverse_": 1, "route": 1}
    of_each |= {
        "moe_nvfp4": 1,
        "swiglu": 1,
        "hyper_connection_post_pre": 2,
    }  # of GEMMs: latents, queries, o_b, shared 2
    assert ours["swa"] == Counter(of_each | {"qnorm_rope": 1})
    assert ours["hca"] == Counter(of_each | {"gemm_w4a16": 6, "qnorm_rope": 1, "compress_kv": 1})
    index = {"csa_queries": 1, "index_logits": 1, "index_topk": 1}
    assert ours["csa"] == Counter(of_each | {"gemm_w4a16": 6, "compress_kv_pair": 1} | index)


def test_inputs_are_quantised_once() -> None:
    for calls in counted(DEMO, "modelopt", "nvfp4", 4, torch.device("cpu")).values():
        ours, pytorch = split(calls)
        assert pytorch == PYTORCH
        made = [name for name in ours.elements() if name.endswith("_alpha") or "quantize" in name]
        assert len(made) == 2 * QUANTISED
        assert (ours["rmsnorm_quantize"], ours["swiglu_quantize"], ours["quantize_nvfp4"]) == (1, 1, 3)


def test_a_view_is_no_launch() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    recorder = Recorder(layer, marks=False)
    with torch.no_grad(), recorder:
        y = layer(torch.empty(2, 4))
        y.view(8)[2:].t().expand(3, 6).contiguous()
    assert [(c.where, c.op) for c in recorder.calls] == [("0", "addmm"), ("", "clone")]


def test_an_embedding_is_one_launch() -> None:
    model = Transformer(DEMO, device="meta")
    recorder = Recorder(model, marks=False)
    with recorder:
        h = model.embedding(torch.empty(3, dtype=torch.int64, device="meta"), DEMO.hc_mult)
        row = model.embedding(torch.empty(3, dtype=torch.int64, device="meta")).squeeze(1)
    assert h.shape == (3, DEMO.hc_mult, DEMO.hidden_size)
    assert row.shape == (3, DEMO.hidden_size)
    assert [c.op for c in recorder.calls] == [f"{OURS}.embed"] * 2


def test_command(capsys) -> None:
    assert main(["launches", "--config", "demo", "--device", "cpu", "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert {kind: found["launches"] for kind, found in document["kinds"].items()} == COUNTS
    assert f"CSA: {COUNTS['csa']} launches" in text
    assert {"where": "attn.indexer", "op": "fp4suite.index_topk", "kernels": []} in document["kinds"]["csa"]["calls"]


@pytest.mark.gpu
def test_kernels_are_found_behind_their_operators(device) -> None:
    found = counted(DEMO, "modelopt", "float", 4, device)
    assert found.keys() == {"swa", "csa", "hca"}
    for calls in found.values():
        kernels = {call.op.removeprefix(f"{OURS}."): call.kernels for call in calls}
        assert all(kernels.values())
        assert {len(kernels[op]) for op in ONE_KERNEL & kernels.keys()} == {1}
