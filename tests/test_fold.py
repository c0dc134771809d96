"""Equal blocks found by structure: programs written by hand, whose runs are known."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest

from meshwright.graph import Role, graph_problems
from meshwright.io.dims import traced
from meshwright.io.fold import folded_runs
from meshwright.io.traced import Call, Program, Value

BATCH, WIDTH = 3, 5


@dataclass
class Draft:
    """A program while it is written; every value is (batch, width)."""

    values: dict[str, Value] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def value(self, name: str, role: Role = Role.ACTIVATION, shape: tuple[int, ...] = (BATCH, WIDTH)) -> str:
        self.values[name] = Value(name, shape, "float32", role, role is not Role.INPUT, name)
        return name

    def weight(self, name: str) -> str:
        return name if name in self.values else self.value(name, Role.PARAMETER, (WIDTH, WIDTH))

    def linear(self, x: str, name: str, weight: str = "") -> str:
        operands = {"input": x, "weight": self.weight(weight or f"{name}.weight")}
        return self.call("aten.linear.default", name, operands)

    def add(self, x: str, y: str, name: str) -> str:
        return self.call("aten.add.Tensor", name, {"self": x, "other": y})

    def relu(self, x: str, name: str) -> str:
        return self.call("aten.relu.default", name, {"self": x})

    def call(self, op: str, name: str, operands: dict[str, str | tuple[str, ...]]) -> str:
        out = self.value(f"{name}.out")
        self.calls.append(Call(name, op, operands, (out,)))
        return out

    def program(self, *outputs: str) -> Program:
        inputs = tuple(name for name, value in self.values.items() if value.role is Role.INPUT)
        return Program("drafted", self.values, tuple(self.calls), inputs, outputs, BATCH)


def residual(draft: Draft, x: str, name: str) -> str:
    """x + W2 relu(W1 x)."""
    y = draft.linear(draft.relu(draft.linear(x, f"{name}.one"), f"{name}.relu"), f"{name}.two")
    return draft.add(x, y, f"{name}.add")


def check(program: Program, repeats: list[int]) -> None:
    """The runs of a program, and that folding changes neither FLOPs nor parameters."""
    folded, whole = traced(program), traced(program, fold=False)
    assert [segment.repeat for segment in folded.graph.segments if segment.repeat > 1] == repeats
    assert len(folded.folded) == len(repeats)
    for graph in (folded.graph, whole.graph):
        assert graph_problems(graph) == []
    assert folded.graph.forward_flops(7, 1) == whole.graph.forward_flops(7, 1) > 0
    assert folded.graph.num_parameters == whole.graph.num_parameters
    assert len(folded.instances) == len(folded.graph.sequence)
    assert sorted(call for instance in folded.instances for call in set(instance.calls.values())) == sorted(
        call.name for call in program.calls if call.outputs[0] not in folded.readings
    )
    assert folded.factors.keys() == whole.factors.keys()


def stack(layers: int) -> tuple[Draft, str]:
    draft = Draft()
    x = draft.linear(draft.value("x", Role.INPUT), "first")
    for layer in range(layers):
        x = residual(draft, x, f"layers.{layer}")
    return draft, x


def test_a_stack_of_residual_blocks() -> None:
    draft, x = stack(5)
    program = draft.program(draft.linear(x, "last"))
    (run,) = folded_runs(program)
    assert (run.start, run.period, run.count) == (1, 4, 5)
    assert run.carried == (("first.out", "layers.0.add.out"),)
    check(program, [5])
    found = traced(program)
    assert found.folded == ("5 x 4 operators: block 'layer', 4 calls each, the first from layers.0.one",)
    start, layer, end = found.graph.blocks
    assert (start.outputs, layer.inputs) == (("first.out",), ("first.out",))
    assert (layer.outputs, end.inputs) == (("add.out",), ("layers.0.add.out",))
    assert [operator.name for operator in layer.operators] == ["one", "relu", "two", "add"]
    third = found.instances[3]
    assert third.block == "layer"
    assert third.calls == {name: f"layers.2.{name}" for name in ("one", "relu", "two", "add")}
    assert third.values["first.out"] == "layers.1.add.out"
    assert third.values["one.weight"] == "layers.2.one.weight"
    assert found.instances[-1].values["layers.0.add.out"] == "layers.4.add.out"


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_two_equal_blocks_are_enough(layers: int) -> None:
    draft, x = stack(layers)
    check(draft.program(draft.linear(x, "last")), [layers] if layers > 1 else [])


def test_a_run_starts_where_least_is_carried() -> None:
    """The tail looks like the head of one more block: cut behind the first linear, two tensors would cross."""
    draft, x = stack(4)
    y = draft.relu(draft.linear(x, "tail.one"), "tail.relu")
    program = draft.program(draft.add(y, y, "end"))
    (run,) = folded_runs(program)
    assert (run.start, run.count, len(run.carried)) == (1, 4, 1)
    check(program, [4])


def test_a_block_that_reads_what_all_read() -> None:
    draft, x = Draft(), ""
    x = draft.linear(draft.value("x", Role.INPUT), "first")
    table = draft.linear(draft.value("t", Role.INPUT), "table")
    for layer in range(4):
        x = draft.add(draft.linear(x, f"layers.{layer}.one"), table, f"layers.{layer}.add")
    program = draft.program(draft.linear(x, "last"))
    check(program, [4])
    layer = traced(program).graph.block["layer"]
    assert layer.inputs == ("first.out", "table.out")
    assert layer.outputs == ("add.out", "table.out")  # passes through unchanged


def test_weights_that_blocks_share_are_no_weights_of_their_own() -> None:
    draft = Draft()
    x = draft.linear(draft.value("x", Role.INPUT), "first")
    for layer in range(4):
        x = draft.relu(draft.linear(x, f"layers.{layer}.one", "shared"), f"layers.{layer}.relu")
    check(draft.program(x), [])


def test_what_every_block_gives_to_the_end_keeps_blocks_apart() -> None:
    draft = Draft()
    x = draft.linear(draft.value("x", Role.INPUT), "first")
    kept = []
    for layer in range(4):
        x = residual(draft, x, f"layers.{layer}")
        kept.append(x)
    program = draft.program(*kept)
    check(program, [])


def test_a_skip_around_the_run_shortens_it_by_the_block_it_enters() -> None:
    """What the first block got is read at the end: it cannot be the slot that each block writes."""
    draft = Draft()
    first = x = draft.linear(draft.value("x", Role.INPUT), "first")
    for layer in range(5):
        x = residual(draft, x, f"layers.{layer}")
    program = draft.program(draft.add(x, first, "last"))
    check(program, [4])
    layer = traced(program).graph.block["layer"]
    assert layer.inputs[1:] == layer.outputs[1:] == ("first.out",)


def test_an_encoder_and_a_decoder() -> None:
    draft = Draft()
    x = draft.linear(draft.value("x", Role.INPUT), "first")
    for layer in range(3):
        x = residual(draft, x, f"encoder.{layer}")
    y = draft.linear(draft.value("y", Role.INPUT), "second")
    for layer in range(4):
        z = draft.add(
            draft.linear(y, f"decoder.{layer}.self"), draft.linear(x, f"decoder.{layer}.cross"), f"decoder.{layer}.mix"
        )
        y = draft.add(y, z, f"decoder.{layer}.add")
    program = draft.program(draft.linear(y, "last"))
    check(program, [3, 4])
    graph = traced(program).graph
    assert [segment.blocks for segment in graph.segments] == [
        ("start",),
        ("layer1",),
        ("between",),
        ("layer2",),
        ("end",),
    ]
    # The encoder's output passes through the whole decoder.
    assert "encoder.0.add.out" in graph.block["layer2"].inputs


def test_blocks_of_two_kinds_in_turn() -> None:
    draft = Draft()
    x = draft.linear(draft.value("x", Role.INPUT), "first")
    for layer in range(6):
        x = residual(draft, x, f"{layer}") if layer % 2 else draft.linear(x, f"{layer}.only")
    program = draft.program(draft.relu(x, "last"))
    (run,) = folded_runs(program)
    assert (run.period, run.count) == (5, 3)
    check(program, [3])


def test_blocks_of_unlike_weights_are_not_equal() -> None:
    draft, x = stack(4)
    program = draft.program(draft.linear(x, "last"))
    values = dict(program.values)
    values["layers.1.two.weight"] = replace(values["layers.1.two.weight"], differentiable=False)
    check(replace(program, values=values), [2])


def test_names_do_not_matter() -> None:
    draft, x = stack(4)
    program = draft.program(draft.linear(x, "last"))
    names = {call.name: f"call{index}" for index, call in enumerate(program.calls)}
    renamed = replace(program, calls=tuple(replace(call, name=names[call.name]) for call in program.calls))
    assert folded_runs(renamed) == folded_runs(program)
