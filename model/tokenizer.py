"""Text to token ids and back: by the tokenizer.json beside a checkpoint, or byte by byte where there is none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from .config import ModelConfig

FILE_NAME = "tokenizer.json"


class Tokenizer(Protocol):
    name: str

    def encode(self, text: str) -> list[int]:
        """Ids, the beginning-of-sequence token first."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One id a byte of UTF-8, after the special ids; ids past them stand for nothing and decode to U+FFFD.

    Raises ValueError if the vocabulary is too small for all bytes.
    """

    name = "bytes"

    def __init__(self, config: ModelConfig) -> None:
        self._bos = config.bos_token_id
        self._first = max(config.bos_token_id, config.eos_token_id) + 1
        if self._first + 256 > config.vocab_size:
            needed = self._first + 256
            raise ValueError(f"a byte vocabulary needs vocab_size of {needed} or more, got {config.vocab_size}")

    def encode(self, text: str) -> list[int]:
        return [self._bos, *(self._first + byte for byte in text.encode())]

    def decode(self, ids: Sequence[int]) -> str:
        text = bytearray()
        for i in ids:
            if i >= self._first:
                byte = i - self._first
                text += bytes((byte,)) if byte < 256 else "\ufffd".encode()
        return text.decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` package. Adds the beginning-of-sequence token if the file does not."""

    name = FILE_NAME

    def __init__(self, path: Path, config: ModelConfig) -> None:
        try:
            from tokenizers import Tokenizer as Rust
        except ImportError:
            raise ValueError(f"{path} needs the tokenizers package: pip install 'fp4suite[model]'") from None
        try:
            self._rust = Rust.from_file(str(path))
        except Exception as error:  # the package raises Exception itself, whatever is wrong with the file
            raise ValueError(f"{path} is not a tokenizer: {error}") from None
        if self._rust.get_vocab_size() > config.vocab_size:
            raise ValueError(f"{path} has {self._rust.get_vocab_size()} tokens, the model {config.vocab_size}")
        self._bos = config.bos_token_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._rust.encode(text).ids
        return ids if ids[:1] == [self._bos] else [self._bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._rust.decode(list(ids))
        return text


def load_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer beside a checkpoint, or bytes."""
    path = directory / FILE_NAME
    return FileTokenizer(path, config) if path.exists() else ByteTokenizer(config)
