"""What a method is: a way of looking for the best strategy of a space, apart from the space and from the evaluator.

A method gets a `Question` and gives an `Answer`: strategies in order, and a certificate of what it looked at. Methods
register under a name; each is a file of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from meshwright.cluster import Cluster
from meshwright.engine import Engine
from meshwright.plan import Certificate
from meshwright.registry import Registry
from meshwright.search.space import UniformSpace
from meshwright.strategy import Shorthand

OBJECTIVES = ("step_time", "memory", "pareto")


@dataclass(frozen=True)
class Question:
    """A space to look in, the cluster and engine to price it for, what is wanted, and how many answers."""

    space: UniformSpace
    cluster: Cluster
    engine: Engine
    objective: str = "step_time"
    top: int = 10


@dataclass(frozen=True)
class Answer:
    """The best strategies first, all feasible; empty where none is. `nearest` is the one that lacks least memory."""

    ranking: tuple[Shorthand, ...]
    certificate: Certificate
    elapsed_s: float
    cpu_s: float
    num_evaluated: int
    nearest: Shorthand | None = None

    @property
    def strategies_per_s(self) -> float:
        """Strategies evaluated, time and memory both, per CPU-second of deriving and composing."""
        return self.num_evaluated / self.cpu_s if self.cpu_s > 0 else 0.0


class Method(Protocol):
    """A way of looking. `progress` is told how many strategies have been evaluated."""

    def __call__(self, question: Question, progress: Callable[[int], None] | None = None) -> Answer:
        """Answer a question."""


METHODS: Registry[Method] = Registry("method")
