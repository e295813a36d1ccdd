"""What the ops refuse, before anything is launched or changed: arguments of wrong shapes, dtypes, strides or devices.

ValueError for a shape, a device, strides, a number out of range and for integers of another dtype, TypeError for floats
of another dtype. No value of a tensor is read. FP64, which the reference takes, passes where the rows are in it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import FP8RowTensor, IndexCache, IndexFormat, NVFP4Tensor, PagedCache, index_layout
from .operators import dtype_name
from .reference.compressor import CompressorStep, check_compressor, check_hadamard

INTEGERS = (torch.int32, torch.int64)


def tensor(x: Any, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")


def beside(x: Tensor | NVFP4Tensor, name: str, rows: Tensor | NVFP4Tensor | FP8RowTensor) -> None:
    if x.device != rows.device:
        raise ValueError(f"{name} must be on {rows.device} as what it goes with, got {x.device}")


def integers(x: Tensor, name: str, shape: list[int], rows: Tensor) -> None:
    tensor(x, name)
    if x.dtype != torch.int32 or list(x.shape) != shape:
        raise ValueError(f"{name} must be int32 {shape}, got {x.dtype} {list(x.shape)}")
    beside(x, name, rows)


def floats(x: Tensor, name: str, shape: list[int], rows: Tensor) -> None:
    tensor(x, name)
    if list(x.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {list(x.shape)}")
    floating(x, name, rows)


def floating(x: Tensor, name: str, rows: Tensor) -> None:
    """BF16, FP16 or FP32, beside rows that it belongs to."""
    if rows.dtype != torch.float64:
        dtype_name(x, name)
    beside(x, name, rows)


def needs(rows: Tensor, name: str, wanted: dict[str, tuple[Tensor, list[int]]], of: str = "") -> None:
    """Floats of the shapes that go with rows; of: what names begin with."""
    for other, (x, shape) in wanted.items():
        if list(x.shape) != shape:
            raise ValueError(f"{of}{name} {list(rows.shape)} needs {other} {shape}, got {list(x.shape)}")
        floating(x, f"{of}{other}", rows)


def positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be positive, got {number}")


def alpha(given: Tensor, x: Tensor | NVFP4Tensor | FP8RowTensor, *, scalar: bool = False) -> None:
    tensor(given, "alpha")
    if given.dtype != torch.float32:
        raise TypeError(f"alpha must be float32, got {given.dtype}")
    beside(given, "alpha", x)
    if scalar and given.ndim:
        raise ValueError(f"alpha must be one number [], got {list(given.shape)}")


def order_of_rows(t: NVFP4Tensor, name: str) -> None:
    if t.order != "rows":
        raise ValueError(
            f'{name} must be in the order "rows", got "{t.order}": with_order("rows") makes a copy that is'
        )


# --- norm, RoPE and cache --------------------------------------------------------------------------------------------


def heads(x: Tensor, name: str) -> None:
    tensor(x, name)
    if x.ndim != 3:
        raise ValueError(f"{name} must be [tokens, heads, head_dim], got {list(x.shape)}")
    if x.dtype != torch.float8_e4m3fn:
        floating(x, name, x)


def norm(x: Tensor, weight: Tensor, name: str, weight_name: str) -> None:
    """Rows x [..., k] and the weight of their norm."""
    k, given = x.shape[-1], f"{list(x.shape)} and {list(weight.shape)}"
    if not k or list(weight.shape) != [k]:
        raise ValueError(f"{name} must be [..., k] with k positive and {weight_name} [k], got {given}")
    floating(x, name, x)
    floating(weight, weight_name, x)


def rope(x: Tensor, positions: Tensor, table: Tensor, cache: PagedCache | IndexCache | None = None) -> None:
    """positions of the tokens of x [tokens, ..., head_dim], and RoPE's table; cache: where x is stored."""
    if positions.dtype != torch.int32 or list(positions.shape) != [x.shape[0]]:
        raise ValueError(f"positions must be int32 [{x.shape[0]}], got {positions.dtype} {list(positions.shape)}")
    turned = table.shape[-1] if table.ndim == 2 else 0
    fits = 2 <= turned <= x.shape[-1] and turned % 2 == 0
    if table.dtype != torch.float32 or not fits or not table.is_contiguous():
        raise ValueError(
            f"table must be float32 [positions, an even number of up to {x.shape[-1]} dims], contiguous, "
            f"got {table.dtype} {list(table.shape)}"
        )
    if not x.device == positions.device == table.device:
        raise ValueError(
            f"positions and table must be on {x.device} beside their rows, got {positions.device}, {table.device}"
        )
    if isinstance(cache, PagedCache) and turned != cache.rope_dim:
        raise ValueError(f"the cache has {cache.rope_dim} RoPE dims, table {turned}")


