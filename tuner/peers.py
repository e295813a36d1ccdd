"""The libraries that a GEMM is compared with where they are installed: BF16 activations times NVFP4 weights, BF16 out.

    layer = PEERS["marlin"].prepare(weight, alpha)   # repacked once, as its own loader would
    launch = layer(x)                                # x [m, k] in BF16
    y = launch()                                     # [m, n]: what is captured and timed

Peers are found as a user has them: by the name of the package. Nothing of them is imported before `prepare`. The same
interface holds cuBLAS, and the FP8 product that shows how far Hopper's tensor cores go below 16 bits.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fp4suite import reference
from fp4suite.formats import BLOCK, E4M3_MAX, NVFP4Tensor

Launch = Callable[[], Tensor]
Layer = Callable[[Tensor], Launch]

# Of BF16's own rounding, 1.1e-3 of the result's scale; sums that pass through BF16 on their way add to it.
RMS_LIMIT = 6e-3
MAX_LIMIT = 0.1  # for one element: five standard deviations, rounded a few times


P = TypeVar("P")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer(Generic[P]):
    """A library's kernel. module: what is imported; package: what pip installs; note: what to know of its figures.

    prepare: P gives what is timed. also: other modules that it needs, by package.
    compiles: while running; `environment` is for processes that do nothing else.
    """

    name: str
    module: str
    package: str
    prepare: P
    note: str = ""
    also: Mapping[str, str] = field(default_factory=dict)  # module -> package
    compiles: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        """Why it cannot run here, or None: its packages are there."""
        wanted = {self.module: self.package} | dict(self.also)
        absent = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
        return f"not installed (pip install {' '.join(absent)})" if absent else None

    def version(self) -> str:
        """As its package states it; "unknown" where it lies on the path without metadata."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def cublas(weight: NVFP4Tensor, alpha: float) -> Layer:
    """Weights and activations in BF16. alpha is a power of two here, so that the weights are exact."""
    w = (reference.dequant_nvfp4(weight, torch.float32)).bfloat16()
    return lambda x: lambda: torch.matmul(x, w.T)


