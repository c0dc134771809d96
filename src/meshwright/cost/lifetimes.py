"""When what is held: the lifetimes of tensors in a step, forward and then backward, of a graph with folded blocks.

A step runs the operators one after the other and then their backwards in reverse. Of blocks in a repeated segment only
the last instance has times of its own. That is enough for the peak: at any time in an earlier instance everything that
is held then is held, by its like, at the same time in the last one too, and what the instances between keep for their
backwards besides. So times count the operators of last instances alone; what earlier instances keep is held throughout
their segment, as often as there are such instances. Nothing here knows sizes or placements.

Operator k of n runs forward at time k and backward at time 2n - 1 - k. What is made again in the backward is made when
it is first needed there, or when something else that can be made again would first need it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from meshwright.graph import Block, Graph, Role
from meshwright.sharding import hubs


class Part(StrEnum):
    """What is held: a tensor at rest or its gradient, the result of an operator that goes straight to its one reader or
    the gradient of that, or all that an operator has at hand while it runs."""

    REST = "rest"
    REST_GRADIENT = "rest_gradient"
    MADE = "made"
    MADE_GRADIENT = "made_gradient"
    FORWARD = "forward"
    BACKWARD = "backward"


class Kept(StrEnum):
    """For which way of keeping an activation a lifetime holds: either, kept for the backward, made again there."""

    EITHER = "either"
    KEPT = "kept"
    REMADE = "remade"


@dataclass(frozen=True)
class Held:
    """`count` like things, each held at the times `start` up to, not including, `stop`. `name` is a tensor's or, of
    what operators have at hand, an operator's."""

    part: Part
    block: str
    name: str
    start: int
    stop: int
    count: int = 1
    kept: Kept = Kept.EITHER


@dataclass(frozen=True)
class Lifetimes:
    """All that is held during a step beside parameters, inputs and buffers; of each time, what runs then."""

    held: tuple[Held, ...]
    moments: tuple[str, ...]

    @property
    def num_times(self) -> int:
        """Times in all."""
        return len(self.moments)


def remakable(block: Block) -> frozenset[str]:
    """The operators that can run again in the backward: what they read is kept for it, or can be made again in turn.
    What is handed over is never made again."""
    handed, saved = {*block.inputs, *block.outputs}, {name for operator in block.operators for name in operator.saves}
    found: set[str] = set()
    made: set[str] = set()
    for operator in block.operators:
        read = [name for name in operator.inputs if block.tensor[name].role is Role.ACTIVATION]
        if handed.isdisjoint(operator.outputs) and all(name in saved or name in made for name in read):
            found.add(operator.name)
            made.update(operator.outputs)
    return frozenset(found)


@dataclass
class _Value:
    """One tensor of one instance, and who has to do with it, by time on the axis that is not folded yet: when it is
    made, read, read by backwards; `again` is when it is made again, if it can be, or read by what is."""

    block: str
    name: str
    is_hub: bool
    differentiable: bool
    made: int = -1
    read: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    again: list[int] = field(default_factory=list)
    can_be_remade: bool = False


@dataclass(frozen=True)
class _Instance:
    """A block of the walk, that stands for `count` equal ones; only the last of a segment has times of its own."""

    block: str
    count: int
    is_last: bool


def lifetimes(graph: Graph, *, with_recompute: bool = False) -> Lifetimes:
    """Lifetimes of a step of a graph (see the module's docstring); those of what is made again only if asked for."""
    instances = _instances(graph)
    values, reruns, spans = _walk(graph, instances, with_recompute=with_recompute)
    total = spans[-1][1]
    end = 2 * total
    own = [time for instance, span in zip(instances, spans, strict=True) if instance.is_last for time in range(*span)]
    times = [*own, *(end - 1 - time for time in reversed(own))]
    counts = [0] * total
    named = [""] * total
    found = Counter[Held]()

    def hold(item: Held) -> None:
        # What is held at times of earlier instances is not looked at.
        start, stop = bisect_left(times, item.start), bisect_left(times, item.stop)
        if start < stop and item.count:
            found[replace(item, start=start, stop=stop, count=1)] += item.count

    for instance, span in zip(instances, spans, strict=True):
        counts[slice(*span)] = [instance.count] * (span[1] - span[0])
        for time, operator in zip(range(*span), graph.block[instance.block].operators, strict=True):
            named[time] = f"{instance.block}/{operator.name}"
            hold(Held(Part.FORWARD, instance.block, operator.name, time, time + 1))
            hold(Held(Part.BACKWARD, instance.block, operator.name, end - 1 - time, end - time))
    for value in values:
        for item in _held(value, total, counts):
            hold(item)
    for block, operator_name, time in reruns:
        hold(Held(Part.FORWARD, block, operator_name, time, time + 1, kept=Kept.REMADE))
    moments = (*(f"forward of {named[time]}" for time in own), *(f"backward of {named[time]}" for time in own[::-1]))
    return Lifetimes(tuple(replace(item, count=count) for item, count in found.items()), moments)


