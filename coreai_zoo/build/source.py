"""What a command is asked about, and where its checkpoint is: an entry, a repository on the hub, or a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import evolve, field, frozen

from coreai_zoo.build.model import config_of_entry
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.catalogue import find_entry, load_entries
from coreai_zoo.checkpoint.adapters import refuse_unmerged
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.folder import CONFIG, INDEX, has_weights, read_config, read_index, uses_index
from coreai_zoo.checkpoint.fp8 import names_without_scales
from coreai_zoo.checkpoint.headers import TensorInfo
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.checkpoint.origin import Licence, Origin, find_licence, find_origin, original_of
from coreai_zoo.checkpoint.originals import NotOriginal, check_original
from coreai_zoo.checkpoint.readme import read_front_matter
from coreai_zoo.checkpoint.stream import open_on_hub
from coreai_zoo.checkpoint.tokenizer import chat_templates
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, ZooError, near_names, near_paths
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter

# ---------------------------------------------------------------------------------------------------------------------
# What is asked for
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Subject:
    """What is asked for. One of the three is there.

    Attributes:
        entry: the entry; None for a checkpoint that is taken as what its config says.
        repository: the repository on the hub, where it is asked for by its own name.
        directory: the folder that is asked for.
    """

    entry: Entry | None = None
    repository: Repository | None = None
    directory: Path | None = None


def find_subject(text: str, plugins: Plugins) -> Subject:
    """What `text` names: an entry by its name or file, a folder, or a repository on the hub.

    A folder that is there goes before a repository of the same name, as in transformers; one that is called like an
    entry is meant where it is written as a path. A repository that an entry names is that entry, and at the entry's
    revision where none is given.

    Raises:
        BadInput: when it names nothing, with the nearest entries.
        PluginError: when two plugins bring the entry.
    """
    entries = load_entries(plugins)
    path = os.path.expanduser(text)  # noqa: PTH111  # as the next two, for names that are too long for a path
    if text in entries or text.endswith(".toml"):
        return Subject(entry=find_entry(text, plugins)[0])
    if text and os.path.isdir(path):  # noqa: PTH112
        return Subject(directory=Path(path))
    if os.path.isfile(path):  # noqa: PTH113
        raise BadInput(f"{text} is a file.", "Give the folder that holds the checkpoint, or an entry file (.toml).")
    repository = Repository.parse(text)
    if repository is not None:
        named = [entry for entry, _ in entries.values() if entry.hf_id and entry.hf_id.lower() == repository.id.lower()]
        if len(named) > 1:
            names = " and ".join(entry.name for entry in named)
            raise BadInput(f"{repository.id} is named by the entries {names}.", "Give the name of one of them.")
        if not named:
            return Subject(repository=repository)
        return Subject(named[0], evolve(repository, revision=repository.revision or named[0].hf_revision))
    if "/" in text or text.startswith((".", "~")):
        hint = "Give an entry's name (`zoo list` shows them), a repository 'owner/name', or a folder that is there."
        raise BadInput(
            f"{text} is no folder, and not the name of a repository on the hub.", near_paths(Path(path)) or hint
        )
    try:
        return Subject(entry=find_entry(text, plugins)[0])
    except BadInput as error:
        error.add_note("A repository 'owner/name' on the hub or the path of a folder will do, too.")
        raise


def subject_of(request: BuildRequest, plugins: Plugins, entry: Entry | None = None) -> Subject:
    """What a request is about; `entry` where it is at hand.

    Raises:
        BadInput: when it names nothing, or two checkpoints.
        PluginError: when two plugins bring the entry.
    """
    if entry is not None:
        subject = Subject(entry=entry)
    elif request.model is not None:
        subject = find_subject(request.model, plugins)
    elif request.checkpoint is None:
        raise BadInput("There is nothing to look at.", "Name an entry or a repository, or pass --checkpoint DIR.")
    else:
        return Subject(directory=request.checkpoint)
    if request.checkpoint is not None and subject.entry is None:
        raise BadInput(f"{request.model} and --checkpoint name two checkpoints.", "Leave one of them out.")
    if request.sample and subject.entry is None:
        raise BadInput(f"{request.model} is no entry, and only entries have samples.", "`zoo list` shows them.")
    _require_stream(request, subject)
    return subject


def _require_stream(request: BuildRequest, subject: Subject) -> None:
    """Refuse to stream what is not on the hub."""
    named = [
        *([f"--checkpoint {request.checkpoint}"] if request.checkpoint is not None else []),
        *(["--sample"] if request.sample else []),
        *([f"the folder {subject.directory}"] if subject.directory is not None else []),
    ]
    if request.stream and named:
        raise BadInput(
            f"--stream is for a checkpoint that is fetched from the hub, and {named[0]} is on this machine.",
            "Leave one of them out.",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Where its checkpoint is
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Source:
    """The checkpoint of what is asked for.

    Attributes:
        hf_config: content of its `config.json`.
        directory: its folder; None where the entry's facts are all there is.
        origin: where it comes from.
        licence: of its weights.
        card: the front matter of its card.
        original: the repository that it was made from, or its entry's, for one that cannot be used itself.
        hub: fetches its weights; None where there is nothing to fetch.
        streamed: whether they are fetched while they are read, and their headers alone before.
    """

    hf_config: Mapping[str, Any]
    directory: Path | None = None
    origin: Origin = field(factory=Origin)
    licence: Licence = field(factory=Licence)
    card: Mapping[str, Any] = field(factory=dict)
    original: str | None = None
    hub: HubSource | None = None
    streamed: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What a build notes of files that are not fetched."""
        return () if self.hub is None else self.hub.notes

    @contextmanager
    def naming_the_original(self) -> Iterator[None]:
        """Within the block, the error for what is no original checkpoint names the one to use instead."""
        try:
            yield
        except NotOriginal as error:
            error.instead(self.original)
            raise

    @contextmanager
    def naming_the_repository(self) -> Iterator[None]:
        """Within the block, an error names what the user did, a repository, and not its folder in the cache."""
        try:
            yield
        except BadInput as error:
            if self.hub is not None:
                error.message = error.message.replace(str(self.directory), self.hub.id)
            raise

    @property
    def unfetched(self) -> bool:
        """Whether weights are still to be fetched."""
        return self.hub is not None and not self.hub.complete

    def open(self, *, need_weights: bool) -> Checkpoint | None:
        """The checkpoint; None where there are no weights, and none are needed yet.

        Of one that is streamed the headers are fetched.
        """
        if self.streamed and need_weights:
            assert self.hub is not None
            with self.naming_the_original():
                return open_on_hub(self.hub)
        if self.directory is None or self.unfetched or not (need_weights or has_weights(self.directory)):
            return None
        with self.naming_the_original():
            return Checkpoint.open(self.directory)

    def fetch(self, report: Reporter) -> None:
        """Fetch the weights that are not on this machine, and compare all with what the hub states.

        Raises:
            EnvironmentLacks: when that cannot be done.
        """
        if self.hub is not None:
            self.hub.fetch_weights(report)

    def tensors(self, opened: Checkpoint | None) -> Mapping[str, TensorInfo | None] | None:
        """The checkpoint's tensors; of an index without weights their names; None where neither is there."""
        if opened is not None:
            return opened.tensors
        if self.directory is None or not (self.directory / INDEX).is_file():
            return None
        weight_map = read_index(self.directory)
        if self.hub is not None and not uses_index([file.name for file in self.hub.weights], weight_map):
            return None
        names = dict.fromkeys(names_without_scales(sorted(weight_map)))
        with self.naming_the_original():
            refuse_unmerged(str(self.directory), names)
            check_original(str(self.directory), self.hf_config, names)
        return names


