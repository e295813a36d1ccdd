"""Checkpoints written by stream: shards are laid out from shapes alone, then filled parameter by parameter.

Memory holds one group of parameters at a time: one expert's three matrices, or one parameter. Every file gets its name
when it is whole, config.json last: a directory without it is one whose writing was cut short.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from fp4suite import reference

from ..config import ModelConfig
from . import codec
from .files import INDEX_NAME, SINGLE_NAME, TORCH_DTYPES, Reader, ShardWriter, write_json
from .inventory import Family, Param, TensorSpec, parts, stored_name, stored_params
from .quantization import hf_quant_config, quantization_config
from .read import Checkpoint, Entry
from .weights import random_weight

log = logging.getLogger(__name__)

Group = tuple[Param, ...]
Encoded = dict[str, dict[str, Tensor]]  # by parameter name, then by suffix

DEFAULT_SHARD_BYTES = 5 << 30
_CONFIG_NAMES = ("config.json", "hf_quant_config.json", INDEX_NAME, SINGLE_NAME)

# What a conversion may start from. Others would round twice or need tensors that are not there.
CONVERSIONS: Mapping[Family, tuple[Family, ...]] = {
    "native": ("nvfp4-experts", "modelopt", "fp32"),
    "nvfp4-experts": ("modelopt", "fp32"),
    "modelopt": ("fp32",),
    "fp32": ("native", "nvfp4-experts", "modelopt"),
}


def make_checkpoint(
    directory: Path,
    config: ModelConfig,
    family: Family,
    *,
    seed: int,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    progress: bool | None = None,
) -> int:
    """Writes a checkpoint of random weights. The same seed means the same FP32 weights, whatever the family and shards.

    Returns the bytes of its tensors. Raises ValueError if the directory holds anything, unless `force`.
    """

    def produce(group: Group) -> Encoded:
        weights = {param.name: random_weight(param, config, seed) for param in group}
        return _encode(group, family, weights)

    return _write(directory, config, family, produce, config.to_json(), shard_bytes, force, progress, "make")


def convert(
    source: Checkpoint,
    directory: Path,
    family: Family,
    *,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    progress: bool | None = None,
) -> int:
    """Writes a checkpoint's weights in another family's formats. Returns the bytes of the new tensors.

    MXFP4 experts become NVFP4 with their values unchanged; everything else that changes format is dequantised and
    quantised. What does not change format keeps every byte. Raises ValueError for a pair of families that would round
    twice, or where source and directory are one.
    """
    if family not in CONVERSIONS[source.family]:
        allowed = " or ".join(CONVERSIONS[source.family])
        raise ValueError(f"a {source.family} checkpoint converts to {allowed}, not to {family}")
    if directory.resolve() == source.directory.resolve():
        raise ValueError(f"{directory} is the source")
    config_json = {**source.raw_config, "num_nextn_predict_layers": source.config.num_nextn_predict_layers}
    inexact: list[str] = []
    with Reader() as reader:

        def produce(group: Group) -> Encoded:
            entries = [source.entries[param.name] for param in group]
            if family == "nvfp4-experts" and entries[0].storage == "mxfp4" and not group[0].name.startswith("mtp."):
                return _cast(group, [source.read(reader, entry) for entry in entries], inexact)
            if all(entry.storage == entry.param.storage(family) for entry in entries):
                return {entry.param.name: _same_dtypes(entry, family, source.read(reader, entry)) for entry in entries}
            weights = {}
            for entry in entries:
                stored = source.read(reader, entry)
                is_table = entry.storage == "i64"
                weights[entry.param.name] = (
                    next(iter(stored.values())) if is_table else codec.decode(entry.storage, stored)
                )
            return _encode(group, family, weights)

        written = _write(
            directory, source.config, family, produce, config_json, shard_bytes, force, progress, "convert"
        )
    if inexact:
        log.warning("blocks too small for the range of NVFP4 scales were rounded in %s", ", ".join(inexact))
    return written


def _encode(group: Group, family: Family, weights: Mapping[str, Tensor]) -> Encoded:
    alpha = None
    if family == "nvfp4-experts" and group[0].storage(family) == "nvfp4":
        # NVIDIA's recipe gives gate and up one amax, hence one global scale; ModelOpt's gives each its own
        alpha = codec.shared_alpha([weights[param.name] for param in group if not param.name.endswith(".w2")])
    return {
        param.name: codec.encode(
            param,
            param.storage(family),
            weights[param.name],
            alpha=None if param.name.endswith(".w2") else alpha,
        )
        for param in group
    }


def _cast(group: Group, stored: list[dict[str, Tensor]], inexact: list[str]) -> Encoded:
    """An expert's MXFP4 matrices as NVFP4 of the same values, gate and up under one global scale."""
    found: Encoded = {}
    w1, w3, w2 = (codec.mxfp4(tensors) for tensors in stored)
    for names, t in (((group[0].name, group[1].name), codec.stack(w1, w3)), ((group[2].name,), w2)):
        cast, lost = reference.mxfp4_to_nvfp4(t)
        if int(lost):
            inexact.append(f"{' and '.join(names)} ({int(lost)})")
        for name, part in zip(names, codec.split(cast, len(names)), strict=True):
            found[name] = codec.nvfp4_tensors(part)
    return found


