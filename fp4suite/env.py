"""Every environment variable that fp4suite reads, in one place. Arguments beat them.

FP4SUITE_TABLE       a tuned table (JSON file) that is asked before the shipped ones
FP4SUITE_CACHE_DIR   where compiled results and logs are kept; default: the user's cache directory
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


def commit() -> str:
    """FP4SUITE_COMMIT, or an empty string."""
    return os.environ.get("FP4SUITE_COMMIT", "")
