"""`simulate` and `schedule`: a step as events, and any pipeline schedule on its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
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
    ProfileFile,
    SeqLen,
    StrategyText,
    app,
    case_of,
    check_trace_name,
    command_line,
    fix_of,
    heading,
    new_console,
    print_json,
    progress,
    read_profile,
    strategy_inputs,
    whole_number,
)

if TYPE_CHECKING:
    from meshwright.io.inputs import NamedStrategy
    from meshwright.schedule import Table, Timeline
    from meshwright.schedule.times import StageTimes
    from meshwright.sim.conditions import Conditions, Curve, Spread
    from meshwright.sim.step import Simulation
    from meshwright.sim.tasks import TaskGraph


# --- simulate --------------------------------------------------------------------------------------------------------


@app.command()
def simulate(
    model: Model,
    cluster: ClusterName,
    strategy: StrategyText,
    global_batch: GlobalBatch,
    seq_len: SeqLen = None,
    detail: Annotated[str, typer.Option(help="What a task is: stage, block or operator.")] = "block",
    unfold: Annotated[bool, typer.Option("--unfold", help="Every device, not one a pipeline rank.")] = False,
    shared_links: Annotated[
        bool, typer.Option("--shared-links", help="Messages that meet on a link share it (every device).")
    ] = False,
    cores: Annotated[
        int | None, typer.Option(min=1, max=100_000, help="Devices are processes that share so many cores.")
    ] = None,
    slow_device: Annotated[
        str, typer.Option(metavar="DEVICE=FACTOR,...", help="Devices that compute more slowly.")
    ] = "",
    slow_link: Annotated[
        str, typer.Option(metavar="DEVICE=FACTOR,...", help="Devices whose transfers take longer.")
    ] = "",
    jitter: Annotated[float, typer.Option(help="Sigma of a lognormal factor on each task's time.")] = 0.0,
    samples: Annotated[int, typer.Option(min=1, max=100_000, help="Steps drawn under jitter.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the jitter.")] = 0,
    trace: Annotated[
        str, typer.Option("--trace", metavar="FILE", help="Write what happens: .pftrace (Perfetto) or .json (Chrome).")
    ] = "",
    figure: Annotated[str, typer.Option("--figure", metavar="FILE.html", help="Draw who does what when.")] = "",
    stragglers: Annotated[
        str, typer.Option("--stragglers", metavar="FILE.html", help="Draw what one slow device or card costs.")
    ] = "",
    profile: ProfileFile = "",
    engine: EngineName = None,
    precision: Precision = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Simulate a step task by task: where time goes, who waits for what, the critical path."""
    from meshwright.errors import Problem
    from meshwright.sim.build import build
    from meshwright.sim.conditions import Conditions, condition_problems, parse_factors, spread
    from meshwright.sim.program import Detail
    from meshwright.sim.step import simulate_on

    faults = Faults()
    kind = faults.of(lambda: _detail(detail, list(Detail)))
    slow_devices = faults.of(lambda: parse_factors(slow_device, "--slow-device")) or {}
    slow_links = faults.of(lambda: parse_factors(slow_link, "--slow-link")) or {}
    conditions = Conditions(slow_devices, slow_links, jitter, seed)
    inputs, (named,) = strategy_inputs([strategy], model, cluster, global_batch, seq_len, engine, precision, faults)
    faults.problems += condition_problems(conditions, named.strategy.num_devices)
    if shared_links and cores is not None:
        faults.problems.append(Problem("--cores", str(cores), "processes share cores, devices links: one of the two"))
    measured = faults.of(lambda: read_profile(profile))
    if trace:
        faults.of(lambda: check_trace_name(trace))
    faults.refuse()
    with progress("simulating", quiet=as_json):
        started = time.process_time()
        built = build(case_of(inputs, named), Detail(kind), measured, shared_links=shared_links)
        simulated = partial(simulate_on, built, unfold=unfold, shared_links=shared_links, num_cores=cores)
        found = simulated(conditions=conditions)
        cpu_s = time.process_time() - started
        drawn = None
        if jitter:
            drawn = spread(partial(_step_time, simulated, found.graph), conditions, samples)
        if trace:
            _write_trace(found, trace)
        if figure:
            _draw(found, named, figure)
        studied = _study(simulated, named, stragglers) if stragglers else ()
    if as_json:
        told = _simulation_json(inputs, named, found, cpu_s, drawn)
        print_json("simulation/1", {**told, "stragglers": [asdict(curve) for curve in studied]})
    else:
        _show_simulation(inputs, named, found, cpu_s, drawn)
    if not found.estimate.feasible:
        raise typer.Exit(1)


def _detail(text: str, known: Sequence[str]) -> str:
    from meshwright.errors import InputError, Problem, nearest_name

    if text not in known:
        raise InputError([Problem("--detail", text, f"known: {', '.join(known)}", nearest_name(text, known))])
    return text


def _write_trace(found: Simulation, path: str) -> None:
    from meshwright.io.trace import write_trace
    from meshwright.sim.timeline import trace_of

    write_trace(trace_of(found), path)


