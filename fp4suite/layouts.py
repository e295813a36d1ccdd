"""Orders of NVFP4 scales and codes in memory, each with its exact inverse.

Scales
------
"linear" is row-major [m, ks] with ks = k / 16. "blocked_128x4" is what tcgen05, cuBLAS and CUTLASS read (PTX ISA,
"Scale factor layout"): rows padded to 128 and ks to 4 with zeros, then

    offset(m, s) = ((m // 128) * (ks_padded // 4) + s // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + s % 4   bytes.

Weights
-------
"rows" is row-major, two codes a byte, with either order of scales. "fragments_sm90" orders the codes and linear scales
of a weight [n, k] for Hopper's tensor cores: tiles of 64 rows x 64 columns one after the other, those of the same rows
adjacent, 2048 bytes of codes and 256 of scales each. n and k are multiples of 64, so every 64 rows keep their bytes.

    codes   bytes 16 t .. 16 t + 15 of a tile belong to lane t = 32 w + 4 g + q of four warps (w < 4, g < 8, q < 4): a
            little-endian word for each step s < 4 of 16 columns, with pairs p < 4 of codes: row 16 w + g + 8 (p % 2),
            columns 16 s + 2 q + 8 (p // 2) and the next. Decoded to BF16, the pairs are the registers of A that a lane
            holds in `wgmma` m64nNk16 (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16").
    word    bit 31 ..                              E: exponent, M: mantissa, S: sign of a code; the digit is its pair
            S0 E2 E2 M2  E1 E1 M1 E0  E0 M0 S2 E3  M3 S1 S3 E3     the second codes' bits, and signs 1, 2 of the first
            S0 E2 E2 M2  E1 E1 M1 E0  E0 M0 S2 E3  M3 S1 S3 E3     the first codes' bits, and signs 1, 2 of the second
            so that R(p), a pair with S at bits 15 and 31, and E E M at bits 8 .. 6 and 24 .. 22, takes two operations:
            R(0) = W & 0x81C081C0                  R(1) = rotate_right(W, 3) & 0x81C081C0
            R(2) = rotate_right(W, 6) & 0x81C081C0   R(3) = (W & 0x001B001B) * (2^3 + 2^8 + 2^14) & 0x81C081C0
    scales  byte 64 w + 8 g + 4 h + s of a tile is that of row 16 w + g + 8 h (h < 2), columns 16 s .. 16 s + 15

"fragments_sm90_fp8" orders them for the FP8 tensor cores: tiles of the same size, in which a lane has a whole block of
16 columns of two rows, so that it can look up what the block's codes are under their scale.

    codes   bytes 16 t .. 16 t + 15 of a tile belong to lane t as above: a little-endian word for each step j < 2 and
            each h < 2: row 16 w + g + 8 h, columns 16 q + 8 j .. + 7.
    word    magnitude i < 8 at bits 4 i + 2 .. 4 i; the sign of code i at bit 8 i + 7 for i < 4, else at 8 (i - 4) + 3
    scales  byte 2 t + h of a tile is that of lane t's block in row 16 w + g + 8 h

FP8 activations
---------------
Decoded to E4M3, a lane's codes are its registers of A of two `wgmma` m64nNk32, each register four neighbours of K:
places 32 j + 16 i + 4 q .. + 3 of every 64 (i < 2), where the lane has columns 16 q + 8 j + 4 i .. + 3. So FP8 rows
have the words of every 64 columns transposed, as 4 x 4. A product over K does not mind.
"""

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

_Move = Callable[[Tensor], Tensor]
Order = Literal["rows", "fragments_sm90", "fragments_sm90_fp8"]
ROWS_ORDER: Order = "rows"
FRAGMENTS_SM90: Order = "fragments_sm90"
FRAGMENTS_SM90_FP8: Order = "fragments_sm90_fp8"
ORDERS: tuple[Order, ...] = (ROWS_ORDER, FRAGMENTS_SM90, FRAGMENTS_SM90_FP8)

