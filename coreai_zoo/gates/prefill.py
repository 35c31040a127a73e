"""Does the function that reads prompts leave behind what single steps would?

`prefill` gives no logits, so it is judged by those that come behind it. Its decoder in PyTorch does give them, for
every position: that one reads all prompts, on the asset's own weights, and is held to the bounds of any candidate.
Where the asset itself is run, it reads a text piece by piece, with tokens decoded in between, whose logits are judged.
The pieces are as long as a mistake at the edge of a chunk needs, all but the first begin behind others, and the cache
holds what is no number wherever no token has been: there it must neither be read nor written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from coreai_zoo.backend import Backend, Stepper, call_prefill
from coreai_zoo.bounds import Bounds
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.contracts import Prefill
from coreai_zoo.errors import listing
from coreai_zoo.gate import Activations, GateResult
from coreai_zoo.gates.bounds import broken, check_bounds
from coreai_zoo.gates.rule import compare, flips_told
from coreai_zoo.gates.teacher_forced import Reference, Runner, flips_allowed_on
from coreai_zoo.progress import Reporter

NAME = "prefill"
"""Of the gate, in reports."""

DECODED = 2
"""Tokens that are decoded behind each piece."""

_SHOWN = 3
_FREE = 24  # tokens of the longest piece where the contract has no chunks


@frozen
class PrefillGate:
    """How a function that reads prompts is judged.

    Attributes:
        experts_per_token: how many a router chooses; None without one.
    """

    experts_per_token: int | None

    def judge_overlay(
        self, overlay: Runner, references: Sequence[Reference], bounds: Bounds, report: Reporter
    ) -> list[str]:
        """Flips and broken bounds of its decoder in PyTorch on prompts, a phrase each."""
        found = overlay.run([reference.prompt for reference in references], NAME, report)
        problems = []
        for reference in references:
            name, places = reference.prompt.name, range(len(reference.prompt.tokens))
            problems += [f"{name}: {problem}" for problem in self._told(reference, places, found[name], bounds)]
        return problems

    def judge_asset(
        self, bundle: Bundle, backend: Backend, prefill: Prefill, longest: Reference, bounds: Bounds, report: Reporter
    ) -> list[str]:
        """Flips, broken bounds and other faults of the asset on the longest of the prompts, a phrase each."""
        tokens = longest.prompt.tokens
        pieces = pieces_with_room(len(tokens), prefill)
        lengths = listing([str(piece) for piece in pieces])
        told = f"{bundle.asset.name} on the {backend.runtime} runtime, {lengths} tokens at once"
        with report.stage(NAME, told), backend.stepper(bundle.asset, bundle.functions, len(tokens) + 1) as stepper:
            places, logits = _read(stepper, bundle, tokens, pieces)
            problems = [*_unwritten(stepper, bundle, places[-1] + 1)]
        return self._told(longest, places, Activations(logits), bounds) + problems

    def _told(self, reference: Reference, places: Sequence[int], found: Activations, bounds: Bounds) -> list[str]:
        """What breaks the rule or a bound at some positions of a prompt; `found` is of these alone."""
        tokens = [reference.prompt.tokens[at] for at in places]
        verdict = compare(tokens, _at(reference.activations, places), found, self.experts_per_token, bounds.margin)
        allowed = flips_allowed_on(reference.prompt, verdict, routed=self.experts_per_token is not None)
        flips = flips_told(verdict) if len(verdict.confident_flips) > allowed else []
        return [*flips, *broken(check_bounds(verdict, bounds))]


def verdict(problems: list[str], read: str) -> GateResult:
    """The verdict on all that was read."""
    if problems:
        return GateResult(NAME, passed=False, summary=f"{read}: {listing(problems, _SHOWN, '; ')}")
    return GateResult(NAME, passed=True, summary=f"{read}: within the bounds")


def edge_lengths(prefill: Prefill) -> tuple[int, ...]:
    """Lengths at which a mistake shows: a chunk and a token more or less, a single token, as many as a call takes."""
    most = prefill.most_tokens
    if most is None:
        return (_FREE, 3, 1)
    chunk = most if prefill.chunk in (None, 1) else prefill.chunk
    edges = (min(chunk + 1, most), chunk, chunk - 1, 1)
    return edges if chunk == most else (*edges, most)


def uneven_pieces(tokens: int, prefill: Prefill) -> list[int]:
    """The pieces in which a text is read whole: of these lengths in turn, the last one cut."""
    ends = itertools.takewhile(lambda end: end < tokens, itertools.accumulate(itertools.cycle(edge_lengths(prefill))))
    return [end - start for start, end in itertools.pairwise((0, *ends, tokens))]


def pieces_with_room(tokens: int, prefill: Prefill) -> list[int]:
    """The pieces of a text behind each of which tokens are decoded: of each length one, as far as the text goes."""
    pieces: list[int] = []
    for length in edge_lengths(prefill):
        left = tokens - sum(pieces) - DECODED * (len(pieces) + 1)
        pieces += [min(length, left)] * (left > 0)
    return pieces


def _read(
    stepper: Stepper, bundle: Bundle, tokens: Sequence[int], pieces: Sequence[int]
) -> tuple[list[int], np.ndarray[Any, Any]]:
    """Read pieces by `prefill`, decode behind each; the positions that were decoded, and their logits [P, V]."""
    stepper.reset(float("nan"))
    at = 0
    places: list[int] = []
    rows: list[np.ndarray[Any, Any]] = []
    for piece in pieces:
        call_prefill(stepper, bundle.functions, tokens[at : at + piece])
        behind = range(at + piece, at + piece + DECODED)
        rows += [stepper.step(tokens[place]) for place in behind]
        places += behind
        at = behind.stop
    return places, np.stack(rows)


def _unwritten(stepper: Stepper, bundle: Bundle, positions: int) -> Iterator[str]:
    """The caches that were written behind the last position, a phrase each."""
    for state in bundle.signature.states:
        if state.kind == "kv_cache" and not np.isnan(stepper.state(state.name)[:, :, :, positions:]).all():
            yield f"{state.name} is written behind the {positions} positions so far"


def _at(activations: Activations, places: Sequence[int]) -> Activations:
    """What a model shows at some positions."""

    def rows(layers: Sequence[np.ndarray[Any, Any]] | None) -> list[np.ndarray[Any, Any]] | None:
        return None if layers is None else [layer[list(places)] for layer in layers]

    return Activations(activations.logits[list(places)], rows(activations.hidden), rows(activations.router_logits))
