"""Redistributions on local tensors: what `sharding.redistribution` derives, carried out by Gloo, and its gradient.

Forward brings a tensor from the placement under which it was made to the one under which it is used; backward brings
the gradient from the placement under which the operator returns it to the one that the producer wants. Both are lists
of the same few steps, so autograd needs one function here and no derivative of any collective.

Pieces need not be equal (a padded vocabulary): gathers pad to the longest piece and cut again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.runtime.mesh import Mesh, splitting_axes
from meshwright.sharding import REPLICATE, Collective, Placements, Shard, Step, redistribution


@dataclass(frozen=True)
class Route:
    """The steps from one placement to another; each knows the placements before it."""

    steps: tuple[tuple[Step, Placements], ...]

    def __bool__(self) -> bool:
        return bool(self.steps)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The sets of axes whose ranks talk."""
        return tuple(step.axes for step, _ in self.steps if step.collective is not Collective.SLICE)


def route(source: Placements, target: Placements, mesh: Mesh) -> Route:
    """The steps that bring a tensor from `source` to `target`.

    A piece is contiguous only where the axis that comes or goes is the innermost that splits the dim. Where it is not,
    the tensor is brought together whole and cut anew: right, and dear; no uniform strategy has it.
    """
    direct = _with_placements(redistribution(source, target), source)
    if all(_is_innermost(step, before, mesh) for step, before in direct):
        return Route(direct)
    together = _with_placements(redistribution(source, {}), source)
    return Route((*together, *_with_placements(redistribution({}, target), {})))


def _with_placements(steps: Iterable[Step], source: Placements) -> tuple[tuple[Step, Placements], ...]:
    current = dict(source)
    found = []
    for step in steps:
        found.append((step, dict(current)))
        after = REPLICATE if step.target is None else Shard(step.target)
        current |= dict.fromkeys(step.axes, after)
    return tuple(found)


def _is_innermost(step: Step, before: Placements, mesh: Mesh) -> bool:
    for dim in (step.source, step.target):
        if dim is not None:
            axes = mesh.ordered({*splitting_axes(before, dim), *step.axes})
            if axes[len(axes) - len(step.axes) :] != mesh.ordered(step.axes):
                return False
    return True


# --- one step -------------------------------------------------------------------------------------------------------


def carry_out(x: Tensor, dims: Sequence[str], sizes: Mapping[str, int], way: Route, mesh: Mesh) -> Tensor:
    """The local tensor after all steps of `way`; `sizes` are those of the whole dims."""
    for step, before in way.steps:
        if mesh.degree(step.axes) == 1:
            continue
        x = _STEPS[step.collective](x, dims, sizes, step, before, mesh)
    return x


def _slice(
    x: Tensor, dims: Sequence[str], sizes: Mapping[str, int], step: Step, before: Placements, mesh: Mesh
) -> Tensor:
    assert step.target is not None
    axes = splitting_axes(before, step.target)
    start, _ = mesh.extent(sizes[step.target], axes)
    low, high = mesh.extent(sizes[step.target], (*axes, *step.axes))
    return x.narrow(dims.index(step.target), low - start, high - low)


def _all_reduce(
    x: Tensor, dims: Sequence[str], sizes: Mapping[str, int], step: Step, before: Placements, mesh: Mesh
) -> Tensor:
    return all_reduce(x, mesh.group(step.axes))


def _all_gather(
    x: Tensor, dims: Sequence[str], sizes: Mapping[str, int], step: Step, before: Placements, mesh: Mesh
) -> Tensor:
    assert step.source is not None
    pieces = mesh.pieces(sizes[step.source], splitting_axes(before, step.source), step.axes)
    lengths = [high - low for low, high in pieces]
    return all_gather(x, dims.index(step.source), lengths, mesh.group(step.axes))


def _reduce_scatter(
    x: Tensor, dims: Sequence[str], sizes: Mapping[str, int], step: Step, before: Placements, mesh: Mesh
) -> Tensor:
    assert step.target is not None
    axes = (*splitting_axes(before, step.target), *step.axes)
    lengths = [high - low for low, high in mesh.pieces(sizes[step.target], axes, step.axes)]
    return reduce_scatter(x, dims.index(step.target), lengths, mesh.group(step.axes))


