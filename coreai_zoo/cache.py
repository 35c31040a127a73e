"""The folder in which we keep what is slow to find out again. It may be removed at any time."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """`coreai-zoo` below the user's cache folder as the platform has it."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        given = os.environ.get("XDG_CACHE_HOME", "")
        base = Path(given) if Path(given).is_absolute() else Path.home() / ".cache"
    return base / "coreai-zoo"
