"""DeepSeek-V4, whole: embedding, layers over four residual streams, head, and the draft blocks (MTP).

    h = embed(ids) in every stream
    h = post(attention(norm(pre(h))), h)      pre and post: hyper-connections (mHC)
    h = post(moe(norm(pre(h))), h)            ... for each layer
    logits = head(norm(fold(h)))

The post of a site and the pre of the next, of the next layer too, are one op: the streams are read and written once.
One `forward` serves prefill, chunked prefill, decode and any mix of them: `cache.prepare` makes the batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fp4suite import ops
from fp4suite.formats import WeightLayout

from .attention import Attention
from .cache import Batch, KVCache, LayerCache
from .config import ModelConfig
from .inputs import Normed
from .joined import Joined, Whole
from .linear import ActFormat, AnyWeight, Build, Linear, Weight, WeightFormat
from .moe import MoE


class Site(NamedTuple):
    """An attention's or an MoE's output y [tokens, hidden], and what `hyper_connection_post` closes it with."""

    y: Tensor
    post: Tensor
    comb: Tensor


class Transformer(nn.Module):
    """The model, its weights unset: fill them through `set_weight`, or assign to the modules.

    weight_format: "bf16", "fp32", "nvfp4" or "fp8" by canonical name, e.g. `layers.0.attn.wq_a` or `layers.0.ffn.w13`
    act_dtype:     of activations and residual streams
    act_format:    "nvfp4" quantises the input of NVFP4 weights (W4A4); "fp8" that of dense ones, and them (W4A8)
    """

    def __init__(
        self,
        config: ModelConfig,
        weight_format: WeightFormat = lambda name: "bf16",
        *,
        act_dtype: torch.dtype = torch.bfloat16,
        act_format: ActFormat = "float",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.act_dtype = config, act_dtype
        build = Build(weight_format, act_format, act_dtype, device)
        self.embed = build.weight("embed", (config.vocab_size, config.hidden_size))
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(Layer(config, i, build.child(f"layers.{i}")) for i in layers)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = _fold_weights(config, build)
        self.norm = build.vector(config.hidden_size)
        self.head = build.linear("head", config.vocab_size, config.hidden_size)
        drafts = range(config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(DraftBlock(config, i, build.child(f"mtp.{i}")) for i in drafts)

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """FP32 logits [sequences, vocab] after the last token of each sequence in the step."""
        return self.logits(self.streams(batch, cache)[batch.last])

    def streams(self, batch: Batch, cache: KVCache) -> Tensor:
        """Residual streams after the last layer, [tokens, streams, hidden]."""
        h = self.embedding(batch.token_ids, self.config.hc_mult)  # [tokens, streams, hidden]
        last: Site | None = None
        for layer, layer_cache in zip(self.layers, cache.layers, strict=False):  # draft blocks' caches come last
            h, last = layer(h, last, batch, layer_cache)
        return h if last is None else ops.hyper_connection_post(last.y, h, last.post, last.comb)

    def logits(self, h: Tensor) -> Tensor:
        """Streams [tokens, streams, hidden] -> FP32 [tokens, vocab]."""
        config = self.config
        y = ops.hyper_connection_head(
            h,
            self.hc_head_fn,
            self.hc_head_base,
            self.hc_head_scale,
            self.norm,
            norm_eps=config.rms_norm_eps,
            eps=config.hc_eps,
        )
        return self.head(y, torch.float32)

    def draft(self, h: Tensor, next_ids: Tensor, batch: Batch, cache: KVCache, block: int = 0) -> tuple[Tensor, Tensor]:
        """One draft block over the step that made h.

        h: streams [tokens, streams, hidden] of the trunk, or of the draft block before; next_ids: int64 [tokens], the
        token that follows each. Returns FP32 logits [tokens, vocab] of the token after that, and the block's streams.
        """
        embedded = self.embedding(next_ids).squeeze(1)  # [tokens, hidden]
        return self.mtp[block](h, embedded, batch, cache.layers[len(self.layers) + block], self.head)

    def embedding(self, token_ids: Tensor, streams: int = 1) -> Tensor:
        """int64 [tokens] -> [tokens, streams, hidden]; NaN for a token that is not of the vocabulary."""
        weight = self.embed.weight
        if not isinstance(weight, Tensor):
            raise TypeError(f"the embedding must be a plain tensor, got {type(weight).__name__}")
        return ops.embed(token_ids, weight, streams=streams, out_dtype=self.act_dtype)

    def weights(self) -> Iterator[tuple[str, AnyWeight]]:
        """Every weight by its canonical name: the native one, but experts stacked (`ffn.w13`, `ffn.shared.w13`)."""
        for path, module in self.named_modules():
            if isinstance(module, Whole):
                continue
            if isinstance(module, Weight):
                yield path, module.weight
            for name, value in module.named_buffers(recurse=False):
                if not (isinstance(module, Weight) and name in Weight.PARTS):
                    yield f"{path}.{name}" if path else name, value

    def set_weight(self, name: str, value: AnyWeight) -> None:
        """Put `value` in place of the weight of this canonical name, whatever format either has.

        Raises KeyError for a name that this model lacks, ValueError for another shape, TypeError for another kind.
        """
        path, _, last = name.rpartition(".")
        parent = self.get_submodule(path)
        target = parent._modules.get(last)
        if isinstance(target, Weight):
            target.weight = value
            return
        old = parent._buffers.get(last)
        if old is None or (isinstance(parent, Weight) and last in Weight.PARTS):
            raise KeyError(f"the model has no weight {name!r}")
        if not isinstance(value, Tensor) or value.is_floating_point() != old.is_floating_point():
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a {old.dtype} or the like, got {got}")
        if value.shape != old.shape:
            raise ValueError(f"{name} must be {list(old.shape)}, got {list(value.shape)}")
        setattr(parent, last, value)

    def lay_out(self, layout: WeightLayout | None, device: torch.device | str) -> None:
        """Join the linears that read one input, and give NVFP4 weights the layout, or what kernels on `device` read."""
        groups = self.joined()
        for group in dict.fromkeys(groups.values()):
            group.join(layout, device)
        for name, module in self.named_modules():
            if isinstance(module, Linear) and not isinstance(module, Whole) and name not in groups:
                module.lay_out(layout, device)

    def joined(self) -> dict[str, Joined]:
        """By the canonical name of each part."""
        names = {module: name for name, module in self.named_modules() if isinstance(module, Linear)}
        groups = [module for module in self.modules() if isinstance(module, Joined)]
        return {names[part]: group for group in groups for part in group.parts}


class Layer(nn.Module):
    """Attention and experts, each between the two halves of a hyper-connection."""

    def __init__(self, config: ModelConfig, layer: int, build: Build) -> None:
        super().__init__()
        self.config = config
        streams, d = config.hc_mult, config.hidden_size
        mixes = streams * (streams + 2)  # pre, post, comb
        self.hc_attn_fn = build.fp32(mixes, streams * d)
        self.hc_attn_base, self.hc_attn_scale = build.fp32(mixes), build.fp32(3)
        self.attn_norm = build.vector(d)
        self.attn = Attention(config, layer, build.child("attn"))
        self.hc_ffn_fn = build.fp32(mixes, streams * d)
        self.hc_ffn_base, self.hc_ffn_scale = build.fp32(mixes), build.fp32(3)
        self.ffn_norm = build.vector(d)
        self.ffn = MoE(config, layer, build.child("ffn"))

    def forward(self, h: Tensor, last: Site | None, batch: Batch, cache: LayerCache) -> tuple[Tensor, Site]:
        """h: streams [tokens, streams, hidden]; last: the site that is yet to be closed on them. Returns the same."""
        h, x, *closing = self._enter(h, last, self.hc_attn_fn, self.hc_attn_base, self.hc_attn_scale, self.attn_norm)
        last = Site(self.attn(x, batch, cache), *closing)
        h, x, *closing = self._enter(h, last, self.hc_ffn_fn, self.hc_ffn_base, self.hc_ffn_scale, self.ffn_norm)
        return h, Site(self.ffn(x, batch.token_ids), *closing)

    def _enter(
        self, h: Tensor, last: Site | None, fn: Tensor, base: Tensor, scale: Tensor, norm: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The streams after the last site; the next one's normed input [tokens, hidden], post and comb."""
        norm_eps, eps, iterations = self.config.rms_norm_eps, self.config.hc_eps, self.config.hc_sinkhorn_iters
        if last is None:
            return h, *ops.hyper_connection_pre(
                h, fn, base, scale, norm, norm_eps=norm_eps, eps=eps, iterations=iterations
            )
        closed = (last.y, h, last.post, last.comb)
        return ops.hyper_connection_post_pre(
            *closed, fn, base, scale, norm, norm_eps=norm_eps, eps=eps, iterations=iterations
        )


