"""Fused operators of ONNX Runtime (`com.microsoft`), spelled out in operators of ONNX's own domain.

Optimisers write them where several standard operators stood. Each is turned back into those, so that rules exist for
one form alone. Those with forms that are not listed here (packed or cached keys, quantised weights) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from onnx import NodeProto, helper

#: The opset in which the parts are written.
SPELLED_OPSET = 23

#: Of each operand by name its element type, as ONNX numbers them, and its shape.
Arrays = Mapping[str, tuple[int, tuple[int, ...]]]


def spelled_out(node: NodeProto, arrays: Arrays) -> list[NodeProto]:
    """The nodes that a fused one stands for, empty where it is none or takes a form that is left out."""
    # SimplifiedLayerNormalization is written without a domain, too.
    if node.domain != "com.microsoft" and node.op_type != "SimplifiedLayerNormalization":
        return []
    spell = _SPELLINGS.get(node.op_type)
    return list(spell(_Fused(node, arrays))) if spell else []


class _Fused:
    """A fused node under way: its operands by place, its attributes, and names for what stands between its parts."""

    def __init__(self, node: NodeProto, arrays: Arrays) -> None:
        self.node, self.arrays = node, arrays
        self.attributes: dict[str, Any] = {item.name: helper.get_attribute_value(item) for item in node.attribute}

    def operand(self, place: int) -> str:
        return self.node.input[place] if place < len(self.node.input) else ""

    def output(self, place: int = 0) -> str:
        """The name of a result; where the node leaves it out, one that nobody reads."""
        given = self.node.output[place] if place < len(self.node.output) else ""
        return given or self.between(f"output{place}")

    def between(self, what: str) -> str:
        return f"{next(filter(None, self.node.output))}.{what}"

    def part(self, op: str, inputs: list[str], output: str | list[str], **attributes: Any) -> NodeProto:
        outputs = [output] if isinstance(output, str) else output
        return helper.make_node(op, inputs, outputs, name=f"{self.node.name or outputs[0]}.{op}", **attributes)

    def shape(self, place: int) -> tuple[int, ...]:
        return self.arrays[self.operand(place)][1] if self.operand(place) else ()

    def number(self, what: str, value: float) -> NodeProto:
        """A constant of the type of the first operand."""
        array = helper.make_tensor(what, self.arrays[self.operand(0)][0], [], [value])
        return helper.make_node("Constant", [], [self.between(what)], value=array)


def _gelu(fused: _Fused) -> Iterator[NodeProto]:
    x = fused.operand(0)
    if fused.operand(1):
        yield fused.part("Add", [x, fused.operand(1)], fused.between("biased"))
        x = fused.between("biased")
    approximate = "tanh" if fused.node.op_type == "FastGelu" else "none"
    yield fused.part("Gelu", [x], fused.output(), approximate=approximate)


def _quick_gelu(fused: _Fused) -> Iterator[NodeProto]:
    """x sigmoid(alpha x)."""
    x = fused.operand(0)
    yield fused.part("Sigmoid", [x], fused.between("gate"))
    yield fused.part("Mul", [x, fused.between("gate")], fused.output())


def _layer_norm(fused: _Fused) -> Iterator[NodeProto]:
    """Of (x, scale), or of (x, skip, scale, bias of the norm or none, bias of x): the last result is the sum."""
    op = fused.node.op_type
    norm = "RMSNormalization" if "Simplified" in op else "LayerNormalization"
    settings = {key: fused.attributes[key] for key in ("axis", "epsilon", "stash_type") if key in fused.attributes}
    if not op.startswith("Skip"):
        yield fused.part(norm, [fused.operand(0), fused.operand(1)], fused.output(), **settings)
        return
    bias = fused.operand(4 if norm == "LayerNormalization" else 3)
    total = fused.output(3)
    yield fused.part("Add", [fused.operand(0), fused.operand(1)], fused.between("skipped") if bias else total)
    if bias:
        yield fused.part("Add", [fused.between("skipped"), bias], total)
    operands = [total, fused.operand(2)]
    if norm == "LayerNormalization" and fused.operand(3):
        operands.append(fused.operand(3))
    yield fused.part(norm, operands, fused.output(), axis=-1, **settings)


def _matmul(fused: _Fused) -> Iterator[NodeProto]:
    operands = []
    for place, key in ((0, "transA"), (1, "transB")):
        name = fused.operand(place)
        rank = len(fused.shape(place))
        if fused.attributes.get(key) and rank > 1:
            order = [*range(rank - 2), rank - 1, rank - 2]
            yield fused.part("Transpose", [name], fused.between(key), perm=order)
            name = fused.between(key)
        operands.append(name)
    alpha = fused.attributes.get("alpha", 1.0)
    yield fused.part("MatMul", operands, fused.output() if alpha == 1.0 else fused.between("product"))
    if alpha != 1.0:
        yield fused.number("alpha", alpha)
        yield fused.part("Mul", [fused.between("product"), fused.between("alpha")], fused.output())


def _rotary(fused: _Fused) -> Iterator[NodeProto]:
    x, positions, cosines, sines = (fused.operand(place) for place in range(4))
    settings = {
        key: fused.attributes[key]
        for key in ("interleaved", "num_heads", "rotary_embedding_dim")
        if key in fused.attributes
    }
    yield fused.part("RotaryEmbedding", [x, cosines, sines, positions], fused.output(), **settings)


def _attention(fused: _Fused) -> Iterator[NodeProto]:
    """Attention of queries, keys and values apart, without a cache; another form is not spelled out."""
    grouped = fused.node.op_type == "GroupQueryAttention"
    query, key, value = (fused.operand(place) for place in range(3))
    refused = (3, 4, *range(7, 14)) if grouped else (3, 4, *range(6, 12))
    if any(len(fused.shape(place)) != 3 for place in range(3)) or any(fused.operand(place) for place in refused):
        return
    heads = fused.attributes["num_heads"]
    mask = [] if grouped else [fused.operand(5)]
    settings: dict[str, Any] = {
        "q_num_heads": heads,
        "kv_num_heads": fused.attributes["kv_num_heads"] if grouped else heads,
        "is_causal": 1 if grouped else fused.attributes.get("unidirectional", 0),
    }
    if fused.attributes.get("scale"):
        settings["scale"] = fused.attributes["scale"]
    yield fused.part("Attention", [query, key, value, *filter(None, mask)], fused.output(), **settings)


_SPELLINGS: dict[str, Callable[[_Fused], Iterator[NodeProto]]] = {
    "Gelu": _gelu,
    "BiasGelu": _gelu,
    "FastGelu": _gelu,
    "QuickGelu": _quick_gelu,
    "SimplifiedLayerNormalization": _layer_norm,
    "SkipLayerNormalization": _layer_norm,
    "SkipSimplifiedLayerNormalization": _layer_norm,
    "FusedMatMul": _matmul,
    "RotaryEmbedding": _rotary,
    "MultiHeadAttention": _attention,
    "GroupQueryAttention": _attention,
}
