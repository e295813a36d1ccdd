"""transformers' DeepseekV4ForCausalLM as the independent oracle, and our model filled with its weights.

What its initialisation leaves constant (sinks, biases, tables, norms, mHC) is drawn at random here: a constant would
hide an error.
"""

from dataclasses import replace
from typing import Any

import torch
import transformers  # whose classes are asked for where they are used: most of it is loaded then, in five seconds
from torch import Tensor

from fp4suite.formats import FP8BlockTensor, NVFP4Tensor
from fp4suite.reference.native import quantize_fp8_block
from fp4suite.reference.quant import quantize_nvfp4
from model.cache import KVCache
from model.checkpoint.names import hf_name
from model.config import ModelConfig
from model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    moe_intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=32,
    qk_rope_head_dim=8,
    q_lora_rank=24,
    o_lora_rank=16,
    o_groups=2,
    sliding_window=12,
    compress_ratios=(0, 4, 8, 4, 0),
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=ModelConfig.named("pro").rope_scaling,
    index_n_heads=32,
    index_head_dim=16,
    index_topk=3,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_shared_experts=1,
    routed_scaling_factor=1.5,
    num_hash_layers=1,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=4,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    num_nextn_predict_layers=0,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
)
# the released ratios and window, with fewer entries chosen than there are
REAL_RATIOS = replace(SMALL, compress_ratios=(0, 4, 128, 4, 0), sliding_window=128, index_topk=16)

_KINDS = {"swa": "sliding_attention", "csa": "compressed_sparse_attention", "hca": "heavily_compressed_attention"}


def oracle(config: ModelConfig, seed: int = 0) -> "transformers.DeepseekV4ForCausalLM":
    """transformers' model of this config, FP32 on the CPU, every weight random."""
    layers = range(config.num_hidden_layers)
    hca = [config.ratio(i) for i in layers if config.kind(i) == "hca"]
    assert len(set(hca)) <= 1
    rename = {"num_hash_layers", "compress_ratios", "rope_scaling", "expert_dtype"}
    values = {f: getattr(config, f) for f in config.__dataclass_fields__ if f not in rename}
    scaling = config.rope_scaling
    theirs = transformers.DeepseekV4Config(
        **values,
        layer_types=[_KINDS[config.kind(i)] for i in layers],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": hca[0] if hca else 128},
        mlp_layer_types=["hash_moe" if config.is_hash(i) else "moe" for i in layers],
        rope_parameters={
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
        },
    )
    torch.manual_seed(seed)
    model = transformers.DeepseekV4ForCausalLM(theirs).float().eval()
    for name, value in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
        last = name.rpartition(".")[2]
        if last == "tid2eid":
            rows = torch.stack([torch.randperm(config.n_routed_experts) for _ in range(config.vocab_size)])
            new = rows[:, : config.num_experts_per_tok]
        elif "rotary" in name:
            continue
        elif last in ("sinks", "position_bias"):
            new = torch.randn_like(value)
        elif last == "e_score_correction_bias":
            new = 0.2 * torch.randn_like(value)
        elif last in ("base", "hc_base"):
            new = 0.5 * torch.randn_like(value)
        elif last in ("scale", "hc_scale"):
            new = 0.5 + torch.rand_like(value)
        elif last in ("fn", "hc_fn"):
            new = torch.randn_like(value) * value.shape[1] ** -0.5
        elif value.ndim == 1:  # norms
            new = 1 + 0.3 * torch.randn_like(value)
        elif "embed" in name:
            new = torch.randn_like(value)
        else:
            new = torch.randn_like(value) * value.shape[-1] ** -0.5
        value.data.copy_(new)
    return model


def ours(config: ModelConfig, theirs: "transformers.DeepseekV4ForCausalLM") -> Transformer:
    """Our model with the oracle's weights, FP32. A weight left unset would be NaN."""
    model = Transformer(config, lambda name: "fp32", act_dtype=torch.float32)
    state = theirs.state_dict()
    for name, value in list(model.weights()):
        model.set_weight(name, _weight(name, value, state))
    return model