class DraftBlock(Layer):
    """Multi-token prediction: from the streams at t and the token at t + 1, the token at t + 2.

    h⁰ = e_proj(enorm(embed(x[t + 1]))) + h_proj(hnorm(h[t])), each stream, at position t; then one window-only layer.
    As in DeepSeek's own code, the first position's embedding counts too (vLLM 0.33 zeroes it).
    """

    def __init__(self, config: ModelConfig, block: int, build: Build) -> None:
        super().__init__(config, config.num_hidden_layers + block, build)
        d = config.hidden_size
        self.e_proj, self.h_proj = build.linear("e_proj", d, d), build.linear("h_proj", d, d)
        self.enorm, self.hnorm, self.norm = build.vector(d), build.vector(d), build.vector(d)
        self.hc_head_fn, self.hc_head_base, self.hc_head_scale = _fold_weights(config, build)

    def forward(  # type: ignore[override]
        self, h: Tensor, embedded: Tensor, batch: Batch, cache: LayerCache, head: nn.Module
    ) -> tuple[Tensor, Tensor]:
        """h: [tokens, streams, hidden]; embedded: [tokens, hidden], next tokens. Returns FP32 logits and streams."""
        norm_eps, eps = self.config.rms_norm_eps, self.config.hc_eps
        e = self.e_proj(Normed(embedded, self.enorm, norm_eps))  # [tokens, hidden]
        h = e[:, None] + self.h_proj(Normed(h, self.hnorm, norm_eps))
        h, last = super().forward(h, None, batch, cache)
        h = ops.hyper_connection_post(last.y, h, last.post, last.comb)
        y = ops.hyper_connection_head(
            h, self.hc_head_fn, self.hc_head_base, self.hc_head_scale, self.norm, norm_eps=norm_eps, eps=eps
        )
        return head(y, torch.float32), h


def _fold_weights(config: ModelConfig, build: Build) -> tuple[Tensor, Tensor, Tensor]:
    """fn, base and scale of the hyper-connection that ends in one stream."""
    streams = config.hc_mult
    return build.fp32(streams, streams * config.hidden_size), build.fp32(streams), build.fp32(1)
