"""Prices of whole sets of choices: one operator under all of its splits, one tensor between all of its placements.

Placements of a tensor are rows of codes, one number for each mesh axis: 0 `Replicate`, 1 `Partial`, 2 + p a shard along
the tensor's dim p. Splits of an operator are coded likewise over its own dims (1: summands). The steps between two
placements depend on which of their dims are equal and on nothing else, so there are few kinds of them (151 on two axes,
3,263 on three); since a collective takes a time that is linear in its bytes, a kind is two numbers, and a matrix of
all pairs is a look-up. The numbers are those of `block.price_step` over the steps of `sharding.redistribution`.

Legend of suffixes: C choices, A axes, D dims.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from meshwright.cost.block import price_step
from meshwright.cost.comm import point_to_point_time
from meshwright.cost.compute import OperatorPrice, Pricing, price_operator
from meshwright.cost.extents import Extents
from meshwright.cost.layouts import Machine, StateBytes
from meshwright.cost.step import UPDATE_PASSES
from meshwright.graph import Block, Operator, Role
from meshwright.sharding import (
    FREE,
    PARTIAL,
    REPLICATE,
    SUMMANDS,
    OperatorLayout,
    Placement,
    Placements,
    Shard,
    Step,
    can_be_summands,
    lay_out_operator,
    redistribution,
)
from meshwright.workload import Workload

Array = np.ndarray[Any, Any]

#: Codes of placements; a shard along dim p is `FIRST_DIM` + p.
WHOLE, SUMMAND, FIRST_DIM = 0, 1, 2


# --- moves ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class MovePrices:
    """Seconds of all moves of tensors on a mesh: bytes x slope + offset, found once for each kind of move."""

    pricing: Pricing
    levels: Any
    slope_K: Array = field(init=False)
    offset_K: Array = field(init=False)
    known_K: Array = field(init=False)
    _matrices: dict[tuple[bytes, bytes], tuple[Array, Array]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        num_kinds = _base(len(self.order)) ** (2 * len(self.order))
        self.slope_K, self.offset_K = np.zeros(num_kinds), np.zeros(num_kinds)
        self.known_K = np.zeros(num_kinds, dtype=bool)

    @property
    def order(self) -> tuple[str, ...]:
        """Mesh axes, outermost first."""
        return tuple(self.pricing.extents.degrees)

    def seconds(self, source_CA: Array, target_CA: Array, num_bytes: float) -> Array:
        """Seconds of bringing a tensor of so many bytes in all from each source to each target: a matrix."""
        sources, source_C = _distinct(source_CA)
        targets, target_C = _distinct(target_CA)
        key = (sources.tobytes(), targets.tobytes())
        if key not in self._matrices:
            self._matrices[key] = self._numbers(kinds_of(sources[:, None], targets[None]))
        slope, offset = self._matrices[key]
        return (slope * num_bytes + offset)[source_C[:, None], target_C]

    def each(self, source_CA: Array, target_CA: Array, num_bytes: float) -> Array:
        """Seconds of bringing it from each source to the target in the same row."""
        slope, offset = self._numbers(kinds_of(source_CA, target_CA))
        return slope * num_bytes + offset

    def _numbers(self, kinds: Array) -> tuple[Array, Array]:
        for kind in np.unique(kinds[~self.known_K[kinds]]).tolist():
            self._price(kind)
        return self.slope_K[kinds], self.offset_K[kinds]

    def _price(self, kind: int) -> None:
        degrees = self.pricing.extents.degrees
        for step in steps_of_kind(self.order, kind):
            if step.collective not in FREE:
                pieces = 1
                for axis, placement in step.larger.items():
                    pieces *= degrees[axis] if isinstance(placement, Shard) else 1
                took = price_step(step, 1.0, self.pricing, self.levels).took
                self.slope_K[kind] += float(took.transfer_s) / pieces
                self.offset_K[kind] += float(took.latency_s)
        self.known_K[kind] = True


def _distinct(codes_CA: Array) -> tuple[Array, Array]:
    """The distinct rows, in order, and which of them each row is."""
    keys = codes_CA @ (int(codes_CA.max(initial=0)) + 1) ** np.arange(codes_CA.shape[1])
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    return np.ascontiguousarray(codes_CA[first]), index.ravel()


def _base(num_axes: int) -> int:
    return FIRST_DIM + 2 * num_axes


def kinds_of(source_A: Array, target_A: Array) -> Array:
    """The kind of each move (the last dim of both arrays is that of the axes, the others broadcast): its placements
    with every dim named by the place of its first appearance."""
    num_axes = source_A.shape[-1]
    places = [source_A[..., axis] for axis in range(num_axes)] + [target_A[..., axis] for axis in range(num_axes)]
    kinds = np.zeros(np.broadcast_shapes(source_A.shape[:-1], target_A.shape[:-1]), dtype=np.int64)
    for place, codes in enumerate(places):
        named = np.where(codes >= FIRST_DIM, FIRST_DIM + place, codes)
        for earlier in range(place - 1, -1, -1):
            named = np.where((codes >= FIRST_DIM) & (places[earlier] == codes), FIRST_DIM + earlier, named)
        kinds += named * _base(num_axes) ** place
    return kinds


@cache
def steps_of_kind(order: tuple[str, ...], kind: int) -> tuple[Step, ...]:
    """The steps of a kind of move; dims are called by the places of `kinds_of`."""
    base, codes = _base(len(order)), []
    for _ in range(2 * len(order)):
        kind, code = divmod(kind, base)
        codes.append(code)
    source, target = (
        {axis: _placement(code, str(code)) for axis, code in zip(order, part, strict=True)}
        for part in (codes[: len(order)], codes[len(order) :])
    )
    return redistribution(source, target, order)


def _placement(code: int, dim: str) -> Placement:
    return (REPLICATE, PARTIAL)[code] if code < FIRST_DIM else Shard(dim)


def codes_of(placements: Placements, dims: Sequence[str], order: Sequence[str]) -> list[int]:
    """The codes of placements of a tensor with these dims.

    >>> codes_of({"x": Shard("seq"), "y": PARTIAL}, ("batch", "seq"), ("x", "y", "z"))
    [3, 1, 0]
    """
    codes = []
    for axis in order:
        placement = placements.get(axis, REPLICATE)
        codes.append(
            FIRST_DIM + dims.index(placement.dim) if isinstance(placement, Shard) else int(placement == PARTIAL)
        )
    return codes


# --- choices --------------------------------------------------------------------------------------------------------


def all_codes(
    allowed: Sequence[int], sizes: Sequence[Any], degrees: Sequence[int], first_dim: int = FIRST_DIM
) -> Array:
    """All rows of codes out of `allowed` in which the axes that share a dim divide its size, in lexicographic order.

    `sizes[p]` is the size of dim p (code `first_dim` + p). Sizes that are means (floats) are divided by anything.

    >>> all_codes([0, 2, 3], [4, 3], [2, 4]).tolist()
    [[0, 0], [0, 2], [2, 0]]
    """
    chosen = list(product(allowed, repeat=len(degrees)))
    rows = np.array(chosen, dtype=np.int64).reshape(len(chosen), len(degrees))
    legal = np.ones(len(rows), dtype=bool)
    for dim, size in enumerate(sizes):
        if not isinstance(size, float):
            legal &= size % pieces(rows, first_dim + dim, degrees) == 0
    return rows[legal]


def pieces(codes_CA: Array, code: int, degrees: Sequence[int]) -> Array:
    """Into how many pieces each row of codes cuts the dim of a code."""
    cut = np.where(codes_CA == code, np.asarray(degrees), 1)
    return np.asarray(cut.prod(axis=1))


def local_share(codes_CA: Array, degrees: Sequence[int]) -> Array:
    """The share of a tensor that a rank holds under each row of codes."""
    return np.asarray(1 / np.where(codes_CA >= FIRST_DIM, np.asarray(degrees), 1).prod(axis=1))


def operand_codes(block: Block, dims: Sequence[str], name: str, operator: Operator, split_CA: Array) -> Array:
    """The placements of an operand under splits of its operator (see `sharding.operand_placements`)."""
    summands = SUMMAND if can_be_summands(block.tensor[name]) else WHOLE
    places = [FIRST_DIM + dims.index(dim) if dim in dims else WHOLE for dim in operator.dims]
    return np.array([WHOLE, summands, *places])[split_CA]


def result_codes(block: Block, dims: Sequence[str], name: str, operator: Operator, split_CA: Array) -> Array:
    """The placements of a result: as of an operand, but a sum where it lacks the dim."""
    codes = operand_codes(block, dims, name, operator, split_CA)
    return np.where((split_CA != WHOLE) & (codes == WHOLE), SUMMAND, codes)


def gradient_codes(value_CA: Array, split_CA: Array) -> Array:
    """The placements in which the gradient of an operand comes back (`sharding.gradient_placements`)."""
    whole = np.where(split_CA != WHOLE, SUMMAND, WHOLE)
    return np.where(value_CA >= FIRST_DIM, value_CA, np.where(value_CA == WHOLE, whole, WHOLE))


def wanted_codes(made_CA: Array) -> Array:
    """The placements in which a producer wants the gradient of its result (`sharding.wanted_gradient`)."""
    return np.where(made_CA >= FIRST_DIM, made_CA, WHOLE)


def split_of(codes: Sequence[int], dims: Sequence[str], order: Sequence[str], words: Sequence[str]) -> dict[str, str]:
    """A row of codes as a split; `words` are what the codes below `FIRST_DIM` mean, empty for an axis left out."""
    named = [words[code] if code < len(words) else dims[code - len(words)] for code in codes]
    return {axis: name for axis, name in zip(order, named, strict=True) if name}


# --- operators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Seconds of one operator's forward and backward, numbers or columns."""

    forward: Any
    backward: Any


