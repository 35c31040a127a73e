"""The unit of work of `zoo sensitivity`: one part, described so that any process can measure it; and who does the work.

A description holds no module and no weights: a request, tokens, formats and the path of the reference's logits. A
process designs the model from it once and keeps that for the next part. So a part can be handed to any
`concurrent.futures.Executor`, here to processes on this machine or to a dask cluster, and gives the same result
wherever it is measured.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import frozen

from coreai_zoo.build.code import code_digest
from coreai_zoo.build.design import Design, design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.digest import source_digests
from coreai_zoo.errors import CheckFailed, EnvironmentLacks, listing
from coreai_zoo.format_text import format_text
from coreai_zoo.gates.sensitivity import Part, Sensitivity, Subject, measure
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo.processes import processes
from coreai_zoo.recipes import QuantizationSpec

_CODE = (
    "coreai_zoo.checkpoint.files",
    "coreai_zoo.checkpoint.fp8",
    "coreai_zoo.checkpoint.headers",
    "coreai_zoo.composites",
    "coreai_zoo.dtypes",
    "coreai_zoo.gates.layered",
    "coreai_zoo.gates.rule",
    "coreai_zoo.gates.sensitivity",
    "coreai_zoo.gates.weights",
    "coreai_zoo.lowering.module",
    "coreai_zoo.weights.convert",
    "coreai_zoo.weights.formats",
    "coreai_zoo.weights.quantizer",
)
"""The modules that a result goes through on its way from a checkpoint to a number; the rest is a plugin's or torch."""

_CONNECT_SECONDS = 20


# ---------------------------------------------------------------------------------------------------------------------
# A part, described
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Work:
    """What all parts have in common.

    Attributes:
        request: the model.
        without: names of plugins that are left out.
        base: the format of the rest by role.
        tokens: the prompt.
        reference: file with the logits of the reference, see `write_reference`.
        reference_sha256: of its content.
        determined_by: JSON of `determined_by`, which a process compares with what it has itself.
    """

    request: BuildRequest
    without: tuple[str, ...]
    base: tuple[tuple[str, QuantizationSpec], ...]
    tokens: tuple[int, ...]
    reference: Path
    reference_sha256: str
    determined_by: str


def measure_part(work: Work, part: Part) -> Sensitivity:
    """Measure one part in whatever process this is.

    Raises:
        CheckFailed: when this process has another checkpoint, other code or another reference than the one that asks.
        BadInput: see `measure`.
    """
    with _one_at_a_time:
        subject, reference = _opened(work)
        return measure(subject, part, work.tokens, reference)


_one_at_a_time = threading.Lock()  # a module can run for one part at a time, and a dask worker may have many threads


@functools.lru_cache(maxsize=1)
def _opened(work: Work) -> tuple[Subject, np.ndarray[Any, Any]]:
    """The model and the logits of the reference."""
    plugins = Plugins.discover(work.without) if work.without else default_plugins()
    designed = design(work.request, plugins)
    base = dict(work.base)
    own, asked = determined_by(designed, work.tokens, base), json.loads(work.determined_by)
    if own != asked:
        raise CheckFailed(
            f"A worker has another {listing(different(own, asked))} than the process that gives it work.",
            "Give all of them the same installation and the same checkpoint, below the same path.",
        )
    return Subject.of(designed, base), read_reference(work.reference, work.reference_sha256)


def write_reference(logits: np.ndarray[Any, Any]) -> tuple[bytes, str]:
    """The content of a file with the logits of a reference, and its SHA-256."""
    content = io.BytesIO()
    np.save(content, logits, allow_pickle=False)
    return content.getvalue(), hashlib.sha256(content.getvalue()).hexdigest()


