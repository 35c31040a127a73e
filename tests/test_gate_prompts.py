"""Which prompts a gate judges by."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coreai_zoo.errors import BadInput
from coreai_zoo.gate import Activations
from coreai_zoo.gates.prompts import (
    BUILT_IN,
    LONG_POSITIONS,
    Prompt,
    Strength,
    TokenizedPrompt,
    cut,
    file_prompt,
    named_prompts,
    strength,
)
from coreai_zoo.gates.teacher_forced import Reference, require_strong
from coreai_zoo.progress import Reporter


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
    strong, weak = reference("code", *[1.0] * 8, required=True), reference("text", *[0.0] * 8, required=False)

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


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")

    with pytest.raises(BadInput, match="cannot be read as UTF-8 text"):
        file_prompt(tmp_path / "binary")
    with pytest.raises(BadInput, match="cannot be read as UTF-8 text"):
        file_prompt(tmp_path / "nowhere")


def test_the_built_in_set_covers_what_a_person_types_and_has_one_long_prompt() -> None:
    assert list(BUILT_IN) == ["code", "text", "digits", "spanish", "chat", "long"]
    assert BUILT_IN["long"].minimum == LONG_POSITIONS >= 512
    # Long enough also in a vocabulary of a quarter of a million tokens, with about four characters to one.
    assert len(BUILT_IN["long"].text or "") >= 5 * LONG_POSITIONS
    assert [role for role, _ in BUILT_IN["chat"].turns] == ["user", "assistant"] * 2
