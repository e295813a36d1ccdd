"""From a checkpoint directory to the model's weights, shard by shard, each number going straight to where it stays.

The family is recognised from names and dtypes, and each linear by what stands beside it: `.weight_scale` makes it
NVFP4, `.scale` FP8 or MXFP4 (by the weight's dtype), neither leaves it plain. config.json's quantization_config is not
asked: taken as one rule for all layers it misreads draft blocks.

The model holds routed experts stacked, gate rows before up rows, each half with an alpha of its own:

    layers.L.ffn.w13   [experts, 2 * inner, hidden], alpha [experts, 2]      from experts.E.w1 and .w3
    layers.L.ffn.w2    [experts, hidden, inner],     alpha [experts]         from experts.E.w2

and the shared expert the same without the first axis (`layers.L.ffn.shared.w13`, alpha [2]). NVFP4 codes and scales
keep every bit. Native MXFP4 experts become NVFP4 without rounding: the block exponents move into E4M3 scales under a
power of two, which holds them exactly over a range of 2**17 (`reference.mxfp4_to_nvfp4`). `input_scale` is not used:
activations are scaled by their own maximum.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from fp4suite import reference
from fp4suite.formats import BLOCK, FP8_BLOCK, FP8BlockTensor, MXFP4Tensor, NVFP4Tensor

from ..config import ModelConfig
from ..linear import Format, WeightFormat
from . import codec
from .files import INDEX_NAME, TORCH_DTYPES, CheckpointError, Reader, Stored, read_index, read_json
from .inventory import Family, Param, Storage, TensorSpec, params, parts
from .names import hf_name, older_hf_name

log = logging.getLogger(__name__)

Weight = Tensor | NVFP4Tensor | FP8BlockTensor
Held = Literal["nvfp4", "fp8", "bf16", "fp32", "int32"]
Weights = Literal["stored", "fp32"]

# Scales of exports with an FP8 KV cache: this model's cache rows carry their own.
_IGNORED = (".k_scale", ".v_scale")
# Dtypes that hold the same bytes. Plain numbers may also come wider or narrower than the release stores them.
_ALIASES = {"I8": {"I8", "U8"}, "U8": {"U8", "I8"}, "F8_E8M0": {"F8_E8M0", "U8"}, "I64": {"I64", "I32"}}
_PLAIN = {"BF16": "bf16", "F32": "fp32"}
_EXPERT_RE = re.compile(r"(.+\.ffn)\.experts\.(\d+)\.(w[123])")
_SHARED_RE = re.compile(r"(.+\.ffn)\.shared_experts\.(w[123])")


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter as it was found: how it is stored, and its tensors by what their names have after its own."""

    param: Param
    storage: Storage
    tensors: dict[str, Stored]

    @property
    def main(self) -> Stored:
        """The tensor that holds the numbers (not a scale)."""
        return self.tensors["" if self.param.bare else ".weight"]

    @property
    def held(self) -> Held:
        return held(self.param, self.storage)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a parameter goes in the model: a weight's canonical name, the expert it is of, its rows and segment."""

    name: str
    expert: int | None = None
    segment: int | None = None  # 0 gate, 1 up
    experts: int | None = None
    segments: int | None = None


