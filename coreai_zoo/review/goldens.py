"""Golden graphs: operation counts in readable files, so that a change of an overlay shows up in review.

There is one TOML file per entry, with a table per kind of layer. A count that depends on the recipe is a table by
recipe. The graphs of another contract than the entry's have a file of their own, under the entry's recipe alone: how
weights are stored changes nothing about how tokens are read.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from coreai_zoo.build.design import design
from coreai_zoo.build.record import describe
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.catalogue import load_entries
from coreai_zoo.entry import Entry
from coreai_zoo.errors import BadInput, ZooError, listing
from coreai_zoo.lowering.graph import Graph
from coreai_zoo.lowering.wiring import Wiring, unnamed
from coreai_zoo.plugins import Plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.review import structure
from coreai_zoo.review.revision import is_source

DEFAULT_FOLDER = Path("tests/goldens")

Golden = dict[str, Any]

_WHY = {
    "layers": "how many layers are of this kind",
    "operations": "all of them together: a first look at whether anything changed",
    "blockwise_shift_scale": "one for each quantized matrix: fewer, and a weight lost its quantization",
    "batch_matmul": "matrix products: each reads its weight once, which is what decoding takes its time for",
    "gather_mm": "products with the chosen experts only: were they batch_matmul, every expert would be read",
    "rms_norm": "a composite that device kernels look for: fewer, and a norm runs as single operations",
    "scaled_dot_product_attention": "a composite that device kernels look for: none, and attention is not fused",
    "gated_delta_update": "a composite that device kernels look for: none, and the loop is one of single operations",
    "sort": "the router's choice; one for each router",
    "argsort": "the router's choice; one for each router",
    "softmax": "over all experts, in the router; attention's is inside its composite",
    "cast": "changes of precision: one more costs time, one less may cost accuracy",
    "transpose": "free on a weight, which is laid out once; on an activation it moves data",
    "reshape": "free in most places; more of them hint at shapes that do not fit together",
    "concat": "moves data; outside of the layers it gathers the new states, each written once and whole",
    "slice": "takes a layer's slot of a state, or a part of a tensor",
    "slice_update": "writes the new keys and values to a layer's slot",
    "split": "takes heads, gates or halves apart",
    "where": "a choice per element; also how a slot is put back into a state",
    "read_handle": "reads of whole states: more than one a state and write costs its size in traffic",
    "write_handle": "one for each state: chained writes of a state were dropped by one delegate",
    "gather_nd": "the embedding: one row is read, not the table",
    "exp": "decays, which are computed in float32",
    "log": "of the softplus of a decay, in float32",
}
_GONE = "Remove the file, or have `entry` in it name the entry as it is called now."
_WRITE = "Write it with `zoo check --only goldens --update-goldens`."
_OTHERWISE = "arithmetic"
_OF_AN_OVERLAY = "a composite of the overlay's own: one graph, which these call"

_DIGESTS = "digests"
_LINES = "lines of "
_VARIANT = " from layer "
_OPERATION = re.compile(r"[({]")  # behind the name of an operation

_HEAD = """\
# Operation counts of {name}{contract}, per kind of layer, as the toolchain lowers it at its true sizes.
# Constants do not count. Of experts there are fewer: how many has no influence.
# `digests` are of what these operations say and how they are connected, `lines of ...` the same to read: an operation,
# what it reads and what it makes, and how often. `below` is the layer before, `slot` the layer's own in a state.
# A table in place of a number is by recipe. Written by `zoo check --update-goldens`; a change of a number belongs into
# the same commit as what changed it, and its reason into the message.
"""


def take(
    entry: Entry, plugins: Plugins, on_recipe: Callable[[str], None] = lambda _: None, contract: str | None = None
) -> Golden:
    """The golden graph of an entry, its operations counted under every shipped recipe and its own.

    Args:
        entry: the entry.
        plugins: what is installed.
        on_recipe: called with what has been counted.
        contract: name of another contract than the entry's; its operations are counted under the entry's recipe.
    """
    graphs: dict[str, Mapping[str, Graph]] = {}
    recipes = [*dict.fromkeys((*RECIPES, entry.recipe))] if contract is None else [entry.recipe]
    for recipe, by_function in structure.graphs(entry, plugins, recipes, contract):
        graphs[recipe] = by_function
        on_recipe(f"{entry.name}{f' {contract}' if contract else ''} as {recipe}")
    return golden(entry, graphs, contract)


def golden(entry: Entry, graphs: Mapping[str, Mapping[str, Graph]], contract: str | None = None) -> Golden:
    """The golden graph of an entry from its graphs, by recipe and function; of another `contract` if one is given."""
    tables: dict[str, dict[str, dict[str, int | str]]] = {}
    for recipe, by_function in graphs.items():
        for function, graph in by_function.items():
            prefix = f"{function}: " if len(by_function) > 1 else ""
            for table, counts in _tables(graph).items():
                for name, count in counts.items():
                    tables.setdefault(prefix + table, {}).setdefault(name, {})[recipe] = count
    made: Golden = {"entry": entry.name, "ffn": entry.facts.ffn} | ({"contract": contract} if contract else {})
    for table, rows in tables.items():
        made[table] = {name: _folded(by_recipe, [*graphs]) for name, by_recipe in rows.items()}
    return made


def _tables(graph: Graph) -> dict[str, dict[str, int | str]]:
    """Counts, digests and lines by table: one per kind of layer, one for everything else, then the lines of each."""
    tables: dict[str, dict[str, int | str]] = {}
    wirings: dict[str, Wiring] = {}
    for kind in graph.kinds:
        name = kind.name
        if name in tables:  # layers that are not quite like the others of their kind
            name = f"{kind.name}{_VARIANT}{kind.layers[0]}"
        tables[name] = {"layers": len(kind.layers), "operations": sum(kind.operations.values()), **kind.operations}
        wirings[name] = kind.wiring
    tables["outside"] = {"operations": sum(graph.outside.values()), **graph.outside}
    wirings["outside"] = graph.wiring
    tables["all"] = {"operations": sum(graph.total.values())}
    tables["composites"] = {name: len(sizes) for name, sizes in graph.composites.items()}
    wirings |= {f"composite {name}": wiring for name, wiring in graph.composite_wiring.items()}
    digests: dict[str, int | str] = {name: wiring.digest for name, wiring in wirings.items() if wiring.digest}
    return {**tables, _DIGESTS: digests, **_line_tables(wirings)} if digests else tables


def _line_tables(wirings: Mapping[str, Wiring]) -> dict[str, dict[str, int | str]]:
    """The lines of each; of layers that are not quite like the others of their kind, those that are not the same."""
    tables: dict[str, dict[str, int | str]] = {}
    for name, wiring in wirings.items():
        kind, variant, _ = name.partition(_VARIANT)
        others = wirings[kind].lines if variant else {}
        lines = {line: wiring.lines.get(line, 0) for line in sorted({*wiring.lines, *others})}
        tables[_LINES + name] = {line: count for line, count in lines.items() if count != others.get(line, 0)}
    return tables


def _folded(by_recipe: Mapping[str, int | str], recipes: Sequence[str]) -> int | str | dict[str, int | str]:
    """One number or digest where all recipes agree."""
    values = {recipe: by_recipe.get(recipe, 0) for recipe in recipes}
    return values if len(set(values.values())) > 1 else next(iter(values.values()))


def of_recipe(golden: Golden, recipe: str) -> Golden:
    """The part of a golden graph that is of one recipe, without what that one does not have."""
    chosen: Golden = {}
    for table, rows in golden.items():
        if isinstance(rows, Mapping):
            counts = {name: row[recipe] if isinstance(row, Mapping) else row for name, row in rows.items()}
            chosen[table] = {name: count for name, count in counts.items() if count}
        else:
            chosen[table] = rows
    return chosen


def counts_of(golden: Golden) -> Golden:
    """The golden graph without digests and lines."""
    return {table: rows for table, rows in golden.items() if not _is_of_wiring(table)}


def _is_of_wiring(table: str) -> bool:
    return table.endswith(_DIGESTS) or _LINES in table


def compare(golden: Golden, found: Golden) -> list[str]:
    """The differences, one phrase each: operations that say something else or are wired otherwise, then counts."""
    ours, theirs = (structure.flattened(counts_of(each), ": ") for each in (golden, found))
    counts = [
        f"{name} is {theirs.get(name, 'absent')}, the golden graph has {ours.get(name, 'none')}"
        for name in sorted({*ours, *theirs})
        if ours.get(name) != theirs.get(name)
    ]
    return [*_other_wiring(golden, found), *counts]


def _other_wiring(golden: Golden, found: Golden) -> Iterator[str]:
    """Of everything whose digest is another, the lines that are; names of weights alone make no difference."""
    digests = [
        {(table, name): row for table in each if table.endswith(_DIGESTS) for name, row in each[table].items()}
        for each in (golden, found)
    ]
    told: set[str] = set()
    for table, name in {**digests[0], **digests[1]}:
        lines = table.removesuffix(_DIGESTS) + _LINES + name
        ours, theirs = golden.get(lines, {}), found.get(lines, {})
        same_digest = digests[0].get((table, name)) == digests[1].get((table, name))
        if same_digest and _nameless(ours) == _nameless(theirs):
            continue
        where = table.removesuffix(_DIGESTS) + name
        changes = list(_changed_lines(ours, theirs))
        if not changes and where.partition(_VARIANT)[0] not in told:
            changes = ["the same operations, wired otherwise"]
        told.add(where)
        yield from (f"{where}: {change}" for change in changes)


def _nameless(lines: Mapping[str, Any]) -> Counter[tuple[str, str]]:
    return Counter((unnamed(line), str(count)) for line, count in lines.items())


def _changed_lines(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    """Lines that only one side has, one of each beside the other's of the same operation."""
    gone = [line for line in ours if ours[line] != theirs.get(line)]
    come = [line for line in theirs if theirs[line] != ours.get(line)]
    for line in come:
        if line in gone:
            gone.remove(line)
            yield f"{_times(theirs[line])} {line} instead of {_times(ours[line])}"
            continue
        alike = [
            other for other in gone if _OPERATION.split(other)[0] == _OPERATION.split(line)[0] and other not in come
        ]
        if alike:
            nearest = difflib.get_close_matches(line, alike, n=1, cutoff=0)[0]
            gone.remove(nearest)
            yield f"{line} instead of {nearest}"
        else:
            yield f"{line} is new"
    yield from (f"{line} is gone" for line in gone)


