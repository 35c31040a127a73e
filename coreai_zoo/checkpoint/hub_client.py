"""How the hub is asked: patience with failures that pass, and a paragraph for each that does not."""

from __future__ import annotations

import contextlib
import email.utils
import importlib
import logging
import os
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from coreai_zoo.disk import NO_SPACE
from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError
from coreai_zoo.progress import Reporter

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_Answer = TypeVar("_Answer")

METADATA_TRIES = 3
FILE_TRIES = 8
"""How often in a row a request is made before its failure is told."""
_ENOUGH = 64 * 2**20
"""After so many bytes without a failure the tries count anew."""
_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
"""Seconds before the second try; each further pause is twice as long, up to the longest."""
_LONGEST_WAIT = 330.0
"""Seconds that a hub may ask to wait for; the limits of the real one start anew every five minutes."""
_PAGE = "https://huggingface.co"


def quieten() -> None:
    """Have the client print nothing (progress is ours to show) and ask nothing but what it is told to."""
    from huggingface_hub import constants
    from huggingface_hub.utils.logging import set_verbosity

    if not constants.HF_DEBUG:
        set_verbosity(logging.ERROR)
    # Else it asks each hub for a list of programs that may have started it, to say so in its headers.
    constants.HF_HUB_DISABLE_TELEMETRY = True


# ---------------------------------------------------------------------------------------------------------------------
# Patience
# ---------------------------------------------------------------------------------------------------------------------


class BrokeOff(Exception):
    """An answer ended before its end without an error."""


class Patience:
    """Waits before one more try, for as long as the hub asks for, and not for ever.

    Args:
        report: told why there is a wait.
        tries: how often in a row a request may fail, see `FILE_TRIES`.
    """

    def __init__(self, report: Reporter, tries: int) -> None:
        self._report, self._tries = report, tries
        self._failures, self._gained = 0, 0

    def ask(self, request: Callable[[], _Answer]) -> _Answer:
        """What `request` gives, in one of the tries."""
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

        while True:
            try:
                return request()
            except (HTTPError, BrokeOff) as error:
                self.after(error, "trying again")

    def after(self, error: Exception, then: str, gained: int = 0) -> None:
        """Wait, and say so; or raise the error, when waiting does not help or was tried often enough.

        Args:
            error: of the try.
            then: what comes after the wait, in words.
            gained: how many bytes the try brought.
        """
        self._gained += gained
        if self._gained >= _ENOUGH:
            self._failures, self._gained = 0, 0
        self._failures += 1
        asked = _asked_wait(error)
        if not _may_pass(error) or self._failures >= (self._tries if asked is None else FILE_TRIES):
            raise error
        if asked is not None and asked > _LONGEST_WAIT:
            raise error
        seconds = max(asked or 0.0, min(_PAUSE * 2 ** (self._failures - 1), _LONGEST_PAUSE))
        when = f" in {seconds:.0f} s" if seconds >= 2 else ""
        self._report.note(f"{_happened(error)}; {then}{when}")
        time.sleep(seconds)


def _asked_wait(error: Exception) -> float | None:
    """Seconds that the hub asks to wait for, if it does."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    if not isinstance(error, HfHubHTTPError):
        return None
    headers = error.response.headers
    given = headers.get("Retry-After", "").strip()
    if given.isdecimal():
        return float(given)
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    limit = parse_ratelimit_headers(headers) if error.response.status_code == 429 else None
    return None if limit is None or limit.remaining else float(limit.reset_in_seconds)


def _may_pass(error: Exception) -> bool:
    """Whether a failure is one that another try may not meet: of the connection, or of the server."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return not isinstance(error, _client_errors()) and not _is_of_a_certificate(error)
    return error.response.status_code in {408, 425, 429} or error.response.status_code >= 500


def _client_errors() -> tuple[type[Exception], ...]:
    """What the client's HTTP library raises where an address leads nowhere, today and tomorrow."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    library = importlib.import_module(HTTPError.__module__.partition(".")[0])  # it has changed its name before
    return library.TooManyRedirects, library.UnsupportedProtocol


def _is_of_a_certificate(error: BaseException | None) -> bool:
    """Whether a connection failed because nobody vouches for who answers."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return True
    return error is not None and _is_of_a_certificate(error.__cause__ or error.__context__)


