"""FlexFlow's view of a plan: how many ways each operator is split over samples, operators, attributes and parameters.

Jia, Zaharia, Aiken, "Beyond Data and Model Parallelism for Deep Neural Networks" (1807.05358), section 4: the dims of
an operator's result are *sample* dims, which index the samples of a batch, *parameter* dims, whose partition partitions
the model's parameters, and *attribute* dims, the others (a sample's length, height, width); *operator* parallelism runs
different operators on different devices. Of a strategy the degrees follow from its splits; here a dim that is summed
over is a parameter dim too if a weight has it (a row-parallel product, which the paper's configurations leave out), and
an attribute dim if none has (keys of attention). Devices along an axis that splits nothing repeat the work and count
nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Block, Graph, Operator, Role
from meshwright.sharding import SUMMANDS
from meshwright.strategy import Stage, Strategy

#: The dim that numbers samples.
SAMPLE_DIM = "batch"


class DimKind(StrEnum):
    """What a dim of an operator is."""

    SAMPLE = "sample"
    ATTRIBUTE = "attribute"
    PARAMETER = "parameter"


@dataclass(frozen=True)
class Soap:
    """Degrees of parallelism of one operator; their product is at most the number of devices."""

    sample: int = 1
    operator: int = 1
    attribute: int = 1
    parameter: int = 1


def dim_kinds(block: Block, operator: Operator) -> dict[str, DimKind]:
    """The kind of every dim of an operator.

    Sample: the batch; parameter: a dim of a weight that the result has or that is summed over; attribute: the rest.
    """
    aliases = block.dim_aliases(operator)
    weights = {
        dim
        for name, dims in zip(operator.inputs, operator.input_dims, strict=True)
        if block.tensor[name].role is Role.PARAMETER
        for dim in dims
    }

    def kind(dim: str) -> DimKind:
        if aliases[dim] == SAMPLE_DIM:
            return DimKind.SAMPLE
        return DimKind.PARAMETER if dim in weights else DimKind.ATTRIBUTE

    return {dim: kind(dim) for dim in operator.dims}


def soap_of(strategy: Strategy, graph: Graph) -> dict[str, Soap]:
    """The degrees of every operator, by `block/operator`. Where stages split a block in different ways, those of the
    first."""
    found = {}
    for block in graph.blocks:
        splits, degrees = _where(strategy, graph, block.name)
        for operator in block.operators:
            if operator.name in splits:
                soap = _soap(block, operator, splits[operator.name], degrees)
                found[f"{block.name}/{operator.name}"] = replace(soap, operator=strategy.pipeline_size)
    return found


def _where(strategy: Strategy, graph: Graph, block: str) -> tuple[Mapping[str, Mapping[str, str]], Mapping[str, int]]:
    """The splits of a block and the mesh that they are of."""
    stage = _stage_of(strategy, graph, block)
    mesh = strategy.mesh if stage is None or not stage.mesh else stage.mesh
    splits = strategy.splits if stage is None else stage.splits
    return splits.get(block, {}), {axis.name: axis.size for axis in mesh if axis.name != "pp"}


def _stage_of(strategy: Strategy, graph: Graph, block: str) -> Stage | None:
    """The first stage with splits of its own that has a block."""
    for stage in strategy.stages:
        names = {graph.sequence[index] for part in stage.blocks for index in range(part.start, part.stop)}
        if block in names and stage.splits:
            return stage
    return None


def _soap(block: Block, operator: Operator, split: Mapping[str, str], degrees: Mapping[str, int]) -> Soap:
    kinds, found = dim_kinds(block, operator), dict.fromkeys(DimKind, 1)
    for axis, dim in split.items():
        if dim != SUMMANDS:
            found[kinds[dim]] *= degrees[axis]
    return Soap(found[DimKind.SAMPLE], 1, found[DimKind.ATTRIBUTE], found[DimKind.PARAMETER])


def with_soap(strategy: Strategy, graph: Graph, operator: str, degrees: Soap) -> Strategy:
    """The strategy with one operator, `block/operator`, split by these degrees.

    Of all splits that have them, the one that keeps most of what the operator has, outer axes over samples first. Where
    no axes multiply to them, or a dim cannot be cut so often, `InputError` names the nearest degrees that can be had.
    The operator degree is that of the stages and stays as it is.
    """
    name, _, own = operator.partition("/")
    if name not in graph.block:
        raise InputError([Problem("operator", operator, "no such block", nearest_name(name, graph.block))])
    block = graph.block[name]
    known = {each.name: each for each in block.operators}
    if own not in known:
        raise InputError([Problem("operator", operator, f"no such operator in {name}", nearest_name(own, known))])
    splits, axes = _where(strategy, graph, name)
    if degrees.operator != strategy.pipeline_size:
        rule = f"operators are spread over the stages of the strategy: {strategy.pipeline_size}"
        raise InputError([Problem("operator degree", str(degrees.operator), rule, str(strategy.pipeline_size))])
    now = splits.get(own, {})
    found = [(split, _soap(block, known[own], split, axes)) for split in _splits(strategy, graph, block, known[own])]
    fitting = [split for split, soap in found if soap == replace(degrees, operator=1)]
    if not fitting:
        nearest = min((soap for _, soap in found), key=lambda soap: _distance(soap, degrees))
        raise InputError(
            [Problem(operator, _text(degrees), "no split of its dims over the mesh has them", _text(nearest))]
        )

    def kept(split: Mapping[str, str]) -> int:
        return sum(split.get(axis) == now.get(axis) for axis in axes)

    best = max(fitting, key=kept)
    return _with_split(strategy, graph, name, own, best)


def _splits(strategy: Strategy, graph: Graph, block: Block, operator: Operator) -> Iterator[dict[str, str]]:
    """All splits of an operator that cut evenly; those that cut samples along outer axes come first."""
    _, axes = _where(strategy, graph, block.name)
    sizes = graph.sizes(strategy.microbatch, 1)
    kinds, aliases = dim_kinds(block, operator), block.dim_aliases(operator)
    dims = [dim for dim in operator.dims if operator.splittable(dim)]
    dims.sort(key=lambda dim: kinds[dim] is not DimKind.SAMPLE)
    for chosen in product([*dims, ""], repeat=len(axes)):
        split = {axis: dim for axis, dim in zip(axes, chosen, strict=True) if dim}
        cut = {dim: math.prod(axes[axis] for axis in split if split[axis] == dim) for dim in split.values()}
        # A sequence's length is the workload's: whether it is cut evenly is not known here.
        if all(aliases[dim] in _UNKNOWN or sizes[aliases[dim]] % count == 0 for dim, count in cut.items()):
            yield split


_UNKNOWN = ("seq", "kv_seq", "rows")


def _distance(one: Soap, other: Soap) -> float:
    pairs = ((one.sample, other.sample), (one.attribute, other.attribute), (one.parameter, other.parameter))
    return sum(abs(math.log2(first / second)) for first, second in pairs)


def _text(soap: Soap) -> str:
    return f"sample={soap.sample}, attribute={soap.attribute}, parameter={soap.parameter}"


def _with_split(strategy: Strategy, graph: Graph, block: str, operator: str, split: dict[str, str]) -> Strategy:
    stage = _stage_of(strategy, graph, block)
    if stage is None:
        own = {**strategy.splits[block], operator: split}
        return replace(strategy, splits={**strategy.splits, block: own})
    stages = tuple(
        replace(each, splits={**each.splits, block: {**each.splits[block], operator: split}}) if each is stage else each
        for each in strategy.stages
    )
    return replace(strategy, stages=stages)
