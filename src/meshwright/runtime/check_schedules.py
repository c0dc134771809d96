"""Simulated schedules held against real ones: `python -m meshwright.runtime.check_schedules examples/llama-20m`.

Trains a small model (of at least 8 layers) on four processes of this machine under several schedules, records what
each rank does when, and simulates the same with the times of single operators as this machine takes them (a profile)
and processes sharing its cores. The order of actions must be the same; how far the idle share is off is told in points.
On a machine that others use too, actions of equal work differ, and waiting for the slower of them is idle time: it is
simulated too, with the spread that equal actions of the runs showed (`jitter`).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshwright.cluster import preset_cluster
from meshwright.cost.analytic import Case
from meshwright.cost.layouts import operators_of
from meshwright.engine import load_engine
from meshwright.graph import Graph
from meshwright.io.models import load_model
from meshwright.profile import Profile
from meshwright.results import Ran
from meshwright.runtime.launch import run
from meshwright.runtime.profile import load_or_measure
from meshwright.schedule import compute_parts, parse_action
from meshwright.sim.build import build
from meshwright.sim.conditions import Conditions
from meshwright.sim.step import simulate_on
from meshwright.sim.timeline import timeline_of
from meshwright.strategy import Strategy, legal_strategy, parse_shorthand
from meshwright.workload import Workload

Timeline = Sequence[Sequence[Ran]]

RANKS = 4
SCHEDULES = (
    "schedule=GPipe",
    "schedule=1F1B",
    "schedule=Interleaved1F1B,vpp=2",
    "schedule=LoopedBFS,vpp=2",
    "schedule=ZB-H1",
    "schedule=InterleavedZeroBubble,vpp=2",
    "schedule=ZBVZeroBubble,vpp=2",
    "schedule=DualPipeV,vpp=2",
)


@dataclass(frozen=True)
class Checked:
    """A schedule's idle share: simulated with steady times, with the `jitter` that was seen (the median of `DRAWS`),
    and as measured in each repeat; and whether actions came in one order."""

    schedule: str
    same_order: bool
    steady: float
    jitter: float
    simulated: float
    measured: tuple[float, ...]

    @property
    def points_off(self) -> float:
        """Simulated less the median of measured, in percentage points."""
        return 100 * (self.simulated - statistics.median(self.measured))


#: Steps that are drawn under jitter.
DRAWS = 25


def jitter_of(timelines: Iterable[Timeline]) -> float:
    """How much equal actions vary: sigma of the logarithm of their seconds, the median over stages and kinds. What
    shared cores make of them is in it too, so it is an upper bound."""
    seconds: dict[tuple[int, int, str], list[float]] = {}
    for index, timeline in enumerate(timelines):
        for ran in (ran for row in timeline for ran in row):
            action = parse_action(ran.action)
            seconds.setdefault((index, action.stage, action.kind), []).append(ran.end_s - ran.start_s)
    return statistics.median(statistics.pstdev(map(math.log, values)) for values in seconds.values())


def check_schedule(
    graph: Graph, strategy: Strategy, workload: Workload, profile: Profile, *, steps: int, repeats: int
) -> Checked:
    """Run and simulate one schedule."""
    case = Case(graph, preset_cluster(f"local-cpux{RANKS}"), strategy, workload, load_engine("meshwright"))
    built, cores = build(case, profile=profile), len(os.sched_getaffinity(0))
    expected = timeline_of(simulate_on(built, num_cores=cores))
    runs = [run(graph, strategy, workload, steps=steps, record=True) for _ in range(repeats)]
    orders = [
        [[part for ran in row for part in compute_parts(parse_action(ran.action))] for row in measured.timeline]
        for measured in runs
    ]
    wanted = [list(row) for row in expected.actions]
    jitter = jitter_of(measured.timeline for measured in runs)
    drawn = [
        timeline_of(simulate_on(built, conditions=Conditions(jitter=jitter, seed=seed), num_cores=cores))
        for seed in range(DRAWS)
    ]
    return Checked(
        schedule=strategy.schedule,
        same_order=all(order == wanted for order in orders),
        steady=expected.bubble_fraction,
        jitter=jitter,
        simulated=statistics.median(timeline.bubble_fraction for timeline in drawn),
        measured=tuple(measured.bubble_fraction or 0.0 for measured in runs),
    )


def main() -> int:
    """Check every schedule and print a table; 1 where an order differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="preset, config.json, or its folder")
    parser.add_argument("--profile", default="profile.json", help="times of operators, measured where missing")
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    graph, workload = load_model(asked.model), Workload(asked.microbatches, asked.seq_len, "float32")
    texts = [f"pp={RANKS},mbs=1,{schedule}" for schedule in SCHEDULES]
    strategies = [legal_strategy(parse_shorthand(text), graph, RANKS, workload) for text in texts]
    engine = load_engine("meshwright")
    keys = [key for strategy in strategies for key in operators_of(graph, strategy, workload, engine)]
    profile = load_or_measure(Path(asked.profile), list(dict.fromkeys(keys)), len(os.sched_getaffinity(0)))
    heads = ("same order", "steady", "jitter", "simulated", "measured", "points off")
    print(f"{'schedule':22}" + "".join(f"{head:>11}" for head in heads))
    good = True
    for strategy in strategies:
        found = check_schedule(graph, strategy, workload, profile, steps=asked.steps, repeats=asked.repeats)
        measured = statistics.median(found.measured)
        print(
            f"{found.schedule:22}{'yes' if found.same_order else 'NO':>11}{found.steady:11.1%}{found.jitter:11.2f}"
            f"{found.simulated:11.1%}{measured:11.1%}{found.points_off:+11.1f}",
            flush=True,
        )
        good &= found.same_order
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
