"""Run a strategy for real, and hold it against one device: the door of this folder."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.errors import InputError, Problem
from meshwright.graph import Graph
from meshwright.results import Check, Measurement
from meshwright.runtime.data import check_tokens
from meshwright.runtime.ranks import Order, RunError, carry_out_orders
from meshwright.runtime.record import from_first_start
from meshwright.runtime.refuse import run_problems
from meshwright.runtime.train import GradientDifference, Job, RankReport, RankWork
from meshwright.strategy import Shorthand, Strategy, expand
from meshwright.workload import Workload

__all__ = ["RunError", "run", "run_many"]

#: How far a run may be from one device, by the type computed in: a few times the worst seen over the products of
#: `tests/runtime_strategies.py` on Llama, Qwen2 and GPT-2 (9e-13, 5e-4, 5e-2) [derived].
TOLERANCES = {"float64": 1e-10, "float32": 2e-3, "bfloat16": 1e-1}

#: The share of the largest gradient of all below which a gradient counts as 0. The rounding noise of a true 0 (GPT-2's
#: key biases) is 2e-10 of the largest in float32, but 4e-6 in bfloat16, which keeps 8 bits [derived].
FLOORS = {"float64": 1e-6, "float32": 1e-6, "bfloat16": 1e-4}


def run(
    graph: Graph,
    strategy: Strategy,
    workload: Workload,
    *,
    steps: int,
    seed: int = 0,
    check: bool = False,
    tokens: str | None = None,
    timeout_s: float = 120.0,
    record: bool = False,
) -> Measurement:
    """Run `steps` steps of a strategy on as many local processes as it has devices.

    Weights and data depend on seed, graph, batch and sequence alone, or the data on the file `tokens`. With `check` one
    more process runs the same on one device, and every loss and gradient is compared. `timeout_s` is how long a rank
    waits for another. With `record` the measurement has a timeline of the last step. Raises `InputError` for what
    cannot be run, `RunError` where a run dies.
    """
    job = Job(graph, strategy, workload, steps, seed, check, tokens, timeout_s, record)
    return run_many([job])[0]


def run_many(jobs: Sequence[Job]) -> list[Measurement]:
    """Run jobs one after the other out of one worker; jobs that differ only in strategy share one reference."""
    problems = [problem for job in jobs for problem in job_problems(job)]
    if problems:
        raise InputError(dict.fromkeys(problems))
    references = {id(job): _reference(job) for job in jobs if job.check}
    distinct: list[Job] = []
    for reference in references.values():
        if reference not in distinct:
            distinct.append(reference)
    with tempfile.TemporaryDirectory(prefix="meshwright-run-") as name:
        folders = [Path(name) / f"gradients-{i}" for i in range(len(distinct))]
        for folder in folders:
            folder.mkdir()
        orders = [_order(job, folder, save=True) for job, folder in zip(distinct, folders, strict=True)]
        for job in jobs:
            orders.append(_order(job, folders[distinct.index(references[id(job)])] if job.check else None))
        reports: list[list[RankReport]] = carry_out_orders(orders, Path(name))
    expected = [_losses(found) for found in reports[: len(distinct)]]
    return [
        _measurement(job, found, expected[distinct.index(references[id(job)])] if job.check else None)
        for job, found in zip(jobs, reports[len(distinct) :], strict=True)
    ]


def _order(job: Job, gradients: Path | None, save: bool = False) -> Order:
    return Order(RankWork(job, gradients, save), job.strategy.num_devices, job.timeout_s)


def job_problems(job: Job) -> list[Problem]:
    """Everything that is wrong with a job, its token file included."""
    problems = run_problems(job.graph, job.strategy, job.workload)
    if job.steps < 1:
        problems.append(Problem("--steps", str(job.steps), "must be at least 1", "1"))
    if not problems and job.tokens is not None:
        try:
            check_tokens(job.tokens, job.graph.dims["vocab"], job.workload, job.steps)
        except InputError as error:
            problems += error.problems
    return problems


def _reference(job: Job) -> Job:
    """The same on one device, one sequence at a time."""
    return replace(job, strategy=expand(Shorthand(), job.graph), check=False, record=False)


def _losses(reports: Iterable[RankReport]) -> tuple[float, ...]:
    return next(report.losses for report in reports if report.losses)


def _measurement(job: Job, reports: Sequence[RankReport], expected: tuple[float, ...] | None) -> Measurement:
    losses = _losses(reports)
    times_s = tuple(max(times) for times in zip(*(report.step_times_s for report in reports), strict=True))
    memory = tuple(float(report.peak_memory_bytes) for report in reports)
    return Measurement(
        losses=losses,
        step_time_s=statistics.median(times_s[1:] or times_s),
        step_times_s=times_s,
        peak_memory_bytes=max(memory),
        rank_memory_bytes=memory,
        check=None if expected is None else _check(job, reports, losses, expected),
        # Of the first replica there is one report per pipeline rank, and ranks ascend with the pipeline's.
        timeline=from_first_start([report.ran for report in reports if report.ran]),
    )


def _check(job: Job, reports: Sequence[RankReport], losses: tuple[float, ...], expected: tuple[float, ...]) -> Check:
    differences = [difference for report in reports for difference in report.differences]
    pairs = zip(losses, expected, strict=True)
    return Check(
        max_loss_difference=max(abs(loss - other) / max(abs(other), 1e-300) for loss, other in pairs),
        max_gradient_difference=max(_relative(differences, FLOORS[job.workload.precision])),
        num_gradients=len({difference.name for difference in differences}),
        tolerance=TOLERANCES[job.workload.precision],
    )


def _relative(differences: Sequence[GradientDifference], floor: float) -> Iterable[float]:
    """Each difference relative to its gradient's largest magnitude, or to `floor` of the step's largest of all."""
    largest: dict[int, float] = {}
    for one in differences:
        largest[one.step] = max(largest.get(one.step, 0.0), one.magnitude)
    for one in differences:
        yield one.difference / max(one.magnitude, floor * largest[one.step], 1e-300)
