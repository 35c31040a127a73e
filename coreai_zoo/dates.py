"""The date that a bundle carries: part of the input, so that the same inputs give the same bytes."""

from __future__ import annotations

import datetime as dt
import os

from coreai_zoo.errors import BadInput


def source_date_epoch() -> int:
    """Seconds since 1970 that a bundle carries as its date: SOURCE_DATE_EPOCH, else 0, so that rebuilds are equal.

    Raises:
        BadInput: when SOURCE_DATE_EPOCH is no such number.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "0")
    try:
        seconds = int(given)
        build_date(seconds)
    except (ValueError, OverflowError, OSError) as error:
        raise BadInput(f"SOURCE_DATE_EPOCH is {given!r}, not seconds since 1970.") from error
    return seconds


def build_date(seconds: int) -> str:
    """Seconds since 1970 as the date that `metadata.json` carries."""
    return dt.datetime.fromtimestamp(seconds, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
