"""A reference interpreter of ML Programs: what a saved package computes, without a Mac.

Every operation is computed in float32 (integers as integers) and rounded to the dtype that the program declares for
its result; the declared shape is checked. So it has the rounding of the program and nothing of a device: no fused
kernels, no half-precision sums. Operations and defaults are those of coremltools' MIL operation reference, iOS 18.

An operation that is not in the table is an error, never skipped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor

from coreai_zoo.backends.coreml.package import Damaged, Package, tensor_type
from coreai_zoo.dtypes import packed_bytes

Arguments = Mapping[str, Any]
"""Inputs of an operation by name: tensors, lists of tensors, or text."""


def memory(package: Package) -> int:
    """Bytes that an `Interpreter` of a package takes: its constants, and the largest one while that is unpacked."""
    constants = [0]
    for operation in package.block.operations:
        if operation.type in {"const", "constexpr_blockwise_shift_scale"}:
            for output in operation.outputs:
                with contextlib.suppress(Damaged):  # a text
                    kind = tensor_type(output.type)
                    constants.append(packed_bytes(kind.shape, kind.dtype))
    # Unpacked in float32, of which there are two at a time: the product and one of its factors.
    return sum(constants) + 4 * max(constants)


class Interpreter:
    """The function `main` of a package."""

    def __init__(self, package: Package) -> None:
        """Read the program.

        Raises:
            Damaged: when it uses an operation that is not in the table.
        """
        self._package = package
        operations = package.block.operations
        if strange := unknown(operation.type for operation in operations):
            raise Damaged(f"the reference interpreter does not know its operations {', '.join(strange)}")
        # Constants, and the weights that are made of them, are the same in every step.
        self._constants: dict[str, Any] = {}
        self._changing = [self._prepared(operation) for operation in operations if not self._fold(operation)]

    def _fold(self, operation: Any) -> bool:
        """Compute a constant or a quantized weight once for all steps; returns whether `operation` is one."""
        if operation.type == "const":
            self._constants[operation.outputs[0].name] = self._value(operation.attributes["val"])
        elif operation.type == "constexpr_blockwise_shift_scale":
            self._constants.update(self._prepared(operation).results(self._constants))
        else:
            return False
        return True

    def run(self, inputs: Mapping[str, Tensor], states: dict[str, Tensor]) -> dict[str, Tensor]:
        """The outputs of one call, by name.

        Args:
            inputs: the inputs by name, in the dtypes of the function.
            states: the states by name. What the program writes replaces an entry; tensors are not mutated.
        """
        values: dict[str, Any] = {**self._constants, **inputs}
        for operation in self._changing:
            if operation.type == "read_state":
                ((name, _, _),) = operation.outputs
                values[name] = states[operation.name_of("input")]
            elif operation.type == "write_state":
                written = values[operation.name_of("data")]
                name = operation.name_of("input")
                if (written.shape, written.dtype) != (states[name].shape, states[name].dtype):
                    raise Damaged(f"state {name} is written with {tuple(written.shape)} {written.dtype}")
                states[name] = written
            else:
                values.update(operation.results(values))
        return {name: values[name] for name in self._package.block.outputs}

    def _prepared(self, operation: Any) -> _Operation:
        arguments = {
            name: [
                _Bound(binding.name, None)
                if binding.WhichOneof("binding") == "name"
                else _Bound("", self._value(binding.value))
                for binding in argument.arguments
            ]
            for name, argument in operation.inputs.items()
        }
        kinds = [(output.name, tensor_type(output.type)) for output in operation.outputs]
        outputs = [(name, kind.shape, getattr(torch, kind.dtype)) for name, kind in kinds]
        return _Operation(operation.type, arguments, outputs)

    def _value(self, value: Any) -> Tensor | str:
        found = self._package.value(value)
        return found if isinstance(found, str) else torch.from_numpy(np.array(found))


@frozen
class _Bound:
    """What one argument of an operation is bound to: a name, or else a value that stands in the program."""

    name: str
    value: Tensor | str | None


@frozen
class _Operation:
    """An operation as it is run: what the program says of it is the same in every step, and slow to ask for.

    Attributes:
        type: which one, as in the table.
        arguments: what each input is bound to; several where it is a list.
        outputs: name, declared shape and declared dtype of each result.
    """

    type: str
    arguments: Mapping[str, Sequence[_Bound]]
    outputs: Sequence[tuple[str, tuple[int, ...], torch.dtype]]

    def name_of(self, argument: str) -> str:
        """The name that an input is bound to."""
        return self.arguments[argument][0].name

    def results(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Name and value of each result, in the declared shape and dtype."""
        arguments: dict[str, Any] = {}
        for name, argument in self.arguments.items():
            bound = [values[one.name] if one.value is None else one.value for one in argument]
            arguments[name] = bound[0] if len(bound) == 1 else bound
        computed = _OPERATIONS[self.type](arguments)
        results = computed if isinstance(computed, (tuple, list)) else (computed,)
        for (name, shape, dtype), result in zip(self.outputs, results, strict=True):
            if result.shape != shape:
                raise Damaged(f"{self.type} {name} gives {tuple(result.shape)}, declared is {shape}")
            yield name, result.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Operations
