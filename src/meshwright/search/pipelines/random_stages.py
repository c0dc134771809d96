"""Random: plans of contiguous stages drawn evenly from all of them; the floor under every other method."""

from __future__ import annotations

import math
import random

from meshwright.search.pipelines.answer import PLAIN, Asked, StageAnswer
from meshwright.search.pipelines.groups import best_of
from meshwright.search.stages import PlannedStage, StagePlan, StageProblem

#: Plans drawn.
NUM_DRAWN = 300


def random_stages(problem: StageProblem, asked: Asked = PLAIN) -> StageAnswer:
    """The best of some plans."""
    draw = Draw(problem, random.Random(asked.seed))
    plans = (draw.plan() for number in range(NUM_DRAWN) if number == 0 or not asked.deadline.passed)
    return best_of(problem, plans if draw.total else (), f"the best of at most {NUM_DRAWN} drawn evenly, no bound")


class Draw:
    """Draws plans that use all devices, each with the same probability."""

    def __init__(self, problem: StageProblem, generator: random.Random) -> None:
        self.problem, self.generator = problem, generator
        self.options = {
            size: [k for k in range(len(problem.options)) if problem.devices_K[k] == size] for size in problem.sizes
        }
        # ways[s][d]: choices of options of s stages that use d devices together.
        self.ways: list[dict[int, int]] = [{0: 1}]
        for _ in range(min(problem.num_units, problem.num_devices // min(problem.sizes))):
            following: dict[int, int] = {}
            for used, number in self.ways[-1].items():
                for size, options in self.options.items():
                    if used + size <= problem.num_devices:
                        following[used + size] = following.get(used + size, 0) + number * len(options)
            self.ways.append(following)
        self.weights = [
            math.comb(problem.num_units - 1, s - 1) * ways.get(problem.num_devices, 0) if s else 0
            for s, ways in enumerate(self.ways)
        ]
        self.total = sum(self.weights)

    def plan(self) -> StagePlan:
        """One plan."""
        left = self.generator.randrange(self.total)
        num_stages = 0
        while left >= self.weights[num_stages]:
            left -= self.weights[num_stages]
            num_stages += 1
        total = self.problem.num_units
        bounds = [0, *sorted(self.generator.sample(range(1, total), num_stages - 1)), total]
        stages = []
        devices = self.problem.num_devices
        for index in range(num_stages):
            k = self._option(num_stages - 1 - index, devices)
            devices -= int(self.problem.devices_K[k])
            units = tuple(range(bounds[index], bounds[index + 1]))
            stages.append(PlannedStage(units, (k,) * len(units)))
        return StagePlan(tuple(stages))

    def _option(self, stages_left: int, devices: int) -> int:
        weights = {
            size: len(options) * self.ways[stages_left].get(devices - size, 0) for size, options in self.options.items()
        }
        left = self.generator.randrange(sum(weights.values()))
        for size, weight in weights.items():
            if left < weight:
                return self.options[size][left // (weight // len(self.options[size]))]
            left -= weight
        raise AssertionError("weights sum to more than was drawn")
