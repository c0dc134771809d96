"""`estimate` and `explain`: one strategy, predicted and taken apart."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from meshwright.cli.common import (
    AsJson,
    ClusterName,
    EngineName,
    Faults,
    GlobalBatch,
    Inputs,
    Model,
    Precision,
    ProfileFile,
    SeqLen,
    StrategyText,
    app,
    fix_of,
    heading,
    new_console,
    predict,
    print_json,
    progress,
    read_profile,
    strategy_inputs,
)

if TYPE_CHECKING:
    from meshwright.io.inputs import NamedStrategy
    from meshwright.profile import Profile
    from meshwright.results import Estimate


@app.command()
def estimate(
    model: Model,
    cluster: ClusterName,
    strategy: StrategyText,
    global_batch: GlobalBatch,
    seq_len: SeqLen = None,
    evaluator: Annotated[
        str | None,
        typer.Option(
            help="analytic, simulated, or profiled: operators are measured on this machine.",
            show_default="analytic; simulated where a schedule has no closed form",
        ),
    ] = None,
    profile: ProfileFile = "",
    engine: EngineName = None,
    precision: Precision = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Predict one strategy: time and memory by cause, utilisation, communication, and whether it fits."""
    faults = Faults()
    faults.of(lambda: _check_evaluator(evaluator, profile))
    inputs, (named,) = strategy_inputs([strategy], model, cluster, global_batch, seq_len, engine, precision, faults)
    measured = _measured(inputs, named, profile) if evaluator == "profiled" else read_profile(profile)
    found = predict(inputs, named, None if evaluator == "profiled" else evaluator, measured)
    if measured is not None:
        found = _told_of_profile(inputs, named, measured, found)
    if evaluator == "profiled":
        found = replace(found, evaluator=evaluator)
    if as_json:
        fix = fix_of(inputs, named, found)
        print_json("estimate/1", {"shorthand": named.shorthand, **asdict(found), "nearest_fix": fix})
    else:
        _show_estimate(inputs, named, found)
    if not found.feasible:
        raise typer.Exit(1)


def _check_evaluator(name: str | None, profile: str) -> None:
    from meshwright.errors import InputError, Problem
    from meshwright.sim.evaluators import check_evaluator

    check_evaluator(name, "profiled")
    if name == "profiled" and not profile:
        rule = "keeps what it measures in a file"
        raise InputError([Problem("--evaluator", name, rule, "--profile profile.json")])


def _measured(inputs: Inputs, named: NamedStrategy, path: str) -> Profile:
    """The operators of a strategy, each distinct one measured once on this machine, in as many processes at once as
    the strategy has devices."""
    from meshwright.cost.layouts import operators_of
    from meshwright.runtime.profile import load_or_measure
    from meshwright.runtime.refuse import MAX_PROCESSES

    keys = operators_of(inputs.graph, named.strategy, inputs.workload, inputs.engine)
    with progress("measuring operators"):
        return load_or_measure(path, keys, min(named.strategy.num_devices, MAX_PROCESSES))


def _told_of_profile(inputs: Inputs, named: NamedStrategy, profile: Profile, found: Estimate) -> Estimate:
    """An estimate that says what of it was measured."""
    from meshwright.cost.layouts import missing_operators, operators_of

    case = (inputs.graph, named.strategy, inputs.workload, inputs.engine)
    missing, total = missing_operators(*case, profile), len(operators_of(*case))
    told = f"{total - len(missing)} of {total} operators as measured on {profile.host.cpu}"
    rest = f"; by formula: {', '.join(sorted({key.kind for key in missing}))}" if missing else ""
    return replace(found, assumptions=(*found.assumptions, told + rest))


def _show_estimate(inputs: Inputs, named: NamedStrategy, found: Estimate) -> None:
    from meshwright.cost.analytic import usable_memory
    from meshwright.report.text import estimate_view

    console = new_console()
    console.print(heading(inputs))
    console.print(estimate_view(named.shorthand or "(from file)", found, usable_memory(inputs.cluster)))
    fix = fix_of(inputs, named, found)
    if fix:
        console.print(f"nearest fix: {fix}")


@app.command()
def explain(
    model: Model,
    cluster: ClusterName,
    strategy: StrategyText,
    global_batch: GlobalBatch,
    seq_len: SeqLen = None,
    against: Annotated[str, typer.Option("--against", metavar="STRATEGY", help="Say where the two part.")] = "",
    engine: EngineName = None,
    precision: Precision = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Take an estimate apart: which operator, tensor and collective makes each number, and where each tensor lies."""
    from meshwright.cost.explain import explain as degrees
    from meshwright.cost.explain_placed import explain_placed

    texts = [strategy, against] if against else [strategy]
    inputs, (named, *others) = strategy_inputs(
        texts, model, cluster, global_batch, seq_len, engine, precision, Faults()
    )
    other = others[0] if others else None
    take_apart = explain_placed if named.strategy.is_placed else degrees
    found = take_apart(inputs.graph, inputs.cluster, named.strategy, inputs.workload, inputs.engine)
    compared = predict(inputs, other) if other else None
    if as_json:
        values = {"shorthand": named.shorthand, **asdict(found)}
        if other and compared:
            values["against"] = {"shorthand": other.shorthand, "estimate": asdict(compared)}
        print_json("explanation/1", values)
        return
    from meshwright.report.text import comparison_table, leaf_tree, placement_table, shorthand_text

    console = new_console()
    console.print(heading(inputs))
    if other and compared:
        names = tuple(shorthand_text(each.shorthand or "file") for each in (named, other))
        console.print(comparison_table((names[0], names[1]), found.estimate, compared))
        faster = names[0] if found.estimate.step_time_s <= compared.step_time_s else names[1]
        console.print(f"{faster} takes less time.")
        for name, each in zip(names, (found.estimate, compared), strict=True):
            for reason in each.reasons:
                console.print(f"{name} does not fit: {reason}", style="red", markup=False)
        return
    console.print(leaf_tree(found.time))
    console.print(leaf_tree(found.memory))
    console.print(placement_table(found))
