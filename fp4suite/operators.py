"""Behind `ops`: the operators' schemas, implementations and fakes, registered when this is imported.

An implementation asks `dispatch.choose`, then runs the reference or allocates the result and launches.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from . import by_token, dispatch, layouts, reference
from .formats import BLOCK, FP8RowTensor, IndexCache, IndexFormat, NVFP4Tensor, PagedCache, SfLayout, kv_layout
from .problem import (
    CombineProblem,
    CompressKvPairProblem,
    CompressKvProblem,
    CsaQueriesProblem,
    DequantProblem,
    EmbedProblem,
    GemmProblem,
    HyperConnectionHeadProblem,
    HyperConnectionPostPreProblem,
    HyperConnectionPostProblem,
    HyperConnectionPreProblem,
    IndexLogitsProblem,
    IndexQueryProblem,
    IndexTopkProblem,
    KvNormRopeInsertProblem,
    PermuteProblem,
    QkvNormRopeInsertProblem,
    QnormRopeProblem,
    QnormRopeQuantizeProblem,
    QuantizeFp8Problem,
    QuantizeProblem,
    RmsNormProblem,
    RmsnormQuantizeProblem,
    RopeInverseInPlaceProblem,
    RopeInverseProblem,
    RopeInverseQuantizeProblem,
    RouteChoice,
    RouteProblem,
    Rule,
    SampleProblem,
    SwigluProblem,
    SwigluQuantizeProblem,
)
from .reference.compressor import CompressorStep
from .reference.quant import global_scale, rmsnorm_fp32, swiglu_fp32

_lib = torch.library.Library("fp4suite", "DEF")
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _register(schema: str, impl: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """The one way an operator comes to be. `Library` costs microseconds less a call than custom_op."""
    name = schema.partition("(")[0]
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _lib.impl(name, impl, "CPU")
    _lib.impl(name, impl, "CUDA")
    torch.library.register_fake(f"fp4suite::{name}", fake, lib=_lib)


def dtype_name(x: Tensor | torch.dtype, what: str) -> str:
    dtype = x if isinstance(x, torch.dtype) else x.dtype
    if dtype not in _DTYPE_NAMES:
        names = ", ".join(str(d).removeprefix("torch.") for d in _DTYPE_NAMES)
        raise TypeError(f"{what} must be one of {names}, got {dtype}")
    return _DTYPE_NAMES[dtype]


def as_nvfp4(data: Tensor, sf: Tensor, alpha: Tensor, sf_layout: str, order: str = "rows") -> NVFP4Tensor:
    return NVFP4Tensor(data, sf.view(torch.float8_e4m3fn), alpha, sf_layout, order)  # type: ignore[arg-type]


def _cache(data: Tensor, format: str, page_size: int, head_dim: int, rope_dim: int) -> Any:
    if rope_dim:
        return PagedCache(data, format, page_size, head_dim, rope_dim)  # type: ignore[arg-type]
    return IndexCache(data, format, page_size, head_dim)  # type: ignore[arg-type]


def _whole(x: Tensor, sf: Tensor | None, alpha: Tensor | None) -> Tensor | NVFP4Tensor:
    return x if sf is None or alpha is None else as_nvfp4(x, sf, alpha, "linear")


def _quantizing(
    choice: dispatch.Choice, reference_op: Callable[[], NVFP4Tensor], m: int, k: int,
    alpha: Tensor, sf_layout: SfLayout, operands: tuple[Any, ...], rule: Rule,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the quantising operators share: the reference, or room for the result and a launch."""
    if choice.is_reference:
        t = reference_op()
        return t.data.contiguous(), t.sf.view(torch.uint8).contiguous()
    out = NVFP4Tensor.empty((m, k), alpha, sf_layout)
    with _on(alpha.device):
        choice.module.launch(*operands, out, rule, choice.config)
    return out.data, out.sf.view(torch.uint8)


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Kernels launch on the current CUDA device: make it this one where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _alpha(choice: dispatch.Choice, reference_op: Callable[[], Tensor], device: torch.device, *operands: Any) -> Tensor:
    """amax / 2688 of what is about to be quantised, by the quantising kernel's own arithmetic."""
    if choice.is_reference:
        return reference_op().clone()
    alpha = torch.empty((), dtype=torch.float32, device=device)
    with _on(device):
        choice.module.global_scale(*operands, alpha, choice.config)
    return alpha


def _refuse_alpha_of_all_rows() -> None:
    """In batch-invariant mode: a row's codes would change with the largest number of any other row."""
    if dispatch.is_batch_invariant():
        raise ValueError(
            "in batch-invariant mode a global scale cannot come from all rows of the call: give alpha=, or quantise "
            "what is no batch, such as a weight, inside of fp4suite.batch_invariant(False)"
        )


def _nvfp4_alpha(x: Tensor, segments: list[int]) -> Tensor:
    _refuse_alpha_of_all_rows()
    if x.ndim > 2 or segments:  # one number a matrix or segment: weights, not activations
        return global_scale(x, segments or None).clone()
    choice = dispatch.choose("quantize_nvfp4", _quantize_problem(x, "linear", "absmax"), x.device)
    return _alpha(choice, lambda: global_scale(x), x.device, x)


