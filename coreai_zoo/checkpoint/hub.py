"""Checkpoints on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, EnvironmentLacks


def locate_checkpoint(entry: Entry, directory: Path | None, *, sample: bool) -> tuple[Path, str | None]:
    """Where the checkpoint is, and its commit on the hub where that is known; of a sample, a copy may be given.

    Raises:
        EnvironmentLacks: when it would have to be fetched and cannot be.
    """
    if directory is not None:
        return directory, None
    if sample:
        return entry.sample_directory(), None
    return _fetch(entry)


def _fetch(entry: Entry) -> tuple[Path, str]:
    """Download the entry's revision, or the newest if the entry pins none; (directory, commit)."""
    if entry.hf_id is None:
        raise BadInput(f"Entry {entry.name} names no repository to fetch a checkpoint from.", "Pass --checkpoint DIR.")
    import huggingface_hub

    hf_id, revision = entry.hf_id, entry.hf_revision

    def download(local_only: bool) -> str:
        return huggingface_hub.snapshot_download(
            hf_id,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"],
            local_files_only=local_only,
        )

    directory = fetch_from_hub(
        hf_id,
        revision,
        download,
        "Pass --checkpoint DIR with a local copy, or --sample to build the miniature that ships with the entry.",
    )
    return directory, directory.name


def fetch_from_hub(hf_id: str, revision: str | None, download: Callable[[bool], str], hint: str) -> Path:
    """Path of what `download` fetches from a repository on the hub, or finds on this machine.

    Args:
        hf_id: the repository.
        revision: its commit, or None for the newest.
        download: takes whether to look on this machine only; returns a path.
        hint: what to do when the files cannot be had.

    Raises:
        EnvironmentLacks: when they are not here and cannot be fetched.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    reason: Exception | None = None
    try:
        # One request. Downloads try again for half a minute, with a warning each time, before they give up.
        huggingface_hub.HfApi().model_info(hf_id, revision=revision)
    except Exception as error:  # noqa: BLE001  # the HTTP library beneath raises its own; offline, what is here will do
        reason = error
    try:
        return Path(download(reason is not None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(reason or error).strip().splitlines()
        text = said[0][:200].removesuffix(".") if said else type(reason or error).__name__
        raise EnvironmentLacks(
            f"The checkpoint {hf_id} is not on this machine and cannot be fetched ({text}).", hint
        ) from error


# STAND-IN until the branch `hub` is merged
import re as _re

from attrs import frozen as _frozen


@_frozen
class Repository:
    id: str
    revision: str | None

    @classmethod
    def parse(cls, text):
        m = _re.fullmatch(r"(?:https://huggingface.co/)?([\w.-]+/[\w.-]+?)(?:@([\w.-]+))?", text)
        return cls(m[1], m[2]) if m and not text.startswith((".", "/", "~")) else None


class HubSource:
    @classmethod
    def open(cls, repository, report):
        raise EnvironmentLacks("no hub yet")


def find_cached(hf_id, revision):
    return None
