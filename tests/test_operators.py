"""The operator-level space: its costs are those of the strategies it stands for, folding is exact, its optimum is that
of brute force, and no classical plan is cheaper."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from meshwright.choice import Instance, cost_of, peak_of
from meshwright.cluster import preset_cluster
from meshwright.cost.block import price_step
from meshwright.cost.layouts import Machine, machine_of
from meshwright.cost.lifetimes import lifetimes, remakable
from meshwright.cost.operators import (
    MovePrices,
    all_codes,
    codes_of,
    operator_columns,
    placed_pricing,
    seconds_of,
    split_of,
)
from meshwright.cost.placed import estimate_placed, moved
from meshwright.engine import load_engine
from meshwright.errors import InputError
from meshwright.graph import Block, Graph, Operator, Role, Segment, Tensor, graph_problems
from meshwright.io.models import load_model
from meshwright.io.native import dumps, loads
from meshwright.search.choose.elimination import eliminate, plan_of
from meshwright.search.choose.solver import within
from meshwright.search.operators import OperatorSpace, operator_space
from meshwright.search.place import mesh_of, place, untied_bound
from meshwright.sharding import (
    FREE,
    PARTIAL,
    REPLICATE,
    SUMMANDS,
    AxisRule,
    Phase,
    Placement,
    Shard,
    lay_out_operator,
    local_numel,
    operator_splits,
    redistribution,
)
from meshwright.strategy import MeshAxis, strategy_problems
from meshwright.workload import Workload

CLUSTER = preset_cluster("dgx-h100x1")
ENGINE = load_engine("pytorch-fsdp")
WORKLOAD = Workload(16, 1024)
MACHINE = machine_of(CLUSTER, ENGINE, WORKLOAD)


def mesh(*sizes: int) -> tuple[MeshAxis, ...]:
    return tuple(MeshAxis(name, size) for name, size in zip("xyz", sizes, strict=False))


def random_choice(space: OperatorSpace, rng: np.random.Generator) -> np.ndarray:
    """A legal choice: state is cut at least as its parameter, what runs again finds what it reads."""
    choice_N = np.array([rng.integers(len(node.codes_CA)) for node in space.nodes])
    splits = space.splits(choice_N)
    for own in splits.values():
        for key in [key for key in own if key.endswith("@state")]:
            stored = {axis: dim for axis, dim in own[key.removesuffix("@state")].items() if dim != "*"}
            own[key] = {**own[key], **stored}
    again: dict[str, list[str]] = {}
    if any(node.again_C.any() for node in space.nodes):
        for block in space.graph.blocks:
            there = {name for operator in block.operators for name in operator.saves}
            for operator in block.operators:
                read = {name for name in operator.inputs if block.tensor[name].role is Role.ACTIVATION}
                if operator.name in remakable(block) and read <= there and rng.random() < 0.5:
                    again.setdefault(block.name, []).extend(operator.outputs)
                    there |= set(operator.outputs)
    try:
        return space.choice(splits, again)
    except InputError:  # the state cannot be cut evenly along its parameter's dims and others
        return random_choice(space, rng)


# --- prices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(8,), (32, 8), (4, 2, 8)], ids=str)
def test_moves_are_priced_like_their_steps(sizes: tuple[int, ...]) -> None:
    cluster = preset_cluster("dgx-h100x32")
    machine = machine_of(cluster, ENGINE, WORKLOAD)
    degrees = {axis.name: axis.size for axis in mesh(*sizes)}
    order, dims, numel = tuple(degrees), ("a", "b", "c"), {"a": 1024, "b": 512, "c": 256}
    pricing = placed_pricing(machine, WORKLOAD, numel, degrees)
    codes = all_codes([0, 1, 2, 3, 4], list(numel.values()), list(degrees.values()))
    found = MovePrices(pricing, machine.levels).seconds(codes, codes, 2 * math.prod(numel.values()))

    def placements(row: list[int]) -> dict[str, Placement]:
        return {a: (REPLICATE, PARTIAL)[c] if c < 2 else Shard(dims[c - 2]) for a, c in zip(order, row, strict=True)}

    rows = codes.tolist()
    assert [codes_of(placements(row), dims, order) for row in rows] == rows
    pairs = list(itertools.product(range(len(rows)), repeat=2))
    if len(pairs) > 2000:
        pairs = [pairs[index] for index in np.random.default_rng(0).choice(len(pairs), 2000, replace=False)]
    for one, other in pairs:
        seconds = 0.0
        for step in redistribution(placements(rows[one]), placements(rows[other]), order):
            if step.collective not in FREE:
                size = 2 * local_numel(dims, step.larger, numel, degrees)
                seconds += float(price_step(step, size, pricing, machine.levels).took.seconds)
        assert found[one, other] == pytest.approx(seconds, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("model", ["llama-3-70b", "mixtral-8x7b", "gpt2"])
def test_operators_are_priced_in_columns_like_one_by_one(model: str) -> None:
    graph, degrees = load_model(model), {"x": 4, "y": 2}
    pricing = placed_pricing(MACHINE, WORKLOAD, graph.sizes(16, 1024), degrees)
    for block in graph.blocks:
        for operator in block.operators:
            sizes = [pricing.extents.sizes[block.dim_aliases(operator)[dim]] for dim in operator.dims]
            dims = [2 + place for place, dim in enumerate(operator.dims) if operator.splittable(dim)]
            codes = all_codes([0, *dims], sizes, [4, 2])
            columns = operator_columns(block, operator, codes, pricing, MACHINE.levels, is_end=False)
            for row, forward, backward in zip(codes.tolist(), columns.forward, columns.backward, strict=True):
                split = split_of(row, operator.dims, ("x", "y"), ("", SUMMANDS))
                layout = lay_out_operator(block, operator, split)
                one = seconds_of(block, layout, pricing, MACHINE.levels, is_end=False)
                assert (forward, backward) == pytest.approx((float(one.forward), float(one.backward)), rel=1e-12)


def test_no_gradient_is_made_that_nobody_asks_for() -> None:
    # A frozen weight has no gradient of its own, and where nothing before it is trained, nothing goes back at all.
    def linear(weight: bool, x: bool) -> tuple[Block, Operator]:
        operator = Operator("f", "einsum", "batch i, i o -> batch o", ("x", "w"), ("y",), contractions=("batch i o",))
        tensors = (
            Tensor("x", ("batch", "i"), differentiable=x),
            Tensor("w", ("i", "o"), Role.PARAMETER, differentiable=weight),
            Tensor("y", ("batch", "o"), differentiable=x or weight),
        )
        return Block("b", tensors, (operator,), ("x",), ("y",)), operator

    pricing = placed_pricing(MACHINE, WORKLOAD, {"batch": 4096, "i": 4096, "o": 4096}, {"x": 2})
    found = {}
    for weight, x in itertools.product((True, False), repeat=2):
        block, operator = linear(weight, x)
        layout = lay_out_operator(block, operator, {})
        found[weight, x] = float(seconds_of(block, layout, pricing, MACHINE.levels, is_end=False).backward)
    assert found[False, False] == 0
    assert found[True, True] == pytest.approx(found[True, False] + found[False, True])
    assert found[True, False] == pytest.approx(found[False, True])


def test_a_bias_is_no_factor_of_a_product() -> None:
    # Its gradient is a sum over the batch; as a product of area 2048 it would take thirty times as long as the linear.
    tensors = (
        Tensor("x", ("batch", "i")),
        Tensor("w", ("o", "i"), Role.PARAMETER),
        Tensor("bias", ("o",), Role.PARAMETER),
        Tensor("y", ("batch", "o")),
    )
    plain = Operator("f", "linear", "batch i, o i -> batch o", ("x", "w"), ("y",), contractions=("batch i o",))
    biased = dataclasses.replace(plain, spec="batch i, o i, o -> batch o", inputs=("x", "w", "bias"))
    block = Block("b", tensors, (biased,), ("x",), ("y",))
    pricing = placed_pricing(MACHINE, WORKLOAD, {"batch": 4096, "i": 512, "o": 2048}, {"x": 2})
    one, other = (
        seconds_of(block, lay_out_operator(block, operator, {}), pricing, MACHINE.levels, is_end=False)
        for operator in (plain, biased)
    )
    assert float(other.forward) == pytest.approx(float(one.forward), rel=1e-2)
    assert float(other.backward) == pytest.approx(float(one.backward), rel=1e-2)


def test_a_recurrent_layer_takes_what_its_products_take() -> None:
    # Two products over 32 x 64 steps: x with (w, i), the state with (w, h); each as a linear of its own.
    tensors = (
        Tensor("x", ("batch", "t", "i")),
        Tensor("w_x", ("w", "i"), Role.PARAMETER),
        Tensor("w_h", ("v", "h"), Role.PARAMETER),
        Tensor("y", ("batch", "t", "o")),
    )
    lstm = Operator(
        "f", "lstm", "batch t i, w i, v h -> batch t o", ("x", "w_x", "w_h"), ("y",),
        unsplit=("t", "i", "w", "v", "h", "o"), contractions=("batch t w i", "batch t v h"),
    )  # fmt: skip
    linear = Operator("g", "linear", "batch t i, w i -> batch t w", ("x", "w_x"), ("z",), contractions=("batch t w i",))
    block = Block("b", (*tensors, Tensor("z", ("batch", "t", "w"))), (lstm, linear), ("x",), ("y",))
    sizes = {"batch": 32, "t": 64, "i": 512, "h": 512, "w": 2048, "v": 2048, "o": 512}
    pricing = placed_pricing(MACHINE, WORKLOAD, sizes, {"x": 2})
    whole, part = (
        seconds_of(block, lay_out_operator(block, operator, {}), pricing, MACHINE.levels, is_end=False)
        for operator in (lstm, linear)
    )
    assert float(whole.forward) == pytest.approx(2 * float(part.forward), rel=0.1)
    assert float(whole.backward) == pytest.approx(2 * float(part.backward), rel=0.1)


def test_neighbours_exchange_the_rims_that_a_convolution_reads() -> None:
    tensors = (
        Tensor("x", ("batch", "cin", "row")),
        Tensor("w", ("cin", "cout", "tap"), Role.PARAMETER),
        Tensor("y", ("batch", "cout", "row")),
    )
    conv = Operator(
        "conv",
        "conv",
        "batch cin row, cin cout tap -> batch cout row",
        ("x", "w"),
        ("y",),
        unsplit=("tap",),
        contractions=("batch cin row cout tap",),
        saves=("x", "w"),
        halo={"row": (1, 1)},
    )
    block = Block("b", tensors, (conv,), ("x",), ("y",))
    sizes = {"batch": 8, "cin": 64, "cout": 64, "row": 4096, "tap": 3}
    pricing = placed_pricing(MACHINE, WORKLOAD, sizes, {"x": 4, "y": 2})
    plain = dataclasses.replace(conv, halo={})

    def seconds(operator: Operator, split: dict[str, str]) -> tuple[float, float]:
        found = seconds_of(block, lay_out_operator(block, operator, split), pricing, MACHINE.levels, is_end=False)
        return float(found.forward), float(found.backward)

    assert seconds(conv, {"x": "batch"}) == seconds(plain, {"x": "batch"})
    # Two rows of 8 x 64 numbers of 2 bytes, one after the other, to neighbours in the same node; and back.
    level = MACHINE.levels[0]
    rim = 2 * (8 * 64 * 2 / level.bandwidth_Bps + level.latency_s)
    for with_halo, without in zip(seconds(conv, {"x": "row"}), seconds(plain, {"x": "row"}), strict=True):
        assert with_halo - without == pytest.approx(rim)


# --- the space and the strategies it stands for -----------------------------------------------------------------------

OPTIONS = {"plain": {}, "state": {"with_state": True}, "recompute": {"with_recompute": True}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("llama-3-70b", (4, 2)),
        ("llama-3-70b", (2, 2, 2)),
        ("gpt2", (8,)),
        ("mixtral-8x7b", (4, 2)),
        ("gemma-2-9b", (2, 4)),
    ],
)
def test_a_choice_costs_what_its_strategy_does(model: str, sizes: tuple[int, ...], options: str) -> None:
    # Two ways to the same numbers: the instance's tables, and the strategy laid out and priced step by step. 240 plans.
    graph, rng = load_model(model), np.random.default_rng(7)
    space = operator_space(graph, mesh(*sizes), MACHINE, WORKLOAD, memory_limit=math.inf, **OPTIONS[options])
    times = set()
    for _ in range(16):
        choice_N = random_choice(space, rng)
        strategy = space.strategy(choice_N)
        assert (space.choice(strategy.splits, strategy.recomputed) == choice_N).all()
        assert strategy_problems(strategy, graph, 8, WORKLOAD) == []
        step = moved(graph, strategy, MACHINE, WORKLOAD)
        assert step.seconds == pytest.approx(cost_of(space.instance, choice_N), rel=1e-9)
        assert step.peak_bytes == pytest.approx(peak_of(space.instance, choice_N) + space.fixed_bytes, rel=1e-9)
        assert bool(strategy.recomputed) == (options == "recompute")
        times.add(step.seconds)
    assert len(times) == 16


def test_an_estimate_of_a_placed_strategy_has_ledgers_that_sum() -> None:
    graph, rng = load_model("llama-3-8b"), np.random.default_rng(3)
    space = operator_space(graph, mesh(4, 2), MACHINE, WORKLOAD, with_recompute=True)
    strategy = space.strategy(random_choice(space, rng))
    found = estimate_placed(graph, CLUSTER, strategy, WORKLOAD, ENGINE)
    assert sum(found.time.values()) == pytest.approx(found.step_time_s)
    assert sum(found.memory.values()) == pytest.approx(found.peak_memory_bytes)
    assert found.time["recompute"] > 0
    assert found.hfu > found.mfu > 0
    assert set(found.communication) == {"x", "y"}
    assert not found.feasible
    assert "pipeline rank 0" in found.reasons[0]


def test_placed_strategies_are_written_and_read() -> None:
    graph, rng = load_model("llama-tiny"), np.random.default_rng(3)
    space = operator_space(graph, mesh(2, 2), MACHINE, WORKLOAD, with_recompute=True)
    strategy = space.strategy(random_choice(space, rng))
    assert strategy.recomputed
    assert loads(dumps(strategy), "strategy") == strategy


# --- folding ---------------------------------------------------------------------------------------------------------


def unfolded(graph: Graph) -> Graph:
    """The same model with a block of its own for every instance."""
    blocks, segments = [], []
    for index, name in enumerate(graph.sequence):
        blocks.append(dataclasses.replace(graph.block[name], name=f"{name}.{index}"))
        segments.append(Segment((f"{name}.{index}",)))
    return dataclasses.replace(graph, blocks=tuple(blocks), segments=tuple(segments), tied=())


def with_layers(model: str, repeat: int) -> Graph:
    graph = load_model(model)
    segments = tuple(
        dataclasses.replace(segment, repeat=repeat) if index == 1 else segment
        for index, segment in enumerate(graph.segments)
    )
    return dataclasses.replace(graph, segments=segments, tied=())


@pytest.mark.parametrize("repeat", [1, 2, 3, 6])
@pytest.mark.parametrize("model", ["llama-tiny", "gemma-2-9b"])
@pytest.mark.parametrize("options", ["plain", "recompute"])
def test_folded_blocks_take_and_hold_what_unfolded_ones_do(model: str, repeat: int, options: str) -> None:
    graph, rng = with_layers(model, repeat), np.random.default_rng(repeat)
    long = unfolded(graph)
    assert graph_problems(long) == []
    space = operator_space(graph, mesh(2, 2), MACHINE, WORKLOAD, **OPTIONS[options])
    for _ in range(4):
        strategy = space.strategy(random_choice(space, rng))
        own = {
            f"{name}.{index}": (strategy.splits[name], strategy.recomputed.get(name, ()))
            for index, name in enumerate(graph.sequence)
        }
        other = dataclasses.replace(
            strategy,
            splits={name: splits for name, (splits, _) in own.items()},
            recomputed={name: again for name, (_, again) in own.items() if again},
        )
        one, many = (moved(g, s, MACHINE, WORKLOAD) for g, s in ((graph, strategy), (long, other)))
        assert one.seconds == pytest.approx(many.seconds)
        assert one.peak_bytes == pytest.approx(many.peak_bytes)
    assert lifetimes(graph).num_times < lifetimes(long).num_times or repeat == 1


def encoder_decoder(repeat: int) -> Graph:
    """A decoder whose blocks all read the encoder's output, which is handed through them."""
    encoder = Block(
        "encoder",
        (
            Tensor("ids", ("batch", "i"), Role.INPUT),
            Tensor("w", ("i", "h"), Role.PARAMETER),
            Tensor("m", ("batch", "h")),
        ),
        (Operator("lift", "einsum", "batch i, i h -> batch h", ("ids", "w"), ("m",), contractions=("batch i h",)),),
        outputs=("m", "m"),
    )
    encoder = dataclasses.replace(
        encoder,
        tensors=(*encoder.tensors, Tensor("x", ("batch", "h"))),
        operators=(
            *encoder.operators,
            Operator("start", "activation", "batch h -> batch h", ("m",), ("x",), saves=("m",)),
        ),
        outputs=("x", "m"),
    )
    decoder = Block(
        "decoder",
        (
            Tensor("x", ("batch", "h")),
            Tensor("m", ("batch", "h")),
            Tensor("z", ("batch", "h")),
            Tensor("y", ("batch", "h")),
        ),
        (
            Operator("cross", "mul", "batch h, batch h -> batch h", ("x", "m"), ("z",), saves=("x", "m")),
            Operator("act", "activation", "batch h -> batch h", ("z",), ("y",), saves=("z",)),
        ),
        inputs=("x", "m"),
        outputs=("y", "m"),
    )
    return Graph(
        "encdec", {"i": 64, "h": 128}, (encoder, decoder), (Segment(("encoder",)), Segment(("decoder",), repeat))
    )


