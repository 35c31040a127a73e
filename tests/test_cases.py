"""Checkpoints with the oddities of those in the wild, from the command line to logits; `make_cases` says what is right.

Each case is written, built, and what it promises is done with the bundle. Where a bundle has to be made, its logits are
compared with those of the class of transformers that loads the same model as a plain checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import make_cases
from command import zoo
from coreai_zoo.backend import drain
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.plugins import default_plugins

CASES = [case["name"] for case in make_cases.CASES]
TOKENS = [int(token) for token in np.random.default_rng(0).integers(0, 256, 40)]
FEW = 12  # of them, where the case is not about positions: a step on the runtime takes half a tenth of a second


@pytest.mark.parametrize("name", CASES)
def test_an_odd_checkpoint_comes_out_right(name: str, tmp_path: Path) -> None:
    with quiet_transformers():
        (case,) = make_cases.write_all(tmp_path, [name])
    folder, out = tmp_path / case["folder"], tmp_path / "out"
    command = [word.format(folder=folder, out=out) for word in case["command"]]
    result = zoo(*command)
    tokens = TOKENS if "rope" in name else TOKENS[:FEW]
    problems = [wrongs(outcome, result, folder, out, tmp_path, tokens) for outcome in case["right"]]
    assert [] in problems, problems


def wrongs(
    outcome: Mapping[str, Any], result: Any, folder: Path, out: Path, root: Path, tokens: Sequence[int]
) -> list[str]:
    """What of an outcome does not hold, in words."""
    said = result.output.replace(str(folder), "")
    wrong = [f"exit code {result.exit_code}: {said}"] * (result.exit_code != outcome["exit"])
    if wrong:
        return wrong
    if outcome["build"] == "refused":
        return lacking(said, outcome["stderr_has"]) + [word for word in outcome["stderr_lacks"] if word in said]
    (directory,) = (path for path in out.iterdir() if not path.name.startswith("."))
    wrong = lacking(said, outcome["output_has"])
    for step in outcome["then"]:
        wrong += wrongs_of_step(step, folder, directory)
    twin = root / outcome["reference"]["folder"]
    return wrong + disagreement(Bundle.open(directory), twin, outcome["reference"]["class"], tokens)


def wrongs_of_step(step: Mapping[str, Any], folder: Path, bundle: Path) -> list[str]:
    """What of a command on the bundle does not hold."""
    command = [word.format(folder=folder, bundle=bundle) for word in step["command"]]
    result = zoo(*command)
    said = result.output.replace(str(folder), "")
    wrong = [f"{command}: exit code {result.exit_code}: {said}"] * (result.exit_code != step["exit"])
    wrong += lacking(said, [*step.get("stderr_has", ()), *step.get("output_has", ())])
    if "stdout" in step and result.stdout.rstrip("\n") != step["stdout"].rstrip("\n"):
        wrong.append(f"{command}: {result.stdout!r} instead of {step['stdout']!r}")
    for path, expected in step.get("json", {}).items():
        found = at_path(json.loads(result.stdout), path.split("."))
        held = expected["holds"] in found.values() if isinstance(expected, dict) else found == expected
        wrong += [f"{command}: {path} is {found}, not {expected}"] * (not held)
    return wrong


def at_path(content: Any, path: Sequence[str]) -> Any:
    for part in path:
        content = content[int(part)] if isinstance(content, list) else content[part]
    return content


def lacking(text: str, words: Sequence[str]) -> list[str]:
    """The keywords that a text lacks; of several with | one is enough."""
    return [
        f"no word of {word}: {text}" for word in words if not any(w in text.lower() for w in word.lower().split("|"))
    ]


def disagreement(bundle: Bundle, twin: Path, architecture: str, tokens: Sequence[int]) -> list[str]:
    """Whether the logits of a bundle are not those of the twin that transformers loads."""
    with quiet_transformers():
        import transformers

        model = getattr(transformers, architecture).from_pretrained(twin, dtype=torch.float32).eval()
        with torch.inference_mode():
            expected = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    backend = default_plugins().backends()["coreai"]
    with backend.stepper(bundle.asset, bundle.functions, len(tokens)) as stepper:
        logits = np.stack(list(drain(stepper, tokens))).astype(np.float32)
    cosine = (logits * expected).sum(1) / np.linalg.norm(logits, axis=1) / np.linalg.norm(expected, axis=1)
    return [f"cosine {cosine.min():.5f} to {architecture}"] * bool(cosine.min() < 0.995)
