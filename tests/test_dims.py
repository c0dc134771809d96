"""Named dims of traced programs: which dims are one, which only have the same size, and what operators follow."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from meshwright.graph import Block, Operator, Role, graph_problems
from meshwright.io.dims import traced
from meshwright.io.torch_graph import module_program, traced_module
from meshwright.io.traced import Call, Program, Traced, Value

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "models"))
import architectures

pytestmark = pytest.mark.filterwarnings("ignore")


class Of(nn.Module):
    """A function of tensors and weights as a module."""

    def __init__(self, function: Any, *weights: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.rand(shape)) for shape in weights)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(*inputs, *self.weights)


def of(function: Any, inputs: tuple[torch.Tensor, ...], *weights: tuple[int, ...]) -> Traced:
    return traced_module(Of(function, *weights), inputs)


def operators(block: Block) -> dict[str, Operator]:
    return {operator.name.rpartition(".")[2]: operator for operator in block.operators}


def block_70b() -> Traced:
    with torch.device("meta"):
        return traced_module(*architectures.llama70b_block())


def test_a_layer_of_llama_70b() -> None:
    """Eight heads of keys, a group of eight queries each, rotary halves; 8192 tokens are not 8192 numbers."""
    found = block_70b()
    graph = found.graph
    assert graph.dims == {
        "tokens": 8192,
        "hidden": 8192,
        "kv_heads": 8,
        "group": 8,
        "halves": 2,
        "half_dim": 64,
        "head_dim": 128,
        "d28672": 28672,
    }
    (block,) = graph.blocks
    by_name = {operator.name: operator for operator in block.operators}
    query = by_name["layers.0.attention.q.linear"]
    assert query.spec == (
        "batch tokens hidden, kv_heads group halves half_dim hidden -> batch tokens kv_heads group halves half_dim"
    )
    assert block.tensor["layers.0.attention.q.weight"].groups == (4, 1)
    attention = by_name["layers.0.attention.attention"]
    assert attention.spec.startswith(
        "batch kv_heads group tokens halves half_dim, batch kv_heads tokens' halves half_dim, "
        "batch tokens' kv_heads head_dim -> batch kv_heads group tokens head_dim"
    )
    # Causal: which keys a query sees depends on its place. The dim of the values may be cut.
    assert set(attention.unsplit) == {"tokens", "tokens'", "halves", "half_dim"}
    assert attention.attributes == {"causal": True}
    assert attention.contractions == (
        "batch kv_heads group tokens tokens' halves half_dim",
        "batch kv_heads group tokens tokens' head_dim",
    )
    assert block.dim_aliases(attention)["tokens'"] == "tokens"
    # Keys and values are read beneath their expansion to all heads.
    reading = found.readings["layers.0.attention.reshape_1.out"]
    assert reading.base == "layers.0.attention.v.linear.out"
    assert -1 in reading.positions
    assert block.tensor["cos"].role is Role.BUFFER
    assert graph_problems(graph) == []


def test_a_stride_inside_a_rotary_half_is_a_factor_not_to_be_cut() -> None:
    halves = operators(block_70b().graph.blocks[0])["cat"]
    assert halves.unsplit == ("halves",)
    assert halves.linear


def test_linear_operators_have_no_constant_terms() -> None:
    def function(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = functional.linear(x, w)
        return functional.linear((y + y) * 2 + b, w, b)

    block = of(function, (torch.zeros(4, 6),), (6, 6), (6,)).graph.blocks[0]
    linear = {operator.name: operator.linear for operator in block.operators}
    # x is an input, no activation: whoever cuts it can do so by its dims only.
    assert linear == {"linear": False, "add": True, "mul": True, "add_1": False, "linear_1": False}


def test_two_dims_of_one_class_in_one_tensor() -> None:
    found = of(lambda x: functional.softmax(x @ x.transpose(1, 2), -1) @ x, (torch.zeros(4, 6, 8),))
    block = found.graph.blocks[0]
    by_name = operators(block)
    assert by_name["matmul"].spec == "batch tokens hidden, batch tokens' hidden -> batch tokens tokens'"
    assert by_name["softmax"].unsplit == ("tokens'",)
    assert by_name["matmul_1"].spec == "batch tokens tokens', batch tokens' hidden -> batch tokens hidden"
    assert found.graph.forward_flops(4, 1) == 2 * 2 * 4 * 6 * 6 * 8


def test_a_transposed_sum_reads_one_tensor_in_two_ways() -> None:
    block = of(lambda x, w: (y := x @ w) + y.t(), (torch.zeros(6, 4),), (4, 6)).graph.blocks[0]
    assert operators(block)["add"].spec == "batch batch', batch' batch -> batch batch'"


def test_the_batch_may_stand_twice() -> None:
    graph = of(lambda x, w: (x @ w) @ (x @ w).t(), (torch.zeros(4, 6),), (6, 8)).graph
    assert graph_problems(graph) == []
    assert "batch'" not in graph.dims
    assert graph.forward_flops(10, 1) == 2 * (2 * 10 * 6 * 8) + 2 * 10 * 10 * 8


def test_equal_slices_are_a_factor_and_unequal_ones_are_their_own() -> None:
    equal = of(lambda x, w: (x @ w).chunk(3, -1)[1].relu(), (torch.zeros(4, 6),), (6, 12)).graph.blocks[0]
    assert operators(equal)["matmul"].spec == "batch d6, d6 d3 d4 -> batch d3 d4"
    assert operators(equal)["chunk"].unsplit == ("d3",)
    unequal = of(lambda x, w: (x @ w).split([4, 8], -1)[1].relu(), (torch.zeros(4, 6),), (6, 12)).graph.blocks[0]
    split = operators(unequal)["split_with_sizes"]
    assert set(split.unsplit) == set(split.dims) - {"batch"}
    assert operators(unequal)["relu"].spec == "batch d8 -> batch d8"


def test_a_reshape_without_common_factors_is_an_operator_that_stays_whole() -> None:
    block = of(lambda x, w: (x @ w).view(-1, 6, 4).view(-1, 4, 6).relu(), (torch.zeros(5, 3),), (3, 24)).graph.blocks[0]
    view = operators(block)["view_1"]
    assert view.spec == "batch d6 d4 -> batch d4_2 d6_2"
    assert set(view.unsplit) == {"d6", "d4", "d4_2", "d6_2"}


def test_factorisations_that_do_not_fit_are_not_cut_and_said() -> None:
    """12 as 2 x 6 (outer 2) and as 3 x 4: one of the two sums keeps its dims whole."""

    def function(x: torch.Tensor, w: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        y = x @ w
        return (y.view(-1, 2, 6) + u).view(-1, 12) + (y.view(-1, 3, 4) + v).view(-1, 12)

    found = of(function, (torch.zeros(5, 7),), (7, 12), (2, 6), (3, 4))
    assert graph_problems(found.graph) == []
    assert len(found.warnings) == 2  # the second view, and the sum of the two
    assert all(
        "sees a dim in factors that do not fit: not split there (0.0% of the FLOPs)" in text for text in found.warnings
    )
    assert found.graph.forward_flops(5, 1) == 2 * 5 * 7 * 12
    (block,) = found.graph.blocks
    for operator in block.operators:
        sizes = found.graph.sizes(5, 1)
        for dims, name in zip(
            (*operator.input_dims, *operator.output_dims), (*operator.inputs, *operator.outputs), strict=True
        ):
            assert len(dims) == len(block.tensor[name].dims)
            assert all(dim in sizes for dim in block.tensor[name].dims)


def test_batchnorm_in_training_is_two_operators() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    (block,) = traced_module(module, (torch.zeros(4, 3, 6, 10),)).graph.blocks
    conv, statistics, norm = block.operators
    assert conv.halo == {"height": (1, 1), "width": (1, 1)}
    assert statistics.name == "1.batch_norm.statistics"
    assert statistics.spec == "batch d8 height width -> d8, d8"
    assert statistics.contracted == {"batch", "height", "width"}
    assert statistics.unsplit == ()
    assert not statistics.linear
    assert norm.inputs[-2:] == statistics.outputs == ("1.batch_norm.out.sum", "1.batch_norm.out.square_sum")
    assert norm.unsplit == ()
    module.eval()
    (block,) = traced_module(module, (torch.zeros(4, 3, 6, 10),)).graph.blocks
    assert [operator.kind for operator in block.operators] == ["conv2d", "batch_norm"]


def test_constants_are_buffers_and_no_operators() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(6)[:, None] >= torch.arange(6)[None, :]
        return (x @ w).masked_fill(~mask, 0.0)

    (block,) = of(function, (torch.zeros(4, 6, 8),), (8, 6)).graph.blocks
    assert [operator.kind for operator in block.operators] == ["matmul", "masked_fill"]
    mask = block.tensor[block.operators[1].inputs[1]]
    assert (mask.role, mask.dims, mask.dtype) == (Role.BUFFER, ("tokens", "d6"), "bool")


def test_an_operator_without_a_rule_is_replicated_and_named() -> None:
    values = {
        "x": Value("x", (4, 6), "float32", Role.INPUT, False),
        "w": Value("w", (6, 6), "float32", Role.PARAMETER, True, "w"),
        "y": Value("y", (4, 6), "float32"),
        "z": Value("z", (4, 6), "float32"),
    }
    calls = (
        Call("mm", "aten.mm.default", {"self": "x", "mat2": "w"}, ("y",)),
        Call("odd", "mine.odd.default", {"self": "y"}, ("z",)),
    )
    found = traced(Program("odd", values, calls, ("x",), ("z",), 4))
    (block,) = found.graph.blocks
    odd = operators(block)["odd"]
    assert set(odd.unsplit) == set(odd.dims)
    assert block.tensor["z"].dims[0] == "batch"  # what follows has the workload's size, not the traced one
    assert found.warnings == (
        "no rule for mine.odd.default (once): replicated, its work is done by every device; its FLOPs are not known "
        "and count as 0 %",
    )


def test_factors_make_up_every_value() -> None:
    for name in ("llama", "t5", "unet", "dlrm", "lstm", "mixtral", "resnet"):
        program = module_program(*architectures.__dict__[name](), name=name)
        found = traced(program)
        sizes = {**found.graph.dims, "batch": program.batch, "batch'": program.batch}
        for value in program.values.values():
            if value.name not in found.factors:  # only of a tied name or an unread buffer
                continue
            factors = found.factors[value.name]
            names = [label for labels in factors for label in labels]
            assert len(set(names)) == len(names)
            for size, labels in zip(value.shape, factors, strict=True):
                known = [sizes[label] for label in labels if label in sizes]
                assert math.prod(known) == size or len(known) < len(labels)


def test_readings_show_their_base() -> None:
    """Each view's named dims are those of its base where it says so."""
    for name in ("llama", "t5", "whisper"):
        program = module_program(*architectures.__dict__[name](), name=name)
        found = traced(program)
        for view, reading in found.readings.items():
            below = [label for labels in found.factors[reading.base] for label in labels]
            mine = [label for labels in found.factors[view] for label in labels]
            assert len(mine) == len(reading.positions)
            assert all(mine[at] == below[place] for at, place in enumerate(reading.positions) if place >= 0)
            assert sorted(place for place in reading.positions if place >= 0) == list(range(len(below)))
            assert reading.base not in found.readings


def test_instances_cover_every_call_and_know_their_values() -> None:
    for name in ("llama", "t5", "whisper", "clip", "resnet"):
        program = module_program(*architectures.__dict__[name](), name=name)
        found = traced(program)
        outputs = {out: call.name for call in program.calls for out in call.outputs}
        done: list[str] = []
        handed: list[str] = []
        for instance in found.instances:
            block = found.graph.block[instance.block]
            values = instance.values
            assert [values[tensor] for tensor in block.inputs] == handed
            handed = [values[tensor] for tensor in block.outputs]
            for operator in block.operators:
                call = next(item for item in program.calls if item.name == instance.calls[operator.name])
                done.append(call.name)
                if operator.kind == "statistics":
                    continue
                bases = [found.readings[item].base if item in found.readings else item for item in call.inputs]
                assert [values[tensor] for tensor in operator.inputs[: len(bases)]] == bases
                assert tuple(values[tensor] for tensor in operator.outputs[: len(call.outputs)]) == call.outputs
        constant = {values for instance in found.instances for values in instance.values.values()}
        left = {call.name for call in program.calls} - set(done) - {outputs[view] for view in found.readings}
        assert all(not program.values[call.outputs[0]].differentiable for call in program.calls if call.name in left)
        assert constant