@pytest.mark.parametrize("repeat", [1, 2, 3, 5])
def test_what_is_handed_through_all_blocks_is_held_once(repeat: int) -> None:
    graph, rng = encoder_decoder(repeat), np.random.default_rng(repeat)
    assert graph_problems(graph) == []
    space = operator_space(graph, mesh(2, 4), MACHINE, WORKLOAD)
    for _ in range(10):
        strategy = space.strategy(random_choice(space, rng))
        splits = {f"{name}.{index}": strategy.splits[name] for index, name in enumerate(graph.sequence)}
        one = moved(graph, strategy, MACHINE, WORKLOAD)
        many = moved(unfolded(graph), dataclasses.replace(strategy, splits=splits), MACHINE, WORKLOAD)
        assert one.peak_bytes == pytest.approx(many.peak_bytes)
        assert one.seconds == pytest.approx(many.seconds)
    # By hand, on one device, at the peak, the first backward: m once, x and z of every decoder, and what the model
    # returns, [16, 128] of 2 bytes each.
    alone = operator_space(graph, mesh(1), MACHINE, WORKLOAD)
    found = moved(graph, alone.strategy(np.zeros(len(alone.nodes), dtype=int)), MACHINE, WORKLOAD)
    assert found.memory["activations"] == (2 + 2 * repeat) * 16 * 128 * 2


