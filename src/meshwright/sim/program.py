"""What each pipeline rank does in a step: the schedule's actions, spelled out as tasks in order.

A rank's program is a list of tasks in the order in which the rank comes to them. A task is *chained* (what comes after
it waits for it) or *beside* (it starts where the chain stands and nothing waits for it but its own stream); its stream
is the device's computation, the communication of one degree, or messages to the next or the previous stage. That is all
that dependencies inside a rank amount to; between ranks there are messages, and the exchange of tied gradients.

The times are those of `cost`: computation with what the host adds, of each transfer the share that the engine exposes
as a chained task, and what it hides beside the computation. So a program is as well calibrated as the closed forms,
and what the simulator adds is when things happen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from meshwright.cost.block import by_root, price_transfer
from meshwright.cost.compute import OperatorPrice
from meshwright.cost.layouts import PricedLayouts, state_bytes
from meshwright.cost.passes import Pass, block_passes, state_moves
from meshwright.schedule import Action, ActionKind
from meshwright.schedule.action import COMPUTE as COMPUTE_ACTIONS
from meshwright.sharding import Phase
from meshwright.strategy import Recompute


class Detail(StrEnum):
    """What a task is: all of a stage's work on a microbatch, that of one block, or one operator."""

    STAGE = "stage"
    BLOCK = "block"
    OPERATOR = "operator"


class Kind(StrEnum):
    """What a device does for a while; the values are the words of legends."""

    FORWARD = "forward"
    BACKWARD = "backward"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"
    COMMUNICATION = "communication"
    OPTIMIZER = "optimizer"
    IDLE = "idle"


#: What an action of a schedule is. OVERLAP_F_B is not here: it is several, each what it is.
KIND_OF_ACTION = {
    ActionKind.F: Kind.FORWARD,
    ActionKind.B: Kind.BACKWARD,
    ActionKind.I: Kind.INPUT_GRADIENT,
    ActionKind.W: Kind.WEIGHT_GRADIENT,
    ActionKind.SEND_F: Kind.COMMUNICATION,
    ActionKind.RECV_F: Kind.COMMUNICATION,
    ActionKind.SEND_B: Kind.COMMUNICATION,
    ActionKind.RECV_B: Kind.COMMUNICATION,
    ActionKind.UNSHARD: Kind.COMMUNICATION,
    ActionKind.RESHARD: Kind.COMMUNICATION,
    ActionKind.REDUCE_GRAD: Kind.COMMUNICATION,
}

#: The stream of a device's computation; the others are degrees, and messages to a pipeline rank.
COMPUTE = "compute"


@dataclass(frozen=True)
class Task:
    """One task of a program: `seconds` on `stream`; `root` is the degree whose group takes part in a collective."""

    stream: str
    seconds: float
    name: str
    kind: Kind
    chained: bool = True
    root: str = ""


def hidden(root: str, seconds: float, name: str) -> Task:
    """What computation hides of a degree's transfers: in a stream of its own, so that it keeps nothing waiting."""
    return Task(f"{root} behind", seconds, name, Kind.COMMUNICATION, chained=False, root=root)


#: Tasks in order, with the action that they belong to (None: what a step needs besides).
Piece = tuple[Action | None, Sequence[Task]]


@dataclass(frozen=True)
class Wait:
    """The task at `position` of a program starts once the task at `of_position` of rank `of_rank`'s has ended."""

    position: int
    of_rank: int
    of_position: int


@dataclass
class Program:
    """What a rank does: runs of tasks, and which of them wait for other ranks; `marks` are the positions at which an
    asynchronous schedule has updated the weights, `last_chained` that of the last task which others wait for."""

    pieces: list[Piece] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    length: int = 0
    last_chained: int = -1

    def add(self, action: Action | None, tasks: Sequence[Task]) -> int:
        """Append a run of tasks; gives the position of its first."""
        start = self.length
        self.pieces.append((action, tasks))
        self.length += len(tasks)
        chained = [index for index, task in enumerate(tasks) if task.chained]
        self.last_chained = start + chained[-1] if chained else self.last_chained
        return start


# --- blocks ----------------------------------------------------------------------------------------------------------


#: The tasks of each block, by the kind of action.
Blocks = Mapping[str, Mapping[ActionKind, tuple[Task, ...]]]


def block_tasks(
    priced: PricedLayouts, states: Mapping[str, Any], recompute: Mapping[str, Recompute], detail: Detail
) -> Blocks:
    """The tasks of every block of a model of one layout (columns of length one)."""
    make = _operators if detail is Detail.OPERATOR else _whole_block
    found = {}
    for name, block in priced.blocks.items():
        passes = block_passes(priced, block, states[name], recompute[name])
        found[name] = {
            kind: tuple(
                _weights(priced, name, passes[1], detail)
                if kind is ActionKind.W
                else make(_work(priced, name, states[name], recompute[name], kind, *passes))
            )
            for kind in COMPUTE_ACTIONS
        }
    return found


@dataclass(frozen=True)
class _Work:
    """A forward, backward or input gradient of a block: seconds of computation with what the host adds, of all
    transfers by degree, and of what is exposed of them."""

    priced: PricedLayouts
    name: str
    recompute: Recompute
    kind: ActionKind
    compute_s: float
    took_s: Mapping[str, float]
    exposed_s: Mapping[str, float]

    def hidden(self) -> Iterator[Task]:
        """What lies beside the computation, no longer than that."""
        for root, seconds in self.took_s.items():
            if (hidden_s := min(seconds - self.exposed_s.get(root, 0.0), self.compute_s)) > 0:
                yield hidden(root, hidden_s, f"{self.name} {root}")


