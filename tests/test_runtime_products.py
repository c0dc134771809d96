"""Every product of strategies trains as one device does: three steps in float64, every loss and every gradient.

A model's strategies run out of one worker process, since starting PyTorch costs more than the steps. Of the library's
silent errors those that concern us are strategies here: tied embeddings that come apart (`qwen2-tiny` is tied) and
gradients of head norms that nobody sums (`uneven` has them, under tensor parallelism).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

pytest.importorskip("torch")

from meshwright.results import Measurement
from meshwright.runtime.weights import parameter_instances
from meshwright.strategy import BlockRange, Stage, Strategy, expand, parse_shorthand
from runtime_strategies import PRODUCTS, WORKLOAD, job, model, run_checked, sampled

CASES = [(name, shorthand) for name, shorthands in PRODUCTS.items() for shorthand in shorthands]
SAMPLED = sampled(seed=20261124, count=10)


@cache
def products(name: str) -> dict[str, Measurement]:
    return dict(zip(PRODUCTS[name], run_checked([job(name, text) for text in PRODUCTS[name]]), strict=True))


@cache
def samples() -> list[Measurement]:
    return run_checked([job(name, shorthand) for name, shorthand in SAMPLED])


def assert_equal_to_one_device(name: str, found: Measurement) -> None:
    assert found.check is not None
    assert found.check.tolerance == 1e-10
    assert found.check.passed, found.check
    assert found.check.num_gradients == len({instance.name for instance in parameter_instances(model(name))})
    assert len(found.losses) == len(found.step_times_s) == 3
    assert len(set(found.losses)) == 3  # it learns something, so updates are compared too


@pytest.mark.parametrize(("name", "shorthand"), CASES)
def test_product_equals_one_device(name: str, shorthand: str) -> None:
    assert_equal_to_one_device(name, products(name)[shorthand])


@pytest.mark.parametrize("index", range(len(SAMPLED)), ids=lambda index: f"{SAMPLED[index][0]}:{SAMPLED[index][1]}")
def test_sampled_strategy_equals_one_device(index: int) -> None:
    assert_equal_to_one_device(SAMPLED[index][0], samples()[index])


def test_losses_do_not_depend_on_the_strategy() -> None:
    for name in PRODUCTS:
        first, *others = products(name).values()
        for other in others:
            assert other.losses == pytest.approx(first.losses, rel=1e-12)


def test_state_sharding_and_recomputation_save_memory() -> None:
    peaks = {key: found.peak_memory_bytes for key, found in products("llama-tiny").items()}
    assert peaks["dp=2,zero=1"] > peaks["dp=4,dp_shard=2,zero=3,recompute=selective"]
    assert peaks["pp=2,tp=2,dp=2,zero=1,sp=1,mbs=2"] > peaks["pp=2,tp=2,dp=2,zero=3,recompute=full,mbs=2"]


def by_hand() -> list[Strategy]:
    """Strategies that no shorthand means: unequal stages dealt to ranks in another order; and operators split so that
    tensors change hands in every way (all-to-all between activation and down, a boundary that blocks see differently).
    """
    graph = model("qwen2-tiny")
    pipelined = expand(parse_shorthand("pp=2,mbs=2"), graph)
    stages = (Stage(1, (BlockRange(0, 1),)), Stage(0, (BlockRange(1, 4), BlockRange(4, 6))))
    tensor = expand(parse_shorthand("tp=2,mbs=2"), graph)
    layer: dict[str, dict[str, str]] = {name: {} for name in tensor.splits["layer"]}
    layer |= {name: {"tp": "ffn"} for name in ("gate", "up", "activation")}
    layer |= {name: {"tp": "seq"} for name in ("down", "norm1", "x")}
    return [replace(pipelined, stages=stages), replace(tensor, splits={**tensor.splits, "layer": layer})]


def test_strategies_by_hand_equal_one_device() -> None:
    jobs = [replace(job("qwen2-tiny", "dp=1"), strategy=strategy) for strategy in by_hand()]
    for found in run_checked(jobs):
        assert_equal_to_one_device("qwen2-tiny", found)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_shorter_types_stay_within_their_tolerance(precision: str) -> None:
    workload = replace(WORKLOAD, precision=precision)
    names = ("llama-tiny", "gpt2-tiny")
    for found in run_checked([job(name, "tp=2,dp=2,zero=3,sp=1,mbs=2", workload) for name in names]):
        assert found.check is not None
        assert found.check.passed, found.check
        assert found.check.max_gradient_difference > 1e-8  # rounding is seen, so it was that type
