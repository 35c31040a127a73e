"""`zoo chat`: turns that go on from the model's states and answer as transformers does, on samples.

What depends on what a model says is played by a runtime that says what it is told to; see `Scripted`.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer

from coreai_zoo import interruption
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.conversation import Conversation
from coreai_zoo.bundle.generate import Limits, Pace, TextFinder
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.cli.app import cli
from coreai_zoo.json_files import read_object, write_json
from coreai_zoo.plugins import default_plugins
from player import Player
from shared import Shared
from test_contracts import build
from test_run import record_calls

DENSE, ROUTED = "qwen3.6-27b", "qwen3.6-35b-a3b"

# Questions that the samples are sure of: along these turns the oracle's margins are above 0.2 in all places. What they
# answer is not right; they are miniatures.
QUESTIONS = {
    DENSE: ("What is asyncio.run?", "What is unittest.TestCase?", "What is logging.Logger?"),
    ROUTED: ("What is 5 + 6?", "What is 2 + 3?", "What is 10 + 10?"),
}

THINKING = (
    "{%- for m in messages -%}"
    "{{- '<|im_start|>' + m['role'] + '\\n' -}}"
    "{%- set parts = m['content'].split('</think>') -%}"
    "{%- if m['role'] == 'assistant' and (preserve_thinking is defined and preserve_thinking is true) -%}"
    "{{- '<think>\\n' + parts[:-1]|join|replace('<think>', '')|trim + '\\n</think>\\n' -}}"
    "{%- endif -%}"
    "{{- parts[-1]|trim + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n<think>\\n' -}}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}{{- '\\n</think>\\n' -}}{%- endif -%}"
    "{%- endif -%}"
)


def chat(*arguments: object, said: Sequence[str]) -> Result:
    """`zoo chat`, each of the lines that are said on its stdin."""
    words = ["chat", *map(str, arguments)]
    return CliRunner().invoke(cli, words, input="".join(f"{line}\n" for line in said), prog_name="zoo")


def tokenizer_of(bundle: Bundle) -> Tokenizer:
    return Tokenizer.from_file(str(bundle.tokenizer / "tokenizer.json"))


def by_transformers(folder: Path, messages: Sequence[Mapping[str, str]], **variables: object) -> list[int]:
    """The tokens of a conversation up to where the assistant begins, as transformers makes them."""
    with quiet_transformers():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, **variables
    )
    return [*map(int, found["input_ids"])]


# ---------------------------------------------------------------------------------------------------------------------
# Against transformers
# ---------------------------------------------------------------------------------------------------------------------


def answers_of_transformers(
    checkpoint: Path, folder: Path, questions: Sequence[str], most: int
) -> tuple[list[str], list[int]]:
    """The greedy answers of the checkpoint's own model in fp32, and the tokens of the last prompt.

    Beside a config.json, transformers takes the tokenizer class of the architecture, whatever the files say, and cuts
    text otherwise than their `tokenizer.json`; so the tokenizer is loaded from a folder without one.
    """
    with quiet_transformers():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
        messages: list[dict[str, str]] = []
        for question in questions:
            messages.append({"role": "user", "content": question})
            prompt = by_transformers(folder, messages)
            ids = torch.tensor([prompt])
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=most,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )[0, len(prompt) :]
            messages.append({"role": "assistant", "content": tokenizer.decode(written, skip_special_tokens=True)})
    return [message["content"] for message in messages[1::2]], prompt


@pytest.mark.slow
@pytest.mark.parametrize("entry", QUESTIONS)
def test_three_turns_are_answered_as_transformers_answers_them_and_each_token_is_read_once(
    entry: str, built: Callable[[str, str], Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built(entry, "int8hu")
    checkpoint = find_entry(entry, default_plugins())[0].sample_directory()
    assert checkpoint is not None
    answers, last_prompt = answers_of_transformers(checkpoint, bundle.tokenizer, QUESTIONS[entry], 16)
    calls = record_calls(monkeypatch)
    result = chat(bundle.directory, "--max-tokens", 16, said=QUESTIONS[entry])

    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == answers
    # All of the conversation is read once, and of the last answer what it takes to see it end.
    assert calls == [("main", 1)] * (len(last_prompt) + len(tokenizer_of(bundle).encode(answers[-1]).ids))
    prompts = [line for line in result.stderr.splitlines() if line.startswith("prompt: ")]
    held = [re.search(r", behind (\d+) tokens that the states hold$", line) for line in prompts]
    assert [found is not None for found in held] == [False, True, True]


@pytest.mark.slow
def test_a_second_turn_is_read_by_prefill_where_the_first_one_ended(
    shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an engine reads it that was written from the rules of engines; see `player`."""
    folder = shared.folder(f"{DENSE}-chunked-played", functools.partial(build, DENSE, "chunked"))
    bundle = Bundle.open(next(folder.iterdir()))
    calls = record_calls(monkeypatch)
    result = chat(bundle.directory, "--max-tokens", 4, said=("What is os.walk?", "What is os.path?"))
    assert result.exit_code == 0, result.output

    first, second = result.stdout.splitlines()
    messages = [{"role": "user", "content": "What is os.walk?"}]
    prompt = by_transformers(bundle.tokenizer, messages)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "What is os.path?"}]
    whole = by_transformers(bundle.tokenizer, messages)
    with Player(bundle.directory) as player:
        told = player.answer(prompt, 4)
        read = [*prompt, *told[:-1]]  # the last token of an answer is not read
        assert whole[: len(read)] == read
        again = player.answer(whole[len(read) :], 4)
    assert [tokenizer_of(bundle).decode(tokens) for tokens in (told, again)] == [first, second]
    assert calls == player.calls
    assert [name for name, _ in calls].count("prefill") == 2


