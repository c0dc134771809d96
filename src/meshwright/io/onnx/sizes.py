"""Sizes for the symbolic dims of an ONNX file: the batch, what the caller gives, and what is assumed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx

from meshwright.errors import InputError, Problem, nearest_name

#: The batch where the file leaves it open, or says 1: a prime that few sizes are multiples of (7 is in 224 and 49, 13
#: in 416, 11 in 77), so that a literal 1 in a target of a reshape can be told to be the batch.
SYMBOLIC_BATCH = 23

#: The size of any other symbolic dim that nobody gives.
DEFAULT_SIZE = 128


@dataclass(frozen=True)
class Bindings:
    """Sizes of symbolic dims by name. `batch` is that of the inputs in `batched`, by name; `literal` where the file
    says 1 for it."""

    sizes: Mapping[str, int]
    batch: int
    batched: frozenset[str]
    literal: bool

    def size(self, dim: Any) -> int | None:
        """The size of a dim of the file, None where it says none."""
        if dim.HasField("dim_value"):
            return int(dim.dim_value)
        return _evaluated(dim.dim_param, self.sizes) if dim.dim_param else None


def bind(model: onnx.ModelProto, sizes: dict[str, int], where: str) -> tuple[Bindings, tuple[str, ...]]:
    """Sizes for every symbolic dim of the inputs, and what was assumed for them in words."""
    dims = {item.name: list(item.type.tensor_type.shape.dim) for item in inputs_of(model.graph)}
    leading = {name: shape[0] for name, shape in dims.items() if shape}
    inner = {dim.dim_param for shape in dims.values() for dim in shape[1:]}
    first = next(iter(leading.values()), None)
    literal = first is not None and first.HasField("dim_value") and first.dim_value == 1
    batch = first.dim_value if first is not None and first.HasField("dim_value") else SYMBOLIC_BATCH
    open_dims = {
        name
        for name, dim in leading.items()
        if not dim.HasField("dim_value") and (dim is first or dim.dim_param not in inner)
    }
    batched = open_dims | {name for name, dim in leading.items() if literal and dim.dim_value == 1}
    bound = {leading[name].dim_param: int(batch) for name in open_dims if leading[name].dim_param}
    texts = dict.fromkeys(dim.dim_param for shape in dims.values() for dim in shape if dim.dim_param)
    symbols = dict.fromkeys(symbol for text in texts if text not in bound for symbol in _symbols(text))
    problems = [
        Problem(f"{where}: {name}", str(size), "is no symbolic dim of the inputs", nearest_name(name, symbols))
        for name, size in sizes.items()
        if name not in symbols
    ]
    problems += [
        Problem(f"{where}: {name}", str(size), "a size is at least 1") for name, size in sizes.items() if size < 1
    ]
    if problems:
        raise InputError(problems)
    assumed = [name for name in symbols if name not in bound and name not in sizes]
    words = tuple(f"the symbolic dim {name} is taken as {DEFAULT_SIZE}" for name in assumed)
    bound = {**dict.fromkeys(assumed, DEFAULT_SIZE), **sizes, **bound}
    return Bindings(bound, int(batch), frozenset(batched), literal), words


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs of a graph; files of old versions list initialisers among them."""
    initialisers = {tensor.name for tensor in graph.initializer}
    return [item for item in graph.input if item.name not in initialisers]


def _tree(text: str) -> ast.expr | None:
    """A symbolic size as an expression of Python, None where it is none."""
    if len(text) > 200:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _symbols(text: str) -> list[str]:
    """The names in a symbolic size such as `past + seq`; a text that is no such expression is one name."""
    tree = _tree(text)
    return [text] if tree is None else [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


def _evaluated(text: str, sizes: Mapping[str, int]) -> int | None:
    """A symbolic size as a number: names, whole numbers, + - * // and brackets; None where it cannot be known."""
    if text in sizes:
        return sizes[text]
    tree = _tree(text)
    return None if tree is None else _number(tree, sizes)


def _number(node: ast.expr, sizes: Mapping[str, int]) -> int | None:
    if isinstance(node, ast.Name):
        return sizes.get(node.id)
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, int) else None
    if not isinstance(node, ast.BinOp):
        return None
    left, right = _number(node.left, sizes), _number(node.right, sizes)
    if left is None or right is None:
        return None
    if isinstance(node.op, ast.FloorDiv):
        return left // right if right else None
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else None