# --- optima ----------------------------------------------------------------------------------------------------------


def perceptron() -> Graph:
    block = Block(
        "net",
        (
            Tensor("x", ("batch", "i"), Role.INPUT, differentiable=False),
            Tensor("w", ("i", "h"), Role.PARAMETER),
            Tensor("z", ("batch", "h")),
            Tensor("a", ("batch", "h")),
            Tensor("v", ("h", "o"), Role.PARAMETER),
            Tensor("y", ("batch", "o")),
        ),
        (
            Operator("up", "einsum", "batch i, i h -> batch h", ("x", "w"), ("z",), contractions=("batch i h",)),
            Operator("act", "activation", "batch h -> batch h", ("z",), ("a",), saves=("z",)),
            Operator("down", "einsum", "batch h, h o -> batch o", ("a", "v"), ("y",), contractions=("batch h o",)),
        ),
    )
    return Graph("perceptron", {"i": 256, "h": 1024, "o": 256}, (block,), (Segment(("net",)),))


@pytest.mark.parametrize("batch", [8, 512, 4096])
def test_the_best_plan_is_the_best_of_all_plans(batch: int) -> None:
    # Every strategy of a small network on two devices, laid out and priced; and the best of those that fit into less
    # memory than the fastest needs, down to what the smallest needs, and below.
    graph, workload = perceptron(), Workload(batch, 1)
    machine = machine_of(CLUSTER, ENGINE, workload)
    space = operator_space(graph, mesh(2), machine, workload, memory_limit=math.inf)
    assert 500 < space.num_strategies < 3000
    found = []
    for chosen in itertools.product(*(range(len(node.codes_CA)) for node in space.nodes)):
        step = moved(graph, space.strategy(np.array(chosen)), machine, workload)
        found.append((step.seconds, step.peak_bytes))
    least, fastest = min(peak for _, peak in found), min(found)
    bests = []
    for limit in (math.inf, fastest[1], (least + fastest[1]) / 2, least, least - 1):
        best = min((seconds for seconds, peak in found if peak <= limit), default=math.inf)
        answer = place(graph, mesh(2), machine, workload, memory_limit=limit)
        assert answer.cost_s == pytest.approx(best)
        assert answer.lower_bound_s == pytest.approx(best)
        assert (answer.strategy is None) == bool(answer.reasons) == (limit < least)
        bests.append(best)
    assert bests[0] == bests[1] == fastest[0]
    assert bests[2] > bests[1] or bests[3] > bests[1], "memory costs time"
    assert "usable even if all lies as small as it can" in answer.reasons[0]


