"""A build, from a request to a bundle: resolve, fetch, trace, lower, weights, bundle, verify.

What can be refused on metadata is refused before the first byte of a weight is fetched, and an overlay that does not
lower shows before tens of gigabytes are read. The asset is laid out before there are weights, which are written once,
where they stay. A checkpoint that is streamed is designed on the headers of its files, which are fetched while weights
are stored.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Lock

from attrs import evolve, frozen

from coreai_zoo.backend import Check, Constant, Traced
from coreai_zoo.build.design import Design, design, fetched
from coreai_zoo.build.existing import find_existing, remember
from coreai_zoo.build.expected import expected_by
from coreai_zoo.build.preflight import Preflight, preflight, stream_of
from coreai_zoo.build.record import write_records
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.workspace import Workspace, check_output_folder
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.layout import bytes_below
from coreai_zoo.bundle.verify import require, verify
from coreai_zoo.checkpoint.portable_tokenizer import tokenizer_changes
from coreai_zoo.digest import FollowingDigest
from coreai_zoo.dtypes import size
from coreai_zoo.errors import listing
from coreai_zoo.layout import Layout
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.weights.means import unusual_means
from coreai_zoo.weights.plan import PlannedTensor
from coreai_zoo.weights.store import FillReport, Place, Places, StoredArray, WeightStore, first_of
from coreai_zoo.weights.stream import Stream


@frozen
class BuildResult:
    """A finished bundle, which may have been there already: then nothing was read, computed or checked.

    Attributes:
        path: the bundle's folder.
        bytes: size of all its files.
        computed: number of weights that this run quantized or converted.
        reused: number of weights that an earlier run had left in the work folder.
        seconds: time of each stage.
        checks: what verification found.
        preflight: what the build was expected to read and write, and the room there was for it; None where the bundle
            was there already.
    """

    path: Path
    name: str
    bytes: int
    computed: int
    reused: int
    seconds: Mapping[str, float]
    checks: tuple[Check, ...]
    preflight: Preflight | None

    @classmethod
    def of_existing(cls, bundle: Bundle) -> BuildResult:
        """The result of a build that had nothing to do."""
        path = bundle.directory
        return cls(path, path.name, bytes_below(path), 0, 0, {}, (), None)


def build(request: BuildRequest, plugins: Plugins, report: Reporter | None = None) -> BuildResult:
    """Build a bundle.

    The output path is untouched until the bundle is complete and verified.

    Raises:
        ZooError: for anything that the user can mend; see errors.
    """
    report = report or Reporter(silent=True)
    with ExitStack() as stack:
        stack.enter_context(_rare_collections())
        with report.stage("resolve", str(request.checkpoint if request.model is None else request.model)):
            check_output_folder(request.output)
            if (existing := find_existing(request, plugins, report)) is not None:
                name = existing.directory.name
                Workspace.of(request.output, name, request.work_dir, keep=request.keep_weights).tidy()
                return BuildResult.of_existing(existing)
            designed = design(request, plugins, report=report)
            if request.target is not None:
                report.note(f"{request.target}: contract {designed.contract.name}, backend {designed.backend.name}")
            report.note(f"origin: {designed.source.origin}; licence: {designed.source.licence.id or 'not known'}")
            if designed.standing is not None:
                report.note(designed.standing)
            for difference in designed.differences:
                report.note(f"differs from the entry: {difference}")
            classes = plugins.tokenizer_classes()
            assert designed.source.directory is not None
            for change in tokenizer_changes(designed.source.directory, classes):
                report.note(f"tokenizer: {change}")
            workspace = Workspace.of(request.output, designed.name, request.work_dir, keep=request.keep_weights)
            stack.enter_context(workspace.opened(force=request.force))
            needs = preflight(designed, workspace)
            report.note(str(needs))
            needs.require()
        if not designed.source.streamed:
            designed = _fetched(designed, plugins, report)
        with report.stage("trace", f"{designed.backend.name}, contract {designed.contract.name}"):
            traced = designed.trace()
        store = workspace.store
        with report.stage("lower", designed.asset):
            layout, before = _laid_out(traced, designed, store, workspace, report)
            del traced  # half a gigabyte of a deep decoder
            spare = max(0, needs.written - layout.size) + (needs.fetched_at_once if needs.streamed else 0)
            partial = workspace.lay_out(layout, designed.asset, store, spare)
        with report.stage("weights", f"{len(designed.weights.stored)} tensors as {designed.recipe.name}"):
            asset = partial / designed.asset
            # In the order of the file, which is hashed as far as it is filled.
            stream = stream_of(designed, workspace, first_of(_places(layout, asset)))
            filled = _fill(store, designed, layout, asset, stream, before, report)
            if stream is not None:  # all its values have been seen by now
                designed = _with_notes(designed, stream.notes(), report)
        with report.stage("bundle", designed.name):
            write_records(designed, store, partial, classes)
        with report.stage("verify"):
            checks = verify(
                Bundle.open(partial),
                {designed.backend.name: designed.backend},
                classes,
                recipes=plugins.recipes(),
                expected=expected_by(designed, designed.checkpoint.directory),
            )
            require(checks)
        # Before the bundle is in place, so that one that is there is known even if the build is killed right then.
        remember(workspace.destination, partial, designed.checkpoint)
        workspace.publish(partial, store)
    path = workspace.destination
    return BuildResult(
        path,
        designed.name,
        bytes_below(path),
        filled.computed,
        filled.reused,
        dict(report.seconds),
        tuple(checks),
        needs,
    )


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Within the block, Python looks for cycles less often.

    A traced decoder is half a million objects, and walking over them took a fifth of the time of tracing.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _fetched(designed: Design, plugins: Plugins, report: Reporter) -> Design:
    """The design when its weights are on this machine and their values can be looked at."""
    if (hub := designed.source.hub) is not None:
        with report.stage("fetch", f"{len(hub.weights)} files of {hub.id} at {hub.commit}"):
            designed = fetched(designed, plugins, report)
    return _with_notes(designed, unusual_means(designed.checkpoint, designed.weights), report)


def _with_notes(designed: Design, of_values: tuple[str, ...], report: Reporter) -> Design:
    """The design with what its values show, once there are any; all notes are told."""
    notes = (*designed.notes, *of_values)
    for note in notes:
        report.note(f"note: {note}")
    return evolve(designed, notes=notes)


def _laid_out(
    traced: Traced, designed: Design, store: WeightStore, workspace: Workspace, report: Reporter
) -> tuple[Layout, list[FillReport]]:
    """Where everything stands in the asset. What that depends on is stored first, in files of the store's own."""
    from coreai_zoo.lowering.module import constants, planned_constants

    filled: list[FillReport] = []

    def values(names: Collection[str]) -> Mapping[str, Constant]:
        if not names:
            return {}
        read = [each for each in designed.weights.tensors if any(state in names for state in _states(each))]
        stored = {each.stored_as for each in read}
        part = evolve(designed.weights, tensors=tuple(each for each in designed.weights.stored if each.name in stored))
        stream = stream_of(evolve(designed, weights=part), workspace, alone=False) if part.tensors else None
        missing = 0 if stream is None else stream.missing_bytes
        if missing:
            report.note(f"fetching {size(missing)} first, for the layout depends on what is in them")
        with report.bytes(missing) if missing else nullcontext(lambda *_: None) as count:
            arriving = [part.stored] if stream is None else stream.arriving(count)
            filled.append(store.fill(designed.weights, designed.checkpoint, arriving=arriving))
        found = constants({each.name: store[each.stored_as] for each in read})
        return {name: found[name] for name in names}

    return traced.lay_out(planned_constants(designed.weights), values), filled


