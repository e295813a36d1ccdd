"""Problems: what is to be computed, in named dimensions. They count the work, not the kernel.

`flops` and `bytes` are what the mathematics needs: every input read once, every output written once. A problem is
hashable, made of host integers and strings only, and `dims()` is how tables and result rows spell it.
"""

from dataclasses import MISSING, dataclass, fields
from typing import ClassVar, Literal

from .formats import BLOCK, SfLayout
from .layouts import Order, blocked_128x4_bytes

Rule = Literal["absmax", "mse", "modelopt_weight"]
RULES: tuple[Rule, ...] = ("absmax", "mse", "modelopt_weight")
Act = Literal["bf16", "nvfp4", "fp8"]  # the format of a GEMM's activations
ACTS: tuple[Act, ...] = ("bf16", "nvfp4", "fp8")
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Base of all problems; `op` names the op in `fp4suite.ops`."""

    op: ClassVar[str]

    @property
    def flops(self) -> int:
        raise NotImplementedError

    @property
    def bytes(self) -> int:
        raise NotImplementedError

    def dims(self) -> dict[str, int | str]:
        """Named dimensions, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in self.dims().items())


def nvfp4_bytes(m: int, k: int, sf_layout: SfLayout = "linear") -> int:
    """Codes and block scales of an [m, k] NVFP4 matrix."""
    sf = m * (k // BLOCK) if sf_layout == "linear" else blocked_128x4_bytes(m, k // BLOCK)
    return m * k // 2 + sf


def fp8_bytes(m: int, k: int) -> int:
    """An [m, k] matrix in E4M3 with a scale a row."""
    return m * k + 4 * m


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeProblem(Problem):
    """[m, k] -> NVFP4, with the global scale given."""

    op: ClassVar[str] = "quantize_nvfp4"
    m: int
    k: int
    x: str = "bf16"
    rule: Rule = "absmax"
    sf_layout: SfLayout = "linear"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k  # a maximum and a multiply an element

    @property
    def bytes(self) -> int:
        return ELEMENT_BYTES[self.x] * self.m * self.k + nvfp4_bytes(self.m, self.k, self.sf_layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeFp8Problem(Problem):
    """[m, k] -> E4M3 with a scale a row."""

    op: ClassVar[str] = "quantize_fp8"
    m: int
    k: int
    x: str = "bf16"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k

    @property
    def bytes(self) -> int:
        return ELEMENT_BYTES[self.x] * self.m * self.k + fp8_bytes(self.m, self.k)


@dataclass(frozen=True, slots=True, kw_only=True)
class DequantProblem(Problem):
    """NVFP4 [m, k] -> `out`."""

    op: ClassVar[str] = "dequant_nvfp4"
    m: int
    k: int
    out: str = "bf16"
    sf_layout: SfLayout = "linear"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k

    @property
    def bytes(self) -> int:
        return nvfp4_bytes(self.m, self.k, self.sf_layout) + ELEMENT_BYTES[self.out] * self.m * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsnormQuantizeProblem(Problem):
    """RMSNorm of [m, k] rows with a weight, then NVFP4, with the global scale given."""

    op: ClassVar[str] = "rmsnorm_quantize"
    m: int
    k: int
    x: str = "bf16"
    rule: Rule = "absmax"
    sf_layout: SfLayout = "linear"

    @property
    def flops(self) -> int:
        return 6 * self.m * self.k

    @property
    def bytes(self) -> int:
        size = ELEMENT_BYTES[self.x]
        return size * self.m * self.k + size * self.k + nvfp4_bytes(self.m, self.k, self.sf_layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluQuantizeProblem(Problem):
    """Clamped SwiGLU of [m, 2 k] (gate columns first) -> NVFP4 [m, k], with the global scale given."""

    op: ClassVar[str] = "swiglu_quantize"
    m: int
    k: int
    x: str = "bf16"
    rule: Rule = "absmax"
    sf_layout: SfLayout = "linear"

    @property
    def flops(self) -> int:
        return 10 * self.m * self.k

    @property
    def bytes(self) -> int:
        return 2 * ELEMENT_BYTES[self.x] * self.m * self.k + nvfp4_bytes(self.m, self.k, self.sf_layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmProblem(Problem):
    """d[m, n] = a[m, k] @ b[n, k].T, b in NVFP4, a in BF16 (`act="bf16"`), NVFP4, or E4M3 with a scale a row ("fp8").

    out: "bf16", "fp32", or "nvfp4" under a given global scale.
    order: how b lies in memory (`NVFP4Tensor.order`)
    """

    op: ClassVar[str] = "gemm_nvfp4"
    m: int
    n: int
    k: int
    act: Act = "bf16"
    out: str = "bf16"
    segments: int = 1  # column runs of the output with an alpha of their own
    order: Order = "rows"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def bytes(self) -> int:
        m, k = self.m, self.k
        a = {"bf16": 2 * m * k, "nvfp4": nvfp4_bytes(m, k), "fp8": fp8_bytes(m, k)}[self.act]
        d = nvfp4_bytes(self.m, self.n) if self.out == "nvfp4" else ELEMENT_BYTES[self.out] * self.m * self.n
        return a + nvfp4_bytes(self.n, self.k) + d


PROBLEMS: dict[str, type[Problem]] = {
    p.op: p
    for p in (
        QuantizeProblem,
        QuantizeFp8Problem,
        DequantProblem,
        RmsnormQuantizeProblem,
        SwigluQuantizeProblem,
        GemmProblem,
    )
}


def complete(op: str, dims: dict[str, int | str]) -> dict[str, int | str]:
    """`dims` with the dimensions that `op` has gained since they were written, at their defaults, in today's order.

    Dimensions that this version does not know are kept, at the end; so are those of an unknown op.
    """
    if op not in PROBLEMS:
        return dims
    defaults = {f.name: f.default for f in fields(PROBLEMS[op])}
    known = {name: dims.get(name, default) for name, default in defaults.items()}
    return {name: value for name, value in known.items() if value is not MISSING} | dims


def from_dims(op: str, dims: dict[str, int | str]) -> Problem:
    """The problem that `dims()` described. Raises ValueError for an unknown op or dimension."""
    if op not in PROBLEMS:
        raise ValueError(f"op must be one of {', '.join(PROBLEMS)}, got {op!r}")
    try:
        return PROBLEMS[op](**dims)
    except TypeError as e:
        raise ValueError(f"dimensions of {op} are {[f.name for f in fields(PROBLEMS[op])]}, got {dims}") from e
