"""What a method is: a way of looking for the best strategy of a space, apart from the space and from the evaluator.

A method gets a `Question` and gives an `Answer`: strategies in order, and a certificate of what it looked at. Methods
register under a name; each is a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from meshwright.cluster import Cluster
from meshwright.engine import Engine
from meshwright.plan import Certificate
from meshwright.registry import Registry
from meshwright.search.space import Space
from meshwright.strategy import Shorthand

OBJECTIVES = ("step_time", "memory", "pareto")


@dataclass(frozen=True)
class Question:
    """A space to look in, the cluster and engine to price it for, what is wanted, and how many answers."""

    space: Space
    cluster: Cluster
    engine: Engine
    objective: str = "step_time"
    top: int = 10


@dataclass(frozen=True)
class Found:
    """A member of a space as the method saw it: `chosen` is what it is besides its shorthand, in words, and the numbers
    are of its own choices; `sequences` are those of a step."""

    shorthand: Shorthand
    chosen: Mapping[str, Any]
    sequences: int
    step_time_s: float
    peak_memory_bytes: float

    @property
    def samples_per_s(self) -> float:
        """Sequences trained on in a second."""
        return self.sequences / self.step_time_s


@dataclass(frozen=True)
class Answer:
    """The best members first, all feasible; none where none is. Of those that only memory keeps from running, `least`
    needs least of it; `infeasible` says how many members cannot run, by reason, and `examples` why one of each kind
    cannot, where that is all of them."""

    found: tuple[Found, ...]
    certificate: Certificate
    elapsed_s: float
    cpu_s: float
    num_evaluated: int
    least: Found | None = None
    infeasible: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[str, ...] = ()

    @property
    def ranking(self) -> tuple[Shorthand, ...]:
        """The strategies of the members found."""
        return tuple(found.shorthand for found in self.found)

    @property
    def nearest(self) -> Shorthand | None:
        """The strategy that comes nearest to fitting, or fits best."""
        return self.least.shorthand if self.least else None

    @property
    def strategies_per_s(self) -> float:
        """Strategies evaluated, time and memory both, per CPU-second of deriving and composing."""
        return self.num_evaluated / self.cpu_s if self.cpu_s > 0 else 0.0


class Method(Protocol):
    """A way of looking. `progress` is told how many strategies have been evaluated."""

    def __call__(self, question: Question, progress: Callable[[int], None] | None = None) -> Answer:
        """Answer a question."""


METHODS: Registry[Method] = Registry("method")
