"""What a layer launches in a decode step, kind by kind of layer.

Operators are recorded as PyTorch dispatches them: those of fp4suite, and PyTorch's own. One that only makes a view or
takes memory launches nothing. Without a GPU the model is one of tensors without memory, of any size, and an operator
counts as one launch; on a GPU the kernels behind each are counted, as the profiler sees them.
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from fp4suite.formats import WeightLayout

from .cache import Batch, KVCache, LayerCache
from .check import held_formats
from .checkpoint import Family, load, make_checkpoint
from .checkpoint.read import weight_format
from .config import CSA_RATIO, ModelConfig
from .linear import ActFormat
from .runtime import ops_without_kernel, pick_device, reference_where_no_kernel, text_table
from .transformer import Layer, Site, Transformer

OURS = "fp4suite"
NOTHING = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}  # memory alone
_MARK = "launches "  # before the number of a call, in the profiler's events


@dataclass(slots=True)
class Call:
    """An operator: where in the layer ("attn.wq_a"), its name, and the kernels that it launched, as far as is known."""

    where: str
    op: str
    kernels: tuple[str, ...] = ()


class Recorder(TorchDispatchMode):
    """Calls of a block, in order. On a GPU each is marked for the profiler with its number."""

    def __init__(self, layer: nn.Module, *, marks: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._path = [""]
        self._marks = marks
        for name, module in layer.named_modules():
            if name:
                module.register_forward_pre_hook(lambda *_, name=name: self._path.append(name))
                module.register_forward_hook(lambda *_: self._path.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if name in NOTHING or any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            return func(*args, **(kwargs or {}))
        op = f"{OURS}.{name}" if space == OURS else name
        mark = record_function(f"{_MARK}{len(self.calls)}") if self._marks else contextlib.nullcontext()
        self.calls.append(Call(self._path[-1], op))
        with mark:
            return func(*args, **(kwargs or {}))


def decode_step(config: ModelConfig, batch: int, context: int, device: torch.device) -> tuple[Batch, KVCache]:
    """The step in which `batch` sequences of `context` tokens bring one more each, and caches as they began."""
    cache = KVCache(config, slots=batch, max_tokens=context + 1, device=device)
    slots = [cache.open() for _ in range(batch)]
    cache.prepare([(slot, [2] * context) for slot in slots])
    return cache.prepare([(slot, [2]) for slot in slots]), cache


def layers_by_kind(
    model: Transformer, step: Batch, caches: list[LayerCache], *, on_gpu: bool
) -> Iterator[tuple[str, list[Call]]]:
    """For the first layer of each kind what it calls, the site before it being closed on the way in."""
    with torch.no_grad():  # in inference mode PyTorch hands over what it would else take apart, as "to"
        h = model.embedding(step.token_ids, model.config.hc_mult)
        last: Site | None = None
        seen = set()
        for index, layer in enumerate(model.layers):
            h, last = layer(h, last, step, caches[index])
            assert isinstance(layer, Layer)
            kind = model.config.kind(index)
            if kind not in seen:
                seen.add(kind)
                yield kind, _recorded(layer, h, last, step, caches[index], on_gpu)


def _recorded(layer: Layer, h: Tensor, last: Site, step: Batch, cache: LayerCache, on_gpu: bool) -> list[Call]:
    recorder = Recorder(layer, marks=on_gpu)
    if not on_gpu:
        with recorder:
            layer(h, last, step, cache)
        return recorder.calls
    layer(h, last, step, cache)  # compiles what is about to be counted
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:
        with recorder:
            layer(h, last, step, cache)
        torch.cuda.synchronize()
    launched: dict[int, list[str]] = {}
    for event in p.events():
        marked: Any = event
        while marked is not None and not marked.name.startswith(_MARK):
            marked = marked.cpu_parent
        if marked is not None and event.kernels:
            launched.setdefault(int(marked.name.removeprefix(_MARK)), []).extend(k.name for k in event.kernels)
    for number, call in enumerate(recorder.calls):
        call.kernels = tuple(launched.get(number, ()))
    return recorder.calls


def counted(config: ModelConfig, family: Family, act: ActFormat, batch: int, device: torch.device) -> dict[str, Any]:
    """Calls of a layer of each kind, on a model of random weights. On a GPU it is made, in a folder that goes again."""
    config = _first_layers(config)
    context = max(CSA_RATIO * (config.index_topk + 1), config.sliding_window)  # the indexer has to choose
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fp4suite-launches-")))
            make_checkpoint(folder / "model", config, family, seed=0, progress=False)
            model = load(None, folder / "model", device, act_format=act, progress=False)
            stack.enter_context(reference_where_no_kernel(device))
            step, cache = decode_step(config, batch, context, device)
            return dict(layers_by_kind(model, step, cache.layers, on_gpu=True))
        formats = held_formats(config, family)
        model = Transformer(config, weight_format(formats), act_format=act, device="meta")
        model.lay_out(WeightLayout(), "cpu")
        step, cache = decode_step(config, batch, context, torch.device("meta"))
        return dict(layers_by_kind(model, step, cache.layers, on_gpu=False))


def _first_layers(config: ModelConfig) -> ModelConfig:
    """As many layers as it takes for one of each kind, and no draft blocks."""
    kinds = [config.kind(i) for i in range(config.num_hidden_layers)]
    layers = 1 + max(kinds.index(kind) for kind in set(kinds))
    ratios = config.compress_ratios[:layers]
    return replace(config, num_hidden_layers=layers, num_nextn_predict_layers=0, compress_ratios=ratios)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Counts, prints a table a kind, returns the same as data."""
    device = pick_device(args.device)
    config = ModelConfig.named(args.config)
    kinds = counted(config, args.family, args.act_format or "float", args.batch, device)
    without = {f"{OURS}.{op}" for op in ops_without_kernel(device)}
    document: dict[str, Any] = {"device": str(device), "kinds": {}}
    for kind, calls in kinds.items():
        known = [c for c in calls if c.op not in without]
        launches = sum(len(c.kernels) if device.type == "cuda" else 1 for c in known)
        print(f"\n{kind.upper()}: {launches} launches", end="")
        print(f", and {', '.join(c.op for c in calls if c.op in without)} without a kernel" if without else "")
        rows = [[c.where, c.op, *([len(c.kernels), _names(c)] if device.type == "cuda" else [])] for c in calls]
        print(text_table(("where", "operator", "launches", "kernels")[: len(rows[0])], rows))
        document["kinds"][kind] = {
            "launches": launches,
            "calls": [{"where": c.where, "op": c.op, "kernels": list(c.kernels)} for c in calls],
        }
    return document


def _names(call: Call) -> str:
    """Kernels of a call without their templates and arguments, at most three."""
    names = [k.split("<")[0].split("(")[0].removeprefix("void ")[-48:] for k in call.kernels]
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
