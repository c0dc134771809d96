"""Pictures over time: the data of the drawing, a page that is light and stands alone, colours for all eyes."""

from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import InputError
from meshwright.report import timeline
from meshwright.report.palette import KIND_COLOURS
from meshwright.report.text import PALETTE
from meshwright.report.timeline import Bar, Panel, bar_path, hover_points, labels, timeline_figure
from meshwright.schedule import ActionKind, actions, replay
from meshwright.sim.program import KIND_OF_ACTION, Kind


def _panel(name: str, num_ranks: int, num_microbatches: int) -> Panel:
    """A schedule with one second for each forward, input gradient and weight gradient."""
    table = actions(name, num_ranks, 1, num_microbatches)
    found = replay(table, lambda action: 2.0 if action.kind is ActionKind.B else 1.0, num_ranks)
    bars = [
        Bar(f"rank {rank}", start_s, end_s, KIND_OF_ACTION[action.kind], str(action.microbatch))
        for rank, row in enumerate(found.actions)
        for action, start_s, end_s in zip(row, found.start_s[rank], found.end_s[rank], strict=True)
    ]
    return Panel(name, tuple(f"rank {rank}" for rank in range(num_ranks)), bars, found.makespan_s)


# --- the data of the drawing ------------------------------------------------------------------------------------------


def test_paths_cover_what_the_schedule_keeps_busy() -> None:
    # 1F1B, p = 4, m = 8, F 1 and B 2: each rank is busy for 8 x 3 of the 3 (m + p - 1) = 33 seconds.
    panel = _panel("1F1B", 4, 8)
    areas = {kind: _area(*bar_path(panel, kind)) / (2 * timeline.HALF) for kind in Kind}
    assert areas == pytest.approx(
        {**dict.fromkeys(Kind, 0.0), Kind.FORWARD: 4 * 8 * 1, Kind.BACKWARD: 4 * 8 * 2, Kind.IDLE: 4 * 33}
    )


def _area(x: np.ndarray, y: np.ndarray) -> float:
    """Of closed outlines, each of five points and a gap: the shoelace formula."""
    xs, ys = x.reshape(-1, 6), y.reshape(-1, 6)
    assert np.isnan(xs[:, 5]).all()
    assert (xs[:, 0] == xs[:, 4]).all()
    cross = xs[:, :4] * ys[:, 1:5] - xs[:, 1:5] * ys[:, :4]
    return float(np.abs(cross.sum(axis=1) / 2).sum())


def test_a_label_stands_only_where_it_has_room() -> None:
    # 1050 px for 1050 s: one digit of 6.5 px and 2 px of air need more than 8.5 s, three need more than 21.5 s.
    bars = [
        Bar("a", start_s, start_s + length_s, Kind.FORWARD, label)
        for start_s, (length_s, label) in enumerate([(8.4, "7"), (8.6, "7"), (21.4, "123"), (21.6, "123"), (99.0, "")])
    ]
    panel = Panel("p", ("a",), bars, 1050.0)
    assert labels(panel, 1050.0) == [bars[1], bars[3]]
    assert labels(panel, 2100.0) == []


@given(start_s=st.floats(0, 900), length_s=st.floats(0, 100), at=st.floats(0, 1), whole_s=st.floats(1000, 1e6))
def test_the_pointer_finds_the_bar_below_it(start_s: float, length_s: float, at: float, whole_s: float) -> None:
    """Wherever it is on a bar, no other bar's middle need be nearer than a point of this one: half a step at most."""
    bar = Bar("a", start_s, start_s + length_s, Kind.FORWARD)
    points = [time_s for time_s, _ in hover_points(Panel("p", ("a",), [bar], whole_s), whole_s)]
    nearest_s = min(abs(time_s - (start_s + at * length_s)) for time_s in points)
    assert nearest_s * timeline.PLOT_WIDTH_PX / whole_s <= timeline.HOVER_STEP_PX / 2 + 1e-6
    assert all(bar.start_s <= time_s <= bar.end_s for time_s in points)


