"""Equal blocks of a program, found by what its calls do and how they hang together, never by names.

Two steps. A *token* says of a call its operator, its settings and the shapes, types and kinds of what it reads and
makes; a tandem run of tokens (the longest stretch that repeats with some period) proposes a run of blocks. Then the
wiring is checked: what a block reads is made at the same place within it, or carried over from the same place in the
block before (the first block gets it from whoever made it), or the same for all blocks; each has weights of its own;
and nobody but the next block reads what a block makes, but for what the last one carries on. A run starts at the call
at which the fewest tensors are carried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from meshwright.graph import Role
from meshwright.io.traced import Call, Program

#: How many proposals of one stretch are checked, the longest first.
MAX_TRIES = 12


@dataclass(frozen=True)
class Run:
    """`count` equal blocks of `period` calls each, from call `start` on. `carried` pairs what the first block reads
    from outside with what it makes instead for the second."""

    start: int
    period: int
    count: int
    carried: tuple[tuple[str, str], ...]

    @property
    def stop(self) -> int:
        """The call after the last block."""
        return self.start + self.period * self.count

    def counterparts(self, calls: Sequence[Call], instance: int) -> dict[str, str]:
        """What stands in a later block where the first has a value that is its own."""
        shift = self.period * instance
        found: dict[str, str] = {}
        for index in range(self.start, self.start + self.period):
            ours, theirs = calls[index], calls[index + shift]
            found.update(zip(ours.inputs, theirs.inputs, strict=True))
            found.update(zip(ours.outputs, theirs.outputs, strict=True))
        return found


def folded_runs(program: Program) -> tuple[Run, ...]:
    """The runs of equal blocks of a program, in order; they do not overlap."""
    if len(program.calls) < 2:
        return ()
    wiring = _Wiring.of(program)
    return tuple(sorted(_runs(wiring, 0, len(program.calls)), key=lambda run: run.start))


@dataclass(frozen=True)
class _Wiring:
    """A program's calls as numbers: tokens, who makes and who reads each value."""

    program: Program
    tokens: np.ndarray[tuple[int], np.dtype[np.int64]]
    made_by: Mapping[str, int]
    readers: Mapping[str, list[int]]
    has_weights: np.ndarray[tuple[int], np.dtype[np.int64]]

    @staticmethod
    def of(program: Program) -> _Wiring:
        numbers: dict[object, int] = {}
        tokens, weights = [], []
        made_by: dict[str, int] = {}
        readers: dict[str, list[int]] = {}
        for index, call in enumerate(program.calls):
            tokens.append(numbers.setdefault(_token(call, program), len(numbers)))
            made_by.update(dict.fromkeys(call.outputs, index))
            inputs = call.inputs
            for name in inputs:
                readers.setdefault(name, []).append(index)
            weights.append(any(program.values[name].role is Role.PARAMETER for name in inputs))
        for name in program.outputs:
            readers.setdefault(name, []).append(len(program.calls))
        return _Wiring(program, np.array(tokens), made_by, readers, np.cumsum([0, *weights]))


def _token(call: Call, program: Program) -> object:
    def kind(name: str) -> object:
        value = program.values[name]
        own = value.role if value.role in (Role.PARAMETER, Role.BUFFER) else Role.ACTIVATION
        return value.shape, value.dtype, own, value.differentiable

    return (
        call.op,
        tuple(call.operands),
        tuple((key, str(value)) for key, value in call.attributes.items()),
        tuple(kind(name) for name in call.inputs),
        tuple(kind(name) for name in call.outputs),
    )


def _runs(wiring: _Wiring, start: int, stop: int) -> Iterator[Run]:
    """The best run within a stretch of calls, and those of what it leaves on both sides."""
    run = _best_run(wiring, start, stop)
    if run:
        yield from _runs(wiring, start, run.start)
        yield run
        yield from _runs(wiring, run.stop, stop)


