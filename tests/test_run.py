"""`zoo run` reads a prompt as an engine does, and says how fast prompt and answer went."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from tokenizers import Tokenizer

from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIStepper
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.progress import Reporter
from player import Player
from shared import Shared
from test_contracts import build

pytestmark = pytest.mark.slow

DENSE = "qwen3.6-27b"
# 300 tokens and more of the sample's vocabulary: two calls of a prefill that takes 256 at the most.
PROMPT = "def main(argv):\n    for name in argv:\n        print(name)\n\n" * 12


@pytest.fixture(scope="module")
def chunked(shared: Shared) -> Bundle:
    """The sample of the contract `chunked`; the tests of contracts play the same one."""
    folder = shared.folder(f"{DENSE}-chunked-played", functools.partial(build, DENSE, "chunked"))
    (bundle,) = folder.iterdir()
    return Bundle.open(bundle)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every call of a function on the runtime from now on: its name and its number of tokens."""
    return record_calls(monkeypatch)


def record_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    made: list[tuple[str, int]] = []
    real = CoreAIStepper.call

    def call(self: CoreAIStepper, function: str, tokens: Sequence[int]) -> np.ndarray[Any, Any] | None:
        made.append((function, len(tokens)))
        return real(self, function, tokens)

    monkeypatch.setattr(CoreAIStepper, "call", call)
    return made


@pytest.fixture(scope="module")
def answered(chunked: Bundle) -> tuple[Result, list[tuple[str, int]]]:
    """`zoo run` with the long prompt for five tokens, and the calls that it made."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        made = record_calls(monkeypatch)
        return zoo("run", chunked.directory, "-p", PROMPT, "-n", "5"), made


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    return Tokenizer.from_file(str(bundle.tokenizer / "tokenizer.json"))


def told(line: str, what: str) -> tuple[int, float, float]:
    """What a line says: a number, the seconds that it took, and the rate."""
    found = re.search(rf"(\d+) {what}s? in (\d+\.\d\d) s, (\d+\.\d) {what}s/s", line)
    assert found is not None, line
    return int(found[1]), float(found[2]), float(found[3])


def test_a_prompt_is_read_and_answered_in_the_calls_of_an_engine(
    chunked: Bundle, answered: tuple[Result, list[tuple[str, int]]]
) -> None:
    result, calls = answered
    tokens = tokenizer_of(chunked).encode(PROMPT).ids
    assert 256 < len(tokens) - 1 <= 512
    with Player(chunked.directory) as player:
        answer = player.answer(tokens, 5)
    assert result.exit_code == 0, result.output
    assert calls == player.calls
    half = (len(tokens) - 1) // 2
    assert calls[:2] == [("prefill", len(tokens) - 1 - half), ("prefill", half)]
    assert calls[2:] == [("main", 1)] * 5
    assert result.stdout == PROMPT + tokenizer_of(chunked).decode(answer) + "\n"


def test_the_rates_of_prompt_and_answer_are_told_apart_on_stderr(
    chunked: Bundle, answered: tuple[Result, list[tuple[str, int]]]
) -> None:
    result, _calls = answered
    tokens = len(tokenizer_of(chunked).encode(PROMPT).ids)
    prompt, answer, remark = result.stderr.splitlines()
    read, seconds, rate = told(prompt, "token")
    assert prompt.startswith("prompt: ") and prompt.endswith(", all but the last token by prefill in 2 calls")
    assert read == tokens and rate == pytest.approx(tokens / seconds, rel=0.05)
    assert answer.startswith("answer: 5 tokens; 4 steps in ")
    assert told(answer, "step")[0] == 4
    assert remark == "An interpreter ran this: its rates say nothing about a Mac."
    assert "tokens/s" not in result.stdout


def test_a_bundle_without_prefill_reads_its_prompt_token_by_token(
    built: Callable[[str, str], Bundle], calls: list[tuple[str, int]]
) -> None:
    bundle = built(DENSE, "int8hu")
    calls.clear()  # of its verification, where it was built just now
    tokens = len(tokenizer_of(bundle).encode("import ").ids)
    result = zoo("run", bundle.directory, "-p", "import ", "-n", "1")
    assert calls == [("main", 1)] * tokens
    prompt, answer, _remark = result.stderr.splitlines()
    assert told(prompt, "token")[0] == tokens
    assert prompt.endswith(", token by token")
    assert answer == "answer: 1 token, which came with the prompt: no rate"


def test_an_answer_of_nothing_but_its_end_is_told_as_such(built: Callable[[str, str], Bundle]) -> None:
    bundle = built(DENSE, "int8hu")
    turn = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n42"
    result = zoo("run", bundle.directory, "-p", turn, "-n", "3")
    assert result.stdout == turn + "\n"
    assert result.stderr.splitlines()[1] == "answer: 0 tokens: it ended at once"


@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
def test_a_temperature_that_is_none_is_refused_before_anything_is_printed(chunked: Bundle, number: str) -> None:
    result = zoo("run", chunked.directory, "-p", "import ", "--temperature", number)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Invalid value for '--temperature': " in result.stderr


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused_before_it_is_printed(
    chunked: Bundle, monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, int]]
) -> None:
    tokens = len(tokenizer_of(chunked).encode("import os").ids)
    monkeypatch.setattr(Bundle, "max_context", property(lambda _: tokens))
    result = zoo("run", chunked.directory, "-p", "import os")
    assert (result.exit_code, result.stdout, calls) == (2, "", [])
    assert result.stderr == (
        f"error: A prompt of {tokens} tokens leaves no room for an answer in a context of {tokens}: the longest is "
        f"{tokens - 1}. Shorten it, or build the bundle with --max-context {tokens + 1} or above.\n"
    )


def test_a_terminal_shows_how_far_a_prompt_is_read_and_a_pipe_does_not(
    chunked: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[tuple[str, int, int]] = []

    class Watched(Reporter):
        @contextlib.contextmanager
        def steps(self, what: str, total: int) -> Iterator[Callable[[], None]]:
            counted = itertools.count(1)
            silent = self._console.quiet
            yield lambda: None if silent else steps.append((what, next(counted), total))

    monkeypatch.setattr("coreai_zoo.cli.run.Reporter", Watched)
    assert zoo("run", chunked.directory, "-p", "import os", "-n", "1").exit_code == 0
    assert steps == []
    monkeypatch.setattr("coreai_zoo.cli.run.shows_progress", lambda: True)
    assert zoo("run", chunked.directory, "-p", PROMPT, "-n", "1").exit_code == 0
    assert steps == [("reading the prompt", call, 3) for call in (1, 2, 3)]