@pytest.mark.slow
def test_states_that_are_given_more_room_keep_what_they_hold(built: Callable[[str, str], Bundle]) -> None:
    bundle = built(DENSE, "int8hu")
    tokens = tokenizer_of(bundle).encode("import os").ids
    logits = []
    for capacity in (1, len(tokens)):
        with CoreAIBackend().stepper(bundle.asset, bundle.functions, capacity) as stepper:
            for number, token in enumerate(tokens, 1):
                stepper.reserve(number)
                logits.append(stepper.step(token))
    half = len(tokens)
    assert half > 1
    for grown, roomy in zip(logits[:half], logits[half:], strict=True):
        assert np.array_equal(grown, roomy)


# ---------------------------------------------------------------------------------------------------------------------
# A runtime that says what it is told to
# ---------------------------------------------------------------------------------------------------------------------


class Scripted:
    """A stepper that answers from a script, by what it has read since it was reset and by nothing else.

    Attributes:
        read: the tokens.
        resets: how often the states were zeroed.
        letters: whether answers come in tokens of one letter, which no tokenizer makes of a text.
    """

    def __init__(self, bundle: Bundle, script: Mapping[str, str]) -> None:
        self._tokenizer, self._script = tokenizer_of(bundle), script
        self._width = int(bundle.signature.outputs[0].shape[-1])
        self.read: list[int] = []
        self.resets, self.capacity = 0, 0
        self.letters = False

    def step(self, token: int) -> np.ndarray[Any, Any]:
        self.read.append(token)
        assert len(self.read) <= self.capacity
        text = self._tokenizer.decode(self.read, skip_special_tokens=False)
        before, _, said = text.rpartition("<|im_start|>assistant\n")
        question = before.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        wanted = self._script.get(question, "?")
        logits = np.zeros(self._width, np.float16)
        logits[self._next(wanted.removeprefix(said) if wanted.startswith(said) else "")] = 9
        return logits

    def _next(self, rest: str) -> int:
        if not rest:
            return int(self._tokenizer.token_to_id("<|im_end|>"))
        return int(self._tokenizer.encode(rest[0] if self.letters else rest, add_special_tokens=False).ids[0])

    def call(self, function: str, tokens: Sequence[int]) -> np.ndarray[Any, Any] | None:
        raise AssertionError("there is one function")

    def reset(self, unwritten: float = 0.0) -> None:
        self.read, self.resets = [], self.resets + 1

    def state(self, name: str) -> np.ndarray[Any, Any]:
        raise AssertionError("nobody looks")

    def reserve(self, capacity: int) -> None:
        assert capacity > self.capacity
        self.capacity = capacity


Play = Callable[..., "tuple[Bundle, Scripted]"]


