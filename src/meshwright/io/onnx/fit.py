"""Whether the shapes of each call fit together: ONNX's shape inference lets much pass that no run would."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from meshwright.errors import Problem
from meshwright.io.rules import Pattern, Seen, rule_of
from meshwright.io.traced import Program


def fit_problems(program: Program, where: str) -> Iterator[Problem]:
    """Calls whose operands and results are not as the rule of their operator has them."""
    roles = {name: value.role for name, value in program.values.items()}
    for call in program.calls:
        seen = Seen(call, program.values, roles)
        rule = rule_of(call.op)
        try:
            fits = rule is None or _fits(rule(seen), (*seen.shapes, *seen.result_shapes))
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError):
            fits = False  # rules take for granted what a run would
        if not fits:
            shapes = ", ".join(str(list(shape)) for shape in seen.shapes)
            yield Problem(f"{where}: {call.op.removeprefix('onnx.')} {call.name}", shapes, "do not fit together")


def _fits(pattern: Pattern, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether every label has one size and every dim is the product of its labels."""
    arrays = (*pattern.operands, *pattern.results)
    if [len(array) for array in arrays] != [len(shape) for shape in shapes]:
        return False
    sizes = dict(pattern.sizes)
    for array, shape in zip(arrays, shapes, strict=True):
        for labels, size in zip(array, shape, strict=True):
            if len(labels) == 1:
                sizes.setdefault(labels[0], size)
    return all(
        math.prod(sizes[label] for label in labels) == size
        for array, shape in zip(arrays, shapes, strict=True)
        for labels, size in zip(array, shape, strict=True)
    )
