"""The Core AI backend: a decoder as an `.aimodel`, which it writes, reads back and runs.

The toolchain's public converter copies every weight into anonymous memory, names constants by a hash that is seeded per
process, and stamps the time of day. This module goes around that with the toolchain's private functions. `_REQUIRED`
pins the versions whose code was read, and tests/test_coreai_backend.py compares the result with the public path.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import io
import json
import logging
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Self

from attrs import evolve, frozen

from coreai_zoo import interruption
from coreai_zoo.backend import Check
from coreai_zoo.backends.coreai.bytecode import Bytecode
from coreai_zoo.backends.native import exit_explained, output_captured
from coreai_zoo.backends.versions import checked_versions
from coreai_zoo.dates import source_date_epoch
from coreai_zoo.digest import file_sha256
from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import CheckFailed
from coreai_zoo.layout import Layout
from coreai_zoo.program import Program
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.signature import Signature, TraceSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import nn
    from torch.export import ExportedProgram

    from coreai_zoo.backend import Constant, Values
    from coreai_zoo.backends.coreai.holes import Holes
    from coreai_zoo.backends.coreai.lowering import State
    from coreai_zoo.lowering.folding import Foldable
    from coreai_zoo.lowering.repetition import Repetition

_log = logging.getLogger(__name__)

_PROGRAM, _HASH, _METADATA = "main.mlirb", "main.hash", "metadata.json"
"""The files of an asset."""

_REQUIRED = MappingProxyType({"coreai-core": "1.0.0b3", "coreai-torch": "0.4.3"})


@frozen
class CoreAIBackend:
    """Writes `.aimodel` assets and runs them on the Core AI runtime (on Linux, its CPU interpreter).

    Attributes:
        every_layer: whether to trace every layer even where layers repeat. Slow; tests compare a copied graph with it.
    """

    name: str = "coreai"
    title: str = "Core AI"
    run_instructions: str = (
        "On Linux, with this zoo and on the CPU interpreter of Core AI, which is slow and for checking:"
    )
    asset_suffix: str = ".aimodel"
    runtime: str = "coreai"
    accumulation: Literal["half", "single"] = "half"
    traces_quantized: bool = False
    version_warnings: tuple[str, ...] = ()
    every_layer: bool = False

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the toolchain, checked."""
        return checked_versions(_REQUIRED)

    @property
    def extra_files(self) -> Mapping[str, str]:
        """See `Backend.extra_files`: none."""
        return {}

    def require(self, functions: Mapping[str, TraceSpec], quantizations: Collection[QuantizationSpec]) -> None:
        """See `Backend.require`: there is nothing known that the format cannot hold."""

    def memory(self, layers: int, functions: int, steps: int) -> int:
        """See `Backend.memory`: 340 MB at 4 layers, 343 at 16, 430 at 64.

        With `prefill` as a loop 543 at 64 layers, in 16 steps 927; 4 steps take less where they are a composite, 573.
        """
        prefill = 20 + layers * (8 * steps + 60) // 25
        return (330 + 8 * layers // 5 + (functions - 1) * prefill) * 2**20

    def trace(
        self,
        modules: Mapping[str, nn.Module],
        functions: Mapping[str, TraceSpec],
        read_transposed: Mapping[str, bool] | None = None,
    ) -> CoreAITraced:
        """See `Backend.trace`."""
        from coreai_zoo.lowering.transposed import stacks_read_transposed

        checked_versions(_REQUIRED)
        with _toolchain():
            whole = _without_outputs_of(modules, functions)
            traced = {
                name: _trace(module, functions[name], every_layer=self.every_layer)
                for name, module in modules.items()
                if name not in whole
            }
            traced = {name: traced.get(name) or evolve(traced[whole[name]], spec=functions[name]) for name in modules}
        for function in traced.values():
            program, _ = function.traced
            parameters = program.graph_signature.inputs_to_parameters
            stacks_read_transposed(program, parameters, read_transposed)
        return CoreAITraced(traced)

    def check_integrity(self, asset: Path) -> Check:
        """See `Backend.check_integrity`: the bytecode against the hash beside it."""
        try:
            return Check("main.hash", True, _require_intact(asset)[:16])
        except (OSError, RuntimeError) as error:
            return Check("main.hash", False, str(error))

    def signatures(self, asset: Path) -> Mapping[str, Signature]:
        """See `Backend.signatures`: from the toolchain's summary."""
        checked_versions(_REQUIRED)
        with _without_weights(asset) as bare:
            summary = bare.summary(include_statistics=False)
            if summary is None or not summary.function_names:
                raise RuntimeError("it has no function")
            described = (summary.function_inputs, summary.function_states, summary.function_outputs)
            return {
                name: Signature(*({tensor: _tensor(text) for tensor, text in of(name)} for of in described))
                for name in summary.function_names
            }

    def constants(self, asset: Path) -> Mapping[str, memoryview]:
        """See `Backend.constants`."""
        with _damage_explained(asset):
            bytecode = _bytecode(asset)
        return {blob.name: bytecode.view(blob) for blob in bytecode.blobs}

    def state(
        self, asset: Path, function: str, state: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> Mapping[str, memoryview]:
        """See `Backend.state`: views of the mapped file, but for what the compiler moved among the operations."""
        checked_versions(_REQUIRED)
        with _toolchain():
            import coreai_torch  # noqa: F401  # before the compiler's dialects, as for lowering

            from coreai_zoo.backends.coreai.constants import read_state

        stored = self.constants(asset)
        with _without_weights(asset) as bare:
            return read_state(bare.program, function, stored, state)

    def program(self, asset: Path) -> Program:
        """See `Backend.program`."""
        from coreai_zoo.backends.coreai.program import read_program

        checked_versions(_REQUIRED)
        with _without_weights(asset) as bare:
            return read_program(bare.program)

    @contextlib.contextmanager
    def stepper(self, asset: Path, functions: Mapping[str, TraceSpec], capacity: int) -> Iterator[CoreAIStepper]:
        """See `Backend.stepper`."""
        checked_versions(_REQUIRED)
        with _Loaded(asset) as loaded:
            yield CoreAIStepper(loaded, functions, capacity)


@contextlib.contextmanager
def _toolchain() -> Iterator[None]:
    """Within the block, the toolchain's warnings and banner do not reach the user's terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        # It compares "2.13.0+cpu" with "2.13.0" and finds the former newer.
        warnings.filterwarnings("ignore", message="coreai-torch has only been validated")
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _take_signals_back() -> None:
    """Have the compiler install its signal handlers now, then put Python's back.

    The compiler installs them when it writes its first file, once in a process. On Ctrl-C they would remove the file
    that is being written, and the writer would abort.
    """
    if threading.current_thread() is threading.main_thread():  # elsewhere nothing can be put back
        _write_first_file()


@functools.cache
def _write_first_file() -> None:
    import coreai.authoring  # noqa: F401  # before the compiler's modules, which import each other in a circle
    from coreai._compiler.ir import Module
    from coreai.authoring.asset import Context, serialize_module_to_odix

    handler = signal.getsignal(signal.SIGINT)
    with temporary_folder() as folder, Context()._mlir_context:
        serialize_module_to_odix(module=Module.parse("module {}"), path=folder / "first.odix")
    if handler is not None:
        signal.signal(signal.SIGINT, handler)


# ---------------------------------------------------------------------------------------------------------------------
# Lowering
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class CoreAITraced:
    """The traced decoder of each function; see `Traced`."""

    functions: Mapping[str, TracedFunction]

    def lay_out(self, constants: Mapping[str, Constant], values: Values) -> Layout:
        """See `Traced.lay_out`: values are asked for of what the compiler can compute with."""
        from coreai_zoo.backends.coreai.constants import stored_constants
        from coreai_zoo.backends.coreai.holes import Holes
        from coreai_zoo.lowering.mistakes import require_read

        with _toolchain():
            whole = self._whole(constants)
            read = {name: constant for each in whole for name, constant in each.weights_read.items()}
            seen = {id(each) for each in read.values()}  # what shares its bytes is one constant
            require_read([name for name, each in constants.items() if id(each) not in seen])
            computed_with = frozenset[str]().union(*(each.foldable.weights for each in whole))
            if computed_with:  # what becomes of them shows before one is read
                trial = stored_constants(_lowered(whole, Holes.of(read).given))
                _require_kept(computed_with - {each.name for each in trial}, whole)
            known = {id(read[name]): constant for name, constant in values(computed_with).items()}
            holes = Holes.of({name: each for name, each in read.items() if id(each) not in known})
            program = _lowered(whole, lambda each: known.get(id(each)) or holes.given(each))
            return _layout(program, holes)

    def lowered(self, constants: Mapping[str, Constant]) -> Program:
        """See `Traced.lowered`. One trace serves every recipe: integers and scales are lowered to the weight traced."""
        from coreai_zoo.backends.coreai.holes import Holes
        from coreai_zoo.backends.coreai.program import read_program

        with _toolchain():
            whole = self._whole(constants)
            named = {
                name: each for function in whole for given in function.state.values() for name, each in given.items()
            }
            return read_program(_lowered(whole, Holes.of(constants).given), named, constants.keys())

    def _whole(self, constants: Mapping[str, Constant]) -> list[WholeFunction]:
        """Every function with all its layers."""
        from coreai_zoo.lowering.folding import foldable

        whole = []
        for name, function in self.functions.items():
            program, composites = function.whole_program()
            state = _named_state(program, constants)
            weights = {placeholder: given for placeholder, given in state.items() if given.keys() <= constants.keys()}
            plain = {placeholder: next(iter(given)) for placeholder, given in weights.items() if len(given) == 1}
            used = {node.name for node in program.graph.find_nodes(op="placeholder") if node.users}
            read = {name: each for at, given in weights.items() if at in used for name, each in given.items()}
            whole.append(WholeFunction(name, function, program, composites, state, read, foldable(program, plain)))
        return whole


@frozen
class WholeFunction:
    """One function with all its layers, and the constants that it is lowered with.

    Attributes:
        name: of the function.
        traced: what it was made from.
        program: its program.
        composites: those that it calls.
        state: what each placeholder of its graph stands for.
        weights_read: the constants that hold weights which an operation reads, by name.
        foldable: what a compiler can compute of it.
    """

    name: str
    traced: TracedFunction
    program: ExportedProgram
    composites: list[Any]
    state: Mapping[str, State]
    weights_read: Mapping[str, Constant]
    foldable: Foldable


def _lowered(whole: Sequence[WholeFunction], given: Callable[[Constant], Constant]) -> Any:
    """The `AIProgram` of all functions; the compiler sees of each constant what is `given` for it."""
    from coreai_zoo.backends.coreai.lowering import Converter
    from coreai_zoo.lowering import mistakes

    converter = Converter()
    with contextlib.ExitStack() as stack:
        for each in whole:
            state = {at: {name: given(constant) for name, constant in of.items()} for at, of in each.state.items()}
            function = each.traced
            converter.add(each.name, each.program, each.composites, state, function.spec, each.foldable.kinds)
            stack.enter_context(mistakes.explained("lowered", function.module, function.program_with_lines))
        program = converter.to_coreai()
    _require_kept(converter.computed(program), whole)
    return program


def _require_kept(gone: Collection[str], whole: Sequence[WholeFunction]) -> None:
    """Refuse weights that the compiler would not store as they are, because it computes with them itself.

    It would take the memory of both, and the names of what it makes differ from process to process.

    Args:
        gone: names of such weights.
        whole: all functions.

    Raises:
        PluginError: with the layer and the line that reads the first.
    """
    from coreai_zoo.lowering.mistakes import computed_with, read_at

    if gone:
        names = [name for each in whole for name in each.weights_read if name in gone]
        places = (read_at(each.traced.program_with_lines(), each.traced.module, names[0]) for each in whole)
        raise computed_with(names, next(filter(None, places), ""))


@frozen
class TracedFunction:
    """The decoder of one function.

    Attributes:
        module: the decoder.
        spec: its signature.
        present: externalization specs of its composites.
        traced: the program traced from all layers or, where they repeat, from the first few, and its composites.
        repetition: how layers repeat; None where all are traced.
    """

    module: nn.Module
    spec: TraceSpec
    present: list[Any]
    traced: tuple[ExportedProgram, list[Any]]
    repetition: Repetition | None = None

    def whole_program(self) -> tuple[ExportedProgram, list[Any]]:
        """The program of all layers, with no more results than its signature has, and its composites."""
        from coreai_zoo.lowering.torch_export import without_code
        from coreai_zoo.lowering.trace import check_traced, without_outputs

        program, composites = self._all_layers()
        if not self.spec.outputs:
            with without_code():
                program = without_outputs(program)
            check_traced(program, self.spec)
        return program, composites

    def program_with_lines(self) -> ExportedProgram:
        """The program of all layers, traced once more, with the lines that operations come from."""
        from coreai_torch import get_decomp_table

        from coreai_zoo.backends.coreai.composites import composites_kept
        from coreai_zoo.lowering.trace import trace

        with composites_kept(self.module, self.present):
            return trace(self.module, self.spec, get_decomp_table())

    def _all_layers(self) -> tuple[ExportedProgram, list[Any]]:
        from coreai_zoo.lowering.extension import extend
        from coreai_zoo.lowering.repetition import short_signature
        from coreai_zoo.lowering.torch_export import without_code
        from coreai_zoo.lowering.trace import check_traced

        if self.repetition is None:
            return self.traced
        short, (program, composites) = short_signature(self.spec, self.repetition), self.traced
        try:
            with interruption.deferred(), without_code():
                program = extend(program, self.module, self.repetition, short, self.spec)
        except Exception as reason:  # noqa: BLE001  # what is really wrong comes up again when all layers are traced
            return _traced_whole(self.module, self.spec, self.present, reason)
        check_traced(program, self.spec)
        return program, composites


def _without_outputs_of(modules: Mapping[str, nn.Module], functions: Mapping[str, TraceSpec]) -> dict[str, str]:
    """Of each function that is another one without its outputs, the name of that: one trace is enough for both."""
    from coreai_zoo.lowering.repetition import alike

    return {
        name: other
        for name, spec in functions.items()
        for other, full in functions.items()
        if full.outputs and spec == evolve(full, outputs=()) and alike(modules[name], modules[other])
    }


def _trace(module: nn.Module, spec: TraceSpec, *, every_layer: bool = False) -> TracedFunction:
    """The decoder `module` traced with its composites kept whole.

    Where layers repeat, the first few are traced and not continued yet: until the weights are there, a deep decoder
    takes no more memory than a shallow one.
    """
    import coreai_torch  # noqa: F401  # before the compiler's dialects, which import each other in a circle otherwise

    from coreai_zoo.backends.coreai.composites import use_toolchain_composites
    from coreai_zoo.lowering.repetition import find_repetition, short_signature, shortened

    present = use_toolchain_composites(module)
    repetition = None if every_layer else find_repetition(module)
    if repetition is not None:
        try:
            short = short_signature(spec, repetition)
            with shortened(module, repetition):
                traced = _traced_with_composites(module, short, present)
            return TracedFunction(module, spec, present, traced, repetition)
        except Exception as reason:  # noqa: BLE001  # as above
            return TracedFunction(module, spec, present, _traced_whole(module, spec, present, reason))
    return TracedFunction(module, spec, present, _traced_with_composites(module, spec, present))


def _traced_whole(
    module: nn.Module, spec: TraceSpec, present: list[Any], reason: Exception
) -> tuple[ExportedProgram, list[Any]]:
    """The program of all layers, where a `reason` keeps the first ones from being continued, and its composites."""
    whole = _traced_with_composites(module, spec, present)
    _log.warning("Every layer is traced, because the first ones cannot be continued: %s", reason)
    return whole


def _traced_with_composites(
    module: nn.Module, spec: TraceSpec, present: list[Any]
) -> tuple[ExportedProgram, list[Any]]:
    from coreai_torch import get_decomp_table

    from coreai_zoo.backends.coreai.composites import composites_kept, export_composites
    from coreai_zoo.backends.coreai.lowering import require_lowered
    from coreai_zoo.lowering.torch_export import without_lines
    from coreai_zoo.lowering.trace import trace

    with composites_kept(module, present):
        with without_lines():
            program = trace(module, spec, get_decomp_table())
        require_lowered(program, module, lambda: trace(module, spec, get_decomp_table()))
        return program, export_composites(module, program)


def _named_state(program: ExportedProgram, constants: Mapping[str, Constant]) -> dict[str, State]:
    """The constants by state name behind each placeholder of the graph that is not an argument.

    A weight that was traced plain and is given quantized is several constants.

    Where two parameters share their bytes, both are called as the first of them, so that these are stored once.

    State that is not stored, such as an overlay's buffers and literals, is small and handed over by name all the same:
    whatever goes the toolchain's own way is named by a hash that differs from process to process.
    """
    from coreai_zoo.names import quantized_names

    signature = program.graph_signature
    tensors = {**dict(program.named_parameters()), **dict(program.named_buffers()), **program.constants}
    placeholders = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    first = {id(constant): name for name, constant in reversed(list(constants.items()))}
    named: dict[str, State] = {}
    for placeholder, name in placeholders.items():
        states = [each for each in (name, *quantized_names(name)) if each in constants]
        found = {first[id(constants[each])]: constants[each] for each in states}
        if not found:
            found[name] = _literal(tensors[name].detach().contiguous())
        named[placeholder] = found
    return named


def _literal(tensor: Any) -> Any:
    """State that is no stored weight, in a dtype that the compiler has; of bfloat16, which NumPy has not, the bits."""
    import torch

    from coreai_zoo.backend import Constant

    narrow = {torch.int64: torch.int32, torch.float64: torch.float32}
    tensor = tensor.to(narrow.get(tensor.dtype, tensor.dtype))
    bits = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
    return Constant(bits.numpy(), tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


# ---------------------------------------------------------------------------------------------------------------------
# Laying out
# ---------------------------------------------------------------------------------------------------------------------


def _layout(program: Any, holes: Holes) -> Layout:
    """What `AIProgram.save_asset` writes, but without its time of day, and with room for the weights."""
    from coreai.authoring.asset import _COREAI_PRODUCER
    from coreai.runtime import _AIModelAsset

    def stamp(fields: Any) -> None:
        fields.creation_date = float(source_date_epoch())
        fields._producer = _COREAI_PRODUCER

    with temporary_folder() as folder:
        path = folder / "with-holes.aimodel"
        path.mkdir()
        asset = _AIModelAsset._create(path=str(path), metadata=None)
        with interruption.deferred():
            _take_signals_back()
            with exit_explained(folder):
                program._save_bytecode(str(asset._program_bytecode_path))
        asset.update_metadata(updates=stamp)
        pieces = holes.laid_out(Bytecode.open(path / _PROGRAM))
        fields = json.loads((path / _METADATA).read_text(encoding="utf-8"))
    # The runtime writes the keys in an order that differs from process to process.
    described = json.dumps(fields, indent=2, sort_keys=True) + "\n"
    return Layout(_PROGRAM, pieces, holes.sizes, {_METADATA: described.encode()}, checksum=_HASH)


# ---------------------------------------------------------------------------------------------------------------------
# Reading and running
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _damage_explained(asset: Path) -> Iterator[None]:
    """Within the block, an exception that shows that `asset` is damaged becomes an error in words."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise CheckFailed(f"{asset} cannot be read: {str(error).strip()[:300]}.", "Build the bundle again.") from error


@contextlib.contextmanager
def _without_weights(asset: Path) -> Iterator[Any]:
    """The toolchain's own view of `asset` without its stored constants, which it would copy into memory.

    Raises:
        CheckFailed: when the asset is damaged, or the block finds that it is.
    """
    from coreai.authoring import AIModelAsset

    with interruption.deferred(), _damage_explained(asset), temporary_folder() as folder:
        bare = folder / asset.name
        bare.mkdir()
        bytecode = _bytecode(asset).without_blobs()
        (bare / _PROGRAM).write_bytes(bytecode)
        (bare / _HASH).write_bytes(hashlib.sha256(bytecode).digest())
        shutil.copyfile(asset / _METADATA, bare / _METADATA)
        with _toolchain(), output_captured():
            yield AIModelAsset.load(str(bare))


_TIMES = " \N{MULTIPLICATION SIGN} "


def _tensor(description: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype from a description such as `NDArray (Float16, 2 x ? x 64)` with times signs; dynamic is -1."""
    match = re.fullmatch(rf"NDArray \((\w+), ([\d?]+(?:{_TIMES}[\d?]+)*)\)", description)
    if match is None:
        raise RuntimeError(f"a tensor is described as {description!r}")
    sizes = tuple(-1 if size == "?" else int(size) for size in match[2].split(_TIMES))
    return sizes, match[1].lower()


class _Loaded:
    """An asset loaded on the runtime, behind a private event loop: the runtime's calls are coroutines."""

    def __init__(self, asset: Path) -> None:
        self._asset = asset
        self._loop = asyncio.new_event_loop()
        self._open = contextlib.AsyncExitStack()
        self._model: Any = None
        self._functions: dict[str, Any] = {}

    def __enter__(self) -> Self:
        from coreai.authoring import AIModelAsset

        try:
            _require_intact(self._asset)
            with interruption.deferred(), _toolchain(), output_captured():
                _take_signals_back()
                self._model = self._loop.run_until_complete(
                    self._open.enter_async_context(AIModelAsset.load(str(self._asset)).executable())
                )
        except BaseException as error:
            self.__exit__()
            if not isinstance(error, (RuntimeError, KeyError, OSError)):
                raise
            raise CheckFailed(
                f"{self._asset} cannot be loaded on the Core AI runtime: {str(error).strip()[:300]}.",
                "Build the bundle again.",
            ) from error
        return self

    def __exit__(self, *exc: object) -> None:
        self._functions.clear()
        self._model = None
        with interruption.deferred():
            self._loop.run_until_complete(self._open.aclose())
            self._loop.close()

    def run(self, name: str, *arguments: Any) -> Any:
        """The outputs of the function called `name` for `arguments`; Ctrl-C waits for them."""
        function = self._function(name)
        with interruption.deferred():
            return self._loop.run_until_complete(function(*arguments))

    def _function(self, name: str) -> Any:
        """The function called `name`, loaded when it is first asked for.

        Raises:
            CheckFailed: when the asset has none.
        """
        if name not in self._functions:
            try:
                with interruption.deferred(), output_captured():  # it announces itself
                    self._functions[name] = self._model.load_function(name)
            except (RuntimeError, KeyError) as error:
                raise CheckFailed(f"{self._asset} has no function {name!r}.", "Build the bundle again.") from error
        return self._functions[name]


def _require_intact(asset: Path) -> str:
    """Compare the bytecode with its hash before the toolchain sees it, which ends the process where it cannot parse.

    Returns:
        The hash, hexadecimal.

    Raises:
        OSError: when a file is missing.
        RuntimeError: when the bytecode is not what was written.
    """
    digest = file_sha256(asset / _PROGRAM)
    if bytes.fromhex(digest) != (asset / _HASH).read_bytes():
        raise RuntimeError("main.mlirb is not what main.hash says")
    return digest


def _bytecode(asset: Path) -> Bytecode:
    """The bytecode of an asset, mapped, if it is what was written; raises as `_require_intact` does, and ValueError."""
    _require_intact(asset)
    return Bytecode.open(asset / _PROGRAM)


class CoreAIStepper:
    """Steps a loaded asset; see `Stepper`."""

    def __init__(self, loaded: _Loaded, functions: Mapping[str, TraceSpec], capacity: int) -> None:
        self._loaded, self._functions, self._capacity = loaded, functions, capacity
        self._decode = next(iter(functions))
        self.reset()

    def reset(self, unwritten: float = 0.0) -> None:
        """See `Stepper.reset`."""
        import numpy as np
        from coreai.runtime import NDArray

        self._position = 0
        self._states = {
            state.name: NDArray(
                np.full(
                    [self._capacity if isinstance(size, str) else size for size in state.shape],
                    unwritten if state.kind == "kv_cache" else 0,
                    state.dtype,
                )
            )
            for state in self._functions[self._decode].states
        }

    def step(self, token: int) -> np.ndarray[Any, Any]:
        """Feed one token; the logits, float16 [V].

        Raises:
            CheckFailed: when the context that the stepper was made for is full.
        """
        logits = self.call(self._decode, [token])
        assert logits is not None  # the function that decodes gives them
        return logits[-1]

    def call(self, function: str, tokens: Sequence[int]) -> np.ndarray[Any, Any] | None:
        """Feed tokens to a function; the logits, float16 [S, V], None where it gives none.

        Raises:
            CheckFailed: when the context that the stepper was made for is full.
        """
        import numpy as np
        from coreai.runtime import NDArray

        if self._position + len(tokens) > self._capacity:
            raise CheckFailed(f"The context of {self._capacity} positions is full.")
        spec = self._functions[function]
        values = spec.step(tokens, self._position)
        inputs = {tensor.name: NDArray(np.array([values[tensor.name]], tensor.dtype)) for tensor in spec.inputs}
        outputs = self._loaded.run(function, inputs, self._states)
        self._position += len(tokens)
        return np.array(outputs[spec.outputs[0].name].numpy()[0]) if spec.outputs else None

    def state(self, name: str) -> np.ndarray[Any, Any]:
        """A copy of a state as it is now."""
        return self._states[name].numpy().copy()

    def reserve(self, capacity: int) -> None:
        """See `Stepper.reserve`: what a state grows by holds zeros."""
        if capacity <= self._capacity:
            return
        from coreai.runtime import NDArray

        held = {state.name: self.state(state.name) for state in self._functions[self._decode].states}
        position, self._capacity = self._position, capacity
        self.reset()
        for name, before in held.items():
            grown = self.state(name)
            grown[tuple(map(slice, before.shape))] = before
            self._states[name] = NDArray(grown)
        self._position = position