def _best_run(wiring: _Wiring, start: int, stop: int) -> Run | None:
    proposals = []
    tokens = wiring.tokens[start:stop]
    for period in range(1, len(tokens) // 2 + 1):
        first, length = _longest(tokens[:-period] == tokens[period:])
        count = length // period + 1
        weights = wiring.has_weights[start + first + period] - wiring.has_weights[start + first]
        if count >= 2 and weights:
            proposals.append((-count * period, period, start + first, start + first + length + period))
    for _, period, begin, end in sorted(proposals)[:MAX_TRIES]:
        for candidate in _rotations(wiring, period, begin, end):
            if run := _checked(wiring, *candidate):
                return run
    return None


def _longest(equal: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[int, int]:
    """Start and length of the longest stretch of true values."""
    breaks = np.flatnonzero(~equal)
    edges = np.concatenate(([-1], breaks, [len(equal)]))
    lengths = np.diff(edges) - 1
    longest = int(np.argmax(lengths))
    return int(edges[longest]) + 1, int(lengths[longest])


def _rotations(wiring: _Wiring, period: int, begin: int, end: int) -> list[tuple[int, int, int]]:
    """Starts, periods and counts to try: many blocks first, then few tensors carried, then early; one fewer where the
    first or the last block is entangled with its neighbours."""
    found = []
    for start in range(begin, min(begin + period, end - 2 * period + 1)):
        count = (end - start) // period
        crossing = _crossing(wiring, start + period, begin)
        found.append((-count, crossing, start))
    ordered = []
    for negative, _, start in sorted(found):
        count = -negative
        ordered += [(start, period, count)]
        ordered += [(start + period, period, count - 1), (start, period, count - 1)] if count > 2 else []
        ordered += [(start + period, period, count - 2)] if count > 3 else []
    return ordered


def _crossing(wiring: _Wiring, cut: int, since: int) -> int:
    """How many values made since a call are read across a cut between calls."""
    calls = wiring.program.calls
    return sum(
        any(reader >= cut for reader in wiring.readers.get(name, ()))
        for index in range(since, cut)
        for name in calls[index].outputs
    )


def _checked(wiring: _Wiring, start: int, period: int, count: int) -> Run | None:
    """The run, if its blocks hang together as the module says."""
    carried: dict[str, str] = {}
    constant: set[str] = set()
    calls = wiring.program.calls
    before: dict[str, str] = {}
    stop = start + count * period
    for instance in range(1, count):
        mine: dict[str, str] = {}
        for index in range(start, start + period):
            other = calls[index + instance * period]
            for name, theirs in zip(calls[index].inputs, other.inputs, strict=True):
                if not _fits(wiring, (start, period, stop), (name, theirs), mine, before, carried, constant):
                    return None
            mine.update(zip(calls[index].outputs, other.outputs, strict=True))
        before = mine
    run = Run(start, period, count, tuple(carried.items()))
    return run if not constant & set(carried) and _is_closed(wiring, run) else None


def _fits(
    wiring: _Wiring,
    place: tuple[int, int, int],
    names: tuple[str, str],
    mine: dict[str, str],
    before: Mapping[str, str],
    carried: dict[str, str],
    constant: set[str],
) -> bool:
    """Whether an operand of a later block stands where the first block has its own."""
    start, period, stop = place
    name, theirs = names
    made_at = wiring.made_by.get(name, -1)
    if start <= made_at < start + period:
        return mine.get(name) == theirs
    role = wiring.program.values[name].role
    if role is Role.PARAMETER:
        own = all(start <= reader < stop for reader in wiring.readers[theirs])
        return theirs != name and own and mine.setdefault(name, theirs) == theirs
    if name == theirs:
        constant.add(name)
        return True
    if role is Role.BUFFER:
        return wiring.program.values[theirs].role is Role.BUFFER and mine.setdefault(name, theirs) == theirs
    if made_at < 0 or made_at >= start:
        return False
    if not before:  # the second block: whatever the first one makes for it
        source = wiring.made_by.get(theirs, -1)
        return start <= source < start + period and carried.setdefault(name, theirs) == theirs
    return name in carried and before.get(carried[name]) == theirs


def _is_closed(wiring: _Wiring, run: Run) -> bool:
    """Whether nobody outside a run reads more than what its last block carries on, each weight belongs to one block,
    and what the first block got is not read after the run."""
    calls = wiring.program.calls
    outputs = {made for _, made in run.carried}
    tied = {name for pair in wiring.program.tied for name in pair}
    for index in range(run.start, run.stop):
        instance, offset = divmod(index - run.start, run.period)
        ours = calls[run.start + offset].outputs
        first, next_one = run.start + instance * run.period, run.start + (instance + 1) * run.period
        for template, name in zip(ours, calls[index].outputs, strict=True):
            # Carried: into the next block; from the last one to whoever comes after.
            limit = next_one
            if template in outputs:
                limit = next_one + run.period if instance < run.count - 1 else len(calls) + 1
            if any(not first <= reader < limit for reader in wiring.readers.get(name, ())):
                return False
        for name in calls[index].inputs:
            own = name not in tied and all(first <= reader < next_one for reader in wiring.readers[name])
            if wiring.program.values[name].role is Role.PARAMETER and not own:
                return False
    return all(reader < run.stop for given, _ in run.carried for reader in wiring.readers[given])
