"""Operators that give the same numbers another shape or order: views, slices, splits, concatenations, pads.

A view moves no data and is no operator of the graph. Equal parts (of a split, of a concatenation, of a slice) are a
factor `part`, not to be split, of the dim that they make up; unequal ones are dims of their own, not to be split.
"""

from __future__ import annotations

from meshwright.io.rules.pattern import (
    Array,
    Pattern,
    Seen,
    along,
    aten,
    labelled,
    labels_of,
    parted,
    permuted,
    pointwise,
    positive,
    replicated,
    reshaped,
    rule,
)


@rule(
    *aten(
        """
        view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as ravel squeeze_copy
        unsqueeze_copy view_copy _reshape_alias atleast_1d atleast_2d
        """
    )
)
def regrouped(seen: Seen) -> Pattern:
    """Shapes of the same elements in the same order."""
    return reshaped(seen)


@rule("aten.alias", "aten.detach", "aten.contiguous", "aten.identity", "aten.detach_", "aten.requires_grad_")
def same(seen: Seen) -> Pattern:
    """Nothing happens, as far as numbers go."""
    pattern = pointwise(seen)
    return Pattern(pattern.operands, pattern.results, view=True, linear=True)


@rule("aten.permute", "aten.permute_copy")
def permute(seen: Seen) -> Pattern:
    """Dims in another order."""
    return permuted(seen, [positive(dim, seen.rank) for dim in seen.get("dims")])


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.transpose_copy")
def transpose(seen: Seen) -> Pattern:
    """Two dims change places."""
    one, two = (
        positive(seen.get(names[0], seen.get(names[1], default)), seen.rank)
        for names, default in ((("dim0", "axis0"), 0), (("dim1", "axis1"), 1))
    )
    order = list(range(seen.rank))
    order[one], order[two] = order[two], order[one]
    return permuted(seen, order)


@rule("aten.t", "aten.numpy_T", "aten.mT", "aten.matrix_H", "aten.t_copy")
def turned(seen: Seen) -> Pattern:
    """The last two dims change places (all of them, reversed, for `numpy_T`)."""
    order = list(range(seen.rank))
    if ".numpy_T" in seen.call.op:
        order.reverse()
    elif seen.rank >= 2:
        order[-1], order[-2] = order[-2], order[-1]
    return permuted(seen, order)


@rule("aten.movedim", "aten.moveaxis")
def movedim(seen: Seen) -> Pattern:
    """Dims go to new places, the others keep their order."""
    source, target = (
        [positive(dim, seen.rank) for dim in ([value] if isinstance(value, int) else value)]
        for value in (seen.get("source"), seen.get("destination"))
    )
    rest = iter([dim for dim in range(seen.rank) if dim not in source])
    placed = dict(zip(target, source, strict=True))
    return permuted(seen, [placed[dim] if dim in placed else next(rest) for dim in range(seen.rank)])


@rule("aten.expand", "aten.expand_as", "aten.broadcast_to", "aten.expand_copy")
def expand(seen: Seen) -> Pattern:
    """Dims of size 1 repeated without a copy: dims that the operand lacks."""
    pattern = pointwise(seen)
    return Pattern(pattern.operands, pattern.results, view=len(seen.call.inputs) == 1, linear=True)


@rule("aten.broadcast_tensors", "aten.meshgrid")
def broadcast_tensors(seen: Seen) -> Pattern:
    """Several tensors expanded to one shape; the grid's axes are its operands."""
    if "meshgrid" not in seen.call.op:
        return pointwise(seen)
    result = labelled(seen.result_shapes[0], "d")
    order = list(range(len(result)))
    if seen.get("indexing", "ij") == "xy" and len(order) > 1:
        order[0], order[1] = 1, 0
    return Pattern(tuple((result[dim],) for dim in order), tuple(result for _ in seen.call.outputs))


@rule("aten.repeat", "aten.tile")
def repeat(seen: Seen) -> Pattern:
    """Whole copies side by side along each dim."""
    rank = len(seen.result_shapes[0])
    shape = (1,) * (rank - seen.rank) + seen.shapes[0]
    return _copies(seen, shape, inner=False)


@rule("aten.repeat_interleave")
def repeat_interleave(seen: Seen) -> Pattern:
    """Each element several times in a row."""
    if len(seen.call.inputs) != 1 or seen.get("dim") is None:
        return replicated(seen)
    return _copies(seen, seen.shapes[0], inner=True)


