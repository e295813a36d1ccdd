"""One weight between FP32 and what a file stores of it, by the suffixes of its tensors' names (see `inventory`)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fp4suite import reference
from fp4suite.formats import FP8BlockTensor, MXFP4Tensor, NVFP4Tensor

from .inventory import Param, Storage

# What `input_scale` supposes where nothing was calibrated: most inputs are RMS-normed, their maximum a few units
ACTIVATION_AMAX = 8.0
_GLOBAL = 6.0 * 448.0  # the largest number that codes and block scales reach without the global scale


def encode(param: Param, storage: Storage, w: Tensor, *, alpha: Tensor | None = None) -> dict[str, Tensor]:
    """The stored tensors of an FP32 weight (int64 for a table). alpha: the global scale, if NVFP4 is to share one."""
    suffix = "" if param.bare else ".weight"
    if storage == "i64":
        return {suffix: w}
    if storage in ("bf16", "fp32"):
        return {suffix: w.to(torch.bfloat16 if storage == "bf16" else torch.float32)}
    if storage == "fp8":
        fp8 = reference.quantize_fp8_block(w)
        return {".weight": fp8.data, ".scale": fp8.sf.view(torch.float8_e8m0fnu)}
    if storage == "mxfp4":
        mx = reference.quantize_mxfp4(w)
        return {".weight": mx.data.view(torch.int8), ".scale": mx.sf.view(torch.float8_e8m0fnu)}
    return nvfp4_tensors(reference.quantize_nvfp4(w, alpha=alpha, rule="modelopt_weight"))


def nvfp4_tensors(t: NVFP4Tensor) -> dict[str, Tensor]:
    """The stored tensors of one NVFP4 matrix, by rows and with linear scales whatever its layout."""
    t = t.with_order("rows").with_sf_layout("linear")
    return {
        ".weight": t.data,
        ".weight_scale": t.sf,
        ".weight_scale_2": t.alpha,
        ".input_scale": uncalibrated(),
    }


def uncalibrated() -> Tensor:
    """The `input_scale` of a linear whose inputs were not observed."""
    return torch.tensor(ACTIVATION_AMAX / _GLOBAL)


def shared_alpha(weights: list[Tensor]) -> Tensor:
    """One global scale for several FP32 weights."""
    return torch.stack([w.abs().amax() for w in weights]).amax() / _GLOBAL


def decode(storage: Storage, stored: Mapping[str, Tensor]) -> Tensor:
    """FP32 of a weight, from its stored tensors."""
    if storage in ("bf16", "fp32"):
        (values,) = stored.values()
        return values.float()
    data = stored[".weight"]
    if storage == "fp8":
        return reference.dequant_fp8_block(FP8BlockTensor(data, stored[".scale"].view(torch.uint8)), torch.float32)
    if storage == "mxfp4":
        return reference.dequant_mxfp4(mxfp4(stored), torch.float32)
    alpha = stored[".weight_scale_2"].view(())
    return reference.dequant_nvfp4(NVFP4Tensor(data.view(torch.uint8), stored[".weight_scale"], alpha), torch.float32)


def mxfp4(stored: Mapping[str, Tensor]) -> MXFP4Tensor:
    return MXFP4Tensor(stored[".weight"].view(torch.uint8), stored[".scale"].view(torch.uint8))


def stack(a: MXFP4Tensor, b: MXFP4Tensor) -> MXFP4Tensor:
    """The rows of a, then those of b."""
    return MXFP4Tensor(torch.cat((a.data, b.data)), torch.cat((a.sf, b.sf)))


def split(t: NVFP4Tensor, count: int) -> list[NVFP4Tensor]:
    """Equal runs of rows of one matrix, all under its one alpha."""
    rows = t.data.chunk(count), t.sf.view(torch.uint8).chunk(count)
    return [NVFP4Tensor(data, sf.view(torch.float8_e4m3fn), t.alpha) for data, sf in zip(*rows, strict=True)]
