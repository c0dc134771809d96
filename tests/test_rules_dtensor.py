"""Our dim rules beside DTensor's: what it accepts ours allow, but for the differences listed here with their reasons.

`python tests/test_rules_dtensor.py` writes the table in `docs/dtensor_rules.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from meshwright.graph import Role
from meshwright.io.rules import Seen, rule_of
from meshwright.io.rules.pattern import Array
from meshwright.runtime.ranks import on_ranks
from meshwright.runtime.traced.dtensor import SUMMAND, WHOLE, Accepted, accepted, fake_mesh, has_rule
from rule_cases import CASES, Draw
from test_rules_executed import Case, case_of, op_of, splittable

PAGE = Path(__file__).parent.parent / "docs" / "dtensor_rules.md"


@dataclass(frozen=True)
class Beside:
    """One operator's placements under both: those of DTensor that ours lack, and how many each has."""

    case: str
    lacking: tuple[Accepted, ...]
    theirs: int
    ours: int
    both: int


def ours(case: Case) -> Iterator[Accepted]:
    """The placements that our rule allows along one axis, in DTensor's terms: only the outermost factor of a dim can be
    said there. Summands: of activations, whichever of the operands are these."""
    pattern = case.pattern
    for label in splittable(case):
        operands = tuple(_lies(array, label, WHOLE) for array in pattern.operands)
        results = tuple(_lies(array, label, SUMMAND) for array in pattern.results)
        if None not in (*operands, *results):
            yield Accepted(operands, results)  # type: ignore[arg-type]
    names = case.call.inputs
    rule = rule_of(case.call.op)
    assert rule is not None
    for number in range(1, 2 ** len(set(names))):
        active = {name for index, name in enumerate(dict.fromkeys(names)) if number >> index & 1}
        roles = {name: Role.ACTIVATION if name in active else Role.PARAMETER for name in case.values}
        seen = Seen(case.call, case.values, roles)
        if rule(seen).linear:
            placed = tuple(SUMMAND if name in seen.summable else WHOLE for name in names)
            yield Accepted(placed, tuple(SUMMAND for _ in pattern.results))


def _lies(array: Array, label: str, otherwise: str) -> str | None:
    """How an array lies where a label is cut; None where DTensor has no word for it."""
    for dim, labels in enumerate(array):
        if label in labels:
            return f"S{dim}" if labels[0] == label else None
    return otherwise


def beside(text: str, mesh: object) -> Beside:
    """One case under both rules."""
    case = case_of(text, 0)
    allowed = set(ours(case))
    # Operands that are not cut are whole in the first result's terms; DTensor may leave later results out.
    found = {each for each in accepted(op_of(text), CASES[text](Draw(0, op_of(text))), mesh) if _is_plain(case, each)}
    known = {(each.operands, each.results[:1]) for each in allowed}
    lacking = tuple(sorted((each for each in found if (each.operands, each.results[:1]) not in known), key=str))
    return Beside(text, lacking, len(found), len(allowed), len(found) - len(lacking))


def _is_plain(case: Case, found: Accepted) -> bool:
    """Whether an answer of DTensor's is about pieces and sums (no averages, no strided shards), and moves nothing: of
    lists of tensors it does not say so, and takes any mixture."""
    plain = all(each in (WHOLE, SUMMAND) or each[1:].isdigit() for each in (*found.operands, *found.results))
    lists = any(not isinstance(operand, str) for operand in case.call.operands.values())
    mixed = lists and len(set(found.operands)) > 1
    vanished = lists and set(found.results) == {WHOLE}
    # An integer or a bool is no summand with us, and one tensor read twice is one.
    summands = [name for name, lies in zip(case.call.inputs, found.operands, strict=True) if lies == SUMMAND]
    return plain and not mixed and not vanished and all(case.tensors[name].is_floating_point() for name in summands)


def compared() -> list[Beside]:
    """All cases for which DTensor has a rule."""
    with fake_mesh() as mesh:
        return [beside(text, mesh) for text in CASES if not text.startswith("transformers.") and has_rule(op_of(text))]


#: Where DTensor takes placements that our rule does not allow, and why.
DIFFERENCES = {
    "addmm:_": "a term and a product that are summands together: ours adds the term once, on the first rank",
    "baddbmm:_": "the same",
    "any.dim:_": "a sum of truth values: with us only numbers are summands",
    "bucketize.Tensor:_": "boundaries cut, the counts below added up: ours keeps the boundaries whole",
    "linalg_vector_norm:_": "norms of pieces, to be combined as norms are: with us a Partial is a sum",
    "positive:_": "does nothing, and nobody writes it",
    "grid_sampler_2d:_": "an image of summands: ours adds it up first",
    "histc:_": "counts of pieces add up: ours, which is replicated, never splits what it counts",
    "scatter_add:larger": "wrong there: a source longer than the index is cut at other places than the index",
    "gather:shorter": "wrong there: an index shorter than the tensor is cut at other places than the tensor",
}


def _table(rows: list[Beside]) -> str:
    """The page: what was asked, the differences, and each operator's numbers."""
    lines = [
        "# Dim rules beside DTensor's",
        "",
        "Written by `python tests/test_rules_dtensor.py`. Each operator is asked on small tensors along one mesh axis:",
        "in which placements of its operands does it move nothing? `S0` is cut along dim 0, `P` summands, `R` whole.",
        "Both columns count placements other than all whole, as far as DTensor has words for them (it cannot say that",
        "an inner factor of a dim is cut, which ours can). An operator that it splits into others first, such as",
        "`linear`, attention or `cross_entropy`, has no row.",
        "",
        "## Taken by DTensor, not by ours",
        "",
        "| operator | operands -> results | why |",
        "|---|---|---|",
    ]
    for row in rows:
        ways = "; ".join(f"{', '.join(each.operands)} -> {', '.join(each.results)}" for each in row.lacking)
        lines += [f"| `{row.case.rstrip('_').rstrip(':')}` | {ways} | {DIFFERENCES[row.case]} |"] if row.lacking else []
    lines += ["", "## All", "", "| operator | DTensor | ours | both |", "|---|--:|--:|--:|"]
    lines += [f"| `{row.case.rstrip('_').rstrip(':')}` | {row.theirs} | {row.ours} | {row.both} |" for row in rows]
    return "\n".join(lines) + "\n"


def test_what_dtensor_accepts_ours_allow_but_for_the_differences_listed() -> None:
    rows = on_ranks(1, _compared)[0]
    assert len(rows) > 200
    assert {row.case for row in rows if row.lacking} <= set(DIFFERENCES)
    # The other way there is more: what ours allow and DTensor would move first.
    assert sum(row.ours for row in rows) > sum(row.theirs for row in rows)


def _compared(rank: int, size: int) -> list[Beside]:
    dist.destroy_process_group()  # that of the launch: the fake one takes its place
    try:
        return compared()
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


if __name__ == "__main__":
    PAGE.write_text(_table(compared()))
