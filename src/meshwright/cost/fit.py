"""Constants from measured runs: a robust least-squares fit of all rows at once, with priors.

What is fitted and what is believed before any run is seen stands in `data/priors.json`. A number of an engine or a
device is its generic value (what such things have in common, the value of one without runs) with a deviation of its
own, so that ten runs of a new engine move what they tell of and leave the rest where others put it: a hierarchical
model, solved for its mode. A parameter that no run determines stays at its prior.

Residuals are logarithms of predicted over measured, of step times and of peak memory. Each is bounded by Cauchy's loss,
for some published runs stalled; each source of n runs weighs as sqrt(n), for a sweep of a thousand runs of one cluster
tells less than ten clusters do. Needs SciPy (`pip install 'meshwright[fit]'`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from meshwright.cluster import Quantity
from meshwright.cost.analytic import Batch, Case, batch_of, evaluate_batch, grouped
from meshwright.cost.constants import Constants, constants
from meshwright.cost.layouts import Machine, machine_of
from meshwright.engine import Engine

#: Where a residual starts to count for less: about twice what is left after a good fit.
TIME_SCALE = 0.08
MEMORY_SCALE = 0.05

#: A residual of so much weighs as a parameter one spread off its prior, in a source of one run.
PRIOR_SCALE = 0.014

#: The same where a few runs of one engine are to tell of it: they are off for reasons that no parameter has.
FEW_RUNS_PRIOR_SCALE = 0.03

#: How far the first step may lead, in spreads: priors are far from the best point in many directions at once.
FIRST_STEP = 8.0

#: Step of the numeric derivative, in spreads.
STEP = 1e-3

#: Whose a number is.
Owner = Literal["constants", "device", "engine"]


@dataclass(frozen=True)
class Prior:
    """What is believed of a number before runs are seen.

    `at` is `constants`, `device` or `engine`, `name` a key there (`memory.gaps` of what it holds). On its `scale`, its
    logarithm, log-odds, or itself where it may be 0, the generic value lies `spread` around `prior`, and that of each
    device or engine `deviation` around the generic one, from where their documentation has it in `own`. With `only`
    there is no generic value, but one for each of those named.
    """

    at: Owner
    name: str
    prior: float
    spread: float
    scale: Literal["log", "logit", "linear"]
    source: str
    deviation: float = 0.0
    only: tuple[str, ...] = ()
    own: tuple[tuple[str, float], ...] = ()

    def value(self, offset: float, of: str = "*") -> float:
        """The number at an offset from the prior on the scale."""
        prior = dict(self.own).get(of, self.prior)
        if self.scale == "log":
            return prior * math.exp(offset)
        if self.scale == "logit":
            return 1 / (1 + (1 - prior) / prior * math.exp(-offset))
        return max(prior + offset, 0.0)


@cache
def priors() -> tuple[Prior, ...]:
    """The priors that come with the package."""
    import importlib.resources

    text = (importlib.resources.files("meshwright") / "data" / "priors.json").read_text(encoding="utf-8")
    return tuple(
        Prior(**{**row, "only": tuple(row.get("only", ())), "own": tuple(row.get("own", {}).items())})
        for row in json.loads(text)
    )


@dataclass(frozen=True)
class Key:
    """One fitted number: a prior's generic value (`of` is `*`), or what one device or engine has of its own."""

    prior: Prior
    of: str

    @property
    def spread(self) -> float:
        """How far it may lie from where it is expected, on its scale."""
        return self.prior.spread if self.of == "*" or self.prior.only else self.prior.deviation

    @property
    def is_generic(self) -> bool:
        """Whether devices or engines have deviations from it."""
        return self.of == "*" and self.prior.deviation > 0

    def __str__(self) -> str:
        where = "" if self.prior.at == "constants" else f" {self.of}"
        return f"{self.prior.at}{where} {self.prior.name}"


def architecture(device: str) -> str:
    """Devices that differ in memory alone are one.

    >>> architecture("A100-SXM-40GB")
    'A100'
    """
    return device.split("-")[0]


