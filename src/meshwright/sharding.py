"""Placements on a mesh, and the communication that follows from them.

An operator is split by naming, for each mesh axis, the one of its dims that the axis splits. Everything else follows:

- an operand that has the dim lies `Shard(dim)` on that axis, one that lacks it lies `Replicate`;
- a result that lacks it (the dim was contracted) is `Partial`: each rank holds a summand;
- where a tensor is made under one placement and used under another, a *redistribution* gives the collective;
- backward mirrors forward: the gradient of a shard is a shard, of something replicated over an axis that splits the
  operator a partial sum, of a partial sum something replicated. The gradient travels each edge the other way.

Megatron's tensor parallelism, sequence, vocabulary, context and data parallelism and the ZeRO levels are placements
and nothing else: no function here knows their names, and none knows a size. What comes out is symbolic, and is sized
later by numbers or by whole columns of them. *axis* is a mesh axis, *dim* a tensor dim. The notation of placements is
PyTorch's DTensor's; the factor view of an operator is that of GSPMD (2105.04663) and Shardy.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from itertools import takewhile
from typing import Any

import numpy as np

from meshwright.graph import Block, Operator, Role, Tensor

#: A parameter's elements as one flat run: the dim along which training state is sharded.
FLAT = "flat"


@dataclass(frozen=True)
class Shard:
    """Each rank of the axis holds one piece along `dim`."""

    dim: str

    def __str__(self) -> str:
        return f"Shard({self.dim})"


@dataclass(frozen=True)
class Replicate:
    """Each rank of the axis holds the whole."""

    def __str__(self) -> str:
        return "Replicate"


@dataclass(frozen=True)
class Partial:
    """Each rank of the axis holds a summand of the whole."""

    def __str__(self) -> str:
        return "Partial"


Placement = Shard | Replicate | Partial
REPLICATE = Replicate()
PARTIAL = Partial()

#: Placement of one tensor on each mesh axis; an axis that is not named replicates.
Placements = Mapping[str, Placement]

#: The dim of an operator that each mesh axis splits, or one of the two words below.
Split = Mapping[str, str]

#: In a split: the operator, linear, takes summands along this axis and makes summands.
SUMMANDS = "+"

#: In the split of a tensor at rest: it lies whole, and what comes back to it are summands of its gradient, since those
#: who read it are split.
SPREAD = "*"


class Collective(StrEnum):
    """A collective operation, or what a rank does alone, for nothing: `SLICE` keeps a piece of what it has, `SUMMAND`
    makes a summand of it: zeros where another rank has the values (around a piece; all of it on all ranks but one)."""

    ALL_REDUCE = "all_reduce"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_TO_ALL = "all_to_all"
    SLICE = "slice"
    SUMMAND = "summand"


#: What needs no communication.
FREE = frozenset({Collective.SLICE, Collective.SUMMAND})


class Phase(StrEnum):
    """When a transfer happens: in the forward, in the backward, in the backward to have a saved value again, or for the
    optimizer's update."""

    FORWARD = "forward"
    BACKWARD = "backward"
    REGATHER = "regather"
    UPDATE = "update"


@dataclass(frozen=True)
class AxisRule:
    """What a mesh axis splits in each operator: the first of `dims` that the operator has and allows.

    Where it has none of them, the first of `fallback`, unless the operator has a dim of `blocked_by`.
    """

    axis: str
    dims: tuple[str, ...]
    fallback: tuple[str, ...] = ()
    blocked_by: tuple[str, ...] = ()

    def choose(self, operator: Operator) -> str | None:
        """The dim of `operator` that this axis splits, or None where the operator stays whole."""
        for dim in self.dims:
            if operator.splittable(dim):
                return dim
        if any(dim in operator.dims for dim in self.blocked_by):
            return None
        return next((dim for dim in self.fallback if operator.splittable(dim)), None)


@dataclass(frozen=True)
class Step:
    """One collective of a redistribution: over `axes` jointly, `source` dim and `target` dim where they matter.

    `larger` is the tensor's placement on its larger side (before a scatter, after a gather): the local size under it
    is the size that `traffic` counts by.
    """

    collective: Collective
    axes: tuple[str, ...]
    source: str | None
    target: str | None
    larger: Placements


