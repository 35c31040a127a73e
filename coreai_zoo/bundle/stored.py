"""How the weights of an asset are stored, as the asset shows it, held against what the bundle's name says.

A record may say anything; bytes cannot. Dtypes, blocks and zero points are read from the shapes of the stored
constants, and the scheme from the integers themselves: one that uses the whole range reaches the lowest integer, and
one that clips never does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from attrs import evolve, frozen

from coreai_zoo.backend import Backend, Check
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.expected import Expected
from coreai_zoo.dtypes import bits_of
from coreai_zoo.errors import BadInput, listing
from coreai_zoo.names import parameter_of
from coreai_zoo.overlay import Role
from coreai_zoo.recipe_files import recorded_recipe
from coreai_zoo.recipes import QuantizationSpec, Recipe, published_as
from coreai_zoo.weights.formats import TABLE, Format, has_zero_points, unpacked_rows

_LOOKED_AT = 3 << 17
"""Bytes of a weight's integers that are looked at for its scheme."""

_ENOUGH = 32
"""So many integers one above the lowest, and none that is the lowest, show that it is not in use.

The largest of a block, where it is negative, is the lowest integer of a scheme that uses it, or by the rounding of the
scale the next one, about as often.
"""


_FEW = 32
"""Fewer scales that differ say nothing of how the scales of a scheme are rounded."""


@frozen
class StoredForm:
    """How one weight lies in an asset.

    Attributes:
        shape: of the weight.
        dtype: of its integers, or of its plain values.
        scales: dtype of its scales; None for plain values.
        block_size: inputs per scale; None for plain values.
        zero_points: whether there are any.
        lowest: whether the lowest signed integer of its dtype is in use; None where that does not show.
    """

    shape: tuple[int, ...]
    dtype: str
    scales: str | None = None
    block_size: int | None = None
    zero_points: bool = False
    lowest: bool | None = None

    def __str__(self) -> str:
        if self.scales is None:
            return f"{self.dtype} {list(self.shape)}"
        range_ = {True: "the whole range", False: "the range without its lowest integer", None: "a range not known"}
        offsets = " with zero points" if self.zero_points else ""
        return f"{self.dtype} {list(self.shape)} in blocks of {self.block_size}{offsets}, {range_[self.lowest]}"

    def is_of(self, format_: Format) -> bool:
        """Whether a weight of a format can look like this in an asset, a matrix of one row also as its transpose."""
        one_row = len(format_.shape) == 2 and 1 in format_.shape
        stored = format_.arrays["data"].shape
        as_it_is = self.shape == stored or (one_row and self.shape == stored[::-1])
        return as_it_is and self.fits(format_.quantization, format_.columns, format_.dtype)

    def fits(self, spec: QuantizationSpec | None, columns: int, dtype: str) -> bool:
        """Whether a weight can look like this that is `columns` wide, of a dtype, and quantized by `spec`."""
        if spec is None or self.scales is None:
            return spec is None and self.scales is None and self.dtype == dtype
        wanted = (spec.dtype, dtype, spec.block_size or columns, has_zero_points(spec))
        if (self.dtype, self.scales, self.block_size, self.zero_points) != wanted:
            return False
        # Of zero points integers tell nothing: an asymmetric block reaches both ends, and unsigned ones are shifted.
        shows_scheme = spec.signed and spec.scheme != "asymmetric"
        return not shows_scheme or self.lowest in (None, spec.scheme == "symmetric")


