"""How far a device's layers are from the reference on the CPU, kind by kind of layer, and whether tokens are the same.

Every layer of every step gets the streams that the CPU's model has there, so that no layer answers for the ones before;
each model keeps caches of its own. A third model, of the same weights in FP32 throughout, says what the formats cost:
a device that computes what the CPU does is as near to it as the CPU is.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4suite import ops
from fp4suite.formats import IndexFormat, KVFormat

from .cache import Batch, KVCache
from .checkpoint import load
from .checkpoint.load import default_act_format
from .config import ModelConfig
from .generate import Sampling, generate
from .runtime import expect_positions, pick_device, reference_where_no_kernel, text_table
from .transformer import Layer, Site, Transformer

PARTS = ("attention", "experts", "streams")  # outputs of a layer's two blocks; the streams that it leaves behind
CHUNK = 256  # tokens of a prefill step
DECODED = 16  # tokens, one a step

Outputs = tuple[Tensor, Tensor, Tensor]  # of PARTS
Formats = tuple[KVFormat, IndexFormat]  # of cache rows and indexer keys


@dataclass(slots=True)
class Share:
    """Sums of squares over all numbers of a part: differences of the device and of the CPU, and FP32's own."""

    device_cpu: float = 0.0
    cpu_exact: float = 0.0
    device_exact: float = 0.0
    exact: float = 0.0

    def add(self, device: Tensor, cpu: Tensor, exact: Tensor) -> None:
        """Three results for the same input."""
        d, c, e = (x.detach().cpu().double() for x in (device, cpu, exact))
        self.device_cpu += float((d - c).square().sum())
        self.cpu_exact += float((c - e).square().sum())
        self.device_exact += float((d - e).square().sum())
        self.exact += float(e.square().sum())

    def relative(self) -> dict[str, float]:
        """Root mean square differences over FP32's root mean square."""
        names = ("device_cpu", "cpu_exact", "device_exact")
        return {name: (getattr(self, name) / self.exact) ** 0.5 for name in names}


@dataclass(frozen=True, slots=True)
class Side:
    """A model, its caches, and the sequence in them."""

    model: Transformer
    cache: KVCache
    sequence: int

    def prepare(self, ids: Sequence[int]) -> Batch:
        """The step of the sequence's next tokens."""
        return self.cache.prepare([(self.sequence, list(ids))])

    def layer(self, index: int, h: Tensor, last: Site | None, batch: Batch) -> tuple[Tensor, Site, Tensor]:
        """Streams and open site behind the layer, and its attention's output."""
        layer = self.model.layers[index]
        assert isinstance(layer, Layer)
        seen: list[Tensor] = []
        hook = layer.attn.register_forward_hook(lambda _module, _args, y: seen.append(y))
        try:
            h, site = layer(*self._here(h, last), batch, self.cache.layers[index])
        finally:
            hook.remove()
        return h, site, seen[0]

    def _here(self, h: Tensor, last: Site | None) -> tuple[Tensor, Site | None]:
        """Streams and a site as this model computes with them. post and comb are FP32 everywhere."""
        device, dtype = self.cache.device, self.model.act_dtype
        if last is not None:
            last = Site(last.y.to(device, dtype), last.post.to(device), last.comb.to(device))
        return h.to(device, dtype), last


def outputs(h: Tensor, site: Site, attention: Tensor) -> Outputs:
    """What of a layer is compared, in the order of PARTS."""
    return attention, site.y, ops.hyper_connection_post(site.y, h, site.post, site.comb)


def layers(device: Side, cpu: Side, exact: Side, steps: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[Outputs]]]:
    """For each layer of each step its index and what the three make of the CPU's input."""
    config = cpu.model.config
    sides = (device, cpu, exact)
    with torch.inference_mode():
        for ids in steps:
            batches = [side.prepare(ids) for side in sides]
            h, last = cpu.model.embedding(batches[1].token_ids, config.hc_mult), None
            for index in range(config.num_hidden_layers):
                found = [side.layer(index, h, last, b) for side, b in zip(sides, batches, strict=True)]
                yield index, [outputs(*one) for one in found]
                h, last, _ = found[1]


