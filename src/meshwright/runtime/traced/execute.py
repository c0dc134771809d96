"""A traced program under a strategy at the level of operators, on one rank, with its gradients.

What `strategy.splits` says is done literally: tensors at rest lie where their entry says, each reader takes a tensor
from there by the planner's own redistribution and gives its gradient back the same way; views are evaluated on the
local tensor at the reader; parameters are stored as shards. One thing is not: what a backward reads is kept as the
operator took it, not gathered again from where it rests (the numbers are the same, the memory is not).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from meshwright.graph import Block, Operator, Role
from meshwright.graph import Tensor as GraphTensor
from meshwright.io.traced import BlockInstance, Call, Factors, Program, Traced
from meshwright.runtime.collectives import all_reduce
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.traced.kernels import statistics
from meshwright.runtime.traced.local import Extent, LocalCall, Operand, run_local
from meshwright.runtime.traced.redistribute import Halo, redistribute, way, with_halo
from meshwright.sharding import (
    OperatorLayout,
    Placements,
    Rest,
    at_rest,
    gradient_placements,
    hubs,
    lay_out_operator,
    rest_key,
    state_key,
    wanted_gradient,
)

Splits = Mapping[str, Mapping[str, Mapping[str, str]]]

#: An array's dim that has no elements, which has no name in the graph (what is left of a head of which all is rotary).
EMPTY = "empty"

#: A second operator of a call: what it normalises by.
STATISTICS = ".statistics"


@dataclass(frozen=True)
class Outcome:
    """A loss, and of each trained parameter (by value name) its gradient where its state lies."""

    loss: Tensor
    outputs: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor]
    lies: Mapping[str, Placements]


def run_program(
    traced: Traced, splits: Splits, whole: Mapping[str, Tensor], batch: int, mesh: Mesh, *, seq: int = 1
) -> Outcome:
    """Loss and gradients of a program of which this rank has its part; `whole` are all inputs, parameters and buffers
    by value (every rank can make them), of which it takes its pieces. `mesh` has its process groups formed."""
    return _Run(traced, splits, whole, dim_sizes(traced, batch, seq), mesh).outcome()


def dim_sizes(traced: Traced, batch: int, seq: int = 1) -> dict[str, int]:
    """The sizes of all named dims; those that no operator has, since only constants do, by the shapes as traced."""
    known = {**traced.graph.dims, "batch": traced.program.batch}
    waiting = [
        (size, dims)
        for name, factors in traced.factors.items()
        for size, dims in zip(traced.program.values[name].shape, factors, strict=True)
        if not known.keys() >= set(dims)
    ]
    while waiting:
        left = []
        for size, dims in waiting:
            unknown = [dim for dim in dims if dim not in known]
            if len(unknown) == 1:
                known[unknown[0]] = size // math.prod(known[dim] for dim in dims if dim != unknown[0])
            elif unknown:
                left.append((size, dims))
        assert len(left) < len(waiting), left
        waiting = left
    return {**known, **traced.graph.sizes(batch, seq), EMPTY: 0}


def loss_of(outputs: Iterable[Tensor]) -> Tensor:
    """A number that depends on all outputs: each times fixed pseudo-random weights, the mean."""
    generator = torch.Generator().manual_seed(1234)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        if output.is_floating_point():
            weights = torch.randn(output.shape, dtype=torch.float64, generator=generator)
            total = total + (output * weights).mean()
    return total


def _is_batch(dim: str) -> bool:
    return dim.rstrip("'") == "batch"


@dataclass
class _Lying:
    """A local tensor, where it lies, and where its gradient is wanted."""

    tensor: Tensor
    value: Placements
    gradient: Placements


@dataclass
class _Run:
    traced: Traced
    splits: Splits
    whole: Mapping[str, Tensor]
    named_sizes: Mapping[str, int]
    mesh: Mesh
    leaves: dict[str, Tensor] = field(default_factory=dict)
    rests: dict[str, tuple[Factors, Rest, Placements]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    as_traced: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.axes = tuple(axis.name for axis in self.mesh.axes)
        self.call: dict[str, Call] = {call.name: call for call in self.program.calls}
        self.maker = {name: call for call in self.program.calls for name in call.outputs}
        self.owner = {second: first for first, second in self.program.tied}
        # Tensors beside a call's results: their dims are those that the graph gives them.
        self.beside = {
            value: _grouped(self.traced.graph.block[instance.block].tensor[name])
            for instance in self.traced.instances
            for name, value in instance.values.items()
            if value not in self.traced.factors
        }

    @property
    def program(self) -> Program:
        return self.traced.program

    def outcome(self) -> Outcome:
        handed: list[_Lying] = []
        lying: dict[str, _Lying] = {}
        for instance in self.traced.instances:
            lying = self._run_block(instance, handed)
            handed = [lying[name] for name in self.traced.graph.block[instance.block].outputs]
        by_value = {self.traced.instances[-1].values[name]: found for name, found in lying.items()}
        outputs = tuple(self._output(name, by_value) for name in self.program.outputs)
        loss = loss_of(outputs)
        if loss.requires_grad:
            loss.backward()
        gradients, lies = {}, {}
        for name, leaf in self.leaves.items():
            factors, rest, state = self.rests[name]
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            gradients[name] = way(factors, self.named_sizes, rest.gradient, state, self.mesh)(gradient, self.mesh)
            lies[name] = state
        return Outcome(loss.detach(), tuple(output.detach() for output in outputs), gradients, lies)

    def piece(self, name: str, placements: Placements) -> Tensor:
        """This rank's piece of a whole value."""
        value = self.owner.get(name, name)
        found = self.whole[value] if value in self.whole else self._constant(name)
        return way(self._factors(name), self.named_sizes, {}, placements, self.mesh)(found, self.mesh)

    # --- blocks

    def _run_block(self, instance: BlockInstance, handed: Sequence[_Lying]) -> dict[str, _Lying]:
        block = self.traced.graph.block[instance.block]
        lying: dict[str, _Lying] = {}
        for name, found in zip(block.inputs, handed, strict=True):
            rest = self._rest(block, name)
            lying[name] = _Lying(self._moved(instance, name, found, rest.value, rest.gradient), *_pair(rest))
        resting = set(hubs(block))
        for operator in block.operators:
            layout = lay_out_operator(block, operator, self._split(block.name, operator.name))
            results = self._run_operator(instance, block, layout, lying)
            for name, local, made in zip(operator.outputs, results, layout.outputs, strict=False):
                found = _Lying(local, made, wanted_gradient(made))
                if name in resting:
                    rest = self._rest(block, name)
                    found = _Lying(self._moved(instance, name, found, rest.value, rest.gradient), *_pair(rest))
                lying[name] = found
        return lying

    def _split(self, block: str, key: str) -> dict[str, str]:
        return {axis: dim for axis, dim in self.splits[block][key].items() if axis in self.axes}

    def _rest(self, block: Block, name: str) -> Rest:
        return at_rest(self._split(block.name, rest_key(block, name)))

    def _moved(
        self, instance: BlockInstance, name: str, found: _Lying, value: Placements, gradient: Placements
    ) -> Tensor:
        """A tensor brought elsewhere; its gradient comes back under `gradient`."""
        factors = self._factors(instance.values[name])
        forward = way(factors, self.named_sizes, found.value, value, self.mesh)
        backward = way(factors, self.named_sizes, gradient, found.gradient, self.mesh)
        return redistribute(found.tensor, forward, backward, self.mesh)

    # --- operators

    def _run_operator(
        self, instance: BlockInstance, block: Block, layout: OperatorLayout, lying: Mapping[str, _Lying]
    ) -> tuple[Tensor, ...]:
        operator, split = layout.operator, layout.split
        call = self.call[instance.calls[operator.name]]
        aliases = block.dim_aliases(operator)
        sizes = {dim: self._size(aliases[dim]) for dim in operator.dims} | {EMPTY: 0}
        extents = {dim: self._extent(sizes[dim], axes) for dim, axes in _axes_of(split, self.axes, sizes).items()}
        is_statistics = operator.name.endswith(STATISTICS)
        names = call.inputs[:1] if is_statistics else call.inputs
        tensors, arrays = [], []
        for place, name in enumerate(names):
            base = self._taken(instance, block, layout, place, lying)
            array = self._operand_array(name, operator, place)
            tensors.append(self._viewed(name, base, array, sizes, extents))
            arrays.append(array)
        halo = self._halos(operator, arrays[0] if arrays else (), split)
        for each in halo.values():
            tensors[0] = with_halo(tensors[0], each, self.mesh)
        if is_statistics:
            return statistics(tensors[0])
        operands = _by_argument(call, tensors)
        for place in range(len(names), len(operator.inputs)):  # statistics of the call proper
            suffix = operator.inputs[place].rpartition(".")[2]
            operands[suffix] = self._taken(instance, block, layout, place, lying)
        results = tuple(
            _renamed(self._factors(name), dims) for name, dims in zip(call.outputs, operator.output_dims, strict=False)
        )
        gone = [axis for axis, dim in split.items() if dim in sizes and dim not in operator.output_dims[0]]
        local = LocalCall(
            call,
            operands,
            tuple(arrays),
            results,
            sizes,
            extents,
            {dim: (each.before, each.after) for dim, each in halo.items()},
            is_first=self.mesh.is_first(gone),
            total=partial(self._total, gone),
        )
        made = run_local(local)
        for index, result in enumerate(made):
            expected = local.shape(index)
            assert list(result.shape) == expected, (call.name, call.op, list(result.shape), expected, split)
        return tuple(
            result if self.program.values[name].differentiable else result.detach()
            for name, result in zip(call.outputs, made, strict=True)
        )

    def _taken(
        self, instance: BlockInstance, block: Block, layout: OperatorLayout, place: int, lying: Mapping[str, _Lying]
    ) -> Tensor:
        """The local tensor of an operand's base, where the operator takes it."""
        name, wanted = layout.operator.inputs[place], layout.inputs[place]
        tensor = block.tensor[name]
        gradient = gradient_placements(wanted, layout.split)
        if tensor.role is Role.ACTIVATION:
            return self._moved(instance, name, lying[name], wanted, gradient)
        value = instance.values[name]
        if tensor.role is Role.PARAMETER:
            rest = self._rest(block, name)
            leaf = self._leaf(block, name, value, rest, is_trained=tensor.differentiable)
            return self._moved(instance, name, _Lying(leaf, *_pair(rest)), wanted, gradient)
        return self.piece(value, wanted)

    def _leaf(self, block: Block, name: str, value: str, rest: Rest, *, is_trained: bool) -> Tensor:
        owner = self.owner.get(value, value)
        if owner not in self.leaves:
            piece = self.piece(owner, rest.value).detach().clone()
            if not is_trained:
                return piece
            key = state_key(name)
            state = at_rest(self._split(block.name, key)).value if key in self.splits[block.name] else rest.value
            self.leaves[owner] = piece.requires_grad_()
            self.rests[owner] = self._factors(value), rest, state
        return self.leaves[owner]

    def _total(self, axes: Sequence[str], number: Tensor) -> Tensor:
        return all_reduce(number, self.mesh.group(axes)) if self.mesh.degree(axes) > 1 else number

    def _halos(self, operator: Operator, array: Factors, split: Mapping[str, str]) -> dict[str, Halo]:
        found = {}
        for dim, (before, after) in operator.halo.items():
            axes = tuple(axis for axis in self.axes if split.get(axis) == dim)
            if axes:
                place = next(index for index, dims in enumerate(array) if dim in dims)
                found[dim] = Halo(place, before, after, axes)
        return found

    # --- dims

    def _factors(self, name: str) -> Factors:
        if name not in self.traced.factors:
            return self.beside[name]
        factors = self.traced.factors[name]
        if 0 not in self.program.values[name].shape:
            return factors
        shape = self.program.values[name].shape
        return tuple(dims if size else (EMPTY,) for size, dims in zip(shape, factors, strict=True))

    def _size(self, dim: str) -> int:
        return self.named_sizes[dim]

    def _extent(self, size: int, axes: Sequence[str]) -> Extent:
        return self.mesh.extent(size, axes)

    def _operand_array(self, name: str, operator: Operator, place: int) -> Factors:
        """The dims of an operand, seen through its views, by the operator's names."""
        reading = self.traced.readings.get(name)
        factors = self._factors(name)
        if reading is None:
            return _renamed(factors, operator.input_dims[place])
        flat = [dim for dim in _flat(factors) if dim != EMPTY]
        own = operator.input_dims[place]
        named = [own[at] if at >= 0 else "" for at in reading.positions]
        for index, dim in enumerate(named):
            if not dim:
                named[index] = _expanded_dim(flat[index], operator, (*own, *named))
        return _renamed(factors, named)

    def _viewed(
        self, name: str, base: Tensor, array: Factors, sizes: Mapping[str, int], extents: Mapping[str, Extent]
    ) -> Tensor:
        """An operand's local tensor: that of its base, seen through the views between."""
        reading = self.traced.readings.get(name)
        if reading is None:
            return base
        # Names along the way: those of the base under the operator's names, the expanded ones as in the operand.
        names = dict(zip(_flat(self._factors(name)), _flat(array), strict=True))
        found = base
        for view in reading.views:
            call = self.call[view]
            source, target = (_renamed_by(self._factors(each), names) for each in (call.inputs[0], call.outputs[0]))
            here = [dim for dim in {*_flat(source), *_flat(target)} if dim not in sizes]
            local_sizes = {**sizes, **{dim: self._size(dim) for dim in here}}
            argument = next(iter(call.operands))
            operand: Operand = (found,) if not isinstance(call.operands[argument], str) else found
            local = LocalCall(call, {argument: operand}, (source,), (target,), local_sizes, extents)
            (found,) = run_local(local)
        return found

    def _constant(self, name: str) -> Tensor:
        """A value that depends on no input and no parameter, whole. One that is the same for every sequence is made as
        it was traced: its calls may name the batch of that time (masks by `arange`, `expand`)."""
        if name in self.whole:
            return self.whole[name]
        if name not in self.constants:
            found = self._same_for_all(name) if self.named_sizes["batch"] != self.traced.program.batch else None
            if found is None:
                found = self._evaluated(name, self.constants, self.named_sizes["batch"])
            self.constants[name] = found
        return self.constants[name].detach()

    def _same_for_all(self, name: str) -> Tensor | None:
        """A constant for as many sequences as there are, from the one as traced; None where they differ in it."""
        found = self._evaluated(name, self.as_traced, self.traced.program.batch)
        factors, now = self._factors(name), self.named_sizes["batch"]
        flat = _flat(factors)
        found = found.reshape(self._lengths(flat, self.traced.program.batch))
        for at, dim in enumerate(flat):
            if _is_batch(dim):
                if not torch.equal(found, found.narrow(at, 0, 1).expand_as(found)):
                    return None
                found = found.narrow(at, 0, 1).expand(*found.shape[:at], now, *found.shape[at + 1 :])
        return found.reshape([math.prod(self._lengths(dims, now)) for dims in factors])

    def _lengths(self, dims: Iterable[str], batch: int) -> list[int]:
        return [batch if _is_batch(dim) else self._size(dim) for dim in dims]

    def _evaluated(self, name: str, known: dict[str, Tensor], batch: int) -> Tensor:
        """A constant made by its calls for a batch; `known` are those made before."""
        if name in self.whole:
            return self.whole[name]
        if name not in known:
            call = self.maker[name]
            operands = _by_argument(call, [self._evaluated(each, known, batch) for each in call.inputs])
            arrays = tuple(self._factors(each) for each in call.inputs)
            results = tuple(self._factors(each) for each in call.outputs)
            dims = [dim for array in (*arrays, *results) for dim in _flat(array)]
            made = run_local(
                LocalCall(call, operands, arrays, results, dict(zip(dims, self._lengths(dims, batch), strict=True)))
            )
            known.update(zip(call.outputs, made, strict=True))
        return known[name].detach()

    def _output(self, name: str, lying: Mapping[str, _Lying]) -> Tensor:
        """An output of the program, whole on every rank."""
        reading = self.traced.readings.get(name)
        base = name if reading is None else reading.base
        factors = self._factors(base)
        sizes = {dim: self._size(dim) for dim in (*_flat(factors), *_flat(self._factors(name)))}
        if base in lying:
            found = lying[base]
            forward = way(factors, self.named_sizes, found.value, {}, self.mesh)
            backward = way(factors, self.named_sizes, {}, found.gradient, self.mesh)
            return self._viewed(
                name, redistribute(found.tensor, forward, backward, self.mesh), self._factors(name), sizes, {}
            )
        return self._viewed(name, self.piece(base, {}), self._factors(name), sizes, {})


