"""What a DeepSeek-V4 model is, as data: the numbers of its Hugging Face config.json under the names used there.

A layer's attention is told by its entry of `compress_ratios`: 0 attends to the sliding window only (SWA), 4 adds
compressed entries chosen by an indexer (CSA), any other ratio adds all compressed entries (HCA; 128 in the released
models). The list may be longer than the model has layers: the surplus belongs to the draft blocks (MTP).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

CSA_RATIO = 4  # the one ratio whose windows overlap and whose entries an indexer selects

LayerKind = Literal["swa", "csa", "hca"]

SHIPPED = ("pro", "flash", "demo", "tiny")

# Fields that this runtime implements in one way only: a config that says otherwise describes another model.
_FIXED: Mapping[str, Any] = {
    "model_type": "deepseek_v4",
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
}

# transformers 5 writes the schedule as names instead of `compress_ratios`.
_RATIO_OF_TYPE = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN, applied only in layers with a compressor. There is no amplitude (mscale) in this model."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Field names and meanings are those of config.json; sizes are in elements."""

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int  # per group
    o_groups: int
    sliding_window: int  # rows, the query's own included
    compress_ratios: tuple[int, ...]  # at least num_hidden_layers entries, the first of which are used
    rope_theta: float  # layers of ratio 0
    compress_rope_theta: float  # all other layers
    rope_scaling: RopeScaling
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    routed_scaling_factor: float
    num_hash_layers: int  # the first layers take their experts from a table by token id
    swiglu_limit: float
    hc_mult: int  # residual streams
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    num_nextn_predict_layers: int  # draft (MTP) blocks
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    expert_dtype: str = "fp4"  # of the native release's routed experts

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if len(self.compress_ratios) < self.num_hidden_layers:
            raise ValueError(
                f"compress_ratios needs an entry for each of {self.num_hidden_layers} layers, "
                f"got {len(self.compress_ratios)}"
            )
        if min(self.compress_ratios) < 0:
            raise ValueError(f"compress_ratios must be 0 or more, got {min(self.compress_ratios)}")
        if self.num_attention_heads % self.o_groups:
            raise ValueError(f"o_groups={self.o_groups} does not divide num_attention_heads={self.num_attention_heads}")
        if self.qk_rope_head_dim % 2 or self.qk_rope_head_dim >= self.head_dim:
            raise ValueError(
                f"qk_rope_head_dim must be even and below head_dim={self.head_dim}, got {self.qk_rope_head_dim}"
            )
        if self.qk_rope_head_dim > self.index_head_dim:
            raise ValueError(
                f"index_head_dim={self.index_head_dim} cannot hold qk_rope_head_dim={self.qk_rope_head_dim}"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds n_routed_experts={self.n_routed_experts}"
            )
        if not 0 <= self.num_hash_layers <= self.num_hidden_layers:
            raise ValueError(f"num_hash_layers must lie in 0..{self.num_hidden_layers}, got {self.num_hash_layers}")
        if self.num_nextn_predict_layers < 0:
            raise ValueError(f"num_nextn_predict_layers must be 0 or more, got {self.num_nextn_predict_layers}")
        if self.n_shared_experts != 1:
            raise ValueError(f"n_shared_experts must be 1, got {self.n_shared_experts}")
        if self.expert_dtype != "fp4":
            raise ValueError(f"expert_dtype must be 'fp4' (MXFP4 routed experts), got {self.expert_dtype!r}")

    @property
    def nope_head_dim(self) -> int:
        """Dimensions of a head that are not rotated (they come first)."""
        return self.head_dim - self.qk_rope_head_dim

    def ratio(self, layer: int) -> int:
        """Compress ratio of a trunk layer; a draft block (layer >= num_hidden_layers) has none, so 0."""
        return self.compress_ratios[layer] if layer < self.num_hidden_layers else 0

    def kind(self, layer: int) -> LayerKind:
        ratio = self.ratio(layer)
        return "swa" if ratio == 0 else "csa" if ratio == CSA_RATIO else "hca"

    def is_hash(self, layer: int) -> bool:
        """Whether the layer's experts come from the token-id table instead of the router's scores."""
        return layer < self.num_hash_layers

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> "ModelConfig":
        """From config.json: its contents, its path, or the directory it lies in. Fields of no concern here are ignored.

        Raises ValueError for a missing field and for a model that is not DeepSeek-V4 as implemented here.
        """
        raw = dict(source) if isinstance(source, Mapping) else _read(Path(source))
        for name, want in _FIXED.items():
            if raw.get(name, want) != want:
                raise ValueError(f"{name} must be {want!r}, got {raw[name]!r}")
        values = _from_transformers5(raw)
        missing = sorted(name for name in _REQUIRED if name not in values)
        if missing:
            raise ValueError(f"config lacks {', '.join(missing)}")
        picked = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        picked["compress_ratios"] = tuple(picked["compress_ratios"])
        picked["rope_scaling"] = _rope_scaling(picked["rope_scaling"])
        if isinstance(picked["eos_token_id"], list):
            if len(picked["eos_token_id"]) != 1:
                raise ValueError(f"one eos_token_id is supported, got {picked['eos_token_id']}")
            picked["eos_token_id"] = picked["eos_token_id"][0]
        for f in fields(cls):
            _check_type(f.name, f.type, picked.get(f.name))
        return cls(**picked)

    @classmethod
    def named(cls, name: str) -> "ModelConfig":
        """One of the shipped configs (`SHIPPED`), or the config.json at a path (or in the directory at a path)."""
        if name in SHIPPED:
            return cls.from_json(Path(__file__).parent / "configs" / f"{name}.json")
        if not Path(name).exists():
            raise ValueError(f"no config {name!r}: it is neither one of {', '.join(SHIPPED)} nor a path")
        return cls.from_json(Path(name))

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json, without a quantization_config. `from_json` is the exact inverse."""
        values = asdict(self)
        values["compress_ratios"] = list(self.compress_ratios)
        values["rope_scaling"] = {"type": "yarn", **asdict(self.rope_scaling)}
        return {"architectures": ["DeepseekV4ForCausalLM"], **_FIXED, "torch_dtype": "bfloat16", **values}


_OPTIONAL = {"expert_dtype"}  # an early dump of Pro lacks it
_REQUIRED = [f.name for f in fields(ModelConfig) if f.name not in _OPTIONAL]
_MAY_BE_ZERO = {"bos_token_id", "eos_token_id", "num_hash_layers", "num_nextn_predict_layers"}
_POSITIVE = [f.name for f in fields(ModelConfig) if f.type in (int, float) and f.name not in _MAY_BE_ZERO]


def _read(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _check_type(name: str, want: Any, value: Any) -> None:
    ok = {
        int: isinstance(value, int) and not isinstance(value, bool),
        float: isinstance(value, int | float) and not isinstance(value, bool),
    }.get(want, True)
    if not ok:
        raise ValueError(f"{name} must be {'an integer' if want is int else 'a number'}, got {value!r}")
    if name == "compress_ratios" and not all(isinstance(r, int) and not isinstance(r, bool) for r in value):
        raise ValueError(f"compress_ratios must hold integers, got {value!r}")


def _rope_scaling(raw: Any) -> RopeScaling:
    if not isinstance(raw, Mapping):
        raise ValueError(f"rope_scaling must be an object, got {raw!r}")
    kind = raw.get("type", raw.get("rope_type"))
    if kind != "yarn":
        raise ValueError(f"rope_scaling must be of type 'yarn', got {kind!r}")
    missing = sorted(f.name for f in fields(RopeScaling) if f.name not in raw)
    if missing:
        raise ValueError(f"rope_scaling lacks {', '.join(missing)}")
    for f in fields(RopeScaling):
        _check_type(f"rope_scaling.{f.name}", f.type, raw[f.name])
    return RopeScaling(**{f.name: raw[f.name] for f in fields(RopeScaling)})


def _from_transformers5(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with the fields that transformers >= 5 renames given their released names again."""
    values = dict(raw)
    if "compress_ratios" not in values and "layer_types" in values:
        ratios = {**_RATIO_OF_TYPE, **values.get("compress_rates", {}), "sliding_attention": 0}
        unknown = sorted(set(values["layer_types"]) - set(ratios))
        if unknown:
            raise ValueError(f"layer_types must be of {sorted(ratios)}, got {unknown}")
        values["compress_ratios"] = [ratios[kind] for kind in values["layer_types"]]
    if "num_hash_layers" not in values and "mlp_layer_types" in values:
        kinds = values["mlp_layer_types"]
        values["num_hash_layers"] = kinds.count("hash_moe")
        if "hash_moe" in kinds[values["num_hash_layers"] :]:
            raise ValueError(f"hash_moe layers must come first in mlp_layer_types, got {kinds}")
    if "qk_rope_head_dim" not in values and "partial_rotary_factor" in values:
        values["qk_rope_head_dim"] = round(values["head_dim"] * values["partial_rotary_factor"])
    rope = values.get("rope_parameters")
    if values.get("rope_scaling") is None and isinstance(rope, Mapping) and isinstance(rope.get("compress"), Mapping):
        values["rope_scaling"] = rope["compress"]
    return values
