"""The transcript of a gate: everything that was fed, computed and decided, as JSON. docs/gate.md describes the schema.

The report and the card are made from it alone, so whoever has the transcript can make them again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import attrs
from attrs import frozen

from coreai_zoo import machine
from coreai_zoo.bounds import CONFIDENT_MARGIN, Bounds
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.card import CARD, with_measurements
from coreai_zoo.bundle.layout import GATE_FOLDER, REPORT, TRANSCRIPT
from coreai_zoo.disk import existing_parent
from coreai_zoo.errors import BadInput
from coreai_zoo.gate import GateResult
from coreai_zoo.gates.corpus_run import CorpusResult
from coreai_zoo.gates.headroom import headroom_record
from coreai_zoo.gates.power import CONFIDENCE, Power
from coreai_zoo.gates.prompts import WEAK_FRACTION
from coreai_zoo.gates.rule import Verdict
from coreai_zoo.gates.teacher_forced import GateReport, PromptResult, attribution

SCHEMA = 1
"""Raised when a field changes its meaning or goes; a new field does not raise it."""


@frozen
class Run:
    """One run of a gate on a bundle.

    Attributes:
        bundle: what was judged.
        oracle: name of the reference.
        control: name of the control; None without one.
        command: arguments of `zoo gate` that repeat it, without the machine's paths.
        seconds: time that each stage took.
        gates: what plugins' gates found.
        text_of: the text of a token by its id, None where there is none.
        remarks: which prompts were left out, and why; what of a prompt could not be checked.
        corpus: what was measured over a running text; None where that was not asked for.
    """

    bundle: Bundle
    oracle: str
    control: str | None
    command: Sequence[str]
    seconds: Mapping[str, float]
    gates: Sequence[GateResult] = ()
    text_of: Callable[[int], str | None] = lambda _token: None
    remarks: Sequence[str] = ()
    corpus: CorpusResult | None = None


def transcript(run: Run, report: GateReport) -> dict[str, Any]:
    """The transcript of one bundle's gate; every value is JSON, and a number that is not finite is null."""
    failed_gates = [f"gate {gate.gate}: {gate.summary}" for gate in run.gates if not gate.passed]
    over_corpus = () if run.corpus is None else run.corpus.reasons
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "verdict": {
            "passed": report.passed and not over_corpus and not failed_gates,
            "reasons": [*report.reasons, *over_corpus, *failed_gates],
            "weak_prompts_allowed": list(report.weak_allowed),
        },
        "power": power_record(_power(report)),
        "headroom": headroom_record(report.headroom),
        "bundle": _bundle(run.bundle),
        "inputs": {
            "checkpoint": {
                key: value for key, value in run.bundle.build["source"].items() if key in ("config_sha256", "files")
            },
            "oracle": run.oracle,
            "control": run.control,
            "confident_margin": CONFIDENT_MARGIN,
            "weak_fraction": WEAK_FRACTION,
            "command": list(run.command),
        },
        "prompts": [_prompt(result, run.text_of, quantized=report.quantized) for result in report.results],
        "corpus": None if run.corpus is None else _corpus(run.corpus, run.text_of),
        "remarks": list(run.remarks),
        "gates": [attrs.asdict(gate) for gate in run.gates],
        "environment": _environment(run),
    }
    finite: dict[str, Any] = _finite(record)
    return finite


def _power(report: GateReport) -> Power:
    judged = [result.verdict for result in report.results if result.verdict is not None]
    return Power(
        sum(verdict.confident_positions for verdict in judged), sum(len(verdict.confident_flips) for verdict in judged)
    )


def power_record(power: Power) -> dict[str, Any]:
    """What a number of positions shows, as the transcript has it."""
    return {
        **attrs.asdict(power),
        "confidence": CONFIDENCE,
        "excluded_rate": power.excluded_rate,
        "smoke_test": power.smoke_test,
        "statement": power.statement,
    }


def _bundle(bundle: Bundle) -> dict[str, Any]:
    build = bundle.build
    return {
        "name": build["name"],
        "entry": bundle.entry,
        "title": bundle.title,
        "hf_id": bundle.origin.get("hf_id"),
        "hf_revision": bundle.origin.get("revision"),
        "sample": build.get("sample"),
        "notes": build.get("notes", []),
        "layers": build["layers"],
        "contract": build.get("contract", {}).get("name"),
        "recipe": build.get("recipe"),
        "roles": build.get("roles"),
        "weights": build.get("weights"),
        "bytes": sum(record["bytes"] for record in build["files"].values()),
        "asset_bytes": bundle.asset_bytes,
        # Holds the hash of every other file.
        "build_sha256": hashlib.sha256((bundle.directory / "build.json").read_bytes()).hexdigest(),
    }


