"""A build, from a name to a bundle: resolve, trace, weights, lower, bundle, verify.

Tracing comes before the weights: an overlay that does not lower is found out before tens of gigabytes are read.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import frozen

from coreai_zoo.backend import Check, Traced
from coreai_zoo.build.design import Resolved, resolve
from coreai_zoo.build.preflight import Preflight, preflight
from coreai_zoo.build.record import write_records
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.workspace import Workspace
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.verify import require, verify
from coreai_zoo.errors import listing
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.weights.plan import PlannedTensor
from coreai_zoo.weights.store import FillReport, WeightStore

__all__ = ["BuildResult", "build"]


@frozen
class BuildResult:
    """A finished bundle.

    Attributes:
        path: the bundle's directory.
        bytes: size of all its files.
        computed: weights that were quantized or converted in this run.
        reused: weights that an earlier run had left in the work directory.
        seconds: time of each stage.
        checks: what verification found.
        preflight: what was expected to be read and written, and what there was for it.
    """

    path: Path
    name: str
    bytes: int
    computed: int
    reused: int
    seconds: Mapping[str, float]
    checks: tuple[Check, ...]
    preflight: Preflight


def build(request: BuildRequest, plugins: Plugins, report: Reporter | None = None) -> BuildResult:
    """Build a bundle.

    The output path is untouched until the bundle is complete and verified.

    Raises:
        ZooError: for anything that the user can mend; see errors.
    """
    report = report or Reporter(silent=True)
    with ExitStack() as stack:
        stack.enter_context(_rare_collections())
        with report.stage("resolve", request.entry):
            resolved = resolve(request, plugins)
            if resolved.relies_on_unverified:
                report.note("unverified: the entry was not compared with the published checkpoint yet")
            for difference in resolved.differences:
                report.note(f"differs from the entry: {difference}")
            workspace = Workspace.of(request.output, resolved.name, request.work_dir, keep=request.keep_weights)
            stack.enter_context(workspace.opened(force=request.force))
            needs = preflight(resolved, workspace)
            report.note(str(needs))
            needs.require()
        with report.stage("trace", f"{resolved.backend.name}, contract {resolved.contract.name}"):
            traced = _trace(resolved)
        store, partial = WeightStore(workspace.work), workspace.partial
        with report.stage("weights", f"{len(resolved.weights.tensors)} tensors as {resolved.recipe.name}"):
            filled = _fill(store, resolved, report)
            report.note(f"{filled.computed} computed, {filled.reused} reused")
            if filled.repaired:
                report.note(f"damaged and redone: {listing(list(filled.repaired))}")
            if filled.removed:
                report.note(f"removed {len(filled.removed)} tensors that this build does not use")
        # The disk may have filled meanwhile, and the toolchain's writer ends the whole process when it meets its end.
        preflight(resolved, workspace).require()
        with report.stage("lower", resolved.asset):
            _lower(traced, resolved, store, partial)
        with report.stage("bundle", resolved.name):
            classes = plugins.tokenizer_classes()
            write_records(resolved, store, partial, classes)
        with report.stage("verify"):
            checks = verify(Bundle.open(partial), {resolved.backend.name: resolved.backend}, classes)
            require(checks)
        workspace.publish()
    path = workspace.destination
    total = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return BuildResult(
        path, resolved.name, total, filled.computed, filled.reused, dict(report.seconds), tuple(checks), needs
    )


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let Python look for cycles less often: a traced decoder is half a million objects, and walking over them took a
    fifth of the time of tracing.
    """
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _trace(resolved: Resolved) -> Traced:
    from coreai_zoo.lowering.module import allocate

    allocate(resolved.module, {tensor.name: tensor for tensor in resolved.weights.tensors})
    return resolved.backend.trace(resolved.module, resolved.signature)


def _fill(store: WeightStore, resolved: Resolved, report: Reporter) -> FillReport:
    with report.bytes(resolved.weights.stored_bytes) as counter:

        def progress(tensor: PlannedTensor, elements: int) -> None:
            counter.advance(tensor.name, elements * tensor.stored_bytes // tensor.parameters)

        return store.fill(resolved.weights, resolved.checkpoint, progress)


def _lower(traced: Traced, resolved: Resolved, store: WeightStore, partial: Path) -> None:
    from coreai_zoo.lowering.module import constants

    stored = constants(store, (tensor.name for tensor in resolved.weights.tensors))
    traced.save(stored, partial / resolved.asset)
