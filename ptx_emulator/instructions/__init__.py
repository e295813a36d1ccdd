"""One module a family of instructions; importing it registers the decoders."""

from . import arithmetic, asynchronous, convert, data, launch, matrix, multimem, sync, system, tcgen05, tma, warp, wgmma

__all__ = [
    "arithmetic",
    "asynchronous",
    "convert",
    "data",
    "launch",
    "matrix",
    "multimem",
    "sync",
    "system",
    "tcgen05",
    "tma",
    "warp",
    "wgmma",
]
