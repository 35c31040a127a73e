"""The difference between two structures and between what they compute: sections, each a list of changes.

Rendering them is the last part of the file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from attrs import field, frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN
from coreai_zoo.bundle.bundle import signature_record
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.gates.rule import Position, Verdict
from coreai_zoo.lowering.graph import Graph, LayerKind
from coreai_zoo.program import Program
from coreai_zoo.review.structure import StoredWeight, Structure
from coreai_zoo.signature import TraceSpec

GRAPH, WEIGHTS, NUMERICS = "graph", "weights", "numerics"
"""What a section can be evidence for."""
SIGNATURE = "signature"
"""What the name of a section about one begins with."""
_SHOWN_OPERATIONS = 12
_SHOWN_RESIZED = 6  # more than that are another model's sizes
_CHUNK = 2**24


@frozen
class Change:
    """One thing that is not the same in A and B.

    Attributes:
        what: its name.
        before: what it is in A, as text; None where A has no such thing.
        after: the same of B.
    """

    what: str
    before: str | None
    after: str | None


@frozen
class Section:
    """One aspect of two bundles: its changes, or why it was not compared.

    Attributes:
        name: for the reader.
        changes: what is not the same; empty where everything is.
        about: `graph`, `weights` or `numerics` where the section is evidence for one of these, else None.
        missing: why the aspect was not compared, where it was not.
        note: what the reader has to know.
    """

    name: str
    changes: tuple[Change, ...]
    about: str | None = None
    missing: str | None = None
    note: str = ""


@frozen
class Difference:
    """Everything that was compared of A and B, section by section."""

    a: str
    b: str
    sections: tuple[Section, ...]

    @property
    def changed(self) -> bool:
        """Whether anything differs."""
        return any(section.changes for section in self.sections)

    @property
    def summary(self) -> str:
        """One sentence: what is the same, what is not, and what was not compared."""
        of = {about: [s for s in self.sections if s.about == about] for about in (GRAPH, WEIGHTS, NUMERICS)}
        changed = [about for about, sections in of.items() if any(section.changes for section in sections)]
        missing = {
            about: next((s.missing for s in sections if s.missing), "") if sections else "they were left out"
            for about, sections in of.items()
            if about not in changed and (not sections or any(section.missing for section in sections))
        }
        same = [about for about in of if about not in changed and about not in missing]
        parts = []
        if same:
            parts.append(f"no change in {_joined(same, 'or')}")
        if changed:
            parts.append(f"{_joined(changed, 'and')} changed")
        parts += [f"{about} not compared: {reason}" for about, reason in missing.items()]
        others = [section.name for section in self.sections if section.changes and section.about is None]
        if others:
            parts.append(f"also changed: {', '.join(others)}")
        return "; ".join(parts)


def _joined(names: Sequence[str], last: str) -> str:
    return f" {last} ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Contents:
    """The bytes of the stored constants of A and B, by their names in `Structure.stored`."""

    a: Mapping[str, memoryview] = field(repr=False)
    b: Mapping[str, memoryview] = field(repr=False)


def require_comparable(a: Structure, b: Structure) -> None:
    """Refuse two things of which nothing corresponds.

    Raises:
        BadInput: saying why.
    """
    for what, of_a, of_b in (("backends", a.backend, b.backend), ("overlays", a.overlay, b.overlay)):
        if of_a != of_b:
            raise BadInput(
                f"{a.label} and {b.label} cannot be compared: they come from different {what}, {of_a} and {of_b}, so "
                "that no layer or parameter of one is one of the other.",
                "Compare two of one architecture: `zoo list` and `zoo show` tell which these are.",
            )


def compare(a: Structure, b: Structure, contents: Contents | None, numerics: Section) -> Difference:
    """The difference between two structures, with the section about what both compute.

    Args:
        a: the structure of A.
        b: the structure of B.
        contents: values of the stored constants; None where there are none.
        numerics: the section about what both compute, see `compare_numerics`.

    Raises:
        BadInput: when nothing of one corresponds to anything of the other.
    """
    require_comparable(a, b)
    return Difference(
        a.label,
        b.label,
        (
            _facts(a, b),
            *_of_functions(a, b),
            _constants(a, b, contents),
            _bytes(a, b),
            _recipe(a, b),
            numerics,
            _metadata(a, b),
        ),
    )


def _changes(a: Mapping[str, object], b: Mapping[str, object]) -> tuple[Change, ...]:
    """Keys whose values differ, in the order of `a`, then of `b`."""
    return tuple(
        Change(key, None if key not in a else _shown(a[key]), None if key not in b else _shown(b[key]))
        for key in {**a, **b}
        if key not in a or key not in b or a[key] != b[key]
    )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _facts(a: Structure, b: Structure) -> Section:
    return Section("facts", _changes({**a.facts, "contract": a.contract}, {**b.facts, "contract": b.contract}))


def of_entry_files(a: Mapping[str, object], b: Mapping[str, object]) -> Section:
    """What the file of an entry says, key by key."""
    return Section("entry", _changes(a, b))


def _of_functions(a: Structure, b: Structure) -> Iterator[Section]:
    """Signature and operations of each function that either side has, named where there are several."""
    names = {**a.graphs, **b.graphs}
    for name in names:
        suffix = f" of {name}" if len(names) > 1 else ""
        yield _signature(a, b, name, suffix)
        yield _operations(a, b, name, suffix)


def _signature(a: Structure, b: Structure, function: str, suffix: str) -> Section:
    changes = _changes(_signature_of(a.signatures.get(function)), _signature_of(b.signatures.get(function)))
    return Section(f"{SIGNATURE}{suffix}", changes, about=GRAPH)


def _signature_of(spec: TraceSpec | None) -> dict[str, str]:
    if spec is None:
        return {}
    record = signature_record(spec)
    described: dict[str, str] = {}
    for what in ("inputs", "states", "outputs"):
        for order, tensor in enumerate(record[what]):
            shape = ", ".join(map(str, tensor["shape"]))
            kind = f", {tensor['kind']}" if "kind" in tensor else ""
            described[f"{what[:-1]} {tensor['name']}"] = f"{tensor['dtype']} [{shape}]{kind}, number {order + 1}"
    for name, axis in record["axes"].items():
        described[f"axis {name}"] = f"{axis['minimum']} to {axis['maximum']}, traced at {axis['example']}"
    return described


_NO_GRAPH = Graph((), {}, {})


def _operations(a: Structure, b: Structure, function: str, suffix: str) -> Section:
    """Counts per kind of layer, and where these are the same, what the operations say."""
    changes = [*_counts(*(side.graphs.get(function, _NO_GRAPH) for side in (a, b)))]
    notes = [
        f"{side.label}: counted in its first {side.traced} layers, at its true sizes and without weights; the others "
        "are like the last of their kind"
        for side in (a, b)
        if side.traced is not None
    ]
    programs = [_called(side.program, function) for side in (a, b)]
    if _same_sizes(a, b):
        changes += _details(*programs)
        if not changes and programs[0] != programs[1]:
            changes.append(Change("the same operations, wired otherwise", "", ""))
    elif not changes:
        notes.append("types and inline constants follow the sizes and are not listed")
    return Section(f"operations{suffix}", tuple(changes), about=GRAPH, note="; ".join(dict.fromkeys(notes)))


def _called(program: Program, function: str) -> Program:
    """The function that an engine calls by this name, if it is there, and the composites that it calls."""
    functions = {name: own for name, own in program.functions.items() if name == function}
    called = {operation.callee for own in functions.values() for operation in own.operations}
    return Program(functions, {name: own for name, own in program.composites.items() if name in called})


def _same_sizes(a: Structure, b: Structure) -> bool:
    shared = [name for name in a.stored if name in b.stored]
    return all(a.stored[name].shape == b.stored[name].shape for name in shared)


def _counts(a: Graph, b: Graph) -> Iterator[Change]:
    kinds_a, kinds_b = _by_name(a), _by_name(b)
    for name in {**kinds_a, **kinds_b}:
        ours, theirs = kinds_a.get(name, []), kinds_b.get(name, [])
        yield from _changes(
            {f"{name}: layers": sum(len(kind.layers) for kind in ours)} if ours else {},
            {f"{name}: layers": sum(len(kind.layers) for kind in theirs)} if theirs else {},
        )
        main_a, main_b = _main(ours), _main(theirs)
        yield from _count_changes(f"one {name}", main_a, main_b)
        yield from _changes(_variants(ours, main_a), _variants(theirs, main_b))
    yield from _count_changes("outside of the layers", a.outside, b.outside)
    yield from _changes(_composites(a), _composites(b))
    total_a, total_b = sum(a.total.values()), sum(b.total.values())
    yield from _changes({"all layers: operations": total_a}, {"all layers: operations": total_b})


def _by_name(graph: Graph) -> dict[str, list[LayerKind]]:
    kinds: dict[str, list[LayerKind]] = {}
    for kind in graph.kinds:
        kinds.setdefault(kind.name, []).append(kind)
    return kinds


def _main(kinds: Sequence[LayerKind]) -> Mapping[str, int]:
    """Operations of most layers of a kind."""
    return max(kinds, key=lambda kind: len(kind.layers)).operations if kinds else {}


def _count_changes(where: str, a: Mapping[str, int], b: Mapping[str, int]) -> Iterator[Change]:
    sums = (
        {f"{where}: operations": sum(a.values())} if a else {},
        {f"{where}: operations": sum(b.values())} if b else {},
    )
    yield from _changes(*sums)
    if a and b:
        names = sorted({*a, *b})
        yield from _changes(
            {f"{where}: {name}": a.get(name, 0) for name in names},
            {f"{where}: {name}": b.get(name, 0) for name in names},
        )


def _variants(kinds: Sequence[LayerKind], main: Mapping[str, int]) -> dict[str, str]:
    """Layers that are not quite like the others of their kind."""
    found = {}
    for kind in kinds:
        if kind.operations != main:
            names = sorted({*kind.operations, *main})
            other = [
                f"{kind.operations.get(name, 0)} {name} instead of {main.get(name, 0)}"
                for name in names
                if kind.operations.get(name, 0) != main.get(name, 0)
            ]
            layers = listing([str(layer) for layer in kind.layers], 4)
            found[f"{kind.name}, layer{'s' * (len(kind.layers) > 1)} {layers}"] = listing(other)
    return found


def _composites(graph: Graph) -> dict[str, str]:
    return {
        f"composite {name}": f"{len(sizes)} shapes of {listing([str(size) for size in sorted(set(sizes))])} operations"
        for name, sizes in graph.composites.items()
    }


def _details(a: Program, b: Program) -> list[Change]:
    """Operations, inline constants and declarations that only one side has, as text."""
    gone, come = _texts(a), _texts(b)
    only_a, only_b = sorted((gone - come).items()), sorted((come - gone).items())
    changes = [Change(f"only in A, {count} x", _short(text), None) for text, count in only_a[:_SHOWN_OPERATIONS]]
    changes += [Change(f"only in B, {count} x", None, _short(text)) for text, count in only_b[:_SHOWN_OPERATIONS]]
    rest = len(only_a) + len(only_b) - len(changes)
    if rest > 0:
        changes.append(Change(f"and {rest} more such operations", "", ""))
    return changes


def _texts(program: Program) -> Counter[str]:
    texts: Counter[str] = Counter()
    for function in program.everything:
        # Names of composites are numbered; what they are is in their declaration.
        own = [line for line in function.declaration if not line.startswith("sym_name")]
        whose = function.name if function.name in program.functions else "composite"
        texts.update(f"{whose}: {line}" for line in own)
        texts.update(_numberless(str(operation)) for operation in function.operations if operation.stored is None)
    return texts


def _numberless(text: str) -> str:
    return re.sub(r"(@\w+?)_\d+", r"\1", text)


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."


# ---------------------------------------------------------------------------------------------------------------------
# Constants, bytes, recipe
# ---------------------------------------------------------------------------------------------------------------------

_POSITION = re.compile(r"(?<![^.])\d+(?![^.])")


def _constants(a: Structure, b: Structure, contents: Contents | None) -> Section:
    """Stored tensors by pattern, a layer's number being `*`: added, removed, re-typed, resized, of other content."""
    patterns_a, patterns_b = _patterns(a.stored), _patterns(b.stored)
    changes: list[Change] = []
    resized: list[str] = []
    for pattern in {**patterns_a, **patterns_b}:
        ours, theirs = patterns_a.get(pattern, {}), patterns_b.get(pattern, {})
        if ours and theirs and _dtypes(ours) == _dtypes(theirs) and _described(ours) != _described(theirs):
            resized.append(pattern)
        else:
            changes += _pattern_changes(pattern, ours, theirs)
    if len(resized) > _SHOWN_RESIZED:
        sizes = (_bytes_of(side, resized) for side in (patterns_a, patterns_b))
        changes.append(Change(f"{len(resized)} of the same dtype, other sizes", *sizes))
    else:
        for pattern in resized:
            changes += _pattern_changes(pattern, patterns_a[pattern], patterns_b[pattern])
    if contents is not None:
        changes += _other_content(a.stored, b.stored, contents)
    changes += _changes({"all stored bytes": a.stored_bytes}, {"all stored bytes": b.stored_bytes})
    missing = None if contents is not None else "values are compared of bundles only"
    return Section("constants", tuple(changes), about=WEIGHTS, missing=None if changes else missing)


