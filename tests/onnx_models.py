"""Models in ONNX written by hand, their weights external and absent, as exporters write them in several opsets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


class Net:
    """A graph under construction: each call of `op` adds a node and gives the name of its result."""

    def __init__(self, opset: int = 20, *, axes_as_inputs: bool | None = None) -> None:
        self.opset = opset
        #: Reductions but ReduceSum take their axes as an input from opset 18 on.
        self.axes_as_inputs = opset >= 18 if axes_as_inputs is None else axes_as_inputs
        self.nodes: list[onnx.NodeProto] = []
        self.initialisers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.value_info: list[onnx.ValueInfoProto] = []
        self.functions: list[onnx.FunctionProto] = []
        self.domains: dict[str, int] = {"": opset}
        self.counter = itertools.count()

    def input(self, name: str, shape: Sequence[int | str | None], kind: int = FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str | None] | None = None, kind: int = FLOAT) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def parameter(self, name: str, *shape: int, kind: int = FLOAT) -> str:
        """A weight in a file that is not there."""
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="weights.data")
        self.initialisers.append(tensor)
        return name

    def ints(self, *values: int) -> str:
        """A one-dimensional constant."""
        name = f"ints{next(self.counter)}"
        self.initialisers.append(numpy_helper.from_array(np.array(values, dtype=np.int64), name))
        return name

    def scalar(self, value: float, kind: int = FLOAT) -> str:
        name = f"scalar{next(self.counter)}"
        self.initialisers.append(helper.make_tensor(name, kind, [], [value]))
        return name

    def op(self, op: str, *inputs: str, outputs: int | Sequence[str] = 1, domain: str = "", **attributes: Any) -> Any:
        name = f"{op}_{next(self.counter)}"
        made = [f"{name}.{i}" for i in range(outputs)] if isinstance(outputs, int) else list(outputs)
        node = helper.make_node(op, inputs, made, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return made[0] if len(made) == 1 else tuple(made)

    def reduce(self, op: str, x: str, *axes: int) -> str:
        if self.axes_as_inputs or op == "ReduceSum":
            return self.op(op, x, self.ints(*axes))
        return self.op(op, x, axes=list(axes))

    def reshape(self, x: str, *shape: int) -> str:
        return self.op("Reshape", x, self.ints(*shape))

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "net", self.inputs, self.outputs, self.initialisers, value_info=self.value_info
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.domains.items()]
        return helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=10)

    def filled(self) -> onnx.ModelProto:
        """The model with random weights in it and every value an output, so that it can be run."""
        model = self.model()
        generator = np.random.default_rng(0)
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                weights = generator.uniform(0.1, 1.0, tuple(tensor.dims)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))
        del model.graph.output[:]
        for node in model.graph.node:
            model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in node.output if name)
        return model

    def save(self, folder: Path, name: str = "net.onnx") -> Path:
        path = folder / name
        path.write_bytes(self.model().SerializeToString())
        return path


def mlp(opset: int = 13, batch: int | str | None = "batch") -> Net:
    """Linear 64 -> 256, ReLU, linear 256 -> 10; the first as Gemm with the weight as PyTorch has it."""
    net = Net(opset)
    x = net.input("x", [batch, 64])
    h = net.op("Gemm", x, net.parameter("up.weight", 256, 64), net.parameter("up.bias", 256), transB=1)
    h = net.op("Relu", h)
    y = net.op("Add", net.op("MatMul", h, net.parameter("down.weight_t", 256, 10)), net.parameter("down.bias", 10))
    net.output(y, [batch, 10])
    return net


def attention(opset: int = 17, batch: int | str | None = "batch", seq: int | str = 16) -> Net:
    """One causal attention with rotary positions and 4 heads on 2 of keys, as exporters spell it out; hidden 64.

    Shapes come from `Shape`, as an exporter with dynamic dims writes them, the mask from positions.
    """
    net = Net(opset)
    x = net.input("x", [batch, seq, 64])
    shape = net.op("Shape", x)
    b, s = (net.op("Slice", shape, net.ints(i), net.ints(i + 1)) for i in range(2))
    heads = {}
    for name, count in (("q", 4), ("k", 2), ("v", 2)):
        y = net.op("MatMul", x, net.parameter(f"{name}.weight_t", 64, 16 * count))
        y = net.op("Reshape", y, net.op("Concat", b, s, net.ints(count), net.ints(16), axis=0))
        heads[name] = net.op("Transpose", y, perm=[0, 2, 1, 3])
    length = net.op("Squeeze", s)
    positions = net.op("Range", net.scalar(0, INT64), length, net.scalar(1, INT64))
    angles = net.op("Cast", net.op("Unsqueeze", positions, net.ints(1)), to=FLOAT)
    angles = net.op("Mul", angles, net.op("Constant", value=helper.make_tensor("f", FLOAT, [16], [0.5] * 16)))
    cosines, sines = net.op("Cos", angles), net.op("Sin", angles)
    for name in ("q", "k"):
        first = net.op("Slice", heads[name], net.ints(0), net.ints(8), net.ints(-1))
        second = net.op("Slice", heads[name], net.ints(8), net.ints(2**63 - 1), net.ints(-1))
        turned = net.op("Concat", net.op("Neg", second), first, axis=-1)
        heads[name] = net.op("Add", net.op("Mul", heads[name], cosines), net.op("Mul", turned, sines))
    for name in ("k", "v"):
        y = net.op("Unsqueeze", heads[name], net.ints(2))
        y = net.op("Expand", y, net.op("Concat", b, net.ints(2), net.ints(2), s, net.ints(16), axis=0))
        heads[name] = net.op("Reshape", y, net.op("Concat", b, net.ints(4), s, net.ints(16), axis=0))
    scores = net.op("MatMul", heads["q"], net.op("Transpose", heads["k"], perm=[0, 1, 3, 2]))
    scores = net.op("Div", scores, net.scalar(4.0))
    later = net.op("Less", net.op("Unsqueeze", positions, net.ints(1)), net.op("Unsqueeze", positions, net.ints(0)))
    scores = net.op("Where", later, net.scalar(-1e9), scores)
    mixed = net.op("MatMul", net.op("Softmax", scores, axis=-1), heads["v"])
    mixed = net.op("Transpose", mixed, perm=[0, 2, 1, 3])
    mixed = net.op("Reshape", mixed, net.op("Concat", b, s, net.ints(-1), axis=0))
    y = net.op("Add", x, net.op("MatMul", mixed, net.parameter("o.weight_t", 64, 64)))
    net.output(y, [batch, seq, 64])
    return net


def cnn(opset: int = 13, batch: int | str | None = "N") -> Net:
    """Convolution 3 -> 16, BatchNorm, ReLU, pooling by 2, a convolution in 4 groups, mean over space, linear."""
    net = Net(opset)
    x = net.input("image", [batch, 3, 32, 32])
    y = net.op("Conv", x, net.parameter("c1.w", 16, 3, 3, 3), net.parameter("c1.b", 16), pads=[1, 1, 1, 1])
    y = net.op("BatchNormalization", y, *(net.parameter(f"bn.{name}", 16) for name in ("scale", "bias", "mean", "var")))
    y = net.op("MaxPool", net.op("Relu", y), kernel_shape=[2, 2], strides=[2, 2])
    y = net.op("Conv", y, net.parameter("c2.w", 32, 4, 3, 3), group=4, strides=[2, 2], pads=[1, 1, 1, 1])
    y = net.reduce("ReduceMean", y, 2, 3)
    y = net.op("Squeeze", y, net.ints(2, 3))
    y = net.op("Gemm", y, net.parameter("fc.w", 10, 32), net.parameter("fc.b", 10), transB=1)
    net.output(y, [batch, 10])
    return net


def lstm(opset: int = 14, batch: int | str | None = "batch") -> Net:
    """An embedding of 100 tokens, an LSTM of 32 over 12 of them (time first, as exporters write it), and a head."""
    net = Net(opset)
    tokens = net.input("tokens", [batch, 12], INT64)
    x = net.op("Transpose", net.op("Gather", net.parameter("embed", 100, 24), tokens), perm=[1, 0, 2])
    w, r, b = net.parameter("W", 1, 128, 24), net.parameter("R", 1, 128, 32), net.parameter("B", 1, 256)
    y, _, _ = net.op("LSTM", x, w, r, b, outputs=3, hidden_size=32)
    y = net.op("Transpose", net.op("Squeeze", y, net.ints(1)), perm=[1, 0, 2])
    y = net.op("MatMul", y, net.parameter("head_t", 32, 100))
    net.output(y, [batch, 12, 100])
    return net
