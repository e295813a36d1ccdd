"""safetensors files, read without a map and written without holding them in memory.

A file is [8 bytes: header length, little endian][header: JSON, name -> dtype, shape, data_offsets][tensor bytes]. A
checkpoint is one such file, or shards with `model.safetensors.index.json` (name -> shard). Headers are checked in full
before a tensor is touched. Tensors are read straight into their final memory (`preadv`): no page of the file stays
mapped, and a file cut short under us is an error, not a bus error.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from .inventory import ITEM_BITS, TensorSpec

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_CHUNK = 1 << 30  # bytes a read or write call: Linux moves at most 2 GiB

TORCH_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I64": torch.int64,
    "I32": torch.int32,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. Says which file and tensor, what was wanted and what came."""

    def __init__(self, file: Path | str, tensor: str | None, *, wanted: str, got: str) -> None:
        self.file, self.tensor, self.wanted, self.got = Path(file), tensor, wanted, got
        where = f"{file}, tensor {tensor}" if tensor else f"{file}"
        super().__init__(f"{where}: wanted {wanted}, got {got}")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file: what it is, and the offset of its first byte in the file."""

    file: Path
    name: str
    spec: TensorSpec
    offset: int

    def error(self, *, wanted: str, got: str) -> CheckpointError:
        return CheckpointError(self.file, self.name, wanted=wanted, got=got)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file by name. CheckpointError if the header or the file's length is not as it should be."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                got = f"length {length} in a file of {size} bytes" if length >= 0 else f"a file of {size} bytes"
                raise CheckpointError(path, None, wanted="a safetensors header", got=got)
            text = f.read(length)
    except FileNotFoundError:
        raise CheckpointError(path, None, wanted="a file", got="none there") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(path, None, wanted="a JSON header", got=str(error)) from None
    if not isinstance(header, dict):
        raise CheckpointError(path, None, wanted="a JSON object as header", got=type(header).__name__)
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_extent(path, found, 8 + length, size)
    return found


def read_index(directory: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint directory by name, from its index and all shard headers, or from its single file."""
    index = directory / INDEX_NAME
    if not index.exists():
        if not (directory / SINGLE_NAME).exists():
            raise CheckpointError(directory, None, wanted=f"{INDEX_NAME} or {SINGLE_NAME}", got="neither")
        return read_header(directory / SINGLE_NAME)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, None, wanted="a weight_map of tensor names to files", got=repr(weight_map)[:80])
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".."):
            raise CheckpointError(index, name, wanted="a file name without directories", got=repr(file))
        by_file.setdefault(file, set()).add(name)
    found: dict[str, Stored] = {}
    for file in sorted(by_file):
        path = directory / file
        if not path.is_file():
            wanted = f"the shard {file} that {INDEX_NAME} names for {len(by_file[file])} tensors"
            raise CheckpointError(path, min(by_file[file]), wanted=wanted, got="no such file")
        shard = read_header(path)
        for name, stored in shard.items():
            if name in weight_map and weight_map[name] != file:
                raise stored.error(wanted="each tensor in one shard", got=f"one that {weight_map[name]} holds too")
            if name not in by_file[file]:
                raise stored.error(wanted="a tensor that the index names for this shard", got="one it does not")
            found[name] = stored
        for name in sorted(by_file[file] - shard.keys()):
            raise CheckpointError(path, name, wanted=f"the tensor that {INDEX_NAME} names here", got="no such tensor")
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except FileNotFoundError:
        raise CheckpointError(path, None, wanted="a file", got="none there") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(path, None, wanted="JSON", got=str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(path, None, wanted="a JSON object", got=type(value).__name__)
    return value


class Reader:
    """Reads stored tensors. Keeps one file open, so it is cheapest in file order."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._path, self._fd = None, -1

    def read(self, stored: Stored) -> Tensor:
        """A new tensor on the CPU."""
        out = torch.empty(stored.spec.shape, dtype=TORCH_DTYPES[stored.spec.dtype])
        self.read_into(stored, out)
        return out

    def read_into(self, stored: Stored, out: Tensor) -> None:
        """Into `out`: on the CPU, contiguous, of as many bytes. No other memory is used."""
        if out.nbytes != stored.spec.bytes or not out.is_contiguous():
            raise ValueError(f"out must be contiguous with {stored.spec.bytes} bytes, got {out.nbytes}")
        if stored.file != self._path:
            self.close()
            self._fd, self._path = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC), stored.file
        view = _bytes(out).numpy().data
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + _CHUNK]], stored.offset + done)
            if count == 0:
                raise stored.error(wanted=f"{len(view)} bytes", got=f"the end of the file after {done}")
            done += count


class ShardWriter:
    """Writes one safetensors file whose tensors are known beforehand, in any order, each once.

    The file has its final name and length only after `close`; until then it is `NAME.part`.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        self.path, self._part = path, path.with_name(path.name + ".part")
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._offsets: dict[str, int] = {}
        self._specs = dict(specs)
        end = 0
        # widest items first, so that every tensor is aligned to its item, as the safetensors library does
        for name, spec in sorted(specs.items(), key=lambda item: -ITEM_BITS[item[1].dtype]):
            self._offsets[name] = end
            end += spec.bytes
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [end - spec.bytes, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._start = 8 + len(text)
        self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        self._put(struct.pack("<Q", len(text)) + text, 0)
        os.ftruncate(self._fd, self._start + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor. ValueError if it is not as announced or was written before."""
        spec = self._specs[name]
        if name not in self._offsets:
            raise ValueError(f"{name} was written before")
        if tensor.dtype != TORCH_DTYPES[spec.dtype] or tuple(tensor.shape) != spec.shape:
            raise ValueError(f"{name}: announced {spec}, got {tensor.dtype} {list(tensor.shape)}")
        self._put(_bytes(tensor.cpu().contiguous()).numpy().data, self._start + self._offsets.pop(name))

    def close(self) -> None:
        """Flushes and gives the file its name. ValueError if a tensor is missing."""
        if self._offsets:
            raise ValueError(
                f"{self.path.name}: {len(self._offsets)} tensors were not written, such as {min(self._offsets)}"
            )
        os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._part.replace(self.path)

    def abort(self) -> None:
        """Drops what was written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._part.unlink(missing_ok=True)

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + _CHUNK], offset + done)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)


