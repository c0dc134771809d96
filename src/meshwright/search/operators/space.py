"""What a space of operator-level strategies is: its nodes, and the ways between choices, splits and strategies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from meshwright.choice import Array, Instance
from meshwright.cost.layouts import Machine
from meshwright.cost.lifetimes import Lifetimes
from meshwright.cost.operators import FIRST_DIM, SUMMAND, WHOLE, split_of
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph
from meshwright.sharding import SPREAD, SUMMANDS, StatePlacement
from meshwright.strategy import BlockRange, MeshAxis, Recompute, Stage, Strategy
from meshwright.workload import Workload

Splits = dict[str, dict[str, dict[str, str]]]

NOTHING_AGAIN: Mapping[str, Sequence[str]] = {}

#: What the first codes of an operator's split mean; the others are its dims.
SPLIT_WORDS = ("", SUMMANDS)

#: The same of a tensor at rest, and what value and gradient are under them.
REST_WORDS = ("", SPREAD, SUMMANDS)
REST_VALUE, REST_GRADIENT = (WHOLE, WHOLE, SUMMAND), (WHOLE, SUMMAND, WHOLE)
REST_DIM = len(REST_WORDS)


def rest_values(codes_CA: Array) -> Array:
    """Placements of a tensor's value under its codes at rest."""
    return _placements(codes_CA, REST_VALUE)


def rest_gradients(codes_CA: Array) -> Array:
    """Placements of its gradient."""
    return _placements(codes_CA, REST_GRADIENT)


def _placements(codes_CA: Array, words: Sequence[int]) -> Array:
    num_dims = max(0, int(codes_CA.max(initial=0)) + 1 - REST_DIM)
    return np.array([*words, *range(FIRST_DIM, FIRST_DIM + num_dims)])[codes_CA]


@dataclass(frozen=True)
class Place:
    """Where a node stands in a strategy: the entry `key` of a block's splits, and the names of the dims there."""

    block: str
    key: str
    dims: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Node:
    """A node: what it is ("operator", "activation", "parameter", "state"), its choices as rows of codes, and every
    entry of a strategy that it stands for (several where things are tied). `again_C` says of an operator whether it
    runs again in the backward, of an activation whether it is made again there."""

    kind: str
    places: tuple[Place, ...]
    codes_CA: Array
    again_C: Array

    @property
    def name(self) -> str:
        """The first entry that it stands for, as `block/key`."""
        return f"{self.places[0].block}/{self.places[0].key}"

    @property
    def words(self) -> tuple[str, ...]:
        """What the codes below those of dims mean."""
        return SPLIT_WORDS if self.kind == "operator" else REST_WORDS


