"""docs/architecture.md says how the code stands, and the code stands so."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import grimp
import pytest
from attrs import frozen

import coreai_zoo
from documents import blocks, read, sections

PAGE = sections(read("architecture.md"))
HOST = Path(coreai_zoo.__file__).parent
PACKAGES = ("coreai_zoo", "coreai_zoo_qwen36", "coreai_zoo_overlays")


def layers() -> list[list[str]]:
    """The floors of the house from the top, each with its rooms and modules: the list that import-linter holds."""
    project = tomllib.loads((HOST.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (each for each in project["tool"]["importlinter"]["contracts"] if each["id"] == "layers")
    return [layer.split(" | ") for layer in contract["layers"]]


FLOORS = {name: floor for floor, names in enumerate(layers()) for name in names}
FOLDERS = {path.parent.name for path in HOST.glob("*/__init__.py")}


def room(module: str) -> str:
    """The folder or top-level module that a module is in: `build` for `build.design`."""
    return module.removeprefix("coreai_zoo.").partition(".")[0]


# ---------------------------------------------------------------------------------------------------------------------
# Rooms
# ---------------------------------------------------------------------------------------------------------------------

ROOMS: Mapping[str, str] = dict(re.findall(r"^\*\*`(\w+)/`\*\*((?:.+\n)+)", PAGE["The rooms"], re.MULTILINE))


def test_the_page_has_one_paragraph_a_room_from_the_top_down() -> None:
    in_order = [name for names in layers() for name in names if name in FOLDERS]

    assert list(ROOMS) == in_order
    assert set(in_order) == FOLDERS


@pytest.mark.parametrize("name", ROOMS)
def test_the_modules_that_a_paragraph_names_are_in_the_room(name: str) -> None:
    named = re.findall(r"`(\w+\.py)`", ROOMS[name])

    assert [module for module in named if not (HOST / name / module).is_file()] == []
    assert named or (name == "backends")


def test_every_module_of_the_top_level_is_named_where_it_stands() -> None:
    modules = {path.stem for path in HOST.glob("[!_]*.py")}
    (rows,) = re.findall(r"^\| modules \|.*\n\|.*\n((?:\|.*\n)+)", PAGE["The top level"], re.MULTILINE)
    named = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in rows.splitlines()]

    assert sorted(name for row in named for name in row) == sorted(modules)
    assert modules | FOLDERS == set(FLOORS) - {"__main__"}


# ---------------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def imports() -> grimp.ImportGraph:
    """Who imports whom, imports for types and inside of functions included."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def circle(graph: grimp.ImportGraph, name_of: Callable[[str], str]) -> list[str]:
    """A circle among modules that are called by `name_of`, or nothing."""
    arrows: dict[str, set[str]] = {}
    for module in graph.modules:
        imported = {name_of(other) for other in graph.find_modules_directly_imported_by(module)}
        arrows.setdefault(name_of(module), set()).update(imported - {name_of(module)})
    try:
        graphlib.TopologicalSorter(arrows).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def itself(module: str) -> str:
    return module


def its_room(module: str) -> str:
    """`coreai_zoo.build` for `coreai_zoo.build.design`; of the overlays, each is a room."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("name_of", [itself, its_room])
def test_no_imports_go_in_a_circle(name_of: Callable[[str], str]) -> None:
    assert circle(imports(), name_of) == []


@pytest.mark.parametrize(
    ("importer", "imported", "circles"),
    [
        ("coreai_zoo.checkpoint.hub", "coreai_zoo.weights.store", [its_room]),
        ("coreai_zoo.weights.formats", "coreai_zoo.weights.store", [itself]),
        ("coreai_zoo.errors", "coreai_zoo.cli.app", [itself, its_room]),
    ],
)
def test_a_circle_is_found(importer: str, imported: str, circles: list[Callable[[str], str]]) -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    graph.add_import(importer=importer, imported=imported)

    for name_of in (itself, its_room):
        found = circle(graph, name_of)
        assert ({name_of(importer), name_of(imported)} <= set(found)) if name_of in circles else not found


# ---------------------------------------------------------------------------------------------------------------------
# The walk of a build, on the code
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Step:
    """A line of the walk: a function, and the one that it is indented under; both `module.function`."""

    caller: str | None
    callee: str


def walk() -> list[Step]:
    """The page's walk, from the top."""
    (block,) = blocks(PAGE["The walk of a build"])
    steps: list[Step] = []
    above: list[tuple[int, str]] = []
    for line in block.text.splitlines():
        name = line.split()[0]
        indent = len(line) - len(line.lstrip())
        while above and above[-1][0] >= indent:
            above.pop()
        steps.append(Step(above[-1][1] if above else None, name))
        above.append((indent, name))
    return steps


def split(function: str) -> tuple[str, str]:
    """The module and the name in it: `weights.store` and `WeightStore.fill`."""
    parts = function.split(".")
    length = next(at for at in range(len(parts), 0, -1) if HOST.joinpath(*parts[:at]).with_suffix(".py").is_file())
    return ".".join(parts[:length]), ".".join(parts[length:])


