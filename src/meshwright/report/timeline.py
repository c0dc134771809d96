"""Who does what when, drawn as bars: a self-contained HTML page with one panel below the other on one axis of time.

A pipeline of 64 ranks and 512 microbatches has a hundred thousand bars, so bars are not objects of their own: all bars
of a kind in a panel are one path (`bar_path`). What the pointer shows comes from points strewn along the bars
(`hover_points`), and words stand only in bars that are wide enough for them (`labels`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meshwright.errors import Problem
from meshwright.io.native import refuse, write_text
from meshwright.report.palette import KIND_COLOURS
from meshwright.sim.program import Kind
from meshwright.units import format_seconds

FloatArray = npt.NDArray[np.float64]

#: What the page is laid out for; a wider window only leaves more room.
PLOT_WIDTH_PX = 1050
#: Rows are as high as the screen allows, and never less than what a small word needs.
PLOT_HEIGHT_PX = 850
ROW_HEIGHT_PX = (13, 44)
#: Of what is not rows: legend, headings, axis.
OTHER_HEIGHT_PX = 112
#: A digit of 11 px is about 6.5 px wide.
DIGIT_PX = 6.5
#: Half of a bar's height, in rows.
HALF = 0.42
#: The pointer finds a bar whose next point is less than this away.
HOVER_STEP_PX = 8.0


@dataclass(frozen=True)
class Bar:
    """What `row` does from `start_s` to `end_s`; `label` is written into it where there is room (the microbatch)."""

    row: str
    start_s: float
    end_s: float
    kind: Kind
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One picture: `rows` from top to bottom, each idle wherever it has no bar until `end_s`."""

    title: str
    rows: tuple[str, ...]
    bars: Sequence[Bar]
    end_s: float
    subtitle: str = ""


# --- the data of the drawing ------------------------------------------------------------------------------------------


def panel_problems(panels: Sequence[Panel]) -> list[Problem]:
    """All that keeps panels from being drawn; empty where nothing does.

    >>> for problem in panel_problems([Panel("1F1B", ("rank 0",), [Bar("rank 1", 0.0, 9.0, Kind.FORWARD)], end_s=8.0)]):
    ...     print(problem)
    panel 1F1B, bar 0 = rank 1 from 0.0 to 9.0: no such row; rows: rank 0
    panel 1F1B, bar 0 = rank 1 from 0.0 to 9.0: must start at 0 or later and end no earlier than that, by 8.0
    """
    if not panels:
        return [Problem("timeline", "", "there is no panel to draw")]
    return [problem for panel in panels for problem in _problems_of(panel)]


def _problems_of(panel: Panel) -> Iterator[Problem]:
    place = f"panel {panel.title}"
    if not (panel.end_s > 0 and math.isfinite(panel.end_s)):
        yield Problem(place, f"{panel.end_s}", "must end at a time above 0")
    if not panel.rows or len(set(panel.rows)) < len(panel.rows):
        yield Problem(place, ", ".join(panel.rows), "rows must be there, each with a name of its own")
    for i, bar in enumerate(panel.bars):
        words = f"{bar.row} from {bar.start_s} to {bar.end_s}"
        if bar.row not in panel.rows:
            yield Problem(f"{place}, bar {i}", words, f"no such row; rows: {', '.join(panel.rows)}")
        if not 0 <= bar.start_s <= bar.end_s <= panel.end_s * (1 + 1e-9):  # a sum in another order may differ by less
            rule = f"must start at 0 or later and end no earlier than that, by {panel.end_s}"
            yield Problem(f"{place}, bar {i}", words, rule)


def bar_path(panel: Panel, kind: Kind, scale: float = 1.0) -> tuple[FloatArray, FloatArray]:
    """x and y of the outlines of all bars of a kind; NaN ends an outline. Row i of the panel lies at y = i.

    Idle is the ground on which the others lie: each row from 0 to the end, whatever the bars say.

    >>> bar_path(Panel("p", ("rank 0",), [Bar("rank 0", 1.0, 3.0, Kind.FORWARD)], end_s=4.0), Kind.FORWARD)
    (array([ 1.,  1.,  3.,  3.,  1., nan]), array([-0.42,  0.42,  0.42, -0.42, -0.42,   nan]))
    """
    place = {row: i for i, row in enumerate(panel.rows)}
    boxes = [(bar.start_s, bar.end_s, place[bar.row]) for bar in panel.bars if bar.kind is kind]
    if kind is Kind.IDLE:
        boxes = [(0.0, panel.end_s, i) for i in range(len(panel.rows))]
    start, end, row = np.array(boxes, dtype=float).reshape(-1, 3).T
    gap = np.full(len(boxes), np.nan)
    x = np.stack([start, start, end, end, start, gap], axis=1).ravel() * scale
    y = np.stack([row - HALF, row + HALF, row + HALF, row - HALF, row - HALF, gap], axis=1).ravel()
    return x, y