def _pattern_changes(
    pattern: str, ours: Mapping[str, StoredWeight], theirs: Mapping[str, StoredWeight]
) -> tuple[Change, ...]:
    return _changes({pattern: _described(ours)} if ours else {}, {pattern: _described(theirs)} if theirs else {})


def _bytes_of(patterns: Mapping[str, Mapping[str, StoredWeight]], names: Sequence[str]) -> str:
    return f"{sum(weight.bytes for name in names for weight in patterns[name].values()):,} bytes"


def _dtypes(weights: Mapping[str, StoredWeight]) -> set[str]:
    return {weight.dtype for weight in weights.values()}


def _patterns(stored: Mapping[str, StoredWeight]) -> dict[str, dict[str, StoredWeight]]:
    patterns: dict[str, dict[str, StoredWeight]] = {}
    for name in sorted(stored):
        patterns.setdefault(_POSITION.sub("*", name), {})[name] = stored[name]
    return patterns


def _described(weights: Mapping[str, StoredWeight]) -> str:
    kinds = sorted({f"{weight.dtype} [{', '.join(map(str, weight.shape))}]" for weight in weights.values()})
    return f"{len(weights)} x {listing(kinds, 3)}"


def _other_content(
    a: Mapping[str, StoredWeight], b: Mapping[str, StoredWeight], contents: Contents
) -> tuple[Change, ...]:
    """Of what both have alike, by pattern: how many tensors hold other bytes."""
    changed: dict[str, list[int]] = {}
    for name, weight in a.items():
        if b.get(name) == weight and name in contents.a and name in contents.b:
            differing = _differing_bytes(contents.a[name], contents.b[name])
            if differing:
                changed.setdefault(_POSITION.sub("*", name), []).append(differing)
    return tuple(
        Change(f"content of {pattern}", f"{len(counts)} x", f"{sum(counts):,} bytes are others")
        for pattern, counts in changed.items()
    )


