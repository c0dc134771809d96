"""What is wrong with a contest instance, number by number: the slow look of `io.contest` where reading fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from meshwright.errors import Problem
from meshwright.io.native import shown

#: Problems that are told; of more only the number is.
MOST_TOLD = 20

MAX_TIME = 2**62


def faults(data: Any, where: str) -> list[Problem]:
    """Up to `MOST_TOLD` problems and how many more there are, none where the instance is sound."""
    every = _faults(data)
    told = [
        Problem(f"{where}: {place}" if place else where, value, rule) for place, value, rule in islice(every, MOST_TOLD)
    ]
    more = sum(1 for _ in every)
    return [*told, Problem(where, "", f"and {more:,} more problems")] if more else told


Fault = tuple[str, str, str]  # place, value, rule


def _faults(data: Any) -> Iterator[Fault]:
    if not isinstance(data, dict) or not isinstance(data.get("problem"), dict):
        yield "", shown(data), 'an object with the key "problem" that holds an object is expected'
        return
    problem = data["problem"]
    limit = problem.get("usage_limit")
    if limit is not None and not _is_number(limit):
        yield "problem.usage_limit", shown(limit), "a number, not below 0, is expected"
    nodes = problem.get("nodes")
    if not isinstance(nodes, dict) or not isinstance(nodes.get("costs"), list):
        yield "problem.nodes", shown(nodes), "an object is expected whose costs are a list with a list for each node"
        return
    costs = nodes["costs"]
    yield from _numbers("problem.nodes.costs", costs)
    for node, row in enumerate(costs):
        if row == []:
            yield f"problem.nodes.costs[{node}]", "[]", "a node has at least one strategy"
    yield from _usages(nodes, costs)
    edges = problem.get("edges")
    if edges is None:
        return
    if not isinstance(edges, dict) or not all(isinstance(edges.get(key), list) for key in ("nodes", "costs")):
        yield "problem.edges", shown(edges), "an object is expected whose nodes and costs are lists"
        return
    yield from _edges(edges["nodes"], edges["costs"], costs)


def _usages(nodes: dict[str, Any], costs: list[Any]) -> Iterator[Fault]:
    usages, intervals = nodes.get("usages"), nodes.get("intervals")
    for key, rows in (("usages", usages), ("intervals", intervals)):
        place = f"problem.nodes.{key}"
        if rows is not None and not isinstance(rows, list):
            yield place, shown(rows), "a list with a list for each node is expected"
        elif rows and len(rows) != len(costs):
            yield place, "", f"has {len(rows):,} rows for {len(costs):,} nodes"
    if isinstance(usages, list):
        yield from _numbers("problem.nodes.usages", usages)
        for node, (row, cost) in enumerate(zip(usages, costs, strict=False)):
            if isinstance(row, list) and isinstance(cost, list) and len(row) != len(cost):
                yield f"problem.nodes.usages[{node}]", "", f"has {len(row)} entries for {len(cost)} strategies"
    for node, pair in enumerate(intervals if isinstance(intervals, list) else []):
        if not isinstance(pair, list) or len(pair) != 2 or any(type(t) is not int or abs(t) > MAX_TIME for t in pair):
            yield f"problem.nodes.intervals[{node}]", shown(pair), "two whole numbers are expected, start and stop"
        elif pair[0] > pair[1]:
            yield f"problem.nodes.intervals[{node}]", shown(pair), "the start may not be after the stop"


def _edges(ends: list[Any], matrices: list[Any], costs: list[Any]) -> Iterator[Fault]:
    if len(ends) != len(matrices):
        yield "problem.edges", "", f"has {len(ends):,} rows of nodes and {len(matrices):,} of costs"
    for edge, pair in enumerate(ends):
        place = f"problem.edges.nodes[{edge}]"
        if not isinstance(pair, list) or not pair or any(type(node) is not int for node in pair):
            yield place, shown(pair), "the numbers of two nodes are expected"
            continue
        if len(pair) > 2:
            yield place, shown(pair), f"joins {len(pair)} nodes; edges of one or two nodes can be solved"
            continue
        wrong = [node for node in pair if not 0 <= node < len(costs)]
        if wrong:
            yield place, shown(pair), f"there is no node {wrong[0]}; they are numbered 0 to {len(costs) - 1}"
            continue
        sizes = [len(costs[node]) if isinstance(costs[node], list) else 0 for node in pair]
        matrix = matrices[edge] if edge < len(matrices) else None
        if isinstance(matrix, list) and len(matrix) != math.prod(sizes):
            expected = " x ".join(map(str, sizes))
            yield f"problem.edges.costs[{edge}]", "", f"has {len(matrix)} entries; {expected} strategies are expected"
    yield from _numbers("problem.edges.costs", matrices)


def _numbers(place: str, rows: list[Any]) -> Iterator[Fault]:
    for index, row in enumerate(rows):
        if not isinstance(row, list):
            yield f"{place}[{index}]", shown(row), "a list of numbers is expected"
            continue
        for column, value in enumerate(row):
            if not _is_number(value):
                yield f"{place}[{index}][{column}]", shown(value), "a number, not below 0, is expected"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value >= 0  # true and false are no numbers here
