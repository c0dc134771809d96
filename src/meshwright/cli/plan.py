"""`plan`: look for the best strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    write_plan,
)
from meshwright.cli.placing import (
    DEFAULT_METHOD,
    OPERATOR_SPACE,
    PIPELINES,
    PLACING,
    Wishes,
    graph_methods,
    plan_graph,
    wish_problems,
)

if TYPE_CHECKING:
    from meshwright.errors import Problem
    from meshwright.results import Estimate
    from meshwright.search.method import Answer, Found, Method
    from meshwright.search.space import Limits, Space
    from meshwright.strategy import Shorthand, Strategy
    from meshwright.workload import Workload


@app.command()
def plan(
    model: Model,
    cluster: ClusterName,
    global_batch: GlobalBatch,
    seq_len: SeqLen = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="How to look. Degrees: exhaustive. "
            f"Operator by operator: {', '.join(PLACING)}. In stages: {', '.join(PIPELINES)}.",
            show_default="exhaustive; operators for traced models",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(help="Where to look: uniform, calculon, or operator.", show_default="as the method has it"),
    ] = None,
    fix: Annotated[str, typer.Option("--fix", metavar="SHORTHAND", help="Keys that must have these values.")] = "",
    largest: Annotated[str, typer.Option("--max", metavar="SHORTHAND", help="Largest values of keys.")] = "",
    objective: Annotated[str, typer.Option(help="step_time, memory or pareto.")] = "step_time",
    top: Annotated[int, typer.Option(min=1, max=10_000, help="How many strategies to show.")] = 10,
    out: Annotated[
        str, typer.Option("--out", metavar="FILE", help="Write the best as a plan file (- is stdout).")
    ] = "",
    mesh: Annotated[
        str,
        typer.Option(
            metavar="AxB",
            help="Axes over which operators are split.",
            show_default="nodes x devices",
            rich_help_panel=GRAPHS,
        ),
    ] = "",
    microbatches: Annotated[
        int, typer.Option(min=0, help="Microbatches of a pipeline (0: the method's).", rich_help_panel=GRAPHS)
    ] = 0,
    annotate: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:AXIS=DIM", help="A placement that is wanted (gspmd).", rich_help_panel=GRAPHS),
    ] = None,
    cuts: Annotated[
        str, typer.Option(metavar="I,J,..", help="Blocks at which stages begin (gpipe).", rich_help_panel=GRAPHS)
    ] = "",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Activations may be made again.", rich_help_panel=GRAPHS)
    ] = False,
    time_limit: Annotated[
        float, typer.Option(min=0.0, metavar="S", help="Seconds to look for.", rich_help_panel=GRAPHS)
    ] = math.inf,
    seed: Annotated[int, typer.Option(help="Of methods that draw.", rich_help_panel=GRAPHS)] = 0,
    figure: Annotated[
        str, typer.Option(metavar="FILE.html", help="Draw where every tensor lies.", rich_help_panel=GRAPHS)
    ] = "",
    engine: EngineName = None,
    precision: Precision = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Find the best strategy: by degrees (every legal one is evaluated), or operator by operator."""
    faults = Faults()
    faults.of(lambda: _check_objective(objective))
    faults.of(lambda: _check_one_stdout(out, as_json))
    wishes = Wishes(
        method=method or DEFAULT_METHOD,
        objective=objective,
        mesh=mesh,
        microbatches=microbatches,
        annotations=annotate or (),
        cuts=cuts,
        recompute=recompute,
        time_limit_s=time_limit,
        seed=seed,
        top=top,
        figure=figure,
    )
    is_of_graphs = faults.of(lambda: _is_of_graphs(model, method, space))
    if is_of_graphs:
        faults.problems += wish_problems(wishes)
        faults.problems += _not_of_graphs(space, fix, largest)
        plan_graph(read_inputs(model, cluster, global_batch, seq_len, engine, precision, faults), wishes, out, as_json)
    else:
        if is_of_graphs is not None:  # else the method is the problem
            faults.problems += _of_graphs_alone(wishes)
        chosen = method if method and method in _degree_methods() else "exhaustive"
        degrees = _Degrees(chosen, space or "uniform", fix, largest, objective, top)
        _plan_degrees(
            degrees,
            lambda: read_inputs(model, cluster, global_batch, seq_len, engine, precision, faults),
            faults,
            out,
            as_json,
        )


