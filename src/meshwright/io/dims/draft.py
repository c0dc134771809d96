"""A block of the graph while it is written, under the names of the program.

Only when all blocks stand is it known what each hands to the next, and which beginning its names can do without.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshwright.graph import Operator, Tensor
from meshwright.io.dims.sections import Section


@dataclass
class Draft:
    """A block while it is written: its operators and the tensors of its own."""

    name: str
    section: Section
    operators: list[Operator] = field(default_factory=list)
    calls: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def shortener(draft: Draft) -> dict[str, str]:
    """Names without what all calls of a run's block begin with."""
    if not draft.section.run:
        return {}
    paths = [name.split(".")[:-1] for name in draft.calls]
    shared = 0
    while all(len(path) > shared for path in paths) and len({path[shared] for path in paths}) == 1:
        shared += 1
    prefix = "".join(f"{part}." for part in (paths[0][:shared] if paths else []))
    names = [*draft.calls, *draft.tensors]
    short = {name: name.removeprefix(prefix) for name in names}
    return short if prefix and len(set(short.values())) == len(set(names)) else {}
