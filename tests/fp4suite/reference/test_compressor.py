"""Compressed entries against loops in FP64: overlap and none, ragged steps, chunks, reused and padded slots."""

import math
import random

import pytest
import torch
from torch import Tensor

from fp4suite.formats import IndexCache, PagedCache, index_layout, kv_layout
from fp4suite.reference import compress_kv, hadamard_transform, read_rows, rope_frequencies, rope_table

D, ROPE, EPS = 24, 8, 1e-6
FREQ = rope_frequencies(ROPE, 160000.0)
TABLE = rope_table(FREQ, 512)


def expected(kv: Tensor, gate: Tensor, ape: Tensor, weight: Tensor, ratio: int) -> Tensor:
    """All entries [tokens // ratio, D] of one sequence, one channel at a time."""
    lanes = kv.shape[1] // D
    out = []
    for i in range(len(kv) // ratio):
        pool = [(t, kv.shape[1] - D) for t in range(ratio * i, ratio * (i + 1))]  # (token, first channel of its lane)
        if lanes == 2 and i:
            pool += [(t, 0) for t in range(ratio * (i - 1), ratio * i)]
        entry = []
        for c in range(D):
            score = [float(gate[t, lane + c].double() + ape[t % ratio, lane + c].double()) for t, lane in pool]
            top = max(score)
            share = [math.exp(s - top) for s in score]
            entry.append(sum(p * float(kv[t, lane + c]) for p, (t, lane) in zip(share, pool, strict=True)) / sum(share))
        mean = sum(x * x for x in entry) / D
        entry = [x / math.sqrt(mean + EPS) * float(w) for x, w in zip(entry, weight, strict=True)]
        for j in range(ROPE // 2):
            angle, k = ratio * i * float(FREQ[j]), D - ROPE + 2 * j
            a, b = entry[k], entry[k + 1]
            entry[k], entry[k + 1] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
        out.append(entry)
    return torch.tensor(out, dtype=torch.float64).view(-1, D)


class Compressor:
    """One layer's state and cache; page 0 .. of sequence s start at entry 64 s."""

    def __init__(self, ratio: int, lanes: int, *, slots: int = 3, extra: int = 0, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.ratio, self.lanes = ratio, lanes
        self.ape = torch.randn(ratio, lanes * D, generator=g)
        self.weight = 1 + 0.3 * torch.randn(D, generator=g)
        # nothing that is not written may be read
        self.state = torch.full((slots, lanes * ratio + extra, 2, lanes * D), float("nan"))
        data = torch.full((4 * slots, kv_layout("fp32", 16, D, ROPE).page_bytes), 0xFF, dtype=torch.uint8)
        self.cache = PagedCache(data, "fp32", 16, D, ROPE)

    def step(self, parts: list[tuple[int, int, Tensor, Tensor]], padding: int = 0) -> None:
        """(state slot, first position, kv, gate) of each sequence, then padding tokens full of NaN."""
        sizes = [len(kv) for _, _, kv, _ in parts]
        positions = torch.cat([torch.arange(at, at + n) for (_, at, _, _), n in zip(parts, sizes, strict=True)])
        owner = torch.tensor([slot for (slot, _, _, _), n in zip(parts, sizes, strict=True) for _ in range(n)])
        sequences = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(sizes))
        done = (positions + 1) % self.ratio == 0
        slots = torch.where(done, 64 * owner + positions // self.ratio, -1)
        junk = torch.full((padding, parts[0][2].shape[1]), float("nan"))
        pad = torch.full((padding,), -1)
        compress_kv(
            torch.cat([kv for _, _, kv, _ in parts] + [junk]),
            torch.cat([gate for _, _, _, gate in parts] + [junk]),
            self.ape,
            self.weight,
            TABLE,
            EPS,
            self.state,
            self.cache,
            positions=torch.cat((positions, self.ratio - 1 - 0 * pad)).int(),
            sequence_ids=torch.cat((sequences, pad)).int(),
            cu_seqlens=torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()]).int(),
            state_slots=torch.tensor([slot for slot, _, _, _ in parts]).int(),
            slots=torch.cat((slots, 0 * pad)).int(),
            ratio=self.ratio,
        )

    def entries(self, slot: int, count: int) -> Tensor:
        return read_rows(self.cache, (64 * slot + torch.arange(count)).int()).double()


def inputs(tokens: int, lanes: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, lanes * D, generator=g), 3 * torch.randn(tokens, lanes * D, generator=g)


@pytest.mark.parametrize(("ratio", "lanes"), [(4, 2), (8, 1), (3, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize("chunks", [(50,), (1,) * 50, (3, 1, 1, 9, 2, 20, 14), (7, 43), (8, 8, 8, 8, 8, 8, 2)])
def test_one_sequence_in_chunks(ratio: int, lanes: int, chunks: tuple[int, ...]) -> None:
    one, (kv, gate) = Compressor(ratio, lanes), inputs(50, lanes, seed=ratio)
    at = 0
    for size in chunks:
        one.step([(1, at, kv[at : at + size], gate[at : at + size])])
        at += size
    want = expected(kv, gate, one.ape, one.weight, ratio)
    torch.testing.assert_close(one.entries(1, 50 // ratio), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("ratio", "lanes"), [(4, 2), (8, 1)])
@pytest.mark.parametrize("extra", [0, 3])
def test_ragged_steps_with_padding(ratio: int, lanes: int, extra: int) -> None:
    """Three sequences in steps of random sizes and order, a ring longer than needed, NaN padding behind."""
    dice, many = random.Random(ratio), Compressor(ratio, lanes, extra=extra)
    data = {slot: inputs(40 + 7 * slot, lanes, seed=slot) for slot in range(3)}
    at = dict.fromkeys(data, 0)
    while any(at[s] < len(data[s][0]) for s in data):
        parts = []
        for slot in dice.sample(sorted(data), dice.randint(1, 3)):
            kv, gate = data[slot]
            size = min(dice.choice((1, 1, 2, 5, 13)), len(kv) - at[slot])
            if size:
                parts.append((slot, at[slot], kv[at[slot] : at[slot] + size], gate[at[slot] : at[slot] + size]))
                at[slot] += size
        if parts:
            many.step(parts, padding=dice.randint(0, 3))
    for slot, (kv, gate) in data.items():
        want = expected(kv, gate, many.ape, many.weight, ratio)
        torch.testing.assert_close(many.entries(slot, len(kv) // ratio), want, rtol=0, atol=2e-5)


def test_a_reused_slot_starts_afresh() -> None:
    one = Compressor(4, 2)
    for seed in (1, 2):
        kv, gate = inputs(21, 2, seed=seed)
        for at in range(0, 21, 3):
            one.step([(0, at, kv[at : at + 3], gate[at : at + 3])])
        want = expected(kv, gate, one.ape, one.weight, 4)
        torch.testing.assert_close(one.entries(0, 5), want, rtol=0, atol=2e-5)


def test_extreme_gates() -> None:
    """Scores apart by more than FP32's exponent range: the larger takes all, nothing overflows."""
    one, (kv, gate) = Compressor(8, 1), inputs(8, 1, seed=5)
    gate[3] = 300.0
    gate[5] = -1e30
    one.step([(0, 0, kv, gate)])
    torch.testing.assert_close(one.entries(0, 1), expected(kv, gate, one.ape, one.weight, 8), rtol=0, atol=2e-5)


def test_index_entries_are_turned_by_hadamard() -> None:
    """After norm and RoPE; against the plain matrix (-1)^popcount(i & j) / sqrt(n)."""
    d, ratio = 32, 4
    g = torch.Generator().manual_seed(0)
    kv, gate = torch.randn(4, 2 * d, generator=g), torch.randn(4, 2 * d, generator=g)
    stored = []
    for hadamard in (False, True):
        data = torch.zeros(1, index_layout("fp32", 4, d).page_bytes, dtype=torch.uint8)
        cache = IndexCache(data, "fp32", 4, d)
        compress_kv(
            kv, gate, torch.zeros(ratio, 2 * d), torch.ones(d), rope_table(FREQ, 8), EPS,
            torch.zeros(1, 8, 2, 2 * d), cache,
            positions=torch.arange(4).int(), sequence_ids=torch.zeros(4).int(), cu_seqlens=torch.tensor([0, 4]).int(),
            state_slots=torch.zeros(1).int(), slots=torch.tensor([-1, -1, -1, 2]).int(), ratio=ratio, hadamard=hadamard,
        )  # fmt: skip
        stored.append(read_rows(cache, torch.tensor([2]).int())[0])
    matrix = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(d)] for i in range(d)]) / math.sqrt(d)
    torch.testing.assert_close(stored[1], matrix @ stored[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(hadamard_transform(stored[1]), stored[0], rtol=0, atol=1e-6)


def test_wrong_shapes() -> None:
    one, (kv, gate) = Compressor(4, 2), inputs(4, 2, seed=0)
    one.state = one.state[:, :7]
    with pytest.raises(ValueError, match=r"state must be \[slots, at least 8, 2, 48\]"):
        one.step([(0, 0, kv, gate)])
    with pytest.raises(ValueError, match="kv must be"):
        one.step([(0, 0, kv[:, :30], gate[:, :30])])
    with pytest.raises(ValueError, match="power of two"):
        hadamard_transform(torch.ones(3, 24))
