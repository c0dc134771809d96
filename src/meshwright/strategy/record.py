"""The strategy as a record, its parts, and what follows from them: degrees, layouts, the table of actions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Any

from meshwright.graph import Graph
from meshwright.schedule import Action, Table, actions, parse_action
from meshwright.sharding import BlockLayout, StatePlacement, lay_out
from meshwright.workload import Workload

#: Mesh axes, outermost first: neighbours on the innermost axis are neighbours in the machine.
AXIS_ORDER = ("pp", "dp_replicate", "dp_shard", "ep", "cp", "tp", "tp_kv", "tp_group")

#: Mesh axes of strategies at the level of operators, outermost first.
PLACED_AXES = ("x", "y", "z")


class Recompute(StrEnum):
    """What the backward computes again: nothing, operators in a recompute group (core attention), or whole blocks."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


@dataclass(frozen=True)
class MeshAxis:
    """A named axis of the mesh and its number of ranks."""

    name: str
    size: int


@dataclass(frozen=True)
class BlockRange:
    """Blocks `start` up to, not including, `stop` of the model's sequence."""

    start: int
    stop: int


@dataclass(frozen=True)
class Stage:
    """One (virtual) pipeline stage: where on the `pp` axis it lives, and its blocks, contiguous or not.

    `mesh` and `splits` are the stage's own where it has a mesh of its own (Alpa), and so may be where its `state` lies
    and what it computes again, per block; else those of the strategy hold."""

    pipeline_rank: int
    blocks: tuple[BlockRange, ...]
    mesh: tuple[MeshAxis, ...] = ()
    splits: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    state: StatePlacement | None = None
    recompute: dict[str, Recompute] = field(default_factory=dict)


@dataclass(frozen=True)
class Strategy:
    """The full strategy; see the package's docstring.

    `mesh` is outermost first; the rank of a device is its row-major index. `splits` gives, per block and operator (or
    boundary tensor), the dim that each axis splits. `stages` are in the order in which a microbatch passes them.
    `microbatch` is in sequences per data-parallel rank. `recompute` is per block. Where `schedule` is `custom`, `table`
    has a row for each pipeline rank: actions in PyTorch's notation, with commas between.

    At the level of operators (`is_placed`) the axes are called x, y, z, `microbatch` counts the sequences of all ranks,
    and `splits` has entries for tensors at rest too, where they lie: activations with several readers or kept for the
    backward, parameters, and `parameter@state` where its gradients and optimizer state lie otherwise. `recomputed`
    names, per block, activations that the backward makes again.
    """

    mesh: tuple[MeshAxis, ...]
    splits: dict[str, dict[str, dict[str, str]]]
    stages: tuple[Stage, ...]
    schedule: str
    microbatch: int
    state: StatePlacement
    recompute: dict[str, Recompute] = field(default_factory=dict)
    table: tuple[str, ...] = ()
    recomputed: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def is_placed(self) -> bool:
        """Whether it is a strategy at the level of operators: its axes have no meaning but their place."""
        meshes = [self.mesh, *(stage.mesh for stage in self.stages)]
        return any(axis.name in PLACED_AXES for mesh in meshes for axis in mesh) or bool(self.recomputed)

    @property
    def degrees(self) -> dict[str, int]:
        """Size of every mesh axis, outermost first."""
        return {axis.name: axis.size for axis in self.mesh}

    @property
    def num_devices(self) -> int:
        """Devices of the whole mesh; where stages have meshes of their own, of those of all pipeline ranks."""
        sizes = [axis.size for axis in self.mesh]
        own = {stage.pipeline_rank: 1 for stage in self.stages if stage.mesh}
        for stage in self.stages:
            if stage.mesh:
                size = math.prod(axis.size for axis in stage.mesh)
                own[stage.pipeline_rank] = max(own[stage.pipeline_rank], size)
        return sum(own.values()) if own else math.prod(sizes)

    @property
    def pipeline_size(self) -> int:
        """Ranks of the `pp` axis."""
        return self.degrees.get("pp", 1)

    @property
    def virtual_stages(self) -> int:
        """Stages on each pipeline rank."""
        return len(self.stages) // self.pipeline_size

    @property
    def most_messages(self) -> int:
        """Messages that the busiest pipeline rank sends to other ranks for a microbatch, forward and backward."""
        sent: Counter[int] = Counter()
        for one, following in pairwise(self.stages):
            if one.pipeline_rank != following.pipeline_rank:
                sent.update((one.pipeline_rank, following.pipeline_rank))
        return max(sent.values(), default=0)

    def num_microbatches(self, workload: Workload) -> int:
        """Microbatches of one step on each data-parallel rank."""
        return workload.global_batch // (self.microbatch * int(degree_of("dp", self.degrees)))

    def layouts(self, graph: Graph) -> dict[str, BlockLayout]:
        """The layout of every distinct block."""
        return {block.name: lay_out(block, self.splits[block.name]) for block in graph.blocks}


#: The schedule of a strategy that brings its own table.
CUSTOM = "custom"


def strategy_table(strategy: Strategy, num_microbatches: int) -> Table:
    """The actions of each pipeline rank; where stages lie in another order than the schedule's, so do its rows."""
    if strategy.schedule == CUSTOM:
        return tuple(tuple(parse_action(text) for text in row.split(",")) for row in strategy.table)
    table = actions(strategy.schedule, strategy.pipeline_size, strategy.virtual_stages, num_microbatches)
    rows: dict[int, tuple[Action, ...]] = {strategy.stages[row[0].stage].pipeline_rank: row for row in table}
    return tuple(rows[rank] for rank in range(strategy.pipeline_size))


def root_axis(axis: str) -> str:
    """The degree that an axis is a part of: `tp_kv` and `tp_group` are `tp`, `dp_shard` is `dp`.

    >>> root_axis("tp_group")
    'tp'
    """
    return axis.split("_")[0]


def degree_of(root: str, degrees: Mapping[str, Any]) -> Any:
    """The product of the axes that make up a degree; the ranks of expert parallelism are data-parallel ones too.

    >>> degree_of("dp", {"dp_shard": 4, "ep": 8, "tp": 2})
    32
    """
    parts = (root, "ep") if root == "dp" else (root,)
    return math.prod(size for axis, size in degrees.items() if root_axis(axis) in parts)