#: Kinds of presets whose backward reads their parameters.
READ_AGAIN = ("einsum", "norm", "relative_keys", "attention")

#: What fused attention is called where a model comes from.
FUSED_ATTENTION = ("scaled_dot_product_attention", "Attention", "MultiHeadAttention", "GroupQueryAttention")


def reads_again(block: Block, operator: Operator, name: str) -> bool:
    """Whether an operator's backward reads one of its parameters: where it says so, and in the operators of presets,
    whose `saves` name activations alone, if there is a gradient of something else to make."""
    if block.tensor[name].role is not Role.PARAMETER:
        return False
    others = [other for other in operator.inputs if other != name and block.tensor[other].role is Role.ACTIVATION]
    if not any(block.tensor[other].differentiable for other in others):
        return False
    return name in operator.saves or operator.kind in READ_AGAIN


def has_backward(block: Block, operator: Operator) -> bool:
    """Whether anything that an operator reads has a gradient (nothing before the first trained parameter has)."""
    return any(
        block.tensor[name].differentiable and block.tensor[name].role in (Role.PARAMETER, Role.ACTIVATION)
        for name in operator.inputs
    ) and any(block.tensor[name].differentiable for name in operator.outputs)


def seconds_of(block: Block, layout: OperatorLayout, pricing: Pricing, levels: Any, *, is_end: bool) -> Seconds:
    """What one operator takes under a split: its price less the gradients that nobody asks for, and its halo."""
    operator = layout.operator
    if operator.kind in FUSED_ATTENTION:
        layout = replace(layout, operator=replace(operator, kind="attention"))
    price = price_operator(block, layout, pricing, is_end=is_end)
    halo_s = _halo_seconds(block, layout, pricing, levels) if operator.halo else 0.0
    backward_s = _asked_backward(block, operator, price)
    return Seconds(price.forward_s + halo_s, backward_s + halo_s * has_backward(block, operator))


