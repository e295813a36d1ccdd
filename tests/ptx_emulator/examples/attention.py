"""Attention examples: FMHA of sm_100a and sm_90a, MLA decode of sm_100a.

    s = scale q k^T, masked;  o = softmax(s) v;  lse = log2 of the sum of exp(s)

The reference is FP64 on the operands as they are stored. The kernels round each probability, taken relative to the
largest of its row, to the type of v before they multiply: the tolerance is what that, and the rounding of o, can do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from torch import Tensor

from cutlass import Float32, Int32, cute

from .harness import Case, Prepared
from .operands import FORMATS, Format, cute_tensor

STREAM = driver.CUstream(0)
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Near:
    """A tensor that is written, and what it must be: want and tolerance are FP64 of its shape."""

    name: str
    out: Tensor
    want: Tensor
    tolerance: Tensor

    def reset(self) -> None:
        self.out.view(torch.uint8).fill_(0xFF)  # NaN

    def mismatch(self) -> str | None:
        """The first element that is wrong, or None."""
        got = self.out.double()
        wrong = ~((got - self.want).abs() <= self.tolerance)
        if not wrong.any():
            return None
        at = tuple(wrong.nonzero()[0].tolist())
        return (
            f"{self.name}{list(at)} is {float(got[at]):.8g}, want {float(self.want[at]):.8g} "
            f"within {float(self.tolerance[at]):.3g}; {int(wrong.sum())} of {wrong.numel()} elements are wrong"
        )


@dataclass(frozen=True)
class Window:
    """Which keys a query sees: key j by query i if i - left <= j <= i + right; `inference`: the ends are aligned."""

    left: int | None = None
    right: int | None = None
    inference: bool = False

    def hidden(self, queries: int, keys: int) -> Tensor:
        i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
        i = i + keys - queries if self.inference else i
        out = torch.zeros(queries, keys, dtype=torch.bool)
        out |= j > i + self.right if self.right is not None else out
        out |= j < i - self.left if self.left is not None else out
        return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: Window, p: Format, sink: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """q [s, h, d], k and v [t, h_kv, d] -> o [s, h, d], lse [s, h] (base 2), and what rounding can change in o."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(window.hidden(q.shape[0], k.shape[0]), -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.double()[:, None, None].expand(-1, q.shape[0], 1)], 2)
    probability = torch.softmax(scores, -1)[..., : k.shape[0]]
    o = torch.einsum("hqk,khd->qhd", probability, v)
    relative = torch.einsum("hqk,khd->qhd", probability, v.abs()) * (2.0**-p.digits + 2.0**-12)
    # the smallest probabilities are subnormal where the type of v is narrow; the largest of a row counts as 1
    largest = probability.amax(-1).T[..., None]
    seen = (probability > 0).double()
    absolute = torch.einsum("hqk,khd->qhd", seen, v.abs()) * largest * p.step / 2
    return o, torch.logsumexp(scores, -1).T * LOG2_E, relative + absolute


def rounded(error: Tensor, o: Tensor, f: Format) -> Tensor:
    """The tolerance of o in format f when `error` may be in it before it is rounded."""
    return error + (o.abs() + error) * 2.0**-f.digits + f.step / 2


def blank(shape: Sequence[int], f: Format) -> Tensor:
    assert f.dtype is not None
    return torch.zeros(tuple(shape), dtype=f.dtype)


# --- FMHA of sm_100a ---


