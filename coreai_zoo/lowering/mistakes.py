"""Mistakes in an overlay, each told in one paragraph: the layer, the line of source, and what torch said.

torch prints hundreds of lines, most of them its own frames. What an author needs is the line of the overlay that was
running, and the layer that it ran for.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from attrs import evolve, frozen
from torch import fx, nn
from torch.export.graph_signature import OutputKind, TensorArgument

from coreai_zoo.errors import PluginError, ZooError, listing
from coreai_zoo.names import parameter_of
from coreai_zoo.tracebacks import is_plugins, source_line

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_SHOWN = 4  # parameters
_LONGEST = 300  # characters of what torch said


@frozen
class _Place:
    """A line of an overlay, and the layer that it ran for.

    Attributes:
        file: path of the source file.
        line: number of the line.
        layer: path of the layer in the decoder; empty for the decoder itself, None where it is not known.
    """

    file: str
    line: int
    layer: str | None

    def __str__(self) -> str:
        return source_line(self.file, self.line)

    @property
    def owner(self) -> str:
        """The layer in words."""
        return f"layer {self.layer}" if self.layer else "the decoder"


@contextlib.contextmanager
def explained(
    doing: str, module: nn.Module, program: Callable[[], ExportedProgram] | None = None, inside: str = ""
) -> Iterator[None]:
    """Within the block, an exception that comes from a line of the overlay becomes one paragraph that names the line.

    Args:
        doing: what happens to the decoder in the block, for example `traced`.
        module: the decoder.
        program: makes the traced program, its operations with their lines, where the block converts one: an error that
            names one of them is told with the line that it was traced from.
        inside: path of `module` in the decoder, where it is a layer of that.

    Raises:
        PluginError: with the layer, the line and the error. An exception that comes from no line of an overlay is a
            fault of the host or of the toolchain, and is raised as it is.
    """
    said = io.StringIO()
    try:
        with _stderr_in(said):
            yield
    except ZooError:
        raise
    except (Exception, SystemExit) as error:
        place = _raised_at(error, module)
        if place is None and program is not None:
            place = _traced_from(error, program(), module)
        if place is None:
            sys.stderr.write(said.getvalue())
            raise
        if inside and place.layer is not None:
            place = evolve(place, layer=f"{inside}.{place.layer}".removesuffix("."))
        raise PluginError(f"The decoder cannot be {doing}: {place.owner} fails at {place}. {brief(error)}") from error
    sys.stderr.write(said.getvalue())


def require_arguments(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse a decoder whose `forward` does not take the inputs and states of its contract.

    Raises:
        PluginError: with the line that defines it.
    """
    signature, said = inspect.signature(module.forward), ""
    try:
        signature.bind(*names)
    except TypeError as error:
        said = brief(error)
    gathers = [each.name for each in signature.parameters.values() if each.kind is each.VAR_POSITIONAL]
    if gathers:
        said = f"It takes them as *{gathers[0]}; torch.export asks for a name for each."
    if said:
        raise PluginError(
            f"The decoder cannot be called with the inputs and states of its contract, {', '.join(names)}: its forward "
            f"is defined at {_forward_of(module)}. {said}"
        )


def require_results(program: ExportedProgram, module: nn.Module, names: Sequence[str]) -> None:
    """Refuse a traced decoder whose `forward` gives other results than its contract's outputs, or no tensors.

    Args:
        program: what was traced.
        module: the decoder.
        names: of the outputs; none of a function that gives nothing, whose decoder gives logits all the same.

    Raises:
        PluginError: with the line that defines it.
    """
    given = [kind for kind in program.graph_signature.output_specs if kind.kind is OutputKind.USER_OUTPUT]
    wanted = list(names) or ["logits"]
    if len(given) == len(wanted) and all(isinstance(each.arg, TensorArgument) for each in given):
        return
    kinds = ["a tensor" if isinstance(each.arg, TensorArgument) else _plain(each.arg) for each in given]
    raise PluginError(
        f"The decoder gives {' and '.join(kinds) or 'nothing'}, and its contract asks for {listing(wanted)} "
        f"alone: its forward is defined at {_forward_of(module)}.",
        "States are written in place, and not given back.",
    )


def _forward_of(module: nn.Module) -> _Place:
    code = inspect.unwrap(type(module).forward).__code__
    return _Place(code.co_filename, code.co_firstlineno, "")


def _plain(argument: object) -> str:
    return repr(getattr(argument, "value", argument))


def require_read(unread: Iterable[str]) -> None:
    """Refuse parameters that a decoder never uses: no asset would hold them.

    Args:
        unread: names of weights that no operation of any function reads, as in the state of a decoder.

    Raises:
        PluginError: naming the parameters.
    """
    if names := dict.fromkeys(parameter_of(name)[0] for name in unread):
        raise PluginError(
            f"The decoder never uses {listing([*names], _SHOWN)}.",
            "Use them in `forward`, or have neither such parameters nor rules for them in the weight map.",
        )


