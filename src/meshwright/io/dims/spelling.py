"""How one operator spells its dims.

The labels of a call's pattern become named dims of the operator, and its spec is written in them: the names of the
result where it can, so that neighbours agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from meshwright.io.dims.naming import Key, Naming
from meshwright.io.dims.primes import unused
from meshwright.io.rules.pattern import Array
from meshwright.io.traced import Call


class Spelling:
    """The names that one operator has for its dims: those of its result where it can, each once."""

    def __init__(self, naming: Naming, call: Call, dims: Callable[[str], tuple[str, ...]]) -> None:
        self.naming, self.call = naming, call
        self.pattern = self.naming.patterns[call.name]
        self.by_key: dict[Key, str] = {}
        taken: set[str] = set()
        for name, array in zip(call.outputs, self.pattern.results, strict=True):
            for key, dim in zip(self.naming.keys(call, array), dims(name), strict=True):
                self._give(key, dim, taken)
        for array in (
            *self.pattern.operands,
            *(extra.array for extra in (*self.pattern.extras, *self.pattern.statistics)),
        ):
            for key, dim in zip(self.naming.keys(call, array), self.classes(array), strict=True):
                self._give(key, dim, taken)

    def _give(self, key: Key, name: str, taken: set[str]) -> None:
        if key not in self.by_key:
            self.by_key[key] = name if name not in taken else unused(name.rstrip("'"), taken)
            taken.add(self.by_key[key])

    def classes(self, array: Array) -> tuple[str, ...]:
        """The names of the classes of an array's labels."""
        own, atoms = self.naming.labels[self.call.name], self.naming.atoms
        return tuple(
            self.naming.names[leaf] for labels in array for label in labels for leaf in atoms.leaves(own[label])
        )

    def grouping(self, array: Array) -> tuple[int, ...]:
        """How many named dims make up each dim of an array."""
        own, atoms = self.naming.labels[self.call.name], self.naming.atoms
        return tuple(len(atoms.leaves(atom for label in labels for atom in own[label])) for labels in array)

    def names(self, label: str) -> tuple[str, ...]:
        """The operator's dims that a label has become."""
        own = self.naming.labels[self.call.name]
        if label not in own:
            return ()
        count = len(self.naming.atoms.leaves(own[label]))
        return tuple(self.by_key[label, index] for index in range(count) if (label, index) in self.by_key)

    def array(self, array: Array) -> tuple[str, ...]:
        """The operator's dims of an array."""
        return tuple(self.by_key[key] for key in self.naming.keys(self.call, array))

    def operand(self, index: int) -> tuple[str, ...]:
        """The operator's dims of the tensor beneath an operand."""
        name = self.call.inputs[index]
        dims = self.array(self.pattern.operands[index])
        below = {at: dim for at, dim in zip(self.naming.positions(name), dims, strict=True) if at >= 0}
        return tuple(below[at] for at in range(len(self.naming.flat(self.naming.base(name)))))


def spec(operands: Sequence[tuple[str, tuple[str, ...]]], results: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """Tensors with their dims, in the manner of an einsum.

    >>> spec([("x", ("batch", "hidden")), ("w", ("hidden", "ffn"))], [("y", ("batch", "ffn"))])
    'batch hidden, hidden ffn -> batch ffn'
    """
    return " -> ".join(", ".join(" ".join(dims) for _, dims in side) for side in (operands, results))
