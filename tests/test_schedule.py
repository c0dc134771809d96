"""Schedules: equal to PyTorch's, each microbatch once, no deadlock, memory and makespan as the closed forms say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    actions,
    interleaved_legal,
    num_deferred,
    parse_action,
    peak_in_flight,
    rank_of,
    replay,
    schedule_problems,
    stage_of,
)

LEGAL = [
    (name, p, v, m)
    for name, p, v, m in product(SCHEDULES, range(1, 7), range(1, 5), range(1, 17))
    if not schedule_problems(name, p, v, m)
]


def unit_times(action: Action) -> float:
    return {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}[action.kind]


def parse_table(*rows: str) -> list[list[Action]]:
    return [[parse_action(text) for text in row.split()] for row in rows]


def as_text(table: Any) -> list[list[str]]:
    return [[str(action) for action in row] for row in table]


# --- words ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0F3", "2I0", "12W10", "1B5"])
def test_action_text_round_trips(text: str) -> None:
    assert str(parse_action(text)) == text


@pytest.mark.parametrize("text", ["", "F3", "0X3", "0F", "0SEND_F1", "-1F0", "0F3 1F3"])
def test_other_text_is_no_action(text: str) -> None:
    with pytest.raises(InputError, match=r"action = .*must be stage, one of F I W B, microbatch \(nearest: 0F3\)"):
        parse_action(text)


@given(p=st.integers(1, 64), k=st.integers(0, 16), data=st.data())
def test_loop_placement_inverts(p: int, k: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, p - 1))
    stage = stage_of(rank, k, p)
    assert (rank_of(stage, p), stage // p) == (rank, k)


def test_import_is_light() -> None:
    code = "import sys, meshwright.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- rules ------------------------------------------------------------------------------------------------------------


def test_fewer_microbatches_than_ranks_are_legal() -> None:
    assert all(not schedule_problems(name, 8, 1, 3) for name in ("GPipe", "1F1B", "Interleaved1F1B"))
    # m = 2 on 4 ranks: warm-up min(m, p - rank), never more forwards than there are
    assert as_text(actions("1F1B", 4, 1, 2)) == [
        ["0F0", "0F1", "0B0", "0B1"],
        ["1F0", "1F1", "1B0", "1B1"],
        ["2F0", "2F1", "2B0", "2B1"],
        ["3F0", "3B0", "3F1", "3B1"],
    ]


def test_unknown_name_and_bad_sizes_are_told_together() -> None:
    problems = schedule_problems("Interleaved1F1", 0, -1, 0)
    assert [str(problem) for problem in problems] == [
        "schedule = Interleaved1F1: known: GPipe, 1F1B, Interleaved1F1B, ZB-H1, ZB-H2 (nearest: Interleaved1F1B)",
        "pp = 0: must be at least 1 (nearest: pp=1)",
        "vpp = -1: must be at least 1 (nearest: vpp=1)",
        "num_microbatches = 0: must be at least 1 (nearest: num_microbatches=1)",
    ]


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_one_stage_per_rank_where_not_interleaved(name: str) -> None:
    with pytest.raises(InputError, match=rf"^vpp = 2: {name} has one stage per rank.*Interleaved1F1B \(nearest: vpp=1"):
        actions(name, 4, 2, 8)


def test_interleaved_says_the_nearest_legal_microbatches() -> None:
    # p = 4: 11 // 4 = 2 rounds, 11 is odd; 10 and 12 are not. 23 // 4 = 5 rounds: 20 below, 24 // 4 = 6 rounds above.
    assert [p.nearest for p in schedule_problems("Interleaved1F1B", 4, 2, 11)] == [
        "num_microbatches=10 or num_microbatches=12"
    ]
    assert [p.nearest for p in schedule_problems("Interleaved1F1B", 4, 2, 23)] == [
        "num_microbatches=20 or num_microbatches=24"
    ]


def test_interleaved_rule_on_arrays_is_the_scalar_rule() -> None:
    p, m = np.arange(1, 9)[:, None], np.arange(1, 65)
    scalar = [[not schedule_problems("Interleaved1F1B", int(pi), 2, int(mi)) for mi in m] for pi in p[:, 0]]
    assert interleaved_legal(p, m).tolist() == scalar


# --- the same as PyTorch's --------------------------------------------------------------------------------------------


def stand_in_stage(stage: int, p: int, v: int, **more: Any) -> SimpleNamespace:
    """What torch's schedule classes ask of a stage, without a process group."""
    return SimpleNamespace(
        stage_index=stage, num_stages=p * v, group_rank=stage % p, group_size=p, is_first=stage == 0,
        is_last=stage == p * v - 1, has_backward=True, submod=None, stage_index_to_group_rank=None, **more,
    )  # fmt: skip


