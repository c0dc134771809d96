"""The dim rule of every operator that is understood: `RULES` by name. One file per kind; a new operator is a function
there, registered with `@rule(name)` (see `rules.pattern`). Rules of ONNX's operators come with `io.onnx`."""

from __future__ import annotations

from meshwright.io.rules import (  # noqa: F401  (they register their rules)
    attention,
    convolution,
    indexing,
    pointwise,
    products,
    recurrent,
    reductions,
    shape,
)
from meshwright.io.rules.pattern import RULES, Extra, Pattern, Rule, Seen, rule, rule_of

__all__ = ["RULES", "Extra", "Pattern", "Rule", "Seen", "rule", "rule_of"]
