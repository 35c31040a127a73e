"""The work of `zoo verify`: a bundle against its record and, where that is at hand, against its checkpoint.

A gate says how far a bundle is off. This says within seconds whether it is plainly not what it was built from: its
tokenizer, its names, its functions, its weights, and the logits of a few tokens.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from attrs import evolve

from coreai_zoo.backend import Check
from coreai_zoo.build.design import design
from coreai_zoo.build.expected import expected_by
from coreai_zoo.build.rebuild import recorded_request
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.expected import Expected
from coreai_zoo.bundle.find import checkpoint_of
from coreai_zoo.bundle.verify import backend_of, verify
from coreai_zoo.checkpoint.tokenizer import encode, load_tokenizer
from coreai_zoo.errors import BadInput, CheckFailed, EnvironmentLacks, ZooError
from coreai_zoo.gates.candidate import AssetCandidate
from coreai_zoo.gates.oracle import default_cache
from coreai_zoo.gates.prompts import ANCHOR, BUILT_IN
from coreai_zoo.gates.rule import Verdict, compare
from coreai_zoo.gates.run import margin_of_asset, oracle_of
from coreai_zoo.gates.teacher_forced import check_checkpoint
from coreai_zoo.plugins import Plugins

FEW = 6
"""Tokens that the asset and the oracle are fed: a second of the runtime."""

PLAINLY_WRONG = 0.5
"""Median relative error (see `rule.Position`) from which logits are not those of the model, whatever its recipe."""


def verify_bundle(bundle: Bundle, plugins: Plugins, given: Path | None = None) -> list[Check]:
    """Every check of a bundle, against its checkpoint too where that is given, the sample's, or in the hub's cache.

    Raises:
        BadInput: when what was given is not its checkpoint, or its backend is not installed.
    """
    checkpoint, expected, unknown = _origin(bundle, plugins, given)
    checks = verify(
        bundle, plugins.backends(), plugins.tokenizer_classes(), recipes=plugins.recipes(), expected=expected
    )
    if unknown is not None:
        checks.append(unknown)
    ran = any(check.name == "step" for check in checks) and all(check.passed for check in checks)
    if checkpoint is not None and expected is not None and ran:
        checks.append(check_few_tokens(bundle, plugins, checkpoint))
    return checks


def _origin(bundle: Bundle, plugins: Plugins, given: Path | None) -> tuple[Path | None, Expected | None, Check | None]:
    """The checkpoint, what the bundle has to hold, and a check that says what of it is not known."""
    checkpoint = None
    try:
        checkpoint = checkpoint_of(bundle, plugins, given)
        check_checkpoint(bundle, checkpoint)
    except (BadInput, EnvironmentLacks) as error:
        if given is not None:
            raise
        missing = error.message.rstrip(".")
        if checkpoint is not None and bundle.build.get("sample"):  # which is whole wherever its plugin is
            return None, None, Check("source", False, missing)
    else:
        if "request" not in bundle.build:
            told = "an earlier version made the bundle, and did not record what was asked for: not compared with that"
            return checkpoint, None, Check("source", True, told)
        try:
            return checkpoint, expected_of(bundle, checkpoint, plugins), None
        except ZooError as error:
            return checkpoint, None, Check("source", False, f"nothing can be designed from the checkpoint: {error}")
    try:
        expected = expected_of(bundle, None, plugins)
        left = "tokenizer and weights are"
    except ZooError:
        expected, left = None, "name, functions, tokenizer and weights are"
    return None, expected, Check("checkpoint", True, f"{left} not compared with it: {missing}")


def expected_of(bundle: Bundle, checkpoint: Path | None, plugins: Plugins) -> Expected:
    """What `bundle` has to hold by its checkpoint or, without one, by the facts of its entry. No weight is read.

    Raises:
        BadInput: when neither is known, or nothing can be made of what is.
    """
    entry = bundle.build["entry"]
    if checkpoint is None and (not entry or entry.get("differences") or entry.get("file")):
        raise BadInput("Without its checkpoint it is not known what the bundle has to hold.")
    request, _ = recorded_request(bundle, checkpoint, bundle.directory.parent)
    return expected_by(design(evolve(request, dry=True), plugins), checkpoint)


def check_few_tokens(bundle: Bundle, plugins: Plugins, checkpoint: Path) -> Check:
    """The check of the asset's logits for a few tokens against Hugging Face's on the checkpoint.

    The oracle's answer is kept in the cache of this machine: it is the same for every bundle of the checkpoint.
    """
    tokenizer = load_tokenizer(bundle.tokenizer)
    tokens = encode(tokenizer, BUILT_IN[ANCHOR].text or "")[: min(FEW, bundle.max_context)]
    try:
        wanted = oracle_of(bundle, plugins, checkpoint, cache=default_cache()).run(tokens)
    except (BadInput, EnvironmentLacks) as error:
        return Check("logits", True, f"not compared: {error}")
    try:
        found = AssetCandidate(bundle, backend_of(bundle, plugins.backends())).run(tokens)
    except CheckFailed as error:
        return Check("logits", False, str(error))
    return _judged(compare(tokens, wanted, found, sure_from=margin_of_asset(bundle, plugins, checkpoint)))


def _judged(verdict: Verdict) -> Check:
    flips = verdict.confident_flips
    error = float(np.median([position.relative_error for position in verdict.positions]))
    count = f"{verdict.matched} of {len(verdict.positions)} tokens as by Hugging Face on the checkpoint"
    if flips:
        return Check("logits", False, f"{count}, {len(flips)} flips where it is sure, by up to {flips[0].margin:.2f}")
    if not error <= PLAINLY_WRONG:
        return Check("logits", False, f"{count}, but the median relative error is {error:.3g}")
    return Check("logits", True, f"{count}, median relative error {error:.2g}")