def turned_in_place(o: Tensor) -> None:
    """Strides of o [tokens, heads, head_dim]: dims adjacent, and no two elements in one place."""
    tokens, heads, dims = o.shape
    of_token, of_head, of_dim = o.stride()
    apart = (tokens < 2 or of_token >= dims) and (heads < 2 or of_head >= dims)
    if tokens > 1 and heads > 1:  # heads within tokens, or tokens within heads
        apart = apart and (of_token > (heads - 1) * of_head + dims - 1 or of_head > (tokens - 1) * of_token + dims - 1)
    if o.numel() and not (apart and (dims < 2 or of_dim == 1)):
        raise ValueError(f"o is changed in place: its dims must be adjacent, its heads apart, got strides {o.stride()}")


def insert(
    kv: Tensor, weight: Tensor, positions: Tensor, table: Tensor, cache: PagedCache, slots: Tensor,
    weight_name: str = "weight",
) -> None:  # fmt: skip
    if kv.ndim != 2 or kv.shape[1] != cache.head_dim or list(weight.shape) != [cache.head_dim]:
        raise ValueError(
            f"kv must be [tokens, {cache.head_dim}] and {weight_name} [{cache.head_dim}], "
            f"got {list(kv.shape)} and {list(weight.shape)}"
        )
    floating(kv, "kv", kv)
    floating(weight, weight_name, kv)
    rope(kv, positions, table, cache)
    integers(slots, "slots", [len(kv)], kv)
    stored(cache, kv)


def stored(cache: PagedCache | IndexCache, like: Tensor) -> None:
    if not cache.data.is_contiguous():
        raise ValueError(f"cache.data must be contiguous, got strides {cache.data.stride()}")
    beside(cache.data, "cache.data", like)


# --- hyper-connections -----------------------------------------------------------------------------------------------


def fold(h: Tensor, fn: Tensor, base: Tensor, scale: Tensor, weight: Tensor | None, *, head: bool = False) -> None:
    """h [tokens, n, d] and what the product takes that gives a site's coefficients, or the head's."""
    streams(h)
    _, n, d = h.shape
    made = n if head else n * (n + 2)
    wanted = {"fn": (fn, [made, n * d]), "base": (base, [made]), "scale": (scale, [1 if head else 3])}
    wanted |= {"weight": (weight, [d])} if weight is not None else {}
    needs(h, "h", wanted)


def site(y: Tensor, h: Tensor, post: Tensor, comb: Tensor) -> None:
    """The output y of a site, its streams h [tokens, n, d] and its coefficients."""
    streams(h)
    tokens, n, d = h.shape
    needs(h, "h", {"y": (y, [tokens, d]), "post": (post, [tokens, n]), "comb": (comb, [tokens, n, n])})


def streams(h: Tensor) -> None:
    if h.ndim != 3 or not h.shape[1] * h.shape[2]:
        raise ValueError(f"h must be [tokens, n, d], n and d positive, got {list(h.shape)}")


# --- compressor ------------------------------------------------------------------------------------------------------


