"""What a schedule is looked for: the times and the memory of a pipeline's stages, and the same in whole units of time.

Microbatches are alike, so a best schedule runs those of each (stage, kind) in their order: take any schedule, and give
the k-th start of each (stage, kind) to microbatch k. Where each start of b came at least d after its start of a, the
k-th of b comes at least d after the k-th of a (order statistics), so every need is still met; the slots of each rank
and how many microbatches it keeps at any time are what they were. What is left to decide is how each rank interleaves
its sequences: an *order* is, for each rank, a row of letters, a letter one (stage, kind), and the k-th time that a
letter stands there is microbatch k.

A full backward is an input gradient directly followed by its gradient of the weights, where the stage before waits for
both: never better than the two apart, so orders know F, I and W alone.

Legend: S stages, P ranks, m microbatches; L = 3 S letters, letter 3 s + kind, kinds F, I, W = 0, 1, 2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from meshwright.errors import InputError, MeshwrightError, Problem
from meshwright.schedule import Action, ActionKind

IntArray = npt.NDArray[np.int64]

KINDS = (ActionKind.F, ActionKind.I, ActionKind.W)
F, I, W = range(3)  # noqa: E741

#: Times with no common unit are rounded down to this part of all work together; sums then still fit 64 bits well.
FINEST = 2**-32

#: A limit on what is kept that no rank can reach.
UNLIMITED = 2**62


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order of the forward, with seconds (or any one unit) a microbatch, and the rank that holds each.

    `forward_s`, `input_s` and `weight_s` [S] are the times of F, I and W; a result is at another rank `p2p_s` after its
    end, at the same rank at once. `kept_units` [S] is what a stage keeps of one microbatch, in whole units of memory
    (1 where None), from the start of its F to the end of its W or full backward; `max_kept` [P] is the most units that
    a rank may keep at once, over its stages (None: no limit). Ranks are 0 to P - 1, each with a stage.
    """

    forward_s: tuple[float, ...]
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    rank_of: tuple[int, ...]
    num_microbatches: int
    p2p_s: float = 0.0
    max_kept: tuple[int, ...] | None = None
    kept_units: tuple[int, ...] | None = None

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.forward_s)

    @property
    def num_ranks(self) -> int:
        """P."""
        return max(self.rank_of) + 1

    @property
    def units(self) -> tuple[int, ...]:
        """`kept_units`, said."""
        return (1,) * self.num_stages if self.kept_units is None else self.kept_units

    def stages(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` holds."""
        return tuple(stage for stage, holder in enumerate(self.rank_of) if holder == rank)

    def duration_s(self, action: Action) -> float:
        """How long an action takes."""
        stage = action.stage
        match action.kind:
            case ActionKind.F:
                return self.forward_s[stage]
            case ActionKind.I:
                return self.input_s[stage]
            case ActionKind.W:
                return self.weight_s[stage]
            case _:
                return self.input_s[stage] + self.weight_s[stage]


class NoScheduleFits(MeshwrightError):
    """No schedule keeps within the limit, as a rank cannot keep even one microbatch; `reasons` says which."""

    def __init__(self, reasons: tuple[str, ...]) -> None:
        self.reasons = reasons
        super().__init__("\n".join(reasons))


def check(pipeline: Pipeline) -> None:
    """Raise `InputError` with all that is wrong with a pipeline, else `NoScheduleFits` where nothing can run.

    One microbatch after the other keeps the least: all stages of a rank at once, as each backward comes after all
    forwards.
    """
    if problems := list(_problems(pipeline)):
        raise InputError(problems)
    reasons = []
    for rank, most in enumerate(pipeline.max_kept or ()):
        least = sum(pipeline.units[stage] for stage in pipeline.stages(rank))
        if least > most:
            held = ", ".join(map(str, pipeline.stages(rank)))
            reasons.append(f"rank {rank} keeps {least} units of one microbatch (stages {held}), more than its {most}")
    if reasons:
        raise NoScheduleFits(tuple(reasons))


def _problems(pipeline: Pipeline) -> Iterator[Problem]:
    num_stages = len(pipeline.forward_s)
    if num_stages == 0:
        yield Problem("forward_s", "()", "must have at least one stage")
    for where in ("forward_s", "input_s", "weight_s", "rank_of", "kept_units"):
        values = getattr(pipeline, where)
        if values is not None and len(values) != num_stages:
            rule = f"must have one entry a stage, {num_stages} as forward_s has"
            yield Problem(where, f"{len(values)} entries", rule)
    for where in ("forward_s", "input_s", "weight_s"):
        for stage, time_s in enumerate(getattr(pipeline, where)):
            yield from _not_a_time(f"{where}[{stage}]", time_s)
    yield from _not_a_time("p2p_s", pipeline.p2p_s)
    if not _is_whole(pipeline.num_microbatches, 1):
        yield Problem("num_microbatches", str(pipeline.num_microbatches), "must be a whole number from 1", "1")
    for stage, units in enumerate(pipeline.kept_units or ()):
        if not _is_whole(units, 0):
            yield Problem(f"kept_units[{stage}]", str(units), "must be a whole number from 0")
    yield from _rank_problems(pipeline)


def _not_a_time(where: str, time_s: float) -> Iterator[Problem]:
    if not (math.isfinite(time_s) and time_s >= 0):
        yield Problem(where, str(time_s), "must be finite and not negative", "0")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int | np.integer) and bool(least <= value < UNLIMITED)


def _rank_problems(pipeline: Pipeline) -> Iterator[Problem]:
    used = Counter(pipeline.rank_of)
    known = len(used) if pipeline.max_kept is None else len(pipeline.max_kept)
    unknown = [rank for rank in used if not (_is_whole(rank, 0) and rank < known)]
    for stage, rank in enumerate(pipeline.rank_of):
        if rank in unknown:
            rule = f"there are {known} ranks, numbered from 0, each with a stage"
            yield Problem(f"rank_of[{stage}]", str(rank), rule, str(known - 1))
    for rank in range(known):
        if not unknown and rank not in used:
            yield Problem("rank_of", str(pipeline.rank_of), f"gives no stage to rank {rank}, which max_kept has")
    for rank, most in enumerate(pipeline.max_kept or ()):
        if not _is_whole(most, 0):
            yield Problem(f"max_kept[{rank}]", str(most), "must be a whole number from 0")


@dataclass(frozen=True)
class Whole:
    """A pipeline in whole units of `unit_s`, as arrays for the kernels.

    `duration_L`, `rank_L`, `kept_S`, `most_P` and `p2p` are in the legend's terms. Where times have a common unit
    (`is_exact`), these are the times; else they are rounded down, so that a bound stays a bound, and a schedule takes
    at most `rounded_s` longer than they say.
    """

    duration_L: IntArray
    rank_L: IntArray
    kept_S: IntArray
    most_P: IntArray
    p2p: int
    num_microbatches: int
    unit_s: Fraction
    is_exact: bool

    @property
    def num_stages(self) -> int:
        """S."""
        return len(self.kept_S)

    @property
    def rounded_s(self) -> float:
        """The most that rounding takes off a schedule: less than a unit of each action and message on its path."""
        return 0.0 if self.is_exact else float(2 * len(self.duration_L) * self.num_microbatches * self.unit_s)


def whole(pipeline: Pipeline) -> Whole:
    """The pipeline in whole units: the largest that divides all its decimals, or `FINEST` of all work if that is more.

    >>> times = whole(Pipeline((0.5, 1.0), (1.25, 1.0), (1.0, 1.0), (0, 1), num_microbatches=2))
    >>> times.duration_L, float(times.unit_s), times.is_exact
    (array([2, 5, 4, 4, 4, 4]), 0.25, True)
    """
    times = [*zip(pipeline.forward_s, pipeline.input_s, pipeline.weight_s, strict=True)]
    # Decimals as they are written: 0.1 is a tenth, not the binary fraction nearest to it.
    parts = [Fraction(str(float(time_s))) for stage in times for time_s in stage] + [
        Fraction(str(float(pipeline.p2p_s)))
    ]
    total = (sum(parts) + 2 * pipeline.num_stages * parts[-1]) * pipeline.num_microbatches
    scale = math.lcm(*(part.denominator for part in parts))
    unit_s = Fraction(math.gcd(*(int(part * scale) for part in parts)) or 1, scale)
    is_exact = total * Fraction(FINEST) <= unit_s
    if not is_exact:
        unit_s = total * Fraction(FINEST)
    *durations, p2p = (int(part / unit_s) for part in parts)
    return Whole(
        duration_L=np.array(durations, dtype=np.int64),
        rank_L=np.repeat(np.array(pipeline.rank_of, dtype=np.int64), 3),
        kept_S=np.array(pipeline.units, dtype=np.int64),
        most_P=np.array(pipeline.max_kept or [UNLIMITED] * pipeline.num_ranks, dtype=np.int64),
        p2p=p2p,
        num_microbatches=pipeline.num_microbatches,
        unit_s=unit_s,
        is_exact=is_exact,
    )


# --- what must come before what ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """`letter` of microbatch k starts at least `lag` after the end of `needs` of microbatch k - `behind`, if there is
    one."""

    letter: int
    needs: int
    behind: int
    lag: int


def needs(times: Whole) -> tuple[Need, ...]:
    """All that holds between actions in every schedule whose microbatches are in order, the memory limit included."""
    found = []
    for s in range(times.num_stages):
        f, i, w = 3 * s, 3 * s + I, 3 * s + W
        if s > 0:
            found += [Need(f, f - 3, 0, _lag(times, s, s - 1)), Need(i - 3, i, 0, _lag(times, s, s - 1))]
        found += [Need(i, f, 0, 0), Need(w, i, 0, 0), *(Need(letter, letter, 1, 0) for letter in (f, i, w))]
    for rank in range(len(times.most_P)):
        found += _memory_needs(times, [s for s in range(times.num_stages) if times.rank_L[3 * s] == rank])
    return tuple(need for need in found if need.behind < times.num_microbatches)


def _memory_needs(times: Whole, stages: list[int]) -> Iterator[Need]:
    """What the limit of a rank with these stages says of each pair s <= t of them.

    Let u(s) be what s keeps of a microbatch and U(s) what the stages up to s keep. For a rank with one stage, where
    both are u, this is the whole limit: F of k + floor(most / u) needs W of k.

    1. W of k on s comes before F of k + c on t where c u(s) + U(t) > most: else s keeps k to k + c - 1, and k + c is
       kept up to t.
    2. I of k on t comes before F of k + c on s where c U(s) + U(t) > most: else, as this I runs, k is kept up to t, and
       k + 1 to k + c up to s, as none of their I has come to t. All that would be kept as F of k + c starts too, so one
       W of these has then ended, and it came after this I.
    """
    most = int(times.most_P[times.rank_L[3 * stages[0]]])
    kept = [int(times.kept_S[s]) for s in stages]
    weight = [int(times.duration_L[3 * s + W]) for s in stages]
    for a, s in enumerate(stages):
        up_to_s = sum(kept[: a + 1])
        for b in range(a, len(stages)):
            t, up_to_t = stages[b], sum(kept[: b + 1])
            if kept[a] > 0:
                yield Need(3 * t, 3 * s + W, (most - up_to_t) // kept[a] + 1, 0)
            if up_to_s > 0:
                least_weight = min(time for time, units in zip(weight[: b + 1], kept, strict=False) if units > 0)
                yield Need(3 * s, 3 * t + I, (most - up_to_t) // up_to_s + 1, least_weight)


def _lag(times: Whole, stage: int, other: int) -> int:
    return 0 if times.rank_L[3 * stage] == times.rank_L[3 * other] else times.p2p


def chain(num_stages: int) -> list[int]:
    """Letters such that in each microbatch what is needed comes before what needs it."""
    forwards = [3 * s for s in range(num_stages)]
    return forwards + [3 * s + kind for s in reversed(range(num_stages)) for kind in (I, W)]
