"""A lowered program as data: what `zoo diff` and the golden graphs look at. The toolchain's own objects stay behind the
backend.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from attrs import field, frozen


@frozen
class Operation:
    """One operation.

    Attributes:
        name: as the toolchain calls it, without the dialect, for example `silu`; of a call, the composite's name.
        operands: numbers of the values that it reads. Values are numbered in the order of the function, arguments
            first.
        results: numbers of the values that it makes.
        types: of the results, for example `tensor<64x2xfloat16>`; a dynamic size is `?`.
        attributes: everything else that it says, as text: for a constant its value, or the name of a stored one.
        stored: name of the stored constant that this is, or None.
        callee: name of the composite's function that this calls, or None.
        on_state: whether it reads or writes a whole state, orders such accesses, or returns.
    """

    name: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    types: tuple[str, ...]
    attributes: tuple[str, ...] = ()
    stored: str | None = None
    callee: str | None = None
    on_state: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether it computes nothing."""
        return self.name == "constant"

    def __str__(self) -> str:
        """What it is, without the values that it is wired to."""
        attributes = f" {{{', '.join(self.attributes)}}}" if self.attributes else ""
        return f"{self.name}{attributes} -> {', '.join(self.types) or 'nothing'}"


@frozen
class Function:
    """A list of operations; those of nested regions follow the operation that holds them.

    Attributes:
        declaration: names and types of arguments and results, and of a composite its name and attributes.
        arguments: their names, in the order of their values' numbers.
        attributes: of a composite, such as `eps = 9.99999997E-7 : f32`.
        outputs: how many values it gives; states that it writes are none.
    """

    name: str
    declaration: tuple[str, ...]
    operations: tuple[Operation, ...]
    arguments: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    outputs: int = 1

    @property
    def size(self) -> int:
        """Number of operations that compute something."""
        return sum(not operation.is_constant for operation in self.operations)


@frozen
class Program:
    """The functions of an asset, without the bytes of its stored constants.

    Attributes:
        functions: those that an engine calls, by name, in the order of the asset.
        composites: those that these call, by name.
        weights: names of what weights are stored in, in the order of the decoder, where that is known.
        literals: stored constants that no weight fills, such as a table of frequencies, with their values or a hash of
            them, where that is known.
    """

    functions: Mapping[str, Function]
    composites: Mapping[str, Function]
    weights: tuple[str, ...] = ()
    literals: Mapping[str, str] = field(factory=dict)

    @property
    def everything(self) -> Iterator[Function]:
        """The functions, then the composites."""
        yield from self.functions.values()
        yield from self.composites.values()

    @property
    def stored(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Logical shape and dtype of each stored constant. Equal ones are stored once, under the name of one."""
        return {
            operation.stored: shape_and_dtype(operation.types[0])
            for function in self.everything
            for operation in function.operations
            if operation.stored is not None
        }


def shape_and_dtype(type_: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of a type such as `tensor<64x2xfloat16>`."""
    *shape, dtype = type_.removeprefix("tensor<").removesuffix(">").split("x")
    return tuple(map(int, shape)), dtype
