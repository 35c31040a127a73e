"""The record of a gate, the page and the card that are made from it, and how they get to the disk."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve, frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.card import CARD, without_measurements
from coreai_zoo.bundle.layout import file_digests
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.tokenizer import load_tokenizer, token_text
from coreai_zoo.cli.gate import show
from coreai_zoo.gate import Activations, GateResult
from coreai_zoo.gates.corpus import Corpus
from coreai_zoo.gates.corpus_run import CorpusResult, Flip
from coreai_zoo.gates.divergence import compare_logits, statistics
from coreai_zoo.gates.power import Power, upper_limit
from coreai_zoo.gates.prompts import Prompt, TokenizedPrompt
from coreai_zoo.gates.report import confident_margin, damage, markdown, render, significant, totals
from coreai_zoo.gates.rule import judge
from coreai_zoo.gates.run import failure
from coreai_zoo.gates.teacher_forced import GateReport, Models, Runner, attribution, gate, run_oracle
from coreai_zoo.gates.transcript import Run, replace, to_json, transcript, write, write_card
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from coreai_zoo_qwen36.bounds import BOUNDS as SAMPLES
from web_pages import Page, assert_alone

P, V, D, LAYERS = 16, 24, 6, 3
STOP = 3


@frozen(eq=False)
class Table:
    """A model whose answers are written down; what is tested is everything after a model."""

    name: str
    answers: dict[tuple[int, ...], Activations]

    def run(self, tokens: Sequence[int]) -> Activations:
        return self.answers[tuple(tokens)]


def prompts() -> list[TokenizedPrompt]:
    pieces = tuple(f"<{index}>" for index in range(P))  # must be escaped on the page
    chat = Prompt("chat", turns=(("user", "x"),), required=False)
    return [
        TokenizedPrompt(Prompt("code", "x"), tuple(range(P)), pieces),
        TokenizedPrompt(chat, tuple(range(1, P + 1)), pieces, stop=STOP),
        TokenizedPrompt(Prompt("weak", "x", required=False), tuple(range(2, P + 2)), pieces),
    ]


def oracle_of(prompt: TokenizedPrompt) -> Activations:
    generator = np.random.default_rng(prompt.tokens[0])
    rows = generator.normal(size=(P, V))
    best = rows.argmax(axis=-1)
    rows[np.arange(P), best] += 0.01 if prompt.name == "weak" else 2.0
    if prompt.name == "weak":
        rows[np.arange(P), (best + 1) % V] = rows[np.arange(P), best] - 0.01
    rows[4, STOP] += 20.0
    hidden = [generator.normal(size=(P, D)) for _ in range(LAYERS + 1)]
    routers = [generator.normal(size=(P, 8)) for _ in range(LAYERS)]
    return Activations(rows, hidden, routers)


def off_by(activations: Activations, factor: float, **rows: np.ndarray) -> Activations:
    noise = np.random.default_rng(9).normal(size=(P, V)) * factor
    hidden = [layer * (1 + factor * index) for index, layer in enumerate(activations.hidden or ())]
    return evolve(activations, logits=activations.logits + noise, hidden=hidden)


def judged(
    *,
    error: float = 1e-4,
    flip_at: int | Sequence[int] | None = None,
    control_flips: bool = False,
    nan: bool = False,
    stop: bool = True,
    peaks: Sequence[dict[str, float]] = (),
    margin: float = CONFIDENT_MARGIN,
    compute_dtype: str = "float16",
) -> GateReport:
    """A gate on three prompts, of which one is weak; a bundle is made to fail in one way at a time."""
    references = {prompt.tokens: oracle_of(prompt) for prompt in prompts()}
    for tokens, found in zip(references, peaks, strict=False):
        references[tokens] = evolve(references[tokens], peaks=found)
    found = {tokens: off_by(oracle, error) for tokens, oracle in references.items()}
    control = {tokens: off_by(oracle, 1e-5) for tokens, oracle in references.items()}
    code, chat = (prompt.tokens for prompt in prompts()[:2])
    if flip_at is not None:
        for table in (found, control) if control_flips else (found,):
            for at in [flip_at] if isinstance(flip_at, int) else flip_at:
                wrong = (table[code].logits[at].argmax() + 1) % V
                table[code].logits[at, wrong] += 40.0
    if nan:
        found[code].logits[5, 0] = np.nan
    if not stop:
        found[chat].logits[4, STOP] -= 40.0
    oracle, judging, plain = (
        Runner(Table(name, table), arithmetic="torch")
        for name, table in (("the oracle", references), ("the candidate", found), ("the control", control))
    )
    silent = Reporter(silent=True)
    return gate(
        run_oracle(oracle, prompts(), silent),
        Models(judging, judging, plain),
        lambda arithmetic: evolve(SAMPLES.of_recipe({"mlp": {"dtype": "int8"}}, LAYERS, arithmetic), margin=margin),
        silent,
        control_bounds=SAMPLES.of_recipe({}, LAYERS, "torch"),
        experts_per_token=2,
        quantized=True,
        compute_dtype=compute_dtype,
    )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """The files of a bundle that a gate looks at."""
    directory = tmp_path / "toy"
    (directory / "toy.aimodel").mkdir(parents=True)
    (directory / "toy.aimodel" / "main.mlirb").write_bytes(bytes(100))
    card = "# toy\n\n## Numerics\n\nNot gated yet: so.\n\n## Architecture\n\nA toy.\n"
    (directory / CARD).write_text(card, encoding="utf-8")
    (directory / "metadata.json").write_text(json.dumps({"assets": {"main": "toy.aimodel"}}))
    spec = {"dtype": "int8", "scheme": "symmetric", "block": 32}
    build = {
        "schema": 2,
        "name": "toy",
        "backend": "coreai",
        "layers": LAYERS,
        "max_context": 64,
        "entry": {"name": "toy-1b", "title": "Toy", "hf_id": "toys/Toy"},
        "source": {"config_sha256": "0" * 64, "files": {}},
        "functions": {},
        "sample": False,
        "recipe": {"name": "int8hu", "published_name": "int8hu_block32_sym", "roles": {"mlp": spec, "norm": None}},
        "weights": {"mlp": {"parameters": 90, "bytes": 95}, "norm": {"parameters": 5, "bytes": 10}},
        "files": file_digests(directory),
    }
    (directory / "build.json").write_text(json.dumps(build))
    return Bundle.open(directory)


def text_of(token: int) -> str | None:
    """Texts that a terminal or a page would obey, or not show."""
    return None if token == -1 else f" <{token}>\x1b[31m\u202e\n"


def record_of(bundle: Bundle, report: GateReport, gates: Sequence[GateResult] = ()) -> dict[str, Any]:
    run = Run(bundle, "the oracle", "the control", ["toy", "-p", "it's"], {"judge": 1.0}, gates, text_of)
    return transcript(run, report)


# ---------------------------------------------------------------------------------------------------------------------
# Texts of tokens
# ---------------------------------------------------------------------------------------------------------------------


def test_a_flip_is_shown_with_the_texts_of_both_tokens(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(bundle, judged(flip_at=6))
    (flip,) = (position for position in record["prompts"][0]["positions"] if position["verdict"] == "FLIP")
    assert (flip["oracle_text"], flip["candidate_text"]) == (text_of(flip["oracle"]), text_of(flip["candidate"]))

    show([record])
    line = next(line for line in capsys.readouterr().out.splitlines() if "instead of" in line)
    ours, theirs = (f'{flip[whose]} " <{flip[whose]}>\\u001b[31m\\u202e\\n"' for whose in ("candidate", "oracle"))
    assert f'after "<6>" {ours} instead of {theirs}, oracle margin' in line
    page = render(record)
    assert f"<code>{html.escape(theirs, quote=False)}".replace('"', "&#34;") in page
    assert f"<code>{html.escape(ours, quote=False)}".replace('"', "&#34;") in page
    assert not {"\x1b", "\u202e"} & {*line, *page}


def test_a_position_without_a_token_and_a_transcript_of_before_are_shown_by_id(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(bundle, judged(flip_at=6))
    for prompt in record["prompts"]:
        for position in prompt.get("positions", ()):
            del position["oracle_text"]
            position["candidate_text"] = None

    show([record])
    assert re.search(r'after "<6>" \d+ instead of \d+, oracle margin', capsys.readouterr().out)
    assert "<code>" in render(record)


def test_the_text_of_a_token_is_its_name_where_it_is_a_part_of_a_character() -> None:
    tokenizer = load_tokenizer(find_entry("qwen3.6-27b", default_plugins())[0].sample_directory())
    parts = tokenizer.encode("\u4e2d").ids

    assert token_text(tokenizer, tokenizer.encode("def").ids[0]) == "def"
    assert token_text(tokenizer, 0) == "<|endoftext|>"
    assert len(parts) > 1 and token_text(tokenizer, parts[0]) == tokenizer.id_to_token(parts[0])
    assert token_text(tokenizer, -1) is None
    assert token_text(tokenizer, 10**6) is None


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


def test_what_a_model_gives_of_several_prompts_at_once_is_of_the_prompt_that_it_was_asked_for() -> None:
    class AtOnce(Table):
        def run_many(self, prompts: Sequence[Sequence[int]]) -> list[Activations]:
            return [self.run(tokens) for tokens in prompts]

    answers = {prompt.tokens: oracle_of(prompt) for prompt in prompts()}
    found = Runner(AtOnce("all", answers)).run(prompts(), "judge", Reporter(silent=True))

    assert {name: id(each) for name, each in found.items()} == {
        prompt.name: id(answers[prompt.tokens]) for prompt in prompts()
    }


def test_a_bundle_that_computes_the_same_passes_and_the_weak_prompt_is_not_judged(bundle: Bundle) -> None:
    record = record_of(bundle, judged())

    assert record["verdict"] == {"passed": True, "reasons": [], "weak_prompts_allowed": []}
    assert [(prompt["name"], prompt["judged"]) for prompt in record["prompts"]] == [
        ("code", True),
        ("chat", True),
        ("weak", False),
    ]
    assert record["prompts"][2]["strength"]["ties"] > P / 8


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ({"flip_at": 7}, "code: 1 confident flip, the worst at position 7"),
        ({"nan": True}, "code: 1 confident flip, the worst at position 5"),
        ({"stop": False}, "chat: no end of turn at position 4"),
        ({"error": 0.2}, "code: median relative error is"),
    ],
    ids=["a flip", "not finite", "no end of turn", "errors that flip nothing"],
)
def test_every_kind_of_damage_fails_with_its_reason(bundle: Bundle, harm: dict[str, Any], words: str) -> None:
    record = record_of(bundle, judged(**harm))

    assert not record["verdict"]["passed"]
    assert any(reason.startswith(words) for reason in record["verdict"]["reasons"])
    assert "Failed" in render(record)


def test_a_gate_of_a_plugin_that_fails_fails_the_bundle(bundle: Bundle) -> None:
    record = record_of(bundle, judged(), [GateResult("speed", False, "too slow")])

    assert record["verdict"]["reasons"] == ["gate speed: too slow"]
    assert not record["verdict"]["passed"]


def test_what_other_gates_found_is_printed_and_on_the_card(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    passed, failed = (
        GateResult("prefill", True, "9 positions: within the bounds"),
        GateResult("speed", False, "too slow"),
    )
    record = record_of(bundle, judged(), [passed, failed])
    show([record])
    printed = capsys.readouterr().out
    assert "prefill: passed, 9 positions: within the bounds.\n" in printed and "speed: FAILED, too slow.\n" in printed
    card = markdown(record)
    assert "\n- prefill: 9 positions: within the bounds\n" in card
    assert "\n- gate speed: too slow\n" in card and "- speed" not in card


def test_the_verdict_says_everywhere_what_it_could_have_seen(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    for harm in ({}, {"flip_at": 7}):
        record = record_of(bundle, judged(**harm))
        seen, counts = record["power"], totals(record)
        assert (
            (seen["positions"], seen["flips"])
            == (counts["confident"], counts["flips"])
            == (counts["confident"], len(harm))
        )
        assert seen["excluded_rate"] == upper_limit(len(harm), counts["confident"])
        assert seen["smoke_test"] and seen["confidence"] == 0.95

        show([record])
        printed = " ".join(capsys.readouterr().out.split())
        page = Page()
        page.feed(render(record))
        words = " ".join(page.text.split())
        for text in (printed, words):
            assert seen["statement"] in text
            assert "This is a smoke test: fewer than 299 positions" in text
        rate = seen["statement"].split("a rate above ")[1].split(" is ")[0]
        card = markdown(record)
        assert f"more than {rate} of such" in card or (harm and f"up to {rate} of such positions flip" in card)
        assert "This is a smoke test" in card


@pytest.mark.parametrize(
    ("peak", "factor", "warned"), [(16000.0, "4.09", False), (20000.0, "3.28", True)], ids=["enough", "little"]
)
def test_little_headroom_is_told_everywhere_and_fails_nothing(
    peak: float, factor: str, warned: bool, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    # The weak prompt is not judged, and yet the model comes that near on it.
    record = record_of(bundle, judged(peaks=[{"a <b>": 9.0, "c": 1e-3}, {"a <b>": 8.0}, {"a <b>": peak}]))
    assert record["headroom"]["places"] == [
        {"where": "a <b>", "value": peak, "factor": 65504 / peak, "little": warned},
        {"where": "c", "value": 1e-3, "factor": 65504 / 1e-3, "little": False},
    ]
    assert record["verdict"] == {"passed": True, "reasons": [], "weak_prompts_allowed": []}

    show([record])
    page = Page()
    page.feed(render(record))
    for text in (capsys.readouterr().out, page.text, markdown(record)):
        words = " ".join(text.split())
        assert f"oracle is {peak:,.0f} (a <b>), with a factor of {factor} to 65,504" in words
        assert ("Little room is left in 1 of 2 places" in words) is warned
    assert ('class="n warn"' in render(record)) is warned


def test_an_oracle_that_shows_no_values_and_one_that_is_not_finite_are_told_as_such(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record_of(bundle, judged())["headroom"] is None
    record = record_of(bundle, judged(peaks=[{"a": 1.0, "b": float("nan")}]))
    assert json.loads(to_json(record))["headroom"]["places"][0] == {
        "where": "b",
        "value": None,
        "factor": 0.0,
        "little": True,
    }
    show([record])
    assert "not finite (b). Little room" in " ".join(capsys.readouterr().out.split())
    assert "not finite" in render(record)
    del record["headroom"]  # a transcript of before
    show([record])
    assert "65,504" not in capsys.readouterr().out + render(record) + markdown(record)


def test_a_weak_prompt_and_a_tie_add_nothing_to_what_a_gate_could_see(bundle: Bundle) -> None:
    report = judged()
    code = report.results[0]
    assert code.verdict is not None and report.results[2].refused
    unsure = (evolve(code.verdict.positions[0], margin=0.05), *code.verdict.positions[1:])
    tied = evolve(code, verdict=evolve(code.verdict, positions=unsure))
    record = record_of(bundle, evolve(report, results=(tied, *report.results[1:])))

    assert record_of(bundle, report)["power"]["positions"] == 2 * P
    assert record["power"]["positions"] == 2 * P - 1
    assert "in 31 positions" in record["power"]["statement"] and "in 31 positions" in render(record)


def test_a_margin_of_the_bounds_decides_what_a_flip_is_and_is_told(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    for margin, flips in ((CONFIDENT_MARGIN, 1), (40.0, 0)):
        record = record_of(bundle, judged(flip_at=7, margin=margin))
        code = record["prompts"][0]
        assert (code["confident_flips"], code["ties"]) == (flips, 1 - flips)
        assert code["positions"][7]["verdict"] == ("FLIP" if flips else "tie")
        assert code["bounds"]["margin"] == code["positions"][7]["sure_from"] == margin
        assert totals(record)["confident"] == (2 * P if flips else 0) == record["power"]["positions"]
        told = f"less than {margin:.2g} apart"
        assert told in " ".join(markdown(record).split())
        show([record])
        assert f"positions have a margin of {margin:.2g} or more" in capsys.readouterr().out
    record["prompts"][1]["bounds"]["margin"] = CONFIDENT_MARGIN
    assert confident_margin(record) == "0.1 or 40"
    for prompt in record["prompts"]:  # a transcript of before
        (prompt.get("bounds") or {}).pop("margin", None)
        for position in prompt.get("positions", ()):
            del position["sure_from"]
    assert confident_margin(record) == "0.1" and totals(record)["confident"] == 2 * P


def test_headroom_is_not_told_of_what_computes_in_another_precision(bundle: Bundle) -> None:
    peaks = [{"a stream": 60_000.0}]
    assert record_of(bundle, judged(peaks=peaks))["headroom"]["warning"]
    assert record_of(bundle, judged(peaks=peaks, compute_dtype="bfloat16"))["headroom"] is None


@pytest.mark.parametrize(("control_flips", "source"), [(False, "quantization"), (True, "precision")])
def test_a_flip_is_attributed_by_what_the_control_does(bundle: Bundle, control_flips: bool, source: str) -> None:
    record = record_of(bundle, judged(flip_at=7, control_flips=control_flips))

    flips = [row for row in record["prompts"][0]["positions"] if row["verdict"] == "FLIP"]
    assert [(row["index"], row["attribution"]) for row in flips] == [(7, source)]
    assert source in render(record)


def test_a_tie_that_the_control_turns_as_well_is_one_of_precision() -> None:
    rows = np.array([[1.0, 1.05, 0.0]])
    turned = judge([0], rows, rows[:, [1, 0, 2]])

    assert turned.positions[0].verdict == "tie"
    assert attribution(turned.positions[0], turned, quantized=True) == "precision"
    assert attribution(turned.positions[0], judge([0], rows, rows), quantized=True) == "quantization"


def test_of_many_flips_the_worst_are_printed_and_the_others_counted(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_of(bundle, judged(flip_at=range(12)))
    show([record])
    printed = capsys.readouterr().out
    rows = record["prompts"][0]["positions"]
    worst = sorted((row for row in rows if row["verdict"] == "FLIP"), key=lambda row: -row["margin"])
    shown = [int(at) for at in re.findall(r"^  code position (\d+):", printed, re.MULTILINE)]
    assert shown == [row["index"] for row in worst[:5]] and len(worst) == 12
    assert "  code: 7 more flips, of smaller margins, in the report" in printed


def test_of_many_reasons_the_first_are_named_and_the_others_counted() -> None:
    told = str(failure("toy", [f"reason {n}" for n in range(70)]))
    assert told == "toy fails the gate: reason 0; reason 1; reason 2; reason 3; reason 4 and 65 more."


# ---------------------------------------------------------------------------------------------------------------------
# Transcript, page, card
# ---------------------------------------------------------------------------------------------------------------------


def test_a_transcript_is_strict_json_also_where_logits_are_not_finite(bundle: Bundle) -> None:
    record = json.loads(to_json(record_of(bundle, judged(nan=True))))

    assert record["prompts"][0]["positions"][5]["kl_divergence"] is None
    assert totals(record)["kl"] is None
    assert "not finite" in render(record)


def keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*(keys(part) for part in value.values())) if value else set()
    return set().union(*(keys(part) for part in value)) if isinstance(value, list) and value else set()


def test_every_field_of_a_transcript_is_documented(bundle: Bundle, root: Path) -> None:
    documented = set(re.findall(r"`([a-z0-9_]+)`", (root / "docs" / "gate.md").read_text(encoding="utf-8")))
    record = record_of(bundle, judged(flip_at=7, peaks=[{"a": 1.0}]), [GateResult("speed", True, "fine")])
    # What is copied from build.json is documented there; these have names of roles, distributions and stages as keys.
    record["bundle"] |= {"recipe": {}, "weights": {}}
    record["environment"] |= {"versions": {}, "seconds": {}}
    record["inputs"]["checkpoint"] = {}

    assert keys(record) - documented == set()


# ---------------------------------------------------------------------------------------------------------------------
# Over running text
# ---------------------------------------------------------------------------------------------------------------------


def over_corpus(*, flips: int = 0, nan: bool = False, allowed: int = 0) -> CorpusResult:
    """A candidate over two windows of 64 tokens, with a number of confident flips."""
    generator = np.random.default_rng(5)
    oracle = generator.normal(scale=3.0, size=(128, V))
    candidate = oracle + generator.normal(scale=1e-3, size=(128, V))
    if nan:
        candidate[40, 0] = np.nan
    corpus = Corpus("mine.txt", "1" * 64, 130, (tuple(range(64)), tuple(range(64))))
    compared = compare_logits(oracle, candidate, [0] * 128)
    found = [Flip(1, at, 7, 3, 5, 2.0 - at / 10) for at in range(flips)]
    return CorpusResult(corpus, "the candidate", statistics(compared), tuple(found), Power(120, flips), allowed)


def record_over(bundle: Bundle, result: CorpusResult) -> dict[str, Any]:
    run = Run(bundle, "the oracle", "the control", ["toy"], {"corpus": 1.0}, (), text_of, corpus=result)
    return transcript(run, judged())


def test_every_field_of_a_corpus_is_documented_and_json(bundle: Bundle, root: Path) -> None:
    documented = set(re.findall(r"`([a-z0-9_]+)`", (root / "docs" / "gate.md").read_text(encoding="utf-8")))
    record = json.loads(to_json(record_over(bundle, over_corpus(flips=2, nan=True))))

    assert keys(record["corpus"]) - documented == set()
    assert record["corpus"]["kl_max"] is None and record["corpus"]["kl_mean"]["value"] is None
    assert [flip["margin"] for flip in record["corpus"]["flips"]] == [2.0, 1.9]
    assert record["corpus"]["flips"][0]["oracle_text"] == text_of(3)
    assert json.loads(to_json(record_of(bundle, judged())))["corpus"] is None


def test_flips_over_a_corpus_fail_a_bundle_whose_prompts_pass(bundle: Bundle) -> None:
    for flips, allowed in ((0, 0), (1, 0), (4, 4), (5, 4)):
        record = record_over(bundle, over_corpus(flips=flips, allowed=allowed))
        passes = flips <= allowed

        assert record["verdict"]["passed"] is record["corpus"]["passed"] is passes
        assert ("Failed" in render(record)) is not passes
        assert [reason.split(" ")[:3] for reason in record["verdict"]["reasons"]] == (
            [] if passes else [["corpus", "mine.txt:", str(flips)]]
        )


def test_page_card_and_terminal_show_the_figures_over_a_corpus(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_over(bundle, over_corpus(flips=1))
    figures = record["corpus"]

    show([record])
    printed = " ".join(capsys.readouterr().out.split())
    page = Page()
    page.feed(render(record))
    card = markdown(record)
    for text in (printed, " ".join(page.text.split()), card):
        assert "The corpus mine.txt: 128 positions count, the second half of each of 2 windows of 64 tokens." in text
        for key, digits in (("perplexity", 6), ("oracle_perplexity", 6), ("kl_mean", 3), ("kl_percentile_99_9", 3)):
            assert significant(figures[key]["value"], digits) in text
        low, high = (significant(figures["kl_mean"][end]) for end in ("low", "high"))
        assert f"{low} to {high}" in text
        assert "to no limit" in text, "128 positions do not reach as far as 99.9 %"
        assert f"{100 * figures['top1_agreement']['value']:.2f} %" in text
        assert figures["power"]["statement"] in text and "This is a smoke test" in text
    assert "window 2 position 0: after 7" in printed and "\x1b" not in printed
    assert "| KL divergence, mean |" in card

    assert "Over running text" not in render(record_of(bundle, judged()))
    beside = Page()
    beside.feed(render(record, record_over(bundle, over_corpus())))
    assert beside.text.count("The corpus mine.txt:") == 2


def test_a_candidate_that_is_not_finite_over_a_corpus_is_shown_as_such(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    record = record_over(bundle, over_corpus(flips=1, nan=True))

    show([record])
    rows = {" ".join(line.split()) for line in capsys.readouterr().out.splitlines()}
    assert {"perplexity of the bundle not finite", "KL divergence, mean not finite", "largest not finite"} <= rows


def test_a_routed_bundle_that_passes_with_flips_says_why(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_over(bundle, over_corpus(flips=2, allowed=4))

    show([record])
    assert "A routed model may have up to 4 of so many" in " ".join(capsys.readouterr().out.split())
    assert "A routed model may have up to 4 of so many" in render(record)


def test_the_page_fetches_and_runs_nothing_and_escapes_what_it_shows(bundle: Bundle) -> None:
    html = render(record_of(bundle, judged(flip_at=7)))
    page = assert_alone(html)

    assert "script" not in page.tags
    assert {"#code", "#chat"} < set(page.links)
    assert "<7>" not in html and '"<7>"' in page.text
    assert "zoo gate toy -p 'it'\"'\"'s'" in page.text
    assert "prefers-color-scheme: dark" in html
    assert html.count('<svg class="chart"') == 2 + 2 * 3


def test_the_page_of_two_bundles_shows_both(bundle: Bundle) -> None:
    better, worse = record_of(bundle, judged()), record_of(bundle, judged(flip_at=7))

    assert "Beside toy" in render(better, worse)
    assert "Beside" not in render(better)


def test_the_layer_that_adds_most_is_named(bundle: Bundle) -> None:
    assert damage([{"hidden_error": [0.0, 0.3, 0.5, 0.5]}]) == {"layer": 1, "share": pytest.approx(0.64), "last": 0.5}
    assert damage([{"hidden_error": None}]) is None


def test_the_card_gets_what_was_measured_and_keeps_its_digest(bundle: Bundle) -> None:
    before, path = file_digests(bundle.directory), bundle.directory / CARD
    built = path.read_bytes()

    for report in (judged(flip_at=7), judged()):  # the second in the place of the first
        write_card(bundle, markdown(record_of(bundle, report)))
        text = path.read_text(encoding="utf-8")
        assert text.count("The gate ") == 1 and "further apart" in text
        assert text.index("## Numerics") < text.index("The gate ") < text.index("## Architecture")
        assert ("FAILED" in text) == (not report.passed)
        assert ("That excludes, at 95 %," in text) == report.passed, "of a bundle that flips nothing is excluded"
        assert file_digests(bundle.directory) == before
        assert without_measurements(path.read_bytes()) == built
    assert "was the same at 32. At 0 it was another" in text

    path.write_bytes(path.read_bytes().replace(b"A toy.", b"A boy."))
    assert file_digests(bundle.directory) != before


def test_text_after_the_measurements_is_in_the_digest(bundle: Bundle) -> None:
    path = bundle.directory / CARD
    write_card(bundle, "numbers")
    before = file_digests(bundle.directory)
    path.write_bytes(path.read_bytes() + b"more\n")

    assert file_digests(bundle.directory) != before


def test_an_interrupted_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def interrupted(_number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace(target, b"new", tmp_path)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.html", "old")]


def test_transcript_and_report_are_written_and_nothing_else(bundle: Bundle) -> None:
    folder = bundle.directory / "gate"
    record = record_of(bundle, judged())
    write(folder, record, render(record))

    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "transcript.json"]
    assert json.loads((folder / "transcript.json").read_text(encoding="utf-8")) == json.loads(to_json(record))
    assert file_digests(bundle.directory) == bundle.build["files"]
