"""Legality of strategies at the level of operators: those that place single operators and tensors at rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from meshwright.errors import Problem, nearest_name
from meshwright.graph import Block, Graph
from meshwright.sharding import SPREAD, SUMMANDS, can_be_summands, hubs, rest_key, state_key
from meshwright.strategy.common import batch_problems, order_problems, position_problems, stage_problems
from meshwright.strategy.record import Strategy
from meshwright.workload import Workload


def placed_problems(strategy: Strategy, graph: Graph, num_devices: int, workload: Workload) -> list[Problem]:
    """Every rule that a strategy at the level of operators breaks."""
    problems = []
    if strategy.num_devices != num_devices:
        meshes = [stage.mesh for stage in strategy.stages if stage.mesh] or [strategy.mesh]
        product = " + ".join(" x ".join(f"{axis.name}={axis.size}" for axis in mesh) for mesh in meshes)
        rule = f"must be the cluster's {num_devices} devices"
        problems.append(Problem("mesh", product or "one device", rule))
    problems += batch_problems(strategy.microbatch, 1, workload)
    problems += stage_problems(strategy, graph)
    sizes = graph.sizes(strategy.microbatch, workload.seq_len)
    if strategy.splits or not any(stage.splits for stage in strategy.stages):
        degrees = {name: size for name, size in strategy.degrees.items() if name != "pp"}
        problems += placed_split_problems(graph, strategy.splits, sizes, degrees, graph.block)
    for index, stage in enumerate(strategy.stages):
        if stage.splits:
            degrees = {axis.name: axis.size for axis in stage.mesh or strategy.mesh if axis.name != "pp"}
            found = placed_split_problems(graph, stage.splits, sizes, degrees, stage.splits)
            problems += [replace(problem, where=f"stages[{index}].{problem.where}") for problem in found]
    problems += _recomputed_problems(strategy, graph)
    if strategy.state.axes:
        rule = "where state lies is said by the splits of parameters, and of `parameter@state`"
        problems.append(Problem("state.axes", ", ".join(strategy.state.axes), rule, "no axes"))
    problems += position_problems(graph, workload)
    return problems or order_problems(strategy, strategy.num_microbatches(workload))


def _recomputed_problems(strategy: Strategy, graph: Graph) -> Iterator[Problem]:
    for name, tensors in strategy.recomputed.items():
        if name not in graph.block:
            yield Problem("recomputed", name, "no such block", nearest_name(name, graph.block))
            continue
        made = [tensor for operator in graph.block[name].operators for tensor in operator.outputs]
        for tensor in tensors:
            if tensor not in made:
                rule = "no operator of the block makes it"
                yield Problem(f"recomputed.{name}", tensor, rule, nearest_name(tensor, made))


def placed_split_problems(
    graph: Graph,
    splits: Mapping[str, Mapping[str, Mapping[str, str]]],
    sizes: Mapping[str, Any],
    degrees: Mapping[str, int],
    needed: Iterable[str],
) -> list[Problem]:
    """What is wrong with the splits of operators and tensors at rest; those of the blocks `needed` must be there."""
    problems: dict[Problem, None] = {}
    for name in sorted({*splits, *needed} - set(graph.block)):
        problems[Problem("splits", name, "no such block", nearest_name(name, graph.block))] = None
    for name in [block.name for block in graph.blocks if block.name in {*splits, *needed}]:
        block, given = graph.block[name], splits.get(name, {})
        allowed = _placed_entries(block)
        states = {state_key(tensor.name): tensor.name for tensor in block.parameters if tensor.differentiable}
        for key in sorted(set(given) - set(allowed) - set(states)):
            rule, nearest = "no such operator or tensor at rest in the block", nearest_name(key, allowed)
            problems[Problem(f"splits.{name}", key, rule, nearest)] = None
        for key in sorted(set(allowed) - set(given)):
            problems[Problem(f"splits.{name}", key, "its split is missing")] = None
        for key, entry in allowed.items():
            found = _placed_entry_problems(f"splits.{name}.{key}", entry, given.get(key, {}), sizes, degrees)
            problems |= dict.fromkeys(found)
        for key, parameter in states.items():
            if key in given:
                entry = allowed[rest_key(block, parameter)]
                entry = replace(entry, words=())
                stored = given.get(rest_key(block, parameter), {})
                where = f"splits.{name}.{key}"
                problems |= dict.fromkeys(_placed_entry_problems(where, entry, given[key], sizes, degrees))
                for axis, dim in stored.items():
                    if dim in entry.dims and given[key].get(axis) != dim:
                        rule = f"the parameter is stored with {axis}: {dim}, and its state may only be cut further"
                        text = f"{axis}: {given[key].get(axis, '')}"
                        problems[Problem(where, text, rule, f"{axis}: {dim}")] = None
    return list(problems)


@dataclass(frozen=True)
class _Entry:
    """What may be split: dims by the entry's own names, the sizes' names of all of its dims, and words besides."""

    dims: tuple[str, ...]
    aliases: dict[str, str]
    words: tuple[str, ...]


def _placed_entries(block: Block) -> dict[str, _Entry]:
    found = {
        operator.name: _Entry(
            tuple(dim for dim in operator.dims if operator.splittable(dim)),
            block.dim_aliases(operator),
            (SUMMANDS,) if operator.linear else (),
        )
        for operator in block.operators
    }
    saved = {name for operator in block.operators for name in operator.saves}
    for name in (*hubs(block), *(tensor.name for tensor in block.parameters)):
        tensor = block.tensor[name]
        is_summable = can_be_summands(tensor) and name not in saved
        words = (SPREAD, *((SUMMANDS,) if is_summable else ()))
        found[rest_key(block, name)] = _Entry(tensor.dims, {dim: dim for dim in tensor.dims}, words)
    return found


def _placed_entry_problems(
    where: str, entry: _Entry, split: Mapping[str, str], sizes: Mapping[str, Any], degrees: Mapping[str, int]
) -> Iterator[Problem]:
    nested: dict[str, list[str]] = {}
    for axis in sorted(split, key=lambda axis: list(degrees).index(axis) if axis in degrees else -1):
        dim = split[axis]
        if axis not in degrees:
            yield Problem(where, axis, f"no such mesh axis; axes: {', '.join(degrees)}", nearest_name(axis, degrees))
        elif dim in entry.dims:
            nested.setdefault(dim, []).append(axis)
        elif dim not in entry.words:
            known = (*entry.dims, *entry.words)
            rule = f"dims that may be split: {', '.join(entry.dims) or 'none'}"
            if dim in (SPREAD, SUMMANDS):
                rule = f"{_WORDS[dim]}; {rule}"
            yield Problem(where, f"{axis}: {dim}", rule, nearest_name(dim, known))
    for dim, axes in nested.items():
        size = sizes[entry.aliases[dim]]
        degree = math.prod(degrees[axis] for axis in axes)
        if not isinstance(size, float) and size % degree:
            fits = axes
            while fits and size % math.prod(degrees[axis] for axis in fits):
                fits = fits[:-1]
            nearest = ", ".join(f"{axis}: {dim}" for axis in fits) or f"{dim} whole"
            rule = f"{degree} pieces must divide {dim} = {size}"
            yield Problem(where, ", ".join(f"{axis}: {dim}" for axis in axes), rule, nearest)


_WORDS = {
    SPREAD: f"{SPREAD} is for tensors at rest",
    SUMMANDS: f"{SUMMANDS} is for linear operators, and for activations that no backward reads",
}
