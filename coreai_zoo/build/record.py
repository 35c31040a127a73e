"""The records of a bundle: `metadata.json`, the card, and `build.json`, which holds all that determined its bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import attrs

from coreai_zoo.backend import Backend
from coreai_zoo.build.code import code_digest
from coreai_zoo.build.design import Design, usual_context
from coreai_zoo.build.figures import needs
from coreai_zoo.build.request import DEFAULT_BACKEND, DEFAULT_CONTRACT, DEFAULT_RECIPE
from coreai_zoo.bundle.bundle import signature_record
from coreai_zoo.bundle.card import CARD, render
from coreai_zoo.bundle.layout import BUILD_SCHEMA, card_digest, file_digests
from coreai_zoo.bundle.metadata import language_block, metadata
from coreai_zoo.checkpoint.portable_tokenizer import copy_tokenizer
from coreai_zoo.checkpoint.readme import texts
from coreai_zoo.checkpoint.tokenizer import tokenizer_files
from coreai_zoo.dates import build_date
from coreai_zoo.digest import file_sha256
from coreai_zoo.json_files import write_json
from coreai_zoo.overlay import LayerRewrite
from coreai_zoo.recipe_files import content_of
from coreai_zoo.recipes import one_or_several
from coreai_zoo.weights.plan import RoleTotal
from coreai_zoo.weights.quantizer import QUANTIZER_VERSION
from coreai_zoo.weights.store import WeightStore


def write_records(design: Design, store: WeightStore, partial: Path, tokenizer_classes: Mapping[str, str]) -> None:
    """Add everything but the asset to the bundle in `partial`.

    Args:
        design: the bundle's design.
        store: its weights.
        partial: folder of the bundle.
        tokenizer_classes: see `Plugins.tokenizer_classes`.
    """
    changes = copy_tokenizer(design.checkpoint.directory, partial / "tokenizer", tokenizer_classes)
    record = build_record(design, store) | _tokenizer(design.checkpoint.directory, partial / "tokenizer", changes)
    write_json(
        partial / "metadata.json",
        metadata(
            name=design.name,
            asset=design.asset,
            language=language_block(design.signatures, design.facts["vocab_size"], design.max_context),
            hf_id=design.source.origin.hf_id,
            hf_revision=design.source.origin.revision,
            compression=design.recipe.published_name,
            user_data={"sample": "true"} if design.sample else {},
            date=build_date(design.source_date_epoch),
        ),
    )
    for name, text in design.backend.extra_files.items():
        (partial / name).write_text(text, encoding="utf-8")
    files = file_digests(partial)
    card = render(record, files, needs(design), design.backend).encode()
    (partial / CARD).write_bytes(card)
    write_json(partial / "build.json", {**record, "files": dict(sorted({**files, CARD: card_digest(card)}.items()))})


def _tokenizer(checkpoint: Path, copied: Path, changes: list[str]) -> dict[str, Any]:
    """What of the checkpoint's tokenizer is not in the bundle byte for byte; empty where all of it is.

    What is in the bundle as it was is among the bundle's own files. A change in `config.json` shows in its digest.
    """
    digests = {path.relative_to(checkpoint).as_posix(): file_sha256(path) for path in tokenizer_files(checkpoint)}
    inputs = {
        name: digest
        for name, digest in digests.items()
        if not (copied / name).is_file() or file_sha256(copied / name) != digest
    }
    return {"tokenizer": {"changes": changes, "inputs": inputs}} if changes or inputs else {}


def versions(backend: Backend) -> dict[str, str]:
    """Installed versions of everything whose code determines a bundle's bytes, this zoo included, by distribution."""
    torch = distributions.version("torch").split("+")[0]  # "+cpu" and the like say where it runs
    return {**backend.versions, "torch": torch, "coreai-zoo": distributions.version("coreai-zoo")}


def build_record(design: Design, store: WeightStore) -> dict[str, Any]:
    """Everything that determines the bytes of a bundle; `build.json` without the files' hashes."""
    record = describe(design)
    record["source"] = {
        **design.checkpoint.identity(),
        "precision": design.checkpoint.precision,
        "values_sha256": _values_digest(design, store),
    }
    return record