def stored_forms(asset: Path, backend: Backend) -> dict[str, StoredForm]:
    """How every weight of an asset is stored, by the name of the parameter.

    Constants that no weight fills, such as tables of frequencies, are among them. A weight that shares another's bytes
    is not there under its own name.

    Raises:
        CheckFailed: when the asset cannot be read.
    """
    declared, values = backend.program(asset).stored, backend.constants(asset)
    parts: dict[str, dict[str, str]] = {}
    for name in declared:
        parameter, part = parameter_of(name)
        parts.setdefault(parameter, {})[part] = name
    forms = {}
    for parameter, names in parts.items():
        if "" not in names:  # its integers are those of another weight, byte for byte
            continue
        shape, dtype = declared[names[""]]
        if "scales" not in names:
            forms[parameter] = StoredForm(shape, dtype)
            continue
        scales_shape, scales = declared[names["scales"]]
        blocks = scales_shape[-1]
        lowest = _uses_lowest(values.get(names[""]), dtype, scales, values.get(names["scales"]))
        dtype = _of_table(values.get(names["table"])) if "table" in names else dtype
        forms[parameter] = StoredForm(shape, dtype, scales, shape[-1] // blocks, "zero points" in names, lowest)
    return forms


def _of_table(stored: memoryview | None) -> str:
    """The dtype of weights that are indices into a stored table."""
    return "int6" if stored is not None and [*stored.cast("b")] == [*TABLE] else "indices of another table"


def _uses_lowest(
    stored: memoryview | None, dtype: str, scales: str, stored_scales: memoryview | None = None
) -> bool | None:
    """Whether the lowest integer of a dtype is among the first integers of a weight; None where that does not show.

    It does not where few come near it, nor where few scales differ: those may all have been rounded up, and with such
    a one the largest of a block is the integer above the lowest. In int8 those of bfloat16 are all rounded up, but for
    powers of two.
    """
    import torch

    if stored is None or not stored.nbytes or dtype in ("uint4", "uint8"):
        return None
    raw = torch.frombuffer(bytearray(stored[:_LOOKED_AT]), dtype=torch.uint8)
    codes = raw.view(torch.int8) if bits_of(dtype) == 8 else unpacked_rows(raw, dtype)
    lowest = 0 if dtype == "uint6" else -1 << (bits_of(dtype) - 1)  # of a table, the first
    if bool((codes == lowest).any()):
        return True
    hidden = (dtype, scales) == ("int8", "bfloat16")
    if stored_scales is not None:
        width = bits_of(scales) // 8
        first = torch.frombuffer(bytearray(stored_scales[: _FEW * _FEW * width]), dtype=torch.uint8)
        hidden = hidden or len(first.view(-1, width).unique(dim=0)) < _FEW
    return False if not hidden and int((codes == lowest + 1).sum()) >= _ENOUGH else None


# ---------------------------------------------------------------------------------------------------------------------
# Against the name
# ---------------------------------------------------------------------------------------------------------------------


def check_stored(bundle: Bundle, backend: Backend, recipes: Mapping[str, Recipe], expected: Expected | None) -> Check:
    """The check of an asset's weights against the recipe in the bundle's name and, where it is known, the design.

    Args:
        bundle: the bundle.
        backend: the backend that wrote it.
        recipes: those that are installed, by name.
        expected: what the bundle has to hold; None where that is not known.
    """
    forms = stored_forms(bundle.asset, backend)
    compression = str(bundle.metadata.get("compression"))
    problems = list(_names(bundle, compression))
    claimed = published_as(compression, [*recipes.values(), *_recorded(bundle)])
    if claimed is None:
        problems.append(f"neither a recipe that is installed nor the one in build.json is published as {compression}")
    elif expected is not None:
        problems += _as_designed(forms, claimed, expected)
    else:
        problems += _as_recorded(forms, claimed, bundle)
    counts = Counter(_summary(form) for form in forms.values())
    detail = f"{compression}: {listing([f'{count} {what}' for what, count in counts.most_common()])}"
    return Check("weights", not problems, listing(problems, 6) or detail)


def _recorded(bundle: Bundle) -> Iterator[Recipe]:
    """The recipe in the bundle's record. It may say anything: the name, which follows from the rules, must fit it."""
    recorded = bundle.build.get("recipe")
    if isinstance(recorded, dict) and "rule" in recorded:
        with suppress(BadInput):  # then nothing is published as that
            yield recorded_recipe(str(recorded.get("name")), recorded, bundle.directory)


def _summary(form: StoredForm) -> str:
    return form.dtype if form.scales is None else f"{form.dtype} in blocks of {form.block_size}"


def _names(bundle: Bundle, compression: str) -> Iterator[str]:
    """The bundle's name ends with what it is compressed as, before the name of a backend that is not the usual one."""
    name = str(bundle.metadata.get("name"))
    if not name.removesuffix(f"_{bundle.build.get('backend')}").endswith(f"_{compression}"):
        yield f"the bundle is called {name} and its compression {compression}"


def _as_designed(forms: Mapping[str, StoredForm], claimed: Recipe, expected: Expected) -> Iterator[str]:
    """What is stored otherwise than the name says, or not at all, weight by weight."""
    for name, weight in expected.weights.items():
        rule = claimed.rule_for(name, weight.role, expected.layers)
        spec = None if rule is None else claimed.spec_of(rule)
        wanted = evolve(weight.format, quantization=spec)
        if name in forms and not forms[name].is_of(wanted):
            yield f"{name} is {forms[name]}, and by the bundle's name {spec or wanted.dtype} {list(wanted.shape)}"
        elif name not in forms:
            yield f"{name} is not stored"


def _as_recorded(forms: Mapping[str, StoredForm], claimed: Recipe, bundle: Bundle) -> Iterator[str]:
    """What is stored otherwise than the name says, where no design says which weights there are.

    What is in integers has to be one of the formats of the recipe, and each format that has to be there has to be seen.
    """
    quantized = [form for form in forms.values() if form.scales is not None]
    for form in quantized:
        if not any(form.fits(spec, form.shape[-1], str(form.scales)) for spec in claimed.quantizations):
            yield f"a weight is {form}, which the bundle's name does not say"
    for spec in _needed(claimed, bundle):
        if not any(form.fits(spec, form.shape[-1], str(form.scales)) for form in quantized):
            yield f"no weight is {spec}, which the bundle's name says"


def _needed(claimed: Recipe, bundle: Bundle) -> list[QuantizationSpec]:
    """Every way in which a recipe stores weights that a bundle has, by the roles of its record.

    Of a role with weights of its own that is decided by names or layers, any of its rules may be for others.
    """
    roles, totals = bundle.build.get("roles") or {}, bundle.build.get("weights") or {}
    needed = []
    for role in (Role(**roles[name]) for name, total in totals.items() if total["parameters"]):
        rules = [rule for rule in claimed.rules if not rule.roles or {role.name, role.kind} & set(rule.roles)]
        first = rules[0] if rules else None
        if first is not None and not first.parameters and first.layers is None:
            needed.append(claimed.spec_of(first))
    return [spec for spec in dict.fromkeys(needed) if spec is not None]
