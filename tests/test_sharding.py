"""Placements and what follows from them: known parallelisms worked by hand, the literature's formulas to the byte,
and operators and axes that the package has never heard of."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
import re
import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import meshwright
from meshwright.cluster import preset_cluster
from meshwright.cost.analytic import estimate
from meshwright.cost.block import kept_bytes, price_block
from meshwright.cost.compute import Pricing
from meshwright.cost.extents import Extents
from meshwright.cost.layouts import machine_of
from meshwright.engine import load_engine
from meshwright.graph import Block, Graph, Operator, Role, Segment, Tensor, graph_problems
from meshwright.io.decoder import Decoder, Layer, Norm, Rotary, decoder_graph
from meshwright.io.models import load_model
from meshwright.sharding import (
    FLAT,
    PARTIAL,
    REPLICATE,
    SPREAD,
    SUMMANDS,
    AxisRule,
    BlockLayout,
    Collective,
    Phase,
    Placement,
    Shard,
    StatePlacement,
    StateTransfers,
    Step,
    at_rest,
    gradient_placements,
    group_size,
    hubs,
    lay_out,
    lay_out_operator,
    local_numel,
    local_size,
    operator_splits,
    redistribution,
    rest_key,
    state_transfers,
    traffic,
    zero_placement,
)
from meshwright.strategy import (
    MeshAxis,
    Recompute,
    Strategy,
    expand,
    parse_shorthand,
    uniform_splits,
    uniform_stages,
)
from meshwright.workload import Workload

FLOAT16 = Workload(global_batch=1, seq_len=1, precision="float16")
MACHINE = machine_of(preset_cluster("dgx-h100x2"), load_engine("unknown"), FLOAT16)


def pricing(sizes: Mapping[str, Any], degrees: Mapping[str, Any]) -> Pricing:
    """What prices need, on two nodes of H100."""
    return Pricing(MACHINE.rates, MACHINE.engine, MACHINE.constants, FLOAT16, Extents(sizes, degrees))


def kept(layout: BlockLayout, recompute: Recompute, priced_with: Pricing) -> float:
    return float(sum(kept_bytes(layout, recompute, priced_with, is_end=False).values()))


LLAMA = Decoder(
    "llama",
    hidden=64,
    kv_heads=4,
    group=2,
    head_dim=8,
    ffn=96,
    vocab=512,
    layers=(Layer(rotary=Rotary(10_000.0, 8)),),
    segments=(Segment(("layer",), 3),),
)


def gpt(heads: int, head_dim: int, **changes: Any) -> Graph:
    """The layer of Korthikanti 2205.05198: unfused attention, three dropouts, an MLP of 4 h, biases."""
    decoder = Decoder(
        "gpt",
        hidden=heads * head_dim,
        kv_heads=heads,
        group=1,
        head_dim=head_dim,
        ffn=4 * heads * head_dim,
        vocab=512,
        layers=(Layer(),),
        segments=(Segment(("layer",), 3),),
        norm=Norm("layer", 1e-5, bias=True),
        attention="unfused",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation="gelu",
        embedding_dropout=0.1,
        attention_dropout=0.1,
        residual_dropout=0.1,
        mlp_dropout=0.1,
    )
    return decoder_graph(dataclasses.replace(decoder, **changes))


def tensor_rule(*, sequence: bool) -> AxisRule:
    return AxisRule("tp", ("kv_heads", "ffn", "vocab"), ("seq",) if sequence else ())


def layout_of(graph: Graph, block: str, *rules: AxisRule) -> BlockLayout:
    return lay_out(graph.block[block], operator_splits(graph.block[block], rules))


def moves(
    layout: BlockLayout, phase: Phase, sizes: Mapping[str, int], degrees: Mapping[str, int]
) -> list[tuple[str, str, tuple[str, ...], float]]:
    """What moves in a phase: tensor, collective, axes, bytes that a rank sends."""
    found = []
    for transfer in layout.transfers:
        if transfer.phase is phase and transfer.step.collective is not Collective.SLICE:
            tensor, step = layout.block.tensor[transfer.tensor], transfer.step
            size = local_numel(tensor.dims, step.larger, sizes, degrees) * FLOAT16.bytes_of(tensor.dtype)
            sent = traffic(step.collective, group_size(step.axes, degrees), size)
            found.append((transfer.tensor, step.collective.value, step.axes, sent))
    return found


def total(found: Sequence[tuple[Any, ...]]) -> float:
    return sum(item[-1] for item in found)


# --- redistribution --------------------------------------------------------------------------------------------------

X, Y = Shard("x"), Shard("y")
TABLE = [
    (REPLICATE, REPLICATE, None),
    (REPLICATE, X, "slice"),
    (PARTIAL, PARTIAL, None),
    (PARTIAL, REPLICATE, "all_reduce"),
    (PARTIAL, X, "reduce_scatter"),
    (X, REPLICATE, "all_gather"),
    (X, X, None),
    (X, Y, "all_to_all"),
]


@pytest.mark.parametrize(("before", "after", "collective"), TABLE, ids=str)
def test_each_pair_of_placements(before: Placement, after: Placement, collective: str | None) -> None:
    steps = redistribution({"a": before}, {"a": after})
    assert [step.collective.value for step in steps] == ([collective] if collective else [])
    if steps:
        (step,) = steps
        assert step.axes == ("a",)
        assert step.source == (before.dim if isinstance(before, Shard) else None)
        assert step.target == (after.dim if isinstance(after, Shard) else None)
        # The larger side: of a gather its result, of everything else what it starts from.
        assert step.larger == {"a": after if collective == "all_gather" else before}


@pytest.mark.parametrize("before", [REPLICATE, X], ids=str)
def test_nothing_turns_into_summands(before: Placement) -> None:
    with pytest.raises(AssertionError, match="no operator asks for Partial"):
        redistribution({"a": before}, {"a": PARTIAL})


def test_an_axis_that_is_not_named_replicates() -> None:
    assert [step.collective.value for step in redistribution({}, {"a": X})] == ["slice"]
    assert redistribution({"a": X}, {}) == redistribution({"a": X}, {"a": REPLICATE})


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        # One collective over the product of the axes that make the same move.
        ({"a": PARTIAL, "b": PARTIAL}, {}, [("all_reduce", ("a", "b"))]),
        ({"a": X, "b": X}, {}, [("all_gather", ("a", "b"))]),
        ({"a": PARTIAL, "b": PARTIAL}, {"a": X, "b": X}, [("reduce_scatter", ("a", "b"))]),
        # Moves that differ go one by one, those that shrink the tensor first.
        ({"a": X, "b": Y}, {}, [("all_gather", ("a",)), ("all_gather", ("b",))]),
        ({"a": PARTIAL, "b": PARTIAL}, {"a": X}, [("reduce_scatter", ("a",)), ("all_reduce", ("b",))]),
        ({"a": PARTIAL, "b": X}, {"a": Y}, [("reduce_scatter", ("a",)), ("all_gather", ("b",))]),
        ({"a": X, "b": PARTIAL}, {"a": Y, "c": X}, [("slice", ("c",)), ("all_to_all", ("a",)), ("all_reduce", ("b",))]),
        ({"a": X, "b": Y}, {"a": X, "b": Y}, []),
    ],
)
def test_joint_collectives(
    source: dict[str, Placement], target: dict[str, Placement], expected: list[tuple[str, tuple[str, ...]]]
) -> None:
    steps = redistribution(source, target)
    assert [(step.collective.value, step.axes) for step in steps] == expected


def test_the_all_reduce_after_a_scatter_moves_the_shard() -> None:
    # 1000 elements, scattered over a = 5, then reduced over b = 4: 4/5 * 1000, then 2 * 3/4 * 200.
    degrees, sizes = {"a": 5, "b": 4}, {"x": 1000}
    steps = redistribution({"a": PARTIAL, "b": PARTIAL}, {"a": X})
    assert [sent(step, ("x",), sizes, degrees) for step in steps] == [800.0, 300.0]


def test_two_gathers_grow_the_tensor_step_by_step() -> None:
    # x and y of 12 each over a = 2 and b = 3: 6*4 held; gathered to 12*4 over a, then to 12*12 over b.
    degrees, sizes = {"a": 2, "b": 3}, {"x": 12, "y": 12}
    steps = redistribution({"a": X, "b": Y}, {})
    assert [sent(step, ("x", "y"), sizes, degrees) for step in steps] == [48 / 2, 144 * 2 / 3]


def sent(step: Step, dims: Sequence[str], sizes: Mapping[str, int], degrees: Mapping[str, int]) -> float:
    """Elements that a rank sends."""
    found = traffic(step.collective, group_size(step.axes, degrees), local_numel(dims, step.larger, sizes, degrees))
    return float(found)


placements = st.dictionaries(st.sampled_from("abc"), st.sampled_from([REPLICATE, PARTIAL, X, Y]))


@given(placements, placements, st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_steps_lead_from_source_to_target(
    source: dict[str, Placement], target: dict[str, Placement], a: int, b: int, c: int
) -> None:
    target = {axis: placement for axis, placement in target.items() if placement != PARTIAL}
    degrees, sizes = {"a": a, "b": b, "c": c}, {"x": 48, "y": 48}
    current = dict(source)
    for step in redistribution(source, target):
        before = local_numel(("x", "y"), current, sizes, degrees)
        for axis in step.axes:
            current[axis] = REPLICATE if step.target is None else Shard(step.target)
        after = local_numel(("x", "y"), current, sizes, degrees)
        larger = local_numel(("x", "y"), step.larger, sizes, degrees)
        assert larger == (after if step.collective is Collective.ALL_GATHER else before)
        assert larger >= min(before, after)
    whole = {axis: placement for axis, placement in current.items() if placement != REPLICATE}
    assert whole == {axis: placement for axis, placement in target.items() if placement != REPLICATE}


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "degree", "held"),
    [(50257, 4, 12565), (50257, 1, 50257), (7, 8, 1), (8, 8, 1), (9, 8, 2), (64, 8, 8)],
)
def test_local_size_is_that_of_the_fullest_rank(size: int, degree: int, held: int) -> None:
    assert local_size("x", {"a": X}, {"x": size}, {"a": degree}) == held


def test_local_numel_by_hand() -> None:
    degrees, sizes = {"a": 2, "b": 3, "c": 4}, {"x": 50, "y": 7}
    dims = ("x", "y")
    assert local_numel(dims, {}, sizes, degrees) == 350
    assert local_numel(dims, {"a": X, "c": Y}, sizes, degrees) == 25 * 2  # 50/2, 7/4 rounded up
    assert local_numel(dims, {"a": X, "b": X}, sizes, degrees) == 9 * 7  # 50/6 rounded up
    assert local_numel(dims, {"a": PARTIAL}, sizes, degrees) == 350  # a summand is as large as the sum
    assert local_numel(dims, {"a": X, "c": Shard(FLAT)}, sizes, degrees) == 44  # 25*7 = 175 in 4 pieces


def test_local_numel_of_columns() -> None:
    degrees, sizes = {"a": np.array([1, 2, 4, 8])}, {"x": 50, "y": np.array([1, 2, 3, 4])}
    assert list(local_numel(("x", "y"), {"a": X}, sizes, degrees)) == [50, 50, 39, 28]


def test_a_repeated_dim_is_split_where_it_is_split_once() -> None:
    # Scores have the sequence twice, as that of the queries and of the keys, and the second is never split: with two
    # ranks along the sequence each holds 8/2 rows of 8.
    assert local_numel(("seq", "seq"), {"a": Shard("seq")}, {"seq": 8}, {"a": 2}) == 32


@given(st.lists(st.integers(1, 500), min_size=2, max_size=2), st.integers(1, 9), st.integers(1, 9), placements)
@settings(max_examples=100, deadline=None)
def test_shards_cover_the_whole(numbers: list[int], a: int, b: int, where: dict[str, Placement]) -> None:
    sizes, degrees = dict(zip("xy", numbers, strict=True)), {"a": a, "b": b, "c": 1}
    held = local_numel(("x", "y"), where, sizes, degrees)
    ranks = math.prod(degrees[axis] for axis, placement in where.items() if isinstance(placement, Shard))
    assert held * ranks >= numbers[0] * numbers[1]
    assert 1 <= held <= numbers[0] * numbers[1]


@pytest.mark.parametrize(
    ("collective", "expected"),
    [("all_reduce", 1400), ("all_gather", 700), ("reduce_scatter", 700), ("all_to_all", 700), ("slice", 0)],
)
def test_traffic(collective: str, expected: float) -> None:
    assert traffic(Collective(collective), 8, 800.0) == expected
    assert traffic(Collective(collective), 1, 800.0) == 0


# --- tensor and sequence parallelism ---------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [2, 4, 8])
def test_megatron_all_reduces(t: int) -> None:
    # Shoeybi 1909.08053, figure 4: two all-reduces of [b, s, h] forward, two backward; each sends 2 (t-1)/t of 2 s b h.
    graph = load_model("megatron-22b")
    s, b, h = 2048, 4, 6144
    layout = layout_of(graph, "layer", tensor_rule(sequence=False))
    each = 2 * (t - 1) / t * (2 * s * b * h)
    found = {phase: moves(layout, phase, graph.sizes(b, s), {"tp": t}) for phase in Phase}
    assert found[Phase.FORWARD] == [
        ("out_out", "all_reduce", ("tp",), each),
        ("down_out", "all_reduce", ("tp",), each),
    ]
    assert found[Phase.BACKWARD] == [
        ("norm1_out", "all_reduce", ("tp",), each),
        ("norm2_out", "all_reduce", ("tp",), each),
    ]
    assert found[Phase.REGATHER] == []
    assert set(layout.partial_gradients.values()) == {()}, "every weight's gradient is complete where the weight is"


@pytest.mark.parametrize("t", [2, 4, 8])
def test_sequence_parallelism_has_the_same_volume(t: int) -> None:
    # Korthikanti 2205.05198, figure 5: all-gathers before, reduce-scatters after each pair of matrices; each sends
    # (t-1)/t of 2 s b h, half of an all-reduce. Section 4.2.2: the inputs kept in shards are gathered again backward.
    graph = load_model("megatron-22b")
    s, b, h = 2048, 4, 6144
    layout = layout_of(graph, "layer", tensor_rule(sequence=True))
    each = (t - 1) / t * (2 * s * b * h)
    found = {phase: moves(layout, phase, graph.sizes(b, s), {"tp": t}) for phase in Phase}
    assert found[Phase.FORWARD] == [
        ("norm1_out", "all_gather", ("tp",), each),
        ("out_out", "reduce_scatter", ("tp",), each),
        ("norm2_out", "all_gather", ("tp",), each),
        ("down_out", "reduce_scatter", ("tp",), each),
    ]
    assert sorted(found[Phase.BACKWARD]) == [
        ("down_out", "all_gather", ("tp",), each),
        ("norm1_out", "reduce_scatter", ("tp",), each),
        ("norm2_out", "reduce_scatter", ("tp",), each),
        ("out_out", "all_gather", ("tp",), each),
    ]
    assert found[Phase.REGATHER] == [
        ("norm1_out", "all_gather", ("tp",), each),
        ("norm2_out", "all_gather", ("tp",), each),
    ]
    whole = layout_of(graph, "layer", tensor_rule(sequence=False))
    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert total(found[phase]) == total(moves(whole, phase, graph.sizes(b, s), {"tp": t}))


def test_parameters_used_on_parts_of_the_sequence_have_summed_gradients() -> None:
    layout = layout_of(load_model("megatron-22b"), "layer", tensor_rule(sequence=True))
    partial = {name for name, axes in layout.partial_gradients.items() if axes}
    assert partial == {"norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "out.bias", "down.bias"}


def test_the_local_matrices() -> None:
    # Columns of q, k, v and up, rows of out and down (1909.08053, section 3).
    graph = load_model("megatron-22b")
    layout = layout_of(graph, "layer", tensor_rule(sequence=False))
    stored = {name: layout.made[name] for name in ("q.weight", "out.weight", "up.weight", "down.weight", "up.bias")}
    heads, ffn = {"tp": Shard("kv_heads")}, {"tp": Shard("ffn")}
    assert stored == {"q.weight": heads, "out.weight": heads, "up.weight": ffn, "down.weight": ffn, "up.bias": ffn}
    assert layout.made["down.bias"] == {}
    sizes = graph.sizes(1, 2048)
    for name in ("q.weight", "out.weight"):
        assert local_numel(layout.block.tensor[name].dims, layout.made[name], sizes, {"tp": 8}) == 6144 * 6144 // 8


def test_vocabulary_parallel_embedding() -> None:
    # Each rank looks up the rows that it has: a sum over ranks of [b, s, h]; backward needs nothing.
    graph = decoder_graph(LLAMA)
    layout = layout_of(graph, "embedding", tensor_rule(sequence=False))
    sizes, degrees = graph.sizes(3, 16), {"tp": 4}
    assert moves(layout, Phase.FORWARD, sizes, degrees) == [("y", "all_reduce", ("tp",), 2 * 3 / 4 * (3 * 16 * 64 * 2))]
    assert moves(layout, Phase.BACKWARD, sizes, degrees) == []


def test_vocabulary_parallel_loss() -> None:
    # Largest logit, sum of exponentials, target's logit: three float32 numbers a token, never the logits.
    graph = decoder_graph(LLAMA)
    layout = layout_of(graph, "head", tensor_rule(sequence=False))
    sizes, degrees = graph.sizes(3, 16), {"tp": 4}
    each = 2 * 3 / 4 * (3 * 16 * 4)
    assert moves(layout, Phase.FORWARD, sizes, degrees) == [
        (name, "all_reduce", ("tp",), each) for name in ("max", "sumexp", "target")
    ]
    # Backward: the gradient of the head's input alone is a sum, over the parts of the vocabulary.
    assert moves(layout, Phase.BACKWARD, sizes, degrees) == [
        ("norm_out", "all_reduce", ("tp",), 2 * 3 / 4 * (3 * 16 * 64 * 2))
    ]
    logits = layout.block.tensor["logits"]
    assert local_numel(logits.dims, layout.made["logits"], sizes, degrees) == 3 * 16 * 128


def test_more_ranks_than_key_value_heads() -> None:
    # Llama-3-8B on 16 ranks: 8 key/value heads by tp_kv = 8, the 4 query heads of each by tp_group = 2.
    graph = load_model("llama-3-8b")
    rules = (
        AxisRule("tp_kv", ("kv_heads", "ffn", "vocab")),
        AxisRule("tp_group", ("group", "ffn", "vocab"), blocked_by=("kv_heads",)),
    )
    layout = layout_of(graph, "layer", *rules)
    sizes, degrees = graph.sizes(2, 1024), {"tp_kv": 8, "tp_group": 2}

    def local(name: str) -> list[int]:
        dims = layout.block.tensor[name].dims
        return [local_size(dim, layout.made[name], sizes, degrees) for dim in dims]

    assert local("q") == [2, 1024, 1, 2, 128]
    assert local("k") == local("v") == [2, 1024, 1, 128]
    assert local("context") == [2, 1024, 1, 2, 128]
    assert local("q.weight") == [1, 2, 128, 4096]
    assert local("k.weight") == [1, 128, 4096]
    assert local("gate.weight") == [14336 // 16, 4096]

    forward = moves(layout, Phase.FORWARD, sizes, degrees)
    hidden = 2 * 1024 * 4096 * 2
    both = ("tp_group", "tp_kv")
    assert forward == [(name, "all_reduce", both, 2 * 15 / 16 * hidden) for name in ("attention_out", "mlp_out")]

    # Each of the 2 ranks with the same key head has the gradient of its own query heads: a sum over tp_group.
    backward = moves(layout, Phase.BACKWARD, sizes, degrees)
    each = 2 * 1 / 2 * (2 * 1024 * 1 * 128 * 2)
    assert [move for move in backward if move[0] in "kv"] == [
        ("k", "all_reduce", ("tp_group",), each),
        ("v", "all_reduce", ("tp_group",), each),
    ]
    # After that both ranks agree, so the gradient of the layer's input by k and v is a sum over tp_kv alone.
    assert ("norm1_out", "all_reduce", both, 2 * 15 / 16 * hidden) in backward
    assert ("norm1_out", "all_reduce", ("tp_kv",), 2 * 7 / 8 * hidden) in backward
    assert ("norm2_out", "all_reduce", both, 2 * 15 / 16 * hidden) in backward
    assert len(backward) == 5
    assert layout.partial_gradients["k.weight"] == ()


# --- data parallelism and training state -----------------------------------------------------------------------------

DATA = AxisRule("dp", ("batch",))


def test_data_parallelism_moves_gradients_alone() -> None:
    graph = decoder_graph(LLAMA)
    for block in ("embedding", "layer", "head"):
        layout = layout_of(graph, block, DATA)
        assert layout.transfers == ()
        assert set(layout.partial_gradients.values()) == {("dp",)}


def volumes(transfers: StateTransfers, numel: int, degrees: Mapping[str, int]) -> dict[str, float]:
    """Elements sent at each occasion for a parameter of one dim."""
    return {
        name.name: sum(sent(step, ("x",), {"x": numel}, degrees) for step in getattr(transfers, name.name))
        for name in dataclasses.fields(transfers)
    }


@pytest.mark.parametrize("degree", [2, 4, 64])
def test_zero_volumes(degree: int) -> None:
    # Rajbhandari 1910.02054, section 7: with P parameters, levels 0 to 2 send 2 P, level 3 sends 3 P (times (n-1)/n).
    numel, degrees = 6400, {"dp": degree}
    part = (degree - 1) / degree * numel

    def of(level: int) -> dict[str, float]:
        return volumes(state_transfers({}, ("dp",), zero_placement(level, ("dp",))), numel, degrees)

    zero = {"each_use": 0.0, "each_backward": 0.0, "step_gradient": 0.0, "step_parameter": 0.0}
    assert of(0) == {**zero, "step_gradient": 2 * part}
    assert of(1) == {**zero, "step_gradient": part, "step_parameter": part}
    assert of(2) == {**zero, "each_backward": part, "step_parameter": part}
    assert of(3) == {**zero, "each_use": part, "each_backward": part}
    # One microbatch: gathered at its use in the forward and again in the backward.
    assert 2 * of(3)["each_use"] + of(3)["each_backward"] == pytest.approx(1.5 * of(0)["step_gradient"])


@pytest.mark.parametrize(
    ("level", "kinds"),
    [
        (0, ([], [], ["all_reduce"], [])),
        (1, ([], [], ["reduce_scatter"], ["all_gather"])),
        (2, ([], ["reduce_scatter"], [], ["all_gather"])),
        (3, (["all_gather"], ["reduce_scatter"], [], [])),
    ],
)
def test_zero_collectives(level: int, kinds: tuple[list[str], ...]) -> None:
    found = state_transfers({}, ("dp",), zero_placement(level, ("dp",)))
    occasions = (found.each_use, found.each_backward, found.step_gradient, found.step_parameter)
    assert tuple([step.collective.value for step in steps] for steps in occasions) == kinds


@pytest.mark.parametrize("level", [1, 2, 3])
def test_hsdp(level: int) -> None:
    # 8 x 3 ranks: scatter 4800 elements over dp_shard = 8, then reduce the shard of 600 over dp_replicate = 3.
    degrees, axes = {"dp_replicate": 3, "dp_shard": 8}, ("dp_replicate", "dp_shard")
    found = state_transfers({}, axes, zero_placement(level, ("dp_shard",)))
    gradient = found.step_gradient if level == 1 else (*found.each_backward, *found.step_gradient)
    assert [(step.collective.value, step.axes) for step in gradient] == [
        ("reduce_scatter", ("dp_shard",)),
        ("all_reduce", ("dp_replicate",)),
    ]
    assert [sent(step, ("x",), {"x": 4800}, degrees) for step in gradient] == [7 / 8 * 4800, 2 * 2 / 3 * 600]
    gather = found.each_use if level == 3 else found.step_parameter
    assert [(step.collective.value, step.axes) for step in gather] == [("all_gather", ("dp_shard",))]
    assert sent(gather[0], ("x",), {"x": 4800}, degrees) == 7 / 8 * 4800


def test_state_of_a_tensor_parallel_parameter() -> None:
    # A matrix of 40 x 10 split by tp = 4 and sharded flat over dp = 3: 100 elements, 34 at most on one rank.
    stored = {"tp": Shard("x")}
    found = state_transfers(stored, ("dp",), zero_placement(3, ("dp",)))
    (gather,) = found.each_use
    degrees, sizes = {"dp": 3, "tp": 4}, {"x": 40, "y": 10}
    assert gather.axes == ("dp",)
    assert sent(gather, ("x", "y"), sizes, degrees) == pytest.approx(2 / 3 * 100)
    at_rest = {**stored, "dp": Shard(FLAT)}
    assert local_numel(("x", "y"), at_rest, sizes, degrees) == 34


def test_gradients_of_norms_are_summed_over_both_axes_at_once() -> None:
    # Sequence and data parallelism: one all-reduce over dp x tp.
    layout = layout_of(decoder_graph(LLAMA), "layer", DATA, tensor_rule(sequence=True))
    axes = layout.partial_gradients["norm1.weight"]
    assert set(axes) == {"dp", "tp"}
    (step,) = state_transfers({}, axes, StatePlacement(())).step_gradient
    assert (step.collective.value, step.axes) == ("all_reduce", ("dp", "tp"))


# --- context parallelism ---------------------------------------------------------------------------------------------

CONTEXT = AxisRule("cp", ("seq",))


@pytest.mark.parametrize("c", [2, 4])
def test_context_parallelism_gathers_keys_and_values(c: int) -> None:
    # The sequence of every operator is split, that of the keys in attention is not.
    graph = decoder_graph(LLAMA)
    layout = layout_of(graph, "layer", CONTEXT)
    b, s = 2, 64
    sizes, degrees = graph.sizes(b, s), {"cp": c}
    each = (c - 1) / c * (b * s * 4 * 8 * 2)  # [b, s, 4 heads, 8], 2 bytes each
    found = {phase: moves(layout, phase, sizes, degrees) for phase in Phase}
    assert found[Phase.FORWARD] == [("k", "all_gather", ("cp",), each), ("v", "all_gather", ("cp",), each)]
    assert found[Phase.BACKWARD] == [("k", "reduce_scatter", ("cp",), each), ("v", "reduce_scatter", ("cp",), each)]
    assert found[Phase.REGATHER] == [("k", "all_gather", ("cp",), each), ("v", "all_gather", ("cp",), each)]
    assert set(layout.partial_gradients.values()) == {("cp",)}, "every weight sees a part of the tokens"
    q = layout.block.tensor["q"]
    assert local_numel(q.dims, layout.made["q"], sizes, degrees) == b * s // c * 8 * 8


@pytest.mark.parametrize("c", [2, 4])
def test_context_parallelism_divides_activations(c: int) -> None:
    # All that is kept is along the sequence of the queries, the scores of unfused attention too.
    graph = gpt(8, 8)
    s, b, h, a = 32, 2, 64, 8
    layout = layout_of(graph, "layer", CONTEXT)
    found = kept(layout, Recompute.NONE, pricing(graph.sizes(b, s), {"cp": c}))
    assert found == (34 * s * b * h + 5 * a * s * s * b) // c


def test_context_and_tensor_parallelism_together() -> None:
    # tp splits the heads first, so the gathered keys are those of its own heads.
    graph = decoder_graph(LLAMA)
    layout = layout_of(graph, "layer", CONTEXT, tensor_rule(sequence=False))
    found = moves(layout, Phase.FORWARD, graph.sizes(2, 64), {"cp": 4, "tp": 2})
    each = 3 / 4 * (2 * 64 * 2 * 8 * 2)
    reduce = 2 * 1 / 2 * (2 * 16 * 64 * 2)
    assert found == [
        ("k", "all_gather", ("cp",), each),
        ("v", "all_gather", ("cp",), each),
        ("attention_out", "all_reduce", ("tp",), reduce),
        ("mlp_out", "all_reduce", ("tp",), reduce),
    ]


@pytest.mark.parametrize("c", [2, 4])
def test_ulysses_exchanges_heads_for_sequence(c: int) -> None:
    # Jacobs 2309.14509: attention is split by heads, everything else by sequence: q, k, v and the context change sides.
    graph = decoder_graph(LLAMA)
    block = graph.block["layer"]
    splits = operator_splits(block, (CONTEXT,))
    splits["attention"] = {"cp": "kv_heads"}
    layout = lay_out(block, splits)
    b, s = 2, 64
    found = {phase: moves(layout, phase, graph.sizes(b, s), {"cp": c}) for phase in Phase}
    queries = (c - 1) / c * (b * s // c * 8 * 8 * 2)  # a rank's s/c rows of 8 query heads of 8
    keys = queries / 2  # 4 key heads
    assert found[Phase.FORWARD] == [
        ("q", "all_to_all", ("cp",), queries),
        ("k", "all_to_all", ("cp",), keys),
        ("v", "all_to_all", ("cp",), keys),
        ("context", "all_to_all", ("cp",), queries),
    ]
    assert sorted(found[Phase.BACKWARD]) == sorted(found[Phase.FORWARD])
    assert found[Phase.REGATHER] == []
    held = layout.operators[[item.operator.name for item in layout.operators].index("attention")]
    assert held.inputs == ({"cp": Shard("kv_heads")},) * 3
    assert held.outputs == ({"cp": Shard("kv_heads")},) * 2


# --- activations: the literature's formulas to the byte --------------------------------------------------------------


def activations(graph: Graph, b: int, s: int, t: int, recompute: Recompute, *, sequence: bool) -> float:
    layout = layout_of(graph, "layer", tensor_rule(sequence=sequence))
    return kept(layout, recompute, pricing(graph.sizes(b, s), {"tp": t}))


def assert_formulas(graph: Graph, b: int, s: int, t: int) -> None:
    """Korthikanti 2205.05198, equations 2 and 4, table 2; all multiplied by t to stay in whole numbers."""
    h, a = graph.dims["hidden"], graph.dims["kv_heads"]
    sbh, scores = s * b * h, 5 * a * s * s * b
    none, selective, full = Recompute.NONE, Recompute.SELECTIVE, Recompute.FULL
    assert t * activations(graph, b, s, t, none, sequence=False) == sbh * (10 * t + 24) + scores
    assert t * activations(graph, b, s, t, selective, sequence=False) == sbh * (10 * t + 24)
    assert activations(graph, b, s, t, full, sequence=False) == 2 * sbh
    assert t * activations(graph, b, s, t, none, sequence=True) == 34 * sbh + scores
    assert t * activations(graph, b, s, t, selective, sequence=True) == 34 * sbh
    assert t * activations(graph, b, s, t, full, sequence=True) == 2 * sbh


@pytest.mark.parametrize("t", [1, 2, 4, 8])
@pytest.mark.parametrize("model", ["megatron-22b", "gpt3-175b"])
def test_activation_bytes_of_a_layer(model: str, t: int) -> None:
    assert_formulas(load_model(model), 4, 2048, t)


@given(
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 64),
    st.integers(1, 8),
    st.integers(1, 6),
    st.sampled_from([8, 16, 80]),
)
@settings(max_examples=40, deadline=None)
def test_activation_bytes_of_any_layer(t: int, seq_part: int, b: int, heads_part: int, head_dim: int) -> None:
    assert_formulas(gpt(heads_part * t, head_dim), b, seq_part * t, t)


@pytest.mark.parametrize(
    ("text", "held"),
    [
        # p stages of 48/p layers, p microbatches in flight on the first: L layers' worth whatever p is.
        ("tp=8,pp=2,mbs=2,sp=1", 48.0),
        ("tp=8,pp=4,mbs=2,sp=1", 48.0),
        ("tp=4,pp=8,mbs=1,sp=1", 48.0),
        ("tp=8,pp=4,mbs=2,sp=1,recompute=selective", 48.0),
        # Interleaved (section 4.2.3): 1 + (p-1)/(p v) times as much: 1 + 3/8, 1 + 7/24.
        ("tp=8,pp=4,mbs=2,sp=1,vpp=2,schedule=Interleaved1F1B", 48 * 11 / 8),
        ("tp=8,pp=8,mbs=2,sp=1,vpp=3,schedule=Interleaved1F1B", 48 * 31 / 24),
    ],
)
def test_activation_bytes_of_the_first_stage(text: str, held: float) -> None:
    # Equation 5: (s b h L / t) (34 + 5 a s / h). The embedding adds a mask of s b h / t and the token ids, 8 s b.
    graph, shorthand = load_model("megatron-22b"), parse_shorthand(text)
    workload = Workload(16 * shorthand.mbs, 2048, "float16")
    cluster = preset_cluster(f"dgx-a100x{shorthand.num_devices // 8}")
    found = estimate(graph, cluster, expand(shorthand, graph), workload, load_engine("megatron-lm"))
    s, b, h, a, t = 2048, shorthand.mbs, 6144, 64, shorthand.tp
    scores = 0 if shorthand.recompute is Recompute.SELECTIVE else 5 * a * s / h
    layers = s * b * h * held / t * (34 + scores)
    copies = held * shorthand.pp / 48  # microbatches in flight
    extra = copies * (s * b * h / t + 8 * s * b)
    assert found.memory["activations"] == pytest.approx(layers + extra, rel=1e-12)


def test_activation_bytes_of_gpipe() -> None:
    # Every microbatch of all 16 stays; the last rank is the fullest, for beside 12 layers it holds the head: its input
    # and the norm's output in shards, 4 s b h / t, the logits in float32, 4 s b v / t, and the labels, 8 s b.
    graph, shorthand = load_model("megatron-22b"), parse_shorthand("tp=8,pp=4,mbs=2,sp=1,schedule=GPipe")
    strategy, workload = expand(shorthand, graph), Workload(32, 2048, "float16")
    found = estimate(graph, preset_cluster("dgx-a100x4"), strategy, workload, load_engine("megatron-lm"))
    s, b, h, a, t, v = 2048, 2, 6144, 64, 8, 51200
    layers = 12 * s * b * h / t * (34 + 5 * a * s / h)
    head = 4 * s * b * (h + v) / t + 8 * s * b
    assert found.memory["activations"] == pytest.approx(16 * (layers + head), rel=1e-12)


# --- generality: an operator, dims and axes of which the package knows nothing ----------------------------------------

MIXING = Block(
    name="mixing",
    tensors=(
        Tensor("x", ("batch", "site", "chan")),
        Tensor("lift.weight", ("chan", "basis"), Role.PARAMETER),
        Tensor("core", ("chan", "basis", "mode"), Role.PARAMETER),
        Tensor("z", ("batch", "site", "basis")),
        Tensor("y", ("batch", "site", "mode")),
        Tensor("out", ("batch", "site", "mode")),
    ),
    operators=(
        Operator(
            "lift",
            "einsum",
            "batch site chan, chan basis -> batch site basis",
            ("x", "lift.weight"),
            ("z",),
            contractions=("batch site chan basis",),
            saves=("x",),
        ),
        Operator(
            "mix",
            "bilinear_mixing",
            "batch site chan, batch site basis, chan basis mode -> batch site mode",
            ("x", "z", "core"),
            ("y",),
            contractions=("batch site chan basis mode",),
            saves=("x", "z"),
        ),
        Operator(
            "swirl", "swirl", "batch site mode -> batch site mode", ("y",), ("out",), unsplit=("mode",), saves=("y",)
        ),
    ),
    inputs=("x",),
    outputs=("out",),
)
MIXING_DIMS = {"site": 10, "chan": 8, "basis": 9, "mode": 4}
MIXER = Graph("mixer", MIXING_DIMS, (MIXING,), (Segment(("mixing",), 2),))
ZP, YP, XP = AxisRule("zp", ("chan",)), AxisRule("yp", ("basis",)), AxisRule("xp", ("batch",))


def test_the_mixer_is_a_graph() -> None:
    assert graph_problems(MIXER) == []
    # 2 b (10*8*9 + 10*8*9*4) twice, b = 6; parameters 8*9 + 8*9*4, twice
    assert MIXER.forward_flops(6, 1) == 2 * 2 * 6 * (720 + 2880)
    assert MIXER.num_parameters == 2 * (72 + 288)


def test_a_new_operator_on_new_axes() -> None:
    # zp = 2 splits chan, which both operators sum over; yp = 3 splits basis, which lift makes and mix sums over; xp = 2
    # splits the batch of 6.
    layout = lay_out(MIXING, operator_splits(MIXING, (XP, ZP, YP)))
    sizes, degrees = MIXER.sizes(6, 1), {"xp": 2, "zp": 2, "yp": 3}

    def local(name: str, where: Mapping[str, Placement]) -> list[int]:
        return [local_size(dim, where, sizes, degrees) for dim in MIXING.tensor[name].dims]

    mix = layout.operators[1]
    assert [local(name, where) for name, where in zip(mix.operator.inputs, mix.inputs, strict=True)] == [
        [3, 10, 4],  # x
        [3, 10, 3],  # z
        [4, 3, 4],  # core
    ]
    assert mix.outputs == ({"xp": Shard("batch"), "zp": PARTIAL, "yp": PARTIAL},)
    assert layout.made["z"] == {"xp": Shard("batch"), "zp": PARTIAL, "yp": Shard("basis")}

    # Forward: z is a sum over chan, [3, 10, 3]; y a sum over chan and basis at once, [3, 10, 4]. 2 bytes each.
    assert moves(layout, Phase.FORWARD, sizes, degrees) == [
        ("z", "all_reduce", ("zp",), 2 * 1 / 2 * (90 * 2)),
        ("y", "all_reduce", ("yp", "zp"), pytest.approx(2 * 5 / 6 * (120 * 2))),
    ]
    # Backward: both operators give a sum over basis of the gradient of x, [3, 10, 4], added before it is reduced; mix a
    # sum over chan of that of z.
    assert moves(layout, Phase.BACKWARD, sizes, degrees) == [
        ("x", "all_reduce", ("yp",), pytest.approx(2 * 2 / 3 * (120 * 2))),
        ("z", "all_reduce", ("zp",), 2 * 1 / 2 * (90 * 2)),
    ]
    assert moves(layout, Phase.REGATHER, sizes, degrees) == []
    assert layout.partial_gradients == {"lift.weight": ("xp",), "core": ("xp",)}


def test_a_new_operator_that_scatters() -> None:
    # A fallback along `site`: the sums over chan are scattered along it, and what is used whole is gathered.
    rule = AxisRule("zp", ("chan",), fallback=("site",))
    block = dataclasses.replace(MIXING, inputs=("x",))
    splits = operator_splits(block, (rule,))
    assert splits["swirl"] == splits["out"] == {"zp": "site"}
    layout = lay_out(block, splits)
    sizes, degrees = MIXER.sizes(6, 1), {"zp": 2}
    each = 1 / 2 * (6 * 10 * 4 * 2)
    assert ("y", "reduce_scatter", ("zp",), each) in moves(layout, Phase.FORWARD, sizes, degrees)
    assert ("y", "all_gather", ("zp",), each) in moves(layout, Phase.BACKWARD, sizes, degrees)


def test_a_new_operator_has_a_price() -> None:
    layout = lay_out(MIXING, operator_splits(MIXING, (XP, ZP, YP)))
    sizes, degrees = MIXER.sizes(6, 1), {"xp": 2, "zp": 2, "yp": 3}
    price = price_block(layout, pricing(sizes, degrees), MACHINE.levels, is_end=False)
    assert [operator.flops for operator in price.operators] == [2 * 3 * 10 * 4 * 3, 2 * 3 * 10 * 4 * 3 * 4, 0]
    assert price.forward.bytes == {("zp",): 180.0, ("yp", "zp"): pytest.approx(400.0)}
    assert price.backward.bytes == {("yp",): pytest.approx(320.0), ("zp",): 180.0}
    assert all(each.forward_s > 0 and each.backward_s > each.forward_s for each in price.operators)
    assert all(seconds > 0 for part in (price.forward, price.backward) for seconds in part.seconds.values())
    # Kept: x [3, 10, 4], z [3, 10, 3] and the sum y [3, 10, 4], 2 bytes each; under full recomputation x alone.
    assert price.kept_bytes[Recompute.NONE] == 2 * (120 + 90 + 120)
    assert price.kept_bytes[Recompute.FULL] == 2 * 120
    assert price.exit_bytes == 2 * 120


def test_the_name_of_an_axis_means_nothing() -> None:
    # The same strategy with its tensor axis under an unheard-of name: the same numbers under that name.
    graph, workload = load_model("llama-tiny"), Workload(8, 64)
    cluster, engine = preset_cluster("dgx-h100x1"), load_engine("unknown")
    found = {}
    for axis in ("tp", "zp"):
        rules = (AxisRule("dp_shard", ("batch",)), AxisRule(axis, ("kv_heads", "ffn", "vocab"), ("seq",)))
        strategy = Strategy(
            mesh=(MeshAxis("pp", 2), MeshAxis("dp_shard", 2), MeshAxis(axis, 2)),
            splits=uniform_splits(graph, rules),
            stages=uniform_stages(graph, 2, 1),
            schedule="1F1B",
            microbatch=2,
            state=zero_placement(1, ("dp_shard",)),
            recompute={block.name: Recompute.NONE for block in graph.blocks},
        )
        found[axis] = estimate(graph, cluster, strategy, workload, engine)
    renamed = {name.replace("tp", "zp"): seconds for name, seconds in found["tp"].time.items()}
    assert found["zp"].time == renamed
    assert found["zp"].memory == found["tp"].memory
    assert found["zp"].communication == {k.replace("tp", "zp"): v for k, v in found["tp"].communication.items()}
    assert found["zp"].communication["zp"] > 0


SOURCES = Path(meshwright.__file__).parent


def source_files() -> list[Path]:
    return [SOURCES / "sharding.py", *sorted((SOURCES / "cost").glob("*.py"))]


@pytest.mark.parametrize("path", source_files(), ids=lambda path: path.name)
def test_no_source_knows_a_form_of_parallelism(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(bilinear_mixing|swirl|chan|basis|zp|yp|xp)\b", text)
    assert "tensor parallel costs" not in text.lower()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    literals = {token.string.strip("rbf\"'") for token in tokens if token.type == tokenize.STRING}
    axes = {literal for literal in literals if re.fullmatch(r"[a-z]p(_[a-z]+)?", literal)}
    # Stages are laid out along pp, and the batch is shared out over dp; of the others nobody here knows.
    assert axes <= {"pp", "dp"}


# --- nested redistributions, executed on simulated ranks --------------------------------------------------------------

NESTED_AXES = {"x": 2, "y": 3, "z": 2}
NESTED_DIMS = ("a", "b")
Arrays = dict[tuple[int, ...], np.ndarray]


def all_placements(axes: Mapping[str, int], dims: Sequence[str]) -> list[dict[str, Placement]]:
    options = [REPLICATE, PARTIAL, *map(Shard, dims)]
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(options, repeat=len(axes))]


def ranks(axes: Mapping[str, int]) -> list[dict[str, int]]:
    return [dict(zip(axes, place, strict=True)) for place in itertools.product(*map(range, axes.values()))]


def piece(whole: np.ndarray, where: Mapping[str, Placement], rank: Mapping[str, int]) -> np.ndarray:
    """The piece of a rank, each dim cut by its axes from the outermost in."""
    for axis in NESTED_AXES:
        if isinstance(placed := where.get(axis, REPLICATE), Shard):
            whole = np.split(whole, NESTED_AXES[axis], axis=NESTED_DIMS.index(placed.dim))[rank[axis]]
    return whole


def held(
    whole: np.ndarray, where: Mapping[str, Placement], rng: np.random.Generator, axes: Mapping[str, int]
) -> Arrays:
    """What every rank holds: of partial axes, random summands."""
    partial = [axis for axis in axes if where.get(axis, REPLICATE) == PARTIAL]
    count = math.prod(axes[axis] for axis in partial)
    summands = [rng.integers(-9, 9, whole.shape) for _ in range(count - 1)]
    summands.append(whole - sum(summands, np.zeros_like(whole)))
    found = {}
    for rank in ranks(axes):
        index = 0
        for axis in partial:
            index = index * axes[axis] + rank[axis]
        found[tuple(rank.values())] = piece(summands[index], where, rank)
    return found


def execute(step: Step, arrays: Arrays, axes: Mapping[str, int]) -> Arrays:
    """One step, literally: groups of ranks that differ in the step's axes, numbered row-major."""
    names = list(axes)
    found: Arrays = {}
    for rank in ranks(axes):
        ours = [axes[axis] for axis in step.axes]
        members = []
        for place in itertools.product(*map(range, ours)):
            other = {**rank, **dict(zip(step.axes, place, strict=True))}
            members.append(arrays[tuple(other[name] for name in names)])
        own = int(np.ravel_multi_index([rank[axis] for axis in step.axes], ours))
        source = None if step.source is None else NESTED_DIMS.index(step.source)
        target = None if step.target is None else NESTED_DIMS.index(step.target)

        def cut(array: np.ndarray, dim: int | None, members: list[np.ndarray] = members, own: int = own) -> np.ndarray:
            assert dim is not None
            return np.split(array, len(members), axis=dim)[own]

        match step.collective:
            case Collective.ALL_REDUCE:
                made = sum(members[1:], members[0])
            case Collective.REDUCE_SCATTER:
                made = cut(sum(members[1:], members[0]), target)
            case Collective.ALL_GATHER:
                made = np.concatenate(members, axis=source)
            case Collective.ALL_TO_ALL:
                made = np.concatenate([cut(array, target) for array in members], axis=source)
            case Collective.SLICE:
                made = cut(members[own], target)
            case Collective.SUMMAND if source is None:
                made = members[own] if own == 0 else np.zeros_like(members[own])
            case Collective.SUMMAND:
                parts = [each if index == own else np.zeros_like(each) for index, each in enumerate(members)]
                made = np.concatenate(parts, axis=source)
        found[tuple(rank.values())] = made
    return found


