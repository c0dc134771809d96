"""The nodes of an ONNX graph, one after the other: what is constant is folded, the rest become calls of a program."""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, TypeProto, checker, defs, helper, numpy_helper, shape_inference

from meshwright.errors import InputError, Problem
from meshwright.graph import Role
from meshwright.io.onnx.batch import expanded_beside, rebatched
from meshwright.io.onnx.fit import fit_problems
from meshwright.io.onnx.fused import SPELLED_OPSET, spelled_out
from meshwright.io.onnx.sizes import DEFAULT_SIZE, Bindings, inputs_of
from meshwright.io.rules.onnx import POINTWISE
from meshwright.io.traced import Call, Program, Value, needed

#: Opsets of the default domain that can be read.
OPSETS = range(13, 24)

#: Constants of more elements than this are known by their shape alone: no shape is computed from so many numbers.
MAX_FOLDED = 2**16

#: Operands that are settings rather than tensors, by operator type.
ARGUMENTS: dict[str, frozenset[str]] = {
    op: frozenset(names.split())
    for op, names in {
        "Reshape": "shape",
        "Expand": "shape",
        "Slice": "starts ends axes steps",
        "Squeeze": "axes",
        "Unsqueeze": "axes",
        "Pad": "pads constant_value axes",
        "Tile": "repeats",
        "TopK": "K",
        "Split": "split",
        "Resize": "roi scales sizes",
        "CumSum": "axis",
        "OneHot": "depth values",
        "Clip": "min max",
        "Dropout": "ratio training_mode",
        "Trilu": "k",
        "CenterCropPad": "shape",
        "MaxUnpool": "output_shape",
        "DFT": "dft_length axis",
        **dict.fromkeys(
            (
                *("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2"),
                *("ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare"),
            ),
            "axes",
        ),
    }.items()
}

#: Float operands that are state rather than trained, by operator type.
STATE: dict[str, frozenset[str]] = {
    "BatchNormalization": frozenset({"input_mean", "input_var"}),
    "QuantizeLinear": frozenset({"y_scale"}),
    "DequantizeLinear": frozenset({"x_scale"}),
    **dict.fromkeys(("ScatterElements", "ScatterND"), frozenset({"data"})),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), frozenset({"initial_h", "initial_c"})),
}

#: Operators of which ONNX has no shape inference, in some version: of how many operands the result has the shape.
_WITHOUT_INFERENCE = {
    "GroupNormalization": 1,
    "MeanVarianceNormalization": 1,
    "GreaterOrEqual": 2,
    "LessOrEqual": 2,
}

#: Operators whose results are not determined by their operands.
_RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
)

#: Arguments that are one number.
_NUMBERS = frozenset({"K", "axis", "k", "ratio", "training_mode", "constant_value", "min", "max", "depth"})

FLOATS = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}
    | {number for name, number in TensorProto.DataType.items() if name.startswith("FLOAT8")}
)

_TYPES = frozenset(TensorProto.DataType.values()) - {TensorProto.UNDEFINED}

_TYPE_NAMES = {TensorProto.FLOAT: "float32", TensorProto.DOUBLE: "float64"}


@dataclass(frozen=True)
class _Known:
    """What is known of an array of the file: its type and shape, and its numbers where it is a small constant."""

    type: int
    shape: tuple[int, ...]
    constant: bool = False
    data: NDArray[Any] | None = None

    @property
    def proto(self) -> TypeProto:
        return helper.make_tensor_type_proto(self.type, self.shape)


class _Unreadable(Exception):
    """A node whose results cannot be known; `problem` is None where that follows from another one's."""

    def __init__(self, problem: Problem | None = None) -> None:
        super().__init__(str(problem))
        self.problem = problem


def read_nodes(model: onnx.ModelProto, bindings: Bindings, path: Path) -> Program:
    """The program of a model without functions, its symbolic dims bound; raises `InputError` with all problems."""
    program = _Pass(model, bindings, path).program()
    problems = [*fit_problems(program, str(path))]
    if problems:
        raise InputError(problems)
    return program


