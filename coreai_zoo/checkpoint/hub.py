"""Checkpoints on the Hugging Face hub: what a repository holds, and its files, compared with what the hub states.

A checkpoint is fetched in two steps: what takes kilobytes (config, index, tokenizer), on which everything is checked
that can be, then the weights. Files lie in the Hugging Face cache as the hub's own client lays them out, so what either
of the two has fetched the other one finds.

Requests are made with the client's session, headers and errors. Its downloads are not used, for they cannot be resumed:
in `_download_to_tmp_and_move` (read in 2.4) each try has a file of its own, which is removed when the try fails, and
never looked at again when the process was killed. With hf_xet neither: the file of `xet_get` is that same one. What a
hub keeps in xet storage it serves over HTTP as well, behind a redirect that knows `Range`. So with and without xet the
same bytes arrive here, are counted as they come, and have the SHA-256 that the hub states.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shlex
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from attrs import define, frozen

from coreai_zoo.checkpoint.adapters import ADAPTER_CONFIG, adapter_alone, adapter_files, adapter_note
from coreai_zoo.checkpoint.folder import CONFIG, INDEX, SINGLE, has_model, no_weights, read_index, uses_index
from coreai_zoo.checkpoint.hub_client import (
    FILE_TRIES,
    METADATA_TRIES,
    BrokeOff,
    Patience,
    explained,
    host,
    not_the_hub,
    quieten,
    said,
)
from coreai_zoo.digest import file_sha256
from coreai_zoo.dtypes import size
from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError, listing
from coreai_zoo.progress import CountBytes, Reporter

_SMALL = (
    CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "*.jinja",
    "README.md",
    "LICEN[CS]E*",
    "NOTICE*",
)

_AT_FAULT = "A proxy or a mirror may be at fault (HF_ENDPOINT, HTTPS_PROXY), or the hub itself; try again later."

_SHA1, _SHA256 = re.compile(r"[0-9a-f]{40}"), re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9A-Za-z]{6,64}")  # 40 hexadecimal digits on the real hub
_REVISION = re.compile(r"(?!.*(\.\.|//|@\{))[^-/\s~^:?*\[\\\x00-\x1f\x7f][^\s~^:?*\[\\\x00-\x1f\x7f]*")


@frozen
class Repository:
    """A model repository as a user names it.

    Attributes:
        id: `owner/name`.
        revision: a branch, a tag or a commit; None for the newest of the branch main.
    """

    id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Repository | None:
        """The repository that `owner/name`, `owner/name@revision` or a page of the hub names, else None."""
        if "/" not in text:
            return None
        from huggingface_hub import constants
        from huggingface_hub.errors import HfUriError, HFValidationError
        from huggingface_hub.utils import parse_hf_uri, validate_repo_id  # type: ignore[attr-defined]  # exported lazily

        text = text.strip().rstrip("/")
        owner = text.partition("/")[0]
        typed = text.partition("@")[0].count("/") == 1
        if typed and owner not in constants.HF_URL_HOSTS | constants.HF_URI_TYPE_PREFIXES.keys():
            name, at, given = text.partition("@")
            revision = given if at else None
        else:
            try:
                uri = parse_hf_uri(text, endpoint=constants.ENDPOINT)
            except HfUriError:
                return None
            if uri.type != "model":
                return None
            name, revision = uri.id, uri.revision
        try:
            validate_repo_id(name)
        except HFValidationError:
            return None
        return cls(name, revision) if revision is None or _REVISION.fullmatch(revision) else None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


@frozen
class RemoteFile:
    """A file of a repository, as the hub states it.

    Attributes:
        name: its path in the repository.
        size: bytes.
        sha256: of the content, where it is a large file (LFS or xet).
        git_sha1: of the content as git counts it, where it is a small one. Some mirrors state neither.
    """

    name: str
    size: int
    sha256: str | None
    git_sha1: str | None

    @property
    def digest(self) -> str | None:
        """The hash that the hub states, by which the cache names the content; None if none is known."""
        return self.sha256 or self.git_sha1


@frozen
class Listing:
    """A repository at one commit, as the hub states it.

    Attributes:
        id: `owner/name`, as the hub writes it.
        commit: 40 hexadecimal digits.
        files: by name.
        card: the front matter of its README: license, license_name, license_link, base_model, language...
    """

    id: str
    commit: str
    files: Mapping[str, RemoteFile]
    card: Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# A checkpoint on the hub
# ---------------------------------------------------------------------------------------------------------------------


@define(eq=False, slots=False)
class HubSource:
    """A checkpoint on the hub, at one commit, fetched in two steps: `fetch_small`, then `fetch_weights`.

    Attributes:
        id: the repository.
        commit: 40 hexadecimal digits.
        listing: what the hub states; None when it could not be asked, and what lies in the cache is used.
        directory: the snapshot in the Hugging Face cache, in which the files appear.
    """

    id: str
    commit: str
    listing: Listing | None
    directory: Path
    _revision: str
    _report: Reporter
    _refusal: ZooError | None = None

    @classmethod
    def open(cls, repository: Repository, report: Reporter) -> HubSource:
        """Ask the hub, in one request, what the repository holds; where that fails, take what is in the cache.

        Raises:
            BadInput: when there is no such repository or revision.
            EnvironmentLacks: when the hub cannot be asked, or refuses; and nothing of the revision is in the cache.
        """
        quieten()
        _check(repository)
        revision = repository.revision or "main"
        folder = _folder(repository.id)
        try:
            found = _ask(repository, report)
            return cls(found.id, found.commit, found, folder / "snapshots" / found.commit, revision, report)
        except ZooError as error:
            commit = _cached_commit(folder, revision)
            if commit is None:
                raise
            report.note(f"{error.message} What is in the cache is used: commit {commit}.")
            return cls(repository.id, commit, None, folder / "snapshots" / commit, revision, report, error)

    def fetch_small(self, names: Collection[str] | None = None) -> Path:
        """Fetch what tells a model but for its weights: config, index, tokenizer, chat template, licence, README.

        Args:
            names: fetch only these of them.

        Returns:
            `directory`. What the repository does not have is not there.

        Raises:
            BadInput: when the repository holds an adapter and no model.
            EnvironmentLacks: when something cannot be fetched, or is twice not what the hub states.
        """
        self._require_model()
        for name in self._names():
            if _is_small(name) and (names is None or name in names):
                self._obtain(self._file(name), _ignore)
        with contextlib.suppress(OSError):  # in a cache that is only read there is nothing to write down
            self._note_revision()
        return self.directory

    def _require_model(self) -> None:
        """Refuse a repository without a model, or with one in a folder of its own."""
        names = self._names()
        if (adapter := adapter_files(names)) and not has_model(names):
            if ADAPTER_CONFIG in adapter:
                self._obtain(self._file(ADAPTER_CONFIG), _ignore)
            raise adapter_alone(self.id, adapter, self.directory / ADAPTER_CONFIG)
        if CONFIG in names or self.listing is None:
            return
        weights = [name for name in names if name.endswith(".safetensors")]
        if not weights:
            raise no_weights(self.id, names)
        folders = sorted({parent for name in weights if f"{(parent := _folder_of(name))}/{CONFIG}" in names})
        if folders:
            fetching = shlex.join(["hf", "download", self.id, "--include", f"{folders[0]}/*", "--local-dir", "DIR"])
            raise BadInput(
                f"{self.id} has no {CONFIG}, but a model in {listing(folders)}.",
                f"`{fetching}` fetches one: give {shlex.quote(f'DIR/{folders[0]}')}.",
            )
        raise BadInput(f"{self.id} has no {CONFIG}.", "Repositories of models have one beside their weights.")

    @property
    def notes(self) -> tuple[str, ...]:
        """What to note of files that are not fetched: those of an adapter."""
        adapter = adapter_files(self._names())
        return adapter_note(adapter) if adapter else ()

    @cached_property
    def weights(self) -> tuple[RemoteFile, ...]:
        """The safetensors files that the index names, in the order of their names; or the single one.

        Raises:
            BadInput: when the repository has no safetensors, or not all that its index names.
            EnvironmentLacks: when the index cannot be fetched.
        """
        names = self._names()
        weight_map: Mapping[str, str] = {}
        if INDEX in names:
            self._obtain(self._file(INDEX), _ignore)
            weight_map = read_index(self.directory)
        if uses_index(names, weight_map):
            shards = sorted(set(weight_map.values()))
        elif SINGLE in names:
            shards = [SINGLE]
        else:
            self._require_hub(RemoteFile(SINGLE, 0, None, None))  # the cache shows only what was fetched
            raise no_weights(self.id, [name for name in names if "/" not in name])
        missing = [name for name in shards if name not in names]
        if missing and self.listing is not None:
            raise BadInput(f"The index of {self.id} names {listing(missing)}, which the repository does not have.")
        return tuple(self._file(name) for name in shards)

    @property
    def complete(self) -> bool:
        """Whether every weight file is on this machine, as long as it should be."""
        return all(self._is_here(file) for file in self.weights)

    @property
    def missing_bytes(self) -> int:
        """Bytes of weights that are still to be fetched; those that a broken download left count as here."""
        missing = (file for file in self.weights if not self._is_here(file))
        return sum(file.size - min(_size(self._partial(file)) or 0, file.size) for file in missing)

    def shard(self, name: str, count: CountBytes | None = None) -> Path:
        """One weight file, fetched if it is not here, and compared with the size and SHA-256 that the hub states.

        Args:
            name: of one of `weights`.
            count: told of each piece that arrives; of minus as many bytes as are thrown away.

        Raises:
            EnvironmentLacks: when it cannot be fetched, or is twice not what the hub states.
        """
        return self._obtain(self._weight(name), count or _ignore)

    def fetch_weights(self, report: Reporter) -> None:
        """Fetch the weight files that are not here, and compare all with what the hub states; see `shard`."""
        self._report = report
        unknown = [file for file in self.weights if self._is_here(file) and not _is_known(self._place(file), file)]
        bad = 0
        with explained(self.id, self._revision), self._comparing(unknown) as count:
            for file in unknown:
                bad += 0 if _matches(self._place(file), file) else file.size
                count(file.name, file.size)
        total = self.missing_bytes + bad
        with report.bytes(total) if total else contextlib.nullcontext(_ignore) as count:
            for file in self.weights:
                self.shard(file.name, count)

    @contextlib.contextmanager
    def _comparing(self, files: Sequence[RemoteFile]) -> Iterator[CountBytes]:
        """Within the block, files in the cache are compared with what the hub states: says so, and counts bytes."""
        if not files:
            yield _ignore
            return
        total = sum(file.size for file in files)
        self._report.note(f"comparing {size(total)} in the cache with what the hub states")
        with self._report.bytes(total) as count:
            yield count

    # -----------------------------------------------------------------------------------------------------------------
    # Apart from the cache: for a build that drops a weight file when it has used it
    # -----------------------------------------------------------------------------------------------------------------

    @cached_property
    def cached(self) -> Mapping[str, Path]:
        """The weight files that are whole in the cache, by name; they are compared with what the hub states.

        One that is not that is removed, and so is not among them.
        """
        here = [file for file in self.weights if self._is_here(file)]
        unknown = [file for file in here if not _is_known(self._place(file), file)]
        with explained(self.id, self._revision), self._comparing(unknown) as count:
            for file in unknown:
                for place in (self.directory / file.name, self._blob(file)):
                    if self._refusal is None:
                        self._remove_damaged(place, file)
                count(file.name, file.size)
        return {file.name: self._obtain(file, _ignore) for file in here if self._is_here(file)}

    def first_bytes(self, name: str, count: int) -> bytes:
        """The first bytes of a weight file, asked for alone: `count` of them, or all of a shorter file.

        They are compared with nothing: the hub states a hash of the whole only.

        Raises:
            EnvironmentLacks: when they cannot be fetched.
        """
        file = self._weight(name)
        stop = min(count, file.size)
        self._require_hub(file)
        if not stop:
            return b""

        def ask() -> bytes:
            come = bytearray()
            with self._answer(file, 0, stop) as (answer, _):
                for piece in answer.iter_bytes():
                    come += piece
                    if len(come) >= stop:  # a server without ranges would go on
                        return bytes(come[:stop])
            raise BrokeOff("it ended early")

        with explained(self.id, self._revision):
            try:
                return Patience(self._report, FILE_TRIES).ask(ask)
            except _Differs as error:
                raise EnvironmentLacks(f"{name} of {self.id} cannot be fetched: {error}.", _AT_FAULT) from error

    def place_apart(self, name: str, folder: Path) -> Path:
        """Where `fetch_apart` puts a weight file: under its hash, so that contents are never mixed."""
        own = hashlib.sha256(name.encode()).hexdigest()[:8]  # two files may have the same content, and one goes first
        return folder / f"{self._weight(name).digest or self.commit}-{own}"

    def missing_apart(self, name: str, folder: Path) -> int:
        """Bytes that `fetch_apart` would still fetch."""
        file, place = self._weight(name), self.place_apart(name, folder)
        come = _size(place) if _size(place) is not None else _size(_incomplete(place))
        return file.size - min(come or 0, file.size)

    def fetch_apart(self, name: str, folder: Path, count: CountBytes) -> Path:
        """Fetch a weight file into a folder, past the cache, and compare it with what the hub states.

        Args:
            name: of one of `weights`.
            folder: where it is put under the name of `place_apart`; what has come there of it is gone on from.
            count: see `shard`; what it raises ends the fetching.

        Raises:
            EnvironmentLacks: when it cannot be fetched, or is twice not what the hub states.
        """
        file, place = self._weight(name), self.place_apart(name, folder)
        with explained(self.id, self._revision, folder):
            if _size(place) is not None:
                if _size(place) == file.size and file.digest in {None, _hash(place, file)}:
                    return place
                place.unlink()
            self._require_hub(file)
            self._fetch(file, place, _incomplete(place), count)
        return place

    def _weight(self, name: str) -> RemoteFile:
        return {file.name: file for file in self.weights}[name]

    # -----------------------------------------------------------------------------------------------------------------
    # What there is
    # -----------------------------------------------------------------------------------------------------------------

    def _names(self) -> list[str]:
        """The files of the repository; where the hub could not be asked, those in the cache."""
        if self.listing is not None:
            return list(self.listing.files)
        found = (path for path in self.directory.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.directory).as_posix() for path in found)

    def _file(self, name: str) -> RemoteFile:
        """A file as the hub states it; where it could not be asked, as the cache does, which names content by hash."""
        if self.listing is not None:
            return self.listing.files[name]
        path = self.directory / name
        size, etag = _size(path) or 0, path.readlink().name if path.is_symlink() else None
        return _remote_file(name, size, etag) or RemoteFile(name, size, None, None)

    def _blob(self, file: RemoteFile) -> Path:
        """Where the cache keeps the content, to which snapshots have links."""
        name = file.digest or hashlib.sha256(f"{self.commit}/{file.name}".encode()).hexdigest()
        return self.directory.parents[1] / "blobs" / name

    def _partial(self, file: RemoteFile) -> Path:
        """What has come of a file so far, under the name that `hf cache` knows as that of a broken download."""
        return _incomplete(self._blob(file))

    def _place(self, file: RemoteFile) -> Path:
        """Where the content is, if it is here: in this snapshot, or fetched for another one."""
        path = self.directory / file.name
        return path if _size(path) is not None or self.listing is None else self._blob(file)

    def _is_here(self, file: RemoteFile) -> bool:
        return _size(self._place(file)) == file.size

    # -----------------------------------------------------------------------------------------------------------------
    # Fetching one file
    # -----------------------------------------------------------------------------------------------------------------

    def _obtain(self, file: RemoteFile, count: CountBytes) -> Path:
        """The file in the snapshot: what is in the cache if that is as the hub states it, else fetched."""
        path = self.directory / file.name
        with explained(self.id, self._revision):
            if _matches(path, file):
                return path
            self._require_hub(file)
            with self._locked(file):
                blob = self._blob(file)
                for place in (path, blob):
                    self._remove_damaged(place, file)
                if _size(path) is None:
                    if _size(blob) is None:
                        self._fetch(file, blob, self._partial(file), count)
                    _link(blob, path)
                    _remember(path, file)
        return path

    def _require_hub(self, file: RemoteFile) -> None:
        """Refuse to fetch a file from a hub that could not be asked."""
        if self._refusal is not None:
            state = "not there" if _size(self.directory / file.name) is None else "damaged"
            raise EnvironmentLacks(
                f"{file.name} of {self.id} is {state} in the cache, and cannot be fetched: {self._refusal.message}",
                self._refusal.hint,
            )

    def _remove_damaged(self, place: Path, file: RemoteFile) -> None:
        """Remove what is in the cache as a file and is not what the hub states of it."""
        if _size(place) is not None and not _matches(place, file):
            self._report.note(f"{file.name} in the cache is not what the hub states; fetching it again")
            place.unlink()

    def _note_revision(self) -> None:
        """Write down what commit a branch is, as the client does: it is looked up when there is no network."""
        path = self.directory.parents[1] / "refs" / self._revision
        known = self._revision == self.commit or (path.is_file() and path.read_text(encoding="utf-8") == self.commit)
        if not known and self.directory.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            fresh.write_text(self.commit, encoding="utf-8")
            os.replace(fresh, path)

    @contextlib.contextmanager
    def _locked(self, file: RemoteFile) -> Iterator[None]:
        """Within the block no other process fetches the file, be it this tool or the client."""
        from filelock import Timeout
        from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

        repository = self.directory.parents[1]
        path = repository.parent / ".locks" / repository.name / f"{self._blob(file).name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(WeakFileLock(path, timeout=0.2))
            except Timeout:
                self._report.note(f"another process fetches {file.name}; waiting for it")
                held.enter_context(WeakFileLock(path))
            yield

    def _fetch(self, file: RemoteFile, place: Path, partial: Path, count: CountBytes) -> None:
        """Fetch the content to a place, with a second try if what comes is not what the hub states.

        It has the name `partial` until it was compared.
        """
        place.parent.mkdir(parents=True, exist_ok=True)
        for again in ("; fetching it once more", ""):
            try:
                self._receive(file, partial, count)
                if file.digest in {None, _hash(partial, file)}:
                    os.replace(partial, place)
                    return
                partial.unlink()
                count(file.name, -file.size)
                kind = "SHA-256" if file.sha256 else "git hash"
                problem = f"what came as {file.name} has another {kind} than the hub states"
            except _Differs as error:
                problem = str(error)
            if again:
                self._report.note(problem + again)
        raise EnvironmentLacks(f"{file.name} of {self.id} cannot be fetched: twice, {problem}.", _AT_FAULT)

    def _receive(self, file: RemoteFile, partial: Path, count: CountBytes) -> None:
        """Fetch what is missing of the content, over as many connections as it takes.

        Raises:
            _Differs: when what is offered is not as long as the hub states.
        """
        from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of whichever library it stands on

        if (_size(partial) or 0) > file.size:
            partial.unlink()
        patience = Patience(self._report, FILE_TRIES)
        while (come := _size(partial)) is None or come < file.size:
            start = come or 0
            count(file.name, 0)  # which may refuse to go on
            try:
                self._stream(file, partial, start, count)
            except (HTTPError, BrokeOff) as error:
                come = _size(partial) or 0
                patience.after(error, f"going on from {size(come)}" if come else "trying again", come - start)

    def _stream(self, file: RemoteFile, partial: Path, start: int, count: CountBytes) -> None:
        """Append what one answer holds from byte `start` on, each piece as it comes."""
        with self._answer(file, start) as (answer, begin):
            come = begin
            if come < start:
                count(file.name, come - start)
            with partial.open("r+b" if start else "wb") as out:
                if come < start:
                    out.truncate(come)
                out.seek(come)
                for piece in answer.iter_bytes():
                    piece = piece[: file.size - come]  # noqa: PLW2901  # more than there should be
                    out.write(piece)
                    out.flush()
                    come += len(piece)
                    count(file.name, len(piece))
                if come == file.size:
                    os.fsync(out.fileno())
        if come < file.size:
            raise BrokeOff("it ended early")

    @contextlib.contextmanager
    def _answer(self, file: RemoteFile, start: int, stop: int | None = None) -> Iterator[tuple[Any, int]]:
        """An answer with the content from byte `start` to `stop` or the end, and the byte at which it begins."""
        from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self.id, file.name, revision=self.commit)
        headers = build_hf_headers(headers={"Accept-Encoding": "identity"})  # a range is one of what is sent
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as answer:
            if answer.status_code == 416:
                raise _Differs(f"{file.name} ends before byte {start:,}, and the hub states {file.size:,}")
            hf_raise_for_status(answer)
            yield answer, _first_byte(answer.headers, file, start)


def find_cached(hf_id: str, commit: str) -> Path | None:
    """The snapshot of a commit in the Hugging Face cache; None where it is not there, or lacks weights."""
    directory = _folder(hf_id) / "snapshots" / commit
    cached = HubSource(hf_id, commit, None, directory, commit, Reporter(silent=True))
    try:
        return directory if directory.is_dir() and cached.complete else None
    except BadInput:
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Asking
# ---------------------------------------------------------------------------------------------------------------------


class _Differs(Exception):
    """What is offered as a file cannot be what the hub states; says why."""


def _check(repository: Repository) -> None:
    """Refuse what can be no repository, before it becomes a path or an address.

    Raises:
        BadInput: saying what it lacks.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repository.id)
    except HFValidationError as error:
        raise BadInput(f"{repository.id!r} is no repository of the hub: {said(error)}.") from error
    if repository.revision is not None and not _REVISION.fullmatch(repository.revision):
        raise BadInput(f"{repository.revision!r} of {repository.id} is no branch, tag or commit.")