def together(
    arrays: Arrays, where: Mapping[str, Placement], shape: tuple[int, ...], axes: Mapping[str, int]
) -> np.ndarray:
    """The whole that ranks hold; those that hold copies must agree."""
    partial = [axis for axis in axes if where.get(axis, REPLICATE) == PARTIAL]
    summed: dict[tuple[int, ...], np.ndarray] = {}
    for rank in ranks(axes):
        key = tuple(0 if axis in partial else place for axis, place in rank.items())
        summed[key] = summed.get(key, 0) + arrays[tuple(rank.values())]
    whole = np.full(shape, 10**6)
    for rank in ranks(axes):
        if all(rank[axis] == 0 for axis in partial):
            view = piece(np.arange(whole.size).reshape(shape), where, rank)
            values = summed[tuple(rank.values())]
            assert view.shape == values.shape
            known = whole.ravel()[view]
            assert ((known == 10**6) | (known == values)).all(), "copies differ"
            whole.ravel()[view] = values
    return whole


@pytest.mark.parametrize("axes", [("x",), ("x", "y"), ("x", "y", "z")], ids="".join)
def test_nested_redistributions_do_what_they_say(axes: tuple[str, ...]) -> None:
    # Every placement of a matrix to every other on up to two axes; a third axis by sample.
    mesh = {axis: NESTED_AXES[axis] for axis in axes}
    rng = np.random.default_rng(1)
    whole = rng.integers(0, 100, (24, 36))
    pairs = list(itertools.product(all_placements(mesh, NESTED_DIMS), repeat=2))
    if len(axes) == 3:
        pairs = [pairs[index] for index in rng.choice(len(pairs), 300, replace=False)]
    for source, target in pairs:
        arrays = held(whole, source, rng, mesh)
        for step in redistribution(source, target, axes):
            before = next(iter(arrays.values())).size
            arrays = execute(step, arrays, mesh)
            larger = local_numel(NESTED_DIMS, step.larger, {"a": 24, "b": 36}, mesh)
            assert larger == max(before, next(iter(arrays.values())).size)
        assert (together(arrays, target, whole.shape, mesh) == whole).all(), (source, target)


