"""What the runtime makes of an asset before it runs it, made once in a run of the tests and not at each loading.

The runtime of Linux compiles the bytecode of an asset to a file of its own format, and loads that: some tenths of a
second, where a step takes some hundredths. The same bytecode gives the same file.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from coreai.authoring import AIModelAsset

from coreai_zoo.digest import file_sha256

Compile = Callable[..., None]


def compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have an asset loaded from what was compiled of the same bytecode before, by whatever process of this run."""
    monkeypatch.setattr(AIModelAsset, "_write_odix", _remembering(AIModelAsset._write_odix, _folder()))


def _folder() -> Path:
    folder = Path(os.environ["XDG_CACHE_HOME"], "executables")  # of this run alone, see conftest
    folder.mkdir(exist_ok=True)
    return folder


def _remembering(compile_: Compile, folder: Path) -> Compile:
    @functools.wraps(compile_)
    def remembered(self: AIModelAsset, output_directory: Path, *, enable_debug_info: bool = False) -> None:
        bytecode = Path(self._model_asset._program_bytecode_path)
        compiled = folder / f"{file_sha256(bytecode)}{'-debug' * enable_debug_info}"
        if not compiled.exists():
            made = Path(tempfile.mkdtemp(dir=folder))
            try:
                compile_(self, made, enable_debug_info=enable_debug_info)
                made.rename(compiled)
            except OSError:  # no room, or another process was first
                if not compiled.exists():
                    raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
        for file in compiled.iterdir():  # some tests have another `shutil.copyfile`
            (output_directory / file.name).write_bytes(file.read_bytes())

    return remembered
