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
from meshwright.errors import InputError
from meshwright.graph import Graph
from meshwright.search.space import KEYS, OBSTACLES, SCHEDULE_NAMES, Columns, Part, Space, shorthand_at
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

#: Members composed at once: enough that calls cost little beside work, few enough for a processor's cache; measured,
#: half as many or twice as many are slower.
CHUNK = 65_536

#: Columns of keys and of results.
_Chunk = tuple[Columns, Columns]


@dataclass(frozen=True)
class Evaluated:
    """Every member of a space with its step time and peak memory, all columns of one length.

    `columns` by `space.KEYS` and by what the space chooses besides; `obstacle` what keeps a member from running apart
    from memory, an index into `space.OBSTACLES`; `sequences` those of a step where members differ in it, else 1."""

    columns: Columns
    step_time_s: np.ndarray[Any, Any]
    peak_memory_bytes: np.ndarray[Any, Any]
    obstacle: np.ndarray[Any, Any]
    sequences: Any
    usable_memory_bytes: float
    cpu_s: float

    @property
    def num_strategies(self) -> int:
        """Members evaluated."""
        return len(self.step_time_s)

    @property
    def time_s(self) -> np.ndarray[Any, Any]:
        """What members are compared by: seconds of a step or, where steps differ in sequences, of a sequence."""
        seconds: np.ndarray[Any, Any] = self.step_time_s / self.sequences
        return seconds

    @property
    def feasible(self) -> np.ndarray[Any, Any]:
        """Which members can run and fit into memory."""
        fits: np.ndarray[Any, Any] = (self.obstacle == 0) & (self.peak_memory_bytes <= self.usable_memory_bytes)
        return fits

    @property
    def infeasible(self) -> dict[str, int]:
        """How many members cannot run, by the first reason."""
        counts = dict(zip(OBSTACLES, np.bincount(self.obstacle, minlength=len(OBSTACLES)).tolist(), strict=True))
        counts["memory"] = counts.pop("") - int(self.feasible.sum())
        return {reason: count for reason, count in counts.items() if count}

    def shorthand(self, row: int) -> Shorthand:
        """One member."""
        return shorthand_at(self.columns, row)


def evaluate_space(space: Space, cluster: Cluster, engine: Engine, progress: Progress | None = None) -> Evaluated:
    """Time and memory of every member; raises `InputError` where the space cannot be evaluated. `progress` is told the
    number of members done."""
    if problems := space.problems():
        raise InputError(problems)
    started = time.process_time()
    machine = machine_of(cluster, engine, space.workload)
    chunks: list[_Chunk] = []
    done = 0
    for part in space.parts():
        priced = _price(space.graph, part, space.machine(machine, part), space)
        axes = tuple(axis for axis in priced.degrees if axis in STATE_AXES)
        placements = [zero_placement(level, axes) for level in part.levels]
        prepared = prepare(priced, placements, [recompute_blocks(space.graph, kind) for kind in part.recomputes])
        tables, table_index = _tables(space.graph, part)
        num_microbatches = space.workload.global_batch // (part.layouts["dp"] * part.layouts["mbs"])
        for code, rows in _rows(part):
            members = Members(
                schedule=SCHEDULE_NAMES[code],
                layout_M=part.layout_index[rows],
                table_M=table_index[rows],
                num_virtual_M=part.vpp[rows],
                num_microbatches_M=num_microbatches[part.layout_index[rows]],
            )
            result = evaluate(prepared, tables, members)
            columns = {
                "step_time_s": part.distinct(rows, result.step_time_s),
                "peak_memory_bytes": part.distinct(rows, result.peak_memory_bytes),
                "obstacle": part.distinct(rows, space.obstacles(priced.machine, part, rows)).astype(np.int8),
            }
            chunks.append((part.columns(rows), columns))
            done += len(columns["step_time_s"])
            if progress:
                progress(done)
    return _joined(space, chunks, usable_memory(cluster), started)


def _rows(part: Part) -> Iterator[tuple[int, Any]]:
    """Rows of one schedule, a chunk at a time."""
    at_once = max(1, CHUNK // math.prod(part.shape))
    for code in np.flatnonzero(np.bincount(part.schedule)):
        own = np.flatnonzero(part.schedule == code)
        for start in range(0, len(own), at_once):
            yield int(code), own[start : start + at_once]


def _price(graph: Graph, part: Part, machine: Machine, space: Space) -> PricedLayouts:
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
    kept = part.pattern.keep_gathered
    blocks = {block.name: lay_out(block, splits[block.name], keep_gathered=kept) for block in graph.blocks}
    return price_layouts(graph, blocks, degrees, layouts["mbs"], machine, space.workload)


def _tables(graph: Graph, part: Part) -> tuple[RankTable, Any]:
    """Rank tables of every (pp, vpp) of a part, and which one each member uses."""
    width = int(part.vpp.max(initial=0)) + 1
    shapes = part.layouts["pp"][part.layout_index] * width + part.vpp
    distinct = np.flatnonzero(np.bincount(shapes))
    stages = [uniform_stages(graph, *divmod(int(shape), width)) for shape in distinct]
    return rank_table(graph, stages), np.searchsorted(distinct, shapes)


def _joined(space: Space, chunks: list[_Chunk], usable_bytes: float, started: float) -> Evaluated:
    """Chunks as one record; each is dropped once it is copied."""

    def joined(part: int, key: str) -> Any:
        return np.concatenate([chunk[part].pop(key) for chunk in chunks]) if chunks else np.zeros(0, dtype=int)

    columns = {key: joined(0, key) for key in (list(chunks[0][0]) if chunks else KEYS)}
    return Evaluated(
        columns=columns,
        step_time_s=joined(1, "step_time_s"),
        peak_memory_bytes=joined(1, "peak_memory_bytes"),
        obstacle=joined(1, "obstacle"),
        sequences=1 if space.whole_batch else space.batch(columns["dp"]),
        usable_memory_bytes=usable_bytes,
        cpu_s=time.process_time() - started,
    )