def test_nested_redistributions_agree_with_plain_ones_where_no_dim_is_cut_twice() -> None:
    for source, target in itertools.product(all_placements({"x": 2, "y": 2}, ("a", "b")), repeat=2):
        dims = [placed.dim for where in (source, target) for placed in where.values() if isinstance(placed, Shard)]
        moves_to_partial = any(target[axis] == PARTIAL != source[axis] for axis in source)
        if len(set(dims)) == len(dims) and not moves_to_partial:
            plain, exact = (redistribution(source, target, order) for order in ((), ("x", "y")))
            assert [(s.collective, s.axes, s.source, s.target) for s in plain] == [
                (s.collective, s.axes, s.source, s.target) for s in exact
            ]


def test_an_outer_axis_that_leaves_first_takes_the_inner_one_with_it() -> None:
    # Rank (x, y) of 2 x 2 holds quarter 2x + y; half y is quarters 2y and 2y + 1, which no gather along x alone gives.
    steps = redistribution({"x": Shard("a"), "y": Shard("a")}, {"y": Shard("a")}, ("x", "y"))
    assert [(s.collective.value, s.axes) for s in steps] == [("all_gather", ("x", "y")), ("slice", ("y",))]
    # The inner one leaves alone.
    steps = redistribution({"x": Shard("a"), "y": Shard("a")}, {"x": Shard("a")}, ("x", "y"))
    assert [(s.collective.value, s.axes) for s in steps] == [("all_gather", ("y",))]
    # Two that change dims together do so in one exchange.
    steps = redistribution({"x": Shard("a"), "y": Shard("a")}, {"x": Shard("b"), "y": Shard("b")}, ("x", "y"))
    assert [(s.collective.value, s.axes) for s in steps] == [("all_to_all", ("x", "y"))]


