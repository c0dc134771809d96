"""The best pipeline schedule for given times and memory, and how much better another could be at most.

For stages with their own times, a message time and a memory limit, `find_schedule` gives a table of actions that is not
worse than any named schedule that fits, and a lower bound beside it. It asks, in turn: the named schedules, replayed
with these times; list scheduling by rules and changed rules; moves along the critical path; a constraint program that
proves (`search/auto/`, one file each). It stops as soon as bound and makespan meet.

Time here is as in `schedule.replay`: a message takes `p2p_s`, links are never busy. Asynchronous schedules and those
that overlap a forward with a backward are not compared with: they answer another question.

`python -m meshwright.search.auto_schedule --instances 100` compares with the named schedules on random pipelines.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.schedule import SCHEDULES, Action, ActionKind, Table, actions, replay, schedule_problems
from meshwright.search.auto import orders
from meshwright.search.auto.bounds import Window, least_makespan, window
from meshwright.search.auto.pipeline import (
    KINDS,
    F,
    I,
    IntArray,
    NoScheduleFits,
    Pipeline,
    W,
    Whole,
    chain,
    check,
    whole,
)

__all__ = ["AutoSchedule", "NoScheduleFits", "Pipeline", "find_schedule", "named_tables", "peak_kept"]

#: What the search without proof takes at most of the time limit, and where it stops anyway.
SHARE_WITHOUT_PROOF = 0.4
NUM_CHANGED_RULES = 300
MOVES_AN_ACTION = 300  # moves in all: 15 s of one core for 1150 actions, 0.1 s for 96, where a proof is near

#: Moves cool from the first to the last of these, in mean times of an action.
HOT, COLD = 10.0, 0.1  # [derived] HOT of 3, 10, 30 the best on average on 6 pipelines with p = 8, m = 24

#: Calls of compiled code are this many moves long, between two looks at the clock.
MOVES_A_CALL = 1000

Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class AutoSchedule:
    """A table, how long it takes by `replay`, and a proven bound below which no schedule is, in the unit of the times.

    `is_optimal`: the two meet, exactly where the times have a common unit, else to within `rounded`. `method` found the
    table. `named` has each named schedule's makespan, None where it does not apply or does not fit.
    """

    table: Table
    makespan: float
    lower_bound: float
    is_optimal: bool
    method: str
    named: Mapping[str, float | None]
    rounded: float = 0.0


def find_schedule(
    pipeline: Pipeline, *, time_limit_s: float, seed: int, progress: Progress | None = None
) -> AutoSchedule:
    """The best schedule found within `time_limit_s` of wall time; `progress` is told each better makespan and bound.

    Raises `InputError` with all that is wrong with the pipeline, `NoScheduleFits` where not even one microbatch fits.
    The same seed takes the same steps; how many of them, the clock decides, and of several best tables the solver's two
    threads may meet either first. A makespan that is proven is always the same. The solver looks at the clock between
    its steps, which for a thousand actions with a limit take seconds: so much later the answer may come.

    >>> even = Pipeline((1.0,) * 2, (1.0,) * 2, (1.0,) * 2, (0, 1), num_microbatches=3)
    >>> found = find_schedule(even, time_limit_s=10, seed=0)
    >>> found.makespan, found.lower_bound, found.is_optimal, found.named["1F1B"]
    (10.0, 10.0, True, 12.0)
    """
    began_s = time.perf_counter()
    check(pipeline)
    if not time_limit_s > 0:
        raise InputError([Problem("time_limit_s", str(time_limit_s), "must be more than 0", "1")])
    tables = named_tables(pipeline)
    spans = {name: _makespan(pipeline, table) for name, table in tables.items()}
    times = whole(pipeline)
    within = window(times)
    question = _Question(
        times=times,
        within=within,
        data=orders.arrays(times),
        bound=least_makespan(times, within),
        began_s=began_s,
        time_limit_s=time_limit_s,
        seed=seed,
        progress=progress,
    )
    best, bound = _search(question, [(f"named {name}", _order(pipeline, table)) for name, table in tables.items()])
    return _answer(pipeline, question, best, bound, tables, spans)


def _answer(
    pipeline: Pipeline,
    question: _Question,
    best: _Best,
    bound: int,
    tables: Mapping[str, Table],
    spans: Mapping[str, float],
) -> AutoSchedule:
    table, method = _table(pipeline, best.order), best.method
    makespan = _makespan(pipeline, table)
    # Times that were rounded, and sums of floats, may put a named schedule before the order by a hair.
    for name, span in spans.items():
        if span < makespan:
            table, makespan, method = tables[name], span, f"named {name}"
    return AutoSchedule(
        table=table,
        makespan=makespan,
        lower_bound=min(makespan, float(bound * question.times.unit_s)),
        is_optimal=best.makespan <= bound,
        method=method,
        named={name: spans.get(name) for name in SCHEDULES},
        rounded=question.times.rounded_s,
    )


# --- the search, in units of time -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    """A pipeline made ready, and how long to look."""

    times: Whole
    within: Window
    data: orders.Arrays
    bound: int
    began_s: float
    time_limit_s: float
    seed: int
    progress: Progress | None

    def left_s(self, share: float = 1.0) -> float:
        """What is left of a share of the time limit."""
        return self.began_s + share * self.time_limit_s - time.perf_counter()

    def tell(self, makespan: int, bound: int) -> None:
        """Report progress, in the unit of the times."""
        if self.progress:
            self.progress(float(makespan * self.times.unit_s), float(bound * self.times.unit_s))

    def measured(self, order: IntArray) -> tuple[int, IntArray]:
        """How long an order takes, and the ends of its actions `[letter, microbatch]`."""
        end_Lm = np.empty_like(self.within.head_Lm)
        return int(orders.measure(self.data, order, end_Lm)), end_Lm


@dataclass(frozen=True)
class _Best:
    """The best order so far; `NEVER` where there is none."""

    order: IntArray
    makespan: int
    method: str

    def or_better(self, question: _Question, order: IntArray, method: str) -> _Best:
        """This, or `order` where it takes less time."""
        makespan, _ = question.measured(order)
        if makespan >= self.makespan:
            return self
        question.tell(makespan, question.bound)
        return _Best(order, makespan, method)


def _search(question: _Question, named: Sequence[tuple[str, IntArray]]) -> tuple[_Best, int]:
    """The best order, and the bound, in units. Interrupted, it is the best so far (so does the constraint program)."""
    best = _Best(np.empty(0, dtype=np.int64), orders.NEVER, "none")
    for method, order in named:
        best = best.or_better(question, order, method)
    random = np.random.default_rng(question.seed)
    try:
        best = _list_scheduled(question, best, random)
        best = _moved(question, best, random)
    except KeyboardInterrupt:
        if best.makespan == orders.NEVER:
            raise
        return best, question.bound
    return _proven(question, best)


def _list_scheduled(question: _Question, best: _Best, random: np.random.Generator) -> _Best:
    """Orders by the rules, and by changes of the best rule as long as they are no worse."""
    data, tail_Lm, end_Lm = question.data, question.within.tail_Lm, np.empty_like(question.within.head_Lm)
    rule, shortest = None, orders.NEVER
    start = orders.rules(question.times)
    for attempt in range(len(start) + NUM_CHANGED_RULES):
        # The first order is always made: where no named schedule fits, it is the answer.
        if best.makespan <= question.bound or (attempt > 0 and question.left_s(SHARE_WITHOUT_PROOF / 2) <= 0):
            break
        changed = (
            start[attempt] if rule is None or attempt < len(start) else orders.changed(question.times, rule, random)
        )
        order = orders.build(data, tail_Lm, *changed, end_Lm)
        best = best.or_better(question, order, "list scheduling")
        if (makespan := int(end_Lm.max())) <= shortest:
            rule, shortest = changed, makespan
    return best


def _moved(question: _Question, best: _Best, random: np.random.Generator) -> _Best:
    """The best order, changed a little many times, cooler each time: so that the last is reached when time is up."""
    order, end_Lm = best.order.copy(), np.empty_like(question.within.head_Lm)
    num_calls = 1 + MOVES_AN_ACTION * end_Lm.size // MOVES_A_CALL
    began_left_s = question.left_s(SHARE_WITHOUT_PROOF)
    for call in range(num_calls):
        left_s = question.left_s(SHARE_WITHOUT_PROOF)
        if best.makespan <= question.bound or left_s <= 0:
            break
        done = max(call / num_calls, 1 - left_s / began_left_s)
        temperature = float(question.times.duration_L.mean()) * HOT * (COLD / HOT) ** done
        shorter = orders.improve(question.data, order, random, MOVES_A_CALL, question.bound, end_Lm, temperature)
        best = best.or_better(question, shorter, "moves on the critical path")
    return best


def _proven(question: _Question, best: _Best) -> tuple[_Best, int]:
    """The best order after the constraint program, and the bound that it proves."""
    left_s = question.left_s()
    if best.makespan <= question.bound or left_s <= 0:
        return best, question.bound
    from meshwright.search.auto import exact  # here: ortools is an extra, and takes half a second

    _, end_Lm = question.measured(best.order)
    proof = exact.solve(
        question.times,
        question.within,
        start_Lm=end_Lm - question.times.duration_L[:, None],
        makespan=best.makespan,
        lower_bound=question.bound,
        time_limit_s=left_s,
        seed=question.seed,
        progress=question.tell,
    )
    if proof.start_Lm is not None:
        best = best.or_better(question, _by_start(question.times, proof.start_Lm), "constraint program")
    question.tell(best.makespan, proof.lower_bound)
    return best, proof.lower_bound


def _by_start(times: Whole, start_Lm: IntArray) -> IntArray:
    """The order in which actions start. Of two without duration at one time the earlier microbatch goes first, and in
    this the earlier letter of its chain: so what is needed never comes after what needs it."""
    place = {letter: place for place, letter in enumerate(chain(times.num_stages))}
    starts = [
        (rank, start, start + times.duration_L[letter], k, place[letter], letter)
        for letter, rank in enumerate(times.rank_L)
        for k, start in enumerate(start_Lm[letter])
    ]
    return np.array([key[-1] for key in sorted(starts)], dtype=np.int64)


# --- tables and orders ------------------------------------------------------------------------------------------------


def named_tables(pipeline: Pipeline) -> dict[str, Table]:
    """The tables of the named schedules that apply: stages on the ranks that hold them, forward and backward of each
    microbatch at one stage apart from all others, and no more kept than allowed."""
    num_ranks, num_microbatches = pipeline.num_ranks, pipeline.num_microbatches
    num_virtual, rest = divmod(pipeline.num_stages, num_ranks)
    if rest:
        return {}
    found = {}
    for name, schedule in SCHEDULES.items():
        if getattr(schedule, "is_asynchronous", False):
            continue
        if schedule_problems(name, num_ranks, num_virtual, num_microbatches):
            continue
        table = actions(name, num_ranks, num_virtual, num_microbatches)
        if _is_whole_step(pipeline, table) and _fits(pipeline, table):
            found[name] = table
    return found


def _is_whole_step(pipeline: Pipeline, table: Table) -> bool:
    """Whether a table holds each action of the pipeline once, on its stage's rank, and nothing else."""
    found = Counter((rank, letter, k) for rank, row in enumerate(table) for letter, k in _letters(row))
    wanted = Counter(
        (rank, 3 * stage + kind, k)
        for stage, rank in enumerate(pipeline.rank_of)
        for kind in (F, I, W)
        for k in range(pipeline.num_microbatches)
    )
    return found == wanted


