"""Legality of the splits of whole blocks by axes that have a meaning: what may be split, and into how many pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from meshwright.errors import Problem, nearest_name
from meshwright.graph import Graph
from meshwright.strategy.divide import divisors, nearest_divisor
from meshwright.strategy.record import degree_of, root_axis

#: Dims that need not divide: the vocabulary is padded to the degree, flat runs of state too; rows are a mean.
PADDED_DIMS = frozenset({"vocab", "flat", "rows"})


def split_problems(
    graph: Graph,
    splits: Mapping[str, Mapping[str, Mapping[str, str]]],
    sizes: Mapping[str, int],
    degrees: Mapping[str, int],
) -> list[Problem]:
    """Splits that name what is not there, or that do not divide what they split."""
    problems: dict[Problem, None] = {}
    for name in sorted(set(splits) - set(graph.block)):
        problems[Problem("splits", name, "no such block", nearest_name(name, graph.block))] = None
    for block in graph.blocks:
        given = splits.get(block.name, {})
        names = {operator.name for operator in block.operators} | set(block.inputs) | set(block.outputs)
        for name in sorted(names ^ set(given)):
            rule = "no such operator in the block" if name in given else "its split is missing"
            nearest = nearest_name(name, names) if name in given else None
            problems[Problem(f"splits.{block.name}", name, rule, nearest)] = None
        for operator in block.operators:
            found = _operator_split_problems(
                f"splits.{block.name}.{operator.name}",
                operator.dims,
                operator.unsplit,
                given.get(operator.name, {}),
                block.dim_aliases(operator),
                sizes,
                degrees,
            )
            problems |= dict.fromkeys(found)
        for name in (*block.inputs, *block.outputs):
            dims = block.tensor[name].dims
            where = f"splits.{block.name}.{name}"
            found = _operator_split_problems(where, dims, (), given.get(name, {}), {}, sizes, degrees)
            problems |= dict.fromkeys(found)
    return list(problems)


def _operator_split_problems(
    where: str,
    dims: Sequence[str],
    unsplit: Sequence[str],
    split: Mapping[str, str],
    aliases: Mapping[str, str],
    sizes: Mapping[str, int],
    degrees: Mapping[str, int],
) -> Iterator[Problem]:
    for axis, dim in split.items():
        if axis not in degrees:
            yield Problem(where, axis, f"no such mesh axis; axes: {', '.join(degrees)}", nearest_name(axis, degrees))
        elif dim not in dims or dim in unsplit:
            allowed = [name for name in dims if name not in unsplit]
            yield Problem(where, f"{axis}: {dim}", f"dims that may be split: {', '.join(allowed)}")
    for dim in dict.fromkeys(split.values()):
        axes = [axis for axis, split_dim in split.items() if split_dim == dim and axis in degrees]
        degree = math.prod(degrees[axis] for axis in axes)
        if dim in dims and dim not in PADDED_DIMS and sizes[aliases.get(dim, dim)] % degree:
            yield _division_problem(dim, axes, sizes[aliases.get(dim, dim)], sizes, degrees)


def _division_problem(
    dim: str, axes: Sequence[str], size: int, sizes: Mapping[str, int], degrees: Mapping[str, int]
) -> Problem:
    roots = list(dict.fromkeys(root_axis(axis) for axis in axes))
    degree = math.prod(degree_of(root, degrees) for root in roots)
    root = "*".join(roots)
    if dim in ("kv_heads", "group"):
        heads, kv_heads = sizes["kv_heads"] * sizes["group"], sizes["kv_heads"]
        legal = [number for number in divisors(heads) if kv_heads % number == 0 or number % kv_heads == 0]
        nearest = min(legal, key=lambda number: (abs(number - degree), number))
        rule = f"must divide the {heads} heads, and divide or be a multiple of the {kv_heads} key/value heads"
        return Problem(root, str(degree), rule, f"{root}={nearest}")
    rule = f"must divide {_DIM_WORDS.get(dim, dim)} = {size}"
    return Problem(root, str(degree), rule, f"{root}={nearest_divisor(size, degree)}")


_DIM_WORDS = {"ffn": "the MLP's inner size", "seq": "the sequence", "hidden": "the hidden size"}