@dataclass(frozen=True)
class Transfer:
    """A step that a block needs: which tensor (or its gradient) moves, when, and for which operator."""

    tensor: str
    phase: Phase
    operator: str
    step: Step


@dataclass(frozen=True)
class OperatorLayout:
    """An operator under a split: the placement that each operand must have and that each result has."""

    operator: Operator
    split: Split
    inputs: tuple[Placements, ...]
    outputs: tuple[Placements, ...]


@dataclass(frozen=True)
class BlockLayout:
    """A block under the splits of its operators: what lies where, what moves, what is kept for the backward.

    `made` is the placement under which each tensor is produced (a parameter: under which it is stored, before state
    sharding). `kept` is the placement under which a tensor that some backward reads is held. `partial_gradients`
    names, per parameter, the axes over which its gradient is still a sum when the block's backward is done.
    """

    block: Block
    operators: tuple[OperatorLayout, ...]
    transfers: tuple[Transfer, ...]
    made: Mapping[str, Placements]
    kept: Mapping[str, Placements]
    partial_gradients: Mapping[str, tuple[str, ...]]

    @cached_property
    def boundary(self) -> tuple[tuple[str, Placements], ...]:
        """The tensors that leave the block, under the placement in which they leave."""
        return tuple((name, self.made[f"{name}@out"]) for name in self.block.outputs)


def operator_splits(block: Block, rules: Sequence[AxisRule]) -> dict[str, dict[str, str]]:
    """The split of every operator of a block, and of its boundary tensors, that the rules of the axes give."""
    boundary = [
        Operator(name=name, kind="boundary", spec=f"{' '.join(dims)} -> {' '.join(dims)}", inputs=(), outputs=())
        for name in (*block.inputs, *block.outputs)
        for dims in [block.tensor[name].dims]
    ]
    splits = {}
    for operator in (*block.operators, *boundary):
        chosen = {rule.axis: rule.choose(operator) for rule in rules}
        splits[operator.name] = {axis: dim for axis, dim in chosen.items() if dim is not None}
    return splits


def operand_placements(dims: Sequence[str], tensor: Tensor, split: Split) -> dict[str, Placement]:
    """Placement of an operand under an operator's split; `dims` by the operator's names, the answer by the tensor's."""
    names = dict(zip(dims, tensor.dims, strict=True))
    placements: dict[str, Placement] = {axis: Shard(names[dim]) for axis, dim in split.items() if dim in names}
    if can_be_summands(tensor):
        placements |= {axis: PARTIAL for axis, dim in split.items() if dim == SUMMANDS}
    return placements


def can_be_summands(tensor: Tensor) -> bool:
    """Whether a linear operator can take summands of a tensor: of activations, those that are numbers (an index or a
    mask is the same for all summands, and so are weights)."""
    is_number = tensor.dtype == "compute" or tensor.dtype.startswith(("float", "bfloat", "complex"))
    return tensor.role is Role.ACTIVATION and is_number


def lay_out_operator(block: Block, operator: Operator, split: Split) -> OperatorLayout:
    """The placements of an operator's operands and results under a split."""
    inputs = tuple(
        operand_placements(dims, block.tensor[name], split)
        for name, dims in zip(operator.inputs, operator.input_dims, strict=True)
    )
    outputs = []
    for name, dims in zip(operator.outputs, operator.output_dims, strict=True):
        placements = operand_placements(dims, block.tensor[name], split)
        placements |= {axis: PARTIAL for axis, dim in split.items() if dim not in dims}
        outputs.append(placements)
    return OperatorLayout(operator, split, inputs, tuple(outputs))


