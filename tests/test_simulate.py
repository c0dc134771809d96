"""The simulated step: folded as unfolded, alike at every detail, near the closed form, and explained to the second."""

from __future__ import annotations

import dataclasses
from functools import cache
from itertools import pairwise

import numpy as np
import pytest

from meshwright.cluster import Cluster, DeviceGroup, Quantity, preset_cluster
from meshwright.cost.analytic import Case, estimate_case
from meshwright.engine import Engine, load_engine
from meshwright.errors import InputError
from meshwright.graph import Graph
from meshwright.io.models import load_model
from meshwright.schedule import ActionKind, replay
from meshwright.sim.build import build
from meshwright.sim.conditions import Conditions, condition_problems, parse_factors, spread
from meshwright.sim.evaluators import evaluate, evaluator_name
from meshwright.sim.program import Detail
from meshwright.sim.step import Simulation, graph_of, run, simulate
from meshwright.sim.timeline import critical_path, idle, memory_over_time, trace_of
from meshwright.strategy import CUSTOM, BlockRange, Stage, Strategy, expand, parse_shorthand, strategy_problems
from meshwright.workload import Workload


@cache
def model(name: str) -> Graph:
    return load_model(name)


def case(
    text: str,
    name: str = "llama-3-8b",
    cluster: str | Cluster = "dgx-h100x2",
    batch: int = 16,
    seq: int = 4096,
    engine: str | Engine = "megatron-core",
) -> Case:
    where = preset_cluster(cluster) if isinstance(cluster, str) else cluster
    software = load_engine(engine) if isinstance(engine, str) else engine
    workload = Workload(batch, seq)
    found = Case(model(name), where, expand(parse_shorthand(text), model(name)), workload, software)
    assert not strategy_problems(found.strategy, found.graph, where.num_devices, workload)
    return found


def with_strategy(one: Case, **changes: object) -> Case:
    strategy = dataclasses.replace(one.strategy, **changes)  # type: ignore[arg-type]
    assert not strategy_problems(strategy, one.graph, one.cluster.num_devices, one.workload)
    return dataclasses.replace(one, strategy=strategy)


CASES = {
    "1F1B": case("tp=2,pp=4,dp=2,zero=1,sp=1"),
    "interleaved": case("tp=2,pp=4,dp=2,zero=1,sp=1,vpp=2,schedule=Interleaved1F1B"),
    "ZB-H1": case("tp=2,pp=4,dp=2,schedule=ZB-H1"),
    "V": case("tp=2,pp=4,dp=2,vpp=2,schedule=ZBVZeroBubble,recompute=selective"),
    "overlap": case("tp=2,pp=4,dp=2,vpp=2,schedule=DualPipeV"),
    "FSDP": case("dp=16,zero=3,recompute=full", engine="composer-fsdp"),
    "context": case("tp=2,cp=2,pp=2,dp=2,zero=2", seq=8192),
    "experts": case("tp=2,pp=2,dp=4,ep=4,zero=1", name="mixtral-8x7b"),
    "async": case("tp=2,pp=4,dp=2,schedule=PipeDream"),
}


# --- folding and detail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_folded_is_unfolded_to_the_last_bit(name: str) -> None:
    for detail in (Detail.STAGE, Detail.BLOCK):
        folded, unfolded = (simulate(CASES[name], detail=detail, unfold=unfold) for unfold in (False, True))
        devices = unfolded.graph.num_devices
        assert devices > 1
        assert unfolded.graph.num_tasks == devices * folded.graph.num_tasks
        for rank in range(len(folded.graph.ranks)):
            for device in range(devices):
                for times in ("start_N", "end_N"):
                    alone = getattr(folded.swept, times)[folded.graph.tasks_of(rank)]
                    among = getattr(unfolded.swept, times)[unfolded.graph.tasks_of(rank, device)]
                    assert np.array_equal(alone, among)
        assert folded.estimate == unfolded.estimate


@pytest.mark.parametrize("name", CASES)
def test_every_detail_takes_the_same_time(name: str) -> None:
    stage, block, operator = (simulate(CASES[name], detail=detail) for detail in Detail)
    assert block.makespan_s == pytest.approx(stage.makespan_s, rel=1e-9)
    assert operator.makespan_s == pytest.approx(stage.makespan_s, rel=1e-9)
    assert stage.graph.num_tasks < block.graph.num_tasks < operator.graph.num_tasks


