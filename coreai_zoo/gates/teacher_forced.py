"""The host's gate: the oracle, the candidate and its control on the same prompts, and the verdict.

All prompts go through the oracle, and the weak ones are refused before anything else runs. The rest go through the
control and the candidate. Each prompt is judged by the margin rule and by the recipe's bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from attrs import field, frozen

from coreai_zoo.bounds import CONFIDENT_MARGIN, Arithmetic, Bounds
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.errors import BadInput, near_paths
from coreai_zoo.gate import Activations, BatchingModel, Model
from coreai_zoo.gates.bounds import BoundCheck, broken, check_bounds, check_control
from coreai_zoo.gates.headroom import Headroom, headroom
from coreai_zoo.gates.prompts import Strength, TokenizedPrompt, strength
from coreai_zoo.gates.rule import Position, Verdict, compare, flips_allowed, flips_told
from coreai_zoo.progress import Reporter


class Ticker:
    """A function that a model calls after each of its steps, whoever is counting."""

    def __init__(self) -> None:
        self.count: Callable[[], None] = lambda: None

    def __call__(self) -> None:
        """Count one more step."""
        self.count()


@frozen(eq=False)
class Runner:
    """A model, how its progress is counted, and which bounds it is held to.

    Attributes:
        model: the model.
        ticker: what the model calls after each step.
        steps: how many steps a prompt takes.
        arithmetic: the arithmetic whose bounds hold for it.
    """

    model: Model
    ticker: Ticker = field(factory=Ticker)
    steps: Callable[[TokenizedPrompt], int] = lambda prompt: len(prompt.tokens)
    arithmetic: Arithmetic = "runtime"

    def run(self, prompts: Sequence[TokenizedPrompt], stage: str, report: Reporter) -> dict[str, Activations]:
        """The model's activations on each prompt, by the prompt's name."""
        if not prompts:
            return {}
        found = {}
        positions = sum(len(prompt.tokens) for prompt in prompts)
        detail = f"{self.model.name}, {positions} positions of {len(prompts)} prompt{'s' * (len(prompts) > 1)}"
        with report.stage(stage, detail), report.steps("", sum(map(self.steps, prompts))) as self.ticker.count:
            if isinstance(self.model, BatchingModel):
                results = self.model.run_many([prompt.tokens for prompt in prompts])
                return {prompt.name: result for prompt, result in zip(prompts, results, strict=True)}
            for prompt in prompts:
                found[prompt.name] = self.model.run(prompt.tokens)
        return found


@frozen
class StopCheck:
    """Whether a candidate ends its turns on a chat.

    Attributes:
        expected: positions where the oracle is sure that the turn ends.
        missed: those of them where the candidate goes on, and a flip is an error.
        due: whether such a position is due: a turn ends within the prompt, and it must not be weak.
    """

    expected: tuple[int, ...]
    missed: tuple[int, ...]
    due: bool = True

    @property
    def passed(self) -> bool:
        """Whether the candidate ends every turn that the oracle ends, and there is one where one is due.

        Without any, nothing was checked.
        """
        return not self.missed and (bool(self.expected) or not self.due)


@frozen
class PromptResult:
    """The result of one prompt. A refused prompt has no candidate, no bounds and no verdict.

    Attributes:
        prompt: its tokens.
        strength: how sure the oracle is along it.
        candidate: name of what was judged.
        bounds: what the candidate was held to.
        verdict: the candidate against the oracle.
        control: the unquantized control against the oracle; None without a control.
        checks: every bound, kept or broken.
        stop: the ends of turns; None where the prompt is no chat.
        flips_allowed: how many confident flips are no error, of a routed model over running text.
    """

    prompt: TokenizedPrompt
    strength: Strength
    candidate: str | None = None
    bounds: Bounds | None = None
    verdict: Verdict | None = None
    control: Verdict | None = None
    checks: tuple[BoundCheck, ...] = ()
    stop: StopCheck | None = None
    flips_allowed: int = 0

    @property
    def refused(self) -> bool:
        """Whether nothing was judged by it: the oracle was not sure enough, or nothing runs a prompt of its length."""
        return self.verdict is None

    @property
    def flips_too_many(self) -> bool:
        """Whether there are more confident flips than are allowed."""
        return self.verdict is not None and len(self.verdict.confident_flips) > self.flips_allowed

    @property
    def passed(self) -> bool:
        """No confident flip but those allowed, no broken bound, no missed end of turn; a refused prompt passes."""
        if self.verdict is None:
            return True
        stops = self.stop is None or self.stop.passed
        return not self.flips_too_many and stops and all(check.passed for check in self.checks)


@frozen
class GateReport:
    """The results of all prompts.

    Attributes:
        results: one for each prompt, in the order in which they ran.
        weak_allowed: names of prompts that were judged although they are weak.
        quantized: whether the bundle stores any weight as integers.
        headroom: of each place that the oracle shows, over all prompts, the least first.
    """

    results: tuple[PromptResult, ...]
    weak_allowed: tuple[str, ...]
    quantized: bool
    headroom: tuple[Headroom, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every prompt passed."""
        return all(result.passed for result in self.results)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it failed, one phrase each; empty when it passed."""
        return tuple(f"{result.prompt.name}: {reason}" for result in self.results for reason in _reasons(result))


def _reasons(result: PromptResult) -> list[str]:
    if result.verdict is None:
        return []
    reasons = flips_told(result.verdict) if result.flips_too_many else []
    if result.stop is not None and not result.stop.passed:
        reasons.append(_no_stop(result.prompt, result.stop))
    return reasons + broken(result.checks)


def _no_stop(prompt: TokenizedPrompt, stop: StopCheck) -> str:
    """Why the ends of turns do not pass, and what to do where the bundle may not be to blame."""
    if stop.missed:
        return f"no end of turn at position {', '.join(str(at) for at in stop.missed)}"
    without = "--allow-weak-prompt judges the chat all the same, --prompts NAME,... leaves it out"
    if prompt.stop is None:
        return f"the checkpoint names no token that ends a turn, so nothing says where text stops ({without})"
    return f"the oracle is nowhere sure of the end of a turn, token {prompt.stop}, so no stop is checked ({without})"


def attribution(position: Position, control: Verdict | None, *, quantized: bool) -> str | None:
    """The origin of a flip; None for no flip, or without a control.

    `precision` where the unquantized control flips too. Otherwise what sets the bundle apart from the control:
    `quantization`, or `runtime` where nothing is quantized.
    """
    if position.verdict == "match" or control is None:
        return None
    if control.positions[position.index].verdict != "match":
        return "precision"
    return "quantization" if quantized else "runtime"


def check_checkpoint(bundle: Bundle, checkpoint: Path) -> None:
    """Refuse any checkpoint but the one that the bundle was built from.

    Raises:
        BadInput: naming what differs, or when there is no checkpoint.
    """
    if not checkpoint.is_dir():
        hint = "Pass the folder that holds its config.json and its .safetensors with --checkpoint DIR."
        raise BadInput(f"There is no checkpoint at {checkpoint}.", near_paths(checkpoint) or hint)
    recorded = {key: bundle.build["source"].get(key) for key in ("config_sha256", "files")}
    found = Checkpoint.open(checkpoint).identity()
    differing = [key for key in recorded if recorded[key] != found.get(key)]
    if differing:
        raise BadInput(
            f"{checkpoint} is not the checkpoint that {bundle.directory.name} was built from: "
            f"{' and '.join(differing)} differ from build.json.",
            "Gate a bundle against its own checkpoint.",
        )


# ---------------------------------------------------------------------------------------------------------------------
# The stages
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Reference:
    """A prompt with the oracle's answer."""

    prompt: TokenizedPrompt
    activations: Activations
    strength: Strength


