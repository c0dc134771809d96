"""Small random stage problems, and brute force over the plans of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from meshwright.search.pipelines.exhaustive_stages import contiguous_plans
from meshwright.search.stages import PlannedStage, StageOption, StagePlan, StageProblem, evaluate, is_pipeline


def random_problem(
    seed: int,
    *,
    num_units: int = 5,
    num_kinds: int = 3,
    sizes: tuple[int, ...] = (1, 1, 2),
    num_devices: int = 4,
    branches: bool = False,
    layouts: int = 1,
) -> StageProblem:
    """Units of a few kinds in a chain (or with edges that skip); memory binds in about half of the plans."""
    generator = np.random.default_rng(seed)
    options = tuple(
        StageOption(f"option {k}", size, is_copied=k % 2 == 0, layout=k % layouts) for k, size in enumerate(sizes)
    )
    shape = (num_kinds, len(options))
    kind_U = generator.integers(num_kinds, size=num_units)
    edges = [(unit, unit + 1) for unit in range(num_units - 1) if not branches or generator.random() < 0.6]
    edges += [
        (i, j) for i in range(num_units) for j in range(i + 2, num_units) if branches and generator.random() < 0.3
    ]
    weights = generator.uniform(1, 4, shape)
    switch = generator.uniform(0, 0.5, (layouts, layouts))
    np.fill_diagonal(switch, 0.0)
    return StageProblem(
        units=tuple(f"unit {unit}" for unit in range(num_units)),
        kind_U=kind_U,
        edges_E=np.array(edges, dtype=np.int64).reshape(-1, 2),
        bytes_E=generator.uniform(0, 2, len(edges)),
        options=options,
        forward_HK=generator.uniform(0.5, 2, shape) / np.array(sizes),
        backward_HK=generator.uniform(1, 4, shape) / np.array(sizes),
        update_HK=generator.uniform(0, 3, shape),
        weights_HK=weights,
        state_HK=weights + generator.uniform(0, 8, shape),
        kept_HK=generator.uniform(0, 3, shape),
        working_HK=generator.uniform(0, 3, shape),
        latency_K=generator.uniform(0, 0.1, len(options)),
        seconds_per_byte_K=generator.uniform(0, 0.3, len(options)),
        num_devices=num_devices,
        num_microbatches=int(generator.integers(1, 9)),
        memory_limit=float(generator.uniform(6, 14) * num_units / 2),
        switch_AB=switch,
    )


def least(problem: StageProblem, plans: Iterator[StagePlan], value: Callable[[StagePlan], float]) -> float:
    """The least value of the plans that fit; infinite where none does."""
    return min((value(plan) for plan in plans if evaluate(problem, plan).feasible), default=np.inf)


def convex_plans(problem: StageProblem) -> Iterator[StagePlan]:
    """All plans whose stages can stand in some order, contiguous in the units' order or not, one option a stage."""
    total = problem.num_units
    for part_U in product(range(total), repeat=total):
        names = sorted(set(part_U))
        if names != list(range(len(names))):
            continue
        held = [tuple(unit for unit in range(total) if part_U[unit] == name) for name in names]
        for options in product(range(len(problem.options)), repeat=len(names)):
            if sum(int(problem.devices_K[k]) for k in options) != problem.num_devices:
                continue
            stages = tuple(PlannedStage(units, (k,) * len(units)) for units, k in zip(held, options, strict=True))
            if is_pipeline(problem, plan := StagePlan(stages)):
                yield plan


def layered_plans(problem: StageProblem) -> Iterator[StagePlan]:
    """All plans of contiguous stages with an option for each unit of its own."""
    for plan in contiguous_plans(problem):
        choices = []
        for stage in plan.stages:
            size = problem.devices_K[stage.options[0]]
            if stage.options[0] != np.flatnonzero(problem.devices_K == size)[0]:
                break  # one plan for each choice of sizes is enough
            own = np.flatnonzero(problem.devices_K == size).tolist()
            choices.append(list(product(own, repeat=len(stage.units))))
        else:
            for options in product(*choices):
                yield StagePlan(
                    tuple(PlannedStage(stage.units, own) for stage, own in zip(plan.stages, options, strict=True))
                )