def _ask(repository: Repository, report: Reporter) -> Listing:
    """What the hub states about a repository."""
    from huggingface_hub import HfApi, ModelCardData, constants
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    def ask() -> Any:
        return HfApi().model_info(
            repository.id, revision=repository.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )

    with explained(repository.id, repository.revision or "main"):
        try:
            info = Patience(report, METADATA_TRIES).ask(ask)
            siblings = [(sibling.rfilename, sibling) for sibling in info.siblings if _is_plain(sibling.rfilename)]
            front = info.card_data
            card = front.to_dict() if isinstance(front, ModelCardData) else {}  # type: ignore[no-untyped-call]
            _check(Repository(info.id))
            if not _COMMIT.fullmatch(info.sha):
                raise TypeError(f"{info.sha} is no commit")
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise not_the_hub(repository.id) from error
        except (HTTPError, OSError):
            raise
        except Exception as error:  # of the client, about an address or a proxy that there cannot be
            raise EnvironmentLacks(
                f"{repository.id} cannot be fetched: {host()} cannot be asked ({said(error)}).",
                "Check HF_ENDPOINT and HTTPS_PROXY, if set.",
            ) from error
        found = [_stated(info.id, info.sha, name, sibling, report) for name, sibling in siblings]
    files = {file.name: file for file in found if file is not None}
    return Listing(info.id, info.sha, MappingProxyType(files), MappingProxyType(card))


