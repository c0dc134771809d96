"""Where everything lies, drawn (see `panels`): the plans of several methods side by side (HTML), or one in a terminal.

A chip says S(dim): cut along the dim, R: whole on each rank, P: each rank has a summand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import Problem
from meshwright.graph import Graph
from meshwright.io.native import refuse, write_text
from meshwright.report.palette import KIND_COLOURS, Colour
from meshwright.report.panels import Carried, Chip, Lying, Panel, Row, by_block, dims_of, panel_problems, panels_of
from meshwright.sharding import SUMMANDS
from meshwright.sim.program import Kind
from meshwright.strategy import Strategy
from meshwright.units import format_bytes, format_seconds
from meshwright.workload import Workload

if TYPE_CHECKING:
    from rich.console import RenderableType

    from meshwright.cost.placed import PlacedStep

#: Fills for dims in their order of appearance; the words on chips say which. Okabe and Ito, as in `palette`.
DIM_COLOURS = (
    Colour("#0072B2", "white", "blue"),
    Colour("#009E73", "black", "green"),
    Colour("#E69F00", "black", "yellow"),
    Colour("#56B4E9", "black", "cyan"),
    Colour("#CC79A7", "black", "magenta"),
    Colour("#D55E00", "black", "red"),
    Colour("#F0E442", "black", "bright_yellow"),
)
WHOLE_COLOUR = KIND_COLOURS[Kind.IDLE]
PARTIAL_COLOUR = Colour("white", "#B00020", "bright_red")


# --- the drawing ------------------------------------------------------------------------------------------------------

_STYLE = """
body { margin: 0; font: 13px/1.45 system-ui, sans-serif; color: #222; background: white; }
h1 { font-size: 18px; margin: 12px 16px 4px; }
.key, footer { font-size: 12px; color: #555; margin: 4px 16px 10px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0 16px 12px; border: 1px solid #ddd; border-radius: 6px; }
table { border-collapse: separate; border-spacing: 0; }
th, td { text-align: left; vertical-align: top; padding: 5px 9px; border-bottom: 1px solid #e5e5e5; }
td { min-width: 215px; border-left: 1px solid #eee; }
thead th { background: #fafafa; border-left: 1px solid #eee; font-weight: 400; }
thead b { font-size: 14px; }
th:first-child { position: sticky; left: 0; background: #fafafa; z-index: 1; font-weight: 600; min-width: 84px;
  max-width: 130px; overflow-wrap: anywhere; border-left: 0; }
.chip { display: inline-block; padding: 0 5px; margin: 1px 3px 1px 0; border-radius: 3px; font-size: 11px;
  line-height: 16px; white-space: nowrap; }
.chip i { font-style: normal; opacity: .75; }
.line { display: flex; flex-wrap: wrap; align-items: baseline; column-gap: 6px; }
.name, .shape, .move { font-size: 11px; color: #444; }
.name { overflow-wrap: anywhere; }
.shape { font-variant-numeric: tabular-nums; color: #666; }
.move { border-left: 3px solid MOVE; padding-left: 5px; margin-top: 2px; }
.bar { display: flex; height: 7px; margin: 4px 0 2px; background: #eee; max-width: 260px; }
.note { font-size: 11px; color: #555; max-width: 300px; }
@media (max-width: 700px) {
  td { min-width: 175px; }
  th:first-child { min-width: 56px; max-width: 64px; font-size: 11px; }
}
""".replace("MOVE", KIND_COLOURS[Kind.COMMUNICATION].fill)


def placement_figure(panels: Sequence[Panel], path: str | Path, *, title: str = "", command: str = "") -> None:
    """Draw the panels of each block side by side, a column for each plan, into the HTML file at `path`.

    `command` is what reproduces the figure, for the footer. Raises `InputError` for a path that is not HTML or cannot
    be written, and what `panel_problems` finds."""
    problems = panel_problems(panels)
    if Path(path).suffix not in (".html", ".htm"):
        nearest = f"{str(path).removesuffix(Path(path).suffix)}.html"
        problems.append(Problem(str(path), "", "a figure is an .html file", nearest))
    refuse(problems, str(path))
    write_text(placement_page(panels, title=title, command=command), path)


def placement_page(panels: Sequence[Panel], *, title: str = "", command: str = "") -> str:
    """The page as text: no script, nothing is fetched when it is opened."""
    colours = _colours(panels)
    longest_s = max(panel.compute_s + panel.communication_s for panel in panels)
    footer = f"<footer>reproduce with <code>{escape(command)}</code></footer>" if command else ""
    heading = title or f"{panels[0].block}, {len(panels)} plans"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(heading)}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(heading)}</h1>{_key(colours)}"
        + "\n".join(_table(group, colours, longest_s) for group in by_block(panels))
        + f"{footer}</body></html>\n"
    )


def _table(panels: Sequence[Panel], colours: Mapping[str, Colour], longest_s: float) -> str:
    """The plans of one block, a column each."""
    heads = "".join(f"<th>{_head(panel, longest_s)}</th>" for panel in panels)
    lines = [
        f"<tr><th>{escape(row.operator)}</th>{''.join(f'<td>{_cell(each, colours)}</td>' for each in rows)}</tr>"
        for rows in zip(*(panel.rows for panel in panels), strict=True)
        for row in rows[:1]
    ]
    below = {
        "at rest": [_lies(panel.resting, colours) for panel in panels],
        "update": [_moves(panel.update) for panel in panels],
    }
    for name, cells in below.items():
        if any(cells):
            lines.append(f"<tr><th>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    count = f" x {panels[0].count}" if panels[0].count > 1 else ""
    return (
        f'<div class="scroll"><table><thead><tr><th>{escape(panels[0].block)}{count}</th>{heads}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def _colours(panels: Sequence[Panel]) -> dict[str, Colour]:
    return {dim: DIM_COLOURS[index % len(DIM_COLOURS)] for index, dim in enumerate(dims_of(panels))}


def _key(colours: Mapping[str, Colour]) -> str:
    chips = " ".join(_box(f"S({dim})", colour) for dim, colour in colours.items())
    return (
        f'<div class="key">{chips} cut along the dim {_box("R", WHOLE_COLOUR)} whole on each rank '
        f"{_box('P', PARTIAL_COLOUR)} a summand on each rank; first what the operator splits on each axis, then the "
        "weights that it takes and what it makes, with the shape on one rank, then the collectives for it: bytes that "
        "each rank sends, seconds</div>"
    )


def _box(word: str, colour: Colour, axis: str = "") -> str:
    edge = f";box-shadow:inset 0 0 0 1px {colour.ink}" if colour.fill == "white" else ""
    before = f"<i>{escape(axis)}</i> " if axis else ""
    return f'<span class="chip" style="background:{colour.fill};color:{colour.ink}{edge}">{before}{escape(word)}</span>'


def _chip(chip: Chip, colours: Mapping[str, Colour]) -> str:
    if chip.dim == SUMMANDS or chip.word == "P":
        return _box("summands" if chip.dim else chip.word, PARTIAL_COLOUR, chip.axis)
    return _box(chip.word or "whole", colours.get(chip.dim, WHOLE_COLOUR), chip.axis)


def _head(panel: Panel, longest_s: float) -> str:
    mesh = " x ".join(f"{axis.name} {axis.size}" for axis in panel.mesh) or "one device"
    notes = "".join(f'<div class="note">{escape(note)}</div>' for note in panel.notes)
    words = f"<b>{escape(panel.title or panel.block)}</b><div class='note'>{escape(mesh)}</div>"
    if not panel.is_priced or not longest_s:
        return words + notes
    widths = [
        (KIND_COLOURS[kind].fill, 100 * seconds / longest_s)
        for kind, seconds in ((Kind.FORWARD, panel.compute_s), (Kind.COMMUNICATION, panel.communication_s))
    ]
    bars = "".join(f'<span style="width:{width:.2f}%;background:{fill}"></span>' for fill, width in widths)
    total = format_seconds(panel.compute_s + panel.communication_s)
    parts = f"{format_seconds(panel.compute_s)} compute, {format_seconds(panel.communication_s)} communication"
    return f"{words}<div class='bar'>{bars}</div><div class='note'>{total} a block: {parts}</div>{notes}"


def _cell(row: Row, colours: Mapping[str, Colour]) -> str:
    took = f'<span class="shape">{format_seconds(row.seconds)}</span>' if row.seconds is not None else ""
    first = f'<div class="line">{"".join(_chip(chip, colours) for chip in row.split) or "whole"}{took}</div>'
    return first + _lies(row.takes, colours) + _lies(row.makes, colours, "= ") + _moves(row.moves)


def _lies(tensors: Sequence[Lying], colours: Mapping[str, Colour], before: str = "") -> str:
    return "".join(
        f'<div class="line"><span class="name">{before}{escape(each.tensor)}</span>'
        f"<span>{''.join(_chip(chip, colours) for chip in each.chips)}</span>"
        f'<span class="shape">{each.shape}</span></div>'
        for each in tensors
    )


def _moves(moves: Sequence[Carried]) -> str:
    return "".join(f'<div class="move">{escape(words)}</div>' for words in carried_words(moves))


#: A phase in a narrow place. What a backward reads is brought to it again.
SHORT = {"forward": "fwd", "backward": "bwd", "regather": "again", "update": "update"}


def carried_words(moves: Sequence[Carried]) -> list[str]:
    """Collectives in words; equal ones of one tensor in several phases are one line.

    >>> carried_words([Carried("x", phase, "all_gather", ("y",), 2**20, 1e-3) for phase in ("forward", "regather")])
    ['fwd, again: all-gather of x over y, 1.0 MiB, 1.00 ms each']
    """
    phases: dict[tuple[str, str, tuple[str, ...], str, str], list[str]] = {}
    for move in moves:
        size, took = format_bytes(move.sent_bytes), format_seconds(move.seconds)
        key = move.tensor, move.collective.replace("_", "-"), move.axes, size, took
        phases.setdefault(key, []).append(SHORT.get(move.phase, move.phase))
    return [
        f"{', '.join(when)}: {collective} of {tensor} over {', '.join(axes)}, {size}, {took}"
        + (" each" if len(when) > 1 else "")
        for (tensor, collective, axes, size, took), when in phases.items()
    ]


# --- in a terminal ----------------------------------------------------------------------------------------------------

#: A terminal narrower than this has the axes in one column and no shapes.
WIDE_ENOUGH = 84

#: Rows of one block; the others are counted.
MOST_ROWS = 40


def placement_text(
    graph: Graph, strategy: Strategy, workload: Workload, width: int, step: PlacedStep | None = None
) -> RenderableType:
    """All blocks of a strategy as tables: an operator a row (neighbours that split alike, with nothing moved between,
    share one), what it splits on each axis, what it makes, and, where a priced step is given, the collectives."""
    from rich.console import Group

    panels = panels_of(graph, strategy, workload, step=step)
    colours = _colours(panels)
    return Group(*(part for panel in panels for part in _text(panel, colours, width)))


def _text(panel: Panel, colours: Mapping[str, Colour], width: int) -> Iterator[RenderableType]:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    count = f" x {panel.count}" if panel.count > 1 else ""
    mesh = " x ".join(f"{axis.name}={axis.size}" for axis in panel.mesh) or "one device"
    where = f"{panel.title}: " if panel.title else ""
    yield Text(f"\n{where}{panel.block}{count} on {mesh}", style="bold")
    is_wide = width >= WIDE_ENOUGH
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("operator", overflow="fold", max_width=width // 3)
    for name in [axis.name for axis in panel.mesh] if is_wide else ["splits"] if panel.mesh else []:
        table.add_column(name, overflow="fold", max_width=14)
    if is_wide:
        table.add_column("result on a rank", overflow="fold", max_width=width // 3)
    if panel.is_priced:
        table.add_column("collectives", overflow="fold")
    groups = list(_alike(panel.rows))
    for rows in groups[:MOST_ROWS]:
        words = [_split_text(chip, colours, with_axis=not is_wide) for chip in rows[0].split]
        cells: list[Any] = [", ".join(row.operator for row in rows)]
        cells += words if is_wide else [Text("\n").join(words)] if panel.mesh else []
        if is_wide:
            last = rows[-1].makes[0] if rows[-1].makes else None
            cells.append(f"{last.tensor}: {last.shape}" if last else "")
        if panel.is_priced:
            cells.append("\n".join(_sums([move for row in rows for move in row.moves])))
        table.add_row(*cells)
    yield table
    if len(groups) > MOST_ROWS:
        yield Text(f"... and {len(groups) - MOST_ROWS} more rows", style="dim")
    for chips, names in _rest_groups(panel):
        line = Text("at rest ", style="dim")
        line.append_text(Text(" ").join([_split_text(chip, colours, with_axis=True) for chip in chips]))
        line.append(f": {', '.join(names)}")
        yield line
    if panel.update:
        yield Text("; ".join(_sums(panel.update)), style="dim")


def _alike(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Runs of neighbours that split alike; what is moved for an operator begins and ends a run."""
    run: list[Row] = []
    for row in rows:
        if run and (row.split != run[0].split or row.moves or run[-1].moves):
            yield run
            run = []
        run.append(row)
    if run:
        yield run


def _split_text(chip: Chip, colours: Mapping[str, Colour], *, with_axis: bool) -> Any:
    from rich.text import Text

    word = {SUMMANDS: "summands", "": "whole", "R": "whole", "P": "summands"}.get(chip.word, chip.dim or chip.word)
    colour = colours.get(chip.dim)
    style = colour.terminal if colour else "dim"
    return Text(f"{chip.axis}:{word}" if with_axis else word, style=style)


def _sums(moves: Sequence[Carried]) -> list[str]:
    """Collectives of one kind over the same axes in the same phase, added up."""
    sums: dict[tuple[str, str, tuple[str, ...]], float] = {}
    for move in moves:
        key = SHORT.get(move.phase, move.phase), move.collective.replace("_", "-"), move.axes
        sums[key] = sums.get(key, 0.0) + move.seconds
    return [f"{when} {name} {','.join(axes)} {format_seconds(seconds)}" for (when, name, axes), seconds in sums.items()]


def _rest_groups(panel: Panel) -> Iterator[tuple[tuple[Chip, ...], list[str]]]:
    """Tensors at rest by how they lie, in order of appearance."""
    groups: dict[tuple[Chip, ...], list[str]] = {}
    for lying in panel.resting:
        groups.setdefault(lying.chips, []).append(lying.tensor)
    yield from groups.items()
