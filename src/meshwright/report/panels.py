"""Where everything lies, as data for a drawing: of each operator of a block a row of chips, tensor x mesh axis, with
the shapes that a rank holds, and the collectives between.

A `Panel` is one block under one strategy. It follows from the strategy and the rules of `sharding` alone; what moves,
in bytes and seconds, is there where a priced step is given (`cost.placed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from meshwright.errors import Problem
from meshwright.graph import Block, Graph, Role
from meshwright.sharding import (
    PARTIAL,
    REPLICATE,
    SPREAD,
    SUMMANDS,
    Placements,
    Shard,
    at_rest,
    lay_out_operator,
    local_size,
    rest_key,
)
from meshwright.strategy import MeshAxis, Strategy
from meshwright.workload import Workload

if TYPE_CHECKING:
    from meshwright.cost.placed import Move, PlacedBlock, PlacedStep


@dataclass(frozen=True)
class Chip:
    """How a tensor lies on one mesh axis: `S(dim)`, `R` or `P`, and `dim` where it is cut."""

    axis: str
    word: str
    dim: str = ""


@dataclass(frozen=True)
class Lying:
    """A tensor under a placement: a chip for each axis, and the shape that the fullest rank holds."""

    tensor: str
    role: Role
    chips: tuple[Chip, ...]
    local_shape: tuple[float, ...]

    @property
    def shape(self) -> str:
        """The shape in words."""
        return " x ".join(f"{size:,.6g}" if isinstance(size, float) else f"{size}" for size in self.local_shape) or "1"


@dataclass(frozen=True)
class Carried:
    """One collective that moves a tensor: when, over which axes, what each rank sends and how long it takes."""

    tensor: str
    phase: str
    collective: str
    axes: tuple[str, ...]
    sent_bytes: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """An operator: on each axis what it splits (a chip without a word of its own: nothing), weights that it takes and
    results that it makes, and the collectives for it."""

    operator: str
    split: tuple[Chip, ...]
    takes: tuple[Lying, ...]
    makes: tuple[Lying, ...]
    moves: tuple[Carried, ...] = ()
    seconds: float | None = None


@dataclass(frozen=True)
class Panel:
    """One block (of `count` equal ones) under one strategy. `resting` are its tensors at rest, where the strategy says
    how they lie, `update` what the optimizer moves."""

    title: str
    block: str
    count: int
    mesh: tuple[MeshAxis, ...]
    rows: tuple[Row, ...]
    resting: tuple[Lying, ...] = ()
    update: tuple[Carried, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def moves(self) -> tuple[Carried, ...]:
        """All collectives."""
        return (*(move for row in self.rows for move in row.moves), *self.update)

    @property
    def is_priced(self) -> bool:
        """Whether it says what operators take and what moves."""
        return all(row.seconds is not None for row in self.rows)

    @property
    def compute_s(self) -> float:
        """Seconds of its operators, of one instance."""
        return sum(row.seconds or 0.0 for row in self.rows)

    @property
    def communication_s(self) -> float:
        """Seconds of its collectives, of one instance."""
        return sum(move.seconds for move in self.moves)


@dataclass(frozen=True)
class _Setting:
    """A mesh with splits: the strategy's, or a stage's own."""

    name: str
    mesh: tuple[MeshAxis, ...]
    splits: Mapping[str, Mapping[str, Mapping[str, str]]]
    batch: int
    stages: list[int] = field(default_factory=list)


def panels_of(
    graph: Graph,
    strategy: Strategy,
    workload: Workload,
    *,
    title: str = "",
    step: PlacedStep | None = None,
    notes: Sequence[str] = (),
) -> tuple[Panel, ...]:
    """A panel of each block, in the order of the model; where stages have splits of their own, of each kind of stage.

    `step` is `cost.placed.moved` of the strategy, which has what operators take and what moves."""
    priced = {} if step is None else {placed.block.name: placed for placed in step.blocks}
    found = []
    for setting in _settings(strategy, graph):
        name = ", ".join(filter(None, (title, setting.name)))
        for block in graph.blocks:
            if block.name in setting.splits:
                found.append(_panel(graph, block, setting, workload, name, priced.get(block.name), tuple(notes)))
    return tuple(found)


def _settings(strategy: Strategy, graph: Graph) -> list[_Setting]:
    """The distinct settings, first to last."""
    if not any(stage.splits for stage in strategy.stages):
        return [_Setting("", strategy.mesh, strategy.splits, _batch(strategy.microbatch, strategy))]
    found: list[_Setting] = []
    for number, stage in enumerate(strategy.stages):
        blocks = {graph.sequence[at] for run in stage.blocks for at in range(run.start, run.stop)}
        splits = {name: stage.splits[name] for name in graph.block if name in blocks and name in stage.splits}
        same = next((each for each in found if each.mesh == stage.mesh and each.splits == splits), None)
        if same is None:
            found.append(same := _Setting("", stage.mesh, splits, strategy.microbatch))
        same.stages.append(number)
    return [_Setting(_stage_words(each.stages), each.mesh, each.splits, each.batch) for each in found]


def _stage_words(stages: Sequence[int]) -> str:
    if len(stages) == 1:
        return f"stage {stages[0]}"
    is_run = list(stages) == list(range(stages[0], stages[-1] + 1))
    return f"stages {stages[0]}-{stages[-1]}" if is_run else f"stages {', '.join(map(str, stages))}"


def _batch(microbatch: int, strategy: Strategy) -> int:
    """Sequences of all ranks; where axes are called by what they are for, `microbatch` counts those of one rank."""
    if strategy.is_placed:
        return microbatch
    cutting = {
        axis for own in strategy.splits.values() for split in own.values() for axis in split if split[axis] == "batch"
    }
    for axis in strategy.mesh:
        microbatch *= axis.size if axis.name in cutting else 1
    return microbatch


def _panel(
    graph: Graph,
    block: Block,
    setting: _Setting,
    workload: Workload,
    title: str,
    priced: PlacedBlock | None,
    notes: tuple[str, ...],
) -> Panel:
    splits = setting.splits[block.name]
    cutting = {axis for split in splits.values() for axis in split}
    mesh = tuple(axis for axis in setting.mesh if axis.size > 1 and (axis.name in cutting or priced is not None))
    degrees = {axis.name: axis.size for axis in mesh}
    sizes = graph.sizes(setting.batch, workload.seq_len)

    def lying(name: str, placements: Placements) -> Lying:
        tensor = block.tensor[name]
        shape = tuple(local_size(dim, placements, sizes, degrees) for dim in tensor.dims)
        return Lying(name, tensor.role, _chips(placements, mesh), shape)

    rows = []
    for operator in block.operators:
        split = {axis: dim for axis, dim in splits.get(operator.name, {}).items() if axis in degrees}
        layout = lay_out_operator(block, operator, split)
        takes = [
            lying(name, placements)
            for name, placements in zip(operator.inputs, layout.inputs, strict=True)
            if block.tensor[name].role is Role.PARAMETER
        ]
        makes = [lying(*each) for each in zip(operator.outputs, layout.outputs, strict=True)]
        chips = tuple(Chip(axis.name, split.get(axis.name, ""), split.get(axis.name, "")) for axis in mesh)
        rows.append(Row(operator.name, chips, tuple(takes), tuple(makes), *_priced(priced, operator.name)))
    resting = [
        lying(name, at_rest({axis: dim for axis, dim in splits[key].items() if axis in degrees}).value)
        for name in block.tensor
        for key in [rest_key(block, name)]
        if key in splits
    ]
    update = _carried(move for move in priced.moves if not move.operator) if priced else ()
    return Panel(title, block.name, graph.counts[block.name], mesh, tuple(rows), tuple(resting), update, notes)


def _chips(placements: Placements, mesh: Sequence[MeshAxis]) -> tuple[Chip, ...]:
    found = []
    for axis in mesh:
        placement = placements.get(axis.name, REPLICATE)
        if isinstance(placement, Shard):
            found.append(Chip(axis.name, f"S({placement.dim})", placement.dim))
        else:
            found.append(Chip(axis.name, "P" if placement == PARTIAL else "R"))
    return tuple(found)


def _priced(priced: PlacedBlock | None, operator: str) -> tuple[tuple[Carried, ...], float | None]:
    if priced is None:
        return (), None
    own = next(each for each in priced.operators if each.operator == operator)
    moves = _carried(move for move in priced.moves if move.operator == operator)
    return moves, own.seconds.forward + own.seconds.backward


def _carried(moves: Iterator[Move]) -> tuple[Carried, ...]:
    """The collectives that take time; slices and zeros are a rank's own affair."""
    return tuple(
        Carried(
            move.tensor, move.phase.value, each.step.collective.value, each.step.axes, each.sent_bytes, each.seconds
        )
        for move in moves
        for each in move.steps
        if each.seconds > 0
    )


