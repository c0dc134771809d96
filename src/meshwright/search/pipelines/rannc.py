"""RaNNC: atomic pieces merged into blocks, and blocks into stages by a dynamic program under memory.

M. Tanaka, K. Taura, T. Hanawa, K. Torisawa, "Automatic Graph Partitioning for Very Large-scale Deep Learning", IPDPS
2021, arXiv:2103.16063. Three phases: atomic subcomponents (our units); k blocks (32 in the paper) by merging, of even
time; stages of blocks, each on devices that hold copies of it, by a dynamic program that minimises the longest turn for
each number of stages under the memory of a device. Of the numbers of stages the one with the least time of a step
is taken.

What we changed. Blocks are merged greedily, the lightest pair of neighbours first, without the paper's uncoarsening;
the number of microbatches is the problem's (the caller tries several).
"""

from __future__ import annotations

import math

from meshwright.search.pipelines.answer import NO_PLAN, PLAIN, Asked, StageAnswer, copied, in_problem
from meshwright.search.pipelines.dynamic import longest_turns
from meshwright.search.pipelines.groups import unit_times
from meshwright.search.pipelines.lattice import chain, stage_table
from meshwright.search.stages import Array, StageProblem

#: The paper's k.
NUM_BLOCKS = 32


def rannc(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The plan of the number of stages with the least step time."""
    part = copied(problem)
    if not part.options:
        return StageAnswer(None, math.inf, statement="no option of copied stages")
    cuts = block_starts(unit_times(part).min(axis=1), NUM_BLOCKS)
    table = stage_table(chain(part, cuts))
    m = problem.num_microbatches
    found = [each for each in longest_turns(table, problem.num_devices) if each.stages]
    if not found:
        return StageAnswer(None, math.inf, -math.inf, f"{NO_PLAN}, of {len(cuts)} blocks")

    def latency(stages: tuple[tuple[int, int], ...]) -> float:
        turns = [
            float(table.time_QGN[len(stages) - 1 - index, table.lattice.distinct_T[transition], size])
            for index, (transition, size) in enumerate(stages)
        ]
        return sum(turns) + (m - 1) * max(turns)

    best = min(found, key=lambda each: latency(each.stages))
    says = f"of {len(found)} numbers of stages of {len(cuts)} blocks, each with its shortest longest turn, the best"
    plan = in_problem(problem, part, table.plan(best.stages))
    return StageAnswer(plan, latency(best.stages), -math.inf, says, len(found))


def block_starts(weight_U: Array, num_blocks: int) -> list[int]:
    """The units at which blocks begin: the lightest pair of neighbours is merged until so many are left.

    >>> block_starts([1.0, 1.0, 5.0, 1.0], 2)
    [0, 2]
    """
    starts, weights = list(range(len(weight_U))), [float(weight) for weight in weight_U]
    while len(starts) > num_blocks:
        lightest = min(range(1, len(starts)), key=lambda index: weights[index - 1] + weights[index])
        weights[lightest - 1] += weights.pop(lightest)
        del starts[lightest]
    return starts