def redistribution(source: Placements, target: Placements, order: Sequence[str] = ()) -> tuple[Step, ...]:
    """The collectives that bring a tensor from one placement to another, those that shrink it first.

    Axes that make the same move make it together, as one collective over their product: the gradient's reduction over
    replicas, shards and context is one all-reduce.

    `order` names the mesh axes, outermost first. With it the steps are right for dims that several axes cut, one inside
    the other, and are executed as they stand (see `nested_redistribution`). Without it each axis moves as if it were
    alone on its dims.

    >>> [step.collective.value for step in redistribution({"tp": PARTIAL}, {"tp": Shard("seq")})]
    ['reduce_scatter']
    """
    if order:
        return nested_redistribution(source, target, order)
    moves: dict[tuple[Collective, str | None, str | None], list[str]] = {}
    for axis in dict.fromkeys((*source, *target)):
        before, after = source.get(axis, REPLICATE), target.get(axis, REPLICATE)
        if before != after:
            moves.setdefault(_move(axis, before, after), []).append(axis)
    steps = []
    current = dict(source)
    for key in sorted(moves, key=lambda key: _ORDER.index(key[0])):
        collective, from_dim, to_dim = key
        axes = tuple(sorted(moves[key]))
        before_step = dict(current)
        for axis in axes:
            current[axis] = Shard(to_dim) if to_dim is not None else REPLICATE
        larger = current if collective is Collective.ALL_GATHER else before_step
        steps.append(Step(collective, axes, from_dim, to_dim, dict(larger)))
    return tuple(steps)


def nested_redistribution(source: Placements, target: Placements, order: Sequence[str]) -> tuple[Step, ...]:
    """Steps that are right where several axes cut one dim, the piece of each cut again by the next inner one.

    What such a tensor's ranks hold is contiguous only in that order, so axes leave a dim innermost first and enter it
    behind those that are there; several that do so together are one collective, whose pieces count row-major over its
    axes. An axis that is in the way is gathered and sliced again at the end (a permutation of pieces would be cheaper
    where only the order changes; no plan that is any good needs one). Between any two steps each dim is cut by its axes
    in the order of the mesh. The steps depend on which dims are equal, not on what they are called.

    >>> steps = nested_redistribution({"x": Shard("a"), "y": Shard("a")}, {"y": Shard("a")}, ("x", "y"))
    >>> [(step.collective.value, step.axes) for step in steps]
    [('all_gather', ('x', 'y')), ('slice', ('y',))]
    """
    now: dict[str, Placement] = {axis: source.get(axis, REPLICATE) for axis in order}
    goal: dict[str, Placement] = {axis: target.get(axis, REPLICATE) for axis in order}
    assert set(order) >= {*source, *target}, (source, target, order)
    steps = []
    while now != goal:
        collective, axes, source_dim, target_dim = _next_move(now, goal)
        before = dict(now)
        after = REPLICATE if collective is not Collective.SUMMAND else PARTIAL
        now |= dict.fromkeys(axes, after if target_dim is None else Shard(target_dim))
        larger = now if collective in (Collective.ALL_GATHER, Collective.SUMMAND) else before
        held = {axis: placement for axis, placement in larger.items() if placement != REPLICATE}
        steps.append(Step(collective, axes, source_dim, target_dim, held))
    return tuple(steps)


#: A collective, its axes, the dim that they leave and the one that they enter.
_Nested = tuple[Collective, tuple[str, ...], str | None, str | None]


def _next_move(now: Mapping[str, Placement], goal: Mapping[str, Placement]) -> _Nested:
    """The next step: what shrinks the tensor as long as there is such, then what it costs to make room."""
    nests, goals = _nests(now), _nests(goal)
    # Axes that may enter each dim next, outermost first: those that follow in its goal what it has by now.
    entering = {dim: axes[len(nests.get(dim, ())) :] for dim, axes in goals.items() if _is_begun(nests, goals, dim)}
    for collective, placed in ((Collective.SLICE, REPLICATE), (Collective.REDUCE_SCATTER, PARTIAL)):
        for dim, axes in entering.items():
            if run := _run(axes, lambda axis, placed=placed: now[axis] == placed):  # type: ignore[misc]
                return collective, run, None, dim
    for dim, axes in entering.items():
        for leaving, nest in nests.items():
            for size in range(min(len(nest), len(axes)), 0, -1):
                if nest[-size:] == axes[:size]:
                    return Collective.ALL_TO_ALL, axes[:size], leaving, dim
    if reduced := tuple(axis for axis in now if now[axis] == PARTIAL != goal[axis]):
        return Collective.ALL_REDUCE, reduced, None, None
    # Of several gathers the one over the outermost axis, the slowest, goes first, as long as the tensor is small.
    outer_first = sorted(nests.items(), key=lambda item: list(now).index(item[1][-1]))
    for collective, placed in ((Collective.ALL_GATHER, REPLICATE), (Collective.SUMMAND, PARTIAL)):
        for dim, nest in outer_first:
            if run := _run(nest[::-1], lambda axis, placed=placed: goal[axis] == placed):  # type: ignore[misc]
                return collective, run[::-1], dim, None
    if summands := tuple(axis for axis in now if now[axis] == REPLICATE and goal[axis] == PARTIAL):
        return Collective.SUMMAND, summands, None, None
    # Nothing can move: something is in the way. What will be in the same dim again, but further in, goes first.
    inner_first = outer_first[::-1]
    for dim, nest in inner_first:
        kept = _run(tuple(zip(nest, goals.get(dim, ()), strict=False)), lambda pair: pair[0] == pair[1])
        if run := _run(nest[len(kept) :][::-1], lambda axis, dim=dim: goal[axis] in (Shard(dim), REPLICATE)):  # type: ignore[misc]
            return Collective.ALL_GATHER, run[::-1], dim, None
    dim, nest = next((dim, nest) for dim, nest in inner_first if goal[nest[-1]] != Shard(dim))
    return Collective.ALL_GATHER, nest[-1:], dim, None


