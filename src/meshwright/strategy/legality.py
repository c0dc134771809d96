"""Legality: every rule that a strategy, or a shorthand, breaks for a given model, cluster size and workload."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph, Role
from meshwright.strategy.common import (
    batch_problems,
    number_problems,
    order_problems,
    position_problems,
    stage_number_problems,
    stage_problems,
)
from meshwright.strategy.divide import nearest_divisor
from meshwright.strategy.placed import placed_problems
from meshwright.strategy.record import Strategy, degree_of
from meshwright.strategy.shorthand import PRODUCT, Shorthand
from meshwright.strategy.splits import split_problems
from meshwright.strategy.uniform import STATE_AXES, expand
from meshwright.workload import Workload


def legal_strategy(shorthand: Shorthand, graph: Graph, num_devices: int, workload: Workload) -> Strategy:
    """The strategy that a shorthand stands for; raises `InputError` with every rule that it breaks."""
    problems = _degree_problems(shorthand, graph, num_devices)
    faulty = {problem.where for problem in problems}
    # What cannot be expanded is set aside, so that the rest can still be judged.
    if "pp*vpp" in faulty:
        shorthand = replace(shorthand, pp=1, vpp=1, schedule="1F1B")
    if "dp_shard" in faulty:
        shorthand = replace(shorthand, dp_shard=0)
    if faulty & {"ep", "etp"}:
        shorthand = replace(shorthand, ep=1, etp=0)
    strategy = expand(shorthand, graph)
    # The number of devices was said of the degrees, in the user's words.
    problems += [
        problem for problem in strategy_problems(strategy, graph, num_devices, workload) if problem.where != "mesh"
    ]
    if problems:
        raise InputError(dict.fromkeys(problems))
    return strategy


def _degree_problems(shorthand: Shorthand, graph: Graph, num_devices: int) -> list[Problem]:
    """Rules that concern the degrees themselves, before they are expanded."""
    problems = []
    if shorthand.num_devices != num_devices:
        names = [name for name in PRODUCT if getattr(shorthand, name) > 1] or ["tp"]
        product = f"{'*'.join(names)} = {shorthand.num_devices}"
        rest = shorthand.num_devices // shorthand.dp
        nearest = f"dp={num_devices // rest}" if num_devices % rest == 0 else None
        problems.append(Problem("strategy", product, f"must be the cluster's {num_devices} devices", nearest))
    problems += _expert_problems(shorthand, graph)
    if shorthand.dp_shard and not shorthand.zero:
        problems.append(Problem("dp_shard", str(shorthand.dp_shard), "shards nothing with zero=0", "zero=1"))
    elif shorthand.dp_shard and shorthand.dp % shorthand.dp_shard:
        nearest = f"dp_shard={nearest_divisor(shorthand.dp, shorthand.dp_shard)}"
        problems.append(Problem("dp_shard", str(shorthand.dp_shard), f"must divide dp={shorthand.dp}", nearest))
    problems += stage_number_problems(shorthand.pp * shorthand.vpp, graph)
    return problems


def _expert_problems(shorthand: Shorthand, graph: Graph) -> Iterator[Problem]:
    ep, ranks = shorthand.ep, shorthand.dp * shorthand.cp
    if shorthand.etp not in (0, 1, shorthand.tp):
        yield Problem("etp", str(shorthand.etp), f"must be 1, or tp={shorthand.tp}", "etp=1")
    if ep == 1:
        return
    if "experts" not in graph.dims:
        yield Problem("ep", str(ep), f"{graph.name} has no experts", "ep=1")
        return
    over_tp = shorthand.etp == 1 and shorthand.tp > 1
    if over_tp and ep % shorthand.tp:
        rule = f"with etp=1 experts are spread over all tp={shorthand.tp} ranks: a multiple of that"
        yield Problem("ep", str(ep), rule, f"ep={shorthand.tp}")
    elif (ranks * shorthand.tp if over_tp else ranks) % ep or shorthand.dp % shorthand.spread.axis:
        words = f"dp*cp*tp = {ranks * shorthand.tp}" if over_tp else f"dp*cp = {ranks}"
        nearest = nearest_divisor(ranks * shorthand.tp if over_tp else ranks, ep)
        yield Problem("ep", str(ep), f"must divide {words}", f"ep={nearest}")
    elif shorthand.dp_shard % shorthand.spread.axis:
        rule = f"must be a multiple of the {shorthand.spread.axis} ranks over which experts are spread"
        yield Problem("dp_shard", str(shorthand.dp_shard), rule, f"dp_shard={shorthand.dp}")


def strategy_problems(strategy: Strategy, graph: Graph, num_devices: int, workload: Workload) -> list[Problem]:
    """Every rule that a strategy breaks, memory excepted (that is an estimate's to say)."""
    if problems := list(number_problems(strategy)):
        return problems  # the other rules divide by these numbers
    if strategy.is_placed:
        return placed_problems(strategy, graph, num_devices, workload)
    if any(stage.mesh for stage in strategy.stages):
        return own_mesh_problems(strategy, graph, num_devices, workload)
    if strategy.num_devices != num_devices:
        product = " x ".join(f"{axis.name}={axis.size}" for axis in strategy.mesh) or "one device"
        problems.append(Problem("mesh", product, f"must be the cluster's {num_devices} devices"))
    problems += batch_problems(strategy.microbatch, degree_of("dp", strategy.degrees), workload)
    problems += stage_problems(strategy, graph)
    sizes = graph.sizes(strategy.microbatch * degree_of("dp", strategy.degrees), workload.seq_len)
    problems += split_problems(graph, strategy.splits, sizes, strategy.degrees)
    problems += _recompute_problems(strategy, graph)
    problems += _state_problems(strategy, graph)
    problems += position_problems(graph, workload)
    return problems or order_problems(strategy, strategy.num_microbatches(workload))


def own_mesh_problems(strategy: Strategy, graph: Graph, num_devices: int, workload: Workload) -> list[Problem]:
    """Every rule that a strategy breaks whose stages have meshes of their own; its microbatch counts all ranks'
    sequences."""
    problems = []
    if strategy.num_devices != num_devices:
        sizes_of = " + ".join(
            " x ".join(f"{axis.name}={axis.size}" for axis in stage.mesh) for stage in strategy.stages
        )
        problems.append(Problem("mesh", sizes_of, f"must be the cluster's {num_devices} devices"))
    problems += batch_problems(strategy.microbatch, 1, workload)
    problems += stage_problems(strategy, graph)
    sizes = graph.sizes(strategy.microbatch, workload.seq_len)
    for index, stage in enumerate(strategy.stages):
        degrees = {axis.name: axis.size for axis in stage.mesh}
        own = replace(strategy, mesh=stage.mesh, splits=stage.splits, state=stage.state or strategy.state,
                      recompute=stage.recompute or strategy.recompute)  # fmt: skip
        found = [*number_problems(own)] or [
            *split_problems(graph, own.splits, sizes, degrees),
            *_recompute_problems(own, graph),
            *_state_problems(own, graph),
        ]
        problems += [replace(problem, where=f"stages[{index}].{problem.where}") for problem in found]
    problems += position_problems(graph, workload)
    return problems or order_problems(strategy, strategy.num_microbatches(workload))


def _recompute_problems(strategy: Strategy, graph: Graph) -> Iterator[Problem]:
    for name in sorted(set(graph.block) ^ set(strategy.recompute)):
        if name in strategy.recompute:
            yield Problem("recompute", name, "no such block", nearest_name(name, graph.block))
        else:
            yield Problem("recompute", name, "its choice is missing")


def _state_problems(strategy: Strategy, graph: Graph) -> Iterator[Problem]:
    """State is sharded over axes along which some parameter is otherwise copied."""
    splitting: Counter[str] = Counter()
    num_parameters = 0
    for block in graph.blocks:
        for operator in block.operators:
            split = strategy.splits.get(block.name, {}).get(operator.name, {})
            for name, dims in zip(operator.inputs, operator.input_dims, strict=True):
                if block.tensor[name].role is Role.PARAMETER:
                    num_parameters += 1
                    splitting.update(axis for axis, dim in split.items() if dim in dims)
    for axis in strategy.state.axes:
        if axis not in strategy.degrees:
            rule = f"no such mesh axis; axes: {', '.join(strategy.degrees)}"
            yield Problem("state.axes", axis, rule, nearest_name(axis, strategy.degrees))
        elif axis == "pp" or (axis not in STATE_AXES and splitting[axis]) or splitting[axis] == num_parameters:
            yield Problem("state.axes", axis, "splits parameters, so it holds no copies whose state could be sharded")
