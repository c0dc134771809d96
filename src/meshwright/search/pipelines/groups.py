"""What heuristics share: equal groups of devices, one option for all stages, parts that are made legal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.search.pipelines.answer import NO_PLAN, StageAnswer
from meshwright.search.stages import Array, PlannedStage, StagePlan, StageProblem, evaluate


@dataclass(frozen=True)
class Grouping:
    """All devices as `num_groups` equal ones, every stage under the same option."""

    num_groups: int
    option: int


def groupings(problem: StageProblem) -> Iterator[Grouping]:
    """All ways to do so, but for options that another of the same size beats in time and in memory."""
    for size in reversed(problem.sizes):
        num_groups = problem.num_devices // size
        if problem.num_devices % size == 0 and num_groups <= problem.num_units:
            yield from (Grouping(num_groups, k) for k in frontier(problem, size))


def frontier(problem: StageProblem, size: int) -> list[int]:
    """Options of a size that no other beats in the seconds and in the bytes of all units, the fastest first."""
    time_U, bytes_U = unit_times(problem), unit_bytes(problem)
    options = [int(k) for k in np.flatnonzero(problem.devices_K == size)]
    options.sort(key=lambda k: (time_U[:, k].sum(), bytes_U[:, k].sum()))
    kept: list[int] = []
    least = math.inf
    for k in options:
        if math.isfinite(time_U[:, k].sum()) and bytes_U[:, k].sum() < least:
            kept.append(k)
            least = float(bytes_U[:, k].sum())
    return kept


def unit_times(problem: StageProblem) -> Array:
    """Seconds of a microbatch in each unit under each option, with its share of the update: U x K."""
    per_kind = problem.forward_HK + problem.backward_HK + problem.update_HK / problem.num_microbatches
    return np.asarray(per_kind[problem.kind_U])


def unit_bytes(problem: StageProblem) -> Array:
    """Bytes of each unit with one microbatch in flight: U x K."""
    return np.asarray((problem.state_HK + problem.kept_HK)[problem.kind_U])


def plan_of_parts(part_U: Sequence[int] | Array, option: int, schedule: str = "1F1B") -> StagePlan:
    """The plan whose stages are the parts that are not empty, in the order of their first units."""
    parts = dict.fromkeys(int(part) for part in part_U)
    held = [tuple(int(unit) for unit in np.flatnonzero(np.asarray(part_U) == part)) for part in parts]
    return StagePlan(tuple(PlannedStage(units, (option,) * len(units)) for units in held), schedule)


def made_acyclic(problem: StageProblem, part_U: Array) -> Array:
    """Parts in the order of their units' mean position, and each unit moved to at least the part of every unit that it
    depends on: no edge leads back."""
    names = np.unique(part_U)
    means = [np.flatnonzero(part_U == name).mean() for name in names]
    rank = {int(names[index]): place for place, index in enumerate(np.argsort(means, kind="stable"))}
    found = np.array([rank[int(part)] for part in part_U])
    order = np.argsort(problem.edges_E[:, 1], kind="stable")
    for one, other in problem.edges_E[order].tolist():  # units stand in an order in which they can run
        found[other] = max(found[other], found[one])
    return found


def best_of(problem: StageProblem, plans: Iterable[StagePlan], says: str) -> StageAnswer:
    """Of some plans the one with the least step time that fits."""
    best: tuple[float, StagePlan | None] = (math.inf, None)
    number = 0
    for plan in plans:
        cost = evaluate(problem, plan)
        number += 1
        if cost.feasible and cost.step_time_s < best[0]:
            best = (cost.step_time_s, plan)
    return StageAnswer(best[1], best[0], -math.inf, says if best[1] else NO_PLAN, number)
