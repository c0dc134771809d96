"""What a rank did when: start and end of every action of a step, by the clock that all processes of a machine share.

`time.perf_counter` is CLOCK_MONOTONIC on Linux and counts alike in all processes of one host; times of several hosts
cannot be compared. An action's time starts when its messages have arrived, so waiting lies between the actions; what
tensor or data parallelism says within an action is a part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

from meshwright.results import Ran
from meshwright.schedule import Action, compute_parts, parse_action

Result = TypeVar("Result")


@dataclass
class Recorder:
    """The actions of the step under way, in the order in which they ended."""

    ran: list[Ran] = field(default_factory=list)

    def __call__(self, action: str, work: Callable[[], Result]) -> Result:
        """Do the work and remember when."""
        start_s = time.perf_counter()
        result = work()
        self.ran.append(Ran(action, start_s, time.perf_counter()))
        return result

    def take(self) -> tuple[Ran, ...]:
        """What ran since the last time."""
        ran, self.ran = tuple(self.ran), []
        return ran


def in_rows_words(ran: Sequence[Ran], row: Sequence[Action]) -> Iterator[Ran]:
    """What ran, with the parts of each overlapped action of the table's row joined to one that spans them.

    >>> row = [parse_action("(2F0;1B0)OVERLAP_F_B"), parse_action("1W0")]
    >>> print(*in_rows_words([Ran("2F0", 0, 1), Ran("1B0", 2, 3), Ran("1W0", 3, 4)], row), sep="\\n")
    Ran(action='(2F0;1B0)OVERLAP_F_B', start_s=0, end_s=3)
    Ran(action='1W0', start_s=3, end_s=4)
    """
    left = iter(ran)
    for action in row:
        spans = list(islice(left, len(compute_parts(action))))
        joined = replace(action, parts=tuple(parse_action(span.action) for span in spans)) if action.parts else None
        yield Ran(str(joined or spans[0].action), spans[0].start_s, spans[-1].end_s)


def from_first_start(timeline: Sequence[Sequence[Ran]]) -> tuple[tuple[Ran, ...], ...]:
    """All ranks' actions with times counted from the earliest start of any."""
    first_s = min((ran.start_s for row in timeline for ran in row), default=0.0)
    return tuple(
        tuple(replace(ran, start_s=ran.start_s - first_s, end_s=ran.end_s - first_s) for ran in row) for row in timeline
    )
