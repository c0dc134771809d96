"""A batch of 1 that a file has in its shapes, made another one: where the targets of reshapes hold it, and what was
made for one sample and goes beside many."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from onnx import NodeProto, helper, numpy_helper


def rebatched(shape: Sequence[int], target: Sequence[int], batch: int, outer: dict[int, int]) -> tuple[int, ...]:
    """The target of a reshape, written for a batch of 1, of an array whose batch is `batch`.

    In row-major order as many elements stand before the batch after the reshape as before. `outer` keeps, by size of a
    dim that the batch was merged into, how many stand before it there; it is read and added to.

    >>> rebatched((16, 23, 64), (16, 4, 16), 23, {})  # tokens first: the batch goes with the 4 heads
    (16, 92, 16)
    """
    at = next((dim for dim, size in enumerate(shape) if size % batch == 0), None)
    if at is None:
        return tuple(target)
    before = math.prod(shape[:at]) * outer.get(shape[at], 1)
    one = [size // batch if dim == at else size for dim, size in enumerate(shape)]
    sizes = [one[dim] if size == 0 and dim < len(one) else size for dim, size in enumerate(target)]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and known and math.prod(one) % known == 0:
        sizes[sizes.index(-1)] = math.prod(one) // known
    if math.prod(sizes) != math.prod(one) or not sizes:
        return tuple(target)
    places = [dim for dim, size in enumerate(sizes) if size == 1 and math.prod(sizes[:dim]) == before]
    if places:
        sizes[at if at in places else places[0]] = batch
        return tuple(sizes)
    dim = max(dim for dim in range(len(sizes)) if math.prod(sizes[:dim]) <= before)
    inside = before // math.prod(sizes[:dim])
    if inside == 1 and dim == len(sizes) - 1 > 0:  # rather with the rows before than with the features
        dim, inside = dim - 1, sizes[dim - 1]
    sizes[dim] *= batch
    outer[sizes[dim]] = inside
    return tuple(sizes)


def expanded_beside(node: NodeProto, shapes: Sequence[Sequence[int]], batch: int) -> Iterator[NodeProto]:
    """Of a `Concat` of what was made for one sample and of what has the batch: the nodes that expand the first, and the
    join of them; none where all have the batch or none has."""
    ranks = {len(shape) for shape in shapes}
    if len(ranks) != 1:
        return
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0) % max(1, ranks.pop())
    wanted = [max(sizes) for sizes in zip(*shapes, strict=True)]
    names = []
    for index, (name, shape) in enumerate(zip(node.input, shapes, strict=True)):
        target = [size if dim == axis or size != 1 else wanted[dim] for dim, size in enumerate(shape)]
        if list(shape) == target or any(old != new and new != batch for old, new in zip(shape, target, strict=True)):
            names.append(name)
            continue
        made = f"{node.output[0]}.sample{index}"
        names += [f"{made}.expanded"]
        constant = numpy_helper.from_array(np.array(target, dtype=np.int64), f"{made}.shape")
        yield helper.make_node("Constant", [], [f"{made}.shape"], value=constant)
        yield helper.make_node("Expand", [name, f"{made}.shape"], names[-1:], name=f"{made}.expand")
    if names != list(node.input):
        joined = NodeProto()
        joined.CopyFrom(node)
        joined.input[:] = names
        yield joined
