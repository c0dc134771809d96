"""`meshwright validate`: rows become cases, bad rows are named, and only what a row's setup says is predicted from."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import meshwright
from meshwright.bench.cases import case_of
from meshwright.bench.runs import ACCELERATORS, Row, Setup, Skipped, read_rows, read_state
from meshwright.bench.validate import Validation, compare, kendall_tau, regret, to_json, validate_runs
from meshwright.cluster import preset_names
from meshwright.engine import engine_names
from meshwright.errors import InputError

MEASURED_RUNS = Path(__file__).parent.parent / "data/measured_runs.csv"


def validated(path: str) -> tuple[int, dict[str, Any]]:
    """Exit status and JSON of the command."""
    outcome = meshwright("validate", path, "--json")
    return outcome.code, outcome.json


#: Columns on which a prediction may not depend.
WITNESSES = (
    "id", "source", "source_url_or_path", "notes",
    "step_time_s", "tokens_per_s_per_device", "tflops_per_device", "mfu", "peak_memory_gib",
)  # fmt: skip

HEADER = (
    "id", "source", "source_url_or_path", "model", "family", "layers", "hidden", "ffn_hidden", "heads", "kv_heads",
    "vocab", "seq_len", "params_b", "experts", "topk", "engine", "accelerator", "accelerator_memory_gb", "n_devices",
    "devices_per_node", "intra_node_net", "inter_node_net", "dp", "tp", "pp", "cp", "ep", "vpp", "sequence_parallel",
    "zero_stage_or_fsdp", "microbatch_size", "global_batch_size", "recompute", "precision", "flash_attention",
    "schedule", "step_time_s", "tokens_per_s_per_device", "tflops_per_device", "mfu", "peak_memory_gib", "notes",
)  # fmt: skip

#: GPT-22B on one node, Megatron-LM: table 5 of 2205.05198.
GPT = {
    "id": "gpt", "source": "paper", "source_url_or_path": "https://example.org", "model": "GPT-22B", "family": "dense",
    "layers": "48", "hidden": "6144", "ffn_hidden": "24576", "heads": "64", "kv_heads": "64", "vocab": "51200",
    "seq_len": "2048", "params_b": "22.0", "engine": "megatron-lm", "accelerator": "A100",
    "accelerator_memory_gb": "80", "n_devices": "8", "devices_per_node": "8", "intra_node_net": "NVLink3",
    "inter_node_net": "HDR InfiniBand 8x200Gbps/node", "dp": "1", "tp": "8", "pp": "1", "cp": "1", "ep": "1",
    "vpp": "1", "sequence_parallel": "y", "zero_stage_or_fsdp": "0", "microbatch_size": "4", "global_batch_size": "4",
    "recompute": "selective", "precision": "fp16", "flash_attention": "n", "step_time_s": "1.10",
    "tflops_per_device": "130", "peak_memory_gib": "60", "notes": "tier=A",
}  # fmt: skip

LLAMA = GPT | {
    "id": "llama", "model": "llama3-8b", "layers": "32", "hidden": "4096", "ffn_hidden": "14336", "heads": "32",
    "kv_heads": "8", "vocab": "128256", "seq_len": "8192", "params_b": "8.03", "engine": "megatron-core",
    "accelerator": "H100", "n_devices": "16", "inter_node_net": "NDR InfiniBand 400Gbps/GPU", "dp": "4", "tp": "2",
    "pp": "2", "microbatch_size": "1", "global_batch_size": "64", "recompute": "none", "precision": "bf16",
    "flash_attention": "y", "schedule": "1f1b", "zero_stage_or_fsdp": "1", "step_time_s": "3.0",
}  # fmt: skip


def text_of(rows: Iterable[Mapping[str, str]], header: Sequence[str] = HEADER) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, header, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@pytest.fixture
def runs(tmp_path: Path) -> Any:
    def write(rows: Iterable[Mapping[str, str]], header: Sequence[str] = HEADER) -> str:
        path = tmp_path / "runs.csv"
        path.write_text(text_of(rows, header), encoding="utf-8")
        return str(path)

    return write


def predicted(found: Validation) -> list[tuple[float, float, bool, tuple[str, ...]]]:
    return [
        (row.prediction.step_time_s, row.prediction.peak_memory_bytes, row.prediction.feasible,
         row.prediction.assumptions)
        for row in found.rows
    ]  # fmt: skip


def setup_of(row: Mapping[str, str], runs: Any) -> Setup:
    (found,) = read_rows(runs([row]))
    assert isinstance(found, Row), found
    return found.setup


def assumptions(row: Mapping[str, str], runs: Any) -> str:
    return "\n".join(case_of(setup_of(row, runs))[1])


# --- a row becomes a case -------------------------------------------------------------------------------------------


def test_published_row(runs: Any) -> None:
    found = validate_runs(runs([GPT]))
    (row,) = found.rows
    assert row.status == "predicted"
    assert row.prediction.step_time_s == pytest.approx(1.10, rel=0.10)  # as printed
    assert row.prediction.assumptions == ()  # nothing is blank
    (group,) = found.groups
    assert (group.source, group.n, group.num_memory) == ("paper", 1, 1)
    assert group.median_ape_pct == pytest.approx(100 * abs(row.prediction.step_time_s / 1.10 - 1))
    assert group.kendall_tau is None  # one row has no order


def test_case_says_what_the_row_says(runs: Any) -> None:
    case, _ = case_of(setup_of(LLAMA, runs))
    assert case.graph.num_parameters == pytest.approx(8.03e9, rel=0.001)
    assert case.strategy.degrees == {"pp": 2, "dp_shard": 4, "tp": 2}
    assert case.workload.precision == "bfloat16"
    assert case.engine.name == "megatron-core"
    assert [level.group_size for level in case.cluster.levels] == [8, 16]
    assert case.cluster.levels[1].bandwidth_Bps.value == 50e9  # 400 Gb/s


@pytest.mark.parametrize(
    ("cells", "part"),
    [
        ({"microbatch_size": ""}, "microbatch_size is blank: 1, the default of megatron-core"),
        ({"sequence_parallel": ""}, "sequence_parallel is blank: y"),
        ({"zero_stage_or_fsdp": ""}, "zero_stage_or_fsdp is blank: 1"),
        ({"recompute": ""}, "recompute is blank: none"),
        ({"vpp": ""}, "vpp is blank: 1"),
        ({"schedule": ""}, "schedule is blank: 1F1B"),
        ({"precision": ""}, "precision is blank: bf16"),
        ({"precision": "fp8", "accelerator": "A100"}, "A100-SXM-80GB has no float8: products in bfloat16"),
        ({"flash_attention": ""}, "flash_attention is not printed: y"),
        ({"inter_node_net": ""}, "inter_node_net is blank: 400 Gbps a device, the usual network"),
        ({"inter_node_net": "RoCE RDMA"}, "inter_node_net RoCE RDMA: 400 Gbps a device"),
        ({"kv_heads": ""}, "kv_heads is blank: 32"),
        ({"ffn_hidden": ""}, "ffn_hidden is blank"),
        ({"dp": ""}, "dp is blank: 4, what the other degrees leave"),
        ({"engine": ""}, "engine is blank: unknown"),
        ({"schedule": "zero_bubble_1p", "vpp": "2"}, "schedule zero_bubble_1p with 2 stages a rank"),
        ({"schedule": "interleaved_1f1b (modified)", "vpp": "2"}, "how it was modified is not printed"),
        ({"params_b": "7.5"}, "tied embeddings, from params_b = 7.5"),
        ({"model": "Atlantis", "params_b": ""}, "is of no family that we know"),
        # Rules of ours that a run breaks.
        ({"layers": "33"}, "33 layers do not divide over 2 stages"),
        ({"layers": "1"}, "more stages (2) than layers (1)"),
        ({"global_batch_size": "4"}, "fewer microbatches (1) than stages (pp=2)"),
        ({"tp": "4", "dp": "2", "kv_heads": "2"}, "more tensor-parallel ranks (4) than kv heads (2)"),
        ({"tp": "3", "dp": "4", "pp": "1", "n_devices": "12"}, "predicted although it breaks a rule: tp = 3"),
        ({"global_batch_size": "65"}, "the global batch of 65 is no multiple of 4: computed as 68"),
        ({"zero_stage_or_fsdp": "1(shard group 3)"}, "state sharded over 3 of dp=4 ranks: taken as 2"),
    ],
)
def test_assumptions_are_named_and_the_row_predicted(cells: Mapping[str, str], part: str, runs: Any) -> None:
    found = validate_runs(runs([LLAMA | cells]))
    (row,) = found.rows
    assert part in "\n".join(row.prediction.assumptions)
    assert 0 < row.prediction.step_time_s < math.inf


def test_what_a_row_prints_is_not_assumed(runs: Any) -> None:
    assert assumptions(LLAMA, runs) == ""


@pytest.mark.parametrize("engine", engine_names())
def test_every_engine_is_predicted(engine: str, runs: Any) -> None:
    found = validate_runs(runs([LLAMA | {"engine": engine}]))
    assert len(found.rows) == 1


@pytest.mark.parametrize("accelerator", sorted(ACCELERATORS))
def test_every_accelerator_is_predicted(accelerator: str, runs: Any) -> None:
    found = validate_runs(runs([LLAMA | {"accelerator": accelerator, "accelerator_memory_gb": ""}]))
    assert len(found.rows) == 1
    assert set(ACCELERATORS[accelerator]) <= set(preset_names())


def test_memory_of_the_card_decides_whether_a_run_fits(runs: Any) -> None:
    small, large = (validate_runs(runs([LLAMA | {"accelerator_memory_gb": size}])).rows[0] for size in ("16", "80"))
    assert not small.prediction.feasible
    assert "16.0 GiB" in small.prediction.reasons[0]
    assert large.prediction.feasible
    assert small.prediction.step_time_s == large.prediction.step_time_s  # an infeasible row keeps its time


def test_quantized_products_are_faster_where_the_device_has_them(runs: Any) -> None:
    times = {
        (accelerator, precision): validate_runs(runs([LLAMA | {"accelerator": accelerator, "precision": precision}]))
        .rows[0]
        .prediction.step_time_s
        for accelerator in ("H100", "A100")
        for precision in ("bf16", "fp8")
    }
    assert times["H100", "fp8"] < times["H100", "bf16"]
    assert times["A100", "fp8"] == times["A100", "bf16"]


def test_nanotron_splits_stages_by_cost(runs: Any) -> None:
    """16 layers of 67.1 M and a head of 268.4 M (as much as 4 layers) are 20 layers' worth: the layer with which the
    sum reaches the share of the stages so far is the last of its stage; the embedding costs nothing."""
    small = LLAMA | {
        "model": "Llama-1.34B", "params_b": "1.34", "layers": "16", "hidden": "2048", "ffn_hidden": "8192",
        "kv_heads": "32", "vocab": "131072", "engine": "nanotron", "tp": "2",
    }  # fmt: skip
    for layout, expected in (
        ({"pp": "4", "dp": "2"}, [1 + 5, 5, 5, 1 + 1]),
        ({"pp": "8", "dp": "1"}, [1 + 3, 2, 3, 2, 3, 2, 1, 1]),  # 2.5 a stage: reached by layers 3, 5, 8, 10, 13, 15
    ):
        strategy = case_of(setup_of(small | layout, runs))[0].strategy
        assert [sum(part.stop - part.start for part in stage.blocks) for stage in strategy.stages] == expected


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("0", (0, 0)),
        ("1(shard group 8)", (1, 8)),
        ("fsdp_shard_grad_op(zero2)", (2, 0)),
        ("fsdp (zero2-like: reshard off)", (2, 0)),
        ("fsdp2_full_shard(zero3)", (3, 0)),
        ("hsdp (shard 8 x replicate)", (3, 8)),
        ("megatron_fsdp(shard 16)", (3, 16)),
        ("fsdp256 [ICI] x dp4 [DCN]", (3, 256)),
    ],
)
def test_state_words(text: str, state: tuple[int, int]) -> None:
    assert read_state(text) == state


# --- rows that cannot be predicted, and bad ones --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "part"),
    [
        ({"microbatch_size": "", "engine": "nanotron"}, "microbatch_size is blank, and nanotron documents no default"),
        ({"dp": "", "tp": "", "pp": ""}, "line 3, column dp: the row has no layout"),
        ({"n_devices": "32"}, "line 3, column n_devices: 32, but dp*tp*pp*cp = 16"),
        ({"layers": "many"}, "line 3, column layers: 'many' must be a number"),
        ({"layers": "2.5"}, "line 3, column layers: '2.5' must be a whole number"),
        ({"hidden": "0"}, "line 3, column hidden: '0' must be positive"),
        ({"tp": "-2"}, "line 3, column tp: '-2' must be positive"),
        ({"seq_len": "NaN"}, "line 3, column seq_len: 'NaN' must be finite"),
        ({"step_time_s": "inf"}, "line 3, column step_time_s: 'inf' must be finite"),
        ({"peak_memory_gib": "-1"}, "line 3, column peak_memory_gib: '-1' must be positive"),
        ({"global_batch_size": ""}, "line 3, column global_batch_size: is blank"),
        ({"layers": "999999999999999999999999"}, "must be positive, and at most 1e15"),
        ({"engine": "megatron"}, "line 3, column engine: 'megatron' known: "),
        ({"accelerator": "H1000"}, "(nearest: H100)"),
        ({"precision": "fp7"}, "line 3, column precision: 'fp7' known: "),
        ({"recompute": "some"}, "line 3, column recompute: 'some' known: none, selective, full"),
        ({"zero_stage_or_fsdp": "7"}, "line 3, column zero_stage_or_fsdp: '7' must be 0-3"),
        ({"schedule": "dualpipe"}, "line 3, column schedule: 'dualpipe' known: "),
        ({"hidden": "0", "tp": "x"}, "column hidden: '0' must be positive, and at most 1e15; column tp: 'x' must be"),
    ],
)
def test_a_bad_row_is_named_and_the_others_predicted(cells: Mapping[str, str], part: str, runs: Any) -> None:
    code, answer = validated(runs([GPT, LLAMA | cells, LLAMA]))
    assert code == 0
    assert [row["id"] for row in answer["rows"]] == ["gpt", "llama"]
    (skipped,) = answer["skipped"]
    assert skipped["id"] == "llama"
    assert part in skipped["reason"]


def test_exit_status_2_where_no_row_can_be_predicted(runs: Any) -> None:
    path = runs([LLAMA | {"dp": "", "tp": "", "pp": ""}, LLAMA | {"layers": ""}])
    code, answer = validated(path)
    assert code == 2
    assert answer["rows"] == answer["groups"] == []
    assert len(answer["skipped"]) == 2
    text = meshwright("validate", path).out
    assert "0 rows predicted" in text
    assert "line 3, column layers: is blank" in text


def test_missing_columns_are_named_at_once(runs: Any) -> None:
    path = runs([GPT], [name for name in HEADER if name not in ("layers", "tp", "notes", "step_time_s", "id")])
    with pytest.raises(InputError) as caught:
        validate_runs(path)
    assert [problem.value for problem in caught.value.problems] == ["layers", "tp"]


def test_columns_of_witnesses_may_be_missing(runs: Any) -> None:
    found = validate_runs(runs([GPT], [name for name in HEADER if name not in WITNESSES]))
    (row,) = found.rows
    assert (row.row.id, row.status) == ("line 2", "unmeasured")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xff\xfe\x00\x01", b"a,b\n1,2\n"])
def test_files_that_are_no_runs(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(content)
    with pytest.raises(InputError):
        validate_runs(str(path))


@pytest.mark.parametrize("path", ["missing.csv", ".", "a\0b"])
def test_files_that_cannot_be_read(path: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        validate_runs(path)


def test_byte_order_mark_mixed_line_ends_and_odd_records(tmp_path: Path, runs: Any) -> None:
    header, one, two = text_of([GPT, LLAMA]).splitlines()
    path = tmp_path / "odd.csv"
    content = f"\ufeff{header}\r\n{one}\r{two}\n\n1,2,3\n{two},more\n{'x' * 200_000}\n{one}\0\n{two}"
    path.write_bytes(content.encode() + b"\xff")
    found = validate_runs(str(path))
    plain = validate_runs(runs([GPT, LLAMA]))
    assert predicted(found)[:2] == predicted(plain)
    reasons = [row.reason for row in found.skipped]
    assert reasons[0] == "line 5: 3 cells, the header has 42"
    assert reasons[1] == "line 6: 43 cells, the header has 42"
    assert reasons[2].startswith("line 7: is no CSV: ")
    assert len(found.rows) + len(found.skipped) == 7


# --- what a prediction depends on -----------------------------------------------------------------------------------


def shuffled(rows: Sequence[Mapping[str, str]], generator: random.Random) -> list[dict[str, str]]:
    """The rows with the cells of every witness dealt out anew among them."""
    columns = {name: [row.get(name, "") for row in rows] for name in WITNESSES}
    for cells in columns.values():
        generator.shuffle(cells)
    return [dict(row) | {name: columns[name][index] for name in WITNESSES} for index, row in enumerate(rows)]


def check_witnesses(rows: Sequence[Mapping[str, str]], runs: Any) -> None:
    expected = predicted(validate_runs(runs(rows)))
    assert len(expected) == len(rows)
    assert predicted(validate_runs(runs(shuffled(rows, random.Random(0))))) == expected
    blank = validate_runs(runs([dict(row) | dict.fromkeys(WITNESSES, "") for row in rows]))
    assert predicted(blank) == expected
    assert {row.status for row in blank.rows} == {"unmeasured"}
    assert blank.groups == ()


def test_predictions_do_not_depend_on_witnesses(runs: Any) -> None:
    check_witnesses([GPT, LLAMA, LLAMA | {"id": "other", "source": "blog", "pp": "4", "dp": "2"}], runs)


def test_an_unmeasured_row_is_judged(runs: Any) -> None:
    code, answer = validated(runs([GPT | {"step_time_s": "", "peak_memory_gib": ""}]))
    (row,) = answer["rows"]
    assert code == 0
    assert (row["status"], row["measured_step_time_s"], row["feasible"]) == ("unmeasured", None, True)


# --- errors ---------------------------------------------------------------------------------------------------------


def test_kendall_tau_counts_ties() -> None:
    assert kendall_tau([1, 2, 3], [2, 4, 9]) == 1
    assert kendall_tau([1, 2, 3], [9, 4, 2]) == -1
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(2 * 3))  # tau-b by hand
    assert kendall_tau([1, 1], [1, 2]) is None


def test_regret() -> None:
    assert regret([2.0, 1.0, 4.0], [1.0, 2.0, 3.0], 1) == 1.0
    assert regret([2.0, 1.0, 4.0], [1.0, 2.0, 3.0], 3) == 0.0


def test_groups_compare_rows_of_the_same_work(runs: Any) -> None:
    """Three layouts of one model, measured exactly as predicted but for a factor of 2: bias -50 %, order perfect."""
    layouts = [{"dp": "8", "tp": "2", "pp": "1"}, {"dp": "4", "tp": "4", "pp": "1"}, {"dp": "2", "tp": "2", "pp": "4"}]
    rows = [LLAMA | layout for layout in layouts]
    times = [time for time, *_ in predicted(validate_runs(runs(rows)))]
    measured = [row | {"step_time_s": repr(2 * time)} for row, time in zip(rows, times, strict=True)]
    other = GPT | {"source": "elsewhere"}
    group, elsewhere = reversed(validate_runs(runs([*measured, other])).groups)
    assert (elsewhere.source, elsewhere.num_comparable) == ("elsewhere", 0)
    assert group.bias_pct == pytest.approx(-50)
    assert group.mape_pct == pytest.approx(50)
    assert (group.num_comparable, group.kendall_tau, group.top1_regret_pct, group.top3_regret_pct) == (1, 1, 0, 0)


def test_json_keys(runs: Any) -> None:
    _, answer = validated(runs([GPT, LLAMA, LLAMA | {"hidden": "0"}]))
    assert list(answer) == ["schema", "rows", "groups", "skipped"]
    assert answer["schema"] == "validate/1"
    assert list(answer["rows"][0])[:8] == [
        "id", "status", "measured_step_time_s", "predicted_step_time_s", "measured_peak_memory_bytes",
        "predicted_peak_memory_bytes", "feasible", "assumptions",
    ]  # fmt: skip
    assert list(answer["groups"][0])[:6] == [
        "source", "n", "median_ape_pct", "mape_pct", "kendall_tau", "top1_regret_pct",
    ]  # fmt: skip
    assert list(answer["skipped"][0]) == ["id", "reason"]
    json.dumps(answer, allow_nan=False)


def test_the_figure_is_one_file_with_all_in_it(runs: Any, tmp_path: Path) -> None:
    path = tmp_path / "figure.html"
    outcome = meshwright("validate", runs([GPT, LLAMA | {"source": "<b>blog</b>"}]), "--figure", path)
    assert outcome.code == 0
    html = path.read_text(encoding="utf-8")
    assert 'src="http' not in html
    assert "<b>blog" not in html
    assert "&lt;b&gt;blog" in html or "\\u0026lt;b\\u0026gt;blog" in html
    unmeasured = meshwright("validate", runs([GPT | {"step_time_s": ""}]), "--figure", path)
    assert unmeasured.code == 2
    assert "no run has a measured step time to draw" in unmeasured.err
    nowhere = meshwright("validate", runs([GPT]), "--figure", tmp_path / "no" / "figure.html")
    assert nowhere.code == 2
    assert "cannot be written" in nowhere.err


def test_intervals_stand_with_each_row(runs: Any) -> None:
    _, answer = validated(runs([GPT]))
    (row,) = answer["rows"]
    for name in ("step_time", "peak_memory"):
        unit = "s" if name == "step_time" else "bytes"
        low, high = row[f"{name}_interval_{unit}"]
        assert low < row[f"predicted_{name}_{unit}"] < high


def test_equal_setups_are_predicted_once(runs: Any) -> None:
    rows = list(read_rows(runs([LLAMA] * 2000)))
    assert len(compare(rows).rows) == 2000  # in the time of one


# --- the published runs ---------------------------------------------------------------------------------------------


#: Sources of which every fortieth row is taken: whole, the file takes half a minute.
LARGE = ("vtrain-single-node", "hf-ultrascale-sweep", "mosaicml-llm-foundry")


@pytest.fixture(scope="module")
def sample() -> Validation:
    rows = list(read_rows(str(MEASURED_RUNS)))
    assert len(rows) == 2637
    return compare(
        row for index, row in enumerate(rows) if index % 40 == 0 or isinstance(row, Skipped) or row.source not in LARGE
    )


def test_every_run_is_predicted(sample: Validation) -> None:
    assert sample.skipped == ()


@pytest.mark.parametrize(
    ("source", "most"),
    [
        ("alpa-osdi22-artifact", 3.5),
        ("bigscience-bloom-prequel", 4.0),
        ("ibm-fms-fsdp", 5.0),
        ("internevo", 3.5),
        ("megatron-bridge-docs", 6.0),
        ("megatron-core-h100-weak", 4.5),
        ("megatron-sc21-table1", 3.0),
        ("megatron-seqsel-paper", 3.0),
        ("nemo-docs-24.07", 3.5),
        ("nemo-framework-launcher", 4.0),
    ],
)
def test_median_error_stays_below(source: str, most: float, sample: Validation) -> None:
    """No target, but what is reached: it may only fall."""
    (group,) = (group for group in sample.groups if group.source == source)
    assert group.median_ape_pct is not None
    assert group.median_ape_pct <= most


def test_published_runs_as_json(sample: Validation) -> None:
    answer = to_json(sample)
    json.dumps(answer, allow_nan=False)
    assert all(row["predicted_step_time_s"] > 0 and row["predicted_peak_memory_bytes"] > 0 for row in answer["rows"])


def test_published_predictions_do_not_depend_on_witnesses(runs: Any) -> None:
    with MEASURED_RUNS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    check_witnesses(rows[::60], runs)