def _happened(error: Exception) -> str:
    """What a failure that may pass was, in a few words."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return f"{host()} answers {_status(error)}"
    return f"the connection broke ({said(error)})"


# ---------------------------------------------------------------------------------------------------------------------
# Errors, in words
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(repo_id: str, revision: str, folder: Path | None = None) -> Iterator[None]:
    """Within the block what the client, the network and the disk raise becomes an error in one paragraph.

    Args:
        repo_id: the repository.
        revision: of it, as the user named it.
        folder: where files are written; None for the cache.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    try:
        yield
    except HfHubHTTPError as error:  # which is an OSError too
        raise _refusal(error, repo_id, revision) from error
    except OfflineModeIsEnabled as error:
        raise EnvironmentLacks(
            f"{repo_id} is not to be fetched: HF_HUB_OFFLINE is set.", "Unset it, or give a folder with the checkpoint."
        ) from error
    except (HTTPError, BrokeOff, ConnectionError, TimeoutError) as error:
        raise EnvironmentLacks(
            f"{repo_id} cannot be fetched: the connection to {host()} fails ({said(error)}).",
            "Check the network, and HF_ENDPOINT or HTTPS_PROXY if set; the same command goes on from what has come.",
        ) from error
    except OSError as error:
        raise _disk(error, folder) from error


def _refusal(error: HfHubHTTPError, repo_id: str, revision: str) -> ZooError:
    """What an answer with an error status means."""
    from huggingface_hub import errors

    status, login = error.response.status_code, "log in with `hf auth login`"
    if os.environ.get("HF_TOKEN"):
        login += " (HF_TOKEN, which is set, comes before it)"
    if isinstance(error, errors.GatedRepoError):
        return EnvironmentLacks(
            f"{repo_id} is gated: its files are for those who have accepted its terms.",
            f"Accept them at {_PAGE}/{repo_id} and {login}.",
        )
    if (
        status == 401 and "authorization" in error.response.request.headers
    ):  # to a token that it knows it says 403 or 404
        return EnvironmentLacks(f"{host()} does not accept the token of this machine.", f"To read {repo_id}, {login}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return BadInput(
            f"{repo_id} has no revision {revision}.",
            f"{_PAGE}/{repo_id}/tree/main lists branches and tags; a commit is given in full.",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or (status == 404 and "/api/" in error.response.url.path):
        return BadInput(
            f"{host()} shows no model repository {repo_id}: there is none, or it is private.",
            f"Check the name at {_PAGE}/models; if it is private, {login}.",
        )
    if status in {401, 403}:
        return EnvironmentLacks(
            f"{host()} does not let this machine read {repo_id} ({_status(error)}).",
            f"Visit {_PAGE}/{repo_id} to see what it asks for, and {login}.",
        )
    if status == 429:
        wait = _asked_wait(error)
        when = "later" if wait is None else f"in {max(1, round(wait / 60))} minutes"
        return EnvironmentLacks(
            f"{repo_id} cannot be fetched: {host()} has had too many requests from here ({_status(error)}).",
            f"Try again {when}; who is logged in (`hf auth login`) may ask more often.",
        )
    _, _, named = error.response.url.path.partition("/resolve/")
    file = f"{named.partition('/')[2]} of " if named else ""
    return EnvironmentLacks(
        f"{file}{repo_id} cannot be fetched: {host()} answers {_status(error)}.",
        "Try again later; the same command goes on from what has come.",
    )


def not_the_hub(what: str) -> EnvironmentLacks:
    """The error for an answer that no hub gives."""
    return EnvironmentLacks(
        f"What answers for {host()} is not the hub: asked for {what}, it sends a page of its own.",
        "A proxy or a network that wants a login may be in between: open the address in a browser; check HF_ENDPOINT.",
    )


def _disk(error: OSError, folder: Path | None) -> EnvironmentLacks:
    """What it means that the cache, or the folder in its place, cannot be read or written."""
    from huggingface_hub import constants

    place = constants.HF_HUB_CACHE if folder is None else folder
    elsewhere = "set HF_HOME to a folder" if folder is None else "choose a work folder with --work-dir DIR"
    if error.errno in NO_SPACE:
        return EnvironmentLacks(
            f"The disk is full at {place}, where checkpoints are fetched to.",
            f"Free some space there, or {elsewhere} on another disk; what has come is kept.",
        )
    what = "The Hugging Face cache" if folder is None else "The folder that weights are fetched to"
    return EnvironmentLacks(
        f"{what} cannot be used: {error.filename or place}: {error.strerror or error}.",
        f"{elsewhere[0].upper()}{elsewhere[1:]} that can be written.",
    )


def host() -> str:
    """Name of the hub's host, as the client is set up."""
    from huggingface_hub import constants

    return constants.ENDPOINT.partition("://")[2] or constants.ENDPOINT


def _status(error: HfHubHTTPError) -> str:
    said = " ".join((error.server_message or "").split())[:200].rstrip(".")
    return f"{error.response.status_code}{f', {said}' if said else ''}"


def said(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
