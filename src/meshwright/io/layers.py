"""Equal layers of a module traced once: tracing 80 layers takes 80 times as long as one, and says the same 80 times.

In each `nn.ModuleList` or `nn.Sequential` the runs of layers that are equal are looked for: the same classes
throughout, the same shapes, types and gradients of all parameters and buffers, the same other attributes, no hooks. Of
such a run the first layer is traced as it is, the second between two markers, and every later one as a single
placeholder. How the model around them treats each layer is so still traced in full: which tensors it hands in (they
must have the shapes that the second one got), and which other arguments (they must be equal). In the program each
placeholder then gives way to a copy of the second layer's calls with its own weights.

An attribute that differs, such as a layer's number, is tolerated where it is a whole number that the second layer is
not seen to use: it is replaced by a number that notices. Where any of this fails, nothing is saved and all layers are
traced (`LayersDiffer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

from meshwright.io.traced import Call, Value

#: Runs of fewer equal layers are traced in full.
MIN_EQUAL = 5

#: The placeholder's operator, and what it stands for (its argument `kind`).
BLOCK = "meshwright.block.default"
ENTER, LEAVE, PLACEHOLDER = 0, 1, 2

#: Where a tensor stands in what a layer returns.
_TENSOR = object()

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = ("_parameters", "_buffers", "_modules")


class LayersDiffer(Exception):
    """Layers that look equal are not used alike; the whole must be traced."""


class Watched(int):
    """A whole number that notices when it is used."""

    used = False


def _watch(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Watched, *others: Any) -> Any:
        self.used = True
        return plain(int.__int__(self), *others)

    return method


for _name in (
    *("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "__bool__", "__hash__", "__index__", "__float__"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__mod__", "__rmod__", "__floordiv__"),
    *("__rfloordiv__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__", "__and__", "__rand__", "__neg__"),
    *("__or__", "__xor__", "__lshift__", "__rshift__", "__str__", "__repr__", "__format__", "__divmod__", "__abs__"),
):
    setattr(Watched, _name, _watch(_name))


@dataclass
class _Run:
    """Equal layers in a row: their modules and paths, and how the second was called."""

    number: int
    layers: list[Any]
    paths: list[str]
    differing: list[tuple[Any, str]]
    signature: Any = None
    results: Any = None
    rest: list[Any] = field(default_factory=list)
    like: list[int] = field(default_factory=list)


@contextmanager
def placeholders(module: Any, torch: ModuleType) -> Iterator[dict[int, tuple[str, list[str]]]]:
    """Layers replaced while a module is traced; of each run by its number the path of its second layer and of those
    that became placeholders, in order. Empty where no layers are equal."""
    runs = list(_runs(module, torch))
    changed: list[tuple[Any, str, Any]] = []
    try:
        for run in runs:
            _define(torch)
            for owner, name in run.differing:
                changed.append((owner, name, getattr(owner, name)))
                object.__setattr__(owner, name, Watched(getattr(owner, name)))
            for position, layer in enumerate(run.layers[1:], start=1):
                object.__setattr__(layer, "forward", _replacement(run, position, torch))
        yield {run.number: (run.paths[1], run.paths[2:]) for run in runs}
        if any(getattr(owner, name).used for owner, name, _ in changed):
            raise LayersDiffer
    finally:
        for run in runs:
            for layer in run.layers[1:]:
                layer.__dict__.pop("forward", None)
        for owner, name, value in changed:
            object.__setattr__(owner, name, value)


def _runs(module: Any, torch: ModuleType) -> Iterator[_Run]:
    lists = (torch.nn.ModuleList, torch.nn.Sequential)
    number = 0
    taken: list[str] = []
    for path, owner in module.named_modules():
        if not isinstance(owner, lists) or any(path.startswith(f"{outer}.") for outer in taken):
            continue
        children = [(f"{path}.{name}" if path else name, child) for name, child in owner.named_children()]
        start = 0
        while start < len(children):
            stop = start + 1
            while stop < len(children) and _are_equal(children[start][1], children[stop][1]):
                stop += 1
            layers = [child for _, child in children[start:stop]]
            calm = len({id(layer) for layer in layers}) == len(layers) and "forward" not in layers[0].__dict__
            if stop - start >= MIN_EQUAL and calm and list(layers[0].parameters()):
                paths = [name for name, _ in children[start:stop]]
                yield _Run(number, layers, paths, list(_differing(layers)))
                taken += paths
                number += 1
            start = stop


def _are_equal(one: Any, two: Any) -> bool:
    ours, theirs = list(one.named_modules()), list(two.named_modules())
    if [(name, type(part)) for name, part in ours] != [(name, type(part)) for name, part in theirs]:
        return False
    return all(_alike(left, right) for (_, left), (_, right) in zip(ours, theirs, strict=True))


def _alike(one: Any, two: Any) -> bool:
    if any(vars(part).get(name) for part in (one, two) for name in _HOOKS):
        return False
    for name in ("_parameters", "_buffers"):
        ours, theirs = getattr(one, name), getattr(two, name)
        if list(map(_kind, ours.items())) != list(map(_kind, theirs.items())):
            return False
    ours, theirs = _attributes(one), _attributes(two)
    return ours.keys() == theirs.keys() and all(
        _same(ours[name], theirs[name]) or _both_numbers(ours[name], theirs[name]) for name in ours
    )


def _kind(item: tuple[str, Any]) -> tuple[Any, ...]:
    name, tensor = item
    return (name,) if tensor is None else (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _attributes(module: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in (*_OWN, *_HOOKS)}


def _same(one: Any, two: Any) -> bool:
    if one is two:
        return True
    if type(one) is not type(two):
        return False
    if isinstance(one, (bool, int, float, str, bytes)):
        return bool(one == two)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(_same, one, two))
    if isinstance(one, (dict, set, frozenset)) and not one and not two:
        return True
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    # Functions without state of their own, and what a framework says of a type.
    return type(one).__module__ in ("torch", "builtins") and bool(one == two)


def _both_numbers(one: Any, two: Any) -> bool:
    return type(one) is int and type(two) is int


def _differing(layers: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """The attributes of the second layer that differ among the layers."""
    for parts in zip(*(layer.modules() for layer in layers), strict=True):
        for name, value in _attributes(parts[1]).items():
            if not all(_same(value, vars(part)[name]) for part in parts):
                yield parts[1], name


def _define(torch: ModuleType) -> None:
    """The operator that marks and stands for layers; it makes tensors like some of those that it is given."""
    if hasattr(torch.ops.meshwright, "block"):
        return
    torch.library.define("meshwright::block", "(Tensor[] inputs, int[] like, int kind, int run) -> Tensor[]")

    def made(inputs: Any, like: Any, kind: int, run: int) -> Any:
        return [torch.empty_like(inputs[index]) for index in like]

    torch.library.impl("meshwright::block", "CompositeExplicitAutograd")(made)
    torch.library.register_fake("meshwright::block")(made)


def _replacement(run: _Run, position: int, torch: ModuleType) -> Callable[..., Any]:
    """What the second layer, or a later one, does instead of its forward."""
    from torch.utils import _pytree

    layer = run.layers[position]
    forward = type(layer).forward

    def called(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = _pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        rest = [leaf for leaf in leaves if not isinstance(leaf, torch.Tensor)]
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        signature = (structure, shapes, rest)
        block = torch.ops.meshwright.block
        if position == 1:
            if run.signature is not None or not tensors:
                raise LayersDiffer
            run.signature = signature
            inside = iter(block(tensors, list(range(len(tensors))), ENTER, run.number))
            leaves = [next(inside) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            inner_args, inner_kwargs = _pytree.tree_unflatten(leaves, structure)
            outcome = forward(layer, *inner_args, **inner_kwargs)
            run.rest, run.results = _pytree.tree_flatten(outcome)
            results = [leaf for leaf in run.rest if isinstance(leaf, torch.Tensor)]
            run.rest = [_TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in run.rest]
            run.like = [_like(result, shapes) for result in results]
            return filled(block(results, list(range(len(results))), LEAVE, run.number))
        known = run.signature
        if known is None or known[0] != structure or known[1] != shapes or not all(map(_same, known[2], rest)):
            raise LayersDiffer
        return filled(block(tensors, run.like, PLACEHOLDER, run.number))

    def filled(tensors: Sequence[Any]) -> Any:
        """What the layer returns, with these tensors in it."""
        given = iter(tensors)
        return _pytree.tree_unflatten([next(given) if leaf is _TENSOR else leaf for leaf in run.rest], run.results)

    return called


def _like(result: Any, shapes: Sequence[Any]) -> int:
    kind = (tuple(result.shape), result.dtype)
    if kind not in shapes:
        raise LayersDiffer
    return shapes.index(kind)


# --- the program ------------------------------------------------------------------------------------------------------


def expanded(
    calls: Sequence[Call], values: dict[str, Value], runs: Mapping[int, tuple[str, list[str]]]
) -> tuple[list[Call], dict[str, str]]:
    """The calls with copies of the second layer's in the place of placeholders and without markers; names that stood
    for others, with what they stood for. `values` gets those of the copies."""
    renamed: dict[str, str] = {}
    found: list[Call] = []
    templates: dict[int, list[Call]] = {}
    ends: dict[int, tuple[Call, Call]] = {}
    inside: dict[int, Call] = {}
    turns = dict.fromkeys(runs, 0)
    for call in calls:
        kind, number = (int(call.attributes[name]) if call.op == BLOCK else -1 for name in ("kind", "run"))
        if call.op != BLOCK:
            for entered in inside:
                templates[entered].append(call)
            found.append(call.reading(renamed))
        elif kind == ENTER:
            inside[number] = call
            templates[number] = []
            renamed |= {out: renamed.get(name, name) for out, name in zip(call.outputs, call.inputs, strict=True)}
        elif kind == LEAVE:
            ends[number] = (inside.pop(number), call)
            renamed |= {out: renamed.get(name, name) for out, name in zip(call.outputs, call.inputs, strict=True)}
        else:
            first, paths = runs[number]
            path = paths[turns[number]]
            turns[number] += 1
            mapped = _copied(call, templates[number], ends[number], (first, path), values, renamed, found)
            renamed |= mapped
    if any(turns[number] != len(paths) for number, (_, paths) in runs.items()):
        raise LayersDiffer  # a layer was left out, or called twice
    for name, value in values.items():
        if value.storage:
            beneath = renamed.get(value.storage, value.storage)
            values[name] = replace(value, storage=values[beneath].storage or beneath)
    return found, renamed


def _copied(
    call: Call,
    template: Sequence[Call],
    ends: tuple[Call, Call],
    paths: tuple[str, str],
    values: dict[str, Value],
    renamed: Mapping[str, str],
    found: list[Call],
) -> dict[str, str]:
    """Append a layer's calls; the placeholder's results by what they are."""
    enter, leave = ends
    names = dict(zip(enter.outputs, (renamed.get(name, name) for name in call.inputs), strict=True))
    outer = {renamed.get(name, name): names[out] for out, name in zip(enter.outputs, enter.inputs, strict=True)}
    for theirs, ours in outer.items():
        if values[theirs].differentiable != values[ours].differentiable:
            raise LayersDiffer

    def own(name: str) -> str:
        """The name of a thing of the second layer in this one."""
        if name == paths[0] or name.startswith(f"{paths[0]}."):
            return paths[1] + name.removeprefix(paths[0])
        raise LayersDiffer  # made within the layer but not under its name, or a weight from elsewhere

    def mapped(name: str) -> str:
        if name not in names:
            value = values[name]
            names[name] = own(name) if value.path.startswith(f"{paths[0]}.") else renamed.get(name, name)
            if names[name] not in values:
                raise LayersDiffer
        return names[name]

    for copy in template:
        for out in copy.outputs:
            names[out] = own(out)
        operands = {
            argument: mapped(given) if isinstance(given, str) else tuple(map(mapped, given))
            for argument, given in copy.operands.items()
        }
        for out in copy.outputs:
            value = values[out]
            storage = names.get(value.storage, value.storage)
            values[names[out]] = replace(value, name=names[out], storage=outer.get(storage, storage))
        found.append(
            Call(own(copy.name), copy.op, operands, tuple(names[out] for out in copy.outputs), copy.attributes)
        )
    return dict(zip(call.outputs, (mapped(name) for name in leave.inputs), strict=True))