def _asked_backward(block: Block, operator: Operator, price: OperatorPrice) -> Any:
    if not has_backward(block, operator):
        return 0.0 * price.backward_s
    parameters = [block.tensor[name] for name in operator.inputs if block.tensor[name].role is Role.PARAMETER]
    others = [block.tensor[name] for name in operator.inputs if block.tensor[name].role is Role.ACTIVATION]
    if parameters and not any(tensor.differentiable for tensor in parameters):
        return price.backward_s - price.weight_s  # frozen
    if operator.contractions and parameters and not any(tensor.differentiable for tensor in others):
        return price.weight_s
    return price.backward_s


def _halo_seconds(block: Block, layout: OperatorLayout, pricing: Pricing, levels: Any) -> Any:
    """Seconds in which neighbours along split dims exchange the rims that they read of each other, one way."""
    operator, total = layout.operator, 0.0
    local = pricing.extents.local_dims(block, layout)
    strides, stride = {}, 1
    for axis in reversed(list(pricing.extents.degrees)):
        strides[axis] = stride
        stride = stride * pricing.extents.degrees[axis]
    for dim, rims in operator.halo.items():
        axes = [axis for axis, split in layout.split.items() if split == dim]
        for name, dims in zip(operator.inputs, operator.input_dims, strict=True):
            if dim in dims:
                row = pricing.workload.bytes_of(block.tensor[name].dtype)
                for other in dims:
                    row = row * (local[other] if other != dim else 1)
                for axis in axes:
                    took = sum(point_to_point_time(rim * row, strides[axis], levels) for rim in rims if rim)
                    total = total + took * (np.asarray(pricing.extents.degrees[axis]) > 1)
    return total