def _bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's memory as flat bytes (float8 has no NumPy type, and scalars cannot be viewed as bytes)."""
    return tensor.reshape(-1).view(torch.uint8)


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} occurs twice")
        found[key] = value
    return found


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    """One header entry, checked by itself."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sane = all(type(number) is int and number >= 0 for number in (*shape, begin, end)) and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        sane = False
    if not sane:
        raise CheckpointError(path, name, wanted="dtype, shape and data_offsets", got=repr(entry)[:200])
    if dtype not in ITEM_BITS:
        raise CheckpointError(path, name, wanted=f"a dtype of {', '.join(ITEM_BITS)}", got=dtype)
    spec = TensorSpec(dtype, shape)
    if end - begin != spec.bytes:
        raise CheckpointError(path, name, wanted=f"{spec.bytes} bytes for {spec}", got=f"data_offsets {[begin, end]}")
    return Stored(path, name, spec, start + begin)


def _check_extent(path: Path, found: Mapping[str, Stored], start: int, size: int) -> None:
    """Tensors follow each other without gap or overlap and fill the file."""
    at = start
    for stored in sorted(found.values(), key=lambda s: (s.offset, s.offset + s.spec.bytes)):
        if stored.offset != at:
            what = "overlaps the tensor before it" if stored.offset < at else "leaves a gap before it"
            raise stored.error(wanted=f"data at byte {at}", got=f"byte {stored.offset}, which {what}")
        at += stored.spec.bytes
        if at > size:
            raise stored.error(wanted=f"a file of at least {at} bytes", got=f"{size} bytes (truncated)")
    if at != size:
        raise CheckpointError(path, None, wanted=f"{at} bytes, where the last tensor ends", got=f"{size} bytes")
