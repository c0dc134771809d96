"""FlexFlow: a random walk over the splits of all operators (Markov chain Monte Carlo).

Z. Jia, M. Zaharia, A. Aiken, "Beyond Data and Model Parallelism for Deep Neural Networks", MLSys 2019,
arXiv:1807.05358. A strategy gives each operator a configuration out of its sample, operator, attribute and parameter
dims (SOAP, section 4). Section 6: Metropolis-Hastings; the proposal picks an operator at random and replaces its
configuration by a random one, which is symmetric, so that it is accepted with probability min(1, exp(beta (cost(S) -
cost(S*)))). Searches begin from data parallelism and from random strategies; one ends when its time is over, or when
the best has not become better for half of the time so far.

It minimises the time of a step, by its simulator there and by this evaluator here; no bound. What we changed:
- a configuration splits the axes of a mesh, where the paper maps the pieces of an operator to any devices;
- where tensors lie between operators is chosen best for every state: the paper's data go from producer to reader;
- the paper has no memory. Here using it has a price at each time, nothing at first; after each part of a search it
  rises at the time at which the current state is most over the limit, and falls where that is below. The best states of
  the last parts get tensors at rest that fit, chosen exactly, and the fastest that fits is the answer;
- time is counted in proposals, so that the same seed gives the same answer unless the deadline comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from meshwright.choice import Array, Instance
from meshwright.search.choose.solver import NOTHING, Deadline, better
from meshwright.search.choose.times import timeline
from meshwright.search.operators import OperatorSpace
from meshwright.search.placing.answer import Found, Posed, choice_of
from meshwright.search.placing.classics import data_parallel_rows
from meshwright.search.placing.narrow import settled
from meshwright.search.placing.wiring import Sides, sides_of

#: Searches from random strategies, after the one from data parallelism.
RANDOM_STARTS = 2

#: Proposals for each operator in one search at most, and parts in which prices stay.
PROPOSALS = 1000
PARTS = 15

#: beta times the cost of the best state of the start: a step that is longer by a thousandth is taken once in e.
SHARPNESS = 1000.0

#: What is over the limit costs at first so much of the cost of the start; after each part that ends over the limit its
#: price rises by one factor, after others it falls by another.
FIRST, RISE, FALL = 0.03, 3.0, 0.7

#: The last parts of a search whose best states get tensors at rest chosen exactly.
KEPT = 4


def walk(posed: Posed) -> Found:
    """The fastest strategy that the walks met and that fits."""
    space = posed.space()
    sides = sides_of(space)
    generator = np.random.default_rng(posed.question.seed)
    best, proposals, reasons = NOTHING, 0, NOTHING.reasons
    for start_N in _starts(space, generator):
        if proposals and posed.deadline.passed:
            break
        search = Search(space.instance, sides, start_N, generator)
        search.run(posed.deadline)
        proposals += search.proposals
        for splits in search.candidates():
            solved = settled(space.instance, sides.operators, splits, posed.deadline, below=best.cost)
            best, reasons = better(best, solved), solved.reasons
    statement = f"best of {proposals:,} proposals of a random walk over {len(sides.operators)} operators; no bound"
    return choice_of(posed, space, best.choice_N, statement, num_looked_at=proposals, reasons=reasons)


def _starts(space: OperatorSpace, generator: np.random.Generator) -> Iterator[Array]:
    sizes = space.instance.num_strategies_N
    first = np.zeros(len(sizes), dtype=np.int64)
    for node, row in data_parallel_rows(space).items():
        first[node] = row
    yield first
    for _ in range(RANDOM_STARTS):
        yield generator.integers(sizes)


class Search:
    """One chain. `choice_N` is the state (of what lies at rest it says nothing); `beside` what each placement at rest
    costs beside the operators as they are."""

    def __init__(self, instance: Instance, sides: Sides, start_N: Array, generator: np.random.Generator) -> None:
        self.instance, self.sides, self.generator = instance, sides, generator
        self.line = timeline(instance)
        self.choice_N = start_N.copy()
        self.price_T = np.zeros(self.line.num_times)
        self.proposals = 0
        self.met: list[tuple[int, ...]] = []
        self._price()
        self.unit_s = self.cost()

    def run(self, deadline: Deadline) -> None:
        """Walk in parts of equal length; see the module's docstring for when it ends."""
        length = max(1, PROPOSALS * len(self.sides.operators) // PARTS)
        best, found_at = math.inf, 0
        for _ in range(PARTS):
            least = self._part(length, deadline)
            changed = self._raise()  # costs at other prices do not compare
            if changed or least < best * (1 - 1e-9):
                best, found_at = (math.inf if changed else least), self.proposals
            if deadline.passed or self.proposals > 2 * found_at + length:
                return

    def candidates(self) -> list[Array]:
        """The best states of the last parts and the last state, each once."""
        return [self._whole(splits) for splits in dict.fromkeys((*self.met[-KEPT:], self._splits()))]

    def _splits(self) -> tuple[int, ...]:
        return tuple(self.choice_N[list(self.sides.operators)].tolist())

    def _whole(self, splits: Sequence[int]) -> Array:
        choice_N = np.zeros_like(self.choice_N)
        choice_N[list(self.sides.operators)] = splits
        return choice_N

    def cost(self) -> float:
        """Priced cost of the state, everything at rest lying where it costs least."""
        operators, near = self.sides.operators, self.sides.near
        total = sum(self.costs[node][self.choice_N[node]] for node in operators)
        for node in operators:
            for other, matrix in near[node].items():
                if other > node and other not in self.beside:
                    total += matrix[self.choice_N[node], self.choice_N[other]]
        return float(total + sum(column.min() for column in self.beside.values()))

    def _price(self) -> None:
        instance = self.instance
        costs_C = instance.cost_C + self.line.priced(self.price_T)
        self.costs = np.split(costs_C, instance.first_N[1:-1])
        self.beside = {
            node: self.costs[node] + sum(m[:, self.choice_N[other]] for other, m in self.sides.near[node].items())
            for node in self.sides.resting
        }

    def _part(self, length: int, deadline: Deadline) -> float:
        """Some proposals at the same prices; returns the least cost met."""
        operators, choice_N = self.sides.operators, self.choice_N
        nodes = self.generator.integers(len(operators), size=length)
        draws, chances = self.generator.random(length), self.generator.random(length)
        cost = least = self.cost()
        beta, best = SHARPNESS / self.unit_s, self._splits()
        for place, draw, chance in zip(nodes.tolist(), draws.tolist(), chances.tolist(), strict=True):
            node = operators[place]
            to = int(draw * len(self.costs[node]))
            self.proposals += 1
            if to != choice_N[node]:
                rise, beside = self._rise(node, to)
                if rise <= 0 or chance < math.exp(-beta * rise):
                    choice_N[node] = to
                    self.beside.update(beside)
                    cost += rise
                    if cost < least * (1 - 1e-12):
                        least, best = cost, self._splits()
            if self.proposals % 256 == 0 and deadline.passed:
                break
        self.met.append(best)
        return least

    def _rise(self, node: int, to: int) -> tuple[float, dict[int, Array]]:
        """By how much the cost rises where an operator takes another split, and what lies beside it then costs."""
        now, beside = self.choice_N[node], {}
        rise = self.costs[node][to] - self.costs[node][now]
        for other, matrix in self.sides.near[node].items():
            before = self.beside.get(other)
            if before is None:
                column = self.choice_N[other]
                rise += matrix[to, column] - matrix[now, column]
            else:
                after = before + (matrix[to] - matrix[now])
                rise += after.min() - before.min()
                beside[other] = after
        return float(rise), beside

    def _raise(self) -> bool:
        """Prices for the next part; whether they changed."""
        whole_N = self.choice_N.copy()
        for node, column in self.beside.items():
            whole_N[node] = int(column.argmin())
        if not self.line.num_times:
            return False
        over_T = self.line.used(whole_N) - self.line.most
        worst = int(over_T.argmax())  # of neighbours that rise and fall together one is enough
        price_T = np.where(over_T < 0, self.price_T * FALL, self.price_T)
        if over_T[worst] > 0:
            price_T[worst] = max(RISE * self.price_T[worst], FIRST * self.unit_s / over_T[worst])
        changed = not np.array_equal(price_T, self.price_T)
        self.price_T = price_T
        self._price()
        return changed