def computed_with(weights: Sequence[str], place: str) -> PluginError:
    """The error about weights that a compiler would not store as they are, because it computes with them itself.

    Args:
        weights: their names, the first as the example.
        place: where that is read, see `read_at`.
    """
    names = dict.fromkeys(parameter_of(name)[0] for name in weights)
    return PluginError(
        f"The decoder computes with {listing([*names], _SHOWN)} before there is a token{place}: the compiler would "
        "store what it makes of that.",
        "What does not depend on a token belongs in the weight map, as a Transform of the weight.",
    )


def read_at(program: ExportedProgram, module: nn.Module, parameter: str) -> str:
    """Where a decoder uses a parameter first, as ` at ...` for the end of a sentence; empty where that is not known.

    Args:
        program: the traced program, its operations with their lines.
        module: the decoder.
        parameter: its name.
    """
    parameters = program.graph_signature.inputs_to_parameters
    for node in program.graph.find_nodes(op="placeholder"):
        name = parameters.get(node.name, "")
        if name == parameter or name.endswith(f".{parameter}"):
            # First those that read nothing but parameters.
            users = sorted(
                node.users, key=lambda user: any(each.name not in parameters for each in user.all_input_nodes)
            )
            place = next(filter(None, (_line_of(user, module) for user in users)), None)
            return "" if place is None else f" in {place.owner} at {place}"
    return ""


def brief(error: BaseException) -> str:
    """The type of an exception and the first paragraph of its message, on one line."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    first = " ".join(lines[: lines.index("")] if "" in lines else lines)
    text = f"{type(error).__name__}: {' '.join(first.split())}".removesuffix(": ").removesuffix(".")
    return f"{text[:_LONGEST]}." if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


@contextlib.contextmanager
def _stderr_in(said: TextIO) -> Iterator[None]:
    """Within the block, everything that is printed on stderr or logged by torch goes to `said`."""
    torchs = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "torch"]
    handlers = {handler for name in torchs for handler in logging.getLogger(name).handlers}
    with contextlib.redirect_stderr(said), contextlib.ExitStack() as stack:
        for handler in handlers:
            if type(handler) is logging.StreamHandler:  # it holds the stderr that there was when it was made
                stack.callback(handler.setStream, handler.stream)
                handler.setStream(said)
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Where
# ---------------------------------------------------------------------------------------------------------------------


def _raised_at(error: BaseException, module: nn.Module | None = None) -> _Place | None:
    """The innermost line of an overlay in the traceback of `error`, or of what it was raised from."""
    seen: BaseException | None = error
    while seen is not None:
        frames = list(traceback.walk_tb(seen.__traceback__))
        while frames:
            frame, line = frames[-1]
            if is_plugins(frame.f_code.co_filename):
                return _Place(frame.f_code.co_filename, line, _layer([frame for frame, _ in frames], module))
            frames.pop()
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return None


def _layer(frames: Sequence[FrameType], module: nn.Module | None) -> str | None:
    """The path in `module` of the innermost layer that one of `frames` is a method of."""
    # What runs while torch traces may be a proxy of a layer, which shares its attributes.
    paths = {} if module is None else {id(vars(child)): path for path, child in module.named_modules()}
    for frame in reversed(frames):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(vars(owner)) in paths:
            return paths[id(vars(owner))]
    return None


def _traced_from(error: BaseException, program: ExportedProgram, module: nn.Module) -> _Place | None:
    """The line of the overlay of the operation that `error` names, or that was converted when it was raised."""
    said = str(error)
    words, names = set(re.findall(r"[\w.]*\w", said)), set(re.findall(r"\bnode (\w+)", said))
    named = [node for node in program.graph.nodes if str(node.target) in words or node.name in names]
    held = [frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__)]
    converted = {node.name for node in held if isinstance(node, fx.Node)}
    named += [node for node in program.graph.nodes if node.name in converted]
    return next(filter(None, (_line_of(node, module) for node in named)), None)


def _line_of(node: fx.Node, module: nn.Module) -> _Place | None:
    """The line of the overlay that an operation was traced from."""
    stack = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
    for file, line in reversed(stack):
        if is_plugins(file):
            modules = list((node.meta.get("nn_module_stack") or {}).values())
            return _Place(file, int(line), _path_in(module, str(modules[-1][0])) if modules else None)
    return None


def _path_in(module: nn.Module, traced: str) -> str:
    """The path in `module` of the layer at `traced` in the traced module, which may be `module` or hold it."""
    paths = dict(module.named_modules())
    while traced not in paths:
        traced = traced.partition(".")[2]
    return traced