def _differing_bytes(a: memoryview, b: memoryview) -> int:
    ours, theirs = np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)
    if ours.size != theirs.size:
        return max(ours.size, theirs.size)
    return sum(
        int(np.count_nonzero(ours[start : start + _CHUNK] != theirs[start : start + _CHUNK]))
        for start in range(0, ours.size, _CHUNK)
    )


def _bytes(a: Structure, b: Structure) -> Section:
    def known(structure: Structure) -> dict[str, int | str]:
        read = structure.bytes_per_token
        return {"weights read per decoded token": "unknown" if read is None else read}

    return Section("bytes per token", _changes(known(a), known(b)))


def _metadata(a: Structure, b: Structure) -> Section:
    missing = None if a.metadata and b.metadata else "there are no bundles to read it of"
    return Section("metadata", _changes(a.metadata, b.metadata), missing=missing)


def _recipe(a: Structure, b: Structure) -> Section:
    def rows(structure: Structure) -> dict[str, object]:
        table: dict[str, object] = {}
        for role, weights in structure.roles.items():
            table[role] = weights.stored
            table[f"{role}: bytes"] = weights.bytes
        return table

    return Section("recipe per role", _changes(rows(a), rows(b)), about=WEIGHTS)


# ---------------------------------------------------------------------------------------------------------------------
# Numerics
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Computed:
    """What a bundle computes for some tokens.

    Attributes:
        logits: float16 [positions, V], a token at a time.
        verdict: the oracle's on them.
        at_once: where a prompt is read by a function of its own, what that leaves: the states behind the last token,
            and its logits, by name.
    """

    logits: np.ndarray[Any, Any]
    verdict: Verdict
    at_once: Mapping[str, np.ndarray[Any, Any]] = field(factory=dict, repr=False)


