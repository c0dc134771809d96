"""Predictions held against measured runs: errors row by row, and how well a source is predicted and ranked.

A prediction is made from a row's `Setup` alone. Rows of one source with the same model, machine, devices, batch and
sequence are comparable: there the order of predictions counts too.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from meshwright.bench.cases import case_of
from meshwright.bench.runs import NotExpressible, Row, Setup, Skipped, read_rows
from meshwright.cost.analytic import Case, estimate_of, evaluate_cases, grouped
from meshwright.errors import InputError
from meshwright.results import Estimate
from meshwright.sim.evaluators import evaluate

#: Fewer comparable rows than this say nothing about their order.
MIN_COMPARABLE = 3


@dataclass(frozen=True)
class Prediction:
    """What the model says of a setup; see `results.Estimate`."""

    step_time_s: float
    peak_memory_bytes: float
    feasible: bool = True
    reasons: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    step_time_interval_s: tuple[float, float] | None = None
    peak_memory_interval_bytes: tuple[float, float] | None = None


@dataclass(frozen=True)
class Compared:
    """A row and its prediction."""

    row: Row
    prediction: Prediction

    @property
    def status(self) -> str:
        """`unmeasured` where the row has no step time, else `predicted`."""
        return "unmeasured" if self.row.step_time_s is None else "predicted"

    @property
    def ratio(self) -> float | None:
        """Predicted over measured step time."""
        return self.prediction.step_time_s / self.row.step_time_s if self.row.step_time_s else None

    @property
    def memory_ratio(self) -> float | None:
        """Predicted over measured peak memory."""
        measured = self.row.peak_memory_bytes
        return self.prediction.peak_memory_bytes / measured if measured else None


@dataclass(frozen=True)
class SourceErrors:
    """How well the measured rows of a source are predicted; None where it has nothing to tell.

    Percentages: `median_ape_pct` and `mape_pct` of the step time, `bias_pct` the median of predicted over measured
    less one. `kendall_tau` is the mean, the regrets are medians, over `num_comparable` sets of comparable rows: how
    much slower than the fastest run the one of best prediction is, and the fastest of the best three.
    """

    source: str
    n: int
    median_ape_pct: float | None
    mape_pct: float | None
    kendall_tau: float | None
    top1_regret_pct: float | None
    bias_pct: float | None
    top3_regret_pct: float | None
    num_comparable: int
    num_memory: int
    memory_median_ape_pct: float | None
    memory_mape_pct: float | None


@dataclass(frozen=True)
class Validation:
    """All that `meshwright validate` has to say."""

    rows: tuple[Compared, ...]
    groups: tuple[SourceErrors, ...]
    skipped: tuple[Skipped, ...]


def validate_runs(path: str, evaluator: str = "analytic") -> Validation:
    """Predict every row of a CSV and compare; raises `InputError` where the file is none."""
    return compare(read_rows(path), evaluator)


def compare(rows: Iterable[Row | Skipped], evaluator: str = "analytic") -> Validation:
    """Predict rows, equal setups once, and compare."""
    listed = list(rows)
    setups = list(dict.fromkeys(row.setup for row in listed if isinstance(row, Row)))
    done = dict(zip(setups, predict_all(setups, evaluator), strict=True))
    compared: list[Compared] = []
    skipped: list[Skipped] = []
    for row in listed:
        found = row.reason if isinstance(row, Skipped) else done[row.setup]
        if isinstance(row, Skipped):
            skipped.append(row)
        elif isinstance(found, str):
            skipped.append(Skipped(row.line, row.id, found))
        else:
            compared.append(Compared(row, found))
    return Validation(tuple(compared), source_errors(compared), tuple(skipped))


def predict_all(setups: Sequence[Setup], evaluator: str = "analytic") -> list[Prediction | str]:
    """The prediction of each setup, or the reason why there is none; the closed form prices alike ones together."""
    built = [_built(setup) for setup in setups]
    found: list[Prediction | str] = [one if isinstance(one, str) else "" for one in built]
    places = [index for index, one in enumerate(built) if not isinstance(one, str)]
    cases = [one for one in built if not isinstance(one, str)]
    if evaluator != "analytic":
        for index, (case, assumptions) in zip(places, cases, strict=True):
            found[index] = _prediction(evaluate(case, evaluator), assumptions)
        return found
    for group in grouped([case for case, _ in cases]):
        evaluated = evaluate_cases([cases[index][0] for index in group])
        for row, index in enumerate(group):
            found[places[index]] = _prediction(estimate_of(evaluated, row), cases[index][1])
    return found


def _built(setup: Setup) -> tuple[Case, tuple[str, ...]] | str:
    try:
        return case_of(setup)
    except NotExpressible as error:
        return str(error)
    except InputError as error:
        return "; ".join(str(problem) for problem in error.problems)


def _prediction(found: Estimate, assumptions: tuple[str, ...]) -> Prediction | str:
    if not (math.isfinite(found.step_time_s) and math.isfinite(found.peak_memory_bytes)):
        return "its numbers are too large to compute with"
    return Prediction(
        found.step_time_s,
        found.peak_memory_bytes,
        found.feasible,
        found.reasons,
        (*assumptions, *found.assumptions),
        found.warnings,
        found.step_time_interval_s,
        found.peak_memory_interval_bytes,
    )


def source_errors(rows: Iterable[Compared]) -> tuple[SourceErrors, ...]:
    """The errors of each source that has measured rows, in alphabetical order."""
    by_source: dict[str, list[Compared]] = defaultdict(list)
    for row in rows:
        if row.row.step_time_s is not None or row.row.peak_memory_bytes is not None:
            by_source[row.row.source].append(row)
    return tuple(errors_of(source, by_source[source]) for source in sorted(by_source))


def errors_of(source: str, rows: Sequence[Compared]) -> SourceErrors:
    """The errors of some rows, under a name."""
    ratios = [row.ratio for row in rows if row.ratio is not None]
    memory = [row.memory_ratio for row in rows if row.memory_ratio is not None]
    ranked = [_times(members) for members in _comparable(rows)]
    taus = [tau for tau in (kendall_tau(*times) for times in ranked) if tau is not None]
    return SourceErrors(
        source=source,
        n=len(ratios),
        median_ape_pct=_percent(np.median, _off(ratios)),
        mape_pct=_percent(np.mean, _off(ratios)),
        kendall_tau=float(np.mean(taus)) if taus else None,
        top1_regret_pct=_percent(np.median, [regret(*times, 1) for times in ranked]),
        bias_pct=_percent(np.median, [ratio - 1 for ratio in ratios]),
        top3_regret_pct=_percent(np.median, [regret(*times, 3) for times in ranked]),
        num_comparable=len(ranked),
        num_memory=len(memory),
        memory_median_ape_pct=_percent(np.median, _off(memory)),
        memory_mape_pct=_percent(np.mean, _off(memory)),
    )


def _off(ratios: Iterable[float]) -> list[float]:
    return [abs(ratio - 1) for ratio in ratios]


def _percent(reduce: Callable[[list[float]], Any], shares: list[float]) -> float | None:
    return 100 * float(reduce(shares)) if shares else None


def comparable_by(row: Row) -> tuple[object, ...]:
    """The work of a run and its machine: runs that have both in common differ in their strategy alone."""
    setup = row.setup
    machine = (setup.engine, setup.accelerator, setup.accelerator_memory_gb, setup.n_devices)
    return (setup.model, setup.global_batch_size, setup.seq_len, *machine)


def _comparable(rows: Iterable[Compared]) -> list[list[Compared]]:
    """Measured rows that do the same work on the same machine, where there are enough of them."""
    found: dict[tuple[object, ...], list[Compared]] = defaultdict(list)
    for row in rows:
        if row.row.step_time_s is not None:
            found[comparable_by(row.row)].append(row)
    return [members for members in found.values() if len(members) >= MIN_COMPARABLE]


def _times(rows: Iterable[Compared]) -> tuple[list[float], list[float]]:
    pairs = [(row.row.step_time_s or math.nan, row.prediction.step_time_s) for row in rows]
    return [measured for measured, _ in pairs], [predicted for _, predicted in pairs]


def kendall_tau(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Kendall's tau-b (1945) of two rankings, ties counted; None where one of them is all ties.

    >>> kendall_tau([1, 2, 3, 4], [10, 20, 40, 30])  # 5 pairs agree, 1 does not
    0.6666666666666666
    """
    signs = [np.sign(np.subtract.outer(np.asarray(ranks), np.asarray(ranks))) for ranks in (one, other)]
    agree, untied = (signs[0] * signs[1]).sum(), [np.abs(sign).sum() for sign in signs]
    return float(agree / math.sqrt(untied[0] * untied[1])) if all(untied) else None