class _Pass:
    """One pass over the nodes of a model: what is constant is folded, the rest become calls, and values by need.

    Names of values and calls are those of the file, made fit for paths and told apart.
    """

    def __init__(self, model: onnx.ModelProto, bindings: Bindings, path: Path) -> None:
        self.model, self.bindings, self.path = model, bindings, path
        self.versions = {domain_of(item.domain): item.version for item in model.opset_import}
        self.known: dict[str, _Known] = {}
        self.values: dict[str, Value] = {}
        self.calls: list[Call] = []
        self.problems: list[Problem] = []
        self.names: dict[str, str] = {}
        self.taken: Counter[str] = Counter()
        self.declared = {item.name: item.type.tensor_type for item in (*model.graph.value_info, *model.graph.output)}
        self.parameters: dict[str, TensorProto] = {}
        #: See `batch.rebatched`.
        self.outer: dict[int, int] = {}

    def program(self) -> Program:
        """The program of the whole model, without what its outputs do not depend on."""
        graph = self.model.graph
        self._read_initialisers(graph)
        inputs = [item.name for item in inputs_of(graph)]
        for item in inputs_of(graph):
            self._read_input(item)
        self._read_nodes(graph.node)
        for item in graph.output:
            if item.name not in self.known and not self.problems:
                self.problems.append(Problem(self._where(item.name), "", "is an output that no node makes"))
        outputs = [item.name for item in graph.output if item.name in self.known and not self.known[item.name].constant]
        if not outputs and not self.problems:
            self.problems.append(Problem(str(self.path), "", "none of its outputs depends on its inputs"))
        if self.problems:
            raise InputError(self.problems)
        calls, used = needed(self.calls, [self._value(name) for name in outputs])
        return Program(
            name=self.path.stem,
            values={name: value for name, value in self.values.items() if name in used},
            calls=calls,
            inputs=tuple(self._value(name) for name in inputs if self.names.get(name) in used),
            outputs=tuple(self._value(name) for name in outputs),
            batch=self.bindings.batch,
        )

    @property
    def _rebatches(self) -> bool:
        """Whether the file has a batch of 1 in its shapes and is read with another."""
        return self.bindings.literal and self.bindings.batch > 1

    def _where(self, name: str) -> str:
        return f"{self.path}: {name}"

    def _schema_of(self, node: NodeProto) -> Any:
        return _schema(node.op_type, self.versions.get(domain_of(node.domain), 1), domain_of(node.domain))

    # -- names

    def _name(self, text: str) -> str:
        """A name of its own, fit for paths, like `text`."""
        name = re.sub(r"[^\w.]+", "_", text).strip("_") or "value"
        self.taken[name] += 1
        while self.taken[name] > 1:
            name = f"{name}_{self.taken[name]}"
            self.taken[name] += 1
        return name

    def _value(self, name: str) -> str:
        """The name in the program of an array of the file; a constant or parameter is put there at its first use."""
        if name in self.names:
            return self.names[name]
        known = self.known[name]
        role = Role.ACTIVATION
        if known.constant:
            role = Role.BUFFER
        elif name in self.parameters:
            role = Role.PARAMETER
        own = self.names[name] = self._name(name)
        path = name if role is not Role.ACTIVATION else ""
        self.values[own] = Value(own, known.shape, _type_name(known.type), role, role is Role.PARAMETER, path)
        return own

    # -- arrays that no node makes

    def _read_initialisers(self, graph: onnx.GraphProto) -> None:
        settings = {
            name
            for node in graph.node
            for argument, name, _ in _named_operands(node, self._schema_of(node))
            if argument in ARGUMENTS.get(node.op_type, ()) or argument in STATE.get(node.op_type, ())
        } | _masks(graph)
        for tensor in graph.initializer:
            shape = tuple(int(size) for size in tensor.dims)
            if tensor.data_type not in _TYPES:
                self.problems.append(Problem(self._where(tensor.name), str(tensor.data_type), "is no type of elements"))
                continue
            trained = tensor.data_type in FLOATS and bool(shape) and 0 not in shape and tensor.name not in settings
            if trained:
                self.parameters[tensor.name] = tensor
                self.known[tensor.name] = _Known(tensor.data_type, shape)
            else:
                self.known[tensor.name] = _Known(tensor.data_type, shape, True, self._numbers(tensor, shape))

    def _take_for_numbers(self, node: NodeProto) -> None:
        """One number in brackets that is broadcast over a last dim is a constant, as a bare one is, and no parameter:
        a bias of one output goes with a last dim of 1."""
        lasts = [self.known[name].shape[-1] for name in node.input if name and self.known[name].shape]
        if node.op_type not in POINTWISE or node.op_type == "PRelu" or max(lasts, default=1) == 1:
            return
        for name in node.input:
            if name in self.parameters and math.prod(self.known[name].shape) == 1 and name not in self.names:
                numbers = self._numbers(self.parameters.pop(name), self.known[name].shape)
                self.known[name] = replace(self.known[name], constant=True, data=numbers)

    def _numbers(self, tensor: TensorProto, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """The numbers of a small constant, None where they are many, or lie in a file that is not there."""
        if math.prod(shape) > MAX_FOLDED:
            return None
        try:
            if tensor.data_location == TensorProto.EXTERNAL:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(self.path.parent))
            numbers: NDArray[Any] = numpy_helper.to_array(tensor)
            return numbers
        except Exception:  # a file that is absent, outside the folder or short, data that do not fit the dims
            return None

    def _read_input(self, item: onnx.ValueInfoProto) -> None:
        if item.type.WhichOneof("value") != "tensor_type":
            self.problems.append(Problem(self._where(item.name), "", "an input must be a tensor"))
            return
        if not item.type.tensor_type.HasField("shape"):
            self.problems.append(Problem(self._where(item.name), "", "the input has no shape, not even a symbolic one"))
            return
        dims = item.type.tensor_type.shape.dim
        sizes = [self.bindings.size(dim) for dim in dims]
        if item.name in self.bindings.batched:
            sizes[0] = self.bindings.batch
        # An input's dim without even a name is like a symbolic one.
        shape = tuple(DEFAULT_SIZE if size is None else size for size in sizes)
        if any(size < 1 for size in shape):
            self.problems.append(Problem(self._where(item.name), str(list(shape)), "sizes of an input are at least 1"))
            return
        kind = item.type.tensor_type.elem_type
        if kind not in _TYPES:
            self.problems.append(Problem(self._where(item.name), str(kind), "is no type of elements"))
            return
        self.known[item.name] = _Known(kind, shape)
        own = self.names[item.name] = self._name(item.name)
        self.values[own] = Value(own, shape, _type_name(kind), Role.INPUT, False)

    # -- nodes

    def _read_nodes(self, nodes: Iterable[NodeProto], opset: int = 0) -> None:
        for node in nodes:
            try:
                self._read_node(node, opset or self.versions.get(domain_of(node.domain), 1))
            except _Unreadable as failure:
                if failure.problem:
                    self.problems.append(failure.problem)

    def _read_node(self, node: NodeProto, version: int) -> None:
        here = self._where(f"{node.op_type} {node.name}".strip())
        self._check_names(node, here)
        parts = spelled_out(
            node, {name: (self.known[name].type, self.known[name].shape) for name in node.input if name}
        )
        if parts:
            self._read_nodes(parts, SPELLED_OPSET)
            return
        if self._rebatches and node.op_type == "Concat":
            parts = list(expanded_beside(node, [self.known[name].shape for name in node.input], self.bindings.batch))
            if parts:
                self._read_nodes(parts)
                return
        if any(bodies(node)):
            self._read_branch(node, here)
            return
        schema = _schema(node.op_type, version, domain_of(node.domain))
        node = _with_all_outputs(node)
        self._take_for_numbers(node)
        results = self._results(node, schema, here)
        constant = node.op_type in ("Shape", "Size") or all(self.known[name].constant for name in node.input if name)
        if constant and node.op_type not in _RANDOM:
            self.known.update(self._folded(node, version, results))
            return
        for name, known in results.items():
            if 0 in known.shape:
                raise _Unreadable(Problem(here, name, f"its shape is {list(known.shape)}: it has no elements"))
        self.known.update(results)
        self._add_call(node, schema)

    def _check_names(self, node: NodeProto, here: str) -> None:
        for name in node.output:
            if name and name in self.known:
                raise _Unreadable(Problem(here, name, "is made twice"))
        unknown = [name for name in node.input if name and name not in self.known]
        if unknown and not self.problems:
            raise _Unreadable(Problem(here, unknown[0], "is read before anything makes it"))
        if unknown:  # follows from what was found before
            raise _Unreadable

    def _read_branch(self, node: NodeProto, here: str) -> None:
        """An `If` whose condition is known is the branch that it takes."""
        condition = self.known[node.input[0]].data if node.op_type == "If" and node.input else None
        if condition is None:
            rule = "control flow that depends on data cannot be planned; export the model with it unrolled or fixed"
            raise _Unreadable(Problem(here, node.op_type, rule))
        branch = "then_branch" if condition.all() else "else_branch"
        body = next((attribute.g for attribute in node.attribute if attribute.name == branch), None)
        if body is None or len(body.output) != len(node.output):
            raise _Unreadable(Problem(here, branch, "is absent, or makes another number of results"))
        self.declared |= {item.name: item.type.tensor_type for item in (*body.value_info, *body.output)}
        self._read_initialisers(body)
        self._read_nodes(body.node)
        results = zip(body.output, node.output, strict=True)
        self._read_nodes(helper.make_node("Identity", [made.name], [wanted]) for made, wanted in results)

    # -- shapes

    def _results(self, node: NodeProto, schema: Any, here: str) -> dict[str, _Known]:
        """Type and shape of each result."""
        types = self._inferred(node, schema, here) if schema else {}
        return {name: self._result(name, types.get(name), node, here) for name in node.output}

    def _inferred(self, node: NodeProto, schema: Any, here: str) -> dict[str, TypeProto]:
        inputs = {name: self.known[name] for name in node.input if name}
        data = {
            name: numpy_helper.from_array(known.data, name)
            for name, known in inputs.items()
            if known.data is not None and known.data.ndim <= 1
        }
        if node.op_type == "Reshape" and len(inputs) == 2:
            source, target = inputs.values()
            if self._rebatches and target.data is not None:
                sizes = rebatched(source.shape, target.data.ravel().tolist(), self.bindings.batch, self.outer)
                data[node.input[1]] = numpy_helper.from_array(np.array(sizes, dtype=np.int64))
        bare = _bare(node)
        types = {name: known.proto for name, known in inputs.items()}
        opset = helper.make_opsetid(schema.domain, schema.since_version)
        try:
            if not schema.has_type_and_shape_inference_function and node.op_type in _WITHOUT_INFERENCE:
                return {node.output[0]: _like_operands(node.op_type, list(inputs.values()))}
            if not schema.deprecated:
                checker.check_node(bare, _checker(schema.domain, schema.since_version, self.model.ir_version))
            found: dict[str, TypeProto] = shape_inference.infer_node_outputs(
                schema, bare, types, data, opset_imports=[opset], ir_version=self.model.ir_version
            )
        except Exception as error:  # the library raises errors of its own and built-in ones
            raise _Unreadable(Problem(here, _shapes(inputs.values()), f"is not valid: {first_line(error)}")) from None
        return found

    def _result(self, name: str, inferred: TypeProto | None, node: NodeProto, here: str) -> _Known:
        """What is known of a result: what was inferred, and what the file says where that is nothing."""
        if inferred is not None and inferred.WhichOneof("value") not in (None, "tensor_type"):
            raise _Unreadable(Problem(here, name, "only operators on tensors can be read: no sequences, no loops"))
        found = inferred.tensor_type if inferred is not None else None
        for tensor in (found, self.declared.get(name)):
            if tensor is None or not tensor.HasField("shape") or tensor.elem_type not in _TYPES:
                continue
            sizes = [self.bindings.size(dim) for dim in tensor.shape.dim]
            shape = tuple(size for size in sizes if size is not None and size >= 0)
            if len(shape) < len(sizes):
                continue
            if tensor is not found and self._rebatches and shape[:1] == (1,):
                shape = (self.bindings.batch, *shape[1:])
            elements = math.prod(self.known[node.input[0]].shape) if node.op_type == "Reshape" else math.prod(shape)
            if elements != math.prod(shape):
                rule = f"has {elements} elements, and cannot have the shape {list(shape)}"
                raise _Unreadable(Problem(here, node.input[0], rule))
            return _Known(tensor.elem_type, shape)
        if found is None or found.elem_type not in _TYPES:
            rule = "is no operator that is known here, and the file does not say the shapes of its results"
            raise _Unreadable(Problem(here, f"{domain_of(node.domain) or 'opset'} {node.op_type}", rule))
        unread = [item for item in node.input if item and self.known[item].constant and self.known[item].data is None]
        reason = f"; the numbers of {unread[0]} are not in the file" if unread else ""
        raise _Unreadable(Problem(here, name, f"its shape depends on data{reason}"))

    # -- constants

    def _folded(self, node: NodeProto, version: int, results: Mapping[str, _Known]) -> dict[str, _Known]:
        """The results of a node that depends on constants and shapes alone, with their numbers where they are few."""
        data: Sequence[Any] = [None] * len(results)
        if node.op_type == "Shape":
            bounds = {item.name: item.i for item in node.attribute}
            shape = self.known[node.input[0]].shape
            data = [np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], dtype=np.int64)]
        elif node.op_type == "Size":
            data = [np.array(math.prod(self.known[node.input[0]].shape), dtype=np.int64)]
        elif all(self.known[name].data is not None for name in node.input if name) and all(
            math.prod(known.shape) <= MAX_FOLDED for known in results.values()
        ):
            data = _computed(node, version, {name: self.known[name].data for name in node.input if name}, data)
        return {
            name: replace(known, constant=True, data=numbers)
            for (name, known), numbers in zip(results.items(), data, strict=True)
        }

    # -- calls

    def _add_call(self, node: NodeProto, schema: Any) -> None:
        operands: dict[str, str | tuple[str, ...]] = {}
        attributes = dict(_defaults(schema)) if schema else {}
        attributes |= {item.name: value for item in node.attribute if (value := _plain(item)) is not None}
        lists: dict[str, list[str]] = {}
        for argument, name, many in _named_operands(node, schema):
            if not name or (node.op_type == "Concat" and 0 in self.known[name].shape):
                continue  # an empty array beside others adds nothing
            setting = None if many else self._setting(node, argument, name)
            if setting is not None:
                attributes[argument] = setting
            elif many:
                lists.setdefault(argument, []).append(self._value(name))
                operands[argument] = tuple(lists[argument])
            else:
                operands[argument] = self._value(name)
        sources = [
            self.values[name] for item in operands.values() for name in ((item,) if isinstance(item, str) else item)
        ]
        trained = any(source.differentiable for source in sources)
        outputs = []
        for name in node.output:
            own = self._value(name)
            floats = self.known[name].type in FLOATS
            self.values[own] = replace(self.values[own], differentiable=trained and floats)
            outputs.append(own)
        op = f"{domain_of(node.domain) or 'onnx'}.{node.op_type}"
        call = Call(self._name(node.name or node.op_type), op, operands, tuple(outputs), attributes)
        self.calls.append(call)

    def _setting(self, node: NodeProto, argument: str, name: str) -> Any:
        """A constant operand as an attribute: an argument such as `axes`, or a number; None where it is a tensor."""
        known = self.known[name]
        if not known.constant or known.data is None:
            return None
        rank = max((len(self.known[other].shape) for other in node.input if other and other != name), default=0)
        number = known.data.size == 1 and (not known.shape or (node.op_type in POINTWISE and len(known.shape) <= rank))
        if argument not in ARGUMENTS.get(node.op_type, ()) and not number:
            return None
        if known.data.size == 1 and (number or argument in _NUMBERS):
            return known.data.item()
        return tuple(known.data.ravel().tolist())