def dims_of(panels: Sequence[Panel]) -> tuple[str, ...]:
    """Every dim that a chip names, in order of appearance, so that all panels colour it alike."""
    chips = (
        chip
        for panel in panels
        for row in panel.rows
        for chip in (*row.split, *(each for own in (*row.takes, *row.makes) for each in own.chips))
    )
    resting = (chip for panel in panels for own in panel.resting for chip in own.chips)
    return tuple(
        dict.fromkeys(chip.dim for chip in (*chips, *resting) if chip.dim and chip.dim not in (SPREAD, SUMMANDS))
    )


def panel_problems(panels: Sequence[Panel]) -> list[Problem]:
    """What keeps panels from being drawn side by side.

    >>> print(panel_problems([])[0])
    placement: there is no plan to draw
    """
    if not panels:
        return [Problem("placement", "", "there is no plan to draw")]
    return [
        Problem(
            f"placement of {panel.title or 'a plan'}",
            panel.block,
            f"must have the operators of {group[0].title or group[0].block}",
        )
        for group in by_block(panels)
        for panel in group
        if [row.operator for row in panel.rows] != [row.operator for row in group[0].rows]
    ]


def by_block(panels: Sequence[Panel]) -> list[list[Panel]]:
    """Panels of the same block together, blocks in order of appearance."""
    found: dict[str, list[Panel]] = {}
    for panel in panels:
        found.setdefault(panel.block, []).append(panel)
    return list(found.values())
