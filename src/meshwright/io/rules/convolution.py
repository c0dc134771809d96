"""Convolutions, pools and resizings over space.

Where the input is exactly `stride` times as long as the output along a dim of space, that dim may be cut: each piece of
the output reads a piece of the input and a halo (`graph.Operator.halo`, in elements of the operand).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meshwright.io.rules.pattern import (
    Array,
    Extra,
    Pattern,
    Seen,
    aten,
    labelled,
    labels_of,
    replicated,
    rule,
    saved_factors,
    windowed,
)


def _per_dim(value: Any, dims: int, default: int) -> list[int]:
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return [default] * dims
    found = [value] if isinstance(value, int) else list(value)
    return found * dims if len(found) == 1 else found


def _paddings(value: Any, dims: int, kernels: Sequence[int], dilations: Sequence[int]) -> list[int]:
    if value == "valid":
        return [0] * dims
    if value == "same":
        return [dilation * (kernel - 1) // 2 for kernel, dilation in zip(kernels, dilations, strict=True)]
    return _per_dim(value, dims, 0)


@rule(*(f"aten.{name}" for name in ("conv1d", "conv2d", "conv3d", "convolution", "_convolution")))
def convolution(seen: Seen) -> Pattern:
    """Sums over input channels (of a group) and the window."""
    if seen.get("transposed", False):
        return transposed(seen)
    source, weight, out = seen.shape("input"), seen.shape("weight"), seen.result_shapes[0]
    dims, groups = len(weight) - 2, int(seen.get("groups", 1))
    if len(source) != dims + 2:
        return replicated(seen)
    strides, dilations = (_per_dim(seen.get(name), dims, 1) for name in ("stride", "dilation"))
    paddings = _paddings(seen.get("padding", 0), dims, weight[2:], dilations)
    sizes: dict[str, int] = {}
    halo: dict[str, tuple[int, int]] = {}
    whole: set[str] = set()
    space_in: list[tuple[str, ...]] = []
    space_out: list[tuple[str, ...]] = []
    for dim in range(dims):
        inner, outer, own_sizes, own_halo, own_whole = windowed(
            source[2 + dim],
            out[2 + dim],
            kernel=weight[2 + dim],
            stride=strides[dim],
            padding=paddings[dim],
            dilation=dilations[dim],
            label=f"y{dim}",
        )
        space_in.append(inner)
        space_out.append(outer)
        sizes |= own_sizes
        halo |= own_halo
        whole |= own_whole
    window = labelled(weight[2:], "k")
    return _convolved(seen, groups, (space_in, space_out), window, sizes, halo, whole, product_space=space_out)


@rule(*(f"aten.conv_transpose{dims}d" for dims in (1, 2, 3)))
def transposed(seen: Seen) -> Pattern:
    """Each input pixel is spread over a window of the output: the output is `stride` times as long where it is cut."""
    source, weight, out = seen.shape("input"), seen.shape("weight"), seen.result_shapes[0]
    dims, groups = len(weight) - 2, int(seen.get("groups", 1))
    if len(source) != dims + 2:
        return replicated(seen)
    strides, dilations = (_per_dim(seen.get(name), dims, 1) for name in ("stride", "dilation"))
    paddings = _per_dim(seen.get("padding"), dims, 0)
    sizes: dict[str, int] = {}
    halo: dict[str, tuple[int, int]] = {}
    whole: set[str] = set()
    space_in: list[tuple[str, ...]] = []
    space_out: list[tuple[str, ...]] = []
    for dim in range(dims):
        size, stride, label = source[2 + dim], strides[dim], f"y{dim}"
        if size > 1 and out[2 + dim] == stride * size:
            # Output rows stride*a to stride*b read input rows from a - (d(k-1) - p) / s to (stride*b - 1 + p) / s.
            reach = dilations[dim] * (weight[2 + dim] - 1) - paddings[dim]
            own = (max(0, reach // stride), max(0, (paddings[dim] - 1) // stride + 1))
            inner = (f"{label}_stride",) if stride > 1 else ()
            sizes |= {label: size, **dict.fromkeys(inner, stride)}
            halo |= {label: own} if any(own) else {}
            whole |= {*inner}
            space_in.append((label,))
            space_out.append((label, *inner))
        else:
            space_in.append((f"{label}_in",) if size > 1 else ())
            space_out.append((f"{label}_out",) if out[2 + dim] > 1 else ())
            whole |= {*space_in[-1], *space_out[-1]}
    window = labelled(weight[2:], "k")
    return _convolved(
        seen, groups, (space_in, space_out), window, sizes, halo, whole, product_space=space_in, is_transposed=True
    )


def _convolved(
    seen: Seen,
    groups: int,
    space: tuple[list[tuple[str, ...]], list[tuple[str, ...]]],
    window: Array,
    sizes: dict[str, int],
    halo: dict[str, tuple[int, int]],
    whole: set[str],
    *,
    product_space: list[tuple[str, ...]],
    is_transposed: bool = False,
) -> Pattern:
    source, out = seen.shape("input"), seen.result_shapes[0]
    factors = {"g": groups, "c": source[1] // groups, "o": out[1] // groups}

    def channels(*labels: str) -> tuple[str, ...]:
        return tuple(label for label in labels if factors[label] > 1)

    batch = ("n",) if source[0] > 1 else ()
    both = (channels("g", "c"), channels("o")) if is_transposed else (channels("g", "o"), channels("c"))
    arrays: dict[str, Array] = {
        "input": (batch, channels("g", "c"), *space[0]),
        "weight": (*both, *window),
        "bias": (channels("g", "o"),),
    }
    product = (*batch, *channels("g", "o", "c"), *labels_of(tuple(product_space)), *labels_of(window))
    names = (seen.name("input"), seen.name("weight"))
    return Pattern(
        tuple(arrays[argument] for argument in seen.call.operands),
        ((batch, channels("g", "o"), *space[1]),),
        unsplit=frozenset({*whole, *labels_of(window)}),
        contractions=(product,),
        saves=saved_factors(seen, *names),
        linear=seen.is_multilinear and not seen.has("bias"),
        halo=halo,
        sizes={**sizes, **{label: size for label, size in factors.items() if size > 1}},
    )


@rule(*(f"aten.{name}_pool{dims}d" for name in ("max", "avg") for dims in (1, 2, 3)), "aten.max_pool2d_with_indices")
def pool(seen: Seen) -> Pattern:
    """The largest or the mean of each window; a largest one is remembered by its place."""
    source, out = seen.shapes[0], seen.result_shapes[0]
    kernels = _per_dim(seen.get("kernel_size"), 1, 1)
    dims = len(kernels) if len(kernels) > 1 else int(seen.call.op.split("pool")[1][0])
    kernels = _per_dim(seen.get("kernel_size"), dims, 1)
    strides = _per_dim(seen.get("stride"), dims, 0)
    strides = [stride or kernel for stride, kernel in zip(strides, kernels, strict=True)]
    dilations = _per_dim(seen.get("dilation"), dims, 1)
    paddings = _per_dim(seen.get("padding"), dims, 0)
    front = labelled(source[: len(source) - dims], "d")
    arrays: tuple[list[tuple[str, ...]], list[tuple[str, ...]]] = (list(front), list(front))
    sizes: dict[str, int] = {}
    halo: dict[str, tuple[int, int]] = {}
    whole: set[str] = set()
    for dim in range(dims):
        inner, outer, own_sizes, own_halo, own_whole = windowed(
            source[len(front) + dim],
            out[len(front) + dim],
            kernel=kernels[dim],
            stride=strides[dim],
            padding=paddings[dim],
            dilation=dilations[dim],
            label=f"y{dim}",
        )
        arrays[0].append(inner)
        arrays[1].append(outer)
        sizes |= own_sizes
        halo |= own_halo
        whole |= own_whole
    largest = "max" in seen.call.op
    indexed = largest and len(seen.call.outputs) == 1
    return Pattern(
        (tuple(arrays[0]),),
        tuple(tuple(arrays[1]) for _ in seen.call.outputs),
        unsplit=frozenset(whole),
        saves=(*seen.call.inputs, *seen.call.outputs[1:]),
        linear=not largest and seen.is_additive,
        halo=halo,
        sizes=sizes,
        extras=(Extra("indices", tuple(arrays[1]), "int64"),) if indexed else (),
    )


@rule(*(f"aten.adaptive_{name}_pool{dims}d" for name in ("max", "avg") for dims in (1, 2, 3)))
def adaptive_pool(seen: Seen) -> Pattern:
    """Windows that fit the wanted output: equal ones where its size divides, all of space where it is 1."""
    source, out = seen.shapes[0], seen.result_shapes[0]
    dims = int(seen.call.op.split("pool")[1][0])
    largest = "max" in seen.call.op
    array, result = list(labelled(source, "d")), list(labelled(out, "d"))
    sizes: dict[str, int] = {}
    whole: set[str] = set()
    for dim in range(len(source) - dims, len(source)):
        if out[dim] == source[dim]:
            continue
        if source[dim] % out[dim] == 0:
            window = (f"w{dim}",)
            array[dim] = (*result[dim], *window)
            sizes |= {f"w{dim}": source[dim] // out[dim], **dict.fromkeys(result[dim], out[dim])}
            whole |= set(window) if largest or out[dim] > 1 else set()
        else:
            array[dim], result[dim] = (f"w{dim}",), (f"o{dim}",)
            whole |= {f"w{dim}", f"o{dim}"}
    return Pattern(
        (tuple(array),),
        tuple(tuple(result) for _ in seen.call.outputs),
        unsplit=frozenset(whole),
        saves=(*seen.call.inputs, *seen.call.outputs[1:]),
        linear=not largest and seen.is_additive,
        sizes=sizes,
    )


@rule(
    *aten(
        """
        upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d upsample_bicubic2d
        upsample_linear1d upsample_trilinear3d
        """
    ),
    "aten._upsample_nearest_exact2d",
    "aten._upsample_bilinear2d_aa",
)
def resized(seen: Seen) -> Pattern:
    """Nearest pixels, a whole number of times as many: those of each piece come from that piece. Other kinds mix
    neighbours: space stays whole."""
    source, out = seen.shapes[0], seen.result_shapes[0]
    nearest = "nearest" in seen.call.op
    array, result = list(labelled(source, "d")), list(labelled(out, "d"))
    sizes: dict[str, int] = {}
    whole: set[str] = set()
    for dim in range(2, len(source)):
        if source[dim] == out[dim]:
            continue
        if nearest and out[dim] % source[dim] == 0:
            result[dim] = (*array[dim], f"r{dim}")
            sizes |= {f"r{dim}": out[dim] // source[dim], **dict.fromkeys(array[dim], source[dim])}
            whole |= {f"r{dim}"}
        else:
            array[dim], result[dim] = labelled((source[dim],), f"s{dim}_")[0], labelled((out[dim],), f"o{dim}_")[0]
            whole |= {*array[dim], *result[dim]}
    return Pattern((tuple(array),), (tuple(result),), unsplit=frozenset(whole), linear=seen.is_additive, sizes=sizes)