def compute_only(order: dict[int, list[Any]]) -> list[list[str]]:
    return [[str(action) for action in order[rank] if action and action.is_compute_op] for rank in sorted(order)]


def run_torch_loop(schedule_class: Callable[..., Any], p: int, m: int) -> list[list[str]]:
    """The calls that each rank's stage really gets from torch's single-stage training loop, messages left out."""
    calls: list[list[str]] = [[] for _ in range(p)]
    for rank, log in enumerate(calls):
        stage = stand_in_stage(
            rank, p, 1,
            forward_one_chunk=lambda b, *_, s=rank, log=log, **__: log.append(f"{s}F{b}"),
            backward_one_chunk=lambda b, *_, s=rank, log=log, **__: log.append(f"{s}B{b}"),
            perform_reduce_grad=lambda _: None,
            **dict.fromkeys(("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"),
                            lambda _: []),
        )  # fmt: skip
        schedule = schedule_class(stage, max(m, p))
        schedule._n_microbatches = m  # the constructor of 1F1B refuses m < p, its loop does not
        schedule._initialize_stage = lambda *_: None
        schedule._step_microbatches()
    return calls


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_gpipe_is_torchs(p: int) -> None:
    from torch.distributed.pipelining.schedules import ScheduleGPipe

    for m in (1, 2, p - 1, p, p + 1, 2 * p, 13):
        ours = as_text(actions("GPipe", p, 1, m))
        assert ours == compute_only(ScheduleGPipe(stand_in_stage(0, p, 1), m).pipeline_order)
        assert ours == run_torch_loop(ScheduleGPipe, p, m)


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_1f1b_is_torchs(p: int) -> None:
    from torch.distributed.pipelining.schedules import Schedule1F1B

    for m in (1, 2, p - 1, p, p + 1, 2 * p, 13):
        ours = as_text(actions("1F1B", p, 1, m))
        assert ours == run_torch_loop(Schedule1F1B, p, m)
        if m >= p:
            theirs = compute_only(Schedule1F1B(stand_in_stage(0, p, 1), m).pipeline_order)
            # torch 2.13 numbers the last rank's forwards from 1 in this table (F1 ... Fm), which its loop does not.
            theirs[-1] = [f"{p - 1}F{int(x.split('F')[1]) - 1}" if "F" in x else x for x in theirs[-1]]
            assert ours == theirs


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_interleaved_is_torchs_rule_and_table(p: int, v: int) -> None:
    from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

    num_legal = 0
    for m in range(1, 2 * p + 4):
        stages = [stand_in_stage(stage_of(0, k, p), p, v) for k in range(v)]
        if schedule_problems("Interleaved1F1B", p, v, m):
            with pytest.raises(ValueError, match="multiple of the number of rounds"):
                ScheduleInterleaved1F1B(stages, m)
        else:
            theirs = compute_only(ScheduleInterleaved1F1B(stages, m).pipeline_order)
            assert as_text(actions("Interleaved1F1B", p, v, m)) == theirs
            num_legal += 1
    assert num_legal >= p + 1


# --- properties -------------------------------------------------------------------------------------------------------