@pytest.fixture
def play(built: Callable[[str, str], Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Play:
    """A copy of a sample's bundle, perhaps with another template, whose runtime plays a script."""

    def begin(
        script: Mapping[str, str],
        template: str | None = None,
        sampling: Mapping[str, object] | None = None,
        **record: object,
    ) -> tuple[Bundle, Scripted]:
        folder = tmp_path / built(DENSE, "int8hu").directory.name
        shutil.copytree(built(DENSE, "int8hu").directory, folder)
        if template is not None:
            (folder / "tokenizer" / "chat_template.jinja").write_text(template, encoding="utf-8")
        if sampling is not None:
            write_json(folder / "tokenizer" / "generation_config.json", sampling)
        write_json(folder / "build.json", read_object(folder / "build.json") | record)
        bundle = Bundle.open(folder)
        scripted = Scripted(bundle, script)

        @contextlib.contextmanager
        def stepper(_self: object, _asset: Path, _functions: object, capacity: int) -> Iterator[Scripted]:
            scripted.capacity = capacity
            yield scripted

        monkeypatch.setattr(CoreAIBackend, "stepper", stepper)
        return bundle, scripted

    return begin


@contextlib.contextmanager
def conversation(bundle: Bundle, **options: Any) -> Iterator[Conversation]:
    with Conversation.open(bundle, CoreAIBackend(), **options) as opened:
        yield opened


def said(opened: Conversation, message: str, limits: Limits | None = None) -> tuple[str, str, Pace]:
    """What is thought and what is said in an answer, and its pace."""
    pace = Pace()
    pieces = list(opened.answer(message, limits or Limits(), pace))
    thought, rest = ("".join(piece.text for piece in pieces if piece.thinking is each) for each in (True, False))
    return thought, rest, pace


HELLO = {"Hello": "Hi there, you.", "How are you?": "Fine, and you?", "Good": "See you."}
THOUGHTS = {
    "Hello": "<think>\nThe user says hello.\n</think>\nHi there, you.",
    "How are you?": "<think>\nHow am I?\n</think>\nFine.",
}


def test_thinking_is_told_from_the_answer_and_a_second_turn_goes_on_from_the_states(play: Play) -> None:
    bundle, scripted = play(THOUGHTS, THINKING)
    with conversation(bundle) as opened:
        assert said(opened, "Hello")[:2] == ("<think>\nThe user says hello.\n</think>", "\nHi there, you.")
        read = len(scripted.read)
        thought, rest, pace = said(opened, "How are you?")
        assert (thought, rest, pace.reason) == ("<think>\nHow am I?\n</think>", "\nFine.", "stop-token")
        assert (pace.held, pace.forgotten, scripted.resets) == (read, 0, 0)
        messages = opened.messages
    whole = by_transformers(bundle.tokenizer, messages[:3], preserve_thinking=True)
    assert scripted.read[: len(whole)] == whole
    assert messages[1] == {"role": "assistant", "content": THOUGHTS["Hello"]}


def test_a_template_that_drops_earlier_thinking_has_all_read_again_and_the_rates_say_so(play: Play) -> None:
    bundle, scripted = play(THOUGHTS, THINKING.replace("preserve_thinking", "nobody_says_this"))
    result = chat(bundle.directory, said=("Hello", "How are you?"))
    assert result.exit_code == 0, result.output
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": THOUGHTS["Hello"]},
        {"role": "user", "content": "How are you?"},
    ]
    whole = by_transformers(bundle.tokenizer, messages)
    assert scripted.resets == 1
    assert scripted.read[: len(whole)] == whole
    assert "The user says hello" not in tokenizer_of(bundle).decode(whole)
    prompts = [line for line in result.stderr.splitlines() if line.startswith("prompt: ")]
    assert prompts[1].startswith(f"prompt: {len(whole)} tokens in ")
    assert prompts[1].endswith(
        "token by token, all of the conversation: it does not begin with what the states had read"
    )


def test_without_thinking_the_template_is_told_so_and_turns_go_on_from_the_states(play: Play, tmp_path: Path) -> None:
    quiet = {message: f"<think>\n\n</think>\n{answer}" for message, answer in HELLO.items()}
    bundle, scripted = play(quiet, THINKING)
    saved = tmp_path / "saved.json"
    result = chat(bundle.directory, "--no-think", said=("Hello", "How are you?", f"/save {saved}"))
    assert result.exit_code == 0, result.output
    assert result.stdout == "Hi there, you.\nFine, and you?\n"
    assert scripted.resets == 0
    messages = read_object(saved)["messages"]
    assert [message["content"] for message in messages] == ["Hello", "Hi there, you.", "How are you?", "Fine, and you?"]
    whole = by_transformers(bundle.tokenizer, messages[:3], preserve_thinking=True, enable_thinking=False)
    assert scripted.read[: len(whole)] == whole


def test_a_template_that_cannot_switch_thinking_off_is_told(play: Play) -> None:
    bundle, _ = play(HELLO)
    result = chat(bundle.directory, "--no-think", said=("Hello",))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: The chat template of {bundle.directory.name} does not read enable_thinking, so that thinking cannot "
        "be switched off. Leave out --no-think.\n"
    )


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_an_answer_that_was_cut_is_what_the_next_turn_begins_with(play: Play, tokens: int) -> None:
    """By a limit in the answer, in its thinking, or by the user: what is kept is what the states have read."""
    bundle, scripted = play(THOUGHTS, THINKING)
    with conversation(bundle) as opened:
        thought, rest, pace = said(opened, "Hello", Limits(tokens))
        assert (pace.reason, pace.answer_tokens) == ("length", tokens)
        read = [*scripted.read]
        said(opened, "How are you?")
        whole = by_transformers(bundle.tokenizer, opened.messages[:3], preserve_thinking=True)
        assert scripted.read[: len(whole)] == whole
        assert scripted.read[: len(read)] == read and scripted.resets == 0
        if "</think>" not in thought:
            assert opened.turns[1][1] == f"{thought.rstrip()}\n</think>\n\n"
        else:
            assert opened.turns[1][1] == thought + rest


