"""What the rules of all calls say of the dims, roles and views of a program's values, and the names that follow.

Filled call by call (`Naming.of`), then only read. A view gets no operator: it is a reading of the value beneath it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from meshwright.graph import WORKLOAD_DIMS, Role
from meshwright.io.dims.atoms import Atoms
from meshwright.io.dims.sections import Section
from meshwright.io.fold import Run
from meshwright.io.rules import Pattern, Seen, rule_of
from meshwright.io.rules.pattern import Array, labels_of, replicated
from meshwright.io.traced import Call, Program, Reading

#: Readable names of the factors of a dim: query heads that share keys, a head's dim that rotary positions halve.
_PARTS = {"heads": ("kv_heads", "group"), "head_dim": ("halves", "half_dim")}

#: A label of a call's pattern and the number of the factor that it has become.
Key = tuple[str, int]


@dataclass
class Naming:
    """What is known of each value of the shortened program once all rules have been heard."""

    program: Program
    atoms: Atoms = field(default_factory=Atoms)
    dims: dict[str, list[list[int]]] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    patterns: dict[str, Pattern] = field(default_factory=dict)
    labels: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    hints: list[tuple[int, str]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)
    readings: dict[str, Reading] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    batch: int = -1

    @staticmethod
    def of(program: Program, sections: Sequence[Section]) -> Naming:
        """Hear the rule of each call of the sections, in order."""
        naming = Naming(program)
        naming._read_inputs()
        for section in sections:
            for call in section.calls:
                naming._read_call(call)
        for section in sections:
            for given, made in section.run.carried if section.run else ():
                for ours, theirs in zip(naming.dims[given], naming.dims[made], strict=True):
                    naming.atoms.join(ours, theirs)
        for first, second in program.tied:
            for ours, theirs in zip(naming._value_dims(first), naming._value_dims(second), strict=True):
                naming.atoms.join(ours, theirs)
        naming._read_unused()
        naming._name()
        naming._read_views(sections)
        return naming

    def _read_unused(self) -> None:
        """Parameters that no call reads have dims too."""
        read = {name for call in self.program.calls for name in call.inputs}
        for name, value in self.program.values.items():
            if value.role is Role.PARAMETER and name not in read:
                self._value_dims(name)

    def _read_inputs(self) -> None:
        batch = self.batch = self.atoms.new(self.program.batch)
        self.atoms.whole.add(batch)
        self.hints.append((batch, "batch"))
        for name in self.program.inputs:
            value = self.program.values[name]
            dims = self._value_dims(name)
            if value.shape and value.shape[0] == self.program.batch and self.program.batch > 1:
                self.atoms.join(dims[0], [batch])
            floats = value.dtype.startswith(("float", "bfloat"))
            hints = {2: ("tokens",), 3: ("tokens", "hidden"), 4: ("channels", "height", "width")}
            if len(value.shape) in hints and (floats or len(value.shape) == 2) and not (floats and len(dims) == 2):
                self.hints += [(dim[0], hint) for dim, hint in zip(dims[1:], hints[len(dims)], strict=False) if dim]

    def _value_dims(self, name: str) -> list[list[int]]:
        if name not in self.dims:
            value = self.program.values[name]
            self.dims[name] = [[self.atoms.new(size)] if size > 1 else [] for size in value.shape]
            self.roles.setdefault(name, value.role)
        return self.dims[name]

    def _read_call(self, call: Call) -> None:
        for name in (*call.inputs, *call.outputs):
            self._value_dims(name)
        seen = Seen(call, self.program.values, self.roles)
        find = rule_of(call.op)
        pattern = find(seen) if find else replicated(seen, known=False)
        assert len(pattern.operands) == len(call.inputs), (call, pattern)
        assert len(pattern.results) == len(call.outputs), (call, pattern)
        pattern = self._joined(call, pattern)
        if not pattern.known:
            self._keep_batch(call)
        self.patterns[call.name] = pattern
        fixed = all(self.roles[name] is Role.BUFFER for name in call.inputs) and not pattern.contractions
        if pattern.constant or fixed:
            self.constants.add(call.name)
            self.roles |= dict.fromkeys(call.outputs, Role.BUFFER)
        elif pattern.view:
            self.roles |= dict.fromkeys(call.outputs, self.roles[call.inputs[0]])
            if self.roles[call.inputs[0]] is Role.INPUT:
                self.roles |= dict.fromkeys(call.outputs, Role.INPUT)

    def _keep_batch(self, call: Call) -> None:
        """Of an operator that no rule knows, dim 0 of a result is the batch where it is as long and an operand's is:
        not to be split there, but of the workload's size in all that follows."""
        batch = self.atoms.leaves([self.batch])
        if not any(dims and self.atoms.leaves(dims[0]) == batch for dims in map(self._value_dims, call.inputs)):
            return
        for name in call.outputs:
            value = self.program.values[name]
            if value.shape and value.shape[0] == self.program.batch > 1:
                self.atoms.join([self.batch], self.dims[name][0])

    def _joined(self, call: Call, pattern: Pattern) -> Pattern:
        """Join the dims of a call's values; its pattern, with labels of its own for dims whose factors do not fit."""
        atoms = self.atoms
        own: dict[str, list[int]] = {}
        arrays = [*zip(call.inputs, pattern.operands, strict=True), *zip(call.outputs, pattern.results, strict=True)]
        places = [(index, dim) for index, (_, array) in enumerate(arrays) for dim, labels in enumerate(array) if labels]
        places.sort(key=lambda place: len(arrays[place[0]][1][place[1]]))
        failed: list[tuple[int, int]] = []
        for index, dim in places:
            name, array = arrays[index]
            labels, mine = array[dim], self.dims[name][dim]
            if len(labels) == 1 and labels[0] not in own:
                own[labels[0]] = mine
                continue
            for label in labels:
                if label not in own:
                    own[label] = [atoms.new(pattern.sizes[label])]
            if not atoms.join([atom for label in labels for atom in own[label]], mine):
                failed.append((index, dim))
        if failed:
            self.loose.append(call.name)
            changed = [[list(labels) for labels in array] for _, array in arrays]
            whole = set(pattern.unsplit)
            for index, dim in failed:
                fresh = f"~{index}.{dim}"
                own[fresh] = self.dims[arrays[index][0]][dim]
                whole |= {fresh, *changed[index][dim]}
                changed[index][dim] = [fresh]
            made = [tuple(tuple(labels) for labels in array) for array in changed]
            count = len(pattern.operands)
            pattern = replace(
                pattern,
                operands=tuple(made[:count]),
                results=tuple(made[count:]),
                unsplit=frozenset(whole),
                view=False,
                linear=False,
            )
        for label in {label for extra in (*pattern.extras, *pattern.statistics) for label in labels_of(extra.array)}:
            if label not in own:
                own[label] = [atoms.new(pattern.sizes[label])]
        self.labels[call.name] = own
        self.hints += [(own[label][0], hint) for label, hint in pattern.hints.items() if own.get(label)]
        return pattern

    # -- names

    def _name(self) -> None:
        """A name for each class: what the rules suggest, else its size."""
        taken: Counter[str] = Counter(WORKLOAD_DIMS)
        taken["batch"] = 0

        def give(atom: int, name: str) -> None:
            if atom not in self.names:
                taken[name] += 1
                self.names[atom] = name if taken[name] == 1 else f"{name}_{taken[name]}"

        for atom, hint in self.hints:
            leaves = self.atoms.leaves([atom])
            parts = (hint,) if len(leaves) == 1 else _PARTS.get(hint, ())
            for leaf, part in zip(leaves, parts if len(parts) == len(leaves) else (), strict=False):
                give(leaf, part)
        # What the graph shows first, so that numbers are low there.
        for name in sorted(self.dims, key=lambda name: self.roles[name] is Role.BUFFER):
            for atom in self.atoms.leaves(atom for dim in self.dims[name] for atom in dim):
                give(atom, f"d{self.atoms.sizes[atom]}")

    def flat(self, name: str) -> tuple[str, ...]:
        """The named dims of a value, each as often as it stands there."""
        return tuple(self.names[leaf] for leaf in self.atoms.leaves(atom for dim in self.dims[name] for atom in dim))

    def groups(self, name: str) -> tuple[int, ...]:
        """How many named dims make up each dim of a value."""
        return tuple(len(self.atoms.leaves(dim)) for dim in self.dims[name])

    # -- views

    def keys(self, call: Call, array: Array) -> list[Key]:
        """The labels of an array of a call as flat factors."""
        own = self.labels[call.name]
        return [
            (label, index)
            for labels in array
            for label in labels
            for index in range(len(self.atoms.leaves(own[label])))
        ]

    def is_view(self, call: Call) -> bool:
        """Whether a call only shows its first operand in another way."""
        return self.patterns[call.name].view and call.name not in self.constants

    def base(self, name: str) -> str:
        """The value beneath."""
        return self.readings[name].base if name in self.readings else name

    def positions(self, name: str) -> tuple[int, ...]:
        """Where each named dim of a value stands among those of the value beneath, -1 where it does not."""
        return self.readings[name].positions if name in self.readings else tuple(range(len(self.flat(name))))

    def _read_views(self, sections: Sequence[Section]) -> None:
        solid: set[str] = set()
        while True:
            self.readings.clear()
            for section in sections:
                for call in section.calls:
                    if self.is_view(call) and call.outputs[0] not in solid:
                        self._read_view(call)
            pairs = [pair for section in sections if section.run for pair in section.run.carried]
            changed = {name for pair in pairs for name in pair if not self.is_plain(name)} - solid
            if not changed:
                return
            solid |= changed

    def is_plain(self, name: str) -> bool:
        """Whether a value can be handed over as the value beneath it."""
        base = self.base(name)
        return self.positions(name) == tuple(range(len(self.flat(base)))) and self.roles[base] is Role.ACTIVATION

    def _read_view(self, call: Call) -> None:
        pattern, source = self.patterns[call.name], call.inputs[0]
        place = {key: index for index, key in enumerate(self.keys(call, pattern.operands[0]))}
        below = self.positions(source)
        for name, array in zip(call.outputs, pattern.results, strict=True):
            keys = self.keys(call, array)
            positions = tuple(below[place[key]] if key in place else -1 for key in keys)
            earlier = self.readings[source].views if source in self.readings else ()
            self.readings[name] = Reading(self.base(source), (*earlier, call.name), positions)


def unfit_run(naming: Naming, sections: Sequence[Section]) -> Run | None:
    """A run that hands over what is no activation, or what lies otherwise at its end than at its start."""
    for section in sections:
        for given, made in section.run.carried if section.run else ():
            if not (naming.is_plain(given) and naming.is_plain(made)):
                return section.run
            if naming.flat(naming.base(given)) != naming.flat(naming.base(made)):
                return section.run
    return None
