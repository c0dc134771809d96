"""Blocks and stages as modules: the operators of a block one by one, on local tensors, under its layout.

What differs between strategies is prepared once per distinct block (`BlockPlan`): which redistributions its operators
need, shared as `sharding.lay_out` shares them, and which operators are recomputed together. A `BlockModule` is one
instance of a block with the parameters it borrows from the training state; a `StageModule` is a run of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meshwright.graph import Block, Graph, Role
from meshwright.runtime.collectives import Move, carry_out, route
from meshwright.runtime.kernels import Local, kernel_groups, run_kernel
from meshwright.runtime.later import Later, Place, can_wait, multiply_later
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.state import Parameters
from meshwright.sharding import BlockLayout, OperatorLayout, Placements, gradient_placements, wanted_gradient
from meshwright.strategy import Recompute

Slot = tuple[int, int]  # which move, which of its copies


@dataclass(frozen=True)
class Call:
    """An operator, where its operands lie, and for each operand the move's copy that it takes (None: as it is)."""

    layout: OperatorLayout
    local: Local
    slots: tuple[Slot | None, ...]

    @cached_property
    def weight(self) -> int | None:
        """Which operand is a weight whose gradient can wait."""
        weights = [index for index, slot in enumerate(self.slots) if slot is None]
        return weights[0] if len(weights) == 1 and can_wait(self.local.operator) else None


@dataclass(frozen=True)
class BlockPlan:
    """All that a layout means for execution, the same for every instance of the block."""

    layout: BlockLayout
    mesh: Mesh
    sizes: Mapping[str, int]
    moves: tuple[Move, ...]
    segments: tuple[tuple[bool, tuple[Call, ...]], ...]
    exits: tuple[Slot, ...]
    recompute: Recompute

    @property
    def block(self) -> Block:
        """The block that is laid out."""
        return self.layout.block

    @cached_property
    def groups(self) -> frozenset[tuple[str, ...]]:
        """The sets of axes over which this block talks."""
        routes = [way for move in self.moves for way in (move.forward, *move.backward)]
        asked = {axes for way in routes for axes in way.groups}
        kernels = {axes for _, calls in self.segments for call in calls for axes in kernel_groups(call.local)}
        return frozenset(asked | kernels)


def plan_block(layout: BlockLayout, mesh: Mesh, sizes: Mapping[str, int], recompute: Recompute) -> BlockPlan:
    """Prepare a block; `sizes` are whole sizes, of one microbatch of all data-parallel ranks."""
    uses = _Uses(layout, mesh)
    calls = []
    for operator_layout in layout.operators:
        operator = operator_layout.operator
        aliases = layout.block.dim_aliases(operator)
        local = Local(operator, operator_layout.split, {dim: sizes[aliases[dim]] for dim in operator.dims}, mesh)
        slots = tuple(
            uses.slot(name, placements, gradient_placements(placements, operator_layout.split))
            for name, placements in zip(operator.inputs, operator_layout.inputs, strict=True)
        )
        calls.append(Call(operator_layout, local, slots))
    exits = []
    for name, placements in layout.boundary:
        slot = uses.slot(name, placements, placements)
        assert slot is not None
        exits.append(slot)
    selective = recompute is Recompute.SELECTIVE
    segments = tuple(
        (bool(group), tuple(members))
        for group, members in groupby(calls, lambda call: call.layout.operator.recompute_group if selective else "")
    )
    return BlockPlan(layout, mesh, dict(sizes), uses.moves(), segments, tuple(exits), recompute)


class _Uses:
    """Collects who takes which tensor how: one move per tensor and placement, one copy of it per gradient placement."""

    def __init__(self, layout: BlockLayout, mesh: Mesh) -> None:
        self.layout, self.mesh = layout, mesh
        self._found: list[tuple[str, Placements, list[Placements]]] = []

    def slot(self, name: str, value: Placements, gradient: Placements) -> Slot | None:
        """The copy to take; None for a parameter, which lies where it is used."""
        tensor = self.layout.block.tensor[name]
        if tensor.role is Role.PARAMETER:
            assert self.layout.made[name] == value, f"{name} is used under two placements"
            return None
        for index, (other, placements, gradients) in enumerate(self._found):
            if other == name and placements == value:
                if gradient not in gradients:
                    gradients.append(gradient)
                return index, gradients.index(gradient)
        self._found.append((name, value, [gradient]))
        return len(self._found) - 1, 0

    def moves(self) -> tuple[Move, ...]:
        """The moves, in the order of their first use."""
        return tuple(
            Move(
                tensor=name,
                dims=self.layout.block.tensor[name].dims,
                forward=route(self.layout.made[name], value, self.mesh),
                backward=tuple(
                    route(gradient, wanted_gradient(self.layout.made[name]), self.mesh) for gradient in gradients
                ),
            )
            for name, value, gradients in self._found
        )


Values = dict[str, Tensor | None]
Copies = dict[int, tuple[Tensor, ...]]