def operator_columns(
    block: Block, operator: Operator, split_CA: Array, pricing: Pricing, levels: Any, *, is_end: bool
) -> Seconds:
    """`seconds_of` an operator under all rows of `split_CA`: each dim is cut by an axis of its own, whose degree is a
    column. Operators with halos, whose neighbours depend on the mesh, are priced one by one."""
    order, degrees = tuple(pricing.extents.degrees), list(pricing.extents.degrees.values())
    if operator.halo:
        rows = [split_of(row, operator.dims, order, ("", SUMMANDS)) for row in split_CA.tolist()]
        found = [
            seconds_of(block, lay_out_operator(block, operator, row), pricing, levels, is_end=is_end) for row in rows
        ]
        forward, backward = (np.array([float(getattr(one, way)) for one in found]) for way in ("forward", "backward"))
        return Seconds(forward, backward)
    cuts = {dim: pieces(split_CA, FIRST_DIM + index, degrees) for index, dim in enumerate(operator.dims)}
    columns = {dim: column for dim, column in cuts.items() if column.max(initial=1) > 1}
    layout = lay_out_operator(block, operator, {dim: dim for dim in columns})
    extents = Extents(pricing.extents.sizes, {**columns, "": np.ones(len(split_CA), dtype=np.int64)})
    priced = Pricing(
        pricing.rates, pricing.engine, pricing.constants, pricing.workload, extents, pricing.networks, pricing.profile
    )
    found_s = seconds_of(block, layout, priced, levels, is_end=is_end)
    shape = len(split_CA)
    return Seconds(np.broadcast_to(found_s.forward, shape), np.broadcast_to(found_s.backward, shape))


def update_seconds(machine: Machine, state: StateBytes, numel: Any) -> Any:
    """Seconds of the optimizer's update of so many parameters: memory traffic, as in `step.prepare`."""
    traffic = UPDATE_PASSES * state.optimizer + state.gradient + state.parameter
    return traffic * numel * machine.constants.update_traffic / machine.rates.memory_Bps


def placed_pricing(
    machine: Machine, workload: Workload, sizes: Mapping[str, Any], degrees: Mapping[str, int]
) -> Pricing:
    """What prices operators and moves on a mesh of these axes, outermost first."""
    extents = Extents(sizes, degrees)
    return Pricing(machine.rates, machine.engine, machine.constants, workload, extents, machine.networks)
