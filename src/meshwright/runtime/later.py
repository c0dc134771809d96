"""The backward in two: gradients of inputs at once, gradients of weights later, for schedules with I and W.

A product of activations and a weight has two gradients of equal cost. `multiply_later` computes the one that the stage
before waits for, and leaves the other to whoever runs the `Later` of the stage. Norms, biases and embeddings cost
little and are differentiated at once, but all gradients of a block's use reach its leaf together, when those of
products do: a reduction over data-parallel ranks is then done once and belongs to W.

PyTorch's own split (`stage_backward_input`) walks the graph twice: with one leaf for a block, every weight lies behind
every activation, so that W would do the whole backward again, its collectives and its recomputation too.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from meshwright.graph import Operator

Work = Callable[[], None]


@dataclass
class Later:
    """What the backward of a stage has put off; `take` hands over what has come together since the last time."""

    works: list[Work] = field(default_factory=list)

    def take(self) -> Work:
        """The weight gradients of the microbatch whose input gradients have just been computed, to be run once."""
        works, self.works = self.works, []

        def run() -> None:
            with torch.no_grad():
                while works:
                    works.pop(0)()

        return run


@dataclass
class Landing:
    """Where the gradients of one use of a flat run wait: for each parameter, products yet to be computed."""

    later: Later
    products: list[tuple[int, Callable[[], Tensor]]] = field(default_factory=list)


Place = tuple[Landing, int]  # a use of a flat run, and which of its parameters


def can_wait(operator: Operator) -> bool:
    """Whether `multiply_later` knows an operator: a product of two in which no dim is summed in one of them alone."""
    if operator.kind != "einsum" or len(operator.inputs) != 2:
        return False
    a, b = (set(dims) for dims in operator.input_dims)
    distinct = len(a) == len(operator.input_dims[0]) and len(b) == len(operator.input_dims[1])
    return distinct and a ^ b <= set(operator.output_dims[0])


def multiply_later(operator: Operator, place: Place, weight_index: int, *operands: Tensor) -> Tensor:
    """The product, as the `einsum` kernel has it; `weight_index` says which operand is the weight, whose gradient goes
    to `place`."""
    result: Tensor = _MultiplyLater.apply(operator, place, weight_index, *operands)
    return result


class _MultiplyLater(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Operator, place: Place, weight_index: int, *operands: Tensor) -> Tensor:
        ctx.operator, ctx.place, ctx.weight_index = operator, place, weight_index
        ctx.save_for_backward(*operands)
        return _einsum((*operator.input_dims, operator.output_dims[0]), *operands)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        operator, (landing, position), weight_index = ctx.operator, ctx.place, ctx.weight_index
        operands = ctx.saved_tensors  # once: sharded weights are gathered and recomputed activations made by this
        other_index = 1 - weight_index
        weight_dims, other_dims = operator.input_dims[weight_index], operator.input_dims[other_index]
        made, other = operator.output_dims[0], operands[other_index]

        def weight_gradient() -> Tensor:
            return _einsum((made, other_dims, weight_dims), gradient, other)

        landing.products.append((position, weight_gradient))
        found: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[3 + other_index]:
            found[other_index] = _einsum((made, weight_dims, other_dims), gradient, operands[weight_index])
        return None, None, None, *found


def _einsum(dims: tuple[tuple[str, ...], ...], *operands: Tensor) -> Tensor:
    letters = dict(zip(dict.fromkeys(dim for side in dims for dim in side), string.ascii_letters, strict=False))
    *inputs, output = ("".join(letters[dim] for dim in side) for side in dims)
    return torch.einsum(f"{','.join(inputs)}->{output}", *operands)
