"""What people see in a terminal: tables, ledgers as bars, the pipeline drawn over time.

Each function takes records and gives something that Rich prints; nothing is computed here but widths. Colour never
stands alone: every bar has its name and number beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from meshwright.cost.explain import Explanation, Leaf
from meshwright.report.palette import KIND_COLOURS
from meshwright.results import Check, Estimate, Measurement
from meshwright.schedule import SCHEDULES, Action, ActionKind, Timeline, actions, compute_parts, replay
from meshwright.search.method import Found
from meshwright.sim.program import KIND_OF_ACTION, Kind
from meshwright.strategy import Shorthand
from meshwright.units import format_bytes, format_count, format_seconds

#: Colours of ledger entries, by their first word, and of actions, by their letter.
PALETTE = {
    "compute": KIND_COLOURS[Kind.FORWARD].terminal,
    "recompute": "dark_green",
    "exposed": KIND_COLOURS[Kind.COMMUNICATION].terminal,
    "bubble": KIND_COLOURS[Kind.IDLE].terminal,
    "launch": "yellow",
    "optimizer": KIND_COLOURS[Kind.OPTIMIZER].terminal,
    **{action.value: KIND_COLOURS[kind].terminal for action, kind in KIND_OF_ACTION.items()},
}

BAR_WIDTH = 28


def shorthand_text(shorthand: str) -> str:
    """A shorthand without the keys that stand at their defaults.

    >>> shorthand_text("tp=8,pp=1,dp=4,ep=1,mbs=1,vpp=1,schedule=1F1B,zero=1,recompute=none,sp=1")
    'tp=8,dp=4,zero=1,sp=1'
    """
    defaults = str(Shorthand()).split(",")
    return ",".join(part for part in shorthand.split(",") if part not in defaults) or "one device"


def plain_table(*columns: tuple[str, str]) -> Table:
    """A table without frame, of columns by heading and alignment."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    return table


#: A terminal narrower than this does without the last columns of the ranking.
WIDE_ENOUGH = 84


def ranking_table(entries: Sequence[tuple[Shorthand, Estimate]], tied: Sequence[bool], width: int) -> Table:
    """The best strategies, one a row; more than one virtual stage means the interleaved schedule. Those that are `tied`
    with the first are marked."""
    numbers = ["step", "MFU", "memory", *(["bubble", "exposed"] if width >= WIDE_ENOUGH else [])]
    table = plain_table(("#", "right"), ("strategy", "left"), *((name, "right") for name in numbers))
    for column in table.columns[2:]:
        column.no_wrap = True
    for place, ((shorthand, estimate), is_tied) in enumerate(zip(entries, tied, strict=True), 1):
        exposed = sum(value for name, value in estimate.time.items() if name.startswith("exposed"))
        values = (
            format_seconds(estimate.step_time_s),
            f"{estimate.mfu:.1%}",
            format_bytes(estimate.peak_memory_bytes),
            f"{estimate.bubble_fraction:.1%}",
            f"{exposed / estimate.step_time_s:.1%}",
        )
        row = values[: len(numbers)]
        mark = f"= {place}" if is_tied and place > 1 else str(place)
        table.add_row(mark, ranked_text(shorthand), *row, style="bold" if place == 1 else "")
    return table


def chosen_table(entries: Sequence[Found]) -> Table:
    """The best members of a space that chooses more than a shorthand says: by samples/s, priced as they choose."""
    numbers = [(name, "right") for name in ("samples/s", "step", "memory")]
    table = plain_table(("#", "right"), ("strategy", "left"), ("chosen besides", "left"), *numbers)
    for column in table.columns[3:]:
        column.no_wrap = True
    for place, found in enumerate(entries, 1):
        table.add_row(
            str(place),
            ranked_text(found.shorthand),
            " ".join(f"{name}={_word(value)}" for name, value in found.chosen.items()),
            f"{found.samples_per_s:.2f}",
            format_seconds(found.step_time_s),
            format_bytes(found.peak_memory_bytes),
            style="bold" if place == 1 else "",
        )
    return table