def compare_numerics(a: Computed, b: Computed, note: str) -> Section:
    """The section about what A and B compute for the same tokens: unchanged only when every bit is.

    Args:
        a: of A.
        b: of B.
        note: what was run on what.
    """
    changes: list[Change] = []
    if not np.array_equal(a.logits, b.logits, equal_nan=True):
        apart = _largest_difference(a.logits, b.logits)
        changes = [*_side_by_side(a.verdict, b.verdict), Change("largest difference of a logit, A to B", "", apart)]
        positions = zip(a.verdict.positions, b.verdict.positions, strict=True)
        tokens = sum(x.candidate != y.candidate for x, y in positions)
        changes.append(Change("positions with another top token, A to B", "", str(tokens)))
    for name, before in a.at_once.items():
        after = b.at_once.get(name)
        # Of another shape they are another signature, which is a section of its own.
        if after is not None and after.shape == before.shape and not np.array_equal(before, after, equal_nan=True):
            what = f"the prompt read at once: largest difference of {name}, A to B"
            changes.append(Change(what, "", _largest_difference(before, after)))
    return Section("numerics", tuple(changes), about=NUMERICS, note=note)


def _largest_difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> str:
    return f"{np.abs(a.astype(np.float64) - b.astype(np.float64)).max():.4g}"


