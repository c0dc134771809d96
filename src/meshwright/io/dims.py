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
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from meshwright.graph import WORKLOAD_DIMS, Block, Graph, Operator, Role, Segment, Tensor
from meshwright.io.fold import Run, folded_runs
from meshwright.io.rules import Pattern, Seen, rule_of
from meshwright.io.rules.pattern import Array, Extra, labels_of, replicated
from meshwright.io.traced import BlockInstance, Call, Factors, Program, Reading, Traced

#: Readable names of the factors of a dim: query heads that share keys, a head's dim that rotary positions halve.
_PARTS = {"heads": ("kv_heads", "group"), "head_dim": ("halves", "half_dim")}

#: A label of a call's pattern and the number of the factor that it has become.
Key = tuple[str, int]


def traced(program: Program, *, fold: bool = True) -> Traced:
    """The graph of a program, equal blocks folded, and how the two belong together."""
    runs = list(folded_runs(program)) if fold else []
    while True:
        sections = _sections(program, runs)
        naming = _Naming.of(program, sections)
        bad = _unfit(naming, sections)
        if bad is None:
            return _Writer(program, sections, naming).traced()
        runs.remove(bad)


# --- sections: the program with each run cut down to one block --------------------------------------------------------


@dataclass(frozen=True)
class _Section:
    """Calls in a row that become one block, and the run of which they are the first block, where they are."""

    calls: tuple[Call, ...]
    run: Run | None = None


def _sections(program: Program, runs: Sequence[Run]) -> tuple[_Section, ...]:
    sections: list[_Section] = []
    renamed: dict[str, str] = {}
    place = 0

    def plain(start: int, stop: int) -> Iterator[_Section]:
        if start < stop:
            yield _Section(tuple(call.reading(renamed) for call in program.calls[start:stop]))

    for run in runs:
        sections += plain(place, run.start)
        sections.append(
            _Section(tuple(call.reading(renamed) for call in program.calls[run.start : run.start + run.period]), run)
        )
        last = run.counterparts(program.calls, run.count - 1)
        renamed |= {last[made]: renamed.get(made, made) for _, made in run.carried}
        place = run.stop
    sections += plain(place, len(program.calls))
    return tuple(sections)


# --- atoms ------------------------------------------------------------------------------------------------------------