@given(case=st.sampled_from(LEGAL), backward=st.floats(0.1, 8), p2p_s=st.floats(0, 4))
def test_each_microbatch_once_and_no_deadlock(case: tuple[str, int, int, int], backward: float, p2p_s: float) -> None:
    name, p, v, m = case
    table = actions(name, p, v, m)
    assert all(rank_of(action.stage, p) == rank for rank, row in enumerate(table) for action in row)
    kinds = "FIW" if name.startswith("ZB") else "FB"
    expected = {Action(s, ActionKind(kind), b) for s in range(p * v) for kind in kinds for b in range(m)}
    assert sum(len(row) for row in table) == len(expected)
    assert {action for row in table for action in row} == expected

    times = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    timeline = replay(table, lambda action: times[action.kind], p * v, p2p_s)
    assert timeline.makespan_s >= timeline.period_s >= m * v * (1 + backward) - 1e-6
    assert 0 <= timeline.bubble_fraction < 1
    assert all(a <= b for starts in timeline.start_s for a, b in pairwise(starts))


def test_every_legal_table_replays() -> None:
    for name, p, v, m in LEGAL:
        timeline = replay(actions(name, p, v, m), unit_times, p * v)
        assert timeline.makespan_s >= 3 * m * v  # what each rank computes; a deadlock would have been refused


def test_peak_in_flight_is_what_the_table_holds() -> None:
    for name, p, v, m in LEGAL:
        table, steps = actions(name, p, v, m), {"F": 1, "B": -1, "I": -1, "W": 0}
        held = [np.cumsum([steps[a.kind] for a in row]).max() for row in table]
        assert peak_in_flight(name, p, v, m, np.arange(p)).tolist() == held, (name, p, v, m)
        steps |= {"I": 0, "W": -1}
        kept = [np.cumsum([steps[a.kind] for a in row]).max() for row in table]
        deferred = num_deferred(name, p, v, m, np.arange(p))
        assert (peak_in_flight(name, p, v, m, np.arange(p)) + deferred).tolist() == kept, (name, p, v, m)


def test_peak_in_flight_broadcasts() -> None:
    p, m = np.array([2, 4])[:, None, None], np.array([1, 4, 8])[:, None]
    peaks = peak_in_flight("1F1B", p, 1, m, np.arange(2))
    assert peaks.tolist() == [[[1, 1], [2, 1], [2, 1]], [[1, 1], [4, 3], [4, 3]]]
    assert peak_in_flight("GPipe", 4, 1, 8, 0).item() == 8  # m v
    # Megatron's warm-up (p - rank - 1) 2 + (v - 1) p = 6 + 4 for p = 4, v = 2, rank 0, and the one that follows
    assert peak_in_flight("Interleaved1F1B", 4, 2, 8, 0).item() == 11


@pytest.mark.parametrize(("p", "m"), [(1, 1), (1, 5), (2, 4), (4, 4), (4, 9), (6, 2)])
@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_makespan_of_gpipe_and_1f1b(name: str, p: int, m: int) -> None:
    timeline = replay(actions(name, p, 1, m), unit_times, p)
    assert timeline.makespan_s == timeline.period_s == 3 * (m + p - 1)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1))


@pytest.mark.parametrize(("p", "v", "rounds"), list(product((1, 2, 3, 4, 6), (1, 2, 3), (1, 2, 3))))
def test_makespan_of_interleaved(p: int, v: int, rounds: int) -> None:
    m = rounds * p
    timeline = replay(actions("Interleaved1F1B", p, v, m), unit_times, p * v)
    assert timeline.makespan_s == 3 * m * v + 3 * (p - 1)
    assert timeline.bubble_fraction == pytest.approx((p - 1) / (m * v + p - 1))


