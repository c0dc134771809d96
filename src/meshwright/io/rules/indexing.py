"""Look-ups by index: embeddings, gather and scatter, advanced indexing."""

from __future__ import annotations

from meshwright.io.rules.pattern import (
    Array,
    Pattern,
    Seen,
    labelled,
    labels_of,
    positive,
    replicated,
    rule,
)


@rule("aten.embedding")
def embedding(seen: Seen) -> Pattern:
    """Rows of a table: cut along the rows, each rank has zeros for those of others, and summands are left."""
    indices = labelled(seen.shape("indices"), "d")
    width = ("w",) if seen.shape("weight")[1] > 1 else ()
    rows = ("v",) if seen.shape("weight")[0] > 1 else ()
    arrays = {"weight": (rows, width), "indices": indices}
    return Pattern(
        tuple(arrays[argument] for argument in seen.call.operands),
        ((*indices, width),),
        saves=(seen.name("indices"),),
        linear=seen.is_multilinear,
        hints={"v": "vocab", "w": "hidden"},
    )


@rule("aten.embedding_bag", "aten._embedding_bag", "aten._embedding_bag_forward_only")
def embedding_bag(seen: Seen) -> Pattern:
    """Sums of rows of a table, a bag each; bags need not be equal, so that only the table is cut: along its width, and
    where rows are added up (mode 0) along the rows."""
    whole = replicated(seen)
    operands = list(whole.operands)
    operands[0] = (("v",), ("w",)) if min(seen.shape("weight")) > 1 else operands[0]
    results = list(whole.results)
    results[0] = (results[0][0], operands[0][1])
    every = {label for array in (*operands, *results) for label in labels_of(array)}
    free = {"w"} | ({"v"} if int(seen.get("mode", 0)) == 0 and len(seen.call.outputs) >= 1 else set())
    kept = [seen.name(name) for name in ("indices", "offsets", "per_sample_weights") if seen.has(name)]
    return Pattern(
        tuple(operands),
        tuple(results),
        unsplit=frozenset(every - free),
        saves=(*kept, *seen.call.outputs[1:]),
        hints={"v": "rows", "w": "width"},
    )


@rule("aten.index_select")
def index_select(seen: Seen) -> Pattern:
    """Some elements of a dim, by one list of indices."""
    dim = positive(seen.get("dim", 0), seen.rank)
    array = labelled(seen.shapes[0], "d")
    index = labelled(seen.shape("index"), "i")
    result = tuple((index[0] if index else ()) if at == dim else labels for at, labels in enumerate(array))
    return Pattern(
        (array, index),
        (result,),
        unsplit=frozenset(array[dim]),
        saves=(seen.name("index"),),
        linear=seen.is_multilinear,
    )


@rule("aten.index", "aten._unsafe_index")
def index(seen: Seen) -> Pattern:
    """Advanced indexing: the dims of the indices, broadcast, take the place of those that they index; these stay
    whole."""
    present = seen.get("indices_present") or (True,) * len(seen.names("indices"))
    shapes = [seen.values[name].shape for name in seen.names("indices")]
    if any(seen.values[name].dtype == "bool" for name in seen.names("indices")):
        return replicated(seen)
    array = labelled(seen.shapes[0], "d")
    indexed = [dim for dim, there in enumerate(present) if there]
    rank = max(len(shape) for shape in shapes)
    offset = {len(shape): rank - len(shape) for shape in shapes}
    indices = [
        tuple((f"i{dim + offset[len(shape)]}",) if size > 1 else () for dim, size in enumerate(shape))
        for shape in shapes
    ]
    joint = tuple((f"i{dim}",) if any((f"i{dim}",) in found for found in indices) else () for dim in range(rank))
    rest = [dim for dim in range(seen.rank) if dim not in indexed]
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    before = [dim for dim in rest if dim < indexed[0]] if together else []
    result: Array = (
        *(array[dim] for dim in before),
        *joint,
        *(array[dim] for dim in rest if dim not in before),
    )
    return Pattern(
        (array, *indices),
        (result,),
        unsplit=frozenset(label for dim in indexed for label in array[dim]),
        saves=seen.names("indices"),
        linear=seen.is_multilinear,
    )


