"""The fit: what runs tell is found, what they don't tell stays, one bad run moves nothing; files carry the outcome."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import meshwright
from meshwright.bench.leave_out import coverage, folds, leave_out, widths
from meshwright.bench.refit import DATA, PUBLISHED, measured, write
from meshwright.bench.runs import Row, Skipped, read_rows
from meshwright.cost.analytic import estimate
from meshwright.cost.constants import constants
from meshwright.cost.fit import (
    Fit,
    Key,
    Offsets,
    Prior,
    Runs,
    at_priors,
    fit,
    keys_for,
    own_keys,
    predict,
    priors,
)
from meshwright.cost.spread import Unknowns, Width, interval, is_tied, probability_below, spread, unknowns
from meshwright.engine import load_engine

SMALL = ("alpa-osdi22-artifact", "ibm-fms-fsdp", "megatron-sc21-table1")


@cache
def published() -> list[Row | Skipped]:
    return list(read_rows(str(PUBLISHED)))


@cache
def some(*sources: str, every: int = 1) -> tuple[tuple[Row, ...], Runs]:
    chosen = [row for row in published() if isinstance(row, Row) and row.source in sources]
    rows, runs = measured(chosen[::every])
    return tuple(rows), runs


def key(name: str, of: str) -> Key:
    (found,) = (prior for prior in priors() if prior.name == name)
    return Key(found, of)


def as_measured(runs: Runs, offsets: Offsets) -> Runs:
    """The same runs as if the truth were at a point."""
    seconds, _ = predict(runs, offsets)
    return replace(runs, step_time_s=seconds, peak_memory_bytes=np.full(len(seconds), np.nan))


# --- priors -----------------------------------------------------------------------------------------------------------


def test_priors_are_sound() -> None:
    assert len(set(priors())) == len(priors())
    for prior in priors():
        assert prior.source.startswith(("[spec", "[derived]")), prior.name
        assert prior.spread > 0 or prior.deviation > 0, prior.name
        if prior.at == "constants":
            assert hasattr(constants(), prior.name)


@pytest.mark.parametrize(
    ("scale", "prior", "offset", "expected"),
    [
        ("log", 2.0, math.log(3), 6.0),
        ("logit", 0.5, math.log(3), 0.75),  # odds 1 : 1 become 3 : 1
        ("linear", 2.0, 0.5, 2.5),
        ("linear", 2.0, -3.0, 0.0),  # no number of these is negative
    ],
)
def test_scales(scale: Any, prior: float, offset: float, expected: float) -> None:
    assert Prior("engine", "x", prior, 1.0, scale, "").value(offset) == pytest.approx(expected)


def test_a_deviation_adds_to_the_generic_value() -> None:
    generic, own = key("traffic_factor", "*"), key("traffic_factor", "alpa")
    offsets = Offsets((generic, own), np.array([1.0, -1.0]))
    prior = generic.prior
    assert offsets.value(prior, "alpa") == pytest.approx(prior.prior * math.exp(prior.spread - prior.deviation))
    assert offsets.value(prior, "unknown") == pytest.approx(prior.prior * math.exp(prior.spread))
    assert offsets.engine(load_engine("alpa")).traffic_factor == offsets.value(prior, "alpa")


def test_what_documentation_says_of_one_engine_is_its_own_prior() -> None:
    exposed = key("exposed.dp", "*").prior
    offsets = at_priors([Key(exposed, "*")])
    assert offsets.value(exposed, "megatron-core") == dict(exposed.own)["megatron-core"] != exposed.prior
    assert offsets.value(exposed, "alpa") == exposed.prior


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved() -> tuple[Runs, Offsets, Fit]:
    """Runs measured at a point away from the priors, one of them thirtyfold, and the fit of them."""
    _, runs = some(*SMALL)
    keys = (
        key("traffic_factor", "*"), key("matmul", "*"), key("matmul", "A100"), key("outer_link_share", "*"),
        key("matmul float8", "*"),
    )  # fmt: skip
    truth = Offsets(keys, np.array([0.8, -1.0, -0.5, 1.0, 0.0]))
    seen = as_measured(runs, truth)
    seen.step_time_s[0] *= 30
    return seen, truth, fit(seen, keys)


def test_what_runs_tell_is_found(moved: tuple[Runs, Offsets, Fit]) -> None:
    seen, truth, found = moved
    off = np.abs(np.log(predict(seen, found.offsets)[0] / predict(seen, truth)[0]))
    assert off.max() < 0.02  # priors pull a little, and the run that stalled pulls less
    before = np.abs(np.log(predict(seen, at_priors(truth.keys))[0] / predict(seen, truth)[0]))
    assert np.median(before) > 0.05


def test_what_no_run_tells_stays_at_its_prior(moved: tuple[Runs, Offsets, Fit]) -> None:
    _, _, found = moved
    index = [key.prior.name for key in found.offsets.keys].index("matmul float8")
    assert found.offsets.x[index] == pytest.approx(0, abs=1e-6)
    assert math.sqrt(found.covariance[index, index]) == pytest.approx(1, rel=1e-3)
    told = [key.prior.name for key in found.offsets.keys].index("traffic_factor")
    assert math.sqrt(found.covariance[told, told]) < 0.5


def test_the_fit_is_reproducible(moved: tuple[Runs, Offsets, Fit]) -> None:
    seen, _, found = moved
    assert (fit(seen, found.offsets.keys).offsets.x == found.offsets.x).all()


def test_predictions_of_a_fit_do_not_depend_on_the_source() -> None:
    _, runs = some("alpa-osdi22-artifact")
    offsets = at_priors(keys_for(runs.cases))
    renamed = replace(runs, sources=["elsewhere"] * len(runs.sources))
    assert (predict(runs, offsets) == predict(renamed, offsets)).all()


def test_own_keys_begin_at_present_values() -> None:
    _, runs = some("alpa-osdi22-artifact")
    keys = own_keys(runs.cases, constants())
    assert predict(runs, at_priors(keys))[0] == pytest.approx(predict(runs, at_priors(()))[0], rel=1e-12)
    engine_only = own_keys(runs.cases, constants(), ("engine",))
    assert {key.prior.at for key in engine_only} == {"engine"}
    assert "pace" in {key.prior.name for key in engine_only}
    assert {key.prior.at for key in own_keys(runs.cases, constants(), ("constants", "device"))} == {
        "constants",
        "device",
    }


def test_pace_scales_a_step_and_nothing_else() -> None:
    _, runs = some("alpa-osdi22-artifact")
    case = runs.cases[0]
    plain, slow = (
        estimate(case.graph, case.cluster, case.strategy, case.workload, replace(case.engine, pace=pace))
        for pace in (1.0, 1.25)
    )
    assert slow.step_time_s == pytest.approx(1.25 * plain.step_time_s, rel=1e-12)
    assert sum(slow.time.values()) == pytest.approx(slow.step_time_s, rel=1e-12)
    assert (slow.memory, slow.bubble_fraction) == (plain.memory, plain.bubble_fraction)


def test_files_carry_what_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(DATA, folder)
    keys = (key("traffic_factor", "*"), key("traffic_factor", "alpa"), key("matmul", "A100"), key("kernel_s", "*"))
    found = Fit(Offsets(keys, np.array([1.0, 1.0, 1.0, 1.0])), np.diag([0.1, 0.1, 0.1, 1.0]), 1)
    write(found, folder, "[fit: here]")

    def read(name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((folder / name).read_text())
        return content

    def told(prior: Prior, of: str) -> float:
        return float(f"{found.offsets.value(prior, of):.4g}")

    for name, of in (("alpa", "alpa"), ("unknown", "*")):
        engine = read(f"engines/{name}.json")
        assert engine["traffic_factor"] == told(keys[0].prior, of)
        assert engine["sources"]["traffic_factor"] == "[fit: here]"
    device = read("clusters/dgx-a100.json")["device"]["efficiency"]
    assert device["matmul"] == {"value": told(keys[2].prior, "A100"), "source": "[fit: here]"}
    assert read("clusters/dgx-h100.json") == json.loads((DATA / "clusters/dgx-h100.json").read_text())
    known = read("constants.json")
    assert known["kernel_s"] == told(keys[3].prior, "*")
    assert known["sources"]["kernel_s"] == keys[3].prior.source  # which no run determined


def test_the_committed_numbers_are_in_no_file_but_the_fitted_ones() -> None:
    """Each fitted number of the package names the data that it is from."""
    for name in ("nanotron", "megatron-core", "megatron-lm", "composer-fsdp", "internevo", "alpa"):
        assert "[fit: measured_runs.csv, 2,637 runs]" in load_engine(name).sources.values()
    assert "[fit: measured_runs.csv, 2,637 runs]" in constants().sources.values()


# --- leaving out ------------------------------------------------------------------------------------------------------


def test_folds() -> None:
    rows, _ = measured(published())
    found = {fold.name: fold for fold in folds(rows)}
    assert len(found) == 13 + 3
    assert sum(len(fold.rows) for name, fold in found.items() if "hidden" not in name) == len(rows) == 2637
    sizes = [len(fold.rows) for name, fold in found.items() if "hidden" in name]
    assert sum(sizes) == len(found["hf-ultrascale-sweep"].rows)


def test_a_source_left_out_is_predicted() -> None:
    """A part of the leave-out table: Megatron's paper from the other small sources, and then with three of its runs."""
    rows, runs = some(*SMALL)
    (fold,) = (fold for fold in folds(rows) if fold.name == "megatron-sc21-table1")
    found = leave_out(fold, rows, runs)
    assert found.errors.n == 10
    assert found.errors.median_ape_pct is not None
    assert found.errors.median_ape_pct < 15
    assert np.median(found.calibrated_pct) < 6
    assert {own.device for own in found.unknowns} == {False}