def test_an_answer_whose_tokens_are_not_those_of_its_text_is_read_again(play: Play) -> None:
    bundle, scripted = play(HELLO)
    scripted.letters = True
    with conversation(bundle) as opened:
        assert said(opened, "Hello")[1] == HELLO["Hello"]
        _, rest, pace = said(opened, "How are you?")
        assert rest == HELLO["How are you?"]
        assert pace.held == 0 and pace.forgotten > 0 and scripted.resets == 1
        whole = by_transformers(bundle.tokenizer, opened.messages[:3])
    assert scripted.read[: len(whole)] == whole


def test_an_answer_that_the_user_ends_is_kept_as_far_as_it_came(play: Play) -> None:
    bundle, scripted = play(HELLO)
    asked = iter(range(1000))
    begin = len(by_transformers(bundle.tokenizer, [{"role": "user", "content": "Hello"}]))
    with conversation(bundle) as opened:
        pace = said(opened, "Hello", Limits(interrupted=lambda: next(asked) >= begin + 1))[2]
        assert (pace.reason, pace.answer_tokens) == ("interrupted", 2)
        assert HELLO["Hello"].startswith(opened.turns[1][1]) and len(opened.turns[1][1]) < len(HELLO["Hello"])
        assert said(opened, "Good")[1] == HELLO["Good"]
        assert scripted.resets == 0
        whole = by_transformers(bundle.tokenizer, opened.messages[:3])
    assert scripted.read[: len(whole)] == whole


def test_a_message_that_the_user_ends_while_it_is_read_is_forgotten(play: Play) -> None:
    bundle, scripted = play(HELLO)
    with conversation(bundle) as opened:
        thought, rest, pace = said(opened, "Hello", Limits(interrupted=lambda: len(scripted.read) >= 3))
        assert (thought, rest, pace.reason, pace.prompt_tokens) == ("", "", "interrupted", 3)
        assert opened.turns == []
        pace = said(opened, "Hello")[2]
        assert (pace.held, scripted.resets) == (3, 0)
        assert opened.turns == [("user", "Hello"), ("assistant", HELLO["Hello"])]


