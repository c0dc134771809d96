"""GSPMD: a user places some tensors, propagation completes the rest.

Y. Xu et al., "GSPMD: General and Scalable Parallelization for ML Computation Graphs", arXiv:2105.04663, section 3.5:
placements are spread along the dims of operators, from operands to results and back, until nothing changes. Operators
differ in priority: through those that keep all dims of all operands (elementwise) everything is spread before others
have their turn. Placements on different axes that fit together are merged: an axis that a tensor does not use yet may
be added to it. Nothing is optimised: the user's annotations are the strategy, the rest is filled in.

What we do, and where it may differ from XLA's: priorities are three, elementwise, operators without contractions, all
others; within one of them operators come in order, forwards and then backwards. An operator then splits, on each axis,
the contracted dim that an operand has there and no other operand contradicts (each rank multiplies what it has, and the
result is summed to where it lies), else the dim that its results have there, else that its operands have. What nothing
reaches is copied. Dims that may not be split, or that an axis does not divide, take no part (XLA pads). Annotations of
operators set their split outright. Tensors are those at rest, and those that go straight to their one reader.
Parameters lie as placed, gradients and state with them. Memory has no part in it.

Annotations are `block/tensor` or `block/operator`, `block/tensor@rest` where both have one name; all instances of a
block are placed alike, and so are tensors that are handed from block to block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from meshwright.choice import Array
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Block, Operator
from meshwright.search.operators import Node, OperatorSpace
from meshwright.search.placing.answer import Found, Posed, choice_of
from meshwright.sharding import SUMMANDS, rest_key

#: A tensor: the number of its node where it lies at rest, else its block and name.
Key = int | tuple[str, str]

#: Axis -> position of the dim that it cuts.
Cuts = dict[str, int]

ANNOTATION = "annotations"
EXAMPLE = "layer/x: x=batch"

WHOLE = 0


def complete(posed: Posed) -> Found:
    """The user's annotations, completed."""
    space = posed.space()
    known = Propagation(space)
    annotate(known, posed.question.annotations)
    rounds = known.spread()
    number = len(posed.question.annotations)
    reached = sum(bool(cuts) for cuts in known.cuts.values())
    words = f"{number} annotation{'s' if number > 1 else ''}"
    statement = f"{words} spread to {reached} tensors in {rounds} rounds; nothing is optimised, no bound"
    return choice_of(posed, space, known.choice(), statement)


@dataclass(frozen=True)
class Wired:
    """An operator with its node; `operands` and `results` are tensors, with the place of each of their dims in it."""

    node: int
    block: Block
    operator: Operator
    operands: tuple[tuple[Key, tuple[int, ...]], ...]
    results: tuple[tuple[Key, tuple[int, ...]], ...]

    @property
    def priority(self) -> int:
        """0 elementwise, 1 without contractions, 2 others."""
        everything = tuple(range(len(self.operator.dims)))
        if self.operator.contractions or self.operator.contracted:
            return 2
        alike = all(sorted(dims) == list(everything) for _, dims in (*self.operands, *self.results))
        return 0 if alike and not self.operator.unsplit else 1


