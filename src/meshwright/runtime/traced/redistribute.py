"""A local tensor brought along the planner's own steps, and its gradient brought back.

The steps of `sharding.redistribution` with an order of axes are exact for nested dims, so each is carried out as it
stands: ranks that differ in the step's axes form a group, numbered row-major over them. An array whose dims are
products of named dims is opened to these (a view), moved, and closed again, so that a piece of any of them is
contiguous where it has to be. Pieces are equal: plans that do not divide are not legal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.io.traced import Factors
from meshwright.runtime.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from meshwright.runtime.mesh import Mesh
from meshwright.sharding import Collective, Placements, Step, redistribution, shard_degree


@dataclass(frozen=True)
class Arrangement:
    """An array whose dims are products of named dims, under a placement: what a rank needs to open it."""

    factors: Factors
    sizes: Mapping[str, int]
    placements: Placements

    @property
    def dims(self) -> tuple[str, ...]:
        """All named dims, outermost first."""
        return tuple(dim for dims in self.factors for dim in dims)

    def opened(self, degrees: Mapping[str, int]) -> tuple[int, ...]:
        """The local size of each named dim."""
        return tuple(self.sizes[dim] // shard_degree(dim, self.placements, degrees) for dim in self.dims)

    def shape(self, degrees: Mapping[str, int]) -> tuple[int, ...]:
        """The local shape of the array."""
        local = dict(zip(self.dims, self.opened(degrees), strict=True))
        return tuple(math.prod(local[dim] for dim in dims) for dims in self.factors)


@dataclass(frozen=True)
class Redistribution:
    """The way of a tensor from one placement to another."""

    source: Arrangement
    target: Arrangement
    steps: tuple[Step, ...]

    def __call__(self, x: Tensor, mesh: Mesh) -> Tensor:
        """The local tensor after all steps."""
        if not self.steps:
            return x
        degrees = {axis.name: axis.size for axis in mesh.axes}
        x, dims = x.reshape(self.source.opened(degrees)), self.source.dims
        for step in self.steps:
            x = _carry_out(step, x, dims, mesh)
        return x.reshape(self.target.shape(degrees))


def way(
    factors: Factors, sizes: Mapping[str, int], source: Placements, target: Placements, mesh: Mesh
) -> Redistribution:
    """The steps that bring an array from `source` to `target`."""
    order = tuple(axis.name for axis in mesh.axes)
    steps = redistribution(source, target, order) if order else ()
    return Redistribution(Arrangement(factors, sizes, source), Arrangement(factors, sizes, target), steps)


def _carry_out(step: Step, x: Tensor, dims: Sequence[str], mesh: Mesh) -> Tensor:
    count = mesh.degree(step.axes)
    source = None if step.source is None else dims.index(step.source)
    target = None if step.target is None else dims.index(step.target)
    own = mesh.members(step.axes).index(mesh.rank)
    match step.collective:
        case Collective.SLICE:
            assert target is not None
            return x.narrow(target, own * (x.shape[target] // count), x.shape[target] // count)
        case Collective.SUMMAND:
            if source is None:
                return x if own == 0 else torch.zeros_like(x)
            padded = x.new_zeros([size * (count if dim == source else 1) for dim, size in enumerate(x.shape)])
            padded.narrow(source, own * x.shape[source], x.shape[source]).copy_(x)
            return padded
        case Collective.ALL_REDUCE:
            return all_reduce(x, mesh.group(step.axes))
        case Collective.ALL_GATHER:
            assert source is not None
            return all_gather(x, source, [x.shape[source]] * count, mesh.group(step.axes))
        case Collective.REDUCE_SCATTER:
            assert target is not None
            return reduce_scatter(x, target, [x.shape[target] // count] * count, mesh.group(step.axes))
        case Collective.ALL_TO_ALL:
            assert source is not None
            assert target is not None
            leaves = source, [x.shape[source]] * count
            enters = target, [x.shape[target] // count] * count
            return all_to_all(x, leaves, enters, mesh.group(step.axes))


# --- with its gradient ------------------------------------------------------------------------------------------------


def redistribute(x: Tensor, forward: Redistribution, backward: Redistribution, mesh: Mesh) -> Tensor:
    """The tensor at its target; its gradient, which comes there under the source of `backward`, goes to the target of
    that."""
    if not forward.steps and not backward.steps:
        return x
    if not x.is_floating_point() or not x.requires_grad:
        return forward(x.detach(), mesh)
    result: Tensor = _Redistribute.apply(x, forward, backward, mesh)
    return result


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Redistribution, backward: Redistribution, mesh: Mesh) -> Tensor:
        ctx.back, ctx.mesh = backward, mesh
        moved = forward(x, mesh)
        return moved.view_as(moved)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(gradient, ctx.mesh), None, None, None


# --- halos ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Halo:
    """Rows that a rank reads beyond the ends of its piece of an array's dim, which `axes` cut."""

    dim: int
    before: int
    after: int
    axes: tuple[str, ...]