@dataclass(frozen=True)
class Runs:
    """Measured runs: what they are, seconds and bytes (NaN where not measured), and the source of each."""

    cases: Sequence[Case]
    step_time_s: np.ndarray[Any, Any]
    peak_memory_bytes: np.ndarray[Any, Any]
    sources: Sequence[str]

    def only(self, rows: Iterable[int]) -> Runs:
        """Some of the runs."""
        index = list(rows)
        return Runs(
            [self.cases[row] for row in index],
            self.step_time_s[index],
            self.peak_memory_bytes[index],
            [self.sources[row] for row in index],
        )


@dataclass(frozen=True)
class Offsets:
    """A point of the fit: how far each number lies from its prior, in spreads."""

    keys: tuple[Key, ...]
    x: np.ndarray[Any, Any]

    def owners(self, prior: Prior) -> set[str]:
        """Devices or engines with a deviation of their own."""
        return {key.of for key in self.keys if key.prior is prior and key.of != "*"}

    def value(self, prior: Prior, of: str) -> float:
        """A number of a device or engine, deviation included where it has one; the generic one of `*`."""
        offset = sum(
            key.spread * float(x)
            for key, x in zip(self.keys, self.x, strict=True)
            if key.prior is prior and key.of in ("*", of)
        )
        return prior.value(offset, of)

    def constants(self, known: Constants) -> Constants:
        """The package's constants with what was fitted."""
        found: dict[str, Any] = {prior.name: self.value(prior, "*") for prior in self._priors("constants")}
        generic = {f"{prior.name}_share": self.value(prior, "*") for prior in self._priors("device")}
        found |= {name: value for name, value in generic.items() if hasattr(known, name)}
        return replace(known, **found)

    def engine(self, engine: Engine) -> Engine:
        """An engine with what was fitted for it, or for engines in general."""
        changes: dict[str, Any] = {"exposed": dict(engine.exposed)}
        for prior in self._priors("engine"):
            if prior.only and engine.name not in prior.only:
                continue
            within, _, name = prior.name.rpartition(".")
            value = self.value(prior, engine.name)
            if within == "exposed":
                changes["exposed"][name] = value
            elif within:
                changes[within] = replace(changes.get(within, getattr(engine, within)), **{name: value})
            else:
                changes[name] = value
        return replace(engine, **changes)

    def efficiency(self, device: str) -> dict[str, Quantity]:
        """The shares of its peaks that a device reaches."""
        of = architecture(device)
        mine = [prior for prior in self._priors("device") if not prior.only or of in prior.only]
        return {prior.name: Quantity(self.value(prior, of), "[fit]") for prior in mine}

    def case(self, case: Case, engines: dict[str, Engine] | None = None) -> Case:
        """A run with its engine and device as this point of the fit sees them; `engines` keeps those made before."""
        kept = {} if engines is None else engines
        engine = kept.setdefault(case.engine.name, self.engine(case.engine))
        groups = tuple(
            replace(group, device=replace(device, efficiency={**device.efficiency, **self.efficiency(device.name)}))
            for group, device in ((group, group.device) for group in case.cluster.groups)
        )
        return replace(case, engine=engine, cluster=replace(case.cluster, groups=groups))

    def machine(self, case: Case, known: Constants) -> Machine:
        """What a run is priced on, as this point of the fit sees it."""
        seen = self.case(case)
        return machine_of(seen.cluster, seen.engine, seen.workload, known)

    def runs(self, runs: Runs) -> Runs:
        """Runs whose engines and devices are as this point of the fit sees them."""
        engines: dict[str, Engine] = {}
        return replace(runs, cases=[self.case(case, engines) for case in runs.cases])

    def _priors(self, at: str) -> list[Prior]:
        return list(dict.fromkeys(key.prior for key in self.keys if key.prior.at == at))


@dataclass(frozen=True)
class Fit:
    """What a fit found: the point, and how well it is determined (covariance of `offsets.x`)."""

    offsets: Offsets
    covariance: np.ndarray[Any, Any]
    num_evaluations: int


