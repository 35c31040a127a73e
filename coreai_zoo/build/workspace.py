"""The folders of a build: nothing half-written is ever at the output path, and nothing is left behind.

    OUTPUT/NAME             the bundle, complete and verified
    OUTPUT/.NAME.partial    the weight store: the journal of what is finished, and the bundle being built
    OUTPUT/.NAME.old        the bundle that it replaces, for the moment between two renames
    WORK/.NAME.work         with --keep-weights, the journal of a finished bundle: which weights are where in it
    WORK/.NAME.shards       files of a checkpoint that is streamed: those that are fetched, or read, just now

WORK may be any folder, that of the bundles too, so nothing else in it is touched. The names are fixed, so a build finds
whatever a killed one left; see `Workspace.opened`. The store outlives an interruption, so that the next build goes on.
Journal and weights are in one folder, and stay together wherever it is moved or copied. Each layout has a folder in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from attrs import frozen

from coreai_zoo.build.lock import exclusive
from coreai_zoo.bundle.bundle import MOVE_AWAY, require_replaceable
from coreai_zoo.disk import NO_SPACE, existing_parent, file_of, no_space
from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError
from coreai_zoo.layout import Layout
from coreai_zoo.weights.journal import sync_path
from coreai_zoo.weights.store import JOURNAL, WeightStore

_DEFAULT_WORK = ".zoo-work"
_SPARE = 2 * 2**20
"""Bytes of small files that a build writes beside the asset, at the most: journal and records."""


def check_output_folder(output: Path) -> None:
    """Refuse an output folder that cannot be written to, before anything is read.

    Raises:
        BadInput: when it is not a folder, or nothing can be made in it.
    """
    existing = existing_parent(output)
    with _usable(f"output folder {output}", "-o DIR"):
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is no folder")
        # Has no name on Linux: being killed here leaves nothing.
        tempfile.TemporaryFile(dir=existing, prefix=".zoo-").close()


@contextlib.contextmanager
def _usable(folder: str, option: str) -> Iterator[None]:
    """Within the block, a folder that the system refuses is a mistake of whoever chose it by an option."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"The {folder} cannot be used: {error.strerror}.", f"Choose another with {option}.") from error