def with_halo(x: Tensor, halo: Halo, mesh: Mesh) -> Tensor:
    """A local array with its neighbours' rows at both ends of a dim, zeros where the array ends; the gradient of those
    rows goes back to whom they belong."""
    if not halo.before and not halo.after:
        return x
    result: Tensor = _Extend.apply(x, halo, mesh)
    return result


class _Extend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, halo: Halo, mesh: Mesh) -> Tensor:
        ctx.halo, ctx.mesh = halo, mesh
        rows = x.movedim(halo.dim, 0).contiguous()
        length = rows.shape[0]
        lent, borrowed = _exchanged(length, halo, mesh)
        sent = [rows[start:stop] for start, stop in lent]
        parts = _swap(sent, [stop - start for start, stop in borrowed], halo, mesh)
        whole = rows.new_zeros((halo.before + length + halo.after, *rows.shape[1:]))
        whole[halo.before : halo.before + length] = rows
        for part, (start, stop) in zip(parts, borrowed, strict=True):
            whole[start:stop] = part
        return whole.movedim(0, halo.dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        halo, mesh = ctx.halo, ctx.mesh
        rows = gradient.movedim(halo.dim, 0)
        length = rows.shape[0] - halo.before - halo.after
        lent, borrowed = _exchanged(length, halo, mesh)
        sent = [rows[start:stop].contiguous() for start, stop in borrowed]
        parts = _swap(sent, [stop - start for start, stop in lent], halo, mesh)
        own = rows[halo.before : halo.before + length].clone()
        for part, (start, stop) in zip(parts, lent, strict=True):
            own[start:stop] += part
        return own.movedim(0, halo.dim), None, None


def _exchanged(length: int, halo: Halo, mesh: Mesh) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """With each rank of the group: the rows of this rank's piece that the other reads, and the rows of this rank's
    extended piece that the other has."""
    members = mesh.members(halo.axes)
    own = members.index(mesh.rank)
    lent, borrowed = [], []
    for other in range(len(members)):
        lent.append(_overlap(own, other, length, halo, other * length - halo.before, own * length))
        borrowed.append(_overlap(other, own, length, halo, own * length - halo.before, own * length - halo.before))
    return lent, borrowed


def _overlap(owner: int, reader: int, length: int, halo: Halo, first: int, origin: int) -> tuple[int, int]:
    """Rows of `owner` that `reader` reads (from row `first` of the whole), counted from `origin`."""
    if owner == reader:
        return 0, 0
    start = max(first, owner * length)
    stop = min(first + halo.before + length + halo.after, (owner + 1) * length)
    return (start - origin, stop - origin) if stop > start else (0, 0)


def _swap(sent: Sequence[Tensor], lengths: Sequence[int], halo: Halo, mesh: Mesh) -> list[Tensor]:
    """What the ranks of the group send one another: `lengths` rows come from each."""
    trailing = sent[0].shape[1:]
    width = math.prod(trailing)
    received = sent[0].new_empty(sum(lengths) * width)
    numels = [length * width for length in lengths]
    flat = torch.cat([part.flatten() for part in sent])
    dist.all_to_all_single(received, flat, numels, [part.numel() for part in sent], group=mesh.group(halo.axes))
    parts = received.split(numels)
    return [part.view(length, *trailing) for part, length in zip(parts, lengths, strict=True)]
