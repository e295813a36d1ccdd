"""A model from a checkpoint directory."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from fp4suite import arch
from fp4suite.formats import WeightLayout

from ..config import ModelConfig
from ..linear import ActFormat, Linear
from ..transformer import Transformer
from .files import CheckpointError
from .read import Checkpoint, Weights, weight_format


def load(
    model: Transformer | ModelConfig | None,
    directory: str | Path | Checkpoint,
    device: torch.device | str = "cpu",
    *,
    weights: Weights = "stored",
    act_dtype: torch.dtype | None = None,
    act_format: ActFormat | None = None,
    drafts: str | Path | Checkpoint | None = None,
    layout: WeightLayout | None = None,
    progress: bool | None = None,
) -> Transformer:
    """The model with the weights of a checkpoint, on `device`.

    model       built already (on the meta device, say), or the config that the checkpoint must have, or None
    weights     "stored" keeps each format (MXFP4 experts become NVFP4), "fp32" dequantises everything
    act_dtype   of activations; by default FP32 with weights="fp32", else BF16
    act_format  "nvfp4" quantises what goes into NVFP4 linears (W4A4), "float" does not (W4A16); by default what the
                device's tensor cores take: NVFP4 on sm_100a, BF16 elsewhere. "fp8" rounds inputs of dense linears, and
                their weights in registers, to E4M3 (W4A8) where the device has a kernel for it
    drafts      another checkpoint to take the draft blocks (MTP) from, for one that has none
    layout      of dense NVFP4 weights whose shape allows it; by default what the device's kernels read. A weight is
                laid out in place as soon as it is whole; those that read one input are copied into one (`Joined`), so
                that the most ever held is the model and the weights of one such group again
    progress    a progress bar; None shows one on a terminal

    Without draft blocks in the files, a config is taken as one without them. Raises CheckpointError (a ValueError) for
    anything missing, surplus, misshapen, cut short, not a number, or not of this model.
    """
    checkpoint = directory if isinstance(directory, Checkpoint) else Checkpoint(directory)
    config = checkpoint.config
    sources = [(checkpoint, "")]
    if drafts is not None:
        other = drafts if isinstance(drafts, Checkpoint) else Checkpoint(drafts)
        config = _with_drafts(checkpoint, other)
        sources.append((other, "mtp."))
    formats = {
        name: held
        for source, prefix in sources
        for name, held in source.formats(weights).items()
        if name.startswith(prefix)
    }
    if not isinstance(model, Transformer):
        if model is not None:
            checkpoint.expect_config(model)
        if act_dtype is None:
            act_dtype = torch.float32 if weights == "fp32" else torch.bfloat16
        if act_format is None:
            act_format = default_act_format(device)
        model = Transformer(
            config,
            weight_format(formats),
            act_dtype=act_dtype,
            act_format=act_format,
            device="meta",
        )
    _expect_weights(checkpoint, model, formats.keys())
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    groups = model.joined()
    missing = {group: len(group.parts) for group in groups.values()}
    for source, prefix in sources:
        for name, weight in source.weights(device, weights=weights, only=prefix, progress=progress):
            try:
                model.set_weight(name, weight)
            except (ValueError, TypeError) as error:
                wanted = "a weight that fits the model"
                raise CheckpointError(source.directory, name, wanted=wanted, got=str(error)) from None
            if group := groups.get(name):
                missing[group] -= 1
                if not missing[group]:
                    group.join(layout, device)
            elif name in linears:
                linears[name].lay_out(layout, device)
    return model


def default_act_format(device: torch.device | str) -> ActFormat:
    """How NVFP4 linears take their input on this device."""
    return "nvfp4" if arch.of(device) == "sm_100a" else "float"


def _with_drafts(checkpoint: Checkpoint, other: Checkpoint) -> ModelConfig:
    if checkpoint.config.num_nextn_predict_layers:
        raise CheckpointError(checkpoint.directory, None, wanted="no draft blocks beside `drafts`", got="its own")
    if not other.config.num_nextn_predict_layers:
        raise CheckpointError(other.directory, None, wanted="draft blocks", got="none")
    config = replace(checkpoint.config, num_nextn_predict_layers=other.config.num_nextn_predict_layers)
    other.expect_config(config)
    return config


def _expect_weights(checkpoint: Checkpoint, model: Transformer, names: Iterable[str]) -> None:
    """The model has just the weights that the checkpoint will bring."""
    ours = {name for name, _ in model.weights()}
    theirs = set(names)
    if missing := sorted(ours - theirs):
        wanted = f"a weight for the model's {missing[0]}"
        raise CheckpointError(checkpoint.directory, missing[0], wanted=wanted, got=f"none ({len(missing)} lack)")
    if extra := sorted(theirs - ours):
        wanted = "weights that the model has a place for"
        raise CheckpointError(checkpoint.directory, extra[0], wanted=wanted, got=f"one it lacks ({len(extra)} such)")
