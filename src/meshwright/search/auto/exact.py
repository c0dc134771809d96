"""The best schedule with proof, as far as time allows: a constraint program, solved by OR-Tools' CP-SAT.

One start a letter and microbatch, between its head and what its tail leaves of the best makespan known; one machine a
rank; what must come before what (`pipeline.needs`); on a rank with several stages, what they keep together. That
microbatches are in order takes all symmetry away.

Reference: Perron, Didier, Gay, "The CP-SAT-LP solver", CP 2023. Ortools is imported here alone, and this module only
where a proof is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from meshwright.search.auto.bounds import Window
from meshwright.search.auto.pipeline import UNLIMITED, F, IntArray, W, Whole, chain, needs


@dataclass(frozen=True)
class Proof:
    """Starts, `[letter, microbatch]`, of the best schedule found (None: none as good as the one it began with), and the
    bound that was proven, in units of the times."""

    start_Lm: IntArray | None
    lower_bound: int


def solve(
    times: Whole,
    within: Window,
    *,
    start_Lm: IntArray,
    makespan: int,
    lower_bound: int,
    time_limit_s: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Proof:
    """Look for a schedule no longer than `makespan`, beginning from the starts of one; `progress` gets makespan and
    bound."""
    model, starts = _model(times, within, start_Lm, makespan, lower_bound)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = 2
    solver.parameters.random_seed = seed % 2**31
    status = solver.solve(model, _Teller(progress) if progress else None)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    # The solver's bound is whole in a program of whole numbers; it comes as a float.
    bound = math.ceil(solver.best_objective_bound - 1e-6)
    start = np.array([[solver.value(start) for start in row] for row in starts]) if found else None
    return Proof(start, max(lower_bound, bound))


class _Teller(cp_model.CpSolverSolutionCallback):  # type: ignore[misc,unused-ignore]  # ortools has no types for mypy
    """Hands each better schedule's length and the bound on."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        super().__init__()
        self._progress = progress

    def on_solution_callback(self) -> None:
        self._progress(int(self.objective_value), math.ceil(self.best_objective_bound - 1e-6))


def _model(
    times: Whole, within: Window, start_Lm: IntArray, makespan: int, lower_bound: int
) -> tuple[Any, list[list[Any]]]:
    """The program and its starts. Every variable has a hint: the solver improves a whole solution only."""
    model = cp_model.CpModel()
    m, duration_L = times.num_microbatches, [int(duration) for duration in times.duration_L]
    latest_Lm = makespan - within.tail_Lm - times.duration_L[:, None]
    starts = [
        [model.new_int_var(int(within.head_Lm[letter, k]), int(latest_Lm[letter, k]), "") for k in range(m)]
        for letter in range(len(duration_L))
    ]
    for letter, row in enumerate(starts):
        for k, start in enumerate(row):
            model.add_hint(start, int(start_Lm[letter, k]))
    end = model.new_int_var(lower_bound, makespan, "")
    model.add_hint(end, makespan)
    for need in needs(times):
        for k in range(need.behind, m):
            model.add(starts[need.letter][k] >= starts[need.needs][k - need.behind] + duration_L[need.needs] + need.lag)
    for letter in chain(times.num_stages):
        if letter % 3 == W:
            model.add(end >= starts[letter][m - 1] + duration_L[letter])
    for rank in range(len(times.most_P)):
        letters = [int(letter) for letter in np.flatnonzero(times.rank_L == rank)]
        model.add_no_overlap(
            model.new_fixed_size_interval_var(start, duration_L[letter], "")
            for letter in letters
            for start in starts[letter]
        )
        # A rank with one stage has its limit among the needs.
        if len(letters) > 3 and times.most_P[rank] < UNLIMITED:
            _keep_within(model, times, starts, start_Lm, letters, makespan)
    model.minimize(end)
    return model, starts


def _keep_within(
    model: Any, times: Whole, starts: list[list[Any]], start_Lm: IntArray, letters: list[int], makespan: int
) -> None:
    spans, units = [], []
    for letter in letters:
        if letter % 3 == F:
            weight = int(times.duration_L[letter + W])
            for k in range(times.num_microbatches):
                length = model.new_int_var(0, makespan, "")
                model.add_hint(length, int(start_Lm[letter + W, k] + weight - start_Lm[letter, k]))
                spans.append(model.new_interval_var(starts[letter][k], length, starts[letter + W][k] + weight, ""))
                units.append(int(times.kept_S[letter // 3]))
    model.add_cumulative(spans, units, int(times.most_P[times.rank_L[letters[0]]]))
