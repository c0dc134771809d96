"""The nearest strategy that fits: one or two keys of a shorthand changed, the least time added."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from meshwright.cluster import Cluster
from meshwright.cost.analytic import Case
from meshwright.engine import Engine
from meshwright.errors import InputError
from meshwright.graph import Graph
from meshwright.sim.evaluators import evaluate
from meshwright.strategy import Recompute, Shorthand, divisors, legal_strategy, parse_shorthand
from meshwright.units import format_bytes, format_seconds
from meshwright.workload import Workload


def nearest_fix(shorthand: str, graph: Graph, cluster: Cluster, workload: Workload, engine: Engine) -> str | None:
    """The fastest legal neighbour that fits, as the keys to change and what it needs; None where no neighbour does."""
    given = parse_shorthand(shorthand)
    best: tuple[float, str] | None = None
    for candidate in neighbours(given):
        try:
            strategy = legal_strategy(candidate, graph, cluster.num_devices, workload)
        except InputError:
            continue  # an illegal neighbour is no fix
        found = evaluate(Case(graph, cluster, strategy, workload, engine))
        if found.feasible and (best is None or found.step_time_s < best[0]):
            changed = ",".join(part for part in str(candidate).split(",") if part not in str(given).split(","))
            needs = f"{format_bytes(found.peak_memory_bytes)}, {format_seconds(found.step_time_s)} a step"
            best = (found.step_time_s, f"{changed} ({needs})")
    return best[1] if best else None


def neighbours(given: Shorthand) -> Iterator[Shorthand]:
    """Shorthands that differ in recomputation, ZeRO level, microbatch, or one trade between two degrees."""
    for recompute in Recompute:
        for zero in range(4):
            for mbs in divisors(given.mbs):
                candidate = replace(given, recompute=recompute, zero=zero, mbs=mbs)
                yield candidate
                for factor in (2, 4, 8):
                    yield from _traded(candidate, factor)


def _traded(given: Shorthand, factor: int) -> Iterator[Shorthand]:
    if given.dp % factor == 0:
        yield replace(given, dp=given.dp // factor, tp=given.tp * factor, sp=1)
        yield replace(given, dp=given.dp // factor, pp=given.pp * factor)
