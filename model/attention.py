"""Attention of one layer: the last rows of a window, and compressed rows of all that lies before.

K = V, one KV head. A ratio of 0 is window only; ratio 4 (CSA) adds the compressed entries that an indexer picks; any
other ratio (HCA) adds all of them. The cache is written first and read after, so that a query sees its own token, and
the entry that its own token completes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fp4suite import by_token, ops
from fp4suite.formats import IndexCache, NVFP4Tensor, PagedCache
from fp4suite.reference import CompressorStep

from .cache import Batch, LayerCache
from .config import CSA_RATIO, ModelConfig
from .inputs import Input, Normed
from .joined import Joined
from .linear import Build, plain


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, build: Build) -> None:
        super().__init__()
        self.config, self.ratio = config, config.ratio(layer)
        d, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        groups, rank = config.o_groups, config.o_lora_rank
        self.wq_a = build.linear("wq_a", config.q_lora_rank, d)
        self.q_norm = build.vector(config.q_lora_rank)
        self.wq_b = build.linear("wq_b", heads * head_dim, config.q_lora_rank)
        self.wkv = build.linear("wkv", head_dim, d)
        self.kv_norm = build.vector(head_dim)
        self.wo_a = build.weight("wo_a", (groups * rank, heads // groups * head_dim))  # one [rank, k] matrix a group
        self.wo_b = build.linear("wo_b", d, groups * rank)
        self.attn_sink = build.fp32(heads)
        queries, sums = [self.wq_b], []
        if self.ratio:
            self.compressor = Compressor(config, self.ratio, head_dim, build.child("compressor"))
            sums += [self.compressor.wkv, self.compressor.wgate]
        if self.ratio == CSA_RATIO:
            self.indexer = Indexer(config, build.child("indexer"))
            queries += [self.indexer.wq_b]
            sums += [self.indexer.compressor.wkv, self.indexer.compressor.wgate, self.indexer.weights_proj]
        self.latents = Joined(self.wq_a, self.wkv)  # of x
        self.sums = Joined(*sums)  # of x, in FP32
        self.queries = Joined(*queries)  # of the normed q_a

    def forward(self, x: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """x [tokens, hidden], normed -> [tokens, hidden]."""
        read = Input(x)
        q_a, kv = self.latents(read)
        c_q = self._store_window(q_a, kv, batch, cache)
        caches, rows = [cache.window], [batch.window_rows]
        index_weights = self._compress(self.sums(read, torch.float32), batch, cache) if self.ratio else None
        if index_weights is not None and batch.compressed[self.ratio].rows is None:
            q, index_q = self.queries(c_q)
            q, chosen = self.indexer(self._heads(q), index_q, index_weights, batch, cache)
        else:  # every entry that a token sees is chosen
            (q,) = self.queries(c_q, first=1)
            q = ops.qnorm_rope(self._heads(q), batch.positions, cache.table, self.config.rms_norm_eps)
            chosen = batch.compressed[self.ratio].rows if self.ratio else None
        if chosen is not None:
            assert cache.compressed is not None
            caches.append(cache.compressed)
            rows.append(chosen)
        o = ops.sparse_attention(q, caches, rows, self.attn_sink, self.config.head_dim**-0.5)
        o = ops.rope_inverse_(o, batch.positions, cache.table)  # [tokens, heads, head_dim]
        return self.wo_b(self._grouped(o.flatten(1)))

    def _heads(self, q: Tensor) -> Tensor:
        """[tokens, heads · head_dim] -> [tokens, heads, head_dim]."""
        return q.unflatten(-1, (self.config.num_attention_heads, self.config.head_dim))

    def _store_window(self, q_a: Tensor, kv: Tensor, batch: Batch, cache: LayerCache) -> Input:
        """Norm and store the window's rows kv [tokens, head_dim]; what queries are made of, from q_a [tokens, rank]."""
        eps = self.config.rms_norm_eps
        store = (kv, self.kv_norm, batch.positions, cache.table, eps, cache.window, batch.window_slots)
        if self.wq_b.reads_nvfp4:  # one launch norms and quantises, with no rounding between
            ops.kv_norm_rope_insert(*store)
            return Normed(q_a, self.q_norm, eps)
        return Input(ops.qkv_norm_rope_insert(q_a, self.q_norm, *store))

    def _compress(self, sums: Sequence[Tensor], batch: Batch, cache: LayerCache) -> Tensor | None:
        """Take in sums, FP32 [tokens, width] each; store the entries that these tokens complete.

        sums: values and gates of the compressor; in CSA layers those of the indexer's keys too, and the indexer's
        weights, which are given back.
        """
        assert cache.compressed is not None
        assert cache.state is not None
        own = self.compressor.step(sums[0], sums[1], cache.state, cache.compressed)
        step: dict[str, Any] = {
            "positions": batch.positions,
            "sequence_ids": batch.sequence_ids,
            "cu_seqlens": batch.cu_seqlens,
            "state_slots": batch.state_slots,
            "slots": batch.compressed[self.ratio].slots,
            "ratio": self.ratio,
        }
        table, eps = cache.table, self.config.rms_norm_eps
        if self.ratio != CSA_RATIO:
            ops.compress_kv(own.kv, own.gate, own.ape, own.weight, table, eps, own.state, own.cache, **step)
            return None
        assert cache.index is not None
        assert cache.index_state is not None
        keys = self.indexer.compressor.step(sums[2], sums[3], cache.index_state, cache.index)
        ops.compress_kv_pair(own, keys, table, eps, **step)
        return sums[4]

    def _grouped(self, o: Tensor) -> Tensor:
        """o [tokens, groups · k] -> [tokens, groups · rank]: each group of heads through its own part of wo_a."""
        groups, rank = self.config.o_groups, self.config.o_lora_rank
        tokens, weight = len(o), self.wo_a.weight
        o = o.unflatten(1, (groups, -1))  # [tokens, groups, k]
        if isinstance(weight, NVFP4Tensor):
            o = o.transpose(0, 1)  # [groups, tokens, k]
            weight = weight.with_order("rows").with_sf_layout("linear")
            data, sf = (t.unflatten(0, (groups, rank)) for t in (weight.data, weight.sf))
            offsets = torch.arange(groups + 1, dtype=torch.int32, device=o.device) * tokens
            z = ops.grouped_gemm_nvfp4(o.flatten(0, 1), NVFP4Tensor(data, sf, weight.alpha), offsets, out_dtype=o.dtype)
            z = z.unflatten(0, (groups, tokens)).transpose(0, 1)
        else:
            w = plain(weight, o.dtype).unflatten(0, (groups, rank)).transpose(1, 2)
            z = by_token.each(lambda x: _by_group(x, w), o)
        return z.flatten(1)  # [tokens, groups, rank] -> [tokens, groups · rank]


