"""Assets of decoders whose weights are at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coreai_zoo.backend import Constant, Traced
from coreai_zoo.digest import file_sha256
from coreai_zoo.layout import Layout


def save(traced: Traced, constants: Mapping[str, Constant], destination: Path, *, whole: bool = False) -> Layout:
    """Lay an asset out, and write its weights to where they are to stand; all are known before where it is `whole`."""
    layout = traced.lay_out(
        constants, lambda names: {name: constants[name] for name in (constants if whole else names)}
    )
    layout.write(destination, reserve=False)
    file = destination / layout.path
    with file.open("r+b") as output:
        for name, start in layout.room.items():
            output.seek(start)
            output.write(memoryview(constants[name].data.reshape(-1)).cast("B"))
    if layout.checksum is not None:
        (destination / layout.checksum).write_bytes(bytes.fromhex(file_sha256(file)))
    return layout


def write_specification(package: Path, model: Any) -> None:
    """Put another specification into an ML package."""
    from coreai_zoo.backends.coreml.package import specification

    for name, content in specification(model).items():
        (package / name).write_bytes(content)
