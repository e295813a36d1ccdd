"""The inventory against what is published: byte totals, tensor counts, and transformers' own parameter names."""

from collections import Counter
from dataclasses import replace

import pytest
import transformers

from model.checkpoint.inventory import FAMILIES, Family, TensorSpec, inventory, params, stored_name
from model.checkpoint.names import hf_name, older_hf_name
from model.config import ModelConfig


@pytest.mark.parametrize(
    ("name", "family", "tensors", "total"),
    [
        # published: total_size of the releases' indices, and their number of tensors
        ("pro", "native", 145_116, 864_704_792_696),
        ("flash", "native", 69_187, 159_609_485_896),
        # published to the gigabyte: 913 and 168 GB for NVFP4 experts; a full export's 893.9 and 163.7 are computed
        ("pro", "nvfp4-experts", 285_660, 913_061_485_688),
        ("flash", "nvfp4-experts", 135_235, 168_266_793_544),
        ("pro", "modelopt", 284_806, 893_918_383_220),
        ("flash", "modelopt", 134_696, 163_739_108_084),
    ],
)
def test_totals(name: str, family: Family, tensors: int, total: int) -> None:
    found = inventory(ModelConfig.named(name), family)
    assert len(found) == tensors
    assert sum(spec.bytes for spec in found.values()) == total


@pytest.mark.parametrize(("name", "drafts"), [("pro", 2343), ("flash", 1575)])
def test_draft_block_is_the_same_in_native_and_nvfp4_experts(name: str, drafts: int) -> None:
    """However many layers come before it."""
    few = {"num_hidden_layers": 2, "num_hash_layers": 2, "compress_ratios": (128, 4, 0)}
    config = replace(ModelConfig.named(name), **few)
    native, experts = (inventory(config, family) for family in ("native", "nvfp4-experts"))
    mtp = {tensor: spec for tensor, spec in native.items() if tensor.startswith("mtp.")}
    assert len(mtp) == drafts
    assert mtp == {tensor: spec for tensor, spec in experts.items() if tensor.startswith("mtp.")}
    assert not any(tensor.startswith("mtp.") for tensor in inventory(config, "modelopt"))


def test_shapes_of_the_released_pro() -> None:
    found = inventory(ModelConfig.named("pro"), "native")
    assert found["layers.0.attn.wq_b.weight"] == TensorSpec("F8_E4M3", (65536, 1536))
    assert found["layers.0.attn.wq_b.scale"] == TensorSpec("F8_E8M0", (512, 12))
    assert found["layers.2.ffn.experts.383.w2.weight"] == TensorSpec("I8", (7168, 1536))
    assert found["layers.2.ffn.experts.383.w2.scale"] == TensorSpec("F8_E8M0", (7168, 96))
    assert found["layers.1.attn.compressor.ape"] == TensorSpec("F32", (128, 512))
    assert found["layers.2.attn.compressor.ape"] == TensorSpec("F32", (4, 1024))
    assert found["layers.2.attn.indexer.weights_proj.weight"] == TensorSpec("BF16", (64, 7168))
    assert found["layers.2.ffn.gate.tid2eid"] == TensorSpec("I64", (129280, 6))
    assert found["layers.3.ffn.gate.bias"] == TensorSpec("F32", (384,))
    assert found["mtp.0.e_proj.weight"] == TensorSpec("F8_E4M3", (7168, 7168))
    assert "layers.3.ffn.gate.tid2eid" not in found
    assert "layers.2.ffn.gate.bias" not in found
    assert "mtp.0.attn.compressor.ape" not in found


def test_hugging_face_names_are_those_of_transformers() -> None:
    """Every parameter of transformers' model has our name and shape, and no name is ours alone."""
    config = ModelConfig.named("tiny")
    theirs = transformers.DeepseekV4Config(
        **{**config.to_json(), "rope_scaling": None},
        layer_types=[
            {"swa": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}[
                config.kind(layer)
            ]
            for layer in range(config.num_hidden_layers)
        ],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
    )
    model = transformers.DeepseekV4ForCausalLM(theirs)
    expected = {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if not name.endswith("inv_freq")
    }
    found: dict[str, tuple[int, ...]] = {}
    for param in params(config):
        if param.name.startswith("mtp."):
            continue
        name = stored_name(param, "modelopt")
        if ".experts." not in name:
            found[name if param.bare else f"{name}.weight"] = param.shape
    experts, d, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    for layer in range(config.num_hidden_layers):
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * inner, d)
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = (experts, d, inner)
    assert found == expected


def test_names() -> None:
    assert hf_name("layers.7.attn.indexer.compressor.norm") == "model.layers.7.self_attn.compressor.indexer.kv_norm"
    assert hf_name("layers.7.attn.compressor.norm") == "model.layers.7.self_attn.compressor.kv_norm"
    assert hf_name("norm") == "model.norm"
    assert older_hf_name("layers.0.attn.indexer.weights_proj").endswith("compressor.indexer.weights_proj")
    with pytest.raises(KeyError, match=r"mtp\.0\.norm"):
        hf_name("mtp.0.norm")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_name_twice(family: Family) -> None:
    config = ModelConfig.named("tiny")
    stored = [stored_name(p, family) for p in params(config) if family != "modelopt" or not p.name.startswith("mtp.")]
    assert max(Counter(stored).values()) == 1
