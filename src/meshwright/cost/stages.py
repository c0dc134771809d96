"""Who holds which blocks: pipeline ranks of a kind folded, and block columns summed over what each kind holds.

Legend of shape suffixes: T rank tables, R strategies, K kinds of pipeline rank (padded), B kinds of block, U layouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cost.layouts import PricedLayouts
from meshwright.graph import Graph
from meshwright.sharding import StatePlacement
from meshwright.strategy import Recompute, Stage


@dataclass(frozen=True)
class RankTable:
    """What each kind of pipeline rank holds: blocks by kind, its first rank, and how many ranks are like it.

    Leading shape: T tables; `counts_TKB` block instances, `first_TK`, `ranks_TK` (0: padding)."""

    blocks: tuple[str, ...]
    counts_TKB: np.ndarray[Any, Any]
    first_TK: np.ndarray[Any, Any]
    ranks_TK: np.ndarray[Any, Any]


def rank_table(graph: Graph, stage_lists: Sequence[Sequence[Stage]]) -> RankTable:
    """The table of each list of stages, equal ranks folded; entries are padded to the longest."""
    names = tuple(block.name for block in graph.blocks)
    folded = [_fold(graph, names, stages) for stages in stage_lists]
    width = max(len(rows) for rows in folded)
    counts = np.zeros((len(folded), width, len(names)), dtype=np.int64)
    first, ranks = np.zeros((2, len(folded), width), dtype=np.int64)
    for table, rows in enumerate(folded):
        for kind, (row, members) in enumerate(rows.items()):
            counts[table, kind], first[table, kind], ranks[table, kind] = row, members[0], len(members)
    return RankTable(names, counts, first, ranks)


def _fold(graph: Graph, names: Sequence[str], stages: Sequence[Stage]) -> dict[tuple[int, ...], list[int]]:
    held: dict[int, list[int]] = {}
    for stage in stages:
        row = held.setdefault(stage.pipeline_rank, [0] * len(names))
        for part in stage.blocks:
            for name in graph.sequence[part.start : part.stop]:
                row[names.index(name)] += 1
    folded: dict[tuple[int, ...], list[int]] = {}
    for rank in sorted(held):
        folded.setdefault(tuple(held[rank]), []).append(rank)
    return folded


@dataclass(frozen=True)
class Family:
    """R strategies that differ in numbers alone. `layout_R` and `table_R` point into the layouts and rank tables."""

    state: StatePlacement
    schedule: str
    recompute: Mapping[str, Recompute]
    layout_R: Any
    table_R: Any
    num_virtual_R: Any
    num_microbatches_R: Any


class Rows:
    """Sums block columns (U) over the blocks that each kind of rank holds (R x K)."""

    def __init__(self, tables: RankTable, family: Family, priced: PricedLayouts) -> None:
        self.blocks = tables.blocks
        self.counts_RKB = tables.counts_TKB[family.table_R]
        self.first_RK = tables.first_TK[family.table_R]
        self.ranks_RK = tables.ranks_TK[family.table_R]
        self.layout_R = family.layout_R
        self.num_layouts = len(np.atleast_1d(priced.microbatch))

    def column(self, values_U: Any) -> Any:
        """A layout column as a strategy column."""
        return np.broadcast_to(np.asarray(values_U, dtype=float), (self.num_layouts,))[self.layout_R]

    def add(self, values_U: Mapping[str, Any]) -> Any:
        """Sum over the blocks of each rank."""
        total = np.zeros(self.ranks_RK.shape)
        for index, name in enumerate(self.blocks):
            if name in values_U:
                total += self.counts_RKB[:, :, index] * self.column(values_U[name])[:, None]
        return total

    def largest(self, values_U: Mapping[str, Any]) -> Any:
        """The largest over the kinds of blocks of each rank."""
        best = np.zeros(self.ranks_RK.shape)
        for index, name in enumerate(self.blocks):
            held = self.counts_RKB[:, :, index] > 0
            best = np.maximum(best, np.where(held, self.column(values_U[name])[:, None], 0.0))
        return best

    @staticmethod
    def pick(values_RK: Any, kind_R: Any) -> Any:
        """The value of one kind of rank per strategy."""
        return values_RK[np.arange(len(kind_R)), kind_R]