def _word(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def front_table(estimates: Sequence[Estimate]) -> Table:
    """Several placements of one graph, one a row."""
    table = plain_table(("#", "right"), *((name, "right") for name in ("step", "MFU", "memory", "bubble")))
    for place, estimate in enumerate(estimates, 1):
        table.add_row(
            str(place),
            format_seconds(estimate.step_time_s),
            f"{estimate.mfu:.1%}",
            format_bytes(estimate.peak_memory_bytes),
            f"{estimate.bubble_fraction:.1%}",
            style="bold" if place == 1 else "",
        )
    return table


def ranked_text(shorthand: Shorthand) -> str:
    """A shorthand in few characters: no defaults, no schedule that follows from the virtual stages.

    >>> ranked_text(Shorthand(tp=8, pp=2, vpp=3, schedule="Interleaved1F1B", sp=1))
    'tp=8 pp=2 vpp=3 sp=1'
    """
    parts = shorthand_text(str(shorthand)).split(",")
    return " ".join(part for part in parts if part != "schedule=Interleaved1F1B" or shorthand.vpp == 1)


def ledger(title: str, entries: Mapping[str, float], total: float, unit: str, capacity: float | None = None) -> Table:
    """A ledger as bars, largest first; entries sum to the total."""
    show = format_seconds if unit == "s" else format_bytes
    scale = capacity or total
    table = plain_table((title, "left"), ("", "right"), ("", "right"), ("", "left"))
    table.show_header = True
    for name, value in sorted(entries.items(), key=lambda item: -item[1]):
        if value > 0:
            table.add_row(name, show(value), f"{value / scale:.1%}", _bar(name, value / scale))
    note = f"of {show(capacity)}" if capacity else ""
    table.add_section()
    table.add_row("total", show(total), f"{total / scale:.1%}", note, style="bold")
    return table


def _bar(name: str, share: float) -> Text:
    colour = PALETTE.get(name.split("_")[0], "blue")
    return Text("█" * max(1, round(min(share, 1.0) * BAR_WIDTH)), style=colour)


def estimate_view(shorthand: str, estimate: Estimate, usable_bytes: float) -> Group:
    """One estimate: verdict, the two ledgers, utilisation and communication."""
    verdict = Text("fits", style="green") if estimate.feasible else Text("does not fit", style="red")
    head = Text.assemble(
        ("strategy ", "dim"), shorthand, "\n",
        ("step ", "dim"), (format_seconds(estimate.step_time_s), "bold"), (_bounds(estimate), "dim"),
        ("   tokens/s ", "dim"), format_count(estimate.tokens_per_s),
        ("   MFU ", "dim"), f"{estimate.mfu:.1%}", ("   HFU ", "dim"), f"{estimate.hfu:.1%}",
        ("   bubble ", "dim"), f"{estimate.bubble_fraction:.1%}", ("   memory ", "dim"), verdict,
        (_chance(estimate), "dim"),
    )  # fmt: skip
    sent = {axis: value for axis, value in estimate.communication.items() if value}
    parts: list[RenderableType] = [
        head,
        ledger("time", estimate.time, estimate.step_time_s, "s"),
        ledger("memory of the worst rank", estimate.memory, estimate.peak_memory_bytes, "B", usable_bytes),
    ]
    if sent:
        text = ", ".join(f"{axis} {format_bytes(value)}" for axis, value in sent.items())
        parts.append(Text.assemble(("sent per rank and step: ", "dim"), text))
    parts += [Text(reason, style="red") for reason in estimate.reasons]
    parts += [Text(warning, style="yellow") for warning in estimate.warnings]
    parts += [Text(f"assumed: {assumption}", style="dim") for assumption in estimate.assumptions]
    return Group(*parts)


def _chance(estimate: Estimate) -> str:
    """How likely it is that memory suffices; nothing is certain to a percent."""
    if estimate.fit_probability is None:
        return ""
    percent = f"{min(max(estimate.fit_probability, 0.01), 0.99):.0%}"
    return f" ({percent} likely)" if estimate.feasible else f" ({percent} likely that it does)"


def _bounds(estimate: Estimate) -> str:
    """Between what four of five runs lie."""
    if estimate.step_time_interval_s is None:
        return ""
    low, high = (format_seconds(value) for value in estimate.step_time_interval_s)
    return f" ({low} to {high} in 4 of 5 runs)"


def leaf_tree(leaf: Leaf, depth: int = 3, least: float = 0.005) -> Tree:
    """A tree of numbers, branches under `least` of the whole folded into one line."""
    tree = Tree(_leaf_text(leaf))
    _grow(tree, leaf, depth, least * leaf.value)
    return tree


def _grow(tree: Tree, leaf: Leaf, depth: int, least: float) -> None:
    shown = sorted((child for child in leaf.children if child.value >= least), key=lambda child: -child.value)
    rest = [child for child in leaf.children if child.value < least]
    for child in shown:
        branch = tree.add(_leaf_text(child))
        if depth > 1:
            _grow(branch, child, depth - 1, least)
    if rest:
        total = sum(child.value for child in rest)
        if total > 0:
            tree.add(_leaf_text(Leaf(f"{len(rest)} more", total, leaf.unit)))


def _leaf_text(leaf: Leaf) -> Text:
    show = format_seconds if leaf.unit == "s" else format_bytes
    return Text.assemble(
        (f"{show(leaf.value):>11}  ", "bold"), leaf.name, (f"  {leaf.note}" if leaf.note else "", "dim")
    )


def placement_table(explanation: Explanation) -> Table:
    """Where every tensor of every block lies, as chips: S(dim) sharded, P a partial sum; axes not named replicate."""
    table = plain_table(("block", "left"), ("tensor", "left"), ("placement", "left"), ("local shape", "left"))
    previous = ""
    for item in explanation.placements:
        chips = "  ".join(
            f"{axis}:{text.replace('Shard', 'S').replace('Partial', 'P')}" for axis, text in item.placements.items()
        )
        shape = " ".join(f"{dim}={size}" for dim, size in item.local_shape.items())
        table.add_row(item.block if item.block != previous else "", item.tensor, chips or "replicated", shape)
        previous = item.block
    return table


def comparison_table(names: tuple[str, str], one: Estimate, other: Estimate) -> Table:
    """Where two estimates part, entry by entry."""
    table = plain_table(("", "left"), (names[0], "right"), (names[1], "right"), ("difference", "right"))
    for entries, others, show in ((one.time, other.time, format_seconds), (one.memory, other.memory, format_bytes)):
        for name in dict.fromkeys((*entries, *others)):
            left, right = entries.get(name, 0.0), others.get(name, 0.0)
            if left or right:
                sign = "+" if right > left else "-" if right < left else ""
                table.add_row(name, show(left), show(right), f"{sign}{show(abs(right - left))}")
        total = (sum(entries.values()), sum(others.values()))
        sign = "+" if total[1] > total[0] else "-" if total[1] < total[0] else ""
        table.add_row(
            "total", *(show(value) for value in total), f"{sign}{show(abs(total[1] - total[0]))}", style="bold"
        )
        table.add_section()
    return table


# --- the pipeline over time ----------------------------------------------------------------------------------------

MAX_RANKS_DRAWN = 16


def pipeline_view(schedule: str, num_ranks: int, num_virtual: int, num_microbatches: int, width: int) -> RenderableType:
    """A named schedule drawn with a forward of 1 and a backward of 2; long ones are drawn for fewer microbatches."""
    if num_ranks == 1 or num_ranks > MAX_RANKS_DRAWN or schedule not in SCHEDULES:
        return Text("")
    enough = num_ranks * (2 if num_virtual > 1 else 1)  # a multiple of the ranks suits every schedule
    drawn = min(num_microbatches, max(enough, 4)) if num_virtual == 1 else min(num_microbatches, enough)
    timeline = replay(actions(schedule, num_ranks, num_virtual, drawn), unit_time, num_ranks * num_virtual)
    note = f"{schedule}, {num_ranks} ranks x {num_virtual} stages"
    note += f", the first {drawn} of {num_microbatches} microbatches" if drawn < num_microbatches else ""
    return Group(
        Text(f"{note} (digits: microbatch; forward 1, backward 2)", style="dim"), timeline_text(timeline, width)
    )


def unit_time(action: Action) -> float:
    """A forward takes 1, a backward 2, each half of a split one 1."""
    return 2.0 if action.kind is ActionKind.B else 1.0


def timeline_text(timeline: Timeline, width: int) -> Text:
    """One line per rank; each cell is a slice of time, a digit the microbatch (modulo 10), a dot idle."""
    cells = max(10, width - 9)
    step = timeline.makespan_s / cells
    text = Text()
    for rank, row in enumerate(timeline.actions):
        text.append(f"rank {rank:<3} ", style="dim")
        spans = [
            span
            for action, start_s, end_s in zip(row, timeline.start_s[rank], timeline.end_s[rank], strict=True)
            for span in side_by_side(compute_parts(action), start_s, end_s)
        ]
        for cell in range(cells):
            middle = (cell + 0.5) * step
            found = next((action for action, start, end in spans if start <= middle < end), None)
            if found is None:
                text.append("·", style=PALETTE["bubble"])
            else:
                text.append(str((found.microbatch or 0) % 10), style=f"black on {PALETTE[found.kind.value]}")
        text.append("\n")
    return text


def side_by_side(parts: Sequence[Action], start_s: float, end_s: float) -> Iterator[tuple[Action, float, float]]:
    """The parts of an action with a share each of its time: overlapped ones are drawn one after the other."""
    width_s = (end_s - start_s) / max(len(parts), 1)
    for index, part in enumerate(parts):
        yield part, start_s + index * width_s, start_s + (index + 1) * width_s


# --- runs ----------------------------------------------------------------------------------------------------------


def measurement_view(measurement: Measurement, predicted: Estimate | None) -> Group:
    """Losses, and what was measured beside what was predicted."""
    losses = ", ".join(f"{loss:.6f}" for loss in measurement.losses)
    parts: list[RenderableType] = [Text.assemble(("losses ", "dim"), losses)]
    table = plain_table(("", "left"), ("measured", "right"), ("predicted", "right"), ("predicted / measured", "right"))
    rows: Iterable[tuple[str, float, float | None, str]] = (
        ("step time", measurement.step_time_s, predicted.step_time_s if predicted else None, "s"),
        (
            "peak memory of a rank",
            measurement.peak_memory_bytes,
            predicted.peak_memory_bytes if predicted else None,
            "B",
        ),
    )
    for name, measured, expected, unit in rows:
        show = format_seconds if unit == "s" else format_bytes
        ratio = f"{expected / measured:.2f}" if expected and measured else ""
        table.add_row(name, show(measured), show(expected) if expected else "", ratio)
    parts.append(table)
    if measurement.check:
        parts.append(check_text(measurement.check))
    return Group(*parts)


def check_text(check: Check) -> Text:
    """The verdict of a check against one device."""
    word = ("equal to one device", "green") if check.passed else ("NOT equal to one device", "red")
    return Text.assemble(
        word,
        f": largest relative difference of a loss {check.max_loss_difference:.1e}, of {check.num_gradients} gradients "
        f"{check.max_gradient_difference:.1e} (tolerance {check.tolerance:.0e})",
    )
