"""Linears that read the same input, as one product: their weights lie in one wherever they are alike.

The parts stay the model's weights, under their own names: what is read from one is its share of the whole's memory,
and setting one takes the whole apart.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from fp4suite.formats import FP8_BLOCK, FP8BlockTensor, NVFP4Tensor, WeightLayout

from .inputs import Input
from .linear import AnyWeight, Linear


class Whole(Linear):
    """The weight of several linears. No weight of the model: its parts are, and go into a state dict."""

    def _save_to_state_dict(self, *args: object) -> None:
        pass


class Joined(nn.Module):
    """Linears of one input and one type of output; `join` makes one product of them.

    parts: belong to other modules, those before this one in the model; one alpha each.
    """

    whole: Whole | None

    def __init__(self, *parts: Linear) -> None:
        super().__init__()
        if any(part.segments for part in parts):
            raise ValueError("parts have one alpha each, got one with segments")
        self.parts = parts  # a tuple, so no submodules
        self.rows = tuple(part.shape[0] for part in parts)
        self.register_module("whole", None)

    def join(self, layout: WeightLayout | None, device: torch.device | str) -> None:
        """Put the weights into one if they are alike, and lay that out as `Linear.lay_out` does; else each by itself.

        Alike are tensors of one dtype, and packed weights that get one layout, together as alone, of whose tiles each
        but the last fills all rows. For a moment there are two copies.
        """
        if self.whole is None and len(self.parts) > 1:
            self._join(layout, device)
        for linear in self.parts if self.whole is None else (self.whole,):
            linear.lay_out(layout, device)

    def split(self) -> None:
        """Give the parts weights of their own again: each its share."""
        if self.whole is not None:
            weights = [self.share(part) for part in self.parts]
            self.whole = None
            for part, weight in zip(self.parts, weights, strict=True):
                part.take_back(weight)

    def share(self, part: Linear) -> AnyWeight:
        """A part's rows of the whole's weight, in the same memory and layout."""
        index = next(i for i, own in enumerate(self.parts) if own is part)
        return self._shares(index, index + 1)

    def forward(
        self, x: Tensor | Input, out_dtype: torch.dtype | None = None, *, first: int | None = None
    ) -> tuple[Tensor, ...]:
        """x [..., k] -> [..., n] of each part, or of the first few: columns of one tensor where they are joined."""
        x = x if isinstance(x, Input) else Input(x)
        if self.whole is None:
            return tuple(part(x, out_dtype) for part in self.parts[:first])
        rows = self.rows[:first]
        y = self.whole.product(x, self._shares(0, len(rows)), rows, out_dtype)
        return y.split(rows, -1)

    def _join(self, layout: WeightLayout | None, device: torch.device | str) -> None:
        weight = _together([part.weight for part in self.parts])
        if weight is None:
            return
        n, k = sum(self.rows), self.parts[0].shape[1]
        whole = Whole(n, k, act=self.parts[0].act, segments=self.rows, device="meta")
        whole.weight = weight
        wanted = whole.layout_for(layout, device)
        if any(part.layout_for(layout, device) != wanted for part in self.parts):
            return
        if wanted is not None and any(rows % wanted.tile_rows for rows in self.rows[:-1]):
            return
        for part in self.parts:
            part.lend(self)
        self.whole = whole

    def _shares(self, start: int, stop: int) -> AnyWeight:
        """Rows of parts start .. stop - 1 of the whole's weight."""
        assert self.whole is not None
        weight, ends = self.whole.weight, [0, *accumulate(self.rows)]
        first, last = ends[start], ends[stop]
        if isinstance(weight, NVFP4Tensor):
            return weight.rows(first, last, weight.alpha[start] if stop == start + 1 else weight.alpha[start:stop])
        if isinstance(weight, FP8BlockTensor):
            return FP8BlockTensor(weight.data[first:last], weight.sf[first // FP8_BLOCK : -(-last // FP8_BLOCK)])
        return weight[first:last]


def _together(weights: Sequence[AnyWeight]) -> AnyWeight | None:
    """All rows in one weight, in new memory; None for weights that are not alike."""
    nvfp4 = [w for w in weights if isinstance(w, NVFP4Tensor)]
    fp8 = [w for w in weights if isinstance(w, FP8BlockTensor)]
    plain = [w for w in weights if isinstance(w, Tensor)]
    if len(nvfp4) == len(weights):
        by_rows = [w.with_order("rows").with_sf_layout("linear") for w in nvfp4]
        sf = torch.cat([w.sf.view(torch.uint8) for w in by_rows]).view(torch.float8_e4m3fn)
        return NVFP4Tensor(torch.cat([w.data for w in by_rows]), sf, torch.stack([w.alpha for w in by_rows]))
    if len(fp8) == len(weights) and not any(w.shape[0] % FP8_BLOCK for w in fp8[:-1]):
        data = torch.cat([w.data.view(torch.uint8) for w in fp8]).view(torch.float8_e4m3fn)
        return FP8BlockTensor(data, torch.cat([w.sf for w in fp8]))
    if len(plain) == len(weights) and len({w.dtype for w in plain}) == 1:
        return torch.cat(plain)
    return None