# ---------------------------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> Tensor:
    """Floating point as float32, in which everything is computed; integers as they are."""
    return x.float() if x.is_floating_point() else x


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda arguments: function(_wide(arguments["x"]))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Arguments], Tensor]:
    return lambda arguments: function(_wide(arguments["x"]), _wide(arguments["y"]))


def _reduction(function: Callable[..., Tensor]) -> Callable[[Arguments], Tensor]:
    def reduce(arguments: Arguments) -> Tensor:
        x = _wide(arguments["x"])
        axes = _integers(arguments["axes"]) if "axes" in arguments else list(range(x.ndim))
        return function(x, dim=axes, keepdim=_flag(arguments, "keep_dims"))

    return reduce


def _integers(values: Tensor) -> list[int]:
    return [int(value) for value in values.flatten().tolist()]


def _flag(arguments: Arguments, name: str) -> bool:
    return bool(arguments[name]) if name in arguments else False


def _list(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def _cast(arguments: Arguments) -> Tensor:
    kinds = {"fp16": torch.float16, "fp32": torch.float32, "int32": torch.int32, "bool": torch.bool}
    return arguments["x"].to(kinds[arguments["dtype"]])  # type: ignore[no-any-return]


def _expand_dims(arguments: Arguments) -> Tensor:
    x, axes = arguments["x"], _integers(arguments["axes"])
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x  # type: ignore[no-any-return]


def _squeeze(arguments: Arguments) -> Tensor:
    x = arguments["x"]
    axes = _integers(arguments["axes"]) if "axes" in arguments else [a for a, size in enumerate(x.shape) if size == 1]
    return x.squeeze(tuple(axes))  # type: ignore[no-any-return]


def _linear(arguments: Arguments) -> Tensor:
    bias = _wide(arguments["bias"]) if "bias" in arguments else None
    return F.linear(_wide(arguments["x"]), _wide(arguments["weight"]), bias)


def _matmul(arguments: Arguments) -> Tensor:
    x, y = _wide(arguments["x"]), _wide(arguments["y"])
    x = x.transpose(-1, -2) if _flag(arguments, "transpose_x") else x
    return x @ (y.transpose(-1, -2) if _flag(arguments, "transpose_y") else y)


def _slices(x: Tensor, arguments: Arguments) -> tuple[slice | int, ...]:
    """The index of `x` that `begin`, `end`, `stride` and the masks describe."""
    defaults = {"begin": 0, "end": 0, "stride": 1, "begin_mask": 0, "end_mask": 0, "squeeze_mask": 0}
    columns = [
        _integers(arguments[name]) if name in arguments else [default] * x.ndim for name, default in defaults.items()
    ]
    parts: list[slice | int] = []
    for begin, end, stride, from_start, to_end, squeezed in zip(*columns, strict=True):
        if squeezed:
            parts.append(begin)
            continue
        if stride < 1:
            raise Damaged(f"a slice has the stride {stride}")
        # A begin of -n counts from the end, as in Python; what is beyond is cut off.
        parts.append(slice(None if from_start else begin, None if to_end else end, stride))
    return tuple(parts)


def _slice_by_index(arguments: Arguments) -> Tensor:
    x: Tensor = arguments["x"]
    return x[_slices(x, arguments)]


def _slice_update(arguments: Arguments) -> Tensor:
    x: Tensor = arguments["x"].clone()
    x[_slices(x, arguments)] = arguments["update"]
    return x


def _split(arguments: Arguments) -> tuple[Tensor, ...]:
    x, axis = arguments["x"], int(arguments["axis"])
    if "split_sizes" in arguments:
        return x.split(_integers(arguments["split_sizes"]), dim=axis)  # type: ignore[no-any-return]
    return x.chunk(int(arguments["num_splits"]), dim=axis)  # type: ignore[no-any-return]


def _concat(arguments: Arguments) -> Tensor:
    if _flag(arguments, "interleave"):
        raise Damaged("a concat is interleaved, which the reference interpreter does not know")
    # A scalar among the values is a vector of one: so coremltools puts positions together.
    return torch.cat([torch.atleast_1d(value) for value in _list(arguments["values"])], dim=int(arguments["axis"]))


def _gather(arguments: Arguments) -> Tensor:
    """The elements at `indices` along `axis`; the dimensions of `indices` take the place of that axis."""
    x, indices, axis = arguments["x"], arguments["indices"].long(), int(arguments.get("axis", 0))
    if int(arguments.get("batch_dims", 0)):
        raise Damaged("a gather has batch dimensions, which the reference interpreter does not know")
    axis %= x.ndim
    taken = x.index_select(axis, torch.where(indices < 0, indices + x.shape[axis], indices).flatten())
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])  # type: ignore[no-any-return]


