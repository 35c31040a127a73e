"""Attacks the gate with the mutants: each is run against the oracle on the samples, and must fail.

    python tests/attack.py             # prints what docs/gate-mutants.md holds
    python tests/attack.py --measures  # prints every measure of every mutant

The candidate is the decoder as it is exported (contract `static-s1`, token by token, states carried) in PyTorch, on
weights quantized as the bundle's. The verdict is the gate's own: the margin rule, the bounds of the recipe, and the
bounds of the control, which has the same decoder and plain weights.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attrs import evolve, frozen
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from coreai_zoo.bounds import Bounds, Kind, kind_of
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.gate import Activations
from coreai_zoo.gates import rule
from coreai_zoo.gates.bounds import BoundCheck, check_bounds, check_control
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.prompts import named_prompts
from coreai_zoo.gates.rule import Verdict
from coreai_zoo.gates.stress import positions_from, prompt_of, stress_samples, write_checkpoint
from coreai_zoo.lowering.module import build_module, parameters_of
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import Recipe
from coreai_zoo.weights.plan import plan_weights
from coreai_zoo.weights.store import WeightStore
from coreai_zoo_overlays import qwen3_5
from coreai_zoo_qwen36.bounds import BOUNDS as SAMPLES
from decoders import OVERLAY, bind, fed, fresh_states, one_thread, rewrites_of, signature
from mutants import BOTH, MUTANTS, REFUSALS, SAMPLE, Mutant, applied

ENTRIES = {"dense": "qwen3.6-27b", "moe": "qwen3.6-35b-a3b"}
POSITIONS = 32
PIECE = 512  # of a long prompt, in one call
LOOKS = (4, 8, 16)  # after how many calls who wants to know only whether a token flips looks for one
UNTOUCHED = Mutant("untouched", "nothing is wrong")


# ---------------------------------------------------------------------------------------------------------------------
# A verdict
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Outcome:
    """What the gate said of one mutant on one sample.

    Attributes:
        verdict: of the candidate against the oracle.
        checks: every bound, kept or broken.
    """

    verdict: Verdict
    checks: tuple[BoundCheck, ...]

    @property
    def caught_by(self) -> str | None:
        """Confident flips, or else the measure that exceeds its bound by the largest factor; None when it passed."""
        if not self.verdict.passed:
            return "confident flips"
        return None if self._worst is None else self._worst.name

    @property
    def evidence(self) -> str:
        """That measure in numbers; empty when it passed."""
        if not self.verdict.passed:
            return f"{len(self.verdict.confident_flips)} of {self.verdict.confident_positions}"
        if self._worst is None:
            return ""
        value, limit = (
            (f"{n:.5f}" if self._worst.at_least else f"{n:.2g}") for n in (self._worst.value, self._worst.limit)
        )
        return f"{value}, the bound is {limit}"

    @property
    def _worst(self) -> BoundCheck | None:
        broken = [check for check in self.checks if not check.passed]
        return max(broken, key=self._excess, default=None)

    @staticmethod
    def _excess(check: BoundCheck) -> float:
        # A cosine is as far from 1 as an error is from 0.
        value, limit = ((1 - n if check.at_least else n) for n in (check.value, check.limit))
        return value / limit if limit else math.inf


class Target:
    """A sample to attack, with what its oracle says of the first positions of the gate's own code prompt.

    Args:
        kind: of the feed-forward.
        work: where quantized weights are kept.
        positions: of the prompt.
        compute_dtype: in which the decoder computes.
    """

    bounds = SAMPLES
    contract = STATIC_S1
    first = 0
    at_once = False

    def __init__(
        self, kind: str, work: Path, positions: int = POSITIONS, compute_dtype: str = STATIC_S1.compute_dtype
    ) -> None:
        self.contract = evolve(STATIC_S1, compute_dtype=compute_dtype)
        directory = find_entry(ENTRIES[kind], default_plugins())[0].sample_directory()
        text = named_prompts(["code"])[0].text
        tokens = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(text).ids[:positions]
        self._open(kind, directory, work, tokens)

    def _open(self, kind: str, directory: Path, work: Path, tokens: Sequence[int]) -> None:
        self.kind, self.work, self.tokens = kind, work, list(tokens)
        self.checkpoint = Checkpoint.open(directory)
        self.config = OVERLAY.read_config(self.checkpoint.config)
        self.oracle = Oracle(self.checkpoint, self.checkpoint.config).run(self.tokens)
        self._stores: dict[str, WeightStore] = {}

    def attack(self, mutant: Mutant, *, briefly: bool = False) -> Outcome:
        """The gate's verdict on `mutant`. The control runs where no token flips: it cannot undo a failure.

        A control is built from the checkpoint, so it shares what is wrong with the decoder and the weight map, and
        nothing that is wrong with a quantized file.

        Args:
            mutant: what is wrong.
            briefly: go no further once a token has flipped that the oracle is sure of. That fails the gate whatever
                comes after it, but how many would have flipped is not known then.
        """
        bounds = self._bounds(_record(mutant.declared or mutant.recipe))
        verdict = self.compare(self.run(mutant, mutant.recipe, briefly=briefly), bounds)
        checks = check_bounds(verdict, bounds)
        if not verdict.passed:
            return Outcome(verdict, checks)
        plain = self._bounds({})
        control = self._control_of(mutant, verdict)
        return Outcome(verdict, (*checks, *check_control(verdict, control, bounds, plain)))

    def _bounds(self, roles: dict[str, Any]) -> Bounds:
        layers = len(self.config.layer_types)
        return self.bounds.of_recipe(roles, layers, "torch", self.bounds_kind, self.contract.compute_dtype)

    def _control_of(self, mutant: Mutant, verdict: Verdict) -> Verdict:
        if mutant.in_file:
            return self.control
        # On plain weights it would be the same once more.
        plain = RECIPES["fp16"]
        return verdict if mutant.recipe == plain else self.compare(self.run(mutant, plain))

    @functools.cached_property
    def control(self) -> Verdict:
        """Of the untouched decoder on plain weights."""
        return self.compare(self.run(UNTOUCHED, RECIPES["fp16"]))

    @property
    def _pieces(self) -> list[int]:
        """Where calls end: none is named where every token is one."""
        return [*range(PIECE, len(self.tokens), PIECE), len(self.tokens)] if self.at_once else []

    @property
    def bounds_kind(self) -> Kind:
        """Which bounds it is held to."""
        return kind_of(self._experts_per_token)

    @property
    def _experts_per_token(self) -> int | None:
        experts: int | None = OVERLAY.facts(self.config).get("experts_per_token")
        return experts

    def compare(self, found: Activations, bounds: Bounds | None = None) -> Verdict:
        """The margin rule on what a candidate computed of the first positions, or of all."""
        bounds = bounds or self._bounds({})
        end = len(found.logits)
        oracle, found = (positions_from(each, self.first) for each in (_until(end, self.oracle), found))
        with np.errstate(all="ignore"):  # mutants overflow
            tokens = self.tokens[self.first : end]
            return rule.compare(tokens, oracle, found, self._experts_per_token, bounds.margin)

    def run(self, mutant: Mutant, recipe: Recipe, *, briefly: bool = False) -> Activations:
        """What the mutated decoder computes; of the first positions where a token flips `briefly`, see `attack`."""
        with one_thread(), applied(mutant), parametrize.cached():
            decoder = self._decoder(recipe)
            mutant.weights(decoder)
            for number in range(1, mutant.runs + 1):
                rows: list[Tensor] = []
                # A seventh faster than `no_grad`, where steps are as small.
                with _watched(decoder) as watched, torch.inference_mode():
                    states = fresh_states(signature(self.config, self.contract), len(self.tokens))
                    for logits in fed(decoder, self.tokens, states, *self._pieces):
                        rows.append(logits)
                        looked = briefly and number == mutant.runs and len(rows) in LOOKS
                        if looked and self._flips(watched.activations(rows)):
                            break
        return watched.activations(rows)

    def _flips(self, found: Activations) -> bool:
        return len(found.logits) > self.first and not self.compare(found).passed

    def _decoder(self, recipe: Recipe) -> nn.Module:
        rewrites = [] if self.at_once else [("overlay", rewrite) for rewrite in rewrites_of(STATIC_S1)]
        decoder = build_module(lambda: OVERLAY.decoder(self.config, self.contract), rewrites)
        store = self._store(recipe)
        bind(decoder, {name: store[name] for name, _ in decoder.named_parameters()})
        return decoder

    def _store(self, recipe: Recipe) -> WeightStore:
        if recipe.name not in self._stores:
            decoder = build_module(lambda: OVERLAY.decoder(self.config, self.contract), [])
            weight_map = qwen3_5.weight_map(self.config)
            plan = plan_weights(weight_map, parameters_of(decoder), self.checkpoint.tensors, recipe)
            self._stores[recipe.name] = WeightStore(self.work / f"{self.kind}-{recipe.name}")
            self._stores[recipe.name].fill(plan, self.checkpoint)
        return self._stores[recipe.name]


class StressTarget(Target):
    """A stress sample to attack, with its own bounds; see `Target`."""

    def __init__(self, kind: str, name: str, work: Path) -> None:
        plugins = default_plugins()
        entry = find_entry(ENTRIES[kind], plugins)[0]
        (stress,) = (each for each in stress_samples(entry, plugins) if each.name == name)
        self.bounds, self.first, self.at_once = stress.bounds, stress.first, stress.at_once
        folder = write_checkpoint(entry.sample_directory(), stress, work / f"{kind}-{name}")
        self._open(kind, folder, work / f"{kind}-{name}-stores", prompt_of(folder, stress.positions))


def targets_in(work: Path) -> Callable[[str, str], Target]:
    """The target by kind and by what a mutant is run on, each made once in the folder `work`."""
    return functools.cache(lambda kind, on: Target(kind, work / kind) if on == SAMPLE else StressTarget(kind, on, work))


def _until(end: int, activations: Activations) -> Activations:
    """The activations of the positions before `end`."""
    hidden, routers = (
        None if arrays is None else [array[:end] for array in arrays]
        for arrays in (activations.hidden, activations.router_logits)
    )
    return evolve(activations, logits=activations.logits[:end], hidden=hidden, router_logits=routers)


def _record(recipe: Recipe) -> dict[str, dict[str, Any] | None]:
    """How `build.json` states a recipe."""
    return {role: None if spec is None else {"dtype": spec.dtype} for role, spec in recipe.specs.items()}


class _Watched:
    """Collects outputs of modules, call by call."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, list[Tensor]]] = {"hidden": {}, "router": {}}

    def hook(self, kind: str, name: str) -> Callable[..., None]:
        """A hook that keeps what the module `name` returns."""
        pieces = self._seen[kind].setdefault(name, [])
        return lambda _module, _arguments, output: pieces.append(output[0].float())

    def activations(self, logits: Sequence[Tensor]) -> Activations:
        """What was seen until now, with the logits of each call."""
        return Activations(torch.cat(list(logits)).float().numpy(), self._rows("hidden"), self._rows("router"))

    def _rows(self, kind: str) -> list[np.ndarray[Any, Any]] | None:
        """One array [P, ...] for each module, or None when there are none of this kind."""
        return [torch.cat(pieces).numpy() for pieces in self._seen[kind].values()] or None