def _nests(placements: Mapping[str, Placement]) -> dict[str, tuple[str, ...]]:
    """The axes that cut each dim, outermost first."""
    nests: dict[str, tuple[str, ...]] = {}
    for axis, placement in placements.items():
        if isinstance(placement, Shard):
            nests[placement.dim] = (*nests.get(placement.dim, ()), axis)
    return nests


def _is_begun(nests: Mapping[str, tuple[str, ...]], goals: Mapping[str, tuple[str, ...]], dim: str) -> bool:
    """Whether the axes that cut a dim are the first of those that will."""
    nest = nests.get(dim, ())
    return goals[dim][: len(nest)] == nest


def _run(items: Sequence[Any], holds: Callable[[Any], bool]) -> tuple[Any, ...]:
    """The first items, as long as something holds."""
    return tuple(takewhile(holds, items))


_ORDER = (
    Collective.SLICE,
    Collective.REDUCE_SCATTER,
    Collective.ALL_TO_ALL,
    Collective.ALL_REDUCE,
    Collective.ALL_GATHER,
)


def _move(axis: str, before: Placement, after: Placement) -> tuple[Collective, str | None, str | None]:
    match before, after:
        case Replicate(), Shard(dim):
            return Collective.SLICE, None, dim
        case Partial(), Replicate():
            return Collective.ALL_REDUCE, None, None
        case Partial(), Shard(dim):
            return Collective.REDUCE_SCATTER, None, dim
        case Shard(dim), Replicate():
            return Collective.ALL_GATHER, dim, None
        case Shard(from_dim), Shard(to_dim):
            return Collective.ALL_TO_ALL, from_dim, to_dim
    raise AssertionError(f"no operator asks for {after} of a {before} tensor (axis {axis})")


def gradient_placements(value: Placements, split: Split) -> dict[str, Placement]:
    """Placement of the gradient that an operator returns for an operand that it takes under `value`."""
    gradient = wanted_gradient(value)
    for axis in split:
        if value.get(axis, REPLICATE) == REPLICATE:
            gradient[axis] = PARTIAL
    return gradient


def wanted_gradient(made: Placements) -> dict[str, Placement]:
    """Placement in which a producer needs the gradient of its result: a shard for a shard, else the whole."""
    return {axis: placement for axis, placement in made.items() if isinstance(placement, Shard)}


@dataclass(frozen=True)
class Rest:
    """How a tensor lies at rest, and how its gradient does."""

    value: Placements
    gradient: Placements


def at_rest(split: Split) -> Rest:
    """The placements that the split of a tensor at rest means.

    >>> rest = at_rest({"x": "batch", "y": SPREAD})
    >>> [f"{axis}: {placement}" for axis, placement in rest.value.items()]
    ['x: Shard(batch)']
    >>> [f"{axis}: {placement}" for axis, placement in rest.gradient.items()]
    ['x: Shard(batch)', 'y: Partial']
    """
    value: dict[str, Placement] = {}
    gradient: dict[str, Placement] = {}
    for axis, dim in split.items():
        if dim == SPREAD:
            gradient[axis] = PARTIAL
        elif dim == SUMMANDS:
            value[axis] = PARTIAL
        else:
            value[axis] = gradient[axis] = Shard(dim)
    return Rest(value, gradient)


