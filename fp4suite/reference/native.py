"""The native release's weight formats: MXFP4 experts, FP8 linears with 128 x 128 blocks, and the exact cast to NVFP4.

Both have power-of-two scales 2^(byte - 127): the least that lets the block's maximum fit, 2^ceil(log2(amax / top)) with
top 6 (E2M1) or 448 (E4M3), no less than 2^-126. The quotient x / scale is exact, so codes are rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import BLOCK, E2M1_MAX, E4M3_MAX, FP8_BLOCK, MX_BLOCK, FP8BlockTensor, MXFP4Tensor, NVFP4Tensor
from .e2m1 import decode, decode_packed, encode, pack
from .e8m0 import ceil_log2, pow2

CAST_EXPONENT = 8  # the cast gives the largest block scale of a matrix 2^8 as E4M3; 2^-9 is the least it can give
CAST_SPAN = 17


def quantize_mxfp4(x: Tensor) -> MXFP4Tensor:
    """x [..., m, k] -> MXFP4. Raises ValueError for a k that is not a multiple of 32 or an x that is not finite."""
    _expect_finite(x)
    if x.shape[-1] % MX_BLOCK:
        raise ValueError(f"k must be a multiple of {MX_BLOCK}, got {x.shape[-1]}")
    blocks = x.float().unflatten(-1, (x.shape[-1] // MX_BLOCK, MX_BLOCK))
    exponent = ceil_log2(blocks.abs().amax(-1), E2M1_MAX)
    codes = encode(blocks * pow2(-exponent)[..., None])
    return MXFP4Tensor(pack(codes.flatten(-2)), (exponent + 127).to(torch.uint8))


def dequant_mxfp4(t: MXFP4Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """MXFP4 [..., m, k] -> dtype. Exact in float32 and bfloat16 where the result is normal; byte 255 gives NaN."""
    blocks = decode_packed(t.data).unflatten(-1, (t.sf.shape[-1], MX_BLOCK))
    return (blocks.to(_wide(dtype)) * _scale(t.sf, dtype)[..., None]).flatten(-2).to(dtype)


def quantize_fp8_block(x: Tensor) -> FP8BlockTensor:
    """x [m, k] -> E4M3 with one scale a 128 x 128 block; ragged edges allowed. Raises ValueError unless x is finite."""
    _expect_finite(x)
    m, k = x.shape
    tiles = _tiles(x.float())  # [m tiles, 128, k tiles, 128]
    exponent = ceil_log2(tiles.abs().amax((1, 3)), E4M3_MAX)
    data = (tiles * pow2(-exponent)[:, None, :, None]).to(torch.float8_e4m3fn)
    data = data.view(torch.uint8).flatten(2).flatten(0, 1)[:m, :k].contiguous().view(torch.float8_e4m3fn)
    return FP8BlockTensor(data, (exponent + 127).to(torch.uint8))


def dequant_fp8_block(t: FP8BlockTensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """FP8 [m, k] -> dtype. Exact in float32 and bfloat16 where the result is normal; byte 255 gives NaN."""
    m, k = t.shape
    tiles = _tiles(t.data.to(_wide(dtype))) * _scale(t.sf, dtype)[:, None, :, None]
    return tiles.flatten(2).flatten(0, 1)[:m, :k].to(dtype).contiguous()


def mxfp4_to_nvfp4(t: MXFP4Tensor, segments: Sequence[int] | None = None) -> tuple[NVFP4Tensor, Tensor]:
    """MXFP4 [..., m, k] -> NVFP4 of the same values, and how many 32-blocks could not keep theirs (int64 []).

    With k_max the largest block exponent of a matrix (of each of its `segments`, runs of rows m):
    alpha = 2^(k_max - 8), both scales of a 32-block at exponent e are 2^(e - k_max + 8), codes unchanged: the lossless
    cast of NVIDIA's "-0813" checkpoints. It is exact down to e = k_max - 17; below, the scale stays 2^-9 and the codes
    are rounded to nearest again, and a block counts as lost if that changed a value. alpha: [...] or [..., segments].
    Raises ValueError for a NaN scale (byte 255), or k_max below -118, where alpha would leave FP32's normal range.
    """
    if bool((t.sf == 255).any()):
        raise ValueError("MXFP4 scale byte 255 is NaN: there is no NVFP4 value for it")
    exponent = t.sf.int() - 127  # [..., m, k / 32]
    parts = (exponent,) if segments is None else exponent.split(list(segments), dim=-2)
    top = torch.stack([p.amax((-2, -1)) for p in parts], dim=-1)  # [..., segments]
    if bool((top < CAST_EXPONENT - 126).any()):
        raise ValueError(f"block scales up to 2^{int(top.min())} only: alpha would be subnormal")
    alpha = pow2(top - CAST_EXPONENT)
    rows = [p.shape[-2] for p in parts]
    counts = torch.tensor(rows, device=top.device)
    top_of_row = top.repeat_interleave(counts, dim=-1, output_size=sum(rows))[..., None]
    drop = (top_of_row - exponent - CAST_SPAN).clamp(min=0)  # steps below what E4M3 can express

    sf = pow2(exponent + drop - top_of_row + CAST_EXPONENT)
    sf = sf.to(torch.float8_e4m3fn).view(torch.uint8).repeat_interleave(MX_BLOCK // BLOCK, dim=-1)
    data, lost = t.data, torch.zeros((), dtype=torch.int64, device=t.device)
    if bool((drop > 0).any()):  # trained weights stay within the span: then no code is touched
        blocks = decode_packed(data).unflatten(-1, (exponent.shape[-1], MX_BLOCK))
        moved = blocks * pow2(-drop.clamp(max=126))[..., None]
        codes = encode(moved)
        lost = (decode(codes) != moved).any(-1).sum()
        data = torch.where((drop > 0)[..., None], pack(codes), data.unflatten(-1, (-1, MX_BLOCK // 2))).flatten(-2)
    if segments is None:
        alpha = alpha[..., 0]
    return NVFP4Tensor(data, sf.view(torch.float8_e4m3fn), alpha), lost


def _scale(sf: Tensor, dtype: torch.dtype) -> Tensor:
    """E8M0 bytes -> 2^(byte - 127) in the type to compute in; 255 is NaN."""
    return torch.where(sf == 255, torch.nan, pow2(sf.int() - 127)).to(_wide(dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tiles(x: Tensor) -> Tensor:
    """[m, k] -> [m tiles, 128, k tiles, 128], padded with zeros."""
    m, k = x.shape
    x = torch.nn.functional.pad(x, (0, -k % FP8_BLOCK, 0, -m % FP8_BLOCK))
    return x.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))


def _expect_finite(x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError("x holds an infinite or NaN element, which these formats cannot")