# --- error bars -------------------------------------------------------------------------------------------------------


def test_widths_hold_their_share() -> None:
    generator = np.random.default_rng(0)
    known = [Unknowns()] * 2000, [Unknowns(engine=True)] * 2000
    parts = [(generator.laplace(0, scale, 2000), own) for scale, own in zip((0.03, 0.10), known, strict=True)]
    found = widths(parts)
    assert found.known == pytest.approx(0.03 * math.log(5), rel=0.1)
    assert math.hypot(found.known, found.engine) == pytest.approx(0.10 * math.log(5), rel=0.1)
    assert found.device == found.experts == 0  # of what nothing is seen
    for residuals, own in parts:
        assert coverage(residuals, own, found) == pytest.approx(0.8, abs=0.03)


def test_intervals() -> None:
    width = Width(0.3, 0.4, 0.0, 0.0)
    assert width.of(Unknowns()) == 0.3
    assert width.of(Unknowns(engine=True)) == pytest.approx(0.5)
    low, high = interval(10.0, 0.5)
    assert (low, high) == (10 * math.exp(-0.5), 10 * math.exp(0.5))
    assert probability_below(low, 10.0, 0.5) == pytest.approx(0.1)
    assert probability_below(high, 10.0, 0.5) == pytest.approx(0.9)
    # Laplace: the order is wrong with a probability of exp(-d / b) / 2, that is 20 % at d = b ln 2.5.
    limit = math.log(2.5) * spread().ratio / math.log(5)
    for sign in (1, -1):
        assert is_tied(1.0, math.exp(sign * limit * 0.99))
        assert not is_tied(1.0, math.exp(sign * limit * 1.01))