@dataclass(eq=False)
class Propagation:
    """Placements while they spread: `cuts` of every tensor, `splits` of the operators that a user split."""

    space: OperatorSpace
    cuts: dict[Key, Cuts] = field(default_factory=dict)
    splits: dict[int, dict[str, str]] = field(default_factory=dict)
    operators: list[Wired] = field(init=False)
    rows: list[dict[tuple[int, ...], int]] = field(init=False)

    def __post_init__(self) -> None:
        nodes = self.space.nodes
        self.rows = [{tuple(row): at for at, row in enumerate(node.codes_CA.tolist())} for node in nodes]
        self.operators = list(_wired(self.space))
        for wired in self.operators:
            for key, _ in (*wired.operands, *wired.results):
                self.cuts.setdefault(key, {})

    # --- what may be added

    def row(self, node: int, cuts: Mapping[str, int]) -> int | None:
        """The choice of a node that cuts dims so, if it has one."""
        words = len(self.space.nodes[node].words)
        return self.rows[node].get(tuple(words + cuts[axis] if axis in cuts else WHOLE for axis in self.space.order))

    def add(self, key: Key, axis: str, position: int) -> bool:
        """Cut a tensor's dim by an axis, if that is not used and leaves equal pieces; whether anything changed."""
        own = self.cuts[key]
        if axis in own:
            return False
        if isinstance(key, int) and self.row(key, {**own, axis: position}) is None:
            return False
        own[axis] = position
        return True

    # --- spreading

    def spread(self) -> int:
        """Spread until nothing changes; returns the number of rounds over operators."""
        for wired in self.operators:
            self._of_split(wired)
        rounds, priority = 0, 0
        while priority <= 2:
            rounds += 1
            changed = self._round(priority)
            priority = 0 if changed else priority + 1
        return rounds

    def _of_split(self, wired: Wired) -> None:
        """What a user's split of an operator says of its tensors."""
        for axis, dim in self.splits.get(wired.node, {}).items():
            if dim != SUMMANDS:
                position = wired.operator.dims.index(dim)
                for key, dims in (*wired.operands, *wired.results):
                    if position in dims:
                        self.add(key, axis, dims.index(position))

    def _round(self, priority: int) -> bool:
        chosen = [wired for wired in self.operators if wired.priority == priority and wired.node not in self.splits]
        changed = False
        for wired in chosen:
            changed |= self._pass(wired, wired.operands, wired.results)
        for wired in reversed(chosen):
            changed |= self._pass(wired, wired.results, wired.operands)
        return changed

    def _pass(
        self,
        wired: Wired,
        sources: Sequence[tuple[Key, tuple[int, ...]]],
        targets: Sequence[tuple[Key, tuple[int, ...]]],
    ) -> bool:
        changed = False
        for source, source_dims in sources:
            for axis, place in list(self.cuts[source].items()):
                position = source_dims[place]
                if wired.operator.dims[position] in wired.operator.unsplit:
                    continue
                for target, target_dims in targets:
                    if position in target_dims:
                        changed |= self.add(target, axis, target_dims.index(position))
        return changed

    # --- the outcome

    def choice(self) -> Array:
        """The choice that the placements stand for."""
        found_N = np.zeros(len(self.space.nodes), dtype=np.int64)
        for number, node in enumerate(self.space.nodes):
            if node.kind != "operator":
                row = self.row(number, self.cuts.get(number, {}))
                assert row is not None, "only what the space has was added"
                found_N[number] = row
        for wired in self.operators:
            found_N[wired.node] = self._split(wired)
        return found_N

    def _split(self, wired: Wired) -> int:
        given = self.splits.get(wired.node)
        if given is not None:
            return self._row_of_split(wired, given)
        cuts: Cuts = {}
        for axis in self.space.order:
            for position in self._wishes(wired, axis):
                if self.row(wired.node, {**cuts, axis: position}) is not None:
                    cuts[axis] = position
                    break
        row = self.row(wired.node, cuts)
        assert row is not None, "only what the space has was added"
        return row

    def _row_of_split(self, wired: Wired, split: Mapping[str, str]) -> int:
        node = self.space.nodes[wired.node]
        codes = {"": WHOLE, SUMMANDS: node.words.index(SUMMANDS)}
        codes |= {dim: len(node.words) + position for position, dim in enumerate(wired.operator.dims)}
        return self.rows[wired.node][tuple(codes[split.get(axis, "")] for axis in self.space.order)]

    def _wishes(self, wired: Wired, axis: str) -> Iterator[int]:
        """The dims that an operator may split on an axis, what it prefers first."""
        operands = [
            (dims, dims[self.cuts[key][axis]] if axis in self.cuts[key] else -1) for key, dims in wired.operands
        ]
        results = [dims[self.cuts[key][axis]] for key, dims in wired.results if axis in self.cuts[key]]
        for _, position in operands:
            is_contracted = position >= 0 and wired.operator.dims[position] in wired.operator.contracted
            if is_contracted and all(other in (-1, position) for dims, other in operands if position in dims):
                yield position
        yield from results
        yield from (position for _, position in operands if position >= 0)


def _wired(space: OperatorSpace) -> Iterator[Wired]:
    resting = {
        (place.block, place.key): number
        for number, node in enumerate(space.nodes)
        if node.kind in ("activation", "parameter")
        for place in node.places
    }
    for number, node in enumerate(space.nodes):
        if node.kind == "operator":
            block = space.graph.block[node.places[0].block]
            operator = next(each for each in block.operators if each.name == node.places[0].key)

            def of(
                names: Sequence[str], dims: Sequence[Sequence[str]], block: Block = block, op: Operator = operator
            ) -> tuple[tuple[Key, tuple[int, ...]], ...]:
                return tuple(
                    (
                        resting.get((block.name, rest_key(block, name)), (block.name, name)),
                        tuple(op.dims.index(dim) for dim in own),
                    )
                    for name, own in zip(names, dims, strict=True)
                )

            yield Wired(
                number,
                block,
                operator,
                of(operator.inputs, operator.input_dims),
                of(operator.outputs, operator.output_dims),
            )


# --- what a user says -------------------------------------------------------------------------------------------------


