"""The records of a bundle: `metadata.json`, the card, and `build.json`, which holds all that determined its bytes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import attrs

from coreai_zoo.backend import Backend
from coreai_zoo.build.code import code_digest
from coreai_zoo.build.design import Resolved
from coreai_zoo.bundle.bundle import signature_record
from coreai_zoo.bundle.card import CARD, render
from coreai_zoo.bundle.layout import BUILD_SCHEMA, file_digests, file_sizes
from coreai_zoo.bundle.metadata import Description, metadata
from coreai_zoo.checkpoint.tokenizer import copy_tokenizer
from coreai_zoo.dates import build_date
from coreai_zoo.json_files import write_json
from coreai_zoo.weights.quantizer import QUANTIZER_VERSION
from coreai_zoo.weights.store import WeightStore


def write_records(resolved: Resolved, store: WeightStore, partial: Path) -> None:
    """Add everything but the asset to the bundle in `partial`."""
    copy_tokenizer(resolved.checkpoint.directory, partial / "tokenizer")
    record = build_record(resolved, store)
    write_json(
        partial / "metadata.json",
        metadata(
            Description(
                name=resolved.name,
                asset=resolved.asset,
                vocab_size=resolved.facts["vocab_size"],
                max_context_length=resolved.max_context,
                hf_id=resolved.hf_id,
                hf_revision=resolved.revision,
                compression=resolved.recipe.published_name,
                states={state.name: state.kind for state in resolved.signature.states},
                user_data={"sample": "true"} if resolved.sample else {},
                date=build_date(resolved.source_date_epoch),
            )
        ),
    )
    for name, text in resolved.backend.extra_files.items():
        (partial / name).write_text(text, encoding="utf-8")
    rendered = render(record, file_sizes(partial), resolved.backend)
    (partial / CARD).write_text(rendered, encoding="utf-8")
    write_json(partial / "build.json", {**record, "files": file_digests(partial)})


def versions(backend: Backend) -> dict[str, str]:
    """Installed versions of everything whose code determines a bundle's bytes, this zoo among them."""
    torch = distributions.version("torch").split("+")[0]  # "+cpu" and the like say where it runs
    return {**backend.versions, "torch": torch, "coreai-zoo": distributions.version("coreai-zoo")}


def build_record(resolved: Resolved, store: WeightStore) -> dict[str, Any]:
    """Everything that determines the bytes of a bundle; `build.json` without the files' hashes."""
    made_with = versions(resolved.backend)
    roles: dict[str, Counter[str]] = {}
    for tensor in resolved.weights.tensors:
        counts = roles.setdefault(tensor.role, Counter())
        counts.update(tensors=1, parameters=tensor.parameters, bytes=tensor.stored_bytes)
    return {
        "schema": BUILD_SCHEMA,
        "name": resolved.name,
        "zoo": made_with.pop("coreai-zoo"),
        "versions": made_with,
        "quantizer": QUANTIZER_VERSION,
        "entry": {
            "name": resolved.entry.name,
            "title": resolved.entry.title,
            "hf_id": resolved.hf_id,
            "status": resolved.entry.status,
            "sha256": _digest(attrs.asdict(resolved.entry)),
            "differences": list(resolved.differences),
            # A file that no plugin brings: gates and rebuilds need it again.
            "file": _loose_entry(resolved),
        },
        "sample": resolved.sample,
        "source": {
            "hf_revision": resolved.revision,
            **resolved.checkpoint.identity(),
            "values_sha256": _values_digest(resolved, store),
        },
        # What was asked for beside the names above: a rebuild asks for the same.
        "request": {"layers": resolved.request.layers, "max_context": resolved.max_context},
        "source_date_epoch": resolved.source_date_epoch,
        "dropped": dict(Counter(reason for _, reason in resolved.weights.dropped)),
        "overlay": {
            "name": resolved.overlay.name,
            "plugin": resolved.overlay_plugin,
            "code_sha256": code_digest(resolved.overlay),
            "rewrites": [
                {
                    "name": rewrite.name,
                    "plugin": plugin,
                    "pattern": rewrite.pattern,
                    "reason": rewrite.reason,
                    "code_sha256": code_digest(rewrite.apply),
                }
                for plugin, rewrite in resolved.rewrites
            ],
        },
        "facts": dict(resolved.facts),
        "layers": resolved.facts["layers"],
        "whole_layers": resolved.whole_layers,
        "contract": {"name": resolved.contract.name, "prerequisites": list(resolved.contract.prerequisites)},
        "backend": resolved.backend.name,
        "remarks": list(resolved.backend.version_warnings),
        "recipe": {
            "name": resolved.recipe.name,
            "published_name": resolved.recipe.published_name,
            "roles": {
                role: None if spec is None else {"dtype": spec.dtype, "scheme": spec.scheme, "block": spec.block_size}
                for role, spec in resolved.recipe.roles.items()
                if role in roles
            },
            "head_reason": resolved.head.reason if resolved.head else None,
        },
        "weights": {role: dict(counts) for role, counts in sorted(roles.items())},
        "max_context": resolved.max_context,
        "function": signature_record(resolved.signature),
    }


def _loose_entry(resolved: Resolved) -> str | None:
    name = resolved.request.entry
    return Path(name).read_text(encoding="utf-8") if name.endswith(".toml") else None


def _values_digest(resolved: Resolved, store: WeightStore) -> str:
    """SHA-256 over the digests of all source values: what tells two fine-tunes of one model apart."""
    digests = [f"{tensor.name} {store[tensor.name].source_digest}\n" for tensor in resolved.weights.tensors]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
