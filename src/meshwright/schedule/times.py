"""Times of a schedule's actions as people write them: one for all stages, or one for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.schedule.action import Action, ActionKind

#: Names of times, and what they are where not given.
DEFAULTS = {"F": 1.0, "I": 1.0, "W": 1.0, "p2p": 0.0}


@dataclass(frozen=True)
class StageTimes:
    """Times of a forward, an input gradient and a weight gradient: one of all stages, or one of each. A full backward
    takes both gradients. A message between ranks takes `p2p`. All in one unit."""

    forward: tuple[float, ...]
    input: tuple[float, ...]
    weight: tuple[float, ...]
    p2p: float

    def by_stage(self, num_stages: int) -> tuple[tuple[float, ...], ...]:
        """The times of each stage: forwards, input gradients, weight gradients; raises `InputError` where there is
        another number of them."""
        named = {"F": self.forward, "I": self.input, "W": self.weight}
        problems = [
            Problem(
                "--times", f"{name} with {len(given)} values", f"one for all, or one for each of {num_stages} stages"
            )
            for name, given in named.items()
            if len(given) not in (1, num_stages)
        ]
        if problems:
            raise InputError(problems)
        return tuple(given * num_stages if len(given) == 1 else given for given in named.values())

    def of(self, num_stages: int) -> Callable[[Action], float]:
        """The time of each action of a table with so many stages."""
        forward, input_, weight = self.by_stage(num_stages)

        def seconds(action: Action) -> float:
            match action.kind:
                case ActionKind.F:
                    return forward[action.stage]
                case ActionKind.I:
                    return input_[action.stage]
                case ActionKind.W:
                    return weight[action.stage]
                case ActionKind.B:
                    return input_[action.stage] + weight[action.stage]
            return 0.0

        return seconds


def parse_times(text: str, num_stages: int | None = None) -> StageTimes:
    """Read `F=1,I=1,W=1,p2p=0`, of which each may be left out; `F=1/2/1` gives each of three stages its own.

    >>> parse_times("F=2,W=0.5/1").weight
    (0.5, 1.0)
    """
    given: dict[str, tuple[float, ...]] = {}
    problems = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        key, _, values = (piece.strip() for piece in part.partition("="))
        if key not in DEFAULTS:
            rule = f"times are {', '.join(DEFAULTS)}"
            problems.append(Problem("--times", part, rule, nearest_name(key, DEFAULTS) or "F=1,I=1,W=1,p2p=0"))
        elif key in given:
            problems.append(Problem("--times", part, f"{key} is there twice"))
        else:
            numbers = tuple(_number(value) for value in values.split("/"))
            if any(number is None for number in numbers) or (key == "p2p" and len(numbers) > 1):
                rule = "is one time, finite and at least 0" if key == "p2p" else "times are finite and at least 0"
                problems.append(Problem("--times", part, rule, f"{key}={DEFAULTS[key]:g}"))
            else:
                given[key] = tuple(number for number in numbers if number is not None)
    if problems:
        raise InputError(problems)
    times = {key: given.get(key, (default,)) for key, default in DEFAULTS.items()}
    found = StageTimes(times["F"], times["I"], times["W"], times["p2p"][0])
    if num_stages is not None:
        found.by_stage(num_stages)
    return found


#: Longer is taken for a slip of the finger; sums of such times stay finite.
MAX_TIME = 1e30


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0 <= value <= MAX_TIME else None
