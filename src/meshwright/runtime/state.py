"""Training state on one rank: parameters, gradients and optimizer, as `sharding.state_transfers` says where they lie.

The parameters of a block whose gradients are sums over the same axes form one flat run (`FlatGroup`), so that a block
talks once and not once per tensor. Where state is sharded, each rank of the state axes has an equal piece of that run:

- at rest: the whole run or a piece of it (ZeRO 3), gathered at each use, and once more in the backward;
- the gradient: accumulated whole, or reduced to the piece at the end of each microbatch's backward (ZeRO 2 and 3), of
  its weight gradients where the schedule puts those off;
- the update: once a step the gradient is brought to where the optimizer's state lies, and the new parameter back.

Which collectives these are is derived, not written here: HSDP, ZeRO over data and context, norms whose gradient is also
a sum over tensor ranks are other placements of the same run. That is why this is not `fully_shard`: FSDP2 reduces over
its own one or two mesh dims alone, keeps gradients whole until the last microbatch under a pipeline, and is silently
wrong with some schedules; `tests/test_runtime_fsdp2.py` takes it as a judge instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from meshwright.runtime.collectives import Route, all_reduce, carry_out, route
from meshwright.runtime.later import Landing, Later, Place
from meshwright.runtime.mesh import Mesh
from meshwright.sharding import FLAT, Placements, StatePlacement, state_layout

Views = tuple[Tensor, ...]


@dataclass(frozen=True)
class Member:
    """One parameter of one block instance: its name, its dims, how it lies, and its local shape."""

    name: str
    dims: tuple[str, ...]
    stored: Placements
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StateRoutes:
    """`sharding.StateTransfers` of one flat run, ready to be carried out."""

    each_use: Route
    each_backward: Route
    step_gradient: Route
    step_parameter: Route
    gather_update: Route

    @property
    def groups(self) -> frozenset[tuple[str, ...]]:
        """The sets of axes over which state moves."""
        ways = (self.each_use, self.each_backward, self.step_gradient, self.step_parameter, self.gather_update)
        return frozenset(axes for way in ways for axes in way.groups)


def state_routes(partial: Sequence[str], state: StatePlacement, mesh: Mesh) -> StateRoutes:
    """The routes of a run whose gradient is a sum over `partial`: the moves of `sharding.state_transfers`."""
    lies = state_layout({}, partial, state)
    return StateRoutes(
        each_use=route(lies.at_rest, lies.whole, mesh),
        each_backward=route(lies.gradient, lies.resting, mesh),
        step_gradient=route(lies.resting, lies.update, mesh),
        step_parameter=route(lies.update, lies.at_rest, mesh),
        gather_update=route(lies.update, lies.whole, mesh),
    )


class FlatGroup:
    """A flat run of parameters and its state. `leaf` is what autograd differentiates, `update` what is optimized."""

    def __init__(
        self,
        members: Sequence[Member],
        routes: StateRoutes,
        state: StatePlacement,
        mesh: Mesh,
        dtype: torch.dtype,
        fill: Callable[[Member], Tensor],
    ) -> None:
        self.members, self.routes, self.mesh = tuple(members), routes, mesh
        self.numels = [torch.Size(member.shape).numel() for member in members]
        degree = mesh.degree(state.axes)
        self.sizes = {FLAT: max(1, -(-sum(self.numels) // degree)) * degree}
        whole = torch.zeros(self.sizes[FLAT], dtype=dtype)
        for view, member in zip(self.views(whole), members, strict=True):
            view.copy_(fill(member))
        piece = slice(*mesh.extent(self.sizes[FLAT], state.axes))
        self.whole = None if state.parameter else whole
        at_rest = whole[piece].clone() if state.parameter else whole
        self.leaf = nn.Parameter(whole[piece] if state.gradient and not state.parameter else at_rest)
        self.update = nn.Parameter(whole[piece]) if state.optimizer and not state.gradient else self.leaf

    def views(self, run: Tensor) -> Views:
        """The parameters in a whole run."""
        parts = run[: sum(self.numels)].split(self.numels)
        return tuple(part.view(member.shape) for part, member in zip(parts, self.members, strict=True))

    def gather(self) -> Tensor:
        """The whole run as computation needs it."""
        if self.whole is not None:
            return self.whole
        return carry_out(self.leaf.detach(), (FLAT,), self.sizes, self.routes.each_use, self.mesh)

    def reduce(self) -> None:
        """Bring the step's gradient to where the optimizer needs it."""
        gradient = self.leaf.grad
        if gradient is None:  # no microbatch used it: possible only for a model without a use of the parameter
            gradient = torch.zeros_like(self.leaf)
        self.leaf.grad = None
        self.update.grad = carry_out(gradient, (FLAT,), self.sizes, self.routes.step_gradient, self.mesh)

    def publish(self) -> None:
        """Bring the updated parameter to where parameters rest."""
        if self.routes.step_parameter:
            assert self.whole is not None
            updated = self.update.detach()
            self.whole.copy_(carry_out(updated, (FLAT,), self.sizes, self.routes.step_parameter, self.mesh))

    def whole_gradient(self) -> Tensor:
        """The reduced gradient of the whole run."""
        assert self.update.grad is not None
        return carry_out(self.update.grad, (FLAT,), self.sizes, self.routes.gather_update, self.mesh)


