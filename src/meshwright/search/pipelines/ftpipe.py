"""FTPipe: stages that are not contiguous, by scheduling pieces of the model on devices like jobs on machines.

S. Eliad, I. Hakimi, A. De Jagger, M. Silberstein, A. Schuster, "Fine-tuning giant neural networks on commodity
hardware with automatic pipeline model parallelism", USENIX ATC 2021 (Mixed-pipe). The graph is coarsened to L P pieces
of even time for P devices, the pieces are dealt to the devices by multiprocessor scheduling, longest first to the
least loaded, and the result is improved by moves. Minimises the load of the most loaded device, hence maximises the
throughput of an asynchronous pipeline.

What we changed. A device may be a group of them, equal for all and under one option. Pieces go to the least loaded
group that still has memory for them. Moves and swaps are taken while they shorten the longest turn, messages included;
L is 1 to 4. The paper runs such plans without a flush; ours run in an order with one (`stages.piece_table`), in which
they are also judged.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from meshwright.search.pipelines.answer import NO_PLAN, PLAIN, Asked, StageAnswer
from meshwright.search.pipelines.groups import Grouping, groupings, plan_of_parts, unit_bytes, unit_times
from meshwright.search.pipelines.rannc import block_starts
from meshwright.search.stages import Array, StagePlan, StageProblem, evaluate

#: Pieces for each device, at most.
MOST_PIECES = 4


def ftpipe(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The plan with the least loaded busiest group, of those that fit."""
    candidates = sorted(_candidates(problem, asked), key=lambda each: each[0])
    for index, (load_s, plan) in enumerate(candidates):
        cost = evaluate(problem, plan)
        if cost.feasible:
            says = f"the first that fits of {len(candidates)} plans by their largest load, no bound"
            return StageAnswer(plan, load_s, -math.inf, says, index + 1)
    return StageAnswer(None, math.inf, -math.inf, NO_PLAN, len(candidates))


def _candidates(problem: StageProblem, asked: Asked) -> Iterator[tuple[float, StagePlan]]:
    for grouping in groupings(problem):
        for pieces in range(1, MOST_PIECES + 1):
            if asked.deadline.passed or pieces * grouping.num_groups > problem.num_units:
                break
            mixed = _Mixed(problem, grouping, pieces * grouping.num_groups)
            if (group_P := mixed.dealt()) is not None:
                group_P = mixed.improved(group_P)
                yield mixed.longest(group_P), plan_of_parts(group_P[mixed.piece_U], grouping.option, "1F1B")


class _Mixed:
    """Pieces of a model for groups of devices. Made once for a grouping and a number of pieces P."""

    def __init__(self, problem: StageProblem, grouping: Grouping, num_pieces: int) -> None:
        k, self.num_groups = grouping.option, grouping.num_groups
        weight_U = unit_times(problem)[:, k]
        starts = block_starts(weight_U, num_pieces)
        self.piece_U = np.searchsorted(starts, np.arange(problem.num_units), side="right") - 1
        self.weight_P = np.bincount(self.piece_U, weight_U)
        # As many microbatches may be on their way as there are groups.
        held = min(self.num_groups, problem.num_microbatches) - 1
        kept_U = problem.kept_HK[problem.kind_U, k]
        self.bytes_P = np.bincount(self.piece_U, unit_bytes(problem)[:, k] + held * kept_U)
        self.room = problem.memory_limit - float(problem.working_HK[:, k].max())
        one, other = self.piece_U[problem.edges_E].T
        crosses = one != other
        self.ends = np.column_stack([one, other])[crosses]
        self.message_s = problem.latency_K[k] + problem.bytes_E[crosses] * problem.seconds_per_byte_K[k]

    def dealt(self) -> Array | None:
        """Longest first to the least loaded group with room; None where a piece finds none."""
        group_P = np.zeros(len(self.weight_P), dtype=np.int64)
        load, used = np.zeros(self.num_groups), np.zeros(self.num_groups)
        for piece in np.argsort(-self.weight_P, kind="stable"):
            fits = used + self.bytes_P[piece] <= self.room
            if not fits.any():
                return None
            group = int(np.where(fits, load, np.inf).argmin())
            group_P[piece] = group
            load[group] += self.weight_P[piece]
            used[group] += self.bytes_P[piece]
        return group_P

    def loads(self, group_P: Array) -> Array:
        """Seconds of a microbatch on each group, with the messages that it sends: on of outputs, back of gradients."""
        load = np.bincount(group_P, self.weight_P, minlength=self.num_groups)
        one, other = group_P[self.ends].T if len(self.ends) else (np.zeros(0, dtype=int),) * 2
        sent_s = np.where(one != other, self.message_s, 0.0)
        load += np.bincount(one, sent_s, minlength=self.num_groups)
        return np.asarray(load + np.bincount(other, sent_s, minlength=self.num_groups))

    def longest(self, group_P: Array) -> float:
        """The largest load."""
        return float(self.loads(group_P).max())

    def improved(self, group_P: Array) -> Array:
        """Moves of a piece of the busiest group, and swaps with one, while the largest load falls."""
        best = self.longest(group_P)
        while True:
            busiest = int(self.loads(group_P).argmax())
            for attempt in self._neighbours(group_P, busiest):
                if (load := self.longest(attempt)) < best * (1 - 1e-9) and self._fits(attempt):
                    group_P, best = attempt, load
                    break
            else:
                return group_P

    def _fits(self, group_P: Array) -> bool:
        used = np.bincount(group_P, self.bytes_P, minlength=self.num_groups)
        return bool((used <= self.room).all())

    def _neighbours(self, group_P: Array, busiest: int) -> Iterator[Array]:
        own, others = np.flatnonzero(group_P == busiest), np.flatnonzero(group_P != busiest)
        for piece in own:
            for group in range(self.num_groups):
                if group != busiest and len(own) > 1:
                    moved = group_P.copy()
                    moved[piece] = group
                    yield moved
            for other in others:
                swapped = group_P.copy()
                swapped[piece], swapped[other] = group_P[other], busiest
                yield swapped
