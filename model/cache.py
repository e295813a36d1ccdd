"""Everything that a sequence leaves behind for its next tokens, and the description of one step over many sequences.

A sequence occupies a slot. Its rows lie in pages, found through block tables that all layers share:

    window       one row a token, every layer; pages that no later query can reach are given back
    ratio r      one row for r tokens, in the layers of that ratio (in CSA layers, an indexer key beside it)
    ring         FP32, the last tokens of each compressor, at position mod ring; nothing to allocate, nothing to clear

`KVCache.prepare` turns (slot, new tokens) pairs into a `Batch`: every index that a forward pass needs, made once for
all layers. Prefill, chunked prefill and decode differ only in how many tokens a pair has.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4suite.formats import IndexCache, IndexFormat, KVFormat, PagedCache, index_layout, kv_layout
from fp4suite.reference import entry_slots, rope_frequencies, rope_table

from .config import CSA_RATIO, ModelConfig

WINDOW = 0  # the window's pool, among those of the ratios


class OutOfPages(RuntimeError):
    """A step or a sequence needs more pages than are free. Nothing was changed."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """What one ratio's layers need of a step."""

    slots: Tensor  # int32 [tokens], where the entry that a token completes goes; -1: it completes none
    rows: Tensor | None  # int32 [tokens, entries], all that a token sees, -1 behind; None: the indexer has to choose
    block_table: Tensor  # int32 [sequences, pages], -1 behind


@dataclass(frozen=True, slots=True)
class Batch:
    """One step: the new tokens of some sequences, one after the other."""

    token_ids: Tensor  # int64 [tokens]
    positions: Tensor  # int32 [tokens]
    sequence_ids: Tensor  # int32 [tokens], 0 .. sequences - 1
    cu_seqlens: Tensor  # int32 [sequences + 1]
    state_slots: Tensor  # int32 [sequences]
    last: Tensor  # int64 [sequences], the last token of each
    window_slots: Tensor  # int32 [tokens]
    window_rows: Tensor  # int32 [tokens, at most sliding_window], rising positions, -1 where there is none
    compressed: dict[int, Compressed]  # by ratio

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[0]


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's share. state: FP32 [slots, ring, 2, width]."""

    window: PagedCache
    table: Tensor  # FP32 [positions, rope], this layer's RoPE
    compressed: PagedCache | None = None
    state: Tensor | None = None
    index: IndexCache | None = None
    index_state: Tensor | None = None


