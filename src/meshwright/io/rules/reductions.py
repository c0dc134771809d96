"""Sums, means, extremes, norms, softmaxes and losses.

A sum may be cut along the dims it sums over (summands are left); a mean too, its divisor that of the whole. Extremes,
variances and softmaxes need the whole dim.
"""

from __future__ import annotations

from dataclasses import replace

from meshwright.io.rules.pattern import (
    Extra,
    Pattern,
    Seen,
    along,
    aten,
    dims_of,
    labelled,
    labels_of,
    pointwise,
    positive,
    reduced,
    replicated,
    rule,
)


@rule("aten.sum", "aten.mean", "aten.nansum")
def total(seen: Seen) -> Pattern:
    """Sums and means over some dims, or all."""
    return reduced(seen, dims_of(seen.get("dim"), seen.rank), bool(seen.get("keepdim", False)), additive=True)


@rule("aten.count_nonzero")
def count(seen: Seen) -> Pattern:
    """How many are not 0."""
    return replace(reduced(seen, dims_of(seen.get("dim"), seen.rank), False, additive=True), linear=False)


@rule(
    *aten(
        """
        amax amin max min prod any all std var var_mean norm linalg_vector_norm argmax argmin logsumexp median
        mode std_mean aminmax
        """
    )
)
def extreme(seen: Seen) -> Pattern:
    """What needs the whole dim."""
    op = seen.call.op.split(".")[1]
    if op in ("max", "min") and len(seen.call.inputs) == 2:
        return pointwise(seen, saves=seen.call.inputs)
    kept = {
        "argmax": (),
        "argmin": (),
        "any": (),
        "all": (),
        "max": seen.call.outputs[1:],
        "min": seen.call.outputs[1:],
    }
    both = (*seen.call.inputs, *seen.call.outputs)
    saves = kept.get(op, seen.call.inputs if op in ("var", "std", "var_mean", "std_mean") else both)
    keepdim = bool(seen.get("keepdim", False))
    return reduced(seen, dims_of(seen.get("dim"), seen.rank), keepdim, additive=False, saves=saves)


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.special_softmax")
def softmax(seen: Seen) -> Pattern:
    """Over one dim, which stays whole; the backward reads the result."""
    return pointwise(seen, saves=seen.call.outputs, unsplit=[seen.get("dim", -1)])


@rule("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.cummax", "aten.cummin")
def running(seen: Seen) -> Pattern:
    """Each element is made of all before it."""
    plain = "cumsum" in seen.call.op and "log" not in seen.call.op
    return pointwise(
        seen, saves=() if plain else seen.call.inputs, unsplit=[seen.get("dim", 0)], linear=plain and seen.is_additive
    )


@rule("aten.sort", "aten.argsort", "aten.topk", "aten.kthvalue", "aten.msort")
def ordered(seen: Seen) -> Pattern:
    """Sorted along one dim, or the largest of it."""
    dim = positive(seen.get("dim", 0 if "msort" in seen.call.op else -1), seen.rank)
    saves = seen.call.outputs[1:]
    if seen.shapes[0] == seen.result_shapes[0]:
        return pointwise(seen, saves=saves, unsplit=[dim])
    if len(seen.result_shapes[0]) != seen.rank:
        return reduced(seen, [dim], False, additive=False, saves=saves)
    pattern = along(seen, dim, saves=saves)
    return replace(
        pattern, results=tuple(pattern.results[0] for _ in pattern.results)
    )  # values and indices have one dim


@rule("aten.layer_norm", "aten.native_layer_norm", "aten.rms_norm", "aten._fused_rms_norm")
def norm(seen: Seen) -> Pattern:
    """Normalised over the last dims, which stay whole; keeps mean and reciprocal deviation of each row."""
    shape = seen.get("normalized_shape")
    count = 1 if shape is None else len(shape)
    array = labelled(seen.shapes[0], "d")
    front, back = array[: len(array) - count], array[len(array) - count :]
    operands = (array, *(back for _ in seen.call.inputs[1:]))
    names = seen.call.inputs
    weight = [seen.name("weight")] if seen.has("weight") else []
    kept = ("mean", "rstd") if "layer_norm" in seen.call.op else ("rstd",)
    results = (array, *((*front, *(() for _ in back)) for _ in seen.call.outputs[1:]))
    return Pattern(
        operands,
        results,
        unsplit=frozenset(labels_of(back)),
        saves=(names[0], *weight),
        extras=tuple(Extra(name, front) for name in kept) if len(seen.call.outputs) == 1 else (),
    )


