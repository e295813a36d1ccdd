"""Weights in any of the formats that checkpoints hold, and y = x Wᵀ on top of them.

A weight's parts are buffers, so that a model can be built on the meta device, moved and counted; `weight` joins them
into the container that ops take, and takes one apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fp4suite import by_token, dispatch, ops
from fp4suite.formats import BLOCK, FP8_BLOCK, FP8BlockTensor, FP8RowTensor, NVFP4Tensor, SfLayout, WeightLayout
from fp4suite.layouts import TILE, Order
from fp4suite.problem import Act, GemmProblem
from fp4suite.reference.native import dequant_fp8_block

from .inputs import Input

Format = Literal["bf16", "fp32", "nvfp4", "fp8"]
WeightFormat = Callable[[str], Format]  # by canonical name
ActFormat = Literal["float", "nvfp4", "fp8"]
AnyWeight = Tensor | NVFP4Tensor | FP8BlockTensor

_PLAIN: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Holder(Protocol):
    """Where weights lie that were lent, together with others."""

    def share(self, part: Any) -> AnyWeight: ...
    def split(self) -> None: ...


class Weight(nn.Module):
    """A [n, k] weight, or [experts, n, k] stacked.

    segments: runs of rows with an alpha of their own in NVFP4 (gate and up), or None for one alpha a matrix.
    """

    PARTS = ("data", "sf", "alpha", "row_exponent")

    data: Tensor
    sf: Tensor | None
    alpha: Tensor | None
    row_exponent: Tensor | None  # follows from sf, so no part of a state dict

    def __init__(
        self,
        shape: tuple[int, ...],
        format: Format = "bf16",
        *,
        segments: tuple[int, ...] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.segments = segments
        self._order: Order = "rows"
        self._lent: tuple[Holder, ...] = ()  # in a tuple, so that the holder does not become a submodule
        self.weight = self.empty(format, device)

    def empty(self, format: Format, device: torch.device | str | None = None) -> AnyWeight:
        """An unset weight of this shape. Raises ValueError if the format cannot hold it."""
        *lead, n, k = self.shape
        if format in _PLAIN:
            return torch.empty(self.shape, dtype=_PLAIN[format], device=device)
        if format == "nvfp4":
            data = torch.empty(*lead, n, k // 2, dtype=torch.uint8, device=device)
            sf = torch.empty(*lead, n, k // BLOCK, dtype=torch.float8_e4m3fn, device=device)
            each = [len(self.segments)] if self.segments else []
            return NVFP4Tensor(data, sf, torch.empty((*lead, *each), dtype=torch.float32, device=device))
        if format == "fp8" and not lead:
            sf = torch.empty(-(-n // FP8_BLOCK), -(-k // FP8_BLOCK), dtype=torch.uint8, device=device)
            return FP8BlockTensor(torch.empty(n, k, dtype=torch.float8_e4m3fn, device=device), sf)
        raise ValueError(f"a weight of shape {list(self.shape)} cannot be {format!r}")

    @property
    def order(self) -> Order:
        """Of an NVFP4 weight in memory."""
        weight = self.weight
        return weight.order if isinstance(weight, NVFP4Tensor) else "rows"

    @property
    def weight(self) -> AnyWeight:
        for holder in self._lent:
            return holder.share(self)
        data, sf, alpha = self.data, self.sf, self.alpha
        if sf is None:
            return data
        if alpha is None:
            return FP8BlockTensor(data, sf)
        sf_layout: SfLayout = "linear" if sf.ndim == data.ndim else "blocked_128x4"
        return NVFP4Tensor(data, sf, alpha, sf_layout, self._order, self.row_exponent)

    @weight.setter
    def weight(self, value: AnyWeight) -> None:
        if tuple(value.shape) != self.shape:
            raise ValueError(f"this weight is {list(self.shape)}, got {list(value.shape)}")
        if isinstance(value, NVFP4Tensor):
            lead = list(self.shape[:-2])
            allowed = [lead, [*lead, len(self.segments)]] if self.segments else [lead]
            if list(value.alpha.shape) not in allowed:
                raise ValueError(f"alpha must be {' or '.join(map(str, allowed))}, got {list(value.alpha.shape)}")
        elif isinstance(value, Tensor) and not (value.is_floating_point() and value.itemsize > 1):
            raise TypeError(f"a plain weight must be of a float type of 2 bytes or more, got {value.dtype}")
        for holder in self._lent:
            holder.split()
        self._keep(_parts(value))
        self._order = value.order if isinstance(value, NVFP4Tensor) else "rows"

    def lend(self, holder: Holder) -> None:
        """Keep nothing: the weight is what `holder` has of it, until it is set or taken back."""
        self._lent = (holder,)
        self._keep({})

    def take_back(self, weight: AnyWeight) -> None:
        """Keep `weight` again, as the holder gives it."""
        self._lent = ()
        self.weight = weight

    def _keep(self, parts: dict[str, Tensor | None]) -> None:
        for name in self.PARTS:
            self.register_buffer(name, parts.get(name), persistent=name != "row_exponent")

    def extra_repr(self) -> str:
        weight = self.weight
        kind = str(weight.dtype).removeprefix("torch.") if isinstance(weight, Tensor) else type(weight).__name__
        return f"{list(self.shape)}, {kind}" + (f", {self.order}" if self.order != "rows" else "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._expect_rows("written to")
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._lent:
            destination |= {f"{prefix}{name}": t for name, t in _parts(self.weight).items() if name != "row_exponent"}

    def _load_from_state_dict(self, *args: Any) -> None:
        self._expect_rows("read from")
        for holder in self._lent:
            holder.split()
        super()._load_from_state_dict(*args)

    def _expect_rows(self, what: str) -> None:
        """A state dict holds tensors only: nothing in it says in which order their bytes are."""
        if self.order != "rows":
            raise ValueError(
                f'a weight in the order "{self.order}" is not {what} a state dict: '
                'first put a copy by rows in its place (weight.with_order("rows"))'
            )


class Linear(Weight):
    """y [..., n] = x [..., k] Wᵀ. Under act "nvfp4", the input of an NVFP4 weight is quantised on the way (W4A4), under
    "fp8" input and weight are rounded to E4M3 (W4A8) where `lay_out` has found a kernel for that.

    The one reader of `ops.gemm_nvfp4`'s weights, so the one that can have them in the layout of a device's kernels.
    """

    def __init__(
        self,
        n: int,
        k: int,
        format: Format = "bf16",
        *,
        act: ActFormat = "float",
        segments: tuple[int, ...] | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((n, k), format, segments=segments, device=device)
        self.act = act

    @property
    def reads_nvfp4(self) -> bool:
        """Whether the input is quantised on the way."""
        return self.act == "nvfp4" and isinstance(self.weight, NVFP4Tensor)

    def layout_for(self, layout: WeightLayout | None, device: torch.device | str) -> WeightLayout | None:
        """What `lay_out` would give the weight; None for one that is not NVFP4."""
        weight, (n, k) = self.weight, self.shape
        if not isinstance(weight, NVFP4Tensor):
            return None
        if layout is None:
            act: Act = "bf16" if self.act == "float" else self.act
            layout = dispatch.weight_layout(n, k, device, act=act, segments=max(1, weight.alpha.numel()))
        return layout if layout.refuses(n, k) is None else weight.layout

    def lay_out(self, layout: WeightLayout | None, device: torch.device | str) -> None:
        """Give an NVFP4 weight this layout where its shape allows it, in place; None: what kernels on `device` read."""
        weight, (n, k) = self.weight, self.shape
        wanted = self.layout_for(layout, device)
        if wanted is None or not isinstance(weight, NVFP4Tensor):
            return
        self.weight = weight = weight.lay_out_(wanted)
        segments = max(1, weight.alpha.numel())
        problem = GemmProblem(m=1, n=n, k=k, act="fp8", segments=segments, order=weight.order)
        fits = self.act == "fp8" and weight.sf_layout == "linear" and k % TILE == 0
        if fits and dispatch.is_supported(problem, device):
            self.weight = weight.prepare_fp8()
        elif weight.row_exponent is not None:  # of a layout before this one
            self.weight = replace(weight, row_exponent=None)

    def forward(self, x: Tensor | Input, out_dtype: torch.dtype | None = None) -> Tensor:
        """out_dtype: of y, summed in FP32 and rounded once; x's by default."""
        return self.product(x if isinstance(x, Input) else Input(x), self.weight, self.segments, out_dtype)

    def product(
        self, x: Input, weight: AnyWeight, segments: Sequence[int] | None, out_dtype: torch.dtype | None
    ) -> Tensor:
        """`forward` with a weight like this one's, of other rows: a run of this one's, say."""
        out_dtype = out_dtype or x.dtype
        if isinstance(weight, NVFP4Tensor):
            a: Tensor | NVFP4Tensor | FP8RowTensor
            if self.act == "nvfp4":
                # one kernel reads both operands' scales: x's get the layout that the weight was given for it
                a = x.nvfp4(weight.sf_layout)
            elif self.act == "fp8" and weight.row_exponent is not None:
                a = x.fp8
            else:
                a = x.plain
            y = ops.gemm_nvfp4(a, weight, segments=segments if weight.alpha.ndim else None, out_dtype=out_dtype)
        else:
            y = matmul(x.plain, plain(weight, x.dtype), out_dtype)
        return y.unflatten(0, x.lead)


