"""Results: what an evaluator says of a strategy (`Estimate`) and what a run showed (`Measurement`).

A ledger's entries sum to their total: the entries of `time` to `step_time_s`, those of `memory` to
`peak_memory_bytes`. An infeasible estimate keeps its numbers and says why it is infeasible.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Estimate:
    """A prediction of one step.

    `time` in seconds by cause, summing to `step_time_s`; `memory` in bytes by category of the worst rank, summing to
    `peak_memory_bytes`; `communication` in bytes that the busiest rank sends per step, by mesh axis. `mfu` counts the
    model's FLOPs (three forwards), `hfu` adds what is recomputed; both are fractions of the dense peak.

    `warnings` are faults of the engine that this strategy meets. Four of five runs lie within each interval (None: the
    evaluator knows none), wider where nothing similar was measured. `fit_probability` is that of a peak within the
    device's memory; `feasible` asks for a reserve besides.
    """

    feasible: bool
    reasons: tuple[str, ...]
    step_time_s: float
    time: dict[str, float]
    memory: dict[str, float]
    peak_memory_bytes: float
    mfu: float
    hfu: float
    bubble_fraction: float
    communication: dict[str, float]
    tokens_per_s: float
    evaluator: str = "analytic"
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    step_time_interval_s: tuple[float, float] | None = None
    peak_memory_interval_bytes: tuple[float, float] | None = None
    fit_probability: float | None = None


@dataclass(frozen=True)
class Check:
    """A run held against one device with the same weights and data.

    Differences are relative: of losses to the loss, of a gradient to its largest magnitude, or to 1e-6 of the largest
    of all gradients where that is more (the true gradient of a key bias is 0; in bfloat16 its noise is larger, and the
    floor is 1e-4).
    """

    max_loss_difference: float
    max_gradient_difference: float
    num_gradients: int
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether both differences stay within the tolerance of the type computed in."""
        return max(self.max_loss_difference, self.max_gradient_difference) <= self.tolerance


@dataclass(frozen=True)
class Ran:
    """An action that a rank ran, in PyTorch's notation, and when: seconds since the step's first action started."""

    action: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Measurement:
    """A real run: the loss of each step, the median step after the first, the largest peak of any rank.

    `timeline` (empty unless the run was recorded) holds, for each pipeline rank of the first replica, the actions of
    the last step in the order in which they ran.
    """

    losses: tuple[float, ...]
    step_time_s: float
    step_times_s: tuple[float, ...]
    peak_memory_bytes: float
    rank_memory_bytes: tuple[float, ...] = field(default=())
    check: Check | None = None
    timeline: tuple[tuple[Ran, ...], ...] = ()

    @property
    def bubble_fraction(self) -> float | None:
        """The idle share, 0 to 1, of ranks x period in the timeline; the period is the longest span, over ranks, from
        first to last action. None where nothing was recorded."""
        rows = [row for row in self.timeline if row]
        period_s = max((row[-1].end_s - row[0].start_s for row in rows), default=0.0)
        if not period_s:
            return None
        busy_s = sum(ran.end_s - ran.start_s for row in rows for ran in row)
        return 1.0 - busy_s / (len(self.timeline) * period_s)
