"""A checkpoint on the hub that is read while it is fetched: its headers first, then weight files that come and go."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from attrs import evolve

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.folder import find_weights, read_config
from coreai_zoo.checkpoint.headers import Header, header_bytes, parse_header, read_header
from coreai_zoo.checkpoint.hub import HubSource, RemoteFile
from coreai_zoo.errors import BadInput, EnvironmentLacks
from coreai_zoo.progress import CountBytes

_HEADER_GUESS = 128 * 2**10
"""Bytes that are asked for of a file to learn how long its header is: most are shorter."""
_LEAVING_SECONDS = 2.0
"""For which the end of a build waits at most until nobody writes to a file any more."""


def open_on_hub(hub: HubSource) -> Checkpoint:
    """The checkpoint of a repository, of whose weight files the headers are asked for and nothing else.

    Files that are whole in the cache can be read; of the others see `ShardFetcher`.

    Raises:
        BadInput: as `Checkpoint.open`.
        EnvironmentLacks: when a header cannot be fetched.
    """
    config = read_config(hub.directory)
    files = find_weights(hub.directory, [file.name for file in hub.weights])
    checkpoint = Checkpoint.of_headers(
        hub.directory, config, files, tuple(_header_of(hub, file) for file in hub.weights)
    )
    for path in hub.cached.values():
        checkpoint.arrive(path, path)
    return checkpoint


def _header_of(hub: HubSource, file: RemoteFile) -> Header:
    """The header of a weight file. Its stamp has the hash that the hub states, which needs no file."""
    path = hub.directory / file.name
    identity = f"sha256:{file.sha256}" if file.sha256 else f"git:{file.git_sha1}"
    if file.name in hub.cached:
        header = read_header(path)
        # Of a cache without links the hash is not known while the hub cannot be asked: its times have to do.
        return evolve(header, stamp=(identity, header.sha256, header.size, 0, 0)) if file.digest else header
    start = hub.first_bytes(file.name, _HEADER_GUESS)
    try:
        length = header_bytes(path, start, file.size)
        if length > len(start):
            start = hub.first_bytes(file.name, length)
        return parse_header(path, start[:length], identity, file.size)
    except BadInput as error:  # names the path at which the file would be
        told = error.message.replace(str(path), f"{file.name} of {hub.id}")
        raise BadInput(told, "So it is on the hub: choose another revision (@REVISION), or tell its owner.") from error


class ShardFetcher:
    """Fetches weight files in an order, ahead of who reads them, as long as there are not too many on the disk.

    Within its block `need` has files arrive in the checkpoint, and `drop` has them leave and removes them. Ctrl-C, an
    error or a kill leave what has come, to be gone on from; when all has been dropped the folder is removed.

    Args:
        hub: where they are fetched from.
        checkpoint: in which they arrive.
        folder: where they lie meanwhile.
        order: names of the files, those that are needed first at the front.
        limit: how many may be in the folder at a time, incomplete ones too.
        count: told of the bytes that come, in another thread.
        alone: whether nobody else has files in the folder: then what is not in `order` is removed, and in the end the
            folder. Otherwise what lies there stays, that of `order` too.
    """

    def __init__(
        self,
        hub: HubSource,
        checkpoint: Checkpoint,
        folder: Path,
        order: Sequence[str],
        limit: int,
        count: CountBytes,
        *,
        alone: bool = True,
    ) -> None:
        self._hub, self._checkpoint, self._folder = hub, checkpoint, folder
        self._limit, self._count = limit, count
        self._order = tuple(order)
        self._places = {name: hub.place_apart(name, folder) for name in order}
        self._held = set(present(hub, folder, order))
        self._alone, self._theirs = alone, frozenset() if alone else frozenset(self._held)
        self._waiting, self._come, self._awaited = deque(order), set[str](), set[str]()
        self._changed, self._stopped = threading.Condition(), False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)

    def __enter__(self) -> Self:
        if self._alone:
            self._remove_strangers()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        # It may wait for the hub longer than that. Then it ends before it writes anything more.
        self._thread.join(_LEAVING_SECONDS)
        for name in tuple(self._come):
            self._checkpoint.leave(self._hub.directory / name)
        if error is None and not self._held and self._alone:
            shutil.rmtree(self._folder, ignore_errors=True)

    def need(self, names: Iterable[str]) -> None:
        """Wait until files have arrived. All of `order` up to these are fetched, too many or not.

        Raises:
            EnvironmentLacks: when one of them cannot be fetched, or is not what the hub stated.
        """
        for name in sorted(names, key=self._order.index):
            with self._changed:
                self._awaited.add(name)
                self._changed.notify_all()
                while name not in self._come:
                    if self._failure is not None:
                        raise self._failure
                    self._changed.wait()
            file = self._hub.directory / name
            if self._checkpoint.place(file) is None:
                self._require_header(name)
                self._checkpoint.arrive(file, self._places[name])

    def drop(self, names: Collection[str]) -> None:
        """Remove files that nobody needs any more."""
        for name in names:
            self._checkpoint.leave(self._hub.directory / name)
            if name not in self._theirs:
                self._places[name].unlink(missing_ok=True)
        with self._changed:
            self._held -= set(names)
            self._come -= set(names)
            self._changed.notify_all()

    def _require_header(self, name: str) -> None:
        """Refuse a file that is what the hub stated, and of which another header was sent before."""
        known = next(header for header in self._checkpoint.headers if header.file == self._hub.directory / name)
        if read_header(self._places[name]).sha256 != known.sha256:
            raise EnvironmentLacks(
                f"The header of {name} of {self._hub.id} that was sent alone is another than that of the whole file, "
                "which has the SHA-256 that the hub states.",
                "A proxy or a mirror may be at fault (HF_ENDPOINT, HTTPS_PROXY); run the same command again.",
            )

    def _run(self) -> None:
        """Fetch one file after the other, in a thread of its own."""
        try:
            while (name := self._next()) is not None:
                self._hub.fetch_apart(name, self._folder, self._counted)
                with self._changed:
                    self._come.add(name)
                    self._changed.notify_all()
        except _Stopped:
            pass
        except BaseException as error:  # noqa: BLE001  # raised where a file is waited for
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The name of the next file, as soon as there is room for it; None when there is none or nobody waits."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._waiting or self._has_room())
            if self._stopped or not self._waiting:
                return None
            name = self._waiting.popleft()
            self._held.add(name)
            return name

    def _has_room(self) -> bool:
        return (
            self._waiting[0] in self._held
            or len(self._held) < self._limit
            or not self._awaited.isdisjoint(self._waiting)
        )

    def _counted(self, what: str, count: int) -> None:
        if self._stopped:
            raise _Stopped
        self._count(what, count)

    def _remove_strangers(self) -> None:
        """Remove what an earlier run left that is of no use: of another commit, or used up when it was killed."""
        kept = {place.name for name, place in self._places.items()}
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                if path.name.removesuffix(".incomplete") not in kept:
                    path.unlink()


class _Stopped(Exception):
    """Nobody waits for the file that is being fetched."""


def present(hub: HubSource, folder: Path, names: Iterable[str]) -> list[str]:
    """Those files of which something lies in the folder, whole or not."""
    sizes = {file.name: file.size for file in hub.weights}
    whole = {name: hub.place_apart(name, folder) for name in names}
    return [name for name, place in whole.items() if place.exists() or hub.missing_apart(name, folder) < sizes[name]]
