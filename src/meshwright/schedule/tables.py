"""Tables as CSV files, in PyTorch's format: one line a rank, one action a cell, an empty cell for an idle slot.

PyTorch's `_load_csv` reads what `table_csv` writes; both of the formats that its `_dump_csv` writes, with messages and
without, are read by `read_table`. Whether a table makes sense is for `check`.
"""

from __future__ import annotations

import csv
import io
from dataclasses import replace

from meshwright.errors import InputError, Problem
from meshwright.schedule.action import Action, Table, parse_action


def read_table(text: str, where: str) -> Table:
    """The table in a CSV file's text; idle slots are left out. `where` names the file in problems.

    Raises `InputError` with every cell that is no action.

    >>> read_table("0F0,,,0B0\\n,1F0,1B0\\n", "two.csv")[1][0]
    Action(stage=1, kind=<ActionKind.F: 'F'>, microbatch=0, parts=())
    >>> read_table("0F0,0X0\\n1F0,1F\\n", "two.csv")
    Traceback (most recent call last):
    meshwright.errors.InputError: two.csv, line 1 (rank 0), column 2 = '0X0': X is no kind of action; known: F, I, W, \
B, UNSHARD, RESHARD, REDUCE_GRAD, SEND_F, RECV_F, SEND_B, RECV_B, OVERLAP_F_B
    two.csv, line 2 (rank 1), column 2 = '1F': F is of one microbatch (nearest: 1F0)
    """
    problems: list[Problem] = []
    rows: list[tuple[Action, ...]] = []
    lines = csv.reader(io.StringIO(text.removeprefix("\ufeff").rstrip(), newline=""))
    try:
        for rank, cells in enumerate(lines):
            place = f"{where}, line {lines.line_num} (rank {rank})"
            rows.append(tuple(_row(cells, place, problems)))
    except csv.Error as fault:
        problems.append(Problem(f"{where}, line {lines.line_num}", "", f"not CSV: {fault}"))
    if not any(rows) and not problems:
        problems.append(Problem(where, "", "has no actions; a table has one line of them for each rank", "0F0,0B0"))
    if problems:
        raise InputError(problems)
    return tuple(rows)


def _row(cells: list[str], place: str, problems: list[Problem]) -> list[Action]:
    row = []
    for column, cell in enumerate(cells, start=1):
        if not cell.strip():
            continue
        try:
            row.append(parse_action(cell))
        except InputError as refused:
            problems += [replace(problem, where=f"{place}, column {column}") for problem in refused.problems]
    return row


def table_csv(table: Table) -> str:
    """The CSV text of a table.

    >>> print(table_csv(read_table("0F0,,,0B0\\n,1F0,1B0", "two.csv")), end="")
    0F0,0B0
    1F0,1B0
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(str, row) for row in table])
    return text.getvalue()
