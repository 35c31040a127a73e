"""Gates: does a bundle compute what its checkpoint computes?

An oracle gives reference logits (Hugging Face's own modules), a candidate gives the bundle's, a rule compares them
position by position. Oracle and candidate are both a `Model`; the three know nothing of each other; `teacher_forced`
puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from attrs import field, frozen
from attrs.validators import is_callable, min_len

from coreai_zoo.signature import TraceSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel


@frozen
class Activations:
    """The activations of a model over a prompt: P positions, V tokens in the vocabulary, D hidden, L layers.

    Attributes:
        logits: [P, V] float32 or float16.
        hidden: the residual stream, L + 1 arrays [P, D]: after the embedding, then after each layer. None where the
            model runs as one function that does not show it.
        router_logits: before any softmax, one array [P, experts] for each layer with a router, first layer first; None
            where there is no router or the model does not show it.
        peaks: the largest |value| of each place that the model shows: embedding, outputs of a layer's parts, residual
            stream, states. None where it shows none.
    """

    logits: np.ndarray[Any, Any]
    hidden: Sequence[np.ndarray[Any, Any]] | None = None
    router_logits: Sequence[np.ndarray[Any, Any]] | None = None
    peaks: Mapping[str, float] | None = None


class Model(Protocol):
    """Something that turns tokens into logits: an oracle, a candidate that is judged against it, or a control."""

    @property
    def name(self) -> str:
        """For the report: what computes, on what."""

    def run(self, tokens: Sequence[int]) -> Activations:
        """Teacher-forced: what follows each token, given all up to it."""


@runtime_checkable
class BatchingModel(Model, Protocol):
    """A model that runs several prompts faster together than one after the other."""

    def run_many(self, prompts: Sequence[Sequence[int]]) -> list[Activations]:
        """What `run` gives for each prompt."""


@frozen
class ReferenceModel:
    """How the oracle makes the model of an architecture that transformers' Auto classes do not know.

    Attributes:
        name: which implementation in which version, for reports: `acme-models 2.1`.
        make: takes a `config.json` and the dtype to compute in; returns a `transformers.PreTrainedModel` for causal
            language modelling. It is called with the meta device as torch's default: the oracle fills the parameters
            layer by layer, the layers being the modules that the class names in `_no_split_modules`.
    """

    name: str = field(validator=min_len(1))
    make: Callable[[Mapping[str, Any], torch.dtype], PreTrainedModel] = field(validator=is_callable())


@frozen
class GateResult:
    """Outcome of one gate.

    Attributes:
        gate: its name.
        passed: the verdict.
        summary: one line.
    """

    gate: str
    passed: bool
    summary: str


class BuiltBundle(Protocol):
    """A bundle on disk as a gate is given it; `coreai_zoo.bundle.bundle.Bundle` is one."""

    @property
    def directory(self) -> Path:
        """Where it is."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Content of `metadata.json`."""

    @property
    def build(self) -> Mapping[str, Any]:
        """Content of `build.json`."""

    @property
    def asset(self) -> Path:
        """The asset that holds its functions."""

    @property
    def tokenizer(self) -> Path:
        """The folder of its tokenizer."""

    @property
    def functions(self) -> Mapping[str, TraceSpec]:
        """The signature of each function as it was built; the first one decodes."""

    @property
    def max_context(self) -> int:
        """Positions that it allows."""


@runtime_checkable
class Gate(Protocol):
    """A check that a plugin adds through `zoo_gates`."""

    @property
    def name(self) -> str:
        """For the report."""

    def run(self, bundle: BuiltBundle, checkpoint: Path) -> GateResult:
        """Judge `bundle` against the checkpoint that it was built from."""