class BlockModule(nn.Module):
    """One instance of a block. `forward` takes its boundary tensors and the model's inputs, all of a microbatch."""

    def __init__(self, plan: BlockPlan, parameters: Parameters, entry: tuple[Placements, ...] | None = None) -> None:
        """`entry` is the placement in which the block before hands over, where it is another than this block's own."""
        super().__init__()
        self.plan, self.parameters_of_block = plan, parameters
        self.later: Later | None = None
        self.entry = [
            Move(
                tensor=name,
                dims=plan.block.tensor[name].dims,
                forward=route(source, plan.layout.made[name], plan.mesh),
                backward=(route(wanted_gradient(plan.layout.made[name]), wanted_gradient(source), plan.mesh),),
            )
            for name, source in zip(plan.block.inputs, entry or (), strict=entry is not None)
        ]

    def forward(
        self, boundary: Sequence[Tensor], inputs: Mapping[str, Tensor], keep: Sequence[str] = ()
    ) -> tuple[Tensor, ...]:
        """The block's outputs or, of the last block, its losses; and behind them the tensors named in `keep`."""
        if self.entry:
            moved = zip(self.entry, boundary, strict=True)
            boundary = [move(x, self.plan.sizes, self.plan.mesh)[0] for move, x in moved]
        if self.plan.recompute is Recompute.FULL and torch.is_grad_enabled():
            run = checkpoint(self._run, inputs, keep, *boundary, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(run, tuple)
            return run
        with self.parameters_of_block.gathered_again_in_backward():
            return self._run(inputs, keep, *boundary)

    def _run(self, inputs: Mapping[str, Tensor], keep: Sequence[str], *boundary: Tensor) -> tuple[Tensor, ...]:
        plan = self.plan
        values: Values = {}
        places: Mapping[str, Place] = {}
        if self.later is None:
            values |= self.parameters_of_block.use()
        else:
            parameters, places = self.parameters_of_block.use_later(self.later)
            values |= parameters
        values |= zip(plan.block.inputs, boundary, strict=True)
        values |= {name: self._own_piece(name, inputs[name]) for name in self._inputs_needed()}
        copies: Copies = {}
        for recomputed, calls in plan.segments:
            if recomputed and torch.is_grad_enabled():
                self._recompute(calls, values, copies)
            else:
                for call in calls:
                    self._call(call, values, copies, places)
        results = [self._operand("", slot, values, copies) for slot in plan.exits] or [_known(values["loss"])]
        return (*results, *(_known(values[name]) for name in keep))

    def _inputs_needed(self) -> Iterator[str]:
        return (tensor.name for tensor in self.plan.block.tensors if tensor.role is Role.INPUT)

    def _own_piece(self, name: str, whole: Tensor) -> Tensor:
        plan = self.plan
        dims = plan.block.tensor[name].dims
        return carry_out(whole, dims, plan.sizes, route({}, plan.layout.made[name], plan.mesh), plan.mesh)

    def _operand(self, name: str, slot: Slot | None, values: Values, copies: Copies) -> Tensor:
        if slot is None:
            return _known(values[name])
        index, copy = slot
        if index not in copies:
            move = self.plan.moves[index]
            copies[index] = move(_known(values[move.tensor]), self.plan.sizes, self.plan.mesh)
        return copies[index][copy]

    def _call(self, call: Call, values: Values, copies: Copies, places: Mapping[str, Place]) -> None:
        operator = call.layout.operator
        slots = zip(operator.inputs, call.slots, strict=True)
        operands = [self._operand(name, slot, values, copies) for name, slot in slots]
        if places and call.weight is not None:
            place = places[operator.inputs[call.weight]]
            values[operator.outputs[0]] = multiply_later(operator, place, call.weight, *operands)
        else:
            values |= zip(operator.outputs, run_kernel(call.local, *operands), strict=True)

    def _recompute(self, calls: Sequence[Call], values: Values, copies: Copies) -> None:
        """Run a group of operators that keeps its operands alone; redistributions of those stay outside of it."""
        inside = {name for call in calls for name in call.layout.operator.outputs}
        needed = {
            (name, slot): self._operand(name, slot, values, copies)
            for call in calls
            for name, slot in zip(call.layout.operator.inputs, call.slots, strict=True)
            if name not in inside
        }
        names = sorted(inside)

        def run(*operands: Tensor) -> tuple[Tensor | None, ...]:
            own: Values = {}
            own_copies: Copies = {}
            given = dict(zip(needed, operands, strict=True))
            for call in calls:
                operator = call.layout.operator
                taken = [
                    given[name, slot] if (name, slot) in given else self._operand(name, slot, own, own_copies)
                    for name, slot in zip(operator.inputs, call.slots, strict=True)
                ]
                own |= zip(operator.outputs, run_kernel(call.local, *taken), strict=True)
            return tuple(own[name] for name in names)

        results = checkpoint(run, *needed.values(), use_reentrant=False, preserve_rng_state=False)
        values |= zip(names, results, strict=True)


def _known(value: Tensor | None) -> Tensor:
    assert value is not None, "a result that its kernel does not return is used"
    return value


class StageModule(nn.Module):
    """A run of blocks: the first stage takes the tokens, the last returns the losses of its tokens.

    With `splits_backward`, a backward leaves the gradients of weights in `later`.
    """

    def __init__(
        self, blocks: Sequence[BlockModule], input_names: Sequence[str], is_first: bool, splits_backward: bool = False
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.later = Later() if splits_backward else None
        for block in blocks:
            block.later = self.later
        self.input_names, self.is_first = tuple(input_names), is_first

    def forward(self, *boundary: Tensor, **inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Arguments are the model's inputs on the first stage, the boundary tensors on the others."""
        if self.is_first:
            inputs |= dict(zip(self.input_names, boundary, strict=True))
        results: tuple[Tensor, ...] = () if self.is_first else boundary
        for block in self.blocks:
            results = block(results, inputs)
        results = tuple(x.contiguous() for x in results)  # what is sent must be
        return results[0] if len(results) == 1 else results


def input_names(graph: Graph, block: str) -> tuple[str, ...]:
    """The inputs of the model that a block takes itself."""
    return tuple(tensor.name for tensor in graph.block[block].tensors if tensor.role is Role.INPUT)
