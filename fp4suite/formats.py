"""Number formats as data: what a packed tensor or a cache page holds, checked when it is made.

NVFP4   x[m, k] = E2M1(code[m, k]) * E4M3(sf[m, k // 16]) * alpha      alpha FP32: one a tensor, segment or expert
MXFP4   x[m, k] = E2M1(code[m, k]) * 2 ** (sf[m, k // 32] - 127)       OCP Microscaling Formats 1.0
FP8     x[m, k] = E4M3(data[m, k]) * 2 ** (sf[m // 128, k // 128] - 127)            weights of the native release
        x[m, k] = E4M3(data[m, k]) * scale[m]                                       activations, under act="fp8"

Two E2M1 codes share a byte, even k in the low nibble. Torch only, so that it imports without a GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from . import layouts
from .layouts import Order

BLOCK = 16  # elements of K under one NVFP4 scale
MX_BLOCK = 32  # elements of K under one MXFP4 scale
FP8_BLOCK = 128  # rows and columns under one FP8 weight scale
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits; bit 3 is the sign
E2M1_MAX = 6.0
E4M3_MAX = 448.0

SfLayout = Literal["linear", "blocked_128x4"]
KVFormat = Literal["fp32", "bf16", "fp8_ds_mla", "nvfp4"]
IndexFormat = Literal["fp32", "bf16", "fp8", "mxfp4"]


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """How a weight lies in memory: which kernels can read it, not what it means."""

    order: Order = "rows"
    sf_layout: SfLayout = "linear"

    def refuses(self, n: int, k: int) -> str | None:
        """Why a weight [n, k] cannot lie so, or None if it can."""
        return None if self.order == "rows" else layouts.refuse_fragments(n, k, self.order)

    @property
    def tile_rows(self) -> int:
        """Rows whose bytes lie together: a weight can be cut between tiles."""
        if self.order != "rows":
            return layouts.TILE
        return layouts.ROWS if self.sf_layout == "blocked_128x4" else 1


@dataclass(frozen=True, slots=True)
class NVFP4Tensor:
    """A row-major [..., m, k] array in NVFP4.

    data:  uint8 [..., m, k / 2]
    sf:    float8_e4m3fn [..., m, k / 16] ("linear"), or [..., bytes] ("blocked_128x4", see `layouts`)
    alpha: float32 [], or [segments] (runs of rows m), or [experts], or [experts, segments]; on the device, so that
           using it never synchronises
    order: of data and sf in memory: "rows", or a weight's "fragments_sm90" or "fragments_sm90_fp8" (see `layouts`),
           under the same shapes
    row_exponent: int8 [..., m] of a weight that was made ready for act="fp8" (`prepare_fp8`), else None
    """

    data: Tensor
    sf: Tensor
    alpha: Tensor
    sf_layout: SfLayout = "linear"
    order: Order = "rows"
    row_exponent: Tensor | None = None

    def __post_init__(self) -> None:
        _expect(self.data, "data", torch.uint8, "two E2M1 codes a byte")
        _expect(self.sf, "sf", torch.float8_e4m3fn, "one E4M3 scale a block of 16")
        _expect(self.alpha, "alpha", torch.float32, "the global scale")
        if self.data.ndim < 2:
            raise ValueError(f"data must be [..., m, k / 2], got {list(self.data.shape)}")
        *lead, m, k = self.shape
        if k % BLOCK:
            raise ValueError(f"k must be a multiple of {BLOCK}, got {k} (data {list(self.data.shape)})")
        if self.sf_layout == "linear":
            want = [*lead, m, k // BLOCK]
        elif self.sf_layout == "blocked_128x4":
            want = [*lead, layouts.blocked_128x4_bytes(m, k // BLOCK)]
        else:
            raise ValueError(f'sf_layout must be "linear" or "blocked_128x4", got {self.sf_layout!r}')
        if list(self.sf.shape) != want:
            raise ValueError(
                f"data {list(self.data.shape)} needs {self.sf_layout} sf {want}, got {list(self.sf.shape)}"
            )
        if self.order != "rows":
            self._check_order(m, k)
        if self.alpha.ndim > 2:
            raise ValueError(f"alpha must have at most two axes [experts, segments], got {list(self.alpha.shape)}")
        if not self.data.device == self.sf.device == self.alpha.device:
            raise ValueError(
                f"data, sf and alpha must share a device, got {self.data.device}, {self.sf.device}, {self.alpha.device}"
            )
        if self.row_exponent is not None:
            _expect(self.row_exponent, "row_exponent", torch.int8, "one power of two a row")
            if self.row_exponent.shape != self.data.shape[:-1] or self.row_exponent.device != self.data.device:
                raise ValueError(
                    f"data {list(self.data.shape)} on {self.data.device} needs row_exponent {[*lead, m]} there, "
                    f"got {list(self.row_exponent.shape)} on {self.row_exponent.device}"
                )

    def _check_order(self, m: int, k: int) -> None:
        if self.order not in layouts.ORDERS:
            raise ValueError(f"order must be one of {', '.join(layouts.ORDERS)}, got {self.order!r}")
        if self.sf_layout != "linear":
            raise ValueError(f'the order "{self.order}" has linear scales, got {self.sf_layout}')
        if why := layouts.refuse_fragments(m, k, self.order):
            raise ValueError(why)
        if not (self.data.is_contiguous() and self.sf.is_contiguous()):
            raise ValueError(f'data and sf must be contiguous in the order "{self.order}"')

    @classmethod
    def empty(
        cls, shape: Sequence[int], alpha: Tensor, sf_layout: SfLayout = "linear", order: Order = "rows"
    ) -> "NVFP4Tensor":
        """Room for [..., m, k] on alpha's device; nothing is written, the padding of blocked scales included."""
        *lead, m, k = shape
        sf_shape = (m, k // BLOCK) if sf_layout == "linear" else (layouts.blocked_128x4_bytes(m, k // BLOCK),)
        data = torch.empty(*lead, m, k // 2, dtype=torch.uint8, device=alpha.device)
        sf = torch.empty(*lead, *sf_shape, dtype=torch.uint8, device=alpha.device)
        return cls(data, sf.view(torch.float8_e4m3fn), alpha, sf_layout, order)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical [..., m, k], in elements."""
        return (*self.data.shape[:-1], self.data.shape[-1] * 2)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> "NVFP4Tensor":
        exponent = None if self.row_exponent is None else self.row_exponent.to(device)
        return replace(
            self,
            data=self.data.to(device),
            sf=self.sf.to(device),
            alpha=self.alpha.to(device),
            row_exponent=exponent,
        )

    def prepare_fp8(self) -> "NVFP4Tensor":
        """The same weight over the same memory, with the exponents that `gemm_nvfp4(..., act="fp8")` reads.

        A row is decoded to E4M3 as code * sf * 2 ** -row_exponent, rounded to nearest even. The exponent, -12 to 3,
        moves the row's largest scale to 32 .. 60 (below, where it is subnormal), so that no number is above 360 and few
        are too small for E4M3. Raises ValueError for blocked scales.
        """
        if self.sf_layout != "linear":
            raise ValueError(f'act="fp8" reads linear scales, got {self.sf_layout}')
        biased = (layouts.row_maxima(self.sf, self.order) >> 3).to(torch.int8)  # by 7, above three bits of mantissa
        return replace(self, row_exponent=biased - 12)

    def with_sf_layout(self, sf_layout: SfLayout) -> "NVFP4Tensor":
        """The same values with their scales in another layout (a copy of the scales only).

        Raises ValueError for another than linear unless the order is "rows".
        """
        if sf_layout == self.sf_layout:
            return self
        m, ks = self.data.shape[-2], self.data.shape[-1] * 2 // BLOCK
        if self.order != "rows":
            raise ValueError(
                f'scales in the order "{self.order}" have no {sf_layout} layout: ask for with_order("rows")'
            )
        if sf_layout == "blocked_128x4":
            sf = layouts.to_blocked_128x4(self.sf)
        else:
            sf = layouts.from_blocked_128x4(self.sf, m, ks)
        return NVFP4Tensor(self.data, sf, self.alpha, sf_layout)

    def with_order(self, order: Order) -> "NVFP4Tensor":
        """The same values with codes and scales in another order (a copy of both, unless they have it).

        Raises ValueError for a shape that cannot have it, or for blocked scales.
        """
        if order == self.order:
            return self
        return replace(self, data=_copy(self.data), sf=_copy(self.sf)).reorder_(order)

    @property
    def layout(self) -> WeightLayout:
        return WeightLayout(self.order, self.sf_layout)

    def rows(self, start: int, stop: int, alpha: Tensor) -> "NVFP4Tensor":
        """Rows start .. stop - 1 of a weight [m, k] under their own alpha, in the same memory and layout.

        Raises ValueError for rows that it has not, and for a start or stop inside of the layout's tiles.
        """
        m, k = self.shape
        tile = self.layout.tile_rows
        if not 0 <= start < stop <= m or start % tile or (stop % tile and stop != m):
            raise ValueError(f"rows {start} to {stop} of {m} are not whole tiles of {tile}")
        if self.sf_layout == "linear":
            sf = self.sf[start:stop]
        else:
            first, last = (layouts.blocked_128x4_bytes(row, k // BLOCK) for row in (start, stop))
            sf = self.sf[first:last]
        exponent = None if self.row_exponent is None else self.row_exponent[start:stop]
        return NVFP4Tensor(self.data[start:stop], sf, alpha, self.sf_layout, self.order, exponent)

    def lay_out_(self, layout: WeightLayout) -> "NVFP4Tensor":
        """The same values in another layout, in place: `reorder_`, or scales that move within their memory.

        Blocked scales that need padding (m not a multiple of 128, k not of 64) take new memory; codes never do. `self`
        must not be read any more. Raises ValueError, with nothing changed, for a layout that cannot be.
        """
        if layout == self.layout:
            return self
        if layout.order != "rows" and layout.sf_layout != "linear":
            raise ValueError(f'the order "{layout.order}" has linear scales, got {layout.sf_layout}')
        if why := layout.refuses(self.shape[-2], self.shape[-1]):
            raise ValueError(why)
        if layout.order != self.order and not (self.data.is_contiguous() and self.sf.is_contiguous()):
            raise ValueError("data and sf must be contiguous to be reordered in place")
        t, (m, k) = self.reorder_("rows") if layout.order == "rows" else self, self.shape[-2:]
        if t.sf_layout != layout.sf_layout:
            blocked = layout.sf_layout == "blocked_128x4"
            sf = layouts.to_blocked_128x4_(t.sf) if blocked else layouts.from_blocked_128x4_(t.sf, m, k // BLOCK)
            t = NVFP4Tensor(t.data, sf, t.alpha, layout.sf_layout)
        return t.reorder_(layout.order)

    def reorder_(self, order: Order) -> "NVFP4Tensor":
        """`with_order` in place: the tensor to go on with. `self`, over the same memory, must not be read any more.

        Scratch is a few MB, whatever the size (`layouts.SCRATCH_BYTES`). Raises ValueError, with nothing changed, also
        for data or sf that are not contiguous.
        """
        if order == self.order:
            return self
        done = replace(self, order=order)  # refuses what cannot be before anything moves
        if self.order != "rows":
            layouts.from_fragments_(self.data, self.sf, self.order)
        if order != "rows":
            layouts.to_fragments_(self.data, self.sf, order)
        if self.data.is_cuda:  # kernels may read weights before earlier work on their stream has ended
            torch.cuda.current_stream(self.data.device).synchronize()
        return done


@dataclass(frozen=True, slots=True)
class FP8RowTensor:
    """Activations [..., m, k] in E4M3 with one scale a row.

    data:  float8_e4m3fn [..., m, k], columns in the order of `layouts.fp8_columns`
    scale: float32 [..., m]
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _expect(self.data, "data", torch.float8_e4m3fn, "one E4M3 number an element")
        _expect(self.scale, "scale", torch.float32, "one scale a row")
        if self.data.ndim < 2 or self.data.shape[-1] % layouts.TILE:
            got = list(self.data.shape)
            raise ValueError(f"data must be [..., m, k] with k a multiple of {layouts.TILE}, got {got}")
        if self.scale.shape != self.data.shape[:-1] or self.scale.device != self.data.device:
            raise ValueError(
                f"data {list(self.data.shape)} on {self.data.device} needs scale {list(self.data.shape[:-1])} there, "
                f"got {list(self.scale.shape)} on {self.scale.device}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical [..., m, k], in elements."""
        return tuple(self.data.shape)

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> "FP8RowTensor":
        return FP8RowTensor(self.data.to(device), self.scale.to(device))


@dataclass(frozen=True, slots=True)
class MXFP4Tensor:
    """A row-major [..., m, k] array in MXFP4, as the native release stores routed experts.

    data: uint8 [..., m, k / 2]
    sf:   uint8 [..., m, k / 32], E8M0 (255 is NaN)
    """

    data: Tensor
    sf: Tensor

    def __post_init__(self) -> None:
        _expect(self.data, "data", torch.uint8, "two E2M1 codes a byte")
        _expect(self.sf, "sf", torch.uint8, "E8M0 bytes")
        *lead, k = self.shape
        want = [*lead, k // MX_BLOCK]
        if k % MX_BLOCK or list(self.sf.shape) != want:
            raise ValueError(
                f"data {list(self.data.shape)} needs sf {want} (k in blocks of 32), got {list(self.sf.shape)}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical [..., m, k], in elements."""
        return (*self.data.shape[:-1], self.data.shape[-1] * 2)

    @property
    def device(self) -> torch.device:
        return self.data.device


@dataclass(frozen=True, slots=True)
class FP8BlockTensor:
    """A [m, k] weight in E4M3 with one power-of-two scale a 128 x 128 block, as the native release stores linears.

    data: float8_e4m3fn [m, k]
    sf:   uint8 [ceil(m / 128), ceil(k / 128)], E8M0
    """

    data: Tensor
    sf: Tensor

    def __post_init__(self) -> None:
        _expect(self.data, "data", torch.float8_e4m3fn, "one E4M3 number an element")
        _expect(self.sf, "sf", torch.uint8, "E8M0 bytes")
        m, k = self.shape
        want = [-(-m // FP8_BLOCK), -(-k // FP8_BLOCK)]
        if list(self.sf.shape) != want:
            raise ValueError(f"data [{m}, {k}] needs sf {want}, got {list(self.sf.shape)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def device(self) -> torch.device:
        return self.data.device


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Where the parts of one cache row and page lie, in bytes."""

    row_bytes: int
    scale_bytes: int  # kept after all rows of the page, not in the row
    page_bytes: int


def kv_layout(format: KVFormat, page_size: int, head_dim: int = 512, rope_dim: int = 64) -> RowLayout:
    """Row and page sizes of a KV cache.

    fp32, bf16   head_dim numbers a row
    fp8_ds_mla   E4M3 in blocks of 64 + BF16 RoPE dims a row; 8 scale bytes a row after all rows of the page; the page
                 rounded up to 576 bytes (what vLLM 0.33 and SGLang 0.5.23 hold; 584 bytes a row at 448 + 64)
    nvfp4        codes, E4M3 scales, one FP32 row alpha, BF16 RoPE dims (384 bytes a row at 448 + 64)
    """
    nope = head_dim - rope_dim
    if format == "fp32":
        return RowLayout(4 * head_dim, 0, 4 * head_dim * page_size)
    if format == "bf16":
        return RowLayout(2 * head_dim, 0, 2 * head_dim * page_size)
    if format == "fp8_ds_mla":
        if nope % 64 or nope // 64 > 8:
            raise ValueError(f"fp8_ds_mla holds up to 8 blocks of 64 dims beside RoPE, got {nope} dims")
        row = nope + 2 * rope_dim
        return RowLayout(row, 8, -(-page_size * (row + 8) // 576) * 576)
    if format == "nvfp4":
        if nope % BLOCK:
            raise ValueError(f"nvfp4 rows need a multiple of {BLOCK} dims beside RoPE, got {nope}")
        row = nope // 2 + nope // BLOCK + 4 + 2 * rope_dim
        return RowLayout(row, 0, row * page_size)
    raise ValueError(f'KV format must be "fp32", "bf16", "fp8_ds_mla" or "nvfp4", got {format!r}')


def index_layout(format: IndexFormat, page_size: int, head_dim: int = 128) -> RowLayout:
    """Row and page sizes of an indexer key cache; the scales of fp8 (FP32) and mxfp4 (E8M0) follow the page's rows."""
    if format == "fp32":
        return RowLayout(4 * head_dim, 0, 4 * head_dim * page_size)
    if format == "bf16":
        return RowLayout(2 * head_dim, 0, 2 * head_dim * page_size)
    if format == "fp8":
        return RowLayout(head_dim, 4, (head_dim + 4) * page_size)
    if format == "mxfp4":
        if head_dim % MX_BLOCK:
            raise ValueError(f"mxfp4 index rows need head_dim in blocks of {MX_BLOCK}, got {head_dim}")
        scales = head_dim // MX_BLOCK
        return RowLayout(head_dim // 2, scales, (head_dim // 2 + scales) * page_size)
    raise ValueError(f'index format must be "fp32", "bf16", "fp8" or "mxfp4", got {format!r}')


@dataclass(frozen=True, slots=True)
class PagedCache:
    """KV rows of one layer in pages: slot s is row s % page_size of page s // page_size.

    data: uint8 [pages, page_bytes], laid out as `kv_layout` says
    """

    data: Tensor
    format: KVFormat
    page_size: int
    head_dim: int = 512
    rope_dim: int = 64

    def __post_init__(self) -> None:
        _check_pages(self.data, kv_layout(self.format, self.page_size, self.head_dim, self.rope_dim))

    @property
    def layout(self) -> RowLayout:
        return kv_layout(self.format, self.page_size, self.head_dim, self.rope_dim)

    @property
    def slots(self) -> int:
        return self.data.shape[0] * self.page_size


@dataclass(frozen=True, slots=True)
class IndexCache:
    """Indexer keys of one layer in pages, laid out as `index_layout` says.

    data: uint8 [pages, page_bytes]
    """

    data: Tensor
    format: IndexFormat
    page_size: int
    head_dim: int = 128

    def __post_init__(self) -> None:
        _check_pages(self.data, index_layout(self.format, self.page_size, self.head_dim))

    @property
    def layout(self) -> RowLayout:
        return index_layout(self.format, self.page_size, self.head_dim)

    @property
    def slots(self) -> int:
        return self.data.shape[0] * self.page_size


def _copy(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _expect(t: Tensor, name: str, dtype: torch.dtype, what: str) -> None:
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {str(dtype).removeprefix('torch.')} ({what}), got {t.dtype}")


def _check_pages(data: Tensor, layout: RowLayout) -> None:
    _expect(data, "data", torch.uint8, "cache pages as bytes")
    if data.ndim != 2 or data.shape[1] != layout.page_bytes:
        raise ValueError(f"data must be [pages, {layout.page_bytes}], got {list(data.shape)}")