def test_thin_bars_keep_their_colour() -> None:
    # Edges lie half inside the bar on either side, so an edge as wide as the bar would leave nothing of it.
    wide, thin = _panel("1F1B", 4, 8), _panel("1F1B", 16, 2048)
    assert timeline.edge_px(wide, wide.end_s) == 0.8
    usual_px = 1.5 * timeline.PLOT_WIDTH_PX / thin.end_s  # half of the bars last 1 s, half 2 s
    assert usual_px < 1
    assert timeline.edge_px(thin, thin.end_s) == pytest.approx(0.1 * usual_px)
    assert timeline.edge_px(Panel("p", ("a",), (), 1.0), 1.0) == 0


def test_panels_share_the_height_by_their_rows_and_do_not_overlap() -> None:
    panels = [_panel("1F1B", 4, 4), _panel("ZB-H1", 8, 8), _panel("GPipe", 2, 2)]
    domains = timeline._domains(panels)
    heights = np.array([top - bottom for bottom, top in domains])
    assert domains[0][1] == 1.0
    assert domains[-1][0] == pytest.approx(0.0)
    assert heights / heights[0] == pytest.approx([1, 2, 0.5])
    assert all(upper[0] > lower[1] for upper, lower in itertools.pairwise(domains))


# --- the drawing ------------------------------------------------------------------------------------------------------


def test_the_number_of_objects_does_not_grow_with_the_bars() -> None:
    few = timeline._figure([_panel("1F1B", 4, 8), _panel("ZB-H1", 4, 8)], "s")
    many = timeline._figure([_panel("1F1B", 4, 512), _panel("ZB-H1", 4, 512)], "s")
    # Forward, backward, idle; forward, two gradients, idle; words and pointer of either; five entries of a legend.
    assert len(few.data) == len(many.data) == 3 + 4 + 2 * 2 + 5
    assert len(few.layout.shapes) == len(many.layout.shapes) == 2


def test_the_legend_names_what_occurs_once_each_in_its_colour() -> None:
    figure = timeline._figure([_panel("1F1B", 4, 8), _panel("ZB-H1", 4, 8)], "s")
    legend = {trace.name: trace.marker.color for trace in figure.data if trace.showlegend is not False}
    kinds = [Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT, Kind.IDLE]
    assert legend == {kind.value: KIND_COLOURS[kind].fill for kind in kinds}
    assert list(legend) == kinds
    for trace in figure.data:
        if trace.fill == "toself":
            assert trace.fillcolor == KIND_COLOURS[Kind(trace.legendgroup)].fill


def test_all_panels_share_one_axis_of_time_with_its_unit() -> None:
    panels = [Panel("a", ("r",), [Bar("r", 0.0, 2e-3, Kind.FORWARD)], 2e-3), Panel("b", ("r",), [], 5e-3)]
    figure = timeline._figure(panels, "s")
    assert {trace.xaxis for trace in figure.data} == {None}  # the one axis x
    assert figure.layout.xaxis.title.text == "time, ms"
    assert figure.layout.xaxis.range[1] == pytest.approx(5.0, rel=0.01)
    assert np.nanmax(figure.data[1].x) == pytest.approx(2.0)
    assert [shape.x0 for shape in figure.layout.shapes] == pytest.approx([2.0, 5.0])
    assert timeline._figure(panels, "forwards").layout.xaxis.title.text == "time, forwards"