@pytest.mark.parametrize("name", CASES)
def test_ledgers_sum(name: str) -> None:
    found = simulate(CASES[name]).estimate
    assert found.evaluator == "simulated"
    assert all(seconds >= 0 for seconds in found.time.values())
    assert sum(found.time.values()) == pytest.approx(found.step_time_s, rel=1e-12)
    assert sum(found.memory.values()) == pytest.approx(found.peak_memory_bytes, rel=1e-12)
    assert 0 <= found.bubble_fraction < 1


# --- beside the closed form -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1F1B", "interleaved", "FSDP", "context", "experts", "async"])
def test_near_the_closed_form(name: str) -> None:
    one, other = simulate(CASES[name]).estimate, estimate_case(CASES[name])
    assert one.step_time_s == pytest.approx(other.step_time_s, rel=0.02)
    # The closed form takes the stages of a rank as equal, and the embedding's keeps a little less.
    assert one.peak_memory_bytes == pytest.approx(other.peak_memory_bytes, rel=1e-4)
    assert (one.mfu, one.communication) == (pytest.approx(other.mfu, rel=0.02), other.communication)


def with_hidden_messages(case_: Case) -> Case:
    """The same case with an engine that hides all messages."""
    free = dataclasses.replace(case_.engine, exposed={**case_.engine.exposed, "pp": 0.0})
    return dataclasses.replace(case_, engine=free)


@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
@pytest.mark.parametrize("m", [1, 3, 8])
def test_hidden_messages_are_a_delay(schedule: str, m: int) -> None:
    # Messages that keep nobody busy are a delay on the way, as when the table alone is replayed.
    one = with_hidden_messages(case(f"pp=4,dp=2,tp=2,schedule={schedule}", batch=2 * m))
    built = build(one)
    forward = [float(np.ravel(turn.forward_K)[rank]) for rank, turn in enumerate(built.turns)]
    backward = [float(np.ravel(turn.backward_K)[rank]) for rank, turn in enumerate(built.turns)]
    table = built.table

    def seconds(action: object) -> float:
        return (forward if action.kind is ActionKind.F else backward)[action.stage]  # type: ignore[attr-defined]

    found = simulate(one)
    message_s = float(np.ravel(built.prepared[0].message_s)[0])
    assert message_s == 0
    # The first rank's last backward ends the pipeline; what follows is the step's end.
    in_action = found.graph.ranks[0].action_n >= 0
    end_s = float(found.swept.end_N[found.graph.tasks_of(0)][in_action].max())
    lag_s = message_lag(found)
    assert lag_s > 0
    assert end_s == pytest.approx(replay(table, seconds, 4, lag_s).makespan_s, rel=1e-9)


def message_lag(found: Simulation) -> float:
    """Seconds of a message on its way."""
    own = found.graph.ranks[0]
    stream = own.streams.index("pp to 1")
    first = int(own.starts_S[stream])
    return float(own.duration_n[first : first + 2].sum())  # what blocks its sender, nothing here, and the rest


def test_without_a_flush_a_step_is_turns_of_the_slowest() -> None:
    built = build(CASES["async"])
    busy = [
        float(np.ravel(turn.forward_K)[rank] + np.ravel(turn.backward_K)[rank]) + sum(built.ends[rank].values()) / 8
        for rank, turn in enumerate(built.turns)
    ]
    found = simulate(CASES["async"]).estimate
    rest_s = found.time["stragglers"] + found.time["constant"]
    assert found.step_time_s - rest_s == pytest.approx(8 * max(busy), rel=1e-9)  # 8 microbatches a rank