@dataclass
class _Gathered:
    """A run gathered for one use of a block; the backward gathers it again, and keeps it until it has its gradient."""

    group: FlatGroup
    landing: Landing | None = None
    again: Tensor | None = None

    def strided(self, size: torch.Size, stride: tuple[int, ...], offset: int) -> Tensor:
        if self.again is None:
            self.again = self.group.gather()
        return self.again.as_strided(size, stride, offset)


class _Use(torch.autograd.Function):
    """From the leaf to the parameters, and from their gradients to the leaf's."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, gathered: _Gathered, whole: Tensor) -> Views:
        ctx.gathered = gathered
        ctx.set_materialize_grads(False)
        return gathered.group.views(whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        group, landing = ctx.gathered.group, ctx.gathered.landing
        ctx.gathered.again = None
        if landing is None:
            return _resting_gradient(group, gradients), None, None
        landing.later.works.append(partial(_land, group, landing, gradients))
        return None, None, None


def _resting_gradient(group: FlatGroup, gradients: Sequence[Tensor | None], landing: Landing | None = None) -> Tensor:
    """The gradient of one use as the leaf has it, of those at hand and the products that have waited."""
    run = group.leaf.new_zeros(group.sizes[FLAT])
    views = group.views(run)
    for view, gradient in zip(views, gradients, strict=True):
        if gradient is not None:
            view.copy_(gradient)
    if landing is not None:
        for position, product in landing.products:
            views[position].add_(product())
        landing.products.clear()
    return carry_out(run, (FLAT,), group.sizes, group.routes.each_backward, group.mesh)


def _land(group: FlatGroup, landing: Landing, gradients: Sequence[Tensor | None]) -> None:
    """What autograd does at a leaf."""
    found = _resting_gradient(group, gradients, landing)
    group.leaf.grad = found if group.leaf.grad is None else group.leaf.grad.add_(found)


@dataclass
class Parameters:
    """The parameters of one block instance, by the block's names for them, out of one or several flat runs."""

    names: tuple[tuple[FlatGroup, tuple[str, ...]], ...]
    _in_use: dict[int, _Gathered] = field(default_factory=dict)

    def use(self) -> dict[str, Tensor]:
        """The parameters, whole along the state axes; their gradients find their way back."""
        return self._use(None)[0]

    def use_later(self, later: Later) -> tuple[dict[str, Tensor], dict[str, Place]]:
        """The same, but gradients find their way back when `later` is run; products leave theirs at the places."""
        return self._use(later)

    def _use(self, later: Later | None) -> tuple[dict[str, Tensor], dict[str, Place]]:
        found: dict[str, Tensor] = {}
        places: dict[str, Place] = {}
        for group, names in self.names:
            landing = None if later is None else Landing(later)
            whole, gathered = group.gather(), _Gathered(group, landing)
            if group.whole is None:
                self._in_use[whole.untyped_storage().data_ptr()] = gathered
            views: Views = _Use.apply(group.leaf, gathered, whole)
            found |= dict(zip(names, views, strict=True))
            if landing is not None:
                places |= {name: (landing, position) for position, name in enumerate(names)}
        return found, places

    @contextmanager
    def gathered_again_in_backward(self) -> Iterator[None]:
        """Within: what autograd saves of a gathered run is not kept; the backward gathers the run once more."""
        in_use = self._in_use

        def pack(tensor: Tensor) -> Any:
            gathered = in_use.get(tensor.untyped_storage().data_ptr()) if in_use else None
            return tensor if gathered is None else (gathered, tensor.size(), tensor.stride(), tensor.storage_offset())

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else packed[0].strided(*packed[1:])

        if all(group.whole is not None for group, _ in self.names):
            yield
            return
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                yield
        finally:
            in_use.clear()


@dataclass(frozen=True)
class Tie:
    """Two equal copies of one parameter: their gradients are summed, here or with the rank that has the other."""

    group: FlatGroup
    other: FlatGroup | None
    peers: dist.ProcessGroup | None


@dataclass
class TrainingState:
    """All flat runs of a rank and their optimizer."""

    groups: list[FlatGroup]
    ties: list[Tie]
    optimizer: torch.optim.Optimizer | None = None

    def __post_init__(self) -> None:
        # A rank of a pipeline may hold no parameters at all; an optimizer refuses to be empty.
        if self.groups:
            self.optimizer = adamw(group.update for group in self.groups)

    def reduce(self) -> None:
        """After the last microbatch: sum the gradients over the ranks that have a part of them."""
        for group in self.groups:
            group.reduce()
        for tie in self.ties:
            mine = tie.group.update.grad
            assert mine is not None
            if tie.peers is not None:
                tie.group.update.grad = all_reduce(mine, tie.peers)
            elif tie.other is not None:
                assert tie.other.update.grad is not None
                total = mine + tie.other.update.grad
                tie.group.update.grad, tie.other.update.grad = total, total.clone()

    def step(self) -> None:
        """Update the parameters and forget the gradients."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        for group in self.groups:
            group.publish()


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of every run; its decay is 0 so that padding stays 0 and tests see gradients alone."""
    return torch.optim.AdamW(list(parameters), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, foreach=False)