def run_oracle(oracle: Runner, prompts: Sequence[TokenizedPrompt], report: Reporter) -> tuple[Reference, ...]:
    """The oracle's answer to every prompt, in their order."""
    found = oracle.run(prompts, "oracle", report)
    return tuple(Reference(prompt, found[prompt.name], strength(found[prompt.name].logits)) for prompt in prompts)


def require_strong(references: Sequence[Reference], report: Reporter, *, allow_weak: bool = False) -> tuple[str, ...]:
    """Refuse to judge by prompts on which the oracle is not sure of itself.

    Returns:
        Names of the weak prompts. They are judged where `allow_weak` says so, and left out otherwise.

    Raises:
        BadInput: for a weak prompt that is required, with the numbers.
    """
    weak = [reference for reference in references if reference.strength.weak]
    for reference in weak:
        name = reference.prompt.name
        if allow_weak:
            report.note(f"prompt {name!r} is weak and judged all the same: {reference.strength}")
        elif reference.prompt.prompt.required:
            raise BadInput(
                f"The prompt {name!r} is too weak to judge by: {reference.strength}.",
                "Choose a prompt that the model is surer of, or pass --allow-weak-prompt.",
            )
        else:
            report.note(f"prompt {name!r} is refused: {reference.strength}")
    return tuple(reference.prompt.name for reference in weak)


