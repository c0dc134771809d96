"""The last word on a solution: cost and memory recomputed in whole numbers from the lists of the instance's file.

Nothing here knows of `choice.Instance` or of any solver, so that a fault there cannot hide itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

INFINITE_COST = 10**18  # [spec: the contest's format]

Number = int | Fraction


@dataclass(frozen=True)
class Checked:
    """What a solution costs and its highest usage, exactly; `faults` say why it is not legal."""

    cost: Number
    peak: Number
    faults: tuple[str, ...] = ()

    @property
    def is_legal(self) -> bool:
        """Whether it may be handed out."""
        return not self.faults


def check_solution(problem: Mapping[str, Any], solution: Sequence[int]) -> Checked:
    """Cost and peak usage of a solution (the strategy of each node) of a contest file's `problem`.

    >>> one = {"nodes": {"costs": [[1, 2]], "usages": [[5, 0]], "intervals": [[0, 9]]}, "usage_limit": 3}
    >>> check_solution(one, [1]).cost, check_solution(one, [0]).faults
    (2, ('at time 0 usage is 5, the limit is 3',))
    """
    nodes = problem["nodes"]
    costs = nodes["costs"]
    if len(solution) != len(costs):
        return Checked(0, 0, (f"has {len(solution)} strategies for {len(costs)} nodes",))
    wrong = [n for n, s in enumerate(solution) if type(s) is not int or not 0 <= s < len(costs[n])]
    if wrong:
        return Checked(0, 0, tuple(f"node {n} has no strategy {solution[n]}" for n in wrong[:20]))
    faults: list[str] = []
    total: Number = 0
    for node, s in enumerate(solution):
        if costs[node][s] >= INFINITE_COST:
            faults.append(f"strategy {s} of node {node} is forbidden")
        total += _exact(costs[node][s])
    edges = problem.get("edges") or {"nodes": [], "costs": []}
    for edge, (ends, matrix) in enumerate(zip(edges["nodes"], edges["costs"], strict=True)):
        place = 0
        for node in ends:
            place = place * len(costs[node]) + solution[node]
        if matrix[place] >= INFINITE_COST:
            faults.append(f"edge {edge} forbids strategies {[solution[node] for node in ends]} of nodes {ends}")
        total += _exact(matrix[place])
    time, peak = _peak(nodes, solution)
    limit = problem.get("usage_limit")
    if limit is not None and peak > _exact(limit):
        faults.append(f"at time {time} usage is {peak}, the limit is {limit}")
    return Checked(total, peak, tuple(faults))


def _peak(nodes: Mapping[str, Any], solution: Sequence[int]) -> tuple[int, Number]:
    """The first time at which most is in use, and how much; 0 where nothing is ever."""
    steps: defaultdict[int, Number] = defaultdict(int)
    if nodes.get("usages"):
        # Where no intervals are given nothing is ever in use.
        for (start, stop), usages, s in zip(nodes.get("intervals") or [], nodes["usages"], solution, strict=False):
            if start < stop:
                steps[start] += _exact(usages[s])
                steps[stop] -= _exact(usages[s])
    in_use: Number = 0
    time, peak = 0, in_use
    for moment in sorted(steps):
        in_use += steps[moment]
        if in_use > peak:
            time, peak = moment, in_use
    return time, peak


def _exact(value: int | float) -> Number:
    """The number as the file has it: 0.1 is a tenth, not the double next to it."""
    return value if type(value) is int else int(value) if float(value).is_integer() else Fraction(repr(value))
