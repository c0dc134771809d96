"""Operators that make each element of the elements at its place, and those that only make constants.

Which operands and results the backward reads is PyTorch's (`tools/autograd/derivatives.yaml`).
"""

from __future__ import annotations

from meshwright.io.rules.pattern import Extra, Pattern, Seen, aten, labelled, pointwise, replicated, rule, saved_factors

#: Operators whose backward reads nothing: sums, signs, comparisons, roundings, types.
PLAIN = """
    neg to _to_copy type_as float half bfloat16 double long int clone floor ceil round trunc sign eq ne lt le gt ge
    logical_not logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor __and__ __or__
    __xor__ isnan isinf isfinite nan_to_num floor_divide remainder fmod bitwise_left_shift bitwise_right_shift
    lift_fresh_copy lift_fresh heaviside bernoulli rand_like randn_like randint_like
    copy conj real imag positive
"""

#: Copies, where the type stays.
COPIES = frozenset(
    ("to", "_to_copy", "clone", "float", "half", "bfloat16", "double", "lift_fresh", "lift_fresh_copy", "long", "int")
)

#: Their backward reads the operand.
OF_OPERAND = """
    silu gelu abs cos sin tan cosh sinh log log2 log10 log1p softplus hardswish hardsigmoid leaky_relu elu mish
    clamp clamp_min clamp_max clip erf erfc square selu celu log_sigmoid hardtanh relu6 asin acos atan asinh acosh
    atanh softsign logit hardshrink softshrink digamma lgamma xlogy erfinv sinc rad2deg deg2rad
"""

#: Their backward reads the result.
OF_RESULT = """
    relu sigmoid tanh exp exp2 expm1 rsqrt sqrt reciprocal threshold
"""

#: Sums; linear where no term is a constant.
SUMS = "add sub rsub"

#: Factors times factors.
PRODUCTS = "mul multiply"

#: Both operands decide the gradient of each.
PAIRS = """
    maximum minimum max.other min.other atan2 hypot logaddexp fmax fmin
"""

#: Constants by their shape.
CONSTANTS = """
    arange full zeros ones empty scalar_tensor eye linspace new_zeros new_ones new_full new_empty tril_indices
    triu_indices hann_window empty_strided rand randn randint tensor new_empty_strided
"""

#: Constants of the operand's shape.
LIKE = "zeros_like ones_like full_like empty_like fill zero"


@rule(*aten(PLAIN))
def plain(seen: Seen) -> Pattern:
    """A conversion between types of floats adds up; roundings and comparisons don't. A copy moves data, but whoever
    reads it may as well read the original."""
    op = seen.call.op.split(".")[1]
    if op in COPIES and seen.values[seen.call.inputs[0]].dtype == seen.values[seen.call.outputs[0]].dtype:
        pattern = pointwise(seen)
        if len(pattern.operands) == 1:
            return Pattern(pattern.operands, pattern.results, view=True, linear=True)
    keeps_sums = op in ("neg", "to", "_to_copy", "type_as", "float", "half", "bfloat16", "double", "clone")
    to_float = all(seen.is_float(name) for name in seen.call.outputs)
    return pointwise(seen, linear=keeps_sums and to_float and len(seen.summable) == 1)


@rule(*aten(OF_OPERAND))
def of_operand(seen: Seen) -> Pattern:
    """An activation function, saved by what goes in."""
    return pointwise(seen, saves=seen.call.inputs)


@rule("aten.prelu")
def prelu(seen: Seen) -> Pattern:
    """A slope of its own for each channel (dim 1), or one for all."""
    array = labelled(seen.shapes[0], "d")
    weight = tuple(array[1] if size > 1 else () for size in seen.shapes[1])
    return Pattern((array, weight), (array,), saves=seen.call.inputs)


@rule("aten.isin", "aten.bucketize", "aten.searchsorted")
def looked_up(seen: Seen) -> Pattern:
    """Each element's place in (or membership of) one list, which stays whole."""
    asked = next((name for name in ("elements", "self") if seen.has(name)), "")
    if not asked or any(seen.values[name].shape != seen.result_shapes[0] for name in [seen.name(asked)]):
        return replicated(seen)
    array = labelled(seen.shape(asked), "d")
    others = [labelled(shape, f"i{index}_") for index, shape in enumerate(seen.shapes)]
    if any(len(seen.shape(name)) > 1 for name in seen.call.operands if name not in (asked, "test_elements")):
        return replicated(seen)
    operands = tuple(array if argument == asked else others[index] for index, argument in enumerate(seen.call.operands))
    whole = {label for own in operands if own is not array for labels in own for label in labels}
    return Pattern(operands, (array,), unsplit=frozenset(whole))


