"""What a checkpoint holds: every parameter of a config, and every tensor of it as each family of checkpoints stores it.

    native          DeepSeek's release: linears in FP8 (128 x 128 blocks), routed experts in MXFP4, the rest as it is
    nvfp4-experts   native names and formats, but the trunk's routed experts in NVFP4; draft blocks stay native
    modelopt        Hugging Face names, every linear in NVFP4 except the grouped output projection (wo_a), router, head
                    and embedding; no draft blocks
    fp32            native names, nothing quantised, every number FP32: what the others were quantised from

A parameter is named as in the native release without `.weight`. One tensor of a linear [n, k] is `NAME.weight`; its
scales stand beside it:

    fp8     weight F8_E4M3 [n, k], scale F8_E8M0 [ceil(n / 128), ceil(k / 128)]
    mxfp4   weight I8 [n, k / 2], scale F8_E8M0 [n, k / 32]
    nvfp4   weight U8 [n, k / 2], weight_scale F8_E4M3 [n, k / 16], weight_scale_2 F32 [], input_scale F32 []

Rebuilt so, the released Pro and Flash come to the published byte: 864,704,792,696 and 159,609,485,896.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from fp4suite.formats import BLOCK, FP8_BLOCK, MX_BLOCK

from ..config import CSA_RATIO, ModelConfig
from .names import hf_name

Family = Literal["native", "nvfp4-experts", "modelopt", "fp32"]
FAMILIES: tuple[Family, ...] = ("native", "nvfp4-experts", "modelopt", "fp32")

Storage = Literal["fp8", "mxfp4", "nvfp4", "bf16", "fp32", "i64"]
Init = Literal[
    "linear", "norm", "embed", "head", "router", "bias", "sink", "ape", "hc_fn", "hc_base", "hc_scale", "table"
]

# safetensors' dtype codes
ITEM_BITS = {"F32": 32, "BF16": 16, "F16": 16, "F8_E4M3": 8, "F8_E8M0": 8, "I8": 8, "U8": 8, "I64": 64, "I32": 32}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One stored tensor: its dtype as safetensors writes it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * ITEM_BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """One parameter of the model: logical shape in elements, how each release stores it, what random values suit it."""

    name: str
    shape: tuple[int, ...]
    init: Init
    native: Storage
    modelopt: Storage
    bare: bool = False  # stored under its plain name, without `.weight`

    def storage(self, family: Family) -> Storage:
        if family == "fp32":
            return "i64" if self.native == "i64" else "fp32"
        if family == "modelopt":
            return self.modelopt
        if family == "nvfp4-experts" and self.native == "mxfp4" and not self.name.startswith("mtp."):
            return "nvfp4"
        return self.native


def params(config: ModelConfig) -> Iterator[Param]:
    """Every parameter of the model, routed experts one by one, in the order of the forward pass, draft blocks last."""
    d = config.hidden_size
    yield Param(name="embed", shape=(config.vocab_size, d), init="embed", native="bf16", modelopt="bf16")
    for layer in range(config.num_hidden_layers):
        yield from _block(config, f"layers.{layer}", layer)
    yield from _hc_head(config, "")
    yield _norm("norm", d)
    yield Param(name="head", shape=(config.vocab_size, d), init="head", native="bf16", modelopt="bf16")
    for draft in range(config.num_nextn_predict_layers):
        name = f"mtp.{draft}"
        yield _norm(f"{name}.enorm", d)
        yield _norm(f"{name}.hnorm", d)
        yield _linear(f"{name}.e_proj", d, d)
        yield _linear(f"{name}.h_proj", d, d)
        yield from _block(config, name, config.num_hidden_layers + draft)
        yield from _hc_head(config, f"{name}.")
        yield _norm(f"{name}.norm", d)


def parts(param: Param, storage: Storage) -> dict[str, TensorSpec]:
    """The stored tensors of one parameter, by what their names have after the parameter's own."""
    if storage in _PLAIN_DTYPES:
        return {"" if param.bare else ".weight": TensorSpec(_PLAIN_DTYPES[storage], param.shape)}
    n, k = param.shape
    if storage == "fp8":
        scale = TensorSpec("F8_E8M0", (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK)))
        return {".weight": TensorSpec("F8_E4M3", (n, k)), ".scale": scale}
    block = MX_BLOCK if storage == "mxfp4" else BLOCK
    if k % block:
        raise ValueError(f"{param.name} [{n}, {k}]: {storage} needs k in blocks of {block}")
    if storage == "mxfp4":
        return {".weight": TensorSpec("I8", (n, k // 2)), ".scale": TensorSpec("F8_E8M0", (n, k // block))}
    return {
        ".weight": TensorSpec("U8", (n, k // 2)),
        ".weight_scale": TensorSpec("F8_E4M3", (n, k // block)),
        ".weight_scale_2": TensorSpec("F32", ()),
        ".input_scale": TensorSpec("F32", ()),
    }


def stored_name(param: Param, family: Family) -> str:
    """The parameter's name in the family's files, without `.weight`."""
    return hf_name(param.name) if family == "modelopt" else param.name


def stored_params(config: ModelConfig, family: Family) -> Iterator[Param]:
    """The parameters that the family stores: all, except that `modelopt` has no draft blocks."""
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    for param in params(config):
        if family != "modelopt" or not param.name.startswith("mtp."):
            yield param


def inventory(config: ModelConfig, family: Family) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint of this family, by its stored name."""
    found: dict[str, TensorSpec] = {}
    for param in stored_params(config, family):
        name = stored_name(param, family)
        found.update({name + suffix: spec for suffix, spec in parts(param, param.storage(family)).items()})
    return found


_PLAIN_DTYPES = {"bf16": "BF16", "fp32": "F32", "i64": "I64"}


def _block(config: ModelConfig, name: str, layer: int) -> Iterator[Param]:
    d, streams = config.hidden_size, config.hc_mult
    for site in ("attn", "ffn"):
        mixes = (2 + streams) * streams  # pre, post, comb
        yield _fp32(f"{name}.hc_{site}_fn", (mixes, streams * d), "hc_fn")
        yield _fp32(f"{name}.hc_{site}_base", (mixes,), "hc_base")
        yield _fp32(f"{name}.hc_{site}_scale", (3,), "hc_scale")
    yield _norm(f"{name}.attn_norm", d)
    yield from _attention(config, f"{name}.attn", config.ratio(layer))
    yield _norm(f"{name}.ffn_norm", d)
    yield from _ffn(config, f"{name}.ffn", is_hash=config.is_hash(layer))


def _attention(config: ModelConfig, name: str, ratio: int) -> Iterator[Param]:
    d, heads, groups = config.hidden_size, config.num_attention_heads, config.o_groups
    yield _linear(f"{name}.wq_a", config.q_lora_rank, d)
    yield _norm(f"{name}.q_norm", config.q_lora_rank)
    yield _linear(f"{name}.wq_b", heads * config.head_dim, config.q_lora_rank)
    yield _linear(f"{name}.wkv", config.head_dim, d)
    yield _norm(f"{name}.kv_norm", config.head_dim)
    # ModelOpt skips this one: in transformers it is a subclass of Linear with a forward of its own
    yield _linear(f"{name}.wo_a", groups * config.o_lora_rank, heads // groups * config.head_dim, modelopt="bf16")
    yield _linear(f"{name}.wo_b", d, groups * config.o_lora_rank)
    yield _fp32(f"{name}.attn_sink", (heads,), "sink")
    if ratio:
        yield from _compressor(config, f"{name}.compressor", ratio, config.head_dim)
    if ratio == CSA_RATIO:
        index = config.index_n_heads * config.index_head_dim
        yield _linear(f"{name}.indexer.wq_b", index, config.q_lora_rank)
        yield _linear(f"{name}.indexer.weights_proj", config.index_n_heads, d, native="bf16")
        yield from _compressor(config, f"{name}.indexer.compressor", ratio, config.index_head_dim)


def _compressor(config: ModelConfig, name: str, ratio: int, width: int) -> Iterator[Param]:
    lanes = 2 if ratio == CSA_RATIO else 1
    yield _linear(f"{name}.wkv", lanes * width, config.hidden_size, native="bf16")
    yield _linear(f"{name}.wgate", lanes * width, config.hidden_size, native="bf16")
    yield _fp32(f"{name}.ape", (ratio, lanes * width), "ape")
    yield _norm(f"{name}.norm", width)


def _ffn(config: ModelConfig, name: str, *, is_hash: bool) -> Iterator[Param]:
    d, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield Param(name=f"{name}.gate", shape=(experts, d), init="router", native="bf16", modelopt="bf16")
    if is_hash:
        table = (config.vocab_size, config.num_experts_per_tok)
        yield Param(name=f"{name}.gate.tid2eid", shape=table, init="table", native="i64", modelopt="i64", bare=True)
    else:
        yield _fp32(f"{name}.gate.bias", (experts,), "bias")
    for expert in range(experts):
        yield _linear(f"{name}.experts.{expert}.w1", inner, d, native="mxfp4")
        yield _linear(f"{name}.experts.{expert}.w3", inner, d, native="mxfp4")
        yield _linear(f"{name}.experts.{expert}.w2", d, inner, native="mxfp4")
    yield _linear(f"{name}.shared_experts.w1", inner, d)
    yield _linear(f"{name}.shared_experts.w3", inner, d)
    yield _linear(f"{name}.shared_experts.w2", d, inner)


def _hc_head(config: ModelConfig, prefix: str) -> Iterator[Param]:
    yield _fp32(f"{prefix}hc_head_fn", (config.hc_mult, config.hc_mult * config.hidden_size), "hc_fn")
    yield _fp32(f"{prefix}hc_head_base", (config.hc_mult,), "hc_base")
    yield _fp32(f"{prefix}hc_head_scale", (1,), "hc_scale")


def _linear(name: str, n: int, k: int, *, native: Storage = "fp8", modelopt: Storage = "nvfp4") -> Param:
    return Param(name=name, shape=(n, k), init="linear", native=native, modelopt=modelopt)


def _norm(name: str, width: int) -> Param:
    return Param(name=name, shape=(width,), init="norm", native="bf16", modelopt="bf16")


def _fp32(name: str, shape: tuple[int, ...], init: Init) -> Param:
    return Param(name=name, shape=shape, init=init, native="fp32", modelopt="fp32", bare=True)
