"""`plan`: look for the best strategy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

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
    SeqLen,
    app,
    heading,
    new_console,
    print_json,
    progress,
    read_inputs,
    registered,
)

if TYPE_CHECKING:
    from meshwright.errors import Problem
    from meshwright.results import Estimate
    from meshwright.search.method import Answer, Found
    from meshwright.search.space import Limits, Space
    from meshwright.strategy import Shorthand, Strategy
    from meshwright.workload import Workload


@app.command()
def plan(
    model: Model,
    cluster: ClusterName,
    global_batch: GlobalBatch,
    seq_len: SeqLen,
    method: Annotated[str, typer.Option(help="How to look.")] = "exhaustive",
    space: Annotated[str, typer.Option(help="Where to look: uniform, or calculon.")] = "uniform",
    fix: Annotated[str, typer.Option("--fix", metavar="SHORTHAND", help="Keys that must have these values.")] = "",
    largest: Annotated[str, typer.Option("--max", metavar="SHORTHAND", help="Largest values of keys.")] = "",
    objective: Annotated[str, typer.Option(help="step_time, memory or pareto.")] = "step_time",
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many strategies to show.")] = 10,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="Write the best as a plan file (- is stdout).")
    ] = "",
    engine: EngineName = None,
    precision: Precision = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Find the best strategy: every legal one is evaluated, what does not fit is kept apart."""
    from meshwright.search.method import Question
    from meshwright.search.space import UniformSpace

    faults = Faults()
    look = faults.of(lambda: _method(method))
    kind = faults.of(lambda: _space(space)) or UniformSpace
    limits = faults.of(lambda: _limits(kind, fix, largest))
    faults.of(lambda: _check_objective(objective))
    faults.of(lambda: _check_one_stdout(out, as_json))
    inputs = read_inputs(model, cluster, global_batch, seq_len, engine, precision, faults)
    folds = inputs.engine.defaults.folds_experts
    place = kind(inputs.graph, inputs.cluster.num_devices, inputs.workload, limits, folds)
    question = Question(place, inputs.cluster, inputs.engine, objective, top)
    with progress("evaluating strategies", quiet=as_json) as told:
        answer = look(question, told)
    ranking = _ranked(inputs, answer)
    if out and ranking:
        _write_plan(out, inputs, ranking[0], answer)
    if as_json:
        print_json("plan-result/1", _plan_json(inputs, answer, ranking))
    elif out != "-":
        _show_plan(inputs, answer, ranking)
    if not ranking:
        raise typer.Exit(1)


def _method(name: str) -> Any:
    import meshwright.search.exhaustive  # noqa: F401  (registers itself)
    from meshwright.search.method import METHODS

    return registered(METHODS, name, "--method")


def _space(name: str) -> type[Space]:
    import meshwright.search.calculon  # noqa: F401  (registers itself)
    from meshwright.search.space import SPACES

    return registered(SPACES, name, "--space")


def _check_objective(name: str) -> None:
    from meshwright.errors import InputError, Problem, nearest_name
    from meshwright.search.method import OBJECTIVES

    if name not in OBJECTIVES:
        rule = f"known: {', '.join(OBJECTIVES)}"
        raise InputError([Problem("--objective", name, rule, nearest_name(name, OBJECTIVES))])


def _check_one_stdout(out: str, as_json: bool) -> None:
    from meshwright.errors import InputError, Problem

    if as_json and out == "-":
        raise InputError([Problem("--out", "-", "--json prints one object, so the plan goes to a file", "plan.json")])


def _limits(space: type[Space], fix: str, largest: str) -> Limits:
    from meshwright.errors import InputError
    from meshwright.search.space import limit_problems, limits_of
    from meshwright.strategy import parse_shorthand_keys

    problems: list[Problem] = []
    parsed = []
    for option, text in (("--fix", fix), ("--max", largest)):
        values: dict[str, Any] = {}
        if text:
            try:
                values = parse_shorthand_keys(text)
            except InputError as error:
                problems += [replace(found, where=f"{option} {found.where}") for found in error.problems]
        problems += limit_problems(values, option, space)
        parsed.append(values)
    if problems:
        raise InputError(problems)
    return limits_of(*parsed)


@dataclass(frozen=True)
class _Ranked:
    """A member that a method found, its strategy, the workload of its batch, the engine's estimate of these, and
    whether that is too near to the first's to say which is faster."""

    found: Found
    strategy: Strategy
    workload: Workload
    estimate: Estimate
    is_tied: bool


def _ranked(inputs: Inputs, answer: Answer) -> list[_Ranked]:
    from meshwright.cost.analytic import estimate
    from meshwright.cost.spread import is_tied
    from meshwright.strategy import expand

    known: dict[Shorthand, tuple[Strategy, Workload, Estimate]] = {}  # members may share a strategy
    for found in answer.found:
        if found.shorthand not in known:
            strategy = expand(found.shorthand, inputs.graph)
            workload = replace(inputs.workload, global_batch=found.sequences)
            predicted = estimate(inputs.graph, inputs.cluster, strategy, workload, inputs.engine)
            known[found.shorthand] = (strategy, workload, predicted)
    times_s = [known[found.shorthand][2].step_time_s for found in answer.found]
    return [
        _Ranked(found, *known[found.shorthand], is_tied(time_s, times_s[0]))
        for found, time_s in zip(answer.found, times_s, strict=True)
    ]