@dataclass(frozen=True, slots=True)
class Build:
    """What modules are made of: each weight's format by its canonical name, how inputs are treated, and where."""

    weight_format: WeightFormat
    act: ActFormat
    dtype: torch.dtype  # of norm weights, until a checkpoint says otherwise
    device: torch.device | str | None
    prefix: str = ""

    def child(self, name: str) -> "Build":
        return replace(self, prefix=f"{self.prefix}{name}.")

    def format_of(self, name: str) -> Format:
        return self.weight_format(self.prefix + name)

    def linear(self, name: str, n: int, k: int, *, segments: tuple[int, ...] | None = None) -> Linear:
        return Linear(n, k, self.format_of(name), act=self.act, segments=segments, device=self.device)

    def weight(self, name: str, shape: tuple[int, ...], *, segments: tuple[int, ...] | None = None) -> Weight:
        return Weight(shape, self.format_of(name), segments=segments, device=self.device)

    def vector(self, size: int) -> Tensor:
        return nn.Buffer(torch.empty(size, dtype=self.dtype, device=self.device))

    def fp32(self, *shape: int) -> Tensor:
        return nn.Buffer(torch.empty(shape, dtype=torch.float32, device=self.device))

    def int32(self, *shape: int) -> Tensor:
        return nn.Buffer(torch.empty(shape, dtype=torch.int32, device=self.device))


