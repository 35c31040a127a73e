"""Errors that a user can cause, each one paragraph: what, where, and what to do.

The command line prints `str(error)` and exits with `error.exit_code`; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import itertools
import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path


class ZooError(Exception):
    """Base of every error that is reported without a traceback.

    Args:
        message: what is wrong and where, one paragraph without a trailing newline.
        hint: what to do about it, if that is known.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        notes = getattr(self, "__notes__", [])
        return " ".join(part for part in (self.message, self.hint, *notes) if part)


class BadInput(ZooError):
    """A name, file, option or checkpoint that cannot be used as given (exit code 2)."""


class EnvironmentLacks(ZooError):
    """Something that this machine or installation does not have (exit code 3)."""

    exit_code = 3


class CheckFailed(ZooError):
    """A gate or a verification that ran and did not hold (exit code 1)."""

    exit_code = 1


class PluginError(ZooError):
    """A plugin that raised or answered wrongly; the message names the plugin and the hook (exit code 2)."""


# ---------------------------------------------------------------------------------------------------------------------
# The last line of a command that fails
# ---------------------------------------------------------------------------------------------------------------------

_INTERRUPTED = 130  # `interruption.EXIT_CODE`, which needs no errors

_line_for_program: Callable[[str, int], str] | None = None


def tell_failure_as(line: Callable[[str, int], str] | None) -> None:
    """From now on this process ends its stderr with what `line` makes of message and exit code; None: with words.

    A process has one last line, and who writes it may know nothing of the command that ran: the frame around all
    commands, and what runs when a native library ends the process.
    """
    global _line_for_program  # noqa: PLW0603  # see above
    _line_for_program = line


def failure_line(error: BaseException) -> str:
    """The last line on stderr of a process that `error` ends."""
    if _line_for_program is not None:
        return _line_for_program(*reason(error))
    return f"error: {error}" if isinstance(error, ZooError) else reason(error)[0]


def reason(error: BaseException) -> tuple[str, int]:
    """The words and the exit code of an error; of a bug, its type and what it says."""
    if isinstance(error, ZooError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", _INTERRUPTED
    return f"{type(error).__name__}: {error}", 1


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------

_LOOKED_AT = 10_000  # names in a folder, of which one may be meant


def zoo_command(*words: object) -> str:
    """A command of `zoo` that a user can paste into a shell as it is, whatever the paths in it are called."""
    # A path that begins with a dash would be an option.
    texts = [f"./{word}" if isinstance(word, Path) and str(word).startswith("-") else str(word) for word in words]
    return shlex.join(["zoo", *texts])


def argument(text: str | Path) -> str | Path:
    """A word for `zoo_command` that is no option, whatever it begins with: then it is taken for a path."""
    return Path(text) if str(text).startswith("-") else text


def listing(items: list[str], limit: int = 12, separator: str = ", ") -> str:
    """Join `items` for a one-paragraph message, cut after `limit` with a count of the rest."""
    shown = separator.join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def did_you_mean(name: str, known: Collection[str], count: int = 1, cutoff: float = 0.6) -> str:
    """The hint about a name that is not there: the nearest of those that are, or else all of them.

    Args:
        name: what was asked for.
        known: the names that there are.
        count: how many of the nearest are named at most.
        cutoff: how much alike they have to be, from 0 to 1.
    """
    separator = "; " if any("," in each for each in known) else ", "
    return near_names(name, known, count, cutoff) or f"There are {listing(list(known), separator=separator) or 'none'}."


def near_names(name: str, known: Collection[str], count: int = 3, cutoff: float = 0.6) -> str:
    """As `did_you_mean`, but empty where no name is near. Capital letters make no difference."""
    names = {each.lower(): each for each in reversed([*known])}
    written_otherwise = [each for each in known if letters(each) == letters(name)]
    if written_otherwise:
        return f"Did you mean {written_otherwise[0]}?"
    near = difflib.get_close_matches(name.lower(), names, n=count, cutoff=cutoff)
    return f"Did you mean {' or '.join(names[each] for each in near)}?" if near else ""


def letters(name: str) -> str:
    """What is left of a name where neither capital letters nor signs count."""
    return "".join(character for character in name.lower() if character.isalnum())


def near_paths(path: Path) -> str:
    """The hint about a path that is not there: what is called almost like its first part that is missing.

    Empty where nothing is, and where it is there.
    """
    missing = path
    try:
        while missing.parent != missing and not missing.parent.is_dir():
            missing = missing.parent
        if os.path.lexists(missing):  # a file or a dangling link, in the place of a folder perhaps
            return ""
        beside = [each.name for each in itertools.islice(missing.parent.iterdir(), _LOOKED_AT)]
    except (OSError, ValueError):  # it may not be looked at, or can be no path
        return ""
    return near_names(str(missing), [str(missing.parent / name) for name in beside if _alike(name, missing.name)])


def _alike(name: str, other: str) -> bool:
    """Whether two names are near by themselves: paths with a long beginning in common are near anyway."""
    return bool(difflib.get_close_matches(name.lower(), [other.lower()], n=1, cutoff=0.75))
