"""Schedules: equal to PyTorch's, each microbatch once, no deadlock, memory and makespan as the closed forms say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    actions,
    compute_parts,
    interleaved_legal,
    num_deferred,
    parse_action,
    peak_in_flight,
    rank_of,
    rank_of_stage,
    replay,
    schedule_problems,
    stage_of,
    stages_of_rank,
    weight_versions,
)
from meshwright.schedule.record import held

LEGAL = [
    (name, p, v, m)
    for name, p, v, m in product(SCHEDULES, range(1, 7), range(1, 4), range(1, 17))
    if not schedule_problems(name, p, v, m)
]


def unit_times(action: Action) -> float:
    return {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}[action.kind]


def parse_table(*rows: str) -> list[list[Action]]:
    return [[parse_action(text) for text in row.split()] for row in rows]


def as_text(table: Any) -> list[list[str]]:
    return [[str(action) for action in row] for row in table]


# --- words ------------------------------------------------------------------------------------------------------------


TEXTS = ["0F3", "2I0", "12W10", "1B5", "3UNSHARD", "3RESHARD", "0REDUCE_GRAD", "2SEND_F1", "2RECV_F1", "2SEND_B1",
         "2RECV_B1", "(2F0;1B0)OVERLAP_F_B", "(10I7;3F12;0W1)OVERLAP_F_B"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_action_text_is_torchs_both_ways(text: str) -> None:
    from torch.distributed.pipelining.schedules import _Action

    ours, theirs = parse_action(text), _Action.from_str(text)
    assert str(ours) == str(theirs) == text
    assert (ours.stage, str(ours.kind), ours.microbatch) == (
        theirs.stage_index, theirs.computation_type.value, theirs.microbatch_index,
    )  # fmt: skip
    assert [str(part) for part in ours.parts] == [str(part) for part in theirs.sub_actions or ()]


def test_every_kind_of_action_has_been_written() -> None:
    kinds = {parse_action(text).kind for text in TEXTS}
    assert kinds == set(ActionKind)


def test_computations_of_an_action() -> None:
    assert {text: [str(part) for part in compute_parts(parse_action(text))] for text in TEXTS[:1] + TEXTS[-2:]} == {
        "0F3": ["0F3"], "(2F0;1B0)OVERLAP_F_B": ["2F0", "1B0"], "(10I7;3F12;0W1)OVERLAP_F_B": ["10I7", "3F12", "0W1"],
    }  # fmt: skip
    assert not any(compute_parts(parse_action(text)) for text in TEXTS[4:11])


FORM = "must be stage, kind, microbatch, or computations in brackets (nearest: 0F3)"
KINDS = "F, I, W, B, UNSHARD, RESHARD, REDUCE_GRAD, SEND_F, RECV_F, SEND_B, RECV_B, OVERLAP_F_B"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", FORM),
        ("F3", FORM),
        ("-1F0", FORM),
        ("0F3 1F3", FORM),
        ("123456789F0", FORM),
        ("٣F0", FORM),  # a digit, but not one of ours
        ("0X3", f"X is no kind of action; known: {KINDS}"),
        ("0SENDF3", f"SENDF is no kind of action; known: {KINDS} (nearest: 0SEND_F3)"),
        ("0f3", f"f is no kind of action; known: {KINDS} (nearest: 0F3)"),
        ("0F", "F is of one microbatch (nearest: 0F0)"),
        ("1RECV_B", "RECV_B is of one microbatch (nearest: 1RECV_B0)"),
        ("2UNSHARD4", "UNSHARD is of a stage, not of a microbatch (nearest: 2UNSHARD)"),
        ("2OVERLAP_F_B", "OVERLAP_F_B names its computations in brackets (nearest: (2F0;1B0)OVERLAP_F_B)"),
        ("(0F1;1B0)B", "computations in brackets are an OVERLAP_F_B (nearest: (0F1;1B0)OVERLAP_F_B)"),
        ("(0F1;1SEND_B0)OVERLAP_F_B", "1SEND_B0 is no computation (one of F, I, W, B)"),
        ("()OVERLAP_F_B", FORM),
    ],
)
def test_other_text_is_no_action(text: str, rule: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_action(text)
    assert str(caught.value) == f"action = {text!r}: {rule}"


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
        f"schedule = Interleaved1F1: known: {', '.join(SCHEDULES)} (nearest: Interleaved1F1B)",
        "pp = 0: must be at least 1 (nearest: pp=1)",
        "vpp = -1: must be at least 1 (nearest: vpp=1)",
        "num_microbatches = 0: must be at least 1 (nearest: num_microbatches=1)",
    ]


ONE_STAGE = ["GPipe", "1F1B", "PipeDream", "PipeDream-2BW", "ForwardOnly", "ZB-H1", "ZB-H2"]


@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_per_rank_where_not_interleaved(name: str) -> None:
    with pytest.raises(InputError) as caught:
        actions(name, 4, 2, 8)
    several = "Interleaved1F1B, LoopedBFS, InterleavedZeroBubble"
    assert str(caught.value) == f"vpp = 2: {name} has one stage per rank; several are for {several} (nearest: vpp=1)"


@pytest.mark.parametrize("name", ["ZBVZeroBubble", "DualPipeV"])
@pytest.mark.parametrize("v", [1, 3])
def test_two_stages_per_rank_in_a_v(name: str, v: int) -> None:
    with pytest.raises(InputError) as caught:
        actions(name, 4, v, 8)
    assert str(caught.value) == f"vpp = {v}: {name} has exactly 2 stages per rank (nearest: vpp=2)"
    assert not schedule_problems(name, 4, 2, 1)  # any number of microbatches


def test_two_versions_of_the_weights_need_as_many_microbatches_as_ranks() -> None:
    with pytest.raises(InputError) as caught:
        actions("PipeDream-2BW", 4, 1, 3)
    assert str(caught.value) == (
        "num_microbatches = 3: PipeDream-2BW with pp=4 updates every 3 microbatches, which two versions of the weights "
        "allow from 4 (nearest: num_microbatches=4)"
    )
    assert not schedule_problems("PipeDream-2BW", 4, 1, 4)


def test_what_each_schedule_says_of_itself() -> None:
    said = {
        name: (x.virtual_stages, str(x.placement), x.is_asynchronous, x.has_backward, x.splits_backward)
        for name, x in SCHEDULES.items()
    }
    assert said == {
        "GPipe": (1, "loop", False, True, False),
        "1F1B": (1, "loop", False, True, False),
        "Interleaved1F1B": (None, "loop", False, True, False),
        "LoopedBFS": (None, "loop", False, True, False),
        "PipeDream": (1, "loop", True, True, False),
        "PipeDream-2BW": (1, "loop", True, True, False),
        "ForwardOnly": (1, "loop", False, False, False),
        "ZB-H1": (1, "loop", False, True, True),
        "ZB-H2": (1, "loop", False, True, True),
        "InterleavedZeroBubble": (None, "loop", False, True, True),
        "ZBVZeroBubble": (2, "v", False, True, True),
        "DualPipeV": (2, "v", False, True, True),
    }


def test_versions_of_the_weights() -> None:
    # PipeDream: those of the p - rank microbatches in flight; 2BW: the newest and the one before; others flush.
    assert weight_versions("PipeDream", np.array([[2], [4]]), 1, 9, np.arange(2)).tolist() == [[2, 1], [4, 3]]
    assert weight_versions("PipeDream-2BW", 4, 1, 8, np.arange(4)).tolist() == [2, 2, 2, 2]
    others = [name for name, schedule in SCHEDULES.items() if not schedule.is_asynchronous]
    assert all(weight_versions(name, 4, 2, 8, np.arange(4)).tolist() == [1, 1, 1, 1] for name in others)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("p", [1, 2, 5])
def test_placement_is_torchs(name: str, p: int) -> None:
    from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

    for v in (1, 2, 3):
        theirs = generate_stage_to_rank_mapping(p, p * v, SCHEDULES[name].placement.value)
        assert {stage: rank_of_stage(name, stage, p) for stage in range(p * v)} == theirs
        dealt = [stages_of_rank(name, rank, p, v) for rank in range(p)]
        assert all(theirs[stage] == rank for rank, stages in enumerate(dealt) for stage in stages)
        assert sorted(stage for stages in dealt for stage in stages) == list(range(p * v))


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


def chunks_of_rank_0(name: str, p: int, v: int) -> list[SimpleNamespace]:
    return [stand_in_stage(stage, p, v) for stage in stages_of_rank(name, 0, p, v)]


@pytest.mark.parametrize("v", [1, 2, 3])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", ["LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_the_others_are_torchs(name: str, p: int, v: int) -> None:
    from torch.distributed.pipelining.schedules import get_schedule_class

    num_equal = 0
    for m in range(1, 17):
        ours_legal = not schedule_problems(name, p, v, m)
        try:
            theirs = get_schedule_class(name)(chunks_of_rank_0(name, p, v), m)
        except ValueError:
            # DualPipeV: torch asks for m >= 2 p; the order exists without those that are not there
            assert not ours_legal or (name == "DualPipeV" and m < 2 * p)
            continue
        assert ours_legal
        assert as_text(actions(name, p, v, m)) == compute_only(theirs.pipeline_order)
        num_equal += 1
    exactly_two = name in ("ZBVZeroBubble", "DualPipeV")
    assert num_equal >= 5 if v == 2 or not exactly_two else num_equal == 0


@pytest.mark.parametrize("p", [1, 2, 4])
def test_forward_only_is_torchs(p: int) -> None:
    from torch.distributed.pipelining.schedules import _ScheduleForwardOnly

    for m in (1, 3, 8):
        assert as_text(actions("ForwardOnly", p, 1, m)) == run_torch_loop(_ScheduleForwardOnly, p, m)


@pytest.mark.parametrize("p", [2, 4, 5])
def test_dual_pipe_with_few_microbatches_is_that_of_many_without_the_others(p: int) -> None:
    for m in range(1, 2 * p):
        enough = actions("DualPipeV", p, 2, 2 * p - 1)
        kept = [[part for a in row for part in compute_parts(a) if part.microbatch < m] for row in enough]
        assert [[part for a in row for part in compute_parts(a)] for row in actions("DualPipeV", p, 2, m)] == kept


# --- properties -------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(case=st.sampled_from(LEGAL), backward=st.floats(0.1, 8), p2p_s=st.floats(0, 4))
def test_each_microbatch_once_and_no_deadlock(case: tuple[str, int, int, int], backward: float, p2p_s: float) -> None:
    name, p, v, m = case
    table = actions(name, p, v, m)
    leaves = [(rank, part) for rank, row in enumerate(table) for action in row for part in compute_parts(action)]
    assert all(rank_of_stage(name, part.stage, p) == rank for rank, part in leaves)
    assert len(leaves) == len(set(leaves))
    done = {kind: {(part.stage, part.microbatch) for _, part in leaves if part.kind is kind} for kind in ActionKind}
    every = set(product(range(p * v), range(m)))
    whole, split = done[ActionKind.B], done[ActionKind.I]
    assert done[ActionKind.F] == every
    assert whole | split == (every if SCHEDULES[name].has_backward else set())
    assert split == done[ActionKind.W]
    assert not whole & split
    assert bool(split) == SCHEDULES[name].splits_backward

    times = {"F": 1.0, "B": backward, "I": backward / 2, "W": backward / 2}
    timeline = replay(table, lambda action: times[action.kind], p * v, p2p_s)
    work = m * v * (1 + backward * SCHEDULES[name].has_backward)
    assert timeline.makespan_s >= timeline.period_s >= work - 1e-6
    assert 0 <= timeline.bubble_fraction < 1
    assert all(a <= b for starts in timeline.start_s for a, b in pairwise(starts))
    for idle, busy_s in zip(timeline.idle, timeline.busy_s, strict=True):
        assert busy_s == pytest.approx(work)
        assert idle.warm_up_s + idle.waiting_s + idle.drain_s + busy_s == pytest.approx(timeline.makespan_s)
    assert timeline.peak_in_flight == tuple(peak_in_flight(name, p, v, m, np.arange(p)).tolist())


def test_every_legal_table_replays() -> None:
    for name, p, v, m in LEGAL:
        timeline = replay(actions(name, p, v, m), unit_times, p * v)
        assert timeline.makespan_s >= (3 if SCHEDULES[name].has_backward else 1) * m * v  # or a deadlock was refused


def test_peak_in_flight_is_what_the_table_holds() -> None:
    for name, p, v, m in LEGAL:
        table, steps = actions(name, p, v, m), {"F": 1, "B": -1, "I": -1, "W": 0}
        if not SCHEDULES[name].has_backward:
            assert not peak_in_flight(name, p, v, m, np.arange(p)).any()
            continue
        rows = [[part for action in row for part in compute_parts(action)] for row in table]  # overlaps: F comes first
        in_flight = [np.cumsum([steps[a.kind] for a in row]).max() for row in rows]
        assert peak_in_flight(name, p, v, m, np.arange(p)).tolist() == in_flight, (name, p, v, m)
        steps |= {"I": 0, "W": -1}
        kept = [np.cumsum([steps[a.kind] for a in row]).max() for row in rows]
        deferred = num_deferred(name, p, v, m, np.arange(p))
        assert (peak_in_flight(name, p, v, m, np.arange(p)) + deferred).tolist() == kept, (name, p, v, m)


def test_counting_where_there_is_no_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    p, m, rank = np.array([2, 4])[:, None, None], np.array([1, 5, 12])[:, None], np.arange(2)
    for name in ("1F1B", "ZB-H2", "InterleavedZeroBubble", "DualPipeV"):
        v = SCHEDULES[name].virtual_stages or 3
        closed = [count(name, p, v, m, rank).tolist() for count in (peak_in_flight, num_deferred)]
        bare = replace(SCHEDULES[name], peak_in_flight=None, num_deferred=None)
        monkeypatch.setitem(SCHEDULES._entries, name, bare)
        assert [count(name, p, v, m, rank).tolist() for count in (peak_in_flight, num_deferred)] == closed
    overlapped = [parse_action("0F0"), parse_action("(0B0;0F1)OVERLAP_F_B"), parse_action("0B1")]
    assert held(tuple(overlapped), ActionKind.I) == 2  # the second is held beside the first, whatever is written first


def test_peak_in_flight_broadcasts() -> None:
    p, m = np.array([2, 4])[:, None, None], np.array([1, 4, 8])[:, None]
    peaks = peak_in_flight("1F1B", p, 1, m, np.arange(2))
    assert peaks.tolist() == [[[1, 1], [2, 1], [2, 1]], [[1, 1], [4, 3], [4, 3]]]
    assert peak_in_flight("GPipe", 4, 1, 8, 0).item() == 8  # m v
    # Megatron's warm-up (p - rank - 1) 2 + (v - 1) p = 6 + 4 for p = 4, v = 2, rank 0, and the one that follows
    assert peak_in_flight("Interleaved1F1B", 4, 2, 8, 0).item() == 11


@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_makespan_of_gpipe_and_1f1b(name: str) -> None:
    for p, m in product(range(1, 17), range(1, 65)):
        timeline = replay(actions(name, p, 1, m), unit_times, p)
        assert timeline.makespan_s == timeline.period_s == 3 * (m + p - 1)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), abs=1e-9)


@settings(deadline=None, max_examples=200)
@given(
    p=st.integers(2, 16), m=st.integers(1, 64), forward=st.floats(0.1, 4), backward=st.floats(0.1, 4),
    fraction=st.floats(0, 1),
)  # fmt: skip
def test_makespan_with_any_times_and_messages(p: int, m: int, forward: float, backward: float, fraction: float) -> None:
    # A message per hop, down and back up, hides nowhere: c = p2p. GPipe fills and drains once: 2 (p - 1) hops. Under
    # 1F1B a rank has p - rank microbatches under way; rank 0 waits 2 (p - 1) hops for the return of each p of them, of
    # which the pair it waits in hides one: another floor((m - 1) (p - 1) / p) round trips of one hop.
    p2p_s = fraction * min(forward, backward)

    def makespan(name: str, p2p_s: float) -> float:
        times = {"F": forward, "B": backward}
        return replay(actions(name, p, 1, m), lambda action: times[action.kind], p, p2p_s).makespan_s

    free = (m + p - 1) * (forward + backward)
    assert makespan("GPipe", 0) == pytest.approx(free, rel=1e-9)
    assert makespan("1F1B", 0) == pytest.approx(free, rel=1e-9)
    assert makespan("GPipe", p2p_s) == pytest.approx(free + 2 * (p - 1) * p2p_s, rel=1e-9)
    assert makespan("1F1B", p2p_s) == pytest.approx(free + 2 * (p - 1 + (m - 1) * (p - 1) // p) * p2p_s, rel=1e-9)


@pytest.mark.parametrize("p", range(1, 17))
def test_makespan_of_interleaved(p: int) -> None:
    for v, m in product((1, 2, 3), range(p, 65, p)):
        timeline = replay(actions("Interleaved1F1B", p, v, m), unit_times, p * v)
        assert timeline.makespan_s == 3 * m * v + 3 * (p - 1)
        assert timeline.bubble_fraction == pytest.approx((p - 1) / (m * v + p - 1), abs=1e-9)
        split = replay(actions("InterleavedZeroBubble", p, v, m), unit_times, p * v)
        assert split.makespan_s == 3 * m * v + (p - 1)


@pytest.mark.parametrize("p", range(1, 9))
def test_makespan_of_looped(p: int) -> None:
    # A chunk's microbatches take m, or p where they have to come round first; filling takes p - 1, and back the same
    # with backwards of 2.
    for v, m in product((1, 2, 3), range(1, 20)):
        timeline = replay(actions("LoopedBFS", p, v, m), unit_times, p * v)
        assert timeline.makespan_s == 3 * ((v - 1) * max(m, p) + m + p - 1)


@pytest.mark.parametrize("p", range(1, 17))
def test_makespan_of_the_v(p: int) -> None:
    for m in (2 * p, 2 * p + 1, 3 * p + 2, 64):
        zbv = replay(actions("ZBVZeroBubble", p, 2, m), unit_times, 2 * p)
        assert (zbv.makespan_s, zbv.period_s) == (6 * m + p - 1, 6 * m)
        dual = replay(actions("DualPipeV", p, 2, m), unit_times, 2 * p)
        assert dual.makespan_s == 6 * m + 2 * (p - 1)
    assert replay(actions("ZBVZeroBubble", p, 2, p), unit_times, 2 * p).makespan_s == 6 * p + 2 * (p - 1)


@settings(deadline=None, max_examples=25)
@given(data=st.data(), p=st.integers(1, 5))
def test_pipedream_runs_at_the_pace_of_its_slowest_stage(data: st.DataObject, p: int) -> None:
    times = st.lists(st.integers(1, 12), min_size=p, max_size=p)
    forward, backward = data.draw(times), data.draw(times)
    m = 96  # by then the start is forgotten

    def makespan(m: int) -> float:
        table = actions("PipeDream", p, 1, m)
        return replay(table, lambda a: (forward if a.kind is ActionKind.F else backward)[a.stage], p).makespan_s

    assert makespan(2 * m) - makespan(m) == m * max(f + b for f, b in zip(forward, backward, strict=True))


def test_forward_only_takes_the_forwards() -> None:
    # m + p - 1 forwards of 1, each hop 0.5 more
    timeline = replay(actions("ForwardOnly", 4, 1, 6), unit_times, 4, p2p_s=0.5)
    assert (timeline.makespan_s, timeline.period_s, timeline.peak_in_flight) == (6 + 3 + 1.5, 6, (0, 0, 0, 0))


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


def test_idle_time_is_told_apart() -> None:
    # GPipe, p = 2, m = 2, F 1, B 2: rank 0 F 0-2, B 5-9; rank 1 F 1-3, B 3-7 of a makespan of 9.
    timeline = replay(actions("GPipe", 2, 1, 2), unit_times, 2)
    assert [(idle.warm_up_s, idle.waiting_s, idle.drain_s) for idle in timeline.idle] == [(0, 3, 0), (1, 0, 2)]
    idle_rank = replay([[parse_action("0F0")], []], unit_times, 1).idle[1]
    assert (idle_rank.warm_up_s, idle_rank.waiting_s, idle_rank.drain_s) == (1, 0, 0)


def test_parts_of_an_overlap_start_and_end_together() -> None:
    # One rank, two stages: 0F0 0-1, 1F0 1-2, then 0F1 and 1B0 at once 2-5, 1F1 5-6 ...
    table = [[parse_action(text) for text in ("0F0", "1F0", "(0F1;1B0)OVERLAP_F_B", "1F1", "0B0", "1B1", "0B1")]]
    timeline = replay(table, unit_times, 2)
    assert timeline.end_s == ((1, 2, 5, 6, 8, 10, 12),)
    assert timeline.peak_in_flight == (3,)
    # across ranks: rank 1's 1B0 arrives at 4; the overlap needs it for 0B0 and cannot start its forward before
    table = parse_table("0F0 (0F1;0B0)OVERLAP_F_B 0B1", "1F0 1B0 1F1 1B1")
    assert replay(table, unit_times, 2).start_s == ((0, 4, 10), (1, 2, 7, 8))
    with pytest.raises(
        InputError, match=r"rank 0 at \(0F0;0B0\)OVERLAP_F_B waits for \(0F0;0B0\)OVERLAP_F_B of rank 0"
    ):
        replay(parse_table("(0F0;0B0)OVERLAP_F_B"), unit_times, 1)


def test_messages_in_the_table_are_what_is_waited_for() -> None:
    # 0F0 0-1, sent 1, arrives 1.5 at a receive posted at 0: 1F0 1.5-2.5, 1B0 2.5-4.5, back at 5: 0B0 5-7
    rows = ("0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0")
    timeline = replay(parse_table(*rows), unit_times, 2, p2p_s=0.5)
    assert (timeline.start_s, timeline.makespan_s) == (((0, 1, 1, 5), (0, 1.5, 2.5, 4.5)), 7)
    assert timeline.idle[1].warm_up_s == 1.5  # a posted receive is not work
    busy = replay(parse_table(*rows), unit_times, 2, 0.5, overhead=lambda action: 0.25 * action.kind.startswith("SEND"))
    assert busy.makespan_s == 7.5  # a send on the way down, one on the way up
    # a receive posted late holds its message up: that of 1F0 is posted at 3.5, after 1F1 2.5-3.5
    late = replay(parse_table("0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F1 1F1 1RECV_F0 1F0"), unit_times, 2, p2p_s=0.5)
    assert late.start_s[1] == (0, 2.5, 3.5, 4)
    # state takes no time either, unless it is said to
    state = parse_table("0UNSHARD 0F0 0B0 0REDUCE_GRAD 0RESHARD")
    assert replay(state, unit_times, 1).makespan_s == 3
    assert replay(state, unit_times, 1, overhead=lambda action: 1.0).makespan_s == 6


def test_a_message_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError) as caught:
        replay(parse_table("0F0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"), unit_times, 2)
    assert str(caught.value).splitlines() == [
        "schedule, rank 0 = 0B0: needs 0RECV_B0, which no rank runs",
        "schedule, rank 1 = 1RECV_F0: needs 0SEND_F0, which no rank runs",
        "schedule, rank 1 = 1F0: needs 0SEND_F0, which no rank runs",
        "schedule, rank 1 = 1SEND_B0: needs 0RECV_B0, which no rank runs",
    ]


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