def plain(weight: AnyWeight, dtype: torch.dtype) -> Tensor:
    """A weight as one [n, k] tensor in dtype (exact from FP8); TypeError for NVFP4, which ops read packed."""
    if isinstance(weight, NVFP4Tensor):
        raise TypeError("an NVFP4 weight is not unpacked outside the ops")
    return dequant_fp8_block(weight, dtype) if isinstance(weight, FP8BlockTensor) else weight.to(dtype)


def _parts(weight: AnyWeight) -> dict[str, Tensor | None]:
    """The tensors that a weight is made of, under the names of `Weight.PARTS`."""
    if isinstance(weight, Tensor):
        return {"data": weight}
    if isinstance(weight, FP8BlockTensor):
        return {"data": weight.data, "sf": weight.sf}
    return {"data": weight.data, "sf": weight.sf, "alpha": weight.alpha, "row_exponent": weight.row_exponent}


def matmul(x: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    """x [m, k] @ w [n, k].T -> [m, n] in out_dtype, summed in FP32; x and w share a dtype."""
    return by_token.each(lambda rows: _matmul(rows, w, out_dtype), x)


def _matmul(x: Tensor, w: Tensor, out_dtype: torch.dtype) -> Tensor:
    if x.dtype == out_dtype:
        return F.linear(x, w)
    if x.device.type != "cpu" and out_dtype == torch.float32:
        return torch.mm(x, w.T, out_dtype=out_dtype)
    return F.linear(x.float(), w.float()).to(out_dtype)