def numerics_missing(reason: str) -> Section:
    """The section that says why no logits were compared."""
    return Section("numerics", (), about=NUMERICS, missing=reason)


def _side_by_side(a: Verdict, b: Verdict) -> list[Change]:
    def rows(verdict: Verdict) -> dict[str, str]:
        positions = verdict.positions
        return {
            "against the oracle: matched": f"{verdict.matched} of {len(positions)}",
            "against the oracle: ties": str(verdict.ties),
            "against the oracle: confident flips": f"{len(verdict.confident_flips)}{_from(positions)}",
            "against the oracle: lowest cosine": f"{min(p.cosine for p in positions):.6f}",
            "against the oracle: largest logit error": f"{max(p.max_abs_logit_error for p in positions):.4f}",
            "against the oracle: mean KL": f"{np.mean([p.kl_divergence for p in positions]):.3e}",
        }

    def _from(positions: Sequence[Position]) -> str:
        """The margin from which a flip counts, where it is not that of half precision."""
        margin = positions[0].sure_from
        return "" if margin == CONFIDENT_MARGIN else f" (from a margin of {margin:.3g} on)"

    ours, theirs = rows(a), rows(b)
    return [Change(name, ours[name], theirs[name]) for name in ours]  # all of them: side by side


# ---------------------------------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------------------------------


def as_json(difference: Difference) -> dict[str, Any]:
    """A difference as JSON."""
    return {
        "a": difference.a,
        "b": difference.b,
        "changed": difference.changed,
        "summary": difference.summary,
        "sections": [attrs.asdict(section) for section in difference.sections],
    }


def as_markdown(difference: Difference) -> str:
    """A difference as Markdown for a review, one table per section."""
    lines = [f"### `{difference.a}` against `{difference.b}`", "", f"**{difference.summary}**", ""]
    for section in difference.sections:
        if not section.changes and not section.missing:
            continue
        lines += [f"#### {section.name}", ""]
        if section.missing:
            lines += [f"Not compared: {section.missing}.", ""]
        if section.changes:
            lines += ["| | A | B |", "|---|---|---|"]
            lines += [
                f"| {_cell(change.what)} | {_cell(change.before)} | {_cell(change.after)} |"
                for change in section.changes
            ]
            lines.append("")
        if section.note:
            lines += [f"{section.note}.", ""]
    unchanged = [section.name for section in difference.sections if not section.changes and not section.missing]
    if unchanged:
        lines += [f"Unchanged: {', '.join(unchanged)}.", ""]
    return "\n".join(lines)


def _cell(text: str | None) -> str:
    return "-" if text is None else text.replace("|", "\\|").replace("<", "&lt;")
