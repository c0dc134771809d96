"""The plan: a strategy, the inputs that it was made for (by hash), its estimate, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.results import Estimate
from meshwright.strategy import Strategy
from meshwright.workload import Workload


@dataclass(frozen=True)
class Certificate:
    """What a method can say of its answer: what it looked at, and in which sense the answer is the best."""

    method: str
    space: str
    evaluator: str
    num_strategies: int
    num_feasible: int
    exhaustive: bool
    statement: str
    objective: str = "step_time"
    seed: int | None = None


@dataclass(frozen=True)
class Plan:
    """A strategy that can be run or exported, with its provenance.

    `model`, `cluster` and `engine` are the texts that name the inputs; the hashes are those of their canonical files.
    """

    model: str
    model_hash: str
    cluster: str
    cluster_hash: str
    engine: str
    workload: Workload
    shorthand: str
    strategy: Strategy
    estimate: Estimate
    certificate: Certificate
