"""Dim rules of ONNX's operators, proven by ONNX's reference implementation: cut along any label that a rule allows, the
pieces computed apart and put together are the whole; a linear operator makes summands of summands."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from meshwright.graph import Role
from meshwright.io.onnx import read_onnx
from meshwright.io.rules import Pattern, Seen, rule_of
from meshwright.io.rules.pattern import Array, labels_of


@dataclass(frozen=True)
class Case:
    """A node: its operands (a shape: an activation; `p` and a shape: a parameter; an array: that), settings that are
    constant inputs by place, attributes; how many labels may be split."""

    op: str
    operands: tuple[Any, ...]
    splits: int
    settings: Mapping[int, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 23

    @property
    def dtype(self) -> type:
        """Of what is made up: float64, where the operator takes it."""
        return np.float32 if self.op == "RotaryEmbedding" else np.float64

    def __str__(self) -> str:
        return f"{self.op} {self.operands} {dict(self.attributes)}".replace(" ", "")[:90]


def p(*shape: int) -> tuple[str, tuple[int, ...]]:
    return ("p", shape)


INDICES = np.array([[0, 3, 2], [1, 1, 5], [4, 0, 2], [5, 3, 3]], dtype=np.int64)

CASES = [
    Case("Relu", ((4, 6),), 2),
    Case("Add", ((4, 6, 5), (6, 1)), 3),
    Case("Mul", ((4, 6, 5), p(5)), 3),
    Case("Div", ((4, 6), p(6)), 2),
    Case("Sub", ((4, 6), (4, 6)), 2),
    Case("Cast", ((4, 6),), 2, attributes={"to": TensorProto.DOUBLE}),
    Case("Where", (np.tri(6, 5, dtype=bool), (4, 6, 5), (6, 5)), 3),
    Case("Sum", ((4, 6), (6,), (4, 1)), 2),
    Case("Softmax", ((4, 6, 5),), 2, attributes={"axis": -1}),
    Case("LogSoftmax", ((4, 6, 5),), 2, attributes={"axis": 1}),
    Case("CumSum", ((4, 6),), 1, settings={1: np.array(1)}),
    Case("Trilu", ((4, 6, 5),), 1),
    Case("MatMul", ((4, 6, 5), p(5, 7)), 4),
    Case("MatMul", ((4, 1, 6, 5), (3, 5, 7)), 5),
    Case("MatMul", ((5,), (4, 5, 7)), 3),
    Case("MatMul", ((4, 6, 5), p(5)), 3),
    Case("Gemm", ((4, 6), p(5, 6)), 3, attributes={"transB": 1}),
    Case("Gemm", ((6, 4), p(6, 5), p(5)), 3, attributes={"transA": 1, "alpha": 0.5}),
    Case("Einsum", ((4, 6, 5), p(3, 5, 7)), 5, attributes={"equation": "bsd,edf->bsef"}),
    Case("Einsum", ((4, 6, 3, 7), p(3, 7, 5), (4, 6, 3)), 5, attributes={"equation": "bsef,efd,bse->bsd"}),
    Case("Einsum", ((4, 6, 5), p(5, 7)), 4, attributes={"equation": "...i,ij->...j"}),
    Case("Einsum", ((4, 6), (6, 5)), 3, attributes={"equation": "ij,jk"}),
    Case("Conv", ((4, 3, 8, 8), p(6, 3, 3, 3)), 5, attributes={"pads": [1, 1, 1, 1]}),
    Case("Conv", ((4, 3, 8), p(6, 3, 1), p(6)), 4),
    Case("Conv", ((4, 6, 8, 8), p(4, 3, 2, 2)), 6, attributes={"strides": [2, 2], "group": 2}),
    Case("Conv", ((4, 3, 9, 8), p(6, 3, 3, 3)), 4, attributes={"auto_pad": "SAME_UPPER", "strides": [2, 1]}),
    Case("Conv", ((4, 4, 12), p(4, 1, 3)), 3, attributes={"group": 4, "dilations": [2], "pads": [2, 2]}),
    Case("ConvTranspose", ((4, 3, 5, 6), p(3, 6, 2, 2)), 5, attributes={"strides": [2, 2]}),
    Case("ConvTranspose", ((4, 4, 5, 6), p(4, 3, 3, 3)), 3, attributes={"pads": [1, 1, 1, 1]}),
    Case("MaxPool", ((4, 3, 8, 8),), 4, attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("AveragePool", ((4, 3, 8, 9),), 3, attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Case("GlobalAveragePool", ((4, 3, 8, 6),), 4),
    Case("GlobalMaxPool", ((4, 3, 8, 6),), 2),
    Case("Resize", ((4, 3, 5, 6),), 4, settings={2: np.array([1, 1, 2, 2], np.float32)}),
    Case("Resize", ((4, 3, 5, 6),), 2, {2: np.array([1, 1, 2, 2], np.float32)}, {"mode": "linear"}),
    Case("BatchNormalization", ((4, 3, 8), p(3), p(3), p(3), p(3)), 3),
    Case("InstanceNormalization", ((4, 3, 8), p(3), p(3)), 2),
    Case("GroupNormalization", ((4, 6, 8), p(6), p(6)), 2, attributes={"num_groups": 3}),
    Case("GroupNormalization", ((4, 6, 8), p(3), p(3)), 2, attributes={"num_groups": 3}, opset=20),
    Case("LayerNormalization", ((4, 6, 8), p(8), p(8)), 2),
    Case("LayerNormalization", ((4, 6, 8), p(6, 8)), 1, attributes={"axis": 1}, outputs=3),
    Case("RMSNormalization", ((4, 6, 8), p(8)), 2),
    Case("LpNormalization", ((4, 6),), 1),
    Case("ReduceSum", ((4, 6, 5),), 3, settings={1: np.array([1])}),
    Case("ReduceMean", ((4, 6, 5),), 3, settings={1: np.array([0, 2])}, attributes={"keepdims": 0}),
    Case("ReduceMean", ((4, 6, 5),), 3, attributes={"axes": [1]}, opset=13),
    Case("ReduceMax", ((4, 6, 5),), 2, settings={1: np.array([-1])}),
    Case("ReduceL2", ((4, 6, 5),), 0),
    Case("ArgMax", ((4, 6, 5),), 2, attributes={"axis": 1, "keepdims": 0}),
    Case("Reshape", ((4, 6, 8),), 4, settings={1: np.array([4, 6, 2, 4])}),
    Case("Reshape", ((4, 6, 8),), 3, settings={1: np.array([24, 8])}),
    Case("Reshape", ((6, 4),), 0, settings={1: np.array([4, 6])}),
    Case("Flatten", ((4, 3, 5),), 3),
    Case("Squeeze", ((4, 1, 5),), 2, settings={1: np.array([1])}),
    Case("Unsqueeze", ((4, 5),), 2, settings={1: np.array([1, -1])}),
    Case("Transpose", ((4, 6, 5),), 3, attributes={"perm": [2, 0, 1]}),
    Case("Transpose", ((4, 6, 5),), 3),
    Case("Expand", ((4, 1, 5),), 4, settings={1: np.array([3, 4, 6, 5])}),
    Case("Tile", ((4, 5),), 3, settings={1: np.array([1, 3])}),
    Case("Slice", ((4, 8),), 2, settings={1: np.array([4]), 2: np.array([8]), 3: np.array([1])}),
    Case("Slice", ((4, 8),), 1, settings={1: np.array([2]), 2: np.array([6]), 3: np.array([1])}),
    Case("Slice", ((4, 8),), 2, settings={1: [1], 2: [8], 3: [1], 4: [2]}),
    Case("Slice", ((4, 8),), 1, settings={1: [-1], 2: [-9], 3: [-1], 4: [-1]}),
    Case("Slice", ((4, 8),), 2, settings={1: [-4], 2: [2**40], 3: [1]}),
    Case("Split", ((4, 8),), 2, settings={1: np.array([4, 4])}, attributes={"axis": 1}, outputs=2),
    Case("Split", ((4, 8),), 1, settings={1: np.array([3, 5])}, attributes={"axis": 1}, outputs=2),
    Case("Concat", ((4, 3), (4, 3)), 2, attributes={"axis": 1}),
    Case("Concat", ((4, 3), (4, 5)), 1, attributes={"axis": -1}),
    Case("Pad", ((4, 3, 5),), 2, settings={1: np.array([0, 0, 1, 0, 0, 2])}),
    Case("DepthToSpace", ((4, 8, 3, 5),), 4, attributes={"blocksize": 2}),
    Case("DepthToSpace", ((4, 8, 3, 5),), 4, attributes={"blocksize": 2, "mode": "CRD"}),
    Case("SpaceToDepth", ((4, 2, 6, 10),), 4, attributes={"blocksize": 2}),
    Case("Gather", (p(6, 5), INDICES), 4),
    Case("Gather", ((4, 6, 5), INDICES), 4, attributes={"axis": 1}),
    Case("Gather", ((4, 6, 5),), 2, settings={1: np.array(2)}, attributes={"axis": 1}),
    Case("GatherElements", ((4, 6), INDICES), 1, attributes={"axis": 1}),
    Case("GatherND", ((6, 6, 6, 5), INDICES), 2),
    Case("GatherND", ((4, 6, 6, 6, 5), INDICES), 2, attributes={"batch_dims": 1}),
    Case("ScatterElements", ((4, 6), INDICES[:, :2], (4, 2)), 1, attributes={"axis": 1}),
    Case("ScatterND", ((6, 6, 6, 5), INDICES, (4, 5)), 1),
    Case("TopK", ((4, 6, 5),), 2, settings={1: np.array([3])}, attributes={"axis": 1}, outputs=2),
    Case("LSTM", ((5, 4, 3), p(1, 24, 3), p(1, 24, 6), p(1, 48)), 1, attributes={"hidden_size": 6}, outputs=3),
    Case("GRU", ((5, 4, 3), p(1, 18, 3), p(1, 18, 6)), 1, attributes={"hidden_size": 6}, outputs=2),
    Case("Attention", ((4, 6, 5, 8), (4, 3, 7, 8), (4, 3, 7, 8)), 5),
    Case("Attention", ((4, 6, 5, 8), (4, 3, 5, 8), (4, 3, 5, 8)), 4, attributes={"is_causal": 1}),
    Case("Attention", ((4, 5, 48), (4, 7, 24), (4, 7, 24)), 5, {}, {"q_num_heads": 6, "kv_num_heads": 3}),
    Case("Attention", ((4, 3, 5, 8), (4, 3, 7, 8), (4, 3, 7, 8), (5, 7)), 4),
    Case("RotaryEmbedding", ((4, 3, 5, 8), p(4, 5, 4), p(4, 5, 4)), 4),
    Case("RotaryEmbedding", ((4, 5, 24), p(4, 5, 4), p(4, 5, 4)), 4, {}, {"num_heads": 3, "interleaved": 1}),
    Case("RotaryEmbedding", ((4, 3, 5, 8), p(9, 4), p(9, 4), np.tile(np.arange(5), (4, 1))), 4),
    Case("RotaryEmbedding", ((4, 3, 5, 8), p(4, 5, 2), p(4, 5, 2)), 3, {}, {"rotary_embedding_dim": 4}),
    Case("SoftmaxCrossEntropyLoss", ((4, 6, 3), INDICES), 2),
    Case("SoftmaxCrossEntropyLoss", ((4, 6), INDICES[:, 1]), 1, attributes={"reduction": "sum"}),
]


class Bench:
    """A case as a program with one call, its pattern, and its arrays."""

    def __init__(self, case: Case, tmp_path) -> None:
        self.case = case
        generator = np.random.default_rng(0)
        self.arrays, self.fixed = [], []
        for operand in case.operands:
            fixed = isinstance(operand, np.ndarray) or operand[0] == "p"
            shape = operand[1] if fixed and not isinstance(operand, np.ndarray) else operand
            array = operand if isinstance(operand, np.ndarray) else generator.uniform(0.2, 1, shape).astype(case.dtype)
            self.arrays.append(array)
            self.fixed.append(fixed)
        path = tmp_path / "case.onnx"
        path.write_bytes(self.model(self.arrays, case.settings, case.attributes).SerializeToString())
        program = read_onnx(path).program
        assert len(program.calls) == 1
        self.call, self.values = program.calls[0], program.values
        roles = {name: value.role for name, value in program.values.items()}
        for index, fixed in enumerate(self.fixed):
            if roles[f"x{index}"] is Role.INPUT:
                roles[f"x{index}"] = Role.BUFFER if fixed else Role.ACTIVATION
        self.seen = Seen(self.call, program.values, roles)
        rule = rule_of(self.call.op)
        assert rule is not None
        self.pattern: Pattern = rule(self.seen)
        self.sizes = sizes_of(self.pattern, (*self.seen.shapes, *self.seen.result_shapes))

    def model(self, arrays: list[np.ndarray], settings: Mapping[int, Any], attributes: Mapping[str, Any]) -> Any:
        """The node as a model; parameters are initialisers."""
        places: dict[int, str] = {place: f"s{place}" for place in settings}
        free = iter(place for place in range(99) if place not in places)
        for index in range(len(arrays)):
            places[next(free)] = f"x{index}"
        names = [places.get(place, "") for place in range(max(places) + 1)]
        constants = [
            numpy_helper.from_array(value if isinstance(value, np.ndarray) else np.array(value, np.int64), f"s{place}")
            for place, value in settings.items()
        ]
        inputs = []
        for index, (array, operand) in enumerate(zip(arrays, self.case.operands, strict=True)):
            if not isinstance(operand, np.ndarray) and operand[0] == "p":
                constants.append(numpy_helper.from_array(array, f"x{index}"))
            else:
                kind = helper.np_dtype_to_tensor_dtype(array.dtype)
                inputs.append(helper.make_tensor_value_info(f"x{index}", kind, array.shape))
        outputs = [f"y{index}" for index in range(self.case.outputs)]
        node = helper.make_node(self.case.op, names, outputs, **attributes)
        made = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph([node], "case", inputs, made, constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.case.opset)], ir_version=10)

    def run(self, arrays: list[np.ndarray], settings: Any = None, attributes: Any = None) -> list[np.ndarray]:
        case = self.case
        model = self.model(
            arrays,
            case.settings if settings is None else settings,
            case.attributes if attributes is None else attributes,
        )
        feeds = {item.name: arrays[int(item.name[1:])] for item in model.graph.input}
        return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, feeds)]


def sizes_of(pattern: Pattern, shapes: tuple[tuple[int, ...], ...]) -> dict[str, int]:
    """The size of every label; each dim of each array is the product of its labels."""
    sizes = dict(pattern.sizes)
    arrays = (*pattern.operands, *pattern.results)
    for shape, array in zip(shapes, arrays, strict=True):
        assert len(set(labels_of(array))) == len(labels_of(array))
        for size, labels in zip(shape, array, strict=True):
            if len(labels) == 1:
                sizes.setdefault(labels[0], size)
    for shape, array in zip(shapes, arrays, strict=True):
        assert shape == tuple(math.prod(sizes[label] for label in labels) for labels in array)
    assert pattern.unsplit <= sizes.keys()
    return sizes


def cut(array: np.ndarray, labels: Array, sizes: Mapping[str, int], label: str, piece: slice) -> np.ndarray:
    """The piece of an array along a label; whole where it lacks the label."""
    flat = labels_of(labels)
    if label not in flat:
        return array
    apart = array.reshape([sizes[item] for item in flat])
    part = apart[tuple(piece if item == label else slice(None) for item in flat)]
    local = {**sizes, label: part.shape[flat.index(label)]}
    return part.reshape([math.prod(local[item] for item in items) for items in labels])


def put(whole: np.ndarray, part: np.ndarray, labels: Array, sizes: Mapping[str, int], label: str, piece: slice) -> None:
    flat = labels_of(labels)
    local = [piece.stop - piece.start if item == label else sizes[item] for item in flat]
    view = whole.reshape([sizes[item] for item in flat])
    view[tuple(piece if item == label else slice(None) for item in flat)] = part.reshape(local)


def piece_of(bench: Bench, label: str, piece: slice) -> list[np.ndarray]:
    """The results of a piece: what each operand has of it, halo included, with settings for the smaller shapes."""
    case, pattern, sizes = bench.case, bench.pattern, bench.sizes
    named = list(zip(bench.call.inputs, pattern.operands, strict=True))
    arrays = [cut(array, labels, sizes, label, piece) for array, (_, labels) in zip(bench.arrays, named, strict=True)]
    local = {**sizes, label: piece.stop - piece.start}
    shapes = [tuple(math.prod(local[item] for item in items) for items in labels) for labels in pattern.results]
    settings, attributes = dict(case.settings), dict(case.attributes)
    if case.op in ("Reshape", "Expand"):
        settings[1] = np.array(shapes[0])
    elif case.op == "Tile":
        settings[1] = np.array(shapes[0]) // np.array(arrays[0].shape)
    elif case.op == "Split":
        settings[1] = np.array([shape[attributes["axis"]] for shape in shapes])
    elif case.op == "Slice":
        axis, length = settings[3][0], bench.seen.result_shapes[0][settings[3][0]]
        if 4 not in settings and label.startswith("rest"):
            start = settings[1][0] % bench.arrays[0].shape[axis] // length * shapes[0][axis]
            settings[1], settings[2] = [start], [start + shapes[0][axis]]
    elif case.op in ("Attention", "RotaryEmbedding"):
        for key, heads in (("q_num_heads", ("kv", "group")), ("kv_num_heads", ("kv",)), ("num_heads", ("h",))):
            if key in attributes:
                attributes[key] = math.prod(local[item] for item in heads)
    elif case.op == "GroupNormalization":
        attributes["num_groups"] = local["group"]
    elif case.op in ("Conv", "ConvTranspose"):
        attributes["group"] = local.get("group", 1)
    elif case.op == "Gather" and label in labels_of(pattern.operands[0][: 1 + attributes.get("axis", 0)][-1:]):
        # Rows that are elsewhere are looked up as zeros.
        axis = attributes.get("axis", 0)
        zero = np.zeros_like(arrays[0].take([0], axis))
        arrays[0] = np.concatenate([arrays[0], zero], axis)
        here = (arrays[1] >= piece.start) & (arrays[1] < piece.stop)
        arrays[1] = np.where(here, arrays[1] - piece.start, piece.stop - piece.start)
    if case.op in ("Gemm", "Conv") and label not in labels_of(pattern.results[0]) and piece.start:
        arrays[2:] = [np.zeros_like(array) for array in arrays[2:]]  # a bias is added once
    if label in pattern.halo or (case.op in ("Conv", "MaxPool", "AveragePool") and label.startswith("y")):
        _with_halo(bench, arrays, attributes, label, piece)
    results = bench.run(arrays, settings, attributes)
    if case.op in ("ReduceMean", "GlobalAveragePool") and label not in labels_of(pattern.results[0]):
        results[0] = results[0] * (local[label] / sizes[label])
    if case.op.endswith("Loss") and attributes.get("reduction", "mean") == "mean":
        results[0] = results[0] * (local[label] / sizes[label])
    return results


def _with_halo(bench: Bench, arrays: list[np.ndarray], attributes: dict[str, Any], label: str, piece: slice) -> None:
    """The first operand's piece with its halo; where it reaches beyond the ends there is what padding puts there."""
    labels = bench.pattern.operands[0]
    dim = next(index for index, items in enumerate(labels) if label in items)
    before, after = bench.pattern.halo.get(label, (0, 0))
    whole = bench.arrays[0]
    stride = whole.shape[dim] // bench.sizes[label]
    edges = [(0, 0)] * whole.ndim
    edges[dim] = (before, after)
    padded = np.pad(whole, edges, constant_values=-np.inf if bench.case.op == "MaxPool" else 0)
    start, stop = stride * piece.start, stride * piece.stop + before + after
    arrays[0] = padded[tuple(slice(start, stop) if index == dim else slice(None) for index in range(whole.ndim))]
    spatial = whole.ndim - 2
    pads = list(attributes.get("pads", [0] * 2 * spatial))
    if attributes.pop("auto_pad", ""):
        pads = _same_pads(bench)
    pads[dim - 2] = pads[dim - 2 + spatial] = 0
    attributes["pads"] = pads


