"""What a rule says of one call: which dims of its operands and results belong together.

A rule is a function of `Seen` (a call and the shapes of its values) and gives a `Pattern`: every dim of every array as
a product of *labels*, in the manner of an einsum. `io.dims` joins equal labels of all calls of a program into named
dims. Labels are names within one call; an array dim of size 1 has none (it is broadcast, or carries nothing).

A rule claims what execution must bear out: cut along any label that is not `unsplit`, each operand and result that has
the label cut in equal pieces and one that lacks it whole, the pieces computed apart put together (added up, where the
result lacks the label) equal the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from meshwright.graph import Role
from meshwright.io.traced import Call, Value
from meshwright.registry import Registry

#: The labels of each dim of an array, outermost first.
Array = tuple[tuple[str, ...], ...]

_FLOATS = ("float", "bfloat", "complex")


@dataclass(frozen=True)
class Extra:
    """A tensor that a call makes beside its results, and keeps for its backward: a mask, a mean. Called
    `{first result}.{suffix}` in the graph."""

    suffix: str
    array: Array
    dtype: str = ""  # empty: that of the first operand


@dataclass(frozen=True)
class Pattern:
    """The dims of a call; `operands` follow `Call.inputs`, `results` its outputs.

    `sizes` gives the size of each label that never makes up a dim by itself. `contractions` are the products summed
    over, 2 FLOPs an element; `saves` the values that the backward reads; `view` says that no data moves. `linear`,
    `halo`: see `graph.Operator`, the halo in elements of the operand's dim. `statistics` are sums over the first
    operand that a first operator makes and the call proper reads (BatchNorm). `hints` are readable names of labels.
    `known` is False where no rule knows the operator,
    `constant` is True where the numbers of the operands do not matter.
    """

    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    unsplit: frozenset[str] = frozenset()
    contractions: tuple[tuple[str, ...], ...] = ()
    saves: tuple[str, ...] = ()
    linear: bool = False
    halo: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    view: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)
    extras: tuple[Extra, ...] = ()
    statistics: tuple[Extra, ...] = ()
    hints: Mapping[str, str] = field(default_factory=dict)
    known: bool = True
    constant: bool = False


@dataclass(frozen=True)
class Seen:
    """A call as a rule sees it. `roles` are those of the tensors beneath: a view of a parameter is a parameter, what
    depends on nothing but constants a buffer."""

    call: Call
    values: Mapping[str, Value]
    roles: Mapping[str, Role]

    def has(self, argument: str) -> bool:
        """Whether the call has this operand."""
        return argument in self.call.operands

    def name(self, argument: str) -> str:
        """The value given as this operand (one tensor)."""
        name = self.call.operands[argument]
        assert isinstance(name, str), (self.call, argument)
        return name

    def names(self, argument: str) -> tuple[str, ...]:
        """The values of an operand that is a list of tensors; none where it is left out."""
        found = self.call.operands.get(argument, ())
        return (found,) if isinstance(found, str) else found

    def shape(self, argument: str) -> tuple[int, ...]:
        """The shape of an operand."""
        return self.values[self.name(argument)].shape

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all operands, in order."""
        return tuple(self.values[name].shape for name in self.call.inputs)

    @property
    def result_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all results, in order."""
        return tuple(self.values[name].shape for name in self.call.outputs)

    @property
    def rank(self) -> int:
        """The number of dims of the first operand."""
        return len(self.shapes[0])

    def get(self, attribute: str, default: Any = None) -> Any:
        """An attribute, or the default where it is not given."""
        return self.call.attributes.get(attribute, default)

    def trains(self, name: str) -> bool:
        """Whether a value has a gradient."""
        return self.values[name].differentiable

    def is_float(self, name: str) -> bool:
        """Whether a value holds numbers that summands can add up to."""
        return self.values[name].dtype.startswith(_FLOATS)

    @property
    def summable(self) -> tuple[str, ...]:
        """The operands that can be summands: activations of floats."""
        return tuple(name for name in self.call.inputs if self.roles[name] is Role.ACTIVATION and self.is_float(name))

    @property
    def is_additive(self) -> bool:
        """Whether a sum of its operands is linear in all of them: none is a parameter or a constant."""
        return len(self.summable) == len(self.call.inputs) > 0

    @property
    def is_multilinear(self) -> bool:
        """Whether a product of its operands is linear: all but one are fixed."""
        return len(self.summable) == 1


Rule = Callable[[Seen], Pattern]

#: The rule of each operator by its name, with or without its overload (`aten.add.Tensor`, `aten.add`, `onnx.Add`).
RULES = Registry[Rule]("operator")


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of these operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES.add(name, function)
        return function

    return register


def aten(names: str) -> tuple[str, ...]:
    """Names of ATen operators, written with blanks between.

    >>> aten("add sub")
    ('aten.add', 'aten.sub')
    """
    return tuple(f"aten.{name}" for name in names.split())


def rule_of(op: str) -> Rule | None:
    """The rule of an operator, by its full name or without its overload; None where there is none."""
    short = op.rpartition(".")[0]
    return next((RULES[name] for name in (op, short) if name in RULES), None)


# --- labels -----------------------------------------------------------------------------------------------------------


def labelled(shape: Sequence[int], prefix: str) -> Array:
    """Labels of its own for each dim of a shape.

    >>> labelled((4, 1, 5), "x")
    (('x0',), (), ('x2',))
    """
    return tuple((f"{prefix}{dim}",) if size > 1 else () for dim, size in enumerate(shape))


def spelled(letters: str, shape: Sequence[int]) -> Array:
    """Labels of a shape, one letter a dim; none where the size is 1.

    >>> spelled("bij", (2, 1, 5))
    (('b',), (), ('j',))
    """
    assert len(letters) == len(shape), (letters, shape)
    return tuple((letter,) if size > 1 else () for letter, size in zip(letters, shape, strict=True))


def broadcast(shape: Sequence[int], rank: int, prefix: str = "d") -> Array:
    """Labels of an operand that is broadcast to `rank` dims, counted from the last.

    >>> broadcast((5,), 3)
    (('d2',),)
    """
    offset = rank - len(shape)
    return tuple((f"{prefix}{dim + offset}",) if size > 1 else () for dim, size in enumerate(shape))


def labels_of(array: Array) -> tuple[str, ...]:
    """All labels of an array, in order."""
    return tuple(label for labels in array for label in labels)


def without(array: Array, dims: Iterable[int], keepdim: bool) -> Array:
    """An array's labels when some dims are summed over.

    >>> without((("a",), ("b",)), [1], keepdim=True)
    (('a',), ())
    """
    gone = set(dims)
    if keepdim:
        return tuple(() if dim in gone else labels for dim, labels in enumerate(array))
    return tuple(labels for dim, labels in enumerate(array) if dim not in gone)


def positive(dim: int, rank: int) -> int:
    """A dim counted from the front."""
    return dim + rank if dim < 0 else dim


def dims_of(value: Any, rank: int) -> tuple[int, ...]:
    """A dim or several as numbers from 0; all of them where none is given."""
    if value is None or (not isinstance(value, int) and len(value) == 0):
        return tuple(range(rank))
    return tuple(positive(dim, rank) for dim in ([value] if isinstance(value, int) else value))


# --- patterns of the common kinds -------------------------------------------------------------------------------------


def pointwise(seen: Seen, *, saves: Iterable[str] = (), linear: bool = False, unsplit: Iterable[int] = ()) -> Pattern:
    """Each element of every result is made of the elements at its place, operands broadcast; `unsplit` dims of the
    result stay whole (a softmax)."""
    shapes = (*seen.shapes, *seen.result_shapes)
    rank = max(len(shape) for shape in shapes)
    arrays = tuple(broadcast(shape, rank) for shape in shapes)
    count = len(seen.shapes)
    whole = frozenset(f"d{positive(dim, rank)}" for dim in unsplit)
    return Pattern(
        arrays[:count],
        arrays[count:],
        unsplit=whole & {label for array in arrays for label in labels_of(array)},
        saves=tuple(dict.fromkeys(saves)),
        linear=linear,
    )


def replicated(seen: Seen, known: bool = True) -> Pattern:
    """Nothing of the call can be split."""
    operands = tuple(labelled(shape, f"i{index}_") for index, shape in enumerate(seen.shapes))
    results = tuple(labelled(shape, f"o{index}_") for index, shape in enumerate(seen.result_shapes))
    whole = frozenset(label for array in (*operands, *results) for label in labels_of(array))
    return Pattern(operands, results, unsplit=whole, saves=tuple(dict.fromkeys(seen.call.inputs)), known=known)


def einsum(seen: Seen, equation: str, *, names: Sequence[str] | None = None, saves: Iterable[str] = ()) -> Pattern:
    """A product by an equation over operands in order (`"bik,bkj->bij"`); `names` picks the operands it is of, others
    follow the result's last dims (a bias)."""
    terms, result = equation.replace(" ", "").split("->")
    letters = dict(zip(names or seen.call.inputs, terms.split(","), strict=True))
    out = spelled(result, seen.result_shapes[0])
    operands = []
    for name in seen.call.inputs:
        shape = seen.values[name].shape
        own = letters.get(name, result[len(result) - len(shape) :])
        operands.append(spelled(own, shape))
    every = "".join(dict.fromkeys("".join(letters.values())))
    present = {label for array in operands for label in labels_of(array)}
    return Pattern(
        tuple(operands),
        (out,),
        contractions=(tuple(letter for letter in every if letter in present),),
        saves=tuple(saves) or saved_factors(seen, *letters),
        linear=seen.is_multilinear and len(letters) == len(seen.call.inputs),
    )


