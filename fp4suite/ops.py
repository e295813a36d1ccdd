"""The ops: `torch.library` operators with fakes, so that opcheck, torch.compile and CUDA graphs work.

Each public function has the signature of its namesake in `fp4suite.reference` and unpacks containers; the operator
behind it takes plain tensors (scale factors as uint8: opcheck cannot compare float8). Kernels are chosen by
`dispatch.choose`: the reference on CPU tensors, a kernel of the registry or `UnsupportedError` on a GPU. No op reads a
device value on the host unless the reference was asked for by an override.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import checks, layouts
from .formats import BLOCK, FP8RowTensor, IndexCache, IndexFormat, NVFP4Tensor, PagedCache, SfLayout
from .operators import as_nvfp4, dtype_name
from .problem import Rule, check_rule
from .reference.compressor import CompressorStep
from .reference.gemm import check_segments
from .reference.quant import check_runs

_ops: Any = torch.ops.fp4suite  # typed as Any: the operators are made at run time


# --- quantise and dequantise -----------------------------------------------------------------------------------------


def quantize_nvfp4(
    x: Tensor,
    *,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
    segments: Sequence[int] | None = None,
) -> NVFP4Tensor:
    """x [..., m, k] (bfloat16, float16 or float32) -> NVFP4, k a multiple of 16; see `reference.quantize_nvfp4`.

    alpha: float32 global scale: [], [...], or one for each of `segments`, runs of rows m. None takes amax / 2688.
    Raises ValueError for k or alpha of another shape, TypeError for another dtype.
    """
    dtype_name(x, "x")
    check_rule(rule)
    if x.ndim < 2 or x.shape[-1] % BLOCK:
        raise ValueError(f"x must be [..., m, k] with k a multiple of {BLOCK}, got {list(x.shape)}")
    runs = _runs(segments, x.shape[-2])
    if alpha is None:
        alpha = _ops.nvfp4_alpha(_rows(x) if x.ndim == 2 else x, runs)
    checks.alpha(alpha, x)
    if alpha.ndim == 0 and (x.ndim == 2 or sf_layout == "linear"):
        data, sf = _ops.quantize_nvfp4(_rows(x), alpha, sf_layout, rule)
    else:  # one launch for each alpha: weights, not activations
        made = [_ops.quantize_nvfp4(part, own, "linear", rule) for part, own in _pieces(x, alpha, runs)]
        data, sf = (torch.cat(parts) for parts in zip(*made, strict=True))
        linear = _unflatten(data, sf, alpha, "linear", x.shape[:-1])
        return linear.with_sf_layout(sf_layout)
    return _unflatten(data, sf, alpha, sf_layout, x.shape[:-1])


def quantize_fp8(x: Tensor) -> FP8RowTensor:
    """x [..., m, k] (bfloat16, float16 or float32) -> E4M3 with a scale a row, k a multiple of 64.

    scale = amax / 448 of the row in FP32; see `reference.quantize_fp8` for rows of zeros, infinities and NaN. One such
    tensor serves all weights that x is multiplied by.
    """
    dtype_name(x, "x")
    if x.ndim < 2 or x.shape[-1] % layouts.TILE:
        raise ValueError(f"x must be [..., m, k] with k a multiple of {layouts.TILE}, got {list(x.shape)}")
    data, scale = _ops.quantize_fp8(_rows(x))
    return FP8RowTensor(data.view(x.shape).view(torch.float8_e4m3fn), scale.view(x.shape[:-1]))


def dequant_nvfp4(
    t: NVFP4Tensor, dtype: torch.dtype = torch.bfloat16, *, segments: Sequence[int] | None = None
) -> Tensor:
    """NVFP4 [..., m, k] by rows -> dtype (bfloat16, float16 or float32) [..., m, k].

    segments: as for `quantize_nvfp4`. Raises ValueError for a weight in another order than "rows".
    """
    dtype_name(dtype, "dtype")
    checks.order_of_rows(t, "t")
    runs = _runs(segments, t.shape[-2])
    if t.alpha.ndim == 0 and (t.data.ndim == 2 or t.sf_layout == "linear"):
        rows = t.data.flatten(0, -2)
        sf = t.sf.flatten(0, -2) if t.sf_layout == "linear" else t.sf
        out = _ops.dequant_nvfp4(rows, sf.view(torch.uint8), t.alpha, t.sf_layout, dtype)
    else:
        data = _pieces(t.data, t.alpha, runs)
        scales = _pieces(t.with_sf_layout("linear").sf.view(torch.uint8), t.alpha, runs)
        out = torch.cat(
            [_ops.dequant_nvfp4(d, sf, own, "linear", dtype) for (d, own), (sf, _) in zip(data, scales, strict=True)]
        )
    return out.view(*t.shape)


def rmsnorm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
) -> NVFP4Tensor:
    """RMSNorm of rows x [..., k] with weight [k] in FP32, then NVFP4; see `reference.rmsnorm_quantize`.

    alpha: float32 []; None takes it from the normed rows, which costs another pass over x.
    """
    dtype_name(x, "x")
    check_rule(rule)
    if x.ndim < 2 or x.shape[-1] % BLOCK or list(weight.shape) != [x.shape[-1]]:
        raise ValueError(
            f"x must be [..., m, k] with k a multiple of {BLOCK} and weight [k], "
            f"got {list(x.shape)} and {list(weight.shape)}"
        )
    checks.floating(weight, "weight", x)
    if alpha is None:
        alpha = _ops.rmsnorm_alpha(_rows(x), weight, eps)
    checks.alpha(alpha, x, scalar=True)
    data, sf = _ops.rmsnorm_quantize(_rows(x), weight, eps, alpha, sf_layout, rule)
    return _unflatten(data, sf, alpha, sf_layout, x.shape[:-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of rows x [..., m, k] with weight [k] in FP32, rounded once: [..., m, k] in x's dtype, contiguous.

    Rows may have any stride. A NaN makes its row NaN; an infinity makes itself NaN and the rest of its row 0.
    """
    if x.ndim < 2:
        raise ValueError(f"x must be [..., m, k], got {list(x.shape)}")
    checks.norm(x, weight, "x", "weight")
    return _ops.rms_norm(_rows(x), weight, eps).view(x.shape)


