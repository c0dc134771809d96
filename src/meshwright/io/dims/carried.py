"""What one block of a run hands to the next, in terms of the tensors beneath views.

The program knows the last block's results by names of their own; the graph, which writes the first block alone, has
only that block's. Whoever writes the one or matches it with the other translates here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.io.dims.naming import Naming
from meshwright.io.dims.sections import Section
from meshwright.io.fold import Run
from meshwright.io.traced import Program


@dataclass(frozen=True)
class Carried:
    """`renamed`: what a run's last block carries on, as its first block calls it; `last`: the other way round, by the
    tensors beneath."""

    naming: Naming
    renamed: Mapping[str, str]
    last: Mapping[str, str]

    @staticmethod
    def of(program: Program, sections: Sequence[Section], naming: Naming) -> Carried:
        """What the runs among the sections carry."""
        renamed: dict[str, str] = {}
        first_to_last: dict[str, str] = {}
        for section in sections:
            if section.run:
                last = section.run.counterparts(program.calls, section.run.count - 1)
                renamed |= {last[made]: made for _, made in section.run.carried}
                beneath = [naming.base(made) for _, made in section.run.carried]
                first_to_last |= {made: last[made] for made in beneath}
        return Carried(naming, renamed, first_to_last)

    def pairs(self, run: Run | None) -> dict[str, str]:
        """The tensors that a run's first block is given, each with what it makes instead for the second."""
        base = self.naming.base
        return {base(self.renamed.get(given, given)): base(made) for given, made in run.carried} if run else {}