@frozen
class Source:
    """A module of the host as text.

    Attributes:
        functions: every function and method by name, classes too.
        imported: what a name means that was imported from the host: `module.name`, or a module.
    """

    functions: Mapping[str, ast.AST]
    imported: Mapping[str, str]

    @classmethod
    @functools.cache
    def of(cls, module: str) -> Source:
        tree = ast.parse(HOST.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))
        functions: dict[str, ast.AST] = {}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                functions[node.name] = node
            if isinstance(node, ast.ClassDef):
                methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
                functions |= {f"{node.name}.{method.name}": method for method in methods}
        imported = {
            alias.asname or alias.name: f"{node.module}.{alias.name}".removeprefix("coreai_zoo.")
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("coreai_zoo")
            for alias in node.names
        }
        return cls(functions, imported)

    def said_in(self, name: str) -> set[str]:
        """What a function says, in itself and in what it uses of its own module: imported names with their module,
        attributes as `.attribute`.
        """
        said: set[str] = set()
        todo, done = [name], set()
        while todo:
            if (current := todo.pop()) in done or current not in self.functions:
                continue
            done.add(current)
            body = self.functions[current]
            if isinstance(body, ast.ClassDef):  # a class that is made; its methods count where they are called
                continue
            for node in ast.walk(body):
                if isinstance(node, ast.Name):
                    said.add(self.imported.get(node.id, ""))
                    todo.append(node.id)
                elif isinstance(node, ast.Attribute):
                    said.add(f".{node.attr}")
                    if isinstance(node.value, ast.Name) and node.value.id in self.imported:
                        said.add(f"{self.imported[node.value.id]}.{node.attr}")
                    todo += [method for method in self.functions if method.endswith(f".{node.attr}")]
        return said - {""}


def members(protocols: Iterable[str]) -> set[str]:
    """Names of what the protocols of `backend` have."""
    names = Source.of("backend").functions
    return {name.partition(".")[2] for name in names if name.partition(".")[0] in protocols}


def is_called(step: Step) -> bool:
    """Whether the caller, or a helper in its module, uses the callee.

    A method counts where an attribute is called so and the caller's module imports the class's module; of a backend,
    which nobody imports, where the caller's module imports the protocols and these have such a member.
    """
    assert step.caller is not None
    (module, function), (target, name) = split(step.caller), split(step.callee)
    source = Source.of(module)
    said = source.said_in(function)
    if step.callee in said or (module == target and f".{name.rpartition('.')[2]}" in said):
        return True
    owner, _, method = name.partition(".")
    known = {split(each)[0] for each in source.imported.values() if each.partition(".")[0] in FLOORS}
    protocol = "backend" in known and target.startswith("backends.") and method in members(("Backend", "Traced"))
    return bool(owner and method) and f".{method}" in said and (target in known or protocol)


@pytest.mark.parametrize("step", walk(), ids=lambda step: step.callee)
def test_every_step_of_the_walk_is_a_call_that_goes_down(step: Step) -> None:
    module, name = split(step.callee)

    assert name in Source.of(module).functions
    if step.caller is not None:
        assert is_called(step)
        assert FLOORS[room(step.caller)] <= FLOORS[room(step.callee)]


@pytest.mark.parametrize(
    ("caller", "callee"),
    [
        ("build.pipeline.build", "weights.plan.plan_weights"),  # design's business
        ("build.design.design", "weights.store.WeightStore.fill"),
        ("weights.store.WeightStore.fill", "backends.coreai.backend.CoreAIBackend.trace"),
        ("bundle.verify.verify", "checkpoint.portable_tokenizer.copy_tokenizer"),
    ],
)
def test_a_step_that_nobody_takes_is_noticed(caller: str, callee: str) -> None:
    assert not is_called(Step(caller, callee))


def entered(start: str) -> Iterator[tuple[str, str]]:
    """Every call from one room into another on the way of a function, as far as the code names whom it calls."""
    todo, done = [start], set()
    while todo:
        if (function := todo.pop()) in done:
            continue
        done.add(function)
        module, name = split(function)
        for callee in Source.of(module).said_in(name):
            if callee.startswith(".") or room(callee) not in FLOORS:
                continue
            target = split(callee)
            if target[1] in Source.of(target[0]).functions:
                todo.append(callee)
                if room(callee) != room(function):
                    yield function, callee


def test_a_build_enters_the_rooms_of_the_walk_and_no_other_each_from_above() -> None:
    start = walk()[0].callee
    calls = list(entered(start))

    assert [call for call in calls if FLOORS[room(call[0])] >= FLOORS[room(call[1])]] == []
    # Backends are asked by the protocol, so that no call names them.
    assert {room(start), "backends"} | {room(callee) for _, callee in calls} & FOLDERS == {
        room(step.callee) for step in walk()
    }
