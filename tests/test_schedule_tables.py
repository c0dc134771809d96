"""Tables as files, with messages and state, and what is said of those that cannot run."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.schedule import (
    SCHEDULES,
    Action,
    ActionKind,
    Table,
    actions,
    check_table,
    checked,
    compute_parts,
    rank_of_stage,
    read_table,
    replay,
    schedule_problems,
    stages_of_rank,
    table_csv,
    with_messages,
    with_state,
)

TORCH = ["LoopedBFS", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"]
CASES = [
    (name, p, v, m)
    for name, p, v, m in product(SCHEDULES, (1, 2, 4), (1, 2, 3), (1, 4, 8))
    if not schedule_problems(name, p, v, m)
]


def torch_schedule(name: str, p: int, v: int, m: int) -> Any:
    """torch's schedule of this name on rank 0, its stages without a process group."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    stages = [
        SimpleNamespace(
            stage_index=stage, num_stages=p * v, group_rank=0, group_size=p, is_first=stage == 0,
            is_last=stage == p * v - 1, has_backward=True, submod=None, stage_index_to_group_rank=None,
        )
        for stage in stages_of_rank(name, 0, p, v)
    ]  # fmt: skip
    return get_schedule_class(name)(stages, m)


def as_text(table: Any) -> list[list[str]]:
    return [[str(action) for action in row] for row in table]


def theirs_as_text(order: dict[int, list[Any]]) -> list[list[str]]:
    return [[str(action) for action in order[rank] if action is not None] for rank in sorted(order)]


def unit_times(action: Action) -> float:
    return 2.0 if action.kind is ActionKind.B else 1.0


def table_of(*rows: str) -> Table:
    return read_table("\n".join(row.replace(" ", ",") for row in rows), "table")


def told(*rows: str, **sizes: Any) -> list[str]:
    return [str(problem) for problem in check_table(table_of(*rows), **sizes)]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dump", ["compute_only", "compute_comms"])
def test_torchs_files_are_read_and_ours_by_torch(name: str, dump: str, tmp_path: Path) -> None:
    theirs, file = torch_schedule(name, 4, 2, 8), tmp_path / "table.csv"
    theirs._dump_csv(file, format=dump)
    order = theirs.pipeline_order if dump == "compute_only" else theirs.pipeline_order_with_comms
    with file.open(newline="") as text:
        table = checked(read_table(text.read(), "table.csv"), 8, 8, num_ranks=4)
    assert as_text(table) == theirs_as_text(order)

    file.write_text(table_csv(table))
    other = torch_schedule(name, 4, 2, 8)
    other.pipeline_order = other.pipeline_order_with_comms = {}
    other._load_csv(file, format=dump)
    loaded = other.pipeline_order if dump == "compute_only" else other.pipeline_order_with_comms
    assert theirs_as_text(loaded) == as_text(table)
    # and torch lowers it to the same messages as its own
    assert theirs_as_text(other.pipeline_order_with_comms) == theirs_as_text(theirs.pipeline_order_with_comms)


@pytest.mark.parametrize("case", CASES)
def test_files_round_trip(case: tuple[str, int, int, int]) -> None:
    table = actions(*case)
    for written in (table, with_messages(with_state(table))):
        assert read_table(table_csv(written), "table.csv") == written


def test_spaces_idle_cells_and_other_line_ends_are_read() -> None:
    expected = table_of("0F0 0B0", "1F0 1B0")
    assert read_table('\ufeff0F0,,, 0B0\r\n,1F0 ,"1B0"\r\n\r\n', "x") == expected
    assert read_table("0F0,0B0\n\n1F0,1B0", "x") == (expected[0], (), expected[1])  # a rank without actions
    assert check_table(read_table("0F0,0B0\n,,\n1F0,1B0", "x"), file="x.csv")[0].where == "x.csv, line 2 (rank 1)"


def test_every_bad_cell_is_named() -> None:
    with pytest.raises(InputError) as caught:
        read_table("0F0,,0X0\n1F0;1B0\n,2F,(2F0;2SEND_F0)OVERLAP_F_B\n", "my.csv")
    kinds = ", ".join(ActionKind)
    assert str(caught.value).splitlines() == [
        f"my.csv, line 1 (rank 0), column 3 = '0X0': X is no kind of action; known: {kinds}",
        "my.csv, line 2 (rank 1), column 1 = '1F0;1B0': must be stage, kind, microbatch, or computations in brackets "
        "(nearest: 0F3)",
        "my.csv, line 3 (rank 2), column 2 = '2F': F is of one microbatch (nearest: 2F0)",
        "my.csv, line 3 (rank 2), column 3 = '(2F0;2SEND_F0)OVERLAP_F_B': 2SEND_F0 is no computation "
        "(one of F, I, W, B)",
    ]


