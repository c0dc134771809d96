"""TensorOpt: all best compromises between the time of a step and its memory, by frontier tracking.

Z. Cai, X. Yan, K. Ma, Y. Wu, Y. Huang, J. Cheng, T. Su, F. Yu, "TensorOpt: Exploring the Tradeoffs in Distributed DNN
Training with Auto-Parallelism", arXiv:2004.10856: the frontier tracking algorithm keeps for each partial strategy every
(time, memory) point that no other beats in both, where elimination keeps one cost (`search.choose.frontier` has it).

The objective `pareto` gives the front, `step_time` its fastest strategy, `memory` the one that needs least. What we
changed:
- a strategy's memory has to be a sum over operators, so it is what is held when the forward turns into the backward:
  parameters, state and all that is kept. Each point of that front is then priced as everything else here, with its peak
  over the step, and what another beats in time and peak is dropped;
- sets of points are thinned where they grow large (`MOST_POINTS`), and the answer says what that may have cost;
  unthinned the front is exact for the memory at the turn;
- the corners of the front's convex hull come first, by elimination at prices of memory (Aneja and Nair 1979,
  "Bicriteria transportation problem"): they are exact, the fastest is one of them, and where tables of sets are too
  large for the time they are all there is;
- training state lies as its parameter does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from meshwright.choice import Array, Instance, Usage, cost_of, instance_of, peak_of
from meshwright.search.choose.elimination import eliminate, plan_of
from meshwright.search.choose.frontier import Front, TooManyPoints, pareto_front
from meshwright.search.choose.solver import Deadline
from meshwright.search.choose.times import places_of_usages
from meshwright.search.operators import OperatorSpace
from meshwright.search.placing.answer import Found, Posed, no_room
from meshwright.units import format_bytes, format_seconds

#: Points of one set at most, coarse and fine.
MOST_POINTS = (16, 128)

#: Corners of the hull.
MOST_CORNERS = 64

#: A price of memory at which nothing else counts: all that the fastest holds costs so many times its time.
DEAR = 1e6

#: Strategies of a front that are given, spread evenly over it.
MOST_SHOWN = 32


def track(posed: Posed) -> Found:
    """The front, or the end of it that the objective asks for."""
    space = posed.space()
    instance = at_the_turn(space)
    corners, bound = hull(instance, posed.deadline)
    front = finest_front(instance, posed.deadline)
    everything = [*corners, *(front.choices_FN if front else ())]
    choices = unbeaten(space, everything)
    if not choices:
        return Found((), "no point of the front fits", len(everything), reasons=_reasons(space, everything))
    match posed.question.objective:
        case "step_time":
            chosen = choices[:1]
        case "memory":
            chosen = choices[-1:]
        case _:
            places = np.unique(np.linspace(0, len(choices) - 1, MOST_SHOWN).round().astype(int))
            chosen = [choices[place] for place in places.tolist()]
    bound = max(bound, front.cost_F.min(initial=np.inf) - front.error if front else -np.inf)
    is_of_time = posed.question.objective != "memory"  # of the peak over the step nothing is proven
    return Found(
        tuple(space.strategy(choice_N) for choice_N in chosen),
        f"{len(choices)} compromises between time and memory, {_how_good(front)}",
        len(everything),
        lower_bound_s=bound if is_of_time else -np.inf,
        exhaustive=is_of_time and front is not None and front.error == 0.0,
    )


def _how_good(front: Front | None) -> str:
    if front is None:
        return "corners of the front's hull alone: there was no time for what lies between"
    if front.error:
        return f"sets were thinned: a point may be up to {format_seconds(front.error)} from the front"
    return "exact for what is held at the turn from forward to backward"


def _reasons(space: OperatorSpace, choices: Sequence[Array]) -> tuple[str, ...]:
    if known := no_room(space):
        return known
    room = format_bytes(space.instance.limit + space.fixed_bytes)
    peaks = [peak_of(space.instance, choice_N) + space.fixed_bytes for choice_N in choices]
    least = f": the one with the least peak needs {format_bytes(min(peaks))}" if peaks else ""
    return (f"of {len(peaks)} compromises none fits into {room} a device{least}",)


def hull(instance: Instance, deadline: Deadline) -> tuple[list[Array], float]:
    """Corners of the convex hull of the front, the fastest and the smallest first, and the time of the fastest; none
    where tables of elimination are too large.

    Between two neighbours lies another exactly if, at the price of memory at which they cost the same, something costs
    less."""
    plan = plan_of(instance)
    if plan is None:
        return [], -np.inf
    usage_C = np.bincount(places_of_usages(instance), instance.usage_V, minlength=len(instance.cost_C))

    def cheapest(price: float) -> tuple[float, float, float, Array]:
        found = eliminate(plan, instance.cost_C + price * usage_C)
        choice_N = found.choice()
        return float(found.least), cost_of(instance, choice_N), peak_of(instance, choice_N), choice_N

    bound, fast_s, fast_bytes, fastest = cheapest(0.0)
    _, small_s, small_bytes, smallest = cheapest(DEAR * max(fast_s, 1e-9) / max(fast_bytes, 1.0))
    corners = [fastest, smallest]
    gaps = [(fast_s, fast_bytes, small_s, small_bytes)]
    while gaps and len(corners) < MOST_CORNERS and not deadline.passed:
        one_s, one_bytes, other_s, other_bytes = gaps.pop(0)
        if one_bytes <= other_bytes or other_s <= one_s:
            continue
        price = (other_s - one_s) / (one_bytes - other_bytes)
        least, new_s, new_bytes, choice_N = cheapest(price)
        if least < (one_s + price * one_bytes) * (1 - 1e-9):
            corners.append(choice_N)
            gaps += [(one_s, one_bytes, new_s, new_bytes), (new_s, new_bytes, other_s, other_bytes)]
    return corners, bound


def finest_front(instance: Instance, deadline: Deadline) -> Front | None:
    """The front with the most points that there is time and room for."""
    front = None
    for max_points in MOST_POINTS:
        if (front is not None and front.error == 0.0) or deadline.passed:
            break
        try:
            front = pareto_front(instance, max_points=max_points, deadline=deadline)
        except (TooManyPoints, TimeoutError):
            break
    return front


def at_the_turn(space: OperatorSpace) -> Instance:
    """The space's instance with the usages alone that are held when the first backward runs, all at one time."""
    instance, turn = space.instance, space.lifetimes.num_times // 2
    held_U = np.flatnonzero((instance.intervals_U[:, 0] <= turn) & (turn < instance.intervals_U[:, 1]))
    nodes = range(instance.num_nodes)
    edges = [(*map(int, ends), instance.matrix(edge)) for edge, ends in enumerate(instance.edges_E)]
    usages = [Usage(int(instance.usage_node_U[index]), 0, 1, instance.usage(index)) for index in held_U.tolist()]
    own = instance_of([instance.costs(node) for node in nodes], edges, usages, limit=instance.limit)  # type: ignore[arg-type]
    return replace(own, name=instance.name)


def unbeaten(space: OperatorSpace, choices: Iterable[Array]) -> list[Array]:
    """The choices that fit and that no other beats in time and in peak, the fastest first."""
    instance, kept, least = space.instance, [], np.inf
    for choice_N in sorted(choices, key=lambda choice_N: (cost_of(instance, choice_N), peak_of(instance, choice_N))):
        peak = peak_of(instance, choice_N)
        if peak < least and peak <= instance.limit:
            kept.append(choice_N)
            least = peak
    return kept
