"""Rows of paged caches: numbers to bytes and back, laid out as `formats.kv_layout` and `index_layout` say.

A row is rounded to BF16 first (not in the fp32 format), once, after norm and RoPE, and then:

    fp8_ds_mla   per 64 dims: e = ceil(log2(max(amax, 1e-4) / 448)), stored E4M3(x / 2^e) and the byte e + 127
    nvfp4        alpha = amax / 2688 of the row, scales and codes by the activation rule of `quant`
    fp8 (index)  one FP32 scale 2^e a row, e as above
    mxfp4 (index) per 32 dims: e = ceil(log2(max(amax, 6 · 2^-126) / 6)), stored E2M1(x / 2^e) and the byte e + 127

RoPE dims of KV rows stay BF16. fp8_ds_mla and the index formats are those of vLLM 0.33 and SGLang 0.5.23.

Nothing that is not finite is hidden: where amax is infinite or NaN, e is what FP32's largest number has, so that in
fp8 formats an infinity is decoded as one and a NaN (0x7F) too, while finite numbers beside it lose most of their bits;
an nvfp4 row has an alpha that is infinite or NaN; mxfp4, whose codes have no NaN, stores 6 for it, which comes out
infinite.
"""

import torch
from torch import Tensor

from ..formats import BLOCK, E4M3_MAX, MX_BLOCK, IndexCache, PagedCache, kv_layout
from . import e2m1
from .e8m0 import ceil_log2, pow2
from .norm import rms_norm, rms_norm_wide
from .rope import rotate

FP8_GROUP = 64  # dims under one scale of fp8_ds_mla
FP8_FLOOR = 1e-4  # the smallest amax that gets a scale of its own
MX_FLOOR = 6 * 2.0**-126


def kv_norm_rope_insert(
    kv: Tensor, weight: Tensor, positions: Tensor, table: Tensor, eps: float, cache: PagedCache, slots: Tensor
) -> None:
    """RMSNorm, RoPE and quantise rows kv [tokens, head_dim], then store row t at slots[t]; changes cache.data.

    weight: [head_dim]; positions: int32 [tokens]; table: FP32 [positions, rope_dim]; slots: int32 [tokens], -1 stores
    nothing. Slots that are stored to differ from each other.
    """
    write_rows(cache, slots, rotate(rms_norm_wide(kv, weight, eps), positions, table))