def keys_for(cases: Sequence[Case]) -> tuple[Key, ...]:
    """The numbers that runs may tell of: constants and generic values, and one of each engine and device among them."""
    engines = sorted({case.engine.name for case in cases})
    devices = sorted({architecture(case.cluster.slowest_device.name) for case in cases})
    found = []
    for prior in priors():
        if prior.spread and not prior.only:
            found.append(Key(prior, "*"))
        names = prior.only or (engines if prior.at == "engine" else devices)
        present = engines if prior.at == "engine" else devices
        if prior.at != "constants" and (prior.deviation or prior.only):
            found += [Key(prior, name) for name in names if name in present]
    return tuple(found)


def own_keys(
    cases: Sequence[Case], known: Constants, of: Sequence[Owner] = ("constants", "device", "engine")
) -> tuple[Key, ...]:
    """What a few runs may tell of their cluster and their engine: how far these lie from what is known of them.

    Every number that the engine or the device has of its own, around its present value, and how much slower its runs
    are all together; and the shares of bandwidth that collectives get (`of` = `constants`)."""
    found = []
    for prior in (PACE, *priors()):
        if prior.at == "constants":
            if prior.name in LINK_SHARES and prior.at in of:
                found.append(Key(replace(prior, prior=getattr(known, prior.name)), "*"))
            continue
        for case in {_owner(prior, case): case for case in cases if prior.at in of}.values():
            owner, spread = _owner(prior, case), prior.deviation or prior.spread
            value = _present(prior, case, known)
            if value is not None and (not prior.only or owner in prior.only):
                found.append(
                    Key(replace(prior, prior=value, spread=spread, deviation=0.0, only=(owner,), own=()), owner)
                )
    return tuple(found)


#: What is common to all runs of an engine on one's own machine; many sources at once tell nothing of it.
PACE = Prior("engine", "pace", 1.0, 0.2, "log", "[derived] what sources that a fit never saw are off together")

#: What collectives get of the bandwidth of a cluster's levels.
LINK_SHARES = ("inner_link_share", "outer_link_share")


def _owners(prior: Prior, runs: Runs) -> set[str]:
    return {_owner(prior, case) for case in runs.cases}


def _owner(prior: Prior, case: Case) -> str:
    return case.engine.name if prior.at == "engine" else architecture(case.cluster.slowest_device.name)


def _present(prior: Prior, case: Case, known: Constants) -> float | None:
    """The present value of a number of an engine or a device; None where it has none."""
    if prior.at == "device":
        efficiency = case.cluster.slowest_device.efficiency
        generic: float | None = getattr(known, f"{prior.name}_share", None)
        return efficiency[prior.name].value if prior.name in efficiency else generic
    within, _, name = prior.name.rpartition(".")
    if within == "exposed":
        return case.engine.exposed.get(name)
    value: float = getattr(getattr(case.engine, within) if within else case.engine, name)
    return value


def at_priors(keys: Sequence[Key]) -> Offsets:
    """The point at which nothing was seen."""
    return Offsets(tuple(keys), np.zeros(len(keys)))


class _Model:
    """Runs in groups that are priced together, under any point of the fit."""

    def __init__(self, runs: Runs, known: Constants) -> None:
        self.runs = runs
        self.known = known
        self.rows = grouped(runs.cases)
        self.batches = [batch_of([runs.cases[row] for row in rows]) for rows in self.rows]

    def touches(self, key: Key, batch: Batch) -> bool:
        """Whether a number has a part in the price of a batch."""
        return key.of in ("*", _owner(key.prior, batch.cases[0]))

    def predict(self, offsets: Offsets, key: Key | None = None, base: Any = None) -> Any:
        """Logarithms of seconds and bytes, 2 x runs; with `key` only where that has a part, else as in `base`."""
        found = np.zeros((2, len(self.runs.cases))) if base is None else base.copy()
        known = offsets.constants(self.known)
        for rows, batch in zip(self.rows, self.batches, strict=True):
            if key is None or self.touches(key, batch):
                columns = evaluate_batch(batch, offsets.machine(batch.cases[0], known)).columns
                for line, column in enumerate((columns.step_time_s, columns.peak_memory_bytes)):
                    found[line, rows] = np.log(np.broadcast_to(column, (1, 1, len(rows)))[0, 0])
        return found


