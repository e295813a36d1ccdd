"""The list of kernels. A row names a module; nothing is imported before `load`.

A kernel module holds, in this order: Config, SPACE, supports(problem, config) -> str | None, device code,
launch(operands..., out, config), build(problem, config, arch) -> Built. See CONTRIBUTING.md.
"""

import functools
import hashlib
import importlib
import importlib.util
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from .formats import WeightLayout

REFERENCE = "reference"  # the kernel name under which fp4suite.reference can be asked for


@dataclass(frozen=True, slots=True)
class Kernel:
    """op and name as in tables; module as importlib wants it; archs it runs on."""

    op: str
    name: str
    module: str
    archs: tuple[str, ...]

    @property
    def emulated(self) -> bool:
        """Whether `ptx_emulator.emulate` runs its launches: it stands in for the GPU of CuTe DSL, not of Triton."""
        return self.module.startswith("kernels_cute.")


_BOTH = ("sm_90a", "sm_100a")
KERNELS: list[Kernel] = [
    Kernel("quantize_nvfp4", "triton_quantize_nvfp4", "kernels_triton.quantize_nvfp4", _BOTH),
    Kernel("dequant_nvfp4", "triton_dequant_nvfp4", "kernels_triton.dequant_nvfp4", _BOTH),
    Kernel("rmsnorm_quantize", "triton_rmsnorm_quantize", "kernels_triton.rmsnorm_quantize", _BOTH),
    Kernel("swiglu_quantize", "triton_swiglu_quantize", "kernels_triton.swiglu_quantize", _BOTH),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm90_wgmma", "kernels_cute.gemm_nvfp4_sm90_wgmma", ("sm_90a",)),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm90_skinny", "kernels_cute.gemm_nvfp4_sm90_skinny", ("sm_90a",)),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm90", "kernels_cute.gemm_nvfp4_sm90", ("sm_90a",)),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm100", "kernels_cute.gemm_nvfp4_sm100", ("sm_100a",)),
]


def kernels(op: str | None = None, arch: str | None = None) -> list[Kernel]:
    """Rows in order of preference, for one op and architecture if given."""
    return [k for k in KERNELS if op in (None, k.op) and (arch is None or arch in k.archs)]


def find(name: str) -> Kernel:
    """The row of this name. Raises ValueError if there is none."""
    for k in KERNELS:
        if k.name == name:
            return k
    raise ValueError(f"no kernel is called {name!r}; there are {', '.join(k.name for k in KERNELS)}")


@functools.cache
def load(name: str) -> ModuleType:
    """Import the module of a kernel."""
    return importlib.import_module(find(name).module)


def weight_layout(module: ModuleType) -> WeightLayout:
    """The layout of weights that a GEMM's module reads: its SF_LAYOUT, and its WEIGHT_ORDER if it is not rows."""
    return WeightLayout(getattr(module, "WEIGHT_ORDER", "rows"), module.SF_LAYOUT)


@functools.cache
def source_hash(name: str) -> str:
    """SHA-256 (12 hex digits) of the kernel's source file, of its parts and of its package's shared files.

    `<kernel>_*.py` is a part of the kernel. What is no kernel's and no part of another one is shared, so that a change
    of a helper is seen in every kernel that may use it.
    """
    module = find(name).module
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"kernel {name} names the module {module}, which is not installed")
    own = Path(spec.origin)
    prefix = module.rpartition(".")[0]
    kernels = {k.module.rpartition(".")[2] for k in KERNELS if k.module.rpartition(".")[0] == prefix}
    files = sorted(own.parent.glob("*.py"))
    shared = [p for p in files if p.stem not in kernels and _counts_for(own.stem, p.stem, kernels)]
    digest = hashlib.sha256()
    for path in (own, *shared):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _counts_for(kernel: str, stem: str, kernels: set[str]) -> bool:
    owners = {k for k in kernels if stem.startswith(f"{k}_")}
    return not owners or kernel in owners


def make_config(module: ModuleType, knobs: dict[str, Any]) -> Any:
    """`module.Config(**knobs)`. Raises ValueError for a knob that Config does not have."""
    known = {f.name for f in fields(module.Config)}
    unknown = sorted(set(knobs) - known)
    if unknown:
        raise ValueError(f"{module.__name__}.Config has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return module.Config(**knobs)
