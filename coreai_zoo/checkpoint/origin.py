"""Where a checkpoint comes from, as far as something shows it: evidence, never assumption.

Models of one family have the same sizes and the same keys, so a config says nothing about which of them a folder holds.
What does, from the strongest to the weakest: the commit that was fetched, which is in the path of a snapshot in the
Hugging Face cache; the metadata that `hf download --local-dir` leaves beside the files; the front matter of a
README.md; and `_name_or_path` in the config. The last two may name the model that this one was made from, and are told
as that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from attrs import frozen

from coreai_zoo.checkpoint.readme import texts
from coreai_zoo.entry import HF_ID

Kind = Literal["sample", "hub", "download", "readme", "config", "none"]

_PHRASES: Mapping[Kind, str] = {
    "sample": "the sample that ships with the entry",
    "hub": "fetched from the Hugging Face hub",
    "download": "by the metadata that its download left beside it",
    "readme": "by its model card",
    "config": "by _name_or_path in its config.json",
    "none": "not known",
}
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r".*/models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")
_ON_HUB = re.compile(rf"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/({HF_ID})(?:/.*)?")


@frozen
class Origin:
    """Where a checkpoint comes from.

    Attributes:
        kind: what shows it.
        hf_id: the repository that it is; None where that is not known.
        revision: its commit there; None where that is not known.
        made_from: repositories of which one is this model or the one that it was made from.
    """

    kind: Kind = "none"
    hf_id: str | None = None
    revision: str | None = None
    made_from: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether repository and commit are known from where the files lie, not from what a file says."""
        return self.kind in ("hub", "download") and None not in (self.hf_id, self.revision)

    def is_of(self, hf_id: str | None) -> bool:
        """Whether it is known that the checkpoint is that of a repository; case does not tell two apart on the hub."""
        return None not in (self.hf_id, hf_id) and str(self.hf_id).lower() == str(hf_id).lower()

    @property
    def how(self) -> str:
        """What shows it, in words, with the commit."""
        return _PHRASES[self.kind] + (f" at commit {self.revision}" if self.revision else "")

    def __str__(self) -> str:
        if self.hf_id is not None:
            return f"{self.hf_id}, {self.how}"
        if self.made_from:
            return f"{' or '.join(self.made_from)}, or a model made from it, {self.how}"
        return f"of a repository that is not known, {self.how}" if self.revision else self.how


def find_origin(
    directory: Path, config: Mapping[str, Any], card: Mapping[str, Any], known: Mapping[str, str | None]
) -> Origin:
    """The origin of the checkpoint in a folder.

    Args:
        directory: the folder.
        config: its `config.json`.
        card: the front matter of its README.md, see `read_front_matter`.
        known: repositories of models that are known, each with a commit or None.
    """
    if inside := _SNAPSHOT.fullmatch(directory.resolve().as_posix()):
        return Origin("hub", f"{inside[1]}/{inside[2]}", inside[3])
    commit, changed = _downloaded(directory)
    revision = None if changed else commit
    downloaded = next((hf_id for hf_id, pinned in known.items() if commit is not None and pinned == commit), None)
    if downloaded is not None:
        return Origin("download", None, None, (downloaded,)) if changed else Origin("download", downloaded, commit)
    hf_id, made_from = _named_by_card(card)
    if hf_id is not None or made_from:
        return Origin("readme", hf_id, revision, made_from)
    # A path of whoever trained it looks like a repository, too: only those that are known count.
    name = str(config.get("_name_or_path", "")).lower()
    if named := tuple(hf_id for hf_id in known if name == hf_id.lower() or name.startswith(f"{hf_id.lower()}-")):
        return Origin("config", None, revision, named)
    return Origin("download" if revision else "none", None, revision)