def _work(
    priced: PricedLayouts,
    name: str,
    state: Any,
    recompute: Recompute,
    kind: ActionKind,
    forward: Pass,
    backward: Pass,
) -> _Work:
    of = forward if kind is ActionKind.F else backward
    compute_s = number(of.compute) + number(of.recompute) + number(of.skew) + number(of.launch)
    return _Work(
        priced=priced,
        name=name,
        recompute=recompute,
        kind=kind,
        compute_s=compute_s - (number(backward.weights) if kind is ActionKind.I else 0.0),
        took_s=_took(priced, name, state, recompute, kind),
        exposed_s={root: number(seconds) for root, seconds in sorted(of.exposed.items()) if number(seconds) > 0},
    )


def _weights(priced: PricedLayouts, name: str, backward: Pass, detail: Detail) -> Iterator[Task]:
    """The gradients of a block's weights, operator by operator where asked for, and their accumulation."""
    rest_s = number(backward.weights)
    if detail is Detail.OPERATOR:
        for price in reversed(priced.blocks[name].operators):
            if (seconds := number(price.weight_s)) > 0:
                rest_s -= seconds
                yield Task(COMPUTE, seconds, f"{name}.{price.name}", Kind.WEIGHT_GRADIENT)
    if rest_s > 0:
        told = f"{name} accumulate" if detail is Detail.OPERATOR else name
        yield Task(COMPUTE, rest_s, told, Kind.WEIGHT_GRADIENT)


def _whole_block(work: _Work) -> Iterator[Task]:
    """A block as one task of computation, then what its transfers expose; beside it what they hide."""
    yield from work.hidden()
    yield Task(COMPUTE, work.compute_s, work.name, KIND_OF_ACTION[work.kind])
    for root, seconds in work.exposed_s.items():
        yield Task(root, seconds, f"{work.name} {root}", Kind.COMMUNICATION, root=root)


def _took(priced: PricedLayouts, name: str, state: Any, recompute: Recompute, kind: ActionKind) -> dict[str, float]:
    """Seconds of all transfers of a block's pass, by degree."""
    bytes_ = state_bytes(priced.machine.engine, priced.workload)
    block = priced.blocks[name]
    gathers = state_moves(priced, state.each_use, bytes_.parameter)
    scatters = state_moves(priced, state.each_backward, bytes_.gradient)
    if kind is ActionKind.F:
        moves = [block.forward, gathers]
    else:
        moves = [block.backward, gathers, scatters, *([block.forward] if recompute is Recompute.FULL else [])]
    total: dict[str, float] = {}
    for each in moves:
        for root, seconds in by_root(each.seconds, priced.degrees).items():
            total[root] = total.get(root, 0.0) + number(seconds)
    return {root: seconds for root, seconds in sorted(total.items()) if seconds > 0}


def _operators(work: _Work) -> Iterator[Task]:
    """A block operator by operator, each after the transfers of what it reads; the tasks of a pass take as long
    together as the block does."""
    name, own, block = work.name, KIND_OF_ACTION[work.kind], work.priced.blocks[work.name]
    is_forward = work.kind is ActionKind.F
    yield from work.hidden()
    left_s, spent_s = dict(work.exposed_s), 0.0
    for price in () if is_forward else _recomputed(work):
        spent_s += number(price.forward_s)
        yield Task(COMPUTE, number(price.forward_s), f"{name}.{price.name} again", own)
    phases = (Phase.FORWARD,) if is_forward else (Phase.BACKWARD, Phase.REGATHER)
    moved = list(_transfers(work.priced, name, phases))
    for price in block.operators if is_forward else reversed(block.operators):
        for operator, root, label, took_s in moved:
            if operator == price.name and root in work.exposed_s:
                seconds = work.exposed_s[root] / work.took_s[root] * took_s
                left_s[root] -= seconds
                yield Task(root, seconds, label, Kind.COMMUNICATION, root=root)
        seconds = number(price.forward_s if is_forward else price.backward_s)
        seconds -= number(price.weight_s) if work.kind is ActionKind.I else 0.0
        spent_s += seconds
        if seconds > 0:
            yield Task(COMPUTE, seconds, f"{name}.{price.name}", own)
    for root, seconds in left_s.items():  # state, and what is handed from block to block
        if seconds > 1e-12 * work.took_s[root]:
            yield Task(root, seconds, f"{name} {root}", Kind.COMMUNICATION, root=root)
    if work.compute_s - spent_s > 0:
        yield Task(COMPUTE, work.compute_s - spent_s, f"{name} launch", own)


def _recomputed(work: _Work) -> Iterator[OperatorPrice]:
    """The operators that a backward runs again first."""
    operators = work.priced.layouts[work.name].block.operators
    grouped = {item.name for item in operators if item.recompute_group}
    for price in work.priced.blocks[work.name].operators:
        if work.recompute is Recompute.FULL or (work.recompute is Recompute.SELECTIVE and price.name in grouped):
            yield price


def _transfers(priced: PricedLayouts, name: str, phases: Sequence[Phase]) -> Iterator[tuple[str, str, str, float]]:
    """Operator, degree, label and seconds of each transfer of a block."""
    layout = priced.layouts[name]
    for transfer in layout.transfers:
        if transfer.phase in phases:
            moved = price_transfer(layout, transfer, priced.pricing, priced.machine.levels)
            for root, seconds in by_root({transfer.step.axes: moved.took.seconds}, priced.degrees).items():
                if number(seconds) > 0:
                    label = f"{name}.{transfer.tensor} {transfer.step.collective.value}"
                    yield transfer.operator, root, label, number(seconds)


def number(value: Any) -> float:
    """A column of length one as a number."""
    return float(np.ravel(value)[0])
