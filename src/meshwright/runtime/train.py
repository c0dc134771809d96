"""One rank of a run: build its part of the model from the strategy's placements, take steps, report what it saw.

`Rank` is built once (mesh, block plans, state, pipeline) and then takes steps; `run_rank` is what a process does from
first to last. A run on one device is the same code on the trivial strategy, so what a check compares is the split.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.graph import Graph
from meshwright.results import Ran
from meshwright.runtime.collectives import all_reduce, carry_out, route
from meshwright.runtime.data import Data
from meshwright.runtime.memory import peak_bytes
from meshwright.runtime.mesh import Mesh, splitting_axes
from meshwright.runtime.modules import BlockModule, BlockPlan, StageModule, input_names, plan_block
from meshwright.runtime.pipeline import Shape, Walk, splits_backward, walk_alone, walk_together
from meshwright.runtime.record import Recorder, in_rows_words
from meshwright.runtime.state import FlatGroup, Member, Parameters, Tie, TrainingState, state_routes
from meshwright.runtime.weights import ParameterInstance, Source, drawn, local_piece, parameter_instances
from meshwright.schedule import Action, Table
from meshwright.sharding import BlockLayout, Placements, Shard
from meshwright.strategy import Recompute, Strategy, strategy_table
from meshwright.workload import Workload

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}

PIPELINE = "pp"


@dataclass(frozen=True)
class Job:
    """What is run: everything that losses depend on (graph, workload, seed, tokens), and how it is split."""

    graph: Graph
    strategy: Strategy
    workload: Workload
    steps: int
    seed: int = 0
    check: bool = False
    tokens: str | None = None
    timeout_s: float = 120.0
    record: bool = False


@dataclass(frozen=True)
class GradientDifference:
    """The largest difference of one gradient from the reference's, and the largest magnitude of the latter."""

    step: int
    name: str
    difference: float
    magnitude: float


@dataclass(frozen=True)
class RankReport:
    """What one rank saw. Losses are where the last stage is; gradient differences and the actions of the last step, by
    the machine's clock, at one rank per stage."""

    rank: int
    losses: tuple[float, ...]
    step_times_s: tuple[float, ...]
    peak_memory_bytes: int
    differences: tuple[GradientDifference, ...]
    ran: tuple[Ran, ...] = ()


# --- building -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layouts:
    """A job as placements: the mesh as this rank sees it, the layouts of all blocks, the sizes of one microbatch."""

    job: Job
    mesh: Mesh

    @property
    def strategy(self) -> Strategy:
        """The job's strategy."""
        return self.job.strategy

    @cached_property
    def num_microbatches(self) -> int:
        """Microbatches of a step."""
        return self.strategy.num_microbatches(self.job.workload)

    @cached_property
    def table(self) -> Table:
        """The actions of every pipeline rank."""
        return strategy_table(self.strategy, self.num_microbatches)

    @property
    def row(self) -> tuple[Action, ...]:
        """The actions of this rank."""
        return self.table[self.mesh.coordinates.get(PIPELINE, 0)]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Sizes of one microbatch of all data-parallel ranks together."""
        workload = self.job.workload
        return self.job.graph.sizes(workload.global_batch // self.num_microbatches, workload.seq_len)

    @cached_property
    def by_block(self) -> dict[str, BlockLayout]:
        """The layout of every distinct block."""
        return self.strategy.layouts(self.job.graph)

    @cached_property
    def plans(self) -> dict[str, BlockPlan]:
        """What every distinct block executes."""
        recompute = self.strategy.recompute
        return {
            name: plan_block(layout, self.mesh, self.sizes, recompute.get(name, Recompute.NONE))
            for name, layout in self.by_block.items()
        }

    @cached_property
    def stages(self) -> dict[int, tuple[int, ...]]:
        """The block positions of the stages on this rank."""
        mine = self.mesh.coordinates.get(PIPELINE, 0)
        return {
            index: tuple(position for part in stage.blocks for position in range(part.start, part.stop))
            for index, stage in enumerate(self.strategy.stages)
            if stage.pipeline_rank == mine
        }

    def stored(self, instance: ParameterInstance) -> Placements:
        """How a parameter lies in computation."""
        return self.by_block[instance.block].made[instance.tensor]

    def partial(self, instance: ParameterInstance) -> tuple[str, ...]:
        """The axes over which a parameter's gradient is a sum."""
        return self.mesh.ordered(self.by_block[instance.block].partial_gradients[instance.tensor])

    def boundary(self, position: int) -> tuple[Placements, ...]:
        """How the block at a position hands over."""
        return tuple(placements for _, placements in self.by_block[self.job.graph.sequence[position]].boundary)

    @cached_property
    def loss_axes(self) -> tuple[str, ...]:
        """The axes whose ranks have different tokens' losses."""
        made = self.by_block[self.job.graph.sequence[-1]].made["loss"]
        return self.mesh.ordered(axis for axis, placement in made.items() if isinstance(placement, Shard))

    def groups(self) -> set[tuple[str, ...]]:
        """Every set of axes over which this run talks; the same on all ranks."""
        found = {self.loss_axes, (PIPELINE,) if PIPELINE in self.strategy.degrees else ()}
        for plan in self.plans.values():
            found |= plan.groups
        for instance in parameter_instances(self.job.graph):
            found |= state_routes(self.partial(instance), self.strategy.state, self.mesh).groups
            found |= set(route(self.stored(instance), {}, self.mesh).groups)
        for before, after in zip(self.job.graph.sequence, self.job.graph.sequence[1:], strict=False):
            made = self.by_block[after].made
            handed = zip(self.by_block[before].boundary, self.job.graph.block[after].inputs, strict=True)
            for (_, source), name in handed:
                found |= set(route(source, made[name], self.mesh).groups)
                found |= set(route(made[name], source, self.mesh).groups)
        return found - {()}