def _downloaded(directory: Path) -> tuple[str | None, bool]:
    """The commit that `hf download --local-dir` fetched `directory` at, and whether files were changed since.

    None where they are of several commits, or of none. Beside each file the download leaves three lines: commit, hash,
    and the time at which the file was complete (huggingface_hub's `_local_folder.py`, which tells changes alike).
    """
    commits, changed = set(), False
    for path in (directory / "config.json", *directory.glob("*.safetensors")):
        note = directory / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
        try:
            commit, _, complete = note.read_text(encoding="utf-8").split()
            commits.add(commit)
            changed = changed or path.stat().st_mtime - 1 > float(complete)
        except (OSError, ValueError):
            changed = True  # a file of another making, or none
    commit = commits.pop() if len(commits) == 1 else ""
    return (commit, changed) if _COMMIT.fullmatch(commit) else (None, True)


def original_of(origin: Origin, card: Mapping[str, Any]) -> str | None:
    """The repository of the model that a checkpoint was made from, as far as origin and card tell; else None.

    A card that names the checkpoint's own repository as the base of a conversion names no other one.
    """
    _, made_from = _named_by_card(card)
    named = (*origin.made_from, *made_from)
    return next((hf_id for hf_id in named if not origin.is_of(hf_id)), None)


def _named_by_card(card: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """The repository that a card is of, and those that its model was made from.

    A card rarely names its own repository. Where it names no model that this one was made from, and `license_link`
    leads to a file in a repository, that is it: makers who publish a licence of their own link to it so.
    """
    named = [match[1] if (match := _ON_HUB.fullmatch(text)) else text for text in texts(card.get("base_model"))]
    made_from = tuple(dict.fromkeys(text for text in named if re.fullmatch(HF_ID, text)))
    linked = next((match[1] for link in texts(card.get("license_link")) if (match := _ON_HUB.fullmatch(link))), None)
    if linked is None or linked in made_from or card.get("base_model_relation") is not None:
        return None, made_from or ((linked,) if linked else ())
    return (linked, ()) if not made_from else (None, (linked, *made_from))


# ---------------------------------------------------------------------------------------------------------------------
# Licence
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Licence:
    """The licence of a checkpoint's weights.

    Attributes:
        id: as the hub spells it, `apache-2.0` for example, or `other`; None where it is not known.
        name: what an `other` one is called, where that is known.
        link: where its text is, where that is known.
        source: what says so, in words; None where it is not known.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    source: str | None = None


# The first words of the texts that nearly all open checkpoints come with.
_LICENCE_TEXTS = {
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0, January 2004"),
    "mit": re.compile(r"\s*(?:The )?MIT License\b"),
}


def find_licence(
    directory: Path, card: Mapping[str, Any], origin: Origin, stated: tuple[str | None, str | None]
) -> Licence:
    """The licence of the weights in `directory`: what the card says, or the licence's own text, or else the entry.

    Args:
        directory: the checkpoint's folder.
        card: its card's front matter.
        origin: where it comes from.
        stated: a repository and its licence as an entry has them, which hold if that is where it comes from.
    """
    named = next(texts(card.get("license")), None)
    if named is not None:
        name, link = (next(texts(card.get(key)), None) for key in ("license_name", "license_link"))
        return Licence(named, name, _address(link, origin), "the checkpoint's model card")
    for path in sorted(directory.glob("LICENSE*")):
        text = path.read_text(encoding="utf-8", errors="replace")[:400] if path.is_file() else ""
        for licence, beginning in _LICENCE_TEXTS.items():
            if beginning.match(text):
                return Licence(licence, source=f"the checkpoint's {path.name}")
    hf_id, licence_of_entry = stated
    if licence_of_entry is not None and origin.is_of(hf_id):
        return Licence(licence_of_entry, source="the zoo's entry")
    return Licence()


def _address(link: str | None, origin: Origin) -> str | None:
    """A link as an address: one that is none is the name of a file in the repository."""
    if link is None or link.startswith(("https://", "http://")):
        return link
    return f"https://huggingface.co/{origin.hf_id}/blob/{origin.revision or 'main'}/{link}" if origin.hf_id else None
