"""Who holds which blocks: pipeline ranks of a kind folded, and block prices summed over what each kind holds.

Legend of shape suffixes: T rank tables, K kinds of pipeline rank (padded), B kinds of block, U layouts; Z placements of
state, C choices of recomputation, M members (a layout, a rank table, a number of microbatches). Between C and U or M
stand the dims of what a space chooses besides (`layouts.Machine.num_choices` of them, mostly none).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.graph import Graph
from meshwright.strategy import Stage


@dataclass(frozen=True)
class RankTable:
    """What each kind of pipeline rank holds: blocks by kind, its first rank, and how many ranks are like it.

    T tables; `counts_BKT` block instances, `first_KT`, `ranks_KT` (0: padding)."""

    blocks: tuple[str, ...]
    counts_BKT: np.ndarray[Any, Any]
    first_KT: np.ndarray[Any, Any]
    ranks_KT: np.ndarray[Any, Any]


def rank_table(graph: Graph, stage_lists: Sequence[Sequence[Stage]]) -> RankTable:
    """The table of each list of stages of one model; see `rank_table_of`."""
    return rank_table_of(tuple(block.name for block in graph.blocks), [(graph.sequence, own) for own in stage_lists])


def rank_table_of(
    names: Sequence[str], staged: Sequence[tuple[Sequence[str], Sequence[Stage]]], *, fold: bool = True
) -> RankTable:
    """The table of each sequence of blocks with its stages, equal ranks folded; entries are padded to the longest.

    Where ranks are not to be folded, each is a kind of its own, in order."""
    held = [_held(sequence, names, stages) for sequence, stages in staged]
    folded = [_fold(rows) if fold else [(row, [rank]) for rank, row in rows] for rows in held]
    width = max(len(rows) for rows in folded)
    counts = np.zeros((len(names), width, len(folded)))
    first, ranks = np.zeros((2, width, len(folded)), dtype=np.int64)
    for table, rows in enumerate(folded):
        for kind, (row, members) in enumerate(rows):
            counts[:, kind, table], first[kind, table], ranks[kind, table] = row, members[0], len(members)
    return RankTable(tuple(names), counts, first, ranks)


def _held(sequence: Sequence[str], names: Sequence[str], stages: Sequence[Stage]) -> list[tuple[int, tuple[int, ...]]]:
    """Each pipeline rank with how many blocks of each name it holds."""
    held: dict[int, list[int]] = {}
    index = {name: position for position, name in enumerate(names)}
    for stage in stages:
        row = held.setdefault(stage.pipeline_rank, [0] * len(names))
        for part in stage.blocks:
            for name in sequence[part.start : part.stop]:
                row[index[name]] += 1
    return [(rank, tuple(held[rank])) for rank in sorted(held)]


def _fold(rows: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Each kind of rank with its members."""
    folded: dict[tuple[int, ...], list[int]] = {}
    for rank, row in rows:
        folded.setdefault(row, []).append(rank)
    return list(folded.items())


@dataclass(frozen=True)
class Members:
    """M strategies of one schedule that differ in numbers alone. `layout_M` and `table_M` point into the layouts and
    rank tables."""

    schedule: str
    layout_M: Any
    table_M: Any
    num_virtual_M: Any
    num_microbatches_M: Any

    def part(self, members: slice) -> Members:
        """Some of them."""
        columns = (self.layout_M, self.table_M, self.num_virtual_M, self.num_microbatches_M)
        return Members(self.schedule, *(column[members] for column in columns))


class Rows:
    """Sums layout columns (Z x C x U) over the blocks that each kind of rank holds (K x Z x C x M)."""

    def __init__(self, tables: RankTable, members: Members, num_choices: int = 0) -> None:
        self.blocks = tables.blocks
        self.counts_BKM = tables.counts_BKT[:, :, members.table_M]
        self.first_KM = tables.first_KT[:, members.table_M]
        self.ranks_KM = tables.ranks_KT[:, members.table_M]
        self.layout_M = members.layout_M
        self.between = (1,) * (2 + num_choices)

    def spread(self, values_KM: Any) -> Any:
        """Values of kinds of rank and members with room for all dims between: K x 1 x 1 x M."""
        return values_KM.reshape(len(values_KM), *self.between, -1)

    def column(self, values_U: Any) -> Any:
        """A layout column (leading dims are kept) as a column of members."""
        values = np.asarray(values_U, dtype=float)
        if values.ndim == 0:
            return np.broadcast_to(values, self.layout_M.shape)
        return values[..., self.layout_M]

    def holds_both(self, one: str, other: str) -> Any:
        """1 for each kind of rank that holds both of two blocks, else 0; K x 1 x 1 x M."""
        return self.spread(self._holds(one) & self._holds(other))

    def holds_one(self, one: str, other: str) -> Any:
        """1 for each kind of rank that holds one of two blocks and not the other, else 0; K x 1 x 1 x M."""
        return self.spread(self._holds(one) ^ self._holds(other))

    def _holds(self, name: str) -> Any:
        return self.counts_BKM[self.blocks.index(name)] > 0

    def add(self, values_U: Mapping[str, Any]) -> Any:
        """Sum over the blocks of each rank."""
        total: Any = 0.0
        for index, name in enumerate(self.blocks):
            if name in values_U:
                column = self.column(values_U[name])
                total = total + self.spread(self.counts_BKM[index]) * column
        return total

    def at(self, kind: Any) -> Callable[[Mapping[str, Any]], Any]:
        """Like `add`, but of one kind of rank for each entry of `kind` (Z x C x M) alone."""
        counts = {name: pick(self.spread(self.counts_BKM[index]), kind) for index, name in enumerate(self.blocks)}

        def add(values_U: Mapping[str, Any]) -> Any:
            total: Any = 0.0
            for name in self.blocks:
                if name in values_U:
                    total = total + counts[name] * self.column(values_U[name])
            return total

        return add

    def largest(self, values_U: Mapping[str, Any]) -> Any:
        """The largest over the kinds of blocks of each rank."""
        best: Any = 0.0
        for index, name in enumerate(self.blocks):
            column = self.column(values_U[name])
            best = np.maximum(best, self.spread(self.counts_BKM[index] > 0) * column)
        return best


def pick(values_K: Any, kind: Any) -> Any:
    """Of values with a leading dim of kinds the one of each entry of `kind`."""
    found = np.broadcast_to(values_K[0], kind.shape)
    for index in range(1, len(values_K)):
        found = np.where(kind == index, values_K[index], found)
    return found