def scaled_mm(weight: NVFP4Tensor, alpha: float) -> Layer:
    """E4M3 on both sides under one scale each: a roof of speed, not a result to compare."""
    w = reference.dequant_nvfp4(weight, torch.float32)
    down = w.abs().amax() / E4M3_MAX
    w8 = (w / down).to(torch.float8_e4m3fn)

    def layer(x: Tensor) -> Launch:
        up = x.abs().amax().float().clamp_min(1e-12) / E4M3_MAX
        x8 = (x.float() / up).to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(
            x8, w8.T, scale_a=up, scale_b=down, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return layer


def marlin(weight: NVFP4Tensor, alpha: float) -> Layer:
    """Marlin as vLLM ships it.

    Its scales are FP16 numbers without the sign, cut to eight bits, after a power of two has brought the largest near
    448: what lies under 2^-6 then is lost, so that E4M3's subnormal scales count as zero beside one of 224 or more.
    """
    ops = vllm_ops("_C", "marlin_gemm")
    (n, k), device = weight.shape, weight.device
    codes = ops.gptq_marlin_repack(weight.data.view(torch.int32).T.contiguous(), k, n, 4, False)
    largest = float(weight.sf.float().amax())
    lift = 2.0 ** int(torch.tensor(E4M3_MAX / largest).log2().floor()) if 0 < largest < E4M3_MAX else 1.0
    # rows of 64 columns as 8 x 8, transposed, and the middle two of each four exchanged
    sf = weight.sf.float().T.reshape(k // BLOCK, n // 64, 8, 8).transpose(-1, -2)
    sf = sf.reshape(-1, 2, 2).transpose(-1, -2).reshape(k // BLOCK, n)
    half = (sf * lift).half() * 128
    half = torch.where(half < 2, 0, half)
    sf = (half.view(torch.int16) >> 7).to(torch.uint8).view(torch.float8_e4m3fn)
    # a code is decoded with BF16's exponent bias short of 126, a scale with 7 (the 128 above) too many
    scale = torch.tensor([alpha * 2.0 ** (126 - 7) / lift], device=device)
    locks = torch.zeros(_multiprocessors(device), dtype=torch.int32, device=device)
    fixed = {
        "c_or_none": None,
        "b_q_weight": codes,
        "b_bias_or_none": None,
        "b_scales": sf,
        "a_scales": None,
        "global_scale": scale,
        "b_zeros_or_none": None,
        "workspace": locks,
        "b_type_id": _E2M1_ID,
        "size_n": n,
        "size_k": k,
        "use_atomic_add": False,
        "use_fp32_reduce": True,
        "is_zp_float": False,
    }
    names = [a.name for a in ops.marlin_gemm.default._schema.arguments]
    unknown = [name for name in names if name not in fixed and name not in ("a", "size_m")]
    if unknown:
        raise RuntimeError(f"this vLLM's marlin_gemm takes {', '.join(unknown)}, which this adapter does not know")

    def layer(x: Tensor) -> Launch:
        arguments = [{"a": x, "size_m": x.shape[0], **fixed}[name] for name in names]
        return lambda: ops.marlin_gemm(*arguments)

    return layer


# vLLM's number of a type: bits of exponent (8), of mantissa (8), signed (1), bias (32), finite only (1), kind of NaN
_E2M1_ID = 2 | 1 << 8 | 1 << 16 | 1 << 49


@functools.cache
def vllm_ops(namespace: str, *needed: str) -> Any:
    """torch.ops.<namespace> from vLLM's library with these operators, without importing vLLM itself.

    Raises ImportError where no such library is found.
    """
    spec = importlib.util.find_spec("vllm")
    folders = [Path(p) for p in (spec.submodule_search_locations or ())] if spec is not None else []
    for name in (f"{namespace}_stable_libtorch.abi3.so", f"{namespace}.abi3.so"):
        for folder in folders:
            if (folder / name).exists():
                torch.ops.load_library(str(folder / name))
                ops = getattr(torch.ops, namespace)
                if all(hasattr(ops, op) for op in needed):
                    return ops
    raise ImportError(f"no library with {', '.join(needed)} under {', '.join(map(str, folders)) or 'vllm'}")


def humming(weight: NVFP4Tensor, alpha: float) -> Layer:
    """Humming's layer, loaded as from a ModelOpt checkpoint. Sums split along K may lose a little: 3.5e-3 was seen.

    Left to itself it compiles what its heuristics have for any number of rows, 33 kernels a weight, before the first
    product: it is told to take the one for these rows.
    """
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    n, k = weight.shape
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"quant_method": "modelopt", "quant_algo": "nvfp4"},
        torch_dtype=torch.bfloat16,
    ).to(weight.device)
    scale = torch.tensor([alpha], device=weight.device)
    layer.load_from_tensors({"weight": weight.data, "weight_scale": weight.sf, "weight_scale_2": scale})
    layer.transform()
    by_rows = get_heuristics_config(layer.humming_config, device=weight.device)

    def prepared(x: Tensor) -> Launch:
        (config,) = (config for least, most, config in by_rows if least < len(x) <= most)
        return lambda: layer(x, tuning_config=config)

    return prepared


def quack(weight: NVFP4Tensor, alpha: float) -> Layer:
    """QuACK's weight-only GEMM; it pads n to 128."""
    from quack.gemm_w4 import gemm_w4a16, prepare_w4_weight

    n = weight.shape[0]
    codes, sf = prepare_w4_weight(weight.data, weight.sf, "nvfp4")
    return lambda x: lambda: gemm_w4a16(x, codes, sf, tensor_scale=alpha, n_out=n, wformat="nvfp4")


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmPeer(Peer[Callable[[NVFP4Tensor, float], Layer]]):
    """prepare(weight, alpha) gives what multiplies by that weight."""


PEERS: dict[str, GemmPeer] = {
    p.name: p
    for p in (
        GemmPeer(name="cublas_bf16", module="torch", package="torch", prepare=cublas, note="weights already in BF16"),
        GemmPeer(
            name="marlin",
            module="vllm",
            package="vllm",
            prepare=marlin,
            note="drops subnormal block scales beside one of 224 or more",
        ),
        GemmPeer(
            name="humming",
            module="humming",
            package="humming-kernels",
            prepare=humming,
            compiles=True,
            environment={"HUMMING_MAX_PARALLEL_BUILD_WORKERS": "2"},
        ),
        GemmPeer(
            name="quack",
            module="quack",
            package="quack-kernels",
            prepare=quack,
            note="pads n to 128",
            compiles=True,
        ),
    )
}
FP8 = GemmPeer(name="fp8", module="torch", package="torch", prepare=scaled_mm, note="E4M3 operands, one scale each")


def check_names(names: list[str]) -> tuple[str, ...]:
    """Peers by name, all of them for none; cuBLAS always. Raises ValueError for one that does not exist."""
    for name in names:
        if name not in PEERS:
            raise ValueError(f"--peers must be of {', '.join(PEERS)}, got {name!r}")
    return tuple(name for name in PEERS if not names or name in names or name == "cublas_bf16")


def assert_close(got: Tensor, want: Tensor, scale: Tensor) -> float:
    """Root mean square of (got - want) / scale, where scale [.., n] is what a sum of that many random terms comes to.

    Raises AssertionError if it is over RMS_LIMIT, or if one element is off by more than MAX_LIMIT.
    """
    if got.shape != want.shape:
        raise AssertionError(f"result is {list(got.shape)}, want {list(want.shape)}")
    off = (got.double() - want).abs()
    error = torch.where(scale > 0, off / scale, torch.where(off == 0, 0.0, torch.inf))
    rms, most = float(error.square().mean().sqrt()), float(error.amax())
    if not (rms <= RMS_LIMIT and most <= MAX_LIMIT):
        raise AssertionError(
            f"differs from the reference: error {rms:.2g} (limit {RMS_LIMIT:g}), largest {most:.2g} ({MAX_LIMIT:g})"
        )
    return rms


def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
