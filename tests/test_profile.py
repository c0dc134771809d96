"""Profiles: which operators a strategy executes, what they take here, and how measured seconds replace formulas."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meshwright.cluster import preset_cluster
from meshwright.cost.analytic import Case, batch_of, estimate_of, evaluate_batch
from meshwright.cost.compute import OperatorPrice
from meshwright.cost.layouts import (
    PricedLayouts,
    machine_of,
    missing_operators,
    operators_of,
    price_layouts,
    price_states,
    state_bytes,
)
from meshwright.cost.passes import Pass, block_passes
from meshwright.engine import load_engine
from meshwright.errors import InputError
from meshwright.graph import Graph, Role
from meshwright.io.models import load_model
from meshwright.io.native import dumps, loads, read, write
from meshwright.profile import Host, MeasuredOperator, OperatorKey, Profile, profile_problems
from meshwright.runtime import profile as measuring
from meshwright.runtime.kernels import run_kernel
from meshwright.runtime.profile import (
    MIN_REPEATS,
    Bench,
    draw_operands,
    host_here,
    load_or_measure,
    local_of,
    measure_operator,
    measuring_problems,
    profile_operators,
)
from meshwright.strategy import Recompute, Strategy, expand, parse_shorthand
from meshwright.workload import DTYPE_BYTES, Workload

HOST = Host("some CPU", cores=2, threads=2, platform="Linux x86_64", torch="2.13.0")
ENGINE = load_engine("meshwright")
WORKLOAD = Workload(global_batch=8, seq_len=16, precision="float32")
SHORT_S = 0.005


@pytest.fixture(autouse=True)
def _small_and_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Little memory is touched between repeats, and by one thread: those that wait for one another would measure what
    else runs on the machine."""
    monkeypatch.setattr(measuring, "OTHERS_BYTES", 2**16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def model(name: str) -> Graph:
    return load_model(name)


def strategy(name: str, shorthand: str) -> Strategy:
    return expand(parse_shorthand(shorthand), model(name))


def keys_of(name: str, shorthand: str, workload: Workload = WORKLOAD) -> tuple[OperatorKey, ...]:
    return operators_of(model(name), strategy(name, shorthand), workload, ENGINE)


def product(batch: int = 2, inner: int = 3, outer: int = 4, **changes: Any) -> OperatorKey:
    """x (batch x inner) times a weight (outer x inner)."""
    key = OperatorKey(
        kind="einsum",
        spec="batch hidden, ffn hidden -> batch ffn",
        sizes=(("batch", batch), ("hidden", inner), ("ffn", outer)),
        dtypes=("float32", "float32"),
        roles=(Role.ACTIVATION, Role.PARAMETER),
    )
    return dataclasses.replace(key, **changes)


# --- gradients of weights in the formulas ----------------------------------------------------------------------------


def priced(
    name: str,
    shorthand: str,
    *,
    engine: str = "meshwright",
    cluster: str = "dgx-a100x8",
    profile: Profile | None = None,
    **changes: float,
) -> PricedLayouts:
    """A strategy's blocks, with constants changed."""
    chosen, software = strategy(name, shorthand), load_engine(engine)
    machine = machine_of(preset_cluster(cluster), software, WORKLOAD, profile=profile)
    machine = dataclasses.replace(machine, constants=dataclasses.replace(machine.constants, **changes))
    layouts = chosen.layouts(model(name))
    return price_layouts(model(name), layouts, {"pp": 1, **chosen.degrees}, chosen.microbatch, machine, WORKLOAD)


def operator_price(found: PricedLayouts, block: str, name: str) -> OperatorPrice:
    return next(price for price in found.blocks[block].operators if price.name == name)


def test_half_of_a_products_backward_is_its_weights() -> None:
    # Without kernels' starts and curves each of the three products of a matmul takes FLOPs / rate, or the traffic of
    # the same three tensors: forward F, backward 2 F, of which the weights' gradient F.
    found = priced("gpt2-tiny", "mbs=2", kernel_s=0.0, half_rate_depth=0.0, half_rate_area=0.0)
    block = next(name for name in found.blocks if name not in (found.graph.sequence[0], found.graph.sequence[-1]))
    operators = {operator.name: operator for operator in found.graph.block[block].operators}
    weighted = 0
    for price in found.blocks[block].operators:
        operator = operators[price.name]
        roles = [found.graph.block[block].tensor[name].role for name in operator.inputs]
        if operator.contractions and Role.PARAMETER in roles:
            assert price.backward_s == pytest.approx(2 * price.forward_s)
            assert price.weight_s == pytest.approx(price.forward_s)
            weighted += 1
        elif operator.kind == "bias":
            assert price.weight_s == price.backward_s > 0
        else:  # attention, norms, additions, activations
            assert price.weight_s == 0 < price.backward_s
    assert weighted == 6  # q, k, v, the output, up and down


def test_the_backward_of_an_embedding_is_all_weights() -> None:
    first = priced("llama-tiny", "mbs=2").blocks["embedding"].operators[0]
    assert first.weight_s == first.backward_s > 0


@pytest.mark.parametrize("engine", ["meshwright", "megatron-core"])
@pytest.mark.parametrize(
    ("name", "shorthand"),
    [
        ("llama-tiny", "mbs=2"),
        ("llama-tiny", "tp=2,sp=1,mbs=2,recompute=full"),
        ("gpt2-tiny", "tp=2,dp=2,zero=3,sp=1,mbs=2"),
        ("qwen2-tiny", "dp=2,cp=2,zero=1,recompute=selective"),
    ],
)
def test_a_backward_is_input_gradients_and_weight_gradients(name: str, shorthand: str, engine: str) -> None:
    found, state = priced(name, shorthand, engine=engine), strategy(name, shorthand).state
    gradient_bytes = state_bytes(found.machine.engine, WORKLOAD).gradient
    for block, states in price_states(found, state).items():
        price = found.blocks[block]
        assert all(0 <= one.weight_s <= one.backward_s for one in price.operators)
        assert price.weight_s == pytest.approx(sum(one.weight_s for one in price.operators), rel=1e-12)
        assert 0 <= price.weight_s <= price.backward_s
        for kind in Recompute:
            forward, backward = block_passes(found, price, states, kind)
            accumulate_s = 2 * gradient_bytes * states.numel / found.machine.rates.memory_Bps
            assert forward.weights == 0
            assert backward.weights == pytest.approx(price.weight_s + accumulate_s, rel=1e-12)
            assert 0 < backward.weights <= backward.compute <= backward.total
            # What is recomputed is none of it.
            assert backward.weights == block_passes(found, price, states, Recompute.NONE)[1].weights


# --- keys ------------------------------------------------------------------------------------------------------------


def test_keys_have_local_sizes() -> None:
    # llama-tiny under tp=2, mbs=2: half of the heads, of the columns of the MLP and of the vocabulary.
    whole, half = ({key.spec: dict(key.sizes) for key in keys_of("llama-tiny", text)} for text in ("mbs=2", "tp=2"))
    spec = "batch seq hidden, ffn hidden -> batch seq ffn"
    assert half[spec]["ffn"] * 2 == whole[spec]["ffn"] == model("llama-tiny").dims["ffn"]
    assert whole[spec]["batch"] == 2
    assert half[spec]["batch"] == 1
    table = "batch seq, vocab hidden -> batch seq hidden"
    assert half[table]["vocab"] * 2 == whole[table]["vocab"]
    assert {key.cut for key in keys_of("llama-tiny", "tp=2") if key.kind == "embedding"} == {("vocab",)}
    assert {key.cut for key in keys_of("llama-tiny", "mbs=2")} == {()}


def test_each_operator_stands_once_and_equal_ones_are_shared() -> None:
    keys = keys_of("llama-tiny", "mbs=2")
    assert len(keys) == len(set(keys))
    executed = sum(len(block.operators) for block in model("llama-tiny").blocks)
    assert len(keys) < executed  # k and v, gate and up, the norms of a layer are one each
    # Two strategies of one local shape need nothing new: one sequence per rank either way.
    assert keys_of("llama-tiny", "dp=4") == keys_of("llama-tiny", "pp=2")


def test_what_an_engine_fuses_is_no_operator_of_its_own() -> None:
    fusing = dataclasses.replace(ENGINE, fused_kinds=("norm",))
    graph, chosen = model("llama-tiny"), strategy("llama-tiny", "mbs=2")
    kinds = {key.kind for key in operators_of(graph, chosen, WORKLOAD, fusing)}
    assert kinds == {key.kind for key in keys_of("llama-tiny", "mbs=2")} - {"norm"}


def test_what_is_at_least_float32_is_float64_where_all_is() -> None:
    for precision, wide in (("bfloat16", "float32"), ("float64", "float64")):
        keys = keys_of("llama-tiny", "mbs=2", dataclasses.replace(WORKLOAD, precision=precision))
        (loss,) = (key for key in keys if key.kind == "cross_entropy")
        assert loss.dtypes == (wide, "int64")
        assert loss.roles == (Role.ACTIVATION, Role.INPUT)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_profile_is_read_as_it_was_written() -> None:
    keys = keys_of("gpt2-tiny", "tp=2,sp=1,mbs=2")
    profile = Profile(HOST, 2, tuple(MeasuredOperator(key, 1e-3, 2e-3 / 3, 0.0) for key in keys))
    text = dumps(profile)
    assert loads(text, "profile") == profile
    assert json.loads(text)["schema"] == "profile/1"
    assert not missing_operators(
        model("gpt2-tiny"), strategy("gpt2-tiny", "tp=2,sp=1,mbs=2"), WORKLOAD, ENGINE, profile
    )


def test_all_faults_of_a_profile_are_said_at_once() -> None:
    bad = product(kind="einsun", sizes=(("batch", 0), ("hidden", 3)), dtypes=("float23",), cut=("vocab",))
    profile = Profile(
        dataclasses.replace(HOST, cores=0),
        num_processes=0,
        operators=(
            MeasuredOperator(product(), -1.0, math.nan, math.inf),
            MeasuredOperator(product(), 1.0, 1.0, 1.0),
            MeasuredOperator(bad, 1.0, 1.0, 1.0),
        ),
    )
    assert [str(problem) for problem in profile_problems(profile)] == [
        "host.cores = 0: must be at least 1 (nearest: 1)",
        "num_processes = 0: must be at least 1 (nearest: 1)",
        "operators[0].forward_s = -1.0: seconds are finite and not negative",
        "operators[0].input_s = nan: seconds are finite and not negative",
        "operators[0].weight_s = inf: seconds are finite and not negative",
        "operators[1].operator = einsum batch hidden, ffn hidden -> batch ffn (batch=2 hidden=3 ffn=4): stands twice",
        "operators[2].operator.kind = einsun: no such kind of operator (nearest: einsum)",
        "operators[2].operator.sizes = batch hidden: the spec has the dims batch hidden ffn "
        "(nearest: batch hidden ffn)",
        "operators[2].operator.sizes.batch = 0: must be at least 1 (nearest: 1)",
        "operators[2].operator.dtypes = 1 entries: the spec has 2 inputs",
        f"operators[2].operator.dtypes = float23: known: {', '.join(DTYPE_BYTES)} (nearest: float32)",
        "operators[2].operator.cut = vocab: dims: batch hidden ffn",
    ]


def test_a_key_with_another_name_in_a_file_is_refused() -> None:
    data = json.loads(dumps(Profile(HOST, 1, (MeasuredOperator(product(), 1.0, 1.0, 1.0),))))
    data["operators"][0]["forward_ms"] = data["operators"][0].pop("forward_s")
    with pytest.raises(InputError, match=r"forward_ms.*unknown key.*nearest: forward_s"):
        loads(json.dumps(data), "profile")


# --- measured seconds in prices --------------------------------------------------------------------------------------


def test_measured_seconds_replace_formulas() -> None:
    # Every operator measured at 1, 2 and 4 s: a block takes its number of operators times that, and no start besides.
    keys = keys_of("llama-tiny", "mbs=2")
    profile = Profile(HOST, 1, tuple(MeasuredOperator(key, 1.0, 2.0, 4.0) for key in keys))
    found = priced("llama-tiny", "mbs=2", profile=profile)
    for name, price in found.blocks.items():
        number = len(found.graph.block[name].operators)
        assert (price.forward_s, price.backward_s, price.weight_s) == (number, 6 * number, 4 * number)
        state = price_states(found, strategy("llama-tiny", "mbs=2").state)[name]
        passes: tuple[Pass, Pass] = block_passes(found, price, state, Recompute.FULL)
        assert [one.launch for one in passes] == [0, 0]
        assert passes[1].recompute == number


def test_what_was_not_measured_keeps_its_formula() -> None:
    graph, chosen = model("llama-tiny"), strategy("llama-tiny", "mbs=2")
    (norm,) = (key for key in keys_of("llama-tiny", "mbs=2") if key.kind == "norm")
    profile = Profile(HOST, 1, (MeasuredOperator(norm, 1.0, 2.0, 4.0),))
    plain, found = priced("llama-tiny", "mbs=2"), priced("llama-tiny", "mbs=2", profile=profile)
    for block, price in found.blocks.items():
        kinds = {operator.name: operator.kind for operator in graph.block[block].operators}
        for one in price.operators:
            if kinds[one.name] == "norm":
                assert (one.forward_s, one.backward_s, one.launches) == (1.0, 6.0, 0)
            else:
                assert one == operator_price(plain, block, one.name)
    missing = missing_operators(graph, chosen, WORKLOAD, ENGINE, profile)
    assert missing == tuple(key for key in keys_of("llama-tiny", "mbs=2") if key != norm)


def test_columns_of_layouts_have_each_its_own_key() -> None:
    # Two layouts in one column, microbatches of 1 and 2: of the second alone everything was measured.
    graph, chosen = model("llama-tiny"), strategy("llama-tiny", "tp=2")
    keys = keys_of("llama-tiny", "tp=2,mbs=2")
    profile = Profile(HOST, 2, tuple(MeasuredOperator(key, 1.0, 2.0, 4.0) for key in keys))
    microbatch = np.array([1, 2])
    degrees = {axis: np.full(2, degree) for axis, degree in {"pp": 1, **chosen.degrees}.items()}
    machine = machine_of(preset_cluster("local-cpux2"), ENGINE, WORKLOAD, profile=profile)
    layouts = chosen.layouts(graph)
    column = price_layouts(graph, layouts, degrees, microbatch, machine, WORKLOAD)
    plain = price_layouts(graph, layouts, degrees, microbatch, dataclasses.replace(machine, profile=None), WORKLOAD)
    for name, price in column.blocks.items():
        number = len(graph.block[name].operators)
        # What a microbatch does not change (weights alone) has one key in both layouts; here nothing is such.
        assert price.forward_s[0] == pytest.approx(plain.blocks[name].forward_s[0], rel=1e-12)
        assert price.weight_s[0] == pytest.approx(plain.blocks[name].weight_s[0], rel=1e-12)
        assert (price.forward_s[1], price.backward_s[1], price.weight_s[1]) == (number, 6 * number, 4 * number)
        assert price.launches.tolist() == [number, 0]


def test_the_whole_step_is_priced_as_measured() -> None:
    # 4 microbatches of 2 sequences on one rank: 4 x (1 + 6) s for every operator, beside what is formula (updates).
    graph, chosen = model("llama-tiny"), strategy("llama-tiny", "mbs=2")
    profile = Profile(HOST, 1, tuple(MeasuredOperator(k, 1.0, 2.0, 4.0) for k in keys_of("llama-tiny", "mbs=2")))
    cluster = preset_cluster("local-cpux1")
    case = Case(graph, cluster, chosen, WORKLOAD, ENGINE)
    found = estimate_of(evaluate_batch(batch_of([case]), machine_of(cluster, ENGINE, WORKLOAD, profile=profile)), row=0)
    number = sum(graph.counts[block.name] * len(block.operators) for block in graph.blocks)
    assert found.time["compute"] == pytest.approx(4 * 7 * number, rel=1e-4)
    assert found.step_time_s == pytest.approx(sum(found.time.values()))


# --- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shorthand", "precision"),
    [
        ("llama-tiny", "tp=2,sp=1,mbs=2", "bfloat16"),
        ("gpt2-tiny", "dp=2,cp=2", "float64"),
        ("qwen2-tiny", "mbs=2", "float32"),
    ],
)
def test_every_operator_runs_alone_at_its_local_sizes(name: str, shorthand: str, precision: str) -> None:
    for key in keys_of(name, shorthand, dataclasses.replace(WORKLOAD, precision=precision)):
        operands = draw_operands(key, torch.Generator().manual_seed(0))
        sizes, local = dict(key.sizes), local_of(key)
        results = run_kernel(local, *operands)
        for result, dims in zip(results, key.operator.output_dims, strict=True):
            if result is not None:
                assert list(result.shape) == [sizes[dim] for dim in dims]
                assert result.isfinite().all()
        forward_s, input_s, weight_s = measure_operator(key, operands, enough_s=0.0)
        assert forward_s > 0
        assert (input_s > 0) == (Role.ACTIVATION in key.roles)
        assert (weight_s > 0) == (Role.PARAMETER in key.roles)