def _rmsnorm_alpha(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    _refuse_alpha_of_all_rows()
    choice = dispatch.choose("rmsnorm_quantize", _rmsnorm_problem(x, "linear", "absmax"), x.device)
    weight = weight.contiguous()
    return _alpha(choice, lambda: global_scale(rmsnorm_fp32(x, weight, eps)), x.device, x, weight, eps)


def _swiglu_alpha(x: Tensor, limit: float) -> Tensor:
    _refuse_alpha_of_all_rows()
    choice = dispatch.choose("swiglu_quantize", _swiglu_problem(x, "linear", "absmax"), x.device)
    return _alpha(choice, lambda: global_scale(swiglu_fp32(x, limit)), x.device, x, limit)


def _quantize_problem(x: Tensor, sf_layout: SfLayout, rule: Rule) -> QuantizeProblem:
    return QuantizeProblem(m=x.shape[0], k=x.shape[1], x=dtype_name(x, "x"), rule=rule, sf_layout=sf_layout)


def _rmsnorm_problem(x: Tensor, sf_layout: SfLayout, rule: Rule) -> RmsnormQuantizeProblem:
    return RmsnormQuantizeProblem(m=x.shape[0], k=x.shape[1], x=dtype_name(x, "x"), rule=rule, sf_layout=sf_layout)


def _swiglu_problem(x: Tensor, sf_layout: SfLayout, rule: Rule) -> SwigluQuantizeProblem:
    return SwigluQuantizeProblem(m=x.shape[0], k=x.shape[1] // 2, x=dtype_name(x, "x"), rule=rule, sf_layout=sf_layout)


def _quantize_nvfp4(x: Tensor, alpha: Tensor, sf_layout: SfLayout, rule: Rule) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    choice = dispatch.choose("quantize_nvfp4", _quantize_problem(x, sf_layout, rule), x.device)
    plain = lambda: reference.quantize_nvfp4(x, alpha=alpha, sf_layout=sf_layout, rule=rule)  # noqa: E731
    return _quantizing(choice, plain, m, k, alpha, sf_layout, (x, alpha), rule)


def _quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    choice = dispatch.choose("quantize_fp8", QuantizeFp8Problem(m=m, k=k, x=dtype_name(x, "x")), x.device)
    if choice.is_reference:
        t = reference.quantize_fp8(x)
        return t.data.view(torch.uint8).contiguous(), t.scale.contiguous()
    data = torch.empty(m, k, dtype=torch.float8_e4m3fn, device=x.device)
    out = FP8RowTensor(data, torch.empty(m, dtype=torch.float32, device=x.device))
    with _on(x.device):
        choice.module.launch(x, out, choice.config)
    return out.data.view(torch.uint8), out.scale


def _rmsnorm_quantize(
    x: Tensor, weight: Tensor, eps: float, alpha: Tensor, sf_layout: SfLayout, rule: Rule
) -> tuple[Tensor, Tensor]:
    m, k = x.shape
    choice = dispatch.choose("rmsnorm_quantize", _rmsnorm_problem(x, sf_layout, rule), x.device)
    weight = weight.contiguous()
    plain = lambda: reference.rmsnorm_quantize(x, weight, eps, alpha=alpha, sf_layout=sf_layout, rule=rule)  # noqa: E731
    return _quantizing(choice, plain, m, k, alpha, sf_layout, (x, weight, eps, alpha), rule)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    m, k = x.shape
    choice = dispatch.choose("rms_norm", RmsNormProblem(m=m, k=k, x=_any_dtype_name(x)), x.device)
    if choice.is_reference:
        return reference.rms_norm(x, weight, eps).contiguous()
    out = torch.empty(m, k, dtype=x.dtype, device=x.device)
    with _on(x.device):
        choice.module.launch(x, weight.contiguous(), eps, out, choice.config)
    return out


def _swiglu_quantize(x: Tensor, limit: float, alpha: Tensor, sf_layout: SfLayout, rule: Rule) -> tuple[Tensor, Tensor]:
    m, k = x.shape[0], x.shape[1] // 2
    choice = dispatch.choose("swiglu_quantize", _swiglu_problem(x, sf_layout, rule), x.device)
    plain = lambda: reference.swiglu_quantize(x, limit=limit, alpha=alpha, sf_layout=sf_layout, rule=rule)  # noqa: E731
    return _quantizing(choice, plain, m, k, alpha, sf_layout, (x, limit, alpha), rule)


def _embed(token_ids: Tensor, weight: Tensor, streams: int, dtype: torch.dtype) -> Tensor:
    vocab, k = weight.shape
    x, out_name = dtype_name(weight, "weight"), dtype_name(dtype, "out_dtype")
    problem = EmbedProblem(m=len(token_ids), vocab=vocab, k=k, n=streams, x=x, out=out_name)
    choice = dispatch.choose("embed", problem, weight.device)
    if choice.is_reference:
        return reference.embed(token_ids, weight, streams=streams, out_dtype=dtype)
    out = torch.empty(len(token_ids), streams, k, dtype=dtype, device=weight.device)
    with _on(weight.device):
        choice.module.launch(token_ids, weight, out, choice.config)
    return out


def _swiglu(x: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    m, k = x.shape[0], x.shape[1] // 2
    problem = SwigluProblem(m=m, k=k, x=dtype_name(x, "x"), out=dtype_name(dtype, "out_dtype"))
    choice = dispatch.choose("swiglu", problem, x.device)
    if choice.is_reference:
        return reference.swiglu(x, limit, dtype).contiguous()
    out = torch.empty(m, k, dtype=dtype, device=x.device)
    with _on(x.device):
        choice.module.launch(x, limit, out, choice.config)
    return out


def _dequant_nvfp4(data: Tensor, sf: Tensor, alpha: Tensor, sf_layout: str, dtype: torch.dtype) -> Tensor:
    t = as_nvfp4(data, sf, alpha, sf_layout)
    m, k = t.shape
    problem = DequantProblem(m=m, k=k, out=dtype_name(dtype, "dtype"), sf_layout=t.sf_layout)
    choice = dispatch.choose("dequant_nvfp4", problem, data.device)
    if choice.is_reference:
        return reference.dequant_nvfp4(t, dtype)
    out = torch.empty(m, k, dtype=dtype, device=data.device)
    with _on(data.device):
        choice.module.launch(t, out, choice.config)
    return out


def _gemm(a: Tensor | NVFP4Tensor, b: NVFP4Tensor, segments: list[int], dtype: torch.dtype) -> Tensor:
    runs = tuple(segments) if segments else None
    n, k = b.shape
    lead = a.shape[:-1]
    act: Any = "nvfp4" if isinstance(a, NVFP4Tensor) else dtype_name(a, "a")
    m = math.prod(lead)
    out_name = dtype_name(dtype, "out_dtype")
    problem = GemmProblem(m=m, n=n, k=k, act=act, out=out_name, segments=len(segments) or 1, order=b.order)
    choice = dispatch.choose("gemm_nvfp4", problem, b.device)
    if choice.is_reference:
        return _reference_gemm(a, b, runs, dtype)
    out = torch.empty(*lead, n, dtype=dtype, device=b.device)
    if m:
        module = choice.module
        if isinstance(a, NVFP4Tensor) and choice.problem != problem:
            a, b = decoded(a, b)
        b = b.with_sf_layout(module.SF_LAYOUT)
        a = a.with_sf_layout(module.SF_LAYOUT) if isinstance(a, NVFP4Tensor) else a.reshape(m, k).contiguous()
        with _on(b.device):
            module.launch(a, b, runs, out.view(m, n), choice.config)
    return out


def decoded(a: NVFP4Tensor, b: NVFP4Tensor) -> tuple[Tensor, NVFP4Tensor]:
    """What a W4A16 kernel takes for the product of a and b: codes times block scales of a in BF16, exactly, and b under
    the product of both alphas, rounded as the reference has it.
    """
    one = torch.ones_like(a.alpha)
    x = _dequant_nvfp4(a.data, a.sf.view(torch.uint8), one, a.sf_layout, torch.bfloat16)
    return x, replace(b, alpha=b.alpha * a.alpha)


def _reference_gemm(
    a: Tensor | NVFP4Tensor, b: NVFP4Tensor, segments: tuple[int, ...] | None, dtype: torch.dtype
) -> Tensor:
    def product(x: Tensor, sf: Tensor | None = None) -> Tensor:
        rows = NVFP4Tensor(x, sf, a.alpha) if sf is not None and isinstance(a, NVFP4Tensor) else x
        return reference.gemm_nvfp4(rows, b, segments=segments, out_dtype=dtype)

    if isinstance(a, NVFP4Tensor):
        return by_token.each(product, a.data, a.with_sf_layout("linear").sf).contiguous()
    return by_token.each(product, a.flatten(0, -2)).view(*a.shape[:-1], b.shape[0]).contiguous()


def _gemm_w4a16(
    a: Tensor,
    data: Tensor,
    sf: Tensor,
    alpha: Tensor,
    sf_layout: str,
    order: str,
    segments: list[int],
    dtype: torch.dtype,
) -> Tensor:
    return _gemm(a, as_nvfp4(data, sf, alpha, sf_layout, order), segments, dtype)


def _gemm_w4a8(
    a: Tensor, a_scale: Tensor, data: Tensor, sf: Tensor, alpha: Tensor, sf_layout: str, order: str, exponent: Tensor,
    segments: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x = FP8RowTensor(a.view(torch.float8_e4m3fn), a_scale)
    b = replace(as_nvfp4(data, sf, alpha, sf_layout, order), row_exponent=exponent)
    runs = tuple(segments) if segments else None
    (m, k), n = x.shape, b.shape[0]
    out_name = dtype_name(dtype, "out_dtype")
    problem = GemmProblem(m=m, n=n, k=k, act="fp8", out=out_name, segments=len(segments) or 1, order=b.order)
    choice = dispatch.choose("gemm_nvfp4", problem, a.device)
    if choice.is_reference:

        def product(rows: Tensor, scale: Tensor) -> Tensor:
            return reference.gemm_nvfp4(FP8RowTensor(rows, scale), b, segments=runs, out_dtype=dtype)

        return by_token.each(product, x.data, x.scale).contiguous()
    out = torch.empty(m, n, dtype=dtype, device=a.device)
    with _on(a.device):
        choice.module.launch(x, b, runs, out, choice.config)
    return out


def _gemm_w4a4(
    a: Tensor, a_sf: Tensor, a_alpha: Tensor, a_layout: str,
    data: Tensor, sf: Tensor, alpha: Tensor, sf_layout: str, order: str, segments: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return _gemm(as_nvfp4(a, a_sf, a_alpha, a_layout), as_nvfp4(data, sf, alpha, sf_layout, order), segments, dtype)


def _gemm_w4a4_quantize(
    a: Tensor, a_sf: Tensor, a_alpha: Tensor, a_layout: str,
    data: Tensor, sf: Tensor, alpha: Tensor, sf_layout: str, order: str, segments: list[int],
    out_alpha: Tensor, out_layout: SfLayout,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """In the GEMM's kernel where there is one that quantises, else from its FP32 output: the same bytes."""
    x, w = as_nvfp4(a, a_sf, a_alpha, a_layout), as_nvfp4(data, sf, alpha, sf_layout, order)
    (m, k), n = x.shape, w.shape[0]
    problem = GemmProblem(m=m, n=n, k=k, act="nvfp4", out="nvfp4", segments=len(segments) or 1, order=w.order)
    if not dispatch.is_supported(problem, a.device):
        return _quantize_nvfp4(_gemm(x, w, segments, torch.float32), out_alpha, out_layout, "absmax")
    choice = dispatch.choose("gemm_nvfp4", problem, a.device)
    runs = tuple(segments) if segments else None
    if choice.is_reference:
        whole = _reference_gemm(x, w, runs, torch.float32)
        out = reference.quantize_nvfp4(whole, alpha=out_alpha, sf_layout=out_layout)
    else:
        own = choice.module.SF_LAYOUT
        out = NVFP4Tensor.empty((m, n), out_alpha, own)
        with _on(a.device):
            choice.module.launch(x.with_sf_layout(own), w.with_sf_layout(own), runs, out, choice.config)
        out = out.with_sf_layout(out_layout)
    return out.data.contiguous(), out.sf.view(torch.uint8).contiguous()


def _grouped(
    a: Tensor, a_sf: Tensor | None, a_alpha: Tensor | None,
    data: Tensor, sf: Tensor, alpha: Tensor, sf_layout: str, order: str,
    offsets: Tensor, segments: list[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    b = as_nvfp4(data, sf, alpha, sf_layout, order)
    return reference.grouped_gemm_nvfp4(
        _whole(a, a_sf, a_alpha), b, offsets, segments=segments or None, out_dtype=dtype
    )


def _moe(
    x: Tensor, x_sf: Tensor | None, x_alpha: Tensor | None,
    data13: Tensor, sf13: Tensor, alpha13: Tensor, layout13: str, order13: str,
    data2: Tensor, sf2: Tensor, alpha2: Tensor, layout2: str, order2: str,
    topk_ids: Tensor, topk_weights: Tensor, limit: float,
) -> Tensor:  # fmt: skip
    w13, w2 = as_nvfp4(data13, sf13, alpha13, layout13, order13), as_nvfp4(data2, sf2, alpha2, layout2, order2)
    return reference.moe_nvfp4(_whole(x, x_sf, x_alpha), w13, w2, topk_ids, topk_weights, limit=limit)


def _kv_norm_rope_insert(
    kv: Tensor, weight: Tensor, positions: Tensor, table: Tensor, eps: float,
    data: Tensor, format: Any, page_size: int, head_dim: int, rope_dim: int, slots: Tensor,
) -> None:  # fmt: skip
    cache = PagedCache(data, format, page_size, head_dim, rope_dim)
    problem = KvNormRopeInsertProblem(
        m=len(kv), head_dim=head_dim, rope_dim=rope_dim, format=format, page_size=page_size, x=_any_dtype_name(kv)
    )
    choice = dispatch.choose("kv_norm_rope_insert", problem, kv.device)
    if choice.is_reference:
        reference.kv_norm_rope_insert(kv, weight, positions, table, eps, cache, slots)
        return
    operands = (_unit_stride(kv), weight.contiguous(), positions.contiguous(), table, eps, slots.contiguous())
    with _on(kv.device):
        choice.module.launch(*operands, cache, choice.config)


def _qkv_norm_rope_insert(
    q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, positions: Tensor, table: Tensor, eps: float,
    data: Tensor, format: Any, page_size: int, head_dim: int, rope_dim: int, slots: Tensor,
) -> Tensor:  # fmt: skip
    cache = PagedCache(data, format, page_size, head_dim, rope_dim)
    problem = QkvNormRopeInsertProblem(
        m=q.shape[0], k=q.shape[1], head_dim=head_dim, rope_dim=rope_dim, format=format, page_size=page_size,
        x=_any_dtype_name(q),
    )  # fmt: skip
    choice = dispatch.choose("qkv_norm_rope_insert", problem, q.device)
    if choice.is_reference:
        normed = reference.qkv_norm_rope_insert(q, q_weight, kv, kv_weight, positions, table, eps, cache, slots)
        return normed.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    rows = _unit_stride(q), q_weight.contiguous(), _unit_stride(kv), kv_weight.contiguous()
    with _on(q.device):
        choice.module.launch(*rows, positions.contiguous(), table, eps, slots.contiguous(), (out, cache), choice.config)
    return out


def _compress_kv(
    kv: Tensor, gate: Tensor, ape: Tensor, weight: Tensor, table: Tensor, eps: float, state: Tensor,
    data: Tensor, format: str, page_size: int, head_dim: int, rope_dim: int,
    positions: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor, state_slots: Tensor, slots: Tensor,
    ratio: int, hadamard: bool,
) -> None:  # fmt: skip
    cache = _cache(data, format, page_size, head_dim, rope_dim)
    problem = CompressKvProblem(
        m=len(kv), ratio=ratio, overlaps=kv.shape[1] // head_dim, head_dim=head_dim, rope_dim=table.shape[1],
        format=_row_format(cache), sequences=int(len(state_slots) != len(kv)),
        hadamard=int(hadamard), page_size=page_size, x=dtype_name(kv, "kv"), weight=dtype_name(weight, "weight"),
    )  # fmt: skip
    choice = dispatch.choose("compress_kv", problem, kv.device)
    if choice.is_reference:
        reference.compress_kv(
            kv, gate, ape, weight, table, eps, state, cache, positions=positions, sequence_ids=sequence_ids,
            cu_seqlens=cu_seqlens, state_slots=state_slots, slots=slots, ratio=ratio, hadamard=hadamard,
        )  # fmt: skip
        return
    integers = (t.contiguous() for t in (positions, sequence_ids, cu_seqlens, state_slots, slots))
    with _on(kv.device):
        choice.module.launch(
            _unit_stride(kv), _unit_stride(gate), ape.contiguous(), weight.contiguous(), table, eps, state,
            *integers, ratio, hadamard, cache, choice.config,
        )  # fmt: skip


def _compress_kv_pair(
    kv: Tensor, gate: Tensor, ape: Tensor, weight: Tensor, state: Tensor,
    data: Tensor, format: str, page_size: int, head_dim: int, rope_dim: int, hadamard: bool,
    key_kv: Tensor, key_gate: Tensor, key_ape: Tensor, key_weight: Tensor, key_state: Tensor,
    key_data: Tensor, key_format: str, key_page_size: int, key_dim: int, key_rope_dim: int, key_hadamard: bool,
    table: Tensor, eps: float, positions: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor, state_slots: Tensor,
    slots: Tensor, ratio: int,
) -> None:  # fmt: skip
    cache = _cache(data, format, page_size, head_dim, rope_dim)
    key_cache = _cache(key_data, key_format, key_page_size, key_dim, key_rope_dim)
    problem = CompressKvPairProblem(
        m=len(kv), ratio=ratio, overlaps=kv.shape[1] // head_dim, head_dim=head_dim, rope_dim=table.shape[1],
        format=_row_format(cache), key_dim=key_dim, key_format=_row_format(key_cache),
        sequences=int(len(state_slots) != len(kv)), hadamard=int(hadamard), key_hadamard=int(key_hadamard),
        page_size=page_size, x=dtype_name(kv, "kv"), weight=dtype_name(weight, "weight"),
    )  # fmt: skip
    entries = CompressorStep(
        _unit_stride(kv), _unit_stride(gate), ape.contiguous(), weight.contiguous(), state, cache, hadamard
    )
    keys = CompressorStep(
        _unit_stride(key_kv), _unit_stride(key_gate), key_ape.contiguous(), key_weight.contiguous(), key_state,
        key_cache, key_hadamard,
    )  # fmt: skip
    choice = dispatch.choose("compress_kv_pair", problem, kv.device)
    if choice.is_reference:
        reference.compress_kv_pair(
            entries, keys, table, eps, positions=positions, sequence_ids=sequence_ids, cu_seqlens=cu_seqlens,
            state_slots=state_slots, slots=slots, ratio=ratio,
        )  # fmt: skip
        return
    integers = (t.contiguous() for t in (positions, sequence_ids, cu_seqlens, state_slots, slots))
    with _on(kv.device):
        choice.module.launch(table, eps, *integers, ratio, (entries, keys), choice.config)


def _row_format(cache: PagedCache | IndexCache) -> str:
    """A cache's format as problems name it."""
    return cache.format if isinstance(cache, PagedCache) else f"index_{cache.format}"


def _index_logits(
    q: Tensor, weights: Tensor, data: Tensor, format: IndexFormat, page_size: int, head_dim: int,
    block_table: Tensor, positions: Tensor, sequence_ids: Tensor, ratio: int, scale: float,
) -> Tensor:  # fmt: skip
    (m, heads, _), (sequences, pages) = q.shape, block_table.shape
    problem = IndexLogitsProblem(
        m=m, entries=_bucket(pages * page_size), format=format, sequences=int(sequences != m), heads=heads,
        head_dim=head_dim, page_size=page_size, x="fp8" if q.dtype == torch.float8_e4m3fn else dtype_name(q, "q"),
    )  # fmt: skip
    choice = dispatch.choose("index_logits", problem, q.device)
    if choice.is_reference:
        args = (q, weights, data, format, page_size, head_dim, block_table, positions, sequence_ids, ratio, scale)
        if choice.invariant:
            return cast(Tensor, by_token.run("index_logits", _reference_index_logits, args))
        return _reference_index_logits(*args)
    out = torch.empty(m, pages * page_size, dtype=torch.float32, device=q.device)
    with _on(q.device):
        choice.module.launch(
            _unit_stride(q), _unit_stride(weights), IndexCache(data, format, page_size, head_dim),
            _unit_stride(block_table), positions.contiguous(), sequence_ids.contiguous(), ratio, scale, out,
            choice.config,
        )  # fmt: skip
    return out


def _reference_index_logits(
    q: Tensor, weights: Tensor, data: Tensor, format: IndexFormat, page_size: int, head_dim: int,
    block_table: Tensor, positions: Tensor, sequence_ids: Tensor, ratio: int, scale: float,
) -> Tensor:  # fmt: skip
    cache = IndexCache(data, format, page_size, head_dim)
    return reference.index_logits(
        q, weights, cache, block_table, positions=positions, sequence_ids=sequence_ids, ratio=ratio, scale=scale
    )


def _index_query(q: Tensor, positions: Tensor, table: Tensor, format: IndexFormat, hadamard: bool) -> Tensor:
    (m, heads, head_dim), kind = q.shape, dtype_name(q, "q")
    problem = IndexQueryProblem(
        m=m, format=format, hadamard=int(hadamard), heads=heads, head_dim=head_dim, rope_dim=table.shape[1], x=kind
    )
    choice = dispatch.choose("index_query", problem, q.device)
    if choice.is_reference:
        return reference.index_query(q, positions, table, format=format, hadamard=hadamard).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with _on(q.device):
        choice.module.launch(
            _unit_stride(q), positions.contiguous(), table.contiguous(), format, hadamard, out, None, choice.config
        )
    return out


def _index_query_fp8(
    q: Tensor, weights: Tensor, positions: Tensor, table: Tensor, hadamard: bool
) -> tuple[Tensor, Tensor]:
    (m, heads, head_dim), kind = q.shape, dtype_name(q, "q")
    problem = IndexQueryProblem(
        m=m, format="fp8", hadamard=int(hadamard), heads=heads, head_dim=head_dim, rope_dim=table.shape[1], x=kind,
        codes=1,
    )  # fmt: skip
    choice = dispatch.choose("index_query", problem, q.device)
    if choice.is_reference:
        codes, scaled = reference.index_query_fp8(q, weights, positions, table, hadamard=hadamard)
        return codes.view(torch.uint8), scaled
    out, scaled = _fake_index_query_fp8(q, weights)
    with _on(q.device):
        choice.module.launch(
            _unit_stride(q), positions.contiguous(), table.contiguous(), "fp8", hadamard, out,
            (_unit_stride(weights), scaled), choice.config,
        )  # fmt: skip
    return out, scaled


def _index_topk(
    logits: Tensor, block_table: Tensor, positions: Tensor, sequence_ids: Tensor, ratio: int, topk: int, page_size: int
) -> Tensor:
    m, entries = logits.shape
    problem = IndexTopkProblem(m=m, entries=_bucket(entries), topk=topk, page_size=page_size)
    choice = dispatch.choose("index_topk", problem, logits.device)
    if choice.is_reference:
        return reference.index_topk(
            logits, block_table, positions=positions, sequence_ids=sequence_ids, ratio=ratio, topk=topk,
            page_size=page_size,
        ).contiguous()  # fmt: skip
    out = torch.empty(m, min(topk, entries), dtype=torch.int32, device=logits.device)
    rows, table = _unit_stride(logits), _unit_stride(block_table)
    with _on(logits.device):
        choice.module.launch(
            rows, table, positions.contiguous(), sequence_ids.contiguous(), ratio, page_size, out, choice.config
        )
    return out


def _hyper_connection_pre(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor | None, norm_eps: float, eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    problem = HyperConnectionPreProblem(m=h.shape[0], k=h.shape[2], n=h.shape[1], x=dtype_name(h, "h"))
    choice = dispatch.choose("hyper_connection_pre", problem, h.device)
    if choice.is_reference:

        def plain(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
            y, post, comb = reference.hyper_connection_pre(*args, norm_eps=norm_eps, eps=eps, iterations=iterations)
            return y.contiguous(), post.contiguous(), comb.contiguous()

        return _reference(choice, plain, (h, fn, base, scale, weight))
    out = _fake_pre(h, fn, base, scale, weight, norm_eps, eps, iterations)
    numbers = (norm_eps, eps, iterations)
    with _on(h.device):
        operands = (_unit_stride(h), *_product_operands(fn, base, scale), _dense(weight))
        choice.module.launch(*operands, *numbers, out, choice.config)
    return out


def _hyper_connection_post(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    problem = HyperConnectionPostProblem(m=h.shape[0], k=h.shape[2], n=h.shape[1], x=dtype_name(h, "h"))
    choice = dispatch.choose("hyper_connection_post", problem, h.device)
    if choice.is_reference:
        return reference.hyper_connection_post(y, h, post, comb).contiguous()
    out = h.new_empty(h.shape)
    with _on(h.device):
        choice.module.launch(_unit_stride(y), _unit_stride(h), *_fp32(post, comb), out, choice.config)
    return out


def _hyper_connection_head(
    h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor | None, norm_eps: float, eps: float
) -> Tensor:
    problem = HyperConnectionHeadProblem(m=h.shape[0], k=h.shape[2], n=h.shape[1], x=dtype_name(h, "h"))
    choice = dispatch.choose("hyper_connection_head", problem, h.device)
    if choice.is_reference:

        def plain(*args: Any) -> Tensor:
            return reference.hyper_connection_head(*args, norm_eps=norm_eps, eps=eps).contiguous()

        return _reference(choice, plain, (h, fn, base, scale, weight))
    out = h.new_empty(h.shape[0], h.shape[2])
    with _on(h.device):
        operands = (_unit_stride(h), *_product_operands(fn, base, scale), _dense(weight))
        choice.module.launch(*operands, norm_eps, eps, out, choice.config)
    return out


def _hyper_connection_post_pre(
    y: Tensor, h: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor | None,
    norm_eps: float, eps: float, iterations: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    problem = HyperConnectionPostPreProblem(m=h.shape[0], k=h.shape[2], n=h.shape[1], x=dtype_name(h, "h"))
    choice = dispatch.choose("hyper_connection_post_pre", problem, h.device)
    if choice.is_reference:

        def plain(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            found = reference.hyper_connection_post_pre(*args, norm_eps=norm_eps, eps=eps, iterations=iterations)
            streams, x, post, comb = (t.contiguous() for t in found)
            return streams, x, post, comb

        return _reference(choice, plain, (y, h, post, comb, fn, base, scale, weight))
    out = _fake_post_pre(y, h, post, comb, fn, base, scale, weight, norm_eps, eps, iterations)
    with _on(h.device):
        site = _unit_stride(y), _unit_stride(h), *_fp32(post, comb)
        operands = *site, *_product_operands(fn, base, scale), _dense(weight)
        choice.module.launch(*operands, norm_eps, eps, iterations, out, choice.config)
    return out


def _fp32(*tensors: Tensor) -> list[Tensor]:
    """Coefficients as kernels read them: FP32, contiguous. They are so already where a model keeps them."""
    return [t.float().contiguous() for t in tensors]


def _product_operands(fn: Tensor, base: Tensor, scale: Tensor) -> list[Tensor]:
    """As `_fp32`, and fn aligned to 16 bytes.

    Kernels read fn before they wait for the launch before. Where it has to be copied, another comes between.
    """
    read = fn.float().contiguous()
    if read.data_ptr() % 16:
        read = read.clone()
    return [read, *_fp32(base if read is fn else base.clone(), scale)]


def _dense(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


def _reference(choice: dispatch.Choice, impl: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The reference of an op that has a kernel; token by token in batch-invariant mode."""
    return by_token.run(choice.op, impl, args) if choice.invariant else impl(*args)


def _bucket(entries: int) -> int:
    """The power of two at or above, so that what was tuned for it serves a context that grows."""
    return 1 << max(0, entries - 1).bit_length()


def _unit_stride(x: Tensor) -> Tensor:
    """x [..., n], copied if its last axis is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sparse_attention(
    q: Tensor,
    data: list[Tensor],
    formats: list[str],
    geometry: list[int],
    indices: list[Tensor],
    sink: Tensor,
    scale: float,
) -> Tensor:
    caches = [_cache(d, f, *geometry[3 * i : 3 * i + 3]) for i, (d, f) in enumerate(zip(data, formats, strict=True))]
    return reference.sparse_attention(q, caches, indices, sink, scale)


def _qnorm_rope(q: Tensor, positions: Tensor, table: Tensor, eps: float) -> Tensor:
    problem = QnormRopeProblem(**_heads_of(q, table))
    choice = dispatch.choose("qnorm_rope", problem, q.device)
    if choice.is_reference:
        return reference.qnorm_rope(q, positions, table, eps).contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    with _on(q.device):
        choice.module.launch(_unit_stride(q), positions.contiguous(), table, eps, out, choice.config)
    return out


def _qnorm_rope_quantize(q: Tensor, positions: Tensor, table: Tensor, eps: float) -> Tensor:
    problem = QnormRopeQuantizeProblem(**_heads_of(q, table))
    choice = dispatch.choose("qnorm_rope_quantize", problem, q.device)
    if choice.is_reference:
        return reference.qnorm_rope_quantize(q, positions, table, eps)
    out = _fake_qnorm_rope_quantize(q, positions, table)
    with _on(q.device):
        choice.module.launch(_unit_stride(q), positions.contiguous(), table, eps, out, choice.config)
    return out


def _csa_queries(
    q: Tensor, index_q: Tensor, positions: Tensor, table: Tensor, eps: float, format: IndexFormat, hadamard: bool
) -> tuple[Tensor, Tensor]:
    choice = _choose_csa_queries(q, index_q, table, format, hadamard, codes=False)
    if choice.is_reference:
        first, second = reference.csa_queries(q, index_q, positions, table, eps, format=format, hadamard=hadamard)
        return first.contiguous(), second.contiguous()
    out = _fake_csa_queries(q, index_q)
    with _on(q.device):
        choice.module.launch(
            _unit_stride(q), _unit_stride(index_q), positions.contiguous(), table, eps, format, hadamard, out, None,
            choice.config,
        )  # fmt: skip
    return out


def _csa_queries_fp8(
    q: Tensor, index_q: Tensor, weights: Tensor, positions: Tensor, table: Tensor, eps: float, hadamard: bool
) -> tuple[Tensor, Tensor, Tensor]:
    choice = _choose_csa_queries(q, index_q, table, "fp8", hadamard, codes=True)
    if choice.is_reference:
        first, codes, scaled = reference.csa_queries_fp8(q, index_q, weights, positions, table, eps, hadamard=hadamard)
        return first.contiguous(), codes.view(torch.uint8), scaled
    first, codes, scaled = _fake_csa_queries_fp8(q, index_q, weights)
    with _on(q.device):
        choice.module.launch(
            _unit_stride(q), _unit_stride(index_q), positions.contiguous(), table, eps, "fp8", hadamard,
            (first, codes), (_unit_stride(weights), scaled), choice.config,
        )  # fmt: skip
    return first, codes, scaled


def _choose_csa_queries(
    q: Tensor, index_q: Tensor, table: Tensor, format: IndexFormat, hadamard: bool, *, codes: bool
) -> dispatch.Choice:
    problem = CsaQueriesProblem(
        m=q.shape[0], heads=q.shape[1], format=format, hadamard=int(hadamard), head_dim=q.shape[2],
        index_heads=index_q.shape[1], index_dim=index_q.shape[2], rope_dim=table.shape[1], x=_any_dtype_name(q),
        codes=int(codes),
    )  # fmt: skip
    return dispatch.choose("csa_queries", problem, q.device)


def _rope_inverse(o: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    problem = RopeInverseProblem(**_heads_of(o, table))
    choice = dispatch.choose("rope_inverse", problem, o.device)
    if choice.is_reference:
        return reference.rope_inverse(o, positions, table).contiguous()
    out = torch.empty(o.shape, dtype=o.dtype, device=o.device)
    with _on(o.device):
        choice.module.launch(_unit_stride(o), positions.contiguous(), table, out, choice.config)
    return out


def _rope_inverse_in_place(o: Tensor, positions: Tensor, table: Tensor) -> None:
    problem = RopeInverseInPlaceProblem(**_heads_of(o, table))
    choice = dispatch.choose("rope_inverse_", problem, o.device)
    if choice.is_reference:
        reference.rope_inverse_(o, positions, table)
        return
    with _on(o.device):
        choice.module.launch(positions.contiguous(), table, o, choice.config)


def _rope_inverse_alpha(o: Tensor, positions: Tensor, table: Tensor, groups: int) -> Tensor:
    _refuse_alpha_of_all_rows()
    problem = RopeInverseQuantizeProblem(**_heads_of(o, table), groups=groups)
    choice = dispatch.choose("rope_inverse_quantize", problem, o.device)
    operands = (_unit_stride(o), positions.contiguous(), table)
    return _alpha(choice, lambda: global_scale(reference.rope_inverse(*operands).flatten(1)), o.device, *operands)


def _rope_inverse_quantize(
    o: Tensor, positions: Tensor, table: Tensor, groups: int, alpha: Tensor, sf_layout: SfLayout, rule: Rule
) -> tuple[Tensor, Tensor]:
    problem = RopeInverseQuantizeProblem(**_heads_of(o, table), groups=groups, rule=rule, sf_layout=sf_layout)
    choice = dispatch.choose("rope_inverse_quantize", problem, o.device)
    if choice.is_reference:
        t = reference.rope_inverse_quantize(
            o, positions, table, groups=groups, alpha=alpha, sf_layout=sf_layout, rule=rule
        )
        return t.data.contiguous(), t.sf.view(torch.uint8).contiguous()
    out = NVFP4Tensor.empty((groups, problem.m, problem.k), alpha, sf_layout)
    operands = (_unit_stride(o), positions.contiguous(), table, groups, alpha, out, rule)
    with _on(o.device):
        choice.module.launch(*operands, choice.config)
    return out.data, out.sf.view(torch.uint8)


def _route(
    logits: Tensor, topk: int, scale: float, bias: Tensor | None, token_ids: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    m, experts = logits.shape
    how: RouteChoice = "table" if table is not None else "bias" if bias is not None else "score"
    problem = RouteProblem(m=m, experts=experts, topk=topk, choice=how, x=_any_dtype_name(logits))
    choice = dispatch.choose("route", problem, logits.device)
    if choice.is_reference:
        return reference.route(logits, topk=topk, scale=scale, bias=bias, token_ids=token_ids, table=table)
    ids = torch.empty(m, topk, dtype=torch.int32, device=logits.device)
    weights = torch.empty(m, topk, dtype=torch.float32, device=logits.device)
    added = bias.float().contiguous() if bias is not None else None
    tokens = token_ids.contiguous() if token_ids is not None else None
    rows = table.contiguous() if table is not None else None
    with _on(logits.device):
        choice.module.launch(_unit_stride(logits), added, tokens, rows, scale, (ids, weights), choice.config)
    return ids, weights


def _permute(topk_ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    m, topk = topk_ids.shape
    choice = dispatch.choose("permute", PermuteProblem(m=m, topk=topk, experts=experts), topk_ids.device)
    if choice.is_reference:
        return reference.permute(topk_ids, experts)
    order = torch.empty(m * topk, dtype=torch.int32, device=topk_ids.device)
    offsets = torch.empty(experts + 1, dtype=torch.int32, device=topk_ids.device)
    with _on(topk_ids.device):
        choice.module.launch(topk_ids.contiguous(), experts, (order, offsets), choice.config)
    return order, offsets


def _combine(y: Tensor, order: Tensor, topk_ids: Tensor, topk_weights: Tensor, shared: Tensor | None) -> Tensor:
    (m, topk), k = topk_ids.shape, y.shape[1]
    problem = CombineProblem(m=m, topk=topk, k=k, shared=int(shared is not None), x=_any_dtype_name(y))
    choice = dispatch.choose("combine", problem, y.device)
    if choice.is_reference:
        return reference.combine(y, order, topk_ids, topk_weights, shared=shared).contiguous()
    out = torch.empty(m, k, dtype=y.dtype, device=y.device)
    slots = order.contiguous(), topk_ids.contiguous(), topk_weights.contiguous()
    added = _unit_stride(shared) if shared is not None else None
    with _on(y.device):
        choice.module.launch(_unit_stride(y), *slots, added, out, choice.config)
    return out


def _sample(logits: Tensor, temperature: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    m, vocab = logits.shape
    problem = SampleProblem(m=m, vocab=vocab, x=_any_dtype_name(logits))
    choice = dispatch.choose("sample", problem, logits.device)
    if choice.is_reference:
        return reference.sample(logits, temperature, top_p, uniform)
    out = torch.empty(m, dtype=torch.int64, device=logits.device)
    asked = temperature.contiguous(), top_p.contiguous(), uniform.contiguous()
    with _on(logits.device):
        choice.module.launch(_unit_stride(logits), *asked, out, choice.config)
    return out


def _heads_of(x: Tensor, table: Tensor) -> dict[str, Any]:
    """Dimensions of the problems that turn x [m, heads, head_dim]."""
    m, heads, head_dim = x.shape
    return {"m": m, "heads": heads, "head_dim": head_dim, "rope_dim": table.shape[1], "x": _any_dtype_name(x)}


def _any_dtype_name(x: Tensor) -> str:
    """As `dtype_name`, with FP64, which the reference takes."""
    return "fp64" if x.dtype == torch.float64 else dtype_name(x, "the input")


def _without_kernel(op: str, impl: Callable[..., Any]) -> Callable[..., Any]:
    """An implementation that is the reference wherever it runs: on a GPU it must have been asked for.

    In batch-invariant mode it runs token by token.
    """

    def run(*args: Any) -> Any:
        first = next(a for a in args if isinstance(a, Tensor))
        choice = dispatch.choose(op, None, first.device)
        if not choice.is_reference:
            raise AssertionError(f"{op} has a kernel in the registry but no launch here")
        out = by_token.run(op, impl, args) if choice.invariant else impl(*args)
        return out.contiguous() if isinstance(out, Tensor) else out

    return run


def _packed(m: int, k: int, x: Tensor, sf_layout: str) -> tuple[Tensor, Tensor]:
    """Empty data and scales of an [m, k] NVFP4 matrix beside x."""
    ks = k // BLOCK
    sf = (m, ks) if sf_layout == "linear" else (layouts.blocked_128x4_bytes(m, ks),)
    return x.new_empty((m, k // 2), dtype=torch.uint8), x.new_empty(sf, dtype=torch.uint8)


def _same(x: Tensor, *_: Any) -> Tensor:
    """Fake of an operator whose result is like its first argument, contiguous."""
    return x.new_empty(x.shape)


def _nothing(*_: Any) -> None:
    """Fake of an operator that only changes its arguments."""


def _fp32_scalar(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((), dtype=torch.float32)


def _fake_alpha(x: Tensor, segments: list[int]) -> Tensor:
    lead = x.shape[:-2]
    return x.new_empty((*lead, len(segments)) if segments else lead, dtype=torch.float32)


def _fake_route(
    logits: Tensor, topk: int, scale: float, bias: Tensor | None, token_ids: Tensor | None, table: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], topk)
    weights = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty(shape, dtype=torch.int32), logits.new_empty(shape, dtype=weights)


def _fake_permute(ids: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return ids.new_empty(ids.numel(), dtype=torch.int32), ids.new_empty(experts + 1, dtype=torch.int32)


def _fake_pre(
    h: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor | None,
    norm_eps: float,
    eps: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, n, d = h.shape
    post, comb = h.new_empty(tokens, n, dtype=torch.float32), h.new_empty(tokens, n, n, dtype=torch.float32)
    return h.new_empty(tokens, d), post, comb


def _fake_post_pre(
    y: Tensor, h: Tensor, post: Tensor, comb: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return h.new_empty(h.shape), *_fake_pre(h, *rest)


def _fake_index_query_fp8(q: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=torch.uint8), weights.new_empty(weights.shape, dtype=torch.float32)


def _fake_csa_queries(q: Tensor, index_q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), index_q.new_empty(index_q.shape)


def _fake_csa_queries_fp8(q: Tensor, index_q: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), *_fake_index_query_fp8(index_q, weights)


def _fake_index_logits(
    q: Tensor, weights: Tensor, data: Tensor, format: str, page_size: int, head_dim: int, block_table: Tensor, *_: Any
) -> Tensor:
    return q.new_empty((q.shape[0], block_table.shape[1] * page_size), dtype=torch.float32)


def _fake_index_topk(
    logits: Tensor, block_table: Tensor, positions: Tensor, sequence_ids: Tensor, ratio: int, topk: int, page_size: int
) -> Tensor:
    return logits.new_empty((logits.shape[0], min(topk, logits.shape[1])), dtype=torch.int32)


def _fake_qnorm_rope_quantize(q: Tensor, positions: Tensor, table: Tensor, *_: Any) -> Tensor:
    row_bytes = kv_layout("nvfp4", 1, q.shape[2], table.shape[1]).row_bytes
    return q.new_empty(q.shape[0], q.shape[1], row_bytes, dtype=torch.uint8)


def _fake_rope_inverse_quantize(
    o: Tensor, positions: Tensor, table: Tensor, groups: int, alpha: Tensor, sf_layout: str, rule: str
) -> tuple[Tensor, Tensor]:
    tokens, k = o.shape[0], o.shape[1] * o.shape[2] // groups
    data, sf = _packed(tokens, k, o, sf_layout)
    return data.new_empty(groups, *data.shape), sf.new_empty(groups, *sf.shape)


_SF = "str sf_layout, str rule"
_CACHE = "Tensor(a!) data, str format, int page_size, int head_dim, int rope_dim"
_B = "Tensor b, Tensor b_sf, Tensor b_alpha, str b_layout, str b_order"
_A = "Tensor a, Tensor? a_sf, Tensor? a_alpha"
_FOLD = "Tensor fn, Tensor base, Tensor scale, Tensor? weight, float norm_eps, float eps"

_register(
    f"quantize_nvfp4(Tensor x, Tensor alpha, {_SF}) -> (Tensor, Tensor)",
    _quantize_nvfp4,
    lambda x, alpha, sf_layout, rule: _packed(x.shape[0], x.shape[1], x, sf_layout),
)
_register(
    f"rmsnorm_quantize(Tensor x, Tensor weight, float eps, Tensor alpha, {_SF}) -> (Tensor, Tensor)",
    _rmsnorm_quantize,
    lambda x, weight, eps, alpha, sf_layout, rule: _packed(x.shape[0], x.shape[1], x, sf_layout),
)
_register("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _rms_norm, _same)
_register(
    f"swiglu_quantize(Tensor x, float limit, Tensor alpha, {_SF}) -> (Tensor, Tensor)",
    _swiglu_quantize,
    lambda x, limit, alpha, sf_layout, rule: _packed(x.shape[0], x.shape[1] // 2, x, sf_layout),
)
_register(
    "embed(Tensor token_ids, Tensor weight, int streams, ScalarType dtype) -> Tensor",
    _embed,
    lambda ids, weight, streams, dtype: weight.new_empty((ids.shape[0], streams, weight.shape[1]), dtype=dtype),
)
_register(
    "swiglu(Tensor x, float limit, ScalarType dtype) -> Tensor",
    _swiglu,
    lambda x, limit, dtype: x.new_empty((x.shape[0], x.shape[1] // 2), dtype=dtype),
)
_register(
    "dequant_nvfp4(Tensor data, Tensor sf, Tensor alpha, str sf_layout, ScalarType dtype) -> Tensor",
    _dequant_nvfp4,
    lambda data, sf, alpha, sf_layout, dtype: data.new_empty((data.shape[0], data.shape[1] * 2), dtype=dtype),
)
_register(
    "quantize_fp8(Tensor x) -> (Tensor, Tensor)",
    _quantize_fp8,
    lambda x: (x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(x.shape[0], dtype=torch.float32)),
)
_register("nvfp4_alpha(Tensor x, int[] segments) -> Tensor", _nvfp4_alpha, _fake_alpha)
_register("rmsnorm_alpha(Tensor x, Tensor weight, float eps) -> Tensor", _rmsnorm_alpha, _fp32_scalar)
_register("swiglu_alpha(Tensor x, float limit) -> Tensor", _swiglu_alpha, _fp32_scalar)
_register(
    f"gemm_w4a16(Tensor a, {_B}, int[] segments, ScalarType dtype) -> Tensor",
    _gemm_w4a16,
    lambda a, b, b_sf, b_alpha, b_layout, b_order, segments, dtype: a.new_empty(
        (*a.shape[:-1], b.shape[0]), dtype=dtype
    ),
)
_register(
    f"gemm_w4a8(Tensor a, Tensor a_scale, {_B}, Tensor b_exponent, int[] segments, ScalarType dtype) -> Tensor",
    _gemm_w4a8,
    lambda a, a_scale, b, b_sf, b_alpha, b_layout, b_order, b_exponent, segments, dtype: a.new_empty(
        (a.shape[0], b.shape[0]), dtype=dtype
    ),
)
_register(
    f"gemm_w4a4(Tensor a, Tensor a_sf, Tensor a_alpha, str a_layout, {_B}, int[] segments, ScalarType dtype) -> Tensor",
    _gemm_w4a4,
    lambda a, a_sf, a_alpha, a_layout, b, b_sf, b_alpha, b_layout, b_order, segments, dtype: a.new_empty(
        (a.shape[0], b.shape[0]), dtype=dtype
    ),
)
_register(
    f"gemm_w4a4_quantize(Tensor a, Tensor a_sf, Tensor a_alpha, str a_layout, {_B}, int[] segments, Tensor alpha, "
    "str sf_layout) -> (Tensor, Tensor)",
    _gemm_w4a4_quantize,
    lambda a, a_sf, a_alpha, a_layout, b, b_sf, b_alpha, b_layout, b_order, segments, alpha, sf_layout: _packed(
        a.shape[0], b.shape[0], a, sf_layout
    ),
)
_register(
    "compress_kv(Tensor kv, Tensor gate, Tensor ape, Tensor weight, Tensor table, float eps, Tensor(b!) state, "
    f"{_CACHE}, Tensor positions, Tensor sequence_ids, Tensor cu_seqlens, Tensor state_slots, Tensor slots, "
    "int ratio, bool hadamard) -> ()",
    _compress_kv,
    _nothing,
)
_register(
    "compress_kv_pair(Tensor kv, Tensor gate, Tensor ape, Tensor weight, Tensor(b!) state, "
    f"{_CACHE}, bool hadamard, Tensor key_kv, Tensor key_gate, Tensor key_ape, Tensor key_weight, "
    "Tensor(c!) key_state, Tensor(d!) key_data, str key_format, int key_page_size, int key_dim, int key_rope_dim, "
    "bool key_hadamard, Tensor table, float eps, Tensor positions, Tensor sequence_ids, Tensor cu_seqlens, "
    "Tensor state_slots, Tensor slots, int ratio) -> ()",
    _compress_kv_pair,
    _nothing,
)
_register(
    "index_logits(Tensor q, Tensor weights, Tensor data, str format, int page_size, int head_dim, "
    "Tensor block_table, Tensor positions, Tensor sequence_ids, int ratio, float scale) -> Tensor",
    _index_logits,
    _fake_index_logits,
)
_register(
    "index_query(Tensor q, Tensor positions, Tensor table, str format, bool hadamard) -> Tensor", _index_query, _same
)
_register(
    "index_query_fp8(Tensor q, Tensor weights, Tensor positions, Tensor table, bool hadamard) -> (Tensor, Tensor)",
    _index_query_fp8,
    _fake_index_query_fp8,
)
_register(
    "index_topk(Tensor logits, Tensor block_table, Tensor positions, Tensor sequence_ids, int ratio, int topk, "
    "int page_size) -> Tensor",
    _index_topk,
    _fake_index_topk,
)
_register(
    f"hyper_connection_pre(Tensor h, {_FOLD}, int iterations) -> (Tensor, Tensor, Tensor)",
    _hyper_connection_pre,
    _fake_pre,
)
_register(
    "hyper_connection_post(Tensor y, Tensor h, Tensor post, Tensor comb) -> Tensor",
    _hyper_connection_post,
    lambda y, h, post, comb: h.new_empty(h.shape),
)
_register(
    f"hyper_connection_head(Tensor h, {_FOLD}) -> Tensor",
    _hyper_connection_head,
    lambda h, *_: h.new_empty(h.shape[0], h.shape[2]),
)
_register(
    f"hyper_connection_post_pre(Tensor y, Tensor h, Tensor post, Tensor comb, {_FOLD}, int iterations) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _hyper_connection_post_pre,
    _fake_post_pre,
)
_register("qnorm_rope(Tensor q, Tensor positions, Tensor table, float eps) -> Tensor", _qnorm_rope, _same)
_register(
    "qnorm_rope_quantize(Tensor q, Tensor positions, Tensor table, float eps) -> Tensor",
    _qnorm_rope_quantize,
    _fake_qnorm_rope_quantize,
)
_register(
    "csa_queries(Tensor q, Tensor index_q, Tensor positions, Tensor table, float eps, str format, bool hadamard) "
    "-> (Tensor, Tensor)",
    _csa_queries,
    _fake_csa_queries,
)
_register(
    "csa_queries_fp8(Tensor q, Tensor index_q, Tensor weights, Tensor positions, Tensor table, float eps, "
    "bool hadamard) -> (Tensor, Tensor, Tensor)",
    _csa_queries_fp8,
    _fake_csa_queries_fp8,
)
_register(
    f"kv_norm_rope_insert(Tensor kv, Tensor weight, Tensor positions, Tensor table, float eps, {_CACHE}, "
    "Tensor slots) -> ()",
    _kv_norm_rope_insert,
    _nothing,
)
_register(
    "qkv_norm_rope_insert(Tensor q, Tensor q_weight, Tensor kv, Tensor kv_weight, Tensor positions, Tensor table, "
    f"float eps, {_CACHE}, Tensor slots) -> Tensor",
    _qkv_norm_rope_insert,
    _same,
)
_register("rope_inverse(Tensor o, Tensor positions, Tensor table) -> Tensor", _rope_inverse, _same)
_register("rope_inverse_(Tensor(a!) o, Tensor positions, Tensor table) -> ()", _rope_inverse_in_place, _nothing)
_register(
    "rope_inverse_alpha(Tensor o, Tensor positions, Tensor table, int groups) -> Tensor",
    _rope_inverse_alpha,
    _fp32_scalar,
)
_register(
    f"rope_inverse_quantize(Tensor o, Tensor positions, Tensor table, int groups, Tensor alpha, {_SF}) "
    "-> (Tensor, Tensor)",
    _rope_inverse_quantize,
    _fake_rope_inverse_quantize,
)
_register(
    "route(Tensor logits, int topk, float scale, Tensor? bias, Tensor? token_ids, Tensor? table) -> (Tensor, Tensor)",
    _route,
    _fake_route,
)
_register("permute(Tensor topk_ids, int experts) -> (Tensor, Tensor)", _permute, _fake_permute)
_register(
    "combine(Tensor y, Tensor order, Tensor topk_ids, Tensor topk_weights, Tensor? shared) -> Tensor",
    _combine,
    lambda y, order, ids, weights, shared: y.new_empty(ids.shape[0], y.shape[1]),
)
_register(
    "sample(Tensor logits, Tensor temperature, Tensor top_p, Tensor uniform) -> Tensor",
    _sample,
    lambda logits, *_: logits.new_empty(logits.shape[0], dtype=torch.int64),
)
for _schema, _impl, _fake in (
    (
        f"grouped_gemm_nvfp4({_A}, {_B}, Tensor offsets, int[] segments, ScalarType dtype) -> Tensor",
        _grouped,
        lambda a, a_sf, a_alpha, b, b_sf, b_alpha, b_layout, b_order, offsets, segments, dtype: a.new_empty(
            (a.shape[0], b.shape[1]), dtype=dtype
        ),
    ),
    (
        "moe_nvfp4(Tensor x, Tensor? x_sf, Tensor? x_alpha, Tensor w13, Tensor w13_sf, Tensor w13_alpha, "
        "str w13_layout, str w13_order, Tensor w2, Tensor w2_sf, Tensor w2_alpha, str w2_layout, str w2_order, "
        "Tensor topk_ids, Tensor topk_weights, float limit) -> Tensor",
        _moe,
        lambda x, x_sf, x_alpha, w13, *rest: x.new_empty(
            (x.shape[0], rest[4].shape[1]), dtype=x.dtype if x_sf is None else torch.bfloat16
        ),
    ),
    (
        "sparse_attention(Tensor q, Tensor[] data, str[] formats, int[] geometry, Tensor[] indices, Tensor sink, "
        "float scale) -> Tensor",
        _sparse_attention,
        _same,
    ),
):
    _register(_schema, _without_kernel(_schema.partition("(")[0], _impl), _fake)
