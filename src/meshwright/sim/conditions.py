"""How real devices differ from ideal ones: stragglers, slow links, jitter; and how much a step's time varies by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from meshwright.errors import InputError, Problem
from meshwright.sim.program import COMPUTE
from meshwright.sim.tasks import TaskGraph, devices_of
from meshwright.strategy import Strategy
from meshwright.sweep import FloatArray

#: Slower than this is not a straggler but a dead device.
MAX_FACTOR = 1e6


@dataclass(frozen=True)
class Conditions:
    """Under which a step runs.

    Devices that compute `slow_devices[device]` times as long, devices whose transfers take `slow_links[device]` times
    as long (a slow network card), and by how much each task's time varies: sigma of a lognormal factor of median 1,
    drawn anew for each task from `seed`."""

    slow_devices: Mapping[int, float] = field(default_factory=dict)
    slow_links: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0

    @property
    def is_calm(self) -> bool:
        """Whether all devices are alike and steady."""
        return not (self.slow_devices or self.slow_links or self.jitter)


CALM = Conditions()


def parse_factors(text: str, option: str) -> dict[int, float]:
    """Read `3=1.5,17=2`: devices with how many times as long they take.

    >>> parse_factors("3=1.5,17=2", "--slow-device")
    {3: 1.5, 17: 2.0}
    """
    found: dict[int, float] = {}
    problems = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = re.fullmatch(r"([0-9]{1,9})=([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)", part)
        if match is None:
            problems.append(Problem(option, part, "each part is device=factor", "3=1.5"))
        elif int(match[1]) in found:
            problems.append(Problem(option, part, f"device {match[1]} is there twice"))
        elif not 0 < float(match[2]) <= MAX_FACTOR:
            problems.append(Problem(option, part, f"a factor is more than 0 and at most {MAX_FACTOR:g}", "1.5"))
        else:
            found[int(match[1])] = float(match[2])
    if problems:
        raise InputError(problems)
    return found


def condition_problems(conditions: Conditions, num_devices: int) -> list[Problem]:
    """Devices that do not exist, and spreads that mean nothing."""
    found = [
        Problem(option, str(device), f"devices are 0 to {num_devices - 1}", str(num_devices - 1))
        for option, slow in (("--slow-device", conditions.slow_devices), ("--slow-link", conditions.slow_links))
        for device in slow
        if not 0 <= device < num_devices
    ]
    if not 0 <= conditions.jitter <= 2:
        found.append(Problem("--jitter", str(conditions.jitter), "is a sigma from 0 to 2", "0.05"))
    return found


def perturbed(graph: TaskGraph, strategy: Strategy, conditions: Conditions) -> FloatArray:
    """The durations of an unfolded graph's tasks under conditions."""
    if conditions.is_calm:
        return graph.duration_N
    duration_N = graph.duration_N.copy()
    for rank, tasks in enumerate(graph.ranks):
        computes = np.repeat(np.array(tasks.streams) == COMPUTE, np.diff(tasks.starts_S))
        for index, device in enumerate(devices_of(strategy.mesh, rank)):
            for slow, where in ((conditions.slow_devices, computes), (conditions.slow_links, ~computes)):
                if device in slow:
                    duration_N[graph.tasks_of(rank, index)][where] *= slow[device]
    if conditions.jitter:
        draws = np.random.default_rng(conditions.seed).standard_normal(graph.num_tasks)
        duration_N[: graph.num_tasks] *= np.exp(conditions.jitter * draws)
    return duration_N


#: By how much a straggler is slower, in a study of them.
STUDIED_FACTORS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0)


@dataclass(frozen=True)
class Curve:
    """Step times, in seconds, with one straggler that takes `factors` times as long."""

    label: str
    factors: tuple[float, ...]
    step_times_s: tuple[float, ...]


def straggler_study(step_time_of: Callable[[Conditions], float], strategy: Strategy) -> tuple[Curve, ...]:
    """What one slow device costs in the first, the middle or the last pipeline rank, or slow transfers in the last."""
    size = strategy.pipeline_size
    ranks = sorted({0, size // 2, size - 1})
    first = {rank: int(devices_of(strategy.mesh, rank)[0]) for rank in ranks}
    asked = [(f"device {first[rank]} (pipeline rank {rank}) computes slowly", first[rank], True) for rank in ranks]
    last = first[size - 1]
    asked.append((f"transfers of device {last} take longer", last, False))
    found = []
    for label, device, computes in asked:
        slow = [{device: factor} for factor in STUDIED_FACTORS]
        times = [step_time_of(Conditions(slow_devices=one) if computes else Conditions(slow_links=one)) for one in slow]
        found.append(Curve(label, STUDIED_FACTORS, tuple(times)))
    return tuple(found)


@dataclass(frozen=True)
class Spread:
    """Step times of samples under jitter, in seconds: quantiles by their percentage, and the mean."""

    num_samples: int
    quantiles_s: dict[int, float]
    mean_s: float


def spread(step_time_of: Callable[[Conditions], float], conditions: Conditions, num_samples: int) -> Spread:
    """Draw step times; samples differ in their seeds alone, which follow that of the conditions. Interrupted, it goes
    by those drawn so far."""
    times: list[float] = []
    try:
        for index in range(num_samples):
            times.append(step_time_of(replace(conditions, seed=conditions.seed + index)))
    except KeyboardInterrupt:
        if not times:
            raise
    points = (5, 25, 50, 75, 95, 99)
    values = np.percentile(times, points)
    return Spread(len(times), dict(zip(points, map(float, values), strict=True)), float(np.mean(times)))
