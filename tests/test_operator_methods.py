"""Methods on the space of operators: exact ones equal brute force, others are legal and not below the bound, what
papers say is what is done, and what cannot be asked is refused."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import meshwright.search.placing  # noqa: F401  (registers the methods)
from choose_cases import brute_force, check_solved, random_instance
from meshwright.choice import cost_of, instance_of, peak_of
from meshwright.cluster import Cluster, preset_cluster
from meshwright.cost.layouts import machine_of
from meshwright.cost.placed import estimate_placed
from meshwright.engine import load_engine
from meshwright.errors import InputError
from meshwright.graph import Block, Graph, Operator, Role, Segment, Tensor, graph_problems
from meshwright.io.models import load_model
from meshwright.search.choose.frontier import pareto_front
from meshwright.search.choose.solver import Deadline, within
from meshwright.search.graph_method import GRAPH_METHODS, GraphAnswer, GraphQuestion, Placed
from meshwright.search.operators import OperatorSpace, operator_space
from meshwright.search.placing.classics import finest_row, stream_of
from meshwright.search.placing.double_recursive import divided
from meshwright.search.placing.flexflow import Search
from meshwright.search.placing.narrow import completed, narrowed, settled
from meshwright.search.placing.tensoropt import at_the_turn, hull, unbeaten
from meshwright.search.placing.wiring import sides_of
from meshwright.strategy import MeshAxis, Strategy, strategy_problems
from meshwright.workload import Workload

POD = preset_cluster("dgx-h100x1")
ENGINE = load_engine("pytorch-fsdp")

#: Those that find the best placement on one mesh, state in shards of its own included.
EXACT = ("operators", "elimination", "ilp")
OTHERS = (
    "beam",
    "annealing",
    "flexflow",
    "double_recursive",
    "tensoropt",
    "data_parallel",
    "fsdp",
    "megatron",
    "random_operators",
)


def mesh(*sizes: int) -> tuple[MeshAxis, ...]:
    return tuple(MeshAxis(name, size) for name, size in zip("xyz", sizes, strict=False))


def with_devices(number: int, memory_bytes: float = math.inf) -> Cluster:
    """A part of a node whose devices have so much memory, or plenty."""
    (group,) = POD.groups
    memory = replace(group.device.memory_bytes, value=memory_bytes if math.isfinite(memory_bytes) else 2.0**50)
    levels = tuple(replace(level, group_size=number) for level in POD.levels[:1])
    device = replace(group.device, memory_bytes=memory)
    return replace(POD, groups=(replace(group, device=device, count=number),), levels=levels)


def perceptron(width: int = 1024, outer: int = 256, *, residual: bool = False) -> Graph:
    """Two products with an activation between, in one block; with a sum of input and output where asked for."""
    tensors = [
        Tensor("x", ("batch", "i"), Role.INPUT, differentiable=False),
        Tensor("w", ("i", "h"), Role.PARAMETER),
        Tensor("z", ("batch", "h")),
        Tensor("a", ("batch", "h")),
        Tensor("v", ("h", "i"), Role.PARAMETER),
        Tensor("y", ("batch", "i")),
    ]
    operators = [
        Operator("up", "einsum", "batch i, i h -> batch h", ("x", "w"), ("z",), contractions=("batch i h",)),
        Operator("act", "activation", "batch h -> batch h", ("z",), ("a",), saves=("z",)),
        Operator("down", "einsum", "batch h, h i -> batch i", ("a", "v"), ("y",), contractions=("batch h i",)),
    ]
    if residual:
        tensors.append(Tensor("s", ("batch", "i")))
        operators.append(Operator("sum", "add", "batch i, batch i -> batch i", ("y", "x"), ("s",)))
    block = Block("net", tuple(tensors), tuple(operators))
    graph = Graph("perceptron", {"i": outer, "h": width}, (block,), (Segment(("net",)),))
    assert not graph_problems(graph)
    return graph


def ask(
    graph: Graph, workload: Workload, *sizes: int, memory: float = math.inf, seconds: float = 60.0, seed: int = 0
) -> GraphQuestion:
    cluster = with_devices(math.prod(sizes), memory)
    return GraphQuestion(graph, cluster, ENGINE, workload, mesh=mesh(*sizes), seed=seed, deadline=within(seconds))


def space_of(question: GraphQuestion, *, with_state: bool = False) -> OperatorSpace:
    machine = machine_of(question.cluster, question.engine, question.workload)
    return operator_space(question.graph, question.mesh, machine, question.workload, with_state=with_state)


def answer(method: str, question: GraphQuestion) -> GraphAnswer:
    return GRAPH_METHODS[method](question)


def best(found: GraphAnswer) -> Strategy:
    assert found.found, found.reasons
    return found.found[0].strategy


def net_splits(found: GraphAnswer) -> dict[str, dict[str, str]]:
    return best(found).splits["net"]


# --- exact methods ----------------------------------------------------------------------------------------------------

SMALL = {
    "wide": (perceptron(4096, 64), Workload(8, 1)),
    "long": (perceptron(64, 64), Workload(4096, 1)),
    "residual": (perceptron(512, 512, residual=True), Workload(512, 1)),
}


def least_peak(space: OperatorSpace) -> tuple[float, float]:
    """Bytes that the fastest choice needs, and that the smallest does, by trying all."""
    sizes = [range(size) for size in space.instance.num_strategies_N.tolist()]
    choices = [np.array(choice) for choice in itertools.product(*sizes)]
    fastest = min(choices, key=lambda choice_N: cost_of(space.instance, choice_N))
    smallest = min(peak_of(space.instance, choice_N) for choice_N in choices)
    return peak_of(space.instance, fastest) + space.fixed_bytes, smallest + space.fixed_bytes


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("binds", [False, True], ids=["plenty", "binding"])
def test_exact_methods_equal_brute_force(name: str, binds: bool) -> None:
    graph, workload = SMALL[name]
    question = ask(graph, workload, 2)
    if binds:
        fastest, smallest = least_peak(space_of(question))
        usable = smallest + 0.3 * (fastest - smallest)
        question = ask(graph, workload, 2, memory=usable * (1 + 1e-9) / (1 - 0.06))
    plain, with_state = (brute_force(space_of(question, with_state=state).instance) for state in (False, True))
    for method in EXACT:
        found = answer(method, question)
        assert found.found[0].estimate.step_time_s == pytest.approx(with_state.cost, rel=1e-9), method
        assert found.lower_bound_s == pytest.approx(with_state.cost, rel=1e-6)
        assert found.certificate.exhaustive
        assert found.certificate.statement.startswith("optimal among")
    found = answer("exhaustive_operators", question)
    assert found.found[0].estimate.step_time_s == pytest.approx(plain.cost, rel=1e-9)
    assert found.lower_bound_s == pytest.approx(plain.cost, rel=1e-9)
    for method in OTHERS:
        for placed in answer(method, question).found:
            assert placed.estimate.feasible
            assert placed.estimate.step_time_s >= with_state.cost * (1 - 1e-9), method


def test_too_many_choices_are_not_tried() -> None:
    found = answer("exhaustive_operators", ask(load_model("llama-tiny"), Workload(8, 64), 2, 2))
    assert not found.found
    assert "too many to try" in found.reasons[0]


# --- all methods ------------------------------------------------------------------------------------------------------

TINY = load_model("llama-tiny")


@pytest.mark.parametrize("method", [*EXACT, *OTHERS, "gspmd", "portfolio"])
def test_answers_are_legal_repeatable_and_not_below_the_bound(method: str) -> None:
    annotations = {"layer/x": {"x": "batch"}, "layer/gate.weight": {"y": "ffn"}}

    def asked() -> GraphQuestion:
        question = ask(TINY, Workload(16, 64), 2, 2, seconds=60)
        return replace(question, annotations=annotations) if method == "gspmd" else question

    question = ask(TINY, Workload(16, 64), 2, 2)
    bound = answer("elimination", question).lower_bound_s
    first, second = answer(method, asked()), answer(method, asked())
    strategy, estimate = best(first), first.found[0].estimate
    assert strategy == best(second)
    assert not strategy_problems(strategy, TINY, 4, question.workload)
    assert estimate == estimate_placed(TINY, question.cluster, strategy, question.workload, ENGINE)
    assert estimate.feasible
    assert estimate.step_time_s >= bound * (1 - 1e-9)
    assert first.lower_bound_s <= estimate.step_time_s * (1 + 1e-9)
    assert first.certificate.method == method
    assert first.certificate.statement


@pytest.mark.parametrize("method", [*EXACT, *OTHERS, "gspmd"])
def test_where_nothing_fits_reasons_have_numbers(method: str) -> None:
    question = ask(TINY, Workload(16, 64), 2, 4, memory=(ENGINE.memory.reserved_bytes + 2.0**16) / (1 - 0.06))
    question = replace(question, annotations={"layer/x": {"x": "batch"}} if method == "gspmd" else {})
    found = answer(method, question)
    assert not found.found
    assert any("iB" in reason for reason in found.reasons), found.reasons


@pytest.mark.parametrize("method", ["operators", "flexflow", "random_operators", "double_recursive", "tensoropt"])
def test_the_deadline_is_obeyed(method: str) -> None:
    model, cluster = load_model("llama-3-8b"), preset_cluster("dgx-h100x4")
    question = GraphQuestion(model, cluster, ENGINE, Workload(64, 4096))
    answer(method, replace(question, deadline=within(0.0)))  # what is imported and compiled once
    for seconds in (0.0, 0.5):
        began = time.monotonic()
        answer(method, replace(question, deadline=within(seconds)))
        assert time.monotonic() - began < seconds + 4.0


def test_what_a_method_does_not_know_is_refused() -> None:
    question = ask(TINY, Workload(16, 64), 2, 4)
    asked = replace(
        question,
        objective="pareto",
        cuts=(1,),
        microbatches=4,
        annotations={"layer/x": {"x": "batch"}},
        with_recompute=True,
        mesh=mesh(4, 4),
    )
    with pytest.raises(InputError) as caught:
        answer("flexflow", asked)
    assert [str(problem) for problem in caught.value.problems] == [
        "objective = pareto: flexflow answers for step_time (nearest: --method tensoropt)",
        "annotations = layer/x: flexflow chooses all splits; gspmd completes given ones (nearest: --method gspmd)",
        "cuts = 1: flexflow makes no stages; gpipe takes cuts (nearest: --method gpipe)",
        "microbatches = 4: flexflow makes no pipeline: a step is one batch; alpa does (nearest: 1)",
        "recompute: flexflow keeps all activations; operators chooses which to make again "
        "(nearest: --method operators)",
        f"mesh = 4x4: must have the 8 devices of {question.cluster.name} (nearest: 8)",
    ]


def test_without_a_mesh_it_is_the_clusters_own() -> None:
    question = GraphQuestion(TINY, preset_cluster("dgx-h100x2"), ENGINE, Workload(32, 64))
    assert best(answer("data_parallel", question)).mesh == mesh(2, 8)


# --- the part that is chosen exactly ----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_memory", [False, True])
def test_what_is_left_free_is_chosen_best(with_memory: bool) -> None:
    generator = np.random.default_rng(5)
    for _ in range(100):
        instance = random_instance(generator, 6, with_memory=with_memory)
        allowed = {
            node: np.sort(generator.choice(size, int(generator.integers(1, size + 1)), replace=False))
            for node, size in enumerate(instance.num_strategies_N.tolist())
            if generator.random() < 0.6
        }
        part = narrowed(instance, allowed)
        optimum = brute_force(part.instance)
        solved = completed(instance, allowed, Deadline())
        assert solved.lower_bound <= optimum.cost + 1e-9
        if solved.choice_N is not None:
            check_solved(instance, replace(solved, lower_bound=-math.inf), -math.inf)
            assert all(solved.choice_N[node] in own for node, own in allowed.items())
        if not with_memory:
            assert solved.cost == optimum.cost
            if math.isfinite(optimum.cost):
                cut = completed(instance, allowed, Deadline(), below=optimum.cost)
                assert cut.choice_N is None  # not cheaper than what is known


# --- FlexFlow ---------------------------------------------------------------------------------------------------------


def test_a_walk_keeps_count_of_what_states_cost() -> None:
    # The sum of accepted rises is the cost from scratch, and that is the least over what lies at rest.
    space = space_of(ask(TINY, Workload(16, 64), 2, 2))
    sides, generator = sides_of(space), np.random.default_rng(3)
    search = Search(space.instance, sides, generator.integers(space.instance.num_strategies_N), generator)
    for _ in range(5):
        node = sides.operators[int(generator.integers(len(sides.operators)))]
        to = int(generator.integers(space.instance.num_strategies_N[node]))
        before = search.cost()
        rise, beside = search._rise(node, to)
        search.choice_N[node] = to
        search.beside.update(beside)
        assert search.cost() - before == pytest.approx(rise, abs=1e-12)
        solved = settled(replace(space.instance, limit=math.inf), sides.operators, search.choice_N, Deadline())
        assert search.cost() == pytest.approx(solved.cost, rel=1e-9)


def test_walks_find_the_optimum_of_a_small_network() -> None:
    graph, workload = SMALL["wide"]
    question = ask(graph, workload, 2, 2)
    optimum = answer("tensoropt", question).lower_bound_s  # state lies as parameters do, as it does here
    found = answer("flexflow", question)
    assert found.found[0].estimate.step_time_s == pytest.approx(optimum, rel=1e-6)


def test_walks_leave_what_does_not_fit() -> None:
    # Data parallelism, where walks begin, and the fastest need more than there is: prices rise until states fit.
    graph, workload = SMALL["wide"]
    fastest, smallest = least_peak(space_of(ask(graph, workload, 2)))
    memory = (smallest + 0.2 * (fastest - smallest)) / (1 - 0.06)
    question = ask(graph, workload, 2, memory=memory)
    assert not answer("data_parallel", question).found
    found = answer("flexflow", question)
    assert found.found[0].estimate.feasible


# --- double recursive -------------------------------------------------------------------------------------------------


def test_a_division_takes_what_moves_least() -> None:
    # Eight samples and 2 x 64 x 4096 weights: splitting h moves a result of 8 x 64, splitting the batch the gradients
    # of all weights.
    splits = net_splits(answer("double_recursive", ask(*SMALL["wide"], 2)))
    assert [splits[operator]["x"] for operator in ("up", "act", "down")] == ["h", "h", "h"]


@pytest.mark.parametrize("name", SMALL)
def test_each_operator_picks_what_costs_least_beside_those_before(name: str) -> None:
    # By brute force over what lies at rest, on instances that have the operators alone that have picked.
    space = space_of(ask(*SMALL[name], 2))
    instance, sides = space.instance, sides_of(space)
    picked = divided(space, sides)
    heaviest_first = sorted(sides.operators, key=lambda node: -instance.costs(node)[0])
    for place, node in enumerate(heaviest_first):
        there = [*heaviest_first[: place + 1], *sides.resting]
        number = {old: new for new, old in enumerate(there)}
        edges = [
            (number[one], number[other], instance.matrix(edge))
            for edge, (one, other) in enumerate(instance.edges_E.tolist())
            if one in number and other in number
        ]
        part = instance_of([instance.costs(old) for old in there], edges)
        before = {number[old]: picked[old : old + 1] for old in heaviest_first[:place]}
        costs = [
            brute_force(narrowed(part, {**before, number[node]: np.array([row])}).instance).cost
            for row in range(len(instance.costs(node)))
        ]
        assert costs[picked[node]] == pytest.approx(min(costs), rel=1e-12)


def test_divisions_go_from_the_outermost_axis_in() -> None:
    # What an axis further in decides does not change what those further out did.
    graph, workload = SMALL["residual"]
    one, two = (space_of(ask(graph, workload, *sizes)) for sizes in ((2, 1), (2, 4)))
    outer, both = divided(one, sides_of(one)), divided(two, sides_of(two))
    for node, number in enumerate(sides_of(two).operators):
        assert two.nodes[number].codes_CA[both[number], 0] == one.nodes[number].codes_CA[outer[node], 0]


# --- TensorOpt --------------------------------------------------------------------------------------------------------


def test_the_front_is_that_of_all_choices() -> None:
    graph, workload = SMALL["wide"]
    space = space_of(ask(graph, workload, 2))
    instance = at_the_turn(space)
    sizes = [range(size) for size in instance.num_strategies_N.tolist()]
    choices = [np.array(choice) for choice in itertools.product(*sizes)]
    points = sorted((cost_of(instance, choice_N), peak_of(instance, choice_N)) for choice_N in choices)
    least, expected = math.inf, []
    for cost, usage in points:
        if usage < least * (1 - 1e-12):
            expected.append((cost, usage))
            least = usage
    front = pareto_front(instance)
    assert np.array([(cost, usage) for cost, usage, _ in front]) == pytest.approx(np.array(expected), rel=1e-9)
    peaks = [peak_of(space.instance, choice_N) for choice_N in unbeaten(space, front.choices_FN)]
    assert peaks == sorted(peaks, reverse=True)


def test_the_hull_has_the_corners_of_the_front() -> None:
    # Brute force over all choices: corners are the points that are the cheapest at some price of memory.
    for name in SMALL:
        instance = at_the_turn(space_of(ask(*SMALL[name], 2)))
        front = [(cost, usage) for cost, usage, _ in pareto_front(instance)]
        corners, bound = hull(instance, Deadline())
        found = sorted((cost_of(instance, choice_N), peak_of(instance, choice_N)) for choice_N in corners)
        assert found[0][0] == pytest.approx(front[0][0], rel=1e-9) == bound
        assert found[-1][1] == pytest.approx(front[-1][1], rel=1e-9)
        for price in np.geomspace(1e-15, 1e-3, 60):
            least = min(cost + price * usage for cost, usage in front)
            assert min(cost + price * usage for cost, usage in found) == pytest.approx(least, rel=1e-8)


def test_all_compromises_are_strategies_of_their_own() -> None:
    def fronts(objective: str) -> tuple[Placed, ...]:
        question = replace(ask(*SMALL["residual"], 2, 4), objective=objective)
        found = answer("tensoropt", question)
        is_of_time = objective != "memory"  # bounds are of time, and the least peak is not proven
        assert math.isfinite(found.gap) == found.certificate.exhaustive == is_of_time
        return found.found

    found = fronts("pareto")
    assert len(found) > 3
    times = [placed.estimate.step_time_s for placed in found]
    peaks = [placed.estimate.peak_memory_bytes for placed in found]
    assert times == sorted(times)
    assert peaks == sorted(peaks, reverse=True)
    (fastest,), (smallest,) = fronts("step_time"), fronts("memory")
    assert fastest.strategy == found[0].strategy
    assert smallest.strategy == found[-1].strategy


# --- GSPMD ------------------------------------------------------------------------------------------------------------


def complete(graph: Graph, workload: Workload, *sizes: int, **placements: dict[str, str]) -> dict[str, dict[str, str]]:
    annotations = {f"net/{name}": split for name, split in placements.items()}
    return net_splits(answer("gspmd", replace(ask(graph, workload, *sizes), annotations=annotations)))


def test_a_batch_spreads_to_everything_that_has_one() -> None:
    splits = complete(*SMALL["residual"], 2, x={"x": "batch"})
    batch = {"x": "batch"}
    names = ("up", "act", "down", "sum", "z")
    assert {name: splits[name] for name in names} == dict.fromkeys(names, batch)
    assert splits["w"] == splits["v"] == {}


def test_annotations_on_two_axes_are_merged() -> None:
    # The samples of x meet the columns of w in z; the second product sums over its rows, as a sum over y.
    splits = complete(*SMALL["residual"], 2, 2, x={"x": "batch"}, w={"y": "h"})
    assert splits["up"] == splits["act"] == splits["z"] == {"x": "batch", "y": "h"}
    assert splits["down"] == {"x": "batch", "y": "h"}
    assert splits["sum"] == {"x": "batch"}
    assert splits["v"] == {}  # contracted dims are not spread from operand to operand


def test_placements_spread_back_from_results() -> None:
    splits = complete(*SMALL["long"], 2, y={"x": "i"})
    assert splits["down"] == splits["v"] == {"x": "i"}
    assert splits["act"] == {}


def test_elementwise_operators_go_first() -> None:
    # z could be cut along h by the weight, or along the batch by what its neighbour makes: that is asked first.
    splits = complete(*SMALL["long"], 2, a={"x": "batch"}, w={"x": "h"})
    assert splits["z"] == splits["up"] == {"x": "batch"}


def test_a_users_split_of_an_operator_stands() -> None:
    splits = complete(*SMALL["long"], 2, act={"x": "h"}, x={"x": "batch"})
    assert splits["act"] == splits["z"] == {"x": "h"}


def test_what_is_handed_on_spreads_from_block_to_block() -> None:
    question = replace(ask(TINY, Workload(16, 64), 2, 4), annotations={"embedding/tokens": {"x": "batch"}})
    splits = best(answer("gspmd", question)).splits
    assert all(splits[block][name]["x"] == "batch" for block, name in (("layer", "add2"), ("head", "lm")))


def test_annotations_that_cannot_be_are_all_named() -> None:
    annotations = {
        "nett/x": {"x": "batch"},
        "net/ww": {"x": "h"},
        "net/w": {"q": "h"},
        "net/v": {"x": "bach"},
        "net/up": {"x": "hh"},
        "net/x": {"x": "batch"},
        "net/act": {"x": "batch", "y": "batch"},
    }
    graph = perceptron(64, 64)
    question = replace(ask(graph, Workload(6, 1), 2, 4), annotations=annotations)
    with pytest.raises(InputError) as caught:
        answer("gspmd", question)
    told = [str(problem) for problem in caught.value.problems]
    assert told[:5] == [
        "annotations = nett/x: no such block; blocks: net (nearest: net/x)",
        "annotations = net/ww: net has no such tensor or operator (nearest: net/w)",
        "annotations = net/w: q=h: no such mesh axis; axes: x, y (nearest: x)",
        "annotations = net/v: x=bach: no such dim; dims: h, i",
        "annotations = net/up: x=hh: no such dim; dims: batch, i, h (nearest: h)",
    ]
    assert told[5].startswith("annotations = net/act: x=batch, y=batch: a dim is cut only where")
    assert "x alone could cut batch, h" in told[5]
    assert len(told) == 6
    with pytest.raises(InputError, match="at least one placement"):
        answer("gspmd", replace(question, annotations={}))


# --- classics ---------------------------------------------------------------------------------------------------------


def test_data_parallelism_copies_weights_and_cuts_the_batch() -> None:
    splits = net_splits(answer("data_parallel", ask(*SMALL["long"], 2, 2)))
    batch = {"x": "batch", "y": "batch"}
    assert splits["up"] == splits["act"] == splits["down"] == splits["z"] == batch
    assert splits["w"] == splits["v"] == {}


def test_fsdp_cuts_weights_along_the_first_dim_that_divides() -> None:
    splits = net_splits(answer("fsdp", ask(perceptron(64, 6), Workload(64, 1), 2, 2)))
    assert splits["w"] == {"x": "h", "y": "h"}  # 6 rows are not for 4
    assert splits["v"] == {"x": "h", "y": "h"}
    assert splits["up"] == {"x": "batch", "y": "batch"}


def test_megatron_follows_from_the_dims_alone() -> None:
    found = answer("megatron", ask(TINY, Workload(16, 64), 4, 2))
    layer, head = (best(found).splits[name] for name in ("layer", "head"))
    cut = {name: layer[name].get("y") for name in ("norm1", "q", "attention", "out", "add1", "gate", "down")}
    heads = "kv_heads"
    assert cut == {
        "norm1": "seq", "q": heads, "attention": heads, "out": heads, "add1": "seq", "gate": "ffn", "down": "ffn"
    }  # fmt: skip
    assert head["lm"] == {"x": "batch", "y": "vocab"}
    assert layer["gate.weight"] == layer["down.weight"] == {"y": "ffn"}
    assert layer["down.weight@state"] == {"x": "hidden", "y": "ffn"}
    assert stream_of(TINY.block["layer"]) == ("batch", "seq", "hidden")


def test_megatron_on_three_axes_where_a_bias_is_too_short_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "examples" / "models")
    question = ask(load_model("architectures:dlrm"), Workload(8, 1), 2, 2, 2)
    assert strategy_problems(best(answer("megatron", question)), question.graph, 8, question.workload) == []


def test_a_batch_that_is_too_small_is_cut_as_often_as_it_can() -> None:
    found = answer("data_parallel", ask(*SMALL["wide"], 4, 4))
    assert net_splits(found)["up"] == {"x": "batch"}  # 8 samples: 4 pieces, not 16
    assert "4 devices do the same" in found.certificate.statement


def test_the_finest_row_prefers_outer_axes() -> None:
    space = space_of(ask(*SMALL["wide"], 2, 8))
    node = next(node for node in space.nodes if node.name == "net/up")
    chosen = node.codes_CA[finest_row(space, node, [[0], [0]])].tolist()
    assert chosen == [0, 2]  # eight pieces rather than two
    assert node.codes_CA[finest_row(space, node, [[], []])].tolist() == [0, 0]


def test_activations_made_again_make_room() -> None:
    question = GraphQuestion(load_model("llama-3-70b"), preset_cluster("dgx-h100x32"), ENGINE, Workload(256, 8192))
    kept = answer("operators", question)
    assert not kept.found
    assert "however placed, a step needs" in kept.reasons[0]
    again = answer("operators", replace(question, with_recompute=True))
    assert best(again).recomputed["layer"]
    assert again.found[0].estimate.feasible
