"""Random and exhaustive: the floor under every method, and the proof by enumeration for the smallest graphs."""

from __future__ import annotations

import numpy as np

from meshwright.search.choose.exhaustive import solve as exhausted
from meshwright.search.choose.solver import NOTHING, better
from meshwright.search.placing.answer import Found, Posed, choice_of
from meshwright.search.placing.narrow import settled
from meshwright.search.placing.wiring import sides_of

#: Strategies drawn.
NUM_DRAWN = 100


def draw(posed: Posed) -> Found:
    """The best of some draws: every operator gets one of its splits, each as likely as any other; what lies at rest is
    chosen exactly for them, within memory."""
    space = posed.space()
    sides, sizes = sides_of(space), space.instance.num_strategies_N
    generator = np.random.default_rng(posed.question.seed)
    best, number, reasons = NOTHING, 0, NOTHING.reasons
    while number < NUM_DRAWN and not (number and posed.deadline.passed):
        number += 1
        drawn_N = generator.integers(sizes)
        solved = settled(space.instance, sides.operators, drawn_N, posed.deadline, below=best.cost)
        best, reasons = better(best, solved), solved.reasons
    statement = f"the best of {number} drawn evenly from the splits of {len(sides.operators)} operators; no bound"
    return choice_of(posed, space, best.choice_N, statement, num_looked_at=number, reasons=reasons)


def exhaust(posed: Posed) -> Found:
    """Every choice of every operator and tensor tried; refused where there are too many."""
    space = posed.space()
    solved = exhausted(space.instance, posed.deadline)
    if solved.choice_N is None:
        return Found((), "nothing was found by trying all", 0, reasons=solved.reasons)
    is_complete = solved.gap == 0.0
    words = "all of them tried" if is_complete else "; ".join(solved.reasons)
    return Found(
        (space.strategy(solved.choice_N),),
        f"optimal among {space.num_strategies:,} placements" if is_complete else f"best so far: {words}",
        space.num_strategies,
        lower_bound_s=solved.lower_bound,
        exhaustive=is_complete,
    )