def _stated(repo_id: str, commit: str, name: str, sibling: Any, report: Reporter) -> RemoteFile | None:
    """A file of a repository's metadata; None when that lacks its size or hash and nobody will ask for the file."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    lfs = sibling.lfs
    file = _remote_file(name, sibling.size, lfs.sha256 if lfs else sibling.blob_id)
    if file is not None or not (_is_small(name) or name.endswith(".safetensors")):
        return file
    # The metadata of some mirrors is without; then the file's own headers have it.
    url = hf_hub_url(repo_id, name, revision=commit)
    found = Patience(report, METADATA_TRIES).ask(
        lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    )
    file = _remote_file(name, found.size, found.etag)
    if file is None and found.size is not None and _is_small(name):
        return RemoteFile(name, found.size, None, None)
    if file is None or (file.sha256 is None and not _is_small(name)):
        raise EnvironmentLacks(
            f"{host()} does not state size and SHA-256 of {name} of {repo_id}, so what it sends could not be checked.",
            "If HF_ENDPOINT names a mirror, use another one.",
        )
    return file


def _first_byte(headers: Mapping[str, str], file: RemoteFile, start: int) -> int:
    """At which byte of the file an answer begins.

    Raises:
        EnvironmentLacks: for a page of a proxy.
        _Differs: when it is not for a file as long as the hub states.
    """
    if headers.get("Content-Type", "").startswith("text/html") and not file.name.endswith((".html", ".htm")):
        raise not_the_hub(file.name)
    ranged = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
    begin, total = (int(ranged[1]), ranged[2]) if ranged else (0, headers.get("Content-Length", "*"))
    if headers.get("Content-Encoding", "identity") != "identity":
        total = "*"  # the length is of what the content was packed into
    if total.isdecimal() and int(total) != file.size:
        raise _Differs(f"{file.name} is offered with {int(total):,} bytes, and the hub states {file.size:,}")
    if begin not in {0, start}:
        raise _Differs(f"{file.name} is offered from byte {begin:,} on, asked for from {start:,}")
    return begin


# ---------------------------------------------------------------------------------------------------------------------
# Errors, in words
# ---------------------------------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def _folder(repo_id: str) -> Path:
    """Where the Hugging Face cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type="model")