def _letters(row: Sequence[Action]) -> Iterator[tuple[int, int]]:
    """(Letter, microbatch) of a rank's actions, a full backward as two; letter -1 for any other action."""
    halves = {ActionKind.F: (F,), ActionKind.I: (I,), ActionKind.W: (W,), ActionKind.B: (I, W)}
    for action in row:
        if action.kind not in halves or action.microbatch is None:
            yield -1, 0
        else:
            yield from ((3 * action.stage + kind, action.microbatch) for kind in halves[action.kind])


def peak_kept(pipeline: Pipeline, table: Table) -> tuple[int, ...]:
    """The most units that each rank keeps: from the start of a forward to the end of its W or full backward.

    >>> two = Pipeline((1.0,) * 2, (1.0,) * 2, (1.0,) * 2, (0, 1), num_microbatches=4)
    >>> peak_kept(two, actions("1F1B", 2, 1, 4)), peak_kept(two, actions("GPipe", 2, 1, 4))
    ((2, 1), (4, 4))
    """
    return tuple(max(_kept(pipeline, row), default=0) for row in table)


def _kept(pipeline: Pipeline, row: Sequence[Action]) -> Iterator[int]:
    kept = 0
    for letter, _ in _letters(row):
        if letter >= 0:
            kept += {F: 1, I: 0, W: -1}[letter % 3] * pipeline.units[letter // 3]
        yield kept


def _fits(pipeline: Pipeline, table: Table) -> bool:
    if pipeline.max_kept is None:
        return True
    return all(kept <= most for kept, most in zip(peak_kept(pipeline, table), pipeline.max_kept, strict=True))


def _makespan(pipeline: Pipeline, table: Table) -> float:
    return replay(table, pipeline.duration_s, pipeline.num_stages, pipeline.p2p_s).makespan_s


def _order(pipeline: Pipeline, table: Table) -> IntArray:
    """A table as an order: full backwards apart, microbatches forgotten."""
    return np.array([letter for row in table for letter, _ in _letters(row)], dtype=np.int64)


def _table(pipeline: Pipeline, order: IntArray) -> Table:
    """An order as a table. An input gradient directly before its gradient of the weights becomes a full backward where
    no other rank or stage then starts later."""
    apart = tuple(_rank_actions(pipeline, order, rank) for rank in range(pipeline.num_ranks))
    timeline = replay(apart, pipeline.duration_s, pipeline.num_stages, pipeline.p2p_s)
    when_s = {
        action: (start_s, end_s)
        for row, starts_s, ends_s in zip(apart, timeline.start_s, timeline.end_s, strict=True)
        for action, start_s, end_s in zip(row, starts_s, ends_s, strict=True)
    }

    def nobody_waits(first: Action, then: Action) -> bool:
        stage, k = first.stage, first.microbatch
        if (first.kind, then) != (ActionKind.I, Action(stage, ActionKind.W, k)):
            return False
        if stage == 0:
            return True
        lag_s = pipeline.p2p_s if pipeline.rank_of[stage] != pipeline.rank_of[stage - 1] else 0.0
        start_s, end_s = when_s[Action(stage - 1, ActionKind.I, k)][0], when_s[then][1]
        return start_s >= end_s + lag_s

    def joined(row: Sequence[Action]) -> Iterator[Action]:
        second = {then for first, then in pairwise(row) if nobody_waits(first, then)}
        for action in row:
            if Action(action.stage, ActionKind.W, action.microbatch) in second and action.kind is ActionKind.I:
                yield Action(action.stage, ActionKind.B, action.microbatch)
            elif action not in second:
                yield action

    return tuple(tuple(joined(row)) for row in apart)


def _rank_actions(pipeline: Pipeline, order: IntArray, rank: int) -> tuple[Action, ...]:
    seen: Counter[int] = Counter()
    row = []
    for letter in order.tolist():
        if pipeline.rank_of[letter // 3] == rank:
            row.append(Action(letter // 3, KINDS[letter % 3], seen[letter]))
            seen[letter] += 1
    return tuple(row)


# --- a study ----------------------------------------------------------------------------------------------------------


def random_pipeline(
    random: np.random.Generator, *, num_ranks: int, num_virtual: int, num_microbatches: int
) -> Pipeline:
    """Uneven stages in loop placement: whole times 5 to 20, messages of 0 to 5; half of them with a limit, between one
    microbatch and more than 1F1B keeps."""
    num_stages = num_ranks * num_virtual
    forward_s, input_s, weight_s = (tuple(map(float, random.integers(5, 21, num_stages))) for _ in range(3))
    most = tuple(map(int, random.integers(num_virtual, num_stages + 3, num_ranks)))
    return Pipeline(
        forward_s,
        input_s,
        weight_s,
        rank_of=tuple(stage % num_ranks for stage in range(num_stages)),
        num_microbatches=num_microbatches,
        p2p_s=float(random.integers(0, 6)),
        max_kept=most if random.random() < 0.5 else None,
    )


def _study(instances: int = 100, seconds: float = 5.0, seed: int = 0) -> None:
    """Compare with the best named schedule on random pipelines: p 2 to 8, m up to 32, one or two stages a rank."""
    random = np.random.default_rng(seed)
    gains, gaps, times_s, worse, proven = [], [], [], 0, 0
    for n in range(instances):
        p, v, m = (int(random.integers(low, high)) for low, high in ((2, 9), (1, 3), (1, 33)))
        pipeline = random_pipeline(random, num_ranks=p, num_virtual=v, num_microbatches=m)
        began_s = time.perf_counter()
        found = find_schedule(pipeline, time_limit_s=seconds, seed=seed)
        times_s.append(time.perf_counter() - began_s)
        named = min((span for span in found.named.values() if span is not None), default=None)
        worse += named is not None and found.makespan > named
        proven += found.is_optimal
        gaps.append(found.makespan / found.lower_bound - 1)
        gain = "none fits" if named is None else f"{named / found.makespan - 1:.1%}"
        gains += [] if named is None else [named / found.makespan - 1]
        limit = "no limit" if pipeline.max_kept is None else f"limit {min(pipeline.max_kept)}..{max(pipeline.max_kept)}"
        print(
            f"{n:3} p={p} v={v} m={m:2} {limit:13} makespan {found.makespan:.0f} gap {gaps[-1]:.2%} "
            f"gain on named {gain} {times_s[-1]:.1f} s by {found.method}",
            flush=True,
        )
    print(
        f"{proven} of {instances} proven, {worse} worse than named; "
        f"median gain {np.median(gains):.1%} over {len(gains)}; "
        f"gap: median {np.median(gaps):.2%}, largest {max(gaps):.2%}; median {np.median(times_s):.2f} s"
    )


if __name__ == "__main__":
    import typer

    typer.run(_study)