def _masks(graph: onnx.GraphProto) -> set[str]:
    """Initialisers that are only added to what a softmax reads, with a number for each query and key: exporters write
    masks as they write weights."""
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)

    def only(nodes: Sequence[NodeProto], op: str) -> bool:
        return bool(nodes) and all(node.op_type == op for node in nodes)

    return {
        tensor.name
        for tensor in graph.initializer
        if len(tensor.dims) >= 2
        and min(tensor.dims[-2:]) > 1
        and only(readers[tensor.name], "Add")
        and all(only(readers[name], "Softmax") for node in readers[tensor.name] for name in node.output)
    }


def _like_operands(op: str, operands: Sequence[_Known]) -> TypeProto:
    """The result of an operator in `_WITHOUT_INFERENCE`."""
    shape = np.broadcast_shapes(*(known.shape for known in operands[: _WITHOUT_INFERENCE[op]]))
    return helper.make_tensor_type_proto(TensorProto.BOOL if op.endswith("OrEqual") else operands[0].type, shape)


def _with_all_outputs(node: NodeProto) -> NodeProto:
    """The node with a name for every result, also for one that nobody reads, so that results keep their places."""
    if all(node.output):
        return node
    named = NodeProto()
    named.CopyFrom(node)
    named.output[:] = [
        name or f"{node.op_type}_{next(filter(None, node.output))}_{i}" for i, name in enumerate(node.output)
    ]
    return named


