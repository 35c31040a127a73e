"""Text from a bundle: its tokenizer, its asset, and one token after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from attrs import define, field, frozen

from coreai_zoo.backend import Backend, Stepper, prefill_calls, read_prompt, reading_calls, require_room
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.sampling import Chooser, Logits, Sampling
from coreai_zoo.checkpoint.chat_template import find_chat_template, render_chat
from coreai_zoo.checkpoint.end_of_turn import end_tokens
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput
from coreai_zoo.progress import Reporter
from coreai_zoo.signature import TraceSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Reason = Literal["stop-token", "stop-text", "length", "context", "interrupted"]
"""Why an answer is over: its model ended it, a text that was to stop it, its limit, the context, or the user."""


@frozen
class Piece:
    """A piece of an answer.

    Attributes:
        text: text that is certain by now; empty while a character, or a text that may stop the answer, is incomplete.
        token: the token that came; None for what was held back and comes at the end.
    """

    text: str
    token: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# What has been read
# ---------------------------------------------------------------------------------------------------------------------


@define
class RememberingStepper:
    """A stepper that knows which tokens its states have read, and makes room when they are full.

    Attributes:
        stepper: what it steps.
        functions: the signatures of its functions.
        capacity: positions that there is room for.
        most: positions that there may be room for.
        tokens: what the states have read.
        sure: whether that is all that they have read: not where a call broke off.
    """

    stepper: Stepper
    functions: Mapping[str, TraceSpec]
    capacity: int
    most: int
    tokens: list[int] = field(factory=list)
    sure: bool = True

    def step(self, token: int) -> Logits:
        """See `Stepper.step`."""
        with self._reading([token]):
            return self.stepper.step(token)

    def call(self, function: str, tokens: Sequence[int]) -> Logits | None:
        """See `Stepper.call`."""
        with self._reading(tokens):
            return self.stepper.call(function, tokens)

    def reset(self, unwritten: float = 0.0) -> None:
        """See `Stepper.reset`."""
        self.stepper.reset(unwritten)
        self.tokens, self.sure = [], True

    def state(self, name: str) -> np.ndarray[Any, Any]:
        """See `Stepper.state`."""
        return self.stepper.state(name)

    def reserve(self, capacity: int) -> None:
        """See `Stepper.reserve`: room is doubled, as engines do it."""
        if capacity > self.capacity:
            self.capacity = max(capacity, min(2 * self.capacity, self.most))
            self.stepper.reserve(self.capacity)

    def rest_of(self, tokens: Sequence[int]) -> Sequence[int]:
        """What is still to be read of some tokens; the states are zeroed where they have read anything else."""
        read = len(self.tokens)
        if not self.sure or read >= len(tokens) or list(tokens[:read]) != self.tokens:
            self.reset()
        return tokens[len(self.tokens) :]

    @contextlib.contextmanager
    def _reading(self, tokens: Sequence[int]) -> Iterator[None]:
        self.reserve(len(self.tokens) + len(tokens))
        self.sure = False
        yield
        self.tokens += tokens
        self.sure = True


@define
class Pace:
    """How long a bundle took to read a prompt and to write its answer, in seconds of the runtime alone.

    Attributes:
        prompt_tokens: tokens of the prompt that were read.
        prompt_seconds: until there were logits behind its last one.
        prefill_calls: calls of `prefill`, which read all of it but the last token; 0 where every token is decoded.
        held: tokens before them, which the states had read already.
        forgotten: tokens that the states had read as well, and that the prompt does not begin with.
        answer_tokens: tokens of the answer; the logits behind the prompt choose the first one.
        steps: tokens that were decoded for the others, and to see that the answer ends.
        answer_seconds: of these steps.
        reason: why the answer is over; None while it is not.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    prefill_calls: int = 0
    held: int = 0
    forgotten: int = 0
    answer_tokens: int = 0
    steps: int = 0
    answer_seconds: float = 0.0
    reason: Reason | None = None

    def read(
        self,
        reader: RememberingStepper,
        tokens: Sequence[int],
        report: Reporter,
        check: Callable[[], None] = lambda: None,
    ) -> Logits:
        """Read what is new of a prompt as an engine does, and report how far it is.

        Args:
            reader: reads it.
            tokens: the whole prompt.
            report: is told how far it is.
            check: is called after each call, and may raise.

        Returns:
            The logits after its last token, [V].
        """
        before = len(reader.tokens)
        rest = reader.rest_of(tokens)
        self.held = len(tokens) - len(rest)
        self.forgotten = before - self.held
        self.prompt_tokens, self.prefill_calls = len(rest), len(prefill_calls(reader.functions, len(rest) - 1))
        with report.steps("reading the prompt", len(reading_calls(reader.functions, len(rest)))) as count:

            def called() -> None:
                count()
                check()

            started = time.perf_counter()
            try:
                return read_prompt(reader, reader.functions, rest, called)
            finally:
                self.prompt_tokens = len(reader.tokens) - self.held
                self.prompt_seconds = time.perf_counter() - started

    def step(self, reader: RememberingStepper, token: int) -> Logits:
        """Decode a token of the answer; the logits after it, [V]."""
        started = time.perf_counter()
        logits = reader.step(token)
        self.steps, self.answer_seconds = self.steps + 1, self.answer_seconds + time.perf_counter() - started
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


