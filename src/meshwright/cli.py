"""The command line: thin commands over the floors below.

stdout is the result, stderr is progress and errors. Exit status: 0 answered, 1 answered "no" (nothing fits, a check
failed), 2 wrong input, 130 interrupted. Everything heavy is imported by the command that needs it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.cluster import Cluster
    from meshwright.engine import Engine
    from meshwright.errors import Problem
    from meshwright.graph import Graph
    from meshwright.io.inputs import NamedStrategy
    from meshwright.registry import Registry
    from meshwright.results import Estimate, Measurement
    from meshwright.search.method import Answer, Found
    from meshwright.search.space import Limits, Space
    from meshwright.strategy import Shorthand, Strategy
    from meshwright.workload import Workload

T = TypeVar("T")

app = typer.Typer(
    name="meshwright",
    help="Plan, predict, explain and really run the split of a neural network over devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Preset, Hugging Face config.json, or its folder.")]
ClusterName = Annotated[str, typer.Argument(metavar="CLUSTER", help="Preset NAMExN such as dgx-h100x8, or a file.")]
StrategyText = Annotated[
    str, typer.Argument(metavar="STRATEGY", help="Shorthand such as tp=8,pp=2,dp=4,zero=1, or a file.")
]


def _whole_number(text: str | int) -> int:
    if not (re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", str(text))):
        raise typer.BadParameter(f"{str(text)[:60]!r} is no whole number.")
    return int(text)


GlobalBatch = Annotated[
    int, typer.Option("--global-batch", metavar="N", parser=_whole_number, help="Sequences per step.")
]
SeqLen = Annotated[int, typer.Option("--seq-len", metavar="S", parser=_whole_number, help="Tokens per sequence.")]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", help="Software that runs it.", show_default="megatron-core; meshwright on local-cpu"),
]
Precision = Annotated[str, typer.Option("--precision", help="bfloat16, float16, float32 or float64.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@dataclass(frozen=True)
class _Inputs:
    graph: Graph
    cluster: Cluster
    workload: Workload
    engine: Engine
    cluster_text: str
    model_text: str


class _Faults:
    """The problems of several inputs while they are read one after the other, so that a user sees all of them."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def of(self, read: Callable[[], Any]) -> Any:
        """What `read` gives, or None with its problems noted."""
        from meshwright.errors import InputError

        try:
            return read()
        except InputError as error:
            self.problems += error.problems

    def refuse(self) -> None:
        """Raise where something was noted."""
        from meshwright.errors import InputError

        if self.problems:
            raise InputError(dict.fromkeys(self.problems))


def _read_inputs(
    model: str, cluster: str, global_batch: int, seq_len: int, engine: str | None, precision: str, faults: _Faults
) -> _Inputs:
    """All inputs, or one error with the problems of all of them and those noted before."""
    from meshwright.io.inputs import check_model_takes, make_workload, read_cluster, read_engine
    from meshwright.io.models import load_model

    graph = faults.of(lambda: load_model(model))
    machine = faults.of(lambda: read_cluster(cluster))
    workload = faults.of(lambda: make_workload(global_batch, seq_len, precision))
    software: Any = faults.of(lambda: read_engine(engine, machine)) if machine or engine else None
    if graph and workload:
        faults.of(lambda: check_model_takes(graph, workload))
    faults.refuse()
    return _Inputs(graph, machine, workload, software, cluster, model)


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def _print_json(schema: str, values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"schema": schema, **values}, allow_nan=False) + "\n")