def test_a_full_context_says_so_and_the_program_goes_on(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, _ = play(HELLO)
    first = len(by_transformers(bundle.tokenizer, [{"role": "user", "content": "Hello"}]))
    monkeypatch.setattr(Bundle, "max_context", property(lambda _: first + 2))
    result = chat(bundle.directory, said=("Hello", "How are you?", "/reset", "Hello"))
    assert result.exit_code == 2  # a message had no answer, and nobody was there to see it
    one, other = result.stdout.splitlines()
    assert one == other and HELLO["Hello"].startswith(one) and one
    said = result.stderr
    assert said.count(f"The context of {first + 2} tokens is full: the answer was cut. /reset begins anew") == 2
    found = re.search(r"^error: A prompt of (\d+) tokens leaves no room.*$", said, re.MULTILINE)
    assert found is not None
    assert "begin anew with /reset, or build the bundle with --max-context" in found[0]


def test_room_for_states_grows_with_the_conversation(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, scripted = play({"Hello": "import os\n" * 150})
    with conversation(bundle) as opened:
        assert said(opened, "Hello")[1] == "import os\n" * 150
        assert scripted.capacity in (512, 1024) and len(scripted.read) > 256


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_an_instruction_stands_before_all_turns_and_can_be_changed(play: Play) -> None:
    bundle, scripted = play(HELLO)
    lines = ("Hello", "/system", "/system Be brief.", "Good", "/system -", "/system", "/reset", "Hello")
    result = chat(bundle.directory, "--system", "Be kind.", said=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [HELLO[message] for message in ("Hello", "Good", "Hello")]
    for line in ("The instruction: Be kind.", "The instruction: none", "All turns are forgotten."):
        assert line in result.stderr.splitlines()
    assert (
        scripted.read[: len(whole := by_transformers(bundle.tokenizer, [{"role": "user", "content": "Hello"}]))]
        == whole
    )


def test_an_instruction_that_the_template_does_not_take_is_refused_at_once(play: Play) -> None:
    refuses = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('No system.') }}{%- endif -%}"
    bundle, _ = play(THOUGHTS, refuses + THINKING)
    result = chat(bundle.directory, "--system", "Be kind.", said=("Hello",))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "does not take this chat: No system. Leave out the instruction." in result.stderr
    result = chat(bundle.directory, said=("/system Be kind.", "Hello"))
    assert "does not take this chat: No system." in result.stderr
    assert result.stdout == THOUGHTS["Hello"] + "\n"


def test_a_conversation_is_saved_and_nothing_is_written_over_that_it_did_not_write(play: Play, tmp_path: Path) -> None:
    bundle, _ = play(HELLO, sampling={"do_sample": True, "temperature": 0.01, "top_k": 3})
    saved, other = tmp_path / "saved.json", tmp_path / "other.json"
    other.write_text("mine", encoding="utf-8")
    lines = ("Hello", f"/save {saved}", "Good", f"/save {saved}", f"/save {other}", "/save", f"/save {tmp_path}/no/a")
    result = chat(bundle.directory, "--system", "Be kind.", "--seed", 3, said=lines)
    assert result.exit_code == 2
    assert read_object(saved)["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": HELLO["Hello"]},
        {"role": "user", "content": "Good"},
        {"role": "assistant", "content": HELLO["Good"]},
    ]
    sampling = read_object(saved)["sampling"]
    assert (sampling["temperature"], sampling["top_k"], sampling["seed"]) == (0.01, 3, 3)
    assert other.read_text(encoding="utf-8") == "mine"
    assert f"error: {other} is there already. /save -f {other} writes over it." in result.stderr
    assert "error: /save needs the name of a file. Type /save FILE." in result.stderr
    assert f"error: {tmp_path}/no/a cannot be written: No such file or directory." in result.stderr
    assert chat(bundle.directory, said=(f"/save -f {other}",)).exit_code == 0
    assert read_object(other)["messages"] == []


def test_an_unknown_command_names_the_nearest_and_a_space_makes_it_a_message(play: Play) -> None:
    bundle, _ = play({" /rest": "A message."})
    result = chat(bundle.directory, said=("/rest", " /rest", "", "/help", "/exit", "Hello"))
    assert result.exit_code == 2
    assert result.stdout == "A message.\n"
    assert "error: There is no command /rest. Did you mean /reset? A message that begins" in result.stderr
    for name in ("/reset", "/save FILE", "/system TEXT", "/help", "/exit"):
        assert re.search(rf"^{re.escape(name)} +\w", result.stderr, re.MULTILINE)


def test_what_the_checkpoint_says_of_sampling_is_told_once(play: Play) -> None:
    bundle, _ = play(HELLO, sampling={"do_sample": True, "temperature": 0.01, "top_p": "high"})
    result = chat(bundle.directory, said=("Hello", "Good"))
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines.count("top_p in generation_config.json is 'high', not a number above 0 and at most 1: not used.") == 1
    assert sum(line.startswith("Sampling as the checkpoint says: temperature 0.01; ") for line in lines) == 1


def test_a_bundle_without_a_chat_template_is_refused(play: Play) -> None:
    bundle, _ = play(HELLO, "")
    result = chat(bundle.directory, said=("Hello",))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (f"error: {bundle.directory.name} has no chat template. `zoo run` continues plain text.\n")