@frozen
class Workspace:
    """The folders of one build.

    Attributes:
        destination: where the bundle will be.
        work: where the journal of a finished bundle is kept.
        keep: whether to keep it.
    """

    destination: Path
    work: Path
    keep: bool = False

    @classmethod
    def of(cls, output: Path, name: str, work_dir: Path | None, *, keep: bool) -> Workspace:
        """The workspace of the bundle called `name`."""
        return cls(output / name, (work_dir or output / _DEFAULT_WORK) / f".{name}.work", keep)

    @property
    def partial(self) -> Path:
        """The folder of the weight store, and in it of the bundle being built."""
        return self.destination.with_name(f".{self.destination.name}.partial")

    @property
    def store(self) -> WeightStore:
        """The weight store, as it is on the disk now."""
        return WeightStore(self.partial.resolve())

    @property
    def _aside(self) -> Path:
        return self.destination.with_name(f".{self.destination.name}.old")

    @property
    def shards(self) -> Path:
        """Where files of a checkpoint that is streamed lie for as long as they are needed."""
        return self.work.with_suffix(".shards")

    @contextlib.contextmanager
    def opened(self, *, force: bool) -> Iterator[None]:
        """Within the block, the folders exist and are locked; afterwards, what must not stay is removed.

        A build that fails leaves no trace but finished weights, where another run can go on from them: after an
        interruption, when the environment lacked something or the system failed to read or write a file, and when the
        user asked to keep them. What a streamed build has just fetched stays in all these cases but the last.

        Raises:
            BadInput: when there is a bundle already, unless `force`, or a folder cannot be made.
            EnvironmentLacks: when the disk is full, or a file cannot be written.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._locked())
            self._recover()
            self._check_destination(force)
            try:
                with self._writing_explained(), self._directory():
                    yield
            except Exception as error:
                if isinstance(error, EnvironmentLacks) or isinstance(error.__cause__, OSError):
                    self._say_what_is_kept(error)
                    raise
                shutil.rmtree(self.shards, ignore_errors=True)
                if not self.keep:
                    shutil.rmtree(self.partial, ignore_errors=True)
                raise

    def _say_what_is_kept(self, error: Exception) -> None:
        """Note in an error from where the same command goes on."""
        with contextlib.suppress(OSError):  # it may be what the error is about
            if self.store.holds_tensors:
                error.add_note(f"Finished weights are kept in {self.partial}.")
        if self.shards.is_dir() and any(self.shards.iterdir()):
            error.add_note(f"What has been fetched is kept in {self.shards}.")

    def lay_out(self, layout: Layout, asset: str, store: WeightStore, spare: int = 0) -> Path:
        """The folder of a bundle being built in which there is room for its weights, and nothing else but the asset.

        Finished weights are in it where an interrupted build had the same layout.

        Args:
            layout: of the asset.
            asset: its name.
            store: in whose journal the weights will be.
            spare: bytes that the rest of the build takes, but for small files.

        Raises:
            OSError: when it cannot be written: there may be no room for it.
        """
        folder = store.directory / layout.sha256[:16]
        if not layout.is_in(folder / asset):
            store.forget_in(folder)  # of a file that is gone, or is not as it was left
            _remove([folder])
        folder.mkdir(exist_ok=True)
        _remove_all_but(folder, folder / asset / layout.path)
        others = [path for path in folder.parent.iterdir() if path.is_dir() and path != folder]
        used = {parent for file in store.files() for parent in file.parents}
        _remove(path for path in others if path not in used)
        try:
            layout.write(folder / asset, reserve=True)
            short = bool(others) and shutil.disk_usage(folder).free < spare + _SPARE
        except OSError as error:
            if error.errno not in NO_SPACE or not others:
                raise
            short = True
        if short:  # better to compute again what an earlier layout holds than not to build
            _remove(others)
            layout.write(folder / asset, reserve=True)
        return folder

    def publish(self, bundle: Path, store: WeightStore) -> None:
        """Put the finished bundle at its destination, in place of an older one, and remove the rest.

        Whenever this is killed, `_recover` can tell whether the bundle was in place: then it is not in the store.
        """
        for path in (bundle, *bundle.rglob("*")):  # after a power cut a bundle is whole or absent
            sync_path(path)
        shutil.rmtree(self.shards, ignore_errors=True)
        if self.work.is_dir():
            _remove(self.work.iterdir())
        if self.keep:
            with _usable(f"work directory {self.work}", "--work-dir DIR"):
                store.hand_over(self.work, (bundle, self.destination.resolve()))
        _remove(path for path in bundle.parent.iterdir() if path.is_dir() and path != bundle)
        if self.destination.exists():
            os.rename(self.destination, self._aside)
        try:
            os.rename(bundle, self.destination)
        except OSError:
            if self._aside.exists():
                os.rename(self._aside, self.destination)
            raise
        sync_path(self.destination.parent)
        _remove([self._aside, self.partial])

    def tidy(self) -> None:
        """Finish what a build left half-done that was killed when its bundle was in place.

        Nothing depends on it: where another build uses the folders, or they cannot be written to, they stay as they
        are.
        """
        with contextlib.suppress(ZooError, OSError), self._locked():
            self._recover()

    def _recover(self) -> None:
        """Undo or finish what a killed build left half-done."""
        if self._aside.exists() and not self.destination.exists():
            os.rename(self._aside, self.destination)
        _remove([self._aside])
        ours = self.partial.is_dir() and not self.partial.is_symlink()
        if ours and not any(path.is_dir() for path in self.partial.iterdir()):
            _remove([self.partial])

    def _check_destination(self, force: bool) -> None:
        for path in (self.destination, self.partial):
            if path.is_symlink() or (path.exists() and not path.is_dir()):
                raise BadInput(f"{path} exists and is no folder, so it is never replaced.", MOVE_AWAY)
        if not self.destination.exists():
            return
        require_replaceable(self.destination)
        if not force:
            raise BadInput(f"{self.destination} exists.", "Pass --force to replace it, or another folder with -o DIR.")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the output, then the work folder, against other builds; the folders above them are made."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_parents_of(self.destination))
            stack.enter_context(exclusive(self.destination, f"building {self.destination.name}"))
            with _usable(f"work directory {self.work}", "--work-dir DIR"):
                stack.enter_context(_parents_of(self.work, self.destination.with_name(_DEFAULT_WORK)))
            stack.enter_context(exclusive(self.work, f"building {self.destination.name}"))
            yield

    @contextlib.contextmanager
    def _directory(self) -> Iterator[None]:
        """Make the folder of the store, which knows what was kept; afterwards remove it if nothing goes on from it."""
        try:
            self.partial.mkdir(exist_ok=True)
            if self.keep:
                with _usable(f"work directory {self.work}", "--work-dir DIR"):
                    self.work.mkdir(exist_ok=True)
            if not (self.partial / JOURNAL).exists() and (self.work / JOURNAL).exists():
                WeightStore(self.work).hand_over(self.store.directory)
            yield
        finally:
            with contextlib.suppress(OSError):  # it does not exist, or something is kept in it
                self.work.rmdir()
            if not self.partial.exists() or not self.store.holds_tensors:
                _remove([self.partial])

    @contextlib.contextmanager
    def _writing_explained(self) -> Iterator[None]:
        """Within the block, a disk that is full, or cannot be written, becomes an error that says how to go on."""
        try:
            yield
        except BrokenPipeError:
            raise  # of the terminal that shows the progress
        except OSError as error:
            if error.errno in NO_SPACE:
                raise no_space(error, self.partial) from error
            said = f"{file_of(error, self.partial)} cannot be written or read: {error.strerror or error}."
            hint = "Mend that, then run the same command again to go on, or choose another output folder with -o DIR."
            raise EnvironmentLacks(said, hint) from error


def _remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, those that can be."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _remove_all_but(folder: Path, file: Path) -> None:
    """Remove all that is in a folder but one file, and the folders that it is in."""
    for inside in (folder, *(parent for parent in file.parents if folder in parent.parents)):
        if inside.is_dir():
            _remove(path for path in inside.iterdir() if path not in (file, *file.parents))


@contextlib.contextmanager
def _parents_of(path: Path, ours: Path | None = None) -> Iterator[None]:
    """Make the folders above `path`; afterwards remove those that are empty and were made, or are `ours` anyway."""
    created = [parent for parent in path.parents if parent == ours or not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in created:
            with contextlib.suppress(OSError):  # not empty: the build succeeded, or somebody else uses it
                parent.rmdir()