def _bare(node: NodeProto) -> NodeProto:
    """The node without name, documentation and metadata, which may hold much text."""
    bare = NodeProto(op_type=node.op_type, domain=domain_of(node.domain), input=node.input, output=node.output)
    bare.attribute.extend(node.attribute)
    return bare


def _computed(node: NodeProto, version: int, feeds: Mapping[str, Any], unknown: Sequence[Any]) -> Sequence[Any]:
    """The numbers that a node makes of numbers, by ONNX's own reference; `unknown` where that has no answer."""
    from onnx.reference import ReferenceEvaluator

    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    inputs = [helper.make_empty_tensor_value_info(name) for name in feeds]
    graph = helper.make_graph([_bare(node)], "constant", inputs, outputs)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            found = ReferenceEvaluator(graph, opsets={domain_of(node.domain): version}).run(None, dict(feeds))
    except Exception:  # an operator that the reference lacks, a division by zero: then a shape that needs it says so
        return unknown
    return [array if isinstance(array, np.ndarray) else np.asarray(array) for array in found]


@lru_cache(maxsize=4096)
def _schema(op: str, version: int, domain: str) -> Any:
    """The schema of an operator in the version that an opset has of it, None where it has none."""
    try:
        return defs.get_schema(op, version, domain)
    except defs.SchemaError:
        return None


