"""Gathering and scattering by index, and what is ordered: the dim that is looked up in is whole, but of a table's rows
each rank may hold some (what it lacks it looks up as zeros, and the results add up)."""

from __future__ import annotations

from meshwright.graph import Role
from meshwright.io.rules.onnx.pointwise import trained
from meshwright.io.rules.pattern import Array, Pattern, Seen, labelled, labels_of, positive, rule


@rule("onnx.Gather")
def _gather(seen: Seen) -> Pattern:
    """data[..., indices, ...] at `axis`; an index that is one number selects, and there is no operand for it."""
    data = labelled(seen.shape("data"), "d")
    rank = len(data)
    axis = positive(seen.get("axis", 0), rank)
    indices = labelled(seen.shape("indices"), "i") if seen.has("indices") else ()
    result = (*data[:axis], *indices, *data[axis + 1 :])
    # Of a table of parameters each rank may hold some rows: what it lacks it looks up as zeros.
    table = seen.roles[seen.name("data")] is Role.PARAMETER and seen.has("indices")
    return Pattern(
        (data, *([indices] if seen.has("indices") else [])),
        (result,),
        unsplit=frozenset() if table else frozenset(data[axis]),
        saves=trained(seen, [seen.name("indices")] if seen.has("indices") else []),
        linear=seen.is_multilinear,
        hints={**dict.fromkeys(data[0], "vocab"), **dict.fromkeys(data[1], "hidden")} if table and rank == 2 else {},
    )


@rule("onnx.GatherElements")
def _gather_elements(seen: Seen) -> Pattern:
    data, indices, whole = _side_by_side(seen, "data", "indices")
    return Pattern((data, indices), (indices,), unsplit=whole, saves=trained(seen, [seen.name("indices")]))


@rule("onnx.ScatterElements")
def _scatter_elements(seen: Seen) -> Pattern:
    data, indices, whole = _side_by_side(seen, "data", "indices")
    updates = (indices,) if seen.has("updates") else ()
    return Pattern((data, indices, *updates), (data,), unsplit=whole, saves=trained(seen, [seen.name("indices")]))


def _side_by_side(seen: Seen, argument: str, other: str) -> tuple[Array, Array, frozenset[str]]:
    """Labels of an array and of indices into its dim `axis`: what they have alike, and what is whole."""
    source, target = seen.shape(argument), seen.shape(other)
    axis = positive(seen.get("axis", 0), len(source))
    array = labelled(source, "d")
    indices = tuple(
        labels if dim != axis and source[dim] == size else ((f"i{dim}",) if size > 1 else ())
        for dim, (labels, size) in enumerate(zip(array, target, strict=True))
    )
    common = {
        label for dim, labels in enumerate(array) if dim != axis and source[dim] == target[dim] for label in labels
    }
    return array, indices, frozenset({*labels_of(array), *labels_of(indices)} - common)


@rule("onnx.GatherND")
def _gather_nd(seen: Seen) -> Pattern:
    """Leading dims of the data are looked up in, after `batch_dims` common ones; the last dim of the indices says
    where."""
    data, indices, whole = _looked_up(seen, seen.get("batch_dims", 0))
    depth = seen.shape("indices")[-1]
    result = (*indices[:-1], *data[seen.get("batch_dims", 0) + depth :])
    return Pattern((data, indices), (result,), unsplit=whole, saves=trained(seen, [seen.name("indices")]))


@rule("onnx.ScatterND")
def _scatter_nd(seen: Seen) -> Pattern:
    data, indices, whole = _looked_up(seen, 0)
    updates = (*indices[:-1], *data[seen.shape("indices")[-1] :])
    whole |= frozenset(labels_of(indices))  # updates may fall into one place
    return Pattern((data, indices, updates), (data,), unsplit=whole, saves=trained(seen, [seen.name("indices")]))


def _looked_up(seen: Seen, batch_dims: int) -> tuple[Array, Array, frozenset[str]]:
    source, target = seen.shape("data"), seen.shape("indices")
    data = labelled(source, "d")
    indices = tuple(
        data[dim] if dim < batch_dims else ((f"i{dim}",) if size > 1 else ()) for dim, size in enumerate(target)
    )
    searched = data[batch_dims : batch_dims + target[-1]]
    return data, indices, frozenset({*labels_of(searched), *indices[-1]})


@rule("onnx.TopK")
def _top_k(seen: Seen) -> Pattern:
    """The largest along `axis`, whose results are a dim of their own."""
    array = list(labelled(seen.shapes[0], "d"))
    axis = positive(seen.get("axis", -1), len(array))
    result = list(array)
    result[axis] = ("largest",) if seen.result_shapes[0][axis] > 1 else ()
    return Pattern(
        (tuple(array),),
        tuple(tuple(result) for _ in seen.call.outputs),
        unsplit=frozenset({*array[axis], *result[axis]}),
        saves=trained(seen, seen.call.outputs[1:]),
    )


@rule("onnx.OneHot")
def _one_hot(seen: Seen) -> Pattern:
    indices = labelled(seen.shape("indices"), "i")
    at = positive(seen.get("axis", -1), len(indices) + 1)
    size = seen.result_shapes[0][at]
    classes = ("classes",) if size > 1 else ()
    others = tuple(labelled(seen.values[name].shape, "v") for name in seen.call.inputs[1:])
    result = (*indices[:at], classes, *indices[at:])
    whole = frozenset({*classes, *(label for array in others for label in labels_of(array))})
    return Pattern((indices, *others), (result,), unsplit=whole)