class TextFinder:
    """Finds texts in a stream, whatever pieces they come in.

    Args:
        texts: what is looked for; of two that begin at one place, the shorter one is found.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = [text for text in texts if text]
        self._held = ""

    def feed(self, piece: str) -> Iterator[tuple[str, bool]]:
        """Each text that is certain by now, and whether it is one of those that are looked for, in their order.

        The end of the stream may be the beginning of one: it is held back.
        """
        self._held += piece
        while found := min(self._places(), default=None):
            start, length = found
            if start:
                yield self._held[:start], False
            text, self._held = self._held[start : start + length], self._held[start + length :]
            yield text, True
        kept = max((self._begun(text) for text in self._texts), default=0)
        certain, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        if certain:
            yield certain, False

    def rest(self) -> str:
        """What is still held back, when nothing more comes."""
        rest, self._held = self._held, ""
        return rest

    def _places(self) -> Iterator[tuple[int, int]]:
        for text in self._texts:
            if (start := self._held.find(text)) >= 0:
                yield start, len(text)

    def _begun(self, text: str) -> int:
        """How many characters at the end are the beginning of a text."""
        longest = min(len(text) - 1, len(self._held))
        return next((count for count in range(longest, 0, -1) if self._held.endswith(text[:count])), 0)


@frozen
class Limits:
    """When an answer is over, beside the model's own end of turn and the end of the context.

    Attributes:
        tokens: tokens that it has at the most; None for any number.
        texts: texts before which it ends, in whatever tokens they come.
        interrupted: is asked after each call whether it is to end now.
    """

    tokens: int | None = None
    texts: Sequence[str] = ()
    interrupted: Callable[[], bool] = lambda: False


class _Interrupted(Exception):
    """The user wants no more of a prompt to be read."""


@frozen
class Writer:
    """A bundle that is loaded, with its tokenizer: it reads a prompt, and writes what follows.

    Attributes:
        bundle: the bundle.
        tokenizer: its tokenizer.
        reader: its asset.
        ends: the tokens that end a turn.
    """

    bundle: Bundle
    tokenizer: Tokenizer
    reader: RememberingStepper
    ends: frozenset[int]

    @classmethod
    @contextlib.contextmanager
    def open(cls, bundle: Bundle, backend: Backend, tokenizer: Tokenizer, capacity: int) -> Iterator[Writer]:
        """Load a bundle with room for so many positions; it makes more when it needs them."""
        ends, capacity = end_tokens(bundle.tokenizer).ids, min(capacity, bundle.max_context)
        with backend.stepper(bundle.asset, bundle.functions, capacity) as stepper:
            yield cls(
                bundle, tokenizer, RememberingStepper(stepper, bundle.functions, capacity, bundle.max_context), ends
            )

    def write(
        self, prompt: Sequence[int], choose: Chooser, limits: Limits, pace: Pace, report: Reporter
    ) -> Iterator[Piece]:
        """The answer to a prompt, piece by piece; `pace` says at the end why it is over.

        What the states have read already of the prompt is not read again. The last token of an answer is not read.

        Args:
            prompt: the tokens of the whole prompt, which leave room for an answer.
            choose: chooses each token.
            limits: end it.
            pace: is filled in on the way.
            report: is told how far the prompt is read.
        """
        finder = TextFinder(limits.texts)
        try:
            for token, piece in self._tokens(prompt, choose, limits, pace, report):
                certain: list[str] = []
                for text, found in finder.feed(piece):
                    if found:
                        pace.reason = "stop-text"
                        yield Piece("".join(certain), token)
                        return
                    certain.append(text)
                yield Piece("".join(certain), token)
        except _Interrupted:
            pace.reason = "interrupted"
        if rest := finder.rest():
            yield Piece(rest)

    def _tokens(
        self, prompt: Sequence[int], choose: Chooser, limits: Limits, pace: Pace, report: Reporter
    ) -> Iterator[tuple[int, str]]:
        """Each token of the answer, and the text that is complete with it."""
        from tokenizers.decoders import DecodeStream

        def check() -> None:
            if limits.interrupted():
                raise _Interrupted

        room = self.bundle.max_context - len(prompt)
        most = room if limits.tokens is None else min(room, limits.tokens)
        # The stream holds back bytes that are not yet a whole character.
        stream = DecodeStream(skip_special_tokens=True)
        logits = pace.read(self.reader, prompt, report, check)
        for left in range(most, 0, -1):
            token = choose(logits, self.reader.tokens)
            if token in self.ends:
                pace.reason = "stop-token"
                return
            pace.answer_tokens += 1
            yield token, stream.step(self.tokenizer, token) or ""
            check()
            if left > 1:
                logits = pace.step(self.reader, token)
        pace.reason = "length" if most == limits.tokens else "context"


def generate(
    bundle: Bundle,
    backend: Backend,
    prompt: str,
    limits: Limits,
    sampling: Sampling | None = None,
    pace: Pace | None = None,
    report: Reporter | None = None,
) -> Iterator[Piece]:
    """The text behind a prompt, piece by piece as it is generated, until one of its limits.

    The prompt is checked at once, and read with the first piece, as an engine reads it; see `read_prompt`.

    Args:
        bundle: the bundle.
        backend: the backend that it was written by.
        prompt: text to continue.
        limits: when it is over.
        sampling: the choice of a token; None for the most probable one.
        pace: is filled in on the way.
        report: is told how far the prompt is read.

    Raises:
        BadInput: when the prompt is empty or does not fit the context.
    """
    tokenizer = load_tokenizer(bundle.tokenizer)
    tokens = encode(tokenizer, prompt)
    if not tokens:
        raise BadInput("The prompt is empty.", 'Give one with -p "...", with -f FILE, or from a pipe.')
    hint = f"build the bundle with --max-context {len(tokens) + 1} or above"
    require_room(len(tokens), bundle.max_context, hint)
    choose, capacity = Chooser(sampling or Sampling()), len(tokens) + (limits.tokens or 0)

    def pieces() -> Iterator[Piece]:
        with Writer.open(bundle, backend, tokenizer, capacity) as writer:
            yield from writer.write(tokens, choose, limits, pace or Pace(), report or Reporter(silent=True))

    return pieces()


# ---------------------------------------------------------------------------------------------------------------------
# Chats
# ---------------------------------------------------------------------------------------------------------------------


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


def chat_text(
    bundle: Bundle,
    turns: Sequence[tuple[str, str]],
    *,
    answer_follows: bool = False,
    variables: Mapping[str, object] | None = None,
) -> str:
    """(role, content) turns in the bundle's chat template, with the beginning of the next answer where asked for.

    Raises:
        BadInput: when the bundle has no chat template, or it does not take these turns; why, without a hint.
    """
    require_chat_template(bundle)
    return render_chat(bundle.tokenizer, turns, answer_follows=answer_follows, variables=variables)


def require_chat_template(bundle: Bundle) -> None:
    """Refuse a bundle without a chat template.

    Raises:
        BadInput: with the reason why it has none, where its record says so; without a hint.
    """
    if find_chat_template(bundle.tokenizer) is None:
        recorded = bundle.build.get("tokenizer")
        changes = recorded.get("changes", ()) if isinstance(recorded, Mapping) else ()
        why = next(
            (f"; of its checkpoint, {change}" for change in changes if "chat template is left out" in change), ""
        )
        raise BadInput(f"{bundle.directory.name} has no chat template{why}.")
