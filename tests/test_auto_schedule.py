"""Schedules that are looked for: as short as brute force finds, never worse than a named one, bounds never above."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from meshwright.errors import InputError
from meshwright.schedule import SCHEDULES, Action, ActionKind, actions
from meshwright.schedule import replay as replay_table
from meshwright.search import auto
from meshwright.search.auto.bounds import least_makespan, window
from meshwright.search.auto.pipeline import whole
from meshwright.search.auto_schedule import (
    AutoSchedule,
    NoScheduleFits,
    Pipeline,
    find_schedule,
    peak_kept,
    random_pipeline,
)


def replayed(pipeline: Pipeline, table: Sequence[Sequence[Action]]) -> float:
    return replay_table(table, pipeline.duration_s, pipeline.num_stages, pipeline.p2p_s).makespan_s


def even(num_ranks: int, num_microbatches: int, max_kept: int | None = None) -> Pipeline:
    ones = (1.0,) * num_ranks
    limit = None if max_kept is None else (max_kept,) * num_ranks
    return Pipeline(ones, ones, ones, tuple(range(num_ranks)), num_microbatches, max_kept=limit)


def uneven(seed: int, rank_of: tuple[int, ...], num_microbatches: int, max_kept: tuple[int, ...] | None) -> Pipeline:
    random = np.random.default_rng(seed)
    forward_s, input_s, weight_s = (tuple(map(float, random.integers(1, 9, len(rank_of)))) for _ in range(3))
    p2p_s = float(random.integers(0, 4))
    return Pipeline(forward_s, input_s, weight_s, rank_of, num_microbatches, p2p_s, max_kept)


def assert_sound(pipeline: Pipeline, found: AutoSchedule) -> None:
    """What holds for every answer."""
    assert replayed(pipeline, found.table) == found.makespan  # also: it runs, each action once, no rank waits for ever
    done = {(action.stage, kind, action.microbatch) for row in found.table for action in row for kind in halves(action)}
    wanted = product(range(pipeline.num_stages), "FIW", range(pipeline.num_microbatches))
    assert done == set(wanted)
    assert [{pipeline.rank_of[action.stage] for action in row} for row in found.table] == [
        {rank} for rank in range(pipeline.num_ranks)
    ]
    if pipeline.max_kept is not None:
        assert all(kept <= most for kept, most in zip(peak_kept(pipeline, found.table), pipeline.max_kept, strict=True))
    assert found.lower_bound <= found.makespan
    assert all(found.makespan <= span for span in found.named.values() if span is not None)
    if found.is_optimal:
        assert found.makespan <= found.lower_bound + found.rounded


def halves(action: Action) -> str:
    return "IW" if action.kind is ActionKind.B else str(action.kind)


# --- brute force ------------------------------------------------------------------------------------------------------


def rows(pipeline: Pipeline, rank: int, microbatches_in_order: bool) -> Iterator[tuple[Action, ...]]:
    """All orders of a rank's actions that keep F, I, W of a stage and microbatch in order, and the limit."""
    stages = pipeline.stages(rank)
    most = math.inf if pipeline.max_kept is None else pipeline.max_kept[rank]

    def extended(row: tuple[Action, ...], done: dict[tuple[int, int], int], kept: int) -> Iterator[tuple[Action, ...]]:
        if len(row) == 3 * len(stages) * pipeline.num_microbatches:
            yield row
        for stage in stages:
            for k in range(pipeline.num_microbatches):
                kind = done.get((stage, k), 0)
                if kind == 3 or (microbatches_in_order and k and done.get((stage, k - 1), 0) <= kind):
                    continue
                now = kept + (1, 0, -1)[kind] * pipeline.units[stage]
                if now <= most:
                    action = Action(stage, ActionKind("FIW"[kind]), k)
                    yield from extended((*row, action), {**done, (stage, k): kind + 1}, now)

    return extended((), {}, 0)