def test_unknown_engines_and_devices_have_wider_bars() -> None:
    words = ("llama-3-8b", "tp=2,dp=4", "--global-batch", "8", "--seq-len", "2048", "--json")

    def width(cluster: str, engine: str) -> float:
        model, strategy, *rest = words
        found = meshwright("estimate", model, cluster, strategy, *rest, "--engine", engine).json
        low, high = found["step_time_interval_s"]
        assert low < found["step_time_s"] < high
        assert found["step_time_s"] / low == pytest.approx(high / found["step_time_s"])
        return math.log(high / low)

    known = width("dgx-h100x1", "megatron-core")
    assert width("dgx-h100x1", "maxtext") > known  # borrows what is generic
    assert width("dgx-b200x1", "megatron-core") > known


def test_what_sources_say_is_known() -> None:
    _, runs = some("alpa-osdi22-artifact")
    case = runs.cases[0]
    found = unknowns(case.graph, case.cluster.slowest_device, case.engine)
    assert found == Unknowns()
    other = unknowns(case.graph, case.cluster.slowest_device, load_engine("torchtitan"))
    assert other == Unknowns(engine=True)


# --- meshwright calibrate RUNS.csv ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten runs of one engine on a machine a third slower than any that was fitted."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "megatron-sc21-table1"]
    path = tmp_path_factory.mktemp("runs") / "own.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"step_time_s": str(1.3 * float(row["step_time_s"]))} for row in rows)
    return path


def test_ten_runs_make_an_engine_and_a_cluster(own_runs: Path, tmp_path: Path) -> None:
    engine, cluster = tmp_path / "engine.json", tmp_path / "cluster.json"
    found = meshwright("calibrate", own_runs, "--out", engine, "--out", cluster, "--json").json
    assert found["num_runs"] == 10
    assert found["before_pct"] > 20
    assert found["after_pct"] < 8
    words = ("gpt3-175b", cluster, "tp=8,pp=16,dp=24", "--global-batch", "1536", "--seq-len", "2048", "--json")
    mine = meshwright("estimate", *words, "--engine", engine).json
    assert mine["step_time_s"] > 0
    content = json.loads(cluster.read_text())
    sources = {quantity["source"] for quantity in content["groups"][0]["device"]["efficiency"].values()}
    assert "[measured] 10 runs of own.csv" in sources


def test_calibration_of_an_engine_alone_is_told_in_words(own_runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "my-engine.json"
    outcome = meshwright("calibrate", own_runs, "--out", path)
    assert outcome.code == 0
    assert "10 runs, into" in outcome.out
    assert "on runs left out, after" in outcome.out
    assert json.loads(path.read_text())["sources"]["matmul_factor"] == "[measured] 10 runs of own.csv"


@pytest.mark.parametrize(
    ("out", "part"),
    [
        ([], "one of these words in the file's name says which"),
        (["mine.json"], "mine.json: runs become an engine or a cluster"),
        (["engine.json", "my-engine.json"], "a second file for the engine"),
    ],
)
def test_where_a_calibration_goes(out: list[str], part: str, own_runs: Path) -> None:
    outcome = meshwright("calibrate", own_runs, *(word for path in out for word in ("--out", path)))
    assert outcome.code == 2
    assert part in outcome.err


def test_runs_that_cannot_calibrate(tmp_path: Path) -> None:
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    mixed = [next(row for row in rows if row["source"] == source) for source in ("internevo", "mosaicml-llm-foundry")]
    for chosen, part in ((mixed, "runs of one engine tell of it"), (mixed[:1], "needs at least 2 runs")):
        path = tmp_path / "runs.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(chosen)
        outcome = meshwright("calibrate", path, "--out", tmp_path / "engine.json")
        assert outcome.code == 2
        assert part in outcome.err
