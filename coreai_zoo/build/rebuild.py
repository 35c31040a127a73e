"""Whether a bundle comes out the same again: `zoo verify --rebuild`."""

from __future__ import annotations

import atexit
import contextlib
import filecmp
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from coreai_zoo import interruption
from coreai_zoo.backend import Check
from coreai_zoo.build import pipeline
from coreai_zoo.build.record import versions
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.card import CARD, without_measurements
from coreai_zoo.bundle.layout import GATE_FOLDER
from coreai_zoo.bundle.verify import backend_of
from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import BadInput, EnvironmentLacks, listing
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.recipe_files import recorded_recipe
from coreai_zoo.recipes import Recipe


def rebuild(bundle: Bundle, checkpoint: Path | None, plugins: Plugins, report: Reporter) -> Check:
    """Build `bundle` again from what its record says and compare every byte.

    Args:
        bundle: the bundle.
        checkpoint: the one it was built from; None for a sample's, or to fetch it.
        plugins: as for a build.
        report: is told of the build's stages.

    Raises:
        EnvironmentLacks: when other versions than the recorded ones are installed: the bytes would differ.
        BadInput: when the record does not say how the bundle was built.
    """
    require_versions(bundle, plugins)
    with temporary_folder("zoo-rebuild-") as folder:
        request, date = recorded_request(bundle, checkpoint, folder)
        with _date(date):
            again = pipeline.build(request, plugins, report).path
        differing = differences(bundle.directory, again)
    total = len(bundle.build["files"]) + 1
    return Check("rebuild", not differing, listing(differing) or f"{total} files, every byte the same")


def recorded_request(bundle: Bundle, checkpoint: Path | None, output: Path) -> tuple[BuildRequest, int]:
    """The request that `bundle` was built from, with `output` as its folder, and the date that the bundle carries."""
    build: Mapping[str, Any] = bundle.build
    try:
        request = BuildRequest(
            model=_model(bundle, checkpoint),
            checkpoint=checkpoint,
            label=build.get("label"),
            sample=bool(build["sample"]),
            recipe=_recipe(bundle),
            contract=build["contract"]["name"],
            backend=build["backend"],
            output=output,
            max_context=build["max_context"],
            layers=build["request"]["layers"],
            custom=bool(build["entry"] and build["entry"]["differences"]),
        )
        return request, int(build["source_date_epoch"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"build.json of {bundle.directory} does not say how it was built: {error!r}.") from error


def _recipe(bundle: Bundle) -> str | Recipe:
    """The recipe that a bundle was built by, from its record; of one that does not hold it, the name."""
    recorded = bundle.build["recipe"]
    if "rule" not in recorded:
        return str(recorded["name"])
    return recorded_recipe(str(recorded["name"]), recorded, bundle.directory)


def _model(bundle: Bundle, checkpoint: Path | None) -> str | None:
    """What a bundle was built from: its entry, or else its repository; None for the folder of its checkpoint.

    Where no plugin brought the entry, it is the path of a copy of its file, which goes when we end.
    """
    recorded = bundle.build["entry"]
    if recorded is None:
        origin = bundle.origin
        if checkpoint is None and None in (origin.get("hf_id"), origin.get("revision")):
            raise BadInput(f"{bundle.directory} was built from a folder.", "Pass it with --checkpoint DIR.")
        return None if checkpoint is not None else f"{origin['hf_id']}@{origin['revision']}"
    text = recorded.get("file")
    if text is None:
        return str(recorded["name"])
    with interruption.deferred():  # there is no moment at which it is there and would stay
        folder = Path(tempfile.mkdtemp(prefix="zoo-entry-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "entry.toml"
    path.write_text(str(text), encoding="utf-8")
    return str(path)


def require_versions(bundle: Bundle, plugins: Plugins) -> None:
    """Refuse to rebuild with other versions than the recorded ones.

    Raises:
        EnvironmentLacks: naming each of them, with both versions.
    """
    backend = backend_of(bundle, plugins.backends())
    recorded = {**bundle.build.get("versions", {}), "coreai-zoo": bundle.build.get("zoo")}
    installed = versions(backend)
    differing = [
        f"{name} is {installed.get(name)}, the bundle was built with {version}"
        for name, version in recorded.items()
        if installed.get(name) != version
    ]
    if differing:
        raise EnvironmentLacks(
            f"{bundle.directory} cannot be rebuilt here: {listing(differing)}.",
            "Install the versions it was built with.",
        )


def differences(bundle: Path, again: Path) -> list[str]:
    """Files that only one of two bundles has, or whose bytes differ."""
    files = {
        path.relative_to(folder).as_posix()
        for folder in (bundle, again)
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] != GATE_FOLDER
    }
    return [name for name in sorted(files) if not _same(bundle / name, again / name, card=name == CARD)]


def _same(one: Path, other: Path, *, card: bool) -> bool:
    if not (one.is_file() and other.is_file()):
        return False
    if card:  # a gate may have added what it measured
        return without_measurements(one.read_bytes()) == without_measurements(other.read_bytes())
    return filecmp.cmp(one, other, shallow=False)


@contextlib.contextmanager
def _date(seconds: int) -> Iterator[None]:
    """Within the block, a bundle carries this date."""
    before = os.environ.get("SOURCE_DATE_EPOCH")
    os.environ["SOURCE_DATE_EPOCH"] = str(seconds)
    try:
        yield
    finally:
        if before is None:
            del os.environ["SOURCE_DATE_EPOCH"]
        else:
            os.environ["SOURCE_DATE_EPOCH"] = before
