"""What the command lines share: a device, ops that have no kernel on it, one timed generation, plain tables of text."""

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

import fp4suite
from fp4suite import arch, ops, registry, support
from fp4suite.formats import IndexFormat, KVFormat

from .cache import KVCache
from .generate import Sampling, generate
from .transformer import Transformer

KV_FORMATS: tuple[KVFormat, ...] = ("fp32", "bf16", "fp8_ds_mla", "nvfp4")
INDEX_FORMATS: tuple[IndexFormat, ...] = ("fp32", "bf16", "fp8", "mxfp4")
OF_OP = {"index_query_fp8": "index_query", "csa_queries_fp8": "csa_queries"}  # public functions with an op's kernels


def pick_device(name: str | None) -> torch.device:
    """The named device, or the GPU if there is one. Raises ValueError for a name that PyTorch does not know."""
    if name is None:
        return support.gpu() or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here")
    arch.of(device)  # UnsupportedError for a GPU that nothing here runs on
    return device


def ops_without_kernel(device: torch.device) -> list[str]:
    """The ops that have no kernel on this device's architecture; none on a CPU, where the reference is the rule."""
    target = arch.of(device)
    if target == "cpu":
        return []
    public = (name for name, f in inspect.getmembers(ops, inspect.isfunction) if f.__module__ == ops.__name__)
    return [name for name in public if not name.startswith("_") and not registry.kernels(OF_OP.get(name, name), target)]


@contextlib.contextmanager
def reference_where_no_kernel(device: torch.device) -> Iterator[list[str]]:
    """Within the block, ops without a kernel run their reference on the GPU. Gives their names."""
    names = ops_without_kernel(device)
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(fp4suite.override(op=name, kernel=registry.REFERENCE))
        yield names


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One prompt's new tokens, and where the time went (seconds; a GPU is waited for)."""

    prompt_tokens: int
    tokens: list[int]
    prefill_s: float  # up to the first new token
    decode_s: float  # from there to the last

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None if there was only one token."""
        return (len(self.tokens) - 1) / self.decode_s if len(self.tokens) > 1 else None


def timed_generation(
    model: Transformer,
    prompt: Sequence[int],
    sampling: Sampling,
    device: torch.device,
    *,
    kv_format: KVFormat = "bf16",
    index_format: IndexFormat = "bf16",
    chunk: int = 512,
    on_token: Callable[[int], None] | None = None,
) -> Generated:
    """Generates from one prompt with a fresh cache. Raises ValueError for more tokens than the model has positions."""
    expect_positions(model, len(prompt) + sampling.max_new_tokens - 1)
    cache = KVCache(
        model.config,
        max_tokens=len(prompt) + sampling.max_new_tokens,
        step_tokens=min(chunk, len(prompt)),
        kv_format=kv_format,
        index_format=index_format,
        device=device,
    )
    times = [time.perf_counter()]

    def seen(_: int, token: int) -> None:
        times.append(time.perf_counter())
        if on_token is not None:
            on_token(token)

    (tokens,) = generate(model, cache, [prompt], sampling, chunk=chunk, on_token=seen)
    return Generated(
        prompt_tokens=len(prompt), tokens=tokens, prefill_s=times[1] - times[0], decode_s=times[-1] - times[1]
    )


def expect_positions(model: Transformer, tokens: int) -> None:
    """Raises ValueError if a sequence would grow longer than the model was made for."""
    most = model.config.max_position_embeddings
    if tokens > most:
        raise ValueError(f"a sequence of {tokens} tokens is longer than the model's {most} positions")


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns under their names; numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    right = [bool(rows) and all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(head))]

    def line(values: Sequence[str]) -> str:
        padded = (v.rjust(w) if r else v.ljust(w) for v, w, r in zip(values, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *map(line, cells)])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