@frozen
class Models:
    """The models that run beside the oracle.

    Attributes:
        candidate: what is judged on all other prompts.
        long_candidate: what is judged on long prompts; None to leave them out.
        control: the same decoder with unquantized weights; None for no control.
    """

    candidate: Runner
    long_candidate: Runner | None
    control: Runner | None

    def judging(self, prompt: TokenizedPrompt) -> Runner | None:
        """The candidate for `prompt`; None where the prompt is left out."""
        return self.long_candidate if prompt.long else self.candidate


def gate(
    references: Sequence[Reference],
    models: Models,
    bounds: Callable[[Arithmetic], Bounds],
    report: Reporter,
    *,
    control_bounds: Bounds,
    experts_per_token: int | None,
    quantized: bool,
    allow_weak: bool = False,
    controls: dict[str, Activations] | None = None,
    compute_dtype: str = "float16",
) -> GateReport:
    """Judge a candidate on prompts that the oracle has answered.

    Args:
        references: what `run_oracle` returned.
        models: candidates and control.
        bounds: the bounds of the bundle's recipe in a given arithmetic.
        report: is told of each stage.
        control_bounds: the bounds of an unquantized bundle in PyTorch, which the control is held to.
        experts_per_token: how many experts a router chooses; None without a router.
        quantized: whether the bundle stores any weight as integers.
        allow_weak: judge weak prompts too.
        controls: what the control computed for an earlier bundle of the same checkpoint, by the prompt's name. New
            results are added to it.
        compute_dtype: what the bundle computes in.

    Raises:
        BadInput: when a required prompt is weak.
        CheckFailed: when the asset cannot be run.
    """
    weak = require_strong(references, report, allow_weak=allow_weak)
    judged = [
        reference.prompt
        for reference in references
        if (allow_weak or reference.prompt.name not in weak) and models.judging(reference.prompt) is not None
    ]
    controls = {} if controls is None else controls
    if models.control is not None:
        controls |= models.control.run([prompt for prompt in judged if prompt.name not in controls], "control", report)
    found: dict[str, Activations] = {}
    for runner in dict.fromkeys(filter(None, (models.candidate, models.long_candidate))):
        stage = "judge" if runner is models.candidate else "long"
        found |= runner.run([prompt for prompt in judged if models.judging(prompt) is runner], stage, report)
    results = []
    for reference in references:
        name, judging = reference.prompt.name, models.judging(reference.prompt)
        if name not in found or judging is None:
            results.append(PromptResult(reference.prompt, reference.strength))
            continue
        control = None if models.control is None else controls[name]
        held_to = bounds(judging.arithmetic), control_bounds
        results.append(
            _judge(
                reference, judging.model.name, found[name], control, held_to, experts_per_token, allow_weak=allow_weak
            )
        )
    left = headroom((reference.activations.peaks for reference in references), compute_dtype)
    return GateReport(tuple(results), weak if allow_weak else (), quantized, left)


def _judge(
    reference: Reference,
    candidate: str,
    found: Activations,
    control: Activations | None,
    held_to: tuple[Bounds, Bounds],
    experts_per_token: int | None,
    *,
    allow_weak: bool,
) -> PromptResult:
    prompt, oracle, (bounds, control_bounds) = reference.prompt, reference.activations, held_to
    verdict = compare(prompt.tokens, oracle, found, experts_per_token, bounds.margin)
    checks = list(check_bounds(verdict, bounds))
    control_verdict = None
    if control is not None:
        control_verdict = compare(prompt.tokens, oracle, control, experts_per_token, control_bounds.margin)
        checks += check_control(verdict, control_verdict, bounds, control_bounds)
    return PromptResult(
        prompt,
        reference.strength,
        candidate,
        bounds,
        verdict,
        control_verdict,
        tuple(checks),
        stop_check(verdict, prompt.stop, due=prompt.ends_turns and not allow_weak) if prompt.prompt.turns else None,
        flips_allowed_on(prompt, verdict, routed=experts_per_token is not None),
    )


def flips_allowed_on(prompt: TokenizedPrompt, verdict: Verdict, *, routed: bool) -> int:
    """How many confident flips on a prompt are no error: of a routed model on running text some, else none."""
    return flips_allowed(verdict.confident_positions, routed=routed) if prompt.prompt.running_text else 0


def stop_check(verdict: Verdict, stop: int | None, *, due: bool = True) -> StopCheck:
    """The positions where the oracle is sure that the turn ends, and those of them where the candidate goes on.

    Args:
        verdict: on a chat.
        stop: the checkpoint's end-of-turn token; None where it names none, and then nothing is expected.
        due: see `StopCheck`.
    """
    sure = [position for position in verdict.positions if position.margin >= CONFIDENT_MARGIN]
    expected = [position for position in sure if position.oracle == stop]
    return StopCheck(
        tuple(position.index for position in expected),
        tuple(position.index for position in expected if position.candidate != stop and position.sure),
        due,
    )