def rest_key(block: Block, name: str) -> str:
    """The key in the splits of a block under which a tensor at rest stands: its name, `@rest` behind it where an
    operator is called so too."""
    return f"{name}@rest" if any(operator.name == name for operator in block.operators) else name


def state_key(name: str) -> str:
    """The key in the splits of a block under which the training state of a parameter stands."""
    return f"{name}@state"


def hubs(block: Block) -> tuple[str, ...]:
    """The activations that lie at rest: those with several readers, kept for a backward, or handed over."""
    readers = Counter(name for operator in block.operators for name in operator.inputs)
    saved = {name for operator in block.operators for name in operator.saves}
    handed = {*block.inputs, *block.outputs}
    return tuple(
        tensor.name
        for tensor in block.tensors
        if tensor.role is Role.ACTIVATION
        and (readers[tensor.name] > 1 or tensor.name in saved or tensor.name in handed)
    )


def lay_out(block: Block, splits: Mapping[str, Split], *, keep_gathered: bool = False) -> BlockLayout:
    """Derive all that follows from the splits of a block's operators and boundary tensors.

    What is made in shards and read whole is kept in shards and gathered once more in the backward; with
    `keep_gathered` the gathered copy is kept instead.
    """
    layouts = tuple(lay_out_operator(block, operator, splits[operator.name]) for operator in block.operators)
    made: dict[str, Placements] = {name: _boundary(block, name, splits) for name in block.inputs}
    for layout in layouts:
        made |= dict(zip(layout.operator.outputs, layout.outputs, strict=True))
        for name, placements in zip(layout.operator.inputs, layout.inputs, strict=True):
            if block.tensor[name].role is not Role.ACTIVATION:
                made.setdefault(name, placements)
    uses = _uses(block, layouts, splits)
    transfers = [*_forward(made, uses), *_backward(block, made, uses)]
    kept = _kept(made, uses, layouts, keep_gathered)
    transfers += _regather(kept, uses, layouts)
    made |= {f"{name}@out": _boundary(block, name, splits) for name in block.outputs}
    return BlockLayout(block, layouts, tuple(transfers), made, kept, _partial_gradients(block, layouts))


def _boundary(block: Block, name: str, splits: Mapping[str, Split]) -> dict[str, Placement]:
    return {axis: Shard(dim) for axis, dim in splits[name].items()}


@dataclass(frozen=True)
class _Use:
    """An operator (or the block's exit) takes a tensor under a placement; its gradient comes back under another."""

    tensor: str
    operator: str
    value: Placements
    gradient: Placements


def _uses(block: Block, layouts: Iterable[OperatorLayout], splits: Mapping[str, Split]) -> list[_Use]:
    uses = [
        _Use(name, layout.operator.name, placements, gradient_placements(placements, layout.split))
        for layout in layouts
        for name, placements in zip(layout.operator.inputs, layout.inputs, strict=True)
        if block.tensor[name].role is Role.ACTIVATION
    ]
    for name in block.outputs:
        placements = _boundary(block, name, splits)
        uses.append(_Use(name, "exit", placements, placements))
    return uses


def _forward(made: Mapping[str, Placements], uses: Iterable[_Use]) -> Iterator[Transfer]:
    # A redistribution with several users is made once: q, k and v share the gather of their input.
    done = set()
    for use in uses:
        key = (use.tensor, frozenset(use.value.items()))
        if key not in done:
            done.add(key)
            for step in redistribution(made[use.tensor], use.value):
                yield Transfer(use.tensor, Phase.FORWARD, use.operator, step)


def _backward(block: Block, made: Mapping[str, Placements], uses: Iterable[_Use]) -> Iterator[Transfer]:
    # Gradients that come back under one placement are added where they are, then moved once.
    done = set()
    for use in uses:
        key = (use.tensor, frozenset(use.value.items()), frozenset(use.gradient.items()))
        if key not in done and block.tensor[use.tensor].differentiable:
            done.add(key)
            for step in redistribution(use.gradient, wanted_gradient(made[use.tensor])):
                yield Transfer(use.tensor, Phase.BACKWARD, use.operator, step)


