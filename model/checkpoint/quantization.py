"""What each family writes about its formats for other runtimes: quantization_config and hf_quant_config.json.

Our own loader does not read it: it goes by the tensors.
"""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..config import ModelConfig
from .inventory import Family

_NATIVE: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
_NOT_EXPERTS = ["*.attn.*", "*.ffn.shared_experts.*", "head", "mtp.*"]
_NOT_LINEAR = ["lm_head", "model.embed_tokens", "*.mlp.gate", "*.self_attn.o_a_proj"]


def quantization_config(config: ModelConfig, family: Family) -> dict[str, Any] | None:
    """config.json's `quantization_config`; None for a family that has none."""
    if family == "fp32":
        return None
    if family == "native":
        return dict(_NATIVE)
    if family == "nvfp4-experts":
        return {
            **_NATIVE,
            "moe_quant_algo": "NVFP4",
            "quant_algo": "MIXED_PRECISION",
            "group_size": 16,
            "quantized_layers": _quantized_layers(config),
            "ignore": list(_NOT_EXPERTS),
            "producer": _producer(),
        }
    four_bits = {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False}
    return {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "config_groups": {
            "group_0": {"weights": four_bits, "input_activations": dict(four_bits), "targets": ["Linear"]},
        },
        "ignore": list(_NOT_LINEAR),
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False},
        "producer": _producer(),
    }


def hf_quant_config(config: ModelConfig, family: Family) -> dict[str, Any] | None:
    """The contents of hf_quant_config.json; None for a family that has none."""
    if family == "nvfp4-experts":
        quantization: dict[str, Any] = {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "quantized_layers": _quantized_layers(config),
            "exclude_modules": list(_NOT_EXPERTS),
        }
    elif family == "modelopt":
        quantization = {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": "FP8",
            "group_size": 16,
            "exclude_modules": list(_NOT_LINEAR),
        }
    else:
        return None
    return {"producer": _producer(), "quantization": quantization}


def _quantized_layers(config: ModelConfig) -> dict[str, Any]:
    nvfp4 = {"quant_algo": "NVFP4", "group_size": 16}
    return {f"layers.{layer}.ffn.experts": dict(nvfp4) for layer in range(config.num_hidden_layers)}


def _producer() -> dict[str, str]:
    try:
        return {"name": "fp4suite", "version": version("fp4suite")}
    except PackageNotFoundError:  # run from a checkout
        return {"name": "fp4suite", "version": "unreleased"}
