"""The folders of a build: nothing half-written is ever at the output path, and nothing is left behind.

    OUTPUT/NAME             the bundle, complete and verified
    OUTPUT/.NAME.partial    the bundle being built
    OUTPUT/.NAME.old        the bundle that it replaces, for the moment between two renames
    WORK/NAME               the weight store, which outlives an interruption so that the next build resumes
    WORK/.NAME.spent        a weight store that is no longer needed, being removed
    WORK/.NAME.shards       files of a checkpoint that is streamed: those that are fetched, or read, just now

The names are fixed, so a build finds whatever a killed one left; see `Workspace.opened`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from attrs import frozen

from coreai_zoo.build.lock import exclusive
from coreai_zoo.errors import NO_SPACE, BadInput, EnvironmentLacks, ZooError

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
        work: where the weight store is.
        keep: whether the weight store stays when the build has succeeded.
        given: whether the user chose where the weight store is.
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
        """The bundle being built."""
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

        A build that fails leaves no trace but the weight store, where another run can go on from it: after an
        interruption, when the environment lacked something (disk space, for one), and when the user asked to keep it.
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
                if self.work.is_dir() and any(self.work.iterdir()):
                    error.add_note(f"Finished weights are kept in {self.work}.")
                raise
            except Exception:
                shutil.rmtree(self.shards, ignore_errors=True)
                if not self.keep and not self.given:
                    self._remove_work()
                raise

    def publish(self) -> None:
        """Put the finished bundle at its destination, in place of an older one; remove the weight store unless kept.

        Whenever this is killed, `_recover` can tell whether the bundle was in place: then there is no partial one.
        """
        _sync_tree(self.partial)
        shutil.rmtree(self.shards, ignore_errors=True)
        if not self.keep:
            os.rename(self.work, self._spent)
        if self.destination.exists():
            os.rename(self.destination, self._aside)
        try:
            os.rename(self.partial, self.destination)
        except OSError:
            if self._aside.exists():
                os.rename(self._aside, self.destination)
            if self._spent.exists():
                os.rename(self._spent, self.work)
            raise
        _sync(self.destination.parent)
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
        if self._spent.exists() and self.partial.exists() and not self.work.exists():
            os.rename(self._spent, self.work)  # killed before the bundle was in place
        for left in (self._spent, self._aside, self.partial):
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
        """Lock the output, then the weight store, against other builds; the folders above them are made."""
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
        """Make the folders of partial bundle and weight store; afterwards remove the first, and the second if empty."""
        self.partial.mkdir()
        try:
            with self._work_explained():
                self.work.mkdir(exist_ok=True)
            yield
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: to be resumed from
                self.work.rmdir()

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