def test_a_larger_product_takes_longer_each_way() -> None:
    # 512 times the work: more than any noise.
    small, large = (
        measure_operator(key, draw_operands(key, torch.Generator().manual_seed(0)), enough_s=0.02)
        for key in (product(64, 64, 64), product(512, 512, 512))
    )
    assert all(more > less for less, more in zip(small, large, strict=True))


def test_each_way_of_the_backward_is_one_product() -> None:
    # What is timed as one gradient does not compute the other: 5 forwards and 5 of each gradient after one of each to
    # warm up, 2 x 8 x 16 x 32 FLOPs each.
    key = product(8, 16, 32)
    operands = draw_operands(key, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        measure_operator(key, operands, enough_s=0.0)
    assert counter.get_total_flops() == 3 * (MIN_REPEATS + 1) * 2 * 8 * 16 * 32


def test_two_processes_measure_what_is_not_known() -> None:
    keys = keys_of("llama-tiny", "tp=2,sp=1,mbs=2")[:6]
    known = Profile(host_here(2), 2, (MeasuredOperator(keys[0], 1.0, 2.0, 4.0),))
    kept: list[Profile] = []
    found = profile_operators(keys, num_processes=2, known=known, enough_s=SHORT_S, keep=kept.append)
    assert found.operators[0] == known.operators[0]
    assert [one.operator for one in found.operators] == list(keys)
    assert all(one.forward_s > 0 for one in found.operators)
    assert kept[-1] == found
    assert not profile_problems(found)


def test_a_file_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keys = tmp_path / "profile.json", keys_of("llama-tiny", "mbs=2")[:3]
    first = load_or_measure(path, keys, 1, enough_s=SHORT_S)
    assert read(path, "profile") == first
    assert [one.operator for one in first.operators] == list(keys)
    monkeypatch.setattr(measuring, "on_ranks", lambda *_: pytest.fail("measured again"))
    assert load_or_measure(path, keys, 1) == first


def test_what_was_measured_before_ctrl_c_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keys = tmp_path / "profile.json", keys_of("llama-tiny", "mbs=2")

    def interrupted(size: int, bench: Bench) -> None:
        # Two processes: of the second operator one of them has no word yet, and half a line.
        bench.lines(0).write_text("[0, 1.0, 2.0, 4.0]\n[1, 1.0, 2.0, 4.0]\n")
        bench.lines(1).write_text("[0, 0.5, 3.0, 4.0]\n[1, 1.0, 2")
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "on_ranks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_or_measure(path, keys, 2)
    assert read(path, "profile").operators == (MeasuredOperator(keys[0], 1.0, 3.0, 4.0),)  # the slowest of both


def test_a_profile_of_another_machine_is_refused(tmp_path: Path) -> None:
    path, keys = tmp_path / "profile.json", keys_of("llama-tiny", "mbs=2")
    here = host_here(1)
    write(Profile(dataclasses.replace(here, cpu="abacus", torch="0.1"), 3), path)
    with pytest.raises(InputError) as raised:
        load_or_measure(path, keys, 1)
    fix = "(nearest: another file, or delete this one and measure again)"
    rule = "times of one say nothing of the other"
    assert str(raised.value).splitlines() == [
        f"{path}: host.cpu = abacus: here it is {here.cpu}: {rule} {fix}",
        f"{path}: host.torch = 0.1: here it is {here.torch}: {rule} {fix}",
        f"{path}: num_processes = 3: 1 processes run at once; a profile is of one number of them {fix}",
    ]
    assert read(path, "profile").num_processes == 3  # nothing was overwritten


def test_what_cannot_be_measured_is_said_before_anything_starts(tmp_path: Path) -> None:
    odd = [
        product(kind="top_k"),
        product(dtypes=("float16", "float32")),
        product(kind="activation", attributes=(("function", "snake"),)),
        product(kind="rotary", attributes=(("scaling", '{"rope_type": "yarn"}'),)),
    ]
    with pytest.raises(InputError) as raised:
        profile_operators(odd, num_processes=65)
    text = str(raised.value)
    for word in ("top_k", "float16 in", "activations that can be run", "rotary scalings", "num_processes = 65"):
        assert word in text
    assert all(measuring_problems(key) for key in odd)
    # A file holds what can be measured; the rest is priced by formula.
    profile = load_or_measure(tmp_path / "profile.json", odd, 1)
    assert not profile.operators


def test_a_profile_needs_a_file_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--profile = -: is read and written"):
        load_or_measure("-", [product()], 1)
    with pytest.raises(InputError, match="cannot be written"):
        load_or_measure(tmp_path / "no" / "profile.json", [product()], 1)
