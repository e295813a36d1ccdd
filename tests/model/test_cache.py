"""Page tables, slots and promises of the paged caches, and the batches made from them."""

import random
from dataclasses import replace

import pytest

from model.cache import WINDOW, KVCache, OutOfPages
from model.config import ModelConfig
from tests.model.oracle import SMALL, cache_for


def test_batch_of_two_sequences() -> None:
    """Every index of a step, worked out by hand: a's fourth token completes entry 0, b reads three more after six."""
    cache = cache_for(SMALL, slots=2, max_tokens=32, page_tokens=8, window_page=4)
    a, b = cache.open(), cache.open()
    cache.prepare([(b, [5] * 6)])
    batch = cache.prepare([(a, [1, 2, 3, 4]), (b, [6, 7, 8])])
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 2, 3, 6, 7, 8]
    assert batch.sequence_ids.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.state_slots.tolist() == [a, b]
    assert batch.last.tolist() == [3, 6]
    # b took window pages 0 and 1 first; this step gives a page 2 and b page 3
    assert batch.window_slots.tolist() == [8, 9, 10, 11, 6, 7, 12]
    assert batch.window_rows[3].tolist() == [-1] * 5 + [8, 9, 10, 11]
    assert batch.window_rows[6].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12]
    # two entries a page of ratio 4: b holds page 0 (entries 0 and 1), a page 1
    four = batch.compressed[4]
    assert four.block_table.tolist() == [[1], [0]]
    assert four.slots.tolist() == [-1, -1, -1, 2, -1, 1, -1]
    assert four.rows is not None
    assert four.rows.tolist() == [[-1, -1]] * 3 + [[2, -1], [0, -1], [0, 1], [0, 1]]
    eight = batch.compressed[8]
    assert eight.slots.tolist() == [-1] * 5 + [0, -1]
    assert eight.rows is not None
    assert eight.rows.tolist() == [[-1]] * 5 + [[0], [0]]


def test_rows_are_left_to_the_indexer_once_there_are_more_than_it_picks() -> None:
    cache = cache_for(SMALL, max_tokens=32)
    slot = cache.open()
    assert cache.prepare([(slot, [0] * 15)]).compressed[4].rows is not None
    assert cache.prepare([(slot, [0])]).compressed[4].rows is None  # 4 entries, top-3


def test_window_pages_return_once_out_of_reach() -> None:
    """Window 12 in pages of 4: never more than the rows of a step and the 11 before it may touch."""
    cache = cache_for(SMALL, max_tokens=400, window_page=4, step_tokens=8)
    slot = cache.open()
    total = cache.free_pages()[WINDOW]
    held = []
    for _ in range(50):
        cache.prepare([(slot, [0] * 8)])
        held.append(total - cache.free_pages()[WINDOW])
    assert max(held) <= cache.pages_for(WINDOW, 400) == 6
    cache.close(slot)
    assert cache.free_pages()[WINDOW] == total
    slot = cache.open()
    for _ in range(100):
        cache.prepare([(slot, [0])])
    assert total - cache.free_pages()[WINDOW] <= 4  # 12 rows lie in at most four pages


def test_out_of_pages_says_what_and_changes_nothing() -> None:
    cache = cache_for(SMALL, slots=2, max_tokens=64, page_tokens=8, window_page=4, pages={4: 3})
    a, b = cache.open(), cache.open()
    cache.prepare([(a, [0] * 16)])
    before = cache.free_pages()
    with pytest.raises(OutOfPages, match=r"ratio 4 needs 2 more pages of 2 rows, 1 of 3 are to be had"):
        cache.prepare([(b, [0] * 16)])
    assert cache.free_pages() == before
    assert cache.length(b) == 0
    cache.prepare([(b, [0] * 8)])  # one page still fits
    cache.close(a)
    cache.prepare([(b, [0] * 16)])


def test_promised_pages_are_kept() -> None:
    cache = cache_for(SMALL, slots=3, max_tokens=64, page_tokens=8, pages={4: 4})
    a = cache.open(16)  # two pages
    with pytest.raises(OutOfPages, match="ratio 4 needs 3 more pages"):
        cache.open(24)
    b = cache.open()
    cache.prepare([(b, [0] * 16)])
    with pytest.raises(OutOfPages, match="ratio 4 needs 1 more pages of 2 rows, 0 of 4"):
        cache.prepare([(b, [0] * 8)])
    cache.prepare([(a, [0] * 16)])
    with pytest.raises(OutOfPages):
        cache.prepare([(a, [0] * 8)])  # beyond its promise
    cache.close(b)
    cache.prepare([(a, [0] * 8)])


