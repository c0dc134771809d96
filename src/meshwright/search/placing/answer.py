"""What all methods of this package share: a question becomes a space on a mesh, a choice becomes an answer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from meshwright.choice import Array, summed_over_time
from meshwright.cost.layouts import Machine, machine_of
from meshwright.cost.placed import estimate_placed
from meshwright.errors import InputError, Problem
from meshwright.plan import Certificate
from meshwright.search.choose.solver import Deadline, within
from meshwright.search.choose.times import extremes
from meshwright.search.graph_method import GRAPH_METHODS, GraphAnswer, GraphQuestion, Placed
from meshwright.search.operators import OperatorSpace, operator_space
from meshwright.search.place import mesh_of
from meshwright.strategy import PLACED_AXES, MeshAxis, Strategy
from meshwright.units import format_bytes

#: What a search that could go on without end takes where nobody set a deadline.
USUAL_S = 20.0


@dataclass
class Watch:
    """CPU-seconds by what they went into, and when it began."""

    started: float = field(default_factory=time.perf_counter)
    started_cpu: float = field(default_factory=time.process_time)
    phases_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what is done within as `name`."""
        before = time.process_time()
        yield
        self.phases_s[name] = self.phases_s.get(name, 0.0) + time.process_time() - before


@dataclass(frozen=True)
class Posed:
    """A question on its mesh; a method makes the spaces that it looks at."""

    question: GraphQuestion
    mesh: tuple[MeshAxis, ...]
    machine: Machine
    watch: Watch

    @property
    def deadline(self) -> Deadline:
        """The question's."""
        return self.question.deadline

    def space(self, *, memory_limit: float | None = None, with_state: bool = False) -> OperatorSpace:
        """All placements on the mesh."""
        with self.watch.phase("space"):
            question = self.question
            return operator_space(
                question.graph,
                self.mesh,
                self.machine,
                question.workload,
                memory_limit=memory_limit,
                with_state=with_state,
            )

    def placed(self, strategy: Strategy, objective: float | None = None) -> Placed:
        """A strategy with its estimate; the objective is its step time unless the method has another."""
        question = self.question
        with self.watch.phase("estimate"):
            estimate = estimate_placed(question.graph, question.cluster, strategy, question.workload, question.engine)
        return Placed(strategy, estimate, estimate.step_time_s if objective is None else objective)


@dataclass(frozen=True)
class Found:
    """What a method found: strategies, the best first; those that do not fit are left out of the answer, with the
    reasons. `num_looked_at` counts strategies that it priced, `num_members` those of its space where it bounds them all
    (`lower_bound_s`)."""

    strategies: tuple[Strategy, ...]
    statement: str
    num_looked_at: int
    space: str = "operator"
    lower_bound_s: float = -math.inf
    exhaustive: bool = False
    reasons: tuple[str, ...] = ()
    objectives: tuple[float, ...] = ()
    num_members: int = 0


Method = Callable[[Posed], Found]