def find_source(subject: Subject, request: BuildRequest, plugins: Plugins, report: Reporter) -> Source:
    """Where the checkpoint of a request is. Of a repository on the hub, what is small is fetched.

    A dry request for an entry takes the entry's facts, and one for a repository fetches config and index alone.

    Raises:
        BadInput: when there is no such checkpoint.
        EnvironmentLacks: when the hub, or what is asked of it, cannot be reached.
    """
    entry = subject.entry
    directory = request.checkpoint or subject.directory
    if directory is not None:
        return _of_folder(directory, entry, plugins)
    if request.sample:
        assert entry is not None
        directory = entry.sample_directory()
        return Source(read_config(directory), directory, Origin("sample"))
    if request.dry and subject.repository is None:
        assert entry is not None
        hint = "Pass --checkpoint DIR with a folder that holds the model's config.json."
        return Source(config_of_entry(entry, plugins, hint))
    repository = subject.repository or _repository_of(entry)
    try:
        hub = HubSource.open(repository, report)
    except BadInput as error:
        known = [each.hf_id for each, _ in load_entries(plugins).values() if each.hf_id]
        if repository.id not in known and (near := near_names(repository.id, known)):
            error.add_note(near)
        raise
    directory = hub.fetch_small((CONFIG, INDEX) if request.dry else None)
    # The hub's own is the same, and there also for those who do not fetch the README.
    card = read_front_matter(directory) or (hub.listing.card if hub.listing else {})
    source = _source(directory, Origin("hub", hub.id, hub.commit), card, entry, hub)
    return evolve(source, streamed=request.stream)


