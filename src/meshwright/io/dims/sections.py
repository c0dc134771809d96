"""The program that is named: sections of calls, each run of equal blocks cut down to its first.

A section becomes a block of the graph, so that equal blocks are named and written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.io.fold import Run
from meshwright.io.traced import Call, Program


@dataclass(frozen=True)
class Section:
    """Calls in a row that become one block, and the run of which they are the first block, where they are."""

    calls: tuple[Call, ...]
    run: Run | None = None


def sections_of(program: Program, runs: Sequence[Run]) -> tuple[Section, ...]:
    """The sections of a program with these runs; what follows a run reads the first block's results."""
    sections: list[Section] = []
    renamed: dict[str, str] = {}
    place = 0

    def plain(start: int, stop: int) -> Iterator[Section]:
        if start < stop:
            yield Section(tuple(call.reading(renamed) for call in program.calls[start:stop]))

    for run in runs:
        sections += plain(place, run.start)
        sections.append(
            Section(tuple(call.reading(renamed) for call in program.calls[run.start : run.start + run.period]), run)
        )
        last = run.counterparts(program.calls, run.count - 1)
        renamed |= {last[made]: renamed.get(made, made) for _, made in run.carried}
        place = run.stop
    sections += plain(place, len(program.calls))
    return tuple(sections)


def block_names(sections: Sequence[Section]) -> list[str]:
    """`start`, `layer` (`layer1`, `layer2` where there are several runs), what lies between, `end`; `model` alone."""
    if len(sections) == 1:
        return ["layer" if sections[0].run else "model"]
    runs = sum(section.run is not None for section in sections)
    names, number, between = [], 0, 0
    for index, section in enumerate(sections):
        if section.run:
            number += 1
            names.append("layer" if runs == 1 else f"layer{number}")
        elif index == 0:
            names.append("start")
        elif index == len(sections) - 1:
            names.append("end")
        else:
            between += 1
            names.append(f"between{between}" if runs > 2 else "between")
    return names
