"""Errors that callers may want to tell apart. Wrong arguments stay `ValueError` and `TypeError`."""


class UnsupportedError(RuntimeError):
    """No kernel here can do this: names the op, the architecture and what would work."""


class TableError(ValueError):
    """A tuned table that cannot be read or trusted: names the file, the entry and the reason."""