def compare(device: Side, cpu: Side, exact: Side, steps: Sequence[Sequence[int]]) -> dict[str, dict[str, Share]]:
    """By kind of layer and part, over all layers and steps."""
    found: dict[str, dict[str, Share]] = defaultdict(lambda: {part: Share() for part in PARTS})
    for index, three in layers(device, cpu, exact, steps):
        kind = cpu.model.config.kind(index)
        for part, *results in zip(PARTS, *three, strict=True):
            found[kind][part].add(*results)
    return dict(found)


def prompt(config: ModelConfig, tokens: int, seed: int = 0) -> list[int]:
    """Random tokens of the vocabulary."""
    gen = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (tokens,), generator=gen).tolist()


def in_steps(ids: Sequence[int]) -> list[list[int]]:
    """A prefill in chunks, then DECODED tokens one by one."""
    prefill, decoded = ids[:-DECODED], ids[-DECODED:]
    chunks = [list(prefill[i : i + CHUNK]) for i in range(0, len(prefill), CHUNK)]
    return chunks + [[token] for token in decoded]


def empty_cache(model: Transformer, tokens: int, formats: Formats, device: torch.device | str) -> KVCache:
    """For a sequence of `tokens`."""
    kv, index = formats
    return KVCache(model.config, max_tokens=tokens, kv_format=kv, index_format=index, device=device)


def side(model: Transformer, tokens: int, formats: Formats, device: torch.device | str) -> Side:
    """A model at the beginning of a sequence of `tokens`."""
    cache = empty_cache(model, tokens, formats, device)
    return Side(model, cache, cache.open())


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Loads the three models, prints a table, returns the same as data. ValueError for too few tokens, or too many."""
    if args.tokens <= DECODED:
        raise ValueError(f"--tokens must be more than the {DECODED} that are decoded, got {args.tokens}")
    device = pick_device(args.device)
    progress, act = False if args.quiet else None, args.act_format or default_act_format(device)
    formats = (args.kv_format, args.index_format)
    theirs = load(None, args.checkpoint, device, weights=args.weights, act_format=act, progress=progress)
    ours = load(None, args.checkpoint, weights=args.weights, act_format=act, progress=progress)
    full = load(None, args.checkpoint, weights="fp32", progress=progress)
    expect_positions(ours, args.tokens + args.new_tokens)
    ids = prompt(ours.config, args.tokens)
    with reference_where_no_kernel(device) as without:
        two = side(theirs, len(ids), formats, device), side(ours, len(ids), formats, "cpu")
        found = compare(*two, side(full, len(ids), ("fp32", "fp32"), "cpu"), in_steps(ids))
        same = _same_tokens(((theirs, device), (ours, "cpu")), ids, args.new_tokens, formats)
    rows = [(k, part, *share.relative().values()) for k, parts in found.items() for part, share in parts.items()]
    print(f"\n{args.checkpoint}: {len(ids)} tokens, root mean square differences, relative")
    print(text_table(("layers", "of", f"{device} - cpu", "cpu - FP32", f"{device} - FP32"), rows))
    print(f"greedy tokens: {same} of {args.new_tokens} the same")
    if without:
        print(f"without a kernel, computed by the reference on {device}: {', '.join(without)}")
    return {
        "device": str(device),
        "tokens": len(ids),
        "kinds": {k: {part: s.relative() for part, s in parts.items()} for k, parts in found.items()},
        "new_tokens": args.new_tokens,
        "same_tokens": same,
        "without_kernel": without,
    }


def _same_tokens(
    models: Sequence[tuple[Transformer, torch.device | str]], ids: list[int], count: int, formats: Formats
) -> int:
    """How many of the tokens that both continue with are the same, up to the first that is not."""
    told = []
    for model, device in models:
        cache = empty_cache(model, len(ids) + count, formats, device)
        told.append(generate(model, cache, [ids], Sampling(max_new_tokens=count), chunk=CHUNK)[0])
    return next((i for i, (a, b) in enumerate(zip(*told, strict=True)) if a != b), count)
