"""ONNX files as messages: what is no ONNX file, or one that cannot be read here, is told before anything is made of
it; functions of the model are inlined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import NodeProto

from meshwright.errors import InputError, Problem
from meshwright.io.onnx.nodes import FLOATS, OPSETS, bodies, domain_of, first_line

#: Nodes that a model may have once its functions are inlined.
MAX_NODES = 2_000_000

#: Protobuf's limit of one message.
MAX_FILE_BYTES = 2**31 - 1


def read_file(path: Path) -> onnx.ModelProto:
    """The model in a file, without functions of its own; weights in other files are left there."""
    model = _parsed(path)
    problems = [*_model_problems(model, str(path))]
    if problems:
        raise InputError(problems)
    return _inlined(model, str(path))


def _parsed(path: Path) -> onnx.ModelProto:
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    where = str(path)
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            rule = "is larger than the 2 GiB that one ONNX file may have; save it with its weights as external data"
            raise InputError([Problem(where, f"{path.stat().st_size} bytes", rule)])
        content = path.read_bytes()
    except OSError as error:
        raise InputError([Problem(where, "", f"cannot be read: {error.strerror or error}")]) from None
    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError:
        raise InputError([Problem(where, "", "is not an ONNX file, or a truncated one")]) from None
    # Almost any short string is a message without known fields.
    if not model.graph.node or not model.ir_version:
        raise InputError([Problem(where, "", "is not an ONNX file: it has no graph with nodes")])
    return model


def _model_problems(model: onnx.ModelProto, where: str) -> Iterator[Problem]:
    versions = {domain_of(item.domain): item.version for item in model.opset_import}
    version = versions.get("")
    if version is None:
        yield Problem(where, "", "says no opset of the default domain, or is truncated")
    elif version not in OPSETS:
        nearest = OPSETS.start if version < OPSETS.start else OPSETS.stop - 1
        rule = f"the opset of the default domain must be from {OPSETS.start} to {OPSETS.stop - 1}; convert the model"
        yield Problem(where, f"opset {version}", rule, f"onnx.version_converter.convert_version(model, {nearest})")
    if any(not isinstance(text, str) for text in _texts(model.graph)):
        yield Problem(where, "", "is damaged: it holds names that are no text")
    if model.graph.sparse_initializer:
        yield Problem(where, model.graph.sparse_initializer[0].values.name, "sparse initialisers cannot be read")
    for tensor in model.graph.initializer:
        if any(size < 0 for size in tensor.dims):
            yield Problem(f"{where}: {tensor.name}", str(list(tensor.dims)), "sizes of an initialiser are not negative")


def _texts(graph: onnx.GraphProto) -> Iterator[Any]:
    """All names that reading depends on; those that are not UTF-8 are bytes."""
    for node in graph.node:
        yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)
        for body in bodies(node):
            yield from _texts(body)
    for tensor in graph.initializer:
        yield tensor.name
    for item in (*graph.input, *graph.output, *graph.value_info):
        yield item.name
        yield from (dim.dim_param for dim in item.type.tensor_type.shape.dim)


def _inlined(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """The model without functions of its own."""
    if not model.functions:
        return model
    try:
        problem = _function_problem(model, where)
    except RecursionError:
        problem = Problem(where, "", "its functions call one another too deeply")
    if problem:
        raise InputError([problem])
    from onnx import inliner

    for tensor in model.graph.initializer:  # inlining copies the model, and need not copy its weights
        if tensor.data_type in FLOATS and math.prod(tensor.dims) > 1024:
            for data in ("raw_data", "float_data", "double_data", "int32_data"):
                tensor.ClearField(data)
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:  # whatever the library finds wrong with them
        rule = f"the functions of the model cannot be inlined: {first_line(error)}"
        raise InputError([Problem(where, "", rule)]) from None


def _function_problem(model: onnx.ModelProto, where: str) -> Problem | None:
    """What makes inlining endless: a function that calls itself, or functions that multiply."""
    functions = {(item.domain, item.name): item for item in model.functions}
    counts: dict[tuple[str, str], int] = {}
    pending: list[tuple[str, str]] = []

    def count(nodes: Iterable[NodeProto]) -> int:
        return sum(1 + sum(count(body.node) for body in bodies(node)) + size(node) for node in nodes)

    def size(node: NodeProto) -> int:
        key = (node.domain, node.op_type)
        if key not in functions:
            return 0
        if key in pending:
            raise InputError([Problem(where, ":".join(key), "this function of the model calls itself")])
        if key not in counts:
            pending.append(key)
            counts[key] = count(functions[key].node)
            pending.pop()
        return counts[key]

    nodes = count(model.graph.node)
    if nodes > MAX_NODES:
        return Problem(where, f"{nodes} nodes", f"its functions inlined, a model may have {MAX_NODES:,} nodes")
    return None