#: The options of methods for operator graphs, as --help groups them.
GRAPHS = "Operator graphs"


@dataclass(frozen=True)
class _Degrees:
    """What a user asks of a method for degrees, as options say it."""

    method: str
    space: str
    fix: str
    largest: str
    objective: str
    top: int


def _is_of_graphs(model: str, method: str | None, space: str | None) -> bool:
    """Whether a question is about a graph's operators rather than about degrees."""
    from meshwright.errors import InputError, Problem, nearest_name
    from meshwright.io.models import is_traced

    if method is None:
        return space == OPERATOR_SPACE or is_traced(model)
    if method in _degree_methods():
        if is_traced(model):
            rule = f"looks at degrees, which {model} has not: its operators are placed one by one"
            raise InputError([Problem("--method", method, rule, DEFAULT_METHOD)])
        return False
    if method not in graph_methods():
        known = [*_degree_methods(), *graph_methods()]
        raise InputError([Problem("--method", method, f"known: {', '.join(known)}", nearest_name(method, known))])
    return True


def _not_of_graphs(space: str | None, fix: str, largest: str) -> list[Problem]:
    """Options that mean nothing where a graph's operators are placed."""
    from meshwright.errors import Problem

    rule = "is for degrees; here operators are placed one by one"
    problems = [Problem(name, text, rule) for name, text in (("--fix", fix), ("--max", largest)) if text]
    if space not in (None, OPERATOR_SPACE):
        problems.append(Problem("--space", str(space), "this method looks at operator graphs", OPERATOR_SPACE))
    return problems


def _of_graphs_alone(wishes: Wishes) -> list[Problem]:
    """Options that mean nothing where degrees are looked at."""
    from meshwright.errors import Problem

    given = {
        "--mesh": wishes.mesh,
        "--microbatches": wishes.microbatches or "",
        "--annotate": " ".join(wishes.annotations),
        "--cuts": wishes.cuts,
        "--recompute": wishes.recompute or "",
        "--time-limit": wishes.time_limit_s if math.isfinite(wishes.time_limit_s) else "",
        "--figure": wishes.figure,
    }
    rule = "is for methods that place operators; here degrees are looked at"
    return [
        Problem(name, "" if value is True else str(value), rule, f"--method {DEFAULT_METHOD}")
        for name, value in given.items()
        if value != ""
    ]


def _plan_degrees(wanted: _Degrees, read: Callable[[], Inputs], faults: Faults, out: str, as_json: bool) -> None:
    """Look through a grid of degrees, and show or print what is found; exit status 1 where nothing fits."""
    from meshwright.search.method import Question
    from meshwright.search.space import UniformSpace

    kind = faults.of(lambda: _space(wanted.space)) or UniformSpace
    limits = faults.of(lambda: _limits(kind, wanted.fix, wanted.largest))
    inputs = read()
    folds = inputs.engine.defaults.folds_experts
    place = kind(inputs.graph, inputs.cluster.num_devices, inputs.workload, limits, folds)
    question = Question(place, inputs.cluster, inputs.engine, wanted.objective, wanted.top)
    with progress("evaluating strategies", quiet=as_json) as told:
        answer = _degree_methods()[wanted.method](question, told)
    ranking = _ranked(inputs, answer)
    if out and ranking:
        best, shorthand = ranking[0], str(ranking[0].found.shorthand)
        write_plan(
            out,
            inputs,
            best.strategy,
            best.estimate,
            answer.certificate,
            workload=best.workload,
            shorthand=shorthand,
        )
    if as_json:
        print_json("plan-result/1", _plan_json(inputs, answer, ranking))
    elif out != "-":
        _show_plan(inputs, answer, ranking)
    if not ranking:
        raise typer.Exit(1)


def _degree_methods() -> Mapping[str, Method]:
    import meshwright.search.exhaustive  # noqa: F401  (registers itself)
    from meshwright.search.method import METHODS

    return METHODS


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
