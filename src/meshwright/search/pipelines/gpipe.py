"""GPipe: a user's cuts; without them, cuts that balance the time of the partitions.

Y. Huang et al., "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism", NeurIPS 2019,
arXiv:1811.06965: a model's sequence of layers is cut into K partitions, each on one accelerator, and all forwards go
before all backwards. torchgpipe (arXiv:2004.09910, section 3) finds cuts that balance measured times
(`balance_by_time`, the blocks of a sequence of I. Bárány and V. S. Grinberg).

What we changed. A partition may lie on a group of devices, equal for all and under one option for all, of which the one
with the least step time is taken. Without cuts, every number of partitions that divides the devices is tried, each with
the cuts whose slowest partition is the fastest that fits (exactly, where the library's differ from it by at most one
layer).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.search.pipelines.answer import PLAIN, Asked, StageAnswer, in_problem
from meshwright.search.pipelines.dynamic import least_longest_turn
from meshwright.search.pipelines.groups import best_of, frontier, groupings, plan_of_parts
from meshwright.search.pipelines.lattice import chain, stage_table
from meshwright.search.stages import StagePlan, StageProblem


def gpipe(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The best plan with the user's cuts, or with balanced ones; raises `InputError` for cuts that cannot be."""
    if asked.cuts:
        return best_of(problem, _cut_plans(problem, asked), "the user's cuts; of options for all stages the best")
    return best_of(problem, _balanced_plans(problem, asked), "balanced cuts; of numbers of stages and options the best")


def _cut_plans(problem: StageProblem, asked: Asked) -> Iterator[StagePlan]:
    cuts, num_stages = sorted(set(asked.cuts)), len(set(asked.cuts)) + 1
    problems = [
        Problem("cuts", str(cut), f"stages begin at units 1 to {problem.num_units - 1}", _nearest(cut, problem))
        for cut in cuts
        if not 0 < cut < problem.num_units
    ]
    size = problem.num_devices // num_stages
    if problem.num_devices % num_stages or size not in problem.sizes:
        fits = [problem.num_devices // each for each in problem.sizes if problem.num_devices % each == 0]
        rule = f"{num_stages} stages do not share {problem.num_devices} devices equally"
        nearest = min(fits, key=lambda number: abs(number - num_stages), default=1)
        problems.append(Problem("cuts", str(len(cuts)), rule, f"{nearest - 1} cuts"))
    if problems:
        raise InputError(problems)
    part_U = np.searchsorted(cuts, np.arange(problem.num_units), side="right")
    yield from (plan_of_parts(part_U, k, "GPipe") for k in frontier(problem, size))


def _nearest(cut: int, problem: StageProblem) -> str:
    return str(min(max(cut, 1), problem.num_units - 1))


def _balanced_plans(problem: StageProblem, asked: Asked) -> Iterator[StagePlan]:
    lattice_of = chain(problem)
    for each in groupings(problem):
        if asked.deadline.passed:
            return
        part = problem.only([each.option])
        table = stage_table(lattice_of.of(part), "GPipe", each.num_groups)
        found = least_longest_turn(table, problem.num_devices, each.num_groups)
        if found.plan is not None and math.isfinite(found.objective):
            yield in_problem(problem, part, found.plan)
