"""Names of a parameter: native (DeepSeek's release, and the model's own modules) and Hugging Face (transformers).

The native name `.norm` plays three parts (compressor, model, draft block), so the map goes by whole paths. Draft blocks
(`mtp.*`) have no Hugging Face name: transformers drops them.
"""

import re

_TOP = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
_COMPRESSOR = {"wkv": "kv_proj", "wgate": "gate_proj", "ape": "position_bias", "norm": "kv_norm"}
_MLP = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"hc_{site}_{part}": f"{site}_hc.{part}" for site in ("attn", "ffn") for part in ("fn", "base", "scale")},
    "attn.wq_a": "self_attn.q_a_proj",
    "attn.q_norm": "self_attn.q_a_norm",
    "attn.wq_b": "self_attn.q_b_proj",
    "attn.wkv": "self_attn.kv_proj",
    "attn.kv_norm": "self_attn.kv_norm",
    "attn.wo_a": "self_attn.o_a_proj",
    "attn.wo_b": "self_attn.o_b_proj",
    "attn.attn_sink": "self_attn.sinks",
    **{f"attn.compressor.{ours}": f"self_attn.compressor.{theirs}" for ours, theirs in _COMPRESSOR.items()},
    "attn.indexer.wq_b": "self_attn.compressor.indexer.q_b_proj",
    "attn.indexer.weights_proj": "self_attn.compressor.indexer.scorer.weights_proj",
    **{
        f"attn.indexer.compressor.{ours}": f"self_attn.compressor.indexer.{theirs}"
        for ours, theirs in _COMPRESSOR.items()
    },
    "ffn.gate": "mlp.gate",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    **{f"ffn.shared_experts.{ours}": f"mlp.shared_experts.{theirs}" for ours, theirs in _MLP.items()},
}
_LAYER_RE = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT_RE = re.compile(r"ffn\.experts\.(\d+)\.(w[123])")


def hf_name(native: str) -> str:
    """The Hugging Face name of a native parameter name (both without `.weight`). KeyError if it has none."""
    if native in _TOP:
        return _TOP[native]
    layer = _LAYER_RE.fullmatch(native)
    if layer is None:
        raise KeyError(native)
    number, rest = layer.groups()
    expert = _EXPERT_RE.fullmatch(rest)
    theirs = f"mlp.experts.{expert[1]}.{_MLP[expert[2]]}" if expert else _LAYER[rest]
    return f"model.layers.{number}.{theirs}"


def older_hf_name(native: str) -> str:
    """The name that older exports give the same parameter: the indexer's weights_proj without `.scorer`."""
    return hf_name(native).replace(".scorer.", ".")