def predict(runs: Runs, offsets: Offsets, known: Constants | None = None) -> Any:
    """Seconds and bytes of runs at a point of the fit, 2 x runs."""
    return np.exp(_Model(runs, known or constants()).predict(offsets))


def fit(
    runs: Runs,
    keys: Sequence[Key] | None = None,
    known: Constants | None = None,
    *,
    prior_scale: float = PRIOR_SCALE,
    num_evaluations: int = 24,
    progress: Callable[[int], None] | None = None,
) -> Fit:
    """The point that explains runs best: of `keys`, or of all that they may tell of; what else there is stays as it is
    in the runs' engines and devices and in the constants `known`. A residual of `prior_scale` weighs as a number one
    spread off its prior."""
    from scipy.optimize import least_squares

    model = _Model(runs, known or constants())
    begin = at_priors(keys or keys_for(runs.cases))
    measured = np.log(np.stack([runs.step_time_s, runs.peak_memory_bytes]))
    seen = np.isfinite(measured)
    scale = np.where(seen, [[TIME_SCALE], [MEMORY_SCALE]], 1.0)
    weight = _weights(runs, seen)
    summed = [key for key in begin.keys if key.is_generic and _owners(key.prior, runs) <= begin.owners(key.prior)]
    last: dict[str, Any] = {"evaluations": 0}

    def predicted(x: Any) -> Any:
        if "x" not in last or not np.array_equal(last["x"], x):
            last.update(x=x.copy(), y=model.predict(Offsets(begin.keys, x)), evaluations=last["evaluations"] + 1)
            if progress:
                progress(last["evaluations"])
        return last["y"]

    def residuals(x: Any) -> Any:
        off = np.where(seen, predicted(x) - measured, 0.0) / scale
        return np.concatenate([off[seen], x])

    def jacobian(x: Any) -> Any:
        base = predicted(x)
        slopes: dict[Key, Any] = {}  # of the logarithms by an offset on the scale
        for index, key in enumerate(begin.keys):
            if key not in summed:
                moved = x.copy()
                moved[index] += STEP
                slopes[key] = (model.predict(Offsets(begin.keys, moved), key, base) - base) / STEP / key.spread
        for key in begin.keys:
            if key in summed:  # it moves all of its own at once
                slopes[key] = sum(slopes[own] for own in slopes if own.prior is key.prior)
        columns = [(key.spread * slopes[key] / scale)[seen] for key in begin.keys]
        return np.vstack([np.array(columns).T, np.eye(len(x))])

    squares = (weight * scale**2)[seen]

    def loss(z: Any) -> Any:
        """Cauchy's for runs, in each one's weight, and squares for priors; with the first two derivatives."""
        runs_z, priors_z = z[: len(squares)], z[len(squares) :]
        inside = 1 + runs_z
        zero, one = np.zeros_like(priors_z), np.full_like(priors_z, prior_scale**2)
        return np.array(
            [
                np.concatenate([squares * np.log(inside), prior_scale**2 * priors_z]),
                np.concatenate([squares / inside, one]),
                np.concatenate([-squares / inside**2, zero]),
            ]
        )

    found = least_squares(
        residuals, begin.x, jac=jacobian, loss=loss, x_scale=FIRST_STEP, ftol=1e-4, xtol=1e-4, max_nfev=num_evaluations
    )
    # TRF leaves `jac` scaled by the loss, so that J'J is the curvature of the cost.
    covariance = np.linalg.inv(found.jac.T @ found.jac + 1e-12 * np.eye(len(found.x)))
    return Fit(Offsets(begin.keys, found.x), prior_scale**2 * covariance, last["evaluations"])


def _weights(runs: Runs, seen: Any) -> Any:
    """1 / sqrt(n) for each of the n measured times of a source, and of the n of its measured peaks of memory."""
    weight = np.zeros(seen.shape)
    names = np.array(runs.sources)
    for name in set(runs.sources):
        for line in range(len(seen)):
            own = (names == name) & seen[line]
            weight[line, own] = 1 / math.sqrt(max(own.sum(), 1))
    return weight
