"""Small truths about what an instance can cost: whether in whole numbers, and how much at most."""

from __future__ import annotations

import math

import numpy as np

from meshwright.choice import Array, Instance

#: A bound that is summed in floats may lie above the true one by this share; before it is rounded up it is lowered.
ROUNDING = 1e-12


def is_whole(instance: Instance) -> bool:
    """Whether all finite costs are whole numbers, so that every choice costs one."""
    return all(np.array_equal(values, np.floor(values)) for values in (instance.cost_C, instance.matrix_M))


def rounded_up(bound: float, whole: bool) -> float:
    """A lower bound, raised to the next whole number where costs are whole."""
    slack = max(1e-6, ROUNDING * abs(bound))
    return float(math.ceil(bound - slack)) if whole and math.isfinite(bound) and slack < 0.5 else bound


def dearest(instance: Instance) -> float:
    """More than what any choice costs whose cost is finite."""
    return _largest(instance.cost_C, instance.first_N) + _largest(instance.matrix_M, instance.matrix_first_E) + 1.0


def _largest(values: Array, first: Array) -> float:
    """The sum of the largest finite magnitudes of each segment."""
    if len(first) < 2:
        return 0.0
    finite = np.abs(np.where(np.isfinite(values), values, 0.0))
    return float(np.maximum.reduceat(finite, first[:-1]).sum())