LLAMA = load_model("llama-3-70b")
POD = preset_cluster("dgx-h100x32")


def layers_only(repeat: int = 80) -> Graph:
    return dataclasses.replace(LLAMA, blocks=(LLAMA.block["layer"],), segments=(Segment(("layer",), repeat),), tied=())


def best_of(instance: Instance) -> np.ndarray:
    plan = plan_of(instance)
    assert plan is not None
    return eliminate(plan).choice()


HEADS = ("kv_heads", "ffn", "vocab")
CLASSICAL = {
    "data parallel": (AxisRule("x", ("batch",)), AxisRule("y", ("batch",))),
    "tensor parallel": (AxisRule("x", ("batch",)), AxisRule("y", HEADS)),
    "tensor and sequence parallel": (AxisRule("x", ("batch",)), AxisRule("y", HEADS, ("seq",))),
    "context parallel": (AxisRule("x", ("batch",)), AxisRule("y", ("seq",))),
}


@pytest.mark.parametrize("sharded", [False, True], ids=["whole weights", "FSDP"])
@pytest.mark.parametrize("name", CLASSICAL)
def test_no_classical_plan_is_better(name: str, sharded: bool) -> None:
    # Operators split as in the classical plan; activations lie as is best for it; weights whole, or sharded along x.
    workload = Workload(256, 8192)
    machine = machine_of(POD, ENGINE, workload)
    space = operator_space(LLAMA, mesh(32, 8), machine, workload, memory_limit=math.inf)
    splits = {}
    for block in LLAMA.blocks:
        rules = operator_splits(block, CLASSICAL[name])
        splits[block.name] = {operator.name: rules[operator.name] for operator in block.operators}
        for tensor in block.parameters:
            reader = next(each for each in block.operators if tensor.name in each.inputs)
            dims = reader.input_dims[reader.inputs.index(tensor.name)]
            stored = {axis: dim for axis, dim in splits[block.name][reader.name].items() if dim in dims}
            if sharded:
                stored["x"] = "hidden" if "hidden" in tensor.dims else tensor.dims[0]
            splits[block.name][tensor.name] = stored
    choice_N = best_of(space.pinned(splits))
    classical_s = cost_of(space.instance, choice_N)
    assert math.isfinite(classical_s)
    assert {key: space.splits(choice_N)["layer"][key] for key in splits["layer"]} == splits["layer"]
    assert cost_of(space.instance, best_of(space.instance)) <= classical_s * (1 + 1e-12)


