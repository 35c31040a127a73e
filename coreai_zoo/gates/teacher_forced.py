"""The host's gate: a prompt, the oracle on the checkpoint, the bundle's asset, and the margin rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from coreai_zoo.backends import Backend
from coreai_zoo.bundle import Bundle, load_tokenizer
from coreai_zoo.checkpoint import Checkpoint
from coreai_zoo.errors import BadInput
from coreai_zoo.gates.candidate import AssetCandidate
from coreai_zoo.gates.oracle import Oracle
from coreai_zoo.gates.rule import Verdict, judge, router_margins

DEFAULT_POSITIONS = 64

DEFAULT_PROMPT = '''def main(argv=None):
    """Read the command line and run the program."""
    parser = argparse.ArgumentParser(description="Print the lines of a file.")
    parser.add_argument("name", help="the name of the file to read")
    args = parser.parse_args(argv)
    with open(args.name) as f:
        for line in f:
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
'''


@frozen
class GateReport:
    """Verdict of one prompt with what is needed to read it."""

    candidate: str
    pieces: tuple[str, ...]
    verdict: Verdict


def tokenize(bundle: Bundle, prompt: str, positions: int | None = None) -> list[int]:
    """The first `positions` tokens of `prompt` by the bundle's own tokenizer; without a number, at most 64.

    Raises:
        BadInput: when the prompt is shorter, or longer than the bundle's context.
    """
    tokens: list[int] = load_tokenizer(bundle.tokenizer).encode(prompt).ids
    if not tokens:
        raise BadInput("The prompt is empty.", 'Give one with -p "...", or leave it out for the default.')
    if positions is None:
        positions = min(DEFAULT_POSITIONS, len(tokens), bundle.max_context)
    if positions > bundle.max_context:
        raise BadInput(f"{positions} positions are more than this bundle's context of {bundle.max_context}.")
    if len(tokens) < positions:
        raise BadInput(
            f"The prompt is {len(tokens)} tokens, and {positions} positions were asked for.",
            "Give a longer prompt, or fewer --positions.",
        )
    return tokens[:positions]


def check_checkpoint(bundle: Bundle, checkpoint: Path) -> None:
    """Refuse a checkpoint other than the one that the bundle was built from.

    Raises:
        BadInput: naming what differs.
    """
    recorded = {key: bundle.build["source"].get(key) for key in ("config_sha256", "files")}
    found = Checkpoint.open(checkpoint).identity()
    differing = [key for key in recorded if recorded[key] != found.get(key)]
    if differing:
        raise BadInput(
            f"{checkpoint} is not the checkpoint that {bundle.directory.name} was built from: "
            f"{' and '.join(differing)} differ from build.json.",
            "Gate a bundle against its own checkpoint.",
        )


def gate(
    bundle: Bundle,
    backend: Backend,
    checkpoint: Path,
    hf_config: Mapping[str, Any],
    tokens: Sequence[int],
    on_step: Callable[[], None] = lambda: None,
) -> GateReport:
    """Teacher-force `tokens` through oracle and bundle.

    Args:
        bundle: what is judged.
        backend: that it was written by.
        checkpoint: that it was built from.
        hf_config: the checkpoint's config, or that of the slice that was built.
        tokens: see `tokenize`.
        on_step: called after each step of the candidate.

    Raises:
        BadInput: for a checkpoint that does not fit the bundle.
        CheckFailed: when the asset cannot be run.
    """
    check_checkpoint(bundle, checkpoint)
    oracle = Oracle(Checkpoint.open(checkpoint), hf_config).run(tokens)
    candidate = AssetCandidate(bundle, backend, on_step)
    margins = None
    if oracle.router_logits is not None:
        margins = router_margins(oracle.router_logits, bundle.build["facts"]["experts_per_token"])
    verdict = judge(tokens, oracle.logits, candidate.run(tokens).logits, margins)
    return GateReport(candidate.name, _pieces(bundle, tokens), verdict)


def _pieces(bundle: Bundle, tokens: Sequence[int]) -> tuple[str, ...]:
    tokenizer = load_tokenizer(bundle.tokenizer)
    return tuple(tokenizer.decode([token], skip_special_tokens=False) for token in tokens)
