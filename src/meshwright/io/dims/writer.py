"""The operator graph of a program whose dims are named.

One operator for each call that does more than show or repeat what is there, one block for each section; then what the
blocks hand over, under short names. A tensor's dims are those of its value, each name once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from meshwright.graph import WORKLOAD_DIMS, Block, Graph, Operator, Role, Segment, Tensor
from meshwright.io.dims.carried import Carried
from meshwright.io.dims.draft import Draft, shortener
from meshwright.io.dims.matching import Matching
from meshwright.io.dims.naming import Naming
from meshwright.io.dims.primes import primed
from meshwright.io.dims.remarks import folded, warnings_of
from meshwright.io.dims.sections import Section, block_names
from meshwright.io.dims.spelling import Spelling, spec
from meshwright.io.rules.pattern import Array, Extra
from meshwright.io.traced import Call, Program, Traced


class Writer:
    """Writes the graph of a named program."""

    def __init__(self, program: Program, sections: Sequence[Section], naming: Naming) -> None:
        self.program, self.sections, self.naming = program, sections, naming
        self.compute = _main_dtype(program)
        self.primed: dict[str, tuple[str, ...]] = {}
        self.carried = Carried.of(program, sections, naming)

    def traced(self) -> Traced:
        """The graph, and how it and the program belong together."""
        drafts = [
            self._draft(name, section) for name, section in zip(block_names(self.sections), self.sections, strict=True)
        ]
        self._hand_over(drafts)
        self._add_unused(drafts)
        short = {draft.name: shortener(draft) for draft in drafts}
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
        matching = Matching(self.program, self.sections, self.naming, self.carried, self.dims)
        return Traced(
            program=self.program,
            graph=graph,
            instances=tuple(matching.instances(drafts, short)),
            factors=matching.factors(),
            readings=matching.readings(),
            warnings=tuple(warnings_of(self.program, self.sections, self.naming, graph)),
            folded=tuple(folded(drafts)),
        )

    # -- operators

    def dims(self, name: str) -> tuple[str, ...]:
        """The dims of a base tensor, each name once."""
        if name not in self.primed:
            self.primed[name] = primed(self.naming.flat(name))
        return self.primed[name]

    def _draft(self, name: str, section: Section) -> Draft:
        draft = Draft(name, section)
        for call in section.calls:
            if call.name in self.naming.constants or call.outputs[0] in self.naming.readings:
                continue
            self._write(draft, call)
        return draft

    def _write(self, draft: Draft, call: Call) -> None:
        naming, pattern = self.naming, self.naming.patterns[call.name]
        spelling = Spelling(self.naming, call, self.dims)
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
                spec=spec(operands, results),
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
        self, draft: Draft, call: Call, statistics: list[tuple[str, Array]], spelling: Spelling
    ) -> None:
        operand = (self.naming.base(call.inputs[0]), spelling.operand(0))
        results = [(name, spelling.array(array)) for name, array in statistics]
        draft.operators.append(
            Operator(
                name=f"{call.name}.statistics",
                kind="statistics",
                spec=spec([operand], results),
                inputs=(operand[0],),
                outputs=tuple(name for name, _ in results),
                saves=(operand[0],) if self.program.values[call.outputs[0]].differentiable else (),
            )
        )
        draft.calls[f"{call.name}.statistics"] = call.name

    def _extras(self, draft: Draft, call: Call, extras: Sequence[Extra], spelling: Spelling) -> list[tuple[str, Array]]:
        found = []
        for extra in extras:
            name = f"{call.outputs[0]}.{extra.suffix}"
            dtype = self._dtype(extra.dtype or self.program.values[call.inputs[0]].dtype)
            dims = primed(spelling.classes(extra.array))
            trained = extra in self.naming.patterns[call.name].statistics
            draft.tensors[name] = Tensor(
                name, dims, dtype=dtype, differentiable=trained, groups=_groups(spelling.grouping(extra.array))
            )
            draft.made.add(name)
            self.primed[name] = dims
            self.naming.roles[name] = Role.ACTIVATION
            found.append((name, extra.array))
        return found

    def _add(self, draft: Draft, name: str) -> None:
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

    def _hand_over(self, drafts: Sequence[Draft]) -> None:
        """What each block gives the next: all that any later one needs, by position."""
        base = self.naming.base
        results = [base(self.carried.renamed.get(name, name)) for name in self.program.outputs]
        later = {name for name in results if self.naming.roles[name] is Role.ACTIVATION}
        wanted: list[set[str]] = []
        for draft in reversed(drafts):
            wanted.insert(0, set(later))
            pairs = self.carried.pairs(draft.section.run)
            later = (later - draft.made) | draft.needed | set(pairs)
            if draft.section.run:
                later -= set(pairs.values())
        handed: tuple[str, ...] = ()
        for index, draft in enumerate(drafts):
            draft.inputs = handed
            pairs = self.carried.pairs(draft.section.run)
            if draft.section.run:
                handed = tuple(pairs.get(name, name) for name in handed)
            else:
                first = self.carried.pairs(drafts[index + 1].section.run) if index + 1 < len(drafts) else {}
                order = [*first, *handed, *draft.tensors]
                handed = tuple(dict.fromkeys(name for name in order if name in wanted[index]))
            draft.outputs = handed
            for name in (*draft.inputs, *draft.outputs):
                if name not in draft.tensors:
                    self._pass(draft, name, drafts)

    def _pass(self, draft: Draft, name: str, drafts: Sequence[Draft]) -> None:
        """A tensor that goes through a block untouched."""
        draft.tensors[name] = next(other.tensors[name] for other in drafts if name in other.tensors)

    def _add_unused(self, drafts: Sequence[Draft]) -> None:
        """Parameters that no operator reads belong to the model all the same."""
        read = {name for call in self.program.calls for name in call.inputs}
        for pair in self.program.tied:  # read under another name
            read |= set(pair) if read.intersection(pair) else set()
        for name, value in self.program.values.items():
            if value.role is Role.PARAMETER and name not in read:
                self._add(drafts[0], name)

    def _block(self, draft: Draft, short: Mapping[str, str]) -> Block:
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

    def _tied(self, drafts: Sequence[Draft], short: Mapping[str, Mapping[str, str]]) -> tuple[tuple[str, str], ...]:
        """Parameters of one storage: two of the model's, or one that several blocks read."""
        places: dict[str, list[str]] = {}
        owner = {second: first for first, second in self.program.tied}
        for draft in drafts:
            for name, tensor in draft.tensors.items():
                if tensor.role is Role.PARAMETER:
                    path = f"{draft.name}/{short[draft.name].get(name, name)}"
                    places.setdefault(owner.get(name, name), []).append(path)
        return tuple((paths[0], path) for paths in places.values() for path in paths[1:])


def _groups(counts: tuple[int, ...]) -> tuple[int, ...]:
    return () if all(count == 1 for count in counts) else counts


def _main_dtype(program: Program) -> str:
    """The type in which most of the weights are; without weights, of the inputs or float32."""
    counts = Counter[str]()
    for value in program.values.values():
        if value.dtype.startswith(("float", "bfloat")):
            counts[value.dtype] += math.prod(value.shape) * (10**9 if value.role is Role.PARAMETER else 1)
    return counts.most_common(1)[0][0] if counts else "float32"
