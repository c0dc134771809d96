"""Piper: stages between downsets of a graph, with tensor and data parallelism and recomputation chosen for each.

J. Tarnawski, D. Narayanan, A. Phanishayee, "Piper: Multidimensional Planner for DNN Parallelization", NeurIPS 2021,
section 4. Minimises the time per sample of the most loaded stage: dp[D][k][s], the least largest load when downset D
is left to k devices in s stages, over all D' within D that leave a stage D - D', and its degrees of data and tensor
parallelism and recomputation; memory of a stage depends on the s - 1 stages behind it.

What we changed. Degrees and recomputation are the problem's options, so tensor parallelism of several kinds and ZeRO
are among them, and the knapsack that picks a tensor-parallel variant for each layer is not needed. Equal stages are
priced once.
"""

from __future__ import annotations

import math

from meshwright.search.pipelines.answer import NO_PLAN, PLAIN, Asked, StageAnswer
from meshwright.search.pipelines.dynamic import least_longest_turn
from meshwright.search.pipelines.lattice import downsets, stage_table
from meshwright.search.stages import StageProblem


def piper(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The plan whose most loaded stage has the least load; stages may be any that leave no circle."""
    lattice = downsets(problem)
    found = least_longest_turn(stage_table(lattice), problem.num_devices)
    if found.plan is None:
        return StageAnswer(None, math.inf, math.inf, NO_PLAN, lattice.num_states)
    says = f"no plan over the {lattice.num_states:,} downsets has a smaller largest load"
    return StageAnswer(found.plan, found.objective, found.lower_bound, says, lattice.num_states)
