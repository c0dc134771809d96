"""Sums and other reductions, norms, losses."""

from __future__ import annotations

from dataclasses import replace

from meshwright.io.rules.onnx.pointwise import op_type, trained
from meshwright.io.rules.pattern import (
    Array,
    Extra,
    Pattern,
    Seen,
    broadcast,
    dims_of,
    labelled,
    labels_of,
    positive,
    reduced,
    rule,
    without,
)

#: Of each reduction what its backward reads, as PyTorch's: x the operand, y the result.
_REDUCTIONS = {
    "Sum": "",
    "Mean": "",
    "SumSquare": "x",
    "L1": "x",
    "L2": "xy",
    "Max": "xy",
    "Min": "xy",
    "Prod": "xy",
    "LogSum": "xy",
    "LogSumExp": "xy",
}


@rule(*(f"onnx.Reduce{name}" for name in _REDUCTIONS))
def _reduced(seen: Seen) -> Pattern:
    kind = op_type(seen).removeprefix("Reduce")
    axes = seen.get("axes", ())
    dims = () if not axes and seen.get("noop_with_empty_axes") else dims_of(axes, seen.rank)
    read = _REDUCTIONS[kind]
    saves = [*seen.call.inputs[: "x" in read], *seen.call.outputs[: "y" in read]]
    additive = kind in ("Sum", "Mean")
    return reduced(seen, dims, bool(seen.get("keepdims", 1)), additive=additive, saves=trained(seen, saves))


@rule("onnx.ArgMax", "onnx.ArgMin")
def _arg(seen: Seen) -> Pattern:
    return reduced(seen, dims_of(seen.get("axis", 0), seen.rank), bool(seen.get("keepdims", 1)), additive=False)


@rule("onnx.GlobalAveragePool", "onnx.GlobalMaxPool", "onnx.GlobalLpPool")
def _global_pool(seen: Seen) -> Pattern:
    average = op_type(seen) == "GlobalAveragePool"
    saves = () if average else trained(seen, (seen.call.inputs[0], seen.call.outputs[0]))
    return reduced(seen, range(2, seen.rank), True, additive=average, saves=saves)


@rule("onnx.LayerNormalization", "onnx.RMSNormalization")
def _layer_norm(seen: Seen) -> Pattern:
    """Over the dims from `axis` on, which stay whole; mean and inverse deviation are kept for the backward."""
    array = labelled(seen.shapes[0], "d")
    axis = positive(seen.get("axis", -1), seen.rank)
    statistics = without(array, range(axis, seen.rank), keepdim=True)
    kept = ("mean", "rstd") if op_type(seen) == "LayerNormalization" else ("rstd",)
    outputs = seen.call.outputs
    keeps = bool(trained(seen, outputs))
    extras = tuple(Extra(name, statistics, "float32") for name in kept) if keeps and len(outputs) == 1 else ()
    return Pattern(
        (array, *(broadcast(shape, seen.rank) for shape in seen.shapes[1:])),
        (array, *(statistics for _ in outputs[1:])),
        unsplit=frozenset(labels_of(array[axis:])),
        saves=trained(seen, (*seen.call.inputs[:2], *outputs[1:])),
        extras=extras,
    )


@rule("onnx.BatchNormalization")
def _batch_norm(seen: Seen) -> Pattern:
    """With given statistics elementwise. In training they are those of the batch: sums over all but the channels."""
    array = labelled(seen.shapes[0], "d")
    channels = array[1] if seen.rank > 1 else ()
    training = bool(seen.get("training_mode")) or len(seen.call.outputs) > 1
    pattern = Pattern(
        (array, *((channels,) for _ in seen.shapes[1:])),
        (array, *((channels,) for _ in seen.call.outputs[1:])),
        saves=trained(seen, (*seen.call.inputs[:2], *(() if training else seen.call.inputs[3:5]))),
    )
    if not training:
        return pattern
    return replace(
        pattern,
        statistics=(Extra("sum", (channels,)), Extra("square_sum", (channels,))),
        extras=(Extra("mean", (channels,)), Extra("rstd", (channels,))) if pattern.saves else (),
    )


@rule("onnx.InstanceNormalization")
def _instance_norm(seen: Seen) -> Pattern:
    array = labelled(seen.shapes[0], "d")
    keeps = trained(seen, seen.call.inputs[:2])
    extras = tuple(Extra(name, array[:2], "float32") for name in ("mean", "rstd"))
    return Pattern(
        (array, *((array[1],) for _ in seen.shapes[1:])),
        (array,),
        unsplit=frozenset(labels_of(array[2:])),
        saves=keeps,
        extras=extras if keeps else (),
    )


@rule("onnx.GroupNormalization")
def _group_norm(seen: Seen) -> Pattern:
    """Channels are groups times the channels of one, which stay whole as space does; the scale is one number a group
    until opset 21."""
    groups, channels = seen.get("num_groups"), seen.shapes[0][1]
    sizes = {"group": groups, "inner": channels // groups}
    split = tuple(label for label, size in sizes.items() if size > 1)
    array = list(labelled(seen.shapes[0], "d"))
    array[1] = split
    weights = [
        (split if shape[0] == channels else tuple(label for label in split if label == "group"),)
        for shape in seen.shapes[1:]
    ]
    statistics = (array[0], tuple(label for label in split if label == "group"))
    keeps = trained(seen, seen.call.inputs[:2])
    return Pattern(
        (tuple(array), *weights),
        (tuple(array),),
        unsplit=frozenset({*labels_of(tuple(array[2:])), *(label for label in split if label == "inner")}),
        saves=keeps,
        extras=tuple(Extra(name, statistics, "float32") for name in ("mean", "rstd")) if keeps else (),
        sizes={label: sizes[label] for label in split},
    )


@rule("onnx.LpNormalization", "onnx.LRN", "onnx.MeanVarianceNormalization")
def _other_norm(seen: Seen) -> Pattern:
    """Over one dim (of LRN the channels), or over several."""
    array = labelled(seen.shapes[0], "d")
    over = {"LpNormalization": seen.get("axis", -1), "LRN": 1}.get(op_type(seen), seen.get("axes", (0, 2, 3)))
    whole = frozenset(label for dim in dims_of(over, seen.rank) for label in array[dim])
    return Pattern((array,), (array,), unsplit=whole, saves=trained(seen, (*seen.call.inputs, *seen.call.outputs)))


@rule("onnx.SoftmaxCrossEntropyLoss", "onnx.NegativeLogLikelihoodLoss")
def _loss(seen: Seen) -> Pattern:
    """Of scores (batch, classes, places ...) and a class for each place; a mean or a sum adds up over the batch."""
    scores = labelled(seen.shapes[0], "d")
    places: Array = (scores[0], *scores[2:])
    weights = [(scores[1],) for _ in seen.shapes[2:]]
    loss = places if seen.get("reduction") == "none" else ()
    # A weighted mean divides by what the weights of all places come to.
    whole = set(scores[1]) | (set(labels_of(places)) if weights and seen.get("reduction") == "mean" else set())
    keeps = (seen.call.inputs[1], *(seen.call.outputs[1:] or seen.call.inputs[:1]))
    return Pattern(
        (scores, places, *weights),
        (loss, *(scores for _ in seen.call.outputs[1:])),
        unsplit=frozenset(whole),
        saves=trained(seen, keeps),
    )