MEGATRON = {
    **{key: {"x": "batch", "y": "seq"} for key in ("norm1", "add1", "norm2", "add2", "x", "y", "middle")},
    **{key: {"x": "batch", "y": "*"} for key in ("norm1_out", "norm2_out")},
    **{
        key: {"x": "batch", "y": "kv_heads"}
        for key in (
            "q",
            "k",
            "v",
            "q_rotary",
            "k_rotary",
            "attention",
            "out",
            "q@rest",
            "k@rest",
            "v@rest",
            "context",
            "logsumexp",
        )
    },
    **{
        key: {"x": "batch", "y": "ffn"}
        for key in ("gate", "up", "activation", "down", "gate_proj", "up_proj", "activation_out")
    },
    **{key: {"x": "hidden"} for key in ("norm1.weight", "norm2.weight")},
    **{key: {"x": "hidden", "y": "kv_heads"} for key in ("q.weight", "k.weight", "v.weight", "out.weight")},
    **{key: {"x": "hidden", "y": "ffn"} for key in ("gate.weight", "up.weight", "down.weight")},
}


def test_megatron_with_fsdp_by_hand() -> None:
    # FSDP 32 x tensor parallelism 8 with sequence parallelism. Per layer and rank along y: the norms' outputs lie whole
    # ([1, 8192, 8192] of 2 bytes), so they are gathered where they are made; their gradients, and the results of out
    # and down, are scattered; the gradients of these are gathered: 8 collectives, each sends 7/8 of 128 MiB.
    workload = Workload(32, 8192)
    machine = machine_of(POD, ENGINE, workload)
    graph = layers_only()
    space = operator_space(graph, mesh(32, 8), machine, workload, memory_limit=math.inf)
    choice_N = space.choice({"layer": MEGATRON})
    step = moved(graph, space.strategy(choice_N), machine, workload)
    whole = 8192 * 8192 * 2
    # Beside these the gradients of two norms' weights are summed along y, of which a rank has 1/32.
    norms = 2 * 2 * 7 / 8 * 8192 / 32 * 2
    assert step.communication["y"] == pytest.approx(80 * (8 * 7 / 8 * whole + norms))
    (layer,) = step.blocks
    moves = [
        (m.tensor, m.phase.value, s.step.collective.value)
        for m in layer.moves
        for s in m.steps
        if "y" in s.step.axes and not m.tensor.endswith("weight")
    ]
    assert sorted(moves) == sorted(
        [
            ("norm1_out", "forward", "all_gather"),
            ("norm2_out", "forward", "all_gather"),
            ("attention_out", "forward", "reduce_scatter"),
            ("mlp_out", "forward", "reduce_scatter"),
            ("norm1_out", "backward", "reduce_scatter"),
            ("norm2_out", "backward", "reduce_scatter"),
            ("attention_out", "backward", "all_gather"),
            ("mlp_out", "backward", "all_gather"),
        ]
    )
    # Along x every weight is gathered twice and its gradient scattered once. A layer has 8192 x (64 + 64 + 8 + 8) x 128
    # + 3 x 8192 x 28672 weights in products, of which a rank along y has an eighth, and two norms of 8192.
    weights = (8192 * (64 + 64 + 8 + 8) * 128 + 3 * 8192 * 28672) / 8 + 2 * 8192
    assert step.communication["x"] == pytest.approx(80 * 3 * 31 / 32 * weights * 2)
    assert layer.operators[1].inputs[1].local_shape == (1, 8, 128, 8192)
    assert {move.phase for move in layer.moves} == {Phase.FORWARD, Phase.BACKWARD, Phase.REGATHER}


