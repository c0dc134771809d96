"""The evaluators by name: everything that turns a strategy into an estimate without running it.

`analytic` is the closed form of `cost`, `simulated` runs the step's tasks; both take measured times of single operators
(a profile) in place of the model's. Where no closed form is known of a schedule, only `simulated` answers.
"""

from __future__ import annotations

from collections.abc import Callable

from meshwright.cost.analytic import Case, estimate_case
from meshwright.cost.pipeline import CLOSED_FORMS, check_closed_form
from meshwright.cost.placed import estimate_placed
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.profile import Profile
from meshwright.results import Estimate
from meshwright.sim.step import simulate

Evaluator = Callable[[Case, Profile | None], Estimate]


def _simulated(case: Case, profile: Profile | None) -> Estimate:
    return simulate(case, profile=profile).estimate


EVALUATORS: dict[str, Evaluator] = {"analytic": estimate_case, "simulated": _simulated}


def evaluator_name(name: str | None, schedule: str) -> str:
    """The evaluator of that name or, where none is asked for, the quickest that knows the schedule.

    >>> evaluator_name(None, "1F1B"), evaluator_name(None, "ZBVZeroBubble")
    ('analytic', 'simulated')
    """
    if name is None:
        return "analytic" if schedule in CLOSED_FORMS else "simulated"
    if name == "analytic":
        check_closed_form(schedule, "--evaluator", name, "simulated")
    return name


def check_evaluator(name: str | None, *more: str) -> None:
    """Raise `InputError` where there is no such evaluator, nor one of `more`."""
    known = [*EVALUATORS, *more]
    if name is not None and name not in known:
        raise InputError([Problem("--evaluator", name, f"known: {', '.join(known)}", nearest_name(name, known))])


def evaluate(case: Case, name: str | None = None, profile: Profile | None = None) -> Estimate:
    """Predict one step of a legal strategy; one that places single operators has an evaluator of its own, the sum of
    what they take (`cost.placed`)."""
    if any(stage.splits for stage in case.strategy.stages):
        rule = "stages with meshes of their own are estimated where they are planned; the plan file holds that estimate"
        raise InputError([Problem("strategy", "stages[].splits", rule)])
    if case.strategy.is_placed:
        if name == "simulated" or profile is not None:
            rule = "strategies that place single operators have the analytic evaluator alone"
            raise InputError([Problem("--evaluator", name or "profiled", rule, "analytic")])
        return estimate_placed(case.graph, case.cluster, case.strategy, case.workload, case.engine)
    return EVALUATORS[evaluator_name(name, case.strategy.schedule)](case, profile)
