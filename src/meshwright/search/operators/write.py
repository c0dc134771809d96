"""Makes a space: the costs of each block on the nodes that it touches, all of them together, and what memory is
used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from meshwright.choice import Array, Usage, instance_of
from meshwright.cost.layouts import Machine, StateBytes, end_blocks, state_bytes
from meshwright.cost.lifetimes import Kept, Lifetimes, Part, lifetimes
from meshwright.cost.memory import MEMORY_RESERVE
from meshwright.cost.operators import (
    SUMMAND,
    WHOLE,
    MovePrices,
    gradient_codes,
    has_backward,
    local_share,
    operand_codes,
    operator_columns,
    placed_pricing,
    reads_again,
    result_codes,
    update_seconds,
    wanted_codes,
)
from meshwright.graph import Block, Graph, Operator, Role, Tensor
from meshwright.search.operators.nodes import Nodes, nodes_of
from meshwright.search.operators.space import BlockPart, OperatorSpace, rest_gradients, rest_values
from meshwright.sharding import hubs, tensor_numel
from meshwright.strategy import MeshAxis
from meshwright.workload import Workload


def operator_space(
    graph: Graph,
    mesh: Sequence[MeshAxis],
    machine: Machine,
    workload: Workload,
    *,
    memory_limit: float | None = None,
    with_state: bool = False,
    with_recompute: bool = False,
    is_closed: bool = False,
) -> OperatorSpace:
    """The space of a graph on a mesh (outermost axis first).

    `memory_limit` is what a device may hold (by default its memory less the usual reserve; infinite for no limit).
    `with_state` lets training state be sharded further than parameters are (ZeRO-1 and 2), `with_recompute` lets
    operators run again in the backward instead of keeping what they make. Where a graph `is_closed` what its last block
    hands out lies as its first takes it in, as if such graphs followed one another."""
    degrees = {axis.name: axis.size for axis in mesh if axis.size > 1}
    sizes = graph.sizes(workload.global_batch, workload.seq_len)
    pricing = placed_pricing(machine, workload, sizes, degrees)
    nodes = nodes_of(
        graph,
        sizes,
        list(degrees.values()),
        with_state=with_state,
        with_recompute=with_recompute,
        is_closed=is_closed,
    )
    writer = _Writer(
        graph=graph,
        nodes=nodes,
        moves=MovePrices(pricing, machine.levels),
        machine=machine,
        state=state_bytes(machine.engine, workload),
        degrees=tuple(degrees.values()),
        ends=end_blocks(graph),
    )
    parts = {block.name: writer.part(block) for block in graph.blocks}
    lives = lifetimes(graph, with_recompute=with_recompute)
    fixed_bytes = machine.engine.memory.reserved_bytes + writer.buffer_bytes()
    limit = machine.memory_bytes * (1 - MEMORY_RESERVE) if memory_limit is None else memory_limit
    costs = [np.zeros(len(node.codes_CA)) for node in nodes.nodes]
    edges: dict[tuple[int, int], Array] = {}
    for name, part in parts.items():
        count = graph.counts[name]
        for node, cost in zip(part.nodes, part.costs, strict=True):
            costs[node] = costs[node] + count * cost
        for (one, other), matrix in part.edges.items():
            ends = part.nodes[one], part.nodes[other]
            edges[ends] = edges[ends] + count * matrix if ends in edges else count * matrix
    instance = instance_of(
        costs,
        [(one, other, matrix) for (one, other), matrix in edges.items()],
        writer.usages(lives),
        limit=limit - fixed_bytes,
        name=graph.name,
    )
    return OperatorSpace(graph, tuple(mesh), machine, workload, tuple(nodes.nodes), parts, instance, lives, fixed_bytes)


@dataclass
class _Draft:
    """A `BlockPart` while it is written."""

    nodes: list[int] = field(default_factory=list)
    costs: list[Array] = field(default_factory=list)
    edges: dict[tuple[int, int], Array] = field(default_factory=dict)

    def add(self, node: int, num_choices: int) -> int:
        """A node of the part, with no costs yet."""
        self.nodes.append(node)
        self.costs.append(np.zeros(num_choices))
        return len(self.nodes) - 1

    def join(self, one: int, other: int, matrix: Array) -> None:
        """More costs between two nodes."""
        known = self.edges.get((one, other))
        self.edges[one, other] = matrix if known is None else known + matrix


@dataclass(frozen=True, eq=False)
class _Operand:
    """An operand or result of an operator under all of its splits: how it lies, and how its gradient does (as it comes
    back for an operand, as it is wanted for a result); and whether the operator runs again in the backward."""

    tensor: Tensor
    value_CA: Array
    gradient_CA: Array
    again_C: Array


@dataclass(frozen=True, eq=False)
class _Writer:
    """What all costs depend on."""

    graph: Graph
    nodes: Nodes
    moves: MovePrices
    machine: Machine
    state: StateBytes
    degrees: tuple[int, ...]
    ends: frozenset[str]

    # --- time

    def part(self, block: Block) -> BlockPart:
        """The costs of one instance of a block."""
        draft = _Draft()
        operators = {
            operator.name: draft.add(number, len(self.nodes.codes(number)))
            for operator in block.operators
            for number in [self.nodes.operators[block.name, operator.name]]
        }
        resting = {
            name: draft.add(number, len(self.nodes.codes(number)))
            for name in (*hubs(block), *(tensor.name for tensor in block.parameters))
            for number in [self.nodes.resting[block.name, name]]
        }
        makers: dict[str, tuple[int, _Operand]] = {}
        for operator in block.operators:
            place, split_CA = operators[operator.name], self._split(block, operator)
            seconds = operator_columns(
                block, operator, split_CA, self.moves.pricing, self.machine.levels, is_end=block.name in self.ends
            )
            again_C = self._again(block, operator)
            draft.costs[place] = seconds.forward * (1 + again_C) + seconds.backward
            for operand in self._operands(block, operator):
                self._read(draft, block, operator, operand, place, resting, makers)
            for result in self._results(block, operator):
                makers[result.tensor.name] = place, result
                if result.tensor.name in resting:
                    self._made(draft, block, operator, result, place, resting[result.tensor.name])
        for tensor in block.parameters:
            if (block.name, tensor.name) in self.nodes.owned and tensor.differentiable:
                self._update(draft, block, tensor, resting[tensor.name])
        return BlockPart(
            tuple(draft.nodes),
            tuple(draft.costs),
            draft.edges,
            tuple(resting[name] for name in block.inputs if name in resting),
            tuple(resting[name] for name in block.outputs if name in resting),
        )

    def _split(self, block: Block, operator: Operator) -> Array:
        return self.nodes.codes(self.nodes.operators[block.name, operator.name])

    def _again(self, block: Block, operator: Operator) -> Array:
        """Whether an operator runs again in the backward."""
        return self.nodes.nodes[self.nodes.operators[block.name, operator.name]].again_C

    def _rest(self, block: Block, tensor: Tensor) -> Array:
        return self.nodes.codes(self.nodes.resting[block.name, tensor.name])

    def _operands(self, block: Block, operator: Operator) -> list[_Operand]:
        split_CA, again_C, found = self._split(block, operator), self._again(block, operator), []
        for name, dims in zip(operator.inputs, operator.input_dims, strict=True):
            value_CA = operand_codes(block, dims, name, operator, split_CA)
            found.append(_Operand(block.tensor[name], value_CA, gradient_codes(value_CA, split_CA), again_C))
        return found

    def _results(self, block: Block, operator: Operator) -> list[_Operand]:
        split_CA, again_C, found = self._split(block, operator), self._again(block, operator), []
        for name, dims in zip(operator.outputs, operator.output_dims, strict=True):
            value_CA = result_codes(block, dims, name, operator, split_CA)
            found.append(_Operand(block.tensor[name], value_CA, wanted_codes(value_CA), again_C))
        return found

    def _read(
        self,
        draft: _Draft,
        block: Block,
        operator: Operator,
        operand: _Operand,
        place: int,
        resting: dict[str, int],
        makers: dict[str, tuple[int, _Operand]],
    ) -> None:
        """An operator takes a tensor, in its backward once more if that reads it, and gives a gradient back."""
        tensor = operand.tensor
        if tensor.role in (Role.INPUT, Role.BUFFER):
            return
        returns = tensor.differentiable and has_backward(block, operator)
        size, runs_again = self._bytes(tensor), self._again(block, operator)
        if tensor.name not in resting:
            maker, made = makers[tensor.name]
            made_again = made.again_C[:, None]
            matrix = self.moves.seconds(made.value_CA, operand.value_CA, size) * (1 + (made_again & runs_again))
            matrix = np.where(runs_again & ~made_again, np.inf, matrix)  # it would not be there
            if returns:
                matrix = matrix + self.moves.seconds(operand.gradient_CA, made.gradient_CA, size).T
            draft.join(maker, place, matrix)
            return
        rest_CA = self._rest(block, tensor)
        is_parameter = tensor.role is Role.PARAMETER
        is_read = reads_again(block, operator, tensor.name) if is_parameter else tensor.name in operator.saves
        again = runs_again[:, None] | is_read  # for its backward and for its rerun it is brought once
        matrix = (1 + again) * self.moves.seconds(rest_values(rest_CA), operand.value_CA, size).T
        if not is_parameter and not any(tensor.name in each.saves for each in block.operators):
            kept = self.nodes.nodes[self.nodes.resting[block.name, tensor.name]].again_C
            matrix = np.where(runs_again[:, None] & ~kept, np.inf, matrix)
        if returns:
            back = self._gradient_bytes(tensor)
            matrix = matrix + self.moves.seconds(operand.gradient_CA, rest_gradients(rest_CA), back)
        draft.join(place, resting[tensor.name], matrix)

    def _made(
        self, draft: _Draft, block: Block, operator: Operator, result: _Operand, place: int, resting: int
    ) -> None:
        """A result goes to where it lies, its gradient comes back from there; a backward that reads it has it as it was
        made."""
        tensor, rest_CA = result.tensor, self._rest(block, result.tensor)
        size, values = self._bytes(tensor), rest_values(rest_CA)
        again_C = self.nodes.nodes[self.nodes.resting[block.name, tensor.name]].again_C
        matrix = self.moves.seconds(result.value_CA, values, size) * (1 + result.again_C[:, None])
        if again_C.any() or result.again_C.any():
            matrix = np.where(result.again_C[:, None] == again_C, matrix, np.inf)
        if tensor.differentiable:
            matrix = matrix + self.moves.seconds(rest_gradients(rest_CA), result.gradient_CA, size).T
        if tensor.name in operator.saves:
            summed = np.where(result.value_CA == SUMMAND, WHOLE, result.value_CA)
            matrix = matrix + self.moves.seconds(values, summed, size).T
        draft.join(place, resting, matrix)

    def _update(self, draft: _Draft, block: Block, tensor: Tensor, place: int) -> None:
        """The optimizer's step of a parameter, and what its gradient and its new value move for it."""
        rest_CA = self._rest(block, tensor)
        value_CA, gradient_CA = rest_values(rest_CA), rest_gradients(rest_CA)
        numel = tensor_numel(tensor, self.moves.pricing.extents.sizes)
        whole_s = update_seconds(self.machine, self.state, numel)
        gradient_bytes, parameter_bytes = self._gradient_bytes(tensor), self._bytes(tensor)
        state = self.nodes.states.get((block.name, tensor.name))
        if state is None:
            moved = self.moves.each(gradient_CA, value_CA, gradient_bytes)
            draft.costs[place] = draft.costs[place] + whole_s * local_share(value_CA, self.degrees) + moved
            return
        state_CA = rest_values(self.nodes.codes(state))
        own = draft.add(state, len(state_CA))
        draft.costs[own] = whole_s * local_share(state_CA, self.degrees)
        refines = ((value_CA[:, None] == state_CA[None]) | (value_CA[:, None] == WHOLE)).all(axis=2)
        matrix = self.moves.seconds(gradient_CA, state_CA, gradient_bytes)
        matrix = matrix + self.moves.seconds(state_CA, value_CA, parameter_bytes).T
        draft.join(place, own, np.where(refines, matrix, np.inf))

    def _bytes(self, tensor: Tensor) -> float:
        pricing = self.moves.pricing
        numel: float = tensor_numel(tensor, pricing.extents.sizes)
        return numel * pricing.workload.bytes_of(tensor.dtype)

    def _gradient_bytes(self, tensor: Tensor) -> float:
        """Bytes of a gradient: those of parameters are in the type in which they are accumulated."""
        if tensor.role is not Role.PARAMETER:
            return self._bytes(tensor)
        numel: float = tensor_numel(tensor, self.moves.pricing.extents.sizes)
        return numel * self.state.gradient

    # --- memory

    def buffer_bytes(self) -> float:
        """Bytes of buffers, which lie whole on every rank."""
        return sum(
            self.graph.counts[block.name] * self._bytes(tensor)
            for block in self.graph.blocks
            for tensor in block.tensors
            if tensor.role is Role.BUFFER
        )

    def usages(self, lives: Lifetimes) -> list[Usage]:
        """What each choice of each node uses, and when."""
        used: dict[tuple[int, int, int], Array] = defaultdict(lambda: np.zeros(1))

        def use(node: int, start: int, stop: int, amounts: Array) -> None:
            used[node, start, stop] = used[node, start, stop] + amounts

        always = 0, max(lives.num_times, 1)
        for block in self.graph.blocks:
            count, seen = self.graph.counts[block.name], set()
            for operator in block.operators:
                for operand in self._operands(block, operator):
                    name = operand.tensor.name
                    if operand.tensor.role is Role.INPUT and name not in seen:
                        seen.add(name)
                        node = self.nodes.operators[block.name, operator.name]
                        use(node, *always, count * self._local_bytes(operand.tensor, operand.value_CA))
            for tensor in block.parameters:
                if (block.name, tensor.name) in self.nodes.owned:
                    self._use_state(use, block, tensor, count, always)
        amounts = {
            block.name: {operator.name: self._at_hand(block, operator) for operator in block.operators}
            for block in self.graph.blocks
        }
        makers = {
            (block.name, name): (operator, index)
            for block in self.graph.blocks
            for operator in block.operators
            for index, name in enumerate(operator.outputs)
        }
        for held in lives.held:
            block = self.graph.block[held.block]
            if held.part in (Part.FORWARD, Part.BACKWARD):
                node = self.nodes.operators[held.block, held.name]
                amount = amounts[held.block][held.name][int(held.part is Part.BACKWARD)]
            elif held.part in (Part.REST, Part.REST_GRADIENT):
                node = self.nodes.resting[held.block, held.name]
                codes = self.nodes.codes(node)
                lies = rest_values(codes) if held.part is Part.REST else rest_gradients(codes)
                amount = self._local_bytes(block.tensor[held.name], lies)
            else:
                operator, index = makers[held.block, held.name]
                node = self.nodes.operators[held.block, operator.name]
                made = self._results(block, operator)[index]
                amount = self._local_bytes(made.tensor, made.value_CA)
            if held.kept is not Kept.EITHER:
                amount = amount * (self.nodes.nodes[node].again_C == (held.kept is Kept.REMADE))
            use(node, held.start, held.stop, held.count * amount)
        return [
            Usage(node, start, stop, np.broadcast_to(amounts, len(self.nodes.codes(node))))
            for (node, start, stop), amounts in used.items()
            if amounts.any()
        ]

    def _local_bytes(self, tensor: Tensor, codes_CA: Array) -> Array:
        return self._bytes(tensor) * local_share(codes_CA, self.degrees)

    def _use_state(
        self,
        use: Callable[[int, int, int, Array], None],
        block: Block,
        tensor: Tensor,
        count: int,
        always: tuple[int, int],
    ) -> None:
        path = block.name, tensor.name
        node, state = self.nodes.resting[path], self.nodes.states.get(path)
        numel = count * tensor_numel(tensor, self.moves.pricing.extents.sizes)
        stored = local_share(rest_values(self.nodes.codes(node)), self.degrees)
        use(node, *always, count * self._bytes(tensor) * stored)
        if tensor.differentiable:
            share = stored if state is None else local_share(rest_values(self.nodes.codes(state)), self.degrees)
            per_number = self.state.gradient + self.state.optimizer
            use(node if state is None else state, *always, numel * per_number * share)

    def _at_hand(self, block: Block, operator: Operator) -> tuple[Array, Array]:
        """Bytes of what an operator has at hand in its forward and in its backward."""
        forward, backward = np.zeros(1), np.zeros(1)
        for operand in self._operands(block, operator):
            tensor = operand.tensor
            local = self._local_bytes(tensor, operand.value_CA)
            forward = forward + local
            if tensor.name in operator.saves or reads_again(block, operator, tensor.name):
                backward = backward + local
            if tensor.differentiable and tensor.role in (Role.PARAMETER, Role.ACTIVATION):
                share = local_share(operand.gradient_CA, self.degrees)
                backward = backward + self._gradient_bytes(tensor) * share
        for result in self._results(block, operator):
            local = self._local_bytes(result.tensor, result.value_CA)
            forward = forward + local
            if result.tensor.name in operator.saves:
                backward = backward + local
            if result.tensor.differentiable:
                backward = backward + self._local_bytes(result.tensor, result.gradient_CA)
        return forward, backward if has_backward(block, operator) else np.zeros(1)
