"""Generation: continuous batches give each prompt what it would get alone; ends, seeds and shortages behave."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest

from model.cache import OutOfPages
from model.generate import Sampling, generate
from model.transformer import Transformer
from tests.model.oracle import SMALL, cache_for, random_model

Alone = Callable[[Sampling], list[list[int]]]
PROMPTS = [[5, 6, 7], list(range(2, 40)), [9], [11, 12, 13, 14, 15, 16, 17, 18], [80, 70]]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(SMALL, seed=2)


@pytest.fixture(scope="module")
def alone(model: Transformer) -> Alone:
    """What each prompt gets by itself."""

    @functools.cache
    def of(sampling: Sampling) -> list[list[int]]:
        seeds = range(sampling.seed, sampling.seed + len(PROMPTS))
        each = (replace(sampling, seed=seed) for seed in seeds)
        return [generate(model, cache_for(SMALL), [p], one)[0] for p, one in zip(PROMPTS, each, strict=True)]

    return of


@pytest.mark.parametrize(
    "sampling", [Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, temperature=0.9, top_p=0.8)]
)
@pytest.mark.parametrize(("slots", "chunk"), [(1, 512), (2, 3), (5, 16)])
def test_neighbours_do_not_matter(model: Transformer, alone: Alone, sampling: Sampling, slots: int, chunk: int) -> None:
    cache = cache_for(SMALL, slots=slots, max_tokens=64, page_tokens=8, window_page=4)
    free = cache.free_pages()
    seen: list[tuple[int, int]] = []
    got = generate(model, cache, PROMPTS, sampling, chunk=chunk, on_token=lambda *event: seen.append(event))
    assert got == alone(sampling)
    assert cache.free_pages() == free
    assert [[token for i, token in seen if i == prompt] for prompt in range(5)] == got


def test_pages_for_one_at_a_time(model: Transformer) -> None:
    """Five slots but compressed pages for barely the longest prompt: sequences wait instead of failing halfway."""
    sampling = Sampling(max_new_tokens=12)
    want = generate(model, cache_for(SMALL, slots=5), PROMPTS, sampling)
    tight = cache_for(SMALL, slots=5, max_tokens=64, page_tokens=8, window_page=4, pages={4: 6})  # 48 tokens
    assert generate(model, tight, PROMPTS, sampling) == want
    tight = cache_for(SMALL, slots=5, max_tokens=64, page_tokens=8, pages={4: 5})  # the second needs 49 - 1
    with pytest.raises(OutOfPages, match="ratio 4 needs 6 more pages"):
        generate(model, tight, PROMPTS, sampling)


def test_end_token_ends(model: Transformer) -> None:
    free = generate(model, cache_for(SMALL), [PROMPTS[0]], Sampling(max_new_tokens=30))[0]
    eos = free[7]
    got = generate(model, cache_for(SMALL), [PROMPTS[0]], Sampling(max_new_tokens=30, eos=eos))[0]
    assert got == free[: free.index(eos) + 1]


def test_seeds(model: Transformer) -> None:
    def draw(seed: int) -> list[list[int]]:
        sampling = Sampling(max_new_tokens=16, temperature=1.0, seed=seed)
        return generate(model, cache_for(SMALL, slots=2), [[3, 4], [3, 4]], sampling)

    first = draw(0)
    assert first == draw(0)
    assert first[0] != first[1]
    assert first[1] == draw(1)[0]  # prompt i takes seed + i


def test_a_draw_of_nothing_but_the_best_is_greedy(model: Transformer) -> None:
    want = generate(model, cache_for(SMALL), [PROMPTS[3]], Sampling(max_new_tokens=16))
    narrow = Sampling(max_new_tokens=16, temperature=5.0, top_p=1e-6)
    assert generate(model, cache_for(SMALL), [PROMPTS[3]], narrow) == want
    cold = Sampling(max_new_tokens=16, temperature=1e-6)
    assert generate(model, cache_for(SMALL), [PROMPTS[3]], cold) == want


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"temperature": -0.1}, "temperature must be 0 or more and finite"),
        ({"temperature": float("nan")}, "temperature must be 0 or more and finite, got nan"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"top_p": 1.5}, "top_p must lie"),
    ],
)
def test_wrong_sampling(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_wrong_prompts(model: Transformer) -> None:
    cache = cache_for(SMALL, max_tokens=20)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, cache, [[1], []], Sampling(max_new_tokens=2))
    with pytest.raises(ValueError, match="prompt 0 needs 21 tokens of context"):
        generate(model, cache, [[1] * 20], Sampling(max_new_tokens=2))
    with pytest.raises(ValueError, match="token id 96"):
        generate(model, cache, [[96]], Sampling(max_new_tokens=2))
    assert len(generate(model, cache, [[1]], Sampling(max_new_tokens=2))[0]) == 2  # and the slot is free again