class _Atoms:
    """Dims that are joined with each other and split into factors (union-find)."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.links: list[int | tuple[int, int] | None] = []
        self.whole: set[int] = set()

    def new(self, size: int) -> int:
        """A new atom."""
        self.sizes.append(size)
        self.links.append(None)
        return len(self.sizes) - 1

    def leaves(self, atoms: Iterable[int]) -> list[int]:
        """What the atoms have become, outermost factor first."""
        found: list[int] = []
        stack = list(atoms)[::-1]
        while stack:
            atom = stack.pop()
            link = self.links[atom]
            while isinstance(link, int):
                following = self.links[link]
                if isinstance(following, int):
                    self.links[atom] = following
                atom, link = link, following
            if link is None:
                found.append(atom)
            else:
                stack += link[::-1]
        return found

    def join(self, ours: Sequence[int], theirs: Sequence[int]) -> bool:
        """Say that two products of atoms are one dim; whether their factors fit into each other."""
        left, right = self.leaves(ours)[::-1], self.leaves(theirs)[::-1]
        while left and right:
            one, *more = self.leaves([left.pop()])
            two, *others = self.leaves([right.pop()])
            left += more[::-1]
            right += others[::-1]
            if one == two:
                continue
            if self.sizes[one] == self.sizes[two]:
                self.links[two] = one
                if two in self.whole:
                    self.whole.add(one)
                continue
            if self.sizes[one] < self.sizes[two]:
                one, two, left, right = two, one, right, left
            if self.sizes[one] % self.sizes[two] or one in self.whole:
                return False
            rest = self.new(self.sizes[one] // self.sizes[two])
            self.links[one] = (two, rest)
            left.append(rest)
        return not left and not right


@dataclass
class _Naming:
    """What is known of each value of the shortened program once all rules have been heard."""

    program: Program
    atoms: _Atoms = field(default_factory=_Atoms)
    dims: dict[str, list[list[int]]] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    patterns: dict[str, Pattern] = field(default_factory=dict)
    labels: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    hints: list[tuple[int, str]] = field(default_factory=list)
    loose: list[str] = field(default_factory=list)
    constants: set[str] = field(default_factory=set)
    readings: dict[str, Reading] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    @staticmethod
    def of(program: Program, sections: Sequence[_Section]) -> _Naming:
        naming = _Naming(program)
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
        batch = self.atoms.new(self.program.batch)
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
        self.patterns[call.name] = pattern
        fixed = all(self.roles[name] is Role.BUFFER for name in call.inputs) and not pattern.contractions
        if pattern.constant or fixed:
            self.constants.add(call.name)
            self.roles |= dict.fromkeys(call.outputs, Role.BUFFER)
        elif pattern.view:
            self.roles |= dict.fromkeys(call.outputs, self.roles[call.inputs[0]])
            if self.roles[call.inputs[0]] is Role.INPUT:
                self.roles |= dict.fromkeys(call.outputs, Role.INPUT)

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

    def _read_views(self, sections: Sequence[_Section]) -> None:
        solid: set[str] = set()
        while True:
            self.readings.clear()
            for section in sections:
                for call in section.calls:
                    if self.is_view(call) and call.outputs[0] not in solid:
                        self._read_view(call)
            pairs = [pair for section in sections if section.run for pair in section.run.carried]
            changed = {name for pair in pairs for name in pair if not self._is_plain(name)} - solid
            if not changed:
                return
            solid |= changed

    def _is_plain(self, name: str) -> bool:
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


def _unfit(naming: _Naming, sections: Sequence[_Section]) -> Run | None:
    """A run that hands over what is no activation, or what lies otherwise at its end than at its start."""
    for section in sections:
        for given, made in section.run.carried if section.run else ():
            if not (naming._is_plain(given) and naming._is_plain(made)):
                return section.run
            if naming.flat(naming.base(given)) != naming.flat(naming.base(made)):
                return section.run
    return None


# --- the graph --------------------------------------------------------------------------------------------------------


@dataclass
class _Draft:
    """A block while it is written: its operators and the tensors of its own."""

    name: str
    section: _Section
    operators: list[Operator] = field(default_factory=list)
    calls: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    needed: set[str] = field(default_factory=set)
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


class _Writer:
    """Writes the graph of a named program."""

    def __init__(self, program: Program, sections: Sequence[_Section], naming: _Naming) -> None:
        self.program, self.sections, self.naming = program, sections, naming
        self.compute = _main_dtype(program)
        self.primed: dict[str, tuple[str, ...]] = {}
        self.renamed: dict[str, str] = {}  # what a run's last block carries on, as its first block calls it
        self.last: dict[str, str] = {}  # and the other way round, by the tensors beneath
        for section in sections:
            if section.run:
                last = section.run.counterparts(program.calls, section.run.count - 1)
                self.renamed |= {last[made]: made for _, made in section.run.carried}
                beneath = [naming.base(made) for _, made in section.run.carried]
                self.last |= {made: last[made] for made in beneath}

    def traced(self) -> Traced:
        drafts = [
            self._draft(name, section) for name, section in zip(_block_names(self.sections), self.sections, strict=True)
        ]
        self._hand_over(drafts)
        self._add_unused(drafts)
        short = {draft.name: _shortener(draft) for draft in drafts}
        blocks = tuple(self._block(draft, short[draft.name]) for draft in drafts)
        sizes = {
            dim: self.sizes[dim.rstrip("'")] for block in blocks for tensor in block.tensors for dim in tensor.dims
        }
        graph = Graph(
            name=self.program.name,
            dims={dim: size for dim, size in sizes.items() if dim not in WORKLOAD_DIMS},
            blocks=blocks,
            segments=tuple(
                Segment((draft.name,), draft.section.run.count if draft.section.run else 1) for draft in drafts
            ),
            tied=self._tied(drafts, short),
        )
        return Traced(
            program=self.program,
            graph=graph,
            instances=tuple(self._instances(drafts, short)),
            factors=self._factors(),
            readings=self._readings(),
            warnings=tuple(self._warnings(graph)),
            folded=tuple(self._folded(drafts)),
        )

    # -- operators

    def dims(self, name: str) -> tuple[str, ...]:
        """The dims of a base tensor, each name once."""
        if name not in self.primed:
            self.primed[name] = _primed(self.naming.flat(name))
        return self.primed[name]

    def _draft(self, name: str, section: _Section) -> _Draft:
        draft = _Draft(name, section)
        for call in section.calls:
            if call.name in self.naming.constants or call.outputs[0] in self.naming.readings:
                continue
            self._write(draft, call)
        return draft

    def _write(self, draft: _Draft, call: Call) -> None:
        naming, pattern = self.naming, self.naming.patterns[call.name]
        spelling = _Spelling(self, call)
        trained = any(self.program.values[name].differentiable for name in call.outputs)
        outputs = [(name, array) for name, array in zip(call.outputs, pattern.results, strict=True)]
        for name, _ in outputs:
            self._add(draft, name)
            draft.made.add(name)
        saves = [naming.base(name) for name in pattern.saves] if trained else []
        statistics = self._extras(draft, call, pattern.statistics, spelling)
        if statistics:
            self._write_statistics(draft, call, statistics, spelling)
        extras = self._extras(draft, call, pattern.extras, spelling) if trained else []
        saves += [name for name, _ in extras]
        operands = [
            *((naming.base(name), spelling.operand(index)) for index, name in enumerate(call.inputs)),
            *((name, spelling.array(array)) for name, array in statistics),
        ]
        results = [(name, spelling.array(array)) for name, array in (*outputs, *extras)]
        for name, _ in operands:
            self._add(draft, name)
        used = {dim for _, dims in (*operands, *results) for dim in dims}
        whole = [name for label in pattern.unsplit for name in spelling.names(label) if name in used]
        whole += [name for label in pattern.halo for name in spelling.names(label) if len(spelling.names(label)) > 1]
        draft.operators.append(
            Operator(
                name=call.name,
                kind=call.op.split(".")[1] if "." in call.op else call.op,
                spec=_spec(operands, results),
                inputs=tuple(name for name, _ in operands),
                outputs=tuple(name for name, _ in results),
                unsplit=tuple(sorted(set(whole))),
                contractions=tuple(
                    " ".join(name for label in product for name in spelling.names(label) if name in used)
                    for product in pattern.contractions
                ),
                saves=tuple(dict.fromkeys(saves)),
                attributes={"causal": True} if call.attributes.get("is_causal") else {},
                linear=pattern.linear,
                halo={
                    spelling.names(label)[0]: reach
                    for label, reach in pattern.halo.items()
                    if len(spelling.names(label)) == 1
                },
            )
        )
        draft.calls[call.name] = call.name

    def _write_statistics(
        self, draft: _Draft, call: Call, statistics: list[tuple[str, Array]], spelling: _Spelling
    ) -> None:
        operand = (self.naming.base(call.inputs[0]), spelling.operand(0))
        results = [(name, spelling.array(array)) for name, array in statistics]
        draft.operators.append(
            Operator(
                name=f"{call.name}.statistics",
                kind="statistics",
                spec=_spec([operand], results),
                inputs=(operand[0],),
                outputs=tuple(name for name, _ in results),
                saves=(operand[0],) if self.program.values[call.outputs[0]].differentiable else (),
            )
        )
        draft.calls[f"{call.name}.statistics"] = call.name

    def _extras(
        self, draft: _Draft, call: Call, extras: Sequence[Extra], spelling: _Spelling
    ) -> list[tuple[str, Array]]:
        found = []
        for extra in extras:
            name = f"{call.outputs[0]}.{extra.suffix}"
            dtype = self._dtype(extra.dtype or self.program.values[call.inputs[0]].dtype)
            dims = _primed(spelling.classes(extra.array))
            trained = extra in self.naming.patterns[call.name].statistics
            draft.tensors[name] = Tensor(
                name, dims, dtype=dtype, differentiable=trained, groups=_groups(spelling.grouping(extra.array))
            )
            draft.made.add(name)
            self.primed[name] = dims
            self.naming.roles[name] = Role.ACTIVATION
            found.append((name, extra.array))
        return found

    def _add(self, draft: _Draft, name: str) -> None:
        """Give a block a tensor; one that is made before it comes in."""
        role = self.naming.roles[name]
        if role is Role.ACTIVATION and name not in draft.made:
            draft.needed.add(name)
        if name in draft.tensors:
            return
        value = self.program.values[name]
        draft.tensors[name] = Tensor(
            name,
            self.dims(name),
            role,
            self._dtype(value.dtype),
            value.differentiable,
            _groups(self.naming.groups(name)),
        )

    def _dtype(self, dtype: str) -> str:
        return "compute" if dtype == self.compute else dtype

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The size of each named dim."""
        return {name: self.naming.atoms.sizes[atom] for atom, name in self.naming.names.items()}

    # -- blocks

    def _hand_over(self, drafts: Sequence[_Draft]) -> None:
        """What each block gives the next: all that any later one needs, by position."""
        base = self.naming.base
        results = [base(self.renamed.get(name, name)) for name in self.program.outputs]
        later = {name for name in results if self.naming.roles[name] is Role.ACTIVATION}
        wanted: list[set[str]] = []
        for draft in reversed(drafts):
            wanted.insert(0, set(later))
            pairs = self._carried(draft)
            later = (later - draft.made) | draft.needed | set(pairs)
            if draft.section.run:
                later -= set(pairs.values())
        handed: tuple[str, ...] = ()
        for index, draft in enumerate(drafts):
            draft.inputs = handed
            pairs = self._carried(draft)
            if draft.section.run:
                handed = tuple(pairs.get(name, name) for name in handed)
            else:
                first = self._carried(drafts[index + 1]) if index + 1 < len(drafts) else {}
                order = [*first, *handed, *draft.tensors]
                handed = tuple(dict.fromkeys(name for name in order if name in wanted[index]))
            draft.outputs = handed
            for name in (*draft.inputs, *draft.outputs):
                if name not in draft.tensors:
                    self._pass(draft, name, drafts)

    def _carried(self, draft: _Draft) -> dict[str, str]:
        run, base = draft.section.run, self.naming.base
        return {base(self.renamed.get(given, given)): base(made) for given, made in run.carried} if run else {}

    def _pass(self, draft: _Draft, name: str, drafts: Sequence[_Draft]) -> None:
        """A tensor that goes through a block untouched."""
        draft.tensors[name] = next(other.tensors[name] for other in drafts if name in other.tensors)

    def _add_unused(self, drafts: Sequence[_Draft]) -> None:
        """Parameters that no operator reads belong to the model all the same."""
        read = {name for call in self.program.calls for name in call.inputs}
        for pair in self.program.tied:  # read under another name
            read |= set(pair) if read.intersection(pair) else set()
        for name, value in self.program.values.items():
            if value.role is Role.PARAMETER and name not in read:
                self._add(drafts[0], name)

    def _block(self, draft: _Draft, short: Mapping[str, str]) -> Block:
        def name(text: str) -> str:
            return short.get(text, text)

        return Block(
            name=draft.name,
            tensors=tuple(replace(tensor, name=name(tensor.name)) for tensor in draft.tensors.values()),
            operators=tuple(
                replace(
                    operator,
                    name=name(operator.name),
                    inputs=tuple(map(name, operator.inputs)),
                    outputs=tuple(map(name, operator.outputs)),
                    saves=tuple(map(name, operator.saves)),
                )
                for operator in draft.operators
            ),
            inputs=tuple(map(name, draft.inputs)),
            outputs=tuple(map(name, draft.outputs)),
        )

    def _tied(self, drafts: Sequence[_Draft], short: Mapping[str, Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
        """Parameters of one storage: two of the model's, or one that several blocks read."""
        places: dict[str, list[str]] = {}
        owner = {second: first for first, second in self.program.tied}
        for draft in drafts:
            for name, tensor in draft.tensors.items():
                if tensor.role is Role.PARAMETER:
                    path = f"{draft.name}/{short[draft.name].get(name, name)}"
                    places.setdefault(owner.get(name, name), []).append(path)
        return tuple((paths[0], path) for paths in places.values() for path in paths[1:])

    # -- how it belongs together

    def _instances(self, drafts: Sequence[_Draft], short: Mapping[str, Mapping[str, str]]) -> Iterator[BlockInstance]:
        for draft in drafts:
            names = short[draft.name]
            run = draft.section.run
            outside = {name: self.last[name] for name in draft.tensors if name in self.last and name not in draft.made}
            given = self._carried(draft)
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

    def _counterparts(self, draft: _Draft, instance: int) -> dict[str, str]:
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

    def _factors(self) -> dict[str, Factors]:
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
                names[index] = _unused(flat[index], names)
        parts = iter(names)
        return tuple(tuple(next(parts) for _ in range(count)) for count in naming.groups(name))

    def _readings(self) -> dict[str, Reading]:
        found = dict(self.naming.readings)
        calls = self.program.calls
        place = {call.name: index for index, call in enumerate(calls)}
        for section in self.sections:
            run = section.run
            made = {name for call in section.calls for name in call.outputs}
            own = [(name, reading) for name in made if (reading := found.get(name))]
            for name, reading in own:
                if reading.base not in made and reading.base in self.last:
                    found[name] = replace(reading, base=self.last[reading.base])
            before: dict[str, str] = {}
            carried = (
                {self.naming.base(self.renamed.get(one, one)): self.naming.base(two) for one, two in run.carried}
                if run
                else {}
            )
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
                    base = names.get(reading.base, self.last.get(reading.base, reading.base))
                    found[names[name]] = Reading(base, tuple(views), reading.positions)
                before = names
        return found

    # -- in words

    def _warnings(self, graph: Graph) -> Iterator[str]:
        total = graph.forward_flops(self.program.batch, 1)
        unknown = Counter[str]()
        repeats = {
            call.name: section.run.count if section.run else 1 for section in self.sections for call in section.calls
        }
        ops = {call.name: call.op for section in self.sections for call in section.calls}
        for name, pattern in self.naming.patterns.items():
            if not pattern.known and name not in self.naming.constants:
                unknown[ops[name]] += repeats[name]
        for op, count in sorted(unknown.items()):
            times = "once" if count == 1 else f"{count} times"
            yield (
                f"no rule for {op} ({times}): replicated, its work is done by every device; its FLOPs are not known "
                "and count as 0 %"
            )
        for name in self.naming.loose:
            if name in self.naming.constants:
                continue
            flops = self._flops(name) * repeats[name]
            share = f"{flops / total:.1%}" if total else "0 %"
            yield f"{name} ({ops[name]}) sees a dim in factors that do not fit: not split there ({share} of the FLOPs)"

    def _flops(self, name: str) -> int:
        own, atoms = self.naming.labels[name], self.naming.atoms
        return sum(
            2 * math.prod(atoms.sizes[leaf] for label in product for leaf in atoms.leaves(own[label]))
            for product in self.naming.patterns[name].contractions
        )

    def _folded(self, drafts: Sequence[_Draft]) -> Iterator[str]:
        for draft in drafts:
            run = draft.section.run
            if run:
                yield (
                    f"{run.count} x {len(draft.operators)} operators: block {draft.name!r}, {run.period} calls each, "
                    f"the first from {draft.section.calls[0].name}"
                )


class _Spelling:
    """The names that one operator has for its dims: those of its result where it can, each once."""

    def __init__(self, writer: _Writer, call: Call) -> None:
        self.naming, self.call = writer.naming, call
        self.pattern = self.naming.patterns[call.name]
        self.by_key: dict[Key, str] = {}
        taken: set[str] = set()
        for name, array in zip(call.outputs, self.pattern.results, strict=True):
            for key, dim in zip(self.naming.keys(call, array), writer.dims(name), strict=True):
                self._give(key, dim, taken)
        for array in (
            *self.pattern.operands,
            *(extra.array for extra in (*self.pattern.extras, *self.pattern.statistics)),
        ):
            for key, dim in zip(self.naming.keys(call, array), self.classes(array), strict=True):
                self._give(key, dim, taken)

    def _give(self, key: Key, name: str, taken: set[str]) -> None:
        if key not in self.by_key:
            self.by_key[key] = name if name not in taken else _unused(name.rstrip("'"), taken)
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


def _spec(operands: Sequence[tuple[str, tuple[str, ...]]], results: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    return " -> ".join(", ".join(" ".join(dims) for _, dims in side) for side in (operands, results))


def _primed(dims: Sequence[str]) -> tuple[str, ...]:
    """Names, each once: a second one of the same class with a prime.

    >>> _primed(("batch", "tokens", "tokens"))
    ('batch', 'tokens', "tokens'")
    """
    names: list[str] = []
    for dim in dims:
        names.append(_unused(dim, names))
    return tuple(names)


def _unused(name: str, taken: Iterable[str]) -> str:
    known = set(taken)
    while name in known:
        name += "'"
    return name


def _groups(counts: tuple[int, ...]) -> tuple[int, ...]:
    return () if all(count == 1 for count in counts) else counts


def _main_dtype(program: Program) -> str:
    """The type in which most of the weights are; without weights, of the inputs or float32."""
    counts = Counter[str]()
    for value in program.values.values():
        if value.dtype.startswith(("float", "bfloat")):
            counts[value.dtype] += math.prod(value.shape) * (10**9 if value.role is Role.PARAMETER else 1)
    return counts.most_common(1)[0][0] if counts else "float32"


def _block_names(sections: Sequence[_Section]) -> list[str]:
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


def _shortener(draft: _Draft) -> dict[str, str]:
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
