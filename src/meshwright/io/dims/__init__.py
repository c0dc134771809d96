"""Named dims for a traced program, and the operator graph that follows.

Every dim of every value starts as an *atom*. The rule of each call (`io.rules`) says which dims of its operands and
results belong together, and these are joined. A view is a factorisation: where a dim of 8192 meets 64 x 128, the atom
splits into two, everywhere it stands. Two dims of one size that nothing joins stay two. What is left is a few classes,
the named dims; within one value each name stands once, a second dim of the same class gets a prime (`tokens` and
`tokens'` of attention scores: one class in two roles).

Dim 0 of the inputs is `batch`, which no view may cut in two. Equal blocks (`io.fold`) are named once: the program is
read with each run cut down to its first block, whose result is joined with what it was given.

Left out: dims whose two factorisations do not fit into each other (12 as 2 x 6 and as 3 x 4) get names of their own
there and are not split, with a warning.

`sections`  the program with each run of equal blocks cut down to one
`atoms`     dims that are joined and split into factors
`naming`    what is known of each value once all rules have been heard
`primes`    names of which each stands once
`spelling`  the names that one operator has for its dims
`draft`     a block while it is written
`carried`   what one block of a run hands to the next
`matching`  which calls and values each block of the graph stands for
`remarks`   what could not be named or split, in words
`writer`    the graph
"""

from __future__ import annotations

from meshwright.io.dims.naming import Naming, unfit_run
from meshwright.io.dims.sections import sections_of
from meshwright.io.dims.writer import Writer
from meshwright.io.fold import folded_runs
from meshwright.io.traced import Program, Traced

__all__ = ["traced"]


def traced(program: Program, *, fold: bool = True) -> Traced:
    """The graph of a program, equal blocks folded, and how the two belong together."""
    runs = list(folded_runs(program)) if fold else []
    while True:
        sections = sections_of(program, runs)
        naming = Naming.of(program, sections)
        bad = unfit_run(naming, sections)
        if bad is None:
            return Writer(program, sections, naming).traced()
        runs.remove(bad)
