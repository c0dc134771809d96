"""How well runs are predicted that the fit never saw: `python -m meshwright.bench.leave_out [RUNS.csv] [--only NAME]`.

Each source is left out whole, and of the largest source each width of its models; the fit sees the rest, predicts what
was left out, and is then calibrated with three random runs of it, as a stranger would. Prints Markdown; `--jobs N` fits
N folds at once (each takes minutes), `--write` puts the widths of error bars that follow into `data/spread.json`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from meshwright.bench.refit import DATA, PUBLISHED, measured
from meshwright.bench.runs import Row, read_rows
from meshwright.bench.validate import Compared, Prediction, SourceErrors, comparable_by, errors_of
from meshwright.cost.constants import Constants, constants
from meshwright.cost.fit import FEW_RUNS_PRIOR_SCALE, Offsets, Runs, architecture, fit, keys_for, own_keys, predict
from meshwright.cost.spread import COVERAGE, WIDTHS_OF_SCALE, Unknowns, Width

#: Runs with which a fold is calibrated, and how many random choices of them.
NUM_CALIBRATING = 3
NUM_DRAWS = 5

#: Steps of the fit: enough for residuals to stand still to a tenth of a percent.
NUM_EVALUATIONS = 16

#: An unmeasured device is off by at least this: its rate of products may lie so far from that of others. The folds
#: have one device that no other source has, which is too few to tell.
DEVICE_WIDTH = 0.13  # [derived] 1.28 deviations of `matmul` in data/priors.json


@dataclass(frozen=True)
class Fold:
    """Runs left out together."""

    name: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class LeftOut:
    """How a fold fell: the fit that never saw it, logarithms of predicted over measured (NaN where not measured), what
    was unknown of each run, and the median errors in percent that are left after each calibration with a few runs."""

    fold: Fold
    offsets: Offsets
    compared: tuple[Compared, ...]
    time_residuals: Any
    memory_residuals: Any
    unknowns: tuple[Unknowns, ...]
    calibrated_pct: tuple[float, ...]

    @property
    def errors(self) -> SourceErrors:
        """As `validate` counts them."""
        return errors_of(self.fold.name, self.compared)


def folds(rows: Sequence[Row]) -> list[Fold]:
    """Each source, and each width of the models of the largest."""
    by_source: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_source[row.source].append(index)
    found = [Fold(source, tuple(members)) for source, members in sorted(by_source.items())]
    ((largest, _),) = Counter(row.source for row in rows).most_common(1)
    widths: dict[int, list[int]] = defaultdict(list)
    for index in by_source[largest]:
        widths[rows[index].setup.hidden].append(index)
    if len(widths) > 1:
        found += [Fold(f"{largest}, hidden {width}", tuple(members)) for width, members in sorted(widths.items())]
    return found


def leave_out(fold: Fold, rows: Sequence[Row], runs: Runs) -> LeftOut:
    """Fit without a fold, and predict it."""
    kept = sorted(set(range(len(rows))) - set(fold.rows))
    # Numbers of an engine or a device that only the fold has are keys too: they stay at their priors, for what the
    # package's files say of them may have been fitted to the fold.
    found = fit(runs.only(kept), keys_for(runs.cases), num_evaluations=NUM_EVALUATIONS).offsets
    left, known = found.runs(runs.only(fold.rows)), found.constants(constants())
    seconds, bytes_ = predict(left, Offsets((), np.zeros(0)), known)
    compared = tuple(Compared(rows[index], Prediction(seconds[at], bytes_[at])) for at, index in enumerate(fold.rows))
    return LeftOut(
        fold=fold,
        offsets=found,
        compared=compared,
        time_residuals=np.log(seconds / left.step_time_s),
        memory_residuals=np.log(bytes_ / left.peak_memory_bytes),
        unknowns=_unknown_to(runs, kept, fold),
        calibrated_pct=tuple(_calibrated(left, known)),
    )


def _calibrated(runs: Runs, known: Constants) -> Iterator[float]:
    """Median errors of the other runs after calibration with a few."""
    generator = np.random.default_rng(0)
    timed = np.flatnonzero(np.isfinite(runs.step_time_s))
    if len(timed) <= NUM_CALIBRATING:
        return
    for _ in range(NUM_DRAWS):
        few = generator.choice(timed, NUM_CALIBRATING, replace=False)
        rest = runs.only(np.setdiff1d(timed, few))
        keys = own_keys([runs.cases[row] for row in few], known)
        own = fit(runs.only(few), keys, known, prior_scale=FEW_RUNS_PRIOR_SCALE).offsets
        seconds, _ = predict(rest, own, known)
        yield 100 * float(np.median(np.abs(seconds / rest.step_time_s - 1)))


def _unknown_to(runs: Runs, kept: Sequence[int], fold: Fold) -> tuple[Unknowns, ...]:
    """What the kept runs told nothing of, for each left-out one."""
    engines = {runs.cases[row].engine.name for row in kept}
    devices = {architecture(runs.cases[row].cluster.slowest_device.name) for row in kept}
    return tuple(
        Unknowns(
            engine=case.engine.name not in engines,
            device=architecture(case.cluster.slowest_device.name) not in devices,
            experts=bool(case.graph.dims.get("experts")),
        )
        for case in (runs.cases[row] for row in fold.rows)
    )


# --- error bars -----------------------------------------------------------------------------------------------------


def widths(parts: Sequence[tuple[Any, Sequence[Unknowns]]]) -> Width:
    """The half-widths under which residuals are most likely, scaled so that they hold the nominal share of them. Each
    fold weighs the same: what a stranger meets is another source, not another run of a sweep."""
    from scipy.optimize import minimize

    parts = [(residuals, known) for residuals, known in parts if np.isfinite(residuals).any()]
    seen = [np.isfinite(residuals) for residuals, _ in parts]
    off = np.concatenate([np.abs(residuals[own]) for (residuals, _), own in zip(parts, seen, strict=True)])
    weight = np.concatenate([np.full(own.sum(), 1 / own.sum()) for own in seen])
    features = np.concatenate([_features(known)[own] for (_, known), own in zip(parts, seen, strict=True)])
    present = features.any(axis=0)

    def cost(logs: Any) -> float:
        width = np.sqrt(features @ np.where(present, np.exp(2 * logs), 0.0))
        return float((weight * (np.log(width) + WIDTHS_OF_SCALE * off / width)).sum())

    found = minimize(cost, np.full(features.shape[1], math.log(0.1)), method="Nelder-Mead", options={"maxiter": 4000})
    squares = np.where(present, np.exp(2 * found.x), 0.0)
    scaled = np.sqrt(squares) * _weighted_quantile(off / np.sqrt(features @ squares), weight)
    return Width(*(float(f"{value:.3g}") for value in scaled))


def _features(known: Sequence[Unknowns]) -> Any:
    return np.array([[True, *(getattr(own, item.name) for item in fields(Unknowns))] for own in known], dtype=float)


def coverage(residuals: Any, known: Sequence[Unknowns], width: Width) -> float | None:
    """Share of residuals that intervals hold."""
    seen = np.isfinite(residuals)
    inside = [abs(value) <= width.of(own) for value, own in zip(residuals[seen], np.array(known)[seen], strict=True)]
    return float(np.mean(inside)) if inside else None


def ratio_width(found: Sequence[LeftOut]) -> float:
    """Half-width of the ratio of two steps of comparable runs of an engine that the fit saw: what is left of their
    residuals without the set's median, each fold with the same weight, times the square root of two."""
    left, weight = [], []
    for one in found:
        sets: dict[object, list[float]] = defaultdict(list)
        for own, residual, unknown in zip(one.compared, one.time_residuals, one.unknowns, strict=True):
            if not unknown.engine:
                sets[comparable_by(own.row)].append(residual)
        apart = [abs(value - np.median(own)) for own in sets.values() if len(own) > 2 for value in own]
        left += apart
        weight += [1 / max(len(apart), 1)] * len(apart)
    return float(f"{math.sqrt(2) * _weighted_quantile(np.array(left), np.array(weight)):.3g}")