def saved_factors(seen: Seen, *names: str) -> tuple[str, ...]:
    """What the backward of a product reads: each factor, where another one has a gradient."""
    return tuple(name for name in dict.fromkeys(names) if any(seen.trains(other) for other in _others(names, name)))


def _others(names: Sequence[str], name: str) -> list[str]:
    found = list(names)
    found.remove(name)
    return found


def reduced(seen: Seen, dims: Iterable[int], keepdim: bool, *, additive: bool, saves: Iterable[str] = ()) -> Pattern:
    """The first operand with some dims summed over; where it is no sum (`additive`), those stay whole."""
    array = labelled(seen.shapes[0], "d")
    gone = tuple(dims)
    result = without(array, gone, keepdim)
    whole = frozenset(label for dim in gone for label in array[dim])
    return Pattern(
        (array, *(labelled(shape, f"i{index}_") for index, shape in enumerate(seen.shapes[1:]))),
        tuple(result for _ in seen.call.outputs),
        unsplit=frozenset() if additive else whole,
        saves=tuple(saves),
        linear=additive and seen.is_additive,
    )


def permuted(seen: Seen, order: Sequence[int]) -> Pattern:
    """A view of the first operand with its dims in another order."""
    array = labelled(seen.shapes[0], "d")
    return Pattern((array,), (tuple(array[dim] for dim in order),), view=True, linear=True)


