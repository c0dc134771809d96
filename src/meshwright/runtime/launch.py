"""Start the processes of a run, wait for them, and say what they saw or why they died.

All ranks are children of one worker process in a session of its own, so that whatever happens here - an error, Ctrl-C,
a timeout - ends them all. Processes talk over the loopback interface alone; the rendezvous is a file in a fresh folder.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from meshwright.errors import InputError, MeshwrightError, Problem
from meshwright.graph import Graph
from meshwright.results import Check, Measurement
from meshwright.runtime.data import check_tokens
from meshwright.runtime.refuse import run_problems
from meshwright.runtime.train import GradientDifference, Job, RankReport
from meshwright.strategy import Shorthand, Strategy, expand
from meshwright.workload import Workload

#: How far a run may be from one device, by the type computed in [fit: tests/test_runtime_check.py].
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 5e-2}


class RunError(MeshwrightError):
    """A run died: which rank, and its last words."""


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
) -> Measurement:
    """Run `steps` steps of a strategy on as many local processes as it has devices.

    Weights and data depend on seed, graph, batch and sequence alone, or the data on the file `tokens`. With `check` one
    more process runs the same on one device, and every loss and gradient is compared. `timeout_s` is how long a rank
    waits for another. Raises `InputError` for what cannot be run, `RunError` where a run dies.
    """
    job = Job(graph, strategy, workload, steps, seed, check, tokens, timeout_s)
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
    orders = [(reference, f"reference-{i}", f"gradients-{i}", True) for i, reference in enumerate(distinct)]
    for i, job in enumerate(jobs):
        gradients = f"gradients-{distinct.index(references[id(job)])}" if job.check else None
        orders.append((job, f"job-{i}", gradients, False))
    with tempfile.TemporaryDirectory(prefix="meshwright-run-") as name:
        folder = Path(name)
        (folder / "jobs.pickle").write_bytes(pickle.dumps(orders))
        _work(folder, [job for job, _, _, _ in orders])
        reports = [_reports(folder / order, job) for job, order, _, _ in orders]
    expected = [_losses(found) for found in reports[: len(distinct)]]
    return [
        _measurement(job, found, expected[distinct.index(references[id(job)])] if job.check else None)
        for job, found in zip(jobs, reports[len(distinct) :], strict=True)
    ]


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
    return replace(job, strategy=expand(Shorthand(), job.graph), check=False)


def _work(folder: Path, jobs: Sequence[Job]) -> None:
    """Start the worker and wait for it; whatever happens, nothing of it is left."""
    paths = os.pathsep.join(path for path in sys.path if path)
    loopback = "lo" if sys.platform == "linux" else "lo0"
    environment = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": loopback, "OMP_NUM_THREADS": "1"}
    with (folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "meshwright.runtime.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = worker.wait()
        finally:
            _end(worker)
    if code == 0:
        return
    failure = folder / "failure.json"
    if not failure.exists():
        lines = (folder / "worker.log").read_text(errors="replace").strip().splitlines() or ["no word"]
        raise RunError(f"the run's worker process ended with status {code}: {lines[-1]}")
    found = json.loads(failure.read_text())
    size = jobs[found["job"]].strategy.num_devices
    raise RunError(f"rank {found['rank']} of {size} died: {found['cause']}")


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill the worker's session, ranks included; it is gone already after a run that ended well."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        worker.wait()


def _reports(place: Path, job: Job) -> list[RankReport]:
    return [pickle.loads((place / f"{rank}.pickle").read_bytes()) for rank in range(job.strategy.num_devices)]


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
    )


def _check(job: Job, reports: Sequence[RankReport], losses: tuple[float, ...], expected: tuple[float, ...]) -> Check:
    differences = [difference for report in reports for difference in report.differences]
    pairs = zip(losses, expected, strict=True)
    return Check(
        max_loss_difference=max(abs(loss - other) / max(abs(other), 1e-300) for loss, other in pairs),
        max_gradient_difference=max(_relative(differences)),
        num_gradients=len({difference.name for difference in differences}),
        tolerance=TOLERANCES[job.workload.precision],
    )


def _relative(differences: Sequence[GradientDifference]) -> Iterable[float]:
    """Each difference relative to its gradient's largest magnitude, or to 1e-6 of the step's largest of all."""
    largest: dict[int, float] = {}
    for one in differences:
        largest[one.step] = max(largest.get(one.step, 0.0), one.magnitude)
    for one in differences:
        yield one.difference / max(one.magnitude, 1e-6 * largest[one.step], 1e-300)