def _weighted_quantile(values: Any, weight: Any) -> float:
    """The value below which the nominal share of the weight lies."""
    order = np.argsort(values)
    place = int(np.searchsorted(np.cumsum(weight[order]), COVERAGE * weight.sum()))
    return float(values[order][min(place, len(order) - 1)])


def to_spread(found: Sequence[LeftOut], source: str) -> dict[str, Any]:
    """What `data/spread.json` holds."""
    step_time = widths([(one.time_residuals, one.unknowns) for one in found])
    return {
        "step_time": asdict(replace(step_time, device=max(step_time.device, DEVICE_WIDTH))),
        "peak_memory": asdict(_memory_width(found)),
        "ratio": ratio_width(found),
        "source": source,
    }


def _memory_width(found: Sequence[LeftOut]) -> Width:
    """Memory is told by too few sources to tell devices and experts apart: they add nothing there."""
    plain = [(one.memory_residuals, [Unknowns(engine=own.engine) for own in one.unknowns]) for one in found]
    return widths(plain)


def held(found: Sequence[LeftOut]) -> dict[str, float]:
    """Coverage of each fold's step times by intervals that the other folds gave."""
    shares: dict[str, float] = {}
    for one in found:
        others = [(other.time_residuals, other.unknowns) for other in found if other is not one]
        share = coverage(one.time_residuals, one.unknowns, widths(others)) if others else None
        if share is not None:
            shares[one.fold.name] = share
    return shares


