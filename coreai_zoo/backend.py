"""The interface of a backend. The toolchains themselves are imported only by the modules that implement one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from attrs import frozen

from coreai_zoo.dtypes import packed_bytes
from coreai_zoo.engine import LARGEST_CHUNK, PREFILL, prompt_chunks
from coreai_zoo.errors import BadInput
from coreai_zoo.layout import Layout
from coreai_zoo.program import Program
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.signature import Signature, TraceSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


@frozen
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether it holds.
        detail: what was found.
    """

    name: str
    passed: bool
    detail: str


class Traced(Protocol):
    """A decoder that its backend has traced, and that waits for its weights."""

    def lay_out(self, constants: Mapping[str, Constant], values: Values) -> Layout:
        """Lower it; where everything stands in the asset, and all of it but the weights.

        Args:
            constants: the stored state of the modules by name, see `lowering.module.constants`; their data are not
                read, and may be None.
            values: gives some of them with data, where what is written depends on the values.

        Raises:
            PluginError: when a weight would not be stored as it is.
            EnvironmentLacks: when the toolchain cannot write a temporary file.
        """

    def lowered(self, constants: Mapping[str, Constant]) -> Program:
        """The program that `lay_out` would lay out; all data may be None."""


class Stepper(Protocol):
    """A loaded asset that is fed token by token, its states carried from call to call and from function to function."""

    def step(self, token: int) -> np.ndarray[Any, Any]:
        """Feed one token at the next position to the function that decodes; the logits, float16 [V]."""

    def call(self, function: str, tokens: Sequence[int]) -> np.ndarray[Any, Any] | None:
        """Feed tokens at the next positions to a function; its logits, float16 [S, V], None where it gives none."""

    def reset(self, unwritten: float = 0.0) -> None:
        """Zero the states and start at position 0 again.

        Args:
            unwritten: what the key / value caches hold where no token has been, in place of zeros.
        """

    def state(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of a state as it is now."""

    def reserve(self, capacity: int) -> None:
        """Make room for so many positions in all; where there is room already, nothing changes."""


@runtime_checkable
class Backend(Protocol):
    """A target that bundles are written for."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def asset_suffix(self) -> str:
        """File-name suffix of the asset in a bundle, with the dot."""

    @property
    def title(self) -> str:
        """Name of the target, for the card."""

    @property
    def run_instructions(self) -> str:
        """What its assets were checked with, for the card: Markdown that leads up to a `zoo run`."""

    @property
    def extra_files(self) -> Mapping[str, str]:
        """Further files of a bundle, by name: text."""

    @property
    def runtime(self) -> str:
        """What runs its assets on this machine, as the gate names that candidate."""

    @property
    def accumulation(self) -> Literal["half", "single"]:
        """The precision in which `runtime` adds products of half-precision values: what a gate has to allow for."""

    @property
    def traces_quantized(self) -> bool:
        """Whether quantized weights are traced as such; else they take the place of plain ones in lowering."""

    @property
    def version_warnings(self) -> tuple[str, ...]:
        """What the toolchain says of the versions that it finds; recorded in build.json."""

    def require(self, functions: Mapping[str, TraceSpec], quantizations: Collection[QuantizationSpec]) -> None:
        """Refuse what the target cannot hold, before anything is traced.

        Args:
            functions: signature of each function.
            quantizations: every way in which a weight is quantized.

        Raises:
            BadInput: naming it.
        """

    def memory(self, layers: int, functions: int, steps: int) -> int:
        """Bytes of anonymous memory that a build of so many layers takes at its peak, at any width: as measured.

        Args:
            layers: of the decoder.
            functions: of the asset, each with all layers.
            steps: how many times a recurrence stands in a function that reads prompts; see `Prefill.steps`.
        """

    @property
    def versions(self) -> Mapping[str, str]:
        """Distribution name to version of everything that determines the asset's bytes."""

    def trace(
        self,
        modules: Mapping[str, nn.Module],
        functions: Mapping[str, TraceSpec],
        read_transposed: Mapping[str, bool] | None = None,
    ) -> Traced:
        """Trace every function; what can be wrong with a decoder shows here, before a weight is read.

        Args:
            modules: the decoder of each function, its parameters allocated, see `lowering.module.allocate`: plain ones
                unless the backend `traces_quantized`. Parameters of one name are the same weight. They are modified.
            functions: their signatures; the first one decodes.
            read_transposed: of each parameter that is stored plain, whether the weight map says that nothing but its
                transpose is read; None where that is not known.

        Raises:
            PluginError: when a module does not meet the contract, or reads a weight otherwise than the weight map says.
            EnvironmentLacks: when the toolchain is missing or another version.
        """

    def check_integrity(self, asset: Path) -> Check | None:
        """Hold an asset on disk against a checksum of its own; None for a format that has none.

        It is asked before anything else reads the asset: a runtime may end the process when it loads a damaged one.
        """

    def signatures(self, asset: Path) -> Mapping[str, Signature]:
        """Read the signature of each function of a saved asset.

        Raises:
            CheckFailed: when it cannot be read.
        """

    def constants(self, asset: Path) -> Mapping[str, memoryview]:
        """The stored constants of an asset by the names that `Traced.lay_out` was given, as views of the file.

        A constant whose values are all the same, or the same as another's, may be stored otherwise and is not named.

        Raises:
            CheckFailed: when the asset cannot be read.
        """

    def state(
        self, asset: Path, function: str, state: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> Mapping[str, memoryview]:
        """The bytes of weights that a function was written with; views of the file.

        Args:
            asset: the asset.
            function: its name.
            state: shape and logical dtype of each array by its name; see `lowering.module.state_of`.

        Raises:
            CheckFailed: when the asset cannot be read, or holds other constants than these.
        """

    def program(self, asset: Path) -> Program:
        """Read what a saved asset computes, without the bytes of its constants.

        Raises:
            CheckFailed: when it cannot be read.
        """

    def stepper(
        self, asset: Path, functions: Mapping[str, TraceSpec], capacity: int
    ) -> AbstractContextManager[Stepper]:
        """Load an asset to run it on this machine, with room for `capacity` positions.

        Args:
            asset: the asset.
            functions: the signature of each of its functions; the first one decodes.
            capacity: positions.
        """


@runtime_checkable
class Interpreting(Protocol):
    """A backend whose runtime is an interpreter in this process, on a Mac too: slow, every weight in memory."""

    def require_memory(self, asset: Path) -> None:
        """Refuse an asset that the interpreter has no room for, before anything else of a command runs.

        Raises:
            EnvironmentLacks: with the numbers.
        """


def drain(stepper: Stepper, tokens: Sequence[int]) -> Iterator[np.ndarray[Any, Any]]:
    """Step through `tokens` from position 0; the logits after each."""
    stepper.reset()
    for token in tokens:
        yield stepper.step(token)


def prefill_calls(functions: Mapping[str, TraceSpec], tokens: int) -> list[int]:
    """The length of each call of `prefill` by which an engine sends `tokens` tokens; none where it is not there."""
    return prompt_chunks(tokens, min(functions[PREFILL].most_tokens, LARGEST_CHUNK)) if PREFILL in functions else []


def reading_calls(functions: Mapping[str, TraceSpec], tokens: int) -> list[tuple[str, int]]:
    """The calls by which an engine reads a prompt: of each the function and how many tokens it is sent.

    All tokens but the last go to `prefill` where there is such a function; the others are decoded.
    """
    calls = [(PREFILL, length) for length in prefill_calls(functions, tokens - 1)]
    return calls + [(next(iter(functions)), 1)] * (tokens - sum(length for _, length in calls))


def require_room(tokens: int, context: int, hint: str) -> None:
    """Refuse a prompt that leaves no position of a context for an answer.

    Args:
        tokens: of the prompt.
        context: positions that a bundle allows.
        hint: what to type for a larger context.

    Raises:
        BadInput: when there are too many.
    """
    if tokens >= context:
        raise BadInput(
            f"A prompt of {tokens:,} tokens leaves no room for an answer in a context of {context:,}: the longest is "
            f"{context - 1:,}.",
            f"Shorten it, or {hint}.",
        )


def call_prefill(
    stepper: Stepper,
    functions: Mapping[str, TraceSpec],
    tokens: Sequence[int],
    called: Callable[[], None] = lambda: None,
) -> None:
    """Feed tokens at the next positions to the function `prefill`, in the chunks in which an engine sends them.

    Args:
        stepper: an asset that is loaded.
        functions: the signatures of its functions.
        tokens: what to feed.
        called: is called after each call.
    """
    read = 0
    for length in prefill_calls(functions, len(tokens)):
        stepper.call(PREFILL, tokens[read : read + length])
        read += length
        called()


def read_prompt(
    stepper: Stepper,
    functions: Mapping[str, TraceSpec],
    tokens: Sequence[int],
    called: Callable[[], None] = lambda: None,
) -> np.ndarray[Any, Any]:
    """Feed a prompt at the next positions as an engine does; the logits after its last token, float16 [V].

    All tokens but the last go to `prefill` where there is such a function; the others are decoded. Arguments are those
    of `call_prefill`.
    """
    if PREFILL in functions:
        call_prefill(stepper, functions, tokens[:-1], called)
        tokens = tokens[-1:]
    for token in tokens:
        logits = stepper.step(token)
        called()
    return logits


Values = Callable[[Collection[str]], Mapping[str, "Constant"]]
"""Gives the constants of these names with their data."""


@frozen
class Constant:
    """A stored tensor as a backend hands it over: the bytes as they are on disk, and what they mean.

    Attributes:
        data: bytes in memory or a memory map of them; None as long as they are not there.
        shape: logical shape, in elements.
        dtype: logical dtype, for example `float16`, `int8` or `int4` (two to a byte, low half first).
        transposed: whether the last two axes are exchanged, those of `shape` too, against the decoder's parameter.
    """

    data: Any
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False

    @property
    def bytes(self) -> int:
        """Bytes that it takes."""
        return packed_bytes(self.shape, self.dtype)
