"""What all commands share: options, reading of inputs with all their problems at once, consoles and progress."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from meshwright.cluster import Cluster
    from meshwright.cost.analytic import Case
    from meshwright.engine import Engine
    from meshwright.errors import Problem
    from meshwright.graph import Graph
    from meshwright.io.inputs import NamedStrategy
    from meshwright.io.traced import Traced
    from meshwright.plan import Certificate
    from meshwright.profile import Profile
    from meshwright.registry import Registry
    from meshwright.results import Estimate
    from meshwright.strategy import Strategy
    from meshwright.workload import Workload

T = TypeVar("T")

app = typer.Typer(
    name="meshwright",
    help="Plan, predict, explain and really run the split of a neural network over devices.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Preset, Hugging Face config.json, .pt2, .onnx, or module:function."),
]
ClusterName = Annotated[str, typer.Argument(metavar="CLUSTER", help="Preset NAMExN such as dgx-h100x8, or a file.")]
StrategyText = Annotated[
    str, typer.Argument(metavar="STRATEGY", help="Shorthand such as tp=8,pp=2,dp=4,zero=1, or a file.")
]


def whole_number(text: str | int) -> int:
    if not (re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", str(text))):
        raise typer.BadParameter(f"{str(text)[:60]!r} is no whole number.")
    return int(text)


GlobalBatch = Annotated[
    int, typer.Option("--global-batch", metavar="N", parser=whole_number, help="Sequences per step.")
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        metavar="S",
        parser=whole_number,
        help="Tokens per sequence.",
        show_default="asked for where the model has a sequence",
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option("--engine", help="Software that runs it.", show_default="megatron-core; meshwright on local-cpu"),
]
Precision = Annotated[str, typer.Option("--precision", help="bfloat16, float16, float32 or float64.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


ProfileFile = Annotated[
    str,
    typer.Option("--profile", metavar="FILE", help="Operators as measured by --evaluator profiled."),
]


@dataclass(frozen=True)
class Inputs:
    """What a question is about."""

    graph: Graph
    cluster: Cluster
    workload: Workload
    engine: Engine
    cluster_text: str
    model_text: str
    traced: Traced | None = None

    @property
    def told(self) -> dict[str, list[str]]:
        """What tracing says of itself: equal blocks that it folded, and warnings."""
        if self.traced is None:
            return {}
        unused = "--seq-len is not used: a traced model has the sequence of its example inputs"
        warnings = [*self.traced.warnings, *([unused] if self.workload.seq_len > 1 else [])]
        return {"folded": list(self.traced.folded), "warnings": warnings}


class Faults:
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


def read_inputs(
    model: str,
    cluster: str,
    global_batch: int,
    seq_len: int | None,
    engine: str | None,
    precision: str,
    faults: Faults,
) -> Inputs:
    """All inputs, or one error with the problems of all of them and those noted before."""
    from meshwright.io.inputs import check_model_takes, check_sequence, make_workload, read_cluster, read_engine
    from meshwright.io.models import is_traced, load_model, load_traced

    traced: Any = faults.of(lambda: load_traced(model)) if is_traced(model) else None
    graph: Any = getattr(traced, "graph", None) if is_traced(model) else faults.of(lambda: load_model(model))
    machine = faults.of(lambda: read_cluster(cluster))
    # A traced model has the sizes that it was traced with, and so has its sequence.
    workload = faults.of(lambda: make_workload(global_batch, 1 if seq_len is None else seq_len, precision))
    software: Any = faults.of(lambda: read_engine(engine, machine)) if machine or engine else None
    if graph:
        faults.of(lambda: check_sequence(graph, seq_len))
    if graph and workload:
        faults.of(lambda: check_model_takes(graph, workload))
    faults.refuse()
    return Inputs(graph, machine, workload, software, cluster, model, traced)


def new_console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def print_json(schema: str, values: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps({"schema": schema, **values}, allow_nan=False) + "\n")


def registered(known: Registry[T], name: str, option: str) -> T:
    """What a name stands for; a miss names the option."""
    from meshwright.errors import InputError, Problem

    try:
        return known[name]
    except InputError as error:
        found = error.problems[0]
        raise InputError([Problem(option, name, found.rule, found.nearest)]) from None


def case_of(inputs: Inputs, named: NamedStrategy) -> Case:
    """All that an estimate depends on."""
    from meshwright.cost.analytic import Case

    return Case(inputs.graph, inputs.cluster, named.strategy, inputs.workload, inputs.engine)


def predict(
    inputs: Inputs, named: NamedStrategy, evaluator: str | None = None, profile: Profile | None = None
) -> Estimate:
    """The estimate of an evaluator; where none is asked for, of the quickest that knows the schedule."""
    from meshwright.sim.evaluators import evaluate

    return evaluate(case_of(inputs, named), evaluator, profile)


def read_profile(path: str) -> Profile | None:
    """The profile in a file; None where none is given."""
    if not path:
        return None
    from meshwright.io import native

    profile: Profile = native.read(path, "profile")
    return profile


def heading(inputs: Inputs) -> str:
    from rich.markup import escape

    from meshwright.units import format_count

    graph, workload, cluster = inputs.graph, inputs.workload, inputs.cluster
    return (
        f"[bold]{escape(graph.name)}[/bold] ({format_count(graph.num_parameters)} parameters) "
        f"on [bold]{escape(cluster.name)}[/bold] ({cluster.num_devices:,} devices), "
        f"{workload.global_batch:,} x {workload.seq_len:,} tokens a step, {workload.precision}, "
        f"engine {escape(inputs.engine.name)}"
    )


def check_trace_name(path: str) -> None:
    """Raise `InputError` where a trace cannot be written under this name, before the work that ends in it."""
    from meshwright.errors import InputError
    from meshwright.io.trace import suffix_problems

    if problems := suffix_problems(path):
        raise InputError(problems)


def command_line() -> str:
    """The command as it was given, for the footers of figures."""
    import shlex

    return shlex.join(["meshwright", *sys.argv[1:]])


@contextmanager
def progress(title: str, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """A line on stderr while work goes on; nothing where nobody watches."""
    console = new_console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    with console.status(title) as status:
        yield lambda done: status.update(f"{title}: {done:,}")


def strategy_inputs(
    strategies: Sequence[str],
    model: str,
    cluster: str,
    global_batch: int,
    seq_len: int | None,
    engine: str | None,
    precision: str,
    faults: Faults,
) -> tuple[Inputs, list[NamedStrategy]]:
    """All inputs and each of the strategies, legal for them."""
    from meshwright.io.inputs import named_strategy, parse_strategy

    given = [faults.of(partial(parse_strategy, text)) for text in strategies]
    inputs = read_inputs(model, cluster, global_batch, seq_len, engine, precision, faults)
    read = partial(
        named_strategy,
        graph=inputs.graph,
        num_devices=inputs.cluster.num_devices,
        workload=inputs.workload,
        folds_experts=inputs.engine.defaults.folds_experts,
    )
    named = [faults.of(partial(read, one)) for one in given]
    for one in named:
        if one is not None:
            faults.of(
                partial(check_one_mesh, one.strategy, "estimated where they are planned; the plan has the estimate")
            )
    faults.refuse()
    return inputs, named


def check_one_mesh(strategy: Strategy, says: str) -> None:
    """Raise `InputError` where stages have meshes of their own, and say what such stages are."""
    from meshwright.errors import InputError, Problem

    if any(stage.splits for stage in strategy.stages):
        raise InputError([Problem("strategy", "stages[].splits", f"stages with meshes of their own are {says}")])


def fix_of(inputs: Inputs, named: NamedStrategy, found: Estimate) -> str | None:
    if found.feasible or named.shorthand is None:
        return None
    from meshwright.search.repair import nearest_fix

    return nearest_fix(named.shorthand, inputs.graph, inputs.cluster, inputs.workload, inputs.engine)


def write_plan(
    path: str,
    inputs: Inputs,
    strategy: Strategy,
    estimate: Estimate,
    certificate: Certificate,
    *,
    workload: Workload,
    shorthand: str = "",
) -> None:
    """Write a strategy with what it was made for, and how it was found."""
    from meshwright.io.native import fingerprint, write
    from meshwright.plan import Plan

    write(
        Plan(
            model=inputs.model_text,
            model_hash=fingerprint(inputs.graph),
            cluster=inputs.cluster_text,
            cluster_hash=fingerprint(inputs.cluster),
            engine=inputs.engine.name,
            workload=workload,
            shorthand=shorthand,
            strategy=strategy,
            estimate=estimate,
            certificate=certificate,
        ),
        path,
    )