def _draw(found: Simulation, named: NamedStrategy, path: str) -> None:
    from meshwright.report.simulation import simulation_panel
    from meshwright.report.text import shorthand_text
    from meshwright.report.timeline import timeline_figure

    title = shorthand_text(named.shorthand) if named.shorthand else named.strategy.schedule
    timeline_figure([simulation_panel(found, title)], path, command=command_line())


def _step_time(simulated: Callable[..., Simulation], graph: TaskGraph, conditions: Conditions) -> float:
    return simulated(conditions=conditions, graph=graph).estimate.step_time_s


def _study(simulated: Callable[..., Simulation], named: NamedStrategy, path: str) -> tuple[Curve, ...]:
    """Step times with a straggler, drawn."""
    from meshwright.report.figures import straggler_figure
    from meshwright.sim.conditions import straggler_study

    graph = simulated(unfold=True).graph
    curves = straggler_study(partial(_step_time, simulated, graph), named.strategy)
    straggler_figure(curves, path, command=command_line())
    return curves


def _simulation_json(
    inputs: Inputs, named: NamedStrategy, found: Simulation, cpu_s: float, drawn: Spread | None
) -> dict[str, Any]:
    from meshwright.sim.timeline import critical_path, idle

    return {
        "shorthand": named.shorthand,
        **asdict(found.estimate),
        "nearest_fix": fix_of(inputs, named, found.estimate),
        "makespan_s": found.makespan_s,
        "num_tasks": found.graph.num_tasks,
        "tasks_per_s": found.graph.num_tasks / max(cpu_s, 1e-9),
        "critical_path": [asdict(segment) for segment in critical_path(found)],
        "idle": [asdict(idle(found, rank)) for rank in range(len(found.graph.ranks))],
        "spread": asdict(drawn) if drawn else None,
    }


def _show_simulation(
    inputs: Inputs, named: NamedStrategy, found: Simulation, cpu_s: float, drawn: Spread | None
) -> None:
    from meshwright.cost.analytic import usable_memory
    from meshwright.report.simulation import critical_view, idle_view, simulated_timeline, spread_text
    from meshwright.report.text import estimate_view

    console = new_console()
    console.print(heading(inputs))
    console.print(estimate_view(named.shorthand or "(from file)", found.estimate, usable_memory(inputs.cluster)))
    console.print(simulated_timeline(found, console.width))
    console.print(idle_view(found))
    console.print(critical_view(found))
    if drawn:
        console.print(spread_text(drawn))
    rate = found.graph.num_tasks / max(cpu_s, 1e-9)
    console.print(f"{found.graph.num_tasks:,} tasks in {cpu_s:.2f} CPU-s ({rate:,.0f} a second)", style="dim")
    fix = fix_of(inputs, named, found.estimate)
    if fix:
        console.print(f"nearest fix: {fix}", markup=False)


# --- schedule --------------------------------------------------------------------------------------------------------


