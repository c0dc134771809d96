"""The solvers of the choice problem on the space of operators, and the method that is taken where none is named.

- `elimination`: exact by dynamic programming over a tree decomposition. It holds OptCNN (Jia et al. 2018,
  arXiv:1802.04924) and PaSE (Elango 2021): the same minimum, found by eliminating nodes of the same graph in another
  order, so they have no methods of their own. Where memory binds, prices of memory give a bound and a choice.
- `ilp`: Alpa's integer program within one mesh (Zheng et al. 2022, arXiv:2201.12023, section 4.2), with memory over
  time and costs of computation, which the paper leaves out.
- `beam`, `annealing`, `portfolio`: see `search.choose`.
- `operators`: elimination, which mostly proves the optimum at once; what gap memory leaves, an integer program closes;
  and where tables are too large or a gap stays, the portfolio of solvers goes on from there until the deadline.

All minimise the time of a step within memory. State may lie in finer shards than its parameter (ZeRO-1 and 2), which
every other method of this package leaves out but `megatron`.
"""

from __future__ import annotations

import importlib
import math

from meshwright.choice import Array
from meshwright.search.choose.solver import SOLVERS, Solved, Solver, better
from meshwright.search.place import EXACT, Placing, place
from meshwright.search.placing.answer import Found, Method, Posed, no_room, or_usual

#: Of the time, what elimination and the integer program get before the portfolio goes on.
FIRST_SHARE = 0.6


def by_solver(solver: str) -> Method:
    """The method that asks one solver."""

    def method(posed: Posed) -> Found:
        return _found(_placed(posed, solver, 1.0))

    return method


def operators(posed: Posed) -> Found:
    """See the module's docstring."""
    deadline = or_usual(posed.deadline)
    placing = _placed(posed, "elimination", FIRST_SHARE)
    if placing.gap <= EXACT or placing.lower_bound_s == math.inf or deadline.passed:
        return _found(placing)
    with posed.watch.phase("portfolio"):
        solve = _solver("portfolio")
        start = placing.choice_N
        more = solve(placing.space.instance, deadline, seed=posed.question.seed, start=start)
    return _better(placing, more)


def _solver(name: str) -> Solver:
    importlib.import_module(f"meshwright.search.choose.{name}")  # it registers itself
    return SOLVERS[name]


def _placed(posed: Posed, solver: str, share: float) -> Placing:
    _solver(solver)
    question = posed.question
    placing = place(
        question.graph,
        posed.mesh,
        posed.machine,
        question.workload,
        solver=solver,
        with_state=True,
        with_recompute=question.with_recompute,
        deadline=or_usual(posed.deadline).part(share),
        seed=question.seed,
    )
    posed.watch.phases_s.update(placing.phases_s)
    return placing


def _found(placing: Placing) -> Found:
    return Found(
        () if placing.strategy is None else (placing.strategy,),
        placing.statement,
        1,
        lower_bound_s=placing.lower_bound_s,
        exhaustive=placing.gap <= EXACT,
        reasons=(*no_room(placing.space), *placing.reasons)[:1],
        num_members=placing.space.num_strategies,
    )


def _better(placing: Placing, more: Solved) -> Found:
    """The better of what was found before and by the portfolio, with the better bound."""
    known = Solved(placing.choice_N, placing.cost_s, placing.lower_bound_s)
    both = better(known, more)
    if both.choice_N is placing.choice_N and both.lower_bound <= placing.lower_bound_s:
        return _found(placing)
    choice_N: Array | None = both.choice_N
    size = f"{len(placing.space.nodes)} operators and tensors"
    text = f"at most {both.gap:.2%} above the optimum" if math.isfinite(both.lower_bound) else "best found"
    text = "optimal" if both.gap <= EXACT else text
    return Found(
        () if choice_N is None else (placing.space.strategy(choice_N),),
        f"{text} among {size} (portfolio)",
        1,
        lower_bound_s=both.lower_bound,
        exhaustive=both.gap <= EXACT,
        reasons=both.reasons if choice_N is None else (),
        num_members=placing.space.num_strategies,
    )
