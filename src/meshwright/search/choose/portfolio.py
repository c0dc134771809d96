"""All solvers at once on one instance: what one finds helps the others.

After reduction two threads work (compiled loops and HiGHS let go of Python's lock):

- the *bounder* raises the dual bound (`dual`). When that has settled it strikes out the strategies with which a choice
  would cost more than the best known (reduced-cost fixing) and, where that takes many, reduces again and starts anew;
  then it hands what is left to HiGHS (`ilp`) where it is small enough, and searches too where it is not;
- the *searcher* polishes the choices that the messages propose, keeps the best of them in a pool, and when no more come
  cools them one after the other (`local`).

They meet at a board with the best choice and the best bound. The end is the deadline, or no gap.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from meshwright.choice import Array, Instance, cost_of, is_legal
from meshwright.search.choose.ascent import Ascent, ascent, continued
from meshwright.search.choose.bounds import is_whole, rounded_up
from meshwright.search.choose.grid import Scaled, grid_of
from meshwright.search.choose.local import Search, search_of, warmth_of
from meshwright.search.choose.obstacles import infeasible
from meshwright.search.choose.reduce import Reduced, reduced
from meshwright.search.choose.solver import NOTHING, SOLVERS, Deadline, Report, Solved, better

#: With up to so many matrix entries the exact solver is asked.
EXACT_ENTRIES = 100_000

#: Reduction starts anew where so many of the strategies are hopeless.
WORTH_REDUCING = 0.05

#: Advances of the bound before the grid is cut at a guessed cost, and between two doublings of it.
GUESS_AFTER, DOUBLE_AFTER = 10, 50

#: Of the time, the part in which the searcher takes proposals, if the bound does not settle before.
PROPOSING_SHARE = 0.5

#: Choices kept in the pool.
POOL_SIZE = 6

#: Between two looks of the waiting thread at the clock and at Ctrl-C.
LOOK_EVERY_S = 0.1


@dataclass(frozen=True, eq=False)
class Stage:
    """The instance as far as it is reduced, and its grid."""

    small: Reduced
    scaled: Scaled


@dataclass(frozen=True, eq=False)
class Proposal:
    """A choice of a stage's instance that need not fit, and what its strategies' usage costs at the prices then."""

    stage: Stage
    choice_N: Array
    priced_C: Array


@dataclass(eq=False)
class Board:
    """What the threads tell each other, and the flag that ends them all."""

    instance: Instance
    report: Report | None
    best: Solved
    whole: bool
    stop: Array = field(default_factory=lambda: np.zeros(1, dtype=np.int64))
    proposal: Proposal | None = None
    settled: bool = False
    failures: list[BaseException] = field(default_factory=list)
    news: threading.Condition = field(default_factory=threading.Condition)

    def tell(self, choice_N: Array | None, bound: float) -> bool:
        """A choice of the original instance, or None, and a bound; whether the choice is legal."""
        cost = math.inf
        if choice_N is not None and is_legal(self.instance, choice_N):
            cost = cost_of(self.instance, choice_N)
        with self.news:
            found = better(self.best, Solved(choice_N if math.isfinite(cost) else None, cost, bound))
            bound = rounded_up(found.lower_bound, self.whole)
            # Bounds of sums of floats may come out a little above an optimum.
            found = replace(found, lower_bound=min(found.cost, bound) if math.isfinite(found.cost) else bound)
            better_now = found.cost < self.best.cost or found.lower_bound > self.best.lower_bound
            self.best = found
            if better_now and self.report is not None:
                self.report(found)
            if self.done:
                self.stop[0] = 1
            self.news.notify_all()
        return math.isfinite(cost)

    def propose(self, proposal: Proposal) -> None:
        """Something to polish."""
        with self.news:
            self.proposal = proposal
            self.news.notify_all()

    @property
    def done(self) -> bool:
        """Whether nothing better can be found (up to rounding, where costs are not whole)."""
        return self.best.gap <= (0.0 if self.whole else 1e-12) or self.best.is_infeasible

    @property
    def stopped(self) -> bool:
        """Whether the threads should end."""
        return bool(self.stop[0])


def solve(
    instance: Instance,
    deadline: Deadline,
    *,
    seed: int = 0,
    start: Array | None = None,
    report: Report | None = None,
) -> Solved:
    """The best that all find together; see the module's docstring."""
    small = reduced(instance)
    if small.infeasible:
        return infeasible(instance, "the reductions, each of which keeps an optimum, leave a node without a strategy")
    board = Board(instance, report, NOTHING, is_whole(instance))
    board.tell(start, -math.inf)
    stage = Stage(small, grid_of(small.instance))
    threads = [
        _thread(board, lambda: _bounder(board, stage, deadline, seed)),
        _thread(board, lambda: _searcher(board, deadline, seed)),
    ]
    try:
        with board.news:
            while not (deadline.passed or board.stopped or board.failures or not any(t.is_alive() for t in threads)):
                board.news.wait(min(LOOK_EVERY_S, deadline.left_s))
    finally:
        board.stop[0] = 1
    for thread in threads:
        thread.join(0.3)  # compiled loops look at the flag between moves and between sweeps
    if board.failures:
        raise board.failures[0]
    if board.best.is_infeasible:
        return infeasible(instance, "no choice is legal (proven by the exact solvers)")
    return board.best