# --- plan ----------------------------------------------------------------------------------------------------------


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

    faults = _Faults()
    look = faults.of(lambda: _method(method))
    kind = faults.of(lambda: _space(space)) or UniformSpace
    limits = faults.of(lambda: _limits(kind, fix, largest))
    faults.of(lambda: _check_objective(objective))
    faults.of(lambda: _check_one_stdout(out, as_json))
    inputs = _read_inputs(model, cluster, global_batch, seq_len, engine, precision, faults)
    folds = inputs.engine.defaults.folds_experts
    place = kind(inputs.graph, inputs.cluster.num_devices, inputs.workload, limits, folds)
    question = Question(place, inputs.cluster, inputs.engine, objective, top)
    with _progress("evaluating strategies", quiet=as_json) as told:
        answer = look(question, told)
    ranking = _ranked(inputs, answer)
    if out and ranking:
        _write_plan(out, inputs, ranking[0], answer)
    if as_json:
        _print_json("plan-result/1", _plan_json(inputs, answer, ranking))
    elif out != "-":
        _show_plan(inputs, answer, ranking)
    if not ranking:
        raise typer.Exit(1)


def _method(name: str) -> Any:
    import meshwright.search.exhaustive  # noqa: F401  (registers itself)
    from meshwright.search.method import METHODS

    return _registered(METHODS, name, "--method")


def _space(name: str) -> type[Space]:
    import meshwright.search.calculon  # noqa: F401  (registers itself)
    from meshwright.search.space import SPACES

    return _registered(SPACES, name, "--space")


def _registered(known: Registry[T], name: str, option: str) -> T:
    """What a name stands for; a miss names the option."""
    from meshwright.errors import InputError, Problem

    try:
        return known[name]
    except InputError as error:
        found = error.problems[0]
        raise InputError([Problem(option, name, found.rule, found.nearest)]) from None


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


def _ranked(inputs: _Inputs, answer: Answer) -> list[_Ranked]:
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


def _estimate(inputs: _Inputs, named: NamedStrategy) -> Estimate:
    from meshwright.cost.analytic import estimate

    return estimate(inputs.graph, inputs.cluster, named.strategy, inputs.workload, inputs.engine)


def _plan_json(inputs: _Inputs, answer: Answer, ranking: Sequence[_Ranked]) -> dict[str, Any]:
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


def _model_json(inputs: _Inputs) -> dict[str, Any]:
    return {
        "name": inputs.graph.name,
        "num_parameters": inputs.graph.num_parameters,
        "forward_flops": inputs.graph.forward_flops(inputs.workload.global_batch, inputs.workload.seq_len),
    }


def _no_plan_reasons(inputs: _Inputs, answer: Answer) -> list[str]:
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


def _write_plan(out: str, inputs: _Inputs, best: _Ranked, answer: Answer) -> None:
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


def _show_plan(inputs: _Inputs, answer: Answer, ranking: Sequence[_Ranked]) -> None:
    from meshwright.cost.analytic import usable_memory
    from meshwright.report.text import chosen_table, estimate_view, pipeline_view, ranking_table

    console = _console()
    console.print(_heading(inputs))
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


def _heading(inputs: _Inputs) -> str:
    from rich.markup import escape

    from meshwright.units import format_count

    graph, workload, cluster = inputs.graph, inputs.workload, inputs.cluster
    return (
        f"[bold]{escape(graph.name)}[/bold] ({format_count(graph.num_parameters)} parameters) "
        f"on [bold]{escape(cluster.name)}[/bold] ({cluster.num_devices:,} devices), "
        f"{workload.global_batch:,} x {workload.seq_len:,} tokens a step, {workload.precision}, "
        f"engine {escape(inputs.engine.name)}"
    )