@contextmanager
def _watched(decoder: nn.Module) -> Iterator[_Watched]:
    """Watch the residual stream, after the embedding and after each layer, and the routers' logits."""
    watched = _Watched()
    with ExitStack() as hooks:
        for name, module in decoder.named_modules():
            kind = {"embed_tokens": "hidden", "DecoderLayer": "hidden", "gate": "router"}
            found = kind.get(name.rpartition(".")[2]) or kind.get(type(module).__name__)
            if found:
                hooks.callback(module.register_forward_hook(watched.hook(found, name)).remove)
        yield watched


# ---------------------------------------------------------------------------------------------------------------------
# The list in the documentation
# ---------------------------------------------------------------------------------------------------------------------

DOCUMENT = Path(__file__).parent.parent / "docs" / "gate-mutants.md"

_HEAD = """\
# What the gate catches

A gate that never failed anything proves nothing. So this one is attacked: each mutant below is a plausible mistake of
porting the model, made on purpose in the overlay's source or in its weights, and run on the samples. **Every one of the
first two tables fails the gate, or is refused before**; the untouched samples pass. `tests/test_mutants.py` repeats
that and compares with the first table, which was printed by

    python tests/attack.py > docs/gate-mutants.md

Each is run over the first {positions} positions of the built-in prompt `code`, as the decoder that is exported
(contract `static-s1`, token by token, states carried) in PyTorch, with weights quantized as `int8hu`, the recipe that
ships, unless the mutant says otherwise. "Caught by" says how many tokens flip of those the oracle is sure of. Where
none does, it names the measure that exceeds its bound (docs/gate.md) by the largest factor, be it one of the candidate
or of the fp16 control, which has the same decoder and no quantization noise to hide under.

"""


