"""Attention examples: FMHA of sm_100a and sm_90a, MLA decode of sm_100a.

    s = scale q k^T, masked;  o = softmax(s) v;  lse = log2 of the sum of exp(s)

The reference is FP64 on the operands as they are stored. The kernels round each probability, taken relative to the
largest of its row, to the type of v before they multiply: the tolerance is what that, and the rounding of o, can do.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from cuda.bindings import driver
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import from_dlpack, make_ptr
from torch import Tensor

from .harness import Case, Prepared
from .operands import FORMATS, Format, aligned

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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: Window,
    p: Format,
    sink: Tensor | None = None,
    sums: float = 2.0**-20,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [s, h, d], k and v [t, h_kv, d] -> o [s, h, d], lse [s, h] (base 2), and what rounding can change in each.
    sums: relative error of a sum of products, to the sum of their magnitudes.
    """
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(window.hidden(q.shape[0], k.shape[0]), -math.inf)
    if sink is not None:
        scores = torch.cat([scores, sink.double()[:, None, None].expand(-1, q.shape[0], 1)], 2)
    probability = torch.softmax(scores, -1)[..., : k.shape[0]]
    o = torch.einsum("hqk,khd->qhd", probability, v)
    shift = torch.einsum("qhd,khd->qhk", q.abs(), k.abs()).amax(-1) * scale * sums  # of a score, [s, h]
    rounding = 2 * shift[..., None] + 2.0**-p.digits + 2.0**-12 + sums
    relative = torch.einsum("hqk,khd->qhd", probability, v.abs()) * rounding
    # the smallest probabilities are subnormal where the type of v is narrow; the largest of a row counts as 1
    largest = probability.amax(-1).T[..., None]
    seen = (probability > 0).double()
    absolute = torch.einsum("hqk,khd->qhd", seen, v.abs()) * largest * p.step / 2
    return o, torch.logsumexp(scores, -1).T * LOG2_E, relative + absolute, (shift + 2.0**-14) * LOG2_E


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
    masks = module.fmha_utils.MaskEnum
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
        want, want_lse, error, lse_error = attention(*flat, scale, window, pv_f, sink_t)
        tolerance = rounded(error * scale_o, want * scale_o, o_f)
        outputs.append(Near(f"o{n}", o_t[at].flatten(1, 2), want * scale_o, tolerance))
        if lse_t is not None:
            outputs.append(Near(f"lse{n}", lse_t[at].flatten(1, 2), want_lse, lse_error))
    return Prepared(lambda: compiled(*arguments), outputs, (q_t, k_t, v_t, sink_t, starts))


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def _before(lengths: Sequence[tuple[int, int]], n: int, side: int) -> int:
    return sum(x[side] for x in lengths[:n])


def _last(t: Tensor, f: Format, align: int = 16) -> Any:
    return _along(t, f, t.ndim - 1, align)


def _along(t: Tensor, f: Format, dimension: int, align: int = 16) -> Any:
    """A CuTe tensor that is contiguous along a dimension."""
    made = from_dlpack(t.view(torch.uint8) if t.element_size() == 1 else t, assumed_align=align)
    made.element_type = f.type
    return made.mark_layout_dynamic(leading_dim=dimension)


# --- MLA decode of sm_100a ---


