"""Plans of traced programs held against one device: the same loss and the same gradients, in float64.

All plans of a mesh run out of one launch, since processes take longer to start than a small plan to run. Each rank
compares its own piece of every gradient, so that copies that differ by rank are found too.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.io.traced import Traced
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.ranks import Order, carry_out_orders
from meshwright.runtime.traced.execute import Outcome, Splits, dim_sizes, run_program, whole_tensors
from meshwright.runtime.traced.redistribute import way
from meshwright.strategy import MeshAxis

#: How far a plan may be from one device, relative to each tensor's largest magnitude [derived: sums in another order
#: move the last digits of float64 only].
TOLERANCE = 1e-10

#: The share of the largest gradient of all below which a gradient counts as 0: the rounding noise of a true 0 (the bias
#: of keys under a softmax) is up to 2e-16 of the largest [derived].
FLOOR = 1e-5


@dataclass(frozen=True)
class Plan:
    """Splits of a program (a number among `Checks.programs`) on a mesh."""

    program: int
    mesh: tuple[MeshAxis, ...]
    splits: Splits
    name: str = ""


@dataclass(frozen=True)
class Compared:
    """How far a plan is from one device: its loss, and the worst of its gradients."""

    plan: Plan
    loss_difference: float
    gradient_difference: float
    worst_gradient: str
    num_gradients: int
    seconds: float

    @property
    def agrees(self) -> bool:
        """Whether both are within tolerance (what is no number is not)."""
        return self.loss_difference < TOLERANCE and self.gradient_difference < TOLERANCE


@dataclass(frozen=True)
class Subject:
    """A program and the sizes that it runs with."""

    traced: Traced
    batch: int
    seed: int = 0


def compare(subjects: Sequence[Subject], plans: Sequence[Plan], timeout_s: float = 60.0) -> list[Compared]:
    """Run every plan on as many processes as its mesh has devices, and once each program on one."""
    meshes = list(dict.fromkeys(plan.mesh for plan in plans))
    with tempfile.TemporaryDirectory(prefix="meshwright-traced-") as name:
        folder = Path(name)
        orders = [Order(partial(_save_references, subjects, folder), 1, timeout_s)]
        for mesh in meshes:
            own = [plan for plan in plans if plan.mesh == mesh]
            size = math.prod(axis.size for axis in mesh)
            orders.append(Order(partial(_run_plans, subjects, own, folder, timeout_s), size, timeout_s))
        scratch = folder / "orders"
        scratch.mkdir()
        results = carry_out_orders(orders, scratch)[1:]
    found: dict[int, Compared] = {}
    for mesh, ranks in zip(meshes, results, strict=True):
        places = [index for index, plan in enumerate(plans) if plan.mesh == mesh]
        for index, each in zip(places, zip(*ranks, strict=True), strict=True):
            found[index] = _worst(plans[index], each)
    return [found[index] for index in range(len(plans))]


@dataclass(frozen=True)
class _Seen:
    """What one rank saw of a plan."""

    loss: float
    gradient: float
    worst: str
    count: int
    seconds: float


def _worst(plan: Plan, ranks: Sequence[_Seen]) -> Compared:
    gradient = max(ranks, key=lambda seen: _number(seen.gradient))
    return Compared(
        plan,
        max(_number(seen.loss) for seen in ranks),
        _number(gradient.gradient),
        gradient.worst,
        gradient.count,
        max(seen.seconds for seen in ranks),
    )


def _number(difference: float) -> float:
    """A difference, infinite where it is no number."""
    return math.inf if math.isnan(difference) else difference


def reference(subject: Subject) -> tuple[Outcome, dict[str, Tensor]]:
    """A program on one device, and its whole tensors."""
    whole = whole_tensors(subject.traced, subject.batch, subject.seed)
    return run_program(subject.traced, unsplit(), whole, subject.batch, Mesh((), 0)), whole


def unsplit() -> Splits:
    """The splits of one device: nothing is cut."""
    return defaultdict(_Nothing)


class _Nothing(dict[str, Mapping[str, str]]):
    """The splits of a block of which nothing is cut."""

    def __missing__(self, key: str) -> Mapping[str, str]:
        return {}


def _save_references(subjects: Sequence[Subject], folder: Path, rank: int, size: int) -> None:
    for index, subject in enumerate(subjects):
        outcome, _ = reference(subject)
        torch.save({"loss": outcome.loss, "gradients": dict(outcome.gradients)}, folder / f"{index}.pt")


def _run_plans(
    subjects: Sequence[Subject], plans: Sequence[Plan], folder: Path, timeout_s: float, rank: int, size: int
) -> list[_Seen]:
    mesh = Mesh(tuple(axis for axis in plans[0].mesh if axis.size > 1), rank, timeout_s)
    mesh.form_groups(subsets(tuple(axis.name for axis in mesh.axes)))
    whole: dict[int, dict[str, Tensor]] = {}
    expected: dict[int, Any] = {}
    found = []
    for plan in plans:
        subject = subjects[plan.program]
        if plan.program not in whole:
            whole[plan.program] = whole_tensors(subject.traced, subject.batch, subject.seed)
            expected[plan.program] = torch.load(folder / f"{plan.program}.pt", weights_only=True)
        start = time.monotonic()
        outcome = run_program(subject.traced, plan.splits, whole[plan.program], subject.batch, mesh)
        seconds = time.monotonic() - start
        found.append(_seen(subject, outcome, expected[plan.program], mesh, seconds))
    return found


def subsets(axes: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """All sets of axes but the empty one: those over which ranks may talk."""
    for number in range(1, 2 ** len(axes)):
        yield tuple(axis for index, axis in enumerate(axes) if number >> index & 1)


def _seen(subject: Subject, outcome: Outcome, expected: Mapping[str, Any], mesh: Mesh, seconds: float) -> _Seen:
    loss = float(expected["loss"])
    worst, name = compared_gradients(subject.traced, subject.batch, outcome, expected["gradients"], mesh)
    loss_difference = abs(float(outcome.loss) - loss) / max(abs(loss), 1e-300)
    return _Seen(loss_difference, worst, name, len(outcome.gradients), seconds)


def compared_gradients(
    traced: Traced, batch: int, outcome: Outcome, expected: Mapping[str, Tensor], mesh: Mesh
) -> tuple[float, str]:
    """The largest difference of this rank's pieces of all gradients from those of the whole, relative to each
    gradient's largest magnitude (or `FLOOR` of the largest of all), and whose it is."""
    assert expected.keys() == outcome.gradients.keys(), expected.keys() ^ outcome.gradients.keys()
    largest = max((float(each.abs().max()) for each in expected.values()), default=0.0)
    sizes = dim_sizes(traced, batch)
    worst, name = 0.0, ""
    for value, whole in expected.items():
        piece = way(traced.factors[value], sizes, {}, outcome.lies[value], mesh)(whole, mesh)
        scale = max(float(whole.abs().max()), FLOOR * largest, 1e-300)
        difference = _number(float((piece - outcome.gradients[value]).abs().max()) / scale)
        if difference > worst:
            worst, name = difference, value
    return worst, name