def test_zero_bubble_is_faster_and_two_buffers_hold_more() -> None:
    times = {
        name: simulate(case(f"tp=2,pp=4,dp=2,{text}", batch=16)).estimate
        for name, text in {
            "1F1B": "schedule=1F1B",
            "ZB-H1": "schedule=ZB-H1",
            "ZB-H2": "schedule=ZB-H2",
            "ZBV": "vpp=2,schedule=ZBVZeroBubble",
        }.items()
    }
    assert times["ZB-H2"].step_time_s < times["ZB-H1"].step_time_s < times["1F1B"].step_time_s
    assert times["ZBV"].step_time_s < times["1F1B"].step_time_s
    assert times["ZB-H2"].peak_memory_bytes > times["ZB-H1"].peak_memory_bytes
    double = simulate(case("tp=2,pp=4,dp=2,schedule=PipeDream-2BW", batch=16)).estimate
    assert double.memory["weight_versions"] == pytest.approx(double.memory["parameters"])


def test_a_table_of_ones_own_is_the_schedule_that_it_spells() -> None:
    named = case("tp=2,pp=4,dp=2,schedule=LoopedBFS,vpp=2")
    built = build(named)
    rows = tuple(",".join(map(str, row)) for row in built.table)
    own = with_strategy(named, schedule=CUSTOM, table=rows)
    assert simulate(own).estimate == simulate(named).estimate


def test_stages_that_are_not_contiguous() -> None:
    # FTPipe: the embedding and the head on one rank, two stages each.
    named = case("pp=2,dp=4,tp=2,vpp=2,schedule=Interleaved1F1B")
    stages = (
        Stage(0, (BlockRange(0, 5), BlockRange(20, 24))),
        Stage(1, (BlockRange(5, 15),)),
        Stage(0, (BlockRange(15, 20), BlockRange(24, 26))),
        Stage(1, (BlockRange(26, 34),)),
    )
    one = with_strategy(named, stages=stages)
    found, regular = simulate(one).estimate, simulate(named).estimate
    assert found.step_time_s > regular.step_time_s  # stages are less even
    assert found.time["compute"] != regular.time["compute"]


# --- unlike devices ---------------------------------------------------------------------------------------------------


def mixed(first: str, second: str) -> Cluster:
    one, other = preset_cluster(f"{first}x1"), preset_cluster(f"{second}x1")
    groups = (DeviceGroup(one.groups[0].device, 8), DeviceGroup(other.groups[0].device, 8))
    whole = preset_cluster("dgx-h100x2")
    return dataclasses.replace(whole, name="mixed", groups=groups)


def test_each_rank_runs_at_the_speed_of_its_own_devices() -> None:
    text = "tp=4,pp=2,dp=2,zero=1"
    fast, slow_last, slow = (
        simulate(case(text, cluster=mixed(*names)))
        for names in (("dgx-h100", "dgx-h100"), ("dgx-h100", "dgx-a100"), ("dgx-a100", "dgx-a100"))
    )
    assert fast.estimate.step_time_s < slow_last.estimate.step_time_s < slow.estimate.step_time_s
    busy = [float(slow_last.graph.ranks[rank].duration_n.sum()) for rank in range(2)]
    assert busy[0] == pytest.approx(float(fast.graph.ranks[0].duration_n.sum()), rel=0.05)
    assert busy[1] == pytest.approx(float(slow.graph.ranks[1].duration_n.sum()), rel=0.05)


def test_devices_of_one_name_and_other_numbers_are_unlike() -> None:
    whole = mixed("dgx-h100", "dgx-h100")
    fast = whole.groups[1].device
    half = {name: Quantity(peak.value / 2, peak.source) for name, peak in fast.peak_flops.items()}
    slow = DeviceGroup(dataclasses.replace(fast, peak_flops=half), 8)
    one = case("tp=4,pp=2,dp=2,zero=1", cluster=dataclasses.replace(whole, groups=(whole.groups[0], slow)))
    alike = simulate(case("tp=4,pp=2,dp=2,zero=1", cluster=whole)).estimate
    found = simulate(one).estimate
    assert found.step_time_s > 1.2 * alike.step_time_s
    # Utilisation is of all peaks together: three quarters of those of equal devices.
    used = [each.mfu * each.step_time_s * peaks for each, peaks in ((alike, 1.0), (found, 0.75))]
    assert used[0] == pytest.approx(used[1], rel=1e-12)


