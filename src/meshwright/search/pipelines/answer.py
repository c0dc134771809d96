"""What a two-level method is: a pure function from a stage problem to a plan, with what it minimised and a bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from meshwright.search.choose.solver import Deadline
from meshwright.search.stages import StagePlan, StageProblem


@dataclass(frozen=True)
class Asked:
    """What a user asks for besides: units at which stages begin, a seed, and until when. `known_s` is a step time that
    is known to be reached: a method that proves that it finds none shorter may stop."""

    cuts: Sequence[int] = ()
    seed: int = 0
    deadline: Deadline = field(default_factory=Deadline)
    known_s: float = math.inf


#: Nothing besides.
PLAIN = Asked()


@dataclass(frozen=True)
class StageAnswer:
    """A plan (None where the method found none that fits), the method's own objective in seconds, a value that no plan
    of its space has a lower objective than (minus infinity: not known), and in words what that means. `bounds_step`:
    the objective is the step time of `stages.evaluate`."""

    plan: StagePlan | None
    objective: float
    lower_bound: float = -math.inf
    statement: str = ""
    num_looked_at: int = 0
    bounds_step: bool = False

    @property
    def is_optimal(self) -> bool:
        """Whether the plan is proven the best of the method's space by its own objective."""
        return math.isfinite(self.objective) and self.lower_bound >= self.objective * (1 - 1e-12)


StageMethod = Callable[[StageProblem, Asked], StageAnswer]

NO_PLAN = "no plan of its space fits into memory and takes up all devices"


def copied(problem: StageProblem) -> StageProblem:
    """The problem with replicated stages alone: each device of a group has the whole stage (options `is_copied`)."""
    return problem.only(k for k, option in enumerate(problem.options) if option.is_copied)


def in_problem(problem: StageProblem, part: StageProblem, plan: StagePlan) -> StagePlan:
    """A plan of a problem with fewer options as one of the whole problem."""
    index = {id(option): k for k, option in enumerate(problem.options)}
    return replace(
        plan,
        stages=tuple(
            replace(stage, options=tuple(index[id(part.options[k])] for k in stage.options)) for stage in plan.stages
        ),
    )
