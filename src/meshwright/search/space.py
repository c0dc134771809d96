"""Spaces of strategies, enumerated as columns: what a space is, and the uniform one.

A space is a number of parts, each a grid: what combines freely stands on dims of its own. Spaces register under a name;
each is a file of its own.

The uniform space holds every strategy that the degree shorthand can write for a model, a cluster and a workload (state
sharded over all data-parallel ranks): all divisors, not powers of two alone, at exactly the global batch asked for,
layers that do not divide included. Illegal strategies are never built. Spellings of one and the same strategy appear
once: `sp` only where tp > 1, ZeRO only where dp*cp > 1, schedules only where there is a pipeline to schedule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import product
from typing import Any, ClassVar

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.layouts import Machine
from meshwright.errors import Problem, nearest_name
from meshwright.graph import Graph
from meshwright.registry import Registry
from meshwright.schedule import interleaved_legal
from meshwright.sharding import AxisRule
from meshwright.strategy import (
    Recompute,
    Shorthand,
    Spread,
    divisors,
    expand,
    position_problems,
    replicates_kv,
    split_problems,
    spread_experts,
    strategy_problems,
    tensor_axes,
    uniform_rules,
    uniform_splits,
)
from meshwright.workload import Workload

#: The schedules from which spaces choose; the others of `schedule.SCHEDULES` are predicted where a strategy names them.
SCHEDULE_NAMES = ("GPipe", "1F1B", "Interleaved1F1B")
RECOMPUTES = tuple(Recompute)

#: The keys of a member, in canonical order; schedules and recomputation by their index in the tuples above.
KEYS = ("tp", "pp", "dp", "cp", "ep", "etp", "mbs", "vpp", "schedule", "zero", "recompute", "sp")

#: The keys that make a layout.
LAYOUT_KEYS = ("tp", "pp", "dp", "cp", "ep", "mbs")

Columns = dict[str, np.ndarray[Any, Any]]

#: The dim that each axis splits, per block and operator.
Splits = Mapping[str, Mapping[str, Mapping[str, str]]]


@dataclass(frozen=True)
class Pattern:
    """Strategies with the same layouts: by whether tensor parallelism copies key/value heads and splits the sequence,
    whether what it gathers in the forward is kept, whether experts are spread over an axis of their own, and the
    degrees `over` whose ranks they are spread over."""

    replicate_kv: bool
    sequence_parallel: bool
    keep_gathered: bool = False
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

    def recomputes(self, kinds: Sequence[Recompute]) -> list[Recompute]:
        """Those of some kinds of recomputation that are within the limits."""
        return [kind for kind in kinds if self.allows("recompute", RECOMPUTES.index(kind))]


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
    """Members of a space with one pattern, as a grid: ZeRO levels x kinds of recomputation x what else the space
    chooses (a dim for each of `choices`, by its codes) x rows.

    A row is a layout (`layout_index` into columns of `LAYOUT_KEYS`) with its virtual stages and its schedule."""

    pattern: Pattern
    layouts: Columns
    layout_index: np.ndarray[Any, Any]
    vpp: np.ndarray[Any, Any]
    schedule: np.ndarray[Any, Any]
    levels: Sequence[int]
    recomputes: Sequence[Recompute]
    choices: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """The dims of the grid but for the rows."""
        return (len(self.levels), len(self.recomputes), *map(len, self.choices.values()))

    def codes(self) -> dict[str, Any]:
        """The codes of each choice along its own dim, with a dim for the rows behind them."""
        behind = range(len(self.choices), 0, -1)
        return {
            key: np.array(codes).reshape(-1, *(1,) * dims)
            for dims, (key, codes) in zip(behind, self.choices.items(), strict=True)
        }

    def columns(self, rows: Any) -> Columns:
        """The keys and choices of all members of some rows, one column each. Without ranks to shard over all ZeRO
        levels are one, and the first stands for them (see `distinct`)."""
        index, behind = self.layout_index[rows], (1,) * (len(self.choices) + 1)
        values = {
            **{key: column[index] for key, column in self.layouts.items()},
            "vpp": self.vpp[rows],
            "schedule": self.schedule[rows],
            "zero": np.array(self.levels).reshape(-1, 1, *behind),
            "recompute": np.array([RECOMPUTES.index(kind) for kind in self.recomputes]).reshape(-1, *behind),
            "sp": (self.layouts["tp"] > 1)[index] & self.pattern.sequence_parallel,
            "etp": np.array("tp" in self.pattern.over),
            **self.codes(),
        }
        return {key: self.distinct(rows, values[key]).astype(np.int32) for key in (*KEYS, *self.choices)}

    def distinct(self, rows: Any, values: Any) -> Any:
        """Values of the grid of some rows, whatever dims they lack, as one column of members that differ."""
        grid = np.broadcast_to(values, (*self.shape, len(rows)))
        shards = (self.layouts["dp"] * self.layouts["cp"])[self.layout_index[rows]]
        if not any(self.levels) or shards.min() > 1:
            return grid.reshape(-1)
        level = np.array(self.levels).reshape(-1, *(1,) * (grid.ndim - 1))
        return grid[np.broadcast_to((level == 0) | (shards > 1), grid.shape)]


#: Why members cannot run, apart from their memory: nothing, links that are missing or too few, a schedule that does not
#: take their number of microbatches, a degree that does not divide what it splits.
OBSTACLES = ("", "network", "schedule", "division")


@dataclass(frozen=True)
class Space(ABC):
    """Where a method looks: the members of a model on a number of devices for a workload, within limits.

    `varies` are the keys of the shorthand that differ between members. Without `whole_batch` a member takes the largest
    batch that its data-parallel ranks divide, and members are compared by their time for one sequence. `folds_experts`:
    see `engine.Defaults`."""

    graph: Graph
    num_devices: int
    workload: Workload
    limits: Limits = NO_LIMITS
    folds_experts: bool = False

    name: ClassVar[str]
    varies: ClassVar[tuple[str, ...]] = KEYS
    whole_batch: ClassVar[bool] = True

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """All members, as grids."""

    def problems(self) -> list[Problem]:
        """Why the space cannot be evaluated at all."""
        return []

    def machine(self, machine: Machine, part: Part) -> Machine:
        """A machine that does what the choices of a part say."""
        return machine

    def obstacles(self, machine: Machine, part: Part, rows: Any) -> Any:
        """What keeps members of some rows from running: indices into `OBSTACLES` that broadcast with the grid."""
        return 0

    def reason(self, cluster: Cluster, columns: Columns, row: int) -> str:
        """What keeps a member from running, with its numbers; nothing where nothing does."""
        shorthand = shorthand_at(columns, row)
        workload = replace(self.workload, global_batch=self.batch(shorthand.dp))
        problems = strategy_problems(expand(shorthand, self.graph), self.graph, self.num_devices, workload)
        return "; ".join(map(str, problems))

    def chosen(self, columns: Columns, row: int) -> dict[str, Any]:
        """What a member is besides its shorthand, in words."""
        return {}

    def batch(self, dp: Any) -> Any:
        """Sequences in a step of members with `dp` data-parallel ranks."""
        return self.workload.global_batch // dp * dp


SPACES: Registry[type[Space]] = Registry("space")


@dataclass(frozen=True)
class UniformSpace(Space):
    """The uniform space of a model on a number of devices for a workload; see the module's docstring."""

    name: ClassVar[str] = "uniform"

    def parts(self) -> Iterator[Part]:
        """All members."""
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

    def _split_degrees(self, pattern: Pattern) -> Iterator[tuple[int, int]]:
        """Degrees of tensor and context parallelism that divide what they split."""
        splits = degree_splits(self.graph, pattern)
        for tp in self.limits.choices("tp", divisors(self.num_devices)):
            if replicates_kv(self.graph, tp) is not pattern.replicate_kv or (pattern.sequence_parallel and tp == 1):
                continue
            for cp in self.limits.choices("cp", divisors(self.num_devices // tp)):
                if divides(self.graph, splits, self.workload.seq_len, tp, cp):
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
        pipelines = cache(lambda pp, num_microbatches: tuple(self._pipelines(pp, num_microbatches)))
        for tp, pp, dp, cp, ep in degrees:
            for mbs in self.limits.choices("mbs", divisors(self.workload.global_batch // dp)):
                num_microbatches = self.workload.global_batch // dp // mbs
                found = [(len(layouts), vpp, code) for vpp, code in pipelines(pp, num_microbatches)]
                if found:
                    layouts.append((tp, pp, dp, cp, ep, mbs))
                    members += found
        columns = np.array(layouts, dtype=np.int64).reshape(-1, len(LAYOUT_KEYS)).T
        index, vpp_column, schedule = np.array(members, dtype=np.int64).reshape(-1, 3).T
        return Part(
            pattern=pattern,
            layouts=dict(zip(LAYOUT_KEYS, columns, strict=True)),
            layout_index=index,
            vpp=vpp_column,
            schedule=schedule,
            levels=self.limits.choices("zero", range(4)),
            recomputes=self.limits.recomputes(RECOMPUTES),
        )

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


SPACES.add("uniform", UniformSpace)


def degree_splits(graph: Graph, pattern: Pattern) -> Splits:
    """What tensor and context parallelism split."""
    return uniform_splits(graph, [rule for rule in pattern.rules() if rule.axis.startswith(("tp", "cp"))])


def divides(graph: Graph, splits: Splits, seq_len: int, tp: int, cp: int = 1) -> bool:
    """Whether tensor and context parallelism of these degrees divide all that they split."""
    degrees = {**tensor_axes(graph, tp), "cp": cp}
    return not split_problems(graph, splits, graph.sizes(1, seq_len), degrees)


def shorthand_at(columns: Mapping[str, Any], row: int) -> Shorthand:
    """One member as a shorthand."""
    values: dict[str, Any] = {key: int(columns[key][row]) for key in KEYS}
    values["schedule"] = SCHEDULE_NAMES[values["schedule"]]
    values["recompute"] = RECOMPUTES[values["recompute"]]
    return Shorthand(**values)


def limit_problems(given: Mapping[str, Any], option: str, space: type[Space] = UniformSpace) -> list[Problem]:
    """Keys that cannot be limited: the space has only their defaults, or their values have no order."""
    known = [item.name for item in fields(Shorthand) if item.name in space.varies]
    rule = f"the {space.name} space varies {', '.join(known)}"
    others = [key for key in given if key not in known and given[key] != getattr(Shorthand(), key)]
    problems = [Problem(option, f"{key}={given[key]}", rule, nearest_name(key, known)) for key in others]
    if given.get("schedule", SCHEDULE_NAMES[0]) not in SCHEDULE_NAMES:
        rule = f"spaces choose from {', '.join(SCHEDULE_NAMES)}; estimate predicts the others"
        problems.append(Problem(option, f"schedule={given['schedule']}", rule))
    elif option == "--max" and "schedule" in given:
        fixed = f"schedule={given['schedule']}"
        problems.append(Problem(option, fixed, "schedules have no order", f"--fix {fixed}"))
    return problems
