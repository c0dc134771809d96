"""Spaces of strategies: what is legal, enumerated as columns.

The uniform space holds every strategy that the degree shorthand can write for a model, a cluster and a workload (state
sharded over all data-parallel ranks): all divisors, not powers of two alone, at exactly the global batch asked for,
layers that do not divide included. Illegal strategies are never built. Spellings of one and the same strategy appear
once: `sp` only where tp > 1, ZeRO only where dp*cp > 1, schedules only where there is a pipeline to schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

import numpy as np

from meshwright.errors import Problem, nearest_name
from meshwright.graph import Graph
from meshwright.schedule import SCHEDULES, interleaved_legal
from meshwright.sharding import AxisRule
from meshwright.strategy import (
    Recompute,
    Shorthand,
    Spread,
    divisors,
    position_problems,
    replicates_kv,
    split_problems,
    spread_experts,
    tensor_axes,
    uniform_rules,
    uniform_splits,
)
from meshwright.workload import Workload

SCHEDULE_NAMES = tuple(SCHEDULES)
RECOMPUTES = tuple(Recompute)

#: The keys of a member, in canonical order; schedules and recomputation by their index in the tuples above.
KEYS = ("tp", "pp", "dp", "cp", "ep", "etp", "mbs", "vpp", "schedule", "zero", "recompute", "sp")

#: The keys that make a layout.
LAYOUT_KEYS = ("tp", "pp", "dp", "cp", "ep", "mbs")

Columns = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Pattern:
    """Strategies with the same splits: by whether tensor parallelism copies key/value heads and splits the sequence,
    by whether experts are spread over an axis of their own, and the degrees `over` whose ranks they are spread over."""

    replicate_kv: bool
    sequence_parallel: bool
    expert_axis: bool = False
    over: tuple[str, ...] = ()

    def rules(self) -> tuple[AxisRule, ...]:
        """The axis rules of the pattern."""
        rules = uniform_rules(replicate_kv=self.replicate_kv, sequence_parallel=self.sequence_parallel, over=self.over)
        return tuple(rule for rule in rules if rule.axis != "ep" or self.expert_axis)


@dataclass(frozen=True)
class Limits:
    """What a user will accept: keys that are fixed, and keys that are bounded from above."""

    fixed: Mapping[str, int]
    largest: Mapping[str, int]

    def allows(self, key: str, value: int) -> bool:
        """Whether a value of a key is within the limits."""
        return self.fixed.get(key, value) == value and value <= self.largest.get(key, value)

    def choices(self, key: str, values: Sequence[int]) -> list[int]:
        """Those of `values` that are within the limits."""
        return [value for value in values if self.allows(key, value)]


NO_LIMITS = Limits({}, {})


def limits_of(fixed: Mapping[str, Any], largest: Mapping[str, Any]) -> Limits:
    """Limits from the given parts of two shorthands, choices by index.

    >>> limits_of({"tp": 8, "schedule": "1F1B"}, {"mbs": 4}).fixed
    {'tp': 8, 'schedule': 1}
    """
    return Limits(_coded(fixed), _coded(largest))


def _coded(values: Mapping[str, Any]) -> dict[str, int]:
    codes: dict[str, Sequence[Any]] = {"schedule": SCHEDULE_NAMES, "recompute": RECOMPUTES}
    return {key: codes[key].index(value) if key in codes else value for key, value in values.items()}


@dataclass(frozen=True)
class Part:
    """Members of a space with one pattern: columns of layouts (`LAYOUT_KEYS`), and of members that point to them."""

    pattern: Pattern
    layouts: Columns
    layout_index: np.ndarray[Any, Any]
    vpp: np.ndarray[Any, Any]
    schedule: np.ndarray[Any, Any]


@dataclass(frozen=True)
class UniformSpace:
    """The uniform space of a model on a number of devices for a workload; see the module's docstring."""

    graph: Graph
    num_devices: int
    workload: Workload
    limits: Limits = NO_LIMITS
    name: str = "uniform"
    folds_experts: bool = False

    def parts(self) -> Iterator[Part]:
        """All members but for ZeRO level and recomputation, which combine freely with them (see `state_levels`)."""
        if position_problems(self.graph, self.workload):
            return
        found: dict[Pattern, list[tuple[int, ...]]] = {}
        for replicate_kv, sequence_parallel in product((False, True), repeat=2):
            if not self.limits.allows("sp", int(sequence_parallel)):
                continue
            pattern = Pattern(replicate_kv, sequence_parallel)
            for tp, cp in self._split_degrees(pattern):
                for pp, dp in self._rest(tp * cp):
                    for ep, spread in self._experts(tp, cp, dp):
                        own = replace(pattern, expert_axis=spread.axis > 1, over=spread.over)
                        found.setdefault(own, []).append((tp, pp, dp, cp, ep))
        for pattern, degrees in found.items():
            part = self._part(pattern, degrees)
            if len(part.vpp):
                yield part

    def state_levels(self) -> list[int]:
        """The ZeRO levels within the limits; level 0 alone where there are no ranks to shard state over."""
        return self.limits.choices("zero", range(4))

    def recomputes(self) -> list[Recompute]:
        """The kinds of recomputation within the limits."""
        return [kind for code, kind in enumerate(RECOMPUTES) if self.limits.allows("recompute", code)]

    def _split_degrees(self, pattern: Pattern) -> Iterator[tuple[int, int]]:
        """Degrees of tensor and context parallelism that divide what they split."""
        rules = [rule for rule in pattern.rules() if rule.axis.startswith(("tp", "cp"))]
        splits = uniform_splits(self.graph, rules)
        sizes = self.graph.sizes(1, self.workload.seq_len)
        for tp in self.limits.choices("tp", divisors(self.num_devices)):
            if replicates_kv(self.graph, tp) is not pattern.replicate_kv or (pattern.sequence_parallel and tp == 1):
                continue
            for cp in self.limits.choices("cp", divisors(self.num_devices // tp)):
                degrees = {**tensor_axes(self.graph, tp), "cp": cp}
                if not split_problems(self.graph, splits, sizes, degrees):
                    yield tp, cp

    def _experts(self, tp: int, cp: int, dp: int) -> Iterator[tuple[int, Spread]]:
        """Degrees of expert parallelism that divide experts and ranks, and what they span beside the `ep` axis."""
        ways = (0, 1) if self.folds_experts and tp > 1 else (0,)
        for ep in self.limits.choices("ep", divisors(self.graph.dims.get("experts", 1))):
            for etp in ways if ep > 1 else (0,):
                spread = spread_experts(ep, tp=tp, cp=cp, over_tp=etp == 1)
                # An ep that tp does not divide is not spread over it; the rest must be ranks that the axes have.
                fits = dp % spread.axis == 0 and dp * cp * (tp if etp else 1) % ep == 0
                if fits and ("tp" in spread.over) == etp and self.limits.allows("etp", etp):
                    yield ep, spread

    def _rest(self, inner: int) -> Iterator[tuple[int, int]]:
        """Pipeline and data-parallel degrees of what is left beside `inner` ranks."""
        for dp in self.limits.choices("dp", divisors(self.num_devices // inner)):
            pp = self.num_devices // inner // dp
            if self.workload.global_batch % dp == 0 and pp <= len(self.graph.sequence) and self.limits.allows("pp", pp):
                yield pp, dp

    def _part(self, pattern: Pattern, degrees: Sequence[tuple[int, ...]]) -> Part:
        layouts: list[tuple[int, ...]] = []
        members: list[tuple[int, int, int]] = []
        for tp, pp, dp, cp, ep in degrees:
            for mbs in self.limits.choices("mbs", divisors(self.workload.global_batch // dp)):
                num_microbatches = self.workload.global_batch // dp // mbs
                found = [(len(layouts), vpp, code) for vpp, code in self._pipelines(pp, num_microbatches)]
                if found:
                    layouts.append((tp, pp, dp, cp, ep, mbs))
                    members += found
        columns = np.array(layouts, dtype=np.int64).reshape(-1, len(LAYOUT_KEYS)).T
        index, vpp_column, schedule = np.array(members, dtype=np.int64).reshape(-1, 3).T
        return Part(pattern, dict(zip(LAYOUT_KEYS, columns, strict=True)), index, vpp_column, schedule)

    def _pipelines(self, pp: int, num_microbatches: int) -> Iterator[tuple[int, int]]:
        """Virtual stages and schedules that make a difference on `pp` ranks."""
        names = ("1F1B",) if pp == 1 else ("GPipe", "1F1B")
        for name in names:
            code = SCHEDULE_NAMES.index(name)
            if self.limits.allows("vpp", 1) and self.limits.allows("schedule", code):
                yield 1, code
        code = SCHEDULE_NAMES.index("Interleaved1F1B")
        if pp > 1 and self.limits.allows("schedule", code) and interleaved_legal(pp, num_microbatches):
            for vpp in self.limits.choices("vpp", range(2, len(self.graph.sequence) // pp + 1)):
                yield vpp, code


def shorthand_at(columns: Mapping[str, Any], row: int) -> Shorthand:
    """One member as a shorthand."""
    values: dict[str, Any] = {key: int(columns[key][row]) for key in KEYS}
    values["schedule"] = SCHEDULE_NAMES[values["schedule"]]
    values["recompute"] = RECOMPUTES[values["recompute"]]
    return Shorthand(**values)


def limit_problems(given: Mapping[str, Any], option: str) -> list[Problem]:
    """Keys that cannot be limited: the space has only their defaults, or their values have no order."""
    known = [item.name for item in fields(Shorthand) if item.name in KEYS]
    rule = f"the uniform space varies {', '.join(known)}"
    others = [key for key in given if key not in known and given[key] != getattr(Shorthand(), key)]
    problems = [Problem(option, f"{key}={given[key]}", rule, nearest_name(key, known)) for key in others]
    if option == "--max" and "schedule" in given:
        fixed = f"schedule={given['schedule']}"
        problems.append(Problem(option, fixed, "schedules have no order", f"--fix {fixed}"))
    return problems