def _same_pads(bench: Bench) -> list[int]:
    attributes = bench.case.attributes
    kernel = bench.case.operands[1][1][2:]
    totals = [
        max(0, (out - 1) * stride + size - full)
        for out, stride, size, full in zip(
            bench.seen.result_shapes[0][2:], attributes["strides"], kernel, bench.arrays[0].shape[2:], strict=True
        )
    ]
    return [*(total // 2 for total in totals), *(total - total // 2 for total in totals)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pieces_are_the_whole(tmp_path, case):
    bench = Bench(case, tmp_path)
    whole = bench.run(bench.arrays)
    pattern, sizes = bench.pattern, bench.sizes
    present = {label for array in (*pattern.operands, *pattern.results) for label in labels_of(array)}
    allowed = sorted(present - pattern.unsplit)
    assert len(allowed) == case.splits, (allowed, sorted(pattern.unsplit))
    for label in allowed:
        for count in {2, 3, sizes[label]} - {count for count in (2, 3) if count > sizes[label]}:
            bounds = [sizes[label] * index // count for index in range(count + 1)]  # uneven where it does not divide
            results = [np.zeros_like(array) for array in whole]
            for start, stop in itertools.pairwise(bounds):
                parts = piece_of(bench, label, slice(start, stop))
                for result, part, labels in zip(results, parts, pattern.results, strict=True):
                    if label in labels_of(labels):
                        put(result, part, labels, sizes, label, slice(start, stop))
                    else:
                        result += part
            for result, array in zip(results, whole, strict=True):
                np.testing.assert_allclose(result, array, rtol=1e-5, atol=1e-6, err_msg=f"{label} in {count}")


def test_linear_ones_make_summands_of_summands(tmp_path):
    linear = []
    for case in CASES:
        bench = Bench(case, tmp_path)
        if bench.pattern.linear:
            linear.append(case.op)
            check_linear(bench, str(case))
    expected = """Add AveragePool Cast Concat Conv ConvTranspose CumSum DepthToSpace Div Einsum Expand Flatten Gather
        Gemm
        GlobalAveragePool MatMul Mul Pad ReduceMean ReduceSum Reshape Resize RotaryEmbedding Slice SpaceToDepth Split
        Squeeze Sub Sum Tile Transpose Trilu Unsqueeze Where"""
    assert sorted(set(linear)) == expected.split()


def check_linear(bench: Bench, what: str) -> None:
    whole = bench.run(bench.arrays)
    generator = np.random.default_rng(3)
    parts = [[array, array] for array in bench.arrays]
    for index, (array, fixed) in enumerate(zip(bench.arrays, bench.fixed, strict=True)):
        if not fixed:
            first = generator.normal(size=array.shape).astype(array.dtype)
            parts[index] = [first, array - first]
    sums = [a + b for a, b in zip(*(bench.run([pair[side] for pair in parts]) for side in range(2)), strict=True)]
    for total, array in zip(sums, whole, strict=True):
        np.testing.assert_allclose(total, array, rtol=1e-5, atol=1e-6, err_msg=what)