def _topk(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """The k largest or smallest elements and their indices; of equal ones the first, as Core ML documents."""
    x, axis, k = _wide(arguments["x"]), int(arguments.get("axis", -1)), int(arguments["k"])
    order = x.sort(dim=axis, descending=not _flag(arguments, "ascending"), stable=True)
    return order.values.narrow(axis, 0, k), order.indices.narrow(axis, 0, k)


def _blockwise_shift_scale(arguments: Arguments) -> Tensor:
    """(data - offset) * scale in the shape of data; each scale serves a block along every axis."""
    data, scale = _wide(arguments["data"]).float(), _wide(arguments["scale"])
    offset = arguments.get("offset")
    blocks = [part for size, count in zip(data.shape, scale.shape, strict=True) for part in (count, size // count)]
    spread = [part for count in scale.shape for part in (count, 1)]
    values = data.reshape(blocks)
    if offset is not None:
        values = values - offset.float().reshape(spread)
    return (values * scale.reshape(spread)).reshape(data.shape)


def _gelu(arguments: Arguments) -> Tensor:
    """The three forms that MIL has: by the error function, by tanh, by a sigmoid."""
    x, mode = _wide(arguments["x"]), str(arguments.get("mode", "EXACT"))
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if mode == "TANH_APPROXIMATION" else "none")


def _layer_norm(arguments: Arguments) -> Tensor:
    x = _wide(arguments["x"])
    axes = _integers(arguments["axes"]) if "axes" in arguments else list(range(x.ndim))
    centred = x - x.mean(axes, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + float(arguments.get("epsilon", 1e-5)))
    shape = [size if axis in {each % x.ndim for each in axes} else 1 for axis, size in enumerate(x.shape)]
    for name, function in (("gamma", torch.mul), ("beta", torch.add)):
        normed = function(normed, _wide(arguments[name]).reshape(shape)) if name in arguments else normed
    return normed


def unknown(operations: Iterable[str]) -> list[str]:
    """Those types of operations that are not in the table."""
    return sorted(set(operations) - _OPERATIONS.keys() - _SPECIAL)


_SPECIAL = frozenset({"const", "read_state", "write_state"})
_OPERATIONS: Mapping[str, Callable[[Arguments], Tensor | tuple[Tensor, ...]]] = {
    "abs": _unary(torch.abs),
    "add": _binary(torch.add),
    "cast": _cast,
    "ceil": _unary(torch.ceil),
    "clip": lambda a: _wide(a["x"]).clamp(float(a["alpha"]), float(a["beta"])),
    "concat": _concat,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "cos": _unary(torch.cos),
    "equal": _binary(torch.eq),
    "erf": _unary(torch.erf),
    "exp": _unary(torch.exp),
    "exp2": _unary(torch.exp2),
    "expand_dims": _expand_dims,
    "floor": _unary(torch.floor),
    "gather": _gather,
    "gather_along_axis": lambda a: a["x"].gather(int(a.get("axis", 0)), a["indices"].long()),
    "gelu": _gelu,
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "identity": lambda a: a["x"],
    "layer_norm": _layer_norm,
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "linear": _linear,
    "log": lambda a: torch.log(_wide(a["x"]) + float(a.get("epsilon", 1e-45))),
    "logical_and": _binary(torch.logical_and),
    "logical_not": _unary(torch.logical_not),
    "logical_or": _binary(torch.logical_or),
    "matmul": _matmul,
    "maximum": _binary(torch.maximum),
    "minimum": _binary(torch.minimum),
    "mul": _binary(torch.mul),
    "not_equal": _binary(torch.ne),
    "pow": _binary(torch.pow),
    "real_div": _binary(torch.div),
    "reduce_max": _reduction(torch.amax),
    "reduce_mean": _reduction(torch.mean),
    "reduce_min": _reduction(torch.amin),
    "reduce_sum": _reduction(torch.sum),
    "relu": _unary(torch.relu),
    "reshape": lambda a: a["x"].reshape(_integers(a["shape"])),
    "rsqrt": lambda a: torch.rsqrt(_wide(a["x"]) + _wide(a["epsilon"])),
    "select": lambda a: torch.where(a["cond"], a["a"], a["b"]),
    "sigmoid": _unary(torch.sigmoid),
    "sign": _unary(lambda x: torch.where(x.isnan(), x, torch.sign(x))),
    "silu": _unary(F.silu),
    "sin": _unary(torch.sin),
    "slice_by_index": _slice_by_index,
    "slice_update": _slice_update,
    "softmax": lambda a: torch.softmax(_wide(a["x"]), dim=int(a.get("axis", -1))),
    # As written, and not with a threshold beyond which it is the identity.
    "softplus": _unary(lambda x: torch.logaddexp(x, torch.zeros(()))),
    "split": _split,
    "sqrt": _unary(torch.sqrt),
    "square": _unary(torch.square),
    "squeeze": _squeeze,
    "stack": lambda a: torch.stack(_list(a["values"]), dim=int(a["axis"])),
    "sub": _binary(torch.sub),
    "tanh": _unary(torch.tanh),
    "tile": lambda a: a["x"].tile(_integers(a["reps"])),
    "topk": _topk,
    "transpose": lambda a: a["x"].permute(_integers(a["perm"])),
}
"""Functions by MIL name. A result may have any dtype; it is rounded to the declared one afterwards."""