# --- summands, spread tensors, tensors at rest ------------------------------------------------------------------------


def test_summands_stay_summands_through_a_linear_operator() -> None:
    scale = Operator("half", "scale", "batch site -> batch site", ("x",), ("y",), linear=True)
    lift = Operator("lift", "einsum", "batch site, site mode -> batch mode", ("x", "w"), ("z",), linear=True)
    tensors = (
        Tensor("x", ("batch", "site")),
        Tensor("w", ("site", "mode"), Role.PARAMETER),
        Tensor("y", ("batch", "site")),
        Tensor("z", ("batch", "mode")),
    )
    block = Block("b", tensors, (scale, lift), ("x",), ("y", "z"))
    layout = lay_out_operator(block, scale, {"x": SUMMANDS, "y": "site"})
    assert layout.inputs == layout.outputs == ({"x": PARTIAL, "y": Shard("site")},)
    # What was a summand has the whole gradient; a shard's is a shard.
    assert gradient_placements(layout.inputs[0], layout.split) == {"y": Shard("site")}
    # A weight is no summand: it is whole, and its gradient a sum over the ranks' summands of x.
    layout = lay_out_operator(block, lift, {"x": SUMMANDS})
    assert layout.inputs == ({"x": PARTIAL}, {})
    assert layout.outputs == ({"x": PARTIAL},)
    assert gradient_placements(layout.inputs[1], layout.split) == {"x": PARTIAL}


def test_how_a_tensor_lies_at_rest() -> None:
    rest = at_rest({"x": "batch", "y": SPREAD, "z": SUMMANDS})
    assert rest.value == {"x": Shard("batch"), "z": PARTIAL}
    assert rest.gradient == {"x": Shard("batch"), "y": PARTIAL}


def test_what_lies_at_rest_in_a_layer() -> None:
    # Read several times (x, norms' outputs, middle), kept for the backward, or handed over; not the results that only
    # their addition or rotation reads.
    layer = decoder_graph(LLAMA).block["layer"]
    lies = set(hubs(layer))
    assert {
        "x",
        "norm1_out",
        "q",
        "k",
        "v",
        "context",
        "middle",
        "norm2_out",
        "gate_proj",
        "activation_out",
        "y",
    } <= lies
    assert lies.isdisjoint({"q_out", "k_out", "attention_out", "mlp_out"})
    assert rest_key(layer, "q") == "q@rest", "an operator is called so too"
    assert rest_key(layer, "middle") == "middle"