@dataclass(frozen=True, eq=False)
class BlockPart:
    """What one instance of a block costs, on nodes of its own: `nodes` are their numbers in the space, `edges` join
    positions in `nodes`. `inputs` and `outputs` are the positions of the tensors handed over."""

    nodes: tuple[int, ...]
    costs: tuple[Array, ...]
    edges: Mapping[tuple[int, int], Array]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class OperatorSpace:
    """All operator-level strategies of a graph on a mesh (see the package's docstring; `operator_space` makes it).

    `parts` are the blocks one by one; `instance` is all of them together, each as often as it stands in the graph,
    under the memory limit. `fixed_bytes` are needed whatever is chosen."""

    graph: Graph
    mesh: tuple[MeshAxis, ...]
    machine: Machine
    workload: Workload
    nodes: tuple[Node, ...]
    parts: Mapping[str, BlockPart]
    instance: Instance
    lifetimes: Lifetimes
    fixed_bytes: float

    @property
    def order(self) -> tuple[str, ...]:
        """Axes of more than one rank, outermost first: those that anything is split over."""
        return tuple(axis.name for axis in self.mesh if axis.size > 1)

    @property
    def num_strategies(self) -> int:
        """Choices of all nodes together."""
        return math.prod(len(node.codes_CA) for node in self.nodes)

    def splits(self, choice_N: Array) -> Splits:
        """The splits that a choice stands for. State that lies as its parameter has no entry."""
        found: Splits = {block.name: {} for block in self.graph.blocks}
        for node, choice in zip(self.nodes, choice_N.tolist(), strict=True):
            codes = node.codes_CA[choice].tolist()
            for place in node.places:
                split = split_of(codes, place.dims, self.order, node.words)
                stored = found[place.block].get(place.key.removesuffix("@state"))
                if node.kind != "state" or split != without_spread(stored or {}):
                    found[place.block][place.key] = split
        return found

    def recomputed(self, choice_N: Array) -> dict[str, tuple[str, ...]]:
        """The activations of each block that a choice makes again in the backward."""
        found: dict[str, tuple[str, ...]] = {}
        for node, choice in zip(self.nodes, choice_N.tolist(), strict=True):
            if node.kind == "operator" and node.again_C[choice]:
                place = node.places[0]
                operators = {each.name: each for each in self.graph.block[place.block].operators}
                found[place.block] = (*found.get(place.block, ()), *operators[place.key].outputs)
        return found

    def strategy(self, choice_N: Array) -> Strategy:
        """The strategy that a choice stands for."""
        strategy = placed_strategy(self.graph, self.mesh, self.splits(choice_N), self.workload)
        return replace(strategy, recomputed=self.recomputed(choice_N))

    def choice(
        self,
        splits: Mapping[str, Mapping[str, Mapping[str, str]]],
        recomputed: Mapping[str, Sequence[str]] = NOTHING_AGAIN,
    ) -> Array:
        """The choice that stands for splits, and for activations to be made again; raises `InputError` with all that is
        not in this space."""
        problems: list[Problem] = []
        found = np.zeros(len(self.nodes), dtype=np.int64)
        for index, node in enumerate(self.nodes):
            try:
                found[index] = self._index(index, self._entry(node, splits), self._is_again(node, recomputed))
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        return found

    def pinned(self, splits: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Instance:
        """The instance in which the entries given have no choice, and all others are free: how a plan that says only
        how operators are split is completed at its best, and annotations are kept."""
        cost_C = np.full_like(self.instance.cost_C, math.inf)
        first_N = self.instance.first_N.tolist()
        problems: list[Problem] = []
        known = {(place.block, place.key) for node in self.nodes for place in node.places}
        for path in [(block, key) for block, given in splits.items() for key in given if (block, key) not in known]:
            names = ["/".join(each) for each in known]
            problems.append(Problem("splits", "/".join(path), "no such entry", nearest_name("/".join(path), names)))
        for index, node in enumerate(self.nodes):
            free = slice(first_N[index], first_N[index + 1])
            given = next((splits[p.block][p.key] for p in node.places if p.key in splits.get(p.block, {})), None)
            if given is None:
                cost_C[free] = self.instance.cost_C[free]
                continue
            try:
                chosen = first_N[index] + self._index(index, given, is_again=False)
                cost_C[chosen] = self.instance.cost_C[chosen]
            except InputError as error:
                problems += error.problems
        if problems:
            raise InputError(problems)
        return replace(self.instance, cost_C=cost_C)

    def _entry(self, node: Node, splits: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Mapping[str, str]:
        place = node.places[0]
        given = splits.get(place.block, {})
        if place.key not in given and node.kind == "state":
            return without_spread(given.get(place.key.removesuffix("@state"), {}))
        if place.key not in given:
            rule, nearest = "its split is missing", nearest_name(place.key, given)
            raise InputError([Problem(f"splits.{place.block}.{place.key}", "", rule, nearest)])
        return given[place.key]

    def _is_again(self, node: Node, recomputed: Mapping[str, Sequence[str]]) -> bool:
        place = node.places[0]
        names = recomputed.get(place.block, ())
        if node.kind == "operator":
            operator = next(each for each in self.graph.block[place.block].operators if each.name == place.key)
            return not set(names).isdisjoint(operator.outputs)
        return node.kind == "activation" and place.key.removesuffix("@rest") in names

    def _index(self, index: int, split: Mapping[str, str], is_again: bool) -> int:
        node, place = self.nodes[index], self.nodes[index].places[0]
        where, axes = f"splits.{place.block}.{place.key}", [axis.name for axis in self.mesh]
        codes = {word: code for code, word in enumerate(node.words)}
        codes |= {dim: len(node.words) + position for position, dim in enumerate(place.dims)}
        problems = [
            Problem(where, axis, f"no such mesh axis; axes: {', '.join(axes)}", nearest_name(axis, axes))
            for axis in split
            if axis not in axes
        ]
        problems += [
            Problem(where, f"{axis}: {dim}", f"no such dim; dims: {', '.join(place.dims)}", nearest_name(dim, codes))
            for axis, dim in split.items()
            if dim not in codes
        ]
        if problems:
            raise InputError(problems)
        row = (*(codes[split.get(axis, "")] for axis in self.order), int(is_again))
        if row not in self._rows[index]:
            text = ", ".join(f"{axis}: {dim}" for axis, dim in split.items()) + ", made again" * is_again
            raise InputError([Problem(where, text, "not among its choices: each may be split, and evenly")])
        return self._rows[index][row]

    @cached_property
    def _rows(self) -> tuple[dict[tuple[int, ...], int], ...]:
        rows = (np.column_stack([node.codes_CA, node.again_C]).tolist() for node in self.nodes)
        return tuple({tuple(row): number for number, row in enumerate(table)} for table in rows)


def without_spread(split: Mapping[str, str]) -> dict[str, str]:
    """Where state lies that has no entry of its own: as its parameter is stored."""
    return {axis: dim for axis, dim in split.items() if dim != SPREAD}


def placed_strategy(graph: Graph, mesh: Sequence[MeshAxis], splits: Splits, workload: Workload) -> Strategy:
    """A strategy of one stage at the level of operators."""
    return Strategy(
        mesh=tuple(mesh),
        splits=splits,
        stages=(Stage(0, (BlockRange(0, len(graph.sequence)),)),),
        schedule="1F1B",
        microbatch=workload.global_batch,
        state=StatePlacement(()),
        recompute={block.name: Recompute.NONE for block in graph.blocks},
    )