def shortest(pipeline: Pipeline, microbatches_in_order: bool = True) -> float:
    each = [list(rows(pipeline, rank, microbatches_in_order)) for rank in range(pipeline.num_ranks)]
    best = math.inf
    for table in product(*each):
        try:
            best = min(best, replayed(pipeline, table))
        except InputError:  # ranks that wait in a circle
            continue
    return best


BRUTE = [
    *(uneven(seed, (0, 1), 2, None) for seed in range(4)),
    *(uneven(seed, (0, 1), 3, limit) for seed, limit in enumerate([None, (2, 1), (1, 2), (2, 2)])),
    *(uneven(seed, (0, 1, 0), 2, (2, 1)) for seed in range(3)),
    uneven(2, (0, 1, 0), 2, (3, 1)),
    replace(uneven(9, (0, 1, 0), 2, (5, 1)), kept_units=(3, 1, 2)),
    uneven(1, (0, 0, 1), 2, (2, 1)),
    replace(uneven(7, (0, 1), 3, None), weight_s=(0.0, 2.0), p2p_s=0.0),
]


@pytest.mark.parametrize("pipeline", BRUTE, ids=str)
def test_as_short_as_brute_force(pipeline: Pipeline) -> None:
    truth = shortest(pipeline)
    times = whole(pipeline)
    assert float(least_makespan(times, window(times)) * times.unit_s) <= truth
    found = find_schedule(pipeline, time_limit_s=20, seed=0)
    assert_sound(pipeline, found)
    assert (found.makespan, found.lower_bound, found.is_optimal) == (truth, truth, True)


@pytest.mark.parametrize("pipeline", [uneven(seed, (0, 1), 2, limit) for seed in range(3) for limit in [None, (1, 2)]])
def test_microbatches_out_of_order_gain_nothing(pipeline: Pipeline) -> None:
    assert shortest(pipeline, microbatches_in_order=False) == shortest(pipeline)


# --- proofs -----------------------------------------------------------------------------------------------------------


def test_even_stages_without_bubble() -> None:
    # 4 ranks, 8 microbatches of 1 + 1 + 1. The first rank works from 0 to at least 24; the last starts at 3, and works
    # until 27 at least. With four microbatches kept (1F1B's number at rank 0) that is reached; 1F1B takes 3 (8 + 3).
    found = find_schedule(even(4, 8, max_kept=4), time_limit_s=20, seed=0)
    assert (found.makespan, found.lower_bound, found.named["1F1B"], found.named["GPipe"]) == (27.0, 27.0, 33.0, None)


def test_one_microbatch_at_a_time() -> None:
    # Each microbatch keeps the first rank busy with its 1, then 2 + 2 elsewhere, then 2: forward, back, and W.
    found = find_schedule(even(3, 5, max_kept=1), time_limit_s=20, seed=0)
    assert (found.makespan, found.lower_bound) == (5 * (3 + 3 + 1), 5 * (3 + 3 + 1))


