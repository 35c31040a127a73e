"""The names of a checkpoint's tensors: every way in which one is written, and what is left out by its name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from attrs import frozen

from coreai_zoo.overlay import Drop, Prefix, WeightMap


@frozen
class Wrapper:
    """What a wrapper around a whole model adds to the names of its parameters.

    Attributes:
        name: what it adds, without the dot.
        written_by: the wrapper, as a note has it.
        place: where it adds it; `anywhere` for one that also wraps layers.
    """

    name: str
    written_by: str
    place: Literal["front", "anywhere"] = "front"


WRAPPERS = (
    Wrapper("_orig_mod", "torch.compile", "anywhere"),
    Wrapper("_fsdp_wrapped_module", "FSDP", "anywhere"),
    Wrapper("_checkpoint_wrapped_module", "activation checkpointing", "anywhere"),
    Wrapper("_forward_module", "Lightning Fabric"),
    Wrapper("module", "DistributedDataParallel or DeepSpeed"),
    Wrapper("base_model.model", "PEFT, merged"),
)
"""Wrappers that any model may have been saved in. transformers does not know such names; they mean the same."""


@frozen
class Spelling:
    """One way to read a key.

    Attributes:
        text: the key as the rules write it.
        notes: what was done to read it so: as it is written, as it is meant, and who writes so.
    """

    text: str
    notes: tuple[tuple[str, str, str], ...] = ()


class Names:
    """The names that a weight map knows."""

    def __init__(self, weight_map: WeightMap) -> None:
        self._prefixes = weight_map.prefixes
        self._drops = [(_dropped_keys(drop), drop) for drop in weight_map.drops]

    def spellings(self, key: str) -> Iterator[Spelling]:
        """The ways to read a key. As it is written comes first, so that one that is spelled in full is left alone."""
        yield from self._with_prefixes(Spelling(key))
        if (unwrapped := _unwrapped(key)).notes:
            yield from self._with_prefixes(unwrapped)

    def _with_prefixes(self, spelling: Spelling) -> Iterator[Spelling]:
        yield spelling
        for prefix in self._prefixes:
            if spelling.text.startswith(prefix.found):
                yield _respelled(spelling, prefix)

    def drop_of(self, key: str) -> Drop | None:
        """The drop that leaves a key out, however it is spelled; None where it is not left out."""
        texts = [spelling.text for spelling in self.spellings(key)]
        return next((drop for text in texts for keys, drop in self._drops if keys.fullmatch(text)), None)

    def is_left_out(self, key: str) -> bool:
        """Whether a drop leaves a key out."""
        return self.drop_of(key) is not None


def notes_on(spellings: Iterable[Spelling]) -> tuple[str, ...]:
    """What was done to read the keys of a checkpoint, one phrase for each way, with the number of its keys."""
    counts = Counter(note for spelling in spellings for note in spelling.notes)
    return tuple(
        f"{count} tensor{'s are' if count > 1 else ' is'} called {found}* and read as {meant}*, as {writer} names them"
        for (found, meant, writer), count in counts.items()
    )


def _unwrapped(key: str) -> Spelling:
    """A key without what wrappers added, in whatever order they were put around each other."""
    text, before = key, ""
    notes: dict[tuple[str, str, str], None] = {}
    while text != before:
        before = text
        for wrapper in WRAPPERS:
            start = r"(?<![^.])" if wrapper.place == "anywhere" else r"\A"
            text, count = re.subn(rf"{start}{re.escape(wrapper.name)}\.", "", text)
            if count:
                notes[f"{wrapper.name}.", "", wrapper.written_by] = None
    return Spelling(text, tuple(notes))


def _respelled(spelling: Spelling, prefix: Prefix) -> Spelling:
    note = () if prefix.written_by is None else ((prefix.found, prefix.meant, prefix.written_by),)
    return Spelling(prefix.meant + spelling.text[len(prefix.found) :], (*spelling.notes, *note))


def _dropped_keys(drop: Drop) -> re.Pattern[str]:
    """The expression that matches the keys which `drop` leaves out."""
    source = drop.source
    head, rest = (source[:-2], r"[\s\S]*") if source.endswith("**") else (source, "")
    names: set[str] = set()

    def group(name: str) -> str:
        if name in names:
            return f"(?P={name})"
        names.add(name)
        return rf"(?P<{name}>0|[1-9][0-9]*)"

    parts = re.split(r"\{(\w+)\}", head)
    return re.compile("".join(group(part) if index % 2 else re.escape(part) for index, part in enumerate(parts)) + rest)