def along(seen: Seen, dim: int, *, saves: Iterable[str] = (), linear: bool = False) -> Pattern:
    """Arrays of one rank that agree in all dims but `dim`, where each is whole with a dim of its own (an unequal
    concatenation, a slice)."""
    shapes = (*seen.shapes, *seen.result_shapes)
    rank = len(shapes[0])
    at = positive(dim, rank)
    arrays: list[Array] = []
    whole: set[str] = set()
    for index, shape in enumerate(shapes):
        array = list(labelled(shape, "d"))
        if shape[at] > 1:
            array[at] = (f"own{index}",)
            whole.add(f"own{index}")
        arrays.append(tuple(array))
    count = len(seen.shapes)
    return Pattern(
        tuple(arrays[:count]), tuple(arrays[count:]), unsplit=frozenset(whole), saves=tuple(saves), linear=linear
    )


def parted(seen: Seen, dim: int, *, linear: bool = True) -> Pattern:
    """Equal parts along `dim`: a factor `part`, not to be split, times the rest; the larger arrays have both. Where the
    parts are not equal, `along`."""
    shapes = (*seen.shapes, *seen.result_shapes)
    at = positive(dim, len(shapes[0]))
    lengths = [shape[at] for shape in shapes]
    rest = min(lengths)
    if rest == 0 or any(length % rest for length in lengths) or len(set(lengths)) > 2:
        return along(seen, dim, linear=linear)
    arrays = []
    for shape in shapes:
        array = list(labelled(shape, "d"))
        if shape[at] > 1:
            array[at] = (*(("part",) if shape[at] > rest else ()), *(("rest",) if rest > 1 else ()))
        arrays.append(tuple(array))
    count = len(seen.shapes)
    parts = max(lengths) // rest
    return Pattern(
        tuple(arrays[:count]),
        tuple(arrays[count:]),
        unsplit=frozenset({"part"} if parts > 1 else ()),
        linear=linear,
        sizes={"part": parts, "rest": rest},
    )


def reshaped(seen: Seen) -> Pattern:
    """The first operand's elements in row-major order under another shape: both shapes as products of common factors;
    where there are none (6 x 4 as 4 x 6), whole."""
    source, target = factored(seen.shapes[0], seen.result_shapes[0])
    sizes = {**source[1], **target[1]}
    whole = frozenset(label for array in (source[0], target[0]) for label in labels_of(array) if label[0] in "pq")
    others = tuple(labelled(shape, f"i{index}_") for index, shape in enumerate(seen.shapes[1:]))
    beside = {label for array in others for label in labels_of(array)}  # only its shape matters
    return Pattern((source[0], *others), (target[0],), unsplit=whole | beside, sizes=sizes, view=not whole, linear=True)