def _places(layout: Layout, asset: Path) -> Places:
    return {name: Place(asset / layout.path, start) for name, start in layout.room.items()}


def _states(tensor: PlannedTensor) -> Collection[str]:
    return tensor.format.state_names(tensor.name).values()


def _fill(
    store: WeightStore,
    designed: Design,
    layout: Layout,
    asset: Path,
    stream: Stream | None,
    before: Sequence[FillReport],
    report: Reporter,
) -> FillReport:
    """Have every weight in the asset, whose hash is taken meanwhile; what was done with those `before` included."""
    missing = 0 if stream is None else stream.missing_bytes
    if stream is not None and missing:
        report.note(f"fetching {size(missing)} meanwhile, {size(stream.most_bytes)} on the disk at a time")
    file, counting = asset / layout.path, Lock()
    gaps = [(start, start + layout.sizes[name]) for name, start in layout.room.items()]
    with report.bytes(designed.weights.stored_bytes + missing) as count_bytes, FollowingDigest(file, gaps) as digest:

        def count(what: str, more: int) -> None:
            with counting:  # what is fetched is counted in another thread
                count_bytes(what, more)

        def progress(tensor: PlannedTensor, elements: int) -> None:
            count(tensor.name, elements * tensor.format.bytes // tensor.parameters)

        def placed(arrays: Iterable[StoredArray]) -> None:
            for array in arrays:
                if array.place.path == file:
                    digest.filled(array.place.offset, array.place.offset + array.bytes)

        filled = store.fill(
            designed.weights,
            designed.checkpoint,
            progress,
            places=_places(layout, asset),
            placed=placed,
            arriving=None if stream is None else stream.arriving(count),
        )
        sha256 = digest.hexdigest()
    if layout.checksum is not None:
        (asset / layout.checksum).write_bytes(bytes.fromhex(sha256))
    filled.reused -= sum(each.computed for each in before)  # in files of the store's own, and copied
    filled.computed += sum(each.computed for each in before)
    report.note(f"{filled.computed} computed, {filled.reused} reused")
    if repaired := [name for each in (*before, filled) for name in each.repaired]:
        report.note(f"damaged and redone: {listing(repaired)}")
    if removed := sum(len(each.removed) for each in (*before, filled)):
        report.note(f"removed {removed} tensors that this build does not use")
    return filled
