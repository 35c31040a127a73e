"""A conversation with a bundle: turns in its own chat template, each read where the states of the last one ended.

Every turn is the whole conversation, rendered and tokenized as transformers does it. Where that begins with what the
states have read, the rest is read; otherwise all of it is, since a recurrent state cannot go back. So what is answered
never depends on what happened to be read before.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence

from attrs import define, field, frozen

from coreai_zoo.backend import Backend, require_room
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.generate import (
    Limits,
    Pace,
    TextFinder,
    Writer,
    chat_text,
    require_chat_template,
)
from coreai_zoo.bundle.sampling import Chooser, Sampling
from coreai_zoo.checkpoint.chat_template import find_chat_template, template_variables
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput
from coreai_zoo.progress import Reporter

_FIRST_CAPACITY = 256
"""Positions that there is room for at first, as in engines."""

_THINKING = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
)
"""What stands around the thinking of a model, in the answers of one that thinks."""

# The variables by which templates let a user decide: whether the model thinks, and whether its earlier thinking stays.
_THINK, _KEEP_THINKING = "enable_thinking", "preserve_thinking"


@frozen
class Said:
    """A piece of an answer as it comes.

    Attributes:
        text: its text.
        thinking: whether it is thinking, the marks around it included.
    """

    text: str
    thinking: bool


@define
class Conversation:
    """Turns of a user and a model.

    Attributes:
        writer: the bundle, loaded.
        choose: chooses each token.
        marks: what stands around thinking; None where the bundle knows no such thing.
        variables: of the chat template.
        system: the instruction before all turns; None for none.
        turns: (role, content) of what was said, the thinking included.
    """

    writer: Writer
    choose: Chooser
    marks: tuple[str, str] | None
    variables: Mapping[str, object]
    system: str | None = None
    turns: list[tuple[str, str]] = field(factory=list)

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        bundle: Bundle,
        backend: Backend,
        sampling: Sampling | None = None,
        *,
        system: str | None = None,
        think: bool = True,
    ) -> Iterator[Conversation]:
        """A conversation that begins; within the block, the bundle is loaded.

        Args:
            bundle: the bundle.
            backend: the backend that it was written by.
            sampling: the choice of a token; None for the most probable one.
            system: the instruction before all turns.
            think: whether the model may think, where it does.

        Raises:
            BadInput: when there is no chat template, or it takes no instruction or cannot switch thinking off.
        """
        variables = _variables(bundle, think=think)
        tokenizer = load_tokenizer(bundle.tokenizer)
        _try(bundle, system, variables)
        choose = Chooser(sampling or Sampling())
        with Writer.open(bundle, backend, tokenizer, _FIRST_CAPACITY) as writer:
            yield cls(writer, choose, _marks(bundle, tokenizer.get_vocab()), variables, system)

    @property
    def bundle(self) -> Bundle:
        """The bundle."""
        return self.writer.bundle

    @property
    def messages(self) -> list[dict[str, str]]:
        """The instruction and all turns, as programs take them: without thinking that has no thought in it."""
        empty = None if self.marks is None else rf"^{re.escape(self.marks[0])}\s*{re.escape(self.marks[1])}\s*"
        return [
            {"role": role, "content": re.sub(empty, "", content) if empty and role == "assistant" else content}
            for role, content in self._with([])
        ]

    def reset(self) -> None:
        """Forget all turns. The instruction stays."""
        self.turns.clear()
        self.writer.reader.reset()

    def instruct(self, system: str | None) -> None:
        """Give another instruction, also for the turns so far; None for none.

        Raises:
            BadInput: when the chat template takes none. The one before stays.
        """
        _try(self.bundle, system, self.variables)
        self.system = system

    def answer(self, message: str, limits: Limits, pace: Pace, report: Reporter | None = None) -> Iterator[Said]:
        """The answer to a message, piece by piece. When it is over, both are turns of the conversation.

        Where the user ends it while the message is read, there is no answer, and the message is forgotten.

        Args:
            message: what the user says.
            limits: end the answer.
            pace: is filled in on the way.
            report: is told how far the message is read.

        Raises:
            BadInput: when the conversation does not fit the context, or the template does not take it. The message is
                forgotten.
        """
        asked = [("user", message)]
        text = chat_text(self.bundle, self._with(asked), answer_follows=True, variables=self.variables)
        tokens = encode(self.writer.tokenizer, text)
        hint = f"begin anew with /reset, or build the bundle with --max-context {len(tokens) + 1} or above"
        require_room(len(tokens), self.bundle.max_context, hint)
        said = _Answer(self.marks, self._begun(self._with(asked), text))
        for piece in self.writer.write(tokens, self.choose, limits, pace, report or Reporter(silent=True)):
            yield from said.add(piece.text)
        yield from said.ended()
        if pace.answer_tokens or pace.reason != "interrupted":
            self.turns += [*asked, ("assistant", said.content)]

    def _with(self, turns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        return [*_instruction(self.system), *self.turns, *turns]

    def _begun(self, turns: Sequence[tuple[str, str]], prompt: str) -> str:
        """The thinking that a prompt begins for the answer, or begins and ends; empty where it leaves it all to that.

        What a template puts there is part of the answer when it is rendered as a turn.
        """
        if self.marks is None:
            return ""
        try:
            answered = chat_text(self.bundle, turns, variables=self.variables)
        except BadInput:  # a template may want an answer there
            answered = ""
        answer = prompt[len(answered) :] if answered and prompt.startswith(answered) else ""
        return answer[answer.index(self.marks[0]) :] if self.marks[0] in answer else ""


class _Answer:
    """What is said in an answer, and what of it is thinking.

    Args:
        marks: what stands around thinking; None for none.
        begun: how the prompt begins it. Thinking that is over there already, without a thought, is not shown.
    """

    def __init__(self, marks: tuple[str, str] | None, begun: str) -> None:
        self._marks = marks
        self._finder = TextFinder(marks or ())
        over = marks is not None and marks[1] in begun
        self.content, self._begun = (begun, "") if over else ("", begun)
        self._thinking = False

    def add(self, text: str) -> Iterator[Said]:
        """A piece of it, in parts that are thinking and parts that are not; what the prompt has begun comes first."""
        text, self._begun = self._begun + text, ""
        self.content += text
        for part, is_mark in self._finder.feed(text):
            if is_mark and self._marks:
                self._thinking = part == self._marks[0]
            if part:
                yield Said(part, self._thinking or is_mark)

    def ended(self) -> Iterator[Said]:
        """What was held back. Thinking that was cut short is closed, or the next turn would be read as thinking."""
        if rest := self._finder.rest():
            yield Said(rest, self._thinking)
        if self._thinking and self._marks:
            # As models close it, so that what the states have read stays the beginning of the conversation.
            self.content = f"{self.content.rstrip()}\n{self._marks[1]}\n\n"


def _instruction(system: str | None) -> list[tuple[str, str]]:
    return [] if system is None else [("system", system)]


def _try(bundle: Bundle, system: str | None, variables: Mapping[str, object]) -> None:
    """Refuse an instruction that the chat template does not take, with any message.

    Raises:
        BadInput: saying so.
    """
    try:
        chat_text(bundle, [*_instruction(system), ("user", "Question")], answer_follows=True, variables=variables)
    except BadInput as error:
        hint = "Mend the checkpoint's chat template and build the bundle again."
        raise BadInput(error.message, hint if system is None else f"Leave out the instruction. {hint}") from error


def _variables(bundle: Bundle, *, think: bool) -> dict[str, object]:
    """The variables that the bundle's chat template is given, of those that it reads.

    Raises:
        BadInput: when thinking is to be off, and the template knows no such thing; when there is no template.
    """
    try:
        require_chat_template(bundle)
    except BadInput as error:
        raise BadInput(error.message, "`zoo run` continues plain text.") from error
    template = find_chat_template(bundle.tokenizer)
    known = frozenset[str]() if template is None else template_variables(template)
    if not think and _THINK not in known:
        raise BadInput(
            f"The chat template of {bundle.directory.name} does not read {_THINK}, so that thinking cannot be switched "
            "off.",
            "Leave out --no-think.",
        )
    # Templates that drop earlier thinking would have every turn read the whole conversation again.
    return {**({_KEEP_THINKING: True} if _KEEP_THINKING in known else {}), **({} if think else {_THINK: False})}


def _marks(bundle: Bundle, vocabulary: Mapping[str, int]) -> tuple[str, str] | None:
    """What stands around thinking in the answers of a bundle: the first pair that its template or tokenizer knows."""
    template = find_chat_template(bundle.tokenizer)
    text = "" if template is None else template.text
    return next((pair for pair in _THINKING if pair[1] in text or all(mark in vocabulary for mark in pair)), None)