def test_the_optimum_of_a_large_model() -> None:
    # 32 sequences cannot be split over 256 devices: what comes out is tensor parallelism of 8 with sequence
    # parallelism.
    workload = Workload(32, 8192)
    machine = machine_of(POD, ENGINE, workload)
    answer = place(layers_only(), POD, machine, workload, memory_limit=math.inf)
    assert answer.strategy is not None
    assert answer.gap < 1e-9
    best = answer.strategy.splits["layer"]
    for name, split in MEGATRON.items():
        if not name.endswith("weight"):
            assert best[name] == split, name
    assert answer.untied_bound_s == pytest.approx(answer.cost_s)
    assert "no plan that splits equal blocks in different ways is better" in answer.statement
    # Under the memory of the devices the weights are sharded along x too, and it takes longer.
    tight = place(LLAMA, POD, machine, workload, deadline=within(60))
    assert tight.strategy is not None
    assert tight.gap < 1e-9
    assert tight.cost_s > answer.cost_s
    assert any("x" in tight.strategy.splits["layer"][name] for name in MEGATRON if name.endswith("weight"))
    assert peak_of(tight.space.instance, tight.choice_N) <= tight.space.instance.limit
    assert estimate_placed(LLAMA, POD, tight.strategy, workload, ENGINE).feasible


def test_more_freedom_is_never_slower() -> None:
    workload = Workload(32, 8192)
    machine = machine_of(POD, ENGINE, workload)
    plain, state, again = (
        place(layers_only(), mesh(32, 8), machine, workload, deadline=within(60), **options)
        for options in OPTIONS.values()
    )
    assert state.cost_s <= plain.cost_s
    assert again.cost_s <= plain.cost_s
    assert all(answer.gap < 1e-6 for answer in (plain, state, again))


def test_recomputation_makes_a_large_batch_fit() -> None:
    workload = Workload(256, 8192)
    machine = machine_of(POD, ENGINE, workload)
    graph = layers_only()
    refused = place(graph, POD, machine, workload, deadline=within(30))
    assert refused.strategy is None
    assert refused.reasons
    assert "none fits" in refused.statement
    found = place(graph, POD, machine, workload, with_recompute=True, deadline=within(60))
    assert found.strategy is not None
    assert found.strategy.recomputed["layer"]
    assert peak_of(found.space.instance, found.choice_N) <= found.space.instance.limit


def test_a_chain_of_unequal_layers_is_no_better_than_the_bound_says() -> None:
    # The same model with a block for each layer: free to differ, and not below the bound.
    graph = with_layers("llama-tiny", 3)
    space = operator_space(graph, mesh(2, 2), MACHINE, WORKLOAD, memory_limit=math.inf)
    long = operator_space(unfolded(graph), mesh(2, 2), MACHINE, WORKLOAD, memory_limit=math.inf)
    free_s = cost_of(long.instance, best_of(long.instance))
    assert untied_bound(space) == pytest.approx(free_s)
    assert free_s <= cost_of(space.instance, best_of(space.instance)) * (1 + 1e-12)


