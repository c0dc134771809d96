"""Models as ONNX files: the graph of an `.onnx` as a `Program`, its weights absent, external or inside.

Nothing of the file is executed and no weight is read: initialisers are parameters by their dims, and what depends on
constants and shapes alone (the arithmetic of reshapes, masks, positions) is folded, so that every shape is a number.
Symbolic dims get sizes: dim 0 of the inputs is the batch; another one has the size that the caller gives, else
`DEFAULT_SIZE` with a warning. Operators are read by the version that the file's opset has of them (13 to 23), but
arguments look the same in all: `axes`, `shape`, `pads` and the like are attributes of a `Call`, whether the file holds
them as attributes or as constant inputs, and attributes left out have the schema's default. Functions of the model are
inlined, fused operators of `com.microsoft` are spelled out (`io.onnx.fused`), an `If` whose condition is known is the
branch taken. Left out: loops, sequences, optional and sparse tensors, shapes that depend on data.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from meshwright.errors import InputError, Problem
from meshwright.graph import Role
from meshwright.io.traced import Factors, Program, Traced


@dataclass(frozen=True)
class OnnxModel:
    """What an `.onnx` file holds: its program, the initialisers' path in it, and what had to be assumed."""

    program: Program
    assumptions: tuple[str, ...] = ()


def traced_onnx(path: str | os.PathLike[str], *, sizes: Mapping[str, int] | None = None) -> Traced:
    """The graph of an `.onnx` file, with its program; arguments and errors are those of `read_onnx`.

    What had to be assumed stands first among the warnings.
    """
    from meshwright.io.dims import traced

    model = read_onnx(path, sizes=sizes)
    found = traced(model.program)
    constants = _batched_parameters(model.program, found.factors)
    if constants:  # a mask for the batch that the file was exported with is no parameter
        values = {
            name: replace(value, role=Role.BUFFER, differentiable=False) if name in constants else value
            for name, value in model.program.values.items()
        }
        found = traced(replace(model.program, values=values))
    return replace(found, warnings=(*model.assumptions, *found.warnings))


def _batched_parameters(program: Program, factors: Mapping[str, Factors]) -> set[str]:
    """Parameters of which one dim is the batch."""
    return {
        name
        for name, value in program.values.items()
        if value.role is Role.PARAMETER and any("batch" in labels for labels in factors.get(name, ()))
    }


def read_onnx(path: str | os.PathLike[str], *, sizes: Mapping[str, int] | None = None) -> OnnxModel:
    """The program of an `.onnx` file; `sizes` are those of its symbolic dims by name (the batch needs none).

    Raises `InputError` with all problems: no ONNX file or a broken one, an opset that is not read, an operator without
    known shapes, control flow that depends on data.
    """
    if importlib.util.find_spec("onnx") is None:
        raise InputError(
            [Problem(str(path), "", "an ONNX file needs the package onnx: pip install 'meshwright[onnx]'")]
        )
    from meshwright.io.onnx.files import read_file
    from meshwright.io.onnx.nodes import read_nodes
    from meshwright.io.onnx.sizes import SYMBOLIC_BATCH, bind

    model = read_file(Path(path))
    bindings, assumptions = bind(model, dict(sizes or {}), str(path))
    program = read_nodes(model, bindings, Path(path))
    if not bindings.literal:
        return OnnxModel(program, assumptions)
    try:  # of a dim of 1 nothing can be told: see whether the file takes another batch
        many = read_nodes(model, replace(bindings, batch=SYMBOLIC_BATCH), Path(path))
    except InputError:
        many = program
    if many is program or not _grows(program, many):
        fixed = "its batch is fixed at 1: nothing of it grows with the batch that is asked for"
        return OnnxModel(program, (*assumptions, fixed))
    return OnnxModel(many, assumptions)


def _grows(one: Program, many: Program) -> bool:
    """Whether each value of a program has, with another batch, as many elements for each sample or is the same."""
    common = one.values.keys() & many.values.keys()
    sizes = [(math.prod(one.values[name].shape), math.prod(many.values[name].shape)) for name in common]
    return all(more in (size, size * many.batch) for size, more in sizes)