def _thread(board: Board, work: Callable[[], None]) -> threading.Thread:
    """A running thread whose failure is not lost."""

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            with board.news:
                board.failures.append(error)
                board.news.notify_all()

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    return thread


# --- the bounder ----------------------------------------------------------------------------------------------------


def _bounder(board: Board, stage: Stage, deadline: Deadline, seed: int) -> None:
    """Stages of bounding, each on what the one before left; then exact solvers or search."""
    up = ascent(stage.scaled)
    while not up.settled:
        up = _raise_bound(board, stage, up, deadline)
        if board.stopped or deadline.passed:
            return
        smaller = _without_hopeless(board, stage, up)
        if smaller is not None:
            stage, up = smaller, ascent(smaller.scaled)
    with board.news:
        board.settled = True
        board.news.notify_all()
    if len(stage.small.instance.matrix_M) <= EXACT_ENTRIES:
        _exactly(board, stage, deadline, seed)
    if not board.stopped:
        _cool_pool(board, [], deadline, seed + 1)


def _raise_bound(board: Board, stage: Stage, up: Ascent, deadline: Deadline) -> Ascent:
    """Sweeps until the bound settles at its pace; tells bounds, proposes choices."""
    below, number, pace = math.inf, 0, up.pace
    while not (board.stopped or up.settled or deadline.passed or up.pace > pace):
        upper = board.best.cost
        sought = _sought(upper, below, up.bound, number)
        if sought != below:
            below, scaled = sought, grid_of(stage.small.instance, sought)
            up, stage = continued(up, scaled), Stage(stage.small, scaled)
        up.advance(board.stop, upper)
        number += 1
        # A proposal may be legal as it is; on the first run ever the loops that polish are not compiled by then.
        legal = cost_of(stage.small.instance, up.choice_N) < board.best.cost and up.fits
        board.tell(stage.small.restore(up.choice_N) if legal else None, up.bound)
        if not up.warming:
            board.propose(Proposal(stage, up.choice_N.copy(), up.priced()))
    return up


def _sought(upper: float, below: float, bound: float, number: int) -> float:
    """The cost at which the grid cuts costs: that of the best choice known, when it first is and each time it halves.

    While none is, a guess, such that forbidden strategies weigh about as much as all others together: too high a cut
    makes everything else look free, too low a one makes forbidden strategies look cheap. It doubles while none helps.
    """
    if math.isfinite(upper):
        return below if upper <= below <= 2.0 * upper else upper
    if number < GUESS_AFTER:
        return below
    return 2.0 * abs(bound) + 1.0 if math.isinf(below) else below * 2.0 if number % DOUBLE_AFTER == 0 else below