@dataclass(frozen=True)
class Placing:
    """A method on the space of operators as one for whole graphs; what it does not know it refuses."""

    name: str
    method: Method
    objectives: tuple[str, ...] = ("step_time",)
    takes_annotations: bool = False
    recomputes: bool = False

    def __call__(self, question: GraphQuestion) -> GraphAnswer:
        """Look, and price what was found."""
        if problems := list(self._problems(question)):
            raise InputError(problems)
        watch = Watch()
        mesh = question.mesh or mesh_of(question.cluster)
        machine = machine_of(question.cluster, question.engine, question.workload)
        posed = Posed(question, mesh, machine, watch)
        spent = sum(watch.phases_s.values())
        before = time.process_time()
        found = self.method(posed)
        inside = sum(watch.phases_s.values()) - spent
        watch.phases_s["search"] = max(0.0, time.process_time() - before - inside)
        objectives: Sequence[float | None] = found.objectives or (None,) * len(found.strategies)
        priced = [posed.placed(*each) for each in zip(found.strategies, objectives, strict=True)]
        fitting = tuple(placed for placed in priced if placed.estimate.feasible)
        reasons = dict.fromkeys(reason for placed in priced for reason in placed.estimate.reasons)
        return GraphAnswer(
            found=fitting,
            certificate=Certificate(
                method=self.name,
                space=found.space,
                evaluator="analytic",
                num_strategies=found.num_looked_at,
                num_feasible=len(fitting),
                exhaustive=found.exhaustive,
                statement=found.statement,
                objective=question.objective,
                seed=question.seed,
            ),
            lower_bound_s=found.lower_bound_s,
            reasons=() if fitting else (*found.reasons, *reasons) or (f"{self.name} found nothing",),
            elapsed_s=time.perf_counter() - watch.started,
            cpu_s=time.process_time() - watch.started_cpu,
            phases_s=watch.phases_s,
            num_members=found.num_members,
        )

    def _problems(self, question: GraphQuestion) -> Iterator[Problem]:
        if question.objective not in self.objectives:
            others = [name for name, method in GRAPH_METHODS.items() if question.objective in _objectives(method)]
            nearest = f"--method {others[0]}" if others else self.objectives[0]
            yield Problem(
                "objective", question.objective, f"{self.name} answers for {' and '.join(self.objectives)}", nearest
            )
        if question.annotations and not self.takes_annotations:
            rule = f"{self.name} chooses all splits; gspmd completes given ones"
            yield Problem("annotations", ", ".join(question.annotations), rule, "--method gspmd")
        if question.cuts:
            rule = f"{self.name} makes no stages; gpipe takes cuts"
            yield Problem("cuts", ",".join(map(str, question.cuts)), rule, "--method gpipe")
        if question.microbatches > 1:
            rule = f"{self.name} makes no pipeline: a step is one batch; alpa does"
            yield Problem("microbatches", str(question.microbatches), rule, "1")
        if question.with_recompute and not self.recomputes:
            rule = f"{self.name} keeps all activations; operators chooses which to make again"
            yield Problem("recompute", "", rule, "--method operators")
        yield from self._mesh_problems(question)

    def _mesh_problems(self, question: GraphQuestion) -> Iterator[Problem]:
        number, sizes = question.cluster.num_devices, [axis.size for axis in question.mesh]
        if question.mesh and math.prod(sizes) != number:
            suggested = "x".join(str(axis.size) for axis in mesh_of(question.cluster))
            rule = f"must have the {number} devices of {question.cluster.name}"
            yield Problem("mesh", "x".join(map(str, sizes)), rule, suggested)
        for axis in question.mesh:
            if axis.name not in PLACED_AXES:
                yield Problem("mesh", axis.name, f"axes are called {', '.join(PLACED_AXES)}", PLACED_AXES[0])


def _objectives(method: object) -> tuple[str, ...]:
    return method.objectives if isinstance(method, Placing) else ()


def choice_of(
    posed: Posed,
    space: OperatorSpace,
    choice_N: Array | None,
    statement: str,
    *,
    num_looked_at: int = 1,
    reasons: tuple[str, ...] = (),
) -> Found:
    """One choice, or none with the reasons, as what was found."""
    if choice_N is None:
        return Found((), statement, num_looked_at, reasons=(*no_room(space), *reasons)[:1])
    return Found((space.strategy(choice_N),), statement, num_looked_at)


def no_room(space: OperatorSpace) -> tuple[str, ...]:
    """Why no choice fits, where even the least that everything can use is too much; else nothing."""
    instance = space.instance
    least_U, _ = extremes(instance)
    _, used = summed_over_time(instance.intervals_U, least_U)
    if not len(used) or used.max() <= instance.limit:
        return ()
    needed, room = used.max() + space.fixed_bytes, instance.limit + space.fixed_bytes
    return (
        f"however placed, a step needs {format_bytes(needed)} a device at one time, of {format_bytes(room)} usable: "
        "a smaller batch, activations made again, or stages (--method alpa) need less",
    )


def or_usual(deadline: Deadline) -> Deadline:
    """The deadline, or one after the usual time where there is none."""
    return deadline if math.isfinite(deadline.at_s) else within(USUAL_S)


def register(
    name: str,
    method: Method,
    *,
    objectives: tuple[str, ...] = ("step_time",),
    takes_annotations: bool = False,
    recomputes: bool = False,
) -> None:
    """Add a method to those for whole graphs."""
    GRAPH_METHODS.add(name, Placing(name, method, objectives, takes_annotations, recomputes))