def mla_decode(
    module: ModuleType,
    gen: torch.Generator,
    batch: int,
    queries: int,
    keys: int,
    heads: int = 128,
    io: str = "fp16",
    page: int = 128,
    split: int | None = 1,
    ragged: bool = False,
    persistent: bool = False,
    scale: float = 0.0416,
    scale_o: float = 1.0,
) -> Prepared:
    """keys: most of all; ragged: fewer in some of the batch. split: parts of the keys, None: as the example chooses
    for each of the batch.
    """
    latent, rope, f = 512, 64, FORMATS[io]
    name = {"fp16": "FP16", "e4m3": "FP8"}[io]
    kernel = getattr(module, f"BlackwellMultiHeadLatentAttentionForward{name}")
    lengths = torch.full((batch,), keys, dtype=torch.int32)
    if ragged:
        lengths = torch.randint(keys // 2, keys + 1, (batch,), generator=gen, dtype=torch.int32)
    pages = -(-int(lengths.max()) // page)
    # the FP8 kernel reads indices for all of a tile of 128 keys, past the end of the last of the batch too
    room = torch.zeros(batch * pages + 128 // page, dtype=torch.int32)
    room[: batch * pages] = torch.randperm(batch * pages, generator=gen)
    table = room[: batch * pages].view(batch, pages)
    splits = None
    if split is None:
        chosen = [kernel.get_split_kv(batch, queries, int(n), (128, 128), 4) for n in lengths]
        splits, split = torch.tensor(chosen, dtype=torch.int32), max(chosen)
    q = [f.random((batch, queries, heads, d), gen) for d in (latent, rope)]
    kv = [f.random((batch * pages, page, d), gen) for d in (latent, rope)]
    o, lse = blank((batch, queries, heads, latent), f), blank((batch, queries, heads), FORMATS["fp32"])
    size = kernel.get_workspace_size(heads, queries, latent, batch, split, Float32)
    workspace = torch.full((size,), -1, dtype=torch.int8) if size else None

    varies = splits is not None
    tiles = (128, 128), (128, 256)
    sizes = batch, queries, keys, heads, latent, rope
    if not kernel.can_implement(
        *sizes, f.type, f.type, Float32, Float32, *tiles, split, persistent, ragged, varies, page
    ):
        raise ValueError("the example refuses this configuration")
    mla = kernel(Float32, Float32, *tiles, 2, page, 0.0, persistent, ragged, varies)
    q_tensors = [_compact(t.permute(2, 3, 1, 0), f, (3, 2, 0, 1)) for t in q]
    kv_tensors = [_compact(t.permute(1, 2, 0), f, (2, 0, 1)) for t in kv]
    arguments = (
        *q_tensors,
        *kv_tensors,
        from_dlpack(table.T, assumed_align=16).mark_layout_dynamic(leading_dim=0),
        _compact(o.permute(2, 3, 1, 0), f, (3, 2, 0, 1)),
        from_dlpack(lse.permute(2, 1, 0), assumed_align=16).mark_layout_dynamic(leading_dim=0),
        None if workspace is None else from_dlpack(workspace, assumed_align=32),
        split,
        *(None if t is None else from_dlpack(t, assumed_align=16).mark_layout_dynamic() for t in (lengths, splits)),
        scale,
        scale_o,
        STREAM,
    )
    compiled = cute.compile(mla, *arguments, options="--opt-level 2")
    outputs = []
    for n in range(batch):
        latents, ropes = (t[table[n].long()].flatten(0, 1)[: lengths[n], None] for t in kv)
        both = torch.cat([latents.double(), ropes.double()], -1)
        asked = torch.cat([q[0][n].double(), q[1][n].double()], -1)
        want, want_lse, error, lse_error = attention(asked, both, latents, scale, Window(), f)
        outputs.append(Near(f"o{n}", o[n], want * scale_o, rounded(error * scale_o, want * scale_o, f)))
        outputs.append(Near(f"lse{n}", lse[n], want_lse, lse_error))
    return Prepared(lambda: compiled(*arguments), outputs, (q, kv, table, workspace, lengths, splits))


def _compact(t: Tensor, f: Format, order: tuple[int, ...]) -> Any:
    """A CuTe tensor whose dimension 1 is contiguous, a multiple of 16 bytes long."""
    return _along(t, f, 1).mark_compact_shape_dynamic(mode=1, stride_order=order, divisibility=128 // f.bits)


# --- attention with INT8 keys and values, sm_100a ---


class _Int8Attention:
    """q [b, h, s, d] in BF16; k, v [b, h_kv, t, d] in INT8 with a BF16 scale for `block` elements along d. Scales are
    powers of two, so that a scaled element is exact in BF16, to which the kernels convert it.
    """

    def __init__(self, q: tuple[int, int, int, int], kv: tuple[int, int], block: int, gen: torch.Generator):
        (batch, _, _, size), (groups, keys) = q, kv
        bf16 = FORMATS["bf16"]
        self.q = _room(bf16.random(q, gen))
        self.kv = [_room(FORMATS["int8"].random((batch, groups, keys, size), gen) // 16) for _ in range(2)]
        exponents = (torch.randint(-4, 1, (batch, groups, keys, size // block), generator=gen) for _ in range(2))
        self.scales = [_room(torch.exp2(e.double()).to(bf16.dtype)) for e in exponents]
        self.o = _room(blank(q, bf16))
        self.wide = [
            x.double() * y.double().repeat_interleave(block, 3) for x, y in zip(self.kv, self.scales, strict=True)
        ]

    def outputs(self, scale: float, scale_o: float, window: Window) -> list[Near]:
        near = []
        for n in range(len(self.q)):
            q, k, v = (x[n].transpose(0, 1) for x in (self.q, *self.wide))
            want, _, error, _ = attention(q, k, v, scale, window, FORMATS["bf16"])
            tolerance = rounded(error * scale_o, want * scale_o, FORMATS["bf16"])
            near.append(Near(f"o{n}", self.o[n], want.transpose(0, 1) * scale_o, tolerance.transpose(0, 1)))
        return near

    @property
    def pointers(self) -> list[Any]:
        """q, k, v, scales of k, scales of v, o"""
        kinds = [(self.q, "bf16"), *((x, "int8") for x in self.kv), *((x, "bf16") for x in (*self.scales, self.o))]
        return [_pointer(t, kind) for t, kind in kinds]


def _room(t: Tensor) -> Tensor:
    """A copy at a multiple of 128 bytes."""
    out = aligned(t.nbytes).view(t.dtype).view(t.shape)
    out.copy_(t)
    return out


def _pointer(t: Tensor, kind: str) -> Any:
    return make_ptr(FORMATS[kind].type, t.data_ptr(), cute.AddressSpace.gmem, assumed_align=128)


def int8_decode(
    module: ModuleType,
    gen: torch.Generator,
    batch: int,
    heads: tuple[int, int],
    keys: int,
    size: int,
    block: int,
    splits: int,
    scale_o: float = 1.0,
) -> Prepared:
    """heads: of q and of keys. One query; the keys are divided into `splits` parts. They must fill tiles of 128: what
    is missing of a tile counts as zeros, it is not masked.
    """
    x = _Int8Attention((batch, heads[0], 1, size), (heads[1], keys), block, gen)
    scale = 1 / math.sqrt(size)
    tile = min(-(-heads[0] // heads[1] // 8) * 8, 32)
    fmha = module.MixedInputFusedMultiHeadAttentionDecode(size, block, tile, 2 if size > 128 else 1)
    problem = (batch, *heads, keys, size)
    fmha.can_implement(problem, splits, FORMATS["bf16"].type, FORMATS["int8"].type, FORMATS["bf16"].type, Float32)
    most, total = (_room(torch.zeros(batch, heads[0], 1)) for _ in range(2))
    parts = _room(torch.zeros(splits, batch, heads[0], 1, size))
    parts_most, parts_total = (_room(torch.zeros(splits, batch, heads[0], 1)) for _ in range(2))
    scratch = [most, total, parts, parts_most, parts_total]
    arguments = (problem, splits, *x.pointers, *(_pointer(t, "fp32") for t in scratch), scale, scale_o, STREAM)
    compiled = cute.compile(fmha, *arguments, options="--opt-level 2")

    def run() -> None:
        for t in scratch:
            t.fill_(-math.inf if t is most or t is parts_most else 0)
        compiled(*arguments)

    return Prepared(run, x.outputs(scale, scale_o, Window()), (x, scratch))


def int8_prefill(
    module: ModuleType,
    gen: torch.Generator,
    q: tuple[int, int, int, int],
    kv: tuple[int, int],
    block: int,
    causal: bool = False,
    persistent: bool = False,
    scale_o: float = 1.0,
) -> Prepared:
    """q: (batch, heads, length, head size), kv: (heads, length)"""
    batch, heads, queries, size = q
    x = _Int8Attention(q, kv, block, gen)
    window = Window(right=0 if causal else None, inference=True)
    masks, scale = module.fmha_utils.MaskEnum, 1 / math.sqrt(size)
    mask = masks.RESIDUAL_MASK if not causal and kv[1] % 128 else masks.WINDOW_MASK_INFERENCE
    kernel = getattr(module, f"MixedInputFusedMultiHeadAttentionPrefillD{size}")
    fmha = kernel(block, Float32, Float32, persistent, mask)
    q_p, k_p, v_p, scale_k, scale_v, o_p = x.pointers
    arguments = (
        *(q_p, k_p, v_p, o_p, scale_k, scale_v),
        (batch, queries, kv[1], heads, kv[0], size),
        scale * LOG2_E,
        scale_o,
        None,
        None if window.right is None else Int32(window.right),
        STREAM,
    )
    compiled = cute.compile(fmha, *arguments, options="--opt-level 2")
    return Prepared(lambda: compiled(*arguments), x.outputs(scale, scale_o, window), (x,))


def _uniform_address(ptx: str) -> str:
    """Each lane of the example names its own lane of tensor memory in some tcgen05.st, which the ISA leaves undefined
    and the emulator refuses: "All the threads in the warp must specify the same value of taddr". Here they name the
    warp's first, as the hardware would have it of lane 0.
    """
    own, first = ", 8323072;", ", 6291456;"
    assert own in ptx
    return ptx.replace(own, first)


# --- gradients of FMHA, sm_100a ---


def fmha_backward(
    module: ModuleType,
    gen: torch.Generator,
    q: tuple[int, int, int, int],
    kv: tuple[int, int],
    io: str = "fp16",
    causal: bool = False,
    left: int | None = None,
    right: int | None = None,
) -> Prepared:
    """q: (batch, length, heads, head size), kv: (length, heads). With p = exp(scale q k^T - lse) and
    ds = p (do v^T - sum(o do)) scale: dv = p^T do, dk = ds^T q, dq = ds k. p and ds are rounded to `io`.
    """
    (batch, queries, heads, size), (keys, groups) = q, kv
    f, scale, window = FORMATS[io], 1 / math.sqrt(size), Window(left, 0 if causal else right)
    folded = heads // groups
    q_t, do_t = (f.random((batch, queries, groups, folded, size), gen) for _ in range(2))
    k_t, v_t = (f.random((batch, keys, groups, 1, size), gen) for _ in range(2))
    o_t, dq_t, dk_t, dv_t = (blank(x.shape, f) for x in (q_t, q_t, k_t, v_t))
    lse_t = torch.zeros(batch, groups, folded, queries)
    outputs = []
    for n in range(batch):
        flat = [t[n].flatten(1, 2) for t in (q_t, k_t, v_t)]
        o, lse, *_ = attention(*flat, scale, window, f)
        o_t[n] = o.view(o_t[n].shape).to(f.dtype)
        lse_t[n] = (lse / LOG2_E).view(queries, groups, folded).permute(1, 2, 0)
        outputs += _gradients(n, *flat, o_t[n], do_t[n], lse_t[n], (dq_t[n], dk_t[n], dv_t[n]), scale, window, f)

    masks = module.fmha_utils.MaskEnum
    mask = masks.WINDOW_MASK_BWD
    if window.left is None and window.right is None and queries % 128:
        mask = masks.RESIDUAL_MASK_BWD
    kernel = module.BlackwellFusedMultiHeadAttentionBackward
    room = kernel._get_workspace_size(queries, keys, size, heads, batch, Float32)
    workspace = torch.zeros(room, dtype=torch.uint8)
    tensors = [
        _along(t.permute(1, 4, 3, 2, 0), f, 1).mark_compact_shape_dynamic(1, (4, 0, 3, 2, 1), 64)
        for t in (q_t, k_t, v_t, o_t, dq_t, dk_t, dv_t, do_t)
    ]
    arguments = (
        (queries, keys, size, ((folded, groups), batch)),
        *tensors,
        _along(lse_t.permute(3, 2, 1, 0), FORMATS["fp32"], 0),
        None,
        None,
        scale,
        *(None if n is None else Int32(n) for n in (window.left, window.right)),
        from_dlpack(workspace, assumed_align=16).mark_layout_dynamic(),
        STREAM,
    )
    compiled = cute.compile(kernel(f.type, Float32, (128, 128, size), False, mask), *arguments)

    def run() -> None:
        workspace.zero_()  # gradients of q are added up in it
        compiled(*arguments)

    return Prepared(run, outputs, (q_t, k_t, v_t, o_t, do_t, lse_t))


def _dealloc_last(ptx: str) -> str:
    """The example gives tensor memory back while gradients of q are still computed and read there, which is refused.
    Here all warps meet before.
    """
    dealloc = re.search(r"tcgen05\.dealloc\S+\s+%r\d+, %r\d+;\s+bra\.uni\s+(\S+);", ptx)
    assert dealloc is not None
    end, instruction = dealloc[1], dealloc[0].partition(";")[0]
    meet = f"""{end}:
    {{
    .reg .pred another; .reg .b32 warp;
    bar.sync 15; mov.u32 warp, %tid.x; shr.u32 warp, warp, 5; setp.ne.u32 another, warp, 8; @another bra LEAVE;
    {instruction};
    LEAVE:
    }}
    """
    return ptx.replace(dealloc[0], f"bra.uni {end};").replace(f"{end}:\n", meet)


def _gradients(
    n: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    do: Tensor,
    lse: Tensor,
    got: Sequence[Tensor],
    scale: float,
    window: Window,
    f: Format,
) -> list[Near]:
    groups, folded = k.shape[1], q.shape[1] // k.shape[1]
    q, k, v = (x.double() for x in (q, k, v))
    k_wide, v_wide = (x.repeat_interleave(folded, 1) for x in (k, v))
    o, do = (x.flatten(1, 2).double() for x in (o, do))
    scores = torch.einsum("qhd,khd->hqk", q, k_wide) * scale - lse.flatten(0, 1).double()[..., None]
    p = torch.exp(scores).masked_fill(window.hidden(q.shape[0], k.shape[0]), 0)
    dp, delta = torch.einsum("qhd,khd->hqk", do, v_wide), (o * do).sum(-1).T[..., None]
    ds = p * (dp - delta) * scale
    # rounding of p and ds, and of the FP32 numbers that they are made of
    p_error = p * (2.0**-f.digits + 2.0**-12) + f.step / 2
    ds_error = ds.abs() * 2.0**-f.digits + p * (dp.abs() + delta.abs()) * scale * 2.0**-12 + f.step / 2

    def summed(x: Tensor) -> Tensor:  # over the heads that share keys
        return x.unflatten(1, (groups, folded)).sum(2, keepdim=True)

    def pair(left: Tensor, error: Tensor, how: str, right: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum(how, left, right), torch.einsum(how, error, right.abs())

    wants = {
        "dq": [x.unflatten(1, (groups, folded)) for x in pair(ds, ds_error, "hqk,khd->qhd", k_wide)],
        "dk": [summed(x) for x in pair(ds, ds_error, "hqk,qhd->khd", q)],
        "dv": [summed(x) for x in pair(p, p_error, "hqk,qhd->khd", do)],
    }
    return [
        Near(f"{name}{n}", out, want, rounded(error, want, f))
        for (name, (want, error)), out in zip(wants.items(), got, strict=True)
    ]


# --- FMHA of sm_90a ---


def fmha_sm90(
    module: ModuleType,
    gen: torch.Generator,
    q: tuple[int, int, int, int],
    kv: tuple[int, int],
    tile: tuple[int, int] = (64, 128),
    io: str = "fp16",
    o: str = "",
    causal: bool = False,
    inference: bool = False,
    left: int | None = None,
    right: int | None = None,
    persistent: bool = False,
    scale_o: float = 1.0,
) -> Prepared:
    """q: (batch, length, heads, head size), kv: (length, heads). Its lse has base e."""
    (batch, queries, heads, size), (keys, groups) = q, kv
    f, o_f = FORMATS[io], FORMATS[o or io]
    masks = module.fmha_utils.MaskEnum
    window = Window(left, 0 if causal else right, inference)
    mask = masks.WINDOW_MASK_INFERENCE if inference else masks.WINDOW_MASK
    if window.left is None and window.right is None and keys % tile[1]:
        mask = masks.RESIDUAL_MASK
    q_t = f.random((batch, queries, groups, heads // groups, size), gen)
    k_t, v_t = (f.random((batch, keys, groups, 1, size), gen) for _ in range(2))
    # FP8 operands of wgmma are K-major only, so the keys of v are contiguous
    v_stored = v_t.permute(0, 4, 2, 3, 1).contiguous() if f.bits == 8 else v_t
    o_t = blank(q_t.shape, o_f)
    lse_t = blank((*q_t.shape[:-1], 1), FORMATS["fp32"])
    scale = 1 / math.sqrt(size)
    ends = tuple(-1 if n is None else n for n in (left, right))
    possible, why = module.HopperFusedMultiHeadAttentionForward.can_implement(
        q, (batch, keys, groups, size), f.type, o_f.type, Float32, Float32, tile, persistent, scale, ends, 1
    )
    if not possible:
        raise ValueError(why)
    order = (1, 4, 3, 2, 0)
    arguments = (
        _along(q_t.permute(order), f, 1),
        _along(k_t.permute(order), f, 1),
        _along(v_stored.permute(4, 1, 3, 2, 0), f, 0) if f.bits == 8 else _along(v_t.permute(order), f, 1),
        _along(o_t.permute(order), o_f, 1),
        _along(lse_t.permute(order), FORMATS["fp32"], 1),
        scale * LOG2_E,
        scale,
        scale_o,
        *(None if n is None else Int32(n) for n in (window.left, window.right)),
        STREAM,
    )
    sums = 2.0**-12 if f.bits == 8 else 2.0**-20  # wgmma keeps 13 bits behind the point when it adds products of FP8
    fmha = module.HopperFusedMultiHeadAttentionForward(Float32, Float32, (*tile, size), persistent, mask)
    compiled = cute.compile(fmha, *arguments)
    outputs = []
    for n in range(batch):
        flat = (t[n].flatten(1, 2) for t in (q_t, k_t, v_t))
        want, want_lse, error, lse_error = attention(*flat, scale, window, f, sums=sums)
        outputs.append(
            Near(f"o{n}", o_t[n].flatten(1, 2), want * scale_o, rounded(error * scale_o, want * scale_o, o_f))
        )
        want_lse = want_lse / LOG2_E
        outputs.append(Near(f"lse{n}", lse_t[n].flatten(1, 3), want_lse, lse_error))
    return Prepared(lambda: compiled(*arguments), outputs, (q_t, k_t, v_stored))


def _cases(
    example: str,
    prepare: Any,
    *configs: dict[str, Any],
    arch: str = "sm_100a",
    refused: str = "",
    shown: Sequence[str] = (),
    **device: Any,
) -> list[Case]:
    return [Case(example, prepare, config, arch, device, refused, shown) for config in configs]


_ATTENTION = "cute.blackwell.kernel.attention"
# With a second tile of keys a warp writes its row maxima to shared memory while another may still read those of the
# first: one barrier lies between writing and reading, none between reading and writing again.
_OVERWRITTEN = r"data race: shared address .* is written, with no order after it was read by .* ld\.shared"
# The warp of the QK products arrives at a named barrier for its second tile of keys when that of the PV products may
# not yet have come for the first: both arrivals would then be of one warp.
_TOLD_TWICE = "barrier 2 is come to again"
# A CTA may be over before its peer's last tcgen05.commit arrives at its mbarrier, which it does not wait for.
_EXIT_BEFORE_COMMIT = r"its shared memory gone, before this access of it: .*tcgen05\.commit"
# One warp gives tensor memory back when it is done; the others may still load from it.
_DEALLOC_EARLY = r"tensor memory .* is written, with no order after it was read by tcgen05\.ld(.|\n)*tcgen05\.dealloc"
# The second part of the first PV product goes to the columns of the scores of the next tile. The mbarrier that guards
# them has seen nobody load these: the producer's first wait for it is over at once.
_SCORES_OVERWRITTEN = r"column 128 of tensor memory .* with no order after it was (read|written) by tcgen05\.(ld|mma)"
# CTAs end before the last TMA store has read their shared memory (cp.async.bulk.wait_group.read 1).
_EXIT_BEFORE_STORE = r"its shared memory gone, before this access of it: TMA store"
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
        {"q": (1, 256, 1, 64), "kv": (512, 1), "left": 100, "right": 30, "lse": True},
        {"q": (1, 256, 2, 64), "kv": (256, 1), "sink": True, "lse": True},
        {"q": (1, 256, 1, 64), "kv": (384, 1), "ex2": True, "skip": True},
        {"q": (1, 256, 1, 64), "kv": (384, 1), "pv": "e4m3", "o": "fp16", "scales": (0.5, 1.5, 0.75, 2.0)},
        multiprocessors=2,
    ),
    *_cases(  # a warp whose rows are all past the end loads and works with none of it: no tcgen05.wait::ld follows
        f"{_ATTENTION}.fmha.fmha",
        fmha,
        {"q": (2, (260, 140), 1, 128), "kv": ((260, 140), 1), "qk": "bf16", "causal": True, "lse": True},
        multiprocessors=2,
        refused=_DEALLOC_EARLY,
    ),
    *_cases(
        f"{_ATTENTION}.mla.mla_decode_fp16",
        mla_decode,
        {"batch": 2, "queries": 1, "keys": 100},
        multiprocessors=4,
    ),
    *_cases(
        f"{_ATTENTION}.mla.mla_decode_fp16",
        mla_decode,
        {"batch": 1, "queries": 1, "keys": 256},
        {"batch": 2, "queries": 2, "keys": 384, "page": 64, "ragged": True, "persistent": True},
        {"batch": 1, "queries": 1, "keys": 512, "split": 2},
        {"batch": 2, "queries": 1, "keys": 500, "page": 32, "ragged": True, "split": None},
        {"batch": 1, "queries": 3, "keys": 200, "heads": 64, "page": 16},
        multiprocessors=4,
        refused=_OVERWRITTEN,
    ),
    *_cases(
        f"{_ATTENTION}.mla.mla_decode_fp8",
        mla_decode,
        {"batch": 1, "queries": 1, "keys": 128, "io": "e4m3"},
        multiprocessors=4,
        refused=_EXIT_BEFORE_COMMIT,
    ),
    *_cases(
        f"{_ATTENTION}.mla.mla_decode_fp8",
        mla_decode,
        {"batch": 1, "queries": 1, "keys": 256, "io": "e4m3"},
        {"batch": 2, "queries": 2, "keys": 384, "io": "e4m3", "page": 64, "ragged": True, "persistent": True},
        {"batch": 2, "queries": 1, "keys": 500, "io": "e4m3", "page": 32, "ragged": True, "split": None},
        multiprocessors=4,
        refused=_OVERWRITTEN,
    ),
    *_cases(
        f"{_ATTENTION}.mixed_input_fmha.mixed_input_fmha_decode",
        int8_decode,
        {"batch": 1, "heads": (8, 1), "keys": 256, "size": 128, "block": 128, "splits": 1},
        {"batch": 2, "heads": (24, 2), "keys": 384, "size": 256, "block": 128, "splits": 2},
        multiprocessors=4,
        refused=rf"{_OVERWRITTEN}|{_TOLD_TWICE}",
    ),
    *_cases(
        f"{_ATTENTION}.mixed_input_fmha.mixed_input_fmha_prefill_d256",
        int8_prefill,
        {"q": (1, 1, 256, 256), "kv": (1, 128), "block": 256},
        {"q": (1, 2, 200, 256), "kv": (1, 264), "block": 128, "causal": True, "persistent": True},
        multiprocessors=4,
        refused=_DEALLOC_EARLY,
        shown=("seed",),
    ),
    *_cases(
        f"{_ATTENTION}.mixed_input_fmha.mixed_input_fmha_prefill_d512",
        int8_prefill,
        {"q": (1, 1, 256, 512), "kv": (1, 256), "block": 512},
        multiprocessors=4,
        rewrite=_uniform_address,
        refused=_SCORES_OVERWRITTEN,
        shown=("eager", "seed"),
    ),
    *_cases(
        f"{_ATTENTION}.fmha.fmha_bwd",
        fmha_backward,
        {"q": (1, 128, 1, 64), "kv": (128, 1)},
        {"q": (2, 200, 2, 64), "kv": (136, 1), "io": "bf16"},
        {"q": (1, 256, 1, 128), "kv": (256, 1), "causal": True},
        rewrite=_dealloc_last,
    ),
    *_cases(
        "cute.hopper.kernel.attention.fmha",
        fmha_sm90,
        {"q": (1, 128, 1, 64), "kv": (128, 1)},
        {"q": (2, 200, 2, 128), "kv": (300, 1), "tile": (64, 128)},
        {"q": (1, 256, 2, 64), "kv": (256, 2), "io": "bf16", "causal": True, "persistent": True},
        {"q": (1, 192, 1, 128), "kv": (320, 1), "tile": (64, 128), "causal": True, "inference": True},
        {"q": (1, 256, 1, 64), "kv": (384, 1), "tile": (64, 64), "left": 70, "right": 40, "persistent": True},
        {"q": (1, 128, 1, 128), "kv": (256, 1), "tile": (64, 128), "io": "e4m3", "o": "fp16"},
        {"q": (1, 200, 2, 64), "kv": (256, 1), "io": "e4m3", "causal": True},
        arch="sm_90a",
        multiprocessors=2,
        refused=_EXIT_BEFORE_STORE,
    ),
]