@rule(*aten(OF_RESULT))
def of_result(seen: Seen) -> Pattern:
    """An activation function, saved by what comes out."""
    return pointwise(seen, saves=seen.call.outputs)


@rule(*aten(SUMS))
def sums(seen: Seen) -> Pattern:
    """a + alpha * b; a number added is a constant."""
    return pointwise(seen, linear=seen.is_additive and len(seen.call.inputs) == 2)


@rule(*aten(PRODUCTS))
def products(seen: Seen) -> Pattern:
    """a * b; a number is no operand."""
    return pointwise(seen, saves=saved_factors(seen, *seen.call.inputs), linear=seen.is_multilinear)


@rule("aten.div", "aten.divide", "aten.true_divide")
def quotient(seen: Seen) -> Pattern:
    """a / b: linear in a; the gradient of b reads both."""
    names = seen.call.inputs
    if len(names) == 1:
        return pointwise(seen, linear=seen.is_multilinear)
    saves = names if seen.trains(names[1]) else names[1:] if seen.trains(names[0]) else ()
    return pointwise(seen, saves=saves, linear=seen.summable == (names[0],) and names[0] != names[1])


@rule(*aten(PAIRS))
def pairs(seen: Seen) -> Pattern:
    """The larger, the smaller and the like of two."""
    return pointwise(seen, saves=seen.call.inputs)


@rule("aten.pow")
def power(seen: Seen) -> Pattern:
    """Powers: of a tensor by a number, a number by a tensor, a tensor by a tensor."""
    both = len(seen.call.inputs) == 2
    saves = (*seen.call.inputs, *seen.call.outputs) if both else seen.call.inputs
    return pointwise(seen, saves=seen.call.outputs if seen.call.op.endswith(".Scalar") else saves)


@rule("aten.where", "aten.masked_fill")
def chosen(seen: Seen) -> Pattern:
    """One of two by a condition, which the backward reads."""
    argument = "condition" if seen.has("condition") else "mask"
    rest = [name for name in seen.call.inputs if name != seen.name(argument)]
    others_whole = argument == "condition" and len(rest) == 2 and set(rest) == set(seen.summable)
    return pointwise(seen, saves=(seen.name(argument),), linear=others_whole)


@rule("aten.addcmul", "aten.addcdiv")
def addc(seen: Seen) -> Pattern:
    """a + value * b * c, or b / c."""
    return pointwise(seen, saves=seen.call.inputs[1:])


@rule("aten.lerp")
def lerp(seen: Seen) -> Pattern:
    """Between two, by a weight."""
    return pointwise(seen, saves=seen.call.inputs if len(seen.call.inputs) == 3 else ())


@rule("aten.glu")
def gated(seen: Seen) -> Pattern:
    """Half of the operand times the sigmoid of the other half."""
    dim = seen.get("dim", -1) % seen.rank
    result = list(labelled(seen.result_shapes[0], "d"))
    operand = list(result)
    operand[dim] = ("half", *result[dim])
    return Pattern(
        (tuple(operand),),
        (tuple(result),),
        unsplit=frozenset({"half"}),
        saves=seen.call.inputs,
        sizes={"half": 2, **dict.fromkeys(result[dim], seen.result_shapes[0][dim])},
    )


@rule("aten.dropout", "aten.native_dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.dropout_")
def dropout(seen: Seen) -> Pattern:
    """Keeps a mask of one byte an element in training; nothing happens in evaluation."""
    trains = bool(seen.get("train", True)) and float(seen.get("p", 0.5)) > 0
    pattern = pointwise(seen, linear=trains and len(seen.summable) == 1)
    if not trains:
        return Pattern(pattern.operands, pattern.results, view=True, linear=True)
    mask = Extra("mask", pattern.results[0], "bool")
    return Pattern(pattern.operands, pattern.results, linear=True, extras=(mask,))


@rule(*aten(CONSTANTS))
def constants(seen: Seen) -> Pattern:
    """What no operand's numbers decide."""
    whole = replicated(seen)
    return Pattern(whole.operands, whole.results, constant=True)


@rule(*aten(LIKE))
def constants_like(seen: Seen) -> Pattern:
    """A constant with the dims of the operand."""
    pattern = pointwise(seen)
    return Pattern(pattern.operands, pattern.results, constant=True)