def build_state(layouts: Layouts, source: Source, dtype: torch.dtype) -> tuple[TrainingState, dict[int, Parameters]]:
    """The training state of this rank, and the parameters of each block position on it."""
    state = layouts.strategy.state
    mine = {position for positions in layouts.stages.values() for position in positions}
    instances = [instance for instance in parameter_instances(layouts.job.graph) if instance.position in mine]
    made: dict[tuple[str, tuple[tuple[str, str], ...], tuple[str, ...]], FlatGroup] = {}
    named: dict[int, list[tuple[FlatGroup, tuple[str, ...]]]] = {position: [] for position in mine}

    def group_of(members: Sequence[ParameterInstance]) -> FlatGroup:
        first = members[0]
        stored = tuple(sorted((axis, str(placement)) for axis, placement in layouts.stored(first).items()))
        key = (first.name, stored, layouts.partial(first))
        if not first.tied or key not in made:  # a tied parameter that lies alike in both places is one parameter
            group = FlatGroup(
                [_member(instance, layouts) for instance in members],
                state_routes(layouts.partial(first), state, layouts.mesh),
                state,
                layouts.mesh,
                dtype,
                lambda member: _fill(member, layouts, source),
            )
            made[key] = group
        return made[key]

    def run_of(instance: ParameterInstance) -> tuple[int, tuple[str, ...], str]:
        return instance.position, layouts.partial(instance), instance.tensor if instance.tied else ""

    for (position, _, _), run in groupby(sorted(instances, key=run_of), key=run_of):
        members = list(run)
        named[position].append((group_of(members), tuple(member.tensor for member in members)))
    groups = list(made.values())
    parameters = {position: Parameters(tuple(found)) for position, found in named.items()}
    return TrainingState(groups, list(_ties(layouts, groups))), parameters


def _member(instance: ParameterInstance, layouts: Layouts) -> Member:
    stored, mesh = layouts.stored(instance), layouts.mesh
    extents = [mesh.extent(layouts.sizes[dim], splitting_axes(stored, dim)) for dim in instance.dims]
    return Member(instance.name, instance.dims, stored, tuple(stop - start for start, stop in extents))


def _fill(member: Member, layouts: Layouts, source: Source) -> Tensor:
    whole = source(member.name, tuple(layouts.sizes[dim] for dim in member.dims))
    return local_piece(whole, member.dims, member.stored, layouts.mesh)