def document(outcomes: dict[tuple[str, str], Outcome]) -> str:
    """docs/gate-mutants.md."""
    import prefill_mutants
    from precision_mutants import GOLDEN, PRECISION
    from product_mutants import table

    lines = ["| mutant | mistake | dense: caught by | moe: caught by |", "|---|---|---|---|"]
    for mutant in MUTANTS.values():
        cells = (
            f"{outcomes[mutant.name, kind].caught_by}: {outcomes[mutant.name, kind].evidence}"
            if kind in mutant.kinds
            else "-"
            for kind in BOTH
        )
        lines.append(f"| `{mutant.name}` | {mutant.mistake} | {' | '.join(cells)} |")
    refused = ["| mutant | mistake | refused by |", "|---|---|---|"]
    refused += [f"| `{refusal.name}` | {refusal.mistake} | {refusal.by} |" for refusal in REFUSALS]
    stress = ["| mutant | mistake | stress sample | dense: caught by | moe: caught by |", "|---|---|---|---|---|"]
    drawn = ["| mutant | mistake |", "|---|---|"]
    for mutant in PRECISION.values():
        if mutant.on == GOLDEN:
            drawn.append(f"| `{mutant.name}` | {mutant.mistake} |")
            continue
        found = [outcomes.get((mutant.name, kind)) for kind in BOTH]
        cells = ["-" if each is None else f"{each.caught_by}: {each.evidence}" for each in found]
        stress.append(f"| `{mutant.name}` | {mutant.mistake} | {mutant.on} | {' | '.join(cells)} |")
    sections = {
        "Fail the gate": lines,
        "Refused before": refused,
        "Fail on a stress sample": [_STRESS, *stress],
        "Shown by the golden graph": [_DRAWN, *drawn],
        "Reading prompts": [_PROMPTS, prefill_mutants.table()],
        "Around the model": [_AROUND, table()],
    }
    text = "\n\n".join(f"## {title}\n\n" + "\n".join(rows) for title, rows in sections.items())
    return _HEAD.format(positions=POSITIONS) + text + "\n" + _TAIL


