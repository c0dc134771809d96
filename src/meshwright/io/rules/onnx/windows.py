"""Convolutions, pools and resizing: windows that slide over space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from meshwright.io.rules.onnx.pointwise import op_type, trained
from meshwright.io.rules.pattern import Extra, Pattern, Seen, labelled, rule, saved_factors, windowed


@dataclass
class _Space:
    """The labels of the dims of space, one after the other."""

    before: list[tuple[str, ...]] = field(default_factory=list)
    after: list[tuple[str, ...]] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    halo: dict[str, tuple[int, int]] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)


def _slid(seen: Seen, kernel: Sequence[int]) -> _Space:
    """Windows of `kernel` over the dims from 2 on of the first operand, by the attributes of the call."""
    space = _Space()
    source, target = seen.shapes[0][2:], seen.result_shapes[0][2:]
    strides = seen.get("strides") or (1,) * len(kernel)
    dilations = seen.get("dilations") or (1,) * len(kernel)
    for dim, size in enumerate(kernel):
        reach = dilations[dim] * (size - 1) + 1
        before, after, sizes, halo, whole = windowed(
            source[dim],
            target[dim],
            kernel=size,
            stride=strides[dim],
            padding=_padding(seen, dim, len(kernel), source[dim], target[dim], reach, strides[dim]),
            dilation=dilations[dim],
            label=f"y{dim}",
        )
        space.before.append(before)
        space.after.append(after)
        space.sizes |= sizes
        space.halo |= halo
        space.whole |= whole
    return space


def _padding(seen: Seen, dim: int, dims: int, size: int, out: int, reach: int, stride: int) -> int:
    """What is added before the first element."""
    mode = seen.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return int((seen.get("pads") or (0,) * 2 * dims)[dim])
    total = max(0, (out - 1) * stride + reach - size)
    return {"SAME_UPPER": total // 2, "SAME_LOWER": total - total // 2}.get(mode, 0)


def _grouped(seen: Seen, channels: int, outputs: int) -> tuple[dict[str, int], tuple[str, ...], tuple[str, ...]]:
    """Labels of the channels in and out: a group, and what one has of them; sizes by label."""
    groups = seen.get("group", 1)
    sizes = {"group": groups, "c": channels // groups, "m": outputs // groups}
    inside = tuple(label for label in ("group", "c") if sizes[label] > 1)
    outside = tuple(label for label in ("group", "m") if sizes[label] > 1)
    return {label: sizes[label] for label in (*inside, *outside)}, inside, outside


@rule("onnx.Conv", "onnx.ConvInteger")
def _convolved(seen: Seen) -> Pattern:
    """y[n, g m, p] = sum over c, k of x[n, g c, stride p + k] w[g m, c, k], plus a bias."""
    weight = seen.shapes[1]
    sizes, inside, outside = _grouped(seen, seen.shapes[0][1], weight[0])
    space = _slid(seen, weight[2:])
    taps = labelled(weight[2:], "tap")
    batch = labelled(seen.shapes[0][:1], "n")
    own = tuple(label for label in inside if label == "c")
    biases = [
        (outside,) if len(shape) == 1 and shape[0] == weight[0] else labelled(shape, "z") for shape in seen.shapes[2:]
    ]
    inner = (*batch[0], *outside, *own, *(label for labels in (*space.after, *taps) for label in labels))
    return Pattern(
        ((*batch, inside, *space.before), (outside, own, *taps), *biases),
        ((*batch, outside, *space.after),),
        unsplit=frozenset({*space.whole, *(label for labels in taps for label in labels)}),
        contractions=(tuple(dict.fromkeys(inner)),),
        saves=saved_factors(seen, *seen.call.inputs[:2]),
        linear=seen.is_multilinear and not biases,
        halo=space.halo,
        sizes=sizes | space.sizes,
    )


@rule("onnx.ConvTranspose")
def _convolved_back(seen: Seen) -> Pattern:
    """The gradient of a convolution: x[n, g c, p] w[g c, m, k] goes to y[n, g m, stride p + k]. Where windows tile the
    result, space can be split."""
    source, weight, target = seen.shapes[0], seen.shapes[1], seen.result_shapes[0]
    groups = seen.get("group", 1)
    sizes, inside, outside = _grouped(seen, source[1], weight[1] * groups)
    taps = list(labelled(weight[2:], "tap"))
    batch = labelled(source[:1], "n")
    strides = seen.get("strides") or (1,) * len(taps)
    before, after = list(labelled(source[2:], "y")), list(labelled(target[2:], "z"))
    whole = {label for labels in taps for label in labels}
    for dim, (size, out) in enumerate(zip(source[2:], target[2:], strict=True)):
        if weight[2 + dim] == strides[dim] and out == size * strides[dim]:
            after[dim] = (*before[dim], *taps[dim])
            sizes |= {**dict.fromkeys(before[dim], size), **dict.fromkeys(taps[dim], strides[dim])}
        else:
            whole |= {*before[dim], *after[dim]}
    own = tuple(label for label in outside if label == "m")
    biases = [(outside,) for _ in seen.shapes[2:]]
    inner = (*batch[0], *inside, *own, *(label for labels in (*before, *taps) for label in labels))
    return Pattern(
        ((*batch, inside, *before), (inside, own, *taps), *biases),
        ((*batch, outside, *after),),
        unsplit=frozenset(whole),
        contractions=(tuple(dict.fromkeys(inner)),),
        saves=saved_factors(seen, *seen.call.inputs[:2]),
        linear=seen.is_multilinear and not biases,
        sizes=sizes,
    )


@rule("onnx.MaxPool", "onnx.AveragePool", "onnx.LpPool")
def _pooled(seen: Seen) -> Pattern:
    op, outputs = op_type(seen), seen.call.outputs
    space = _slid(seen, seen.get("kernel_shape"))
    outer = labelled(seen.shapes[0][:2], "n")
    result = (*outer, *space.after)
    pattern = Pattern(
        ((*outer, *space.before),),
        tuple(result for _ in outputs),
        unsplit=frozenset(space.whole),
        saves=trained(seen, (seen.call.inputs[0], *outputs[1:], *(outputs if op == "LpPool" else ()))),
        linear=op == "AveragePool" and seen.is_multilinear,
        halo=space.halo,
        sizes=space.sizes,
    )
    if op == "MaxPool" and len(outputs) == 1 and pattern.saves:
        return replace(pattern, extras=(Extra("indices", result, "int64"),))
    return pattern


@rule("onnx.Resize", "onnx.Upsample")
def _resized(seen: Seen) -> Pattern:
    """Dims that keep their size are passed through; one repeated a whole number of times is a factor of repeats."""
    source, target = seen.shapes[0], seen.result_shapes[0]
    before, after = list(labelled(source, "d")), list(labelled(target, "d"))
    whole: set[str] = set()
    sizes: dict[str, int] = {}
    for dim, (size, out) in enumerate(zip(source, target, strict=True)):
        if size == out:
            continue
        if seen.get("mode", "nearest") == "nearest" and out % size == 0:
            after[dim] = (*before[dim], f"repeat{dim}")
            sizes |= {**dict.fromkeys(before[dim], size), f"repeat{dim}": out // size}
            whole.add(f"repeat{dim}")
        else:
            before[dim], after[dim] = ((f"from{dim}",) if size > 1 else ()), ((f"to{dim}",) if out > 1 else ())
            whole |= {*before[dim], *after[dim]}
    others = tuple(labelled(shape, f"i{index}_") for index, shape in enumerate(seen.shapes[1:]))
    return Pattern(
        (tuple(before), *others),
        (tuple(after),),
        unsplit=frozenset({*whole, *(label for array in others for labels in array for label in labels)}),
        linear=seen.is_multilinear,
        sizes=sizes,
    )