def regret(measured: Sequence[float], predicted: Sequence[float], k: int) -> float:
    """How much slower than the fastest is the fastest of the k that are predicted to be fastest, as a share.

    >>> regret([1.0, 1.2, 2.0], [3.0, 1.0, 2.0], 1)
    0.19999999999999996
    """
    picked = sorted(range(len(predicted)), key=lambda index: predicted[index])[:k]
    return min(measured[index] for index in picked) / min(measured) - 1


def to_json(found: Validation) -> dict[str, Any]:
    """The keys of `--json`."""
    return {
        "rows": [_row(row) for row in found.rows],
        "groups": [asdict(group) for group in found.groups],
        "skipped": [{"id": row.id, "reason": row.reason} for row in found.skipped],
    }


def _row(row: Compared) -> dict[str, Any]:
    return {
        "id": row.row.id,
        "status": row.status,
        "measured_step_time_s": row.row.step_time_s,
        "predicted_step_time_s": row.prediction.step_time_s,
        "measured_peak_memory_bytes": row.row.peak_memory_bytes,
        "predicted_peak_memory_bytes": row.prediction.peak_memory_bytes,
        "feasible": row.prediction.feasible,
        "assumptions": list(row.prediction.assumptions),
        "reasons": list(row.prediction.reasons),
        "warnings": list(row.prediction.warnings),
        "step_time_interval_s": row.prediction.step_time_interval_s,
        "peak_memory_interval_bytes": row.prediction.peak_memory_interval_bytes,
    }