def compressor(step: CompressorStep, ratio: int, of: str = "") -> None:
    """What a compressor has of a step for itself; of: "entries: ", where there are two."""
    kv, head_dim = step.kv, step.cache.head_dim
    positive(ratio=ratio)
    if kv.ndim != 2:
        raise ValueError(f"{of}kv must be [tokens, {head_dim}] or twice as wide, got {list(kv.shape)}")
    check_compressor(kv, step.state, step.cache, ratio)
    dtype_name(kv, f"{of}kv")
    shape, ape = list(kv.shape), [ratio, kv.shape[1]]
    wanted = {"gate": (step.gate, shape), "ape": (step.ape, ape), "weight": (step.weight, [head_dim])}
    needs(kv, "kv", wanted, of)
    if step.gate.dtype != kv.dtype:
        raise TypeError(f"{of}kv and gate must have one dtype, got {kv.dtype} and {step.gate.dtype}")
    for name, own in (("ape", step.ape), ("state", step.state)):
        if own.dtype != torch.float32:
            raise TypeError(f"{of}{name} must be float32, got {own.dtype}")
    if not step.state.is_contiguous() or not step.cache.data.is_contiguous():
        raise ValueError(f"{of}state and cache.data must be contiguous, as both are changed")
    beside(step.state, f"{of}state", kv)
    beside(step.cache.data, f"{of}cache.data", kv)
    if step.hadamard:
        check_hadamard(head_dim)


