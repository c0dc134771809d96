"""Figures as self-contained HTML: no script is fetched when one opens them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from meshwright.bench.validate import Compared
from meshwright.errors import InputError, Problem
from meshwright.sim.conditions import Curve
from meshwright.units import format_seconds

#: Colours of Okabe and Ito, told apart by all eyes; marks repeat them with another symbol.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
SYMBOLS = ("circle", "diamond", "cross")

#: Half-width of the band, as a share of what was measured.
BAND = 0.1


def validation_figure(rows: Sequence[Compared], path: str) -> None:
    """Predicted against measured step times, one mark a run, with a band of 10 %; written to an HTML file."""
    import plotly.graph_objects as go

    timed: dict[str, list[Compared]] = defaultdict(list)
    for row in rows:
        if row.row.step_time_s is not None:
            timed[row.row.source or "(blank)"].append(row)
    if not timed:
        raise InputError([Problem("--figure", path, "no run has a measured step time to draw")])
    figure = go.Figure(_band([row.row.step_time_s or 0.0 for own in timed.values() for row in own]))
    for index, (source, own) in enumerate(sorted(timed.items(), key=lambda item: -len(item[1]))):
        figure.add_trace(
            go.Scattergl(
                x=[row.row.step_time_s for row in own],
                y=[row.prediction.step_time_s for row in own],
                name=f"{escape(source)} ({len(own):,})",
                mode="markers",
                marker={
                    "color": COLOURS[index % len(COLOURS)],
                    "symbol": SYMBOLS[index // len(COLOURS) % len(SYMBOLS)],
                    "size": 6 if len(own) < 100 else 4,
                    "opacity": 0.9 if len(own) < 100 else 0.55,
                },
                text=[_words(row) for row in own],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    axis = {"type": "log", "dtick": 1, "minor": {"ticks": "inside"}, "gridcolor": "#e5e5e5"}
    total = sum(map(len, timed.values()))
    figure.update_layout(
        title=f"Step time of {total:,} published runs: predicted against measured",
        xaxis={**axis, "title": "measured step time, s"},
        yaxis={**axis, "title": "predicted step time, s"},
        legend={"title": "source (runs)", "itemsizing": "constant"},
        template="simple_white",
        margin={"l": 60, "r": 20, "t": 60, "b": 60},
    )
    _write(figure, path, "--figure")


def straggler_figure(curves: Sequence[Curve], path: str, *, command: str = "") -> None:
    """How much longer a step takes with one straggler: a line for each place; written to an HTML file."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, curve in enumerate(curves):
        longer = [100 * (time_s / curve.step_times_s[0] - 1) for time_s in curve.step_times_s]
        figure.add_trace(
            go.Scatter(
                x=curve.factors,
                y=longer,
                name=escape(curve.label),
                mode="lines+markers",
                line={"color": COLOURS[index % len(COLOURS)]},
                marker={"symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
                hovertemplate="%{x} times as long: the step takes %{y:.1f} % more<extra></extra>",
            )
        )
    figure.update_layout(
        title="What one straggler costs",
        xaxis={"title": "the straggler takes so many times as long", "gridcolor": "#e5e5e5"},
        yaxis={"title": "the step takes longer by, %", "gridcolor": "#e5e5e5", "rangemode": "tozero"},
        legend={"yanchor": "top", "y": 0.99, "xanchor": "left", "x": 0.01},
        template="simple_white",
        margin={"l": 60, "r": 20, "t": 60, "b": 90},
        height=480,
        annotations=[
            {
                "text": escape(f"reproduce with {command}") if command else "",
                "xref": "paper",
                "yref": "paper",
                "x": 0,
                "y": 0,
                "yshift": -65,
                "yanchor": "top",
                "showarrow": False,
                "font": {"size": 11, "color": "#666666"},
            }
        ],
    )
    _write(figure, path, "--stragglers")


def _write(figure: Any, path: str, option: str) -> None:
    try:
        height = f"{figure.layout.height}px" if figure.layout.height else "95vh"
        figure.write_html(Path(path), include_plotlyjs=True, full_html=True, default_height=height)
    except OSError as error:
        raise InputError([Problem(option, path, f"cannot be written: {error.strerror}")]) from None


def _band(times_s: Sequence[float]) -> list[Any]:
    """The diagonal, and 10 % on either side of it."""
    import plotly.graph_objects as go

    ends = [min(times_s) / 1.5, max(times_s) * 1.5]
    corners = [*ends, *reversed(ends)]
    edge = [end * (1 + BAND) for end in ends] + [end * (1 - BAND) for end in reversed(ends)]
    shade = {
        "mode": "lines",
        "fill": "toself",
        "fillcolor": "rgba(0,0,0,0.10)",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    return [
        go.Scatter(x=corners, y=edge, name=f"within {BAND:.0%}", **shade),
        go.Scatter(x=ends, y=ends, name="exact", mode="lines", line={"color": "black", "width": 1}, hoverinfo="skip"),
    ]


def _words(row: Compared) -> str:
    """What a mark says when pointed at."""
    measured_s = row.row.step_time_s or 0.0
    lines = [
        row.row.id,
        f"measured {format_seconds(measured_s)}, predicted {format_seconds(row.prediction.step_time_s)}",
        *(() if row.ratio is None else (f"{row.ratio - 1:+.1%}",)),
        *row.prediction.warnings,
        *row.prediction.reasons,
    ]
    return "<br>".join(escape(line) for line in lines)
