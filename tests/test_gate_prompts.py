"""Which prompts a gate judges by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from attrs import evolve
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import CharDelimiterSplit

from coreai_zoo.bounds import GENERAL
from coreai_zoo.bundle.bundle import Bundle, signature_record
from coreai_zoo.catalogue import find_entry
from coreai_zoo.errors import BadInput
from coreai_zoo.gate import Activations
from coreai_zoo.gates.prompts import (
    BUILT_IN,
    LONG_POSITIONS,
    Prompt,
    Strength,
    TokenizedPrompt,
    at_least,
    cut,
    default_prompts,
    file_prompt,
    named_prompts,
    strength,
    tokenize,
)
from coreai_zoo.gates.rule import Verdict, judge
from coreai_zoo.gates.teacher_forced import (
    GateReport,
    Models,
    PromptResult,
    Reference,
    Runner,
    StopCheck,
    gate,
    require_strong,
    stop_check,
)
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.signature import KVCache


def logits(*margins: float) -> np.ndarray:
    """Logits whose two largest are so far apart, in an order of their own each."""
    rows = np.full((len(margins), 5), -9.0)
    for index, margin in enumerate(margins):
        rows[index, index % 5], rows[index, (index + 2) % 5] = 1.0 + margin, 1.0
    return rows


def test_a_prompt_is_weak_when_more_than_one_margin_in_eight_is_a_tie() -> None:
    seven_sure = [0.5] * 7

    assert strength(logits(0.05, *seven_sure)) == Strength(8, 1, 0.5)
    assert not strength(logits(0.05, *seven_sure)).weak
    assert strength(logits(0.05, 0.05, *seven_sure)).weak
    assert not strength(logits(0.100001, 0.100001, *seven_sure)).weak


def reference(name: str, *margins: float, required: bool) -> Reference:
    prompt = TokenizedPrompt(Prompt(name, "x", required=required), tuple(range(len(margins))), ("x",) * len(margins))
    rows = logits(*margins)
    return Reference(prompt, Activations(rows), strength(rows))


def test_a_weak_prompt_that_was_asked_for_is_refused_with_the_numbers() -> None:
    with pytest.raises(
        BadInput, match=r"'mine' is too weak to judge by: 2 of 8 oracle margins are below 0\.1"
    ) as error:
        require_strong([reference("mine", 0.0, 0.0, *[1.0] * 6, required=True)], Reporter(silent=True))

    assert "--allow-weak-prompt" in str(error.value)


def test_a_weak_prompt_of_the_default_set_is_left_out_and_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    strong, weak = reference("code", 0.0, *[1.0] * 7, required=True), reference("text", *[0.0] * 8, required=False)

    assert require_strong([strong, weak], Reporter()) == ("text",)
    assert "'text' is refused: 8 of 8 oracle margins" in capsys.readouterr().err


def test_allowed_weak_prompts_are_named() -> None:
    weak = reference("mine", *[0.0] * 8, required=True)

    assert require_strong([weak], Reporter(silent=True), allow_weak=True) == ("mine",)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"no built-in prompt 'cod'\. Did you mean code"):
        named_prompts(["text", "cod"])


def test_a_prompt_that_is_cut_must_have_the_positions() -> None:
    (asked,) = named_prompts(["digits"])

    assert (cut(asked, 40).positions, cut(asked, 40).minimum) == (40, 40)


def bundle_of(tokenizer: Path, max_context: int = 256) -> Bundle:
    """A bundle as far as its prompts go."""
    signature = default_plugins().contracts()["static-s1"].functions(KVCache(1, 1, 8), (), 1024, max_context)["main"]
    functions = {"main": signature_record(signature)}
    return Bundle(tokenizer.parent, {}, {"max_context": max_context, "functions": functions})


@pytest.fixture
def sample() -> Path:
    """The checkpoint of the sample."""
    return find_entry("qwen3.6-27b", default_plugins())[0].sample_directory()


@pytest.fixture
def bundle(tmp_path: Path, sample: Path) -> Bundle:
    shutil.copytree(sample, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
    return bundle_of(tmp_path / "tokenizer")


def test_of_the_default_set_a_chat_that_the_template_does_not_take_is_left_out(bundle: Bundle, sample: Path) -> None:
    taken, left_out = default_prompts(bundle, sample)
    assert [prompt.name for prompt in taken] == ["code", "text", "digits", "spanish", "chat"]
    assert left_out == ["prompt 'long' is left out: it is 512 positions, of which 256 fit"]

    (bundle.tokenizer / "chat_template.jinja").write_text("{{ raise_exception('No.') }}", encoding="utf-8")
    taken, (why, _long) = default_prompts(bundle, sample)
    assert "chat" not in [prompt.name for prompt in taken]
    assert "'chat' is left out: The chat template in chat_template.jinja does not take this chat: No." in why
    with pytest.raises(BadInput, match=r"does not take this chat: No\. Choose other prompts, as --prompts code,text"):
        tokenize(bundle, BUILT_IN["chat"], sample)

    (bundle.tokenizer / "chat_template.jinja").unlink()
    _, (why, _long) = default_prompts(bundle, sample)
    assert "has no chat template" in why


def test_prompts_with_too_few_tokens_do_not_pass(bundle: Bundle, sample: Path) -> None:
    taken, left_out = default_prompts(bundle, sample, 80)

    assert [len(prompt.tokens) for prompt in taken] == [80] * len(taken)
    assert "The prompt 'digits' is 68 tokens, and 80 positions were asked for" in left_out[0]
    with pytest.raises(BadInput, match=r"'code' is \d+ tokens, and 200 positions were asked for"):
        default_prompts(bundle, sample, 200)


def test_a_tokenizer_that_makes_a_handful_of_tokens_is_refused(bundle: Bundle, sample: Path) -> None:
    words = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = CharDelimiterSplit("\n")
    words.save(str(bundle.tokenizer / "tokenizer.json"))

    with pytest.raises(BadInput, match=r"'code' is \d+ tokens, and 24 positions are the fewest to judge by"):
        default_prompts(bundle, sample)
    with pytest.raises(BadInput, match="are the fewest to judge by"):
        tokenize(bundle, at_least(BUILT_IN["digits"], bundle), sample)


def test_the_end_of_a_turn_is_the_checkpoints_whatever_the_bundle_says(bundle: Bundle, sample: Path) -> None:
    assert tokenize(bundle, BUILT_IN["chat"], sample).stop == 2

    for name in ("tokenizer_config.json", "chat_template.jinja"):
        path = bundle.tokenizer / name
        path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|endoftext|>"), encoding="utf-8")
    (bundle.tokenizer / "config.json").unlink()
    chat = tokenize(bundle, BUILT_IN["chat"], sample)
    assert chat.stop == 2 and chat.ends_turns
    assert tokenize(bundle, BUILT_IN["chat"], bundle.tokenizer).stop == 0, "the bundle would ask for another"


def test_a_checkpoint_that_names_no_end_of_turn_gives_no_token_to_expect(bundle: Bundle) -> None:
    config = json.loads((bundle.tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    (bundle.tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}), encoding="utf-8")
    (bundle.tokenizer / "config.json").unlink()
    (bundle.tokenizer / "chat_template.jinja").write_text("{{ messages | tojson }}", encoding="utf-8")

    chat = tokenize(bundle, BUILT_IN["chat"], bundle.tokenizer)

    assert chat.stop is None and chat.ends_turns, "its stop check fails, and does not go missing"


def test_a_chat_that_is_cut_before_a_turn_ends_expects_no_end(bundle: Bundle, sample: Path) -> None:
    whole = tokenize(bundle, BUILT_IN["chat"], sample)
    end = whole.tokens.index(2)

    assert whole.whole and whole.ends_turns
    assert not tokenize(bundle, cut(BUILT_IN["chat"], end), sample).ends_turns
    assert tokenize(bundle, cut(BUILT_IN["chat"], end + 1), sample).ends_turns
    assert not tokenize(bundle, BUILT_IN["code"], sample).ends_turns


def sure_of(*tokens: int) -> Verdict:
    """A verdict of a candidate that agrees, where the oracle is sure of these tokens."""
    rows = np.eye(4)[list(tokens)] * 9.0
    return judge(tokens, rows, rows)


def test_a_stop_check_without_a_token_or_a_position_to_expect_fails() -> None:
    assert stop_check(sure_of(1, 2, 3), 2) == StopCheck((1,), ())
    assert stop_check(sure_of(1, 2, 3), 2).passed
    assert not stop_check(sure_of(1, 1, 3), 2).passed
    assert not stop_check(sure_of(1, 2, 3), None).passed
    assert not stop_check(judge([1], logits(0.05), logits(0.05)), 0).passed, "the oracle is not sure of it"
    assert stop_check(sure_of(1, 1, 3), 2, due=False).passed, "the prompt ends before a turn does"
    assert not evolve(StopCheck((1,), (1,)), due=False).passed
    assert not StopCheck((1,), (1,)).passed


@pytest.mark.parametrize(
    ("stop", "words"),
    [
        (2, "the oracle is nowhere sure of the end of a turn, token 2, so no stop is checked"),
        (None, "the checkpoint names no token that ends a turn"),
    ],
)
def test_a_chat_on_which_nothing_is_checked_fails_the_gate_with_what_to_do(stop: int | None, words: str) -> None:
    chat = TokenizedPrompt(Prompt("chat", turns=(("user", "x"),)), (1, 1), ("x", "x"), stop)
    result = PromptResult(chat, Strength(2, 0, 9.0), "x", None, sure_of(1, 1), stop=stop_check(sure_of(1, 1), stop))

    report = GateReport((result,), (), quantized=False)

    assert not report.passed
    assert report.reasons == (report.reasons[0],) and words in report.reasons[0]
    assert "--prompts NAME,... leaves it out" in report.reasons[0]


def test_lines_of_a_file_end_as_on_every_system(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert file_prompt(tmp_path / "prompt.txt").text == "one\ntwo\nthree\n"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")

    with pytest.raises(BadInput, match="is not UTF-8 text"):
        file_prompt(tmp_path / "binary")
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        file_prompt(tmp_path / "nowhere")


def test_the_built_in_set_covers_what_a_person_types_and_has_one_long_prompt() -> None:
    assert list(BUILT_IN) == ["code", "text", "digits", "spanish", "chat", "long"]
    # As docs/gate.md says: fewer would see less, and nobody would be told.
    assert [prompt.positions for prompt in BUILT_IN.values()] == [64, 64, 64, 64, 128, 512]
    assert BUILT_IN["long"].minimum == LONG_POSITIONS >= 512
    # Long enough also in a vocabulary of a quarter of a million tokens, with about four characters to one.
    assert len(BUILT_IN["long"].text or "") >= 5 * LONG_POSITIONS
    assert [role for role, _ in BUILT_IN["chat"].turns] == ["user", "assistant"] * 2


class Same:
    """A model that gives the oracle's answer."""

    name = "the same"

    def run(self, tokens: Sequence[int]) -> Activations:
        return Activations(logits(*[9.0] * len(tokens)))


@pytest.mark.parametrize("allowed", [False, True], ids=["must be strong", "may be weak"])
def test_a_chat_that_the_oracle_never_ends_fails_unless_weak_prompts_are_allowed(allowed: bool) -> None:
    rows = logits(*[9.0] * 8)
    chat = TokenizedPrompt(Prompt("chat", turns=(("user", "x"),)), (4,) * 8, ("x",) * 8, stop=9)
    models = Models(Runner(Same()), None, None)
    bounds = GENERAL.of_recipe({}, 1, "runtime", "dense")

    report = gate(
        [Reference(chat, Activations(rows), strength(rows))],
        models,
        lambda _: bounds,
        Reporter(silent=True),
        control_bounds=bounds,
        experts_per_token=None,
        quantized=False,
        allow_weak=allowed,
    )

    assert report.results[0].stop == StopCheck((), (), due=not allowed)
    assert report.passed is allowed
