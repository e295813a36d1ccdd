"""Problems: what is to be computed, in named dimensions. They count the work, not the kernel.

`flops` and `bytes` are what the mathematics needs: every input read once, every output written once. A problem is
hashable, made of host integers and strings only, and `dims()` is how tables and result rows spell it.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from typing import ClassVar, Literal, cast

from .formats import BLOCK, IndexFormat, KVFormat, RowLayout, SfLayout, index_layout, kv_layout
from .layouts import Order, blocked_128x4_bytes

Rule = Literal["absmax", "mse", "modelopt_weight"]
RULES: tuple[Rule, ...] = ("absmax", "mse", "modelopt_weight")
Act = Literal["bf16", "nvfp4", "fp8"]  # the format of a GEMM's activations
ACTS: tuple[Act, ...] = ("bf16", "nvfp4", "fp8")
RouteChoice = Literal["score", "bias", "table"]
ROUTE_CHOICES: tuple[RouteChoice, ...] = ("score", "bias", "table")
ELEMENT_BYTES = {"fp8": 1, "bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Base of all problems; `op` names the op in `fp4suite.ops`. m: rows, mostly tokens; tables give the
    nearest where an m was not tuned."""

    op: ClassVar[str]
    m: int

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


def check_rule(rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")


def nvfp4_bytes(m: int, k: int, sf_layout: SfLayout = "linear") -> int:
    """Codes and block scales of an [m, k] NVFP4 matrix."""
    sf = m * (k // BLOCK) if sf_layout == "linear" else blocked_128x4_bytes(m, k // BLOCK)
    return m * k // 2 + sf


def fp8_bytes(m: int, k: int) -> int:
    """An [m, k] matrix in E4M3 with a scale a row."""
    return m * k + 4 * m


def rope_bytes(m: int, rope_dim: int) -> int:
    """Positions of m tokens, and a row of the RoPE table for each."""
    return m * (4 + 4 * rope_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeProblem(Problem):
    """[m, k] -> NVFP4, with the global scale given."""

    op: ClassVar[str] = "quantize_nvfp4"
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
class RmsNormProblem(Problem):
    """RMSNorm of [m, k] rows with a weight, in their own type."""

    op: ClassVar[str] = "rms_norm"
    k: int
    x: str = "bf16"

    @property
    def flops(self) -> int:
        return 4 * self.m * self.k

    @property
    def bytes(self) -> int:
        return ELEMENT_BYTES[self.x] * (2 * self.m + 1) * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class SwigluQuantizeProblem(Problem):
    """Clamped SwiGLU of [m, 2 k] (gate columns first) -> NVFP4 [m, k], with the global scale given."""

    op: ClassVar[str] = "swiglu_quantize"
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
class SwigluProblem(Problem):
    """Clamped SwiGLU of [m, 2 k] (gate columns first) -> [m, k]."""

    op: ClassVar[str] = "swiglu"
    k: int
    x: str = "fp32"
    out: str = "bf16"

    @property
    def flops(self) -> int:
        return 8 * self.m * self.k

    @property
    def bytes(self) -> int:
        return (2 * ELEMENT_BYTES[self.x] + ELEMENT_BYTES[self.out]) * self.m * self.k


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedProblem(Problem):
    """Rows [k] of m tokens from a table [vocab, k], each into n streams."""

    op: ClassVar[str] = "embed"
    vocab: int
    k: int
    n: int = 1
    x: str = "bf16"
    out: str = "bf16"

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return self.m * (8 + self.k * (ELEMENT_BYTES[self.x] + self.n * ELEMENT_BYTES[self.out]))


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmProblem(Problem):
    """d[m, n] = a[m, k] @ b[n, k].T, b in NVFP4, a in BF16 (`act="bf16"`), NVFP4, or E4M3 with a scale a row ("fp8").

    out: "bf16", "fp32", or "nvfp4" under a given global scale.
    order: how b lies in memory (`NVFP4Tensor.order`)
    """

    op: ClassVar[str] = "gemm_nvfp4"
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressKvProblem(Problem):
    """m tokens, in equal shares of `sequences` sequences, into their rings, and the entries that they complete.

    A share of several tokens begins in the middle of a window. Of shares of one token the first completes an entry, and
    so does every `ratio`-th after it. format: of `formats.kv_layout`, or "index_" and one of `index_layout`.
    """

    op: ClassVar[str] = "compress_kv"
    ratio: int
    overlaps: int  # windows that an entry pools
    head_dim: int
    rope_dim: int
    format: str
    sequences: int = 1  # 0: as many as tokens, whatever their number
    hadamard: int = 0
    page_size: int = 64
    x: str = "fp32"
    weight: str = "bf16"

    @property
    def sequence_count(self) -> int:
        return self.sequences or self.m

    @property
    def entries(self) -> int:
        """Entries that are completed."""
        each, rest = self.m // self.sequence_count, -(-self.sequence_count // self.ratio)
        return rest if each == 1 else self.sequence_count * ((each + self.ratio // 2) // self.ratio)

    @property
    def layout(self) -> RowLayout:
        """Of the cache that entries go to."""
        if self.format.startswith("index_"):
            name = cast(IndexFormat, self.format.removeprefix("index_"))
            return index_layout(name, self.page_size, self.head_dim)
        return kv_layout(cast(KVFormat, self.format), self.page_size, self.head_dim, self.rope_dim)

    @property
    def row_bytes(self) -> int:
        """An entry in the cache."""
        return self.layout.row_bytes + self.layout.scale_bytes

    @property
    def flops(self) -> int:
        return 20 * self.m * self.overlaps * self.head_dim

    @property
    def bytes(self) -> int:
        pooled, channels = self.overlaps * self.ratio, 2 * self.head_dim
        kept = min(self.m, self.sequence_count * pooled)
        tokens = (ELEMENT_BYTES[self.x] * self.m + 4 * kept) * self.overlaps * channels
        if self.m == self.sequence_count:
            old = self.entries * (pooled - 1)
        else:
            old = self.sequence_count * (pooled - self.ratio + self.ratio // 2)
            old += self.sequence_count * (self.overlaps - 1) * (self.ratio // 2)
        constants = 4 * self.ratio * self.overlaps * self.head_dim + ELEMENT_BYTES[self.weight] * self.head_dim
        return tokens + 4 * old * channels + self.entries * (self.row_bytes + 4 * self.rope_dim) + constants


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressKvPairProblem(Problem):
    """`compress_kv` of a layer's entries and of its indexer's keys, in one step: as for CompressKvProblem, twice."""

    op: ClassVar[str] = "compress_kv_pair"
    ratio: int
    overlaps: int
    head_dim: int
    rope_dim: int
    format: str
    key_dim: int
    key_format: str
    sequences: int = 1  # 0: as many as tokens, whatever their number
    hadamard: int = 0
    key_hadamard: int = 0
    page_size: int = 64
    x: str = "fp32"
    weight: str = "bf16"

    @property
    def parts(self) -> tuple[CompressKvProblem, CompressKvProblem]:
        """Entries and keys, each alone."""
        entries = CompressKvProblem(
            m=self.m, ratio=self.ratio, overlaps=self.overlaps, head_dim=self.head_dim, rope_dim=self.rope_dim,
            format=self.format, sequences=self.sequences, hadamard=self.hadamard, page_size=self.page_size, x=self.x,
            weight=self.weight,
        )  # fmt: skip
        return entries, replace(entries, head_dim=self.key_dim, format=self.key_format, hadamard=self.key_hadamard)

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexQueryProblem(Problem):
    """RoPE, perhaps Hadamard, and the rounding of an index format for q [m, heads, head_dim].

    codes: 1 for E4M3 bytes (format fp8), whose scales go into weights [m, heads], in place of the numbers.
    """

    op: ClassVar[str] = "index_query"
    format: str
    hadamard: int = 0
    heads: int = 64
    head_dim: int = 128
    rope_dim: int = 64
    x: str = "bf16"
    codes: int = 0

    @property
    def k(self) -> int:
        """Elements of a token."""
        return self.heads * self.head_dim

    @property
    def flops(self) -> int:
        return self.m * self.heads * (3 * self.rope_dim + 2 * self.head_dim)

    @property
    def bytes(self) -> int:
        out, weights = (1, 8 * self.m * self.heads) if self.codes else (ELEMENT_BYTES[self.x], 0)
        elements = self.m * self.heads * self.head_dim
        return (ELEMENT_BYTES[self.x] + out) * elements + weights + rope_bytes(self.m, self.rope_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexLogitsProblem(Problem):
    """Scores of all `entries` keys of its sequence for each of m queries, equally many of each of `sequences`."""

    op: ClassVar[str] = "index_logits"
    entries: int
    format: IndexFormat
    sequences: int = 1  # 0: as many as tokens, whatever their number
    heads: int = 64
    head_dim: int = 128
    page_size: int = 64
    x: str = "bf16"

    @property
    def sequence_count(self) -> int:
        return self.sequences or self.m

    @property
    def flops(self) -> int:
        return 2 * self.m * self.entries * self.heads * self.head_dim

    @property
    def bytes(self) -> int:
        layout = index_layout(self.format, 1, self.head_dim)
        keys = self.sequence_count * self.entries * (layout.row_bytes + layout.scale_bytes)
        return keys + self.m * (self.heads * (ELEMENT_BYTES[self.x] * self.head_dim + 4) + 4 * self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexTopkProblem(Problem):
    """The topk best of `entries` FP32 scores, all visible, of each of m queries -> slots in pages of page_size."""

    op: ClassVar[str] = "index_topk"
    entries: int
    topk: int
    page_size: int = 64

    @property
    def flops(self) -> int:
        return 2 * self.m * self.entries  # an order and a comparison a score

    @property
    def bytes(self) -> int:
        return 4 * self.m * (self.entries + min(self.topk, self.entries))


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteProblem(Problem):
    """topk of `experts` for each of m tokens from logits [m, experts]: by score, with a bias, or a table."""

    op: ClassVar[str] = "route"
    experts: int
    topk: int
    choice: RouteChoice = "bias"
    x: str = "fp32"

    @property
    def flops(self) -> int:
        scored = self.topk if self.choice == "table" else self.experts
        return 45 * self.m * scored  # of a score; a comparison is none

    @property
    def bytes(self) -> int:
        scored = self.topk if self.choice == "table" else self.experts
        chosen = self.m * (8 + 4 * self.topk) if self.choice == "table" else 0  # token ids and rows of the table
        bias = 4 * self.experts if self.choice == "bias" else 0
        return ELEMENT_BYTES[self.x] * self.m * scored + chosen + bias + 8 * self.m * self.topk


@dataclass(frozen=True, slots=True, kw_only=True)
class PermuteProblem(Problem):
    """m * topk slots sorted by expert, with the first place of each expert."""

    op: ClassVar[str] = "permute"
    topk: int
    experts: int

    @property
    def flops(self) -> int:
        return 0

    @property
    def bytes(self) -> int:
        return 8 * self.m * self.topk + 4 * (self.experts + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CombineProblem(Problem):
    """Weighted sum of topk rows [k] for each of m tokens, plus `shared` (0 or 1) row of its own."""

    op: ClassVar[str] = "combine"
    topk: int
    k: int
    shared: int = 1
    x: str = "bf16"

    @property
    def flops(self) -> int:
        return (2 * self.topk + self.shared) * self.m * self.k

    @property
    def bytes(self) -> int:
        slots = self.m * self.topk  # each with its place, its expert and its weight
        return ELEMENT_BYTES[self.x] * self.k * (slots + (1 + self.shared) * self.m) + 12 * slots


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleProblem(Problem):
    """A token for each of m rows of logits [m, vocab], greedy or by nucleus sampling."""

    op: ClassVar[str] = "sample"
    vocab: int
    x: str = "fp32"

    @property
    def flops(self) -> int:
        return 30 * self.m * self.vocab  # of a weight

    @property
    def bytes(self) -> int:
        return ELEMENT_BYTES[self.x] * self.m * self.vocab + 20 * self.m


@dataclass(frozen=True, slots=True, kw_only=True)
class QnormRopeProblem(Problem):
    """RMSNorm without weight of each head of q [m, heads, head_dim], then RoPE on its last dims."""

    op: ClassVar[str] = "qnorm_rope"
    heads: int
    head_dim: int = 512
    rope_dim: int = 64
    x: str = "bf16"

    @property
    def k(self) -> int:
        """Elements of a token."""
        return self.heads * self.head_dim

    @property
    def flops(self) -> int:
        return self.m * self.heads * (4 * self.head_dim + 3 * self.rope_dim)

    @property
    def bytes(self) -> int:
        return 2 * ELEMENT_BYTES[self.x] * self.m * self.heads * self.head_dim + rope_bytes(self.m, self.rope_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class QnormRopeQuantizeProblem(Problem):
    """`qnorm_rope` of q [m, heads, head_dim], each head a row as an `nvfp4` cache has them."""

    op: ClassVar[str] = "qnorm_rope_quantize"
    heads: int
    head_dim: int = 512
    rope_dim: int = 64
    x: str = "bf16"

    @property
    def k(self) -> int:
        """Elements of a token."""
        return self.heads * self.head_dim

    @property
    def row_bytes(self) -> int:
        """Of a head."""
        return kv_layout("nvfp4", 1, self.head_dim, self.rope_dim).row_bytes

    @property
    def flops(self) -> int:
        return self.m * self.heads * (6 * self.head_dim + 3 * self.rope_dim)

    @property
    def bytes(self) -> int:
        rows = self.m * self.heads * (ELEMENT_BYTES[self.x] * self.head_dim + self.row_bytes)
        return rows + rope_bytes(self.m, self.rope_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class CsaQueriesProblem(Problem):
    """`qnorm_rope` of q [m, heads, head_dim] and `index_query` of the indexer's q [m, index_heads, index_dim].

    codes: as for IndexQueryProblem.
    """

    op: ClassVar[str] = "csa_queries"
    heads: int
    format: str
    hadamard: int = 0
    head_dim: int = 512
    index_heads: int = 64
    index_dim: int = 128
    rope_dim: int = 64
    x: str = "bf16"
    codes: int = 0

    @property
    def parts(self) -> tuple[QnormRopeProblem, IndexQueryProblem]:
        """The layer's queries and its indexer's, each alone."""
        return (
            QnormRopeProblem(m=self.m, heads=self.heads, head_dim=self.head_dim, rope_dim=self.rope_dim, x=self.x),
            IndexQueryProblem(
                m=self.m, format=self.format, hadamard=self.hadamard, heads=self.index_heads, head_dim=self.index_dim,
                rope_dim=self.rope_dim, x=self.x, codes=self.codes,
            ),
        )  # fmt: skip

    @property
    def flops(self) -> int:
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts) - rope_bytes(self.m, self.rope_dim)  # read by both


@dataclass(frozen=True, slots=True, kw_only=True)
class KvNormRopeInsertProblem(Problem):
    """RMSNorm with weight and RoPE of rows kv [m, head_dim], stored in a paged cache's format."""

    op: ClassVar[str] = "kv_norm_rope_insert"
    head_dim: int = 512
    rope_dim: int = 64
    format: KVFormat = "fp8_ds_mla"
    page_size: int = 64
    x: str = "bf16"

    @property
    def k(self) -> int:
        """Elements of a token."""
        return self.head_dim

    @property
    def flops(self) -> int:
        return self.m * (7 * self.head_dim + 3 * self.rope_dim)

    @property
    def bytes(self) -> int:
        layout = kv_layout(self.format, self.page_size, self.head_dim, self.rope_dim)
        rows = ELEMENT_BYTES[self.x] * (self.m + 1) * self.head_dim  # and the weight
        slots = 4 * self.m
        return rows + rope_bytes(self.m, self.rope_dim) + slots + self.m * (layout.row_bytes + layout.scale_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class QkvNormRopeInsertProblem(Problem):
    """RMSNorm with weight of rows q [m, k]; rows kv [m, head_dim] as in `KvNormRopeInsertProblem`."""

    op: ClassVar[str] = "qkv_norm_rope_insert"
    k: int
    head_dim: int = 512
    rope_dim: int = 64
    format: KVFormat = "fp8_ds_mla"
    page_size: int = 64
    x: str = "bf16"

    @property
    def norm(self) -> RmsNormProblem:
        """What becomes of q."""
        return RmsNormProblem(m=self.m, k=self.k, x=self.x)

    @property
    def insert(self) -> KvNormRopeInsertProblem:
        """What becomes of kv."""
        return KvNormRopeInsertProblem(
            m=self.m, head_dim=self.head_dim, rope_dim=self.rope_dim, format=self.format, page_size=self.page_size,
            x=self.x,
        )  # fmt: skip

    @property
    def flops(self) -> int:
        return self.norm.flops + self.insert.flops

    @property
    def bytes(self) -> int:
        return self.norm.bytes + self.insert.bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeInverseProblem(Problem):
    """RoPE undone on the last dims of each head of o [m, heads, head_dim]."""

    op: ClassVar[str] = "rope_inverse"
    heads: int
    head_dim: int = 512
    rope_dim: int = 64
    x: str = "bf16"

    @property
    def moved(self) -> int:
        """Dims of a head that are read and written."""
        return self.head_dim

    @property
    def k(self) -> int:
        """Elements of a token that are read and written."""
        return self.heads * self.moved

    @property
    def flops(self) -> int:
        return 3 * self.m * self.heads * self.rope_dim

    @property
    def bytes(self) -> int:
        return 2 * ELEMENT_BYTES[self.x] * self.m * self.k + rope_bytes(self.m, self.rope_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeInverseInPlaceProblem(RopeInverseProblem):
    """The same in place: dims that are not turned are left alone."""

    op: ClassVar[str] = "rope_inverse_"

    @property
    def moved(self) -> int:
        return self.rope_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeInverseQuantizeProblem(Problem):
    """RoPE undone, then NVFP4 by group of heads, with the global scale given: `groups` matrices [m, k]."""

    op: ClassVar[str] = "rope_inverse_quantize"
    heads: int
    groups: int
    head_dim: int = 512
    rope_dim: int = 64
    x: str = "bf16"
    rule: Rule = "absmax"
    sf_layout: SfLayout = "linear"

    @property
    def k(self) -> int:
        """Elements of a token in one group."""
        return self.heads // self.groups * self.head_dim

    @property
    def flops(self) -> int:
        return self.m * self.heads * (2 * self.head_dim + 3 * self.rope_dim)

    @property
    def bytes(self) -> int:
        read = ELEMENT_BYTES[self.x] * self.m * self.heads * self.head_dim + rope_bytes(self.m, self.rope_dim)
        return read + self.groups * nvfp4_bytes(self.m, self.k, self.sf_layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperConnectionPreProblem(Problem):
    """Normed input of a site and its coefficients, of m tokens with n streams of k columns; the norm's weight is of x's
    type.
    """

    op: ClassVar[str] = "hyper_connection_pre"
    k: int
    n: int = 4
    x: str = "bf16"

    @property
    def flops(self) -> int:
        outputs = self.n * (self.n + 2)
        return self.m * (2 * outputs * self.n * self.k + 4 * self.n * self.k + 4 * self.k)

    @property
    def bytes(self) -> int:
        return hyper_connection_bytes(self, self.n * (self.n + 2)) + 4 * self.m * self.n * (self.n + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperConnectionHeadProblem(Problem):
    """n streams of k columns of each of m tokens folded into one; normed, with a weight of x's type."""

    op: ClassVar[str] = "hyper_connection_head"
    k: int
    n: int = 4
    x: str = "bf16"

    @property
    def flops(self) -> int:
        return self.m * (2 * self.n * self.n * self.k + 4 * self.n * self.k + 4 * self.k)

    @property
    def bytes(self) -> int:
        return hyper_connection_bytes(self, self.n)


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperConnectionPostProblem(Problem):
    """n streams of k columns of each of m tokens, mixed with a site's output."""

    op: ClassVar[str] = "hyper_connection_post"
    k: int
    n: int = 4
    x: str = "bf16"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * (self.n + 1) * self.k

    @property
    def bytes(self) -> int:
        return self.m * (ELEMENT_BYTES[self.x] * (2 * self.n + 1) * self.k + 4 * self.n * (self.n + 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperConnectionPostPreProblem(Problem):
    """The end of one site and the beginning of the next: the streams are read once and written once."""

    op: ClassVar[str] = "hyper_connection_post_pre"
    k: int
    n: int = 4
    x: str = "bf16"

    @property
    def flops(self) -> int:
        return self._post.flops + self._pre.flops

    @property
    def bytes(self) -> int:
        return self._post.bytes + self._pre.bytes - ELEMENT_BYTES[self.x] * self.m * self.n * self.k

    @property
    def _post(self) -> HyperConnectionPostProblem:
        return HyperConnectionPostProblem(m=self.m, k=self.k, n=self.n, x=self.x)

    @property
    def _pre(self) -> HyperConnectionPreProblem:
        return HyperConnectionPreProblem(m=self.m, k=self.k, n=self.n, x=self.x)


def hyper_connection_bytes(p: HyperConnectionPreProblem | HyperConnectionHeadProblem, outputs: int) -> int:
    """Streams, FP32 weights of `outputs` coefficients, the norm's weight, and what the streams are folded into."""
    weights = 4 * outputs * (p.n * p.k + 1) + ELEMENT_BYTES[p.x] * p.k
    return ELEMENT_BYTES[p.x] * p.m * (p.n + 1) * p.k + weights


PROBLEMS: dict[str, type[Problem]] = {
    p.op: p
    for p in (
        QuantizeProblem,
        QuantizeFp8Problem,
        DequantProblem,
        RmsnormQuantizeProblem,
        RmsNormProblem,
        SwigluQuantizeProblem,
        SwigluProblem,
        EmbedProblem,
        QnormRopeProblem,
        QnormRopeQuantizeProblem,
        KvNormRopeInsertProblem,
        QkvNormRopeInsertProblem,
        RopeInverseProblem,
        RopeInverseInPlaceProblem,
        RopeInverseQuantizeProblem,
        RouteProblem,
        PermuteProblem,
        CombineProblem,
        SampleProblem,
        GemmProblem,
        CompressKvProblem,
        CompressKvPairProblem,
        IndexLogitsProblem,
        IndexQueryProblem,
        CsaQueriesProblem,
        IndexTopkProblem,
        HyperConnectionPreProblem,
        HyperConnectionPostProblem,
        HyperConnectionHeadProblem,
        HyperConnectionPostPreProblem,
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
    kind: Callable[..., Problem] = PROBLEMS[op]  # whose dimensions are its own
    try:
        return kind(**dims)
    except TypeError as e:
        raise ValueError(f"dimensions of {op} are {[f.name for f in fields(PROBLEMS[op])]}, got {dims}") from e
