"""What cannot be run here, said before anything starts."""

from __future__ import annotations

import json
from collections.abc import Iterator

from meshwright.errors import Problem
from meshwright.graph import Graph, Role
from meshwright.runtime.kernels import ACTIVATIONS, KERNELS, ROTARY_SCALINGS
from meshwright.runtime.train import DTYPES
from meshwright.schedule import SCHEDULES, compute_parts
from meshwright.strategy import CUSTOM, Strategy, strategy_problems, strategy_table
from meshwright.workload import Workload, workload_problems

#: More processes than this on one machine are taken for a slip of the finger.
MAX_PROCESSES = 64

#: The schedules that can be run: those that end a step with a gradient of all its microbatches and nothing under way.
SCHEDULES_RUN = (
    *(name for name, schedule in SCHEDULES.items() if schedule.has_backward and not schedule.is_asynchronous),
    CUSTOM,
)


def run_problems(graph: Graph, strategy: Strategy, workload: Workload) -> list[Problem]:
    """Every reason why a strategy cannot be run here: the rules of strategies, and what execution lacks."""
    problems = workload_problems(workload)
    if not problems:
        problems += strategy_problems(strategy, graph, strategy.num_devices, workload)
    if strategy.num_devices > MAX_PROCESSES:
        rule = f"at most {MAX_PROCESSES} processes run on one machine"
        problems.append(Problem("devices", str(strategy.num_devices), rule, str(MAX_PROCESSES)))
    if workload.precision not in DTYPES and not problems:
        problems.append(Problem("precision", workload.precision, f"runs on CPU: {', '.join(DTYPES)}", "bfloat16"))
    problems += dict.fromkeys(_graph_problems(graph))
    return problems or list(_strategy_problems(graph, strategy, workload))


def _graph_problems(graph: Graph) -> Iterator[Problem]:
    ends = (graph.block[graph.sequence[0]], graph.block[graph.sequence[-1]])
    inputs = [{tensor.name for tensor in block.tensors if tensor.role is Role.INPUT} for block in ends]
    if inputs != [{"tokens"}, {"labels"}] or "loss" not in ends[1].tensor or "vocab" not in graph.dims:
        rule = "is run from a first block that takes tokens to a last one that takes labels and gives a loss"
        yield Problem("model", graph.name, rule)
    for block in graph.blocks:
        for operator in block.operators:
            where = f"model: {block.name}.{operator.name}"
            scaling = str(operator.attributes.get("scaling", ""))
            function = str(operator.attributes.get("function", "silu"))
            if operator.kind not in KERNELS:
                yield Problem(where, operator.kind, f"operators that can be run: {', '.join(KERNELS)}")
            elif operator.kind == "rotary" and scaling and json.loads(scaling)["rope_type"] not in ROTARY_SCALINGS:
                yield Problem(where, scaling, f"rotary scalings that can be run: {', '.join(sorted(ROTARY_SCALINGS))}")
            elif function not in ACTIVATIONS:
                yield Problem(where, function, f"activations that can be run: {', '.join(ACTIVATIONS)}")


def _schedule_problems(strategy: Strategy, num_microbatches: int) -> Iterator[Problem]:
    if strategy.schedule not in SCHEDULES_RUN:
        rule = f"is predicted only; schedules that can be run: {', '.join(SCHEDULES_RUN)}"
        yield Problem("schedule", strategy.schedule, rule, "1F1B")
        return
    table = strategy_table(strategy, num_microbatches)
    extra = [str(action) for row in table for action in row if not compute_parts(action)]
    if extra:
        rule = "is not run from a table: messages and state follow from the computations"
        yield Problem("table", ", ".join(extra[:4]), rule, "the table without it")


def _strategy_problems(graph: Graph, strategy: Strategy, workload: Workload) -> Iterator[Problem]:
    yield from _schedule_problems(strategy, strategy.num_microbatches(workload))
    if strategy.state.parameter > strategy.state.gradient or strategy.state.gradient > strategy.state.optimizer:
        rule = "what rests sharded is updated sharded: parameter needs gradient, gradient needs optimizer"
        yield Problem("state", str(strategy.state), rule)
    layouts = strategy.layouts(graph)
    for pair in graph.tied:
        places = [layouts[block].made[tensor] for block, tensor in (path.split("/") for path in pair)]
        if places[0] != places[1]:
            yield Problem("splits", " and ".join(pair), "are one tensor and must be split alike")
    passed = [
        position for stage in strategy.stages for part in stage.blocks for position in range(part.start, part.stop)
    ]
    if passed != sorted(passed) or not all(stage.blocks for stage in strategy.stages):
        rule = "stages that run hold blocks in the model's order, at least one each"
        yield Problem("stages", f"blocks {passed}", rule)