def _environment(run: Run) -> dict[str, Any]:
    """Versions, machine and times. No host name, no path."""
    versions = {"coreai-zoo": distributions.version("coreai-zoo")}
    for name in ("torch", "transformers", "numpy", *run.bundle.build.get("versions", {})):
        with contextlib.suppress(distributions.PackageNotFoundError):
            versions[name] = distributions.version(name)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": machine.cores(),
        "versions": versions,
        "seconds": {stage: round(seconds, 2) for stage, seconds in run.seconds.items()},
    }


def _prompt(result: PromptResult, text_of: Callable[[int], str | None], *, quantized: bool) -> dict[str, Any]:
    prompt = result.prompt
    record = {
        "name": prompt.name,
        "judged": not result.refused,
        "passed": None if result.refused else result.passed,
        "strength": attrs.asdict(result.strength) | {"weak": result.strength.weak},
        "tokens": list(prompt.tokens),
        "pieces": list(prompt.pieces),
        "candidate": result.candidate,
    }
    if result.verdict is None:
        return record
    return record | {
        "matched": result.verdict.matched,
        "ties": result.verdict.ties,
        "confident_flips": len(result.verdict.confident_flips),
        "flips_allowed": result.flips_allowed,
        "bounds": None if result.bounds is None else attrs.asdict(result.bounds),
        "checks": [attrs.asdict(check) | {"passed": check.passed} for check in result.checks],
        "stop": None if result.stop is None else {"token": prompt.stop, **attrs.asdict(result.stop)},
        "positions": _positions(result.verdict, result.control, result.bounds, text_of, quantized=quantized),
        "hidden_error": result.verdict.hidden_error,
        "control": None
        if result.control is None
        else {
            "matched": result.control.matched,
            "confident_flips": len(result.control.confident_flips),
            "hidden_error": result.control.hidden_error,
        },
    }


def _corpus(result: CorpusResult, text_of: Callable[[int], str | None]) -> dict[str, Any]:
    corpus = result.corpus
    texts = ("token", "oracle", "candidate")
    return {
        "name": corpus.name,
        "sha256": corpus.sha256,
        "tokens": corpus.tokens,
        "window": corpus.window,
        "windows": len(corpus.windows),
        "candidate": result.candidate,
        "passed": result.passed,
        **attrs.asdict(result.statistics),
        "power": power_record(result.power),
        "flips_allowed": result.flips_allowed,
        "sure_from": result.sure_from,
        "flips": [
            attrs.asdict(flip) | {f"{whose}_text": text_of(getattr(flip, whose)) for whose in texts}
            for flip in result.flips
        ],
    }


def _positions(
    verdict: Verdict,
    control: Verdict | None,
    bounds: Bounds | None,
    text_of: Callable[[int], str | None],
    *,
    quantized: bool,
) -> list[dict[str, Any]]:
    rows = []
    gap = (bounds and bounds.router_gap) or 0.0
    for position in verdict.positions:
        row = attrs.asdict(position) | {"verdict": position.verdict, "near_tie": position.near_tie(gap)}
        row |= {"oracle_text": text_of(position.oracle), "candidate_text": text_of(position.candidate)}
        if control is not None:
            theirs = control.positions[position.index]
            row["attribution"] = attribution(position, control, quantized=quantized)
            row["control"] = {
                key: getattr(theirs, key)
                for key in ("candidate", "cosine", "max_abs_logit_error", "kl_divergence", "relative_error")
            }
        rows.append(row)
    return rows


def _finite(value: Any) -> Any:
    """The value with null for infinity and NaN, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before anything runs.

    Raises:
        BadInput: naming the folder.
    """
    existing = existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise BadInput(
            f"The report cannot be written to {folder}: {existing} is not a folder that can be written to.",
            "Choose another with -o DIR; the bundle's card is then left as it is.",
        )


def write(folder: Path, record: Mapping[str, Any], html: str) -> None:
    """Write transcript and report, each whole or not at all.

    Raises:
        BadInput: when `folder` cannot be written to.
    """
    try:
        replace(folder / TRANSCRIPT, to_json(record).encode(), folder)
        replace(folder / REPORT, html.encode(), folder)
    except OSError as error:
        message = f"The report cannot be written to {folder}: {error.strerror}."
        raise BadInput(message, "Choose another with -o DIR.") from error


def write_card(bundle: Bundle, markdown: str) -> None:
    """Put what was measured into the bundle's card; a bundle without one stays without.

    Raises:
        BadInput: when the card cannot be written.
    """
    card = bundle.directory / CARD
    if not card.is_file():
        return
    try:
        replace(card, with_measurements(card.read_bytes(), markdown), bundle.directory / GATE_FOLDER)
    except OSError as error:
        raise BadInput(f"{card} cannot be written: {error.strerror}.") from error


def replace(path: Path, content: bytes, scratch: Path) -> None:
    """Write `content` to `path` through a file in `scratch`, on the same disk: whole or not at all."""
    scratch.mkdir(parents=True, exist_ok=True)
    partial = scratch / f".{path.name}.partial"
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(record: Mapping[str, Any]) -> str:
    """The transcript as it is on disk."""
    return json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