def _cached_commit(folder: Path, revision: str) -> str | None:
    """The commit of a revision in the cache, if its config is there."""
    ref = folder / "refs" / revision
    with contextlib.suppress(OSError):
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
        if _COMMIT.fullmatch(commit) and (folder / "snapshots" / commit / CONFIG).is_file():
            return commit
    return None


def _link(blob: Path, path: Path) -> None:
    """Put the content into a snapshot: as a link, or moved there where the file system has none."""
    from huggingface_hub.file_download import are_symlinks_supported

    path.parent.mkdir(parents=True, exist_ok=True)
    if are_symlinks_supported(blob.parents[2]):
        path.unlink(missing_ok=True)  # it may lead nowhere
        path.symlink_to(os.path.relpath(blob, path.parent))
    else:
        os.replace(blob, path)


def _matches(path: Path, file: RemoteFile) -> bool:
    """Whether the content is what the hub states. It is read once; then the file's times tell that it is as it was."""
    if _size(path) != file.size:
        return False
    if file.digest is None or _is_known(path, file):
        return True
    if _hash(path, file) != file.digest:
        return False
    _remember(path, file)
    return True


def _hash(path: Path, file: RemoteFile) -> str:
    """The hash of the content, of the kind that the hub states of it."""
    if file.sha256 is not None:
        return file_sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _is_known(path: Path, file: RemoteFile) -> bool:
    """Whether the content was compared before, and has not been touched since."""
    with contextlib.suppress(OSError, ValueError):
        return _stamp(path).read_text(encoding="utf-8") == _identity(path, file)
    return False


