"""Forward and backward of all microbatches of a step, in the order of the strategy's table of actions.

Across ranks this is the runtime for tables of `torch.distributed.pipelining`, which adds the sends and receives; on one
rank the table is walked here. The library's classes for single schedules are not used: their tables are ours (tests
compare them), and one path runs named schedules, stages dealt in any order, and tables that a user brings.
Boundary tensors are local pieces of known shape, so the library need not run the model to learn their shapes. How a
backward falls into input and weight gradients is in `later`.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _batch_p2p, _PipelineScheduleRuntime

from meshwright.runtime.later import Work
from meshwright.runtime.modules import StageModule
from meshwright.runtime.record import Recorder
from meshwright.schedule import Action, ActionKind, Table, compute_parts

Inputs = Mapping[str, Tensor]
LossOf = Callable[[Tensor], Tensor]


class Walk(Protocol):
    """Runs forward and backward of one step's batch; gives the loss of each microbatch where the last stage is."""

    def __call__(self, inputs: Inputs) -> list[Tensor]: ...


def splits_backward(table: Table) -> bool:
    """Whether some backward of a table is two actions."""
    return any(action.kind is ActionKind.W for row in table for action in single_actions(row))


def single_actions(row: Sequence[Action]) -> Iterator[Action]:
    """The computations of a row, overlapped ones apart: they run one after the other."""
    return (part for action in row for part in compute_parts(action))


# --- one rank -------------------------------------------------------------------------------------------------------


def walk_alone(
    stages: Mapping[int, StageModule],
    row: Sequence[Action],
    num_microbatches: int,
    loss_of: LossOf,
    recorder: Recorder | None = None,
) -> Walk:
    """Walk a table with all stages on this rank."""

    def walk(inputs: Inputs) -> list[Tensor]:
        pieces = [
            dict(zip(inputs, parts, strict=True))
            for parts in zip(*(x.chunk(num_microbatches) for x in inputs.values()), strict=True)
        ]
        step = _StepAlone(stages, pieces, loss_of)
        for action in single_actions(row):
            if recorder is None:
                step.perform(action)
            else:
                recorder(str(action), partial(step.perform, action))
        return [step.losses[index] for index in range(num_microbatches)]

    return walk


