"""One call of a program on one rank: local operands, and where they lie in the whole.

A rule of `io.rules` says that the pieces of an operator, computed apart, make up the whole. What it takes to compute a
piece is here and in `kernels`: most calls are PyTorch's own operator on local operands; some name sizes, places or
counts of the whole, and those are put right first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from meshwright.io.rules.pattern import Array
from meshwright.io.traced import Call
from meshwright.registry import Registry

#: A tensor, or several where the argument is a list.
Operand: TypeAlias = Tensor | tuple[Tensor, ...]

#: Start and stop of a piece.
Extent = tuple[int, int]


@dataclass(frozen=True)
class LocalCall:
    """A call with its local operands.

    `operand_arrays` (in the order of `Call.inputs`) and `result_arrays` give each array's dims as products of named
    dims; `sizes` are those of the whole, `extents` the piece that this rank has of a dim that is cut. `halo` says how
    many rows before and after its piece of a dim the first operand has (zeros beyond its ends). `is_first` is whether
    the rank is the first of those whose results are added up; `total` adds up a number over these.
    """

    call: Call
    operands: Mapping[str, Operand]
    operand_arrays: tuple[Array, ...]
    result_arrays: tuple[Array, ...]
    sizes: Mapping[str, int]
    extents: Mapping[str, Extent] = field(default_factory=dict)
    halo: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    is_first: bool = True
    total: Callable[[Tensor], Tensor] = lambda number: number

    def tensor(self, argument: str) -> Tensor:
        """An operand that is one tensor."""
        found = self.operands[argument]
        assert isinstance(found, Tensor), (self.call.op, argument)
        return found

    def optional(self, argument: str) -> Tensor | None:
        """An operand that may be left out."""
        return self.tensor(argument) if argument in self.operands else None

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute, or the default where it is not given."""
        found = self.call.attributes.get(attribute, default)
        return default if found is None else found

    def array(self, argument: str) -> Array:
        """The dims of an operand that is one tensor."""
        place = 0
        for name, operand in self.call.operands.items():
            if name == argument:
                return self.operand_arrays[place]
            place += 1 if isinstance(operand, str) else len(operand)
        raise KeyError(argument)

    def extent(self, dim: str) -> Extent:
        """The piece of a named dim that this rank has."""
        return self.extents.get(dim, (0, self.sizes[dim]))

    def length(self, dims: Sequence[str]) -> int:
        """The local size of an array's dim."""
        return math.prod(stop - start for start, stop in map(self.extent, dims))

    def whole_length(self, dims: Sequence[str]) -> int:
        """Its size in the whole."""
        return math.prod(self.sizes[dim] for dim in dims)

    def shape(self, result: int = 0) -> list[int]:
        """The local shape of a result."""
        return [self.length(dims) for dims in self.result_arrays[result]]

    def is_cut(self, dims: Sequence[str]) -> bool:
        """Whether this rank has less than the whole of an array's dim."""
        return self.length(dims) != self.whole_length(dims)

    def share(self, array: Array) -> float:
        """The share of an array's elements that this rank has."""
        return math.prod(self.length(dims) / self.whole_length(dims) for dims in array)

    def positions(self, dims: Sequence[str]) -> Tensor:
        """Where the local elements of an array's dim lie in the whole of it, ascending."""
        sizes = [self.sizes[dim] for dim in dims]
        places = torch.arange(math.prod(sizes)).reshape(sizes)
        for at, dim in enumerate(dims):
            start, stop = self.extent(dim)
            places = places.narrow(at, start, stop - start)
        return places.flatten()


Kernel = Callable[[LocalCall], tuple[Tensor, ...]]

#: How a call is computed on local operands where it is not PyTorch's own operator as it stands, by the operator's name
#: with or without its overload.
KERNELS = Registry[Kernel]("operator")


def kernel(*names: str) -> Callable[[Kernel], Kernel]:
    """Register a function as the kernel of these operators."""

    def register(function: Kernel) -> Kernel:
        for name in names:
            KERNELS.add(f"aten.{name}", function)
        return function

    return register


def run_local(local: LocalCall) -> tuple[Tensor, ...]:
    """The local results of a call."""
    op, short = local.call.op, local.call.op.rpartition(".")[0]
    name = next((name for name in (op, short) if name in KERNELS), None)
    return invoke(local) if name is None else KERNELS[name](local)


def invoke(local: LocalCall, operands: Mapping[str, Operand] | None = None, **changed: Any) -> tuple[Tensor, ...]:
    """PyTorch's operator on local operands, some of them or of the attributes changed."""
    given: dict[str, Any] = {**local.call.attributes, **local.operands, **(operands or {}), **changed}
    for name in [name for name in given if name.endswith("_present")]:
        argument, present = name.removesuffix("_present"), given.pop(name)
        items = iter(given[argument])
        given[argument] = [next(items) if there else None for there in present]
    return _results(_call(local.call.op, given))


def overload_of(op: str) -> Any:
    """PyTorch's operator by its full name."""
    space, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)


#: Arguments that say where and how a tensor lies on a device: here all are dense, in memory.
PLACEMENT_ARGUMENTS = frozenset({"device", "layout", "pin_memory", "memory_format"})


def _call(op: str, given: Mapping[str, Any]) -> Any:
    function = overload_of(op)
    arguments: list[Any] = []
    named: dict[str, Any] = {}
    for argument in function._schema.arguments:
        name = argument.name
        if name in PLACEMENT_ARGUMENTS or name not in given:
            if not argument.has_default_value() and "Optional" not in str(argument.type):
                raise TypeError(f"{op}: {name} is missing")
            value = argument.default_value if argument.has_default_value() else None
            if name not in given and not argument.kwarg_only:
                arguments.append(value)
            continue
        value = in_double(given[name])
        value = list(value) if isinstance(value, tuple) else value
        if argument.kwarg_only:
            named[name] = value
        else:
            arguments.append(value)
    return function(*arguments, **named)


def in_double(value: Any) -> Any:
    """An attribute with types by PyTorch's names; floats of any width are computed in float64."""
    if isinstance(value, str) and (value.startswith("torch.") or hasattr(torch, value)):
        found = getattr(torch, value.removeprefix("torch."))
        value = found if isinstance(found, torch.dtype) else value
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return value


def _results(found: Any) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)