def test_no_table_at_all() -> None:
    with pytest.raises(
        InputError, match=r"^my.csv: has no actions; a table has one line of them for each rank \(nearest: 0F0,0B0\)"
    ):
        read_table(" \n", "my.csv")
    with pytest.raises(InputError, match=r"^my.csv, line 2: not CSV: field larger than field limit"):
        read_table("0F0\n" + "x" * 200_000, "my.csv")
    assert told("0UNSHARD") == ["schedule: has no actions"]


# --- messages and state -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize(("p", "v"), [(2, 1), (2, 2), (4, 2), (3, 2), (2, 3)])
def test_messages_and_state_are_torchs(name: str, p: int, v: int) -> None:
    # Of p v <= 8 stages torch's sets, in whose order it gives stages back, are sorted.
    lowered = 0
    for m in (2, 3, 6, 8):
        if schedule_problems(name, p, v, m) or (name == "DualPipeV" and m < 2 * p):
            continue
        ours = with_messages(with_state(actions(name, p, v, m)), lambda s: rank_of_stage(name, s, p), p * v)
        assert as_text(ours) == theirs_as_text(torch_schedule(name, p, v, m).pipeline_order_with_comms)
        lowered += 1
    assert lowered or (name in ("ZBVZeroBubble", "DualPipeV") and v != 2)


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "ZB-H1", "ZB-H2", "PipeDream"])
@pytest.mark.parametrize("m", [2, 7])
def test_messages_of_single_stages_are_torchs(name: str, m: int) -> None:
    from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _add_unshard_reshard

    table = actions(name, 4, 1, m)
    rows = {rank: [_Action.from_str(str(action)) for action in row] for rank, row in enumerate(table)}
    for count in (1, 3):
        gathered = {rank: _add_unshard_reshard(row, count) for rank, row in rows.items()}
        theirs = _add_send_recv(gathered, lambda stage: stage, 4)
        ours = with_messages(with_state(table, count))
        assert [[text for text in row if "REDUCE" not in text] for row in as_text(ours)] == theirs_as_text(theirs)


def test_stages_are_gathered_for_what_comes_next() -> None:
    from torch.distributed.pipelining.schedules import _Action, _add_unshard_reshard

    table = actions("Interleaved1F1B", 2, 4, 4) + actions("DualPipeV", 2, 2, 4)
    for row, count in product(table, (1, 2, 3)):
        theirs = _add_unshard_reshard([_Action.from_str(str(action)) for action in row], count)
        ours = [str(action) for action in with_state((row,), count)[0] if action.kind is not ActionKind.REDUCE_GRAD]
        assert ours == [str(action) for action in theirs]


@pytest.mark.parametrize("case", CASES)
def test_messages_never_block_one_another(case: tuple[str, int, int, int]) -> None:
    name, p, v, m = case
    table = actions(*case)
    full = with_messages(with_state(table))
    assert check_table(table, p * v, m, num_ranks=p) == []
    assert check_table(full, p * v, m, num_ranks=p) == []  # with messages that block too
    bare = replay(table, unit_times, p * v)
    assert replay(full, unit_times, p * v).makespan_s == bare.makespan_s
    assert replay(full, unit_times, p * v, p2p_s=0.5).makespan_s >= replay(table, unit_times, p * v, 0.5).makespan_s
    kept = tuple(tuple(action for action in row if compute_parts(action)) for row in full)
    assert kept == table
    reduced = [action.stage for row in full for action in row if action.kind is ActionKind.REDUCE_GRAD]
    assert sorted(reduced) == (list(range(p * v)) if SCHEDULES[name].has_backward else [])


def test_messages_of_a_table_that_cannot_run() -> None:
    with pytest.raises(InputError, match=r"^schedule = rank 0 at 0B0 waits for 1B0 of rank 1; rank 1 at 1F1 waits for"):
        with_messages(table_of("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1"))
    with pytest.raises(InputError, match=r"^schedule, rank 1 = 1F1: needs 0F1, which no rank runs$"):
        with_messages(table_of("0F0 0B0", "1F1 1F0 1B0"))
    with pytest.raises(InputError, match=r"^schedule = 1 of 2 stages: each stage is on one rank$"):
        with_messages(table_of("0F0 0B0"), num_stages=2)


BACK = "is missing; each microbatch passes each stage once backward, by B or by I and W"

# --- faults -----------------------------------------------------------------------------------------------------------