class _StepAlone:
    """One step on one rank: stages are cut from one another, so that each backward is that of its stage alone."""

    def __init__(self, stages: Mapping[int, StageModule], pieces: Sequence[Inputs], loss_of: LossOf) -> None:
        self.stages, self.pieces, self.loss_of = stages, pieces, loss_of
        self.last = max(stages)
        self.losses: dict[int, Tensor] = {}
        self._held: dict[tuple[int, int], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = {}
        self._gradients: dict[tuple[int, int], list[Tensor | None]] = {}
        self._put_off: dict[tuple[int, int], Work] = {}

    def perform(self, action: Action) -> None:
        """Run an action; what it needs has run."""
        assert action.microbatch is not None
        place, later = (action.stage, action.microbatch), self.stages[action.stage].later
        match action.kind:
            case ActionKind.F:
                self._forward(*place)
            case ActionKind.W:
                self._put_off.pop(place)()
            case ActionKind.I | ActionKind.B:
                self._backward(*place)
                if later is not None and action.kind is ActionKind.I:
                    self._put_off[place] = later.take()
                elif later is not None:
                    later.take()()

    def _forward(self, index: int, microbatch: int) -> None:
        stage, piece = self.stages[index], self.pieces[microbatch]
        if stage.is_first:
            given = tuple(piece[name] for name in stage.input_names)
        else:
            _, boundary = self._held[index - 1, microbatch]
            given = tuple(x.detach().requires_grad_() for x in boundary)
        found = stage(*given, **(_without(piece, stage.input_names) if stage.is_first else piece))
        results = found if isinstance(found, tuple) else (found,)
        if index == self.last:
            results = (self.loss_of(*results),)
            self.losses[microbatch] = results[0].detach()
        self._held[index, microbatch] = given, results

    def _backward(self, index: int, microbatch: int) -> None:
        given, results = self._held.pop((index, microbatch))
        gradients = self._gradients.pop((index, microbatch), [None])
        torch.autograd.backward(results, gradients)
        if index > 0:
            self._gradients[index - 1, microbatch] = [x.grad for x in given]


def _without(inputs: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: x for name, x in inputs.items() if name not in names}


# --- several --------------------------------------------------------------------------------------------------------

Shape = tuple[tuple[int, ...], torch.dtype]


def walk_together(
    stages: Mapping[int, StageModule],
    boundaries: Mapping[int, tuple[Sequence[Shape], Sequence[Shape]]],
    table: Table,
    num_microbatches: int,
    loss_of: LossOf,
    group: dist.ProcessGroup,
    recorder: Recorder | None = None,
) -> Walk:
    """Walk this rank's row of a table; `boundaries` are the local shapes of each stage's inputs and outputs."""
    num_stages = 1 + max(action.stage for row in table for action in single_actions(row))
    sends = _Sends(receipts(table, dist.get_rank(group)))
    parts = [
        _Stage(
            module,
            index,
            num_stages,
            torch.device("cpu"),
            sends=sends,
            recorder=recorder,
            input_args=tuple(_example(shape) for shape in boundaries[index][0]),
            output_args=tuple(_example(shape) for shape in boundaries[index][1]),
            group=group,
            dw_builder=None if module.later is None else module.later.take,
        )
        for index, module in sorted(stages.items())
    ]
    schedule = _Runtime(parts, num_microbatches, loss_of, table)
    first = next((module for module in stages.values() if module.is_first), None)

    def walk(inputs: Inputs) -> list[Tensor]:
        taken = first.input_names if first is not None else ()
        losses: list[Tensor] = []
        schedule.step(*(inputs[name] for name in taken), losses=losses, return_outputs=False, **_without(inputs, taken))
        sends.end()
        return losses

    return walk


def _example(shape: Shape) -> Tensor:
    size, dtype = shape
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


class _Runtime(_PipelineScheduleRuntime):
    """The library's runtime for tables. It finds a microbatch's loss by counting, which is wrong where the last stage
    takes microbatches in another order than 0, 1, 2 ...: here they are found by name."""

    def __init__(self, stages: list[_Stage], num_microbatches: int, loss_of: LossOf, table: Table) -> None:
        # Token losses are divided by their number, so gradients are sums already.
        super().__init__(stages, num_microbatches, loss_fn=loss_of, scale_grads=False)
        self._losses: dict[int, Tensor] = {}
        rows = {rank: [_Action.from_str(str(action)) for action in row] for rank, row in enumerate(table)}
        self.pipeline_order = rows
        self._prepare_schedule_with_comms(rows)

    def _maybe_compute_loss(
        self, stage: _Stage, output: Tensor, target_mbs: Any, mb_index: int, loss_kwargs: Any = None
    ) -> None:
        if stage.is_last:
            self._losses[mb_index] = self._loss_fn(output)

    def _maybe_get_loss(self, stage: _Stage, mb_index: int) -> Tensor | None:
        if not stage.is_last:
            return None
        loss, self._losses[mb_index] = self._losses[mb_index], self._losses[mb_index].detach()
        return loss

    def _update_losses(self, stages: Any, losses: list[Tensor]) -> None:
        losses.extend(loss for _, loss in sorted(self._losses.items()))
        self._losses.clear()


class Result(NamedTuple):
    """What a forward or the input side of a backward makes, and may send."""

    stage: int
    is_forward: bool
    microbatch: int


def receipts(table: Table, rank: int) -> dict[Result, list[Result]]:
    """By what a rank makes: which of its earlier results have certainly been received when it starts on that, because
    the message that it needs was sent after their receiver had used them.

    >>> from meshwright.schedule import actions
    >>> found = receipts(actions("1F1B", 2, 1, 3), rank=1)
    >>> found[Result(1, True, 2)]  # 0F2 comes after 0B0, which needs what 1B0 made
    [Result(stage=1, is_forward=False, microbatch=0)]
    """
    rows = [[_result(action) for action in single_actions(row) if action.kind is not ActionKind.W] for row in table]
    place = {result: (at, index) for at, row in enumerate(rows) for index, result in enumerate(row)}
    used: dict[int, deque[tuple[int, Result]]] = defaultdict(deque)
    for at, row in enumerate(rows):
        for index, result in enumerate(row):
            source = _source(result)
            if at != rank and source in place and place[source][0] == rank:
                used[at].append((index, source))
    found: dict[Result, list[Result]] = defaultdict(list)
    for result in rows[rank]:
        sender, sent = place.get(_source(result), (rank, 0))
        while used[sender] and used[sender][0][0] < sent:
            found[result].append(used[sender].popleft()[1])
    return dict(found)


def _result(action: Action) -> Result:
    assert action.microbatch is not None
    return Result(action.stage, action.kind is ActionKind.F, int(action.microbatch))


def _source(result: Result) -> Result:
    return result._replace(stage=result.stage + (-1 if result.is_forward else 1))


class _Sends:
    """Sends under way. The library's runtime keeps them all until the step ends, and with them their tensors, so that
    1F1B would hold a boundary for every microbatch; here each goes as soon as it is known to have been received."""

    def __init__(self, received: Mapping[Result, Sequence[Result]]) -> None:
        self._received = received
        self._under_way: dict[Result, list[dist.Work]] = {}

    def send(self, result: Result, messages: list[dist.P2POp]) -> list[dist.P2POp]:
        """Send now; gives what is left for the library to send: nothing."""
        self._under_way[result] = _batch_p2p(messages)
        return []

    def starts(self, result: Result) -> None:
        """Let go what has been received, now that what `result` needs is here."""
        for sent in self._received.get(result, ()):
            self._wait(sent)

    def end(self) -> None:
        """Wait for the sends that nothing has proven."""
        for sent in list(self._under_way):
            self._wait(sent)

    def _wait(self, sent: Result) -> None:
        for work in self._under_way.pop(sent):
            work.wait()


class _Stage(PipelineStage):
    """The library's stage, with sends of our own and a recorder that may watch: when it is asked to compute, the
    messages that it needs have arrived."""

    def __init__(self, *args: Any, sends: _Sends, recorder: Recorder | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sends, self._recorder = sends, recorder

    def _do(self, kind: str, microbatch: int, work: Callable[[], Any]) -> Any:
        if kind != "W":
            self._sends.starts(Result(self.stage_index, kind == "F", microbatch))
        return work() if self._recorder is None else self._recorder(f"{self.stage_index}{kind}{microbatch}", work)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        result = Result(self.stage_index, True, fwd_chunk_id)
        return self._sends.send(result, super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        result = Result(self.stage_index, False, bwd_chunk_id)
        return self._sends.send(result, super().get_bwd_send_ops(bwd_chunk_id))

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        work = super().forward_one_chunk
        return self._do("F", fwd_chunk_id, lambda: work(fwd_chunk_id, *args, **kwargs))

    def backward_one_chunk(self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, **kwargs: Any) -> Any:
        work, kind = super().backward_one_chunk, "B" if full_backward else "I"
        return self._do(kind, bwd_chunk_id, lambda: work(bwd_chunk_id, loss, full_backward, **kwargs))

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        work = super().backward_weight_one_chunk
        return self._do("W", bwd_chunk_id, lambda: work(bwd_chunk_id, *args, **kwargs))
