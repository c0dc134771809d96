"""The best operator-level plan of a graph on a mesh, with a proof of how good it is.

A space (`search.operators`), a solver (`search.choose`), a statement. Where memory does not bind, elimination is exact;
where it does, prices of memory give a choice and a bound, and an integer program closes what gap is left. All instances
of a block are split alike here. What that costs is known too: the cheapest chain in which every instance may be split
in its own way, without regard to memory, is a lower bound of all such plans (`untied_bound`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import pairwise
from typing import Literal

import numpy as np

from meshwright.choice import Array, Instance, cost_of, instance_of, is_legal, peak_of, summed_over_time
from meshwright.clock import timed
from meshwright.cluster import Cluster
from meshwright.cost.layouts import Machine
from meshwright.graph import Graph
from meshwright.search.choose import elimination as _elimination  # noqa: F401  (registers itself)
from meshwright.search.choose import ilp as _ilp  # noqa: F401
from meshwright.search.choose.chain import chain, min_plus
from meshwright.search.choose.elimination import eliminate, min_marginals, plan_of
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.solver import ENDLESS, NOTHING, SOLVERS, Deadline, Solved, better, within
from meshwright.search.operators import BlockPart, OperatorSpace, operator_space
from meshwright.strategy import PLACED_AXES, MeshAxis, Strategy
from meshwright.units import format_bytes
from meshwright.workload import Workload

#: A gap below this is rounding.
EXACT = 1e-9

#: Elimination may look at so many entries of one table: a few seconds.
MOST_ENTRIES = 2**30

#: What the portfolio gets where there is no deadline.
USUAL_SECONDS = 30.0

#: Boundaries of blocks with more joint states than this are not chained: the matrices would be large.
MOST_STATES = 4096

#: The share of the time that prices of memory may take before an integer program goes on from what they found.
PRICES_SHARE = 0.3


@dataclass(frozen=True, eq=False)
class Placing:
    """What was found: a strategy (None: `reasons` say why) with the seconds of its step, and how good it is.

    `lower_bound_s` holds for all strategies of the space that fit into memory; `untied_bound_s` also for those that
    split equal blocks in different ways (minus infinity where it was not worked out). `phases_s` are CPU-seconds."""

    space: OperatorSpace
    choice_N: Array | None
    strategy: Strategy | None
    cost_s: float
    lower_bound_s: float
    untied_bound_s: float
    statement: str
    reasons: tuple[str, ...] = ()
    phases_s: dict[str, float] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the cost may lie above the optimum of the space, as a share of the cost."""
        return Solved(self.choice_N, self.cost_s, self.lower_bound_s).gap