# ---------------------------------------------------------------------------------------------------------------------
# Texts in a stream
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_text_is_found_in_whatever_pieces_it_comes(size: int) -> None:
    stream = "a<b <th<think>x</thin</think> <thi"
    finder, found = TextFinder(["<think>", "</think>"]), []
    for start in range(0, len(stream), size):
        found += list(finder.feed(stream[start : start + size]))
    assert "".join(text for text, _ in found) + finder.rest() == stream
    assert [text for text, is_one in found if is_one] == ["<think>", "</think>"]
    parts: list[str] = [""]
    for text, is_one in found:
        parts = [*parts, ""] if is_one else [*parts[:-1], parts[-1] + text]
    assert parts == ["a<b <th", "x</thin", " "]


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C, and the line
# ---------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_is_noted_and_raises_nothing_while_an_answer_comes() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interruption.noted() as pressed:
        assert not pressed()
        with interruption.deferred():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)  # would end the process of a command that does not listen
        assert pressed()
    assert signal.getsignal(signal.SIGINT) is before
    with interruption.noted() as pressed:
        assert not pressed()


@pytest.mark.slow
def test_ctrl_c_ends_a_conversation_that_is_piped(built: Callable[[str, str], Bundle]) -> None:
    command = [sys.executable, "-u", "-m", "coreai_zoo", "chat", str(built(DENSE, "int8hu").directory)]
    options = ("--temperature", "90", "--seed", "3")  # at which an answer does not end
    with subprocess.Popen(
        [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("main\nmain\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # the answer comes
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted" and "answer: " not in stderr


PROMPT = r"m>\x08?"  # behind what sets the colour


class Terminal:
    """`zoo` on a terminal of its own.

    Attributes:
        shown: all that it has written there.
    """

    def __init__(self, *arguments: object) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, b"\x18\x00\x78\x00\x00\x00\x00\x00")
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
        # Not by a `preexec_fn`, for which all of this process would be forked: it may map more than there is memory.
        on_terminal = "fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        self._process = subprocess.Popen(
            (
                *(sys.executable, "-c", f"import fcntl, os, sys, termios; {on_terminal}"),
                *("-m", "coreai_zoo", *map(str, arguments)),
            ),
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            start_new_session=True,
        )
        os.close(slave)
        self.shown, self._behind = "", ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """All that is written until something fits; what comes behind it is looked at the next time."""
        until, seen = time.monotonic() + seconds, self._behind
        while not (found := re.search(pattern, seen)):
            ready, _, _ = select.select([self._master], [], [], max(0, until - time.monotonic()))
            assert ready, f"no {pattern!r} in {seen!r}"
            try:
                seen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:  # it has ended
                assert re.search(pattern, seen), f"no {pattern!r} in {seen!r}, and it has ended"
        seen, self._behind = seen[: found.end()], seen[found.end() :]
        self.shown += seen
        return seen

    def end(self) -> int:
        """Wait for the process; its exit code."""
        try:
            return self._process.wait(30)
        finally:
            self._process.kill()
            os.close(self._master)


@pytest.mark.slow
def test_on_a_terminal_lines_are_edited_and_ctrl_c_ends_an_answer_and_not_the_program(
    built: Callable[[str, str], Bundle], tmp_path: Path
) -> None:
    bundle, saved = built(DENSE, "int8hu"), tmp_path / "saved.json"
    # At such a temperature every token is about as probable, the end of turn too.
    terminal = Terminal("chat", bundle.directory, "--temperature", 90, "--seed", 3)
    terminal.wait_for("Ctrl-D leaves")
    terminal.wait_for(PROMPT)
    terminal.type("What is this\x03")  # a line that is cleared
    terminal.wait_for(PROMPT)
    # Typed wrongly and mended: the arrow goes left, and backspace takes a letter away.
    terminal.type("mxin\x1b[D\x1b[D\x7fa\r")
    terminal.wait_for("10/10")  # of the prompt; the answer begins
    time.sleep(0.5)
    terminal.type("\x03")
    assert "answer: " not in terminal.wait_for(r"\^C")
    terminal.wait_for("answer: ", 10)
    terminal.wait_for(PROMPT)
    terminal.type("\x1b[A")  # the message once more
    terminal.wait_for("main")
    terminal.type("\x15")
    terminal.type(f"/save {saved}\r")
    terminal.wait_for("saved in")
    terminal.wait_for(PROMPT)  # before that, Ctrl-D would go to the terminal itself
    terminal.type("\x04")
    assert terminal.end() == 0
    user, answer = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert user == {"role": "user", "content": "main"}
    assert answer["role"] == "assistant"