def _kept(
    made: Mapping[str, Placements], uses: Iterable[_Use], layouts: Iterable[OperatorLayout], keep_gathered: bool
) -> dict[str, Placements]:
    """Saved tensors and how they lie: as made, but summed where they were made as summands, moved where they moved,
    and gathered where they were gathered if these copies are kept."""
    saved = {name for layout in layouts for name in layout.operator.saves}
    kept: dict[str, Placements] = {}
    for name in sorted(saved):
        taken = next((use.value for use in uses if use.tensor == name), None)
        placements = dict(made[name])
        for axis, placement in made[name].items():
            target = (taken or {}).get(axis, REPLICATE)
            stays = taken is None or not (keep_gathered or isinstance(target, Shard))
            if placement == PARTIAL or (isinstance(placement, Shard) and not stays):
                placements[axis] = target
        kept[name] = placements
    return kept


def _regather(
    kept: Mapping[str, Placements], uses: Iterable[_Use], layouts: Iterable[OperatorLayout]
) -> Iterator[Transfer]:
    """What is kept in shards and read whole in the backward is gathered once more there (2205.05198, section 4.2.2)."""
    readers = {layout.operator.name: set(layout.operator.saves) for layout in layouts}
    done = set()
    for use in uses:
        key = (use.tensor, frozenset(use.value.items()))
        if use.tensor in readers.get(use.operator, ()) and key not in done:
            done.add(key)
            for step in redistribution(kept[use.tensor], use.value):
                if step.collective is not Collective.SLICE:
                    yield Transfer(use.tensor, Phase.REGATHER, use.operator, step)


def _partial_gradients(block: Block, layouts: Iterable[OperatorLayout]) -> dict[str, tuple[str, ...]]:
    axes: dict[str, dict[str, None]] = {tensor.name: {} for tensor in block.parameters}
    for layout in layouts:
        for name, placements in zip(layout.operator.inputs, layout.inputs, strict=True):
            if name in axes:
                gradient = gradient_placements(placements, layout.split)
                axes[name] |= {axis: None for axis, placement in gradient.items() if placement == PARTIAL}
    return {name: tuple(found) for name, found in axes.items()}


# --- sizes: numbers or columns of numbers ---------------------------------------------------------------------------


