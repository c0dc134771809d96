"""Alpa: stages and their groups of devices by a dynamic program over what is best inside each.

L. Zheng et al., "Alpa: Automating Inter- and Intra-Operator Parallelism for Distributed Deep Learning", OSDI 2022,
arXiv:2201.12023, section 5. Minimises the latency of a synchronous pipeline (equation 2), the sum of the stages' turns
plus m - 1 times the longest, over where stages begin, the group of each, and all ways of placing it inside, such that
the groups make up the cluster and each stage fits into memory with its microbatches in flight (equations 3 and 4).

What we changed. The longest turn is found by branching over caps, which is exact, where the paper steps through them
with a tolerance (`dynamic.least_pipeline_time`); equal layers are priced once instead of being clustered first. Groups
span powers of two of whole nodes (section 5.2 has every number). What is inside a stage is chosen from the problem's
options, with memory, where the paper's integer program minimises communication and compilation filters by memory.
"""

from __future__ import annotations

import math

from meshwright.search.pipelines.answer import NO_PLAN, PLAIN, Asked, StageAnswer
from meshwright.search.pipelines.dynamic import least_pipeline_time
from meshwright.search.pipelines.lattice import chain, stage_table
from meshwright.search.stages import StageProblem


def alpa(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The plan of contiguous stages with the least latency."""
    table = stage_table(chain(problem))
    found = least_pipeline_time(table, problem.num_devices, problem.num_microbatches, asked.deadline)
    if found.plan is None:
        proven = math.isinf(found.lower_bound)
        return StageAnswer(
            None, math.inf, found.lower_bound, NO_PLAN if proven else "stopped before any plan", bounds_step=True
        )
    if found.lower_bound >= found.objective:
        says = "no plan of contiguous stages on groups of these sizes, each alike inside, has a shorter step"
    else:
        says = "stopped at the time limit with a bound"
    step_s, bound_s = problem.step_seconds(found.objective), problem.step_seconds(found.lower_bound)
    return StageAnswer(found.plan, step_s, bound_s, says, found.num_sweeps, bounds_step=True)