def swiglu_quantize(
    x: Tensor,
    *,
    limit: float = 10.0,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
) -> NVFP4Tensor:
    """silu(min(g, limit)) * clamp(u, -limit, limit) of x [..., 2 k] (gate columns first) in FP32, then NVFP4 [..., k].

    alpha: float32 []; None takes it from the activations, which costs another pass over x.
    """
    dtype_name(x, "x")
    check_rule(rule)
    if x.ndim < 2 or x.shape[-1] % (2 * BLOCK):
        raise ValueError(f"x must be [..., m, 2 k] with k a multiple of {BLOCK}, got {list(x.shape)}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    if alpha is None:
        alpha = _ops.swiglu_alpha(_rows(x), limit)
    checks.alpha(alpha, x, scalar=True)
    data, sf = _ops.swiglu_quantize(_rows(x), limit, alpha, sf_layout, rule)
    return _unflatten(data, sf, alpha, sf_layout, x.shape[:-1])


# --- embedding and activation ----------------------------------------------------------------------------------------


def embed(token_ids: Tensor, weight: Tensor, *, streams: int = 1, out_dtype: torch.dtype | None = None) -> Tensor:
    """Rows of weight [vocab, hidden] by token_ids [tokens], each `streams` times -> [tokens, streams, hidden].

    The axis of streams is there for one, too. token_ids: int64 or int32; out_dtype: bfloat16, float16 or float32, None
    for weight's, whose numbers are then copied bit for bit. A token whose id is not in 0 .. vocab - 1 gets NaN, on
    every device: nothing outside of the table is read. Rows of weight may have any stride, and so may ids.
    """
    dtype_name(weight, "weight")
    out_dtype = weight.dtype if out_dtype is None else out_dtype
    dtype_name(out_dtype, "out_dtype")
    if token_ids.dtype not in (torch.int64, torch.int32) or token_ids.ndim != 1:
        raise ValueError(f"token_ids must be int64 or int32 [tokens], got {token_ids.dtype} {list(token_ids.shape)}")
    if weight.ndim != 2 or not len(weight) or (weight.shape[1] > 1 and weight.stride(1) != 1):
        raise ValueError(
            f"weight must be [vocab, hidden], one row at least and each of them contiguous, "
            f"got {list(weight.shape)} with strides {list(weight.stride())}"
        )
    if token_ids.device != weight.device:
        raise ValueError(f"token_ids must be on {weight.device} beside weight, got {token_ids.device}")
    if streams < 1:
        raise ValueError(f"streams must be positive, got {streams}")
    return _ops.embed(token_ids, weight, streams, out_dtype)


def swiglu(x: Tensor, limit: float, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """silu(min(g, limit)) * clamp(u, -limit, limit) of x [..., 2 k] (gate columns first) -> [..., k] in out_dtype.

    x and out_dtype: bfloat16, float16 or float32. Computed in FP32 and rounded once, the same bits on every device.
    NaN in g or u stays NaN, and g = -inf becomes it; +inf counts as limit, and -inf in u as -limit.
    """
    dtype_name(x, "x")
    dtype_name(out_dtype, "out_dtype")
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must be [..., m, 2 k], gate columns first, got {list(x.shape)}")
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    return _ops.swiglu(_rows(x), limit, out_dtype).view(*x.shape[:-1], x.shape[-1] // 2)


# --- GEMMs and experts -----------------------------------------------------------------------------------------------


@overload
def gemm_nvfp4(
    a: Tensor | NVFP4Tensor | FP8RowTensor,
    b: NVFP4Tensor,
    *,
    act: Literal["fp8"] | None = ...,
    segments: Sequence[int] | None = ...,
    out_dtype: torch.dtype = ...,
    out_alpha: None = ...,
    out_sf_layout: SfLayout = ...,
) -> Tensor: ...


@overload
def gemm_nvfp4(
    a: Tensor | NVFP4Tensor | FP8RowTensor,
    b: NVFP4Tensor,
    *,
    act: Literal["fp8"] | None = ...,
    segments: Sequence[int] | None = ...,
    out_dtype: torch.dtype = ...,
    out_alpha: Tensor,
    out_sf_layout: SfLayout = ...,
) -> NVFP4Tensor: ...


def gemm_nvfp4(
    a: Tensor | NVFP4Tensor | FP8RowTensor,
    b: NVFP4Tensor,
    *,
    act: Literal["fp8"] | None = None,
    segments: Sequence[int] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out_alpha: Tensor | None = None,
    out_sf_layout: SfLayout = "linear",
) -> Tensor | NVFP4Tensor:
    """a [..., k] @ b [n, k].T -> [..., n] in out_dtype (bfloat16 or float32), or in NVFP4 under `out_alpha`.

    a: a float tensor (W4A16; bfloat16 on a GPU) or an NVFP4Tensor [m, k] with one alpha (W4A4). b.alpha is one number,
    or one for each of `segments`, runs of output columns that sum to n. Sums in FP32, alpha in FP32, rounded once.
    b's order says which kernels can run: UnsupportedError on a GPU where none reads it. b is a weight, which a GPU may
    read before the launches before have ended: synchronise once it is written, before ops are launched.
    act: "fp8" quantises a float a by `quantize_fp8` and rounds b to E4M3 row by row, for Hopper's FP8 tensor cores: an
    error of 3.4 % on Gaussian data. So with an FP8RowTensor for a. b is as `NVFP4Tensor.prepare_fp8` gives it, k a
    multiple of 64, on a GPU in the order "fragments_sm90_fp8". Kernels for bfloat16 do not read that one: `with_order`
    converts, exactly, both ways.
    out_alpha: float32 [], the global scale of an NVFP4 result, n a multiple of 16. It is quantised by rule "absmax"
    from FP32 sums times alpha, not rounded in between, in the kernel where one can; `out_dtype` then counts nothing.
    """
    if not isinstance(b, NVFP4Tensor):
        raise TypeError(f"b must be an NVFP4Tensor, as quantize_nvfp4 gives it, got {type(b).__name__}")
    if b.data.ndim != 2:
        raise ValueError(f"b must be one [n, k] matrix, got {list(b.shape)}; stacked experts go to grouped_gemm_nvfp4")
    n, k = b.shape
    if list(a.shape[-1:]) != [k]:
        raise ValueError(f"a [..., k] and b [n, k] must agree in k, got {list(a.shape)} and {list(b.shape)}")
    check_segments(b.alpha, n, segments)
    if a.device != b.device:
        raise ValueError(f"a and b must share a device, got {a.device} and {b.device}")
    if act not in (None, "fp8"):
        raise ValueError(f'act must be "fp8" or None, got {act!r}')
    if act == "fp8" and isinstance(a, Tensor):
        a = quantize_fp8(a)
    runs = list(segments) if segments is not None and len(segments) > 1 else []
    b_sf, b_alpha = b.sf.view(torch.uint8), b.alpha.reshape(-1) if runs else b.alpha.reshape(())
    left = None
    if isinstance(a, FP8RowTensor):
        return _gemm_fp8(a, b, runs, out_dtype, out_alpha, out_sf_layout)
    if isinstance(a, NVFP4Tensor):
        if act is not None:
            raise ValueError(f"act={act!r} is of float activations, got an NVFP4Tensor")
        if a.data.ndim != 2 or a.alpha.ndim:
            raise ValueError(f"an NVFP4 a must be [m, k] with alpha [], got {list(a.shape)} with {list(a.alpha.shape)}")
        checks.order_of_rows(a, "a")
        left = a.data, a.sf.view(torch.uint8), a.alpha, a.sf_layout
    else:
        dtype_name(a, "a")
    right = b.data, b_sf, b_alpha, b.sf_layout, b.order, runs
    if out_alpha is None:
        return _ops.gemm_w4a16(a, *right, out_dtype) if left is None else _ops.gemm_w4a4(*left, *right, out_dtype)
    if n % BLOCK:
        raise ValueError(f"an NVFP4 result needs n in multiples of {BLOCK}, got {n}")
    checks.alpha(out_alpha, a, scalar=True)
    if left is None:
        whole = _rows(_ops.gemm_w4a16(a, *right, torch.float32))
        data, sf = _ops.quantize_nvfp4(whole, out_alpha, out_sf_layout, "absmax")
    else:
        data, sf = _ops.gemm_w4a4_quantize(*left, *right, out_alpha, out_sf_layout)
    return _unflatten(data, sf, out_alpha, out_sf_layout, torch.Size(a.shape[:-1]))


def _gemm_fp8(
    a: FP8RowTensor,
    b: NVFP4Tensor,
    runs: list[int],
    out_dtype: torch.dtype,
    out_alpha: Tensor | None,
    out_sf_layout: SfLayout,
) -> Tensor | NVFP4Tensor:
    if b.row_exponent is None:
        raise ValueError('act="fp8" needs the row exponents of b: pass what b.prepare_fp8() gives, made once')
    alpha, lead, n = b.alpha.reshape(-1) if runs else b.alpha.reshape(()), a.data.shape[:-1], b.shape[0]
    rows = a.data.view(torch.uint8).flatten(0, -2), a.scale.flatten()
    weight = b.data, b.sf.view(torch.uint8), alpha, b.sf_layout, b.order, b.row_exponent
    out = _ops.gemm_w4a8(*rows, *weight, runs, out_dtype if out_alpha is None else torch.float32)
    if out_alpha is None:
        return out.view(*lead, n)
    if n % BLOCK:
        raise ValueError(f"an NVFP4 result needs n in multiples of {BLOCK}, got {n}")
    checks.alpha(out_alpha, a, scalar=True)
    data, sf = _ops.quantize_nvfp4(out, out_alpha, out_sf_layout, "absmax")
    return _unflatten(data, sf, out_alpha, out_sf_layout, lead)


def grouped_gemm_nvfp4(
    a: Tensor | NVFP4Tensor,
    b: NVFP4Tensor,
    offsets: Tensor,
    *,
    segments: Sequence[int] | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Rows offsets[e] .. offsets[e + 1] of a [slots, k] times expert e of b [experts, n, k] -> [slots, n].

    offsets: int32 [experts + 1] on the device; rows from offsets[experts] on give zeros. b.alpha: [], [experts] or
    [experts, segments].
    """
    if b.data.ndim != 3 or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a [slots, k] and b [experts, n, k] must agree in k, got {list(a.shape)} and {list(b.shape)}")
    checks.matrix(a, "a", b.shape[-1], b)
    if offsets.dtype != torch.int32 or list(offsets.shape) != [b.shape[0] + 1]:
        raise ValueError(f"offsets must be int32 [{b.shape[0] + 1}], got {offsets.dtype} {list(offsets.shape)}")
    checks.beside(offsets, "offsets", b)
    parts = _parts(a)
    return _ops.grouped_gemm_nvfp4(*parts, *_weight(b), offsets, list(segments or []), out_dtype)


def moe_nvfp4(
    x: Tensor | NVFP4Tensor,
    w13: NVFP4Tensor,
    w2: NVFP4Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    limit: float = 10.0,
) -> Tensor:
    """Routed experts: x [tokens, hidden] -> [tokens, hidden], without the shared expert; see `reference.moe_nvfp4`.

    w13: [experts, 2 I, hidden], gate rows first; w2: [experts, hidden, I]; topk_ids int32, topk_weights float32
    [tokens, topk].
    """
    experts, wide, hidden = w13.shape
    if list(w2.shape) != [experts, hidden, wide // 2] or x.shape[-1] != hidden:
        raise ValueError(
            f"w13 {list(w13.shape)} needs w2 [{experts}, {hidden}, {wide // 2}] and x [tokens, {hidden}], "
            f"got {list(w2.shape)} and {list(x.shape)}"
        )
    checks.matrix(x, "x", hidden, w13)
    checks.choices(topk_ids, topk_weights)
    return _ops.moe_nvfp4(*_parts(x), *_weight(w13), *_weight(w2), topk_ids, topk_weights, limit)


def route(
    logits: Tensor,
    *,
    topk: int,
    scale: float,
    bias: Tensor | None = None,
    token_ids: Tensor | None = None,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts int32 and weights float32 [tokens, topk] from router logits [tokens, experts]; see `reference.route`.

    On a GPU a token id outside of the table gets the experts -1 with weight 0, in place of the CPU's IndexError.
    """
    if logits.ndim != 2 or not 1 <= topk <= logits.shape[1]:
        raise ValueError(f"logits must be [tokens, {topk} or more experts], got {list(logits.shape)}")
    checks.floating(logits, "logits", logits)
    if bias is not None:
        checks.floats(bias, "bias", [logits.shape[1]], logits)
    if (token_ids is None) != (table is None):
        raise ValueError("token_ids and table go together: one was given without the other")
    if table is not None and bias is not None:
        raise ValueError("experts are chosen by bias or by table, not by both")
    if table is not None and token_ids is not None:
        checks.by_table(logits, topk, token_ids, table)
    return _ops.route(logits, topk, scale, bias, token_ids, table)


def permute(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Slots in expert order: order int32 [tokens * topk] and offsets int32 [experts + 1]; see `reference.permute`.

    On a GPU an id of `experts` or above counts as -1, in place of the CPU's error.
    """
    checks.choices(topk_ids)
    checks.positive(experts=experts)
    return _ops.permute(topk_ids, experts)


def combine(
    y: Tensor, order: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, shared: Tensor | None = None
) -> Tensor:
    """Weighted sum of slots y [tokens * topk, hidden] (order of `permute`), plus `shared` -> [tokens, hidden].

    topk_ids: int32, topk_weights: float32 [tokens, topk]; shared: [tokens, hidden].
    """
    checks.choices(topk_ids, topk_weights)
    slots = topk_ids.numel()
    if y.ndim != 2 or len(y) != slots or order.dtype != torch.int32 or list(order.shape) != [slots]:
        raise ValueError(
            f"y must be [{slots}, hidden] and order int32 [{slots}], "
            f"got {list(y.shape)} and {order.dtype} {list(order.shape)}"
        )
    checks.floating(y, "y", topk_ids)
    checks.beside(order, "order", y)
    if shared is not None:
        checks.floats(shared, "shared", [len(topk_ids), y.shape[1]], y)
    return _ops.combine(y, order, topk_ids, topk_weights, shared)


# --- hyper-connections -----------------------------------------------------------------------------------------------


def hyper_connection_pre(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    norm_eps: float,
    eps: float,
    iterations: int = 20,
) -> tuple[Tensor, Tensor, Tensor]:
    """A site's normed input y [tokens, d], post [tokens, n] and comb [tokens, n, n] of streams h [tokens, n, d].

    fn is a weight, which a GPU may read before the launches before have ended: synchronise once it is written, before
    ops are launched. A token with an infinity or NaN in its streams gets NaN in y, post and comb.
    """
    checks.fold(h, fn, base, scale, weight)
    return _ops.hyper_connection_pre(h, fn, base, scale, weight, norm_eps, eps, iterations)


def hyper_connection_post(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """Streams after a site [tokens, n, d]: post_k y + sum_j comb[j, k] h_j. Infinities and NaN spread along columns."""
    checks.site(y, h, post, comb)
    return _ops.hyper_connection_post(y, h, post, comb)


def hyper_connection_head(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor | None, *, norm_eps: float, eps: float
) -> Tensor:
    """The streams h [tokens, n, d] folded and normed for the language-model head: [tokens, d]. fn: as for
    `hyper_connection_pre`.
    """
    checks.fold(h, fn, base, scale, weight, head=True)
    return _ops.hyper_connection_head(h, fn, base, scale, weight, norm_eps, eps)


def hyper_connection_post_pre(
    y: Tensor,
    h: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    *,
    norm_eps: float,
    eps: float,
    iterations: int = 20,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`hyper_connection_post` of a site, and `hyper_connection_pre` of the next on what it leaves.

    fn: as for `hyper_connection_pre`. Returns the streams [tokens, n, d] and the next site's y [tokens, d], post
    [tokens, n] and comb [tokens, n, n].
    """
    checks.site(y, h, post, comb)
    checks.fold(h, fn, base, scale, weight)
    return _ops.hyper_connection_post_pre(y, h, post, comb, fn, base, scale, weight, norm_eps, eps, iterations)


# --- attention -------------------------------------------------------------------------------------------------------


def qnorm_rope(q: Tensor, positions: Tensor, table: Tensor, eps: float) -> Tensor:
    """Per-head RMSNorm without weight, then RoPE: q [tokens, heads, head_dim] -> the same shape and dtype.

    positions: int32 [tokens], each less than the length of table, float32 [positions, rope_dim] of
    `reference.rope_table`.
    """
    checks.heads(q, "q")
    checks.rope(q, positions, table)
    return _ops.qnorm_rope(q, positions, table, eps)


def qnorm_rope_quantize(q: Tensor, positions: Tensor, table: Tensor, eps: float) -> Tensor:
    """`qnorm_rope` as NVFP4: q [tokens, heads, head_dim] -> uint8 [tokens, heads, row bytes].

    A head becomes a row of an `nvfp4` cache (`formats.kv_layout`), 384 bytes of 512 dims with 64 of RoPE: codes, E4M3
    scales, the head's own alpha, RoPE dims in BF16. `reference.read_rows` decodes them, from a PagedCache of page_size
    1. ValueError where the dims beside RoPE are none, or no multiple of 16 (kernels take those of 32).
    """
    checks.heads(q, "q")
    checks.rope(q, positions, table)
    if q.shape[2] == table.shape[1]:
        raise ValueError(f"q's heads must have dims beside the {table.shape[1]} of RoPE, got {list(q.shape)}")
    return _ops.qnorm_rope_quantize(q, positions, table, eps)


def kv_norm_rope_insert(
    kv: Tensor, weight: Tensor, positions: Tensor, table: Tensor, eps: float, cache: PagedCache, slots: Tensor
) -> None:
    """RMSNorm, RoPE and quantise rows kv [tokens, head_dim], then store row t at slots[t]; changes cache.data.

    weight: [head_dim]; positions: int32 [tokens]; table: as for `qnorm_rope`; slots: int32 [tokens], -1 stores nothing;
    those that are stored to differ from each other and lie in the cache. See `reference.cache` for infinities and NaN.
    """
    checks.insert(kv, weight, positions, table, cache, slots)
    _ops.kv_norm_rope_insert(kv, weight, positions, table, eps, cache.data, *_geometry(cache), slots)


def qkv_norm_rope_insert(
    q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, positions: Tensor, table: Tensor, eps: float,
    cache: PagedCache, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`rms_norm` of q [tokens, k] with q_weight [k], `kv_norm_rope_insert` of kv, in one launch; changes cache.data.

    q and kv, of one dtype, are usually columns of one tensor: rows may have any stride. Gives [tokens, k], contiguous.
    """
    checks.insert(kv, kv_weight, positions, table, cache, slots, "kv_weight")
    if q.ndim != 2 or len(q) != len(kv):
        raise ValueError(f"q must be [{len(kv)}, k], a row for each of kv, got {list(q.shape)}")
    if q.dtype != kv.dtype or q.device != kv.device:
        raise ValueError(f"q and kv must share dtype and device, got {q.dtype} {q.device} and {kv.dtype} {kv.device}")
    checks.norm(q, q_weight, "q", "q_weight")
    return _ops.qkv_norm_rope_insert(
        q, q_weight, kv, kv_weight, positions, table, eps, cache.data, *_geometry(cache), slots
    )


def compress_kv(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    weight: Tensor,
    table: Tensor,
    eps: float,
    state: Tensor,
    cache: PagedCache | IndexCache,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    state_slots: Tensor,
    slots: Tensor,
    ratio: int,
    hadamard: bool = False,
) -> None:
    """Take in a step's rows and store the entries that they complete; changes state and cache.data.

    See `reference.compress_kv` for the shapes. kv and gate are of one dtype, state and cache.data contiguous. Raises
    ValueError or TypeError, with nothing changed, for any that do not fit; values of tensors are not looked at.
    """
    own = CompressorStep(kv, gate, ape, weight, state, cache, hadamard)
    checks.compressor(own, ratio)
    checks.joint(own, table, positions, sequence_ids, cu_seqlens, state_slots, slots)
    _ops.compress_kv(
        kv, gate, ape, weight, table, eps, state, cache.data, *_geometry(cache),
        positions, sequence_ids, cu_seqlens, state_slots, slots, ratio, hadamard,
    )  # fmt: skip


def compress_kv_pair(
    entries: CompressorStep,
    keys: CompressorStep,
    table: Tensor,
    eps: float,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    cu_seqlens: Tensor,
    state_slots: Tensor,
    slots: Tensor,
    ratio: int,
) -> None:
    """`compress_kv` of a layer's entries and its indexer's keys, in one launch; changes state and cache.data of both.

    What each has for itself stands in its `reference.CompressorStep`; row t of both is stored at slots[t], each in its
    own cache. Raises ValueError where shapes do not fit, or where the two differ in tokens, overlap or page size, and
    TypeError where they differ in the dtypes of kv, gate or weight.
    """
    checks.pair(entries, keys, ratio)
    checks.joint(entries, table, positions, sequence_ids, cu_seqlens, state_slots, slots)
    _ops.compress_kv_pair(
        *_step_parts(entries), *_step_parts(keys), table, eps, positions, sequence_ids, cu_seqlens, state_slots, slots,
        ratio,
    )  # fmt: skip


def index_query(
    q: Tensor, positions: Tensor, table: Tensor, *, format: IndexFormat = "bf16", hadamard: bool = False
) -> Tensor:
    """RoPE, optionally Hadamard, then an index format's rounding: q [tokens, heads, head_dim] -> the same.

    positions and table: as for `qnorm_rope`. ValueError for dims that the format or the Hadamard transform cannot take.
    """
    checks.query(q, positions, table, format, hadamard)
    return _ops.index_query(q, positions, table, format, hadamard)


def index_query_fp8(
    q: Tensor, weights: Tensor, positions: Tensor, table: Tensor, *, hadamard: bool = False
) -> tuple[Tensor, Tensor]:
    """`index_query` in fp8 as float8_e4m3fn codes, and float32 weights [tokens, heads] that hold their scales."""
    checks.query(q, positions, table, "fp8", hadamard)
    checks.floats(weights, "weights", list(q.shape[:2]), q)
    codes, scaled = _ops.index_query_fp8(q, weights, positions, table, hadamard)
    return codes.view(torch.float8_e4m3fn), scaled


def csa_queries(
    q: Tensor,
    index_q: Tensor,
    positions: Tensor,
    table: Tensor,
    eps: float,
    *,
    format: IndexFormat = "bf16",
    hadamard: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `qnorm_rope` gives for q [tokens, heads, head_dim] and `index_query` for index_q [tokens, index heads, index
    dim], in one launch.

    positions and table: as for `qnorm_rope`. Raises TypeError unless q and index_q have one dtype.
    """
    checks.queries(q, index_q, positions, table, format, hadamard)
    first, second = _ops.csa_queries(q, index_q, positions, table, eps, format, hadamard)
    return first, second


def csa_queries_fp8(
    q: Tensor,
    index_q: Tensor,
    weights: Tensor,
    positions: Tensor,
    table: Tensor,
    eps: float,
    *,
    hadamard: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `qnorm_rope` gives for q and `index_query_fp8` for index_q and weights [tokens, index heads], in one launch.

    See `csa_queries`.
    """
    checks.queries(q, index_q, positions, table, "fp8", hadamard)
    checks.floats(weights, "weights", list(index_q.shape[:2]), q)
    first, codes, scaled = _ops.csa_queries_fp8(q, index_q, weights, positions, table, eps, hadamard)
    return first, codes.view(torch.float8_e4m3fn), scaled


def index_logits(
    q: Tensor,
    weights: Tensor,
    cache: IndexCache,
    block_table: Tensor,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    scale: float,
) -> Tensor:
    """Float32 [tokens, pages * page_size] scores of the block table's entries, -inf where not visible.

    q in float8_e4m3fn, for keys in fp8 alone, is multiplied as it is: the scale of a head belongs into its weight. The
    rest as for `reference.index_logits`; a sequence id is less than the rows of block_table, which nothing checks.
    """
    checks.keys(q, weights, cache)
    checks.visible(q, block_table, positions, sequence_ids, ratio)
    return _ops.index_logits(
        q, weights, cache.data, cache.format, cache.page_size, cache.head_dim,
        block_table, positions, sequence_ids, ratio, scale,
    )  # fmt: skip


def index_topk(
    logits: Tensor,
    block_table: Tensor,
    *,
    positions: Tensor,
    sequence_ids: Tensor,
    ratio: int,
    topk: int,
    page_size: int,
) -> Tensor:
    """Cache slots int32 [tokens, min(topk, entries)] of the highest visible scores, entries rising, -1 behind.

    logits: float32 [tokens, entries], no more than block_table [sequences, pages] has; the rest as for `index_logits`.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be [tokens, entries], got {list(logits.shape)}")
    if logits.dtype != torch.float32:
        raise TypeError(f"logits must be float32, got {logits.dtype}")
    checks.positive(topk=topk, page_size=page_size)
    checks.visible(logits, block_table, positions, sequence_ids, ratio)
    if logits.shape[1] > block_table.shape[1] * page_size:
        raise ValueError(
            f"block_table {list(block_table.shape)} has pages of {page_size} for "
            f"{block_table.shape[1] * page_size} entries, logits {logits.shape[1]}"
        )
    if not len(block_table):  # padding tokens alone
        return logits.new_full((len(logits), min(topk, logits.shape[1])), -1, dtype=torch.int32)
    return _ops.index_topk(logits, block_table, positions, sequence_ids, ratio, topk, page_size)


def sparse_attention(
    q: Tensor, caches: Sequence[PagedCache], indices: Sequence[Tensor], sink: Tensor, scale: float
) -> Tensor:
    """q [tokens, heads, head_dim] over gathered rows with K = V and a sink per head -> the same shape and dtype.

    indices[i]: int32 [tokens, rows_i], slots of caches[i], -1 for no row. sink: float32 [heads].
    """
    if len(caches) != len(indices) or not caches:
        raise ValueError(f"caches and indices go in pairs, got {len(caches)} and {len(indices)}")
    checks.gathered(q, indices, sink)
    return _ops.sparse_attention(
        q,
        [c.data for c in caches],
        [c.format for c in caches],
        [n for c in caches for n in (c.page_size, c.head_dim, c.rope_dim)],
        list(indices),
        sink,
        scale,
    )


def rope_inverse(o: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Undo the rotation that values carry at the query's position: o [tokens, heads, head_dim] -> the same.

    positions and table: as for `qnorm_rope`.
    """
    checks.heads(o, "o")
    checks.rope(o, positions, table)
    return _ops.rope_inverse(o, positions, table)


def rope_inverse_(o: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """`rope_inverse` in place: the last dims of o's heads are changed, the others not even read. Returns o.

    o: of any strides whose last is 1, no two elements in one place. ValueError for any other.
    """
    checks.heads(o, "o")
    checks.rope(o, positions, table)
    checks.turned_in_place(o)
    _ops.rope_inverse_(o, positions, table)
    return o


def rope_inverse_quantize(
    o: Tensor,
    positions: Tensor,
    table: Tensor,
    *,
    groups: int,
    alpha: Tensor | None = None,
    sf_layout: SfLayout = "linear",
    rule: Rule = "absmax",
) -> NVFP4Tensor:
    """`rope_inverse`, then NVFP4 by output group: [groups, tokens, heads / groups * head_dim] with one alpha.

    alpha: float32 []; None takes it from all of o, which costs another pass over it.
    """
    dtype_name(o, "o")
    check_rule(rule)
    checks.heads(o, "o")
    checks.rope(o, positions, table)
    _, heads, head_dim = o.shape
    if groups < 1 or heads % groups or heads // groups * head_dim % BLOCK:
        raise ValueError(f"heads={heads} of {head_dim} dims do not make {groups} groups in blocks of {BLOCK}")
    if alpha is None:
        alpha = _ops.rope_inverse_alpha(o, positions, table, groups)
    checks.alpha(alpha, o, scalar=True)
    data, sf = _ops.rope_inverse_quantize(o, positions, table, groups, alpha, sf_layout, rule)
    return as_nvfp4(data, sf, alpha, sf_layout)


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Next tokens int64 [rows] from logits [rows, vocab]: greedy at temperature 0, else nucleus sampling.

    temperature, top_p, uniform: float32 [rows], finite; see `reference.sample`. The same tokens on every device. That
    they are finite nothing checks, as no value is read on the host: of others a kernel may give any token, or -1.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"logits must be [rows, vocab], got {list(logits.shape)}")
    checks.floating(logits, "logits", logits)
    for name, given in (("temperature", temperature), ("top_p", top_p), ("uniform", uniform)):
        checks.tensor(given, name)
        if given.dtype != torch.float32 or list(given.shape) != [len(logits)]:
            raise ValueError(f"{name} must be float32 [{len(logits)}], got {given.dtype} {list(given.shape)}")
        checks.beside(given, name, logits)
    return _ops.sample(logits, temperature, top_p, uniform)


# --- containers and tensors -------------------------------------------------------------------------------------------


def _rows(x: Tensor) -> Tensor:
    """[..., m, k] -> [rows, k] with unit stride along k, which is what kernels read."""
    x = x.flatten(0, -2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _runs(segments: Sequence[int] | None, m: int) -> list[int]:
    runs = list(segments or [])
    if runs:
        check_runs(m, runs)
    return runs


def _pieces(x: Tensor, alpha: Tensor, segments: list[int]) -> list[tuple[Tensor, Tensor]]:
    """x [..., m, c] cut into the runs of rows that have one alpha: ([rows, c], alpha []), in row-major order."""
    lead, runs = x.shape[:-2], segments or [x.shape[-2]]
    want = (*lead, len(runs)) if segments else lead
    if alpha.ndim and alpha.shape != want:
        raise ValueError(f"alpha must be [] or {list(want)}, got {list(alpha.shape)}")
    matrices = (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, -3) if lead else _rows(x)[None]
    if not len(matrices):
        return [(matrices.flatten(0, 1), alpha.new_ones(()))]
    own = alpha.expand(want).reshape(len(matrices), len(runs))
    return [(part, own[i, j]) for i in range(len(matrices)) for j, part in enumerate(matrices[i].split(runs))]


def _unflatten(data: Tensor, sf: Tensor, alpha: Tensor, sf_layout: SfLayout, lead: torch.Size) -> NVFP4Tensor:
    """Rows [rows, k / 2] back to [..., m, k]; blocked scales are laid out again matrix by matrix."""
    if len(lead) != 1 and sf_layout == "blocked_128x4":
        sf = layouts.from_blocked_128x4(sf, data.shape[0], 2 * data.shape[1] // BLOCK)
        return _unflatten(data, sf, alpha, "linear", lead).with_sf_layout(sf_layout)
    if sf_layout == "linear":
        sf = sf.view(*lead, sf.shape[-1])
    return as_nvfp4(data.view(*lead, data.shape[-1]), sf, alpha, sf_layout)


def _step_parts(step: CompressorStep) -> tuple[Any, ...]:
    rows = step.kv, step.gate, step.ape, step.weight, step.state
    return (*rows, step.cache.data, *_geometry(step.cache), step.hadamard)


def _geometry(cache: PagedCache | IndexCache) -> tuple[str, int, int, int]:
    """format, page_size, head_dim and rope_dim; rope_dim 0 says that it is an index cache."""
    rope = cache.rope_dim if isinstance(cache, PagedCache) else 0
    return cache.format, cache.page_size, cache.head_dim, rope


def _parts(x: Tensor | NVFP4Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A float tensor, or the parts of an NVFP4 one with linear scales."""
    if isinstance(x, NVFP4Tensor):
        checks.order_of_rows(x, "the activations")
        x = x.with_sf_layout("linear")
        return x.data, x.sf.view(torch.uint8), x.alpha
    return x, None, None


def _weight(w: NVFP4Tensor) -> tuple[Tensor, Tensor, Tensor, str, str]:
    return w.data, w.sf.view(torch.uint8), w.alpha, w.sf_layout, w.order
