"""A running text through oracle and candidate: its windows, the figures over it, its memory and its disk."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import platform
import runpy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import field, frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN, GENERAL
from coreai_zoo.bundle.bundle import Bundle, signature_record
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput, EnvironmentLacks
from coreai_zoo.gate import Activations
from coreai_zoo.gates import corpus_run, divergence
from coreai_zoo.gates.corpus import BUILTIN, COUNTED, WINDOW, Corpus, read_corpus
from coreai_zoo.gates.corpus_run import measure, run_oracle_on
from coreai_zoo.gates.divergence import Compared, compare_logits, mean, quantile, statistics
from coreai_zoo.gates.power import interval
from coreai_zoo.gates.prompts import CORPUS_WINDOWS, Prompt, TokenizedPrompt, default_prompts
from coreai_zoo.gates.rule import ROUTED_FLIP_RATE, flips_allowed, judge
from coreai_zoo.gates.run import GateOptions
from coreai_zoo.gates.teacher_forced import Models, PromptResult, Runner, gate, run_oracle
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.signature import KVCache

SHIPPED = Path(divergence.__file__).parent / "corpus_text"
SILENT = Reporter(silent=True)


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[..., Bundle]:
    """Make a bundle with the tokenizer of a sample, as far as a corpus looks at it."""

    def make(entry: str = "qwen3.6-27b", max_context: int = WINDOW) -> Bundle:
        folder = tmp_path / f"{entry}-{max_context}"
        sample = find_entry(entry, default_plugins())[0].sample_directory()
        shutil.copytree(sample, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors"))
        signature = default_plugins().contracts()["static-s1"].functions(KVCache(1, 1, 8), (), 1024, 1024)["main"]
        functions = {"main": signature_record(signature)}
        return Bundle(folder, {}, {"max_context": max_context, "functions": functions})

    return make


# ---------------------------------------------------------------------------------------------------------------------
# The text and its windows
# ---------------------------------------------------------------------------------------------------------------------


def test_the_text_that_ships_is_the_one_that_the_figures_are_of_and_says_where_it_is_from() -> None:
    text = (SHIPPED / "builtin.txt").read_bytes()

    assert hashlib.sha256(text).hexdigest() == "49da10120c724629999acf00369cf182b0503715b997406d111edf3ffaee596b"
    origin = (SHIPPED / "ORIGIN.md").read_text(encoding="utf-8")
    assert f"{len(text):,} bytes" in origin and "PSF-2.0" in origin and "in-sample" in origin
    licence = (SHIPPED / "LICENSE.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in licence


@pytest.mark.skipif(platform.python_version() != "3.11.7", reason="another Python has another text")
def test_the_script_writes_the_text_that_ships(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_corpus.py", str(tmp_path)])
    runpy.run_path(str(root / "scripts" / "make_corpus.py"), run_name="__main__")

    for name in ("builtin.txt", "LICENSE.txt"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes()


@pytest.mark.parametrize("entry", ["qwen3.6-27b", "qwen3.6-35b-a3b"])
def test_of_the_built_in_text_enough_positions_count_with_the_tokenizers_of_the_samples(
    bundle: Callable[..., Bundle], entry: str
) -> None:
    corpus = read_corpus(bundle(entry), BUILTIN)

    counted = len(corpus.windows) * len(range(WINDOW)[corpus.counted])
    assert COUNTED == 3072 <= counted < 3072 + 255, "the fewest windows that suffice"
    assert read_corpus(bundle(entry, 1024), BUILTIN, 4 * COUNTED).positions > 4 * COUNTED


def test_windows_follow_each_other_and_the_second_half_of_each_counts_without_its_last_token(
    bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    subject = bundle()
    (tmp_path / "mine.txt").write_text("def f(x):\n    return x\n" * 400, encoding="utf-8")
    tokens = encode(load_tokenizer(subject.tokenizer), (tmp_path / "mine.txt").read_text(encoding="utf-8"))

    corpus = read_corpus(subject, str(tmp_path / "mine.txt"))

    assert [token for window in corpus.windows for token in window] == tokens[: len(tokens) // 512 * 512]
    assert (corpus.name, corpus.tokens, corpus.window) == ("mine.txt", len(tokens), 512)
    assert corpus.sha256 == hashlib.sha256((tmp_path / "mine.txt").read_bytes()).hexdigest()
    assert list(range(512)[corpus.counted]) == list(range(256, 511))
    assert len(read_corpus(subject, str(tmp_path / "mine.txt"), 256).windows) == 2
    assert len(read_corpus(subject, str(tmp_path / "mine.txt"), 255).windows) == 1

    shorter = read_corpus(bundle(max_context=101), str(tmp_path / "mine.txt"))
    assert shorter.window == 101 and list(range(101)[shorter.counted]) == list(range(50, 100))


def test_a_text_that_cannot_be_measured_is_refused_with_what_it_has(
    bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    subject = bundle()
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("def main(argv=None):\n", encoding="utf-8")
    (tmp_path / "long").write_text("def f(x):\n    return x\n" * 200, encoding="utf-8")
    tokens = {
        name: len(encode(load_tokenizer(subject.tokenizer), (tmp_path / name).read_text()))
        for name in ("short", "long")
    }

    for name in ("nowhere", "binary", "."):
        with pytest.raises(BadInput, match=r"(cannot be read: |is not UTF-8 text: ).*--corpus builtin"):
            read_corpus(subject, str(tmp_path / name))
    with pytest.raises(BadInput, match="The corpus empty is 0 tokens, and one window takes 512"):
        read_corpus(subject, str(tmp_path / "empty"))
    with pytest.raises(BadInput, match=f"The corpus short is {tokens['short']} tokens, and one window takes 512"):
        read_corpus(subject, str(tmp_path / "short"))
    there = tokens["long"] // 512 * 255
    with pytest.raises(BadInput, match=f"9000 positions were asked for, and {there} .*--positions {there}") as error:
        read_corpus(subject, str(tmp_path / "long"), 9000)
    assert f"of its {tokens['long']} tokens" in str(error.value)
    with pytest.raises(BadInput, match="in a context of 2"):
        read_corpus(bundle(max_context=2), str(tmp_path / "long"))


@pytest.mark.parametrize("given", [{"prompt": "x"}, {"prompts": "code"}, {"prompt_file": [Path("x")]}])
def test_a_corpus_goes_with_the_built_in_prompts_alone(given: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="--corpus is measured beside the built-in prompts"):
        GateOptions(corpus=BUILTIN, **given)


def test_the_command_that_repeats_a_gate_has_the_corpus_without_its_folder() -> None:
    assert GateOptions(corpus="/home/me/mine.txt", positions=9).arguments == [
        "--positions",
        "9",
        "--corpus",
        "mine.txt",
    ]


def test_the_windows_of_a_small_bundle_are_the_first_of_the_built_in_text(bundle: Callable[..., Bundle]) -> None:
    subject = bundle()
    corpus = read_corpus(subject, BUILTIN)
    checkpoint = subject.tokenizer
    taken, left_out = default_prompts(subject, checkpoint, windows=CORPUS_WINDOWS)

    long, *windows = [prompt for prompt in taken if prompt.prompt.running_text]
    assert long.name == "long"
    assert [prompt.name for prompt in windows] == [f"corpus-{number}" for number in range(1, 7)]
    assert [prompt.tokens for prompt in windows] == list(corpus.windows[:6])
    assert all(prompt.long and not prompt.prompt.required for prompt in windows)
    assert "def insort_right(a, x" in "".join("".join(window.pieces) for window in windows)
    assert sum(len(prompt.tokens) for prompt in taken) >= 3000 and left_out == []

    assert [each.name for each in default_prompts(subject, checkpoint)[0] if each.prompt.running_text] == ["long"]
    taken, left_out = default_prompts(bundle(max_context=511), checkpoint, windows=CORPUS_WINDOWS)
    assert not any(prompt.prompt.running_text for prompt in taken)
    assert "windows of the built-in corpus are left out: one is 512 positions, of which 511 fit." in left_out


# ---------------------------------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------------------------------


def logits(positions: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=spread, size=(positions, vocabulary)).astype(np.float32)


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray, list[int]]:
    oracle = logits(400, 30)
    candidate = (oracle + logits(400, 30, seed=1, spread=0.3)).astype(np.float16)
    return oracle, candidate, np.random.default_rng(2).integers(30, size=400).tolist()


def by_definition(row: np.ndarray) -> list[float]:
    """Log-probabilities of one position, in plain numbers."""
    total = math.fsum(math.exp(value) for value in row.tolist())
    return [value - math.log(total) for value in row.tolist()]


def test_every_position_is_what_the_definitions_say(pair: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    oracle, candidate, following = pair
    compared = compare_logits(oracle, candidate, following)

    for at, (ours, theirs) in enumerate(zip(candidate, oracle, strict=True)):
        log_p, log_q = by_definition(theirs), by_definition(ours)
        kl = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        assert compared.kl[at] == pytest.approx(kl, rel=1e-6, abs=1e-9)
        assert compared.oracle_nll[at] == pytest.approx(-log_p[following[at]], rel=1e-9)
        assert compared.candidate_nll[at] == pytest.approx(-log_q[following[at]], rel=1e-9)
    verdict = judge(following, oracle, candidate)
    for name, of in (("oracle", "oracle"), ("candidate", "candidate"), ("margin", "margin"), ("kl", "kl_divergence")):
        expected = [getattr(position, of) for position in verdict.positions]
        assert getattr(compared, name).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_positions_are_compared_a_few_at_a_time(
    pair: tuple[np.ndarray, np.ndarray, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare_logits(*pair)
    monkeypatch.setattr(divergence, "_BLOCK_ELEMENTS", 7 * 30)

    for ours, theirs in zip(compare_logits(*pair).arrays, whole.arrays, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="399 tokens"):
        compare_logits(pair[0], pair[1], pair[2][1:])


def test_figures_and_errors_are_those_of_llama_cpp(pair: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    compared = compare_logits(*pair)
    found = statistics(compared)
    ours, theirs, count = compared.candidate_nll, compared.oracle_nll, 400

    def of_mean(values: np.ndarray) -> tuple[float, float]:
        """A mean and its uncertainty, from sums and sums of squares."""
        first, second = values.sum() / count, (values**2).sum() / count
        return first, math.sqrt((second - first**2) / (count - 1))

    (log_ours, error_ours), (log_theirs, error_theirs) = of_mean(ours), of_mean(theirs)
    shared = ((ours * theirs).sum() / count - log_ours * log_theirs) / (count - 1)
    log_error = math.sqrt(error_ours**2 + error_theirs**2 - 2 * shared)
    ppl_ours, ppl_theirs = math.exp(log_ours), math.exp(log_theirs)
    ratio = math.exp(log_ours - log_theirs)
    spread = (ppl_ours * error_ours) ** 2 + (ppl_theirs * error_theirs) ** 2 - 2 * ppl_ours * ppl_theirs * shared
    agreement = (compared.oracle == compared.candidate).mean()

    for estimate, value, error in (
        (found.perplexity, ppl_ours, ppl_ours * error_ours),
        (found.oracle_perplexity, ppl_theirs, ppl_theirs * error_theirs),
        (found.log_perplexity_ratio, log_ours - log_theirs, log_error),
        (found.perplexity_ratio, ratio, ratio * log_error),
        (found.perplexity_difference, ppl_ours - ppl_theirs, math.sqrt(spread)),
        (found.kl_mean, *of_mean(compared.kl)),
        (found.top1_agreement, agreement, math.sqrt(agreement * (1 - agreement) / (count - 1))),
    ):
        assert (estimate.value, estimate.error) == (pytest.approx(value), pytest.approx(error))
        assert estimate.low < estimate.value < estimate.high
    assert found.perplexity_correlation == pytest.approx(shared / (error_ours * error_theirs))
    assert found.kl_max == compared.kl.max()
    for estimate, part in ((found.kl_median, 0.5), (found.kl_percentile_99, 0.99), (found.kl_percentile_99_9, 0.999)):
        ranked, place = np.sort(compared.kl), part * (count - 1)
        below, above = ranked[int(place)], ranked[int(place) + 1]
        assert estimate.value == pytest.approx(below + (place % 1) * (above - below))


def test_intervals_are_normal_on_their_scale_and_exact_for_the_agreement(
    pair: tuple[np.ndarray, np.ndarray, list[int]],
) -> None:
    compared = compare_logits(*pair)
    found = statistics(compared)

    for estimate in (found.kl_mean, found.log_perplexity_ratio, found.perplexity_difference):
        assert (estimate.high - estimate.value) / estimate.error == pytest.approx(1.959964, rel=1e-6)
    for estimate in (found.perplexity, found.perplexity_ratio):
        assert estimate.low * estimate.high == pytest.approx(estimate.value**2)
    same = int((compared.oracle == compared.candidate).sum())
    assert (found.top1_agreement.low, found.top1_agreement.high) == interval(same, 400)


def test_a_quantile_lies_between_the_order_statistics_that_tables_name() -> None:
    values = np.random.default_rng(3).permutation(np.arange(1.0, 101.0))

    median = quantile(values, 0.5)
    assert (median.value, median.low, median.high) == (50.5, 40.0, 61.0)
    assert quantile(values, 0.99).high is None, "a hundred values have no upper end for the 99th percentile"
    assert quantile(values, 0.99).low == 97.0
    assert quantile(values[:1], 0.5).value == values[0]


@pytest.mark.parametrize("part", [0.5, 0.99])
def test_the_interval_of_a_quantile_holds_the_true_one_as_often_as_it_says(part: float) -> None:
    draws = np.random.default_rng(4).exponential(size=(300, 200))
    true = -math.log(1 - part)

    held = 0
    for row in draws:
        found = quantile(row, part)
        held += (found.low or 0.0) <= true <= (math.inf if found.high is None else found.high)
    assert held / 300 >= 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)
    assert held < 300, "an interval that always holds says nothing"


def test_equal_models_diverge_by_nothing_and_one_position_has_no_error() -> None:
    oracle = logits(40, 9)
    found = statistics(compare_logits(oracle, oracle, [0] * 40))

    assert found.kl_mean.value == found.kl_max == 0.0 and found.perplexity_ratio.value == 1.0
    assert found.top1_agreement.value == found.top1_agreement.high == 1.0
    assert 0.9 < (found.top1_agreement.low or 0) < 1.0, "forty positions do not show perfection"
    assert mean(np.array([2.0])).error is None
    assert statistics(compare_logits(oracle[:1], oracle[:1], [0])).perplexity_difference.error is None


def test_a_candidate_that_is_not_finite_agrees_with_nothing() -> None:
    oracle = logits(40, 9)
    for broken in (np.nan, np.inf):
        candidate = oracle.copy()
        candidate[7, oracle[7].argmax()] = broken
        compared = compare_logits(oracle, candidate, [0] * 40)
        found = statistics(compared)

        assert compared.candidate[7] == -1 and compared.kl[7] == math.inf
        assert found.kl_mean.value == found.perplexity.value == math.inf
        assert found.kl_mean.error is None and found.perplexity_correlation is None
        assert found.kl_median.value == 0.0
        assert found.top1_agreement.value == pytest.approx(39 / 40)


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------

VOCABULARY = 40


@frozen(eq=False)
class Drawn:
    """A model whose logits are drawn from its tokens; what is tested is what becomes of them."""

    name: str = "drawn"
    vocabulary: int = VOCABULARY
    noise: float = 0.0
    wrong: Sequence[tuple[int, int]] = ()
    watched: list[Any] = field(factory=list)
    watch: Callable[[], Any] = lambda: None

    def run(self, tokens: Sequence[int]) -> Activations:
        self.watched.append(self.watch())
        rows = logits(len(tokens), self.vocabulary, seed=tokens[0])
        rows += logits(len(tokens), self.vocabulary, seed=99, spread=self.noise)
        for first, index in self.wrong:
            if tokens[0] == first:
                rows[index, (rows[index].argmax() + 1) % self.vocabulary] += 100.0
        return Activations(rows)


@frozen(eq=False)
class SideBySide(Drawn):
    """The same, several windows at once."""

    def run_many(self, prompts: Sequence[Sequence[int]]) -> list[Activations]:
        self.watched.append(len(prompts))
        return [Drawn.run(self, tokens) for tokens in prompts]


def corpus_of(windows: int, window: int = 32) -> Corpus:
    """Windows whose first tokens are 0, 1, 2 and so on."""
    return Corpus(
        "mine", "0" * 64, 10**6, tuple((at, *(token % 11 for token in range(window - 1))) for at in range(windows))
    )


def measured(candidate: Drawn, tmp_path: Path, windows: int = 5, *, routed: bool = False) -> corpus_run.CorpusResult:
    corpus = corpus_of(windows)
    oracle = run_oracle_on(corpus, Runner(Drawn()), VOCABULARY, tmp_path, SILENT)
    return measure(corpus, oracle, Runner(candidate), SILENT, routed=routed)


def test_the_figures_are_of_the_positions_that_count_of_every_window(tmp_path: Path) -> None:
    found = measured(Drawn(noise=0.01), tmp_path)

    parts = []
    for tokens in corpus_of(5).windows:
        rows = slice(16, 31)
        ours, theirs = (Drawn(noise=noise).run(tokens).logits[rows] for noise in (0.01, 0.0))
        parts.append(compare_logits(theirs, ours, tokens[17:32]))
    assert found.statistics == statistics(Compared.joined(parts))
    assert found.statistics.counted == 5 * 15
    assert found.passed and found.power.positions > 5 * 15, "the margin rule counts all positions"


def test_a_confident_flip_anywhere_in_a_window_fails_and_is_named(tmp_path: Path) -> None:
    for index in (0, 20, 31):
        found = measured(Drawn(wrong=[(3, index)]), tmp_path)

        (flip,) = found.flips
        row = Drawn().run(corpus_of(5).windows[3]).logits[index]
        assert (flip.window, flip.index, flip.token) == (3, index, corpus_of(5).windows[3][index])
        assert (flip.oracle, flip.candidate) == (row.argmax(), (row.argmax() + 1) % VOCABULARY)
        assert not found.passed and found.power.flips == 1
        assert found.reasons[0].startswith("corpus mine: 1 confident flip in ")
        assert f"the worst in window 4 at position {index} with an oracle margin of" in found.reasons[0]


def test_windows_run_side_by_side_as_many_as_their_logits_leave_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = measured(Drawn(noise=0.1), tmp_path)
    for room, groups in ((10**9, [5]), (2 * 32 * VOCABULARY, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(corpus_run, "_LOGITS_AT_ONCE", room)
        model = SideBySide(noise=0.1)
        assert measured(model, tmp_path).statistics == one_by_one.statistics
        assert [seen for seen in model.watched if seen is not None] == groups


def test_the_oracle_lies_in_a_file_that_no_folder_shows_and_leaves_nothing(tmp_path: Path) -> None:
    oracle, candidate = (Drawn(watch=lambda: list(tmp_path.iterdir())) for _ in range(2))
    corpus = corpus_of(3)

    mapped = run_oracle_on(corpus, Runner(oracle), VOCABULARY, tmp_path, SILENT)
    measure(corpus, mapped, Runner(candidate), SILENT, routed=False)

    assert isinstance(mapped, np.memmap)
    assert oracle.watched == candidate.watched == [[], [], []]
    np.testing.assert_array_equal(mapped[2], Drawn().run(corpus.windows[2]).logits)


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_oracle_on(corpus_of(3), Runner(Drawn(watch=interrupted)), VOCABULARY, tmp_path, SILENT)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_said_before_the_oracle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    oracle = Drawn()
    with pytest.raises(EnvironmentLacks, match=r"take 0\.0 GiB, and .* has no room for them.*-o DIR"):
        run_oracle_on(corpus_of(3), Runner(oracle), VOCABULARY, tmp_path, SILENT)
    assert oracle.watched == []


def test_a_flip_over_a_corpus_counts_from_the_margin_on() -> None:
    margins = np.array([math.nextafter(CONFIDENT_MARGIN, 0.0), CONFIDENT_MARGIN, 1.0])
    compared = Compared(margins, np.zeros(3, int), np.ones(3, int), *[np.zeros(3)] * 3)

    for sure_from, flipped in ((CONFIDENT_MARGIN, [1, 2]), (0.5, [2]), (1.5, [])):
        assert [flip.index for flip in corpus_run._flips(0, corpus_of(1, 3), compared, sure_from)] == flipped


def anonymous_bytes() -> int:
    """Memory of this process that no file is behind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this kernel does not count anonymous memory")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says what memory a process has")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    wide, window = 50_000, 32
    peaks = []
    for windows in (2, 12):
        seen: list[int] = []
        model = Drawn(vocabulary=wide, watched=seen, watch=anonymous_bytes)
        corpus = corpus_of(windows, window)
        mapped = run_oracle_on(corpus, Runner(model), wide, tmp_path, SILENT)
        result = measure(corpus, mapped, Runner(model), SILENT, routed=False)
        assert result.statistics.counted == windows * 15
        peaks.append(max(seen))
    assert peaks[1] - peaks[0] < 3 * window * wide * 4, "ten more windows take no more than a few would"


