"""A whole space priced by the analytic evaluator: the same formulas as one strategy, on columns."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.analytic import usable_memory
from meshwright.cost.layouts import Machine, PricedLayouts, machine_of, price_layouts
from meshwright.cost.stages import Members, RankTable, rank_table
from meshwright.cost.step import evaluate, prepare
from meshwright.engine import Engine
from meshwright.graph import Graph
from meshwright.search.space import KEYS, RECOMPUTES, SCHEDULE_NAMES, Columns, Part, UniformSpace, shorthand_at
from meshwright.sharding import lay_out, zero_placement
from meshwright.strategy import (
    STATE_AXES,
    Shorthand,
    recompute_blocks,
    tensor_axes,
    uniform_splits,
    uniform_stages,
)

Progress = Callable[[int], None]

#: Members composed at once: what they need fits into a processor's cache.
CHUNK = 2048


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
    machine = machine_of(cluster, engine, space.workload)
    chunks: list[tuple[Columns, Any, Any]] = []
    done = 0
    for part in space.parts():
        priced = _price(space.graph, part, machine, space)
        axes = tuple(axis for axis in priced.degrees if axis in STATE_AXES)
        levels, kinds = space.state_levels(), space.recomputes()
        placements = [zero_placement(level, axes) for level in levels]
        prepared = prepare(priced, placements, [recompute_blocks(space.graph, kind) for kind in kinds])
        tables, table_index = _tables(space.graph, part)
        for code, member in _members(part):
            members = Members(
                schedule=SCHEDULE_NAMES[code],
                layout_M=part.layout_index[member],
                table_M=table_index[member],
                num_virtual_M=part.vpp[member],
                num_microbatches_M=_num_microbatches(space, part)[part.layout_index[member]],
            )
            result = evaluate(prepared, tables, members)
            columns, kept = _columns(part, member, levels, kinds, code)
            chunks.append((columns, result.step_time_s[kept], result.peak_memory_bytes[kept]))
            done += int(kept.sum())
            if progress:
                progress(done)
    return _joined(chunks, usable_memory(cluster), time.process_time() - started)


def _members(part: Part) -> Iterator[tuple[int, Any]]:
    """Members of one schedule, a chunk at a time."""
    for code in np.unique(part.schedule):
        own = np.flatnonzero(part.schedule == code)
        for start in range(0, len(own), CHUNK):
            yield int(code), own[start : start + CHUNK]


def _price(graph: Graph, part: Part, machine: Machine, space: UniformSpace) -> PricedLayouts:
    layouts = part.layouts
    splits = uniform_splits(graph, part.pattern.rules())
    kv = graph.dims.get("kv_heads", 1)
    tensor = {"tp_kv": np.full_like(layouts["tp"], kv), "tp_group": layouts["tp"] // kv}
    spread_over = [layouts[root] for root in part.pattern.over]
    axis = layouts["ep"] // math.prod(spread_over) if spread_over else layouts["ep"]
    degrees = {
        "pp": layouts["pp"],
        "dp_replicate": np.ones_like(layouts["dp"]),
        "dp_shard": layouts["dp"] // axis,
        **({"ep": axis} if part.pattern.expert_axis else {}),
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


def _columns(part: Part, member: Any, levels: Any, kinds: Any, schedule: int) -> tuple[Columns, Any]:
    """The keys of a grid of state levels x kinds of recomputation x members, and which of them are strategies of
    their own: without ranks to shard over all levels are one."""
    shape = (len(levels), len(kinds), len(member))
    layout_M = part.layout_index[member]
    level = np.array(levels)[:, None, None]
    shards_M = (part.layouts["dp"] * part.layouts["cp"])[layout_M]
    kept = np.broadcast_to((level == 0) | (shards_M > 1), shape)
    values: dict[str, Any] = {
        **{key: column[layout_M] for key, column in part.layouts.items()},
        "vpp": part.vpp[member],
        "schedule": schedule,
        "zero": level,
        "recompute": np.array([RECOMPUTES.index(kind) for kind in kinds])[:, None],
        "sp": int(part.pattern.sequence_parallel),
        "etp": int("tp" in part.pattern.over),
    }
    return {key: np.broadcast_to(values[key], shape)[kept].astype(np.int32) for key in KEYS}, kept


def _joined(chunks: list[tuple[Columns, Any, Any]], usable: float, cpu_s: float) -> Evaluated:
    def joined(arrays: list[Any]) -> Any:
        return np.concatenate(arrays) if arrays else np.zeros(0)

    columns = {key: joined([chunk[0][key] for chunk in chunks]) for key in KEYS}
    return Evaluated(columns, joined([c[1] for c in chunks]), joined([c[2] for c in chunks]), usable, cpu_s)
