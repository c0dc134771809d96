"""What a reader of the graph should be told: what is not split and why, and what was folded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

from meshwright.graph import Graph
from meshwright.io.dims.draft import Draft
from meshwright.io.dims.naming import Naming
from meshwright.io.dims.sections import Section
from meshwright.io.traced import Program


def warnings_of(program: Program, sections: Sequence[Section], naming: Naming, graph: Graph) -> Iterator[str]:
    """Operators without a rule, and dims whose factors do not fit, with the work that it concerns."""
    total = graph.forward_flops(program.batch, 1)
    unknown = Counter[str]()
    repeats = {call.name: section.run.count if section.run else 1 for section in sections for call in section.calls}
    ops = {call.name: call.op for section in sections for call in section.calls}
    for name, pattern in naming.patterns.items():
        if not pattern.known and name not in naming.constants:
            unknown[ops[name]] += repeats[name]
    for op, count in sorted(unknown.items()):
        times = "once" if count == 1 else f"{count} times"
        yield (
            f"no rule for {op} ({times}): replicated, its work is done by every device; its FLOPs are not known "
            "and count as 0 %"
        )
    for name in naming.loose:
        if name in naming.constants:
            continue
        flops = _flops(naming, name) * repeats[name]
        share = f"{flops / total:.1%}" if total else "0 %"
        yield f"{name} ({ops[name]}) sees a dim in factors that do not fit: not split there ({share} of the FLOPs)"


def folded(drafts: Sequence[Draft]) -> Iterator[str]:
    """The blocks that stand for several."""
    for draft in drafts:
        run = draft.section.run
        if run:
            yield (
                f"{run.count} x {len(draft.operators)} operators: block {draft.name!r}, {run.period} calls each, "
                f"the first from {draft.section.calls[0].name}"
            )


def _flops(naming: Naming, name: str) -> int:
    own, atoms = naming.labels[name], naming.atoms
    return sum(
        2 * math.prod(atoms.sizes[leaf] for label in product for leaf in atoms.leaves(own[label]))
        for product in naming.patterns[name].contractions
    )
