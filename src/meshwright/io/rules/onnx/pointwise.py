"""Operators that make each element of the result of the elements at its place, operands broadcast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from meshwright.graph import Role
from meshwright.io.rules.pattern import Array, Extra, Pattern, Seen, labelled, pointwise, positive, rule, saved_factors

#: Those whose backward reads nothing, the operand, or the result (as PyTorch's do).
_SAVE_NOTHING = """Add And BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Equal Floor Greater
    GreaterOrEqual IsInf IsNaN Less LessOrEqual Mean Neg Not Or Round Sign Sub Sum Xor"""
_SAVE_OPERAND = """Abs Acos Acosh Asin Asinh Atan Atanh Celu Clip Cos Cosh Elu Erf Gelu HardSigmoid HardSwish LeakyRelu
    Log Mish Pow Shrink Sin Sinh Softplus Softsign Swish Tan ThresholdedRelu"""
_SAVE_RESULT = "Exp Reciprocal Relu Selu Sigmoid Sqrt Tanh"
_SAVE_OPERANDS = "Max Min Mod PRelu"

POINTWISE = frozenset(f"{_SAVE_NOTHING} {_SAVE_OPERAND} {_SAVE_RESULT} {_SAVE_OPERANDS} Mul Div Where".split())

#: Those of which a sum of operands is the sum of results.
_ADDITIVE = frozenset({"Add", "Sub", "Sum", "Mean"})

#: Those that are linear in their one operand, as long as it is of floats.
_LINEAR = frozenset({"Neg", "Cast", "CastLike"})


def _onnx(names: str) -> tuple[str, ...]:
    return tuple(f"onnx.{name}" for name in names.split())


def trained(seen: Seen, names: Iterable[str]) -> tuple[str, ...]:
    """What a backward reads, nothing where there is no backward."""
    return tuple(dict.fromkeys(names)) if any(seen.trains(name) for name in seen.call.inputs) else ()


def op_type(seen: Seen) -> str:
    """The operator's name without its domain."""
    return seen.call.op.rpartition(".")[2]


def has_numbers(seen: Seen) -> bool:
    """Whether one of the operands is a number in the attributes."""
    return bool({"A", "B", "X", "Y"} & set(seen.call.attributes))


@rule(*_onnx(_SAVE_NOTHING))
def _nothing_saved(seen: Seen) -> Pattern:
    op = op_type(seen)
    floats = all(seen.is_float(name) for name in (*seen.call.inputs, *seen.call.outputs))
    additive = op in _ADDITIVE and seen.is_additive and not has_numbers(seen)
    return pointwise(seen, linear=floats and (additive or (op in _LINEAR and seen.is_multilinear)))


@rule(*_onnx(_SAVE_OPERAND))
def _operand_saved(seen: Seen) -> Pattern:
    return pointwise(seen, saves=trained(seen, seen.call.inputs))


@rule(*_onnx(_SAVE_RESULT))
def _result_saved(seen: Seen) -> Pattern:
    return pointwise(seen, saves=trained(seen, seen.call.outputs))


@rule(*_onnx(_SAVE_OPERANDS))
def _operands_saved(seen: Seen) -> Pattern:
    return pointwise(seen, saves=trained(seen, seen.call.inputs))


@rule("onnx.Mul")
def _product(seen: Seen) -> Pattern:
    return pointwise(seen, saves=saved_factors(seen, *seen.call.inputs), linear=seen.is_multilinear)


@rule("onnx.Div")
def _quotient(seen: Seen) -> Pattern:
    """d/dA reads B, d/dB reads both."""
    saves: list[str] = []
    if seen.has("A") and seen.has("B"):
        saves += [seen.name("A")] if seen.trains(seen.name("B")) else []
        saves += trained(seen, [seen.name("B")])
    elif seen.has("B"):
        saves += trained(seen, [seen.name("B")])
    above = seen.has("A") and seen.name("A") in seen.summable
    return pointwise(seen, saves=saves, linear=above and seen.is_multilinear)


@rule("onnx.Where")
def _where(seen: Seen) -> Pattern:
    """Linear where the condition is fixed and both branches are summands."""
    branches = [seen.name(argument) for argument in ("X", "Y") if seen.has(argument)]
    fixed = not seen.has("condition") or seen.roles[seen.name("condition")] is not Role.ACTIVATION
    summands = len(branches) == 2 and all(name in seen.summable for name in branches)
    condition = [seen.name("condition")] if seen.has("condition") else []
    return pointwise(seen, saves=trained(seen, condition), linear=fixed and summands)


@rule("onnx.Identity", "onnx.StopGradient")
def _identity(seen: Seen) -> Pattern:
    return replace(pointwise(seen, linear=True), view=True)


@rule("onnx.Dropout")
def _dropout(seen: Seen) -> Pattern:
    """In training the mask is kept; else nothing happens."""
    if not seen.get("training_mode"):
        return _identity(seen)
    pattern = pointwise(seen, linear=True)
    if len(seen.call.outputs) > 1:
        return replace(pattern, saves=trained(seen, seen.call.outputs[1:]))
    return replace(pattern, extras=(Extra("mask", pattern.results[0], "bool"),) if trained(seen, ["mask"]) else ())


@rule("onnx.RandomNormalLike", "onnx.RandomUniformLike", "onnx.Bernoulli", "onnx.RandomNormal", "onnx.RandomUniform")
def _random(seen: Seen) -> Pattern:
    return pointwise(seen)


@rule("onnx.Softmax", "onnx.LogSoftmax")
def _softmax(seen: Seen) -> Pattern:
    return pointwise(seen, saves=trained(seen, seen.call.outputs), unsplit=[seen.get("axis", -1)])


@rule("onnx.Hardmax")
def _hardmax(seen: Seen) -> Pattern:
    return pointwise(seen, unsplit=[seen.get("axis", -1)])


@rule("onnx.CumSum")
def _cumulated(seen: Seen) -> Pattern:
    return pointwise(seen, unsplit=[seen.get("axis", 0)], linear=seen.is_multilinear)


@rule("onnx.Trilu")
def _triangle(seen: Seen) -> Pattern:
    """Which elements stay depends on their places in the last two dims."""
    return pointwise(seen, unsplit=[-2, -1], linear=seen.is_multilinear)


@rule("onnx.QuantizeLinear", "onnx.DequantizeLinear")
def _quantised(seen: Seen) -> Pattern:
    """A scale of one dim goes with the dim `axis` of the array; with scales of blocks that dim stays whole."""
    array = labelled(seen.shapes[0], "d")
    axis = positive(seen.get("axis", 1), seen.rank) if seen.rank else 0
    operands: list[Array] = [array]
    whole: set[str] = set()
    for shape in seen.shapes[1:]:
        if len(shape) == 1:
            operands.append((array[axis] if shape[0] > 1 else (),))
            continue
        scale = list(labelled(shape, "d"))
        if scale and shape[axis] != seen.shapes[0][axis]:
            scale[axis] = ("blocks",) if shape[axis] > 1 else ()
            whole |= {*array[axis], *scale[axis]}
        operands.append(tuple(scale))
    return Pattern(tuple(operands), (array,), unsplit=frozenset(whole))
