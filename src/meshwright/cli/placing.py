"""`plan` for whole operator graphs: a placement for every tensor, within one mesh or within each of several stages."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import typer

from meshwright.cli.common import Inputs, command_line, heading, new_console, print_json, write_plan

if TYPE_CHECKING:
    from meshwright.cost.placed import PlacedStep
    from meshwright.errors import Problem
    from meshwright.search.graph_method import GraphAnswer, GraphMethod, Placed
    from meshwright.strategy import MeshAxis, Strategy

#: Axes of a mesh that is given or taken from the cluster, outermost first.
AXES = ("x", "y", "z")

#: The space in which operators are placed one by one, and the method for it where none is named.
OPERATOR_SPACE = "operator"
DEFAULT_METHOD = "operators"

#: The methods for graphs, as --help lists them without loading them: on one mesh, and in stages.
PLACING = (
    "operators",
    "elimination",
    "ilp",
    "beam",
    "annealing",
    "portfolio",
    "flexflow",
    "double_recursive",
    "tensoropt",
    "gspmd",
    "data_parallel",
    "fsdp",
    "megatron",
    "random_operators",
    "exhaustive_operators",
)
PIPELINES = (
    "alpa",
    "pipedream",
    "piper",
    "rannc",
    "ftpipe",
    "gpipe",
    "greedy",
    "metis",
    "layerwise",
    "random_stages",
    "exhaustive_stages",
)


@dataclass(frozen=True)
class Wishes:
    """What a user asks of a method for graphs, as options say it."""

    method: str
    objective: str = "step_time"
    mesh: str = ""
    microbatches: int = 0
    annotations: Sequence[str] = ()
    cuts: str = ""
    recompute: bool = False
    time_limit_s: float = math.inf
    seed: int = 0
    top: int = 10
    figure: str = ""


def graph_methods() -> Mapping[str, GraphMethod]:
    """The methods for whole graphs, by name."""
    import meshwright.search.pipelines
    import meshwright.search.placing  # noqa: F401
    from meshwright.search.graph_method import GRAPH_METHODS

    return GRAPH_METHODS


def wish_problems(wishes: Wishes) -> list[Problem]:
    """Everything that is wrong with the options by themselves."""
    from meshwright.errors import InputError

    problems: list[Problem] = []
    for read in (
        lambda: parse_mesh(wishes.mesh),
        lambda: parse_annotations(wishes.annotations),
        lambda: parse_cuts(wishes.cuts),
    ):
        try:
            read()
        except InputError as error:
            problems += error.problems
    return problems


def parse_mesh(text: str) -> tuple[MeshAxis, ...]:
    """The axes of a mesh such as `32x8`, outermost first; none where none is given.

    >>> [(axis.name, axis.size) for axis in parse_mesh("32x8")]
    [('x', 32), ('y', 8)]
    """
    from meshwright.errors import InputError, Problem
    from meshwright.strategy import MeshAxis

    if not text:
        return ()
    sizes = text.lower().split("x")
    if len(sizes) > len(AXES) or not all(re.fullmatch("[1-9][0-9]{0,8}", size) for size in sizes):
        rule = f"sizes of 1 to {len(AXES)} axes, outermost first, with x between"
        raise InputError([Problem("--mesh", text, rule, "32x8")])
    return tuple(MeshAxis(name, int(size)) for name, size in zip(AXES, sizes, strict=False))


def parse_annotations(texts: Sequence[str]) -> dict[str, dict[str, str]]:
    """Placements that a user wants: `block/tensor:x=batch,y=hidden`, one for each tensor or operator.

    >>> parse_annotations(["layer/x:x=batch,y=seq"])
    {'layer/x': {'x': 'batch', 'y': 'seq'}}
    """
    from meshwright.errors import InputError, Problem

    found: dict[str, dict[str, str]] = {}
    problems = []
    for text in texts:
        name, colon, parts = text.rpartition(":")
        pairs = [part.partition("=") for part in parts.split(",")]
        if not colon or not name or not all(axis and equals and dim for axis, equals, dim in pairs):
            rule = "a tensor or operator, a colon, and axis=dim for each axis that splits it"
            problems.append(Problem("--annotate", text, rule, "layer/x:x=batch"))
        elif name in found:
            problems.append(Problem("--annotate", text, f"{name} is annotated twice"))
        else:
            found[name] = {axis.strip(): dim.strip() for axis, _, dim in pairs}
    if problems:
        raise InputError(problems)
    return found


def parse_cuts(text: str) -> tuple[int, ...]:
    """Positions of blocks at which stages begin, in order.

    >>> parse_cuts("21,41")
    (21, 41)
    """
    from meshwright.errors import InputError, Problem

    if not text:
        return ()
    parts = [part.strip() for part in text.split(",")]
    cuts = tuple(int(part) for part in parts if re.fullmatch("[0-9]{1,9}", part))
    if len(cuts) != len(parts) or list(cuts) != sorted(set(cuts)):
        raise InputError([Problem("--cuts", text, "rising positions of blocks, with commas between", "21,41")])
    return cuts


def plan_graph(inputs: Inputs, wishes: Wishes, out: str, as_json: bool) -> None:
    """Ask a method for a whole graph, and show or print what it says; exit status 1 where nothing fits."""
    from meshwright.search.choose.solver import Deadline, within
    from meshwright.search.graph_method import GraphQuestion

    question = GraphQuestion(
        graph=inputs.graph,
        cluster=inputs.cluster,
        engine=inputs.engine,
        workload=inputs.workload,
        objective=wishes.objective,
        mesh=parse_mesh(wishes.mesh),
        microbatches=wishes.microbatches,
        annotations=parse_annotations(wishes.annotations),
        cuts=parse_cuts(wishes.cuts),
        with_recompute=wishes.recompute,
        seed=wishes.seed,
        deadline=within(wishes.time_limit_s) if math.isfinite(wishes.time_limit_s) else Deadline(),
    )
    answer = graph_methods()[wishes.method](question)
    found = answer.found[: wishes.top]
    if out and found:
        best = found[0]
        write_plan(
            out,
            inputs,
            best.strategy,
            best.estimate,
            answer.certificate,
            workload=inputs.workload,
            shorthand=_shorthand(inputs, best),
        )
    if wishes.figure and found:
        _draw(wishes.figure, inputs, answer)
    if as_json:
        print_json("plan-result/1", _json(inputs, answer, found))
    elif out != "-":
        _show(inputs, answer, found)
    if not found:
        raise typer.Exit(1)


def _draw(path: str, inputs: Inputs, answer: GraphAnswer) -> None:
    from meshwright.report.panels import panels_of
    from meshwright.report.placement import placement_figure

    strategy, method = answer.found[0].strategy, answer.certificate.method
    panels = panels_of(inputs.graph, strategy, inputs.workload, title=method, step=_step(inputs, strategy))
    placement_figure(panels, path, title=f"{inputs.graph.name} on {inputs.cluster.name}", command=command_line())


def _json(inputs: Inputs, answer: GraphAnswer, found: Sequence[Placed]) -> dict[str, Any]:
    entries = [
        {
            "shorthand": _shorthand(inputs, placed),
            "strategy": asdict(placed.strategy),
            "estimate": asdict(placed.estimate),
            "objective": placed.objective,
        }
        for placed in found
    ]
    certificate = asdict(answer.certificate)
    graph, workload = inputs.graph, inputs.workload
    return {
        "model": {
            "name": graph.name,
            "num_parameters": graph.num_parameters,
            "forward_flops": graph.forward_flops(workload.global_batch, workload.seq_len),
            **inputs.told,
        },
        "best": entries[0] if entries else None,
        "ranking": entries,
        "space": {
            "name": answer.certificate.space,
            "num_strategies": answer.num_members or answer.certificate.num_strategies,
            "num_feasible": answer.certificate.num_feasible,
        },
        "elapsed_s": answer.elapsed_s,
        "cpu_s": answer.cpu_s,
        "strategies_per_s": answer.certificate.num_strategies / answer.cpu_s if answer.cpu_s > 0 else 0.0,
        "phases_s": {**(inputs.traced.phases_s if inputs.traced else {}), **answer.phases_s},
        "certificate": {
            **certificate,
            "lower_bound_s": _finite(answer.lower_bound_s),
            "gap": _finite(answer.gap),
        },
        "reasons": list(answer.reasons),
    }


def _shorthand(inputs: Inputs, placed: Placed) -> str:
    """The degrees that a strategy comes down to, where it does."""
    from meshwright.strategy import shorthand_of

    strategy = placed.strategy
    if strategy.is_placed or any(stage.splits for stage in strategy.stages):
        return ""
    return str(shorthand_of(strategy, inputs.graph) or "")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _show(inputs: Inputs, answer: GraphAnswer, found: Sequence[Placed]) -> None:
    from meshwright.cost.analytic import usable_memory
    from meshwright.report.placement import placement_text
    from meshwright.report.text import estimate_view, front_table

    console = new_console()
    console.print(heading(inputs))
    for line in _told(inputs):
        console.print(line, style="dim", markup=False)
    if not found:
        for reason in answer.reasons:
            console.print(reason, style="red", markup=False)
        return
    if len(found) > 1:
        console.print(front_table([placed.estimate for placed in found]))
    best = found[0]
    console.print(estimate_view(_title(answer, best), best.estimate, usable_memory(inputs.cluster)))
    step = _step(inputs, best.strategy)
    console.print(placement_text(inputs.graph, best.strategy, inputs.workload, console.width, step))
    console.print(f"{answer.certificate.statement} ({answer.cpu_s:.2f} CPU-s).", style="dim", markup=False)
    if inputs.traced and inputs.traced.phases_s:
        phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in inputs.traced.phases_s.items())
        console.print(f"Tracing took CPU-s: {phases}.", style="dim", markup=False)


def _title(answer: GraphAnswer, best: Placed) -> str:
    """The method, and the mesh that it split over."""
    mesh = " x ".join(f"{axis.name} {axis.size}" for axis in best.strategy.mesh)
    return f"by {answer.certificate.method} over {mesh}" if mesh else f"by {answer.certificate.method}"


def _step(inputs: Inputs, strategy: Strategy) -> PlacedStep | None:
    """What every operator takes and what moves, where one mesh does all."""
    from meshwright.cost.layouts import machine_of
    from meshwright.cost.placed import moved

    if not strategy.is_placed or len(strategy.stages) > 1 or any(stage.splits for stage in strategy.stages):
        return None
    machine = machine_of(inputs.cluster, inputs.engine, inputs.workload)
    return moved(inputs.graph, strategy, machine, inputs.workload)


def _told(inputs: Inputs) -> Iterator[str]:
    for key in ("folded", "warnings"):
        yield from inputs.told.get(key, ())
