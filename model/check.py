"""Is the model what its config and its checkpoint say? Built without memory and compared name by name."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fp4suite.formats import FP8BlockTensor, NVFP4Tensor

from .checkpoint.files import CheckpointError
from .checkpoint.inventory import FAMILIES, Family, inventory, params, stored_params
from .checkpoint.read import Checkpoint, Held, held, place, weight_format
from .config import ModelConfig
from .linear import AnyWeight
from .transformer import Transformer

# total_size in the indices of the releases, bytes
PUBLISHED = {"pro": 864_704_792_696, "flash": 159_609_485_896}


def check_config(config: ModelConfig, name: str) -> dict[str, Any]:
    """Counts and bytes of every family, of the model in memory, and against what is published.

    Raises ValueError if the model's weights are not the inventory's, or a published total is missed.
    """
    families = {}
    for family in FAMILIES:
        specs = inventory(config, family).values()
        families[family] = {"tensors": len(specs), "bytes": sum(spec.bytes for spec in specs)}
    published = PUBLISHED.get(name)
    if published is not None and families["native"]["bytes"] != published:
        raise ValueError(f"{name}: the native release has {published:,} bytes, not {families['native']['bytes']:,}")
    return {
        "config": name,
        "layers": {kind: sum(config.kind(i) == kind for i in range(config.num_hidden_layers)) for kind in _KINDS},
        "draft_blocks": config.num_nextn_predict_layers,
        "parameters": sum(_numel(param.shape) for param in params(config) if param.init != "table"),
        "families": families,
        "published_native_bytes": published,
        "model": check_model(config, held_formats(config, "native"), f"{name} in native formats"),
    }


def check_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint whose headers were found right, against the model that it would fill.

    Raises CheckpointError if they differ.
    """
    try:
        model = check_model(checkpoint.config, checkpoint.formats(), str(checkpoint.directory))
    except ValueError as error:
        wanted = "the weights of the model"
        raise CheckpointError(checkpoint.directory, None, wanted=wanted, got=str(error)) from None
    return {
        "directory": str(checkpoint.directory),
        "family": checkpoint.family,
        "tensors": sum(len(entry.tensors) for entry in checkpoint.entries.values()),
        "bytes": checkpoint.bytes,
        "draft_blocks": checkpoint.config.num_nextn_predict_layers,
        "model": model,
    }


def check_model(config: ModelConfig, formats: dict[str, Held], what: str) -> dict[str, int]:
    """Builds the model on the meta device and compares its weights with the inventory. Raises ValueError."""
    expected: dict[str, tuple[int, ...]] = {}
    for param in params(config):
        where = place(param, config)
        rows = (param.shape[0] * (where.segments or 1), *param.shape[1:])
        expected[where.name] = rows if where.experts is None else (where.experts, *rows)
    model = Transformer(config, weight_format(formats), device="meta")
    weights = dict(model.weights())
    _same_names(expected.keys(), weights.keys(), what)
    for name, weight in weights.items():
        if tuple(weight.shape) != expected[name]:
            raise ValueError(f"{what}: {name} should be {list(expected[name])}, the model has {list(weight.shape)}")
    return {"weights": len(weights), "bytes": sum(_bytes(weight) for weight in weights.values())}


def held_formats(config: ModelConfig, family: Family) -> dict[str, Held]:
    """How the model holds each weight of a checkpoint of this family."""
    return {place(p, config).name: held(p, p.storage(family)) for p in stored_params(config, family)}


_KINDS = ("swa", "csa", "hca")


def _same_names(expected: Iterable[str], got: Iterable[str], what: str) -> None:
    expected, got = set(expected), set(got)
    if missing := sorted(expected - got):
        raise ValueError(f"{what}: the model has no {missing[0]} ({len(missing)} such)")
    if extra := sorted(got - expected):
        raise ValueError(f"{what}: the model has {extra[0]}, which no checkpoint holds ({len(extra)} such)")


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _bytes(weight: AnyWeight) -> int:
    if isinstance(weight, Tensor):
        return weight.nbytes
    parts = [weight.data, weight.sf, weight.alpha] if isinstance(weight, NVFP4Tensor) else [weight.data, weight.sf]
    assert isinstance(weight, NVFP4Tensor | FP8BlockTensor)
    return sum(part.nbytes for part in parts)