def _plan_json(inputs: Inputs, answer: Answer, ranking: Sequence[_Ranked]) -> dict[str, Any]:
    space = answer.certificate.space
    entries = [_ranked_json(space, ranked) for ranked in ranking]
    return {
        "model": _model_json(inputs),
        "best": entries[0] if entries else None,
        "ranking": entries,
        "space": {
            "name": space,
            "num_strategies": answer.certificate.num_strategies,
            "num_feasible": answer.certificate.num_feasible,
            "infeasible": dict(answer.infeasible),
        },
        "elapsed_s": answer.elapsed_s,
        "cpu_s": answer.cpu_s,
        "strategies_per_s": answer.strategies_per_s,
        "certificate": asdict(answer.certificate),
        "reasons": [] if entries else _no_plan_reasons(inputs, answer),
    }


def _ranked_json(space: str, ranked: _Ranked) -> dict[str, Any]:
    """A strategy with the engine's estimate; where the space chose more, that too, and what it said of the member."""
    found = ranked.found
    entry: dict[str, Any] = {
        "shorthand": str(found.shorthand),
        "strategy": asdict(ranked.strategy),
        "estimate": asdict(ranked.estimate),
        "tied_with_best": ranked.is_tied,
    }
    if found.chosen:
        entry[space] = {
            **found.chosen,
            "step_time_s": found.step_time_s,
            "samples_per_s": found.samples_per_s,
            "peak_memory_bytes": found.peak_memory_bytes,
        }
    return entry


def _model_json(inputs: Inputs) -> dict[str, Any]:
    return {
        "name": inputs.graph.name,
        "num_parameters": inputs.graph.num_parameters,
        "forward_flops": inputs.graph.forward_flops(inputs.workload.global_batch, inputs.workload.seq_len),
    }


def _no_plan_reasons(inputs: Inputs, answer: Answer) -> list[str]:
    """Why nothing fits: the strategy that needs least memory, and how much it lacks; or that nothing is legal."""
    from meshwright.strategy import expand

    if answer.examples:
        return list(answer.examples)
    if answer.least is None:
        return [
            f"no legal strategy puts a global batch of {inputs.workload.global_batch} on exactly "
            f"{inputs.cluster.num_devices} devices within the given limits"
        ]
    from meshwright.cost.analytic import devices_needed, estimate

    strategy = expand(answer.least.shorthand, inputs.graph)
    workload = replace(inputs.workload, global_batch=answer.least.sequences)
    found = estimate(inputs.graph, inputs.cluster, strategy, workload, inputs.engine)
    return [
        f"the strategy that needs least memory, {answer.least.shorthand}, does not fit: {found.reasons[0]}",
        f"nearest fix: {devices_needed(inputs.graph, inputs.cluster, inputs.workload, inputs.engine)}",
    ]


def _write_plan(out: str, inputs: Inputs, best: _Ranked, answer: Answer) -> None:
    from meshwright.io.native import fingerprint, write
    from meshwright.plan import Plan

    write(
        Plan(
            model=inputs.model_text,
            model_hash=fingerprint(inputs.graph),
            cluster=inputs.cluster_text,
            cluster_hash=fingerprint(inputs.cluster),
            engine=inputs.engine.name,
            workload=best.workload,
            shorthand=str(best.found.shorthand),
            strategy=best.strategy,
            estimate=best.estimate,
            certificate=answer.certificate,
        ),
        out,
    )


def _show_plan(inputs: Inputs, answer: Answer, ranking: Sequence[_Ranked]) -> None:
    from meshwright.cost.analytic import usable_memory
    from meshwright.report.text import chosen_table, estimate_view, pipeline_view, ranking_table

    console = new_console()
    console.print(heading(inputs))
    if not ranking:
        for reason in _no_plan_reasons(inputs, answer):
            console.print(reason, style="red", markup=False)
        return
    best, strategy = ranking[0], ranking[0].strategy
    if best.found.chosen:
        console.print(chosen_table(answer.found))
        console.print(f"The first, as {inputs.engine.name} would run it on these links:", style="dim", markup=False)
    else:
        entries = [(each.found.shorthand, each.estimate) for each in ranking]
        console.print(ranking_table(entries, [each.is_tied for each in ranking], console.width))
        if any(each.is_tied for each in ranking[1:]):
            console.print("= cannot be told from the first: too near for what predictions are worth", style="dim")
    console.print(estimate_view(str(best.found.shorthand), best.estimate, usable_memory(inputs.cluster)))
    console.print(
        pipeline_view(
            strategy.schedule,
            strategy.pipeline_size,
            strategy.virtual_stages,
            strategy.num_microbatches(best.workload),
            console.width,
        )
    )
    console.print(
        f"{answer.certificate.statement} ({answer.elapsed_s:.2f} s, {answer.strategies_per_s:,.0f} a CPU-second).",
        style="dim",
        markup=False,
    )