def _remember(path: Path, file: RemoteFile) -> None:
    """Write down that the content was compared."""
    with contextlib.suppress(OSError):  # it will be compared again
        stamp = _stamp(path)
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(_identity(path, file), encoding="utf-8")


def _stamp(path: Path) -> Path:
    """Where it is written down, in the folder that the Hugging Face cache has for others."""
    from huggingface_hub import constants

    name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
    return Path(constants.HF_ASSETS_CACHE) / "coreai-zoo" / "compared" / name


def _identity(path: Path, file: RemoteFile) -> str:
    status = path.stat()
    return f"{file.digest} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"


def _remote_file(name: str, size: object, etag: object) -> RemoteFile | None:
    """A file whose hash is an LFS object's or git's; None if the size or the hash is missing."""
    if not isinstance(size, int) or size < 0 or not isinstance(etag, str):
        return None
    if _SHA256.fullmatch(etag):
        return RemoteFile(name, size, etag, None)
    return RemoteFile(name, size, None, etag) if _SHA1.fullmatch(etag) else None


def _is_plain(name: str) -> bool:
    """Whether a name from outside is that of a file in the folder that it is for."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(name) & set("\\\0")


def _folder_of(name: str) -> str:
    return str(PurePosixPath(name).parent)


def _is_small(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL)


def _incomplete(place: Path) -> Path:
    """Where a file is while it is fetched to a place."""
    return place.with_name(f"{place.name}.incomplete")


def _size(path: Path) -> int | None:
    """Bytes of a file; None if there is none, or none that can be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _ignore(_what: str, _count: int) -> None:
    """Count nothing."""