def _ties(layouts: Layouts, groups: Sequence[FlatGroup]) -> Iterator[Tie]:
    """Tied parameters that are two copies: on two pipeline ranks, or on one where they lie or sum differently."""
    stage_of = {
        position: stage.pipeline_rank
        for stage in layouts.strategy.stages
        for part in stage.blocks
        for position in range(part.start, part.stop)
    }
    ranks_of: dict[str, set[int]] = {}
    for instance in parameter_instances(layouts.job.graph):
        if instance.tied:
            ranks_of.setdefault(instance.name, set()).add(stage_of[instance.position])
    for name, pipeline_ranks in ranks_of.items():
        mine = [group for group in groups if group.members[0].name == name]
        if len(pipeline_ranks) > 1 and mine:
            assert len(mine) == 1, f"{name} has three copies"
            everyone = layouts.mesh.members((PIPELINE,))
            peers = layouts.mesh.new_group([everyone[rank] for rank in sorted(pipeline_ranks)])
            yield Tie(mine[0], None, peers)
        elif len(mine) > 1:
            yield Tie(mine[0], mine[1], None)


def build_stages(layouts: Layouts, parameters: Mapping[int, Parameters]) -> dict[int, StageModule]:
    """The stages on this rank as modules."""
    graph = layouts.job.graph

    def block_module(position: int) -> BlockModule:
        name = graph.sequence[position]
        entry = layouts.boundary(position - 1) if position else None
        own = tuple(layouts.by_block[name].made[tensor] for tensor in graph.block[name].inputs)
        return BlockModule(layouts.plans[name], parameters[position], None if entry == own else entry)

    names, split = input_names(graph, graph.sequence[0]), splits_backward(layouts.table)
    return {
        index: StageModule([block_module(position) for position in positions], names, index == 0, split)
        for index, positions in layouts.stages.items()
    }


def build_walk(
    layouts: Layouts, stages: Mapping[int, StageModule], dtype: torch.dtype, recorder: Recorder | None = None
) -> Walk:
    """How this rank runs all microbatches of a step."""
    num_tokens = layouts.job.workload.tokens

    def loss_of(losses: Tensor) -> Tensor:
        return losses.to(torch.float64).sum() / num_tokens

    if layouts.strategy.pipeline_size == 1:
        return walk_alone(stages, layouts.row, layouts.num_microbatches, loss_of, recorder)
    boundaries = {index: _boundary_shapes(layouts, index, dtype) for index in stages}
    group = layouts.mesh.group((PIPELINE,))
    return walk_together(stages, boundaries, layouts.table, layouts.num_microbatches, loss_of, group, recorder)


def _boundary_shapes(layouts: Layouts, index: int, dtype: torch.dtype) -> tuple[list[Shape], list[Shape]]:
    """Local shapes of what a stage takes and of what it hands over."""
    graph, positions = layouts.job.graph, layouts.stages[index]
    whole = (layouts.sizes["batch"], layouts.sizes["seq"])
    inputs: list[Shape] = [(whole, torch.int64) for _ in input_names(graph, graph.sequence[0])]
    if positions[0]:
        inputs = _handed_over(layouts, positions[0] - 1, dtype)
    if positions[-1] + 1 < len(graph.sequence):
        return inputs, _handed_over(layouts, positions[-1], dtype)
    made = layouts.by_block[graph.sequence[-1]].made["loss"]
    losses = _local_shape(layouts, graph.block[graph.sequence[-1]].tensor["loss"].dims, made)
    return inputs, [(losses, torch.promote_types(dtype, torch.float32))]


def _handed_over(layouts: Layouts, position: int, dtype: torch.dtype) -> list[Shape]:
    layout = layouts.by_block[layouts.job.graph.sequence[position]]
    return [
        (_local_shape(layouts, layout.block.tensor[name].dims, placements), dtype)
        for name, placements in layout.boundary
    ]


def _local_shape(layouts: Layouts, dims: Sequence[str], placements: Placements) -> tuple[int, ...]:
    extents = [layouts.mesh.extent(layouts.sizes[dim], splitting_axes(placements, dim)) for dim in dims]
    return tuple(stop - start for start, stop in extents)


# --- running --------------------------------------------------------------------------------------------------------


