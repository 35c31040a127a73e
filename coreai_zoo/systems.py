"""Operating systems, as contracts say which one they need and `--target` says which one a machine has."""

from __future__ import annotations

import re

from attrs import field, frozen
from attrs.validators import in_, matches_re

from coreai_zoo.errors import BadInput, near_names

_NAMES = ("macOS", "iOS")
_VERSION = r"[0-9]+(?:\.[0-9]+)*"  # not \d, which digits of every script are
_TARGET = re.compile(rf"([a-z]+) ?({_VERSION})", re.IGNORECASE | re.ASCII)


@frozen
class System:
    """An operating system at one version.

    Attributes:
        name: `macOS` or `iOS`.
        version: as its maker writes it, for example `27.0`.
    """

    name: str = field(validator=in_(_NAMES))
    version: str = field(validator=matches_re(_VERSION))

    @classmethod
    def parse(cls, text: str) -> System:
        """The system that is called `macos27.2` on the command line.

        Raises:
            BadInput: when `text` is not the name of one with its version.
        """
        found = _TARGET.fullmatch(text)
        names = [name for name in _NAMES if found and name.lower() == found[1].lower()]
        if found is None or not names:
            known, word = [name.lower() for name in _NAMES], re.split(r"[^a-z]", text.lower())[0]
            near = "" if word in known else near_names(word, known, 1, 0.7)
            hint = f"Write {' or '.join(known)} and its version, such as macos27.0 or ios18."
            raise BadInput(f"{text!r} names no system.", f"{near} {hint}".lstrip())
        return cls(names[0], found[2])

    @property
    def target(self) -> str:
        """What it is called on the command line."""
        return f"{self.name.lower()}{self.version}"

    @property
    def order(self) -> tuple[int, ...]:
        """The numbers of the version, by which two of one name compare; 27 and 27.0 are the same."""
        numbers = [int(number) for number in self.version.split(".")]
        while numbers and numbers[-1] == 0:
            numbers.pop()
        return tuple(numbers)

    def runs(self, needed: System) -> bool:
        """Whether this is the system `needed` or a later version of it."""
        return self.name == needed.name and self.order >= needed.order

    def __str__(self) -> str:
        return f"{self.name} {self.version}"