def _times(count: int | Mapping[str, int]) -> str:
    if isinstance(count, Mapping):
        return ", ".join(f"{times} x ({recipe})" for recipe, times in count.items())
    return f"{count} x"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def read(path: Path) -> Golden:
    """The golden graph in a file.

    Raises:
        BadInput: when it cannot be read, or names no entry; or no contract, where it says that it is of another.
    """
    try:
        golden = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as a golden graph: {error}.", _WRITE) from error
    if not isinstance(golden.get("entry"), str):
        raise BadInput(f"{path} names no entry.", _WRITE)
    if not isinstance(golden.get("contract", ""), str):
        raise BadInput(f"{path} says `contract`, but names none.", _WRITE)
    return golden


def write(golden: Golden, path: Path) -> None:
    """Write a golden graph, each number with what it is for."""
    contract = golden.get("contract")
    lines = [_HEAD.format(name=golden["entry"], contract=f" by contract {contract}" if contract else "")]
    lines += [f'{key} = "{golden[key]}"' for key in ("entry", "ffn", "contract") if key in golden]
    for table, counts in golden.items():
        if isinstance(counts, Mapping):
            lines += ["", f'["{table}"]']
            if _is_of_wiring(table):
                lines += [f"{json.dumps(name)} = {_value(value)}" for name, value in counts.items()]
            else:
                lines += [f"{name} = {_value(value)} # {_why(name, golden)}" for name, value in counts.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _why(name: str, golden: Golden) -> str:
    own = any(table.endswith("composites") and name in counts for table, counts in golden.items())
    return _WHY.get(name, _OF_AN_OVERLAY if own else _OTHERWISE)


def _value(value: int | str | Mapping[str, int | str]) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{recipe} = {_value(of_one)}" for recipe, of_one in value.items()) + " }"
    return json.dumps(value)


