"""A strategy at the level of operators, priced: every operator, every redistribution, everything that is held.

`moved` says of each block what lies where, which collectives lie between and what each costs; a drawing of a plan is a
drawing of that. `estimate_placed` sums it up. Nothing overlaps: a step is the sum of its operators, its redistributions
and the optimizer's update, so that a plan is never praised for what an engine may hide. Left out besides: host
launches, stragglers, an engine's habits in memory but for what it reserves.

Memory is that of the moment that needs most (see `lifetimes`): parameters, gradients and optimizer state always, what
lies at rest or waits for its reader as long as it is needed, and what the operator of that moment has at hand, its
gathered copies among it. Operands are counted there even if an operator reads them in place, so the peak is too high by
at most the operands of one operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.analytic import memory_reasons
from meshwright.cost.block import attributed, price_step
from meshwright.cost.compute import Pricing, precision_assumptions
from meshwright.cost.layouts import Machine, StateBytes, end_blocks, machine_of, state_bytes
from meshwright.cost.lifetimes import Held, Kept, Part, lifetimes
from meshwright.cost.operators import (
    Seconds,
    has_backward,
    placed_pricing,
    reads_again,
    seconds_of,
    update_seconds,
)
from meshwright.cost.step import utilisation
from meshwright.engine import Engine
from meshwright.graph import Block, Graph, Operator, Role, Tensor, operator_flops
from meshwright.results import Estimate
from meshwright.sharding import (
    FREE,
    PARTIAL,
    REPLICATE,
    OperatorLayout,
    Phase,
    Placements,
    Rest,
    Split,
    Step,
    at_rest,
    gradient_placements,
    hubs,
    lay_out_operator,
    local_size,
    redistribution,
    rest_key,
    state_key,
    wanted_gradient,
)
from meshwright.strategy import Recompute, Strategy
from meshwright.workload import Workload


@dataclass(frozen=True)
class MovedStep:
    """One collective: the local size of the larger side, the bytes that each rank sends, and the seconds."""

    step: Step
    size_bytes: float
    sent_bytes: float
    seconds: float


@dataclass(frozen=True)
class Move:
    """A tensor, or its gradient, brought from one placement to another: for `operator`, which reads or made it (empty:
    for the optimizer's update)."""

    tensor: str
    operator: str
    phase: Phase
    source: Placements
    target: Placements
    steps: tuple[MovedStep, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(step.seconds for step in self.steps)


@dataclass(frozen=True)
class PlacedTensor:
    """A tensor under a placement: its dims in order with their sizes on a rank."""

    tensor: str
    placements: Placements
    local_shape: tuple[int | float, ...]


@dataclass(frozen=True)
class PlacedOperator:
    """An operator under its split, what it takes, what it makes, how long it runs, and whether it does so again in the
    backward."""

    operator: str
    split: Split
    inputs: tuple[PlacedTensor, ...]
    outputs: tuple[PlacedTensor, ...]
    seconds: Seconds
    is_rerun: bool = False


@dataclass(frozen=True)
class PlacedBlock:
    """One instance of a block: its operators, its tensors at rest (those that are counted: of tied parameters the
    owner's), and all moves in order: forward, backward, update."""

    block: Block
    count: int
    operators: tuple[PlacedOperator, ...]
    resting: tuple[PlacedTensor, ...]
    moves: tuple[Move, ...]
    update_s: float


@dataclass(frozen=True)
class PlacedStep:
    """All blocks of a strategy at the level of operators, and what is held at the moment that needs most."""

    blocks: tuple[PlacedBlock, ...]
    time: dict[str, float]
    memory: dict[str, float]
    communication: dict[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return sum(self.time.values())

    @property
    def peak_bytes(self) -> float:
        """Bytes of the moment that needs most."""
        return sum(self.memory.values())


def moved(graph: Graph, strategy: Strategy, machine: Machine, workload: Workload) -> PlacedStep:
    """What a legal strategy of one stage at the level of operators moves, takes and holds."""
    return _Evaluation(graph, strategy, machine, workload).step()


def estimate_placed(graph: Graph, cluster: Cluster, strategy: Strategy, workload: Workload, engine: Engine) -> Estimate:
    """Predict one step of a legal strategy at the level of operators."""
    machine = machine_of(cluster, engine, workload)
    return placed_estimate(graph, cluster, strategy, workload, engine, moved(graph, strategy, machine, workload))


def placed_estimate(
    graph: Graph, cluster: Cluster, strategy: Strategy, workload: Workload, engine: Engine, step: PlacedStep
) -> Estimate:
    """A priced step as an estimate."""
    device = cluster.slowest_device
    step_s, peak = step.seconds, step.peak_bytes
    reasons = memory_reasons(step.memory, peak, 0, cluster)
    rates = machine_of(cluster, engine, workload).rates
    none = {block.name: Recompute.NONE for block in graph.blocks}
    peak_flops = rates.peak_flops * strategy.num_devices * step_s
    mfu, _ = utilisation(graph, workload, none, peak_flops)
    return Estimate(
        feasible=not reasons,
        reasons=reasons,
        step_time_s=step_s,
        time=step.time,
        memory=step.memory,
        peak_memory_bytes=peak,
        mfu=mfu,
        hfu=mfu + _rerun_flops(graph, workload, step) / peak_flops,
        bubble_fraction=0.0,
        communication=step.communication,
        tokens_per_s=workload.tokens / step_s,
        assumptions=(
            *precision_assumptions(device, workload),
            "nothing overlaps: a step is the sum of its operators, its redistributions and the update",
        ),
    )


def _rerun_flops(graph: Graph, workload: Workload, step: PlacedStep) -> float:
    """FLOPs of contractions that the backward of a step computes again."""
    sizes = graph.sizes(workload.global_batch, workload.seq_len)
    total = 0.0
    for placed in step.blocks:
        for operator, each in zip(placed.block.operators, placed.operators, strict=True):
            if each.is_rerun:
                total += placed.count * operator_flops(operator, placed.block.dim_aliases(operator), sizes)
    return total


class _Evaluation:
    """One strategy while it is evaluated."""

    def __init__(self, graph: Graph, strategy: Strategy, machine: Machine, workload: Workload) -> None:
        self.graph, self.strategy, self.machine, self.workload = graph, strategy, machine, workload
        self.degrees = {axis.name: axis.size for axis in strategy.mesh if axis.size > 1}
        self.order = tuple(self.degrees)
        sizes = graph.sizes(workload.global_batch, workload.seq_len)
        self.pricing: Pricing = placed_pricing(machine, workload, sizes, self.degrees)
        self.state: StateBytes = state_bytes(machine.engine, workload)
        self.ends = end_blocks(graph)
        self.borrowed = {other for _, other in graph.tied}
        self._layouts: dict[tuple[str, str], OperatorLayout] = {}

    def step(self) -> PlacedStep:
        blocks = tuple(self._block(block) for block in self.graph.blocks)
        time: dict[str, float] = {
            "compute": 0.0,
            "recompute": 0.0,
            **{f"exposed_{axis}": 0.0 for axis in self.order},
            "optimizer": 0.0,
        }
        sent = dict.fromkeys(self.order, 0.0)
        for placed in blocks:
            time["compute"] += placed.count * sum(
                each.seconds.forward + each.seconds.backward for each in placed.operators
            )
            time["recompute"] += placed.count * sum(each.seconds.forward for each in placed.operators if each.is_rerun)
            time["optimizer"] += placed.count * placed.update_s
            for move in placed.moves:
                for each in move.steps:
                    for axis, share in attributed(each.step.axes, self.degrees).items():
                        time[f"exposed_{axis}"] += placed.count * float(share) * each.seconds
                        sent[axis] += placed.count * float(share) * each.sent_bytes
        return PlacedStep(blocks, time, self._memory(blocks), sent)

    # --- one block

    def _split(self, block: Block, key: str) -> dict[str, str]:
        split = self.strategy.splits[block.name][key]
        return {axis: dim for axis, dim in split.items() if axis in self.degrees}

    def _layout(self, block: Block, operator: Operator) -> OperatorLayout:
        key = block.name, operator.name
        if key not in self._layouts:
            self._layouts[key] = lay_out_operator(block, operator, self._split(block, operator.name))
        return self._layouts[key]

    def _runs_again(self, block: Block, operator: Operator) -> bool:
        return not set(self.strategy.recomputed.get(block.name, ())).isdisjoint(operator.outputs)

    def _rest(self, block: Block, name: str) -> Rest:
        return at_rest(self._split(block, rest_key(block, name)))

    def _state(self, block: Block, name: str) -> Placements:
        if state_key(name) in self.strategy.splits[block.name]:
            return at_rest(self._split(block, state_key(name))).value
        return self._rest(block, name).value

    def _block(self, block: Block) -> PlacedBlock:
        layouts = {operator.name: self._layout(block, operator) for operator in block.operators}
        resting = {name: self._rest(block, name) for name in (*hubs(block), *(each.name for each in block.parameters))}
        seconds = {
            name: seconds_of(block, layout, self.pricing, self.machine.levels, is_end=block.name in self.ends)
            for name, layout in layouts.items()
        }
        owned = [each for each in block.parameters if f"{block.name}/{each.name}" not in self.borrowed]
        moves = [
            *self._forward(block, layouts, resting),
            *self._backward(block, layouts, resting),
            *(move for tensor in owned if tensor.differentiable for move in self._updates(block, tensor)),
        ]
        update_s = sum(
            update_seconds(self.machine, self.state, self._local(tensor, self._state(block, tensor.name)))
            for tensor in owned
            if tensor.differentiable
        )
        return PlacedBlock(
            block,
            self.graph.counts[block.name],
            tuple(self._placed(block, layouts[each.name], seconds[each.name]) for each in block.operators),
            tuple(
                self._shown(block, name, rest.value)
                for name, rest in resting.items()
                if f"{block.name}/{name}" not in self.borrowed
            ),
            tuple(move for move in moves if move.source != move.target),
            update_s,
        )

    def _placed(self, block: Block, layout: OperatorLayout, seconds: Seconds) -> PlacedOperator:
        inputs = zip(layout.operator.inputs, layout.inputs, strict=True)
        outputs = zip(layout.operator.outputs, layout.outputs, strict=True)
        return PlacedOperator(
            layout.operator.name,
            layout.split,
            tuple(self._shown(block, *each) for each in inputs),
            tuple(self._shown(block, *each) for each in outputs),
            Seconds(float(seconds.forward), float(seconds.backward)),
            self._runs_again(block, layout.operator),
        )

    def _shown(self, block: Block, name: str, placements: Placements) -> PlacedTensor:
        sizes = self.pricing.extents.sizes
        shape = tuple(local_size(dim, placements, sizes, self.degrees) for dim in block.tensor[name].dims)
        return PlacedTensor(name, placements, shape)

    def _forward(
        self, block: Block, layouts: Mapping[str, OperatorLayout], resting: Mapping[str, Rest]
    ) -> Iterator[Move]:
        made: dict[str, Placements] = {}
        for operator, layout in ((layouts[each.name].operator, layouts[each.name]) for each in block.operators):
            for name, taken in zip(operator.inputs, layout.inputs, strict=True):
                if block.tensor[name].role in (Role.PARAMETER, Role.ACTIVATION):
                    source = resting[name].value if name in resting else made[name]
                    yield self._move(block.tensor[name], operator, Phase.FORWARD, source, taken)
            for name, lies in zip(operator.outputs, layout.outputs, strict=True):
                made[name] = lies
                if name in resting:
                    yield self._move(block.tensor[name], operator, Phase.FORWARD, lies, resting[name].value)

    def _backward(
        self, block: Block, layouts: Mapping[str, OperatorLayout], resting: Mapping[str, Rest]
    ) -> Iterator[Move]:
        made = {
            name: lies
            for layout in layouts.values()
            for name, lies in zip(layout.operator.outputs, layout.outputs, strict=True)
        }
        for operator in block.operators:
            if self._runs_again(block, operator):
                yield from self._rerun(block, operator, layouts[operator.name], resting, made)
        for operator in reversed(block.operators):
            layout = layouts[operator.name]
            for name, lies in zip(operator.outputs, layout.outputs, strict=True):
                tensor = block.tensor[name]
                if name in resting and tensor.differentiable:
                    back = wanted_gradient(lies)
                    yield self._move(tensor, operator, Phase.BACKWARD, resting[name].gradient, back)
                if name in resting and name in operator.saves:
                    read = {axis: placement for axis, placement in lies.items() if placement != PARTIAL}
                    yield self._move(tensor, operator, Phase.REGATHER, resting[name].value, read)
            for name, taken in zip(operator.inputs, layout.inputs, strict=True):
                tensor = block.tensor[name]
                if tensor.role not in (Role.PARAMETER, Role.ACTIVATION):
                    continue
                is_read = (
                    reads_again(block, operator, name) if tensor.role is Role.PARAMETER else name in operator.saves
                )
                if is_read and not self._runs_again(block, operator):
                    yield self._move(tensor, operator, Phase.REGATHER, resting[name].value, taken)
                if tensor.differentiable and has_backward(block, operator):
                    given = gradient_placements(taken, layout.split)
                    target = resting[name].gradient if name in resting else wanted_gradient(made[name])
                    yield self._move(tensor, operator, Phase.BACKWARD, given, target, is_gradient=True)

    def _rerun(
        self,
        block: Block,
        operator: Operator,
        layout: OperatorLayout,
        resting: Mapping[str, Rest],
        made: Mapping[str, Placements],
    ) -> Iterator[Move]:
        """What an operator takes and makes once more in the backward; its own backward has its operands from there."""
        for name, taken in zip(operator.inputs, layout.inputs, strict=True):
            if block.tensor[name].role in (Role.PARAMETER, Role.ACTIVATION):
                source = resting[name].value if name in resting else made[name]
                yield self._move(block.tensor[name], operator, Phase.REGATHER, source, taken)
        for name, lies in zip(operator.outputs, layout.outputs, strict=True):
            if name in resting:
                yield self._move(block.tensor[name], operator, Phase.REGATHER, lies, resting[name].value)

    def _updates(self, block: Block, tensor: Tensor) -> Iterator[Move]:
        rest, state = self._rest(block, tensor.name), self._state(block, tensor.name)
        yield self._move(tensor, None, Phase.UPDATE, rest.gradient, state, is_gradient=True)
        yield self._move(tensor, None, Phase.UPDATE, state, rest.value)

    def _move(
        self,
        tensor: Tensor,
        operator: Operator | None,
        phase: Phase,
        source: Placements,
        target: Placements,
        *,
        is_gradient: bool = False,
    ) -> Move:
        steps = []
        for step in redistribution(source, target, self.order) if self.order else ():
            size = self._size(tensor, step.larger, is_gradient=is_gradient)
            if step.collective in FREE:
                steps.append(MovedStep(step, size, 0.0, 0.0))
            else:
                price = price_step(step, size, self.pricing, self.machine.levels)
                steps.append(MovedStep(step, size, float(price.bytes), float(price.took.seconds)))
        named = "" if operator is None else operator.name
        return Move(tensor.name, named, phase, _plain(source), _plain(target), tuple(steps))

    def _local(self, tensor: Tensor, placements: Placements) -> float:
        return float(self.pricing.extents.numel(tensor.dims, placements))

    def _size(self, tensor: Tensor, placements: Placements, *, is_gradient: bool = False) -> float:
        """Local bytes; gradients of parameters are in the type in which they are accumulated."""
        if is_gradient and tensor.role is Role.PARAMETER:
            return self._local(tensor, placements) * self.state.gradient
        return self._local(tensor, placements) * self.workload.bytes_of(tensor.dtype)

    # --- memory

    def _memory(self, blocks: Sequence[PlacedBlock]) -> dict[str, float]:
        always: defaultdict[str, float] = defaultdict(float)
        for placed in blocks:
            for category, amount in self._state_memory(placed.block).items():
                always[category] += placed.count * amount
        always["reserved"] += self.machine.engine.memory.reserved_bytes
        lives = lifetimes(self.graph, with_recompute=bool(self.strategy.recomputed))
        over_time = {name: np.zeros(max(lives.num_times, 1)) for name in ("activations", "gradients", "working_set")}
        for held in lives.held:
            block = self.graph.block[held.block]
            if held.kept is not Kept.EITHER and self._is_made_again(block, held) != (held.kept is Kept.REMADE):
                continue
            over_time[_CATEGORY[held.part]][held.start : held.stop] += held.count * self._held_bytes(block, held)
        worst = int(np.sum(list(over_time.values()), axis=0).argmax())
        memory = dict(always)
        for name, column in over_time.items():
            memory[name] = memory.get(name, 0.0) + float(column[worst])
        return memory

    def _is_made_again(self, block: Block, held: Held) -> bool:
        if held.part is Part.FORWARD:
            return self._runs_again(block, next(each for each in block.operators if each.name == held.name))
        return held.name in self.strategy.recomputed.get(block.name, ())

    def _state_memory(self, block: Block) -> dict[str, float]:
        found = {"parameters": 0.0, "gradients": 0.0, "optimizer": 0.0, "inputs": 0.0}
        for tensor in block.parameters:
            if f"{block.name}/{tensor.name}" not in self.borrowed:
                found["parameters"] += self._size(tensor, self._rest(block, tensor.name).value)
                if tensor.differentiable:
                    held = self._local(tensor, self._state(block, tensor.name))
                    found["gradients"] += held * self.state.gradient
                    found["optimizer"] += held * self.state.optimizer
        seen = set()
        for operator in block.operators:
            for name, taken in zip(operator.inputs, self._layout(block, operator).inputs, strict=True):
                if block.tensor[name].role is Role.INPUT and name not in seen:
                    seen.add(name)
                    found["inputs"] += self._size(block.tensor[name], taken)
        for tensor in block.tensors:
            if tensor.role is Role.BUFFER:
                found["inputs"] += self._size(tensor, {})
        return found

    def _held_bytes(self, block: Block, held: Held) -> float:
        match held.part:
            case Part.REST:
                return self._size(block.tensor[held.name], self._rest(block, held.name).value)
            case Part.REST_GRADIENT:
                return self._size(block.tensor[held.name], self._rest(block, held.name).gradient)
            case Part.MADE | Part.MADE_GRADIENT:
                return self._size(block.tensor[held.name], self._made(block, held.name))
            case Part.FORWARD:
                return self._forward_bytes(block, held.name)
            case Part.BACKWARD:
                return self._backward_bytes(block, held.name)

    def _made(self, block: Block, name: str) -> Placements:
        operator = next(each for each in block.operators if name in each.outputs)
        return self._layout(block, operator).outputs[operator.outputs.index(name)]

    def _forward_bytes(self, block: Block, name: str) -> float:
        layout = self._layout(block, next(each for each in block.operators if each.name == name))
        named = zip((*layout.operator.inputs, *layout.operator.outputs), (*layout.inputs, *layout.outputs), strict=True)
        return sum(self._size(block.tensor[each], lies) for each, lies in named)

    def _backward_bytes(self, block: Block, name: str) -> float:
        operator = next(each for each in block.operators if each.name == name)
        layout, total = self._layout(block, operator), 0.0
        if not has_backward(block, operator):
            return 0.0
        for each, lies in zip(operator.inputs, layout.inputs, strict=True):
            tensor = block.tensor[each]
            if each in operator.saves or reads_again(block, operator, each):
                total += self._size(tensor, lies)
            if tensor.differentiable and tensor.role in (Role.PARAMETER, Role.ACTIVATION):
                total += self._size(tensor, gradient_placements(lies, layout.split), is_gradient=True)
        for each, lies in zip(operator.outputs, layout.outputs, strict=True):
            total += self._size(block.tensor[each], lies) * (each in operator.saves)
            total += self._size(block.tensor[each], wanted_gradient(lies)) * block.tensor[each].differentiable
        return total


_CATEGORY = {
    Part.REST: "activations",
    Part.MADE: "activations",
    Part.REST_GRADIENT: "working_set",
    Part.MADE_GRADIENT: "working_set",
    Part.FORWARD: "working_set",
    Part.BACKWARD: "working_set",
}


def _plain(placements: Placements) -> dict[str, Any]:
    return {axis: placement for axis, placement in placements.items() if placement != REPLICATE}