def test_messages_are_counted_where_stages_lie() -> None:
    sent = {name: CASES[name].strategy.most_messages for name in ("1F1B", "interleaved", "V", "FSDP")}
    # Between two ranks one each way; in a loop of two chunks twice that; a V turns on the last rank.
    assert sent == {"1F1B": 2, "interleaved": 4, "V": 4, "FSDP": 0}
    two = {
        text: case(f"tp=2,pp=2,dp=4,vpp=2,schedule={text}").strategy.most_messages
        for text in ("Interleaved1F1B", "ZBVZeroBubble")
    }
    assert two == {"Interleaved1F1B": 3, "ZBVZeroBubble": 2}


# --- conditions -------------------------------------------------------------------------------------------------------


def test_one_slow_device_holds_up_its_group_and_its_pipeline() -> None:
    one = CASES["1F1B"]
    calm = simulate(one).estimate.step_time_s
    slow = [
        simulate(one, conditions=Conditions(slow_devices={5: factor})).estimate.step_time_s for factor in (1.2, 1.5, 2)
    ]
    assert calm < slow[0] < slow[1] < slow[2]
    everywhere = simulate(one, conditions=Conditions(slow_devices=dict.fromkeys(range(4, 8), 2.0)))
    # Devices 4 to 7 are a pipeline rank: with its own group waiting anyway, one slow device costs as much as all four.
    assert slow[2] == pytest.approx(everywhere.estimate.step_time_s, rel=0.02)
    assert simulate(one, conditions=Conditions(slow_links={5: 8.0})).estimate.step_time_s > calm