def describe(design: Design) -> dict[str, Any]:
    """`build_record` as far as it follows from the design alone: the same for a design whose weights are not there."""
    made_with = versions(design.backend)
    totals = design.weights.totals()
    return {
        "schema": BUILD_SCHEMA,
        "name": design.name,
        "title": design.title,
        "label": design.label,
        "zoo": made_with.pop("coreai-zoo"),
        "versions": made_with,
        "quantizer": QUANTIZER_VERSION,
        "entry": _entry(design),
        "sample": design.sample,
        "origin": {**attrs.asdict(design.source.origin), "text": design.source.origin.how},
        "licence": attrs.asdict(design.source.licence),
        "language": [*texts(design.source.card.get("language"))],
        "compared": design.compared,
        "command": _command(design),
        # What was asked for beside the names above: a rebuild asks for the same.
        "request": {"layers": design.request.layers, "max_context": design.max_context},
        "source_date_epoch": design.source_date_epoch,
        "notes": list(design.notes),
        "dropped": dict(Counter(reason for _, reason in design.weights.dropped)),
        "overlay": {
            "name": design.model.overlay.name,
            "plugin": design.model.plugin,
            "code_sha256": code_digest(design.model.overlay),
            "rewrites": [
                {
                    "name": rewrite.name,
                    "plugin": plugin,
                    "pattern": rewrite.pattern,
                    "reason": rewrite.reason,
                    "functions": functions,
                    "code_sha256": code_digest(rewrite.apply),
                }
                for plugin, rewrite, functions in _rewrites(design)
            ],
        },
        "facts": dict(design.facts),
        "layers": design.facts["layers"],
        "whole_layers": design.model.whole_facts["layers"],
        "contract": {
            "name": design.contract.name,
            "prerequisites": list(design.contract.needs),
            "on_devices": design.contract.on_devices,
            "usage": design.contract.usage,
            "engine": design.contract.engine.name if design.contract.engine else None,
        },
        "backend": design.backend.name,
        "remarks": list(design.backend.version_warnings),
        "recipe": {
            "name": design.recipe.name,
            "installed": design.recipe_installed,
            "published_name": design.recipe.published_name,
            **content_of(design.recipe),
            "roles": roles_record(design),
            "head_reason": design.head.reason if design.head else None,
        },
        "roles": roles_meant(design),
        "weights": {role: _total(total) for role, total in sorted(totals.items())},
        "max_context": design.max_context,
        "functions": {name: signature_record(signature) for name, signature in design.signatures.items()},
    }


def roles_meant(design: Design) -> dict[str, Any]:
    """What each role of the weights is, as build.json says it."""
    return {role: attrs.asdict(design.weights.roles[role]) for role in sorted(design.weights.by_role())}


def roles_record(design: Design) -> dict[str, Any]:
    """How each role is stored, as build.json says it: null for plain values, a list where its weights differ."""
    return {
        role: one_or_several([None if spec is None else spec.record for spec in specs])
        for role, specs in design.weights.stored_as().items()
    }


def _entry(design: Design) -> dict[str, Any] | None:
    if design.entry is None:
        return None
    return {
        "name": design.entry.name,
        "sha256": _digest(attrs.asdict(design.entry)),
        "differences": list(design.differences),
        # A file that no plugin brings: gates and rebuilds need it again.
        "file": _loose_entry(design),
    }


def _command(design: Design) -> list[str]:
    """The words of the command that builds the same bundle from the same checkpoint."""
    request, entry, origin = design.request, design.entry, design.source.origin
    words = ["zoo", "build"]
    if entry is not None:
        same = origin.kind == "hub" and origin.is_of(entry.hf_id)
        if same and not design.compared:
            words.append(f"{origin.hf_id}@{origin.revision}")
        else:
            words.append(f"{entry.name}.toml" if _loose_entry(design) else entry.name)
        if design.sample:
            words.append("--sample")
        elif not same:
            words += ["--checkpoint", "CHECKPOINT"]
    else:
        words.append(f"{origin.hf_id}@{origin.revision}" if origin.proven else "CHECKPOINT")
    if design.differences:
        words.append("--custom")
    recipe = design.recipe.name if design.recipe_installed else f"{design.recipe.name}.toml"
    if recipe != (entry.recipe if entry else DEFAULT_RECIPE):
        words += ["--recipe", recipe]
    if design.backend.name != DEFAULT_BACKEND:
        words += ["--backend", design.backend.name]
    if design.contract.name != (entry.contract if entry else DEFAULT_CONTRACT):
        words += ["--contract", design.contract.name]
    if design.max_context != usual_context(entry, design.contract, design.facts):
        words += ["--max-context", str(design.max_context)]
    return words + (["--layers", str(request.layers)] if request.layers is not None else [])


def _loose_entry(design: Design) -> str | None:
    name = design.request.model
    return Path(name).read_text(encoding="utf-8") if name and name.endswith(".toml") else None


def _rewrites(design: Design) -> Iterator[tuple[str, LayerRewrite, list[str]]]:
    """The rewrites of all functions, each once, with its plugin and the functions that it is in."""
    rewrites = [found for function in design.functions.values() for found in function.rewrites]
    for at, found in enumerate(rewrites):
        if found not in rewrites[:at]:
            yield *found, [name for name, function in design.functions.items() if found in function.rewrites]


def _total(total: RoleTotal) -> dict[str, Any]:
    fields = attrs.asdict(total)
    return fields if total.stored_with else {key: fields[key] for key in ("tensors", "parameters", "bytes")}


def _values_digest(design: Design, store: WeightStore) -> str:
    """SHA-256 over the digests of all source values: what tells two fine-tunes of one model apart."""
    digests = [f"{tensor.name} {store[tensor.name].source_digest}\n" for tensor in design.weights.stored]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
