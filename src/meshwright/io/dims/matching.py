"""Which calls and values of the whole program the blocks, dims and views of the graph stand for.

Named and written is only the first block of each run; whoever runs a plan of the graph needs all of them, in the
program's own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.graph import Role
from meshwright.io.dims.carried import Carried
from meshwright.io.dims.draft import Draft
from meshwright.io.dims.naming import Naming
from meshwright.io.dims.primes import unused
from meshwright.io.dims.sections import Section
from meshwright.io.traced import BlockInstance, Factors, Program, Reading


@dataclass(frozen=True)
class Matching:
    """A named program beside its graph, whose tensors have the dims that `dims` says."""

    program: Program
    sections: Sequence[Section]
    naming: Naming
    carried: Carried
    dims: Callable[[str], tuple[str, ...]]

    def instances(self, drafts: Sequence[Draft], short: Mapping[str, Mapping[str, str]]) -> Iterator[BlockInstance]:
        """The blocks of the model in order, with the calls and values that are theirs by the names in the graph."""
        for draft in drafts:
            names = short[draft.name]
            run = draft.section.run
            outside = {
                name: self.carried.last[name]
                for name in draft.tensors
                if name in self.carried.last and name not in draft.made
            }
            given = self.carried.pairs(run)
            calls = self.program.calls
            before: dict[str, str] = {}
            for instance in range(run.count if run else 1):
                own = outside | self._counterparts(draft, instance)
                if instance:
                    own |= {name: before.get(made, made) for name, made in given.items()}
                shift = instance * run.period if run else 0
                span = range(run.start, run.start + run.period) if run else ()
                index = {calls[at].name: calls[at + shift].name for at in span}
                yield BlockInstance(
                    draft.name,
                    {names.get(name, name): index.get(call, call) for name, call in draft.calls.items()},
                    {names.get(name, name): own.get(name, name) for name in draft.tensors},
                )
                before = own

    def _counterparts(self, draft: Draft, instance: int) -> dict[str, str]:
        """Values of one block of a run by those of the first, with the tensors beside results."""
        run = draft.section.run
        if run is None or not instance:
            return {}
        own = run.counterparts(self.program.calls, instance)
        for name in draft.tensors:
            if name not in self.program.values:
                result, _, suffix = name.rpartition(".")
                own[name] = f"{own[result]}.{suffix}"
        return own

    def _spread(self) -> Iterator[tuple[str, str]]:
        """Each value of a run's later blocks, with the first block's."""
        for section in self.sections:
            if section.run:
                inside = {name for call in section.calls for name in call.outputs}
                for instance in range(1, section.run.count):
                    for ours, theirs in section.run.counterparts(self.program.calls, instance).items():
                        own = ours in inside or self.program.values[ours].role in (Role.PARAMETER, Role.BUFFER)
                        if own and ours != theirs:
                            yield ours, theirs

    def factors(self) -> dict[str, Factors]:
        """The named dims that make up each dim of each value."""
        found: dict[str, Factors] = {}
        for name in self.naming.dims:
            found[name] = self._factor(name)
        for ours, theirs in self._spread():
            found[theirs] = found[ours]
        return found

    def _factor(self, name: str) -> Factors:
        naming = self.naming
        flat = list(naming.flat(name))
        below = self.dims(naming.base(name))
        names = [below[at] if at >= 0 else "" for at in naming.positions(name)]
        for index, own in enumerate(names):
            if not own:
                names[index] = unused(flat[index], names)
        parts = iter(names)
        return tuple(tuple(next(parts) for _ in range(count)) for count in naming.groups(name))

    def readings(self) -> dict[str, Reading]:
        """The views of the whole program."""
        found = dict(self.naming.readings)
        calls = self.program.calls
        place = {call.name: index for index, call in enumerate(calls)}
        for section in self.sections:
            run = section.run
            made = {name for call in section.calls for name in call.outputs}
            own = [(name, reading) for name in made if (reading := found.get(name))]
            for name, reading in own:
                if reading.base not in made and reading.base in self.carried.last:
                    found[name] = replace(reading, base=self.carried.last[reading.base])
            before: dict[str, str] = {}
            carried = self.carried.pairs(run)
            for instance in range(1, run.count if run else 1):
                assert run is not None
                names = run.counterparts(calls, instance)
                names |= {given: before.get(result, result) for given, result in carried.items()}
                span = range(run.start, run.start + run.period)
                for name, reading in own:
                    views = [
                        calls[place[view] + instance * run.period].name if place[view] in span else view
                        for view in reading.views
                    ]
                    base = names.get(reading.base, self.carried.last.get(reading.base, reading.base))
                    found[names[name]] = Reading(base, tuple(views), reading.positions)
                before = names
        return found
