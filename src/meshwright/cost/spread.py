"""How far off a prediction may be: intervals that hold 80 % of runs, from how runs fell that a fit never saw.

The errors of such runs are taken as Laplace's: their logarithms have heavy tails, for some published runs stalled. The
half-width of an interval is that of what is well known, and more, root of squares, for each thing that no run told of.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cache

from meshwright.cluster import Device
from meshwright.engine import Engine
from meshwright.graph import Graph

#: Share of runs that an interval is to hold.
COVERAGE = 0.8

#: Half-width of the interval over the scale of Laplace's distribution: -ln(1 - coverage).
WIDTHS_OF_SCALE = -math.log(1 - COVERAGE)  # [derived]


@dataclass(frozen=True)
class Unknowns:
    """What no measured run told of, when a prediction is made; experts are known, but little."""

    engine: bool = False
    device: bool = False
    experts: bool = False


@dataclass(frozen=True)
class Width:
    """Half-widths of an interval, as logarithms: of what is well known, and of each thing unknown."""

    known: float
    engine: float
    device: float
    experts: float

    def of(self, unknowns: Unknowns) -> float:
        """The half-width of a prediction."""
        more = (getattr(self, item.name) * getattr(unknowns, item.name) for item in fields(Unknowns))
        return math.hypot(self.known, *more)


@dataclass(frozen=True)
class Spread:
    """Of step times, of peak memory, and of the ratio of two step times on one machine, of which much is shared."""

    step_time: Width
    peak_memory: Width
    ratio: float
    source: str


@cache
def spread() -> Spread:
    """What comes with the package; `bench.leave_out` writes it."""
    import importlib.resources

    text = (importlib.resources.files("meshwright") / "data" / "spread.json").read_text(encoding="utf-8")
    data = json.loads(text)
    return Spread(Width(**data["step_time"]), Width(**data["peak_memory"]), data["ratio"], data["source"])


def unknowns(graph: Graph, device: Device, engine: Engine) -> Unknowns:
    """What runs told nothing of: the sources of an engine's and a device's numbers say it."""
    return Unknowns(
        engine=not _was_measured(engine.sources.values()),
        device=not _was_measured(quantity.source for quantity in device.efficiency.values()),
        experts=bool(graph.dims.get("experts")),
    )


def _was_measured(sources: Iterable[str]) -> bool:
    return any(source.startswith(("[fit", "[measured")) for source in sources)


def interval(value: float, width: float) -> tuple[float, float]:
    """The bounds between which the truth lies with the probability `COVERAGE`."""
    return value * math.exp(-width), value * math.exp(width)


def probability_below(limit: float, value: float, width: float) -> float:
    """The probability that the truth of a predicted value is at most a limit.

    >>> probability_below(2.0, 2.0, 0.1), round(probability_below(2.0 * math.exp(0.1), 2.0, 0.1), 9)
    (0.5, 0.9)
    """
    away = math.log(limit / value) / width * WIDTHS_OF_SCALE
    return 1 - math.exp(-away) / 2 if away >= 0 else math.exp(away) / 2


def is_tied(one: float, other: float) -> bool:
    """Whether the order of two predicted step times of the same work on the same machine may well be the other way:
    with a probability of more than 1 - `COVERAGE`."""
    return 1 - COVERAGE < probability_below(other, one, spread().ratio) < COVERAGE