def read_reference(path: Path, sha256: str) -> np.ndarray[Any, Any]:
    """The logits in a file that `write_reference` made.

    Raises:
        CheckFailed: when it is not there, or another one.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckFailed(
            f"The logits of the reference cannot be read from {path}: {error.strerror}.",
            "Workers on other machines have to see the folder of -o below the same path.",
        ) from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise CheckFailed(f"{path} holds other logits than those that the parts are compared with.")
    logits: np.ndarray[Any, Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# What determines a result
# ---------------------------------------------------------------------------------------------------------------------


def determined_by(
    designed: Design, tokens: Sequence[int], base: Mapping[str, QuantizationSpec]
) -> dict[str, str | int | Mapping[str, str]]:
    """All that determines the result of a part, by what it is, in words that end a sentence; as JSON.

    There is no path in it and no time: a folder of results can go on on another machine.
    """
    code = [code_digest(designed.model.overlay)]
    code += [code_digest(rewrite.apply) for _, rewrite in designed.functions[designed.decode].rewrites]
    plan = [
        (tensor.name, tensor.role, tensor.shape, tensor.dtype, tensor.sources) for tensor in designed.weights.tensors
    ]
    return {
        "checkpoint": _digest([designed.checkpoint.identity(), _values(designed.checkpoint)]),
        "model": _digest([repr(each) for each in plan]),
        "prompt": _digest(list(tokens)),
        "format of the rest": {role: format_text(spec) for role, spec in sorted(base.items())},
        "code": _digest([*source_digests(_CODE), *code]),
        "torch": metadata.version("torch"),
        "numpy": metadata.version("numpy"),
    }


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two answers of `determined_by` do not agree in."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _values(checkpoint: Checkpoint) -> str:
    """SHA-256 over the first row of every tensor: what tells two fine-tunes of one model apart without reading all."""
    digest = hashlib.sha256()
    for key, info in checkpoint.tensors.items():
        row = checkpoint.read_rows(key, 0, min(1, info.rows)).contiguous()
        digest.update(row.view(torch.uint8).numpy().tobytes())
    checkpoint.release()
    return digest.hexdigest()


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Who does the work
# ---------------------------------------------------------------------------------------------------------------------


def measured_by(executor: Executor, work: Work, parts: Sequence[Part]) -> Iterator[Sensitivity]:
    """The results of parts in the order in which they are finished. What is left when this ends the executor drops.

    Raises:
        EnvironmentLacks: when workers end before they have finished a part.
        ZooError: of a worker.
    """
    futures = [executor.submit(measure_part, work, part) for part in parts]
    try:
        for future in as_completed(futures):
            yield future.result()
    except CancelledError as error:
        raise EnvironmentLacks(
            "The scheduler has gone in the middle of the work.",
            "Once it is there, the same command goes on where it was.",
        ) from error
    except BrokenProcessPool as error:
        raise EnvironmentLacks(
            "A worker process has ended in the middle of a part; where memory is short, the system does that.",
            "Take fewer --jobs. With -o the same command goes on where it was.",
        ) from error


def local(jobs: int) -> AbstractContextManager[Executor]:
    """Within the block, so many processes on this machine, which share its cores; see `processes`."""
    threads = max(1, torch.get_num_threads() // jobs)  # that read weights; arithmetic takes one
    roots = {"torch", *(info.module.partition(".")[0] for info in default_plugins().info())}
    # What this process has of torch and plugins, it needed to design the model.
    loaded = [name for name in sys.modules if name.partition(".")[0] in roots - {"coreai_zoo"}]
    return processes(jobs, [__name__, *loaded], functools.partial(torch.set_num_threads, threads))


@contextlib.contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """Within the block, the workers of a dask.distributed cluster.

    A worker that dies is no matter as long as there is another one, or a new one comes: dask gives its part away again.

    Args:
        address: of the scheduler: `tcp://HOST:PORT`.

    Raises:
        EnvironmentLacks: when dask.distributed is not installed, no scheduler answers, it has no workers, or one part
            has ended several workers.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise EnvironmentLacks(
            "--scheduler needs dask.distributed, which is not installed.",
            "Install it with `pip install 'coreai-zoo[cluster]'`.",
        ) from error
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise EnvironmentLacks(
            f"No dask scheduler answers at {address} ({_first_line(error)}).",
            "Start one with `dask scheduler`, which prints its address.",
        ) from error
    with client:
        _wait_for_a_worker(client, address)
        pool = client.get_executor()
        try:
            yield pool
        except KilledWorker as error:
            raise EnvironmentLacks(
                f"Several workers of {address} have died of the same part: {_first_line(error)}",
                "Give them more memory. The same command goes on where it was.",
            ) from error
        finally:
            pool.shutdown(wait=False)


def _wait_for_a_worker(client: Any, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=_CONNECT_SECONDS)
    except TimeoutError as error:
        raise EnvironmentLacks(
            f"The dask scheduler at {address} has no workers.", f"Start some with `dask worker {address} --nthreads 1`."
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
