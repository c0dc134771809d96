"""An engine or a cluster as a few of its own measured runs show them, and how much that helps on runs left out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from meshwright.bench.refit import determined, measured
from meshwright.bench.runs import Row, Skipped, read_rows
from meshwright.cluster import Cluster, Quantity
from meshwright.cost.analytic import Case
from meshwright.cost.constants import Constants, constants
from meshwright.cost.fit import FEW_RUNS_PRIOR_SCALE, Key, Offsets, Owner, Runs, at_priors, fit, own_keys, predict
from meshwright.engine import Engine
from meshwright.errors import InputError, Problem

#: Fewer runs than this leave nothing to learn from and to try it on.
MIN_RUNS = 2

#: So many parts are left out in turn; of fewer runs each one.
MAX_PARTS = 10

#: What each kind of file can say.
SAYS: dict[str, tuple[Owner, ...]] = {"engine": ("engine",), "cluster": ("constants", "device")}


@dataclass(frozen=True)
class Calibration:
    """What runs showed: the engine and the cluster (that of the largest run), and the median errors of runs in percent,
    before, and after calibration with the others; None where nothing was measured."""

    engine: Engine
    cluster: Cluster
    num_runs: int
    before_pct: float | None
    after_pct: float | None
    memory_before_pct: float | None
    memory_after_pct: float | None
    skipped: tuple[Skipped, ...]


def nouns_of(paths: Sequence[str]) -> dict[str, str]:
    """Which noun goes to which file, by the word in its name; raises `InputError` where that does not say it."""
    rule = "runs become an engine or a cluster: one of these words in the file's name says which"
    problems = [] if paths else [Problem("--out", "", rule, "engine.json")]
    nouns: dict[str, str] = {}
    for path in paths:
        named = [noun for noun in SAYS if noun in Path(path).name.lower()]
        if len(named) != 1:
            problems.append(Problem("--out", path, rule, "engine.json"))
        elif named[0] in nouns:
            problems.append(Problem("--out", path, f"a second file for the {named[0]}", nouns[named[0]]))
        else:
            nouns[named[0]] = path
    if problems:
        raise InputError(problems)
    return nouns


def calibrate(path: str, nouns: Sequence[str]) -> Calibration:
    """Calibrate what files of these nouns (`engine`, `cluster`) can say; raises `InputError` where runs cannot tell."""
    rows = list(read_rows(path))
    kept, runs = measured(rows)
    _refuse(path, kept, runs, nouns)
    of = tuple(owner for noun in nouns for owner in SAYS[noun])
    known = constants()
    keys = own_keys(runs.cases, known, of)
    whole = fit(runs, keys, known, prior_scale=FEW_RUNS_PRIOR_SCALE)
    found, told = whole.offsets, determined(whole)
    before, after = predict(runs, at_priors(()), known), _left_out(runs, keys, known)
    largest = max(found.runs(runs).cases, key=lambda case: case.cluster.num_devices)
    source = f"[measured] {len(kept)} runs of {Path(path).name}"
    return Calibration(
        engine=_engine(largest, told, source),
        cluster=_cluster(largest, found, told, known, source),
        num_runs=len(kept),
        before_pct=_median_pct(before[0], runs.step_time_s),
        after_pct=_median_pct(after[0], runs.step_time_s),
        memory_before_pct=_median_pct(before[1], runs.peak_memory_bytes),
        memory_after_pct=_median_pct(after[1], runs.peak_memory_bytes),
        skipped=tuple(row for row in rows if isinstance(row, Skipped)),
    )


def _refuse(path: str, kept: Sequence[Row], runs: Runs, nouns: Sequence[str]) -> None:
    """Raise where runs are too few, or of more than one of what they are to tell of."""
    problems = []
    if len(kept) < MIN_RUNS:
        rule = f"calibration needs at least {MIN_RUNS} runs that can be predicted and have a step time or a peak memory"
        problems.append(Problem(path, f"{len(kept)} runs", rule))
    groups = {
        "engine": {case.engine.name for case in runs.cases},
        "cluster": {case.cluster.slowest_device.name for case in runs.cases},
    }
    words = {"engine": "engine", "cluster": "accelerator"}
    for noun in nouns:
        if len(groups[noun]) > 1:
            rule = f"runs of one {words[noun]} tell of it: give each a file"
            problems.append(Problem(path, ", ".join(sorted(groups[noun])), rule))
    if problems:
        raise InputError(problems)


def _left_out(runs: Runs, keys: Sequence[Key], known: Constants) -> Any:
    """Each run as the others predict it, 2 x runs: parts dealt at random, the same at every call."""
    num_runs = len(runs.cases)
    order = np.random.default_rng(0).permutation(num_runs)
    found = np.zeros((2, num_runs))
    for part in np.array_split(order, min(num_runs, MAX_PARTS)):
        rest = np.setdiff1d(order, part)
        found[:, part] = predict(
            runs.only(part), fit(runs.only(rest), keys, known, prior_scale=FEW_RUNS_PRIOR_SCALE).offsets, known
        )
    return found


def _median_pct(predicted: Any, seen: Any) -> float | None:
    told = np.isfinite(seen)
    return 100 * float(np.median(np.abs(predicted[told] / seen[told] - 1))) if told.any() else None


def _engine(case: Case, told: Iterable[Key], source: str) -> Engine:
    """The engine of a run; what runs told of says so."""
    names = dict.fromkeys(key.prior.name.split(".")[0] for key in told if key.prior.at == "engine")
    return replace(case.engine, sources={**case.engine.sources, **dict.fromkeys(names, source)})


def _cluster(case: Case, found: Offsets, told: Iterable[Key], known: Constants, source: str) -> Cluster:
    """The cluster of a run; what runs told of its device and its links says so."""
    shares, names = found.constants(known), {key.prior.name for key in told}
    (group, *others) = case.cluster.groups
    efficiency = {
        name: replace(quantity, source=source) if name in names else quantity
        for name, quantity in group.device.efficiency.items()
    }
    levels = []
    for index, level in enumerate(case.cluster.levels):
        name = "outer_link_share" if index else "inner_link_share"
        if name in names:
            bandwidth = Quantity(getattr(shares, name) * level.bandwidth_Bps.value, source)
            level = replace(level, bandwidth_Bps=bandwidth)
        levels.append(level)
    device = replace(group.device, efficiency=efficiency)
    return replace(case.cluster, groups=(replace(group, device=device), *others), levels=tuple(levels))
