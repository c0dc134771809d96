"""Exhaustive: every plan of contiguous stages, one by one. The judge of the dynamic programs, and a method where the
problem is small."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, product

from meshwright.errors import InputError, Problem
from meshwright.search.pipelines.answer import NO_PLAN, PLAIN, Asked, StageAnswer
from meshwright.search.stages import PlannedStage, StagePlan, StageProblem, evaluate

#: More plans than this take minutes.
MAX_PLANS = 50_000


def contiguous_plans(problem: StageProblem, schedule: str = "1F1B") -> Iterator[StagePlan]:
    """All plans of contiguous stages, each with one option for its units, that use all devices."""
    total = problem.num_units
    for num_stages in range(1, total + 1):
        for cuts in combinations(range(1, total), num_stages - 1):
            bounds = (0, *cuts, total)
            for options in _options(problem, num_stages):
                spans = zip(bounds[:-1], bounds[1:], options, strict=True)
                stages = tuple(PlannedStage(tuple(range(i, j)), (k,) * (j - i)) for i, j, k in spans)
                yield StagePlan(stages, schedule)


def _options(problem: StageProblem, num_stages: int) -> Iterator[tuple[int, ...]]:
    for options in product(range(len(problem.options)), repeat=num_stages):
        if sum(int(problem.devices_K[k]) for k in options) == problem.num_devices:
            yield options


def num_plans(problem: StageProblem) -> int:
    """How many those are."""
    counts = {size: int((problem.devices_K == size).sum()) for size in problem.sizes}
    ways = {0: 1}  # by devices used, over so many stages
    total = 0
    for num_stages in range(1, min(problem.num_units, problem.num_devices // min(problem.sizes)) + 1):
        following: dict[int, int] = {}
        for used, number in ways.items():
            for size, count in counts.items():
                if used + size <= problem.num_devices:
                    following[used + size] = following.get(used + size, 0) + number * count
        ways = following
        total += math.comb(problem.num_units - 1, num_stages - 1) * ways.get(problem.num_devices, 0)
    return total


def exhaustive_stages(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The plan with the least step time of all; raises `InputError` where there are too many."""
    number = num_plans(problem)
    if number > MAX_PLANS:
        rule = f"{number:.3g} plans are too many to go through (at most {MAX_PLANS:,}); alpa proves the same optimum"
        raise InputError([Problem("method", "exhaustive_stages", rule, "alpa")])
    best, chosen = math.inf, None
    for plan in contiguous_plans(problem):
        cost = evaluate(problem, plan)
        if cost.feasible and cost.step_time_s < best:
            best, chosen = cost.step_time_s, plan
    says = f"all {number:,} plans of contiguous stages were evaluated" if chosen else NO_PLAN
    return StageAnswer(chosen, best, best, says, number, bounds_step=True)