def _pair(rest: Rest) -> tuple[Placements, Placements]:
    return rest.value, rest.gradient


def _grouped(tensor: GraphTensor) -> Factors:
    dims = iter(tensor.dims)
    return tuple(tuple(next(dims) for _ in range(count)) for count in tensor.groups or [1] * len(tensor.dims))


def _flat(factors: Factors) -> list[str]:
    return [dim for dims in factors for dim in dims]


def _renamed(factors: Factors, names: Sequence[str]) -> Factors:
    """Factors under other names, in order."""
    own = iter(names)
    found = tuple(tuple(dim if dim == EMPTY else next(own) for dim in dims) for dims in factors)
    assert next(own, None) is None, (factors, names)
    return found


def _renamed_by(factors: Factors, names: Mapping[str, str]) -> Factors:
    return tuple(tuple(names.get(dim, dim) for dim in dims) for dims in factors)


def _expanded_dim(name: str, operator: Operator, taken: Sequence[str]) -> str:
    """The operator's name of a dim that a view adds: of the same class, and not another dim of the operand."""
    root = name.rstrip("'")
    same = [dim for dim in operator.dims if dim.rstrip("'") == root and dim not in taken]
    return same[0] if same else name


def _axes_of(split: Mapping[str, str], order: Sequence[str], dims: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The axes that split each dim, outermost first."""
    known = set(dims)
    found: dict[str, tuple[str, ...]] = {}
    for axis in order:
        dim = split.get(axis)
        if dim in known:
            assert dim is not None
            found[dim] = (*found.get(dim, ()), axis)
    return found


def _by_argument(call: Call, tensors: Sequence[Tensor]) -> dict[str, Operand]:
    given = iter(tensors)
    return {
        argument: next(given) if isinstance(names, str) else tuple(next(given) for _ in names)
        for argument, names in call.operands.items()
    }


# --- whole tensors from a seed ----------------------------------------------------------------------------------------


def whole_tensors(traced: Traced, batch: int, seed: int, *, seq: int = 1) -> dict[str, Tensor]:
    """All inputs, parameters and buffers of a program, by value, from a seed: floats in float64, indices within the
    tables that they are looked up in."""
    program, sizes = traced.program, dim_sizes(traced, batch, seq)
    bounds = _index_bounds(program)
    found = {}
    made = {name for call in program.calls for name in call.outputs}
    for number, (name, value) in enumerate(sorted(program.values.items())):
        if name in made or any(name == second for _, second in program.tied):
            continue
        factors = traced.factors.get(name)
        if factors is None:
            continue
        shape = [math.prod(sizes[dim] for dim in dims) for dims in factors]
        generator = torch.Generator().manual_seed(seed * 100003 + number)
        found[name] = _filled(value.dtype, value.role, shape, bounds.get(name), generator)
    return found


def _filled(dtype: str, role: Role, shape: Sequence[int], bound: int | None, generator: torch.Generator) -> Tensor:
    if dtype == "bool":
        return torch.ones(shape, dtype=torch.bool)
    if not dtype.startswith(("float", "bfloat")):
        if bound is None:
            return torch.ones(shape, dtype=torch.int64)
        return torch.randint(bound, tuple(shape), generator=generator)
    normal = torch.randn(shape, dtype=torch.float64, generator=generator)
    if role is Role.INPUT:
        return normal
    if role is Role.BUFFER:
        return normal.abs() + 0.5  # a variance, among others
    return normal / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 1 + 0.1 * normal


#: Operators that look rows up: the argument that has the indices, and that which has the rows, in dim 0.
_LOOKUPS = {"embedding": ("indices", "weight"), "embedding_bag": ("indices", "weight")}


def _index_bounds(program: Program) -> dict[str, int]:
    """Of values that are looked up in a table, as they are or after some integer arithmetic, its number of rows."""
    bounds: dict[str, int] = {}
    for call in reversed(program.calls):
        lookup = _LOOKUPS.get(call.op.split(".")[1])
        if lookup and lookup[0] in call.operands:
            name, table = call.operands[lookup[0]], call.operands[lookup[1]]
            assert isinstance(name, str)
            assert isinstance(table, str)
            rows = program.values[table].shape[0]
            bounds[name] = min(bounds.get(name, rows), rows)
        if "cross_entropy" in call.op or "nll_loss" in call.op:
            name, logits = call.operands["target"], call.operands["self"]
            assert isinstance(name, str)
            assert isinstance(logits, str)
            shape = program.values[logits].shape
            bounds[name] = shape[0] if len(shape) == 1 else shape[1]
        for out in call.outputs:
            if out in bounds:
                for name in call.inputs:
                    if program.values[name].dtype.startswith("int"):
                        bounds[name] = min(bounds.get(name, bounds[out]), bounds[out])
    return bounds