@pytest.mark.parametrize("seed", range(12))
def test_small_pipelines_are_proven(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_ranks, num_microbatches = (4, 8) if seed % 2 else (int(random.integers(2, 5)), int(random.integers(2, 9)))
    pipeline = random_pipeline(random, num_ranks=num_ranks, num_virtual=1, num_microbatches=num_microbatches)
    found = find_schedule(pipeline, time_limit_s=30, seed=seed)
    assert_sound(pipeline, found)
    assert found.is_optimal


@pytest.mark.parametrize("seed", range(15))
def test_never_worse_than_named(seed: int) -> None:
    random = np.random.default_rng(100 + seed)
    num_ranks, num_virtual = int(random.integers(2, 9)), int(random.integers(1, 3))
    num_microbatches = num_ranks * int(random.integers(1, 32 // num_ranks + 1))  # Interleaved1F1B's rule
    pipeline = random_pipeline(random, num_ranks=num_ranks, num_virtual=num_virtual, num_microbatches=num_microbatches)
    found = find_schedule(pipeline, time_limit_s=0.5, seed=seed)
    assert_sound(pipeline, found)
    if pipeline.max_kept is None:
        assert any(span is not None for span in found.named.values())


def test_more_memory_is_never_slower() -> None:
    pipeline = uneven(3, (0, 1, 2), 6, None)
    spans = [find_schedule(replace(pipeline, max_kept=(most,) * 3), time_limit_s=20, seed=0) for most in (1, 2, 3, 6)]
    assert all(found.is_optimal for found in spans)
    assert [found.makespan for found in spans] == sorted((found.makespan for found in spans), reverse=True)
    assert spans[-1].makespan == find_schedule(pipeline, time_limit_s=20, seed=0).makespan
    assert spans[0].makespan > spans[-1].makespan


# --- times without a common unit --------------------------------------------------------------------------------------


def test_bound_holds_where_times_are_rounded() -> None:
    thirds = Pipeline((1 / 3, 2 / 7), (1 / 3, 0.1), (1 / 9, 1 / 11), (0, 1), 3, p2p_s=math.pi / 100, max_kept=(2, 1))
    assert not whole(thirds).is_exact
    found = find_schedule(thirds, time_limit_s=20, seed=0)
    assert_sound(thirds, found)
    truth = shortest(thirds)
    assert found.is_optimal
    assert found.lower_bound <= truth <= found.makespan <= truth + found.rounded
    assert 0 < found.rounded < 1e-7 * truth


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1e6])
def test_unit_does_not_matter(scale: float) -> None:
    pipeline = uneven(5, (0, 1, 2), 4, (2, 2, 2))
    scaled = replace(
        pipeline,
        forward_s=tuple(scale * time_s for time_s in pipeline.forward_s),
        input_s=tuple(scale * time_s for time_s in pipeline.input_s),
        weight_s=tuple(scale * time_s for time_s in pipeline.weight_s),
        p2p_s=scale * pipeline.p2p_s,
    )
    one, other = (find_schedule(each, time_limit_s=20, seed=0) for each in (pipeline, scaled))
    assert one.is_optimal
    assert other.is_optimal
    assert other.makespan == pytest.approx(scale * one.makespan, rel=1e-9)


def test_no_time_at_all() -> None:
    found = find_schedule(Pipeline((0.0,) * 2, (0.0,) * 2, (0.0,) * 2, (0, 1), 2), time_limit_s=1, seed=0)
    assert (found.makespan, found.lower_bound, found.is_optimal) == (0.0, 0.0, True)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_backward_is_whole_where_nobody_waits() -> None:
    found = find_schedule(even(4, 8, max_kept=4), time_limit_s=20, seed=0)
    for row in found.table:
        for first, then in pairwise(row):
            directly = (first.kind, then.kind, first.microbatch) == (ActionKind.I, ActionKind.W, then.microbatch)
            assert not (directly and first.stage == then.stage == 0)  # no stage is before the first
    assert any(action.kind is ActionKind.B for action in found.table[0])


def test_what_answers_another_question_is_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    like = SCHEDULES["1F1B"]
    others = {
        "asynchronous": replace(like, is_asynchronous=True),
        "forwards": replace(like, table=lambda p, v, m: forwards(actions("1F1B", p, v, m))),
        "other ranks": replace(like, table=lambda p, v, m: actions("1F1B", p, v, m)[::-1]),
        "the same": like,
    }
    named = {name: SCHEDULES[name] for name in SCHEDULES}
    monkeypatch.setattr(SCHEDULES, "_entries", {**named, **others})
    found = find_schedule(even(2, 3), time_limit_s=5, seed=0)
    assert list(found.named) == [*named, *others]
    # 1F1B: 3 (m + p - 1)
    assert {name: found.named[name] for name in others} == {**dict.fromkeys(others), "the same": 12.0}


def test_all_named_schedules_that_apply_are_compared() -> None:
    found = find_schedule(even(4, 8), time_limit_s=5, seed=0)
    replayable = {"GPipe", "1F1B", "Interleaved1F1B", "ZB-H1", "ZB-H2"}
    assert replayable <= {name for name, span in found.named.items() if span is not None}


def forwards(table: Sequence[Sequence[Action]]) -> tuple[tuple[Action, ...], ...]:
    return tuple(tuple(action for action in row if action.kind is ActionKind.F) for row in table)


# --- the search -------------------------------------------------------------------------------------------------------


def test_same_seed_same_table() -> None:
    # The rules reach the bound, so the clock plays no part.
    pipeline = random_pipeline(np.random.default_rng(4), num_ranks=3, num_virtual=1, num_microbatches=8)
    one, other = (find_schedule(pipeline, time_limit_s=30, seed=4) for _ in range(2))
    assert one.method == "list scheduling"
    assert one == other


def test_no_time_left_is_still_an_answer() -> None:
    pipeline = random_pipeline(np.random.default_rng(1), num_ranks=4, num_virtual=2, num_microbatches=6)
    found = find_schedule(replace(pipeline, max_kept=(2,) * 4), time_limit_s=1e-6, seed=0)
    assert_sound(pipeline, found)
    assert all(span is None for span in found.named.values())
    assert found.method == "list scheduling"


def test_progress_gets_better() -> None:
    told: list[tuple[float, float]] = []
    pipeline = uneven(11, (0, 1, 2, 0, 1, 2), 5, (3, 3, 3))
    found = find_schedule(pipeline, time_limit_s=20, seed=0, progress=lambda span, bound: told.append((span, bound)))
    assert told
    assert told[-1] == (found.makespan, found.lower_bound)
    assert all(bound <= found.makespan <= span for span, bound in told)


def test_missing_solver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "meshwright.search.auto.exact", raising=False)
    monkeypatch.delattr(auto, "exact", raising=False)
    monkeypatch.setitem(sys.modules, "ortools", None)
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    unproven = uneven(11, (0, 1, 2, 0, 1, 2), 5, (3, 3, 3))
    with pytest.raises(ModuleNotFoundError, match="ortools"):
        find_schedule(unproven, time_limit_s=5, seed=0)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_all_problems_at_once() -> None:
    bad = Pipeline(
        (1.0, -1.0), (1.0, math.nan), (1.0,), (0, 3), 0, p2p_s=math.inf, max_kept=(1, -2), kept_units=(1, -1)
    )
    with pytest.raises(InputError) as caught:
        find_schedule(bad, time_limit_s=1, seed=0)
    assert str(caught.value).splitlines() == [
        "weight_s = 1 entries: must have one entry a stage, 2 as forward_s has",
        "forward_s[1] = -1.0: must be finite and not negative (nearest: 0)",
        "input_s[1] = nan: must be finite and not negative (nearest: 0)",
        "p2p_s = inf: must be finite and not negative (nearest: 0)",
        "num_microbatches = 0: must be a whole number from 1 (nearest: 1)",
        "kept_units[1] = -1: must be a whole number from 0",
        "rank_of[1] = 3: there are 2 ranks, numbered from 0, each with a stage (nearest: 1)",
        "max_kept[1] = -2: must be a whole number from 0",
    ]


@pytest.mark.parametrize("time_limit_s", [0.0, -1.0, math.nan])
def test_time_limit_is_positive(time_limit_s: float) -> None:
    with pytest.raises(InputError, match=r"time_limit_s = .*must be more than 0"):
        find_schedule(even(2, 2), time_limit_s=time_limit_s, seed=0)


def test_no_stage_is_an_error() -> None:
    with pytest.raises(InputError, match="must have at least one stage"):
        find_schedule(Pipeline((), (), (), (), 1), time_limit_s=1, seed=0)


def test_what_cannot_fit_says_by_how_much() -> None:
    pipeline = replace(uneven(1, (0, 1, 0), 2, (4, 2)), kept_units=(2, 3, 3))
    with pytest.raises(NoScheduleFits) as caught:
        find_schedule(pipeline, time_limit_s=1, seed=0)
    assert caught.value.reasons == (
        "rank 0 keeps 5 units of one microbatch (stages 0, 2), more than its 4",
        "rank 1 keeps 3 units of one microbatch (stages 1), more than its 2",
    )
