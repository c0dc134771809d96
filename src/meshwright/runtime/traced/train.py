"""Steps of a traced program on processes, under a plan that places single operators, held against one device.

The loss is that of `execute.loss_of`; every step sees the same inputs, and parameters move down their gradients. What a
rank trains with is drawn from a seed in full, as on every other rank, and it takes its pieces at each step: what a plan
saves in memory is so not to be seen here, what it computes and sends is.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import InputError, Problem
from meshwright.io.traced import Traced
from meshwright.results import Check, Measurement
from meshwright.runtime.memory import peak_bytes
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.ranks import Order, carry_out_orders
from meshwright.runtime.traced.check import TOLERANCE, compared_gradients, subsets, unsplit
from meshwright.runtime.traced.execute import Outcome, Splits, dim_sizes, run_program, whole_tensors
from meshwright.runtime.traced.redistribute import way
from meshwright.strategy import MeshAxis, Strategy
from meshwright.workload import Workload

#: Step size of plain gradient descent: large enough that a wrong gradient shows in the next loss [derived].
LEARNING_RATE = 0.01


@dataclass(frozen=True)
class _Task:
    traced: Traced
    splits: Splits
    mesh: tuple[MeshAxis, ...]
    batch: int
    steps: int
    seed: int
    timeout_s: float


@dataclass(frozen=True)
class _Report:
    losses: tuple[float, ...]
    times_s: tuple[float, ...]
    peak_bytes: int
    gradient_difference: float
    num_gradients: int


def run_traced(
    traced: Traced,
    strategy: Strategy,
    workload: Workload,
    *,
    steps: int,
    seed: int = 0,
    check: bool = False,
    timeout_s: float = 120.0,
) -> Measurement:
    """Train a traced program for some steps in float64 on as many processes as the strategy has devices.

    With `check` one more process does the same on one device, and every loss and gradient is compared. Raises
    `InputError` where the strategy places no single operators or the type is another, `RunError` where a run dies.
    """
    if problems := _problems(strategy, workload):
        raise InputError(problems)
    task = _Task(traced, strategy.splits, strategy.mesh, workload.global_batch, steps, seed, timeout_s)
    with tempfile.TemporaryDirectory(prefix="meshwright-traced-") as name:
        folder, scratch = Path(name), Path(name) / "orders"
        scratch.mkdir()
        orders = [Order(partial(_train_on_one, task, folder), 1, timeout_s)] if check else []
        orders.append(Order(partial(_train, task, folder if check else None), strategy.num_devices, timeout_s))
        *reference, ranks = carry_out_orders(orders, scratch)
    expected = reference[0][0].losses if reference else None
    return _measurement(ranks, expected)


def _problems(strategy: Strategy, workload: Workload) -> list[Problem]:
    problems = []
    if not strategy.is_placed or len(strategy.stages) > 1:
        rule = "a traced model runs under a plan that places its operators on one mesh"
        problems.append(Problem("strategy", strategy.schedule, rule, "meshwright plan MODEL CLUSTER --out plan.json"))
    if workload.precision != "float64":
        problems.append(Problem("--dtype", workload.precision, "traced models run in float64", "float64"))
    return problems


def _measurement(ranks: list[_Report], expected: tuple[float, ...] | None) -> Measurement:
    losses = ranks[0].losses
    times_s = tuple(max(times) for times in zip(*(report.times_s for report in ranks), strict=True))
    memory = tuple(float(report.peak_bytes) for report in ranks)
    check = None
    if expected is not None:
        pairs = [(loss, other) for report in ranks for loss, other in zip(report.losses, expected, strict=True)]
        check = Check(
            max_loss_difference=max(abs(loss - other) / max(abs(other), 1e-300) for loss, other in pairs),
            max_gradient_difference=max(report.gradient_difference for report in ranks),
            num_gradients=ranks[0].num_gradients,
            tolerance=TOLERANCE,
        )
    return Measurement(
        losses=losses,
        step_time_s=statistics.median(times_s[1:] or times_s),
        step_times_s=times_s,
        peak_memory_bytes=max(memory),
        rank_memory_bytes=memory,
        check=check,
    )


def _train_on_one(task: _Task, folder: Path, rank: int, size: int) -> _Report:
    def save(step: int, outcome: Outcome) -> tuple[float, int]:
        torch.save(dict(outcome.gradients), folder / f"{step}.pt")
        return 0.0, len(outcome.gradients)

    return _steps(task, unsplit(), Mesh((), 0), save)


def _train(task: _Task, folder: Path | None, rank: int, size: int) -> _Report:
    mesh = Mesh(tuple(axis for axis in task.mesh if axis.size > 1), rank, task.timeout_s)
    mesh.form_groups(subsets(tuple(axis.name for axis in mesh.axes)))

    def compare(step: int, outcome: Outcome) -> tuple[float, int]:
        if folder is None:
            return 0.0, len(outcome.gradients)
        expected: dict[str, Tensor] = torch.load(folder / f"{step}.pt", weights_only=True)
        worst, _ = compared_gradients(task.traced, task.batch, outcome, expected, mesh)
        return worst, len(expected)

    return _steps(task, task.splits, mesh, compare)


def _steps(task: _Task, splits: Splits, mesh: Mesh, look: Callable[[int, Outcome], tuple[float, int]]) -> _Report:
    """Train; `look` is shown every step's outcome and says how far it is off, and how many gradients it has."""
    whole = whole_tensors(task.traced, task.batch, task.seed)
    sizes = dim_sizes(task.traced, task.batch)
    losses, times_s, differences, count = [], [], [0.0], 0

    def step() -> Any:
        return run_program(task.traced, splits, whole, task.batch, mesh)

    for number in range(task.steps):
        start = time.monotonic()
        outcome = step()
        times_s.append(time.monotonic() - start)
        losses.append(float(outcome.loss))
        difference, count = look(number, outcome)
        differences.append(difference)
        for name, gradient in outcome.gradients.items():
            bring = way(task.traced.factors[name], sizes, outcome.lies[name], {}, mesh)
            whole[name] = whole[name] - LEARNING_RATE * bring(gradient, mesh)
    peak = peak_bytes(step)
    return _Report(tuple(losses), tuple(times_s), peak, max(differences), count)
