"""What PyTorch computes, in batch-invariant mode: token by token, each a call of its own.

PyTorch's products and sums take their order from the shape of the whole call. A call of one token has one shape however
many tokens there are, in memory of its own, so that its alignment is the same too. That costs as many calls as tokens,
until an op has a kernel that keeps to one order by itself.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .errors import UnsupportedError

Arguments = tuple[Any, ...]
Cut = Callable[[Arguments], Iterator[Arguments]]


def each(f: Callable[..., Any], *rows: Tensor) -> Any:
    """f(*rows), whose result has a row for each of theirs: at once, or in batch-invariant mode row by row."""
    if not dispatch.is_batch_invariant() or not len(rows[0]):
        return f(*rows)
    return _joined([f(*(_row(x, i) for x in rows)) for i in range(len(rows[0]))])


def run(op: str, impl: Callable[..., Any], args: Arguments) -> Any:
    """The operator `op` by its implementation `impl`, token by token where its numbers depend on how many there are.

    Raises UnsupportedError for an op of which it is not known how to cut it.
    """
    if op in EXACT:
        return impl(*args)
    if op not in CUTS:
        raise UnsupportedError(f"{op} cannot be run token by token, as the batch-invariant mode wants")
    results = [impl(*one) for one in CUTS[op](args)]
    if not results:  # no tokens
        return impl(*args)
    return _by_page(results, args) if op == "index_logits" else _joined(results)


def _joined(results: list[Any]) -> Any:
    """Results of single tokens, one below the other."""
    if results[0] is None:
        return None
    if isinstance(results[0], Tensor):
        return torch.cat(results)
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _row(x: Tensor, i: int) -> Tensor:
    return x[i : i + 1].clone(memory_format=torch.contiguous_format)


def _rows(*places: int) -> Cut:
    """Cuts the arguments at these places, of which some may be None; the others are every token's."""

    def cut(args: Arguments) -> Iterator[Arguments]:
        for i in range(len(args[places[0]])):
            one = list(args)
            for place in places:
                one[place] = None if args[place] is None else _row(args[place], i)
            yield tuple(one)

    return cut


def _slots(args: Arguments) -> Iterator[Arguments]:
    """Slots of a grouped GEMM: one is a batch whose other experts are empty."""
    offsets = args[8]
    for i, one in enumerate(_rows(0, 1)(args)):
        yield (*one[:8], (offsets - i).clamp(0, 1), *one[9:])


def _pages(args: Arguments) -> Iterator[Arguments]:
    """Tokens, and of each the pages of its own sequence: how many a block table holds depends on other sequences."""
    page_size, block_table, ratio = args[4], args[6], args[9]
    for one in _rows(0, 1, 7, 8)(args):
        q, weights, data, format, _, head_dim, _, positions, sequence, _, scale = one
        pages = block_table[sequence.long().clamp(min=0)]  # [1, pages]
        for j in range(pages.shape[1]):
            shifted = positions - j * page_size * ratio  # entry 0 of a page is the first that is asked for
            page, own = pages[:, j : j + 1].contiguous(), sequence.clamp(max=0)
            yield q, weights, data, format, page_size, head_dim, page, shifted, own, ratio, scale


def _by_page(results: list[Tensor], args: Arguments) -> Tensor:
    pages = args[6].shape[1]
    return torch.cat([torch.cat(results[i : i + pages], dim=1) for i in range(0, len(results), pages)])


def _present(args: Arguments) -> Iterator[Arguments]:
    """Tokens with the rows that they attend to: how many -1 stand behind depends on other tokens. Reads the indices."""
    q, data, formats, geometry, indices, sink, scale = args
    for i in range(len(q)):
        own = [index[i : i + 1, index[i] >= 0] for index in indices]
        yield _row(q, i), data, formats, geometry, own, sink, scale


# integers only, or every number from its own row by operations that are each rounded alone
EXACT = {
    "compress_kv",
    "compress_kv_pair",
    "csa_queries",
    "csa_queries_fp8",
    "hyper_connection_post",
    "index_query",
    "index_query_fp8",
    "index_topk",
}
CUTS: dict[str, Cut] = {
    "grouped_gemm_nvfp4": _slots,
    "moe_nvfp4": _rows(0, 1, -3, -2),
    "hyper_connection_pre": _rows(0),
    "hyper_connection_head": _rows(0),
    "hyper_connection_post_pre": _rows(0, 1, 2, 3),
    "index_logits": _pages,
    "sparse_attention": _present,
}