def _instances(graph: Graph) -> list[_Instance]:
    """Of each repeated segment the first instance, one that stands for all between, and the last."""
    found = []
    for segment in graph.segments:
        rounds = [(1, False)] * (segment.repeat > 1) + [(segment.repeat - 2, False)] * (segment.repeat > 2)
        for count, is_last in [*rounds, (1, True)]:
            found += [_Instance(block, count, is_last) for block in segment.blocks]
    return found


def _walk(
    graph: Graph, instances: Sequence[_Instance], *, with_recompute: bool
) -> tuple[list[_Value], list[tuple[str, str, int]], list[tuple[int, int]]]:
    """All values of the instances, the operators that may run again with the times at which they do, and the times of
    each instance's operators."""
    total = sum(len(graph.block[instance.block].operators) for instance in instances)
    at_rest = {block.name: set(hubs(block)) for block in graph.blocks}
    again = {block.name: remakable(block) if with_recompute else frozenset() for block in graph.blocks}
    values: list[_Value] = []
    reruns: list[tuple[str, str, int]] = []
    spans = []
    handed: list[_Value | None] = []
    now = 0
    for instance in instances:
        block = graph.block[instance.block]
        own = {name: value for name, value in zip(block.inputs, handed, strict=False) if value is not None}
        for name, tensor in block.tensor.items():
            if tensor.role is Role.ACTIVATION and name not in own:
                own[name] = _Value(block.name, name, name in at_rest[block.name], tensor.differentiable)
                values.append(own[name])
        first = now
        for operator in block.operators:
            for name in dict.fromkeys(operator.inputs):
                if name in own:
                    own[name].read.append(now)
            for name in operator.saves:
                if name in own:
                    own[name].saved.append(2 * total - 1 - now)
            for name in operator.outputs:
                own[name].made = now
            now += 1
        for operator in reversed(block.operators):
            if operator.name in again[block.name]:
                needed = [time for name in operator.outputs for time in (*own[name].saved, *own[name].again)]
                if needed:
                    reruns.append((block.name, operator.name, min(needed)))
                    for name in operator.inputs:
                        if name in own:
                            own[name].again.append(min(needed))
                    for name in operator.outputs:
                        own[name].again.append(min(needed))
                        own[name].can_be_remade = True
        spans.append((first, now))
        handed = [own.get(name) for name in block.outputs]
    for returned in handed:
        if returned is not None:
            returned.read.append(total)  # what the model returns is held until its loss is known
    return values, reruns, spans


def _held(value: _Value, num_operators: int, counts: Sequence[int]) -> Iterator[Held]:
    """How long a value and its gradient are held. A value that instances between keep exists once for each of them: it
    is the instance whose backward lets it go that says how many there are."""
    end, start = 2 * num_operators, value.made + 1
    last_read = max(value.read, default=start)
    made_backward = end - 1 - value.made if value.made >= 0 else end - 1
    # A reader's backward has the gradient at hand at its own time; from the next on it lies at rest.
    gradient = min((end - time for time in value.read), default=end)
    remade = min(value.again, default=0) if value.can_be_remade else 0

    def held(part: Part, first: int, stop: int, count: int = 1, kept: Kept = Kept.EITHER) -> Held:
        return Held(part, value.block, value.name, first, stop, count, kept)

    if not value.is_hub:
        yield held(Part.MADE, start, last_read)
        if remade:
            yield held(Part.MADE, remade, max(value.again) + 1, kept=Kept.REMADE)
        if value.differentiable:
            yield held(Part.MADE_GRADIENT, gradient, made_backward)
        return
    if value.saved:
        let_go = max((*value.saved, *value.again))
        yield held(
            Part.REST, start, let_go + 1, counts[end - 1 - max(value.saved)], Kept.KEPT if remade else Kept.EITHER
        )
        if remade:
            yield held(Part.REST, start, last_read + 1, kept=Kept.REMADE)
            yield held(Part.REST, remade, let_go + 1, kept=Kept.REMADE)
    else:
        yield held(Part.REST, start, last_read + 1)
        if remade:
            yield held(Part.REST, remade, max(value.again) + 1, kept=Kept.REMADE)
    if value.differentiable:
        yield held(Part.REST_GRADIENT, gradient, made_backward)