class Checkpoint:
    """A checkpoint directory, opened: every header read, every name, dtype and shape checked, no tensor read yet.

    config      as config.json says, with as many draft blocks as the files hold (all or none)
    raw_config  the contents of config.json
    family      what the names and dtypes amount to
    entries     every parameter by its native name
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise CheckpointError(self.directory, None, wanted="a checkpoint directory", got="none there")
        self.raw_config = read_json(self.directory / "config.json")
        try:
            config = ModelConfig.from_json(self.raw_config)
        except ValueError as error:
            wanted = "the config of a DeepSeek-V4 model"
            raise CheckpointError(self.directory / "config.json", None, wanted=wanted, got=str(error)) from None
        stored = read_index(self.directory)
        self._index = self.directory / INDEX_NAME
        self._index = self._index if self._index.exists() else next(iter(stored.values())).file
        if not any(name.startswith("mtp.") for name in stored):
            config = replace(config, num_nextn_predict_layers=0)
        self.config = config
        self.entries = self._match(stored)
        self.family = self._recognise()

    @property
    def bytes(self) -> int:
        """Of all tensors as stored."""
        return sum(t.spec.bytes for entry in self.entries.values() for t in entry.tensors.values())

    def formats(self, weights: Weights = "stored") -> dict[str, Held]:
        """How the model will hold each weight, by canonical name. CheckpointError if parts of a stack differ."""
        found: dict[str, Held] = {}
        first: dict[str, Entry] = {}
        for entry in self.entries.values():
            name = place(entry.param, self.config).name
            kind: Held = "fp32" if weights == "fp32" and entry.held != "int32" else entry.held
            if found.setdefault(name, kind) != kind:
                wanted = f"{first[name].storage} as in {first[name].param.name}, which it is stacked with"
                raise entry.main.error(wanted=wanted, got=entry.storage)
            first.setdefault(name, entry)
        return found

    def weights(
        self,
        device: torch.device | str = "cpu",
        *,
        weights: Weights = "stored",
        only: str = "",
        progress: bool | None = None,
    ) -> Iterator[tuple[str, Weight]]:
        """The model's weights by canonical name, each as soon as it is whole, in the order of the files.

        weights="fp32" gives every number dequantised to FP32; `only` those whose names begin so. `progress` shows a
        bar; None does so on a terminal.
        """
        if weights not in ("stored", "fp32"):
            raise ValueError(f'weights must be "stored" or "fp32", got {weights!r}')
        formats = self.formats(weights)
        entries = [entry for entry in self.entries.values() if entry.param.name.startswith(only)]
        waiting: dict[str, int] = {}
        for entry in entries:
            name = place(entry.param, self.config).name
            waiting[name] = waiting.get(name, 0) + 1
        open_stacks: dict[str, _Stack] = {}
        inexact: list[str] = []
        order = sorted(entries, key=lambda e: (e.main.file, e.main.offset))
        total = sum(t.spec.bytes for entry in entries for t in entry.tensors.values())
        bar = tqdm(
            total=total, unit="B", unit_scale=True, desc="load", disable=None if progress is None else not progress
        )
        with Reader() as reader, bar:
            for entry in order:
                where = place(entry.param, self.config)
                stack = open_stacks.get(where.name)
                if stack is None:
                    kind = formats[where.name]
                    stack = open_stacks[where.name] = _Stack.empty(entry.param, where, kind, torch.device(device))
                blocks = stack.fill(reader, entry, where, self.config.n_routed_experts)
                if blocks:
                    inexact.append(f"{entry.param.name} ({blocks})")
                bar.update(sum(t.spec.bytes for t in entry.tensors.values()))
                waiting[where.name] -= 1
                if not waiting[where.name]:
                    yield where.name, open_stacks.pop(where.name).finish()
        if inexact:
            log.warning(
                "%d MXFP4 weights have blocks too small for the range of NVFP4 scales, which were rounded: %s",
                len(inexact),
                ", ".join(inexact[:8]) + (", ..." if len(inexact) > 8 else ""),
            )

    def expect_config(self, config: ModelConfig) -> None:
        """Raises CheckpointError unless this is a checkpoint of `config`, whose draft blocks it may lack."""
        ours, want = (
            replace(c, num_nextn_predict_layers=0, compress_ratios=c.compress_ratios[: c.num_hidden_layers]).to_json()
            for c in (self.config, config)
        )
        for key, value in want.items():
            if value != ours[key]:
                path = self.directory / "config.json"
                raise CheckpointError(path, None, wanted=f"{key}={value}", got=f"{key}={ours[key]}")

    def read(self, reader: Reader, entry: Entry) -> dict[str, Tensor]:
        """The stored tensors of one parameter by suffix, checked."""
        found = {suffix: reader.read(stored) for suffix, stored in entry.tensors.items()}
        for suffix, values in found.items():
            _check(entry, suffix, values)
        return found

    def _match(self, stored: dict[str, Stored]) -> dict[str, Entry]:
        left = dict(stored)
        hugging = "model.embed_tokens.weight" in stored
        entries: dict[str, Entry] = {}
        missing: list[tuple[str, str]] = []
        for param in params(self.config):
            name = param.name
            if hugging:
                if name.startswith("mtp."):
                    continue
                name = hf_name(param.name)
                if f"{name}.weight" not in stored and f"{older_hf_name(param.name)}.weight" in stored:
                    name = older_hf_name(param.name)
            found = self._find(param, name, stored, missing)
            if found is not None:
                entries[param.name] = found
                for suffix in found.tensors:
                    del left[name + suffix]
        if missing:
            name, wanted = missing[0]
            count = "no such tensor" + (f" (nor {len(missing) - 1} others)" if len(missing) > 1 else "")
            raise CheckpointError(self._index, name, wanted=wanted, got=count)
        for extra in left.values():
            if not extra.name.endswith(_IGNORED):
                more = f", one of {len(left)} such" if len(left) > 1 else ""
                raise extra.error(wanted="tensors that config.json calls for, only", got=f"{extra.spec}{more}")
        return entries

    def _find(self, param: Param, name: str, stored: dict[str, Stored], missing: list[tuple[str, str]]) -> Entry | None:
        main = stored.get(name if param.bare else f"{name}.weight")
        if main is None:
            missing.append((name if param.bare else f"{name}.weight", f"{param.native} of shape {list(param.shape)}"))
            return None
        storage = _storage(param, name, main, stored)
        tensors: dict[str, Stored] = {}
        try:
            expected = parts(param, storage)
        except ValueError as error:
            raise main.error(wanted="a shape that its format can hold", got=str(error)) from None
        for suffix, spec in expected.items():
            tensor = stored.get(name + suffix)
            if tensor is not None:
                _check_spec(tensor, spec)
                tensors[suffix] = tensor
            elif suffix != ".input_scale":
                missing.append((name + suffix, str(spec)))
        return Entry(param, storage, tensors)

    def _recognise(self) -> Family:
        experts = self.entries["layers.0.ffn.experts.0.w1"]
        if not experts.main.name.startswith("layers."):
            return "modelopt"
        if experts.storage == "nvfp4":
            return "nvfp4-experts"
        return "native" if experts.storage == "mxfp4" else "fp32"


def held(param: Param, storage: Storage) -> Held:
    """How the model holds what is stored so."""
    if storage in ("nvfp4", "mxfp4"):
        return "nvfp4"
    if storage == "fp8":
        return "fp8"
    if storage == "i64":
        return "int32"
    # what the release keeps in FP32 is computed with in FP32; widening loses nothing
    return "fp32" if param.native == "fp32" or storage == "fp32" else "bf16"


def weight_format(formats: Mapping[str, Held]) -> WeightFormat:
    """What a model is built with, from how it holds each weight. Its function raises TypeError for a table's name."""

    def of(name: str) -> Format:
        format = formats[name]
        if format == "int32":
            raise TypeError(f"{name} is a table of integers, not a weight")
        return format

    return of