@lru_cache(maxsize=256)
def _checker(domain: str, version: int, ir_version: int) -> Any:
    context = checker.C.CheckerContext()
    context.ir_version = ir_version
    context.opset_imports = {domain: version}
    return context


def _defaults(schema: Any) -> Iterator[tuple[str, Any]]:
    for name, attribute in schema.attributes.items():
        value = _plain(attribute.default_value)
        if value is not None:
            yield name, value


def _plain(attribute: Any) -> Any:
    """An attribute as numbers, text or tuples of them; None for tensors, graphs, types and what is unset."""
    kinds = onnx.AttributeProto
    if attribute.type in (kinds.FLOAT, kinds.INT):
        return helper.get_attribute_value(attribute)
    if attribute.type == kinds.STRING:
        return attribute.s.decode("utf-8", "replace")
    if attribute.type in (kinds.FLOATS, kinds.INTS):
        return tuple(helper.get_attribute_value(attribute))
    if attribute.type == kinds.STRINGS:
        return tuple(text.decode("utf-8", "replace") for text in attribute.strings)
    return None


def _named_operands(node: NodeProto, schema: Any) -> Iterator[tuple[str, str, bool]]:
    """Of each operand the argument's name, its own (empty where it is left out), and whether the argument is a list."""
    # By the names of the newest opset, so that rules need one: BatchNormalization's `mean` is `input_mean` since 14.
    newest = _schema(node.op_type, OPSETS.stop - 1, "") if schema and not schema.domain else schema
    formal = (newest or schema).inputs if schema else ()
    for index, name in enumerate(node.input):
        if not formal:
            yield f"input_{index}", name, False
            continue
        argument = formal[min(index, len(formal) - 1)]
        yield argument.name, name, argument.option == defs.OpSchema.FormalParameterOption.Variadic


def _type_name(kind: int) -> str:
    return _TYPE_NAMES.get(kind) or str(TensorProto.DataType.Name(kind)).lower()


def _shapes(operands: Iterable[_Known]) -> str:
    return ", ".join(str(list(known.shape)) for known in operands)


def domain_of(domain: str) -> str:
    """A domain by one name: ONNX's own has two."""
    return "" if domain == "ai.onnx" else domain


def bodies(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs within a node of control flow."""
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def first_line(error: Exception) -> str:
    """What a library says, in one line."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