def commit_of(source: Source, entry: Entry | None, report: Reporter) -> tuple[str, str] | None:
    """Repository and commit of what a build would take its weights from; None for a folder that is on no hub.

    Raises:
        EnvironmentLacks: when the entry names no commit, and the hub cannot be asked for the newest.
    """
    if source.directory is None:
        repository = _repository_of(entry)
        return repository.id, repository.revision or HubSource.open(repository, report).commit
    origin = source.origin
    if origin.kind == "hub" and origin.hf_id and origin.revision:
        return origin.hf_id, origin.revision
    return None


def _repository_of(entry: Entry | None) -> Repository:
    assert entry is not None
    if entry.hf_id is None:
        raise BadInput(f"Entry {entry.name} names no repository to fetch a checkpoint from.", "Pass --checkpoint DIR.")
    return Repository(entry.hf_id, entry.hf_revision)


def _of_folder(directory: Path, entry: Entry | None, plugins: Plugins) -> Source:
    card = read_front_matter(directory)
    entries = [*_entries(plugins), *([entry] if entry else [])]
    known = {each.hf_id: each.hf_revision for each in entries if each.hf_id}
    return _source(directory, find_origin(directory, read_config(directory), card, known), card, entry)


def _source(
    directory: Path, origin: Origin, card: Mapping[str, Any], entry: Entry | None, hub: HubSource | None = None
) -> Source:
    stated = (entry.hf_id, entry.licence) if entry else (None, None)
    licence = find_licence(directory, card, origin, stated)
    original = original_of(origin, card) or stated[0]
    return Source(read_config(directory), directory, origin, licence, card, original, hub)


def _entries(plugins: Plugins) -> list[Entry]:
    """The entries to look for evidence in; none where a file is bad, which is told to those who ask for an entry."""
    try:
        return [entry for entry, _ in load_entries(plugins).values()]
    except ZooError:
        return []


def other_model(source: Source, entry: Entry, plugins: Plugins) -> str | None:
    """The evidence that a checkpoint is of another model than an entry's, as a phrase; None where there is none.

    A model that was made from the entry's is not another one. One that was made from a sibling's, or from the base
    model of a sibling, is. Where nothing says what it was made from, its chat template may.
    """
    if entry.hf_id is None:
        return None
    origin = source.origin
    if origin.hf_id is not None:
        return None if origin.is_of(entry.hf_id) else f"it is {origin}, the entry is of {entry.hf_id}"
    if not origin.made_from:
        return _other_template(source, entry, plugins)
    siblings = [other.hf_id for other in _entries(plugins) if other.hf_id]
    if _names(origin.made_from, entry.hf_id) or not any(_names(origin.made_from, sibling) for sibling in siblings):
        return None
    return f"it is {origin}, the entry is of {entry.hf_id}"


def _names(made_from: Sequence[str], hf_id: str) -> bool:
    """Whether one of these is a repository, or another form of its model: `-Base` or `-FP8` of it, for example."""
    own = hf_id.lower()
    return any(base.lower() == own or base.lower().startswith(f"{own}-") for base in made_from)


def _other_template(source: Source, entry: Entry, plugins: Plugins) -> str | None:
    """The evidence of a chat template: it lacks what the entry's has, or has what only that of a sibling has."""
    template = "" if source.directory is None else chat_templates(source.directory)
    if not template or (entry.chat_template is not None and entry.chat_template in template):
        return None
    for other in _entries(plugins):
        if other.facts == entry.facts and other.chat_template is not None and other.chat_template in template:
            return f"its chat template has {other.chat_template!r}, as that of {other.hf_id} has"
    return None if entry.chat_template is None else f"its chat template has no {entry.chat_template!r}"
