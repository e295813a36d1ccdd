"""Every environment variable that fp4suite reads, in one place. Arguments beat them.

FP4SUITE_TABLE       a tuned table (JSON file) that is asked before the shipped ones (`python -m fp4suite info` says
                     which is in force)
FP4SUITE_CACHE_DIR   where compiled results and logs are kept; default: the user's cache directory
FP4SUITE_KEEP        0: kernels of CuTe DSL are compiled in every process, not kept in the cache and loaded from there
FP4SUITE_BATCH_INVARIANT
                     1: results of a row do not depend on the other rows (`fp4suite.batch_invariant`)
FP4SUITE_OVERLAP     0: fusions are launched when the kernel before has ended, not while it still runs; GEMMs and index
                     scores, and the second launches of an op, as ever
FP4SUITE_COMMIT      the commit that results name where the sources are no git checkout (a copy, an installed wheel)
"""

import os
from pathlib import Path

import platformdirs


def table_path() -> Path | None:
    """FP4SUITE_TABLE, or None."""
    value = os.environ.get("FP4SUITE_TABLE")
    return Path(value) if value else None


def cache_dir() -> Path:
    """FP4SUITE_CACHE_DIR, or the user's cache directory for fp4suite. Not created here."""
    value = os.environ.get("FP4SUITE_CACHE_DIR")
    return Path(value) if value else platformdirs.user_cache_path("fp4suite")


def keeps_kernels() -> bool:
    """FP4SUITE_KEEP, true unless it is 0."""
    return os.environ.get("FP4SUITE_KEEP", "1") != "0"


def batch_invariant() -> bool:
    """FP4SUITE_BATCH_INVARIANT. Raises ValueError for a value other than 0 or 1."""
    value = os.environ.get("FP4SUITE_BATCH_INVARIANT") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"FP4SUITE_BATCH_INVARIANT must be 0 or 1, got {value!r}")
    return value == "1"


def overlaps() -> bool:
    """FP4SUITE_OVERLAP, true unless it is 0. Raises ValueError for a value other than 0 or 1."""
    value = os.environ.get("FP4SUITE_OVERLAP") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"FP4SUITE_OVERLAP must be 0 or 1, got {value!r}")
    return value == "1"


def commit() -> str:
    """FP4SUITE_COMMIT, or an empty string."""
    return os.environ.get("FP4SUITE_COMMIT", "")