def _all_to_all(
    x: Tensor, dims: Sequence[str], sizes: Mapping[str, int], step: Step, before: Placements, mesh: Mesh
) -> Tensor:
    assert step.source is not None
    assert step.target is not None
    mine = list(mesh.pieces(sizes[step.source], splitting_axes(before, step.source), step.axes))
    theirs = list(mesh.pieces(sizes[step.target], (*splitting_axes(before, step.target), *step.axes), step.axes))
    return all_to_all(
        x,
        (dims.index(step.source), [high - low for low, high in mine]),
        (dims.index(step.target), [high - low for low, high in theirs]),
        mesh.group(step.axes),
    )


_STEPS = {
    Collective.SLICE: _slice,
    Collective.ALL_REDUCE: _all_reduce,
    Collective.ALL_GATHER: _all_gather,
    Collective.REDUCE_SCATTER: _reduce_scatter,
    Collective.ALL_TO_ALL: _all_to_all,
}


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or another reduction) over the group, as a new tensor."""
    result = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=op, group=group)
    return result


def all_gather(x: Tensor, dim: int, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The pieces of all ranks, `lengths` long, one after the other along `dim`."""
    longest = max(lengths)
    piece = _padded(x.movedim(dim, 0), longest)
    result = piece.new_empty((len(lengths) * longest, *piece.shape[1:]))
    dist.all_gather_single(result, piece, group=group)
    if any(length != longest for length in lengths):
        result = torch.cat([part[:length] for part, length in zip(result.split(longest), lengths, strict=True)])
    return result.movedim(0, dim)


def reduce_scatter(x: Tensor, dim: int, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's piece, of pieces `lengths` long along `dim`, of the sum over the group."""
    longest = max(lengths)
    moved = x.movedim(dim, 0)
    if any(length != longest for length in lengths):
        moved = torch.cat([_padded(part, longest) for part in moved.split(list(lengths))])
    result = moved.new_empty((longest, *moved.shape[1:]))
    dist.reduce_scatter_single(result, moved.contiguous(), group=group)
    return result[: lengths[dist.get_rank(group)]].movedim(0, dim)


def all_to_all(
    x: Tensor, source: tuple[int, Sequence[int]], target: tuple[int, Sequence[int]], group: dist.ProcessGroup
) -> Tensor:
    """From pieces along the `source` dim to pieces along the `target` dim; each is a dim and all pieces' lengths."""
    (source_dim, source_lengths), (target_dim, target_lengths) = source, target
    parts = [part.contiguous() for part in x.split(list(target_lengths), target_dim)]
    shape = list(parts[dist.get_rank(group)].shape)
    shapes = [[*shape[:source_dim], length, *shape[source_dim + 1 :]] for length in source_lengths]
    numels = [torch.Size(shape).numel() for shape in shapes]
    received = x.new_empty(sum(numels))
    sent = torch.cat([part.flatten() for part in parts])
    dist.all_to_all_single(received, sent, numels, [part.numel() for part in parts], group=group)
    arrived = zip(received.split(numels), shapes, strict=True)
    return torch.cat([flat.view(shape) for flat, shape in arrived], source_dim)


def _padded(x: Tensor, length: int) -> Tensor:
    if x.shape[0] == length:
        return x.contiguous()
    return torch.cat([x, x.new_zeros((length - x.shape[0], *x.shape[1:]))])


# --- with its gradient ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Move:
    """A tensor taken under one placement by operators whose gradients come back under one or several placements."""

    tensor: str
    dims: tuple[str, ...]
    forward: Route
    backward: tuple[Route, ...]

    def __call__(self, x: Tensor, sizes: Mapping[str, int], mesh: Mesh) -> tuple[Tensor, ...]:
        """The tensor where it is used, once per entry of `backward`: each copy brings its gradient back its own way."""
        if not self.forward and not any(self.backward):
            return (x,) * len(self.backward)
        result: tuple[Tensor, ...] = _Redistribute.apply(x, self, sizes, mesh)
        return result


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Move, sizes: Mapping[str, int], mesh: Mesh) -> tuple[Tensor, ...]:
        ctx.move, ctx.sizes, ctx.mesh = move, sizes, mesh
        ctx.set_materialize_grads(False)
        moved = carry_out(x, move.dims, sizes, move.forward, mesh)
        return tuple(moved.view_as(moved) for _ in move.backward)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        move, total = ctx.move, None
        for gradient, way in zip(gradients, move.backward, strict=True):
            if gradient is not None:
                part = carry_out(gradient, move.dims, ctx.sizes, way, ctx.mesh)
                total = part if total is None else total + part
        return total, None, None, None