def edge_px(panel: Panel, whole_s: float) -> float:
    """How wide the white edge of bars is: a tenth of a usual bar at most, or nothing would be left of thin ones."""
    if not panel.bars:
        return 0.0
    usual_s = float(np.median([bar.end_s - bar.start_s for bar in panel.bars]))
    return min(0.8, 0.1 * usual_s * PLOT_WIDTH_PX / whole_s)


def labels(panel: Panel, whole_s: float) -> list[Bar]:
    """The bars wide enough for their label where the axis shows `whole_s`."""
    px_per_s = PLOT_WIDTH_PX / whole_s
    return [
        bar for bar in panel.bars if bar.label and (bar.end_s - bar.start_s) * px_per_s > DIGIT_PX * len(bar.label) + 2
    ]


def hover_points(panel: Panel, whole_s: float) -> list[tuple[float, Bar]]:
    """(time, bar): the middle of every bar, and points all along the wide ones.

    No point of a bar is further from one of them than the pointer reaches, so the next point is on the bar below it.
    """
    step_s = HOVER_STEP_PX * whole_s / PLOT_WIDTH_PX
    found = []
    for bar in panel.bars:
        parts = max(1, math.ceil((bar.end_s - bar.start_s) / step_s))
        found += [(bar.start_s + (bar.end_s - bar.start_s) * (i + 0.5) / parts, bar) for i in range(parts)]
    return found


def time_scale(whole_s: float, unit: str = "s") -> tuple[float, str]:
    """What to multiply times by, and the unit they are then in: seconds get a prefix, other units stay.

    >>> time_scale(0.0123), time_scale(33.0, "forward passes")
    ((1000.0, 'ms'), (1.0, 'forward passes'))
    """
    if unit != "s" or whole_s >= 1:
        return 1.0, unit
    return (1e3, "ms") if whole_s >= 1e-3 else (1e6, "us")


# --- the drawing ------------------------------------------------------------------------------------------------------


def timeline_figure(
    panels: Sequence[Panel], path: str | Path, *, command: str = "", title: str = "", unit: str = "s"
) -> None:
    """Draw `panels` one below the other into the HTML file at `path`; all share the axis of time.

    `command` is what reproduces the figure, for the footer. `unit` is what times are counted in where that is not
    seconds. Raises `InputError` for a path that is not HTML or cannot be written, and what `panel_problems` finds.
    """
    refuse([*_path_problems(path), *panel_problems(panels)], str(path))
    write_text(_page(_figure(panels, unit), panels, title, command), path)


def _path_problems(path: str | Path) -> list[Problem]:
    if Path(path).suffix in (".html", ".htm"):
        return []
    return [Problem(str(path), "", "a figure is an .html file", f"{str(path).removesuffix(Path(path).suffix)}.html")]


