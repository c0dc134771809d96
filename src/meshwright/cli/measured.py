"""Commands around real runs: `run`, `validate`, `calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.cli.common import (
    AsJson,
    Inputs,
    app,
    check_one_mesh,
    check_trace_name,
    heading,
    new_console,
    predict,
    print_json,
    progress,
    whole_number,
)

if TYPE_CHECKING:
    from meshwright.io.inputs import NamedStrategy
    from meshwright.results import Estimate, Measurement


@app.command()
def run(
    plan_or_model: Annotated[str, typer.Argument(metavar="PLAN_OR_MODEL", help="Plan file, or a model as for plan.")],
    strategy: Annotated[str, typer.Argument(metavar="[STRATEGY]", help="Where a model is given.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1_000_000, help="Steps to train.")] = 3,
    nproc: Annotated[int, typer.Option("--nproc", min=0, help="Processes; must be the strategy's.")] = 0,
    global_batch: Annotated[
        int | None, typer.Option("--global-batch", metavar="N", parser=whole_number, help="Sequences per step.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", metavar="S", parser=whole_number, help="Tokens per sequence.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float64, float32 or bfloat16.", show_default="the plan's, or float32")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    tokens: Annotated[str, typer.Option(metavar="FILE", help="Train on these token ids (.npy or .bin).")] = "",
    cluster: Annotated[str, typer.Option(help="Predict for this cluster.", show_default="local-cpuxP")] = "",
    check: Annotated[bool, typer.Option("--check", help="Compare with one device, every gradient.")] = False,
    trace: Annotated[
        str, typer.Option("--trace", metavar="FILE", help="Write what each rank did when: .pftrace or .json.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Train on PyTorch (Gloo processes of this machine) under a strategy; dropout is off, so that runs compare."""
    from meshwright.io.inputs import read_cluster, read_engine
    from meshwright.io.runs import RunRequest, read_run

    request = RunRequest(plan_or_model, strategy, nproc, global_batch, seq_len, dtype)
    if trace:
        check_trace_name(trace)
    asked = read_run(request)
    check_one_mesh(asked.named.strategy, "planned and predicted, not run")
    graph, named, workload = asked.graph, asked.named, asked.workload
    cluster_text = cluster or f"local-cpux{named.strategy.num_devices}"
    machine = read_cluster(cluster_text)
    engine = read_engine("meshwright", machine)
    inputs = Inputs(graph, machine, workload, engine, cluster_text, plan_or_model, asked.traced)
    with progress(f"training on {named.strategy.num_devices} processes", quiet=as_json):
        if asked.traced is None:
            from meshwright.runtime.launch import run as execute

            measured = execute(
                graph,
                named.strategy,
                workload,
                steps=steps,
                seed=seed,
                check=check,
                tokens=tokens or None,
                record=bool(trace),
            )
        else:
            from meshwright.runtime.traced.train import run_traced

            _check_traced(tokens, trace)
            measured = run_traced(asked.traced, named.strategy, workload, steps=steps, seed=seed, check=check)
    if trace:
        from meshwright.io.trace import measured_trace, write_trace

        write_trace(measured_trace(graph.name, measured.timeline), trace)
    predicted = predict(inputs, named) if machine.num_devices == named.strategy.num_devices else None
    if as_json:
        print_json("run/1", _run_json(named, measured, predicted))
    else:
        from meshwright.report.text import measurement_view

        console = new_console()
        console.print(heading(inputs))
        console.print(f"strategy {named.shorthand or '(from file)'}")
        console.print(measurement_view(measured, predicted))
    if measured.check and not measured.check.passed:
        raise typer.Exit(1)


def _check_traced(tokens: str, trace: str) -> None:
    """Raise `InputError` for options that mean nothing to a traced model."""
    from meshwright.errors import InputError, Problem

    given = (("--tokens", tokens, "inputs are drawn from the seed"), ("--trace", trace, "no actions are recorded"))
    problems = [Problem(option, text, f"of a traced model {rule}") for option, text, rule in given if text]
    if problems:
        raise InputError(problems)


def _run_json(named: NamedStrategy, measured: Measurement, predicted: Estimate | None) -> dict[str, Any]:
    values = {"shorthand": named.shorthand, **asdict(measured)}
    values["predicted"] = asdict(predicted) if predicted else {}
    values["bubble_fraction"] = measured.bubble_fraction
    if measured.check:
        values["check"] = {**asdict(measured.check), "passed": measured.check.passed}
    return values


@app.command()
def validate(
    runs: Annotated[str, typer.Argument(metavar="RUNS.csv", help="Measured runs, one a row.")],
    figure: Annotated[
        str, typer.Option("--figure", metavar="FILE.html", help="Draw predicted against measured step times.")
    ] = "",
    evaluator: Annotated[str, typer.Option(help="analytic or simulated.")] = "analytic",
    as_json: AsJson = False,
) -> None:
    """Predict measured runs and compare: errors of step time and memory, and how well runs are ranked, by source."""
    from meshwright.bench.validate import to_json, validate_runs
    from meshwright.sim.evaluators import check_evaluator

    check_evaluator(evaluator)
    with progress("predicting runs", quiet=as_json):
        found = validate_runs(runs, evaluator)
    if figure:
        from meshwright.report.figures import validation_figure

        validation_figure(found.rows, figure)
    if as_json:
        print_json("validate/1", to_json(found))
    else:
        from meshwright.report.validation import validation_view

        new_console().print(validation_view(found))
    if not found.rows:
        raise typer.Exit(2)


@app.command()
def calibrate(
    source: Annotated[str, typer.Argument(metavar="local|RUNS.csv", help="This machine, or your measured runs.")],
    out: Annotated[
        list[str] | None, typer.Option("--out", metavar="FILE", help="cluster.json or engine.json; may be given twice.")
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", min=1, max=64, help="Processes that will run (local).")] = 2,
    as_json: AsJson = False,
) -> None:
    """Measure this machine, or learn from runs (ten are plenty), into files for `plan` and `estimate`.

    With `local`, matmul, memory and Gloo collectives become a cluster file (- or nothing: stdout). Runs in the columns
    of `validate` become an engine or a cluster, as the name of the file says, or both; how much that helps is shown on
    runs that were left out.
    """
    if source == "local":
        _calibrate_local(nproc, out or ["-"])
        return
    from meshwright.bench.calibrate import calibrate as learn
    from meshwright.bench.calibrate import nouns_of
    from meshwright.io.native import write

    nouns = nouns_of(out or [])
    with progress("learning from runs", quiet=as_json):
        found = learn(source, list(nouns))
    for noun, path in nouns.items():
        write(getattr(found, noun), path)
    if as_json:
        errors = {name: getattr(found, name) for name in ("before_pct", "after_pct")}
        errors |= {f"memory_{name}": getattr(found, f"memory_{name}") for name in errors}
        skipped = [{"id": row.id, "reason": row.reason} for row in found.skipped]
        print_json("calibrate/1", {"num_runs": found.num_runs, **errors, "files": nouns, "skipped": skipped})
    else:
        from meshwright.report.validation import calibration_view

        new_console().print(calibration_view(found, list(nouns.values())))


def _calibrate_local(nproc: int, out: Sequence[str]) -> None:
    from meshwright.errors import InputError, Problem
    from meshwright.io.native import write
    from meshwright.runtime.calibrate import calibrate_local

    if len(out) > 1:
        raise InputError([Problem("--out", " ".join(out), "a machine is measured into one file, a cluster", out[0])])
    with progress(f"measuring with {nproc} processes"):
        cluster = calibrate_local(nproc)
    write(cluster, out[0])