def _copies(seen: Seen, shape: tuple[int, ...], inner: bool) -> Pattern:
    out = seen.result_shapes[0]
    operand: list[tuple[str, ...]] = []
    result: list[tuple[str, ...]] = []
    sizes: dict[str, int] = {}
    for dim, (before, after) in enumerate(zip(shape, out, strict=True)):
        own = (f"d{dim}",) if before > 1 else ()
        copies = (f"c{dim}",) if after > before else ()
        sizes |= dict.fromkeys(own, before) | dict.fromkeys(copies, after // before)
        operand.append(own)
        result.append((*own, *copies) if inner else (*copies, *own))
    return Pattern((tuple(operand[len(out) - seen.rank :]),), (tuple(result),), view=True, linear=True, sizes=sizes)


@rule("aten.slice", "aten.slice_copy", "aten.narrow")
def slice_of(seen: Seen) -> Pattern:
    """Part of a dim: an equal part where its start and length fit, every n-th element where the step divides."""
    dim = positive(seen.get("dim", 0), seen.rank)
    size, length = seen.shapes[0][dim], seen.result_shapes[0][dim]
    if size == length:
        return same(seen)
    step = seen.get("step", 1)
    start = seen.get("start", 0) or 0
    start = max(0, start + size if start < 0 else start)
    if step > 1 and size == step * length:
        pattern = parted(seen, dim)
        operand = list(pattern.operands[0])
        operand[dim] = operand[dim][::-1]  # the part is the inner factor
        return Pattern(
            (tuple(operand),), pattern.results, unsplit=pattern.unsplit, linear=seen.is_additive, sizes=pattern.sizes
        )
    if length and size % length == 0 and start % length == 0 and step == 1:
        pattern = parted(seen, dim)
        return Pattern(
            pattern.operands,
            pattern.results,
            unsplit=pattern.unsplit,
            linear=seen.is_additive,
            sizes=pattern.sizes,
        )
    return along(seen, dim, linear=seen.is_additive)


@rule("aten.select", "aten.select_copy")
def select(seen: Seen) -> Pattern:
    """One element of a dim."""
    dim = positive(seen.get("dim", 0), seen.rank)
    array = labelled(seen.shapes[0], "d")
    result = tuple(labels for at, labels in enumerate(array) if at != dim)
    return Pattern((array,), (result,), unsplit=frozenset(array[dim]), linear=seen.is_additive)


@rule("aten.select_scatter", "aten.slice_scatter")
def scattered(seen: Seen) -> Pattern:
    """A tensor with one element, or a slice, of a dim replaced; that dim stays whole."""
    dim = positive(seen.get("dim", 0), seen.rank)
    array = labelled(seen.shapes[0], "d")
    source = list(array)
    if "select" in seen.call.op:
        del source[dim]
    elif seen.shapes[0][dim] != seen.shapes[1][dim]:
        source[dim] = ("part",) if seen.shapes[1][dim] > 1 else ()
    arrays = (array, tuple(source))
    return Pattern(arrays, (array,), unsplit=frozenset({*array[dim], "part"}), linear=seen.is_additive)


@rule("aten.unbind")
def unbind(seen: Seen) -> Pattern:
    """Every element of a dim by itself."""
    dim = positive(seen.get("dim", 0), seen.rank)
    array = labelled(seen.shapes[0], "d")
    result = tuple(labels for at, labels in enumerate(array) if at != dim)
    return Pattern((array,), (result,) * len(seen.call.outputs), unsplit=frozenset(array[dim]), linear=seen.is_additive)


@rule("aten.stack")
def stack(seen: Seen) -> Pattern:
    """Equal tensors along a new dim."""
    out = seen.result_shapes[0]
    dim = positive(seen.get("dim", 0), len(out))
    result = list(labelled(out, "d"))
    operand = tuple(labels for at, labels in enumerate(result) if at != dim)
    return Pattern(
        (operand,) * len(seen.call.inputs), (tuple(result),), unsplit=frozenset(result[dim]), linear=seen.is_additive
    )


@rule("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.tensor_split", "aten.unsafe_split")
def split(seen: Seen) -> Pattern:
    """Parts of a dim, one after the other."""
    dim = positive(seen.get("dim", 0), seen.rank)
    return parted(seen, dim, linear=seen.is_additive)


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(seen: Seen) -> Pattern:
    """Side by side along a dim."""
    dim = positive(seen.get("dim", 0), seen.rank)
    lengths = {shape[dim] for shape in seen.shapes}
    if len(seen.call.inputs) == 1:
        return same(seen)
    if len(lengths) > 1:
        return along(seen, dim, linear=seen.is_additive)
    return parted(seen, dim, linear=seen.is_additive)


@rule("aten.constant_pad_nd", "aten.pad", "aten.reflection_pad2d", "aten.replication_pad2d", "aten.reflection_pad1d")
def pad(seen: Seen) -> Pattern:
    """Dims that grow (or shrink) are the result's own and stay whole."""
    operand = labelled(seen.shapes[0], "d")
    result: list[tuple[str, ...]] = []
    whole: set[str] = set()
    for dim, (before, after) in enumerate(zip(seen.shapes[0], seen.result_shapes[0], strict=True)):
        grown = (f"p{dim}",) if after > 1 else ()
        result.append(operand[dim] if before == after else grown)
        if before != after:
            whole |= {*operand[dim], *grown}
    zeros = seen.get("value", 0) in (0, None)
    return Pattern((operand,), (tuple(result),), unsplit=frozenset(whole), linear=zeros and seen.is_additive)


@rule("aten.flip", "aten.roll", "aten.tril", "aten.triu")
def in_place(seen: Seen) -> Pattern:
    """The numbers depend on where they stand along some dims."""
    dims = seen.get("dims")
    if dims is None or not dims:
        dims = (-1, -2) if "tri" in seen.call.op.split(".")[1] else range(seen.rank)
    return pointwise(seen, unsplit=dims, linear=seen.is_additive)


@rule("aten.pixel_shuffle", "aten.pixel_unshuffle")
def pixel_shuffle(seen: Seen) -> Pattern:
    """Channels c*r*r become c with r x r times as many pixels, or the reverse."""
    shuffles = "unshuffle" not in seen.call.op
    narrow, wide = (seen.shapes[0], seen.result_shapes[0]) if shuffles else (seen.result_shapes[0], seen.shapes[0])
    ratio = wide[-1] // narrow[-1]
    channels, height, width = wide[-3], *narrow[-2:]
    sizes = {"c": channels, "r1": ratio, "r2": ratio, "h": height, "w": width}
    front = labelled(narrow[:-3], "d")

    def array(*dims: tuple[str, ...]) -> Array:
        return (*front, *(tuple(label for label in labels if sizes[label] > 1) for labels in dims))

    many, few = array(("c", "r1", "r2"), ("h",), ("w",)), array(("c",), ("h", "r1"), ("w", "r2"))
    used = {label: size for label, size in sizes.items() if size > 1}
    return Pattern((many if shuffles else few,), (few if shuffles else many,), view=True, linear=True, sizes=used)


@rule("aten.view_as_complex", "aten.view_as_real")
def complex_view(seen: Seen) -> Pattern:
    """The last dim of size 2 as real and imaginary parts."""
    array, result = labelled(seen.shapes[0], "d"), labelled(seen.result_shapes[0], "d")
    longer = array if len(array) > len(result) else result
    return Pattern((array,), (result,), unsplit=frozenset(longer[-1]), linear=True)


@rule("aten.diagonal")
def diagonal(seen: Seen) -> Pattern:
    """The diagonal of two dims becomes the last dim."""
    dims = {positive(seen.get("dim1", 0), seen.rank), positive(seen.get("dim2", 1), seen.rank)}
    operand = labelled(seen.shapes[0], "d")
    last = ("diagonal",) if seen.result_shapes[0][-1] > 1 else ()
    result = (*(labels for dim, labels in enumerate(operand) if dim not in dims), last)
    whole = {*last, *(label for dim in dims for label in operand[dim])}
    return Pattern((operand,), (result,), unsplit=frozenset(whole), linear=seen.is_additive)


@rule("aten.unfold", "aten.as_strided", "aten.im2col", "aten.col2im")
def strided(seen: Seen) -> Pattern:
    """Overlapping views: dims that keep their size pass, counted from the front, the others stay whole."""
    operand, result = list(labelled(seen.shapes[0], "d")), list(labelled(seen.result_shapes[0], "o"))
    keep = 0
    if seen.call.op.split(".")[1] != "as_strided":
        while keep < min(len(operand), len(result)) and seen.shapes[0][keep] == seen.result_shapes[0][keep]:
            result[keep] = operand[keep]
            keep += 1
    whole = {*labels_of(tuple(operand[keep:])), *labels_of(tuple(result[keep:]))}
    return Pattern((tuple(operand),), (tuple(result),), unsplit=frozenset(whole))