def test_a_closed_graph_takes_in_what_it_hands_out() -> None:
    one, many = layers_only(1), layers_only(80)
    workload = Workload(32, 8192)
    machine = machine_of(POD, ENGINE, workload)
    closed = place(one, mesh(32, 8), machine, workload, memory_limit=math.inf, is_closed=True)
    folded = place(many, mesh(32, 8), machine, workload, memory_limit=math.inf)
    assert 80 * closed.cost_s == pytest.approx(folded.cost_s)
    assert closed.strategy is not None
    assert closed.strategy.splits["layer"]["x"] == closed.strategy.splits["layer"]["y"]
    assert place(one, mesh(32, 8), machine, workload, memory_limit=math.inf).cost_s <= closed.cost_s


def test_axes_of_one_rank_split_nothing() -> None:
    graph = load_model("llama-tiny")
    one = place(graph, mesh(4, 1, 2), MACHINE, WORKLOAD, memory_limit=math.inf)
    assert one.strategy is not None
    assert one.strategy.mesh == mesh(4, 1, 2)
    other = place(graph, (MeshAxis("x", 4), MeshAxis("z", 2)), MACHINE, WORKLOAD, memory_limit=math.inf)
    assert one.cost_s == pytest.approx(other.cost_s)
    alone = place(graph, mesh(1), MACHINE, WORKLOAD, memory_limit=math.inf)
    assert alone.strategy is not None
    assert moved(graph, alone.strategy, MACHINE, WORKLOAD).communication == {}
    assert [axis.size for axis in mesh_of(preset_cluster("dgx-h100x4"))] == [4, 8]
    assert [axis.size for axis in mesh_of(CLUSTER)] == [8]


def test_summands_travel_through_linear_operators() -> None:
    # Two row-parallel products whose sums are added before they are reduced: one reduction instead of two.
    names = ("a", "b")
    tensors = [Tensor("out", ("batch", "o")), Tensor("z", ("batch", "o"))]
    operators = []
    for name in names:
        tensors += [
            Tensor(f"x{name}", ("batch", f"h{name}"), Role.INPUT),
            Tensor(f"w{name}", (f"h{name}", "o"), Role.PARAMETER),
            Tensor(f"y{name}", ("batch", "o")),
        ]
        spec = f"batch h{name}, h{name} o -> batch o"
        contraction = (f"batch h{name} o",)
        operators.append(
            Operator(f"f{name}", "einsum", spec, (f"x{name}", f"w{name}"), (f"y{name}",), contractions=contraction)
        )
    spec = "batch o, batch o -> batch o"
    operators.append(Operator("add", "sum", spec, ("ya", "yb"), ("z",), linear=True))
    operators.append(Operator("act", "activation", "batch o -> batch o", ("z",), ("out",), unsplit=("o", "batch")))
    block = Block("b", tuple(tensors), tuple(operators), (), ("out",))
    graph = Graph("g", {"ha": 4096, "hb": 4096, "o": 4096}, (block,), (Segment(("b",)),))
    workload = Workload(1, 1)
    machine = machine_of(CLUSTER, ENGINE, workload)
    best = {}
    for linear in (True, False):
        own = tuple(dataclasses.replace(each, linear=linear and each.name == "add") for each in operators)
        own_graph = dataclasses.replace(graph, blocks=(dataclasses.replace(block, operators=own),))
        answer = place(own_graph, mesh(8), machine, workload, memory_limit=math.inf)
        assert answer.strategy is not None
        best[linear] = answer
        step = moved(own_graph, answer.strategy, machine, workload)
        assert step.seconds == pytest.approx(answer.cost_s)
    assert best[True].strategy.splits["b"]["add"] == {"x": SUMMANDS}
    assert best[True].cost_s < best[False].cost_s


def test_what_has_no_backward_holds_nothing_in_it() -> None:
    # An index is computed from data and used to gather rows: neither has a gradient.
    block = Block(
        "b",
        (
            Tensor("x", ("batch", "i"), Role.INPUT),
            Tensor("index", ("batch",), dtype="int64", differentiable=False),
            Tensor("table", ("n", "o"), Role.PARAMETER),
            Tensor("y", ("batch", "o")),
            Tensor("z", ("batch", "o")),
        ),
        (
            Operator("best", "argmax", "batch i -> batch", ("x",), ("index",), unsplit=("i",)),
            Operator("rows", "gather", "batch, n o -> batch o", ("index", "table"), ("y",), saves=("index",)),
            Operator("act", "activation", "batch o -> batch o", ("y",), ("z",), saves=("y",)),
        ),
        outputs=("z",),
    )
    graph = Graph("g", {"i": 4, "n": 64, "o": 32}, (block,), (Segment(("b",)),))
    assert graph_problems(graph) == []
    space, rng = operator_space(graph, mesh(2, 2), MACHINE, WORKLOAD), np.random.default_rng(5)
    for _ in range(50):
        choice_N = random_choice(space, rng)
        step = moved(graph, space.strategy(choice_N), MACHINE, WORKLOAD)
        assert step.seconds == pytest.approx(cost_of(space.instance, choice_N), rel=1e-9)
        assert step.peak_bytes == pytest.approx(peak_of(space.instance, choice_N) + space.fixed_bytes, rel=1e-9)
        assert all(move.phase is not Phase.BACKWARD for move in step.blocks[0].moves if move.tensor == "index")