def test_jitter_is_drawn_from_the_seed() -> None:
    one = CASES["1F1B"]
    graph = graph_of(build(one), unfold=True)
    built = build(one)

    def step(conditions: Conditions) -> float:
        return run(built, graph, conditions).estimate.step_time_s

    first, again, other = (step(Conditions(jitter=0.1, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    drawn = spread(step, Conditions(jitter=0.1), 20)
    assert all(low <= high for low, high in pairwise(drawn.quantiles_s.values()))
    # Everybody waits for the slowest: jitter of median 1 makes steps longer, not only wider.
    assert drawn.quantiles_s[5] > step(Conditions())


def test_what_conditions_may_not_be() -> None:
    with pytest.raises(InputError, match=r"--slow-device = 3: each part is device=factor \(nearest: 3=1.5\)"):
        parse_factors("3", "--slow-device")
    with pytest.raises(InputError, match="device 3 is there twice"):
        parse_factors("3=1.5,3=2", "--slow-device")
    with pytest.raises(InputError, match="a factor is more than 0"):
        parse_factors("3=0", "--slow-device")
    told = condition_problems(Conditions(slow_devices={16: 2.0}, jitter=9), 16)
    assert [str(problem) for problem in told] == [
        "--slow-device = 16: devices are 0 to 15 (nearest: 15)",
        "--jitter = 9: is a sigma from 0 to 2 (nearest: 0.05)",
    ]


# --- shared links -----------------------------------------------------------------------------------------------------


def test_links_that_nobody_shares_change_nothing_and_shared_ones_cost() -> None:
    one = case("tp=2,pp=4,dp=4,zero=1,sp=1", cluster="dgx-h100x4", batch=32)
    thin = tuple(
        dataclasses.replace(level, oversubscription=8.0 if index else 1.0)
        for index, level in enumerate(one.cluster.levels)
    )
    crowded = dataclasses.replace(one, cluster=dataclasses.replace(one.cluster, levels=thin))
    times = []
    for each in (one, crowded):
        built = build(each, Detail.BLOCK, shared_links=True)
        graph = graph_of(built, unfold=True)
        times.append([run(built, graph, shared_links=shared).estimate.step_time_s for shared in (False, True)])
    assert times[0][1] == pytest.approx(times[0][0], rel=1e-3)  # full bisection: hardly any
    assert times[1][0] == times[0][0]  # alone, a transfer does not feel that the core is thin
    assert times[1][1] > 1.001 * times[0][1]


# --- what a step shows ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["1F1B", "interleaved", "V", "FSDP"])
def test_the_critical_path_is_the_step(name: str) -> None:
    found = simulate(CASES[name], detail=Detail.BLOCK)
    path = critical_path(found)
    assert path[0].start_s == 0
    assert path[-1].end_s == found.makespan_s
    for one, following in pairwise(path):
        assert following.start_s == pytest.approx(one.end_s, abs=1e-12)


@pytest.mark.parametrize("name", ["1F1B", "interleaved", "ZB-H1", "V"])
def test_work_and_idle_time_are_the_step(name: str) -> None:
    found = simulate(CASES[name], detail=Detail.BLOCK)
    for rank, own in enumerate(found.graph.ranks):
        gaps = idle(found, rank)
        work_s = float(own.duration_n[own.chained_n].sum())
        total_s = gaps.warm_up_s + gaps.drain_s + gaps.imbalance_s + sum(gaps.links.values()) + work_s
        assert total_s == pytest.approx(found.makespan_s, rel=1e-9)
        assert min(gaps.warm_up_s, gaps.drain_s, gaps.imbalance_s, *gaps.links.values(), 0.0) >= -1e-9


@pytest.mark.parametrize("name", ["1F1B", "interleaved", "ZB-H1"])
def test_memory_over_time_peaks_where_the_ledger_does(name: str) -> None:
    found = simulate(CASES[name])
    for rank in range(len(found.graph.ranks)):
        moments, in_use = memory_over_time(found, rank)
        assert (np.diff(moments) >= 0).all()
        assert in_use.max() == pytest.approx(sum(found.memory[rank].values()))
        assert in_use[-1] == pytest.approx(in_use[0])


def test_every_span_of_the_trace_is_a_task() -> None:
    found = simulate(CASES["V"], detail=Detail.OPERATOR)
    trace = trace_of(found)
    assert sum(len(track.spans) for track in trace.tracks) == found.graph.num_tasks
    for track in trace.tracks:
        rank = int(track.process.removeprefix("rank "))
        own, tasks = found.graph.ranks[rank], found.graph.tasks_of(rank)
        stream = own.streams.index(track.name)
        first = int(own.starts_S[stream])
        for n, span in enumerate(track.spans, start=first):
            assert (span.start_s, span.end_s) == (found.swept.start_N[tasks][n], found.swept.end_N[tasks][n])
            if track.name == "compute" and own.action_n[n] >= 0:
                action = own.actions[own.action_n[n]]
                told = {key: span.args[key] for key in ("rank", "action", "stage", "microbatch")}
                assert told == {
                    "rank": rank,
                    "action": str(action),
                    "stage": action.stage,
                    "microbatch": action.microbatch,
                }
    critical = [span for track in trace.tracks for span in track.spans if span.args["critical"]]
    assert sum(span.end_s - span.start_s for span in critical) == pytest.approx(found.makespan_s)


# --- evaluators -------------------------------------------------------------------------------------------------------


def test_the_evaluator_is_the_one_that_was_asked_for() -> None:
    assert evaluate(CASES["1F1B"]).evaluator == "analytic"
    assert evaluate(CASES["1F1B"], "simulated").evaluator == "simulated"
    assert evaluate(CASES["V"]).evaluator == "simulated"
    with pytest.raises(InputError, match=r"no closed form of schedule ZBVZeroBubble is known.*\(nearest: simulated\)"):
        evaluator_name("analytic", "ZBVZeroBubble")


def strategies_that_are_wrong() -> list[tuple[dict[str, object], str]]:
    v = CASES["V"].strategy
    return [
        ({"schedule": CUSTOM, "table": ("0F0,0B0",)}, "table = 1 rows: a row for each pipeline rank"),
        ({"table": ("0F0",)}, "table = 1 rows: only where the schedule is custom"),
        ({"stages": (*v.stages[1:], v.stages[0])}, "ZBVZeroBubble runs these stages on one rank"),
    ]


@pytest.mark.parametrize(("changes", "told"), strategies_that_are_wrong())
def test_tables_and_stages_that_do_not_fit(changes: dict[str, object], told: str) -> None:
    one = CASES["V"]
    strategy: Strategy = dataclasses.replace(one.strategy, **changes)  # type: ignore[arg-type]
    found = strategy_problems(strategy, one.graph, one.cluster.num_devices, one.workload)
    assert any(told in str(problem) for problem in found), [str(problem) for problem in found]