class Rank:
    """One rank's part of a job, ready to take steps. Collective: all ranks of the job build theirs together."""

    def __init__(self, job: Job, rank: int, source: Source | None = None) -> None:
        dtype = DTYPES[job.workload.precision]
        self.job, self.mesh = job, Mesh(job.strategy.mesh, rank, job.timeout_s)
        self.layouts = Layouts(job, self.mesh)
        self.mesh.form_groups(self.layouts.groups())
        self.state, parameters = build_state(self.layouts, source or drawn(job.seed), dtype)
        self.stages = build_stages(self.layouts, parameters)
        self.recorder = Recorder() if job.record else None
        self.walk = build_walk(self.layouts, self.stages, dtype, self.recorder)
        self.data = Data(job.workload, job.graph.dims["vocab"], job.seed, job.tokens)

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is here."""
        return len(self.job.strategy.stages) - 1 in self.stages

    @property
    def leads_its_stage(self) -> bool:
        """Whether this rank speaks for all that hold the same stages."""
        return self.mesh.is_first(axis.name for axis in self.job.strategy.mesh if axis.name != PIPELINE)

    def compute_gradients(self, inputs: Mapping[str, Tensor]) -> float:
        """Forward and backward of a batch; the loss over all ranks where the last stage is, else 0."""
        losses = self.walk(inputs)
        self.state.reduce()
        if not self.has_loss:
            return 0.0
        loss = torch.stack(losses).sum()
        axes = self.layouts.loss_axes
        return float(all_reduce(loss, self.mesh.group(axes)) if self.mesh.degree(axes) > 1 else loss)

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The last block's `logits` of a batch, of a model that is whole on this rank."""
        assert self.job.strategy.num_devices == 1, "a rank with a part of the model has a part of the logits"
        results: tuple[Tensor, ...] = ()
        blocks = [block for _, stage in sorted(self.stages.items()) for block in stage.blocks]
        for block in blocks[:-1]:
            results = block(results, inputs)
        return blocks[-1](results, inputs, keep=("logits",))[-1]

    def whole_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradient of every parameter on this rank's stages, whole; all ranks of the stages must ask together."""
        for group in self.state.groups:
            for member, view in zip(group.members, group.views(group.whole_gradient()), strict=True):
                together = route(member.stored, {}, self.mesh)
                yield member.name, carry_out(view, member.dims, self.layouts.sizes, together, self.mesh)


@dataclass(frozen=True)
class RankWork:
    """What a process of a run does: all steps, and one more for its memory.

    `gradients` is a folder where the gradients of each step are saved, or lie saved to be compared with.
    """

    job: Job
    gradients: Path | None = None
    save: bool = False

    def __call__(self, rank: int, size: int) -> RankReport:
        return run_rank(self.job, rank, self.gradients, self.save)


def run_rank(job: Job, rank: int, gradients: Path | None = None, save: bool = False) -> RankReport:
    """All steps of one rank of a job; see `RankWork`."""
    me = Rank(job, rank)
    losses: list[float] = []
    times_s: list[float] = []
    differences: list[GradientDifference] = []
    ran: tuple[Ran, ...] = ()
    for index in range(job.steps):
        inputs = me.data.inputs(index)
        dist.barrier()
        start_s = time.perf_counter()
        losses.append(me.compute_gradients(inputs))
        reduced_s = time.perf_counter()
        if gradients is not None and save:
            torch.save(dict(me.whole_gradients()), gradients / f"{index}.pt")
        elif gradients is not None:
            differences += _compare(me, torch.load(gradients / f"{index}.pt", mmap=True), index)
        resumed_s = time.perf_counter()
        me.state.step()
        times_s.append(reduced_s - start_s + time.perf_counter() - resumed_s)
        if me.recorder is not None:
            ran = me.recorder.take()
    inputs = me.data.inputs(job.steps - 1)

    def one_more() -> None:
        me.compute_gradients(inputs)
        me.state.step()

    peak = peak_bytes(one_more)
    dist.barrier()
    row = tuple(in_rows_words(ran, me.layouts.row)) if ran and me.leads_its_stage else ()
    return RankReport(rank, tuple(losses) if me.has_loss else (), tuple(times_s), peak, tuple(differences), row)


def _compare(me: Rank, expected: Mapping[str, Tensor], step: int) -> Iterator[GradientDifference]:
    for name, gradient in me.whole_gradients():
        if me.leads_its_stage:
            difference = (gradient - expected[name]).abs().max().item()
            yield GradientDifference(step, name, difference, expected[name].abs().max().item())
