"""Entries: what there is to build, one TOML file each.

An entry names a checkpoint and says how it is built by default. What it states about the model is compared with the
checkpoint's own config at build, so a fact that is not known is left out, never guessed. Every unknown key, ill-typed
value and bad value of a file is reported at once.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import attrs
import cattrs
from attrs import field, frozen
from attrs.validators import in_, min_len, optional
from cattrs.errors import ClassValidationError

from coreai_zoo.dtypes import size
from coreai_zoo.errors import BadInput, EnvironmentLacks
from coreai_zoo.names import slug
from coreai_zoo.toml_files import (
    as_it_is,
    choice,
    make_converter,
    mistyped,
    problems_of,
    raise_bad_keys,
    read_toml,
    register_table,
)

HF_ID = r"[\w.-]+/[\w.-]+"
"""Pattern of a repository's name on the Hugging Face hub."""

Scalar = bool | int | float | str
Status = Literal["verified", "unverified"]


# ---------------------------------------------------------------------------------------------------------------------
# The entry
# ---------------------------------------------------------------------------------------------------------------------


def _pattern(expression: str, meaning: str) -> Callable[[object, Any, str], None]:
    def check(_instance: object, _attribute: Any, value: str) -> None:
        if not re.fullmatch(expression, value):
            raise ValueError(f"{value!r} is not {meaning}")

    return check


def _positive(_instance: object, _attribute: Any, value: int) -> None:
    if value < 1:
        raise ValueError(f"{value} is not positive")


