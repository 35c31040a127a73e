"""Mistakes in an overlay, each told in one paragraph: the layer, the line of source, and what torch said.

torch prints hundreds of lines, most of them its own frames. What an author needs is the line of the overlay that was
running, and the layer that it ran for.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import linecache
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from attrs import evolve, frozen
from torch import nn

from coreai_zoo.errors import PluginError, ZooError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# Packages that an author does not mend, told apart by folder: `coreai_zoo_overlays` is not in `coreai_zoo`.
_PACKAGES = ("coreai_zoo", "torch", "coreai", "coreai_torch", "coreai_opt", "coremltools", "sympy", "numpy")
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
        return f"{self.file}:{self.line}, `{linecache.getline(self.file, self.line).strip()}`"

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
    except Exception as error:
        place = _raised_at(error, module)
        if place is None and program is not None:
            place = _traced_from(str(error), program(), module)
        if place is None:
            sys.stderr.write(said.getvalue())
            raise
        if inside and place.layer is not None:
            place = evolve(place, layer=f"{inside}.{place.layer}".removesuffix("."))
        raise PluginError(f"The decoder cannot be {doing}: {place.owner} fails at {place}. {brief(error)}") from error
    sys.stderr.write(said.getvalue())


@contextlib.contextmanager
def located() -> Iterator[None]:
    """Within the block, a PluginError that another exception caused names the line of the plugin."""
    try:
        yield
    except PluginError as error:
        place = None if error.__cause__ is None else _raised_at(error.__cause__)
        if place is not None:
            error.add_note(f"At {place}.")
        raise


def require_arguments(module: nn.Module, names: Sequence[str]) -> None:
    """Refuse a decoder whose `forward` does not take the inputs and states of its contract.

    Raises:
        PluginError: with the line that defines it.
    """
    try:
        inspect.signature(module.forward).bind(*names)
    except TypeError as error:
        code = inspect.unwrap(type(module).forward).__code__
        place = _Place(code.co_filename, code.co_firstlineno, "")
        raise PluginError(
            f"The decoder cannot be called with the inputs and states of its contract, {', '.join(names)}: its forward "
            f"is defined at {place}. {brief(error)}"
        ) from error


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
            if _is_overlay(frame.f_code.co_filename):
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


def _traced_from(said: str, program: ExportedProgram, module: nn.Module) -> _Place | None:
    """The line of the overlay that the operation named in `said` was traced from."""
    words, names = set(re.findall(r"[\w.]*\w", said)), set(re.findall(r"\bnode (\w+)", said))
    named = [node for node in program.graph.nodes if str(node.target) in words or node.name in names]
    for node in named:
        stack = re.findall(r'File "(.+?)", line (\d+)', node.meta.get("stack_trace") or "")
        for file, line in reversed(stack):
            if _is_overlay(file):
                modules = list((node.meta.get("nn_module_stack") or {}).values())
                return _Place(file, int(line), _path_in(module, str(modules[-1][0])) if modules else None)
    return None


def _path_in(module: nn.Module, traced: str) -> str:
    """The path in `module` of the layer at `traced` in the traced module, which may be `module` or hold it."""
    paths = dict(module.named_modules())
    while traced not in paths:
        traced = traced.partition(".")[2]
    return traced


def _is_overlay(file: str) -> bool:
    if file.startswith("<"):  # made by a program
        return False
    path = Path(file)
    stdlib = Path(sysconfig.get_path("stdlib"))
    if stdlib in path.parents and "site-packages" not in path.parts:
        return False
    homes = (getattr(sys.modules.get(name), "__file__", None) for name in _PACKAGES)
    return not any(Path(home).parent in path.parents for home in homes if home)