@rule("aten.group_norm")
def group_norm(seen: Seen) -> Pattern:
    """Normalised over the channels of a group and all of space; a group is a factor of the channels."""
    shape, groups = seen.shapes[0], int(seen.get("num_groups"))
    inner = shape[1] // groups
    channels = (*(("g",) if groups > 1 else ()), *(("c",) if inner > 1 else ()))
    array = list(labelled(shape, "d"))
    array[1] = channels
    whole = {"c"} | set(labels_of(tuple(array[2:])))
    present = {label for labels in array for label in labels}
    rows = (array[0], ("g",) if groups > 1 else ())
    weight = [seen.name("weight")] if seen.has("weight") else []
    return Pattern(
        (tuple(array), *((channels,) for _ in seen.call.inputs[1:])),
        (tuple(array),),
        unsplit=frozenset(whole & present),
        saves=(seen.call.inputs[0], *weight),
        sizes={label: size for label, size in (("g", groups), ("c", inner)) if size > 1},
        extras=(Extra("mean", rows), Extra("rstd", rows)),
    )


@rule("aten.instance_norm")
def instance_norm(seen: Seen) -> Pattern:
    """Normalised over space, for each channel of each sample."""
    array = labelled(seen.shapes[0], "d")
    rows = array[:2]
    weight = [seen.name("weight")] if seen.has("weight") else []
    return Pattern(
        (array, *((array[1],) for _ in seen.call.inputs[1:])),
        (array,),
        unsplit=frozenset(labels_of(array[2:])),
        saves=(seen.call.inputs[0], *weight),
        extras=(Extra("mean", rows), Extra("rstd", rows)),
    )


@rule("aten.batch_norm", "aten.native_batch_norm", "aten._native_batch_norm_legit", "aten.cudnn_batch_norm")
def batch_norm(seen: Seen) -> Pattern:
    """In training two operators: sums and sums of squares of each channel over batch and space (cut along those they
    are summands), and what normalises by them. In evaluation the running statistics are constants."""
    array = labelled(seen.shapes[0], "d")
    channels = (array[1],)
    results = (array, *(channels for _ in seen.call.outputs[1:]))
    kept = [seen.name(argument) for argument in ("weight", "running_mean", "running_var") if seen.has(argument)]
    pattern = Pattern((array, *(channels for _ in seen.call.inputs[1:])), results, saves=(seen.call.inputs[0], *kept))
    if not (seen.get("training", False) or seen.get("train", False)):
        return pattern
    return replace(
        pattern,
        statistics=(Extra("sum", channels), Extra("square_sum", channels)),
        extras=(Extra("mean", channels), Extra("rstd", channels)),
    )


_REDUCTION_NONE = 0


@rule("aten.cross_entropy_loss")
def cross_entropy(seen: Seen) -> Pattern:
    """Of each row: log(sum exp x) - x[target], their mean or sum; classes stay whole. Keeps the log-softmax."""
    logits = labelled(seen.shapes[0], "d")
    at = 0 if len(logits) == 1 else 1
    rows = tuple(labels for dim, labels in enumerate(logits) if dim != at)
    targets = rows if len(seen.shape("target")) < len(logits) else logits
    operands = [logits, targets, *((logits[at],) for _ in seen.call.inputs[2:])]
    result = rows if int(seen.get("reduction", 1)) == _REDUCTION_NONE else ()
    return Pattern(
        tuple(operands),
        (result,),
        unsplit=frozenset(logits[at]),
        saves=seen.call.inputs[1:],
        extras=(Extra("log_softmax", logits),),
    )


@rule("aten.nll_loss", "aten.nll_loss_nd", "aten.nll_loss2d")
def nll_loss(seen: Seen) -> Pattern:
    """x[target] of each row; classes stay whole."""
    pattern = cross_entropy(seen)
    return replace(pattern, saves=seen.call.inputs, extras=())


@rule(
    *aten(
        """
        mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div
        """
    )
)
def loss(seen: Seen) -> Pattern:
    """A number of each element, their mean or sum."""
    pattern = pointwise(seen, saves=seen.call.inputs)
    if int(seen.get("reduction", 1)) == _REDUCTION_NONE:
        return pattern
    rank = max(len(shape) for shape in seen.shapes)
    arrays = pointwise(replace(seen, call=replace(seen.call, outputs=seen.call.inputs[:1]))).operands
    assert rank >= 0
    return Pattern(arrays, ((),), saves=tuple(dict.fromkeys(seen.call.inputs)))


@rule("aten.cosine_similarity", "aten.pairwise_distance")
def similarity(seen: Seen) -> Pattern:
    """Of vectors along one dim, which stays whole."""
    dim = positive(seen.get("dim", 1 if "cosine" in seen.call.op else -1), seen.rank)
    if seen.shapes[0] != seen.shapes[1]:
        return replicated(seen)
    array = labelled(seen.shapes[0], "d")
    result = tuple(labels for at, labels in enumerate(array) if at != dim)
    return Pattern((array, array), (result,), unsplit=frozenset(array[dim]), saves=seen.call.inputs)
