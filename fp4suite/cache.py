"""Files in the user's cache: one a result, filed under a hash of all that it depends on, whole at every moment."""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from . import env


def key(depends_on: dict[str, Any]) -> str:
    """Hash of what a result depends on, all of it of types that JSON has."""
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


def path(kind: str, key: str, suffix: str) -> Path:
    """Where a result of this kind ("builds", "kernels") lies, or would lie."""
    return env.cache_dir() / kind / key[:2] / f"{key}{suffix}"


def write(to: Path, content: bytes) -> None:
    """Write a file that other processes see whole or not at all. Raises OSError."""
    to.parent.mkdir(parents=True, exist_ok=True)
    fd, aside = tempfile.mkstemp(dir=to.parent, suffix=".tmp")
    try:
        with os.fdopen(fd, "wb") as f:
            f.write(content)
        os.replace(aside, to)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise
