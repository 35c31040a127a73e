"""The model card of a bundle, the page that a stranger meets on the hub: what a build knows and a gate measured.

It is made from plain data, and the same data gives the same bytes: nothing of the machine that builds is in it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import frozen

from coreai_zoo.backend import Backend
from coreai_zoo.dtypes import size
from coreai_zoo.entry import HF_ID, Published
from coreai_zoo.recipes import recorded_forms

CARD = "README.md"

ZOO = "coreai-zoo"

# ---------------------------------------------------------------------------------------------------------------------
# What a gate adds
# ---------------------------------------------------------------------------------------------------------------------

# A gate puts its block in the place of a paragraph, after the build, and keeps that paragraph in a comment. The block
# is outside of the record's digests, so that a gated bundle still verifies.
_BEGIN, _INSTEAD, _END = (
    "<!-- measured by zoo gate -->",
    "<!-- in the place of",
    "<!-- end of what was measured -->",
)
_BLOCK = re.compile(rf"{_BEGIN}\n.*?(?:\n{_INSTEAD}\n(.*?)\n-->)?\n{_END}\n\n".encode(), re.DOTALL)
_NOT_GATED = "Not gated yet: "
_PARAGRAPH = re.compile(rf"^{_NOT_GATED}.*?(?=\n\n)", re.DOTALL | re.MULTILINE)
_NUMERICS = "## Numerics"


def without_measurements(card: bytes) -> bytes:
    """The card as the build wrote it."""
    return _BLOCK.sub(lambda block: b"" if block[1] is None else block[1] + b"\n\n", card, count=1)


def with_measurements(card: bytes, markdown: str) -> bytes:
    """The card with `markdown` as its measurements, in the place of earlier ones or of the note that there are none.

    Raises:
        ValueError: when the text holds the marks that it would stand between.
    """
    if any(mark in markdown for mark in (_BEGIN, _INSTEAD, _END)):
        raise ValueError("the measurements hold their own marks")
    built = without_measurements(card).decode("utf-8")
    if (note := _PARAGRAPH.search(built)) is None:
        # The card of another version: its measurements stand at its end, under a heading of their own.
        return f"{built}{_BEGIN}\n{_NUMERICS}\n\n{markdown.strip()}\n{_END}\n\n".encode()
    block = f"{_BEGIN}\n{markdown.strip()}\n{_INSTEAD}\n{note[0]}\n-->\n{_END}"
    return (built[: note.start()] + block + built[note.end() :]).encode()


# ---------------------------------------------------------------------------------------------------------------------
# The card
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Machine:
    """A machine that a bundle may run on.

    Attributes:
        name: of its chip.
        memory: the smallest memory in GiB in which the bundle fits; None where none is large enough.
        rate: predicted tokens per second of decoding.
    """

    name: str
    memory: int | None
    rate: float


@frozen
class Needs:
    """What a machine needs to run a bundle, in bytes, and how fast it is then.

    Attributes:
        asset: the asset.
        states: all states with every position in use.
        growth: what the states grow by with each position.
        resident: what has to be in memory, without what the engine takes itself.
        machines: those that a rate is predicted for; none for a bundle that is there for trying things.
        gathers: whether a token reads some of the weights only, those of the chosen experts.
        published: what others measured of such a bundle.
        rate_source: how the rates were predicted, in words.
        fit_source: how much of its memory a machine can use, in words.
    """

    asset: int
    states: int
    growth: int
    resident: int
    machines: tuple[Machine, ...]
    gathers: bool
    published: tuple[Published, ...]
    rate_source: str
    fit_source: str


def render(record: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]], needs: Needs, backend: Backend) -> str:
    """The card as Markdown with its YAML front matter.

    Args:
        record: the build's record, as `record.build_record` makes it.
        files: `bytes` and `sha256` of the files so far, by relative path.
        needs: what a machine needs.
        backend: the backend that wrote the asset.
    """
    sections = (
        _front_matter(record, backend.title),
        _head(record, backend.title),
        _bundle(record, files),
        _needs(record, needs),
        _run(record, backend.run_instructions),
        _numerics(record),
        _architecture(record),
        _left_out(record),
        _reproduce(record, files),
        _licence(record),
    )
    return "\n\n".join(sections) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Front matter
# ---------------------------------------------------------------------------------------------------------------------

# Anything else is quoted, and so are these: `no` is Norwegian, and to YAML it is false.
_PLAIN_YAML = re.compile(r"[A-Za-z][A-Za-z0-9_.+/-]*")
_YAML_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})

_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")


def _front_matter(record: Mapping[str, Any], target: str) -> str:
    """What the hub indexes a page by; what is not known is not in it."""
    base_models = _base_models(record)
    slug = re.sub(r"[^a-z0-9]+", "-", target.lower())
    tags = (slug, record["backend"], "apple", record["overlay"]["name"], record["facts"]["ffn"], "text-generation")
    fields: dict[str, str | Sequence[str] | None] = {
        **_licence_fields(record["licence"]),
        "base_model": base_models,
        "base_model_relation": "quantized" if base_models else None,
        "language": [name for name in record["language"] if _LANGUAGE.fullmatch(name)],
        "pipeline_tag": "text-generation",
        "library_name": record["backend"],
        "tags": list(dict.fromkeys(tags)),
    }
    lines = []
    for key, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_yaml(value)}")
        elif value:
            lines += [f"{key}:", *(f"- {_yaml(item)}" for item in value)]
    return "\n".join(["---", *lines, "---"])


def _base_models(record: Mapping[str, Any]) -> list[str]:
    """The repository that the weights are from, or else those that they say they were made from, as far as is known."""
    origin = record["origin"]
    known = [origin["hf_id"]] if origin["hf_id"] else origin["made_from"]
    return [name for name in known if re.fullmatch(HF_ID, name)]


def _licence_fields(licence: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a licence. The hub takes `other` only with a name and a link, so without them there is none."""
    if licence["id"] is None:
        return {}
    name = licence["id"].lower()
    if name != "other":
        return {"license": name}
    if not (licence["name"] and licence["link"]):
        return {}
    return {"license": name, "license_name": licence["name"], "license_link": licence["link"]}