def _without_hopeless(board: Board, stage: Stage, up: Ascent) -> Stage | None:
    """The next stage, without the strategies that only dearer choices have; None where it is hardly smaller."""
    upper = board.best.cost
    if not math.isfinite(upper):
        return None
    instance = stage.small.instance
    # A choice that costs the same as the best known is not sought; whole costs differ by 1 at least.
    hopeless_C = up.hopeless(upper - (1 - 1e-6 if board.whole else 0.0), board.stop)
    if hopeless_C.sum() < WORTH_REDUCING * len(hopeless_C):
        return None
    left = reduced(instance, ~hopeless_C)
    if left.infeasible:  # nothing is cheaper
        board.tell(None, upper)
        return None
    small = Reduced(left.instance, (*stage.small.levels, *left.levels))
    return Stage(small, grid_of(small.instance, upper))


def _exactly(board: Board, stage: Stage, deadline: Deadline, seed: int) -> None:
    """Ask the exact solver."""
    instance = stage.small.instance

    def tell(found: Solved) -> None:
        choice_N = None if found.choice_N is None else stage.small.restore(found.choice_N)
        # What was struck out on the way costs at least the best known, so a bound counts up to that.
        board.tell(choice_N, min(found.lower_bound, board.best.cost))

    from meshwright.search.choose import ilp  # here: HiGHS is an extra

    found = ilp.solve(instance, deadline, seed=seed, report=tell)
    tell(found)


# --- the searcher ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Found:
    """A polished choice of a stage."""

    cost: float
    stage: Stage
    choice_N: Array
    priced_C: Array


def _searcher(board: Board, deadline: Deadline, seed: int) -> None:
    """Polish proposals while they come, then cool the best of them."""
    pool: list[Found] = []
    proposing = deadline.part(PROPOSING_SHARE)
    last: Proposal | None = None
    serial = 0
    while not (board.stopped or proposing.passed or (board.settled and pool)):
        with board.news:
            while not (board.stopped or deadline.passed) and (
                board.proposal is None or (board.proposal is last and not board.settled)
            ):
                board.news.wait(LOOK_EVERY_S)
            proposal = board.proposal
        if proposal is None or board.stopped:
            return
        last, serial = proposal, serial + 1
        found = _polished(board, proposal, deadline, seed + 1000 * serial)
        if found is not None:
            pool = sorted([*pool, found], key=lambda one: one.cost)[:POOL_SIZE]
    if board.proposal is not None and not board.stopped:
        _cool_pool(board, pool, deadline, seed)


def _polished(board: Board, proposal: Proposal, deadline: Deadline, seed: int) -> Found | None:
    search = search_of(proposal.stage.scaled.grid, proposal.priced_C, seed, board.stop)
    search.begin(proposal.choice_N)
    search.polish(deadline)
    return _told(board, proposal.stage, search)


def _told(board: Board, stage: Stage, search: Search) -> Found | None:
    """The best of a search, told to the board."""
    choice_N = search.choice_N
    if choice_N is None:
        return None
    if not board.tell(stage.small.restore(choice_N), -math.inf):
        return None  # something forbidden is in it
    return Found(search.cost + stage.scaled.constant, stage, choice_N, search.priced_C)


def _cool_pool(board: Board, pool: list[Found], deadline: Deadline, seed: int) -> None:
    """Cool the choices of the pool in turn, the worst of which leaves with each better one, until the deadline."""
    if not pool:
        proposal = board.proposal
        found = None if proposal is None else _polished(board, proposal, deadline, seed)
        pool = [found] if found is not None else []
    turn = 0
    while pool and not (board.stopped or deadline.passed):
        begin = pool[turn % len(pool)]
        search = search_of(begin.stage.scaled.grid, begin.priced_C, seed + 17 * turn, board.stop)
        search.begin(begin.choice_N)
        span = deadline.part(min(1.0, max(0.2, 1.0 / (1 + len(pool)))))
        search.cool(warmth_of(search.cost, len(begin.choice_N)), span)
        found = _told(board, begin.stage, search)
        if found is not None and found.cost < begin.cost:
            pool[turn % len(pool)] = found
            pool = sorted(pool, key=lambda one: one.cost)[: max(1, len(pool) - 1)]
        turn += 1


SOLVERS.add("portfolio", solve)