def mesh_of(cluster: Cluster) -> tuple[MeshAxis, ...]:
    """The mesh that a cluster itself suggests: groups of devices on fast links, and the devices of a group.

    >>> from meshwright.cluster import preset_cluster
    >>> [axis.size for axis in mesh_of(preset_cluster("dgx-h100x4"))]
    [4, 8]
    """
    inner = math.gcd(cluster.hierarchy()[0].group_size, cluster.num_devices)
    sizes = [size for size in (cluster.num_devices // inner, inner) if size > 1] or [1]
    return tuple(MeshAxis(name, size) for name, size in zip(PLACED_AXES, sizes, strict=False))


def place(
    graph: Graph,
    mesh: Sequence[MeshAxis] | Cluster,
    machine: Machine,
    workload: Workload,
    *,
    solver: str = "elimination",
    memory_limit: float | None = None,
    with_state: bool = False,
    with_recompute: bool = False,
    is_closed: bool = False,
    deadline: Deadline = ENDLESS,
    seed: int = 0,
) -> Placing:
    """The best plan of a graph on a mesh (or on a cluster's own, `mesh_of`); see `operator_space` for the options.

    `solver` is a name in `choose.solver.SOLVERS`; after "elimination", "ilp" closes what gap memory leaves, as long as
    there is time."""
    phases: dict[str, float] = {}
    axes = mesh_of(mesh) if isinstance(mesh, Cluster) else tuple(mesh)
    with timed(phases, "space"):
        space = operator_space(
            graph,
            axes,
            machine,
            workload,
            memory_limit=memory_limit,
            with_state=with_state,
            with_recompute=with_recompute,
            is_closed=is_closed,
        )
    with timed(phases, "solve"):
        solved = _solve(space, solver, deadline, seed)
    with timed(phases, "bound"):
        untied_s = untied_bound(space)
    choice_N = solved.choice_N
    return Placing(
        space=space,
        choice_N=choice_N,
        strategy=None if choice_N is None else space.strategy(choice_N),
        cost_s=solved.cost,
        lower_bound_s=max(solved.lower_bound, min(untied_s, solved.cost)),
        untied_bound_s=untied_s,
        statement=_statement(space, solved, untied_s, solver),
        reasons=(*_too_little(space), *solved.reasons) if choice_N is None else (),
        phases_s=phases,
    )


def _solve(space: OperatorSpace, solver: str, deadline: Deadline, seed: int) -> Solved:
    instance = space.instance
    if solver != "elimination":
        return SOLVERS[solver](instance, deadline, seed=seed)
    unlimited = _without_memory(instance, deadline)
    if unlimited.is_infeasible or (unlimited.choice_N is not None and is_legal(instance, unlimited.choice_N)):
        return unlimited
    solved = _reduced(instance, deadline, seed)
    return replace(solved, lower_bound=max(solved.lower_bound, unlimited.lower_bound))


def _without_memory(instance: Instance, deadline: Deadline) -> Solved:
    """The optimum if memory were no limit; nothing where even that takes too long."""
    plan = plan_of(instance, most_entries=MOST_ENTRIES, deadline=deadline)
    if plan is None:
        return NOTHING
    found = eliminate(plan)
    if not math.isfinite(found.least):
        return infeasible(instance, "every choice has an infinite cost (proven by elimination)")
    choice_N = found.choice()
    cost = cost_of(instance, choice_N)
    return Solved(choice_N, cost, min(cost, float(found.least)))


def _reduced(instance: Instance, deadline: Deadline, seed: int) -> Solved:
    """Where memory binds: without the choices that no optimum needs, prices of memory, then an integer program; where
    these find nothing, what a portfolio finds."""
    from meshwright.search.choose.portfolio import solve as portfolio  # here: they compile, and most questions
    from meshwright.search.choose.reduce import reduced  # don't need them

    small = reduced(instance)
    if small.infeasible:
        return infeasible(instance, "every choice needs too much memory")
    solved = SOLVERS["elimination"](small.instance, deadline.part(PRICES_SHARE), seed=seed)
    if not solved.is_infeasible and solved.gap > EXACT and not deadline.passed:
        solved = better(solved, SOLVERS["ilp"](small.instance, deadline, seed=seed, start=solved.choice_N))
    if solved.choice_N is None and not solved.is_infeasible and not deadline.passed:
        left = deadline if math.isfinite(deadline.at_s) else within(USUAL_SECONDS)
        solved = better(solved, portfolio(small.instance, left, seed=seed))
    if solved.choice_N is None:
        return infeasible(instance, "no choice fits") if solved.is_infeasible else solved
    choice_N = small.restore(solved.choice_N)
    return replace(solved, choice_N=choice_N, cost=cost_of(instance, choice_N))


def _too_little(space: OperatorSpace) -> Iterator[str]:
    """The moment that cannot be held even if everything lay as small as it can, and the largest things then."""
    instance = space.instance
    least_U = np.minimum.reduceat(instance.usage_V, instance.usage_first_U[:-1])
    times, in_use = summed_over_time(instance.intervals_U, least_U)
    if not len(times) or in_use.max() <= instance.limit:
        return
    worst = int(times[in_use.argmax()])
    held = (instance.intervals_U[:, 0] <= worst) & (worst < instance.intervals_U[:, 1])
    by_node = np.bincount(instance.usage_node_U[held], least_U[held], minlength=len(space.nodes))
    largest = ", ".join(
        f"{space.nodes[node].name} {format_bytes(by_node[node])}" for node in np.argsort(-by_node)[:4].tolist()
    )
    yield (
        f"in the {space.lifetimes.moments[worst]} {format_bytes(in_use.max() + space.fixed_bytes)} are needed of "
        f"{format_bytes(instance.limit + space.fixed_bytes)} usable even if all lies as small as it can: {largest}, ..."
    )


def _statement(space: OperatorSpace, solved: Solved, untied_s: float, solver: str) -> str:
    size = f"{len(space.nodes)} operators and tensors with {len(space.instance.cost_C):,} choices"
    if solved.choice_N is None:
        return f"no plan found among {size}" + (": proven that none fits" if solved.is_infeasible else "")
    peak = peak_of(space.instance, solved.choice_N) + space.fixed_bytes
    fits = f", {format_bytes(peak)} a device" if math.isfinite(space.instance.limit) else ""
    if solved.gap <= EXACT:
        text = f"optimal among {size} ({solver}: gap 0){fits}"
    elif math.isfinite(solved.lower_bound):
        text = f"at most {solved.gap:.2%} above the optimum among {size} ({solver}){fits}"
    else:
        text = f"best found among {size} ({solver} proves no bound){fits}"
    if not math.isfinite(untied_s):
        return text
    gap = max(0.0, solved.cost - untied_s) / solved.cost
    unlimited = " (were memory no limit)" if math.isfinite(space.instance.limit) else ""
    if gap <= EXACT:
        return f"{text}; no plan that splits equal blocks in different ways is better"
    return f"{text}; plans that split equal blocks in different ways are at most {gap:.2%} better{unlimited}"


# --- without the tie between equal blocks ----------------------------------------------------------------------------


def untied_bound(space: OperatorSpace) -> float:
    """A bound of all plans in which each instance of each block may be split in its own way: the cheapest chain of
    blocks over how the tensors lie that are handed over (minus infinity where these have too many joint states).

    Memory is left out, and tied parameters may lie in two ways: both can only lower the bound."""
    matrices = {}
    for name, part in space.parts.items():
        matrix = _block_matrix(part)
        if matrix is None:
            return -math.inf
        matrices[name] = matrix
    sequence = space.graph.sequence
    for before, after in dict.fromkeys(pairwise(sequence)):
        if _numbers(space.parts[before], "outputs") != _numbers(space.parts[after], "inputs"):
            return -math.inf  # something is handed on in another way than from block to block
    powers = []
    for segment in space.graph.segments:
        once = reduce(min_plus, [matrices[name] for name in segment.blocks])
        powers.append(chain(once, segment.repeat).cost_SS if segment.repeat > 1 else once)
    return float(reduce(min_plus, powers).min())


def _numbers(part: BlockPart, side: Literal["inputs", "outputs"]) -> list[int]:
    """The nodes that a block takes in, or hands out."""
    places: tuple[int, ...] = getattr(part, side)
    return [part.nodes[place] for place in places]


def _block_matrix(part: BlockPart) -> Array | None:
    """The least cost of one instance for each joint placement of what it takes in and of what it hands out."""
    sizes = [len(cost) for cost in part.costs]
    rows, columns = (math.prod(sizes[place] for place in places) for places in (part.inputs, part.outputs))
    if set(part.inputs) & set(part.outputs) or max(rows, columns) > MOST_STATES or rows * columns > MOST_STATES**2 / 16:
        return None
    block = instance_of(part.costs, [(one, other, matrix) for (one, other), matrix in part.edges.items()])
    found = min_marginals(block, [*part.inputs, *part.outputs])
    return None if found is None else np.asarray(found.least).reshape(rows, columns)
