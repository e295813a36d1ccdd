"""Attention of one layer: the last rows of a window, and compressed rows of all that lies before.

K = V, one KV head. A ratio of 0 is window only; ratio 4 (CSA) adds the compressed entries that an indexer picks; any
other ratio (HCA) adds all of them. The cache is written first and read after, so that a query sees its own token, and
the entry that its own token completes.
"""

import torch
from torch import Tensor, nn

from fp4suite import by_token, ops
from fp4suite.formats import IndexCache, NVFP4Tensor, PagedCache

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
        heads, head_dim, eps = self.config.num_attention_heads, self.config.head_dim, self.config.rms_norm_eps
        read = Input(x)
        q_a, kv = self.latents(read)
        ops.kv_norm_rope_insert(kv, self.kv_norm, batch.positions, cache.table, eps, cache.window, batch.window_slots)
        caches, rows = [cache.window], [batch.window_rows]
        chooses = self.ratio == CSA_RATIO and batch.compressed[CSA_RATIO].rows is None
        q, *index_q = self.queries(Normed(q_a, self.q_norm, eps), first=2 if chooses else 1)
        q = ops.qnorm_rope(q.unflatten(-1, (heads, head_dim)), batch.positions, cache.table, eps)
        if self.ratio:
            assert cache.compressed is not None
            assert cache.state is not None
            sums = self.sums(read, torch.float32, first=None if chooses or self.ratio != CSA_RATIO else 4)
            self.compressor(sums[0], sums[1], batch, cache.table, cache.state, cache.compressed)
            if self.ratio == CSA_RATIO:
                self.indexer.compress(sums[2], sums[3], batch, cache)
            chosen = self.indexer(*index_q, sums[4], batch, cache) if chooses else batch.compressed[self.ratio].rows
            assert chosen is not None
            caches.append(cache.compressed)
            rows.append(chosen)
        o = ops.sparse_attention(q, caches, rows, self.attn_sink, head_dim**-0.5)  # [tokens, heads, head_dim]
        o = ops.rope_inverse(o, batch.positions, cache.table)
        return self.wo_b(self._grouped(o.flatten(1)))

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
        self.ratio, self.eps = ratio, config.rms_norm_eps
        width = head_dim * (2 if ratio == CSA_RATIO else 1)
        self.wkv = build.linear("wkv", width, config.hidden_size)
        self.wgate = build.linear("wgate", width, config.hidden_size)
        self.ape = build.fp32(ratio, width)
        self.norm = build.vector(head_dim)

    def forward(
        self,
        kv: Tensor,
        gate: Tensor,
        batch: Batch,
        table: Tensor,
        state: Tensor,
        cache: PagedCache | IndexCache,
        hadamard: bool = False,
    ) -> None:
        """Take in what wkv and wgate make of x, FP32 [tokens, width]; store the entries that these tokens complete."""
        ops.compress_kv(
            kv,
            gate,
            self.ape,
            self.norm,
            table,
            self.eps,
            state,
            cache,
            positions=batch.positions,
            sequence_ids=batch.sequence_ids,
            cu_seqlens=batch.cu_seqlens,
            state_slots=batch.state_slots,
            slots=batch.compressed[self.ratio].slots,
            ratio=self.ratio,
            hadamard=hadamard,
        )


class Indexer(nn.Module):
    """Picks the compressed entries that each query attends to."""

    def __init__(self, config: ModelConfig, build: Build) -> None:
        super().__init__()
        self.config = config
        self.wq_b = build.linear("wq_b", config.index_n_heads * config.index_head_dim, config.q_lora_rank)
        self.weights_proj = build.linear("weights_proj", config.index_n_heads, config.hidden_size)
        self.compressor = Compressor(config, CSA_RATIO, config.index_head_dim, build.child("compressor"))

    def compress(self, kv: Tensor, gate: Tensor, batch: Batch, cache: LayerCache) -> None:
        """Keys of the entries that these tokens complete, from what the compressor's wkv and wgate make of x."""
        assert cache.index is not None
        assert cache.index_state is not None
        self.compressor(kv, gate, batch, cache.table, cache.index_state, cache.index, _hadamard(cache.index))

    def forward(self, q: Tensor, weights: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """Slots of the entries that these tokens attend to, int32 [tokens, rows], -1 behind; keys are stored already.

        q: [tokens, index heads * index_head_dim]; weights: FP32 [tokens, index heads].
        """
        assert cache.index is not None
        step, heads, head_dim = batch.compressed[CSA_RATIO], self.config.index_n_heads, self.config.index_head_dim
        q = q.unflatten(-1, (heads, head_dim))
        if cache.index.format == "fp8":  # multiplied as they are stored
            q, weights = ops.index_query_fp8(q, weights, batch.positions, cache.table)
        else:
            q = ops.index_query(
                q, batch.positions, cache.table, format=cache.index.format, hadamard=_hadamard(cache.index)
            )
        scale = head_dim**-0.5 * heads**-0.5
        logits = ops.index_logits(
            q,
            weights,
            cache.index,
            step.block_table,
            positions=batch.positions,
            sequence_ids=batch.sequence_ids,
            ratio=CSA_RATIO,
            scale=scale,
        )  # [tokens, entries]
        return ops.index_topk(
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
