"""What `meshwright validate` and `meshwright calibrate` print: errors, and what was skipped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.bench.calibrate import Calibration
from meshwright.bench.runs import Skipped
from meshwright.bench.validate import SourceErrors, Validation

#: Reasons of skipped rows that the table shows; `--json` has all.
SHOWN_REASONS = 40

_COLUMNS = ("source", "n", "median", "mean", "bias", "tau", "top-1", "top-3", "memory")


def validation_view(found: Validation) -> RenderableType:
    """Errors of each source, and what was skipped."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "source" else "right", no_wrap=name != "source")
    for group in found.groups:
        table.add_row(*_cells(group))
    unmeasured = sum(row.status == "unmeasured" for row in found.rows)
    total = f"{len(found.rows):,} rows predicted, {unmeasured:,} of them unmeasured; {len(found.skipped):,} skipped"
    legend = "step time: median and mean error, bias of the median; tau and regrets among comparable rows; % but tau"
    return Group(table, Text(total), Text(legend, style="dim"), *_skipped_lines(found.skipped))


def _cells(group: SourceErrors) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".1f") -> str:
        return "-" if value is None else format(value, form)

    return (
        group.source or "(blank)",
        f"{group.n:,}",
        number(group.median_ape_pct),
        number(group.mape_pct),
        number(group.bias_pct, "+.1f"),
        number(group.kendall_tau, ".2f"),
        number(group.top1_regret_pct),
        number(group.top3_regret_pct),
        number(group.memory_median_ape_pct),
    )


def _skipped_lines(skipped: Iterable[Skipped]) -> list[Text]:
    ids: dict[str, list[str]] = defaultdict(list)
    for row in skipped:
        ids[row.reason].append(row.id)
    lines = []
    for reason, names in list(ids.items())[:SHOWN_REASONS]:
        more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
        lines.append(Text.assemble(("skipped ", "yellow"), f"{names[0]}{more}: {reason}"))
    rest = len(ids) - SHOWN_REASONS
    return [*lines, Text(f"... and {rest:,} more reasons (--json has all)")] if rest > 0 else lines


def calibration_view(found: Calibration, files: Iterable[str]) -> RenderableType:
    """What runs were worth: median errors without them, and of runs left out in turn with the others."""
    lines = [Text(f"{found.num_runs:,} runs, into {', '.join(files)}")]
    told = (
        ("step time", found.before_pct, found.after_pct),
        ("peak memory", found.memory_before_pct, found.memory_after_pct),
    )
    for name, before, after in told:
        if before is not None and after is not None:
            lines.append(Text(f"{name}: median error {before:.1f} % before, {after:.1f} % on runs left out, after"))
    return Group(*lines, *_skipped_lines(found.skipped))
