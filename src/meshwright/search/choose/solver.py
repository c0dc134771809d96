"""What a solver of the choice problem is: it gets an instance and a deadline, and gives a choice and a lower bound.

Solvers register under a name; each is a file of its own. The best choice so far and the best bound so far are handed
on as they are found, so that whoever interrupts a solver, or runs several, has them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from meshwright.choice import Array, Instance
from meshwright.registry import Registry


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock (`time.monotonic`), in seconds; infinite where there is none."""

    at_s: float = math.inf

    @property
    def left_s(self) -> float:
        """Seconds until then, none where it has passed."""
        return max(0.0, self.at_s - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether it has passed."""
        return time.monotonic() >= self.at_s

    def part(self, share: float) -> Deadline:
        """The moment at which `share` of what is left will have passed."""
        return replace(self, at_s=time.monotonic() + share * self.left_s) if math.isfinite(self.at_s) else self


#: No limit of time.
ENDLESS = Deadline()


def within(seconds: float) -> Deadline:
    """The moment `seconds` from now."""
    return Deadline(time.monotonic() + seconds)


@dataclass(frozen=True, eq=False)
class Solved:
    """A legal choice with its cost, or None with infinite cost where none was found, and a bound that no legal choice
    is below (infinite where there is none: the instance is infeasible). `reasons` say why it is."""

    choice_N: Array | None
    cost: float
    lower_bound: float
    reasons: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        """How far the cost may lie above the optimum, as a share of the cost: 0 where the choice is proven optimal."""
        if not math.isfinite(self.cost):
            return math.inf
        return max(0.0, self.cost - self.lower_bound) / max(abs(self.cost), 1e-300)

    @property
    def is_infeasible(self) -> bool:
        """Whether it is proven that no legal choice exists."""
        return self.lower_bound == math.inf


NOTHING = Solved(None, math.inf, -math.inf)


def better(one: Solved, other: Solved) -> Solved:
    """The cheaper choice of the two with the higher bound of the two."""
    chosen = other if other.cost < one.cost else one
    return replace(
        chosen,
        lower_bound=max(one.lower_bound, other.lower_bound),
        reasons=tuple(dict.fromkeys((*one.reasons, *other.reasons))),
    )


#: Is told of each better choice or bound as it is found.
Report = Callable[[Solved], None]


class Solver(Protocol):
    """A way of solving. It returns at the deadline or soon after (a few tenths of a second), with the best it has; a
    solver without bounds gives minus infinity. `start` is a legal choice to begin from. Same seed, same answer, as far
    as the deadline does not decide."""

    def __call__(
        self,
        instance: Instance,
        deadline: Deadline,
        *,
        seed: int = 0,
        start: Array | None = None,
        report: Report | None = None,
    ) -> Solved:
        """Solve an instance."""


SOLVERS: Registry[Solver] = Registry("solver")
