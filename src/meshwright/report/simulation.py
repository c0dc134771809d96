"""Simulated steps and schedules as people see them: timelines, what ranks wait for, the critical path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.report.palette import KIND_COLOURS
from meshwright.report.text import MAX_RANKS_DRAWN, plain_table, side_by_side, timeline_text
from meshwright.report.timeline import Bar, Panel
from meshwright.schedule import Timeline, compute_parts
from meshwright.sim.conditions import Spread
from meshwright.sim.program import KIND_OF_ACTION, Kind
from meshwright.sim.step import Simulation
from meshwright.sim.tasks import KINDS
from meshwright.sim.timeline import critical_path, idle, timeline_of
from meshwright.sweep import FloatArray
from meshwright.units import format_seconds

if TYPE_CHECKING:
    from meshwright.search.auto_schedule import AutoSchedule

#: Segments of the critical path shown in a terminal.
MAX_SEGMENTS = 12


# --- schedules ------------------------------------------------------------------------------------------------------


def schedule_view(name: str, timeline: Timeline, width: int, found: AutoSchedule | None = None) -> RenderableType:
    """A schedule drawn, with its numbers."""
    ranks = len(timeline.actions)
    parts: list[RenderableType] = []
    if ranks <= MAX_RANKS_DRAWN:
        parts += [Text(f"{name} (digits: microbatch; one line a rank)", style="dim"), timeline_text(timeline, width)]
        parts.append(legend())
    peak = timeline.peak_in_flight
    told = str(list(peak)) if ranks <= MAX_RANKS_DRAWN else f"{max(peak)} at most"
    parts.append(
        Text(
            f"makespan {timeline.makespan_s:g}   period {timeline.period_s:g}   "
            f"bubble {timeline.bubble_fraction:.1%}   in flight {told}"
        )
    )
    if found is not None:
        word = "optimal" if found.is_optimal else f"no schedule takes less than {found.lower_bound:g}"
        named = {other: span for other, span in found.named.items() if span is not None}
        best = min(named, key=lambda other: named[other]) if named else None
        against = f"; the best named one, {best}, takes {named[best]:g}" if best else "; no named one fits"
        parts.append(Text(f"found by {found.method}: {word}{against}"))
    return Group(*parts)


def legend() -> Text:
    """What the colours of a timeline mean."""
    text = Text()
    for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT):
        text.append("  ", style=f"on {KIND_COLOURS[kind].terminal}")
        text.append(f" {kind}  ", style="dim")
    return text


def schedule_panel(name: str, timeline: Timeline) -> Panel:
    """A schedule as a picture."""
    bars = [
        Bar(f"rank {rank}", start, end, KIND_OF_ACTION[part.kind], str(part.microbatch))
        for rank, row in enumerate(timeline.actions)
        for action, whole_start, whole_end in zip(row, timeline.start_s[rank], timeline.end_s[rank], strict=True)
        for part, start, end in side_by_side(compute_parts(action), whole_start, whole_end)
    ]
    rows = tuple(f"rank {rank}" for rank in range(len(timeline.actions)))
    told = f"period {timeline.period_s:g}, bubble {timeline.bubble_fraction:.1%}"
    return Panel(name, rows, bars, timeline.makespan_s, told)


# --- simulated steps -------------------------------------------------------------------------------------------------


def simulation_panel(simulation: Simulation, title: str) -> Panel:
    """A simulated step as a picture: the actions of one device of each rank, and what ends the step."""
    bars = []
    found = timeline_of(simulation)
    for rank, own in enumerate(simulation.graph.ranks):
        row, name = zip(found.actions[rank], found.start_s[rank], found.end_s[rank], strict=True), f"rank {rank}"
        bars += [Bar(name, start, end, KIND_OF_ACTION[each.kind], str(each.microbatch)) for each, start, end in row]
        tasks = simulation.graph.tasks_of(rank)
        starts, ends = simulation.swept.start_N[tasks], simulation.swept.end_N[tasks]
        for n in np.flatnonzero(own.chained_n & (ends > starts) & (own.action_n < 0)):
            bars.append(Bar(name, float(starts[n]), float(ends[n]), KINDS[own.kind_n[n]]))
    rows = tuple(f"rank {rank}" for rank in range(len(simulation.graph.ranks)))
    told = f"bubble {simulation.estimate.bubble_fraction:.1%}"
    return Panel(title, rows, bars, simulation.makespan_s, told)


def simulated_timeline(simulation: Simulation, width: int) -> Text:
    """What each pipeline rank does when, a line each; of a slice of time what takes most of it."""
    ranks = simulation.graph.ranks
    text = Text()
    if len(ranks) > MAX_RANKS_DRAWN:
        return text
    cells = max(10, width - 9)
    edges = np.linspace(0.0, simulation.makespan_s, cells + 1)
    for rank, own in enumerate(ranks):
        tasks = simulation.graph.tasks_of(rank)
        text.append(f"rank {rank:<3} ", style="dim")
        chained = np.flatnonzero(own.chained_n)
        starts, ends = simulation.swept.start_N[tasks][chained], simulation.swept.end_N[tasks][chained]
        kinds, order = own.kind_n[chained], np.argsort(starts, kind="stable")
        spent = _share_of_cells(starts[order], ends[order], kinds[order], edges)
        for cell in range(cells):
            best = int(spent[cell].argmax())
            if spent[cell].sum() < 0.5 * (edges[1] - edges[0]):
                text.append("·", style=KIND_COLOURS[Kind.IDLE].terminal)
            else:
                text.append("█", style=KIND_COLOURS[KINDS[best]].terminal)
        text.append("\n")
    for kind in KINDS:
        text.append("·" if kind is Kind.IDLE else "█", style=KIND_COLOURS[kind].terminal)
        text.append(f" {kind.value}  ", style="dim")
    return text


def _share_of_cells(starts: FloatArray, ends: FloatArray, kinds: Any, edges: FloatArray) -> FloatArray:
    """Seconds of each kind within each cell of time."""
    spent = np.zeros((len(edges) - 1, len(KINDS)))
    for kind in np.unique(kinds):
        mine = kinds == kind
        # Work done by each edge: whole tasks before it, and the part of the one that it cuts.
        done = np.concatenate([[0.0], np.cumsum(ends[mine] - starts[mine])])
        index = np.searchsorted(starts[mine], edges, side="right")
        before = done[index]
        last = np.maximum(index - 1, 0)
        over = np.where(index > 0, np.maximum(ends[mine][last] - edges, 0.0), 0.0)
        spent[:, kind] = np.diff(before - over)
    return spent


def idle_view(simulation: Simulation) -> RenderableType:
    """Where ranks idle and why."""
    table = plain_table(
        ("idle", "left"), ("warm-up", "right"), ("drain", "right"), ("others", "right"), ("links", "right")
    )
    num_ranks = len(simulation.graph.ranks)
    shown = range(num_ranks) if num_ranks <= MAX_RANKS_DRAWN else [0, num_ranks // 2, num_ranks - 1]
    for rank in shown:
        found = idle(simulation, rank)
        most = max(found.links, key=lambda link: found.links[link], default="")
        told = f" ({most})" if most else ""
        table.add_row(
            f"rank {rank}",
            format_seconds(found.warm_up_s),
            format_seconds(found.drain_s),
            format_seconds(found.imbalance_s),
            format_seconds(sum(found.links.values())) + told,
        )
    return table


def critical_view(simulation: Simulation) -> RenderableType:
    """The longest segments of the critical path, in order of time."""
    path = critical_path(simulation)
    longest = sorted(path, key=lambda segment: segment.start_s - segment.end_s)[:MAX_SEGMENTS]
    table = plain_table(("critical path", "left"), ("what", "left"), ("from", "right"), ("takes", "right"))
    for segment in sorted(longest, key=lambda segment: segment.start_s):
        table.add_row(
            f"rank {segment.rank} {segment.action}".strip(),
            segment.name if segment.kind == "mixed" else f"{segment.name} ({segment.kind})",
            format_seconds(segment.start_s),
            format_seconds(segment.end_s - segment.start_s),
        )
    rest = len(path) - len(longest)
    return Group(table, Text(f"and {rest} shorter ones", style="dim")) if rest else table


def spread_text(drawn: Spread) -> Text:
    """Quantiles of a step under jitter."""
    quantiles = ", ".join(f"{point} %: {format_seconds(value)}" for point, value in drawn.quantiles_s.items())
    return Text(f"of {drawn.num_samples} steps under jitter: {quantiles}; mean {format_seconds(drawn.mean_s)}")
