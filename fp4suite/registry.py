"""The list of kernels. A row names a module; nothing is imported before `load`.

A kernel module holds, in this order: Config, SPACE, supports(problem, config) -> str | None, device code,
launch(operands..., out, config), build(problem, config, arch) -> Built. See CONTRIBUTING.md.

A module whose configs do well at some m and badly at the next says whether two are of one kind,
`alike(config, m, other) -> bool`: what was tuned for the one then serves the other, and else the default does.

A module may say in which order a config sums, `arithmetic(problem, config) -> str`: configs of one arithmetic give a
row the same bits, whatever the other rows are. INVARIANT names the one that every m has a config of, and
`in_arithmetic(problem, wanted)` gives the default among those of one.
"""

import ast
import functools
import hashlib
import importlib
import importlib.util
import io
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

from .formats import WeightLayout

_EXACT = "as the reference"  # the arithmetic of exact kernels
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
REFERENCE = "reference"  # the kernel name under which fp4suite.reference can be asked for


@dataclass(frozen=True, slots=True)
class Kernel:
    """op and name as in tables; module as importlib wants it; archs it runs on.

    exact: any config gives the reference's bytes, row by row.
    any_m: `supports` says the same of every m.
    predicted: without a GPU the cost model chooses its config; else its default, which goes by times
    measured on an H100.
    """

    op: str
    name: str
    module: str
    archs: tuple[str, ...]
    exact: bool = False
    any_m: bool = False
    predicted: bool = False

    @property
    def emulated(self) -> bool:
        """Whether `ptx_emulator.emulate` runs its launches: it stands in for the GPU of CuTe DSL, not of Triton."""
        return self.module.startswith("kernels_cute.")


_BOTH = ("sm_90a", "sm_100a")
KERNELS: list[Kernel] = [
    Kernel("quantize_nvfp4", "triton_quantize_nvfp4", "kernels_triton.quantize_nvfp4", _BOTH, exact=True),
    Kernel("dequant_nvfp4", "triton_dequant_nvfp4", "kernels_triton.dequant_nvfp4", _BOTH, exact=True),
    Kernel("rmsnorm_quantize", "triton_rmsnorm_quantize", "kernels_triton.rmsnorm_quantize", _BOTH, exact=True),
    Kernel("rms_norm", "triton_rms_norm", "kernels_triton.rms_norm", _BOTH, exact=True),
    Kernel("swiglu_quantize", "triton_swiglu_quantize", "kernels_triton.swiglu_quantize", _BOTH, exact=True),
    Kernel("swiglu", "triton_swiglu", "kernels_triton.swiglu", _BOTH, exact=True),
    Kernel("embed", "triton_embed", "kernels_triton.embed", _BOTH, exact=True),
    Kernel("quantize_fp8", "triton_quantize_fp8", "kernels_triton.quantize_fp8", _BOTH, exact=True),
    Kernel("qnorm_rope", "triton_qnorm_rope", "kernels_triton.qnorm_rope", _BOTH, exact=True),
    Kernel(
        "qnorm_rope_quantize", "triton_qnorm_rope_quantize", "kernels_triton.qnorm_rope_quantize", _BOTH, exact=True
    ),
    Kernel(
        "kv_norm_rope_insert", "triton_kv_norm_rope_insert", "kernels_triton.kv_norm_rope_insert", _BOTH, exact=True
    ),
    Kernel(
        "qkv_norm_rope_insert", "triton_qkv_norm_rope_insert", "kernels_triton.qkv_norm_rope_insert", _BOTH, exact=True
    ),
    Kernel("rope_inverse", "triton_rope_inverse", "kernels_triton.rope_inverse", _BOTH, exact=True),
    Kernel("rope_inverse_", "triton_rope_inverse_in_place", "kernels_triton.rope_inverse_in_place", _BOTH, exact=True),
    Kernel(
        "rope_inverse_quantize",
        "triton_rope_inverse_quantize",
        "kernels_triton.rope_inverse_quantize",
        _BOTH,
        exact=True,
    ),
    Kernel("compress_kv", "triton_compress_kv", "kernels_triton.compress_kv", _BOTH, exact=True),
    Kernel("compress_kv_pair", "triton_compress_kv_pair", "kernels_triton.compress_kv_pair", _BOTH, exact=True),
    Kernel("index_logits", "cute_index_logits_sm90", "kernels_cute.index_logits_sm90", ("sm_90a",)),
    Kernel("index_logits", "triton_index_logits", "kernels_triton.index_logits", _BOTH),
    Kernel("index_query", "triton_index_query", "kernels_triton.index_query", _BOTH, exact=True),
    Kernel("csa_queries", "triton_csa_queries", "kernels_triton.csa_queries", _BOTH, exact=True),
    Kernel("index_topk", "cute_index_topk", "kernels_cute.index_topk", _BOTH, exact=True),
    Kernel("index_topk", "triton_index_topk", "kernels_triton.index_topk", _BOTH, exact=True),
    Kernel(
        "hyper_connection_pre", "cute_hyper_connection_pre_sm90", "kernels_cute.hyper_connection_pre_sm90", ("sm_90a",)
    ),
    Kernel("hyper_connection_pre", "triton_hyper_connection_pre", "kernels_triton.hyper_connection_pre", _BOTH),
    Kernel(
        "hyper_connection_post",
        "triton_hyper_connection_post",
        "kernels_triton.hyper_connection_post",
        _BOTH,
        exact=True,
    ),
    Kernel(
        "hyper_connection_head",
        "cute_hyper_connection_head_sm90",
        "kernels_cute.hyper_connection_head_sm90",
        ("sm_90a",),
    ),
    Kernel("hyper_connection_head", "triton_hyper_connection_head", "kernels_triton.hyper_connection_head", _BOTH),
    Kernel(
        "hyper_connection_post_pre",
        "cute_hyper_connection_post_pre_sm90",
        "kernels_cute.hyper_connection_post_pre_sm90",
        ("sm_90a",),
    ),
    Kernel(
        "hyper_connection_post_pre",
        "triton_hyper_connection_post_pre",
        "kernels_triton.hyper_connection_post_pre",
        _BOTH,
    ),
    Kernel("route", "triton_route", "kernels_triton.route", _BOTH, exact=True),
    Kernel("permute", "triton_permute_small", "kernels_triton.permute_small", _BOTH, exact=True),
    Kernel("permute", "triton_permute", "kernels_triton.permute", _BOTH, exact=True),
    Kernel("combine", "triton_combine", "kernels_triton.combine", _BOTH, exact=True),
    Kernel("sample", "cute_sample_sm90", "kernels_cute.sample_sm90", ("sm_90a",), exact=True),
    Kernel("sample", "triton_sample", "kernels_triton.sample", _BOTH, exact=True),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm90_wgmma", "kernels_cute.gemm_nvfp4_sm90_wgmma", ("sm_90a",), any_m=True),
    Kernel(
        "gemm_nvfp4", "cute_gemm_nvfp4_sm90_skinny", "kernels_cute.gemm_nvfp4_sm90_skinny", ("sm_90a",), predicted=True
    ),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm90", "kernels_cute.gemm_nvfp4_sm90", ("sm_90a",), predicted=True),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm90_fp8", "kernels_cute.gemm_nvfp4_sm90_fp8", ("sm_90a",), any_m=True),
    Kernel("gemm_nvfp4", "cute_gemm_nvfp4_sm100", "kernels_cute.gemm_nvfp4_sm100", ("sm_100a",), predicted=True),
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


