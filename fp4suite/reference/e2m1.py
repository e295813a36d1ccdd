"""E2M1 codes and the block quantiser: the arithmetic that every quantising op and kernel shares.

All in FP32, each operation rounded to nearest even on its own (no multiply-add), subnormal numbers kept. For a block
of 16 elements x under a global scale alpha:

    inv  = 1 / alpha, or 0 if alpha < 2^-117 or alpha is NaN
    amax = largest |x|; a NaN counts as larger than infinity
    t    = amax * fp32(1/6) * inv, products from left to right
    s    = E4M3_RN(min(448, t)); 448 if t is NaN                   so a scale is never negative and never NaN
    r    = 1 / (s * alpha), or 0 if s * alpha = 0
    y    = max(-6, min(6, x * r)); 6 if x * r is NaN
    code = sign(y) << 3 | E2M1_RN(|y|)                             ties to the even code; the sign of -0 is kept

This is rule "absmax", the activation rule of vLLM 0.33. With a finite alpha an infinite or NaN element makes its block
448 and becomes +-6 or +6 there. alpha = amax / 2688 of a tensor that holds one is itself infinite or NaN, and so is all
that is dequantised from it: nothing is hidden.

Rule "mse" tries the E4M3 codes of s plus 0, -2, -1, 1 .. 6 (within 0 .. 126) in this order and keeps the first with the
least e = sum over the block of (x * inv - q * s)^2, where q is the element's E2M1 value under that scale; the sum is a
tree of adjacent pairs, ((e0 + e1) + (e2 + e3)) + ... . q * s is exact. The codes cover the maximum mapped to anything
from 7 (clipped) to 4.

Rule "modelopt_weight" is ModelOpt's for weights: t = amax / (6 * alpha), 1 if that is 0; s = E4M3_RN(max(2^-9, min(448,
t))); y = clamp(x / (s * alpha)); a quotient of -0 loses its sign. Under alpha < 2^-117 all is 0 with s = 1.
"""

import functools

import torch
from torch import Tensor

from ..formats import BLOCK, E2M1_MAX, E2M1_VALUES, E4M3_MAX
from ..problem import Rule, check_rule

MAX = E2M1_MAX
ALPHA_MIN = 2.0**-117  # from here on 1 / (2^-9 * alpha) is finite and 2^-9 * alpha is normal
E4M3_MIN = 2.0**-9  # smallest positive E4M3
MSE_STEPS = (-2, -1, 1, 2, 3, 4, 5, 6)  # codes from the absmax scale that rule "mse" tries after it

# Between neighbouring magnitudes; a tie goes to the even code, so those below an even code lie one step lower.
_BOUNDS = (0.25, 0.75 - 2**-24, 1.25, 1.75 - 2**-23, 2.5, 3.5 - 2**-22, 5.0)


def encode(y: Tensor) -> Tensor:
    """Numbers -> E2M1 codes, uint8 of the same shape: to nearest, ties to the even code, saturating; NaN gives +6."""
    y = torch.where(y.isnan(), MAX, y.float())
    magnitude = torch.bucketize(y.abs(), constant(_BOUNDS, y.device), out_int32=True).to(torch.uint8)
    return magnitude | (torch.signbit(y).to(torch.uint8) << 3)


def decode(codes: Tensor) -> Tensor:
    """E2M1 codes (the low four bits of uint8) -> float32 of the same shape."""
    values = constant((*E2M1_VALUES, *(-v for v in E2M1_VALUES)), codes.device)
    return values[(codes & 0xF).int()]


def pack(codes: Tensor) -> Tensor:
    """Codes [..., k] -> bytes [..., k / 2], even k in the low nibble."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(data: Tensor) -> Tensor:
    """Bytes [..., k / 2] -> codes [..., k]."""
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)


def decode_packed(data: Tensor) -> Tensor:
    """Bytes [..., k / 2] -> float32 [..., k]: `decode(unpack(data))`, many times faster on a CPU, a pair at a time."""
    pairs = _pairs(data.device).index_select(0, data.flatten().int())
    return pairs.view(torch.float32).view(*data.shape[:-1], 2 * data.shape[-1])


def quantize_blocks(x: Tensor, alpha: Tensor, rule: Rule = "absmax") -> tuple[Tensor, Tensor]:
    """x float32 [..., k] under alpha (broadcasts against [..., k / 16]) -> codes uint8 [..., k], sf E4M3 [..., k / 16].

    Raises ValueError for another rule or a k that is not a multiple of 16.
    """
    check_rule(rule)
    if x.shape[-1] % BLOCK:
        raise ValueError(f"k must be a multiple of {BLOCK}, got {x.shape[-1]}")
    blocks = x.unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))
    # as integers, the bits of non-negative floats are in order, with NaN on top: a maximum that loses no NaN
    amax = (blocks.contiguous().view(torch.int32) & 0x7FFFFFFF).amax(-1).view(torch.float32)
    usable = alpha >= ALPHA_MIN
    one = constant(1.0, x.device)
    if rule == "modelopt_weight":
        t = torch.where(usable, amax / (constant(MAX, x.device) * alpha), 0.0)
        t = torch.where(t == 0, 1.0, t)
        sf = torch.where(t <= E4M3_MAX, t.clamp(min=E4M3_MIN), E4M3_MAX).to(torch.float8_e4m3fn)
        scale = (sf.float() * alpha)[..., None]
        y = torch.where(usable[..., None], blocks / scale, 0.0)
        codes = encode(y + 0.0)  # -0 + 0 = 0
    else:
        inv = torch.where(usable, one / alpha, 0.0)
        t = amax * constant(1 / 6, x.device) * inv
        sf = torch.where(t <= E4M3_MAX, t, E4M3_MAX).to(torch.float8_e4m3fn)
        if rule == "mse":
            sf = _least_squares(blocks, sf, alpha, inv)
        codes = encode(blocks * _reciprocal(sf, alpha)[..., None])
    return codes.flatten(-2), sf


def pair_sum(x: Tensor) -> Tensor:
    """Sum over the last axis (a power of two long) in a tree of adjacent pairs: [..., n] -> [...]."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def _least_squares(blocks: Tensor, sf: Tensor, alpha: Tensor, inv: Tensor) -> Tensor:
    scaled = blocks * inv[..., None]
    start = sf.view(torch.uint8).int()

    def error(sf: Tensor) -> Tensor:
        q = decode(encode(blocks * _reciprocal(sf, alpha)[..., None]))
        difference = scaled - q * sf.float()[..., None]
        return pair_sum(difference * difference)

    least = error(sf)
    for step in MSE_STEPS:
        trial = (start + step).clamp(0, 126).to(torch.uint8).view(torch.float8_e4m3fn)
        e = error(trial)
        better = e < least
        sf = torch.where(better, trial.view(torch.uint8), sf.view(torch.uint8)).view(torch.float8_e4m3fn)
        least = torch.where(better, e, least)
    return sf


def _reciprocal(sf: Tensor, alpha: Tensor) -> Tensor:
    scale = sf.float() * alpha
    return torch.where(scale == 0, 0.0, constant(1.0, scale.device) / scale)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two numbers of each byte, as one 64-bit item: [256]."""
    every = torch.arange(256, dtype=torch.int32, device=device).to(torch.uint8)
    return decode(unpack(every[:, None])).contiguous().view(torch.int64).view(256)


@functools.cache
def constant(value: float | tuple[float, ...], device: torch.device) -> Tensor:
    """An FP32 constant as a tensor: PyTorch on CUDA divides by a Python number through its reciprocal."""
    return torch.tensor(value, dtype=torch.float32, device=device)
