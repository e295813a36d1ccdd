"""Text to ids and back, by bytes and by a tokenizer.json."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from model.config import ModelConfig
from model.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer

CONFIG = ModelConfig.named("tiny")


@given(st.text())
def test_bytes_survive_a_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer(CONFIG)
    ids = tokenizer.encode(text)
    assert ids[0] == CONFIG.bos_token_id
    assert all(CONFIG.eos_token_id < i < CONFIG.vocab_size for i in ids[1:])
    assert tokenizer.decode(ids) == text


def test_ids_that_are_no_bytes() -> None:
    tokenizer = ByteTokenizer(CONFIG)
    assert tokenizer.decode([0, 1, 2 + ord("a"), 287, 2 + 0xFF]) == "a\ufffd\ufffd"


def test_vocabulary_too_small_for_bytes() -> None:
    with pytest.raises(ValueError, match="vocab_size of 258 or more, got 257"):
        ByteTokenizer(replace(CONFIG, vocab_size=257))


@pytest.fixture
def words(tmp_path: Path) -> Path:
    vocab = {"<bos>": 0, "<eos>": 1, "hello": 2, "world": 3, "[UNK]": 4}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
    split = {"type": "Whitespace"}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model})
    )
    return tmp_path


def test_file_beside_the_checkpoint_is_used(words: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(words, CONFIG)
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.encode("hello world") == [0, 2, 3]
    assert tokenizer.decode([2, 3]) == "hello world"
    assert load_tokenizer(tmp_path / "elsewhere", CONFIG).name == "bytes"


def test_files_that_do_not_fit(words: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json has 5 tokens, the model 4"):
        load_tokenizer(words, replace(CONFIG, vocab_size=4))
    (words / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(words, CONFIG)