@pytest.mark.parametrize("p", range(1, 17))
def test_zero_bubble_spans(p: int) -> None:
    # F = I = W = 1. ZB-H1 with m >= p: 3 m and a bubble of 1 for each other rank; with fewer there is too little to
    # fill it, 1 more for each that lacks. ZB-H2 with m >= 2 p - 1: no bubble in the span of a rank.
    for m in range(1, 65):
        h1, h2 = (replay(actions(name, p, 1, m), unit_times, p) for name in ("ZB-H1", "ZB-H2"))
        assert h1.makespan_s == 3 * m + (p - 1) + max(p - m, 0) * (p > 1)
        assert h2.period_s == 3 * m + max(2 * p - 1 - m, 0) * (p > 1)
    assert peak_in_flight("ZB-H1", p, 1, 64, 0) == p == peak_in_flight("1F1B", p, 1, 64, 0)
    assert peak_in_flight("ZB-H2", p, 1, 64, 0) == 2 * p - 1


# --- replay -----------------------------------------------------------------------------------------------------------


def test_messages_take_time_between_ranks_only() -> None:
    # 0F0 0-1, message, 1F0 1.5-2.5, 1B0 2.5-4.5, message, 0B0 5-7
    timeline = replay(parse_table("0F0 0B0", "1F0 1B0"), unit_times, 2, p2p_s=0.5)
    assert timeline.start_s == ((0, 5), (1.5, 2.5))
    assert (timeline.makespan_s, timeline.period_s) == (7, 7)
    assert timeline.bubble_fraction == pytest.approx(1 - 6 / 14)
    # both stages on one rank: no message
    assert replay(parse_table("0F0 1F0 1B0 0B0"), unit_times, 2, p2p_s=0.5).makespan_s == 6


def test_period_can_be_shorter_than_makespan() -> None:
    # rank 0: F 0-1, I 3-4 (after rank 1's F 1-2 and I 2-3), W 4-5; rank 1 spans 1-4. Idle: 10 - 6 of 10.
    timeline = replay(parse_table("0F0 0I0 0W0", "1F0 1I0 1W0"), unit_times, 2)
    assert timeline.end_s == ((1, 4, 5), (2, 3, 4))
    assert (timeline.makespan_s, timeline.period_s, timeline.bubble_fraction) == (5, 5, pytest.approx(0.4))
    forward_only = replay(parse_table("0F0 0F1", "1F0 1F1"), unit_times, 2)
    assert (forward_only.makespan_s, forward_only.period_s, forward_only.bubble_fraction) == (3, 2, 0)


def test_nothing_to_run_takes_no_time() -> None:
    timeline = replay([[], []], unit_times, 2)
    assert (timeline.makespan_s, timeline.period_s, timeline.bubble_fraction) == (0, 0, 0)


def test_deadlock_names_the_circle() -> None:
    # rank 0 wants the backward of microbatch 0 before it sends the forward that rank 1 wants first
    with pytest.raises(InputError) as caught:
        replay(parse_table("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"), unit_times, 2)
    assert str(caught.value) == (
        "schedule = rank 0 at 0B0 waits for 1B0 of rank 1; rank 1 at 1F1 waits for 0F1 of rank 0: "
        "deadlock, the ranks wait for one another; run what is waited for earlier"
    )
    with pytest.raises(InputError, match=r"^schedule = rank 0 at 0B0 waits for 0F0 of rank 0: deadlock"):
        replay(parse_table("0B0 0F0"), unit_times, 1)


def test_table_faults_are_told_together() -> None:
    with pytest.raises(InputError) as caught:
        replay(parse_table("0F0 0B0 0I0", "1F1", "2F0"), unit_times, 2)
    assert [str(problem) for problem in caught.value.problems] == [
        "schedule, rank 0 = 0B0: a microbatch passes a stage once forward and once backward",
        "schedule, rank 0 = 0B0: needs 1B0, which no rank runs",
        "schedule, rank 0 = 0I0: a microbatch passes a stage once forward and once backward",
        "schedule, rank 0 = 0I0: needs 1B0, which no rank runs",
        "schedule, rank 1 = 1F1: needs 0F1, which no rank runs",
        "schedule, rank 2 = 2F0: there are 2 stages (nearest: stage 1)",
    ]
