"""How short a schedule can be at best, in closed form: no search, one pass over the actions and one sort a rank.

Each action has a *head*, the earliest that it can start, and a *tail*, the least time from its end to the end of all:
longest paths over what must come before what. A rank runs its actions one at a time, each between its head and its
tail; were it allowed to interrupt them, running the one with the longest tail first would be best (Carlier, "The
one-machine sequencing problem", European Journal of Operational Research 11, 1982, section 3: the bound equals, over
sets of actions, the largest of least head + work + least tail). The longest such rank bounds the whole.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from meshwright.search.auto.pipeline import IntArray, Whole, chain, needs


@dataclass(frozen=True)
class Window:
    """Heads and tails, `[letter, microbatch]`, in units of the times."""

    head_Lm: IntArray
    tail_Lm: IntArray


def window(times: Whole) -> Window:
    """The head and the tail of each action."""
    m, duration_L = times.num_microbatches, times.duration_L
    head_Lm = np.zeros((len(duration_L), m), dtype=np.int64)
    tail_Lm = np.zeros_like(head_Lm)
    order, known = chain(times.num_stages), needs(times)
    before = {letter: [need for need in known if need.letter == letter] for letter in order}
    after = {letter: [need for need in known if need.needs == letter] for letter in order}
    for k in range(m):
        for letter in order:
            ready = [
                head_Lm[need.needs, k - need.behind] + duration_L[need.needs] + need.lag
                for need in before[letter]
                if k >= need.behind
            ]
            head_Lm[letter, k] = max(ready, default=0)
    for k in reversed(range(m)):
        for letter in reversed(order):
            left = [
                tail_Lm[need.letter, k + need.behind] + duration_L[need.letter] + need.lag
                for need in after[letter]
                if k + need.behind < m
            ]
            tail_Lm[letter, k] = max(left, default=0)
    return Window(head_Lm, tail_Lm)


def least_makespan(times: Whole, within: Window) -> int:
    """The bound, in units of the times: the longest path, or the rank that takes longest."""
    longest = int((within.head_Lm + times.duration_L[:, None] + within.tail_Lm).max())
    ranks = (np.flatnonzero(times.rank_L == rank) for rank in range(len(times.most_P)))
    return max(longest, *(_one_rank(times.duration_L, within, letters) for letters in ranks))


def _one_rank(duration_L: IntArray, within: Window, letters: IntArray) -> int:
    jobs = sorted(
        (int(within.head_Lm[letter, k]), int(within.tail_Lm[letter, k]), int(duration_L[letter]))
        for letter in letters
        for k in range(within.head_Lm.shape[1])
    )
    open_jobs: list[tuple[int, int]] = []  # (- tail, work left)
    now = bound = at = 0
    while at < len(jobs) or open_jobs:
        if not open_jobs:
            now = max(now, jobs[at][0])
        while at < len(jobs) and jobs[at][0] <= now:
            heapq.heappush(open_jobs, (-jobs[at][1], jobs[at][2]))
            at += 1
        negative_tail, left = heapq.heappop(open_jobs)
        until = jobs[at][0] if at < len(jobs) else now + left
        worked = min(left, until - now)
        now += worked
        if worked < left:
            heapq.heappush(open_jobs, (negative_tail, left - worked))
        else:
            bound = max(bound, now - negative_tail)
    return bound
