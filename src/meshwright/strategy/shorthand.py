"""The degree shorthand: a uniform strategy in one line, and how its text is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.schedule import SCHEDULES
from meshwright.strategy.record import Recompute

#: The degrees whose product is the number of devices.
PRODUCT = ("tp", "pp", "dp", "cp")


@dataclass(frozen=True)
class Shorthand:
    """A uniform strategy by its degrees. `dp` is the whole data-parallel degree; `dp_shard` (0: all of it where zero
    is at least 1) the part over which state is sharded. Experts are spread over `ep` of the dp*cp ranks, and each is
    split over `etp` of the tensor-parallel ones (0: all); with etp=1 the experts are spread over the tp ranks too."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    mbs: int = 1
    vpp: int = 1
    schedule: str = "1F1B"
    zero: int = 0
    recompute: Recompute = Recompute.NONE
    sp: int = 0
    dp_shard: int = 0
    etp: int = 0

    def __str__(self) -> str:
        parts = {item.name: getattr(self, item.name) for item in fields(self)}
        return ",".join(f"{key}={value}" for key, value in parts.items() if value or key not in ("dp_shard", "etp"))

    @property
    def num_devices(self) -> int:
        """Devices that the degrees ask for."""
        degrees: list[int] = [getattr(self, name) for name in PRODUCT]
        return math.prod(degrees)

    @property
    def state_degree(self) -> int:
        """Data-parallel ranks over which state is sharded."""
        return self.dp_shard or (self.dp if self.zero else 1)

    @property
    def spread(self) -> Spread:
        """How experts are spread."""
        return spread_experts(self.ep, tp=self.tp, cp=self.cp, over_tp=self.etp == 1)


@dataclass(frozen=True)
class Spread:
    """Over which ranks experts are spread: `axis` ranks of the `ep` axis, and all ranks of the degrees `over`."""

    axis: int
    over: tuple[str, ...]


def spread_experts(ep: int, *, tp: int, cp: int, over_tp: bool) -> Spread:
    """Neighbours first, as Megatron-Core folds its groups: tensor-parallel ranks (where `over_tp`), those of context
    parallelism, then data-parallel ones, which make up the `ep` axis.

    >>> spread_experts(32, tp=2, cp=1, over_tp=True)
    Spread(axis=16, over=('tp',))
    """
    over = []
    for root, degree in (("tp", tp if over_tp else 1), ("cp", cp)):
        if degree > 1 and ep % degree == 0 and ep > 1:
            over.append(root)
            ep //= degree
    return Spread(ep, tuple(over))


def with_folded_experts(shorthand: Shorthand) -> Shorthand:
    """Experts spread over the tensor-parallel ranks too, where `ep` needs them and `etp` is not given."""
    fits = shorthand.dp * shorthand.cp % shorthand.ep == 0
    return shorthand if fits or shorthand.etp else replace(shorthand, etp=1)


def parse_shorthand(text: str) -> Shorthand:
    """Read `tp=8,pp=4,...`; every fault is named at once.

    >>> str(parse_shorthand("tp=2,pp=2,sp=1"))
    'tp=2,pp=2,dp=1,cp=1,ep=1,mbs=1,vpp=1,schedule=1F1B,zero=0,recompute=none,sp=1'
    """
    return Shorthand(**parse_shorthand_keys(text))


def parse_shorthand_keys(text: str) -> dict[str, Any]:
    """The keys that a shorthand gives, with their values."""
    known = [item.name for item in fields(Shorthand)]
    values: dict[str, str] = {}
    problems = []
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not key or not value or "=" in value:
            problems.append(Problem("strategy", repr(part), "each part is key=value", "tp=2,pp=2,dp=1"))
        elif key not in known:
            problems.append(Problem(key, value, f"not a key; keys: {', '.join(known)}", nearest_name(key, known)))
        elif key in values:
            problems.append(Problem(key, value, f"given twice (before: {values[key]})", f"{key}={values[key]}"))
        else:
            values[key] = value
    parsed = {}
    for key, value in values.items():
        try:
            parsed[key] = _PARSERS.get(key, _positive)(key, value)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return parsed


def _positive(key: str, value: str) -> int:
    return _integer(key, value, 1, 10**9)


def _integer(key: str, value: str, low: int, high: int) -> int:
    rule = f"a whole number from {low} to {high}" if high < 10**9 else f"a whole number, at least {low}"
    if not (value.isascii() and value.isdigit()) or len(value) > 12:
        raise InputError([Problem(key, value, rule, f"{key}={low}")])
    if not low <= int(value) <= high:
        raise InputError([Problem(key, value, rule, f"{key}={min(max(int(value), low), high)}")])
    return int(value)


def _choice(key: str, value: str, known: Iterable[str]) -> str:
    names = list(known)
    if value not in names:
        lowered = {name.lower(): name for name in names}
        nearest = lowered.get(value.lower()) or nearest_name(value, names)
        raise InputError([Problem(key, value, f"known: {', '.join(names)}", f"{key}={nearest}" if nearest else None)])
    return value


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "zero": lambda key, value: _integer(key, value, 0, 3),
    "sp": lambda key, value: _integer(key, value, 0, 1),
    "schedule": lambda key, value: _choice(key, value, SCHEDULES),
    "recompute": lambda key, value: Recompute(_choice(key, value, [kind.value for kind in Recompute])),
}