def cache_for(config: ModelConfig, **kwargs: Any) -> KVCache:
    """FP32 rows, so that nothing is lost in them."""
    return KVCache(config, **{"kv_format": "fp32", "index_format": "fp32", "max_tokens": 512, **kwargs})


@torch.no_grad()
def logits_of(theirs: "transformers.DeepseekV4ForCausalLM", ids: list[int]) -> Tensor:
    """The oracle's logits after every token, [tokens, vocab], in one pass without a cache."""
    return theirs(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(theirs: "transformers.DeepseekV4ForCausalLM", ids: list[int], count: int) -> list[int]:
    """The oracle's greedy continuation, with its own cache."""
    cache, new, step = transformers.DynamicCache(config=theirs.config), [], ids
    for _ in range(count):
        new.append(int(theirs(torch.tensor([step]), past_key_values=cache, use_cache=True).logits[0, -1].argmax()))
        step = new[-1:]
    return new


@torch.inference_mode()
def run(model: Transformer, cache: KVCache, steps: list[list[tuple[int, list[int]]]]) -> dict[int, Tensor]:
    """Logits after every token, by slot, of steps of (slot, tokens)."""
    parts: dict[int, list[Tensor]] = {}
    for step in steps:
        batch = cache.prepare(step)
        logits = model.logits(model.streams(batch, cache))
        for (slot, _), part in zip(step, logits.split([len(ids) for _, ids in step]), strict=True):
            parts.setdefault(slot, []).append(part)
    return {slot: torch.cat(logits) for slot, logits in parts.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius norm of the difference."""
    return float((got.double() - want.double()).norm() / want.double().norm())


def _weight(name: str, ours: Any, state: dict[str, Tensor]) -> Tensor:
    head, _, last = name.rpartition(".")
    if head.endswith("ffn.shared"):
        parts = ("w1", "w3") if last == "w13" else ("w2",)
        weight = torch.cat([_theirs(f"{head}_experts.{part}", state) for part in parts])
    elif head.endswith("ffn") and last in ("w13", "w2"):
        layer = head.split(".")[1]
        weight = state[f"model.layers.{layer}.mlp.experts.{'gate_up_proj' if last == 'w13' else 'down_proj'}"]
    else:
        weight = _theirs(name, state)
    return weight.to(ours.dtype)


def _theirs(name: str, state: dict[str, Tensor]) -> Tensor:
    theirs = hf_name(name)
    return state[theirs] if theirs in state else state[f"{theirs}.weight"]


def random_model(config: ModelConfig, seed: int = 0, **kwargs: Any) -> Transformer:
    """Our model, draft blocks included, with random weights of the formats asked for (FP32 by default)."""
    model = Transformer(config, **{"weight_format": lambda name: "fp32", "act_dtype": torch.float32, **kwargs})
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for name, value in list(model.weights()):
        shape, last = tuple(value.shape), name.rpartition(".")[2]
        if last == "tid2eid":
            choice = torch.rand(shape[0], config.n_routed_experts, generator=generator).argsort(-1)
            new = choice[:, : shape[1]].int()
        elif last in ("attn_sink", "ape"):
            new = normal(*shape)
        elif last == "bias":
            new = 0.2 * normal(*shape)
        elif last.endswith("_base"):
            new = 0.5 * normal(*shape)
        elif last.endswith("_scale"):
            new = 0.5 + normal(*shape).abs()
        elif len(shape) == 1:
            new = (1 + 0.3 * normal(*shape)).to(value.dtype)
        elif last == "embed":
            new = normal(*shape).to(value.dtype)
        else:
            new = _like(normal(*shape) * shape[-1] ** -0.5, value)
        model.set_weight(name, new)
    return model


def _like(x: Tensor, old: Any) -> Any:
    """x in the format of `old`."""
    if isinstance(old, FP8BlockTensor):
        return quantize_fp8_block(x)
    if isinstance(old, NVFP4Tensor):
        halves = (x.shape[-2] // 2,) * 2 if old.alpha.ndim > x.ndim - 2 else None
        return quantize_nvfp4(x, segments=halves)
    return x.to(old.dtype)