def fmha(
    module: ModuleType,
    gen: torch.Generator,
    q: tuple[int, Any, int, int],
    kv: tuple[Any, int],
    qk: str = "fp16",
    pv: str = "",
    o: str = "",
    causal: bool = False,
    inference: bool = False,
    left: int | None = None,
    right: int | None = None,
    persistent: bool = False,
    lse: bool = False,
    sink: bool = False,
    ex2: bool = False,
    skip: bool = False,
    scales: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
) -> Prepared:
    """q: (batch, length, heads, head size), kv: (length, heads); lengths that differ within a batch are tuples.
    scales: of q, k, v and 1 / that of o. ex2: exponentials partly as polynomials. skip: no rescaling for small steps.
    """
    (batch, queries, heads, size), (keys, groups) = q, kv
    masks = __import__("helpers.fmha_helpers", fromlist=["MaskEnum"]).MaskEnum
    qk_f, pv_f, o_f = FORMATS[qk], FORMATS[pv or qk], FORMATS[o or qk]
    varies = isinstance(queries, tuple)
    size_v = 128 if size == 192 else size
    window = Window(left, 0 if causal else right, inference)
    lengths = list(zip(queries, keys, strict=True)) if varies else [(queries, keys)] * batch
    folded = (1, sum(a for a, _ in lengths), sum(b for _, b in lengths)) if varies else (batch, queries, keys)
    q_t = qk_f.random((folded[0], folded[1], groups, heads // groups, size), gen)
    k_t = qk_f.random((folded[0], folded[2], groups, 1, size), gen)
    v_t = pv_f.random((folded[0], folded[2], groups, 1, size_v), gen)
    o_t = blank((*q_t.shape[:-1], size_v), o_f)
    lse_t = blank(q_t.shape[:-1], FORMATS["fp32"]) if lse else None
    sink_t = torch.randn(heads, generator=gen) if sink else None
    starts = [_starts([n[side] for n in lengths]) if varies else None for side in (0, 1)]

    mask = masks.WINDOW_MASK_INFERENCE if inference else masks.WINDOW_MASK
    if window.left is None and window.right is None and (varies or keys % 128):
        mask = masks.RESIDUAL_MASK
    scale, scale_o = scales[0] * scales[1] / math.sqrt(size), scales[2] * scales[3]
    sizes = size if size == size_v else (size, size_v)
    kernel = module.BlackwellFusedMultiHeadAttentionForward(
        Float32, Float32, (128, 128), sizes, persistent, mask, ex2, skip, use_tma_store=not varies
    )
    types = qk_f.type, pv_f.type, o_f.type, Float32, Float32
    if not kernel.can_implement((batch, queries, heads, size), (batch, keys, groups, size), *types):
        raise ValueError("the example refuses this configuration")
    longest, total = (max(queries), sum(queries)) if varies else (queries, queries)
    problem = (batch, longest, total, max(keys) if varies else keys, heads, groups, size, size_v)
    tensors = [_last(t, f, 32) for t, f in ((q_t, qk_f), (k_t, qk_f), (v_t, pv_f), (o_t, o_f))]
    arguments = (
        *tensors,
        problem,
        *(None if s is None else _last(s, FORMATS["int32"]) for s in starts),
        *(None if t is None else _last(t, FORMATS["fp32"]) for t in (lse_t, sink_t)),
        *map(Float32, (scale * LOG2_E, scale, scale_o)),
        None,
        *(None if n is None else Int32(n) for n in (window.left, window.right)),
        None,
        None,
        STREAM,
        False,
    )
    compiled = cute.compile(kernel, *arguments, options="--opt-level=2")
    outputs = []
    for n, (a, b) in enumerate(lengths):
        at = (0, slice(_before(lengths, n, 0), _before(lengths, n, 0) + a)) if varies else (n, slice(0, a))
        kv_at = (0, slice(_before(lengths, n, 1), _before(lengths, n, 1) + b)) if varies else (n, slice(0, b))
        flat = q_t[at].flatten(1, 2), k_t[kv_at].flatten(1, 2), v_t[kv_at].flatten(1, 2)
        want, want_lse, error = attention(*flat, scale, window, pv_f, sink_t)
        tolerance = rounded(error * scale_o, want * scale_o, o_f)
        outputs.append(Near(f"o{n}", o_t[at].flatten(1, 2), want * scale_o, tolerance))
        if lse_t is not None:
            outputs.append(Near(f"lse{n}", lse_t[at].flatten(1, 2), want_lse, torch.full_like(want_lse, 1e-4)))
    return Prepared(lambda: compiled(*arguments), outputs, (q_t, k_t, v_t, sink_t, starts))


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _before(lengths: Sequence[tuple[int, int]], n: int, side: int) -> int:
    return sum(x[side] for x in lengths[:n])


def _last(t: Tensor, f: Format, align: int = 16) -> Any:
    """A CuTe tensor whose last dimension is contiguous."""
    from cutlass.cute.runtime import from_dlpack

    made = from_dlpack(t.view(torch.uint8) if t.element_size() == 1 else t, assumed_align=align)
    made.element_type = f.type
    return made.mark_layout_dynamic(leading_dim=t.ndim - 1)


def _cases(example: str, prepare: Any, *configs: dict[str, Any], arch: str = "sm_100a", **device: Any) -> list[Case]:
    return [Case(example, prepare, config, arch, device) for config in configs]


_ATTENTION = "cute.blackwell.kernel.attention"
CASES = [
    *_cases(
        f"{_ATTENTION}.fmha.fmha",
        fmha,
        {"q": (2, 200, 2, 64), "kv": (176, 1), "lse": True},
        {"q": (1, 256, 1, 128), "kv": (384, 1), "qk": "bf16", "causal": True, "inference": True, "lse": True},
        {"q": (2, 300, 3, 64), "kv": (300, 3), "qk": "bf16", "causal": True, "persistent": True},
        {"q": (1, 256, 1, 128), "kv": (256, 1), "qk": "e4m3", "o": "fp16"},
        {"q": (1, 256, 1, 32), "kv": (256, 1), "qk": "e4m3", "causal": True},
        {"q": (1, 256, 1, 192), "kv": (256, 1), "qk": "e4m3", "o": "bf16"},
        {"q": (3, (96, 200, 1), 2, 64), "kv": ((130, 77, 256), 1), "lse": True},
        {"q": (2, (260, 140), 1, 128), "kv": ((260, 140), 1), "qk": "bf16", "causal": True, "lse": True},
        {"q": (1, 256, 1, 64), "kv": (512, 1), "left": 100, "right": 30, "lse": True},
        {"q": (1, 256, 2, 64), "kv": (256, 1), "sink": True, "lse": True},
        {"q": (1, 256, 1, 64), "kv": (384, 1), "ex2": True, "skip": True},
        {"q": (1, 256, 1, 64), "kv": (384, 1), "pv": "e4m3", "o": "fp16", "scales": (0.5, 1.5, 0.75, 2.0)},
        multiprocessors=2,
        races=False,
    ),
]
