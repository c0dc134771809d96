"""PipeDream: contiguous stages, each on one or several devices that hold copies of it, of an asynchronous pipeline.

D. Narayanan et al., "PipeDream: Generalized Pipeline Parallelism for DNN Training", SOSP 2019, section 3.1. Minimises
the time of the slowest stage, hence maximises throughput: A(j, m) is the least slowest time of the first j layers on m
devices,

    A(j, m) = min over i, m' of max(A(i, m - m'), 2 a_i / B, T(i + 1 .. j, m')),
    T(i .. j, m) = max(sum of the layers' seconds, seconds of reducing their gradients) / m.

Messages between stages are a resource of their own, beside the stages; so are the gradients of copies.

What we changed. Seconds of a copied stage are those of its share of each microbatch rather than of every m-th one
whole; memory is checked, with the activations and versions of the weights that stand so far from the end (section 3.3
keeps as many as microbatches in flight). One flat dynamic program: the paper's runs level by level of a hierarchy.
"""

from __future__ import annotations

import math

import numpy as np

from meshwright.search.pipelines.answer import NO_PLAN, PLAIN, Asked, StageAnswer, copied, in_problem
from meshwright.search.pipelines.dynamic import least_longest_turn
from meshwright.search.pipelines.lattice import chain, stage_table
from meshwright.search.stages import Array, StageProblem


def pipedream_turn(compute: Array, message: Array, update: Array) -> Array:
    """T of the equations above, and what a stage sends."""
    return np.maximum(np.maximum(compute, update), message)


def pipedream(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The plan whose slowest stage is the fastest."""
    problem_of_copies = copied(problem)
    if not problem_of_copies.options:
        return StageAnswer(None, math.inf, statement="no option of copied stages")
    table = stage_table(chain(problem_of_copies), "PipeDream", turn=pipedream_turn)
    found = least_longest_turn(table, problem.num_devices)
    if found.plan is None:
        return StageAnswer(None, math.inf, math.inf, NO_PLAN, found.num_sweeps)
    says = "no plan of contiguous stages, copied or not, has a faster slowest stage"
    return StageAnswer(
        in_problem(problem, problem_of_copies, found.plan), found.objective, found.lower_bound, says, found.num_sweeps
    )