_STRESS = """\
Arithmetic in too few digits, and norms that start elsewhere, round less on the samples than half precision does
anyway. Each stress sample (`coreai_zoo_qwen36/stress.py`) is a sample whose weights were changed so that one such step
carries the result, with bounds of its own. `zoo check` runs the untouched overlay on all of them;
`tests/test_stress.py` repeats this table. Weights are plain but for those of the head's own mutants. The mixture is
left out where the code is the same and its routers hide it.
"""

_DRAWN = """\
These round no more than half precision does anyway, whatever they are run on. The golden graph of the decoder shows
the cast (`tests/test_precision_goldens.py`; at night it is shown every mutant of the table above that edits the
overlay).
"""

_PROMPTS = """\
In the forms of the layers that read many tokens per call. `tests/test_prefill.py` runs each form beside the recurrence
in fp64, the reference of the convolution, single steps and transformers; `tests/test_contracts.py` sends some through
`zoo gate` on a real asset.
"""

_AROUND = """\
Made on purpose in a bundle as a build would have left it, its hashes recorded again, or in the weight store's
fingerprint: `tests/test_product_mutants.py` and `tests/test_fingerprint.py`. A dozen mistakes of all kinds, parts of
the gate among them, go through `zoo build` and `zoo gate` on a real asset in `tests/test_gate_command.py`.
"""