def _yaml(value: str) -> str:
    """A YAML scalar: as it is where that can only be text, else in double quotes."""
    if _PLAIN_YAML.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    # As JSON, but for what YAML does not take: bare control characters, and pairs of surrogates.
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else f"\\U{ord(letter):08X}" for letter in quoted)


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """A name from outside, in one line and without meaning to Markdown or HTML."""
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*\[\]<>|~#&]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def _code(value: object) -> str:
    """A name from outside as code, in one line."""
    return f"`{' '.join(str(value).split()).replace('`', chr(39))}`"


def _listed(items: Iterable[str]) -> str:
    """Items as a sentence has them: `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _hub_link(hf_id: str, text: str | None = None) -> str:
    return f"[{text or hf_id}](https://huggingface.co/{hf_id})"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else _text(value)


# ---------------------------------------------------------------------------------------------------------------------
# What it is
# ---------------------------------------------------------------------------------------------------------------------


def _head(record: Mapping[str, Any], target: str) -> str:
    title = _text(record["title"])
    differences = record["entry"]["differences"] if record["entry"] else []
    lines = [f"# {_text(record['name'])}"]
    if record["sample"]:
        lines.append(
            f"**A sample, not {title}.** A miniature with the topology of {title} for {target}, trained on a few "
            "megabytes of text. It goes through the same build, and is good for trying the tools and for nothing else."
        )
    elif differences:
        lines.append(f"**Not {title}, but a model of its architecture**, for {target}. {_differences(differences)}")
        lines.append(_origin(record))
    else:
        lines.append(
            f"{title} for {target}: its text model, {_quantized(record)}, as a bundle that an engine on a Mac loads."
        )
        lines.append(f"{_origin(record)} {_compared(record)}".rstrip())
    if record["layers"] != record["whole_layers"]:
        lines.append(f"**A slice: the first {record['layers']} of {record['whole_layers']} layers**, for tests only.")
    return "\n\n".join(lines)


def _differences(differences: Sequence[str]) -> str:
    return f"In these facts it is another: {'; '.join(map(_text, differences))}."


def _quantized(record: Mapping[str, Any]) -> str:
    roles = record["recipe"]["roles"].values()
    dtypes = {form["dtype"] for stored in roles for form in recorded_forms(stored) if form is not None}
    if dtypes:
        return f"quantized to {_listed(sorted(dtypes))}"
    caches = next(iter(record["functions"].values()))["states"]
    computes_in = caches[0]["dtype"] if caches else "float16"
    return f"in {'half precision' if computes_in == 'float16' else computes_in}, not quantized"


def _origin(record: Mapping[str, Any]) -> str:
    """Where the weights are from, as far as that is known."""
    origin = record["origin"]
    if origin["hf_id"]:
        return f"The weights are those of {_hub_link(origin['hf_id'])}: {_text(origin['text'])}."
    known = "Origin not known"
    if record["entry"] and not record["entry"]["differences"]:
        known += f"; the architecture is that of {_text(record['title'])}"
    if made_from := _base_models(record):
        known += f". The checkpoint says that it was made from {_listed(map(_hub_link, made_from))}"
    return f"{known}."


def _compared(record: Mapping[str, Any]) -> str:
    if not record["entry"]:
        return ""
    entry = _code(record["entry"]["name"])
    if not record["compared"]:
        return f"The facts of the entry {entry} were not compared with the published checkpoint."
    revision = str(record["origin"]["revision"])
    commit = "that commit" if revision in record["origin"]["text"] else f"commit {_code(revision)}"
    return f"The facts of the entry {entry} agree with the published checkpoint at {commit}."


# ---------------------------------------------------------------------------------------------------------------------
# The bundle, and what it needs
# ---------------------------------------------------------------------------------------------------------------------


def _bundle(record: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    folders: dict[str, int] = {}
    for path, file in files.items():
        top = path.partition("/")[0] + "/" * ("/" in path)
        folders[top] = folders.get(top, 0) + file["bytes"]
    listed = _listed(f"`{name}` ({size(count)})" for name, count in folders.items())
    return (
        f"## The bundle\n\n{size(sum(folders.values()))} in {len(files)} files: {listed}. Beside them are this page "
        "and `build.json`, which records everything that determined these bytes, and the SHA-256 of every file.\n\n"
        f"{_recipe(record)}"
    )


def _recipe(record: Mapping[str, Any]) -> str:
    """The recipe in one sentence, and why the head is as it is."""
    stored: dict[str, list[str]] = {}
    for role, recorded in record["recipe"]["roles"].items():
        forms = recorded_forms(recorded)
        for form in forms:
            stored.setdefault(_format(form), []).append(f"{'' if len(forms) == 1 else 'part of '}`{role}`")
    # What is quantized first: it is nearly all there is.
    ordered = sorted(stored.items(), key=lambda form: form[0] == _format(None))
    parts = "; ".join(f"{_listed(roles)} {form}" for form, roles in ordered)
    parameters, count = (sum(role[key] for role in record["weights"].values()) for key in ("parameters", "bytes"))
    name = f"{_code(record['recipe']['name'])}{_of_file(record)}"
    text = (
        f"Recipe {name}: {parts}. That makes {8 * count / parameters:.2f} bits for each of "
        f"{parameters:,} parameters, scales included."
    )
    reason = record["recipe"]["head_reason"]
    return text + (f"\n\nWhy the head is stored as it is: {reason.rstrip('.')}." if reason else "")


def _of_file(record: Mapping[str, Any]) -> str:
    return "" if record["recipe"].get("installed", True) else ", of a file (`build.json` has its rules)"


def _format(spec: Mapping[str, Any] | None) -> str:
    if spec is None:
        return "as they are"
    blocks = "with one scale per row" if spec["block"] is None else f"in blocks of {spec['block']}"
    scales = f", scales by {spec['scales']}" if "scales" in spec else ""
    return f"as {spec['dtype']} {blocks} ({spec['scheme'].replace('_', ' ')}{scales})"


def _needs(record: Mapping[str, Any], needs: Needs) -> str:
    growth = f", {size(needs.growth)} for each position" if needs.growth else ""
    lines = ["## What it needs"]
    if record["contract"]["prerequisites"]:
        lines.append(f"It needs {', and '.join(record['contract']['prerequisites'])}.")
    if record["contract"]["on_devices"]:
        lines.append(record["contract"]["on_devices"])
    lines.append(
        f"Memory for the asset, {size(needs.asset)}, and for the states, {size(needs.states)} when all "
        f"{record['max_context']:,} positions are in use{growth}; what the engine takes itself comes on top."
    )
    return "\n\n".join([*lines, *_rates(needs)])


def _rates(needs: Needs) -> list[str]:
    """Which machines it fits, and predicted and published rates; nothing where none is predicted."""
    if not needs.machines:
        return []
    fitting = [(machine, machine.memory) for machine in needs.machines if machine.memory is not None]
    lines = []
    if not fitting:
        lines.append(f"It fits none of the Macs that `zoo plan` knows. {needs.fit_source}")
    else:
        rows = [f"| {machine.name} | {memory} GB | {machine.rate:.1f} |" for machine, memory in fitting]
        rate = "tokens/s at most" if needs.gathers else "tokens/s"
        lines.append("It fits these Macs, and decodes there at a rate that was predicted, not measured:")
        lines.append("\n".join([f"| chip | memory from | {rate} |", "| --- | ---: | ---: |", *rows]))
        gathers = (
            " Of the experts only the chosen ones are counted: an engine that reads more of them is much slower."
            if needs.gathers
            else ""
        )
        lines.append(f"The rate is that of {needs.rate_source.rstrip('.')}.{gathers} {needs.fit_source}")
    if needs.published:
        lines.append(
            f"Measured by others, of such a bundle: {'; '.join(measured.sentence for measured in needs.published)}."
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Running it, and whether it is right
# ---------------------------------------------------------------------------------------------------------------------


def _run(record: Mapping[str, Any], instructions: str) -> str:
    name = shlex.quote(record["name"])
    parts = [f"Below, `{name}` stands for the path of this bundle's folder.", record["contract"]["usage"], instructions]
    text = "\n\n".join(part for part in parts if part).replace("BUNDLE", name)
    return f'## How to run it\n\n{text}\n\n```\nzoo run {name} -p "def main(" -n 40\n```'


def _numerics(record: Mapping[str, Any]) -> str:
    found = record["sample"] or record["origin"]["kind"] == "hub"  # by the gate itself, in the cache
    checkpoint = "" if found else " --checkpoint CHECKPOINT"
    return (
        f"{_NUMERICS}\n\n{_NOT_GATED}`zoo gate {shlex.quote(record['name'])}{checkpoint}` compares this bundle with "
        "Hugging Face's own implementation of the model, position by position, and writes here what it finds."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is in it
# ---------------------------------------------------------------------------------------------------------------------


def _architecture(record: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{name.replace('_', ' ')} {_plain(value)}" for name, value in record["facts"].items())
    parts = [
        "## Architecture",
        f"Overlay `{record['overlay']['name']}`: {facts}. The bundle allows {record['max_context']:,} positions.",
        "\n".join(_role(record, role) for role in record["recipe"]["roles"]),
        "\n\n".join(_function(name, function) for name, function in record["functions"].items())
        + f" The contract is `{record['contract']['name']}`.",
    ]
    if rewrites := record["overlay"]["rewrites"]:
        forms = "\n".join(
            f"- `{rewrite['name']}`{_within(record, rewrite)}: {rewrite['reason']}" for rewrite in rewrites
        )
        parts.append(f"Layers that compute the same as the checkpoint's own, in another form:\n\n{forms}")
    return "\n\n".join(parts)


def _within(record: Mapping[str, Any], rewrite: Mapping[str, Any]) -> str:
    """Which of several functions a rewrite is in."""
    own = rewrite["functions"]
    return f", in {_listed(f'`{name}`' for name in own)}" if len(own) < len(record["functions"]) else ""


def _role(record: Mapping[str, Any], role: str) -> str:
    counts = record["weights"][role]
    held = (
        f"stored once, with `{counts['stored_with']}`"
        if "stored_with" in counts
        else f"{counts['parameters']:,} parameters in {counts['bytes']:,} bytes"
    )
    return f"- `{role}`, {record['roles'][role]['meaning']}: {held}"


def _function(name: str, function: Mapping[str, Any]) -> str:
    def tensors(kind: str) -> str:
        return _listed(
            f"`{tensor['name']}` ({' x '.join(map(str, tensor['shape']))} {tensor['dtype']})"
            for tensor in function[kind]
        )

    keeps = f", keeps {tensors('states')}" if function["states"] else ""
    gives = f"gives {tensors('outputs')}" if function["outputs"] else "gives nothing"
    return f"The function `{name}` takes {tensors('inputs')}{keeps} and {gives}."


def _left_out(record: Mapping[str, Any]) -> str:
    if not record["dropped"]:
        return "## What was left out\n\nNothing: every tensor of the checkpoint is in the bundle."
    reasons = "\n".join(
        f"- {_text(reason)} ({count} tensor{'s' * (count != 1)})" for reason, count in record["dropped"].items()
    )
    return f"## What was left out\n\nParts of the checkpoint that are not in the bundle, and why:\n\n{reasons}"


# ---------------------------------------------------------------------------------------------------------------------
# Where it is from
# ---------------------------------------------------------------------------------------------------------------------


def _reproduce(record: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> str:
    versions = _listed(f"{name} {version}" for name, version in {ZOO: record["zoo"], **record["versions"]}.items())
    asset, digest = max(files.items(), key=lambda file: file[1]["bytes"])
    remarks = "".join(f"\n\nNote: {remark}." for remark in (*record["remarks"], *map(_text, record["notes"])))
    checkpoint = "\n".join(
        f"- {_code(name)}: {file['size']:,} bytes" for name, file in record["source"].get("files", {}).items()
    )
    return (
        "## How to reproduce it\n\n```\n"
        f"SOURCE_DATE_EPOCH={record['source_date_epoch']} {shlex.join(record['command'])}\n"
        f"```\n\nWith {versions} and the same checkpoint every byte comes out the same. The SHA-256 of `{asset}` is "
        f"`{digest['sha256']}`.{remarks}\n\n"
        f"The checkpoint's files, whose values are {_text(record['source']['precision'])}:\n\n{checkpoint}"
    )


def _licence(record: Mapping[str, Any]) -> str:
    licence, title = record["licence"], _text(record["title"])
    name = licence["name"] or licence["id"]
    if record["sample"]:
        weights = "The weights are those of the sample that ships with the entry, under the licence of its package."
    elif record["origin"]["hf_id"]:
        weights = f"The weights are the work of the makers of {_hub_link(record['origin']['hf_id'], title)}."
    else:
        weights = "The weights are the work of whoever made the checkpoint."
    if name is None:
        terms = "" if record["sample"] else " Their licence is not known: look for it before you pass this bundle on."
    else:
        shown = f"[{_text(name)}]({licence['link']})" if licence["link"] else _text(name)
        source = f", as {_text(licence['source'])} says" if licence["source"] else ""
        terms = f" Their licence is {shown}{source}; it holds for this bundle too."
    return f"## Licence and attribution\n\n{weights}{terms} Converted with {ZOO} {record['zoo']} (Apache-2.0)."
