"""The nodes of a space: every operator, every tensor at rest, and the choices of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from meshwright.choice import Array
from meshwright.cost.lifetimes import remakable
from meshwright.cost.operators import FIRST_DIM, SUMMAND, WHOLE, all_codes
from meshwright.graph import Block, Graph, Operator, Role
from meshwright.search.operators.space import REST_DIM, REST_WORDS, Node, Place
from meshwright.sharding import SPREAD, SUMMANDS, can_be_summands, hubs, rest_key, state_key

#: A block and the name of an operator or tensor in it.
Path = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Nodes:
    """All nodes, and the number of each operator, tensor at rest and training state. `owned` are the parameters that
    are counted: of tied ones the first."""

    nodes: list[Node] = field(default_factory=list)
    operators: dict[Path, int] = field(default_factory=dict)
    resting: dict[Path, int] = field(default_factory=dict)
    states: dict[Path, int] = field(default_factory=dict)
    owned: set[Path] = field(default_factory=set)

    def codes(self, number: int) -> Array:
        """The choices of a node."""
        return self.nodes[number].codes_CA


def nodes_of(
    graph: Graph,
    sizes: Mapping[str, Any],
    degrees: Sequence[int],
    *,
    with_state: bool,
    with_recompute: bool,
    is_closed: bool,
) -> Nodes:
    """The nodes of a graph on axes of these degrees; see `operator_space`."""
    found = Nodes()
    again: set[Path] = set()  # operators that may run again, and then what they make
    for block in graph.blocks:
        can_run_again = remakable(block) if with_recompute else frozenset()
        for operator in block.operators:
            found.operators[block.name, operator.name] = len(found.nodes)
            place = Place(block.name, operator.name, operator.dims)
            codes = _split_codes(block, operator, sizes, degrees)
            found.nodes.append(_node("operator", [place], codes, operator.name in can_run_again))
            if operator.name in can_run_again:
                again |= {(block.name, name) for name in operator.outputs}
    for group in tied(graph, is_closed=is_closed):
        is_again = not again.isdisjoint(group)
        _add_rest(found, graph, group, sizes, degrees, with_state=with_state, is_again=is_again, is_closed=is_closed)
    return found


def _node(kind: str, places: Sequence[Place], codes_CA: Array, can_be_again: bool = False) -> Node:
    """A node; where something can be made again, each of its choices twice: without and with that."""
    again_C = np.repeat([False, True] if can_be_again else [False], len(codes_CA))
    return Node(kind, tuple(places), np.concatenate([codes_CA] * (1 + can_be_again)), again_C)


def _split_codes(block: Block, operator: Operator, sizes: Mapping[str, Any], degrees: Sequence[int]) -> Array:
    aliases = block.dim_aliases(operator)
    local = [sizes[aliases[dim]] for dim in operator.dims]
    dims = [FIRST_DIM + place for place, dim in enumerate(operator.dims) if operator.splittable(dim)]
    return all_codes([WHOLE, *([SUMMAND] if operator.linear else []), *dims], local, degrees)


def tied(graph: Graph, *, is_closed: bool) -> list[list[Path]]:
    """All tensors at rest, those that lie alike together: handed from block to block, or sharing their storage."""
    found = [(b.name, name) for b in graph.blocks for name in (*hubs(b), *(each.name for each in b.parameters))]
    pairs: list[tuple[Path, Path]] = [(_path(one), _path(other)) for one, other in graph.tied]
    following = dict.fromkeys(pairwise(graph.sequence))
    if is_closed:
        following[graph.sequence[-1], graph.sequence[0]] = None
    for before, after in following:
        handed = zip(graph.block[before].outputs, graph.block[after].inputs, strict=False)
        pairs += [((before, one), (after, other)) for one, other in handed]
    group = {path: [path] for path in found}
    for one, other in pairs:
        if one in group and other in group and group[one] is not group[other]:
            group[one] += group[other]
            for path in group[other]:
                group[path] = group[one]
    return list({id(paths): paths for paths in group.values()}.values())


def _path(text: str) -> Path:
    block, _, name = text.partition("/")
    return block, name


def _add_rest(
    found: Nodes,
    graph: Graph,
    group: Sequence[Path],
    sizes: Mapping[str, Any],
    degrees: Sequence[int],
    *,
    with_state: bool,
    is_again: bool,
    is_closed: bool,
) -> None:
    tensors = [graph.block[block].tensor[name] for block, name in group]
    first = tensors[0]
    is_parameter = first.role is Role.PARAMETER
    local = [sizes[dim] for dim in first.dims]
    near = set(range(len(local))) if is_parameter else _near(graph, group)
    dims = [REST_DIM + place for place in sorted(near) if local[place] != 1]
    # A parameter's gradient is needed whole, or in shards, once a step: sums are worth keeping only on the way to state
    # that is sharded.
    spread = first.differentiable and (not is_parameter or with_state)
    words = [WHOLE, *([REST_WORDS.index(SPREAD)] if spread else [])]
    if not is_parameter and _takes_summands(graph, group, is_closed=is_closed):
        words.append(REST_WORDS.index(SUMMANDS))
    places = [
        Place(block, rest_key(graph.block[block], name), tensor.dims)
        for (block, name), tensor in zip(group, tensors, strict=True)
    ]
    found.resting.update(dict.fromkeys(group, len(found.nodes)))
    kind = "parameter" if is_parameter else "activation"
    found.nodes.append(_node(kind, places, all_codes([*words, *dims], local, degrees, REST_DIM), is_again))
    if is_parameter:
        found.owned.add(_owner(graph, group))
    if is_parameter and with_state and first.differentiable:
        found.states.update(dict.fromkeys(group, len(found.nodes)))
        own = [Place(place.block, state_key(name), place.dims) for place, (_, name) in zip(places, group, strict=True)]
        found.nodes.append(_node("state", own, all_codes([WHOLE, *dims], local, degrees, REST_DIM)))


def _owner(graph: Graph, group: Sequence[Path]) -> Path:
    borrowed = {_path(other) for _, other in graph.tied}
    return next((path for path in group if path not in borrowed), group[0])


def _near(graph: Graph, group: Sequence[Path]) -> set[int]:
    """The dims of an activation that an operator next to it can split."""
    found = set()
    for block, name in group:
        for operator in graph.block[block].operators:
            operands = zip(
                (*operator.inputs, *operator.outputs), (*operator.input_dims, *operator.output_dims), strict=True
            )
            for operand, dims in operands:
                if operand == name:
                    found |= {place for place, dim in enumerate(dims) if operator.splittable(dim)}
    return found


def _takes_summands(graph: Graph, group: Sequence[Path], *, is_closed: bool) -> bool:
    """Whether an activation may lie as summands: a reader is linear, no backward needs it, and it is read at all."""
    block, name = group[0]
    if not can_be_summands(graph.block[block].tensor[name]):
        return False
    last = graph.block[graph.sequence[-1]]
    if not is_closed and any(block == last.name and name in last.outputs for block, name in group):
        return False  # what the model returns is whole
    near = [(operator, name) for block, name in group for operator in graph.block[block].operators]
    if any(name in operator.saves for operator, name in near):
        return False
    return any(operator.linear and name in operator.inputs for operator, name in near)
