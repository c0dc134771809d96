"""The exhaustive method: evaluate every member of the space, sort. Its certificate is the enumeration itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from meshwright.plan import Certificate
from meshwright.search.evaluate import Evaluated, evaluate_space
from meshwright.search.method import METHODS, Answer, Found, Question
from meshwright.search.space import OBSTACLES, Space


def exhaustive(question: Question, progress: Callable[[int], None] | None = None) -> Answer:
    """Every member priced, the best first; ties go to less memory, then to the canonical order of the space."""
    started = time.perf_counter()
    evaluated = evaluate_space(question.space, question.cluster, question.engine, progress)
    order = ranked(evaluated, question.objective, question.top)
    least = _least_memory(evaluated)
    return Answer(
        found=tuple(_found(question.space, evaluated, row) for row in order),
        certificate=_certificate(question, evaluated),
        elapsed_s=time.perf_counter() - started,
        cpu_s=evaluated.cpu_s,
        num_evaluated=evaluated.num_strategies,
        least=None if least is None else _found(question.space, evaluated, least),
        infeasible=evaluated.infeasible,
        examples=tuple(_examples(question, evaluated)) if least is None else (),
    )


def _least_memory(evaluated: Evaluated) -> int | None:
    """Of the members that could run, the row of the one that needs least memory."""
    rows = np.flatnonzero(evaluated.obstacle == 0)
    return int(rows[evaluated.peak_memory_bytes[rows].argmin()]) if len(rows) else None


def _found(space: Space, evaluated: Evaluated, row: int) -> Found:
    shorthand = evaluated.shorthand(row)
    return Found(
        shorthand=shorthand,
        chosen=space.chosen(evaluated.columns, row),
        sequences=space.batch(shorthand.dp),
        step_time_s=float(evaluated.step_time_s[row]),
        peak_memory_bytes=float(evaluated.peak_memory_bytes[row]),
    )


def _examples(question: Question, evaluated: Evaluated) -> Iterator[str]:
    """Of each kind of obstacle how many members have it, and why the first of them cannot run."""
    for reason, count in evaluated.infeasible.items():
        row = int(np.argmax(evaluated.obstacle == OBSTACLES.index(reason)))
        why = question.space.reason(question.cluster, evaluated.columns, row)
        yield f"{count:,} members cannot run ({reason}), among them {evaluated.shorthand(row)}: {why}"


def ranked(evaluated: Evaluated, objective: str, top: int | None = None) -> np.ndarray[Any, Any]:
    """Rows of feasible members, best first, all or `top` of them; for `pareto` those that no other beats in both time
    and memory."""
    time_s, memory = evaluated.time_s, evaluated.peak_memory_bytes
    first, second = (memory, time_s) if objective == "memory" else (time_s, memory)
    rows = np.flatnonzero(evaluated.feasible)
    if top is not None and top < len(rows) and objective != "pareto":
        rows = rows[first[rows] <= np.partition(first[rows], top - 1)[top - 1]]  # a sort of all takes long
    keys = [column[rows] for column in reversed(evaluated.columns.values())]
    rows = rows[np.lexsort([*keys, second[rows], first[rows]])]
    if objective == "pareto":
        least = np.minimum.accumulate(memory[rows])
        rows = rows[memory[rows] < np.concatenate([[np.inf], least[:-1]])]
    return rows[:top]


def _certificate(question: Question, evaluated: Evaluated) -> Certificate:
    space, feasible = question.space, int(evaluated.feasible.sum())
    limits = [f"{key} = {value}" for key, value in space.limits.fixed.items()]
    limits += [f"{key} <= {value}" for key, value in space.limits.largest.items()]
    narrowed = f", narrowed to {', '.join(limits)}" if limits else ""
    kept = evaluated.infeasible
    others = f" (not so {', '.join(f'{kept[why]:,} for {why}' for why in kept)})" if set(kept) - {"memory"} else ""
    measure = "" if space.whole_batch or question.objective == "memory" else " in time for one sequence"
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
            f"{space.num_devices:,} devices{narrowed} were evaluated; {feasible:,} fit{others}; by this evaluator "
            f"none of them is better{measure}"
        ),
    )


METHODS.add("exhaustive", exhaustive)