class KVCache:
    """Caches for `slots` sequences of up to `max_tokens` tokens each, trunk layers first, then draft blocks.

    kv_format, index_format: of rows and indexer keys; "fp32" to compare with an FP32 model
    page_tokens: tokens under one page of compressed rows (page_tokens / ratio rows); window_page: rows of a window page
    pages:       pages by ratio (0: the window); by default enough for all slots at full length in one step each
    step_tokens: the most tokens of one sequence that a step may bring; bounds the default size of the window
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        slots: int = 1,
        max_tokens: int | None = None,
        kv_format: KVFormat = "bf16",
        index_format: IndexFormat = "bf16",
        page_tokens: int = 256,
        window_page: int = 64,
        pages: dict[int, int] | None = None,
        step_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.config = config
        self.max_tokens = config.max_position_embeddings if max_tokens is None else max_tokens
        if slots < 1 or self.max_tokens < 1:
            raise ValueError(f"slots and max_tokens must be positive, got {slots} and {self.max_tokens}")
        self.step_tokens = min(step_tokens or self.max_tokens, self.max_tokens)
        self.device = torch.device("cpu" if device is None else device)
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        ratios = [config.ratio(layer) for layer in range(layers)]
        self._page_rows = {WINDOW: window_page} | {r: max(1, page_tokens // r) for r in sorted({*ratios} - {0})}
        unknown = sorted({*(pages or {})} - {*self._page_rows})
        if unknown:
            raise ValueError(f"pages names ratios {unknown}; this model has {sorted(self._page_rows)}")
        sizes = {ratio: slots * self.pages_for(ratio, self.max_tokens) for ratio in self._page_rows} | (pages or {})
        self._pools = {
            ratio: _Pool(ratio, sizes[ratio], rows, slots, -(-self.max_tokens // max(1, ratio) // rows) + 1)
            for ratio, rows in self._page_rows.items()
        }
        self._lengths: dict[int, int] = {}  # by open slot
        self._free_slots = list(range(slots - 1, -1, -1))
        self.slots = slots

        tables = {compressed: self._rope(compressed) for compressed in {r > 0 for r in ratios}}
        self.layers = [self._layer(ratio, tables[ratio > 0], sizes, kv_format, index_format) for ratio in ratios]

    def pages_for(self, ratio: int, tokens: int) -> int:
        """Pages of one pool that a sequence of this length can hold at once."""
        rows = self._page_rows[ratio]
        if ratio:
            return -(-(tokens // ratio) // rows)
        # a step's rows and the window before them may begin and end inside a page
        reach = self.step_tokens + self.config.sliding_window - 1
        return min(-(-tokens // rows), -(-reach // rows) + 1)

    def open(self, tokens: int | None = None) -> int:
        """Take a slot for a new sequence; with `tokens`, also promise it the pages of that length.

        Raises OutOfPages if no slot is free or the promise cannot be kept beside those already made.
        """
        if not self._free_slots:
            raise OutOfPages(f"all {self.slots} sequence slots are taken")
        if tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"a sequence may have {self.max_tokens} tokens here, {tokens} were asked for")
        needs = {ratio: self.pages_for(ratio, tokens or 0) for ratio in self._pools}
        for ratio, pool in self._pools.items():
            if needs[ratio] > pool.available():
                raise OutOfPages(pool.shortage(needs[ratio], pool.available()))
        slot = self._free_slots.pop()
        for ratio, pool in self._pools.items():
            pool.open(slot, needs[ratio])
        self._lengths[slot] = 0
        return slot

    def close(self, slot: int) -> None:
        """Give a sequence's slot and pages back."""
        self._check_open(slot)
        for pool in self._pools.values():
            pool.close(slot)
        del self._lengths[slot]
        self._free_slots.append(slot)

    def length(self, slot: int) -> int:
        """Tokens that the sequence in `slot` has so far."""
        self._check_open(slot)
        return self._lengths[slot]

    def free_pages(self) -> dict[int, int]:
        """Pages in nobody's hands, by ratio (0: the window)."""
        return {ratio: len(pool.free) for ratio, pool in self._pools.items()}

    def prepare(self, requests: Sequence[tuple[int, Sequence[int]]]) -> Batch:
        """Make room for the next tokens of some sequences and describe the step. The tokens count as done from here on.

        Raises ValueError for a closed or repeated slot, no tokens, or a sequence grown too long, and OutOfPages; in
        either case nothing has changed.
        """
        spans = self._check(requests)
        self._allocate(spans)
        for slot, (_, end) in spans.items():
            self._lengths[slot] = end

        counts = torch.tensor([len(ids) for _, ids in requests])
        starts = torch.tensor([start for start, _ in spans.values()])
        cu_seqlens = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
        sequence = torch.repeat_interleave(torch.arange(len(requests)), counts)  # [tokens]
        position = torch.arange(len(sequence)) - cu_seqlens[sequence] + starts[sequence]
        longest = int(position.max()) + 1

        window_table = self._pools[WINDOW].table(list(spans))
        window_size = self._page_rows[WINDOW]
        reach = min(self.config.sliding_window, longest)
        window = position[:, None] - torch.arange(reach - 1, -1, -1)  # [tokens, reach]
        compressed = {}
        for ratio in self._pools.keys() - {WINDOW}:
            size, table = self._page_rows[ratio], self._pools[ratio].table(list(spans))
            entry = (position + 1) // ratio  # visible to the token; the last of them may be its own
            completes = (position + 1) % ratio == 0
            own = torch.where(completes, entry - 1, -1)[:, None]
            rows = None
            if ratio != CSA_RATIO or longest // ratio <= self.config.index_topk:
                every = torch.arange(longest // ratio).expand(len(position), -1)
                every = torch.where(every < entry[:, None], every, -1)
                rows = self._send(entry_slots(every, table, sequence, size))
            own = self._send(entry_slots(own, table, sequence, size).squeeze(1))
            compressed[ratio] = Compressed(own, rows, self._send(table))
        return Batch(
            token_ids=torch.tensor([i for _, ids in requests for i in ids], dtype=torch.int64).to(self.device),
            positions=self._send(position),
            sequence_ids=self._send(sequence),
            cu_seqlens=self._send(cu_seqlens),
            state_slots=self._send(torch.tensor(list(spans))),
            last=(cu_seqlens[1:] - 1).to(self.device),
            window_slots=self._send(entry_slots(position[:, None], window_table, sequence, window_size).squeeze(1)),
            window_rows=self._send(entry_slots(window, window_table, sequence, window_size)),
            compressed=compressed,
        )

    def bytes(self) -> int:
        """Bytes of all pages and states."""
        parts = [t for c in self.layers for t in (c.window, c.compressed, c.index) if t is not None]
        states = [t for c in self.layers for t in (c.state, c.index_state) if t is not None]
        return sum(p.data.nbytes for p in parts) + sum(s.nbytes for s in states)

    def _check(self, requests: Sequence[tuple[int, Sequence[int]]]) -> dict[int, tuple[int, int]]:
        """(first position, end) of each slot's new tokens."""
        if not requests:
            raise ValueError("a step needs at least one sequence")
        spans: dict[int, tuple[int, int]] = {}
        for slot, ids in requests:
            start = self.length(slot)
            end = start + len(ids)
            if slot in spans:
                raise ValueError(f"slot {slot} appears twice in one step")
            if not len(ids):
                raise ValueError(f"slot {slot} brings no tokens")
            if end > self.max_tokens:
                raise ValueError(f"slot {slot} would grow to {end} tokens, the cache is made for {self.max_tokens}")
            if len(ids) > self.step_tokens:
                raise ValueError(f"slot {slot} brings {len(ids)} tokens, a step takes {self.step_tokens} of a sequence")
            wrong = [i for i in ids if not 0 <= i < self.config.vocab_size]
            if wrong:
                raise ValueError(f"token id {wrong[0]} is outside the vocabulary of {self.config.vocab_size}")
            spans[slot] = (start, end)
        return spans

    def _allocate(self, spans: dict[int, tuple[int, int]]) -> None:
        wanted: dict[int, dict[int, range]] = {}  # ratio -> slot -> logical pages to hold from here on
        for ratio, pool in self._pools.items():
            wanted[ratio] = {}
            for slot, (start, end) in spans.items():
                # window rows before this one are out of reach of every query from `start` on
                first = max(0, start - self.config.sliding_window + 1) if ratio == WINDOW else 0
                rows = end // ratio if ratio else end
                wanted[ratio][slot] = range(first // pool.page_rows, -(-rows // pool.page_rows))
            pool.check(wanted[ratio])
        for ratio, pool in self._pools.items():
            pool.hold(wanted[ratio])

    def _send(self, x: Tensor) -> Tensor:
        return x.to(device=self.device, dtype=torch.int32)

    def _check_open(self, slot: int) -> None:
        if slot not in self._lengths:
            raise ValueError(f"slot {slot} is not open")

    def _rope(self, compressed: bool) -> Tensor:
        config, scaling = self.config, self.config.rope_scaling
        if compressed:
            frequencies = rope_frequencies(
                config.qk_rope_head_dim,
                config.compress_rope_theta,
                factor=scaling.factor,
                original_max_position=scaling.original_max_position_embeddings,
                beta_fast=scaling.beta_fast,
                beta_slow=scaling.beta_slow,
            )
        else:
            frequencies = rope_frequencies(config.qk_rope_head_dim, config.rope_theta)
        return rope_table(frequencies, self.max_tokens).to(self.device)

    def _layer(
        self, ratio: int, table: Tensor, sizes: dict[int, int], kv_format: KVFormat, index_format: IndexFormat
    ) -> LayerCache:
        config = self.config
        d, rope = config.head_dim, config.qk_rope_head_dim

        def rows(ratio: int) -> PagedCache:
            page = self._page_rows[ratio]
            size = kv_layout(kv_format, page, d, rope).page_bytes
            return PagedCache(self._zeros(sizes[ratio], size), kv_format, page, d, rope)

        if not ratio:
            return LayerCache(rows(WINDOW), table)
        lanes = 2 if ratio == CSA_RATIO else 1
        state = torch.zeros(self.slots, lanes * ratio, 2, lanes * d, device=self.device)
        if ratio != CSA_RATIO:
            return LayerCache(rows(WINDOW), table, rows(ratio), state)
        page, di = self._page_rows[ratio], config.index_head_dim
        size = index_layout(index_format, page, di).page_bytes
        index = IndexCache(self._zeros(sizes[ratio], size), index_format, page, di)
        index_state = torch.zeros(self.slots, lanes * ratio, 2, lanes * di, device=self.device)
        return LayerCache(rows(WINDOW), table, rows(ratio), state, index, index_state)

    def _zeros(self, pages: int, size: int) -> Tensor:
        return torch.zeros(pages, size, dtype=torch.uint8, device=self.device)


class _Pool:
    """Pages of one kind. `blocks` [slots, logical pages] holds physical pages, -1 outside the range a slot holds."""

    def __init__(self, ratio: int, size: int, page_rows: int, slots: int, logical_pages: int) -> None:
        self.ratio, self.size, self.page_rows = ratio, size, page_rows
        self.free = list(range(size - 1, -1, -1))
        self.blocks = torch.full((slots, max(1, logical_pages)), -1)
        self.held: dict[int, range] = {}
        self.promised: dict[int, int] = {}

    def open(self, slot: int, promised: int) -> None:
        self.held[slot], self.promised[slot] = range(0), promised

    def close(self, slot: int) -> None:
        self.hold({slot: range(0)})
        del self.held[slot], self.promised[slot]

    def available(self) -> int:
        """Free pages beyond what has been promised and not yet taken."""
        return len(self.free) - sum(self._owed(slot, len(self.held[slot])) for slot in self.held)

    def check(self, wanted: dict[int, range]) -> None:
        """Raises OutOfPages unless the slots can hold `wanted` while every promise can still be kept."""
        need = sum(len(pages) - len(self.held[slot]) for slot, pages in wanted.items())
        owed = sum(self._owed(slot, len(wanted.get(slot, pages))) for slot, pages in self.held.items())
        if need > 0 and need + owed > len(self.free):
            raise OutOfPages(self.shortage(need, len(self.free) - owed))

    def hold(self, wanted: dict[int, range]) -> None:
        """Give back the pages outside `wanted`, then take those that are missing."""
        for slot, pages in wanted.items():
            for page in self.held[slot]:
                if page in pages:
                    break  # both are runs, and a slot's run only moves forward
                self.free.append(int(self.blocks[slot, page]))
                self.blocks[slot, page] = -1
        for slot, pages in wanted.items():
            for page in range(max(pages.start, self.held[slot].stop), pages.stop):
                self.blocks[slot, page] = self.free.pop()
            self.held[slot] = pages

    def table(self, slots: list[int]) -> Tensor:
        """int64 [sequences, pages]: as many columns as the longest of these slots has pages."""
        return self.blocks[slots, : max(1, *(self.held[slot].stop for slot in slots))]

    def shortage(self, need: int, have: int) -> str:
        name = "the window" if self.ratio == WINDOW else f"ratio {self.ratio}"
        return f"{name} needs {need} more pages of {self.page_rows} rows, {max(0, have)} of {self.size} are to be had"

    def _owed(self, slot: int, held: int) -> int:
        return max(0, self.promised[slot] - held)