def test_missing_actions_are_named() -> None:
    assert told("0F0 0F1 0B0 0B1", "1F0 1B0 1B1") == [
        "schedule, rank 1 = 1F1: is missing; each microbatch passes each stage once forward"
    ]
    assert told("0F0 0F1 0F2 0B0 0B1 0B2", "1F0 1F1 1F2 1B0", num_microbatches=5) == [
        "schedule, rank 0 = 0F3 to 0F4: is missing; each microbatch passes each stage once forward",
        f"schedule, rank 0 = 0B3 to 0B4: {BACK}",
        "schedule, rank 1 = 1F3 to 1F4: is missing; each microbatch passes each stage once forward",
        f"schedule, rank 1 = 1B1 to 1B4: {BACK}",
    ]
    assert told("0F0 0I0", "1F0 1I0 1W0") == [
        "schedule, rank 0 = 0W0: is missing; 0I0 leaves the gradient of the weights to it"
    ]
    assert told("0F0 0B0 0W0", "1F0 1B0") == ["schedule, rank 0 = 0W0: needs 0I0, which no rank runs"]
    assert told("0F0 0B0", "2F0 2B0") == ["schedule = stage 1: is missing; no rank computes it"]
    assert told("0F0 0B0", "1F0 1B0", num_stages=4) == [
        "schedule = stage 2 to stage 3: is missing; no rank computes it"
    ]
    assert told("0F0 0F1", "1F0 1F1") == []  # inference


def test_doubled_actions_are_named() -> None:
    rule = "a microbatch passes a stage once forward and once backward"
    assert told("0F0 0B0 0F0") == [f"schedule, rank 0 = 0F0: {rule}"] * 2
    assert told("0F0 0B0 0I0 0W0") == [f"schedule, rank 0 = 0B0: {rule}", f"schedule, rank 0 = 0I0: {rule}"]
    twice = told("0F0 0SEND_F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0")
    assert twice == ["schedule, rank 0 = 0SEND_F0: a microbatch is sent once and received once"] * 2


def test_ranks_too_many_and_too_few() -> None:
    assert told("0F0 0B0", "1F0 1B0", "2UNSHARD") == [
        "schedule, rank 2: computes nothing: it has a rank too many, or its actions are missing"
    ]
    assert told("0F0 0B0", "1F0 1B0", num_ranks=4) == ["schedule = 2 ranks: 2 too few (nearest: 4 ranks)"]
    assert told("0F0 0B0", "1F0 1B0", num_ranks=1) == ["schedule = 2 ranks: 1 too many (nearest: 1 ranks)"]
    assert told("0F0 0B0 1F0", "1B0") == ["schedule = 1F0 on rank 0 and 1B0 on rank 1: stage 1 is on one rank"]


def test_numbers_beyond_what_there_is() -> None:
    assert told("0F0 0B0", "1F0 1B0", "2F0 2B0", num_stages=2) == [
        "schedule, rank 2 = 2F0 and 1 more: there are 2 stages (nearest: stage 1)"
    ]
    assert told("0F0 0F7 0B0 0B7", num_microbatches=1) == [
        "schedule, rank 0 = 0F7 and 1 more: there are 1 microbatches (nearest: microbatch 0)"
    ]
    # a slip of the finger is not a hundred million problems
    assert told("0F0 0B0", "1F0 1B0 99999999F0") == [
        "schedule = stage 2 to stage 99999998: is missing; no rank computes it",
        f"schedule, rank 1 = 99999999B0: {BACK}",
    ]


def test_circles_are_walked() -> None:
    rule = "the ranks wait for one another; run what is waited for earlier"
    assert told("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1") == [
        f"schedule = rank 0 at 0B0 waits for 1B0 of rank 1; rank 1 at 1F1 waits for 0F1 of rank 0: deadlock, {rule}"
    ]
    # Each sends first: fine for messages that are under way on their own, a deadlock for those that block.
    both = ("0F0 0F1 0SEND_F0 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
            "1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1")  # fmt: skip
    # sent at 2: 1F0 2-3, 1B0 3-5, 1F1 5-6, 1B1 6-8, 0B1 8-10
    assert replay(table_of(*both), unit_times, 2).makespan_s == 10
    assert told(*both) == [
        f"schedule = rank 0 at 0SEND_F1 waits for 1RECV_F1 of rank 1; rank 1 at 1SEND_B0 waits for 0RECV_B0 of rank 0: "
        f"deadlock, with messages that block, {rule}"
    ]
    assert told("0F0 0SEND_F0 0RECV_B0 0B0", "1F0 1RECV_F0 1B0 1SEND_B0") == [
        f"schedule = rank 1 at 1F0 waits for 1RECV_F0 of rank 1: deadlock, {rule}"
    ]


