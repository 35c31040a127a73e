"""The format of a weight as a text that a user types: `int8`, `int4:block64:symmetric:mse`, `uint4:channel`, `fp16`."""

from __future__ import annotations

from typing import get_args

from coreai_zoo.errors import BadInput, listing, near_names
from coreai_zoo.recipes import PLAIN, IntegerDtype, QuantizationSpec, Scales, Scheme, usual_scheme

_BLOCK = 32  # inputs per scale where nothing else is said: the blocks that engines are fast with


_OTHER_PARTS = (PLAIN, "channel", f"block{_BLOCK}", *get_args(Scales))


def read_format(text: str) -> QuantizationSpec | None:
    """The format that `text` names: DTYPE[:blockN|:channel][:SCHEME][:mse], or `fp16` for plain values: None.

    Without blocks these are of 32. Without a scheme it is the one that uses the integers best: signed ones symmetric
    with clipping, unsigned ones asymmetric.

    Raises:
        BadInput: for another text, saying what is wrong with it.
    """
    if text == PLAIN:
        return None
    dtype, *rest = text.split(":")
    block: int | None = _BLOCK
    if rest and (rest[0] == "channel" or rest[0].startswith("block")):
        block = _read_block(text, rest.pop(0))
    scales = rest.pop() if rest and rest[-1] in get_args(Scales) else "absmax"
    scheme = rest.pop(0) if rest else usual_scheme(dtype)
    for value, known in ((dtype, get_args(IntegerDtype)), (scheme, get_args(Scheme))):
        if value not in known:
            near = near_names(value, [*known, *_OTHER_PARTS])
            raise _unreadable(text, f"{value!r} is none of {listing(list(known))}", near)
    if rest:
        raise _unreadable(text, f"{':'.join(rest)!r} is too much")
    try:
        return QuantizationSpec(dtype, scheme, block, scales)  # type: ignore[arg-type]  # looked up above
    except ValueError as error:
        raise _unreadable(text, str(error)) from error


def format_text(spec: QuantizationSpec | None) -> str:
    """The whole text of a format, which `read_format` reads."""
    if spec is None:
        return PLAIN
    blocks = "channel" if spec.block_size is None else f"block{spec.block_size}"
    return f"{spec.dtype}:{blocks}:{spec.scheme}{'' if spec.scales == 'absmax' else f':{spec.scales}'}"


def _read_block(text: str, part: str) -> int | None:
    if part == "channel":
        return None
    size = part.removeprefix("block")
    if not (size.isascii() and size.isdigit()) or int(size) < 2:
        raise _unreadable(text, f"{part!r} is no block of at least 2 inputs, such as block64")
    return int(size)


def _unreadable(text: str, why: str, near: str = "") -> BadInput:
    hint = f"Write DTYPE[:blockN|:channel][:SCHEME][:mse], for example int4 or int4:block64:symmetric, or {PLAIN}."
    return BadInput(f"The format {text!r} cannot be read: {why}.", f"{near} {hint}".lstrip())