# --- table ----------------------------------------------------------------------------------------------------------


def table(found: Sequence[LeftOut], shares: Mapping[str, float]) -> str:
    """The folds as Markdown: errors in percent, then coverage."""
    lines = [
        "| left out | runs | median | mean | bias | tau | peak memory | after calibration with 3 runs | in 80 % bars |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        errors = one.errors
        after = f"{np.median(one.calibrated_pct):.1f}" if one.calibrated_pct else "-"
        cells = (
            one.fold.name,
            f"{errors.n:,}",
            _cell(errors.median_ape_pct, ".1f"),
            _cell(errors.mape_pct, ".1f"),
            _cell(errors.bias_pct, "+.1f"),
            _cell(errors.kendall_tau, ".2f"),
            _cell(errors.memory_median_ape_pct, ".1f"),
            after,
            _cell(shares.get(one.fold.name), ".0%"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def run(path: Path, only: Sequence[str], jobs: int) -> list[LeftOut]:
    """All folds, or those named."""
    rows, runs = measured(read_rows(str(path)))
    chosen = [fold for fold in folds(rows) if not only or fold.name in only]
    if jobs == 1:
        return [leave_out(fold, rows, runs) for fold in chosen]
    with ProcessPoolExecutor(jobs) as pool:
        return list(pool.map(partial(leave_out, rows=rows, runs=runs), chosen))


def main(
    path: Annotated[Path, typer.Argument(metavar="RUNS.csv")] = PUBLISHED,
    only: Annotated[list[str] | None, typer.Option(metavar="NAME", help="One fold; may be given again.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Folds fitted at once.")] = 1,
    write_data: Annotated[bool, typer.Option("--write", help="Write the widths of error bars.")] = False,
) -> None:
    """Leave out each source of RUNS.csv in turn, and say how it is predicted."""
    found = run(path, only or [], jobs)
    shares = held(found) if len(found) > 1 else {}
    print(table(found, shares))
    if shares:
        sizes = {one.fold.name: one.errors.n for one in found}
        mean = sum(shares[name] * sizes[name] for name in shares) / sum(sizes[name] for name in shares)
        print(f"\n80 % error bars hold {mean:.0%} of the runs, {np.mean(list(shares.values())):.0%} of a mean source.")
    if write_data:
        source = f"[fit: {path.name}] {len(found)} folds, each predicted by a fit without it"
        (DATA / "spread.json").write_text(json.dumps(to_spread(found, source), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
