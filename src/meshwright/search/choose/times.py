"""The times at which the memory limit of an instance can be broken, few of the many at which usage changes.

Legend: T times kept, U usages, C strategies of all nodes, V entries of all usages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from meshwright.choice import Array, Instance

#: Sums of usages may exceed the limit by this share before they count as too much, as in `choice.is_legal`.
ROUNDING = 1e-12


@dataclass(frozen=True, eq=False)
class Timeline:
    """Usage u is held at the kept times `first_U[u]` up to, not including, `stop_U[u]` (indices into `times_T`).

    A time is kept where the usages held then are not all held at the next start too, and where the most that they
    can be together exceeds the limit. A choice within the limit at these times is so at all times.
    """

    instance: Instance
    times_T: Array
    first_U: Array
    stop_U: Array

    @property
    def num_times(self) -> int:
        """T."""
        return len(self.times_T)

    @cached_property
    def most(self) -> float:
        """The limit with its rounding."""
        return self.instance.limit * (1 + ROUNDING)

    @cached_property
    def place_V(self) -> Array:
        """Of each entry of the usages the strategy, among all nodes', that it belongs to."""
        return places_of_usages(self.instance)

    def held(self, amounts_U: Array) -> Array:
        """What is in use at each kept time where usage u amounts to `amounts_U[u]`."""
        return _held(self.first_U, self.stop_U, amounts_U, self.num_times)

    def used(self, choice_N: Array) -> Array:
        """What a choice has in use at each kept time."""
        instance = self.instance
        return self.held(instance.usage_V[instance.usage_first_U[:-1] + choice_N[instance.usage_node_U]])

    def priced(self, price_T: Array) -> Array:
        """For each strategy of all nodes, what it uses times the price of the times at which it does."""
        instance = self.instance
        so_far = np.concatenate([[0.0], np.cumsum(price_T)])
        price_U = so_far[self.stop_U] - so_far[self.first_U]
        price_V = np.repeat(np.maximum(price_U, 0.0), np.diff(instance.usage_first_U)) * instance.usage_V
        return np.bincount(self.place_V, price_V, minlength=len(instance.cost_C))

    def allowed(self, price_T: Array) -> float:
        """What usage up to the limit costs at these prices, at most."""
        return self.most * float(price_T.sum()) if self.num_times else 0.0  # the limit may be infinite

    def at(self, time: int) -> Array:
        """For each strategy of all nodes, what it uses at a kept time."""
        return self.priced((np.arange(self.num_times) == time).astype(float))


def places_of_usages(instance: Instance) -> Array:
    """Of each entry of the usages the strategy, among all nodes', that it belongs to."""
    starts_U = instance.first_N[:-1][instance.usage_node_U] - instance.usage_first_U[:-1]
    return np.repeat(starts_U, np.diff(instance.usage_first_U)) + np.arange(len(instance.usage_V))


def extremes(instance: Instance) -> tuple[Array, Array]:
    """The least and the most of each usage over the strategies that its node may take (finite cost)."""
    if not len(instance.usage_node_U):
        return np.zeros(0), np.zeros(0)
    allowed_V = np.isfinite(instance.cost_C)[places_of_usages(instance)]
    starts = instance.usage_first_U[:-1]
    least = np.minimum.reduceat(np.where(allowed_V, instance.usage_V, math.inf), starts)
    return least, np.maximum.reduceat(np.where(allowed_V, instance.usage_V, 0.0), starts)


def timeline(instance: Instance) -> Timeline:
    """The times at which the limit can be broken.

    >>> from meshwright.choice import Usage, instance_of
    >>> line = timeline(instance_of([[0], [0, 1]], usages=[Usage(0, 0, 9, [4]), Usage(1, 3, 5, [3, 1])], limit=6))
    >>> line.times_T, line.used(np.array([0, 0]))
    (array([3]), array([7.]))
    """
    starts_U, stops_U = instance.intervals_U[:, 0], instance.intervals_U[:, 1]
    lasting_U = starts_U < stops_U  # an empty interval holds nothing at any time
    times_T = _maximal(starts_U[lasting_U], stops_U[lasting_U])
    first_U = np.searchsorted(times_T, starts_U)
    stop_U = np.maximum(np.searchsorted(times_T, stops_U), first_U)
    highest_T = _held(first_U, stop_U, extremes(instance)[1], len(times_T))
    binding_T = highest_T > instance.limit
    before = np.concatenate([[0], np.cumsum(binding_T)])
    return Timeline(instance, times_T[binding_T], before[first_U], before[stop_U])


def peaks(over_T: Array) -> list[int]:
    """Of each run of times at which usage is over the limit (by `over_T`) the worst, the worst runs first.

    >>> peaks(np.array([0, 1, 3, -1, 5]))
    [4, 2]
    """
    above = np.concatenate([[False], over_T > 0, [False]])
    starts, stops = np.flatnonzero(above[1:] & ~above[:-1]), np.flatnonzero(~above[1:] & above[:-1])
    worst = [int(start + over_T[start:stop].argmax()) for start, stop in zip(starts, stops, strict=True)]
    return sorted(worst, key=lambda time: -over_T[time])


def _held(first_U: Array, stop_U: Array, amounts_U: Array, num_times: int) -> Array:
    rises = np.bincount(first_U, amounts_U, minlength=num_times + 1)
    falls = np.bincount(stop_U, amounts_U, minlength=num_times + 1)
    used_T: Array = np.cumsum(rises - falls)[:-1]
    return used_T


def _maximal(starts: Array, stops: Array) -> Array:
    """The starts between which and the next start something stops: at others no more is held than at the next."""
    times = np.unique(starts)
    stopped = np.searchsorted(np.sort(stops), times, side="right")
    kept: Array = times[np.concatenate([stopped[1:] > stopped[:-1], np.ones(min(1, len(times)), dtype=bool)])]
    return kept