def qkv_norm_rope_insert(
    q: Tensor, q_weight: Tensor, kv: Tensor, kv_weight: Tensor, positions: Tensor, table: Tensor, eps: float,
    cache: PagedCache, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`rms_norm` of rows q [tokens, k] with q_weight [k]; rows kv go the way of `kv_norm_rope_insert`."""
    kv_norm_rope_insert(kv, kv_weight, positions, table, eps, cache, slots)
    return rms_norm(q, q_weight, eps)


def qnorm_rope_quantize(q: Tensor, positions: Tensor, table: Tensor, eps: float) -> Tensor:
    """`qnorm_rope` of q [tokens, heads, head_dim], each head encoded as a row of an `nvfp4` cache.

    Gives uint8 [tokens, heads, row bytes], 384 of 512 dims with 64 of RoPE: rounded to BF16 once, after the rotation,
    whatever q's dtype; then codes, block scales and the head's own alpha of the dims beside RoPE, and RoPE's in BF16.
    """
    tokens, heads, head_dim = q.shape
    row_bytes = kv_layout("nvfp4", 1, head_dim, table.shape[1]).row_bytes
    data = torch.empty(tokens * heads, row_bytes, dtype=torch.uint8, device=q.device)
    rows = rotate(rms_norm_wide(q, None, eps), positions, table).flatten(0, 1)
    cache = PagedCache(data, "nvfp4", 1, head_dim, table.shape[1])
    write_rows(cache, torch.arange(tokens * heads, device=q.device), rows)
    return data.view(tokens, heads, row_bytes)


def write_rows(cache: PagedCache | IndexCache, slots: Tensor, rows: Tensor) -> None:
    """Encode rows [n, head_dim] and store row i at slots[i] (-1: nowhere); changes cache.data."""
    stored = slots >= 0
    slots, rows = slots[stored].long(), rows[stored].float()
    flat = cache.data.view(-1)
    for at, part in zip(_addresses(cache, slots), encode_rows(cache, rows), strict=True):
        flat[at] = part


def read_rows(cache: PagedCache | IndexCache, slots: Tensor) -> Tensor:
    """FP32 [..., head_dim] of the rows at slots [...]; -1 gives zeros, whatever the cache holds."""
    flat = cache.data.view(-1)
    parts = [flat[at] for at in _addresses(cache, slots.clamp(min=0).long().flatten())]
    rows = decode_rows(cache, parts).unflatten(0, slots.shape)
    return torch.where(slots[..., None] >= 0, rows, 0.0)


def encode_rows(cache: PagedCache | IndexCache, rows: Tensor) -> list[Tensor]:
    """uint8 parts [n, bytes] of FP32 rows [n, head_dim]: the row's own bytes, then its bytes after the page's rows."""
    if cache.format == "fp32":
        return [_bytes(rows)]
    rows = rows.bfloat16()
    if cache.format == "bf16":
        return [_bytes(rows)]
    if isinstance(cache, IndexCache):
        if cache.format == "fp8":
            exponent = ceil_log2(rows.float().abs().amax(-1, keepdim=True).clamp(min=FP8_FLOOR), E4M3_MAX)
            scale = pow2(exponent)
            return [_e4m3(rows.float() / scale), _bytes(scale)]
        blocks = rows.float().unflatten(-1, (-1, MX_BLOCK))
        exponent = ceil_log2(blocks.abs().amax(-1).clamp(min=MX_FLOOR), e2m1.MAX)  # [n, blocks]
        codes = e2m1.encode((blocks / pow2(exponent)[..., None]).flatten(-2))
        return [e2m1.pack(codes), (exponent + 127).to(torch.uint8)]
    nope, rope = rows.split((cache.head_dim - cache.rope_dim, cache.rope_dim), dim=-1)
    if cache.format == "fp8_ds_mla":
        blocks = nope.float().unflatten(-1, (-1, FP8_GROUP))
        exponent = ceil_log2(blocks.abs().amax(-1).clamp(min=FP8_FLOOR), E4M3_MAX)  # [n, blocks]
        data = _e4m3(blocks / pow2(exponent)[..., None]).flatten(-2)
        scales = torch.zeros(len(rows), cache.layout.scale_bytes, dtype=torch.uint8, device=rows.device)
        scales[:, : exponent.shape[1]] = (exponent + 127).to(torch.uint8)
        return [torch.cat((data, _bytes(rope)), dim=-1), scales]
    alpha = nope.float().abs().amax(-1) / torch.tensor(e2m1.MAX * E4M3_MAX, device=rows.device)  # [n]
    alpha = torch.where(alpha.isnan(), torch.nan, alpha)  # one of the NaNs
    codes, sf = e2m1.quantize_blocks(nope.float(), alpha[:, None])
    return [torch.cat((e2m1.pack(codes), _bytes(sf), _bytes(alpha[:, None]), _bytes(rope)), dim=-1)]


def decode_rows(cache: PagedCache | IndexCache, parts: list[Tensor]) -> Tensor:
    """FP32 [n, head_dim] of the parts that `encode_rows` makes."""
    row, d = parts[0], cache.head_dim
    if cache.format == "fp32":
        return _numbers(row, torch.float32)
    if cache.format == "bf16":
        return _numbers(row, torch.bfloat16).float()
    if isinstance(cache, IndexCache):
        if cache.format == "fp8":
            return _numbers(row, torch.float8_e4m3fn).float() * _numbers(parts[1], torch.float32)
        scale = pow2(parts[1].int() - 127)
        return (e2m1.decode_packed(row).unflatten(-1, (-1, MX_BLOCK)) * scale[..., None]).flatten(-2)
    nope = d - cache.rope_dim
    rope = _numbers(row[:, -2 * cache.rope_dim :], torch.bfloat16).float()
    if cache.format == "fp8_ds_mla":
        scale = pow2(parts[1][:, : nope // FP8_GROUP].int() - 127)
        data = _numbers(row[:, :nope], torch.float8_e4m3fn).float()
        return torch.cat(((data.unflatten(-1, (-1, FP8_GROUP)) * scale[..., None]).flatten(-2), rope), dim=-1)
    codes, sf, alpha, _ = row.split((nope // 2, nope // BLOCK, 4, 2 * cache.rope_dim), dim=-1)
    x = e2m1.decode_packed(codes).unflatten(-1, (-1, BLOCK))
    x = x * _numbers(sf, torch.float8_e4m3fn).float()[..., None]  # exact
    return torch.cat(((x * _numbers(alpha, torch.float32)[..., None]).flatten(-2), rope), dim=-1)


def _addresses(cache: PagedCache | IndexCache, slots: Tensor) -> list[Tensor]:
    """Byte addresses [n, bytes] in the flat cache of each part of the rows at slots [n]."""
    layout, p = cache.layout, cache.page_size
    page, row = (slots // p) * layout.page_bytes, slots % p
    starts = [(page + row * layout.row_bytes, layout.row_bytes)]
    if layout.scale_bytes:
        starts.append((page + p * layout.row_bytes + row * layout.scale_bytes, layout.scale_bytes))
    return [at[:, None] + torch.arange(size, device=slots.device) for at, size in starts]


def _e4m3(x: Tensor) -> Tensor:
    """FP32 -> E4M3 bytes, saturating; a NaN of either sign gives 0x7F."""
    return _bytes(x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)).masked_fill(x.isnan(), 0x7F)


def _bytes(x: Tensor) -> Tensor:
    if not x.numel():  # an empty tensor may have strides that a view refuses
        return x.new_empty((*x.shape[:-1], x.shape[-1] * x.element_size()), dtype=torch.uint8)
    return x.contiguous().view(torch.uint8)


def _numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.numel():
        return x.new_empty((*x.shape[:-1], x.shape[-1] // dtype.itemsize), dtype=dtype)
    return x.contiguous().view(dtype)
