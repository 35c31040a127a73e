"""Text from a bundle: its tokenizer, its asset, and the greedy choice or sampling of each token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from attrs import define, frozen

from coreai_zoo.backend import Backend, Stepper, prefill_calls, read_prompt, require_room
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.chat_template import find_chat_template, render_chat
from coreai_zoo.checkpoint.end_of_turn import end_tokens
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput, CheckFailed
from coreai_zoo.progress import Reporter
from coreai_zoo.signature import TraceSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Logits = np.ndarray[Any, Any]

# Dividing by less than this would overflow, and the most probable token is all that is left anyway.
_GREEDY = 1e-6


@frozen
class Sampling:
    """The choice of the next token.

    Attributes:
        temperature: 0 for the most probable token.
        seed: seed of the sampler.
    """

    temperature: float = 0.0
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BadInput(f"A temperature is a number of at least 0, not {self.temperature}.")


@define
class Pace:
    """How long a bundle took to read a prompt and to write its answer, in seconds of the runtime alone.

    Attributes:
        prompt_tokens: tokens of the prompt.
        prompt_seconds: until there were logits behind its last one.
        prefill_calls: calls of `prefill`, which read all of it but the last token; 0 where every token is decoded.
        answer_tokens: tokens of the answer; the logits behind the prompt choose the first one.
        steps: tokens that were decoded for the others, and to see that the answer ends.
        answer_seconds: of these steps.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    prefill_calls: int = 0
    answer_tokens: int = 0
    steps: int = 0
    answer_seconds: float = 0.0

    def read(
        self, stepper: Stepper, functions: Mapping[str, TraceSpec], tokens: Sequence[int], report: Reporter
    ) -> Logits:
        """Read a prompt as an engine does, and report how far it is; the logits after its last token, [V]."""
        self.prompt_tokens, self.prefill_calls = len(tokens), len(prefill_calls(functions, len(tokens) - 1))
        calls = self.prefill_calls + 1 if self.prefill_calls else len(tokens)
        with report.steps("reading the prompt", calls) as count:
            started = time.perf_counter()
            logits = read_prompt(stepper, functions, tokens, count)
            self.prompt_seconds = time.perf_counter() - started
        return logits

    def step(self, stepper: Stepper, token: int) -> Logits:
        """Decode a token of the answer; the logits after it, [V]."""
        started = time.perf_counter()
        logits = stepper.step(token)
        self.steps, self.answer_seconds = self.steps + 1, self.answer_seconds + time.perf_counter() - started
        return logits


def generate(
    bundle: Bundle,
    backend: Backend,
    prompt: str,
    new_tokens: int,
    sampling: Sampling | None = None,
    pace: Pace | None = None,
    report: Reporter | None = None,
) -> Iterator[str]:
    """Text piece by piece as it is generated, up to `new_tokens` tokens, any end of turn, or the end of the context.

    The prompt is checked at once, and read with the first piece, as an engine reads it; see `read_prompt`.

    Args:
        bundle: the bundle.
        backend: the backend that it was written by.
        prompt: text to continue.
        new_tokens: tokens that are generated at the most.
        sampling: the choice of a token; None for the most probable one.
        pace: is filled in on the way.
        report: is told how far the prompt is read.

    Raises:
        BadInput: when the prompt is empty or does not fit the context.
    """
    tokenizer = load_tokenizer(bundle.tokenizer)
    prompt_tokens = encode(tokenizer, prompt)
    if not prompt_tokens:
        raise BadInput("The prompt is empty.", 'Give one with -p "...".')
    hint = f"build the bundle with --max-context {len(prompt_tokens) + 1} or above"
    require_room(len(prompt_tokens), bundle.max_context, hint)
    choose = _chooser(sampling or Sampling())
    return _pieces(
        bundle, backend, tokenizer, prompt_tokens, new_tokens, choose, pace or Pace(), report or Reporter(silent=True)
    )


def _pieces(
    bundle: Bundle,
    backend: Backend,
    tokenizer: Tokenizer,
    prompt_tokens: Sequence[int],
    new_tokens: int,
    choose: Callable[[Logits], int],
    pace: Pace,
    report: Reporter,
) -> Iterator[str]:
    from tokenizers.decoders import DecodeStream

    stops = end_tokens(bundle.tokenizer).ids
    stream = DecodeStream(skip_special_tokens=True)
    capacity = min(bundle.max_context, len(prompt_tokens) + new_tokens)
    with backend.stepper(bundle.asset, bundle.functions, capacity) as stepper:
        logits = pace.read(stepper, bundle.functions, prompt_tokens, report)
        for left in range(capacity - len(prompt_tokens), 0, -1):
            token = choose(logits)
            if token in stops:
                return
            pace.answer_tokens += 1
            # The stream holds back bytes that are not yet a whole character.
            yield stream.step(tokenizer, token) or ""
            if left > 1:
                logits = pace.step(stepper, token)


def chat_prompt(bundle: Bundle, message: str) -> str:
    """One user message in the bundle's chat template, up to where the assistant begins.

    Raises:
        BadInput: when the bundle has no chat template, or it does not take the message.
    """
    try:
        return chat_text(bundle, [("user", message)], answer_follows=True)
    except BadInput as error:
        hint = "Leave out --chat, or mend the checkpoint's chat template and build the bundle again."
        raise BadInput(error.message, hint) from error


def chat_text(bundle: Bundle, turns: Sequence[tuple[str, str]], *, answer_follows: bool = False) -> str:
    """(role, content) turns in the bundle's chat template, with the beginning of the next answer where asked for.

    Raises:
        BadInput: when the bundle has no chat template, or it does not take these turns; why, without a hint.
    """
    if find_chat_template(bundle.tokenizer) is None:
        recorded = bundle.build.get("tokenizer")
        changes = recorded.get("changes", ()) if isinstance(recorded, Mapping) else ()
        why = next(
            (f"; of its checkpoint, {change}" for change in changes if "chat template is left out" in change), ""
        )
        raise BadInput(f"{bundle.directory.name} has no chat template{why}.")
    return render_chat(bundle.tokenizer, turns, answer_follows=answer_follows)


def _chooser(sampling: Sampling) -> Callable[[Logits], int]:
    """A function from logits [V] to the next token."""
    generator = np.random.default_rng(sampling.seed)

    def choose(logits: Logits) -> int:
        if not np.isfinite(logits).all():
            raise CheckFailed("The bundle computed logits that are not finite.", "Gate it: `zoo gate BUNDLE`.")
        if sampling.temperature < _GREEDY:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / sampling.temperature
        weights = np.exp(scaled - scaled.max())
        return int(generator.choice(len(weights), p=weights / weights.sum()))

    return choose
