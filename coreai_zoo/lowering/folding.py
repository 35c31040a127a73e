"""What a compiler can compute of a program before there is an input: from weights, from literals, or from both."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen
from torch import Tensor, fx
from torch.export import ExportedProgram

from coreai_zoo.lowering.transposed import is_transposition

TensorKind = tuple[tuple[int, ...], str]
"""Shape and dtype."""

_NARROWED = {"int64": "int32", "float64": "float32"}  # as the toolchain has them


@frozen
class Foldable:
    """What depends on weights and on no input.

    Attributes:
        weights: names of the weights that such an operation reads. One that is read transposed, by an operation that
            does depend on an input, is none: that is a product, which a compiler does as it stands.
        kinds: shape and dtype of what such operations give, each with the weights that it is made of.
    """

    weights: frozenset[str]
    kinds: Mapping[TensorKind, frozenset[str]]


def foldable(program: ExportedProgram, weights: Mapping[str, str]) -> Foldable:
    """What a compiler can compute of `weights`.

    Args:
        program: a traced program.
        weights: name of the weight behind each placeholder of its graph that is a plain one.
    """
    inputs = set(program.graph_signature.user_inputs)
    origins: dict[fx.Node, frozenset[str]] = {}  # of what depends on no input
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if node.name not in inputs:
                origins[node] = frozenset({weights[node.name]} if node.name in weights else ())
        elif node.op != "output" and all(read in origins for read in node.all_input_nodes):
            origins[node] = frozenset[str]().union(*(origins[read] for read in node.all_input_nodes))
    read, kinds = set[str](), dict[TensorKind, frozenset[str]]()
    for node, made_of in origins.items():
        value = node.meta.get("val")
        if node.op == "placeholder" or not made_of or _is_of_a_product(node, origins):
            continue
        read |= made_of
        if isinstance(value, Tensor):
            dtype = str(value.dtype).removeprefix("torch.")
            kind = tuple(map(int, value.shape)), _NARROWED.get(dtype, dtype)
            kinds[kind] = kinds.get(kind, frozenset()) | made_of
    return Foldable(frozenset(read), kinds)


def _is_of_a_product(node: fx.Node, origins: Mapping[fx.Node, frozenset[str]]) -> bool:
    """Whether a node is the transpose of a weight, for operations alone that depend on an input."""
    (source, *others) = node.all_input_nodes
    return (
        not others
        and source.op == "placeholder"
        and is_transposition(node, source.meta["val"].ndim)
        and not any(user in origins for user in node.users)
    )
