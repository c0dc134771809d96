"""The stage problem and its judge: worked by hand, and beside the analytic evaluator."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from meshwright.cluster import preset_cluster
from meshwright.cost.analytic import estimate
from meshwright.cost.placed import estimate_placed
from meshwright.engine import load_engine
from meshwright.errors import InputError
from meshwright.graph import Block, Graph, Operator, Role, Segment, Tensor
from meshwright.io.models import load_model
from meshwright.schedule import replay
from meshwright.search.graph_method import GRAPH_METHODS, GraphQuestion
from meshwright.search.pipelines.placed import is_named, placed_problem_of
from meshwright.search.pipelines.planning import estimate_of_plan, strategy_of
from meshwright.search.pipelines.pricing import Choices, microbatch_counts, options_of, stage_problem_of
from meshwright.search.stages import (
    PlannedStage,
    StageOption,
    StagePlan,
    StageProblem,
    evaluate,
    is_pipeline,
    pieces_and_table,
    pieces_of,
    replayed_s,
)
from meshwright.strategy import BlockRange, Recompute, expand, parse_shorthand, strategy_problems
from meshwright.workload import Workload
from stage_cases import random_problem


def problem_of_four(**changes: object) -> StageProblem:
    """Four equal units in a chain, on one device each or on two: F = 1, B = 2 and half of that."""
    options = (StageOption("one", 1), StageOption("two", 2))
    whole = StageProblem(
        units=("a", "b", "c", "d"),
        kind_U=np.zeros(4, dtype=np.int64),
        edges_E=np.array([(0, 1), (1, 2), (2, 3)]),
        bytes_E=np.array([10.0, 10.0, 10.0]),
        options=options,
        forward_HK=np.array([[1.0, 0.5]]),
        backward_HK=np.array([[2.0, 1.0]]),
        update_HK=np.array([[0.0, 0.8]]),
        weights_HK=np.array([[3.0, 3.0]]),
        state_HK=np.array([[5.0, 5.0]]),
        kept_HK=np.array([[2.0, 1.0]]),
        working_HK=np.array([[1.0, 1.0]]),
        latency_K=np.array([0.05, 0.05]),
        seconds_per_byte_K=np.array([0.01, 0.005]),
        num_devices=3,
        num_microbatches=4,
        memory_limit=100.0,
    )
    return replace(whole, **changes)  # type: ignore[arg-type]


def plan_of(*stages: tuple[tuple[int, ...], int], schedule: str = "1F1B") -> StagePlan:
    return StagePlan(tuple(PlannedStage(units, (option,) * len(units)) for units, option in stages), schedule)


def test_a_pipeline_of_two_worked_by_hand() -> None:
    cost = evaluate(problem_of_four(), plan_of(((0,), 0), ((1, 2, 3), 1)))
    # Stage 0: F = 1 + message (0.05 + 10 x 0.01) = 1.15, B = 2. Stage 1: F = 1.5, B = 3 + 0.05 + 10 x 0.005 = 3.1, and
    # a quarter of the updates, 3 x 0.8 / 4 = 0.6.
    assert cost.forward_S == pytest.approx([1.15, 1.5])
    assert cost.turn_S == pytest.approx([3.15, 5.2])
    assert cost.step_time_s == pytest.approx(3.15 + 5.2 + 3 * 5.2)
    assert cost.period_s == pytest.approx(5.2)
    # Two microbatches in flight, then one: 5 + 2 x 2 + 1, and 15 + 3 + 1.
    assert cost.in_flight_S.tolist() == [2, 1]
    assert cost.memory_S == pytest.approx([10.0, 19.0])
    assert cost.feasible


def test_an_asynchronous_pipeline_keeps_versions_and_hides_updates() -> None:
    problem = problem_of_four(update_HK=np.array([[0.0, 5.0]]))
    cost = evaluate(problem, plan_of(((0,), 0), ((1, 2, 3), 1), schedule="PipeDream"))
    # An update of 15 s beside 4.6 s of work; four turns of the slowest, no filling or draining.
    assert cost.turn_S == pytest.approx([3.15, 15.0])
    assert cost.step_time_s == pytest.approx(4 * 15.0)
    # Two versions of the first stage's weights: 3 more.
    assert cost.memory_S == pytest.approx([13.0, 19.0])


def test_gpipe_keeps_all_microbatches() -> None:
    cost = evaluate(problem_of_four(), plan_of(((0,), 0), ((1, 2, 3), 1), schedule="GPipe"))
    assert cost.memory_S == pytest.approx([5 + 4 * 2 + 1, 15 + 4 * 3 + 1])
    # All forwards, then all backwards: (1.15 + 1.5 + 3 x 1.5) + (2 + 3.7 + 3 x 3.7).
    assert cost.step_time_s == pytest.approx(7.15 + 16.8)


def test_what_does_not_fit_is_said_with_its_numbers() -> None:
    cost = evaluate(problem_of_four(memory_limit=15.0), plan_of(((0,), 0), ((1, 2, 3), 1)))
    assert cost.reasons == ("stage 1 of 3 units with 1 microbatches in flight needs 19 B of 15 B",)
    forbidden = problem_of_four(forward_HK=np.array([[1.0, np.inf]]))
    assert evaluate(forbidden, plan_of(((0,), 0), ((1, 2, 3), 1))).reasons == ("stage 1: two cannot hold its units",)


def test_no_plan_is_told_by_all_its_faults() -> None:
    with pytest.raises(InputError) as error:
        evaluate(problem_of_four(), StagePlan((PlannedStage((0, 1, 1), (0, 1, 1)), PlannedStage((2,), (1, 1)))))
    text = str(error.value)
    assert "b: is on 2 stages; every unit is on one" in text
    assert "d: is on 0 stages" in text
    assert "options on one group of devices" in text
    assert "one option for each of its units" in text
    with pytest.raises(InputError, match="there are 3"):
        evaluate(problem_of_four(), plan_of(((0,), 1), ((1, 2, 3), 1)))


def test_switching_layouts_inside_a_stage_costs_what_the_problem_says() -> None:
    options = (StageOption("x", 1, layout=0), StageOption("y", 1, layout=1))
    problem = problem_of_four(options=options, switch_AB=np.array([[0.0, 0.1], [0.2, 0.0]]), num_devices=1)
    cost = evaluate(problem, StagePlan((PlannedStage((0, 1, 2, 3), (0, 1, 1, 0)),)))
    # 6 + 3 seconds of compute, 0.4 of updates, 10 bytes from x to y and back from y to x.
    assert cost.turn_S == pytest.approx([9 + 0.4 + 10 * 0.1 + 10 * 0.2])


def test_actions_one_by_one_take_what_the_closed_form_says() -> None:
    free = {"latency_K": np.zeros(2), "seconds_per_byte_K": np.zeros(2), "num_devices": 4}
    equal = problem_of_four(**free)
    for schedule in ("1F1B", "GPipe"):
        plan = plan_of(((0,), 0), ((1,), 0), ((2,), 0), ((3,), 0), schedule=schedule)
        assert replayed_s(equal, plan) == pytest.approx(evaluate(equal, plan).step_time_s, rel=1e-12)
    for seed in range(30):
        problem = random_problem(seed)
        for plan in (plan_of(((0, 1), 0), ((2, 3, 4), 0)), plan_of(((0,), 0), ((1, 2), 0), ((3, 4), 0))):
            closed_s = evaluate(problem, plan).step_time_s
            assert closed_s * 0.9 < replayed_s(problem, plan) < closed_s * 1.1


def test_stages_that_are_not_contiguous_run_in_an_order_of_pieces() -> None:
    problem = problem_of_four(latency_K=np.zeros(2), seconds_per_byte_K=np.zeros(2), num_microbatches=1)
    plan = plan_of(((0, 2), 0), ((1, 3), 0))
    assert not is_pipeline(problem, plan)
    assert pieces_of(problem, plan) == [(0, (0,)), (1, (1,)), (0, (2,)), (1, (3,))]
    cost = evaluate(problem, plan)
    # One microbatch goes through all four pieces and back: 4 x 3. Both ranks keep both of their pieces.
    assert cost.step_time_s == pytest.approx(12.0)
    assert cost.turn_S == pytest.approx([6.0, 6.0])
    assert cost.memory_S == pytest.approx([10 + 4 + 1, 10 + 4 + 1])


@pytest.mark.parametrize("seed", range(20))
def test_an_order_of_pieces_is_legal_and_no_faster_than_its_busiest_rank(seed: int) -> None:
    problem = random_problem(seed, num_units=7)
    generator = np.random.default_rng(seed)
    stage_U = generator.integers(3, size=7)
    stage_U[:3] = (0, 1, 2)
    stages = [(tuple(np.flatnonzero(stage_U == stage).tolist()), 0) for stage in range(3)]
    plan = plan_of(*stages)
    pieces, rank_P, table = pieces_and_table(problem, plan)
    assert sorted(unit for stage in pieces.stages for unit in stage.units) == list(range(7))
    assert len(table) == 3
    # A table with a fault would be refused here.
    replay(table, lambda action: 1.0, len(pieces.stages))
    cost = evaluate(problem, plan)
    assert cost.step_time_s >= problem.num_microbatches * cost.turn_S.max() * (1 - 1e-12)
    assert len(rank_P) == len(pieces.stages)


# --- models as problems -----------------------------------------------------------------------------------------------

GRAPH = load_model("llama-3-8b")
CLUSTER = preset_cluster("dgx-h100x2")
WORKLOAD = Workload(64, 8192)

UNIFORM = [
    "tp=8,dp=2,mbs=1",
    "tp=4,dp=4,mbs=4,zero=1,sp=1",
    "tp=2,pp=4,dp=2,mbs=2,recompute=full",
    "tp=4,pp=2,dp=2,mbs=2,zero=3,sp=1",
    "pp=4,dp=4,mbs=1,zero=2,recompute=full",
    "tp=2,dp=8,zero=3,mbs=2,recompute=full",
    "pp=4,dp=4,schedule=GPipe,mbs=2,zero=1",
]


@pytest.mark.parametrize("engine", ["unknown", "megatron-core"])
@pytest.mark.parametrize("text", UNIFORM)
def test_a_uniform_plan_costs_what_the_analytic_evaluator_says(text: str, engine: str) -> None:
    """Memory to 1e-5 (what is gathered at once is taken of the largest block anywhere); time within half a percent (of
    an update's reduction a rank hides more than its blocks, and the last stage sends no message on)."""
    shorthand = parse_shorthand(text)
    strategy = expand(shorthand, GRAPH)
    software = load_engine(engine)
    expected = estimate(GRAPH, CLUSTER, strategy, WORKLOAD, software)
    problem = stage_problem_of(GRAPH, CLUSTER, software, WORKLOAD, strategy.num_microbatches(WORKLOAD))
    wanted = {key: getattr(shorthand, key) for key in ("tp", "dp", "zero", "sp", "recompute")}
    option = next(options_of(problem, **wanted))
    spans = [range(stage.blocks[0].start, stage.blocks[0].stop) for stage in strategy.stages]
    plan = plan_of(*((tuple(span), option) for span in spans), schedule=shorthand.schedule)
    cost = evaluate(problem, plan)
    assert cost.step_time_s == pytest.approx(expected.step_time_s, rel=5e-3)
    peak = cost.memory_S.max() + software.memory.reserved_bytes
    assert peak == pytest.approx(expected.peak_memory_bytes, rel=1e-5 if shorthand.schedule == "1F1B" else 0.05)
    # And it is written as the strategy that it is.
    assert strategy_of(problem, plan, GRAPH, WORKLOAD) == strategy


def test_an_estimate_sums_to_its_totals() -> None:
    problem = stage_problem_of(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD, 16)
    option, other = (next(options_of(problem, tp=tp, dp=8 // tp, sp=1, zero=1)) for tp in (4, 2))
    plan = plan_of((tuple(range(16)), option), (tuple(range(16, 34)), other))
    question = GraphQuestion(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD)
    found = estimate_of_plan(problem, plan, question)
    assert sum(found.time.values()) == pytest.approx(found.step_time_s, rel=1e-12)
    assert sum(found.memory.values()) == pytest.approx(found.peak_memory_bytes, rel=1e-12)
    cost = evaluate(problem, plan)
    assert found.peak_memory_bytes == pytest.approx(cost.memory_S.max() + 2 * 2**30)
    assert 0 < found.mfu == found.hfu < 1
    # 16 microbatches of 4 x 8192 x 4096 numbers of 2 bytes, from a group of 8.
    assert found.communication["pp"] == pytest.approx(16 * 4 * 8192 * 4096 * 2 / 8)


def test_recomputation_is_counted_in_hfu() -> None:
    problem = stage_problem_of(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD, 16)
    option = next(options_of(problem, tp=4, dp=4, recompute=Recompute.FULL))
    question = GraphQuestion(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD)
    found = estimate_of_plan(problem, plan_of((tuple(range(34)), option)), question)
    expected = estimate(
        GRAPH, CLUSTER, expand(parse_shorthand("tp=4,dp=4,recompute=full"), GRAPH), WORKLOAD, load_engine("unknown")
    )
    assert found.hfu / found.mfu == pytest.approx(expected.hfu / expected.mfu)


def test_stages_that_differ_have_meshes_of_their_own() -> None:
    problem = stage_problem_of(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD, 16)
    small, large = (next(options_of(problem, tp=tp, dp=dp, sp=0, zero=0)) for tp, dp in ((4, 1), (4, 2)))
    plan = plan_of((tuple(range(8)), small), (tuple(range(8, 16)), small), (tuple(range(16, 34)), large))
    strategy = strategy_of(problem, plan, GRAPH, WORKLOAD)
    assert [stage.pipeline_rank for stage in strategy.stages] == [0, 1, 2]
    assert [tuple(axis.size for axis in stage.mesh) for stage in strategy.stages] == [(4,), (4,), (2, 4)]
    assert strategy.num_devices == 16
    assert strategy.microbatch == 4
    assert strategy.stages[2].blocks == (BlockRange(16, 34),)
    assert strategy.stages[2].splits == expand(parse_shorthand("tp=4,dp=2"), GRAPH).splits


def test_runs_of_options_are_stages_in_an_order_of_their_own() -> None:
    problem = stage_problem_of(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD, 4, with_switches=True)
    one, other = (next(options_of(problem, tp=tp, dp=8 // tp, sp=1, zero=1)) for tp in (4, 2))
    stages = (
        PlannedStage(tuple(range(17)), (one,) * 5 + (other,) * 12),
        PlannedStage(tuple(range(17, 34)), (one,) * 17),
    )
    strategy = strategy_of(problem, StagePlan(stages), GRAPH, WORKLOAD)
    assert strategy.schedule == "custom"
    # The second rank has one run, halved so that both ranks have two stages.
    assert [stage.pipeline_rank for stage in strategy.stages] == [0, 0, 1, 1]
    assert [stage.blocks[0] for stage in strategy.stages] == [
        BlockRange(0, 5), BlockRange(5, 17), BlockRange(17, 25), BlockRange(25, 34)
    ]  # fmt: skip
    assert strategy.table[1] == "2F0,3F0,3B0,2B0,2F1,3F1,3B1,2B1,2F2,3F2,3B2,2B2,2F3,3F3,3B3,2B3"


def test_plans_of_equal_stages_are_legal_strategies() -> None:
    problem = stage_problem_of(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD, 16)
    option = next(options_of(problem, tp=4, dp=1))
    bounds = (0, 9, 15, 26, 34)
    plan = plan_of(*((tuple(range(i, j)), option) for i, j in pairwise(bounds)))
    assert strategy_problems(strategy_of(problem, plan, GRAPH, WORKLOAD), GRAPH, 16, WORKLOAD) == []


def test_numbers_of_microbatches_divide_the_batch() -> None:
    assert microbatch_counts(Workload(96, 1)) == (1, 2, 4, 8, 16, 32, 96)
    assert microbatch_counts(Workload(8, 1), 3) == (1, 4, 8)  # one batch without a pipeline is always tried
    with pytest.raises(InputError, match=r"must divide the batch of 64 \(nearest: 4\)"):
        stage_problem_of(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD, 5)
    with pytest.raises(InputError, match="must divide the batch of 64"):
        stage_problem_of(GRAPH, CLUSTER, load_engine("unknown"), WORKLOAD, 0)


def test_nothing_to_choose_from_is_said() -> None:
    with pytest.raises(InputError, match="no group of devices divides"):
        stage_problem_of(
            load_model("llama-3-8b"), CLUSTER, load_engine("unknown"), Workload(1, 7), 1, Choices(sizes=(16,))
        )


def test_experts_are_spread_over_a_stage() -> None:
    problem = stage_problem_of(load_model("mixtral-8x7b"), CLUSTER, load_engine("unknown"), Workload(64, 4096), 4)
    assert {option.shorthand.ep for option in problem.options if option.shorthand} == {1, 2, 4, 8}
    spread, whole = (next(options_of(problem, tp=1, dp=8, ep=ep, zero=0)) for ep in (8, 1))
    layer = problem.kind_U[1]
    assert problem.state_HK[layer, spread] < problem.state_HK[layer, whole] / 3


# --- operators placed one by one --------------------------------------------------------------------------------------


def test_a_placed_stage_costs_what_the_placed_evaluator_says() -> None:
    """One stage and one microbatch: all seconds, to the last digit or so; memory with all that lies at rest kept."""
    graph, cluster, workload = load_model("llama-3.2-1b"), preset_cluster("dgx-h100x1"), Workload(16, 2048)
    engine = load_engine("unknown")
    problem = placed_problem_of(graph, cluster, engine, workload, 1, sizes=(1, 4, 8))
    assert {option.num_devices for option in problem.options} == {1, 4, 8}
    names = {option.name for option in problem.options}
    assert {"1 fastest", "8 fastest", "8 copies", "2x4 fastest"} <= names
    for k in np.flatnonzero(problem.devices_K == 8).tolist():
        plan = plan_of((tuple(range(problem.num_units)), k))
        strategy = strategy_of(problem, plan, graph, workload)
        assert strategy_problems(strategy, graph, 8, workload) == []
        expected = estimate_placed(graph, cluster, strategy, workload, engine)
        cost = evaluate(problem, plan)
        # Tied parameters are updated by both of their blocks.
        assert cost.step_time_s == pytest.approx(expected.step_time_s, rel=0.02)
        assert cost.step_time_s >= expected.step_time_s * (1 - 1e-9)
        assert cost.memory_S[0] + 2 * 2**30 >= expected.peak_memory_bytes * 0.9


def test_copies_split_the_batch_alone() -> None:
    graph, cluster = load_model("llama-tiny"), preset_cluster("dgx-h100x1")
    problem = placed_problem_of(graph, cluster, load_engine("unknown"), Workload(16, 32), 2, sizes=(1, 2, 8))
    copied = {option.name: option for option in problem.options if option.is_copied}
    assert set(copied) == {"1 fastest", "2 copies", "8 copies"}
    for name, option in copied.items():
        if name != "1 fastest":
            dims = {
                dim
                for block in graph.blocks
                for operator in block.operators
                for dim in option.splits[block.name][operator.name].values()
            }
            assert dims == {"batch"}
    # The same parameters on one device and on eight.
    one, eight = ([option.name for option in problem.options].index(name) for name in ("1 fastest", "8 copies"))
    assert problem.weights_HK[:, one] == pytest.approx(problem.weights_HK[:, eight])


def test_placed_stages_have_meshes_of_their_own_and_are_legal() -> None:
    graph, cluster, workload = load_model("llama-3.2-1b"), preset_cluster("dgx-h100x1"), Workload(16, 2048)
    problem = placed_problem_of(graph, cluster, load_engine("unknown"), workload, 4, sizes=(2, 4))
    names = [option.name for option in problem.options]
    two, four = names.index("2 fastest"), names.index("2x2 fastest")
    units = tuple(range(problem.num_units))
    plan = plan_of((units[:4], two), (units[4:8], two), (units[8:], four))
    strategy = strategy_of(problem, plan, graph, workload)
    assert strategy.is_placed
    assert strategy.microbatch == 4
    assert strategy.num_devices == 8
    assert [[axis.size for axis in stage.mesh] for stage in strategy.stages] == [[2], [2], [2, 2]]
    assert strategy_problems(strategy, graph, 8, workload) == []


def test_models_of_other_dims_are_placed_operator_by_operator() -> None:
    assert is_named(GRAPH)
    tensors = (
        Tensor("x", ("batch", "width")),
        Tensor("w", ("other", "width"), Role.PARAMETER),
        Tensor("y", ("batch", "other")),
    )
    spec = "batch width, other width -> batch other"
    product = Operator("product", "linear", spec, ("x", "w"), ("y",), (), ("batch width other",), ("x", "w"))
    block = Block("layer", tensors, (product,), ("x",), ("y",))
    graph = Graph("mlp", {"width": 4096, "other": 4096}, (block,), (Segment(("layer",), 6),))
    assert not is_named(graph)
    question = GraphQuestion(
        graph, preset_cluster("dgx-h100x1"), load_engine("unknown"), Workload(4096, 1), microbatches=4
    )
    for name in ("alpa", "pipedream", "piper", "layerwise"):
        answer = GRAPH_METHODS[name](question)
        best = answer.found[0]
        assert best.estimate.feasible
        assert strategy_problems(best.strategy, graph, 8, question.workload) == []
