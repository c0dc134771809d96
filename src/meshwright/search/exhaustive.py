"""The exhaustive method: evaluate every member of the space, sort. Its certificate is the enumeration itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from meshwright.plan import Certificate
from meshwright.search.evaluate import Evaluated, evaluate_space
from meshwright.search.method import METHODS, Answer, Question
from meshwright.search.space import KEYS


def exhaustive(question: Question, progress: Callable[[int], None] | None = None) -> Answer:
    """Every member priced, the best first; ties go to less memory, then to the canonical order of the space."""
    started = time.perf_counter()
    evaluated = evaluate_space(question.space, question.cluster, question.engine, progress)
    order = ranked(evaluated, question.objective)
    nearest = int(np.argmin(evaluated.peak_memory_bytes)) if evaluated.num_strategies else None
    return Answer(
        ranking=tuple(evaluated.shorthand(row) for row in order[: question.top]),
        certificate=_certificate(question, evaluated),
        elapsed_s=time.perf_counter() - started,
        cpu_s=evaluated.cpu_s,
        num_evaluated=evaluated.num_strategies,
        nearest=None if nearest is None else evaluated.shorthand(nearest),
    )


def ranked(evaluated: Evaluated, objective: str) -> np.ndarray[Any, Any]:
    """Rows of feasible members, best first; for `pareto` those that no other beats in both time and memory."""
    rows = np.flatnonzero(evaluated.feasible)
    time_s, memory = evaluated.step_time_s[rows], evaluated.peak_memory_bytes[rows]
    keys = [evaluated.columns[key][rows] for key in reversed(KEYS)]
    first, second = (memory, time_s) if objective == "memory" else (time_s, memory)
    order = np.lexsort([*keys, second, first])
    rows = rows[order]
    if objective == "pareto":
        memory = memory[order]
        rows = rows[memory < np.concatenate([[np.inf], np.minimum.accumulate(memory)[:-1]])]
    return rows


def _certificate(question: Question, evaluated: Evaluated) -> Certificate:
    space, feasible = question.space, int(evaluated.feasible.sum())
    limits = [f"{key} = {value}" for key, value in space.limits.fixed.items()]
    limits += [f"{key} <= {value}" for key, value in space.limits.largest.items()]
    narrowed = f", narrowed to {', '.join(limits)}" if limits else ""
    return Certificate(
        method="exhaustive",
        space=space.name,
        evaluator="analytic",
        num_strategies=evaluated.num_strategies,
        num_feasible=feasible,
        exhaustive=True,
        objective=question.objective,
        statement=(
            f"all {evaluated.num_strategies:,} strategies of the {space.name} space of {space.graph.name} on "
            f"{space.num_devices:,} devices{narrowed} were evaluated; {feasible:,} fit; by this evaluator none of "
            f"them is better"
        ),
    )


METHODS.add("exhaustive", exhaustive)