ROWS, COLS = 128, 4  # one atom of the blocked layout: 512 bytes
TILE = 64  # rows, and columns of K, of a tile of fragments
SCRATCH_BYTES = 1 << 20  # that are reordered at once, in whole blocks of rows; scratch is five times that at most

# Where bits 0 .. 3 (mantissa, two of exponent, sign) of the first code of each pair lie in a word of "fragments_sm90";
# those of the second lie 16 bits on, modulo 32.
_PAIRS = ((6, 7, 8, 15), (9, 10, 11, 18), (12, 13, 14, 21), (3, 4, 0, 1))
_PLACES = tuple((low + 16 * second) % 32 for pair in _PAIRS for second in (0, 1) for low in pair)
# and where the bits of eight codes lie in a word of "fragments_sm90_fp8"
_PLACES_FP8 = tuple(
    place for i in range(8) for place in (4 * i, 4 * i + 1, 4 * i + 2, 8 * i + 7 if i < 4 else 8 * (i - 4) + 3)
)


def blocked_128x4_bytes(m: int, ks: int) -> int:
    """Bytes of the blocked form of [m, ks] scales."""
    return _round_up(m, ROWS) * _round_up(ks, COLS)


def to_blocked_128x4(sf: Tensor) -> Tensor:
    """[..., m, ks] one-byte scales -> [..., blocked_128x4_bytes(m, ks)], padding zero."""
    *lead, m, ks = sf.shape
    mp, kp = _round_up(m, ROWS), _round_up(ks, COLS)
    raw = sf.view(torch.uint8)
    padded = raw.new_zeros(*lead, mp, kp)
    padded[..., :m, :ks] = raw
    atoms = padded.view(*lead, mp // ROWS, 4, 32, kp // COLS, COLS)  # m = 128 mt + 32 j + i; s = 4 kt + c
    n = len(lead)
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # mt kt i j c
    return atoms.permute(order).reshape(*lead, mp * kp).view(sf.dtype)


def from_blocked_128x4(flat: Tensor, m: int, ks: int) -> Tensor:
    """[..., bytes] -> [..., m, ks]: undoes `to_blocked_128x4` and drops the padding.

    Raises ValueError if the last axis is not blocked_128x4_bytes(m, ks) long.
    """
    *lead, size = flat.shape
    want = blocked_128x4_bytes(m, ks)
    if size != want:
        raise ValueError(f"blocked_128x4 scales of [{m}, {ks}] take {want} bytes, got {size}")
    mp, kp = _round_up(m, ROWS), _round_up(ks, COLS)
    n = len(lead)
    atoms = flat.view(torch.uint8).reshape(*lead, mp // ROWS, kp // COLS, 32, 4, COLS)  # mt kt i j c
    order = (*range(n), n, n + 3, n + 2, n + 1, n + 4)  # mt j i kt c
    linear = atoms.permute(order).reshape(*lead, mp, kp)[..., :m, :ks]
    return linear.contiguous().view(flat.dtype)


def to_blocked_128x4_(sf: Tensor) -> Tensor:
    """`to_blocked_128x4` in the memory of contiguous sf, whole rows of atoms at a time; a copy where padding is needed.

    Returns the blocked form: of the same memory if m is a multiple of 128 and ks of 4.
    """
    *lead, m, ks = sf.shape
    if m % ROWS or ks % COLS or not sf.is_contiguous():
        return to_blocked_128x4(sf)
    for some in _row_blocks(sf, ROWS * ks):
        some.copy_(to_blocked_128x4(some.view(-1, ROWS, ks)).view(some.shape))
    return sf.view(*lead, m * ks)


def from_blocked_128x4_(flat: Tensor, m: int, ks: int) -> Tensor:
    """Undoes `to_blocked_128x4_`, in place where that was. Raises ValueError for another size than theirs."""
    if m % ROWS or ks % COLS or not flat.is_contiguous() or flat.shape[-1] != m * ks:
        return from_blocked_128x4(flat, m, ks)
    for some in _row_blocks(flat, ROWS * ks):
        some.copy_(from_blocked_128x4(some, ROWS, ks).view(some.shape))
    return flat.view(*flat.shape[:-1], m, ks)


def _row_blocks(t: Tensor, size: int) -> tuple[Tensor, ...]:
    """Bytes of a contiguous tensor as [blocks, size], a few blocks at a time (`SCRATCH_BYTES`)."""
    if not t.numel():
        return ()
    return t.view(torch.uint8).view(-1, size).split(max(1, SCRATCH_BYTES // size))


def refuse_fragments(n: int, k: int, order: Order) -> str | None:
    """Why a weight [n, k] cannot lie in an order of fragments, or None if it can."""
    if n % TILE or k % TILE:
        return f'the order "{order}" is of tiles of {TILE} x {TILE}, got n={n}, k={k}'
    return None


def to_fragments_(data: Tensor, sf: Tensor, order: Order = FRAGMENTS_SM90) -> None:
    """Reorder codes uint8 [..., n, k / 2] and one-byte linear scales [..., n, k / 16] in place: rows -> `order`.

    Works a few blocks of 64 rows at a time (`SCRATCH_BYTES`). Raises ValueError unless n and k are multiples of 64, the
    shapes agree and both are contiguous.
    """
    codes, _, scales, _ = _MOVES[order]
    _reorder_(data, sf, order, codes, scales)


def from_fragments_(data: Tensor, sf: Tensor, order: Order = FRAGMENTS_SM90) -> None:
    """Undoes `to_fragments_`, in place as well."""
    _, codes, _, scales = _MOVES[order]
    _reorder_(data, sf, order, codes, scales)


def row_maxima(sf: Tensor, order: Order) -> Tensor:
    """The largest scale of each row, as bytes: non-negative E4M3 linear scales [..., n, k / 16] -> uint8 [..., n]."""
    *lead, n, ks = sf.shape
    raw = sf.view(torch.uint8)
    if order == ROWS_ORDER:
        return raw.amax(-1)
    if order == FRAGMENTS_SM90:
        tiles = raw.view(*lead, n // TILE, ks // 4, 4, 8, 2, 4).amax(dim=(-5, -1))  # ..., w, g, h
    else:
        tiles = raw.view(*lead, n // TILE, ks // 4, 4, 8, 4, 2).amax(dim=(-5, -2))
    return tiles.transpose(-1, -2).reshape(*lead, n)


def fp8_columns(x: Tensor) -> Tensor:
    """[..., k] -> the same numbers with the words of every 64 columns transposed, as 4 x 4. It is its own inverse."""
    return x.unflatten(-1, (-1, 4, 4, 4)).transpose(-2, -3).flatten(-4)


def _reorder_(data: Tensor, sf: Tensor, order: Order, codes: _Move, scales: _Move) -> None:
    n, half = data.shape[-2:]
    if why := refuse_fragments(n, 2 * half, order):
        raise ValueError(why)
    if sf.shape != (*data.shape[:-1], half // 8):
        raise ValueError(
            f"data {list(data.shape)} needs linear sf {[*data.shape[:-1], half // 8]}, got {list(sf.shape)}"
        )
    if not (data.is_contiguous() and sf.is_contiguous()):
        raise ValueError("data and sf must be contiguous to be reordered in place")
    for part, move in ((data, codes), (sf, scales)):
        for some in _row_blocks(part, TILE * part.shape[-1]):
            some.copy_(move(some.view(-1, TILE, part.shape[-1])).view(some.shape))


def _codes_to_fragments(blocks: Tensor) -> Tensor:
    """[blocks, 64, k / 2] by rows -> as many bytes in the order of fragments."""
    b, _, half = blocks.shape
    pairs = blocks.view(b, 4, 2, 8, half // 32, 4, 2, 4)  # block, w, p % 2, g, tile, s, p // 2, q
    return _permute_bits(pairs.permute(0, 4, 1, 3, 7, 5, 6, 2).reshape(-1, 4), _to_word(_PLACES, blocks.device))


def _codes_from_fragments(blocks: Tensor) -> Tensor:
    b, _, half = blocks.shape
    words = _permute_bits(blocks.view(-1, 4), _from_word(_PLACES, blocks.device))
    pairs = words.view(b, half // 32, 4, 8, 4, 4, 2, 2)  # block, tile, w, g, q, s, p // 2, p % 2
    return pairs.permute(0, 2, 7, 3, 1, 5, 6, 4).reshape(blocks.shape)


def _scales_to_fragments(blocks: Tensor) -> Tensor:
    b, _, ks = blocks.shape
    return (
        blocks.view(b, 4, 2, 8, ks // 4, 4).permute(0, 4, 1, 3, 2, 5).reshape(blocks.shape)
    )  # block, tile, w, g, h, s


def _scales_from_fragments(blocks: Tensor) -> Tensor:
    b, _, ks = blocks.shape
    return (
        blocks.view(b, ks // 4, 4, 8, 2, 4).permute(0, 2, 4, 3, 1, 5).reshape(blocks.shape)
    )  # block, w, h, g, tile, s


def _codes_to_fp8(blocks: Tensor) -> Tensor:
    b, _, half = blocks.shape
    words = blocks.view(b, 4, 2, 8, half // 32, 4, 2, 4)  # block, w, h, g, tile, q, j, byte
    return _permute_bits(words.permute(0, 4, 1, 3, 5, 6, 2, 7).reshape(-1, 4), _to_word(_PLACES_FP8, blocks.device))


def _codes_from_fp8(blocks: Tensor) -> Tensor:
    b, _, half = blocks.shape
    words = _permute_bits(blocks.view(-1, 4), _from_word(_PLACES_FP8, blocks.device))
    codes = words.view(b, half // 32, 4, 8, 4, 2, 2, 4)  # block, tile, w, g, q, j, h, byte
    return codes.permute(0, 2, 6, 3, 1, 4, 5, 7).reshape(blocks.shape)


def _scales_to_fp8(blocks: Tensor) -> Tensor:
    b, _, ks = blocks.shape
    rows = blocks.view(b, 4, 2, 8, ks // 4, 4)  # block, w, h, g, tile, q
    return rows.permute(0, 4, 1, 3, 5, 2).reshape(blocks.shape)


def _scales_from_fp8(blocks: Tensor) -> Tensor:
    b, _, ks = blocks.shape
    rows = blocks.view(b, ks // 4, 4, 8, 4, 2)  # block, tile, w, g, q, h
    return rows.permute(0, 2, 5, 3, 1, 4).reshape(blocks.shape)


# into fragments and back, of codes and of scales
_MOVES: dict[Order, tuple[_Move, _Move, _Move, _Move]] = {
    FRAGMENTS_SM90: (_codes_to_fragments, _codes_from_fragments, _scales_to_fragments, _scales_from_fragments),
    FRAGMENTS_SM90_FP8: (_codes_to_fp8, _codes_from_fp8, _scales_to_fp8, _scales_from_fp8),
}


def _permute_bits(words: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """Words as bytes [count, 4] -> the same with their bits moved; tables: what each value of each byte becomes."""
    moved = tables[0].index_select(0, words[:, 0].int())
    for i in range(1, 4):
        moved |= tables[i].index_select(0, words[:, i].int())
    return moved.view(torch.uint8)


@functools.cache
def _to_word(places: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Tables of `_permute_bits` from four bytes, two codes each, to a word in which bit i lies at places[i]."""
    return _tables(places, device)


@functools.cache
def _from_word(places: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    return _tables(tuple(places.index(bit) for bit in range(32)), device)


def _tables(places: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """For each byte of a word and each of its values, int32 [256]: the word with bit i moved to places[i]."""
    value = torch.arange(256, device=device)
    tables = []
    for byte in range(4):
        moved = sum(((value >> bit & 1) << places[8 * byte + bit] for bit in range(8)), start=torch.zeros_like(value))
        tables.append(moved.to(torch.uint32).view(torch.int32))
    return tuple(tables)


def _round_up(x: int, to: int) -> int:
    return -(-x // to) * to
