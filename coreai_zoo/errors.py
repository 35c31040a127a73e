"""Errors that a user can cause, each one paragraph: what, where, and what to do.

The command line prints `str(error)` and exits with `error.exit_code`; anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


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
    near = difflib.get_close_matches(name, known, n=count, cutoff=cutoff)
    return f"Did you mean {' or '.join(near)}?" if near else f"There are {listing(list(known)) or 'none'}."
