"""Weights of which a program reads the transpose alone, as a product with chosen experts does.

A compiler computes the transpose of a constant when it sees one: it would take the memory of both, and what it makes
has a name of its own. So plain values are stored in the order in which they are read; integers are turned to values
first, and those are not constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from coreai_zoo.errors import PluginError, listing
from coreai_zoo.lowering.module import Dequantize  # noqa: F401  # defines the operation that is looked for

_MATRIX = 2  # axes


def is_row(weight: fx.Node) -> bool:
    """Whether a weight is a matrix of one row or column, whose transpose has the same bytes."""
    shape = weight.meta["val"].shape
    return len(shape) == _MATRIX and 1 in shape


def is_read_transposed(weight: fx.Node) -> bool:
    """Whether nothing of a weight is read but its transpose in the last two axes."""
    return bool(weight.users) and all(is_transposition(node, weight.meta["val"].ndim) for node in weight.users)


def is_transposition(node: fx.Node, axes: int) -> bool:
    """Whether a node exchanges the last two of the axes of what it reads, and does nothing else."""
    arguments: Any = node.args
    if node.target is torch.ops.aten.permute.default:
        order = [at % axes for at in arguments[1]]
        return order == [*range(axes - 2), axes - 1, axes - 2]
    if node.target is torch.ops.aten.transpose.int:
        return {at % axes for at in arguments[1:]} == {axes - 2, axes - 1}
    return False


def stacks_read_transposed(
    program: ExportedProgram, parameters: Mapping[str, str], said: Mapping[str, bool] | None
) -> set[str]:
    """The parameters that are stacks of plain matrices and read transposed.

    Args:
        program: a traced program.
        parameters: name of the parameter behind each placeholder of its graph that is one.
        said: of those that are stored plain, whether the weight map says so; None where that is not known.

    Raises:
        PluginError: when the weight map says otherwise.
    """
    plain = {
        parameters[node.name]: is_read_transposed(node)
        for node in program.graph.find_nodes(op="placeholder")
        if node.name in parameters and node.meta["val"].ndim > _MATRIX and not _is_quantized(node)
    }
    found = {name for name, transposed in plain.items() if transposed}
    if said is None:
        return found
    told = {True: "reads nothing but its transpose", False: "reads more than its transpose"}
    problems = [f"{name}: it {told[plain[name]]}" for name in plain if said.get(name, plain[name]) != plain[name]]
    if problems:
        raise PluginError(
            f"The decoder does not read its weights as `read_transposed` in the weight map says: {listing(problems)}."
        )
    return found


def _is_quantized(weight: fx.Node) -> bool:
    return any(node.target is torch.ops.coreai_zoo.dequantize.default for node in weight.users)