def _by_group(x: Tensor, w: Tensor) -> Tensor:
    """x [tokens, groups, k] @ w [groups, k, rank] -> [tokens, groups, rank], written as it is read next."""
    out = x.new_empty(*x.shape[:2], w.shape[2])
    torch.bmm(x.transpose(0, 1), w, out=out.transpose(0, 1))
    return out


class Compressor(nn.Module):
    """Pools `ratio` tokens (twice as many, overlapping, in CSA layers) to one row; also the indexer's keys."""

    def __init__(self, config: ModelConfig, ratio: int, head_dim: int, build: Build) -> None:
        super().__init__()
        width = head_dim * (2 if ratio == CSA_RATIO else 1)
        self.wkv = build.linear("wkv", width, config.hidden_size)
        self.wgate = build.linear("wgate", width, config.hidden_size)
        self.ape = build.fp32(ratio, width)
        self.norm = build.vector(head_dim)

    def step(self, kv: Tensor, gate: Tensor, state: Tensor, cache: PagedCache | IndexCache) -> CompressorStep:
        """What wkv and wgate make of a step's tokens, FP32 [tokens, width] each, and where it goes."""
        hadamard = isinstance(cache, IndexCache) and _hadamard(cache)
        return CompressorStep(kv, gate, self.ape, self.norm, state, cache, hadamard)


class Indexer(nn.Module):
    """Picks the compressed entries that each query attends to."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        self.wq_b = build.linear("wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
        self.weights_proj = build.linear("weights_proj", config.index_n_heads, config.hidden_size)
        self.compressor = Compressor(config, CSA_RATIO, config.index_head_dim, build.child("compressor"))

    def forward(
        self, q: Tensor, index_q: Tensor, weights: Tensor, batch: Batch, cache: LayerCache
    ) -> tuple[Tensor, Tensor]:
        """The attention's queries, normed and turned, and what they attend to; the keys are stored already.

        q: [tokens, heads, head_dim], gives the same; index_q: [tokens, index heads · index_head_dim]; weights: FP32
        [tokens, index heads]. Attended to are slots of entries, int32 [tokens, rows], -1 behind.
        """
        assert cache.index is not None
        step, heads, head_dim = batch.compressed[CSA_RATIO], self.config.index_n_heads, self.config.index_head_dim
        index_q = index_q.unflatten(-1, (heads, head_dim))
        at = (batch.positions, cache.table, self.config.rms_norm_eps)
        if cache.index.format == "fp8":  # multiplied as they are stored
            q, index_q, weights = ops.csa_queries_fp8(q, index_q, weights, *at)
        else:
            hadamard = _hadamard(cache.index)
            q, index_q = ops.csa_queries(q, index_q, *at, format=cache.index.format, hadamard=hadamard)
        logits = ops.index_logits(
            index_q,
            weights,
            cache.index,
            step.block_table,
            positions=batch.positions,
            sequence_ids=batch.sequence_ids,
            ratio=CSA_RATIO,
            scale=head_dim**-0.5 * heads**-0.5,
        )  # [tokens, entries]
        return q, ops.index_topk(
            logits,
            step.block_table,
            positions=batch.positions,
            sequence_ids=batch.sequence_ids,
            ratio=CSA_RATIO,
            topk=self.config.index_topk,
            page_size=cache.index.page_size,
        )


def _hadamard(cache: IndexCache) -> bool:
    """Rotating queries and keys by a Hadamard matrix cancels in their product; it only makes four bits lose less."""
    return cache.format == "mxfp4"
