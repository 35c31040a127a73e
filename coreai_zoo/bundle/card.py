"""The model card of a bundle: what the build knows, what a gate measured, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from coreai_zoo.backend import Backend

CARD = "README.md"

# A gate adds its block after the build. It is outside of the record's digests, so that a gated bundle still verifies.
_BEGIN, _END = "<!-- measured by zoo gate -->", "<!-- end of what was measured -->"
_MEASURED = re.compile(re.escape(_BEGIN).encode() + rb"\n.*?\n" + re.escape(_END).encode() + rb"\n\n", re.DOTALL)
_BEFORE = "## Running it\n"


def without_measurements(card: bytes) -> bytes:
    """The card as the build wrote it."""
    return _MEASURED.sub(b"", card, count=1)


def with_measurements(card: bytes, markdown: str) -> bytes:
    """The card with `markdown` as its measurements, in the place of earlier ones.

    Raises:
        ValueError: when the text holds the marks that it would stand between.
    """
    if _BEGIN in markdown or _END in markdown:
        raise ValueError("the measurements hold their own marks")
    built = without_measurements(card).decode("utf-8")
    block = f"{_BEGIN}\n{markdown.strip()}\n{_END}\n\n"
    head, found, tail = built.partition(_BEFORE)
    # Another zoo's card may lack the section; its measurements stand at its end.
    return (head + block + found + tail if found else built + block).encode()


def render(record: Mapping[str, Any], sizes: Mapping[str, int], backend: Backend) -> str:
    """The card as Markdown.

    Args:
        record: the build's record, as `record.build_record` makes it.
        sizes: bytes of the files so far, by relative path.
        backend: the backend that wrote the asset.
    """
    sections = (
        _head(record, backend.title),
        _architecture(record),
        _recipe(record),
        _functions(record, sizes),
        _run(record, backend.run_instructions),
        _provenance(record),
    )
    return "\n\n".join(sections) + "\n"


def _head(record: Mapping[str, Any], target: str) -> str:
    title = record["title"]
    lines = [f"# {record['name']}"]
    if record["sample"]:
        lines.append(
            f"**A sample, not {title}.** A miniature with the topology of {title}, trained on a few megabytes of text, "
            "that exercises the same build. It is useful for trying the tools and for nothing else."
        )
    elif record["entry"] and record["entry"]["differences"]:
        differences = "; ".join(record["entry"]["differences"])
        lines.append(f"**Not {title}, but a model of its architecture.** {differences}.")
    else:
        hf_id = record["origin"]["hf_id"]
        lines.append(f"{title}{f' ([{hf_id}](https://huggingface.co/{hf_id}))' if hf_id else ''} for {target}.")
    if record["layers"] != record["whole_layers"]:
        lines.append(f"**A slice: the first {record['layers']} of {record['whole_layers']} layers**, for tests only.")
    return "\n\n".join(lines)


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _architecture(record: Mapping[str, Any]) -> str:
    parameters = sum(role["parameters"] for role in record["weights"].values())
    facts = {"parameters": parameters, **record["facts"]}
    rows = [(name.replace("_", " "), _plain(value)) for name, value in facts.items()]
    return "## Architecture\n\n" + _table(("", ""), rows)


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _recipe(record: Mapping[str, Any]) -> str:
    rows = []
    for role, counts in record["weights"].items():
        spec = record["recipe"]["roles"][role]
        stored = "as is (float)" if spec is None else f"{spec['dtype']}, block {spec['block']}, {spec['scheme']}"
        meaning = record["roles"][role]["meaning"]
        rows.append((role, meaning, f"{counts['parameters']:,}", stored, f"{counts['bytes']:,}"))
    table = _table(("role", "what", "parameters", "stored", "bytes"), rows)
    text = f"## Recipe `{record['recipe']['name']}`\n\n{table}"
    reason = record["recipe"]["head_reason"]
    return text + (f"\n\nThe head: {reason}" if reason else "")


def _functions(record: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    files = [(f"`{path}`", f"{size:,}") for path, size in sizes.items()]
    rewrites = "".join(f"\n- `{rewrite['name']}`: {rewrite['reason']}" for rewrite in record["overlay"]["rewrites"])
    sections = [
        section
        for name, function in record["functions"].items()
        for section in (f"## Function `{name}`, contract `{record['contract']['name']}`", _signature(function))
    ]
    return "\n\n".join(
        [
            *sections,
            f"Context: {record['max_context']:,} positions at most.",
            f"Layers in another form than the checkpoint's own implementation:\n{rewrites}" if rewrites else "",
            "## Files",
            _table(("file", "bytes"), files),
        ]
    )


def _signature(function: Mapping[str, Any]) -> str:
    rows = [
        (kind, f"`{tensor['name']}`", " x ".join(str(size) for size in tensor["shape"]), tensor["dtype"])
        for kind, tensors in (("input", "inputs"), ("state", "states"), ("output", "outputs"))
        for tensor in function[tensors]
    ]
    return _table(("", "name", "shape", "dtype"), rows)


def _run(record: Mapping[str, Any], running: str) -> str:
    needs = "\n".join(f"- {need}" for need in record["contract"]["prerequisites"])
    return (
        "## Running it\n\n"
        f"On a Mac, with an engine for the `{record['contract']['name']}` contract. It needs:\n\n{needs}\n\n"
        f'{running}\n\n```\nzoo run PATH/TO/{record["name"]} -p "def main(" -n 40\n```'
    )


def _provenance(record: Mapping[str, Any]) -> str:
    source = record["source"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    files = "\n".join(f"- `{name}`: {file['size']:,} bytes" for name, file in source.get("files", {}).items())
    dropped = "".join(f"\n- {count} tensors left out: {reason}" for reason, count in record["dropped"].items())
    revision = record["origin"]["revision"] or "not recorded (built from a local copy)"
    remarks = "".join(f"\n\nNote: {remark}." for remark in record["remarks"])
    return (
        f"## Provenance\n\nBuilt by coreai-zoo {record['zoo']} with {versions}; overlay "
        f"`{record['overlay']['name']}`.{remarks}\n\n"
        f"Checkpoint revision: {revision}. Its files:\n\n{files}{dropped}\n\n"
        "`build.json` records everything that determined these bytes, and the SHA-256 of every file."
    )