@rule("aten.gather", "aten.take_along_dim")
def gather(seen: Seen) -> Pattern:
    """Along one dim by indices of the same rank; the other dims pass where they are as long in both."""
    given = seen.get("dim", 0)
    if given is None or len(seen.shape("index" if seen.has("index") else "indices")) != seen.rank:
        return replicated(seen)
    operand, index_array, whole = _paired(seen.shapes[0], seen.result_shapes[0], positive(given, seen.rank))
    whole -= set(index_array[positive(given, seen.rank)])
    return Pattern(
        (operand, index_array),
        (index_array,),
        unsplit=frozenset(whole),
        saves=(seen.call.inputs[1],),
        linear=seen.is_multilinear,
    )


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(seen: Seen) -> Pattern:
    """Along one dim by indices of the same rank; that dim stays whole, the others pass where they are as long."""
    dim = positive(seen.get("dim", 0), seen.rank)
    operand, index_array, whole = _paired(seen.shapes[0], seen.shape("index"), dim)
    arrays = {"self": operand, "index": index_array}
    if seen.has("src"):
        # A longer source is read only as far as the index goes: its pieces are not those of the index.
        source = list(labelled(seen.shape("src"), "s"))
        for at, (own, other) in enumerate(zip(seen.shape("src"), seen.shape("index"), strict=True)):
            if own == other:
                source[at] = index_array[at]
            else:
                whole |= {*source[at], *index_array[at], *operand[at]}
        arrays["src"] = tuple(source)
    return Pattern(
        tuple(arrays.get(argument, ()) for argument in seen.call.operands),
        (operand,),
        unsplit=frozenset(whole),
        saves=(seen.name("index"),),
    )


def _paired(shape: tuple[int, ...], other: tuple[int, ...], dim: int) -> tuple[Array, Array, set[str]]:
    """Labels of two arrays that share the dims of one size, but for `dim`; and those that stay whole."""
    one, two = list(labelled(shape, "d")), list(labelled(other, "i"))
    whole = {*one[dim], *two[dim]}
    for at in range(len(one)):
        if at != dim and shape[at] == other[at]:
            two[at] = one[at]
        elif at != dim:
            whole |= {*one[at], *two[at]}
    return tuple(one), tuple(two), whole


@rule("aten.index_add", "aten.index_copy", "aten.index_fill")
def index_add(seen: Seen) -> Pattern:
    """Rows added to (or put in the place of) those of a dim by index; that dim stays whole."""
    dim = positive(seen.get("dim", 0), seen.rank)
    array = labelled(seen.shape("self"), "d")
    rows = labelled(seen.shape("index"), "n")
    source = tuple((rows[0] if rows else ()) if at == dim else labels for at, labels in enumerate(array))
    arrays = {"self": array, "index": rows, "source": source, "value": ()}
    return Pattern(
        tuple(arrays[argument] for argument in seen.call.operands),
        (array,),
        unsplit=frozenset({*array[dim], *labels_of(rows)}),
        saves=(seen.name("index"),),
    )


@rule("aten.index_put", "aten._unsafe_index_put")
def index_put(seen: Seen) -> Pattern:
    """Values put where indices say: dims that are not indexed pass, the others stay whole."""
    present = seen.get("indices_present") or (True,) * len(seen.names("indices"))
    array = labelled(seen.shape("self"), "d")
    indexed = [dim for dim, there in enumerate(present) if there]
    rest = [dim for dim in range(len(array)) if dim not in indexed]
    operands: list[Array] = []
    for position, (name, shape) in enumerate(zip(seen.call.inputs, seen.shapes, strict=True)):
        if position == 0:
            operands.append(array)
        elif name in seen.names("indices"):
            operands.append(labelled(shape, f"i{position}_"))
        else:
            operands.append(labelled(shape, "v"))
    tail = [dim for dim in rest if indexed and dim > indexed[-1]]
    values = list(operands[-1])
    for back, dim in enumerate(reversed(tail), start=1):
        if back <= len(values) and seen.shapes[-1][-back] == seen.shape("self")[dim]:
            values[-back] = array[dim]
    operands[-1] = tuple(values)
    every = {label for own in operands for label in labels_of(own)}
    free = {label for dim in tail for label in array[dim] if array[dim] in values or len(values) == 0}
    return Pattern(tuple(operands), (array,), unsplit=frozenset(every - free), saves=seen.names("indices"))


@rule("aten.one_hot")
def one_hot(seen: Seen) -> Pattern:
    """A new last dim of classes."""
    array = labelled(seen.shapes[0], "d")
    result = (*array, ("classes",) if seen.result_shapes[0][-1] > 1 else ())
    return Pattern((array,), (result,), unsplit=frozenset({"classes"}))


@rule("aten.masked_scatter", "aten.bincount", "aten.histc", "aten.nonzero", "aten.unique_dim", "aten.masked_select")
def by_data(seen: Seen) -> Pattern:
    """What goes where depends on all of the numbers."""
    return replicated(seen)


@rule("aten.grid_sampler", "aten.grid_sampler_2d")
def grid_sampler(seen: Seen) -> Pattern:
    """Pixels at given places: batch and channels pass, and the places; the image stays whole."""
    image, grid = seen.shapes
    operands = (
        (("n",), ("c",), ("y",), ("x",)),
        (("n",), ("h",), ("w",), ("two",)),
    )
    arrays = tuple(
        tuple(labels if size > 1 else () for labels, size in zip(array, shape, strict=True))
        for array, shape in zip(operands, (image, grid), strict=True)
    )
    out = tuple(
        labels if size > 1 else ()
        for labels, size in zip((("n",), ("c",), ("h",), ("w",)), seen.result_shapes[0], strict=True)
    )
    return Pattern(arrays, (out,), unsplit=frozenset({"y", "x", "two"}), saves=seen.call.inputs)