@contextmanager
def _progress(title: str, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """A line on stderr while work goes on; nothing where nobody watches."""
    console = _console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with console.status(title) as status:
        yield lambda done: status.update(f"{title}: {done:,}")


# --- estimate and explain ------------------------------------------------------------------------------------------


@app.command()
def estimate(
    model: Model,
    cluster: ClusterName,
    strategy: StrategyText,
    global_batch: GlobalBatch,
    seq_len: SeqLen,
    evaluator: Annotated[str, typer.Option(help="Which evaluator predicts.")] = "analytic",
    engine: EngineName = None,
    precision: Precision = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Predict one strategy: time and memory by cause, utilisation, communication, and whether it fits."""
    faults = _Faults()
    faults.of(lambda: _check_evaluator(evaluator))
    inputs, (named,) = _strategy_inputs([strategy], model, cluster, global_batch, seq_len, engine, precision, faults)
    found = _estimate(inputs, named)
    if as_json:
        fix = _nearest_fix(inputs, named, found)
        _print_json("estimate/1", {"shorthand": named.shorthand, **asdict(found), "nearest_fix": fix})
    else:
        _show_estimate(inputs, named, found)
    if not found.feasible:
        raise typer.Exit(1)


def _strategy_inputs(
    strategies: Sequence[str],
    model: str,
    cluster: str,
    global_batch: int,
    seq_len: int,
    engine: str | None,
    precision: str,
    faults: _Faults,
) -> tuple[_Inputs, list[NamedStrategy]]:
    """All inputs and each of the strategies, legal for them."""
    from meshwright.io.inputs import named_strategy, parse_strategy

    given = [faults.of(partial(parse_strategy, text)) for text in strategies]
    inputs = _read_inputs(model, cluster, global_batch, seq_len, engine, precision, faults)
    read = partial(
        named_strategy,
        graph=inputs.graph,
        num_devices=inputs.cluster.num_devices,
        workload=inputs.workload,
        folds_experts=inputs.engine.defaults.folds_experts,
    )
    named = [faults.of(partial(read, one)) for one in given]
    faults.refuse()
    return inputs, named


def _check_evaluator(name: str) -> None:
    from meshwright.errors import InputError, Problem, nearest_name

    if name != "analytic":
        raise InputError([Problem("--evaluator", name, "known: analytic", nearest_name(name, ["analytic"]))])


def _nearest_fix(inputs: _Inputs, named: NamedStrategy, found: Estimate) -> str | None:
    if found.feasible or named.shorthand is None:
        return None
    from meshwright.search.repair import nearest_fix

    return nearest_fix(named.shorthand, inputs.graph, inputs.cluster, inputs.workload, inputs.engine)


def _show_estimate(inputs: _Inputs, named: NamedStrategy, found: Estimate) -> None:
    from meshwright.cost.analytic import usable_memory
    from meshwright.report.text import estimate_view

    console = _console()
    console.print(_heading(inputs))
    console.print(estimate_view(named.shorthand or "(from file)", found, usable_memory(inputs.cluster)))
    fix = _nearest_fix(inputs, named, found)
    if fix:
        console.print(f"nearest fix: {fix}")


@app.command()
def explain(
    model: Model,
    cluster: ClusterName,
    strategy: StrategyText,
    global_batch: GlobalBatch,
    seq_len: SeqLen,
    against: Annotated[str, typer.Option("--against", metavar="STRATEGY", help="Say where the two part.")] = "",
    engine: EngineName = None,
    precision: Precision = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Take an estimate apart: which operator, tensor and collective makes each number, and where each tensor lies."""
    from meshwright.cost.explain import explain as take_apart

    texts = [strategy, against] if against else [strategy]
    inputs, (named, *others) = _strategy_inputs(
        texts, model, cluster, global_batch, seq_len, engine, precision, _Faults()
    )
    other = others[0] if others else None
    found = take_apart(inputs.graph, inputs.cluster, named.strategy, inputs.workload, inputs.engine)
    compared = _estimate(inputs, other) if other else None
    if as_json:
        values = {"shorthand": named.shorthand, **asdict(found)}
        if other and compared:
            values["against"] = {"shorthand": other.shorthand, "estimate": asdict(compared)}
        _print_json("explanation/1", values)
        return
    from meshwright.report.text import comparison_table, leaf_tree, placement_table, shorthand_text

    console = _console()
    console.print(_heading(inputs))
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


# --- run -----------------------------------------------------------------------------------------------------------


@app.command()
def run(
    plan_or_model: Annotated[str, typer.Argument(metavar="PLAN_OR_MODEL", help="Plan file, or a model as for plan.")],
    strategy: Annotated[str, typer.Argument(metavar="[STRATEGY]", help="Where a model is given.")] = "",
    steps: Annotated[int, typer.Option(min=1, max=1_000_000, help="Steps to train.")] = 3,
    nproc: Annotated[int, typer.Option("--nproc", min=0, help="Processes; must be the strategy's.")] = 0,
    global_batch: Annotated[
        int | None, typer.Option("--global-batch", metavar="N", parser=_whole_number, help="Sequences per step.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", metavar="S", parser=_whole_number, help="Tokens per sequence.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float64, float32 or bfloat16.", show_default="the plan's, or float32")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
    tokens: Annotated[str, typer.Option(metavar="FILE", help="Train on these token ids (.npy or .bin).")] = "",
    cluster: Annotated[str, typer.Option(help="Predict for this cluster.", show_default="local-cpuxP")] = "",
    check: Annotated[bool, typer.Option("--check", help="Compare with one device, every gradient.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train on PyTorch (Gloo processes of this machine) under a strategy; dropout is off, so that runs compare."""
    from meshwright.io.inputs import read_cluster, read_engine
    from meshwright.io.runs import RunRequest, read_run

    request = RunRequest(plan_or_model, strategy, nproc, global_batch, seq_len, dtype)
    graph, named, workload = read_run(request)
    cluster_text = cluster or f"local-cpux{named.strategy.num_devices}"
    machine = read_cluster(cluster_text)
    inputs = _Inputs(graph, machine, workload, read_engine("meshwright", machine), cluster_text, plan_or_model)
    from meshwright.runtime.launch import run as execute

    with _progress(f"training on {named.strategy.num_devices} processes", quiet=as_json):
        measured = execute(graph, named.strategy, workload, steps=steps, seed=seed, check=check, tokens=tokens or None)
    predicted = _estimate(inputs, named) if machine.num_devices == named.strategy.num_devices else None
    if as_json:
        _print_json("run/1", _run_json(named, measured, predicted))
    else:
        from meshwright.report.text import measurement_view

        console = _console()
        console.print(_heading(inputs))
        console.print(f"strategy {named.shorthand or '(from file)'}")
        console.print(measurement_view(measured, predicted))
    if measured.check and not measured.check.passed:
        raise typer.Exit(1)


def _run_json(named: NamedStrategy, measured: Measurement, predicted: Estimate | None) -> dict[str, Any]:
    values = {"shorthand": named.shorthand, **asdict(measured)}
    values["predicted"] = asdict(predicted) if predicted else {}
    if measured.check:
        values["check"] = {**asdict(measured.check), "passed": measured.check.passed}
    return values


# --- validate ------------------------------------------------------------------------------------------------------


@app.command()
def validate(
    runs: Annotated[str, typer.Argument(metavar="RUNS.csv", help="Measured runs, one a row.")],
    figure: Annotated[
        str, typer.Option("--figure", metavar="FILE.html", help="Draw predicted against measured step times.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Predict measured runs and compare: errors of step time and memory, and how well runs are ranked, by source."""
    from meshwright.bench.validate import to_json, validate_runs

    with _progress("predicting runs", quiet=as_json):
        found = validate_runs(runs)
    if figure:
        from meshwright.report.figures import validation_figure

        validation_figure(found.rows, figure)
    if as_json:
        _print_json("validate/1", to_json(found))
    else:
        from meshwright.report.validation import validation_view

        _console().print(validation_view(found))
    if not found.rows:
        raise typer.Exit(2)


# --- presets, calibrate, schema ------------------------------------------------------------------------------------


@app.command()
def presets(as_json: AsJson = False) -> None:
    """List the models, clusters, engines, schedules, methods and spaces that come with Meshwright."""
    import meshwright.search.calculon
    import meshwright.search.exhaustive  # noqa: F401  (registers itself)
    from meshwright.cluster import cluster_templates
    from meshwright.engine import engine_names
    from meshwright.io.models import load_model, model_presets
    from meshwright.schedule import SCHEDULES
    from meshwright.search.method import METHODS
    from meshwright.search.space import SPACES

    models = {name: load_model(name).num_parameters for name in model_presets()}
    clusters = cluster_templates()
    if as_json:
        _print_json(
            "presets/1",
            {
                "models": [{"name": name, "num_parameters": count} for name, count in models.items()],
                "clusters": [
                    {"name": f"{name}xN", "counts": found.counts, "devices_per_unit": found.devices_per_unit}
                    for name, found in clusters.items()
                ],
                "engines": list(engine_names()),
                "schedules": list(SCHEDULES),
                "methods": list(METHODS),
                "spaces": list(SPACES),
            },
        )
        return
    from rich.columns import Columns

    from meshwright.units import format_count

    console = _console()
    console.print("[bold]models[/bold]  (or a Hugging Face config.json)")
    console.print(
        Columns([f"{name} [dim]{format_count(count)}[/dim]" for name, count in models.items()], padding=(0, 3))
    )
    console.print("\n[bold]clusters[/bold]  (NAMExN: N nodes, racks, chips or processes)")
    console.print(
        Columns(
            [f"{name}xN [dim]{found.devices_per_unit} per {found.counts}[/dim]" for name, found in clusters.items()],
            padding=(0, 3),
        )
    )
    listed = {"engines": engine_names(), "schedules": SCHEDULES, "methods": METHODS, "spaces": SPACES}
    for title, names in listed.items():
        console.print(f"\n[bold]{title}[/bold]  {', '.join(names)}")


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
    with _progress("learning from runs", quiet=as_json):
        found = learn(source, list(nouns))
    for noun, path in nouns.items():
        write(getattr(found, noun), path)
    if as_json:
        errors = {name: getattr(found, name) for name in ("before_pct", "after_pct")}
        errors |= {f"memory_{name}": getattr(found, f"memory_{name}") for name in errors}
        skipped = [{"id": row.id, "reason": row.reason} for row in found.skipped]
        _print_json("calibrate/1", {"num_runs": found.num_runs, **errors, "files": nouns, "skipped": skipped})
    else:
        from meshwright.report.validation import calibration_view

        _console().print(calibration_view(found, list(nouns.values())))


def _calibrate_local(nproc: int, out: Sequence[str]) -> None:
    from meshwright.errors import InputError, Problem
    from meshwright.io.native import write
    from meshwright.runtime.calibrate import calibrate_local

    if len(out) > 1:
        raise InputError([Problem("--out", " ".join(out), "a machine is measured into one file, a cluster", out[0])])
    with _progress(f"measuring with {nproc} processes"):
        cluster = calibrate_local(nproc)
    write(cluster, out[0])


@app.command()
def schema(
    noun: Annotated[str, typer.Argument(help="graph, cluster, strategy, plan, ...")] = "", as_json: AsJson = False
) -> None:
    """Print the JSON Schema of a noun's file, or list the nouns."""
    from meshwright.io.native import NOUNS, json_schema

    if as_json:
        _print_json("schema/1", {"noun": noun, "json_schema": json_schema(noun)} if noun else {"nouns": list(NOUNS)})
    elif not noun:
        _console().print("\n".join(NOUNS))
    else:
        sys.stdout.write(json.dumps(json_schema(noun), indent=2) + "\n")


#: What commands need beside the package itself, and the extra that installs it.
EXTRAS = {"torch": "run", "scipy": "fit", "plotly": "report"}


def main() -> None:
    """Run the command line; bad input ends with one clear message and status 2."""
    from meshwright.errors import InputError, MeshwrightError

    try:
        app()
    except InputError as error:
        sys.stderr.write("".join(f"error: {problem}\n" for problem in error.problems))
        sys.exit(2)
    except MeshwrightError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        sys.stderr.write(f"error: this needs {missing}: pip install 'meshwright[{EXTRAS[missing]}]'\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
