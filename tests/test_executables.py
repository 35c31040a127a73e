"""What `executables` gives is what the runtime makes of the very bytecode, each time."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coreai.authoring import AIModelAsset

from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bundle.bundle import Bundle
from executables import compile_once

HEAD = "lm_head.parametrizations.weight.original"


def logits(bundle: Bundle, asset: Path) -> np.ndarray[Any, Any]:
    with CoreAIBackend().stepper(asset, bundle.functions, 8) as stepper:
        return stepper.step(5)


def test_each_bytecode_is_compiled_once_and_runs_as_if_it_were_compiled_each_time(
    built: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built("qwen3.6-27b", "int8hu")
    with monkeypatch.context() as patch:
        patch.setattr(AIModelAsset, "_write_odix", AIModelAsset._write_odix.__wrapped__)
        expected = logits(bundle, bundle.asset)

    other = shutil.copytree(bundle.asset, tmp_path / bundle.asset.name)  # the same but for one row of the head
    codes = bytes(CoreAIBackend().constants(bundle.asset)[HEAD])
    bytecode = (other / "main.mlirb").read_bytes()
    assert bytecode.count(codes) == 1
    bytecode = bytecode.replace(codes, codes[:-128] + bytes(128))
    (other / "main.mlirb").write_bytes(bytecode)
    (other / "main.hash").write_bytes(hashlib.sha256(bytecode).digest())

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled: list[str] = []
    real = AIModelAsset._write_odix.__wrapped__

    def counted(self: AIModelAsset, *arguments: Any, **options: Any) -> None:
        compiled.append(str(self.path))
        real(self, *arguments, **options)

    monkeypatch.setattr(AIModelAsset, "_write_odix", counted)
    compile_once(monkeypatch)
    assert np.array_equal(logits(bundle, bundle.asset), expected)
    assert np.array_equal(logits(bundle, bundle.asset), expected)
    assert not np.array_equal(logits(bundle, other), expected)
    assert compiled == [str(bundle.asset), str(other)]
