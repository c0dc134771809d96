"""The package's fitted numbers, made again from published runs: `python -m meshwright.bench.refit [RUNS.csv]`.

Without `--write` the numbers are only printed, each with its prior. With it they go where they are read from: constants
to `data/constants.json`, what engines have of their own to their files, generic values to the engine `unknown`, shares
of peaks to the presets with the device. A number that no run determines keeps the source of its prior.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from meshwright.bench.cases import case_of
from meshwright.bench.runs import NotExpressible, Row, Skipped, read_rows
from meshwright.cost.fit import Fit, Key, Prior, Runs, architecture, fit
from meshwright.errors import InputError

DATA = Path(__file__).parent.parent / "data"

#: The published runs that come with the repository.
PUBLISHED = Path(__file__).parents[3] / "data" / "measured_runs.csv"

#: Where less than this of the prior's spread is gone, runs did not determine a number.
UNDETERMINED = 0.95

#: Significant digits of what is written.
DIGITS = 4


def measured(rows: Iterable[Row | Skipped]) -> tuple[list[Row], Runs]:
    """The rows that can be predicted and have something measured, and these as runs.

    Experts are a source of their own: what is wrong with them says nothing of dense runs beside them."""
    kept, cases = [], []
    for row in rows:
        if isinstance(row, Row) and (row.step_time_s is not None or row.peak_memory_bytes is not None):
            try:
                cases.append(case_of(row.setup)[0])
            except (NotExpressible, InputError):
                continue
            kept.append(row)

    def column(name: str) -> Any:
        values = [getattr(row, name) for row in kept]
        return np.array([np.nan if value is None else value for value in values], dtype=float)

    sources = [f"{row.source}, experts" if row.setup.experts else row.source for row in kept]
    return kept, Runs(cases, column("step_time_s"), column("peak_memory_bytes"), sources)


def determined(found: Fit) -> list[Key]:
    """The fitted numbers that runs tell of."""
    left = np.sqrt(np.diag(found.covariance))
    return [key for key, spread in zip(found.offsets.keys, left, strict=True) if spread < UNDETERMINED]


def table(found: Fit) -> str:
    """Each number with its prior and how far runs moved it, in spreads of the prior."""
    left = np.sqrt(np.diag(found.covariance))
    lines = [f"{'number':<52}{'prior':>12}{'fitted':>12}{'moved':>8}{'left':>7}"]
    for key, x, spread in zip(found.offsets.keys, found.offsets.x, left, strict=True):
        value = found.offsets.value(key.prior, key.of)
        lines.append(f"{key!s:<52}{key.prior.prior:>12.4g}{value:>12.4g}{x:>+8.2f}{spread:>7.2f}")
    return "\n".join(lines)


def write(found: Fit, folder: Path, source: str) -> None:
    """Put the numbers into the data files of a folder; what no run determined says so."""
    known = determined(found)
    for path, entries in _by_file(found, folder).items():
        data = json.loads(path.read_text(encoding="utf-8"))
        # Of a record with one source for all of its numbers it is that of those that were determined.
        for where, prior, of in sorted(entries, key=lambda entry: Key(entry[1], entry[2]) in known):
            is_told = Key(prior, of) in known
            value = float(f"{found.offsets.value(prior, of):.{DIGITS}g}")
            _put(data, where, value, source if is_told else prior.source)
        path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _by_file(found: Fit, folder: Path) -> dict[Path, list[tuple[str, Prior, str]]]:
    """Which numbers each file takes: key path, prior and whose."""
    files: dict[Path, list[tuple[str, Prior, str]]] = {}
    devices = list(_presets(folder))
    shares = json.loads((folder / "constants.json").read_text(encoding="utf-8"))
    for prior in dict.fromkeys(key.prior for key in found.offsets.keys):
        owners = sorted(found.offsets.owners(prior))
        if prior.at == "constants":
            places = [(folder / "constants.json", prior.name, "*")]
        elif prior.at == "engine":
            places = [(folder / "engines" / f"{name}.json", prior.name, name) for name in owners]
            places += [] if prior.only else [(folder / "engines" / "unknown.json", prior.name, "*")]
        else:
            where = f"device.efficiency.{prior.name}"
            places = [(path, where, of) for path, of, peaks in devices if of in owners and _has(peaks, prior.name)]
            places += [(folder / "constants.json", name, "*") for name in (f"{prior.name}_share",) if name in shares]
        for path, where, of in places:
            files.setdefault(path, []).append((where, prior, of))
    return files


def _presets(folder: Path) -> Iterator[tuple[Path, str, frozenset[str]]]:
    """The cluster presets with the architecture of their device and the types that it has."""
    for path in sorted((folder / "clusters").glob("*.json")):
        device = json.loads(path.read_text(encoding="utf-8"))["device"]
        yield path, architecture(device["name"]), frozenset(device["peak_flops"])


def _has(types: frozenset[str], name: str) -> bool:
    """Whether a share such as `matmul float8` is one of a type that a device has."""
    _, _, dtype = name.partition(" ")
    return not dtype or dtype in types


def _put(data: dict[str, Any], where: str, value: float, source: str) -> None:
    """Set a number by its key path, and its source where the file keeps them."""
    *outer, last = where.split(".")
    place = data
    for name in outer:
        place = place.setdefault(name, {})
    if outer[:1] == ["device"]:
        place[last] = {"value": value, "source": source}
    else:
        place[last] = value
        data["sources"][outer[0] if outer else last] = source


def main(
    path: Annotated[Path, typer.Argument(metavar="RUNS.csv")] = PUBLISHED,
    write_data: Annotated[bool, typer.Option("--write", help="Write them into the package's data.")] = False,
) -> None:
    """Fit the package's numbers to RUNS.csv, print them, and write them into its data where asked."""
    _, runs = measured(read_rows(str(path)))
    found = fit(runs, progress=lambda done: print(f"evaluation {done}", file=sys.stderr))
    print(table(found))
    print(f"{len(found.offsets.keys)} numbers, {len(determined(found))} of them determined by {len(runs.cases):,} runs")
    if write_data:
        write(found, DATA, f"[fit: {path.name}, {len(runs.cases):,} runs]")


if __name__ == "__main__":
    typer.run(main)
