"""What people use without a search, said of any graph by its dims alone: the floor under every method.

- `data_parallel`: every operator splits the batch over all axes, parameters are copied everywhere, gradients summed.
- `fsdp`: the same, and parameters, gradients and optimizer state rest in shards over all axes, along the first dim that
  can be cut so (FSDP, Zhao et al. 2023, arXiv:2304.11277; ZeRO-3, Rajbhandari et al. 2019, arXiv:1910.02054, section 5;
  FSDP2 cuts dim 0, unevenly where it must).
- `megatron`: tensor parallelism on the innermost axis, data parallelism on the others (Shoeybi et al. 2019,
  arXiv:1909.08053, section 3, with sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2, and
  state sharded over the replicas, ZeRO-1). Without names: the dims of a block's inputs and outputs are its stream; on
  the innermost axis an operator splits its first dim that a weight of the block has and the stream has not (heads, the
  feed-forward's width, the vocabulary), and, if it has none, the first dim of the stream behind the batch (the
  sequence). Weights lie as the operators that read them need them. So the first product of a pair is cut by columns and
  the second by rows, whatever they are called.

Nothing is optimised but where activations lie between these operators, which is chosen best within memory. An operator
without a batch, and one whose batch cannot be cut so often, is cut as often as it can and otherwise repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from meshwright.choice import Array
from meshwright.graph import Block, Operator
from meshwright.search.operators import Node, OperatorSpace
from meshwright.search.placing.answer import Found, Posed, choice_of
from meshwright.search.placing.narrow import completed

BATCH = "batch"

#: What it means that an axis does not cut anything, in the codes of every node.
WHOLE = 0


# --- rows of choices --------------------------------------------------------------------------------------------------


def finest_row(space: OperatorSpace, node: Node, allowed: Sequence[Iterable[int]]) -> int:
    """Of the rows in which each axis is whole or cuts one of the dims allowed on it (by position) the one with the most
    pieces; of equal ones that in which the outer axes cut, and then the earlier dims.

    `allowed` has an entry for each axis of `space.order`."""
    dims = [[WHOLE, *(len(node.words) + position for position in own)] for own in allowed]
    codes_CA = node.codes_CA
    fits = np.all([np.isin(codes_CA[:, axis], own) for axis, own in enumerate(dims)], axis=0) if dims else np.ones(1)
    degrees = _degrees(space)
    cuts_CA = codes_CA >= len(node.words)
    pieces_C = np.where(cuts_CA, degrees, 1).prod(axis=1)
    found: int = max(
        np.flatnonzero(fits).tolist(),
        key=lambda row: (int(pieces_C[row]), cuts_CA[row].tolist(), (-codes_CA[row]).tolist()),
    )
    return found


def _degrees(space: OperatorSpace) -> Array:
    return np.array([axis.size for axis in space.mesh if axis.size > 1], dtype=np.int64)


def _pieces(space: OperatorSpace, node: Node, row: int) -> int:
    """Into how many pieces a row cuts a node."""
    return int(np.where(node.codes_CA[row] >= len(node.words), _degrees(space), 1).prod())


def operator_of(space: OperatorSpace, node: Node) -> tuple[Block, Operator]:
    """The operator that a node stands for, and its block."""
    place = node.places[0]
    block = space.graph.block[place.block]
    return block, next(operator for operator in block.operators if operator.name == place.key)


def own_dims(space: OperatorSpace, node: Node) -> tuple[str, ...]:
    """The dims of a node by the names that its block has for them."""
    if node.kind != "operator":
        return node.places[0].dims
    block, operator = operator_of(space, node)
    aliases = block.dim_aliases(operator)
    return tuple(aliases[dim] for dim in operator.dims)


def batch_positions(space: OperatorSpace, node: Node) -> list[int]:
    """Where a node has the batch: one position or none."""
    return [position for position, dim in enumerate(own_dims(space, node)) if dim == BATCH][:1]


def data_parallel_rows(space: OperatorSpace) -> dict[int, int]:
    """Of every operator and activation the choice that cuts the batch alone; parameters are copied."""
    found = {}
    for number, node in enumerate(space.nodes):
        positions = batch_positions(space, node) if node.kind in ("operator", "activation") else []
        found[number] = finest_row(space, node, [positions] * len(space.order))
    return found


# --- the methods ------------------------------------------------------------------------------------------------------


def data_parallel(posed: Posed) -> Found:
    """Copies of everything, each with its share of the batch."""
    space = posed.space()
    return _settled(posed, space, data_parallel_rows(space), f"data parallelism over all axes{_repeated(space)}")


def fsdp(posed: Posed) -> Found:
    """Data parallelism whose state rests in shards."""
    space = posed.space()
    rows = data_parallel_rows(space)
    for number, node in enumerate(space.nodes):
        if node.kind == "parameter":
            rows[number] = _cut_once(space, node, space.order)
    text = f"fully sharded data parallelism over all axes{_repeated(space)}"
    return _settled(posed, space, rows, text)


def _repeated(space: OperatorSpace) -> str:
    """What becomes of devices for which the batch is too small, in words."""
    devices = math.prod(axis.size for axis in space.mesh)
    rows = data_parallel_rows(space)
    pieces = max(
        _pieces(space, node, rows[number]) for number, node in enumerate(space.nodes) if node.kind == "operator"
    )
    return f" (the batch has {pieces} pieces: {devices // pieces} devices do the same)" if pieces < devices else ""


def _cut_once(space: OperatorSpace, node: Node, axes: Sequence[str]) -> int:
    """The row that cuts one dim over as many of the axes as it can."""
    rows = [
        finest_row(space, node, [[position] if axis in axes else [] for axis in space.order])
        for position in range(len(node.places[0].dims))
    ]
    return max(rows, key=lambda row: _pieces(space, node, row), default=0)


def megatron(posed: Posed) -> Found:
    """Tensor parallelism inside, data parallelism outside."""
    space = posed.space(with_state=True)
    streams = {block.name: stream_of(block) for block in space.graph.blocks}
    rows: dict[int, int] = {}
    for number, node in enumerate(space.nodes):
        if node.kind == "operator":
            outer = batch_positions(space, node)
            rows[number] = finest_row(space, node, [*[outer] * (len(space.order) - 1), []])
            for position in _inner_positions(space, node, streams):
                row = finest_row(space, node, [*[outer] * (len(space.order) - 1), [position]])
                if node.codes_CA[row, -1] != WHOLE:
                    rows[number] = row
                    break
    for number, node in enumerate(space.nodes):
        if node.kind == "parameter":
            rows[number] = _as_read(space, number, rows)
        elif node.kind == "state":
            rows[number] = _sharded_state(space, number, rows)
    text = f"tensor parallelism over {space.order[-1]}" if space.order else "one device"
    outer_text = f", data parallelism over {', '.join(space.order[:-1])}" if space.order[1:] else ""
    return _settled(posed, space, rows, f"{text}{outer_text}")


def stream_of(block: Block) -> tuple[str, ...]:
    """The dims of what a block takes in and hands out, in order, the batch first where it has one."""
    dims = dict.fromkeys(dim for name in (*block.inputs, *block.outputs) for dim in block.tensor[name].dims)
    return tuple(sorted(dims, key=lambda dim: dim != BATCH))


def _inner_positions(space: OperatorSpace, node: Node, streams: Mapping[str, tuple[str, ...]]) -> list[int]:
    """What an operator may split on the innermost axis, what is tried first first."""
    block, operator = operator_of(space, node)
    stream, dims = streams[block.name], own_dims(space, node)
    weighted = {dim for tensor in block.parameters for dim in tensor.dims} - {*stream, BATCH}
    inside = [position for position, dim in enumerate(dims) if dim in weighted]
    # The last dim of a stream is what weights contract; cutting it is a sum for each product.
    behind = [position for dim in stream[1:-1] for position, own in enumerate(dims) if own == dim]
    return [position for position in (*inside, *behind) if operator.splittable(operator.dims[position])]


def _as_read(space: OperatorSpace, number: int, rows: Mapping[int, int]) -> int:
    """The row of a parameter that lies on the innermost axis as its first reader takes it, and is copied on others."""
    node = space.nodes[number]
    block = space.graph.block[node.places[0].block]
    name = node.places[0].key
    for reader, other in enumerate(space.nodes):
        if other.kind == "operator" and other.places[0].block == block.name:
            _, operator = operator_of(space, other)
            if name in operator.inputs:
                dims = operator.input_dims[operator.inputs.index(name)]
                code = int(other.codes_CA[rows[reader], -1]) - len(other.words)
                split = operator.dims[code] if code >= 0 else ""
                inner = [dims.index(split)] if split in dims else []
                return finest_row(space, node, [*[[]] * (len(space.order) - 1), inner])
    return finest_row(space, node, [[]] * len(space.order))


def _sharded_state(space: OperatorSpace, number: int, rows: Mapping[int, int]) -> int:
    """The row of a state that lies as its parameter does, and on the other axes along the dim that is cut most."""
    node = space.nodes[number]
    parameter = next(
        other
        for other, each in enumerate(space.nodes)
        if each.kind == "parameter"
        and each.places[0].block == node.places[0].block
        and node.places[0].key == f"{each.places[0].key}@state"
    )
    stored = space.nodes[parameter].codes_CA[rows[parameter]]
    fixed = [[int(code) - len(node.words)] if code >= len(node.words) else None for code in stored.tolist()]
    # Cut by outer axes too, a dim may be too short for the axis that cuts it already: then fewer of them do.
    choices = [
        finest_row(space, node, [own or ([position] if axis < count else []) for axis, own in enumerate(fixed)])
        for position in range(len(node.places[0].dims))
        for count in range(len(fixed) + 1)
    ]
    kept = [
        row
        for row in choices
        if all(own is None or node.codes_CA[row, axis] == stored[axis] for axis, own in enumerate(fixed))
    ]
    return max(kept, key=lambda row: _pieces(space, node, row), default=0)


def _settled(posed: Posed, space: OperatorSpace, rows: Mapping[int, int], text: str) -> Found:
    """The choice with these rows and the best activations for them: within memory, or without regard to it if none fit,
    so that reasons can be told."""
    fixed = {number: np.array([row]) for number, row in rows.items() if space.nodes[number].kind != "activation"}
    solved = completed(space.instance, fixed, posed.deadline)
    if solved.choice_N is None:
        solved = completed(replace(space.instance, limit=math.inf), fixed, posed.deadline)
    statement = f"{text}; nothing is searched, no bound"
    return choice_of(posed, space, solved.choice_N, statement, reasons=solved.reasons)