@frozen
class Wanted:
    """A golden graph that there is to be.

    Attributes:
        path: of its file, which may not be there yet.
        entry: whose graph it is.
        contract: name of another contract than the entry's.
    """

    path: Path
    entry: Entry
    contract: str | None = None


def wanted(folder: Path, repository: Path, plugins: Plugins) -> list[Wanted]:
    """The golden graphs in `folder`, and that of the first entry of each feed-forward kind that has none.

    A file that holds no more than `entry` and `contract` asks for one to be written. Graphs are asked for without a
    file for entries of the repository's own plugins: of a plugin with an entry's file in it, or with a golden graph.
    Where there is no such plugin, all are asked.

    Raises:
        BadInput: for the golden graph of an entry that nobody brings.
    """
    entries = load_entries(plugins)
    files = {path: read(path) for path in sorted(folder.glob("*.toml"))}
    orphans = [f"{path.name} (of {file['entry']})" for path, file in files.items() if file["entry"] not in entries]
    if orphans and not plugins.without:
        raise plugins.not_found(
            f"In {folder} there are golden graphs of entries that nobody brings: {listing(orphans)}.", _GONE
        )
    chosen = [
        Wanted(path, entries[name][0], file.get("contract"))
        for path, file in files.items()
        if (name := file["entry"]) in entries
    ]
    own = {plugin for plugin, path in plugins.entries() if is_source(path.resolve(), repository)}
    own |= {entries[each.entry.name][1] for each in chosen}
    kinds = {
        name: (entry.facts.ffn, made_of_sample(entry, plugins))
        for name, (entry, _) in entries.items()
        if entry.sample is not None
    }
    known = {kinds.get(each.entry.name) for each in chosen}
    for name, kind in kinds.items():
        entry, plugin = entries[name]
        if kind not in known and (plugin in own or not own):
            chosen.append(Wanted(golden_path(folder, entry), entry))
            known.add(kind)
    return chosen


def made_of_sample(entry: Entry, plugins: Plugins) -> str:
    """What an entry makes of its sample: siblings make the same, unless a plugin has something else for one of them."""
    try:
        made = describe(design(BuildRequest(entry.name, sample=True, dry=True), plugins, entry))
    except ZooError:
        return entry.name
    return json.dumps([made[key] for key in ("overlay", "recipe", "contract")], sort_keys=True)


def golden_path(folder: Path, entry: Entry, contract: str | None = None) -> Path:
    """Where the golden graph of an entry is, or of another `contract` than its own."""
    return folder / f"{entry.slug}{'.' + contract if contract else ''}.toml"