def pair(entries: CompressorStep, keys: CompressorStep, ratio: int) -> None:
    """What each compressor of a step has for itself, and that both can be of one step."""
    compressor(entries, ratio, "entries: ")
    compressor(keys, ratio, "keys: ")
    a, b = ([*s.kv.shape[:1], s.kv.shape[1] // s.cache.head_dim, s.cache.page_size] for s in (entries, keys))
    if a != b:
        raise ValueError(f"entries and keys must have the same tokens, overlap and page size, got {a} and {b}")
    kinds = [[s.kv.dtype, s.gate.dtype, s.weight.dtype] for s in (entries, keys)]
    if kinds[0] != kinds[1]:
        raise TypeError(f"entries and keys must agree in the dtypes of kv, gate and weight, got {kinds[0]}, {kinds[1]}")
    beside(keys.kv, "keys: kv", entries.kv)


def joint(
    step: CompressorStep, table: Tensor, positions: Tensor, sequence_ids: Tensor, cu_seqlens: Tensor,
    state_slots: Tensor, slots: Tensor,
) -> None:  # fmt: skip
    """What compressors of a step have in common; step: what one of them has for itself."""
    kv, tokens = step.kv, len(step.kv)
    rope(kv[:, : step.cache.head_dim], positions, table, step.cache)
    if state_slots.ndim != 1:
        raise ValueError(f"state_slots must be int32 [sequences], got {list(state_slots.shape)}")
    sequences = len(state_slots)
    integers(sequence_ids, "sequence_ids", [tokens], kv)
    integers(slots, "slots", [tokens], kv)
    integers(cu_seqlens, "cu_seqlens", [sequences + 1], kv)
    integers(state_slots, "state_slots", [sequences], kv)


# --- indexer ---------------------------------------------------------------------------------------------------------


def query(q: Tensor, positions: Tensor, table: Tensor, format: IndexFormat, turn: bool) -> None:
    heads(q, "q")
    dtype_name(q, "q")
    rope(q, positions, table)
    index_layout(format, 1, q.shape[2])  # raises ValueError for another format, or dims that it cannot hold
    if turn:
        check_hadamard(q.shape[2])


def queries(q: Tensor, index_q: Tensor, positions: Tensor, table: Tensor, format: IndexFormat, turn: bool) -> None:
    heads(q, "q")
    rope(q, positions, table)
    heads(index_q, "index_q")
    if q.dtype != index_q.dtype:
        raise TypeError(f"q and index_q must have one dtype, got {q.dtype} and {index_q.dtype}")
    query(index_q, positions, table, format, turn)


def visible(rows: Tensor, block_table: Tensor, positions: Tensor, sequence_ids: Tensor, ratio: int) -> None:
    """Which entries the tokens of rows [tokens, ...] can see, and where they lie."""
    positive(ratio=ratio)
    if block_table.dtype != torch.int32 or block_table.ndim != 2:
        raise ValueError(
            f"block_table must be int32 [sequences, pages], got {block_table.dtype} {list(block_table.shape)}"
        )
    beside(block_table, "block_table", rows)
    integers(positions, "positions", [len(rows)], rows)
    integers(sequence_ids, "sequence_ids", [len(rows)], rows)


def keys(q: Tensor, weights: Tensor, cache: IndexCache) -> None:
    """Queries, the weights of their heads, and the keys that they are multiplied by."""
    heads(q, "q")
    if q.shape[2] != cache.head_dim or list(weights.shape) != list(q.shape[:2]):
        raise ValueError(
            f"q must be [tokens, heads, {cache.head_dim}] and weights [tokens, heads], "
            f"got {list(q.shape)} and {list(weights.shape)}"
        )
    if q.dtype == torch.float8_e4m3fn and cache.format != "fp8":
        raise TypeError(f"q in float8_e4m3fn is for keys in fp8, got keys in {cache.format}")
    if q.dtype == torch.float64:
        dtype_name(q, "q")
    floating(weights, "weights", q)
    stored(cache, q)


def gathered(q: Tensor, indices: Sequence[Tensor], sink: Tensor) -> None:
    """Queries, and the rows that each attends to."""
    heads(q, "q")
    for index in indices:
        if index.dtype != torch.int32 or index.ndim != 2 or len(index) != len(q):
            raise ValueError(f"indices must be int32 [{len(q)}, rows], got {index.dtype} {list(index.shape)}")
        beside(index, "indices", q)
    floats(sink, "sink", [q.shape[1]], q)


# --- experts ---------------------------------------------------------------------------------------------------------


def choices(topk_ids: Tensor, topk_weights: Tensor | None = None) -> None:
    if topk_ids.dtype != torch.int32 or topk_ids.ndim != 2:
        raise ValueError(f"topk_ids must be int32 [tokens, topk], got {topk_ids.dtype} {list(topk_ids.shape)}")
    if topk_weights is not None:
        if topk_weights.shape != topk_ids.shape:
            raise ValueError(
                f"topk_weights must be [tokens, topk] as topk_ids {list(topk_ids.shape)}, "
                f"got {list(topk_weights.shape)}"
            )
        dtype_name(topk_weights, "topk_weights")
        beside(topk_weights, "topk_weights", topk_ids)


def matrix(x: Tensor | NVFP4Tensor, name: str, k: int, weights: NVFP4Tensor) -> None:
    """Activations [rows, k] of stacked experts."""
    if len(x.shape) != 2 or x.shape[-1] != k:
        raise ValueError(f"{name} must be [rows, {k}], got {list(x.shape)}")
    if isinstance(x, Tensor):
        floating(x, name, x)
    beside(x, name, weights)


def by_table(logits: Tensor, topk: int, token_ids: Tensor, table: Tensor) -> None:
    """What chooses experts by token."""
    if table.dtype not in INTEGERS or table.ndim != 2 or table.shape[1] != topk:
        raise ValueError(f"table must be int32 or int64 [vocab, {topk}], got {table.dtype} {list(table.shape)}")
    if token_ids.dtype not in INTEGERS or list(token_ids.shape) != [len(logits)]:
        raise ValueError(f"token_ids must be int32 or int64 [{len(logits)}], got {token_ids.dtype} "
                         f"{list(token_ids.shape)}")  # fmt: skip
    beside(table, "table", logits)
    beside(token_ids, "token_ids", logits)
