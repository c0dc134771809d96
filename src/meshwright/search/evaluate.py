"""A whole space priced by the analytic evaluator: the same formulas as one strategy, on columns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.analytic import usable_memory
from meshwright.cost.layouts import PricedLayouts, machine_of, price_layouts, price_states
from meshwright.cost.stages import Family, RankTable, rank_table
from meshwright.cost.step import evaluate
from meshwright.engine import Engine
from meshwright.graph import Graph
from meshwright.search.space import KEYS, RECOMPUTES, SCHEDULE_NAMES, Columns, Part, UniformSpace, shorthand_at
from meshwright.sharding import lay_out, zero_placement
from meshwright.strategy import (
    STATE_AXES,
    Recompute,
    Shorthand,
    recompute_blocks,
    tensor_axes,
    uniform_splits,
    uniform_stages,
)

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Evaluated:
    """Every member of a space with its step time and peak memory; `columns` by `space.KEYS`, all of one length."""

    columns: Columns
    step_time_s: np.ndarray[Any, Any]
    peak_memory_bytes: np.ndarray[Any, Any]
    usable_memory_bytes: float
    cpu_s: float

    @property
    def num_strategies(self) -> int:
        """Members evaluated."""
        return len(self.step_time_s)

    @property
    def feasible(self) -> np.ndarray[Any, Any]:
        """Which members fit into memory."""
        fits: np.ndarray[Any, Any] = self.peak_memory_bytes <= self.usable_memory_bytes
        return fits

    def shorthand(self, row: int) -> Shorthand:
        """One member."""
        return shorthand_at(self.columns, row)


def evaluate_space(
    space: UniformSpace, cluster: Cluster, engine: Engine, progress: Progress | None = None
) -> Evaluated:
    """Time and memory of every member. `progress` is told the number of members done."""
    started = time.process_time()
    machine = machine_of(cluster, engine, space.workload.precision)
    chunks: list[tuple[Columns, Any, Any]] = []
    done = 0
    for part in space.parts():
        priced = _price(space.graph, part, machine, space)
        tables, table_index = _tables(space.graph, part)
        for zero in range(4):
            state = zero_placement(zero, tuple(axis for axis in priced.degrees if axis in STATE_AXES))
            rows = np.flatnonzero(
                [zero in space.state_levels(ranks) for ranks in part.layouts["dp"] * part.layouts["cp"]]
            )
            chosen = np.isin(part.layout_index, rows)
            if not chosen.any():
                continue
            states = price_states(priced, state)
            for code, name in enumerate(SCHEDULE_NAMES):
                member = np.flatnonzero(chosen & (part.schedule == code))
                for kind in space.recomputes() if len(member) else ():
                    layout_R = part.layout_index[member]
                    family = Family(
                        state=state,
                        schedule=name,
                        recompute=recompute_blocks(space.graph, kind),
                        layout_R=layout_R,
                        table_R=table_index[member],
                        num_virtual_R=part.vpp[member],
                        num_microbatches_R=_num_microbatches(space, part)[layout_R],
                    )
                    result = evaluate(priced, states, tables, family)
                    columns = _columns(part, member, zero, kind, code)
                    chunks.append((columns, result.step_time_s, result.peak_memory_bytes))
                    done += len(member)
                    if progress:
                        progress(done)
    return _joined(chunks, usable_memory(cluster), time.process_time() - started)


def _price(graph: Graph, part: Part, machine: Any, space: UniformSpace) -> PricedLayouts:
    layouts = part.layouts
    splits = uniform_splits(graph, part.pattern.rules())
    kv = graph.dims.get("kv_heads", 1)
    tensor = {"tp_kv": np.full_like(layouts["tp"], kv), "tp_group": layouts["tp"] // kv}
    degrees = {
        "pp": layouts["pp"],
        "dp_replicate": np.ones_like(layouts["dp"]),
        "dp_shard": layouts["dp"],
        "cp": layouts["cp"],
        **(tensor if part.pattern.replicate_kv else {"tp": layouts["tp"]}),
    }
    assert set(tensor_axes(graph, int(layouts["tp"][0]))) <= set(degrees)
    blocks = {block.name: lay_out(block, splits[block.name]) for block in graph.blocks}
    return price_layouts(graph, blocks, degrees, layouts["mbs"], machine, space.workload)


def _tables(graph: Graph, part: Part) -> tuple[RankTable, Any]:
    """Rank tables of every (pp, vpp) of a part, and which one each member uses."""
    shapes = np.stack([part.layouts["pp"][part.layout_index], part.vpp], axis=1)
    distinct, index = np.unique(shapes, axis=0, return_inverse=True)
    return rank_table(graph, [uniform_stages(graph, int(pp), int(vpp)) for pp, vpp in distinct]), index.reshape(-1)


def _num_microbatches(space: UniformSpace, part: Part) -> Any:
    return space.workload.global_batch // (part.layouts["dp"] * part.layouts["mbs"])


def _columns(part: Part, member: Any, zero: int, kind: Recompute, schedule: int) -> Columns:
    layout_R = part.layout_index[member]
    constant = {
        "schedule": schedule,
        "zero": zero,
        "recompute": RECOMPUTES.index(kind),
        "sp": int(part.pattern.sequence_parallel),
    }
    varying = {**{key: column[layout_R] for key, column in part.layouts.items()}, "vpp": part.vpp[member]}
    return {
        key: (varying[key] if key in varying else np.full(len(member), constant[key])).astype(np.int32) for key in KEYS
    }


def _joined(chunks: list[tuple[Columns, Any, Any]], usable: float, cpu_s: float) -> Evaluated:
    def joined(arrays: list[Any]) -> Any:
        return np.concatenate(arrays) if arrays else np.zeros(0)

    columns = {key: joined([chunk[0][key] for chunk in chunks]) for key in KEYS}
    return Evaluated(columns, joined([c[1] for c in chunks]), joined([c[2] for c in chunks]), usable, cpu_s)
