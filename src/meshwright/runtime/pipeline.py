"""Forward and backward of all microbatches of a step, in the order of the strategy's schedule.

Across ranks this is `torch.distributed.pipelining` as it is: `ScheduleGPipe`, `Schedule1F1B`,
`ScheduleInterleaved1F1B`, and where a class refuses (1F1B with fewer microbatches than stages) or stages are dealt to
ranks in another order than its own, our table of actions on the library's runtime for tables. On one rank the same
table is walked here.
Boundary tensors are local pieces of known shape, so the library need not run the model to learn their shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import _Action, _PipelineScheduleRuntime

from meshwright.runtime.modules import StageModule
from meshwright.schedule import Action, ActionKind, Table, actions
from meshwright.strategy import Strategy

Inputs = Mapping[str, Tensor]


class Walk(Protocol):
    """Runs forward and backward of one step's batch; gives the loss of each microbatch where the last stage is."""

    def __call__(self, inputs: Inputs) -> list[Tensor]: ...


def strategy_table(strategy: Strategy, num_microbatches: int) -> Table:
    """The actions of each pipeline rank; where stages lie in another order than the schedule's, so do its rows."""
    table = actions(strategy.schedule, strategy.pipeline_size, strategy.virtual_stages, num_microbatches)
    rows: dict[int, tuple[Action, ...]] = {strategy.stages[row[0].stage].pipeline_rank: row for row in table}
    return tuple(rows[rank] for rank in range(strategy.pipeline_size))


def is_dealt_in_order(strategy: Strategy) -> bool:
    """Whether stage i lies on pipeline rank i modulo their number, as the library's schedules have it."""
    size = strategy.pipeline_size
    return all(stage.pipeline_rank == index % size for index, stage in enumerate(strategy.stages))


# --- one rank -------------------------------------------------------------------------------------------------------


def walk_alone(
    stages: Mapping[int, StageModule], row: Sequence[Action], num_microbatches: int, loss_of: Callable[[Tensor], Tensor]
) -> Walk:
    """Walk a table with all stages on this rank; a microbatch's backward runs through all of them at once."""
    last = max(stages)

    def walk(inputs: Inputs) -> list[Tensor]:
        pieces = [
            dict(zip(inputs, parts, strict=True))
            for parts in zip(*(x.chunk(num_microbatches) for x in inputs.values()), strict=True)
        ]
        between: dict[int, tuple[Tensor, ...]] = {}
        losses: dict[int, Tensor] = {}
        for action in row:
            stage, microbatch = stages[action.stage], action.microbatch
            if action.kind is ActionKind.F:
                boundary = between.pop(microbatch, ())
                given = pieces[microbatch] if not stage.is_first else _without(pieces[microbatch], stage.input_names)
                first = tuple(pieces[microbatch][name] for name in stage.input_names) if stage.is_first else boundary
                result = stage(*first, **given)
                if action.stage == last:
                    losses[microbatch] = loss_of(result)
                else:
                    between[microbatch] = result if isinstance(result, tuple) else (result,)
            elif action.stage == last:
                losses[microbatch].backward()
                losses[microbatch] = losses[microbatch].detach()
        return [losses[index] for index in range(num_microbatches)]

    return walk


def _without(inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name not in names}


# --- several --------------------------------------------------------------------------------------------------------

Shape = tuple[tuple[int, ...], torch.dtype]


def walk_together(
    stages: Mapping[int, StageModule],
    boundaries: Mapping[int, tuple[Sequence[Shape], Sequence[Shape]]],
    strategy: Strategy,
    num_microbatches: int,
    loss_of: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup,
) -> Walk:
    """Walk this rank's part of a pipeline; `boundaries` are the local shapes of each stage's inputs and outputs."""
    parts = [
        PipelineStage(
            module,
            index,
            len(strategy.stages),
            torch.device("cpu"),
            input_args=tuple(_example(shape) for shape in boundaries[index][0]),
            output_args=tuple(_example(shape) for shape in boundaries[index][1]),
            group=group,
        )
        for index, module in sorted(stages.items())
    ]
    schedule = _schedule(parts, strategy, num_microbatches, loss_of)
    is_last = any(part.is_last for part in parts)
    first = next((module for module in stages.values() if module.is_first), None)

    def walk(inputs: Inputs) -> list[Tensor]:
        losses: list[Tensor] = []
        taken = first.input_names if first is not None else ()
        schedule.step(
            *(inputs[name] for name in taken),
            target=torch.zeros(num_microbatches) if is_last else None,
            losses=losses if is_last else None,
            return_outputs=False,
            **_without(inputs, taken),
        )
        return [loss.detach() for loss in losses]

    return walk


def _example(shape: Shape) -> Tensor:
    size, dtype = shape
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def _schedule(
    parts: Sequence[PipelineStage], strategy: Strategy, num_microbatches: int, loss_of: Callable[[Tensor], Tensor]
) -> PipelineScheduleLike:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return loss_of(output)

    common = {"loss_fn": loss_fn, "scale_grads": False}  # token losses are divided by their number: sums are right
    in_order = is_dealt_in_order(strategy)
    enough = num_microbatches >= len(strategy.stages)
    schedule: PipelineScheduleLike
    if strategy.schedule == "GPipe" and in_order:
        schedule = ScheduleGPipe(parts[0], num_microbatches, **common)
    elif strategy.schedule == "1F1B" and in_order and enough:
        schedule = Schedule1F1B(parts[0], num_microbatches, **common)
    elif strategy.schedule == "Interleaved1F1B" and in_order and len(parts) > 1:
        schedule = ScheduleInterleaved1F1B(list(parts), num_microbatches, **common)
    else:
        runtime = _PipelineScheduleRuntime(list(parts), num_microbatches, **common)
        table = strategy_table(strategy, num_microbatches)
        rows = {rank: [_Action.from_str(str(action)) for action in row] for rank, row in enumerate(table)}
        runtime.pipeline_order = rows
        runtime._prepare_schedule_with_comms(rows)
        schedule = runtime
    return schedule


class PipelineScheduleLike(Protocol):
    """The one method of the library's schedules that is used here."""

    def step(self, *args: Tensor, **kwargs: object) -> object: ...