def default_config(module: ModuleType, problem: Any) -> Any:
    """What runs where no table knows better: the module's `default(problem)` if it has one, else `Config()`."""
    own = getattr(module, "default", None)
    return own(problem) if own is not None else module.Config()


def arithmetic(kernel: str, problem: Any, config: Any) -> str | None:
    """In which order a config sums: with one arithmetic a row has the same bits. None if the module does not say."""
    if find(kernel).exact:
        return _EXACT
    own = getattr(load(kernel), "arithmetic", None)
    return own(problem, config) if own is not None else None


def alike(kernel: str, config: Any, m: int, other: int) -> bool:
    """Whether what was tuned for `other` tokens serves so many; every m, for a module that does not say."""
    own = getattr(load(kernel), "alike", None)
    return m == other or own is None or own(config, m, other)


def invariant(kernel: str) -> str | None:
    """The arithmetic of which there is a config for every m; None if the module names none."""
    return _EXACT if find(kernel).exact else getattr(load(kernel), "INVARIANT", None)


def config_of(kernel: str, problem: Any, wanted: str) -> Any | None:
    """The default among a kernel's configs of one arithmetic, None where it has none for the problem.

    It comes from the module's `in_arithmetic(problem, wanted)` if it has one, else it is the default itself.
    """
    module = load(kernel)
    own = getattr(module, "in_arithmetic", None)
    config = own(problem, wanted) if own is not None else default_config(module, problem)
    if config is None or module.supports(problem, config) is not None:
        return None
    return config if arithmetic(kernel, problem, config) == wanted else None


@functools.cache
def source_hash(name: str) -> str:
    """SHA-256 (12 hex digits) of the code in the kernel's source file and in the files of its package that it imports,
    also by way of others: what decides which machine code comes out, beside config and compilers.
    """
    module = find(name).module
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"kernel {name} names the module {module}, which is not installed")
    return _hash((path.name, code(path.read_text(encoding="utf-8")).encode()) for path in sources(Path(spec.origin)))


def files_hash(paths: Iterable[Path]) -> str:
    """SHA-256 (12 hex digits) of files: their names and what is in them, in this order."""
    return _hash((path.name, path.read_bytes()) for path in paths)


def _hash(parts: Iterable[tuple[str, bytes]]) -> str:
    digest = hashlib.sha256()
    for name, text in parts:
        digest.update(name.encode() + b"\0" + text + b"\0")
    return digest.hexdigest()[:12]


def code(source: str) -> str:
    """A source without comments, docstrings and empty lines, which no machine code depends on."""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            assert text.end_lineno is not None
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def sources(own: Path) -> list[Path]:
    """A module's file, then those of its package that it imports, directly or not, by name."""
    found, waiting = {own}, [own]
    while waiting:
        for name in _siblings(waiting.pop().read_text(encoding="utf-8")):
            path = own.with_name(f"{name}.py")
            if path.exists() and path not in found:
                found.add(path)
                waiting.append(path)
    return [own, *sorted(found - {own})]


@functools.cache
def _siblings(source: str) -> frozenset[str]:
    """Modules of its own package that a source imports: `from .x import y`, `from . import x`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module.partition(".")[0]} if node.module else {alias.name for alias in node.names}
    return frozenset(names)


def make_config(module: ModuleType, knobs: dict[str, Any]) -> Any:
    """`module.Config(**knobs)`. Raises ValueError for a knob that Config does not have."""
    known = {f.name for f in fields(module.Config)}
    unknown = sorted(set(knobs) - known)
    if unknown:
        raise ValueError(f"{module.__name__}.Config has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    return module.Config(**knobs)
