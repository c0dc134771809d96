"""Views, slices, joins and copies: what moves data at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from meshwright.io.rules.pattern import (
    Pattern,
    Seen,
    along,
    labelled,
    labels_of,
    parted,
    permuted,
    pointwise,
    positive,
    reshaped,
    rule,
)


@rule("onnx.Reshape", "onnx.Flatten", "onnx.Squeeze", "onnx.Unsqueeze")
def _reshaped(seen: Seen) -> Pattern:
    return reshaped(seen)


@rule("onnx.Transpose")
def _transposed(seen: Seen) -> Pattern:
    return permuted(seen, seen.get("perm") or tuple(reversed(range(seen.rank))))


@rule("onnx.Expand")
def _expanded(seen: Seen) -> Pattern:
    return replace(pointwise(seen, linear=True), view=True)


@rule("onnx.Tile")
def _tiled(seen: Seen) -> Pattern:
    """Copies one after the other: a factor of copies times the dim."""
    source, target = seen.shapes[0], seen.result_shapes[0]
    array = labelled(source, "d")
    result: list[tuple[str, ...]] = []
    sizes: dict[str, int] = {}
    for dim, (before, after) in enumerate(zip(source, target, strict=True)):
        copies = (f"copies{dim}",) if after > before else ()
        sizes.update(dict.fromkeys(copies, after // before))
        result.append((*copies, *array[dim]))
    return Pattern((array,), (tuple(result),), sizes=sizes, linear=seen.is_multilinear)


@rule("onnx.Slice")
def _sliced(seen: Seen) -> Pattern:
    """Of each dim that is cut: a factor of parts and what is in one of them, where the slice is one of equal parts;
    else whole."""
    source, target = seen.shapes[0], seen.result_shapes[0]
    axes = seen.get("axes") or tuple(range(len(seen.get("starts", ()))))
    starts = {positive(axis, len(source)): start for axis, start in zip(axes, seen.get("starts", ()), strict=False)}
    steps = {positive(axis, len(source)): step for axis, step in zip(axes, seen.get("steps", ()), strict=False)}
    return _cut(seen, source, target, starts, steps)


def _cut(
    seen: Seen, source: Sequence[int], target: Sequence[int], starts: dict[int, int], steps: dict[int, int]
) -> Pattern:
    before, after = list(labelled(source, "d")), list(labelled(target, "d"))
    whole: set[str] = set()
    sizes: dict[str, int] = {}
    for dim, (size, length) in enumerate(zip(source, target, strict=True)):
        start = starts.get(dim, 0)
        start = start + size if start < 0 else start
        step = steps.get(dim, 1)
        if size == length and step == 1:
            continue
        if step == 1 and size % length == 0 and start % length == 0:
            before[dim] = (f"part{dim}", *((f"rest{dim}",) if length > 1 else ()))
            after[dim] = (f"rest{dim}",) if length > 1 else ()
            sizes |= {f"part{dim}": size // length, f"rest{dim}": length}
            whole.add(f"part{dim}")
        elif step > 1 and size == step * length and start < step:  # every second one, as of interleaved pairs
            before[dim] = (*((f"rest{dim}",) if length > 1 else ()), f"part{dim}")
            after[dim] = (f"rest{dim}",) if length > 1 else ()
            sizes |= {f"part{dim}": step, f"rest{dim}": length}
            whole.add(f"part{dim}")
        else:
            before[dim] = (f"from{dim}",) if size > 1 else ()
            after[dim] = (f"to{dim}",) if length > 1 else ()
            whole |= {*before[dim], *after[dim]}
    used = set(labels_of((*before, *after)))
    return Pattern(
        (tuple(before),),
        (tuple(after),),
        unsplit=frozenset(whole),
        linear=seen.is_multilinear,
        sizes={label: size for label, size in sizes.items() if label in used},
    )


@rule("onnx.Split", "onnx.Concat")
def _parts(seen: Seen) -> Pattern:
    linear = len(seen.summable) == len(seen.call.inputs)
    if len(seen.call.inputs) == len(seen.call.outputs) == 1:
        return replace(pointwise(seen, linear=True), view=True)
    lengths = {shape[seen.get("axis", 0)] for shape in (seen.shapes if len(seen.shapes) > 1 else seen.result_shapes)}
    if len(lengths) > 1:
        return along(seen, seen.get("axis", 0), linear=linear)
    return parted(seen, seen.get("axis", 0), linear=linear)


@rule("onnx.Pad")
def _padded(seen: Seen) -> Pattern:
    """Dims that grow or shrink are whole; a pad by something else than zeros is no linear one."""
    source, target = seen.shapes[0], seen.result_shapes[0]
    pattern = _cut(seen, source, target, {}, {dim: 0 for dim in range(len(source)) if source[dim] != target[dim]})
    return replace(pattern, linear=pattern.linear and not seen.get("constant_value") and seen.get("mode") != "edge")


@rule("onnx.DepthToSpace")
def _depth_to_space(seen: Seen) -> Pattern:
    return _space_and_depth(seen, seen.shapes[0], seen.result_shapes[0], deep_first=True)


@rule("onnx.SpaceToDepth")
def _space_to_depth(seen: Seen) -> Pattern:
    return _space_and_depth(seen, seen.result_shapes[0], seen.shapes[0], deep_first=False)


def _space_and_depth(seen: Seen, deep: Sequence[int], wide: Sequence[int], *, deep_first: bool) -> Pattern:
    """Channels (down, across, c), in mode CRD (c, down, across), against rows (y, down) and columns (x, across); the
    block is one whole."""
    block = seen.get("blocksize")
    sizes = {"n": deep[0], "c": wide[1], "y": deep[2], "x": deep[3], "down": block, "across": block}
    channels = ("c", "down", "across") if seen.get("mode") == "CRD" else ("down", "across", "c")

    def some(*labels: str) -> tuple[str, ...]:
        return tuple(label for label in labels if sizes[label] > 1)

    arrays = [
        (some("n"), some(*channels), some("y"), some("x")),
        (some("n"), some("c"), some("y", "down"), some("x", "across")),
    ]
    before, after = arrays if deep_first else reversed(arrays)
    present = set(labels_of((*before, *after)))
    return Pattern(
        (before,),
        (after,),
        unsplit=frozenset({"down", "across"} & present),
        linear=seen.is_multilinear,
        sizes={key: size for key, size in sizes.items() if key in present},
    )


@rule("onnx.ReverseSequence")
def _reversed(seen: Seen) -> Pattern:
    """The time of each sequence is whole."""
    array = labelled(seen.shapes[0], "d")
    time, batch = array[seen.get("time_axis", 0)], array[seen.get("batch_axis", 1)]
    return Pattern((array, (batch,)), (array,), unsplit=frozenset(time), linear=False)