def test_messages_have_two_ends() -> None:
    assert told("0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0") == [
        "schedule, rank 0 = 0RECV_B0: needs 1SEND_B0, which no rank runs",
        "schedule, rank 0 = 0B0: needs 1SEND_B0, which no rank runs",
    ]
    assert told("0F0 0SEND_F0 0B0") == ["schedule, rank 0 = 0SEND_F0: needs 1RECV_F0, which no rank runs"]
    assert told("0RECV_F0 0F0 0B0") == ["schedule, rank 0 = 0RECV_F0: needs a stage before it, which no rank runs"]


def test_checked_tells_all_faults_with_their_lines() -> None:
    table = read_table("0F0,0B0,0F0\n1F0\n2F0,2B0", "my.csv")
    with pytest.raises(InputError) as caught:
        checked(table, file="my.csv", num_ranks=2)
    assert str(caught.value).splitlines() == [
        "my.csv = 3 ranks: 1 too many (nearest: 2 ranks)",
        "my.csv, line 1 (rank 0) = 0F0: a microbatch passes a stage once forward and once backward",
        "my.csv, line 1 (rank 0) = 0F0: a microbatch passes a stage once forward and once backward",
        f"my.csv, line 2 (rank 1) = 1B0: {BACK}",
    ]
    sound = actions("1F1B", 2, 1, 3)
    assert checked(sound, 2, 3) is sound


# --- properties -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(data=st.data(), case=st.sampled_from([case for case in CASES if case[3] > 1]), messages=st.booleans())
def test_mutated_tables_are_refused_or_still_complete(
    data: st.DataObject, case: tuple[str, int, int, int], messages: bool
) -> None:
    _, p, v, m = case
    table = with_messages(actions(*case)) if messages else actions(*case)
    rows = [list(row) for row in table]
    rank = data.draw(st.integers(0, p - 1))
    at = data.draw(st.integers(0, len(rows[rank]) - 1))
    mutation = data.draw(st.sampled_from(["drop", "double", "swap", "move", "renumber"]))
    action = rows[rank][at]
    match mutation:
        case "drop":
            del rows[rank][at]
        case "double":
            rows[rank].insert(data.draw(st.integers(0, len(rows[rank]))), action)
        case "swap":
            other = data.draw(st.integers(0, len(rows[rank]) - 1))
            rows[rank][at], rows[rank][other] = rows[rank][other], action
        case "move":
            del rows[rank][at]
            to = data.draw(st.integers(0, p - 1))
            rows[to].insert(data.draw(st.integers(0, len(rows[to]))), action)
        case "renumber" if action.microbatch is not None:
            rows[rank][at] = Action(action.stage, action.kind, data.draw(st.integers(0, m)))
    mutated = tuple(map(tuple, rows))
    problems = check_table(mutated, p * v, m, num_ranks=p)
    if mutated == table:
        assert problems == []
    if problems:
        assert mutated != table
        return
    # What is accepted has everything, runs on paper, and sends nothing but what it sent.
    assert sorted(map(str, (a for row in mutated for a in row))) == sorted(map(str, (a for row in table for a in row)))
    timeline = replay(mutated, unit_times, p * v)
    assert timeline.makespan_s >= max(timeline.busy_s)
    assert mutation in ("swap", "move") or mutated == table
    if not messages:
        lowered = with_messages(mutated)
        assert check_table(lowered, p * v, m) == []
        assert replay(lowered, unit_times, p * v).makespan_s == timeline.makespan_s


CELLS = ["0F0", "1F0", "0B0", "1B0", "0I0", "0W0", "2F1", "1SEND_B0", "0RECV_B0", "1RECV_F0", "0SEND_F0", "0UNSHARD",
         "(0F0;1B0)OVERLAP_F_B", "99999999F99999999", "", " ", "x", "0F"]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.text(alphabet="0123FIWB_SENDRCV,;()\n \"'OVLAP", max_size=60)
    | st.lists(st.lists(st.sampled_from(CELLS[:-2]), max_size=6).map(",".join), max_size=4).map("\n".join)
    | st.lists(st.lists(st.sampled_from(CELLS), max_size=6).map(",".join), max_size=4).map("\n".join)
)
def test_any_text_is_a_table_or_an_input_error(text: str) -> None:
    try:
        table = read_table(text, "x.csv")
    except InputError:
        return
    assert any(table)
    while not table[-1]:  # what ends a file is no rank
        table = table[:-1]
    assert read_table(table_csv(table), "x.csv") == table
    num_stages = 1 + max((part.stage for row in table for a in row for part in a.parts or (a,)), default=0)
    if not check_table(table, file="x.csv"):
        replay(table, unit_times, num_stages)
        return
    try:
        replay(table, unit_times, num_stages)
        with_messages(tuple(tuple(a for a in row if compute_parts(a)) for row in table))
    except InputError as refused:
        assert str(refused).startswith("schedule")  # noqa: PT017  replay asks for less, so it may also accept
