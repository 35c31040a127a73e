"""`zoo run` reads a prompt as an engine does, and says how fast prompt and answer went."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from tokenizers import Tokenizer

from checkpoints import tiny_checkpoint
from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIStepper
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.json_files import write_json
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
    prompt, answer, remark, _next = result.stderr.splitlines()
    read, seconds, rate = told(prompt, "token")
    assert prompt.startswith("prompt: ") and prompt.endswith(", all but the last token by prefill in 2 calls")
    assert read == tokens and rate == pytest.approx(tokens / seconds, rel=0.05)
    assert answer.startswith("answer: 5 tokens; 4 steps in ")
    assert told(answer, "step")[0] == 4
    assert remark == "An interpreter runs this: its rates say nothing about a Mac."
    assert "tokens/s" not in result.stdout


def test_a_bundle_without_prefill_reads_its_prompt_token_by_token(
    built: Callable[[str, str], Bundle], calls: list[tuple[str, int]]
) -> None:
    bundle = built(DENSE, "int8hu")
    calls.clear()  # of its verification, where it was built just now
    tokens = len(tokenizer_of(bundle).encode("import ").ids)
    result = zoo("run", bundle.directory, "-p", "import ", "-n", "1")
    assert calls == [("main", 1)] * tokens
    prompt, answer, _remark, _next = result.stderr.splitlines()
    assert told(prompt, "token")[0] == tokens
    assert prompt.endswith(", token by token")
    assert answer == "answer: 1 token, which came with the prompt: no rate; cut there, as --max-tokens says"


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


# ---------------------------------------------------------------------------------------------------------------------
# What is asked
# ---------------------------------------------------------------------------------------------------------------------

SHORT = "def main("


@pytest.fixture(scope="module")
def short(built: Callable[[str, str], Bundle]) -> tuple[Bundle, str]:
    """A bundle, and what it writes behind the short prompt in twelve tokens."""
    bundle = built(DENSE, "int8hu")
    result = zoo("run", bundle.directory, "-p", SHORT, "-n", "12")
    assert result.exit_code == 0 and result.stdout.startswith(SHORT)
    return bundle, result.stdout.removeprefix(SHORT).removesuffix("\n")


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_prompt_is_given_as_text_or_by_a_file_or_by_a_pipe(
    short: tuple[Bundle, str], tmp_path: Path, ending: str
) -> None:
    bundle, text = short
    (tmp_path / "prompt.txt").write_bytes((SHORT + ending).encode())
    for place in (("-f", tmp_path / "prompt.txt"), ("-f", "-"), ()):
        result = zoo("run", bundle.directory, *place, "--max-tokens", "2", stdin=SHORT + ending)
        written = result.stdout.removeprefix(SHORT).removesuffix("\n")
        assert result.exit_code == 0 and written and text.startswith(written), (place, result.output)
        assert result.stdout == f"{SHORT}{written}\n"


@pytest.mark.parametrize(
    ("options", "stdin", "words"),
    [
        (("-p", "a", "-f", "b.txt"), None, "There are two prompts: one in -p and one in -f."),
        (("-f", "no-such-file.txt"), None, "The prompt no-such-file.txt cannot be read: No such file"),
        ((), b"\xff\xfe", "The prompt on stdin cannot be read as UTF-8 text"),
        ((), b"\n", "The prompt is empty."),
        (("-p", "a", "--stop", ""), None, "--stop is empty."),
    ],
)
def test_a_prompt_that_is_none_is_refused(
    short: tuple[Bundle, str], options: tuple[str, ...], stdin: bytes | None, words: str
) -> None:
    result = zoo("run", short[0].directory, *options, stdin=stdin)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr


def events(result: Result) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """The first event, those of tokens, and the last one."""
    assert result.exit_code == 0, result.output
    start, *tokens, end = [json.loads(line) for line in result.stdout.splitlines()]
    assert (start["event"], {each["event"] for each in tokens} <= {"token"}, end["event"]) == ("start", True, "end")
    return start, tokens, end


def test_events_tell_each_token_and_how_it_ended(short: tuple[Bundle, str]) -> None:
    bundle, text = short
    start, tokens, end = events(zoo("run", bundle.directory, "-p", SHORT, "-n", "12", "--json"))
    assert (start["bundle"], start["max_tokens"], start["sampling"]["temperature"]) == (bundle.directory.name, 12, 0.0)
    assert "".join(each["text"] for each in tokens) == text
    ids = [each["id"] for each in tokens if each["id"] is not None]
    assert tokenizer_of(bundle).decode(ids) == text
    assert (end["reason"], end["answer_tokens"], end["steps"]) == ("length", 12, 11)
    assert end["answer_rate"] == pytest.approx(11 / end["answer_seconds"])


@pytest.mark.parametrize("length", [1, 6])
def test_an_answer_ends_before_a_text_in_whatever_tokens_it_comes(short: tuple[Bundle, str], length: int) -> None:
    bundle, text = short
    at = next(at for at in range(4, len(text)) if text.find(text[at : at + length]) == at)
    stop = text[at : at + length]
    options = ("run", bundle.directory, "-p", SHORT, "-n", "12", "--stop", stop, "--stop", "not there at all")
    _start, tokens, end = events(zoo(*options, "--json"))
    assert end["reason"] == "stop-text" and end["answer_tokens"] < 12
    assert "".join(each["text"] for each in tokens) == text[:at]
    assert zoo(*options).stdout == f"{SHORT}{text[:at]}\n"


def test_an_answer_ends_with_the_context(short: tuple[Bundle, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, text = short
    tokens = len(tokenizer_of(bundle).encode(SHORT).ids)
    monkeypatch.setattr(Bundle, "max_context", property(lambda _: tokens + 3))
    _start, told_tokens, end = events(zoo("run", bundle.directory, "-p", SHORT, "--json"))
    assert (end["reason"], end["answer_tokens"]) == ("context", 3)
    assert text.startswith("".join(each["text"] for each in told_tokens))


# ---------------------------------------------------------------------------------------------------------------------
# What the checkpoint says of sampling
# ---------------------------------------------------------------------------------------------------------------------


def of_checkpoint(folder: Path, stated: object) -> Path:
    """A bundle of the tiny model, whose checkpoint states that of sampling."""
    checkpoint = tiny_checkpoint(folder / "checkpoint")
    if stated is not None:
        write_json(checkpoint / "generation_config.json", stated)
    result = zoo("build", DENSE, "--custom", "--checkpoint", checkpoint, "-o", folder / "out", "--json")
    assert result.exit_code == 0, result.output
    return Path(json.loads(result.stdout)["path"])


def test_a_bundle_samples_as_its_checkpoint_says_and_is_the_same_bytes(tmp_path: Path) -> None:
    stated = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": "most", "min_p": -1}
    plain, bundle = of_checkpoint(tmp_path / "plain", None), of_checkpoint(tmp_path / "stated", stated)
    record = json.loads((bundle / "build.json").read_text())
    assert [note for note in record["notes"] if "generation_config.json" in note] == [
        "top_p in generation_config.json is 'most', not a number above 0 and at most 1: not used",
        "min_p in generation_config.json is -1, not a number from 0 to 1: not used",
    ]
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    copied = files.pop("tokenizer/generation_config.json")
    changed = {name for name, path in files.items() if (plain / name).read_bytes() != path.read_bytes()}
    assert changed <= {"build.json", "README.md"} and len(files) > 5

    run = ("run", bundle, "-p", "def", "-n", "8")
    default, other, greedy = zoo(*run), zoo(*run, "--seed", "1"), zoo(*run, "--temperature", "0")
    said = "Sampling as the checkpoint says: temperature 0.7, top-k 20; --temperature 0 takes the most probable token."
    assert default.stderr.splitlines().count(said) == 1 and said not in greedy.stderr
    assert default.stdout == zoo(*run).stdout != other.stdout
    assert greedy.stdout == zoo("run", plain, "-p", "def", "-n", "8").stdout

    write_json(copied, stated | {"temperature": 0.1})
    verified = zoo("verify", bundle, "--checkpoint", tmp_path / "stated" / "checkpoint")
    assert verified.exit_code == 1 and "generation_config.json" in verified.output