def place(param: Param, config: ModelConfig) -> Place:
    """Where the model holds a parameter."""
    if match := _EXPERT_RE.fullmatch(param.name):
        prefix, expert, part = match[1], int(match[2]), match[3]
        return _ffn_place(prefix, part, expert, config.n_routed_experts)
    if match := _SHARED_RE.fullmatch(param.name):
        return _ffn_place(f"{match[1]}.shared", match[2], None, None)
    return Place(param.name)


def _ffn_place(prefix: str, part: str, expert: int | None, experts: int | None) -> Place:
    if part == "w2":
        return Place(f"{prefix}.w2", expert=expert, experts=experts)
    return Place(f"{prefix}.w13", expert=expert, segment=0 if part == "w1" else 1, experts=experts, segments=2)


def _storage(param: Param, name: str, main: Stored, stored: dict[str, Stored]) -> Storage:
    """How a parameter is stored, by its weight's dtype and what stands beside it."""
    dtype = main.spec.dtype
    if param.init == "table":
        return "i64"
    if param.init == "linear":
        if f"{name}.weight_scale" in stored:
            return "nvfp4"
        if f"{name}.scale" in stored:
            return "fp8" if dtype == "F8_E4M3" else "mxfp4" if dtype in _ALIASES["I8"] else param.native
    if dtype in _PLAIN:
        return "bf16" if dtype == "BF16" else "fp32"
    if param.init == "linear":
        raise main.error(
            wanted=f"BF16 or F32, or a scale beside it ({name}.weight_scale or .scale)", got=str(main.spec)
        )
    raise main.error(wanted=f"BF16 or F32 {list(param.shape)}", got=str(main.spec))


