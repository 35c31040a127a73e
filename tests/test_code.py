"""The digest of a plugin's code covers everything that runs when the zoo calls it."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coreai_zoo.build.code import code_digest
from coreai_zoo_overlays import qwen3_5
from coreai_zoo_overlays.qwen3_5 import rewrites

BASE = """\
class Overlay:
    def decoder(self):
        return {number}

    def rewrite(self, layer):
        return layer


def rewrite(layer, number=0):
    return layer
"""

VARIANT = """\
import functools

import digested_base


class Variant(digested_base.Overlay):
    pass


class Rewrite:
    def __init__(self, apply):
        self.apply = apply

    def __call__(self, layer):
        return self.apply(layer)


@functools.wraps(digested_base.rewrite)
def wrapper(layer):
    return layer


def around(apply):
    return lambda layer: apply(layer)
"""


class Code:
    """Two modules that were found anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write(number=1)

    def write(self, *, number: int, variant: str = VARIANT) -> None:
        (self.folder / "digested_base.py").write_text(BASE.format(number=number))
        (self.folder / "digested_variant.py").write_text(variant)
        for name in ("digested_base", "digested_variant"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        self.base: Any = importlib.import_module("digested_base")
        self.variant: Any = importlib.import_module("digested_variant")

    def things(self) -> dict[str, object]:
        """One of each form in which code of the base module is called."""
        base, variant = self.base, self.variant
        return {
            "subclass": variant.Variant(),
            "class": variant.Variant,
            "function": base.rewrite,
            "partial": functools.partial(base.rewrite, number=2),
            "argument of a partial": functools.partial(functools.reduce, base.rewrite),
            "bound method": variant.Variant().rewrite,
            "callable object": variant.Rewrite(base.rewrite),
            "wrapper": variant.wrapper,
            "closure": variant.around(base.rewrite),
        }


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Code]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Code(tmp_path)
    for name in ("digested_base", "digested_variant"):
        sys.modules.pop(name, None)


def test_a_change_of_the_code_that_is_called_changes_the_digest_in_every_form(code: Code) -> None:
    before = {form: code_digest(thing) for form, thing in code.things().items()}
    assert before == {form: code_digest(thing) for form, thing in code.things().items()}
    code.write(number=22)
    after = {form: code_digest(thing) for form, thing in code.things().items()}
    assert [form for form in before if before[form] == after[form]] == []


def test_a_change_of_the_subclass_alone_changes_its_digest_and_not_that_of_its_base(code: Code) -> None:
    variant, base = code_digest(code.variant.Variant()), code_digest(code.base.Overlay())
    assert variant != base
    code.write(number=1, variant=f"{VARIANT}\n\nCHANGED = True\n")
    assert code_digest(code.variant.Variant()) != variant
    assert code_digest(code.base.Overlay()) == base


def test_what_a_partial_is_bound_to_is_part_of_its_digest(code: Code) -> None:
    one, other = (code_digest(functools.partial(code.base.rewrite, number=number)) for number in (1, 2))
    assert one != other


def test_the_overlay_and_its_rewrites_have_the_digest_of_their_package() -> None:
    overlay = code_digest(qwen3_5.Qwen35Overlay())
    assert overlay == code_digest(rewrites._loop_free_step) == code_digest(qwen3_5.Qwen35Overlay)
    assert len(overlay) == 64
