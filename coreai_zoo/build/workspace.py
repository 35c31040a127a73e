"""The folders of a build: nothing half-written is ever at the output path, and nothing is left behind.

    OUTPUT/NAME             the bundle, complete and verified
    OUTPUT/.NAME.partial    the bundle being built, in a folder of its own, and any whose weights it can use
    OUTPUT/.NAME.old        the bundle that it replaces, for the moment between two renames
    WORK/NAME               the journal of the weights: what is finished, and where it is
    WORK/.NAME.spent        a journal that is no longer needed, being removed
    WORK/.NAME.shards       files of a checkpoint that is streamed: those that are fetched, or read, just now

The names are fixed, so a build finds whatever a killed one left; see `Workspace.opened`. Partial bundle and journal
outlive an interruption, so that the next build goes on. Each layout has a folder in the partial bundle that is named by
chance, so that what a journal says of one is never true of another by mistake.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from attrs import frozen

from coreai_zoo.build.lock import exclusive
from coreai_zoo.errors import NO_SPACE, BadInput, EnvironmentLacks, ZooError
from coreai_zoo.layout import Layout
from coreai_zoo.weights.store import JOURNAL, WeightStore

_DEFAULT_WORK = ".zoo-work"


def check_output_folder(output: Path) -> None:
    """Refuse an output folder that cannot be written to, before anything is read.

    Raises:
        BadInput: when it is not a folder, or nothing can be made in it.
    """
    existing = existing_parent(output)
    if not existing.is_dir():
        raise BadInput(
            f"The output folder {output} cannot be made: {existing} is no folder.", "Choose another with -o DIR."
        )
    try:
        # Has no name on Linux: being killed here leaves nothing.
        with tempfile.TemporaryFile(dir=existing, prefix=".zoo-"):
            pass
    except OSError as error:
        raise BadInput(
            f"The output folder {output} cannot be written to: {error.strerror}.", "Choose another with -o DIR."
        ) from error


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists() or parent.is_symlink())


@frozen
class Workspace:
    """The folders of one build.

    Attributes:
        destination: where the bundle will be.
        work: where the journal of the weights is.
        keep: whether the journal stays when the build has succeeded.
        given: whether the user chose where the journal is.
    """

    destination: Path
    work: Path
    keep: bool = False
    given: bool = False

    @classmethod
    def of(cls, output: Path, name: str, work_dir: Path | None, *, keep: bool) -> Workspace:
        """The workspace of the bundle called `name`."""
        return cls(output / name, (work_dir or output / _DEFAULT_WORK) / name, keep, given=work_dir is not None)

    @property
    def partial(self) -> Path:
        """The folder of the bundle being built."""
        return self.destination.with_name(f".{self.destination.name}.partial")

    @property
    def _aside(self) -> Path:
        return self.destination.with_name(f".{self.destination.name}.old")

    @property
    def _spent(self) -> Path:
        return self.work.with_name(f".{self.work.name}.spent")

    @property
    def shards(self) -> Path:
        """Where files of a checkpoint that is streamed lie for as long as they are needed."""
        return self.work.with_name(f".{self.work.name}.shards")

    @contextlib.contextmanager
    def opened(self, *, force: bool) -> Iterator[None]:
        """Within the block, the folders exist and are locked; afterwards, what must not stay is removed.

        A build that fails leaves no trace but finished weights, where another run can go on from them: after an
        interruption, when the environment lacked something (disk space, for one), and when the user asked to keep them.
        What a streamed build has just fetched stays in the first two cases.

        Raises:
            BadInput: when there is a bundle already, unless `force`, or a folder cannot be made.
            EnvironmentLacks: when the disk is full.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._locked())
            self._recover()
            self._check_destination(force)
            stack.enter_context(self._directories())
            try:
                with _space_explained():
                    yield
            except EnvironmentLacks as error:
                if WeightStore(self.work).holds_tensors:
                    error.add_note(f"Finished weights are kept in {self.partial}.")
                raise
            except Exception:
                shutil.rmtree(self.shards, ignore_errors=True)
                if not self.keep and not self.given:
                    self._remove_work()
                    shutil.rmtree(self.partial, ignore_errors=True)
                raise

    def lay_out(self, layout: Layout, asset: str, store: WeightStore) -> Path:
        """The folder of a bundle being built in which there is room for its weights, and nothing else but the asset.

        Finished weights are in it where an interrupted build had the same layout.

        Args:
            layout: of the asset.
            asset: its name.
            store: in whose journal the weights will be.

        Raises:
            EnvironmentLacks: when it cannot be written.
            OSError: when there is no room for it.
        """
        folder = self.partial.resolve() / (store.laid_out_as(layout.sha256) or "")
        if folder == self.partial.resolve() or not layout.is_in(folder / asset):
            folder = self.partial.resolve() / secrets.token_hex(4)
            folder.mkdir()
            store.lay_out(layout.sha256, folder.name)
        # By its name, which is like no other: paths may have changed by which the journal knows a folder.
        used = {folder.name, *(part for file in store.files() for part in file.parts)}
        _remove(path for path in folder.parent.iterdir() if path.name not in used)
        _remove(path for path in folder.iterdir() if path.name != asset)
        others = [path for path in folder.parent.iterdir() if path != folder]
        try:
            layout.write(folder / asset, reserve=True)
        except OSError as error:
            if error.errno not in NO_SPACE:
                said = f"{folder / asset} cannot be written: {error.strerror}."
                raise EnvironmentLacks(said, "Choose another output folder with -o DIR.") from error
            if not others:
                raise
            _remove(others)  # better to compute again what an earlier layout holds than not to build
            layout.write(folder / asset, reserve=True)
        return folder

    def publish(self, bundle: Path, store: WeightStore) -> None:
        """Put the finished bundle at its destination, in place of an older one; remove the journal unless kept.

        Whenever this is killed, `_recover` can tell whether the bundle was in place: then there is no partial one.
        """
        _sync_tree(bundle)
        shutil.rmtree(self.shards, ignore_errors=True)
        _remove(path for path in bundle.parent.iterdir() if path != bundle)
        if not self.keep:
            os.rename(self.work, self._spent)
        if self.destination.exists():
            os.rename(self.destination, self._aside)
        try:
            os.rename(bundle, self.destination)
        except OSError:
            if self._aside.exists():
                os.rename(self._aside, self.destination)
            if self._spent.exists():
                os.rename(self._spent, self.work)
            raise
        _sync(self.destination.parent)
        if self.keep:
            store.moved(bundle, self.destination.resolve())
        shutil.rmtree(self._aside, ignore_errors=True)
        self._remove_work()

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
        unpublished = self.partial.is_dir() and any(self.partial.iterdir())
        if self._spent.exists() and unpublished and not self.work.exists():
            os.rename(self._spent, self.work)  # killed before the bundle was in place
        for left in (self._spent, self._aside, *(() if self.work.exists() else (self.partial,))):
            shutil.rmtree(left, ignore_errors=True)

    def _check_destination(self, force: bool) -> None:
        if self.destination.is_symlink() or (self.destination.exists() and not self.destination.is_dir()):
            raise BadInput(
                f"{self.destination} exists and is no folder, so it is never replaced.",
                "Move it away, or choose another folder with -o DIR.",
            )
        if self.destination.exists() and not force:
            raise BadInput(f"{self.destination} exists.", "Pass --force to replace it, or another folder with -o DIR.")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock the output, then the journal, against other builds; the folders above them are made."""
        with contextlib.ExitStack() as stack:
            stack.callback(self._remove_default_parent)  # last, when no lock file is in it any more
            stack.enter_context(_parents_of(self.destination))
            stack.enter_context(exclusive(self.destination, f"building {self.destination.name}"))
            with self._work_explained():
                stack.enter_context(_parents_of(self.work))
            stack.enter_context(exclusive(self.work, f"building {self.destination.name}"))
            yield

    @contextlib.contextmanager
    def _directories(self) -> Iterator[None]:
        """Make the folders of partial bundle and journal; afterwards remove those from which nothing can go on."""
        self.partial.mkdir(exist_ok=True)
        try:
            with self._work_explained():
                self.work.mkdir(exist_ok=True)
            yield
        finally:
            if not WeightStore(self.work).holds_tensors:
                _remove([self.partial, self.work / JOURNAL])
            for folder in (self.work, self.partial):
                with contextlib.suppress(OSError):  # not empty: to be resumed from
                    folder.rmdir()

    @contextlib.contextmanager
    def _work_explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise BadInput(
                f"The work directory {self.work} cannot be made: {error.strerror}.",
                "Choose another with --work-dir DIR.",
            ) from error

    def _remove_work(self) -> None:
        if not self.keep:
            shutil.rmtree(self._spent, ignore_errors=True)
            shutil.rmtree(self.work, ignore_errors=True)

    def _remove_default_parent(self) -> None:
        if not self.given:  # ours, also when a killed build made it
            with contextlib.suppress(OSError):  # not empty: another build's store is beside it
                self.work.parent.rmdir()


def _remove(paths: Iterable[Path]) -> None:
    """Remove files and folders, those that can be."""
    for path in list(paths):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _parents_of(path: Path) -> Iterator[None]:
    """Make the folders above `path`; afterwards remove those that were made and are empty."""
    created = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for parent in created:
            with contextlib.suppress(OSError):  # not empty: the build succeeded, or somebody else uses it
                parent.rmdir()


@contextlib.contextmanager
def _space_explained() -> Iterator[None]:
    """Within the block, a full disk becomes an error that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        file = error.filename2 or error.filename  # of a copy, the second is the one that was written
        raise EnvironmentLacks(
            f"There is no space left{f' for {file}' if file else ''} ({error.strerror}).",
            "Free some, then run the same command again to go on.",
        ) from error


def _sync_tree(directory: Path) -> None:
    """Wait until every file below `directory` is on disk: after a power cut a bundle is whole or absent."""
    for path in (directory, *sorted(directory.rglob("*"))):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
