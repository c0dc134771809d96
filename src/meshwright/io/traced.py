"""A model as it was traced, before it has named dims: values with shapes, and the calls that make them.

What PyTorch exports and what an ONNX file holds both become a `Program`; `io.dims` names its dims and makes the
`graph.Graph` of it. A `Traced` keeps both, and how they belong together, for whoever runs a plan of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meshwright.graph import Graph, Role


@dataclass(frozen=True)
class Value:
    """A tensor of a program: its shape as traced, type (`float32`, `int64`, ...), role, whether it has a gradient; for
    a parameter or buffer, `path` is its name in the model. `storage` names the value in whose memory it lies, where
    that is another's (a view that was no copy), `is_packed` that its elements lie there in
    row-major order."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: Role = Role.ACTIVATION
    differentiable: bool = True
    path: str = ""
    storage: str = ""
    is_packed: bool = True


@dataclass(frozen=True)
class Call:
    """One operator applied to values.

    `op` is its full name (`aten.linear.default`, `onnx.MatMul`). `operands` are its tensors by the schema's argument
    name, in the schema's order: the name of a value, or a tuple of names where the argument is a list of tensors.
    `attributes` are its other arguments by name. `outputs` are the values that it makes, in order.
    """

    name: str
    op: str
    operands: Mapping[str, str | tuple[str, ...]]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of all operands, in order."""
        found: list[str] = []
        for operand in self.operands.values():
            found += [operand] if isinstance(operand, str) else operand
        return tuple(found)

    def reading(self, renamed: Mapping[str, str]) -> Call:
        """The same call, reading other values in the place of those that are renamed."""
        if renamed.keys().isdisjoint(self.inputs):
            return self
        operands = {
            argument: renamed.get(given, given)
            if isinstance(given, str)
            else tuple(renamed.get(name, name) for name in given)
            for argument, given in self.operands.items()
        }
        return replace(self, operands=operands)


@dataclass(frozen=True)
class Program:
    """Values and the calls that make them, in an order that can be run. `batch` is the size that dim 0 of the inputs
    had when it was traced. `tied` pairs parameters that share their storage, the owner first."""

    name: str
    values: Mapping[str, Value]
    calls: tuple[Call, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    batch: int = 1
    tied: tuple[tuple[str, str], ...] = ()


#: Of each dim of a value's shape, the named dims whose product it is, outermost first (none where its size is 1).
#: Within one value every name stands once.
Factors = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Reading:
    """A value that no operator of the graph makes: another value seen through `views`, calls that move no data
    (view, transpose, expand ...), in order. `positions` has, for each named dim of the value (`Traced.factors`,
    flat), the position of it among the named dims of the base, -1 where the base lacks it (an expanded dim)."""

    base: str
    views: tuple[str, ...]
    positions: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockInstance:
    """One block of `graph.sequence`: the call behind each operator of the block, and the value behind each tensor.

    A tensor beside a call's results (a mask, statistics: `Pattern.extras`) has no value of the program and stands for
    itself. A tensor of role BUFFER whose value is made by calls is a constant: its calls depend on no input and no
    parameter, and are no operators."""

    block: str
    calls: Mapping[str, str]
    values: Mapping[str, str]


@dataclass(frozen=True)
class Traced:
    """A program and its graph; see the module's docstring.

    `instances` has an entry for each block of `graph.sequence`. `factors` gives the named dims of every value. An
    operator that stands for a part of a call is named `call.part`. `warnings` name what is not understood (and
    therefore replicated, with its share of the FLOPs) and `folded` says in words which equal blocks were found.
    `phases_s` are the CPU-seconds of tracing, by what they went into."""

    program: Program
    graph: Graph
    instances: tuple[BlockInstance, ...]
    factors: Mapping[str, Factors]
    readings: Mapping[str, Reading]
    warnings: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()
    phases_s: Mapping[str, float] = field(default_factory=dict)


def needed(calls: Sequence[Call], outputs: Iterable[str]) -> tuple[tuple[Call, ...], set[str]]:
    """The calls that some values depend on, and all values that these read or make."""
    wanted = set(outputs)
    kept = []
    for call in reversed(calls):
        if wanted.intersection(call.outputs):
            wanted.update(call.inputs, call.outputs)
            kept.append(call)
    return tuple(reversed(kept)), wanted
