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
from .linear import Build


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
        if self.ratio:
            self.compressor = Compressor(config, self.ratio, head_dim, build.child("compressor"))
        if self.ratio == CSA_RATIO:
            self.indexer = Indexer(config, build.child("indexer"))

    def forward(self, x: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """x [tokens, hidden], normed -> [tokens, hidden]."""
        heads, head_dim, eps = self.config.num_attention_heads, self.config.head_dim, self.config.rms_norm_eps
        read = Input(x)
        c_q = Normed(self.wq_a(read), self.q_norm, eps)  # [tokens, q_lora_rank]
        q = self.wq_b(c_q).unflatten(-1, (heads, head_dim))
        q = ops.qnorm_rope(q, batch.positions, cache.table, eps)  # [tokens, heads, head_dim]
        ops.kv_norm_rope_insert(
            self.wkv(read), self.kv_norm, batch.positions, cache.table, eps, cache.window, batch.window_slots
        )
        caches, rows = [cache.window], [batch.window_rows]
        if self.ratio:
            assert cache.compressed is not None
            assert cache.state is not None
            self.compressor(read, batch, cache.table, cache.state, cache.compressed)
            chosen = (
                self.indexer(read, c_q, batch, cache) if self.ratio == CSA_RATIO else batch.compressed[self.ratio].rows
            )
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
            w = self.wo_a.plain(o.dtype).unflatten(0, (groups, rank)).transpose(1, 2)
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
        x: Input,
        batch: Batch,
        table: Tensor,
        state: Tensor,
        cache: PagedCache | IndexCache,
        hadamard: bool = False,
    ) -> None:
        """Take in x [tokens, hidden]; store the entries that these tokens complete. Sums stay FP32 throughout."""
        ops.compress_kv(
            self.wkv(x, torch.float32),
            self.wgate(x, torch.float32),
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

    def forward(self, x: Input, c_q: Input, batch: Batch, cache: LayerCache) -> Tensor:
        """x [tokens, hidden], c_q [tokens, q_lora_rank] -> slots of the entries, int32 [tokens, rows], -1 behind."""
        assert cache.index is not None
        assert cache.index_state is not None
        step, heads, head_dim = batch.compressed[CSA_RATIO], self.config.index_n_heads, self.config.index_head_dim
        # rotating q and k by a Hadamard matrix cancels in q · k; it only makes four bits lose less
        hadamard = cache.index.format == "mxfp4"
        self.compressor(x, batch, cache.table, cache.index_state, cache.index, hadamard)
        if step.rows is not None:  # every visible entry is chosen: nothing to score
            return step.rows
        q = self.wq_b(c_q).unflatten(-1, (heads, head_dim))
        weights = self.weights_proj(x, torch.float32)  # [tokens, heads]
        if cache.index.format == "fp8":  # multiplied as they are stored
            q, weights = ops.index_query_fp8(q, weights, batch.positions, cache.table)
        else:
            q = ops.index_query(q, batch.positions, cache.table, format=cache.index.format, hadamard=hadamard)
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
