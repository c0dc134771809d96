"""What a method for whole operator graphs is: it gets a model, a cluster and a workload, and gives placements.

Where a method of `search.method` looks through a grid of degrees, these choose for every operator, or cut the graph
into stages and choose within each. They register under a name; each is a file of its own and says in its docstring from
which paper it comes, what that paper optimises, and what differs here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from meshwright.cluster import Cluster
from meshwright.engine import Engine
from meshwright.graph import Graph
from meshwright.plan import Certificate
from meshwright.registry import Registry
from meshwright.results import Estimate
from meshwright.search.choose.solver import ENDLESS, Deadline
from meshwright.strategy import MeshAxis, Strategy
from meshwright.workload import Workload

#: Sums of the same numbers in another order differ by less than this share.
ROUNDING = 1e-12


@dataclass(frozen=True)
class GraphQuestion:
    """A model to place on a cluster for a workload.

    `mesh` are the axes that operators may be split over (none: the cluster's own, nodes by devices of a node).
    `microbatches` is how many a pipeline's step is cut into (0: the method chooses). `annotations` are a user's splits
    of some tensors or operators, `block/name` -> axis -> dim, which a method completes (GSPMD); `cuts` are positions in
    `graph.sequence` at which a user wants stages to begin (GPipe). `with_recompute` lets activations be made again.
    """

    graph: Graph
    cluster: Cluster
    engine: Engine
    workload: Workload
    objective: str = "step_time"
    mesh: tuple[MeshAxis, ...] = ()
    microbatches: int = 0
    annotations: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cuts: Sequence[int] = ()
    with_recompute: bool = False
    seed: int = 0
    deadline: Deadline = ENDLESS


@dataclass(frozen=True)
class Placed:
    """A strategy with its estimate; `objective` is what the method itself minimised, in its own unit (seconds of a
    step, or of the slowest stage)."""

    strategy: Strategy
    estimate: Estimate
    objective: float


@dataclass(frozen=True)
class GraphAnswer:
    """Strategies, the best first (none: `reasons` say why), and how good they may be called.

    `lower_bound_s`: no strategy of the space that the method looked at has a lower step time by this evaluator (minus
    infinity where the method gives none); `num_members` is how many that space has (0: not counted). `phases_s` are
    CPU-seconds by what they went into."""

    found: tuple[Placed, ...]
    certificate: Certificate
    lower_bound_s: float = -math.inf
    reasons: tuple[str, ...] = ()
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    phases_s: Mapping[str, float] = field(default_factory=dict)
    num_members: int = 0

    @property
    def gap(self) -> float:
        """How far the best may lie above the optimum of its space, as a share of its time; infinite: not known."""
        if not self.found or not math.isfinite(self.lower_bound_s):
            return math.inf
        best_s = self.found[0].estimate.step_time_s
        gap = max(0.0, best_s - self.lower_bound_s) / best_s
        return gap if gap > ROUNDING else 0.0


class GraphMethod(Protocol):
    """A way of looking for a strategy of a whole graph."""

    def __call__(self, question: GraphQuestion) -> GraphAnswer:
        """Answer a question; raises `InputError` where it cannot be asked so."""


GRAPH_METHODS: Registry[GraphMethod] = Registry("method")