@app.command()
def schedule(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE.csv|auto", help="A schedule, a table (PyTorch's CSV), or auto: look for one."
        ),
    ],
    ranks: Annotated[
        int | None, typer.Option("--ranks", metavar="P", parser=whole_number, help="Pipeline ranks.")
    ] = None,
    microbatches: Annotated[
        int | None, typer.Option("--microbatches", metavar="M", parser=whole_number, help="Microbatches.")
    ] = None,
    virtual: Annotated[
        int | None, typer.Option("--virtual", metavar="V", parser=whole_number, help="Stages on each rank.")
    ] = None,
    times: Annotated[
        str, typer.Option(metavar="F=1,I=1,W=1,p2p=0", help="Per action of a stage; F=1/2/1 gives each stage its own.")
    ] = "",
    memory: Annotated[
        int | None, typer.Option("--memory", metavar="N", parser=whole_number, help="auto: most kept forwards a rank.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="auto: seconds to look.")] = 10.0,
    seed: Annotated[int, typer.Option(min=0, help="auto: of the search.")] = 0,
    csv: Annotated[str, typer.Option("--csv", metavar="OUT", help="Write the table for PyTorch (- is stdout).")] = "",
    figure: Annotated[str, typer.Option("--figure", metavar="FILE.html", help="Draw it.")] = "",
    as_json: AsJson = False,
) -> None:
    """Draw a pipeline schedule with given times: makespan, bubble, what is in flight; or find the best one."""
    from meshwright.errors import InputError, Problem

    if as_json and csv == "-":
        raise InputError([Problem("--csv", "-", "--json prints one object, so the table goes to a file", "out.csv")])
    faults = Faults()
    asked = _asked(name, ranks, microbatches, virtual, faults)
    stage_times = faults.of(lambda: _stage_times(times, asked[1] * asked[3] if asked[0] != "file" else None))
    if name != "auto" and memory is not None:
        faults.problems.append(Problem("--memory", str(memory), "is for auto: named schedules keep what they keep"))
    faults.refuse()
    found = None
    if name == "auto":
        with progress("looking for a schedule", quiet=as_json or csv == "-"):
            table, found = _look(asked, stage_times, memory, time_limit, seed)
    else:
        table = _table(name, asked)
    timeline = _timeline(table, stage_times)
    if csv:
        _write_csv(table, csv)
    if figure:
        _draw_timeline(name, timeline, figure)
    if as_json:
        print_json("schedule/1", _schedule_json(name, timeline, found))
    elif csv != "-":
        from meshwright.report.simulation import schedule_view

        console = new_console()
        console.print(schedule_view(name, timeline, console.width, found))


def _asked(
    name: str, ranks: int | None, microbatches: int | None, virtual: int | None, faults: Faults
) -> tuple[str, int, int, int]:
    """Kind of question (name, file or auto), ranks, microbatches and stages a rank."""
    from meshwright.errors import Problem
    from meshwright.io.inputs import is_schedule_file
    from meshwright.schedule import SCHEDULES

    numbers = {"--ranks": ranks, "--microbatches": microbatches, "--virtual": virtual}
    if is_schedule_file(name) or name == "-":
        given = [Problem(key, str(value), "a table brings its own") for key, value in numbers.items() if value]
        faults.problems += given
        return "file", 1, 1, 1
    kind = "auto" if name == "auto" else "name"
    if kind == "name" and name not in SCHEDULES:
        from meshwright.errors import nearest_name

        known = [*SCHEDULES, "auto"]
        rule = f"known: {', '.join(known)}, or a .csv file"
        faults.problems.append(Problem("NAME", name, rule, nearest_name(name, known)))
    for key, value, example in (("--ranks", ranks, 4), ("--microbatches", microbatches, 8)):
        if value is None:
            faults.problems.append(Problem(key, "", f"is needed with {name}", f"{key} {example}"))
    for key, value in numbers.items():
        if value is not None and not 1 <= value <= MAX_NUMBER:
            faults.problems.append(Problem(key, str(value), f"must be from 1 to {MAX_NUMBER}", f"{key} 1"))
    default = SCHEDULES[name].virtual_stages or 1 if name in SCHEDULES else 1
    p, m, v = ranks or 1, microbatches or 1, default if virtual is None else virtual
    if not faults.problems and p * m * v > MAX_ACTIONS:
        rule = f"ranks x microbatches x stages a rank must be at most {MAX_ACTIONS:,}"
        faults.problems.append(Problem("--microbatches", str(m), rule, str(max(MAX_ACTIONS // (p * v), 1))))
    return kind, p, m, v


#: More is taken for a slip of the finger.
MAX_NUMBER = 100_000
MAX_ACTIONS = 2_000_000


def _stage_times(text: str, num_stages: int | None) -> StageTimes:
    from meshwright.schedule.times import parse_times

    return parse_times(text, num_stages)


def _table(name: str, asked: tuple[str, int, int, int]) -> Table:
    from meshwright.errors import InputError
    from meshwright.io.inputs import read_schedule
    from meshwright.schedule import actions

    if asked[0] == "file":
        return read_schedule(name)
    options = {"pp": "--ranks", "vpp": "--virtual", "num_microbatches": "--microbatches"}
    try:
        return actions(name, asked[1], asked[3], asked[2])
    except InputError as error:
        raise InputError(
            [replace(each, where=options.get(each.where, each.where)) for each in error.problems]
        ) from None


def _timeline(table: Table, times: StageTimes) -> Timeline:
    from meshwright.schedule import compute_parts, replay

    num_stages = 1 + max(part.stage for row in table for action in row for part in compute_parts(action))
    return replay(table, times.of(num_stages), num_stages, times.p2p)


def _look(
    asked: tuple[str, int, int, int], times: StageTimes, memory: int | None, time_limit: float, seed: int
) -> tuple[Table, Any]:
    from meshwright.search.auto_schedule import Pipeline, find_schedule

    _, p, m, v = asked
    forward, input_, weight = times.by_stage(p * v)
    pipeline = Pipeline(
        forward,
        input_,
        weight,
        tuple(stage % p for stage in range(p * v)),
        num_microbatches=m,
        p2p_s=times.p2p,
        max_kept=None if memory is None else (memory,) * p,
    )
    found = find_schedule(pipeline, time_limit_s=time_limit, seed=seed)
    return found.table, found


def _write_csv(table: Table, path: str) -> None:
    from meshwright.io.native import write_text
    from meshwright.schedule import table_csv

    write_text(table_csv(table), path)


def _draw_timeline(name: str, timeline: Timeline, path: str) -> None:
    from meshwright.report.simulation import schedule_panel
    from meshwright.report.timeline import timeline_figure

    timeline_figure([schedule_panel(name, timeline)], path, command=command_line(), unit="")


def _schedule_json(name: str, timeline: Timeline, found: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": name,
        "actions": [[str(action) for action in row] for row in timeline.actions],
        "start": timeline.start_s,
        "end": timeline.end_s,
        "makespan": timeline.makespan_s,
        "period": timeline.period_s,
        "bubble_fraction": timeline.bubble_fraction,
        "peak_in_flight": list(timeline.peak_in_flight),
        "idle": [asdict(each) for each in timeline.idle],
    }
    if found is not None:
        for key in ("lower_bound", "is_optimal", "method"):
            values[key] = getattr(found, key)
        values["named"] = dict(found.named)
    return values