def annotate(known: Propagation, annotations: Mapping[str, Mapping[str, str]]) -> None:
    """Set what a user says of tensors and operators; raises `InputError` with all that cannot be."""
    problems: list[Problem] = []
    if not annotations:
        problems.append(Problem(ANNOTATION, "", "gspmd completes at least one placement of a tensor", EXAMPLE))
    for path, split in annotations.items():
        block_name, _, name = path.partition("/")
        block = known.space.graph.block.get(block_name)
        if block is None:
            blocks = list(known.space.graph.block)
            rule = f"no such block; blocks: {', '.join(blocks)}"
            near = nearest_name(block_name, blocks)
            problems.append(Problem(ANNOTATION, path, rule, f"{near}/{name}" if near and name else None))
            continue
        own = list(_axis_problems(known.space, path, split))
        wired = next((each for each in known.operators if each.block is block and each.operator.name == name), None)
        tensor = block.tensor.get(name.removesuffix("@rest"))
        if own:
            problems += own
        elif wired is not None:
            problems += _set_operator(known, wired, path, split)
        elif tensor is not None:
            key = _key(known, block, tensor.name)
            problems += _set_tensor(known, key, tensor.dims, path, split)
        else:
            names = [*block.tensor, *(each.name for each in block.operators)]
            near = nearest_name(name, names)
            rule = f"{block_name} has no such tensor or operator"
            problems.append(Problem(ANNOTATION, path, rule, f"{block_name}/{near}" if near else None))
    if problems:
        raise InputError(problems)


def _axis_problems(space: OperatorSpace, path: str, split: Mapping[str, str]) -> Iterator[Problem]:
    axes = [axis.name for axis in space.mesh]
    for axis, dim in split.items():
        if axis not in axes:
            rule = f"no such mesh axis; axes: {', '.join(axes)}"
            yield Problem(ANNOTATION, f"{path}: {axis}={dim}", rule, nearest_name(axis, axes) or axes[0])


def _key(known: Propagation, block: Block, name: str) -> Key:
    for number, node in enumerate(known.space.nodes):
        places = [(place.block, place.key) for place in node.places]
        if node.kind in ("activation", "parameter") and (block.name, rest_key(block, name)) in places:
            return number
    return block.name, name


def _dim_problems(path: str, split: Mapping[str, str], dims: Sequence[str]) -> Iterator[Problem]:
    for axis, dim in split.items():
        if dim not in dims:
            rule = f"no such dim; dims: {', '.join(dims) or 'none'}"
            yield Problem(ANNOTATION, f"{path}: {axis}={dim}", rule, nearest_name(dim, dims))


def _set_operator(known: Propagation, wired: Wired, path: str, split: Mapping[str, str]) -> Iterator[Problem]:
    node, operator = known.space.nodes[wired.node], wired.operator
    problems = list(_dim_problems(path, split, [*operator.dims, *([SUMMANDS] if operator.linear else [])]))
    own = {axis: dim for axis, dim in split.items() if axis in known.space.order}
    if not problems:
        codes = {dim: len(node.words) + position for position, dim in enumerate(operator.dims)} | {SUMMANDS: 1}
        row = tuple(codes[own[axis]] if axis in own else WHOLE for axis in known.space.order)
        if row not in known.rows[wired.node]:
            problems.append(_not_so(known.space, node, path, split))
    yield from problems
    if not problems:
        known.splits[wired.node] = own


def _set_tensor(
    known: Propagation, key: Key, dims: Sequence[str], path: str, split: Mapping[str, str]
) -> Iterator[Problem]:
    problems = list(_dim_problems(path, split, dims))
    own = {axis: dim for axis, dim in split.items() if axis in known.space.order}
    if not problems and key not in known.cuts:
        problems.append(Problem(ANNOTATION, path, "no operator has to do with it"))
    if not problems:
        cuts = {axis: dims.index(dim) for axis, dim in own.items()}
        if isinstance(key, int) and known.row(key, {**known.cuts[key], **cuts}) is None:
            problems.append(_not_so(known.space, known.space.nodes[key], path, split))
        elif any(known.cuts[key].get(axis, cut) != cut for axis, cut in cuts.items()):
            problems.append(
                Problem(ANNOTATION, path, "another annotation, of a tensor that lies alike, says otherwise")
            )
        else:
            known.cuts[key].update(cuts)
    yield from problems


def _not_so(space: OperatorSpace, node: Node, path: str, split: Mapping[str, str]) -> Problem:
    """Why a node cannot be placed so, and a dim that it can be cut along on the first of the axes."""
    text = ", ".join(f"{axis}={dim}" for axis, dim in split.items())
    axis = next(axis for axis in space.order if axis in split)
    at = space.order.index(axis)
    alone = (np.delete(node.codes_CA, at, axis=1) == WHOLE).all(axis=1)
    codes = sorted({int(code) for code in node.codes_CA[alone, at]} - set(range(len(node.words))))
    dims = [node.places[0].dims[code - len(node.words)] for code in codes]
    rule = "a dim is cut only where operators may split it, and into equal pieces"
    if dims:
        rule += f"; {axis} alone could cut {', '.join(dims)}"
    return Problem(ANNOTATION, f"{path}: {text}", rule, f"{axis}={dims[0]}" if dims else None)