@pytest.mark.parametrize("name", ["llama_block", "unet", "dlrm"])
def test_traced_models_are_placed(name: str) -> None:
    pytest.importorskip("torch")
    from meshwright.io.torch_graph import traced_function

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "models"))
    try:
        graph = traced_function(f"architectures:{name}").graph
    finally:
        sys.path.pop(0)
    workload = Workload(16, 1)
    machine = machine_of(CLUSTER, ENGINE, workload)
    answer = place(graph, mesh(4, 2), machine, workload, memory_limit=math.inf)
    assert answer.strategy is not None
    assert answer.gap < 1e-9
    assert strategy_problems(answer.strategy, graph, 8, workload) == []
    space, rng = answer.space, np.random.default_rng(2)
    for choice_N in [answer.choice_N, *(random_choice(space, rng) for _ in range(8))]:
        assert choice_N is not None
        step = moved(graph, space.strategy(choice_N), machine, workload)
        assert step.seconds == pytest.approx(cost_of(space.instance, choice_N), rel=1e-9)
        assert step.peak_bytes == pytest.approx(peak_of(space.instance, choice_N) + space.fixed_bytes, rel=1e-9)


# --- what is refused --------------------------------------------------------------------------------------------------


def placed(**changes: dict[str, str]) -> list[str]:
    graph = load_model("llama-tiny")
    space = operator_space(graph, mesh(4, 2), MACHINE, WORKLOAD)
    strategy = space.strategy(np.zeros(len(space.nodes), dtype=int))
    splits = {name: {**own, **(changes if name == "layer" else {})} for name, own in strategy.splits.items()}
    found = strategy_problems(dataclasses.replace(strategy, splits=splits), graph, 8, WORKLOAD)
    return [str(problem) for problem in found]


def test_problems_of_placed_strategies_name_what_is_wrong() -> None:
    assert placed() == []
    dims = "batch, seq, ffn, hidden"
    cases = {
        ("w", "batch"): ["no such mesh axis", "x"],
        ("x", "ffm"): ["dims that may be split", "ffn"],
        ("x", "head_dim"): ["dims that may be split", dims.split(",")[0]],
        ("x", SUMMANDS): ["linear operators"],
    }
    for (axis, dim), words in cases.items():
        (text,) = placed(gate={axis: dim})
        assert all(word in text for word in ("splits.layer.gate", *words)), text
    (text,) = placed(**{"gate.weight": {"x": "seq"}})
    assert "dims that may be split: ffn, hidden" in text
    (text,) = placed(norm1={"x": "hidden"})
    assert "dims that may be split: batch, seq" in text
    (text,) = placed(nosuch={"x": "batch"})
    assert "no such operator or tensor at rest" in text


def test_what_does_not_divide_names_what_does() -> None:
    graph = load_model("llama-tiny")
    space = operator_space(graph, mesh(8, 3), MACHINE, WORKLOAD)
    strategy = space.strategy(np.zeros(len(space.nodes), dtype=int))
    own = {**strategy.splits["layer"], "gate": {"x": "batch", "y": "batch"}}
    wrong = dataclasses.replace(strategy, splits={**strategy.splits, "layer": own})
    (problem,) = strategy_problems(wrong, graph, 24, WORKLOAD)
    assert (problem.where, problem.rule) == ("splits.layer.gate", "24 pieces must divide batch = 16")
    assert problem.nearest == "x: batch"
    (problem,) = strategy_problems(strategy, graph, 8, WORKLOAD)
    assert (problem.value, problem.rule) == ("x=8 x y=3", "must be the cluster's 8 devices")


def test_missing_and_foreign_entries_are_all_named() -> None:
    graph = load_model("llama-tiny")
    space = operator_space(graph, mesh(4, 2), MACHINE, WORKLOAD)
    strategy = space.strategy(np.zeros(len(space.nodes), dtype=int))
    layer = {key: split for key, split in strategy.splits["layer"].items() if key not in ("gate", "middle")}
    layer["gate.weight"] = {"y": "ffn"}
    layer["gate.weight@state"] = {"x": "ffn"}
    wrong = dataclasses.replace(
        strategy,
        splits={**strategy.splits, "layer": layer, "lawyer": {}},
        recomputed={"layer": ("gate_porj",), "embeding": ()},
    )
    found = {problem.value: problem for problem in strategy_problems(wrong, graph, 8, WORKLOAD)}
    assert found["gate"].rule == found["middle"].rule == "its split is missing"
    assert found["lawyer"].nearest == "layer"
    assert found["gate_porj"].nearest == "gate_proj"
    assert found["embeding"].nearest == "embedding"
    assert "may only be cut further" in found["y: "].rule
    with pytest.raises(InputError) as error:
        space.choice({"layer": {**layer, "up": {"q": "batch"}}})
    assert len(error.value.problems) > 3
    assert any(problem.value == "q" and "no such mesh axis" in problem.rule for problem in error.value.problems)


# --- speed -----------------------------------------------------------------------------------------------------------


def test_a_layer_takes_a_tenth_of_a_second() -> None:
    # 0.04 CPU-seconds on a quiet core, to the proven optimum; the limit leaves room for a loaded one.
    workload = Workload(32, 8192)
    machine: Machine = machine_of(POD, ENGINE, workload)
    place(layers_only(), mesh(32, 8), machine, workload, memory_limit=math.inf)
    start = time.process_time()
    answer = place(layers_only(), mesh(32, 8), machine, workload, memory_limit=math.inf)
    assert answer.gap == 0
    assert time.process_time() - start < 0.3