def factored(
    source: Sequence[int], target: Sequence[int]
) -> tuple[tuple[Array, dict[str, int]], tuple[Array, dict[str, int]]]:
    """Two shapes of equal products as products of common labels `f0`, `f1` ..., or `p...` and `q...` of its own in each
    where a stretch of them has no common factors. Beside each array the sizes of its labels.

    >>> [array for array, _ in factored((2, 6), (4, 3))]
    [(('f0',), ('f1', 'f2')), (('f0', 'f1'), ('f2',))]
    """
    arrays: tuple[list[list[str]], list[list[str]]] = ([[] for _ in source], [[] for _ in target])
    sizes: tuple[dict[str, int], dict[str, int]] = ({}, {})
    count = 0
    for left, right in _stretches(source, target):
        labels = _common([source[dim] for dim in left], [target[dim] for dim in right])
        if labels is None:
            for dims, shape, array, own, letter in zip(
                (left, right), (source, target), arrays, sizes, "pq", strict=True
            ):
                for dim in dims:
                    array[dim] = [f"{letter}{dim}"]
                    own[f"{letter}{dim}"] = shape[dim]
            continue
        factors, cuts = labels
        names = [f"f{count + index}" for index in range(len(factors))]
        count += len(factors)
        for dims, parts, array, own in zip((left, right), cuts, arrays, sizes, strict=True):
            for dim, (start, end) in zip(dims, parts, strict=True):
                array[dim] = names[start:end]
            own.update(zip(names, factors, strict=True))
    return tuple(  # type: ignore[return-value]
        (tuple(tuple(labels) for labels in array), own) for array, own in zip(arrays, sizes, strict=True)
    )


def _stretches(source: Sequence[int], target: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """The shortest runs of dims (those of size 1 left out) of two shapes with equal products."""
    left = [dim for dim, size in enumerate(source) if size != 1]
    right = [dim for dim, size in enumerate(target) if size != 1]
    assert math.prod(source) == math.prod(target), (source, target)
    while left and right:
        ours, theirs = [left.pop(0)], [right.pop(0)]
        products = [source[ours[0]], target[theirs[0]]]
        while products[0] != products[1]:
            if products[0] < products[1]:
                ours.append(left.pop(0))
                products[0] *= source[ours[-1]]
            else:
                theirs.append(right.pop(0))
                products[1] *= target[theirs[-1]]
        yield ours, theirs


def _common(
    source: Sequence[int], target: Sequence[int]
) -> tuple[list[int], tuple[list[tuple[int, int]], list[tuple[int, int]]]] | None:
    """Factors whose runs make up the sizes of both, and which run makes each; None where there are none."""
    strides = {math.prod(sizes[index:]) for sizes in (source, target) for index in range(len(sizes) + 1)}
    chain = sorted(strides, reverse=True)
    if any(larger % smaller for larger, smaller in pairwise(chain)):
        return None
    factors = [larger // smaller for larger, smaller in pairwise(chain)]
    place = {stride: index for index, stride in enumerate(chain)}

    def runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
        return [(place[math.prod(sizes[index:])], place[math.prod(sizes[index + 1 :])]) for index in range(len(sizes))]

    return factors, (runs(source), runs(target))


def windowed(
    size: int, out: int, *, kernel: int, stride: int, padding: int, dilation: int = 1, label: str = "y"
) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, int], dict[str, tuple[int, int]], frozenset[str]]:
    """A window sliding along a dim: labels of the input's and the output's dim, sizes, halo, and what stays whole.

    Where `size = stride * out`, pieces of the output are made of pieces of the input and a halo: output rows a to b
    read input rows `stride * a - padding` to `stride * (b - 1) - padding + dilation * (kernel - 1)`.
    """
    if out > 1 and size == stride * out:
        after = dilation * (kernel - 1) - padding - stride + 1
        halo = (padding, max(0, after))
        inner = (f"{label}_stride",) if stride > 1 else ()
        sizes = {label: out, **dict.fromkeys(inner, stride)}
        return (label, *inner), (label,), sizes, ({label: halo} if any(halo) else {}), frozenset(inner)
    source = (f"{label}_in",) if size > 1 else ()
    target = (f"{label}_out",) if out > 1 else ()
    return source, target, {}, {}, frozenset((*source, *target))