class _Page(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words += data


def test_the_page_stands_alone_and_says_how_it_was_made(tmp_path: Path) -> None:
    command = "meshwright schedule ZB-H1 --ranks 4 --title '<b>&'"
    path = tmp_path / "t.html"
    timeline_figure([_panel("ZB-H1", 4, 8)], path, command=command, title="Bubbles & <script>")
    page = _Page(path.read_text("utf-8"))
    assert f"reproduce with {command}" in page.words
    assert "Bubbles & <script>" in page.words
    assert [
        attributes for tag, attributes in page.tags if tag in ("link", "img", "iframe") or "src" in attributes
    ] == []
    assert path.stat().st_size > 1_000_000  # plotly's script is in it


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script>"
    panel = Panel(bad, (bad,), [Bar(bad, 0.0, 1.0, Kind.FORWARD, bad)], 1.0, subtitle=bad)
    timeline_figure([panel], path := tmp_path / "t.html", command=bad, title=bad)
    html = path.read_text("utf-8")
    assert "alert(1)" in html
    assert not re.search(r"<script>alert", html)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_all_faults_are_named_at_once(tmp_path: Path) -> None:
    bars = [Bar("b", 0.0, 1.0, Kind.FORWARD), Bar("a", 2.0, 1.0, Kind.FORWARD), Bar("a", 0.0, 9.0, Kind.IDLE)]
    panels = [Panel("one", ("a",), bars, 2.0), Panel("two", ("a", "a"), [], float("nan"))]
    with pytest.raises(InputError) as caught:
        timeline_figure(panels, tmp_path / "t.svg")
    within = "must start at 0 or later and end no earlier than that, by 2.0"
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/t.svg: a figure is an .html file (nearest: {tmp_path}/t.html)",
        "panel one, bar 0 = b from 0.0 to 1.0: no such row; rows: a",
        f"panel one, bar 1 = a from 2.0 to 1.0: {within}",
        f"panel one, bar 2 = a from 0.0 to 9.0: {within}",
        "panel two = nan: must end at a time above 0",
        "panel two = a, a: rows must be there, each with a name of its own",
    ]
    with pytest.raises(InputError, match="there is no panel to draw"):
        timeline_figure([], tmp_path / "t.html")
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_survives_a_full_disk(tmp_path: Path) -> None:
    (path := tmp_path / "t.html").write_text("old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch("os.fsync", side_effect=full), pytest.raises(InputError, match="written: No space left on device"):
        timeline_figure([_panel("1F1B", 2, 2)], path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_plotly_is_loaded_only_for_drawing() -> None:
    code = "import meshwright.report.timeline, sys; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the palette ------------------------------------------------------------------------------------------------------


def test_every_kind_and_action_has_its_colour() -> None:
    assert set(KIND_COLOURS) == set(Kind)
    assert set(ActionKind) - set(KIND_OF_ACTION) == {ActionKind.OVERLAP_F_B}
    assert all(PALETTE[action.value] == KIND_COLOURS[kind].terminal for action, kind in KIND_OF_ACTION.items())


def _linear_rgb(colour: str) -> np.ndarray:
    """IEC 61966-2-1: what share of its light each primary gives."""
    named = {"white": "#FFFFFF", "black": "#000000"}
    srgb = np.array([int(named.get(colour, colour)[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _lab(linear: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


#: What eyes without red, green or blue cones see of linear RGB: Machado, Oliveira, Fernandes 2009, severity 1.0.
EYES = {
    "all cones": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}


@pytest.mark.parametrize("eyes", EYES)
def test_all_eyes_tell_the_kinds_apart(eyes: str) -> None:
    """A distance of 2.3 can just be seen; neighbouring bars should be told apart at a glance."""
    seen = {kind: _lab((EYES[eyes] @ _linear_rgb(colour.fill)).clip(0, 1)) for kind, colour in KIND_COLOURS.items()}
    distances = {
        (one, other): np.linalg.norm(seen[one] - seen[other]) for one, other in itertools.combinations(Kind, 2)
    }
    assert min(distances.values()) > 12, min(distances.items(), key=lambda item: item[1])


@pytest.mark.parametrize("kind", Kind)
def test_words_on_bars_can_be_read(kind: Kind) -> None:
    """WCAG 2.1, 1.4.3: a contrast of 4.5 for small text."""
    light = sorted(
        _linear_rgb(colour) @ [0.2126, 0.7152, 0.0722] for colour in (KIND_COLOURS[kind].fill, KIND_COLOURS[kind].ink)
    )
    assert (light[1] + 0.05) / (light[0] + 0.05) >= 4.5