# ---------------------------------------------------------------------------------------------------------------------
# Routed models
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_without_a_router_may_flip_nowhere_and_a_routed_one_as_often_as_chance_explains() -> None:
    assert [flips_allowed(positions, routed=False) for positions in (0, 470, 10**5)] == [0, 0, 0]
    assert [flips_allowed(positions, routed=True) for positions in (0, 10, 470)] == [0, 0, 4]
    many = flips_allowed(100_000, routed=True)
    assert 1.0 < many / 100_000 / ROUTED_FLIP_RATE < 1.15, "of many positions the rate itself decides"


def test_a_corpus_counts_flips_against_what_is_allowed(tmp_path: Path) -> None:
    wrong = [(at, index) for at in range(40) for index in (3,) if at < 9]
    for routed in (False, True):
        found = measured(Drawn(wrong=wrong), tmp_path, windows=40, routed=routed)
        assert len(found.flips) == 9
        assert found.flips_allowed == flips_allowed(found.power.positions, routed=routed)
        assert found.passed == (found.flips_allowed >= 9) == (not found.reasons)
    assert found.flips_allowed in range(5, 9) and not found.passed


@pytest.mark.parametrize(
    ("running_text", "experts", "allowed"),
    [(True, 2, 4), (True, None, 0), (False, 2, 0)],
    ids=["window", "dense", "prompt"],
)
def test_only_running_text_allows_a_routed_model_flips(running_text: bool, experts: int | None, allowed: int) -> None:
    tokens = corpus_of(1, 512).windows[0]
    prompt = TokenizedPrompt(Prompt("p", running_text=running_text), tokens, ("x",) * 512)

    def result(flips: int) -> PromptResult:
        runner = Runner(Drawn(wrong=[(0, index) for index in range(flips)]), arithmetic="torch")
        references = run_oracle(Runner(Drawn()), [prompt], SILENT)
        bounds = GENERAL.of_recipe({}, 1, "torch")
        report = gate(
            references,
            Models(runner, runner, None),
            lambda _arithmetic: bounds,
            SILENT,
            control_bounds=bounds,
            experts_per_token=experts,
            quantized=False,
            allow_weak=True,
        )
        return report.results[0]

    assert result(0).flips_allowed == allowed
    assert not result(allowed).flips_too_many
    too_many = result(allowed + 1)
    assert too_many.flips_too_many and not too_many.passed