_TAIL = """
## Not mutants

* **A constant offset on all RoPE positions** changes nothing: RoPE depends on the distance of query and key only. The
  off-by-one mutants therefore shift queries against keys, or where keys are written.
* **Router softmax after top-k** is the same as before it with renormalisation: the sum that divides cancels.
* **A cast to bf16 and straight back to fp16**, as of keys, values or cosines: the toolchain folds the pair, so that it
  is in no asset. In PyTorch it rounds about as much as half precision does anyway.
* **The delta rule given the fp16 state without a cast** changes nothing: its decay is in fp32, and so is what it makes
  of both.
* **The order in which key / value heads are repeated** cannot show on samples with one key / value head; random
  architectures with up to three are compared with transformers in `tests/test_parity.py`.
"""


def caught(text: str) -> dict[tuple[str, str], str]:
    """From the document's first table: what caught each mutant on each sample."""
    found = {}
    for line in text.partition("\n## Refused before")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 2 + len(BOTH) and cells[0].startswith("`"):
            for kind, cell in zip(BOTH, cells[2:], strict=True):
                if cell != "-":
                    found[cells[0].strip("`"), kind] = cell.rpartition(": ")[0]
    return found


def _measures(name: str, outcome: Outcome) -> str:
    verdict, hidden = outcome.verdict, outcome.verdict.hidden_error or ()
    numbers = [
        np.median([p.relative_error for p in verdict.positions]),
        max(p.relative_error for p in verdict.positions),
        min(p.cosine for p in verdict.positions),
        np.median([p.kl_divergence for p in verdict.positions]),
        max(p.kl_divergence for p in verdict.positions),
        max(hidden, default=math.nan),
    ]
    counts = f"{len(verdict.confident_flips):3d} flips {verdict.ties:3d} ties"
    return f"{name:36s} {counts} {' '.join(f'{n:9.3g}' for n in numbers)}  {outcome.caught_by}"


def main() -> None:
    """Print the document, or with --measures every measure."""
    from precision_mutants import GOLDEN, PRECISION

    outcomes: dict[tuple[str, str], Outcome] = {}
    mutants = [UNTOUCHED, *MUTANTS.values(), *(each for each in PRECISION.values() if each.on != GOLDEN)]
    with tempfile.TemporaryDirectory() as work:
        target = targets_in(Path(work))
        for mutant in mutants:
            for kind in mutant.kinds:
                outcomes[mutant.name, kind] = target(kind, mutant.on).attack(mutant)
                if "--measures" in sys.argv:
                    print(_measures(f"{kind} {mutant.name}", outcomes[mutant.name, kind]), flush=True)
    escaped = [key for key, outcome in outcomes.items() if (outcome.caught_by is None) != (key[0] == "untouched")]
    if escaped:
        sys.exit(f"wrong verdicts: {json.dumps(escaped)}")
    if "--measures" not in sys.argv:
        print(document(outcomes), end="")


if __name__ == "__main__":
    main()