def _above_zero(_instance: object, _attribute: Any, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{value} is not a positive number")


def _not_empty(_instance: object, _attribute: Any, value: tuple[str, ...]) -> None:
    if not value or not all(value):
        raise ValueError("needs at least one name, and no empty one")


def _inside_package(_instance: object, _attribute: Any, value: str) -> None:
    path = PurePosixPath(value)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{value!r} is not a relative path inside the package")


@frozen
class Facts:
    """What an entry states about its model; compared with `Overlay.facts` of the checkpoint at build.

    Attributes:
        ffn: which feed-forward kind, as the overlay calls it: `dense` or `moe` in most families.
        parameters: of the text model, embeddings and head included; vision tower and multi-token prediction left out.
        layers: decoder layers.
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding table.
        max_context_length: positions that the model was made for.
        more: further facts by name, in the order of the file: positive numbers, booleans, text.
    """

    ffn: str = field(validator=_pattern(r"[a-z][a-z0-9-]*", "lowercase letters, digits and hyphens"))
    parameters: int | None = field(default=None, validator=optional(_positive))
    layers: int | None = field(default=None, validator=optional(_positive))
    hidden_size: int | None = field(default=None, validator=optional(_positive))
    vocab_size: int | None = field(default=None, validator=optional(_positive))
    max_context_length: int | None = field(default=None, validator=optional(_positive))
    more: Mapping[str, Scalar] = field(factory=dict)

    @property
    def stated(self) -> dict[str, Scalar]:
        """Every fact that the entry states, by name; what is not known is not in it."""
        named = {name: getattr(self, name) for name in _NAMED_FACTS}
        return {name: value for name, value in {**named, **self.more}.items() if value is not None}


_NAMED_FACTS = tuple(attribute.name for attribute in attrs.fields(Facts) if attribute.name != "more")


@frozen
class Sample:
    """A miniature trained checkpoint that a plugin ships.

    Attributes:
        package: importable package that holds it.
        path: directory inside the package, with forward slashes.
    """

    package: str = field(validator=_pattern(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", "the name of a Python package"))
    path: str = field(validator=_inside_package)

    def directory(self) -> Path:
        """The checkpoint's directory on disk.

        Raises:
            EnvironmentLacks: when the package is not installed, or is not unpacked on disk.
            BadInput: when the package has no such directory.
        """
        try:
            root = importlib.resources.files(self.package)
        except ImportError as error:
            raise EnvironmentLacks(
                f"the sample checkpoint is in the package {self.package!r}, which cannot be imported ({error}).",
                "Install the plugin that ships it, or build from a checkpoint with --checkpoint DIR.",
            ) from error
        directory = root.joinpath(*PurePosixPath(self.path).parts)
        if not directory.is_dir():
            raise BadInput(
                f"the sample checkpoint {self.path!r} is not in the package {self.package!r} (looked at {directory}).",
                "Reinstall the plugin, or build from a checkpoint with --checkpoint DIR.",
            )
        if not isinstance(directory, Path):  # a package inside a zip: tensors cannot be memory-mapped there
            raise EnvironmentLacks(f"the package {self.package!r} is not unpacked on disk.", "Reinstall it with pip.")
        return directory


@frozen
class BundleDefaults:
    """What a build uses when it is not told otherwise.

    Attributes:
        max_context: positions that the bundle allows, unless the model allows fewer.
    """

    max_context: int = field(validator=_positive)


@frozen
class Published:
    """A measurement of a bundle of this entry, written by the backend that is usual for its contract.

    `zoo plan` shows it beside its prediction; `zoo bench` prints one.

    Attributes:
        recipe: that the bundle was made with.
        machine: the chip, as `zoo plan` names it.
        decode: tokens per second.
        source: where it was published.
        asset_bytes: size of the asset, or None where it was not published, as all below.
        note: what was special, if anything.
        contract: of the bundle; None for the entry's own.
        prompt_tokens: length of the prompt that `prefill` and `first_token` are of.
        prefill: tokens of a prompt per second.
        first_token: seconds from the beginning of a prompt until the first token of the answer.
        load: seconds until the bundle was loaded.
        peak_memory: bytes that the process took at its peak.
        system: of the machine, such as `macOS 27.2`.
        versions: of what ran it.
    """

    recipe: str = field(validator=min_len(1))
    machine: str = field(validator=min_len(1))
    decode: float = field(validator=_above_zero)
    source: str = field(validator=min_len(1))
    asset_bytes: int | None = field(default=None, validator=optional(_positive))
    note: str | None = field(default=None, validator=optional(min_len(1)))
    contract: str | None = field(default=None, validator=optional(min_len(1)))
    prompt_tokens: int | None = field(default=None, validator=optional(_positive))
    prefill: float | None = field(default=None, validator=optional(_above_zero))
    first_token: float | None = field(default=None, validator=optional(_above_zero))
    load: float | None = field(default=None, validator=optional(_above_zero))
    peak_memory: int | None = field(default=None, validator=optional(_positive))
    system: str | None = field(default=None, validator=optional(min_len(1)))
    versions: str | None = field(default=None, validator=optional(min_len(1)))

    @property
    def sentence(self) -> str:
        """All of it, without a full stop."""
        prompt = f"a prompt of {self.prompt_tokens:,} tokens" if self.prompt_tokens else "a prompt"
        where = [each for each in (self.machine, self.system, self.versions, self.note) if each]
        more = [
            f"{prompt} at {self.prefill:g} tokens/s" if self.prefill else "",
            f"the first token after {self.first_token:g} s" if self.first_token else "",
            f"loaded in {self.load:g} s" if self.load else "",
            f"{size(self.peak_memory)} of memory at the peak" if self.peak_memory else "",
        ]
        told = "; ".join([", ".join(where), ", ".join(filter(None, more))]).removesuffix("; ")
        return f"{self.decode:g} tokens/s on {told} ({self.source})"


@frozen
class Entry:
    """One thing to build.

    Attributes:
        name: what a user types, for example `acme-7b`.
        title: the model's name as its makers write it.
        summary: one sentence.
        model_type: the `model_type`s that a checkpoint of this entry may have.
        facts: what is known of the model.
        bundle: defaults of the bundle.
        hf_id: repository on the Hugging Face hub, or None for a checkpoint that is on no hub.
        hf_revision: commit that a build fetches, or None where it is not known.
        chat_template: a piece of text that the published chat template has and those of its siblings have not, by which
            a checkpoint of the same sizes is told from theirs; None where no such piece is known.
        licence: SPDX expression of the weights' licence, or None where it is not known.
        recipe: default recipe.
        contract: default engine contract.
        status: `verified` once the facts and revision were compared with the published checkpoint.
        sample: the miniature checkpoint of the same topology, if there is one.
        published: what others measured of such bundles.
    """

    name: str = field(
        validator=_pattern(r"[a-z0-9]+([._-][a-z0-9]+)*", "lowercase letters and digits joined by '.', '-' or '_'")
    )
    title: str = field(validator=min_len(1))
    summary: str = field(validator=min_len(1))
    model_type: tuple[str, ...] = field(validator=_not_empty)
    facts: Facts
    bundle: BundleDefaults
    hf_id: str | None = field(default=None, validator=optional(_pattern(HF_ID, "a repository 'owner/name'")))
    hf_revision: str | None = field(
        default=None, validator=optional(_pattern(r"[0-9a-f]{40}", "a commit of 40 hexadecimal digits"))
    )
    chat_template: str | None = field(default=None, validator=optional(min_len(1)))
    licence: str | None = field(default=None, validator=optional(min_len(1)))
    recipe: str = field(default="int8hu", validator=min_len(1))
    contract: str = field(default="static-s1", validator=min_len(1))
    status: Status = field(default="unverified", validator=in_(get_args(Status)))
    sample: Sample | None = None
    published: tuple[Published, ...] = ()

    @property
    def slug(self) -> str:
        """The name in a bundle's name: `acme_1_5_7b` for `acme-1.5-7b`."""
        return slug(self.name)

    def sample_directory(self) -> Path:
        """The sample checkpoint on disk.

        Raises:
            EnvironmentLacks: when the package that ships it is not installed.
            BadInput: when the entry has no sample, or its package does not hold it.
        """
        if self.sample is None:
            raise BadInput(f"entry {self.name!r} has no sample checkpoint.", "Build with --checkpoint DIR.")
        return self.sample.directory()


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def _fact_table(value: Mapping[str, Any], type_: Any, *, structure: Callable[[Any, Any], Facts]) -> Facts:
    more = {name: item for name, item in value.items() if name not in _NAMED_FACTS}
    return structure({**{name: value[name] for name in _NAMED_FACTS if name in value}, "more": more}, type_)


def _make_converter() -> cattrs.Converter:
    converter = make_converter()
    converter.register_structure_hook_func(lambda type_: type_ is Status, choice)
    # Further facts: `_bad_facts` has looked at them.
    converter.register_structure_hook_func(lambda type_: type_ == Mapping[str, Scalar], as_it_is)
    for cls in (Sample, BundleDefaults, Published):
        register_table(converter, cls)
    register_table(converter, Facts, lambda structure: partial(_fact_table, structure=structure))
    register_table(converter, Entry)
    return converter


_CONVERTER = _make_converter()


@cache
def _nearest_fact(name: str) -> str | None:
    """The named fact that a name is probably meant to be; every command reads every entry, and some again and again."""
    return next(iter(difflib.get_close_matches(name, _NAMED_FACTS, n=1, cutoff=0.85)), None)


def _bad_facts(data: Mapping[str, Any]) -> Iterator[str]:
    facts = data.get("facts")
    for name, value in facts.items() if isinstance(facts, dict) else ():
        if name in _NAMED_FACTS:
            continue
        # Any other name may be a fact, so a misspelt one would pass for another fact.
        near = _nearest_fact(name)
        if near:
            yield f"facts.{name}: unknown key, nearest is {near}"
        elif not isinstance(value, Scalar):
            yield f"facts.{name}: {mistyped(value, 'a single value')}"
        elif value == "":
            yield f"facts.{name}: is empty"
        elif isinstance(value, int | float) and not isinstance(value, bool) and not 0 < value < float("inf"):
            yield f"facts.{name}: {value} is not a positive number"


def load_entry(path: Path) -> Entry:
    """Read one entry file.

    Raises:
        BadInput: when the file cannot be read, or naming every key that is unknown, missing, ill-typed or bad.
    """
    data = read_toml(path, "entry file")
    problems = list(_bad_facts(data))
    try:
        entry = _CONVERTER.structure(data, Entry)
    except ClassValidationError as error:
        problems.extend(problems_of(error, unnamed="more"))  # further facts, which stand beside the named ones
    raise_bad_keys(path, "entry file", problems)
    return entry