def local_numel(
    dims: Sequence[str], placements: Placements, sizes: Mapping[str, Any], degrees: Mapping[str, Any]
) -> Any:
    """Elements on the fullest rank of a tensor: each dim divided, rounded up, by the axes that shard it.

    `sizes` gives each dim's size, `degrees` each axis's; both numbers or arrays that broadcast.

    >>> local_numel(("vocab", "hidden"), {"tp": Shard("vocab")}, {"vocab": 50257, "hidden": 768}, {"tp": 4})
    9649920
    """
    # A dim that stands twice (scores: queries by keys) is split in one of its places.
    split = math.prod(local_size(dim, placements, sizes, degrees) for dim in dict.fromkeys(dims))
    numel = split * math.prod(sizes[dim] for position, dim in enumerate(dims) if dim in dims[:position])
    flat = shard_degree(FLAT, placements, degrees)
    return -(-numel // flat)


def local_size(dim: str, placements: Placements, sizes: Mapping[str, Any], degrees: Mapping[str, Any]) -> Any:
    """Size of one dim on the fullest rank."""
    return fullest(sizes[dim], shard_degree(dim, placements, degrees))


def fullest(size: Any, degree: Any) -> Any:
    """The largest of `degree` pieces of a size: rounded up, or as it is where the size is a mean.

    >>> fullest(10, 4), fullest(10.0, 4)
    (3, 2.5)
    """
    is_mean = isinstance(size, float) or getattr(size, "dtype", np.dtype(int)).kind == "f"
    return size / degree if is_mean else -(-size // degree)


def shard_degree(dim: str, placements: Placements, degrees: Mapping[str, Any]) -> Any:
    """Into how many pieces `dim` is cut."""
    return math.prod(degrees[axis] for axis, placement in placements.items() if placement == Shard(dim))


def group_size(axes: Iterable[str], degrees: Mapping[str, Any]) -> Any:
    """Ranks in a group over `axes`."""
    return math.prod(degrees[axis] for axis in axes)


def traffic(collective: Collective, num_ranks: Any, size: Any) -> Any:
    """What each rank sends of a collective over `num_ranks`, in units of `size`, the larger side's local size.

    Bandwidth-optimal algorithms (Thakur et al. 2005): an all-gather, reduce-scatter or all-to-all sends (n-1)/n of
    it, an all-reduce twice that.

    >>> traffic(Collective.ALL_REDUCE, 8, 1024.0)
    1792.0
    """
    share = (num_ranks - 1) / num_ranks
    match collective:
        case Collective.SLICE | Collective.SUMMAND:
            return 0.0 * share * size
        case Collective.ALL_REDUCE:
            return 2 * share * size
        case _:
            return share * size


# --- training state ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StatePlacement:
    """How a parameter's training state lies over the axes of the data: the ZeRO levels are four of these.

    `axes` are the mesh axes over which state is sharded. Each flag says whether the parameter at rest, the gradient
    as it is accumulated, and the optimizer's state are sharded. ZeRO: Rajbhandari et al. 1910.02054, section 5.
    """

    axes: tuple[str, ...]
    parameter: bool = False
    gradient: bool = False
    optimizer: bool = False


def zero_placement(level: int, axes: tuple[str, ...]) -> StatePlacement:
    """State placement of ZeRO level 0-3 over `axes`."""
    return StatePlacement(axes, parameter=level >= 3, gradient=level >= 2, optimizer=level >= 1)


@dataclass(frozen=True)
class StateTransfers:
    """What training state moves: at each use in forward and backward, at each microbatch's end, and once a step."""

    each_use: tuple[Step, ...]
    each_backward: tuple[Step, ...]
    step_gradient: tuple[Step, ...]
    step_parameter: tuple[Step, ...]


@dataclass(frozen=True)
class StateLayout:
    """Where one parameter's training state lies: in computation, at rest, its gradient as it comes from a backward and
    as it is accumulated, and the update."""

    whole: Placements
    at_rest: Placements
    gradient: Placements
    resting: Placements
    update: Placements


def shards_of(stored: Placements, state: StatePlacement) -> tuple[str, ...]:
    """The axes over which the state of a parameter `stored` so is sharded: those along which it is otherwise copied."""
    return tuple(axis for axis in state.axes if stored.get(axis, REPLICATE) == REPLICATE)


def state_layout(stored: Placements, partial: Sequence[str], state: StatePlacement) -> StateLayout:
    """The placements of a parameter `stored` so in computation, whose gradient is a sum over the axes `partial`."""
    shards: dict[str, Placement] = {axis: Shard(FLAT) for axis in shards_of(stored, state)}
    whole = dict(stored)
    gradient: Placements = {**whole, **dict.fromkeys(partial, PARTIAL)}
    return StateLayout(
        whole=whole,
        at_rest={**whole, **shards} if state.parameter else whole,
        gradient=gradient,
        resting={**gradient, **shards} if state.gradient else gradient,
        update={**whole, **shards} if state.optimizer else whole,
    )


def state_transfers(stored: Placements, partial: Sequence[str], state: StatePlacement) -> StateTransfers:
    """The redistributions of one parameter and its gradient that follow from where its state lies.

    The gradient is accumulated as it comes, or sharded at the end of each microbatch's backward where it rests
    sharded; the update needs it as the optimizer's state lies; the new parameter goes back to where parameters rest.
    """
    lies = state_layout(stored, partial, state)
    return StateTransfers(
        each_use=redistribution(lies.at_rest, lies.whole),
        each_backward=redistribution(lies.gradient, lies.resting),
        step_gradient=redistribution(lies.resting, lies.update),
        step_parameter=redistribution(lies.update, lies.at_rest),
    )


def tensor_numel(tensor: Tensor, sizes: Mapping[str, Any]) -> Any:
    """Elements of the whole tensor."""
    return math.prod(sizes[dim] for dim in tensor.dims)