def _figure(panels: Sequence[Panel], unit: str) -> Any:
    import plotly.graph_objects as go

    whole_s = max(panel.end_s for panel in panels)
    scale, unit = time_scale(whole_s, unit)
    figure = go.Figure()
    for number, (panel, domain) in enumerate(zip(panels, _domains(panels), strict=True), 1):
        axis = f"y{number if number > 1 else ''}"
        figure.add_traces([_bars(panel, kind, axis, whole_s, scale) for kind in _kinds([panel])])
        figure.add_traces([_words(panel, axis, whole_s, scale), _pointed_at(panel, axis, whole_s, scale, unit)])
        figure.update_layout({f"yaxis{axis[1:]}": _rows(panel, domain, _row_height_px(panels))})
        _add_heading(figure, panel, axis, domain, scale, unit)
    for kind in sorted(_kinds(panels), key=list(Kind).index):
        figure.add_trace(_legend_entry(kind))
    figure.update_layout(
        xaxis={
            "title": {"text": f"time, {unit}" if unit else "time", "standoff": 8},
            "range": [0, whole_s * scale * 1.005],
            "anchor": f"y{len(panels) if len(panels) > 1 else ''}",
            "showgrid": False,
            "zeroline": False,
            "ticks": "outside",
        },
        legend={"orientation": "h", "x": 0, "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
        margin={"l": 20, "r": 20, "t": 62, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
        template="simple_white",
        dragmode="zoom",
        hovermode="closest",
        hoverlabel={"bgcolor": "white", "bordercolor": "#333333", "font": {"color": "#222222"}},
    )
    return figure


def _kinds(panels: Sequence[Panel]) -> list[Kind]:
    """Those that occur, in the palette's order; idle comes first, since the others are drawn upon it."""
    there = {bar.kind for panel in panels for bar in panel.bars} - {Kind.IDLE}
    return [Kind.IDLE, *(kind for kind in Kind if kind in there)]


GAP_ROWS = 1.5  # between two panels, for the heading of the lower one


def _domains(panels: Sequence[Panel]) -> list[tuple[float, float]]:
    """The share of the height that each panel takes, from the top: bars are equally thick in all of them."""
    total = _num_rows(panels)
    found, top = [], 1.0
    for panel in panels:
        bottom = top - len(panel.rows) / total
        found.append((max(bottom, 0.0), top))
        top = bottom - GAP_ROWS / total
    return found


def _num_rows(panels: Sequence[Panel]) -> float:
    return sum(len(panel.rows) for panel in panels) + GAP_ROWS * (len(panels) - 1)


def _row_height_px(panels: Sequence[Panel]) -> float:
    least, most = ROW_HEIGHT_PX
    return max(least, min(most, PLOT_HEIGHT_PX / _num_rows(panels)))


def _bars(panel: Panel, kind: Kind, axis: str, whole_s: float, scale: float) -> Any:
    import plotly.graph_objects as go

    x, y = bar_path(panel, kind, scale)
    edge = {"width": 0 if kind is Kind.IDLE else edge_px(panel, whole_s), "color": "white", "simplify": False}
    look = {"mode": "lines", "fill": "toself", "fillcolor": KIND_COLOURS[kind].fill, "line": edge}
    return go.Scatter(x=x, y=y, yaxis=axis, hoverinfo="skip", showlegend=False, legendgroup=kind.value, **look)


def _legend_entry(kind: Kind) -> Any:
    import plotly.graph_objects as go

    marker = {"symbol": "square", "size": 13, "color": KIND_COLOURS[kind].fill}
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=kind.value, legendgroup=kind.value)


def _words(panel: Panel, axis: str, whole_s: float, scale: float) -> Any:
    import plotly.graph_objects as go

    place = {row: i for i, row in enumerate(panel.rows)}
    shown = labels(panel, whole_s)
    return go.Scatter(
        x=[(bar.start_s + bar.end_s) / 2 * scale for bar in shown],
        y=[place[bar.row] for bar in shown],
        yaxis=axis,
        mode="text",
        text=[escape(bar.label) for bar in shown],
        textfont={"size": 11, "color": [KIND_COLOURS[bar.kind].ink for bar in shown]},
        hoverinfo="skip",
        showlegend=False,
    )


def _pointed_at(panel: Panel, axis: str, whole_s: float, scale: float, unit: str) -> Any:
    """A line of no width through the hover points: one object, however many points."""
    import plotly.graph_objects as go

    place = {row: i for i, row in enumerate(panel.rows)}
    points = hover_points(panel, whole_s)
    return go.Scatter(
        x=[time_s * scale for time_s, _ in points],
        y=[place[bar.row] for _, bar in points],
        yaxis=axis,
        mode="lines",
        line={"width": 0},
        text=[_description(bar, scale, unit) for _, bar in points],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )


def _description(bar: Bar, scale: float, unit: str) -> str:
    lines = [
        f"{bar.row}: {bar.kind} {bar.label}".rstrip(),
        f"{bar.start_s * scale:.5g} to {bar.end_s * scale:.5g} {unit}",
        f"{(bar.end_s - bar.start_s) * scale:.5g} {unit} long",
    ]
    return "<br>".join(map(escape, lines))


def _rows(panel: Panel, domain: tuple[float, float], row_px: float) -> dict[str, Any]:
    return {
        "domain": domain,
        "range": [len(panel.rows) - 0.5, -0.5],
        "tickvals": list(range(len(panel.rows))),
        "ticktext": [escape(row) for row in panel.rows],
        "ticks": "",
        "showline": False,
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 13 if row_px > 18 else 10},
        "fixedrange": True,  # zooming is for time
    }


def _add_heading(figure: Any, panel: Panel, axis: str, domain: tuple[float, float], scale: float, unit: str) -> None:
    """Title, end and subtitle above a panel, and a line where it ends."""
    end = format_seconds(panel.end_s) if unit in ("s", "ms", "us") else f"{panel.end_s * scale:.5g} {unit}".rstrip()
    notes = ", ".join(filter(None, (f"ends at {end}", panel.subtitle)))
    figure.add_annotation(
        text=f'<b>{escape(panel.title)}</b>   <span style="color:#555">{escape(notes)}</span>',
        x=0, y=domain[1], xref="x domain", yref="paper", xanchor="left", yanchor="bottom", showarrow=False,
        font={"size": 14},
    )  # fmt: skip
    figure.add_shape(
        type="line", x0=panel.end_s * scale, x1=panel.end_s * scale, y0=0, y1=1, xref="x", yref=f"{axis} domain",
        line={"color": "#333333", "width": 1.5, "dash": "dot"},
    )  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------

_STYLE = """
body { margin: 0; font-family: system-ui, sans-serif; color: #222; }
h1 { font-size: 18px; margin: 12px 20px 0; }
footer { font-size: 12px; color: #666; margin: 4px 20px 12px; overflow-wrap: anywhere; }
"""


def _page(figure: Any, panels: Sequence[Panel], title: str, command: str) -> str:
    """The HTML text, plotly's script in it: nothing is fetched when it is opened."""
    height_px = round(_num_rows(panels) * _row_height_px(panels) + OTHER_HEIGHT_PX)
    drawing = figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        default_height=f"{height_px}px",
        config={"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]},
    )
    names = escape(title or ", ".join(panel.title for panel in panels))
    heading = f"<h1>{escape(title)}</h1>" if title else ""
    footer = f"<footer>reproduce with <code>{escape(command)}</code></footer>" if command else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{names}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body>{heading}{drawing}{footer}</body></html>\n"
    )