def _check_spec(tensor: Stored, want: TensorSpec) -> None:
    got = tensor.spec
    same_shape = got.shape == want.shape or (want.shape == () and got.shape == (1,))
    if not same_shape or got.dtype not in _ALIASES.get(want.dtype, {want.dtype}):
        raise tensor.error(wanted=str(want), got=str(got))


@dataclass(slots=True)
class _Stack:
    """One weight of the model while it fills: one parameter, or the experts and halves stacked in it."""

    held: Held
    data: Tensor
    sf: Tensor = field(default_factory=lambda: torch.empty(0))
    alpha: Tensor = field(default_factory=lambda: torch.empty(0))  # on the CPU until the end: filled one by one
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def empty(cls, param: Param, where: Place, held: Held, device: torch.device) -> "_Stack":
        lead = () if where.experts is None else (where.experts,)
        if len(param.shape) != 2 or held not in ("nvfp4", "fp8"):
            rows = tuple(param.shape) if where.segments is None else (where.segments * param.shape[0], *param.shape[1:])
            dtype = {"bf16": torch.bfloat16, "fp32": torch.float32, "int32": torch.int32}[held]
            return cls(held, torch.empty((*lead, *rows), dtype=dtype, device=device), device=device)
        n, k = param.shape[0] * (where.segments or 1), param.shape[1]
        if held == "fp8":
            data = torch.empty((n, k), dtype=torch.float8_e4m3fn, device=device)
            scales = (-(-n // FP8_BLOCK), -(-k // FP8_BLOCK))
            return cls(held, data, torch.empty(scales, dtype=torch.uint8, device=device), device=device)
        data = torch.empty((*lead, n, k // 2), dtype=torch.uint8, device=device)
        sf = torch.empty((*lead, n, k // BLOCK), dtype=torch.float8_e4m3fn, device=device)
        alpha = torch.empty((*lead, *(() if where.segments is None else (where.segments,))), dtype=torch.float32)
        return cls(held, data, sf, alpha, device)

    def fill(self, reader: Reader, entry: Entry, where: Place, experts: int) -> int:
        """Reads one parameter into its place. How many of its blocks had to be rounded (MXFP4 only)."""
        n = entry.param.shape[0]
        rows = slice((where.segment or 0) * n, ((where.segment or 0) + 1) * n)
        data = _at(self.data, where, rows)
        if self.held == "int32":
            self._fill_table(reader, entry, experts)
        elif self.held in ("bf16", "fp32"):
            self._fill_plain(reader, entry, data)
        elif self.held == "fp8":
            if where.segments is not None and n % FP8_BLOCK:
                wanted = f"rows in blocks of {FP8_BLOCK} (gate and up are stacked)"
                raise entry.main.error(wanted=wanted, got=f"{n} rows")
            _fetch(reader, entry, ".weight", data)
            _fetch(
                reader, entry, ".scale", _at(self.sf, where, slice(rows.start // FP8_BLOCK, -(-rows.stop // FP8_BLOCK)))
            )
        elif entry.storage == "nvfp4":
            _fetch(reader, entry, ".weight", data)
            _fetch(reader, entry, ".weight_scale", _at(self.sf, where, rows))
            scale = reader.read(entry.tensors[".weight_scale_2"])
            _check(entry, ".weight_scale_2", scale)
            _alpha_at(self.alpha, where).copy_(scale.view(()))
        else:
            _fetch(reader, entry, ".weight", data)
            scales = reader.read(entry.tensors[".scale"])
            _check(entry, ".scale", scales)
            cast, lost = reference.mxfp4_to_nvfp4(MXFP4Tensor(data, scales.view(torch.uint8).to(self.device)))
            data.copy_(cast.data)
            _at(self.sf, where, rows).copy_(cast.sf)
            _alpha_at(self.alpha, where).copy_(cast.alpha)
            return int(lost)
        return 0

    def finish(self) -> Weight:
        if self.held == "fp8":
            return FP8BlockTensor(self.data, self.sf)
        if self.held == "nvfp4":
            return NVFP4Tensor(self.data, self.sf, self.alpha.to(self.device))
        return self.data

    def _fill_table(self, reader: Reader, entry: Entry, experts: int) -> None:
        table = reader.read(entry.main)
        low, high = int(table.min()), int(table.max())
        if low < 0 or high >= experts:
            raise entry.main.error(wanted=f"expert numbers in 0..{experts - 1}", got=f"{low}..{high}")
        self.data.copy_(table)

    def _fill_plain(self, reader: Reader, entry: Entry, out: Tensor) -> None:
        """Plain numbers, or anything dequantised to FP32."""
        suffix = "" if entry.param.bare else ".weight"
        if TORCH_DTYPES[entry.main.spec.dtype] == out.dtype:
            _fetch(reader, entry, suffix, out)
            return
        read = {suffix: reader.read(tensor) for suffix, tensor in entry.tensors.items() if suffix != ".input_scale"}
        for suffix, values in read.items():
            _check(entry, suffix, values)
        out.copy_(codec.decode(entry.storage, read))


def _at(t: Tensor, where: Place, rows: slice) -> Tensor:
    """The part of a stacked tensor that a place names."""
    t = t if where.expert is None else t[where.expert]
    return t if where.segment is None else t[rows]


def _alpha_at(alpha: Tensor, where: Place) -> Tensor:
    alpha = alpha if where.expert is None else alpha[where.expert]
    return alpha if where.segment is None else alpha[where.segment]


def _fetch(reader: Reader, entry: Entry, suffix: str, out: Tensor) -> None:
    """One stored tensor into `out`, byte by byte, checked on the way."""
    stored = entry.tensors[suffix]
    if out.device.type == "cpu":
        reader.read_into(stored, out)
        _check(entry, suffix, out)
    else:
        host = reader.read(stored)
        _check(entry, suffix, host)
        out.copy_(host.view(out.dtype).view(out.shape))


def _check(entry: Entry, suffix: str, values: Tensor) -> None:
    """Refuses numbers that no quantiser writes: NaN anywhere but in packed codes, negative scales, infinite alphas."""
    stored = entry.tensors[suffix]
    if suffix == ".weight_scale":
        # one pass: from 0x7F (NaN) up, every byte is NaN or negative; the tensor cores read these bytes as unsigned
        top = _top_byte(values)
        if top >= 0x7F:
            bad = int((values.view(torch.uint8) >= 0x7F).sum())
            raise stored.error(
                wanted="E4M3 scales that are numbers, not negative",
                got=f"{bad} of {values.numel()} bytes NaN or negative, up to 0x{top:02X}",
            )
    elif suffix == ".scale":
        if _top_byte(values) == 0xFF:
            bad = int((values.view(torch.uint8) == 0xFF).sum())
            raise stored.error(wanted="E8M0 scales that are numbers", got=f"{bad} of {values.numel()} NaN (byte 0xFF)")
    elif suffix == ".weight_scale_2":
        value = float(values)
        if not 0 <= value < float("inf"):
            raise stored.error(wanted="a finite scale that is not negative", got=str(value))
    elif entry.storage in ("bf16", "fp32"):
        bad = int(torch.isnan(values).sum())
        if bad:
            raise stored.error(wanted="numbers", got=f"{bad} NaN among {values.numel()}")


def _top_byte(values: Tensor) -> int:
    """The largest byte of a tensor on the CPU. By NumPy: PyTorch takes twenty times as long (16 MB: 23 ms, not 1)."""
    return int(values.reshape(-1).view(torch.uint8).numpy().max())
