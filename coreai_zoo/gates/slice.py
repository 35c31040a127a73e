"""A slice of a build on the real runtime, in the place of an asset that is too large to be run here.

Above some size a gate runs the overlay on the asset's own weights, and not what the compiler made of the decoder. So
the first layers are built again, by the same recipe, at true width and with embedding and head. That asset is run on
its runtime against transformers on the same layers. And its graph is compared with that of the whole: a layer of each
kind has to hold the same operations, connected in the same way.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from attrs import evolve, frozen

from coreai_zoo.backend import Backend
from coreai_zoo.bounds import Bounds
from coreai_zoo.build.design import Design
from coreai_zoo.build.pipeline import build
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.disk import temporary_folder
from coreai_zoo.engine import PREFILL
from coreai_zoo.errors import listing
from coreai_zoo.gate import Activations, GateResult, Model
from coreai_zoo.gates.bounds import broken, check_bounds
from coreai_zoo.gates.candidate import AssetCandidate
from coreai_zoo.gates.prefill import PrefillGate
from coreai_zoo.gates.prompts import TokenizedPrompt, strength
from coreai_zoo.gates.rule import compare, flips_told
from coreai_zoo.gates.teacher_forced import Reference
from coreai_zoo.lowering.graph import Graph, LayerKind, count, telling_depth
from coreai_zoo.names import parameter_of
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter

NAME = "slice"
"""Of the gate, in reports."""

POSITIONS = 3
"""Tokens that a slice is run on: the first of them has an empty cache, and a step of a true width takes a minute."""

_SHOWN = 3
_DEEPER = 2  # times as many layers as have other names, to have those that are unlike in other ways
_WHOLE = re.compile(r"only slot|\(state |broadcast_in_dims\(expand_dims\(slice_update")  # what is made of a whole state
_SLOTS = re.compile(r"(, \d+)?(?=, 0\) -> \d+x)|(?<=-> )\d+(?=x)")
_LAYER = re.compile(r"(?<=layer )\d+")
_GATHERED = re.compile(r"concat\(0, .*|reshape\(concat, \[\d+, |(read|write)_handle\(.*")  # states, with all slots


@frozen
class Slice:
    """What is sliced, and how the slice is judged.

    Attributes:
        bundle: the whole.
        design: what it was made of.
        checkpoint: the folder of its checkpoint.
        plugins: for the build.
        oracle_of: the oracle for a bundle of that checkpoint.
        bounds: what a slice of so many layers is held to on the runtime.
        experts_per_token: how many a router chooses; None without one.
    """

    bundle: Bundle
    design: Design
    checkpoint: Path
    plugins: Plugins
    oracle_of: Callable[[Bundle], Model]
    bounds: Callable[[int], Bounds]
    experts_per_token: int | None

    def judge(self, prompt: TokenizedPrompt, report: Reporter) -> GateResult:
        """Build the slice in a folder of its own, run it, compare both graphs; the folder is gone afterwards.

        A whole that is no deeper than a slice is run itself.
        """
        whole = self._graphs(self.bundle)
        named, unlike = slice_depth(whole), telling_depth(self.design.layer_kinds)
        # Layers that are all unlike each other are not all run.
        layers = unlike if named < unlike <= _DEEPER * named else named
        tokens = prompt.tokens[:POSITIONS]
        told = f"the first {layers} layers on the {self._backend.runtime} runtime, {len(tokens)} positions"
        with temporary_folder("zoo-slice-") as folder, report.stage(NAME, told):
            part = self._part(layers, folder)
            problems = differences(whole, self._graphs(part))
            found = AssetCandidate(part, self._backend).run(tokens)
            oracle = self.oracle_of(part).run(tokens)
            problems += self._numbers(tokens, oracle, found, layers)
            if (prefill := self.design.contract.prefill) is not None:
                reference = Reference(evolve(prompt, tokens=tokens), oracle, strength(oracle.logits))
                judging = PrefillGate(self.experts_per_token)
                wrong = judging.judge_asset(part, self._backend, prefill, reference, self.bounds(layers), report)
                problems += [f"{PREFILL}: {problem}" for problem in wrong]
        if problems:
            return GateResult(NAME, passed=False, summary=f"{told}: {listing(problems, _SHOWN, '; ')}")
        kinds = sum(len({kind.name for kind in graph.kinds}) for graph in whole.values())
        return GateResult(NAME, passed=True, summary=f"{told}; {kinds} kinds of layer are as in the whole")

    @property
    def _backend(self) -> Backend:
        return self.design.backend

    def _graphs(self, bundle: Bundle) -> dict[str, Graph]:
        """The graphs of its functions. What is stored and no weight, such as a mask, is known by its bytes."""
        weights = {tensor.name for tensor in self.design.weights.tensors}
        program, stored = self._backend.program(bundle.asset), self._backend.constants(bundle.asset)
        literals = {
            name: f"sha256 {hashlib.sha256(stored[name]).hexdigest()[:16]} : {'x'.join(map(str, (*shape, dtype)))}"
            for name, (shape, dtype) in program.stored.items()
            if parameter_of(name)[0] not in weights
        }
        return count(evolve(program, literals=literals))

    def _part(self, layers: int, folder: Path) -> Bundle:
        if layers >= int(self.bundle.build["layers"]):
            return self.bundle
        request, _ = recorded_request(self.bundle, self.checkpoint, folder)
        return Bundle.open(build(evolve(request, layers=layers), self.plugins, Reporter(silent=True)).path)

    def _numbers(self, tokens: Sequence[int], oracle: Activations, found: Activations, layers: int) -> list[str]:
        """Flips and broken bounds, a phrase each."""
        bounds = self.bounds(layers)
        verdict = compare(tokens, oracle, found, self.experts_per_token, bounds.margin)
        return [*flips_told(verdict), *broken(check_bounds(verdict, bounds))]


def slice_depth(functions: Mapping[str, Graph]) -> int:
    """How many of the first layers there have to be for two of every kind to be among them, where there are two.

    A layer is of the kind that its submodules say: one whose graph is unlike those of its kind is what is looked for.
    """
    return max(telling_depth([kind.name for kind in graph.layers]) for graph in functions.values())


def differences(whole: Mapping[str, Graph], part: Mapping[str, Graph]) -> list[str]:
    """What a slice holds otherwise than the whole, a phrase each: each layer of that, what is outside, composites."""
    problems = [f"the function {name} is in one of them only" for name in sorted(whole.keys() ^ part.keys())]
    for name in sorted(whole.keys() & part.keys()):
        ours, theirs = part[name], whole[name]
        for position, kind in enumerate(theirs.layers):
            if not any(_text(each) == _text(kind) for each in _counterparts(ours, theirs, position)):
                problems.append(f"layer {position} ({kind.name}) is another graph in the whole than in the slice")
        if dict(ours.outside) != dict(theirs.outside) or _lines_outside(ours) != _lines_outside(theirs):
            problems.append(f"what belongs to no layer of {name} is other in the whole than in the slice")
        if (dict(ours.composites), dict(ours.composite_wiring)) != (
            dict(theirs.composites),
            dict(theirs.composite_wiring),
        ):
            problems.append(f"the composites of {name} are others in the whole than in the slice")
    return problems


def _counterparts(ours: Graph, theirs: Graph, position: int) -> list[LayerKind]:
    """What a layer of the whole has to be like one of: itself, where it is in the slice.

    The last layer of a function that gives nothing is not computed to its end, in the slice as in the whole: one is
    like the other, and no other layer is like them.
    """
    layers = ours.layers
    if ours.cut and len(theirs.layers) > len(layers):
        if position == len(theirs.layers) - 1:
            return [layers[-1]]
        layers = layers[:-1]
    if position < len(layers):
        return [layers[position]]
    return [each for each in layers if each.name == theirs.layers[position].name]


def _text(kind: LayerKind) -> tuple[Counter[str], Counter[str]]:
    """The operations of a layer and the lines of its wiring, without how many slots a state has."""
    lines: Counter[str] = Counter()
    for line, times in kind.wiring.lines.items():
        lines[_SLOTS.sub("", line) if _WHOLE.search(line) else line] += times
    return Counter(kind.operations), lines


def _lines_outside(graph: Graph) -> frozenset[str]:
    """The lines of what belongs to no layer, without how many there are; but for those on states of all layers."""
    return frozenset(_LAYER.sub("", line) for line in graph.wiring.lines if not _GATHERED.match(line))