def test_no_page_has_two_owners() -> None:
    """Random life of many sequences: a cache row belongs to one token at a time, and nothing leaks."""
    dice = random.Random(0)
    cache = cache_for(SMALL, slots=5, max_tokens=60, page_tokens=8, window_page=4, step_tokens=13)
    free = cache.free_pages()
    owner: dict[tuple[int, int], tuple[int, int]] = {}  # (ratio, cache row) -> (slot, row of the sequence)
    live: list[int] = []
    for _ in range(600):
        if len(live) < 5 and dice.random() < 0.3:
            live.append(cache.open())
        if live and dice.random() < 0.1:
            slot = live.pop(dice.randrange(len(live)))
            cache.close(slot)
            owner = {key: who for key, who in owner.items() if who[0] != slot}
        step = [(slot, [0] * dice.randint(1, 13)) for slot in live if cache.length(slot) <= 47 and dice.random() < 0.6]
        if not step:
            continue
        batch = cache.prepare(step)
        slots = [step[s][0] for s in batch.sequence_ids.tolist()]
        for slot, position, row in zip(slots, batch.positions.tolist(), batch.window_slots.tolist(), strict=True):
            owner[WINDOW, row] = (slot, position)
        for slot, position, rows in zip(slots, batch.positions.tolist(), batch.window_rows.tolist(), strict=True):
            reach = range(max(0, position - 11), position + 1)
            assert [owner[WINDOW, row] for row in rows if row >= 0] == [(slot, p) for p in reach]
        for ratio, part in batch.compressed.items():
            for slot, position, row in zip(slots, batch.positions.tolist(), part.slots.tolist(), strict=True):
                assert (row >= 0) == ((position + 1) % ratio == 0)
                if row >= 0:
                    owner[ratio, row] = (slot, position // ratio)
            if part.rows is not None:
                for slot, position, rows in zip(slots, batch.positions.tolist(), part.rows.tolist(), strict=True):
                    seen = [owner[ratio, row] for row in rows if row >= 0]
                    assert seen == [(slot, i) for i in range((position + 1) // ratio)]
    for slot in live:
        cache.close(slot)
    assert cache.free_pages() == free


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "at least one sequence"),
        ([(0, [])], "brings no tokens"),
        ([(0, [1]), (0, [1])], "twice"),
        ([(1, [1])], "slot 1 is not open"),
        ([(0, [1] * 33)], "33 tokens"),
        ([(0, [96])], "token id 96 is outside the vocabulary of 96"),
        ([(0, [-1])], "token id -1"),
    ],
)
def test_wrong_requests(requests: list[tuple[int, list[int]]], message: str) -> None:
    cache = cache_for(SMALL, slots=2, max_tokens=32)
    assert cache.open() == 0
    with pytest.raises(ValueError, match=message):
        cache.prepare(requests)
    assert cache.length(0) == 0


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="slots and max_tokens must be positive"):
        KVCache(SMALL, slots=0)
    with pytest.raises(ValueError, match=r"pages names ratios \[7\]"):
        cache_for(SMALL, pages={7: 1})
    with pytest.raises(ValueError, match="65 were asked for"):
        cache_for(SMALL, max_tokens=64).open(65)
    with pytest.raises(ValueError, match="blocks of 64"):
        cache_for(SMALL, kv_format="fp8_ds_mla")  # 24 dims beside RoPE
    with pytest.raises(OutOfPages, match="all 1 sequence slots are taken"):
        [cache.open() for cache in [cache_for(SMALL)] for _ in range(2)]


def test_bytes_of_the_released_model() -> None:
    """584-byte rows in padded pages; 132-byte index rows; FP32 rings. From the published row formats, by hand."""
    config = replace(ModelConfig.named("flash"), num_nextn_predict_layers=0)
    cache = KVCache(config, max_tokens=8192, kv_format="fp8_ds_mla", index_format="fp8", step_tokens=1, device="meta")
    window = 43 * 3 * 37440  # 128 rows may touch three pages of 64
    csa = 21 * 32 * (37440 + 64 * 132)
    hca = 20 * 32 * 1728  # two entries a page
    rings = 21 * (64 + 16) * 1024 + 20 * 512 * 1024
    assert cache.bytes() == window + csa + hca + rings
