"""Where a plugin's code went wrong: the line that its author has to look at."""

from __future__ import annotations

import linecache
import sys
import sysconfig
import traceback
from pathlib import Path

# Packages that an author does not mend, told apart by folder: `coreai_zoo_overlays` is not in `coreai_zoo`.
_PACKAGES = (
    *("coreai_zoo", "torch", "coreai", "coreai_torch", "coreai_opt", "coremltools", "sympy", "numpy"),
    *("click", "pluggy", "attr", "attrs", "cattrs", "safetensors", "transformers", "tokenizers", "huggingface_hub"),
)


def raised_at(error: BaseException) -> str:
    """A sentence with the innermost line of a plugin through which `error` came; empty where there is none."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if is_plugins(file := frame.f_code.co_filename):
            return f"It is raised at {source_line(file, line)}."
    return ""


def source_line(file: str, line: int) -> str:
    """A line of source with its place."""
    return f"{file}:{line}, `{linecache.getline(file, line).strip()}`"


def is_plugins(file: str) -> bool:
    """Whether a source file is a plugin's, or an overlay's, and neither the host's nor a library's."""
    if file.startswith("<"):  # made by a program
        return False
    path = Path(file)
    stdlib = Path(sysconfig.get_path("stdlib"))
    if stdlib in path.parents and "site-packages" not in path.parts:
        return False
    homes = (getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES)
    return not any(Path(home).parent in path.parents for home in homes if home)