def _same_dtypes(entry: Entry, family: Family, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that keep their format, with dtypes and scalar shapes as the family writes them."""
    found = {}
    for suffix, spec in parts(entry.param, entry.param.storage(family)).items():
        if suffix not in stored:  # input_scale, which an export may lack
            found[suffix] = codec.uncalibrated()
        elif entry.storage == "i64":
            found[suffix] = stored[suffix].long()
        else:
            found[suffix] = stored[suffix].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
    return found


def _groups(config: ModelConfig, family: Family) -> Iterator[Group]:
    """Parameters that are written together: an expert's w1, w3 and w2; anything else alone."""
    expert: list[Param] = []
    for param in stored_params(config, family):
        if ".experts." not in param.name:
            yield (param,)
            continue
        expert.append(param)
        if len(expert) == 3:
            yield tuple(expert)
            expert = []


def _specs(group: Group, family: Family) -> dict[str, TensorSpec]:
    return {
        stored_name(param, family) + suffix: spec
        for param in group
        for suffix, spec in parts(param, param.storage(family)).items()
    }


def _write(
    directory: Path,
    config: ModelConfig,
    family: Family,
    produce: Callable[[Group], Encoded],
    config_json: Mapping[str, Any],
    shard_bytes: int,
    force: bool,
    progress: bool | None,
    desc: str,
) -> int:
    if shard_bytes <= 0:
        raise ValueError(f"the shard size must be positive, got {shard_bytes}")
    shards: list[list[Group]] = []
    room, total = 0, 0
    for group in _groups(config, family):
        size = sum(spec.bytes for spec in _specs(group, family).values())
        if not shards or size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(group)
        room -= size
        total += size
    _clear(directory, force)
    weight_map: dict[str, str] = {}
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=desc, disable=None if progress is None else not progress)
    with bar:
        for number, groups in enumerate(shards, start=1):
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            specs = {tensor: spec for group in groups for tensor, spec in _specs(group, family).items()}
            writer = ShardWriter(directory / name, specs)
            try:
                for group in groups:
                    encoded = produce(group)
                    for param in group:
                        for suffix, tensor in encoded[param.name].items():
                            writer.write(stored_name(param, family) + suffix, tensor)
                            bar.update(tensor.nbytes)
                writer.close()
            finally:
                writer.abort()
            weight_map.update(dict.fromkeys(specs, name))
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if (hf := hf_quant_config(config, family)) is not None:
        write_json(directory / "hf_quant_config.json", hf)
    final = {key: value for key, value in config_json.items() if key != "quantization_config"}
    if (quantization := quantization_config(config, family)) is not None:
        final["quantization_config"] = quantization
    write_json(directory / "config.json", final)
    return total


def _clear(directory: Path, force: bool) -> None:
    """Makes the directory; with `force`, takes an older checkpoint out of it, else refuses one that is not empty."""
    directory.mkdir(parents=True, exist_ok=True)
    present = list(directory.iterdir())
    if present and not force:
        raise ValueError(f"{directory} is not empty (--force replaces the checkpoint in it)")
    for path in present:
        shard = path.name.startswith("model-") and path.name.endswith((".safetensors", ".safetensors.part"))
        if shard or path.name.removesuffix(".part") in _CONFIG_NAMES:
            path.unlink()
